"""Comparing methods by repeated, grouped, stratified cross-validation with an inner validation part.

The protocol, for every task that classifies items: what belongs to one group (a patient) never straddles training and
test; inside every training fold a validation part is cut off, grouped and stratified, and early stopping, choice of the
checkpoint and the decision threshold use nothing else; every method sees the same parts with the same seed.
"""

import hashlib
import importlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from classact.evidence.executors import Job, run_jobs, seconds_of
from classact.evidence.statistics import (
    Interval,
    bootstrap_groups,
    corrected_interval,
    detectable_effect,
    holm,
)
from classact.evidence.store import Store, StudyError, write_atomically

if TYPE_CHECKING:
    import pandas as pd

INNER_FOLDS = 5  # one fifth of the training groups is the validation part
METRICS = ("macro_f1", "balanced_accuracy", "accuracy")


class Score(NamedTuple):
    """What a fitted model says of n items: probabilities (n, C), and a score per instance where items have any."""

    probabilities: np.ndarray
    instance_scores: list[np.ndarray] | None = None
    score_kind: str = ""


@dataclass(frozen=True)
class Task:
    """What `compare` needs to know of a task.

    Attributes
    ----------
    name : str
        As on the command line.
    load : callable
        ``load(data, **options)`` returns a data set with ``ids``, ``labels``, ``classes``, ``groups``, ``group_name``,
        ``subset(indices)`` and ``scan()``.
    build : callable
        ``build(name, settings, options)`` returns ``fit(train, validation, *, seed, device) -> model``, or raises
        StudyError for a name or setting that does not fit the task.
    score : callable
        ``score(model, items, device)`` returns a `Score`.
    controls : tuple of str
        Methods that always run since they cost nothing; any method worth its name beats them.
    default_methods : tuple of str
        Compared where the user names none.
    unit : str
        What an item is called, such as ``bag``.
    remark : callable
        ``remark(method, data)`` says what a reader of the table must know of a method on these data; "" if nothing.
    """

    name: str
    load: Callable[..., Any]
    build: Callable[..., Callable[..., Any]]
    score: Callable[..., Score]
    controls: tuple[str, ...]
    default_methods: tuple[str, ...]
    unit: str = "item"
    remark: Callable[[str, Any], str] = lambda method, data: ""  # noqa: ARG005


class Split(NamedTuple):
    """Positions of the items of one fold."""

    repeat: int
    fold: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class _Shared:
    """What every cell of a comparison needs; sent once to each worker."""

    task: Task
    data: Any
    settings: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    device: str
    seed: int


def make_splits(
    labels: np.ndarray,
    groups: Sequence[str],
    folds: int,
    repeats: int,
    seed: int,
    predefined: Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> list[Split]:
    """Cut the items into training, validation and test parts.

    Parameters
    ----------
    labels, groups : (n,)
        Class and group of every item.
    folds, repeats : int
        Folds of each repeat; test parts of a repeat do not overlap.
    seed : int
        Of the shuffling.
    predefined : sequence, optional
        Splits given by the user, each a repeat of one fold; a missing validation part is cut from its training part.

    Raises
    ------
    StudyError
        If there are fewer groups than folds, or a group straddles parts of a given split.
    """
    group_of = np.asarray(groups)
    if predefined is not None:
        splits = []
        for number, part in enumerate(predefined):
            train, validation, test = (np.array(part[k], dtype=int) for k in ("train", "validation", "test"))
            if len(test) == 0 or len(train) == 0:
                raise StudyError(f"split {number}: expected training and test items, got {len(train)} and {len(test)}")
            both = set(group_of[test]) & set(group_of[np.concatenate([train, validation])])
            if both:
                raise StudyError(
                    f"split {number}: groups in the test part and in another: {', '.join(sorted(both)[:5])}"
                )
            if len(validation) == 0:
                train, validation = inner_split(labels, group_of, train, seed + number)
            splits.append(Split(number, 0, train, validation, test))
        return splits
    n_groups = len(set(groups))
    if n_groups < folds:
        raise StudyError(f"{n_groups} groups cannot be cut into {folds} folds; use --folds {max(2, n_groups)} or fewer")
    splits = []
    for repeat in range(repeats):
        for fold, (outer, test) in enumerate(_cut(labels, group_of, folds, seed * 1000 + repeat)):
            train, validation = inner_split(labels, group_of, outer, seed * 1000 + repeat)
            splits.append(Split(repeat, fold, train, validation, test))
    return splits


def inner_split(labels: np.ndarray, groups: np.ndarray, items: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a validation part of about one fifth off `items`, by groups and stratified.

    Of the five candidates the first in which both parts hold every class is taken, if there is one.
    """
    n_groups = len(set(groups[items]))
    if n_groups < 2:
        raise StudyError("a training part needs at least 2 groups, so that one can be its validation part")
    cuts = _cut(labels[items], groups[items], min(INNER_FOLDS, n_groups), seed)
    candidates = [(items[a], items[b]) for a, b in cuts]
    classes = set(labels[items])
    complete = [c for c in candidates if set(labels[c[0]]) == classes == set(labels[c[1]])]
    return (complete or candidates)[0]


def _cut(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions of the outer and the held-out part of every fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # folds that lack a class are counted and reported by the comparison itself
        warnings.filterwarnings("ignore", message="The least populated class")
        return list(cutter.split(labels, labels, groups))


def fit_threshold(labels: np.ndarray, probability: np.ndarray) -> float:
    """Threshold on the positive class's probability with the best balanced accuracy; of equals, nearest to 0.5."""
    values = np.unique(probability)
    candidates = np.concatenate([[0.5], (values[1:] + values[:-1]) / 2])
    positive = labels == 1
    if positive.all() or not positive.any():
        return 0.5
    predicted = probability[None] >= candidates[:, None]
    balanced = (predicted[:, positive].mean(1) + (~predicted[:, ~positive]).mean(1)) / 2
    best = candidates[balanced >= balanced.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest for more than two; NaN where a class is absent."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < probabilities.shape[1]:
        return float("nan")
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(roc_auc_score(labels, probabilities, multi_class="ovr"))


def decide(probabilities: np.ndarray, threshold: float | np.ndarray | None) -> np.ndarray:
    """Predicted classes; of two classes, the second where its probability reaches the threshold."""
    if probabilities.shape[1] == 2 and threshold is not None:
        return (probabilities[:, 1] >= threshold).astype(int)
    return probabilities.argmax(1)


def run_cell(shared: _Shared, method: str, split: Split) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit one method on one fold and predict its test part. Labels of the test part enter only the returned AUCs."""
    model, threshold, arrays, values = _fit(shared, method, split)
    test = shared.data.subset(split.test)
    score = shared.task.score(model, test, shared.device)
    labels = np.asarray(shared.data.labels)[split.test]
    if not np.isfinite(score.probabilities).all():
        raise StudyError(f"{method}: NaN or infinity among its predictions in repeat {split.repeat}, fold {split.fold}")
    arrays |= {"test": split.test, "probabilities": score.probabilities}
    values |= {"auc": _json(auc(labels, score.probabilities)), "threshold": threshold}
    if score.instance_scores is not None and split.repeat == 0:
        arrays["instance_scores"] = np.concatenate(score.instance_scores).astype(np.float32)
        arrays["instance_counts"] = np.array([len(s) for s in score.instance_scores])
        values["score_kind"] = score.score_kind
        values["instance_auc"] = _json(_instance_auc(test, score.instance_scores))
    return values, arrays


def refit_cell(shared: _Shared, method: str, split: Split) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit one method on all items by the same rule, and return its weights as the bytes of a safetensors file."""
    from torch import nn

    from classact.saving import save

    model, threshold, arrays, values = _fit(shared, method, split)
    if not isinstance(model, nn.Module):
        return values, arrays
    with tempfile.TemporaryDirectory() as folder:
        metadata = {
            "task": shared.task.name,
            "method": method,
            "classes": list(shared.data.classes),
            "threshold": threshold,
            "trained_on": shared.data.name,
        }
        file = save(model, Path(folder) / "model", metadata)
        arrays["safetensors"] = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        values["description"] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return values, arrays


def _fit(shared: _Shared, method: str, split: Split) -> tuple[Any, float | None, dict[str, np.ndarray], dict[str, Any]]:
    fit = shared.task.build(method, shared.settings, shared.options)
    train, validation = shared.data.subset(split.train), shared.data.subset(split.validation)
    seed = shared.seed * 100_000 + split.repeat * 100 + split.fold
    model = fit(train, validation, seed=seed, device=shared.device)
    seen = shared.task.score(model, validation, shared.device).probabilities
    threshold = None
    if seen.shape[1] == 2:
        threshold = fit_threshold(np.asarray(shared.data.labels)[split.validation], seen[:, 1])
    arrays: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {"n_train": len(split.train), "n_validation": len(split.validation)}
    if hasattr(model, "parameters"):
        values["parameters"] = sum(p.numel() for p in model.parameters())
    history = getattr(model, "history", None)
    if history is not None:
        arrays |= {f"curve_{name}": np.array(curve) for name, curve in history.curves.items()}
        values |= {"best_epoch": history.best_epoch, "epochs": history.epochs}
    return model, threshold, arrays, values


def _instance_auc(items: Any, scores: list[np.ndarray]) -> float:
    """Mean, over items whose instances have both labels, of the AUC of the instance scores; NaN if there are none."""
    from sklearn.metrics import roc_auc_score

    found = [
        roc_auc_score(item.instance_labels > 0, score)
        for item, score in zip(items, scores, strict=True)
        if getattr(item, "instance_labels", None) is not None and 0 < (item.instance_labels > 0).sum() < len(score)
    ]
    return float(np.mean(found)) if found else float("nan")


def _json(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def compare_methods(
    task: Task,
    data: Any,
    methods: Sequence[str],
    *,
    out: str | Path,
    folds: int = 5,
    repeats: int = 1,
    reference: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    workers: int = 1,
    splits: Sequence[Mapping[str, Sequence[int]]] | None = None,
    overwrite: bool = False,
    command: str = "",
    quiet: bool = False,
) -> "Comparison":
    """Compare methods on one data set; see `classact.compare` for the arguments.

    Raises
    ------
    StudyError
        If a method is unknown, there are too few groups, `out` holds another study, or a cell fails.
    """
    from classact.catalogue.codehash import code_hash
    from classact.evidence.report import write_report

    settings, options = dict(settings or {}), dict(options or {})
    chosen = list(dict.fromkeys([*methods, *task.controls]))
    if folds < 2 or repeats < 1:
        raise StudyError(f"expected at least 2 folds and 1 repeat, got {folds} and {repeats}")
    for name in chosen:
        task.build(name, settings, options)  # raises early for unknown names and settings
    if reference is not None and reference not in chosen:
        raise StudyError(f"--reference {reference}: not among the methods {', '.join(chosen)}")
    reference = reference or ("abmil" if "abmil" in chosen else chosen[0])
    labels = np.asarray(data.labels)
    cuts = make_splits(labels, data.groups, folds, repeats, seed, splits)
    sizes, fingerprint = data.scan()
    definition = {
        "task": task.name,
        "data": {"name": data.name, "items": len(data.ids), "fingerprint": fingerprint, "groups": data.group_name},
        "methods": chosen,
        "settings": settings,
        "options": options,
        "folds": folds if splits is None else "given",
        "repeats": len(cuts) if splits is not None else repeats,
        "splits": _fingerprint(cuts),
        "seed": seed,
        "device": device,
        "own code": _own_code(chosen),
        "code": code_hash(f"classact.tasks.{task.name.replace('-', '_')}")
        if task.build.__module__.startswith("classact.")
        else "",
    }
    shared = _Shared(task, data, settings, options, device, seed)
    everything = np.arange(len(labels))
    whole = Split(0, 99, *inner_split(labels, np.asarray(data.groups), everything, seed), np.array([], dtype=int))
    # cheap methods first, fold by fold, so that the time left is known early
    jobs = {m: [Job(f"{m}.r{s.repeat}.f{s.fold}", (m, s)) for s in cuts] for m in chosen}
    refits = [Job(f"{m}.refit", (m, whole)) for m in chosen]
    with Store(out, definition, overwrite) as store:
        ordered = [jobs[m][i] for i in range(len(cuts)) for m in chosen]
        title = f"{task.name} on {data.name}"
        cells = run_jobs(run_cell, shared, ordered, store, workers, title, quiet)
        models = run_jobs(refit_cell, shared, refits, store, workers, f"{title}, refit on everything", quiet)
        comparison = Comparison(
            task=task,
            definition=definition,
            methods=chosen,
            reference=reference,
            cuts=cuts,
            labels=labels,
            groups=list(data.groups),
            ids=list(data.ids),
            classes=list(data.classes),
            sizes=sizes,
            cells={m: [cells[job.key] for job in jobs[m]] for m in chosen},
            arrays={m: [store.arrays(job.key) for job in jobs[m]] for m in chosen},
            seconds={m: seconds_of(store, jobs[m]) / len(cuts) for m in chosen},
            remarks={m: task.remark(m, data) for m in chosen},
            command=command,
            folder=Path(out),
        )
        write_report(comparison, data)
        for job in refits:
            if "description" in models[job.key]:
                folder = Path(out) / "models"
                folder.mkdir(exist_ok=True)
                file = folder / f"{job.arguments[0].replace(':', '_').replace('/', '_')}.safetensors"
                write_atomically(file, store.arrays(job.key)["safetensors"].tobytes())
                text = json.dumps(models[job.key]["description"], indent=1) + "\n"
                write_atomically(file.with_suffix(".json"), text.encode())
    return comparison


def _own_code(methods: Sequence[str]) -> dict[str, str]:
    """Hash of the file behind every method of the user's: cells of an edited method are not used again."""
    found = {}
    for name in methods:
        for module in (part.partition(":")[0] for part in re.split(r"[+()]", name) if ":" in part):
            file = getattr(importlib.import_module(module), "__file__", None)
            found[module] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
    return found


def _fingerprint(cuts: list[Split]) -> str:
    import zlib

    return f"{zlib.crc32(repr([tuple(np.asarray(p).tolist() for p in cut) for cut in cuts]).encode()):08x}"


@dataclass(frozen=True)
class Row:
    """One method in the table."""

    method: str
    remark: str
    control: bool
    auc: Interval
    missing: int
    difference: Interval | None
    p: float
    p_adjusted: float
    metrics: dict[str, Interval]
    metric_differences: dict[str, Interval]
    group_auc: Interval | None
    group_metrics: dict[str, Interval]
    instance_auc: float | None
    parameters: int | None


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison: `.table`, `.summary`, and the report in `.folder`."""

    task: Task
    definition: dict[str, Any]
    methods: list[str]
    reference: str
    cuts: list[Split]
    labels: np.ndarray
    groups: list[str]
    ids: list[str]
    classes: list[str]
    sizes: np.ndarray
    cells: dict[str, list[dict[str, Any]]]
    arrays: dict[str, list[dict[str, np.ndarray]]]
    seconds: dict[str, float]
    remarks: dict[str, str]
    command: str
    folder: Path

    @property
    def ratio(self) -> float:
        """Mean size of a test part divided by that of what was trained on, validation part included."""
        return float(np.mean([len(c.test) / (len(c.train) + len(c.validation)) for c in self.cuts]))

    @property
    def by_group(self) -> bool:
        """Whether a group holds more than one item."""
        return len(set(self.groups)) < len(self.ids)

    def aucs(self, method: str) -> np.ndarray:
        """AUC of every fold; NaN where its test part lacks a class."""
        return np.array([np.nan if c["auc"] is None else c["auc"] for c in self.cells[method]])

    def predictions(self, method: str) -> "pd.DataFrame":
        """Out-of-fold predictions, one row per item and repeat."""
        import pandas as pd

        parts = []
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            p = arrays["probabilities"]
            part = pd.DataFrame({"id": [self.ids[i] for i in cut.test], "group": [self.groups[i] for i in cut.test]})
            part["repeat"], part["fold"] = cut.repeat, cut.fold
            part["label"] = [self.classes[k] for k in self.labels[cut.test]]
            part["predicted"] = [self.classes[k] for k in decide(p, cell["threshold"])]
            part["threshold"] = cell["threshold"]
            for k, name in enumerate(self.classes):
                part[f"p({name})"] = p[:, k]
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def _group_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(dict.fromkeys(self.groups))}

    def _item_counts(self, method: str) -> np.ndarray:
        """Confusion matrices (groups, repeats, C, C) of the pooled predictions, by group and repeat."""
        size = len(self.classes)
        counts = np.zeros((len(self._group_index), 1 + max(c.repeat for c in self.cuts), size, size))
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            predicted = decide(arrays["probabilities"], cell["threshold"])
            members = [self._group_index[self.groups[i]] for i in cut.test]
            np.add.at(counts[:, cut.repeat], (np.array(members), self.labels[cut.test], predicted), 1)
        return counts

    def _group_scores(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """AUC per fold, and confusion matrices, where each group is one item with its mean probability.

        Groups whose items have different classes are left out.
        """
        size = len(self.classes)
        counts = np.zeros((len(self._group_index), 1 + max(c.repeat for c in self.cuts), size, size))
        aucs = []
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            member = np.array([self._group_index[self.groups[i]] for i in cut.test])
            label = self.labels[cut.test]
            groups = [g for g in np.unique(member) if len(set(label[member == g])) == 1]
            if not groups:
                aucs.append(np.nan)
                continue
            p = np.stack([arrays["probabilities"][member == g].mean(0) for g in groups])
            y = np.array([label[member == g][0] for g in groups])
            aucs.append(auc(y, p))
            np.add.at(counts[:, cut.repeat], (groups, y, decide(p, cell["threshold"])), 1)
        return np.array(aucs), counts

    @cached_property
    def rows(self) -> list[Row]:
        """One row per method, as in the table."""
        reference_aucs = self.aucs(self.reference)
        reference_counts = self._item_counts(self.reference)
        differences = {
            m: None if m == self.reference else corrected_interval(self.aucs(m) - reference_aucs, self.ratio)
            for m in self.methods
        }
        p = [d.p_value() if d is not None else float("nan") for d in differences.values()]
        rows = []
        for m, raw, adjusted in zip(self.methods, p, holm(p), strict=True):
            aucs, counts = self.aucs(m), self._item_counts(m)
            paired = np.stack([counts, reference_counts], axis=1)
            group_auc, group_metrics = None, {}
            if self.by_group:
                by_group, group_counts = self._group_scores(m)
                group_auc = _within_unit(corrected_interval(by_group, self.ratio))
                group_metrics = {k: bootstrap_groups(group_counts, _metric(k)) for k in METRICS}
            instance = [c["instance_auc"] for c in self.cells[m] if c.get("instance_auc") is not None]
            rows.append(
                Row(
                    method=m,
                    remark=self.remarks[m],
                    control=m in self.task.controls,
                    auc=_within_unit(corrected_interval(aucs, self.ratio)),
                    missing=int(np.isnan(aucs).sum()),
                    difference=differences[m],
                    p=raw,
                    p_adjusted=adjusted,
                    metrics={k: bootstrap_groups(counts, _metric(k)) for k in METRICS},
                    metric_differences={} if m == self.reference else {
                        k: bootstrap_groups(paired, _metric_difference(k)) for k in METRICS
                    },
                    group_auc=group_auc,
                    group_metrics=group_metrics,
                    instance_auc=float(np.mean(instance)) if instance else None,
                    parameters=self.cells[m][0].get("parameters"),
                )
            )  # fmt: skip
        return rows

    @property
    def candidates(self) -> list[str]:
        """The methods that are not controls; the controls where nothing else was compared."""
        return [m for m in self.methods if m not in self.task.controls] or self.methods

    @cached_property
    def versus_best(self) -> tuple[str, dict[str, tuple[Interval, float]]]:
        """The method with the highest mean AUC, and every other's difference to it with its Holm-adjusted p."""
        best = max(self.candidates, key=lambda m: np.nanmean(self.aucs(m)))
        gaps = {m: corrected_interval(self.aucs(m) - self.aucs(best), self.ratio) for m in self.candidates if m != best}
        adjusted = holm([gap.p_value() for gap in gaps.values()])
        return best, {m: (gap, p) for (m, gap), p in zip(gaps.items(), adjusted, strict=True)}

    @cached_property
    def versus_controls(self) -> dict[str, float]:
        """For every method, the p value of "it beats every control": the largest of all, Holm-adjusted over methods."""
        largest = []
        for m in self.candidates:
            gaps = [corrected_interval(self.aucs(m) - self.aucs(c), self.ratio) for c in self.task.controls]
            largest.append(max((gap.p_value() if gap.effect > 0 else 1.0 for gap in gaps), default=float("nan")))
        return dict(zip(self.candidates, holm(largest), strict=True))

    @cached_property
    def summary(self) -> list[str]:
        """What the study says, in sentences; the most important first."""
        best, gaps = self.versus_best
        effect = {row.method: row.auc.effect for row in self.rows}
        lines = []
        if best not in self.task.controls and self.task.controls:
            winners = [m for m, p in self.versus_controls.items() if p < 0.05]
            if winners:
                lines.append(f"Better than every control: {', '.join(sorted(winners, key=lambda m: -effect[m]))}.")
            else:
                strongest = max(self.task.controls, key=lambda m: effect[m])
                gap = corrected_interval(self.aucs(best) - self.aucs(strongest), self.ratio)
                lines.append(
                    f"No method beats the controls beyond doubt: {strongest} reaches AUC {effect[strongest]:.3f}, "
                    f"{best} {effect[best]:.3f} (difference {gap.effect:+.3f}, 95 % interval {gap.low:+.3f} to "
                    f"{gap.high:+.3f}, before the adjustment for several methods)."
                )
        same = [m for m, (_, p) in gaps.items() if not p < 0.05]
        if same:
            lines.append(
                f"Not distinguishable from the best ({best}, AUC {effect[best]:.3f}): "
                f"{', '.join(f'{m} ({effect[m]:.3f})' for m in sorted(same, key=lambda m: -effect[m]))}."
            )
        elif gaps:
            lines.append(f"{best} (AUC {effect[best]:.3f}) differs from every other method.")
        smallest = [detectable_effect(gap) for gap, _ in gaps.values()]
        smallest = [value for value in smallest if np.isfinite(value)]
        if smallest:
            lines.append(
                f"Differences in AUC below about {np.median(smallest):.3f} would most likely have been missed "
                "(80 % power, before the adjustment for several comparisons)."
            )
        if missing := max(row.missing for row in self.rows):
            lines.append(f"{missing} of {len(self.cuts)} test parts lack a class and give no AUC.")
        if self.by_group:
            label_sets: dict[str, set[int]] = {}
            for group, label in zip(self.groups, self.labels, strict=True):
                label_sets.setdefault(group, set()).add(int(label))
            mixed = sum(len(labels) > 1 for labels in label_sets.values())
            if mixed:
                lines.append(
                    f"{mixed} groups hold {self.task.unit}s of different classes; group figures leave them out."
                )
        changed = [f"{m}.{k} = {v}" for m, own in self.definition["settings"].items() for k, v in own.items()]
        changed += [f"{k} = {v} for all" for k, v in self.definition["options"].items()]
        lines.append(f"Untuned: paper defaults{', but ' + ', '.join(changed) if changed else ''}.")
        return lines

    @property
    def table(self) -> "pd.DataFrame":
        """One row per method: AUC, difference to the reference, pooled metrics, each with its 95 % interval."""
        import pandas as pd

        records = []
        for row in self.rows:
            record: dict[str, Any] = {"method": row.method, "control": row.control}
            pairs: list[tuple[str, Interval | None]] = [("auc", row.auc), ("auc_difference", row.difference)]
            pairs += list(row.metrics.items())
            pairs += [(f"{k}_difference", row.metric_differences.get(k)) for k in METRICS]
            if self.by_group:
                pairs += [("group_auc", row.group_auc), *((f"group_{k}", v) for k, v in row.group_metrics.items())]
            for name, interval in pairs:
                record[name] = interval.effect if interval else np.nan
                record[f"{name}_low"] = interval.low if interval else np.nan
                record[f"{name}_high"] = interval.high if interval else np.nan
            record |= {"p": row.p, "p_holm": row.p_adjusted, "folds_without_auc": row.missing}
            if row.instance_auc is not None:
                record["instance_auc"] = row.instance_auc
            record |= {"parameters": row.parameters, "remark": row.remark}
            records.append(record)
        return pd.DataFrame(records).set_index("method")

    def save(self, path: str | Path) -> None:
        """Write the table as .csv, .tex or .html, by suffix."""
        path = Path(path)
        writers = {".csv": self.table.to_csv, ".tex": self.table.to_latex, ".html": self.table.to_html}
        if path.suffix not in writers:
            raise ValueError(f"{path}: expected one of {', '.join(writers)}")
        writers[path.suffix](path)


def _within_unit(interval: Interval) -> Interval:
    """Cut the ends of an interval of a share to [0, 1]."""
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _metric(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Metric of confusion matrices (B, repeats, C, C), averaged over the repeats."""

    def of(counts: np.ndarray) -> np.ndarray:
        right = np.diagonal(counts, axis1=-2, axis2=-1)
        actual, predicted = counts.sum(-1), counts.sum(-2)
        with np.errstate(invalid="ignore", divide="ignore"):
            if name == "accuracy":
                per_repeat = right.sum(-1) / actual.sum(-1)
            elif name == "balanced_accuracy":
                per_repeat = np.nanmean(np.where(actual > 0, right / actual, np.nan), axis=-1)
            else:
                per_repeat = np.nanmean(
                    np.where(actual + predicted > 0, 2 * right / (actual + predicted), np.nan), axis=-1
                )
        return per_repeat.mean(-1)

    return of


def _metric_difference(name: str) -> Callable[[np.ndarray], np.ndarray]:
    metric = _metric(name)
    return lambda counts: metric(counts[:, 0]) - metric(counts[:, 1])
