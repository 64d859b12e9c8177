import json

import numpy as np
import pandas as pd
import pytest

from classact.data import DataError, open_bags
from classact.data.labels import read_labels, read_splits

BAGS = ["P1-a", "P1-b", "P2-a", "P3"]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "bags"
    root.mkdir()
    for name in BAGS:
        np.savez(root / f"{name}.npz", features=np.ones((2, 3), dtype=np.float32))
    return root


def table(tmp_path, rows, columns, name="labels.csv"):
    path = tmp_path / name
    frame = pd.DataFrame(rows, columns=columns)
    if path.suffix == ".xlsx":
        frame.to_excel(path, index=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


ROWS = [("P1", "P1-a", "x"), ("P1", "P1-b", "x"), ("P2", "P2-a", "y"), ("P3", "P3", "y")]


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.xlsx"])
def test_table_formats(name, tmp_path, folder):
    bags = open_bags(folder, table(tmp_path, ROWS, ("case_id", "slide_id", "label"), name))
    assert bags.classes == ["x", "y"]
    assert bags.labels.tolist() == [0, 0, 1, 1]
    assert bags.groups == ["P1", "P1", "P2", "P3"]


def test_headerless(tmp_path, folder):
    path = tmp_path / "labels.csv"
    path.write_text("P1-a,1\nP1-b,1\nP2-a,0\nP3,0\n")
    bags = open_bags(folder, path, group="slide_id")
    assert bags.labels.tolist() == [1, 1, 0, 0]


def test_keyed_by_patient(tmp_path, folder):
    path = table(tmp_path, [("P1", "x"), ("P2", "y"), ("P3", "y")], ("patient", "label"))
    bags = open_bags(folder, path)
    assert bags.labels.tolist() == [0, 0, 1, 1]
    assert bags.groups == ["P1", "P1", "P2", "P3"]


def test_own_columns_classes_and_group(tmp_path, folder):
    path = table(
        tmp_path,
        [("h1", "P1-a", "x"), ("h1", "P1-b", "x"), ("h2", "P2-a", "y"), ("h2", "P3", "y")],
        ("site", "scan", "dx"),
    )
    bags = open_bags(folder, path, id_column="scan", label_column="dx", group="site", classes=["y", "x"])
    assert bags.classes == ["y", "x"]
    assert bags.labels.tolist() == [1, 1, 0, 0]
    assert bags.groups == ["h1", "h1", "h2", "h2"]


def test_tcga_groups(tmp_path):
    root = tmp_path / "bags"
    root.mkdir()
    names = ["TCGA-AB-1234-01Z-00-DX1", "TCGA-AB-1234-01Z-00-DX2", "TCGA-CD-9999-01Z-00-DX1"]
    for name in names:
        np.savez(root / f"{name}.npz", features=np.ones((2, 3)))
    path = table(tmp_path, list(zip(names, "xxy", strict=True)), ("slide_id", "label"))
    assert open_bags(root, path, group="tcga").groups == ["TCGA-AB-1234"] * 2 + ["TCGA-CD-9999"]


def test_without_a_group_the_run_stops_and_asks(tmp_path, folder):
    path = table(tmp_path, [row[1:] for row in ROWS], ("slide_id", "label"))
    with pytest.raises(
        DataError, match=r"no column 'case_id' .*--group COLUMN, say --group tcga .* or --group slide_id"
    ):
        open_bags(folder, path)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([*ROWS, ("P9", "P9-a", "x")], ("case_id", "slide_id", "label"), "1 rows have no bag: P9-a"),
        (ROWS[:3], ("case_id", "slide_id", "label"), r"labels\.csv: no label for 1 of 4 bags: P3"),
        (
            [("P9", f"Q{i}", "xy"[i % 2]) for i in range(3)],
            ("case_id", "slide_id", "label"),
            r"no label in 'label' for any of 4 bags: P1-a, .* \(names in 'slide_id' look like Q0, Q1, ... \(1 more\)\)",
        ),
        (ROWS, ("case_id", "slide_id", "outcome"), "no column of labels among case_id, slide_id, outcome"),
        (
            [(*r[:2], 12.5, 1) for r in ROWS],
            ("case_id", "slide_id", "survival_months", "censorship"),
            "a table of survival times",
        ),
        (
            [(*r[:2], 1, 0) for r in ROWS],
            ("case_id", "slide_id", "label_er", "label_pr"),
            "several labels per bag .label_er, label_pr",
        ),
        ([(*r[:2], "x;y") for r in ROWS], ("case_id", "slide_id", "label"), "several labels per bag .'x;y' in 'label'"),
        ([*ROWS, ("P3", "P3", "x")], ("case_id", "slide_id", "label"), "slide_id 'P3' has two labels: 'y' and 'x'"),
        (
            [*ROWS[:3], ("P3", "P3", None)],
            ("case_id", "slide_id", "label"),
            "line 5: no value in 'slide_id' or 'label'",
        ),
        ([(*r[:2], "x") for r in ROWS], ("case_id", "slide_id", "label"), "expected at least two classes, found x"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit(rows, columns, message, tmp_path, folder):
    with pytest.raises(DataError, match=message):
        open_bags(folder, table(tmp_path, rows, columns))


def test_what_does_not_match_is_listed_where_it_may_be_left_out(tmp_path, folder):
    rows = [ROWS[0], *ROWS[2:], ("P9", "P9-a", "x"), ("P8", "P8-a", "y")]
    bags = open_bags(folder, table(tmp_path, rows, ("case_id", "slide_id", "label")), strict=False)
    assert bags.ids == ["P1-a", "P2-a", "P3"]
    assert bags.labels.tolist() == [0, 1, 1]
    assert bags.groups == ["P1", "P2", "P3"]
    assert bags.problems == [
        ("P1-b", "no label", ""),
        ("P9-a", "missing: no bag of that name", "x"),
        ("P8-a", "missing: no bag of that name", "y"),
    ]
    assert open_bags(folder, table(tmp_path, ROWS, ("case_id", "slide_id", "label")), strict=False).problems == []


def test_many_numbers_are_not_classes(tmp_path):
    names = [f"b{i}" for i in range(30)]
    path = table(tmp_path, [(n, i / 7) for i, n in enumerate(names)], ("slide_id", "label"))
    with pytest.raises(DataError, match="holds 30 different numbers; this task needs classes"):
        read_labels(path, names)


def test_named_columns_that_are_missing(tmp_path, folder):
    path = table(tmp_path, ROWS, ("case_id", "slide_id", "label"))
    with pytest.raises(DataError, match=r"no column 'dx'; there are case_id, slide_id, label \(--label-column\)"):
        open_bags(folder, path, label_column="dx")
    with pytest.raises(DataError, match="no column 'hospital' says which bags belong together"):
        open_bags(folder, path, group="hospital")
    with pytest.raises(DataError, match="labels x are not among y, z"):
        open_bags(folder, path, classes=["y", "z"])


def test_bags_without_any_labels(folder):
    with pytest.raises(DataError, match="4 of 4 bags have no label of their own .*--labels"):
        open_bags(folder)


def splits_clam(root):
    root.mkdir()
    for i in range(2):
        (root / f"splits_{i}.csv").write_text(",train,val,test\n0,P1-a,P2-a,P3\n1,P1-b,,\n")
        (root / f"splits_{i}_bool.csv").write_text("")
    return root, 2


def splits_bool(root):
    root.mkdir()
    rows = "P1-a,True,False,False\nP1-b,True,False,False\nP2-a,False,True,False\nP3,False,False,True\n"
    (root / "splits_0_bool.csv").write_text(",train,val,test\n" + rows)
    return root, 1


def splits_json(root):
    path = root.with_suffix(".json")
    path.write_text(json.dumps({"train_names": ["P1-a.svs", "P1-b"], "val_names": ["P2-a"], "test_names": ["P3"]}))
    return path, 1


def splits_info(root):
    path = root.with_suffix(".csv")
    path.write_text("slide_id,split_info\nP1-a,train\nP1-b,train\nP2-a,val\nP3,test\n")
    return path, 1


@pytest.mark.parametrize("make", [splits_clam, splits_bool, splits_json, splits_info])
def test_split_files(make, tmp_path):
    path, count = make(tmp_path / "splits")
    found = read_splits(path, BAGS)
    assert found == [{"train": [0, 1], "validation": [2], "test": [3]}] * count


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_names": ["P1-a"], "test_names": []}, "expected 'val_names'"),
        ({"train_names": ["Q"], "val_names": [], "test_names": []}, "1 names in train have no bag: Q"),
        (
            {"train_names": ["P3"], "val_names": [], "test_names": ["P3"]},
            "1 bags are in the test part and in another: P3",
        ),
    ],
)
def test_bad_splits(content, message, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_splits(tmp_path / "s.json", BAGS)
