"""Feature maps of any layer of any network: which layer, in which layout, recorded in one pass without a hook left.

A layer's output is brought into one form (N, K, *S), channels first, from feature maps (N, K, *S), channels-last maps
(N, *S, K) and tokens (N, L, D) with any number of prefix tokens. The layout is found from the shapes.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Layer = str | nn.Module
Reshape = Callable[[Tensor], Tensor]
POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
MAX_PREFIX = 64


@dataclass(frozen=True)
class Layout:
    """How a layer's output becomes (N, K, *S).

    Attributes
    ----------
    kind : {"channels_first", "channels_last", "tokens"}
        Order of the axes.
    grid : tuple of int
        S, the number of positions along each axis.
    prefix : int
        Tokens before those of the grid (class token, registers, distillation token, prompts).
    """

    kind: str
    grid: tuple[int, ...]
    prefix: int = 0

    def __call__(self, features: Tensor) -> Tensor:
        """Bring features, or their gradient, into the form (N, K, *S)."""
        if self.kind == "channels_first":
            return features
        features = features.movedim(-1, 1)
        return features if self.kind == "channels_last" else features[..., self.prefix :].unflatten(-1, self.grid)


def find_layout(
    features: Tensor, spatial: Sequence[int], *, layer: nn.Module | None = None, patches: Sequence[int] | None = None
) -> Layout:
    """Find the layout of a layer's output from its shape and that of the input.

    Axes are positions if all shrink by the same factor from the input. Tokens are split into a grid of square
    patches and the fewest prefix tokens that allow one.

    Parameters
    ----------
    features : Tensor
        The layer's output.
    spatial : sequence of int
        Spatial shape of the input: (H, W), (D, H, W) or (T,).
    layer : Module, optional
        The layer; the sizes of its weights decide where shapes do not, as for series.
    patches : sequence of int, optional
        Grid of the patch embedding, if the network has one; it decides how many tokens are prefix.

    Raises
    ------
    ValueError
        If no axes of the output can be positions of the input, or if there is only one position.
    """
    spatial, shape = tuple(spatial), tuple(features.shape)
    layout = None
    if len(shape) == len(spatial) + 2:
        first, last = (
            _proportional(shape[2:], spatial) and math.prod(shape[2:]) > 1,
            _proportional(shape[1:-1], spatial) and math.prod(shape[1:-1]) > 1,
        )
        if first and last:
            first = not _channels_last(layer, shape)
            last = not first
        if first:
            layout = Layout("channels_first", shape[2:])
        elif last and len(spatial) > 1:
            layout = Layout("channels_last", shape[1:-1])
    if layout is None and len(shape) == 3:
        layout = _token_layout(shape[1], spatial, patches)
    if layout is None:
        raise ValueError(
            f"the layer's output {shape} has no map of positions for an input of spatial shape {spatial}; choose"
            " another layer, or pass reshape=, a function that turns the output into (N, K, *spatial)"
        )
    return layout


def _proportional(grid: Sequence[int], spatial: Sequence[int]) -> bool:
    """Whether one factor, to within one position an axis, leads from `spatial` to `grid`."""
    low = max(size / (n + 1) for n, size in zip(grid, spatial, strict=True))
    high = min(size / max(n - 1, 0.5) for n, size in zip(grid, spatial, strict=True))
    return low <= high


def _channels_last(layer: nn.Module | None, shape: Sequence[int]) -> bool:
    """Whether the weights of a layer speak for channels on the last axis."""
    if layer is None:
        return False
    widths = {True: set(), False: set()}  # type: dict[bool, set[int]]
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            widths[True].add(part.out_features)
        elif isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
            widths[True].add(part.normalized_shape[-1])
        elif isinstance(part, nn.modules.conv._ConvNd):  # noqa: SLF001 - the common class of all convolutions
            widths[False].add(part.out_channels)
        elif isinstance(part, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - the common class of batch norms
            widths[False].add(part.num_features)
    return shape[-1] in widths[True] and shape[1] not in widths[False]


def _token_layout(length: int, spatial: tuple[int, ...], patches: Sequence[int] | None) -> Layout | None:
    if patches is not None and 1 < math.prod(patches) <= length:
        return Layout("tokens", tuple(patches), length - math.prod(patches))
    for prefix in range(min(length - 1, MAX_PREFIX + 1)):
        if (grid := _grid(length - prefix, spatial)) is not None:
            return Layout("tokens", grid, prefix)
    return None


def _grid(positions: int, spatial: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of so many positions whose patches are equal along all axes and fill the input exactly."""
    patch = (math.prod(spatial) / positions) ** (1 / len(spatial))
    if positions < 2 or abs(patch - round(patch)) > 1e-6 or any(size % round(patch) for size in spatial):
        return None
    return tuple(size // round(patch) for size in spatial)


def patch_grid(model: nn.Module, spatial: Sequence[int]) -> tuple[int, ...] | None:
    """Grid of the patch embedding: the first convolution whose kernel is its stride, if it comes before any other."""
    for part in model.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            kernel = tuple(part.kernel_size)
            if kernel != tuple(part.stride) or len(kernel) != len(spatial) or max(kernel) == 1:
                return None
            return tuple(size // k for size, k in zip(spatial, kernel, strict=True))
    return None


def find_module(model: nn.Module, layer: Layer) -> tuple[str, nn.Module]:
    """A layer of a model by name, or itself if it is a part of the model.

    Raises
    ------
    ValueError
        If there is no such layer; the message has the nearest names.
    """
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, part in modules.items():
            if part is layer:
                return name, part
        raise ValueError(f"layer {type(layer).__name__} is not a part of the model {type(model).__name__}")
    if layer not in modules or not layer:
        near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.4) or list(modules)[-3:]
        raise ValueError(f"the model {type(model).__name__} has no layer {layer!r}; there are {', '.join(near)}, ...")
    return layer, modules[layer]


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a module's output, which may be a tuple, a list or a dict."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def _replace_first(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    items = list(output.items()) if isinstance(output, dict) else list(enumerate(output))
    for number, (key, part) in enumerate(items):
        if first_tensor(part) is not None:
            items[number] = (key, _replace_first(part, tensor))
            break
    if isinstance(output, dict):
        return type(output)(items)
    parts = [part for _, part in items]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


@contextmanager
def recorded(modules: Sequence[nn.Module], *, gradients: bool) -> Iterator[list[Tensor | None]]:
    """Record the last output of each module while the block runs; all hooks are gone afterwards, also on error.

    With `gradients`, the graph begins at the first of the layers: nothing before it is differentiated, and what is
    recorded is a copy that later in-place operations cannot overwrite.
    """
    found: list[Tensor | None] = [None] * len(modules)
    handles = []

    def keep(number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            tensor = first_tensor(output)
            if tensor is None:
                return None
            if not gradients:
                found[number] = tensor.clone()
                return None
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_(tensor.is_floating_point())
            found[number] = tensor
            return _replace_first(output, tensor.clone())

        return hook

    try:
        for number, module in enumerate(modules):
            handles.append(module.register_forward_hook(keep(number)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_layer(model: nn.Module, x: Tensor, score: Callable[[Any], Tensor] | None = None) -> str:
    """Name of the last layer with a map of positions before pooling, found in one traced pass.

    Outputs of pooling layers do not count. With `score` the positions of the map must receive a gradient of it: in a
    vision transformer that classifies from its class token this leads to the normalisation before the last attention,
    since patches have no influence after it.

    Parameters
    ----------
    model : Module
        In evaluation mode, its parameters without gradients.
    x : (N, C, *S)
        Input.
    score : callable, optional
        Output -> (N,).

    Raises
    ------
    ValueError
        If no layer qualifies.
    """
    calls: list[tuple[str, nn.Module, Tensor]] = []
    pooled: set[int] = set()
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                calls.append((name, module, output))
                if isinstance(module, POOLING):
                    pooled.add(id(output))

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(watch(name)))
        with torch.set_grad_enabled(score is not None):
            # a copy, since the first module may work in place
            output = model(x.detach().requires_grad_(score is not None).clone())
            total = None if score is None else score(output).sum()
    finally:
        for handle in handles:
            handle.remove()
    spatial, patches = tuple(x.shape[2:]), patch_grid(model, x.shape[2:])
    candidates: dict[int, tuple[str, Tensor, Layout]] = {}
    for name, module, tensor in reversed(calls):
        if id(tensor) in pooled or id(tensor) in candidates or len(tensor) != len(x):
            continue
        try:
            layout = find_layout(tensor, spatial, layer=module, patches=patches)
        except ValueError:
            continue
        if layout.kind == "tokens" and isinstance(module, nn.Linear):
            continue  # queries, keys and values side by side, or the hidden units of an MLP
        candidates[id(tensor)] = (name, tensor, layout)
    if total is None and candidates:
        return next(iter(candidates.values()))[0]
    if total is not None and candidates:
        tensors = [tensor for _, tensor, _ in candidates.values()]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
        reached = [
            (name, bool(layout(gradient).ne(0).any()))
            for (name, _, layout), gradient in zip(candidates.values(), gradients, strict=True)
            if gradient is not None
        ]
        if reached:
            return next((name for name, moves in reached if moves), reached[0][0])
    raise ValueError(f"no layer of {type(model).__name__} has a map of positions; pass layer= and reshape=")
