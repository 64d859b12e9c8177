import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.data.bag_files import DataError
from classact.data.faces import (
    AFFECTNET_CODES,
    EXPRESSIONS,
    MIRROR,
    MOVED,
    NEUTRAL,
    RAFDB_CODES,
    FaceAugmentation,
    FaceFolder,
    SyntheticFaces,
)
from classact.explain.aufer.codebook import CODEBOOKS, CORRECTED, OFFICIAL
from classact.explain.aufer.evaluate import class_activation_map, evaluate_alignment, features_and_gradient
from classact.explain.aufer.heatmap import AUHeatmap
from classact.explain.aufer.landmarks import MEDIAPIPE, FaceLandmarks
from classact.explain.aufer.loss import SpatialAlignmentLoss, attention_map, logits_and_features, map_cosine

T = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).view(1, 1, 2, 2)
A = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2)
FACE = torch.from_numpy(NEUTRAL).float().unsqueeze(0)
REFERENCE = Path(__file__).parent / "data" / "aufer_reference.npz"


def label(name):
    return torch.tensor([EXPRESSIONS.index(name)])


class Network(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Transformer(nn.Module):
    """A class token, a register and 4 x 4 patches."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, 2, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = torch.cat([self.prefix.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        return self.head(self.block(tokens)[:, 2:].mean(1))


def batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prior = torch.rand(n, 1, 16, 16, generator=generator)
    prior[0] = torch.inf
    return torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 3, prior


def test_values_worked_out_by_hand():
    assert SpatialAlignmentLoss()(T, A).item() == pytest.approx(1 - math.sqrt(3) / 2, abs=1e-6)
    assert SpatialAlignmentLoss()(5 * T, A).item() == pytest.approx(0.133975, abs=1e-6)
    assert SpatialAlignmentLoss("std_cosine")(T, A).item() == pytest.approx(0.5, abs=1e-6)
    assert SpatialAlignmentLoss("l1")(T, A).item() == pytest.approx(0.5)
    assert SpatialAlignmentLoss("l2")(T, A).item() == pytest.approx(0.5)
    t = T.flatten().softmax(0)
    kl = -(A.flatten() * t.log() + (1 - A.flatten()) * (1 - t).log()).mean()
    torch.testing.assert_close(SpatialAlignmentLoss("kl")(T, A), kl)
    torch.testing.assert_close(SpatialAlignmentLoss("l1", softmax=True)(T, A), (t - A.flatten()).abs().mean())


def test_from_equal_to_opposite():
    loss = SpatialAlignmentLoss()
    for attention, expected in ((A, 0.0), (-A, 2.0), (1 - A, 1.0)):
        assert loss(attention, A).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "std_cosine", "l1", "l2", "kl"])
def test_a_dead_layer_has_a_finite_gradient(kind):
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = SpatialAlignmentLoss(kind)(dead, torch.rand(2, 1, 4, 4))
    if kind == "cosine":
        assert loss.item() == 1
    loss.backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cosine", "std_cosine", "l1", "l2", "kl"])
def test_samples_without_a_prior_do_not_count(kind):
    loss, (x, _, prior) = SpatialAlignmentLoss(kind), batch()
    prior[3, 0, 2, 2] = torch.nan
    kept = torch.tensor([1, 2, 4, 5])
    x.requires_grad_()
    value = loss(x, prior)
    torch.testing.assert_close(value, loss(x[kept], prior[kept]))
    torch.testing.assert_close(loss(x, prior, torch.arange(6) == 2), loss(x[2:3], prior[2:3]))
    value.backward()
    assert x.grad.isfinite().all() and not x.grad[[0, 3]].any()


def test_no_valid_sample_no_loss_no_gradient():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = SpatialAlignmentLoss()(features, torch.full((2, 1, 8, 8), torch.inf))
    loss.backward()
    assert loss.item() == 0 and not features.grad.any()


def test_a_uniform_map_has_the_cosine_of_the_area():
    prior = torch.zeros(1, 1, 10, 10)
    prior[..., :3, :] = 1
    assert map_cosine(torch.full((1, 10, 10), 7.0), prior).item() == pytest.approx(math.sqrt(0.3))


def test_layers_are_averaged():
    loss, (x, _, prior) = SpatialAlignmentLoss(), batch()
    small = torch.randn(6, 5, 4, 4)
    torch.testing.assert_close(loss([x, small], prior), (loss(x, prior) + loss(small, prior)) / 2)


def test_channels_drawn_at_random():
    features = torch.randn(2, 400, 3, 3)
    prior, mean = torch.rand(2, 1, 3, 3), features.mean(1, keepdim=True)
    torch.testing.assert_close(
        SpatialAlignmentLoss(reduce="random")(features, prior), SpatialAlignmentLoss()(mean, prior)
    )
    half = SpatialAlignmentLoss(reduce="random", p=0.5)
    torch.manual_seed(0)
    drawn = torch.stack([half._attention(features) for _ in range(300)])
    assert (drawn[0] != drawn[1]).any()
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.01, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(half._attention(features), drawn[0])
    first = SpatialAlignmentLoss(reduce=0.25)._attention(features)
    torch.testing.assert_close(first, features[:, :100].mean(1, keepdim=True))


def test_every_channel_of_a_position_gets_the_same_gradient():
    features = torch.randn(3, 5, 4, 4, requires_grad=True)
    SpatialAlignmentLoss()(features, torch.rand(3, 1, 9, 9)).backward()
    assert torch.equal(features.grad, features.grad[:, :1].expand_as(features)) and features.grad.any()


def test_agrees_with_the_authors_losses():
    reference = np.load(REFERENCE)
    features, prior = (torch.from_numpy(reference[name]) for name in ("features", "prior"))
    for name, expected in zip(reference["kinds"], reference["losses"], strict=True):
        kind, resize = str(name).split("-")
        assert SpatialAlignmentLoss(kind, resize=resize)(features, prior).item() == pytest.approx(expected, abs=1e-6)
    first = SpatialAlignmentLoss(reduce=0.4)._attention(features)
    torch.testing.assert_close(first, torch.from_numpy(reference["first_part"]))


def test_agrees_with_the_authors_heatmaps():
    """Up to pixels on the outlines, which OpenCV fills by its own rule."""
    reference = np.load(REFERENCE)
    landmarks, labels = (torch.from_numpy(reference[name]) for name in ("landmarks", "labels"))
    maps, valid = AUHeatmap(256)(landmarks.float(), labels.long())
    assert valid.tolist() == reference["valid"].tolist()
    difference = (maps[valid, 0, 2::4, 2::4] - torch.from_numpy(reference["maps"])[valid] / 255).abs()
    assert difference.max() < 0.12 and difference.mean() < 0.002


@pytest.mark.parametrize(("rx", "ry"), [(20, 20), (32, 26), (25, 10), (5, 5), (12, 3)])
def test_an_ellipse_is_that_of_opencv(rx, ry):
    cv2 = pytest.importorskip("cv2")
    canvas = np.zeros((256, 256))
    cv2.ellipse(canvas, (120, 101), (rx, ry), 0, 0, 360, (1, 1, 1), cv2.FILLED)
    expected = cv2.blur(cv2.resize(canvas, (28, 28)), (3, 3))
    draw = AUHeatmap(256, {"one": (1,)}, size=28, classes=["one"])
    draw.extra[0], draw.extra[1], draw.whole_pixels = rx, ry, True
    points = torch.zeros(1, 68, 2) + torch.tensor([120.0, 101.0])
    drawn = draw._draw(points, torch.tensor([0]))[0, 0].numpy()
    assert abs(drawn - expected).max() < 0.06


@pytest.mark.parametrize("size", [None, 28, (40, 24)])
@pytest.mark.parametrize("codebook", ["official", "corrected"])
def test_maps_lie_between_0_and_1_and_reach_both(codebook, size):
    faces = SyntheticFaces(14, seed=1)
    maps, valid = AUHeatmap(48, codebook, size)(torch.from_numpy(faces.landmarks), torch.from_numpy(faces.labels))
    assert maps.shape == (14, 1, *(size if isinstance(size, tuple) else (size or 48, size or 48)))
    assert valid.tolist() == [label != 0 for label in faces.labels]
    assert maps[valid].amin((1, 2, 3)).eq(0).all() and maps[valid].amax((1, 2, 3)).eq(1).all()
    assert maps[~valid].isinf().all()


def test_happiness_is_two_cheeks_two_corners_and_two_lips():
    assert sum(len(OFFICIAL[unit]) for unit in CODEBOOKS["official"]["happiness"]) == 6
    maps, _ = AUHeatmap(256, blur=1)(FACE, label("happiness"))
    inside = np.concatenate([NEUTRAL[[41, 46]] + [0, 43], NEUTRAL[[48, 54, 51, 57]]]).astype(int)
    assert all(maps[0, 0, y, x] > 0.9 for x, y in inside)
    assert maps[0, 0, 40, 128] == 0


@pytest.mark.parametrize("name", EXPRESSIONS[1:])
def test_corrected_maps_of_a_symmetric_face_are_symmetric(name):
    maps, _ = AUHeatmap(256, "corrected")(FACE - 0.5, label(name))  # symmetric about the middle of the pixels, 127.5
    torch.testing.assert_close(maps, maps.flip(-1), atol=1e-5, rtol=0)


def test_the_official_surprise_is_symmetric_and_what_the_correction_changes():
    official, corrected = (AUHeatmap(257, book, 257)(FACE, label("surprise"))[0] for book in ("official", "corrected"))
    assert (official - corrected).abs().mean() < 0.01
    assert {unit for unit in OFFICIAL if OFFICIAL[unit] != CORRECTED[unit]} == {4, 5, 7, 10, 17, 20, 43}
    assert set(CODEBOOKS["official"]["disgust"]) ^ set(CODEBOOKS["corrected"]["disgust"]) == {5, 10}
    assert (official - official.flip(-1)).abs().mean() < 0.02


def test_maps_move_with_the_landmarks_and_flip_with_the_face():
    for book in ("official", "corrected"):
        draw = AUHeatmap(256, book, size=28)
        still, moved = (
            draw(FACE + torch.tensor(shift), label("happiness"))[0] for shift in ([0.0, 0.0], [64.0, -64.0])
        )
        torch.testing.assert_close(moved[..., 1:20, 8:27], still[..., 8:27, 1:20])  # 64 pixels are 7 cells
    faces = SyntheticFaces(7, seed=3)
    draw, labels = AUHeatmap(48, "corrected"), torch.from_numpy(faces.labels)
    mirrored = faces.landmarks[:, MIRROR] * [-1, 1] + [47, 0]
    maps, valid = draw(torch.from_numpy(faces.landmarks), labels)
    flipped, _ = draw(torch.from_numpy(mirrored).float(), labels)
    torch.testing.assert_close(flipped[valid], maps[valid].flip(-1), atol=1e-3, rtol=0)


def test_no_map_for_neutral_failed_or_outlying_faces():
    draw = AUHeatmap(256)
    faces = torch.cat([FACE, FACE + torch.inf, FACE + 500, FACE.clone()])
    faces[3, 0] = torch.nan
    labels = torch.cat([label("neutral"), label("fear"), label("fear"), label("fear")])
    maps, valid = draw(faces, labels)
    assert not valid.any() and maps.isinf().all()
    half_outside, valid = draw(FACE + torch.tensor([140.0, 0.0]), label("surprise"))
    assert valid.all() and half_outside.max() == 1


def test_a_codebook_of_ones_own():
    maps, valid = AUHeatmap(256, {"wink": (43,), "dimple": [14]}, classes=["dimple", "wink"])(
        FACE.expand(2, -1, -1), torch.tensor([0, 1])
    )
    assert valid.all()
    assert maps[0, 0, 180, 82] > 0.9 > maps[1, 0, 180, 82]
    assert maps[1, 0, 107, 88] > 0.8 > maps[0, 0, 107, 88]


def test_attention_is_the_mean_of_the_channels_and_keeps_its_range():
    features = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(attention_map(features), features.mean(1))
    large = attention_map(features, (16, 12))
    low, high = features.mean(1).amin((1, 2)), features.mean(1).amax((1, 2))
    assert large.shape == (2, 16, 12)
    assert (large.amin((1, 2)) >= low).all() and (large.amax((1, 2)) <= high).all()


def test_the_yardstick_shifts_negative_maps():
    maps, prior = torch.randn(3, 8, 8), torch.rand(3, 1, 8, 8)
    prior[2] = torch.inf
    expected = F.cosine_similarity((maps - maps.amin((1, 2), keepdim=True)).flatten(1), prior.flatten(1))
    cosine = map_cosine(maps, prior)
    torch.testing.assert_close(cosine[:2], expected[:2])
    assert cosine[2].isnan()
    plain = map_cosine(maps, prior, shift_negative=False)
    torch.testing.assert_close(plain[:2], F.cosine_similarity(maps.flatten(1), prior.flatten(1))[:2])
    torch.testing.assert_close(map_cosine(maps.abs(), prior)[:2], map_cosine(maps.abs(), prior, False)[:2])


def test_features_of_any_layer_without_a_hook_left():
    x, _, prior = batch()
    model = Network()
    logits, (early, late) = logits_and_features(model, x, ["body.1", "body.3"])
    assert early.shape == (6, 4, 8, 8) and late.shape == (6, 6, 8, 8)
    torch.testing.assert_close(logits, model(x))
    vit = Transformer()
    logits, (tokens,) = logits_and_features(vit, x, ["block"])
    assert tokens.shape == (6, 8, 4, 4)
    torch.testing.assert_close(logits, vit.head(tokens.mean((2, 3))))
    SpatialAlignmentLoss()(tokens, prior).backward()
    assert vit.patch.weight.grad.any()
    assert not any(part._forward_hooks for network in (model, vit) for part in network.modules())


def test_float32_under_autocast():
    loss, (x, _, prior) = SpatialAlignmentLoss(), batch()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss((1e-3 * x).to(dtype), prior)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(x, prior), atol=2e-3, rtol=0)
    model = Network()
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = logits_and_features(model, x, ["body.3"])
        (logits.float().sum() + loss(features, prior)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
def test_compiles_and_exports():
    loss, (x, _, prior) = SpatialAlignmentLoss(), batch()
    x.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, prior)
    torch.testing.assert_close(compiled, loss(x, prior))
    compiled.backward()
    assert x.grad.isfinite().all()
    exported = torch.export.export(loss, (x.detach(), prior)).module()
    torch.testing.assert_close(exported(x.detach(), prior), loss(x, prior))


def fit_aligned(model, lam, validate=False):
    from torch.utils.data import DataLoader, TensorDataset

    from classact.explain.aufer.lit import AlignedClassifier
    from classact.training import fit

    data = DataLoader(TensorDataset(*batch(12)), 6)
    sgd = lambda parameters: torch.optim.SGD(parameters, 0.1)  # noqa: E731
    module = AlignedClassifier(model, ["body.3"], lam, optimizer=sgd)
    return module, fit(module, data, data if validate else None, epochs=3, seed=1, monitor="val_error")


def test_weight_0_is_the_plain_training_bit_for_bit():
    torch.manual_seed(0)
    model, plain = Network(), Network()
    plain.load_state_dict(model.state_dict())
    fit_aligned(model, 0.0)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    x, y, _ = batch(12)
    for part in 3 * [slice(6), slice(6, 12)]:
        optimizer.zero_grad()
        F.cross_entropy(plain(x[part]), y[part]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_alignment_is_learned_and_nothing_is_added_to_the_model():
    torch.manual_seed(0)
    model = Network()
    names = list(model.state_dict())
    module, history = fit_aligned(model, 20.0, validate=True)
    assert history.curves["train_alignment"][-1] < history.curves["train_alignment"][0]
    assert set(history.curves) >= {"val_loss", "val_error"}
    assert [name.removeprefix("model.") for name in module.state_dict()] == names
    x, _, _ = batch()
    assert torch.equal(module(x), model(x))
    torch.manual_seed(0)
    again = Network()
    fit_aligned(again, 20.0, validate=True)
    assert torch.equal(again.head.weight, model.head.weight)


def test_the_papers_optimiser_by_default():
    from classact.explain.aufer.lit import AlignedClassifier

    made = AlignedClassifier(Network(), ["body.3"]).configure_optimizers()
    group = made["optimizer"].param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (2e-3, 5e-4, 0.9, True)
    assert (made["lr_scheduler"].step_size, made["lr_scheduler"].gamma) == (4, 0.9)


def test_a_trained_model_is_saved_as_any_other(tmp_path):
    model = Network().eval()
    classact.save(model, tmp_path / "model")
    loaded = classact.load(tmp_path / "model", Network())
    assert torch.equal(loaded(batch()[0]), model(batch()[0]))


def test_only_the_training_step_needs_lightning():
    from classact.explain import aufer

    files = {path.name: path.read_text() for path in Path(aufer.__path__[0]).glob("*.py")}
    assert [name for name, text in files.items() if "lightning" in text or "classact.training" in text] == ["lit.py"]


@pytest.mark.parametrize(("model", "layer"), [(Network(), "body.3"), (Transformer(), "block")])
def test_report_of_a_model(model, layer, tmp_path):
    model.train()
    model.head.weight.requires_grad_(False)
    x, y, prior = batch(9)
    report = evaluate_alignment(model, [(x[:5], y[:5], prior[:5]), (x[5:], y[5:], prior[5:])], layer, classes="abc")
    logits, (features,) = logits_and_features(model, x, [layer])
    correct = logits.argmax(1) == y
    assert report.samples.tolist() == [3, 3, 3]
    assert report.mean["accuracy"] == pytest.approx(correct.float().mean().item())
    cosine = map_cosine(attention_map(features, (16, 16)), prior)
    cam = torch.einsum("nchw,nc->nhw", features, model.head.weight[y]).detach()
    cam = cam - cam.amin((1, 2), keepdim=True)
    cam = F.interpolate(cam.unsqueeze(1), (16, 16), mode="bilinear").squeeze(1)
    for c in range(3):
        assert report.att_cos[c] == pytest.approx(cosine[y == c].nanmean().item(), abs=1e-5)
        assert report.cam_cos[c] == pytest.approx(map_cosine(cam, prior)[y == c].nanmean().item(), abs=1e-5)
    assert report.mean["att_cos"] == pytest.approx(report.att_cos.mean())
    assert list(report.table().index) == ["a", "b", "c", "mean"]
    assert json.loads(report.save(tmp_path / "report.json").read_text())["samples"] == [3, 3, 3]
    assert report.plot().axes
    assert model.training and [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_a_class_without_a_prior_is_left_out_of_the_mean():
    x, y, prior = batch()
    prior[y == 1] = torch.inf
    report = evaluate_alignment(Network(), [(x, y, prior)], "body.3")
    assert np.isnan(report.att_cos[1]) and np.isfinite(report.accuracy).all()
    assert report.mean["cam_cos"] == pytest.approx(report.cam_cos[[0, 2]].mean())


def test_a_model_is_left_as_it_was_on_error():
    model, (x, y, prior) = Network().train(), batch()

    def broken(features, gradient):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate_alignment(model, [(x, y, prior)], "body.3", class_map=broken)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("name", ["gradcampp", "layercam"])
def test_class_maps_are_those_of_pytorch_grad_cam(name):
    import pytorch_grad_cam as peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from classact.reproductions.explain.aufer import CLASS_MAPS

    torch.manual_seed(0)
    model, (x, y, _) = Network().eval(), batch()
    features, gradient, _ = features_and_gradient(model, x, y, "body.3")
    ours = CLASS_MAPS[name](features, gradient)
    kind = {"gradcampp": peer.GradCAMPlusPlus, "layercam": peer.LayerCAM}[name]
    with kind(model, [model.body[3]]) as cam:
        theirs = torch.from_numpy(cam(x, [ClassifierOutputTarget(int(c)) for c in y]))
    ours = F.interpolate(ours.unsqueeze(1), (16, 16), mode="bilinear").squeeze(1)
    shown = theirs.flatten(1).any(1)
    assert F.cosine_similarity(ours[shown].flatten(1), theirs[shown].flatten(1)).min() > 0.99


def test_class_map_is_that_of_torchcam():
    from torchcam.methods import CAM

    model, (x, y, _) = Network().eval(), batch()
    features, gradient, _ = features_and_gradient(model, x, y, "body.3")
    ours = class_activation_map(features, gradient)
    with CAM(model, "body.3", fc_layer="head", input_shape=(3, 16, 16)) as cam, torch.no_grad():
        model(x)
        (theirs,) = cam(y.tolist(), normalized=False)
    torch.testing.assert_close(64 * ours, theirs, atol=1e-5, rtol=1e-4)


def test_drawn_faces_are_reproducible_and_say_what_moves():
    faces, same, other = (SyntheticFaces(14, 32, seed) for seed in (1, 1, 2))
    assert faces.images.shape == (14, 3, 32, 32) and faces.landmarks.shape == (14, 68, 2) and len(faces) == 14
    assert (faces.images == same.images).all() and (faces.landmarks == same.landmarks).all()
    assert (faces.images != other.images).any()
    assert np.bincount(faces.labels).tolist() == [2] * 7
    assert faces.images.min() >= 0 and faces.images.max() <= 1
    grey = SyntheticFaces(30, 32, 1)
    cued = SyntheticFaces(30, 32, 1, cue=1.0)
    assert np.ptp(grey.images, axis=1).max() < 0.01
    assert (np.ptp(cued.images[:, :, 0, 0], axis=1) > 0.1).mean() > 0.8  # a disc may lie in the corner
    assert set(MOVED) == set(EXPRESSIONS) == set(CODEBOOKS["corrected"])
    for name, units in MOVED.items():
        assert set(units) <= set(CODEBOOKS["corrected"][name])
    np.testing.assert_allclose(NEUTRAL[MIRROR] * [-1, 1] + [256, 0], NEUTRAL)


def write_faces(folder, rows):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((40, 30, 3), 9, np.uint8)).save(folder / name)
    np.save(folder / "a.npy", NEUTRAL)
    np.save(folder / "short.npy", NEUTRAL[:5])
    (folder / "faces.csv").write_text("\n".join(["image,label,landmarks", *rows]))
    return folder / "faces.csv"


def test_reads_a_folder_of_faces(tmp_path):
    table = write_faces(tmp_path, ["a.png,5,a.npy", "b.png,neutral,"])
    faces = FaceFolder(table, codes=RAFDB_CODES)
    assert len(faces) == 2 and faces.labels == [EXPRESSIONS.index("sadness"), 0]
    assert faces[0].image.shape == (40, 30, 3) and faces[0].label == EXPRESSIONS.index("sadness")
    np.testing.assert_allclose(faces[0].landmarks, NEUTRAL, rtol=1e-6)
    assert np.isinf(faces[1].landmarks).all()
    assert [EXPRESSIONS[label] for label in FaceFolder(table, codes=AFFECTNET_CODES).labels] == ["disgust", "neutral"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.png,9,a.npy"], r"faces.csv, line 2: label '9'; expected one of neutral, .*, 1, 2"),
        (["a.png,1,short.npy"], r"short.npy: expected landmarks of shape \(68, 2\), found \(5, 2\)"),
        (["a.png,1,none.npy"], "none.npy: no such file, but faces.csv names it"),
        (["a.png,1,a.png"], "a.png: expected an array of numbers"),
        (["c.png,1,"], "c.png: expected an image, as faces.csv says"),
        (["a.npy,1,"], "a.npy: expected an image"),
    ],
)
def test_bad_tables_and_files(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        list(FaceFolder(write_faces(tmp_path, rows), codes=RAFDB_CODES))


def test_no_table_or_column(tmp_path):
    with pytest.raises(DataError, match="none.csv: no such file; expected a CSV file with columns"):
        FaceFolder(tmp_path / "none.csv")
    (tmp_path / "bare.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="bare.csv: no column landmarks; there are"):
        FaceFolder(tmp_path / "bare.csv")


def test_paper_scale_reads_tables_of_faces(tmp_path, monkeypatch):
    """Made-up photos, and a small network in place of the pretrained one."""
    from PIL import Image

    from classact import training
    from classact.reproductions import run_cell
    from classact.reproductions.explain import aufer

    folder = tmp_path / "raf-db"
    folder.mkdir()
    faces = SyntheticFaces(7, 32)
    rows = ["image,label,landmarks"]
    for i, label in enumerate(faces.labels):
        Image.fromarray((faces.images[i].transpose(1, 2, 0) * 255).astype(np.uint8)).save(folder / f"{i}.png")
        np.save(folder / f"{i}.npy", faces.landmarks[i])
        rows.append(f"{i}.png,{EXPRESSIONS[label]},{i}.npy")
    for part in ("train", "validation", "test"):
        (folder / f"{part}.csv").write_text("\n".join(rows))

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer4 = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU())
            self.fc = nn.Linear(4, 7)

        def forward(self, x):
            return self.fc(self.layer4(x).mean((2, 3)))

    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    monkeypatch.setattr(aufer, "make_resnet50", Small)
    monkeypatch.setattr(aufer, "WORKERS", 0)
    original = training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **k: original(*a, **{**k, "epochs": 1}))
    values, _ = run_cell("classact.reproductions.explain.aufer", "raf-db", 100, "paper")
    assert set(values) == {"plain", "aligned"}
    assert set(values["plain"]) == {"accuracy", "att_cos", "cam_cos", "uniform_cos", "gradcampp_cos", "layercam_cos"}


def test_augmentation_moves_image_and_heatmap_together():
    torch.manual_seed(0)
    heatmap = AUHeatmap(64)(FACE / 4, label("happiness")).maps[0]
    augment = FaceAugmentation(56)
    augment.colour = nn.Identity()
    for _ in range(5):
        image, moved = augment(heatmap.expand(3, -1, -1), heatmap)
        assert image.shape == (3, 56, 56) and moved.shape == (1, 56, 56)
        torch.testing.assert_close(image, moved.expand(3, -1, -1))
    assert FaceAugmentation(56)(heatmap.expand(3, -1, -1), torch.full_like(heatmap, torch.inf))[1].isinf().all()


def test_landmarks_of_other_packages():
    largest = FaceLandmarks.from_face_alignment([NEUTRAL / 2, np.pad(NEUTRAL, ((0, 0), (0, 1)))])
    np.testing.assert_allclose(largest.points, NEUTRAL, rtol=1e-6)
    assert largest.found and not FaceLandmarks.from_face_alignment(None).found
    mesh = [SimpleNamespace(x=0.5, y=0.5) for _ in range(478)]
    for point, (x, y) in zip(MEDIAPIPE, NEUTRAL, strict=True):
        mesh[point] = SimpleNamespace(x=(x + 0.5) / 256, y=(y + 0.5) / 512)
    assert len(set(MEDIAPIPE)) == 68
    for faces in ([mesh], [SimpleNamespace(landmark=mesh)]):
        points = FaceLandmarks.from_mediapipe(faces, (512, 256)).points
        np.testing.assert_allclose(points, NEUTRAL, rtol=1e-4)
    assert not FaceLandmarks.from_mediapipe([], (4, 4)).found


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpatialAlignmentLoss("l3"), "loss: expected cosine, .* got 'l3'"),
        (lambda: SpatialAlignmentLoss(reduce="max"), "reduce: expected 'mean', 'random' or a part .* got 'max'"),
        (lambda: SpatialAlignmentLoss(reduce=0.0), r"reduce: expected a part in \(0, 1\], got 0.0"),
        (lambda: SpatialAlignmentLoss(p=1.5), r"p: expected a part in \(0, 1\], got 1.5"),
        (lambda: SpatialAlignmentLoss(resize="to_image"), "resize: expected 'to_attention' or 'to_prior'"),
        (lambda: SpatialAlignmentLoss()([], A), "features: expected at least one layer, got none"),
        (lambda: SpatialAlignmentLoss()(T, A[0]), r"prior: expected shape \(N, 1, H, W\), got \(1, 2, 2\)"),
        (lambda: SpatialAlignmentLoss()(T.expand(2, -1, -1, -1), A), r"features, prior: .* got \(2, 1, 2, 2\), \(1, 1"),
        (lambda: SpatialAlignmentLoss()(T, A, torch.ones(2, dtype=bool)), r"valid: expected shape \(1,\), got \(2,\)"),
        (lambda: map_cosine(T[:, 0], A[:, 0]), r"maps, prior: expected \(N, h, w\) and \(N, 1, h, w\)"),
        (lambda: AUHeatmap(codebook="mine"), "codebook: expected 'official', 'corrected' or a dict, got 'mine'"),
        (lambda: AUHeatmap(codebook={"joy": (99,)}, classes=["joy"]), r"codebook: no place is known for AU \[99\]"),
        (lambda: AUHeatmap(classes=["contempt"]), "classes: unknown expression contempt; the codebook has neutral"),
        (lambda: AUHeatmap(blur=2), "blur: expected an odd width of at least 1, got 2"),
        (lambda: AUHeatmap(0), "image_size, size: expected positive numbers of pixels"),
        (lambda: AUHeatmap()(FACE[:, :5], torch.tensor([0])), r"landmarks, labels: .* got \(1, 5, 2\) and \(1,\)"),
        (lambda: AUHeatmap()(FACE, torch.tensor([7])), "labels: expected values from 0 to 6, got 7 to 7"),
        (lambda: FaceLandmarks.from_face_alignment([NEUTRAL[:3]]), r"faces: expected landmarks .* got \(3, 2\)"),
        (lambda: FaceLandmarks.from_mediapipe([[0] * 9], (1, 1)), "faces: expected a mesh of 468 or 478 points, got 9"),
        (lambda: logits_and_features(Network(), batch()[0], ["body.9"]), "has no layer 'body.9'"),
        (lambda: evaluate_alignment(Network(), [], "body.3"), "loader: expected at least one batch, got none"),
        (lambda: evaluate_alignment(Network(), [batch()], "body.3", classes="ab"), "classes: expected 3 names"),
        (lambda: SyntheticFaces(0), "n, size: expected at least 1 face of 16 pixels, got 0 of 48"),
        (lambda: SyntheticFaces(7, cue=2.0), r"cue: expected a part in \[0, 1\], got 2.0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_bad_classifier():
    from classact.explain.aufer.lit import AlignedClassifier

    with pytest.raises(ValueError, match="has no layer 'layer5'"):
        AlignedClassifier(Network(), ["layer5"])
    with pytest.raises(ValueError, match="lam: expected 0 or more, got -1"):
        AlignedClassifier(Network(), ["body.3"], lam=-1)
