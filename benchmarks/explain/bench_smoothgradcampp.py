"""Smooth Grad-CAM++ beside torchcam's."""

import torch
from torchcam.methods import SmoothGradCAMpp as TorchcamSmooth
from torchvision.models import resnet18

from classact.explain import SmoothGradCAMpp

N, SIDE, COPIES = 4, 64, 20


def test_twenty_copies(ratio):
    torch.manual_seed(0)
    model, x = resnet18().eval(), torch.rand(N, 3, SIDE, SIDE)
    model.fc.weight.data *= 100  # gradients far above the constant that torchcam adds to the denominator
    peer = TorchcamSmooth(model, "layer4", num_samples=COPIES, std=0.3, input_shape=(3, SIDE, SIDE))
    plain = TorchcamSmooth(model, "layer4", num_samples=1, std=1e-9, input_shape=(3, SIDE, SIDE))
    exact = SmoothGradCAMpp(model, "layer4", n_samples=1, sigma=0, denominator="sum_AD")
    (expected,) = plain(1, model(x), normalized=False)
    torch.testing.assert_close(exact.raw(x, 1), expected, atol=1e-5, rtol=1e-3)
    plain.remove_hooks()

    def ours():
        return SmoothGradCAMpp(model, "layer4", n_samples=COPIES, sigma=0.3, sigma_mode="absolute").raw(x, 1)

    def theirs():
        return peer(1, model(x), normalized=False)

    try:
        assert ratio("Smooth Grad-CAM++ with 20 copies / torchcam", ours, theirs, rounds=3) < 1 / 1.5
    finally:
        peer.remove_hooks()
