"""AF-KAN: Kolmogorov-Arnold layers from shifted activations, as small as linear layers; and ReLU-KAN.

Ta, Tran: AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for Efficient Representation Learning, 2025,
https://arxiv.org/abs/2503.06112. Code of the authors: hoangthangta/All-KAN. ReLU-KAN is that of Qiu et al., 2024,
https://arxiv.org/abs/2406.02075, with the layer normalisation of the authors' comparison.

An input x is expanded into n = g + k functions of ``u_j = a(x - low_j)`` and ``v_j = a(high_j - x)``, whose responses
are reduced to one number again, by attention, before one ordinary linear map. So the layer has the parameters of a
linear layer and a few more, and a front end that bends the input. The code's accidents are not reproduced: it builds
all reductions and uses one, its self-attention names layers that do not exist, and several methods at once never reach
the layers of its network.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from classact.nn.kan_bases import Norm, check_features, input_norm, normalized, relu_bump

FuncNorm = Literal["none", "sample", "tensor"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "selu": F.selu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quad1": lambda u, v: (u * v).square(),
    "quad2": lambda u, v: u * v + u.square() + v.square(),
    "sum": lambda u, v: u + v,
    "prod": lambda u, v: u * v,
    "sum_prod": lambda u, v: u + v + u * v,
    "cubic1": lambda u, v: (u + v) * (u.square() + v.square()),
    "cubic2": lambda u, v: (u * v) ** 3,
}
MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(0),
    "product": lambda y: y.prod(0),
    "sum_product": lambda y: y.sum(0) + y.prod(0),
    "quadratic": lambda y: y.sum(0) + y.prod(0) + y.square().sum(0),
}


def af_basis(
    x: Float[Tensor, "*n d"],
    low: Float[Tensor, " m"],
    high: Float[Tensor, " m"],
    activation: str = "silu",
    combine: str = "quad1",
) -> Float[Tensor, "*n d m"]:
    """Functions of two shifted activations, ``u = a(x - low_j)`` and ``v = a(high_j - x)``.

    Parameters
    ----------
    x : (..., D)
        Inputs.
    low, high : (n,)
        Phases.
    activation : str
        a: silu, relu, leaky_relu, elu, gelu, selu, softplus, sigmoid or tanh.
    combine : str
        ``quad1`` (uv)^2, ``quad2`` uv + u^2 + v^2, ``sum`` u + v, ``prod`` uv, ``sum_prod`` u + v + uv, ``cubic1``
        (u + v)(u^2 + v^2), or ``cubic2`` (uv)^3.

    Raises
    ------
    ValueError
        If there is no such activation or combination.

    Examples
    --------
    >>> import torch
    >>> low, high = phases(grid=3, order=3)
    >>> af_basis(torch.tensor([0.2]), low, high, combine="prod")
    tensor([[ 0.0656,  0.1750,  0.1855,  0.0943, -0.0742, -0.2778]])
    """
    _one_of("activation", activation, ACTIVATIONS)
    _one_of("combine", combine, COMBINATIONS)
    a, x = ACTIVATIONS[activation], x.unsqueeze(-1)
    return COMBINATIONS[combine](a(x - low), a(high - x))


def phases(grid: int, order: int) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Initial phases, ``low_j = j / g`` for j = -k ... g - 1 and ``high_j = low_j + (k + 1) / g``."""
    if grid < 1:
        raise ValueError(f"grid: expected at least 1, got {grid}")
    if order < 0:
        raise ValueError(f"order: expected 0 or more, got {order}")
    low = torch.arange(-order, grid) / grid
    return low, low + (order + 1) / grid


def relu_kan_basis(
    x: Float[Tensor, "*n d"],
    low: Float[Tensor, "... m"],
    high: Float[Tensor, "... m"],
    scale: float,
    activation: str = "relu",
) -> Float[Tensor, "*n d m"]:
    """Functions of ReLU-KAN, ``(r a(x - low_j) a(high_j - x))^2``; see `relu_bump` for the ReLU.

    Parameters
    ----------
    low, high : (n,) or (D, n)
        Phases, shared by the inputs or one set for each.
    scale : float
        r.
    activation : str
        The authors of AF-KAN also try others in the place of the ReLU.
    """
    _one_of("activation", activation, ACTIVATIONS)
    if activation == "relu":
        return relu_bump(x, low, high, scale)
    a, x = ACTIVATIONS[activation], x.unsqueeze(-1)
    return (a(x - low) * a(high - x) * scale).square()


def function_norm(values: Float[Tensor, "*n d m"], kind: FuncNorm) -> Float[Tensor, "*n d m"]:
    """Scale functions to [0, 1], over all inputs and functions of a "sample", or over the whole "tensor".

    The authors' code normalises over the tensor, after a division by its norm that cancels out: the output of a sample
    then depends on the others in its batch, in evaluation as well.
    """
    return _scaled(values, _range(values, kind))


Range = tuple[Tensor, Tensor] | None


def _range(values: Tensor, kind: FuncNorm) -> Range:
    """Smallest value and range, (..., 1, 1) or a scalar."""
    if kind == "none":
        return None
    if kind == "sample":
        low, high = values.flatten(-2).aminmax(dim=-1, keepdim=True)
        low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    elif kind == "tensor":
        low, high = values.aminmax()
    else:
        raise ValueError(f"func_norm: expected 'none', 'sample' or 'tensor', got {kind!r}")
    return low, (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def _scaled(values: Tensor, scale: Range) -> Tensor:
    return values if scale is None else (values - scale[0]) / scale[1]


def _sums(values: Tensor, weights: Tensor, scale: Range) -> Tensor:
    """Sums over functions (..., D, W) with weights (W, n), of scaled values, which are never made: large tensors."""
    sums = F.linear(values, weights)
    return sums if scale is None else (sums - scale[0] * weights.sum(1)) / scale[1]


class _GlobalAttention(nn.Module):
    """``z_d = alpha_d sum_j F_dj``, alpha the softmax over the D inputs of ``(F w + c) / max(T, 1)``.

    The softmax runs over the inputs although the functions are what is reduced, so it scales inputs, by about 1/D; the
    normalisation that follows is needed. A constant c moves nothing.
    """

    def __init__(self, inputs: int, functions: int) -> None:
        super().__init__()
        self.score = nn.Linear(functions, 1)
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(inputs)))

    def forward(self, values: Tensor, scale: Range = None) -> Tensor:
        w = self.score.weight
        scores, total = _sums(values, torch.cat([w, torch.ones_like(w)]), scale).unbind(-1)
        return self.weights(scores) * total

    def weights(self, scores: Tensor) -> Tensor:
        return ((scores + self.score.bias) / self.temperature.clamp(min=1.0)).softmax(-1)


class _SpatialAttention(nn.Module):
    """``z_d = sum_j alpha_dj F_dj``, alpha the softmax over functions of a depthwise convolution along the inputs."""

    def __init__(self, inputs: int, functions: int) -> None:
        super().__init__()
        self.score = nn.Conv1d(functions, functions, 3, padding=1, groups=functions)
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(inputs)))

    def forward(self, values: Tensor, scale: Range = None) -> Tensor:
        values = _scaled(values, scale)
        return (self.weights(values) * values).sum(-1)

    def weights(self, values: Tensor) -> Tensor:
        scores: Tensor = self.score(values.transpose(1, 2)).transpose(1, 2)
        return (scores / self.temperature.clamp(min=1.0)).softmax(-1)


class _Multistep(nn.Module):
    """``z = F w + c``."""

    def __init__(self, inputs: int, functions: int) -> None:  # noqa: ARG002
        super().__init__()
        self.score = nn.Linear(functions, 1)

    def forward(self, values: Tensor, scale: Range = None) -> Tensor:
        return _sums(values, self.score.weight, scale).squeeze(-1) + self.score.bias


class _LocalAttention(nn.Module):
    """Attention among windows of two neighbouring functions, then a linear map of all to one."""

    WINDOW = 2

    def __init__(self, inputs: int, functions: int) -> None:
        super().__init__()
        if functions < self.WINDOW:
            raise ValueError(f"reduce: 'local_attn' needs at least 2 functions, got grid + order = {functions}")
        self.query, self.key, self.value = (nn.Linear(self.WINDOW, self.WINDOW) for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(inputs)))
        self.flat = nn.Linear(functions // self.WINDOW * self.WINDOW, 1)

    def forward(self, values: Tensor, scale: Range = None) -> Tensor:
        windows = _scaled(values, scale).unfold(-1, self.WINDOW, self.WINDOW)
        scores = self.query(windows) @ self.key(windows).transpose(-1, -2)
        mixed = (scores / self.temperature.clamp(min=1.0)).softmax(-1) @ self.value(windows)
        reduced: Tensor = self.flat(mixed.flatten(-2))
        return reduced.squeeze(-1)


class _SelfAttention(nn.Module):
    """Attention among the D inputs, unscaled but for the temperature, summed over functions; D x D scores."""

    def __init__(self, inputs: int, functions: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(functions, functions) for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(inputs)))

    def forward(self, values: Tensor, scale: Range = None) -> Tensor:
        values = _scaled(values, scale)
        mixed = F.scaled_dot_product_attention(
            self.query(values) / self.temperature.clamp(min=1.0), self.key(values), self.value(values), scale=1.0
        )
        return mixed.sum(-1)


class _MultiheadAttention(nn.Module):
    """``torch.nn.MultiheadAttention`` among the D inputs with a head for every function, summed over functions."""

    def __init__(self, inputs: int, functions: int) -> None:  # noqa: ARG002
        super().__init__()
        self.attention = nn.MultiheadAttention(functions, functions, batch_first=True)

    def forward(self, values: Tensor, scale: Range = None) -> Tensor:
        values = _scaled(values, scale)
        mixed: Tensor = self.attention(values, values, values, need_weights=False)[0]
        return mixed.sum(-1)


REDUCTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "global_attn": _GlobalAttention,
    "spatial_attn": _SpatialAttention,
    "multistep": _Multistep,
    "local_attn": _LocalAttention,
    "self_attn": _SelfAttention,
    "multihead_attn": _MultiheadAttention,
}


class AFKANLayer(nn.Module):
    """Layer of AF-KAN: expand every input into g + k functions, reduce them to one number, normalise, map.

    ``y = W a(Norm(reduce(F)))`` without a bias. With global attention and layer normalisation it has
    ``O D + 2 D + 2 n + (n + 1) + 1`` parameters, n = g + k.

    Parameters
    ----------
    in_features, out_features : int
        D and O.
    grid, order : int
        g and k.
    activation : str
        a; see [`af_basis`][classact.nn.af_basis].
    combine : str
        How the two shifted activations make a function; see [`af_basis`][classact.nn.af_basis].
    reduce : str or sequence of str
        ``global_attn``, ``spatial_attn``, ``multistep`` (linear), ``local_attn``, ``self_attn`` or
        ``multihead_attn``; the last two hold D x D scores. Several work side by side, with the same normalisation and
        map, and `merge` joins their outputs.
    merge : {"sum", "product", "sum_product", "quadratic"}
        How the outputs of several reductions are joined.
    norm : {"layer", "batch"}, optional
        Without one, global attention leaves numbers of about 1/D.
    func_norm : {"none", "sample", "tensor"}
        See [`function_norm`][classact.nn.afkan.function_norm]; "tensor" is the authors' code.
    train_phases : bool
        Whether the 2 n phases are learned.

    Raises
    ------
    ValueError
        If a name or size is not as above; in ``forward``, if the last dimension of the input is not D, or a single row
        is to be batch-normalised in training.

    Examples
    --------
    >>> import torch
    >>> layer = AFKANLayer(784, 64)
    >>> layer(torch.randn(32, 784)).shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int = 3,
        order: int = 3,
        activation: str = "silu",
        combine: str = "quad1",
        reduce: str | Sequence[str] = "global_attn",
        merge: str = "sum",
        norm: Norm = "layer",
        func_norm: FuncNorm = "sample",
        train_phases: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features)
        _one_of("activation", activation, ACTIVATIONS)
        _one_of("combine", combine, COMBINATIONS)
        _one_of("merge", merge, MERGES)
        function_norm(torch.zeros(1, 1), func_norm)
        names = (reduce,) if isinstance(reduce, str) else tuple(reduce)
        if not names:
            raise ValueError("reduce: expected at least one name, got none")
        for name in names:
            _one_of("reduce", name, REDUCTIONS)
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.combine, self.merge, self.func_norm = activation, combine, merge, func_norm
        low, high = phases(grid, order)
        self.low = nn.Parameter(low, requires_grad=train_phases)
        self.high = nn.Parameter(high, requires_grad=train_phases)
        self.reductions = nn.ModuleList(REDUCTIONS[name](in_features, grid + order) for name in names)
        self.norm = input_norm(norm, in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "grid": grid,
            "order": order,
            "activation": activation,
            "combine": combine,
            "reduce": reduce if isinstance(reduce, str) else list(names),
            "merge": merge,
            "norm": norm,
            "func_norm": func_norm,
            "train_phases": train_phases,
        }

    def basis(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d m"]:
        """Functions of the inputs, normalised."""
        return function_norm(self._functions(x), self.func_norm)

    def _functions(self, x: Tensor) -> Tensor:
        return af_basis(x, self.low, self.high, self.activation, self.combine)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        check_features(x, self.in_features)
        values = self._functions(x.reshape(-1, self.in_features))
        if self.training and isinstance(self.norm, nn.BatchNorm1d) and len(values) < 2:
            raise ValueError(f"x: batch normalisation needs at least two rows in training, got {tuple(x.shape)}")
        scale = _range(values, self.func_norm)
        outputs = [self._output(reduction(values, scale)) for reduction in self.reductions]
        y = outputs[0] if len(outputs) == 1 else MERGES[self.merge](torch.stack(outputs))
        return y.reshape(*x.shape[:-1], self.out_features)

    def _output(self, z: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[self.activation](normalized(self.norm, z)), self.weight)


class AFKAN(nn.Module):
    """A network of AF-KAN layers, without anything between them; the last layer's outputs are logits.

    Parameters
    ----------
    widths : sequence of int
        Number of inputs, of nodes in every hidden layer, of outputs; 784, 64, 10 in the paper.
    **layer
        As for [`AFKANLayer`][classact.nn.AFKANLayer].

    Examples
    --------
    >>> model = AFKAN([784, 64, 10])
    >>> sum(p.numel() for p in model.parameters())
    52552
    """

    def __init__(self, widths: Sequence[int], **layer: Any) -> None:
        super().__init__()
        _check_widths(widths)
        self.config: dict[str, Any] = {"widths": list(widths), **layer}
        self.layers = nn.ModuleList(AFKANLayer(d, o, **layer) for d, o in pairwise(widths))

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        for layer in self.layers:
            x = layer(x)
        return x


class ReLUKANLayer(nn.Module):
    """Layer of ReLU-KAN: a linear map of all functions of all inputs, ``D n`` in number, each input with own phases.

    Normalised first, as in the comparison by the authors of AF-KAN; their code reshapes where it should transpose
    before it mixes, which only permutes what is learned.

    Parameters
    ----------
    in_features, out_features : int
        D and O.
    grid, order : int
        g and k; n = g + k.
    activation : str
        See [`relu_kan_basis`][classact.nn.relu_kan_basis].
    norm : {"layer", "batch"}, optional
        Of the input.
    train_phases : bool
        Whether the 2 D n phases are learned.

    Examples
    --------
    >>> import torch
    >>> ReLUKANLayer(784, 64)(torch.randn(32, 784)).shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int = 3,
        order: int = 3,
        activation: str = "relu",
        norm: Norm = "layer",
        train_phases: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features)
        _one_of("activation", activation, ACTIVATIONS)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        low, high = phases(grid, order)
        self.scale = 4 * grid**2 / (order + 1) ** 2
        self.low = nn.Parameter(low.repeat(in_features, 1), requires_grad=train_phases)
        self.high = nn.Parameter(high.repeat(in_features, 1), requires_grad=train_phases)
        self.norm = input_norm(norm, in_features)
        self.linear = nn.Linear(in_features * (grid + order), out_features)
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "grid": grid,
            "order": order,
            "activation": activation,
            "norm": norm,
            "train_phases": train_phases,
        }

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        check_features(x, self.in_features)
        values = relu_kan_basis(normalized(self.norm, x), self.low, self.high, self.scale, self.activation)
        y: Tensor = self.linear(values.flatten(-2))
        return y


class ReLUKAN(nn.Module):
    """A network of ReLU-KAN layers.

    Parameters
    ----------
    widths : sequence of int
        Number of inputs, of nodes in every hidden layer, of outputs.
    **layer
        As for [`ReLUKANLayer`][classact.nn.ReLUKANLayer].
    """

    def __init__(self, widths: Sequence[int], **layer: Any) -> None:
        super().__init__()
        _check_widths(widths)
        self.config: dict[str, Any] = {"widths": list(widths), **layer}
        self.layers = nn.ModuleList(ReLUKANLayer(d, o, **layer) for d, o in pairwise(widths))

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        for layer in self.layers:
            x = layer(x)
        return x


def _check_sizes(in_features: int, out_features: int) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2:
        raise ValueError(f"widths: expected at least the numbers of inputs and outputs, got {list(widths)}")


def _one_of(name: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
