"""The maps that can be asked for by name, all called alike: ``explain(model, x, target) -> (N, H, W)``."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from classact.explain.cam import CAM, Normalize, normalize_map
from classact.explain.eigencam import EigenCAM
from classact.explain.gradcam import GradCAM, GuidedBackprop, GuidedGradCAM, input_gradient
from classact.explain.layers import Layer
from classact.explain.smoothgradcampp import GradCAMpp, SmoothGradCAMpp
from classact.explain.targets import Target

Explain = Callable[[nn.Module, Tensor, Any], Tensor]


class _CAMMethod:
    """One kind of map, with the layer found once per network."""

    def __init__(self, kind: type[CAM], layer: Layer | Sequence[Layer], normalize: Normalize, **options: Any) -> None:
        self.kind, self.layer, self.normalize, self.options = kind, layer, normalize, options

    def __call__(self, model: nn.Module, x: Tensor, target: Target) -> Tensor:
        with self.kind(model, self.layer, **self.options) as cam:
            maps = cam(x, target if cam.needs_gradient else None, normalize=self.normalize)
            self.layer = cam.layers
        return maps


def _picture(
    make: Callable[[nn.Module], Any], normalize: Normalize, model: nn.Module, x: Tensor, target: Target
) -> Tensor:
    """The map of a picture (N, C, H, W): the largest absolute value over the channels."""
    return normalize_map(make(model)(x, target).abs().amax(1), normalize)


def _gradient(model: nn.Module) -> Callable[[Tensor, Target], Tensor]:
    return partial(input_gradient, model)


CAMS: dict[str, Any] = {
    "gradcam": GradCAM,
    "gradcampp": GradCAMpp,
    "smoothgradcampp": SmoothGradCAMpp,
    "eigencam": EigenCAM,
}
NAMES = (*CAMS, "guided-gradcam", "guided-backprop", "gradient")


def find_method(name: str, layer: Layer | Sequence[Layer] = "auto", normalize: Normalize = "max") -> Explain:
    """A map by name, or a callable of one's own ``(model, x, target) -> (N, H, W)`` by ``package.module:name``.

    Parameters
    ----------
    name : str
        One of ``gradcam``, ``gradcampp``, ``smoothgradcampp``, ``eigencam``, ``guided-gradcam``, ``guided-backprop``,
        ``gradient``, or the path of a callable.
    layer, normalize
        As for [`CAM`][classact.explain.CAM]; a callable of one's own does not get them.

    Raises
    ------
    ValueError, TypeError
        For an unknown name, one that cannot be imported, or something that cannot be called.
    """
    if name in CAMS:
        return _CAMMethod(CAMS[name], layer, normalize)
    if name == "guided-gradcam":
        return partial(_picture, lambda model: GuidedGradCAM(model, layer), normalize)
    if name == "guided-backprop":
        return partial(_picture, GuidedBackprop, normalize)
    if name == "gradient":
        return partial(_picture, _gradient, normalize)
    if ":" not in name:
        raise ValueError(f"no method {name!r}; there are {', '.join(NAMES)}, or package.module:callable")
    module, _, attribute = name.partition(":")
    try:
        own = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {name}: {error}") from None
    if not callable(own):
        raise TypeError(f"{name} is a {type(own).__name__}, not a callable (model, x, target) -> (N, H, W)")
    return partial(_checked, name, own)


def _checked(name: str, own: Callable[..., Any], model: nn.Module, x: Tensor, target: Target) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = own(model, x, target)
    expected = (len(x), *x.shape[2:])
    if not isinstance(maps, Tensor) or tuple(maps.shape) != expected:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"{name} must return a tensor {expected}, it returned {got}")
    return maps.detach()
