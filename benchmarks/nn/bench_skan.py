"""Layers with one space beside pykan, efficient-kan and fastkan, and S-ConvKAN beside the layer on patches.

Peers: pykan from PyPI; ``src`` of Blealtan/efficient-kan and ZiyaoLi/fast-kan, which are on GitHub only. A peer that
cannot be imported is skipped.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from classact.nn.kan_bases import KANLinear
from classact.nn.skan import SKANConv2d, SKANLinear

B, D, O = 256, 784, 64  # noqa: E741


def step(layer, x):
    def run():
        layer.zero_grad()
        layer(x).square().mean().backward()

    return run


def inputs():
    torch.manual_seed(0)
    return torch.rand(B, D) * 2 - 1


def test_bsplines_beside_efficient_kan(ratio):
    peer = pytest.importorskip("efficient_kan", reason="needs efficient-kan, which is on GitHub only")
    x, ours, theirs = inputs(), KANLinear(D, O, "bspline"), peer.KANLinear(D, O)
    with torch.no_grad():
        ours.coefficients.copy_(theirs.scaled_spline_weight), ours.base_weight.copy_(theirs.base_weight)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert ratio("B-splines / efficient-kan", step(ours, x), step(theirs, x), rounds=15) < 1


def test_gaussians_beside_fastkan(ratio):
    peer = pytest.importorskip("fastkan", reason="needs fast-kan, which is on GitHub only")
    x, ours = inputs(), KANLinear(D, O, "rbf", base=None)
    theirs = peer.FastKANLayer(D, O, use_base_update=False, use_layernorm=False)
    with torch.no_grad():
        ours.coefficients.copy_(theirs.spline_linear.weight.view(O, D, 8))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert ratio("Gaussians / fastkan", step(ours, x), step(theirs, x), rounds=15) < 1.1


@pytest.mark.parametrize(("n", "d", "o", "most"), [(B, D, O, 1 / 20), (1000, 4, 32, 1)])
def test_bsplines_beside_pykan(ratio, n, d, o, most):
    """At the size of an image classifier; and at that of a formula, where the overhead of the calls counts."""
    kan = pytest.importorskip("kan", reason="needs pykan")
    torch.manual_seed(0)
    x, theirs, ours = torch.rand(n, d) * 2 - 1, kan.KANLayer(d, o, num=5, k=3), KANLinear(d, o, "bspline")
    with torch.no_grad():
        ours.coefficients.copy_((theirs.coef * theirs.scale_sp.unsqueeze(-1)).transpose(0, 1))
        ours.base_weight.copy_(theirs.scale_base.T)

    def peer():
        theirs.zero_grad()
        theirs(x)[0].square().mean().backward()

    torch.testing.assert_close(ours(x), theirs(x)[0], atol=1e-4, rtol=1e-3)
    assert ratio(f"B-splines {d} x {o} / pykan", step(ours, x), peer, rounds=9) < most


@pytest.mark.parametrize("space", ["bspline", "rbf", "chebyshev", "wavelet", "mlp"])
def test_one_space_beside_a_linear_layer(ratio, space):
    x = inputs()
    ratio(f"{space} / nn.Linear", step(KANLinear(D, O, space), x), step(nn.Linear(D, O), x), rounds=15)


def test_pruned_layer_beside_one_space(ratio):
    x, layer = inputs(), SKANLinear(D, O)
    layer.gate_logits.data.normal_()
    pruned = layer.prune("gate")
    torch.testing.assert_close(pruned(x), SKANLinear.forward(_hard(layer), x), atol=1e-5, rtol=1e-4)
    assert ratio("pruned S-KAN / B-splines", step(pruned, x), step(KANLinear(D, O, "bspline"), x), rounds=15) < 1.3
    ratio("unpruned S-KAN / B-splines", step(layer, x), step(KANLinear(D, O, "bspline"), x), rounds=15)


def _hard(layer):
    best = layer.gates().argmax(-1, keepdim=True)
    layer.alive = torch.zeros_like(layer.alive).scatter(-1, best, value=True)
    return layer


class OnPatches(nn.Module):
    """Cuts out the patches and passes each through a layer, as the companion repository of the paper does."""

    def __init__(self, conv):
        super().__init__()
        c = conv.in_channels * 9
        self.layer = SKANLinear(c, conv.out_channels, conv.pool)
        with torch.no_grad():
            self.layer.base_weight.copy_(conv.base_weight.flatten(1))
            for own, of_conv in zip(self.layer.coefficients, conv.coefficients, strict=True):
                own.copy_(of_conv.movedim(2, -1).flatten(1, 3))

    def forward(self, x):
        patches = F.unfold(x, 3, padding=1).transpose(1, 2)
        return self.layer(patches).transpose(1, 2).unflatten(-1, x.shape[2:])


def test_convolution_beside_patches(ratio):
    torch.manual_seed(0)
    conv, x = SKANConv2d(16, 32, 3, padding=1), torch.rand(8, 16, 28, 28) * 2 - 1
    theirs = OnPatches(conv)
    torch.testing.assert_close(conv(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert ratio("S-ConvKAN / on patches", step(conv, x), step(theirs, x), rounds=9) < 1 / 3
