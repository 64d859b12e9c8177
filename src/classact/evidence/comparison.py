"""Comparing methods by repeated, grouped, stratified cross-validation with an inner validation part.

The protocol, for every task that classifies items: what belongs to one group (a patient) never straddles training and
test; inside every training fold a validation part is cut off, grouped and stratified, and early stopping, choice of the
checkpoint and of the configuration, temperature and decision threshold use nothing else; every method sees the same
parts with the same seed.
"""

import hashlib
import importlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classact.data.bags import Problem
from classact.evidence.executors import Job, duration, gpus_for, run_jobs, seconds_of
from classact.evidence.metrics import calibrate, fit_temperature, fit_threshold, ranking_metrics
from classact.evidence.outcome import Comparison
from classact.evidence.splits import Split, fingerprint, inner_split, make_splits, take_fraction
from classact.evidence.store import Store, StudyError, write_atomically
from classact.evidence.tuning import criterion, describe, draw_configurations, merged, searched

SCORED_REPEATS = 2  # instance scores are kept of so many repeats: one to look at, the next to see whether it agrees


class Score(NamedTuple):
    """What a fitted model says of n items.

    Attributes
    ----------
    probabilities : (n, C)
        Of the classes.
    instance_scores : dict
        Scores of the instances of every item, by what they are: ``{"attention": [(K_i,), ...]}``, or (K_i, C) where the
        method has them for every class. The first kind is the one that is tested as evidence.
    """

    probabilities: np.ndarray
    instance_scores: Mapping[str, list[np.ndarray]] = {}


@dataclass(frozen=True)
class Task:
    """What `compare` needs to know of a task.

    Attributes
    ----------
    name : str
        As on the command line.
    load : callable
        ``load(data, **options)`` returns a data set with ``ids``, ``labels``, ``classes``, ``groups``, ``group_name``,
        ``name``, ``layout``, ``in_dim``, ``subset(indices)`` and ``select(indices)``.
    check : callable
        ``check(data, workers=...)`` reads every item once and returns ``problems``, ``warnings``, ``lines()``,
        ``clean()`` (the data set without the bad items), ``sizes`` and ``fingerprint``.
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
    space : callable
        ``space(method)`` is the method's search space; see `classact.evidence.tuning.draw_configurations`.
    budget : callable
        ``budget(options, n_train)`` returns options that give every configuration of every method as many steps.
    cost : callable, optional
        ``cost(method, settings, options, data, sizes)`` measures seconds per fit and megabytes per model.
    explain : callable, optional
        ``explain(model, items, score, seed, device)`` tests whether the instance scores are evidence; returns values
        and arrays.
    provenance : callable
        ``provenance(data)`` says how the items were made, for `predict` to compare.
    """

    name: str
    load: Callable[..., Any]
    check: Callable[..., Any]
    build: Callable[..., Callable[..., Any]]
    score: Callable[..., Score]
    controls: tuple[str, ...]
    default_methods: tuple[str, ...]
    unit: str = "item"
    remark: Callable[[str, Any], str] = lambda method, data: ""  # noqa: ARG005
    space: Callable[[str], Mapping[str, Any]] = lambda method: {}  # noqa: ARG005
    budget: Callable[[Mapping[str, Any], int], Mapping[str, Any]] = lambda options, n_train: {}  # noqa: ARG005
    cost: Callable[..., tuple[float, float]] | None = None
    explain: Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]] | None = None
    provenance: Callable[[Any], dict[str, Any]] = lambda data: {}  # noqa: ARG005


@dataclass(frozen=True)
class _Shared:
    """What every cell of a comparison needs; sent once to each worker."""

    task: Task
    data: Mapping[str, Any]  # by encoder; "" where there is one
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0
    target_sensitivity: float | None = None
    configurations: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    given: bool = False  # splits of the user's
    provenance: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, arm: str) -> tuple[str, Any]:
        """Method and data set of an arm: ``abmil``, or ``abmil@encoder``."""
        method, _, encoder = arm.rpartition("@") if "" not in self.data else (arm, "", "")
        return method, self.data[encoder]

    def portable(self, put: Callable[[Any], Callable[[], Any]]) -> "_Shared":
        """Return the same without need of files on this machine, for workers on others."""
        return replace(self, data={name: data.portable(put) for name, data in self.data.items()})


class _Fitted(NamedTuple):
    model: Any
    temperature: float
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


def run_cell(
    shared: _Shared, arm: str, split: Split, fraction: float = 1.0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit one method on one fold and predict its test part. Labels of the test part enter only the returned metrics."""
    data = shared.of(arm)[1]
    if fraction < 1:
        split = _smaller(data, split, fraction, shared.seed)
    model, temperature, values, arrays = _fit(shared, arm, split)
    test = data.subset(split.test)
    score = shared.task.score(model, test, shared.device)
    if not np.isfinite(score.probabilities).all():
        raise StudyError(f"{arm}: NaN or infinity among its predictions in repeat {split.repeat}, fold {split.fold}")
    p = calibrate(score.probabilities, temperature)
    values |= {k: _json(v) for k, v in ranking_metrics(np.asarray(data.labels)[split.test], p).items()}
    arrays |= {"test": split.test, "probabilities": p}
    first = split.repeat == 0 or shared.given
    if fraction == 1 and score.instance_scores and (first or split.repeat < SCORED_REPEATS):
        kept = score.instance_scores if first else dict([next(iter(score.instance_scores.items()))])
        values["score_kinds"] = list(kept)
        arrays |= {f"score:{kind}": np.concatenate(of).astype(np.float32) for kind, of in kept.items()}
        arrays["instance_counts"] = np.array([len(s) for s in next(iter(kept.values()))])
        if first:
            values["instance_auc"] = _json(_instance_auc(test, next(iter(kept.values()))))
            if shared.task.explain is not None:
                found, curves = shared.task.explain(model, test, score, _seed(shared, split), shared.device)
                values |= found
                arrays |= curves
    if fraction == 1 and first:
        described, weights = _weights(shared, arm, split.fold if not shared.given else split.repeat, model, values)
        values |= described
        arrays |= weights
    return values, arrays


def refit_cell(shared: _Shared, arm: str, split: Split) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit one method on all items by the same rule, and return its weights as the bytes of a safetensors file."""
    fitted = _fit(shared, arm, split)
    described, weights = _weights(shared, arm, None, fitted.model, fitted.values)
    return fitted.values | described, {k: v for k, v in fitted.arrays.items() if k.startswith("curve_")} | weights


def run_job(shared: _Shared, kind: str, *arguments: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run a cell or a refit, so that one pool of workers serves both."""
    return {"cell": run_cell, "refit": refit_cell}[kind](shared, *arguments)


def _weights(
    shared: _Shared, arm: str, fold: int | None, model: Any, values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from torch import nn

    from classact.saving import save

    if not isinstance(model, nn.Module):
        return {}, {}
    data = shared.of(arm)[1]
    metadata = {
        "task": shared.task.name,
        "method": arm,
        "classes": list(data.classes),
        "threshold": values["threshold"],
        "temperature": values["temperature"],
        "target_sensitivity": shared.target_sensitivity,
        "in_dim": data.in_dim,
        "provenance": shared.provenance.get(arm.rpartition("@")[2] if "" not in shared.data else "", {}),
        "trained_on": data.name,
        "fold": fold,
        "configuration": values.get("configuration", {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = save(model, Path(folder) / "model", metadata)
        weights = {"safetensors": np.frombuffer(file.read_bytes(), dtype=np.uint8)}
        return {"description": json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))}, weights


def _seed(shared: _Shared, split: Split) -> int:
    return shared.seed * 100_000 + split.repeat * 100 + split.fold


def _smaller(data: Any, split: Split, fraction: float, seed: int) -> Split:
    labels, groups = np.asarray(data.labels), np.asarray(data.groups)
    train, validation = (
        take_fraction(labels, groups, part, fraction, seed + split.repeat) for part in (split.train, split.validation)
    )
    return split._replace(train=train, validation=validation)


def _fit(shared: _Shared, arm: str, split: Split) -> _Fitted:
    """Fit every configuration of a method, keep the one that is best on the validation part, and calibrate it there."""
    method, data = shared.of(arm)
    train, validation = data.subset(split.train), data.subset(split.validation)
    labels, seed = np.asarray(data.labels)[split.validation], _seed(shared, split)
    configurations = shared.configurations.get(method, [])
    options = {**shared.options, **(shared.task.budget(shared.options, len(train)) if configurations else {})}
    best, steps, tried = None, 0, []
    for configuration in configurations or [{}]:
        fit = shared.task.build(method, merged(shared.settings, configuration), options)
        model = fit(train, validation, seed=seed, device=shared.device)
        seen = shared.task.score(model, validation, shared.device)
        steps += getattr(getattr(model, "history", None), "steps", 0)
        tried.append(criterion(labels, seen.probabilities))
        if best is None or tried[-1] > best[0]:
            best = tried[-1], model, seen, configuration
    assert best is not None
    _, model, seen, configuration = best
    finite = np.isfinite(seen.probabilities).all()
    temperature = fit_temperature(labels, seen.probabilities) if finite else 1.0
    threshold = None
    if seen.probabilities.shape[1] == 2:
        p = calibrate(seen.probabilities, temperature)[:, 1]
        threshold = fit_threshold(labels, p, shared.target_sensitivity) if finite else 0.5
    values: dict[str, Any] = {
        "n_train": len(split.train),
        "n_validation": len(split.validation),
        "temperature": temperature,
        "threshold": threshold,
        "steps": steps,
    }
    arrays: dict[str, np.ndarray] = {}
    if configurations:
        values |= {
            "configuration": configuration,
            "chosen": configurations.index(configuration),
            "validation_auc": [_json(area) for area, _ in tried],
        }
    if hasattr(model, "parameters"):
        values["parameters"] = sum(p.numel() for p in model.parameters())
    history = getattr(model, "history", None)
    if history is not None:
        arrays |= {f"curve_{name}": np.array(curve) for name, curve in history.curves.items()}
        values |= {"best_epoch": history.best_epoch, "epochs": history.epochs}
    if seen.instance_scores and split.repeat == 0 and not shared.given:
        scores = next(iter(seen.instance_scores.values()))
        arrays["validation"] = split.validation
        arrays["validation_scores"] = np.concatenate(scores).astype(np.float32)
        arrays["validation_counts"] = np.array([len(s) for s in scores])
    return _Fitted(model, temperature, values, arrays)


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
    tune: int | None = None,
    fractions: Sequence[float] | None = None,
    target_sensitivity: float | None = None,
    exclude_bad: bool = False,
    device: str = "cpu",
    workers: int = 1,
    share_gpu: bool = False,
    ray: str | None = None,
    splits: Callable[[list[str]], Sequence[Mapping[str, Sequence[int]]]] | None = None,
    overwrite: bool = False,
    command: str = "",
    quiet: bool = False,
) -> Comparison:
    """Compare methods on one data set, or on one for each encoder; see `classact.compare` for the arguments.

    Parameters
    ----------
    data : data set or mapping
        ``{"uni": data set, "conch": data set}`` crosses encoders with methods, on the items that all of them have.
    splits : callable, optional
        Given the names of the items, returns the splits to use.

    Raises
    ------
    StudyError
        If a method is unknown, there are too few groups, `out` holds another study, or a cell fails.
    DataError
        If items cannot be used and `exclude_bad` is not set.
    """
    from classact.catalogue.codehash import code_hash
    from classact.evidence.report import write_report

    settings, options = dict(settings or {}), dict(options or {})
    chosen = list(dict.fromkeys([*methods, *task.controls]))
    _check_arguments(folds, repeats, tune, fractions, target_sensitivity)
    for name in chosen:
        task.build(name, settings, options)  # raises early for unknown names and settings
    gpus: list[str] | None = [] if device == "cuda" and not share_gpu else None  # a cluster hands them out itself
    if ray is None:
        gpus = gpus_for(device, workers, share_gpu)
    data, excluded, sizes, fingerprints = _usable(task, data, workers, exclude_bad, quiet)
    one = next(iter(data.values()))
    if target_sensitivity is not None and len(one.classes) != 2:
        raise StudyError(f"--target-sensitivity: expected two classes, there are {', '.join(one.classes)}")
    arms = chosen if "" in data else [f"{name}@{encoder}" for encoder in data for name in chosen]
    if reference is not None and reference not in (*arms, *chosen):
        raise StudyError(f"--reference {reference}: not among the methods {', '.join(arms)}")
    reference = reference or ("abmil" if "abmil" in chosen else chosen[0])
    reference = reference if reference in arms else f"{reference}@{next(iter(data))}"
    labels = np.asarray(one.labels)
    given = None
    if splits is not None:  # they may name items that were left out
        named = splits([*one.ids, *dict.fromkeys(e.item for e in excluded if e.item not in set(one.ids))])
        given = [{part: [i for i in of if i < len(one.ids)] for part, of in split.items()} for split in named]
    cuts = make_splits(labels, one.groups, folds, repeats, seed, given)
    configurations = {}
    if tune is not None:
        configurations = {m: draw_configurations(task.space(m), tune, seed, settings, options) for m in chosen}
    definition: dict[str, Any] = {
        "task": task.name,
        "data": {"name": one.name, "items": len(one.ids), "fingerprint": fingerprints, "groups": one.group_name},
        "methods": arms,
        "settings": settings,
        "options": options,
        "folds": folds if splits is None else "given",
        "repeats": len(cuts) if splits is not None else repeats,
        "splits": fingerprint(cuts),
        "seed": seed,
        "device": device,
        "tune": configurations,
        "spaces": {m: describe(searched(task.space(m), settings, options)) for m in configurations},
        "fractions": sorted(set(fractions or [1.0])),
        "target_sensitivity": target_sensitivity,
        "own code": _own_code(chosen),
        "code": code_hash(f"classact.tasks.{task.name.replace('-', '_')}")
        if task.build.__module__.startswith("classact.")
        else "",
    }
    shared = _Shared(
        task,
        data,
        settings,
        options,
        device,
        seed,
        target_sensitivity,
        configurations,
        splits is not None,
        {name: task.provenance(of) for name, of in data.items()},
    )
    whole = Split(0, 99, *inner_split(labels, np.asarray(one.groups), np.arange(len(labels)), seed), np.array([], int))
    # cheap methods first, fold by fold, so that the time left is known early
    jobs = {m: [Job(f"{m}.r{s.repeat}.f{s.fold}", ("cell", m, s)) for s in cuts] for m in arms}
    parts = [f for f in definition["fractions"] if f < 1]
    smaller = {
        (m, f): [Job(f"{m}.r{s.repeat}.f{s.fold}.q{f:g}", ("cell", m, s, f)) for s in cuts] for m in arms for f in parts
    }
    refits = [Job(f"{m}.refit", ("refit", m, whole)) for m in arms]
    if not quiet and not (Path(out) / "study.json").exists():
        plan = {"folds": folds, "repeats": repeats, "tune": tune or 1}
        _say(predicted_costs(task, one, sizes, chosen, settings, options, **plan))
    run: dict[str, Any] = {"workers": workers, "quiet": quiet, "gpus": gpus, "ray": ray}
    with Store(out, definition, overwrite) as store:
        title = f"{task.name} on {one.name}"
        ordered = [of[i] for i in range(len(cuts)) for of in (*jobs.values(), *smaller.values())]
        cells = run_jobs(run_job, shared, [*ordered, *refits], store, title=title, **run)
        comparison = Comparison(
            task=task,
            definition=definition,
            methods=arms,
            encoders=[name for name in data if name],
            reference=reference,
            cuts=cuts,
            labels=labels,
            groups=list(one.groups),
            ids=list(one.ids),
            classes=list(one.classes),
            sizes=sizes,
            excluded=excluded,
            cells={m: [cells[job.key] for job in jobs[m]] for m in arms},
            arrays={m: [store.arrays(job.key, skip=("safetensors",)) for job in jobs[m]] for m in arms},
            parts={key: [cells[job.key] for job in of] for key, of in smaller.items()},
            seconds={m: seconds_of(store, jobs[m]) / len(cuts) for m in arms},
            remarks={m: task.remark(*shared.of(m)) for m in arms},
            command=command,
            folder=Path(out),
        )
        write_report(comparison, data)
        internal = {row.method: row.estimates() for row in comparison.rows}
        written = {}
        for arm, job in zip(arms, refits, strict=True):
            if "description" in cells[job.key]:
                name = written[arm] = arm.replace(":", "_").replace("/", "_")
                _write_model(Path(out) / "models" / name, store, job.key, cells[job.key], internal[arm])
                kept = [(job, cell) for job in jobs[arm] if "description" in (cell := cells[job.key])]
                for number, (job, cell) in enumerate(kept):
                    _write_model(
                        Path(out) / "models" / f"{name}.folds" / f"{number}", store, job.key, cell, internal[arm]
                    )
        if written:
            best = comparison.versus_best[0]
            index = {"best": best if best in written else next(iter(written)), "methods": written}
            write_atomically(Path(out) / "models" / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    return comparison


def _check_arguments(
    folds: int, repeats: int, tune: int | None, fractions: Sequence[float] | None, target_sensitivity: float | None
) -> None:
    if folds < 2 or repeats < 1:
        raise StudyError(f"expected at least 2 folds and 1 repeat, got {folds} and {repeats}")
    if tune is not None and tune < 1:
        raise StudyError(f"--tune: expected at least 1 configuration, got {tune}")
    if fractions is not None and (not fractions or not all(0 < f <= 1 for f in fractions) or 1 not in fractions):
        raise StudyError(f"--fractions: expected parts in (0, 1], 1 among them, got {', '.join(map(str, fractions))}")
    if target_sensitivity is not None and not 0 < target_sensitivity <= 1:
        raise StudyError(f"--target-sensitivity: expected a number in (0, 1], got {target_sensitivity}")


def _usable(
    task: Task, data: Any, workers: int, exclude_bad: bool, quiet: bool
) -> tuple[dict[str, Any], list[Problem], np.ndarray, Any]:
    """Check every item of every encoder, and keep the items that all encoders have."""
    from classact.data.check import raise_problems

    several = isinstance(data, Mapping)
    found = data if several else {"": data}
    checks = {}
    for name, of in found.items():
        checks[name] = check = task.check(of, workers=workers)
        if not quiet:
            _say([f"{name}:" if name else "", *check.lines()])
        if check.problems and not exclude_bad:
            raise_problems(check.problems, task.unit)
    excluded = [
        Problem(p.item, f"{name}: {p.reason}" if name else p.reason, p.label)
        for name, check in checks.items()
        for p in check.problems
    ]
    clean = {name: check.clean() if check.problems else found[name] for name, check in checks.items()}
    if not several:
        return clean, excluded, checks[""].sizes, checks[""].fingerprint
    ids = [name for name in next(iter(clean.values())).ids if all(name in of.ids for of in clean.values())]
    known = {e.item for e in excluded}
    for of in clean.values():
        for item, label in zip(of.ids, of.labels, strict=True):
            if item not in ids and item not in known:
                known.add(item)
                excluded.append(Problem(item, "not there for every encoder", of.classes[label]))
    if not ids:
        raise StudyError(f"the encoders {', '.join(clean)} have no {task.unit} in common")
    kept = {name: of.select([of.ids.index(item) for item in ids]) for name, of in clean.items()}
    first = next(iter(kept))
    for name, of in kept.items():
        if list(of.labels) != list(kept[first].labels) or list(of.groups) != list(kept[first].groups):
            raise StudyError(f"labels or groups of encoder {name} differ from those of {first}")
    check = checks[first]
    at = dict(zip(clean[first].ids, check.sizes, strict=True))
    return kept, excluded, np.array([at[item] for item in ids]), {n: c.fingerprint for n, c in checks.items()}


def predicted_costs(
    task: Task,
    data: Any,
    sizes: np.ndarray,
    methods: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    folds: int,
    repeats: int,
    tune: int = 1,
) -> list[str]:
    """Say how long every method will take with one worker, and how much disk space; measured, not looked up."""
    if task.cost is None:
        return []
    lines = ["", "predicted, with one worker and no early stopping:"]
    for method in methods:
        seconds, megabytes = task.cost(method, settings, options, data, sizes)
        # every fold trains on its outer part less the validation part; the last fit is that on everything
        total = seconds * 0.8 * tune * ((1 - 1 / folds) * folds * repeats + 1)
        lines.append(f"  {method}: {duration(total)}, {megabytes * (2 * folds + 2):,.0f} MB on disk")
    return lines


def _say(lines: Sequence[str]) -> None:
    import sys

    print("\n".join(line for line in lines if line), file=sys.stderr, flush=True)


def _write_model(path: Path, store: Store, key: str, cell: Mapping[str, Any], internal: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_name(path.name + ".safetensors"), store.arrays(key)["safetensors"].tobytes())
    description = {**cell["description"], "metadata": {**cell["description"]["metadata"], "internal": internal}}
    write_atomically(path.with_name(path.name + ".json"), (json.dumps(description, indent=1) + "\n").encode())


def _own_code(methods: Sequence[str]) -> dict[str, str]:
    """Hash of the file behind every method of the user's: cells of an edited method are not used again."""
    found = {}
    for name in methods:
        for module in (part.partition(":")[0] for part in re.split(r"[+()]", name) if ":" in part):
            file = getattr(importlib.import_module(module), "__file__", None)
            found[module] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
    return found
