"""Data sets of bags: read lazily from any of the field's layouts, matched with labels and groups, and batched."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from classact.data.bag_files import BagFiles, DataError, RawBag, Source, find_bags, stored_label
from classact.data.labels import Labels, read_labels

CACHE_BYTES = 256 * 2**20


class Bag(NamedTuple):
    """One bag.

    Attributes
    ----------
    x : (K, D) float32
        Instance features.
    label : int
        Position of its class in the data set's `classes`; -1 if unknown.
    coords : (K, 2) or None
        Positions as stored (level-0 pixels for CLAM and TRIDENT, micrometres for STAMP).
    id : str
        Name of the bag.
    instance_labels : (K,) or None
        Labels of the instances, where the data have them; never used in training.
    """

    x: Tensor
    label: int
    coords: Tensor | None = None
    id: str = ""
    instance_labels: Tensor | None = None


class BagBatch(NamedTuple):
    """Bags padded to the same length: x (N, K, D), mask (N, K) or None if nothing is padded, coords, label (N,)."""

    x: Tensor
    mask: Tensor | None
    coords: Tensor | None
    label: Tensor


def collate_bags(bags: Sequence[Bag]) -> BagBatch:
    """Pad bags into one batch; `mask` is True at real instances."""
    label = torch.tensor([bag.label for bag in bags])
    sizes = [len(bag.x) for bag in bags]
    coords = None
    if all(bag.coords is not None for bag in bags):
        coords = torch.nn.utils.rnn.pad_sequence([bag.coords for bag in bags], batch_first=True)  # type: ignore[misc]
    if len(set(sizes)) == 1:
        return BagBatch(torch.stack([bag.x for bag in bags]), None, coords, label)
    x = torch.nn.utils.rnn.pad_sequence([bag.x for bag in bags], batch_first=True)
    mask = torch.arange(x.shape[1]) < torch.tensor(sizes).unsqueeze(1)
    return BagBatch(x, mask, coords, label)


class BagDataset(Dataset[Bag]):
    """Bags with labels and groups. Files are opened when a bag is asked for; a small part stays in memory.

    Attributes
    ----------
    ids : list of str
        Names of the bags.
    labels : (n,) int array
        Positions in `classes`.
    classes : list of str
        Names of the classes; of two, the second is the positive one.
    groups : list of str
        What may not straddle training and test, such as the patient, per bag.
    in_dim : int
        Width of the features, as in the first bag.
    tabular : bool
        Whether the features are hand-made columns of different units, to be standardised before training.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[int],
        classes: Sequence[str],
        groups: Sequence[str],
        *,
        name: str = "bags",
        group_name: str = "bag",
        layout: str = "memory",
        tabular: bool = False,
    ) -> None:
        if not len(sources) == len(labels) == len(groups):
            raise ValueError(
                f"expected as many labels and groups as bags, got {len(sources)} bags, {len(labels)} labels, "
                f"{len(groups)} groups"
            )
        if not sources:
            raise DataError(f"{name}: no bags")
        self.sources, self.labels = list(sources), np.asarray(labels, dtype=np.int64)
        self.classes, self.groups = list(classes), list(groups)
        self.name, self.group_name, self.layout, self.tabular = name, group_name, layout, tabular
        self.ids = [source.id for source in self.sources]
        if len(set(self.ids)) < len(self.ids):
            twice = sorted({i for i in self.ids if self.ids.count(i) > 1})
            raise DataError(f"{name}: two bags have the same name: {', '.join(twice[:5])}")
        self._cache: dict[int, Bag] = {}
        self._cached = 0
        self.in_dim = self.sources[0].read().features.shape[1]

    def __len__(self) -> int:
        return len(self.sources)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": {}, "_cached": 0}

    def __getitem__(self, index: int) -> Bag:
        if (cached := self._cache.get(index)) is not None:
            return cached._replace(label=int(self.labels[index]))
        raw = self.read(index)
        bag = Bag(
            torch.from_numpy(np.ascontiguousarray(raw.features, dtype=np.float32)),
            int(self.labels[index]),
            None if raw.coords is None else torch.from_numpy(np.ascontiguousarray(raw.coords, dtype=np.float32)),
            self.ids[index],
            None if raw.instance_labels is None else torch.from_numpy(np.asarray(raw.instance_labels).astype(np.int64)),
        )
        size = bag.x.nbytes
        if self._cached + size <= CACHE_BYTES:
            self._cache[index] = bag
            self._cached += size
        return bag

    def __iter__(self) -> Iterator[Bag]:
        return (self[index] for index in range(len(self)))

    def read(self, index: int) -> RawBag:
        """Read one bag as stored.

        Raises
        ------
        DataError
            If the file is damaged or the bag has another feature width.
        """
        raw = self.sources[index].read()
        if raw.features.shape[1] != self.in_dim:
            raise DataError(
                f"{self.sources[index].path}: bag {self.ids[index]!r} has {raw.features.shape[1]} features per "
                f"instance, expected {self.in_dim} as in {self.ids[0]!r}"
            )
        return raw

    def subset(self, indices: Sequence[int] | np.ndarray) -> "BagSubset":
        """Return some of the bags, by position."""
        return BagSubset(self, indices)

    def scan(self, progress: Callable[[int, int], None] | None = None) -> tuple[np.ndarray, str]:
        """Read every bag once and check its values.

        Returns
        -------
        sizes : (n,) int array
            Number of instances of each bag.
        fingerprint : str
            Changes whenever a feature, a name, a label or a group does.

        Raises
        ------
        DataError
            If a bag is damaged, empty, of another width, or holds NaN or infinity.
        """
        sizes, crc = np.empty(len(self), dtype=np.int64), 0
        for index in range(len(self)):
            raw = self.read(index)
            if raw.features.dtype.kind == "f" and not np.isfinite(raw.features).all():
                row, column = np.argwhere(~np.isfinite(raw.features))[0]
                source = self.sources[index]
                raise DataError(
                    f"{source.path}{f', group {source.key!r}' if source.key else ''}: bag {self.ids[index]!r} holds "
                    f"{raw.features[row, column]} at instance {row}, feature {column}; expected finite numbers"
                )
            sizes[index] = len(raw.features)
            crc = zlib.crc32(np.ascontiguousarray(raw.features), crc)  # type: ignore[arg-type]
            if progress is not None:
                progress(index + 1, len(self))
        table = repr(list(zip(self.ids, self.labels.tolist(), self.groups, sizes.tolist(), strict=True)))
        return sizes, f"{zlib.crc32(table.encode(), crc):08x}"


class BagSubset(Dataset[Bag]):
    """Some bags of a [`BagDataset`][classact.data.BagDataset]."""

    def __init__(self, bags: BagDataset, indices: Sequence[int] | np.ndarray) -> None:
        self.bags, self.indices = bags, np.asarray(indices, dtype=np.int64)
        self.in_dim, self.classes, self.tabular = bags.in_dim, bags.classes, bags.tabular

    @property
    def labels(self) -> np.ndarray:
        """Labels of these bags."""
        return self.bags.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Bag:
        return self.bags[int(self.indices[index])]

    def __iter__(self) -> Iterator[Bag]:
        return (self[index] for index in range(len(self)))


def open_bags(
    data: str | Path,
    labels: str | Path | None = None,
    *,
    id_column: str | None = None,
    label_column: str | None = None,
    group: str | None = None,
    encoder: str | None = None,
    classes: Sequence[str] | None = None,
) -> BagDataset:
    """Open bags in any layout of `classact.data.bag_files`.

    Parameters
    ----------
    data : path or name
        A folder or file of bags, or the name of a known data set (``classact data list``), such as ``digits``.
    labels : path, optional
        Table of labels; not needed where the bags' own files hold them.
    id_column, label_column : str, optional
        Columns of that table.
    group : str, optional
        What may not straddle training and test: a column (default ``case_id``), ``slide_id`` for every bag on its
        own, or ``tcga`` for the first 12 characters of its name.
    encoder : str, optional
        Which feature extractor's bags to take, where there are several.
    classes : sequence of str, optional
        Order of the classes; of two, the second is the positive one. Default: sorted.

    Raises
    ------
    DataError
        If something is missing or does not fit; the message says what, where, and what to do.
    """
    from classact.data.registry import find_data

    found = find_data(str(data))
    if found == "digits":
        from classact.data.digits import digits_bags

        return digits_bags()
    path = Path(found)
    files = find_bags(path, encoder)
    names = [source.id for source in files.sources]
    if labels is not None:
        table = read_labels(Path(labels), names, id_column, label_column)
    else:
        table = _stored_labels(path, files)
    class_names, codes = _encode(table, names, classes)
    groups, group_name = _groups(Path(labels) if labels else path, files, table, names, group, id_column)
    return BagDataset(
        files.sources,
        codes,
        class_names,
        groups,
        name=Path(str(data)).name,
        group_name=group_name,
        layout=files.layout,
        tabular=files.independent,
    )


def _stored_labels(path: Path, files: BagFiles) -> Labels:
    found = {source.id: stored_label(source) for source in files.sources}
    missing = [name for name, label in found.items() if label is None]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(found)} bags have no label of their own ({', '.join(missing[:3])}); "
            "give a table with --labels labels.csv"
        )
    return Labels({name: str(label) for name, label in found.items()})


def _encode(table: Labels, names: list[str], classes: Sequence[str] | None) -> tuple[list[str], list[int]]:
    values = sorted(set(table.of_bag.values()))
    if all(value.lstrip("-").isdigit() for value in values):
        values.sort(key=int)
    if classes is not None:
        if unknown := [value for value in values if value not in classes]:
            raise DataError(f"--classes: labels {', '.join(unknown)} are not among {', '.join(classes)}")
        values = list(classes)
    if len(values) < 2:
        raise DataError(f"labels: expected at least two classes, found {', '.join(values)}")
    return values, [values.index(table.of_bag[name]) for name in names]


def _groups(
    where: Path, files: BagFiles, table: Labels, names: list[str], group: str | None, id_column: str | None
) -> tuple[list[str], str]:
    if group == "tcga":
        return [name[:12] for name in names], "tcga"
    if group is None and table.keyed_by_patient:
        group = id_column or next((c for c in ("case_id", "patient") if c in table.columns), None)
        group = group or next(c for c, values in table.columns.items() if set(values.values()) != set(names))
    wanted = group or "case_id"
    if wanted in table.columns:
        members = [table.columns[wanted][name] for name in names]
        if empty := [name for name, member in zip(names, members, strict=True) if not member]:
            raise DataError(f"{where}: no {wanted!r} for {len(empty)} bags: {', '.join(empty[:5])}")
        return members, wanted
    if group in ("slide_id", "bag"):
        return list(names), "slide_id"
    if group is None and files.independent:
        return list(names), "bag"
    columns = ", ".join(table.columns) or "no columns"
    raise DataError(
        f"{where}: no column {wanted!r} says which bags belong together ({columns}). Bags of one patient must not "
        "straddle training and test: name their column with --group COLUMN, say --group tcga (first 12 characters of "
        "the name), or --group slide_id if every bag is a patient of its own"
    )
