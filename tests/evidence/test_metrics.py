"""Metrics against scikit-learn, and what is fitted on a validation part."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from classact.evidence.metrics import (
    auc,
    auprc,
    bin_of,
    calibrate,
    calibration_error,
    confusion_metric,
    decide,
    fit_temperature,
    fit_threshold,
    ranking_metrics,
    ratio,
    roc_point,
    squared_error,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 200)
LOGITS = LABELS * 1.5 + RNG.normal(size=200)
P = np.stack([1 / (1 + np.exp(LOGITS)), 1 / (1 + np.exp(-LOGITS))], axis=1)


def test_threshold():
    labels = np.array([0, 0, 0, 1, 1])
    assert fit_threshold(labels, np.array([0.1, 0.2, 0.3, 0.8, 0.9])) == 0.5  # of equals, nearest to 0.5
    assert 0.05 < fit_threshold(labels, np.array([0.01, 0.02, 0.05, 0.1, 0.3])) < 0.1
    assert fit_threshold(np.zeros(4), np.random.rand(4)) == 0.5


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
def test_threshold_for_a_sensitivity_is_the_largest_that_reaches_it(target):
    threshold = fit_threshold(LABELS, P[:, 1], target)
    positive = P[LABELS == 1, 1]
    assert (positive >= threshold).mean() >= target
    larger = np.unique(P[:, 1])[np.unique(P[:, 1]) > threshold][1]
    assert (positive >= larger).mean() < target or larger > positive.max()


def test_temperature_undoes_a_scaling_of_the_logits():
    for scale in (0.3, 1.0, 4.0):
        found = fit_temperature(LABELS, calibrate(P, 1 / scale))
        assert found == pytest.approx(scale * fit_temperature(LABELS, P), rel=0.02)
    p = calibrate(P, 1 / 4)  # overconfident
    mended = calibrate(p, fit_temperature(LABELS, p))
    assert sklearn_metrics.log_loss(LABELS, mended[:, 1]) < sklearn_metrics.log_loss(LABELS, p[:, 1]) - 0.1
    assert sklearn_metrics.roc_auc_score(LABELS, mended[:, 1]) == pytest.approx(auc(LABELS, p))


def test_a_few_perfectly_separated_items_do_not_ask_for_certainty():
    labels = np.array([0, 0, 0, 1, 1, 1])
    p = np.where(labels[:, None] == np.arange(2), 0.7, 0.3)
    mended = calibrate(p, fit_temperature(labels, p))
    assert mended[0, 0] == pytest.approx(4 / 5, abs=0.01)  # Platt's target for three items
    assert fit_temperature(np.zeros(3, int), p[:3]) == 1.0  # one class only


@pytest.mark.parametrize("classes", [2, 4])
def test_ranking_metrics_are_scikit_learns(classes):
    labels = RNG.integers(0, classes, 150)
    p = RNG.dirichlet(np.ones(classes), 150) + 0.5 * np.eye(classes)[labels]
    p /= p.sum(1, keepdims=True)
    found = ranking_metrics(labels, p)
    if classes == 2:
        assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, p[:, 1]))
        assert found["auprc"] == pytest.approx(sklearn_metrics.average_precision_score(labels, p[:, 1]))
    else:
        assert set(found) == {"auc", "auprc"}
        assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, p, multi_class="ovr"))
    labels[labels == 1] = 0
    assert np.isnan(auc(labels, p))
    assert np.isnan(auprc(labels, p))


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_points_of_the_roc_curve_by_brute_force(level):
    at = [(np.mean(P[LABELS == 1, 1] >= t), np.mean(P[LABELS == 0, 1] < t)) for t in [*P[:, 1], 2.0]]
    assert roc_point(LABELS, P[:, 1], "sensitivity", level) == max(a for a, b in at if b >= level)
    assert roc_point(LABELS, P[:, 1], "specificity", level) == max(b for a, b in at if a >= level)


def test_pooled_metrics_of_summed_counts():
    predicted = decide(P, 0.4)
    counts = np.zeros((1, 1, 2, 2))
    np.add.at(counts[0, 0], (LABELS, predicted), 1)
    assert confusion_metric("recall", 1)(counts)[0] == sklearn_metrics.recall_score(LABELS, predicted)
    assert confusion_metric("macro_f1")(counts)[0] == pytest.approx(
        sklearn_metrics.f1_score(LABELS, predicted, average="macro")
    )
    error = squared_error(LABELS, P)
    brier = ratio(np.array([[[error.sum(), len(error)]]]))[0]
    assert brier == pytest.approx(sklearn_metrics.brier_score_loss(LABELS, P[:, 1]))


def test_calibration_error_by_hand():
    p, came = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0])
    where = bin_of(p, bins=2)
    assert where.tolist() == [0, 0, 1, 1]
    counts = np.zeros((1, 1, 2, 2))
    np.add.at(counts[0, 0], where, np.stack([p - came, np.ones(4)], axis=1))
    assert calibration_error(counts)[0] == pytest.approx((0.8 + 0.2) / 4)


def test_decisions():
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    assert auc(np.array([0, 1, 1]), p) == 1
    assert decide(p, 0.7).tolist() == [0, 0, 1]
    assert decide(np.array([[0.2, 0.5, 0.3]]), None).tolist() == [1]
