"""Training and applying the models of the family: the plain Lightning module, `fit_bags` and `predict_bags`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from classact.data.bags import collate_bags
from classact.mil.model import BagCrossEntropy, MILLoss
from classact.training import History, fit, pl


class LitMIL(pl.LightningModule):
    """Trains any model of the family with any of its losses, as the ACMIL and AEM code does.

    AdamW; the learning rate falls to 0 along half a cosine, updated every step. The validation logs the
    cross-entropy of the bag logits, without extra terms, as ``val_loss``, the AUC as ``val_auc``, and
    ``val_f1_auc_gap``, 2 - macro F1 - AUC, by whose minimum the ACMIL and AEM code chooses the epoch.

    Parameters
    ----------
    model : Module
        Called as ``model(x, mask, coords)``.
    loss : MILLoss
        Called as ``loss(output, target, progress)``; cross-entropy by default.
    lr, weight_decay : float
        Of AdamW.
    """

    def __init__(
        self, model: nn.Module, loss: MILLoss | None = None, lr: float = 1e-4, weight_decay: float = 1e-5
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss or BagCrossEntropy()
        self.lr, self.weight_decay = lr, weight_decay
        self._train_losses: list[Tensor] = []
        self._validation: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> Any:
        """AdamW with a half-cycle cosine over all steps."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the loss of one batch of bags."""
        output = self.model(batch.x, batch.mask, batch.coords)
        progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches) - 1)
        loss = self.loss(output, batch.label, progress)
        self._train_losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean training loss."""
        self.log("train_loss", torch.stack(self._train_losses).mean())
        self._train_losses.clear()

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Collect the bag logits."""
        self._validation.append((self.model(batch.x, batch.mask, batch.coords).logits, batch.label))

    def on_validation_epoch_end(self) -> None:
        """Log loss, AUC and the gap of F1 and AUC to their maximum over the validation bags."""
        from sklearn.metrics import f1_score

        logits, target = (torch.cat(part) for part in zip(*self._validation, strict=True))
        self._validation.clear()
        self.log("val_loss", nn.functional.cross_entropy(logits, target))
        labels, probabilities = target.cpu().numpy(), logits.float().softmax(-1).cpu().numpy()
        auc = bag_auc(labels, probabilities)
        f1 = float(f1_score(labels, probabilities.argmax(1), average="macro"))
        self.log_dict({"val_auc": auc, "val_f1_auc_gap": 2 - f1 - auc})


@dataclass(frozen=True)
class FittedBags:
    """A trained model and the history of its training."""

    model: nn.Module
    history: History


@dataclass(frozen=True)
class BagPredictions:
    """Predictions for n bags.

    Attributes
    ----------
    logits, probabilities : (n, C) float32
        Of the bags.
    attention_logits : list of n tensors (K_i,)
        Of the instances, in the order in which they are stored.
    loss, auc : float
        Cross-entropy, and area under the ROC curve (NaN where a class is absent).
    """

    logits: np.ndarray
    probabilities: np.ndarray
    attention_logits: list[Tensor]
    loss: float
    auc: float


def fit_bags(
    model: nn.Module,
    loss: MILLoss | None,
    train: Any,
    validation: Any = None,
    *,
    seed: int,
    device: str = "cpu",
    epochs: int = 50,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    batch_size: int = 1,
    patience: int | None = None,
    monitor: str = "val_loss",
    sampler: Literal["random", "balanced"] = "random",
) -> FittedBags:
    """Train a model on bags and keep the epoch that is best on the validation bags.

    Parameters
    ----------
    model, loss
        See [`LitMIL`][classact.mil.LitMIL]. The model is trained in place.
    train, validation : dataset of `classact.data.Bag`
        Only these are seen. Without validation bags the weights of the last epoch stay.
    seed : int
        Seed of the order of the bags and of every random part of the training.
    device : str
        Where to train.
    epochs, lr, weight_decay, batch_size
        The defaults are those of the ACMIL and AEM code: one bag per step.
    patience : int, optional
        Stop after so many epochs without a better one.
    monitor : {"val_loss", "val_f1_auc_gap"}
        What chooses the epoch; see [`LitMIL`][classact.mil.LitMIL]. The default, the cross-entropy, is less noisy on
        few validation bags than the published choice, the sum of F1 and AUC.
    sampler : {"random", "balanced"}
        Every bag once an epoch, or every class equally often (`classact.mil.BalancedBagSampler`), in as many steps.
    """
    return fit_module(
        LitMIL(model, loss, lr, weight_decay),
        train,
        validation,
        seed=seed,
        device=device,
        epochs=epochs,
        batch_size=batch_size,
        patience=patience,
        monitor=monitor,
        sampler=sampler,
    )


def fit_module(
    module: LitMIL,
    train: Any,
    validation: Any = None,
    *,
    seed: int,
    device: str = "cpu",
    epochs: int = 50,
    batch_size: int = 1,
    patience: int | None = None,
    monitor: str = "val_loss",
    sampler: Literal["random", "balanced"] = "random",
) -> FittedBags:
    """Train a module of the family, as [`fit_bags`][classact.mil.lit.fit_bags] does with the plain one."""
    if sampler not in ("random", "balanced"):
        raise ValueError(f"sampler: expected 'random' or 'balanced', got {sampler!r}")
    shuffle = torch.Generator().manual_seed(seed)
    if sampler == "balanced":
        from classact.mil.sampler import BalancedBagSampler

        batches = BalancedBagSampler(train.labels, batch_size, shuffle)
        order = DataLoader(train, batch_sampler=batches, collate_fn=collate_bags)
    else:
        order = DataLoader(train, batch_size=batch_size, shuffle=True, generator=shuffle, collate_fn=collate_bags)
    held_out = validation and DataLoader(validation, batch_size=batch_size, collate_fn=collate_bags)
    history = fit(module, order, held_out, epochs=epochs, seed=seed, device=device, patience=patience, monitor=monitor)
    return FittedBags(module.model.eval(), history)


@torch.inference_mode()
def predict_bags(model: nn.Module, bags: Any, device: str = "cpu", batch_size: int = 1) -> BagPredictions:
    """Apply a model to bags; one forward pass gives both the predictions and the attention."""
    model = model.to(device).eval()
    logits, attention, labels = [], [], []
    for batch in DataLoader(bags, batch_size=batch_size, collate_fn=collate_bags):
        x, mask, coords = (None if part is None else part.to(device) for part in batch[:3])
        output = model(x, mask, coords)
        logits.append(output.logits.float().cpu())
        labels.append(batch.label)
        rows = output.attention_logits.float().cpu()
        attention += [row if mask is None else row[mask[i].cpu()] for i, row in enumerate(rows)]
    stacked, target = torch.cat(logits), torch.cat(labels)
    probabilities = stacked.softmax(-1).numpy()
    loss = float(nn.functional.cross_entropy(stacked, target)) if (target >= 0).all() else math.nan
    return BagPredictions(stacked.numpy(), probabilities, attention, loss, bag_auc(target.numpy(), probabilities))


def bag_auc(target: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; one class against the rest, averaged, for more than two. NaN if a class is absent."""
    from sklearn.metrics import roc_auc_score

    classes = probabilities.shape[1]
    if len(np.unique(target)) < classes or not np.isfinite(probabilities).all():
        return math.nan
    if classes == 2:
        return float(roc_auc_score(target, probabilities[:, 1]))
    return float(roc_auc_score(target, probabilities, multi_class="ovr"))
