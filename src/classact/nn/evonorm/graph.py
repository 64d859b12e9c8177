"""The search space: layers as graphs of elementary operations, and a module that computes any of them.

Liu et al., https://arxiv.org/abs/2004.02967. A graph starts from four nodes, the input x, zero, and two trainable
vectors over the channels, v0 (from 0) and v1 (from 1). Ten more follow, each an operation on one or two earlier nodes;
of unary operations the second predecessor does not count. The last node is the output, before gamma and beta. Every
node has the shape of x, statistics being broadcast.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

INPUTS = ("x", "0", "v0", "v1")
BINARY = ("add", "mul", "div", "max")
UNARY = ("neg", "sigmoid", "tanh", "exp", "signlog", "abs", "square", "signsqrt")
MOMENTS = ("mean", "rms", "std")
INDEX_SETS = ("bwh", "whc", "wh", "whg")  # batch and positions; layer; instance; group
AGGREGATES = tuple(f"{moment}_{over}" for moment in MOMENTS for over in INDEX_SETS)
OPERATIONS = BINARY + UNARY + AGGREGATES


class Node(NamedTuple):
    """An operation and its two predecessors, numbered from the four inputs on."""

    op: str
    first: int
    second: int


@dataclass(frozen=True)
class LayerGraph:
    """A layer of the search space.

    Parameters
    ----------
    nodes : tuple of Node
        Node k is number 4 + k and uses numbers below its own; 0 to 3 are x, zero, v0 and v1.

    Raises
    ------
    ValueError
        If there is no node, an operation is unknown, or a predecessor does not come before its node.

    Examples
    --------
    >>> graph = LayerGraph.evonorm("S0")
    >>> print(graph.to_string())
    mul(3,0) sigmoid(4) mul(0,5) std_whg(0) div(6,7)
    >>> print(graph.formula())
    gamma * (x * sigmoid(v1 * x) / std_whg(x)) + beta
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("nodes: expected at least one")
        for number, node in enumerate(self.nodes, len(INPUTS)):
            if node.op not in OPERATIONS:
                raise ValueError(f"nodes: expected operations among {', '.join(OPERATIONS)}, got {node.op!r}")
            if not (0 <= node.first < number and 0 <= node.second < number):
                raise ValueError(f"nodes: expected predecessors of node {number} from 0 to {number - 1}, got {node}")

    @classmethod
    def random(cls, rng: np.random.Generator, n_nodes: int = 10, allow_batch: bool = True) -> "LayerGraph":
        """Draw operations and predecessors uniformly; without batch statistics if not `allow_batch` (S series)."""
        if n_nodes < 1:
            raise ValueError(f"n_nodes: expected at least 1, got {n_nodes}")
        return cls(tuple(_draw(rng, len(INPUTS) + k, allow_batch) for k in range(n_nodes)))

    def mutate(self, rng: np.random.Generator, allow_batch: bool = True) -> "LayerGraph":
        """Return a graph with one node, chosen uniformly, drawn anew; it differs from the old one."""
        k = int(rng.integers(len(self.nodes)))
        while (node := _draw(rng, len(INPUTS) + k, allow_batch)) == self.nodes[k]:
            pass
        return LayerGraph((*self.nodes[:k], node, *self.nodes[k + 1 :]))

    def prune(self) -> "LayerGraph":
        """Return the graph without nodes that the output does not use; unary nodes name their predecessor twice."""
        used, stack = set(), [len(INPUTS) + len(self.nodes) - 1]
        while stack:
            number = stack.pop()
            if number >= len(INPUTS) and number not in used:
                used.add(number)
                stack += self._predecessors(number)
        place = {k: k for k in range(len(INPUTS))}
        nodes = []
        for number in sorted(used):
            inputs = [place[k] for k in self._predecessors(number)]
            nodes.append(Node(self.nodes[number - len(INPUTS)].op, inputs[0], inputs[-1]))
            place[number] = len(INPUTS) + len(nodes) - 1
        return LayerGraph(tuple(nodes))

    def depends_on_input(self) -> bool:
        """Whether a path leads from x to the output; its value may still be constant, as that of x - x."""
        return any(0 in (node.first, node.second) for node in self.prune().nodes)

    def uses_batch(self) -> bool:
        """Whether the output uses batch statistics, as the B series does."""
        return any(node.op.endswith("_bwh") for node in self.prune().nodes)

    @property
    def key(self) -> str:
        """Hash that is equal for graphs with the same expression, up to the order of summands, factors and maxima."""
        texts = list(INPUTS)
        for number, node in enumerate(self.nodes, len(INPUTS)):
            inputs = [texts[k] for k in self._predecessors(number)]
            if node.op in ("add", "mul", "max"):
                inputs.sort()
            texts.append(f"{node.op}({','.join(inputs)})")
        return hashlib.sha256(texts[-1].encode()).hexdigest()

    def to_string(self) -> str:
        """Write the nodes in order, as read by `from_string`."""
        return " ".join(
            f"{node.op}({node.first})" if node.op not in BINARY else f"{node.op}({node.first},{node.second})"
            for node in self.nodes
        )

    @classmethod
    def from_string(cls, text: str) -> "LayerGraph":
        """Read ``"std_whg(0) div(0,4)"``."""
        nodes = []
        for part in text.split():
            match = re.fullmatch(r"(\w+)\((\d+)(?:,(\d+))?\)", part)
            if match is None or (match[1] in BINARY) != (match[3] is not None):
                raise ValueError(f"text: expected parts such as add(0,4) or std_whg(0), got {part!r}")
            nodes.append(Node(match[1], int(match[2]), int(match[3] or match[2])))
        return cls(tuple(nodes))

    def formula(self) -> str:
        """Write the layer as a formula of x, v0, v1, gamma and beta."""
        parts = [(name, 3) for name in INPUTS]  # text, and how tightly it binds
        for number, node in enumerate(self.nodes, len(INPUTS)):
            inputs = [parts[k] for k in self._predecessors(number)]
            (a, _), (b, _) = inputs[0], inputs[-1]
            if node.op == "add":
                parts.append((f"{a} + {b}", 1))
            elif node.op == "mul":
                parts.append((" * ".join(_bind(text, level, 2) for text, level in inputs), 2))
            elif node.op == "div":
                parts.append((f"{_bind(*inputs[0], 2)} / {_bind(*inputs[1], 3)}", 2))
            elif node.op == "neg":
                parts.append((f"-{_bind(*inputs[0], 3)}", 2))
            else:
                parts.append((f"{node.op}({', '.join(text for text, _ in inputs)})", 3))
        return f"gamma * {_bind(*parts[-1], 3)} + beta"

    @classmethod
    def bn_relu(cls) -> "LayerGraph":
        """``max(v1 (x - mean) / std + v0, 0)`` over the batch."""
        return cls.from_string("mean_bwh(0) neg(4) add(0,5) std_bwh(0) div(6,7) mul(8,3) add(9,2) max(10,1)")

    @classmethod
    def gn_relu(cls) -> "LayerGraph":
        """``max(v1 (x - mean) / std + v0, 0)`` over groups."""
        return cls.from_string("mean_whg(0) neg(4) add(0,5) std_whg(0) div(6,7) mul(8,3) add(9,2) max(10,1)")

    @classmethod
    def evonorm(cls, version: str) -> "LayerGraph":
        """One of the paper's layers, B0 to B2 and S0 to S2."""
        if version not in _EVONORM:
            raise ValueError(f"version: expected one of {', '.join(_EVONORM)}, got {version!r}")
        return cls.from_string(_EVONORM[version])

    def _predecessors(self, number: int) -> list[int]:
        node = self.nodes[number - len(INPUTS)]
        return [node.first, node.second] if node.op in BINARY else [node.first]


def _bind(text: str, level: int, least: int) -> str:
    return text if level >= least else f"({text})"


_EVONORM = {
    "B0": "std_bwh(0) mul(3,0) std_wh(0) add(5,6) max(4,7) div(0,8)",
    "B1": "std_bwh(0) rms_wh(0) mul(0,5) add(6,5) max(4,7) div(0,8)",
    "B2": "std_bwh(0) rms_wh(0) neg(0) add(5,6) max(4,7) div(0,8)",
    "S0": "mul(3,0) sigmoid(4) mul(0,5) std_whg(0) div(6,7)",
    "S1": "sigmoid(0) mul(0,4) std_whg(0) div(5,6)",
    "S2": "sigmoid(0) mul(0,4) rms_whg(0) div(5,6)",
}


def _draw(rng: np.random.Generator, number: int, allow_batch: bool) -> Node:
    allowed = OPERATIONS if allow_batch else [op for op in OPERATIONS if not op.endswith("_bwh")]
    first, second = rng.integers(number, size=2)
    return Node(str(rng.choice(allowed)), int(first), int(second))


class GraphNormAct(nn.Module):
    """The layer of a graph, with its trainable vectors and, for batch statistics, running averages.

    Roots and logarithms take eps inside; divisors nearer to 0 than eps are moved to eps, keeping their sign.

    Parameters
    ----------
    graph : LayerGraph or str
        Nodes that the output does not use are not computed.
    num_features : int
        Channels.
    groups : int
        Of the aggregates over groups; lowered to the next divisor of `num_features`.
    eps : float
        See above.
    momentum : float
        Weight of the new batch in the running averages.
    unbiased_running : bool
        Store running variances as `torch.nn.BatchNorm2d` does, times n / (n - 1).

    Examples
    --------
    >>> import torch
    >>> layer = GraphNormAct(LayerGraph.bn_relu(), 8)
    >>> layer(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        graph: LayerGraph | str,
        num_features: int,
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.1,
        unbiased_running: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.graph = (LayerGraph.from_string(graph) if isinstance(graph, str) else graph).prune()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.groups = next(g for g in range(min(groups, num_features), 0, -1) if num_features % g == 0)
        self.unbiased_running = unbiased_running
        self.config = {
            "graph": self.graph.to_string(),
            "num_features": num_features,
            "groups": groups,
            "eps": eps,
            "momentum": momentum,
            "unbiased_running": unbiased_running,
        }
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        used = {k for node in self.graph.nodes for k in (node.first, node.second)}
        self.v0 = nn.Parameter(torch.zeros(num_features)) if 2 in used else None
        self.v1 = nn.Parameter(torch.ones(num_features)) if 3 in used else None
        for number, node in enumerate(self.graph.nodes, len(INPUTS)):
            if node.op.endswith("_bwh"):
                start = torch.zeros if node.op == "mean_bwh" else torch.ones
                self.register_buffer(f"running_{number}", start(num_features))

    def forward(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *space"]:
        """Compute the graph for (N, C, ...); the dtype stays."""
        if x.ndim < 3 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected shape (N, {self.num_features}, ...) with positions, got {tuple(x.shape)}")
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        shape = (-1, *[1] * (z.ndim - 2))
        values = [z, z.new_zeros(1, 1, *shape[1:])]
        values += [values[1] if v is None else v.to(z.dtype).reshape(1, *shape) for v in (self.v0, self.v1)]
        for number, node in enumerate(self.graph.nodes, len(INPUTS)):
            a, b = values[node.first], values[node.second]
            values.append(self._aggregate(node.op, a, z, number) if "_" in node.op else self._compute(node.op, a, b))
        y = values[-1] * self.weight.to(z.dtype).reshape(shape) + self.bias.to(z.dtype).reshape(shape)
        return y.expand_as(x).to(x.dtype)

    def _compute(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        match op:
            case "add":
                return a + b
            case "mul":
                return a * b
            case "div":
                return a / torch.where(b.abs() < self.eps, torch.where(b < 0, -self.eps, self.eps).to(b.dtype), b)
            case "max":
                return torch.maximum(a, b)
            case "neg":
                return -a
            case "signlog":
                return a.sign() * (a.abs() + self.eps).log()
            case "signsqrt":
                return a.sign() * (a.abs() + self.eps).sqrt()
            case _:
                return getattr(torch, op)(a)

    def _aggregate(self, op: str, a: Tensor, z: Tensor, number: int) -> Tensor:
        """A moment, kept at size 1 along what it was taken over."""
        moment, over = op.split("_")
        shape = a.shape
        if over == "whg" and a.shape[1] > 1:
            a = a.reshape(len(a), self.groups, -1, *a.shape[2:])
        first = {"bwh": 0, "whc": 1, "wh": 2, "whg": 2}[over]
        dims = [k for k in range(first, a.ndim) if not (over == "bwh" and k == 1)]
        if moment == "mean":
            value = a.mean(dims, keepdim=True)
        elif moment == "rms":
            value = a.square().mean(dims, keepdim=True)
        else:
            value = a.var(dims, unbiased=False, keepdim=True)
        if over == "bwh":
            value = self._running(moment, value, z, number)
        elif over == "whg" and shape[1] > 1:
            value = value.expand(-1, -1, a.shape[2], *[-1] * (a.ndim - 3)).reshape(len(a), shape[1], *value.shape[3:])
        return value if moment == "mean" else (value + self.eps).sqrt()

    def _running(self, moment: str, value: Tensor, z: Tensor, number: int) -> Tensor:
        running: Tensor = getattr(self, f"running_{number}")
        if not self.training:
            return running.to(z.dtype).reshape(1, -1, *[1] * (z.ndim - 2))
        count = z.numel() // z.shape[1]
        factor = count / max(count - 1, 1) if self.unbiased_running and moment == "std" else 1.0
        with torch.no_grad():
            running.lerp_((value * factor).flatten().to(running.dtype).expand_as(running), self.momentum)
        return value

    def extra_repr(self) -> str:
        """Show the formula."""
        return f"{self.graph.formula()}, num_features={self.num_features}"
