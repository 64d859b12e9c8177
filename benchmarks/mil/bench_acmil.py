"""ABMIL and ACMIL beside torchmil's ABMIL: one training step on a bag of 10,000 x 1,024, and memory."""

import pytest
import torch
import torchmil.models

from classact.mil import ABMIL, ACMIL, ACMILLoss, BagCrossEntropy

K, D = 10_000, 1024


def step(model, loss, x, y):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run():
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()

    return run


def peer(gated):
    """The same layers: bias-free linear layer to 512 and ReLU, attention network of 128."""
    extractor = torch.nn.Sequential(torch.nn.Linear(D, 512, bias=False), torch.nn.ReLU())
    model = torchmil.models.ABMIL(in_shape=(D,), att_dim=128, gated=gated, feat_ext=extractor)
    x, y = torch.randn(1, K, D), torch.ones(1)
    model(x)
    return step(model, lambda m, a, b: m.criterion(m(a), b), x, y)


def ours(model, loss):
    return step(model, lambda m, a, b: loss(m(a), b), torch.randn(1, K, D), torch.ones(1, dtype=torch.long))


def test_abmil_step(ratio):
    loss = BagCrossEntropy()
    assert ratio("ABMIL / torchmil ABMIL", ours(ABMIL(D, 2), loss), peer(gated=False)) < 1.1
    gated = ours(ABMIL(D, 2, gated=True), loss)
    assert ratio("gated ABMIL / torchmil gated ABMIL", gated, peer(gated=True)) < 1.1


@pytest.mark.parametrize("attention", ["gated", "mha"])
def test_acmil_step(ratio, attention):
    step = ours(ACMIL(D, 2, attention=attention), ACMILLoss())
    found = ratio(f"ACMIL {attention} / torchmil gated ABMIL", step, peer(gated=True))
    assert found < 1.3


def saved_bytes(model, loss, k):
    """Bytes that autograd keeps for the backward pass, counted once per storage."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(model(torch.randn(1, k, D)), torch.ones(1, dtype=torch.long))
    assert value.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("model", "loss"), [(ABMIL(D, 2), BagCrossEntropy()), (ACMIL(D, 2), ACMILLoss())])
def test_memory_is_linear_in_the_bag(model, loss):
    small, middle, large = (saved_bytes(model, loss, k) for k in (1_000, 10_000, 20_000))
    assert (large - middle) / (middle - small) == pytest.approx(10 / 9, rel=0.02)
