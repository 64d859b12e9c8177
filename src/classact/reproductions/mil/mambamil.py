"""Experiments of MambaMIL: labels that lie in the neighbourhood of instances on a grid, and two real sets.

Settings fixed before the evidence. On the grid the width is 16 (TransMIL: 32), with one block and 8 states, 32 bags a
step and a learning rate of 5e-3 for every arm; on seeds 0 and 1 TransMIL did as well with 1e-3 and 3e-3. Overfitting is
measured on a quarter of the bags, with as many steps. On the real sets, whose bags have no order, the protocol is that
of the family.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from classact.data.grid import COLUMNS, FEATURES, grid_bags
from classact.evidence.experiment import Cells, Experiment, Values
from classact.mil.attention import ABMIL
from classact.mil.lit import fit_bags, predict_bags
from classact.mil.mambamil import MambaMIL
from classact.mil.model import BagCrossEntropy
from classact.mil.pooling import MaxMIL, MeanMIL
from classact.mil.transmil import TransMIL
from classact.reproductions.mil.protocols import (
    FOLDS,
    make_camelyon16_split,
    make_fold,
    strip_plot,
    train_as_published,
    train_on_fold,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL: dict[str, Any] = {"dim": 16, "layers": 1, "state": 8, "hidden": 32}


def _mamba(**options: Any) -> Callable[[], nn.Module]:
    return lambda: MambaMIL(FEATURES, 2, **SMALL, **options)


ARMS: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: MeanMIL(FEATURES, 2, dim=16),
    "max": lambda: MaxMIL(FEATURES, 2, dim=16),
    "abmil": lambda: ABMIL(FEATURES, 2, dim=16, hidden=32),
    "transmil": lambda: TransMIL(FEATURES, 2, dim=32, heads=2, landmarks=8),
    "plain": _mamba(mode="plain"),
    "bidirectional": _mamba(mode="bidirectional"),
    "reorder_r8": _mamba(rate=COLUMNS),
    "reorder_r5": _mamba(rate=5),
    # the second set of weights without the other order
    "reorder_r1": _mamba(rate=1),
}


def run_grid(seed: int, scale: str) -> Values:
    """Train every arm on the same bags; two of them on few bags, and one on bags whose order is destroyed."""
    n_train, n_test, epochs = (60, 40, 2) if scale == "smoke" else (400, 400, 20)

    def arm(name: str, part: int = 1, shuffled: bool = False) -> dict[str, float]:
        train, test = grid_bags(n_train // part, seed, shuffled), grid_bags(n_test, seed + 10_000, shuffled)
        torch.manual_seed(seed)
        model = fit_bags(ARMS[name](), None, train, seed=seed, epochs=epochs * part, lr=5e-3, batch_size=32).model
        seen, unseen = (predict_bags(model, bags, batch_size=100) for bags in (train, test))
        return {"auc": unseen.auc, "train_auc": seen.auc, "gap": seen.auc - unseen.auc}

    cells = {name: arm(name) for name in ARMS}
    cells["reorder_r8_shuffled"] = arm("reorder_r8", shuffled=True)
    cells["transmil_few"], cells["reorder_r8_few"] = arm("transmil", part=4), arm("reorder_r8", part=4)
    return cells


def run_fold(name: str, seed: int, scale: str, epochs: int) -> Values:
    """One fold of one real set; the few epochs keep TransMIL within the time of a `cpu` run."""
    fold = make_fold(name, seed, scale)
    arms: dict[str, Callable[[int], nn.Module]] = {
        "abmil": lambda d: ABMIL(d, 2, dim=64, hidden=64),
        "transmil": lambda d: TransMIL(d, 2, dim=32, heads=2, landmarks=8),
        "plain": lambda d: MambaMIL(d, 2, dim=32, state=8, layers=1, hidden=64, mode="plain"),
        "mambamil": lambda d: MambaMIL(d, 2, dim=32, state=8, layers=1, hidden=64, rate=5),
    }
    return {
        arm: train_on_fold(factory, BagCrossEntropy(), fold, seed, scale, epochs)[1] for arm, factory in arms.items()
    }


def run_ucsb(seed: int, scale: str) -> Values:
    """H&E tissue of breast cancer."""
    return run_fold("ucsb_breast_cancer", seed, scale, epochs=15)


def run_musk1(seed: int, scale: str) -> Values:
    """Conformations of molecules."""
    return run_fold("musk1", seed, scale, epochs=12)


def run_camelyon16(seed: int, scale: str) -> Values:  # noqa: ARG001 - only at paper scale
    """Slides with coordinates, by the protocol of the family; the paper has TCGA cohorts and BRACS."""
    split = make_camelyon16_split(seed)
    arms: dict[str, Callable[[int], nn.Module]] = {
        "abmil": lambda d: ABMIL(d, 2),
        "transmil": lambda d: TransMIL(d, 2),
        "plain": lambda d: MambaMIL(d, 2, mode="plain"),
        "bidirectional": lambda d: MambaMIL(d, 2, mode="bidirectional"),
        "mambamil": lambda d: MambaMIL(d, 2, rate=5),
    }
    return {name: train_as_published(arm, BagCrossEntropy(), split, seed)[0] for name, arm in arms.items()}


def draw(cells: Cells, folds: bool = False) -> "Figure":
    """AUC of every arm."""
    from matplotlib.figure import Figure

    figure = Figure((2 + 0.5 * len(cells.arms), 3.8), layout="constrained")
    strip_plot(figure.subplots(), {arm: cells.metric(arm, "auc") for arm in cells.arms}, "AUC", folds)
    return figure


def _on_folds(run: Callable[[int, str], Values]) -> Experiment:
    seeds = {"smoke": range(2), "cpu": range(100, 150)}
    return Experiment(run, seeds, partial(draw, folds=True), test_train_ratio=1 / (FOLDS - 1))


EXPERIMENTS = {
    "vertical-neighbours": Experiment(run_grid, {"smoke": range(2), "cpu": range(100, 110)}, draw),
    "ucsb": _on_folds(run_ucsb),
    "musk1": _on_folds(run_musk1),
    "camelyon16": Experiment(run_camelyon16, {"paper": range(100, 105)}, draw),
}
