"""`classact explain` and `compare cams` on a network whose reasons are known: red for one class, blue for another."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from classact.cli import app
from classact.data.bag_files import DataError
from classact.data.networks import Network, Preprocess
from classact.explain.report import explain_images
from classact.tasks.cams import compare_cams

SIZE = 32
FACTORY = '''
import torch
from torch import nn


class Side(nn.Module):
    """Class 0 is the amount of red, class 1 that of blue; a third class never wins."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 2, 4, stride=4)
        self.act = nn.ReLU()
        self.head = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.features.weight.fill_(-0.5 / 16)
            self.features.weight[0, 0], self.features.weight[1, 2] = 1 / 16, 1 / 16
            self.features.bias.fill_(-0.2)
            self.head.weight.copy_(torch.tensor([[30.0, -10.0], [-10.0, 30.0], [-30.0, -30.0]]))

    def forward(self, x):
        return self.head(self.act(self.features(x)).mean((2, 3)))


def side():
    return Side()


def logit():
    return nn.Sequential(Side(), nn.Linear(3, 1))


def maps(model, x, target):
    return x.mean(1)


def flat(model, x, target):
    return x.mean((1, 2, 3))
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "sides.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(6):  # a large patch of one colour, a small one of the other
        picture = rng.integers(0, 40, (SIZE, SIZE, 3), dtype=np.uint8)
        colour = 0 if number % 2 == 0 else 2
        picture[4:20, 4:20, colour] = 255
        picture[24:28, 24:28, 2 - colour] = 255
        folder = tmp_path / "images" / ("red", "blue")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    (tmp_path / "names.txt").write_text("red\nblue\nnothing\n")
    (tmp_path / "t.json").write_text(json.dumps({"resize": SIZE, "crop": SIZE, "mean": [0, 0, 0], "std": [1, 1, 1]}))
    return tmp_path


@pytest.fixture
def network(place):
    import sides

    return Network(
        "side", sides.side().eval(), Preprocess(SIZE, SIZE, (0, 0, 0), (1, 1, 1)), ["red", "blue", "nothing"]
    )


def call(place, *words):
    options = ["--model", "sides:side", "--preprocess", str(place / "t.json"), "--classes", str(place / "names.txt")]
    return CliRunner().invoke(app, ["explain", str(place / "images"), *options, "--out", str(place / "out"), *words])


def test_the_command_writes_maps_numbers_and_a_page(place):
    (place / "images" / "red" / "bad.jpg").write_text("x")
    result = call(place, "--methods", "gradcam,eigencam,sides:maps", "--steps", "4", "--layer", "act")
    assert result.exit_code == 0, result.output
    assert "mean 0, 0, 0" in result.output, "the transform is printed"
    assert "accuracy on 6 images in class folders: 1.000" in result.output
    assert "bad.jpg: not a readable image" in result.output
    out = place / "out"
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["name"] for row in rows if row["rank"] == "1"] == ["blue"] * 3 + ["red"] * 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == 6 * 4
    assert 'src="http' not in page
    assert "1 images could not be read" in page
    arrays = np.load(out / "maps" / "blue__1.png.npz")
    assert arrays["gradcam/1"].shape == (SIZE, SIZE)
    assert arrays["gradcam/1"][4:20, 4:20].sum() > 0.8 * arrays["gradcam/1"].sum()
    record = json.loads((out / "items" / "blue__1.png.json").read_text())
    entry = record["maps"][0]
    assert entry["method"] == "gradcam" and entry["name"] == "blue"
    assert set(entry["gain"]) == {"blur", "mean"}
    assert (out / entry["overlay"]).exists()


def test_a_finished_image_is_not_computed_again(place, network, monkeypatch):
    explain_images(
        place / "images", network, methods=["gradcam"], out=place / "out", trust_maps=False, say=lambda _: None
    )
    kept = (place / "out" / "items" / "red__0.png.json").read_bytes()
    (place / "out" / "items" / "red__2.png.json").unlink()

    from classact.explain import report

    explained = []
    original = report._Run._explain
    monkeypatch.setattr(
        report._Run, "_explain", lambda run, names, x: (explained.extend(names), original(run, names, x))
    )
    found = explain_images(
        place / "images", network, methods=["gradcam"], out=place / "out", trust_maps=False, say=lambda _: None
    )
    assert explained == ["red/2.png"]
    assert len(found.items) == 6
    assert (place / "out" / "items" / "red__0.png.json").read_bytes() == kept
    with pytest.raises(DataError, match="holds a report of other settings"):
        explain_images(place / "images", network, methods=["eigencam"], out=place / "out", say=lambda _: None)


def test_accuracy_near_chance_is_warned_of(place):
    (place / "names.txt").write_text("blue\nred\nnothing\n")
    result = call(place, "--methods", "gradcam", "--no-trust")
    assert "WARNING: the accuracy is near chance" in result.output
    assert "near chance" in (place / "out" / "report.html").read_text()


def test_flags_say_what_a_map_is_worth(place, network):
    found = explain_images(
        place / "images", network, methods=["gradcam", "sides:maps"], out=place / "out", steps=8, say=lambda _: None
    )
    by = {
        method: [m for i in found.items for m in i["maps"] if m["method"] == method]
        for method in ("gradcam", "sides:maps")
    }
    assert all(m["other_class"] < 0.7 for m in by["gradcam"])
    assert all(m["other_class"] > 0.99 and m["randomized"][-1] > 0.99 for m in by["sides:maps"])
    assert all(m["beats"]["uniform"] for m in by["gradcam"]), "a map of ones must never look good"
    from classact.explain.page import remarks

    said = [text for _, text in remarks(by["sides:maps"][0])]
    assert any("hardly changes when the network is shuffled" in text for text in said)
    assert any("nearly the same for another class" in text for text in said)


def test_several_targets_and_names(place, network):
    found = explain_images(
        place / "images",
        network,
        methods=["gradcam"],
        target="top2",
        out=place / "a",
        trust_maps=False,
        say=lambda _: None,
    )
    assert [m["class"] for m in found.items[0]["maps"]] == [1, 0]
    found = explain_images(
        place / "images",
        network,
        methods=["gradcam"],
        target="blue",
        out=place / "b",
        trust_maps=False,
        say=lambda _: None,
    )
    assert {m["name"] for item in found.items for m in item["maps"]} == {"blue"}
    found = explain_images(
        place / "images",
        network,
        methods=["gradcam"],
        target="over:0.9",
        out=place / "c",
        trust_maps=False,
        say=lambda _: None,
    )
    assert found.items[0]["predictions"][0]["name"] == "blue"


def test_one_logit_explains_the_positive_class_and_on_request_the_negative(place, network):
    import sides

    torch.manual_seed(0)
    single = Network("one", sides.logit().eval(), network.preprocess, [])
    options = {"methods": ["gradcam"], "layer": "0.act", "trust_maps": False, "say": lambda _: None}
    found = explain_images(place / "images", single, out=place / "a", **options)
    assert {m["name"] for item in found.items for m in item["maps"]} == {"positive"}
    found = explain_images(place / "images", single, out=place / "b", target="0", **options)
    assert {m["name"] for item in found.items for m in item["maps"]} == {"negative"}


def test_tiles_are_stitched_in_the_coordinates_of_the_image(place, network):
    wide = np.zeros((SIZE, 4 * SIZE, 3), np.uint8)
    wide[:, 3 * SIZE + SIZE // 2 :, 2] = 255  # the right half of the last tile is blue
    (place / "frame").mkdir()
    Image.fromarray(wide).save(place / "frame" / "a.png")
    found = explain_images(
        place / "frame", network, methods=["gradcam"], target="blue", tile=SIZE, overlap=SIZE // 2, layer="act",
        out=place / "out", say=lambda _: None,
    )  # fmt: skip
    one = np.load(place / "out" / "maps" / "a.png.npz")["gradcam/1"]
    assert one.shape == (SIZE, 4 * SIZE)
    assert one[:, 3 * SIZE + SIZE // 2 :].mean() > 10 * one[:, : 2 * SIZE].mean()
    assert found.items[0]["shape"] == [SIZE, 4 * SIZE]


def test_native_size_keeps_images_of_every_shape(place, network):
    fully = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    Image.fromarray(np.full((20, 50, 3), 99, np.uint8)).save(place / "images" / "red" / "long.png")
    found = explain_images(
        place / "images", Network("conv", fully, network.preprocess, []), size="native", methods=["gradcam"],
        trust_maps=False, out=place / "out", say=lambda _: None,
    )  # fmt: skip
    assert sorted({tuple(item["shape"]) for item in found.items}) == [(20, 50), (SIZE, SIZE)]


@pytest.mark.bare
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "gradcamm"], "no method 'gradcamm'; there are gradcam, "),
        (["--methods", "sides:none"], "cannot import sides:none"),
        (["--methods", "sides:flat"], "sides:flat must return a tensor"),
        (["--target", "cat"], "no class 'cat'"),
        (["--layer", "acd"], "no layer 'acd'; there are act"),
        (["--layer", "head"], "has no map of positions"),
        (["--size", "big"], "size must be 'native' or a number"),
        (["--tile", "8", "--overlap", "8"], "overlap must be from 0"),
        (["--steps", "1"], "steps must be at least 2"),
    ],
)
def test_mistakes_are_named(place, words, message):
    result = call(place, *words)
    assert result.exit_code == 1
    assert message in result.output


def test_cams_are_ranked_with_controls_and_intervals(place, network):
    (place / "boxes.csv").write_text("file,x0,y0,x1,y1\n" + "".join(f"{i},4,4,20,20\n" for i in range(6)))
    found = compare_cams(
        place / "images", network, ["gradcam", "eigencam", "sides:maps"], boxes=place / "boxes.csv", layer="act",
        out=place / "out", steps=6, say=lambda _: None,
    )  # fmt: skip
    assert {row["method"] for row in found.rows if row["control"]} == {"uniform", "gaussian", "random", "edges"}
    table = found.table.set_index("method")
    assert table.loc["gradcam", "gain"] > table.loc["gaussian", "gain"]
    assert table.loc["gradcam", "minus_control_low"] <= table.loc["gradcam", "minus_control"]
    assert table.loc["gradcam", "pointing"] == 1
    assert table.loc["uniform", "pointing"] == 0
    assert table.loc["gradcam", "energy"] > 0.8 > table.loc["uniform", "energy"]
    assert table.loc["gradcam", "box_accuracy"] == 1
    assert "Over 6 images" in found.summary[0]
    assert "Which maps are worth using" in (place / "out" / "report.html").read_text()
    assert Path(place / "out" / "cams.csv").exists()


def test_the_command_compares_cams(place):
    result = CliRunner().invoke(
        app,
        ["compare", "cams", str(place / "images"), "--model", "sides:side", "--preprocess", str(place / "t.json"),
         "--methods", "gradcam,gradient", "--layer", "act", "--steps", "3", "--out", str(place / "out")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Over 6 images" in result.output
