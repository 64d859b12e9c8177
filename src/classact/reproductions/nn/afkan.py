"""Experiments of AF-KAN: small networks on garments, what its parts do, and images whose classes are not linear.

Settings fixed before the evidence. All networks are 784-64-10 unless said otherwise and trained by the authors' recipe
(AdamW with weight decay 1e-4, the learning rate falling by a fifth every epoch, batches of 64, inputs of mean and
deviation 0.5), shuffled, for 5 epochs on 3,000 images of Fashion-MNIST, tested on 2,000 others; every network has the
best of the learning rates 0.001, 0.003 and 0.01 on 1,000 further images. To change one part at a time 1,800 images, 600
further ones and 3 epochs have to do. Each layer of the perceptron is ``W SiLU(LayerNorm(x))``, which is AF-KAN without
functions; `mlp_code` is the authors' perceptron, with SiLU on its logits too. `relu_kan` and `rbf_kan` have the same
structure and 6 and 8 times the parameters, `relu_kan_small` and `rbf_kan_small` the same number of parameters and 10
and 7 hidden nodes. Operations are those of the products of matrices in a forward pass; `written` counts the numbers
that all tensor operations of a training step write.

Constructed images: 16 x 16 pixels, 10 classes, each with an independent pattern of signs s. Of a pixel with s = 1 the
value is +-0.8, of the others 0, with noise of deviation 0.6 on all: the sign of a pixel tells nothing, its size does
(`even`). `linear` has s times 0.25 and the same noise: there is nothing to gain from functions of a pixel.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from classact.evidence.experiment import Cells, Experiment, Values
from classact.nn.afkan import ACTIVATIONS, AFKAN, COMBINATIONS, AFKANLayer, ReLUKAN
from classact.nn.kan_bases import KANLinear
from classact.reproductions.nn.small_images import accuracy, garments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES, DECAY, BATCH, WEIGHT_DECAY = (1e-3, 3e-3, 1e-2), 0.8, 64, 1e-4


class Perceptron(nn.Sequential):
    """Layers ``W SiLU(LayerNorm(x))`` without biases; `on_logits` puts another SiLU behind the last."""

    def __init__(self, widths: list[int], on_logits: bool = False) -> None:
        layers: list[nn.Module] = []
        for d, o in pairwise(widths):
            layers += [nn.LayerNorm(d), nn.SiLU(), nn.Linear(d, o, bias=False)]
        super().__init__(*layers, *([nn.SiLU()] if on_logits else []))


def rbf_kan(widths: list[int]) -> nn.Module:
    """Gaussians and a base branch, each layer with its input normalised, as in FastKAN."""
    return nn.Sequential(*(KANLinear(d, o, "rbf", norm="layer") for d, o in pairwise(widths)))


def train(network: nn.Module, x: Tensor, labels: Tensor, lr: float, epochs: int, seed: int) -> nn.Module:
    """Train by the authors' recipe, shuffled."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), labels[chosen]).backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def macro_f1(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """F1 of the classes, averaged."""
    from sklearn.metrics import f1_score

    with torch.inference_mode():
        return float(f1_score(labels, network(x).argmax(1), average="macro"))


class Data:
    """Flat images of one seed; a quarter of the training part chooses the learning rate."""

    def __init__(self, x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
        cut = 3 * len(x) // 4
        self.test, self.test_labels = test, test_labels
        self.fit, self.validation = (x[:cut], labels[:cut]), (x[cut:], labels[cut:])


def garment_data(seed: int, scale: str, n_train: int = 4000) -> Data:
    """Images of Fashion-MNIST, flat, with mean and deviation 0.5 taken off as the authors do."""
    n_train, n_test = {"smoke": (96, 100), "cpu": (n_train, 2000), "paper": (60_000, 10_000)}[scale]
    data = garments(seed, n_train, n_test)
    low, high = data.train.min(), data.train.max()
    train_x, test_x = (2 * (part.flatten(1) - low) / (high - low) - 1 for part in (data.train, data.test))
    return Data(train_x, data.train_labels, test_x, data.test_labels)


def fit_arm(make: Callable[[], nn.Module], data: Data, seed: int, epochs: int) -> tuple[nn.Module, dict[str, float]]:
    """Train at every learning rate; the network that is best on the validation part, and what the test images say."""
    tried = []
    for rate in RATES:
        torch.manual_seed(seed)
        network = train(make(), *data.fit, rate, epochs, seed)
        tried.append((accuracy(network, *data.validation), -rate, network))
    _, rate, network = max(tried, key=lambda found: found[:2])
    return network, {
        "accuracy": accuracy(network, data.test, data.test_labels),
        "macro_f1": macro_f1(network, data.test, data.test_labels),
        "parameters": float(sum(p.numel() for p in network.parameters())),
        "lr": -rate,
    }


class Written(TorchDispatchMode):
    """Counts the numbers that tensor operations write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = out if isinstance(out, tuple | list) else (out,)
            self.numbers += sum(part.numel() for part in outputs if isinstance(part, Tensor))
        return out


def costs(network: nn.Module, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Operations of a forward pass, and numbers written in forward and backward pass, for each image."""
    with FlopCounterMode(display=False) as counter:
        network(x)
    with Written() as written:
        F.cross_entropy(network(x), labels).backward()
    return {"flops": counter.get_total_flops() / len(x), "written": written.numbers / len(x)}


WIDTHS = [784, 64, 10]
ARMS: dict[str, Callable[[], nn.Module]] = {
    "mlp": partial(Perceptron, WIDTHS),
    "mlp_code": partial(Perceptron, WIDTHS, on_logits=True),
    "afkan": partial(AFKAN, WIDTHS),
    "afkan_tensor": partial(AFKAN, WIDTHS, func_norm="tensor"),
    "afkan_relu": partial(AFKAN, WIDTHS, activation="relu"),
    "relu_kan": partial(ReLUKAN, WIDTHS),
    "relu_kan_small": partial(ReLUKAN, [784, 10, 10]),
    "rbf_kan": partial(rbf_kan, WIDTHS),
    "rbf_kan_small": partial(rbf_kan, [784, 7, 10]),
}


def run_garments(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Train every network; the functions that AF-KAN's first layer has learned."""
    data, epochs = garment_data(seed, scale), {"smoke": 1, "cpu": 5, "paper": 35}[scale]
    values, networks = {}, {}
    for arm, make in ARMS.items():
        networks[arm], found = fit_arm(make, data, seed, epochs)
        values[arm] = found | costs(make(), data.fit[0][:BATCH], data.fit[1][:BATCH])
    layer = networks["afkan"].layers[0]  # type: ignore[index]
    assert isinstance(layer, AFKANLayer)
    x = torch.linspace(-2, 2, 101).unsqueeze(1)
    with torch.inference_mode():
        functions = layer.basis(x.T)[0]  # of one sample with all inputs: one normalisation
        score = functions @ layer.reductions[0].score.weight[0]  # type: ignore[union-attr, index]
    return values, {"functions": functions.numpy(), "sum": functions.sum(1).numpy(), "score": score.numpy()}


def draw_garments(cells: Cells) -> "Figure":
    """Accuracy against parameters and numbers written, and the functions that one network has learned."""
    from matplotlib.figure import Figure

    from classact.evidence.statistics import t_interval

    figure = Figure((12, 4), layout="constrained")
    sizes, learned = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for index, arm in enumerate(cells.arms):
        interval = t_interval(cells.metric(arm, "accuracy"))
        x, written = (cells.metric(arm, key).mean() for key in ("parameters", "written"))
        color = f"C{index}"
        sizes.plot([x, x], [interval.low, interval.high], color=color, lw=1)
        sizes.scatter(x, interval.effect, s=written / 400, color=color, alpha=0.5)
        offset = (10, 4 - 14 * (index % 2))
        sizes.annotate(arm, (x, interval.effect), xytext=offset, textcoords="offset points", fontsize=8, color=color)
    sizes.set_xscale("log")
    sizes.set_xlabel("parameters (area: numbers written in a training step)")
    sizes.set_ylabel("test accuracy")
    sizes.margins(0.2)
    arrays = next(iter(cells.arrays.values()))
    x = np.linspace(-2, 2, len(arrays["sum"]))
    learned.plot(x, arrays["functions"], color="C0", lw=1, alpha=0.6)
    learned.plot(x, arrays["sum"], color="black", lw=2, label="their sum")
    learned.set_xlabel("value of a pixel")
    learned.set_title("functions of AF-KAN's first layer", fontsize=10)
    learned.legend(frameon=False, fontsize=8)
    for axes in (sizes, learned):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ablation_arms() -> dict[str, dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {"best": {}}
    arms |= {activation: {"activation": activation} for activation in ACTIVATIONS if activation != "silu"}
    arms |= {combine: {"combine": combine} for combine in COMBINATIONS if combine != "quad1"}
    arms |= {reduce: {"reduce": reduce} for reduce in ("spatial_attn", "multistep", "local_attn")}
    arms |= {"batch_norm": {"norm": "batch"}, "no_norm": {"norm": None}, "no_func_norm": {"func_norm": "none"}}
    return arms | {f"g{g}_k{k}": {"grid": g, "order": k} for g, k in ((5, 3), (3, 5), (3, 1))}


def run_parts(seed: int, scale: str) -> Values:
    """Change one part of AF-KAN at a time."""
    data, epochs = garment_data(seed, scale, 2400), {"smoke": 1, "cpu": 3, "paper": 35}[scale]
    return {
        arm: fit_arm(partial(AFKAN, WIDTHS, **change), data, seed, epochs)[1]
        for arm, change in _ablation_arms().items()
    }


def draw_parts(cells: Cells) -> "Figure":
    """Accuracy of every variant less that of the reported best configuration, in each seed."""
    from matplotlib.figure import Figure

    figure = Figure((7, 6), layout="constrained")
    axes = figure.subplots()
    best = cells.metric("best", "accuracy")
    arms = sorted(cells.arms, key=lambda arm: -cells.metric(arm, "accuracy").mean())
    for row, arm in enumerate(arms):
        difference = 100 * (cells.metric(arm, "accuracy") - best)
        axes.scatter(difference, np.full(len(best), row), s=14, color="C3" if arm == "best" else "C0", alpha=0.6)
        axes.plot([difference.mean()] * 2, [row - 0.3, row + 0.3], color="black", lw=1.5)
    axes.axvline(0, color="grey", lw=0.8)
    labels = ["silu, quad1, global_attn, layer norm, g3_k3" if arm == "best" else arm for arm in arms]
    axes.set_yticks(range(len(arms)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy less that of the configuration reported best, in points")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def constructed(seed: int, n: int, kind: str, part: int) -> tuple[Tensor, Tensor]:
    """Draw n constructed images of 256 pixels and their classes; the patterns depend on the seed alone."""
    signs = torch.randint(2, (10, 256), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    generator = torch.Generator().manual_seed(2 * seed + part + 10_000)
    labels = torch.randint(10, (n,), generator=generator)
    noise = 0.6 * torch.randn(n, 256, generator=generator)
    s = signs[labels]
    if kind == "linear":
        return 0.25 * s + noise, labels
    coin = torch.randint(2, (n, 256), generator=generator) * 2 - 1
    return 0.8 * coin * (s > 0) + noise, labels


def run_constructed(seed: int, scale: str) -> Values:
    """Train networks of equal size on images whose classes lie in the size of pixels, and in their sign."""
    n, epochs = (96, 1) if scale == "smoke" else (4000, 5)
    arms: dict[str, Callable[[], nn.Module]] = {
        "mlp": partial(Perceptron, [256, 64, 10]),
        "afkan": partial(AFKAN, [256, 64, 10]),
        "afkan_relu": partial(AFKAN, [256, 64, 10], activation="relu"),
        "relu_kan_small": partial(ReLUKAN, [256, 9, 10]),
        "rbf_kan_small": partial(rbf_kan, [256, 7, 10]),
    }
    values: Values = {arm: {} for arm in arms}
    for kind in ("even", "linear"):
        data = Data(*constructed(seed, n, kind, 0), *constructed(seed, 2000, kind, 1))
        for arm, make in arms.items():
            _, found = fit_arm(make, data, seed, epochs)
            values[arm] |= {kind: found["accuracy"], "parameters": found["parameters"], f"lr_{kind}": found["lr"]}
    return values


def draw_constructed(cells: Cells) -> "Figure":
    """Accuracy of every network on both kinds of images."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.4), layout="constrained")
    titles = {"even": "class in the size of pixels", "linear": "class in their sign"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for row, arm in enumerate(cells.arms):
            found = cells.metric(arm, kind)
            axes.scatter(found, row + np.linspace(-0.15, 0.15, len(found)), s=14, color=f"C{row}")
            axes.plot([found.mean()] * 2, [row - 0.3, row + 0.3], color="black", lw=1.5)
        sizes = [f"{arm} ({cells.metric(arm, 'parameters').mean():,.0f})" for arm in cells.arms]
        axes.set_yticks(range(len(sizes)), sizes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("test accuracy")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    return figure


EXPERIMENTS = {
    "constructed-images": Experiment(run_constructed, {"smoke": (0, 1), "cpu": range(100, 110)}, draw_constructed),
    "garments": Experiment(
        run_garments, {"smoke": (0, 1), "cpu": range(100, 110), "paper": range(100, 105)}, draw_garments
    ),
    "parts": Experiment(run_parts, {"smoke": (0, 1), "cpu": range(100, 105), "paper": range(100, 105)}, draw_parts),
}
