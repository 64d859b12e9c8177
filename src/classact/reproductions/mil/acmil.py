"""Experiments of ACMIL: a shortcut that hides hard evidence, and cross-validation on three classic real sets.

Settings fixed before the evidence: M = 5 branches, STKIM of the 5 largest of 40 scores with p = 0.6, and the optimiser
of `protocols.train`, the same for every arm. On the real sets the paper's M = 5, k = 10 with p = 0.6, and p = 0, which
the authors found more stable at times.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from classact.evidence.experiment import Cells, Experiment, Values
from classact.mil.acmil import ACMIL, ACMILLoss
from classact.mil.aem import Subsample
from classact.mil.attention import ABMIL
from classact.mil.model import BagCrossEntropy, MILLoss
from classact.mil.pooling import MeanMIL
from classact.reproductions.mil.protocols import (
    FOLDS,
    ShortcutBags,
    make_camelyon16_split,
    make_fold,
    make_shortcut_bags,
    measure,
    strip_plot,
    train,
    train_as_published,
    train_on_fold,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM, HIDDEN = 64, 32


def _acmil(branches: int, top_k: int) -> nn.Module:
    return ACMIL(64, 2, dim=DIM, hidden=HIDDEN, branches=branches, top_k=top_k, mask_drop=0.6)


ARMS = {
    "mean": (lambda: MeanMIL(64, 2, dim=DIM), BagCrossEntropy()),
    "abmil": (lambda: ABMIL(64, 2, dim=DIM, hidden=HIDDEN, gated=True), BagCrossEntropy()),
    # hides as many instances as STKIM does, 3 of 40, but anywhere in the bag
    "random_masking": (
        lambda: Subsample(ABMIL(64, 2, dim=DIM, hidden=HIDDEN, gated=True), ratio=37 / 40),
        BagCrossEntropy(),
    ),
    "stkim": (lambda: _acmil(1, 5), ACMILLoss()),
    "mba": (lambda: _acmil(5, 0), ACMILLoss()),
    "mba_no_diversity": (lambda: _acmil(5, 0), ACMILLoss(diversity_weight=0)),
    "acmil": (lambda: _acmil(5, 5), ACMILLoss()),
    "acmil_no_diversity": (lambda: _acmil(5, 5), ACMILLoss(diversity_weight=0)),
}


def run_shortcut(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Train every arm on the same bags from the same seed."""
    bags = make_shortcut_bags(seed, scale)
    values: Values = {}
    arrays: dict[str, np.ndarray] = {}
    for name, (factory, loss) in ARMS.items():
        model = train(factory, loss, bags, seed, scale)
        values[name] = measure(model, bags)
        arrays |= {f"{key}_{name}": array for key, array in _attention(model, bags).items()}
    return values, arrays


@torch.inference_mode()
def _attention(model: nn.Module, bags: ShortcutBags) -> dict[str, np.ndarray]:
    """Mean cumulative attention of the most attended instances, and what each branch attends to, on test bags.

    ``branches`` is (M, 3): mass of each branch on background, easy and hard witnesses of positive bags, the branch with
    the largest mass on easy witnesses first.
    """
    test = bags.test["both"]
    output = model.eval()(torch.stack([bag.x for bag in test]))
    found = {"cumulative": output.attention.sort(dim=1, descending=True).values.cumsum(1).mean(0).numpy()}
    if hasattr(output, "attention_map_logits"):
        maps = output.attention_map_logits.softmax(-1).mean(2)[torch.from_numpy(test.labels == 1)]
        kinds = torch.stack([torch.as_tensor(bag.instance_labels) for bag in test if bag.label == 1])
        mass = torch.stack([(maps * (kinds == k).unsqueeze(1)).sum(2).mean(0) for k in range(3)], dim=1)
        found["branches"] = mass[mass[:, 1].argsort(descending=True)].numpy()
    return found


def draw_shortcut(cells: Cells) -> "Figure":
    """AUC on bags with hard evidence only, cumulative attention, where it lies, and what the branches attend to."""
    from matplotlib.figure import Figure

    figure = Figure((11, 8), layout="constrained")
    (strip, curves), (bars, maps) = figure.subplots(2, 2)
    strip_plot(strip, {arm: cells.metric(arm, "auc_hard") for arm in ARMS}, "AUC, hard witnesses only")

    for index, arm in enumerate(ARMS):
        mean = np.mean([arrays[f"cumulative_{arm}"] for arrays in cells.arrays.values()], axis=0)
        curves.plot(range(1, len(mean) + 1), mean, color=f"C{index}", label=arm)
    curves.set_xlabel("most attended instances of a test bag")
    curves.set_ylabel("cumulative attention")
    curves.legend(frameon=False, fontsize=8)

    bottom = np.zeros(len(ARMS))
    for kind, color in (("easy_mass", "C2"), ("hard_mass", "C3")):
        heights = np.array([cells.metric(arm, kind).mean() for arm in ARMS])
        bars.bar(list(ARMS), heights, bottom=bottom, color=color, label=kind.replace("_mass", " witnesses"))
        bottom += heights
    bars.set_xticks(range(len(ARMS)), list(ARMS), rotation=35, ha="right")
    bars.set_ylim(0, 1.2)
    bars.set_ylabel("attention mass, positive test bags")
    bars.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")

    arms = ("mba_no_diversity", "mba", "acmil_no_diversity", "acmil")
    table = [np.mean([arrays[f"branches_{arm}"] for arrays in cells.arrays.values()], axis=0) for arm in arms]
    image = np.concatenate(table)
    maps.imshow(image, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(image):
        maps.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k")
    branches = len(table[0])
    maps.set_xticks(range(3), ["background", "easy witnesses", "hard witnesses"])
    labels = [arm.replace("_no_", "\nno ") for arm in arms]
    maps.set_yticks([branches * i + (branches - 1) / 2 for i in range(len(arms))], labels)
    for i in range(1, len(arms)):
        maps.axhline(branches * i - 0.5, color="k", linewidth=1)
    maps.set_title("attention of each branch (sorted within a seed)", fontsize=9)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_fold(name: str, seed: int, scale: str) -> Values:
    """One fold of one real set."""
    fold = make_fold(name, seed, scale)

    def arm(factory: object, loss: MILLoss) -> dict[str, float]:
        return train_on_fold(factory, loss, fold, seed, scale)[1]  # type: ignore[arg-type]

    return {
        "abmil": arm(lambda d: ABMIL(d, 2, dim=DIM, hidden=DIM, gated=True), BagCrossEntropy()),
        "acmil": arm(lambda d: ACMIL(d, 2, dim=DIM, hidden=DIM), ACMILLoss()),
        "acmil_p0": arm(lambda d: ACMIL(d, 2, dim=DIM, hidden=DIM, mask_drop=0), ACMILLoss()),
    }


def run_ucsb(seed: int, scale: str) -> Values:
    """H&E tissue of breast cancer."""
    return run_fold("ucsb_breast_cancer", seed, scale)


def run_elephant(seed: int, scale: str) -> Values:
    """Segments of photos."""
    return run_fold("elephant", seed, scale)


def run_musk1(seed: int, scale: str) -> Values:
    """Conformations of molecules."""
    return run_fold("musk1", seed, scale)


def run_camelyon16(seed: int, scale: str) -> Values:  # noqa: ARG001 - only at paper scale
    """The paper's protocol on its own features."""
    split = make_camelyon16_split(seed)
    arms = {
        "abmil": (lambda d: ABMIL(d, 2, gated=True), BagCrossEntropy()),
        "acmil": (lambda d: ACMIL(d, 2), ACMILLoss()),
        "acmil_p0": (lambda d: ACMIL(d, 2, mask_drop=0), ACMILLoss()),
    }
    return {name: train_as_published(factory, loss, split, seed)[0] for name, (factory, loss) in arms.items()}


def draw_folds(cells: Cells, folds: bool = True) -> "Figure":
    """AUC of every fold, or seed."""
    from matplotlib.figure import Figure

    figure = Figure((4, 3.5), layout="constrained")
    arms = ("abmil", "acmil", "acmil_p0")
    strip_plot(figure.subplots(), {arm: cells.metric(arm, "auc") for arm in arms}, "AUC", folds)
    return figure


def _on_folds(run: object) -> Experiment:
    # 10 repeats of 5 folds of one data set; a validation part counts as training
    seeds = {"smoke": range(2), "cpu": range(100, 150)}
    return Experiment(run, seeds, draw_folds, test_train_ratio=1 / (FOLDS - 1))  # type: ignore[arg-type]


EXPERIMENTS = {
    "shortcut-bags": Experiment(run_shortcut, {"smoke": range(2), "cpu": range(100, 110)}, draw_shortcut),
    "ucsb": _on_folds(run_ucsb),
    "elephant": _on_folds(run_elephant),
    "musk1": _on_folds(run_musk1),
    "camelyon16": Experiment(run_camelyon16, {"paper": range(100, 105)}, partial(draw_folds, folds=False)),
}
