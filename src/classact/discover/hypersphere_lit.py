"""Normalised softmax with Lightning; see [`hypersphere`][classact.discover.hypersphere]."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from classact.discover.hypersphere import HypersphereClassifier
from classact.training import pl


class HypersphereModule(pl.LightningModule):
    """Train a [`HypersphereClassifier`][classact.discover.HypersphereClassifier] on batches ``(x, y)`` with Adam.

    Call ``model.set_prototypes(loader)`` afterwards if prototypes of the known classes are wanted.

    Parameters
    ----------
    model : HypersphereClassifier
        Trained in place.
    lr : float
        Learning rate.
    """

    def __init__(self, model: HypersphereClassifier, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, x: Any) -> Tensor:
        """Logits of the wrapped model."""
        return self.model(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], self.lr)

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the cross-entropy of one batch."""
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Keep the weights at length 1."""
        if self.model.head.constraint == "project":
            self.model.head.project_()

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Log cross-entropy and share of errors."""
        x, y = batch
        logits = self.model(x)
        values = {"val_loss": F.cross_entropy(logits, y), "val_error": (logits.argmax(1) != y).float().mean()}
        self.log_dict(values, batch_size=len(y))
