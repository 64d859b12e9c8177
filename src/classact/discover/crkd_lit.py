"""Cr-KD with Lightning; see [`crkd`][classact.discover.crkd]."""

from typing import Any

import torch
from torch import Tensor

from classact.discover.crkd import CrKD, CrKDLoss, KnownClassifier, TrainingPlan, Views, augmented, discovery_loss
from classact.training import pl


class CrKDModule(pl.LightningModule):
    """The second stage of Cr-KD, for a trainer of one's own; [`fit_crkd`][classact.discover.fit_crkd] needs none.

    Batches are ``(x, target)`` with target -1 for novel samples. The trainer decides how many epochs there are; of
    `plan` learning rates, warm-up and optimiser are used.

    Parameters
    ----------
    model : CrKD
        Trained in place; start it with ``CrKD.from_teacher(teacher, n_novel)``.
    teacher : KnownClassifier
        The result of the first stage; frozen, and always in evaluation mode.
    loss : CrKDLoss, optional
        ``CrKDLoss(model.n_known)`` by default.
    views : callable, optional
        Makes two or more views of a batch; without it ``x`` is a sequence of views.
    plan : TrainingPlan
        As above.
    reset_head_loss : bool
        Forget the heads' losses before every epoch.
    """

    def __init__(
        self,
        model: CrKD,
        teacher: KnownClassifier,
        loss: CrKDLoss | None = None,
        views: Views | None = None,
        plan: TrainingPlan = TrainingPlan(),  # noqa: B008 - a tuple
        reset_head_loss: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.teacher, self.objective = model, teacher, loss or CrKDLoss(model.n_known)
        self.views, self.plan, self.reset_head_loss = views, plan, reset_head_loss

    def train(self, mode: bool = True) -> "CrKDModule":
        """Set the mode of the running model; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def configure_optimizers(self) -> Any:
        """Optimiser of the running model, and the course of its learning rate over the trainer's epochs."""
        epochs = self.trainer.max_epochs
        plan = self.plan if epochs is None or epochs < 0 else self.plan._replace(epochs=epochs)
        optimizer = plan.optimize(self.model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: plan.rate(epoch) / plan.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def on_train_epoch_start(self) -> None:
        """Forget the heads' losses."""
        if self.reset_head_loss:
            self.model.head_loss.zero_()

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the loss of one batch."""
        x, target = batch
        views = augmented(x, self.views, target.device)
        terms = discovery_loss(self.model, self.teacher, views, target, self.objective)
        self.model.head_loss += terms.swapped.detach()
        values = {"swapped": terms.swapped.mean().detach(), "distilled": terms.distilled.mean().detach()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(target))
        return terms.total

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Rescale the prototypes."""
        self.model.normalize_prototypes_()
