"""MHIM: a step against its base model's, the mask against a complement of Python sets, and what a step keeps."""

import math

import pytest
import torch

from classact.data.bags import BagBatch
from classact.mil import ABMIL, MHIM, BagCrossEntropy, TransMIL, hard_instance_mask

K, D = 10_000, 1024
C16 = {"high": 0.01, "high_random": 0.5, "random": 0.5}
C16_TRANSMIL = {"high": 0.03, "high_random": 0.5, "random": 0.0, "low": 0.8}


def batch(k):
    return BagBatch(torch.randn(1, k, D), None, None, torch.ones(1, dtype=torch.long))


def step(parameters, loss, after=lambda: None):
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def run():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after()

    return run


def pair(base, mining, k=K):
    """A step of MHIM, teacher's update included, and one of its base model."""
    data, loss = batch(k), BagCrossEntropy()
    module = MHIM(base(), **mining)
    plain = base()
    ours = step(module.model.parameters(), lambda: module.student_loss(data, 0.5), lambda: module.update_teacher(0.5))
    return ours, step(plain.parameters(), lambda: loss(plain(data.x), data.label))


def test_step(ratio):
    ours, plain = pair(lambda: ABMIL(D, 2, dropout=0.25), C16)
    assert ratio("MHIM(ABMIL) / ABMIL, 10,000 x 1,024", ours, plain) < 2.2


def test_transmil_step_is_cheaper_than_plain(ratio):
    """The claim of the paper: masking four fifths of the bag pays for the teacher."""
    ours, plain = pair(lambda: TransMIL(D, 2), C16_TRANSMIL, 2_500)
    assert ratio("MHIM(TransMIL) / TransMIL, 2,500 x 1,024", ours, plain, rounds=5) < 1.0


def test_mask(ratio):
    """The complement by Python sets, as the authors' code takes it."""
    attention = torch.rand(1, K)

    def sets():
        pool = attention[0].topk(math.ceil(0.02 * K)).indices
        high = pool[torch.randperm(len(pool))[: math.ceil(0.5 * len(pool))]].tolist()
        drawn = torch.randperm(K)[: K // 2].tolist()
        masked = set(high) | set(drawn)
        return torch.tensor(list(set(range(K)) - masked))

    assert ratio("mask / set complement, K = 10,000", lambda: hard_instance_mask(attention, **C16), sets) < 1.0


def kept(loss):
    """Bytes that autograd keeps for the backward pass, once per storage."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    assert value.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(
    ("base", "mining", "limit"),
    [(lambda: ABMIL(D, 2, dropout=0.25), C16, 0.75), (lambda: TransMIL(D, 2), C16_TRANSMIL, 0.52)],
    ids=["abmil", "transmil"],
)
def test_saved_memory(capsys, base, mining, limit):
    """The authors' slides: up to 48 % less memory with TransMIL."""
    data, loss = batch(K), BagCrossEntropy()
    module, plain = MHIM(base(), **mining), base()
    ours = kept(lambda: module.student_loss(data, 0.5))
    theirs = kept(lambda: loss(plain(data.x), data.label))
    with capsys.disabled():
        print(f"\n  saved for backward: {ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB, {ours / theirs:.2f}")
    assert ours / theirs < limit
