"""Training of AF-KAN with Lightning, by the recipe of its authors; see [`afkan`][classact.nn.afkan]."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "AFKANClassifier needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error


class AFKANClassifier(pl.LightningModule):
    """Cross-entropy, AdamW with weight decay 1e-4, and a learning rate of 1e-3 that falls by a fifth every epoch.

    The authors train for 25 epochs on MNIST and 35 on Fashion-MNIST, in batches of 64 of images scaled to mean and
    deviation 0.5, which their code does not shuffle. Images are flattened here.

    Parameters
    ----------
    model : Module
        [`AFKAN`][classact.nn.AFKAN], or any network for the same inputs.
    lr, weight_decay, decay : float
        Of AdamW, and the factor by which the learning rate falls every epoch.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 1e-4, decay: float = 0.8) -> None:
        super().__init__()
        self.model, self.lr, self.weight_decay, self.decay = model, lr, weight_decay, decay
        self._validation: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> Any:
        """AdamW with an exponential schedule, stepped every epoch."""
        optimizer = torch.optim.AdamW(self.model.parameters(), self.lr, weight_decay=self.weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of images (N, ...)."""
        logits: Tensor = self.model(x.flatten(1))
        return logits

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the cross-entropy of one batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Collect logits."""
        x, y = batch
        self._validation.append((self(x), y))

    def on_validation_epoch_end(self) -> None:
        """Log cross-entropy, accuracy and macro F1 over the validation images."""
        from sklearn.metrics import f1_score

        logits, target = (torch.cat(part) for part in zip(*self._validation, strict=True))
        self._validation.clear()
        predicted = logits.argmax(1)
        self.log("val_loss", F.cross_entropy(logits, target))
        self.log("val_accuracy", (predicted == target).float().mean())
        self.log("val_f1", float(f1_score(target.cpu(), predicted.cpu(), average="macro")))
