"""Hyperspherical embedding: a classifier of directions, to which classes are added without training.

Pereira, Joly, Valduriez, Porto: Hyperspherical embedding for novel class classification, 2021,
https://arxiv.org/abs/2102.03243; the first author's package https://github.com/R-S-P-MODELS/pyopenset. The loss is the
normalised softmax of Zhai and Wu, BMVC 2019, https://arxiv.org/abs/1811.12649; adding a class by its mean embedding is
weight imprinting (Qi, Brown, Lowe, CVPR 2018).

Features f(x) and class weights w_k are scaled to length 1 and there is no bias, so that a class is a direction:
``logit_k = s cos(w_k, f(x))``, trained with plain cross-entropy, without pairs or triplets. A new class needs no
training: its direction is the mean of the *normalised* embeddings of some examples, normalised again. It competes with
the known classes (*joint*), or new classes compete with each other (*disjoint*).

The package rescales the weights after every update, which first happens after the first one; here they have length 1
from the start, and by default they are normalised in ``forward``, which has the same solutions. Known classes' weights
are learned separators while those of new classes are means, to which samples are closer: in the joint scenario new
classes win too often. The paper does it so (``known="weights"``); ``known="prototypes"`` takes means for all.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

KnownClasses = Literal["weights", "prototypes"]


def unit(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Scale vectors to length 1, in float32 at least; zero stays zero, with a finite gradient.

    Examples
    --------
    >>> import torch
    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def class_prototype(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Direction of a class: the mean of normalised embeddings, normalised.

    Parameters
    ----------
    embeddings : (n, d)
        Of examples, at least one; of any length.

    Raises
    ------
    ValueError
        If there are none.

    Examples
    --------
    >>> import torch
    >>> class_prototype(torch.tensor([[10.0, 0.0], [0.0, 1.0]]))
    tensor([0.7071, 0.7071])
    """
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"embeddings: expected shape (n, d) with at least one row, got {tuple(embeddings.shape)}")
    return unit(unit(embeddings).mean(0))


def lowest_loss(n_classes: int, scale: float) -> float:
    """Smallest possible cross-entropy at a scale s: K classes at the corners of a simplex, every sample on its own.

    ``log(1 + (K - 1) exp(-s K / (K - 1)))``; a scale at which it is not small is too small.

    Examples
    --------
    >>> round(lowest_loss(1000, 10.0), 5), round(lowest_loss(1000, 20.0), 8)
    (0.04392, 2.02e-06)
    """
    if n_classes < 2:
        raise ValueError(f"n_classes: expected at least 2, got {n_classes}")
    return math.log1p((n_classes - 1) * math.exp(-scale * n_classes / (n_classes - 1)))


class NormalizedLinear(nn.Module):
    """Normalised softmax: logits ``s cos(w_k, x)``, and classes that come and go.

    Logits are computed in float32 at least, under autocast too.

    Parameters
    ----------
    in_features : int
        d.
    n_classes : int
        K; 0 for a head that only gets added classes.
    scale : float
        s, positive: 10, or 20 for more than a hundred classes; see
        [`lowest_loss`][classact.discover.hypersphere.lowest_loss].
    constraint : {"forward", "project"}
        How weights are kept at length 1: they are normalised in ``forward``; or ``project_`` does it, to be called
        after every step of an optimiser.
    learn_scale : bool
        Learn s, which stays positive; the paper's is fixed.

    Examples
    --------
    >>> import torch
    >>> head = NormalizedLinear(in_features=2, n_classes=0)
    >>> head.add_class(torch.tensor([[1.0, 0.0]])), head.add_class(torch.tensor([[0.0, 2.0], [0.0, 5.0]]))
    (0, 1)
    >>> head(torch.tensor([[3.0, 4.0]]))
    tensor([[6., 8.]], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        scale: float = 10.0,
        constraint: Literal["forward", "project"] = "forward",
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or n_classes < 0:
            raise ValueError(
                f"in_features, n_classes: expected at least 1 and at least 0, got {in_features}, {n_classes}"
            )
        if scale <= 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        if constraint not in ("forward", "project"):
            raise ValueError(f"constraint: expected 'forward' or 'project', got {constraint!r}")
        self.in_features, self.constraint, self.learn_scale = in_features, constraint, learn_scale
        self.weight = nn.Parameter(unit(torch.randn(n_classes, in_features)))
        self.log_scale: Tensor | float
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn_scale else math.log(scale)

    @property
    def n_classes(self) -> int:
        """Number of classes at present."""
        return len(self.weight)

    @property
    def scale(self) -> float:
        """Present value of s."""
        return math.exp(float(self.log_scale.detach() if isinstance(self.log_scale, Tensor) else self.log_scale))

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this head as it is at present."""
        return {
            "in_features": self.in_features,
            "n_classes": self.n_classes,
            "scale": self.scale,
            "constraint": self.constraint,
            "learn_scale": self.learn_scale,
        }

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Map embeddings (N, d), of any length, to logits (N, K)."""
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected shape (N, {self.in_features}), got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            weight = unit(self.weight) if self.constraint == "forward" else self.weight
            cosine = unit(x).to(weight.dtype) @ weight.T
            return cosine * (self.log_scale.exp() if isinstance(self.log_scale, Tensor) else math.exp(self.log_scale))

    @torch.no_grad()
    def project_(self) -> None:
        """Rescale the weights to length 1."""
        self.weight.copy_(unit(self.weight))

    def add_class(self, embeddings: Float[Tensor, "n d"]) -> int:
        """Append a class, whose weight is the prototype of its embeddings, and return its number.

        Nothing else changes. The weights are a new parameter afterwards, unknown to optimisers made before.

        Raises
        ------
        ValueError
            If there are no embeddings, or of another width.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.in_features:
            raise ValueError(f"embeddings: expected shape (n, {self.in_features}), got {tuple(embeddings.shape)}")
        added = class_prototype(embeddings.detach()).to(self.weight)
        self._replace(torch.cat([self.weight.detach(), added.unsqueeze(0)]))
        return self.n_classes - 1

    def remove_class(self, k: int) -> None:
        """Remove a class; the numbers of those after it fall by one."""
        if not 0 <= k < self.n_classes:
            raise ValueError(f"k: expected a class from 0 to {self.n_classes - 1}, got {k}")
        self._replace(torch.cat([self.weight.detach()[:k], self.weight.detach()[k + 1 :]]))

    def _replace(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)


class HypersphereClassifier(nn.Module):
    """An encoder and a [`NormalizedLinear`][classact.discover.NormalizedLinear] head; classes are added by examples.

    Parameters
    ----------
    encoder : Module
        Maps a batch to features (N, d), best by a linear layer without bias at its end.
    dim : int
        d.
    n_classes, scale, constraint, learn_scale
        Of the head.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> x, y = torch.randn(90, 8) + 3 * torch.eye(8)[:3].repeat(30, 1), torch.arange(90) % 3
    >>> model = fit_hypersphere(nn.Linear(8, 4, bias=False), x, y, epochs=20, lr=1e-2)
    >>> model.add_class(torch.randn(5, 8) + 3 * torch.eye(8)[3])
    3
    >>> model.predict(x, known="prototypes").shape
    torch.Size([90])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        n_classes: int,
        scale: float = 10.0,
        constraint: Literal["forward", "project"] = "forward",
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = NormalizedLinear(dim, n_classes, scale, constraint, learn_scale)
        self.register_buffer("prototype_sum", torch.zeros(n_classes, dim))
        self.prototype_sum: Tensor

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this network as it is at present."""
        head = self.head.config
        return {"encoder": self.encoder, "dim": head.pop("in_features"), **head}

    @property
    def n_classes(self) -> int:
        """Number of classes at present."""
        return self.head.n_classes

    def forward(self, x: Float[Tensor, "n *s"]) -> Float[Tensor, "n k"]:
        """Logits (N, K)."""
        return self.head(self.encoder(x))

    def embed(self, x: Float[Tensor, "n *s"], batch_size: int = 512) -> Float[Tensor, "n d"]:
        """Embeddings of length 1, in evaluation mode and without gradients."""
        if not len(x):
            raise ValueError("x: expected at least one input, got none")
        with _evaluating(self), torch.no_grad():
            return torch.cat([unit(self.encoder(part)) for part in x.split(batch_size)])

    def set_prototypes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compute the prototypes of all present classes anew, from batches of inputs and classes.

        Needed for ``known="prototypes"``, and again whenever the encoder has changed. Embeddings are not kept.
        """
        total = torch.zeros_like(self.prototype_sum)
        for x, y in batches:
            embeddings = self.embed(x.to(total.device))
            _check_labels(y, self.n_classes)
            total.index_add_(0, y.to(total.device), embeddings.to(total.dtype))
        self.prototype_sum = total

    def add_class(self, x: Float[Tensor, "n *s"]) -> int:
        """Append a class given by examples (n, ...), n >= 1, and return its number; nothing is trained."""
        embeddings = self.embed(x)
        number = self.head.add_class(embeddings)
        row = embeddings.sum(0, keepdim=True).to(self.prototype_sum)
        self.prototype_sum = torch.cat([self.prototype_sum, row])
        return number

    def remove_class(self, k: int) -> None:
        """Remove a class; the numbers of those after it fall by one."""
        self.head.remove_class(k)
        self.prototype_sum = torch.cat([self.prototype_sum[:k], self.prototype_sum[k + 1 :]])

    def disjoint(self, supports: Sequence[Tensor]) -> NormalizedLinear:
        """Make a head of new classes alone, one for each element of examples (n, ...), for embeddings of this model."""
        if not len(supports):
            raise ValueError("supports: expected examples of at least one class, got none")
        head = NormalizedLinear(self.head.in_features, 0, self.head.scale).to(self.head.weight)
        for x in supports:
            head.add_class(self.embed(x))
        return head

    def logits(self, x: Float[Tensor, "n *s"], known: KnownClasses = "weights") -> Float[Tensor, "n k"]:
        """Scaled cosines (N, K) in evaluation mode, with the head's weights or with the prototypes of all classes.

        Raises
        ------
        ValueError
            If a class has no prototype yet.
        """
        if known not in ("weights", "prototypes"):
            raise ValueError(f"known: expected 'weights' or 'prototypes', got {known!r}")
        embeddings = self.embed(x)
        if known == "weights":
            with torch.no_grad():
                return self.head(embeddings)
        if missing := [k for k, row in enumerate(self.prototype_sum) if not row.any()]:
            raise ValueError(f"known: classes {missing} have no prototype; call set_prototypes with examples of them")
        return self.head.scale * embeddings @ unit(self.prototype_sum).T

    def predict(
        self, x: Float[Tensor, "n *s"], known: KnownClasses = "weights", threshold: float | None = None
    ) -> Int[Tensor, " n"]:
        """Class of the largest cosine.

        Parameters
        ----------
        x : (N, ...)
            Inputs.
        known : {"weights", "prototypes"}
            Compare with the learned weights of known classes and the prototypes of added ones, as the paper does; or
            with prototypes of all.
        threshold : float, optional
            Open set: below this cosine a row is of no class, -1. Not part of the paper.
        """
        logits = self.logits(x, known)
        best = logits.argmax(1)
        if threshold is None:
            return best
        return best.masked_fill(logits.amax(1) < threshold * self.head.scale, -1)


def _check_labels(y: Tensor, n_classes: int) -> None:
    if len(y) and (y.min() < 0 or y.max() >= n_classes):
        raise ValueError(f"y: expected classes from 0 to {n_classes - 1}, got {int(y.min())} to {int(y.max())}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def fit_hypersphere(
    encoder: nn.Module,
    x: Float[Tensor, "n *s"],
    y: Int[Tensor, " n"],
    *,
    scale: float = 10.0,
    constraint: Literal["forward", "project"] = "forward",
    learn_scale: bool = False,
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
) -> HypersphereClassifier:
    """Train a copy of an encoder with normalised softmax on known classes (Adam), and compute their prototypes.

    For data that come from a loader use [`HypersphereModule`][classact.discover.HypersphereModule].

    Parameters
    ----------
    encoder : Module
        Maps a batch to features (N, d).
    x, y : (N, ...), (N,) int
        Inputs, and classes from 0 to K - 1.
    scale, constraint, learn_scale
        See [`NormalizedLinear`][classact.discover.NormalizedLinear].
    epochs, lr, batch_size
        Of the training.
    seed : int
        Of new weights and batches; the global random state is left as it was.
    device : str
        Where to train.

    Returns
    -------
    HypersphereClassifier
        In evaluation mode.

    Raises
    ------
    ValueError
        If numbers of inputs and classes differ, or a class is negative.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"x, y: expected equal numbers, at least one, got {len(x)}, {len(y)}")
    n_classes = int(y.max()) + 1
    _check_labels(y, n_classes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = copy.deepcopy(encoder).to(device)
        with _evaluating(encoder), torch.no_grad():
            features = encoder(x[:1].to(device))
        if not isinstance(features, Tensor) or features.ndim != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"encoder: expected features (N, d), got {found}")
        model = HypersphereClassifier(encoder, features.shape[1], n_classes, scale, constraint, learn_scale).to(device)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
        model.train()
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).split(batch_size):
                if len(chosen) == 1 < len(x):
                    continue  # batch normalisation cannot be trained on a single row
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen].to(device)), y[chosen].to(device)).backward()
                optimizer.step()
                if constraint == "project":
                    model.head.project_()
        optimizer.zero_grad()
        model.set_prototypes(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return model.eval()


class PrototypeClassifier(ClassifierMixin, BaseEstimator):
    """Nearest class direction, for tables of features: every class is the normalised mean of its normalised rows.

    Rows are compared by their cosine, so features that all point one way, such as positive ones, are better centred
    before, as by a ``StandardScaler``. ``partial_fit`` takes further rows, and further classes, at any time.

    Parameters
    ----------
    scale : float
        s: probabilities are the softmax of s times the cosines.
    threshold : float, optional
        Open set: ``predict`` gives `unknown` where the largest cosine is below this.
    unknown : label
        For rows of no class; among names of classes it becomes a name, as "-1".

    Attributes
    ----------
    classes_ : (C,)
        Labels; -1 is a label like any other.
    prototypes_ : (C, D)
        Directions, of length 1; 0 if the rows of a class cancel.
    sums_ : (C, D)
        Sums of normalised rows.

    Examples
    --------
    >>> import numpy as np
    >>> model = PrototypeClassifier().fit([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]], ["a", "a", "b"])
    >>> model.partial_fit([[-1.0, -1.0]], ["c"]).predict([[-3.0, -2.0], [5.0, 1.0]]).tolist()
    ['c', 'a']
    """

    classes_: np.ndarray
    sums_: np.ndarray
    prototypes_: np.ndarray

    def __init__(self, scale: float = 10.0, threshold: float | None = None, unknown: Any = -1) -> None:
        self.scale = scale
        self.threshold = threshold
        self.unknown = unknown

    def fit(self, X: Any, y: Any) -> "PrototypeClassifier":
        """Fit to rows (n, D) and labels (n,)."""
        return self._add(X, y, None, reset=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "PrototypeClassifier":
        """Add rows to those seen before; labels that are new become new classes, as do those in `classes`."""
        return self._add(X, y, classes, reset=not hasattr(self, "classes_"))

    def _add(self, X: Any, y: Any, classes: Any, reset: bool) -> "PrototypeClassifier":
        if self.scale <= 0:
            raise ValueError(f"scale: expected a positive number, got {self.scale}")
        x, labels = validate_data(self, X, y, dtype=np.float64, reset=reset)
        check_classification_targets(labels)
        known = [labels] if classes is None else [labels, np.asarray(classes)]
        found = np.unique(np.concatenate(known if reset else [*known, self.classes_]))
        sums = np.zeros((len(found), x.shape[1]))
        if not reset:
            sums[np.searchsorted(found, self.classes_)] = self.sums_
        np.add.at(sums, np.searchsorted(found, labels), _unit_rows(x))
        self.classes_, self.sums_, self.prototypes_ = found, sums, _unit_rows(sums)
        return self

    def _cosines(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "classes_")
        cosines: np.ndarray = _unit_rows(validate_data(self, X, dtype=np.float64, reset=False)) @ self.prototypes_.T
        return cosines

    def decision_function(self, X: Any) -> np.ndarray:
        """Scaled cosines (n, C); for two classes their difference (n,)."""
        logits = self.scale * self._cosines(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, C)."""
        logits = self.scale * self._cosines(X)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def predict(self, X: Any) -> np.ndarray:
        """Predict (n,) labels."""
        cosines = self._cosines(X)
        labels: np.ndarray = self.classes_[cosines.argmax(1)]
        return labels if self.threshold is None else np.where(cosines.max(1) < self.threshold, self.unknown, labels)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(length > 0, length, 1.0))
