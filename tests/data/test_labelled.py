import gzip
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from classact.data.bag_files import DataError
from classact.data.labelled import load_labelled


def write_idx(path, array):
    content = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_digits_are_there_without_any_file():
    digits = load_labelled("digits")
    assert digits.shape == (1, 8, 8) and len(digits.classes) == 10 and digits.test_x is None
    assert digits.x.dtype == torch.float32 and digits.x.min() >= 0 and digits.x.max() == 1


def test_idx_files_plain_or_gzipped(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    labels = np.array([3, 1, 3, 1, 3, 1], np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    only_train = load_labelled(tmp_path)
    assert only_train.test_x is None and only_train.classes == ("1", "3")
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images[:2])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels[:2])
    found = load_labelled(tmp_path)
    assert torch.equal(found.x[:, 0], torch.from_numpy(images) / 255)
    assert found.y.tolist() == [1, 0, 1, 0, 1, 0] and found.test_y.tolist() == [1, 0]
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="expected train-labels-idx1-ubyte"):
        load_labelled(tmp_path)


def test_images_in_class_folders_with_and_without_parts(tmp_path):
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (30, 20 + i), (200 * number, 0, 50)).save(folder / f"{i}.png")
    found = load_labelled(tmp_path / "pets", size=8)
    assert found.shape == (3, 8, 8) and found.classes == ("cat", "dog")
    assert found.y.tolist() == [0, 0, 1, 1] == found.test_y.tolist()
    assert torch.allclose(found.x[2, :, 0, 0], torch.tensor([200, 0, 50]) / 255)
    flat = load_labelled(tmp_path / "pets" / "train", size=8)
    assert flat.test_x is None and torch.equal(flat.x, found.x)
    with pytest.raises(DataError, match="expected images in class folders"):
        load_labelled(tmp_path / "pets" / "train" / "cat")


def test_tables_with_texts_and_numbers(tmp_path):
    table = pd.DataFrame({"size": [1.0, 2.0, 3.0], "colour": ["red", "blue", "red"], "class": ["a", "b", "a"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    found = load_labelled(tmp_path / "t.csv")
    assert found.classes == ("a", "b") and found.y.tolist() == [0, 1, 0]
    assert found.x.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1]]  # size, blue, red
    assert load_labelled(tmp_path / "t.csv", label="colour").classes == ("blue", "red")
    pytest.importorskip("pyarrow")
    table.to_parquet(tmp_path / "t.parquet")
    assert torch.equal(load_labelled(tmp_path / "t.parquet").x, found.x)


def test_archives_of_images_and_rows(tmp_path):
    rng = np.random.default_rng(0)
    images, y = rng.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", X_train=images, y_train=y, X_test=images[:1], y_test=y[:1])
    found = load_labelled(tmp_path / "a.npz")
    assert found.shape == (3, 6, 6) and len(found.test_x) == 1
    assert torch.equal(found.x[0, :, 2, 3], torch.from_numpy(images[0, 2, 3]) / 255)
    np.savez(tmp_path / "b.npz", x=rng.normal(size=(4, 5)), y=y)
    assert load_labelled(tmp_path / "b.npz").shape == (5,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="class"), "no column label, target, class, y; name the classes' column with --label"),
        (lambda t: t.assign(size=[1.0, np.nan, 2.0, np.nan]), r"missing values, by column: {'size': 2}"),
        (lambda t: t.assign(**{"class": ["a", None, "b", "a"]}), "1 rows have no class"),
        (lambda t: t.assign(**{"class": "a"}), "at least two classes, found 1"),
        (lambda t: t[["class"]], "no column besides class"),
        (lambda t: t.assign(size=[1.0, np.inf, 2.0, 1.0]), "1 of 4 items have a missing or infinite value"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, change, message):
    table = pd.DataFrame({"size": [1.0, 2.0, 3.0, 4.0], "class": list("abab")})
    change(table).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=message):
        load_labelled(tmp_path / "t.csv")


def test_sources_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match="no such file or folder; expected digits, torchvision:NAME:ROOT"):
        load_labelled(tmp_path / "nothing")
    with pytest.raises(DataError, match="expected torchvision:NAME:ROOT"):
        load_labelled("torchvision:CIFAR10")
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match="torchvision has no data set CIFAR11"):
        load_labelled(f"torchvision:CIFAR11:{tmp_path}")
    with pytest.raises(DataError, match="download=True"):
        load_labelled(f"torchvision:CIFAR10:{tmp_path}")
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 2)))
    with pytest.raises(DataError, match=r"expected arrays x and y.* \(no y\)"):
        load_labelled(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2)), y=np.array([0, 1, 0]))
    with pytest.raises(DataError, match="as many labels as items"):
        load_labelled(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", x=np.zeros((300, 2)), y=np.random.default_rng(0).normal(size=300))
    with pytest.raises(DataError, match="expected classes, not a quantity"):
        load_labelled(tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", x_train=np.zeros((4, 2)), y_train=[0, 1, 0, 1], x_test=np.zeros((1, 2)), y_test=[7])
    with pytest.raises(DataError, match=r"classes that the training part lacks: \[7\]"):
        load_labelled(tmp_path / "f.npz")
    (tmp_path / "g.txt").write_text("hello")
    with pytest.raises(DataError, match=r"expected a \.csv, \.parquet or \.npz"):
        load_labelled(tmp_path / "g.txt")
