"""CRReLU, and the entropy of activations from which it is derived: the worst bounded activation and the correction.

Sun, Wu, Xia, Chang, Dong, Yuan, Chang, Wang: A Method on Searching Better Activation Functions, 2024,
https://arxiv.org/abs/2405.12954 (ICLR 2025 as "Entropy-based Activation Function Optimization"). No code of the
authors is known.

An increasing activation f maps pre-activations of density p to outputs of density ``q(x) = p(y(x)) y'(x)``, y being its
inverse. The differential entropy of the outputs is a functional of y with the Euler-Lagrange expression
``E = p(y) y''/y' + p'(y) y'``. E = 0 says that the outputs are uniform: f is a scaled distribution function of the
pre-activations, the worst bounded activation ([`wafbc`][classact.nn.wafbc]). Adding ``eta = -E`` to the inverse lowers
the entropy, by ``s int E(x)^2 dx`` for a small step s ([`eafo_step`][classact.nn.eafo_step]).

For the positive half of ReLU and p the standard normal density, eta is ``x p(x)``, and to first order the new
activation is ``x - s x p(x)``. The paper takes the bump ``x exp(-x^2/2)`` with a learnable coefficient, on both sides
of zero. Note the sign: the coefficient that lowers the entropy of standard normal pre-activations is negative, at a
rate of ``1/(2 sqrt 2)`` per unit, while the published initial value of 0.01 raises it.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import simpson
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.special import ndtr, xlogy
from torch import Tensor, nn
from torch.nn import functional as F

ActivationFunction = Callable[[Tensor], Tensor]
Curve = np.ndarray
Restrict = Literal["positive"] | None

FAR = 40.0  # from here on the bump is 0 in every precision, and squares do not overflow


class _CRReLU(torch.autograd.Function):
    """The written-out gradient, which keeps nothing but x and eps; eps is broadcast against x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: Tensor) -> Tensor:
        near = x.clamp(-FAR, FAR)
        bump = near.square().mul_(-0.5).exp_().mul_(near)
        return bump.mul_(eps).add_(x.relu())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, eps = ctx.saved_tensors
        near = x.clamp(-FAR, FAR)
        square = near.square()
        bell = (-0.5 * square).exp()
        of_x = of_eps = None
        if ctx.needs_input_grad[1]:
            of_eps = (grad * bell * near).sum_to_size(eps.shape)
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # the gradient itself will be differentiated
                of_x = grad * (eps * (1 - square) * bell + (x > 0))
            else:
                of_x = square.neg_().add_(1).mul_(bell).mul_(eps).add_(x > 0).mul_(grad)
        return of_x, of_eps


def crrelu(x: Float[Tensor, "*shape"], eps: Float[Tensor, "*one"] | float) -> Float[Tensor, "*shape"]:
    """``max(0, x) + eps x exp(-x^2/2)`` (paper, CRReLU), elementwise.

    The kink of ReLU stays: the slopes at 0 are eps from the left and 1 + eps from the right; the gradient there is eps.
    For x > 0 it increases strictly if and only if -1 < eps < 2.2408; for x < 0 it is not monotone.

    Parameters
    ----------
    x : tensor
        Any shape. Half precision is computed in float32 and returned in half precision.
    eps : tensor or float
        One value, or as many as x has channels (dimension 1).

    Raises
    ------
    TypeError
        If x is not of a floating dtype.
    ValueError
        If the number of values of eps is neither 1 nor that of the channels.

    Examples
    --------
    >>> import torch
    >>> crrelu(torch.tensor([-1.0, 0.0, 1.0]), 0.5)
    tensor([-0.3033,  0.0000,  1.3033])
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {x.dtype}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype)
    coefficient = torch.as_tensor(eps, dtype=dtype, device=x.device)
    if coefficient.numel() == 1:
        coefficient = coefficient.reshape(())
    elif coefficient.ndim != 1 or x.ndim < 2 or x.shape[1] != len(coefficient):
        raise ValueError(
            f"eps: expected one value or one per channel (dimension 1 of x), got shape {tuple(coefficient.shape)} "
            f"for x of shape {tuple(x.shape)}"
        )
    else:
        coefficient = coefficient.reshape(-1, *[1] * (x.ndim - 2))
    if torch.compiler.is_compiling():  # compilers choose themselves what to keep for the backward pass
        near = z.clamp(-FAR, FAR)
        return (z.relu() + coefficient * near * (-0.5 * near * near).exp()).to(x.dtype)
    return _CRReLU.apply(z, coefficient).to(x.dtype)


class CRReLU(nn.Module):
    """[`crrelu`][classact.nn.crrelu] with learnable coefficient, in place of ReLU or GELU.

    Keep `eps` free of weight decay, which would pull it to ReLU; the usual rule that vectors do not decay does so.

    Parameters
    ----------
    eps_init : float
        Initial coefficient; 0.01 in the paper.
    num_parameters : int
        1 as in the paper, or one per channel (dimension 1), as in `torch.nn.PReLU`.
    learnable : bool
        If False, eps is a buffer.

    Raises
    ------
    ValueError
        If `eps_init` is not finite or `num_parameters` is not positive.

    Examples
    --------
    >>> import torch
    >>> activation = CRReLU()
    >>> activation(torch.tensor([-0.5, 0.5])).detach()
    tensor([-0.0044,  0.5044])
    """

    def __init__(self, eps_init: float = 0.01, num_parameters: int = 1, learnable: bool = True) -> None:
        super().__init__()
        if not math.isfinite(eps_init):
            raise ValueError(f"eps_init: expected a finite number, got {eps_init}")
        if num_parameters < 1:
            raise ValueError(f"num_parameters: expected at least 1, got {num_parameters}")
        eps = torch.full((num_parameters,), float(eps_init))
        self.eps: Tensor
        if learnable:
            self.eps = nn.Parameter(eps)
        else:
            self.register_buffer("eps", eps)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it elementwise."""
        return crrelu(x, self.eps)

    def extra_repr(self) -> str:
        """Show what distinguishes it."""
        return f"num_parameters={self.eps.numel()}, learnable={self.eps.requires_grad}"


@runtime_checkable
class Density(Protocol):
    """Density of pre-activations: `grid` covers all of its mass that counts."""

    @property
    def std(self) -> float:
        """Standard deviation."""

    def grid(self) -> Curve:
        """Return evenly spaced, increasing points."""

    def pdf(self, u: Curve) -> Curve:
        """Return p(u)."""

    def derivative(self, u: Curve) -> Curve:
        """Return p'(u)."""

    def cdf(self, u: Curve) -> Curve:
        """Return the integral of p up to u."""


class GaussianDensity:
    """The normal density, as the paper assumes of pre-activations.

    Parameters
    ----------
    mean, std : float
        `std` positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"mean, std: expected finite numbers, std positive, got {mean}, {std}")
        self.mean, self.std = mean, std

    def grid(self) -> Curve:
        """3501 points up to 7 standard deviations from the mean; beyond, a CDF cannot be told from 1."""
        return self.mean + self.std * np.linspace(-7, 7, 3501)

    def pdf(self, u: Curve) -> Curve:
        """Return p(u)."""
        return np.exp(-0.5 * ((u - self.mean) / self.std) ** 2) / (self.std * math.sqrt(2 * math.pi))

    def derivative(self, u: Curve) -> Curve:
        """Return p'(u)."""
        return -(u - self.mean) / self.std**2 * self.pdf(u)

    def cdf(self, u: Curve) -> Curve:
        """Return the integral of p up to u."""
        return ndtr((u - self.mean) / self.std)


class GridDensity:
    """A density given on evenly spaced points, 0 outside, between them monotone cubic.

    Parameters
    ----------
    points : (n,) array
        Evenly spaced, increasing, at least 4.
    values : (n,) array
        Not negative; scaled so that the integral is 1.

    Examples
    --------
    >>> import numpy as np
    >>> density = GridDensity.from_samples(np.random.default_rng(0).standard_normal(10_000))
    >>> density.cdf(np.array([-1.96, 0.0, 1.96])).round(2)
    array([0.03, 0.5 , 0.97])
    """

    def __init__(self, points: Curve, values: Curve) -> None:
        if points.ndim != 1 or points.shape != values.shape or len(points) < 4:
            raise ValueError(
                f"points, values: expected equal shapes (n,), n at least 4, got {points.shape}, {values.shape}"
            )
        steps = np.diff(points)
        if not (steps > 0).all() or not np.allclose(steps, steps[0], rtol=1e-6):
            raise ValueError("points: expected evenly spaced, increasing points")
        if not (values >= 0).all() or not 0 < values.sum() < np.inf:
            raise ValueError("values: expected finite numbers, none negative, some positive")
        mass = float(PchipInterpolator(points, values).integrate(points[0], points[-1]))
        self._points = points
        self._p = PchipInterpolator(points, values / mass)
        self._cdf, self._derivative = self._p.antiderivative(), self._p.derivative()
        u, p = self.grid(), self._p(self.grid())
        mean = simpson(u * p, x=u)
        self.std = float(np.sqrt(simpson((u - mean) ** 2 * p, x=u)))

    @classmethod
    def from_samples(
        cls, samples: Float[Tensor, "*n"] | Curve, bins: int | None = None, bw: float | None = None
    ) -> "GridDensity":
        """Estimate the density of pre-activations.

        Parameters
        ----------
        samples : tensor or array
            Any shape, finite, not all equal.
        bins : int, optional
            Histogram of so many bins, joined through the centres.
        bw : float, optional
            Else a Gaussian kernel estimate of this bandwidth, Silverman's rule by default.
        """
        flat = np.asarray(samples.detach().cpu().double() if isinstance(samples, Tensor) else samples, float).ravel()
        if len(flat) < 2 or not np.isfinite(flat).all() or np.ptp(flat) == 0:
            raise ValueError("samples: expected at least two different finite numbers")
        if bins is not None and bw is not None:
            raise ValueError("bins, bw: give one of them, a histogram has no bandwidth")
        if bins is not None:
            if bins < 2:
                raise ValueError(f"bins: expected at least 2, got {bins}")
            counts, edges = np.histogram(flat, bins)
            width = edges[1] - edges[0]
            centres = edges[0] + width * (np.arange(-1, bins + 1) + 0.5)
            return cls(centres, np.pad(counts.astype(float), 1))
        if bw is None:
            quartiles = np.subtract(*np.percentile(flat, [75, 25])) / 1.349
            spread = min(flat.std(), quartiles) if quartiles > 0 else flat.std()
            bw = float(0.9 * spread * len(flat) ** -0.2)
        if not bw > 0:
            raise ValueError(f"bw: expected a positive number, got {bw}")
        n = int(np.clip(np.ptp(flat) / bw * 16, 512, 16384))
        edges = np.linspace(flat.min() - 5 * bw, flat.max() + 5 * bw, n + 1)
        counts, _ = np.histogram(flat, edges)
        smooth = gaussian_filter1d(counts.astype(float), bw / (edges[1] - edges[0]), mode="constant", truncate=6)
        return cls((edges[1:] + edges[:-1]) / 2, smooth)

    def grid(self) -> Curve:
        """3501 points over the points given."""
        return np.linspace(self._points[0], self._points[-1], 3501)

    def pdf(self, u: Curve) -> Curve:
        """Return p(u)."""
        return np.maximum(self._inside(self._p, u), 0.0)  # rounding

    def derivative(self, u: Curve) -> Curve:
        """Return p'(u)."""
        return self._inside(self._derivative, u)

    def cdf(self, u: Curve) -> Curve:
        """Return the integral of p up to u."""
        return self._cdf(np.clip(u, self._points[0], self._points[-1]))

    def _inside(self, curve: Callable[[Curve], Curve], u: Curve) -> Curve:
        first, last = self._points[0], self._points[-1]
        return np.where((u >= first) & (u <= last), curve(np.clip(u, first, last)), 0.0)


class Activation(nn.Module):
    """A strictly increasing activation given by a table: cubic between the knots, straight beyond them.

    Parameters
    ----------
    knots, values : (n,) tensor
        Strictly increasing, at least 2; float64 keeps the accuracy of the analysis, ``.float()`` makes it quicker.
    slopes : (n,) tensor, optional
        Derivatives at the knots; those of a cubic spline by default. They are limited to what keeps the curve
        increasing (Fritsch and Carlson, 1980).
    """

    def __init__(
        self, knots: Float[Tensor, " n"], values: Float[Tensor, " n"], slopes: Float[Tensor, " n"] | None = None
    ) -> None:
        super().__init__()
        if len(knots) < 2 or values.shape != knots.shape:
            raise ValueError(
                f"knots, values: expected equal shapes (n,), n at least 2, got {tuple(knots.shape)}, "
                f"{tuple(values.shape)}"
            )
        if not (knots.diff() > 0).all() or not (values.diff() > 0).all():
            raise ValueError("knots, values: expected strictly increasing numbers")
        self.knots: Tensor
        self.values: Tensor
        self.slopes: Tensor
        self.register_buffer("knots", knots)
        self.register_buffer("values", values)
        self.register_buffer("slopes", _increasing_slopes(knots, values, slopes))

    @property
    def inverse(self) -> "Activation":
        """The inverse, on the same knots."""
        return Activation(self.values, self.knots, 1 / self.slopes)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it elementwise."""
        return _interpolate(x, self.knots, self.values, self.slopes)


def _increasing_slopes(knots: Tensor, values: Tensor, slopes: Tensor | None = None) -> Tensor:
    if slopes is None:
        spline = CubicSpline(knots.double().cpu().numpy(), values.double().cpu().numpy())
        slopes = torch.from_numpy(spline(knots.double().cpu().numpy(), 1)).to(values)
    secants = values.diff() / knots.diff()
    smaller = torch.minimum(torch.cat([secants[:1], secants]), torch.cat([secants, secants[-1:]]))
    return torch.minimum(torch.maximum(slopes, 0.01 * smaller), 3 * smaller)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Cubic Hermite interpolation with straight tails, in the dtype of the knots."""
    z = x.to(knots.dtype)
    left = torch.bucketize(z.detach(), knots, right=True).clamp(1, len(knots) - 1) - 1
    near = z.clamp(knots[0], knots[-1])
    width = knots[left + 1] - knots[left]
    t = (near - knots[left]) / width
    bend = (1 - t) * slopes[left] * (1 - t) - t * slopes[left + 1] * (1 - t)
    y = values[left] + (values[left + 1] - values[left]) * t * t * (3 - 2 * t) + width * t * bend
    outside = torch.where(z < knots[0], slopes[0], slopes[-1]) * (z - near)
    return (y + outside).to(x.dtype)


def entropy_of(
    activation: ActivationFunction, density: Density, grid: Curve | None = None, restrict: Restrict = None
) -> float:
    """Differential entropy, in nats, of ``activation(U)`` for U of the density: ``H(U) + E[log f'(U)]``.

    Only activations onto the same interval can be compared by it, since scaling the output adds a constant.

    Parameters
    ----------
    activation : callable
        Increasing on the density's support and differentiable by autograd.
    density : Density
        Such as [`GaussianDensity`][classact.nn.GaussianDensity] or [`GridDensity`][classact.nn.GridDensity].
    grid : (n,) array, optional
        Points of the integration; by default the density's.
    restrict : "positive", optional
        Take the density given that U > 0, for activations that increase there only, such as ReLU.

    Raises
    ------
    ValueError
        If the activation is not strictly increasing there.

    Examples
    --------
    >>> import torch
    >>> round(entropy_of(torch.sigmoid, GaussianDensity()), 4)
    -0.1932
    """
    u, p, _ = _support(density, grid, restrict)
    slope = _derivatives(activation, u, 1)[1]
    _check_increasing(slope, p)
    return float(simpson(xlogy(p, slope) - xlogy(p, p), x=u))


def wafbc(density: Density, lo: float = 0.0, hi: float = 1.0) -> Activation:
    """Worst activation function with boundary conditions: ``lo + (hi - lo) P(x)``, P the density's CDF (paper, WAFBC).

    It makes the outputs uniform on [lo, hi], which no increasing activation onto that interval exceeds in entropy.

    Raises
    ------
    ValueError
        If `lo` is not below `hi`.
    """
    if not lo < hi:
        raise ValueError(f"lo, hi: expected lo below hi, got {lo}, {hi}")
    u = density.grid()
    values = lo + (hi - lo) * density.cdf(u)
    kept = np.diff(values, prepend=-np.inf) > 0  # where the density vanishes the CDF stands still
    slopes = (hi - lo) * density.pdf(u)
    return Activation(*(torch.from_numpy(curve[kept]) for curve in (u, values, slopes)))


def eafo_correction(
    activation: ActivationFunction, density: Density, restrict: Restrict = None, smooth: float = 0.0
) -> tuple[Curve, Curve]:
    """Correction of the inverse that lowers the entropy most steeply: ``eta = -E`` (paper, EAFO).

    Added to the inverse with a positive factor it lowers the entropy. In the activation itself it therefore appears
    with a minus sign: for ReLU and standard normal pre-activations, as ``-x exp(-x^2/2)`` up to a positive factor.

    Parameters
    ----------
    activation, density, restrict
        As in [`entropy_of`][classact.nn.entropy_of]; differentiable twice.
    smooth : float
        Smooth eta over the pre-activations with a Gaussian of this width, in standard deviations of the density. The
        descent is a diffusion that runs backwards: whatever is rough in eta grows from step to step.

    Returns
    -------
    grid : (n,) array
        Outputs x = f(u) at the points u of the density's grid.
    eta : (n,) array
        The correction there.

    Raises
    ------
    ValueError
        If the activation is not strictly increasing there or has a kink, where E is a point mass.

    Examples
    --------
    >>> import torch
    >>> x, eta = eafo_correction(torch.relu, GaussianDensity(), restrict="positive")
    >>> bump = x * np.exp(-(x**2) / 2)
    >>> bool(np.allclose(eta, eta.max() / bump.max() * bump, atol=1e-5))
    True
    """
    _, x, eta, *_ = _correct(activation, density, restrict, smooth)
    return x, eta


def eafo_step(
    activation: ActivationFunction,
    density: Density,
    step: float | None = None,
    restrict: Restrict = None,
    smooth: float = 0.0,
) -> Activation:
    """One step of the optimisation: the inverse of ``y + s eta`` (paper, EAFO), found by halving s.

    Parameters
    ----------
    activation, density, restrict, smooth
        As in [`eafo_correction`][classact.nn.eafo_correction].
    step : float, optional
        First s to try, 1 by default. It is halved until the new inverse increases and the entropy is lower: bounded
        activations allow small steps only.

    Returns
    -------
    Activation
        On the whole of the grid, or on its positive part if so restricted.

    Raises
    ------
    ValueError
        As in [`eafo_correction`][classact.nn.eafo_correction], or if no s lowers the entropy, as at the WAFBC.
    """
    if step is not None and not step > 0:
        raise ValueError(f"step: expected a positive number, got {step}")
    found = _descend(activation, density, restrict, smooth, step=1.0 if step is None else step)
    if found is None:
        raise ValueError("step: no step lowers the entropy; the activation is stationary for this density")
    return found[0]


def _descend(
    activation: ActivationFunction,
    density: Density,
    restrict: Restrict,
    smooth: float,
    step: float | None = None,
    change: float = 1.0,
) -> tuple[Activation, float, float] | None:
    """Return the new activation and the entropies before and after, or None if no step lowers the entropy.

    Without a first `step`, it is the one that changes slopes by a part `change`, whatever the scale of in- and outputs.
    """
    u, x, eta, p, mass, slope = _correct(activation, density, restrict, smooth)
    rate = CubicSpline(u, eta)(u, 1)
    before = float(simpson(xlogy(p, slope) - xlogy(p, p), x=u))
    first = change / np.abs(rate).max() if step is None else step
    for halvings in range(40):
        s = first * 0.5**halvings
        moved, stretch = u + s * eta, 1 + s * rate
        if stretch.min() <= 0 or not (np.diff(moved) > 0).all():
            continue
        q = density.pdf(moved) / mass
        if restrict == "positive":
            q = np.where(moved >= 0, q, 0.0)
        after = float(simpson((xlogy(q, slope / stretch) - xlogy(q, q)) * stretch, x=u))
        if before - after > 1e-10:  # less is rounding
            table = (torch.from_numpy(curve) for curve in (moved, x, slope / stretch))
            return Activation(*table), before, after
    return None


def _correct(
    activation: ActivationFunction, density: Density, restrict: Restrict, smooth: float
) -> tuple[Curve, Curve, Curve, Curve, float, Curve]:
    """Pre-activations u, and there f, eta, p, and f'; p is divided by the mass.

    With x = f(u): y' = 1/f' and y''/y' = -f''/f'^2.
    """
    if smooth < 0:
        raise ValueError(f"smooth: expected 0 or more, got {smooth}")
    u, p, mass = _support(density, None, restrict)
    x, first, second = _derivatives(activation, u, 2)
    _check_increasing(first, p)
    jump = np.abs(np.diff(first) - np.diff(u) * (second[1:] + second[:-1]) / 2)
    if (jump > 0.01 * np.abs(first).max()).any():
        at = u[np.argmax(jump)]
        raise ValueError(
            f"activation: expected a differentiable one, got a kink near {at:.3g}; restrict='positive' leaves out a "
            "kink at 0"
        )
    eta = p * second / first**2 - density.derivative(u) / (mass * first)
    if smooth > 0:
        eta = gaussian_filter1d(eta, smooth * density.std / (u[1] - u[0]), mode="nearest")
    return u, x, eta, p, mass, first


def _support(density: Density, grid: Curve | None, restrict: Restrict) -> tuple[Curve, Curve, float]:
    """Points, the density there, and the mass by which it was divided: given that they are positive, if restricted."""
    if restrict not in (None, "positive"):
        raise ValueError(f"restrict: expected None or 'positive', got {restrict!r}")
    u = density.grid() if grid is None else np.asarray(grid, float)
    if u.ndim != 1 or len(u) < 3 or not (np.diff(u) > 0).all():
        raise ValueError("grid: expected at least three increasing points")
    if restrict is None:
        return u, density.pdf(u), 1.0
    if u[-1] <= 0:
        raise ValueError("restrict: the density has no mass above 0")
    if u[0] < 0:
        u = np.linspace(0, u[-1], len(u))
        u[0] = 1e-9 * u[1]  # the slope of ReLU at 0 itself is 0
    p = density.pdf(u)
    mass = float(simpson(p, x=u))
    return u, p / mass, mass


def _derivatives(activation: ActivationFunction, u: Curve, order: int) -> list[Curve]:
    """Values and derivatives of an elementwise function."""
    with torch.enable_grad():
        point = torch.from_numpy(u.astype(float)).requires_grad_()
        curve = activation(point)
        if curve.shape != point.shape:
            raise ValueError(f"activation: expected outputs of shape {tuple(point.shape)}, got {tuple(curve.shape)}")
        curves = [curve]
        for k in range(order):
            if not curve.requires_grad:
                curve = torch.zeros_like(point)
            else:
                curve = torch.autograd.grad(curve.sum(), point, create_graph=k + 1 < order, allow_unused=True)[0]
                curve = torch.zeros_like(point) if curve is None else curve
            curves.append(curve)
    return [curve.detach().numpy() for curve in curves]


def _check_increasing(slope: Curve, p: Curve) -> None:
    if not (slope[p > 0] > 0).all():
        raise ValueError(
            "activation: expected one that increases strictly on the density's support; for ReLU and its kin give "
            "restrict='positive'"
        )


INITIAL: dict[str, ActivationFunction] = {
    "softplus": F.softplus,
    "identity": lambda x: 1.0 * x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class EAFOActivation(nn.Module):
    """An activation that takes EAFO steps while the network trains. The paper names the possibility, and tests nothing.

    The pre-activations are taken to be normal, with running mean and variance. The entropy has no lower bound and the
    descent amplifies roughness, so that steps are small, smoothed and limited in number. The table is no parameter, and
    gradients flow through it to the input only.

    Parameters
    ----------
    init : {"softplus", "identity", "sigmoid", "tanh"} or callable
        Increasing activation to start from.
    update_every : int
        Number of forward passes in training mode between steps. Compiled models do not step by themselves: call
        [`update`][classact.nn.EAFOActivation.update].
    step : float
        Largest relative change of a slope in one step. Unlike s in [`eafo_step`][classact.nn.eafo_step] it does not
        depend on the scale of the pre-activations.
    max_updates : int
        Number of steps after which the activation stays; it also stays once a step lowers the entropy by less than a
        part `tolerance` of its size.
    tolerance : float
        See `max_updates`.
    smooth : float
        As in [`eafo_correction`][classact.nn.eafo_correction].
    momentum : float
        Weight of the new batch in the running statistics.
    span, knots : float, int
        The table has so many evenly spaced knots from -span to span.

    Examples
    --------
    >>> import torch
    >>> activation = EAFOActivation(update_every=2)
    >>> for _ in range(4):
    ...     output = activation(torch.randn(1000))
    >>> int(activation.updates)
    2
    """

    def __init__(
        self,
        init: str | ActivationFunction = "softplus",
        update_every: int = 100,
        step: float = 1e-2,
        max_updates: int = 20,
        tolerance: float = 1e-3,
        smooth: float = 0.5,
        momentum: float = 0.1,
        span: float = 8.0,
        knots: int = 257,
    ) -> None:
        super().__init__()
        if isinstance(init, str) and init not in INITIAL:
            raise ValueError(f"init: expected one of {', '.join(INITIAL)} or a callable, got {init!r}")
        for name, value, least in (("update_every", update_every, 1), ("max_updates", max_updates, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name, size in (("step", step), ("span", span)):
            if not size > 0:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if knots < 8:
            raise ValueError(f"knots: expected at least 8, got {knots}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum}")
        self.update_every, self.step, self.max_updates = update_every, step, max_updates
        self.tolerance, self.smooth, self.momentum = tolerance, smooth, momentum
        points = torch.linspace(-span, span, knots, dtype=torch.float64)
        table = Activation(points, (INITIAL[init] if isinstance(init, str) else init)(points))
        self.knots: Tensor
        self.values: Tensor
        self.slopes: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.batches: Tensor
        self.updates: Tensor
        self.settled: Tensor
        for name, buffer in (
            ("knots", points),
            ("values", table.values),
            ("slopes", table.slopes),
            ("running_mean", torch.tensor(0.0)),
            ("running_var", torch.tensor(1.0)),
            ("batches", torch.tensor(0)),
            ("updates", torch.tensor(0)),
            ("settled", torch.tensor(False)),
        ):
            self.register_buffer(name, buffer)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the present activation; in training mode, follow the statistics of x."""
        if self.training and x.numel():
            with torch.no_grad():
                var, mean = torch.var_mean(x.float(), unbiased=False)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
                self.batches += 1
            if not torch.compiler.is_compiling() and int(self.batches) % self.update_every == 0:
                self.update()
        dtype = torch.promote_types(x.dtype, torch.float32)
        return _interpolate(x, self.knots.to(dtype), self.values.to(dtype), self.slopes.to(dtype))

    @torch.no_grad()
    def update(self) -> bool:
        """Take one step for the running statistics; whether the activation changed."""
        if bool(self.settled) or int(self.updates) >= self.max_updates:
            return False
        density = GaussianDensity(float(self.running_mean), math.sqrt(max(float(self.running_var), 1e-12)))
        points, values, slopes = (buffer.detach().double().cpu() for buffer in (self.knots, self.values, self.slopes))
        try:
            found = _descend(Activation(points, values, slopes), density, None, self.smooth, change=self.step)
        except ValueError:  # too rough for the knots by now, or saturated where the pre-activations are
            found = None
        if found is None or found[1] - found[2] < self.tolerance * abs(found[1]):
            self.settled.fill_(True)
            return False
        values = found[0](points)
        self.values.copy_(values)
        self.slopes.copy_(_increasing_slopes(points, values))
        self.updates += 1
        return True
