"""Learnable attention beside the direct sum over harmonics and beside softmax, in time and in what training keeps."""

import torch
from torch.nn import functional as F

from classact.nn.karat.attention import KArAttention
from classact.nn.karat.operator import LearnableRowOperator
from classact.reproductions.nn.karat import kept_for_backward

B, N, D, HEADS = 4, 197, 192, 3


def models():
    torch.manual_seed(0)
    model = KArAttention(D, HEADS, N)
    return model, torch.randn(B, N, D)


def direct(model, x):
    """Cosine and sine of every harmonic, two sums by einsum, and the N x N weights formed."""
    q, k, v = model.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
    angles = (q @ k.transpose(-1, -2) * model.scale).unsqueeze(-1) * torch.arange(1, 4)
    a, b = model.operator.phi.coefficients.split(3, -1)
    phi = torch.einsum("bhkqm,hpqm->bhkp", angles.cos(), a) + torch.einsum("bhkqm,hpqm->bhkp", angles.sin(), b)
    weights = torch.einsum("bhkp,hnp->bhkn", phi, model.operator.W)
    return model.proj((weights @ v).transpose(1, 2).flatten(2))


def training(model, forward):
    def run():
        model.zero_grad()
        forward().square().mean().backward()

    return run


def test_training_beside_the_direct_sum(ratio):
    model, x = models()
    expected = direct(model, x)
    torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-3)
    ours, theirs = training(model, lambda: model(x)), training(model, lambda: direct(model, x))
    assert ratio("training step / direct sum", ours, theirs) < 1
    memory = kept_for_backward(lambda: direct(model, x), model.parameters())
    model.rows = 32
    torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-3)
    ratio("training step by 32 rows / direct sum", ours, theirs)
    assert memory > 3 * kept_for_backward(lambda: model(x), model.parameters())


def test_inference_beside_softmax(ratio, capsys):
    """What learnable attention costs; softmax by torch's fused kernel, with the same layers around it."""
    model, x = models()
    softmax = KArAttention.from_attention(model, N, softmax_heads=HEADS)
    q, k, v = model.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
    expected = model.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(softmax(x), expected)
    with torch.inference_mode():
        ratio("inference / softmax", lambda: model(x), lambda: softmax(x))
    ratio("training step / softmax", training(model, lambda: model(x)), training(softmax, lambda: softmax(x)))
    kept = [kept_for_backward(lambda one=one: one(x), one.parameters()) for one in (model, softmax)]
    model.rows = 32
    kept.append(kept_for_backward(lambda: model(x), model.parameters()))
    with capsys.disabled():
        print(
            f"\n  kept for the backward pass: {kept[0] / kept[1]:.1f} times softmax, by 32 rows {kept[2] / kept[1]:.1f}"
        )


def test_full_operator_beside_every_function_on_its_own(ratio):
    torch.manual_seed(0)
    operator, scores = LearnableRowOperator(49, heads=3, grid=3, order="full"), torch.randn(4, 3, 49, 49)
    harmonics = torch.arange(1, 4)

    def every():
        angles = scores[:, :, :, None, :, None] * harmonics
        a, b = operator.phi.coefficients.unsqueeze(1).split(3, -1)
        return (a * angles.cos() + b * angles.sin()).sum((-1, -2))

    torch.testing.assert_close(operator(scores), every(), atol=1e-3, rtol=1e-3)
    with torch.inference_mode():
        assert ratio("full operator / every function on its own", lambda: operator(scores), every) < 1
