"""Denoising of a batch beside the compiled loop of scikit-image, one image at a time; a climb beside the bare loop."""

import numpy as np
import torch
from skimage.restoration import denoise_tv_bregman

from classact.explain.image_priors import total_variation_bregman
from classact.explain.mfv import ActivationMaximizer, Octave


def by_scikit_image(x, weight, max_iter=100, eps=1e-3):
    images = x.permute(0, 2, 3, 1).numpy()
    denoised = [denoise_tv_bregman(image, weight, max_iter, eps).reshape(image.shape) for image in images]
    return torch.from_numpy(np.stack(denoised)).permute(0, 3, 1, 2)


def noisy(n, channels, side):
    x = torch.zeros(n, channels, side, side)
    x[..., side // 4 : -side // 4, side // 4 : -side // 4] = 180
    return x + 25 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_denoising_a_large_batch(ratio):
    x = noisy(128, 1, 28)
    torch.testing.assert_close(total_variation_bregman(x, 0.4), by_scikit_image(x, 0.4), atol=1e-3, rtol=0)
    found = ratio(
        "TV of 128 images 28 x 28 / scikit-image one by one",
        lambda: total_variation_bregman(x, 0.4),
        lambda: by_scikit_image(x, 0.4),
    )
    assert found < 3


def test_denoising_ten_facets(ratio):
    x = noisy(10, 3, 64)
    torch.testing.assert_close(total_variation_bregman(x, 0.4), by_scikit_image(x, 0.4), atol=1e-3, rtol=0)
    found = ratio(
        "TV of 10 images 3 x 64 x 64 / scikit-image one by one",
        lambda: total_variation_bregman(x, 0.4),
        lambda: by_scikit_image(x, 0.4),
    )
    assert found < 8


def test_climbing_without_denoising_costs_little_more_than_the_network(ratio):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 2, 1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(64 * 256, 10),
    )  # fmt: skip
    x = noisy(10, 3, 64) / 255
    climb = ActivationMaximizer(model, None, [Octave(20)])

    def by_hand():
        y = x
        for _ in range(20):
            y = y.detach().requires_grad_()
            (g,) = torch.autograd.grad(model(y)[:, 0].sum(), y)
            y = (y + g / g.abs().flatten(1).mean(1).view(-1, 1, 1, 1) / 255).clamp(0, 1)
        return y

    torch.testing.assert_close(climb(0, x).images, by_hand(), atol=1e-5, rtol=0)
    assert ratio("20 steps of ActivationMaximizer / the bare loop", lambda: climb(0, x), by_hand) < 2
