"""Proofs about neural activation patterns: no other class inside this pattern and box, no input in two patterns.

The verifier of [`nap`][classact.probe.nap] (Geng et al., ICML 2023, https://arxiv.org/abs/2210.16114). All statements
are about every x of a box that follows a pattern P = (A, D):

- robustness: F_c(x) > F_k(x) for every other class k; the box may be the whole input domain or a ball around an input;
- no ambiguity: no x follows two patterns;
- without a pattern, the ball alone ("data as specification").

What is not proved is refuted by an input, or unknown. Ties count as violations. The region is taken closed, z >= 0 in A
and z <= 0 in D, which holds more inputs than the pattern and so keeps proofs sound.

Proofs do not rest on the tolerances of a solver. Bounds on pre-activations (intervals, and linear bounds passed
backwards through the layers as in DeepPoly and CROWN) are widened by what floating point may have lost. Linear
programmes, with the triangle relaxation of the ReLUs that are not fixed, are solved by HiGHS through
``scipy.optimize.linprog``; of its answer only the multipliers are used, since by weak duality any of them prove a
bound, which is computed anew with its rounding error added. Where the relaxation is too weak, the region is split into
z >= 0 and z <= 0 at a ReLU. A refutation counts only if the network itself, run in float64 on that input, confirms it.

What is proved is proved of the network's function with its weights in exact arithmetic (affine layers without a ReLU
between them, batch normalisation included, are merged in float64). Running it in float32 moves logits and
pre-activations by about 1e-6 of their size: ``margin=1e-4`` and ``activation_margin=-1e-4`` leave room for that.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from torch import Tensor, nn
from torch.nn import functional as F

from classact.probe.nap import NAP, preactivations

Matrix = Any  # (m, n) ndarray, or scipy.sparse.csr_array where most entries are 0
Status = Literal["verified", "counterexample", "empty_region", "unknown"]
Backend = Literal["highs", "intervals", "milp", "marabou"]
Box = tuple[float | Tensor, float | Tensor]

ROUNDING = 2.0**-53
SPARSE = 0.25  # share of entries below which a matrix is kept sparse
COLUMNS = 512  # of a convolution, unrolled at a time
GRID = tuple(0.01 * 1.3**k for k in range(18))


@dataclass(frozen=True, eq=False)
class AffineReLU:
    """A network as W_L relu(... relu(W_1 x + b_1) ...) + b_L, in float64.

    Attributes
    ----------
    layers : tuple of (W, b)
        Each W (n_l, n_{l-1}), dense or ``scipy.sparse.csr_array``, and b (n_l,).
    relus : tuple of str
        Names of the ReLUs after all layers but the last.
    input_shape : tuple of int
        Of one input.
    """

    layers: tuple[tuple[Matrix, np.ndarray], ...]
    relus: tuple[str, ...]
    input_shape: tuple[int, ...]

    @cached_property
    def absolute(self) -> list[Matrix]:
        """The matrices |W|."""
        return [abs(W) for W, _ in self.layers]

    def __call__(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Pre-activations of the hidden layers, and logits, of one flattened input (d,)."""
        hidden = []
        for W, b in self.layers[:-1]:
            hidden.append(W @ x + b)
            x = np.maximum(hidden[-1], 0)
        W, b = self.layers[-1]
        return hidden, W @ x + b


def to_affine_relu(model: nn.Module, input_shape: Sequence[int] | None = None) -> AffineReLU:
    """Write a network as matrices and ReLUs.

    Parameters
    ----------
    model : Sequential
        Of Linear, Conv1d, Conv2d, BatchNorm (in evaluation mode), AvgPool, Flatten, Identity, Dropout and ReLU, nested
        or not. Convolutions are unrolled to sparse matrices.
    input_shape : sequence of int, optional
        Shape of one input; not needed if the first layer is Linear.

    Raises
    ------
    ValueError
        If a layer cannot be written so, which is named; the input shape is missing or does not fit; or the result does
        not compute what the model does.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> net = to_affine_relu(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4))
    >>> [W.shape for W, _ in net.layers], net.relus
    ([(8, 16), (3, 8)], ('1',))
    """
    parts = list(_chain(model, ""))
    if input_shape is None:
        first = next((part for _, part in parts if not isinstance(part, nn.Flatten | nn.Identity)), None)
        if not isinstance(first, nn.Linear):
            raise ValueError(f"input_shape: needed, since {type(first).__name__} does not fix the shape of an input")
        input_shape = (first.in_features,)
    input_shape = shape = tuple(input_shape)
    width = int(np.prod(shape))
    layers: list[tuple[Matrix, np.ndarray]] = []
    relus: list[str] = []
    W: Matrix = None  # of the layer being put together; None is the identity
    b = np.zeros(width)
    for name, part in parts:
        if isinstance(part, nn.ReLU):
            layers.append((sparse.eye_array(len(b), format="csr") if W is None else W, b))
            relus.append(name)
            W, b = None, np.zeros(len(b))
            continue
        try:
            step, offset, shape = _affine(part, shape)
        except RuntimeError as error:
            raise ValueError(f"model: layer {name!r} does not take an input of shape {shape}: {error}") from None
        if step is not None:
            W, b = step if W is None else _compact(step @ W), step @ b + offset
    layers.append((sparse.eye_array(len(b), format="csr") if W is None else W, b))
    net = AffineReLU(tuple(layers), tuple(relus), input_shape)
    _check_parity(_in_float64(model), net)
    return net


def _chain(model: nn.Module, prefix: str) -> Any:
    """The layers of nested Sequentials, with their names."""
    if isinstance(model, nn.Sequential):
        if type(model).forward is not nn.Sequential.forward:
            raise ValueError(
                f"model: cannot encode layer {prefix!r} ({type(model).__name__}), whose forward is its own"
            )
        for name, part in model._modules.items():  # noqa: SLF001 - named_children leaves out a part that comes twice
            yield from _chain(part, f"{prefix}.{name}" if prefix else name)
    elif isinstance(model, AFFINE) and type(model).forward in FORWARDS:
        if getattr(model, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"model: cannot encode layer {prefix!r} with padding mode {model.padding_mode!r}")
        yield prefix, model
    else:
        raise ValueError(
            f"model: cannot encode layer {prefix!r} ({type(model).__name__}); a network for the verifier is an"
            " nn.Sequential of Linear, Conv1d, Conv2d, BatchNorm, AvgPool, Flatten, Identity, Dropout and ReLU"
        )


AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.ReLU),
)
FORWARDS = {kind.forward for kind in AFFINE}  # a subclass may compute anything


def _affine(part: nn.Module, shape: tuple[int, ...]) -> tuple[Matrix | None, np.ndarray, tuple[int, ...]]:
    """Matrix (None for the identity), offset and output shape of a layer, for one input of a shape."""
    none = np.zeros(0)
    if isinstance(part, nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d):
        return None, none, shape
    if isinstance(part, nn.Flatten):
        return None, none, tuple(part(torch.empty(1, *shape)).shape[1:])
    if isinstance(part, nn.Linear):
        if len(shape) != 1:
            raise RuntimeError("put a Flatten before a Linear layer")
        if shape[0] != part.in_features:
            raise RuntimeError(f"it has {part.in_features} inputs")
        W = part.weight.detach().double().cpu().numpy()
        return _compact(W), _bias(part.bias, part.out_features), (part.out_features,)
    if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
        if part.running_mean is None or part.running_var is None:
            raise RuntimeError("it has no running statistics")
        if part.num_features != shape[0]:
            raise RuntimeError(f"it has {part.num_features} channels")
        scale = (part.running_var.double() + part.eps).rsqrt()
        if part.weight is not None:
            scale = scale * part.weight.detach().double()
        shift = -part.running_mean.double() * scale
        if part.bias is not None:
            shift = shift + part.bias.detach().double()
        repeats = int(np.prod(shape[1:]))
        diagonal = np.repeat(scale.cpu().numpy(), repeats)
        return sparse.diags_array(diagonal, format="csr"), np.repeat(shift.cpu().numpy(), repeats), shape
    linear, bias = deepcopy(part).cpu().double(), none
    if isinstance(part, nn.Conv1d | nn.Conv2d):
        bias = _bias(part.bias, part.out_channels)
        linear.register_parameter("bias", None)
    d = int(np.prod(shape))
    columns = []
    with torch.no_grad():
        for chosen in torch.arange(d).split(COLUMNS):
            units = F.one_hot(chosen, d).double().view(-1, *shape)
            output = linear(units)
            columns.append(sparse.csc_array(output.flatten(1).numpy().T))
    out = tuple(output.shape[1:])
    offset = np.repeat(bias, int(np.prod(out[1:]))) if len(bias) else np.zeros(int(np.prod(out)))
    return _compact(sparse.hstack(columns, format="csr")), offset, out


def _bias(bias: Tensor | None, n: int) -> np.ndarray:
    return np.zeros(n) if bias is None else bias.detach().double().cpu().numpy()


def _compact(W: Matrix) -> Matrix:
    nonzero = W.nnz if sparse.issparse(W) else np.count_nonzero(W)
    if nonzero <= SPARSE * W.shape[0] * W.shape[1]:
        return sparse.csr_array(W)
    return W.toarray() if sparse.issparse(W) else W


def _in_float64(model: nn.Module) -> nn.Module:
    return deepcopy(model).cpu().double().eval()


def _check_parity(model: nn.Module, net: AffineReLU) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, int(np.prod(net.input_shape))))
    found = np.array([net(row)[1] for row in x])
    try:
        with torch.no_grad():
            expected = model(torch.from_numpy(x).view(4, *net.input_shape)).flatten(1).numpy()
    except RuntimeError as error:
        raise ValueError(f"net: the model does not take inputs of its shape {net.input_shape}: {error}") from None
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-7, atol=1e-9):
        raise ValueError("model, net: the matrices do not compute what the model does")


# Regions, and bounds on what happens inside them


@dataclass(frozen=True, eq=False)
class _Region:
    """The x in [lo, hi] with floor <= z <= ceiling in every hidden layer; infinite where a neuron is free."""

    lo: np.ndarray
    hi: np.ndarray
    floor: tuple[np.ndarray, ...]
    ceiling: tuple[np.ndarray, ...]

    def split(self, layer: int, neuron: int) -> "tuple[_Region, _Region]":
        """The parts with z <= 0 and z >= 0."""
        ceiling, floor = list(self.ceiling), list(self.floor)
        ceiling[layer], floor[layer] = ceiling[layer].copy(), floor[layer].copy()
        ceiling[layer][neuron] = floor[layer][neuron] = 0.0
        return replace(self, ceiling=tuple(ceiling)), replace(self, floor=tuple(floor))


@dataclass(frozen=True, eq=False)
class _Bounds:
    """Bounds of z in a region, in spite of rounding; `above` is the upper one that its ceilings have not cut."""

    lower: list[np.ndarray]
    upper: list[np.ndarray]
    above: list[np.ndarray]

    def reach(self, region: _Region) -> list[np.ndarray]:
        """Largest |a| of the input and of every hidden layer."""
        return [np.maximum(abs(region.lo), abs(region.hi)), *(np.maximum(u, 0) for u in self.upper)]


def _gamma(n: int) -> float:
    """Bound on the relative error of a sum of n products, several times too large."""
    return 4 * (n + 16) * ROUNDING


def _lines(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The s, t and r of r z <= relu(z) <= s z + t for z in [lower, upper]."""
    free = (lower < 0) & (upper > 0)
    on = (lower >= 0).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.where(free, upper / (upper - lower), on)
    t = np.where(free, np.maximum(-s * lower, (1 - s) * upper) * (1 + 16 * ROUNDING) + 1e-300, 0.0)
    return s, t, np.where(free, upper > -lower, on)


def _upper(
    net: AffineReLU, region: _Region, lower: list[np.ndarray], upper: list[np.ndarray], A: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """Upper bounds (m,) of A a + c, for the activations a of the last layer that has bounds, passed back to the input.

    An entry of a computed matrix may be off by gamma times the sum of the magnitudes that it was summed from; times the
    largest value of the activation, that is added to the bound.
    """
    reach = _Bounds(lower, upper, upper).reach(region)
    error = np.zeros(len(A))
    for i in reversed(range(len(lower))):
        W, b = net.layers[i]
        s, t, r = _lines(lower[i], upper[i])
        positive = np.maximum(A, 0)
        Z = positive * s + (A - positive) * r
        scale = abs(Z) @ (net.absolute[i] @ reach[i] + abs(b)) + positive @ t + abs(c)
        error += _gamma(sum(W.shape)) * scale
        c = c + positive @ t + Z @ b
        A = Z @ W
    middle, radius = (region.lo + region.hi) / 2, (region.hi - region.lo) / 2
    error += _gamma(A.shape[1]) * (abs(A) @ reach[0] + abs(c))
    return A @ middle + abs(A) @ radius + c + error * (1 + 1e-6)


@np.errstate(over="ignore", invalid="ignore")
def _propagate(net: AffineReLU, region: _Region, within: _Bounds | None = None, linear: bool = True) -> _Bounds | None:
    """Bounds of all z in a region, at least as good as those of a region that holds it; None if the region is empty."""
    lower: list[np.ndarray] = []
    upper: list[np.ndarray] = []
    above = []
    a_lo, a_hi, reach = region.lo, region.hi, np.maximum(abs(region.lo), abs(region.hi))
    for i, (W, b) in enumerate(net.layers[:-1]):
        centre, spread = W @ ((a_lo + a_hi) / 2) + b, net.absolute[i] @ ((a_hi - a_lo) / 2)
        error = _gamma(W.shape[1]) * (net.absolute[i] @ reach + abs(b))
        zl, zu = centre - spread - error, centre + spread + error
        if linear and i:
            open_ = np.flatnonzero(np.minimum(zu, region.ceiling[i]) > 0)
            if len(open_):
                rows = W[open_].toarray() if sparse.issparse(W) else W[open_]
                both = _upper(
                    net, region, lower, upper, np.concatenate([rows, -rows]), np.concatenate([b[open_], -b[open_]])
                )
                zu[open_] = np.minimum(zu[open_], both[: len(open_)])
                zl[open_] = np.maximum(zl[open_], -both[len(open_) :])
        if within is not None:
            zl, zu = np.maximum(zl, within.lower[i]), np.minimum(zu, within.above[i])
        if not np.isfinite(zu - zl).all():
            raise ValueError("box: too large, bounds of what happens in it overflow")
        above.append(zu)
        zl, zu = np.maximum(zl, region.floor[i]), np.minimum(zu, region.ceiling[i])
        if (zl > zu).any():
            return None
        lower.append(zl)
        upper.append(zu)
        a_lo, a_hi = np.maximum(zl, 0), np.maximum(zu, 0)
        reach = a_hi
    return _Bounds(lower, upper, above)


class _Goal(NamedTuple):
    """The violation row . a + c >= 0 of last hidden activations a; `size` bounds the magnitudes the row came from."""

    row: np.ndarray
    c: float
    size: np.ndarray


class _Relaxation:
    """The linear programme of a region: z = W a + b, exact where a ReLU is fixed, else the triangle around it.

    Columns are x, then for every layer z of the neurons that may be on, and a of those that are not fixed. Every column
    has finite bounds, so that any multipliers prove a bound.
    """

    def __init__(self, net: AffineReLU, region: _Region, bounds: _Bounds) -> None:
        self.low, self.high = [region.lo], [region.hi]
        equal: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        below: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        right_equal, right_below = [], []
        live, columns = np.arange(len(region.lo)), np.arange(len(region.lo))
        n, n_equal, n_below = len(region.lo), 0, 0
        self.free: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # neurons, columns of z and of a
        for i, (W, b) in enumerate(net.layers[:-1]):
            zl, zu = bounds.lower[i], bounds.upper[i]
            on = np.flatnonzero(zu > 0)
            off = np.flatnonzero((zu <= 0) & (bounds.above[i] > region.ceiling[i]))
            z = n + np.arange(len(on))
            n += len(on)
            row, column, value = _entries(W, on, live)
            equal.append((row + n_equal, columns[column], -value))
            equal.append((np.arange(len(on)) + n_equal, z, np.ones(len(on))))
            right_equal.append(b[on])
            n_equal += len(on)
            row, column, value = _entries(W, off, live)
            below.append((row + n_below, columns[column], value))
            right_below.append(region.ceiling[i][off] - b[off])
            n_below += len(off)
            self.low.append(zl[on])
            self.high.append(zu[on])
            s, t, _ = _lines(zl[on], zu[on])
            free = np.flatnonzero(zl[on] < 0)
            a = n + np.arange(len(free))
            n += len(free)
            k, one = np.arange(len(free)), np.ones(len(free))
            below += [(k + n_below, z[free], one), (k + n_below, a, -one)]
            below += [(k + n_below + len(free), a, one), (k + n_below + len(free), z[free], -s[free])]
            right_below += [np.zeros(len(free)), t[free]]
            n_below += 2 * len(free)
            self.low.append(np.zeros(len(free)))
            self.high.append(zu[on][free])
            self.free.append((on[free], z[free], a))
            columns = z.copy()
            columns[free] = a
            live = on
        self.live, self.columns, self.n = live, columns, n
        self.l, self.u = np.concatenate(self.low), np.concatenate(self.high)
        self.equal, self.b_equal = _matrix(equal, n_equal, n), np.concatenate(right_equal or [np.zeros(0)])
        self.below, self.b_below = _matrix(below, n_below, n), np.concatenate(right_below or [np.zeros(0)])
        self.reach = np.maximum(abs(self.l), abs(self.u))

    def solve(self, goal: _Goal | None, seconds: float) -> "tuple[float, np.ndarray | None]":
        """A proved upper bound of the goal in the region, -inf if that is empty, and a point of the relaxation."""
        q = np.zeros(self.n)
        if goal is not None:
            q[self.columns] = goal.row[self.live]
        bounds = np.stack([self.l, self.u], 1)
        found = _linprog(-q, self.below, self.b_below, self.equal, self.b_equal, bounds, seconds)
        if found.status == 0:
            return self._proved(q, goal, found.ineqlin.marginals, found.eqlin.marginals), found.x
        if found.status == 2 and self._proved_empty(seconds):
            return -np.inf, None
        return np.inf, None

    def _proved(self, q: np.ndarray, goal: _Goal | None, y: np.ndarray, w: np.ndarray) -> float:
        """Weak duality: q.v <= y.b + w.b' + max over the bounds of (q - A'y - E'w).v, for any y >= 0 and w."""
        y, w = np.maximum(-y, 0), -w
        r = q - self.below.T @ y - self.equal.T @ w
        c, size = (
            (0.0, 0.0)
            if goal is None
            else (goal.c, float(goal.size[self.live] @ self.reach[self.columns]) + abs(goal.c))
        )
        bound = y @ self.b_below + w @ self.b_equal + np.maximum(r * self.l, r * self.u).sum() + c
        scale = y @ (abs(self.below) @ self.reach + abs(self.b_below)) + size
        scale += abs(w) @ (abs(self.equal) @ self.reach + abs(self.b_equal)) + abs(r) @ self.reach
        return float(bound + _gamma(self.n + len(y) + len(w)) * scale)

    def _proved_empty(self, seconds: float) -> bool:
        """Whether the least sum of violations of the rows is proved to be above 0."""
        m, k = len(self.b_below), len(self.b_equal)
        below = sparse.hstack([self.below, -sparse.eye_array(m), sparse.csr_array((m, 2 * k))], format="csr")
        plus = sparse.eye_array(k)
        equal = sparse.hstack([self.equal, sparse.csr_array((k, m)), plus, -plus], format="csr")
        slack = m + 2 * k
        cost = np.concatenate([np.zeros(self.n), np.ones(slack)])
        bounds = np.stack(
            [np.concatenate([self.l, np.zeros(slack)]), np.concatenate([self.u, np.full(slack, np.inf)])], 1
        )
        found = _linprog(cost, below, self.b_below, equal, self.b_equal, bounds, seconds)
        if found.status != 0:
            return False
        return self._proved(np.zeros(self.n), None, found.ineqlin.marginals, found.eqlin.marginals) < 0


def _entries(W: Matrix, rows: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    part = sparse.coo_array(W[rows][:, live])
    return part.row, part.col, part.data


def _matrix(entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]], rows: int, n: int) -> sparse.csr_array:
    row, column, value = (np.concatenate([part[i] for part in entries] or [np.zeros(0)]) for i in range(3))
    return sparse.csr_array((value, (row.astype(int), column.astype(int))), shape=(rows, n))


def _linprog(c: np.ndarray, A: Any, b: np.ndarray, E: Any, f: np.ndarray, bounds: np.ndarray, seconds: float) -> Any:
    options = {"time_limit": max(seconds, 0.01)}
    return linprog(c, A_ub=A, b_ub=b, A_eq=E, b_eq=f, bounds=bounds, method="highs", options=options)


# Deciding


@dataclass(eq=False)
class _Query:
    """Is there an x in the region with row . a >= 0 (if there is a goal), and how to check that one is right."""

    net: AffineReLU
    region: _Region
    goal: _Goal | None
    confirmed: Callable[[np.ndarray], bool]
    deadline: float
    max_splits: int | None = None
    splits: int = 0

    @property
    def seconds(self) -> float:
        return self.deadline - time.perf_counter()

    def violation(self, x: np.ndarray) -> float:
        """Row . a + c at an input; 0 without a goal."""
        if self.goal is None:
            return 0.0
        hidden, _ = self.net(x)
        last = np.maximum(hidden[-1], 0) if hidden else x
        return float(self.goal.row @ last + self.goal.c)

    def witness(self, x: np.ndarray) -> np.ndarray | None:
        """An input that answers the query: this one, or another where the network is linear as it is here.

        Vertices of a linear programme lie on the boundary of the region; to be confirmed, one must lie inside.
        """
        x = x.clip(self.region.lo, self.region.hi)
        if self.violation(x) >= 0 and self.confirmed(x):
            return x
        hidden, _ = self.net(x)
        scale = max(1.0, abs(self.goal.c) if self.goal else 1.0)
        if self.violation(x) < -1e-5 * scale or not self._near(hidden):
            return None
        for open_goal in (True, False) if self.goal else (False,):
            inner = self._inside(hidden, open_goal)
            if inner is not None:
                inner = inner.clip(self.region.lo, self.region.hi)
                if self.violation(inner) >= 0 and self.confirmed(inner):
                    return inner
        return None

    def _near(self, hidden: list[np.ndarray]) -> bool:
        sides = zip(hidden, self.region.floor, self.region.ceiling, strict=True)
        return all(bool((z >= floor - 1e-5).all() and (z <= ceiling + 1e-5).all()) for z, floor, ceiling in sides)

    def _inside(self, hidden: list[np.ndarray], open_goal: bool) -> np.ndarray | None:
        """The point deepest inside the pattern (and the violation), on the linear piece with these signs."""
        d = len(self.region.lo)
        M: Matrix = sparse.eye_array(d, format="csr")
        m = np.zeros(d)
        rows, right, depth = [], [], []
        for (W, b), z, floor, ceiling in zip(
            self.net.layers, hidden, self.region.floor, self.region.ceiling, strict=False
        ):
            M, m = W @ M, W @ m + b
            M = M.toarray() if sparse.issparse(M) else M
            on = ((z > 0) | (floor >= 0)) & ~(ceiling <= 0)
            sign = np.where(on, 1.0, -1.0)
            rows.append(-sign[:, None] * M)
            right.append(sign * m)
            depth.append(np.zeros(len(m)))
            for clip, side in ((floor, 1.0), (ceiling, -1.0)):
                fixed = np.isfinite(clip)
                rows.append(-side * M[fixed])
                right.append(side * (m - clip)[fixed])
                depth.append(np.ones(int(fixed.sum())))
            M, m = on[:, None] * M, on * m
        if self.goal is not None:
            rows.append(-(self.goal.row @ M)[None])
            right.append(np.array([self.goal.row @ m + self.goal.c]))
            depth.append(np.array([float(open_goal)]))
        A = np.concatenate([np.concatenate(rows), np.concatenate(depth)[:, None]], 1) if rows else None
        ends = np.concatenate(right) if right else None
        cost = np.zeros(d + 1)
        cost[-1] = -1.0
        bounds = np.stack([np.append(self.region.lo, 0.0), np.append(self.region.hi, 1.0)], 1)
        options = {"time_limit": max(self.seconds, 0.01)}
        found = linprog(cost, A_ub=A, b_ub=ends, bounds=bounds, method="highs", options=options)
        return found.x[:-1] if found.status == 0 else None


Answer = tuple[Literal["no", "yes", "unknown"], np.ndarray | None]
Start = tuple[_Bounds, _Relaxation]


def _search(query: _Query, start: Start | None) -> Answer:
    """Branch and bound over the ReLUs that are not fixed; `start` is the whole region, None if that is empty."""
    if start is None:
        return "no", None
    stack: list[tuple[_Region, _Bounds, _Relaxation | None]] = [(query.region, *start)]
    unsettled = False
    while stack:
        region, bounds, relaxation = stack.pop()
        if query.seconds <= 0:
            return "unknown", None
        if query.goal is not None:
            A, c = query.goal.row[None], np.array([query.goal.c])
            slip = 4 * ROUNDING * float(query.goal.size @ bounds.reach(region)[-1])
            if _upper(query.net, region, bounds.lower, bounds.upper, A, c)[0] + slip < 0:
                continue
        relaxation = relaxation or _Relaxation(query.net, region, bounds)
        best, point = relaxation.solve(query.goal, query.seconds)
        if best < 0:
            continue
        if point is not None:
            found = query.witness(point[: len(region.lo)])
            if found is not None:
                return "yes", found
        chosen = _branch(bounds, relaxation, point)
        if chosen is None or (query.max_splits is not None and query.splits >= query.max_splits):
            unsettled = True
            continue
        query.splits += 1
        for part in region.split(*chosen):
            inner = _propagate(query.net, part, bounds)
            if inner is not None:
                stack.append((part, inner, None))
    return ("unknown" if unsettled else "no"), None


def _branch(bounds: _Bounds, relaxation: _Relaxation, point: np.ndarray | None) -> tuple[int, int] | None:
    """The free ReLU whose relaxation is farthest from the truth at a point; without any gap, the widest one."""
    best, chosen = 1e-9, None
    wide, widest = 0.0, None
    for i, (neurons, z, a) in enumerate(relaxation.free):
        if not len(neurons):
            continue
        width = np.minimum(bounds.upper[i][neurons], -bounds.lower[i][neurons])
        if width.max() > wide:
            wide, widest = float(width.max()), (i, int(neurons[width.argmax()]))
        if point is not None:
            gap = point[a] - np.maximum(point[z], 0)
            if gap.max() > best:
                best, chosen = float(gap.max()), (i, int(neurons[gap.argmax()]))
    return chosen or widest


def _intervals(query: _Query, start: Start | None) -> Answer:  # noqa: ARG001
    """Interval arithmetic alone."""
    bounds = _propagate(query.net, query.region, linear=False)
    if bounds is None:
        return "no", None
    if query.goal is None:
        return "unknown", None
    row, reach = query.goal.row, bounds.reach(query.region)[-1]
    high, low = (
        (bounds.upper[-1].clip(0), bounds.lower[-1].clip(0)) if bounds.upper else (query.region.hi, query.region.lo)
    )
    top = float(np.maximum(row * high, row * low).sum() + query.goal.c)
    top += _gamma(len(row)) * float(query.goal.size @ reach + abs(query.goal.c))
    return ("no" if top < 0 else "unknown"), None


def _milp(query: _Query, start: Start | None) -> Answer:  # noqa: ARG001
    """A mixed-integer programme: for a free neuron a >= 0, a >= z, a <= z - l (1 - p), a <= u p with p in {0, 1}."""
    bounds = _propagate(query.net, query.region, linear=False)
    if bounds is None:
        return "no", None
    d, hidden = len(query.region.lo), query.net.layers[:-1]
    low, high, integer = [query.region.lo], [query.region.hi], [np.zeros(d)]
    previous, rows, below, above = 0, [], [], []  # blocks of columns: x, then z, a and p of every layer
    for i, (W, b) in enumerate(hidden):
        zl, zu, none = bounds.lower[i], bounds.upper[i], np.zeros(len(b))
        z, a, p = 3 * i + 1, 3 * i + 2, 3 * i + 3
        low += [zl, none, (zl >= 0) & (zu > 0)]
        high += [zu, np.maximum(zu, 0), zu > 0]
        integer += [none, none, none + 1]
        eye, down, up = sparse.eye_array(len(b)), np.minimum(zl, 0), np.maximum(zu, 0)
        rows += [{z: eye, previous: -sparse.csr_array(W)}, {a: eye, z: -eye}]
        rows += [{a: eye, z: -eye, p: sparse.diags_array(-down)}, {a: eye, p: sparse.diags_array(-up)}]
        below += [b, none, none - np.inf, none - np.inf]
        above += [b, none + np.inf, -down, none]
        previous = a
    if query.goal is not None:
        rows.append({previous: sparse.csr_array(query.goal.row[None])})
        below.append(np.array([-query.goal.c]))
        above.append(np.array([np.inf]))
    grid = [[row.get(block) for block in range(3 * len(hidden) + 1)] for row in rows]
    matrix = sparse.block_array(grid, format="csr") if rows else sparse.csr_array((0, d))
    found = milp(
        np.zeros(matrix.shape[1]),
        integrality=np.concatenate(integer),
        bounds=Bounds(np.concatenate(low), np.concatenate(high)),
        constraints=LinearConstraint(matrix, np.concatenate(below), np.concatenate(above)) if rows else (),
        options={"time_limit": max(query.seconds, 0.01)},
    )
    if found.status == 2:
        return "no", None
    x = None if found.x is None else query.witness(found.x[:d])
    return ("unknown", None) if x is None else ("yes", x)


def _marabou(query: _Query, start: Start | None) -> Answer:  # noqa: ARG001
    """The solver of the paper."""
    try:
        from maraboupy import Marabou, MarabouCore
    except ModuleNotFoundError as error:
        message = "backend='marabou' needs the package maraboupy (PyPI has wheels for Linux and Python up to 3.11)"
        raise ModuleNotFoundError(message, name="maraboupy") from error
    bounds = _propagate(query.net, query.region, linear=False)
    if bounds is None:
        return "no", None
    ask = MarabouCore.InputQuery()
    d = len(query.region.lo)
    widths = [len(b) for _, b in query.net.layers[:-1]]
    ask.setNumberOfVariables(d + 2 * sum(widths))
    for j in range(d):
        ask.setLowerBound(j, float(query.region.lo[j]))
        ask.setUpperBound(j, float(query.region.hi[j]))
        ask.markInputVariable(j, j)
    previous, n = np.arange(d), d
    for i, (W, b) in enumerate(query.net.layers[:-1]):
        W = W.toarray() if sparse.issparse(W) else W
        z, a = n + np.arange(len(b)), n + len(b) + np.arange(len(b))
        n += 2 * len(b)
        for j in range(len(b)):
            equation = MarabouCore.Equation()
            for column, value in zip(previous, W[j], strict=True):
                equation.addAddend(float(value), int(column))
            equation.addAddend(-1.0, int(z[j]))
            equation.setScalar(-float(b[j]))
            ask.addEquation(equation)
            ask.setLowerBound(int(z[j]), float(bounds.lower[i][j]))
            ask.setUpperBound(int(z[j]), float(bounds.upper[i][j]))
            MarabouCore.addReluConstraint(ask, int(z[j]), int(a[j]))
        previous = a
    if query.goal is not None:
        equation = MarabouCore.Equation(MarabouCore.Equation.GE)
        for column, value in zip(previous, query.goal.row, strict=True):
            equation.addAddend(float(value), int(column))
        equation.setScalar(-float(query.goal.c))
        ask.addEquation(equation)
    limit = max(1, int(np.ceil(query.seconds)))
    options = Marabou.createOptions(verbosity=0, numWorkers=1, timeoutInSeconds=limit)
    status, values, _ = MarabouCore.solve(ask, options)
    if status == "unsat":
        return "no", None
    x = query.witness(np.array([values[j] for j in range(d)])) if status == "sat" else None
    return ("unknown", None) if x is None else ("yes", x)


BACKENDS: Mapping[str, Callable[[_Query, Start | None], Answer]] = {
    "highs": _search,
    "intervals": _intervals,
    "milp": _milp,
    "marabou": _marabou,
}


@dataclass(frozen=True, eq=False)
class Verdict:
    """Outcome of a verification.

    Attributes
    ----------
    status : {"verified", "counterexample", "empty_region", "unknown"}
        ``"empty_region"`` where no input of the box follows the pattern: nothing to be robust. ``"unknown"`` where
        time or splits ran out, or a solver's answer could not be confirmed.
    witness : Tensor or None
        A counter-example, float64 in the shape of an input: run the network on it.
    follower : Tensor or None
        An input of the region, which shows that it is not empty.
    per_class : dict
        What was found for each competitor, as far as it was looked at: ``"verified"``, ``"counterexample"`` or
        ``"unknown"``.
    seconds : float
        Time taken.
    splits : int
        ReLUs on which the region was split.
    """

    status: Status
    witness: Tensor | None = None
    follower: Tensor | None = None
    per_class: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    splits: int = 0


class _Problem:
    """What the statements share: the network as matrices, the region, and the network itself to confirm inputs."""

    def __init__(
        self,
        model: nn.Module,
        naps: Sequence[NAP],
        box: Box,
        backend: Backend,
        time_limit: float,
        activation_margin: float,
        max_splits: int | None,
        net: AffineReLU | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if not time_limit > 0:
            raise ValueError(f"time_limit: expected a positive number of seconds, got {time_limit}")
        if not np.isfinite(activation_margin):
            raise ValueError(f"activation_margin: expected a finite number, got {activation_margin}")
        if max_splits is not None and max_splits < 0:
            raise ValueError(f"max_splits: expected 0 or more, got {max_splits}")
        self.started = time.perf_counter()
        self.deadline = self.started + time_limit
        self.backend, self.max_splits, self.margin = BACKENDS[backend], max_splits, activation_margin
        self.linear = backend == "highs"
        shapes = [tuple(end.shape) for end in box if isinstance(end, Tensor) and end.ndim]
        self.net = net or to_affine_relu(model, shapes[0] if shapes else None)
        self.model, self.naps = _in_float64(model), naps
        if net is not None:
            _check_parity(self.model, net)
        lo, hi = (self._end(end) for end in box)
        if not (np.isfinite(lo).all() and np.isfinite(hi).all() and (lo <= hi).all()):
            raise ValueError("box: expected finite ends with lo <= hi")
        self.region = _Region(lo, hi, *self._clips(model))
        self.splits = 0
        self.start: Start | None = None
        if self.linear:
            free = tuple(np.full(len(b), np.inf) for _, b in self.net.layers[:-1])
            outer = _propagate(self.net, _Region(lo, hi, tuple(-part for part in free), free))
            inner = _propagate(self.net, self.region, outer)
            if inner is not None:
                self.start = inner, _Relaxation(self.net, self.region, inner)

    def _end(self, end: float | Tensor) -> np.ndarray:
        d = int(np.prod(self.net.input_shape))
        if not isinstance(end, Tensor) or end.ndim == 0:
            return np.full(d, float(end))
        if tuple(end.shape) != self.net.input_shape:
            raise ValueError(f"box: expected the shape {self.net.input_shape} of one input, got {tuple(end.shape)}")
        return end.detach().double().cpu().flatten().numpy()

    def _clips(self, model: nn.Module) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        floor = [np.full(len(b), -np.inf) for _, b in self.net.layers[:-1]]
        ceiling = [np.full(len(b), np.inf) for _, b in self.net.layers[:-1]]
        for nap in self.naps:
            nap.check_model(model)
            begin = 0
            for name, width in nap.layout:
                if name not in self.net.relus or width != len(floor[self.net.relus.index(name)]):
                    there = ", ".join(f"{relu} ({len(part)})" for relu, part in zip(self.net.relus, floor, strict=True))
                    raise ValueError(f"nap: no ReLU {name!r} of width {width}; the network has {there}")
                i, part = self.net.relus.index(name), slice(begin, begin + width)
                floor[i][nap.active[part].numpy()] = self.margin
                ceiling[i][nap.inactive[part].numpy()] = -self.margin
                begin += width
        return tuple(floor), tuple(ceiling)

    def follows(self, x: np.ndarray) -> bool:
        """Whether the network itself, in float64, says that an input is in the box and follows every pattern."""
        if not ((x >= self.region.lo) & (x <= self.region.hi)).all():
            return False
        if not self.naps:
            return True
        names = [name for name, _ in self.naps[0].layout]
        z = preactivations(self.model, self.tensor(x).unsqueeze(0), names).z
        return all(bool(nap.follows(z, self.margin)[0]) for nap in self.naps)

    def violates(self, x: np.ndarray, target: int, k: int, margin: float) -> bool:
        with torch.no_grad():
            logits = self.model(self.tensor(x).unsqueeze(0))[0]
        return bool(logits[k] + margin >= logits[target])

    def tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.copy()).view(self.net.input_shape)

    def ask(self, goal: _Goal | None, confirmed: Callable[[np.ndarray], bool]) -> Answer:
        query = _Query(self.net, self.region, goal, confirmed, self.deadline, self.max_splits)
        answer = self.backend(query, self.start)
        self.splits += query.splits
        return answer

    def member(self, given: Tensor | None) -> Answer:
        """Find an input of the region."""
        for x in [(self.region.lo + self.region.hi) / 2, *([] if given is None else [self._end(given)])]:
            if self.follows(x):
                return "yes", x
        if given is not None:
            raise ValueError("follower: expected an input in the box that follows the pattern")
        return self.ask(None, self.follows)

    def verdict(self, status: Status, witness: Any = None, follower: Any = None, **rest: Any) -> Verdict:
        x, y = (None if part is None else self.tensor(part) for part in (witness, follower))
        return Verdict(status, x, y, seconds=time.perf_counter() - self.started, splits=self.splits, **rest)


def verify_nap(
    model: nn.Module,
    nap: NAP | None,
    target: int,
    box: Box = (0.0, 1.0),
    competitors: Sequence[int] | None = None,
    *,
    backend: Backend = "highs",
    time_limit: float = 30.0,
    margin: float = 0.0,
    activation_margin: float = 0.0,
    max_splits: int | None = None,
    follower: Tensor | None = None,
    stop_early: bool = False,
    net: AffineReLU | None = None,
) -> Verdict:
    """Prove that every input of a box that follows a pattern is classified as `target`, or find one that is not.

    Parameters
    ----------
    model : Sequential
        As for [`to_affine_relu`][classact.probe.to_affine_relu]; left as it was.
    nap : NAP or None
        The pattern; None for the box alone.
    target : int
        The class c of which ``F_c(x) > F_k(x) + margin`` is to be proved.
    box : (lo, hi)
        Each a number or a tensor in the shape of one input.
    competitors : sequence of int, optional
        The classes k; all others by default.
    backend : {"highs", "intervals", "milp", "marabou"}
        ``"highs"``: linear programmes and branching, with proofs that hold in spite of rounding. ``"intervals"``:
        interval arithmetic alone, which proves as safely, but little, and finds nothing. ``"milp"``, HiGHS on a
        mixed-integer programme, and ``"marabou"``, the paper's solver (``pip install maraboupy``), are here to
        compare with: their proofs rest on the tolerances of the solver.
    time_limit : float
        Seconds for the whole call.
    margin : float
        Demand more than a tie.
    activation_margin : float
        m: the region is z >= m in A and z <= -m in D; positive to take less, negative to take more than the pattern.
    max_splits : int, optional
        Branchings of ``"highs"`` for each competitor; 0 leaves the relaxation alone.
    follower : Tensor, optional
        An input in the region, if one is known; it saves looking for one. The centre of the box is tried anyhow.
    stop_early : bool
        Stop at the first competitor that is not verified, rather than at the first counter-example.
    net : AffineReLU, optional
        What `to_affine_relu` returned for this model, to save the work.

    Raises
    ------
    ValueError
        If the network has a layer that cannot be encoded, the pattern is of another network, or an argument is out of
        range.

    Examples
    --------
    F(x) = (relu(x), 0.5) says class 0 above 0.5 only, so being on is not enough from -1 on:

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    >>> state = {"0.weight": [[1.0]], "0.bias": [0.0], "2.weight": [[1.0], [0.0]], "2.bias": [0.0, 0.5]}
    >>> _ = model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    >>> P = NAP(torch.tensor([True]), torch.tensor([False]), (("1", 1),))
    >>> verify_nap(model, P, 0, (0.6, 1.0)).status
    'verified'
    >>> found = verify_nap(model, P, 0, (-1.0, 1.0))
    >>> found.status, bool(0 < found.witness <= 0.5)
    ('counterexample', True)
    >>> verify_nap(model, P, 0, (-1.0, -0.1)).status
    'empty_region'
    """
    naps = [] if nap is None else [nap]
    problem = _Problem(model, naps, box, backend, time_limit, activation_margin, max_splits, net)
    W, b = problem.net.layers[-1]
    n = len(b)
    others = [k for k in range(n) if k != target] if competitors is None else list(competitors)
    if not 0 <= target < n:
        raise ValueError(f"target: expected a class from 0 to {n - 1}, got {target}")
    if not others:
        raise ValueError("competitors: expected at least one class")
    if wrong := [k for k in others if not 0 <= k < n or k == target]:
        raise ValueError(f"competitors: expected classes from 0 to {n - 1} other than {target}, got {wrong[0]}")
    if not np.isfinite(margin):
        raise ValueError(f"margin: expected a finite number, got {margin}")
    answer, inside = problem.member(follower)
    if answer == "no":
        return problem.verdict("empty_region")
    rows = W[[target, *others]]
    rows = rows.toarray() if sparse.issparse(rows) else rows
    found: dict[int, str] = {}
    for k, row in zip(others, rows[1:], strict=True):
        c = float(b[k] - b[target] + margin)
        size = abs(row) + abs(rows[0])
        goal = _Goal(row - rows[0], c + 4 * ROUNDING * float(abs(b[k]) + abs(b[target]) + abs(margin)), size)

        def confirmed(x: np.ndarray, k: int = k) -> bool:
            return problem.follows(x) and problem.violates(x, target, k, margin)

        answer, witness = problem.ask(goal, confirmed)
        found[k] = {"no": "verified", "yes": "counterexample", "unknown": "unknown"}[answer]
        if answer == "yes":
            return problem.verdict(
                "counterexample", witness, inside if inside is not None else witness, per_class=found
            )
        if stop_early and answer != "no":
            break
    proved = inside is not None and all(status == "verified" for status in found.values())
    return problem.verdict("verified" if proved else "unknown", None, inside, per_class=found)


def verify_non_ambiguity(
    model: nn.Module,
    first: NAP,
    second: NAP,
    box: Box = (0.0, 1.0),
    *,
    backend: Backend = "highs",
    time_limit: float = 30.0,
    activation_margin: float = 0.0,
    max_splits: int | None = None,
    net: AffineReLU | None = None,
) -> Verdict:
    """Prove that no input of a box follows two patterns, or find one that does (the ``witness``).

    Where one wants a neuron on and the other off there is nothing to solve, unless a negative `activation_margin` lets
    both have it near 0. Other arguments are those of [`verify_nap`][classact.probe.verify_nap].

    Raises
    ------
    ValueError
        If the patterns are over different layers, or an argument is wrong as there.
    """
    if bool(first.conflicts(second).any()) and activation_margin >= 0:
        for nap in (first, second):
            nap.check_model(model)
        return Verdict("verified")
    problem = _Problem(model, [first, second], box, backend, time_limit, activation_margin, max_splits, net)
    answer, x = problem.member(None)
    status: Status = {"no": "verified", "yes": "counterexample", "unknown": "unknown"}[answer]  # type: ignore[assignment]
    return problem.verdict(status, x)


@dataclass(frozen=True, eq=False)
class VerifiedRadius:
    """The largest radius of a ball around an input that was verified, and what was found at each that was tried.

    Attributes
    ----------
    radius : float
        0 if not even the smallest was verified.
    tried : dict
        Radius -> [`Verdict`][classact.probe.Verdict], in rising order.
    """

    radius: float
    tried: dict[float, Verdict]


def max_verified_radius(
    model: nn.Module,
    x: Tensor,
    target: int,
    nap: NAP | None = None,
    *,
    grid: Sequence[float] = GRID,
    tol: float | None = None,
    domain: Box = (0.0, 1.0),
    net: AffineReLU | None = None,
    **options: Any,
) -> VerifiedRadius:
    """Largest radius of an L-infinity ball around an input, cut to the domain, that can be verified.

    Parameters
    ----------
    model, target, nap, net
        As for [`verify_nap`][classact.probe.verify_nap], which also takes the `options`.
    x : Tensor
        One input, in the domain; it must follow the pattern.
    grid : sequence of float
        Rising radii. The grid is halved, not walked: what holds in a ball holds in a smaller one.
    tol : float, optional
        Go on halving between the two radii of the grid until they differ by this much.
    domain : (lo, hi)
        The input domain.

    Raises
    ------
    ValueError
        If the grid does not rise, or the input is outside the domain or does not follow the pattern.
    """
    radii = list(grid)
    if not radii or radii[0] <= 0 or any(a >= b for a, b in pairwise(radii)):
        raise ValueError("grid: expected positive, rising radii")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol: expected a positive number, got {tol}")
    net = net or to_affine_relu(model, x.shape)
    x = x.detach().double().cpu()
    lo, hi = (
        end.detach().double().cpu() if isinstance(end, Tensor) else torch.tensor(float(end)).double() for end in domain
    )
    if bool(((x < lo) | (x > hi)).any()):
        raise ValueError("x: expected an input inside the domain")
    if nap is not None:
        z = preactivations(_in_float64(model), x.unsqueeze(0), [name for name, _ in nap.layout]).z
        if not bool(nap.follows(z, options.get("activation_margin", 0.0))[0]):
            raise ValueError("x: expected an input that follows the pattern")
    tried: dict[float, Verdict] = {}

    def holds(radius: float) -> bool:
        box = torch.maximum(x - radius, lo), torch.minimum(x + radius, hi)
        tried[radius] = verify_nap(model, nap, target, box, net=net, follower=x, **{"stop_early": True, **options})
        return tried[radius].status == "verified"

    below, above = -1, len(radii)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if holds(radii[middle]) else (below, middle)
    best = radii[below] if below >= 0 else 0.0
    if tol is not None and above < len(radii):
        end = radii[above]
        while end - best > tol:
            middle_radius = (best + end) / 2
            best, end = (middle_radius, end) if holds(middle_radius) else (best, middle_radius)
    return VerifiedRadius(best, dict(sorted(tried.items())))


# Networks of the verification benchmarks


def load_nnet(path: str | Path) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Read a network in the .nnet format, as those of ACAS Xu.

    Returns
    -------
    network : Sequential
        Linear layers with ReLUs between them, in float64; it takes normalised inputs.
    ranges : dict of Tensor
        ``minimum`` and ``maximum`` of the inputs, and ``mean`` and ``range`` of inputs and, last, the outputs:
        an input is normalised as ``(clip(x, minimum, maximum) - mean) / range``.

    Raises
    ------
    ValueError
        If the file holds another number of values than its header says.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if not line.startswith("//")]
    rows = [[float(v) for v in line.strip().strip(",").split(",")] for line in lines if line.strip().strip(",")]
    if len(rows) < 7 or len(rows[0]) < 4:
        raise ValueError(f"{path}: expected the header of a .nnet file")
    n_layers, sizes = int(rows[0][0]), [int(v) for v in rows[1]]
    body, at = rows[7:], 0
    layers: list[tuple[Tensor, Tensor]] = []
    for n_in, n_out in pairwise(sizes):
        W, b = body[at : at + n_out], body[at + n_out : at + 2 * n_out]
        if len(b) != n_out or any(len(row) != n_in for row in W) or any(len(row) != 1 for row in b):
            raise ValueError(
                f"{path}: expected {n_out} rows of {n_in} weights and {n_out} biases in layer {len(layers)}"
            )
        layers.append((torch.tensor(W, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)[:, 0]))
        at += 2 * n_out
    if len(layers) != n_layers or at != len(body):
        raise ValueError(f"{path}: expected {n_layers} layers, found {len(layers)} and {len(body) - at} rows more")
    names = ("minimum", "maximum", "mean", "range")
    return _dense(layers), dict(zip(names, (torch.tensor(row, dtype=torch.float64) for row in rows[3:7]), strict=True))


def load_onnx_fc(path: str | Path) -> nn.Sequential:
    """Read a fully connected ReLU network from an ONNX file, as those of VNN-COMP; the package onnx is not needed.

    Its nodes may be Flatten, Reshape, Identity and Constant, Gemm, MatMul with Add or Sub, and Relu, one after the
    other, with float32 or float64 weights in the file itself. The network takes (N, d) or, flattening them, (N, ...).

    Raises
    ------
    ValueError
        If the file holds another kind of node, which is named, or cannot be read.
    """
    try:
        graph = _fields(_fields(Path(path).read_bytes())[7][0])
        tensors = dict(_tensor(raw) for raw in graph.get(5, []))
        nodes = [_fields(raw) for raw in graph.get(1, [])]
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not readable as ONNX ({error})") from None
    layers: list[tuple[Tensor, Tensor]] = []
    relus: list[int] = []
    for node in nodes:
        kind = node[4][0].decode()
        names = [raw.decode() for raw in node.get(1, [])]
        given = [tensors[name] for name in names if name in tensors]
        attributes = {a[1][0].decode(): a for a in map(_fields, node.get(5, []))}
        if kind == "Constant" and "value" in attributes:
            tensors[node[2][0].decode()] = _tensor(attributes["value"][5][0])[1]
        elif kind in ("Flatten", "Reshape", "Identity"):
            continue
        elif kind == "Relu":
            relus.append(len(layers))
        elif (
            kind == "Gemm"
            and len(given) == 2
            and names[0] not in tensors
            and not _integer(attributes, "transA", 0)
            and _plain(attributes)
        ):
            layers.append((given[0] if _integer(attributes, "transB", 0) else given[0].T, given[1].flatten()))
        elif kind == "MatMul" and len(given) == 1:
            W = given[0].T if names[0] not in tensors else given[0]
            layers.append((W, W.new_zeros(len(W))))
        elif kind in ("Add", "Sub") and len(given) == 1 and layers and (kind == "Add" or names[0] not in tensors):
            W, b = layers[-1]
            layers[-1] = W, b + given[0].flatten() * (1 if kind == "Add" else -1)
        else:
            raise ValueError(f"{path}: cannot read a node {kind} with inputs {', '.join(names)}")
    if relus != list(range(1, len(layers))):
        raise ValueError(f"{path}: expected a ReLU between every two of {len(layers)} layers, found them after {relus}")
    return _dense(layers)


def _dense(layers: Sequence[tuple[Tensor, Tensor]]) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Flatten()]
    for W, b in layers:
        linear = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
        linear.load_state_dict({"weight": W, "bias": b})
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def _fields(raw: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer message by number: integers, or bytes."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(raw):
        key = varint()
        wire = key & 7
        if wire == 0:
            value: Any = varint()
        elif wire in (1, 2, 5):
            size = varint() if wire == 2 else 8 if wire == 1 else 4
            value, at = raw[at : at + size], at + size
            if at > len(raw):
                raise ValueError("it ends too early")
        else:
            raise ValueError(f"unknown wire type {wire}")
        found.setdefault(key >> 3, []).append(value)
    return found


def _tensor(raw: bytes) -> tuple[str, Tensor]:
    """Name and values of a TensorProto."""
    fields = _fields(raw)
    name = fields[8][0].decode() if 8 in fields else ""
    kind = fields[2][0]
    shape = []
    for size in fields.get(1, []):
        shape += [size] if isinstance(size, int) else _varints(size)
    if kind == 7:  # the int64 shapes of Reshape
        return name, torch.zeros(0)
    if kind not in (1, 11):
        raise ValueError(f"tensor {name} is neither float32 nor float64")
    data = fields[9][0] if 9 in fields else b"".join(fields.get(4 if kind == 1 else 10, []))
    return name, torch.from_numpy(np.frombuffer(data, "<f4" if kind == 1 else "<f8").reshape(shape).copy())


def _varints(raw: bytes) -> list[int]:
    values, value, shift = [], 0, 0
    for byte in raw:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value)
            value = shift = 0
    return values


def _integer(attributes: Mapping[str, Any], name: str, default: int) -> int:
    return int(attributes[name][3][0]) if name in attributes and 3 in attributes[name] else default


def _plain(attributes: Mapping[str, Any]) -> bool:
    """Whether alpha and beta of a Gemm are 1."""
    return all(np.frombuffer(attributes[n][2][0], "<f4")[0] == 1 for n in ("alpha", "beta") if n in attributes)
