"""The sampler beside the loop of the released code, which draws every image twice, and beside one chain at a time."""

from dataclasses import replace

import torch
from torch import nn

from classact.explain.ppgn.networks import FeatureGenerator
from classact.explain.ppgn.sampler import ClassCondition, noiseless_joint_ppgn_h

CHAINS, STEPS, CODE = 250, 5, 64
E1, LR = 1e-3, 0.5


def networks():
    torch.manual_seed(0)
    G = FeatureGenerator(CODE, (128,), (24, 7, 7), (16, 1), (), crop=None, output="sigmoid")
    E = nn.Sequential(nn.Conv2d(1, 12, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 196, CODE), nn.ReLU())
    C = nn.Sequential(nn.Conv2d(1, 12, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 196, 10))
    for network in (G, E, C):
        network.eval().requires_grad_(False)
    return G, E, C


def two_passes(G, E, C, h, y):
    """The update of the released code, its two passes of G and its backward pass through each network kept."""
    for _ in range(STEPS):
        with torch.no_grad():
            d_prior = E(G(h)) - h
        code = h.clone().requires_grad_()
        x = G(code)
        image = x.detach().requires_grad_()
        logits = C(image)
        factor = (1 - logits.softmax(1)) * nn.functional.one_hot(y, 10)
        (d_image,) = torch.autograd.grad(logits, image, factor.detach())
        (d_condition,) = torch.autograd.grad(x, code, d_image)
        d = E1 * d_prior + d_condition
        h = (h + LR / d.abs().mean(1, keepdim=True) * d).clamp(0, 30)
    return h


def test_one_pass_of_the_generator(ratio):
    G, E, C = networks()
    y = torch.arange(CHAINS) % 10
    start = torch.randn(CHAINS, CODE)
    sampler = noiseless_joint_ppgn_h(
        G, E, ClassCondition(C, y), (E1, 1.0, 0.0), step="normalized", grad="release", lr=LR
    )

    def ours():
        return sampler.sample(CHAINS, STEPS, start).codes

    def theirs():
        codes = two_passes(G, E, C, start, y)
        with torch.no_grad():
            C(G(codes))  # as ours does, for the images returned
        return codes

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    assert ratio("250 chains / two passes of G", ours, theirs, rounds=9) < 1


def test_chains_in_one_batch(ratio):
    G, E, C = networks()
    y = torch.arange(CHAINS) % 10
    start = torch.randn(CHAINS, CODE)
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, y), (E1, 1.0, 0.0))

    def ours():
        return sampler.sample(CHAINS, STEPS, start).codes

    def theirs():
        alone = (replace(sampler, condition=ClassCondition(C, int(c))) for c in y)
        return torch.cat([one.sample(1, STEPS, h[None]).codes for one, h in zip(alone, start, strict=True)])

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    assert ratio("250 chains in a batch / one at a time", ours, theirs, rounds=3) < 0.5
