"""Activation sparsity during a training with Lightning; see [`lazyneuron`][classact.probe.lazyneuron]."""

from typing import Any

from classact.probe.lazyneuron import ActivationSparsity, Layers, hidden_activations

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
    msg = "SparsityTrace needs the package lightning: pip install 'classact[compare]'"
    raise ModuleNotFoundError(msg, name="lightning") from error


class SparsityTrace(pl.Callback):
    """Log, at the end of every epoch, the share of nonzero activations and of dead units in every MLP block.

    Logged are ``train_nonzero/<layer>``, ``train_dead/<layer>`` and, where there are validation data, the same with
    ``val_``. A unit counts as dead if it fires for no token of the batches looked at.

    Parameters
    ----------
    layers : "auto" or sequence of str
        Names within the LightningModule.
    threshold : float
        Activations above it count as nonzero.
    every_n_batches : int
        Of the training batches one in so many is looked at; of the validation all are.

    Attributes
    ----------
    history : list of dict
        What was logged, with ``step``, ``part`` and ``layer``.
    """

    def __init__(self, layers: Layers = "auto", threshold: float = 0.0, every_n_batches: int = 1) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches: expected at least 1, got {every_n_batches}")
        self.layers, self.threshold, self.every_n_batches = layers, threshold, every_n_batches
        self.history: list[dict[str, Any]] = []
        self._counting: dict[str, ActivationSparsity] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Fail before the training if no layer is found."""
        hidden_activations(pl_module, self.layers)

    def _begin(self, part: str, pl_module: pl.LightningModule) -> None:
        self._counting[part] = ActivationSparsity(pl_module, self.layers, self.threshold)

    def _end(self, part: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counting = self._counting.pop(part)
        counting.__exit__()
        if trainer.sanity_checking:
            return
        for layer, stats in counting.result().items():
            values = {"nonzero": stats.nonzero, "dead": stats.dead / len(stats.firing_rate)}
            self.history.append({"step": trainer.global_step, "part": part, "layer": layer, **values})
            for name, value in values.items():
                pl_module.log(f"{part}_{name}/{layer}", value)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Begin to count."""
        self._begin("train", pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Look at one batch in `every_n_batches`."""
        if batch_idx % self.every_n_batches == 0:
            self._counting["train"].__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Look away."""
        self._counting["train"].__exit__()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._end("train", trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Begin to count."""
        self._begin("val", pl_module)
        self._counting["val"].__enter__()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._end("val", trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Leave no hook behind."""
        while self._counting:
            self._counting.popitem()[1].__exit__()
