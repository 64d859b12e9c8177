"""Pooling without attention: mean, max, and logistic regression on simple summaries of a bag.

The last one gives the controls that every comparison needs: does the bag's size alone, or a linear model on
pooled features, do as well as the methods?
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.model import MILModel, MILOutput, check_bags, embedding_width, mask_logits


class MeanMIL(MILModel):
    """Mean of the embedded instances; every instance has the same weight.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width of the instance embedding.
    """

    def __init__(self, in_dim: int, n_classes: int, dim: int | None = None) -> None:
        super().__init__(in_dim, n_classes, dim=dim)
        dim = dim or embedding_width(in_dim)
        self.reduce = nn.Linear(in_dim, dim, bias=False)
        self.classifier = nn.Linear(dim, n_classes)

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Mean over the real instances."""
        logits = mask_logits(h.new_zeros(h.shape[0], 1, h.shape[1]), mask)
        return (logits.softmax(-1) @ h).squeeze(1), logits.squeeze(1)


class MaxMIL(MeanMIL):
    """Element-wise maximum of the embedded instances.

    The attention of an instance is the share of embedding dimensions whose maximum it supplies.
    """

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Maximum over the real instances."""
        z, winner = (h if mask is None else h.masked_fill(~mask.unsqueeze(-1), -torch.inf)).max(dim=1)
        share = h.new_zeros(h.shape[:2]).scatter_add(1, winner, torch.ones_like(z) / z.shape[1])
        return z, share.log()  # log 0 = -inf: no dimension was won


class PooledLogistic(MILModel):
    """Multinomial logistic regression on a summary of the bag, fitted by scikit-learn rather than by steps.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    summary : {"none", "size", "mean", "max"}
        What the regression sees: nothing (the class prevalences), the logarithm of the number of instances, or the
        mean or maximum of the features.
    """

    def __init__(self, in_dim: int, n_classes: int, summary: Literal["none", "size", "mean", "max"] = "mean") -> None:
        super().__init__(in_dim, n_classes, summary=summary)
        if summary not in ("none", "size", "mean", "max"):
            raise ValueError(f"summary: expected none, size, mean or max, got {summary!r}")
        self.summary = summary
        width = {"none": 0, "size": 1}.get(summary, in_dim)
        self.weight = nn.Parameter(torch.zeros(n_classes, width))
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def summarise(self, x: Float[Tensor, "n k d"], mask: Bool[Tensor, "n k"] | None = None) -> Float[Tensor, "n f"]:
        """Return the features of the regression, (N, 0), (N, 1) or (N, D)."""
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.summary == "none":
            return x.new_zeros(x.shape[0], 0)
        count = mask.sum(1, keepdim=True)
        if self.summary == "size":
            return count.to(x.dtype).log()
        real = mask.unsqueeze(-1)
        if self.summary == "mean":
            return x.masked_fill(~real, 0).sum(1) / count
        return x.masked_fill(~real, -torch.inf).amax(1)

    def forward(
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> MILOutput:
        """Classify N bags; the attention is uniform."""
        check_bags(x, mask, self.in_dim)
        z = self.summarise(x, mask)
        logits = mask_logits(x.new_zeros(x.shape[0], 1, x.shape[1]), mask).squeeze(1)
        return MILOutput(F.linear(z, self.weight, self.bias), logits, z)
