"""Experiments of AEM: a sweep of the entropy weight on shortcut bags with its rivals, and two real sets.

Settings fixed before the evidence. Every remedy has its own grid, and the value with the best AUC on a validation set
is taken: bags of the training kind (``same``, ties by loss), and bags of all three kinds (``mixed``), which is the
paper's situation in that validation and test bags are of one kind. The optimiser is the same for every arm.

Seeds 100 to 109 were used by a first version, in which ACMIL had no grid and the temperature of equal entropy was
chosen on test bags; the evidence on shortcut bags rests on seeds 200 to 209.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from classact.evidence.experiment import Cells, Experiment, Values
from classact.mil.acmil import ACMIL, ACMILLoss
from classact.mil.aem import AttentionEntropy, Subsample, attention_entropy
from classact.mil.attention import ABMIL, MultiHeadABMIL
from classact.mil.lit import predict_bags
from classact.mil.model import BagCrossEntropy, MILLoss
from classact.mil.pooling import MeanMIL
from classact.reproductions.mil.protocols import (
    FOLDS,
    ShortcutBags,
    make_camelyon16_split,
    make_fold,
    make_shortcut_bags,
    measure,
    pooled_auc,
    strip_plot,
    train,
    train_as_published,
    train_on_fold,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM, HIDDEN = 64, 32
# Pilots on seeds 0 and 1 put the best weight at 1, then the edge of the grid: 3 and 10 were added, and 16 and 32 to the
# temperatures for the same reason.
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHORT_WEIGHTS = (0.03, 0.3, 3.0)
TEMPERATURES = (2.0, 4.0, 8.0, 16.0, 32.0)
ATTENTION_DROPOUT = (0.1, 0.3, 0.5, 0.7)
WEIGHT_DECAY = (0.01, 0.1, 1.0)
ACMIL_GRID = ((0.0, 0.0), (0.0, 1.0), (0.6, 0.0), (0.6, 1.0))  # part masked, weight of the diversity loss
REAL_WEIGHTS = (0.0, 0.03, 0.1, 0.3)


def _name(weight: float) -> str:
    return "lambda_" + f"{weight:g}".replace(".", "_")


def _abmil(**options: Any) -> Callable[[], nn.Module]:
    return lambda: ABMIL(64, 2, dim=DIM, hidden=HIDDEN, gated=True, **options)


def _acmil(mask_drop: float) -> Callable[[], nn.Module]:
    return lambda: ACMIL(64, 2, dim=DIM, hidden=HIDDEN, top_k=5, mask_drop=mask_drop)


def _validation(model: nn.Module, bags: ShortcutBags) -> tuple[float, float, float, float]:
    """AUC on the mixed set; on bags of the training kind AUC, negative loss (to break its ties) and entropy."""
    same = predict_bags(model, bags.same, batch_size=100)
    return pooled_auc(model, bags.mixed), same.auc, -same.loss, float(_mean_entropy(same.attention_logits))


def _mean_entropy(attention_logits: list[torch.Tensor]) -> torch.Tensor:
    return attention_entropy(torch.stack(attention_logits)).mean()


def run_sweep(seed: int, scale: str) -> Values:
    """Train every arm on the same bags from the same seed; choose within each grid on validation bags."""
    bags = make_shortcut_bags(seed, scale)
    cells: Values = {}

    def arm(
        factory: Callable[[], nn.Module], weight: float = 0.0, decay: float = 1e-4, loss: MILLoss | None = None
    ) -> dict[str, float]:
        term = (loss or BagCrossEntropy()) + AttentionEntropy(weight)
        model = train(factory, term, bags, seed, scale, decay)
        mixed, same, negative_loss, spread = _validation(model, bags)
        chosen_by = {"mixed": mixed, "same": same, "negative_loss": negative_loss, "validation_entropy": spread}
        return measure(model, bags) | chosen_by

    def best(grid: list[dict[str, float]], *keys: str) -> dict[str, float]:
        return max(grid, key=lambda found: tuple(found[key] for key in keys))

    sweep = [arm(_abmil(), weight) for weight in WEIGHTS]
    cells |= {_name(weight): found for weight, found in zip(WEIGHTS, sweep, strict=True)}
    cells["aem"] = best(sweep, "mixed")
    cells["aem_same"] = best(sweep, "same", "negative_loss")
    cells["mean"] = arm(lambda: MeanMIL(64, 2, dim=DIM))
    tempered = [arm(_abmil(temperature=value)) for value in TEMPERATURES]
    cells["temperature"] = best(tempered, "mixed")
    wanted = cells["aem"]["validation_entropy"]
    cells["temperature_equal_entropy"] = min(tempered, key=lambda found: abs(found["validation_entropy"] - wanted))
    cells["attention_dropout"] = best([arm(_abmil(attention_dropout=value)) for value in ATTENTION_DROPOUT], "mixed")
    cells["weight_decay"] = best([arm(_abmil(), decay=value) for value in WEIGHT_DECAY], "mixed")
    cells["acmil"] = best([arm(_acmil(drop), loss=ACMILLoss(diversity_weight=w)) for drop, w in ACMIL_GRID], "mixed")

    def heads() -> nn.Module:
        return MultiHeadABMIL(64, 2, dim=DIM)

    def halved() -> nn.Module:
        return Subsample(_abmil()(), ratio=0.5)

    for name, factory in (("mha", heads), ("subsampling", halved)):
        cells[name] = arm(factory)
        cells[f"{name}_aem"] = best([cells[name], *(arm(factory, weight) for weight in SHORT_WEIGHTS)], "mixed")

    chosen = sweep.index(cells["aem"])
    entropy = np.array([found["entropy"] for found in sweep])
    cells["sweep"] = {
        "weight": WEIGHTS[chosen],
        "smallest_entropy_step": float(np.diff(entropy).min()),
        "rank_correlation": _spearman(entropy[: chosen + 1], [found["auc_hard"] for found in sweep[: chosen + 1]]),
    }
    return cells


def _spearman(x: np.ndarray, y: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if len(x) > 2 else float("nan")


def draw_sweep(cells: Cells) -> "Figure":
    """Entropy against AUC over all runs of the sweep, and the AUC of every remedy."""
    from matplotlib.figure import Figure

    figure = Figure((12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    for index, weight in enumerate(WEIGHTS):
        x, y = (cells.metric(_name(weight), metric) for metric in ("entropy", "auc_hard"))
        left.scatter(x, y, s=18, color=f"C{index}", label=f"λ = {weight:g}")
    left.axvline(np.log(40), color="0.6", linestyle=":", linewidth=1)
    left.set_xlabel("attention entropy on test bags [nats] (dotted: ln 40)")
    left.set_ylabel("AUC, hard witnesses only")
    left.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    left.spines[["top", "right"]].set_visible(False)
    arms = ["lambda_0", "aem", "aem_same", "temperature", "temperature_equal_entropy", "attention_dropout"]
    arms += ["weight_decay", "acmil", "mean", "mha", "mha_aem", "subsampling", "subsampling_aem"]
    strip_plot(right, {arm: cells.metric(arm, "auc_hard") for arm in arms}, "AUC, hard witnesses only")
    return figure


def run_fold(name: str, seed: int, scale: str, epochs: int = 50) -> Values:
    """One fold of one real set; lambda is chosen by the AUC of the inner validation part, ties by its loss."""
    fold = make_fold(name, seed, scale)
    trained: list[dict[str, Any]] = []
    for weight in REAL_WEIGHTS:
        loss = BagCrossEntropy() + AttentionEntropy(weight)
        model, found = train_on_fold(
            lambda d: ABMIL(d, 2, dim=DIM, hidden=DIM, gated=True), loss, fold, seed, scale, epochs
        )
        validation = predict_bags(model, fold.validation, batch_size=16)
        logits = predict_bags(model, fold.test, batch_size=16).attention_logits
        entropies = [float(attention_entropy(torch.atleast_2d(bag), normalize=True)) for bag in logits]
        trained.append(
            found
            | {"weight": weight, "validation": (validation.auc, -validation.loss), "entropy": float(np.mean(entropies))}
        )
    best = max(trained, key=lambda found: found["validation"])
    keys = ("auc", "accuracy", "weight", "entropy")
    return {arm: {key: found[key] for key in keys} for arm, found in (("abmil", trained[0]), ("aem", best))}


def run_ucsb(seed: int, scale: str) -> Values:
    """H&E tissue of breast cancer."""
    return run_fold("ucsb_breast_cancer", seed, scale)


def run_musk2(seed: int, scale: str) -> Values:
    """Conformations of molecules, up to 1,044 a bag; 20 epochs keep it within the time of a `cpu` run."""
    return run_fold("musk2", seed, scale, epochs=20)


def run_camelyon16(seed: int, scale: str) -> Values:  # noqa: ARG001 - only at paper scale
    """The paper's protocol on its own features; lambda is chosen by F1 + AUC of the validation part."""
    split = make_camelyon16_split(seed)
    trained = []
    for weight in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        loss = BagCrossEntropy() + AttentionEntropy(weight)
        found, validation = train_as_published(lambda d: ABMIL(d, 2, gated=True), loss, split, seed)
        trained.append((validation, found | {"weight": weight}))
    return {"abmil": trained[0][1], "aem": max(trained, key=lambda pair: pair[0])[1]}


def draw_folds(cells: Cells, folds: bool = True) -> "Figure":
    """AUC of every fold (or seed) without and with the entropy term."""
    from matplotlib.figure import Figure

    figure = Figure((3.5, 3.5), layout="constrained")
    strip_plot(figure.subplots(), {arm: cells.metric(arm, "auc") for arm in ("abmil", "aem")}, "AUC", folds)
    return figure


def _on_folds(run: Callable[[int, str], Values]) -> Experiment:
    return Experiment(run, {"smoke": range(2), "cpu": range(100, 150)}, draw_folds, test_train_ratio=1 / (FOLDS - 1))


EXPERIMENTS = {
    "shortcut-bags": Experiment(run_sweep, {"smoke": range(2), "cpu": range(200, 210)}, draw_sweep),
    "ucsb": _on_folds(run_ucsb),
    "musk2": _on_folds(run_musk2),
    "camelyon16": Experiment(run_camelyon16, {"paper": range(100, 105)}, partial(draw_folds, folds=False)),
}
