import ast
import copy
import importlib.util
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

import classact
from classact.data.bag_files import DataError
from classact.data.defects import BASE, NOVEL, OTHER, anomaly_maps, textured_products
from classact.data.inspection import open_inspection, open_product, read_defects, read_maps
from classact.discover import anomalyncd
from classact.discover.anomalyncd import (
    AnomalyNCD,
    AnomalyNCDLoss,
    CorrectedSelfDistillation,
    CropViews,
    MaskGuidedViT,
    MeanEntropyMax,
    MEBin,
    NCDHeads,
    NCDOutput,
    PatchMemory,
    RegionMerger,
    anomaly_crops,
    contrastive_loss,
    estimate_n_novel,
    fit_anomalyncd,
    rectangle_gap,
    region_counts,
    stable_interval,
    stack_crops,
    teacher_temperature,
)
from classact.discover.anomalyncd.augment import adjust, gaussian_blur

HERE = Path(__file__).parent / "data"
SIZE = 28


@pytest.fixture(scope="module")
def reference():
    return np.load(HERE / "anomalyncd_reference.npz")


@pytest.fixture(scope="module")
def made():
    """The inputs that the authors' code was given."""
    spec = importlib.util.spec_from_file_location("make_reference", HERE / "make_anomalyncd_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_vit(depth=3, size=SIZE, patch=4, seed=0, **options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=24, depth=depth, num_heads=3, num_classes=0, **options
    ).eval()


def small(n_base=0, n_novel=3, **options):
    return AnomalyNCD(tiny_vit(), n_base, n_novel, **{"hidden": 16, "projection": 8, "erode": 2, **options}).eval()


def gauss(x, y, s):
    at = np.arange(128)
    return np.exp(-((at - x) ** 2 + (at[:, None] - y) ** 2) / 2 / s**2)


def two_maps(second=150):
    a = 220 * gauss(40, 40, 8) + second * gauss(90, 80, 6) + 20
    return np.stack([a, 60 * gauss(64, 64, 10) + 20]).clip(0, 255).astype(np.uint8)


# binarisation


def by_definition(mebin, one):
    """Erode and label the mask of every threshold, one after the other."""
    scaled, counts = mebin.scale([one])[0], []
    for t in range(255, 0, -mebin.step):
        mask = (scaled > t).astype(np.uint8)
        if mebin.erode > 1:
            mask = ndimage.minimum_filter(mask, size=mebin.erode, mode="constant", cval=1)
        counts.append(ndimage.label(mask, np.ones((3, 3)))[1])
    return counts


def test_mebin_on_the_bumps_of_two_products():
    maps = two_maps()
    mebin = MEBin().fit(maps)
    assert (mebin.min_, mebin.max_) == (80, 240)
    counts = region_counts(mebin.scale([mebin._erode(maps[0])])[0], mebin.scores)
    assert (counts == 1).sum() == 30 and (counts[12:42] == 1).all() and (counts == 2).sum() == 22
    found = mebin.binarize(maps)
    assert found.n_regions.tolist() == [1, 0] and found.thresholds.tolist() == [137, 255]
    assert found.masks[0].sum() == 96 and not found.masks[1].any()
    rows, columns = np.nonzero(found.masks[0])
    assert (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (35, 35, 12, 12)
    higher = MEBin().fit(two_maps(200)).binarize(two_maps(200))
    assert (higher.n_regions[0], higher.thresholds[0], higher.masks[0].sum()) == (2, 81, 388)


@pytest.mark.parametrize("options", [{}, {"step": 7, "erode": 3, "min_interval": 2}, {"erode": 0}])
def test_counts_are_those_of_labelling_every_threshold(options, made):
    maps = made.maps()[1:4]
    for kind in (maps, [one / 255 for one in maps]):
        mebin = MEBin(**options).fit(kind)
        for one in kind:
            counts = region_counts(mebin._scale(mebin._erode(one)), mebin.scores)
            assert counts.tolist() == by_definition(mebin, one)
            number, index = stable_interval(counts, mebin.min_interval)
            result = mebin.binarize([one])
            assert result.n_regions[0] == number
            if index is not None:
                threshold = (255 - mebin.step * index) / 255 * (mebin.max_ - mebin.min_) + mebin.min_
                mask = ndimage.minimum_filter(one > threshold, size=max(mebin.erode, 1), mode="constant", cval=1)
                assert np.array_equal(result.masks[0], mask)


@pytest.mark.parametrize("noise", [0, 3, 300])
def test_counts_of_plateaus_and_of_noise(noise):
    rng = np.random.default_rng(noise)
    for shape in ((1, 1), (1, 9), (7, 3), (40, 33)):
        grey = rng.integers(0, noise + 1, shape)
        thresholds = np.arange(noise + 1, -2, -1)
        expected = [ndimage.label(grey > t, np.ones((3, 3)))[1] for t in thresholds]
        assert region_counts(grey, thresholds).tolist() == expected


def test_mebin_agrees_with_the_authors_code(reference, made):
    maps = made.maps()
    mebin = MEBin().fit(maps)
    assert [mebin.min_, mebin.max_] == reference["range"].tolist()
    for one, sequence in zip(maps, reference["sequences"], strict=True):
        assert region_counts(mebin._scale(mebin._erode(one)), mebin.scores).tolist() == sequence.tolist()
    found = mebin.binarize(maps)
    assert found.n_regions.tolist() == reference["numbers"].tolist()
    assert found.thresholds.tolist() == reference["thresholds"].tolist()
    for i, mask in enumerate(found.masks):
        assert np.array_equal(np.packbits(mask), reference[f"mask_{i}"])
    assert len(set(found.n_regions.tolist())) > 3


@pytest.mark.parametrize(
    ("counts", "threshold", "number"),
    [
        ([0, 0, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 1, 3], 199, 1),
        ([1, 2, 3, 1, 2, 3], None, 0),
        ([0] * 10 + [2] * 5 + [1] * 4, 199, 2),
    ],
)
def test_stable_interval(counts, threshold, number):
    found, index = stable_interval(counts, 4)
    assert (found, None if index is None else 255 - 4 * index) == (number, threshold)


def test_erosion_of_even_size_and_at_the_border():
    mebin, square = MEBin(), np.zeros((64, 64), np.uint8)
    square[20:40, 20:40] = 1
    assert mebin._erode(square).sum() == 225
    corner = np.zeros((64, 64), np.uint8)
    corner[:20, :20] = 1
    assert mebin._erode(corner).sum() == 324


def test_binarisation_ignores_the_scale_of_floating_maps(made):
    maps = made.maps()
    integers = MEBin().fit(maps).binarize(maps)
    other = [1e-3 * one.astype(float) - 4 for one in maps]
    floats = MEBin().fit(other).binarize(other)
    assert floats.n_regions.tolist() == integers.n_regions.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(floats.masks, integers.masks, strict=True))


def test_transform_answers_in_kind():
    maps = two_maps()
    mebin = MEBin().fit(maps)
    assert mebin.transform(maps).shape == mebin.transform(torch.from_numpy(maps)).shape == (2, 128, 128)
    assert isinstance(mebin.transform([maps[0], maps[1][:50]]), list)
    assert np.array_equal(MEBin().fit_transform(maps), mebin.transform(maps))


def test_maps_scaled_one_by_one_warn_and_give_empty_masks():
    maps = two_maps().astype(float)
    maps /= maps.max((1, 2), keepdims=True)
    with pytest.warns(RuntimeWarning, match="was each map scaled by itself"):
        mebin = MEBin().fit(maps)
    assert not mebin.transform(maps).any()


# crops


def test_gaps_of_rectangles():
    a = np.array([[0.0, 0, 10, 10]])
    b = np.array([[20.0, 0, 30, 10], [13, 14, 23, 24], [5, 5, 15, 15], [10, 0, 20, 10]])
    assert rectangle_gap(a, b).tolist() == [[10, 5, -1, 0]]


def test_crops_agree_with_the_authors_code(reference, made):
    for i, mask in enumerate(made.masks()):
        image = torch.zeros(3, *mask.shape)
        crops = anomaly_crops(image, torch.from_numpy(mask > 0), max_regions=3)  # two regions: the code keeps three
        assert [list(crop.box) for crop in crops] == reference[f"boxes_{i}"].tolist()
        assert [int(crop.mask.sum()) for crop in crops] == reference[f"areas_{i}"].tolist()


def test_crops_hold_what_is_in_the_box():
    image, mask, scores = torch.rand(3, 100, 120), torch.zeros(100, 120, dtype=torch.bool), torch.zeros(100, 120)
    mask[10:20, 30:54] = mask[70:75, 100:105] = True
    scores[15, 40], scores[72, 102] = 0.9, 0.3
    one, other = anomaly_crops(image, mask, scores)
    left, top, right, bottom = one.box
    assert torch.equal(one.image, image[:, top:bottom, left:right]) and right - left == bottom - top == 26
    assert (one.score, other.score) == pytest.approx((0.9, 0.3))
    assert int(one.mask.sum()) == 240 and other.box == (90, 60, 114, 84)
    assert len(anomaly_crops(image, mask, scores, max_regions=1)) == 1


def test_an_image_without_regions_is_one_crop():
    (crop,) = anomaly_crops(torch.rand(3, 40, 60), torch.zeros(40, 60, dtype=torch.bool))
    assert crop.box == (0, 0, 60, 40) and crop.score == 0 and not crop.mask.any()
    stacked = stack_crops([[crop]], 32)
    assert stacked.images.shape == (1, 3, 32, 32) and stacked.areas.tolist() == [0]


def test_resized_crops_keep_image_and_mask_together():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[20:40, 20:40] = True
    stacked = stack_crops([anomaly_crops(mask.float().expand(3, 64, 64), mask)], 44)
    assert torch.equal(stacked.images[:, :1], stacked.masks) and stacked.areas.tolist() == [400]


# network


def test_full_mask_is_the_plain_transformer():
    vit, x = tiny_vit(), torch.randn(2, 3, SIZE, SIZE)
    guided = MaskGuidedViT(vit, n_blocks=2)
    torch.testing.assert_close(guided(x, torch.ones(2, 1, SIZE, SIZE)), vit(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(MaskGuidedViT(vit, 0)(x, torch.zeros(2, 1, SIZE, SIZE)), vit(x), atol=1e-5, rtol=0)


def test_backbone_agrees_with_the_authors_code(reference, made):
    vit = tiny_vit(size=24, patch=6)
    vit.load_state_dict(made.weights({name: tuple(p.shape) for name, p in vit.state_dict().items()}))
    x, mask, *_ = made.batch()
    found = MaskGuidedViT(vit, n_blocks=2)(x, mask)
    torch.testing.assert_close(found, torch.from_numpy(reference["embedding"]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("depth", "invariant"), [(1, True), (3, False)])
def test_what_is_outside_the_mask_counts_in_deep_transformers_only(depth, invariant):
    guided = MaskGuidedViT(tiny_vit(depth), n_blocks=depth)
    x, mask = torch.randn(1, 3, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    mask[..., :12, :16] = 1
    other = torch.where(mask > 0, x, torch.randn_like(x))
    assert torch.equal(guided(x, mask), guided(other, mask)) == invariant
    inside = torch.where(mask > 0, torch.randn_like(x), x)
    assert not torch.allclose(guided(x, mask), guided(inside, mask))


def test_threshold_of_a_patch():
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., :4, :2] = mask[..., 8, 8] = 1
    half = MaskGuidedViT(tiny_vit(), 1).attended(mask)
    anything = MaskGuidedViT(tiny_vit(), 1, threshold=0).attended(mask)
    assert half.nonzero()[:, 1].tolist() == [0, 1]
    assert anything.nonzero()[:, 1].tolist() == [0, 1, 1 + 2 * 7 + 2]


def test_register_tokens_are_attended():
    vit = tiny_vit(reg_tokens=2)
    guided, x = MaskGuidedViT(vit, n_blocks=3), torch.randn(2, 3, SIZE, SIZE)
    assert guided.attended(torch.zeros(2, 1, SIZE, SIZE)).sum(1).tolist() == [3, 3]
    torch.testing.assert_close(guided(x, torch.ones(2, 1, SIZE, SIZE)), vit(x), atol=1e-5, rtol=0)


def test_backbone_is_copied_and_only_the_last_blocks_are_trained():
    vit = tiny_vit()
    before = copy.deepcopy(vit.state_dict())
    model = AnomalyNCD(vit, 1, 2, hidden=8, trainable_blocks=1)
    assert all(p.requires_grad for p in vit.parameters())
    assert {n.split(".")[2] for n, p in model.backbone.named_parameters() if p.requires_grad} == {"2"}
    model.heads.weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_heads_are_cosines():
    heads = NCDHeads(6, 5, heads=2, hidden=8, projection=4)
    with torch.no_grad():
        heads.weight.mul_(7)
    out = heads(torch.randn(9, 6) * 3)
    z, w = (nn.functional.normalize(v, dim=-1) for v in (out.embedding, heads.weight))
    torch.testing.assert_close(out.logits[:, 1], z @ w[1].T)
    assert out.projection.shape == (9, 4) and out.logits.abs().max() <= 1 + 1e-6


# losses


def test_temperatures_of_the_teacher():
    found = [teacher_temperature(epoch) for epoch in (0, 3, 4, 20, 39, 40, 49)]
    assert found == pytest.approx([0.07, 0.07, 0.066667, 0.053333, 0.04, 0.04, 0.04], abs=1e-6)


def test_corrected_targets():
    loss, scores = CorrectedSelfDistillation(2, 3), torch.tensor([0.1, 0.3, 0.5, 0.9])
    teacher = torch.rand(8, 5) / 5
    q = loss.targets(teacher, scores, 0)
    torch.testing.assert_close(q.sum(1), torch.ones(8))
    assert not q[:, :2].any()
    plain = CorrectedSelfDistillation(2, 3, normal_below=0).targets(teacher, scores, 0)
    omega = (q - plain)[:, 2] / (1 - plain[:, 2])
    torch.testing.assert_close(omega, torch.tensor([0.4, 0.2, 0, 0]).repeat(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        plain[:, 2:], (teacher / 0.07).softmax(1)[:, 2:] / (teacher / 0.07).softmax(1)[:, 2:].sum(1, keepdim=True)
    )


def test_losses_agree_with_the_authors_code(reference, made):
    _, _, logits, scores, z, label = made.batch()
    distill = CorrectedSelfDistillation(3, 4)
    found = [distill(logits, logits, scores, epoch).item() for epoch in (0, 20, 45)]
    assert found == pytest.approx(reference["distill"].tolist(), rel=1e-5)
    assert MeanEntropyMax()(logits).item() == pytest.approx(reference["entropy"].item(), rel=1e-4)
    crops = torch.arange(6).repeat(2)
    assert contrastive_loss(z, crops, 1.0).item() == pytest.approx(reference["info_nce"].item(), rel=1e-5)
    assert contrastive_loss(z, label.repeat(2), 0.07).item() == pytest.approx(reference["supcon"].item(), rel=1e-5)


def test_contrastive_loss_agrees_with_pytorch_metric_learning():
    from pytorch_metric_learning.losses import SupConLoss

    z, label = torch.randn(20, 6), torch.randint(4, (20,))
    torch.testing.assert_close(contrastive_loss(z, label, 0.1), SupConLoss(0.1)(z, label), atol=1e-5, rtol=1e-5)
    member = torch.rand(20) < 0.7
    expected = SupConLoss(0.1)(z[member], label[member])
    torch.testing.assert_close(contrastive_loss(z, label, 0.1, member), expected, atol=1e-5, rtol=1e-5)


def test_no_gradient_through_the_teacher():
    student, teacher = (torch.randn(6, 2, 5, requires_grad=True) for _ in "st")
    CorrectedSelfDistillation(2, 3)(student, teacher, torch.rand(3), 7).sum().backward()
    assert student.grad.any() and teacher.grad is None


def test_entropy_term_is_zero_for_uniform_and_largest_for_one_class():
    loss = MeanEntropyMax()
    assert loss(torch.zeros(4, 6)).item() == pytest.approx(0, abs=1e-6)
    assert loss(torch.eye(6)).item() == pytest.approx(0, abs=1e-6)
    one = torch.full((4, 6), -100.0)
    one[:, 2] = 100
    assert loss(one).item() == pytest.approx(math.log(6), abs=1e-5)


def output(n=6, heads=2, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.rand(2 * n, heads, classes, generator=g) * 2 - 1
    return NCDOutput(torch.randn(2 * n, 7, generator=g), torch.randn(2 * n, 4, generator=g), logits)


def test_objective_is_the_weighted_sum_of_its_terms_on_their_crops():
    out, label, scores = output(), torch.tensor([-1, 0, 1, -1, -1, 1]), torch.rand(6)
    terms = AnomalyNCDLoss(2, 3)(out, label, scores, 5)
    novel = label < 0
    rows = novel.repeat(2)
    for head in range(2):
        logits = out.logits[rows, head]
        distill = CorrectedSelfDistillation(2, 3)(logits, logits, scores[novel], 5)
        torch.testing.assert_close(terms.cluster[head], distill + 4 * MeanEntropyMax()(logits))
    known = out.logits[~rows].flatten(0, 1) / 0.1
    expected = nn.functional.cross_entropy(known, label[~novel].repeat(2).repeat_interleave(2))
    torch.testing.assert_close(terms.classification, expected)
    total = 0.7 * (terms.cluster.mean() + terms.info_nce) + 0.3 * (terms.classification + terms.supcon)
    torch.testing.assert_close(terms.total, total)


def test_objective_without_base_or_without_new_crops():
    out, scores = output(), torch.rand(6)
    unlabelled = AnomalyNCDLoss(0, 5)(out, torch.full((6,), -1), scores, 0)
    assert unlabelled.classification == unlabelled.supcon == 0
    labelled = AnomalyNCDLoss(2, 3)(out, torch.tensor([0, 1, 0, 1, 1, 0]), scores, 0)
    assert not labelled.cluster.any()
    assert unlabelled.total.isfinite() and labelled.total.isfinite()


@pytest.mark.bare
def test_network_and_objective_compile_and_export():
    model = AnomalyNCD(tiny_vit(depth=1), 2, 3, n_blocks=1, heads=2, hidden=4, projection=4)
    x, mask = torch.rand(6, 3, SIZE, SIZE), torch.ones(6, 1, SIZE, SIZE)
    label, scores = torch.tensor([0, -1, -1]), torch.rand(3)
    loss = AnomalyNCDLoss(2, 3)
    step = torch.compile(lambda: loss(model(x, mask), label, scores, 3).total, backend="aot_eager", fullgraph=True)
    total = step()
    torch.testing.assert_close(total, loss(model(x, mask), label, scores, 3).total)
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    exported = torch.export.export(model.backbone, (x, mask)).module()
    torch.testing.assert_close(exported(x, mask), model.backbone(x, mask))


def test_bfloat16_autocast():
    model, x = small(n_base=2), torch.rand(6, 3, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, (torch.rand(6, 1, SIZE, SIZE) > 0.3).float())
        terms = AnomalyNCDLoss(2, 3)(out, torch.tensor([0, -1, -1]), torch.rand(3), 0)
    assert out.logits.dtype == torch.bfloat16 and terms.total.dtype == torch.float32
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# views


def test_colours_and_blur_agree_with_torchvision():
    from torchvision.transforms.v2 import functional as tv

    x = torch.rand(2, 3, 20, 20)
    factor = torch.tensor([0.4, 1.7]).view(2, 1, 1, 1)
    theirs = {"contrast": tv.adjust_contrast, "saturation": tv.adjust_saturation, "sharpness": tv.adjust_sharpness}
    for kind, peer in theirs.items():
        expected = torch.stack([peer(one, float(f)) for one, f in zip(x, factor, strict=True)])
        torch.testing.assert_close(adjust(x, factor, kind), expected, atol=1e-4, rtol=0)
    blurred = gaussian_blur(x, torch.tensor([0.5, 2.0]), torch.tensor([9, 13]))
    for one, side, sigma, found in zip(x, (9, 13), (0.5, 2.0), blurred, strict=True):
        torch.testing.assert_close(found, tv.gaussian_blur(one, [side, side], [sigma, sigma]), atol=1e-5, rtol=0)


def test_views_move_image_and_mask_together():
    pixels = torch.randint(256, (16, 1, 32, 32), dtype=torch.uint8)
    plain = dict.fromkeys(("brightness", "contrast", "saturation", "sharpness"), (1.0, 1.0))
    views = CropViews(SIZE, **plain, blur=(1e-3, 1e-3), bits=(8, 8))
    x, mask = views.random(pixels.expand(-1, 3, -1, -1), pixels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x[:, :1], mask, atol=1e-2, rtol=0)
    middle, _ = views.central(pixels.expand(-1, 3, -1, -1), pixels)
    torch.testing.assert_close(middle[:, :1] * 255, pixels[..., 2:30, 2:30].float())
    assert not torch.allclose(x, middle)


def test_views_are_drawn_for_every_crop():
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).repeat(24, 1, 1, 1)
    draws = [CropViews(SIZE).random(pixels, pixels[:, :1], torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len(draws[0].flatten(1).unique(dim=0)) == 24
    assert draws[0].min() >= 0 and draws[0].max() <= 1


# merging


def test_merging_two_regions():
    areas = torch.tensor([900.0, 100.0])
    for tau, expected in ((100, [0.549834, 0.450166]), (50, [0.598688, 0.401312])):
        found = RegionMerger(tau)(torch.eye(2), areas, torch.tensor([0, 0]))
        torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-5, rtol=0)
    p = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8]])
    merged = RegionMerger()(p, areas, torch.tensor([0, 0]))
    torch.testing.assert_close(merged[0], torch.tensor([0.352409, 0.232475, 0.415116]), atol=1e-5, rtol=0)


def test_merging_images_is_merging_each():
    p, areas, image = torch.rand(9, 4).softmax(1), torch.rand(9) * 1e7, torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 3])
    merged = RegionMerger(5.0)(p, areas, image)
    for i in range(4):
        alone = RegionMerger(5.0)(
            p[image == i], areas[image == i], torch.zeros(int((image == i).sum()), dtype=torch.long)
        )
        torch.testing.assert_close(merged[i], alone[0])
    torch.testing.assert_close(merged[3], p[8])  # a single region: the identity
    torch.testing.assert_close(merged.sum(1), torch.ones(4))


# end to end


@pytest.fixture(scope="module")
def products():
    made = textured_products(3, 3, seed=0)
    base = textured_products(2, 0, seed=0, kind="base")
    images, maps = torch.from_numpy(made.images), torch.from_numpy(anomaly_maps(made, seed=0))
    return images, maps, (torch.from_numpy(base.images), torch.from_numpy(base.masks), base.y)


FAST = {"epochs": 1, "lr": 0.02, "model_options": {"hidden": 16, "projection": 8, "erode": 2, "tau": 7.0}}


@pytest.fixture(scope="module")
def fitted(products):
    images, maps, base = products
    return fit_anomalyncd(images, maps, n_novel=5, base=base, vit=tiny_vit(), **FAST)


def test_predictions_do_not_depend_on_the_other_images(fitted, products):
    images, maps, _ = products
    together = fitted.predict(images, maps)
    for i in (0, 7, 13):
        alone = fitted.predict(images[i : i + 1], maps[i : i + 1], batch_size=1)
        torch.testing.assert_close(alone.probabilities[0], together.probabilities[i], atol=1e-5, rtol=0)
        mine = together.regions.image_id == i
        assert torch.equal(alone.regions.boxes, together.regions.boxes[mine])
        assert torch.equal(alone.regions.images, together.regions.images[mine])
    mirrored = fitted.predict(images.flip(0), maps.flip(0), batch_size=5)
    torch.testing.assert_close(mirrored.probabilities.flip(0), together.probabilities, atol=1e-5, rtol=0)


def test_predictions_have_names(fitted, products):
    images, maps, _ = products
    found = fitted.predict(images, maps)
    assert found.classes == ["normal", "type 1", "type 2", "type 3", "type 4"]
    assert set(found.labels) <= set(found.classes)
    assert len(found.region_labels) == len(found.regions.images) == len(found.region_probabilities)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(15))
    assert set(fitted.predict(images, maps, unsure_below=1.0).labels) == {"unsure"}


def test_same_seed_same_model_and_the_global_random_state_stays(products):
    images, maps, base = products
    vit, models = tiny_vit(), []
    for seed in (1, 1, 2):
        models.append(fit_anomalyncd(images, maps, n_novel=5, base=base, vit=vit, seed=seed, **FAST))
        torch.rand(1)  # what others draw in between does not matter
        np.random.rand(1)
    one, same, other = models
    for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.heads.weight, other.heads.weight)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    fit_anomalyncd(images, maps, n_novel=5, vit=vit, seed=3, **FAST)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_round_trip_through_safetensors(fitted, products, tmp_path):
    images, maps, _ = products
    path = classact.save(fitted, tmp_path / "m")
    shell = AnomalyNCD(tiny_vit(seed=5), **{key: value for key, value in fitted.config.items() if key != "vit"})
    loaded = classact.load(path, shell)
    assert torch.equal(loaded.map_range, fitted.map_range) and loaded.best_head == fitted.best_head
    assert torch.equal(loaded.predict(images, maps).probabilities, fitted.predict(images, maps).probabilities)


def test_arguments_of_timm_in_place_of_a_network(tmp_path):
    vit = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
    model = AnomalyNCD({**vit, "pretrained": False}, 0, 2, hidden=8)
    again = AnomalyNCD(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x, mask = torch.rand(2, 3, 32, 32), torch.ones(2, 1, 32, 32)
    assert torch.equal(again.eval()(x, mask).logits, model.eval()(x, mask).logits)


def test_training_leaves_the_backbone_as_it_was(products):
    images, maps, _ = products
    vit = tiny_vit().train()
    before = copy.deepcopy(vit.state_dict())
    model = fit_anomalyncd(images, maps, n_novel=3, vit=vit, **FAST)
    assert vit.training and all(p.requires_grad and p.grad is None for p in vit.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert not model.training
    with pytest.raises(ValueError, match="maps: expected one for each of 15 images, got 3"):
        model.predict(images, maps[:3])
    assert not model.training


def test_number_of_classes_may_be_estimated(products):
    g = torch.Generator().manual_seed(0)
    centres = torch.eye(12)[:4] * 5
    z = (centres[:, None] + 0.3 * torch.randn(4, 25, 12, generator=g)).flatten(0, 1)
    assert estimate_n_novel(z) == 4
    images, maps, _ = products
    model = fit_anomalyncd(images, maps, n_novel="estimate", vit=tiny_vit(), **FAST)
    assert model.n_novel >= 3 and len(model.classes) == model.n_novel


def test_crops_of_the_code_are_one_more(products):
    images, maps, _ = products
    exact, code = (small(max_regions=kind) for kind in ("exact", "code"))
    for model in (exact, code):
        model.map_range.copy_(torch.tensor([40.0, 255.0]))
    numbers = MEBin(erode=2).fit(maps)
    numbers.min_, numbers.max_ = 40.0, 255.0
    allowed = numbers.binarize(maps).n_regions.clip(min=1)
    per_image = [model.crops(images, maps).image_id.bincount().numpy() for model in (exact, code)]
    assert (per_image[0] <= allowed).all() and (per_image[1] <= allowed + 1).all()
    assert (per_image[0] <= per_image[1]).all()


@pytest.mark.bare
def test_lightning_module_trains_and_chooses_a_head(products, tmp_path):
    from classact.discover.anomalyncd.lit import AnomalyNCDModule, crop_loader
    from classact.training import fit

    images, maps, _ = products
    model = small(n_novel=5)
    mebin = MEBin(erode=2).fit(maps)
    model.map_range.copy_(torch.tensor([mebin.min_, mebin.max_]))
    before = model.heads.weight.detach().clone()
    novel = model.crops(images[:6], maps[:6])
    history = fit(AnomalyNCDModule(model, lr=0.01), crop_loader(novel), epochs=2, seed=0)
    assert len(history.curves["train_loss"]) == 2 and not torch.equal(model.heads.weight, before)


def test_only_the_lightning_module_imports_lightning_and_nothing_imports_extras_at_once():
    found = {}
    for file in Path(anomalyncd.__file__).parent.glob("*.py"):
        nodes = ast.parse(file.read_text()).body
        nodes += [inner for node in nodes if isinstance(node, ast.Try) for inner in node.body]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        found[file.name] = {name.split(".")[0] for name in names}
    extras = {"lightning", "timm", "torchvision", "PIL", "matplotlib"}
    assert {name: modules & extras for name, modules in found.items() if modules & extras} == {"lit.py": {"lightning"}}
    assert "classact.discover.anomalyncd.lit" not in (Path(anomalyncd.__file__).read_text())


# the layout


def save(image, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(image)
    Image.fromarray((array.transpose(1, 2, 0) * 255).round().astype(np.uint8) if array.ndim == 3 else array).save(file)


@pytest.fixture
def layout(tmp_path):
    novel, base = textured_products(2, 2, seed=1), textured_products(2, 0, seed=1, kind="base")
    good = textured_products(0, 6, seed=1, part=1)
    for i, image in enumerate(novel.images):
        save(image, tmp_path / "unlabelled" / f"p.{i}.png")
    for i, image in enumerate(good.images):
        save(image, tmp_path / "good" / f"{i}.png")
    for i, (image, mask, y) in enumerate(zip(base.images, base.masks, base.y, strict=True)):
        save(image, tmp_path / "base" / base.classes[y] / f"{i}.png")
        save(mask.astype(np.uint8) * 255, tmp_path / "masks" / base.classes[y] / f"{i}_mask.png")
    return tmp_path, novel


def write_maps(folder, maps, kind):
    (folder / "maps").mkdir()
    for i, one in enumerate(maps):
        file = folder / "maps" / f"p.{i}"
        if kind == "npy":
            np.save(f"{file}.npy", one.astype(np.float32))
        elif kind == "npz":
            np.savez(f"{file}.npz", map=one[None].astype(np.float64))
        elif kind == "tiff":
            Image.fromarray(one.astype(np.float32)).save(f"{file}.tiff")
        elif kind == "png16":
            Image.fromarray(one.astype(np.uint16) * 257).save(f"{file}.png")
        elif kind == "grey rgb":
            Image.fromarray(one).convert("RGB").save(f"{file}.png")
        else:
            Image.fromarray(one).save(f"{file}.png")


@pytest.mark.parametrize("kind", ["png", "npy", "npz", "tiff", "png16", "grey rgb"])
def test_maps_of_every_kind_are_read_and_mean_the_same(layout, kind):
    folder, novel = layout
    maps = anomaly_maps(novel, seed=1)
    write_maps(folder, maps, kind)
    found = open_inspection(folder)
    order = [int(name.removeprefix("p.")) for name in found.names]
    scale = 257 if kind == "png16" else 1
    assert all(np.array_equal(one, maps[i].astype(float) * scale) for one, i in zip(found.maps, order, strict=True))
    assert np.array_equal(np.stack(MEBin().fit_transform(found.maps)), MEBin().fit_transform(maps[order]))
    assert (found.images[0] * 255).round().equal((torch.from_numpy(novel.images[order[0]]) * 255).round())
    assert len(found.good) == 6 and set(found.base.labels) == set(BASE)


def test_a_folder_with_good_images_only_is_sorted_end_to_end(layout):
    folder, _ = layout
    data = open_inspection(folder)
    assert data.maps is None
    model = fit_anomalyncd(**data.arguments(), n_novel=3, vit=tiny_vit(), tiles=2, **FAST)
    assert isinstance(model.detector, PatchMemory) and model.n_base == 4
    found = model.predict(data.images)
    assert len(found.labels) == len(data.images)
    without = fit_anomalyncd(data.images, good=data.good, n_novel=3, vit=tiny_vit(), **FAST)
    assert without.n_base == 0
    alone = model.predict(data.images[3:4])
    torch.testing.assert_close(alone.probabilities[0], found.probabilities[3], atol=1e-5, rtol=0)


def test_a_model_with_its_detector_round_trips(layout, tmp_path):
    data = open_inspection(layout[0])
    model = fit_anomalyncd(data.images, good=data.good, n_novel=3, vit=tiny_vit(), **FAST)
    path = classact.save(model, tmp_path / "m")
    settings = {key: value for key, value in model.config.items() if key not in ("vit", "detector")}
    detector = PatchMemory(tiny_vit(seed=3), **{k: v for k, v in model.detector.config.items() if k != "vit"})
    loaded = classact.load(path, AnomalyNCD(tiny_vit(seed=3), detector=detector, **settings))
    found, expected = (one.predict(data.images).probabilities for one in (loaded, model))
    assert torch.equal(found, expected)


def test_detector_sees_defects():
    good, novel = textured_products(0, 12, seed=3), textured_products(6, 0, seed=3, part=1)
    detector = PatchMemory(tiny_vit(), tiles=4, rows=1000).fit(torch.from_numpy(good.images))
    maps = np.stack(detector(torch.from_numpy(novel.images)))
    inside, outside = maps[novel.masks].mean(), maps[~novel.masks].mean()
    assert maps.shape == novel.masks.shape and inside > 1.1 * outside


def test_layout_of_mvtec(tmp_path):
    novel = textured_products(1, 1, seed=2)
    for i, (image, y) in enumerate(zip(novel.images, novel.y, strict=True)):
        save(image, tmp_path / "tile" / "test" / novel.classes[y] / "000.png")
        save(np.full((8, 8), i, np.uint8), tmp_path / "maps" / novel.classes[y] / "000.png")
    save(novel.images[0], tmp_path / "tile" / "test" / "combined" / "000.png")
    save(novel.images[0], tmp_path / "tile" / "train" / "good" / "000.png")
    found = open_product(tmp_path / "tile", tmp_path / "maps")
    assert found.labels == sorted(novel.classes) and len(found.good) == 1
    assert [one[0, 0] for one in found.maps] == [
        list(novel.y).index(novel.classes.index(name)) for name in found.labels
    ]


@pytest.mark.bare
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "maps" / "p.3.png").unlink(), r"p\.3: expected one anomaly map of this name .*, found none"),
        (lambda f: np.save(f / "maps" / "p.3.npy", np.ones((4, 4))), "expected one anomaly map .*, found 2"),
        (
            lambda f: save(np.random.rand(3, 64, 64), f / "maps" / "p.0.png"),
            "p.0.png: .* found a RGB image; a coloured",
        ),
        (lambda f: (f / "maps" / "p.1.png").write_bytes(b"no"), "p.1.png: not a readable image"),
        (lambda f: save(np.zeros((64, 64), np.uint16), f / "maps" / "p.1.png"), "of one kind.*uint16 and uint8"),
        (lambda f: save(np.zeros((64, 64), np.uint8), next((f / "masks").rglob("*.png"))), "found an empty mask"),
        (lambda f: save(np.ones((60, 64), np.uint8), next((f / "masks").rglob("*.png"))), "the size of its image"),
        (lambda f: next((f / "masks").rglob("*.png")).unlink(), "expected one mask of the defect"),
        (lambda f: (f / "unlabelled").rename(f / "other"), "expected a folder unlabelled/"),
        (lambda f: save(np.zeros((3, 9, 9)), f / "unlabelled" / "p.0.bmp"), "two images of this name"),
        (lambda f: [file.unlink() for file in (f / "unlabelled").iterdir()], "no image files"),
    ],
)
def test_bad_layouts(layout, spoil, message):
    folder, novel = layout
    write_maps(folder, anomaly_maps(novel, seed=1), "png")
    spoil(folder)
    with pytest.raises(DataError, match=message):
        open_inspection(folder)


@pytest.mark.bare
def test_bad_arrays(tmp_path):
    np.save(tmp_path / "nan.npy", np.array([[0, np.nan]]))
    np.save(tmp_path / "deep.npy", np.ones((3, 4, 4)))
    np.savez(tmp_path / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    (tmp_path / "text.npy").write_text("none")
    for name, message in (
        ("nan", "1 NaN or infinite"),
        ("deep", r"\(3, 4, 4\)"),
        ("two", "a, b"),
        ("text", "readable"),
    ):
        with pytest.raises(DataError, match=message):
            read_maps(tmp_path, [name])
    (tmp_path / "base").mkdir()
    with pytest.raises(DataError, match="a folder for each class"):
        read_defects(tmp_path / "base", tmp_path)


def test_maps_that_all_reach_one_maximum_are_asked_about(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).permutation(100).reshape(10, 10) / 99)
    with pytest.warns(RuntimeWarning, match="Was each scaled by itself"):
        read_maps(tmp_path, ["0", "1", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_maps(tmp_path, ["0"])


def test_the_generator_keeps_its_truth():
    made = textured_products(5, 5, seed=4)
    assert made.classes == ("normal", *NOVEL) and np.bincount(made.y).tolist() == [5] * 5
    for mask, y, count in zip(made.masks, made.y, made.counts, strict=True):
        filled = ndimage.binary_fill_holes(mask)
        assert ndimage.label(filled, np.ones((3, 3)))[1] == count and bool(count) == bool(y)
    again, other = textured_products(5, 5, seed=4), textured_products(5, 5, seed=5)
    assert np.array_equal(again.images, made.images) and not np.array_equal(other.images, made.images)
    further = textured_products(2, 2, seed=4, kind="other")
    assert further.classes == ("normal", *OTHER) and np.array_equal(further.masks.any((1, 2)), further.y > 0)
    maps = anomaly_maps(made, seed=4, noise=0.0, spurious=0.0)
    assert maps.max() == 255 and maps.dtype == np.uint8
    peaks = maps.max((1, 2))
    assert (peaks[made.y == 0] == 0).all() and (peaks[made.y > 0] >= 0.39 * 255).all()


# bad input


def nan_maps():
    maps = torch.rand(2, 64, 64)
    maps[1, 3, 3] = torch.nan
    return maps


TWO = torch.full((2, 3, 64, 64), 0.5)
MASKS = torch.ones(2, 64, 64, dtype=torch.bool)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MEBin(step=0).fit(two_maps()), "step: expected at least 1, got 0"),
        (lambda: MEBin().fit([]), "maps: expected at least one"),
        (lambda: MEBin().fit(np.ones((2, 3, 4, 4))), r"maps: expected numbers of shape \(H, W\) each"),
        (lambda: MEBin().fit(nan_maps()), "maps: expected finite values, got 1 others in map 1"),
        (lambda: anomaly_crops(TWO[0], MASKS[0, 1:]), r"mask: expected the image's size \(64, 64\), got \(63, 64\)"),
        (lambda: anomaly_crops(TWO[0], MASKS[0], nan_maps()[1]), "score_map: expected no NaN"),
        (lambda: anomaly_crops(TWO[0], MASKS[0], max_regions=0), "max_regions: expected at least 1, got 0"),
        (lambda: MaskGuidedViT(tiny_vit(), 4), "n_blocks: expected 0 to 3, the transformer's blocks, got 4"),
        (lambda: MaskGuidedViT(tiny_vit(), 1, 2.0), "threshold: expected a share from 0 to 1, got 2.0"),
        (lambda: MaskGuidedViT(tiny_vit(), 1)(TWO, TWO[:1, :1]), r"mask: expected shape \(2, 1, 64, 64\)"),
        (lambda: NCDHeads(4, 0), "n_classes: expected at least 1, got 0"),
        (lambda: AnomalyNCD(tiny_vit(), 2, 0), "n_novel: expected at least 1, got 0"),
        (lambda: AnomalyNCD(tiny_vit(), -1, 2), "n_base: expected 0 or more, got -1"),
        (lambda: AnomalyNCD(tiny_vit(), 1, 2, max_regions="all"), "max_regions: expected 'exact' or 'code', got 'all'"),
        (lambda: AnomalyNCD(tiny_vit(), 1, 2, trainable_blocks=9), "trainable_blocks: expected 0 to 3, got 9"),
        (lambda: CorrectedSelfDistillation(1, 0), "n_novel: expected at least 1, got 0"),
        (lambda: CorrectedSelfDistillation(1, 2, normal_below=2.0), "normal_below: expected a score from 0 to 1"),
        (lambda: CorrectedSelfDistillation(1, 2)(torch.zeros(4, 5), torch.zeros(4, 5), torch.ones(2), 0), "expected 3"),
        (lambda: AnomalyNCDLoss(1, 2, sup_weight=2.0), "sup_weight: expected a number from 0 to 1, got 2.0"),
        (lambda: MeanEntropyMax(0.0), "temperature: expected a positive number, got 0.0"),
        (lambda: contrastive_loss(torch.ones(2, 2), torch.ones(2), 0.0), "temperature: expected a positive number"),
        (lambda: RegionMerger(0), "tau: expected a positive number, got 0"),
        (
            lambda: RegionMerger()(torch.ones(2, 2), torch.tensor([1.0, -4.0]), torch.zeros(2, dtype=torch.long)),
            "areas: expected finite numbers of 0 or more, got -4.0",
        ),
        (lambda: RegionMerger()(torch.ones(2, 2), torch.ones(1), torch.zeros(2)), "expected equal numbers of regions"),
        (lambda: PatchMemory(tiny_vit(), layer=7), "layer: expected 1 to 3, the transformer's blocks, got 7"),
        (lambda: PatchMemory(tiny_vit()).fit([]), "images: expected at least one good image"),
        (lambda: CropViews(40).central(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)), "at least 40 pixels"),
        (lambda: fit_anomalyncd(TWO, nan_maps(), n_novel=2, vit=tiny_vit()), "maps: expected finite values"),
        (lambda: fit_anomalyncd(TWO, nan_maps(), n_novel=0, vit=tiny_vit()), "n_novel: expected at least 1, or"),
        (lambda: fit_anomalyncd(TWO, n_novel=2, vit=tiny_vit()), "good: without maps expected at least two good"),
        (lambda: fit_anomalyncd(TWO * 255, MASKS, n_novel=2, vit=tiny_vit()), r"images: expected values in \[0, 1\]"),
        (lambda: fit_anomalyncd(TWO[:, :1], MASKS, n_novel=2, vit=tiny_vit()), r"images: expected floats \(3, H, W\)"),
        (
            lambda: fit_anomalyncd(
                TWO, torch.rand(2, 64, 64), n_novel=2, base=(TWO, MASKS & False, "ab"), vit=tiny_vit()
            ),
            "base: expected a defect in every mask, that of image 0 is empty",
        ),
        (
            lambda: fit_anomalyncd(
                TWO, torch.rand(2, 64, 64), n_novel=2, base=(TWO, MASKS[:, 1:], "ab"), vit=tiny_vit()
            ),
            r"base: expected a mask of \(64, 64\) for image 0, got \(63, 64\)",
        ),
        (
            lambda: fit_anomalyncd(
                TWO,
                torch.linspace(0, 1, 2).view(2, 1, 1).expand(2, 4, 4),
                n_novel=2,
                vit=tiny_vit(),
                model_options={"min_interval": 65},
            ),
            "maps: no region is stable in any of 2 maps",
        ),
        (lambda: small().predict(TWO, MASKS, unsure_below=3.0), "unsure_below: expected a probability from 0 to 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: small().predict(TWO, MASKS), RuntimeError, "AnomalyNCD is not fitted"),
        (lambda: PatchMemory(tiny_vit())(TWO), RuntimeError, "PatchMemory has no memory yet"),
        (lambda: MaskGuidedViT(nn.Linear(2, 2)), TypeError, "vit: expected timm's VisionTransformer"),
    ],
)
def test_use_before_fit_and_foreign_networks(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
