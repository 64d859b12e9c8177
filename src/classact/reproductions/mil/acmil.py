"""Experiments of ACMIL: a shortcut that hides hard evidence, and cross-validation on three classic real sets.

Settings fixed before the evidence: M = 5 branches, STKIM of the 5 largest of 40 scores with p = 0.6 (the card's), and
the optimiser of `protocols.train`, the same for every arm. On the real sets the paper's M = 5, k = 10 with p = 0.6, and
p = 0, which the authors found more stable at times.
"""

from typing import TYPE_CHECKING

from torch import nn

from classact.evidence.experiment import Cells, Experiment, Values
from classact.mil.acmil import ACMIL, ACMILLoss
from classact.mil.aem import Subsample
from classact.mil.attention import ABMIL
from classact.mil.model import BagCrossEntropy, MILLoss
from classact.mil.pooling import MeanMIL
from classact.reproductions.mil.protocols import (
    FOLDS,
    make_fold,
    make_shortcut_bags,
    measure,
    strip_plot,
    train,
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


def run_shortcut(seed: int, scale: str) -> Values:
    """Train every arm on the same bags from the same seed."""
    bags = make_shortcut_bags(seed, scale)
    return {name: measure(train(factory, loss, bags, seed, scale), bags) for name, (factory, loss) in ARMS.items()}


def draw_shortcut(cells: Cells) -> "Figure":
    """AUC on bags with hard evidence only, concentration of the attention, and where it lies."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    strip_plot(left, {arm: cells.metric(arm, "auc_hard") for arm in ARMS}, "AUC, hard witnesses only")
    strip_plot(middle, {arm: cells.metric(arm, "top5") for arm in ARMS}, "attention of the top 5 of 40")
    bottom = 0.0
    for kind, color in (("easy_mass", "C2"), ("hard_mass", "C3")):
        heights = [cells.metric(arm, kind).mean() for arm in ARMS]
        right.bar(list(ARMS), heights, bottom=bottom, color=color, label=kind.replace("_mass", " witnesses"))
        bottom = heights  # type: ignore[assignment]
    right.tick_params(axis="x", rotation=90)
    right.set_ylabel("attention mass, positive bags")
    right.legend(frameon=False, fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
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


def draw_folds(cells: Cells) -> "Figure":
    """AUC of every fold."""
    from matplotlib.figure import Figure

    figure = Figure((4, 3.5), layout="constrained")
    strip_plot(figure.subplots(), {arm: cells.metric(arm, "auc") for arm in ("abmil", "acmil", "acmil_p0")}, "AUC")
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
}
