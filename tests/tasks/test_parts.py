"""Parts are exchanged in networks for data on which it is known what must come out."""

import importlib
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from classact.cli import app
from classact.data.labelled import Labelled
from classact.evidence.parts import (
    Items,
    PartStudy,
    best_rate,
    extended,
    learning_rates,
    match_width,
    parameters,
    run_cell,
    still_improving,
)
from classact.evidence.store import StudyError
from classact.tasks.parts import BACKBONES, SLOTS, Builder, as_trained, compare_parts, staged

QUICK = {"seeds": 3, "tune": 1, "epochs": 3, "batch_size": 32, "width": 16, "match": ("width",), "quiet": True}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own with parts."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Twin(nn.Module):\n    def forward(self, x):\n        return x.relu()\n\n\n"
        "class Explodes(nn.Module):\n    def forward(self, x):\n        return x.exp().exp().exp()\n\n\n"
        "class Narrow(nn.Module):\n"
        "    def __init__(self, in_features, out_features):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(in_features, 20), nn.Linear(20, out_features)\n"
        "    def forward(self, x):\n        return self.b(self.a(x))\n\n\n"
        "def wrong_shape(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(2, 7), nn.ReLU())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "mine"
    sys.modules.pop("mine", None)


def exclusive_or(n: int = 400) -> Labelled:
    """Two columns; the class is whether their signs differ, which no linear network can tell."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Labelled("exclusive-or", x, (x[:, 0] * x[:, 1] < 0).long(), ("same", "other"))


def test_a_part_that_matters_is_found_and_a_twin_makes_no_difference(tmp_path, mine):
    options = QUICK | {"epochs": 8, "tune": 3, "seeds": 4}
    found = compare_parts("activations", exclusive_or(), ["none", f"{mine}:Twin"], out=tmp_path / "r", **options)
    rows = {row.arm: row for row in found.rows}
    assert found.original == "relu" and set(rows) == {"relu", "none", "mine:Twin"}
    assert rows["none"].difference.high < -0.2 and rows["none"].p < 0.05
    twin = rows["mine:Twin"].difference
    assert (twin.effect, twin.low, twin.high) == (0, 0, 0)  # same weights, same batches, same steps
    assert "worse: none" in found.summary[0]


def test_networks_of_one_seed_differ_in_the_part_only():
    for slot, arm in (("activations", "prelu"), ("norms", "group"), ("linear", "linear")):
        builder = Builder(slot, SLOTS[slot].backbone, "", (1, 8, 8), 10)
        plain, other = builder("", 16, 3), builder(arm, 16, 3)
        own = dict(other.named_parameters())
        for name, p in plain.named_parameters():
            if p.ndim > 1:
                assert torch.equal(p, own[name]), name
        assert not torch.equal(next(builder("", 16, 4).parameters()), next(plain.parameters()))


def test_labels_of_the_test_part_change_nothing_but_its_score(tmp_path):
    items = exclusive_or()
    test = items.x[:100], items.y[:100]
    with_test = [
        Labelled("x", items.x[100:], items.y[100:], items.classes, test[0], labels) for labels in (test[1], 1 - test[1])
    ]
    a, b = (
        compare_parts("activations", one, ["gelu"], out=tmp_path / str(i), **QUICK) for i, one in enumerate(with_test)
    )
    assert a.tuning == b.tuning
    for key in a.cells:
        assert np.array_equal(a.curves[key]["loss"], b.curves[key]["loss"])
        for seed, cell in a.cells[key].items():
            assert cell["accuracy"] == pytest.approx(1 - b.cells[key][seed]["accuracy"])


def test_a_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from classact.evidence import executors

    first = compare_parts("activations", exclusive_or(), ["gelu"], out=tmp_path / "r", **QUICK)
    ran = []
    monkeypatch.setattr(
        executors,
        "_timed",
        lambda function, shared, job, of=executors._timed: ran.append(job) or of(function, shared, job),
    )
    more = compare_parts("activations", exclusive_or(), ["gelu", "silu"], out=tmp_path / "r", **QUICK)
    assert {job.arguments[0] for job in ran} == {"silu"}
    for key, cells in first.cells.items():
        assert more.cells[key] == cells
    with pytest.raises(StudyError, match="epochs"):
        compare_parts("activations", exclusive_or(), ["gelu"], out=tmp_path / "r", **(QUICK | {"epochs": 4}))


def test_a_part_that_explodes_is_marked_and_does_not_end_the_run(tmp_path, mine):
    with pytest.raises(StudyError, match="every learning rate diverged"):
        compare_parts("activations", exclusive_or(), [f"{mine}:Explodes"], out=tmp_path / "r", **QUICK)


def test_equal_parameters_are_reached_by_the_width(tmp_path, mine):
    found = compare_parts(
        "linear", exclusive_or(), [f"{mine}:Narrow"], out=tmp_path / "r", **(QUICK | {"match": ("width", "params")})
    )
    rows = {(row.arm, row.match): row for row in found.rows}
    plain, equal = rows["linear", "params"], rows["mine:Narrow", "params"]
    assert abs(equal.parameters / plain.parameters - 1) <= 0.02 or "params off by" in "; ".join(equal.remarks)
    assert rows["mine:Narrow", "width"].parameters > 1.3 * plain.parameters
    assert equal.width < plain.width


@pytest.mark.parametrize(
    ("slot", "methods"), [("norms", "group,instance,layer,none"), ("attention", "softmax"), ("linear", "linear")]
)
def test_every_slot_runs_from_the_command_line(slot, methods, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "small.npz", x=rng.integers(0, 256, (60, 7, 7), dtype=np.uint8), y=np.arange(60) % 2)
    width = {"norms": 4, "attention": 24, "linear": 8}[slot]
    result = CliRunner().invoke(
        app,
        ["compare", slot, str(tmp_path / "small.npz"), "--methods", methods, "--seeds", "2", "--tune", "1",
         "--epochs", "1", "--width", str(width), "--batch-size", "20", "--out", str(tmp_path / "report")],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "data:image/png" in page
    table = pd.read_csv(tmp_path / "report" / "results.csv")
    assert set(methods.split(",")) <= set(table["arm"])
    assert len(pd.read_csv(tmp_path / "report" / "cells.csv")) >= 2 * len(methods.split(","))
    assert r"\bottomrule" in (tmp_path / "report" / "table.tex").read_text()


def test_every_named_part_trains_in_a_network_it_fits():
    x, y = torch.randn(40, 1, 7, 7, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    items = Items(x, y)
    for slot, place in SLOTS.items():
        for arm in place.methods:
            backbone = "vit" if arm == "rms" else place.backbone
            builder = Builder(slot, backbone, "", (1, 7, 7), 2)
            study = PartStudy(builder, items, items, items, 2, 8, 0.01, "cpu", staged)
            values, curves = run_cell(study, arm, 8 if backbone == "cnn" else 24, 0.003, 0, tuning=False)
            assert not values["diverged"] and len(curves["loss"]) == 2, (slot, arm)
            size = parameters(as_trained(builder(arm, 8 if backbone == "cnn" else 24, 0)))
            assert abs(values["parameters"] / size - 1) < 0.02  # which spaces S-KAN keeps shows in the end


@pytest.mark.parametrize(
    ("slot", "options", "message"),
    [
        ("activations", {"methods": ["gelo"]}, "no such method for activations; did you mean gelu"),
        ("activations", {"methods": ["nowhere:Thing"]}, "nowhere:Thing: No module named"),
        ("activations", {"backbone": "bert"}, "expected mlp, cnn, vit, timm:NAME"),
        ("activations", {"backbone": "cnn"}, "needs images, and exclusive-or is a table"),
        ("norms", {}, "has no normalisation; --backbone cnn and vit have"),
        ("attention", {"backbone": "mlp"}, "has no attention"),
        ("activations", {"seeds": 1}, "seeds: expected at least 2"),
        ("activations", {"match": ("size",)}, "match: expected some of width, params, flops, time"),
        ("activations", {"backbone": "mine:wrong_shape", "width": None}, r"expected logits \(2, 2\), got \(2, 7\)"),
    ],
)
def test_what_does_not_fit_is_said_before_training(slot, options, message, tmp_path, mine):
    with pytest.raises(StudyError, match=message):
        compare_parts(slot, exclusive_or(), out=tmp_path / "r", **(QUICK | options))
    assert not (tmp_path / "r").exists()


def test_backbones_without_a_width_are_compared_as_they_are(tmp_path):
    pytest.importorskip("timm")
    x = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    items = Labelled("noise", x, torch.arange(60) % 2, ("a", "b"))
    found = compare_parts(
        "activations", items, ["relu"], backbone="timm:test_vit", out=tmp_path / "r", seeds=2, tune=1, epochs=1,
        batch_size=30, quiet=True,
    )  # fmt: skip
    assert found.original == "gelu" and {row.width for row in found.rows} == {None} and not found.reference
    with pytest.raises(StudyError, match="no width that could be changed"):
        compare_parts("activations", items, backbone="timm:test_vit", match=("flops",), out=tmp_path / "r")


def test_the_grid_of_learning_rates():
    assert learning_rates(5) == [0.0003, 0.000949, 0.003, 0.00949, 0.03]
    assert extended([0.001, 0.01, 0.1], [0.001]) == [0.0001, 0.001, 0.01, 0.1]
    assert extended([0.001, 0.01], [0.01]) == [0.001, 0.01]
    assert best_rate({0.1: 0.5, 0.01: 0.7, 0.001: 0.7}) == 0.001
    assert match_width(lambda width: width**2, 97, 3) == 10


def test_an_arm_that_still_improves_is_marked():
    rng = np.random.default_rng(0)
    flat = 0.8 + 0.001 * rng.normal(size=(5, 10))
    assert not still_improving(flat)
    assert still_improving(flat + np.linspace(0, 0.2, 10))
    assert still_improving(flat[:, :2])  # too short to tell


def test_backbones_give_logits_and_grow_with_their_width():
    for name, build in BACKBONES.items():
        small, large = build((1, 28, 28), 10, 12), build((1, 28, 28), 10, 24)
        assert small(torch.zeros(2, 1, 28, 28)).shape == (2, 10), name
        assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in small.parameters())
    assert isinstance(BACKBONES["mlp"]((7,), 3, 4), nn.Sequential)
