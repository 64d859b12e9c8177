"""Predictions of saved models for new data and, where these have labels, what the models are worth there.

Nothing is fitted here: weights, temperature and threshold stay as the training left them. Several models, such as those
of the folds of a comparison, predict together: the mean of their calibrated probabilities, decided at the mean of their
thresholds.
"""

import html
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classact.data.bag_files import DataError
from classact.data.check import excluded_csv, raise_problems
from classact.data.labels import some
from classact.data.provenance import provenance, summarise
from classact.evidence.instance_scores import InstanceScoreWriter
from classact.evidence.metrics import bin_of, calibrate, confidence, decide
from classact.evidence.store import StudyError
from classact.evidence.validation import COLUMNS, validate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from classact.evidence.comparison import Task

WRITER = "classact predict"
FILES = ("predictions.csv", "instance_scores.h5", "metrics.csv", "excluded.csv", "report.html", "prediction.json")
NAMES = {"auc": "AUC", "auprc": "AUPRC", "brier": "Brier score", "macro_f1": "Macro F1"}


@dataclass(frozen=True, eq=False)
class Prediction:
    """What saved models say of new data.

    Attributes
    ----------
    method : str
        Name of the method.
    classes : list of str
        Of two, the second is the positive one.
    unit : str
        What an item is called, such as ``bag``.
    members : int
        Number of models that predicted together.
    threshold : float or None
        On the positive class's probability, as frozen in training; None for more than two classes.
    table : DataFrame
        One row per item: ``id``, ``group``, ``label`` (only where labels were given), ``predicted``, ``threshold``,
        ``p(<class>)`` for every class, and ``p_sd``, the standard deviation of the positive (of more than two: the
        predicted) class's probability over the members, missing for one.
    metrics : DataFrame
        One row per metric and level: ``external`` with its 95 % interval, the ``internal`` estimate of the training,
        and ``drop``, external minus internal; see [`validate`][classact.evidence.validation.validate]. No rows without
        labels.
    disagreeing : list of str
        Items on which the members, each at its own threshold, decide differently; those whose probability varies most
        come first.
    notes : list of str
        What a reader must know, such as what could not be checked.
    folder : Path
        Where the files lie.
    """

    method: str
    classes: list[str]
    unit: str
    members: int
    threshold: float | None
    table: "pd.DataFrame"
    metrics: "pd.DataFrame"
    disagreeing: list[str]
    notes: list[str]
    folder: Path

    def lines(self) -> list[str]:
        """What there is to say, in sentences; the most important first."""
        wanted = ("auc", "sensitivity", "specificity") if len(self.classes) == 2 else ("auc", "balanced_accuracy")
        rows: list[dict[Any, Any]] = self.metrics.to_dict("records")
        lines = [_sentence(row, self.unit, self.threshold) for row in rows if row["metric"] in wanted]
        n = len(self.table)
        counts = self.table["predicted"].value_counts()
        by = f"{self.members} models" if self.members > 1 else "one model"
        lines.append(
            f"{n} {self.unit}{'s' * (n != 1)} predicted by {by} of {self.method}: "
            f"{', '.join(f'{counts.get(name, 0)} as {name}' for name in self.classes)}."
        )
        if self.members > 1:
            lines.append(f"The models decide differently on {len(self.disagreeing)} of {n}.")
        return lines + self.notes


def _name(metric: str) -> str:
    return NAMES.get(metric) or metric.replace("_", " ").capitalize()


def _number(value: float, ends: tuple[float, float] | None = None) -> str:
    if not np.isfinite(value):
        return "-"
    if ends is None or not np.isfinite(ends).all():
        return f"{value:.2f}"
    return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def _sentence(row: Mapping[str, Any], unit: str, threshold: float | None) -> str:
    text = _name(row["metric"])
    text = f"External {text if text.isupper() else text.lower()}"
    text += "" if row["level"] == unit else f" per {row['level']}"
    text += f" {_number(row['external'], (row['low'], row['high']))}"
    if row["metric"] in ("sensitivity", "specificity") and threshold is not None:
        text += f" at the frozen threshold {threshold:.2f}"
    if np.isfinite(row["internal"]):
        text += f"; internal estimate {row['internal']:.2f}"
    if np.isfinite(row["drop"]):
        word = "drop" if row["drop"] <= 0 else "gain"
        text += f"; {word} {_number(row['drop'], (row['drop_low'], row['drop_high']))}"
    return text + "."


def open_models(model: str | Path, method: str | None = None, refit: bool = False) -> list[Any]:
    """Load the models that predict together.

    Parameters
    ----------
    model : path
        A ``.safetensors`` file written by a comparison (or its name without the suffix), or a report folder.
    method : str, optional
        Of a report folder: which method; default the best one.
    refit : bool
        Of a report folder: the one model fitted on everything, instead of the models of all folds.

    Returns
    -------
    list of Module
        Each with its ``metadata``.

    Raises
    ------
    StudyError
        If there is no such method, no fold model, or a file says too little of its model.
    FileNotFoundError
        If there is no such file.
    """
    from classact.saving import load

    path = Path(model)
    if path.is_dir():
        files = _files(path, method, refit)
    elif method is not None or refit:
        raise StudyError(f"{path}: --method and --refit choose among the models of a report folder")
    else:
        files = [path]
    models = []
    for file in files:
        loaded: Any = load(file)
        if missing := [key for key in ("task", "method", "classes") if key not in loaded.metadata]:
            raise StudyError(
                f"{file}: nothing says its {', '.join(missing)}; expected a model written by `classact compare`"
            )
        loaded.metadata["file"] = str(file)
        models.append(loaded)
    return models


def _files(report: Path, method: str | None, refit: bool) -> list[Path]:
    index = report / "models" / "index.json"
    if not index.exists():
        raise StudyError(
            f"{report}: expected a report folder of `classact compare`, with models/index.json, or a .safetensors file"
        )
    content = json.loads(index.read_text(encoding="utf-8"))
    known, method = content["methods"], method or content["best"]
    if method not in known:
        raise StudyError(f"{report}: no model of {method!r}; there are {', '.join(known) or 'none'} (--method)")
    file = index.with_name(known[method].removesuffix(".safetensors"))
    if refit:
        return [file]
    folds = sorted(file.with_name(f"{file.name}.folds").glob("*.safetensors"), key=lambda f: int(f.stem))
    if not folds:
        raise StudyError(f"{report}: holds no fold models of {method}; take the one fitted on everything with --refit")
    return folds


def predict_items(
    task: "Task",
    models: Sequence[Any],
    data: Any,
    truth: str | Path | None = None,
    out: str | Path = "pred",
    *,
    device: str = "cpu",
    workers: int = 1,
    exclude_bad: bool = False,
    force: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    command: str = "",
    **load_options: Any,
) -> Prediction:
    """Predict new data, and compare with the truth where it is known.

    One item is in memory at a time, beside the models.

    Parameters
    ----------
    task : Task
        That of the models.
    models : sequence of Module
        As from [`open_models`][classact.evidence.prediction.open_models].
    data : path, name or data set
        What the task's `load` takes, or a data set made by it; the labels of a data set are the truth.
    truth : path, optional
        Table of labels. Items without a label are predicted, but not counted.
    out : path
        Folder for the files.
    device : str
        ``"cpu"``, ``"cuda"``, ...
    workers : int
        Processes that check the data.
    exclude_bad : bool
        Leave out what cannot be used and list it in ``excluded.csv``.
    force : bool
        Predict although the features were made otherwise than those of the training.
    overwrite : bool
        Replace earlier predictions in `out`.
    quiet : bool
        Print nothing.
    command : str
        Written into the report.
    **load_options
        Passed to the task's `load`.

    Returns
    -------
    Prediction
        Its files are ``predictions.csv``, ``instance_scores.h5`` where the method scores instances, ``report.html``,
        ``prediction.json``, with truth ``metrics.csv``, and ``excluded.csv`` if something was left out.

    Raises
    ------
    DataError
        If the data cannot be used, have labels the models do not know, or do not fit the models: another feature width,
        encoder, magnification or patch size.
    StudyError
        If `out` holds something else or earlier predictions, the models differ in their classes, or they answer NaN.
        Whatever is raised, `out` is as it was.
    """
    import pandas as pd

    out, about = Path(out), models[0].metadata
    classes = list(about["classes"])
    if any(list(model.metadata["classes"]) != classes for model in models):
        raise StudyError("models: expected the same classes in the same order in all of them")
    _check_folder(out, overwrite)
    if isinstance(data, str | Path):
        data = task.load(data, labels=truth, training=False, **load_options)
    elif truth is not None or load_options:
        raise ValueError("truth and options of loading: expected data as a path; a data set has its own labels")
    _true_labels(data, classes)  # what is wrong with them is said before every file is read
    data, problems = _usable(task, data, workers, exclude_bad, quiet)
    labels = _true_labels(data, classes)
    made = [provenance(source) for source in data.sources]
    warnings, notes = _fits(about, data, summarise(made), force)
    for line in warnings:
        _say(f"warning: {line}", quiet)
    notes = warnings + notes
    if problems:
        notes.append(f"{len(problems)} could not be used and were left out: excluded.csv.")
    if (unknown := int((labels < 0).sum())) and unknown < len(labels):
        notes.append(f"{unknown} of {len(labels)} {task.unit}s have no label: predicted, but not counted.")

    thresholds = [model.metadata.get("threshold") for model in models]
    threshold = None
    if len(classes) == 2 and None not in thresholds:
        threshold = float(np.mean(thresholds))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as part:
        folder = Path(part)
        members, scored = [], False
        scores_file = folder / "instance_scores.h5"
        with InstanceScoreWriter(scores_file, classes, task.name, task.unit) as file:
            for i, (item, tile) in enumerate(zip(data.ids, made, strict=True)):
                of_item, scores, coords = _score(task, models, data, i, device)
                members.append(of_item)
                scored = scored or bool(scores)
                mean = of_item.mean(0)
                file.add(
                    item,
                    about["method"],
                    scores,
                    probabilities=mean,
                    predicted=classes[decide(mean[None], threshold)[0]],
                    coords=coords,
                    label=classes[labels[i]] if labels[i] >= 0 else "",
                    group=data.groups[i],
                    patch_size=tile.patch_size,
                    coords_unit=tile.unit,
                )
                if (i + 1) % 100 == 0:
                    _say(f"{i + 1} of {len(data.ids)} {task.unit}s predicted", quiet)
        if not scored:
            scores_file.unlink()
        of_members = np.stack(members)
        probabilities = of_members.mean(1)
        table = _table(data, labels, classes, of_members, threshold)
        known = labels >= 0
        metrics = pd.DataFrame(columns=list(COLUMNS))
        if known.any():
            metrics, more = validate(
                labels[known],
                probabilities[known],
                [group for group, there in zip(data.groups, known, strict=True) if there],
                classes,
                threshold,
                about.get("internal") or {},
                task.unit,
                data.group_name,
            )
            notes += more
        prediction = Prediction(
            about["method"],
            classes,
            task.unit,
            len(models),
            threshold,
            table,
            metrics,
            _disagreeing(table, of_members, thresholds),
            notes,
            out,
        )
        table.to_csv(folder / "predictions.csv", index=False)
        if len(metrics):
            metrics.to_csv(folder / "metrics.csv", index=False)
        if problems:
            (folder / "excluded.csv").write_text(excluded_csv(problems), encoding="utf-8")
        record = _record(prediction, models, data, summarise(made), command)
        (folder / "report.html").write_text(_page(prediction, record, labels, probabilities), encoding="utf-8")
        (folder / "prediction.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for name in FILES:
            if (folder / name).exists():
                (folder / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)  # of the predictions that are replaced
    return prediction


def _check_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise StudyError(f"{out}: expected a folder, found a file")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        own = json.loads((out / "prediction.json").read_text(encoding="utf-8")).get("writer") == WRITER
    except (OSError, ValueError, AttributeError):
        own = False
    if not own:
        raise StudyError(f"{out}: holds other files and no predictions; choose an empty or new folder with --out")
    if not overwrite:
        raise StudyError(f"{out}: holds earlier predictions; choose another --out, or replace them with --overwrite")


def _true_labels(data: Any, classes: list[str]) -> np.ndarray:
    """Labels (n,) as positions in the models' classes; -1 where unknown."""
    labels = np.asarray(data.labels)
    names = [data.classes[k] for k in sorted(set(labels[labels >= 0].tolist()))]
    if unknown := [name for name in names if name not in classes]:
        raise DataError(
            f"truth: labels {', '.join(unknown)} are none of the models' classes; the truth has {', '.join(names)}, "
            f"the models know {', '.join(classes)}"
        )
    return np.array([classes.index(data.classes[k]) if k >= 0 else -1 for k in labels], dtype=np.int64)


def _usable(task: "Task", data: Any, workers: int, exclude_bad: bool, quiet: bool) -> tuple[Any, list[Any]]:
    """The items that can be used, and the problems of the others."""
    check = task.check(data, workers=workers)
    for line in check.warnings:
        _say(f"warning: {line}", quiet)
    problems = [problem for problem in check.problems if not problem.reason.startswith("no label")]
    if not exclude_bad:
        raise_problems(problems, task.unit)
    return check.clean(training=False), problems


def _fits(about: Mapping[str, Any], data: Any, found: Mapping[str, Any], force: bool) -> tuple[list[str], list[str]]:
    """What differs from the training although `force` allows it, and what could not be compared."""
    width = about.get("in_dim")
    if width is not None and width != data.in_dim:
        raise DataError(
            f"{data.name}: {data.in_dim} features per instance, but the models were trained on {width}; were they "
            "made by another encoder?"
        )
    trained = about.get("provenance") or {}
    differ: list[str] = []
    unchecked: dict[str, list[str]] = {}  # why -> what
    for key in ("encoder", "magnification", "patch_size"):
        what, here, there = key.replace("_", " "), _values(found.get(key)), _values(trained.get(key))
        units = [sorted(_values(of.get("unit"))) for of in (found, trained)]
        if not here or not there:
            where = "anywhere" if not here and not there else "in training" if here else "in these data"
            unchecked.setdefault(f"not recorded {where}, not checked", []).append(what)
        elif key == "patch_size" and all(units) and not set(units[0]) & set(units[1]):
            why = f"in {some(units[0])} here, in {some(units[1])} in training, not checked"
            unchecked.setdefault(why, []).append(what)
        else:
            if not all(any(_same(value, other) for other in there) for value in here):
                unit = f" {units[0][0]}" if key == "patch_size" and len(units[0]) == 1 else ""
                values = [some([f"{v}{unit}" for v in side]) for side in (here, there)]
                line = f"{what} {values[0]} here, {values[1]} in training"
                known = all(_values(of.get("magnification")) for of in (found, trained))
                if key == "patch_size" and known and not any(d.startswith("magnification") for d in differ):
                    unchecked.setdefault("as with another scanner, since magnifications agree", []).append(line)
                else:
                    differ.append(line)
            if None in _list(found.get(key)) or None in _list(trained.get(key)):
                unchecked.setdefault("not recorded everywhere, only partly checked", []).append(what)
    notes = [f"{', '.join(what).capitalize()}: {why}." for why, what in unchecked.items()]
    if differ and not force:
        raise DataError(
            f"{data.name}: the features were made otherwise than those the models know: {'; '.join(differ)}. Make them "
            "again as in training; or, where the names differ and not the features (level-0 pixels of another scanner, "
            "say), give --force"
        )
    return [f"Forced although the features were made otherwise: {'; '.join(differ)}."] if differ else [], notes


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _values(value: Any) -> list[Any]:
    return [v for v in _list(value) if v is not None]


def _same(a: Any, b: Any) -> bool:
    # levels of a pyramid are rounded to whole pixels, so that sizes differ by a fraction of 1 %
    return a == b if isinstance(a, str) or isinstance(b, str) else math.isclose(a, b, rel_tol=0.01)


def _score(
    task: "Task", models: Sequence[Any], data: Any, index: int, device: str
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Calibrated probabilities (M, C) of one item, the mean of its instance scores, and its coordinates."""
    one = data.select([index]).portable(lambda bag: lambda: bag)  # read once, however many models there are
    scores = [task.score(model, one, device) for model in models]
    probabilities = np.concatenate(
        [
            calibrate(score.probabilities, model.metadata.get("temperature") or 1.0)
            for model, score in zip(models, scores, strict=True)
        ]
    )
    if not np.isfinite(probabilities).all():
        raise StudyError(f"{data.ids[index]}: NaN or infinity among its probabilities")
    kinds = scores[0].instance_scores
    mean = {kind: np.mean([score.instance_scores[kind][0] for score in scores], axis=0) for kind in kinds}
    return probabilities, mean, one.read(0).coords


def _table(
    data: Any, labels: np.ndarray, classes: list[str], of_members: np.ndarray, threshold: float | None
) -> "pd.DataFrame":
    import pandas as pd

    probabilities = of_members.mean(1)
    predicted = decide(probabilities, threshold)
    table = pd.DataFrame({"id": data.ids, "group": data.groups})
    if (labels >= 0).any():
        table["label"] = [classes[k] if k >= 0 else "" for k in labels]
    table["predicted"] = [classes[k] for k in predicted]
    table["threshold"] = np.nan if threshold is None else threshold
    for k, name in enumerate(classes):
        table[f"p({name})"] = probabilities[:, k]
    shown = np.ones_like(predicted) if len(classes) == 2 else predicted
    of_shown = np.take_along_axis(of_members, shown[:, None, None], axis=2)[:, :, 0]
    table["p_sd"] = of_shown.std(1, ddof=1) if of_shown.shape[1] > 1 else np.nan
    return table


def _disagreeing(table: "pd.DataFrame", of_members: np.ndarray, thresholds: Sequence[float | None]) -> list[str]:
    decisions = np.stack([decide(of_members[:, m], threshold) for m, threshold in enumerate(thresholds)])
    differ = (decisions != decisions[0]).any(0)
    return table[differ].sort_values("p_sd", ascending=False, kind="stable")["id"].tolist()


def _record(
    prediction: Prediction, models: Sequence[Any], data: Any, found: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """What was done and found, of JSON values only."""
    from classact.evidence.report import versions

    about = models[0].metadata
    kept = ("file", "fold", "threshold", "temperature")
    return {
        "writer": WRITER,
        "command": command,
        "task": about["task"],
        "method": prediction.method,
        "classes": prediction.classes,
        "threshold": prediction.threshold,
        "target_sensitivity": about.get("target_sensitivity"),
        "models": [{key: model.metadata.get(key) for key in kept} for model in models],
        "data": {
            "name": data.name,
            "items": len(data.ids),
            "groups": data.group_name,
            "n_groups": len(set(data.groups)),
        },
        "provenance": {
            "training": {"name": about.get("trained_on"), **(about.get("provenance") or {})},
            "data": dict(found),
        },
        "summary": prediction.lines(),
        "notes": prediction.notes,
        "metrics": json.loads(prediction.metrics.to_json(orient="records", double_precision=15)),
        "versions": versions(),
    }


def _figure_of(prediction: Prediction, labels: np.ndarray, probabilities: np.ndarray) -> "Figure":
    """Distribution of the probabilities and, with truth, ROC and reliability."""
    from sklearn.metrics import roc_curve

    from classact.evidence.figures import new_figure

    known = labels >= 0
    y, p, classes = labels[known], probabilities[known], prediction.classes
    complete = len(np.unique(y)) == len(classes)
    panels = 1 + int(known.any()) + int(complete)
    figure = new_figure(4.2 * panels, 3.6)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    two = len(classes) == 2
    shown = probabilities[:, 1] if two else probabilities.max(1)
    what = f"p({classes[1]})" if two else "probability of the predicted class"
    axes[0].hist(shown, bins=20, range=(0, 1), color="C0")
    if prediction.threshold is not None:
        axes[0].axvline(prediction.threshold, color="black", linestyle=":", label="frozen threshold")
        axes[0].legend(fontsize=8, frameon=False)
    axes[0].set(xlabel=what, ylabel=f"{prediction.unit}s", title="Distribution")
    if complete:
        for c in [1] if two else range(len(classes)):
            false, true, _ = roc_curve(y == c, p[:, c])
            axes[1].plot(false, true, drawstyle="steps-post", label=None if two else classes[c])
        axes[1].plot([0, 1], [0, 1], color="0.7", linestyle=":")
        if two:
            chosen = decide(p, prediction.threshold) == 1
            axes[1].plot(chosen[y == 0].mean(), chosen[y == 1].mean(), "o", color="black", label="frozen threshold")
        axes[1].legend(fontsize=8, frameon=False)
        axes[1].set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC")
    if known.any():
        probability, came_true = confidence(y, p)
        bins = bin_of(probability)
        of_bins = [bins == b for b in np.unique(bins)]
        axes[-1].plot([0, 1], [0, 1], color="0.7", linestyle=":")
        axes[-1].plot([probability[b].mean() for b in of_bins], [came_true[b].mean() for b in of_bins], "o-")
        axes[-1].set(
            xlabel=f"mean {what}", ylabel="share that came true", title="Reliability", xlim=(0, 1), ylim=(0, 1)
        )
    return figure


def _page(prediction: Prediction, record: Mapping[str, Any], labels: np.ndarray, probabilities: np.ndarray) -> str:
    """One self-contained page."""
    import base64

    from classact.evidence.figures import png
    from classact.evidence.report import STYLE, fact_rows

    escape = html.escape

    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    parts: list[str] = []
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if len(prediction.metrics):
        header = ("Metric", "Per", "External", "Internal estimate", "Drop (external - internal)")
        rows = [
            (
                _name(row["metric"]),
                str(row["level"]),
                _number(row["external"], (row["low"], row["high"])),
                _number(row["internal"]),
                _number(row["drop"], (row["drop_low"], row["drop_high"])),
            )
            for row in prediction.metrics.to_dict("records")
        ]
        parts.append(
            f"<h2>Against the truth</h2>{table(header, rows)}<p><small>In brackets 95 % intervals: by bootstrap over "
            "groups; that of the drop takes both estimates as normal and adds variances. The internal estimate is "
            "that of the cross-validation on the training data. Brier score and calibration error are better where "
            "smaller.</small></p>"
        )
    counts = prediction.table["predicted"].value_counts()
    rows = [(c, f"{counts.get(c, 0)}", f"{counts.get(c, 0) / len(labels):.0%}") for c in prediction.classes]
    parts.append(f"<h2>Decisions</h2>{table(('Class', f'{prediction.unit}s', 'Share'), rows)}")
    picture = base64.b64encode(png(_figure_of(prediction, labels, probabilities))).decode()
    parts.append(f'<p><img alt="probabilities" src="data:image/png;base64,{picture}"></p>')
    if prediction.members > 1:
        names = [f"p({c})" for c in prediction.classes]
        first = prediction.table.sort_values("p_sd", ascending=False, kind="stable").head(10)
        rows = [
            (str(row["id"]), str(row["predicted"]), *(f"{row[n]:.2f}" for n in names), f"{row['p_sd']:.2f}")
            for row in first.to_dict("records")
        ]
        header = (prediction.unit.capitalize(), "Predicted", *names, "Standard deviation")
        parts.append(
            f"<h2>Where the models differ most</h2><p>They decide differently on {len(prediction.disagreeing)} of "
            f"{len(labels)}.</p>{table(header, rows)}"
        )
    facts = {
        "Data": "{name}: {items} items, {n_groups} groups ({groups})".format(**record["data"]),
        "Models": ", ".join(Path(model["file"] or "given").name for model in record["models"]),
        **{
            f"Features of the {name}": ", ".join(f"{k} {v}" for k, v in of.items() if v is not None) or "not recorded"
            for name, of in record["provenance"].items()
        },
        "Versions": ", ".join(f"{k} {v}" for k, v in record["versions"].items()),
    }
    title = escape(f"{prediction.method} on {record['data']['name']}")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>
<div class="summary">{"".join(f"<p>{escape(line)}</p>" for line in prediction.lines())}</div>
{"".join(parts)}
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(record["command"])}</pre>
</body></html>
"""


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
