"""Data in which classes are missing: tables with gaps in the label column, image folders with an `unlabelled` one."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from classact.data.bag_files import DataError
from classact.data.labelled import LABEL_COLUMNS, load_labelled, read_square
from classact.data.photos import list_photos

UNLABELLED = ("unlabelled", "unlabeled")
HIDDEN = (5, 6, 7, 8, 9)  # of the digits


@dataclass(frozen=True)
class PartlyLabelled:
    """Rows or images, some of them without a class.

    Attributes
    ----------
    name : str
        What it is called in a report.
    x : (n, D) float64 or (n, C, H, W) float32
        Columns of a table as they are, or images in [0, 1].
    y : (n,) int64
        Known classes, 0 to C - 1, and -1 where there is none.
    classes : tuple of str
        Names of the known classes.
    items : tuple of str
        What each item is called: its line in the table, from 1, or its file.
    columns : tuple of str
        Names of the columns; none for images.
    truth : (n,) object array, optional
        Names of the true classes, for scoring only; None where it is not known.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    items: tuple[str, ...]
    columns: tuple[str, ...] = ()
    truth: np.ndarray | None = None

    @property
    def unlabelled(self) -> np.ndarray:
        """Which items have no class, (n,) bool."""
        return self.y < 0


def load_unlabelled(
    source: str | Path,
    label: str | None = None,
    truth: str | Path | None = None,
    size: int = 32,
    images: bool = False,
    hide: Sequence[str] = (),
    limit: int | None = None,
) -> PartlyLabelled:
    """Read data in which some items have no class.

    Parameters
    ----------
    source : str or path
        ``digits`` (part of scikit-learn) with the classes 5 to 9 hidden; a CSV or Parquet table whose label column has
        gaps; or a folder of images in class folders, with one named ``unlabelled`` beside them. With `hide` also all
        images that [`load_labelled`][classact.data.labelled.load_labelled] reads, of which the training part is taken.
    label : str, optional
        Column of a table that holds the classes; by default the one named label, target, class or y. A missing value,
        an empty text and -1 mean that there is none.
    truth : str or path, optional
        For scoring only: a column of the table; or a folder with the unlabelled images in class folders.
    size : int
        Side to which images are cut and reduced, in pixels.
    images : bool
        Read the digits as images.
    hide : sequence of str
        Classes whose labels are taken away, to see how well they are found again; the labels become the truth.
    limit : int, optional
        Take so many items only, drawn at random, always the same ones.

    Raises
    ------
    DataError
        If nothing of the kind is there, no class is known, or columns are not finite numbers; the message names them.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: expected at least 1, got {limit}")
    if hide and truth is not None:
        raise DataError("hide, truth: expected one of them; the labels of hidden classes are the truth")
    path = Path(source)
    if str(source) == "digits":
        found = _digits(images, hide)
    elif path.is_file() and path.suffix in (".csv", ".parquet"):
        found = _table(path, label, None if truth is None else str(truth))
    elif hide and not any((path / name).is_dir() for name in UNLABELLED):
        found = _labelled(source, size)
    elif path.is_dir():
        found = _folder(path, None if truth is None else Path(truth), size)
    else:
        raise DataError(
            f"{path}: expected digits, a .csv or .parquet table, or a folder of images with one {UNLABELLED[0]}"
        )
    if limit is not None and limit < len(found.y):
        found = _limited(found, limit)
    return _hidden(found, tuple(map(str, hide))) if hide else found


def _labelled(source: str | Path, size: int) -> PartlyLabelled:
    data = load_labelled(source, None, size)
    if data.x.ndim != 4:
        raise DataError(f"{source}: expected images, found items of shape {data.shape}")
    items = tuple(str(number + 1) for number in range(len(data.y)))
    return PartlyLabelled(data.name, data.x.numpy(), data.y.numpy(), data.classes, items)


def _limited(found: PartlyLabelled, limit: int) -> PartlyLabelled:
    rows = np.sort(np.random.default_rng(0).permutation(len(found.y))[:limit])
    truth = None if found.truth is None else found.truth[rows]
    return replace(found, x=found.x[rows], y=found.y[rows], items=tuple(found.items[k] for k in rows), truth=truth)


def _hidden(found: PartlyLabelled, hide: tuple[str, ...]) -> PartlyLabelled:
    if unknown := [name for name in hide if name not in found.classes]:
        raise DataError(f"hide: no class {', '.join(unknown)}; there are {', '.join(found.classes)}")
    names = np.array([found.classes[k] if k >= 0 else None for k in found.y], object)
    y, classes = _numbered(found.name, np.array([None if name in hide else name for name in names], object))
    return replace(found, y=y, classes=classes, truth=names)


def _digits(images: bool, hide: Sequence[str]) -> PartlyLabelled:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    known = np.where(np.isin(y, () if hide else HIDDEN), -1, y).astype(np.int64)
    classes = tuple(map(str, range(10 if hide else 5)))
    pixels = tuple(f"pixel_{i}_{j}" for i in range(8) for j in range(8))
    names = tuple(str(number + 1) for number in range(len(x)))
    truth = y.astype(str).astype(object)
    if images:
        grey = (x.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
        return PartlyLabelled("digits", grey, known, classes, names, (), truth)
    return PartlyLabelled("digits", x, known, classes, names, pixels, truth)


def _numbered(name: str, labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes from 0, -1 where the label is None."""
    classes = sorted({str(one) for one in labels if one is not None})
    if not classes:
        raise DataError(f"{name}: expected at least one labelled item, found none")
    number = {one: index for index, one in enumerate(classes)}
    return np.array([-1 if one is None else number[str(one)] for one in labels], np.int64), tuple(classes)


def _table(path: Path, label: str | None, truth: str | None) -> PartlyLabelled:
    import pandas as pd

    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except Exception as error:  # pandas and its engines raise many kinds  # noqa: BLE001
        raise DataError(f"{path}: not a readable table ({type(error).__name__}: {error})") from None
    column = label if label is not None else next((c for c in LABEL_COLUMNS if c in table.columns), None)
    for name, option in ((column or ", ".join(LABEL_COLUMNS), "--label"), (truth, "--truth")):
        if name is not None and name not in table.columns:
            raise DataError(f"{path}: no column {name} ({option}); there are {', '.join(map(str, table.columns))}")
    rest = table.drop(columns=[c for c in (column, truth) if c is not None])
    texts = [str(c) for c in rest.columns if not pd.api.types.is_numeric_dtype(rest[c])]
    if texts:
        raise DataError(
            f"{path}: columns that are not numbers: {', '.join(texts)}; turn them into numbers first, for instance with"
            " sklearn.preprocessing.OneHotEncoder or OrdinalEncoder, or drop them"
        )
    x = rest.to_numpy(np.float64)
    if not x.shape[1]:
        raise DataError(f"{path}: no column besides {column}")
    bad = {str(c): int(n) for c, n in zip(rest.columns, (~np.isfinite(x)).sum(0), strict=True) if n}
    if bad:
        raise DataError(
            f"{path}: missing or infinite values, by column: {bad}; fill them, for instance with"
            " sklearn.impute.SimpleImputer, or drop them"
        )
    if constant := [str(c) for c, same in zip(rest.columns, (x == x[:1]).all(0), strict=True) if same]:
        warnings.warn(f"{path}: columns that are the same in every row: {', '.join(constant)}", stacklevel=3)
    y, classes = _numbered(str(path), np.array([_class(value) for value in table[column]], object))
    names = None if truth is None else np.array([_class(value) for value in table[truth]], object)
    items = tuple(str(number + 1) for number in range(len(table)))
    return PartlyLabelled(path.stem, x, y, classes, items, tuple(map(str, rest.columns)), names)


def _class(value: Any) -> str | None:
    """Return the class as text, or None for a missing value, an empty text and -1."""
    if value is None or value != value or str(value).strip() in ("", "-1", "-1.0"):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _folder(folder: Path, truth: Path | None, size: int) -> PartlyLabelled:
    parts = {one.name: one for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith(".")}
    hidden = next((parts[name] for name in UNLABELLED if name in parts), None)
    if hidden is None:
        raise DataError(f"{folder}: expected a folder {UNLABELLED[0]} beside those of the classes")
    of_file = {}
    if truth is not None:
        for file in list_photos(truth):
            of_file[file.name] = file.parent.name
    files, labels, names = [], [], []
    for name, place in parts.items():
        for file in list_photos(place):
            files.append(file)
            labels.append(None if place is hidden else name)
            names.append(of_file.get(file.name) if place is hidden else name)
    if truth is not None and not any(names[k] is not None for k in range(len(files)) if labels[k] is None):
        raise DataError(f"{truth}: none of its images has the name of one in {hidden}")
    y, classes = _numbered(str(folder), np.array(labels, object))
    x = np.stack([read_square(file, size) for file in files])
    items = tuple(str(file.relative_to(folder)) for file in files)
    return PartlyLabelled(folder.name, x, y, classes, items, (), None if truth is None else np.array(names, object))
