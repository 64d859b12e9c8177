"""One small wrapper around `lightning.Trainer`: quiet, seeded, resumable, and keeping the best weights."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "training needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@dataclass(frozen=True)
class History:
    """What happened during a training: every logged value per epoch, the epoch whose weights were kept, steps taken."""

    curves: dict[str, list[float]]
    best_epoch: int
    epochs: int
    steps: int = 0


class _BestWeights(pl.callbacks.Checkpoint):  # these run last, when the module has logged its epoch
    """Keeps every logged curve, and the weights of the epoch with the lowest `monitor` if there is one."""

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self.best, self.best_epoch = float("inf"), -1
        self.weights: dict[str, Tensor] = {}
        self.curves: dict[str, list[float]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            self.curves.setdefault(name, []).append(float(value))
        if self.monitor is None:
            return
        monitored = float(trainer.callback_metrics[self.monitor])
        if monitored < self.best or self.best_epoch < 0:
            self.best, self.best_epoch = monitored, trainer.current_epoch
            self.weights = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_epoch": self.best_epoch, "weights": self.weights, "curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


def fit(
    module: pl.LightningModule,
    train: Any,
    validation: Any = None,
    *,
    epochs: int,
    seed: int,
    device: str = "cpu",
    monitor: str = "val_loss",
    patience: int | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Train a Lightning module and leave it with the weights of its best epoch on the validation data.

    Without validation data the weights of the last epoch stay.

    Parameters
    ----------
    module : LightningModule
        Trained in place; its validation must log `monitor`.
    train, validation : DataLoader
        The data of each; `validation` may be None.
    epochs : int
        Number of passes over the training data.
    seed : int
        Seeds Python, numpy and torch before the first step.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    monitor : str
        Logged value that selects the epoch; the lowest wins, the earliest of equals.
    patience : int, optional
        Stop after so many epochs without a better value.
    checkpoint : path, optional
        File that is written after every epoch and, if it exists, from which the training goes on.
    """
    callbacks: list[pl.Callback] = [best := _BestWeights(monitor if validation is not None else None)]
    if patience is not None and validation is not None:
        callbacks.append(pl.callbacks.EarlyStopping(monitor, patience=patience))
    resume = None
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        resume = checkpoint if checkpoint.exists() else None
        callbacks.append(
            pl.callbacks.ModelCheckpoint(
                checkpoint.parent, filename=checkpoint.stem, save_top_k=1, enable_version_counter=False
            )
        )
    kind, _, index = device.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="gpu" if kind == "cuda" else kind,
            devices=[int(index)] if index else 1,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            deterministic="warn" if kind == "cuda" else False,
        )
        trainer.fit(module, train, validation, ckpt_path=resume, weights_only=True)
    if best.weights:
        module.load_state_dict(best.weights)
    module.to(torch.device(device))
    last = trainer.current_epoch - 1
    return History(best.curves, best.best_epoch if best.weights else last, trainer.current_epoch, trainer.global_step)
