"""NAP: neural activation patterns, what the ReLUs of a network do for a class.

Geng, Le, Xu, Wang, Gurfinkel, Si: Towards Reliable Neural Specifications, ICML 2023,
https://arxiv.org/abs/2210.16114; authors' code https://github.com/allengeng123/reliable-neural-specifications.

A ball around one input is a poor specification: balls that can be verified hold no other real input. A pattern
P = (A, D) says instead that the hidden ReLUs of A are on and those of D off, and leaves the rest free. It is mined by
counting (Algorithm 1): of the samples of a class, a share of at least delta has a neuron of A on, of at most 1 - delta
one of D. Patterns can be watched at run time ([`NAPMonitor`][classact.probe.nap.NAPMonitor]), measured on data
([`evaluate_patterns`][classact.probe.nap.evaluate_patterns]) and proved, in
[`nap_verify`][classact.probe.nap_verify].

A neuron is on where its input z to the ReLU is above 0; exactly 0 is off (Definition 3.1). The preprint calls delta
what is 1 - delta here and in the authors' code. Two things to know. The share delta holds for each neuron alone, so the
share of samples that follow the whole pattern is lower: ask for both. And a pattern means nothing for another
network, not even the same one trained further: it carries a hash of the weights, which is checked.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from classact.probe.activations import evaluated

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Layout = tuple[tuple[str, int], ...]
BLOCK = 1024  # samples that are counted at a time


class Preactivations(NamedTuple):
    """Logits (N, C), the inputs (N, n) of the ReLUs one layer after the other, and the names and widths of these."""

    logits: Float[Tensor, "b c"]
    z: Float[Tensor, "b n"]
    layout: Layout


def preactivations(model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> Preactivations:
    """Run a network in evaluation mode and record what goes into its ReLUs; feature maps are flattened.

    Parameters
    ----------
    model : Module
        Returns logits (N, C). Its ReLUs are ``nn.ReLU`` modules; one that runs several times counts as several layers,
        ``name``, ``name#2``, ... The model is left as it was.
    x : (N, ...)
        Inputs; moved to the model's device.
    layers : sequence of str, optional
        Names of ReLUs as in ``model.named_modules()``; all of them by default.

    Raises
    ------
    ValueError
        If there is no such ReLU, none at all, or the output is not (N, C).
    """
    relus = {name: part for name, part in model.named_modules() if isinstance(part, nn.ReLU)}
    if not relus:
        raise ValueError(f"model: expected a network with nn.ReLU modules, found none in {type(model).__name__}")
    chosen = list(relus) if layers is None else [name.partition("#")[0] for name in layers]
    if missing := [name for name in chosen if name not in relus]:
        raise ValueError(f"layers: no ReLU named {', '.join(missing)}; there are {', '.join(relus)}")
    found: dict[str, Tensor] = {}

    def record(name: str, part: nn.ReLU) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls = sum(key.partition("#")[0] == name for key in found)
            key = name if calls == 0 else f"{name}#{calls + 1}"
            z = inputs[0].detach().flatten(1)
            found[key] = z.clone() if part.inplace else z

        return hook

    device = next((p.device for p in model.parameters()), x.device)
    handles = []
    try:
        handles += [relus[name].register_forward_pre_hook(record(name, relus[name])) for name in dict.fromkeys(chosen)]
        with evaluated(model), torch.no_grad():
            logits = model(x.to(device))
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits (N, C) for {len(x)} inputs, got {what}")
    names = list(found) if layers is None else list(layers)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"layers: {', '.join(missing)} did not run; the ReLUs that did are {', '.join(found)}")
    z = torch.cat([found[name] for name in names], 1)
    return Preactivations(logits, z, tuple((name, found[name].shape[1]) for name in names))


def model_hash(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values (as float64) of all weights and floating buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class NAP:
    """A neural activation pattern P = (A, D) over n hidden neurons.

    Attributes
    ----------
    active, inactive : (n,) bool
        The neurons of A and of D.
    layout : tuple of (name, width)
        The ReLUs that the neurons belong to, in this order; the widths sum to n.
    label : int or None
        The class it was mined for.
    support : int
        Samples it was counted on.
    delta : str
        The threshold it was mined with, if it was.
    source : str
        What said which class a sample is of: ``"label"`` or ``"prediction"``.
    model_hash : str
        [`model_hash`][classact.probe.nap.model_hash] of the network it belongs to; empty for any.

    Raises
    ------
    ValueError
        If a neuron has another state than 0 or 1, is in A and D, or the widths do not sum to n.

    Examples
    --------
    >>> import torch
    >>> P = NAP(torch.tensor([True, False, False]), torch.tensor([False, False, True]), (("relu", 3),))
    >>> P.follows(torch.tensor([[0.1, -2.0, 0.0], [0.1, 2.0, 0.3], [0.0, 1.0, -1.0]]))
    tensor([ True, False, False])
    """

    active: Bool[Tensor, " n"]
    inactive: Bool[Tensor, " n"]
    layout: Layout
    label: int | None = None
    support: int = 0
    delta: str = ""
    source: str = "label"
    model_hash: str = ""

    def __post_init__(self) -> None:
        width = sum(n for _, n in self.layout)
        for name in ("active", "inactive"):
            states = torch.as_tensor(getattr(self, name))
            if states.shape != (width,):
                raise ValueError(f"{name}: expected one state for each of {width} neurons, got {tuple(states.shape)}")
            if states.dtype is not torch.bool and not bool(((states == 0) | (states == 1)).all()):
                wrong = states[(states != 0) & (states != 1)][0].item()
                raise ValueError(f"{name}: expected bools, or 0 and 1 only, got {wrong}")
            object.__setattr__(self, name, states.bool().cpu())
        if both := int((self.active & self.inactive).sum()):
            raise ValueError(f"active, inactive: expected no neuron in both, got {both}")

    @property
    def n_fixed(self) -> int:
        """Number of neurons in A or D."""
        return int((self.active | self.inactive).sum())

    def follows(self, z: Float[Tensor, "b n"], margin: float = 0.0) -> Bool[Tensor, " b"]:
        """Whether samples follow the pattern, given what goes into their ReLUs.

        With a margin m other than 0: z >= m in A and z <= -m in D.
        """
        if z.ndim != 2 or z.shape[1] != len(self.active):
            raise ValueError(f"z: expected (N, {len(self.active)}), got {tuple(z.shape)}")
        on = z > 0 if margin == 0 else z >= margin
        off = z <= -margin
        active, inactive = self.active.to(z.device), self.inactive.to(z.device)
        return ((on | ~active) & (off | ~inactive)).all(1)

    def subsumes(self, other: "NAP") -> bool:
        """Whether every input that follows `other` follows this one: A and D are subsets of the other's."""
        self.check_layout(other)
        return bool((self.active <= other.active).all() and (self.inactive <= other.inactive).all())

    def conflicts(self, other: "NAP") -> Bool[Tensor, " n"]:
        """Neurons that one wants on and the other off; where there is one, no input follows both."""
        self.check_layout(other)
        return (self.active & other.inactive) | (self.inactive & other.active)

    def check_layout(self, other: "NAP") -> None:
        """Refuse a pattern over other layers."""
        if self.layout != other.layout:
            raise ValueError(f"other: expected a pattern over the layers {self.layout}, got one over {other.layout}")

    def check_model(self, model: nn.Module) -> None:
        """Refuse a network that this pattern is not of.

        Raises
        ------
        ValueError
            If the weights are others than those it was mined with.
        """
        if self.model_hash and self.model_hash != model_hash(model):
            raise ValueError("model: its weights are not those that the pattern was mined with; mine the pattern anew")


def activation_counts(z: Float[Tensor, "b n"], labels: Int[Tensor, " b"], n_classes: int) -> Int[Tensor, "c n"]:
    """For every class and neuron, the number of samples with z > 0."""
    members = torch.arange(n_classes, device=z.device).unsqueeze(1) == labels.to(z.device)
    counts = torch.zeros(n_classes, z.shape[1], dtype=torch.int64, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        # float32 counts without error up to 2^24; blocks stay in the cache
        for part, of in zip(z.split(BLOCK), members.float().split(BLOCK, 1), strict=True):
            counts += (of @ (part > 0).float()).long()
    return counts


def mine(
    counts: Int[Tensor, "c n"], support: Int[Tensor, " c"], delta: float | str | Fraction
) -> tuple[Bool[Tensor, "c n"], Bool[Tensor, "c n"]]:
    """A and D of every class (Algorithm 1), compared in integers: 1 - 0.9 in floats would lose neurons.

    Parameters
    ----------
    counts : (C, n) int
        [`activation_counts`][classact.probe.nap.activation_counts].
    support : (C,) int
        Samples of each class; of one without any, A and D are empty.
    delta : float, str or Fraction
        In (0.5, 1]; the decimal that is written, so 0.9 is nine tenths.

    Examples
    --------
    >>> import torch
    >>> A, D = mine(torch.tensor([[10, 9, 8, 2, 1, 0]]), torch.tensor([10]), 0.9)
    >>> A.int().tolist(), D.int().tolist()
    ([[1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 1, 1]])
    """
    share = _share(delta)
    active, inactive = torch.zeros_like(counts, dtype=torch.bool), torch.zeros_like(counts, dtype=torch.bool)
    for c, n in enumerate(support.tolist()):
        if n:
            active[c] = counts[c] >= -(-share.numerator * n // share.denominator)
            inactive[c] = counts[c] <= (share.denominator - share.numerator) * n // share.denominator
    return active, inactive


def _share(delta: float | str | Fraction) -> Fraction:
    try:
        share = Fraction(str(delta))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"delta: expected a number in (0.5, 1], got {delta!r}") from None
    if not Fraction(1, 2) < share <= 1:
        raise ValueError(f"delta: expected a number in (0.5, 1], got {delta!r}")
    return share


class ActivationCounter:
    """Counts, class by class, how often each ReLU is on; patterns of any delta come from one pass over the data.

    Parameters
    ----------
    model : Module
        With ``nn.ReLU`` modules; returns logits (N, C). It is left as it was.
    layers : sequence of str, optional
        The ReLUs to count; all by default.
    source : {"label", "prediction"}
        Whether the class of a sample is its label or what the model predicts.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(100, 2)
    >>> y = (x[:, 0] > 0).long()
    >>> patterns = ActivationCounter(model).update(x, y).patterns(0.9)
    >>> [(P.support, P.n_fixed) for P in patterns.values()]
    [(50, 5), (50, 3)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        source: Literal["label", "prediction"] = "label",
    ) -> None:
        if source not in ("label", "prediction"):
            raise ValueError(f"source: expected 'label' or 'prediction', got {source!r}")
        self.model, self.layers, self.source = model, layers, source
        self.hash = model_hash(model)
        self.layout: Layout = ()
        self.counts = self.support = torch.zeros(0, dtype=torch.int64)

    def update(self, x: Tensor, labels: Int[Tensor, " b"] | None = None) -> "ActivationCounter":
        """Count a batch; labels (N,) are not needed if the model's predictions are the classes.

        Raises
        ------
        ValueError
            If labels are missing, as many as there are not inputs, or out of range; or something is not finite.
        """
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError("x: expected finite values, got NaN or infinity")
        logits, z, layout = preactivations(self.model, x, self.layers)
        if not bool(z.isfinite().all()):
            raise ValueError("model: its activations are not finite")
        n_classes = logits.shape[1]
        if self.source == "prediction":
            labels = logits.argmax(1)
        elif labels is None:
            raise ValueError("labels: expected a class for every input, got None")
        if labels.shape != (len(x),):
            raise ValueError(f"labels: expected ({len(x)},), one for each input, got {tuple(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(f"labels: expected classes from 0 to {n_classes - 1}, got {low} to {high}")
        if not self.layout:
            self.layout = layout
            self.counts = torch.zeros(n_classes, z.shape[1], dtype=torch.int64)
            self.support = torch.zeros(n_classes, dtype=torch.int64)
        if layout != self.layout:
            raise ValueError(f"x: expected inputs of one size for all batches, got layers {layout}, not {self.layout}")
        self.counts += activation_counts(z, labels, n_classes).cpu()
        self.support += torch.bincount(labels, minlength=n_classes).cpu()
        return self

    def patterns(self, delta: float | str | Fraction = 0.95, classes: Sequence[int] | None = None) -> dict[int, NAP]:
        """One pattern per class.

        Parameters
        ----------
        delta : float, str or Fraction
            In (0.5, 1]. A larger one fixes fewer neurons.
        classes : sequence of int, optional
            The classes wanted; by default all that the model has.

        Raises
        ------
        ValueError
            If delta is out of range, no sample of a class that is wanted has been counted, or the weights of the model
            have changed since the counter was made.
        """
        wanted = list(range(len(self.support))) if classes is None else list(classes)
        if not self.layout:
            raise ValueError("patterns: nothing has been counted yet; call update(x, labels) first")
        if empty := [c for c in wanted if not 0 <= c < len(self.support) or not self.support[c]]:
            raise ValueError(f"classes: no samples of {', '.join(map(str, empty))}; name those that have some")
        if model_hash(self.model) != self.hash:
            raise ValueError("model: its weights have changed since the counter was made; count anew")
        active, inactive = mine(self.counts, self.support, delta)
        text = str(delta)
        return {
            c: NAP(active[c], inactive[c], self.layout, c, int(self.support[c]), text, self.source, self.hash)
            for c in wanted
        }


def mine_patterns(
    model: nn.Module,
    loader: Iterable[Any],
    delta: float | str | Fraction = 0.95,
    *,
    layers: Sequence[str] | None = None,
    source: Literal["label", "prediction"] = "label",
    classes: Sequence[int] | None = None,
) -> dict[int, NAP]:
    """Patterns of all classes from a loader of (x, y, ...).

    See [`ActivationCounter`][classact.probe.ActivationCounter] for the arguments and errors.
    """
    _share(delta)
    counter = ActivationCounter(model, layers, source)
    for x, y, *_ in loader:
        counter.update(x, y)
    return counter.patterns(delta, classes)


def save_patterns(path: str | Path, patterns: Mapping[int, NAP]) -> Path:
    """Write patterns as JSON: the indices of their neurons, and what they were mined from."""
    content = {
        "format": "classact.nap",
        "version": 1,
        "patterns": [
            {
                "key": key,
                "active": P.active.nonzero()[:, 0].tolist(),
                "inactive": P.inactive.nonzero()[:, 0].tolist(),
                "layout": [list(part) for part in P.layout],
                **{name: getattr(P, name) for name in ("label", "support", "delta", "source", "model_hash")},
            }
            for key, P in patterns.items()
        ],
    }
    path = Path(path)
    _write(path, (json.dumps(content) + "\n").encode())
    return path


def load_patterns(path: str | Path) -> dict[int, NAP]:
    """Read what [`save_patterns`][classact.probe.nap.save_patterns] wrote.

    Raises
    ------
    ValueError
        If the file is another one, or names a neuron that is not there.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != "classact.nap" or content.get("version") != 1:
        raise ValueError(f"{path}: expected patterns written by save_patterns")
    try:
        return {int(item["key"]): _pattern(path, item) for item in content["patterns"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a pattern is damaged ({error!r})") from None


def _pattern(path: str | Path, item: Mapping[str, Any]) -> NAP:
    layout = tuple((str(name), int(width)) for name, width in item["layout"])
    n = sum(width for _, width in layout)
    states = torch.zeros(2, n, dtype=torch.bool)
    for row, name in enumerate(("active", "inactive")):
        if wrong := [i for i in item[name] if type(i) is not int or not 0 <= i < n]:
            raise ValueError(f"{path}: {name} neurons must be integers from 0 to {n - 1}, found {wrong[0]!r}")
        states[row, item[name]] = True
    rest = {name: item[name] for name in ("label", "support", "delta", "source", "model_hash")}
    return NAP(states[0], states[1], layout, **rest)


class MonitorOutput(NamedTuple):
    """What a monitor says of N inputs.

    Attributes
    ----------
    logits : (N, C)
        As the model returns them.
    prediction : (N,)
        The class with the largest logit.
    follows : (N,) bool
        Whether an input follows the pattern of the class predicted; False if that has none.
    violations : (N, P)
        Number of neurons that are not as each of the P patterns wants them, in their order; 0 where it is followed.
    """

    logits: Float[Tensor, "b c"]
    prediction: Int[Tensor, " b"]
    follows: Bool[Tensor, " b"]
    violations: Int[Tensor, "b p"]


class NAPMonitor:
    """Says of every prediction whether the input behaves inside the network as its class does.

    Hooks live during a call only, and the model is left as it was.

    Parameters
    ----------
    model : Module
        The network that the patterns were mined on.
    patterns : mapping of int to NAP
        Class -> pattern, all over the same layers.

    Raises
    ------
    ValueError
        If there is no pattern, they are over different layers, or were mined on another network.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    >>> _ = model[0].weight.data.fill_(1.0), model[0].bias.data.fill_(0.0)
    >>> P = NAP(torch.tensor([True]), torch.tensor([False]), (("1", 1),))
    >>> NAPMonitor(model, {0: P, 1: P})(torch.tensor([[2.0], [-2.0]])).follows
    tensor([ True, False])
    """

    def __init__(self, model: nn.Module, patterns: Mapping[int, NAP]) -> None:
        if not patterns:
            raise ValueError("patterns: expected at least one")
        first = next(iter(patterns.values()))
        for P in patterns.values():
            first.check_layout(P)
        digest = model_hash(model)
        for c, P in patterns.items():
            if P.model_hash not in ("", digest):
                raise ValueError(f"patterns: that of class {c} was mined on other weights than the model has")
        self.model, self.patterns, self.layout = model, dict(patterns), first.layout
        self.active = torch.stack([P.active for P in patterns.values()])
        self.inactive = torch.stack([P.inactive for P in patterns.values()])

    def __call__(self, x: Tensor) -> MonitorOutput:
        """Classify N inputs and compare them with every pattern."""
        logits, z, layout = preactivations(self.model, x, [name for name, _ in self.layout])
        if layout != self.layout:
            raise ValueError(f"x: expected inputs for layers {self.layout}, got {layout}")
        prediction = logits.argmax(1)
        violations = self.violations(z)
        index = {c: i for i, c in enumerate(self.patterns)}
        column = torch.tensor([index.get(c, -1) for c in range(logits.shape[1])], device=z.device)[prediction]
        own = violations.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1)
        return MonitorOutput(logits, prediction, (own == 0) & (column >= 0), violations)

    def violations(self, z: Float[Tensor, "b n"]) -> Int[Tensor, "b p"]:
        """Number of neurons that are not as each pattern wants them, given what goes into the ReLUs."""
        on = (z > 0).float()
        with torch.autocast(z.device.type, enabled=False):
            off_but_active = (1 - on) @ self.active.to(z.device).float().T
            return (off_but_active + on @ self.inactive.to(z.device).float().T).long()


@dataclass(frozen=True, eq=False)
class NAPReport:
    """How patterns fare on data: P patterns, C classes.

    Attributes
    ----------
    classes : tuple of int
        The class of each pattern.
    samples : (C,) int
        Samples of each class.
    followers : (C, P) int
        How many samples of each class follow each pattern.
    fixed, active : (P,)
        Share of all neurons that a pattern fixes, and fixes on.
    agreement : (P,)
        Mean share of its neurons that are as a pattern wants them, over samples of its class: what delta is about.
    conflicts : (P, P) int
        Neurons that one pattern wants on and another off; above 0 no input can follow both.
    ambiguous : float
        Share of all samples that follow two patterns or more.
    """

    classes: tuple[int, ...]
    samples: Int[np.ndarray, " c"]
    followers: Int[np.ndarray, "c p"]
    fixed: Float[np.ndarray, " p"]
    active: Float[np.ndarray, " p"]
    agreement: Float[np.ndarray, " p"]
    conflicts: Int[np.ndarray, "p p"]
    ambiguous: float

    @property
    def _own(self) -> np.ndarray:
        return self.followers[list(self.classes), range(len(self.classes))]

    @property
    def recall(self) -> np.ndarray:
        """Share of the samples of its class that follow a pattern, (P,); NaN without samples."""
        samples = self.samples[list(self.classes)]
        return np.where(samples > 0, self._own / np.maximum(samples, 1), np.nan)

    @property
    def precision(self) -> np.ndarray:
        """Share of those that follow a pattern that are of its class, (P,); NaN if none follow it."""
        all_of_it = self.followers.sum(0)
        return np.where(all_of_it > 0, self._own / np.maximum(all_of_it, 1), np.nan)

    @property
    def others(self) -> np.ndarray:
        """Share of the samples of other classes that follow a pattern, (P,)."""
        rest = self.samples.sum() - self.samples[list(self.classes)]
        return np.where(rest > 0, (self.followers.sum(0) - self._own) / np.maximum(rest, 1), np.nan)

    def table(self) -> "pd.DataFrame":
        """One row per pattern, and the mean."""
        import pandas as pd

        names = ("fixed", "active", "agreement", "recall", "precision", "others")
        rows = pd.DataFrame({name: getattr(self, name) for name in names}, index=[str(c) for c in self.classes])
        rows.insert(0, "samples", self.samples[list(self.classes)])
        rows.loc["mean"] = rows.mean()
        return rows.rename_axis("class")

    def plot(self) -> "Figure":
        """Share of each class that follows each pattern."""
        from matplotlib.figure import Figure

        share = self.followers / np.maximum(self.samples, 1)[:, None]
        figure = Figure((1.8 + 0.45 * share.shape[1], 1.4 + 0.4 * share.shape[0]), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for i, row in enumerate(share):
            for j, value in enumerate(row):
                if value >= 0.005:
                    color = "white" if value > 0.5 else "black"
                    axes.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(share.shape[1]), [str(c) for c in self.classes])
        axes.set_yticks(range(share.shape[0]))
        axes.set(xlabel="pattern of class", ylabel="class of the sample")
        figure.colorbar(shown, ax=axes, label="share that follows")
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``nap.json``, ``nap.npz`` and ``nap.png`` into a folder, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.table().reset_index().to_dict("records")
        clean = [{key: None if value != value else value for key, value in row.items()} for row in rows]
        names = ("samples", "followers", "fixed", "active", "agreement", "conflicts")
        arrays, picture = io.BytesIO(), io.BytesIO()
        np.savez_compressed(arrays, classes=np.array(self.classes), **{name: getattr(self, name) for name in names})
        self.plot().savefig(picture, format="png", dpi=120)
        _write(folder / "nap.npz", arrays.getvalue())
        _write(folder / "nap.png", picture.getvalue())
        content = json.dumps({"ambiguous": self.ambiguous, "patterns": clean}, indent=1)
        _write(folder / "nap.json", (content + "\n").encode())
        return folder


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def evaluate_patterns(model: nn.Module, patterns: Mapping[int, NAP], loader: Iterable[Any]) -> NAPReport:
    """Measure on data who follows the patterns: recall, precision, followers of other classes, ambiguity.

    Parameters
    ----------
    model : Module
        The network of the patterns; left as it was.
    patterns : mapping of int to NAP
        Class -> pattern.
    loader : iterable of (x, y, ...)
        Inputs (N, ...) and classes (N,), other ones than those the patterns were mined on.

    Raises
    ------
    ValueError
        If the loader is empty, a label is out of range, or the patterns are not the model's.
    """
    monitor = NAPMonitor(model, patterns)
    n_fixed = (monitor.active | monitor.inactive).sum(1)
    samples = followers = agreeing = torch.zeros(0)
    ambiguous = 0
    for x, y, *_ in loader:
        found = monitor(x)
        y, n_classes = y.to(found.logits.device), found.logits.shape[1]
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < n_classes:
            raise ValueError(
                f"loader: expected classes from 0 to {n_classes - 1}, got {int(y.min())} to {int(y.max())}"
            )
        if not len(samples):
            samples = torch.zeros(n_classes, dtype=torch.int64)
            followers, agreeing = (samples.new_zeros(n_classes, len(patterns)) for _ in range(2))
        matched = (found.violations == 0).long()
        samples += torch.bincount(y, minlength=n_classes).cpu()
        followers.index_add_(0, y.cpu(), matched.cpu())
        agreeing.index_add_(0, y.cpu(), n_fixed - found.violations.cpu())
        ambiguous += int((matched.sum(1) > 1).sum())
    if not len(samples) or not int(samples.sum()):
        raise ValueError("loader: expected at least one sample, got none")
    keys, columns = list(patterns), range(len(patterns))
    if wrong := [c for c in keys if not 0 <= c < len(samples)]:
        raise ValueError(f"patterns: expected classes from 0 to {len(samples) - 1}, got {wrong[0]}")
    possible = (samples[keys] * n_fixed).numpy()
    n = monitor.active.shape[1]
    active, inactive = monitor.active.long(), monitor.inactive.long()
    return NAPReport(
        tuple(keys),
        samples.numpy(),
        followers.numpy(),
        n_fixed.numpy() / n,
        active.sum(1).numpy() / n,
        np.where(possible > 0, agreeing[keys, columns].numpy() / np.maximum(possible, 1), np.nan),
        (active @ inactive.T + inactive @ active.T).numpy(),
        ambiguous / int(samples.sum()),
    )
