"""The learnable operator on the rows of the scores, with which Kolmogorov-Arnold attention replaces softmax.

Maity, Hitsman, Li, Dutta: Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?, 2025,
https://arxiv.org/abs/2503.10632, section 4. The code of the authors is announced, not published.

A row a = A_k of the scores (N numbers, one per token) goes through sums of learnable functions of one variable, the
layer of a Kolmogorov-Arnold network: ``Phi(a)_p = sum_q phi_pq(a_q)``. With N outputs (order ``"full"``) that takes
N x N functions per head. The modular operator keeps r << N outputs and mixes them linearly, ``sigma(a) = W Phi(a)``.
The result may be negative and does not sum to 1. It knows every token by its place, so that the number of tokens is
fixed and permuting them does not permute the output.

Two things to know of the Fourier functions: they have period 2 pi, so that attention is no monotone function of the
score; and with coefficients from N(0, 1), as in the paper, Phi has a standard deviation of sqrt(N G) at the start,
where the rows of softmax sum to 1 (``init="scaled"`` divides by it).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from classact.nn.kan_bases import WAVELETS, bspline, fourier, rational

Basis = Literal["fourier", "bspline", "mexican_hat", "morlet", "dog", "meyer", "shannon", "rational"]
Base = Literal["zero", "identity", "silu", "gelu"]
Order = Literal["W_phi", "phi_W", "phi_phi", "full"]
Init = Literal["normal", "scaled"]

BASES: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda t: t, "silu": F.silu, "gelu": F.gelu}
NUMERATOR, DENOMINATOR = 6, 4  # coefficients a0 ... a5 and b1 ... b4 of the rational functions


def simplex_projection(y: Float[Tensor, "*batch"], dim: int = -1) -> Float[Tensor, "*batch"]:
    """Nearest point of the probability simplex, ``max(y - lambda, 0)`` with sum 1 (the paper's algorithm 1).

    Not a division by the norm: small entries become exactly 0.

    Parameters
    ----------
    y : (..., N, ...)
        Anything real, at least one dimension.
    dim : int
        The dimension that holds the vectors.

    Returns
    -------
    (..., N, ...)
        Not negative, sums 1 along `dim`.

    Examples
    --------
    >>> simplex_projection(torch.tensor([0.5, -0.2, 0.9, 0.1]))
    tensor([0.3000, 0.0000, 0.7000, 0.0000])
    """
    if y.ndim == 0 or not y.is_floating_point():
        raise ValueError(f"y: expected real numbers in at least one dimension, got {y.dtype} of shape {tuple(y.shape)}")
    x = _wide(y).movedim(dim, -1)
    u = x.sort(dim=-1, descending=True).values
    excess = u.cumsum(-1) - 1
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    rho = (u * count > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, rho - 1) / rho
    return (x - threshold).relu().movedim(-1, dim).to(y.dtype)


class UnivariateSum(nn.Module):
    """``Phi(a)_p = sum_q phi_pq(a_q)``: one learnable function of one variable for each output, input and head.

    Fourier series and splines are linear in their coefficients: the features of every score are computed once, for all
    outputs, and summed by one matrix product. Wavelets have a weight, a translation and a scale of their own for each
    (p, q), rational functions their own denominators, so that each pair must be evaluated, r times the work and memory.

    Parameters
    ----------
    heads, n_in, n_out : int
        Number of heads h, of inputs and of outputs.
    basis : str
        ``"fourier"``: ``sum_{m=1}^G a cos(m t) + b sin(m t)``; ``"bspline"`` on a grid of G intervals;
        a wavelet ``w psi((t - tau) / s)``: ``"mexican_hat"``, ``"morlet"``, ``"dog"``, ``"meyer"``, ``"shannon"``;
        ``"rational"``: ``(a0 + ... + a5 t^5) / (1 + |b1 t + ... + b4 t^4|)``.
    grid : int
        G, of Fourier series and splines.
    base : {"zero", "identity", "silu", "gelu"}
        A fixed function b(t) that is added to each phi.
    scales : bool
        Learnable factors of b and of the expansion for each (p, q), 1 at the start. Equation 2 has none, but the
        parameter counts that the paper prints hold two more numbers per function.
    init : {"normal", "scaled"}
        Linear coefficients from N(0, 1), or divided by the square root of ``n_in`` (Fourier: ``n_in G``).
    spline_order : int
        Degree of the splines.
    spline_range : float
        Splines live on [-I, I], and are zero outside.
    """

    def __init__(
        self,
        heads: int,
        n_in: int,
        n_out: int,
        basis: Basis = "fourier",
        grid: int = 3,
        base: Base = "zero",
        scales: bool = False,
        init: Init = "normal",
        spline_order: int = 3,
        spline_range: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("n_in", n_in), ("n_out", n_out), ("grid", grid)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name, chosen, choices in (("basis", basis, Basis), ("base", base, Base), ("init", init, Init)):
            _check_choice(name, chosen, choices)
        if spline_order < 1:
            raise ValueError(f"spline_order: expected at least 1, got {spline_order}")
        if spline_range <= 0:
            raise ValueError(f"spline_range: expected a positive number, got {spline_range}")
        self.heads, self.n_in, self.n_out, self.basis, self.grid, self.base = heads, n_in, n_out, basis, grid, base
        self.spline_order, self.spline_range = spline_order, spline_range
        std = 1.0 if init == "normal" else 1 / math.sqrt(n_in * (grid if basis == "fourier" else 1))
        shape = (heads, n_out, n_in)
        terms = {"fourier": 2 * grid, "bspline": grid + spline_order, "rational": NUMERATOR}.get(basis, 1)
        self.coefficients = nn.Parameter(torch.randn(*shape, terms) * std)
        self.denominator = nn.Parameter(torch.randn(*shape, DENOMINATOR)) if basis == "rational" else None
        self.translation = nn.Parameter(torch.zeros(shape)) if basis in WAVELETS else None
        self.scale = nn.Parameter(torch.ones(shape)) if basis in WAVELETS else None
        self.base_scale = nn.Parameter(torch.ones(shape)) if scales else None
        self.basis_scale = nn.Parameter(torch.ones(shape)) if scales else None

    def forward(self, a: Float[Tensor, "b h k q"]) -> Float[Tensor, "b h k p"]:
        """Apply to rows of scores (B, h, K, n_in), any number K of them; scores in half precision are widened."""
        a = _wide(a)
        coefficients: Tensor = self.coefficients
        if self.basis_scale is not None:
            coefficients = coefficients * self.basis_scale.unsqueeze(-1)
        if self.basis in ("fourier", "bspline"):
            features = (
                fourier(a, self.grid)
                if self.basis == "fourier"
                else bspline(a, self.grid, self.spline_order, -self.spline_range, self.spline_range)
            )
            y = features.flatten(-2) @ coefficients.flatten(-2).transpose(-1, -2)
        else:
            t = a.unsqueeze(-2)  # (b, h, k, 1, q) beside parameters (h, 1, p, q)
            if self.denominator is not None:
                y = rational(t, coefficients.unsqueeze(1), self.denominator.unsqueeze(1)).sum(-1)
            else:
                z = (t - self.translation.unsqueeze(1)) / self.scale.unsqueeze(1)  # type: ignore[union-attr]
                y = (WAVELETS[self.basis](z) * coefficients.squeeze(-1).unsqueeze(1)).sum(-1)
        if self.base == "zero":
            return y
        fixed = BASES[self.base](a)
        if self.base_scale is None:
            return y + fixed.sum(-1, keepdim=True)
        return y + fixed @ self.base_scale.transpose(-1, -2)


class LearnableRowOperator(nn.Module):
    """``sigma``: rows of scores to rows of weights, for every head its own (the paper's equations 2 and 3).

    Parameters
    ----------
    n_tokens : int
        N, including the class token. It is built into the operator.
    heads : int
        Number of heads h.
    rank : int
        r, at most N; of no account to ``"full"``.
    basis, grid, base, scales, init, spline_order, spline_range
        Of the functions of one variable; see `UnivariateSum` in this module.
    order : {"W_phi", "phi_W", "phi_phi", "full"}
        ``W Phi(a)``, the paper's; ``Phi(W a)``; ``Phi_2(Phi_1(a))``; or Phi with N outputs.

    Raises
    ------
    ValueError
        For a rank above N, sizes below 1 or unknown names; in `forward` for another number of tokens or heads.

    Examples
    --------
    >>> operator = LearnableRowOperator(17, heads=3, rank=6)
    >>> sigma = operator(torch.randn(2, 3, 17, 17))
    >>> sigma.shape, int(torch.linalg.matrix_rank(sigma.double(), rtol=1e-6).max())
    (torch.Size([2, 3, 17, 17]), 6)
    """

    def __init__(
        self,
        n_tokens: int,
        heads: int = 1,
        rank: int = 12,
        basis: Basis = "fourier",
        grid: int = 3,
        base: Base = "zero",
        order: Order = "W_phi",
        scales: bool = False,
        init: Init = "normal",
        spline_order: int = 3,
        spline_range: float = 1.0,
    ) -> None:
        super().__init__()
        _check_choice("order", order, Order)
        if n_tokens < 1 or (order != "full" and not 1 <= rank <= n_tokens):
            raise ValueError(f"rank: expected from 1 to the number of tokens, got {rank} for {n_tokens} tokens")
        self.n_tokens, self.heads, self.rank, self.order = n_tokens, heads, rank, order
        functions: dict[str, Any] = {
            "basis": basis,
            "grid": grid,
            "base": base,
            "scales": scales,
            "init": init,
            "spline_order": spline_order,
            "spline_range": spline_range,
        }
        self.config = {"n_tokens": n_tokens, "heads": heads, "rank": rank, "order": order, **functions}
        outer = n_tokens if order == "full" else rank
        self.phi = UnivariateSum(heads, *((rank, n_tokens) if order == "phi_W" else (n_tokens, outer)), **functions)
        self.phi2 = UnivariateSum(heads, rank, n_tokens, **functions) if order == "phi_phi" else None
        shape = {"W_phi": (heads, n_tokens, rank), "phi_W": (heads, rank, n_tokens)}.get(order)
        self.W = None
        if shape is not None:  # as nn.Linear without bias
            self.W = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1]))

    def forward(self, scores: Float[Tensor, "b h k n"]) -> Float[Tensor, "b h k n"]:
        """Turn scores (B, h, K, N) into weights of the same shape, row by row (K = N, or fewer rows)."""
        left = self.left(scores)
        return left @ self.W.transpose(-1, -2) if self.order == "W_phi" and self.W is not None else left

    def left(self, scores: Float[Tensor, "b h k n"]) -> Float[Tensor, "b h k s"]:
        """Left factor: ``sigma(A) V = left(A) @ right(V)``, where the N x N weights are never formed if S = r."""
        if scores.ndim != 4 or scores.shape[1] != self.heads or scores.shape[3] != self.n_tokens:
            raise ValueError(
                f"scores: expected shape (B, {self.heads}, K, {self.n_tokens}), got {tuple(scores.shape)}; the number"
                " of tokens is built into the operator, padding and other lengths cannot be used"
            )
        if self.order == "phi_W" and self.W is not None:
            return self.phi(scores @ self.W.transpose(-1, -2))
        return self.phi(scores) if self.phi2 is None else self.phi2(self.phi(scores))

    def right(self, values: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h s d"]:
        """Right factor: ``W^T V`` for ``"W_phi"``, else the values themselves."""
        return self.W.transpose(-1, -2) @ values if self.order == "W_phi" and self.W is not None else values


def _wide(t: Tensor) -> Tensor:
    """Float32 instead of half precision, in which harmonics and sorted sums would be lost."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _check_choice(name: str, chosen: str, choices: Any) -> None:
    if chosen not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {chosen!r}")
