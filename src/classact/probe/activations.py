"""Activations of any layer, batch by batch: hooks that leave no trace, inputs in step, moments of two layers.

What analyses of this family share. Nothing here keeps activations: a layer's statistics need memory for its units, not
for the samples. A *unit* is a channel, a *sample* one position of one image, as in Li et al.,
https://arxiv.org/abs/1511.07543.

>>> import torch
>>> a = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
>>> stats = ActivationStats()
>>> for images in a.split(3):  # the other network has the same units in another order
...     stats.update(images, images[:, [2, 0, 1]])
>>> stats.n, stats.corr_between().argmax(1).tolist()
(200, [1, 2, 0])
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Pool = Literal["none", "grid", "mean"]
CHUNK = 2048  # samples in one matrix product: fits the cache, and keeps sums in single precision short
GRID, REMEMBERED = 8, 256


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """A part of a model by its name in ``model.named_modules()``.

    Raises
    ------
    ValueError
        If there is none; the message has the nearest names.
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.4) or list(modules)[-3:]
        raise ValueError(f"layer: {type(model).__name__} has no layer {layer!r}; there are {', '.join(near)}, ...")
    return modules[layer]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


@contextmanager
def evaluated(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back, also on error."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def observed(
    models: Sequence[nn.Module], layers: Sequence[Sequence[str]]
) -> Iterator[Callable[[Sequence[Tensor]], list[dict[str, Tensor]]]]:
    """Watch layers of several models.

    The models are in evaluation mode within the block; afterwards, also on error, no hook is left and every module has
    its own mode again. What is given is a function: a batch for each model -> for each model the outputs of its layers
    by name, without gradients, as copies that later operations in place cannot change.

    Parameters
    ----------
    models : sequence of Module
    layers : sequence of sequences of str
        Names of the layers of each model.

    Raises
    ------
    ValueError
        If there is no such layer, or if, in a pass, it is not called once, or returns no tensor.
    """
    found: list[dict[str, Tensor]] = [{} for _ in models]
    running: dict[str, Tensor] | None = None  # a part may belong to several of the models

    def keep(into: dict[str, Tensor], name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if into is not running:
                return
            if name in into:
                raise ValueError(
                    f"layer: {name!r} is called more than once in a pass; choose a layer that is not shared"
                )
            tensor = _first_tensor(output)
            if tensor is None:
                raise ValueError(f"layer: {name!r} returns no tensor but {type(output).__name__}")
            into[name] = tensor.detach().clone()

        return hook

    def run(batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        nonlocal running
        for model, x, names, into in zip(models, batches, layers, found, strict=True):
            device = next((p.device for p in model.parameters()), x.device)
            running = into
            into.clear()
            with torch.no_grad():
                model(x.to(device))
            if missing := [name for name in names if name not in into]:
                raise ValueError(f"layer: {', '.join(missing)} of {type(model).__name__} is not called in a pass")
        return [dict(into) for into in found]

    with ExitStack() as stack:
        stack.enter_context(evaluated(*models))
        for model, names, into in zip(models, layers, found, strict=True):
            for name in dict.fromkeys(names):
                stack.callback(find_layer(model, name).register_forward_hook(keep(into, name)).remove)
        yield run


def channel_axis_of(model: nn.Module, layer: str, output: Tensor) -> int:
    """Which axis of a layer's output holds its units: 1 (channels first) or the last (tokens, channels last).

    Told by the widths of the layer's own parts, or else of the whole model's: linear layers and layer normalisation
    put units on the last axis, convolutions and batch normalisation on axis 1. Images without a sign of either have
    their channels first.

    Raises
    ------
    ValueError
        For an output of three axes, (N, C, T) or (N, L, D), which nothing decides; and for one of fewer than two.
    """
    if output.ndim < 2:
        raise ValueError(f"layer: expected an output (N, C, ...) from {layer!r}, got shape {tuple(output.shape)}")
    if output.ndim == 2:
        return 1
    for part in (find_layer(model, layer), model):
        first = last = False
        for module in part.modules():
            if isinstance(module, nn.Linear):
                # of a whole network with feature maps, a classifier's width says nothing
                last |= module.out_features == output.shape[-1] and (output.ndim == 3 or part is not model)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                last |= module.normalized_shape[-1] == output.shape[-1]
            elif isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001 - the common class of all convolutions
                first |= module.out_channels == output.shape[1]
            elif isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - that of all batch norms
                first |= module.num_features == output.shape[1]
        if first != last:
            return 1 if first else output.ndim - 1
    if output.ndim == 3:
        raise ValueError(
            f"channel_axis: the output {tuple(output.shape)} of {layer!r} may be (N, C, T) or (N, L, D); give 1 or -1"
        )
    return 1


def in_step(loaders: Sequence[Iterable[Any]]) -> Iterator[tuple[Tensor, ...]]:
    """Batches of inputs from several loaders that must yield the same items in the same order.

    A loader that is given several times is gone through once. Batches are tensors x, or tuples whose first parts are x
    and, if it is an integer tensor, the labels. Inputs need not be equal: networks differ in how images are resized
    and normalised. Then a fingerprint of each, its grey values averaged over a coarse grid and standardised, must be
    nearer to that of its partner than to those of 256 others, for at least half of the last 256 items.

    Raises
    ------
    ValueError
        If a loader ends before the others, batches differ in size, or items or their labels do not agree.
    """
    unique = list({id(loader): loader for loader in loaders}.values())
    number = {id(loader): k for k, loader in enumerate(unique)}
    checks = [_SameItems() for _ in unique[1:]]
    for batches in zip_longest(*unique):
        if any(batch is None for batch in batches):
            raise ValueError("loader: expected loaders of equal length, one ended before another")
        items = [_split_batch(batch) for batch in batches]
        for check, item in zip(checks, items[1:], strict=True):
            check(items[0], item)
        yield tuple(items[number[id(loader)]][0] for loader in loaders)


def _split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    if not parts or not isinstance(parts[0], Tensor):
        raise ValueError(f"loader: expected batches x or (x, y, ...) of tensors, got {type(batch).__name__}")
    labelled = len(parts) > 1 and isinstance(parts[1], Tensor) and not parts[1].is_floating_point()
    return parts[0], parts[1] if labelled else None


class _SameItems:
    """Whether two streams of batches hold the same items."""

    def __init__(self) -> None:
        self.agreed = torch.empty(0, dtype=torch.bool)
        self.others: Tensor | None = None

    def __call__(self, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]) -> None:
        (x, y), (other, other_y) = first, second
        if len(x) != len(other):
            raise ValueError(f"loader: expected batches of equal size, got {len(x)} and {len(other)} items")
        order = "; the loaders must yield the same items in the same order, without shuffling or the same way shuffled"
        if y is not None and other_y is not None and not torch.equal(y.cpu(), other_y.cpu()):
            raise ValueError(f"loader: the labels of two loaders differ{order}")
        if x.shape == other.shape and torch.equal(x.cpu(), other.cpu()):
            return
        if not (x.is_floating_point() and other.is_floating_point()):
            raise ValueError(f"loader: the inputs of two loaders differ{order}")
        own, candidates = _fingerprint(x), _fingerprint(other)
        if own.shape != candidates.shape or own.shape[1] < 3:
            raise ValueError(
                f"loader: inputs of shapes {tuple(x.shape)} and {tuple(other.shape)} cannot be compared, so that"
                " nothing tells whether the loaders agree"
            )
        self.others = candidates if self.others is None else torch.cat([self.others, candidates])[-REMEMBERED:]
        likeness, partner = own @ self.others.T, (own * candidates).sum(1)
        agreed = torch.cat([self.agreed, partner >= likeness.amax(1) - 1e-5])
        if len(agreed) > 1 and 2 * agreed.sum() < len(agreed):
            raise ValueError(
                f"loader: only {int(agreed.sum())} of {len(agreed)} inputs are most like their partner from the other"
                f" loader{order}"
            )
        self.agreed = agreed[-REMEMBERED:]


def _fingerprint(x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n k"]:
    """Fingerprints of length 1 that no brightness, contrast or resizing changes much."""
    x = x.float().cpu().reshape(len(x), -1) if x.ndim < 3 else x.float().cpu()
    if x.ndim > 2:
        sizes: Any = tuple(min(GRID, size) for size in x.shape[2:])
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.ndim - 3]
        x = pool(x.mean(1, keepdim=True), sizes).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def aligned_positions(
    a: Float[Tensor, "n s1 *p1"],
    b: Float[Tensor, "n s2 *p2"],
    pool: Pool = "none",
    max_positions: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "n s1 p"], Float[Tensor, "n s2 p"]]:
    """Two layers' outputs, channels first, at the same positions of the same images.

    Parameters
    ----------
    a, b : (N, s1, ...), (N, s2, ...)
        Outputs for the same N images.
    pool : {"none", "grid", "mean"}
        Take the positions as they are, average both over the coarser of the two grids, or over all positions.
    max_positions : int, optional
        Draw so many positions, anew in every call.

    Raises
    ------
    ValueError
        If the positions of the two do not correspond.
    """
    if pool == "mean":
        a, b = (x.flatten(2).mean(2, keepdim=True) if x.ndim > 2 else x for x in (a, b))
    elif pool == "grid" and a.ndim == b.ndim and 3 <= a.ndim <= 5:
        sizes: Any = tuple(min(pair) for pair in zip(a.shape[2:], b.shape[2:], strict=True))
        average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[a.ndim - 3]
        a, b = average(a, sizes), average(b, sizes)
    elif pool not in ("none", "grid"):
        raise ValueError(f"pool: expected 'none', 'grid' or 'mean', got {pool!r}")
    grids = [tuple(x.shape[2:]) for x in (a, b)]
    a, b = (x.flatten(2) if x.ndim > 2 else x.unsqueeze(2) for x in (a, b))
    if a.shape[2] != b.shape[2] or (len(grids[0]) == len(grids[1]) and grids[0] != grids[1]):
        raise ValueError(
            f"pool: the layers have positions {grids[0]} and {grids[1]}; give pool='grid' to average both over the"
            " coarser grid, or pool='mean' to average over all positions"
        )
    if max_positions is not None and max_positions < a.shape[2]:
        chosen = torch.randperm(a.shape[2], generator=generator)[:max_positions]
        a, b = a[..., chosen.to(a.device)], b[..., chosen.to(b.device)]
    return a, b


def _room(x: Tensor) -> Tensor:
    """Memory for deviations (units, images, positions) in which images and positions are one axis."""
    return torch.empty_like(x) if x.stride(0) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Moments:
    """Means of one or two layers, and sums of products of deviations from them, by the numbers of both layers."""

    def __init__(self) -> None:
        self.n = 0
        self.means: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}

    def add(self, n: int, means: list[Tensor], sums: dict[str, Tensor]) -> None:
        """Add `n` samples by Chan, Golub and LeVeque's update."""
        if not n:
            return
        if not self.n:
            self.means = [torch.zeros_like(mean) for mean in means]
            self.sums = {key: torch.zeros_like(part) for key, part in sums.items()}
        moved = [new - old for new, old in zip(means, self.means, strict=True)]
        weight = self.n * n / (self.n + n)
        for key, part in sums.items():
            self.sums[key] = self.sums[key] + part + weight * _between(key, moved, part)
        self.means = [old + d * (n / (self.n + n)) for old, d in zip(self.means, moved, strict=True)]
        self.n += n


def _between(key: str, moved: list[Tensor], part: Tensor) -> Tensor:
    """Products of the distances that the means of the layers named by `key` have moved, in the shape of `part`."""
    first, second = (moved[int(k)] for k in key)
    return torch.outer(first, second) if part.ndim == 2 else first * second


class ActivationStats:
    """Means, deviations and correlations of the units of one or two layers, in one pass and constant memory.

    Sums over some thousand samples are taken in their precision, about the mean so far, and added up in double
    precision.

    Parameters
    ----------
    channel_axis : int
        Axis of the units: 1 for (N, C), (N, C, T) and (N, C, H, W), -1 for tokens (N, L, D).
    within : bool
        Whether correlations within each layer are wanted. Without them one matrix product per batch is needed, not
        three.
    permuted : bool
        Whether to keep a control: correlations between the layers when every image of one meets another image of its
        batch in the other. Positions keep their place, so that what borders alone do to correlations stays. Batches of
        one image are left out of it; where all images of a batch are alike, as in data sorted by class, it keeps that.
    seed : int
        Of the permutations.
    """

    def __init__(self, channel_axis: int = 1, within: bool = True, permuted: bool = False, seed: int = 0) -> None:
        self.channel_axis, self.within, self.permuted = channel_axis, within, permuted
        self._eps = 0.0
        self._all, self._control = _Moments(), _Moments()
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def n(self) -> int:
        """Samples seen."""
        return self._all.n

    def update(self, a: Float[Tensor, "n ..."], b: Float[Tensor, "n ..."] | None = None) -> None:
        """Add a batch of one layer, or of two for the same images; on error nothing is added.

        Parameters
        ----------
        a, b : (N, C), (N, C, T), (N, C, H, W), or with the units on another axis
            Activations; the numbers of units may differ.

        Raises
        ------
        ValueError
            If `a` and `b` differ in images or positions, the number of layers or units changes, or a value is NaN or
            infinite.
        """
        layers = [self._by_unit(x) for x in (a, b) if x is not None]
        shapes = [x.shape[1:] for x in layers]
        layers = [x.flatten(2) if x.ndim > 2 else x.unsqueeze(2) for x in layers]
        if b is not None:
            if layers[0].shape[1:] != layers[1].shape[1:] or (
                len(shapes[0]) == len(shapes[1]) and shapes[0] != shapes[1]
            ):
                raise ValueError(
                    f"a, b: expected equal images and positions, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
                )
            layers[1] = layers[1].to(layers[0].device)
            layers = [x.to(torch.promote_types(layers[0].dtype, layers[1].dtype)) for x in layers]
        units = [len(x) for x in layers]
        if self.n and units != [len(mean) for mean in self._all.means]:
            raise ValueError(f"a, b: expected {[len(mean) for mean in self._all.means]} units as before, got {units}")
        n = layers[0][0].numel()
        if not n:
            return
        images, shuffled = layers[0].shape[1], None
        if self.permuted and b is not None and images > 1:
            order = torch.randperm(images, generator=self._generator)
            shuffled = torch.empty_like(order)
            shuffled[order] = order.roll(1)  # a cycle through all images: none meets itself
        sums, permuted, means = self._sums(layers, shuffled)
        for name, mean in zip("ab", means, strict=False):
            if not mean.isfinite().all():
                bad = (~mean.isfinite()).nonzero().flatten().tolist()
                raise ValueError(f"{name}: expected finite activations, got NaN or infinity in units {bad[:5]}")
        self._eps = max(self._eps, *(torch.finfo(x.dtype).eps for x in layers))
        self._all.add(n, means, sums)
        if permuted is not None:
            self._control.add(n, means, {"01": permuted})

    def merge(self, other: "ActivationStats") -> "ActivationStats":
        """Statistics of the samples of both, as new ones.

        Raises
        ------
        ValueError
            If the two keep different statistics or have seen different units.
        """
        merged = ActivationStats(self.channel_axis, self.within, self.permuted)
        for part in (self, other):
            if (part.within, part.permuted) != (self.within, self.permuted):
                raise ValueError("other: expected statistics with the same settings within and permuted")
            if part.n and merged.n and [len(m) for m in part._all.means] != [len(m) for m in merged._all.means]:  # noqa: SLF001
                raise ValueError("other: expected statistics of the same units")
            merged._eps = max(merged._eps, part._eps)  # noqa: SLF001
            for into, own in ((merged._all, part._all), (merged._control, part._control)):  # noqa: SLF001
                into.add(own.n, own.means, own.sums)
        return merged

    def _by_unit(self, x: Tensor) -> Tensor:
        """As (units, images, ...)."""
        if x.ndim < 2 or not -x.ndim <= self.channel_axis < x.ndim or self.channel_axis in (0, -x.ndim):
            raise ValueError(
                f"a, b: expected images on axis 0 and units on axis {self.channel_axis}, got shape {tuple(x.shape)}"
            )
        x = (x if x.dtype in (torch.float32, torch.float64) else x.float()).detach()
        return x.movedim(self.channel_axis, 0)

    def _sums(
        self, layers: list[Tensor], shuffled: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None, list[Tensor]]:
        """Sums of products of deviations from the batch's means, those of the permuted control, and these means.

        Every value is read once: deviations are taken from a value near the mean, and the sums moved to it afterwards.
        """
        sums: dict[str, Tensor] = {}
        step = max(1, CHUNK // layers[0].shape[2])
        centres = [
            mean.to(x) if self.n else x[:, :step].mean((1, 2)) for x, mean in zip_longest(layers, self._all.means)
        ]
        buffers = [_room(x[:, :step]) for x in layers]  # memory that is fresh for every chunk costs more than the sums
        for start in range(0, layers[0].shape[1], step):
            at = slice(start, start + step)
            parts = []
            for x, centre, buffer in zip(layers, centres, buffers, strict=True):
                chunk = x[:, at]
                parts.append(torch.sub(chunk, centre[:, None, None], out=buffer[:, : chunk.shape[1]]).flatten(1))
            found = {f"{k}": x.sum(1) for k, x in enumerate(parts)}
            if len(parts) == 2:
                found["01"] = parts[0] @ parts[1].T
            if shuffled is not None:
                other = layers[1][:, shuffled[at].to(layers[1].device)].sub_(centres[1][:, None, None])
                found["permuted"] = parts[0] @ other.flatten(1).T
            for k, x in enumerate(parts):
                found[f"{k}{k}"] = x @ x.T if self.within else x.square_().sum(1)
            for key, part in found.items():
                sums[key] = sums[key].add_(part.cpu()) if key in sums else part.cpu().double()
        n = layers[0][0].numel()
        moved = [sums.pop(f"{k}") / n for k in range(len(layers))]
        for key, part in sums.items():
            part -= n * _between("01" if key == "permuted" else key, moved, part)
        control = sums.pop("permuted", None)
        return sums, control, [centre.cpu().double() + d for centre, d in zip(centres, moved, strict=True)]

    def _check(self, *nets: int) -> None:
        if self.n < 3:
            raise ValueError(f"update: expected at least 3 samples, got {self.n}")
        for net in nets:
            if not 1 <= net <= len(self._all.means):
                raise ValueError(f"net: expected 1 to {len(self._all.means)}, the layers seen, got {net}")

    def mean(self, net: int = 1) -> Float[Tensor, " s"]:
        """Mean of every unit of the first or second layer."""
        self._check(net)
        return self._all.means[net - 1]

    def std(self, net: int = 1) -> Float[Tensor, " s"]:
        """Standard deviation of every unit."""
        self._check(net)
        own = self._all.sums[f"{net - 1}{net - 1}"]
        return ((own.diagonal() if self.within else own) / self.n).clamp(min=0).sqrt()

    def dead(self, net: int = 1) -> Bool[Tensor, " s"]:
        """Units that are constant to within the precision of their activations."""
        return self.std(net) <= 32 * self._eps * self.mean(net).abs()

    def cov_within(self, net: int = 1) -> Float[Tensor, "s s"]:
        """Covariances of the units of a layer."""
        self._check(net)
        if not self.within:
            raise ValueError("within: these statistics were asked for without correlations within layers")
        return self._all.sums[f"{net - 1}{net - 1}"] / self.n

    def cov_between(self, permuted: bool = False) -> Float[Tensor, "s1 s2"]:
        """Covariances of the units of the first layer with those of the second, or of the permuted control.

        Raises
        ------
        ValueError
            If the control was not asked for, or no batch had two images.
        """
        self._check(1, 2)
        if not permuted:
            return self._all.sums["01"] / self.n
        if not self._control.n:
            raise ValueError("permuted: expected permuted=True at the start, and a batch of at least two images")
        return self._control.sums["01"] / self._control.n

    def corr_within(self, net: int = 1) -> Float[Tensor, "s s"]:
        """Correlations of the units of a layer; rows and columns of dead units are 0."""
        return self._scaled(self.cov_within(net), net, net)

    def corr_between(self, permuted: bool = False) -> Float[Tensor, "s1 s2"]:
        """Correlations of the units of the first layer with those of the second; 0 for dead units."""
        return self._scaled(self.cov_between(permuted), 1, 2)

    def _scaled(self, covariance: Tensor, first: int, second: int) -> Tensor:
        inverse = [torch.where(self.dead(net), 0.0, 1 / self.std(net).clamp(min=1e-300)) for net in (first, second)]
        return (inverse[0][:, None] * covariance * inverse[1]).clamp(-1, 1)
