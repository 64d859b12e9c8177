"""EvoNorm layers beside timm's, and B0 and S0 beside BatchNorm and GroupNorm with ReLU."""

import pytest
import torch
from torch import nn

from classact.nn.evonorm.layers import VERSIONS, EvoNorm2d

N, C, S = 32, 64, 28


def step(layer):
    torch.manual_seed(0)
    x, grad = torch.randn(N, C, S, S, requires_grad=True), torch.randn(N, C, S, S)

    def run():
        x.grad = None
        y = layer(x)
        y.backward(grad)
        return y.detach(), x.grad

    return run


@pytest.mark.parametrize("version", VERSIONS)
def test_beside_timm(ratio, version):
    timm_layers = pytest.importorskip("timm.layers")
    theirs = step(getattr(timm_layers, f"EvoNorm2d{version}")(C, eps=1e-5))
    ours = step(EvoNorm2d(C, version))
    torch.testing.assert_close(ours(), theirs(), atol=1e-5, rtol=1e-4)
    assert ratio(f"EvoNorm-{version} / timm's, forward and backward", ours, theirs) < 1


def test_beside_the_layers_that_they_replace(ratio):
    ratio(
        "EvoNorm-B0 / BatchNorm and ReLU", step(EvoNorm2d(C, "B0")), step(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
    )
    ratio("EvoNorm-S0 / GroupNorm and ReLU", step(EvoNorm2d(C)), step(nn.Sequential(nn.GroupNorm(32, C), nn.ReLU())))


@pytest.mark.parametrize("version", ["B0", "S0"])
def test_memory_beside_the_layers_that_they_replace(capsys, version):
    from classact.reproductions.nn.karat import kept_for_backward

    x = torch.randn(N, C, S, S, requires_grad=True)
    norm = nn.BatchNorm2d(C) if version == "B0" else nn.GroupNorm(32, C)
    layers = EvoNorm2d(C, version), nn.Sequential(norm, nn.ReLU())
    ours, theirs = (kept_for_backward(lambda one=one: one(x), one.parameters()) for one in layers)
    with capsys.disabled():
        print(f"\n  EvoNorm-{version} keeps {ours / theirs:.2f} times what {type(norm).__name__} and ReLU keep")
    assert ours < 1.1 * theirs
