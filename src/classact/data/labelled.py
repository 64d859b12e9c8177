"""Labelled images and tables as people have them: image folders, IDX files, torchvision's sets, tables, archives."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classact.data.bag_files import DataError
from classact.data.images import read_idx
from classact.data.photos import class_folders, list_photos, read_photo

LABEL_COLUMNS = ("label", "target", "class", "y")
TRAIN, TEST = ("train", "training"), ("test", "t10k", "val", "valid", "validation")


@dataclass(frozen=True)
class Labelled:
    """A data set in memory.

    Attributes
    ----------
    name : str
        What it is called in a report.
    x : (n, C, H, W) or (n, D) float32
        Images in [0, 1], or the columns of a table as they are.
    y : (n,) int64
        Classes, 0 to C - 1.
    classes : tuple of str
        Their names.
    test_x, test_y : Tensor, optional
        The official test part, if there is one.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    test_x: Tensor | None = None
    test_y: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return tuple(self.x.shape[1:])


def load_labelled(source: str | Path, label: str | None = None, size: int = 64) -> Labelled:
    """Read a labelled data set.

    Parameters
    ----------
    source : str or path
        ``digits`` (8 x 8 pixels, part of scikit-learn); ``torchvision:NAME:ROOT`` such as ``torchvision:CIFAR10:data``;
        a folder of IDX files named as those of MNIST; a folder of images in class folders, with or without ``train``
        and ``test`` (or ``val``) above them; a CSV or Parquet table; an ``.npz`` archive with arrays ``x`` and ``y``,
        or ``x_train``, ``y_train``, ``x_test``, ``y_test``.
    label : str, optional
        The column of a table that holds the classes; by default the one named label, target, class or y.
    size : int
        Side to which images of a folder are cut and reduced, in pixels.

    Raises
    ------
    DataError
        If nothing of the kind is there, or its content does not fit; the message names file and column.
    """
    text = str(source)
    if text == "digits":
        from sklearn.datasets import load_digits

        images, y = load_digits(return_X_y=True)
        return _made("digits", images.reshape(-1, 1, 8, 8) / 16, y)
    if text.startswith("torchvision:"):
        return _torchvision(text)
    path = Path(source)
    if path.is_dir():
        return _idx(path) if list(path.glob("*idx?-ubyte*")) else _image_folder(path, size)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file or folder; expected digits, torchvision:NAME:ROOT, a folder of IDX files or of"
            " images in class folders, a .csv or .parquet table, or an .npz archive"
        )
    if path.suffix == ".npz":
        return _archive(path)
    if path.suffix in (".csv", ".parquet"):
        return _table(path, label)
    raise DataError(f"{path}: expected a .csv, .parquet or .npz file")


def _made(name: str, x: Any, y: Any, test: tuple[Any, Any] | None = None, classes: Any = None) -> Labelled:
    """Check what was read, and number the classes from 0."""
    y = np.asarray(y)
    names, codes = np.unique(y, return_inverse=True) if classes is None else (np.asarray(classes), y)
    if len(names) < 2:
        raise DataError(f"{name}: expected at least two classes, found {len(names)}")
    if y.dtype.kind == "f" and len(names) > max(20, len(y) // 10):
        raise DataError(f"{name}: {len(names)} different labels among {len(y)} items; expected classes, not a quantity")
    parts: list[Tensor | None] = [torch.from_numpy(np.array(x, np.float32)), torch.from_numpy(codes.astype(np.int64))]
    if test is not None:
        if unknown := set(np.unique(test[1]).tolist()) - set(np.unique(y).tolist()):
            raise DataError(f"{name}: the test part has classes that the training part lacks: {sorted(unknown)}")
        test_y = test[1] if classes is not None else np.searchsorted(names, test[1])
        parts += [torch.from_numpy(np.array(test[0], np.float32)), torch.from_numpy(np.array(test_y, np.int64))]
    else:
        parts += [None, None]
    for what, part in (("", parts[0]), ("test ", parts[2])):
        if part is None:
            continue
        if part.ndim == 3:
            raise DataError(f"{name}: expected images (n, C, H, W) or rows (n, D), got {what}shape {tuple(part.shape)}")
        if bad := int((~torch.isfinite(part.flatten(1))).any(1).sum()):
            raise DataError(f"{name}: {bad} of {len(part)} {what}items have a missing or infinite value")
    x_train, y_train, x_test, y_test = parts
    assert x_train is not None
    assert y_train is not None
    if len(x_train) != len(y_train) or (x_test is not None and y_test is not None and len(x_test) != len(y_test)):
        raise DataError(f"{name}: as many labels as items expected, got {len(x_train)} items and {len(y_train)} labels")
    return Labelled(name, x_train, y_train, tuple(str(one) for one in names), x_test, y_test)


def _channels(images: np.ndarray) -> np.ndarray:
    """Bytes (n, H, W) or (n, H, W, C) to (n, C, H, W) in [0, 1]."""
    images = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    return images.astype(np.float32) / 255


def _torchvision(text: str) -> Labelled:
    try:
        _, name, root = text.split(":", 2)
    except ValueError:
        raise DataError(f"{text}: expected torchvision:NAME:ROOT, such as torchvision:CIFAR10:data") from None
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
        raise ModuleNotFoundError("needs torchvision: pip install torchvision", name="torchvision") from error
    kind = getattr(datasets, name, None)
    if kind is None:
        raise DataError(f"{text}: torchvision has no data set {name}")
    try:
        sets = [kind(root, train=part) for part in (True, False)]
    except (RuntimeError, TypeError) as error:
        raise DataError(f"{text}: {error}; download it with torchvision.datasets.{name}(root, download=True)") from None
    if not all(hasattr(one, "data") and hasattr(one, "targets") for one in sets):
        raise DataError(f"{text}: expected a data set that is held in memory (MNIST, FashionMNIST, CIFAR10, CIFAR100)")
    (x, y), test = ((_channels(np.asarray(one.data)), np.asarray(one.targets)) for one in sets)
    return _made(name, x, y, test, getattr(sets[0], "classes", None))


def _idx(folder: Path) -> Labelled:
    found = {}
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            file = next((f for end in ("", ".gz") if (f := folder / f"{part}-{kind}-ubyte{end}").exists()), None)
            if file is None and part == "train":
                raise DataError(f"{folder}: expected {part}-{kind}-ubyte, plain or with .gz")
            if file is not None:
                found[part, kind[:6]] = read_idx(file)
    test = None
    if ("t10k", "images") in found and ("t10k", "labels") in found:
        test = _channels(found["t10k", "images"]), found["t10k", "labels"]
    return _made(folder.name, _channels(found["train", "images"]), found["train", "labels"], test)


def _image_folder(folder: Path, size: int) -> Labelled:
    parts = {one.name: one for one in folder.iterdir() if one.is_dir()}
    train = next((parts[name] for name in TRAIN if name in parts), folder)
    test = next((parts[name] for name in TEST if name in parts), None) if train is not folder else None
    x, y = _photos(train, size)
    return _made(folder.name, x, y, None if test is None else _photos(test, size))


def _photos(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    files = list_photos(folder)
    classes = class_folders(folder, files)
    if classes is None:
        raise DataError(f"{folder}: expected images in class folders, as {folder.name}/CLASS/image.jpg")
    return np.stack([read_square(file, size) for file in files]), np.array(classes)


def read_square(file: Path, size: int) -> np.ndarray:
    """Middle square of a photograph, reduced to (3, size, size), in [0, 1]."""
    photo = torch.from_numpy(read_photo(file)).permute(2, 0, 1).float() / 255
    side = min(photo.shape[1:])
    top, left = ((length - side) // 2 for length in photo.shape[1:])
    square = photo[None, :, top : top + side, left : left + side]
    reduced = F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return reduced[0].clamp(0, 1).numpy()


def _archive(path: Path) -> Labelled:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {re.sub(r"^[Xx]", "x", key): archive[key] for key in archive.files}
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable NumPy archive ({error})") from None
    names = ("x", "y") if "x" in arrays else ("x_train", "y_train")
    if missing := [name for name in names if name not in arrays]:
        raise DataError(
            f"{path}: expected arrays x and y, or x_train and y_train, got {', '.join(arrays)} (no {missing[0]})"
        )
    tested = "x_test" in arrays and "y_test" in arrays

    def items(key: str) -> np.ndarray:
        x = arrays[key]
        if x.dtype == np.uint8 and x.ndim >= 3:
            return _channels(x) if x.ndim == 3 or x.shape[-1] in (1, 3, 4) else x.astype(np.float32) / 255
        return x[:, None] if x.ndim == 3 else x

    test = (items("x_test"), arrays["y_test"]) if tested else None
    return _made(path.stem, items(names[0]), arrays[names[1]].reshape(-1), test)


def _table(path: Path, label: str | None) -> Labelled:
    import pandas as pd

    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except Exception as error:  # pandas and its engines raise many kinds  # noqa: BLE001
        raise DataError(f"{path}: not a readable table ({type(error).__name__}: {error})") from None
    column = label if label is not None else next((c for c in LABEL_COLUMNS if c in table.columns), None)
    if column is None or column not in table.columns:
        raise DataError(
            f"{path}: no column {label or ', '.join(LABEL_COLUMNS)}; name the classes' column with --label, one of"
            f" {', '.join(map(str, table.columns))}"
        )
    if missing := int(table[column].isna().sum()):
        raise DataError(f"{path}: {missing} rows have no {column}")
    rest = table.drop(columns=column)
    empty = {str(name): int(count) for name, count in rest.isna().sum().items() if count}
    if empty:
        raise DataError(f"{path}: missing values, by column: {empty}; fill or drop them first")
    texts = [name for name in rest.columns if not pd.api.types.is_numeric_dtype(rest[name])]
    wide = [name for name in texts if rest[name].nunique() > 50]
    if wide:
        raise DataError(f"{path}: columns with over 50 different texts: {', '.join(map(str, wide))}; drop them first")
    if not rest.shape[1]:
        raise DataError(f"{path}: no column besides {column}")
    x = pd.get_dummies(rest, columns=texts, dtype=np.float32).to_numpy(np.float32)
    return _made(path.stem, x, table[column].to_numpy())
