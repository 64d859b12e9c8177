"""Masked layers beside dense ones: what sparse inference gains, from which reduction on, and what masks cost."""

import numpy as np
import torch
from torch import nn

from classact.probe.ftwt import DynamicFlops, convert_ftwt, estimate_reduction, filter_response, mass_mask
from classact.probe.ftwt import to_sparse_inference as sparse

KEPT = (1.0, 0.85, 0.7, 0.5, 0.35)


def network(width=128, size=28, layers=4):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(layers - 1):
        parts += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*parts).eval(), torch.randn(8, 3, size, size)


def keeping(dense, share):
    """A converted network whose heads keep a share of the filters, other ones in every layer and for every input."""
    converted = convert_ftwt(dense, softmax=False)
    generator = torch.Generator().manual_seed(0)
    for layer in converted.layers.values():
        linear = layer.head.linear
        nn.init.normal_(linear.weight, 0, 0.01, generator=generator)
        order = torch.randperm(len(linear.bias), generator=generator)
        linear.bias.data = torch.where(order < round(share * len(order)), 5.0, -5.0)
    return converted.eval()


def test_sparse_inference_beside_dense_convolutions(ratio, capsys):
    dense, images = network()
    last = images.contiguous(memory_format=torch.channels_last)
    dense_last = network()[0].to(memory_format=torch.channels_last)
    for n in (1, 8):
        for layout, peer, x in (("contiguous", dense, images[:n]), ("channels last", dense_last, last[:n])):
            saved, times = [], []
            for share in KEPT:
                converted = keeping(dense, share)
                fast = sparse(converted)
                with torch.inference_mode():
                    torch.testing.assert_close(fast(images[:n]), converted(images[:n]), rtol=1e-3, atol=1e-4)
                    saved.append(float(DynamicFlops(converted)(images[:n]).reduction().mean()))
                    name = f"batch {n}, {saved[-1]:.0%} saved: sparse / dense, {layout}"
                    times.append(ratio(name, lambda f=fast, n=n: f(images[:n]), lambda p=peer, x=x: p(x), rounds=5))
            crossing = np.interp(-1.0, -np.array(times), saved) if min(times) < 1 < max(times) else None
            with capsys.disabled():
                where = "nowhere" if crossing is None else f"at {crossing:.0%} saved"
                print(f"\n  batch {n}, {layout}: breaks even {where}")
            assert times[-1] < times[0]


def test_masks_beside_the_convolutions_they_mask(ratio):
    dense, images = network()
    converted = keeping(dense, 0.7)
    with torch.inference_mode(), converted.masks_from("all"):
        torch.testing.assert_close(converted(images), dense(images))
    with torch.inference_mode():
        assert ratio("predicted masks / dense network", lambda: converted(images), lambda: dense(images)) < 2
    report = estimate_reduction(dense, [images], (0.9,))
    assert report.reduction.shape == (1, 8)
    ratio(
        "estimate for one r / dense network", lambda: estimate_reduction(dense, [images], (0.9,)), lambda: dense(images)
    )


def test_mass_masks_beside_a_loop_over_inputs(ratio):
    o = torch.relu(torch.randn(256, 512, 7, 7))

    def loop():
        masks = []
        for e in o.flatten(2).amax(2):
            order = e.argsort(descending=True)
            kept = (e[order].cumsum(0) / e.sum() <= 0.9 + 1e-5).nonzero().flatten()
            mask = torch.zeros(512, dtype=torch.bool)
            mask[order[kept]] = True
            masks.append(mask)
        return torch.stack(masks)

    assert (mass_mask(filter_response(o), 0.9) == loop()).float().mean() > 0.9999  # sums round differently
    assert ratio("masks of 256 inputs, 512 filters / a loop", lambda: mass_mask(filter_response(o), 0.9), loop) < 1
