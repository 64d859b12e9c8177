"""What frozen predictions are worth on data with labels that no model was trained on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from classact.evidence.metrics import (
    BINS,
    auc,
    auprc,
    bin_of,
    calibration_error,
    confidence,
    confusion_metric,
    decide,
    ratio,
    squared_error,
)
from classact.evidence.statistics import Interval, bootstrap_groups, centred, group_draws

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("metric", "level", "external", "low", "high", "internal", "drop", "drop_low", "drop_high")
CHUNK_BYTES = 2**25  # of the weights of one part of the draws


def validate(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    threshold: float | None,
    internal: Mapping[str, Sequence[float | None] | None] | None = None,
    unit: str = "item",
    group_name: str = "group",
) -> tuple["pd.DataFrame", list[str]]:
    """Metrics of predictions on data that no model was trained on, and how far they fall below the internal estimates.

    Parameters
    ----------
    labels : (n,) int
        Positions in `classes`.
    probabilities : (n, C)
        Calibrated, from models that have seen none of the items.
    groups : (n,)
        What belongs together, such as a patient; whole groups are drawn in the bootstrap.
    classes : sequence of str
        Of two, the second is the positive one.
    threshold : float or None
        On the positive class's probability, frozen before; None for more than two classes.
    internal : mapping, optional
        Metric to ``[effect, low, high]``: the estimate of the training's cross-validation with its 95 % interval. For
        groups the name is preceded by ``group_``.
    unit, group_name : str
        The names of the levels.

    Returns
    -------
    metrics : DataFrame
        ``metric, level, external, low, high, internal, drop, drop_low, drop_high``. The levels are the items and, where
        groups hold several, the groups, each with the mean probability of its items; groups of mixed labels are left
        out. Intervals are 95 %, percentiles of 2,000 bootstrap draws of groups; that of the calibration error, which
        every draw inflates, is the estimate plus and minus 1.96 standard errors of the draws.

        The drop is external minus internal, also where larger is worse (Brier score, calibration error). As the data
        are different ones, the two errors are independent and their variances add. The interval of the drop takes both
        as normal, with the standard error of the internal estimate from the longer side of its interval, which is
        cautious where that is a t-interval over few folds.

        What is not defined is NaN: where a class is absent, AUC, AUPRC, balanced accuracy, macro F1 and the recall of
        that class.
    notes : list of str
        What was left out.
    """
    import pandas as pd

    internal, notes = internal or {}, []
    absent = [name for k, name in enumerate(classes) if not (labels == k).any()]
    if absent:
        notes.append(f"The truth holds no {', '.join(absent)}: AUC and what else needs every class is not defined.")
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    levels = [(unit, "", labels, probabilities, member)]
    if len(names) < len(labels):
        one = [labels[member == g] for g in range(len(names))]
        pure = np.array([g for g, of in enumerate(one) if len(set(of.tolist())) == 1], dtype=int)
        if len(pure) < len(names):
            notes.append(
                f"{len(names) - len(pure)} of {len(names)} groups ({group_name}) hold {unit}s of different classes; "
                f"figures per {group_name} leave them out."
            )
        if len(pure):
            p = np.stack([probabilities[member == g].mean(0) for g in pure])
            levels.append((group_name, "group_", np.array([one[g][0] for g in pure]), p, np.arange(len(pure))))
    rows = []
    for level, prefix, y, p, members in levels:
        for metric, found in _intervals(y, p, members, threshold, classes).items():
            estimate = [np.nan if v is None else float(v) for v in internal.get(prefix + metric) or [None] * 3]
            sure = np.isfinite([found.low, found.high]).all() and len(np.unique(members)) > 1
            drop = found.effect - estimate[0]
            error = max(estimate[0] - estimate[1], estimate[2] - estimate[0]) / 1.96
            half = 1.96 * float(np.hypot(found.se, error)) if sure and np.isfinite(error) else np.nan
            ends = (found.low, found.high) if sure else (np.nan, np.nan)
            rows.append((metric, level, found.effect, *ends, estimate[0], drop, drop - half, drop + half))
    return pd.DataFrame(rows, columns=list(COLUMNS)), notes


def _intervals(
    labels: np.ndarray, p: np.ndarray, member: np.ndarray, threshold: float | None, classes: Sequence[str]
) -> dict[str, Interval]:
    """Every metric with its interval; `member` (n,) is the number of each item's group."""
    size, groups = len(classes), int(member.max()) + 1
    confusion = np.zeros((groups, 1, size, size))
    np.add.at(confusion[:, 0], (member, labels, decide(p, threshold)), 1)
    complete = len(np.unique(labels)) == size
    undefined = Interval(np.nan, -np.inf, np.inf, np.nan, groups - 1, groups)
    return {
        **bootstrap_ranking(labels, p, member),
        **bootstrap_pooled(confusion, labels, p, member, np.zeros_like(member), classes),
        **{
            name: bootstrap_groups(confusion, confusion_metric(name)) if complete or name == "accuracy" else undefined
            for name in ("balanced_accuracy", "macro_f1", "accuracy")
        },
    }


def bootstrap_pooled(
    confusion: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    member: np.ndarray,
    repeat: np.ndarray,
    classes: Sequence[str],
) -> dict[str, Interval]:
    """Brier score, calibration error and the recall of every class, with intervals when whole groups are drawn.

    Parameters
    ----------
    confusion : (G, R, C, C)
        Confusion matrices of G groups and R repeats.
    labels, probabilities : (n,), (n, C)
        Pooled predictions of all repeats.
    member, repeat : (n,) int
        Number of each prediction's group and repeat.
    classes : sequence of str
        Names; with two, recalls are called sensitivity and specificity.
    """
    error = np.zeros((*confusion.shape[:2], 2))
    bins = np.zeros((*confusion.shape[:2], BINS, 2))
    one = np.ones(len(labels))
    np.add.at(error, (member, repeat), np.stack([squared_error(labels, probabilities), one], 1))
    stated, came_true = confidence(labels, probabilities)
    np.add.at(bins, (member, repeat, bin_of(stated)), np.stack([stated - came_true, one], 1))
    recalls = {f"recall({name})": k for k, name in enumerate(classes)}
    if len(classes) == 2:
        recalls = {"sensitivity": 1, "specificity": 0}
    return {
        "brier": bootstrap_groups(error, ratio),
        "calibration_error": centred(bootstrap_groups(bins, calibration_error)),
        **{name: bootstrap_groups(confusion, confusion_metric("recall", k)) for name, k in recalls.items()},
    }


def bootstrap_ranking(
    labels: np.ndarray, probabilities: np.ndarray, member: np.ndarray, n_boot: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """AUC and AUPRC with 95 % percentile intervals when whole groups are drawn with replacement.

    Parameters
    ----------
    labels, probabilities : (n,), (n, C)
        Classes and their probabilities; of more than two, each is ranked against the rest and the mean is taken.
    member : (n,) int
        Number of each item's group, from 0.
    n_boot, seed : int
        Number of draws, and seed of the drawing.
    """
    size, groups = probabilities.shape[1], int(member.max()) + 1
    effects = {"auc": auc(labels, probabilities), "auprc": auprc(labels, probabilities)}
    if np.isnan(effects["auc"]):
        return {name: Interval(np.nan, -np.inf, np.inf, np.nan, groups - 1, groups) for name in effects}
    weights = group_draws(groups, n_boot, seed)
    wanted = [1] if size == 2 else range(size)
    parts = []
    step = max(1, CHUNK_BYTES // (8 * len(labels)))
    for start in range(0, n_boot, step):
        drawn = weights[start : start + step, member]
        parts.append(np.mean([weighted_ranking(labels == c, probabilities[:, c], drawn) for c in wanted], axis=0))
    found = {}
    for (name, effect), values in zip(effects.items(), np.concatenate(parts, axis=1), strict=True):
        finite = values[np.isfinite(values)]
        low, high, se = -np.inf, np.inf, np.nan
        if len(finite) >= n_boot / 2:
            (low, high), se = np.quantile(finite, [0.025, 0.975]), finite.std(ddof=1)
        found[name] = Interval(effect, float(low), float(high), float(se), groups - 1, groups)
    return found


def weighted_ranking(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and average precision for many weightings of the same items at once, each (B,).

    Parameters
    ----------
    positive : (n,) bool
        Which items are positive.
    score : (n,)
        Larger for items more likely positive; ties count half in the AUC, and are one step of the average precision.
    weights : (B, n)
        At least 0; where a weighting leaves no positive or no negative item the results are NaN.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(score[order]) > 0]))
    weights, positive = weights[:, order], positive[order]
    hit, miss = (np.add.reduceat(weights * of, starts, axis=1) for of in (positive, ~positive))  # per distinct score
    true, false = (of[:, ::-1].cumsum(1)[:, ::-1] for of in (hit, miss))  # at this score or above
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (hit * (false[:, :1] - false + miss / 2)).sum(1) / (true[:, 0] * false[:, 0])
        precision = np.where(hit > 0, true / (true + false), 0)
        average = np.where(false[:, 0] > 0, (hit * precision).sum(1) / true[:, 0], np.nan)
    return area, average
