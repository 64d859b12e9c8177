"""Learning rules are compared on data for which it is known what must come out."""

import importlib
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from classact.cli import app
from classact.data.labelled import Labelled
from classact.evidence.parts import Items
from classact.evidence.rules import RuleStudy, costs, peak_bytes, run_cell
from classact.evidence.store import StudyError
from classact.tasks.rules import CONTROL, REFERENCE, RULES, Arms, compare_rules, find_rule

QUICK = {"seeds": 3, "tune": 1, "epochs": 3, "batch_size": 32, "quiet": True}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own with rules: one that knows the answer, one that guesses, one that breaks down."""
    (tmp_path / "own_rules.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Sign(nn.Module):\n"
        "    default_lr = 0.1\n\n"
        "    def __init__(self, shape, classes, seed):\n        super().__init__()\n"
        "        self.w = nn.Parameter(torch.zeros(2))\n\n"
        "    def fit(self, x, y, *, epochs, lr, batch_size, seed, device):\n        self.seen = epochs\n\n"
        "    def predict_proba(self, x):\n        right = (x[:, 0] * x[:, 1] < 0).float()\n"
        "        return torch.stack([1 - right, right], 1)\n\n\n"
        "class Guess(Sign):\n    def predict_proba(self, x):\n        return torch.full((len(x), 2), 0.5)\n\n\n"
        "class Breaks(Sign):\n    def predict_proba(self, x):\n        return torch.full((len(x), 2), float('nan'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "own_rules"
    sys.modules.pop("own_rules", None)


def exclusive_or(n: int = 300) -> Labelled:
    """Two columns; the class is whether their signs differ, which no readout of the columns can tell."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Labelled("exclusive-or", x, (x[:, 0] * x[:, 1] < 0).long(), ("same", "other"))


def test_a_rule_that_is_right_wins_and_one_that_guesses_loses(tmp_path, mine):
    names = [f"{mine}:Sign", f"{mine}:Guess", "fa"]
    found = compare_rules(exclusive_or(), names, out=tmp_path / "r", **QUICK)
    rows = {row.rule: row for row in found.rows}
    assert set(rows) == {REFERENCE, CONTROL, *names}
    assert rows[names[0]].accuracy.effect > 0.95 and rows[names[0]].difference.effect > 0
    assert rows[names[1]].accuracy.effect < 0.6
    assert found.rows[0].rule == names[0] and rows[REFERENCE].difference is None
    reference = np.array([found.cells[REFERENCE, seed]["accuracy"] for seed in range(3)])
    alignment = np.array([found.cells["fa", seed]["accuracy"] for seed in range(3)])
    assert rows["fa"].difference.effect == pytest.approx((alignment - reference).mean())
    assert any(names[1] in line for line in found.summary if "no more than that" in line)
    table = pd.read_csv(tmp_path / "r" / "results.csv").set_index("rule")
    assert table.loc["fa", "peak"] == rows["fa"].cost.peak > 0
    for file in ("report.html", "cells.csv", "table.txt", "table.tex", "accuracy.png", "cost.png"):
        assert (tmp_path / "r" / file).stat().st_size > 100
    page = (tmp_path / "r" / "report.html").read_text()
    assert "exclusive-or" in page and f"{mine}:Sign" in page


def test_a_training_that_breaks_down_counts_as_nothing_right(tmp_path, mine):
    study = RuleStudy(
        *(getattr(Arms((2,), 2, "mlp"), part) for part in ("build", "fit", "predict")),
        *(Items(exclusive_or().x, exclusive_or().y),) * 3,
        1,
        32,
    )
    values, _ = run_cell(study, f"{mine}:Breaks", 0.1, 0, tuning=False)
    assert values["accuracy"] == 0 and values["diverged"] and values["nll"] is None


def test_blocks_are_compared_with_back_propagation_through_the_same_blocks(tmp_path):
    found = compare_rules(exclusive_or(60), ["noprop-dt"], out=tmp_path / "r", **QUICK | {"seeds": 2, "epochs": 1})
    rows = {row.rule: row for row in found.rows}
    assert set(rows) == {REFERENCE, CONTROL, "noprop-dt", "backprop-blocks"}
    assert rows["noprop-dt"].twin == "backprop-blocks"
    assert rows["noprop-dt"].cost.parameters == rows["backprop-blocks"].cost.parameters


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_trains_both_networks_and_the_same_seed_gives_the_same(name):
    torch.manual_seed(0)
    y = torch.arange(24) % 3
    for network, shape in (("mlp", (16,)), ("cnn", (1, 8, 8))):
        arms, found = Arms(shape, 3, network), []
        for _ in range(2):
            torch.randn(3)  # whatever else is drawn in between does not matter
            model = arms.build(name, 5)
            x = torch.randn(24, *shape, generator=torch.Generator().manual_seed(1))
            model = arms.fit(name, model, x, y, epochs=1, lr=1e-3, batch_size=12, seed=5, device="cpu")
            found.append(arms.predict(name, model, x))
        assert found[0].shape == (24, 3)
        torch.testing.assert_close(found[0].sum(1), torch.ones(24))
        assert torch.equal(found[0], found[1])


def test_rules_for_the_same_network_begin_with_the_same_weights():
    networks = [Arms((16,), 3, "mlp").build(name, 2) for name in (REFERENCE, CONTROL, "dfa")]
    for other in networks[1:]:
        for a, b in zip(networks[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_peak_memory_is_that_of_tensors_alive_together():
    def chain() -> None:
        x = torch.zeros(1000)  # 4,000 bytes, and one more such at a time
        for _ in range(5):
            x = x + 1

    assert peak_bytes(chain) == 8000

    def kept() -> None:
        x = [torch.zeros(1000) for _ in range(5)]
        x[0].view(10, 100).add_(1)  # a view is not counted twice

    assert peak_bytes(kept) == 20_000


def test_costs_are_measured_for_every_rule():
    items = Items(torch.randn(64, 16), torch.arange(64) % 3)
    arms = Arms((16,), 3, "mlp")
    study = RuleStudy(arms.build, arms.fit, arms.predict, items, items, items, 1, 16)
    found = costs(study, {"backprop": 0.1, "readout": 0.1}, rounds=1, batches=2)
    assert found["readout"].peak < found["backprop"].peak  # no gradients of hidden layers
    assert all(cost.train_ms > 0 and cost.predict_ms > 0 for cost in found.values())


@pytest.mark.bare
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path, mine):
    data = exclusive_or()
    for options, message in (
        ({"methods": ["noprop"]}, "did you mean noprop"),
        ({"methods": ["nowhere:Rule"]}, "nowhere"),
        ({"network": "cnn"}, "needs images"),
        ({"network": "rnn"}, "mlp or cnn"),
        ({"seeds": 1}, "seeds: expected at least 2"),
    ):
        with pytest.raises(StudyError, match=message):
            compare_rules(data, out=tmp_path / "no", **QUICK | options)
    assert not (tmp_path / "no").exists()
    with pytest.raises(StudyError, match="no such rule"):
        find_rule("backpropagation-through-time")


def test_the_command_line_compares_rules_on_a_table(tmp_path):
    data = exclusive_or(120)
    table = pd.DataFrame(data.x.numpy(), columns=["a", "b"]).assign(label=data.y.numpy())
    table.to_csv(tmp_path / "t.csv", index=False)
    options = ["--methods", "dfa", "--seeds", "2", "--tune", "1", "--epochs", "1", "--out", str(tmp_path / "r")]
    done = CliRunner().invoke(app, ["compare", "rules", str(tmp_path / "t.csv"), *options])
    assert done.exit_code == 0, done.output
    assert "dfa" in done.output and "readout" in done.output and (tmp_path / "r" / "report.html").exists()
