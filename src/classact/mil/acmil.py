"""ACMIL: attention-challenging multiple-instance learning.

Zhang, Li, Sun, Zheng, Zhu, Yang: Attention-Challenging Multiple Instance Learning for Whole Slide Image
Classification, ECCV 2024, https://arxiv.org/abs/2311.07125. Code of the authors: dazhangyu123/ACMIL.

Attention collapses on few instances. Multiple branch attention (MBA) pools with M attention maps, each with its own
classifier, pushed apart by a diversity loss; stochastic top-k instance masking (STKIM) hides, while training, a random
part of the k most attended instances of every map, so that the softmax hands their weight to the others.

The authors report (repository news, October 2024) that ``mask_drop=0`` is sometimes better and more stable than the
published 0.6: compare both.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from classact.mil.attention import (
    AttentionPool,
    BranchLinear,
    HeadReadout,
    MultiHeadAttentionPool,
    mean_attention_logits,
)
from classact.mil.model import MILLoss, MILModel, check_bags, embedding_width


class ACMILOutput(NamedTuple):
    """A [`MILOutput`][classact.mil.MILOutput] with what the M branches add.

    Attributes
    ----------
    branch_logits : (N, M, C)
        Class scores of each branch; no branch (M = 0) in a model with one, which has no branch classifier.
    attention_map_logits : (N, M, H, K)
        Attention logits of each branch and head (H = 1 for gated attention), after masking and STKIM.
    """

    logits: Float[Tensor, "n c"]
    attention_logits: Float[Tensor, "n k"]
    embedding: Float[Tensor, "n d"]
    branch_logits: Float[Tensor, "n m c"]
    attention_map_logits: Float[Tensor, "n b h k"]

    @property
    def attention(self) -> Float[Tensor, "n k"]:
        """Weight of every instance in its bag; rows sum to 1, padding gets exactly 0."""
        return self.attention_logits.softmax(-1)


def stochastic_topk_mask(
    scores: Float[Tensor, "*maps k"],
    top_k: int = 10,
    drop: float = 0.6,
    generator: Generator | None = None,
) -> Float[Tensor, "*maps k"]:
    """Hide a random part of the largest scores of every attention map (STKIM, section 3.3).

    Of the ``m = min(top_k, real instances)`` largest scores of a map, exactly ``int(m * drop)``, chosen uniformly, are
    set to -inf. Slots that are -inf already (padding) are never counted or chosen.

    Parameters
    ----------
    scores : (..., K)
        Attention logits, -inf on padding.
    top_k : int
        Size of the pool to choose from; 0 hides nothing.
    drop : float
        Part of the pool that is hidden, in [0, 1).
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    (..., K)
        The scores with -inf at the hidden instances.

    Examples
    --------
    >>> import torch
    >>> stochastic_topk_mask(torch.arange(50.0), top_k=10, drop=0.6).isinf().sum()
    tensor(6)
    """
    _check_masking(top_k, drop)
    pool = min(top_k, scores.shape[-1])
    if pool == 0 or drop == 0:
        return scores
    top, index = scores.detach().topk(pool, dim=-1)
    real = top > -torch.inf
    # int(m * drop) for every m, by the same float product as the authors' code
    hidden_of = torch.tensor([int(m * drop) for m in range(pool + 1)], device=scores.device)
    n_hidden = hidden_of[real.sum(-1, keepdim=True)]
    draw = torch.rand(top.shape, generator=generator, device=scores.device).masked_fill(~real, torch.inf)
    hide = draw.argsort(-1).argsort(-1) < n_hidden  # rank of each draw within its map
    return scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, hide), -torch.inf)


def attention_diversity(attention: Float[Tensor, "n m *heads k"]) -> Float[Tensor, ""]:
    """Mean cosine similarity between the attention maps of every pair of branches (eq. 6), in [0, 1].

    Parameters
    ----------
    attention : (N, M, K) or (N, M, H, K)
        Attention weights (after masking and softmax) of M branches; heads are compared head by head.

    Examples
    --------
    >>> import torch
    >>> attention_diversity(torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]))
    tensor(0.)
    """
    branches = attention.shape[1]
    if branches < 2:
        return attention.new_zeros(())
    unit = F.normalize(attention.movedim(1, -2), dim=-1, eps=1e-8)  # (N, [H,] M, K)
    gram = unit @ unit.transpose(-1, -2)
    off_diagonal = gram.sum((-1, -2)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (off_diagonal / (branches * (branches - 1))).mean()


class MultiBranchAttention(nn.Module):
    """Multiple branch attention with stochastic top-k instance masking (MBA + STKIM).

    Parameters
    ----------
    dim : int
        Width D of the embedded instances.
    hidden : int
        Width of the gated attention network.
    branches : int
        Number M of attention branches.
    top_k, mask_drop
        STKIM while training: of the `top_k` largest scores of each map, hide the part `mask_drop`.
    attention : {"gated", "mha"}
        Gated attention whose branches share all but the last layer, or one multi-head attention per branch.
    heads : int
        Heads of ``"mha"``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        branches: int = 5,
        top_k: int = 10,
        mask_drop: float = 0.6,
        attention: Literal["gated", "mha"] = "gated",
        heads: int = 8,
    ) -> None:
        super().__init__()
        if branches < 1:
            raise ValueError(f"branches: expected at least 1, got {branches}")
        _check_masking(top_k, mask_drop)
        if attention not in ("gated", "mha"):
            raise ValueError(f"attention: expected 'gated' or 'mha', got {attention!r}")
        self.top_k, self.mask_drop, self.kind = top_k, mask_drop, attention
        self.scores: nn.Module
        if attention == "gated":
            self.scores = AttentionPool(dim, hidden, gated=True, branches=branches)
        else:
            self.scores = MultiHeadAttentionPool(dim, heads, branches)
            self.bag_readout = HeadReadout(dim, heads)

    def forward(
        self,
        h: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "n m d"], Float[Tensor, "n d"], Float[Tensor, "n m h k"]]:
        """Return the branches' embeddings, the bag's embedding and the attention logits (N, M, H, K)."""
        logits = self.scores(h, mask)
        if self.training:
            logits = stochastic_topk_mask(logits, self.top_k, self.mask_drop, generator)
        if self.kind == "gated":
            attention = logits.softmax(-1)
            return attention @ h, (attention.mean(1, keepdim=True) @ h).squeeze(1), logits.unsqueeze(2)
        attention = logits.softmax(-1)
        bag = self.bag_readout(attention.mean(1, keepdim=True), h).squeeze(1)
        return self.scores.readout(attention, h), bag, logits  # type: ignore[operator]


class ACMIL(MILModel):
    """Attention-challenging multiple-instance learning; train it with [`ACMILLoss`][classact.mil.ACMILLoss].

    ``ACMIL(..., branches=1, top_k=0)`` is gated ABMIL.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width of the instance embedding.
    branches : int
        Number M of attention branches.
    top_k, mask_drop
        STKIM: of the `top_k` largest scores of each map, hide the part `mask_drop` (in [0, 1)) while training.
    attention : {"gated", "mha"}
        Kind of attention; see [`MultiBranchAttention`][classact.mil.MultiBranchAttention].

    Examples
    --------
    >>> import torch
    >>> model, loss = ACMIL(in_dim=384, n_classes=2), ACMILLoss()
    >>> output = model(torch.randn(1, 500, 384))
    >>> loss(output, torch.tensor([1])).backward()
    >>> output.branch_logits.shape
    torch.Size([1, 5, 2])
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        branches: int = 5,
        top_k: int = 10,
        mask_drop: float = 0.6,
        attention: Literal["gated", "mha"] = "gated",
        hidden: int = 128,
        heads: int = 8,
    ) -> None:
        super().__init__(
            in_dim,
            n_classes,
            dim=dim,
            branches=branches,
            top_k=top_k,
            mask_drop=mask_drop,
            attention=attention,
            hidden=hidden,
            heads=heads,
        )
        dim = dim or (embedding_width(in_dim) if attention == "gated" else embedding_width(in_dim) // heads * heads)
        self.reduce = nn.Linear(in_dim, dim, bias=False)
        self.attention = MultiBranchAttention(dim, hidden, branches, top_k, mask_drop, attention, heads)
        self.branch_classifier = BranchLinear(branches, dim, n_classes) if branches > 1 else None
        self.classifier = nn.Linear(dim, n_classes)

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Pool with the mean of the branches' attention maps."""
        _, z, maps = self.attention(h, mask)
        return z, mean_attention_logits(maps.flatten(1, 2))

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> ACMILOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel]."""
        check_bags(x, mask, self.in_dim)
        h = self.embed(x)
        branches, z, maps = self.attention(h, mask)
        if self.branch_classifier is None:
            branch_logits = z.new_zeros(z.shape[0], 0, self.n_classes)
        else:
            branch_logits = self.branch_classifier(branches)
        return ACMILOutput(self.head(z), mean_attention_logits(maps.flatten(1, 2)), z, branch_logits, maps)


class ACMILLoss(MILLoss):
    """Cross-entropy of the bag, mean cross-entropy of the branches, and the diversity of their attention (eq. 7).

    Parameters
    ----------
    branch_weight, diversity_weight : float
        Weights of the second and third term; 1 in the paper.
    class_weight : (C,), optional
        Weight of each class in both cross-entropies.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        branch_weight: float = 1.0,
        diversity_weight: float = 1.0,
        class_weight: Float[Tensor, " c"] | None = None,
    ) -> None:
        super().__init__()
        self.branch_weight, self.diversity_weight = branch_weight, diversity_weight
        self.register_buffer("class_weight", class_weight)

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the loss of an [`ACMILOutput`][classact.mil.ACMILOutput].

        Raises
        ------
        TypeError
            If the output comes from a model without branches.
        """
        if not hasattr(output, "branch_logits"):
            raise TypeError(f"output: ACMILLoss needs the output of ACMIL, got {type(output).__name__}")
        loss = F.cross_entropy(output.logits, target, weight=self.class_weight)
        branches = output.branch_logits.shape[1]
        if branches > 1:
            branch_target = target.unsqueeze(1).expand(-1, branches)
            loss = loss + self.branch_weight * F.cross_entropy(
                output.branch_logits.transpose(1, 2), branch_target, weight=self.class_weight
            )
            loss = loss + self.diversity_weight * attention_diversity(output.attention_map_logits.softmax(-1))
        return loss


def _check_masking(top_k: int, drop: float) -> None:
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 or more, got {top_k}")
    if not 0 <= drop < 1:
        raise ValueError(f"mask_drop: expected a part in [0, 1), got {drop}")
