"""Experiments of SC-MIL: remedies for imbalance on subtype bags, several degrees of imbalance, and two real sets.

Settings fixed before the evidence. Bags of Fashion-MNIST, 150 of the majority class (T-shirt) and 15 of each minority
class (shirt, dress) at imbalance ratio 10; 360 steps of 32 bags for every arm, AdamW with the learning rate falling
along half a cosine, last weights. Every arm has a grid of four settings, and the one with the best macro F1 on 50
validation bags of each class is taken: four learning rates where the remedy has no parameter of its own, else two
learning rates times two values of that parameter. Of 0.001, 0.003, 0.01 and 0.03 those two were the best on the
validation bags of pilots (seeds 0 to 2; two stages take those of SC-MIL). Nothing is chosen on the shifted bags.
On the real sets every arm has two learning rates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from classact.data.bags import BagDataset, BagSubset
from classact.data.subtype import subtype_bags
from classact.evidence.experiment import Cells, Experiment, Values
from classact.mil.attention import ABMIL
from classact.mil.imbalance import CosineClassifier, FocalLoss, LDAMLoss, LogitAdjustment, make_imbalanced
from classact.mil.lit import BagPredictions, fit_bags, predict_bags
from classact.mil.model import BagCrossEntropy, MILLoss, Standardized
from classact.mil.sampler import BalancedBagSampler
from classact.mil.scmil import SCMIL, SCMILLoss, fit_decoupled
from classact.reproductions.mil.protocols import FOLDS, make_fold, strip_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM, HIDDEN, PROJECTION = 64, 32, 32
BATCH, STEPS, WEIGHT_DECAY = 32, 360, 1e-4
MAJORITY, MINORITY, CLASSES = 0, (1, 2), 3
RATIOS, RATIO_ARMS = (1, 5, 10, 20), ("cross_entropy", "balanced", "scmil")
Counts = np.ndarray
Sampler = Literal["random", "balanced"]


@dataclass(frozen=True)
class Arm:
    """A remedy: how bags are drawn, the network and loss for class counts and a value of its parameter, and a grid."""

    sampler: Sampler
    make: Callable[[Counts, float], tuple[nn.Module, MILLoss]]
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    own: tuple[float, ...] = (0.0,)

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Pairs of learning rate and parameter, four for every arm."""
        return [(lr, own) for lr in self.rates for own in self.own]


def _plain(loss: MILLoss) -> tuple[nn.Module, MILLoss]:
    return ABMIL(64, CLASSES, dim=DIM, hidden=HIDDEN, gated=True), loss


def _cosine(loss: MILLoss) -> tuple[nn.Module, MILLoss]:
    model = ABMIL(64, CLASSES, dim=DIM, hidden=HIDDEN, gated=True)
    model.classifier = CosineClassifier(DIM, CLASSES)
    return model, loss


def _contrastive(temperature: float, **options: Any) -> tuple[nn.Module, MILLoss]:
    model = SCMIL(64, CLASSES, dim=DIM, hidden=HIDDEN, projection=PROJECTION, instances=None)
    return model, SCMILLoss(temperature, **options)


def _inverse(counts: Counts) -> Tensor:
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)


FAST, SLOW = (1e-2, 3e-2), (1e-3, 1e-2)
TAUS = (0.1, 1.0)
ARMS = {
    "cross_entropy": Arm("random", lambda _, __: _plain(BagCrossEntropy())),
    "weighted": Arm("random", lambda counts, _: _plain(BagCrossEntropy(_inverse(counts)))),
    "balanced": Arm("balanced", lambda _, __: _plain(BagCrossEntropy())),
    "focal": Arm("random", lambda _, gamma: _plain(FocalLoss(gamma)), FAST, (1.0, 2.0)),
    "ldam_drw": Arm("random", lambda counts, margin: _cosine(LDAMLoss(counts, margin)), (3e-3, 1e-2), (0.5, 1.0)),
    "logit_adjustment": Arm("random", lambda counts, tau: _plain(LogitAdjustment(counts, tau)), FAST, (1.0, 2.0)),
    "scmil_random": Arm("random", lambda _, tau: _contrastive(tau), FAST, TAUS),
    "scmil": Arm("balanced", lambda _, tau: _contrastive(tau), SLOW, TAUS),
    "constant": Arm("balanced", lambda _, tau: _contrastive(tau, curriculum="constant"), (1e-3, 3e-2), TAUS),
    "two_stage": Arm("balanced", lambda _, tau: _contrastive(tau), SLOW, TAUS),  # fit_decoupled makes its own loss
}


@dataclass(frozen=True)
class SubtypeBags:
    """Bags of one seed: imbalanced for training, as many of each class for validation and in both test sets."""

    train: BagSubset
    validation: BagDataset
    test: BagDataset
    shifted: BagDataset


def make_subtype_bags(seed: int, scale: str, ratio: float) -> SubtypeBags:
    """Draw the bags of a seed; those of a larger ratio are some of those of a smaller one's."""
    per_class, held_out, tested = (40, 10, 10) if scale == "smoke" else (150, 50, 150)
    balanced = subtype_bags([per_class] * CLASSES, seed)
    chosen = make_imbalanced(balanced.labels, ratio, MINORITY, np.random.default_rng(seed))
    return SubtypeBags(
        balanced.subset(chosen),
        subtype_bags([held_out] * CLASSES, seed + 10_000),
        subtype_bags([tested] * CLASSES, seed, "test"),
        subtype_bags([tested] * CLASSES, seed, "shifted"),
    )


def _batches(labels: Tensor, sampler: Sampler, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    balanced = BalancedBagSampler(labels, BATCH, generator)
    while True:
        if sampler == "balanced":
            yield from map(torch.tensor, balanced)
        else:
            yield from torch.randperm(len(labels), generator=generator).split(BATCH)


def _train(
    model: nn.Module, loss: MILLoss, bags: BagSubset, sampler: Sampler, lr: float, seed: int, steps: int
) -> None:
    """What `fit_bags` does, on bags of one size that lie in one tensor, and for a given number of steps."""
    x, y = torch.stack([bag.x for bag in bags]), torch.from_numpy(bags.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=WEIGHT_DECAY, fused=True)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / steps)))
    for step, chosen in zip(range(steps), _batches(y, sampler, seed), strict=False):
        optimizer.zero_grad()
        loss(model(x[chosen]), y[chosen], step / (steps - 1)).backward()
        optimizer.step()
        cosine.step()


def _macro_f1(predictions: BagPredictions, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions.probabilities.argmax(1), average="macro"))


def _measure(model: nn.Module, bags: BagDataset) -> dict[str, float]:
    from sklearn.metrics import recall_score

    predictions = predict_bags(model, bags, batch_size=len(bags))
    recall = recall_score(bags.labels, predictions.probabilities.argmax(1), average=None)
    return {
        "macro_f1": _macro_f1(predictions, bags.labels),
        "auroc": predictions.auc,
        "minority_recall": float(recall[list(MINORITY)].mean()),
        "majority_recall": float(recall[MAJORITY]),
        "loss": predictions.loss,
    }


def run_arm(name: str, bags: SubtypeBags, seed: int, scale: str) -> dict[str, float]:
    """Train an arm with every setting of its grid; the results of the one that is best on the validation bags."""
    arm, steps = ARMS[name], 24 if scale == "smoke" else STEPS
    counts = np.bincount(bags.train.labels, minlength=CLASSES)
    tried = []
    for lr, own in arm.grid if scale != "smoke" else arm.grid[-1:]:
        torch.manual_seed(seed)
        model, loss = arm.make(counts, own)
        if name == "two_stage":
            epochs = steps // -(-len(bags.train) // BATCH)
            options: dict[str, Any] = {"batch_size": BATCH, "lr": lr, "weight_decay": WEIGHT_DECAY}
            fit_decoupled(model, bags.train, seed=seed, epochs=epochs, temperature=own, **options)
        else:
            _train(model, loss, bags.train, arm.sampler, lr, seed, steps)
        validation = _measure(model, bags.validation)
        tried.append(((validation["macro_f1"], -validation["loss"]), lr, own, model))
    _, lr, own, model = max(tried, key=lambda found: found[0])
    shifted = {f"{key}_ood": value for key, value in _measure(model, bags.shifted).items()}
    return {**_measure(model, bags.test), **shifted, "lr": lr, "own": own}


def run_subtypes(seed: int, scale: str) -> Values:
    """Train every remedy on the same bags of imbalance ratio 10."""
    bags = make_subtype_bags(seed, scale, 10)
    return {name: run_arm(name, bags, seed, scale) for name in ARMS}


def run_ratios(seed: int, scale: str) -> Values:
    """Train with and without balanced batches, and SC-MIL, at every imbalance ratio."""
    values = {}
    for ratio in RATIOS:
        bags = make_subtype_bags(seed, scale, ratio)
        for name in RATIO_ARMS:
            values[f"{name}_ir{ratio}"] = run_arm(name, bags, seed, scale)
    return values


def draw_subtypes(cells: Cells) -> "Figure":
    """Macro F1 within and outside the training distribution, and how the recall of the classes is traded."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4.5), layout="constrained")
    inside, outside, trade = figure.subplots(1, 3)
    strip_plot(inside, {arm: cells.metric(arm, "macro_f1") for arm in cells.arms}, "macro F1")
    strip_plot(outside, {arm: cells.metric(arm, "macro_f1_ood") for arm in cells.arms}, "macro F1, shifted images")
    for index, arm in enumerate(cells.arms):
        x, y = (cells.metric(arm, f"{part}_recall").mean() for part in ("majority", "minority"))
        trade.scatter(x, y, color=f"C{index}", marker="os"[index // 10], s=36)
        trade.annotate(arm, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    trade.set_xlabel("recall of the majority class")
    trade.set_ylabel("recall of the minority classes")
    trade.margins(0.2)
    trade.spines[["top", "right"]].set_visible(False)
    return figure


def draw_ratios(cells: Cells) -> "Figure":
    """Macro F1 against the imbalance ratio."""
    from matplotlib.figure import Figure

    from classact.evidence.statistics import t_interval

    figure = Figure((4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for offset, name in enumerate(RATIO_ARMS):
        found = [t_interval(cells.metric(f"{name}_ir{ratio}", "macro_f1")) for ratio in RATIOS]
        mean = np.array([interval.effect for interval in found])
        ends = [mean - [interval.low for interval in found], [interval.high for interval in found] - mean]
        axes.errorbar(np.arange(len(RATIOS)) + 0.06 * (offset - 1), mean, ends, marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(RATIOS)), [str(ratio) for ratio in RATIOS])
    axes.set_xlabel("imbalance ratio")
    axes.set_ylabel("macro F1")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_fold(name: str, seed: int, scale: str, epochs: int, rates: tuple[float, ...], batch_size: int) -> Values:
    """One fold of one real set; of every arm the learning rate with the best macro F1 on the inner validation part.

    Last weights: early in SC-MIL's curriculum its validation results mean little.
    """
    fold = make_fold(name, seed, scale)
    arms: dict[str, tuple[Callable[..., nn.Module], MILLoss, Sampler]] = {
        "abmil": (partial(ABMIL, gated=True), BagCrossEntropy(), "random"),
        "balanced": (partial(ABMIL, gated=True), BagCrossEntropy(), "balanced"),
        "scmil": (partial(SCMIL, projection=DIM), SCMILLoss(), "balanced"),
    }
    options: dict[str, Any] = {"epochs": 4 if scale == "smoke" else epochs, "batch_size": batch_size}
    values = {}
    for arm, (network, loss, sampler) in arms.items():
        tried = []
        for lr in rates:
            torch.manual_seed(seed)
            model = Standardized.from_bags(network(fold.train.in_dim, 2, dim=DIM, hidden=DIM), fold.train)
            fit_bags(model, loss, fold.train, seed=seed, sampler=sampler, lr=lr, **options)
            validation, test = (predict_bags(model, part, batch_size=64) for part in (fold.validation, fold.test))
            found = {"auc": test.auc, "macro_f1": _macro_f1(test, fold.test.labels), "lr": lr}
            tried.append(((_macro_f1(validation, fold.validation.labels), -validation.loss), found))
        values[arm] = max(tried, key=lambda pair: pair[0])[1]
    return values


def run_ucsb(seed: int, scale: str) -> Values:
    """H&E tissue of breast cancer: 58 bags, nearly balanced."""
    return run_fold("ucsb_breast_cancer", seed, scale, epochs=50, rates=(1e-3, 3e-3), batch_size=16)


def run_corel_dogs(seed: int, scale: str) -> Values:
    """Photos of dogs, 100, among 1,900 others; at a rate of 0.001 plain training finds none of them in this time."""
    return run_fold("corel_dogs", seed, scale, epochs=8, rates=(1e-2, 3e-2), batch_size=32)


def draw_folds(cells: Cells) -> "Figure":
    """Macro F1 and AUC of every fold."""
    from matplotlib.figure import Figure

    figure = Figure((6.5, 3.5), layout="constrained")
    for axes, metric, label in zip(figure.subplots(1, 2), ("macro_f1", "auc"), ("macro F1", "AUC"), strict=True):
        strip_plot(axes, {arm: cells.metric(arm, metric) for arm in cells.arms}, label, folds=True)
    return figure


def _on_folds(run: Callable[[int, str], Values]) -> Experiment:
    return Experiment(run, {"smoke": range(2), "cpu": range(100, 150)}, draw_folds, test_train_ratio=1 / (FOLDS - 1))


EXPERIMENTS = {
    "subtype-bags": Experiment(run_subtypes, {"smoke": range(2), "cpu": range(100, 110)}, draw_subtypes),
    "imbalance-ratios": Experiment(run_ratios, {"smoke": range(2), "cpu": range(100, 110)}, draw_ratios),
    "ucsb": _on_folds(run_ucsb),
    "corel-dogs": _on_folds(run_corel_dogs),
}
