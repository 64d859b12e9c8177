import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier
from typer.testing import CliRunner

from classact.cli import app
from classact.data.bag_files import DataError
from classact.discover.label_metrics import LabelMetric
from classact.evidence.store import StudyError
from classact.tasks.label_space import LabelSpace, Problem, compare_label_space, load_label_space, read_metric


def line(n=240, grades=6, noise=0.4, seed=0):
    """One feature that is the grade, but for noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(grades, size=n)
    return LabelSpace("line", (y + noise * rng.normal(size=n))[:, None], y.astype(str), read_metric("order", "012345"))


def first_observed(problem: Problem) -> np.ndarray:
    """A user's own method."""
    return np.repeat(problem.observed[0], len(problem.probs))


def most_frequent(random_state):
    return DummyClassifier(random_state=random_state)


def test_hidden_grades_between_others_are_predicted(tmp_path):
    methods = ["loki", "loki-nll", "loki-leave-class-out", "scrambled", "center", f"{__name__}:first_observed"]
    found = compare_label_space(line(), methods, hide=["2", "4"], seeds=3, out=tmp_path, quiet=True)
    rows = {row.method: row for row in found.rows}
    assert set(rows) == {"argmax", *methods}
    assert rows["argmax"].hidden_accuracy.effect == 0 < rows["loki"].hidden_accuracy.effect
    assert rows["loki"].squared.effect < rows["argmax"].squared.effect < rows["center"].squared.effect
    assert rows["loki"].squared_hidden.effect < rows["argmax"].squared_hidden.effect
    assert [row.squared.effect for row in found.rows] == sorted(row.squared.effect for row in found.rows)
    assert found.facts["Labels that can be predicted"].startswith("6 of 6")
    names = {file.name for file in tmp_path.iterdir()}
    assert {"report.html", "results.csv", "cells.csv", "table.txt", "table.tex", "distances.png"} <= names
    assert len(pd.read_csv(tmp_path / "cells.csv")) == 3 * 7
    page = (tmp_path / "report.html").read_text()
    assert "2, 4" in page and "corrected for that" in page


def test_what_cannot_be_reached_is_named_and_what_to_label_next(tmp_path):
    found = compare_label_space(line(), ["loki"], hide=["0", "5"], seeds=2, out=tmp_path, quiet=True)
    assert found.facts["Labels that can be predicted"].endswith("but the hidden ones are observed; not 0, 5")
    assert found.facts["Worth labelling next"] == "0, 5"


def test_under_equal_distances_the_rule_is_argmax(tmp_path):
    space = line(noise=1.5)
    discrete = LabelSpace("discrete", space.x, space.y, LabelMetric.discrete(list("012345")))
    found = compare_label_space(discrete, ["loki"], seeds=2, hidden_share=0.0, out=tmp_path, quiet=True)
    first, second = found.rows
    assert first.squared == second.squared and first.accuracy == second.accuracy
    assert np.isnan(first.squared_hidden.effect)


def test_an_own_classifier(tmp_path):
    options = {"seeds": 2, "out": tmp_path, "quiet": True}
    found = compare_label_space(line(), ["center"], classifier=f"{__name__}:most_frequent", **options)
    assert {row.accuracy.effect < 0.4 for row in found.rows} == {True}


@pytest.mark.parametrize(
    ("text", "pair", "distance"),
    [
        ("child,parent\ncat,feline\nlion,feline\nfeline,animal\ndog,animal\n", ("cat", "dog"), 3),
        ("child,parent,length\ncat,animal,0.5\ndog,animal,2\nanimal,,\n", ("cat", "dog"), 2.5),
        ("source,target\ncat,lion\nlion,dog\ndog,cow\ncow,cat\n", ("cat", "dog"), 2),
        ("source,target,length\ncat,lion,1\nlion,dog,5\n", ("cat", "dog"), 6),
        (",dog,cat\ncat,4,0\ndog,0,4\n", ("cat", "dog"), 4),
    ],
)
def test_distances_come_as_tree_graph_or_table(tmp_path, text, pair, distance):
    (tmp_path / "metric.csv").write_text(text)
    assert read_metric(tmp_path / "metric.csv", pair).distances([pair[0]], [pair[1]]) == distance


def test_distances_come_as_embeddings(tmp_path):
    np.savez(tmp_path / "names.npz", labels=["cat", "dog"], embeddings=[[0.0, 3.0], [4.0, 0.0]])
    assert read_metric(tmp_path / "names.npz", ["cat"]).distances(["cat"], ["dog"]) == 5


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = line()
    rows = [f"{x},{'abcdef'[int(y)]}" for x, y in zip(space.x[:, 0], space.y, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["x,label", *rows]))
    (tmp_path / "tree.csv").write_text(
        "child,parent\n" + "".join(f"{c},{'low' if c < 'd' else 'high'}\n" for c in "abcdef") + "low,all\nhigh,all\n"
    )
    args = ["compare", "label-space", "t.csv", "--metric", "tree.csv", "--methods", "loki", "--seeds", "2"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "Labels that can be predicted: 9 of 9" in done.output and "Report: report/report.html" in done.output
    broken = CliRunner().invoke(app, args[:3])
    assert broken.exit_code == 1 and "labels such as a are not numbers on a line" in broken.output


@pytest.mark.bare
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",dog,cat\ncat,4,0\ndog,0,3\n", "symmetric"),
        (",dog,cat\ncat,-4,0\ndog,0,-4\n", "negative"),
        (",dog,cow\ncat,4,0\ndog,0,3\n", "expected columns child and parent, or source and target, or a square"),
        ("source,target\ncat,lion\ndog,cow\n", "connected"),
        ("child,parent\ncat,a\ncat,b\ndog,a\n", "1 nodes have two parents"),
        ("source,target\nlion,cow\n", "no distances for the labels cat, dog"),
    ],
)
def test_bad_distances(tmp_path, text, message):
    (tmp_path / "metric.csv").write_text(text)
    (tmp_path / "t.csv").write_text("x,label\n" + "1,cat\n2,dog\n" * 5)
    with pytest.raises(DataError, match=message):
        load_label_space(tmp_path / "t.csv", tmp_path / "metric.csv")


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lokki"]}, "lokki: no such method; did you mean loki?"),
        ({"methods": ["nowhere:it"]}, "nowhere:it: No module named"),
        ({"hide": ["9"]}, "hide: no class 9; there are 0, 1"),
        ({"hidden_share": 1.0}, "hidden_share: expected a number from 0 to below 1"),
        ({"hide": list("01234")}, "6 classes, of which 5 are hidden; a classifier needs at least 2"),
        ({"seeds": 1}, "seeds: expected at least 2, got 1"),
        ({"classifier": "tree"}, "classifier: expected logistic, forest or package.module:factory, got tree"),
    ],
)
def test_bad_requests(options, message, tmp_path):
    with pytest.raises(StudyError, match=message):
        compare_label_space(line(), out=tmp_path, quiet=True, **options)


@pytest.mark.bare
def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_metric(tmp_path / "none.csv", ["a"])
    np.savez(tmp_path / "names.npz", labels=["cat", "dog"])
    with pytest.raises(DataError, match="there is no embeddings"):
        read_metric(tmp_path / "names.npz", ["cat"])
