"""What the experiments of this family share: shortcut bags, and cross-validation on the classic real sets."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from classact.data.bags import BagDataset, BagSubset, open_bags
from classact.data.shortcut import shortcut_bags
from classact.evidence.comparison import inner_split
from classact.mil.aem import attention_entropy
from classact.mil.attention import attention_concentration
from classact.mil.lit import BagPredictions, bag_auc, fit_bags, predict_bags
from classact.mil.model import MILLoss, Standardized

REPEATS, FOLDS = 10, 5


@dataclass(frozen=True)
class ShortcutBags:
    """Bags of one seed: training bags hold easy and hard witnesses, test bags both, easy ones or hard ones only.

    ``mixed`` is a validation set of all three kinds, ``same`` one of the training kind; both from training images.
    """

    train: BagDataset
    same: BagDataset
    mixed: list[BagDataset]
    test: dict[str, BagDataset]


def make_shortcut_bags(seed: int, scale: str) -> ShortcutBags:
    """Draw the bags of a seed: 200 for training, 100 per validation set, 400 per test set; few at smoke scale."""
    n_train, n_validation, n_test = (40, 20, 40) if scale == "smoke" else (200, 100, 400)
    kinds: tuple[Literal["both", "easy", "hard"], ...] = ("both", "easy", "hard")
    return ShortcutBags(
        train=shortcut_bags(n_train, seed),
        same=shortcut_bags(n_validation, seed + 10_000),
        mixed=[shortcut_bags(n_validation, seed + 20_000, witnesses=kind) for kind in kinds],
        test={kind: shortcut_bags(n_test, seed, "test", kind) for kind in kinds},
    )


def train(
    factory: Callable[[], nn.Module],
    loss: MILLoss,
    bags: ShortcutBags,
    seed: int,
    scale: str,
    weight_decay: float = 1e-4,
) -> nn.Module:
    """Train as the card of the shortcut bags says: 40 epochs, 16 bags a step, learning rate 1e-3, last weights."""
    torch.manual_seed(seed)
    epochs = 5 if scale == "smoke" else 40
    model = factory()
    fit_bags(model, loss, bags.train, seed=seed, epochs=epochs, lr=1e-3, weight_decay=weight_decay, batch_size=16)
    return model


def measure(model: nn.Module, bags: ShortcutBags) -> dict[str, float]:
    """AUC on every test set, and where the attention lies on the test bags with both kinds of witness."""
    found = {}
    for kind, test in bags.test.items():
        predictions = predict_bags(model, test, batch_size=100)
        found[f"auc_{kind}"] = predictions.auc
        if kind == "both":
            both = predictions
    attention = torch.stack(both.attention_logits).softmax(-1)
    kinds = torch.stack([torch.as_tensor(bag.instance_labels) for bag in bags.test["both"]])
    positive = torch.from_numpy(bags.test["both"].labels == 1)
    found["easy_mass"], found["hard_mass"] = (float((attention * (kinds == k))[positive].sum(1).mean()) for k in (1, 2))
    mass = attention_concentration(attention, ks=(2, 5))
    found["top2"], found["top5"] = float(mass[2].mean()), float(mass[5].mean())
    found["entropy"] = float(attention_entropy(torch.stack(both.attention_logits)).mean())
    found["loss_gap"] = both.loss - predict_bags(model, bags.train, batch_size=100).loss
    return found


def pooled_auc(model: nn.Module, sets: list[BagDataset]) -> float:
    """AUC over the bags of several sets together."""
    predictions: list[BagPredictions] = [predict_bags(model, bags, batch_size=100) for bags in sets]
    target = np.concatenate([bags.labels for bags in sets])
    return bag_auc(target, np.concatenate([p.probabilities for p in predictions]))


@dataclass(frozen=True)
class Fold:
    """One fold of a real data set: an inner validation part chooses the epoch, and settings if any."""

    train: BagSubset
    validation: BagSubset
    test: BagSubset


@lru_cache(maxsize=4)
def _bags(name: str) -> BagDataset:
    return open_bags(name)


def make_fold(name: str, seed: int, scale: str) -> Fold:
    """Fold of 10 repeats of 5-fold cross-validation: seed 100 is the first fold of the first repeat."""
    from sklearn.model_selection import StratifiedKFold

    bags = _bags(name)
    repeat, fold = divmod(seed % 100, FOLDS)
    cutter = StratifiedKFold(FOLDS, shuffle=True, random_state=1000 + repeat)
    outer, test = list(cutter.split(bags.ids, bags.labels))[fold]
    if scale == "smoke":
        outer = outer[:40]
    inner, validation = inner_split(bags.labels, np.array(bags.groups), outer, 1000 + repeat)
    return Fold(bags.subset(inner), bags.subset(validation), bags.subset(test))


def train_on_fold(
    factory: Callable[[int], nn.Module], loss: MILLoss, fold: Fold, seed: int, scale: str, epochs: int = 50
) -> tuple[nn.Module, dict[str, float]]:
    """Train on features standardised by the training bags, 8 bags a step, learning rate 1e-3.

    Returns the model of the epoch with the lowest validation loss, and its AUC and accuracy on the test part.
    """
    torch.manual_seed(seed)
    model = Standardized.from_bags(factory(fold.train.in_dim), fold.train)
    epochs = 3 if scale == "smoke" else epochs
    fit_bags(model, loss, fold.train, fold.validation, seed=seed, epochs=epochs, lr=1e-3, batch_size=8)
    predictions = predict_bags(model, fold.test, batch_size=16)
    accuracy = float((predictions.probabilities.argmax(1) == fold.test.labels).mean())
    return model, {"auc": predictions.auc, "accuracy": accuracy}


def make_camelyon16_split(seed: int) -> Fold:
    """CAMELYON16 with the features and splits of the ACMIL and AEM authors; seed 100 is their split 1, 104 split 5.

    Expects ``camelyon16/patch_feats_pretrain_medical_ssl.h5`` (a group per slide) and ``camelyon16/split_<i>.json``
    under the data folder; the addresses are in the README of github.com/dazhangyu123/ACMIL.
    """
    from classact.data.labels import read_splits
    from classact.data.registry import data_folder

    folder = data_folder() / "camelyon16"
    bags = open_bags(folder / "patch_feats_pretrain_medical_ssl.h5", group="slide_id")
    (split,) = read_splits(folder / f"split_{seed % 100 + 1}.json", bags.ids)
    return Fold(*(bags.subset(split[part]) for part in ("train", "validation", "test")))


def train_as_published(
    factory: Callable[[int], nn.Module], loss: MILLoss, fold: Fold, seed: int
) -> tuple[dict[str, float], float]:
    """Train as the authors do: 50 epochs, one bag a step, learning rate 1e-4, epoch with the largest F1 + AUC.

    Returns AUC and macro F1 on the test part, and F1 + AUC on the validation part.
    """
    from sklearn.metrics import f1_score

    torch.manual_seed(seed)
    model = factory(fold.train.in_dim)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monitor = "val_f1_auc_gap"
    history = fit_bags(model, loss, fold.train, fold.validation, seed=seed, device=device, monitor=monitor).history
    predictions = predict_bags(model, fold.test, device)
    f1 = float(f1_score(fold.test.labels, predictions.probabilities.argmax(1), average="macro"))
    return {"auc": predictions.auc, "f1": f1}, 2 - min(history.curves[monitor])


def strip_plot(axes: Any, values: dict[str, np.ndarray], label: str, folds: bool = False) -> None:
    """Draw one point per seed and arm, the points of a seed joined, and means with 95 % intervals.

    Where the seeds are `folds` of one data set, the intervals are Nadeau and Bengio's.
    """
    from classact.evidence.statistics import corrected_interval, t_interval

    table = np.array(list(values.values()))
    axes.plot(table, color="0.85", linewidth=0.7, zorder=1)
    for index, row in enumerate(table):
        axes.scatter(np.full(len(row), index), row, s=10, color="C0", alpha=0.6, linewidth=0, zorder=2)
        interval = corrected_interval(row, 1 / (FOLDS - 1)) if folds else t_interval(row)
        axes.errorbar(
            index,
            interval.effect,
            [[interval.effect - interval.low], [interval.high - interval.effect]],
            color="black",
            marker="o",
            markersize=4,
            capsize=4,
            zorder=3,
        )
    axes.set_xticks(range(len(values)), list(values), rotation=35, ha="right")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
