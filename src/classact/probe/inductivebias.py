"""Inductive bias: how much a learner must bring along to generalise on a task, in nats.

Boopathy, Yue, Hwang, Iyer, Fiete: Towards Exact Computation of Inductive Bias, IJCAI 2024,
https://arxiv.org/abs/2406.15941, code: https://github.com/FieteLab/Exact-Inductive-Bias.

Draw hypotheses from a space at random among those that fit the training data; the share F(ε) of them whose test error
is at most ε is tiny, and I = -ln F(ε) is the inductive bias that the task requires relative to that space. As it cannot
be counted, a scaled non-central chi-square is fitted to the errors of some hypotheses and its tail is read off
([`ErrorTail`][classact.probe.ErrorTail]). Any space will do that can be sampled; functions with a Gaussian prior
([`GPHypotheses`][classact.probe.GPHypotheses]) and trained networks
([`NNHypotheses`][classact.probe.NNHypotheses]) are here. For the former the error is a weighted sum of chi-squares
whose distribution is known ([`ErrorSpectrum`][classact.probe.ErrorSpectrum]), so that the fitted tail can be checked.
The estimate is no bound, and it is a statement about the fitted family where it extrapolates far: the report says how
far, and gives limits from the bootstrap, which trust the family, and from the Dvoretzky-Kiefer-Wolfowitz inequality,
which trust nothing. The paper's own bounds are in its appendix and are not here.

Where this departs from the authors' code. Errors are divided by their mean before the fit, which otherwise fails
silently where they are far from 1. Where the distribution function underflows they take Sankaran's approximation z²/2,
which is wrong by a fifth or more that far out; here the series is summed in logarithms
([`sankaran_neg_log_cdf`][classact.probe.inductivebias.sankaran_neg_log_cdf] is there to compare). Kernel systems are
solved by Cholesky's method, not by Adam, and errors are drawn in the eigenbasis of the posterior covariance, not
through its square root. Networks that do not fit the training data are counted and left out. Their kernel has
width 1 and amplitude 1, which matter more than the choice of the kernel; both can be set.

>>> import torch
>>> x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
>>> y = torch.sin(3 * x.sum(1, keepdim=True))
>>> space = GPHypotheses(x[:20], y[:20], x[20:], y[20:], sigma=0.5)
>>> easy, hard = (inductive_bias(space, error, n_samples=1000) for error in (1e-2, 1e-4))
>>> easy.value < hard.value, hard.low < hard.value < hard.high
(True, True)
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf, isfinite, log, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import optimize, special, stats
from scipy.integrate import quad
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Family = Literal["ncx2", "gamma", "normal", "empirical"]
Kernel = Callable[[Tensor, Tensor], Tensor]
MINIMUM = 50  # fewer errors say little about three parameters
MOST = 0.2495  # of (nc / (df + 2 nc))², whose limit for a law without degrees of freedom is 1/4
FAR = 3.0  # times ln S: farther out the value is the family's


# the tail


def log_gammainc(a: Float[np.ndarray, " j"], x: float) -> Float[np.ndarray, " j"]:
    """Logarithm of the regularised lower incomplete gamma function, also where the function underflows."""
    direct = special.gammainc(a, x)
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.log(direct)
    small = direct < 1e-290
    if small.any():
        b = a[small]  # here x is far below a, and the series falls like (x / a)^k
        term, total = np.ones_like(b), np.ones_like(b)
        k = 0
        while term.max() > 1e-17:
            k += 1
            term = term * x / (b + k)
            total += term
        found[small] = b * np.log(x) - x - special.gammaln(b + 1) + np.log(total)
    return found


def ncx2_neg_log_cdf(error: float, df: float, nc: float, scale: float) -> float:
    """-ln of the distribution function of a scaled non-central chi-square, to full precision however far out.

    Where the function itself underflows, the Poisson mixture of gamma distributions is summed in logarithms.

    Parameters
    ----------
    error : float
    df, nc, scale : float
        Degrees of freedom (positive), non-centrality (at least 0) and factor (positive).

    Examples
    --------
    >>> round(ncx2_neg_log_cdf(0.05, 50, 20, 0.01), 6), round(ncx2_neg_log_cdf(1e-4, 200, 50, 0.004), 3)
    (46.553988, 826.951)
    """
    x = error / scale
    if x <= 0:
        return inf
    probability = float(stats.ncx2.cdf(x, df, nc) if nc > 0 else stats.chi2.cdf(x, df))
    if probability > 1e-200:
        return -log(probability) if probability < 1 else 0.0
    a, half = df / 2, nc / 2
    # the largest term of the mixture, and so many around it that the rest is below e^-70
    peak = (-a + sqrt(a * a + nc * x)) / 2
    width = 12 * sqrt(peak + 1) + 50
    j = np.arange(max(0, int(peak - width)), int(peak + width) + 1, dtype=float)
    terms = special.xlogy(j, half) - special.gammaln(j + 1) - half + log_gammainc(a + j, x / 2)
    return -float(special.logsumexp(terms))


def sankaran_neg_log_cdf(error: float, df: float, nc: float, scale: float) -> float:
    """Half of the squared z score of Sankaran's normal approximation (1963), the authors' fallback.

    Only to compare: use [`ncx2_neg_log_cdf`][classact.probe.inductivebias.ncx2_neg_log_cdf].

    Examples
    --------
    >>> round(sankaran_neg_log_cdf(0.02, 200, 50, 0.004), 2), round(ncx2_neg_log_cdf(0.02, 200, 50, 0.004), 2)
    (234.36, 298.97)
    """
    mean, spread = df + nc, df + 2 * nc
    h = 1 - 2 * mean * (df + 3 * nc) / (3 * spread**2)
    p = spread / mean**2
    m = (h - 1) * (1 - 3 * h)
    expected = 1 + h * p * (h - 1 - (2 - h) * m * p / 2)
    z = ((error / scale / mean) ** h - expected) / (h * sqrt(2 * p) * (1 + m * p / 2))
    return z * z / 2


def _log_bessel(v: float, z: np.ndarray) -> np.ndarray:
    """Logarithm of I_v(z): Debye's expansion for large orders, from which recurrence leads down to small ones."""
    if v < 20:
        steps = ceil(20 - v)
        found = _log_bessel(v + steps, z)
        ratio = np.exp(_log_bessel(v + steps + 1, z) - found)
        product = np.ones_like(z)
        for order in range(steps, 0, -1):
            ratio = 1 / (2 * (v + order) / z + ratio)  # I_(v + order) / I_(v + order - 1)
            product *= ratio
        return np.asarray(found - np.log(product))
    ratio = z / v
    root = np.sqrt(1 + ratio**2)
    p = 1 / root
    q = p * p
    series = (
        1
        + p * (3 - 5 * q) / (24 * v)
        + q * (81 - 462 * q + 385 * q**2) / (1152 * v**2)
        + p * q * (30375 - 369603 * q + 765765 * q**2 - 425425 * q**3) / (414720 * v**3)
        + q * q * (4465125 - 94121676 * q + 349922430 * q**2 - 446185740 * q**3 + 185910725 * q**4) / (39813120 * v**4)
    )
    main = v * (root + np.log(ratio / (1 + root))) - np.log(2 * np.pi * v * root) / 2
    return np.asarray(main + np.log(series))


def _log_density(x: np.ndarray, df: float, nc: float, scale: float) -> np.ndarray:
    u, v = x / scale, df / 2 - 1
    return np.asarray(v / 2 * np.log(u / nc) - (u + nc) / 2 + _log_bessel(v, np.sqrt(nc * u)) - log(2 * scale))


class _Shape(NamedTuple):
    df: float
    nc: float
    scale: float


def _shape(theta: np.ndarray) -> _Shape:
    """From the logarithms of the mean and of the squared coefficient of variation, and (nc / (df + 2 nc))².

    In these terms, which are those of the first three moments, the likelihood is nearly a parabola: skewness over
    coefficient of variation is 2 - 2 (nc / (df + 2 nc))².
    """
    inner = sqrt(theta[2])
    share = inner / (1 - inner)  # of nc in df + nc
    total = 2 * (1 + share) / float(np.exp(theta[1]))
    return _Shape(total * (1 - share), max(total * share, 1e-10), float(np.exp(theta[0])) / total)


def _most_likely(x: np.ndarray, central: bool) -> np.ndarray:
    mean, variance = float(x.mean()), float(x.var())
    asymmetry = 1 - float(((x - mean) ** 3).mean()) * mean / variance**2 / 2
    bounds = [(None, None), (-15.0, 6.0), (0.0, 0.0 if central else MOST)]
    best: Any = None
    for start in (0.0,) if central else (min(max(asymmetry, 0.0), 0.2), 0.01 if asymmetry > 0.1 else 0.15):
        found = optimize.minimize(
            lambda theta: -float(_log_density(x, *_shape(theta)).mean()),
            np.array([log(mean), np.clip(log(variance / mean**2), -14, 5), start]),
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-13, "gtol": 1e-7},
        )
        if best is None or found.fun < best.fun:
            best = found
    return np.asarray(best.x)


def _one_step(x: np.ndarray, weights: np.ndarray, theta: np.ndarray, central: bool) -> np.ndarray:
    """Most likely settings (B, 3) for samples weighted by (B, S), by one Newton step from those of the whole sample."""
    size = 1e-3
    at = np.array([theta[0], theta[1], 0.0 if central else np.clip(theta[2], size, MOST - size)])
    free = 2 if central else 3
    moves = np.eye(3)[:free] * size
    here = _log_density(x, *_shape(at))
    up, down = (np.array([_log_density(x, *_shape(at + sign * move)) for move in moves]) for sign in (1, -1))
    hessian = np.empty((free, free, len(x)))
    for a in range(free):
        hessian[a, a] = up[a] - 2 * here + down[a]
        for b in range(a):
            hessian[a, b] = hessian[b, a] = _log_density(x, *_shape(at + moves[a] + moves[b])) - up[a] - up[b] + here
    w = weights / weights.sum(1, keepdims=True)
    slopes, curves = w @ (up - down).T / (2 * size), np.tensordot(w, hessian, (1, 2)) / size**2
    found = np.tile(at, (len(w), 1))
    for row, g, H in zip(found, slopes, curves, strict=True):
        values, vectors = np.linalg.eigh(-H)
        H = (vectors * values.clip(1e-4)) @ vectors.T  # the likelihood is nearly flat along one direction
        step = np.linalg.solve(H, g)
        if not central and not 0 <= at[2] + step[2] <= MOST:  # the best on the bound
            step[2] = np.clip(at[2] + step[2], 0, MOST) - at[2]
            step[:2] = np.linalg.solve(H[:2, :2], g[:2] - H[:2, 2] * step[2])
        row[:free] += step.clip(-2, 2)
    return found


class ErrorTail:
    """A distribution fitted to the errors of sampled hypotheses, and its lower tail (the paper's section on sampling).

    Parameters
    ----------
    family : {"ncx2", "gamma", "normal", "empirical"}
        The paper's scaled non-central chi-square, whose location is 0; the same with non-centrality 0; a normal
        distribution; or shares of the sample, infinite below its smallest error.

    Attributes
    ----------
    df_, nc_, scale_ : float
        Of the fit by maximum likelihood; for "normal" `scale_` is the standard deviation, otherwise NaN.
    mean_ : float
        Mean of the errors.
    ks_ : float
        Largest distance of the fitted distribution function from that of the sample (Kolmogorov and Smirnov).
    errors_ : (S,)
        The errors, smallest first.

    Examples
    --------
    >>> errors = stats.ncx2.rvs(8, 3, scale=2e-5, size=4000, random_state=0)
    >>> tail = ErrorTail().fit(errors)
    >>> exact = -stats.ncx2.logcdf(2e-5, 8, 3, scale=2e-5)
    >>> bool(abs(tail.neg_log_cdf(2e-5) / exact - 1) < 0.1)
    True
    """

    def __init__(self, family: Family = "ncx2") -> None:
        if family not in ("ncx2", "gamma", "normal", "empirical"):
            raise ValueError(f"family: expected 'ncx2', 'gamma', 'normal' or 'empirical', got {family!r}")
        self.family = family

    def fit(self, errors: Float[np.ndarray, " s"] | Float[Tensor, " s"]) -> "ErrorTail":
        """Fit to the errors (S,) of S hypotheses.

        Raises
        ------
        ValueError
            For fewer than 50 errors, NaN, infinite, negative or equal ones, and errors of 0 in a family without them.
        """
        values = errors.detach().cpu().numpy() if isinstance(errors, Tensor) else np.asarray(errors)
        values = np.sort(values.astype(float))
        if values.ndim != 1 or len(values) < MINIMUM:
            raise ValueError(f"errors: expected at least {MINIMUM} in shape (S,), got shape {values.shape}")
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise ValueError(f"errors: expected finite values, got {bad} of {len(values)} NaN or infinite")
        least = values[0]
        if least < 0 or (least == 0 and self.family in ("ncx2", "gamma")):
            raise ValueError(
                f"errors: expected positive values, got {least}; errors that can be 0, such as shares of wrong answers,"
                " need family='empirical'"
            )
        if values[-1] - least <= 1e-12 * values[-1]:
            raise ValueError(f"errors: expected a distribution, got {len(values)} equal values {least}")
        self.errors_, self.mean_ = values, float(values.mean())
        self._theta = self._fit(values)
        self.df_ = self.nc_ = self.scale_ = float("nan")
        if self.family == "normal":
            self.scale_ = float(self._theta[1])
        elif self.family != "empirical":
            self.df_, self.nc_, self.scale_ = _shape(self._theta)
            self.nc_ = 0.0 if self._theta[2] == 0 else self.nc_
        steps = np.arange(len(values) + 1) / len(values)
        fitted = self._cdf(values)
        self.ks_ = float(np.maximum(fitted - steps[:-1], steps[1:] - fitted).max())
        return self

    def _fit(self, values: np.ndarray) -> np.ndarray:
        if self.family == "normal":
            return np.array([self.mean_, values.std()])
        if self.family == "empirical":
            return np.empty(0)
        return _most_likely(values / self.mean_, self.family == "gamma") + [log(self.mean_), 0, 0]  # noqa: RUF005

    def _cdf(self, at: np.ndarray) -> np.ndarray:
        if self.family == "normal":
            return np.asarray(stats.norm.cdf(at, self.mean_, self.scale_))
        if self.family == "empirical":
            return np.searchsorted(self.errors_, at, side="right") / len(self.errors_)
        if self.nc_ == 0:
            return np.asarray(stats.chi2.cdf(at, self.df_, scale=self.scale_))
        return np.asarray(stats.ncx2.cdf(at, self.df_, self.nc_, scale=self.scale_))

    def pdf(self, at: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Fitted density; NaN for the empirical family."""
        if self.family == "normal":
            return np.asarray(stats.norm.pdf(at, self.mean_, self.scale_))
        if self.family == "empirical":
            return np.full(len(at), np.nan)
        return np.exp(_log_density(at, *_shape(self._theta)))

    def _tail(self, theta: np.ndarray, eps: float) -> float:
        if self.family == "normal":
            return -float(stats.norm.logcdf(eps, *theta))
        df, nc, scale = _shape(theta)
        return ncx2_neg_log_cdf(eps, df, nc if theta[2] > 0 else 0.0, scale)

    def neg_log_cdf(self, eps: float) -> float:
        """Inductive bias -ln F(eps) in nats, at least 0.

        Raises
        ------
        ValueError
            If `eps` is not positive.
        """
        _check_target(eps)
        if self.family == "empirical":
            hits = int(np.searchsorted(self.errors_, eps, side="right"))
            return log(len(self.errors_) / hits) if hits else inf
        return self._tail(self._theta, eps)

    def bootstrap(self, eps: float, draws: int = 100, seed: int = 0) -> Float[np.ndarray, " draws"]:
        """Values of `neg_log_cdf` after fits to as many errors drawn with replacement.

        Each fit is one Newton step from that of the whole sample; for few errors the limits are rather too wide.
        """
        _check_target(eps)
        rng = np.random.default_rng(seed)
        n = len(self.errors_)
        if self.family == "empirical":
            hits = rng.binomial(n, np.searchsorted(self.errors_, eps, side="right") / n, draws)
            with np.errstate(divide="ignore"):
                return -np.log(hits / n)
        weights = rng.multinomial(n, np.full(n, 1 / n), draws).astype(float)
        if self.family == "normal":
            means = weights @ self.errors_ / n
            found = np.stack([means, np.sqrt((weights @ self.errors_**2 / n - means**2).clip(1e-300))], 1)
        else:
            shift = np.array([log(self.mean_), 0, 0])
            x = self.errors_ / self.mean_
            found = _one_step(x, weights, self._theta - shift, self.family == "gamma") + shift
        return np.array([self._tail(theta, eps) for theta in found])

    def ci(
        self, eps: float, level: float = 0.95, method: Literal["bootstrap", "dkw"] = "bootstrap", seed: int = 0
    ) -> tuple[float, float]:
        """Limits of the inductive bias.

        Parameters
        ----------
        eps : float
            Target error, positive.
        level : float
            Confidence, in (0, 1).
        method : {"bootstrap", "dkw"}
            Percentiles of [`bootstrap`][classact.probe.inductivebias.ErrorTail.bootstrap], which trust the family; or
            the inequality of Dvoretzky, Kiefer and Wolfowitz, which holds whatever the distribution and says nothing
            where errors as small as `eps` are too rare to count.
        seed : int
            Of the bootstrap.
        """
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number in (0, 1), got {level}")
        if method == "bootstrap":
            return _percentiles(self.bootstrap(eps, seed=seed), level)
        if method != "dkw":
            raise ValueError(f"method: expected 'bootstrap' or 'dkw', got {method!r}")
        _check_target(eps)
        n = len(self.errors_)
        share = np.searchsorted(self.errors_, eps, side="right") / n
        band = sqrt(log(2 / (1 - level)) / (2 * n))
        return -log(min(share + band, 1.0)), -log(share - band) if share > band else inf


def _check_target(eps: float) -> None:
    if not (eps > 0 and isfinite(eps)):
        raise ValueError(f"target_error: expected a positive number, got {eps}")


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], method="closest_observation")
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class ErrorSpectrum:
    """The distribution of the error of functions with a Gaussian prior: a weighted sum of non-central chi-squares.

    e = Σ_j lam_j χ²_k(nc_j), with lam_j nc_j = squares_j.

    Attributes
    ----------
    lam : (m,)
        Weights, at least 0: eigenvalues of the covariance at the test points over n* k. Where one is 0, the term is the
        constant `squares`.
    squares : (m,)
        Squared mean error along each eigenvector, summed over outputs, over n* k.
    outputs : int
        k.
    """

    lam: Float[np.ndarray, " m"]
    squares: Float[np.ndarray, " m"]
    outputs: int = 1

    @property
    def mean(self) -> float:
        """Mean error."""
        return float((self.outputs * self.lam + self.squares).sum())

    @property
    def variance(self) -> float:
        """Variance of the error."""
        return float((2 * self.outputs * self.lam**2 + 4 * self.lam * self.squares).sum())

    def _log_moments(self, s: Any) -> Any:
        """Cumulant generating function at a number, real or complex, left of 1 / (2 max lam)."""
        left = 1 - 2 * self.lam * s
        return (-self.outputs / 2 * np.log(left) + s * self.squares / left).sum()

    def neg_log_cdf(self, eps: float) -> float:
        """-ln P(e <= eps), by inverting the moment generating function along a line through its saddle point.

        There the integrand falls off without turning, so that the result is precise however small P is.

        Examples
        --------
        >>> round(float(np.exp(-ErrorSpectrum(np.array([0.5, 0.3, 0.2]), np.zeros(3)).neg_log_cdf(0.2))), 5)
        0.11229
        """
        _check_target(eps)
        constant = float(self.squares[self.lam == 0].sum())
        if eps <= constant:
            return inf
        sd = sqrt(self.variance)
        if sd == 0:
            return 0.0

        def slope(s: float) -> float:
            left = 1 - 2 * self.lam * s
            return float((self.outputs * self.lam / left + self.squares / left**2).sum()) - eps

        end = 1 / (2 * float(self.lam.max()))
        if eps < self.mean:
            low = -1 / sd
            while slope(low) > 0:
                low *= 4
            at = min(optimize.brentq(slope, low, 0.0), -0.3 / sd)
        else:
            high = end / 2
            while slope(high) < 0:
                high = (high + end) / 2
            at = max(optimize.brentq(slope, 0.0, high), min(0.3 / sd, end / 2))
        left = 1 - 2 * self.lam * at
        width = 1 / sqrt(
            float((2 * self.outputs * self.lam**2 / left**2 + 4 * self.lam * self.squares / left**3).sum())
        )
        top = float(self._log_moments(at)) - at * eps

        def integrand(t: float) -> float:
            s = complex(at, t * width)
            return float((np.exp(self._log_moments(s) - s * eps - top) / s).real)

        total = quad(integrand, 0, 12, limit=200)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a part that is nearly nothing need not converge
            total += quad(integrand, 12, np.inf, limit=200)[0]
        log_part = top + log(abs(total) * width / np.pi)
        return -log_part if at < 0 else -float(np.log1p(-min(np.exp(log_part), 1 - 1e-16)))


# hypothesis spaces


@runtime_checkable
class Hypotheses(Protocol):
    """A space of hypotheses that can be sampled; a plain function with the same arguments will do as well."""

    def sample(self, size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
        """Test errors of `size` random hypotheses; NaN for one that does not fit the training data."""
        ...


class GPHypotheses:
    """Functions with a Gaussian prior that interpolate the training data (the paper's Algorithm 1).

    Parameters
    ----------
    x, y : (n, ...), (n, k)
        Training data; n may be 0.
    x_test, y_test : (n*, ...), (n*, k)
        Where the error, a mean square over points and outputs, is measured.
    kernel : "rbf", callable or (n + n*, n + n*)
        exp(-|a - b|² / (2 sigma²)); a function of two sets of points, (p, ...) and (q, ...) to (p, q); or the matrix of
        all training points followed by all test points.
    sigma : float or "median"
        Width of "rbf"; or the median distance of two training points. The authors' is 1.
    amplitude : float or "label_var"
        Prior variance by which the kernel is multiplied; or the variance of the training targets, a mean over outputs.
        The authors' is 1, which for targets of 0 and 1 asks for far more inductive bias.
    jitter : float
        Share of the amplitude added to the diagonal of the training points' matrix.
    device : str or device, optional
        Where to compute; by default where the data are. Always in double precision.

    Raises
    ------
    ValueError
        If shapes do not fit, values are NaN, or the kernel matrix is not positive definite.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 21)[:, None]
    >>> space = GPHypotheses(x[::2], x[::2] ** 2, x[1::2], x[1::2] ** 2)
    >>> space.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        x: Float[Tensor, "n *d"],
        y: Float[Tensor, "n k"],
        x_test: Float[Tensor, "t *d"],
        y_test: Float[Tensor, "t k"],
        *,
        kernel: Literal["rbf"] | Kernel | Float[Tensor, "n+t n+t"] = "rbf",
        sigma: float | Literal["median"] = 1.0,
        amplitude: float | Literal["label_var"] = 1.0,
        jitter: float = 1e-6,
        device: str | torch.device | None = None,
    ) -> None:
        _check_data(x, y, x_test, y_test)
        x, y, x_test, y_test = (
            part.detach().to(device or part.device, torch.float64) for part in (x, y, x_test, y_test)
        )
        n, points = len(x), torch.cat([x, x_test])
        if isinstance(kernel, str):
            if kernel != "rbf":
                raise ValueError(f"kernel: expected 'rbf', a function or a matrix, got {kernel!r}")
            flat = points.flatten(1)
            distances = torch.cdist(flat, flat)
            if sigma == "median":
                if n < 2:
                    raise ValueError(f"sigma: the median distance needs at least 2 training points, got {n}")
                inside = torch.triu_indices(n, n, 1)
                sigma = float(distances[inside[0], inside[1]].median())
            if not (not isinstance(sigma, str) and sigma > 0):
                raise ValueError(f"sigma: expected a positive number or 'median', got {sigma!r}")
            K = torch.exp(-distances.square() / (2 * sigma**2))
        else:
            K = kernel if isinstance(kernel, Tensor) else kernel(points, points)
            K = K.detach().to(points)
        if K.shape != (len(points), len(points)):
            raise ValueError(
                f"kernel: expected a matrix of shape {(len(points), len(points))}, training points first, got"
                f" {tuple(K.shape)}"
            )
        if amplitude == "label_var":
            amplitude = float(y.var(0, correction=0).mean()) if n else float("nan")
        if not (not isinstance(amplitude, str) and amplitude > 0):
            raise ValueError(f"amplitude: expected a positive number or 'label_var', got {amplitude!r}")
        self.sigma, self.amplitude = sigma, amplitude
        K = amplitude * K
        across, within = K[:n, n:], K[n:, n:]
        L, failed = torch.linalg.cholesky_ex(K[:n, :n] + jitter * amplitude * torch.eye(n).to(K))
        if failed:
            raise ValueError(
                f"kernel: the matrix of the training points is not positive definite with jitter={jitter}; points that"
                " coincide need a larger one"
            )
        half = torch.linalg.solve_triangular(L, across, upper=False)
        self.mean = half.T @ torch.linalg.solve_triangular(L, y, upper=False)
        self.covariance = within - half.T @ half
        lam, vectors = torch.linalg.eigh(self.covariance)
        lam = torch.where(lam > 1e-13 * amplitude, lam, 0.0)
        self._root, self._shift = lam.sqrt(), vectors.T @ (self.mean - y_test)

    def sample(self, size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
        """Errors of `size` functions."""
        points, outputs = self._shift.shape
        found = []
        step = max(1, 2**22 // self._shift.numel())  # 32 MiB at once
        for start in range(0, size, step):
            g = torch.randn(min(step, size - start), points, outputs, generator=generator, dtype=torch.float64)
            found.append((g.to(self._shift) * self._root[:, None] + self._shift).square().mean((1, 2)))
        return torch.cat(found)

    def spectrum(self) -> ErrorSpectrum:
        """The exact distribution of the error."""
        number = self._shift.numel()
        lam, squares = self._root.square() / number, self._shift.square().sum(1) / number
        return ErrorSpectrum(lam.cpu().numpy(), squares.cpu().numpy(), self._shift.shape[1])


def likely_rbf(
    x: Float[Tensor, "n *d"], y: Float[Tensor, "n k"], factors: Sequence[float] = (0.125, 0.25, 0.5, 1, 2, 4, 8)
) -> tuple[float, float]:
    """Width and amplitude of the RBF prior under which the training targets are most likely.

    Parameters
    ----------
    x, y : (n, ...), (n, k)
        Training data, n at least 2.
    factors : sequence of float
        Widths to try, in median distances of two training points; for each the best amplitude is known,
        tr(Yᵀ K⁻¹ Y) / (n k).

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> width, amplitude = likely_rbf(x, 3 * x)
    >>> width > 1, amplitude > 1
    (True, True)
    """
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"x, y: expected at least 2 points, equally many, got {len(x)} and {len(y)}")
    flat, Y = x.detach().flatten(1).double(), y.detach().double()
    distances = torch.cdist(flat, flat)
    n = len(Y)
    inside = torch.triu_indices(n, n, 1)
    median = float(distances[inside[0], inside[1]].median())
    best, found = inf, (median, 1.0)
    for width in (factor * median for factor in factors):
        K = torch.exp(-distances.square() / (2 * width**2)) + 1e-4 * torch.eye(n).to(flat)
        L = torch.linalg.cholesky(K)
        amplitude = float(torch.linalg.solve_triangular(L, Y, upper=False).square().mean())
        cost = n * log(amplitude) / 2 + float(L.diagonal().log().sum())
        if cost < best:
            best, found = cost, (width, amplitude)
    return found


def _check_data(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> None:
    for name, a, b in (("x, y", x, y), ("x_test, y_test", x_test, y_test)):
        if len(a) != len(b):
            raise ValueError(f"{name}: expected equally many, got {len(a)} and {len(b)}")
    if not len(x_test):
        raise ValueError("x_test: expected at least one point")
    if x.shape[1:] != x_test.shape[1:] or y.shape[1:] != y_test.shape[1:]:
        raise ValueError(
            f"x_test, y_test: expected shapes (N, {x.shape[1:]}) and (N, {y.shape[1:]}) like the training data, got"
            f" {tuple(x_test.shape)} and {tuple(y_test.shape)}"
        )
    for name, part in (("x", x), ("y", y), ("x_test", x_test), ("y_test", y_test)):
        if not part.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")


class NNHypotheses:
    """Networks trained from independent initialisations, in independent orders of the data, to fit the training data.

    Many are trained at once by ``torch.func``. The space is that of the architecture, its initialisation and the
    training together.

    Parameters
    ----------
    factory : callable
        Makes a network that maps x (N, ...) to (N, k), initialised by PyTorch's global generator.
    x, y, x_test, y_test : (n, ...), (n, k), (n*, ...), (n*, k)
        Training and test data.
    epochs, lr, batch_size : int, float, int or None
        Of Adam. None: all data in every step.
    train_tol : float
        Largest training error with which a network counts as fitting the data; others are left out (NaN).
    loss : callable
        What is minimised and compared with `train_tol`, (N, k) and (N, k) to a number.
    error : callable, optional
        The test error, likewise; by default the mean square over points and outputs.
    chunk : int
        Networks trained at once. The value of each does not depend on it.
    vectorize : bool
        Set to False for networks that ``torch.func.vmap`` cannot handle.
    device : str or device, optional
        By default where the data are.
    workers : int
        Processes that train chunks, on CPUs only; the results do not depend on it.

    Raises
    ------
    ValueError
        If shapes do not fit or a setting is out of range.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 12)[:, None]
    >>> space = NNHypotheses(lambda: mlp(1, 1, 16), x[::2], x[::2], x[1::2], x[1::2], epochs=200, lr=1e-2)
    >>> bool((space.sample(3, torch.Generator().manual_seed(0)) < 0.1).all())
    True
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        x: Float[Tensor, "n *d"],
        y: Float[Tensor, "n k"],
        x_test: Float[Tensor, "t *d"],
        y_test: Float[Tensor, "t k"],
        *,
        epochs: int = 400,
        lr: float = 1e-3,
        batch_size: int | None = None,
        train_tol: float = 1e-2,
        loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        error: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        chunk: int = 100,
        vectorize: bool = True,
        device: str | torch.device | None = None,
        workers: int = 1,
    ) -> None:
        _check_data(x, y, x_test, y_test)
        if not len(x):
            raise ValueError("x: expected at least one training point")
        settings = {"epochs": epochs, "lr": lr, "train_tol": train_tol, "chunk": chunk, "workers": workers}
        for name, value in settings.items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.factory, self.loss, self.error = factory, loss, error
        self.epochs, self.lr, self.batch_size, self.train_tol = epochs, lr, batch_size, train_tol
        self.chunk, self.vectorize, self.workers = chunk, vectorize, workers
        self.device = torch.device(device) if device is not None else x.device
        self._data = [part.detach().to(self.device) for part in (x, y, x_test, y_test)]

    def sample(self, size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
        """Test errors of `size` networks, NaN for those that do not fit the training data.

        Raises
        ------
        ValueError
            If none fits, or of 50 and more fewer than 50 do; it says how many and how near the others came.
        """
        seeds = torch.randint(2**62, (size,), generator=generator)
        train_errors, errors = self.train(seeds)
        fit = train_errors <= self.train_tol
        if int(fit.sum()) < (MINIMUM if size >= MINIMUM else 1):
            reached = train_errors[train_errors.isfinite()]
            came = (
                f"{reached.min():.3g} at best and {reached.median():.3g} in the median" if len(reached) else "no number"
            )
            raise ValueError(
                f"train_tol: only {int(fit.sum())} of {size} networks reached the training error {self.train_tol:.3g}"
                f" asked for; the training errors were {came}; train longer or ask for less"
            )
        return torch.where(fit, errors, float("nan"))

    def train(self, seeds: Int[Tensor, " size"]) -> tuple[Float[Tensor, " size"], Float[Tensor, " size"]]:
        """Train one network for each seed; training and test errors."""
        chunks = seeds.split(self.chunk if self.vectorize else 1)
        if self.workers > 1 and self.device.type == "cpu" and len(chunks) > 1:
            from sklearn.utils.parallel import Parallel, delayed

            found = Parallel(n_jobs=self.workers)(delayed(self._train)(part) for part in chunks)
        else:
            found = [self._train(part) for part in chunks]
        train_errors, errors = (torch.cat(parts) for parts in zip(*found, strict=True))
        return train_errors, errors

    def _train(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        x, y, x_test, y_test = self._data
        n = len(x)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            models = []
            for seed in seeds.tolist():
                torch.manual_seed(seed)
                models.append(self.factory().to(self.device).train())
            base = models[0]

            def predict(params: Any, buffers: Any, inputs: Tensor) -> Tensor:
                out: Tensor = functional_call(base, (params, buffers), (inputs,))
                return out

            def batch_loss(params: Any, buffers: Any, inputs: Tensor, targets: Tensor) -> Tensor:
                out = predict(params, buffers, inputs)
                if out.shape != targets.shape:
                    raise ValueError(
                        f"factory: expected a network with outputs {tuple(targets.shape)} for inputs"
                        f" {tuple(inputs.shape)}, got {tuple(out.shape)}"
                    )
                return self.loss(out, targets)

            params: dict[str, Tensor]
            if self.vectorize:
                params, buffers = stack_module_state(models)
            else:
                params, buffers = dict(base.named_parameters()), dict(base.named_buffers())
            optimizer = torch.optim.Adam([p for p in params.values() if p.requires_grad], self.lr)
            whole = self.batch_size is None or self.batch_size >= n
            orders = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
            data_dim = None if whole else 0
            losses = vmap(batch_loss, (0, 0, data_dim, data_dim), randomness="different")
            for _ in range(self.epochs):
                if whole:
                    steps: Any = [None]
                else:
                    order = torch.stack([torch.randperm(n, generator=g) for g in orders]).to(self.device)
                    steps = order.split(self.batch_size, 1)
                for chosen in steps:
                    inputs, targets = (x, y) if chosen is None else (x[chosen], y[chosen])
                    if self.vectorize:
                        value = losses(params, buffers, inputs, targets).sum()
                    else:
                        value = batch_loss(params, buffers, *((inputs, targets) if whole else (inputs[0], targets[0])))
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
            base.eval()
            answer = vmap(predict, (0, 0, None)) if self.vectorize else lambda *given: predict(*given)[None]
            with torch.no_grad():
                found = []
                for inputs, targets, measure in ((x, y, self.loss), (x_test, y_test, self.error)):
                    out = torch.cat([answer(params, buffers, part) for part in inputs.split(1000)], 1)
                    found.append(torch.stack([measure(one, targets) for one in out]).double().cpu())
        return found[0], found[1]


def mlp(inputs: int, outputs: int, width: int = 64, depth: int = 1) -> nn.Sequential:
    """The authors' network: a layer to `width`, `depth` layers between, and one to the outputs, with ReLU."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def cnn(channels: int, outputs: int, width: int = 12) -> nn.Sequential:
    """Two convolutions of 3 x 3, the first with a stride of 2, means over 3 x 3 parts of the image, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18 * width, outputs),
    )  # fmt: skip


# the measure


class Provided(NamedTuple):
    """Inductive bias, in nats, that one space provides over another, with limits."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class InductiveBias:
    """Inductive bias that a task requires relative to a space of hypotheses.

    Attributes
    ----------
    name : str
        Of the space.
    target_error : float
        ε.
    value : float
        -ln F(ε) in nats: the estimate.
    low, high : float
        Its limits by the bootstrap. They hold the sampling of hypotheses, neither that of the data nor what the fitted
        family gets wrong.
    dkw : (float, float)
        Limits without assumptions; the upper one is infinite where errors of ε are too rare to count.
    exact : float or None
        The value by the exact distribution, for spaces that have a ``spectrum()``.
    level : float
        Of the limits.
    tail : ErrorTail
        The fitted distribution.
    n_left_out : int
        Hypotheses that did not fit the training data.
    draws : (B,)
        Values of the bootstrap.
    """

    name: str
    target_error: float
    value: float
    low: float
    high: float
    dkw: tuple[float, float]
    exact: float | None
    level: float
    tail: ErrorTail
    n_left_out: int
    draws: Float[np.ndarray, " b"]

    @property
    def errors(self) -> Float[np.ndarray, " s"]:
        """Errors of the hypotheses that fit, smallest first."""
        return self.tail.errors_

    @property
    def bits(self) -> float:
        """The estimate in bits."""
        return self.value / log(2)

    @property
    def extrapolation(self) -> float:
        """Value over ln S: above 1, no error as small as ε is expected among S hypotheses."""
        return self.value / log(len(self.errors))

    def provided_over(self, other: "InductiveBias") -> Provided:
        """What this space provides over another: the other's value minus its own, on the same task and ε.

        Raises
        ------
        ValueError
            If the target errors or the levels of the limits differ.
        """
        if (other.target_error, other.level) != (self.target_error, self.level):
            raise ValueError(
                f"other: expected target error {self.target_error:.6g} and level {self.level}, got"
                f" {other.target_error:.6g} and {other.level}"
            )
        number = min(len(self.draws), len(other.draws))
        with np.errstate(invalid="ignore"):
            draws = other.draws[:number] - self.draws[:number]
        return Provided(other.value - self.value, *_percentiles(draws, self.level))

    def row(self) -> dict[str, Any]:
        """What the table says."""
        return {
            "space": self.name,
            "target_error": self.target_error,
            "nats": self.value,
            "low": self.low,
            "high": self.high,
            "bits": self.bits,
            "dkw_low": self.dkw[0],
            "dkw_high": self.dkw[1],
            "exact_nats": float("nan") if self.exact is None else self.exact,
            "extrapolation": self.extrapolation,
            "hypotheses": len(self.errors),
            "left_out": self.n_left_out,
            "mean_error": self.tail.mean_,
            "least_error": float(self.errors[0]),
            "family": self.tail.family,
            "df": self.tail.df_,
            "nc": self.tail.nc_,
            "scale": self.tail.scale_,
            "ks": self.tail.ks_,
        }

    def table(self) -> "pd.DataFrame":
        """One row."""
        return InductiveBiasReport((self,)).table()

    def plot(self) -> "Figure":
        """Errors with the fitted density, and the bias required for every target error."""
        return InductiveBiasReport((self,)).plot()

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``arrays.npz`` and ``bias.png``; each file appears only when complete."""
        return InductiveBiasReport((self,)).save(folder)


@dataclass(frozen=True, eq=False)
class InductiveBiasReport:
    """Several spaces on one task; ``report["mlp"]`` is one [`InductiveBias`][classact.probe.InductiveBias].

    Attributes
    ----------
    biases : tuple of InductiveBias
        One for each space.
    """

    biases: tuple[InductiveBias, ...]

    def __getitem__(self, name: str) -> InductiveBias:
        """One space."""
        for one in self.biases:
            if one.name == name:
                return one
        raise KeyError(f"no space {name!r}; there are {', '.join(one.name for one in self.biases)}")

    def table(self) -> "pd.DataFrame":
        """One row per space: the estimate in nats and bits, its limits, and how far it extrapolates."""
        import pandas as pd

        return pd.DataFrame([one.row() for one in self.biases])

    def plot(self) -> "Figure":
        """Errors with the fitted densities, and the bias required for every target error; dashed, the exact one."""
        from matplotlib.figure import Figure

        figure = Figure((9.5, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, one in enumerate(self.biases):
            draw_tail(left, right, one, f"C{number}")
        eps = self.biases[0].target_error
        for axes in (left, right):
            axes.axvline(eps, color="0.4", linewidth=0.8, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xscale("log")
        left.set(xlabel="test error of a hypothesis", ylabel="density over ln error", yticks=[])
        right.set(xlabel=f"target error (dotted: {eps:.3g})", ylabel="required inductive bias, nats")
        right.set_yscale("symlog", linthresh=1)
        right.set_ylim(0)
        right.yaxis.set_major_formatter("{x:g}")
        left.legend(frameon=False, fontsize=8)
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``arrays.npz`` and ``bias.png``; each file appears only when complete.

        In the JSON file null stands for what is infinite or not defined.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in one.row().items()}
            | {"level": one.level}
            for one in self.biases
        ]
        arrays = {f"{one.name}/{key}": getattr(one, key) for one in self.biases for key in ("errors", "draws")}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = Path(temporary)
            (part / "report.json").write_text(json.dumps({"spaces": rows}, indent=1) + "\n", encoding="utf-8")
            np.savez_compressed(part / "arrays.npz", **arrays)
            self.plot().savefig(part / "bias.png", dpi=150)
            for file in part.iterdir():
                file.replace(folder / file.name)
        return folder


def draw_tail(density: Any, curve: Any, one: InductiveBias, colour: str) -> None:
    """Draw the errors of one space with the fitted density, and its required bias against the target error."""
    low, high = float(one.errors[0]), float(one.errors[-1])
    if low > 0:
        edges = np.geomspace(low, high * 1.0001, 31)
        shares = np.histogram(one.errors, edges)[0] / len(one.errors) / np.diff(np.log(edges))
        density.stairs(shares, edges, color=colour, alpha=0.35, fill=True)
    at = np.geomspace(min(low if low > 0 else high / 100, one.target_error) * 0.7, high * 1.3, 120)
    density.plot(at, one.tail.pdf(at) * at, color=colour, linewidth=1.4, label=f"{one.name}: {one.value:.3g} nats")
    curve.plot(at, [one.tail.neg_log_cdf(float(eps)) for eps in at], color=colour, linewidth=1.4)
    curve.plot(one.errors[::-1], -np.log(np.arange(len(one.errors), 0, -1) / len(one.errors)), ".", color=colour,
               markersize=3, alpha=0.4)  # fmt: skip
    top = min(one.high, 1e300)
    curve.errorbar(one.target_error, one.value, [[max(one.value - one.low, 0)], [max(top - one.value, 0)]],
                   fmt="o", color=colour, markersize=4, capsize=2)  # fmt: skip
    if one.exact is not None and isfinite(one.exact):
        curve.plot(one.target_error, one.exact, "x", color="black", markersize=6)


def inductive_bias(
    hypotheses: Hypotheses | Callable[[int, torch.Generator], Tensor],
    target_error: float,
    *,
    n_samples: int = 10_000,
    family: Family = "ncx2",
    level: float = 0.95,
    bootstrap: int = 100,
    seed: int = 0,
    name: str = "",
) -> InductiveBias:
    """Inductive bias required to reach a target error on a task, relative to a space of hypotheses.

    Parameters
    ----------
    hypotheses : Hypotheses or callable
        Its ``sample(size, generator)``, or the function itself, gives the test errors (size,) of random hypotheses that
        fit the training data, NaN for those that do not.
    target_error : float
        ε, positive.
    n_samples : int
        Hypotheses to draw, S; the authors drew 10,000 functions.
    family
        Of [`ErrorTail`][classact.probe.ErrorTail].
    level : float
        Confidence of the limits.
    bootstrap : int
        Fits of the bootstrap.
    seed : int
        Of everything drawn.
    name : str
        Of the space, for tables; by default that of its class or function.

    Raises
    ------
    ValueError
        If ε is not positive, or fewer than 50 hypotheses fit the training data.

    Warns
    -----
    UserWarning
        If the value is more than 3 ln S, and so rests on the fitted family more than on the sample.

    Examples
    --------
    >>> def squares(size, generator):  # errors of a sum of six squares
    ...     return torch.randn(size, 6, generator=generator).square().mean(1)
    >>> found = inductive_bias(squares, 0.2, n_samples=2000)
    >>> bool(abs(found.value - ncx2_neg_log_cdf(0.2, 6, 0, 1 / 6)) < 0.3), found.n_left_out
    (True, 0)
    """
    _check_target(target_error)
    if n_samples < MINIMUM:
        raise ValueError(f"n_samples: expected at least {MINIMUM}, got {n_samples}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap: expected at least 1, got {bootstrap}")
    sample = hypotheses.sample if isinstance(hypotheses, Hypotheses) else hypotheses
    errors = torch.as_tensor(sample(n_samples, torch.Generator().manual_seed(seed))).detach().cpu().double()
    if errors.shape != (n_samples,):
        raise ValueError(f"hypotheses: expected errors of shape ({n_samples},), got {tuple(errors.shape)}")
    fit = ~errors.isnan()
    if int(fit.sum()) < MINIMUM:
        raise ValueError(
            f"hypotheses: only {int(fit.sum())} of {n_samples} fit the training data (the others' errors are NaN);"
            f" at least {MINIMUM} are needed"
        )
    tail = ErrorTail(family).fit(errors[fit])
    value = tail.neg_log_cdf(target_error)
    draws = tail.bootstrap(target_error, bootstrap, seed)
    own = getattr(hypotheses, "__name__", type(hypotheses).__name__)
    found = InductiveBias(
        name=name or own,
        target_error=float(target_error),
        value=value,
        low=_percentiles(draws, level)[0],
        high=_percentiles(draws, level)[1],
        dkw=tail.ci(target_error, level, "dkw"),
        exact=hypotheses.spectrum().neg_log_cdf(target_error) if hasattr(hypotheses, "spectrum") else None,
        level=level,
        tail=tail,
        n_left_out=int((~fit).sum()),
        draws=draws,
    )
    if isfinite(value) and found.extrapolation > FAR:
        warnings.warn(
            f"{found.name}: {value:.3g} nats are {found.extrapolation:.1f} times ln S of S = {len(tail.errors_)}"
            " hypotheses; so far out the value rests on the fitted family more than on the sample",
            stacklevel=2,
        )
    return found


def ridge_error(
    x: Float[Tensor, "n *d"], y: Float[Tensor, "n k"], x_test: Float[Tensor, "t *d"], y_test: Float[Tensor, "t k"]
) -> float:
    """Test error of a ridge regression whose penalty is chosen by leaving one training point out, a plain target."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    flat, targets, flat_test, targets_test = (
        p.detach().cpu().double().flatten(1).numpy() for p in (x, y, x_test, y_test)
    )
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 5, 17))).fit(flat, targets)
    predicted = ridge.predict(flat_test).reshape(targets_test.shape)
    return float(((predicted - targets_test) ** 2).mean())


def _targets(y: Tensor, y_test: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as numbers (n, k): classes become 0 and 1."""
    if y.is_floating_point() and y_test.is_floating_point():
        return (y[:, None], y_test[:, None]) if y.ndim == 1 else (y, y_test)
    if y.ndim != 1 or y_test.ndim != 1 or y.is_floating_point() or y_test.is_floating_point():
        raise ValueError(
            f"y_train, y_test: expected numbers (n,) or (n, k), or classes (n,) as integers, got {y.dtype} of shape"
            f" {tuple(y.shape)} and {y_test.dtype} of shape {tuple(y_test.shape)}"
        )
    if not len(y) or not len(y_test) or min(int(y.min()), int(y_test.min())) < 0:
        raise ValueError("y_train, y_test: expected classes from 0, at least one of each")
    classes = max(int(y.max()), int(y_test.max())) + 1
    return F.one_hot(y.long(), classes).float(), F.one_hot(y_test.long(), classes).float()


def compare_spaces(
    x_train: Float[Tensor, "n *d"],
    y_train: Float[Tensor, "n *k"] | Int[Tensor, " n"],
    x_test: Float[Tensor, "t *d"],
    y_test: Float[Tensor, "t *k"] | Int[Tensor, " t"],
    *,
    spaces: Sequence[str | tuple[str, Callable[[], nn.Module]]] = ("rbf", "mlp", "cnn"),
    target_error: float | None = None,
    samples: int = 200,
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int = 1,
    epochs: int = 400,
    lr: float = 1e-2,
    batch_size: int | None = None,
    train_tol: float | None = None,
) -> InductiveBiasReport:
    """Inductive bias that a task requires relative to several spaces of hypotheses, at the same target error.

    Parameters
    ----------
    x_train, y_train, x_test, y_test : (n, ...), (n,) or (n, k), (n*, ...), (n*,) or (n*, k)
        The task. Classes are integers (n,); their targets are 0 and 1. Inputs should be of unit scale.
    spaces : sequence of str or (str, factory)
        "rbf", functions with a Gaussian prior whose width and amplitude make the training targets most likely;
        "rbf-unit", the authors' with both 1; "mlp" and "cnn", small networks (images (n, C, H, W) only);
        or a name and a function that makes networks.
    target_error : float, optional
        Mean square over points and outputs; by default that of a ridge regression with a chosen penalty.
    samples : int
        Hypotheses of each space, at least 50.
    seed, device, workers
        Seed of everything; where to compute; processes that train networks.
    epochs, lr, batch_size, train_tol
        Of [`NNHypotheses`][classact.probe.NNHypotheses]; `train_tol` is by default a tenth of the variance of the
        targets.

    Returns
    -------
    InductiveBiasReport
        One row per space.

    Raises
    ------
    ValueError
        If the data or a setting do not fit, or the networks of a space do not fit the training data.

    Examples
    --------
    >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    >>> report = compare_spaces(x[:30], x[:30, 0], x[30:], x[30:, 0], spaces=("rbf", "rbf-unit"), target_error=0.05)
    >>> report.table()["space"].tolist()
    ['rbf', 'rbf-unit']
    """
    y, y_star = _targets(y_train, y_test)
    _check_data(x_train, y, x_test, y_star)
    named: dict[str, Any] = dict((one, one) if isinstance(one, str) else one for one in spaces)
    if not named or len(named) < len(spaces):
        raise ValueError(f"spaces: expected at least one, each once, got {list(spaces)}")
    shape, outputs = x_train.shape[1:], y.shape[1]
    data = (x_train, y, x_test, y_star)
    variance = float(y.var(0, correction=0).mean())
    tolerance = variance / 10 if train_tol is None else train_tol
    made: dict[str, Any] = {}
    for name, space in named.items():
        if space == "rbf":
            sigma, amplitude = likely_rbf(x_train, y)
            made[name] = GPHypotheses(*data, sigma=sigma, amplitude=amplitude, jitter=1e-4, device=device)
            continue
        if space == "rbf-unit":
            made[name] = GPHypotheses(*data, jitter=1e-4, device=device)
            continue
        if space == "cnn" and len(shape) != 3:
            raise ValueError(f"spaces: 'cnn' needs images (n, C, H, W), got inputs of shape {tuple(x_train.shape)}")
        if space == "mlp":
            factory: Any = partial(mlp, prod(shape), outputs)
        elif space == "cnn":
            factory = partial(cnn, shape[0], outputs)
        elif callable(space):
            factory = space
        else:
            raise ValueError(f"spaces: expected 'rbf', 'rbf-unit', 'mlp', 'cnn' or (name, factory), got {space!r}")
        settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "train_tol": tolerance}
        made[name] = NNHypotheses(factory, *data, device=device, workers=workers, **settings)
    eps = ridge_error(*data) if target_error is None else target_error
    return InductiveBiasReport(
        tuple(inductive_bias(one, eps, n_samples=samples, seed=seed, name=name) for name, one in made.items())
    )
