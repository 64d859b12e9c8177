import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from classact.cli import app
from classact.data.bag_files import DataError
from classact.data.defects import anomaly_maps, textured_products
from classact.discover.found import load
from classact.discover.metrics import cluster_accuracy
from classact.evidence.discovery import draw
from classact.evidence.store import StudyError
from classact.tasks.inspection import METHODS, compare_sorting, is_inspection, read_truth, sort_defects

VIT = {
    "model_name": "vit_tiny_patch16_224",
    "pretrained": False,
    "img_size": 28,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
}
SMALL = {"encoder": VIT, "options": {"hidden": 16, "projection": 8, "erode": 2, "tau": 6.0}, "epochs": 1}


def write(folder, images, names):
    folder.mkdir(parents=True)
    for image, name in zip(images, names, strict=True):
        Image.fromarray((255 * image.transpose(1, 2, 0)).astype(np.uint8)).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """An inspected product on disk: unlabelled images, good ones, maps, and the truth beside it."""
    root = tmp_path_factory.mktemp("inspection")
    made = textured_products(3, 3, 0, size=32)
    names = [f"part_{k:02d}" for k in range(len(made.y))]
    write(root / "product" / "unlabelled", made.images, names)
    write(root / "product" / "good", textured_products(0, 4, 0, size=32, part=1).images, "abcd")
    (root / "product" / "maps").mkdir()
    for one, name in zip(anomaly_maps(made, 0), names, strict=True):
        np.save(root / "product" / "maps" / f"{name}.npy", one)
    for k, kind in enumerate(made.classes):
        if (made.y == k).any():
            write(root / "truth" / kind, made.images[made.y == k], np.array(names)[made.y == k])
    return root


def test_methods_are_compared_on_a_product(product, tmp_path):
    found = compare_sorting(
        product / "product", truth=product / "truth", n_novel=4, seeds=2, out=tmp_path, quiet=True, **SMALL
    )
    assert {row.method for row in found.rows} == set(METHODS)
    truth = read_truth(product / "truth", [f"part_{k:02d}" for k in range(15)]).astype(str)
    assert len(set(truth)) == 5
    for row in found.rows:
        assert row.n_found == (4, 4)
        for kind, part in ((row.transductive, 0), (row.inductive, 1)):
            scores = []
            for seed, labels in enumerate(found.labels[row.method]):
                items = draw(np.full(15, -1), seed)[part]
                scores.append(cluster_accuracy(truth[items], labels[items]))
            assert kind["accuracy"].effect == pytest.approx(np.mean(scores))
        assert np.isnan(row.hidden.effect) and np.isnan(row.known.effect)
    page = (tmp_path / "report.html").read_text()
    assert "15 unlabelled images" in page and "given" in page
    labels = found.labels["kmeans-crops"][0]
    assert labels.shape == (15,) and labels.min() == 0


def test_maps_are_made_from_good_images_and_numbers_estimated(product, tmp_path):
    bare = tmp_path / "product"
    bare.mkdir()
    for part in ("unlabelled", "good"):
        (bare / part).symlink_to(product / "product" / part)
    found = compare_sorting(
        bare, ["kmeans-images", "anomalyncd"], seeds=2, out=tmp_path / "report", quiet=True, **SMALL
    )
    assert found.rows[0].transductive == {} and min(found.rows[0].n_found) >= 2
    assert "detector made from the good images" in found.facts["Anomaly maps"]


def test_a_prediction_does_not_depend_on_other_images(product):
    from classact.data.inspection import open_inspection
    from classact.tasks.inspection import Sorting

    inspection = open_inspection(product / "product")
    sorting = Sorting(inspection, inspection.maps, VIT, SMALL["options"], {"epochs": 1})
    x = np.arange(15)[:, None]
    for method in METHODS:
        model = sorting(method, 3, 0).fit(x[:10], np.full(10, -1))
        np.testing.assert_array_equal(
            model.predict(x[10:]), np.concatenate([model.predict(x[[k]]) for k in range(10, 15)])
        )


def test_defects_are_sorted_saved_and_predicted(product, tmp_path):
    found = sort_defects(product / "product", n_novel=4, unsure_below=0.3, out=tmp_path, **SMALL)
    table, regions = pd.read_csv(tmp_path / "labelled.csv"), pd.read_csv(tmp_path / "regions.csv")
    assert table["item"].tolist() == [f"part_{k:02d}" for k in range(15)]
    assert set(table["class"]) <= {"normal", "type 1", "type 2", "type 3", "unsure"}
    assert list(regions) == ["item", "left", "top", "right", "bottom", "area", "class", "confidence"]
    assert (regions["area"] > 0).all() and set(regions["item"]) <= set(table["item"])
    page = (tmp_path / "report.html").read_text()
    assert "surest images" in page and "none: trained without them" in page
    model = load(tmp_path / "model.safetensors")
    again = model.predict(found.inspection.images, found.inspection.maps)
    torch.testing.assert_close(again.probabilities, found.predictions.probabilities)


def test_command_line(product, tmp_path, monkeypatch):
    from classact.tasks import inspection

    assert is_inspection(product / "product") and not is_inspection(product)
    monkeypatch.setattr(inspection, "DINO", VIT)
    out = ["--seeds", "2", "--novel", "3", "--out", str(tmp_path)]
    done = CliRunner().invoke(
        app, ["compare", "ncd-image", str(product / "product"), "--methods", "kmeans-crops", *out]
    )
    assert done.exit_code == 0, done.output
    assert "kmeans-crops" in done.output and "unknown, since no true classes were given" in done.output
    for wrong in (
        ["compare", "ncd-image", str(product / "product"), "--tune", "3"],
        ["discover", str(product / "product"), "--method", "pbn"],
    ):
        broken = CliRunner().invoke(app, wrong)
        assert broken.exit_code == 1 and "not for an inspected product" in broken.output


@pytest.mark.bare
def test_bad_requests(product, tmp_path):
    options = {"out": tmp_path, "quiet": True, **SMALL}
    with pytest.raises(StudyError, match="crkd: no such method. For inspected products there are kmeans-images"):
        compare_sorting(product / "product", ["crkd"], **options)
    with pytest.raises(StudyError, match="n_novel: expected 2 to 7 for 15 images, got 9"):
        compare_sorting(product / "product", n_novel=9, **options)
    with pytest.raises(StudyError, match="seeds: expected at least 2, got 1"):
        compare_sorting(product / "product", seeds=1, **options)
    with pytest.raises(DataError, match="none of its images has the name of an unlabelled one"):
        compare_sorting(product / "product", truth=product / "product" / "good", **options)
