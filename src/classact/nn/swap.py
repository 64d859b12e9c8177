"""Put another part in the place of every module of a type: activations, normalisations, linear layers, attention."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
SAME = {"num_features": "num_channels", "num_channels": "num_features"}


class Replacement(NamedTuple):
    """One module that was replaced.

    Attributes
    ----------
    names : tuple of str
        All its places in the model; several where it is shared.
    old, new : Module
        What was there, and what is there now.
    """

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module

    def __str__(self) -> str:
        return f"{', '.join(self.names)}: {self.old} -> {self.new}"


def replace(
    model: nn.Module,
    old: type[nn.Module] | tuple[type[nn.Module], ...],
    new: Callable[..., nn.Module],
    *,
    where: Callable[[str], bool] | None = None,
    strict: bool = True,
) -> list[Replacement]:
    """Replace every module of exactly the given types, in place.

    A module that is used in several places stays one. Device, floating type, training mode and hooks are those of the
    module replaced; weights are new and trainable. Functions (``F.relu`` in a ``forward``) are not modules and stay.

    Parameters
    ----------
    model : Module
        Any model; changed.
    old : type or tuple of types
        What to replace. Subclasses are left alone: a subclass may do more, as timm's ``BatchNormAct2d`` does.
    new : callable
        Makes a new module. Of its arguments those without a default are taken from the old module by their names, as
        ``in_features`` and ``out_features`` of a linear layer or ``num_features`` of a normalisation; an argument named
        ``old`` is the old module itself.
    where : callable, optional
        Replace only where this is true of the name, as ``lambda name: ".mlp." in name``.
    strict : bool
        Raise if there is nothing to replace.

    Returns
    -------
    list of Replacement
        One per module replaced; print them to see what was done.

    Raises
    ------
    ValueError
        If nothing is replaced; if the model itself is of that type; or if a module lies within an
        ``nn.TransformerEncoderLayer``, which in evaluation mode computes with its parts' weights without calling them.
    TypeError
        If `new` needs an argument which the old module does not have, or returns no module. In all cases the model is
        then as it was.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(*replace(model, nn.ReLU, nn.GELU))
    1: ReLU() -> GELU(approximate='none')
    >>> print(*replace(model, nn.GELU, lambda old: nn.GELU("tanh")))
    1: GELU(approximate='none') -> GELU(approximate='tanh')
    """
    types = old if isinstance(old, tuple) else (old,)
    if type(model) in types:
        raise ValueError(f"model: is itself {_names(types)}; it cannot be replaced in place")
    places: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in types and (where is None or where(name)):
            places.setdefault(id(module), (module, []))[1].append(name)
    if not places and strict:
        raise ValueError(_nothing(model, types, where is not None))
    for _, names in places.values():
        for name in names:
            _check_place(model, name)
    default = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    made = [Replacement(tuple(names), module, _make(module, new, default)) for module, names in places.values()]
    for one in made:
        for name in one.names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, one.new)
    return made


def _names(types: tuple[type, ...]) -> str:
    return " or ".join(f"{one.__module__}.{one.__qualname__}".replace("torch.nn.modules.", "nn.") for one in types)


def _nothing(model: nn.Module, types: tuple[type, ...], filtered: bool) -> str:
    found = {type(module) for module in model.modules()}
    close = tuple(sorted((one for one in found if issubclass(one, types) and one not in types), key=str))
    if filtered and found & set(types):
        return f"where: is true of no {_names(types)} in the model"
    if close:
        return f"old: there is no {_names(types)} in the model, but {_names(close)}, derived from it; name that type"
    leaves = tuple(sorted({type(module) for module in model.modules() if not list(module.children())}, key=str))
    return f"old: there is no {_names(types)} in the model, whose parts are {_names(leaves).replace(' or ', ', ')}"


def _check_place(model: nn.Module, name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts)):
        above = model.get_submodule(".".join(parts[:length]))
        if isinstance(above, nn.TransformerEncoderLayer):
            raise ValueError(  # noqa: TRY004
                f"{name}: nn.TransformerEncoderLayer computes with the weights of its parts in evaluation mode, without"
                " calling them; a part replaced would be ignored"
            )
        if isinstance(above, torch.jit.ScriptModule):
            raise ValueError(f"{name}: lies in a scripted module, whose parts cannot be replaced")  # noqa: TRY004


def _make(old: nn.Module, new: Callable[..., nn.Module], default: torch.Tensor) -> nn.Module:
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(new).parameters.items():
        if (
            parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            or parameter.default is not parameter.empty
        ):
            continue
        source = name if hasattr(old, name) else SAME.get(name, name)
        if name == "old":
            arguments[name] = old
        elif hasattr(old, source):
            arguments[name] = getattr(old, source)
        else:
            raise TypeError(
                f"new: needs {name!r}, which {old} does not have; give it, as in"
                " `lambda old: Layer(old.in_features, ...)`"
            )
    made = new(**arguments)
    if not isinstance(made, nn.Module):
        raise TypeError(f"new: expected a callable that makes an nn.Module, it made {type(made).__name__}")
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), default)
    made = made.to(like.device, like.dtype).train(old.training)
    for name in HOOKS:
        old.__dict__[name].update(made.__dict__[name])
        made.__dict__[name] = old.__dict__[name]  # the same dictionary, so that a handle's `remove` still works
    if old.__dict__["_is_full_backward_hook"] is not None:
        made.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]
    return made
