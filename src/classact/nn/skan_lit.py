"""S-KAN with Lightning; see [`skan`][classact.nn.skan]."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.nn.skan import Selection, drop_spaces, plan_stages, prune_spaces, rate_factor

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "SKANModule needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error


class SKANModule(pl.LightningModule):
    """The three stages of S-KAN as a Lightning module, for any network that holds layers of S-KAN.

    The trainer's number of steps is split into stages. In the third one the gates leave only the chosen spaces, and the
    optimiser starts anew; the unused coefficients are deleted by ``prune``, after the training, so
    that checkpoints of all stages have the same tensors. ``val_loss`` is infinite before the third stage: whoever
    keeps the best epoch keeps one of a network that can be pruned without a change.

    Parameters
    ----------
    model : Module
        The network.
    loss : callable
        ``loss(model(x), y)`` for batches ``(x, y)``.
    lr, weight_decay : float
        Of AdamW.
    stages, selection
        As in [`fit_skan`][classact.nn.fit_skan]; by contribution on the batch at hand, or by gate.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        stages: Sequence[float] = (0.3, 0.4, 0.3),
        selection: Selection = "contribution",
    ) -> None:
        super().__init__()
        if selection == "validation":
            raise ValueError("selection: expected 'contribution' or 'gate', got 'validation', which fit_skan can do")
        plan_stages(model, 10_000, stages)
        self.model, self.loss, self.lr, self.weight_decay = model, loss, lr, weight_decay
        self.stages, self.selection = stages, selection

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate falls in the third stage."""
        total = int(self.trainer.estimated_stepping_batches)
        self.plan = plan_stages(self.model, total, self.stages)
        optimizer = torch.optim.AdamW(self.model.parameters(), self.lr, weight_decay=self.weight_decay)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, self.plan.prune, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def on_train_batch_start(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Drop spaces, and forget the optimiser's moments, where the plan says so."""
        for _ in range(self.plan.drops.count(self.global_step)):
            drop_spaces(self.model, batch[0], self.selection)
        if self.global_step == self.plan.prune:
            self.trainer.optimizers[0].state.clear()

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the loss of one batch."""
        x, y = batch
        loss = self.loss(self.model(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Log the loss as ``val_loss``, infinite as long as spaces are being selected."""
        x, y = batch
        value = self.loss(self.model(x), y) if self.global_step >= self.plan.prune else torch.tensor(torch.inf)
        self.log("val_loss", value, batch_size=len(x))

    def prune(self) -> nn.Module:
        """Return the pruned network; a network other than an SKAN is changed in place."""
        self.model = prune_spaces(self.model)
        return self.model
