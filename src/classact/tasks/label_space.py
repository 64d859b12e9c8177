"""The task ``label-space``: predict labels between which there are distances, some of them never seen in training."""

import difflib
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classact.data.bag_files import DataError
from classact.data.labelled import load_labelled
from classact.discover.label_metrics import LabelMetric
from classact.discover.loki import NextClassSelector, fit_temperature, locus
from classact.evidence.executors import Job, run_jobs
from classact.evidence.label_report import LabelComparison, judge, write_label_report
from classact.evidence.store import Store, StudyError

GRADES = 20  # of the embedded data
HIDDEN_SHARE = 0.3
TEST, CALIBRATION = 0.3, 0.2  # of the items, and of the rest
LOCUS_LIMIT = 2000  # labels up to which it is said which of them can be reached
NEXT = 5

# ---------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Problem:
    """What a method predicts from.

    Attributes
    ----------
    metric : LabelMetric
        Of all labels.
    observed : list of str
        Classes of the fit, in the order of the columns of `probs`.
    probs : (n, K) array
        Probabilities of the items to predict.
    held_probs, held : (m, K) array, (m,) array
        Probabilities and classes of items of observed classes that were not in the fit.
    counts : (K,) array
        Items of each observed class in the fit.
    seed : int
        Of anything random.
    """

    metric: LabelMetric
    observed: list[str]
    probs: np.ndarray
    held_probs: np.ndarray
    held: np.ndarray
    counts: np.ndarray
    seed: int


def argmax(problem: Problem) -> np.ndarray:
    """The most probable of the observed classes."""
    return np.array(problem.observed)[problem.probs.argmax(1)]


def loki(problem: Problem) -> np.ndarray:
    """The Fréchet mean under the probabilities as they are."""
    return problem.metric.frechet_mean(problem.probs, problem.observed)


def loki_nll(problem: Problem) -> np.ndarray:
    """The same after the temperature that makes held-out items most likely."""
    return _tempered(problem, leave_out=False)


def loki_leave_class_out(problem: Problem) -> np.ndarray:
    """The same after the temperature that is best for held-out items whose class is taken out of the probabilities."""
    return _tempered(problem, leave_out=True)


def _tempered(problem: Problem, leave_out: bool) -> np.ndarray:
    def logs(probs: np.ndarray) -> np.ndarray:
        return np.log(np.clip(probs, 1e-12, None))

    def cost(probs: np.ndarray) -> np.ndarray:
        return problem.metric.squared(problem.metric.frechet_mean(probs, problem.observed), problem.held)

    if not len(problem.held):
        return loki(problem)
    position = {name: k for k, name in enumerate(problem.observed)}
    target = np.array([position[name] for name in problem.held])
    temperature = fit_temperature(logs(problem.held_probs), target, cost if leave_out else None)
    powers = logs(problem.probs) / temperature
    powers = np.exp(powers - powers.max(1, keepdims=True))
    return problem.metric.frechet_mean(powers / powers.sum(1, keepdims=True), problem.observed)


def scrambled(problem: Problem) -> np.ndarray:
    """The Fréchet mean in a metric whose labels are permuted: how much comes of hedging alone."""
    return problem.metric.scrambled(problem.seed).frechet_mean(problem.probs, problem.observed)


def center(problem: Problem) -> np.ndarray:
    """Always the Fréchet mean of the training items' classes: how much is had without any input."""
    frequencies = problem.counts / problem.counts.sum()
    return np.repeat(problem.metric.frechet_mean(frequencies[None], problem.observed), len(problem.probs))


METHODS: dict[str, Callable[[Problem], np.ndarray]] = {
    "argmax": argmax,
    "loki": loki,
    "loki-nll": loki_nll,
    "loki-leave-class-out": loki_leave_class_out,
    "scrambled": scrambled,
    "center": center,
}


def find_method(name: str) -> Callable[[Problem], np.ndarray]:
    """A method by name; a user's own is ``package.module:function``, called with a ``Problem``."""
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise StudyError(f"{name}: no such method{hint} There are {', '.join(METHODS)}, and package.module:function")
    found: Callable[[Problem], np.ndarray] = _imported(name)
    return found


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"{name}: {error}") from error


def make_classifier(name: str, seed: int) -> Any:
    """``logistic`` (standardised columns), ``forest``, or ``package.module:factory``, called with ``random_state``."""
    if name == "logistic":
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    if name == "forest":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(300, min_samples_leaf=2, random_state=seed)
    if ":" not in name:
        raise StudyError(f"classifier: expected logistic, forest or package.module:factory, got {name}")
    return _imported(name)(random_state=seed)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class LabelSpace:
    """Rows (n, D), the name (n,) of the label of each, and the metric."""

    name: str
    x: np.ndarray
    y: np.ndarray
    metric: LabelMetric


def load_label_space(
    source: str | Path = "diabetes", metric: str | Path | LabelMetric | None = None, label: str | None = None
) -> LabelSpace:
    """Read labelled rows and distances between labels.

    Parameters
    ----------
    source : str or path
        ``diabetes`` (part of scikit-learn; progression of the disease in 20 grades of equal frequency), or what
        [`load_labelled`][classact.data.labelled.load_labelled] reads; images are taken as rows of pixels.
    metric : str, path or LabelMetric, optional
        As for [`read_metric`][classact.tasks.label_space.read_metric]; by default labels that are numbers lie on a
        line.
    label : str, optional
        Column of a table that holds the labels.

    Raises
    ------
    DataError
        If something is missing or does not fit; the message names it.
    """
    if str(source) == "diabetes":
        from sklearn.datasets import load_diabetes

        x, progression = load_diabetes(return_X_y=True)
        edges = np.quantile(progression, np.linspace(0, 1, GRADES + 1)[1:-1])
        y = np.searchsorted(edges, progression).astype(str)
        name, classes = "diabetes", [str(grade) for grade in range(GRADES)]
    else:
        data = load_labelled(source, label)
        x, classes = data.x.reshape(len(data.y), -1).double().numpy(), list(data.classes)
        name, y = data.name, np.array(classes)[data.y.numpy()]
    found = metric if isinstance(metric, LabelMetric) else read_metric(metric, classes)
    known = set(found.labels.tolist())
    if missing := [one for one in classes if one not in known]:
        raise DataError(
            f"{metric}: no distances for the label{'s' if len(missing) > 1 else ''} {', '.join(missing[:5])} of {name}"
        )
    return LabelSpace(name, x, y, found)


def read_metric(source: str | Path | None, classes: Sequence[str]) -> LabelMetric:
    """Read distances between labels.

    Parameters
    ----------
    source : str or path, optional
        ``order`` or None: labels are numbers, and lie where they say. A CSV file with the columns ``child`` and
        ``parent`` (and ``length``), a tree, whose inner nodes are labels too; with ``source`` and ``target`` (and
        ``length``), a graph; or else a square table of distances, labels in its first row and column. A ``.npz`` file
        with ``labels`` and ``embeddings``, compared by the Euclidean distance.
    classes : sequence of str
        Labels of the data, for ``order``.
    """
    if source is None or str(source) == "order":
        try:
            places = [float(name) for name in classes]
        except ValueError:
            raise DataError(
                f"metric: labels such as {classes[0]} are not numbers on a line; give --metric a file: a CSV of a tree "
                "(child, parent), of a graph (source, target) or of a square table of distances, or an .npz of "
                "embeddings"
            ) from None
        order = np.argsort(places, kind="stable")
        return LabelMetric.from_path([classes[k] for k in order], [places[k] for k in order])
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file (--metric); or order, for labels that are numbers")
    try:
        return _of_arrays(path) if path.suffix == ".npz" else _of_table(path)
    except DataError:
        raise
    except Exception as error:  # pandas and NumPy raise many kinds; the metric's own say what is wrong  # noqa: BLE001
        raise DataError(f"{path}: {error}") from None


def _of_arrays(path: Path) -> LabelMetric:
    with np.load(path, allow_pickle=False) as content:
        if missing := {"labels", "embeddings"} - set(content.files):
            raise DataError(f"{path}: expected arrays labels and embeddings, there is no {', '.join(sorted(missing))}")
        return LabelMetric.from_embeddings(content["embeddings"], content["labels"].astype(str))


def _of_table(path: Path) -> LabelMetric:
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if {"child", "parent"} <= set(table.columns):
        parents = {child: parent or None for child, parent in zip(table["child"], table["parent"], strict=True)}
        if len(parents) < len(table):
            raise DataError(f"{path}: {len(table) - len(parents)} nodes have two parents; a graph has source, target")
        return LabelMetric.from_tree(parents, lengths=_lengths(table, "child"))
    if {"source", "target"} <= set(table.columns):
        edges = zip(table["source"], table["target"], strict=True)
        if "length" not in table.columns:
            return LabelMetric.from_graph(list(edges))
        return LabelMetric.from_graph([(*edge, float(one)) for edge, one in zip(edges, table["length"], strict=True)])
    names, rows = [str(name) for name in table.columns[1:]], table.iloc[:, 0].tolist()
    if set(names) != set(rows):
        raise DataError(
            f"{path}: expected columns child and parent, or source and target, or a square table of distances with the "
            f"same labels in its first row and column; found the columns {', '.join(map(str, table.columns[:5]))}"
        )
    square = table.set_index(table.columns[0]).astype(float)
    return LabelMetric.from_matrix(square.loc[names, names].to_numpy(), names)


def _lengths(table: Any, key: str) -> dict[str, float] | None:
    if "length" not in table.columns:
        return None
    return {node: float(one) for node, one in zip(table[key], table["length"], strict=True) if one}


# ------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class LabelStudy:
    """What every cell needs."""

    data: LabelSpace
    methods: tuple[str, ...]
    classifier: str
    hide: tuple[str, ...]
    hidden_share: float


def run_cell(study: LabelStudy, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Split, hide classes from the fit, fit one classifier, and predict with every method."""
    data, rng = study.data, np.random.default_rng(seed)
    present = np.unique(data.y)
    n_hidden = round(study.hidden_share * len(present))
    hidden = np.array(study.hide) if study.hide else rng.permutation(present)[:n_hidden]
    order = rng.permutation(len(data.y))
    test, rest = np.split(order, [round(TEST * len(order))])
    rest = rest[~np.isin(data.y[rest], hidden)]
    held, fit = np.split(rest, [round(CALIBRATION * len(rest))])
    model = make_classifier(study.classifier, seed).fit(data.x[fit], data.y[fit])
    observed = [str(name) for name in model.classes_]
    held = held[np.isin(data.y[held], observed)]
    counts = np.array([(data.y[fit] == name).sum() for name in observed])
    held_probs = model.predict_proba(data.x[held]) if len(held) else np.empty((0, len(observed)))
    problem = Problem(data.metric, observed, model.predict_proba(data.x[test]), held_probs, data.y[held], counts, seed)
    truth, of_hidden = data.y[test], ~np.isin(data.y[test], observed)
    values = {}
    for name in study.methods:
        start = time.perf_counter()
        found = np.asarray(find_method(name)(problem))
        seconds = time.perf_counter() - start
        squares, right = data.metric.squared(found, truth), found == truth
        values[name] = {
            "squared": float(squares.mean()),
            "squared_observed": _mean(squares[~of_hidden]),
            "squared_hidden": _mean(squares[of_hidden]),
            "distance": float(np.sqrt(squares).mean()),
            "accuracy": float(right.mean()),
            "hidden_accuracy": _mean(right[of_hidden]),
            "seconds": seconds,
        }
    return values, {}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def compare_label_space(
    data: str | Path | LabelSpace = "diabetes",
    methods: Sequence[str] | None = None,
    *,
    metric: str | Path | LabelMetric | None = None,
    label: str | None = None,
    hide: Sequence[str] = (),
    hidden_share: float = HIDDEN_SHARE,
    classifier: str = "logistic",
    reference: str = "argmax",
    seeds: int = 10,
    out: str | Path = "report",
    workers: int = 1,
    command: str = "",
    quiet: bool = False,
) -> LabelComparison:
    """Compare ways to predict labels from the probabilities of a classifier that has not seen all of them.

    Parameters
    ----------
    data, metric, label
        As for [`load_label_space`][classact.tasks.label_space.load_label_space].
    methods : sequence of str
        Names of the task, or ``package.module:function``, called with a ``Problem``; it returns names (n,).
    hide : sequence of str
        Classes that are kept from the fit; by default others are drawn for every seed.
    hidden_share : float
        Share of the classes that are drawn, from 0 to below 1.
    classifier : str
        ``logistic``, ``forest`` or ``package.module:factory``.
    reference : str
        Method that differences are taken to; it is always an arm.
    seeds : int
        Splits, classifiers, and draws of hidden classes.
    out, workers, command, quiet
        As in [`compare_discovery`][classact.tasks.discovery.compare_discovery].

    Raises
    ------
    StudyError, DataError
        If a name or the data do not fit.
    """
    space = data if isinstance(data, LabelSpace) else load_label_space(data, metric, label)
    names = tuple(dict.fromkeys([reference, *(methods or METHODS)]))
    for name in names:
        find_method(name)
    make_classifier(classifier, 0)
    present = np.unique(space.y).tolist()
    if unknown := [one for one in hide if one not in present]:
        raise StudyError(f"hide: no class {', '.join(unknown)}; there are {', '.join(present)}")
    if not 0 <= hidden_share < 1:
        raise StudyError(f"hidden_share: expected a number from 0 to below 1, got {hidden_share}")
    n_hidden = len(hide) if hide else round(hidden_share * len(present))
    if len(present) - n_hidden < 2:
        raise StudyError(
            f"{space.name}: {len(present)} classes, of which {n_hidden} are hidden; a classifier needs at least 2"
        )
    if seeds < 2:
        raise StudyError(f"seeds: expected at least 2, got {seeds}")
    study = LabelStudy(space, names, classifier, tuple(hide), hidden_share)
    definition = {
        "task": "label-space",
        "data": {"name": space.name, "items": len(space.y), "sum": float(space.x.sum()), "metric": repr(space.metric)},
        "methods": list(names),
        "classifier": classifier,
        "hidden": list(hide) or hidden_share,
    }
    jobs = {seed: Job(f"seed-{seed}", (seed,)) for seed in range(seeds)}
    with Store(Path(out) / "study", definition) as store:
        done = run_jobs(run_cell, study, list(jobs.values()), store, workers, "label-space", quiet)
        cells = {seed: done[job.key] for seed, job in jobs.items()}
    found = judge(space.name, names, reference, cells, TEST / (1 - TEST))
    found.facts = {
        "Data": f"{space.name}: {len(space.y):,} items of {len(present)} classes",
        "Distances": repr(space.metric),
        "Classifier": classifier,
        "Classes without a training item": ", ".join(hide)
        if hide
        else f"{n_hidden} of {len(present)}, drawn anew for each seed",
        "Items": f"{TEST:.0%} held out to be judged, {CALIBRATION:.0%} of the rest for the temperature",
        "Intervals": f"95 %, over {seeds} splits of the same items, corrected for that (Nadeau and Bengio)",
        **_reach(space.metric, [one for one in present if one not in hide], bool(hide)),
    }
    write_label_report(found, Path(out), command)
    return found


def _reach(metric: LabelMetric, observed: list[str], hidden: bool) -> dict[str, str]:
    """Which labels can be predicted at all, and which should be labelled next."""
    if len(metric) > LOCUS_LIMIT:
        return {}
    inside = locus(metric, observed)
    left = metric.labels[~inside].tolist()
    which = "all classes of the data but the hidden ones" if hidden else "all classes of the data"
    missing = f"; not {', '.join(map(str, left[:8]))}{' …' if len(left) > 8 else ''}" if left else ""
    facts = {
        "Labels that can be predicted": f"{int(inside.sum()):,} of {len(metric):,}, if {which} are observed{missing}"
    }
    chosen: list[str] = []
    selector = NextClassSelector(metric)
    while len(chosen) < NEXT and (name := selector.select([*observed, *chosen])) is not None:
        chosen.append(str(name))
    return facts | ({"Worth labelling next": ", ".join(chosen)} if chosen else {})
