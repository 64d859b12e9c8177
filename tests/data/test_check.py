"""The check finds every kind of bad bag, says where, and reads nothing twice."""

import csv
import io
import os
import re
import shutil
import threading
import time

import h5py
import numpy as np
import pytest

from classact.data import BagDataset, DataError, digits_bags, open_bags
from classact.data import check as check_module
from classact.data.bag_files import RawBag, Source
from classact.data.bags import Problem
from classact.data.check import check_bags, excluded_csv, folds_possible, raise_problems

NAMES = ["a1", "a2", "b1", "b2", "c1", "d1"]  # patients a to d
LABEL = {"a": "normal", "b": "tumor", "c": "normal", "d": "tumor"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSACT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch):
    """Names of the bags that are read in this process, in order."""
    names = []
    plain = check_module._examine
    monkeypatch.setattr(check_module, "_examine", lambda source: (names.append(source.id), plain(source))[1])
    return names


@pytest.fixture
def folder(tmp_path):
    """Six bags of 4 to 9 instances in HDF5, an hour old."""
    return write(tmp_path / "bags")


def features(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(4 + i, 6)).astype(np.float16) for i, name in enumerate(NAMES)}


def write(folder, **changed):
    folder.mkdir(parents=True)
    for name, x in (features() | changed).items():
        write_bag(folder / f"{name}.h5", x)
        age(folder / f"{name}.h5")
    return folder


def write_bag(path, x, coords=True):
    with h5py.File(path, "w") as file:
        file["features"] = x
        if coords:
            file["coords"] = np.zeros((len(x), 2), dtype=int)


def age(path, seconds=3600):
    then = time.time() - seconds
    os.utime(path, (then, then))


def opened(folder, rows=None, **options):
    table = folder.parent / f"{folder.name}.csv"
    rows = rows or [(name[0], name, LABEL[name[0]]) for name in NAMES]
    table.write_text("case_id,slide_id,label\n" + "".join(",".join(row) + "\n" for row in rows))
    return open_bags(folder, table, strict=False, **options)


def reason_of(folder, name, **options):
    """The reason for the one bad bag."""
    check = check_bags(opened(folder), **options)
    assert [problem.item for problem in check.problems] == [name]
    assert check.problems[0].label == LABEL[name[0]]
    assert len(check.sizes) == len(NAMES) - 1
    assert name not in check.clean().ids
    assert check.table().set_index("item").reason[name] == check.problems[0].reason
    return check.problems[0].reason


# reasons


def test_good_bags(folder):
    check = check_bags(opened(folder))
    assert check.problems == check.warnings == []
    assert check.sizes.tolist() == [4, 5, 6, 7, 8, 9]
    table = check.table()
    assert " ".join(table) == "item label group instances width dtype megabytes coordinates reason"
    row = table.iloc[2]
    assert (row["item"], row.label, row.group, row.instances, row.width) == ("b1", "tumor", "b", 6, 6)
    assert (row["dtype"], bool(row.coordinates), row.reason) == ("float16", True, "")
    assert row.megabytes == (folder / "b1.h5").stat().st_size / 1e6
    assert check.clean().ids == NAMES
    raise_problems(check.problems)


def test_truncated(folder):
    path = folder / "b2.h5"
    path.write_bytes(path.read_bytes()[:900])
    age(path)
    assert reason_of(folder, "b2").startswith(f"unreadable: {path}: not a complete HDF5 file")
    assert "modified" not in reason_of(folder, "b2")


def test_truncated_just_now_may_still_be_being_written(folder):
    path = folder / "b2.h5"
    path.write_bytes(path.read_bytes()[:900])
    age(path, 12)
    assert re.search(r"; modified 1\d s ago: still being written\?$", reason_of(folder, "b2"))
    age(path, 61)
    assert "modified" not in reason_of(folder, "b2")


def test_damage_inside_a_file_never_stops_the_check(folder):
    with h5py.File(folder / "c1.h5", "w") as file:
        file.create_group("features")
    assert reason_of(folder, "c1").startswith(f"unreadable: {folder / 'c1.h5'}: ")


def test_empty(folder):
    write_bag(folder / "d1.h5", np.empty((0, 6)))
    assert reason_of(folder, "d1") == f"empty: {folder / 'd1.h5'}, 'features': a bag with no instances, shape (0, 6)"


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (np.nan, np.float16, "nan"),
        (np.inf, np.float16, "inf"),
        (-np.inf, np.float32, "-inf"),
        (-np.nan, np.float64, "nan"),
        (1e300, np.float64, "1e+300"),  # infinite in float32, in which bags are trained
        (-1e300, np.float64, "-1e+300"),
        (np.nan, ">f4", "nan"),
    ],
)
def test_not_finite(value, dtype, said, folder):
    x = features()["b1"].astype(dtype)
    x[3, 2] = x[4, 0] = value
    write_bag(folder / "b1.h5", x)
    assert reason_of(folder, "b1") == f"not finite: {said} at instance 3, feature 2"


def test_every_value_of_float16():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 8)
    assert check_module._not_finite(finite) == ""
    for value in every[~np.isfinite(every)]:
        finite[7, 5] = value
        assert check_module._not_finite(finite) == f"{value} at instance 7, feature 5"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
def test_the_largest_values_are_finite(dtype):
    large = np.finfo(np.float32).max.astype(dtype)
    x = np.array([[large, -large, 0.0, -0.0, np.finfo(dtype).tiny, -np.finfo(dtype).smallest_subnormal]], dtype)
    assert check_module._not_finite(x) == ""
    assert check_module._not_finite(x[:, ::2]) == ""
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        x[0, 4] = value
        assert check_module._not_finite(x).endswith("at instance 0, feature 4")
        assert check_module._not_finite(x[:, ::2]).endswith("at instance 0, feature 2")
    assert check_module._not_finite(np.ones((2, 2), dtype=int)) == ""


def test_another_width_even_in_the_first_bag(folder):
    write_bag(folder / "a1.h5", np.ones((3, 9), dtype=np.float16))
    assert reason_of(folder, "a1") == "another width: 9 features per instance, most bags have 6"
    clean = check_bags(opened(folder)).clean()
    assert clean.in_dim == 6
    assert [len(bag.x) for bag in clean] == [5, 6, 7, 8, 9]


def test_missing(folder):
    bags = opened(folder)
    (folder / "c1.h5").unlink()
    problem = check_bags(bags).problems[0]
    assert problem == ("c1", f"missing: {folder / 'c1.h5'}: no such file", "normal")


def test_rows_and_bags_that_do_not_match_come_first(folder):
    rows = [(name[0], name, LABEL[name[0]]) for name in NAMES[1:]] + [("x", "x1", "tumor")]
    write_bag(folder / "d1.h5", np.empty((0, 6)))
    check = check_bags(opened(folder, rows))
    assert [(problem.item, problem.reason.split(":")[0], problem.label) for problem in check.problems] == [
        ("a1", "no label", ""),
        ("x1", "missing", "tumor"),
        ("d1", "empty", "tumor"),
    ]
    clean = check.clean()
    assert clean.ids == NAMES[1:5]
    assert clean.problems == check_bags(clean).problems == []


def test_other_formats(tmp_path):
    for suffix, save in ((".npz", lambda path, x: np.savez(path, features=x)), (".npy", np.save)):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        for name, x in features().items():
            save(folder / f"{name}{suffix}", x)
        path = folder / f"b1{suffix}"
        path.write_bytes(path.read_bytes()[:150])
        age(path)
        assert reason_of(folder, "b1").startswith(f"unreadable: {path}: ")


# writers at work


@pytest.mark.parametrize("companion", ["b1.h5.lock", "b1.h5.part", "b1.tmp", "b1.lock"])
def test_a_bag_with_a_lock_beside_it_is_in_flight_even_if_it_reads(companion, folder):
    (folder / companion).touch()
    assert reason_of(folder, "b1") == f"in flight: {companion} lies beside it"


def test_a_lone_lock_is_a_bag_to_come(folder):
    (folder / "e1.svs.h5.part").touch()
    (folder / "notes.lock").touch()  # nothing to do with bags
    (folder / "e1.txt").touch()
    assert check_bags(opened(folder)).problems == [("e1", "in flight: only e1.svs.h5.part is there", "")]
    rows = [(name[0], name, LABEL[name[0]]) for name in NAMES] + [("e", "e1", "tumor")]
    assert check_bags(opened(folder, rows)).problems == [("e1", "in flight: only e1.svs.h5.part is there", "tumor")]


def test_a_lock_beside_one_file_of_many_bags_concerns_them_all(tmp_path):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for name, x in features().items():
            file[f"{name}/feat"] = x
            file[name].attrs["label"] = LABEL[name[0]]
    bags = open_bags(tmp_path / "all.h5", group="slide_id")
    (tmp_path / "other.h5.lock").touch()
    check = check_bags(bags)
    assert check.problems == []
    assert check.table().megabytes.sum() == pytest.approx(sum(x.nbytes for x in features().values()) / 1e6)
    (tmp_path / "all.h5.lock").touch()
    assert {problem.reason for problem in check_bags(bags).problems} == {"in flight: all.h5.lock lies beside it"}


# warnings


def test_the_same_features_in_two_patients(tmp_path):
    x = features()
    check = check_bags(opened(write(tmp_path / "bags", a2=x["a1"], d1=x["b1"])))
    assert check.warnings == ["the same features in bags of different groups (case_id): b1 (b) = d1 (d)"]
    assert check.problems == []


def test_constant_features(tmp_path):
    check = check_bags(opened(write(tmp_path / "bags", a1=np.zeros((5, 6)), c1=np.ones((1, 6)))))
    assert check.warnings == ["all instances are the same in 1 bag: a1"]


# workers


def test_workers_find_what_one_process_finds(folder):
    write_bag(folder / "b1.h5", np.full((5, 6), np.inf))
    (folder / "d1.h5").write_bytes(b"")
    age(folder / "d1.h5")
    bags = opened(folder)
    bags.sources[1] = Source("a2", "memory", folder, arrays=RawBag(features()["a2"]))
    calls = []
    one = check_bags(bags, cache=False)
    two = check_bags(bags, cache=False, workers=2, progress=lambda *call: calls.append(call))
    assert [problem.item for problem in two.problems] == ["b1", "d1"]
    assert (two.problems, two.warnings, two.fingerprint) == (one.problems, one.warnings, one.fingerprint)
    assert two.table().equals(one.table())
    assert calls == [(done, 6) for done in range(7)]
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        check_bags(bags, workers=0)


def test_in_memory(reads):
    bags = digits_bags(20)
    check = check_bags(bags)
    check_bags(bags)
    assert reads == bags.ids * 2  # there is no file whose time could tell that nothing changed
    assert check.problems == []
    assert "instance labels: all bags" in check.lines()
    assert "layout: scikit-learn digits; in memory" in check.lines()
    sources = [Source("x", "memory", bags.sources[0].path, arrays=lambda: RawBag(np.ones((0, 3))))]
    problem = check_bags(BagDataset(sources, [0], ["no", "yes"], ["x"])).problems[0]
    assert problem == ("x", "empty: a bag with no instances, shape (0, 3)", "no")


# cache


def test_the_second_time_nothing_is_read(folder, reads):
    write_bag(folder / "c1.h5", np.empty((0, 6)))
    bags = opened(folder)
    first = check_bags(bags)
    assert reads == NAMES
    calls = []
    second = check_bags(bags, progress=lambda *call: calls.append(call))
    assert reads == NAMES
    assert calls == [(6, 6)]
    assert (second.fingerprint, second.lines()) == (first.fingerprint, first.lines())
    check_bags(bags, cache=False)
    assert reads == NAMES * 2


def test_a_changed_or_mended_file_is_read_again(folder, reads):
    (folder / "c1.h5").write_bytes(b"")
    bags = opened(folder)
    first = check_bags(bags)
    write_bag(folder / "c1.h5", features()["c1"])
    write_bag(folder / "d1.h5", features(1)["d1"])
    reads.clear()
    second = check_bags(bags)
    assert reads == ["c1", "d1"]
    assert [problem.item for problem in first.problems] == ["c1"]
    assert second.problems == []
    assert second.fingerprint != first.fingerprint
    assert len(list((folder.parent / "cache" / "checks").iterdir())) == 1


def test_what_could_not_be_read_is_tried_again(folder, reads, monkeypatch):
    def fail(source):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", fail)
        assert {problem.reason.split(": ", 2)[2] for problem in check_bags(opened(folder)).problems} == {
            "MemoryError: "
        }
    assert check_bags(opened(folder)).problems == []


def test_the_files_beside_a_torchmil_bag_count_too(tmp_path, reads):
    for part in ("features", "coords"):
        (tmp_path / "bags" / part).mkdir(parents=True)
        for name, x in features().items():
            np.save(tmp_path / "bags" / part / f"{name}.npy", x[:, :2] if part == "coords" else x)
    bags = opened(tmp_path / "bags")
    assert check_bags(bags).table().coordinates.all()
    (tmp_path / "bags" / "coords" / "b2.npy").write_bytes(b"")
    reads.clear()
    assert [problem.item for problem in check_bags(bags).problems] == ["b2"]
    assert reads == ["b2"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\0" * 100,
        lambda content: content[:-20],
        lambda content: content.replace(b"float16", b"float17", 1),
        lambda content: b"{}",
    ],
)
def test_a_damaged_cache_is_made_anew(damage, folder, reads):
    bags = opened(folder)
    first = check_bags(bags)
    (file,) = (folder.parent / "cache" / "checks").iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert check_bags(bags).fingerprint == first.fingerprint
    assert reads == NAMES * 2
    assert file.read_bytes() == content


def test_another_format_of_the_cache_is_not_read(folder, reads, monkeypatch):
    check_bags(opened(folder))
    monkeypatch.setattr(check_module, "FORMAT", check_module.FORMAT + 1)
    check_bags(opened(folder))
    assert reads == NAMES * 2


def test_without_a_place_for_the_cache_the_check_still_runs(folder, reads, monkeypatch):
    (folder.parent / "file").touch()
    monkeypatch.setenv("CLASSACT_CACHE", str(folder.parent / "file"))
    assert check_bags(opened(folder)).problems == []


def test_an_interrupted_check_goes_on(folder, reads):
    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_bags(opened(folder), progress=stop)
    check_bags(opened(folder))
    assert reads == NAMES


def test_runs_at_the_same_time_leave_a_sound_cache(folder, reads):
    bags = opened(folder)
    expected = check_bags(bags, cache=False).fingerprint
    found = []

    def run():
        for path in (folder / "a1.h5", folder / "d1.h5"):
            path.touch()
            found.append(check_bags(bags).fingerprint)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
    assert len(list((folder.parent / "cache" / "checks").iterdir())) == 1  # and no temporary file
    check_bags(bags)
    reads.clear()
    check_bags(bags)
    assert reads == []


def test_two_thousand_bags(tmp_path, reads):
    folder = tmp_path / "bags"
    folder.mkdir()
    rows = []
    for i in range(2000):
        np.save(folder / f"s{i}.npy", np.full((2, 4), i, dtype=np.float32))
        rows.append((f"p{i // 2}", f"s{i}", "xy"[i % 4 // 2]))
    bags = opened(folder, rows)
    started = time.process_time()
    check = check_bags(bags)
    first = time.process_time() - started
    assert len(check.sizes) == 2000
    started = time.process_time()
    assert check_bags(bags).fingerprint == check.fingerprint
    second = time.process_time() - started
    assert len(reads) == 2000
    assert second < 0.5 * first < 5


# fingerprint


def test_fingerprint_depends_on_nothing_but_the_usable_bags(folder, tmp_path):
    check = check_bags(opened(folder))
    assert len(check.fingerprint) == 8
    assert int(check.fingerprint, 16) >= 0
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(folder, moved, copy_function=shutil.copy)
    assert check_bags(opened(moved)).fingerprint == check.fingerprint
    (folder / "c1.h5").write_bytes(b"")
    with_bad = check_bags(opened(folder))
    assert check.fingerprint != with_bad.fingerprint == check_bags(with_bad.clean()).fingerprint


def test_fingerprint_changes_with_everything_that_counts(folder, tmp_path):
    rows = [(name[0], name, LABEL[name[0]]) for name in NAMES]
    x = features()
    other = {name: value.copy() for name, value in x.items()}
    other["a1"][3, 5] += 1
    write(tmp_path / "feature", a1=other["a1"])
    write(
        tmp_path / "shape",
        a1=x["a1"].reshape(8, 3),
        **{name: value[:, :3] for name, value in x.items() if name != "a1"},
    )
    write(tmp_path / "shape2", **{name: value[:, :3] for name, value in x.items()})
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    (renamed / "d1.h5").rename(renamed / "d2.h5")
    found = [
        check_bags(bags).fingerprint
        for bags in (
            opened(folder),
            opened(folder, [*rows[:-1], ("d", "d1", "normal")]),
            opened(folder, [*rows[:-1], ("c", "d1", "tumor")]),
            opened(folder, classes=["tumor", "normal"]),
            opened(renamed, [*rows[:-1], ("d", "d2", "tumor")]),
            opened(tmp_path / "feature"),
            opened(tmp_path / "shape"),
            opened(tmp_path / "shape2"),
        )
    ]
    assert len(set(found)) == len(found)


# reports


def test_lines(tmp_path):
    folder = write(tmp_path / "bags", b2=np.full((5, 6), np.nan), d1=features()["a1"])
    write_bag(folder / "a2.h5", features()["a2"], coords=False)
    rows = [(name[0], name, LABEL[name[0]]) for name in NAMES] + [("x", f"x{i}", "tumor") for i in range(7)]
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    assert check_bags(opened(folder, rows)).lines() == [
        "bags: 5 of 6 bags can be used; 4 groups by case_id",
        f"layout: folder; {size:.1f} MB on disk",
        'class "normal": 3 bags in 2 groups',
        'class "tumor": 2 bags in 2 groups',
        "instances per bag: 4 to 8, median 5; 27 in all",
        "features per instance: 6 (float16)",
        "coordinates: 4 of 5 bags",
        "instance labels: none",
        'folds possible: up to 2 (class "normal" has 2 groups)',
        "cannot be used: 8",
        "  missing: 7 (tumor 7)",
        *(f"    x{i}: no bag of that name" for i in range(5)),
        "    ... (2 more)",
        "  not finite: 1 (tumor 1)",
        "    b2: nan at instance 0, feature 0",
        "warning: the same features in bags of different groups (case_id): a1 (a) = d1 (d)",
    ]


def test_lines_where_nothing_can_be_used(tmp_path):
    folder = write(tmp_path / "bags", **{name: np.full((5, 6), np.nan) for name in NAMES})
    check = check_bags(opened(folder))
    assert check.lines()[0] == "bags: 0 of 6 bags can be used; 0 groups by case_id"
    assert "  not finite: 6 (normal 3, tumor 3)" in check.lines()
    with pytest.raises(DataError, match="bags: none of 6 bags can be used"):
        check.clean()


def test_what_is_left_must_have_two_classes(folder):
    for name in ("b1", "b2", "d1"):
        (folder / f"{name}.h5").write_bytes(b"")
    check = check_bags(opened(folder))
    assert 'folds possible: none (class "tumor" has 0 groups)' in check.lines()
    with pytest.raises(DataError, match="bags: expected usable bags of at least two classes, found normal"):
        check.clean()
    assert check.clean(training=False).ids == ["a1", "a2", "c1"]


def test_bags_to_predict_need_no_labels(folder):
    check = check_bags(open_bags(folder, training=False))
    assert check.problems == []
    assert check.clean(training=False).ids == NAMES
    assert not any("folds" in line for line in check.lines())


def test_folds_possible():
    assert folds_possible([1, 0, 1, 1, -1], ["p", "p", "q", "q", "r"]) == {0: 1, 1: 2}
    assert folds_possible(np.array([2]), ["p"]) == {2: 1}
    assert folds_possible([], []) == {}


PROBLEMS = [
    *(Problem(f"s{i}", f"unreadable: s{i}.h5: cut off", "tumor") for i in range(6)),
    Problem("t", "no label"),
    Problem('u,"1"', "missing: no\nfile", "a, b"),
]


def test_excluded_csv():
    text = excluded_csv(PROBLEMS)
    assert text.startswith("item,reason,label\ns0,unreadable: s0.h5: cut off,tumor\n")
    assert list(csv.reader(io.StringIO(text)))[1:] == [list(problem) for problem in PROBLEMS]
    assert excluded_csv([]) == "item,reason,label\n"


def test_raise_problems():
    raise_problems([])
    with pytest.raises(DataError) as caught:
        raise_problems(PROBLEMS[:-1], unit="recording")
    assert str(caught.value) == (
        "7 recordings cannot be used\n"
        "  unreadable: 6\n"
        "    s0: s0.h5: cut off\n"
        "    s1: s1.h5: cut off\n"
        "    s2: s2.h5: cut off\n"
        "    s3: s3.h5: cut off\n"
        "    s4: s4.h5: cut off\n"
        "    ... (1 more)\n"
        "  no label: 1\n"
        "    t\n"
        "give --exclude-bad to leave them out and write excluded.csv"
    )
