import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from classact.explain import mfv
from classact.explain.image_priors import total_variation, total_variation_bregman
from classact.explain.mfv import (
    ActivationMaximizer,
    FacetClusterer,
    Octave,
    center_biased_schedule,
    mean_image_schedule,
    multifaceted,
    plain_schedule,
    top_images,
)

REFERENCE = np.load(Path(__file__).parent / "data" / "mfv_reference.npz")


class Linear(nn.Module):
    """Units <w, x> of images (N, C, H, W)."""

    def __init__(self, *weights):
        super().__init__()
        self.w = nn.Parameter(torch.stack(weights))

    def forward(self, x):
        return x.flatten(1) @ self.w.flatten(1).T


def network(channels=1, units=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, units)
    )


def random(*shape, seed=0, **options):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), **options)


# total variation


@pytest.mark.parametrize(
    ("shape", "weight", "levels", "max_iter"),
    [
        ((2, 1, 28, 28), 0.4, 255, 100),
        ((2, 3, 17, 30), 0.01, 255, 100),
        ((1, 2, 21, 12), 2.0, 255, 5),
        ((1, 1, 2, 9), 5.0, 1, 100),
        ((2, 1, 9, 2), 0.1, 1, 1),
    ],
)
def test_denoising_equals_scikit_image(shape, weight, levels, max_iter):
    from skimage.restoration import denoise_tv_bregman

    x = levels * random(*shape, dtype=torch.float64)
    expected = [denoise_tv_bregman(image.permute(1, 2, 0).numpy(), weight, max_iter, 1e-3) for image in x]
    expected = torch.from_numpy(np.stack(expected).reshape(len(x), *shape[2:], shape[1])).permute(0, 3, 1, 2)
    torch.testing.assert_close(total_variation_bregman(x, weight, max_iter), expected, atol=1e-10, rtol=0)
    single = total_variation_bregman(x.float(), weight, max_iter).double()
    torch.testing.assert_close(single, expected, atol=1e-5 * levels, rtol=0)


def test_each_image_stops_by_itself():
    x = torch.cat([255 * random(1, 1, 20, 20), torch.full((1, 1, 20, 20), 7.0), 3 * random(1, 1, 20, 20, seed=1)])
    together = total_variation_bregman(x, 0.4)
    for image, expected in zip(x, together, strict=True):
        torch.testing.assert_close(total_variation_bregman(image[None], 0.4)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[1], x[1])


def test_smaller_weights_denoise_more():
    x = torch.zeros(1, 1, 16, 16)
    x[..., 4:12, 4:12] = 1
    x = 255 * (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    found = [float(total_variation(total_variation_bregman(x, w))) for w in (0.001, 0.01, 0.1, 0.4, 2.0)]
    assert found == sorted(found) and len(set(found)) == 5


def test_denoising_follows_the_scale_of_the_pixels():
    x = random(2, 1, 12, 12, dtype=torch.float64)
    expected = total_variation_bregman(255 * x, 0.4) / 255
    torch.testing.assert_close(total_variation_bregman(x, 0.4 * 255, eps=1e-3 / 255), expected)
    assert total_variation_bregman(x.bfloat16(), 5.0).dtype == torch.bfloat16


# schedules


@pytest.mark.parametrize(("name", "octaves"), [("mean", mean_image_schedule()), ("center", center_biased_schedule())])
def test_schedules_are_the_released_ones(name, octaves):
    rows = [(o.iters, o.scale, o.objective == "softmax", o.margin, o.window) for o in octaves]
    assert np.array_equal(np.array(rows, float), REFERENCE[f"{name}_octaves"])
    steps = [
        (o.step[0] + (o.step[1] - o.step[0]) * i / o.iters, o.tv_weight(i, legacy=True))
        for o in octaves
        for i in range(o.iters)
    ]
    np.testing.assert_allclose(steps, REFERENCE[f"{name}_steps"], rtol=1e-12)


def test_denoising_weights_as_meant_and_as_released():
    even, rising = Octave(190, tv=(0.4, 0.4)), Octave(150, tv=(0.01, 2.0))
    assert [even.tv_weight(i, legacy=True) for i in (0, 189)] == pytest.approx([0.397895, 0.795789], abs=1e-6)
    assert rising.tv_weight(149, legacy=True) == pytest.approx(1.9966, abs=1e-6)
    assert [even.tv_weight(i) for i in (0, 189)] == pytest.approx([0.4, 0.4])
    assert [rising.tv_weight(i) for i in (0, 149)] == pytest.approx([0.01, 1.986733], abs=1e-6)
    assert plain_schedule()[0].tv_weight(3) is None


def test_schedules_fit_other_sizes_and_lengths():
    octaves = mean_image_schedule(28, 0.1)
    assert [(o.iters, o.margin) for o in octaves] == [(19, 0), (15, 0), (2, 6), (1, 0)]
    assert sum(o.iters for o in plain_schedule()) == sum(o.iters for o in mean_image_schedule()) == 370
    assert sum(o.iters for o in center_biased_schedule()) == 530


# ascent


def theirs():
    first = torch.arange(12 * 768, dtype=torch.float64).pow(1.5).sin().view(12, -1) / 2000
    second = torch.arange(60, dtype=torch.float64).pow(1.5).sin().view(5, 12)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(768, 12, bias=False), nn.Tanh(), nn.Linear(12, 5, bias=False)
    ).double()
    model[1].weight.data, model[3].weight.data = first, second
    return model


def test_climbs_as_the_released_script_does(monkeypatch):
    """Caffe's images are BGR without their mean; the places of the crops are those that the script drew."""
    corners = iter(REFERENCE["corners"])

    def drawn(x, height, width, window, generator):
        free = x.shape[2] - height
        row, column = next(corners).clip(0, free).astype(int) if free else (0, 0)
        return (row + torch.arange(height)).expand(1, -1), (column + torch.arange(width)).expand(1, -1)

    monkeypatch.setattr(mfv, "_draw_crop", drawn)
    octaves = [
        Octave(5, step=(1.0, 2.0), tv=(0.4, 0.4)),
        Octave(4, 1.2, "softmax", step=(6.0, 6.0), tv=(0.01, 2.0)),
        Octave(3, 1.2, margin=3, window=0.2, step=(2.0, 3.0), tv=(0.1, 2.0)),
    ]
    mean = torch.tensor([104.0, 117.0, 123.0], dtype=torch.float64).view(3, 1, 1)
    climb = ActivationMaximizer(theirs(), None, octaves, (0, 255), lambda x: x.flip(1) - mean, legacy_schedule=True)
    found = climb(2, torch.from_numpy(REFERENCE["start"])[None])
    assert next(corners, None) is None
    expected = torch.from_numpy(REFERENCE["image"]).double().clamp(0, 255)
    torch.testing.assert_close(found.images[0], expected, atol=2e-4, rtol=0)


def test_climbs_a_linear_unit_exactly():
    w, x0 = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(0)), 255 * random(2, 1, 6, 7)
    found = ActivationMaximizer(Linear(w, -w), None, [Octave(9, step=(2.0, 2.0))], (0, 255))(0, x0)
    expected = x0.clone()
    for _ in range(9):
        expected = (expected + 2 * w / w.abs().mean()).clamp(0, 255)
    torch.testing.assert_close(found.images, expected)
    torch.testing.assert_close(found.activation, (expected * w).flatten(1).sum(1))
    assert found.trace.shape == (9, 2) and torch.all(found.trace.diff(dim=0) > 0)


@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), (-2.0, 3.0)])
def test_a_step_changes_pixels_by_its_length_on_average(pixel_range):
    low, high = pixel_range
    x0 = low + (high - low) * (0.4 + 0.2 * random(3, 1, 16, 16))
    found = ActivationMaximizer(network(), None, [Octave(1, step=(3.0, 3.0))], pixel_range)(1, x0)
    expected = torch.full((3,), 3 * (high - low) / 255)
    torch.testing.assert_close((found.images - x0).abs().flatten(1).mean(1), expected, atol=1e-6, rtol=0)


def test_margin_does_not_move():
    x0 = 0.4 + 0.2 * random(2, 1, 16, 16)
    found = ActivationMaximizer(network(), None, [Octave(5, margin=4)])(0, x0).images
    inner = found[..., 4:12, 4:12] != x0[..., 4:12, 4:12]
    assert inner.float().mean() > 0.9
    still = found.clone()
    still[..., 4:12, 4:12] = x0[..., 4:12, 4:12]
    assert torch.equal(still, x0)


def test_softmax_is_climbed_in_the_direction_of_its_gradient():
    w = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    model, x0 = Linear(*w), 0.4 + 0.2 * random(1, 1, 5, 5)
    found = ActivationMaximizer(model, None, [Octave(1, objective="softmax")])(1, x0)
    x = x0.clone().requires_grad_()
    p = model(x).softmax(1)
    (gradient,) = torch.autograd.grad(p[0, 1], x)
    by_hand = p[0, 1] * (torch.eye(3)[1] - p[0]) @ w.flatten(1)
    torch.testing.assert_close(gradient.flatten(), by_hand)
    torch.testing.assert_close(found.images - x0, gradient / gradient.abs().mean() / 255, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.trace[0], p[:, 1].logit())


def test_runs_do_not_depend_on_each_other():
    x0, units = random(3, 1, 12, 12), torch.tensor([0, 3, 4])
    climb = ActivationMaximizer(network(), None, [Octave(3, tv=(0.4, 1.0))])
    together = climb(units, x0)
    for i, u in enumerate(units.tolist()):
        torch.testing.assert_close(climb(u, x0[i : i + 1]).images[0], together.images[i], atol=1e-5, rtol=0)


def test_same_generator_same_pictures():
    model, x0 = network(3), random(2, 3, 20, 20)
    before = x0.clone()
    climb = ActivationMaximizer(model, None, mean_image_schedule(20, 0.01))
    first, again, other = (climb(0, x0, generator=torch.Generator().manual_seed(s)).images for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(x0, before)
    noise = ActivationMaximizer(model, None, [Octave(1)], input_shape=(3, 20, 20), noise=(100.0, 8.0))
    first, again = (noise(0, n=2, generator=torch.Generator().manual_seed(1)).images for _ in "ab")
    assert torch.equal(first, again)
    assert first.mean() == pytest.approx(100 / 255, abs=0.01) and first.std() == pytest.approx(8 / 255, abs=0.01)


def test_pictures_stay_in_the_range_and_grow_as_documented():
    climb = ActivationMaximizer(network(), None, [Octave(3, 1.2, step=(40.0, 40.0), tv=(1.0, 1.0))], (-1, 1))
    found = climb(0, 2 * random(2, 1, 28, 28) - 1, generator=torch.Generator().manual_seed(0)).images
    assert found.shape == (2, 1, 34, 34)
    assert found.min() >= -1 and found.max() <= 1


def test_crops_are_drawn_around_the_middle():
    x = torch.zeros(4000, 1, 34, 30)
    rows, columns = mfv._draw_crop(x, 28, 28, 0.3, torch.Generator().manual_seed(0))
    for corner, free in ((rows[:, 0], 6), (columns[:, 0], 2)):
        assert corner.min() == 0 and corner.max() == free
        expected = torch.randn(40000, generator=torch.Generator().manual_seed(1)).mul(0.3 * free).add(free / 2)
        share = torch.bincount(corner, minlength=free + 1) / 4000
        torch.testing.assert_close(share, torch.bincount(expected.clamp(0, free).long()) / 40000, atol=0.03, rtol=0)
    climb = ActivationMaximizer(Linear(torch.ones(1, 6, 6)), None, [Octave(2)], jitter=False, input_shape=(1, 6, 6))
    x0 = torch.full((1, 1, 10, 8), 0.5)
    changed = (climb(0, x0).images != x0)[0, 0]
    assert changed.sum() == 36 and changed[2:8, 1:7].all()


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_handed_back_as_it_was(fail):
    model = network().train()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    state = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    climb = ActivationMaximizer(model, "4", [Octave(2, tv=(1.0, 1.0))])
    if fail:
        with pytest.raises(ValueError, match="unit: expected 0 to 4, got 5"):
            climb(5, random(1, 1, 16, 16))
    else:
        climb(0, random(1, 1, 16, 16))
    assert all(part.training and not part._forward_hooks for part in model.modules())
    for p, (wanted, grad) in zip(model.parameters(), state, strict=True):
        assert p.requires_grad == wanted
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)


def test_a_dead_unit_leaves_the_start_and_warns():
    model, x0 = Linear(torch.zeros(1, 8, 8), torch.ones(1, 8, 8)), random(2, 1, 8, 8)
    climb = ActivationMaximizer(model, None, [Octave(3, tv=(0.1, 0.1))])
    with pytest.warns(RuntimeWarning, match="zero gradient, no step: run 0 in 3 of 3 steps"):
        found = climb(torch.tensor([0, 1]), x0)
    assert torch.equal(found.images[0], x0[0]) and found.activation[0] == 0
    assert found.activation[1] > x0[1].sum()


def test_units_of_feature_maps_at_a_position():
    model, x0 = network(), 0.4 + 0.2 * random(1, 1, 16, 16)
    climb = ActivationMaximizer(model, model[0], [Octave(1)])
    for position, (row, column) in (((0, 6), (0, 6)), (None, (4, 4))):
        found = climb(2, x0, position=position)
        moved = (found.images != x0)[0, 0].nonzero()
        assert moved.amin(0).tolist() == [max(0, 2 * row - 1), 2 * column - 1]
        assert moved.amax(0).tolist() == [2 * row + 1, 2 * column + 1]
        torch.testing.assert_close(found.activation, model[0](found.images)[:, 2, row, column])


def test_tv_none_leaves_out_denoising():
    x0 = random(1, 1, 16, 16)
    with_octave, without = [Octave(3, tv=(0.1, 0.1))], [Octave(3)]
    found = ActivationMaximizer(network(), None, with_octave, tv=None)(0, x0).images
    assert torch.equal(found, ActivationMaximizer(network(), None, without)(0, x0).images)
    assert not torch.equal(found, ActivationMaximizer(network(), None, with_octave)(0, x0).images)


def test_climbs_under_bfloat16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = ActivationMaximizer(network(), None, [Octave(5, tv=(1.0, 1.0))])(0, random(2, 1, 16, 16))
    assert found.images.dtype == torch.float32 and found.images.isfinite().all()
    assert (found.trace[-1] > found.trace[0]).all()


@pytest.mark.bare
def test_climbs_a_compiled_model():
    model, x0 = network(), random(2, 1, 16, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    octaves = [Octave(3)]
    expected = ActivationMaximizer(model, None, octaves)(0, x0).images
    torch.testing.assert_close(ActivationMaximizer(compiled, None, octaves)(0, x0).images, expected)


# facets


def two_clouds():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(200, 6)) + 20 * np.repeat([[0.0], [1.0]], 100, axis=0) * np.eye(6)[0]
    return codes, random(200, 1, 4, 4)


@pytest.mark.parametrize("embedding", ["tsne", "pca"])
def test_finds_two_clouds_and_their_mean_images(embedding):
    codes, images = two_clouds()
    found = FacetClusterer(2, embedding=embedding, random_state=0).fit(codes, images=images)
    assert len(set(found.labels_[:100])) == len(set(found.labels_[100:])) == 1
    assert found.labels_[0] != found.labels_[-1]
    assert found.silhouette_ > 0.5 and found.embedding_.shape == (200, 2 if embedding == "tsne" else 6)
    for j, nearest in enumerate(found.nearest_):
        assert (found.labels_[nearest] == j).all()
        distance = np.linalg.norm(found.embedding_ - found.centers_[j], axis=1)
        assert set(nearest) == set(np.argsort(distance)[:15])
        assert torch.equal(found.mean_images_[j], images[nearest].mean(0))


def test_same_seed_same_facets():
    codes, images = two_clouds()
    first, again = (
        FacetClusterer(4, n_nearest=5, random_state=3).fit(codes[:60], images=images[:60].numpy()) for _ in "ab"
    )
    assert (first.labels_ == again.labels_).all()
    assert np.array_equal(first.mean_images_, again.mean_images_)


def test_small_clusters_are_taken_whole_with_a_warning():
    codes = np.repeat([[0.0, 1.0], [9.0, 1.0]], [20, 4], axis=0) + np.linspace(0, 0.1, 48).reshape(24, 2)
    with pytest.warns(RuntimeWarning, match=r"fewer than n_nearest=15 images, by facet: \{\d: 4\}"):
        found = FacetClusterer(2, embedding="pca", random_state=0).fit(codes)
    assert sorted(len(nearest) for nearest in found.nearest_) == [4, 15]
    assert not hasattr(found, "mean_images_")


@pytest.mark.bare
def test_clusterer_is_a_scikit_learn_estimator():
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(FacetClusterer(3, embedding="pca", n_nearest=2))


class Corners(nn.Module):
    """Codes: mean brightness of the two halves; unit 0: the brighter half, unit 1: always 0."""

    def __init__(self):
        super().__init__()
        self.codes = nn.AdaptiveAvgPool2d((1, 2))

    def forward(self, x):
        codes = self.codes(x).flatten(1)
        return torch.stack([codes.logsumexp(1), 0 * codes[:, 0]], 1)


def half_images(n):
    x = 0.3 * random(n, 1, 8, 8)
    x[: n // 2, ..., :4] += 0.5
    x[n // 2 :, ..., 4:] += 0.5
    return x


def test_a_gallery_shows_one_picture_for_each_facet(tmp_path):
    x = half_images(60)
    gallery = multifaceted(Corners(), None, 0, x, "codes", 2, octaves=[Octave(10, tv=(1.0, 1.0))], random_state=1)
    sides = gallery.images.unflatten(3, (2, 4)).mean((1, 2, 4))
    assert (sides[:, 0] > sides[:, 1]).tolist() in ([True, False], [False, True])
    assert (gallery.activations > gallery.start_activations).all()
    for start, nearest in zip(gallery.starts, gallery.exemplars, strict=True):
        assert torch.equal(start, x[nearest].mean(0))
    torch.testing.assert_close(gallery.start_activations, Corners()(gallery.starts)[:, 0])
    assert gallery.table()["images"].tolist() == [30, 30]
    path = gallery.save(tmp_path / "unit0")
    assert path.exists() and path.with_suffix(".csv").exists()
    assert len(gallery.plot().axes) == 4


def test_same_seed_same_gallery_by_the_released_schedule(monkeypatch):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), half_images(20)
    monkeypatch.setattr(mfv, "mean_image_schedule", lambda size: mean_image_schedule(size, 0.01))
    first, again, other = (
        multifaceted(
            model, None, 1, x, "0", clusterer=FacetClusterer(2, 50, "pca", 5, random_state=0), random_state=seed
        ).images
        for seed in (0, 0, 1)
    )
    assert first.shape == (2, 1, 10, 10)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_top_images_are_the_strongest_first():
    model, x = network(), random(50, 1, 16, 16)
    expected = model(x)[:, 2].topk(7).indices
    assert torch.equal(top_images(model, None, 2, x, 7, batch_size=8), expected)
    pairs = torch.utils.data.TensorDataset(x, torch.zeros(50))
    assert torch.equal(top_images(model, "4", 2, pairs, 7), expected)
    maps = model[0](x)[:, 1]
    assert torch.equal(top_images(model, "0", 1, x, 5), maps.flatten(1).amax(1).topk(5).indices)
    assert torch.equal(top_images(model, "0", 1, x, 5, position=(3, 2)), maps[:, 3, 2].topk(5).indices)
    assert torch.equal(top_images(model, None, 2, x * 255, 7, normalize=lambda x: x / 255), expected)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Octave(5, objective="prob"), "objective: expected logit or softmax, got 'prob'"),
        (lambda: Octave(0), "iters, margin: expected at least 1 and 0, got 0 and 0"),
        (lambda: Octave(5, scale=0.0), "scale, window: expected positive numbers, got 0.0 and 0.3"),
        (lambda: Octave(5, tv=(0.0, 1.0)), "step, tv: expected pairs of positive numbers"),
        (lambda: ActivationMaximizer(network(), pixel_range=(1, 0)), "pixel_range: expected a low and a high end"),
        (lambda: ActivationMaximizer(network(), tv="chambolle"), "tv: expected bregman or None, got 'chambolle'"),
        (lambda: ActivationMaximizer(network(), octaves=[]), "octaves: expected at least one"),
        (lambda: ActivationMaximizer(network())(0), "x0: without it, input_shape and n >= 1 are needed, got None"),
        (lambda: ActivationMaximizer(network())(0, torch.rand(1, 9, 9)), r"x0: expected shape \(N, C, H, W\), got"),
        (
            lambda: ActivationMaximizer(network(), octaves=[Octave(1, 0.5)])(0, torch.rand(1, 1, 16, 16)),
            r"octaves\[0\]: its canvas \(8, 8\) is smaller than the input \(16, 16\)",
        ),
        (
            lambda: ActivationMaximizer(network(), octaves=[Octave(1, margin=8)])(0, torch.rand(1, 1, 16, 16)),
            r"octaves\[0\].margin: expected less than half of the input \(16, 16\), got 8",
        ),
        (
            lambda: ActivationMaximizer(network(), "0", [Octave(1)])(0, torch.rand(1, 1, 16, 16), position=(8, 0)),
            r"position: expected a place in maps of 8 x 8, got \(8, 0\)",
        ),
        (
            lambda: ActivationMaximizer(network(), None, [Octave(1)])(0, torch.rand(1, 1, 16, 16), position=(1, 1)),
            r"layer: expected output \(N, U\), or \(N, U, h, w\) for a position, got shape \(1, 5\)",
        ),
        (
            lambda: ActivationMaximizer(network(), None, [Octave(1)])(torch.tensor([0, 1]), torch.rand(3, 1, 16, 16)),
            r"unit: expected an integer or 3, one for each run, got \(2,\)",
        ),
        (lambda: top_images(network(), None, 5, torch.rand(3, 1, 16, 16), 2), "unit: expected 0 to 4, got 5"),
        (lambda: top_images(network(), None, 0, torch.rand(3, 1, 16, 16), 4), "n: expected 1 to 3, the number of"),
        (lambda: FacetClusterer(4).fit(np.eye(3)), "n_facets: expected at most 3, the number of images, got 4"),
        (lambda: FacetClusterer(2, embedding="umap").fit(np.eye(3)), "embedding: expected tsne or pca, got 'umap'"),
        (lambda: FacetClusterer(2, n_nearest=0).fit(np.eye(3)), "n_nearest: expected at least 1, got 0"),
        (lambda: FacetClusterer(2).fit(np.eye(3), images=np.ones((2, 1, 1, 1))), "images: expected 3, as many as"),
        (lambda: total_variation_bregman(torch.rand(1, 1, 1, 5), 1.0), r"x: expected images \(N, C, H, W\) of at"),
        (lambda: total_variation_bregman(torch.rand(1, 1, 5, 5), 0.0), "weight, max_iter: expected a positive number"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_refuses_a_layer_that_is_not_used():
    model = network()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:5], x)
    with pytest.raises(TypeError, match="layer: expected one that is used and has a tensor for output, got 'spare'"):
        ActivationMaximizer(model, "spare", [Octave(1)])(0, random(1, 1, 16, 16))


@pytest.mark.bare
def test_refuses_what_is_not_finite():
    model, x0 = Linear(torch.full((1, 4, 4), float("inf"))), random(1, 1, 4, 4)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        ActivationMaximizer(model, None, [Octave(1)])(0, x0)
