"""The tasks that `compare` serves; within a task, methods are interchangeable. One file per task."""

import importlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from classact.evidence.comparison import Comparison, Task

TASKS = {"mil": "classify bags of instances: ABMIL, ACMIL, AEM and their rivals"}


def load_task(name: str) -> "Task":
    """Return a task by name.

    Raises
    ------
    StudyError
        If there is none of that name.
    """
    from classact.evidence.store import StudyError

    if name not in TASKS:
        raise StudyError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return importlib.import_module(f"classact.tasks.{name.replace('-', '_')}").TASK


def compare(
    task: str,
    data: Any,
    methods: Sequence[str] | None = None,
    *,
    out: str | Path = "report",
    labels: str | Path | None = None,
    splits: str | Path | None = None,
    folds: int = 5,
    repeats: int = 1,
    reference: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    workers: int = 1,
    overwrite: bool = False,
    quiet: bool = False,
    command: str = "",
    **load_options: Any,
) -> "Comparison":
    """Compare methods on your data and write a report.

    Parameters
    ----------
    task : str
        Such as ``"mil"``.
    data : path, name or data set
        What the task's `load` takes (for ``mil``: `classact.data.open_bags`), or a data set made by it.
    methods : sequence of str, optional
        Names, compositions such as ``acmil+aem``, or ``package.module:factory`` for your own.
    out : path
        Folder of the report; a killed run is resumed from it.
    labels : path, optional
        Table of labels.
    splits : path, optional
        Given splits; see `classact.data.labels.read_splits`.
    folds, repeats : int
        Of the cross-validation.
    reference : str, optional
        Method that the others are compared with; default ``abmil`` if it takes part, else the first.
    seed : int
        Of splits and training.
    settings : mapping, optional
        ``{"acmil": {"lr": 1e-3}}``: arguments of a method, its loss or its training.
    options : mapping, optional
        Arguments for every method: ``epochs``, ``class_weight``, ``batch_size``, ...
    device : str
        ``"cpu"``, ``"cuda"``, ...
    workers : int
        Worker processes.
    overwrite : bool
        Replace another study in `out`.
    quiet : bool
        Show no progress.
    command : str
        Written into the report; default: the equivalent call.
    **load_options
        Passed to the task's `load`: ``group``, ``encoder``, ``id_column``, ...

    Returns
    -------
    Comparison
        With `.table`, `.summary` and `.save`.

    Raises
    ------
    StudyError, DataError
        With what is wrong and what to do.
    """
    from classact.evidence.comparison import compare_methods

    found = load_task(task)
    if isinstance(data, str | Path):
        data_name = str(data)
        data = found.load(data, labels=labels, **load_options)
    else:
        data_name = data.name
    given = None
    if splits is not None:
        from classact.data.labels import read_splits

        given = read_splits(Path(splits), data.ids)
    methods = list(methods or found.default_methods)
    return compare_methods(
        found,
        data,
        methods,
        out=out,
        folds=folds,
        repeats=repeats,
        reference=reference,
        seed=seed,
        settings=settings,
        options=options,
        device=device,
        workers=workers,
        splits=given,
        overwrite=overwrite,
        command=command or shlex.join(["classact", "compare", task, data_name, "--methods", ",".join(methods)]),
        quiet=quiet,
    )
