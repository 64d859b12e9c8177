"""The tasks that `compare` serves; within a task, methods are interchangeable. One file per task."""

import importlib
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from classact.evidence.comparison import Comparison, Task
    from classact.evidence.prediction import Prediction

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
    tune: int | None = None,
    fractions: Sequence[float] | None = None,
    encoders: Sequence[str] | None = None,
    target_sensitivity: float | None = None,
    exclude_bad: bool = False,
    device: str = "cpu",
    workers: int = 1,
    share_gpu: bool = False,
    ray: str | None = None,
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
    tune : int, optional
        Configurations that every method gets: its defaults and random draws from its search space, chosen on the
        validation part of every fold, each with the same number of steps.
    fractions : sequence of float, optional
        Parts of the training groups, 1 among them, for a learning curve.
    encoders : sequence of str, optional
        Feature extractors to cross with the methods, on the items that all of them have.
    target_sensitivity : float, optional
        Choose the largest threshold with at least this sensitivity on the validation part. Default: the threshold with
        the best balanced accuracy.
    exclude_bad : bool
        Leave out items that cannot be used, and list them in ``excluded.csv``.
    device : str
        ``"cpu"``, ``"cuda"``, ...
    workers : int
        Worker processes; on ``"cuda"`` at most one per GPU.
    share_gpu : bool
        Let several workers use one GPU.
    ray : str, optional
        Address of a Ray cluster to run on, or ``"local"``; needs the extra ``ray``.
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
        load_options |= {"labels": labels, "strict": False}  # the check lists what is wrong, with the rest
        if encoders:
            data = {name: found.load(data, encoder=name, **load_options) for name in encoders}
        else:
            data = found.load(data, **load_options)
    else:
        data_name = data.name
    given = None
    if splits is not None:
        from classact.data.labels import read_splits

        given = partial(read_splits, Path(splits))
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
        tune=tune,
        fractions=fractions,
        target_sensitivity=target_sensitivity,
        exclude_bad=exclude_bad,
        device=device,
        workers=workers,
        share_gpu=share_gpu,
        ray=ray,
        splits=given,
        overwrite=overwrite,
        command=command or shlex.join(["classact", "compare", task, data_name, "--methods", ",".join(methods)]),
        quiet=quiet,
    )


def predict(
    model: str | Path,
    data: Any,
    truth: str | Path | None = None,
    out: str | Path = "pred",
    *,
    method: str | None = None,
    refit: bool = False,
    command: str = "",
    **options: Any,
) -> "Prediction":
    """Apply the models of a comparison to new data and, where labels are known, measure how good they are there.

    Parameters
    ----------
    model : path
        A report folder, whose models of all folds predict together, or one ``.safetensors`` file.
    data : path, name or data set
        What the task's `load` takes; labels are not needed.
    truth : path, optional
        Table of labels of the new data.
    out : path
        Folder of the predictions.
    method : str, optional
        Which method of the report; default the best one.
    refit : bool
        Use the one model of the report that was trained on everything.
    command : str
        Written into the report; default: the equivalent call.
    **options
        Of [`predict_items`][classact.evidence.prediction.predict_items], such as ``device``, ``exclude_bad``,
        ``force``, ``overwrite`` and the options of loading.

    Returns
    -------
    Prediction
        With `.table`, `.metrics` and `.lines()`.

    Raises
    ------
    StudyError, DataError
        With what is wrong and what to do.
    """
    from classact.evidence.prediction import open_models, predict_items

    models = open_models(model, method, refit)
    named = data if isinstance(data, str | Path) else data.name
    command = command or shlex.join(["classact", "predict", str(model), str(named)])
    return predict_items(load_task(models[0].metadata["task"]), models, data, truth, out, command=command, **options)


def check_data(
    task: str,
    data: str | Path,
    labels: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    plan: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    **load_options: Any,
) -> tuple[Any, list[str]]:
    """Read every item of a data set once, and predict what a comparison would cost.

    Parameters
    ----------
    task, data, labels, options, load_options
        As in [`compare`][classact.compare].
    methods : sequence of str, optional
        Methods whose cost is measured; none by default.
    plan : mapping, optional
        ``folds``, ``repeats`` and ``tune`` of the comparison.
    workers : int
        Processes that read files.

    Returns
    -------
    check : object
        What is usable: ``problems``, ``warnings``, ``lines()``, ``clean()``, ``sizes``.
    costs : list of str
        A line for every method: hours and megabytes.
    """
    from classact.evidence.comparison import predicted_costs

    found = load_task(task)
    items = found.load(data, labels=labels, strict=False, **load_options)
    check = found.check(items, workers=workers)
    if not methods:
        return check, []
    clean = check.clean() if check.problems else items
    planned = {"folds": 5, "repeats": 1, "tune": 1, **(plan or {})}
    return check, predicted_costs(found, clean, check.sizes, methods, {}, options or {}, **planned)
