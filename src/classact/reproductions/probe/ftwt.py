"""Experiments of FTWT: groups of filters whose firing is known, and small networks on Fashion-MNIST.

`planted-groups`: images of 6 x 6 with 16 channels, which belong to one of G = 2, 4 or 8 groups; an image is positive in
its group's channels and exactly 0 in the others. Its class, of four, is a pattern within them. Two convolutions of 32
filters without biases and with block-diagonal weights are trained, only within the blocks, so that exactly the filters
of an image's group can fire: at r = 1 the share of multiplications that are needed is 1/G in the first layer and 1/G^2
in the second, which is the truth for the estimate. Nothing holds the blocks in the training with masks.

`garments`: 1,500 images of 14 x 14 pixels for training, 2,000 for the test; three convolutions with 12, 24 and 24
filters, batch norm, ReLU, two max-poolings, a linear layer; 8 epochs dense, then 12 with masks at each of five r. The
estimate comes from the training images before, what is achieved from test images after. `guess` is what a share of r
of the filters in every layer would save, without looking at the network; `by_truth_after` is what the targets would
save after the training, which differs from what is achieved by the mistakes of the heads.

`trade-off`: the same network. Whatever reduction r = 0.7 shows in the test, the rivals get the same multiplications, to
within half a percent, and the same 6 epochs from the same dense network with the same optimiser: filters by the L1
norm of their weights (`static`), by their mean response, as many in each layer as FTWT has on average (`fixed`), as
many drawn anew for every input (`random`); gates with a straight-through sigmoid that are paid for by an L1 penalty and
trained by the task (`gated`), and targets with the same share of filters for every input (`uniform`). These two cannot
be set to a reduction: they are trained at several penalties or shares, and their accuracy is interpolated at FTWT's.
A narrower network is trained from scratch over all 14 epochs (`narrow`). The dense network gets the 6 epochs as well.

`architectures`: a VGG, a ResNet and a MobileNet of 6 to 9 layers on the same images at r = 1 and 0.95.

Settings chosen in pilots (seeds 1 and 2). Learning rate of all fine-tuning 0.02, of 0.01, 0.02 and 0.05, which made no
difference to the dense network beyond chance. Heads without softmax, which is constant over the one channel of grey
images, and their learning rate 1, since in so few steps heads with 0.1 and a softmax hardly learn: at r = 0.9, where
36 % was estimated, they saved 10 %, without a softmax 15 % at the rate 0.1 and 27 % at 1. The gates' rate is 1 as well,
of 0.1 and 1 the better one, and their penalties are such that they save about as much. r is 0.7 in `trade-off`, since
with 0.8 all but the gates and random filters were within chance of the dense network. In `garments` 12 epochs in place
of 6, in which heads had not learned their targets; in `planted-groups` weights with a positive mean and the learning
rates, since without them filters died.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from classact.evidence.experiment import Cells, Experiment, Values
from classact.probe.ftwt import (
    DynamicConv,
    DynamicFlops,
    FTWTNetwork,
    LayerStep,
    choose_r,
    convert_ftwt,
    estimate_reduction,
    evaluate_ftwt,
    filter_response,
    fit_ftwt,
)
from classact.reproductions.nn.small_images import Garments, accuracy, garments, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = {"smoke": (0, 1), "cpu": range(100, 110)}
GROUPS, PATTERNS = (2, 4, 8), 4
FULL = (12, 24, 24)
GRID = (0.97, 0.93, 0.9, 0.85, 0.8)
R = 0.7
PENALTIES = (0.3, 0.6, 1.0)
EPOCHS = (8, 6)
RATE, TUNE_RATE, HEAD_RATE = 0.05, 0.02, 1.0


class Batches:
    """Shuffled anew in every epoch, equally for equal seeds."""

    def __init__(self, x: Tensor, y: Tensor, seed: int, size: int = 64) -> None:
        self.x, self.y, self.size = x, y, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.x), generator=self.generator).split(self.size):
            yield self.x[chosen], self.y[chosen]


def steps_of(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In order, for tests."""
    return list(zip(x.split(500), y.split(500), strict=True))


def with_masks(
    dense: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int, r: float, **settings: Any
) -> FTWTNetwork:
    """FTWT from a dense network."""
    options: dict[str, Any] = {
        "lr": TUNE_RATE,
        "head_lr": HEAD_RATE,
        "milestones": (max(1, 3 * epochs // 4),),
        "softmax": False,
    } | settings
    return fit_ftwt(dense, Batches(x, y, seed), r=r, epochs=epochs, seed=seed, **options).network


def tune(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int,
    epochs: int,
    cost: Callable[[], Tensor] | None = None,
    penalty: float = 0.0,
) -> nn.Module:
    """The same epochs and optimiser without heads that learn by themselves."""
    heads = model.heads() if cost is not None and isinstance(model, FTWTNetwork) else []
    own = {id(p) for p in heads}
    backbone = torch.optim.SGD(
        [p for p in model.parameters() if id(p) not in own], TUNE_RATE, momentum=0.9, weight_decay=5e-4
    )
    optimisers = [backbone, *([torch.optim.SGD(heads, HEAD_RATE, momentum=0.9)] if heads else [])]
    schedule = torch.optim.lr_scheduler.MultiStepLR(backbone, [max(1, 3 * epochs // 4)])
    batches = Batches(x, y, seed)
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            (loss if cost is None else loss + penalty * cost()).backward()
            for optimiser in optimisers:
                optimiser.step()
        schedule.step()
    return model.eval()


# planted groups


def planted_images(seed: int, groups: int, n: int) -> tuple[Tensor, Tensor]:
    """Images (n, 16, 6, 6) that are positive in the channels of one group, and the pattern's number (n,)."""
    generator = torch.Generator().manual_seed(seed)
    width = 16 // groups
    patterns = torch.rand(groups, PATTERNS, width, 6, 6, generator=generator)
    group = torch.randint(groups, (n,), generator=generator)
    y = torch.randint(PATTERNS, (n,), generator=generator)
    x = torch.zeros(n, groups, width, 6, 6)
    noise = torch.randn(n, width, 6, 6, generator=generator).abs()
    x[torch.arange(n), group] = 0.5 * patterns[group, y] + 0.25 * noise
    return x.flatten(1, 2), y


def planted_network(seed: int, groups: int) -> nn.Sequential:
    """Filters of a group see channels of that group only, and so it stays where this network is trained."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.Conv2d(32, 32, 3, padding=1, bias=False)]
    for conv in layers:
        rows, columns = (torch.arange(c) * groups // c for c in conv.weight.shape[:2])
        block = (rows[:, None] == columns).float()[:, :, None, None]
        with torch.no_grad():
            spread = (2 / (9 * conv.in_channels / groups)) ** 0.5
            conv.weight.normal_(spread / 4, spread).mul_(block)  # on positive inputs all fire
        conv.weight.register_hook(lambda gradient, block=block: gradient * block)
    return nn.Sequential(
        layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(288, PATTERNS)
    )


def run_planted(seed: int, scale: str) -> Values:
    """Estimates beside what is known and what is achieved."""
    n, epochs = (64, 2) if scale == "smoke" else (1500, 6)
    values: Values = {}
    for groups in GROUPS:
        x, y = planted_images(seed, groups, 2 * n)
        dense = train(planted_network(seed, groups), x[:n], y[:n], seed=seed, epochs=epochs, rate=3e-3, batch=64)
        held = steps_of(x[n:], y[n:])
        for r in (1.0, 0.9):
            estimate = float(estimate_reduction(dense, [x[:n]], [r]).reduction.mean())
            network = with_masks(dense, x[:n], y[:n], seed, epochs, r, lr=5e-3)
            found = evaluate_ftwt(network, held)
            arm = f"g{groups}_r{100 * r:.0f}"
            values[arm] = {
                "estimate": estimate,
                "achieved": found["reduction"],
                "gap": abs(found["reduction"] - estimate),
                "mask_accuracy": found["mask_accuracy"],
                "accuracy": found["accuracy"],
                "dense_accuracy": accuracy(dense, x[n:], y[n:]),
            }
            if r == 1:
                truth = 1 - (16 * 32 / groups + (32 / groups) ** 2) / (16 * 32 + 32 * 32)
                values[arm] |= {"truth": truth, "truth_gap": abs(estimate - truth)}
    return values | {"all": _agreement(list(values.values()))}


def _agreement(arms: Sequence[dict[str, float]]) -> dict[str, float]:
    pairs = np.array([[arm["estimate"], arm["achieved"]] for arm in arms]).T
    gaps = np.abs(pairs[0] - pairs[1])
    return {"rank": float(spearmanr(*pairs).statistic), "gap": float(gaps.mean()), "largest_gap": float(gaps.max())}


# garments


def network(widths: Sequence[int] = FULL) -> nn.Sequential:
    """Three convolutions for images of 14 x 14."""
    a, b, c = widths

    def part(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

    return nn.Sequential(
        *part(1, a), nn.MaxPool2d(2), *part(a, b), *part(b, c), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9 * c, 10)
    )  # fmt: skip


POSITIONS = (196, 49, 49)


def macs(widths: Sequence[float]) -> float:
    """Multiplications of the three convolutions."""
    inputs = (1, *widths[:-1])
    return sum(9 * p * a * b for p, a, b in zip(POSITIONS, inputs, widths, strict=True))


def matched(widths: Sequence[float], reduction: float) -> tuple[int, ...]:
    """Whole numbers of filters, each within 2 of those given, whose multiplications come nearest to a reduction."""
    around = [range(max(1, round(w) - 2), min(m, round(w) + 2) + 1) for w, m in zip(widths, FULL, strict=True)]
    wanted = (1 - reduction) * macs(FULL)

    def distance(chosen: tuple[int, ...]) -> tuple[float, float]:
        off = abs(macs(chosen) - wanted) / macs(FULL)
        return round(off / 0.005), sum(abs(a - b) for a, b in zip(chosen, widths, strict=True))

    return min(product(*around), key=distance)


def scaled(reduction: float) -> tuple[float, ...]:
    """All widths times one factor."""
    factors = np.linspace(0.05, 1, 400)
    off = [abs(1 - macs(f * np.array(FULL)) / macs(FULL) - reduction) for f in factors]
    return tuple(factors[int(np.argmin(off))] * np.array(FULL))


def _prepared(seed: int, scale: str) -> tuple[Garments, nn.Module, tuple[int, int]]:
    n_train, n_test, epochs = (64, 100, (1, 2)) if scale == "smoke" else (1500, 2000, EPOCHS)
    images = garments(seed, n_train, n_test, pool=2)
    torch.manual_seed(seed)
    dense = train(
        network(), images.train, images.train_labels, seed=seed, epochs=epochs[0], rate=RATE, momentum=0.9,
        weight_decay=5e-4, batch=64,
    )  # fmt: skip
    return images, dense, epochs


def run_garments(seed: int, scale: str) -> Values:
    """Estimates before and reductions after training at five r."""
    images, dense, (_, epochs) = _prepared(seed, scale)
    epochs *= 2
    x, y, held = images.train, images.train_labels, steps_of(images.test, images.test_labels)
    report = estimate_reduction(dense, [(x, y)], GRID)
    values: Values = {}
    for number, r in enumerate(GRID):
        masked = with_masks(dense, x, y, seed, epochs, r)
        found = evaluate_ftwt(masked, held)
        estimate = float(report.reduction[number].mean())
        after = float(estimate_reduction(masked, [images.test], [r]).reduction.mean())
        values[f"r{100 * r:.0f}"] = {
            "estimate": estimate,
            "achieved": found["reduction"],
            "by_truth_after": after,
            "accuracy": found["accuracy"],
            "mask_accuracy": found["mask_accuracy"],
            "untrained_accuracy": evaluate_ftwt(convert_ftwt(dense, r), held, "truth")["accuracy"],
            "gap": abs(found["reduction"] - estimate),
            "guess_gap": abs(found["reduction"] - 1 + macs([r * width for width in FULL]) / macs(FULL)),
        }
    arms = list(values.values())
    values["all"] = _agreement(arms) | {
        "guess_gap": float(np.mean([arm["guess_gap"] for arm in arms])),
        "largest_target_gap": max(abs(arm["by_truth_after"] - arm["estimate"]) for arm in arms),
    }
    return values


class GatedConv(DynamicConv):
    """The same head, trained by the task through a straight-through estimator, and paid for by a penalty."""

    probability: Tensor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Output times gates."""
        o = self.act(self.bn(self.conv(x)))
        logits = self.head(x)
        self.probability = logits.sigmoid()
        hard = self.choose(logits)
        if self.observer is not None:
            self.observer(LayerStep(hard, o.shape[2] * o.shape[3]))
        return o * (hard + self.probability - self.probability.detach())[:, :, None, None]


def gated(dense: nn.Module, seed: int) -> tuple[FTWTNetwork, Callable[[], Tensor]]:
    """A network with gates, all open at first, and the mean over layers of their mean probability."""
    torch.manual_seed(seed)
    converted = convert_ftwt(dense)
    for name, layer in converted.layers.items():
        gate = GatedConv(layer.conv, layer.bn, layer.act, softmax=False)
        nn.init.constant_(gate.head.linear.bias, 1.0)
        converted.body.set_submodule(name, gate)
    gates = [gate for gate in converted.layers.values() if isinstance(gate, GatedConv)]
    return converted, lambda: torch.stack([gate.probability.mean() for gate in gates]).mean()


def chosen_masks(kind: str, dense: nn.Module, x: Tensor, counts: Sequence[int], seed: int) -> dict[str, Any]:
    """For every layer a function that says which `counts` filters are on."""
    converted = convert_ftwt(dense)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scores = {n: layer.conv.weight.abs().sum((1, 2, 3)) for n, layer in converted.layers.items()}
    if kind == "fixed":
        converted.eval()
        with torch.no_grad(), converted.masks_from("all"):
            for name, layer in converted.layers.items():
                kept: list[Tensor] = []
                handle = layer.register_forward_hook(lambda _, __, o, kept=kept: kept.append(filter_response(o)))
                converted(x[:1000])
                handle.remove()
                scores[name] = kept[0].mean(0)

    def on(score: Tensor, count: int) -> Tensor:
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count).indices, True)

    def draw(count: int) -> Callable[[Tensor], Tensor]:
        return lambda o: on(torch.rand(o.shape[:2], generator=generator).to(o.device), count)

    if kind == "random":
        return {name: draw(count) for name, count in zip(converted.layers, counts, strict=True)}
    same = {name: on(scores[name], count)[None] for name, count in zip(converted.layers, counts, strict=True)}
    return {name: lambda o, mask=mask: mask.to(o.device) for name, mask in same.items()}


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """Accuracy at a reduction, on straight lines between points; beyond them that of the last."""
    return float(np.interp(at, *np.array(sorted(points)).T))


def run_trade_off(seed: int, scale: str) -> Values:
    """FTWT and its rivals at equal multiplications."""
    images, dense, (before, epochs) = _prepared(seed, scale)
    x, y, held = images.train, images.train_labels, steps_of(images.test, images.test_labels)
    longer = tune(copy.deepcopy(dense), x, y, seed, epochs)
    values: Values = {"dense": {"accuracy": accuracy(longer, images.test, images.test_labels), "reduction": 0.0}}
    curve = [(0.0, values["dense"]["accuracy"])]
    for penalty in PENALTIES:
        model, cost = gated(dense, seed)
        tune(model, x, y, seed, epochs, cost, penalty)
        found = evaluate(model, held)
        curve.append((found["reduction"], found["accuracy"]))
        values[f"gated_{penalty:g}"] = {"accuracy": found["accuracy"], "reduction": found["reduction"]}
    masked = with_masks(dense, x, y, seed, epochs, R)
    values["ftwt"] = evaluate_ftwt(masked, held)
    values["joint"] = evaluate_ftwt(with_masks(dense, x, y, seed, epochs, R, mode="joint"), held)
    reduction = values["ftwt"]["reduction"]
    with torch.no_grad(), masked.observed() as steps:
        masked(images.test)
    counts = [float(step.mask.float().sum(1).mean()) for step in steps.values()]
    for kind, widths in (("static", scaled(reduction)), ("fixed", counts), ("random", counts)):
        rival = convert_ftwt(dense)
        for name, choose in chosen_masks(kind, dense, x, matched(widths, reduction), seed).items():
            rival.layers[name].masks = choose
        values[kind] = evaluate(tune(rival, x, y, seed, epochs), held)
    widths = matched(scaled(reduction), reduction)
    torch.manual_seed(seed)
    narrow = train(
        network(widths), x, y, seed=seed, epochs=before + epochs, rate=RATE, momentum=0.9, weight_decay=5e-4, batch=64
    )  # fmt: skip
    values["narrow"] = {
        "accuracy": accuracy(narrow, images.test, images.test_labels),
        "reduction": 1 - macs(widths) / macs(FULL),
    }
    uniform = [(0.0, values["dense"]["accuracy"])]
    for target in (reduction - 0.03, reduction + 0.12):
        share, _ = choose_r(dense, [x], min(max(target, 0.02), 0.98), gt="uniform", tolerance=0.01)
        other = evaluate_ftwt(with_masks(dense, x, y, seed, epochs, share, gt="uniform"), held)
        uniform.append((other["reduction"], other["accuracy"]))
    for kind, points in (("uniform", uniform), ("gated", curve)):
        farthest = max(point[0] for point in points)
        values[kind] = {"accuracy": interpolated(points, reduction), "reduction": reduction, "farthest": farthest}
    return values


def evaluate(rival: nn.Module, held: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and reduction with the masks that the network has now."""
    if not isinstance(rival, FTWTNetwork):
        raise TypeError(f"rival: expected a converted network, got {type(rival).__name__}")
    flops, right, saved = DynamicFlops(rival), [], []
    with torch.no_grad(), rival.observed() as steps:
        for images, labels in held:
            right.append((rival(images).argmax(1) == labels).double())
            saved.append(flops.of(steps).reduction())
    return {"accuracy": float(torch.cat(right).mean()), "reduction": float(torch.cat(saved).mean())}


# architectures


def _conv(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


class Block(nn.Module):
    """Basic block of a ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_conv(c_in, c_out, 3, stride), *_conv(c_out, c_out)[:2])
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(c_in, c_out, 1, stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        """Branch plus shortcut."""
        return F.relu(self.branch(x) + self.shortcut(x))


def _vgg() -> list[nn.Module]:
    return [
        *_conv(1, 12), *_conv(12, 12), nn.MaxPool2d(2), *_conv(12, 24), *_conv(24, 24), nn.MaxPool2d(2),
        *_conv(24, 48), *_conv(48, 48),
    ]  # fmt: skip


def _resnet() -> list[nn.Module]:
    return [*_conv(1, 12), Block(12, 12), Block(12, 24, 2), Block(24, 48, 2)]


def _mobilenet() -> list[nn.Module]:
    parts = _conv(1, 16)
    for c_in, c_out, stride in ((16, 32, 2), (32, 48, 1), (48, 64, 2), (64, 96, 1)):
        parts += [*_conv(c_in, c_in, 3, stride, c_in), *_conv(c_in, c_out, 1)]
    return parts


ARCHITECTURES: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "vgg": (_vgg, 48),
    "resnet": (_resnet, 48),
    "mobilenet": (_mobilenet, 96),
}


def run_architectures(seed: int, scale: str) -> Values:
    """Three kinds of networks at r = 1 and 0.95, beside the same epochs without masks."""
    n_train, n_test, epochs = (64, 100, (1, 2)) if scale == "smoke" else (1200, 2000, (6, 4))
    images = garments(seed, n_train, n_test, pool=2)
    x, y, held = images.train, images.train_labels, steps_of(images.test, images.test_labels)
    values: Values = {}
    for name, (parts, width) in ARCHITECTURES.items():
        torch.manual_seed(seed)
        fresh = nn.Sequential(*parts(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        dense = train(fresh, x, y, seed=seed, epochs=epochs[0], rate=RATE, momentum=0.9, weight_decay=5e-4, batch=64)
        longer = tune(copy.deepcopy(dense), x, y, seed, epochs[1])
        values[f"{name}_dense"] = {"accuracy": accuracy(longer, images.test, images.test_labels), "reduction": 0.0}
        for r in (1.0, 0.95):
            estimate = float(estimate_reduction(dense, [x], [r]).reduction.mean())
            masked = with_masks(dense, x, y, seed, epochs[1], r)
            values[f"{name}_r{100 * r:.0f}"] = evaluate_ftwt(masked, held) | {"estimate": estimate}
    return values


# figures


def _joined(axes: Any, cells: Cells, arms: dict[str, str]) -> None:
    """Estimate against what was achieved, a point a seed."""
    for number, (arm, label) in enumerate(arms.items()):
        estimate, achieved = cells.metric(arm, "estimate"), cells.metric(arm, "achieved")
        axes.scatter(estimate, achieved, s=12, color=f"C{number}", label=label)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.fill_between([0, 1], [-0.08, 0.92], [0.08, 1.08], color="0.93", zorder=0, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="estimated before training", ylabel="achieved after training")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_planted(cells: Cells) -> "Figure":
    """Estimates beside the truth and beside what was achieved."""
    from matplotlib.figure import Figure

    figure = Figure((9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = [f"g{groups}_r100" for groups in GROUPS]
    for place, arm in enumerate(arms):
        left.plot([place - 0.3, place + 0.3], [cells.metric(arm, "truth")[0]] * 2, color="0.2", linewidth=1.5)
        for shift, metric, colour in ((-0.12, "estimate", "C0"), (0.12, "achieved", "C1")):
            found = cells.metric(arm, metric)
            spread = np.linspace(-0.06, 0.06, len(found))
            left.scatter(place + shift + spread, found, s=14, color=colour, label=metric if not place else None)
    left.set_xticks(range(len(arms)), [f"{groups} groups" for groups in GROUPS])
    left.set(ylim=(0, 1), ylabel="share of multiplications saved, r = 1", title="line: what is known")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.spines[["top", "right"]].set_visible(False)
    _joined(right, cells, {f"g{g}_r{r}": f"{g} groups, r = {r / 100:g}" for g in GROUPS for r in (100, 90)})
    right.set(title="band: 8 points", xlim=(0.5, 1), ylim=(0.5, 1))
    right.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_garments(cells: Cells) -> "Figure":
    """Estimate and outcome for each r, and the accuracy that is left."""
    from matplotlib.figure import Figure

    figure = Figure((9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = {f"r{100 * r:.0f}": f"r = {r:g}" for r in GRID}
    _joined(left, cells, arms)
    left.set_title("band: 8 points")
    for metric, colour, label in (
        ("accuracy", "C0", "fine-tuned, predicted masks"),
        ("untrained_accuracy", "0.5", "dense network with true masks"),
    ):
        x = [cells.metric(arm, "achieved" if colour == "C0" else "estimate").mean() for arm in arms]
        found = np.stack([cells.metric(arm, metric) for arm in arms])
        right.errorbar(x, found.mean(1), found.std(1), fmt="o-", color=colour, capsize=2, markersize=4, label=label)
    right.set(xlabel="share of multiplications saved", ylabel="accuracy")
    right.legend(frameon=False, fontsize=8, loc="lower left")
    right.spines[["top", "right"]].set_visible(False)
    return figure


RIVALS = {
    "ftwt": "FTWT, decoupled",
    "joint": "FTWT, joint",
    "uniform": "equal shares of filters",
    "fixed": "fixed, by mean response",
    "static": "fixed, by L1 norm",
    "random": "random for every input",
    "gated": "gates with penalty",
    "narrow": "narrower network",
}


def draw_trade_off(cells: Cells) -> "Figure":
    """Accuracy against the dense network at equal reductions."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    dense = cells.metric("dense", "accuracy")
    for place, name in enumerate(RIVALS):
        lost = 100 * (cells.metric(name, "accuracy") - dense)
        spread = np.linspace(-0.15, 0.15, len(lost))
        axes.scatter(lost, place + spread, s=12, color="C0" if name == "ftwt" else "0.55")
        axes.plot([lost.mean()] * 2, [place - 0.3, place + 0.3], color="C3", linewidth=1.5)
    axes.axvline(0, color="0.8", linewidth=0.8)
    saved = cells.metric("ftwt", "reduction").mean()
    axes.set(title=f"r = {R:g}: {saved:.0%} of the multiplications saved", xlabel="accuracy against dense, points")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(RIVALS)), list(RIVALS.values()))
    axes.invert_yaxis()
    return figure


def draw_architectures(cells: Cells) -> "Figure":
    """Accuracy against reduction for three networks."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4.2), layout="constrained")
    axes = figure.subplots()
    dense = {name: cells.metric(f"{name}_dense", "accuracy") for name in ARCHITECTURES}
    for number, name in enumerate(ARCHITECTURES):
        for marker, r in (("o", 100), ("s", 95)):
            arm = f"{name}_r{r}"
            lost = 100 * (cells.metric(arm, "accuracy") - dense[name])
            label = f"{name}, r = {r / 100:g}"
            axes.scatter(cells.metric(arm, "reduction"), lost, s=16, marker=marker, color=f"C{number}", label=label)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="share of multiplications saved", ylabel="accuracy against dense, points")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


EXPERIMENTS = {
    "planted-groups": Experiment(run_planted, SEEDS, draw_planted),
    "garments": Experiment(run_garments, SEEDS, draw_garments),
    "trade-off": Experiment(run_trade_off, SEEDS, draw_trade_off),
    "architectures": Experiment(run_architectures, SEEDS, draw_architectures),
}
