"""Fire together, wire together with Lightning; see [`ftwt`][classact.probe.ftwt]."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from classact.probe.ftwt import DynamicFlops, FTWTNetwork, mask_loss, optimisers_of

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "FTWTModule needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error


class FTWTModule(pl.LightningModule):
    """Fine-tune a converted network with its own masks, with one optimiser for the backbone and one for the heads.

    Parameters
    ----------
    network : FTWTNetwork
        Made by [`convert_ftwt`][classact.probe.convert_ftwt] from a trained network.
    loss : callable
        ``loss(network(x), y)`` for batches ``(x, y)``.
    lr, head_lr, momentum, weight_decay, milestones, cooldown, mask_weight
        As in [`fit_ftwt`][classact.probe.fit_ftwt].
    """

    def __init__(
        self,
        network: FTWTNetwork,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        lr: float = 1e-2,
        head_lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        milestones: Sequence[int] = (81, 122, 151),
        cooldown: float = 0.5,
        mask_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.loss, self.milestones = network, loss, tuple(milestones)
        self.rates = (lr, head_lr, momentum, weight_decay)
        self.cooldown, self.mask_weight = cooldown, mask_weight
        self.flops = DynamicFlops(network)

    def configure_optimizers(self) -> Any:
        """SGD for the backbone, with a schedule, and SGD for the heads, without."""
        backbone, heads = optimisers_of(self.network, *self.rates)
        return [backbone, heads], [torch.optim.lr_scheduler.MultiStepLR(backbone, list(self.milestones))]

    def training_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """One step of both, or, in the last part of the training, of the backbone alone."""
        x, y = batch
        optimisers: Any = self.optimizers()
        backbone, heads = optimisers
        with self.network.observed() as steps:
            task = self.loss(self.network(x), y)
        masks = mask_loss(steps.values())
        heads_learn = self.current_epoch < int(self.cooldown * (self.trainer.max_epochs or 0)) and self.mask_weight > 0
        for optimiser in (backbone, heads):
            optimiser.zero_grad()
        self.manual_backward(task + self.mask_weight * masks if heads_learn else task)
        for optimiser in (backbone, heads) if heads_learn else (backbone,):
            optimiser.step()
        values = {"train_loss": task, "mask_loss": masks, "reduction": self.flops.of(steps).reduction().float().mean()}
        self.log_dict(
            {name: value.detach() for name, value in values.items()}, on_step=False, on_epoch=True, batch_size=len(x)
        )

    def on_train_epoch_end(self) -> None:
        """Lower the backbone's learning rate where it is due."""
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Log ``val_loss``, ``val_accuracy`` and ``val_reduction``, with predicted masks."""
        x, y = batch
        with self.network.observed() as steps:
            output = self.network(x)
        values = {
            "val_loss": self.loss(output, y),
            "val_accuracy": (output.argmax(1) == y).float().mean(),
            "val_reduction": self.flops.of(steps).reduction().float().mean(),
        }
        self.log_dict(values, batch_size=len(x))
