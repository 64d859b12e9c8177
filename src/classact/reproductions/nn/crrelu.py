"""Experiments of CRReLU: entropies with known truth, narrow deep networks, and a small vision transformer.

Settings fixed before the evidence. In the entropy experiment densities and activations are drawn at random, with 20
pairs in each seed. Narrow deep networks: 10 hidden layers of 8 units, AdamW, 15 epochs; of every activation the better
of two learning rates, 0.01 and 0.03, on a validation part; in pilots (seeds 0 to 3) with 0.003 and 0.01 nearly all took
the larger. Vision transformer: timm's, patches of 7 x 7 pixels, width 32, depth 2; 1,400 images, AdamW with weight
decay 0.05, 4 epochs in batches of 32, learning rate 0.004 or 0.01, chosen likewise; in pilots (seeds 0 and 1) batches
of 128 left every activation near 0.4, and of 0.002 and 0.005 nearly all took the larger. CELU is not an arm, because
with the default alpha of 1 it is ELU. `crrelu_fixed` keeps the initial coefficient: what it gains over ReLU is the
shape, what CRReLU gains over it is learning; PReLU too learns one number per layer. On the transformer, `eafo` starts
from Softplus and takes a step every 10 batches.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.evidence.experiment import Cells, Experiment, Values
from classact.nn.crrelu import (
    Activation,
    CRReLU,
    EAFOActivation,
    GaussianDensity,
    GridDensity,
    crrelu,
    eafo_correction,
    entropy_of,
    wafbc,
)
from classact.reproductions.nn.small_images import accuracy, garments, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "crrelu_fixed": partial(CRReLU, learnable=False),
    "crrelu": CRReLU,
}
DYNAMIC: dict[str, Callable[[], nn.Module]] = {
    "softplus": nn.Softplus,
    "eafo": partial(EAFOActivation, update_every=10, step=0.1),
}


Network = TypeVar("Network", bound=nn.Module)


class Split(NamedTuple):
    """Rows for training, for the choice of the learning rate, and for the test, each with classes."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def run_entropy(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Entropies after small steps along the correction and elsewhere, of bounded activations, and of CRReLU."""
    rng, step = np.random.default_rng(seed), 1e-3
    changes: dict[str, list[float]] = {"eafo": [], "random": [], "opposite": []}
    gaps = []
    for _ in range(4 if scale == "smoke" else 20):
        density, activation = _random_density(rng), _random_activation(rng)
        u = density.grid()
        x, eta = eafo_correction(activation, density)
        before, steepest = entropy_of(activation, density), np.trapezoid(eta**2, x)
        other = density.pdf(u) * np.sin(np.outer(rng.uniform(0.2, 1.5, 4), u) + rng.uniform(0, 2 * np.pi, (4, 1))).sum(
            0
        )
        other *= np.sqrt(steepest / np.trapezoid(other**2, x))
        for arm, direction in (("eafo", eta), ("random", other), ("opposite", -eta)):
            moved = Activation(torch.from_numpy(u + step * direction), torch.from_numpy(x))
            changes[arm].append((entropy_of(moved, density) - before) / (step * steepest))
        gaps.append(entropy_of(wafbc(density), density) - max(entropy_of(f, density) for f in _bounded(rng, density)))
    values = {arm: {"change": float(np.mean(found)), "largest": max(found)} for arm, found in changes.items()}
    values["wafbc"] = {"smallest_gap": min(gaps)}

    samples = rng.standard_normal(2_000 if scale == "smoke" else 20_000)
    x, eta = eafo_correction(torch.relu, GridDensity.from_samples(samples), restrict="positive", smooth=0.2)
    seen = torch.from_numpy(x[x <= 4])
    for arm, curve in (("crrelu", crrelu(seen, 1.0)), ("gelu", F.gelu(seen)), ("silu", F.silu(seen))):
        bump = (curve - seen).numpy()
        values[arm] = {
            "similarity": float(abs(bump @ eta[x <= 4]) / np.linalg.norm(bump) / np.linalg.norm(eta[x <= 4]))
        }
    normal = GaussianDensity(0, float(samples.std()))
    for arm, eps in (("relu", 0.0), ("published", 0.01), ("negated", -0.01)):
        values[arm] = {"entropy": entropy_of(partial(crrelu, eps=eps), normal, restrict="positive")}
    return values, {name: np.array(found) for name, found in changes.items()}


def _random_density(rng: np.random.Generator) -> GridDensity:
    """Return a mixture of two normal densities."""
    weight, means, scales = rng.uniform(0.2, 0.8), rng.normal(0, 1, 2), rng.uniform(0.6, 1.5, 2)
    parts = [GaussianDensity(float(m), float(s)) for m, s in zip(means, scales, strict=True)]
    points = np.linspace((means - 7 * scales).min(), (means + 7 * scales).max(), 8001)
    return GridDensity(points, weight * parts[0].pdf(points) + (1 - weight) * parts[1].pdf(points))


def _random_activation(rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Return an increasing activation: a line, bends to either side and steps."""
    line, (up, down, steps) = rng.uniform(0.1, 1), rng.uniform(0, 1, (3, 2))
    at, width = rng.normal(0, 1.5, (3, 2)), rng.uniform(0.5, 1.5, (3, 2))

    def activation(x: Tensor) -> Tensor:
        y = line * x
        for k in range(2):
            y = (
                y
                + up[k] * F.softplus((x - at[0, k]) / width[0, k])
                - down[k] * F.softplus((at[1, k] - x) / width[1, k])
            )
            y = y + steps[k] * torch.tanh((x - at[2, k]) / width[2, k])
        return y

    return activation


def _bounded(rng: np.random.Generator, density: GridDensity) -> list[Callable[[Tensor], Tensor]]:
    """Return increasing maps onto [0, 1]: common ones, and normal CDFs drawn near the density."""
    found: list[Callable[[Tensor], Tensor]] = [
        torch.sigmoid,
        lambda x: (torch.tanh(x) + 1) / 2,
        lambda x: torch.atan(x) / torch.pi + 0.5,
    ]
    drawn = zip(rng.normal(0, 0.5, 5), density.std * rng.uniform(0.8, 1.6, 5), strict=True)
    return found + [partial(_normal_cdf, mean=mean, std=std) for mean, std in drawn]


def _normal_cdf(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.special.ndtr((x - mean) / std)


def draw_entropy(cells: Cells) -> "Figure":
    """Change of the entropy along three directions, and entropy of CRReLU against its coefficient."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.6), layout="constrained")
    steps, sign = figure.subplots(1, 2)
    arms = {"eafo": "along the correction", "random": "random direction", "opposite": "against it"}
    changes = [np.concatenate([arrays[arm] for arrays in cells.arrays.values()]) for arm in arms]
    for arm, found in enumerate(changes):
        jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(found))
        steps.scatter(arm + jitter, found, s=8, alpha=0.5, linewidth=0)
    steps.axhline(0, color="0.6", linewidth=0.8)
    steps.set_xticks(range(3), list(arms.values()))
    steps.set_ylabel("change of entropy per $s\\int E^2dx$")
    steps.set_title("200 random activations and densities" if len(changes[0]) == 200 else "Random activations")
    eps = np.linspace(-0.2, 0.2, 41)
    entropies = [entropy_of(partial(crrelu, eps=e), GaussianDensity(), restrict="positive") for e in eps]
    sign.plot(eps, entropies)
    sign.scatter([0.01], [np.interp(0.01, eps, entropies)], color="C3", zorder=3, label="published initial value")
    sign.set_xlabel("coefficient $\\varepsilon$ of CRReLU")
    sign.set_ylabel("entropy of the output, nats")
    sign.set_title("Normal pre-activations, positive half")
    sign.legend(frameon=False)
    for axes in (steps, sign):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def constructed(seed: int) -> Split:
    """Ten classes of two normal clusters each, in 20 dimensions of which 10 matter."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        2400,
        20,
        n_informative=10,
        n_redundant=5,
        n_classes=10,
        n_clusters_per_class=2,
        class_sep=2.0,
        random_state=seed,
    )
    return _split(x, y, seed, 1200, 600)


def digits(seed: int) -> Split:
    """Handwritten digits of 8 x 8 pixels, 1200 for training."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _split(x, y, seed, 1000, 297)


def _split(x: np.ndarray, y: np.ndarray, seed: int, n_train: int, n_validation: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(x))
    rows = torch.from_numpy(x[order]).float()
    rows = (rows - rows[:n_train].mean(0)) / rows[:n_train].std(0).clamp(min=0.1)
    cuts = [n_train, n_validation, len(x) - n_train - n_validation]
    return Split._make(zip(rows.split(cuts), torch.from_numpy(y[order]).long().split(cuts), strict=True))


class NarrowDeep(nn.Sequential):
    """Ten hidden layers of eight units, He initialisation, biases 0."""

    def __init__(self, in_dim: int, activation: Callable[[], nn.Module]) -> None:
        layers: list[nn.Module] = []
        for a, b in pairwise([in_dim] + [8] * 10):
            layers += [nn.Linear(a, b), activation()]
        super().__init__(*layers, nn.Linear(8, 10))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


def _silent(network: nn.Sequential, x: Tensor) -> float:
    """Share of hidden units whose output is exactly 0 on all rows."""
    counts = []
    with torch.no_grad():
        for layer in network:
            x = layer(x)
            if not isinstance(layer, nn.Linear):
                counts.append((x == 0).all(0).float().mean())
    return float(torch.stack(counts).mean())


def run_narrow(seed: int, scale: str, data: Callable[[int], Split]) -> Values:
    """Train a narrow deep network with every activation, from the same weights and on the same batches."""
    split, values = data(seed), {}
    arms: dict[str, Callable[[], nn.Module]] = {**ARMS, "crrelu_large": partial(CRReLU, 0.1)}
    options: dict[str, Any] = {"epochs": 1 if scale == "smoke" else 15, "batch": 64}
    for arm, activation in arms.items():
        make = partial(NarrowDeep, split.train[0].shape[1], activation)
        network, values[arm] = _best(make, (1e-2, 3e-2), split, seed, options)
        values[arm]["silent"] = _silent(network, split.train[0])
    return values


def _best(
    make: Callable[[], Network], rates: tuple[float, ...], split: Split, seed: int, options: dict[str, Any]
) -> tuple[Network, dict[str, float]]:
    """Train at every rate; the network with the lowest cross-entropy on the validation part, and its test results."""
    tried = []
    for rate in rates:
        torch.manual_seed(seed)
        network = make().to(split.train[0].device)
        train(network, *split.train, seed=seed, rate=rate, **options)
        with torch.no_grad():
            tried.append((F.cross_entropy(network(split.validation[0]), split.validation[1]).item(), rate, network))
    _, rate, network = min(tried, key=lambda found: (not np.isfinite(found[0]), found[0]))
    found = {"accuracy": accuracy(network, *split.test), "rate": rate}
    moved = [float((m.eps.detach() - 0.01).abs().mean()) for m in network.modules() if isinstance(m, CRReLU)]
    return network, {**found, "moved": float(np.mean(moved))} if moved else found


def run_transformer(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Train a vision transformer on a part of Fashion-MNIST with every activation in its MLPs."""
    from timm.models.vision_transformer import VisionTransformer

    sizes: dict[str, dict[str, Any]] = {
        "smoke": {"n": (128, 64, 64), "epochs": 1, "batch": 32, "shape": (7, 16, 1, 2, 2.0)},
        "cpu": {"n": (1400, 500, 2000), "epochs": 4, "batch": 32, "shape": (7, 32, 2, 2, 4.0)},
        "gpu": {"n": (50000, 10000, 10000), "epochs": 40, "batch": 256, "shape": (4, 192, 12, 3, 4.0)},
    }
    size, device = sizes[scale], "cuda" if scale == "gpu" else "cpu"
    n_train, n_validation, n_test = size["n"]
    images = garments(seed, n_train + n_validation, n_test)
    cuts = [n_train, n_validation]
    parts = zip(images.train.to(device).split(cuts), images.train_labels.to(device).split(cuts), strict=True)
    split = Split._make([*parts, (images.test.to(device), images.test_labels.to(device))])
    shape = dict(zip(("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"), size["shape"], strict=True))
    shape |= {"img_size": 28, "in_chans": 1, "num_classes": 10}
    options: dict[str, Any] = {"epochs": size["epochs"], "weight_decay": 0.05, "clip": 1.0, "batch": size["batch"]}
    rates = (4e-3, 1e-2) if scale != "gpu" else (5e-4, 1e-3)
    values: Values = {}
    learned = np.zeros(0)
    for arm, activation in {**ARMS, **DYNAMIC}.items():
        make = partial(VisionTransformer, act_layer=activation, **shape)
        network, values[arm] = _best(make, rates, split, seed, options)
        if arm == "crrelu":
            learned = np.array([float(m.eps.detach()) for m in network.modules() if isinstance(m, CRReLU)])
    return values, {"learned": learned}


def draw_narrow(cells: Cells) -> "Figure":
    """Accuracy of every activation, and the share of units that are silent on all rows."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.8), layout="constrained")
    scores, silent = figure.subplots(1, 2)
    _strips(scores, cells, "accuracy", "test accuracy")
    _strips(silent, cells, "silent", "share of silent units")
    return figure


def draw_transformer(cells: Cells) -> "Figure":
    """Accuracies, differences to CRReLU within the seeds, and the coefficients learned."""
    from matplotlib.figure import Figure

    from classact.evidence.statistics import t_interval

    figure = Figure((13, 3.8), layout="constrained")
    scores, gains, learned = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    _strips(scores, cells, "accuracy", "test accuracy")
    others = [arm for arm in cells.arms if arm != "crrelu"]
    for row, arm in enumerate(others):
        gain = t_interval(cells.metric("crrelu", "accuracy") - cells.metric(arm, "accuracy"))
        gains.errorbar(
            gain.effect, row, xerr=[[gain.effect - gain.low], [gain.high - gain.effect]], fmt="ok", capsize=3
        )
    gains.axvline(0, color="0.6", linewidth=0.8)
    gains.set_yticks(range(len(others)), others)
    gains.set_xlabel("accuracy of CRReLU minus that of ...")
    table = np.array([arrays["learned"] for arrays in cells.arrays.values()])
    learned.plot(np.arange(table.shape[1]) + 1, table.T, "o-", color="C0", alpha=0.5, markersize=4)
    learned.axhline(0.01, color="C3", linestyle="--", label="initial value")
    learned.set_xticks(np.arange(table.shape[1]) + 1)
    learned.set_xlabel("block")
    learned.set_ylabel("learned $\\varepsilon$")
    learned.legend(frameon=False)
    for axes in (gains, learned):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _strips(axes: Any, cells: Cells, metric: str, label: str) -> None:
    table = np.array([cells.metric(arm, metric) for arm in cells.arms])
    axes.plot(table, color="0.85", linewidth=0.7, zorder=1)
    for index, row in enumerate(table):
        axes.scatter(np.full(len(row), index), row, s=10, color="C0", alpha=0.6, linewidth=0, zorder=2)
    axes.plot(table.mean(1), "k_", markersize=16, zorder=3)
    axes.set_xticks(range(len(table)), cells.arms, rotation=35, ha="right")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


SEEDS = {"smoke": range(2), "cpu": range(100, 110)}
EXPERIMENTS = {
    "entropy": Experiment(run_entropy, SEEDS, draw_entropy),
    "narrow-deep": Experiment(partial(run_narrow, data=constructed), SEEDS, draw_narrow),
    "narrow-deep-digits": Experiment(partial(run_narrow, data=digits), SEEDS, draw_narrow),
    "garments-transformer": Experiment(run_transformer, {**SEEDS, "gpu": range(100, 105)}, draw_transformer),
}
