"""Networks are looked into with every tool, from the command line and as a library."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from classact.cli import app
from classact.data.bag_files import DataError
from classact.data.networks import load_network
from classact.evidence.store import StudyError
from classact.tasks.probe import Data, Loader, load_networks, probe, read_data, shared_layers


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module that builds a network, weights of two trainings, and a table of two classes."""
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n\n\n"
        "def mlp():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(),"
        " nn.Linear(5, 2))\n\n\n"
        "def tanh():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))\n\n\n"
        "def cnn():\n    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),"
        " nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(8, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(120, 4, generator=generator)
    y = (x[:, 0] > 0.5).long()
    for seed in range(2):
        torch.manual_seed(seed)
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        torch.save(model.state_dict(), tmp_path / f"w{seed}.pt")
    pd.DataFrame(x.numpy(), columns=list("abcd")).assign(label=y.numpy()).to_csv(tmp_path / "t.csv", index=False)
    yield tmp_path
    sys.modules.pop("own_nets", None)


def run(*arguments):
    done = CliRunner().invoke(app, ["probe", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_two_networks_are_compared_unit_by_unit(place):
    weights = ["--weights", "w0.pt", "--weights", "w1.pt"]
    said = run("convergent", "--model", "own_nets:mlp", *weights, "--data", "t.csv", "--out", "r")
    assert "best partner" in said
    table = pd.read_csv(place / "r" / "table.csv")
    assert set(table["condition"]) == {"trained", "untrained", "permuted"}
    page = (place / "r" / "report.html").read_text()
    assert "Do two networks know the same things?" in page and page.count("data:image/png") == 4
    rows = json.loads((place / "r" / "report.json").read_text())["alignments"]
    assert len(rows) == len(table)


def test_a_network_knows_what_it_knows_itself(place):
    weights = ["w0.pt", "w0.pt"]
    found = probe("convergent", "t.csv", ["own_nets:mlp"], weights=weights, layers=["3"], out=place / "r")
    assert found.report["3"].bipartite.value == pytest.approx(1, abs=1e-4)
    assert "1.00" in found.summary[0]


def test_patterns_are_mined_judged_and_proved(place):
    options = {"weights": ["w0.pt"], "delta": 0.9, "verify": 2, "seconds": 5.0}
    found = probe("nap", "t.csv", ["own_nets:mlp"], out=place / "r", **options)
    assert found.table["class"].tolist() == ["0", "1", "mean"]
    model = load_networks(["own_nets:mlp"], ["w0.pt"])[0].model
    from classact.probe import load_patterns, preactivations

    patterns = load_patterns(place / "r" / "patterns.npz")
    with np.load(place / "r" / "witnesses.npz") as witnesses:
        for name in witnesses.files:  # an input that is said to follow two patterns does
            x = torch.from_numpy(witnesses[name])[None]
            z = preactivations(model.double(), x).z
            assert all(bool(patterns[int(c)].follows(z)[0]) for c in name.split("-"))
        proved = 1 - len(witnesses.files)
    assert f"{proved} pairs proved not, {1 - proved} shown" in " ".join(found.summary)
    assert any("Largest radius" in line for line in found.summary)


def test_sparsity_and_pruning_are_reported(place):
    said = run("lazyneuron", "--model", "own_nets:mlp", "--weights", "w0.pt", "--data", "t.csv", "--out", "r1")
    assert "nonzero" in said and (place / "r1" / "report.html").exists()
    said = run("ftwt", "--model", "own_nets:cnn", "--data", "digits", "--limit", 40, "--grid", "1,0.8", "--out", "r2")
    assert "reduction" in said and (place / "r2" / "report.html").exists()


def test_the_bias_of_a_task_is_estimated_without_a_network(place):
    options = ["--train", 40, "--test", 40, "--samples", 60, "--spaces", "rbf", "--out", "r"]
    said = run("inductivebias", "--data", "digits", *options)
    assert "rbf" in said and (place / "r" / "report.html").exists()


def test_photographs_are_prepared_as_the_network_wants_and_read_anew_in_every_pass(tmp_path):
    from PIL import Image

    for number, name in enumerate(("tench", "tench", "0", "nothing of the kind")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (40 + number, 30), (200, 10 * number, 0)).save(tmp_path / name / f"{number}.png")
    network = load_network()
    data = read_data(tmp_path, network, photos=True)
    assert sorted(data.y.tolist()) == [-1, 0, 0, 0]
    loader = Loader(data, network, 3, "cpu")
    first, again = list(loader), list(loader)
    assert [len(x) for x, *_ in first] == [3, 1] and len(loader) == 2
    assert all(len(batch) == 1 for batch in first)  # one class is unknown, so that nothing is said of accuracy
    assert first[0][0].shape == (3, 3, 224, 224) and torch.equal(first[0][0], again[0][0])
    assert len(read_data(tmp_path, network, photos=True, limit=2)) == 2


def test_layers_of_the_same_name_are_taken_but_not_the_last():
    assert shared_layers(mlp(), mlp()) == ["1", "3"]
    assert len(shared_layers(nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]), mlp())) >= 1
    with pytest.raises(StudyError, match="FIRST"):
        shared_layers(nn.Sequential(nn.ReLU()), mlp())


@pytest.mark.bare
def test_what_does_not_fit_is_named(place):
    for arguments, message in (
        (("convergent", "t.csv", ["own_nets:mlp"]), "expected 2 networks"),
        (("nap", "t.csv", []), "model: expected at least one"),
        (("nap", "digits", ["own_nets:mlp"]), "does not take items of shape"),
        (("tea leaves", "t.csv", ["own_nets:mlp"]), "tool: expected one of"),
    ):
        with pytest.raises((StudyError, DataError), match=message):
            probe(*arguments, out=place / "no")
    with pytest.raises(StudyError, match="weights: expected as many"):
        load_networks(["own_nets:mlp", "own_nets:mlp"], ["w0.pt"])
    with pytest.raises(ValueError, match="ReLU modules"):
        probe("nap", "t.csv", ["own_nets:tanh"], verify=1, out=place / "no2")
    data = Data("x", torch.tensor([-1, -1]), x=torch.rand(2, 4))
    from classact.tasks.probe import probe_nap

    network = load_networks(["own_nets:mlp"], ["w0.pt"])[0]
    with pytest.raises(DataError, match="no item has a class"):
        probe_nap(network, Loader(data, network, 2, "cpu"), 0.9, None, 0, 1.0, place, 0)
