"""Convergent learning: which units of one network are found in another, alone, as a sparse mix, or as a subspace.

Li, Yosinski, Clune, Lipson, Hopcroft: Convergent Learning: Do different neural networks learn the same
representations?, ICLR 2016, https://arxiv.org/abs/1511.07543, code: https://github.com/YixuanLi/convergent_learning.

Two networks see the same images. From the correlations C of their units follow a one-to-one matching and the best
partner of each unit (section 3), a sparse linear prediction of one network's units from the other's (section 4), and
groups of units of both that span a common subspace (section 5). All of it comes from first and second moments, so that
activations are never kept ([`ActivationStats`][classact.probe.ActivationStats]); mutual information, which does not,
takes arrays. [`convergence_report`][classact.probe.convergence_report] does everything for some layers of two models
or checkpoints, and beside it for two controls, since untrained networks match as well: the two networks without
training, and the trained ones with the images of one permuted. Linear CKA, SVCCA and Procrustes similarity judge the
same layers as wholes.

Where this departs from the authors. Matchings are found by the Hungarian algorithm (theirs, a search for augmenting
paths, finds the same optimum). Sparse prediction is solved as the convex problem it is, on standardised units, where
the trivial prediction has a loss of 1/2, and is judged on held-out images; they trained a 1x1 convolution, which is
[`Stitch1x1`][classact.probe.Stitch1x1]. Their correction of mutual information mixes nats and bits; it is there as
``bias="official"``. Their code ends before the clustering, which follows the paper's text.

>>> import torch
>>> from torch import nn
>>> first = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
>>> second = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
>>> order = torch.tensor([2, 0, 5, 1, 4, 3])
>>> with torch.no_grad():  # the same units in another order
...     _ = second[0].weight.copy_(first[0].weight[order]), second[0].bias.copy_(first[0].bias[order])
>>> loader = torch.utils.data.DataLoader(torch.randn(300, 4), batch_size=50)
>>> found = convergence_report(first, second, ["1"], loader)["1"]
>>> found.bipartite.index2.tolist(), bool((found.bipartite.value > 0.999).all())
([1, 3, 0, 5, 4, 2], True)
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from sklearn.base import BaseEstimator, ClusterMixin, RegressorMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from classact.probe.activations import (
    ActivationStats,
    Pool,
    aligned_positions,
    channel_axis_of,
    in_step,
    observed,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Matrix = Float[np.ndarray, "s1 s2"] | Float[Tensor, "s1 s2"]
First = Float[np.ndarray, "s1 s1"] | Float[Tensor, "s1 s1"]
Second = Float[np.ndarray, "s2 s2"] | Float[Tensor, "s2 s2"]
Method = Literal["bipartite", "semi"]
Bias = Literal["miller-madow", "none", "official"]
ALPHAS = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)
GAP = 5e-3  # a larger duality gap, a hundredth of R^2, is worth a warning
CONDITIONS = ("trained", "untrained", "permuted")
COLOURS = {"trained": "C0", "untrained": "0.45", "permuted": "C1"}


def _matrix(name: str, C: Any) -> np.ndarray:
    if isinstance(C, Tensor):
        array = (C if C.dtype == torch.float64 else C.float()).detach().cpu().numpy()
    else:
        array = np.asarray(C, float)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name}: expected a matrix (s1, s2), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return array


class Matching(NamedTuple):
    """Pairs of units, in the order of the first network's.

    Attributes
    ----------
    index1, index2 : (M,) int
        Units of the first and the second network.
    value : (M,)
        What was maximised: the correlation, or its absolute value.
    """

    index1: Int[np.ndarray, " m"]
    index2: Int[np.ndarray, " m"]
    value: Float[np.ndarray, " m"]


def match_units(C: Matrix, method: Method = "bipartite", signed: bool = True) -> Matching:
    """Pair the units of two networks by their correlations (section 3).

    Parameters
    ----------
    C : (s1, s2)
        Correlations. Units whose row or column is 0 throughout are dead and left out.
    method : {"bipartite", "semi"}
        One to one, with the largest sum over all matchings, min(s1, s2) pairs; or each unit of the first network with
        its best partner, which several may share.
    signed : bool
        Whether a negative correlation is no match, as for units behind ReLU. Set to False for layers without, where the
        sign of a unit means nothing.

    Raises
    ------
    ValueError
        If `C` is not a matrix of finite values or the method is unknown.

    Examples
    --------
    >>> C = np.array([[0.9, 0.8, 0.1], [0.85, 0.3, 0.2], [0.2, 0.1, 0.05]])
    >>> match_units(C).index2.tolist(), match_units(C, "semi").index2.tolist()
    ([1, 0, 2], [0, 0, 0])
    """
    values = _matrix("C", C)
    if not signed:
        values = np.abs(values)
    alive1, alive2 = np.flatnonzero(values.any(1)), np.flatnonzero(values.any(0))
    values = values[np.ix_(alive1, alive2)]
    if method == "bipartite":
        row, column = linear_sum_assignment(values, maximize=True)
    elif method == "semi":
        row = np.arange(len(alive1))
        column = values.argmax(1) if len(row) else row
    else:
        raise ValueError(f"method: expected 'bipartite' or 'semi', got {method!r}")
    return Matching(alive1[row], alive2[column], values[row, column].astype(float))


def matching_overlap(C: Matrix, signed: bool = True) -> float:
    """Share of units of the first network whose best partner is theirs in the one-to-one matching too.

    Examples
    --------
    >>> round(matching_overlap(np.array([[0.9, 0.8, 0.1], [0.85, 0.3, 0.2], [0.2, 0.1, 0.05]])), 3)
    0.333
    """
    semi, bipartite = match_units(C, "semi", signed), match_units(C, "bipartite", signed)
    if not len(semi.index1):
        return float("nan")
    partner = dict(zip(bipartite.index1.tolist(), bipartite.index2.tolist(), strict=True))
    same = [partner.get(i) == j for i, j in zip(semi.index1.tolist(), semi.index2.tolist(), strict=True)]
    return float(np.mean(same))


def cycle_order(perm: Sequence[int] | Int[np.ndarray, " s"]) -> tuple[list[int], list[int]]:
    """Order of the units that follows the cycles of a permutation, and the cycles' lengths.

    In this order the pairs of a matching between two halves of one matrix lie next to the diagonal.

    Raises
    ------
    ValueError
        If `perm` is no permutation, as the matching of a matrix that is not square.

    Examples
    --------
    >>> cycle_order([2, 1, 3, 0])
    ([0, 2, 3, 1], [3, 1])
    """
    following = [int(i) for i in perm]
    if sorted(following) != list(range(len(following))):
        raise ValueError(f"perm: expected a permutation of 0 to {len(following) - 1}, got {following[:8]}")
    order: list[int] = []
    lengths = []
    seen: set[int] = set()
    for start in range(len(following)):
        before = len(order)
        at = start
        while at not in seen:
            seen.add(at)
            order.append(at)
            at = following[at]
        if len(order) > before:
            lengths.append(len(order) - before)
    return order, lengths


def information(counts: Float[np.ndarray, "*s bx by"], bias: Bias = "miller-madow") -> Float[np.ndarray, "*s"]:
    """Mutual information, in nats, of two-dimensional histograms.

    Parameters
    ----------
    counts : (..., Bx, By)
        Numbers of samples.
    bias : {"miller-madow", "none", "official"}
        What to subtract: ``(B_xy - B_x - B_y + 1) / (2 n)`` with the numbers of occupied bins, nothing, or, as in the
        authors' code, ``Bx By / (2 n ln 2)``, which is too much. What is left may be negative.

    Examples
    --------
    >>> round(float(information(np.array([[40.0, 10.0], [10.0, 40.0]]), "none")), 6)
    0.192745
    """
    n = counts.sum((-2, -1))
    rows, columns = counts.sum(-1), counts.sum(-2)

    def entropy_sum(part: np.ndarray, axes: int | tuple[int, int]) -> Any:
        return np.where(part > 0, part * np.log(np.maximum(part, 1)), 0).sum(axes)

    found = (entropy_sum(counts, (-2, -1)) - entropy_sum(rows, -1) - entropy_sum(columns, -1)) / n + np.log(n)
    if bias == "miller-madow":
        found = found - ((counts > 0).sum((-2, -1)) - (rows > 0).sum(-1) - (columns > 0).sum(-1) + 1) / (2 * n)
    elif bias == "official":
        found = found - counts.shape[-2] * counts.shape[-1] / (2 * n * np.log(2))
    elif bias != "none":
        raise ValueError(f"bias: expected 'miller-madow', 'none' or 'official', got {bias!r}")
    return np.asarray(found)


def mutual_information(
    x: Float[np.ndarray, "t s1"] | Float[Tensor, "t s1"],
    y: Float[np.ndarray, "t s2"] | Float[Tensor, "t s2"],
    bins: int = 10,
    zero_bin: bool = True,
    bias: Bias = "miller-madow",
) -> Float[np.ndarray, "s1 s2"]:
    """Mutual information of every unit of one network with every unit of another, in nats, by histograms.

    Parameters
    ----------
    x, y : (T, s1), (T, s2)
        Activations for the same T samples.
    bins : int
        Bins of each unit, with about equal numbers of samples.
    zero_bin : bool
        Whether the first bin is for values below a millionth of the unit's largest, for units behind ReLU, which are
        often 0 (the authors: below 1e-6), the others then sharing the rest.
    bias
        See [`information`][classact.probe.convergent.information].

    Raises
    ------
    ValueError
        For fewer than 3 samples, unequal numbers of samples, fewer than 2 bins, NaN or infinity.
    """
    codes = [_bin_codes(name, _matrix(name, a), bins, zero_bin) for name, a in (("x", x), ("y", y))]
    if len(codes[0]) != len(codes[1]):
        raise ValueError(f"x, y: expected equally many samples, got {len(codes[0])} and {len(codes[1])}")
    s1, s2 = (c.shape[1] for c in codes)
    counts = torch.zeros(s1 * bins, s2 * bins, dtype=torch.float64)
    for first, second in zip(*(torch.from_numpy(c).split(4096) for c in codes), strict=True):
        hot = [F.one_hot(c, bins).flatten(1).float() for c in (first, second)]
        counts += hot[0].T @ hot[1]  # whole numbers below 2^24: exact
    return information(counts.view(s1, bins, s2, bins).transpose(1, 2).numpy(), bias)


def _bin_codes(name: str, x: np.ndarray, bins: int, zero_bin: bool) -> np.ndarray:
    if len(x) < 3:
        raise ValueError(f"{name}: expected at least 3 samples, got {len(x)}")
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    codes = np.zeros(x.shape, np.int64)
    for unit in range(x.shape[1]):
        values = x[:, unit]
        rest = values >= 1e-6 * values.max() if zero_bin and values.max() > 0 else np.full(len(x), not zero_bin)
        if rest.any():
            first = int(zero_bin)
            cuts = np.quantile(values[rest], np.linspace(0, 1, bins - first + 1)[1:-1])
            codes[rest, unit] = first + np.searchsorted(cuts, values[rest], side="left")
    return codes


class LayerSimilarity(NamedTuple):
    """Similarity of two layers as wholes, each from 0 to 1.

    Attributes
    ----------
    cka : float
        Linear centred kernel alignment (Kornblith et al., https://arxiv.org/abs/1905.00414).
    svcca : float
        Mean canonical correlation of the principal components that hold 99 % of the variance (Raghu et al.,
        https://arxiv.org/abs/1706.05806).
    procrustes : float
        ``||S12||_* / sqrt(tr S11 tr S22)``: the correlation after the best rotation of one layer.
    """

    cka: float
    svcca: float
    procrustes: float


def layer_similarity(S11: First, S12: Matrix, S22: Second, share: float = 0.99) -> LayerSimilarity:
    """Compare two layers as wholes by the covariances of their units.

    For feature maps every position is a sample, as in the rest of the module.

    Parameters
    ----------
    S11, S12, S22 : (s1, s1), (s1, s2), (s2, s2)
        Covariances within and between the layers.
    share : float
        Of the variance that SVCCA keeps.

    Examples
    --------
    >>> round(layer_similarity(np.eye(3), np.eye(3), np.eye(3)).cka, 6)
    1.0
    """
    first, between, second = (_matrix(name, S) for name, S in (("S11", S11), ("S12", S12), ("S22", S22)))
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    if not scale:
        return LayerSimilarity(float("nan"), float("nan"), float("nan"))
    return LayerSimilarity(
        float((between**2).sum() / scale),
        float(canonical_correlations(first, between, second, share).mean()),
        float(np.linalg.norm(between, "nuc") / np.sqrt(np.trace(first) * np.trace(second))),
    )


def canonical_correlations(
    S11: Float[np.ndarray, "s1 s1"],
    S12: Float[np.ndarray, "s1 s2"],
    S22: Float[np.ndarray, "s2 s2"],
    share: float = 1.0,
) -> Float[np.ndarray, " m"]:
    """Cosines of the principal angles between the spans of two sets of units, largest first.

    Parameters
    ----------
    S11, S12, S22
        Covariances, or correlations.
    share : float
        Keep the principal components of each side with this share of its variance.
    """
    whitened = []
    for S in (S11, S22):
        values, vectors = np.linalg.eigh(S)
        values, vectors = values[::-1], vectors[:, ::-1]
        enough = int(np.searchsorted(np.cumsum(values), share * values.sum() * (1 - 1e-12))) + 1
        kept = (np.arange(len(values)) < enough) & (values > 1e-10 * values[0])
        whitened.append(vectors[:, kept] / np.sqrt(values[kept]))
    return np.linalg.svd(whitened[0].T @ S12 @ whitened[1], compute_uv=False).clip(0, 1)


class SparsePrediction(RegressorMixin, BaseEstimator):
    """Predict every unit of one network by few units of another (section 4).

    For each target unit ``min_w 1/(2T) ||z_j - Z w||^2 + alpha ||w||_1`` with standardised units, for every penalty.
    All targets share the correlations of the predictors, so that after one pass over the samples only those are needed:
    `fit_stats` takes [`ActivationStats`][classact.probe.ActivationStats] in place of activations.

    Parameters
    ----------
    alphas : sequence of float
        Penalties, 0 (least squares) or more; from 1 on nothing is left.
    alpha : float
        That of `predict` and `score`, one of `alphas`.
    tol : float
        Coefficients larger than this count as contributors.
    max_iter : int
        Most sweeps of coordinate descent for one target and penalty.

    Attributes
    ----------
    coef_path_ : (A, s2, s1)
        Coefficients of standardised units, 0 for dead ones.
    half_mse_path_ : (A, s2)
        ``1/2 (1 - R^2)`` on the samples of the fit; NaN for dead targets. 1/2 is trivial.
    n_contributors_ : (A, s2) int
        Predictors of each target.
    gap_ : float
        Largest duality gap: no loss is further above its minimum.
    n_iter_ : int
        Most sweeps that were needed.

    Warns
    -----
    ConvergenceWarning
        Once, in a fit, if `gap_` is above 0.005, a hundredth of R^2.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(500, 3))
    >>> fitted = SparsePrediction(alphas=(0.1,), alpha=0.1).fit(x, x[:, [2, 0]])
    >>> np.abs(fitted.coef_path_).round(3).tolist()
    [[[0.0, 0.0, 0.9], [0.9, 0.0, 0.0]]]
    """

    def __init__(
        self, alphas: Sequence[float] = (0.0, 1e-4, 1e-3, 1e-2, 1e-1), alpha: float = 1e-3, tol: float = 1e-3,
        max_iter: int = 2000,
    ) -> None:  # fmt: skip
        self.alphas = alphas
        self.alpha = alpha
        self.tol = tol
        self.max_iter = max_iter

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> "SparsePrediction":
        """Fit to activations (T, s1) of the predicting and (T, s2) or (T,) of the predicted network."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=3)
        stats = ActivationStats()
        stats.update(torch.from_numpy(X), torch.from_numpy(np.asarray(y, float).reshape(len(X), -1)))
        self.fit_stats(stats)
        self._one_target = y.ndim == 1
        return self

    def fit_stats(self, stats: ActivationStats, permuted: bool = False) -> "SparsePrediction":
        """Fit to the moments of two layers, or of their permuted control.

        Raises
        ------
        ValueError
            If a penalty is negative or NaN, or `alpha` is not one of them.
        """
        alphas = np.asarray(self.alphas, float)
        if alphas.ndim != 1 or not len(alphas) or not (alphas >= 0).all():
            raise ValueError(f"alphas: expected penalties of 0 or more, got {self.alphas!r}")
        if self.alpha not in alphas:
            raise ValueError(f"alpha: expected one of alphas, {alphas.tolist()}, got {self.alpha}")
        self._one_target = False
        self.n_features_in_ = len(stats.mean(1))
        self.mean_, self.target_mean_ = (stats.mean(net).numpy() for net in (1, 2))
        self.scale_, self.target_scale_ = (torch.where(stats.dead(net), 1.0, stats.std(net)).numpy() for net in (1, 2))
        alive1, alive2 = ((~stats.dead(net)).numpy() for net in (1, 2))
        within, between = stats.corr_within(1).numpy(), stats.corr_between(permuted).numpy()
        self.coef_path_ = np.zeros((len(alphas), *between.T.shape))
        paths, self.gap_, self.n_iter_ = _lasso_paths(
            within[np.ix_(alive1, alive1)], between[np.ix_(alive1, alive2)], alphas, self.max_iter
        )
        if self.gap_ > GAP:
            warnings.warn(
                f"the loss of a unit may be {self.gap_:.1e} above its minimum; give more than max_iter={self.max_iter}",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.coef_path_[np.ix_(np.arange(len(alphas)), np.flatnonzero(alive2), np.flatnonzero(alive1))] = paths
        self.half_mse_path_ = self.evaluate(stats, permuted)[0]
        self.n_contributors_ = (np.abs(self.coef_path_) > self.tol).sum(-1)
        return self

    def evaluate(
        self, stats: ActivationStats, permuted: bool = False, coef: Float[np.ndarray, "a s2 s1"] | None = None
    ) -> tuple[Float[np.ndarray, "a s2"], Float[np.ndarray, "a s2"]]:
        """Half of the mean squared error, in standard units of the fit, and R^2, of other samples, by their moments.

        Parameters
        ----------
        stats : ActivationStats
            Of the same layers for other images.
        permuted : bool
            Whether to judge on the permuted control.
        coef : (A, s2, s1), optional
            Coefficients in place of the fitted ones, such as of a single partner.

        Returns
        -------
        half_mse, r2 : (A, s2)
            NaN for dead targets.
        """
        W = self.coef_path_ if coef is None else coef
        shift1, shift2 = (
            (stats.mean(net).numpy() - mean) / scale
            for net, mean, scale in ((1, self.mean_, self.scale_), (2, self.target_mean_, self.target_scale_))
        )
        S11 = stats.cov_within(1).numpy() / np.outer(self.scale_, self.scale_)
        S12 = stats.cov_between(permuted).numpy() / np.outer(self.scale_, self.target_scale_)
        variance = (stats.std(2).numpy() / self.target_scale_) ** 2
        error = ((W @ S11) * W).sum(-1) - 2 * np.einsum("aji,ij->aj", W, S12) + variance
        error = error.clip(min=0) + (shift2 - W @ shift1) ** 2
        error[:, stats.dead(2).numpy()] = np.nan
        return error / 2, 1 - error / np.where(variance > 0, variance, np.nan)

    def refit(self, stats: ActivationStats, permuted: bool = False) -> Float[np.ndarray, "a s2 s1"]:
        """Coefficients of the same contributors by least squares, without the penalty's shrinkage.

        Parameters
        ----------
        stats : ActivationStats
            As in `fit_stats`.
        permuted : bool
            As there.
        """
        check_is_fitted(self, "coef_path_")
        within, between = stats.corr_within(1).numpy(), stats.corr_between(permuted).numpy()
        coef = np.zeros_like(self.coef_path_)
        for a, j in np.ndindex(coef.shape[:2]):
            used = np.flatnonzero(np.abs(self.coef_path_[a, j]) > self.tol)
            coef[a, j, used] = np.linalg.lstsq(within[np.ix_(used, used)], between[used, j], rcond=1e-10)[0]
        return coef

    def predict(self, X: Any) -> np.ndarray:
        """Activations (T, s2) of the second network, or (T,) where one was fitted, with the penalty `alpha`."""
        check_is_fitted(self, "coef_path_")
        X = validate_data(self, X, reset=False, dtype=np.float64)
        W = self.coef_path_[list(self.alphas).index(self.alpha)]
        found: np.ndarray = ((X - self.mean_) / self.scale_) @ W.T * self.target_scale_ + self.target_mean_
        return found[:, 0] if self._one_target else found


def _lasso_paths(G: np.ndarray, c: np.ndarray, alphas: np.ndarray, max_iter: int) -> tuple[np.ndarray, float, int]:
    """Coefficients (A, s2, s1) from the correlations of s1 predictors and those with s2 targets; gap and sweeps.

    As many invented samples as there are directions have the same correlations as all true ones.
    """
    paths, gap, sweeps = np.zeros((len(alphas), *c.T.shape)), 0.0, 1
    if not paths.size:
        return paths, gap, sweeps
    values, vectors = np.linalg.eigh(G)
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    root, vectors = np.sqrt(values[kept]), vectors[:, kept]
    X = np.asfortranarray(root[:, None] * vectors.T)
    Y = (vectors.T @ c) / root[:, None]
    paths[alphas == 0] = (vectors @ (Y / root[:, None])).T
    positive = np.unique(alphas[alphas > 0])[::-1]
    if len(positive):
        where = [np.flatnonzero(alphas == alpha) for alpha in positive]
        # scikit-learn divides the squared error, and the gap, by the number of samples
        options: dict[str, Any] = {
            "alphas": positive / len(X), "precompute": np.ascontiguousarray(X.T @ X), "max_iter": max_iter, "tol": 1e-8,
            "check_input": False,  # it would check every array again for every penalty
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one warning for all targets, from the gap
            for j in range(c.shape[1]):
                y = np.ascontiguousarray(Y[:, j])
                found = lasso_path(X, y, Xy=X.T @ y, return_n_iter=True, **options)
                gap, sweeps = max(gap, float(found[2].max()) * len(X)), max(sweeps, *found[3])
                for k, rows in enumerate(where):
                    paths[rows, j] = found[1][:, k]
    return paths, gap, sweeps


def fewest_contributors(
    r2: Float[np.ndarray, "a s2"], n_contributors: Int[np.ndarray, "a s2"], share: float = 0.9
) -> Float[np.ndarray, " s2"]:
    """Fewest predictors with which each unit reaches a share of its best R^2; NaN where that is not positive."""
    best = np.where(np.isnan(r2), -np.inf, r2).max(0)
    fewest = np.where(r2 >= share * best, n_contributors.astype(float), np.inf).min(0)
    return np.where(best > 0, fewest, np.nan)


class Stitch1x1(nn.Module):
    """The authors' sparse prediction: a 1x1 convolution between standardised layers, trained by gradients.

    For layers so wide that the correlations of [`SparsePrediction`][classact.probe.SparsePrediction] do not fit memory,
    or for a map that is to be trained on inside of something larger.

    Parameters
    ----------
    c1, c2 : int
        Channels of the predicting and the predicted layer.
    l1 : float
        Penalty; as `alpha` of the convex problem.

    Examples
    --------
    >>> stitch = Stitch1x1(96, 64, l1=1e-3)
    >>> stitch(torch.randn(2, 96, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    mean1: Tensor
    scale1: Tensor
    mean2: Tensor
    scale2: Tensor

    def __init__(self, c1: int, c2: int, l1: float = 0.0) -> None:
        super().__init__()
        for name, value, least in (("c1", c1, 1), ("c2", c2, 1), ("l1", l1, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.config = {"c1": c1, "c2": c2, "l1": l1}
        self.l1 = l1
        self.weight = nn.Parameter(torch.randn(c2, c1) * 0.01)
        self.bias = nn.Parameter(torch.zeros(c2))
        for net, width in ((1, c1), (2, c2)):
            self.register_buffer(f"mean{net}", torch.zeros(width))
            self.register_buffer(f"scale{net}", torch.ones(width))

    def standardise(self, stats: ActivationStats) -> "Stitch1x1":
        """Take means and deviations of both layers from their statistics."""
        for net in (1, 2):
            getattr(self, f"mean{net}").copy_(stats.mean(net))
            getattr(self, f"scale{net}").copy_(torch.where(stats.dead(net), 1.0, stats.std(net)))
        return self

    def _standard(self, x: Tensor) -> Float[Tensor, "n c2 *p"]:
        """Predicted standardised activations."""
        if x.ndim < 2 or x.shape[1] != self.config["c1"]:
            raise ValueError(f"x: expected shape (N, {self.config['c1']}, ...), got {tuple(x.shape)}")
        z = (x.movedim(1, -1) - self.mean1) / self.scale1
        return F.linear(z, self.weight, self.bias).movedim(-1, 1)

    def forward(self, x: Float[Tensor, "n c1 *p"]) -> Float[Tensor, "n c2 *p"]:
        """Activations of the second layer from those of the first."""
        return (self._standard(x).movedim(1, -1) * self.scale2 + self.mean2).movedim(-1, 1)

    def loss(self, x: Float[Tensor, "n c1 *p"], y: Float[Tensor, "n c2 *p"]) -> Float[Tensor, ""]:
        """Half of the mean squared error in standard units, and the penalty: the mean over units of the convex one."""
        target = ((y.movedim(1, -1) - self.mean2) / self.scale2).movedim(-1, 1)
        return (self._standard(x) - target).square().mean() / 2 + self.l1 * self.weight.abs().sum() / len(self.weight)


def fit_stitch(
    stitch: Stitch1x1,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float = 1e-3,
    momentum: float = 0.98,
    halve_every: int = 1500,
) -> list[float]:
    """Train by gradient descent as the authors did: one step per batch, the rate halved every so many steps.

    Parameters
    ----------
    stitch : Stitch1x1
        Trained in place.
    batches : iterable of ((N, c1, ...), (N, c2, ...))
        Activations; the authors took 4500 batches of 32 images.
    lr, momentum : float
        Of SGD. The authors' loss is a sum over the units, so that here, where it is their mean, the rate is multiplied
        by their number.
    halve_every : int

    Returns
    -------
    list of float
        The loss before each step.
    """
    optimizer = torch.optim.SGD(stitch.parameters(), lr * len(stitch.weight), momentum)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, halve_every, 0.5)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = stitch.loss(x, y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


class Group(NamedTuple):
    """A group of units of both networks.

    Attributes
    ----------
    units1, units2 : (M1,), (M2,) int
        Members.
    correlation : float
        Mean absolute correlation of two different members; NaN for a single one.
    cosines : (min(M1, M2),)
        Cosines of the principal angles between the spans of the two halves: 1 for a shared subspace.
    """

    units1: Int[np.ndarray, " m1"]
    units2: Int[np.ndarray, " m2"]
    correlation: float
    cosines: Float[np.ndarray, " m"]


class CrossNetClusters(ClusterMixin, BaseEstimator):
    """Spectral clustering of the units of two networks together (section 5; Ng, Jordan and Weiss, 2001).

    The graph of absolute correlations within and between the networks has the normalised Laplacian
    ``I - D^(-1/2) A D^(-1/2)``; the eigenvectors of its `n_clusters` smallest eigenvalues, rows scaled to length 1, are
    clustered.

    Parameters
    ----------
    n_clusters : int
        k.
    linkage : {None, "average"}
        By k-means; or, as the paper's hierarchical clustering, agglomeratively by mean cosine distances, whose tree can
        be cut at any size.
    random_state : int, RandomState or None
        Of k-means.

    Attributes
    ----------
    labels_ : (s1 + s2,) int
        Cluster of each unit, those of the first network first; -1 for dead units, whose rows are 0.
    eigenvalues_ : (s1 + s2 - dead,)
        All of the Laplacian, in [0, 2], smallest first; a gap after the k-th speaks for k clusters.
    tree_ : (M - 1, 4)
        SciPy's linkage matrix of the living units, if `linkage` is given.

    Examples
    --------
    >>> eye, halves = np.eye(4), np.kron(np.eye(2), np.ones((2, 2)))
    >>> clusters = CrossNetClusters(2, random_state=0).fit(eye, halves, eye)
    >>> [part.tolist() for part in clusters.members(clusters.labels_[0])]
    [[0, 1], [0, 1]]
    """

    def __init__(self, n_clusters: int, linkage: Literal["average"] | None = None, random_state: Any = 0) -> None:
        self.n_clusters = n_clusters
        self.linkage = linkage
        self.random_state = random_state

    def fit(self, C11: First, C12: Matrix, C22: Second) -> "CrossNetClusters":
        """Cluster by correlations (s1, s1), (s1, s2) and (s2, s2).

        Raises
        ------
        ValueError
            If shapes do not fit, a value is NaN, there are more clusters than living units, or the linkage is unknown.
        """
        first, between, second = (_matrix(name, C) for name, C in (("C11", C11), ("C12", C12), ("C22", C22)))
        s1, s2 = between.shape
        if first.shape != (s1, s1) or second.shape != (s2, s2):
            raise ValueError(
                "C11, C12, C22: expected (s1, s1), (s1, s2), (s2, s2), got"
                f" {first.shape}, {between.shape}, {second.shape}"
            )
        if self.linkage not in (None, "average"):
            raise ValueError(f"linkage: expected None or 'average', got {self.linkage!r}")
        self.joint_, self.n_first_ = np.block([[first, between], [between.T, second]]), s1
        alive = np.flatnonzero(self.joint_.any(1))
        if not 1 <= self.n_clusters <= len(alive):
            raise ValueError(
                f"n_clusters: expected 1 to {len(alive)}, the number of living units, got {self.n_clusters}"
            )
        A = np.abs(self.joint_[np.ix_(alive, alive)])
        np.fill_diagonal(A, 1)
        inverse_root = 1 / np.sqrt(A.sum(1))
        values, vectors = np.linalg.eigh(np.eye(len(A)) - inverse_root[:, None] * A * inverse_root)
        self.eigenvalues_ = values.clip(0, 2)
        rows = vectors[:, : self.n_clusters]
        # a unit without neighbours may have no part in these vectors
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
        self._alive = alive
        if self.linkage is None:
            found = KMeans(self.n_clusters, n_init=10, random_state=self.random_state).fit_predict(rows)
            self.labels_ = self._of_all(found)
        else:
            self.tree_ = linkage(np.nan_to_num(pdist(rows, "cosine"), nan=1.0).clip(min=0), self.linkage)
            self.labels_ = self.cut(self.n_clusters)
        return self

    def _of_all(self, found: np.ndarray) -> np.ndarray:
        labels = np.full(len(self.joint_), -1)
        labels[self._alive] = found
        return labels

    def cut(self, n_clusters: int) -> Int[np.ndarray, " s"]:
        """Labels with at most so many clusters, from the tree."""
        check_is_fitted(self, "tree_")
        return self._of_all(fcluster(self.tree_, n_clusters, "maxclust") - 1)

    def members(self, k: int | np.integer) -> tuple[Int[np.ndarray, " m1"], Int[np.ndarray, " m2"]]:
        """Units of the first and of the second network in cluster `k`."""
        check_is_fitted(self, "labels_")
        inside = np.flatnonzero(self.labels_ == k)
        return inside[inside < self.n_first_], inside[inside >= self.n_first_] - self.n_first_

    def groups(self) -> list[Group]:
        """Describe every cluster, those with most units first."""
        found = []
        for k in np.unique(self.labels_[self.labels_ >= 0]):
            units1, units2 = self.members(k)
            both = np.concatenate([units1, units2 + self.n_first_])
            inside = np.abs(self.joint_[np.ix_(both, both)])
            m = len(both)
            mean = (inside.sum() - np.trace(inside)) / (m * (m - 1)) if m > 1 else float("nan")
            cosines = np.empty(0)
            if len(units1) and len(units2):
                other = units2 + self.n_first_
                blocks = [self.joint_[np.ix_(i, j)] for i, j in ((units1, units1), (units1, other), (other, other))]
                cosines = canonical_correlations(*blocks)
            found.append(Group(units1, units2, float(mean), cosines))
        return sorted(found, key=lambda group: -len(group.units1) - len(group.units2))


def reset_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model without its training: every part is initialised anew by its own ``reset_parameters``.

    Raises
    ------
    ValueError
        If a parameter belongs to a part without ``reset_parameters``, and so would stay trained.
    """
    fresh = copy.deepcopy(model)
    left = [
        f"{name}.{own}".lstrip(".")
        for name, part in fresh.named_modules()
        if not hasattr(part, "reset_parameters")
        for own, _ in part.named_parameters(recurse=False)
    ]
    if left:
        raise ValueError(
            f"untrained: {', '.join(left[:3])} cannot be initialised anew; give untrained=(first, second), two networks"
            " as they were before training, or None"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in fresh.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
    return fresh


def collect_stats(
    model1: nn.Module,
    model2: nn.Module,
    layer1: str,
    layer2: str,
    loader: Iterable[Any],
    loader2: Iterable[Any] | None = None,
    *,
    pool: Pool = "none",
    channel_axis: int | None = None,
    max_positions: int | None = None,
    permuted: bool = False,
    seed: int = 0,
) -> ActivationStats:
    """Statistics of a layer of each of two models, in one pass over the same images.

    Parameters
    ----------
    model1, model2 : Module
        Left as they were, also on error. They run where their parameters are.
    layer1, layer2 : str
        Names in ``model.named_modules()``.
    loader : iterable
        Yields x or (x, y, ...).
    loader2 : iterable, optional
        The same images in the same order, as the second model wants them.
    pool : {"none", "grid", "mean"}
        What to do where the layers have different positions; see
        [`aligned_positions`][classact.probe.activations.aligned_positions].
    channel_axis : int, optional
        Axis of the units; by default told from the layers.
    max_positions : int, optional
        Positions to draw from each batch of images.
    permuted : bool
        Keep the permuted control too.
    seed : int
        Of what is drawn.

    Raises
    ------
    ValueError
        If a layer does not exist, the layers do not fit each other, or the loaders differ.
    """
    stats = ActivationStats(permuted=permuted, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    models, layers = (model1, model2), ((layer1,), (layer2,))
    with observed(models, layers) as run:
        for inputs in in_step((loader, loader if loader2 is None else loader2)):
            outputs = run(inputs)
            a, b = (
                _channels_first(model, layer, output[layer], channel_axis)
                for model, (layer,), output in zip(models, layers, outputs, strict=True)
            )
            stats.update(*aligned_positions(a, b, pool, max_positions, generator))
    return stats


def _channels_first(model: nn.Module, layer: str, output: Tensor, axis: int | None) -> Tensor:
    return output.movedim(channel_axis_of(model, layer, output) if axis is None else axis, 1)


@dataclass(frozen=True, eq=False)
class Alignment:
    """One layer of two networks, compared.

    Attributes
    ----------
    layer, condition : str
        Name of the layer; "trained", "untrained" or "permuted".
    n, n_held_out : int
        Samples of all images, and of the held-out ones.
    C11, C12, C22 : (s1, s1), (s1, s2), (s2, s2)
        Correlations.
    dead1, dead2 : (D1,), (D2,) int
        Constant units, which are left out.
    semi, bipartite : Matching
        Best partners, and the one-to-one matching.
    overlap : float
        Share of units for which both name the same.
    similarity : LayerSimilarity
        Linear CKA, SVCCA and Procrustes.
    alphas : (A,)
        Penalties of the sparse prediction of the second network.
    r2 : (A, s2)
        Its R^2 on held-out images; NaN for dead units.
    contributors : (A, s2) int
        Its numbers of predictors.
    refit_r2 : (A, s2)
        R^2 on held-out images of the same predictors by least squares.
    single_r2 : (s2,)
        R^2 on held-out images of the best single unit.
    clusters : CrossNetClusters
    """

    layer: str
    condition: str
    n: int
    n_held_out: int
    C11: np.ndarray
    C12: np.ndarray
    C22: np.ndarray
    dead1: np.ndarray
    dead2: np.ndarray
    semi: Matching
    bipartite: Matching
    overlap: float
    similarity: LayerSimilarity
    alphas: np.ndarray
    r2: np.ndarray
    contributors: np.ndarray
    refit_r2: np.ndarray
    single_r2: np.ndarray
    clusters: CrossNetClusters

    @property
    def best_r2(self) -> np.ndarray:
        """Held-out R^2 (s2,) with the penalty that is best for the mean over units."""
        living = self.r2[:, np.isfinite(self.r2).all(0)]
        found: np.ndarray = self.r2[int(living.sum(1).argmax())]
        return found

    @property
    def needed(self) -> np.ndarray:
        """Fewest units (s2,) with which least squares reach nine tenths of the best held-out R^2."""
        return fewest_contributors(self.refit_r2, self.contributors)

    def row(self) -> dict[str, Any]:
        """What the table of the report says."""
        groups = self.clusters.groups()
        mixed = [g for g in groups if len(g.units1) and len(g.units2)]
        return {
            "layer": self.layer,
            "condition": self.condition,
            "units1": len(self.C11) - len(self.dead1),
            "units2": len(self.C22) - len(self.dead2),
            "dead1": len(self.dead1),
            "dead2": len(self.dead2),
            "samples": self.n,
            "bipartite": _mean(self.bipartite.value),
            "semi": _mean(self.semi.value),
            "overlap": self.overlap,
            "cka": self.similarity.cka,
            "svcca": self.similarity.svcca,
            "procrustes": self.similarity.procrustes,
            "sparse_r2": _mean(self.best_r2),
            "single_r2": _mean(self.single_r2),
            "contributors": float(np.nanmedian(self.needed)) if np.isfinite(self.needed).any() else float("nan"),
            "mixed_groups": len(mixed),
            "unequal_groups": sum(len(g.units1) != len(g.units2) for g in mixed),
        }


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def align(
    fit: ActivationStats,
    held_out: ActivationStats,
    layer: str,
    condition: str = "trained",
    *,
    alphas: Sequence[float] = ALPHAS,
    n_clusters: int | None = None,
    linkage: Literal["average"] | None = None,
    signed: bool = True,
    seed: int = 0,
) -> Alignment:
    """Compare two layers by their statistics for some images and for others that are held out.

    Parameters
    ----------
    fit, held_out : ActivationStats
        Correlations are those of all images; sparse predictions are fitted to the former and judged on the latter.
    layer, condition : str
        Names; for "permuted" the permuted control of the statistics is taken.
    alphas, n_clusters, linkage, signed, seed
        As in [`convergence_report`][classact.probe.convergence_report].

    Raises
    ------
    ValueError
        If no unit of either layer varies.
    """
    permuted = condition == "permuted"
    whole = fit.merge(held_out)
    C11, C12, C22 = (C.numpy() for C in (whole.corr_within(1), whole.corr_between(permuted), whole.corr_within(2)))
    S11, S12, S22 = whole.cov_within(1), whole.cov_between(permuted), whole.cov_within(2)
    sparse = SparsePrediction(alphas=tuple(alphas), alpha=alphas[0]).fit_stats(fit, permuted)
    between = fit.corr_between(permuted).numpy()
    single = np.zeros((1, *between.T.shape))
    partner = np.abs(between).argmax(0)
    single[0, np.arange(len(partner)), partner] = between[partner, np.arange(len(partner))]
    dead1, dead2 = (whole.dead(net).nonzero().flatten().numpy() for net in (1, 2))
    living = len(C11) + len(C22) - len(dead1) - len(dead2)
    if not living:
        raise ValueError(f"layer: all units of {layer!r}, {condition}, are constant in both networks")
    k = max(living // 4, 1) if n_clusters is None else n_clusters
    return Alignment(
        layer=layer,
        condition=condition,
        n=whole.n,
        n_held_out=held_out.n,
        C11=C11,
        C12=C12,
        C22=C22,
        dead1=dead1,
        dead2=dead2,
        semi=match_units(C12, "semi", signed),
        bipartite=match_units(C12, "bipartite", signed),
        overlap=matching_overlap(C12, signed),
        similarity=layer_similarity(S11, S12, S22),
        alphas=np.asarray(alphas, float),
        r2=sparse.evaluate(held_out, permuted)[1],
        contributors=sparse.n_contributors_,
        refit_r2=sparse.evaluate(held_out, permuted, sparse.refit(fit, permuted))[1],
        single_r2=sparse.evaluate(held_out, permuted, single)[1][0],
        clusters=CrossNetClusters(k, linkage, seed).fit(C11, C12, C22),
    )


@dataclass(frozen=True, eq=False)
class ConvergenceReport:
    """Layers of two networks compared unit by unit, with controls.

    ``report[layer]`` and ``report[layer, "untrained"]`` are an [`Alignment`][classact.probe.convergent.Alignment].

    Attributes
    ----------
    layers, conditions : tuple of str
        What was compared.
    alignments : tuple of Alignment
        By layer, and then by condition.
    """

    layers: tuple[str, ...]
    conditions: tuple[str, ...]
    alignments: tuple[Alignment, ...]

    def __getitem__(self, key: str | tuple[str, str]) -> Alignment:
        """One layer, trained or in another condition."""
        layer, condition = (key, "trained") if isinstance(key, str) else key
        for one in self.alignments:
            if (one.layer, one.condition) == (layer, condition):
                return one
        raise KeyError(
            f"no layer {layer!r}, {condition}; there are {', '.join(self.layers)}; {', '.join(self.conditions)}"
        )

    def table(self) -> "pd.DataFrame":
        """One row per layer and condition.

        Means over living units of correlations and R^2, the median number of units that predict one, and the number of
        clusters with units of both networks, and of those with unequal numbers of them.
        """
        import pandas as pd

        return pd.DataFrame([one.row() for one in self.alignments])

    def _panels(self, width: float, height: float) -> tuple["Figure", Any]:
        from matplotlib.figure import Figure

        figure = Figure((max(width * len(self.layers), 4.5), height), layout="constrained")
        return figure, figure.subplots(1, len(self.layers), squeeze=False, sharey=True)[0]

    def plot(self) -> "Figure":
        """Correlation of every unit with its best partner (line) and its one-to-one match (points), best first."""
        figure, panels = self._panels(3.2, 3.4)
        for axes, layer in zip(panels, self.layers, strict=True):
            for condition in self.conditions:
                _draw_matches(axes, self[layer, condition])
            axes.set(title=layer, xlabel="units, best match first", ylim=(-0.1, 1.02))
            axes.legend(frameon=False, fontsize=7)
        panels[0].set_ylabel("correlation")
        return figure

    def plot_joint(self, layer: str) -> "Figure":
        """Correlations within and between the networks, units sorted by cluster, in every condition."""
        from matplotlib.figure import Figure

        figure = Figure((3.4 * len(self.conditions) + 0.6, 3.8), layout="constrained")
        panels = figure.subplots(1, len(self.conditions), squeeze=False)[0]
        for axes, condition in zip(panels, self.conditions, strict=True):
            one = self[layer, condition]
            s1 = len(one.C11)
            labels = one.clusters.labels_
            order = np.concatenate([
                np.argsort(labels[:s1], kind="stable"), s1 + np.argsort(labels[s1:], kind="stable")
            ])  # fmt: skip
            image = axes.imshow(one.clusters.joint_[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1)
            for draw in (axes.axhline, axes.axvline):
                draw(s1 - 0.5, color="black", linewidth=0.7)
            axes.set(title=f"{condition}, CKA {one.similarity.cka:.2f}", xticks=[], yticks=[])
        panels[0].set_ylabel(f"{layer}: first, second network")
        figure.colorbar(image, ax=list(panels), label="correlation")
        return figure

    def plot_prediction(self) -> "Figure":
        """Held-out R^2 of sparse prediction against the number of contributors, means over units, one point a penalty.

        Dashed: the best single unit.
        """
        figure, panels = self._panels(3.2, 3.4)
        for axes, layer in zip(panels, self.layers, strict=True):
            for condition in self.conditions:
                _draw_prediction(axes, self[layer, condition])
            axes.set(title=layer, xlabel="contributors", ylim=(-0.1, 1.02))
            axes.legend(frameon=False, fontsize=7)
        panels[0].set_ylabel("R² on held-out images")
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json`` (the table), ``arrays.npz`` and the figures; each file appears only when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in one.row().items()}
            for one in self.alignments
        ]
        arrays: dict[str, Any] = {}
        for number, one in enumerate(self.alignments):
            fields = {
                name: getattr(one, name)
                for name in ("C11", "C12", "C22", "r2", "contributors", "refit_r2", "single_r2")
            }
            fields |= {"match1": one.bipartite.index1, "match2": one.bipartite.index2, "partner": one.semi.index2}
            fields |= {"clusters": one.clusters.labels_, "alphas": one.alphas, "dead1": one.dead1, "dead2": one.dead2}
            arrays |= {f"{number}/{name}": value for name, value in fields.items()}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = Path(temporary)
            (part / "report.json").write_text(json.dumps({"alignments": rows}, indent=1) + "\n", encoding="utf-8")
            np.savez_compressed(part / "arrays.npz", **arrays)
            self.plot().savefig(part / "matches.png", dpi=150)
            self.plot_prediction().savefig(part / "prediction.png", dpi=150)
            for number, layer in enumerate(self.layers):
                self.plot_joint(layer).savefig(part / f"joint_{number}.png", dpi=150)
            for file in part.iterdir():
                file.replace(folder / file.name)
        return folder


def _draw_matches(axes: Any, one: Alignment) -> None:
    """Draw the sorted correlations of the matchings of one condition; the legend has its linear CKA."""
    order = np.argsort(-one.semi.value, kind="stable")
    at = (np.arange(len(order)) + 0.5) / max(len(order), 1)
    colour, label = COLOURS.get(one.condition), f"{one.condition}, CKA {one.similarity.cka:.2f}"
    axes.plot(at, one.semi.value[order], color=colour, linewidth=1.4, label=label)
    place = {int(unit): x for unit, x in zip(one.semi.index1[order], at, strict=True)}
    axes.plot([place[int(i)] for i in one.bipartite.index1], one.bipartite.value, ".", color=colour, markersize=3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_prediction(axes: Any, one: Alignment) -> None:
    """Draw R^2 against the number of contributors for one condition; dashed, that of the best single unit."""
    alive = ~np.isnan(one.single_r2)
    if not alive.any():
        return
    number, r2 = one.contributors[:, alive].mean(1), one.r2[:, alive].mean(1)
    order, colour = np.argsort(number), COLOURS.get(one.condition)
    label = f"{one.condition}, CKA {one.similarity.cka:.2f}"
    axes.plot(number[order], r2[order].clip(-0.1), "o-", color=colour, markersize=3, linewidth=1.2, label=label)
    axes.axhline(max(one.single_r2[alive].mean(), -0.1), color=colour, linestyle="--", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)


def convergence_report(
    model1: nn.Module,
    model2: nn.Module,
    layers: Sequence[str | tuple[str, str]],
    loader: Iterable[Any],
    loader2: Iterable[Any] | None = None,
    *,
    untrained: tuple[nn.Module, nn.Module] | Literal["reset"] | None = "reset",
    held_out: float = 0.25,
    alphas: Sequence[float] = ALPHAS,
    n_clusters: int | None = None,
    linkage: Literal["average"] | None = None,
    signed: bool = True,
    pool: Pool = "none",
    channel_axis: int | None = None,
    max_positions: int | None = None,
    seed: int = 0,
) -> ConvergenceReport:
    """Compare layers of two networks unit by unit, in one pass over the images.

    Parameters
    ----------
    model1, model2 : Module
        Any two networks; left as they were.
    layers : sequence of str or (str, str)
        Layers to compare, by their names in ``model.named_modules()``: one name for both, or one for each.
    loader : iterable
        Yields x or (x, y, ...), in any order, in batches of several images.
    loader2 : iterable, optional
        For the second model, if it wants its images otherwise: the same ones in the same order, which is checked.
    untrained : pair of Module, "reset" or None
        The networks before training, for the control that tells what training has added; by default copies that are
        initialised anew, each on its own.
    held_out : float
        Share of the images, drawn at random, on which sparse predictions are judged.
    alphas : sequence of float
        Penalties of [`SparsePrediction`][classact.probe.SparsePrediction].
    n_clusters, linkage
        Of [`CrossNetClusters`][classact.probe.CrossNetClusters]; by default a quarter of the living units.
    signed : bool
        See [`match_units`][classact.probe.match_units].
    pool, channel_axis, max_positions
        See [`collect_stats`][classact.probe.collect_stats].
    seed : int
        Of everything drawn.

    Raises
    ------
    ValueError
        If a layer does not exist, the layers do not fit each other, the loaders differ or yield too few images, or a
        model cannot be initialised anew.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}")
    pairs = [(one, one) if isinstance(one, str) else one for one in layers]
    names = [first if first == second else f"{first} | {second}" for first, second in pairs]
    if not pairs or len(set(names)) < len(names):
        raise ValueError(f"layers: expected at least one, each once, got {list(layers)}")
    models = {"trained": (model1, model2)}
    if untrained == "reset":
        models["untrained"] = (reset_copy(model1, seed), reset_copy(model2, seed + 1))
    elif untrained is not None:
        models["untrained"] = untrained
    # of every condition and layer the statistics of some images, and of those held out
    stats = {
        (condition, name): tuple(ActivationStats(permuted=condition == "trained", seed=seed) for _ in range(2))
        for condition in models
        for name in names
    }
    generator = torch.Generator().manual_seed(seed)
    flat = [model for pair in models.values() for model in pair]
    loaders = (loader, loader if loader2 is None else loader2) * len(models)
    with observed(flat, [[pair[net] for pair in pairs] for _ in models for net in (0, 1)]) as run:
        for inputs in in_step(loaders):
            outputs = run(inputs)
            away = torch.rand(len(inputs[0]), generator=generator) < held_out
            drawn = int(torch.randint(2**62, (), generator=generator))
            for number, (condition, (first, second)) in enumerate(models.items()):
                for name, (layer1, layer2) in zip(names, pairs, strict=True):
                    a, b = aligned_positions(
                        _channels_first(first, layer1, outputs[2 * number][layer1], channel_axis),
                        _channels_first(second, layer2, outputs[2 * number + 1][layer2], channel_axis),
                        pool,
                        max_positions,
                        torch.Generator().manual_seed(drawn),
                    )
                    for part, chosen in zip(stats[condition, name], (~away, away), strict=True):
                        part.update(a[chosen.to(a.device)], b[chosen.to(b.device)])
    options: dict[str, Any] = {
        "alphas": alphas, "n_clusters": n_clusters, "linkage": linkage, "signed": signed, "seed": seed
    }  # fmt: skip
    conditions = tuple(c for c in CONDITIONS if c in models or c == "permuted")
    alignments = []
    for name in names:
        for condition in conditions:
            fit, away_from_fit = stats["trained" if condition == "permuted" else condition, name]
            alignments.append(align(fit, away_from_fit, name, condition, **options))
    return ConvergenceReport(tuple(names), conditions, tuple(alignments))
