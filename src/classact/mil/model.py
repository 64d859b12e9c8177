"""What every multiple-instance model of the family shares: its interface, its output and its plain loss."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# Width of the instance embedding for the feature widths in use, as in the ACMIL and AEM code.
EMBEDDING_WIDTH = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}


class MILOutput(NamedTuple):
    """What a multiple-instance model answers for N bags of at most K instances.

    Attributes
    ----------
    logits : (N, C)
        Class scores of the bag, before the softmax.
    attention_logits : (N, K)
        Logits of the attention that pooled the bag, *after* masking: -inf on padding and on instances hidden in
        this step. `attention` is their softmax.
    embedding : (N, D)
        The pooled bag, before the classifier.
    """

    logits: Float[Tensor, "n c"]
    attention_logits: Float[Tensor, "n k"]
    embedding: Float[Tensor, "n d"]

    @property
    def attention(self) -> Float[Tensor, "n k"]:
        """Weight of every instance in its bag; rows sum to 1, padding gets exactly 0."""
        return self.attention_logits.softmax(-1)


class MILModel(nn.Module):
    """Base of the family: instances are embedded, pooled into one vector and classified.

    A subclass defines `pool`, makes the layers ``reduce`` and ``classifier`` (or overrides `embed` and `head`), and may
    override `forward` to return more fields. What it passes on as keywords is ``self.config``, the arguments that build
    it again, so that `classact.save` can write it.

    Parameters
    ----------
    in_dim : int
        Width D of the instance features.
    n_classes : int
        Number C of classes, at least 2.
    """

    reduce: nn.Module
    classifier: nn.Module

    def __init__(self, in_dim: int, n_classes: int, **config: Any) -> None:
        super().__init__()
        if in_dim < 1:
            raise ValueError(f"in_dim: expected at least 1 feature, got {in_dim}")
        if n_classes < 2:
            raise ValueError(f"n_classes: expected at least 2 classes, got {n_classes}")
        self.in_dim, self.n_classes = in_dim, n_classes
        self.config = {"in_dim": in_dim, "n_classes": n_classes, **config}

    def embed(self, x: Float[Tensor, "n k d"]) -> Float[Tensor, "n k h"]:
        """Embed every instance: linear layer (without bias in the ACMIL and AEM code) and ReLU."""
        return F.relu(self.reduce(x))

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Pool the embedded instances; returns the bag's embedding and its masked attention logits."""
        raise NotImplementedError

    def head(self, z: Float[Tensor, "n h"]) -> Float[Tensor, "n c"]:
        """Classify pooled bags."""
        return self.classifier(z)

    def forward(
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002 - only some models use it
    ) -> MILOutput:
        """Classify N bags.

        Parameters
        ----------
        x : (N, K, D) floating point
            Instance features, bags padded to the same length K.
        mask : (N, K) bool, optional
            True where an instance is real. Every bag needs at least one.
        coords : (N, K, 2), optional
            Positions of the instances, for models that use them.

        Raises
        ------
        ValueError
            If the rank, the width, the dtype or the mask does not fit.
        """
        check_bags(x, mask, self.in_dim)
        z, attention_logits = self.pool(self.embed(x), mask)
        return MILOutput(self.head(z), attention_logits, z)


def check_bags(x: Tensor, mask: Tensor | None, in_dim: int) -> None:
    """Raise ValueError unless ``x`` is (N, K >= 1, in_dim) floating point and ``mask`` is a bool (N, K)."""
    if x.ndim != 3:
        raise ValueError(f"x: expected bags of shape (N, K, {in_dim}), got shape {tuple(x.shape)}")
    if x.shape[2] != in_dim:
        raise ValueError(f"x: this model was built for {in_dim} features per instance, got {x.shape[2]}")
    if x.shape[1] == 0:
        raise ValueError("x: a bag needs at least one instance, got K = 0")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating-point features, got {x.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(
            f"mask: expected bool of shape {tuple(x.shape[:2])} (True = real), got {mask.dtype} {tuple(mask.shape)}"
        )


def mask_logits(logits: Float[Tensor, "n *maps k"], mask: Bool[Tensor, "n k"] | None) -> Float[Tensor, "n *maps k"]:
    """Set the logits of padded instances to -inf, in every attention map."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask.view(mask.shape[0], *[1] * (logits.ndim - 2), mask.shape[1]), -torch.inf)


def embedding_width(in_dim: int) -> int:
    """Width of the instance embedding where the user gives none.

    The widths of the ACMIL and AEM code for the feature widths they name; elsewhere half the features, within
    [64, 768].
    """
    return EMBEDDING_WIDTH.get(in_dim, min(max(in_dim // 2, 64), 768))


class MILLoss(nn.Module):
    """A term of the training loss: ``loss(output, target, progress)``. Terms add up with ``+``.

    ``progress`` runs from 0 at the first step to 1 at the last, for terms with a schedule.
    """

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:
        """Return the scalar loss of a batch of bags."""
        raise NotImplementedError

    def __add__(self, other: "MILLoss") -> "MILLoss":
        return _Sum([self, other])


class _Sum(MILLoss):
    def __init__(self, terms: list[MILLoss]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:
        losses = [term(output, target, progress) for term in self.terms]
        return sum(losses[1:], start=losses[0])


class BagCrossEntropy(MILLoss):
    """Cross-entropy of the bag's logits: the family's plain loss.

    Parameters
    ----------
    class_weight : (C,), optional
        Weight of each class, as in `torch.nn.CrossEntropyLoss`.
    """

    class_weight: Tensor | None

    def __init__(self, class_weight: Float[Tensor, " c"] | None = None) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the mean cross-entropy over the bags."""
        return F.cross_entropy(output.logits, target, weight=self.class_weight)


class Standardized(nn.Module):
    """A model behind per-feature scaling with fixed statistics (those of the training bags).

    Parameters
    ----------
    network : MILModel
        The model that sees the scaled features.
    mean, scale : (D,), optional
        Subtracted, then divided by; a constant feature should come with scale 1. Default: no change.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Float[Tensor, " d"] | None = None,
        scale: Float[Tensor, " d"] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.in_dim: int = network.in_dim  # type: ignore[assignment]
        self.config = {"network": network}
        self.register_buffer("mean", torch.zeros(self.in_dim) if mean is None else mean)
        self.register_buffer("scale", torch.ones(self.in_dim) if scale is None else scale)

    @classmethod
    def from_bags(cls, network: nn.Module, bags: Iterable[Any]) -> "Standardized":
        """Take the statistics of every feature over all instances of the training bags, read one bag at a time."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for bag in bags:
            x = bag.x.double()
            count += len(x)
            total, squares = total + x.sum(0), squares + x.square().sum(0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0)  # constant features stay as they are
        return cls(network, mean.float(), scale.float())

    def forward(
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,
    ) -> Any:
        """Scale the features and answer as the wrapped model does."""
        check_bags(x, mask, self.in_dim)
        return self.network((x - self.mean) / self.scale, mask, coords)
