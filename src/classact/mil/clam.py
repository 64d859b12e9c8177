"""CLAM: clustering-constrained attention multiple-instance learning, with a single attention branch.

Lu, Williamson, Chen, Chen, Barbieri, Mahmood: Data-efficient and weakly supervised computational pathology on
whole-slide images, Nature Biomedical Engineering 2021, https://arxiv.org/abs/2004.09666. Code of the authors:
mahmoodlab/CLAM.

The bag is pooled by gated attention. Beside it every class has a classifier of instances, which learns, for the class
of the bag, that the k most attended instances are evidence and the k least attended are not.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.model import MILLoss, MILModel, check_bags, embedding_width, mask_logits


class CLAMOutput(NamedTuple):
    """A [`MILOutput`][classact.mil.MILOutput] with what the clustering of instances needs; k = min(k_sample, K).

    Attributes
    ----------
    instance_logits : (N, C, 2k, 2)
        For every class, the scores "not evidence" and "evidence" of the k most attended instances (most attended first)
        and of the k least attended ones (least attended first).
    instance_mask : (N, 2k) bool
        False in the slots that a bag of fewer than k instances cannot fill.
    """

    logits: Float[Tensor, "n c"]
    attention_logits: Float[Tensor, "n k"]
    embedding: Float[Tensor, "n d"]
    instance_logits: Float[Tensor, "n c s 2"]
    instance_mask: Bool[Tensor, "n s"]

    @property
    def attention(self) -> Float[Tensor, "n k"]:
        """Weight of every instance in its bag; rows sum to 1, padding gets exactly 0."""
        return self.attention_logits.softmax(-1)


class CLAMSB(MILModel):
    """CLAM with a single attention branch; train it with [`CLAMLoss`][classact.mil.CLAMLoss].

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width of the instance embedding (linear layer with bias and ReLU, as in the authors' code).
    hidden : int
        Width of the gated attention network.
    dropout : float
        Dropout on the embedded instances and on both factors of the gated attention.
    k_sample : int
        Number k of most and of least attended instances to cluster; a bag of fewer instances gives all it has, twice.

    Examples
    --------
    >>> import torch
    >>> model, loss = CLAMSB(in_dim=384, n_classes=3), CLAMLoss()
    >>> output = model(torch.randn(2, 500, 384))
    >>> loss(output, torch.tensor([1, 0])).backward()
    >>> output.instance_logits.shape
    torch.Size([2, 3, 16, 2])
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        hidden: int = 256,
        dropout: float = 0.25,
        k_sample: int = 8,
    ) -> None:
        super().__init__(in_dim, n_classes, dim=dim, hidden=hidden, dropout=dropout, k_sample=k_sample)
        if k_sample < 1:
            raise ValueError(f"k_sample: expected at least 1, got {k_sample}")
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        dim = dim or embedding_width(in_dim)
        self.k_sample = k_sample
        self.reduce = nn.Linear(in_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(dim, 2 * hidden)  # value and gate in one product
        self.score = nn.Linear(hidden, 1)
        self.instance_classifier = nn.Linear(dim, 2 * n_classes)  # the C classifiers side by side
        self.classifier = nn.Linear(dim, n_classes)

    def embed(self, x: Float[Tensor, "n k d"]) -> Float[Tensor, "n k h"]:
        """Linear layer, ReLU, dropout."""
        return self.dropout(F.relu(self.reduce(x)))

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Attention-weighted mean of the embedded instances."""
        value, gate = self.hidden(h).chunk(2, dim=-1)
        gated = self.dropout(value.tanh()) * self.dropout(gate.sigmoid())
        logits = mask_logits(self.score(gated).squeeze(-1), mask)
        return (logits.softmax(-1).unsqueeze(1) @ h).squeeze(1), logits

    def cluster(
        self,
        h: Float[Tensor, "n k h"],
        attention_logits: Float[Tensor, "n k"],
        mask: Bool[Tensor, "n k"] | None = None,
    ) -> tuple[Float[Tensor, "n c s 2"], Bool[Tensor, "n s"]]:
        """Classify the most and the least attended instances; see [`CLAMOutput`][classact.mil.CLAMOutput]."""
        k = min(self.k_sample, h.shape[1])
        scores = attention_logits.detach()  # the choice of instances has no gradient
        top = scores.topk(k, dim=-1).indices
        bottom = mask_logits(-scores, mask).topk(k, dim=-1).indices
        index = torch.cat([top, bottom], dim=-1)
        chosen = h.gather(1, index.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
        logits = self.instance_classifier(chosen).unflatten(-1, (self.n_classes, 2)).transpose(1, 2)
        # padding sorts behind all that is real, both times
        real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.gather(1, index)
        return logits, real

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> CLAMOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel]."""
        check_bags(x, mask, self.in_dim)
        h = self.embed(x)
        z, attention_logits = self.pool(h, mask)
        return CLAMOutput(self.head(z), attention_logits, z, *self.cluster(h, attention_logits, mask))


def smooth_top1_svm(logits: Float[Tensor, "*n 2"], target: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Smooth top-1 SVM of two classes with margin 1 and temperature 1, element by element.

    Berrada, Zisserman, Kumar: Smooth Loss Functions for Deep Top-k Classification, ICLR 2018,
    https://arxiv.org/abs/1802.07595. The log-sum-exp over the two classes, ``log(exp(0) + exp(1 + s_other - s_y))``, is
    a softplus. The published code takes the hard hinge instead where the scores differ by more than log(1000), to save
    its exponentials from overflow; the softplus needs no such switch.

    Parameters
    ----------
    logits : (..., 2)
        Scores of the two classes.
    target : (...)
        True class, 0 or 1.

    Examples
    --------
    >>> import torch
    >>> smooth_top1_svm(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    difference = logits[..., 0] - logits[..., 1]
    return F.softplus(1 + torch.where(target == 1, difference, -difference))


class CLAMLoss(MILLoss):
    """Cross-entropy of the bag, and the clustering of its most and least attended instances.

    Parameters
    ----------
    bag_weight : float
        Weight of the cross-entropy, in [0, 1]; the clustering gets the rest. 0.7 in the paper.
    instance_loss : {"svm", "ce"}
        [`smooth_top1_svm`][classact.mil.smooth_top1_svm], as in the paper, or the cross-entropy.
    subtyping : bool
        The classes exclude each other also within a bag: for the classes that the bag does not have, the most attended
        instances are no evidence; the terms of all classes are averaged.
    class_weight : (C,), optional
        Weight of each class in the cross-entropy of the bag.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        bag_weight: float = 0.7,
        instance_loss: Literal["svm", "ce"] = "svm",
        subtyping: bool = False,
        class_weight: Float[Tensor, " c"] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= bag_weight <= 1:
            raise ValueError(f"bag_weight: expected a number in [0, 1], got {bag_weight}")
        if instance_loss not in ("svm", "ce"):
            raise ValueError(f"instance_loss: expected 'svm' or 'ce', got {instance_loss!r}")
        self.bag_weight, self.instance_loss, self.subtyping = bag_weight, instance_loss, subtyping
        self.register_buffer("class_weight", class_weight)

    def clustering(self, output: CLAMOutput, target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean over the bags of the instance loss."""
        logits, real = output.instance_logits, output.instance_mask
        classes, slots = logits.shape[1:3]
        is_top = torch.arange(slots, device=logits.device) < slots // 2
        is_own = F.one_hot(target, classes).bool()[:, :, None]  # (N, C, 1)
        evidence = (is_own & is_top).long()  # (N, C, 2k): the most attended instances of the bag's own class
        if self.instance_loss == "svm":
            loss = smooth_top1_svm(logits, evidence)
        else:
            loss = F.cross_entropy(logits.flatten(0, 2), evidence.flatten(), reduction="none").view_as(evidence)
        used = real[:, None] & (is_own | is_top if self.subtyping else is_own)
        by_class = loss.where(used, 0).sum(-1) / used.sum(-1).clamp(min=1)
        return (by_class.mean(1) if self.subtyping else by_class.sum(1)).mean()

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the loss of a [`CLAMOutput`][classact.mil.CLAMOutput].

        Raises
        ------
        TypeError
            If the output comes from a model without a clustering of instances.
        """
        if not hasattr(output, "instance_mask"):
            raise TypeError(f"output: CLAMLoss needs the output of CLAMSB, got {type(output).__name__}")
        bag = F.cross_entropy(output.logits, target, weight=self.class_weight)
        return self.bag_weight * bag + (1 - self.bag_weight) * self.clustering(output, target)
