"""Eigen-CAM: worked example, invariances, other libraries, layers of all kinds, care."""

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import EigenCAM as PeerEigenCAM
from pytorch_grad_cam import EigenGradCAM
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn

from classact.explain import EigenCAM, eigen_map, normalize_map, upsample_map

ARCHITECTURES = {
    "test_resnet": "layer4",
    "test_efficientnet": "blocks.4",
    "test_byobnet": "stages.3",
    "test_convnext": "stages.3",
    "mobilenetv3_small_050": "blocks.5",
}


def features(n=3, channels=20, size=(5, 6), seed=0, relu=True):
    found = torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed))
    return found.relu() if relu else found


def as_matrix(f):
    return f.flatten(2).transpose(1, 2)


def up_to_sign(found, expected, **tolerance):
    sign = (found * expected).flatten(1).sum(1).sign().view(-1, *[1] * (found.ndim - 1))
    torch.testing.assert_close(found * sign, expected, **tolerance)


def network():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))


def images(n=3, size=12):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_worked_example():
    O = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])  # noqa: E741
    L = eigen_map(O.T.view(1, 2, 2, 2)).flatten()
    torch.testing.assert_close(L, torch.tensor([1.914184, 0.289784, 1.246876, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(L.norm().item(), 2.302776, atol=1e-5, rtol=0)
    cam = EigenCAM(nn.Sequential(nn.Identity()), "0")
    s = cam.spectrum(O.T.view(1, 2, 2, 2))
    torch.testing.assert_close(s, torch.tensor([[2.302776, 1.302776]]), atol=1e-5, rtol=0)
    share = 2.302776**2 / (2.302776**2 + 1.302776**2)
    torch.testing.assert_close(cam.explained(O.T.view(1, 2, 2, 2)).item(), share, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [12, 30, 80])
@pytest.mark.parametrize("component", [1, 2, 7])
@pytest.mark.parametrize("center", [False, True])
def test_is_the_projection_of_the_thin_svd(channels, component, center):
    f = features(channels=channels, relu=False)
    X = as_matrix(f)
    X = X - X.mean(1, keepdim=True) if center else X
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    L = eigen_map(f, component, center=center).flatten(1)
    up_to_sign(L, (X @ Vh[:, component - 1, :, None]).squeeze(2), atol=1e-4, rtol=1e-4)
    up_to_sign(L, S[:, component - 1, None] * U[:, :, component - 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(L.norm(dim=1), S[:, component - 1], atol=1e-5, rtol=1e-5)


def test_does_not_depend_on_the_basis_of_the_channels():
    f = features(relu=False)
    L = eigen_map(f)
    up_to_sign(eigen_map(f[:, torch.randperm(20)]), L, atol=1e-5, rtol=1e-4)
    Q = torch.linalg.qr(torch.randn(20, 20)).Q
    up_to_sign(eigen_map(torch.einsum("nkhw,kj->njhw", f, Q)), L, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(eigen_map(3 * f), 3 * L, atol=1e-5, rtol=1e-4)


def test_follows_the_positions():
    f = features()
    L = eigen_map(f)
    torch.testing.assert_close(eigen_map(f.flip(3)), L.flip(2), atol=1e-5, rtol=1e-4)
    order = torch.randperm(30)
    torch.testing.assert_close(eigen_map(f.flatten(2)[..., order]), L.flatten(1)[:, order], atol=1e-5, rtol=1e-4)


def test_features_of_rank_one_give_their_pattern_and_explain_everything():
    p, q = torch.rand(1, 1, 5, 6), torch.randn(1, 20, 1, 1)
    torch.testing.assert_close(normalize_map(eigen_map(p * q)), (p / p.max())[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(EigenCAM(nn.Sequential(nn.Identity()), "0").explained(p * q), torch.ones(1))


def test_after_a_relu_the_map_and_the_direction_have_no_negative_value():
    f = features()
    L = eigen_map(f)
    assert (L > -1e-6).all()
    assert (torch.einsum("nkhw,nhw->nk", f, L) > -1e-6).all()


def test_dead_and_doubled_channels_change_nothing():
    f = features()
    L = normalize_map(eigen_map(f))
    for other in (torch.cat([f, torch.zeros_like(f)], 1), torch.cat([f, f], 1)):
        torch.testing.assert_close(normalize_map(eigen_map(other)), L, atol=1e-5, rtol=1e-4)


def test_sign_rules():
    f = features(relu=False)
    for component in (1, 2):
        assert (eigen_map(f, component).flatten(1).sum(1) > 0).all()
        L = eigen_map(f, component, sign="maxabs").flatten(1)
        assert (L.gather(1, L.abs().argmax(1, keepdim=True)) > 0).all()
        up_to_sign(eigen_map(f, component, sign="none").flatten(1), L)


def test_the_sign_of_a_centred_map_does_not_come_from_rounding():
    f = features(n=16, channels=64, size=(7, 7))
    L = eigen_map(f, center=True)
    for other in (f[:, torch.randperm(64)], f.double(), f * 1.7):
        assert ((eigen_map(other, center=True) * L).flatten(1).sum(1) > 0).all()
    v = torch.einsum("nkhw,nhw->nk", f, L)  # a positive multiple of the direction, since L sums to zero
    assert (torch.einsum("nkhw,nk->n", f, v) > 0).all()


def test_centred_projection_equals_pytorch_grad_cam_and_scikit_learn():
    from sklearn.decomposition import PCA

    for f in (features(relu=False), features(channels=64)):
        L = eigen_map(f, center=True)
        up_to_sign(L, torch.from_numpy(get_2d_projection(f.numpy())), atol=1e-4, rtol=1e-4)
        pca = [PCA(n_components=1, svd_solver="full").fit_transform(X)[:, 0] for X in as_matrix(f).double().numpy()]
        up_to_sign(L.flatten(1), torch.from_numpy(np.stack(pca)).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "layer"), ARCHITECTURES.items())
def test_centred_maps_equal_pytorch_grad_cam_up_to_its_sign(name, layer):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval().double()
    x = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    with PeerEigenCAM(model, [model.get_submodule(layer)]) as peer:
        expected = torch.from_numpy(peer(x, None))
        theirs = torch.from_numpy(get_2d_projection(peer.activations_and_grads.activations[0].numpy()))
    with EigenCAM(model, layer, center=True) as cam:
        A = cam.record(x).layers[0].A
        L = eigen_map(A, center=True)
        up_to_sign(L.float(), theirs, atol=1e-4, rtol=1e-4)
        same = (L * theirs).flatten(1).sum(1) > 0
        maps = cam(x, normalize="minmax").float()
    torch.testing.assert_close(maps[same], expected[same], atol=1e-4, rtol=0)
    other = normalize_map(upsample_map((-L).relu(), (96, 96)), "minmax").float()
    torch.testing.assert_close(other[~same], expected[~same], atol=1e-4, rtol=0)


def test_weighted_by_the_gradient_it_equals_eigen_grad_cam():
    model, x = network().double(), images().double()
    with EigenGradCAM(model, [model[3]]) as peer:
        peer(x, [lambda output: output[2]] * 3)
        found = peer.activations_and_grads
        expected = torch.from_numpy(get_2d_projection((found.gradients[0] * found.activations[0]).numpy()))
    cam = EigenCAM(model, "3", weight="grad", center=True)
    part = cam.record(x, 2).layers[0]
    up_to_sign(eigen_map(part.A * part.gradients[0], center=True).float(), expected, atol=1e-4, rtol=1e-4)
    assert cam(x, 2).shape == (3, 12, 12)
    assert not torch.allclose(cam.raw(x, 2), cam.raw(x, 3))
    several = cam.raw(x, torch.tensor([[2, 3]] * 3))
    torch.testing.assert_close(several[:, 1], cam.raw(x, 3))
    torch.testing.assert_close(cam.explained(x, 2), cam.spectrum(x, 2)[:, 0] ** 2 / (cam.spectrum(x, 2) ** 2).sum(1))


def test_a_classifier_that_errs_changes_nothing():
    model, x = network(), images()
    before = EigenCAM(model, "3")(x)
    with torch.no_grad():
        model[6].weight.normal_()
    assert torch.equal(EigenCAM(model, "3")(x), before)
    assert torch.equal(EigenCAM(model[:4], "3")(x), before)
    assert torch.equal(EigenCAM(model[:4])(x), before)


def test_every_class_has_the_same_map_and_a_target_is_ignored_with_a_warning():
    cam, x = EigenCAM(network(), "3"), images()
    with pytest.warns(UserWarning, match="the same for every class: the target is ignored"):
        maps = [cam(x, 1), cam(x, torch.tensor([3, 4, 0]))]
    assert torch.equal(maps[0], cam(x)) and torch.equal(maps[1], cam(x))
    with pytest.warns(UserWarning, match="ignored"):
        assert cam(x, torch.zeros(3, 2, dtype=torch.long)).shape == (3, 2, 12, 12)


def test_needs_no_gradient():
    model, x = network(), images()
    expected = EigenCAM(model, "3")(x)

    class Rounded(nn.Module):
        def forward(self, x):
            return (x * 16).round().int().float() / 16

    model.requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(EigenCAM(model, "3")(x), expected)
    assert EigenCAM(nn.Sequential(*model[:3], Rounded()), "3")(x).shape == (3, 12, 12)


def state(model):
    return [(part.training, len(part._forward_hooks), len(part._backward_hooks)) for part in model.modules()] + [
        (p.requires_grad, p.grad) for p in model.parameters()
    ]


def test_the_model_is_left_as_it_was_also_on_error():
    model, x = network().train(), images()
    model[2].weight.requires_grad_(False)
    before, weights = state(model), [p.clone() for p in model.parameters()]
    for weight, target in ((None, None), ("grad", 1)):
        EigenCAM(model, "3", weight=weight)(x, target)
        with pytest.raises(RuntimeError):
            EigenCAM(model, "3", weight=weight)(x[:, :2], target)
        with pytest.raises(ValueError, match="features must be finite"):
            EigenCAM(model, "3", weight=weight)(x * float("nan"), target)
    assert state(model) == before
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters(), strict=True))


def test_a_zero_layer_gives_a_zero_map():
    model = network()
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, -1.0)
    cam = EigenCAM(model, "3")
    assert not cam(images()).any()
    assert cam.explained(images()).tolist() == [0, 0, 0]


def test_extreme_values_and_low_precision():
    f = features()
    L = normalize_map(eigen_map(f))
    for factor in (1e-25, 1e25):
        torch.testing.assert_close(normalize_map(eigen_map(f * factor)), L, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(normalize_map(eigen_map((f * 1000).half())), L, atol=2e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(normalize_map(eigen_map(f)), L)
        assert EigenCAM(network(), "3")(images()).isfinite().all()
    assert eigen_map(f.double()).dtype == torch.float64


def test_components_and_what_they_explain():
    x = images()
    cams = [EigenCAM(network(), "3", component=j) for j in (1, 2, 3)]
    shares = torch.stack([cam.explained(x) for cam in cams])
    assert (shares[:-1] >= shares[1:]).all() and (shares.sum(0) <= 1).all()
    first, second = (eigen_map(cam.record(x).layers[0].A, cam.component).flatten(1) for cam in cams[:2])
    torch.testing.assert_close((first * second).sum(1), torch.zeros(3), atol=1e-4, rtol=0)
    centred = EigenCAM(network(), "3", center=True)
    A = as_matrix(centred.record(x).layers[0].A)
    torch.testing.assert_close(centred.spectrum(x), torch.linalg.svdvals(A - A.mean(1, keepdim=True)))


def test_tokens_volumes_and_series():
    vit = timm.create_model("test_vit", pretrained=False, num_classes=10).eval()
    with EigenCAM(vit) as cam:
        assert cam(torch.randn(2, 3, 160, 160)).shape == (2, 160, 160)
    assert eigen_map(torch.rand(2, 4, 3, 3, 3)).shape == (2, 3, 3, 3)
    series = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU())
    assert EigenCAM(series, "1")(torch.rand(2, 2, 30)).shape == (2, 30)


def test_a_batch_equals_its_samples():
    cam, x = EigenCAM(network(), "3"), images()
    torch.testing.assert_close(cam(x), torch.cat([cam(one[None]) for one in x]), atol=1e-5, rtol=1e-4)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EigenCAM(network(), "3", component=0), "component must be at least 1, got 0"),
        (lambda: EigenCAM(network(), "3", weight="score"), "weight must be None or 'grad', got 'score'"),
        (lambda: EigenCAM(network(), "3", sign="plus"), "sign must be 'sum', 'maxabs' or 'none', got 'plus'"),
        (lambda: EigenCAM(network(), "3", component=9)(images()), r"min\(positions, channels\) = 8, got 9"),
        (lambda: EigenCAM(network(), "3", component=9).explained(images()), r"min\(positions, channels\) = 8, got 9"),
        (lambda: EigenCAM(network(), "3", weight="grad")(images()), "weight='grad' explains a target; none was given"),
        (lambda: EigenCAM(network(), "6")(images()), r"output \(3, 5\) has no map of positions"),
        (lambda: EigenCAM(network(), "2", weight="grad")(images(), 7), "target must be a class from 0 to 4"),
        (lambda: eigen_map(torch.rand(2, 5, 1, 1)), "at least two positions, got shape"),
        (lambda: eigen_map(torch.rand(2, 5)), "features must be"),
        (lambda: eigen_map(torch.full((1, 2, 2, 2), torch.inf)), "features must be finite"),
        (lambda: eigen_map(torch.rand(1, 2, 2, 2), sign="plus"), "sign must be"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_refuses_options_it_does_not_have():
    with pytest.raises(TypeError, match="EigenCAM has no option maps"):
        EigenCAM(network(), "3")(images(), maps=[1])
