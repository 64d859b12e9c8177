"""AnomalyNCD with Lightning; see [`anomalyncd`][classact.discover.anomalyncd]."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from classact.discover.anomalyncd.augment import CropViews
from classact.discover.anomalyncd.crops import CropSet
from classact.discover.anomalyncd.fit import CropBatch, epoch_rate, merge_sets, parameter_groups, training_terms
from classact.discover.anomalyncd.losses import AnomalyNCDLoss
from classact.discover.anomalyncd.model import AnomalyNCD

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "AnomalyNCDModule needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error


class AnomalyNCDModule(pl.LightningModule):
    """The training step of AnomalyNCD as a Lightning module; batches are those of `crop_loader`.

    Parameters
    ----------
    model : AnomalyNCD
        With its range of thresholds; its best head is chosen after every epoch.
    loss : AnomalyNCDLoss, optional
        With the paper's settings by default.
    views : CropViews, optional
        Views of the crops.
    lr, momentum, weight_decay : float
        Of SGD; the learning rate falls to a thousandth along half a cosine, set per epoch.
    """

    def __init__(
        self,
        model: AnomalyNCD,
        loss: AnomalyNCDLoss | None = None,
        views: CropViews | None = None,
        lr: float = 0.003,
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
    ) -> None:
        super().__init__()
        self.model, self.views = model, views or CropViews(model.size)
        self.loss = loss or AnomalyNCDLoss(model.n_base, model.n_novel)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._cluster: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        """SGD, its learning rate along half a cosine."""
        groups = parameter_groups(self.model)
        optimizer = torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        epochs = self.trainer.max_epochs or 1
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch_rate(epoch, epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the loss of two views of each crop."""
        terms = training_terms(self.model, self.loss, self.views, CropBatch(*batch), self.current_epoch)
        self._cluster.append(terms.cluster.detach())
        self.log("train_loss", terms.total, on_step=False, on_epoch=True)
        return terms.total

    def on_train_epoch_end(self) -> None:
        """Choose the head with the least cluster loss in this epoch."""
        self.model.best_head.copy_(torch.stack(self._cluster).mean(0).argmin())
        self._cluster.clear()


def crop_loader(
    novel: CropSet, base: CropSet | None = None, base_labels: Tensor | None = None, batch_size: int = 32
) -> "DataLoader[Any]":
    """Batches of crops, base and new ones drawn equally often."""
    everything, weights = merge_sets(novel, base, base_labels)
    sampler = None if base is None else WeightedRandomSampler(weights.tolist(), len(weights))
    return DataLoader(TensorDataset(*everything), batch_size, shuffle=sampler is None, sampler=sampler)
