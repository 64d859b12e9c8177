"""Families of univariate functions for Kolmogorov-Arnold networks, and layers that use one family.

A Kolmogorov-Arnold layer puts a learnable function on every edge, ``phi_oi(x) = sum_j c_oij B_j(x)``, in a family of
fixed or slightly learnable functions B_1 ... B_m. Here is each family as a pure function, as a module with its
parameters ([`kan_basis`][classact.nn.kan_basis] builds one by name), and in two layers,
[`KANLinear`][classact.nn.KANLinear] and [`KANConv2d`][classact.nn.KANConv2d].

Sources: B-splines on uniform knots, Liu et al., https://arxiv.org/abs/2404.19756; Gaussians, FastKAN,
https://arxiv.org/abs/2405.06721; reflectional switch functions, FasterKAN; Chebyshev polynomials,
https://arxiv.org/abs/2405.07200; Jacobi and Gram polynomials as in the convolutional layers of SeriYann/KANConv2d;
wavelets, Wav-KAN, https://arxiv.org/abs/2405.12832; ReLU bumps, ReLU-KAN, https://arxiv.org/abs/2406.02075; rational
functions with a denominator of at least 1, https://arxiv.org/abs/1907.06732.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Space = str | Sequence[Any]
Norm = Literal["layer", "batch"] | None
Squash = Literal["tanh", "clamp"] | None

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def bspline(
    x: Float[Tensor, "*n"], grid: int = 5, order: int = 3, low: float = -1.0, high: float = 1.0
) -> Float[Tensor, "*n m"]:
    """All ``m = grid + order`` B-splines on uniform knots that reach into [low, high].

    They sum to 1 inside the interval, fade out over `order` knot distances outside it, and are 0 beyond. Computed from
    the truncated powers of the nearer half of each bump, where no digits cancel, instead of by recursion.

    Parameters
    ----------
    x : (...)
        Where to evaluate.
    grid : int
        Number of intervals between `low` and `high`.
    order : int
        Degree p of the pieces; 3 is cubic.

    Raises
    ------
    ValueError
        If `grid` is not positive, `order` is negative, or the interval is empty.

    Examples
    --------
    >>> import torch
    >>> (bspline(torch.tensor(0.0)) * 48).round()
    tensor([ 0.,  0.,  1., 23., 23.,  1.,  0.,  0.])
    """
    if grid < 1 or order < 0 or not low < high:
        raise ValueError(
            f"grid, order, low, high: expected grid >= 1, order >= 0, low < high, got {grid}, {order}, {low}, {high}"
        )
    position = (x - low) * (grid / (high - low))  # in knot distances
    start = torch.arange(-order, grid, device=x.device, dtype=x.dtype)
    if order == 0:
        return (position.floor().unsqueeze(-1) == start).to(x.dtype)
    # the factor 1/p! goes into the argument of the powers, where it costs one product per x and not one per function
    unit = math.factorial(order) ** (-1 / order)
    half = (order + 1) / 2
    distance = ((position * unit).unsqueeze(-1) - (start + half) * unit).abs()
    value = _power(F.relu(half * unit - distance), order)
    for i in range(1, order // 2 + 1):
        piece = _power(F.relu((half - i) * unit - distance), order)
        value = torch.add(value, piece, alpha=(-1) ** i * math.comb(order + 1, i))
    return value


def _power(x: Tensor, exponent: int) -> Tensor:
    result = x
    for _ in range(exponent - 1):
        result = result * x
    return result


def chebyshev(x: Float[Tensor, "*n"], degree: int) -> Float[Tensor, "*n m"]:
    """Chebyshev polynomials T_0 ... T_degree of the first kind.

    Examples
    --------
    >>> import torch
    >>> chebyshev(torch.tensor(0.5), 4)
    tensor([ 1.0000,  0.5000, -0.5000, -1.0000, -0.5000])
    """
    _at_least("degree", degree, 0)
    twice = 2 * x
    terms = [torch.ones_like(x), x]
    for _ in range(2, degree + 1):
        terms.append(twice * terms[-1] - terms[-2])
    return torch.stack(terms[: degree + 1], -1)


def jacobi(x: Float[Tensor, "*n"], degree: int, a: float = 1.0, b: float = 1.0) -> Float[Tensor, "*n m"]:
    """Jacobi polynomials P_0^(a,b) ... P_degree^(a,b), a and b greater than -1."""
    _at_least("degree", degree, 0)
    if a <= -1 or b <= -1:
        raise ValueError(f"a, b: expected numbers greater than -1, got {a}, {b}")
    terms = [torch.ones_like(x), (a - b) / 2 + (a + b + 2) / 2 * x]
    for n in range(2, degree + 1):
        c = 2 * n + a + b
        scale = 2 * n * (n + a + b) * (c - 2)
        slope, shift = (c - 1) * c * (c - 2) / scale, (c - 1) * (a * a - b * b) / scale
        terms.append((slope * x + shift) * terms[-1] - 2 * (n + a - 1) * (n + b - 1) * c / scale * terms[-2])
    return torch.stack(terms[: degree + 1], -1)


def gram(x: Float[Tensor, "*n"], degree: int, beta: Float[Tensor, " b"]) -> Float[Tensor, "*n m"]:
    """Monic polynomials ``P_{n+1} = x P_n - w_n beta_n P_{n-1}``, n = 1 ... degree - 1.

    ``w_n = (2n + 1) n^2 (4n^2 - 1) / (n + 1)^2``, as in the convolutional layers of SeriYann/KANConv2d, where `beta`
    is learnable.

    Parameters
    ----------
    beta : (degree - 1,)
        The factors beta_1, beta_2 ...; none for degrees 0 and 1.
    """
    _at_least("degree", degree, 0)
    if beta.shape != (max(0, degree - 1),):
        raise ValueError(f"beta: expected shape ({max(0, degree - 1)},) for degree {degree}, got {tuple(beta.shape)}")
    terms = [torch.ones_like(x), x]
    for n in range(1, degree):
        weight = (2 * n + 1) * n**2 * (4 * n**2 - 1) / (n + 1) ** 2
        terms.append(x * terms[-1] - weight * beta[n - 1] * terms[-2])
    return torch.stack(terms[: degree + 1], -1)


def fourier(x: Float[Tensor, "*n"], n: int) -> Float[Tensor, "*n m"]:
    """``cos x ... cos nx, sin x ... sin nx`` (m = 2n), from one cosine and one sine by recurrence.

    The rounding error grows like n^2: about 1e-5 for n = 10 in float32.
    """
    _at_least("n", n, 1)
    cos, sin = [torch.ones_like(x), x.cos()], [torch.zeros_like(x), x.sin()]
    twice = 2 * cos[1]
    for _ in range(1, n):
        cos.append(twice * cos[-1] - cos[-2])
        sin.append(twice * sin[-1] - sin[-2])
    return torch.stack(cos[1:] + sin[1:], -1)


def mexican_hat(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``2 / (sqrt(3) pi^(1/4)) (z^2 - 1) exp(-z^2 / 2)``, with the sign of Wav-KAN."""
    square = z * z
    return (2 / (math.sqrt(3) * math.pi**0.25)) * (square - 1) * torch.exp(-0.5 * square)


def morlet(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``cos(5z) exp(-z^2 / 2)``."""
    return torch.cos(5 * z) * torch.exp(-0.5 * z * z)


def dog(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Derivative of a Gaussian, ``-z exp(-z^2 / 2)``."""
    return -z * torch.exp(-0.5 * z * z)


def meyer(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``sin(pi |z|)`` up to |z| = 1/2, fading out to 0 at |z| = 1 along ``cos(pi/2 nu(2|z| - 1))``.

    ``nu(t) = t^4 (35 - 84 t + 70 t^2 - 20 t^3)``.
    """
    v = z.abs()
    t = (2 * v - 1).clamp(0, 1)
    nu = t**4 * (35 + t * (-84 + t * (70 - 20 * t)))
    return torch.sin(math.pi * v) * torch.cos(math.pi / 2 * nu)


def shannon(z: Float[Tensor, "*n"], periods: int = 2) -> Float[Tensor, "*n"]:
    """``sin(z) / z`` under a Hamming window that ends after so many periods on either side.

    The code of Wav-KAN lays the window over the index of the input feature, which makes the function of a feature
    depend on its place in the table; here it lies over z.
    """
    _at_least("periods", periods, 1)
    end = 2 * math.pi * periods
    window = 0.54 + 0.46 * torch.cos(math.pi / end * z)
    return torch.where(z.abs() < end, torch.sinc(z / math.pi) * window, 0)


def rational(x: Float[Tensor, "*n"], p: Float[Tensor, "*p 6"], q: Float[Tensor, "*q 4"]) -> Float[Tensor, "..."]:
    """Safe Pade function of degrees 5 and 4: ``(p_0 + ... + p_5 x^5) / (1 + |q_1 x + ... + q_4 x^4|)``.

    Parameters
    ----------
    x : (...)
        Where to evaluate.
    p : (..., 6)
        Coefficients of the numerator, constant first; all but the last dimension broadcast with `x`.
    q : (..., 4)
        Coefficients of the denominator, that of x first.

    Examples
    --------
    >>> import torch
    >>> p, q = torch.tensor([1.0, 0, 2, 0, 0, 0]), torch.tensor([0.0, -1, 0, 0])
    >>> rational(torch.tensor([0.0, 2.0]), p, q)
    tensor([1.0000, 1.8000])
    """
    numerator, denominator = p[..., 5], q[..., 3]
    for i in (4, 3, 2, 1, 0):
        numerator = numerator * x + p[..., i]
    for i in (2, 1, 0):
        denominator = denominator * x + q[..., i]
    return numerator / (1 + (denominator * x).abs())


def rbf(x: Float[Tensor, "*n"], centres: Float[Tensor, " m"], width: float) -> Float[Tensor, "*n m"]:
    """Gaussians ``exp(-((x - c_j) / h)^2)``."""
    z = x.unsqueeze(-1) / width - centres / width
    return torch.exp(-z * z)


def rswaf(x: Float[Tensor, "*n"], centres: Float[Tensor, " m"], width: float) -> Float[Tensor, "*n m"]:
    """Reflectional switch functions ``1 - tanh^2((x - c_j) / h)``."""
    z = torch.tanh(x.unsqueeze(-1) / width - centres / width)
    return 1 - z * z


def relu_bump(
    x: Float[Tensor, "*n"], low: Float[Tensor, "*#n m"], high: Float[Tensor, "*#n m"], scale: float
) -> Float[Tensor, "*n m"]:
    """``(r ReLU(x - low_j) ReLU(high_j - x))^2``; with ``r = 4 / (high - low)^2`` every bump peaks at 1.

    Parameters
    ----------
    x : (...)
        Where to evaluate.
    low, high : (m,) or (D, m)
        Ends of the supports, shared or one set for each of the D last entries of `x`.
    scale : float
        r.
    """
    x = x.unsqueeze(-1)
    product = F.relu(x - low) * F.relu(high - x) * scale
    return product * product


WAVELETS: dict[str, Callable[[Tensor], Tensor]] = {
    "mexican_hat": mexican_hat,
    "morlet": morlet,
    "dog": dog,
    "meyer": meyer,
    "shannon": shannon,
}


class Basis(nn.Module):
    """A family of `num` functions; ``forward`` maps x (...) to their values (..., num)."""

    num: int

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate all functions at every entry of `x`."""
        raise NotImplementedError


class BSpline(Basis):
    """[`bspline`][classact.nn.kan_bases.bspline]: order 3, 5 intervals on [-1, 1], 8 functions."""

    def __init__(self, grid: int = 5, order: int = 3, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        bspline(torch.zeros(()), grid, order, low, high)
        self.grid, self.order, self.low, self.high, self.num = grid, order, low, high, grid + order

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return bspline(x, self.grid, self.order, self.low, self.high)


class _Centred(Basis):
    def __init__(self, num: int, low: float, high: float, width: float | None) -> None:
        super().__init__()
        _at_least("num", num, 2)
        if not low < high or (width is not None and width <= 0):
            raise ValueError(f"low, high, width: expected low < high and width > 0, got {low}, {high}, {width}")
        self.num, self.width = num, (high - low) / (num - 1) if width is None else width
        self.register_buffer("centres", torch.linspace(low, high, num), persistent=False)
        self.centres: Tensor


class RBF(_Centred):
    """Gaussians at `num` equidistant centres; their width is the distance of the centres unless given."""

    def __init__(self, num: int = 8, low: float = -2.0, high: float = 2.0, width: float | None = None) -> None:
        super().__init__(num, low, high, width)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return rbf(x, self.centres.to(x.dtype), self.width)


class RSWAF(_Centred):
    """Reflectional switch functions; centres and width as in FasterKAN."""

    def __init__(self, num: int = 8, low: float = -1.2, high: float = 0.2, width: float = 2.0) -> None:
        super().__init__(num, low, high, width)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return rswaf(x, self.centres.to(x.dtype), self.width)


class _Polynomial(Basis):
    def __init__(self, degree: int, squash: Squash) -> None:
        super().__init__()
        _at_least("degree", degree, 1)
        if squash not in ("tanh", "clamp", None):
            raise ValueError(f"squash: expected 'tanh', 'clamp' or None, got {squash!r}")
        self.degree, self.squash, self.num = degree, squash, degree + 1

    def inside(self, x: Tensor) -> Tensor:
        if self.squash == "tanh":
            return x.tanh()
        return x.clamp(-1, 1) if self.squash == "clamp" else x


class Chebyshev(_Polynomial):
    """Chebyshev polynomials of tanh(x), as in ChebyKAN, or of x clamped to [-1, 1]."""

    def __init__(self, degree: int = 4, squash: Squash = "tanh") -> None:
        super().__init__(degree, squash)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return chebyshev(self.inside(x), self.degree)


class Jacobi(_Polynomial):
    """Jacobi polynomials of tanh(x)."""

    def __init__(self, degree: int = 4, a: float = 1.0, b: float = 1.0, squash: Squash = "tanh") -> None:
        super().__init__(degree, squash)
        jacobi(torch.zeros(()), 1, a, b)
        self.a, self.b = a, b

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return jacobi(self.inside(x), self.degree, self.a, self.b)


class Gram(_Polynomial):
    """The polynomials of [`gram`][classact.nn.kan_bases.gram] of tanh(x), with learnable factors that start at 0."""

    def __init__(self, degree: int = 3, squash: Squash = "tanh") -> None:
        super().__init__(degree, squash)
        self.beta = nn.Parameter(torch.zeros(degree - 1))

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return gram(self.inside(x), self.degree, self.beta)


class Monomials(_Polynomial):
    """1, x, x^2 ... x^degree of tanh(x)."""

    def __init__(self, degree: int = 4, squash: Squash = "tanh") -> None:
        super().__init__(degree, squash)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        x = self.inside(x)
        terms = [torch.ones_like(x)]
        for _ in range(self.degree):
            terms.append(terms[-1] * x)
        return torch.stack(terms, -1)


class Wavelet(Basis):
    """`num` wavelets ``psi((x - tau_j) / s_j)``, shared by all edges; translations and scales learnable if wanted.

    Wav-KAN gives each edge one wavelet with a translation and scale of its own:
    [`WaveletKANLinear`][classact.nn.kan_bases.WaveletKANLinear].
    """

    def __init__(
        self,
        num: int = 8,
        low: float = -1.2,
        high: float = 1.2,
        scale: float = 0.35,
        wavelet: str = "mexican_hat",
        learnable: bool = True,
    ) -> None:
        super().__init__()
        _at_least("num", num, 1)
        _one_of("wavelet", wavelet, WAVELETS)
        if scale <= 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self.num, self.wavelet = num, wavelet
        self.translation = nn.Parameter(torch.linspace(low, high, num), requires_grad=learnable)
        self.scale = nn.Parameter(torch.full((num,), float(scale)), requires_grad=learnable)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return WAVELETS[self.wavelet]((x.unsqueeze(-1) - self.translation) / self.scale)


class ReLUBump(Basis):
    """Bumps of two ReLUs on ``[j/g, (j + k + 1)/g]``, j = -k ... g - 1, with learnable ends if wanted."""

    def __init__(self, grid: int = 5, order: int = 3, learnable: bool = False) -> None:
        super().__init__()
        _at_least("grid", grid, 1)
        _at_least("order", order, 0)
        self.num, self.scale = grid + order, 4 * grid**2 / (order + 1) ** 2
        low = torch.arange(-order, grid) / grid
        self.low = nn.Parameter(low, requires_grad=learnable)
        self.high = nn.Parameter(low + (order + 1) / grid, requires_grad=learnable)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return relu_bump(x, self.low.to(x.dtype), self.high.to(x.dtype), self.scale)


class Fourier(Basis):
    """``cos nx, sin nx`` for n = 1 ... grid."""

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        _at_least("grid", grid, 1)
        self.grid, self.num = grid, 2 * grid

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return fourier(x, self.grid)


class Activation(Basis):
    """One fixed function, which makes the layer that of a perceptron: SiLU, or the identity."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        _one_of("activation", activation, ACTIVATIONS)
        self.activation, self.num = activation, 1

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n m"]:
        """Evaluate."""
        return ACTIVATIONS[self.activation](x).unsqueeze(-1)


BASES: dict[str, Callable[..., Basis]] = {
    "bspline": BSpline,
    "rbf": RBF,
    "rswaf": RSWAF,
    "chebyshev": Chebyshev,
    "jacobi": Jacobi,
    "gram": Gram,
    "poly": Monomials,
    "wavelet": Wavelet,
    "relu": ReLUBump,
    "fourier": Fourier,
    "mlp": Activation,
}


def kan_basis(name: str, **options: Any) -> Basis:
    """Build a family of functions by its name.

    Parameters
    ----------
    name : str
        ``bspline``, ``rbf``, ``rswaf``, ``chebyshev``, ``jacobi``, ``gram``, ``poly``, ``wavelet``, ``relu``,
        ``fourier``, or ``mlp`` for a single fixed activation.
    **options
        Arguments of its class in `classact.nn.kan_bases`, such as ``degree=7`` or ``wavelet="morlet"``.

    Raises
    ------
    ValueError
        If there is no such family, or an option does not fit it.

    Examples
    --------
    >>> import torch
    >>> basis = kan_basis("chebyshev", degree=7)
    >>> basis(torch.randn(32, 10)).shape
    torch.Size([32, 10, 8])
    """
    _one_of("name", name, BASES)
    return BASES[name](**options)


def basis_of(space: Space) -> Basis:
    """Build a family from what stands for it in a pool: its name, or a pair of name and options."""
    if isinstance(space, str):
        return kan_basis(space)
    if len(space) != 2 or not isinstance(space[0], str) or not isinstance(space[1], Mapping):
        raise ValueError(f"space: expected a name or a pair of name and options, got {space!r}")
    return kan_basis(space[0], **space[1])


def input_norm(norm: Norm, features: int, spatial: bool = False) -> nn.Module | None:
    """Build the normalisation in front of a layer; "layer" is over the channels and the image where there is one."""
    if norm is None:
        return None
    if norm == "layer":
        return nn.GroupNorm(1, features) if spatial else nn.LayerNorm(features)
    if norm == "batch":
        return nn.BatchNorm2d(features) if spatial else nn.BatchNorm1d(features)
    raise ValueError(f"norm: expected 'layer', 'batch' or None, got {norm!r}")


def expand_channels(basis: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
    """Channels (N, C, H, W) to their functions (N, C m, H, W), in the memory order in which convolutions are fast."""
    values: Tensor = basis(x.permute(0, 2, 3, 1))
    return values.flatten(-2).permute(0, 3, 1, 2)


class KANLinear(nn.Module):
    """Kolmogorov-Arnold layer with one family of functions: ``y_o = sum_i w_oi b(x_i) + sum_ij c_oij B_j(x_i)``.

    Parameters
    ----------
    in_features, out_features : int
        D and O.
    basis : str or (str, dict)
        The family, as in [`kan_basis`][classact.nn.kan_basis].
    base : {"silu", "gelu", "relu", "tanh", "identity"}, optional
        b; None leaves the base branch out.
    norm : {"layer", "batch"}, optional
        Normalisation of the input: several families are made for an interval around 0.

    Raises
    ------
    ValueError
        If a name or size is not as above, or, in ``forward``, if the last dimension of the input is not D.

    Examples
    --------
    >>> import torch
    >>> layer = KANLinear(10, 3, basis="bspline")
    >>> layer(torch.rand(32, 10) * 2 - 1).shape
    torch.Size([32, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: Space = "bspline",
        base: str | None = "silu",
        norm: Norm = None,
    ) -> None:
        super().__init__()
        _at_least("in_features", in_features, 1)
        _at_least("out_features", out_features, 1)
        self.in_features, self.out_features, self.base = in_features, out_features, base
        self.config = {
            "in_features": in_features,
            "out_features": out_features,
            "basis": basis,
            "base": base,
            "norm": norm,
        }
        self.norm = input_norm(norm, in_features)
        self.basis = basis_of(basis)
        self.coefficients = nn.Parameter(torch.empty(out_features, in_features, self.basis.num))
        nn.init.normal_(self.coefficients, std=0.1 / math.sqrt(in_features))
        self.base_weight = base_parameter(base, out_features, in_features)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        check_features(x, self.in_features)
        x = normalized(self.norm, x)
        y = F.linear(self.basis(x).flatten(-2), self.coefficients.flatten(1))
        if self.base_weight is not None:
            y = y + F.linear(ACTIVATIONS[cast("str", self.base)](x), self.base_weight)
        return y


class WaveletKANLinear(nn.Module):
    """Layer of Wav-KAN: one wavelet on every edge, ``y_o = sum_i w_oi psi((x_i - tau_oi) / s_oi)``.

    The values of all edges, (N, O, D), are held at once; [`KANLinear`][classact.nn.KANLinear] with ``basis="wavelet"``
    shares its wavelets and needs no more than (N, D, m). The batch normalisation behind the layer of the authors' code
    is left to the network.

    Parameters
    ----------
    in_features, out_features : int
        D and O.
    wavelet : {"mexican_hat", "morlet", "dog", "meyer", "shannon"}
        psi.
    """

    def __init__(self, in_features: int, out_features: int, wavelet: str = "mexican_hat") -> None:
        super().__init__()
        _at_least("in_features", in_features, 1)
        _at_least("out_features", out_features, 1)
        _one_of("wavelet", wavelet, WAVELETS)
        self.in_features, self.out_features, self.wavelet = in_features, out_features, wavelet
        self.config = {"in_features": in_features, "out_features": out_features, "wavelet": wavelet}
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.translation = nn.Parameter(torch.zeros(out_features, in_features))
        self.scale = nn.Parameter(torch.ones(out_features, in_features))

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        check_features(x, self.in_features)
        z = (x.unsqueeze(-2) - self.translation) / self.scale
        return (self.weight * WAVELETS[self.wavelet](z)).sum(-1)


class KANConv2d(nn.Module):
    """Convolution whose kernel holds functions of one family: every channel is expanded into m maps, then convolved.

    Equal to cutting out the patches and passing each through a [`KANLinear`][classact.nn.KANLinear], without the
    patches. The input is padded with zeros before it is expanded, so a function adds its value at 0 at the border.

    Parameters
    ----------
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, padding, dilation : int or pair of int
        As in ``torch.nn.Conv2d``.
    groups : int
        As in ``torch.nn.Conv2d``.
    basis, base, norm
        As in [`KANLinear`][classact.nn.KANLinear].

    Examples
    --------
    >>> import torch
    >>> KANConv2d(3, 8, kernel_size=3, padding=1, basis="rbf")(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        basis: Space = "bspline",
        base: str | None = "silu",
        norm: Norm = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups, self.base = in_channels, out_channels, groups, base
        self.kernel_size, self.stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
        self.padding, self.dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": groups,
            "basis": basis,
            "base": base,
            "norm": norm,
        }
        self.norm = input_norm(norm, in_channels, spatial=True)
        self.basis = basis_of(basis)
        fan_in = in_channels // groups * self.kernel_size[0] * self.kernel_size[1]
        shape = (out_channels, in_channels // groups, self.basis.num, *self.kernel_size)
        self.coefficients = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.coefficients, std=0.1 / math.sqrt(fan_in))
        self.base_weight = base_parameter(base, out_channels, in_channels // groups, *self.kernel_size)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Map (N, C, H, W) to (N, O, H', W')."""
        check_image(x, self.in_channels)
        x = padded(x if self.norm is None else self.norm(x), self.padding)
        options: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        y = F.conv2d(expand_channels(self.basis, x), self.coefficients.flatten(1, 2), **options)
        if self.base_weight is not None:
            y = y + F.conv2d(ACTIVATIONS[cast("str", self.base)](x), self.base_weight, **options)
        return y


def base_parameter(base: str | None, *shape: int) -> nn.Parameter | None:
    """Weights of the base branch, Kaiming-uniform as in ``torch.nn.Linear``; None without a base branch."""
    if base is None:
        return None
    _one_of("base", base, ACTIVATIONS)
    weight = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def normalized(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Apply the normalisation of a linear layer to (..., D)."""
    if norm is None:
        return x
    normal: Tensor = norm(x.reshape(-1, x.shape[-1]))
    return normal.reshape(x.shape)


def padded(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Pad the height and the width with zeros."""
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Read an int or a pair of them, none below `least`."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or min(values) < least:
        raise ValueError(f"{name}: expected an int or a pair of them, at least {least}, got {value!r}")
    return values


def check_features(x: Tensor, features: int) -> None:
    """Raise a ValueError unless x is (..., features)."""
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(f"x: expected shape (..., {features}), got {tuple(x.shape)}")


def check_image(x: Tensor, channels: int) -> None:
    """Raise a ValueError unless x is (N, channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected shape (N, {channels}, H, W), got {tuple(x.shape)}")


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Raise a ValueError unless both numbers of channels are positive multiples of the number of groups."""
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        _at_least(name, value, 1)
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups: expected a divisor of in_channels {in_channels} and out_channels {out_channels}, got {groups}"
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _one_of(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
