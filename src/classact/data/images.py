"""Readers of image data sets as their authors distribute them."""

import gzip
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from classact.data.bag_files import DataError
from classact.data.registry import find_data


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file (the format of MNIST), gzipped or not, as a uint8 array."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: expected an IDX file of unsigned bytes, found first bytes {content[:4]!r}")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if data.size != shape.prod():
        raise DataError(f"{path}: expected {shape.prod()} values for shape {tuple(shape)}, found {data.size}")
    return data.reshape(shape)


@lru_cache(maxsize=2)
def fashion_mnist(part: Literal["train", "test"] = "train") -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST (Zalando Research, MIT): images (n, 28, 28) uint8 and labels (n,) uint8.

    Raises
    ------
    DataError
        If the official files are not in the data folder; the message says where to get and put them.
    """
    folder = Path(find_data("fashion-mnist"))
    prefix = {"train": "train", "test": "t10k"}[part]
    return (
        read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
    )
