"""Counting the regions of all thresholds of a map beside labelling the mask of each with OpenCV and with SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from classact.discover.anomalyncd import MaskGuidedViT, MEBin, region_counts

SIDE = 512


def smooth_map():
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 12)
    defects = ndimage.gaussian_filter((rng.uniform(size=(SIDE, SIDE)) < 2e-5).astype(float), 15)
    one = 0.15 * noise / noise.std() + defects / defects.max()
    return ((one - one.min()) / np.ptp(one) * 255).astype(np.uint8)


def prepared():
    one = smooth_map()
    mebin = MEBin().fit(np.stack([one, one // 2]))
    return mebin, one, mebin.scale([one])[0]


def ours(mebin, one):
    return lambda: region_counts(mebin.scale([mebin._erode(one)])[0], mebin.scores).tolist()


def test_counts_beside_opencv(ratio):
    cv2 = pytest.importorskip("cv2")
    cv2.setNumThreads(1)
    mebin, one, scaled = prepared()
    kernel = np.ones((6, 6), np.uint8)

    def theirs():
        masks = (cv2.erode(np.where(scaled > t, 255, 0).astype(np.uint8), kernel) for t in mebin.scores)
        return [cv2.connectedComponents(mask, connectivity=8)[0] - 1 for mask in masks]

    assert ours(mebin, one)() == theirs()
    assert ratio("regions at 64 thresholds / OpenCV", ours(mebin, one), theirs) < 1


def test_counts_beside_scipy(ratio):
    mebin, one, scaled = prepared()
    eight = np.ones((3, 3))

    def theirs():
        masks = (ndimage.minimum_filter((scaled > t).astype(np.uint8), size=6, mode="nearest") for t in mebin.scores)
        return [ndimage.label(mask, eight)[1] for mask in masks]

    assert ours(mebin, one)() == theirs()
    assert ratio("regions at 64 thresholds / SciPy", ours(mebin, one), theirs) < 0.3


def test_guidance_costs_little(ratio):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(img_size=224, patch_size=16, embed_dim=192, depth=6, num_heads=3, num_classes=0).eval()
    guided, x, mask = MaskGuidedViT(vit, n_blocks=6), torch.randn(4, 3, 224, 224), torch.ones(4, 1, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(guided(x, mask), vit(x), atol=1e-4, rtol=1e-4)

        def with_mask():
            guided(x, mask)

        def without():
            vit(x)

        assert ratio("mask-guided transformer / timm's", with_mask, without, rounds=15) < 1.3
