"""Experiments of Kolmogorov-Arnold attention: small vision transformers on garments and on constructed images.

All networks are transformers of width 32 with 2 blocks and 2 heads on images of 28 x 28 pixels in patches of 7 x 7, so
17 tokens; the rank is 6, which is to 17 more than the paper's 12 is to 197. Arms are named as in the paper: g3b has a
grid of 3 and operators of its own in every block, g3u shares them. The arms of a seed begin with equal weights, see
equal batches, and are trained by AdamW with weight decay 0.05, gradients clipped to 1 and one cycle of the learning
rate. Its peak was chosen in pilots (seeds 0 and 1) among 0.001, 0.003 and 0.01: 0.003 was the best for softmax and for
g3b, 0.001 for the projection. Coefficients start from N(0, 1), as in the paper.
The constructed tasks were fixed before their first run. Their number of images was lowered from 3000 to 2500, and
their seeds were raised from 5 to 7, to fit the time, after pilots (one of them with 1500 images) had been seen.

Two controls say what a gain is worth. In ``linear`` every function is a line through 0, ``c_pq t``, and nothing else is
changed. In ``fixed`` the operator does not look at the scores at all: a learned mixture of tokens by their places, of
the same rank, the same for every image.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from classact.evidence.experiment import Cells, Experiment, Values
from classact.nn.karat.analyses import attention_spectrum, draw_spectrum, loss_landscape, weight_distributions
from classact.nn.karat.attention import karat_vit
from classact.nn.karat.operator import LearnableRowOperator
from classact.reproductions.nn.small_images import Garments, accuracy, garments, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANK, EPOCHS, BATCH = 6, 6, 64
RATE, RATES = 3e-3, {"l1": 1e-3}
BASES = ("bspline", "mexican_hat", "morlet", "dog", "meyer", "shannon", "rational")
G3B: dict[str, Any] = {"rank": RANK, "grid": 3}
ARMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "g1b": {"rank": RANK, "grid": 1},
    "g3b": G3B,
    "g3u": {**G3B, "mode": "universal"},
    "linear": G3B,
    "fixed": G3B,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "g3b": G3B,
    "l1": {**G3B, "l1_projection": True},
    "phi_W": {**G3B, "order": "phi_W"},
    "phi_phi": {**G3B, "order": "phi_phi"},
    "rank3": {**G3B, "rank": 3},
    "rank12": {**G3B, "rank": 12},
    **{basis: {**G3B, "basis": basis} for basis in BASES},
}
SIZES = {"small": {"width": 16, "depth": 1, "heads": 1}, "large": {"width": 64, "depth": 4, "heads": 4}}
STUDIED = ("softmax", "g3b", "g3b_scaled")
SNAPSHOTS, POINTS, SHOWN = 12, 11, 5


class LinearSum(nn.Module):
    """``Phi(a)_p = sum_q c_pq a_q``."""

    def __init__(self, heads: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.randn(heads, n_in, n_out))

    def forward(self, a: Tensor) -> Tensor:
        """Rows (B, h, N, n_in) to (B, h, N, n_out)."""
        return a @ self.c


class PlaceSum(nn.Module):
    """Phi that depends on the place k of the row alone, whatever the scores; as large at the start as Fourier's."""

    def __init__(self, heads: int, n_tokens: int, n_out: int, std: float) -> None:
        super().__init__()
        self.c = nn.Parameter(std * torch.randn(heads, n_tokens, n_out))

    def forward(self, a: Tensor) -> Tensor:
        """Rows (B, h, N, N) to (B, h, N, n_out)."""
        return self.c.expand(len(a), -1, -1, -1)


def vit(seed: int, arm: str, settings: dict[str, Any], width: int = 32, depth: int = 2, heads: int = 2) -> nn.Module:
    """Network of an arm; the weights outside of the operators are the same in all arms of a seed."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads}
    model: nn.Module = VisionTransformer(img_size=28, patch_size=7, in_chans=1, num_classes=10, **shape)
    if arm == "softmax":
        return model
    karat_vit(model, **settings)
    for operator in [part for part in model.modules() if isinstance(part, LearnableRowOperator)]:
        h, n, r = operator.heads, operator.n_tokens, operator.rank
        if arm == "linear":
            operator.phi = LinearSum(h, n, r)  # type: ignore[assignment]
        if arm == "fixed":
            operator.phi = PlaceSum(h, n, r, (n * settings["grid"]) ** 0.5)  # type: ignore[assignment]
    return model


def learn(model: nn.Module, data: Garments, seed: int, scale: str, rate: float = RATE) -> nn.Module:
    """Train a network as every arm is."""
    options: dict[str, Any] = {"rate": rate, "weight_decay": 0.05, "batch": BATCH, "clip": 1.0}
    return train(model, data.train, data.train_labels, seed=seed, epochs=_epochs(scale), **options)


def _tested(model: nn.Module, data: Garments) -> float:
    return accuracy(model, data.test, data.test_labels)


def _epochs(scale: str) -> int:
    return 1 if scale == "smoke" else EPOCHS


def _sizes(scale: str, n_train: int) -> tuple[int, int]:
    return (128, 200) if scale == "smoke" else (n_train, 2000)


def run_garments(seed: int, scale: str) -> Values:
    """Fashion-MNIST: 2,500 images for training, 2,000 to test."""
    data = garments(seed, *_sizes(scale, 2500))
    return {
        arm: {"accuracy": _tested(learn(vit(seed, arm, settings), data, seed, scale), data)}
        for arm, settings in ARMS.items()
    }


def constructed(seed: int, task: str, n: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) of 16 patches with one of four textures each, and their classes from 0 to 3.

    *marked*: one patch, anywhere, has a bright frame; the class is its texture. This asks for a look at a place that
    the content decides. *rows*: in one of the four rows all textures are the same, in no other; the class is that row.
    This asks to compare given places. Textures are drawn once for all seeds; noise with deviation 0.5 is added.
    """
    textures = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 7, 7))).float()
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    grid = rng.integers(4, size=(n, 4, 4))
    every = np.arange(n)
    row, column = rng.integers(4, size=(2, n))
    if task == "marked":
        grid[every, row, column] = labels
    else:
        uniform = (grid == grid[:, :, :1]).all(2)
        grid[uniform, 3] = (grid[uniform, 0] + 1) % 4
        grid[every, labels] = rng.integers(4, size=(n, 1))
    patches = textures[torch.from_numpy(grid)]
    if task == "marked":
        marked = patches[every, row, column]
        marked[:, [0, -1]] = marked[:, :, [0, -1]] = 3.0
        patches[every, row, column] = marked
    images = patches.transpose(2, 3).reshape(n, 1, 28, 28)
    return images + 0.5 * torch.from_numpy(rng.normal(size=images.shape)).float(), torch.from_numpy(labels)


def run_constructed(seed: int, scale: str) -> Values:
    """Both constructed tasks: 2,500 images for training, 2,000 to test."""
    values: Values = {arm: {} for arm in ARMS}
    for task in ("marked", "rows"):
        n_train, n_test = _sizes(scale, 2500)
        data = Garments(*constructed(seed, task, n_train), *constructed(seed + 10_000, task, n_test))
        for arm, settings in ARMS.items():
            values[arm][task] = _tested(learn(vit(seed, arm, settings), data, seed, scale), data)
    return values


def run_variants(seed: int, scale: str) -> Values:
    """Projection, orders, ranks and bases on 1,500 garments."""
    data = garments(seed, *_sizes(scale, 1500))
    return {
        arm: {"accuracy": _tested(learn(vit(seed, arm, settings), data, seed, scale, RATES.get(arm, RATE)), data)}
        for arm, settings in VARIANTS.items()
    }


def run_sizes(seed: int, scale: str) -> Values:
    """A transformer of one block and width 16, and one of four blocks and width 64, on 1,500 garments."""
    data = garments(seed, *_sizes(scale, 1500))
    values = {}
    for size, shape in SIZES.items():
        for arm in ("softmax", "g3b"):
            model = learn(vit(seed, arm, G3B, **shape), data, seed, scale)
            values[f"{arm}_{size}"] = {"accuracy": _tested(model, data)}
    return values


def run_analyses(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Loss surface, spectra and weights of trained networks; ``g3b_scaled`` starts with smaller coefficients."""
    data = garments(seed, *_sizes(scale, 1500))
    values: Values = {}
    arrays: dict[str, np.ndarray] = {}
    for arm in STUDIED:
        model = vit(seed, arm, {**G3B, "init": "scaled"} if arm == "g3b_scaled" else G3B)
        snapshots: list[dict[str, Tensor]] = []
        steps = _epochs(scale) * -(-len(data.train) // BATCH)
        every = max(1, steps // SNAPSHOTS)
        calls = 0

        def keep(module: nn.Module, _: Any, every: int = every, kept: list[dict[str, Tensor]] = snapshots) -> None:
            nonlocal calls
            if calls % every == 0:
                kept.append({name: t.clone() for name, t in module.state_dict().items()})
            calls += 1

        handle = model.register_forward_pre_hook(keep)
        learn(model, data, seed, scale)
        handle.remove()
        snapshots.append({name: t.clone() for name, t in model.state_dict().items()})
        loader = [(data.test[:256], data.test_labels[:256])]
        surface = loss_landscape(model, snapshots, loader, steps=3 if scale == "smoke" else POINTS)
        spectrum = attention_spectrum(model, data.test[:SHOWN])
        weights = weight_distributions(
            {"start": snapshots[0], "end": snapshots[-1]}, lambda name: "operator" not in name and "weight" in name
        )
        significant = spectrum.significant()
        values[arm] = {
            "accuracy": _tested(model, data),
            "roughness": surface.roughness,
            "significant_before": float(significant["before"].mean()),
            "significant_after": float(significant["after"].mean()),
            "mean_after": float(np.log(spectrum.after.mean())),
            "near_zero": float(weights.statistics[-1, 2]),
            "drift": weights.drift(),
        }
        for name in ("x", "y", "losses", "path"):
            arrays[f"{arm}_{name}"] = getattr(surface, name).astype(np.float32)
        arrays[f"{arm}_before"] = spectrum.before[:, :, -1].reshape(-1, 17).astype(np.float32)
        arrays[f"{arm}_after"] = spectrum.after[:, :, -1].reshape(-1, 17).astype(np.float32)
    return values, arrays


def kept_for_backward(run: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps after a forward pass, without those of the parameters, which are there anyway."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()  # held until the bytes are summed, so that no address is used twice
    own = {p.untyped_storage().data_ptr() for p in parameters}
    del result
    return sum(size for address, size in sizes.items() if address not in own)


def _direct_row(grid: int, n_out: int, n: int) -> int:
    """Bytes kept by one row of one head if each of the functions is evaluated on its own."""
    row = torch.randn(n, requires_grad=True)
    a, b = (torch.randn(n_out, n, grid, requires_grad=True) for _ in "ab")

    def direct() -> Tensor:
        angles = row.expand(n_out, n).unsqueeze(-1) * torch.arange(1, grid + 1)
        return (a * angles.cos() + b * angles.sin()).sum((1, 2))

    return kept_for_backward(direct, (a, b))


def run_cost(seed: int, scale: str) -> Values:
    """Training memory of a ViT-Tiny at 224 x 224 for one image, and parameters. Counted, not timed; no seed matters.

    ``direct`` arms evaluate each of the r N or N^2 functions of a row on its own, as equation 1 is written; they are
    counted on one row and multiplied by rows, heads and blocks. The other arms are measured in full.
    """
    from timm import create_model

    torch.manual_seed(seed)
    depth = 2 if scale == "smoke" else 12
    arms: dict[str, dict[str, Any]] = {
        "softmax": {},
        "g3b": {"grid": 3},
        "g3b_rows": {"grid": 3, "rows": 32},
        "full": {"grid": 10, "order": "full"},
    }
    values: Values = {}
    image, rest = torch.randn(1, 3, 224, 224), 0
    for arm, settings in arms.items():
        model = create_model("vit_tiny_patch16_224", num_classes=10, depth=depth)
        if settings:
            karat_vit(model, **settings)
        kept = kept_for_backward(partial(model, image), model.parameters())
        parameters = float(sum(p.numel() for p in model.parameters()))
        rest = kept if arm == "softmax" else rest
        # weights, gradients and two moments of Adam, 4 bytes each
        values[arm] = {"gigabytes": (kept + 16 * parameters) / 1e9, "kept": kept / 1e9, "parameters": parameters / 1e6}
    for arm, grid, n_out in (("g3b_direct", 3, 12), ("full_direct", 10, 197)):
        kept = rest + 197 * 3 * depth * _direct_row(grid, n_out, 197)
        parameters = values[arm.removesuffix("_direct")]["parameters"]
        values[arm] = {"gigabytes": kept / 1e9 + 16e-3 * parameters, "kept": kept / 1e9, "parameters": parameters}
    return values


def _dots(axes: "Axes", found: dict[str, np.ndarray], label: str) -> None:
    """One row per arm: every seed, and mean with its 95 % interval."""
    from classact.evidence.statistics import t_interval

    for y, (arm, values) in enumerate(found.items()):
        color = {"softmax": "C1", "linear": "0.5", "fixed": "0.5"}.get(arm.split("_")[0], "C0")
        axes.scatter(values, np.full(len(values), y) - 0.18, s=10, color=color, alpha=0.5, linewidth=0)
        mean = t_interval(values)
        if np.isfinite(mean.low):
            error = [[mean.effect - mean.low], [mean.high - mean.effect]]
            axes.errorbar(mean.effect, y, xerr=error, color=color, marker="o", markersize=4, capsize=3)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _panels(cells: Cells, metrics: dict[str, str], height: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure((4.2 * len(metrics), height), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        _dots(axes, {arm: cells.metric(arm, metric) for arm in cells.arms}, label)
    return figure


def draw_accuracy(cells: Cells) -> "Figure":
    """Accuracy of every arm."""
    return _panels(cells, {"accuracy": "accuracy on garments"}, 0.9 + 0.3 * len(cells.arms))


def draw_constructed(cells: Cells) -> "Figure":
    """Accuracy on both tasks."""
    return _panels(cells, {"marked": "accuracy, marked patch", "rows": "accuracy, uniform row"}, 2.8)


def draw_cost(cells: Cells) -> "Figure":
    """Memory and parameters of each arm; every seed gives the same."""
    from matplotlib.figure import Figure

    figure = Figure((8.5, 2.8), layout="constrained")
    labels = {"gigabytes": "GB to train ViT-Tiny on one image", "parameters": "parameters in millions"}
    for axes, (metric, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        bars = axes.barh(cells.arms, [cells.metric(arm, metric)[0] for arm in cells.arms], color="C0")
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        if metric == "gigabytes":
            axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_analyses(cells: Cells) -> "Figure":
    """Loss surfaces of the first seed on one scale, spectra before and after, and the roughness of every seed."""
    from matplotlib.figure import Figure

    arrays = next(iter(cells.arrays.values()))
    figure = Figure((13, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 3)
    top = np.log(max(arrays[f"{arm}_losses"].max() for arm in STUDIED))
    bottom = np.log(min(arrays[f"{arm}_losses"].min() for arm in STUDIED))
    for axes, arm in zip(upper, STUDIED, strict=True):
        x, y, losses, path = (arrays[f"{arm}_{name}"] for name in ("x", "y", "losses", "path"))
        filled = axes.contourf(x, y, np.log(losses), levels=np.linspace(bottom, top, 30), cmap="viridis")
        axes.plot(*path.T, color="white", marker="o", markersize=2.5, linewidth=1)
        axes.plot(0, 0, "*", color="red", markersize=9)
        axes.set(xlabel="component 1 of the path", title=f"loss surface and path: {arm}")
    upper[0].set_ylabel("component 2")
    figure.colorbar(filled, ax=upper, label="ln loss")
    for axes, stage in zip(lower, ("before", "after"), strict=False):
        for color, arm in zip(("C1", "C0", "C2"), STUDIED, strict=True):
            draw_spectrum(axes, arrays[f"{arm}_{stage}"], color=color, label=arm)
        axes.set_title(f"singular values {stage} the activation")
    lower[0].legend(frameon=False, fontsize=8)
    _dots(lower[2], {arm: cells.metric(arm, "roughness") for arm in cells.arms}, "roughness of the loss surface")
    return figure


def _seeds(n: int) -> dict[str, Any]:
    return {"smoke": (0, 1), "cpu": range(100, 100 + n)}


EXPERIMENTS = {
    "constructed": Experiment(run_constructed, _seeds(7), draw_constructed),
    "garments": Experiment(run_garments, _seeds(10), draw_accuracy),
    "variants": Experiment(run_variants, _seeds(7), draw_accuracy),
    "sizes": Experiment(run_sizes, _seeds(10), draw_accuracy),
    "analyses": Experiment(run_analyses, _seeds(10), draw_analyses),
    "cost": Experiment(run_cost, _seeds(5), draw_cost),
}
