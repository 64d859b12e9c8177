"""The file ``instance_scores.h5``: where in an item its evidence lies, according to one method or several.

| node | holds |
| --- | --- |
| the file | attributes ``classes``, ``task`` and ``unit`` (what an item is called) |
| ``<item>`` | attributes ``label``, ``group``, and where known ``fold``, ``patch_size``, ``coords_unit``; data set ``coords`` (K, 2) |
| ``<item>/<method>`` | attributes ``probabilities`` (C,) and ``predicted``; a data set for every kind of score |
| ``<item>/<method>/<kind>`` | float32, (K,), or (K, C) where there is a score for every class |

An item's name may contain ``/``: its group then lies in another one, and ``file[name]`` finds it all the same.
"""  # noqa: E501

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np


class InstanceScoreWriter:
    """Writes the file item by item; it appears whole or not at all. Use it as a context manager.

    Parameters
    ----------
    path : path
        The file; one that is there is replaced.
    classes : sequence of str
        Names of the classes.
    task : str
        Name of the task.
    unit : str
        What an item is called, such as ``bag``.

    Raises
    ------
    ModuleNotFoundError
        If h5py is missing.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "instance_scores.h5"
    >>> with InstanceScoreWriter(path, ["normal", "tumor"], "mil", "bag") as file:
    ...     file.add("slide/1", "abmil", {"attention": np.array([0.9, 0.1])}, predicted="tumor")
    >>> import h5py
    >>> with h5py.File(path) as file:
    ...     print(read_items(file), file["slide/1"]["abmil"]["attention"][:])
    ['slide/1'] [0.9 0.1]
    """

    def __init__(self, path: str | Path, classes: Sequence[str], task: str = "", unit: str = "item") -> None:
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._about = {"classes": list(classes), "task": task, "unit": unit}
        self._file: Any = None

    def __enter__(self) -> Self:
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"writing {self.path.name} needs h5py: pip install 'classact[mil]'", name="h5py"
            ) from error
        self._file = h5py.File(self._part, "w")
        self._file.attrs.update(self._about)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # writes what is still in memory
            if kind is None:
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def add(
        self,
        item: str,
        method: str,
        scores: Mapping[str, np.ndarray],
        *,
        probabilities: np.ndarray | Sequence[float] | None = None,
        predicted: str = "",
        coords: np.ndarray | None = None,
        label: str = "",
        group: str = "",
        fold: int | None = None,
        patch_size: float | None = None,
        coords_unit: str | None = None,
    ) -> None:
        """Write what one method says of one item.

        Parameters
        ----------
        item, method : str
            Names; an item may be given again, with another method.
        scores : mapping
            Kind of score to (K,) or (K, C).
        probabilities : (C,), optional
            Of the classes, for the item.
        predicted, label : str
            Predicted and true class; "" where unknown.
        coords : (K, 2), optional
            Positions of the instances, as stored.
        group : str
            What the item belongs to, such as a patient.
        fold : int, optional
            Fold in which the item was predicted.
        patch_size : float, optional
            Side of a tile, in the unit of `coords`.
        coords_unit : {"pixel", "um"}, optional
            Unit of `coords`.

        Raises
        ------
        ValueError
            If scores and coordinates differ in number, or the item has scores of this method already.
        """
        sizes = {kind: len(values) for kind, values in scores.items()}
        if coords is not None:
            sizes["coords"] = len(coords)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{item}: expected as many scores as instances of every kind, got {sizes}")
        own = self._file.require_group(item)
        if method in own:
            raise ValueError(f"{item}: scores of {method} are there already")
        own.attrs.update({"label": label, "group": group})
        for name, value in (("fold", fold), ("patch_size", patch_size), ("coords_unit", coords_unit)):
            if value is not None:
                own.attrs[name] = value
        if coords is not None and "coords" not in own:
            own.create_dataset("coords", data=coords, compression="gzip")
        node = own.create_group(method)
        node.attrs["predicted"] = predicted
        if probabilities is not None:
            node.attrs["probabilities"] = np.asarray(probabilities, dtype=np.float64)
        for kind, values in scores.items():
            node.create_dataset(kind, data=np.asarray(values, dtype=np.float32), compression="gzip")


def read_items(file: Any) -> list[str]:
    """Names of the items in an open file, sorted.

    Parameters
    ----------
    file : h5py.File
        Written by `InstanceScoreWriter`; its items are the groups that have a ``label``.
    """
    found = []

    def visit(name: str, node: Any) -> None:
        if "label" in node.attrs:
            found.append(name)

    file.visititems(visit)
    return sorted(found)
