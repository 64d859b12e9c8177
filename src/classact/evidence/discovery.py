"""Comparing methods of novel class discovery, with the true classes or, as in practice, without them.

Seeds are paired: each draws the rows to fit and a quarter that is held out, the same for every method. What was seen
without a label in `fit` is scored as *transductive*, held-out rows, which only `predict` sees, as *inductive*. A method
is also scored on known classes whose labels were taken away from it, which needs no truth at all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from classact.evidence.statistics import Interval, holm, t_interval
from classact.evidence.store import StudyError

HELD_OUT = 0.25
SHOWN = 2000  # rows in a figure


@dataclass(frozen=True)
class DiscoveryStudy:
    """What every cell of a comparison needs.

    Attributes
    ----------
    x : (n, ...) array
        Items.
    y : (n,) array
        Known classes from 0, -1 where there is none.
    build : callable
        ``build(method, n_clusters, seed)`` makes an estimator with ``fit(x, y)``, ``labels_`` (n,) with clusters from 0
        for unlabelled items, ``n_clusters_``, ``predict(x)``, and perhaps ``predict_known(x)`` and ``transform(x)``.
    score : callable
        ``score(true, clusters)`` gives accuracy, NMI and ARI.
    n_novel : int, optional
        Number of novel classes, if it is known.
    n_hidden : int
        Number of known classes to hide for the score that needs no truth; 0 leaves it out.
    rows : (n, d) array, optional
        Items as they are shown, and as the silhouette is taken; by default `x`.
    """

    x: np.ndarray
    y: np.ndarray
    build: Callable[[str, int | None, int], Any]
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    n_novel: int | None = None
    n_hidden: int = 0
    rows: np.ndarray | None = None


def draw(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the items to fit and of those held out, in every class and among the unlabelled alike."""
    rng = np.random.default_rng(seed)
    held = []
    for value in np.unique(y):
        of_class = rng.permutation(np.flatnonzero(y == value))
        held.append(of_class[: round(HELD_OUT * len(of_class))])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), held_out), held_out


def run_cell(study: DiscoveryStudy, method: str, seed: int, hide: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit one method; find the novel classes, or known ones that were hidden."""
    x, y, truth, n_clusters = study.x, study.y, None, study.n_novel
    if hide:
        known = np.flatnonzero(y >= 0)
        hidden = np.random.default_rng([seed, 1]).permutation(np.unique(y[known]))[: study.n_hidden]
        x, truth = x[known], y[known]
        y = np.where(np.isin(truth, hidden), -1, truth)
        n_clusters = None if n_clusters is None else study.n_hidden
    fit, held_out = draw(y, seed)
    start = time.perf_counter()
    model = study.build(method, n_clusters, seed).fit(x[fit], y[fit])
    seconds = time.perf_counter() - start
    labels = np.full(len(y), -1)
    labels[fit] = np.where(y[fit] < 0, model.labels_, -1)
    open_rows = held_out[y[held_out] < 0]
    if len(open_rows):
        labels[open_rows] = model.predict(x[open_rows])
    values: dict[str, Any] = {"seconds": seconds, "n_found": int(model.n_clusters_)}
    seen, unseen = (rows[y[rows] < 0] for rows in (fit, held_out))
    if truth is not None:
        values |= {f"transductive_{name}": v for name, v in study.score(truth[seen], labels[seen]).items()}
        values |= {f"inductive_{name}": v for name, v in study.score(truth[unseen], labels[unseen]).items()}
        return values, {}
    known_rows = held_out[y[held_out] >= 0]
    values["known_accuracy"] = None
    if hasattr(model, "predict_known") and len(known_rows):
        values["known_accuracy"] = float(np.mean(model.predict_known(x[known_rows]) == y[known_rows]))
    rows = np.flatnonzero(y < 0)
    shown = np.random.default_rng(0).permutation(rows)[:SHOWN]
    flat = _flat((x if study.rows is None else study.rows)[shown])
    values["silhouette"] = _silhouette(flat, labels[shown])
    arrays = {"labels": labels.astype(np.int32)}
    if seed == 0:
        arrays |= {"shown": shown, "before": _plane(flat)}
        if hasattr(model, "transform"):
            arrays["after"] = _plane(np.asarray(model.transform(x[shown])))
    return values, arrays


def _flat(x: np.ndarray) -> np.ndarray:
    """Items as rows of standardised numbers."""
    rows = x.reshape(len(x), -1).astype(float)
    std = rows.std(0)
    return (rows - rows.mean(0)) / np.where(std > 0, std, 1)


def _silhouette(x: np.ndarray, labels: np.ndarray) -> float | None:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(x, labels)) if 2 <= len(np.unique(labels)) < len(x) else None


def _plane(x: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA

    two = PCA(min(2, *x.shape), random_state=0).fit_transform(x)
    return np.pad(two, ((0, 0), (0, 2 - two.shape[1]))).astype(np.float32)


class DiscoveryRow(NamedTuple):
    """One method.

    Attributes
    ----------
    method : str
        Its name.
    transductive, inductive : dict of Interval
        Accuracy, NMI and ARI of unlabelled items seen in ``fit``, and of held-out ones; empty without truth.
    difference : Interval, optional
        Transductive accuracy, or without truth the accuracy on hidden classes, minus that of the reference, paired.
    p : float
        Of no difference, adjusted by Holm.
    known : Interval
        Accuracy on held-out items of known classes; NaN for methods that do not classify.
    hidden, hidden_inductive : Interval
        Accuracy on known classes that were hidden.
    agreement : float
        Mean adjusted Rand index between the labels of two seeds, over all unlabelled items.
    silhouette : Interval
        Of the labels in the space of the standardised items.
    n_found : tuple of int
        Number of classes found, by seed.
    seconds : float
        Mean of one fit.
    """

    method: str
    transductive: dict[str, Interval]
    inductive: dict[str, Interval]
    difference: Interval | None
    p: float
    known: Interval
    hidden: Interval
    hidden_inductive: Interval
    agreement: float
    silhouette: Interval
    n_found: tuple[int, ...]
    seconds: float


@dataclass
class DiscoveryComparison:
    """The outcome of a comparison of novel class discovery.

    Attributes
    ----------
    task, data, reference : str
        What was compared, on what, and the method that differences are taken to.
    rows : list of DiscoveryRow
        Best first: by transductive accuracy, or without truth by the accuracy on hidden classes, then by agreement.
    truth : bool
        Whether the true classes were given.
    pictures : dict
        ``method -> {"before", "after": (m, 2), "labels": (m,)}`` of the first seed.
    labels : dict
        ``method -> [(n,), ...]``, clusters of all items by seed, -1 for labelled ones.
    true_names : (m,) array, optional
        Classes of the items in the pictures.
    cells : list of dict
        Every figure of every method and seed.
    facts : dict
        How it was done, in words.
    """

    task: str
    data: str
    reference: str
    rows: list[DiscoveryRow]
    truth: bool
    pictures: dict[str, dict[str, np.ndarray]]
    labels: dict[str, list[np.ndarray]]
    true_names: np.ndarray | None
    cells: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Any:
        """One line per method (DataFrame)."""
        import pandas as pd

        lines = []
        for row in self.rows:
            found: dict[str, Interval | None] = {
                "difference": row.difference,
                "known_accuracy": row.known,
                "hidden_accuracy": row.hidden,
                "hidden_inductive_accuracy": row.hidden_inductive,
                "silhouette": row.silhouette,
            }
            for kind in ("transductive", "inductive"):
                found |= {f"{kind}_{name}": of for name, of in getattr(row, kind).items()}
            line: dict[str, Any] = {"method": row.method}
            for name, of in found.items():
                if of is not None:
                    line |= {name: of.effect, f"{name}_low": of.low, f"{name}_high": of.high}
            line |= {"p": row.p, "agreement": row.agreement, "seconds": row.seconds}
            lines.append(line | {"classes_found": " ".join(map(str, row.n_found))})
        return pd.DataFrame(lines)

    @property
    def summary(self) -> list[str]:
        """What was found, in words."""
        best = self.rows[0]
        if not self.truth:
            lines = ["The accuracy on the novel classes is unknown, since no true classes were given."]
            if np.isfinite(best.hidden.effect):
                lines.append(
                    f"{best.method} finds hidden known classes best ({best.hidden.effect:.3f}); a high score on them "
                    "is no promise for classes of another kind."
                )
            if np.isfinite(best.agreement):
                lines.append(
                    f"The labels of two of its seeds agree with an adjusted Rand index of {best.agreement:.2f}."
                )
            return lines
        better = [r.method for r in self.rows if r.difference is not None and r.difference.low > 0 and r.p < 0.05]
        worse = [r.method for r in self.rows if r.difference is not None and r.difference.high < 0 and r.p < 0.05]
        lines = [
            f"Better than {self.reference} beyond doubt: {', '.join(better)}."
            if better
            else f"No method is better than {self.reference} beyond doubt."
        ]
        if worse:
            lines.append(f"Worse: {', '.join(worse)}.")
        return lines


def judge(
    study: DiscoveryStudy,
    task: str,
    data: str,
    methods: Sequence[str],
    reference: str,
    cells: Mapping[tuple[str, int, bool], Mapping[str, Any]],
    arrays: Mapping[tuple[str, int], Mapping[str, np.ndarray]],
    truth: np.ndarray | None,
) -> DiscoveryComparison:
    """Score every method over all seeds; `truth` holds the names of the classes, None where one is not known."""
    from sklearn.metrics import adjusted_rand_score

    seeds = sorted({seed for _, seed, _ in cells})
    novel = np.flatnonzero(study.y < 0)
    scored = novel if truth is None else novel[[one is not None for one in truth[novel]]]
    if truth is not None and not len(scored):
        raise StudyError("truth: no unlabelled item has a true class")
    kinds: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for method in methods:
        kinds[method] = {"transductive": {}, "inductive": {}}
        if truth is not None:
            for kind, part in (("transductive", 0), ("inductive", 1)):
                scores: list[dict[str, float]] = []
                for seed in seeds:
                    items = np.intersect1d(draw(study.y, seed)[part], scored)
                    scores.append(study.score(truth[items].astype(str), arrays[method, seed]["labels"][items]))
                kinds[method][kind] = {name: np.array([one[name] for one in scores]) for name in scores[0]}

    def values(method: str, name: str, hide: bool = False) -> np.ndarray:
        of_seeds = [cells[method, seed, hide].get(name) for seed in seeds] if (method, seeds[0], hide) in cells else []
        return np.array([np.nan if v is None else v for v in of_seeds] or [np.nan], float)

    def main(method: str) -> np.ndarray:
        if truth is not None:
            return kinds[method]["transductive"]["accuracy"]
        return values(method, "transductive_accuracy", hide=True)

    differences = {m: t_interval(main(m) - main(reference)) for m in methods if m != reference}
    adjusted = dict(zip(differences, holm([d.p_value() for d in differences.values()]), strict=True))
    rows = []
    for method in methods:
        labels = [arrays[method, seed]["labels"][novel] for seed in seeds]
        pairs = [adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]
        intervals = {kind: {n: t_interval(v) for n, v in of.items()} for kind, of in kinds[method].items()}
        rows.append(
            DiscoveryRow(
                method,
                intervals["transductive"],
                intervals["inductive"],
                differences.get(method),
                adjusted.get(method, float("nan")),
                t_interval(values(method, "known_accuracy")),
                t_interval(values(method, "transductive_accuracy", hide=True)),
                t_interval(values(method, "inductive_accuracy", hide=True)),
                float(np.mean(pairs)) if pairs else float("nan"),
                t_interval(values(method, "silhouette")),
                tuple(int(v) for v in values(method, "n_found")),
                float(values(method, "seconds").mean()),
            )
        )

    def rank(row: DiscoveryRow) -> tuple[float, float]:
        first = row.transductive["accuracy"].effect if row.transductive else row.hidden.effect
        return -np.nan_to_num(first, nan=-1.0), -np.nan_to_num(row.agreement, nan=-1.0)

    pictures = {
        method: {k: v for k, v in arrays[method, 0].items() if k in ("before", "after")}
        | {"labels": arrays[method, 0]["labels"][arrays[method, 0]["shown"]]}
        for method in methods
    }
    shown = arrays[methods[0], 0]["shown"]
    names = None if truth is None else np.array([str(one) for one in truth[shown]])
    of_seeds = {method: [arrays[method, seed]["labels"] for seed in seeds] for method in methods}
    lines = [
        {"method": method, "seed": seed, **cells[method, seed, False]}
        | {f"{kind}_{name}": float(v[place]) for kind, of in kinds[method].items() for name, v in of.items()}
        | {f"hidden_{name}": value for name, value in cells.get((method, seed, True), {}).items()}
        for method in methods
        for place, seed in enumerate(seeds)
    ]
    return DiscoveryComparison(
        task, data, reference, sorted(rows, key=rank), truth is not None, pictures, of_seeds, names, lines
    )
