"""Eigen-CAM beside pytorch-grad-cam's, whose full decomposition runs image by image."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

from classact.explain import eigen_map

K = 1280


@pytest.mark.parametrize(("n", "side"), [(16, 7), (4, 14)])
def test_centred_projection(ratio, n, side):
    features = torch.randn(n, K, side, side, generator=torch.Generator().manual_seed(0)).relu()
    array = features.numpy()

    def ours():
        return eigen_map(features, center=True, sign="none")

    def theirs():
        return get_2d_projection(array)

    found, expected = ours().numpy(), theirs()
    sign = np.sign((found * expected).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(found * sign, expected, atol=1e-3, rtol=1e-3)
    assert ratio(f"projection of {side} x {side} x {K} / pytorch-grad-cam", ours, theirs, rounds=3) < 1 / 3
