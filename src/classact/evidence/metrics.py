"""Metrics of predicted probabilities, and what is fitted on a validation part: a temperature and a threshold.

Two kinds of metrics. *Ranking* metrics are functions of the labels and probabilities of one test part (AUC, AUPRC,
points of the ROC curve); a comparison averages them over folds. *Pooled* metrics are ratios of sums over items
(accuracy, recall, Brier score, calibration error), written as functions of summed counts, so that an interval can come
from a bootstrap over groups.
"""

from collections.abc import Callable

import numpy as np

BINS = 10  # of the reliability diagram at most
POINTS = {f"{name}_at_{level}": (name, level / 100) for name in ("sensitivity", "specificity") for level in (90, 95)}
POOLED = ("macro_f1", "balanced_accuracy", "accuracy")


def calibrate(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logits of probabilities (n, C) by a temperature.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

    Examples
    --------
    >>> calibrate(np.array([[0.2, 0.8]]), 2.0).round(3)
    array([[0.333, 0.667]])
    """
    logits = np.log(np.clip(probabilities.astype(np.float64), 1e-12, 1)) / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Temperature in [0.05, 20] that minimises the cross-entropy with smoothed labels; 1 where a class is absent.

    Labels are smoothed as Platt does (Probabilistic Outputs for Support Vector Machines, 1999): an item of a class
    with n items counts as (n + 1) / (n + 2) of it, so that a few perfectly separated items do not ask for certainty.
    """
    from scipy.optimize import minimize_scalar

    n, classes = probabilities.shape
    count = np.bincount(labels, minlength=classes)
    if (count == 0).any():
        return 1.0
    target = np.full((n, classes), 1.0) / (count[labels] + 2)[:, None] / (classes - 1)
    target[np.arange(n), labels] = (count[labels] + 1) / (count[labels] + 2)

    def loss(log_temperature: float) -> float:
        return float(-(target * np.log(np.clip(calibrate(probabilities, np.exp(log_temperature)), 1e-12, 1))).sum())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def fit_threshold(labels: np.ndarray, probability: np.ndarray, target_sensitivity: float | None = None) -> float:
    """Choose the threshold on the positive class's probability.

    Parameters
    ----------
    labels : (n,)
        1 where positive.
    probability : (n,)
        Of the positive class.
    target_sensitivity : float, optional
        The largest threshold with at least this sensitivity. Default: the threshold with the best balanced accuracy, of
        equals the nearest to 0.5.

    Returns
    -------
    float
        In [0, 1]; 0.5 where one of the classes is absent.
    """
    positive = labels == 1
    if positive.all() or not positive.any():
        return 0.5
    values = np.unique(probability)
    between = (values[1:] + values[:-1]) / 2
    candidates = np.concatenate([[0.5], between])
    if target_sensitivity is not None:
        candidates = np.concatenate([[0.0], between])
        sensitivity = (probability[positive][None] >= candidates[:, None]).mean(1)
        return float(candidates[sensitivity >= target_sensitivity - 1e-12].max())
    predicted = probability[None] >= candidates[:, None]
    balanced = (predicted[:, positive].mean(1) + (~predicted[:, ~positive]).mean(1)) / 2
    best = candidates[balanced >= balanced.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def decide(probabilities: np.ndarray, threshold: float | None) -> np.ndarray:
    """Predicted classes; of two classes, the second where its probability reaches the threshold."""
    if probabilities.shape[1] == 2 and threshold is not None:
        return (probabilities[:, 1] >= threshold).astype(int)
    return probabilities.argmax(1)


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest for more than two; NaN where a class is absent."""
    return _one_against_rest(labels, probabilities, "roc_auc_score")


def auprc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Average precision of the positive class, or mean over more than two classes; NaN where one is absent."""
    return _one_against_rest(labels, probabilities, "average_precision_score")


def _one_against_rest(labels: np.ndarray, probabilities: np.ndarray, name: str) -> float:
    from sklearn import metrics

    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return float("nan")
    wanted = [1] if classes == 2 else range(classes)
    return float(np.mean([getattr(metrics, name)(labels == c, probabilities[:, c]) for c in wanted]))


def roc_point(labels: np.ndarray, probability: np.ndarray, name: str, level: float) -> float:
    """Read the ROC curve: the best sensitivity where specificity is at least `level`, or the reverse.

    It describes the ranking, not a threshold that could be used: that one must not come from the test part.

    Parameters
    ----------
    labels, probability : (n,)
        1 where positive; probability of the positive class.
    name : {"sensitivity", "specificity"}
        What is read, where the other one reaches `level`.
    """
    from sklearn.metrics import roc_curve

    if len(np.unique(labels)) < 2:
        return float("nan")
    false_positive, sensitivity, _ = roc_curve(labels, probability, drop_intermediate=False)
    read, given = (sensitivity, 1 - false_positive) if name == "sensitivity" else (1 - false_positive, sensitivity)
    return float(read[given >= level - 1e-12].max())


def ranking_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """AUC and AUPRC of one test part, and for two classes four points of its ROC curve; NaN where a class is absent."""
    found = {"auc": auc(labels, probabilities), "auprc": auprc(labels, probabilities)}
    if probabilities.shape[1] == 2:
        found |= {key: roc_point(labels, probabilities[:, 1], *of) for key, of in POINTS.items()}
    return found


def confusion_metric(name: str, index: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Metric of summed confusion matrices (B, repeats, C, C), averaged over the repeats.

    Parameters
    ----------
    name : {"accuracy", "balanced_accuracy", "macro_f1", "recall"}
        ``"recall"`` is that of the class `index`: of two, sensitivity is the recall of 1, specificity that of 0.
    """

    def of(counts: np.ndarray) -> np.ndarray:
        right = np.diagonal(counts, axis1=-2, axis2=-1)
        actual, predicted = counts.sum(-1), counts.sum(-2)
        with np.errstate(invalid="ignore", divide="ignore"):
            if name == "accuracy":
                per_repeat = right.sum(-1) / actual.sum(-1)
            elif name == "balanced_accuracy":
                per_repeat = np.nanmean(np.where(actual > 0, right / actual, np.nan), axis=-1)
            elif name == "recall":
                per_repeat = right[..., index] / actual[..., index]
            else:
                per_repeat = np.nanmean(
                    np.where(actual + predicted > 0, 2 * right / (actual + predicted), np.nan), axis=-1
                )
        return per_repeat.mean(-1)

    return of


def ratio(counts: np.ndarray) -> np.ndarray:
    """Mean over repeats of the ratio of two sums (B, repeats, 2): the Brier score of summed errors and items."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts[..., 0] / counts[..., 1]).mean(-1)


def calibration_error(counts: np.ndarray) -> np.ndarray:
    """Mean over repeats of the expected calibration error, from summed (B, repeats, bins, 2).

    Of every bin: the sum of probability minus outcome, and the number of predictions.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.abs(counts[..., 0]).sum(-1) / counts[..., 1].sum(-1)).mean(-1)


def squared_error(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Brier score of every item (n,): of the positive class for two classes, else summed over the classes."""
    target = np.eye(probabilities.shape[1])[labels]
    error = (probabilities - target) ** 2
    return error[:, 1] if probabilities.shape[1] == 2 else error.sum(1)


def confidence(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a reliability diagram compares, each (n,): a probability, and whether it came true.

    The positive class's for two classes, else that of the predicted class.
    """
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], (labels == 1).astype(float)
    return probabilities.max(1), (probabilities.argmax(1) == labels).astype(float)


def bin_of(probability: np.ndarray, bins: int | None = None) -> np.ndarray:
    """Bin of every probability (n,), such that the bins hold equal numbers; equal values share a bin.

    By default there are ten bins, fewer where that would leave less than ten predictions in a bin, but at least two.
    """
    bins = bins or min(BINS, max(2, len(probability) // 10))
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, probability, side="right")
