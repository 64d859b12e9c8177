import json
import os
from copy import deepcopy
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from classact.probe import nap_verify
from classact.probe.nap import (
    NAP,
    ActivationCounter,
    NAPMonitor,
    activation_counts,
    evaluate_patterns,
    load_patterns,
    mine,
    mine_patterns,
    model_hash,
    preactivations,
    save_patterns,
)
from classact.probe.nap_verify import (
    load_nnet,
    load_onnx_fc,
    max_verified_radius,
    to_affine_relu,
    verify_nap,
    verify_non_ambiguity,
)

REFERENCE = np.load(Path(__file__).parent / "data" / "nap_reference.npz")


def mlp(*widths, seed=0, scale=1.5):
    torch.manual_seed(seed)
    layers = [part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    for parameter in model.parameters():
        parameter.data *= scale
    return model


def pattern(model, x, share, seed=0):
    """The states at an input of a random share of the neurons."""
    _, z, layout = preactivations(model, x)
    fixed = torch.rand(z.shape[1], generator=torch.Generator().manual_seed(seed)) < share
    return NAP(fixed & (z[0] > 0), fixed & (z[0] <= 0), layout)


def on_or_off(active=False, inactive=False):
    return NAP(torch.tensor([active]), torch.tensor([inactive]), (("1", 1),))


def ramp():
    """F(x) = (relu(x), 0.5)."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    values = {"0.weight": [[1.0]], "0.bias": [0.0], "2.weight": [[1.0], [0.0]], "2.bias": [0.0, 0.5]}
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return model


class Blobs:
    """Three clusters in the plane, and a network trained on them."""

    def __init__(self):
        torch.manual_seed(0)
        self.y = torch.arange(600) % 3
        centres = torch.tensor([[0.2, 0.2], [0.8, 0.3], [0.4, 0.8]])
        self.x = (centres[self.y] + 0.07 * torch.randn(600, 2)).clamp(0, 1)
        self.model = mlp(2, 16, 16, 3, scale=1.0)
        optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            optimizer.step()
        self.counter = ActivationCounter(self.model).update(self.x[:400], self.y[:400])
        self.test = self.x[400:], self.y[400:]


@pytest.fixture(scope="module")
def blobs():
    return Blobs()


# Mining


def test_neurons_are_fixed_from_exactly_the_share_delta_on():
    counts, support = torch.arange(11).unsqueeze(0), torch.tensor([10])
    for delta in (0.9, "0.9", Fraction(9, 10)):
        active, inactive = mine(counts, support, delta)
        assert active[0].nonzero()[:, 0].tolist() == [9, 10]
        assert inactive[0].nonzero()[:, 0].tolist() == [0, 1]
    active, inactive = mine(counts, support, 1.0)
    assert active[0].nonzero().tolist() == [[10]] and inactive[0].nonzero().tolist() == [[0]]
    none = mine(counts, torch.tensor([0]), 1.0)
    assert not none[0].any() and not none[1].any()


def test_zero_is_off():
    z = torch.tensor([[0.0, -0.0, 1e-30, -1.0, 1.0]])
    assert activation_counts(z, torch.tensor([1]), 2).tolist() == [[0] * 5, [0, 0, 1, 0, 1]]
    layout = (("relu", 5),)
    off = NAP(torch.zeros(5, dtype=torch.bool), torch.tensor([True, True, False, True, False]), layout)
    on = NAP(torch.tensor([True, False, False, False, False]), torch.zeros(5, dtype=torch.bool), layout)
    assert off.follows(z).all() and not on.follows(z).any()
    model = ramp()
    assert NAPMonitor(model, {0: on_or_off(True), 1: on_or_off(False, True)})(
        torch.zeros(1, 1)
    ).violations.tolist() == [[1, 0]]


def test_larger_delta_fixes_fewer_and_is_followed_by_more(blobs):
    before = None
    for delta in (0.6, 0.8, 0.95, 0.99, 1.0):
        patterns = blobs.counter.patterns(delta)
        recall = evaluate_patterns(blobs.model, patterns, [blobs.test]).recall
        if before:
            for c, P in patterns.items():
                assert P.subsumes(before[0][c])
                assert not P.conflicts(before[0][c]).any()
            assert (recall >= before[1]).all()
        before = patterns, recall


def test_every_sample_mined_from_follows_the_pattern_of_delta_one(blobs):
    report = evaluate_patterns(blobs.model, blobs.counter.patterns(1.0), [(blobs.x[:400], blobs.y[:400])])
    assert (report.recall == 1).all() and (report.agreement == 1).all()


def test_batches_change_nothing(blobs):
    x, y = blobs.x[:400], blobs.y[:400]
    split = ActivationCounter(blobs.model)
    for part in range(0, 400, 37):
        split.update(x[part : part + 37], y[part : part + 37])
    assert torch.equal(split.counts, blobs.counter.counts) and torch.equal(split.support, blobs.counter.support)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 64)
    patterns, mined = blobs.counter.patterns(0.9), mine_patterns(blobs.model, loader, 0.9)
    assert all(torch.equal(patterns[c].active, mined[c].active) for c in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate_patterns(blobs.model, patterns, [blobs.test]).followers.sum() > 0


def test_classes_may_be_those_predicted(blobs):
    x = blobs.x[:400]
    predicted = blobs.model(x).argmax(1)
    patterns = ActivationCounter(blobs.model, source="prediction").update(x).patterns(0.9)
    expected = ActivationCounter(blobs.model).update(x, predicted).patterns(0.9)
    assert all(torch.equal(patterns[c].inactive, expected[c].inactive) for c in range(3))
    assert {P.source for P in patterns.values()} == {"prediction"}


def test_feature_maps_and_repeated_relus_are_counted_position_by_position():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.relu(self.relu(self.conv(x)) - 0.3).flatten(1))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 1, 4, 4)
    logits, z, layout = preactivations(model, x)
    assert layout == (("relu", 8), ("relu#2", 8))
    torch.testing.assert_close(z[:, :8], model.conv(x).flatten(1))
    torch.testing.assert_close(z[:, 8:], model.conv(x).relu().flatten(1) - 0.3)
    torch.testing.assert_close(logits, model(x))
    assert torch.equal(preactivations(model, x, ["relu#2"]).z, z[:, 8:])


def test_mining_agrees_with_the_authors_code():
    z, labels = torch.from_numpy(REFERENCE["z"]), torch.from_numpy(REFERENCE["labels"])
    counts, support = activation_counts(z, labels, 3), torch.bincount(labels)
    for delta in (0.55, 0.7, 0.9, 0.95, 1.0):
        active, inactive = mine(counts, support, delta)
        assert np.array_equal(active.int().numpy() - inactive.int().numpy(), REFERENCE[f"states.{delta}"])
        for c in range(3):
            P = NAP(active[c], inactive[c], (("relu", 23),))
            assert np.array_equal(P.follows(z).numpy(), REFERENCE[f"follows.{delta}.{c}"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    model.train()
    model[2].eval()
    before = model_hash(model)
    x = torch.randn(3, 5 if fails else 2)
    counter = ActivationCounter(model)
    if fails:
        with pytest.raises(RuntimeError):
            counter.update(x, torch.tensor([0, 1, 1]))
    else:
        counter.update(x, torch.tensor([0, 1, 1]))
        verify_nap(model, None, 0, time_limit=1)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, True, False, True]
    assert model_hash(model) == before
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_patterns_survive_a_file(blobs, tmp_path):
    patterns = blobs.counter.patterns(0.9)
    loaded = load_patterns(save_patterns(tmp_path / "nap.json", patterns))
    for c, P in patterns.items():
        other = loaded[c]
        assert torch.equal(P.active, other.active) and torch.equal(P.inactive, other.inactive)
        names = ("layout", "label", "support", "delta", "source", "model_hash")
        assert [getattr(P, name) for name in names] == [getattr(other, name) for name in names]
    assert list(tmp_path.iterdir()) == [tmp_path / "nap.json"]


@pytest.mark.bare
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "expected patterns written by save_patterns"),
        (lambda d: d["patterns"][0]["active"].append(99), "active neurons must be integers from 0 to 31, found 99"),
        (lambda d: d["patterns"][0]["inactive"].append(0.5), "inactive neurons must be integers .*, found 0.5"),
        (lambda d: d["patterns"][0].update(active=[0], inactive=[0]), "expected no neuron in both, got 1"),
        (lambda d: d["patterns"][0].pop("layout"), r"a pattern is damaged \(KeyError\('layout'\)\)"),
        (lambda d: d.update(patterns=[3]), "a pattern is damaged"),
    ],
)
def test_damaged_files(blobs, tmp_path, change, message):
    path = save_patterns(tmp_path / "nap.json", blobs.counter.patterns(0.9))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_patterns(path)


def test_report_counts_who_follows(blobs, tmp_path):
    patterns = blobs.counter.patterns(0.9)
    report = evaluate_patterns(blobs.model, patterns, [blobs.test, blobs.test])
    x, y = blobs.test
    z = preactivations(blobs.model, x).z
    follows = torch.stack([P.follows(z) for P in patterns.values()], 1)
    for c in range(3):
        assert report.samples[c] == 2 * (y == c).sum()
        assert report.recall[c] == follows[y == c, c].double().mean().item()
        assert report.others[c] == pytest.approx(follows[y != c, c].double().mean().item())
        assert report.fixed[c] == patterns[c].n_fixed / 32
        for k in range(3):
            assert report.conflicts[c, k] == patterns[c].conflicts(patterns[k]).sum()
    assert (report.agreement >= report.recall).all()
    assert report.ambiguous == (follows.sum(1) > 1).double().mean().item()
    table = report.table()
    assert list(table.index) == ["0", "1", "2", "mean"] and table.loc["mean", "recall"] == report.recall.mean()
    report.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["nap.json", "nap.npz", "nap.png"]
    assert len(json.loads((tmp_path / "out" / "nap.json").read_text())["patterns"]) == 4
    assert np.array_equal(np.load(tmp_path / "out" / "nap.npz")["followers"], report.followers)


def test_monitor_compares_with_the_pattern_of_the_class_predicted(blobs):
    patterns = blobs.counter.patterns(0.95)
    x, _ = blobs.test
    found = NAPMonitor(blobs.model, patterns)(x)
    z = preactivations(blobs.model, x).z
    for i in range(len(x)):
        P = patterns[int(found.prediction[i])]
        assert found.follows[i] == P.follows(z[i : i + 1])[0]
    some = NAPMonitor(blobs.model, {1: patterns[1]})(x)
    assert not some.follows[some.prediction != 1].any() and some.follows.any()
    assert torch.equal(some.violations[:, 0] == 0, patterns[1].follows(z))


# Networks as matrices


def test_convolutions_and_normalisation_become_matrices():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    net = to_affine_relu(model, (2, 8, 8))
    assert net.relus == ("0.2", "3", "8")
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    expected = preactivations(model.double(), x[None])
    hidden, logits = net(x.flatten().numpy())
    np.testing.assert_allclose(logits, expected.logits[0].numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.concatenate(hidden), expected.z[0].numpy(), rtol=1e-9, atol=1e-12)


def test_a_convolutional_network_is_verified():
    torch.manual_seed(10)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)
    ).double()
    x = torch.rand(1, 4, 4).double()
    target = int(model(x[None]).argmax())
    P = pattern(model, x[None], 0.5)
    grid = [0.05, 0.1, 0.2]
    with_pattern = max_verified_radius(model, x, target, P, grid=grid)
    alone = max_verified_radius(model, x, target, grid=grid)
    assert with_pattern.radius >= alone.radius > 0
    broken = max_verified_radius(model, x, target, tol=0.1, grid=[alone.radius, 1.0])
    assert alone.radius <= broken.radius
    last = broken.tried[max(broken.tried)]
    assert last.status == "counterexample" and last.witness.shape == (1, 4, 4)
    assert model(last.witness[None]).argmax() != target


@pytest.mark.bare
@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.MaxPool1d(1))), None, r"layer '1.0' \(MaxPool1d\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), None, r"layer '1' \(GELU\); a network for the verifier is"),
        (nn.Transformer(8, 1, 1, 1, 8), None, r"layer '' \(Transformer\)"),
        (
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
            (1, 4, 4),
            "layer '0' with padding mode",
        ),
        (nn.Sequential(nn.Conv2d(1, 1, 3)), None, "input_shape: needed, since Conv2d does not fix the shape"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(2, 2)), (1, 4, 4), "layer '1' .*put a Flatten before a Linear"),
        (nn.Sequential(nn.Linear(3, 3)), (4,), "layer '0' does not take an input of shape .*it has 3 inputs"),
    ],
)
def test_networks_that_cannot_be_encoded(model, shape, message):
    with pytest.raises(ValueError, match=message):
        to_affine_relu(model, shape)


@pytest.mark.bare
def test_layers_with_another_forward_are_refused():
    class Odd(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + (x > 100)

    class Gated(nn.ReLU):
        def forward(self, x):
            return torch.where(x > 100, -x, x.relu())

    for model, name in ((Odd(nn.Linear(2, 2)), r"layer '' \(Odd\), whose forward is its own"),
                        (nn.Sequential(nn.Linear(2, 2), Gated()), r"layer '1' \(Gated\)")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            to_affine_relu(model)


def test_a_relu_that_comes_twice_is_encoded_twice():
    relu, shift = nn.ReLU(), nn.Linear(1, 1)
    shift.weight.data, shift.bias.data = torch.ones(1, 1), torch.full((1,), 9.0)
    model = nn.Sequential(nn.Linear(1, 1), relu, shift, relu, nn.Linear(1, 2))
    model[0].weight.data, model[0].bias.data = torch.full((1, 1), -10.0), torch.zeros(1)
    assert to_affine_relu(model).relus == ("1", "3")


# Proofs


@pytest.mark.parametrize("backend", ["highs", "milp"])
def test_one_neuron(backend):
    model = ramp()

    def status(P, target, *box):
        return verify_nap(model, P, target, box, backend=backend)

    refuted = status(on_or_off(True), 0, -1.0, 1.0)
    assert refuted.status == "counterexample" and 0 < refuted.witness.item() <= 0.5
    assert refuted.per_class == {1: "counterexample"}
    proved = status(on_or_off(True), 0, 0.6, 1.0)
    assert proved.status == "verified" and 0.6 <= proved.follower.item() <= 1
    assert status(on_or_off(False, True), 1, -1.0, 1.0).status == "verified"
    assert status(on_or_off(True), 0, -1.0, -0.1).status == "empty_region"
    assert status(on_or_off(), 0, -1.0, 1.0).status == "counterexample"
    assert status(None, 1, -1.0, 0.4).status == "verified"
    assert status(None, 1, -1.0, 0.5).status == "counterexample"  # a tie


def test_margins_move_the_output_and_the_region():
    model, P = ramp(), on_or_off(True)
    assert verify_nap(model, P, 0, (0.6, 1.0), margin=0.09).status == "verified"
    assert verify_nap(model, P, 0, (0.6, 1.0), margin=0.11).status == "counterexample"
    assert verify_nap(model, P, 0, (-1.0, 1.0), activation_margin=0.51).status == "verified"
    assert verify_nap(model, P, 0, (-1.0, 1.0), activation_margin=0.49).status == "counterexample"
    wide = verify_nap(model, P, 0, (-1.0, 0.0), activation_margin=-0.25)
    assert wide.status == "counterexample" and -0.25 <= wide.witness.item() <= 0


def largest_violation(net, P, radius, target, k):
    """By enumeration: the largest F_k - F_target over all linear pieces in the pattern, -inf without any."""
    d, best = net.input_shape[0], -np.inf
    wanted = (P.active.int() - P.inactive.int()).tolist()

    def solve(c, rows, right):
        return linprog(c, np.array(rows), right, bounds=[(-radius, radius)] * d) if rows else None

    def visit(layer, M, m, rows, right, signs):
        nonlocal best
        W, b = net.layers[layer]
        if layer == len(net.layers) - 1:
            found = solve((W[target] - W[k]) @ M, rows, right)
            if found.status == 0:
                best = max(best, -found.fun + (W[k] - W[target]) @ m + b[k] - b[target])
            return
        Z, z = W @ M, W @ m + b
        pieces = [([], rows, right)]
        for j in range(len(b)):
            options = [(s, *piece) for piece in pieces for s in (1, -1) if wanted[len(signs) + j] in (0, s)]
            pieces = []
            for s, on, old, ends in options:
                new = [*old, -s * Z[j]], [*ends, s * z[j]]
                if solve(np.zeros(d), *new).status == 0:
                    pieces.append(([*on, float(s > 0)], *new))
        for on, old, ends in pieces:
            keep = np.array(on)
            visit(layer + 1, keep[:, None] * Z, keep * z, old, ends, [*signs, *on])

    visit(0, np.eye(d), np.zeros(d), [], [], [])
    return best


@pytest.mark.parametrize("seed", range(9))
def test_verdicts_are_those_of_enumeration_and_of_a_second_encoding(seed):
    model = mlp(2, 5, 4, 3, seed=seed)
    x = 2 * torch.rand(1, 2) - 1
    P = pattern(model, x, 0.35 * (seed % 3), seed)
    if seed % 3 == 2:  # a pattern that need not have followers
        P = NAP(P.inactive, P.active, P.layout)
    radius = (0.3, 1.0)[seed % 2]
    net, target = to_affine_relu(model), int(model(torch.zeros(1, 2)).argmax())
    worst = {k: largest_violation(net, P, radius, target, k) for k in range(3) if k != target}
    for backend in ("highs", "milp"):
        for k, value in worst.items():
            found = verify_nap(model, P, target, (-radius, radius), [k], backend=backend)
            expected = "empty_region" if value == -np.inf else "counterexample" if value >= 0 else "verified"
            assert found.status == expected
            if found.witness is not None:
                logits, z, _ = preactivations(model.double(), found.witness[None])
                assert P.follows(z).all() and logits[0, k] >= logits[0, target] and found.witness.abs().max() <= radius
                model.float()


def test_verdicts_are_those_of_the_papers_solver():
    cases = [REFERENCE[name][::2] for name in ("weights", "settings", "verdicts")]
    for weights, setting, expected in zip(*cases, strict=True):
        model = mlp(3, 6, 5, 2)
        nn.utils.vector_to_parameters(torch.from_numpy(weights), model.parameters())
        states, target, radius = torch.from_numpy(setting[:11]), int(setting[11]), round(float(setting[12]), 1)
        P = NAP(states > 0, states < 0, (("1", 6), ("3", 5)))
        assert verify_nap(model, P, target, (-radius, radius)).status == expected
    assert set(cases[2]) == {"verified", "counterexample", "empty_region"}


def test_what_is_verified_survives_attacks(blobs):
    patterns = blobs.counter.patterns(0.8)
    lo, hi = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    statuses = []
    for c, P in patterns.items():
        found = verify_nap(blobs.model, P, c, (lo, hi))
        statuses.append(found.status)
        x = torch.rand(20_000, 2)
        for step in range(20):
            logits, z, _ = preactivations(blobs.model, x)
            wrong = P.follows(z) & (logits.argmax(1) != c)
            assert not (found.status == "verified" and wrong.any())
            x = x[:2000].requires_grad_()
            logits = blobs.model(x)
            gap = logits.scatter(1, torch.full((len(x), 1), c), -torch.inf).amax(1) - logits[:, c]
            (gradient,) = torch.autograd.grad(gap.sum(), x)
            x = (x + 0.1 / (step + 1) * gradient.sign()).clamp(0, 1).detach()
    assert "verified" in statuses


def test_a_pattern_never_makes_the_radius_smaller(blobs):
    patterns = blobs.counter.patterns(0.9)
    larger = 0
    for x, y in zip(*blobs.test, strict=True):
        P = patterns[int(y)]
        if larger or not P.follows(preactivations(blobs.model, x[None]).z)[0]:
            continue
        alone = max_verified_radius(blobs.model, x, int(y), max_splits=0)
        inside = max_verified_radius(blobs.model, x, int(y), P, max_splits=0)
        complete = max_verified_radius(blobs.model, x, int(y), P)
        assert complete.radius >= inside.radius >= alone.radius
        larger += inside.radius > alone.radius
        refuted = [verdict.witness for verdict in complete.tried.values() if verdict.witness is not None]
        assert all((w - x).abs().max() > complete.radius for w in refuted)
    assert larger > 0


def test_fixing_more_neurons_never_refutes_what_was_verified():
    verified = 0
    for seed in range(6):
        model = mlp(2, 5, 4, 2, seed=seed)
        x = torch.rand(1, 2)
        target = int(model(x).argmax())
        few, many = (pattern(model, x, share, seed) for share in (0.3, 0.6))
        assert few.subsumes(many)
        first, second = (verify_nap(model, P, target, (-0.3, 1.0), follower=x[0]).status for P in (few, many))
        verified += first == "verified"
        assert first != "verified" or second == "verified"
    assert verified


def test_no_multipliers_of_a_solver_prove_what_is_false(monkeypatch):
    """A solver that returns nonsense: weak duality turns it into useless bounds, never into wrong ones."""
    rng, original = np.random.default_rng(0), nap_verify._linprog

    def nonsense(*arguments):
        found = original(*arguments)
        if found.status == 0:
            for part in (found.ineqlin, found.eqlin):
                part.marginals = part.marginals + rng.normal(size=len(part.marginals))
            found.x = rng.uniform(-1, 1, len(found.x))
        elif found.status == 2:
            found.status = 4
        return found

    monkeypatch.setattr(nap_verify, "_linprog", nonsense)
    for seed in range(6):
        model = mlp(2, 4, 3, 2, seed=seed)
        P = pattern(model, torch.rand(1, 2), 0.3, seed)
        target = int(model(torch.zeros(1, 2)).argmax())
        worst = largest_violation(to_affine_relu(model), P, 1.0, target, 1 - target)
        found = verify_nap(model, P, target, (-1.0, 1.0), max_splits=8)
        assert found.status in {
            "unknown",
            "empty_region" if worst == -np.inf else "counterexample" if worst >= 0 else "verified",
        }


def test_an_infeasible_answer_of_the_solver_is_not_believed(monkeypatch):
    def infeasible(*arguments):
        found = original(*arguments)
        found.status = 2
        return found

    original = nap_verify._linprog
    monkeypatch.setattr(nap_verify, "_linprog", infeasible)
    model = mlp(2, 4, 2)
    target = int(model(torch.zeros(1, 2)).argmin())
    assert verify_nap(model, None, target, (-1.0, 1.0)).status == "unknown"


def test_bounds_hold_at_every_input_in_spite_of_rounding():
    for seed in range(4):
        model = mlp(6, 20, 20, 20, 3, seed=seed)
        net = to_affine_relu(model)
        x = np.random.default_rng(seed).uniform(-1, 1, (300, 6))
        for width in (0.0, 1e-9, 0.1):
            lo, hi = x[0] - width, x[0] + width
            free = tuple(np.full(20, np.inf) for _ in range(3))
            region = nap_verify._Region(lo, hi, tuple(-part for part in free), free)
            bounds = nap_verify._propagate(net, region)
            for point in np.clip(x, lo, hi).astype(np.longdouble):
                a = point
                for (W, b), below, above in zip(net.layers, bounds.lower, bounds.upper, strict=False):
                    z = W.astype(np.longdouble) @ a + b
                    assert (below <= z).all() and (z <= above).all()
                    a = np.maximum(z, 0)
            plain = nap_verify._propagate(net, region, linear=False)
            assert all((a <= b + 1e-9).all() for a, b in zip(bounds.upper, plain.upper, strict=True))


def test_patterns_that_conflict_are_never_followed_together(blobs):
    first, second = on_or_off(True), on_or_off(False, True)
    assert verify_non_ambiguity(ramp(), first, second).status == "verified"
    patterns = blobs.counter.patterns(0.9)
    found = verify_non_ambiguity(blobs.model, patterns[0], patterns[1])
    assert found.status in {"verified", "counterexample"}
    if found.witness is not None:
        z = preactivations(deepcopy(blobs.model).double(), found.witness[None]).z
        assert patterns[0].follows(z).all() and patterns[1].follows(z).all()


def test_margins_below_zero_let_patterns_that_conflict_meet():
    """Both z >= -0.25 and z <= 0.25 hold around 0."""
    first, second = on_or_off(True), on_or_off(False, True)
    found = verify_non_ambiguity(ramp(), first, second, (-1.0, 1.0), activation_margin=-0.25)
    assert found.status == "counterexample" and abs(found.witness.item()) <= 0.25
    assert verify_non_ambiguity(ramp(), first, second, (0.3, 1.0), activation_margin=-0.25).status == "verified"
    assert verify_non_ambiguity(ramp(), first, second, activation_margin=0.25).status == "verified"


@pytest.mark.parametrize("backend", ["highs", "milp"])
def test_ambiguity_without_a_conflict_is_decided_by_the_solver(backend):
    """ReLUs of x - 0.5 and 0.3 - x: both on is impossible, though no neuron is wanted on and off."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    model[0].weight.data, model[0].bias.data = torch.tensor([[1.0], [-1.0]]), torch.tensor([-0.5, 0.3])
    layout, nothing = (("1", 2),), torch.zeros(2, dtype=torch.bool)
    first, second = NAP(torch.tensor([True, False]), nothing, layout), NAP(torch.tensor([False, True]), nothing, layout)
    assert verify_non_ambiguity(model, first, second, backend=backend).status == "verified"
    model[0].bias.data[1] = 0.7
    found = verify_non_ambiguity(model, first, second, backend=backend)
    assert found.status == "counterexample" and 0.5 < found.witness.item() < 0.7


def test_intervals_alone_prove_less(blobs):
    patterns = blobs.counter.patterns(0.9)
    x, y = blobs.test
    radius = {
        backend: max_verified_radius(blobs.model, x[0], int(y[0]), None, backend=backend).radius
        for backend in ("intervals", "highs")
    }
    assert 0 < radius["intervals"] <= radius["highs"]
    assert verify_nap(ramp(), on_or_off(True), 0, (0.6, 1.0), backend="intervals").status == "verified"
    assert verify_nap(ramp(), on_or_off(True), 0, (-1.0, -0.1), backend="intervals").status == "empty_region"
    assert verify_nap(blobs.model, patterns[0], 0, backend="intervals").status in {"verified", "unknown"}


def test_running_out_of_time_or_splits_is_unknown():
    model = mlp(4, 30, 30, 2, seed=3)
    x = torch.zeros(4)
    target = int(model(x[None]).argmax())
    assert verify_nap(model, None, target, (-1.0, 1.0), time_limit=1e-9).status == "unknown"
    for box in (0.1, 0.2, 0.3, 0.4):
        found = verify_nap(model, None, target, (-box, box), max_splits=0)
        assert found.splits == 0 and found.status in {"verified", "counterexample", "unknown"}


def test_the_same_question_has_the_same_answer():
    model = mlp(3, 8, 8, 3, seed=5)
    P = pattern(model, torch.zeros(1, 3), 0.3)
    first, again = (verify_nap(model, P, 0, (-1.0, 1.0)) for _ in range(2))
    assert (first.status, first.per_class, first.splits) == (again.status, again.per_class, again.splits)
    assert first.witness is None or torch.equal(first.witness, again.witness)


def test_networks_without_relus_before_the_end():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data, model[0].bias.data = torch.eye(2), torch.zeros(2)
    apart = torch.tensor([0.6, 0.0]), torch.tensor([1.0, 0.5])
    assert verify_nap(model, None, 0, apart).status == "verified"
    assert verify_nap(model, None, 0, (0.0, 1.0)).status == "counterexample"


def test_marabou_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "maraboupy", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package maraboupy"):
        verify_nap(ramp(), None, 0, (0.0, 1.0), backend="marabou")


# Files of networks


def message(*fields):
    """A protocol buffer message of (number, value) pairs; integers, or bytes."""

    def varint(value):
        parts = [value & 127 | 128]
        while value := value >> 7:
            parts.append(value & 127 | 128)
        return bytes([*parts[:-1], parts[-1] & 127])

    return b"".join(
        varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, bytes)
        else varint(number << 3) + varint(value)
        for number, value in fields
    )


def onnx_file(path, nodes, tensors):
    def tensor(name, value):
        return message(*((1, n) for n in value.shape), (2, 1), (8, name.encode()), (9, value.astype("<f4").tobytes()))

    def node(kind, inputs, output, **integers):
        attributes = [(5, message((1, key.encode()), (3, value))) for key, value in integers.items()]
        return message(*((1, name.encode()) for name in inputs), (2, output.encode()), (4, kind.encode()), *attributes)

    graph = message(
        *((1, node(*part[:3], **part[3])) for part in nodes), *((5, tensor(*pair)) for pair in tensors.items())
    )
    path.write_bytes(message((1, 8), (7, graph)))
    return path


def test_onnx_networks_are_read(tmp_path):
    rng = np.random.default_rng(0)
    W1, b1, W2, b2 = rng.normal(size=(4, 3)), rng.normal(size=4), rng.normal(size=(4, 2)), rng.normal(size=2)
    nodes = [
        ("Flatten", ["x"], "f", {}),
        ("Gemm", ["f", "W1", "b1"], "z", {"transB": 1}),
        ("Relu", ["z"], "a", {}),
        ("MatMul", ["a", "W2"], "m", {}),
        ("Add", ["b2", "m"], "y", {}),
    ]
    model = load_onnx_fc(onnx_file(tmp_path / "net.onnx", nodes, {"W1": W1, "b1": b1, "W2": W2, "b2": b2}))
    x = rng.normal(size=(5, 3))
    expected = np.maximum(x @ W1.T + b1, 0) @ W2 + b2
    np.testing.assert_allclose(model(torch.from_numpy(x).float()).detach().numpy(), expected, atol=1e-5)
    nodes[2] = ("Sigmoid", ["z"], "a", {})
    with pytest.raises(ValueError, match="cannot read a node Sigmoid"):
        load_onnx_fc(onnx_file(tmp_path / "other.onnx", nodes, {"W1": W1, "b1": b1, "W2": W2, "b2": b2}))
    (tmp_path / "broken.onnx").write_bytes((tmp_path / "net.onnx").read_bytes()[:90])
    with pytest.raises(ValueError, match="not readable as ONNX"):
        load_onnx_fc(tmp_path / "broken.onnx")


def test_nnet_networks_are_read(tmp_path):
    text = (
        "// a comment\n2,2,1,2,\n2,2,1,\n0,\n-1,-1,\n1,1,\n0.5,0,3,\n2,1,10,\n1,-1,\n0,2,\n0.5,\n-0.5,\n1,1,\n0.25,\n"
    )
    (tmp_path / "net.nnet").write_text(text)
    model, ranges = load_nnet(tmp_path / "net.nnet")
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    assert model(x).item() == 1.0 + 0.5 + 0.25
    assert ranges["mean"].tolist() == [0.5, 0.0, 3.0] and ranges["minimum"].tolist() == [-1.0, -1.0]
    (tmp_path / "bad.nnet").write_text(text.replace("0,2,\n", "0,\n"))
    with pytest.raises(ValueError, match="expected 2 rows of 2 weights and 2 biases in layer 0"):
        load_nnet(tmp_path / "bad.nnet")


def test_patterns_of_a_verification_benchmark(real_data):
    folder = Path(os.environ["CLASSACT_DATA"])
    if not (folder / "vnncomp-mnist").exists() or not (folder / "mnist10k").exists():
        pytest.skip("needs the folders vnncomp-mnist and mnist10k")
    content = np.load(folder / "mnist10k" / "mnist10k.npz")
    order = np.random.default_rng(0).permutation(10_000)
    x = torch.from_numpy(content["images"][order]).float().flatten(1) / 255
    y = torch.from_numpy(content["labels"][order]).long()
    model = load_onnx_fc(folder / "vnncomp-mnist" / "mnist-net_256x2.onnx")
    assert (model(x).argmax(1) == y).float().mean() > 0.99
    patterns = ActivationCounter(model).update(x[:7000], y[:7000]).patterns(0.99)
    report = evaluate_patterns(model, patterns, [(x[7000:], y[7000:])])
    assert report.recall.mean() == pytest.approx(0.81, abs=0.005) and report.others.max() == 0


# Bad input


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: NAP(torch.tensor([2]), torch.tensor([0]), (("1", 1),)),
            "active: expected bools, or 0 and 1 only, got 2",
        ),
        (lambda m: NAP(torch.tensor([0.5]), torch.tensor([0]), (("1", 1),)), "active: .* 0 and 1 only, got 0.5"),
        (lambda m: NAP(torch.tensor([1]), torch.tensor([1]), (("1", 1),)), "expected no neuron in both, got 1"),
        (
            lambda m: NAP(torch.tensor([1, 0]), torch.tensor([0]), (("1", 1),)),
            r"active: expected one state .* got \(2,\)",
        ),
        (lambda m: retrained(m).patterns(0.9), "its weights have changed since the counter was made"),
        (lambda m: on_or_off().follows(torch.zeros(1, 2)), r"z: expected \(N, 1\), got \(1, 2\)"),
        (lambda m: ActivationCounter(m, source="guess"), "source: expected 'label' or 'prediction', got 'guess'"),
        (
            lambda m: ActivationCounter(m, ["0"]).update(torch.ones(1, 1), torch.tensor([0])),
            "no ReLU named 0; there are 1",
        ),
        (lambda m: ActivationCounter(m).patterns(), "nothing has been counted"),
        (lambda m: ActivationCounter(m).update(torch.ones(1, 1)), "labels: expected a class for every input"),
        (lambda m: ActivationCounter(m).update(torch.ones(1, 1), torch.tensor([2])), "classes from 0 to 1, got 2 to 2"),
        (lambda m: ActivationCounter(m).update(torch.ones(1, 1), torch.tensor([0, 1])), r"labels: expected \(1,\)"),
        (lambda m: ActivationCounter(m).update(torch.tensor([[torch.nan]]), torch.tensor([0])), "x: expected finite"),
        (lambda m: mined(m).patterns(0.9), "classes: no samples of 1; name those that have some"),
        (lambda m: mined(m).patterns(0.5, [0]), r"delta: expected a number in \(0.5, 1\], got 0.5"),
        (lambda m: mined(m).patterns(1.01, [0]), r"delta: expected a number in \(0.5, 1\], got 1.01"),
        (lambda m: mined(m).patterns("high", [0]), r"delta: expected a number in \(0.5, 1\], got 'high'"),
        (lambda m: preactivations(nn.Linear(1, 1), torch.ones(1, 1)), "expected a network with nn.ReLU modules"),
        (lambda m: preactivations(nn.Sequential(nn.ReLU()), torch.ones(1, 1, 1)), r"expected logits \(N, C\)"),
        (lambda m: NAPMonitor(m, {}), "patterns: expected at least one"),
        (lambda m: NAPMonitor(mlp(1, 1, 2), mined(m).patterns(0.9, [0])), "class 0 was mined on other weights"),
        (lambda m: evaluate_patterns(m, {0: on_or_off()}, []), "loader: expected at least one sample"),
        (
            lambda m: evaluate_patterns(m, {5: on_or_off()}, [(torch.ones(1, 1), torch.tensor([0]))]),
            "from 0 to 1, got 5",
        ),
        (lambda m: verify_nap(mlp(1, 1, 2), mined(m).patterns(0.9, [0])[0], 0), "its weights are not those"),
        (lambda m: verify_nap(m, NAP(*2 * [torch.zeros(2)], (("1", 2),)), 0), "no ReLU '1' of width 2; .* has 1 "),
        (lambda m: verify_nap(m, None, 2), "target: expected a class from 0 to 1, got 2"),
        (lambda m: verify_nap(m, None, 0, competitors=[0]), "competitors: expected classes .* got 0"),
        (lambda m: verify_nap(m, None, 0, competitors=[]), "competitors: expected at least one class"),
        (lambda m: verify_nap(m, None, 0, net=to_affine_relu(mlp(1, 1, 2))), "matrices do not compute what the model"),
        (
            lambda m: verify_nap(m, None, 0, net=to_affine_relu(mlp(2, 1, 2))),
            r"does not take inputs of its shape \(2,\)",
        ),
        (lambda m: verify_nap(m, None, 0, (-1e308, 1e308)), "box: too large"),
        (lambda m: verify_nap(m, None, 0, (1.0, 0.0)), "box: expected finite ends with lo <= hi"),
        (lambda m: verify_nap(m, None, 0, (torch.zeros(2), torch.ones(2))), "does not take an input of shape"),
        (lambda m: verify_nap(m, None, 0, backend="guess"), "backend: expected one of highs, intervals, milp, marabou"),
        (lambda m: verify_nap(m, None, 0, time_limit=0.0), "time_limit: expected a positive number"),
        (lambda m: verify_nap(m, None, 0, margin=float("nan")), "margin: expected a finite number"),
        (lambda m: verify_nap(m, None, 0, activation_margin=float("inf")), "activation_margin: expected a finite"),
        (lambda m: verify_nap(m, None, 0, max_splits=-1), "max_splits: expected 0 or more"),
        (lambda m: verify_nap(m, on_or_off(True), 0, (-1, 1), follower=torch.tensor([-0.5])), "follower: expected"),
        (lambda m: max_verified_radius(m, torch.tensor([0.5]), 0, grid=[0.2, 0.1]), "grid: expected positive, rising"),
        (lambda m: max_verified_radius(m, torch.tensor([0.5]), 0, tol=0.0), "tol: expected a positive number"),
        (lambda m: max_verified_radius(m, torch.tensor([1.5]), 0), "x: expected an input inside the domain"),
        (lambda m: max_verified_radius(m, torch.tensor([0.5]), 0, on_or_off(False, True)), "that follows the pattern"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(ramp())


def retrained(model):
    counter = ActivationCounter(model).update(torch.ones(2, 1), torch.tensor([0, 1]))
    model[0].weight.data += 1
    return counter


def mined(model):
    return ActivationCounter(model).update(torch.ones(2, 1), torch.tensor([0, 0]))
