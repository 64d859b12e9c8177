# Every target makes .venv and installs what it needs, so a fresh machine needs nothing but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM = false

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing classact and its development tools into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(READY)

demo: $(READY) ## compare the multiple-instance methods on real bags of handwritten digits
	@$(BIN)/classact compare mil digits --methods mean,max,abmil,acmil,abmil+aem --repeats 2 --epochs 30 --lr 1e-3 --workers 2 --out report --overwrite

test: $(READY) ## run the tests on two cores
	@$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

lint: $(READY) ## ruff (rules and format) and mypy over the package
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY) ## time methods beside their peers, and the command line
	@$(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" -p no:xdist -q

docs: export NO_MKDOCS_2_WARNING = 1
docs: export DISABLE_MKDOCS_2_WARNING = true
docs: $(READY) ## build the documentation into site/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@$(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

.PHONY: help demo test lint bench docs
.DEFAULT_GOAL := help
