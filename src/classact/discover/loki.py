"""Loki: the label, seen in training or not, that is nearest to what a classifier believes.

Roberts, Li, Adila, Cromp, Huang, Zhao, Sala: Geometry-Aware Adaptation for Pretrained Models, NeurIPS 2023,
https://arxiv.org/abs/2307.12226; authors' code https://github.com/SprocketLab/loki.

A classifier gives probabilities P of K observed labels Lambda; N labels Y have a metric d. Instead of the most probable
one, the Fréchet mean is predicted, ``argmin_{y in Y} sum_i P_i d^2(y, lambda_i)``. It needs no training, may be a label
that the classifier has never seen, and hedges between labels that it confuses. What can be predicted at all is the
*locus* of Lambda; a *locus cover* is a Lambda whose locus is everything, and the next label to observe is the one
farthest from the locus.

Where the authors' code differs: its straight-through gradient hands that of the one-hot prediction to the probabilities
unchanged, which is defined for K = N only; here it goes through the scores. Its public scripts pair rows of the metric
with classes by position, in orders that do not agree; here everything is looked up by name. Its search for the next
class adds the whole locus to Lambda, which on trees changes nothing.

Two things to know. The rule uses all of P, so a temperature matters: very flat probabilities all give the centre of the
metric, very sharp ones the most probable label. And moving towards the centre shortens squared distances under any
metric: compare with [`LabelMetric.scrambled`][classact.discover.LabelMetric.scrambled].
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linprog, minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import check_random_state, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from classact.discover.label_metrics import (
    ELEMENTS,
    TIES,
    TIES_SINGLE,
    LabelMetric,
    TreeMetric,
    as_labels,
    check_probabilities,
    first_smallest,
)

LP_TOLERANCE = 1e-8  # of the linear programmes, relative to the largest squared distance
TEMPERATURES = np.geomspace(0.1, 10, 41)

Table = Float[Tensor, "b k"] | Float[np.ndarray, "b k"]
Squares = Float[Tensor, "k n"] | Float[np.ndarray, "k n"]


def frechet_scores(probs: Table, sq_dist: Squares) -> Float[Tensor, "b n"] | Float[np.ndarray, "b n"]:
    """``S = -P D^2``: minus the expected squared distance of every label. Differentiable; in float32 at least.

    Parameters
    ----------
    probs : (B, K)
        Probabilities of the observed labels.
    sq_dist : (K, N)
        Squared distances from each of them to all labels.

    Returns
    -------
    (B, N)
        Of the kind of `probs`.
    """
    _check_shapes(probs, sq_dist)
    if isinstance(probs, np.ndarray):
        return -(probs @ np.asarray(sq_dist))
    assert isinstance(sq_dist, Tensor)
    wide = torch.promote_types(torch.promote_types(probs.dtype, sq_dist.dtype), torch.float32)
    with torch.autocast(probs.device.type, enabled=False):
        return -(probs.to(wide) @ sq_dist.to(wide))


def frechet_predict(
    probs: Table, sq_dist: Squares, return_set: bool = False
) -> Int[Tensor, " b"] | Int[np.ndarray, " b"] | Bool[Tensor, "b n"] | Bool[np.ndarray, "b n"]:
    """Number of the label with the smallest expected squared distance, the first one among equals.

    Only blocks of the table of B x N sums are held.

    Parameters
    ----------
    probs : (B, K)
        Probabilities of the observed labels; rows that sum to 1 within 0.001.
    sq_dist : (K, N)
        Squared distances.
    return_set : bool
        Return instead which labels are equally near, (B, N) bool: equal up to a relative difference of 1e-10, or 1e-5
        below float64.

    Raises
    ------
    ValueError
        If the shapes do not fit or these are no probabilities.

    Examples
    --------
    A star whose centre, label 0, was not observed:

    >>> import numpy as np
    >>> sq_dist = np.array([[1.0, 0, 4, 4], [1, 4, 0, 4], [1, 4, 4, 0]])
    >>> frechet_predict(np.array([[0.4, 0.35, 0.25], [1, 0, 0]]), sq_dist)
    array([0, 1])
    """
    _check_shapes(probs, sq_dist)
    if isinstance(probs, np.ndarray):
        answer = frechet_predict(torch.from_numpy(probs), torch.from_numpy(np.asarray(sq_dist)), return_set)
        return answer.numpy()  # type: ignore[union-attr]
    sums = probs.sum(1, dtype=torch.float64)
    if not bool(((sums - 1).abs() <= 1e-3).all() and (probs >= 0).all()):
        check_probabilities(probs.detach().double().cpu(), probs.shape[1])
    assert isinstance(sq_dist, Tensor)
    if return_set:
        expected = -frechet_scores(probs, sq_dist)
        assert isinstance(expected, Tensor)
        slack = 1 + TIES.get(expected.dtype, TIES_SINGLE)
        return expected <= expected.amin(1, keepdim=True) * slack
    return _nearest(probs, sq_dist)


def _nearest(probs: Float[Tensor, "b k"], sq_dist: Float[Tensor, "k n"]) -> Int[Tensor, " b"]:
    step = max(1, ELEMENTS // max(1, len(probs)))
    return first_smallest(-frechet_scores(probs, part) for part in sq_dist.split(step, 1))  # type: ignore[misc]


def _check_shapes(probs: Any, sq_dist: Any) -> None:
    if probs.ndim != 2 or sq_dist.ndim != 2 or probs.shape[1] != sq_dist.shape[0]:
        raise ValueError(
            f"probs, sq_dist: expected shapes (B, K) and (K, N), got {tuple(probs.shape)}, {tuple(sq_dist.shape)}"
        )


def frechet_straight_through(probs: Float[Tensor, "b k"], sq_dist: Float[Tensor, "k n"]) -> Float[Tensor, "b n"]:
    """The prediction as one-hot rows, with the gradient of the softmax of the scores."""
    scores = frechet_scores(probs, sq_dist)
    assert isinstance(scores, Tensor)
    hard = torch.zeros_like(scores).scatter(1, _nearest(probs.detach(), sq_dist).unsqueeze(1), 1.0)
    soft = scores.softmax(1)
    return hard + (soft - soft.detach())


def fit_temperature(
    log_probs: Float[np.ndarray, "b k"],
    target: Int[np.ndarray, " b"],
    cost: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float:
    """Temperature T for which the probabilities ``softmax(log P / T)`` serve best, on held-out observed classes.

    Parameters
    ----------
    log_probs : (B, K)
        Logarithms of probabilities, or logits.
    target : (B,) int
        The true column.
    cost : callable, optional
        Without it, T minimises the negative log-likelihood. With it, the true class of every sample is taken out of
        its probabilities, as if it had never been observed, and T minimises, of 41 values from 0.1 to 10, the mean of
        ``cost(probs)``: the squared distances (B,) between what is predicted from probabilities (B, K) and the truth.
    """
    if len(log_probs) != len(target) or not len(target):
        raise ValueError(f"X, y: expected as many samples, at least one, got {len(log_probs)} and {len(target)}")
    if cost is None:
        floor = np.maximum(log_probs, np.log(np.finfo(np.float64).tiny))

        def loss(log_temperature: float) -> float:
            rows = log_softmax(floor / np.exp(log_temperature), axis=1)
            return -float(rows[np.arange(len(target)), target].mean())

        return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded").x))
    if log_probs.shape[1] < 2:
        raise ValueError("y: taking out a class needs at least two observed ones")
    others = np.maximum(log_probs, np.log(np.finfo(np.float64).tiny))
    others[np.arange(len(target)), target] = -np.inf
    costs = [float(cost(softmax(others / T, axis=1)).mean()) for T in TEMPERATURES]
    equal = TEMPERATURES[np.flatnonzero(np.isclose(costs, min(costs)))]
    return float(equal[abs(np.log(equal)).argmin()])


class FrechetClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Predict the Fréchet mean under the probabilities of any classifier, instead of its most probable class.

    Parameters
    ----------
    estimator : estimator with predict_proba
        A clone is fitted; one that is fitted already goes in as ``sklearn.frozen.FrozenEstimator(estimator)``.
    metric : LabelMetric, optional
        Distances between labels, among them all classes that the estimator knows. By default all are as far from each
        other, and the rule is argmax.
    labels : sequence of names, optional
        The labels that may be predicted, in this order if equally good; by default all of the metric's.
    temperature : float
        T > 0; probabilities are raised to the power 1 / T and normalised.

    Attributes
    ----------
    classes_ : (N,) array
        The labels that may be predicted.
    observed_ : (K,) array
        The classes that the estimator knows.
    estimator_ : estimator
        The fitted one.
    metric_ : LabelMetric
        The metric in use.
    temperature_ : float
        `temperature`, or what ``calibrate`` found.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> x = np.linspace(0, 1, 50)[:, None]
    >>> grade = np.where(x[:, 0] < 0.5, 1, 9)
    >>> model = FrechetClassifier(LogisticRegression(), LabelMetric.from_path(range(1, 10))).fit(x, grade)
    >>> model.predict([[0.1], [0.5], [0.9]])
    array([3, 5, 7])
    """

    def __init__(self, estimator: Any, metric: LabelMetric | None = None, labels: Any = None, temperature: float = 1.0):
        self.estimator = estimator
        self.metric = metric
        self.labels = labels
        self.temperature = temperature

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = get_tags(self.estimator).input_tags.sparse
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "FrechetClassifier":
        """Fit the estimator to (n, D) features and the names (n,) of observed classes.

        Raises
        ------
        ValueError
            If a class, or one of `labels`, is not in the metric, the estimator has no probabilities, or the temperature
            is not positive.
        """
        _check_temperature(self.temperature)
        if not hasattr(self.estimator, "predict_proba"):
            raise ValueError(f"estimator: expected one with predict_proba, got {type(self.estimator).__name__}")
        if y is not None:
            check_classification_targets(y)
        options = {} if sample_weight is None else {"sample_weight": sample_weight}
        self.estimator_ = clone(self.estimator).fit(X, y, **options)
        self.observed_ = self.estimator_.classes_
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        self.metric_ = _metric_of(self.metric, self.labels, self.observed_)
        self.metric_.index(self.observed_)
        self.classes_ = self.metric_.labels[slice(None) if self.labels is None else self.metric_.index(self.labels)]
        self.temperature_ = float(self.temperature)
        return self

    def _log_probs(self, X: Any) -> Float[np.ndarray, "b k"]:
        check_is_fitted(self, "estimator_")
        with np.errstate(divide="ignore"):
            return np.log(check_probabilities(self.estimator_.predict_proba(X), len(self.observed_)))

    def _probs(self, X: Any) -> Float[np.ndarray, "b k"]:
        return softmax(self._log_probs(X) / self.temperature_, axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Names (n,) of the Fréchet means."""
        return self._mean(self._probs(X))

    def _mean(self, probs: Float[np.ndarray, "b k"]) -> np.ndarray:
        return self.metric_.frechet_mean(probs, self.observed_, self.labels)

    def decision_function(self, X: Any) -> Float[np.ndarray, "b n"] | Float[np.ndarray, " b"]:
        """Scores (n, N): minus the expected squared distance of every label; for two labels their difference (n,)."""
        probs = self._probs(X)
        scores = -self.metric_.expected_squared(probs, self.observed_, self.labels)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def calibrate(self, X: Any, y: Any, method: Literal["nll", "leave_class_out"] = "nll") -> "FrechetClassifier":
        """Set the temperature on held-out samples of observed classes, (n, D) and names (n,).

        Parameters
        ----------
        X, y
            Not those of ``fit``, on which classifiers are too sure.
        method : {"nll", "leave_class_out"}
            Minimise the negative log-likelihood; or, to imitate classes that were never observed, take the true class
            out of the probabilities and minimise the squared distance between prediction and truth. The paper takes
            probabilities as they are.

        Raises
        ------
        ValueError
            If a class was not observed, or the method is another one.
        """
        log_probs = self._log_probs(X)
        target = LabelMetric.discrete(self.observed_).index(y)

        def cost(probs: np.ndarray) -> np.ndarray:
            return self.metric_.squared(self._mean(probs), y)

        self.temperature_ = fit_temperature(log_probs, target, cost if _leaves_out(method) else None)
        return self


def _metric_of(metric: Any, labels: Any, observed: Any) -> LabelMetric:
    """The metric, or for None one in which all labels are equally far from each other."""
    if isinstance(metric, LabelMetric):
        return metric
    if metric is not None:
        kind = type(metric).__name__
        raise TypeError(
            f"metric: expected a LabelMetric, such as LabelMetric.from_matrix(distances, labels), got {kind}"
        )
    if labels is None:
        return LabelMetric.discrete(observed)
    return LabelMetric.discrete(list(dict.fromkeys([*as_labels(labels).tolist(), *as_labels(observed).tolist()])))


def _leaves_out(method: str) -> bool:
    if method not in ("nll", "leave_class_out"):
        raise ValueError(f"method: expected 'nll' or 'leave_class_out', got {method!r}")
    return method == "leave_class_out"


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


class FrechetHead(nn.Module):
    """Put after a network: its logits (B, K) of observed classes become scores (B, N) of all labels.

    The largest score is that of the Fréchet mean. Scores are differentiable and may serve as logits for training on.

    Parameters
    ----------
    metric : LabelMetric or None
        Distances between labels; None makes all labels equally far apart, with `observed` as the default labels.
    observed : sequence of K names
        The classes that the logits stand for, in their order.
    labels : sequence of N names, optional
        The labels to score; by default all of the metric's, in its order.
    temperature : float
        Logits are divided by it.
    hard : bool
        Return one-hot rows with a straight-through gradient instead of scores.

    Attributes
    ----------
    observed, labels : list
        Names of inputs and outputs.
    sq_dist : (K, N) float32
        Squared distances; 4 K N bytes.

    Examples
    --------
    >>> import torch
    >>> head = FrechetHead(LabelMetric.from_path(["low", "middle", "high"]), observed=["high", "low"])
    >>> head.predict(torch.tensor([[5.0, 0.0], [0.1, 0.0]]))
    ['high', 'middle']
    """

    sq_dist: Tensor
    temperature: Tensor

    def __init__(
        self,
        metric: LabelMetric | None,
        observed: Any,
        labels: Any = None,
        temperature: float = 1.0,
        hard: bool = False,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.observed: list[Any] = as_labels(observed).tolist()
        metric = _metric_of(metric, labels, self.observed)
        self.labels: list[Any] = as_labels(metric.labels if labels is None else labels).tolist()
        self.hard = hard
        self.config = {
            "metric": None,  # its part that is needed is saved with the weights
            "observed": self.observed,
            "labels": self.labels,
            "temperature": temperature,
            "hard": hard,
        }
        self.register_buffer("sq_dist", torch.from_numpy(metric.distances(self.observed, self.labels) ** 2).float())
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def _probs(self, logits: Tensor) -> Float[Tensor, "b k"]:
        if logits.ndim != 2 or logits.shape[1] != len(self.observed):
            raise ValueError(f"logits: expected shape (B, {len(self.observed)}), got {tuple(logits.shape)}")
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(1)

    def forward(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b n"]:
        """Score all labels."""
        score = frechet_straight_through if self.hard else frechet_scores
        scores = score(self._probs(logits), self.sq_dist)
        assert isinstance(scores, Tensor)
        return scores

    @torch.no_grad()
    def predict(self, logits: Float[Tensor, "b k"]) -> list[Any]:
        """Names of the Fréchet means."""
        return [self.labels[i] for i in _nearest(self._probs(logits), self.sq_dist).tolist()]

    @torch.no_grad()
    def calibrate(
        self, logits: Float[Tensor, "b k"], target: Any, method: Literal["nll", "leave_class_out"] = "nll"
    ) -> "FrechetHead":
        """Set the temperature on held-out logits and the names (B,) of their classes.

        As in [`FrechetClassifier.calibrate`][classact.discover.FrechetClassifier.calibrate].
        """
        column = LabelMetric.discrete(self.observed).index(target)

        def cost(probs: np.ndarray) -> np.ndarray:
            chosen = _nearest(torch.from_numpy(probs).float().to(self.sq_dist.device), self.sq_dist)
            return self.sq_dist[torch.from_numpy(column).to(chosen.device), chosen].cpu().numpy()

        values = logits.double().cpu().numpy()
        self.temperature.fill_(fit_temperature(values, column, cost if _leaves_out(method) else None))
        self.config["temperature"] = float(self.temperature)
        return self


def locus(
    metric: LabelMetric, observed: Any, method: Literal["auto", "tree", "pairs", "lp"] = "auto"
) -> Bool[np.ndarray, " n"]:
    """Which labels can be predicted when `observed` are: those that are a Fréchet mean under some probabilities.

    Parameters
    ----------
    metric : LabelMetric
        Of N labels; all N x N distances are made unless it is a tree.
    observed : sequence of names
        Lambda.
    method : {"auto", "tree", "pairs", "lp"}
        ``lp`` is exact for every metric: v is in the locus if the largest advantage that another label u has under the
        weights w, ``max_u sum_i w_i (d^2(v, lambda_i) - d^2(u, lambda_i))``, can be brought down to 0, a linear
        programme of K variables for each label. ``tree`` is exact where all nodes of a tree are labels: the paths
        between observed labels. ``pairs`` allows probabilities for two observed labels at a time; the paper calls
        a locus for which that is enough pairwise decomposable. ``auto`` takes ``tree`` where it can, else ``lp``.

    Returns
    -------
    (N,) bool
        In the order of ``metric.labels``.

    Examples
    --------
    >>> metric = LabelMetric.from_path(6)
    >>> metric.labels[locus(metric, [1, 4])]
    array([1, 2, 3, 4])
    """
    rows = np.unique(metric.index(observed))
    if not len(rows):
        raise ValueError("observed: expected at least one label")
    tree = _whole_tree(metric)
    if method == "tree" and tree is None:
        raise ValueError("metric: expected a tree of which all nodes are labels")
    if method in ("auto", "tree") and tree is not None:
        return tree.spanned(rows)
    squares = _squares(metric)[rows]
    if method == "pairs":
        return _pair_locus(squares)
    if method not in ("auto", "lp"):
        raise ValueError(f"method: expected 'auto', 'tree', 'pairs' or 'lp', got {method!r}")
    found = np.zeros(len(metric), dtype=bool)
    found[rows] = True
    for label in range(len(metric)):
        if not found[label] and (weights := _witness(squares, label)) is not None:
            expected = weights @ squares
            found |= expected <= expected.min() + LP_TOLERANCE
            found[label] = True
    return found


def _whole_tree(metric: LabelMetric) -> TreeMetric | None:
    return metric if isinstance(metric, TreeMetric) and metric.every_node else None


def _squares(metric: LabelMetric) -> Float[np.ndarray, "n n"]:
    squares = metric.distances(metric.labels) ** 2
    return squares / (squares.max() or 1)


def _witness(squares: Float[np.ndarray, "k n"], label: int) -> Float[np.ndarray, " k"] | None:
    """Probabilities under which `label` is a Fréchet mean, if there are any."""
    k, n = squares.shape
    behind = squares[:, [label]] - squares  # what u gains over the label, for each observed one
    result = linprog(
        np.r_[np.zeros(k), 1.0],
        A_ub=np.c_[behind.T, np.full(n, -1.0)],
        b_ub=np.zeros(n),
        A_eq=np.r_[np.ones(k), 0.0][None],
        b_eq=[1.0],
        bounds=(0, None),
        method="highs",
    )
    if result.status != 0:  # pragma: no cover - feasible and bounded by construction
        raise RuntimeError(f"the linear programme of label {label} failed: {result.message}")
    return result.x[:k] if result.fun <= LP_TOLERANCE else None


def _pair_locus(squares: Float[np.ndarray, "k n"]) -> Bool[np.ndarray, " n"]:
    """Labels on the lower envelope of the lines ``(1 - w) a + w b`` over 0 <= w <= 1, for every pair of rows."""
    found = (squares <= squares.min(1, keepdims=True) + LP_TOLERANCE).any(0)
    for first in range(len(squares)):
        for second in range(first + 1, len(squares)):
            a, b = squares[first], squares[second]
            offset = a[:, None] - a - LP_TOLERANCE  # label v stays ahead of u while offset + w slope <= 0
            slope = (b - a)[:, None] - (b - a)
            with np.errstate(divide="ignore", invalid="ignore"):
                bound = -offset / slope
            low = np.where(slope < 0, bound, 0.0).max(1).clip(min=0)
            high = np.where(slope > 0, bound, 1.0).min(1).clip(max=1)
            never = ((slope == 0) & (offset > 0)).any(1)
            found |= (low <= high) & ~never
    return found


def is_locus_cover(metric: LabelMetric, observed: Any) -> bool:
    """Whether every label can be predicted from the observed ones."""
    return bool(locus(metric, observed).all())


def minimum_locus_cover(metric: LabelMetric) -> list[Any]:
    """The smallest set from which every label of a tree can be predicted: its leaves.

    Raises
    ------
    ValueError
        If the metric is not that of a tree of which all nodes are labels; see
        [`greedy_locus_cover`][classact.discover.greedy_locus_cover].
    """
    tree = _whole_tree(metric)
    if tree is None:
        raise ValueError("metric: expected a tree of which all nodes are labels")
    return metric.labels[tree.leaves()].tolist()


def greedy_locus_cover(metric: LabelMetric, observed: Any = None) -> list[Any]:
    """A locus cover from which no label can be left out, for any metric.

    Labels are dropped one by one, the most central first, if linear programmes show that all can still be predicted.
    Not always the smallest cover.

    Parameters
    ----------
    metric : LabelMetric
        Of N labels; up to N linear programmes for every label.
    observed : sequence of names, optional
        A locus cover to start from; all labels by default.

    Raises
    ------
    ValueError
        If `observed` is no locus cover.
    """
    squares, n = _squares(metric), len(metric)
    kept = np.ones(n, dtype=bool)
    weights = np.eye(n)  # of every label, probabilities under which it is predicted
    if observed is not None:
        kept[:] = False
        kept[metric.index(observed)] = True
        found = {label: _supported(squares, kept, label) for label in np.flatnonzero(~kept).tolist()}
        if missing := [label for label, support in found.items() if support is None]:
            raise ValueError(f"observed: no locus cover, {metric.labels.tolist()[missing[0]]!r} cannot be predicted")
        for label, support in found.items():
            weights[label] = support
    for candidate in np.argsort(squares.sum(0), kind="stable").tolist():
        if not kept[candidate] or kept.sum() == 1:
            continue
        kept[candidate] = False
        found = {}
        for label in np.flatnonzero(weights[:, candidate] > 0).tolist():
            found[label] = _supported(squares, kept, label)
            if found[label] is None:
                kept[candidate] = True
                break
        else:
            for label, support in found.items():
                weights[label] = support
    return metric.labels[kept].tolist()


def _supported(squares: np.ndarray, kept: np.ndarray, label: int) -> np.ndarray | None:
    found = _witness(squares[kept], label)
    if found is None:
        return None
    weights = np.zeros(len(squares))
    weights[kept] = found
    return weights


class NextClassSelector:
    """Which label to observe next, so that more of them can be predicted.

    Parameters
    ----------
    metric : LabelMetric
        Of all labels.
    rule : {"farthest", "largest"}
        The paper's: the label farthest from the locus. On trees with edges of equal length it is the one that enlarges
        the locus most, which ``largest`` finds for every metric by trying all.

    Examples
    --------
    >>> NextClassSelector(LabelMetric.from_path(10)).select([3, 4])
    9
    """

    def __init__(self, metric: LabelMetric, rule: Literal["farthest", "largest"] = "farthest") -> None:
        if rule not in ("farthest", "largest"):
            raise ValueError(f"rule: expected 'farthest' or 'largest', got {rule!r}")
        self.metric, self.rule = metric, rule

    def select(self, observed: Any) -> Any:
        """The next label, the first one among equals; None if all can be predicted already."""
        names = as_labels(observed).tolist()
        inside = locus(self.metric, names)
        outside = self.metric.labels[~inside].tolist()
        if not outside:
            return None
        if self.rule == "farthest":
            gain = self.metric.distances(self.metric.labels[inside], outside).min(0)
        else:
            gain = np.array([locus(self.metric, [*names, name]).sum() for name in outside])
        return outside[int(gain.argmax())]


def sample_labels(metric: LabelMetric, n: int, theta: float = 0.0, random_state: Any = None) -> list[Any]:
    """Draw n different labels with probabilities proportional to ``exp(-theta d(label, centre))``.

    The paper's model of which classes happen to be observed: with growing theta they crowd around the centre, and their
    locus shrinks.

    Parameters
    ----------
    metric : LabelMetric
        Of all labels; the centre is that of ``metric.center()``.
    n : int
        How many.
    theta : float
        0 draws uniformly.
    random_state : int, RandomState or None
        Of the draw.
    """
    if not 1 <= n <= len(metric):
        raise ValueError(f"n: expected 1 to {len(metric)}, the number of labels, got {n}")
    distance = metric.distances([metric.center()])[0]
    # drawing one after another without replacement is taking the largest of these
    draw = check_random_state(random_state).gumbel(size=len(metric)) - theta * distance
    return metric.labels[np.argsort(-draw, kind="stable")[:n]].tolist()
