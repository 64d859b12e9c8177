"""NoProp with Lightning; see [`noprop`][classact.rules.noprop]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from classact.rules.noprop import EndToEndTwin, NoPropCT, NoPropDT, NoPropFM

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "NoPropModule needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error


class NoPropModule(pl.LightningModule):
    """One step per block and batch for NoProp-DT, one per batch for the others.

    Optimisation is manual: the graph of a block is gone before that of the next is made, so that a step never holds
    more than one block. Blocks take their turns within a batch, in the paper within an epoch, which is the same
    wherever the embeddings are fixed. Batches must have two examples at least.

    Parameters
    ----------
    model : NoPropDT, NoPropCT, NoPropFM or EndToEndTwin
        The network.
    lr, weight_decay : float
        Of AdamW.
    settings : dict, optional
        Of the network's ``forward`` during validation, such as ``{"steps": 30, "solver": "heun"}``.
    """

    def __init__(
        self,
        model: NoPropDT | NoPropCT | NoPropFM | EndToEndTwin,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.lr, self.weight_decay, self.settings = model, lr, weight_decay, settings or {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; what has no gradient in a step stays as it is, momentum included."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)

    def training_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Step for every block in turn."""
        x, y = batch
        optimizer: Any = self.optimizers()
        rounds: Sequence[int | None] = range(1, self.model.T + 1) if isinstance(self.model, NoPropDT) else (None,)
        total = 0.0
        for t in rounds:
            loss = self.model.loss(x, y) if t is None else self.model.loss(x, y, t)  # type: ignore[call-arg]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            total += loss.item() / len(rounds)
        self.log("train_loss", total, on_step=False, on_epoch=True, batch_size=len(x))

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, RUF100
        """Log the cross-entropy of p(y|z_T) as ``val_loss``, with the same noise in every epoch."""
        x, y = batch
        probabilities = self.model.predict_proba(x, seed=batch_idx, batch_size=len(x), **self.settings)
        tiny = torch.finfo(probabilities.dtype).tiny
        self.log("val_loss", F.nll_loss(probabilities.clamp(min=tiny).log(), y), batch_size=len(x))
