"""Cheap tests that discard most graphs before they are trained: static, quality and stability.

Liu et al., https://arxiv.org/abs/2004.02967, rejection protocols. Quality: after a short training the anchor network
must classify better than a threshold. Stability: the weights of its convolutions are moved so that the gradient of the
loss grows, as an adversary would; it must stay bounded. The static test, which costs one forward pass, is ours.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.nn.evonorm.graph import GraphNormAct, LayerGraph

Layer = Callable[[int], nn.Module]
Anchor = Callable[[Layer], nn.Module]


class SearchData(NamedTuple):
    """Images (n, c, h, w) and classes (n,), for training and for validation."""

    train: Float[Tensor, "n c h w"]
    train_labels: Int[Tensor, " n"]
    validation: Float[Tensor, "m c h w"]
    validation_labels: Int[Tensor, " m"]


class Verdict(NamedTuple):
    """Whether a graph passed a test; if not, why; and what was measured: an accuracy or a norm."""

    passed: bool
    reason: str
    value: float


def static_test(graph: LayerGraph, channels: int = 8, groups: int = 4, seed: int = 0) -> Verdict:
    """Reject graphs whose output does not depend on x, or is not finite on normal numbers, or whose gradient is not.

    The value is the standard deviation of the output's change between two inputs.
    """
    if not graph.depends_on_input():
        return Verdict(False, "no dependence on x", 0.0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, channels, 6, 6, generator=generator)
    layer = GraphNormAct(graph, channels, groups)
    first, second = x[0].requires_grad_(), x[1]
    y = layer(first)
    difference = float((y.detach() - layer(second).detach()).std())
    if not y.isfinite().all():
        return Verdict(False, "not finite", float("nan"))
    (gradient,) = torch.autograd.grad(y.square().sum(), first, allow_unused=True)
    if gradient is None or difference < 1e-6:
        return Verdict(False, "no dependence on x", difference)
    if not gradient.isfinite().all():
        return Verdict(False, "not finite", float("nan"))
    return Verdict(True, "", difference)


def train_anchor(
    graph: LayerGraph,
    anchor: Anchor,
    data: SearchData,
    steps: int,
    *,
    groups: int = 32,
    rate: float = 0.1,
    batch: int = 128,
    seed: int = 0,
) -> float:
    """Train an anchor network with the layer and return its validation accuracy; NaN once its loss is not finite.

    SGD with Nesterov's momentum of 0.9; the learning rate falls along half a cosine. Equal seeds give equal weights and
    batches, whatever the graph; the global random state stays as it was.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    network = _build(graph, anchor, groups, seed)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, nesterov=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    x, labels = data[0], data[1]
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        loss = F.cross_entropy(network(x[chosen]), labels[chosen])
        if not loss.isfinite():
            return float("nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(part) for part in data[2].split(500)])
    return float((logits.argmax(1) == data[3]).float().mean()) if logits.isfinite().all() else float("nan")


def quality_test(
    graph: LayerGraph,
    anchor_fn: Anchor,
    data: SearchData,
    steps: int = 100,
    threshold: float = 0.2,
    *,
    groups: int = 32,
    rate: float = 0.1,
    batch: int = 128,
    seed: int = 0,
) -> Verdict:
    """Reject graphs with which the anchor's validation accuracy after a short training is below `threshold`.

    Parameters
    ----------
    graph : LayerGraph
        The layer.
    anchor_fn : callable
        ``anchor_fn(layer)`` builds a network, where ``layer(channels)`` makes one layer.
    data : SearchData
        Or a tuple of its four tensors.
    steps, rate, batch, seed
        Of the training, see [`train_anchor`][classact.nn.evonorm.rejection.train_anchor].
    threshold : float
        20 % for the ten classes of CIFAR-10 in the paper.
    groups : int
        Of the aggregates over groups.
    """
    accuracy = train_anchor(graph, anchor_fn, data, steps, groups=groups, rate=rate, batch=batch, seed=seed)
    if accuracy >= threshold:
        return Verdict(True, "", accuracy)
    return Verdict(False, "low quality" if accuracy == accuracy else "not finite", accuracy)


def stability_test(
    graph: LayerGraph,
    anchor_fn: Anchor,
    data: SearchData,
    steps: int = 100,
    bound: float = 1e8,
    *,
    groups: int = 32,
    rate: float = 0.05,
    batch: int = 128,
    seed: int = 0,
) -> Verdict:
    """Reject graphs with which the gradient's norm passes `bound` while the convolutions' weights climb on its square.

    The paper gives no size of the steps: here every step moves the weights by a part `rate` of their norm.

    Parameters
    ----------
    graph, anchor_fn, data, groups, batch, seed
        As in [`quality_test`][classact.nn.quality_test].
    steps : int
        Of gradient ascent, on one batch.
    bound : float
        On the norm of the loss's gradient.
    rate : float
        See above.

    Raises
    ------
    ValueError
        If the anchor has no convolution.
    """
    network = _build(graph, anchor_fn, groups, seed).train()
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not weights:
        raise ValueError("anchor_fn: expected a network with convolutions, whose weights the test moves")
    chosen = torch.randint(len(data[0]), (min(batch, len(data[0])),), generator=torch.Generator().manual_seed(seed))
    largest = 0.0
    for _ in range(steps):
        loss = F.cross_entropy(network(data[0][chosen]), data[1][chosen])
        gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        square = torch.stack([g.square().sum() for g in gradient if g is not None] or [loss * 0]).sum()
        largest = max(largest, float(square.detach().sqrt()))
        if not (torch.isfinite(square) and largest <= bound):
            return Verdict(False, "unstable", largest if torch.isfinite(square) else float("inf"))
        if not square.requires_grad:
            break
        uphill = torch.autograd.grad(square, weights, allow_unused=True)
        steepest = [torch.zeros_like(w) if g is None else g for g, w in zip(uphill, weights, strict=True)]
        length, size = (torch.stack([t.norm() for t in tensors]).norm() for tensors in (steepest, weights))
        if not torch.isfinite(length):
            return Verdict(False, "unstable", float("inf"))
        if length == 0:
            break
        with torch.no_grad():
            for weight, direction in zip(weights, steepest, strict=True):
                weight += rate * size / length * direction
    return Verdict(True, "", largest)


def _build(graph: LayerGraph, anchor: Anchor, groups: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return anchor(partial(GraphNormAct, graph, groups=groups))
