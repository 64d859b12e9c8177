"""Remedies for imbalanced classes that change the loss only, and the protocol that makes a data set imbalanced.

Focal loss: Lin, Goyal, Girshick, He, Dollár, ICCV 2017, https://arxiv.org/abs/1708.02002. LDAM with deferred
re-weighting: Cao, Wei, Gaidon, Arechiga, Ma, NeurIPS 2019, https://arxiv.org/abs/1906.07413. Logit adjustment: Menon,
Jayasumana, Rawat, Jain, Veit, Kumar, ICLR 2021, https://arxiv.org/abs/2007.07314.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.model import MILLoss

Counts = Sequence[int] | np.ndarray | Tensor


def make_imbalanced(
    labels: Sequence[int] | np.ndarray | Tensor, ratio: float, minority: int | Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """Choose bags such that the largest class has `ratio` times as many as each minority class.

    Parameters
    ----------
    labels : (n,) int
        Class of every bag.
    ratio : float
        n_max / n_min, at least 1; n_max is the size of the largest class outside `minority`, which stays whole.
    minority : int or sequence of int
        The classes to thin out, each to ``round(n_max / ratio)`` bags, at least 1.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    (m,) int array
        Positions of the chosen bags, in increasing order.

    Raises
    ------
    ValueError
        If the ratio is below 1, no class is left as majority, or a minority class has too few bags.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.repeat([0, 1], 100)
    >>> np.bincount(labels[make_imbalanced(labels, 10, 1, np.random.default_rng(0))]).tolist()
    [100, 10]
    """
    labels = np.asarray(labels)
    rare = np.unique(np.atleast_1d(np.asarray(minority)))
    if ratio < 1:
        raise ValueError(f"ratio: expected at least 1, got {ratio}")
    keep = ~np.isin(labels, rare)
    if not keep.any():
        raise ValueError(f"minority: expected at least one class to be left out of {rare.tolist()}")
    largest = int(np.unique(labels[keep], return_counts=True)[1].max())
    wanted = max(1, round(largest / ratio))
    for c in rare:
        members = np.flatnonzero(labels == c)
        if len(members) < wanted:
            raise ValueError(
                f"minority: ratio {ratio:g} needs {wanted} bags of class {c} beside {largest}, got {len(members)}"
            )
        keep[rng.choice(members, wanted, replace=False)] = True
    return np.flatnonzero(keep)


class FocalLoss(MILLoss):
    """Cross-entropy that counts well classified bags less: ``-w_y (1 - p_y)^gamma log p_y`` (Lin et al., eq. 4 and 5).

    The form for softmax. Like the weighted cross-entropy it is divided by the sum of the weights, so that gamma = 0 is
    `BagCrossEntropy`.

    Parameters
    ----------
    gamma : float
        Focusing parameter, at least 0; 2 in the paper.
    class_weight : (C,), optional
        Weight of each class (alpha of the paper).

    Examples
    --------
    >>> import torch
    >>> from classact.mil import ABMIL
    >>> FocalLoss(gamma=2.0)(ABMIL(384, 2)(torch.randn(4, 100, 384)), torch.tensor([0, 0, 0, 1])).shape
    torch.Size([])
    """

    class_weight: Tensor | None

    def __init__(self, gamma: float = 2.0, class_weight: Float[Tensor, " c"] | None = None) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma: expected 0 or more, got {gamma}")
        self.gamma = gamma
        self.register_buffer("class_weight", class_weight)

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the weighted mean over the bags."""
        log_p = -F.cross_entropy(output.logits, target, reduction="none")
        # the smallest number instead of 0: the derivative of the power is infinite there for gamma below 1
        miss = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
        loss = -(miss**self.gamma) * log_p
        if self.class_weight is None:
            return loss.mean()
        weight = self.class_weight[target]
        return (weight * loss).sum() / weight.sum()


class LDAMLoss(MILLoss):
    """Label-distribution-aware margins, with deferred re-weighting (Cao et al., eq. 13 and algorithm 1).

    Cross-entropy after the true class's logit is lowered by ``scale * margin_y``; the margins fall with the fourth root
    of the class size, ``margin_j = max_margin * (n_min / n_j)^(1/4)``. In the last part of the training classes are
    weighted too.

    Parameters
    ----------
    class_counts : (C,) int
        Training bags of each class.
    max_margin : float
        Margin of the smallest class; 0.5 in the authors' code.
    scale : float
        The factor s that the logits carry already. The authors train cosines times s = 30: give the model a
        [`CosineClassifier`][classact.mil.imbalance.CosineClassifier] and the loss its scale. 1 for a plain linear
        classifier.
    defer : float
        Part of the training, in [0, 1], from which the weights count; 0.8 in the authors' code (epoch 160 of 200), 1
        for LDAM without re-weighting.
    beta : float
        Of the default weights, ``(1 - beta) / (1 - beta^n_j)``, divided by their mean: nearly 1 / n_j for classes well
        below 1 / (1 - beta) bags.
    class_weight : (C,), optional
        These weights instead.

    Examples
    --------
    >>> import torch
    >>> from classact.mil import ABMIL
    >>> model, loss = ABMIL(384, 2), LDAMLoss([90, 10])
    >>> model.classifier = CosineClassifier(128, 2)
    >>> loss(model(torch.randn(4, 100, 384)), torch.tensor([0, 0, 0, 1]), progress=0.9).shape
    torch.Size([])
    """

    margin: Tensor
    deferred_weight: Tensor

    def __init__(
        self,
        class_counts: Counts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        defer: float = 0.8,
        beta: float = 0.9999,
        class_weight: Float[Tensor, " c"] | None = None,
    ) -> None:
        super().__init__()
        counts = _check_counts(class_counts)
        if max_margin < 0:
            raise ValueError(f"max_margin: expected 0 or more, got {max_margin}")
        if scale <= 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        if not 0 <= defer <= 1:
            raise ValueError(f"defer: expected a part in [0, 1], got {defer}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta: expected a number in [0, 1), got {beta}")
        if class_weight is None:
            class_weight = (1 - beta) / (1 - beta**counts)
            class_weight = class_weight / class_weight.mean()
        self.scale, self.defer = scale, defer
        self.register_buffer("margin", (max_margin * (counts.min() / counts) ** 0.25).float())
        self.register_buffer("deferred_weight", class_weight.float())

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:
        """Return the (weighted) mean over the bags."""
        _check_classes(output.logits, self.margin)
        true_class = F.one_hot(target, len(self.margin))
        weight = self.deferred_weight if progress >= self.defer and self.defer < 1 else None
        return F.cross_entropy(output.logits - self.scale * self.margin * true_class, target, weight=weight)


class CosineClassifier(nn.Module):
    """``scale * cos(z, w_c)`` for every class c: the classifier LDAM was published with.

    Parameters
    ----------
    dim, n_classes : int
        Width of the embedding and number of classes.
    scale : float
        The factor s.
    """

    def __init__(self, dim: int, n_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(n_classes, dim))

    def forward(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return the scaled cosines."""
        return self.scale * F.linear(F.normalize(z, dim=-1), F.normalize(self.weight, dim=-1))


class LogitAdjustment(MILLoss):
    """Cross-entropy of the logits shifted by the log of the class frequencies (Menon et al., eq. 10).

    The shift is there in training only, so that the plain logits rank classes as if all were equally frequent.

    Parameters
    ----------
    class_counts : (C,) int
        Training bags of each class.
    tau : float
        Factor of the shift; 1 in the paper, 0 is plain cross-entropy.
    class_weight : (C,), optional
        Weight of each class, as in `BagCrossEntropy`; the paper has none.

    Examples
    --------
    >>> import torch
    >>> from classact.mil import ABMIL
    >>> loss = LogitAdjustment(class_counts=[90, 10])
    >>> loss(ABMIL(384, 2)(torch.randn(4, 100, 384)), torch.tensor([0, 0, 0, 1])).shape
    torch.Size([])
    """

    shift: Tensor
    class_weight: Tensor | None

    def __init__(self, class_counts: Counts, tau: float = 1.0, class_weight: Float[Tensor, " c"] | None = None) -> None:
        super().__init__()
        counts = _check_counts(class_counts)
        if tau < 0:
            raise ValueError(f"tau: expected 0 or more, got {tau}")
        self.register_buffer("shift", (tau * (counts / counts.sum()).log()).float())
        self.register_buffer("class_weight", class_weight)

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the (weighted) mean over the bags."""
        _check_classes(output.logits, self.shift)
        return F.cross_entropy(output.logits + self.shift, target, weight=self.class_weight)


def _check_counts(class_counts: Counts) -> Tensor:
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or len(counts) < 2 or not bool((counts >= 1).all()):
        raise ValueError(f"class_counts: expected at least 1 bag of each of 2 or more classes, got {counts.tolist()}")
    return counts


def _check_classes(logits: Tensor, of_class: Tensor) -> None:
    if logits.shape[1] != len(of_class):
        raise ValueError(f"class_counts: the loss was built for {len(of_class)} classes, got {logits.shape[1]} logits")
