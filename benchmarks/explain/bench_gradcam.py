"""Grad-CAM beside pytorch-grad-cam and torchcam, beside one forward and backward pass, and a thousand explainers."""

import copy
import gc
import resource

import pytest
import timm
import torch
import torchvision
from pytorch_grad_cam import GradCAM as PeerGradCAM
from torchcam.methods import GradCAM as TorchcamGradCAM

from classact.explain.gradcam import GradCAM

N, SIZE, CLASS = 16, 224, 7


def score(output):
    return 1e4 * output[CLASS]  # pytorch-grad-cam adds 1e-7 to what it divides by


def vit_map(tokens):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14))


NETWORKS = {
    "resnet50": (torchvision.models.resnet50, "layer4", None),
    "vit_s16": (lambda: timm.create_model("vit_small_patch16_224"), "blocks.11.norm1", vit_map),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    make, layer, reshape = NETWORKS[request.param]
    torch.manual_seed(0)
    return request.param, make().eval(), layer, reshape, torch.randn(N, 3, SIZE, SIZE)


def test_throughput(case, ratio):
    name, model, layer, reshape, x = case
    cam = GradCAM(model, layer)

    def ours():
        return cam(x, CLASS, normalize="minmax")

    with PeerGradCAM(model, [model.get_submodule(layer)], reshape_transform=reshape) as peer:
        torch.testing.assert_close(ours(), torch.from_numpy(peer(x, [score] * N)), atol=1e-4, rtol=0)
        assert ratio(f"{name} / pytorch-grad-cam", ours, lambda: peer(x, [score] * N), rounds=5) < 1 / 1.5
    if reshape is not None:
        return  # torchcam knows feature maps only
    other = copy.deepcopy(model)  # torchcam's hooks would run in our passes too
    with TorchcamGradCAM(other, layer) as peer:

        def theirs():
            other.zero_grad()
            return peer([CLASS] * N, other(x), normalized=False)[0]

        torch.testing.assert_close(cam.raw(x, CLASS), theirs(), atol=1e-6, rtol=1e-3)
        assert (
            ratio(f"{name} / torchcam", lambda: cam.raw(x, CLASS), theirs, rounds=11) < 1.05
        )  # as fast, to within what medians vary


def test_cost_over_one_pass(case, ratio):
    """The pass that any such map needs: forward, and backward from the score to the layer."""
    name, model, layer, reshape, x = case
    model.requires_grad_(False)
    module, kept = model.get_submodule(layer), []

    def start(_, __, output):
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()

    def plain():
        handle = module.register_forward_hook(start)
        logits = model(x)
        handle.remove()
        return torch.autograd.grad(logits[:, CLASS].sum(), kept)[0]

    cam = GradCAM(model, layer)
    (gradient,) = cam.record(x, CLASS).layers[0].gradients
    torch.testing.assert_close(gradient, plain() if reshape is None else reshape(plain()))
    assert ratio(f"{name} / forward and backward", lambda: cam(x, CLASS), plain, rounds=11) < 1.05


def test_a_thousand_explainers_leave_nothing_behind():
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 64, 64)

    def run(times):
        for _ in range(times):
            with GradCAM(model, "layer4") as cam:
                cam(x, 3)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = run(100)
    assert run(1000) - before < 5
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
