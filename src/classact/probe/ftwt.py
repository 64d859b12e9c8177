"""Fire together, wire together: heads that predict which filters an input needs, and how much that will save.

Elkerdawy, Elhoushi, Zhang, Ray: Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask
Prediction, CVPR 2022, https://arxiv.org/abs/2110.08232, code: https://github.com/selkerdawy/FTWT.

A masked layer computes O = act(BN(conv(I))) and passes on O * M, where the mask M, one bit a filter and input, is
predicted from I by a small head. What the head learns are the filters that respond most to this very input: those
whose responses, the largest first, make up the share r of the sum ([`mass_mask`][classact.probe.mass_mask]). The
network labels itself, the head's loss stays out of the network's weights (decoupled) or goes into them (joint), and r
alone sets the budget. [`estimate_reduction`][classact.probe.estimate_reduction] says what each r would save before
anything is trained; [`fit_ftwt`][classact.probe.fit_ftwt] trains;
[`to_sparse_inference`][classact.probe.to_sparse_inference] computes the chosen filters only.

The estimate takes it that heads say what the targets say. A head that cannot tell a filter's two cases apart keeps it
whenever it is on more often than not, so that heads trained briefly, or without the information, save less than
estimated; a softmax over a single input channel, as of grey images, is always 1 and has none (``softmax=False``).

Where this departs from the authors' code. (1) Theirs drops the filter that crosses the share r, so that one filter with
more than that leaves an empty mask and a dead layer; here `min_keep` filters stay, by default 1, in targets and in
predictions, and 0 is theirs. (2) An input to which no filter responds has 0/0 shares there and keeps every filter; here
it keeps `min_keep`. (3) They count a convolution behind a residual addition as if only the channels of the branch came
in, though those of the shortcut do too, and, by an integer division, a depthwise convolution as free as soon as one of
its channels is off. [`DynamicFlops`][classact.probe.DynamicFlops] counts what has to be computed; ``official=True`` is
theirs. (4) While the mask loss has no weight the heads stay as they are; theirs drift on with their momentum.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
>>> report = estimate_reduction(model, [torch.randn(16, 1, 9, 9)], (1.0, 0.9, 0.7))
>>> bool((report.table()["reduction"].diff().dropna() > 0).all())
True
>>> network = convert_ftwt(model, r=0.9)
>>> list(network.layers)
['0', '3']
"""

import copy
import json
import operator
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, fx, nn
from torch.nn import functional as F

from classact.probe.activations import evaluated

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Mode = Literal["decoupled", "joint"]
Truth = Literal["mass", "uniform"]
Masks = Literal["predicted", "truth", "all"] | Callable[[Tensor], Tensor]
R_GRID = (1.0, 0.97, 0.95, 0.9, 0.85, 0.8)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardtanh),
)  # all of them 0 at 0
FUNCTIONS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    F.relu6: nn.ReLU6,
    F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish,
}
KEEP_ZERO_CHANNELS = (
    *ACTIVATIONS,
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
KEEP_ZERO_FUNCTIONS = {*FUNCTIONS, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout}
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def filter_response(o: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c"]:
    """How strongly each filter responds: the largest absolute value of its map.

    Examples
    --------
    >>> filter_response(torch.tensor([[[[0.0, 2.0]], [[-3.0, 1.0]]]])).tolist()
    [[2.0, 3.0]]
    """
    return o.abs().amax((2, 3))


def mass_mask(e: Float[Tensor, "n c"], r: float, min_keep: int = 1, tol: float = 1e-5) -> Bool[Tensor, "n c"]:
    """Filters that together hold the share r of an input's response, the strongest first.

    Kept are those whose cumulative share, their own included, is at most r; for r = 1 all that respond at all. How many
    they are differs between inputs.

    Parameters
    ----------
    e : (N, C)
        Responses, not negative.
    r : float
        Share to keep, 0 to 1.
    min_keep : int
        The strongest filters stay whatever their share; 0 allows empty masks.
    tol : float
        Added to r; for r = 1 the share up to which a filter counts as silent.

    Raises
    ------
    ValueError
        If r is not in [0, 1] or `min_keep` is negative.

    Examples
    --------
    >>> mass_mask(torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]]), 0.95).int().tolist()
    [[1, 1, 0, 1, 0, 1, 0]]
    """
    _check_r("r", r)
    if min_keep < 0:
        raise ValueError(f"min_keep: expected 0 or more, got {min_keep}")
    e = e.detach().float()
    total = e.sum(1, keepdim=True)
    share = e / total.clamp(min=torch.finfo(e.dtype).tiny)
    ordered, index = share.sort(dim=1, descending=True, stable=True)
    kept = ordered > tol if r == 1 else (ordered.cumsum(1) - r <= tol) & (total > 0)
    kept[:, :min_keep] = True
    return torch.zeros_like(kept).scatter(1, index, kept)


def uniform_mask(
    e: Float[Tensor, "n c"], prune_ratio: float, min_keep: int = 1, tol: float = 1e-5
) -> Bool[Tensor, "n c"]:
    """Filters left when the ``int(prune_ratio * C)`` weakest of every input, and all that are silent, are dropped.

    Parameters
    ----------
    e : (N, C)
        Responses, not negative.
    prune_ratio : float
        Share to drop, 0 to 1.
    min_keep, tol
        As in [`mass_mask`][classact.probe.mass_mask]; `tol` is a response here.

    Raises
    ------
    ValueError
        If `prune_ratio` is not in [0, 1] or `min_keep` is negative.

    Examples
    --------
    >>> uniform_mask(torch.tensor([[3.0, 0.0, 1.0, 2.0]]), 0.5).int().tolist()
    [[1, 0, 0, 1]]
    """
    _check_r("prune_ratio", prune_ratio)
    if min_keep < 0:
        raise ValueError(f"min_keep: expected 0 or more, got {min_keep}")
    e = e.detach().float()
    ordered, index = e.sort(dim=1, descending=True, stable=True)
    kept = ordered > tol
    kept[:, e.shape[1] - int(prune_ratio * e.shape[1]) :] = False
    kept[:, :min_keep] = True
    return torch.zeros_like(kept).scatter(1, index, kept)


def _check_r(name: str, r: float) -> None:
    if not 0 <= r <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {r}")


class MaskHead(nn.Module):
    """Predict from a layer's input which of its filters will respond most: pooling, softmax, one linear map.

    Parameters
    ----------
    c_in, c_out : int
        Channels of the layer's input, filters of the layer.
    pool : {"avg", "max"}
        How every channel becomes a number; the paper's figure has the maximum, its code the mean.
    softmax : bool
        Whether the numbers are made shares of 1.
    """

    def __init__(self, c_in: int, c_out: int, pool: Literal["avg", "max"] = "avg", softmax: bool = True) -> None:
        super().__init__()
        if pool not in ("avg", "max"):
            raise ValueError(f"pool: expected 'avg' or 'max', got {pool!r}")
        self.config = {"c_in": c_in, "c_out": c_out, "pool": pool, "softmax": softmax}
        self.pool, self.softmax = pool, softmax
        self.linear = nn.Linear(c_in, c_out)

    def forward(self, x: Float[Tensor, "n c_in h w"]) -> Float[Tensor, "n c_out"]:
        """Logits of the filters' bits."""
        if x.ndim != 4 or x.shape[1] != self.linear.in_features:
            raise ValueError(f"x: expected (N, {self.linear.in_features}, H, W), got shape {tuple(x.shape)}")
        z = x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))
        return self.linear(z.softmax(1) if self.softmax else z)


def _positive(logits: Tensor, min_keep: int) -> Tensor:
    """Bits of positive logits, and of the largest."""
    if not min_keep:
        return logits > 0
    return (logits > 0).scatter(1, logits.topk(min(min_keep, logits.shape[1]), 1).indices, True)


class LayerStep(NamedTuple):
    """What a layer did with one batch.

    Attributes
    ----------
    mask : (N, C) bool
        Filters passed on.
    positions : int
        H' W' of the output.
    logits : (N, C), optional
        Of the head, with its gradient, if it chose the mask.
    target : (N, C) bool, optional
        What the head should have said, or, with masks by truth, the mask itself.
    """

    mask: Tensor
    positions: int
    logits: Tensor | None = None
    target: Tensor | None = None


class DynamicConv(nn.Module):
    """A convolution with its normalisation and activation, and a head that chooses filters for every input.

    Parameters
    ----------
    conv, bn, act : Module
        The parts, of which the last two may be None.
    r : float
        Share of the response that the targets keep; for ``gt="uniform"`` the share of filters that they drop.
    mode : {"decoupled", "joint"}
        Whether the mask loss stops at the layer's input or also trains what lies before it.
    gt : {"mass", "uniform"}
        Targets by [`mass_mask`][classact.probe.mass_mask] or [`uniform_mask`][classact.probe.uniform_mask].
    pool, softmax
        Of the [`MaskHead`][classact.probe.MaskHead].
    min_keep : int
        Filters that stay in every mask.

    Attributes
    ----------
    masks : {"predicted", "truth", "all"} or callable
        Who chooses: the head, the target, nobody, or a function of the dense output (N, C, H', W') that returns a mask
        (N, C) or (1, C).

    Raises
    ------
    ValueError
        If `r` is not in [0, 1] or an option is unknown.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.Module | None = None,
        act: nn.Module | None = None,
        r: float = 0.9,
        mode: Mode = "decoupled",
        gt: Truth = "mass",
        *,
        pool: Literal["avg", "max"] = "avg",
        softmax: bool = True,
        min_keep: int = 1,
    ) -> None:
        super().__init__()
        _check_r("r", r)
        if mode not in ("decoupled", "joint"):
            raise ValueError(f"mode: expected 'decoupled' or 'joint', got {mode!r}")
        if gt not in ("mass", "uniform"):
            raise ValueError(f"gt: expected 'mass' or 'uniform', got {gt!r}")
        if min_keep < 0:
            raise ValueError(f"min_keep: expected 0 or more, got {min_keep}")
        self.conv, self.bn, self.act = conv, bn or nn.Identity(), act or nn.Identity()
        self.head = MaskHead(conv.in_channels, conv.out_channels, pool, softmax).to(conv.weight)
        self.r, self.mode, self.gt, self.min_keep = r, mode, gt, min_keep
        self.masks: Masks = "predicted"
        self.observer: Callable[[LayerStep], None] | None = None
        self.train(conv.training)

    def truth(self, o: Float[Tensor, "n c h w"]) -> Bool[Tensor, "n c"]:
        """The target for a dense output."""
        e = filter_response(o.detach())
        return (mass_mask if self.gt == "mass" else uniform_mask)(e, self.r, self.min_keep)

    def choose(self, logits: Float[Tensor, "n c"]) -> Bool[Tensor, "n c"]:
        """The mask that the head's logits mean: those above 0, and the `min_keep` largest."""
        return _positive(logits.detach(), self.min_keep)

    def forward(
        self, x: Float[Tensor, "n c_in h w"], residual: Float[Tensor, "#n c #h2 #w2"] | None = None
    ) -> Float[Tensor, "n c h2 w2"]:
        """Masked output; with a residual, which is added before the activation, the sum is masked."""
        o = self.bn(self.conv(x))
        o = self.act(o if residual is None else o + residual)
        logits = target = None
        if self.masks == "all":
            mask = None
        elif self.masks == "predicted":
            logits = self.head(x.detach() if self.mode == "decoupled" else x)
            mask = self.choose(logits)
        elif self.masks == "truth":
            mask = target = self.truth(o)
        else:
            mask = self.masks(o.detach())
        if self.observer is not None:
            if logits is not None:
                target = self.truth(o)
            full = torch.ones(o.shape[:2], dtype=torch.bool, device=o.device)
            seen = full if mask is None else mask.bool().expand_as(full)
            self.observer(LayerStep(seen, o.shape[2] * o.shape[3], logits, target))
        return o if mask is None else o * mask[:, :, None, None].to(o.dtype)


class _Tracer(fx.Tracer):
    """Goes no further than convolutions and batch norms, of which timm has its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(m, module_qualified_name)


class FTWTNetwork(nn.Module):
    """A network some of whose convolutions choose their filters; made by [`convert_ftwt`][classact.probe.convert_ftwt].

    Attributes
    ----------
    body : torch.fx.GraphModule
        The network.
    layers : dict
        Name of the convolution in the original network -> [`DynamicConv`][classact.probe.DynamicConv], in their order.
    sources : dict
        For each of them the layers that, together, decide which of its input channels may differ from 0; None if all
        may.
    official : dict
        For each of them the last layer with a mask before it, whose channels the authors take for its input.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        sources: dict[str, frozenset[str] | None],
        official: dict[str, str | None],
    ) -> None:
        super().__init__()
        self.body, self.sources, self.official = body, sources, official

    @property
    def layers(self) -> dict[str, DynamicConv]:
        """Layers with a mask, by name."""
        return {name: self.body.get_submodule(name) for name in self.sources}  # type: ignore[misc]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Any:
        """What the original network returns, with masks."""
        return self.body(x)

    def heads(self) -> list[nn.Parameter]:
        """Parameters of the heads."""
        return [p for layer in self.layers.values() for p in layer.head.parameters()]

    def backbone(self) -> list[nn.Parameter]:
        """All other parameters."""
        heads = {id(p) for p in self.heads()}
        return [p for p in self.parameters() if id(p) not in heads]

    @contextmanager
    def masks_from(self, masks: Masks | Mapping[str, Masks]) -> Iterator[None]:
        """Let another choose the masks within the block, in all layers or in those named; see ``DynamicConv.masks``.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        layers = self.layers
        chosen = dict(masks) if isinstance(masks, Mapping) else dict.fromkeys(layers, masks)
        _check_names("masks", chosen, layers)
        before = {name: layers[name].masks for name in chosen}
        try:
            for name, choice in chosen.items():
                layers[name].masks = choice
            yield
        finally:
            for name, choice in before.items():
                layers[name].masks = choice

    @contextmanager
    def observed(self) -> Iterator[dict[str, LayerStep]]:
        """Keep what every convolution does in the latest pass within the block, by its name."""
        steps: dict[str, LayerStep] = {}

        def keep(name: str) -> Callable[[LayerStep], None]:
            return lambda step: steps.__setitem__(name, step)

        def plain(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, o: Tensor) -> None:
                full = torch.ones(o.shape[:2], dtype=torch.bool, device=o.device)
                steps[name] = LayerStep(full, o.shape[2] * o.shape[3])

            return hook

        handles = []
        layers = self.layers
        try:
            for name, layer in layers.items():
                layer.observer = keep(name)
            for name, conv in self.unmasked().items():
                handles.append(conv.register_forward_hook(plain(name)))
            yield steps
        finally:
            for layer in layers.values():
                layer.observer = None
            for handle in handles:
                handle.remove()

    def unmasked(self) -> dict[str, nn.Conv2d]:
        """Convolutions that compute all their filters."""
        own = {id(layer.conv) for layer in self.layers.values()}
        return {n: m for n, m in self.body.named_modules() if isinstance(m, nn.Conv2d) and id(m) not in own}


def _check_names(argument: str, names: Iterable[str], layers: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(layers)):
        raise ValueError(f"{argument}: no layer {', '.join(unknown)}; there are {', '.join(layers)}")


class _Part(NamedTuple):
    """A convolution in a graph with what belongs to it."""

    name: str
    nodes: list[fx.Node]
    bn: nn.Module | None
    act: nn.Module | None
    adds: bool


def _parts(graph: fx.Graph, modules: dict[str, nn.Module], after_block: bool) -> list[_Part]:
    """Convolutions with a normalisation or an activation, shortcuts left out."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.Conv2d) or calls.count(node.target) > 1:
            continue
        nodes, bn, act, adds = [node], None, None, False
        following = _only_user(node)
        if following is not None and isinstance(_module(following, modules), nn.BatchNorm2d):
            bn = _module(following, modules)
            nodes.append(following)
            following = _only_user(following)
        # a batch norm of timm's may hold the activation
        fused = isinstance(getattr(bn, "act", None), ACTIVATIONS)
        if following is not None and not fused:
            if following.target in ADDITIONS and after_block and bn is not None:
                end = _only_user(following)
                if end is not None and len(following.all_input_nodes) == 2 and not _is_shortcut(nodes):
                    act = _activation(end, modules)
                    adds = act is not None
                    nodes += [following, end] if adds else []
            elif act := _activation(following, modules):
                nodes.append(following)
        if (bn is None and act is None) or (act is None and not fused and _is_shortcut(nodes)):
            continue
        found.append(_Part(node.target, nodes, bn, act, adds))
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    module = _module(node, modules)
    if module is not None:
        return module if isinstance(module, ACTIVATIONS) else None
    return FUNCTIONS[node.target]() if node.target in FUNCTIONS else None


def _is_shortcut(nodes: list[fx.Node]) -> bool:
    """Whether a convolution only brings a block's input into the shape of its output."""
    end = _only_user(nodes[-1])
    if end is None or end.target not in ADDITIONS:
        return False
    waiting = [a for a in end.all_input_nodes if a is not nodes[-1]]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is nodes[0].args[0] and node not in end.all_input_nodes:
            return True
        waiting += [a for a in node.all_input_nodes if a not in seen]
        seen.update(node.all_input_nodes)
    return False


def convert_ftwt(
    model: nn.Module,
    r: float | Mapping[str, float] = 0.9,
    *,
    include: Callable[[str], bool] | None = None,
    mode: Mode = "decoupled",
    gt: Truth = "mass",
    after_block: bool = False,
    pool: Literal["avg", "max"] = "avg",
    softmax: bool = True,
    min_keep: int = 1,
) -> FTWTNetwork:
    """Give the convolutions of a network masks and heads.

    Found, by torch.fx, are convolutions followed by a batch norm, an activation or both, as in VGG, ResNet, MobileNet
    and sequential networks; convolutions of shortcuts stay as they are, as in the authors' networks.

    Parameters
    ----------
    model : Module
        Copied, not changed.
    r : float or mapping
        For all layers; or name of a convolution -> r, the others then staying as they are.
    include : callable, optional
        Only layers whose name it accepts.
    mode, gt, pool, softmax, min_keep
        See [`DynamicConv`][classact.probe.DynamicConv].
    after_block : bool
        For convolutions at the end of a residual block: take the target, and mask, after the addition and the
        activation, not before.

    Returns
    -------
    FTWTNetwork
        With new heads, drawn from torch's generator.

    Raises
    ------
    ValueError
        If torch.fx cannot trace the model, it has no layer to convert, `r` is not in [0, 1], or names unknown layers.
    """
    root = copy.deepcopy(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise ValueError(f"model: torch.fx cannot trace {type(model).__name__}: {error}") from error
    modules = dict(root.named_modules())
    parts = [part for part in _parts(graph, modules, after_block) if include is None or include(part.name)]
    if not parts:
        raise ValueError(
            f"model: {type(model).__name__} has no convolution followed by a batch norm or an activation to convert"
        )
    if isinstance(r, Mapping):
        _check_names("r", r, [part.name for part in parts])
        parts = [part for part in parts if part.name in r]
        if not parts:
            raise ValueError("r: expected at least one layer, got an empty mapping")
    for part in parts:
        conv = modules[part.name]
        share = r[part.name] if isinstance(r, Mapping) else r
        layer = DynamicConv(conv, part.bn, part.act, share, mode, gt, pool=pool, softmax=softmax, min_keep=min_keep)
        root.set_submodule(part.name, layer)
        inputs = [part.nodes[0].args[0]]
        if part.adds:
            inputs += [a for a in part.nodes[-2].all_input_nodes if a is not part.nodes[-3]]
        with graph.inserting_before(part.nodes[-1]):
            new = graph.call_module(part.name, tuple(inputs))
        part.nodes[-1].replace_all_uses_with(new)
        for node in reversed(part.nodes):
            graph.erase_node(node)
    sources, official = _sources(graph, {part.name for part in parts}, modules)
    converted = FTWTNetwork(fx.GraphModule(root, graph), sources, official)
    return converted.train(model.training)


def _sources(
    graph: fx.Graph, names: set[str], modules: dict[str, nn.Module]
) -> tuple[dict[str, frozenset[str] | None], dict[str, str | None]]:
    """For each masked layer: whose masks decide which input channels may not be 0; and the last layer before it."""
    order = [node.target for node in graph.nodes if node.op == "call_module" and node.target in names]
    decided: dict[fx.Node, frozenset[str] | None] = {}
    last: dict[fx.Node, str | None] = {}
    sources: dict[str, frozenset[str] | None] = {}
    official: dict[str, str | None] = {}
    for node in graph.nodes:
        before = [last[a] for a in node.all_input_nodes if last[a] is not None]
        last[node] = max(before, key=order.index, default=None)
        decided[node] = None
        if node.op == "call_module" and node.target in names:
            sources[node.target], official[node.target] = decided[node.args[0]], last[node.args[0]]
            decided[node], last[node] = frozenset([node.target]), node.target
        elif (node.op == "call_module" and isinstance(modules[node.target], KEEP_ZERO_CHANNELS)) or (
            node.op != "call_module" and node.target in KEEP_ZERO_FUNCTIONS
        ):
            decided[node] = decided[node.all_input_nodes[0]]
        elif node.target in ADDITIONS and len(node.all_input_nodes) == 2:
            first, second = (decided[a] for a in node.all_input_nodes)
            decided[node] = None if first is None or second is None else first | second
    return sources, official


class Macs(NamedTuple):
    """Multiplications with addition for one batch.

    Attributes
    ----------
    layers : (N, L)
        Of every masked convolution, with the filters and input channels that are on.
    dynamic : (N,)
        Of all convolutions; those without a mask are counted in full.
    dense : int
        Of all convolutions of the original network.
    head : int
        Of the heads, for an input.
    linear : int
        Of the network's own linear layers, for an input that calls each once.
    """

    layers: Int[Tensor, "n l"]
    dynamic: Int[Tensor, " n"]
    dense: int
    head: int
    linear: int

    def reduction(self, everything: bool = False) -> Float[Tensor, " n"]:
        """Share that is saved: of the convolutions alone, as in the paper, or with heads and linear layers counted."""
        spent = self.dynamic.double()
        if not everything:
            return 1 - spent / self.dense
        return 1 - (spent + self.head + self.linear) / (self.dense + self.linear)


class DynamicFlops:
    """Count the multiplications of a converted network for every input.

    A convolution costs, per position, its kernel size times the filters that are on times the input channels that may
    differ from 0, within each of its groups. Behind a residual addition these are the channels of either branch.

    Parameters
    ----------
    network : FTWTNetwork
    official : bool
        Count as the authors do: ``active * positions * (active of the last masked layer // groups) * kernel size``.
    """

    def __init__(self, network: FTWTNetwork, official: bool = False) -> None:
        self.network, self.official = network, official

    def __call__(self, x: Float[Tensor, "n c h w"], masks: Masks = "predicted") -> Macs:
        """Run a batch in evaluation mode, without gradients, and count."""
        with evaluated(self.network), torch.no_grad(), self.network.masks_from(masks):
            with self.network.observed() as steps:
                self.network(x)
            return self.of(steps)

    def of(self, steps: Mapping[str, LayerStep]) -> Macs:
        """Count what [`observed`][classact.probe.FTWTNetwork.observed] has kept of a pass."""
        counted, dense, head = [], 0, 0
        for name, layer in self.network.layers.items():
            conv, step = layer.conv, steps[name]
            area = step.positions * conv.kernel_size[0] * conv.kernel_size[1]
            dense += area * conv.out_channels * conv.in_channels // conv.groups
            head += conv.in_channels * conv.out_channels
            n = len(step.mask)
            if self.official:
                before = self.network.official[name]
                inputs = step.mask.new_full((n,), conv.in_channels, dtype=torch.long)
                if before is not None:
                    inputs = steps[before].mask.sum(1)
                counted.append(area * step.mask.sum(1) * (inputs // conv.groups))
                continue
            on = step.mask.new_ones((n, conv.in_channels))
            if (sources := self.network.sources[name]) is not None:
                on = torch.stack([steps[source].mask for source in sources]).any(0)
            groups = [m.view(n, conv.groups, -1).sum(2) for m in (on, step.mask)]
            counted.append(area * (groups[0] * groups[1]).sum(1))
        layers = torch.stack(counted, 1)
        full = sum(
            steps[name].positions * conv.weight.numel()
            for name, conv in self.network.unmasked().items()
            if name in steps
        )
        linear = sum(
            module.weight.numel()
            for name, module in self.network.body.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith("head.linear")
        )
        return Macs(layers, layers.sum(1) + full, dense + full, head, linear)


def mask_loss(steps: Iterable[LayerStep]) -> Float[Tensor, ""]:
    """Binary cross-entropy of the heads: the sum over filters, the mean over inputs, the mean over layers.

    Raises
    ------
    ValueError
        If no layer's head chose its mask.
    """
    losses = [
        F.binary_cross_entropy_with_logits(step.logits.float(), step.target.float(), reduction="none").sum(1).mean()
        for step in steps
        if step.logits is not None and step.target is not None
    ]
    if not losses:
        raise ValueError("steps: expected layers whose masks were predicted, got none")
    return torch.stack(losses).mean()


def mask_accuracy(steps: Mapping[str, LayerStep]) -> dict[str, float]:
    """For each layer the share of bits on which mask and target agree."""
    return {n: float((s.mask == s.target).float().mean()) for n, s in steps.items() if s.target is not None}


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    if not parts or not isinstance(parts[0], Tensor) or parts[0].ndim != 4:
        raise ValueError("loader: expected batches x or (x, y, ...) with images x (N, C, H, W)")
    labelled = len(parts) > 1 and isinstance(parts[1], Tensor) and not parts[1].is_floating_point()
    return parts[0], parts[1] if labelled else None


def _batches(loader: Iterable[Any], device: torch.device, max_batches: int | None) -> Iterator[tuple[Tensor, Any]]:
    for number, batch in enumerate(loader):
        if number == max_batches:
            return
        x, y = _split(batch)
        yield x.to(device), None if y is None else y.to(device)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class ReductionReport:
    """What each r would save, by the masks that the network itself would give as targets.

    Attributes
    ----------
    r : (R,)
        Shares of the response kept, or, for uniform masks, of the filters dropped.
    layers : tuple of str
        Layers with a mask.
    reduction : (R, N)
        Share of the convolutions' multiplications saved, for every input.
    reduction_all : (R, N)
        The same with heads and linear layers counted.
    reduction_official : (R,)
        Mean by the authors' way of counting.
    kept : (R, L)
        Mean share of filters kept in each layer.
    agreement : (R,)
        Share of inputs whose largest output stays the same without any training; NaN if outputs are no logits (N, K).
    accuracy : (R,)
        NaN without labels.
    dense_accuracy : float
    dense_macs, head_macs : int
        Of the convolutions and the heads, for an input.
    """

    r: Float[np.ndarray, " r"]
    layers: tuple[str, ...]
    reduction: Float[np.ndarray, "r n"]
    reduction_all: Float[np.ndarray, "r n"]
    reduction_official: Float[np.ndarray, " r"]
    kept: Float[np.ndarray, "r l"]
    agreement: Float[np.ndarray, " r"]
    accuracy: Float[np.ndarray, " r"]
    dense_accuracy: float
    dense_macs: int
    head_macs: int

    def rows(self) -> list[dict[str, float]]:
        """The table as plain values."""
        low, high = np.quantile(self.reduction, (0.05, 0.95), 1)
        columns = {
            "r": self.r,
            "reduction": self.reduction.mean(1),
            "low": low,
            "high": high,
            "reduction_all": self.reduction_all.mean(1),
            "reduction_official": self.reduction_official,
            "kept": self.kept.mean(1),
            "agreement": self.agreement,
            "accuracy": self.accuracy,
        }
        return [{name: float(values[i]) for name, values in columns.items()} for i in range(len(self.r))]

    def table(self) -> "pd.DataFrame":
        """One row per r.

        Mean reduction, its 5 % and 95 % quantiles over inputs, the mean with heads and linear layers and by the
        authors' count, the share of filters kept, and agreement and accuracy without training.
        """
        import pandas as pd

        return pd.DataFrame(self.rows())

    def summary(self) -> list[str]:
        """What was found, in words."""
        inputs, heads = self.reduction.shape[1], self.head_macs / self.dense_macs
        first = f"{len(self.layers)} layers would choose their filters ({inputs} inputs, {self.dense_macs:,}"
        lines = [f"{first} multiplications in all convolutions, {heads:.2%} more for the heads)."]
        for row in self.rows():
            untrained = "" if np.isnan(row["agreement"]) else f"; {row['agreement']:.1%} same answers without training"
            lines.append(
                f"r = {row['r']:g}: {row['reduction']:.1%} fewer multiplications ({row['low']:.1%} to {row['high']:.1%}"
                f" for nine inputs of ten){untrained}."
            )
        return lines

    def plot(self) -> "Figure":
        """Reduction for each r, with the middle 90 % of inputs, and the filters kept in each layer."""
        from matplotlib.figure import Figure

        figure = Figure((10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        order = np.argsort(self.r)
        mean, (low, high) = self.reduction.mean(1), np.quantile(self.reduction, (0.05, 0.95), 1)
        left.fill_between(self.r[order], low[order], high[order], color="C0", alpha=0.2, linewidth=0)
        left.plot(self.r[order], mean[order], "o-", color="C0", markersize=4, label="convolutions; 90 % of inputs")
        everything = self.reduction_all.mean(1)[order]
        left.plot(self.r[order], everything, ":", color="C0", label="with heads and linear layers")
        if not np.isnan(self.agreement).all():
            left.plot(self.r[order], self.agreement[order], "--", color="0.5", label="same answer, untrained")
        left.set(xlabel="r", ylabel="share of multiplications saved", ylim=(min(0, everything.min()), 1.02))
        left.legend(frameon=False, fontsize=8)
        left.spines[["top", "right"]].set_visible(False)
        image = right.imshow(self.kept, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        right.set(xlabel="layer", ylabel="r", yticks=range(len(self.r)), yticklabels=[f"{v:g}" for v in self.r])
        few = len(self.layers) <= 12
        right.set_xticks(range(len(self.layers)), self.layers if few else [""] * len(self.layers), rotation=45)
        figure.colorbar(image, ax=right, label="filters kept")
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json`` (the table), ``arrays.npz`` and ``reduction.png``; each appears only when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{k: None if np.isnan(v) else v for k, v in row.items()} for row in self.rows()]
        content = {
            "layers": list(self.layers),
            "dense_macs": self.dense_macs,
            "head_macs": self.head_macs,
            "dense_accuracy": None if np.isnan(self.dense_accuracy) else self.dense_accuracy,
            "estimates": rows,
        }
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = Path(temporary)
            (part / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            np.savez_compressed(
                part / "arrays.npz",
                r=self.r,
                reduction=self.reduction,
                reduction_all=self.reduction_all,
                kept=self.kept,
            )
            self.plot().savefig(part / "reduction.png", dpi=150)
            for file in part.iterdir():
                file.replace(folder / file.name)
        return folder


def estimate_reduction(
    model: nn.Module,
    loader: Iterable[Any],
    r_grid: Sequence[float] = R_GRID,
    *,
    max_batches: int | None = None,
    **settings: Any,
) -> ReductionReport:
    """Say before any training what each r would save.

    Every layer is masked by its own target, layer after layer, so that later targets come from inputs as they would be.

    Parameters
    ----------
    model : Module
        The trained dense network, or one that has been converted; left as it was. With the latter r is set in all
        masked layers.
    loader : iterable
        Yields images x (N, C, H, W) or (x, y, ...); integer labels y give accuracies.
    r_grid : sequence of float
        The r to try.
    max_batches : int, optional
        Stop after so many.
    **settings
        Of [`convert_ftwt`][classact.probe.convert_ftwt], such as ``gt="uniform"``, if the model is not converted.

    Raises
    ------
    ValueError
        If `r_grid` is empty or not within [0, 1], the loader yields nothing or no images, settings are given for a
        converted model, or the model cannot be converted.
    """
    r_grid = [float(r) for r in r_grid]
    if not r_grid:
        raise ValueError("r_grid: expected at least one share, got none")
    for r in r_grid:
        _check_r("r_grid", r)
    network = _own_network(model, settings)
    layers = network.layers.values()
    counts = DynamicFlops(network), DynamicFlops(network, official=True)
    saved: list[list[list[Tensor]]] = [[[] for _ in r_grid] for _ in range(3)]
    kept: list[list[Tensor]] = [[] for _ in r_grid]
    same: list[list[Tensor]] = [[] for _ in r_grid]
    right: list[list[Tensor]] = [[] for _ in range(len(r_grid) + 1)]
    macs: Macs | None = None
    with evaluated(network), torch.no_grad():
        for x, y in _batches(loader, _device_of(network), max_batches):
            with network.masks_from("all"):
                dense = network(x)
            logits = isinstance(dense, Tensor) and dense.ndim == 2
            if logits and y is not None:
                right[-1].append(dense.argmax(1) == y)
            for number, r in enumerate(r_grid):
                for layer in layers:
                    layer.r = r
                with network.masks_from("truth"), network.observed() as steps:
                    output = network(x)
                macs = counts[0].of(steps)
                official = counts[1].of(steps)
                for into, values in zip(
                    saved,
                    (macs.reduction(), macs.reduction(everything=True), official.reduction()),
                    strict=True,
                ):
                    into[number].append(values.cpu())
                kept[number].append(torch.stack([steps[n].mask.float().mean(1) for n in network.layers], 1).cpu())
                if logits:
                    same[number].append(output.argmax(1) == dense.argmax(1))
                    if y is not None:
                        right[number].append(output.argmax(1) == y)
    if macs is None:
        raise ValueError("loader: expected at least one batch, got none")
    shares = [np.stack([torch.cat(parts).numpy() for parts in table]) for table in saved]

    def mean(parts: list[Tensor]) -> float:
        return float(torch.cat(parts).float().mean()) if parts else float("nan")

    return ReductionReport(
        np.array(r_grid),
        tuple(network.layers),
        shares[0],
        shares[1],
        shares[2].mean(1),
        np.stack([torch.cat(parts).mean(0).numpy() for parts in kept]),
        np.array([mean(parts) for parts in same]),
        np.array([mean(parts) for parts in right[:-1]]),
        mean(right[-1]),
        macs.dense,
        macs.head,
    )


def _own_network(model: nn.Module, settings: Mapping[str, Any]) -> FTWTNetwork:
    if isinstance(model, FTWTNetwork):
        if settings:
            raise ValueError(f"settings: the model is converted, {', '.join(settings)} cannot be changed")
        return copy.deepcopy(model)
    with torch.random.fork_rng():  # heads are drawn that nobody asks
        return convert_ftwt(model, **settings)


def choose_r(
    model: nn.Module,
    loader: Iterable[Any],
    target_reduction: float,
    *,
    tolerance: float = 0.002,
    max_batches: int | None = None,
    **settings: Any,
) -> tuple[float, float]:
    """Find by bisection the r whose estimated reduction is nearest to a target.

    Parameters
    ----------
    model, loader, max_batches, settings
        As for [`estimate_reduction`][classact.probe.estimate_reduction]; all batches are kept in memory.
    target_reduction : float
        Share of the convolutions' multiplications to save, in (0, 1).
    tolerance : float
        Stop when the estimate is so near.

    Returns
    -------
    (float, float)
        r and the estimate.

    Raises
    ------
    ValueError
        If the target is not in (0, 1) or below what r = 1 saves (for uniform masks r = 0).
    """
    if not 0 < target_reduction < 1:
        raise ValueError(f"target_reduction: expected a share in (0, 1), got {target_reduction}")
    batches = list(_batches(loader, _device_of(model), max_batches))
    network = _own_network(model, settings)
    falls = next(iter(network.layers.values())).gt == "mass"  # a larger r saves less

    def estimate(r: float) -> float:
        return float(estimate_reduction(network, batches, [r]).reduction.mean())

    least = estimate(1.0 if falls else 0.0)
    if target_reduction < least - tolerance:
        raise ValueError(
            f"target_reduction: {target_reduction} is less than the {least:.3f} that silent filters save by themselves"
        )
    low, high = 0.0, 1.0
    best = (1.0 if falls else 0.0, least)
    for _ in range(20):
        if abs(best[1] - target_reduction) <= tolerance:
            break
        middle = (low + high) / 2
        found = estimate(middle)
        if abs(found - target_reduction) < abs(best[1] - target_reduction):
            best = (middle, found)
        low, high = (middle, high) if (found > target_reduction) == falls else (low, middle)
    return best


class FTWTFit(NamedTuple):
    """A training's outcome.

    Attributes
    ----------
    network : FTWTNetwork
        In evaluation mode.
    r : float or mapping
        What was used.
    estimate : float
        Reduction estimated before the training, on the training data; NaN if `r` was given.
    history : dict
        Per epoch: ``loss``, ``mask_loss``, ``mask_accuracy``, ``reduction`` over the training, and ``val_accuracy``,
        ``val_reduction`` if there are validation data.
    """

    network: FTWTNetwork
    r: float | Mapping[str, float]
    estimate: float
    history: dict[str, list[float]]


def optimisers_of(
    network: FTWTNetwork, lr: float, head_lr: float, momentum: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """SGD for the backbone, with weight decay, and for the heads, without."""
    trained = [[p for p in part if p.requires_grad] for part in (network.backbone(), network.heads())]
    return (
        torch.optim.SGD(trained[0], lr, momentum=momentum, weight_decay=weight_decay),
        torch.optim.SGD(trained[1], head_lr, momentum=momentum),
    )


def fit_ftwt(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    r: float | Mapping[str, float] | None = None,
    target_reduction: float | None = None,
    epochs: int = 200,
    lr: float = 1e-2,
    head_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Sequence[int] = (81, 122, 151),
    cooldown: float = 0.5,
    mask_weight: float = 1.0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    seed: int = 0,
    device: str | torch.device | None = None,
    **settings: Any,
) -> FTWTFit:
    """Convert a trained network and fine-tune it with its own masks.

    The loss is that of the task plus `mask_weight` times [`mask_loss`][classact.probe.ftwt.mask_loss]. In the last
    part of the training the heads rest and the network gets used to them.

    Parameters
    ----------
    model : Module
        The trained dense network, which stays as it is; or a converted one, which is trained in place.
    train, val : iterable
        Yield (x, y) anew in every epoch.
    r, target_reduction
        One of them, unless the model is converted: the share to keep, or what shall be saved, from which r follows by
        [`choose_r`][classact.probe.choose_r] on the training data.
    epochs, lr, momentum, weight_decay, milestones
        SGD of the backbone; at the milestones its rate falls to a tenth.
    head_lr : float
        SGD of the heads, without weight decay or schedule.
    cooldown : float
        Share of the epochs after which the heads rest.
    seed : int
        Of the heads and of dropout.
    device : str or device, optional
        By default where the model is.
    **settings
        Of [`convert_ftwt`][classact.probe.convert_ftwt].

    Raises
    ------
    ValueError
        If not exactly one of `r` and `target_reduction` is given for a model that is not converted, if they or settings
        are given for one that is, labels are missing, or the loss is no finite number.
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    if not 0 <= cooldown <= 1:
        raise ValueError(f"cooldown: expected a share from 0 to 1, got {cooldown}")
    converted = isinstance(model, FTWTNetwork)
    if converted and (r is not None or target_reduction is not None or settings):
        raise ValueError("r, target_reduction, settings: expected none of them, the model is converted")
    if not converted and (r is None) == (target_reduction is None):
        raise ValueError("r, target_reduction: expected exactly one of them")
    where = torch.device(device) if device is not None else _device_of(model)
    expected = float("nan")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, FTWTNetwork):
            network, r = model.to(where), {name: layer.r for name, layer in model.layers.items()}
        else:
            if r is None:
                r, expected = choose_r(model, train, target_reduction or 0.0, max_batches=20, **settings)
            network = convert_ftwt(model, r, **settings).to(where)
        optimisers = optimisers_of(network, lr, head_lr, momentum, weight_decay)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimisers[0], list(milestones))
        history: dict[str, list[float]] = {}
        for epoch in range(epochs):
            weight = mask_weight if epoch < int(cooldown * epochs) else 0.0
            row = _train_epoch(network, train, loss, optimisers, weight, where)
            schedule.step()
            if val is not None:
                row |= {f"val_{name}": value for name, value in evaluate_ftwt(network, val).items()}
            for name, value in row.items():
                history.setdefault(name, []).append(value)
    return FTWTFit(network.eval(), r, expected, history)


def _train_epoch(
    network: FTWTNetwork,
    train: Iterable[Any],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    weight: float,
    device: torch.device,
) -> dict[str, float]:
    network.train()
    flops = DynamicFlops(network)
    sums: dict[str, float] = dict.fromkeys(("loss", "mask_loss", "mask_accuracy", "reduction"), 0.0)
    n = 0
    for x, y in _batches(train, device, None):
        if y is None:
            raise ValueError("train: expected batches (x, y) with integer labels y")
        with network.observed() as steps:
            task = loss(network(x), y)
        of_masks = mask_loss(steps.values())
        for optimiser in optimisers:
            optimiser.zero_grad()
        (task + weight * of_masks if weight else task).backward()
        for optimiser in optimisers if weight else optimisers[:1]:
            optimiser.step()
        n += len(x)
        values = (task, of_masks, torch.tensor(list(mask_accuracy(steps).values())).mean(), flops.of(steps).reduction())
        for name, value in zip(sums, values, strict=True):
            sums[name] += float(value.detach().mean()) * len(x)
    if not n:
        raise ValueError("train: expected at least one batch in every epoch, got none; give a list or a DataLoader")
    if not np.isfinite(sums["loss"]):
        raise ValueError(f"loss: expected a finite number, got {sums['loss']}; is lr too high?")
    return {name: value / n for name, value in sums.items()}


def evaluate_ftwt(network: FTWTNetwork, loader: Iterable[Any], masks: Masks = "predicted") -> dict[str, float]:
    """Accuracy, reduction and, for predicted masks, the heads' accuracy over a loader of (x, y).

    Raises
    ------
    ValueError
        If the loader yields nothing or no labels.
    """
    flops = DynamicFlops(network)
    rows: dict[str, list[Tensor]] = {"accuracy": [], "reduction": []}
    with evaluated(network), torch.no_grad(), network.masks_from(masks):
        for x, y in _batches(loader, _device_of(network), None):
            if y is None:
                raise ValueError("loader: expected batches (x, y) with integer labels y")
            with network.observed() as steps:
                rows["accuracy"].append((network(x).argmax(1) == y).double().cpu())
            rows["reduction"].append(flops.of(steps).reduction().cpu())
            if bits := list(mask_accuracy(steps).values()):
                rows.setdefault("mask_accuracy", []).append(torch.full((len(x),), float(np.mean(bits))))
    if not rows["accuracy"]:
        raise ValueError("loader: expected at least one batch, got none")
    return {name: float(torch.cat(values).mean()) for name, values in rows.items()}


class SparseConv(nn.Module):
    """A masked layer for inference that computes the chosen filters on the channels that are on, and nothing else.

    The batch norm becomes part of the weights. Several inputs in a batch share the filters that any of them wants.
    Computed in full, and then masked, are convolutions with groups that are not depthwise, with padding other than by
    zeros, and of classes derived from ``nn.Conv2d``.

    Parameters
    ----------
    layer : DynamicConv
    name : str
        Under which its mask is found in `active`.
    sources : frozenset of str, optional
        The layers whose masks decide which input channels are on; None if all are.
    active : dict
        Masks of the batch at hand, shared by all layers of a network.
    """

    def __init__(
        self, layer: DynamicConv, name: str, sources: frozenset[str] | None, active: dict[str, Tensor]
    ) -> None:
        super().__init__()
        conv, bn, act = copy.deepcopy(layer.conv), layer.bn, layer.act
        weight = conv.weight.detach()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        if isinstance(bn, nn.BatchNorm2d):
            if bn.running_mean is None or bn.running_var is None:
                raise ValueError(f"network: the batch norm of {name} keeps no running statistics")
            scale = torch.rsqrt(bn.running_var + bn.eps) * (1 if bn.weight is None else bn.weight.detach())
            bias = (bias - bn.running_mean) * scale + (0 if bn.bias is None else bn.bias.detach())
            weight = weight * scale[:, None, None, None]
            act = getattr(bn, "act", act)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        self.conv, self.act, self.head = conv, copy.deepcopy(act), copy.deepcopy(layer.head)
        self.name, self.sources, self.active, self.min_keep = name, sources, active, layer.min_keep
        self.depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
        self.in_full = not plain or (conv.groups > 1 and not self.depthwise)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Masked output, equal to that of the layer."""
        logits = self.head(x)
        self.active[self.name] = mask = _positive(logits, self.min_keep)
        if self.in_full:
            o = self.conv(x)
            return self.act(o if residual is None else o + residual) * mask[:, :, None, None].to(o.dtype)
        out = wanted = mask.any(0)
        on = None
        if self.sources is not None:
            on = torch.stack([self.active[source].any(0) for source in self.sources]).any(0)
            if self.depthwise:
                wanted = out & on
        index = self._index(wanted)
        o = self._convolve(x, index, None if on is None or on.all() else self._index(on))
        full = o.new_zeros((len(o), len(out), *o.shape[2:]))
        if residual is None:
            o = self.act(o)
        if self.depthwise and on is not None:  # a filter on a silent channel is constant and costs nothing
            bias = self.conv.bias.clone()  # type: ignore[union-attr]
            constant = bias if residual is not None else self.act(bias)
            full += torch.where(out & ~on, constant, 0)[:, None, None]
        full[:, index] = o
        if residual is not None:
            full = self.act(full + residual)
        elif len(full) == 1 and out[index].all():
            return full
        return full * mask[:, :, None, None].to(full.dtype)

    @staticmethod
    def _index(chosen: Tensor) -> Tensor:
        index = chosen.nonzero().flatten()
        return index if len(index) else index.new_zeros(1)  # something has to say how large the output is

    def _convolve(self, x: Tensor, filters: Tensor, channels: Tensor | None) -> Tensor:
        conv, weight, bias, groups = self.conv, self.conv.weight, self.conv.bias, self.conv.groups
        if len(filters) < conv.out_channels:
            weight, bias = weight[filters], bias[filters]  # type: ignore[index]
        if self.depthwise:
            x, groups = x[:, filters], len(filters)
        elif channels is not None:
            x, weight = x[:, channels], weight[:, channels]
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)


class SparseNetwork(nn.Module):
    """A network for inference that computes only what its masks choose; made by `to_sparse_inference`."""

    def __init__(self, network: FTWTNetwork, chunk: int | None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected at least 1 or None, got {chunk}")
        own = copy.deepcopy(network).eval()
        active: dict[str, Tensor] = {}
        for name, layer in own.layers.items():
            own.body.set_submodule(name, SparseConv(layer, name, own.sources[name], active))
        self.body, self.chunk = own.body.requires_grad_(False), chunk

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """What the masked network returns."""
        if self.chunk is None or len(x) <= self.chunk:
            return self.body(x)
        return torch.cat([self.body(part) for part in x.split(self.chunk)])


def to_sparse_inference(network: FTWTNetwork, chunk: int | None = 1) -> SparseNetwork:
    """Copy a trained network into one that computes only the chosen filters, for inference.

    Gathering weights and channels has a price: on a CPU thread, one image at a time, 3 x 3 convolutions of 128 filters
    are faster than dense ones from about half of the multiplications saved; ``bench_ftwt.py`` measures it anywhere.

    Parameters
    ----------
    network : FTWTNetwork
        Stays as it is.
    chunk : int, optional
        So many inputs are computed together, with the filters that any of them wants; 1 computes exactly those of every
        input, None takes the whole batch at once.

    Returns
    -------
    SparseNetwork
        In evaluation mode, its outputs those of `network` but for rounding.

    Raises
    ------
    ValueError
        If `network` is not converted, or a batch norm keeps no running statistics.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> network, x = convert_ftwt(model.eval()), torch.randn(2, 3, 9, 9)
    >>> bool(torch.allclose(to_sparse_inference(network)(x), network(x), atol=1e-5))
    True
    """
    if not isinstance(network, FTWTNetwork):
        raise ValueError(f"network: expected one made by convert_ftwt, got {type(network).__name__}")  # noqa: TRY004
    return SparseNetwork(network, chunk)
