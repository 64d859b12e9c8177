"""Experiments of EvoNorm: batches of 64 and of 2, rejection of random layers, and the search itself.

Settings fixed before the evidence. Batch sizes: a network of four convolutions (16, 32, 32, 32 channels) on images of
14 x 14 pixels, 900 for training, four epochs in batches of 64 or one in batches of 2, SGD with momentum; of every layer
the better of two learning rates on a validation part, 0.1 and 0.2 or 0.005 and 0.02; groups of 8 channels. The arms
with SiLU show what the smoother activation alone gives, which the S layers contain. The noise on the gratings was set
after pilots (seeds 0 and 1), with less of which every layer reached 0.97 in large batches. Rejection: 100 random graphs
in each seed on images of 7 x 7 pixels, tested with the paper's 100 steps, threshold and bound; three of the kept and
three of those below the threshold are then trained three times as long. Search: images of 7 x 7 pixels, 8 random
layers, then 22 more by evolution on two anchors or one, or at random; the best layer of each is trained in a third
network, which no search has seen, on more images. Steps are few: 20 for quality, 10 for stability and 40 for scores.
Random search needs far more tests for as many scored layers; `random_steps` is the best that it had found after as many
steps of training as the search by Pareto fronts took in all.

The share of random children was lowered twice. With half of them random (pilots, seeds 0 to 4) evolution and random
search mostly ended with the same layer, one of the first. With a quarter, 6 random layers and 16 more, run on the seeds
100 to 104, evolution was no better than random search (-0.004, interval -0.045 to 0.037). With none (pilots, seeds 0 to
3) the search by Pareto fronts was better in all four, that by averages in two. The seeds of the search are therefore
new ones, 105 to 109.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.evidence.experiment import Cells, Experiment, Values
from classact.nn.evonorm.graph import LayerGraph
from classact.nn.evonorm.layers import VERSIONS, EvoNorm2d
from classact.nn.evonorm.rejection import (
    Anchor,
    Layer,
    SearchData,
    quality_test,
    stability_test,
    static_test,
    train_anchor,
)
from classact.nn.evonorm.search import SearchResult, evolve_layers
from classact.reproductions.nn.small_images import Garments, accuracy, garments, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = 8
SIZES = {64: (4, (0.1, 0.2)), 2: (1, (0.005, 0.02))}  # batch -> epochs, learning rates
NAMED = {
    "bn_relu": LayerGraph.bn_relu(),
    "gn_relu": LayerGraph.gn_relu(),
    **{version.lower(): LayerGraph.evonorm(version) for version in VERSIONS},
}


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP, channels)


def _evonorm(channels: int, version: str) -> EvoNorm2d:
    return EvoNorm2d(channels, version, groups=channels // GROUP)


LAYERS: dict[str, Layer] = {
    "bn_relu": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "bn_silu": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.SiLU()),
    "b0": partial(_evonorm, version="B0"),
    "gn_relu": lambda c: nn.Sequential(_group_norm(c), nn.ReLU()),
    "gn_silu": lambda c: nn.Sequential(_group_norm(c), nn.SiLU()),
    "s0": partial(_evonorm, version="S0"),
}


def plain_network(layer: Layer, widths: tuple[int, ...] = (16, 32, 32, 32)) -> nn.Module:
    """Convolutions with strides 1, 2, 1, 2, ..., a layer after each, mean over the positions, and ten classes."""
    parts: list[nn.Module] = []
    for k, (a, b) in enumerate(zip((1, *widths), widths, strict=False)):
        parts += [nn.Conv2d(a, b, 3, 1 + k % 2, 1, bias=False), layer(b)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class Block(nn.Module):
    """A residual block with the layer before each convolution; or one that expands, filters and projects."""

    def __init__(self, layer: Layer, dim: int, separable: bool = False) -> None:
        super().__init__()
        inner = 2 * dim if separable else dim
        first = nn.Conv2d(dim, inner, 1 if separable else 3, padding=0 if separable else 1, bias=False)
        second = nn.Conv2d(inner, inner, 3, padding=1, groups=inner if separable else 1, bias=False)
        parts = [layer(dim), first, layer(inner), second]
        self.branch = nn.Sequential(*parts, *([layer(inner), nn.Conv2d(inner, dim, 1)] if separable else []))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.branch(x)


def residual_network(layer: Layer, separable: bool = False) -> nn.Module:
    """A convolution, a block and a last layer; the separable block is that of MobileNetV2."""
    first, block = nn.Conv2d(1, 16, 3, 2, 1, bias=False), Block(layer, 16, separable)
    return nn.Sequential(first, block, layer(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def gratings(seed: int, n_train: int, n_test: int) -> Garments:
    """Stripes in ten orientations, of random phase, width and contrast, under noise: images (n, 1, 14, 14)."""
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:14, :14]
    parts: list[Tensor] = []
    for n in (n_train, n_test):
        labels = rng.integers(10, size=n)
        angle = labels * np.pi / 10 + rng.normal(0, 0.05, n)
        frequency, phase, contrast = rng.uniform(0.6, 1.4, n), rng.uniform(0, 2 * np.pi, n), rng.uniform(0.2, 1.5, n)
        across = np.cos(angle)[:, None, None] * i + np.sin(angle)[:, None, None] * j
        images = contrast[:, None, None] * np.sin(frequency[:, None, None] * across + phase[:, None, None])
        images += rng.normal(0, 0.7, images.shape)
        parts += [torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(labels)]
    return Garments(*parts)


def run_batches(seed: int, scale: str, draw: Callable[[int, int, int], Garments]) -> Values:
    """Train with every layer in large and in small batches, from the same weights and on the same batches."""
    n_train, n_validation, n_test = (64, 64, 64) if scale == "smoke" else (900, 400, 1500)
    images = draw(seed, n_train + n_validation, n_test)
    x, labels = images.train.split([n_train, n_validation]), images.train_labels.split([n_train, n_validation])
    values: Values = {arm: {} for arm in LAYERS}
    for arm, layer in LAYERS.items():
        for batch, (epochs, rates) in SIZES.items():
            tried = []
            for rate in rates:
                torch.manual_seed(seed)
                network = plain_network(layer)
                options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "batch": batch}
                train(network, x[0], labels[0], seed=seed, epochs=epochs, rate=rate, **options)
                with torch.no_grad():
                    loss = F.cross_entropy(network(x[1]), labels[1]).item()
                tried.append((loss if np.isfinite(loss) else np.inf, rate, network))
            _, rate, network = min(tried, key=lambda found: found[0])
            values[arm][f"accuracy_{batch}"] = accuracy(network, images.test, images.test_labels)
            values[arm][f"rate_{batch}"] = rate
    return values


def draw_batches(cells: Cells) -> "Figure":
    """Accuracy at both batch sizes, and what every layer loses from large to small batches."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.8), layout="constrained")
    large, small, drop = figure.subplots(1, 3)
    for axes, batch in ((large, 64), (small, 2)):
        _strips(axes, {arm: cells.metric(arm, f"accuracy_{batch}") for arm in cells.arms})
        axes.set_ylabel(f"test accuracy, batches of {batch}")
    _strips(drop, {a: cells.metric(a, "accuracy_64") - cells.metric(a, "accuracy_2") for a in cells.arms})
    drop.set_ylabel("loss of accuracy from 64 to 2")
    return figure


def run_rejection(seed: int, scale: str) -> Values:
    """Test random graphs and the known layers; then train some of the kept and of the rejected for longer."""
    few = scale == "smoke"
    data = _search_data(seed, 128 if few else 800, 128 if few else 500, pool=4)
    anchor, rng = partial(plain_network, widths=(8, 16)), np.random.default_rng(seed)
    steps = 4 if few else 100
    options: dict[str, Any] = {"groups": 4, "batch": 64, "seed": seed}

    def outcome(graph: LayerGraph) -> str:
        static = static_test(graph, seed=seed)
        if not static.passed:
            return static.reason
        quality = quality_test(graph, anchor, data, steps, **options)
        if not quality.passed:
            return quality.reason
        return stability_test(graph, anchor, data, steps, **options).reason or "kept"

    graphs = [LayerGraph.random(rng) for _ in range(12 if few else 100)]
    outcomes = [outcome(graph) for graph in graphs]
    shares = {name: float(np.mean([o == name for o in outcomes])) for name in REASONS}
    values: Values = {"random": {"rejected": 1 - shares["kept"], **shares}}
    values["known"] = {"passed": float(np.mean([outcome(graph) == "kept" for graph in NAMED.values()]))}
    for arm, name in (("kept", "kept"), ("rejected", "low quality")):
        chosen = [graph for graph, o in zip(graphs, outcomes, strict=True) if o == name][:3]
        later = [train_anchor(graph, anchor, data, 3 * steps, **options) for graph in chosen]
        values[arm] = {"later": float(np.mean(np.nan_to_num(later, nan=0.1))) if later else float("nan")}
    return values


REASONS = ("no dependence on x", "not finite", "low quality", "unstable", "kept")


def _search_data(seed: int, n_train: int, n_validation: int, pool: int) -> SearchData:
    images = garments(seed, n_train + n_validation, 1, pool)
    cuts = [n_train, n_validation]
    x, labels = images.train.split(cuts), images.train_labels.split(cuts)
    return SearchData(x[0], labels[0], x[1], labels[1])


def draw_rejection(cells: Cells) -> "Figure":
    """What becomes of random layers, and how those kept and those rejected do when trained for longer."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), layout="constrained")
    funnel, later = figure.subplots(1, 2, width_ratios=(3, 2))
    shares = {name: 100 * cells.metric("random", name) for name in REASONS}
    funnel.barh(range(len(REASONS)), [s.mean() for s in shares.values()], color=["0.75"] * 4 + ["C2"])
    for k, share in enumerate(shares.values()):
        funnel.plot(share, np.full(len(share), k), "k.", markersize=3)
        funnel.annotate(f"{share.mean():.1f} %", (share.max(), k), xytext=(6, -3), textcoords="offset points")
    funnel.set_yticks(range(len(REASONS)), REASONS)
    funnel.invert_yaxis()
    funnel.margins(x=0.15)
    funnel.set_xlabel("share of random layers, %")
    _strips(later, {arm: cells.metric(arm, "later") for arm in ("kept", "rejected")})
    later.set_ylabel("accuracy after 300 steps")
    later.set_xticks([0, 1], ["kept", "low quality\nafter 100 steps"], rotation=0, ha="center")
    funnel.spines[["top", "right"]].set_visible(False)
    return figure


def run_search(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Search on two networks, on one and at random; train the best of each in a network that none has seen."""
    few = scale == "smoke"
    data = _search_data(seed, 128 if few else 600, 128 if few else 500, pool=4)
    held_out = _search_data(seed + 10_000, 128 if few else 2000, 128 if few else 1500, pool=4)
    two: dict[str, Anchor] = {"plain": partial(plain_network, widths=(8, 16)), "residual": residual_network}
    one = {"plain": two["plain"]}
    options: dict[str, Any] = {
        "generations": 1 if few else 22,
        "population": 2 if few else 8,
        "tournament_frac": 0.3,
        "groups": 4,
        "steps": 3 if few else 40,
        "quality_steps": 3 if few else 20,
        "stability_steps": 2 if few else 10,
        "quality_threshold": 0.05 if few else 0.2,
        "batch": 64,
        "seed": seed,
    }
    found: dict[str, SearchResult] = {}
    shared: dict[str, Any] = {}
    for arm, winner, p_random in (("pareto", "pareto", 0.0), ("average", "average", 0.0), ("random", "average", 1.0)):
        found[arm] = evolve_layers(two, data, winner=winner, p_random=p_random, cache=shared, **options)  # type: ignore[arg-type]
    found["single"] = evolve_layers(one, data, winner="average", p_random=0.0, **options)
    unseen = partial(residual_network, separable=True)
    final: dict[str, Any] = {"groups": 4, "batch": 64, "seed": seed}
    steps = 3 if few else 150
    values: Values = {}
    for arm, result in found.items():
        score = train_anchor(result.best, unseen, held_out, steps, **final)
        searched = float(np.mean(result.kept()[0].scores or []))
        values[arm] = {"unseen": score if np.isfinite(score) else 0.1, "searched": searched}
    budget = _spent(found["pareto"], options)[-1]
    early = [
        c
        for c, spent in zip(found["random"].candidates, _spent(found["random"], options), strict=True)
        if spent <= budget
    ]
    values["random_steps"] = {"searched": float(np.mean(SearchResult(early, list(two)).kept()[0].scores or []))}
    for arm in ("bn_relu", "b0", "s0"):
        values[arm] = {"unseen": train_anchor(NAMED[arm], unseen, held_out, steps, **final)}
    points = {arm: np.array([c.scores for c in found[arm].kept()]) for arm in ("pareto", "average", "random")}
    return values, points


def _spent(result: SearchResult, options: dict[str, Any]) -> np.ndarray:
    """Steps of training up to each candidate; those of trainings that became infinite are not counted."""
    quality, stability, score = options["quality_steps"], options["stability_steps"], options["steps"]
    tested = quality + stability
    cost = {"low quality": quality, "unstable": tested, "kept": tested + score * len(result.anchors)}
    return np.cumsum([0 if c.known else cost.get(c.outcome, 0) for c in result.candidates])


def draw_search(cells: Cells) -> "Figure":
    """Scores on both anchors of all layers found, the best average of each search, and accuracy in a third network."""
    from matplotlib.figure import Figure

    figure = Figure((13, 3.8), layout="constrained")
    scatter, searched, unseen = figure.subplots(1, 3)
    for arm in ("random", "average", "pareto"):
        points = np.concatenate([arrays[arm] for arrays in cells.arrays.values()])
        scatter.scatter(*points.T, s=8, alpha=0.5, linewidth=0, label=arm)
    scatter.set_xlabel("accuracy in the plain network")
    scatter.set_ylabel("accuracy in the residual network")
    scatter.legend(frameon=False)
    _strips(searched, {arm: cells.metric(arm, "searched") for arm in ("pareto", "average", "random", "random_steps")})
    searched.set_ylabel("best average score of the search")
    _strips(unseen, {arm: cells.metric(arm, "unseen") for arm in cells.arms if arm != "random_steps"})
    unseen.set_ylabel("accuracy in the unseen network")
    scatter.spines[["top", "right"]].set_visible(False)
    return figure


def _strips(axes: Any, values: dict[str, np.ndarray]) -> None:
    table = np.array(list(values.values()))
    axes.plot(table, color="0.85", linewidth=0.7, zorder=1)
    for index, row in enumerate(table):
        axes.scatter(np.full(len(row), index), row, s=10, color="C0", alpha=0.6, linewidth=0, zorder=2)
    axes.plot(np.nanmean(table, 1), "k_", markersize=16, zorder=3)
    axes.set_xticks(range(len(table)), list(values), rotation=35, ha="right")
    axes.spines[["top", "right"]].set_visible(False)


SEEDS = {"smoke": range(2), "cpu": range(100, 110)}
EXPERIMENTS = {
    "gratings": Experiment(partial(run_batches, draw=gratings), SEEDS, draw_batches),
    "garments": Experiment(partial(run_batches, draw=partial(garments, pool=2)), SEEDS, draw_batches),
    "rejection": Experiment(run_rejection, SEEDS, draw_rejection),
    "search": Experiment(run_search, {**SEEDS, "cpu": range(105, 110)}, draw_search),
}
