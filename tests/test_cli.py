"""The command line, called in process."""

import json
from urllib.error import URLError

import numpy as np
import pytest
from typer.testing import CliRunner

from classact.catalogue import load_entries
from classact.cli import app

RUNNER = CliRunner()


def call(*words, code=0):
    result = RUNNER.invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result.output


def test_help_names_the_jobs():
    said = call("--help")
    assert all(verb in said for verb in ("compare", "papers", "reproduce", "data"))


def test_papers():
    assert "73 papers" in call("papers")
    entry = call("papers", "acmil")
    assert "Attention-Challenging" in entry
    assert "* beats-abmil" in entry
    assert "from classact.mil import ACMIL" in entry
    assert call("papers", "acmil", "--bibtex").startswith("@inproceedings{zhang2024acmil,")
    assert json.loads(call("papers", "acmil", "--json"))["arxiv"] == "2311.07125"
    assert {e["family"] for e in json.loads(call("papers", "--family", "mil", "--json"))} == {"mil"}
    assert "Nothing found" in call("papers", "zzzz", code=1)
    assert "no family 'mill'" in call("papers", "--family", "mill", code=1)


def test_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    assert "ucsb_breast_cancer" in call("data", "list")
    said = call("data", "info", "musk1")
    assert "licence: MIT" in said
    assert "here: no; `classact data fetch musk1`" in said
    assert "no such data set" in call("data", "info", "musk9", code=1)
    assert "nothing to fetch" in call("data", "fetch", "digits")

    def offline(*_):
        raise URLError("no route")

    monkeypatch.setattr("classact.data.registry._download", offline)
    said = call("data", "fetch", "fashion-mnist", code=1)
    assert "cannot download fashion-mnist" in said
    assert "t10k-labels-idx1-ubyte.gz" in said


@pytest.fixture
def slides(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "bags"
    folder.mkdir()
    rows = ["case_id,slide_id,label"]
    for i in range(24):
        x = rng.normal(size=(rng.integers(3, 7), 5)).astype(np.float32)
        x[0, 0] += 4 * (i % 2)
        np.savez(folder / f"s{i}.npz", features=x, coords=rng.integers(0, 999, size=(len(x), 2)))
        rows.append(f"p{i // 2 * 2 + i % 2},s{i}.svs,{'tumor' if i % 2 else 'normal'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_compare(slides):
    config = slides / "study.toml"
    config.write_text('methods = "mean,acmil+aem"\nepochs = 9\nfolds = 3\n[set.acmil]\nbranches = 2\n')
    words = ["compare", "mil", slides / "bags", "--labels", slides / "labels.csv", "--config", config]
    words += ["--epochs", "2", "--set", "aem.weight=0.02", "--set", "acmil.lr=1e-3", "--out", slides / "report"]
    said = call(*words)
    assert "acmil+aem" in said
    assert f"Report: {slides / 'report' / 'report.html'}" in said
    definition = json.loads((slides / "report" / "study.json").read_text())
    assert definition["settings"] == {"acmil": {"branches": 2, "lr": 1e-3}, "aem": {"weight": 0.02}}
    assert definition["options"] == {"epochs": 2}
    assert definition["folds"] == 3
    assert definition["data"]["groups"] == "case_id"
    assert "already" in call(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "acmli"], "no method 'acmli'; did you mean acmil"),
        (["--folds", "25"], "24 groups cannot be cut into 25 folds"),
        (["--reference", "max", "--methods", "mean"], "--reference max: not among the methods mean, prevalence"),
        (["--set", "lr=3"], "expected METHOD.NAME=VALUE, such as acmil.lr=1e-4"),
        (["--class-weight", "even"], "--class-weight: expected 'balanced', got 'even'"),
        (["--group", "hospital"], "no column 'hospital' says which bags belong together"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["--folds", "1"], "expected at least 2 folds and 1 repeat, got 1 and 1"),
    ],
)
def test_compare_refuses(words, message, slides):
    base = ["compare", "mil", slides / "bags", "--labels", slides / "labels.csv", "--out", slides / "out"]
    assert message in call(*base, *words, code=1).replace("\n", " ")
    assert not (slides / "out" / "report.html").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_method_from_the_current_folder(slides, workers, monkeypatch):
    import os
    import subprocess
    import sys
    from pathlib import Path

    (slides / f"mine{workers}.py").write_text("from classact.mil import MeanMIL\n\nclass Mine(MeanMIL):\n    pass\n")
    words = ["compare", "mil", "bags", "--labels", "labels.csv", "--methods", f"mine{workers}:Mine", "--folds", "2"]
    command = [Path(sys.executable).with_name("classact"), *words, "--epochs", "1", "--workers", str(workers)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(command, cwd=slides, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    assert f"mine{workers}:Mine" in found.stdout


def test_unknown_task(slides):
    assert "No such command 'mill'" in call("compare", "mill", slides, code=2)


def test_reproduce_needs_a_name_and_an_experiment():
    assert "name a paper, --family or --all" in call("reproduce", code=2)
    assert "no paper 'acmli'; did you mean acmil" in call("reproduce", "acmli", code=1)
    planned = next(slug for slug, entry in load_entries().items() if entry.status == "planned")
    assert "no experiments yet" in call("reproduce", planned, code=1)
    assert "expected one of smoke, cpu, gpu, paper" in call("reproduce", "acmil", "--scale", "huge", code=1)


def test_ctrl_c(slides, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("classact.tasks.compare", interrupted)
    assert "Finished cells are kept" in call("compare", "mil", "digits", code=130)
