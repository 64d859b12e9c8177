"""The tasks ``activations``, ``norms``, ``linear``, ``attention``: what another part does to a network on given data.

To add a method, write its module and add one line to the methods of its slot: a function that puts the part into a
network, which it may change, and returns the network.
"""

import difflib
import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from classact.data.labelled import Labelled, load_labelled
from classact.evidence.executors import Job, run_jobs
from classact.evidence.part_report import write_part_report
from classact.evidence.parts import (
    TUNING_SEED,
    Items,
    PartComparison,
    PartStudy,
    best_rate,
    extended,
    flops,
    judge,
    learning_rates,
    match_width,
    parameters,
    run_cell,
    seconds_of_steps,
)
from classact.evidence.store import Store, StudyError
from classact.nn.afkan import AFKANLayer, ReLUKANLayer
from classact.nn.crrelu import CRReLU
from classact.nn.evonorm.pairs import replace_norm_act
from classact.nn.kan_bases import KANLinear
from classact.nn.karat.attention import karat_vit
from classact.nn.skan import SKANLinear, drop_spaces, plan_stages, prune_spaces
from classact.nn.swap import replace

MATCHES = ("width", "params", "flops", "time")
REFERENCE_WIDTHS = (0.5, 2.0)
EXTENSIONS = 2  # of the grid of learning rates, where the best of some arm lies at its edge
VIT_DIM, VIT_DEPTH, VIT_HEADS, VIT_TOKENS = 48, 4, 4, 7  # tokens a side

Swap = Callable[[nn.Module], nn.Module]


# Backbones: shape of an item, number of classes, width -> network with its original parts.


def mlp(shape: tuple[int, ...], classes: int, width: int = 128) -> nn.Module:
    """Two hidden layers of `width` units with ReLU."""
    inputs = int(np.prod(shape))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cnn(shape: tuple[int, ...], classes: int, width: int = 16) -> nn.Module:
    """Four 3 x 3 convolutions with batch normalisation and ReLU, `width` channels first and twice as many then."""
    channels, layers = shape[0], []
    for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def vit(shape: tuple[int, ...], classes: int, width: int = 192) -> nn.Module:
    """A vision transformer of four blocks on about 7 x 7 patches, `width` hidden units in its MLPs."""
    from timm.models.vision_transformer import VisionTransformer

    _, rows, columns = shape
    patch = max(1, rows // VIT_TOKENS), max(1, columns // VIT_TOKENS)
    if rows % patch[0] or columns % patch[1]:
        raise StudyError(f"vit: images of {rows} x {columns} do not divide into patches of {patch[0]} x {patch[1]}")
    return VisionTransformer(
        img_size=(rows, columns),
        patch_size=patch,
        in_chans=shape[0],
        num_classes=classes,
        embed_dim=VIT_DIM,
        depth=VIT_DEPTH,
        num_heads=VIT_HEADS,
        mlp_ratio=width / VIT_DIM,
    )


def timm_backbone(name: str) -> Callable[..., nn.Module]:
    """A network of timm, with random weights; it has no width."""

    def build(shape: tuple[int, ...], classes: int) -> nn.Module:
        import timm

        options: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0]}
        try:
            return timm.create_model(name, img_size=tuple(shape[1:]), **options)
        except TypeError:  # a convolutional network takes any size
            return timm.create_model(name, **options)

    return build


BACKBONES: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn, "vit": vit}
WIDTHS = {"mlp": 128, "cnn": 16, "vit": 192}


# Which parts a network has.


def activation_type(model: nn.Module) -> type[nn.Module]:
    """The activation that a network has most often."""
    found = Counter(
        type(module)
        for module in model.modules()
        if type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))
        and not isinstance(module, (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmax2d))
    )
    if not found:
        raise StudyError("the backbone has no activation that is a module (nn.ReLU, nn.GELU, ...)")
    return found.most_common(1)[0][0]


def norm_type(model: nn.Module) -> type[nn.Module]:
    """The normalisation that a network has most often."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # noqa: SLF001
    found = Counter(type(module) for module in model.modules() if isinstance(module, kinds))
    if not found:
        raise StudyError("the backbone has no normalisation; --backbone cnn and vit have")
    return found.most_common(1)[0][0]


def attention_type(model: nn.Module) -> type[nn.Module]:
    """The attention of a vision transformer of timm."""
    from timm.layers.attention import Attention

    if not any(type(module) is Attention for module in model.modules()):
        raise StudyError("the backbone has no attention; --backbone vit and timm:vit_... have")
    return Attention


# Swaps, one function per kind of slot.


def put_activation(factory: Callable[..., nn.Module], model: nn.Module) -> nn.Module:
    """Exchange the activations."""
    replace(model, activation_type(model), factory)
    return model


def put_norm(factory: Callable[..., nn.Module], model: nn.Module) -> nn.Module:
    """Exchange the normalisations and keep the activations."""
    replace(model, norm_type(model), factory)
    return model


def put_evonorm(version: str, model: nn.Module) -> nn.Module:
    """Exchange pairs of normalisation and activation."""
    try:
        return replace_norm_act(model, version).model
    except ValueError as error:
        raise StudyError(f"evonorm-{version.lower()}: {error}") from error


def put_linear(factory: Callable[..., nn.Module], model: nn.Module, alone: bool = False) -> nn.Module:
    """Exchange the linear layers: all of a plain network, those of the MLPs in a transformer.

    With `alone`, the activations beside them go as well, since the layer itself is not linear.
    """
    blocks = any(".mlp." in f".{name}." for name, _ in model.named_modules())
    where = (lambda name: ".mlp." in f".{name}.") if blocks else None
    kind = activation_type(model) if alone else None
    replace(model, nn.Linear, factory, where=where)
    if kind is not None:
        replace(model, kind, nn.Identity, where=where, strict=False)
    return model


def put_attention(factory: Callable[..., nn.Module], model: nn.Module) -> nn.Module:
    """Exchange the attention of every block."""
    replace(model, attention_type(model), factory)
    return model


def put_karat(mode: Literal["blockwise", "universal"], grid: int, model: nn.Module) -> nn.Module:
    """Exchange softmax for learnable functions of the scores, of a rank of at most 12."""
    attention_type(model)
    try:
        return karat_vit(model, mode, grid=grid)
    except ValueError as error:
        raise StudyError(f"karat: {error}") from error


def _nothing(model: nn.Module) -> nn.Module:
    return model


def _kan(basis: str) -> Swap:
    def make(in_features: int, out_features: int) -> nn.Module:
        return KANLinear(in_features, out_features, basis, norm="layer")

    return partial(put_linear, make, alone=True)


def _skan(in_features: int, out_features: int) -> nn.Module:
    return SKANLinear(in_features, out_features, norm="layer")


def staged(arm: str, network: nn.Module, steps: int) -> Callable[[int, Tensor], bool] | None:
    """Drop the spaces of S-KAN while it trains, and then what is unused; other parts stay what they are."""
    if arm != "skan":
        return None
    plan = plan_stages(network, steps)

    def change(step: int, x: Tensor) -> bool:
        for _ in range(plan.drops.count(step)):
            drop_spaces(network, x)
        if step == plan.prune:
            prune_spaces(network)
        return step == plan.prune

    return change


def as_trained(network: nn.Module) -> nn.Module:
    """The network in the size that it will have in the end: S-KAN is pruned to some one space per node."""
    if any(isinstance(module, SKANLinear) for module in network.modules()):
        replace(network, SKANLinear, lambda old: old.prune("gate"))
    return network


def _norm(kind: str) -> Callable[[nn.Module], nn.Module]:
    def make(old: Any) -> nn.Module:
        names = ("num_features", "num_channels", "normalized_shape")
        channels = next(getattr(old, name) for name in names if hasattr(old, name))
        channels = channels if isinstance(channels, int) else channels[-1]
        tokens = isinstance(old, (nn.LayerNorm, nn.RMSNorm))
        if kind == "none":
            return nn.Identity()
        if tokens:
            if kind not in ("layer", "rms"):
                raise StudyError(f"{kind}: normalises feature maps (N, C, H, W); the backbone has tokens (N, L, D)")
            return nn.LayerNorm(channels, eps=1e-6) if kind == "layer" else nn.RMSNorm(channels, eps=1e-6)
        if kind == "rms":
            raise StudyError("rms: normalises tokens (N, L, D); the backbone has feature maps")
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if (channels % g == 0 and channels // g >= 4) or g == 1)
        made = {
            "batch": lambda: nn.BatchNorm2d(channels),
            "group": lambda: nn.GroupNorm(groups, channels),
            "layer": lambda: nn.GroupNorm(1, channels),
            "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
        }
        return made[kind]()

    return make


@dataclass(frozen=True)
class Slot:
    """One kind of part.

    Attributes
    ----------
    put : callable
        ``put(factory, model)`` puts a user's own part in.
    methods : dict
        Name -> `Swap`.
    original : callable
        The type of the part in a network, and its name among the methods.
    backbone : str
        Where the user names none.
    default : tuple of str
        Methods compared where the user names none.
    """

    put: Callable[[Callable[..., nn.Module], nn.Module], nn.Module]
    methods: Mapping[str, Swap]
    original: Callable[[nn.Module], str]
    backbone: str
    default: tuple[str, ...]


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "crrelu": CRReLU,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}
EVONORMS = ("B0", "B1", "B2", "S0", "S1", "S2")
KANS = {
    "kan": "bspline",
    "rbf-kan": "rbf",
    "chebyshev-kan": "chebyshev",
    "wavelet-kan": "wavelet",
    "fourier-kan": "fourier",
}
NORMS = ("batch", "group", "layer", "instance", "rms", "none")


def _activation_name(model: nn.Module) -> str:
    kind = activation_type(model)
    return next((name for name, factory in ACTIVATIONS.items() if factory is kind), kind.__name__.lower())


def _norm_name(model: nn.Module) -> str:
    names = {nn.BatchNorm2d: "batch", nn.GroupNorm: "group", nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
    kind = norm_type(model)
    return names.get(kind, kind.__name__.lower())


def _linear_name(model: nn.Module) -> str:
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise StudyError("the backbone has no nn.Linear")
    return "linear"


def _attention_name(model: nn.Module) -> str:
    attention_type(model)
    return "softmax"


SLOTS: dict[str, Slot] = {
    "activations": Slot(
        put_activation,
        {name: partial(put_activation, factory) for name, factory in ACTIVATIONS.items()},
        _activation_name,
        "mlp",
        ("relu", "gelu", "silu"),
    ),
    "norms": Slot(
        put_norm,
        {name: partial(put_norm, _norm(name)) for name in NORMS}
        | {f"evonorm-{version.lower()}": partial(put_evonorm, version) for version in EVONORMS},
        _norm_name,
        "cnn",
        ("batch", "group", "evonorm-b0", "evonorm-s0"),
    ),
    "linear": Slot(
        put_linear,
        {
            "linear": _nothing,
            **{name: _kan(basis) for name, basis in KANS.items()},
            "relu-kan": partial(put_linear, ReLUKANLayer, alone=True),
            "afkan": partial(put_linear, AFKANLayer, alone=True),
            "skan": partial(put_linear, _skan, alone=True),
        },
        _linear_name,
        "mlp",
        ("linear", "kan"),
    ),
    "attention": Slot(
        put_attention,
        {
            "softmax": _nothing,
            "karat": partial(put_karat, "blockwise", 3),
            "karat-g1": partial(put_karat, "blockwise", 1),
            "karat-universal": partial(put_karat, "universal", 3),
        },
        _attention_name,
        "vit",
        ("softmax", "karat"),
    ),
}


def find_swap(slot: str, name: str) -> Swap:
    """Find the function that puts a part in; a user's own is ``package.module:factory``.

    Raises
    ------
    StudyError
        If there is no such method or factory.
    """
    known = SLOTS[slot].methods
    if name in known:
        return known[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise StudyError(
            f"{name}: no such method for {slot}{hint or '.'} There are {', '.join(known)}, and package.module:factory"
        )
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"{name}: {error}") from error
    return partial(SLOTS[slot].put, factory)


def find_backbone(name: str) -> tuple[Callable[..., nn.Module], int | None]:
    """The function that builds a network, and its width if it has one."""
    if name in BACKBONES:
        return BACKBONES[name], WIDTHS[name]
    kind, _, rest = name.partition(":")
    if kind == "timm" and rest:
        return timm_backbone(rest), None
    if rest:
        try:
            return getattr(importlib.import_module(kind), rest), None
        except (ImportError, AttributeError) as error:
            raise StudyError(f"{name}: {error}") from error
    raise StudyError(f"{name}: expected {', '.join(BACKBONES)}, timm:NAME or package.module:factory")


@dataclass(frozen=True)
class Builder:
    """Builds the network of an arm; every part outside the slot has the same weights for the same seed and width."""

    slot: str
    backbone: str
    original: str
    shape: tuple[int, ...]
    classes: int

    def __call__(self, arm: str, width: int | None, seed: int) -> nn.Module:
        """Return the network, in training mode."""
        torch.manual_seed(seed)
        build, _ = find_backbone(self.backbone)
        network = build(self.shape, self.classes) if width is None else build(self.shape, self.classes, width)
        if arm != self.original:
            network = find_swap(self.slot, arm)(network)
        return network.train()


def compare_parts(
    slot: str,
    data: str | Path | Labelled = "digits",
    methods: Sequence[str] | None = None,
    *,
    backbone: str | None = None,
    width: int | None = None,
    match: Sequence[str] = ("width", "params"),
    seeds: int = 5,
    tune: int = 5,
    epochs: int = 10,
    batch_size: int = 128,
    weight_decay: float = 1e-2,
    label: str | None = None,
    size: int = 64,
    out: str | Path = "report",
    workers: int = 1,
    device: str = "cpu",
    command: str = "",
    quiet: bool = False,
) -> PartComparison:
    """Exchange one part of a network and see what it does to accuracy, size and time.

    Parameters
    ----------
    slot : {"activations", "norms", "linear", "attention"}
        The part.
    data : str, path or Labelled
        As for [`load_labelled`][classact.data.labelled.load_labelled], with `label` and `size`.
    methods : sequence of str
        Names of the slot, or ``package.module:factory``. The original part of the backbone is always an arm.
    backbone : str
        ``mlp``, ``cnn``, ``vit``, ``timm:NAME``, or ``package.module:factory``, called with the shape of an item and
        the number of classes.
    width : int, optional
        Of ``mlp`` (units), ``cnn`` (channels) or ``vit`` (hidden units of its MLPs), with the original part.
    match : sequence of {"width", "params", "flops", "time"}
        Compare at equal width; or with the width of every arm such that it equals the original network in parameters,
        in floating-point operations of matrix products and convolutions, or in the time of a training step, within 2 %.
    seeds : int
        Trainings of every arm.
    tune : int
        Learning rates in the grid. Where the best of some arm lies at the edge, the grid grows, for every arm.
    epochs, batch_size, weight_decay
        Of every training.
    out : path
        Folder of the report; a comparison that was stopped goes on there.
    workers : int
        Processes.
    device : str
        "cpu", "cuda".
    command : str
        Shown in the report.
    quiet : bool
        Show no progress.

    Raises
    ------
    StudyError, DataError
        If a name, the data or the backbone do not fit.
    """
    place = SLOTS[slot]
    if unknown := set(match) - set(MATCHES):
        raise StudyError(f"match: expected some of {', '.join(MATCHES)}, got {', '.join(sorted(unknown))}")
    least_of = {"seeds": (seeds, 2), "tune": (tune, 1), "epochs": (epochs, 1), "batch_size": (batch_size, 2)}
    for name, (value, least) in least_of.items():
        if value < least:
            raise StudyError(f"{name}: expected at least {least}, got {value}")
    items = data if isinstance(data, Labelled) else load_labelled(data, label, size)
    backbone = backbone or ("mlp" if len(items.shape) == 1 else place.backbone)
    if len(items.shape) == 1 and backbone in ("cnn", "vit"):
        raise StudyError(f"{backbone}: needs images, and {items.name} is a table; take --backbone mlp")
    _, own_width = find_backbone(backbone)
    if width is not None and own_width is None:
        raise StudyError(f"width: {backbone} has none")
    base = width or own_width
    if base is None and set(match) - {"width"}:
        if tuple(match) != ("width", "params"):
            raise StudyError(f"match: {backbone} has no width that could be changed; only --match width is possible")
        match = ("width",)
    builder = Builder(slot, backbone, "", items.shape, len(items.classes))
    original = place.original(builder("", base, 0))
    builder = Builder(slot, backbone, original, items.shape, len(items.classes))
    arms = list(dict.fromkeys([original, *(methods or place.default)]))
    x = {arm: builder(arm, base, 0) for arm in arms}  # every name is tried before anything is trained
    train, validation, test = split_items(items)
    study = PartStudy(builder, train, validation, test, epochs, batch_size, weight_decay, device, staged)
    probe = Items(train.x[:batch_size].to(device), train.y[:batch_size].to(device))
    for arm, network in x.items():
        with torch.no_grad():
            out_shape = tuple(network.to(device)(probe.x[:2]).shape)
        if out_shape != (2, len(items.classes)):
            raise StudyError(f"{arm}: expected logits (2, {len(items.classes)}), got {out_shape}")
    widths, off = _widths(builder, arms, base, match, probe)
    references = [] if base is None else [max(1, round(base * factor)) for factor in REFERENCE_WIDTHS]
    wanted = [(arm, widths[m][arm]) for m in match for arm in arms] + [(original, w) for w in references]
    variants = list(dict.fromkeys(wanted))

    definition = {
        "slot": slot,
        "data": {"name": items.name, "items": len(items.x), "sum": float(items.x.double().sum())},
        "backbone": backbone,
        "epochs": epochs,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "device": device,
    }
    rates = learning_rates(tune)
    with Store(Path(out) / "study", definition) as store:

        def run(jobs: list[Job], title: str) -> dict[str, Any]:
            return run_jobs(run_cell, study, jobs, store, workers, title, quiet)

        for _ in range(EXTENSIONS + 1):
            tries = {(v, rate): _job(*v, rate, TUNING_SEED, True) for v in variants for rate in rates}
            tried = run(list(tries.values()), f"{slot}: learning rates")
            tuning = {v: {rate: tried[tries[v, rate].key]["accuracy"] for rate in rates} for v in variants}
            wider = extended(rates, [best_rate(tuning[v]) for v in variants])
            if wider == rates:
                break
            rates = wider
        finals = {(v, seed): _job(*v, best_rate(tuning[v]), seed, False) for v in variants for seed in range(seeds)}
        values = run(list(finals.values()), slot)
        cells = {v: {seed: values[finals[v, seed].key] for seed in range(seeds)} for v in variants}
        curves = {v: _curves([store.arrays(finals[v, seed].key) for seed in range(seeds)]) for v in variants}
    seconds = seconds_of_steps({v: as_trained(builder(*v, 0)).to(device) for v in variants}, probe)
    rows = [row for m in match for row in judge(arms, original, m, widths[m], off[m], cells, curves, tuning, seconds)]
    reference = [
        row._replace(arm=f"{original}, width {w}")
        for w in references
        for row in judge([original], original, "width", {original: w}, {original: 0.0}, cells, curves, tuning, seconds)
    ]
    facts = {
        "Data": f"{items.name}: {len(train.x):,} items to train, {len(validation.x):,} to choose the learning rate, "
        f"{len(test.x):,} to test; {len(items.classes)} classes"
        + ("" if items.test_x is not None else "; the test part is a fifth, drawn once"),
        "Backbone": backbone + (f", width {base}" if base is not None else ""),
        "Training": f"{epochs} epochs of {study.steps() // epochs} steps, batches of {batch_size}, AdamW with weight "
        f"decay {weight_decay:g}, warm-up and cosine; scored at the last epoch",
        "Learning rates": f"{', '.join(f'{r:g}' for r in rates)} for every arm, chosen on the validation part",
        "Intervals": f"95 %, over {seeds} trainings that differ in initial weights and order of the batches; the test "
        "part is one and the same",
        "Timing": f"median of 7 rounds, batches of {len(probe.x)}, {torch.get_num_threads()} threads, on {device}",
    }
    found = PartComparison(slot, items.name, backbone, original, rows, reference, cells, curves, tuning, facts)
    write_part_report(found, Path(out), command)
    return found


def _job(arm: str, width: int | None, rate: float, seed: int, tuning: bool) -> Job:
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in arm)
    return Job(f"{safe}-{width}-{rate:g}-{'tune' if tuning else seed}", (arm, width, rate, seed, tuning))


def _curves(arrays: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack the curves of all seeds; a training that diverged keeps its last value."""
    longest = {name: max(len(of[name]) for of in arrays) for name in ("loss", "accuracy")}
    return {
        name: np.stack([np.pad(of[name], (0, n - len(of[name])), mode="edge") for of in arrays])
        for name, n in longest.items()
    }


def split_items(items: Labelled, limit: int | None = None) -> tuple[Items, Items, Items]:
    """Parts to train, to choose the learning rate and to test, standardised by the first.

    With a `limit`, so many items are taken for the first two.
    """
    from sklearn.model_selection import train_test_split

    index = np.arange(len(items.x))
    labels = items.y.numpy()
    if (smallest := int(np.bincount(labels).min())) < 5:
        raise StudyError(f"{items.name}: the smallest class has {smallest} items; expected at least 5")
    if items.test_x is None or items.test_y is None:
        index, held = train_test_split(index, test_size=0.2, random_state=0, stratify=labels)
        test_x, test_y = items.x[held], items.y[held]
    else:
        test_x, test_y = items.test_x, items.test_y
    if limit is not None and limit < len(index):
        index, _ = train_test_split(index, train_size=limit, random_state=0, stratify=labels[index])
    fit, chosen = train_test_split(index, test_size=0.15, random_state=0, stratify=labels[index])
    x = items.x[fit]
    axes = [0, *range(2, x.ndim)]
    mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
    std = torch.where(std > 0, std, 1)

    def scaled(of: Tensor) -> Tensor:
        return (of - mean) / std

    return (
        Items(scaled(x), items.y[fit]),
        Items(scaled(items.x[chosen]), items.y[chosen]),
        Items(scaled(test_x), test_y),
    )


def _widths(
    builder: Builder, arms: Sequence[str], base: int | None, match: Sequence[str], probe: Items
) -> tuple[dict[str, dict[str, int | None]], dict[str, dict[str, float]]]:
    """The width of every arm in every match, and by what share it misses."""

    def measure(kind: str, arm: str, width: int) -> float:
        network = as_trained(builder(arm, width, 0)).to(probe.x.device)
        if kind == "params":
            return parameters(network)
        if kind == "flops":
            return flops(network, probe.x[:1])
        return seconds_of_steps({0: network}, probe)[0][0]

    widths: dict[str, dict[str, int | None]] = {}
    off: dict[str, dict[str, float]] = {}
    for kind in match:
        widths[kind], off[kind] = {}, {}
        for arm in arms:
            if kind == "width" or base is None or arm == builder.original:
                widths[kind][arm], off[kind][arm] = base, 0.0
                continue
            wanted = measure(kind, builder.original, base)
            same = measure(kind, arm, base)
            chosen = base if abs(same / wanted - 1) <= 0.02 else match_width(partial(measure, kind, arm), wanted, base)
            widths[kind][arm] = chosen
            off[kind][arm] = measure(kind, arm, chosen) / wanted - 1
    return widths, off
