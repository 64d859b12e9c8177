import errno
import json
import subprocess
import sys

import numpy as np
import pytest

from classact.evidence.store import Store, StudyError

DEFINITION = {"task": "t", "folds": 5}


def test_cells_come_back(tmp_path):
    with Store(tmp_path / "s", DEFINITION) as store:
        store.write("a/b:c", {"x": 0.1}, {"y": np.arange(3.0)}, 1.5)
        assert store.read("a/b:c")["values"] == {"x": 0.1}
        assert store.read("a/b:c")["seconds"] == 1.5
        np.testing.assert_array_equal(store.arrays("a/b:c")["y"], [0, 1, 2])
        assert store.read("other") is None


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b.replace(b"1", b"2", 1) + b" ", lambda b: b""])
def test_a_damaged_cell_is_noticed(tmp_path, suffix, damage):
    with Store(tmp_path / "s", DEFINITION) as store:
        store.write("k", {"x": 1.1}, {"y": np.ones(9)})
        file = tmp_path / "s" / "cells" / f"k{suffix}"
        file.write_bytes(damage(file.read_bytes()))
        assert store.read("k") is None
        assert store.damaged == ["k"]


def test_another_study_is_refused_unless_it_may_be_replaced(tmp_path):
    with Store(tmp_path / "s", DEFINITION) as store:
        store.write("k", 1)
    with pytest.raises(StudyError, match=r"holds another study \(folds: there 5, here 10\); choose another --out"):
        Store(tmp_path / "s", {**DEFINITION, "folds": 10}).__enter__()
    with Store(tmp_path / "s", DEFINITION) as store:
        assert store.read("k") is not None
    with Store(tmp_path / "s", {**DEFINITION, "folds": 10}, overwrite=True) as store:
        assert store.read("k") is None


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StudyError, match="holds other files and no study"):
        Store(tmp_path, DEFINITION, overwrite=True).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StudyError, match="expected a folder, found a file"):
        Store(tmp_path / "thesis.tex", DEFINITION).__enter__()


def test_two_runs_exclude_each_other(tmp_path):
    code = (
        "import sys; from classact.evidence.store import Store, StudyError\n"
        f"try: Store({str(tmp_path / 's')!r}, {DEFINITION!r}).__enter__()\n"
        "except StudyError as e: print(e)"
    )
    with Store(tmp_path / "s", DEFINITION):
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "another run is writing here (process " in said
    assert "choose another --out" in said
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == ""


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    with Store(tmp_path / "s", DEFINITION) as store:
        store.write("first", {"x": 1})

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(
            StudyError, match=r"second\.json: cannot write this cell: the disk is full\. 1 finished cells are kept"
        ):
            store.write("second", {"x": 2})
        monkeypatch.undo()
        assert {p.name for p in (tmp_path / "s" / "cells").iterdir()} == {"first.json"}
        assert store.read("second") is None


def test_definition_on_disk_is_readable(tmp_path):
    with Store(tmp_path / "s", DEFINITION):
        assert json.loads((tmp_path / "s" / "study.json").read_text()) == DEFINITION
