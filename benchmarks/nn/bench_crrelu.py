"""CRReLU forward and backward beside Mish and the plain formula, and what is kept in between."""

import torch
from torch.nn import functional as F

from classact.nn.crrelu import crrelu

SHAPE = (64, 64, 32, 32)


def step(function, x, grad):
    def run():
        x.grad = None
        y = function(x)
        y.backward(grad)
        return y.detach(), x.grad

    return run


def test_beside_mish(ratio):
    torch.manual_seed(0)
    x, grad, eps = (
        torch.randn(SHAPE, requires_grad=True),
        torch.randn(SHAPE),
        torch.full((1,), 0.01, requires_grad=True),
    )
    ours = step(lambda z: crrelu(z, eps), x, grad)
    plain = step(lambda z: z.relu() + eps * z * (-z * z / 2).exp(), x, grad)
    torch.testing.assert_close(ours(), plain())
    ratio("CRReLU / the formula in plain operations", ours, plain)
    assert ratio("CRReLU / Mish, forward and backward", ours, step(F.mish, x, grad)) < 1.5


def test_memory_beside_silu():
    def kept(function):
        sizes = {}
        x = torch.randn(SHAPE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ):
            function(x)
        return sum(sizes.values())

    eps = torch.full((1,), 0.01, requires_grad=True)
    assert kept(lambda z: crrelu(z, eps)) <= kept(F.silu) + 64
