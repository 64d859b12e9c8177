"""The training step: classification, and alignment of named layers with a prior that comes with the batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.explain.aufer.loss import SpatialAlignmentLoss, logits_and_features
from classact.explain.layers import find_module
from classact.training import pl


def paper_optimizer(parameters: Iterable[nn.Parameter]) -> Any:
    """Nesterov SGD (lr 0.002, weight decay 5e-4) with the rate times 0.9 every 4 epochs, as in the released command."""
    optimizer = torch.optim.SGD(parameters, lr=2e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)}


class AlignedClassifier(pl.LightningModule):
    """Train any classifier with ``cross-entropy + lam * alignment`` of named layers.

    Batches are ``(x, y, prior)``: what the model takes, labels (N,), and a spatial prior (N, 1, H, W), +inf for samples
    without one, which are classified all the same. The prior is never shown to the model. Nothing is added to the
    model, and what it does at test time does not change. The validation logs the cross-entropy as ``val_loss`` and the
    share of errors as ``val_error``, by whose minimum the authors choose the epoch.

    Parameters
    ----------
    model : Module
        Returns logits (N, classes).
    layers : sequence of str
        Names as in ``model.named_modules()``. The last convolutional layer is best in the paper; of a ViT, a block that
        puts out the tokens (what a layer norm with unit weights puts out has mean 0 everywhere, and so no attention).
    lam : float
        Weight of the alignment, lambda; with 0 the training is the plain one, bit for bit.
    align : Module, optional
        The loss; [`SpatialAlignmentLoss`][classact.explain.SpatialAlignmentLoss] with its defaults.
    optimizer : callable
        Parameters -> what ``configure_optimizers`` may return.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        lam: float = 5.0,
        align: nn.Module | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Any] = paper_optimizer,
    ) -> None:
        super().__init__()
        if lam < 0:
            raise ValueError(f"lam: expected 0 or more, got {lam}")
        for layer in layers:
            find_module(model, layer)  # a name that does not exist is told now, not in the first step
        self.model, self.layers, self.lam = model, tuple(layers), lam
        self.align = align or SpatialAlignmentLoss()
        self.optimizer = optimizer

    def forward(self, x: Any) -> Tensor:
        """Logits of the wrapped model."""
        return self.model(x)

    def configure_optimizers(self) -> Any:
        """What `optimizer` makes of the model's parameters."""
        return self.optimizer(self.model.parameters())

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the sum of both losses."""
        x, y, prior = batch
        if not self.lam:
            return F.cross_entropy(self.model(x), y)
        logits, features = logits_and_features(self.model, x, self.layers)
        alignment = self.align(features, prior)
        self.log("train_alignment", alignment.detach(), on_step=False, on_epoch=True, batch_size=len(y))
        return F.cross_entropy(logits, y) + self.lam * alignment

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Log cross-entropy and share of errors."""
        x, y, _ = batch
        logits = self.model(x)
        values = {"val_loss": F.cross_entropy(logits, y), "val_error": (logits.argmax(1) != y).float().mean()}
        self.log_dict(values, batch_size=len(y))
