"""What a newcomer meets first: the two commands, the packaging, and words that have no place here."""

import re
import tomllib
from pathlib import Path

import pytest

import classact
import classact.catalogue
from classact.saving import PACKAGES

ROOT = Path(classact.__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a source checkout")


def test_the_core_is_small():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[<>=~ ]", item)[0] for item in project["dependencies"]}
    expected = {"torch", "numpy", "scipy", "scikit-learn", "safetensors", "typer", "rich", "matplotlib", "lazy_loader"}
    assert names == expected | {"jaxtyping"}
    assert {"compare", "mil", "explain", "ray", "docs", "dev"} <= set(project["optional-dependencies"])


def test_every_target_of_the_makefile_is_there():
    text = (ROOT / "Makefile").read_text()
    assert all(
        re.search(rf"^{target}:", text, re.MULTILINE) for target in ("help", "demo", "test", "lint", "docs", "bench")
    )


def test_the_wheel_carries_results_and_catalogue():
    assert (ROOT / "src/classact/py.typed").exists()
    assert list((ROOT / "src/classact/catalogue").glob("*.toml"))
    assert list((ROOT / "src/classact/results").glob("*/cpu.json"))


def test_saved_models_come_from_families_only():
    assert {f"classact.{family}" for family in classact.catalogue.FAMILIES} == PACKAGES
