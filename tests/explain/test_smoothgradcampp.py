"""Smooth Grad-CAM++ and Grad-CAM++: worked examples, the derivation, other libraries, noise, parts of a layer, care."""

import gc

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import GradCAMPlusPlus
from torch import nn
from torchcam.methods import SmoothGradCAMpp as TorchcamSmooth

from classact.explain import GradCAMpp, SmoothGradCAMpp, gradcampp_weights, normalize_map

ARCHITECTURES = {
    "test_resnet": "layer4",
    "test_efficientnet": "blocks.4",
    "test_byobnet": "stages.3",
    "test_convnext": "stages.3",
    "mobilenetv3_small_050": "blocks.5",
}
A = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)


def network(seed=0, classes=5, in_channels=3, size=16):
    """Its head has a hidden layer, so that noise changes the gradient at the last feature map ("3", of half size)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * (size // 2) ** 2, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def images(n=3, seed=1, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def powers(g):
    return g, g**2, g**3


@pytest.mark.parametrize(("numerator", "alpha", "w"), [("second", 0.142857, 0.285714), ("paper", 0.285714, 0.571429)])
def test_worked_example(numerator, alpha, w):
    g = torch.full((1, 1, 2, 2), 0.5)
    found = gradcampp_weights(*powers(g), A, numerator=numerator)
    torch.testing.assert_close(found, torch.tensor([[w]]), atol=1e-6, rtol=0)
    one = gradcampp_weights(*powers(g), A, numerator=numerator, region=torch.tensor([[True, False], [False, False]]))
    torch.testing.assert_close(one, torch.tensor([[alpha * 0.5]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("g", [-0.05, -0.2, 0.0])
def test_negative_gradients_give_exactly_zero_also_where_the_denominator_cancels(g, dtype):
    w = gradcampp_weights(*powers(torch.full((1, 1, 2, 2), g, dtype=dtype)), A.to(dtype))
    assert w.item() == 0


def test_a_denominator_that_cancels_for_averaged_derivatives_gives_zero():
    D1, D2, D3 = torch.full((1, 1, 2, 2), 0.1), torch.full((1, 1, 2, 2), 0.05), torch.full((1, 1, 2, 2), -0.01)
    assert gradcampp_weights(D1, D2, D3, A).item() == 0


def test_the_weight_of_a_scaled_score_follows_the_closed_form():
    for s in (0.5, 1.0, 3.0):
        w = gradcampp_weights(*powers(torch.full((1, 1, 2, 2), 0.5 * s)), A)
        torch.testing.assert_close(w.item(), 4 * 0.5 * s / (2 + s * 10 * 0.5), atol=1e-6, rtol=0)


def test_powers_of_the_gradient_are_the_derivatives_of_the_exponential_score():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    x = torch.randn(4, dtype=torch.float64)

    def score(a):
        return head(a).exp().sum()

    first = torch.func.grad(score)
    third = torch.func.jacrev(torch.func.jacrev(first))(x)
    g = torch.autograd.functional.jacobian(lambda a: head(a).sum(), x)
    Y = score(x)
    torch.testing.assert_close(first(x), Y * g)
    torch.testing.assert_close(torch.func.jacrev(first)(x).diagonal(), Y * g**2)
    torch.testing.assert_close(third[range(4), range(4), range(4)], Y * g**3)


@pytest.mark.parametrize(("name", "layer"), ARCHITECTURES.items())
def test_grad_cam_plus_plus_equals_pytorch_grad_cam(name, layer):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval().double()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    scale = 1e6  # far above the constant that pytorch-grad-cam adds to the denominator
    with GradCAMPlusPlus(model, [model.get_submodule(layer)]) as peer:
        expected = peer(x, [lambda output: scale * output[3]] * 2)
        found = peer.activations_and_grads
        weights = peer.get_cam_weights(None, None, None, found.activations[0].numpy(), found.gradients[0].numpy())
    cam = GradCAMpp(model, layer)
    w = cam.weights(x, lambda output: scale * output[:, 3])
    assert float(w.max()) > 0
    torch.testing.assert_close(w, torch.from_numpy(weights), atol=0, rtol=1e-4)
    maps = cam(x, lambda output: scale * output[:, 3], normalize="minmax")
    np.testing.assert_allclose(maps, expected, atol=1e-4)


def test_one_copy_without_noise_equals_torchcam_with_its_denominator():
    model, x = network().eval(), images(1)
    nn.init.normal_(model[-1].weight)
    with TorchcamSmooth(model, "3", num_samples=1, std=1e-9, input_shape=(3, 16, 16)) as peer:
        (expected,) = peer(2, model(x), normalized=False)
    raw = SmoothGradCAMpp(model, "3", n_samples=1, sigma=0, denominator="sum_AD").raw(x, 2)
    assert float(raw.max()) > 0
    torch.testing.assert_close(raw, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("score_scale", ["logit", "exp"])
def test_averages_derivatives_over_noisy_copies_as_a_plain_loop_does(score_scale):
    model, x = network(), images()
    nn.init.normal_(model[-1].weight)  # scores differ among copies
    noise = torch.Generator().manual_seed(5)
    span = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).view(-1, 1, 1, 1)
    grads, scores = [], []
    for _ in range(7):
        features = model[:4](x + 0.2 * span * torch.randn(x.shape, generator=noise)).detach().requires_grad_()
        score = model[4:](features)[:, 1]
        grads.append(torch.autograd.grad(score.sum(), features)[0])
        scores.append(score.detach())
    share = torch.stack(scores).softmax(0) if score_scale == "exp" else torch.full((7, 3), 1 / 7)
    mean = [(share.view(7, 3, 1, 1, 1) * torch.stack(grads) ** p).sum(0) for p in (1, 2, 3)]
    features = model[:4](x).detach()
    alpha = mean[1] / (2 * mean[1] + features.sum((2, 3), keepdim=True) * mean[2])
    w = (alpha.nan_to_num() * mean[0].relu()).sum((2, 3))
    L = torch.einsum("nk,nkhw->nhw", w, features).relu()
    generator = torch.Generator().manual_seed(5)
    options = {"n_samples": 7, "sigma": 0.2, "generator": generator, "chunk": 3}
    cam = SmoothGradCAMpp(model, "3", score_scale=score_scale, **options)
    torch.testing.assert_close(cam.raw(x, 1), L, atol=1e-6, rtol=1e-4)


def test_sigma_in_absolute_units():
    x = images() * 4
    span = float(x[0].amax() - x[0].amin())
    relative, absolute = (
        SmoothGradCAMpp(network(), "3", sigma=s, sigma_mode=mode).raw(x[:1], 1)
        for s, mode in ((0.1, "range"), (0.1 * span, "absolute"))
    )
    torch.testing.assert_close(relative, absolute)


def test_noise_changes_the_map_and_its_seed_fixes_it():
    model, x = network(), images()
    first, again, other, plain = (
        SmoothGradCAMpp(model, "3", sigma=sigma, generator=torch.Generator().manual_seed(seed)).raw(x, 1)
        for seed, sigma in ((1, 0.2), (1, 0.2), (2, 0.2), (1, 0.0))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3) and not torch.allclose(first, plain, rtol=1e-3)


@pytest.mark.parametrize("score_scale", ["logit", "exp"])
def test_the_size_of_a_chunk_changes_nothing(score_scale):
    model, x = network(), images()
    whole, *parts = (
        SmoothGradCAMpp(model, "3", n_samples=8, chunk=chunk, score_scale=score_scale).raw(x, 1) for chunk in (8, 1, 3)
    )
    for part in parts:
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)


def test_memory_is_bounded_by_the_chunk_whatever_the_number_of_copies():
    def live():
        return sum(part.numel() for part in gc.get_objects() if type(part) is torch.Tensor)

    model, x, sizes, held = network(), images(2), [], []

    def watch(_, inputs):
        sizes.append(len(inputs[0]))
        held.append(live())

    model.register_forward_pre_hook(watch)
    for n in (6, 12):
        SmoothGradCAMpp(model, "3", n_samples=n, chunk=3)(x, 1)
    assert sizes == [2] + [6] * 2 + [2] + [6] * 4
    assert held[-1] <= held[2] + 100


def test_without_noise_number_of_copies_and_generator_do_not_matter():
    model, x = network(), images()
    plain = GradCAMpp(model, "3").raw(x, 1)
    for n in (1, 5):
        cam = SmoothGradCAMpp(model, "3", n_samples=n, sigma=0, generator=torch.Generator().manual_seed(n))
        assert torch.equal(cam.raw(x, 1), plain)


def test_with_a_linear_head_smoothing_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(*network()[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    smooth, plain = SmoothGradCAMpp(model, "3", sigma=0.5), GradCAMpp(model, "3")
    torch.testing.assert_close(smooth.raw(images(), 1), plain.raw(images(), 1))


def test_a_batch_equals_its_samples_and_follows_their_order():
    model, x = network(), images(4)

    def maps(x, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return SmoothGradCAMpp(model, "3", generator=generators).raw(x, 2)

    whole = maps(x, range(4))
    torch.testing.assert_close(whole, torch.cat([maps(x[i : i + 1], [i]) for i in range(4)]))
    order = [2, 0, 3, 1]
    torch.testing.assert_close(maps(x[order], order), whole[order])


def test_explains_the_class_predicted_without_noise():
    model, x = network(), images(8)
    classes = model(x).argmax(1)
    cam = SmoothGradCAMpp(model, "3", sigma=2.0)
    torch.testing.assert_close(cam.raw(x), cam.raw(x, classes))


def test_several_targets_see_the_same_noise():
    cam, x = SmoothGradCAMpp(network(), "3"), images(2)
    both = cam.raw(x, torch.tensor([[1, 3], [0, 2]]))
    assert both.shape == (2, 2, 8, 8)
    torch.testing.assert_close(both[:, 0], cam.raw(x, [1, 0]))
    torch.testing.assert_close(both[:, 1], cam.raw(x, lambda output: output[[0, 1], [3, 2]]))


def test_maps_over_a_partition_of_the_channels_add_up():
    cam, x = SmoothGradCAMpp(network(), "3"), images()
    (whole,), (even,), (odd,) = (cam.signed_layers(x, 1, maps=maps) for maps in (None, range(0, 8, 2), range(1, 8, 2)))
    torch.testing.assert_close(even + odd, whole)
    torch.testing.assert_close(cam(x, 1, maps=range(8)), cam(x, 1))
    one = cam.raw(x, 1, maps=[5])
    A = cam.record(x, 1).layers[0].A
    torch.testing.assert_close(one, (cam.weights(x, 1)[:, 5, None, None] * A[:, 5]).relu())


def test_weights_of_regions_that_cover_the_map_add_up():
    cam, x = SmoothGradCAMpp(network(), "3"), images()
    left, right = (cam.weights(x, 1, region=bounds) for bounds in ((0, 8, 0, 4), (0, 8, 4, 8)))
    torch.testing.assert_close(left + right, cam.weights(x, 1))
    torch.testing.assert_close(cam(x, 1, region=(0, 8, 0, 8)), cam(x, 1))


def test_a_region_leaves_only_its_neurons():
    cam, x = SmoothGradCAMpp(network(), "3"), images()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:7] = True
    found = cam.raw(x, 1, region=mask, maps=[2, 6])
    assert not found[:, ~mask].any() and found[:, mask].any()
    torch.testing.assert_close(found, cam.raw(x, 1, region=(2, 5, 1, 7), maps=[2, 6]))
    each = torch.stack([mask, mask.T, ~mask])
    batch = cam.raw(x, 1, region=each)
    for i in range(3):
        torch.testing.assert_close(batch[i], cam.raw(x, 1, region=each[i])[i])


def test_gallery_shows_the_channels_that_count_most():
    cam, x = SmoothGradCAMpp(network(), "3"), images()
    gallery = cam.feature_map_gallery(x, 1, top=3)
    assert gallery.maps.shape == (3, 3, 16, 16)
    A, w = cam.record(x, 1).layers[0].A, cam.weights(x, 1)
    expected = (w.abs() * A.mean((2, 3))).argsort(1, descending=True)[:, :3]
    assert torch.equal(gallery.channels, expected)
    torch.testing.assert_close(gallery.weights, w.gather(1, expected))
    raw = cam.feature_map_gallery(x, 1, top=3, upsample=False).maps
    torch.testing.assert_close(raw[1, 0], normalize_map(A[1, expected[1, 0]][None])[0])


def test_a_dead_layer_gives_a_zero_map_and_positive_gradients_positive_weights():
    model = network()
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, -1.0)
    assert not SmoothGradCAMpp(model, "3")(images(), 1).any()
    model = network()
    for part in model:
        if hasattr(part, "weight"):
            part.weight.data.abs_()
            part.bias.data.zero_()
    w = SmoothGradCAMpp(model, "3")(images(), 1), SmoothGradCAMpp(model, "3").weights(images(), 1)
    assert (w[1] > 0).all() and (w[0].flatten(1).amax(1) == 1).all()


def test_exponential_scores_do_not_overflow_and_change_nothing_for_one_copy():
    model, x = network(), images()
    one = [SmoothGradCAMpp(model, "3", n_samples=1, score_scale=scale).raw(x, 1) for scale in ("logit", "exp")]
    torch.testing.assert_close(*one)
    with torch.no_grad():
        model[-1].bias += 1e4
    assert SmoothGradCAMpp(model, "3", score_scale="exp")(x, 1).isfinite().all()


def test_volumes_and_series():
    torch.manual_seed(0)
    volumes = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 512, 3))
    assert SmoothGradCAMpp(volumes, "1")(torch.rand(2, 1, 8, 8, 8), 1).shape == (2, 8, 8, 8)
    series = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30, 3))
    assert SmoothGradCAMpp(series, "1")(torch.rand(2, 2, 30), 1, region=(5, 20)).shape == (2, 30)


def test_double_precision_autocast_and_half_precision_gradients():
    model, x = network(), images()
    plain, double = SmoothGradCAMpp(model, "3", sigma=0)(x, 1), SmoothGradCAMpp(model.double(), "3", sigma=0)
    assert double(x.double(), 1).dtype == torch.float64
    torch.testing.assert_close(double(x.double(), 1).float(), plain, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = SmoothGradCAMpp(model.float(), "3")(x, 1)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, SmoothGradCAMpp(model, "3")(x, 1), atol=0.05, rtol=0)
    small = network().half()
    with torch.no_grad():
        small[-1].weight *= 0.01  # the third power of the gradient is no number of float16 any more
    D1, _, D3 = GradCAMpp(small, "3").derivatives(x.half(), 1)[0][1][0]
    torch.testing.assert_close(D3, D1**3)
    assert D3[D1 != 0].all()


def state(model):
    return [
        (part.training, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
        for part in model.modules()
    ] + [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


def test_the_model_is_left_as_it_was_also_on_error():
    model, x = network().train(), images()
    model[0].eval()
    model[2].weight.requires_grad_(False)
    model(x).sum().backward()
    before, weights = state(model), [p.clone() for p in model.parameters()]
    with SmoothGradCAMpp(model, "3") as cam:
        cam(x, 1)
    with pytest.raises(ZeroDivisionError):
        SmoothGradCAMpp(model, "3")(x, lambda output: output[:, 1] / (1 // 0))
    for (a, *rest), (b, *others) in zip(before, state(model), strict=True):
        assert a == b
        assert all(
            torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(rest, others, strict=True)
        )
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters(), strict=True))


def test_works_for_frozen_models_and_in_inference_mode():
    model, x = network(), images()
    expected = SmoothGradCAMpp(model, "3")(x, 1)
    with torch.inference_mode():
        torch.testing.assert_close(SmoothGradCAMpp(model, "3")(x.clone(), 1), expected)
    torch.testing.assert_close(SmoothGradCAMpp(model.requires_grad_(False), "3")(x, 1), expected)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
        ({"sigma": -0.1}, "sigma must not be negative, got -0.1"),
        ({"sigma_mode": "std"}, "sigma_mode must be 'range' or 'absolute', got 'std'"),
        ({"score_scale": "softmax"}, "score_scale must be 'logit' or 'exp', got 'softmax'"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"numerator": "first"}, "numerator must be 'second' or 'paper', got 'first'"),
        ({"denominator": "none"}, "denominator must be 'paper' or 'sum_AD', got 'none'"),
        ({"generator": [torch.Generator()]}, r"generator must be one, or one per sample \(3\), got 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SmoothGradCAMpp(network(), "3", **options)(images(), 1)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": [8]}, r"maps must be one or more different channels from 0 to 7, got \[8\]"),
        ({"maps": [-1]}, "maps must be one or more different channels"),
        ({"maps": [1, 1]}, "maps must be one or more different channels"),
        ({"maps": []}, "maps must be one or more different channels"),
        ({"region": (2, 2, 0, 8)}, "region is empty"),
        ({"region": torch.zeros(8, 8, dtype=torch.bool)}, "region is empty"),
        ({"region": (0, 9, 0, 8)}, r"region \[0, 9, 0, 8\] does not lie in a layer of shape \(8, 8\)"),
        ({"region": (0, 8)}, "region must be a mask or 4 bounds"),
        ({"region": torch.ones(16, 16)}, r"region must be \(8, 8\) or \(3, 8, 8\) as the layer is, got \(16, 16\)"),
        ({"region": torch.ones(3, 1, 8, 8)}, r"region must be .*, got \(3, 1, 8, 8\)"),
    ],
)
def test_bad_parts_of_a_layer(options, message):
    with pytest.raises(ValueError, match=message):
        SmoothGradCAMpp(network(), "3")(images(), 1, **options)


@pytest.mark.bare
def test_bad_calls():
    cam = SmoothGradCAMpp(network(), "3")
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        cam(images().long(), 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'regions'"):
        cam(images(), 1, regions=(0, 8, 0, 8))
    with pytest.raises(ValueError, match="top must be from 1 to 8, got 9"):
        cam.feature_map_gallery(images(), 1, top=9)
