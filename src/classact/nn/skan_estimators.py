"""S-KAN as scikit-learn estimators; see [`skan`][classact.nn.skan]."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional as F

from classact.nn.kan_bases import Space
from classact.nn.skan import POOL, SKAN, Selection, fit_skan


class _SKANEstimator(BaseEstimator):
    """Scaling of the table to [-1, 1], where the families are made for, and training on it."""

    def __init__(
        self,
        hidden: Sequence[int] = (5,),
        pool: Sequence[Space] = POOL,
        select: Literal["node", "edge", "layer"] = "node",
        keep: int = 1,
        norm: Literal["layer", "batch"] | None = None,
        steps: int = 600,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        batch_size: int | None = None,
        selection: Selection = "contribution",
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.pool = pool
        self.select = select
        self.keep = keep
        self.norm = norm
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.selection = selection
        self.random_state = random_state

    def _train(self, x: np.ndarray, y: Tensor, outputs: int, loss: Any) -> None:
        self.low_, high = x.min(0), x.max(0)
        self.range_ = np.where(high > self.low_, high - self.low_, 1.0)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        data = self._scaled(x), y
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = SKAN([x.shape[1], *self.hidden, outputs], self.pool, self.select, self.keep, norm=self.norm)
            network, self.history_ = fit_skan(
                network,
                data,
                data if self.selection == "validation" else None,
                steps=self.steps,
                lr=self.lr,
                weight_decay=self.weight_decay,
                batch_size=self.batch_size,
                loss=loss,
                selection=self.selection,
                seed=seed,
            )
        # one row at a time and many at once must give the same numbers, which float32 products do not quite
        self.network_ = network.double()
        self.n_iter_ = self.steps

    def _scaled(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(2 * (x - self.low_) / self.range_ - 1).float()

    def _outputs(self, x: Any) -> Tensor:
        check_is_fitted(self, "network_")
        table = validate_data(self, x, reset=False, dtype=np.float64)
        with torch.inference_mode():
            outputs: Tensor = self.network_(self._scaled(table).double())
        return outputs


class SKANRegressor(RegressorMixin, _SKANEstimator):
    """Regression with a network of S-KAN layers, trained in three stages by ``fit``.

    Parameters
    ----------
    hidden : sequence of int
        Nodes of the hidden layers.
    pool, select, keep, norm
        See [`SKANLinear`][classact.nn.SKANLinear].
    steps, lr, weight_decay, batch_size, selection
        See [`fit_skan`][classact.nn.fit_skan]; selection by validation uses the training data.
    random_state : int, RandomState or None
        Of the initial weights and the batches.

    Attributes
    ----------
    network_ : SKAN
        The pruned network in double precision, for inputs scaled to [-1, 1] and a target of mean 0 and deviation 1.
    history_ : SKANHistory
        How the training went.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    >>> model = SKANRegressor(steps=100, random_state=0).fit(x, x[:, 0] * x[:, 1])
    >>> model.predict(x).shape
    (200,)
    """

    def fit(self, X: Any, y: Any) -> "SKANRegressor":
        """Fit to a table (n, D) and targets (n,)."""
        x, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        self.mean_, self.std_ = float(target.mean()), float(target.std()) or 1.0
        scaled = torch.from_numpy((target - self.mean_) / self.std_).float().unsqueeze(1)
        self._train(x, scaled, 1, F.mse_loss)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predict (n,) targets."""
        return self._outputs(X).squeeze(1).numpy() * self.std_ + self.mean_


class SKANClassifier(ClassifierMixin, _SKANEstimator):
    """Classification with a network of S-KAN layers and cross-entropy.

    Parameters are those of [`SKANRegressor`][classact.nn.SKANRegressor].

    Attributes
    ----------
    classes_ : (C,)
        Labels, in the order of the network's outputs.
    network_ : SKAN
        The pruned network in double precision, for inputs scaled to [-1, 1].
    history_ : SKANHistory
        How the training went.
    """

    def fit(self, X: Any, y: Any) -> "SKANClassifier":
        """Fit to a table (n, D) and labels (n,)."""
        x, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, target = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected at least two classes, got one class, {self.classes_[0]!r}")
        self._train(x, torch.from_numpy(target).long(), len(self.classes_), F.cross_entropy)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n, C); for two classes their difference (n,)."""
        logits = self._outputs(X).numpy()
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, C)."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Predict (n,) labels."""
        chosen = self._outputs(X).argmax(1).numpy()  # first, since it tells whether the estimator is fitted
        return self.classes_[chosen]
