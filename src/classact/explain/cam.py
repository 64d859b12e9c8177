"""What all class activation maps share: layer, target, scaling and enlargement; a method adds only its own formula."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classact.explain.frozen import frozen
from classact.explain.layers import Layer, Layout, Reshape, find_layer, find_layout, find_module, patch_grid, recorded
from classact.explain.targets import Score, Target, settle_target, target_scores

Normalize = Literal["max", "minmax"] | None
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def normalize_map(maps: Tensor, normalize: Normalize = "max") -> Tensor:
    """Scale each map (N, *S) by its maximum, or from its minimum to its maximum; a map without a range becomes zero."""
    if normalize is None:
        return maps
    if normalize not in ("max", "minmax"):
        raise ValueError(f"normalize must be 'max', 'minmax' or None, got {normalize!r}")
    flat = maps.flatten(1)
    low = flat.amin(1, keepdim=True) if normalize == "minmax" else torch.zeros_like(flat[:, :1])
    span = flat.amax(1, keepdim=True) - low
    flatline = span <= 0  # and not NaN, which must stay visible
    return torch.where(flatline, 0, (flat - low) / torch.where(flatline, 1, span)).clamp_min(0).view_as(maps)


def upsample_map(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps (N, *s) to (N, *S), linearly along each axis."""
    mode = INTERPOLATION.get(maps.ndim - 1)
    if mode is None:
        raise ValueError(f"maps must have one to three spatial axes, got shape {tuple(maps.shape)}")
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode=mode, align_corners=False).squeeze(1)


C = TypeVar("C", bound="CAM")


class LayerRecord(NamedTuple):
    """Activations A (N, K, *s) of a layer and the gradient (N, K, *s) of each of the T scores, float32 or float64."""

    A: Tensor
    gradients: list[Tensor]


class Record(NamedTuple):
    """One pass: the layers, the scores (N, T), and the target as indices (N, T) or the callable it was."""

    layers: list[LayerRecord]
    scores: Tensor
    target: Tensor | Score


class CAM:
    """A class activation map of one or several layers.

    A subclass gives `combine`, from activations and gradients to maps. Used as a context manager or not, no hook
    outlives a call; the model's modes, ``requires_grad`` flags and gradients stay as they were, also on error. A model
    whose parameters are all frozen, or a call under ``torch.no_grad`` or ``torch.inference_mode``, changes nothing.

    Parameters
    ----------
    model : Module
        Any network whose output does not mix samples in evaluation mode.
    layer : str, Module or list of them
        Layers whose outputs are explained. ``"auto"``: the last feature map before pooling, found at the first call
        and then kept in `layers`. Maps of several layers are averaged.
    reshape : callable, optional
        Layer output -> (N, K, *S), for layouts that shapes do not tell.

    Raises
    ------
    ValueError
        For a layer that is not in the model, is not executed, or has no map of positions.
    """

    needs_gradient = True

    def __init__(
        self, model: nn.Module, layer: Layer | Sequence[Layer] = "auto", *, reshape: Reshape | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.reshape = model, reshape
        wanted = [layer] if isinstance(layer, (str, nn.Module)) else list(layer)
        if not wanted:
            raise ValueError("layer must name at least one layer")
        self.layers: list[str] = [] if wanted == ["auto"] else [find_module(model, part)[0] for part in wanted]

    def __enter__(self: C) -> C:  # noqa: PYI019 - the run-time checks of the tests do not know Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(
        self, x: Tensor, target: Target = None, *, upsample: bool = True, normalize: Normalize = "max", **options: Any
    ) -> Tensor:
        """Maps of the evidence for a target.

        Parameters
        ----------
        x : (N, C, H, W), (N, C, D, H, W) or (N, C, T)
            Input, floating point.
        target : None, int, (N,) or (N, T) indices, or callable
            See [`classact.explain.targets`][classact.explain.targets]; None is the predicted class.
        upsample : bool
            Enlarge the maps to the size of the input.
        normalize : {"max", "minmax", None}
            Divide each map by its maximum (the papers), scale it from minimum to maximum (other libraries), or neither.

        Returns
        -------
        Tensor
            (N, H, W), or (N, T, H, W) for (N, T) targets; in [0, 1] if normalised. Without `upsample`, at the size of
            the (largest) layer.

        Raises
        ------
        TypeError, ValueError
            For an input that is not floating point or has no spatial axes, and for a target the output does not have.
        """
        parts = self.raw_layers(x, target, **options)
        flat = [part.flatten(0, 1) for part in parts]
        if upsample or len(parts) > 1:
            size = x.shape[2:] if upsample else max((part.shape[1:] for part in flat), key=lambda s: s.numel())
            flat = [upsample_map(part, size) for part in flat]
        maps = torch.stack([normalize_map(part, normalize) for part in flat]).mean(0)
        maps = normalize_map(maps, normalize) if len(parts) > 1 else maps
        maps = maps.unflatten(0, parts[0].shape[:2])
        return maps if _several(target) else maps.squeeze(1)

    def raw(self, x: Tensor, target: Target = None, **options: Any) -> Tensor:
        """Maps (N, h, w) at the size of the layer, not scaled; (N, T, h, w) for (N, T) targets. One layer only."""
        parts = self.raw_layers(x, target, **options)
        if len(parts) > 1:
            raise ValueError(f"raw maps are those of one layer, this explainer has {len(parts)}")
        return parts[0] if _several(target) else parts[0].squeeze(1)

    def raw_layers(self, x: Tensor, target: Target = None, **options: Any) -> list[Tensor]:
        """Maps (N, T, *s) of every layer, not scaled."""
        layers = self.record(x, target).layers
        with torch.autocast(x.device.type, enabled=False):
            return [torch.stack([self.combine(part.A, g, **options) for g in part.gradients], 1) for part in layers]

    def record(self, x: Tensor, target: Target = None) -> Record:
        """Activations of the layers, and gradients of the T scores with respect to them."""
        x = check_input(x)
        with torch.inference_mode(mode=False), torch.enable_grad(), frozen(self.model):
            output, features, layouts = self._forward(x, target)
            target = settle_target(output, target, len(x))
            scores = target_scores(output, target, len(x))
            last = scores.shape[1] - 1
            gradients = [_gradients(scores[:, t], features, self.layers, retain=t < last) for t in range(last + 1)]
        layers = [
            LayerRecord(_single(layout(part.detach())), [_single(layout(g[number])) for g in gradients])
            for number, (part, layout) in enumerate(zip(features, layouts, strict=True))
        ]
        return Record(layers, scores.detach(), target)

    def combine(self, A: Tensor, g: Tensor, **options: Any) -> Tensor:
        """Maps (N, *S) of activations and gradients (N, K, *S); what a method is."""
        raise NotImplementedError

    def _forward(self, x: Tensor, target: Target) -> tuple[Any, list[Tensor], list[Layout | Reshape]]:
        """The output, the recorded layers, and what brings each into the form (N, K, *S)."""
        _check_batched(self.model, x)
        if not self.layers:
            # one sample is enough, unless a callable knows something of each
            sample, goal = (x, target) if callable(target) else (x[:1], _first(target))
            score = (lambda output: target_scores(output, goal, len(sample)).sum(1)) if self.needs_gradient else None
            self.layers = [find_layer(self.model, sample, score)]
        modules = [find_module(self.model, name)[1] for name in self.layers]
        with recorded(modules, gradients=self.needs_gradient) as found:
            output = self.model(x)
        features = [self._check(name, part, x) for name, part in zip(self.layers, found, strict=True)]
        patches = patch_grid(self.model, x.shape[2:])
        layouts: list[Layout | Reshape] = [
            self.reshape or find_layout(part, x.shape[2:], layer=module, patches=patches)
            for part, module in zip(features, modules, strict=True)
        ]
        return output, features, layouts

    @staticmethod
    def _check(name: str, features: Tensor | None, x: Tensor) -> Tensor:
        if features is None:
            raise ValueError(f"layer {name!r} was not executed in the forward pass, or returned no tensor")
        if len(features) != len(x):
            raise ValueError(
                f"layer {name!r} returned {len(features)} items for {len(x)} samples (windows, or a flattened batch);"
                " choose a layer that keeps the batch"
            )
        return features


def check_input(x: Tensor) -> Tensor:
    """A floating-point batch (N, C, *S), usable for gradients even if it was made under ``torch.inference_mode``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if not 3 <= x.ndim <= 5 or len(x) == 0:
        raise ValueError(f"x must be a batch (N, C, T), (N, C, H, W) or (N, C, D, H, W), got shape {tuple(x.shape)}")
    if x.is_inference():
        with torch.inference_mode(mode=False):
            return x.clone()
    return x.detach()


def _check_batched(model: nn.Module, x: Tensor) -> None:
    """Refuse a single image (C, H, W), which would pass for a batch of series."""
    convolution = next((part for part in model.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if convolution is None or x.ndim != len(convolution.kernel_size) + 1:
        return
    if x.shape[0] == convolution.in_channels != x.shape[1]:
        raise ValueError(f"x must be a batch, (N, C, ...); got one sample {tuple(x.shape)}: pass x.unsqueeze(0)")


def _single(part: Tensor) -> Tensor:
    """At least float32: products of gradients vanish in half precision."""
    return part if part.dtype == torch.float64 else part.float()


def _several(target: Target) -> bool:
    return isinstance(target, Tensor) and target.ndim == 2


def _first(target: Target) -> Target:
    """The target of the first sample."""
    return target if target is None or isinstance(target, int) else torch.as_tensor(target).reshape(-1)[:1]


def _gradients(score: Tensor, features: list[Tensor], names: list[str], *, retain: bool) -> list[Tensor]:
    if not score.requires_grad:
        raise ValueError(f"the score does not depend on layer {names[0]!r} by differentiable operations")
    found = torch.autograd.grad(score.sum(), features, retain_graph=retain, allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        if gradient is None:
            raise ValueError(f"the score does not depend on layer {name!r} by differentiable operations")
    return list(found)
