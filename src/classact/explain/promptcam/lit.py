"""Training of Prompt-CAM as in the authors' code."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from classact.explain.promptcam.model import PromptCAM
from classact.training import pl


class PromptCAMModule(pl.LightningModule):
    """Trains prompts and head with cross-entropy; batches are pairs of images (N, K, H, W) and classes (N,).

    The learning rate is set per epoch: from `warmup_lr` in equal steps to `lr` over the warm-up, then along a cosine,
    which counts from epoch 0, to `min_lr`. The validation logs ``val_loss`` and ``val_accuracy``. The authors keep the
    best weights by test accuracy; [`fit`][classact.training.fit] chooses on a validation set.

    Parameters
    ----------
    model : PromptCAM
        Trained in place.
    lr : float
        Of prompts and head alike. The authors, DINO ViT-B/16: 0.005 (CUB, Dogs, Pets), 0.01 (Cars, Birds-525); DINOv2
        ViT-B/14: 0.001 (CUB), 0.005 (Dogs, Pets).
    weight_decay, momentum : float
        Momentum is of SGD only.
    warmup_epochs, epochs : int
        Length of the warm-up and of the training, 130 for CUB.
    optimizer : {"sgd", "adam", "adamw"}
        All released models use SGD.
    warmup_lr, min_lr : float
        Ends of the schedule (`warmup_lr` is 1e-6 with DINOv2).
    """

    def __init__(
        self,
        model: PromptCAM,
        lr: float = 0.005,
        weight_decay: float = 1e-3,
        warmup_epochs: int = 20,
        epochs: int = 100,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: float = 0.9,
        warmup_lr: float = 0.0,
        min_lr: float = 1e-6,
    ) -> None:
        super().__init__()
        if optimizer not in ("sgd", "adam", "adamw"):
            raise ValueError(f"optimizer: expected 'sgd', 'adam' or 'adamw', got {optimizer!r}")
        self.model = model
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.warmup_epochs, self.epochs, self.warmup_lr, self.min_lr = warmup_epochs, epochs, warmup_lr, min_lr
        self.optimizer = optimizer

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr + (self.lr - self.warmup_lr) * epoch / self.warmup_epochs
        if epoch >= self.epochs:
            return self.min_lr
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * epoch / self.epochs))

    def configure_optimizers(self) -> Any:
        """Only what is not frozen is given to the optimiser."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"lr": 1.0, "weight_decay": self.weight_decay}  # the schedule multiplies by the rate
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, momentum=self.momentum, **options)
        else:
            kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(trained, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the loss of one batch."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Log loss and accuracy."""
        x, y = batch
        scores = self.model(x)
        self.log("val_loss", F.cross_entropy(scores, y), batch_size=len(y))
        self.log("val_accuracy", (scores.argmax(1) == y).float().mean(), batch_size=len(y))
