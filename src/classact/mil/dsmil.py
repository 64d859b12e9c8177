"""DSMIL: dual-stream multiple-instance learning.

Li, Li, Eliceiri: Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with
Self-supervised Contrastive Learning, CVPR 2021, https://arxiv.org/abs/2011.08939. Code of the authors:
binli123/dsmil-wsi.

The first stream classifies every instance; the highest score of a class names its critical instance. The second stream
attends, once per class, by the similarity of every instance's query to that of the critical instance, and classifies
the C pooled vectors together by a one-dimensional convolution over the classes.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.attention import mean_attention_logits
from classact.mil.model import MILLoss, MILModel, check_bags, embedding_width, mask_logits


class DSMILOutput(NamedTuple):
    """A [`MILOutput`][classact.mil.MILOutput] with what the two streams add.

    Attributes
    ----------
    logits : (N, C)
        The bag's scores: `bag_logits`, which the authors' code evaluates by default; with ``average=True`` their mean
        with the critical instances' scores, the paper's decision.
    attention_logits : (N, K)
        Logits of the mean of the classes' attention maps.
    embedding : (N, C * D)
        The class embeddings side by side.
    bag_logits : (N, C)
        Class scores of the second stream.
    instance_logits : (N, K, C)
        Class scores of every instance (first stream), -inf on padding; their maximum over K is the stream's answer.
    class_embeddings : (N, C, D)
        The bag as each class pools it.
    attention_map_logits : (N, C, K)
        Attention logits of each class, -inf on padding.
    """

    logits: Float[Tensor, "n c"]
    attention_logits: Float[Tensor, "n k"]
    embedding: Float[Tensor, "n cd"]
    bag_logits: Float[Tensor, "n c"]
    instance_logits: Float[Tensor, "n k c"]
    class_embeddings: Float[Tensor, "n c d"]
    attention_map_logits: Float[Tensor, "n c k"]

    @property
    def attention(self) -> Float[Tensor, "n k"]:
        """Weight of every instance in its bag; rows sum to 1, padding gets exactly 0."""
        return self.attention_logits.softmax(-1)

    @property
    def salience(self) -> Float[Tensor, "n k"]:
        """The largest class score of every instance, by which MHIM masks this model (MHIM code)."""
        return self.instance_logits.amax(-1)


class DSMIL(MILModel):
    """Dual-stream multiple-instance learning; train it with [`DSMILLoss`][classact.mil.DSMILLoss].

    The paper feeds frozen features to both streams. Here a bias-free linear layer with ReLU stands in front, as in
    every model of the family, so that a comparison compares the pooling.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width D of the instance embedding.
    dropout : float
        Dropout on the embedded instances.
    hidden : int
        Width of the queries; 128 in the paper.
    nonlinear_q : bool
        Queries by two layers with ReLU and tanh (the default of the authors' code) instead of one linear layer.
    nonlinear_v : bool
        Values by a linear layer with ReLU instead of the embedded instances themselves.
    average : bool
        Answer with the mean of both streams' scores (the paper's decision) instead of the bag stream's (the authors'
        default). `head` always gives the bag stream's.

    Examples
    --------
    >>> import torch
    >>> model, loss = DSMIL(in_dim=384, n_classes=3), DSMILLoss()
    >>> output = model(torch.randn(1, 500, 384))
    >>> loss(output, torch.tensor([1])).backward()
    >>> output.attention_map_logits.shape, output.instance_logits.shape
    (torch.Size([1, 3, 500]), torch.Size([1, 500, 3]))
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        dropout: float = 0.0,
        hidden: int = 128,
        nonlinear_q: bool = True,
        nonlinear_v: bool = False,
        average: bool = False,
    ) -> None:
        super().__init__(
            in_dim,
            n_classes,
            dim=dim,
            dropout=dropout,
            hidden=hidden,
            nonlinear_q=nonlinear_q,
            nonlinear_v=nonlinear_v,
            average=average,
        )
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        dim = dim or embedding_width(in_dim)
        self.average = average
        self.reduce = nn.Linear(in_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.instance_classifier = nn.Linear(dim, n_classes)
        self.query: nn.Module = nn.Linear(dim, hidden)
        if nonlinear_q:
            self.query = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh())
        self.value: nn.Module = nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) if nonlinear_v else nn.Identity()
        self.classifier = nn.Conv1d(n_classes, n_classes, kernel_size=dim)  # every class sees all class embeddings

    def embed(self, x: Float[Tensor, "n k d"]) -> Float[Tensor, "n k h"]:
        """Bias-free linear layer, ReLU, dropout."""
        return self.dropout(F.relu(self.reduce(x)))

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n ch"], Float[Tensor, "n k"]]:
        """Pool once per class; returns the class embeddings side by side and the mean of the attention maps."""
        _, classes, maps = self._streams(h, mask)
        return classes.flatten(1), mean_attention_logits(maps)

    def head(self, z: Float[Tensor, "n ch"]) -> Float[Tensor, "n c"]:
        """Classify the class embeddings together: the bag stream's scores."""
        return self.classifier(z.unflatten(-1, (self.n_classes, -1))).squeeze(-1)

    def _streams(
        self, h: Float[Tensor, "n k d"], mask: Bool[Tensor, "n k"] | None
    ) -> tuple[Float[Tensor, "n k c"], Float[Tensor, "n c d"], Float[Tensor, "n c k"]]:
        scores = self.instance_classifier(h)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        q = self.query(h)
        critical = scores.argmax(1)  # (N, C)
        q_critical = q.gather(1, critical.unsqueeze(-1).expand(-1, -1, q.shape[-1]))
        maps = mask_logits(q_critical @ q.transpose(1, 2) / math.sqrt(q.shape[-1]), mask)
        return scores, maps.softmax(-1) @ self.value(h), maps

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> DSMILOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel]."""
        check_bags(x, mask, self.in_dim)
        scores, classes, maps = self._streams(self.embed(x), mask)
        z = classes.flatten(1)
        bag = self.head(z)
        logits = (bag + scores.max(1).values) / 2 if self.average else bag
        return DSMILOutput(logits, mean_attention_logits(maps), z, bag, scores, classes, maps)


class DSMILLoss(MILLoss):
    """Cross-entropy of the bag stream and of the critical instances' scores, half each in the authors' code.

    Parameters
    ----------
    instance_weight : float
        Weight of the instance stream, in [0, 1]; the bag stream gets the rest.
    class_weight : (C,), optional
        Weight of each class in both cross-entropies.
    """

    class_weight: Tensor | None

    def __init__(self, instance_weight: float = 0.5, class_weight: Float[Tensor, " c"] | None = None) -> None:
        super().__init__()
        if not 0 <= instance_weight <= 1:
            raise ValueError(f"instance_weight: expected a number in [0, 1], got {instance_weight}")
        self.instance_weight = instance_weight
        self.register_buffer("class_weight", class_weight)

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the loss of a [`DSMILOutput`][classact.mil.DSMILOutput].

        Raises
        ------
        TypeError
            If the output comes from a model without instance scores.
        """
        if not hasattr(output, "bag_logits") or not hasattr(output, "instance_logits"):
            raise TypeError(f"output: DSMILLoss needs the output of DSMIL, got {type(output).__name__}")
        bag = F.cross_entropy(output.bag_logits, target, weight=self.class_weight)
        critical = output.instance_logits.max(1).values
        instance = F.cross_entropy(critical, target, weight=self.class_weight)
        return (1 - self.instance_weight) * bag + self.instance_weight * instance
