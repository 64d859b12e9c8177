"""S-KAN: Kolmogorov-Arnold networks whose nodes choose their family of functions.

Yang, Zhang, Luo, Lu, Shen: Activation Space Selectable Kolmogorov-Arnold Networks, 2024,
https://arxiv.org/abs/2408.08338. No code of S-KAN is known; SeriYann/KANConv2d, the convolutions that ask to be cited
with the paper, has the families and the form of the convolution.

Every edge holds functions of K families ("activation spaces"), ``phi_oi = sum_k s_ik sum_j c^k_oij B^k_j``, weighted
by gates s_i on the simplex. Training has three stages: all spaces; selection, in which every node loses one space
after the other; and, after what is unused has been deleted, fine-tuning of a network as large as one with a single
space. The paper states the pool, the adaptive weights of each node and the three stages. The rest is inferred: the
gates are a softmax, a node is an input of a layer, its spaces go one at a time and those first that contribute least,
stages take 30, 40 and 30 % of the steps, and the learning rate falls in the last one only. In small trials it did worse
to remove all spaces but one at once, or to let the learning rate fall while spaces are still being removed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.nn.kan_bases import (
    ACTIVATIONS,
    Norm,
    Space,
    base_parameter,
    basis_of,
    check_channels,
    check_features,
    check_image,
    expand_channels,
    input_norm,
    normalized,
    padded,
    pair,
)
from classact.nn.swap import replace

Selection = Literal["contribution", "gate", "validation", "random"]
Batches = tuple[Tensor, Tensor] | Iterable[Any]
Model = TypeVar("Model", bound=nn.Module)

# eight functions each, so that a choice hardly changes the number of parameters
POOL: tuple[Space, ...] = (
    "bspline",
    ("rbf", {"low": -1.5, "high": 1.5}),
    ("chebyshev", {"degree": 7}),
    "wavelet",
)
_ELEMENTS = 2**24  # of the largest tensor that `importance` makes


class _Mixture(nn.Module):
    """Coefficients (O, C/groups, m_k, *kernel) of every space, and gates (*nodes, K)."""

    alive: Tensor

    def __init__(
        self,
        edges: tuple[int, ...],
        nodes: tuple[int, ...],
        pool: Sequence[Space],
        keep: int,
        base: str | None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= keep <= len(pool):
            raise ValueError(f"keep: expected 1 to {len(pool)}, the number of spaces in the pool, got {keep}")
        self.pool, self.keep, self.base, self.groups = _plain(pool), keep, base, groups
        self.edges, self.nodes, self.temperature = edges, nodes, 1.0
        bases = [basis_of(space) for space in pool]
        self.bases = nn.ModuleList(bases)
        self.coefficients = nn.ParameterList(
            _coefficients(*edges[:2], basis.num, *edges[2:], fan_in=math.prod(edges[1:])) for basis in bases
        )
        self.base_weight = base_parameter(base, *edges)
        self.gate_logits = nn.Parameter(torch.zeros(*nodes, len(pool)))
        self.register_buffer("alive", torch.ones(*nodes, len(pool), dtype=torch.bool))
        self._importance: Tensor | None = None

    def gates(self) -> Float[Tensor, "*nodes k"]:
        """Weight of every space at every node: softmax over the spaces not yet dropped; they sum to 1."""
        return (self.gate_logits / self.temperature).masked_fill(~self.alive, -torch.inf).softmax(-1)

    def gate_entropy(self) -> Float[Tensor, ""]:
        """Mean entropy of the gates over the nodes, in nats; 0 where every node has chosen."""
        gates = self.gates()
        # not xlogy, whose derivative at 0 is infinite: spaces that were dropped would get NaN for their gradient
        return -(gates * gates.clamp(min=torch.finfo(gates.dtype).tiny).log()).sum(-1).mean()

    def _per_edge(self, values: Tensor) -> Tensor:
        """Nodes' values (*nodes) in a shape that broadcasts with (O, C/groups, *kernel)."""
        if not self.nodes:
            return values.reshape((1,) * len(self.edges))
        if len(self.nodes) < 2 or self.nodes[:2] != self.edges[:2]:
            values = values.unflatten(0, (self.groups, -1))
            if self.groups > 1:
                values = values.repeat_interleave(self.edges[0] // self.groups, 0)
        return values.reshape(values.shape + (1,) * (len(self.edges) - values.ndim))

    def _weighted(self, gates: Tensor, k: int) -> Tensor:
        return self.coefficients[k] * self._per_edge(gates[..., k]).unsqueeze(2)

    def _samples(self, x: Tensor) -> Tensor:
        """Normalised inputs (S, C)."""
        raise NotImplementedError

    @torch.no_grad()
    def importance(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*nodes k"]:
        """Contribution of every space at every node: mean over inputs and outputs of ``|s_ik (f_oi^k(x_i) - mean)|``.

        The mean of each function is taken out: a constant moves the output, but tells nothing of the input. Offsets
        of a kernel, or nodes, that share a choice add up. What is returned is also what ``prune`` will go by.

        Parameters
        ----------
        x : same shape as for ``forward``
            A batch of the layer's inputs.
        """
        samples = self._samples(x)
        out, channels, *kernel = self.edges
        gates, found = self.gates(), []
        for k, basis in enumerate(self.bases):
            values = basis(samples)
            centred = (values - values.mean(0)).unflatten(1, (self.groups, channels))
            coefficients = self.coefficients[k].reshape(self.groups, -1, channels, values.shape[-1], math.prod(kernel))
            total = torch.zeros_like(coefficients[:, :, :, 0])
            for part in centred.split(max(1, _ELEMENTS // math.prod(self.edges))):
                total += torch.einsum("sgcm,gocmq->sgocq", part, coefficients).abs().sum(0)
            edges = (total / len(samples)).reshape(out, channels, *kernel) * self._per_edge(gates[..., k])
            found.append(self._per_node(edges))
        self._importance = torch.stack(found, -1)
        return self._importance

    def _per_node(self, edges: Tensor) -> Tensor:
        if self.nodes == self.edges:
            return edges
        nodes = edges.unflatten(0, (self.groups, -1)).mean(1).flatten(0, 1)  # (C, *kernel)
        return nodes.sum(dim=tuple(range(len(self.nodes), nodes.ndim))) if len(self.nodes) < nodes.ndim else nodes

    @torch.no_grad()
    def drop(self, scores: Float[Tensor, "*nodes k"]) -> None:
        """Take from every node that has more than `keep` spaces left the one with the lowest score."""
        if scores.shape != self.alive.shape:
            raise ValueError(f"scores: expected shape {tuple(self.alive.shape)}, got {tuple(scores.shape)}")
        lowest = scores.masked_fill(~self.alive, torch.inf).argmin(-1, keepdim=True)
        lost = torch.zeros_like(self.alive).scatter(-1, lowest, value=True)
        lost &= self.alive.sum(-1, keepdim=True) > self.keep
        self.alive &= ~lost

    def _chosen(self, choice: Literal["contribution", "gate"] | Tensor | None) -> Tensor:
        """Spaces that stay, (*nodes, K) bool."""
        if isinstance(choice, Tensor):
            if choice.shape != self.nodes or choice.min() < 0 or choice.max() >= len(self.pool):
                raise ValueError(
                    f"choice: expected numbers of spaces, 0 to {len(self.pool) - 1}, in shape {self.nodes}, got shape"
                    f" {tuple(choice.shape)}"
                )
            return torch.zeros_like(self.alive).scatter(-1, choice.unsqueeze(-1), value=True)
        if choice is None and bool((self.alive.sum(-1) == self.keep).all()):
            return self.alive.clone()
        if choice == "gate":
            scores = self.gates()
        elif choice in (None, "contribution"):
            if self._importance is None:
                raise ValueError("choice: by contribution needs a call of importance(x) first; or choose 'gate'")
            scores = self._importance
        else:
            raise ValueError(f"choice: expected 'contribution', 'gate', a tensor or None, got {choice!r}")
        best = scores.masked_fill(~self.alive, -torch.inf).topk(self.keep, -1).indices
        return torch.zeros_like(self.alive).scatter(-1, best, value=True) & self.alive

    @torch.no_grad()
    def _hand_over(self, pruned: "_Selected", chosen: Tensor) -> None:
        """Copy what stays, its gates multiplied into the coefficients."""
        gates = (self.gate_logits / self.temperature).masked_fill(~chosen, -torch.inf).softmax(-1)
        for i, k in enumerate(pruned.spaces):
            pruned.set_coefficients(i, self._weighted(gates, k))
            pruned.bases[i].load_state_dict(self.bases[k].state_dict())
        if self.base_weight is not None:
            cast("Tensor", pruned.base_weight).copy_(self.base_weight)
        pruned.to(self.gate_logits.device, self.gate_logits.dtype).train(self.training)


class _Selected(nn.Module):
    """Coefficients of the chosen spaces alone.

    Where a choice holds for a channel as a whole, each space gets its channels, ``index``, and coefficients
    (O, n_k, m_k, *kernel). Else it gets a mask of its edges (O, C/groups, *kernel) and coefficients (edges, m_k),
    which are laid out in a full kernel before they are used.
    """

    def __init__(
        self,
        edges: tuple[int, ...],
        pool: Sequence[Space],
        assignment: Bool[Tensor, "*nodes k"],
        base: str | None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        out, channels, *kernel = edges
        allowed = ((channels * groups,), (channels * groups, *kernel), edges)
        nodes = tuple(assignment.shape[:-1])
        if nodes not in allowed or assignment.shape[-1] != len(pool):
            raise ValueError(
                f"assignment: expected {len(pool)} values for each of {' or '.join(map(str, allowed))} nodes, got shape"
                f" {tuple(assignment.shape)}"
            )
        if not bool(assignment.any(-1).all()):
            raise ValueError("assignment: expected at least one space for every node")
        self.base, self.groups, self.edges = base, groups, edges
        self.spaces = [k for k in range(len(pool)) if assignment[..., k].any()]
        self.whole = len(nodes) == 1 and groups == 1
        bases = [basis_of(pool[k]) for k in self.spaces]
        self.bases = nn.ModuleList(bases)
        self.coefficients = nn.ParameterList()
        self.register_buffer("assignment", assignment, persistent=False)
        for i, (k, basis) in enumerate(zip(self.spaces, bases, strict=True)):
            of_space = assignment[..., k]
            if self.whole:
                where = of_space.nonzero().flatten()
                shape: tuple[int, ...] = (out, len(where), basis.num, *kernel)
            else:
                if nodes != edges:
                    of_space = of_space.unflatten(0, (groups, channels)).repeat_interleave(out // groups, 0)
                    of_space = of_space.reshape(of_space.shape + (1,) * (len(edges) - of_space.ndim))
                where = of_space.expand(edges).clone()
                shape = (int(where.sum()), basis.num)
            self.register_buffer(f"where_{i}", where, persistent=False)
            self.coefficients.append(_coefficients(*shape, fan_in=math.prod(edges[1:])))
        self.base_weight = base_parameter(base, *edges)

    def _kernel(self, i: int) -> Tensor:
        """Coefficients (O, n, m, *kernel) of the i-th space that is in use."""
        own = self.coefficients[i]
        if self.whole:
            return own
        where = getattr(self, f"where_{i}")
        laid_out = own.new_zeros(*self.edges, own.shape[-1]).masked_scatter(where.unsqueeze(-1), own)
        return laid_out.movedim(-1, 2)

    def set_coefficients(self, i: int, kernel: Tensor) -> None:
        """Take from a full kernel (O, C/groups, m, *kernel) what belongs to the i-th space in use."""
        where = getattr(self, f"where_{i}").to(kernel.device)
        own = kernel.index_select(1, where) if self.whole else kernel.movedim(2, -1)[where]
        self.coefficients[i].copy_(own)

    def _inputs(self, x: Tensor, i: int, dim: int) -> Tensor:
        where = getattr(self, f"where_{i}")
        return x.index_select(dim, where) if self.whole and len(where) < x.shape[dim] else x


class SKANLinear(_Mixture):
    """Layer of S-KAN: ``y_o = sum_i [ w_oi b(x_i) + sum_k s_ik sum_j c^k_oij B^k_j(x_i) ]``.

    It starts as the mean of K layers with one space each.

    Parameters
    ----------
    in_features, out_features : int
        D and O.
    pool : sequence of str or (str, dict)
        The spaces, as in [`kan_basis`][classact.nn.kan_basis]; by default B-splines, Gaussians, Chebyshev polynomials
        and wavelets, of eight functions each.
    select : {"node", "edge", "layer"}
        What chooses: every input, every pair of output and input, or the layer as a whole.
    keep : int
        How many spaces stay.
    base : {"silu", "gelu", "relu", "tanh", "identity"}, optional
        b; None leaves the base branch out.
    norm : {"layer", "batch"}, optional
        Normalisation of the input, the same for all spaces.

    Raises
    ------
    ValueError
        If the pool is empty or names an unknown space, `keep` is larger than it, or, in ``forward``, the last dimension
        of the input is not D.

    Examples
    --------
    >>> import torch
    >>> layer, x = SKANLinear(10, 3), torch.rand(64, 10) * 2 - 1
    >>> layer.gates().shape
    torch.Size([10, 4])
    >>> for _ in range(3):
    ...     layer.drop(layer.importance(x))
    >>> pruned = layer.prune()
    >>> torch.allclose(pruned(x), layer(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pool: Sequence[Space] = POOL,
        select: Literal["node", "edge", "layer"] = "node",
        keep: int = 1,
        base: str | None = "silu",
        norm: Norm = None,
    ) -> None:
        nodes = {"node": (in_features,), "edge": (out_features, in_features), "layer": ()}
        if select not in nodes:
            raise ValueError(f"select: expected 'node', 'edge' or 'layer', got {select!r}")
        _check_sizes(pool, in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), nodes[select], pool, keep, base)
        self.in_features, self.out_features = in_features, out_features
        self.norm = input_norm(norm, in_features)
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "pool": self.pool,
            "select": select,
            "keep": keep,
            "base": base,
            "norm": norm,
        }

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        check_features(x, self.in_features)
        x, gates = normalized(self.norm, x), self.gates()
        terms = [
            F.linear(basis(x).flatten(-2), self._weighted(gates, k).flatten(1)) for k, basis in enumerate(self.bases)
        ]
        return _sum(terms, _linear_base(self, x))

    def _samples(self, x: Tensor) -> Tensor:
        check_features(x, self.in_features)
        return normalized(self.norm, x).flatten(0, -2) if x.ndim > 1 else normalized(self.norm, x).unsqueeze(0)

    def prune(
        self, choice: Literal["contribution", "gate"] | Int[Tensor, "*nodes"] | None = None
    ) -> "GroupedKANLinear":
        """Return a layer with the chosen spaces alone, the gates multiplied into the coefficients.

        Parameters
        ----------
        choice : {"contribution", "gate"} or int tensor (*nodes), optional
            By default what is left after ``drop``, or where that is more than `keep`, what contributed most when
            ``importance`` was last called.

        Raises
        ------
        ValueError
            If it is to go by contribution and ``importance`` was never called.
        """
        chosen = self._chosen(choice)
        assignment = chosen if self.nodes else chosen.expand(self.in_features, -1)
        settings: dict[str, Any] = {
            key: self.config[key] for key in ("in_features", "out_features", "pool", "base", "norm")
        }
        pruned = GroupedKANLinear(**settings, assignment=assignment.tolist())
        self._hand_over(pruned, chosen)
        _copy_norm(self.norm, pruned.norm)
        return pruned


class GroupedKANLinear(_Selected):
    """What is left of an [`SKANLinear`][classact.nn.SKANLinear]: inputs grouped by their space.

    As many parameters and operations as a layer with a single space. Where every edge has its own space, the
    parameters are as few, but every space is evaluated for all inputs.

    Parameters
    ----------
    in_features, out_features : int
        D and O.
    pool : sequence of str or (str, dict)
        The K spaces.
    assignment : nested list or array of bool, (D, K) or (O, D, K)
        Which spaces each input, or each edge, has.
    base, norm
        As in [`SKANLinear`][classact.nn.SKANLinear].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pool: Sequence[Space],
        assignment: Any,
        base: str | None = "silu",
        norm: Norm = None,
    ) -> None:
        _check_sizes(pool, in_features=in_features, out_features=out_features)
        chosen = torch.as_tensor(assignment, dtype=torch.bool)
        super().__init__((out_features, in_features), pool, chosen, base)
        self.in_features, self.out_features = in_features, out_features
        self.norm = input_norm(norm, in_features)
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "pool": _plain(pool),
            "assignment": chosen.tolist(),
            "base": base,
            "norm": norm,
        }

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        check_features(x, self.in_features)
        x = normalized(self.norm, x)
        terms = [
            F.linear(basis(self._inputs(x, i, -1)).flatten(-2), self._kernel(i).flatten(1))
            for i, basis in enumerate(self.bases)
        ]
        return _sum(terms, _linear_base(self, x))


class SKANConv2d(_Mixture):
    """S-ConvKAN: a convolution whose kernel holds functions of K spaces with gates.

    Equal to cutting out the patches and passing each through an [`SKANLinear`][classact.nn.SKANLinear] of C kh kw
    inputs, but the patches are never made: the channels are expanded, and the gates act on the kernel. The input is
    padded with zeros before it is expanded, so a function adds its value at 0 at the border.

    Parameters
    ----------
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, padding, dilation : int or pair of int
        As in ``torch.nn.Conv2d``.
    groups : int
        As in ``torch.nn.Conv2d``.
    pool, keep, base, norm
        As in [`SKANLinear`][classact.nn.SKANLinear].
    select : {"channel", "node", "edge", "layer"}
        What chooses: every input channel, every pair of channel and offset in the kernel, every entry of the kernel, or
        the layer. Pruned, the first and the last (without groups) cost what one space costs; the others cost K times
        that, with as few parameters.

    Examples
    --------
    >>> import torch
    >>> SKANConv2d(3, 8, kernel_size=3, padding=1)(torch.randn(2, 3, 16, 16)).shape
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
        pool: Sequence[Space] = POOL,
        select: Literal["channel", "node", "edge", "layer"] = "channel",
        keep: int = 1,
        base: str | None = "silu",
        norm: Norm = None,
    ) -> None:
        check_channels(in_channels, out_channels, groups)
        _check_sizes(pool)
        kernel = pair("kernel_size", kernel_size, 1)
        edges = (out_channels, in_channels // groups, *kernel)
        nodes = {"channel": (in_channels,), "node": (in_channels, *kernel), "edge": edges, "layer": ()}
        if select not in nodes:
            raise ValueError(f"select: expected 'channel', 'node', 'edge' or 'layer', got {select!r}")
        super().__init__(edges, nodes[select], pool, keep, base, groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.geometry = _geometry(stride, padding, dilation)
        self.norm = input_norm(norm, in_channels, spatial=True)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel,
            **self.geometry,
            "groups": groups,
            "pool": self.pool,
            "select": select,
            "keep": keep,
            "base": base,
            "norm": norm,
        }

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Map (N, C, H, W) to (N, O, H', W')."""
        x, gates = self._padded(x), self.gates()
        terms = [
            _convolve(self, expand_channels(basis, x), self._weighted(gates, k).flatten(1, 2))
            for k, basis in enumerate(self.bases)
        ]
        return _sum(terms, _conv_base(self, x))

    def _padded(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels)
        return padded(x if self.norm is None else self.norm(x), self.geometry["padding"])

    def _samples(self, x: Tensor) -> Tensor:
        return self._padded(x).permute(0, 2, 3, 1).flatten(0, 2)

    def prune(
        self, choice: Literal["contribution", "gate"] | Int[Tensor, "*nodes"] | None = None
    ) -> "GroupedKANConv2d":
        """Return a convolution with the chosen spaces alone; see [`SKANLinear`][classact.nn.SKANLinear]'s."""
        chosen = self._chosen(choice)
        assignment = chosen if self.nodes else chosen.expand(self.in_channels, -1)
        settings: dict[str, Any] = {key: value for key, value in self.config.items() if key not in ("select", "keep")}
        pruned = GroupedKANConv2d(**settings, assignment=assignment.tolist())
        self._hand_over(pruned, chosen)
        _copy_norm(self.norm, pruned.norm)
        return pruned


class GroupedKANConv2d(_Selected):
    """What is left of an [`SKANConv2d`][classact.nn.SKANConv2d]: channels grouped by their space.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, pool, base, norm
        As in [`SKANConv2d`][classact.nn.SKANConv2d].
    assignment : nested list or array of bool, (C, K), (C, kh, kw, K) or (O, C/groups, kh, kw, K)
        Which spaces each channel, pair of channel and offset, or entry of the kernel has.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        pool: Sequence[Space],
        assignment: Any,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        base: str | None = "silu",
        norm: Norm = None,
    ) -> None:
        check_channels(in_channels, out_channels, groups)
        _check_sizes(pool)
        kernel = pair("kernel_size", kernel_size, 1)
        chosen = torch.as_tensor(assignment, dtype=torch.bool)
        super().__init__((out_channels, in_channels // groups, *kernel), pool, chosen, base, groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.geometry = _geometry(stride, padding, dilation)
        self.norm = input_norm(norm, in_channels, spatial=True)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel,
            "pool": _plain(pool),
            "assignment": chosen.tolist(),
            **self.geometry,
            "groups": groups,
            "base": base,
            "norm": norm,
        }

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Map (N, C, H, W) to (N, O, H', W')."""
        check_image(x, self.in_channels)
        x = padded(x if self.norm is None else self.norm(x), self.geometry["padding"])
        terms = [
            _convolve(self, expand_channels(basis, self._inputs(x, i, 1)), self._kernel(i).flatten(1, 2))
            for i, basis in enumerate(self.bases)
        ]
        return _sum(terms, _conv_base(self, x))


class SKAN(nn.Module):
    """A network of S-KAN layers; train it with [`fit_skan`][classact.nn.fit_skan].

    Parameters
    ----------
    widths : sequence of int
        Number of inputs, of nodes in every hidden layer, of outputs.
    pool, select, keep, base, norm
        As in [`SKANLinear`][classact.nn.SKANLinear].
    assignments : list, optional
        For each layer the spaces of its nodes, as [`GroupedKANLinear`][classact.nn.GroupedKANLinear] takes them: the
        network is then a pruned one, as ``prune`` returns it.

    Examples
    --------
    >>> import torch
    >>> model = SKAN([2, 5, 1])
    >>> model(torch.rand(64, 2) * 2 - 1).shape
    torch.Size([64, 1])
    """

    def __init__(
        self,
        widths: Sequence[int],
        pool: Sequence[Space] = POOL,
        select: Literal["node", "edge", "layer"] = "node",
        keep: int = 1,
        base: str | None = "silu",
        norm: Norm = None,
        assignments: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least the numbers of inputs and outputs, got {list(widths)}")
        if assignments is not None and len(assignments) != len(widths) - 1:
            raise ValueError(f"assignments: expected one for each of {len(widths) - 1} layers, got {len(assignments)}")
        self.config: dict[str, Any] = {
            "widths": list(widths),
            "pool": _plain(pool),
            "select": select,
            "keep": keep,
            "base": base,
            "norm": norm,
            "assignments": None if assignments is None else list(assignments),
        }
        sizes = list(pairwise(widths))
        self.layers = nn.ModuleList(
            [SKANLinear(d, o, pool, select, keep, base, norm) for d, o in sizes]
            if assignments is None
            else [
                GroupedKANLinear(d, o, pool, chosen, base, norm)
                for (d, o), chosen in zip(sizes, assignments, strict=True)
            ]
        )

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Map (..., D) to (..., O)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def prune(self, choice: Literal["contribution", "gate"] | None = None) -> "SKAN":
        """Return the network with the chosen spaces alone; see [`SKANLinear`][classact.nn.SKANLinear]'s."""
        if self.config["assignments"] is not None:
            raise ValueError("model: is pruned already")
        layers = [cast("SKANLinear", layer).prune(choice) for layer in self.layers]
        settings: dict[str, Any] = {**self.config, "assignments": [layer.config["assignment"] for layer in layers]}
        pruned = SKAN(**settings)
        pruned.layers = nn.ModuleList(layers)
        return pruned.train(self.training)


def prune_spaces(model: nn.Module) -> nn.Module:
    """Put the pruned layer in the place of every layer of S-KAN, in place; a layer or an SKAN itself is returned anew.

    Raises
    ------
    ValueError
        If there is none in the model.
    """
    _mixtures(model)
    if isinstance(model, SKAN | SKANLinear | SKANConv2d):
        return model.prune()
    # whole networks first: they hold layers, and their settings change with them
    replace(model, SKAN, lambda old: old.prune() if old.config["assignments"] is None else old, strict=False)
    replace(model, (SKANLinear, SKANConv2d), lambda old: old.prune(), strict=False)
    return model


@torch.no_grad()
def drop_spaces(
    model: nn.Module,
    x: Tensor,
    selection: Selection = "contribution",
    loss: Callable[[nn.Module], Tensor] | None = None,
) -> None:
    """Take from every node of a model's S-KAN layers its least useful space, unless it has only `keep` left.

    Parameters
    ----------
    model : Module
        Holds layers of S-KAN.
    x : Tensor
        A batch of the model's inputs, on which contributions are measured.
    selection : {"contribution", "gate", "validation", "random"}
        Lowest contribution to the layer's output; smallest gate, which gates and coefficients can trade; smallest loss
        without that space at that node, which takes one evaluation for every node and space; or, as a control, any.
    loss : callable, optional
        For "validation": the loss of the model.
    """
    layers = _mixtures(model)
    flags = [(module, module.training) for module in model.modules()]
    inputs: dict[nn.Module, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0])) for layer in layers
    ]
    try:
        model.eval()
        if selection == "contribution":
            model(x)
            scores = [layer.importance(inputs[layer]) for layer in layers]
        elif selection == "gate":
            scores = [layer.gates() for layer in layers]
        elif selection == "random":
            scores = [torch.rand_like(layer.gate_logits) for layer in layers]
        elif selection == "validation":
            if loss is None:
                raise ValueError("selection: 'validation' needs validation data")
            scores = [_losses_without(layer, lambda: loss(model)) for layer in layers]
        else:
            raise ValueError(f"selection: expected 'contribution', 'gate', 'validation' or 'random', got {selection!r}")
    finally:
        for handle in handles:
            handle.remove()
        for module, training in flags:
            module.training = training
    for layer, of_layer in zip(layers, scores, strict=True):
        layer.drop(of_layer)


def _losses_without(layer: _Mixture, loss: Callable[[], Tensor]) -> Tensor:
    alive = layer.alive.view(-1, layer.alive.shape[-1])
    scores = torch.zeros_like(layer.gate_logits).view(alive.shape)
    for node, space in alive.nonzero().tolist():
        if alive[node].sum() > 1:
            alive[node, space] = False
            try:
                scores[node, space] = loss()
            finally:
                alive[node, space] = True
    return scores.view(layer.alive.shape)


def _mixtures(model: nn.Module) -> list[_Mixture]:
    layers = [module for module in model.modules() if isinstance(module, _Mixture)]
    if not layers:
        raise ValueError("model: expected at least one SKANLinear or SKANConv2d that is not pruned yet, found none")
    return layers


class Stages(NamedTuple):
    """Steps before which a space is dropped, and the step before which the unused ones are deleted."""

    drops: tuple[int, ...]
    prune: int


def plan_stages(model: nn.Module, steps: int, stages: Sequence[float] = (0.3, 0.4, 0.3)) -> Stages:
    """Split `steps` into full, selective and fine-tuning; the second into as many equal parts as spaces have to go.

    Raises
    ------
    ValueError
        If `stages` are not three parts that sum to 1, or there are too few steps for them.
    """
    if len(stages) != 3 or min(stages) < 0 or abs(sum(stages) - 1) > 1e-6:
        raise ValueError(f"stages: expected three parts that sum to 1, got {tuple(stages)}")
    n = max(len(layer.pool) - layer.keep for layer in _mixtures(model))
    full, prune = round(stages[0] * steps), round((stages[0] + stages[1]) * steps)
    if prune - full < n or prune >= steps:
        raise ValueError(f"steps: expected enough to drop {n} spaces and to fine-tune at stages {stages}, got {steps}")
    return Stages(tuple(full + (prune - full) * i // n for i in range(n)), prune)


def rate_factor(step: int, prune: int, steps: int) -> float:
    """Learning rate at a step in relation to the first: 1 up to the step `prune`, half a cosine from there to 0."""
    return 1.0 if step < prune else 0.5 * (1 + math.cos(math.pi * (step - prune) / (steps - prune)))


class SKANHistory(NamedTuple):
    """How a training went.

    Attributes
    ----------
    loss : list of float
        Training loss of every step.
    stages : Stages
        When spaces were dropped and deleted.
    val_loss : list of float
        Validation loss after the first, the second and the last stage; empty without validation data.
    """

    loss: list[float]
    stages: Stages
    val_loss: list[float]


def fit_skan(
    model: Model,
    train: Batches,
    val: Batches | None = None,
    *,
    steps: int = 600,
    stages: Sequence[float] = (0.3, 0.4, 0.3),
    lr: float = 1e-2,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    selection: Selection = "contribution",
    temperature: float | None = None,
    entropy: float = 0.0,
    seed: int = 0,
) -> tuple[Model, SKANHistory]:
    """Train in three stages and return the pruned network.

    AdamW, started anew for the pruned network. The learning rate is constant as long as spaces are removed, so that
    what stays can adapt, and falls along half a cosine while the pruned network is fine-tuned.

    Parameters
    ----------
    model : Module
        Holds layers of S-KAN, and whatever else; trained in place, except that an [`SKAN`][classact.nn.SKAN], or a
        layer, which cannot be replaced in place, is returned as a new module.
    train, val : (x, y) or iterable of (x, y)
        Two tensors, or a loader. Validation data are needed for ``selection="validation"`` only.
    steps : int
        In all three stages together.
    stages : three floats
        Their parts.
    lr, weight_decay : float
        Of AdamW.
    batch_size : int, optional
        If `train` is two tensors: draw batches of them; by default every step uses all.
    loss : callable
        ``loss(model(x), y)``, the mean over a batch.
    selection : {"contribution", "gate", "validation", "random"}
        What goes first; see [`drop_spaces`][classact.nn.skan.drop_spaces].
    temperature : float, optional
        Divide the logits of the gates by a temperature that falls from 1 to this in the second stage.
    entropy : float
        Weight of the mean entropy of the gates in the loss.
    seed : int
        Of the order of the batches.

    Raises
    ------
    ValueError
        If the model has no layer of S-KAN, there are too few steps, or a setting is not as above.

    Examples
    --------
    >>> import torch
    >>> x = torch.rand(128, 2) * 2 - 1
    >>> y = x.prod(1, keepdim=True)
    >>> model, history = fit_skan(SKAN([2, 3, 1]), (x, y), steps=60)
    >>> history.stages
    Stages(drops=(18, 26, 34), prune=42)
    """
    plan = plan_stages(model, steps, stages)
    selective = plan.drops[0] if plan.drops else plan.prune
    if selection == "validation" and val is None:
        raise ValueError("val: selection by validation needs validation data, got None")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")

    def evaluate(network: nn.Module) -> Tensor:
        pairs = [val] if isinstance(val, tuple) else cast("Iterable[Any]", val)
        losses, sizes = zip(*((loss(network(x), y), len(x)) for x, y in pairs), strict=True)
        weights = torch.tensor(sizes, dtype=losses[0].dtype, device=losses[0].device)
        return (torch.stack(losses) * weights).sum() / weights.sum()

    def validate() -> None:
        if val is not None:
            model.eval()
            with torch.no_grad():
                val_losses.append(float(evaluate(model)))
            model.train()

    model.train()
    losses: list[float] = []
    val_losses: list[float] = []
    optimizer = _optimizer(model, lr, weight_decay)
    mixtures = _mixtures(model)
    for step, (x, y) in zip(range(steps), _endless(train, batch_size, seed), strict=False):
        if step == selective:
            validate()
        for _ in range(plan.drops.count(step)):
            drop_spaces(model, x, selection, evaluate if val is not None else None)
        if step == plan.prune:
            validate()
            model, mixtures = cast("Model", prune_spaces(model)), []
            optimizer = _optimizer(model, lr, weight_decay)
        if temperature is not None and mixtures and step >= selective:
            progress = (step - selective) / max(1, plan.prune - 1 - selective)
            for layer in mixtures:
                layer.temperature = temperature**progress
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step, plan.prune, steps)
        optimizer.zero_grad()
        value = loss(model(x), y)
        penalty = [layer.gate_entropy() for layer in mixtures] if entropy else []
        (value + entropy * torch.stack(penalty).mean() if penalty else value).backward()
        optimizer.step()
        losses.append(float(value.detach()))
    validate()
    return model.eval(), SKANHistory(losses, plan, val_losses)


def _optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learned, lr, weight_decay=weight_decay, fused=True)


def _endless(data: Batches, batch_size: int | None, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        if not isinstance(data, tuple):
            yield from ((x, y) for x, y in data)
        elif batch_size is None:
            yield data
        else:
            for chosen in torch.randperm(len(data[0]), generator=generator).split(batch_size):
                yield data[0][chosen], data[1][chosen]


def _coefficients(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=0.1 / math.sqrt(fan_in)))


def _plain(pool: Sequence[Space]) -> list[Any]:
    """The pool in lists and dicts, as JSON gives it back."""
    return [space if isinstance(space, str) else [*space] for space in pool]


def _check_sizes(pool: Sequence[Space], **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if isinstance(pool, str) or not len(pool):
        raise ValueError(f"pool: expected a list of at least one space, got {pool!r}")


def _geometry(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> dict[str, tuple[int, int]]:
    return {
        "stride": pair("stride", stride, 1),
        "padding": pair("padding", padding, 0),
        "dilation": pair("dilation", dilation, 1),
    }


def _linear_base(layer: _Mixture | _Selected, x: Tensor) -> Tensor | None:
    if layer.base is None:
        return None
    return F.linear(ACTIVATIONS[layer.base](x), cast("Tensor", layer.base_weight))


def _conv_base(layer: Any, x: Tensor) -> Tensor | None:
    return None if layer.base is None else _convolve(layer, ACTIVATIONS[layer.base](x), layer.base_weight)


def _convolve(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(
        x, kernel, stride=layer.geometry["stride"], dilation=layer.geometry["dilation"], groups=layer.groups
    )


def _sum(terms: list[Tensor], base: Tensor | None) -> Tensor:
    total = terms[0] if base is None else terms[0] + base
    for term in terms[1:]:
        total = total + term
    return total


def _copy_norm(source: nn.Module | None, target: nn.Module | None) -> None:
    if source is not None and target is not None:
        target.load_state_dict(source.state_dict())
