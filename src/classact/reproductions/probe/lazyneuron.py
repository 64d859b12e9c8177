"""Experiments of the lazy neuron phenomenon: 2-layer MLPs on Fashion-MNIST and noise, small transformers on digits.

`emergence` trains MLPs 196-H-10 for 1,000 steps of Adam, batches of 128, on 4,000 images averaged over 2 x 2 pixels,
and on the three controls that take away what could be the cause: labels permuted once, the inputs of 20,000 labels
replaced once by noise, and noise and labels drawn anew in every step; at a learning rate of 0.001 and, as `fast`, 0.01.
The share of nonzero activations is measured before, during and after, on 4,000 of the training inputs (for noise drawn
anew, on 4,000 others) and on new ones; units are dead if they fire for none of the former. Nothing is regularised;
there is no weight decay. `sgd` has permuted labels and plain gradient descent, for whoever suspects Adam.

`gradient` needs no training: mean derivatives of the loss with respect to activations over 200 matrices V, beside what
is derived for them; and, on images, how the activations of a network's own examples move in one step of gradient
descent on the first layer.

`transformers` trains a vision transformer of 2 blocks and an MLP-Mixer of 2 blocks on the digits of scikit-learn (8 x 8
pixels, patches of 2 x 2, width 32, hidden layers of 256; 600 steps of Adam at 0.001, batches of 32), the former with
permuted labels as well, and Top-16 beside the dense one, with and without 40 % label noise.

`top-k` trains MLPs 784-512-10 on 4,000 images for 500 steps of Adam, dense and with the 32 or 8 largest activations (6
and 1.6 %; the paper's 128 of 3,072 are 4 %), with 0, 40 and 80 % of the training labels replaced, and beside them what
else could give the same: dropout of 0.1, an L1 penalty on the activations, pruning of three quarters of the weights
half-way, label smoothing of 0.1; early stopping on validation data as noisy as the training data (`early40`), and one
temperature fitted to validation data (`scaled`). All arms have the same initial weights, batches and learning rate;
none was tuned. Corruptions are the mean over severities 1, 3 and 5 of ImageNet-C's definitions. `coarse` repeats the
three networks with 40 % label noise on images averaged over 2 x 2 pixels.

Settings chosen after pilots (seeds 0 and 1): 20,000 noise images in place of 4,000, which are known by heart after two
hundred steps, whereupon activations stay as they are (a fall of 1 point at a rate of 0.001); the rate of 0.01 for the
controls, beside 0.001, since activations on natural images had become fewer at the higher rate only; permuted labels
judged at 0.001, since most units died at 0.01 and the network learned hardly anything; 784 pixels in
`top-k`, where dense networks learn noisy labels by heart within the 500 steps (0.75 dense, 0.76 and 0.81 Top-32 and
Top-8 with 40 % of the labels random), and not on `coarse` images, where Top-k was worse (0.81, 0.79 and 0.78); the L1
penalty, for a share of nonzero activations near that of Top-32; batches of 32 for the transformers, for time.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from classact.evidence.experiment import Cells, Experiment, Values
from classact.probe.lazyneuron import (
    SparsityReport,
    activation_sparsity,
    control_dataset,
    convert_topk,
    corrupt,
    ece,
    expected_activation_gradient,
    mlp_flops,
    noisy_labels,
    predicted_activation_gradient,
    reliability,
    relufy,
)
from classact.reproductions.nn.small_images import accuracy, garments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = {"smoke": (0, 1), "cpu": range(100, 110)}
FEWER = {"smoke": (0, 1), "cpu": range(100, 105)}  # for those that take a minute each
Arrays = dict[str, np.ndarray]
Batches = Iterator[tuple[Tensor, Tensor]]
BATCH, CLASSES = 128, 10
POINTS = (0.0, 0.01, 0.03, 0.1, 0.18, 0.25, 0.35, 0.5, 0.75, 1.0)
# condition, hidden units, learning rate
EMERGENCE = {
    "natural": ("natural", 512, 1e-3),
    "natural_fast": ("natural", 512, 1e-2),
    "random_labels": ("random_labels", 512, 1e-3),
    "random_labels_128": ("random_labels", 128, 1e-3),
    "random_labels_1024": ("random_labels", 1024, 1e-3),
    "random_labels_fast": ("random_labels", 512, 1e-2),
    "random_inputs": ("random_inputs", 512, 1e-3),
    "random_inputs_fast": ("random_inputs", 512, 1e-2),
    "infinite": ("infinite", 512, 1e-3),
    "infinite_fast": ("infinite", 512, 1e-2),
    "sgd": ("random_labels", 512, 0.1),
}
CONDITIONS = {
    "natural": "natural",
    "random_labels": "random labels",
    "random_inputs": "random inputs",
    "infinite": "infinite noise",
}
TOP = ("dense", "top32", "top8", "dropout", "l1", "pruned", "smoothing")
MAIN = TOP[:3]
SEVERITIES = (1, 3, 5)
Corruption = Literal["gaussian", "shot", "impulse"]
LABELLED = ("natural", "random_labels")  # tested on new images, the others on noise
L1 = 2.5


def mlp(seed: int, hidden: int, inputs: int = 196, outputs: int = CLASSES) -> nn.Sequential:
    """Linear, ReLU, linear, with PyTorch's initial weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def batches_of(x: Tensor, y: Tensor, seed: int, size: int = BATCH) -> Batches:
    """Without an end, every example once in an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(size):
            yield x[chosen], y[chosen]


def fit(
    network: nn.Module,
    batches: Batches,
    steps: int,
    rate: float,
    *,
    sgd: bool = False,
    smoothing: float = 0.0,
    penalty: Callable[[], Tensor] | None = None,
    watch: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train with cross-entropy at a constant rate; ``watch(step)`` is called before the first step and after each."""
    kind = torch.optim.SGD if sgd else torch.optim.Adam
    optimizer = kind(network.parameters(), rate, fused=True)
    for step in range(steps + 1):
        if watch is not None:
            watch(step)
        if step < steps:
            x, y = next(batches)
            network.train()
            loss = F.cross_entropy(network(x), y, label_smoothing=smoothing)
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def measure(network: nn.Module, x: Tensor) -> SparsityReport:
    """Sparsity for some inputs."""
    return activation_sparsity(network, x.split(1000))


def summary(before: SparsityReport, after: SparsityReport, new: SparsityReport) -> dict[str, float]:
    """Means over layers, in the order before training, after it, and after it on new inputs."""
    return {
        "init": before.nonzero,
        "end": after.nonzero,
        "drop": before.nonzero - after.nonzero,
        "least_drop": min(a.nonzero - b.nonzero for a, b in zip(before.stats, after.stats, strict=True)),
        "new": new.nonzero,
        "gap": abs(new.nonzero - after.nonzero),
        "dead": float(np.mean([one.dead / len(one.firing_rate) for one in after.stats])),
        "alive": float(np.mean([one.nonzero_alive for one in after.stats])),
        "alive_drop": float(
            np.mean([a.nonzero_alive - b.nonzero_alive for a, b in zip(before.stats, after.stats, strict=True)])
        ),
    }


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(x), torch.stack(y)


def run_emergence(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Train on images and on the controls."""
    n, steps = (100, 4) if scale == "smoke" else (4000, 1000)
    images = garments(seed, 5 * n, n // 2, pool=2)
    everything, new = images.train.flatten(1), images.test.flatten(1)
    labels = images.train_labels
    source = TensorDataset(everything[:n], labels[:n])
    noise = torch.randn(n, everything.shape[1], generator=torch.Generator().manual_seed(seed + 1000))
    data = {
        "natural": (everything[:n], labels[:n]),
        "random_labels": _tensors(control_dataset(source, "random_labels", seed)),
        "random_inputs": _tensors(control_dataset(TensorDataset(everything, labels), "random_inputs", seed)),
        "infinite": (noise, labels[:n]),
    }
    values: Values = {}
    arrays: Arrays = {}
    for arm, (condition, hidden, rate) in EMERGENCE.items():
        x, y = data[condition]
        if condition == "infinite":
            batches: Batches = iter(DataLoader(control_dataset(source, "infinite", seed, CLASSES), BATCH))
        else:
            batches = batches_of(x, y, seed)
        network = mlp(seed, hidden)
        curve: list[tuple[int, SparsityReport]] = []

        def watch(step: int, network=network, x=x[:n], curve=curve) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, RUF100
            if step in {round(p * steps) for p in POINTS}:
                curve.append((step, measure(network, x)))

        fit(network, batches, steps, rate, sgd=arm == "sgd", watch=watch)
        after = curve[-1][1]
        values[arm] = summary(curve[0][1], after, measure(network, new if condition in LABELLED else noise))
        values[arm] |= {
            "fitted": accuracy(network, x[:n], y[:n]),
            # of a block with two equal matrices, as transformers have and this network has not
            "block_flops": mlp_flops(mlp(0, hidden, CLASSES), {"1": after["1"]})["total"].ratio,
        }
        arrays[arm] = np.array([(step, one.nonzero, one.stats[0].dead / hidden) for step, one in curve], np.float32)
        arrays[f"{arm}_rates"] = np.quantile(after["1"].firing_rate, np.linspace(0, 1, 41)).astype(np.float32)
    return values, arrays


def draw_emergence(cells: Cells) -> "Figure":
    """Nonzero share over steps in every condition at two rates; by width; firing rates of the units."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 0.8, 1.1])
    for place, (condition, label) in enumerate(CONDITIONS.items()):
        for arm, line in ((condition, "--"), (f"{condition}_fast", "-")):
            runs = np.stack([arrays[arm] for arrays in cells.arrays.values()])
            step, share = runs[0, :, 0], 100 * runs[:, :, 1]
            dead = 100 * cells.metric(arm, "dead").mean()
            style: dict[str, Any] = {"color": f"C{place}", "linestyle": line}
            left.plot(step, share.mean(0), **style, label=f"{label}, {EMERGENCE[arm][2]:g} ({dead:.1f} % dead)")
            left.fill_between(step, share.min(0), share.max(0), color=f"C{place}", alpha=0.2, linewidth=0)
            rates = 100 * np.stack([arrays[f"{arm}_rates"] for arrays in cells.arrays.values()]).mean(0)
            right.plot(np.linspace(0, 1, len(rates)), rates[::-1], **style)
    left.set(xlabel="steps", ylabel="nonzero activations, per cent", ylim=(0, 105))
    left.legend(frameon=False, fontsize=7, ncols=2, loc="upper left", title="learning rate", title_fontsize=7)
    arms = ("random_labels_128", "random_labels", "random_labels_1024")
    end = 100 * np.stack([cells.metric(arm, "end") for arm in arms])
    middle.plot(range(3), end, ".-", color="C1", linewidth=0.6, alpha=0.6)
    middle.set_xticks(range(3), ["128", "512", "1024"])
    middle.set(xlabel="hidden units", ylabel="per cent at the end", ylim=(0, None), title="random labels, by width")
    right.set(xlabel="units, busiest first", ylabel="fires for per cent of inputs", ylim=(0, 100), title="at the end")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_gradient(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Derivatives before training beside the derivation, and one step of gradient descent."""
    inits, n = (20, 50) if scale == "smoke" else (200, 1000)
    generator = torch.Generator().manual_seed(seed)
    d_ff, variance = 64, 0.1
    a = torch.randn(8, d_ff, generator=generator).relu()
    y = torch.randint(CLASSES, (8,), generator=generator)
    targets = F.one_hot(y, CLASSES).float()
    values: Values = {}
    arrays: Arrays = {}
    V = variance**0.5 * torch.randn(inits, CLASSES, d_ff, generator=generator)
    logits = a @ V.mT  # (inits, 8, C)
    for loss, residual in (("cross-entropy", logits.softmax(-1) - targets), ("squared", logits - targets)):
        gradient = (residual @ V).double()
        expected = predicted_activation_gradient(a, variance, CLASSES, loss, seed=seed).double()  # type: ignore[arg-type]
        mean, on = gradient.mean(0), a > 0
        values[loss.replace("-", "_")] = {
            "active": float(mean[on].mean()),
            "inactive": float(mean[~on].mean()),
            "slope": float((mean[on] * expected[on]).sum() / expected[on].square().sum()),
            "positive": float((gradient[:, on].mean(1) > 0).double().mean()),
        }
        some = slice(0, 2)
        arrays[loss] = np.stack([expected[some].flatten(), mean[some].flatten()]).astype(np.float32)
    images = garments(seed, n, 1, pool=2)
    x, labels = images.train.flatten(1), images.train_labels
    found, moved = [], []
    for init in range(2 if scale == "smoke" else 20):
        network = mlp(1000 * seed + init, 256)
        found.append(expected_activation_gradient(network, (x, labels))["1"])
        before = network[1](network[0](x)).detach()
        weights = list(network[0].parameters())
        step = torch.autograd.grad(F.cross_entropy(network(x), labels), weights)
        with torch.no_grad():
            for p, g in zip(weights, step, strict=True):
                p.sub_(0.1 * g)
        after = network[1](network[0](x)).detach()
        moved.append(float((after - before)[before > 0].mean() / before[before > 0].mean()))
    values["garments"] = {
        "active": float(np.mean([one.active for one in found])),
        "inactive": float(np.mean([one.inactive for one in found])),
        "positive": float(np.mean([one.active > 0 for one in found])),
        "moved": float(np.mean(moved)),
    }
    return values, arrays


def draw_gradient(cells: Cells) -> "Figure":
    """Mean derivatives over 200 matrices V beside the derivation; the same on images over initialisations."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, loss in zip(panels, ("cross-entropy", "squared"), strict=False):
        pairs = np.concatenate([arrays[loss] for arrays in cells.arrays.values()], 1)
        axes.scatter(*pairs, s=5, alpha=0.4, linewidth=0)
        axes.axline((0, 0), slope=1, color="0.3", linewidth=0.8)
        axes.axhline(0, color="0.8", linewidth=0.8)
        axes.set(xlabel="derived", ylabel="mean derivative over V", title=loss.replace("squared", "squared error"))
    for place, metric in enumerate(("active", "inactive")):
        panels[2].plot([place] * len(cells.values), 1000 * cells.metric("garments", metric), "o", alpha=0.5)
    panels[2].axhline(0, color="0.8", linewidth=0.8)
    panels[2].set_xticks([0, 1], ["active units", "other units"])
    panels[2].set(xlim=(-0.5, 1.5), ylabel="derivative x 1000", title="Fashion-MNIST, before training")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_transformers(seed: int, scale: str) -> tuple[Values, Arrays]:
    """A vision transformer and an MLP-Mixer on digits."""
    from timm.models.mlp_mixer import MlpMixer
    from timm.models.vision_transformer import VisionTransformer

    n, steps, rate = (50, 2, 1e-3) if scale == "smoke" else (1200, 600, 1e-3)
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.images))
    x = torch.from_numpy(digits.images[order]).float().unsqueeze(1) / 8 - 1
    y = torch.from_numpy(digits.target[order]).long()
    train, labels, new, new_labels = x[:n], y[:n], x[1200:], y[1200:]
    shape: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": CLASSES, "embed_dim": 32}
    generator = torch.Generator().manual_seed(seed)
    permuted = _tensors(control_dataset(TensorDataset(train, labels), "random_labels", seed))[1]
    noisy = noisy_labels(labels, 0.4, CLASSES, generator)
    values: Values = {}
    arrays: Arrays = {}
    for arm, taught in (
        ("vit", labels), ("vit_random", permuted), ("mixer", labels), ("vit_noisy", noisy), ("top16", labels),
        ("top16_noisy", noisy),
    ):  # fmt: skip
        torch.manual_seed(seed)
        if arm == "mixer":
            network: nn.Module = MlpMixer(**shape, num_blocks=2, mlp_ratio=(4.0, 8.0))
        else:
            network = VisionTransformer(**shape, depth=2, num_heads=4, mlp_ratio=8)
        relufy(network)
        if arm.startswith("top16"):
            convert_topk(network, 16)
        network.eval()
        before = measure(network, train)
        fit(network, batches_of(train, taught, seed, 32), steps, rate)
        after, later = measure(network, train), measure(network, new)
        values[arm] = summary(before, after, later)
        with torch.inference_mode():
            p = network(new).softmax(-1)
            grey = corrupt((new + 1) / 2, "gaussian", 5, torch.Generator().manual_seed(seed))
            shown = network(2 * grey - 1).argmax(1)
        values[arm] |= {
            "accuracy": float((p.argmax(1) == new_labels).float().mean()),
            "ece": ece(p, new_labels),
            "gaussian": float((shown == new_labels).float().mean()),
            "flops": mlp_flops(network, dict(zip(after.layers, after.stats, strict=True)))["total"].ratio,
        }
        arrays[arm] = np.array([[one.nonzero for one in report.stats] for report in (before, after, later)], np.float32)
    return values, arrays


def draw_transformers(cells: Cells) -> "Figure":
    """Nonzero share of every hidden layer before and after; accuracy and calibration with Top-16."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    names, colours, ticks = (
        {"vit": "ViT", "vit_random": "ViT, random labels", "mixer": "Mixer"},
        ("0.7", "C0", "C1"),
        [],
    )
    at = 0.0
    for arm, name in names.items():
        shares = 100 * np.stack([arrays[arm] for arrays in cells.arrays.values()])
        for layer in range(shares.shape[2]):
            for place, colour in enumerate(colours):
                values = shares[:, place, layer]
                left.bar(at + 0.25 * place, values.mean(), 0.22, color=colour)
                left.plot([at + 0.25 * place] * len(values), values, ".", color="0.2", markersize=2)
            ticks.append((at + 0.25, f"{name}\n{layer + 1}" if not layer else f"\n{layer + 1}"))
            at += 1
        at += 0.4
    for label, colour in zip(("before training", "training images", "new images"), colours, strict=True):
        left.bar(0, 0, color=colour, label=label)
    left.set_xticks(*zip(*ticks, strict=True), fontsize=7)
    left.set(ylabel="nonzero activations, per cent", xlabel="hidden layers")
    left.set_ylim(0, 1.25 * max(left.get_ylim()[1], 1))
    left.legend(frameon=False, fontsize=7, ncols=3)
    pairs = (("accuracy", ""), ("accuracy", "_noisy"), ("gaussian", ""), ("ece", ""))
    for place, (metric, suffix) in enumerate(pairs):
        for shift, (arm, colour) in enumerate((("vit", "C0"), ("top16", "C3"))):
            values = cells.metric(arm + suffix, metric)
            right.bar(place + 0.35 * shift, values.mean(), 0.32, color=colour)
            right.plot([place + 0.35 * shift] * len(values), values, ".", color="0.2", markersize=2)
    right.set_xticks(np.arange(4) + 0.18, ["accuracy", "40 % noise", "Gaussian", "ECE"])
    for label, colour in (("dense", "C0"), ("Top-16 of 256", "C3")):
        right.bar(0, 0, color=colour, label=label)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _temperature(logits: Tensor, labels: Tensor) -> float:
    grid = torch.logspace(-1, 1, 201)
    losses = [float(F.cross_entropy(logits / t, labels)) for t in grid]
    return float(grid[int(np.argmin(losses))])


def _prune(network: nn.Sequential, share: float) -> dict[str, Tensor]:
    """Masks that keep a share of the weights of every layer, the largest ones."""
    weights = {name: p for name, p in network.named_parameters() if p.ndim > 1}
    return {name: p.detach().abs() >= p.detach().abs().quantile(1 - share) for name, p in weights.items()}


def _train_arm(
    arm: str, start: nn.Sequential, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], steps: int, seed: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """The network after all steps, and the one of the 10 points in time with the lowest loss on `held`."""
    network = copy.deepcopy(start)
    if arm == "gelu":
        network[1] = nn.GELU()
    elif arm == "dropout":
        network = nn.Sequential(*network[:2], nn.Dropout(0.1), network[2])
    elif arm.startswith("top"):
        convert_topk(network, int(arm.removeprefix("top")))
    kept: dict[str, Any] = {"loss": float("inf"), "hidden": None, "masks": {}}
    if arm == "l1":
        network[1].register_forward_hook(lambda _, __, a: kept.update(hidden=a))

    def watch(step: int) -> None:
        if arm == "pruned" and step == steps // 2:
            kept["masks"] = _prune(network, 0.25)
        with torch.no_grad():
            for name, mask in kept["masks"].items():
                network.get_parameter(name).mul_(mask)
            if step and step % max(steps // 10, 1) == 0:
                network.eval()
                loss = float(F.cross_entropy(network(held[0]), held[1]))
                if loss < kept["loss"]:
                    kept.update(loss=loss, weights=copy.deepcopy(network.state_dict()))

    torch.manual_seed(seed)
    penalty = (lambda: L1 * kept["hidden"].mean()) if arm == "l1" else None
    smoothing = 0.1 if arm == "smoothing" else 0.0
    fit(network, batches_of(*train, seed), steps, 1e-3, smoothing=smoothing, penalty=penalty, watch=watch)
    kept["hidden"] = None
    early = copy.deepcopy(network)
    early.load_state_dict(kept["weights"])
    return network, early


def run_topk(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Top-k MLPs and other ways to sparse or robust ones."""
    n, steps = (100, 4) if scale == "smoke" else (4000, 500)
    images = garments(seed, n + n // 4, n // 2)
    generator = torch.Generator().manual_seed(seed)
    train, held = (part.flatten(1) for part in (images.train[:n], images.train[n:]))
    test, labels = images.test.flatten(1), images.test_labels
    low, high = images.train.min(), images.train.max()
    kinds: tuple[Corruption, ...] = ("gaussian", "shot", "impulse")
    shown = {
        kind: [low + (high - low) * corrupt((test - low) / (high - low), kind, s, generator) for s in SEVERITIES]
        for kind in kinds
    }
    taught = {
        share: noisy_labels(images.train_labels, share / 100, CLASSES, generator) if share else images.train_labels
        for share in (0, 40, 80)
    }
    start = mlp(seed, 512, train.shape[1])
    values: Values = {}
    arrays: Arrays = {}
    for arm in TOP:
        values[arm] = {}
        for share, y in taught.items():
            if share == 80 and arm not in MAIN:
                continue
            network, early = _train_arm(arm, start, (train, y[:n]), (held, y[n:]), steps, seed)
            with torch.inference_mode():
                logits, own = network(test), network(held)
            suffix, p = str(share or ""), logits.softmax(-1)
            values[arm] |= {
                f"acc{suffix}": float((logits.argmax(1) == labels).float().mean()),
                f"early{suffix}": accuracy(early, test, labels),
                f"ece{suffix}": ece(p, labels),
                f"nll{suffix}": float(F.cross_entropy(logits, labels)),
                f"scaled{suffix}": ece((logits / _temperature(own, y[n:])).softmax(-1), labels),
                f"fitted{suffix}": accuracy(network, train, y[:n]),
                f"nonzero{suffix}": measure(network, test).nonzero,
            }
            if not share:
                found = {kind: [accuracy(network, one, labels) for one in of] for kind, of in shown.items()}
                values[arm] |= {kind: float(np.mean(of)) for kind, of in found.items()}
                arrays[arm] = np.array(list(found.values()), np.float32)
                diagram = reliability(p, labels)
                arrays[f"{arm}_reliability"] = np.stack([diagram.confidence, diagram.accuracy]).astype(np.float32)
    coarse = [F.avg_pool2d(x, 2).flatten(1) for x in (images.train, images.test)]
    start = mlp(seed, 512, coarse[0].shape[1])
    for arm in MAIN:
        parts = ((coarse[0][:n], taught[40][:n]), (coarse[0][n:], taught[40][n:]))
        network, _ = _train_arm(arm, start, *parts, steps, seed)
        values[f"{arm}_coarse"] = {
            "acc40": accuracy(network, coarse[1], labels),
            "fitted40": accuracy(network, *parts[0]),
        }
    return values, arrays


def draw_topk(cells: Cells) -> "Figure":
    """Accuracy with label noise and corruptions, calibration, and every arm as a difference from dense."""
    from matplotlib.figure import Figure

    figure = Figure((13, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 0.9, 1.5])
    shown = {"acc": "clean", "acc40": "40 % labels\nrandom", "acc80": "80 % labels\nrandom"}
    shown |= {"gaussian": "Gaussian", "shot": "shot", "impulse": "impulse"}
    for place, metric in enumerate(shown):
        for shift, arm in enumerate(MAIN):
            values, at = cells.metric(arm, metric), place + 0.27 * shift
            left.bar(at, values.mean(), 0.25, color=f"C{shift}", label=None if place else arm)
            left.plot([at] * len(values), values, ".", color="0.2", markersize=2)
    left.set_xticks(np.arange(len(shown)) + 0.27, list(shown.values()), fontsize=8)
    left.set(ylabel="accuracy on test images", ylim=(0, 1.08))
    left.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    middle.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for shift, arm in enumerate(MAIN):
        runs = np.stack([arrays[f"{arm}_reliability"] for arrays in cells.arrays.values()])
        some = np.isfinite(runs[:, 0]).all(0)
        label = f"ECE {100 * cells.metric(arm, 'ece').mean():.1f} %"
        middle.plot(runs[:, 0, some].mean(0), runs[:, 1, some].mean(0), ".-", color=f"C{shift}", label=label)
    middle.set(xlabel="confidence", ylabel="accuracy", title="reliability, clean labels")
    middle.legend(frameon=False, fontsize=8)
    names = {"acc": "accuracy", "acc40": "40 % labels random", "gaussian": "Gaussian noise", "ece": "ECE (low is good)"}
    for place, metric in enumerate(names):
        for shift, arm in enumerate(TOP[1:]):
            values = 100 * (cells.metric(arm, metric) - cells.metric("dense", metric))
            at = place + 0.13 * (shift - 2.5)
            right.plot([at] * len(values), values, ".", color=f"C{shift + 1}", markersize=4, alpha=0.6)
            right.plot([at - 0.05, at + 0.05], [values.mean()] * 2, color=f"C{shift + 1}", label=None if place else arm)
    right.axhline(0, color="0.6", linewidth=0.8)
    right.set_xticks(range(4), list(names.values()), fontsize=8)
    right.set(ylabel="points more than dense")
    right.legend(frameon=False, fontsize=7, ncols=2)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


EXPERIMENTS = {
    "emergence": Experiment(run_emergence, {"smoke": (0, 1), "cpu": range(100, 108)}, draw_emergence),
    "gradient": Experiment(run_gradient, SEEDS, draw_gradient),
    "transformers": Experiment(run_transformers, FEWER, draw_transformers),
    "top-k": Experiment(run_topk, FEWER, draw_topk),
}
