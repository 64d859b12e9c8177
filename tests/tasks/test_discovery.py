import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans
from typer.testing import CliRunner

from classact.cli import app
from classact.data.unlabelled import PartlyLabelled, load_unlabelled
from classact.discover.found import load
from classact.discover.metrics import cluster_accuracy
from classact.evidence.discovery import draw
from classact.evidence.store import StudyError
from classact.tasks.discovery import Builder, compare_discovery, discover_classes


def blobs(n=40, known=3, novel=2, spread=0.5, seed=0, truth=True):
    """Five blobs at the corners of a simplex, of which three are known."""
    rng, k = np.random.default_rng(seed), known + novel
    y = np.repeat(np.arange(k), n)
    x = 6 * np.eye(k)[y] + spread * rng.normal(size=(len(y), k))
    names = np.array([f"c{c}" for c in y], object)
    labels = np.where(y < known, y, -1)
    items = tuple(map(str, range(len(y))))
    return PartlyLabelled("blobs", x, labels, ("c0", "c1", "c2"), items, (), names if truth else None)


class Mine:
    """A user's own method."""

    def __init__(self, n_clusters, random_state):
        self.n_clusters_, self.seed = n_clusters or 2, random_state

    def fit(self, X, y):
        self.model = KMeans(self.n_clusters_, n_init=1, random_state=self.seed).fit(X[y < 0])
        self.labels_ = np.full(len(y), -1)
        self.labels_[y < 0] = self.model.labels_
        return self

    def predict(self, X):
        return self.model.predict(X)


def mine(n_clusters, random_state):
    return Mine(n_clusters, random_state)


def test_planted_classes_are_found_by_every_method(tmp_path):
    methods = ["kmeans", "spectral", "ncd-kmeans", "ncd-spectral", f"{__name__}:mine"]
    found = compare_discovery("ncd-table", blobs(), methods, n_novel=2, seeds=2, out=tmp_path, quiet=True)
    for row in found.rows:
        assert row.transductive["accuracy"].effect == row.inductive["accuracy"].effect == 1
        assert row.transductive["ari"].effect == row.agreement == 1
        assert row.n_found == (2, 2) and row.hidden.effect == 1
        assert row.known.effect == 1 or not np.isfinite(row.known.effect)
    assert "No method is better than kmeans beyond doubt." in found.summary
    assert {"report.html", "results.csv", "table.tex", "table.txt", "scores.png", "found.png"} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert len(found.table) == 5
    cells = pd.read_csv(tmp_path / "cells.csv")
    assert len(cells) == 5 * 2 and cells["transductive_accuracy"].eq(1).all() and cells["seed"].nunique() == 2


def test_without_truth_it_ranks_by_hidden_classes_and_says_what_is_unknown(tmp_path):
    found = compare_discovery("ncd-table", blobs(12, truth=False), ["ncd-kmeans"], seeds=2, out=tmp_path, quiet=True)
    assert found.rows[0].transductive == {} and found.rows[0].n_found == (2, 2)
    assert "unknown, since no true classes were given" in found.summary[0]
    page = (tmp_path / "report.html").read_text()
    assert "transductive" not in page and "estimated by every method" in page
    scores = [row.hidden.effect for row in found.rows]
    assert scores == sorted(scores, reverse=True)


def test_nothing_depends_on_the_truth(tmp_path):
    data = blobs(spread=2.0)
    wrong = np.random.default_rng(0).permutation(data.truth)
    shuffled = PartlyLabelled(data.name, data.x, data.y, data.classes, data.items, (), wrong)
    options = {"seeds": 2, "tune": 2, "n_novel": 2, "quiet": True}
    found = [
        compare_discovery("ncd-table", one, ["ncd-spectral"], out=tmp_path / str(number), **options)
        for number, one in enumerate((data, shuffled))
    ]
    by_name = [{row.method: row for row in one.rows} for one in found]
    for name in ("kmeans", "ncd-spectral"):
        first, second = (of[name] for of in by_name)
        assert first.n_found == second.n_found and first.hidden == second.hidden
        assert first.agreement == second.agreement and first.silhouette == second.silhouette
        np.testing.assert_array_equal(found[0].pictures[name]["labels"], found[1].pictures[name]["labels"])


@pytest.mark.parametrize("method", ["kmeans", "spectral", "ncd-kmeans", "ncd-spectral", "pbn"])
def test_prediction_of_a_row_does_not_depend_on_the_others(method):
    data = blobs(n=20, spread=2.0)
    fit, held = draw(data.y, 0)
    build = Builder("ncd-table", 0)
    model = build(method, 2, 0)
    if method == "pbn":
        model.pipeline[-1].set_params(epochs=3)
    model.fit(data.x[fit], data.y[fit])
    together = model.predict(data.x[held])
    alone = np.concatenate([model.predict(data.x[[row]]) for row in held])
    np.testing.assert_array_equal(together, alone)


def test_a_quarter_of_every_class_is_held_out():
    y = blobs().y
    fit, held = draw(y, 3)
    assert sorted([*fit, *held]) == list(range(len(y)))
    for value in np.unique(y):
        assert (y[held] == value).sum() == (y == value).sum() / 4
    assert not np.array_equal(draw(y, 4)[1], held)


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = blobs(n=24)
    lines = [
        ",".join(map(str, x)) + f",{'' if y < 0 else y},{t}" for x, y, t in zip(rows.x, rows.y, rows.truth, strict=True)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,c,d,e,label,kind", *lines]))
    args = ["compare", "ncd-table", "t.csv", "--methods", "ncd-kmeans", "--truth", "kind", "--seeds", "2"]
    args += ["--novel", "2"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "Seen accuracy" in done.output and "Report: report/report.html" in done.output
    broken = CliRunner().invoke(app, [*args[:2], "t.csv", "--label", "kind", "--truth", "label"])
    assert broken.exit_code == 1


def test_classes_are_found_named_saved_and_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = blobs(n=24)
    lines = [",".join(map(str, x)) + f",{'' if y < 0 else y}" for x, y in zip(rows.x, rows.y, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,c,d,e,label", *lines]))
    args = ["discover", "t.csv", "--method", "ncd-kmeans", "--novel", "2", "--seeds", "2", "--out", "found"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "ncd-kmeans: as asked for." in done.output and "novel_2" in done.output
    table = pd.read_csv("found/labelled.csv")
    assert cluster_accuracy(rows.truth, table["class"].astype(str)) == 1
    sure = table["confidence"]
    assert sure[~table["was_labelled"]].eq(1).all() and sure[table["was_labelled"]].isna().all()
    typical = pd.read_csv("found/typical.csv")
    assert len(typical) == 20 and typical.groupby("class")["rank"].max().eq(10).all()
    page = (tmp_path / "found" / "report.html").read_text()
    assert "2 classes found" in page and "novel_1: 24 items" in page
    found = load("found/model.joblib")
    tomorrow = blobs(n=5, seed=1)
    names = found.predict(pd.DataFrame(tomorrow.x[:, ::-1], columns=list("edcba")))
    assert set(names) == {"novel_1", "novel_2"}
    every = found.predict(tomorrow.x, among="all")
    assert (every[:15] == np.repeat(["0", "1", "2"], 5)).all() and cluster_accuracy(tomorrow.truth, every) == 1
    with pytest.raises(ValueError, match="there is no e"):
        found.predict(pd.DataFrame(tomorrow.x[:, :4], columns=list("abcd")))
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 5\), got \(25, 4\)"):
        found.predict(tomorrow.x[:, :4])


def test_auto_takes_the_method_that_finds_hidden_classes_best(tmp_path):
    data = blobs(n=16, spread=2.0)
    result = discover_classes(data, n_novel=2, seeds=2, out=tmp_path, quiet=True)
    table = pd.read_csv(tmp_path / "comparison" / "results.csv")
    assert result.method == table["method"][0] and "found hidden known classes best" in result.why
    assert table["hidden_accuracy"].max() == table["hidden_accuracy"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["kmean"]}, "kmean: no such method; did you mean kmeans"),
        ({"methods": ["nowhere:mine"]}, "nowhere:mine: No module named"),
        ({"seeds": 1}, "seeds: expected at least 2, got 1"),
        ({"n_novel": 100}, "n_novel: expected 2 to 40 for 80 unlabelled items, got 100"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(StudyError, match=message):
        compare_discovery("ncd-table", blobs(), out=tmp_path, quiet=True, **options)


def test_too_few_unlabelled_items(tmp_path):
    full = load_unlabelled("digits")
    labelled = PartlyLabelled("digits", full.x, np.where(full.y < 0, 0, full.y), full.classes, full.items)
    with pytest.raises(StudyError, match="digits: 0 unlabelled items; expected at least 8"):
        compare_discovery("ncd-table", labelled, out=tmp_path, quiet=True)


def pictures(n=24, seed=0):
    """Three known patterns in 8 x 8 pixels, and two novel ones, blocks and chequers."""
    rng, y = np.random.default_rng(seed), np.repeat(np.arange(5), n)
    rows, columns = np.mgrid[:8, :8]
    patterns = (rows % 4 == 0, columns % 4 == 0, rows == columns, (rows < 4) & (columns < 4), (rows + columns) % 2 == 0)
    x = 0.8 * np.stack(patterns)[y][:, None] + 0.1 * rng.random((len(y), 1, 8, 8))
    names = np.array([f"c{c}" for c in y], object)
    labels, items = np.where(y < 3, y, -1), tuple(map(str, range(len(y))))
    return PartlyLabelled("patterns", x.astype(np.float32), labels, ("c0", "c1", "c2"), items, (), names)


@pytest.mark.parametrize("method", ["known-features", "hypersphere", "uno", "crkd"])
def test_networks_find_classes_of_images(method):
    data = pictures()
    model = Builder("ncd-image", 0, (1, 8, 8))(method, 2, 0)
    model.pipeline[-1].set_params(steps=(20, 30))
    model.fit(data.x, data.y)
    assert cluster_accuracy(data.truth[data.unlabelled], model.labels_[data.unlabelled]) > 0.9
    assert (model.labels_[~data.unlabelled] == -1).all()
    new = pictures(4, seed=1)
    assert (model.predict_known(new.x[:12]) == new.y[:12]).mean() > 0.9
    together = model.predict(new.x[12:])
    np.testing.assert_array_equal(together, np.concatenate([model.predict(one[None]) for one in new.x[12:]]))
    np.testing.assert_allclose(np.linalg.norm(model.transform(new.x), axis=1), 1, rtol=1e-5)
    again = Builder("ncd-image", 0, (1, 8, 8))(method, 2, 0)
    again.pipeline[-1].set_params(steps=(20, 30))
    np.testing.assert_array_equal(again.fit(data.x, data.y).labels_, model.labels_)


def test_number_of_classes_of_images_is_estimated():
    data = pictures()
    model = Builder("ncd-image", 0, (1, 8, 8))("known-features", None, 0)
    model.pipeline[-1].set_params(steps=(20, 30))
    assert model.fit(data.x, data.y).n_clusters_ == 2


def test_classes_of_images_are_found_shown_and_predicted(tmp_path):
    result = discover_classes(pictures(), "ncd-kmeans", n_novel=2, seeds=2, out=tmp_path, quiet=True)
    assert cluster_accuracy(result.data.truth, result.names) == 1
    assert list(pd.read_csv(tmp_path / "labelled.csv")) == ["item", "class", "confidence", "was_labelled"]
    assert "typical items" in (tmp_path / "report.html").read_text()
    assert set(load(tmp_path / "model.joblib").predict(pictures(3, seed=2).x)) == {"novel_1", "novel_2"}


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [("ncd-image", blobs(), "rows of a table; the task for them is ncd-table"), ("ncd-table", pictures(), "images")],
)
def test_tables_and_images_are_not_mixed_up(task, data, message, tmp_path):
    with pytest.raises(StudyError, match=message):
        compare_discovery(task, data, ["kmeans"], out=tmp_path, quiet=True)


@pytest.mark.bare
def test_bad_input_of_networks():
    data = pictures()
    one = np.where(data.y == 0, 0, -1)
    for method, y, message in (
        ("crkd", one, "y: crkd learns to tell known classes apart and needs two of them, got 1; kmeans, spectral"),
        ("crkd", np.abs(data.y), "y: expected unlabelled images"),
    ):
        with pytest.raises(ValueError, match=message):
            Builder("ncd-image", 0, (1, 8, 8))(method, 2, 0).fit(data.x, y)
    with pytest.raises(ValueError, match=r"X: expected flattened images \(n, 784\)"):
        Builder("ncd-image", 0, (1, 28, 28))("crkd", 2, 0).fit(data.x, data.y)
    with pytest.raises(ValueError, match="encoder: timm has no model resnet_none"):
        Builder("ncd-image", 0, (1, 8, 8), "resnet_none")("crkd", 2, 0).fit(data.x, data.y)
