"""Data sets of bags: read lazily from any of the field's layouts, matched with labels and groups, and batched."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from classact.data.bag_files import BagFiles, DataError, RawBag, Source, find_bags, stored_label
from classact.data.labels import Labels, read_labels, some

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


class Problem(NamedTuple):
    """An item that cannot be used: its name, why, and its label where that is known."""

    item: str
    reason: str
    label: str = ""


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
        Positions in `classes`; -1 where unknown.
    classes : list of str
        Names of the classes; of two, the second is the positive one.
    groups : list of str
        What may not straddle training and test, such as the patient, per bag.
    problems : list of Problem
        What was named but is not among the bags: rows of the table without a bag, bags without a label.
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
        problems: Sequence[Problem] = (),
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
        self.problems = list(problems)
        self.ids = [source.id for source in self.sources]
        if len(set(self.ids)) < len(self.ids):
            twice = sorted({i for i in self.ids if self.ids.count(i) > 1})
            raise DataError(f"{name}: two bags have the same name: {', '.join(twice[:5])}")
        self._cache: dict[int, Bag] = {}
        self._cached = 0

    @cached_property
    def in_dim(self) -> int:
        """Width of the features, as in the first bag."""
        return self.sources[0].read().features.shape[1]

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

    def select(self, indices: Sequence[int] | np.ndarray) -> "BagDataset":
        """Return a data set of some of the bags, by position, with names, groups and classes."""
        return self._with(
            [self.sources[i] for i in indices],
            [int(self.labels[i]) for i in indices],
            [self.groups[i] for i in indices],
        )

    def portable(self, put: Callable[[Any], Callable[[], Any]]) -> "BagDataset":
        """Return the same bags independent of files on this machine.

        Parameters
        ----------
        put : callable
            Takes a bag as stored and returns a function of no arguments that gives it back, anywhere.
        """
        sources = [replace(source, arrays=put(source.read())) for source in self.sources]
        return self._with(sources, self.labels.tolist(), self.groups)

    def _with(self, sources: list[Source], labels: list[int], groups: list[str]) -> "BagDataset":
        return BagDataset(
            sources,
            labels,
            self.classes,
            groups,
            name=self.name,
            group_name=self.group_name,
            layout=self.layout,
            tabular=self.tabular,
            problems=self.problems,
        )


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
    strict: bool = True,
    training: bool = True,
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
    strict : bool
        Raise an error where a bag has no label or a label no bag; else leave them out and list them in `problems`.
    training : bool
        If not, the bags are only to be predicted: labels are read from `labels` alone and need not be there, and every
        bag is a group of its own unless something says otherwise.

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
    elif training:
        table = _stored_labels(path, files)
    else:
        table = Labels({}, without_label=tuple(names))
    problems = _problems(Path(labels) if labels else path, table, names, strict and training)
    if training:
        files = replace(files, sources=[source for source in files.sources if source.id in table.of_bag])
        names = [source.id for source in files.sources]
    class_names, codes = _encode(table, names, classes, training)
    groups, group_name = _groups(Path(labels) if labels else path, files, table, names, group, id_column, training)
    return BagDataset(
        files.sources,
        codes,
        class_names,
        groups,
        name=Path(str(data)).name,
        group_name=group_name,
        layout=files.layout,
        tabular=files.independent,
        problems=problems,
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


def _problems(where: Path, table: Labels, names: list[str], strict: bool) -> list[Problem]:
    if strict and table.without_label:
        raise DataError(
            f"{where}: no label for {len(table.without_label)} of {len(names)} bags: {some(list(table.without_label))}"
        )
    if strict and table.without_bag:
        lost = list(table.without_bag)
        raise DataError(f"{where}: {len(lost)} rows have no bag: {some(lost)}")
    return [
        *(Problem(name, "no label") for name in table.without_label),
        *(Problem(name, "missing: no bag of that name", label) for name, label in table.without_bag.items()),
    ]


def _encode(
    table: Labels, names: list[str], classes: Sequence[str] | None, training: bool
) -> tuple[list[str], list[int]]:
    values = sorted(set(table.of_bag.values()))
    if all(value.lstrip("-").isdigit() for value in values):
        values.sort(key=int)
    if classes is not None:
        if unknown := [value for value in values if value not in classes]:
            raise DataError(f"--classes: labels {', '.join(unknown)} are not among {', '.join(classes)}")
        values = list(classes)
    if training and len(values) < 2:
        raise DataError(f"labels: expected at least two classes, found {', '.join(values)}")
    return values, [values.index(table.of_bag[name]) if name in table.of_bag else -1 for name in names]


def _groups(
    where: Path,
    files: BagFiles,
    table: Labels,
    names: list[str],
    group: str | None,
    id_column: str | None,
    training: bool,
) -> tuple[list[str], str]:
    if group == "tcga":
        return [name[:12] for name in names], "tcga"
    if group is None and table.keyed_by_patient:
        group = id_column or next((c for c in ("case_id", "patient") if c in table.columns), None)
        group = group or next(c for c, values in table.columns.items() if set(values.values()) != set(names))
    wanted = group or "case_id"
    if wanted in table.columns:
        members = [table.columns[wanted].get(name, "" if training else name) for name in names]
        if empty := [name for name, member in zip(names, members, strict=True) if not member]:
            raise DataError(f"{where}: no {wanted!r} for {len(empty)} bags: {', '.join(empty[:5])}")
        return members, wanted
    if group in ("slide_id", "bag"):
        return list(names), "slide_id"
    if group is None and (files.independent or not training):
        return list(names), "bag"
    columns = ", ".join(table.columns) or "no columns"
    raise DataError(
        f"{where}: no column {wanted!r} says which bags belong together ({columns}). Bags of one patient must not "
        "straddle training and test: name their column with --group COLUMN, say --group tcga (first 12 characters of "
        "the name), or --group slide_id if every bag is a patient of its own"
    )
