"""Attention pooling: ABMIL, gated ABMIL and its multi-head form, the base models of the family.

Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning, ICML 2018, https://arxiv.org/abs/1802.04712.
The bias-free linear layer with ReLU in front, and the multi-head form, are those of the ACMIL and AEM code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.model import MILModel, check_bags, embedding_width, mask_logits

Activation = Literal["tanh", "relu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}


class AttentionPool(nn.Module):
    """Attention scores of a two-layer network, one row per branch (Ilse et al., eq. 8 and 9).

    Parameters
    ----------
    dim : int
        Width of the embedded instances.
    hidden : int
        Width of the hidden layer.
    gated : bool
        Multiply ``tanh(V h)`` by the gate ``sigmoid(U h)``.
    branches : int
        Number M of attention maps; they share V and U and differ in the last layer.
    temperature : float
        Divides the scores; above 1 flattens the attention.
    bias : bool
        Bias of the last layer.
    activation : {"tanh", "relu", "gelu"}
        Of the hidden layer; tanh in Ilse et al., ReLU in the MHIM code.

    Examples
    --------
    >>> import torch
    >>> pool = AttentionPool(dim=16, hidden=8, gated=True)
    >>> pool(torch.randn(2, 5, 16)).shape
    torch.Size([2, 1, 5])
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        gated: bool = False,
        branches: int = 1,
        temperature: float = 1.0,
        bias: bool = True,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        if branches < 1:
            raise ValueError(f"branches: expected at least 1, got {branches}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.gated, self.temperature, self.activation = gated, temperature, activation
        self.hidden = nn.Linear(dim, hidden * (2 if gated else 1))  # V and U in one product
        self.score = nn.Linear(hidden, branches, bias=bias)

    def forward(self, h: Float[Tensor, "n k d"], mask: Bool[Tensor, "n k"] | None = None) -> Float[Tensor, "n m k"]:
        """Return the scores before the softmax, -inf on padding."""
        a, activate = self.hidden(h), ACTIVATIONS[self.activation]
        if self.gated:
            v, u = a.chunk(2, dim=-1)
            a = activate(v) * u.sigmoid()
        else:
            a = activate(a)
        return mask_logits(self.score(a).transpose(1, 2) / self.temperature, mask)


class ABMIL(MILModel):
    """Attention-based multiple-instance learning.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width of the instance embedding (default: [`embedding_width`][classact.mil.model.embedding_width]).
    hidden : int
        Width of the attention network.
    gated : bool
        Gated attention (Ilse et al., eq. 9).
    dropout : float
        Dropout on the embedded instances.
    attention_dropout : float
        Dropout on the attention weights, a remedy for concentrated attention.
    temperature : float
        Divides the attention logits; above 1 flattens the attention.
    activation : {"tanh", "relu", "gelu"}
        Of the attention network's hidden layer.
    bias : bool
        Bias of the first layer.

    Examples
    --------
    >>> import torch
    >>> model = ABMIL(in_dim=384, n_classes=2, gated=True)
    >>> output = model(torch.randn(1, 1000, 384))
    >>> output.logits.shape, output.attention.shape
    (torch.Size([1, 2]), torch.Size([1, 1000]))
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        hidden: int = 128,
        gated: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        temperature: float = 1.0,
        activation: Activation = "tanh",
        bias: bool = False,
    ) -> None:
        super().__init__(
            in_dim,
            n_classes,
            dim=dim,
            hidden=hidden,
            gated=gated,
            dropout=dropout,
            attention_dropout=attention_dropout,
            temperature=temperature,
            activation=activation,
            bias=bias,
        )
        dim = dim or embedding_width(in_dim)
        self.reduce = nn.Linear(in_dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.attention = AttentionPool(dim, hidden, gated, temperature=temperature, activation=activation)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.classifier = nn.Linear(dim, n_classes)

    def embed(self, x: Float[Tensor, "n k d"]) -> Float[Tensor, "n k h"]:
        """Linear layer, ReLU, dropout."""
        return self.dropout(F.relu(self.reduce(x)))

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Attention-weighted mean of the embedded instances."""
        logits = self.attention(h, mask)
        z = self.attention_dropout(logits.softmax(-1)) @ h
        return z.squeeze(1), logits.squeeze(1)


class MultiHeadOutput(NamedTuple):
    """A [`MILOutput`][classact.mil.MILOutput] with the logits of each of the H attention maps, (N, H, K)."""

    logits: Float[Tensor, "n c"]
    attention_logits: Float[Tensor, "n k"]
    embedding: Float[Tensor, "n d"]
    attention_map_logits: Float[Tensor, "n h k"]

    @property
    def attention(self) -> Float[Tensor, "n k"]:
        """Weight of every instance in its bag; rows sum to 1, padding gets exactly 0."""
        return self.attention_logits.softmax(-1)


class BranchLinear(nn.Module):
    """M linear layers side by side: (N, M, D_in) -> (N, M, D_out), initialised as `torch.nn.Linear`."""

    def __init__(self, branches: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(branches, out_dim, in_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(branches, out_dim).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "n m i"]) -> Float[Tensor, "n m o"]:
        """Apply each layer to its own row."""
        return torch.einsum("nmi,moi->nmo", x, self.weight) + self.bias


class MultiHeadAttentionPool(nn.Module):
    """M multi-head attentions with one learnable query each, side by side (ACMIL and AEM code, ``mha``).

    Each has its own query (initialised N(0, 1e-6)), query, key, value and output projections, dropout and layer
    norm. With a single query neither keys nor values need to exist per instance: the logits are ``h @ (W_k^T q)``
    and the values are projected after pooling, since the weights sum to 1. This is the same function at
    O(K D M H) instead of O(K D^2 M).

    Parameters
    ----------
    dim : int
        Width D of the embedded instances, a multiple of `heads`.
    heads : int
        Number H of heads.
    branches : int
        Number M of attentions.
    dropout : float
        Dropout on the output projection.
    """

    def __init__(self, dim: int, heads: int = 8, branches: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of the embedding width {dim}, got {heads}")
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, branches, dim) * 1e-6)
        self.query_projection = BranchLinear(branches, dim, dim)
        self.key_projection = BranchLinear(branches, dim, dim)
        self.readout = HeadReadout(dim, heads, branches, dropout)

    def forward(self, h: Float[Tensor, "n k d"], mask: Bool[Tensor, "n k"] | None = None) -> Float[Tensor, "n m h k"]:
        """Return the attention logits of every branch and head, -inf on padding."""
        q = self.query_projection(self.query)[0].unflatten(-1, (self.heads, -1))  # (M, H, D/H)
        key_weight = self.key_projection.weight.unflatten(1, (self.heads, -1))  # (M, H, D/H, D)
        key_bias = self.key_projection.bias.unflatten(1, (self.heads, -1))
        direction = torch.einsum("mhe,mhed->mhd", q, key_weight)
        logits = torch.einsum("nkd,mhd->nmhk", h, direction) + (q * key_bias).sum(-1, keepdim=True)
        return mask_logits(logits / math.sqrt(q.shape[-1]), mask)


class HeadReadout(nn.Module):
    """Pool with given multi-head attention, then value and output projections, dropout and layer norm (eps 1e-6)."""

    def __init__(self, dim: int, heads: int = 8, branches: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.value_projection = BranchLinear(branches, dim, dim)
        self.output_projection = BranchLinear(branches, dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm_weight = nn.Parameter(torch.ones(branches, dim))
        self.norm_bias = nn.Parameter(torch.zeros(branches, dim))

    def forward(self, attention: Float[Tensor, "n m h k"], x: Float[Tensor, "n k d"]) -> Float[Tensor, "n m d"]:
        """Return one vector per branch."""
        pooled = torch.einsum("nmhk,nkd->nmhd", attention, x)
        weight = self.value_projection.weight.unflatten(1, (self.heads, -1))
        values = torch.einsum("nmhd,mhed->nmhe", pooled, weight).flatten(2) + self.value_projection.bias
        z = self.dropout(self.output_projection(values))
        return F.layer_norm(z, z.shape[-1:], eps=1e-6) * self.norm_weight + self.norm_bias


class MultiHeadABMIL(MILModel):
    """ABMIL with a learnable query and multi-head attention (the default architecture of the AEM code).

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width of the instance embedding, a multiple of `heads`.
    heads : int
        Number of attention heads.
    dropout : float
        Dropout on the output projection.

    Examples
    --------
    >>> import torch
    >>> MultiHeadABMIL(in_dim=384, n_classes=3)(torch.randn(2, 50, 384)).attention_map_logits.shape
    torch.Size([2, 8, 50])
    """

    def __init__(
        self, in_dim: int, n_classes: int, dim: int | None = None, heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(in_dim, n_classes, dim=dim, heads=heads, dropout=dropout)
        dim = dim or embedding_width(in_dim) // heads * heads
        self.reduce = nn.Linear(in_dim, dim, bias=False)
        self.attention = MultiHeadAttentionPool(dim, heads, 1, dropout)
        self.classifier = nn.Linear(dim, n_classes)

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Multi-head attention pooling; the returned attention is the mean over the heads."""
        maps = self.attention(h, mask)
        return self._read(maps, h), mean_attention_logits(maps.flatten(1, 2))

    def _read(self, maps: Float[Tensor, "n 1 h k"], h: Float[Tensor, "n k d"]) -> Float[Tensor, "n d"]:
        return self.attention.readout(maps.softmax(-1), h).squeeze(1)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> MultiHeadOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel]."""
        check_bags(x, mask, self.in_dim)
        h = self.embed(x)
        maps = self.attention(h, mask)
        z = self._read(maps, h)
        maps = maps.squeeze(1)
        return MultiHeadOutput(self.head(z), mean_attention_logits(maps), z, maps)


def mean_attention_logits(maps: Float[Tensor, "n m k"]) -> Float[Tensor, "n k"]:
    """Logits whose softmax is the mean of the M attention maps with these logits: -inf stays -inf."""
    attention = maps.softmax(-1).mean(1)
    return torch.where(attention > 0, attention, 1.0).log().masked_fill(attention == 0, -torch.inf)


def attention_concentration(
    attention: Float[Tensor, "n k"], ks: Sequence[int] = (1, 5, 10, 20, 50)
) -> dict[int, Float[Tensor, " n"]]:
    """Cumulative attention of the k most attended instances of every bag (ACMIL, Fig. 2; AEM).

    Parameters
    ----------
    attention : (N, K)
        Attention weights, rows summing to 1.
    ks : sequence of int
        Values of k; a k above K gives 1.

    Returns
    -------
    dict
        k -> (N,) mass in [0, 1].

    Examples
    --------
    >>> import torch
    >>> attention_concentration(torch.tensor([[0.7, 0.2, 0.1]]), ks=(1, 2))[2]
    tensor([0.9000])
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks: expected positive numbers of instances, got {list(ks)}")
    mass = attention.sort(dim=-1, descending=True).values.cumsum(-1)
    return {k: mass[:, min(k, mass.shape[1]) - 1] for k in ks}
