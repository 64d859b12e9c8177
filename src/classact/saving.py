"""Save and load networks: weights as safetensors, and the arguments that build the network as JSON beside them.

Nothing is ever unpickled, and only classes that classact exports are built.
"""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

FAMILIES = (
    *("nn", "explain", "probe", "mil", "discover", "continual", "supervision", "transfer", "segment", "signals"),
    *("recommend", "rules", "theory"),
)
PACKAGES = {f"classact.{family}" for family in FAMILIES}


def save(model: "nn.Module", path: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write ``path.safetensors`` and ``path.json``.

    Parameters
    ----------
    model : Module
        A network whose class classact exports, with its arguments in ``model.config``; or any other module, whose
        weights are written but which [`load`][classact.load] can only fill, not build.
    path : path
        Without suffix, or with ``.safetensors``.
    metadata : dict, optional
        JSON values to store beside it, such as class names and a decision threshold.

    Returns
    -------
    Path
        The ``.safetensors`` file.
    """
    from safetensors.torch import save_model

    weights = _with_suffix(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    description = json.dumps({**_describe(model), "metadata": metadata or {}}, indent=1)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.contiguous()  # same values; safetensors cannot look through other strides
    part = weights.with_name(weights.name + ".part")
    try:
        save_model(model, str(part))
        part.replace(weights)
    finally:
        part.unlink(missing_ok=True)
    part = weights.with_suffix(".json.part")
    part.write_text(description + "\n", encoding="utf-8")
    part.replace(weights.with_suffix(".json"))
    return weights


def load(path: str | Path, model: "nn.Module | None" = None) -> "nn.Module":
    """Load a network written by [`save`][classact.save], in evaluation mode.

    Parameters
    ----------
    path : path
        The ``.safetensors`` file, or its name without the suffix.
    model : Module, optional
        A module to fill, for classes that classact does not export.

    Returns
    -------
    Module
        With what was stored beside it as ``model.metadata``.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If the class is not one of classact's and no `model` was given.
    """
    from safetensors.torch import load_model

    weights = _with_suffix(path)
    for file in (weights, weights.with_suffix(".json")):
        if not file.exists():
            msg = f"{file}: no such file; a saved model is a .safetensors file with a .json file beside it"
            raise FileNotFoundError(msg)
    description = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    if model is None:
        model = _build(description, weights)
    load_model(model, str(weights))
    model.metadata = description.get("metadata", {})
    return model.eval()


def _with_suffix(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _describe(model: "nn.Module") -> dict[str, Any]:
    config = getattr(model, "config", {})
    kind = type(model)
    package = ".".join(kind.__module__.split(".")[:2])
    public = package in PACKAGES and kind.__qualname__ in importlib.import_module(package).__all__
    name = f"{package}.{kind.__qualname__}" if public else f"{kind.__module__}:{kind.__qualname__}"
    return {
        "class": name,
        "config": {key: _describe(value) if hasattr(value, "state_dict") else value for key, value in config.items()},
    }


def _build(description: dict[str, Any], file: Path) -> "nn.Module":
    name = description["class"]
    package, _, member = name.rpartition(".")
    if ":" in name or package not in PACKAGES:
        msg = f"{file}: holds a {name}, which classact does not export; build one and pass it as load(path, model=...)"
        raise ValueError(msg)
    module = importlib.import_module(package)
    if member not in module.__all__:
        msg = f"{file}: {package} has no class {member}; was it written by another version of classact?"
        raise ValueError(msg)
    config = {
        key: _build(value, file) if isinstance(value, dict) and "class" in value else value
        for key, value in description["config"].items()
    }
    return getattr(module, member)(**config)
