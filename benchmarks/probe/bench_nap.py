"""Mining a large layer beside counting class by class in NumPy, and the verifier beside Marabou and a MILP."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from classact.probe.nap import NAP, ActivationCounter, activation_counts, mine, preactivations
from classact.probe.nap_verify import to_affine_relu, verify_nap

N, WIDTH, CLASSES = 10_000, 1_000, 10


def test_mining(ratio):
    torch.manual_seed(0)
    z, labels = torch.randn(N, WIDTH), torch.arange(N) % CLASSES
    values, of = z.numpy(), labels.numpy()

    def ours():
        counts = activation_counts(z, labels, CLASSES)
        return counts, *mine(counts, torch.bincount(labels), 0.95)

    def theirs():
        return np.stack([(values[of == c] > 0).sum(0) for c in range(CLASSES)])

    assert np.array_equal(ours()[0].numpy(), theirs())
    assert ratio("mining 10,000 x 1,000 / NumPy, class by class", ours, theirs, rounds=21) < 3


def test_mining_takes_less_than_a_second():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    x, labels = torch.randn(N, 100), torch.arange(N) % CLASSES
    started = time.perf_counter()
    ActivationCounter(model).update(x, labels).patterns(0.95)
    assert time.perf_counter() - started < 1


def queries():
    """Small questions with both answers."""
    made = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        for parameter in model.parameters():
            parameter.data *= 1.5
        x = torch.rand(1, 5)
        logits, z, layout = preactivations(model, x)
        fixed = torch.rand(32) < 0.3
        P = NAP(fixed & (z[0] > 0), fixed & (z[0] <= 0), layout)
        radius = (0.1, 0.5)[seed % 2]
        made.append((model, P, int(logits.argmax()), (x[0] - radius, x[0] + radius), to_affine_relu(model)))
    return made


def answer(asked, backend):
    return [verify_nap(m, P, c, box, backend=backend, net=net).status for m, P, c, box, net in asked]


@pytest.mark.parametrize("backend", ["milp", "marabou"])
def test_verifying(ratio, backend):
    if backend == "marabou":
        pytest.importorskip("maraboupy", reason="the paper's solver is not installed: pip install maraboupy")
    asked = queries()
    assert answer(asked, "highs") == answer(asked, backend)
    ratio(
        f"eight queries, linear programmes / {backend}",
        lambda: answer(asked, "highs"),
        lambda: answer(asked, backend),
        3,
    )
