import gzip
import hashlib

import numpy as np
import pytest

from classact.data import DATA_SETS, DataError, fashion_mnist, fetch, find_data, open_bags, shortcut_bags
from classact.data import registry as registry_module
from classact.data.check import check_bags
from classact.data.images import read_idx


def test_a_missing_set_says_where_it_goes_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"musk2\.csv\.gz: no such file; .*`classact data fetch musk2`"):
        open_bags("musk2")
    assert find_data("some/folder") == "some/folder"


def test_a_known_set_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "musk2").mkdir()
    with pytest.raises(DataError, match="data fetch musk2"):
        find_data("musk2")
    assert find_data("./musk2") == "./musk2"


@pytest.fixture
def own_set(tmp_path, monkeypatch):
    source = tmp_path / "source.csv.gz"
    content = b"1,1,0.5\n0,2,0.25\n"
    source.write_bytes(gzip.compress(content))
    file = "sets/own.csv.gz"
    item = registry_module.DataSet(
        "own", "bags", "two bags", "CC0", "here", file, {file: hashlib.sha256(content).hexdigest()},
        urls={file: source.as_uri()},
    )  # fmt: skip
    monkeypatch.setitem(DATA_SETS, "own", item)
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path / "data"))
    return source, tmp_path / "data" / file


def test_fetch_checks_and_says_the_licence(own_set):
    said = []
    fetch("own", said.append)
    assert "Licence: CC0" in said[0]
    assert open_bags("own").ids == ["1", "2"]
    own_set[0].unlink()
    fetch("own", said.append)  # there already: only checked


def test_a_wrong_checksum_leaves_nothing_behind(own_set):
    source, target = own_set
    source.write_bytes(gzip.compress(b"0,0,0\n"))
    with pytest.raises(DataError, match=r"own\.csv\.gz: expected SHA-256 .*, found"):
        fetch("own", lambda _: None)
    assert list(target.parent.iterdir()) == []


def test_unknown_set():
    with pytest.raises(DataError, match="mask1: no such data set; there are digits, musk1"):
        fetch("mask1")


def test_idx_files(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), [[0, 1, 2], [3, 4, 5]])
    (tmp_path / "b").write_bytes(b"\0\0\x08\x01" + (9).to_bytes(4, "big") + b"\0")
    with pytest.raises(DataError, match=r"expected 9 values for shape \(.*9.*,\), found 1"):
        read_idx(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="expected an IDX file of unsigned bytes"):
        read_idx(tmp_path / "c")


def test_fashion_mnist_and_shortcut_bags(real_data):
    images, labels = fashion_mnist("test")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    for witnesses, kinds in (("both", {0, 1, 2}), ("easy", {0, 1}), ("hard", {0, 2})):
        bags = shortcut_bags(20, 3, "test", witnesses)
        for bag in bags:
            counts = np.bincount(bag.instance_labels, minlength=3)
            assert bag.x.shape == (40, 64)
            if bag.label:
                assert set(np.flatnonzero(counts)) == kinds
                assert all(2 <= counts[k] <= 3 for k in kinds - {0})
            else:
                assert counts.tolist() == [40, 0, 0]
    first, again, other = (check_bags(shortcut_bags(20, seed)).fingerprint for seed in (3, 3, 4))
    assert first == again != other
