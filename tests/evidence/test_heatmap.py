"""Heat maps show the scores that were asked for, where they belong, or say why they cannot."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image

from classact.data import DataError
from classact.evidence import heatmap
from classact.evidence.heatmap import average_tiles, percentiles, write_heatmaps

ABMIL = {"attention": np.array([0.1, 0.2, 0.2, 0.5], dtype=np.float32)}
DRAW = heatmap._png
CLASSES = {"attention x class logit": np.array([[1, -1], [2, -2], [0, 3], [4, 0.5]], dtype=np.float32)}
COORDS = np.array([[0, 0], [512, 0], [0, 512], [512, 512]])


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """What would be drawn, as (item, background); drawing takes half a second."""
    seen = []
    monkeypatch.setattr(heatmap, "_png", lambda item, background: seen.append((item, background)) or b"png")
    return seen


def write_scores(path, items, classes=("normal", "tumor")):
    """items: name -> (attributes, coords or None, {method: (attributes, {score: array})})."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"classes": list(classes), "task": "mil", "unit": "bag"})
        for name, (attributes, coords, methods) in items.items():
            group = file.create_group(name)
            group.attrs.update(attributes)
            if coords is not None:
                group["coords"] = coords
            for method, (own, scores) in methods.items():
                node = group.create_group(method)
                node.attrs.update(own)
                for kind, values in scores.items():
                    node[kind] = values
    return path


def one(path, scores=None, coords=COORDS, own=None, method="abmil", **attributes):
    own = {"predicted": "tumor", "probabilities": [0.25, 0.75]} if own is None else own
    attributes = {"label": "normal", "patch_size": 512.0} | attributes
    attributes = {k: v for k, v in attributes.items() if v is not None}
    return write_scores(path / "instance_scores.h5", {"s1.a": (attributes, coords, {method: (own, scores or ABMIL)})})


def drawn(path, **options):
    """Features of the only item."""
    write_heatmaps(path, path.parent / "out", **options)
    (file,) = (path.parent / "out").glob("*.geojson")
    return json.loads(file.read_text())


def values(content, name="score"):
    return [tile["properties"]["measurements"][name] for tile in content["features"]]


def test_percentiles_average_ties():
    np.testing.assert_allclose(percentiles(np.array([0.1, 0.2, 0.2, 0.5])), [12.5, 50, 50, 87.5])
    np.testing.assert_allclose(percentiles(np.ones(7)), 50)
    assert percentiles(np.random.default_rng(0).normal(size=101)).mean() == pytest.approx(50)


def test_overlapping_tiles_are_averaged_by_area():
    rng = np.random.default_rng(0)
    shape, side = (9, 12), np.array([2.3, 1.7])
    corners = rng.uniform([-2, -2], [13, 10], (40, 2))
    corners[0], corners[1] = (3, 4), (11.5, 8.5)  # on whole pixels; over the corner
    scores = rng.normal(size=40)
    area, total = np.zeros(shape), np.zeros(shape)
    for (x, y), score in zip(corners, scores, strict=True):
        for row in range(shape[0]):
            for column in range(shape[1]):
                across = max(0, min(x + side[0], column + 1) - max(x, column))
                down = max(0, min(y + side[1], row + 1) - max(y, row))
                area[row, column] += across * down
                total[row, column] += across * down * score
    mean, coverage = average_tiles(corners, side, scores, shape)
    np.testing.assert_allclose(coverage, area, atol=1e-12)
    np.testing.assert_allclose(mean, np.where(area > 0, total / np.where(area > 0, area, 1), np.nan), atol=1e-9)


def test_tiles_smaller_than_a_pixel_do_not_vanish():
    corners = np.array([[0.5, 0.5], [2.999, 1.999], [2.2, 1.2], [2.4, 1.2]])
    mean, coverage = average_tiles(corners, np.array([0.001, 0.001]), np.array([1.0, 5.0, 2.0, 4.0]), (3, 4))
    assert mean[0, 0] == pytest.approx(1)
    assert mean[1, 2] == pytest.approx(11 / 3)
    assert (coverage > 0).sum() == 2 == np.isfinite(mean).sum()


def test_tiles_that_touch_do_not_mix():
    corners = np.array([[0.0, 0.0], [4.0, 0.0]])
    mean, coverage = average_tiles(corners, np.array([4.0, 4.0]), np.array([1.0, 2.0]), (5, 9))
    np.testing.assert_array_equal(mean[:4, :8], [[1, 1, 1, 1, 2, 2, 2, 2]] * 4)
    assert np.isnan(mean[4]).all() and np.isnan(mean[:, 8]).all()
    np.testing.assert_array_equal(coverage[:4, :8], 1)


def test_geojson_has_what_qupath_needs(tmp_path):
    content = drawn(one(tmp_path))
    assert content["type"] == "FeatureCollection"
    assert content["description"] == "s1.a; attention (abmil); predicted tumor (0.75), label normal"
    assert len(content["features"]) == 4
    for tile, (x, y) in zip(content["features"], COORDS.tolist(), strict=True):
        assert set(tile) == {"type", "geometry", "properties"}
        assert tile["type"] == "Feature"
        ring = [[x, y], [x + 512, y], [x + 512, y + 512], [x, y + 512], [x, y]]
        assert tile["geometry"] == {"type": "Polygon", "coordinates": [ring]}
        own = tile["properties"]
        assert set(own) == {"objectType", "name", "classification", "color", "measurements"}
        assert (own["objectType"], own["name"]) == ("tile", "attention (abmil)")
        assert own["classification"] == {"name": "tumor", "color": [255, 127, 14]}
        assert len(own["color"]) == 3 and all(0 <= c <= 255 for c in own["color"])
        assert set(own["measurements"]) == {"score", "percentile"}
    np.testing.assert_allclose(values(content), ABMIL["attention"], rtol=1e-6)
    assert values(content, "percentile") == [12.5, 50, 50, 87.5]
    assert "probability" not in json.dumps(content)


def test_without_a_prediction_there_is_no_class(tmp_path):
    content = drawn(one(tmp_path, own={}, label=""))
    assert content["description"] == "s1.a; attention (abmil)"
    assert all("classification" not in tile["properties"] for tile in content["features"])


def test_class_wise_scores(tmp_path):
    path = one(tmp_path, ABMIL | CLASSES | {"instance logit": -CLASSES["attention x class logit"]})
    content = drawn(path)
    assert content["features"][0]["properties"]["name"] == "attention x class logit for tumor (abmil)"
    assert values(content) == [-1, -2, 3, 0.5]
    # the middle of the colours is zero: against the class blue, for it red
    red = [tile["properties"]["color"][0] - tile["properties"]["color"][2] for tile in content["features"]]
    assert (np.sign(red) == np.sign(values(content))).all()
    assert values(drawn(path, class_="normal")) == [1, 2, 0, 4]
    assert values(drawn(path, score="instance logit")) == [1, 2, -3, -0.5]
    np.testing.assert_allclose(values(drawn(path, score="attention")), ABMIL["attention"], rtol=1e-6)
    content = drawn(one(tmp_path, CLASSES, own={"predicted": "normal"}))
    assert values(content) == [1, 2, 0, 4]
    assert values(drawn(one(tmp_path, CLASSES, own={}))) == [-1, -2, 3, 0.5]  # the last class


def test_names_with_percent_signs_and_quotes(tmp_path):
    content = drawn(one(tmp_path, method='my "50%s" method'))
    assert content["features"][3]["properties"]["name"] == 'attention (my "50%s" method)'


def test_many_tiles_are_quick(tmp_path):
    k = 50_000
    rng = np.random.default_rng(0)
    coords = np.stack(np.divmod(np.arange(k), 250), 1) * 256
    item = heatmap._Item(
        "s", coords.astype(float), 256.0, rng.exponential(size=k), "attention (abmil)", False, "s", "tumor", ["tumor"]
    )
    heatmap.geojson(replace(item, corners=item.corners[:2], scores=item.scores[:2]))  # imports
    start = time.process_time()
    text = heatmap.geojson(item)
    seconds = time.process_time() - start
    content = json.loads(text)
    assert len(content["features"]) == k
    assert content["features"][-1]["geometry"]["coordinates"][0][2] == (coords[-1] + 256).tolist()
    assert seconds < 1


def test_the_side_of_tiles_is_never_guessed(tmp_path):
    path = one(tmp_path, patch_size=None)
    with pytest.raises(DataError, match=r"s1\.a: the side of its tiles is not known; give it with --patch-size"):
        write_heatmaps(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ring = drawn(path, patch_size=300)["features"][0]["geometry"]["coordinates"][0]
    assert ring[2] == [300, 300]
    path = one(tmp_path)
    assert drawn(path, patch_size=300.5)["features"][0]["geometry"]["coordinates"][0][2] == [300.5, 300.5]
    assert drawn(path)["features"][0]["geometry"]["coordinates"][0][2] == [512, 512]


def patches(folder, name, **attributes):
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / name, "w") as file:
        file["coords"] = COORDS
        file["coords"].attrs.update(attributes)


def test_the_side_of_tiles_from_patches(tmp_path):
    path = one(tmp_path, patch_size=None)
    patches(tmp_path / "patches", "s1.a.h5", patch_size=256, patch_level=1, downsample=(4.0, 4.0), level_dim=(1000, 50))
    for folder in (tmp_path, tmp_path / "patches"):  # CLAM
        assert drawn(path, patches=folder)["features"][0]["geometry"]["coordinates"][0][2] == [1024, 1024]
    (tmp_path / "patches" / "s1.a.h5").unlink()
    patches(tmp_path / "patches", "s1.a_patches.h5", patch_size=256, patch_size_level0=512)  # TRIDENT
    assert drawn(path, patches=tmp_path)["features"][0]["geometry"]["coordinates"][0][2] == [512, 512]
    assert drawn(path, patches=tmp_path, patch_size=64)["features"][0]["geometry"]["coordinates"][0][2] == [64, 64]
    with pytest.raises(DataError, match="patches: .* no such folder"):
        write_heatmaps(path, tmp_path / "out", patches=tmp_path / "nowhere")


def test_micrometres_need_the_size_of_a_pixel(tmp_path):
    microns = one(tmp_path, coords=COORDS / 2, patch_size=256.0, coords_unit="um")
    with pytest.raises(DataError, match=r"coordinates are micrometres.* --mpp"):
        write_heatmaps(microns, tmp_path / "out")
    content = drawn(microns, mpp=0.5)
    assert content["features"][3]["geometry"]["coordinates"][0][:3] == [[512, 512], [1024, 512], [1024, 1024]]
    content = drawn(microns, mpp=0.3)
    assert content["features"][3]["geometry"]["coordinates"][0][2] == [1706.67, 1706.67]
    with pytest.raises(DataError, match="no whole numbers, so not pixels"):
        write_heatmaps(one(tmp_path, coords=COORDS + 0.25), tmp_path / "out")
    with pytest.raises(DataError, match="are pixels already; leave out --mpp"):
        write_heatmaps(one(tmp_path, coords_unit="pixel"), tmp_path / "out", mpp=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "acmil"}, r"no scores of 'acmil'; there are: abmil"),
        ({"score": "instance logit"}, r"no score 'instance logit' of abmil; there are: attention"),
        ({"class_": "benign"}, r"no class 'benign'; there are: normal, tumor"),
        ({"class_": "tumor"}, r"nothing to draw \(s1\.a: 'attention' of abmil is one number a tile"),
        ({"items": ["s2"]}, r"no item s2; there are: s1\.a"),
        ({"patch_size": 0}, r"patch_size: expected a positive number, got 0"),
        ({"mpp": float("nan")}, r"mpp: expected a positive number"),
        ({"slides": "nowhere"}, r"slides: nowhere: no such folder"),
    ],
)
def test_errors_name_what_is_there(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        write_heatmaps(one(tmp_path), tmp_path / "out", **options)


def test_several_methods_and_items(tmp_path):
    fit = {"abmil": ({}, ABMIL), "mhim(acmil)+aem": ({}, ABMIL)}
    own = {"label": "tumor", "patch_size": 512.0}
    nan = {"attention": np.array([0.1, np.nan, 0.1, 0.1])}
    path = write_scores(
        tmp_path / "instance_scores.h5",
        {
            "a": (own, COORDS, fit),
            "b": (own, None, fit),
            "c": (own, COORDS, {"abmil": ({}, ABMIL)}),
            "d": (own, COORDS[:3], fit),
            "e": (own, COORDS, {"mhim(acmil)+aem": ({}, nan)}),
            "f": (own, COORDS + 7, fit),
        },
    )
    with pytest.raises(DataError, match=r"several methods; choose one with --method: abmil, mhim\(acmil\)\+aem"):
        write_heatmaps(tmp_path, tmp_path / "out")
    calls = []
    done = write_heatmaps(tmp_path, tmp_path / "out", method="mhim(acmil)+aem", progress=lambda *n: calls.append(n))
    assert [file.name for file in done.files] == ["a.geojson", "a.png", "f.geojson", "f.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [file.name for file in done.files]
    assert dict(done.skipped) == {
        "b": "its tiles have no coordinates",
        "c": "no scores of mhim(acmil)+aem",
        "d": "4 scores for 3 tiles",
        "e": "'attention' of mhim(acmil)+aem holds NaN or infinity",
    }
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(write_heatmaps(path, tmp_path / "two", method="abmil", items=["f"]).files) == 2
    with pytest.raises(DataError, match=r"nothing to draw \(b: its tiles have no coordinates\)"):
        write_heatmaps(path, tmp_path / "three", method="abmil", items=["b"])
    assert not (tmp_path / "three").exists()


def test_files_of_another_kind(tmp_path):
    with pytest.raises(DataError, match=r"no such file; `classact compare`"):
        write_heatmaps(tmp_path, tmp_path / "out")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["s1/coords"] = COORDS
        file["s1/abmil"] = np.ones(4)
        file["features"] = np.ones((4, 2))
    with pytest.raises(DataError, match="holds no scores of any method"):
        write_heatmaps(tmp_path / "x.h5", tmp_path / "out")


def tissue(path, width, height):
    """Pink tissue in the left half of a white slide."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[:, : width // 2] = (230, 150, 190)
    Image.fromarray(pixels).save(path)


def test_picture_over_a_thumbnail(tmp_path, pictures):
    path = one(tmp_path, CLASSES)
    tissue(tmp_path / "thumbnails" / "s1.a.jpg", 200, 100)
    done = write_heatmaps(path, tmp_path / "out", slides=tmp_path)
    assert [file.suffix for file in done.files] == [".geojson"]
    assert done.skipped[0][1].startswith("no picture: a thumbnail alone does not say how large the slide is")
    patches(tmp_path / "patches", "s1.a_patches.h5", level0_width=4096, level0_height=2050)
    done = write_heatmaps(path, tmp_path / "out", slides=tmp_path / "thumbnails", patches=tmp_path)
    assert [file.suffix for file in done.files] == [".geojson", ".png"]
    item, (image, size) = pictures[0]
    assert image.shape == (100, 200, 3) and size == (4096, 2050)
    assert item.title == "s1.a\nattention x class logit for tumor (abmil)\npredicted tumor (0.75), label normal"
    (tmp_path / "sizes.csv").write_text("slide_id,width,height\ns1.a.svs,4096,2048\n")
    write_heatmaps(path, tmp_path / "out", slides=tmp_path, sizes=tmp_path / "sizes.csv")
    assert pictures[1][1][1] == (4096, 2048)
    (tmp_path / "sizes.csv").write_text("slide_id,width,height\ns1.a,2048,4096\n")
    done = write_heatmaps(path, tmp_path / "out", slides=tmp_path, sizes=tmp_path / "sizes.csv")
    assert "the thumbnail (200 x 100) has other proportions than the slide (2048 x 4096)" in done.skipped[0][1]
    (tmp_path / "thumbnails" / "s1.a.jpg").write_bytes(b"no picture")
    done = write_heatmaps(path, tmp_path / "out", slides=tmp_path, patches=tmp_path)
    assert "cannot be read" in done.skipped[0][1]
    (tmp_path / "thumbnails" / "s1.a.jpg").unlink()
    done = write_heatmaps(path, tmp_path / "out", slides=tmp_path, patches=tmp_path)
    assert done.skipped == [("s1.a", "no picture: no thumbnail or slide of this name")]
    for bad in ("slide,width\n", "slide_id,width,height\ns,1,x\n", "slide_id,width,height\ns,1,0\n"):
        (tmp_path / "sizes.csv").write_text(bad + "s,1\n")
        with pytest.raises(DataError, match=r"sizes\.csv: expected"):
            write_heatmaps(path, tmp_path / "out", slides=tmp_path, sizes=tmp_path / "sizes.csv")


def test_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(heatmap, "_png", DRAW)
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(0, 20_000, 512), np.arange(0, 12_000, 512)), -1).reshape(-1, 2)
    scores = {"attention": rng.dirichlet(np.full(len(coords), 0.3)).astype(np.float32)}
    path = one(tmp_path, scores, coords)
    tissue(tmp_path / "thumbnails" / "s1.a.jpg", 1000, 400)
    (tmp_path / "sizes.csv").write_text("slide_id,width,height\ns1.a,40000,16000\n")
    done = write_heatmaps(path, tmp_path / "over", slides=tmp_path, sizes=tmp_path / "sizes.csv")
    assert not done.skipped
    pixels = np.asarray(Image.open(done.files[1]).convert("RGB")).astype(int)
    tissue_alone = (np.abs(pixels - (230, 150, 190)).sum(-1) < 12).mean()
    white = (pixels.sum(-1) == 765).mean()
    # 20,480 x 12,288 of 40,000 x 16,000 pixels are tiles: a quarter of the tissue is bare
    assert 0.05 < tissue_alone < 0.15 and 0.3 < white < 0.75
    done = write_heatmaps(path, tmp_path / "bare")
    assert Image.open(done.files[1]).size[0] > 800


class FakeSlide:
    """Stands for openslide.OpenSlide."""

    dimensions = (4096, 2048)

    def __init__(self, path):
        if "broken" in path:
            raise FakeError("Unsupported or missing image file")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get_thumbnail(self, size):
        return Image.new("RGBA", (size[0], size[0] // 2))


class FakeError(Exception):
    pass


def test_whole_slides(tmp_path, monkeypatch, pictures):
    path = one(tmp_path)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "s1.a.svs").touch()
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs OpenSlide: pip install openslide-python"):
        write_heatmaps(path, tmp_path / "out", slides=tmp_path / "slides")
    assert not (tmp_path / "out").exists()
    fake = SimpleNamespace(OpenSlide=FakeSlide, OpenSlideError=FakeError)
    monkeypatch.setitem(sys.modules, "openslide", fake)
    write_heatmaps(path, tmp_path / "out", slides=tmp_path / "slides")
    image, size = pictures[0][1]
    assert image.shape == (500, 1000, 3) and size == (4096, 2048)
    tissue(tmp_path / "slides" / "s1.a.png", 200, 100)  # beside the slide: the slide says how large it is
    write_heatmaps(path, tmp_path / "out", slides=tmp_path / "slides")
    image, size = pictures[1][1]
    assert image.shape == (100, 200, 3) and size == (4096, 2048)
    (tmp_path / "slides" / "s1.a.png").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "s1.a.svs").touch()
    done = write_heatmaps(path, tmp_path / "out", slides=tmp_path / "broken")
    assert done.skipped == [("s1.a", "no picture: cannot be read: Unsupported or missing image file")]
