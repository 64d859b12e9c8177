"""Layer of AF-KAN beside a linear layer with SiLU, ReLU-KAN and the authors' layer.

Peer: ``models/af_kan.py`` of hoangthangta/All-KAN, which is on GitHub only; skipped if it cannot be imported.
"""

import pytest
import torch
from torch import nn

from classact.nn.afkan import AFKANLayer, ReLUKANLayer

B, D, O = 64, 784, 64  # noqa: E741


def step(layer, x):
    def run():
        layer.zero_grad()
        layer(x).square().mean().backward()

    return run


@pytest.mark.parametrize("func_norm", ["none", "sample", "tensor"])
def test_layer_beside_a_perceptrons(ratio, func_norm):
    torch.manual_seed(0)
    x, plain = torch.randn(B, D), nn.Sequential(nn.LayerNorm(D), nn.SiLU(), nn.Linear(D, O, bias=False))
    ours = AFKANLayer(D, O, func_norm=func_norm)
    assert ratio(f"AF-KAN, func_norm {func_norm} / perceptron", step(ours, x), step(plain, x), rounds=31) > 1


def test_layer_beside_relu_kan(ratio):
    torch.manual_seed(0)
    x = torch.randn(B, D)
    ratio("AF-KAN / ReLU-KAN", step(AFKANLayer(D, O), x), step(ReLUKANLayer(D, O), x), rounds=31)


@pytest.mark.parametrize("func_norm", ["none", "tensor"])
def test_layer_beside_the_authors(ratio, func_norm):
    peer = pytest.importorskip("af_kan", reason="needs models/af_kan.py of All-KAN, which is on GitHub only")
    torch.manual_seed(0)
    x, ours = torch.randn(B, D), AFKANLayer(D, O, func_norm=func_norm)
    theirs = peer.AF_KANLayer(D, 3, 3, O, func_norm=func_norm == "tensor")
    state = {"low": theirs.phase_low, "high": theirs.phase_high, "weight": theirs.base_weight}
    state |= {f"norm.{name}": value for name, value in theirs.norm.state_dict().items()}
    state |= {f"reductions.0.score.{name}": value for name, value in theirs.gk_linear.state_dict().items()}
    ours.load_state_dict(state | {"reductions.0.temperature": theirs.temperature})
    batch = x.unsqueeze(0)
    torch.testing.assert_close(ours(x), theirs(batch)[0], atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        forward = ratio(f"forward, func_norm {func_norm} / authors", lambda: ours(x), lambda: theirs(batch), rounds=31)
    trained = ratio(f"step, func_norm {func_norm} / authors", step(ours, x), step(theirs, batch), rounds=31)
    assert max(forward, trained) < 1
