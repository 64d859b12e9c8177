"""The lazy neuron phenomenon: how few hidden units of an MLP block fire, and MLPs that keep the k largest only.

Li, You, Bhojanapalli, Li, Rawat, Reddi, Ye, Chern, Yu, Guo, Kumar: The Lazy Neuron Phenomenon: On Emergence of
Activation Sparsity in Transformers, ICLR 2023, https://arxiv.org/abs/2210.06313. The authors published no code.

An MLP block computes f(x) = V relu(K^T x) for every token x; a = relu(K^T x), of width d_ff, is its activation map.
[`activation_sparsity`][classact.probe.activation_sparsity] measures the share of a that is not zero in every layer of
a model. Sparse and dead are different facts, a unit being dead if it fires for no token at all; both are reported.
[`control_dataset`][classact.probe.control_dataset] takes away labels, inputs, or the finite data set, and
[`expected_activation_gradient`][classact.probe.expected_activation_gradient] measures the paper's explanation: before
training, the loss falls on average when an active unit's output does. [`TopKMLP`][classact.probe.TopKMLP] keeps the k
largest activations of a token and skips the rest of the second matrix where that saves time;
[`convert_topk`][classact.probe.convert_topk] puts them into a model. [`ece`][classact.probe.ece],
[`corrupt`][classact.probe.lazyneuron.corrupt] and [`noisy_labels`][classact.probe.lazyneuron.noisy_labels] are for the
side effects that the paper reports.

The explanation in a formula. Let the logits be V a, the entries of V independent N(0, s^2), p = softmax(V a). Stein's
lemma gives E[dl/da_i] = s^2 a_i E[1 - ||p||^2] for cross-entropy and C s^2 a_i for half the squared error of C outputs:
positive for every active unit, zero for the others.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
>>> loader = torch.utils.data.DataLoader(torch.randn(200, 8), batch_size=50)
>>> print(activation_sparsity(convert_topk(model, 4), loader)["1"].nonzero)
0.0625
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from classact.nn.swap import replace
from classact.probe.activations import evaluated, find_layer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Layers = Literal["auto"] | Sequence[str]
Kind = Literal["random_labels", "random_inputs", "infinite"]
# names that hidden activations have in timm, Hugging Face and torch, and how many linear layers stand beside them
NAMES = {"act": 2, "act_fn": 2, "activation": 2, "activation_fn": 2, "intermediate_act_fn": 1}
ROWS = 4096  # tokens compared at once

# Top-k MLPs


class TopKReLU(nn.Module):
    """ReLU, and then the k largest entries of every token with the rest set to zero.

    Gradients flow through the kept entries only. Never more than k are kept, ties or not; of equal entries
    ``torch.topk`` chooses. Where fewer than k are positive, these are kept.

    Parameters
    ----------
    k : int
        At least 1 and, when called, at most the width.
    dim : int
        Axis of the units: -1 for tokens (N, L, D), 1 for maps (N, C, H, W).

    Raises
    ------
    ValueError
        If k is below 1, or above the width.
    """

    def __init__(self, k: int, dim: int = -1) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        self.k, self.dim = k, dim
        self.config: dict[str, Any] = {"k": k, "dim": dim}

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Same shape as `x`, with at most k entries along `dim` above zero."""
        width = x.shape[self.dim]
        if self.k > width:
            raise ValueError(f"k: expected at most the width {width} of axis {self.dim}, got {self.k}")
        a = x.relu()
        if self.k == width:
            return a
        values, index = a.topk(self.k, self.dim, sorted=False)
        return torch.zeros_like(a).scatter(self.dim, index, values)

    def extra_repr(self) -> str:
        """Settings in the printed form."""
        return f"k={self.k}" + ("" if self.dim == -1 else f", dim={self.dim}")


def nonzero_product(a: Float[Tensor, "*n d_ff"], V_t: Float[Tensor, "d_ff d"]) -> Float[Tensor, "*n d"]:
    """``a @ V_t`` from the nonzero entries of `a` alone, for activation maps that are sparse of themselves.

    Gradients reach V_t and the nonzero entries of `a`.
    """
    rows, units = a.reshape(-1, a.shape[-1]).nonzero(as_tuple=True)
    n = math.prod(a.shape[:-1])
    starts = torch.searchsorted(rows, torch.arange(n, device=a.device))
    values = a.reshape(-1, a.shape[-1])[rows, units].to(V_t.dtype)
    return F.embedding_bag(units, V_t, starts, per_sample_weights=values, mode="sum").view(*a.shape[:-1], -1)


class TopKMLP(nn.Module):
    """MLP block ``V topk_k(relu(K^T x))``, which reads only k rows of V^T where that is faster.

    Parameters
    ----------
    d, d_ff : int
        Width of the tokens and of the hidden layer.
    k : int
        Entries kept for every token, from 1 to `d_ff` (the paper: 128 of 3072 in ViT-B/16).
    bias : bool
        Whether both linear maps have a bias; the paper's formula has none.
    sparse_tokens : int
        Up to so many tokens in a call ``forward`` takes ``sparse_forward``, and above ``dense_forward``. Which is
        faster depends on the machine and on k / d_ff. Hooks on ``act`` need, and get, the dense path.

    Attributes
    ----------
    K : Linear
        To the hidden layer.
    V_t : (d_ff, d)
        The transpose of V, in whose rows the hidden units lie side by side.

    Raises
    ------
    ValueError
        If k is not from 1 to d_ff.
    """

    def __init__(self, d: int, d_ff: int, k: int, bias: bool = True, sparse_tokens: int = 64) -> None:
        super().__init__()
        if not 1 <= k <= d_ff:
            raise ValueError(f"k: expected 1 to d_ff = {d_ff}, got {k}")
        self.config: dict[str, Any] = {"d": d, "d_ff": d_ff, "k": k, "bias": bias, "sparse_tokens": sparse_tokens}
        self.k, self.sparse_tokens = k, sparse_tokens
        self.K = nn.Linear(d, d_ff, bias)
        self.act = TopKReLU(k)
        last = nn.Linear(d_ff, d, bias)
        self.V_t = nn.Parameter(last.weight.detach().T.contiguous())
        self.b = last.bias

    @classmethod
    def from_linear(cls, K: nn.Linear, V: nn.Linear, k: int, sparse_tokens: int = 64) -> "TopKMLP":
        """With copies of the weights of two linear layers."""
        if K.out_features != V.in_features or K.in_features != V.out_features or (K.bias is None) != (V.bias is None):
            raise ValueError(f"K, V: expected maps d -> d_ff -> d, both with or without a bias, got {K} and {V}")
        made = cls(K.in_features, K.out_features, k, K.bias is not None, sparse_tokens)
        made.to(K.weight.device, K.weight.dtype)
        made.K.load_state_dict(K.state_dict())
        with torch.no_grad():
            made.V_t.copy_(V.weight.T)
            if V.bias is not None:
                made.b.copy_(V.bias)
        return made

    def dense_forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Through the whole of V."""
        return F.linear(self.act(self.K(x)), self.V_t.T, self.b)

    def sparse_forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The same, reading only the rows of V_t whose units are kept; gradients are the same as well."""
        h = self.K(x)
        values, index = h.relu().reshape(-1, h.shape[-1]).topk(self.k, sorted=False)
        y = F.embedding_bag(index, self.V_t, per_sample_weights=values.to(self.V_t.dtype), mode="sum")
        if self.b is not None:
            y = y + self.b
        return y.to(h.dtype).view(x.shape)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """(..., d) to (..., d), by whichever path is faster for so many tokens."""
        if x.shape[-1] != self.K.in_features:
            raise ValueError(f"x: expected tokens of width {self.K.in_features}, got shape {tuple(x.shape)}")
        few = 0 < math.prod(x.shape[:-1]) <= self.sparse_tokens
        return self.sparse_forward(x) if few and not self.act._forward_hooks else self.dense_forward(x)  # noqa: SLF001


# finding hidden activations


class Hidden(NamedTuple):
    """The activation of one MLP block.

    Attributes
    ----------
    module : Module
        Its output is the activation map.
    axis : int
        Of the units in that output.
    inner, outer
        (inputs, outputs) of the linear maps before it, and of the one behind it, where known.
    """

    module: nn.Module
    axis: int
    inner: tuple[tuple[int, int], ...] = ()
    outer: tuple[int, int] | None = None

    @property
    def width(self) -> int | None:
        """d_ff, where known."""
        return self.outer[0] if self.outer else self.inner[-1][1] if self.inner else None


SKIPPED = (nn.Identity, nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
ACTIVATIONS = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.ReLU6, nn.Mish, nn.Hardswish, nn.Softplus, nn.PReLU),
    TopKReLU,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a map that is linear in every token, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS) and set(module.kernel_size) == {1} and module.groups == 1:
        return module.in_channels, module.out_channels
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer in Hugging Face
        inputs, outputs = module.weight.shape  # type: ignore[misc]
        return int(inputs), int(outputs)
    return None


def _nearest(parts: Iterable[nn.Module]) -> tuple[int, int] | None:
    """Features of the next linear layer, if nothing but normalisation and dropout lies between."""
    return next((_features(part) for part in parts if not isinstance(part, SKIPPED)), None)


def hidden_activations(model: nn.Module, layers: Layers = "auto") -> dict[str, Hidden]:
    """The activations of a model's MLP blocks, by name.

    Found are parts between two linear layers of an ``nn.Sequential``, which torchvision's MLP blocks are, and those
    named as in timm (``mlp.act``, convolutional MLPs included), Hugging Face (``DenseReluDense.act``,
    ``intermediate.intermediate_act_fn``, ``mlp.act_fn``, ``activation_fn``) and ``nn.TransformerEncoderLayer``, with
    linear layers beside them. Functions such as ``F.relu`` are not modules and cannot be found.

    Raises
    ------
    ValueError
        If there is none, a named one does not exist, or one module stands in several places.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    children: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in modules.items():
        if name:
            children.setdefault(name.rpartition(".")[0], []).append((name, module))
    if isinstance(layers, str) and layers != "auto":
        raise ValueError(f"layers: expected 'auto' or a sequence of names, got {layers!r}")
    found = {}
    for name in list(modules)[1:] if layers == "auto" else layers:
        module = modules[name] if layers == "auto" else find_layer(model, name)
        above, _, own = name.rpartition(".")
        siblings = children[above]
        at = [sibling for sibling, _ in siblings].index(name)
        before, after = [m for _, m in siblings[:at]][::-1], [m for _, m in siblings[at + 1 :]]
        maps = next((isinstance(m, CONVOLUTIONS) for m in before if isinstance(m, (nn.Linear, *CONVOLUTIONS))), False)
        one = Hidden(module, 1 if maps else -1)
        linear = [features for _, sibling in siblings if (features := _features(sibling))]
        if isinstance(modules[above], TopKMLP) and own == "act":
            found[name] = one._replace(inner=(linear[0],), outer=linear[0][::-1])
        elif isinstance(modules[above], nn.Sequential):
            first, last = _nearest(before), _nearest(after)
            if first and last and isinstance(module, ACTIVATIONS):
                found[name] = one._replace(inner=(first,), outer=last)
        elif own in NAMES and len(linear) >= max(NAMES[own], 2):
            found[name] = one._replace(inner=tuple(linear[:-1]), outer=linear[-1])
        elif own in NAMES and len(linear) >= NAMES[own]:  # the second linear layer of BERT's blocks is in another part
            behind = modules.get(f"{above.rpartition('.')[0]}.output.dense".lstrip("."))
            found[name] = one._replace(inner=(linear[0],), outer=_features(behind) if behind else None)
        if layers != "auto":
            found.setdefault(name, one)
    if not found:
        leaves = [n for n, m in modules.items() if isinstance(m, ACTIVATIONS)]
        raise ValueError(
            f"layers: no hidden activation of an MLP found in {type(model).__name__}; name them, as layers=[...]; its"
            f" activations are {', '.join(leaves) or 'functions, which have no name'}"
        )
    places: dict[int, str] = {}
    for name, one in found.items():
        if (other := places.setdefault(id(one.module), name)) != name:
            raise ValueError(f"layers: {other!r} and {name!r} are one module; give each block its own")
    return found


def convert_topk(model: nn.Module, k: int, layers: Layers = "auto") -> nn.Module:
    """Keep the k largest activations in the MLP blocks of a model, in place; weights stay.

    Parameters
    ----------
    model : Module
        Its activations must be ReLU; see [`relufy`][classact.probe.relufy].
    k : int
        From 1 to the width of the narrowest block.
    layers : "auto" or sequence of str
        As in [`hidden_activations`][classact.probe.lazyneuron.hidden_activations].

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    ValueError
        If k does not fit, or an activation is not ReLU; the model is then as it was.
    """
    found = hidden_activations(model, layers)
    for name, one in found.items():
        if not isinstance(one.module, (nn.ReLU, TopKReLU)):
            raise ValueError(  # noqa: TRY004 - of the type of a part, not of the argument
                f"model: expected ReLU in its MLP blocks, got {one.module} as {name!r}; use relufy first"
            )
        if one.width is not None and not 1 <= k <= one.width:
            raise ValueError(f"k: expected 1 to {one.width}, the width of {name!r}, got {k}")
    for name, one in found.items():
        axis, parent = one.axis, model.get_submodule(name.rpartition(".")[0])
        replace(model, type(one.module), lambda: TopKReLU(k, axis), where=name.__eq__)  # noqa: B023
        if isinstance(parent, TopKMLP):
            parent.k = parent.config["k"] = k
    return model


def relufy(model: nn.Module, layers: Layers = "auto") -> nn.Module:
    """Put ReLU in the place of every other activation of the MLP blocks, in place, as the paper does before training.

    Returns
    -------
    Module
        The model given.
    """
    for name, one in hidden_activations(model, layers).items():
        if not isinstance(one.module, (nn.ReLU, TopKReLU)):
            replace(model, type(one.module), nn.ReLU, where=name.__eq__)
    return model


# measuring


@dataclass(frozen=True, eq=False)
class SparsityStats:
    """How sparse the activation map of one layer is.

    Attributes
    ----------
    nonzero : float
        Share of entries above the threshold, mean over tokens.
    firing_rate : (d_ff,)
        Of every unit the share of tokens for which it is above the threshold.
    dead : int
        Units that are above it for no token at all.
    tokens : int
        Tokens seen, padding left out.
    per_token : (d_ff + 1,) int
        Number of tokens with 0, 1, ..., d_ff units above it.
    large : float
        Share of entries with ``|a|`` above a hundredth of the largest of their token, for activations other than ReLU,
        which are hardly ever zero; NaN for ReLU.
    """

    nonzero: float
    firing_rate: Float[np.ndarray, " d_ff"]
    dead: int
    tokens: int
    per_token: Int[np.ndarray, " n"]
    large: float = math.nan

    @property
    def nonzero_alive(self) -> float:
        """Share of entries above the threshold among the units that are not dead."""
        living = len(self.firing_rate) - self.dead
        return self.nonzero * len(self.firing_rate) / living if living else math.nan

    def quantile(self, q: float) -> float:
        """The share of nonzero entries that a share `q` of the tokens does not exceed."""
        return float(np.searchsorted(self.per_token.cumsum(), q * self.tokens) / len(self.firing_rate))

    def lorenz(self) -> Float[np.ndarray, " n"]:
        """Share of all firings that falls to the 0, 1, ..., d_ff units that fire least; all equal: a straight line."""
        total = self.firing_rate.sum()
        return np.concatenate([[0.0], np.sort(self.firing_rate).cumsum() / (total or 1.0)])

    def row(self) -> dict[str, Any]:
        """Numbers for a table."""
        rate = self.firing_rate
        return {
            "units": len(rate),
            "tokens": self.tokens,
            "nonzero": self.nonzero,
            "nonzero_alive": self.nonzero_alive,
            "token_median": self.quantile(0.5),
            "token_max": self.quantile(1.0),
            "rate_min": float(rate.min()),
            "rate_median": float(np.median(rate)),
            "rate_max": float(rate.max()),
            "dead": self.dead,
            "dead_share": self.dead / len(rate),
            "large": self.large,
        }


class _Counts:
    """Sums over tokens for one layer, on the layer's device; nothing is read back before the end."""

    def __init__(self, hidden: Hidden, threshold: float, tau: float) -> None:
        self.hidden, self.threshold, self.tau = hidden, threshold, tau
        self.relu = isinstance(hidden.module, (nn.ReLU, nn.ReLU6, TopKReLU))
        self.tokens = 0
        self.fired: Tensor | None = None
        self.per_token = self.large = self.bad = torch.empty(0)

    def add(self, output: Any, mask: Tensor | None, name: str) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(  # noqa: TRY004 - of what a layer returns, not of the argument
                f"layers: {name!r} returns no tensor but {type(output).__name__}"
            )
        a = output.detach().movedim(self.hidden.axis, -1)
        if mask is not None:
            if a.shape[:-1] != mask.shape and tuple(a.shape[:-1]) != (mask.numel(),):
                raise ValueError(
                    f"padding_mask: expected shape {tuple(a.shape[:-1])} for {name!r}, got {tuple(mask.shape)}"
                )
            a = a.reshape(-1, a.shape[-1])[mask.reshape(-1).to(a.device)]
        a = a.reshape(-1, a.shape[-1])
        width = a.shape[1]
        if self.fired is None:
            counters: dict[str, Any] = {"dtype": torch.int64, "device": a.device}
            self.fired, self.per_token = torch.zeros(width, **counters), torch.zeros(width + 1, **counters)
            self.large, self.bad = torch.zeros((), **counters), torch.zeros((), dtype=torch.bool, device=a.device)
        if not len(a):
            return
        self.tokens += len(a)
        room = torch.empty((min(ROWS, len(a)), width), dtype=torch.float32, device=a.device)
        for part in a.split(ROWS):
            # as numbers, not truth values, which are summed ten times slower; whole numbers below 2^24 are exact
            active = torch.gt(part, self.threshold, out=room[: len(part)])
            self.fired += active.sum(0).long()
            n = active.sum(1).long()
            self.per_token.scatter_add_(0, n, torch.ones_like(n))
            if self.relu:
                self.bad |= part.amax().isnan()
            else:
                size = part.abs()
                largest = size.amax(1, keepdim=True)
                self.large += (size > self.tau * largest).sum()
                self.bad |= largest.isnan().any()

    def stats(self, name: str) -> SparsityStats:
        if self.fired is None or not self.tokens:
            raise ValueError(f"layers: {name!r} has seen no token; it was not called, or everything was padding")
        if bool(self.bad):
            raise ValueError(f"layers: expected finite activations, got NaN in {name!r}")
        fired = self.fired.cpu().numpy()
        entries = self.tokens * len(fired)
        return SparsityStats(
            nonzero=float(fired.sum() / entries),
            firing_rate=fired / self.tokens,
            dead=int((fired == 0).sum()),
            tokens=self.tokens,
            per_token=self.per_token.cpu().numpy(),
            large=math.nan if self.relu else int(self.large) / entries,
        )


class ActivationSparsity:
    """Count, in every pass through a model, which hidden units of its MLP blocks are above zero.

    A context manager; within it, call the model as usual. No activation is kept. Entered again, it counts on.

    Parameters
    ----------
    model : Module
        Any model; afterwards, also on error, no hook is left.
    layers : "auto" or sequence of str
        As in [`hidden_activations`][classact.probe.lazyneuron.hidden_activations].
    threshold : float
        Entries above it count as nonzero.
    tau : float
        Of [`SparsityStats.large`][classact.probe.lazyneuron.SparsityStats].

    Raises
    ------
    ValueError
        If no hidden activation is found.

    Examples
    --------
    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> with ActivationSparsity(model, ["1"]) as sparsity:
    ...     _ = model(torch.tensor([[1.0, -1.0, 0.0, 2.0], [-1.0, 0.0, 0.0, -3.0]]))
    >>> found = sparsity.result()["1"]
    >>> found.nonzero, found.firing_rate.tolist(), found.dead
    (0.25, [0.5, 0.0, 0.0, 0.5], 2)
    """

    def __init__(self, model: nn.Module, layers: Layers = "auto", threshold: float = 0.0, tau: float = 0.01) -> None:
        found = hidden_activations(model, layers)
        self._counts = {name: _Counts(one, threshold, tau) for name, one in found.items()}
        self._masks: dict[str, Tensor | None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "ActivationSparsity":  # noqa: PYI034 - the shape checks know no Self here
        if self._handles:
            raise RuntimeError("ActivationSparsity: entered twice, so that everything would be counted twice")
        for name, counts in self._counts.items():
            self._handles.append(counts.hidden.module.register_forward_hook(self._hook(name, counts)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str, counts: _Counts) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            parts = name.split(".")
            named = next((mask for part, mask in self._masks.items() if part in parts), self._masks.get(""))
            # so that passes in inference mode and others may alternate
            with torch.inference_mode(False), torch.no_grad():
                counts.add(output, named, name)

        return hook

    def update_mask(self, padding_mask: Tensor | None, part: str = "") -> None:
        """Say which tokens of the passes that follow are real, until the next call.

        Parameters
        ----------
        padding_mask : (N, L), optional
            True, or not zero, for real tokens; None counts all.
        part : str
            Only for layers with this part in their name, such as "decoder", which go before those for all.
        """
        self._masks[part] = None if padding_mask is None else padding_mask.bool()

    def result(self) -> dict[str, SparsityStats]:
        """What was counted, by layer.

        Raises
        ------
        ValueError
            If a layer was never called, or an activation was NaN.
        """
        return {name: counts.stats(name) for name, counts in self._counts.items()}


@dataclass(frozen=True, eq=False)
class SparsityReport:
    """How sparse the activation maps of a model are, layer by layer; ``report[layer]`` is a `SparsityStats`.

    Attributes
    ----------
    layers : tuple of str
        In the order of the model.
    stats : tuple of SparsityStats
        One for each layer.
    """

    layers: tuple[str, ...]
    stats: tuple[SparsityStats, ...]

    def __getitem__(self, layer: str) -> SparsityStats:
        """One layer."""
        if layer not in self.layers:
            raise KeyError(f"no layer {layer!r}; there are {', '.join(self.layers)}")
        return self.stats[self.layers.index(layer)]

    @property
    def nonzero(self) -> float:
        """Mean over the layers of their share of nonzero entries, the paper's figure for a model."""
        return float(np.mean([one.nonzero for one in self.stats]))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer."""
        return [{"layer": layer, **one.row()} for layer, one in zip(self.layers, self.stats, strict=True)]

    def table(self) -> "pd.DataFrame":
        """One row per layer: shares of nonzero entries over tokens, firing rates over units, dead units."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def plot(self) -> "Figure":
        """Share of nonzero entries and of dead units by layer; firing rates of all units, busiest first."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure((max(5.0, 0.3 * len(self.layers) + 1.5) + 4.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        at = np.arange(len(self.layers))
        colours = colormaps["viridis"](np.linspace(0, 0.85, len(self.layers)))
        left.bar(at, [100 * one.nonzero for one in self.stats], 0.7, color=colours)
        dead = [100 * one.dead / len(one.firing_rate) for one in self.stats]
        left.plot(at, dead, "kx", markersize=5, label="dead units", clip_on=False)
        left.set_xticks(at, self.layers, rotation=90 if len(at) > 4 else 0, fontsize=7)
        left.set(ylabel="per cent", title=f"nonzero activations, mean {100 * self.nonzero:.1f} %", ylim=(0, None))
        left.legend(frameon=False, fontsize=8)
        for one, colour in zip(self.stats, colours, strict=True):
            rate = np.sort(one.firing_rate)[::-1]
            right.plot((np.arange(len(rate)) + 0.5) / len(rate), 100 * rate, color=colour, linewidth=1.3)
        right.set(xlabel="units, busiest first", ylabel="fires for per cent of tokens", ylim=(0, None))
        right.set_title("firing rates, a line per layer")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json`` (the table), ``arrays.npz`` and ``sparsity.png``; each appears only when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in self.rows()
        ]
        arrays: dict[str, Any] = {}
        for number, one in enumerate(self.stats):
            arrays |= {f"{number}/firing_rate": one.firing_rate, f"{number}/per_token": one.per_token}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = Path(temporary)
            content = {"nonzero": self.nonzero, "layers": rows}
            (part / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            np.savez_compressed(part / "arrays.npz", **arrays)
            self.plot().savefig(part / "sparsity.png", dpi=150)
            for file in part.iterdir():
                file.replace(folder / file.name)
        return folder


def activation_sparsity(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Layers = "auto",
    device: str | torch.device | None = None,
    threshold: float = 0.0,
) -> SparsityReport:
    """Measure how sparse the activation maps of a model's MLP blocks are.

    Parameters
    ----------
    model : Module
        Evaluated without gradients; left as it was.
    loader : iterable
        Yields x, (x, y, ...) or, as for Hugging Face, a dict of keyword arguments, in which ``attention_mask`` and
        ``decoder_attention_mask`` tell padding.
    layers : "auto" or sequence of str
        As in [`hidden_activations`][classact.probe.lazyneuron.hidden_activations].
    device : device, optional
        Where to compute, with the model back in its place afterwards; by default where the model is.
    threshold : float
        Entries above it count as nonzero.

    Raises
    ------
    ValueError
        If no hidden activation is found, the loader is empty, or an activation is NaN.
    """
    home = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    sparsity = ActivationSparsity(model, layers, threshold)
    try:
        with evaluated(model), torch.no_grad(), sparsity:
            if device is not None:
                model.to(place)
            for batch in loader:
                if isinstance(batch, Mapping):
                    inputs = {name: value.to(place) for name, value in batch.items()}
                    sparsity.update_mask(inputs.get("attention_mask"))
                    if any(name.startswith("decoder_") for name in inputs):
                        sparsity.update_mask(inputs.get("decoder_attention_mask"), "decoder")
                    model(**inputs)
                else:
                    x = batch[0] if isinstance(batch, (tuple, list)) else batch
                    model(x.to(place))
    finally:
        if device is not None:
            model.to(home)
    found = sparsity.result()
    return SparsityReport(tuple(found), tuple(found.values()))


class MLPFlops(NamedTuple):
    """Floating point operations of the two linear maps of MLP blocks for one token, biases left out.

    Attributes
    ----------
    dense : float
        All entries.
    sparse : float
        The second map restricted to nonzero activations.
    oracle : float
        Both maps restricted to them, as if something told beforehand which they are.
    """

    dense: float
    sparse: float
    oracle: float

    @property
    def ratio(self) -> float:
        """``sparse / dense``: (1 + q) / 2 for a share q of nonzero entries and two equal maps."""
        return self.sparse / self.dense


def mlp_flops(
    model: nn.Module, nonzero: float | Mapping[str, float | SparsityStats], layers: Layers = "auto"
) -> dict[str, MLPFlops]:
    """What sparse activation maps save, by layer and, as ``"total"``, in sum.

    Parameters
    ----------
    model : Module
        Its MLP blocks are found as in [`hidden_activations`][classact.probe.lazyneuron.hidden_activations].
    nonzero : float or mapping
        Share of nonzero entries, the same for all layers or by layer, as ``ActivationSparsity.result()``.

    Raises
    ------
    ValueError
        If a share is not from 0 to 1 or missing, or the linear maps beside a layer are not known.

    Examples
    --------
    >>> block = nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768))
    >>> mlp_flops(block, 0.03)["total"].ratio
    0.515
    """
    rows = {}
    for name, one in hidden_activations(model, layers).items():
        value = nonzero.get(name, math.nan) if isinstance(nonzero, Mapping) else nonzero
        q = value.nonzero if isinstance(value, SparsityStats) else value
        if not 0 <= q <= 1:
            raise ValueError(f"nonzero: expected a share from 0 to 1 for {name!r}, got {q}")
        if one.outer is None or not one.inner:
            raise ValueError(f"layers: the linear maps before and behind {name!r} are not known")
        first, last = (2.0 * sum(i * o for i, o in maps) for maps in (one.inner, (one.outer,)))
        rows[name] = MLPFlops(first + last, first + q * last, q * (first + last))
    return {**rows, "total": MLPFlops(*(sum(column) for column in zip(*rows.values(), strict=True)))}


# why activations fall


class ActivationGradient(NamedTuple):
    """Mean gradients of the loss of an example with respect to the hidden activations of one layer.

    Attributes
    ----------
    active, inactive : float
        Mean over the entries above zero, and over the others.
    positive : float
        Share of the entries above zero whose gradient is positive.
    entries : int
        Entries above zero.
    """

    active: float
    inactive: float
    positive: float
    entries: int


def expected_activation_gradient(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    layers: Layers = "auto",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, ActivationGradient]:
    """Measure dl/da_i, on average over the active entries, of a network that should not be trained yet.

    Positive: a step of gradient descent on a_i would lower it. Averages over several initialisations are the
    expectation that the paper speaks of.

    Parameters
    ----------
    model : Module
        In evaluation mode meanwhile; left as it was, gradients included.
    batch : (x, y)
        Inputs of floating type, targets of the loss.
    layers : "auto" or sequence of str
        As in [`hidden_activations`][classact.probe.lazyneuron.hidden_activations].
    loss : callable, optional
        ``loss(output, y)``, summed over examples; by default cross-entropy.

    Raises
    ------
    ValueError
        If a layer is not called, or the loss or a gradient is not finite.
    """
    found, seen, handles = hidden_activations(model, layers), {}, []

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            seen[name] = output if output.requires_grad else output.detach().requires_grad_()
            return seen[name].clone()  # what follows may work in place

        return hook

    x, y = batch
    device = next((p.device for p in model.parameters()), x.device)
    try:
        handles = [one.module.register_forward_hook(keep(name)) for name, one in found.items()]
        with evaluated(model), torch.enable_grad():
            output = model(x.to(device))
            y = y.to(device)
            total = F.cross_entropy(output, y, reduction="sum") if loss is None else loss(output, y)
            if missing := [name for name in found if name not in seen]:
                raise ValueError(f"layers: {', '.join(missing)} of {type(model).__name__} not called")
            gradients = torch.autograd.grad(total, list(seen.values()))
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for (name, a), gradient in zip(seen.items(), gradients, strict=True):
        if not gradient.isfinite().all():
            raise ValueError(f"loss: expected finite gradients, got NaN or infinity in {name!r}")
        on, off = gradient[a > 0].double(), gradient[a <= 0].double()
        positive = float((on > 0).double().mean())
        result[name] = ActivationGradient(float(on.mean()), float(off.mean()), positive, on.numel())
    return result


def predicted_activation_gradient(
    a: Float[Tensor, "*n d_ff"],
    variance: float,
    n_outputs: int,
    loss: Literal["cross-entropy", "squared"] = "cross-entropy",
    draws: int = 4096,
    seed: int = 0,
) -> Float[Tensor, "*n d_ff"]:
    """E[dl/da_i] over matrices V with independent entries N(0, variance), for logits V a.

    Parameters
    ----------
    a : (..., d_ff)
        Activations.
    variance : float
        s^2.
    n_outputs : int
        C.
    loss : {"cross-entropy", "squared"}
        The latter half the squared error, summed over outputs.
    draws : int
        Logits drawn for the mean of 1 - ||p||^2, which depends on the length of `a` only.

    Examples
    --------
    >>> predicted_activation_gradient(torch.tensor([1.0, 0.5, 0.0]), 0.1, 10, "squared").tolist()
    [1.0, 0.5, 0.0]
    """
    if loss == "squared":
        return n_outputs * variance * a
    if loss != "cross-entropy":
        raise ValueError(f"loss: expected 'cross-entropy' or 'squared', got {loss!r}")
    drawn = torch.randn(draws, n_outputs, generator=torch.Generator().manual_seed(seed)).to(a)
    length = (variance**0.5 * a.norm(dim=-1)).reshape(-1, 1, 1)
    spread = torch.cat([1 - (part * drawn).softmax(-1).square().sum(-1).mean(-1) for part in length.split(256)])
    return variance * a * spread.view(*a.shape[:-1], 1)


# controls and side effects


class ControlDataset(Dataset[tuple[Any, Any]]):
    """A data set with its labels permuted or its inputs replaced by noise, the same at every visit."""

    def __init__(self, dataset: Dataset[Any], kind: Literal["random_labels", "random_inputs"], seed: int) -> None:
        self.dataset, self.kind, self.seed = dataset, kind, seed
        n = len(dataset)  # type: ignore[arg-type]
        self.order = np.random.default_rng(seed).permutation(n) if kind == "random_labels" else np.arange(n)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = range(len(self))[index]
        x, y = self.dataset[index][:2]
        if self.kind == "random_labels":
            return x, self.dataset[int(self.order[index])][1]
        noise = np.random.default_rng([self.seed, index]).standard_normal(tuple(np.shape(x)), np.float32)
        return torch.from_numpy(noise), y


class InfiniteNoise(IterableDataset[tuple[Tensor, int]]):
    """Noise with labels at random, without an end and never the same again."""

    def __init__(self, shape: tuple[int, ...], n_classes: int, seed: int) -> None:
        self.shape, self.n_classes, self.seed, self.passes = shape, n_classes, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        # the seeds that a loader gives its workers are others in every epoch
        rng = np.random.default_rng([self.seed, self.passes, *([] if worker is None else [worker.seed])])
        self.passes += 1
        while True:
            noise = torch.from_numpy(rng.standard_normal(self.shape, np.float32))
            yield noise, int(rng.integers(self.n_classes))


def control_dataset(
    dataset: Dataset[Any], kind: Kind, seed: int = 0, n_classes: int | None = None
) -> ControlDataset | InfiniteNoise:
    """Take from a data set what could be the cause of sparsity.

    Parameters
    ----------
    dataset : Dataset
        With a length, of items (x, y, ...), where x is a tensor or an array.
    kind : {"random_labels", "random_inputs", "infinite"}
        Labels permuted once among the items; every x replaced, once, by N(0, 1) noise of its shape; or fresh noise and
        fresh labels from uniform classes at every step, without an end: train by a number of steps.
    seed : int
        Equal seeds give equal data; with worker processes, infinite data depend on the loader's generator as well.
    n_classes : int, optional
        For infinite data; by default one more than the largest label, for which the data set is read once.

    Raises
    ------
    ValueError
        If the data set is empty, has no length, or the kind is unknown.

    Examples
    --------
    >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 2, 2]))
    >>> sorted(int(y) for _, y in control_dataset(data, "random_labels"))
    [0, 1, 2, 2]
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError(f"dataset: expected one with a length above 0, got {type(dataset).__name__}")
    if kind in ("random_labels", "random_inputs"):
        return ControlDataset(dataset, kind, seed)
    if kind != "infinite":
        raise ValueError(f"kind: expected 'random_labels', 'random_inputs' or 'infinite', got {kind!r}")
    if n_classes is None:
        n_classes = 1 + max(int(dataset[i][1]) for i in range(len(dataset)))
    return InfiniteNoise(tuple(np.shape(dataset[0][0])), n_classes, seed)


def noisy_labels(
    labels: Int[Tensor, " n"], share: float, n_classes: int, generator: torch.Generator | None = None
) -> Int[Tensor, " n"]:
    """Replace each label with probability `share` by one drawn uniformly from all classes, the true one included."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, got {share}")
    drawn = torch.randint(n_classes, labels.shape, generator=generator).to(labels)
    hit = torch.rand(labels.shape, generator=generator) < share
    return torch.where(hit.to(labels.device), drawn, labels)


CORRUPTIONS = {
    "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot": (60.0, 25.0, 12.0, 5.0, 3.0),
    "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
}


def corrupt(
    x: Float[Tensor, "..."],
    kind: Literal["gaussian", "shot", "impulse"],
    severity: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Noise of ImageNet-C (Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261) for images from 0 to 1.

    Parameters
    ----------
    x : (...)
        Images from 0 to 1.
    kind : {"gaussian", "shot", "impulse"}
        Normal noise of deviation c, Poisson numbers of c x photons, or a share c of values set to 0 or 1.
    severity : int
        From 1 to 5.

    Raises
    ------
    ValueError
        If a value is outside 0 to 1, or the kind or severity is unknown.
    """
    if kind not in CORRUPTIONS or severity not in range(1, 6):
        raise ValueError(f"kind, severity: expected {', '.join(CORRUPTIONS)} and 1 to 5, got {kind!r} and {severity}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("x: expected values from 0 to 1")
    c = CORRUPTIONS[kind][severity - 1]
    source, device = x.cpu(), x.device
    if kind == "gaussian":
        return (source + c * torch.randn(x.shape, generator=generator)).clamp(0, 1).to(device)
    if kind == "shot":
        return (torch.poisson(c * source, generator=generator) / c).clamp(0, 1).to(device)
    drawn = torch.rand(x.shape, generator=generator)
    return source.masked_fill(drawn < c / 2, 0.0).masked_fill(drawn > 1 - c / 2, 1.0).to(device)


class Reliability(NamedTuple):
    """Examples by their confidence, the largest probability, in bins of equal width.

    Attributes
    ----------
    confidence, accuracy : (bins,)
        Means; NaN for empty bins.
    examples : (bins,)
        How many there are.
    """

    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    examples: Float[Tensor, " bins"]


def reliability(probabilities: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = 15) -> Reliability:
    """The numbers of a reliability diagram.

    Raises
    ------
    ValueError
        If there is no example, or a value is no probability.
    """
    if not len(probabilities) or not bool(((probabilities >= 0) & (probabilities <= 1 + 1e-5)).all()):
        raise ValueError("probabilities: expected values from 0 to 1 for at least one example")
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    right = (predicted == labels).double()
    sums = [
        torch.zeros(bins, dtype=torch.float64, device=place.device).scatter_add_(0, place, values)
        for values in (confidence, right, torch.ones_like(right))
    ]
    return Reliability(sums[0] / sums[2], sums[1] / sums[2], sums[2])


def ece(probabilities: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy over bins, weighted by examples.

    Examples
    --------
    >>> round(ece(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 3)
    0.4
    """
    found = reliability(probabilities, labels, bins)
    return float(((found.confidence - found.accuracy).abs().nan_to_num() * found.examples).sum() / found.examples.sum())
