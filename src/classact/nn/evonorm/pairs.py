"""Put EvoNorm layers into a network in place of its pairs of normalisation and activation."""

from collections import defaultdict
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from classact.nn.evonorm.layers import EvoNorm2d
from classact.nn.swap import replace

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
ACTS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.gelu, F.silu, F.mish, F.hardswish)
METHODS = ("relu", "relu_")


class NormActReplacement(NamedTuple):
    """A changed copy of a model, and what was done.

    Attributes
    ----------
    model : Module
        Of the same class if its activations are modules called once, else a `torch.fx.GraphModule`.
    pairs : list of (str, str)
        Norms and activations, by name, replaced by one EvoNorm layer.
    affine : list of str
        Norms without activation, replaced by ``gamma x + beta``.
    unpaired : list of str
        Norms left alone, because it is not known what follows or more than an activation does.
    """

    model: nn.Module
    pairs: list[tuple[str, str]]
    affine: list[str]
    unpaired: list[str]


def replace_norm_act(
    model: nn.Module, version: str = "S0", *, groups: int = 32, affine: bool = True, sync: bool = False
) -> NormActReplacement:
    """Replace BatchNorm, GroupNorm or InstanceNorm with the activation after it by EvoNorm, in a copy of a model.

    Pairs are found by tracing the model; an activation after an addition stays. In a model that cannot be traced, only
    pairs that stand side by side in an ``nn.Sequential`` are found. Norms that contain their activation, as timm's
    ``BatchNormAct2d``, are pairs by themselves. Weights of the new layers are new. In a traced copy, functions that ask
    for the training mode, as ``F.dropout(x, training=self.training)``, keep the mode in which the model was given.

    Parameters
    ----------
    model : Module
        Stays as it is.
    version, groups, sync
        As in [`EvoNorm2d`][classact.nn.EvoNorm2d].
    affine : bool
        Replace norms that no activation follows, as at the end of a residual branch, by ``gamma x + beta``, as the
        authors do. If False they stay.

    Raises
    ------
    ValueError
        If there is nothing to replace.

    Examples
    --------
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> report = replace_norm_act(network, "B0")
    >>> report.pairs
    [('1', '2')]
    >>> print(report.model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): EvoNorm2d(8, 'B0')
      (2): Identity()
      (3): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
    )
    """
    copy = deepcopy(model)
    try:
        graph = _Tracer().trace(copy)
    except Exception:  # noqa: BLE001  (whatever in a forward fails on proxies)
        pairs, bare, unpaired, changed = _by_order(copy)
    else:
        pairs, bare, unpaired, changed = _by_tracing(copy, graph)
    with_act = {id(changed.get_submodule(norm)) for norm, _ in pairs}
    wanted = [norm for norm, _ in pairs] + (bare if affine else [])
    if not wanted:
        raise ValueError("model: expected at least one norm followed by an activation, or a norm to make affine")
    identities = {act for _, act in pairs if act in dict(changed.named_modules()) and act not in wanted}

    def make(old: Any) -> nn.Module:
        channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
        return EvoNorm2d(channels, version, groups, apply_act=id(old) in with_act, sync=sync)

    types = tuple({type(changed.get_submodule(name)) for name in wanted})
    replace(changed, types, make, where=wanted.__contains__)
    if not isinstance(changed, fx.GraphModule):
        for name in identities:
            parent, _, attribute = name.rpartition(".")
            setattr(changed.get_submodule(parent), attribute, nn.Identity())
    return NormActReplacement(changed, pairs, bare if affine else [], unpaired + ([] if affine else bare))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*NORMS, *ACTS)) or super().is_leaf_module(m, module_qualified_name)


Found = tuple[list[tuple[str, str]], list[str], list[str], nn.Module]


def _by_order(model: nn.Module) -> Found:
    """Pairs that follow each other in a Sequential."""
    pairs, paired = [], set()
    for prefix, module in model.named_modules():
        children = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        names = [f"{prefix}.{name}" if prefix else name for name, _ in children]
        for k in range(len(children) - 1):
            if isinstance(children[k][1], NORMS) and isinstance(children[k + 1][1], ACTS):
                pairs.append((names[k], names[k + 1]))
                paired.add(names[k])
    norms = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}
    fused = [name for name, module in norms.items() if _has_act(module)]
    return pairs + [(n, n) for n in fused], [], [n for n in norms if n not in paired and n not in fused], model


def _has_act(norm: nn.Module) -> bool:
    return isinstance(getattr(norm, "act", None), nn.Module) and not isinstance(norm.act, nn.Identity)


def _by_tracing(model: nn.Module, graph: fx.Graph) -> Found:
    calls = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    modules = dict(model.named_modules())
    pairs: list[tuple[str, str]] = []
    bare: list[str] = []
    unpaired: list[str] = []
    acts: list[fx.Node] = []
    for name, nodes in calls.items():
        if not isinstance(modules[name], NORMS):
            continue
        if _has_act(modules[name]):
            pairs.append((name, name))
            continue
        readers = [_readers(node, modules) for node in nodes]
        found = [reader for of_call in readers for reader in of_call if _is_activation(reader, modules)]
        if not found:
            bare.append(name)
        elif all(len(of_call) == 1 for of_call in readers) and len(found) == len(nodes):
            pairs.append((name, str(found[0].target) if found[0].op == "call_module" else found[0].name))
            acts += found
        else:
            unpaired.append(name)
    if all(act.op == "call_module" and len(calls[str(act.target)]) == 1 for act in acts):
        return pairs, bare, unpaired, model
    for act in acts:
        act.replace_all_uses_with(act.args[0])  # type: ignore[arg-type]
        graph.erase_node(act)
    return pairs, bare, unpaired, fx.GraphModule(model, graph, type(model).__name__).train(model.training)


def _readers(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Who uses the output of a node, seen through Identity."""
    found = []
    for user in node.users:
        passes = user.op == "call_module" and isinstance(modules[str(user.target)], nn.Identity)
        found += _readers(user, modules) if passes else [user]
    return found


def _is_activation(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], ACTS)
    return node.target in (FUNCTIONS if node.op == "call_function" else METHODS if node.op == "call_method" else ())
