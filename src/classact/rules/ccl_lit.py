"""Counter-current learning, and the rules it is compared with, with Lightning; see [`ccl`][classact.rules.ccl]."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.rules.ccl import CCLLoss, DualAutoencoder, DualSequential, ccl_losses, default_loss
from classact.rules.feedback_alignment import (
    DirectFeedbackAlignment,
    FeedbackAlignment,
    Network,
    backprop_losses,
    readout_losses,
    settle,
)
from classact.rules.target_propagation import DifferenceTargetPropagation

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "CCLClassifier and CCLAutoencoder need the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error

Method = Literal["ccl", "bp", "readout", "fa", "dfa", "dtp"]
NEEDS: dict[str, type[Network]] = {
    "ccl": DualSequential,
    "bp": Network,
    "readout": Network,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "dtp": DifferenceTargetPropagation,
}


class CCLClassifier(pl.LightningModule):
    """One step of a rule per batch (x, y); optimisation is manual.

    Parameters
    ----------
    model : network
        A [`DualSequential`][classact.rules.DualSequential] for ``"ccl"``; the rule's own network for ``"fa"``,
        ``"dfa"`` and ``"dtp"``; any of them, and any
        [`LayeredNetwork`][classact.rules.LayeredNetwork], for ``"bp"`` and ``"readout"``.
    method : {"ccl", "bp", "readout", "fa", "dfa", "dtp"}
        Which rule.
    lr, momentum, weight_decay
        Of stochastic gradient descent.
    feedback_lr : float, optional
        Learning rate of the downward network, if it is another.
    clip : float, optional
        Largest norm of the gradient, of upward and downward network apart.
    centralise : bool
        Subtract from every weight's gradient its mean over all but the first dimension.
    warmup : int
        Losses of step s < `warmup` are multiplied by (s + 1) / warmup.
    loss : CCLLoss, optional
        Of ``"ccl"``; by default the paper's for this kind of network.
    parallel_update : bool
        With ``"ccl"``, back-propagate one pair after the other, so that a step holds one layer at a time.
    """

    def __init__(
        self,
        model: Network,
        method: Method = "ccl",
        lr: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        feedback_lr: float | None = None,
        clip: float | None = 1.0,
        centralise: bool = False,
        warmup: int = 0,
        loss: CCLLoss | None = None,
        parallel_update: bool = True,
    ) -> None:
        super().__init__()
        if method not in NEEDS:
            raise ValueError(f"method: expected one of {', '.join(NEEDS)}, got {method!r}")
        own = NEEDS[method]
        if not isinstance(model, own) or (method == "bp" and isinstance(model, FeedbackAlignment)):
            wanted = "network other than FeedbackAlignment" if method == "bp" else own.__name__
            raise ValueError(f"model: expected a {wanted} for {method!r}, got {type(model).__name__}")
        self.automatic_optimization = False
        self.model, self.method = model, method
        self.rates = (lr, lr if feedback_lr is None else feedback_lr)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.clip, self.centralise, self.warmup, self.parallel_update = clip, centralise, warmup, parallel_update
        self.loss = loss
        if method == "ccl" and loss is None:
            self.loss = default_loss(model)  # type: ignore[arg-type]
        self.trained_steps = 0

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Upward weights, and downward ones where they are trained."""
        if self.method == "readout":
            return [self.model.readout_parameters()]
        groups = [self.model.forward_parameters()]
        if self.method in ("ccl", "dtp"):
            groups.append(self.model.feedback_parameters())  # type: ignore[operator]
        return groups

    def losses(self, x: Tensor, y: Tensor) -> Iterable[Tensor]:
        """Losses of one step; each is to be back-propagated before the next one is asked for."""
        model: Any = self.model
        if self.method == "ccl":
            return ccl_losses(model, self.loss, x, y, self.parallel_update)  # type: ignore[arg-type]
        if self.method in ("dfa", "dtp"):
            found: Iterable[Tensor] = model.losses(x, y)
            return found
        return readout_losses(model, x, y) if self.method == "readout" else backprop_losses(model, x, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with a group for every network."""
        pairs = zip(self.parameter_groups(), self.rates, strict=False)
        groups = [{"params": group, "lr": rate} for group, rate in pairs]
        return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)

    def split(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Input and target of a batch."""
        x, y = batch
        return x, y

    def validation_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.model(x), y)

    def training_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """All losses of the rule, then one step."""
        x, y = self.split(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        factor = min(1.0, (self.trained_steps + 1) / self.warmup) if self.warmup else 1.0
        total = torch.zeros((), device=x.device)
        for loss in self.losses(x, y):
            self.manual_backward(loss * factor)
            total += loss.detach()
        settle(self.parameter_groups(), self.clip, self.centralise)
        optimizer.step()
        self.trained_steps += 1
        self.log("train_loss", total, on_step=False, on_epoch=True, batch_size=len(x))

    def validation_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Log ``val_loss``."""
        x, y = self.split(batch)
        self.log("val_loss", self.validation_loss(x, y), batch_size=len(x))


class CCLAutoencoder(CCLClassifier):
    """The same for a [`DualAutoencoder`][classact.rules.DualAutoencoder], with the paper's settings as defaults.

    A batch is x, or (x, target): the target is another view of x, of its shape; anything else is taken for a label and
    passed over, and the target is x. ``"bp"`` and ``"readout"`` minimise the mean squared error.
    """

    def __init__(
        self,
        model: DualAutoencoder,
        method: Literal["ccl", "bp", "readout"] = "ccl",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        clip: float | None = 0.2,
        centralise: bool = True,
        warmup: int = 100,
        **settings: Any,
    ) -> None:
        if method not in ("ccl", "bp", "readout"):
            raise ValueError(f"method: expected 'ccl', 'bp' or 'readout', got {method!r}")
        super().__init__(
            model, method, lr, momentum, weight_decay, clip=clip, centralise=centralise, warmup=warmup, **settings
        )

    def split(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images, and what they are to become."""
        x, *rest = batch if isinstance(batch, list | tuple) else (batch,)
        return x, rest[0] if rest and rest[0].shape == x.shape else x

    def validation_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(self.model(x), y)
