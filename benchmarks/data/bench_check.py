"""Checking bags beside reading the bytes of the same files; and the second check beside the first."""

import os

import h5py
import numpy as np
import pytest

from classact.data import open_bags
from classact.data.check import check_bags


def write(folder, n_bags, instances, width):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n_bags):
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file["features"] = rng.normal(size=(instances, width)).astype(np.float16)
            file["coords"] = rng.integers(0, 99999, size=(instances, 2))
    (folder.parent / "labels.csv").write_text("slide_id,label\n" + "".join(f"s{i},{i % 2}\n" for i in range(n_bags)))
    os.sync()
    return open_bags(folder, folder.parent / "labels.csv", group="slide_id")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSACT_CACHE", str(tmp_path / "cache"))


def forget(bags):
    """Have the system forget the contents of the files, where it does so for the asking."""
    for source in bags.sources:
        file = os.open(source.path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_bytes(bags):
    for source in bags.sources:
        source.path.read_bytes()


@pytest.mark.parametrize("cold", [True, False], ids=["from disk", "from memory"])
def test_bags_of_slides(cold, tmp_path, ratio):
    bags = write(tmp_path / "bags", 100, 5000, 1024)
    size = sum(source.path.stat().st_size for source in bags.sources)
    before = forget if cold else lambda bags: None

    def check():
        before(bags)
        check_bags(bags, cache=False)

    def read():
        before(bags)
        read_bytes(bags)

    where = "from disk" if cold else "from memory"
    found = ratio(f"check of 100 bags, {size / 1e9:.2f} GB {where} / reading their bytes", check, read, rounds=3)
    assert found < (3 if cold else 15)


def test_two_thousand_small_bags(tmp_path, ratio):
    bags = write(tmp_path / "bags", 2000, 100, 64)
    check_bags(bags)
    first, second = (lambda: check_bags(bags, cache=False)), (lambda: check_bags(bags))
    assert ratio("second check of 2,000 bags / the first", second, first, rounds=3) < 0.1
