"""Kolmogorov-Arnold attention (KArAt): self-attention whose weights are learnable functions of the scores.

Maity, Hitsman, Li, Dutta, 2025, https://arxiv.org/abs/2503.10632. Scores ``A = Q K^T / sqrt(d)`` go through a
[`LearnableRowOperator`][classact.nn.LearnableRowOperator] in place of softmax, and the output is ``sigma(A) V``. Since
``sigma(A) = Phi(A) W^T``, it is computed as ``Phi(A) (W^T V)``: a product with r rows, not N.

In a transformer every block and head has its own operator (*blockwise*), or the blocks share one (*universal*).
"""

import copy
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from classact.nn.karat.operator import LearnableRowOperator, simplex_projection
from classact.nn.swap import replace


class KArAttentionOutput(NamedTuple):
    """Tokens (B, N, D), scores (B, h, N, N) before the operator, and the weights of the same shape after it."""

    tokens: Float[Tensor, "b n d"]
    scores: Float[Tensor, "b h n n"]
    attention: Float[Tensor, "b h n n"]


class KArAttention(nn.Module):
    """Multi-head self-attention with learnable functions of the scores; takes the place of timm's ``Attention``.

    There is no dropout on the weights, which are no probabilities.

    Parameters
    ----------
    dim, num_heads : int
        Width D of the tokens and number of heads.
    n_tokens : int
        N, including class and register tokens; fixed.
    operator : LearnableRowOperator, optional
        For ``num_heads - softmax_heads`` heads; blocks that get the same one share it. By default a new one with the
        paper's settings: Fourier series, G = 3, r = 12 (or N, if that is less).
    l1_projection : bool
        Project the rows of weights on the simplex (algorithm 1).
    softmax_heads : int
        So many heads, the first, keep softmax.
    qkv_bias : bool
        Bias of the layer of queries, keys and values.
    rows : int, optional
        Work on so many rows of the scores at a time, and compute scores and features again in the backward pass rather
        than keep them: memory in proportion to N instead of G N^2.

    Raises
    ------
    ValueError
        If `dim` is no multiple of `num_heads`, the operator does not fit, or, in `forward`, the number of tokens is
        another or a mask is given.

    Examples
    --------
    >>> attention = KArAttention(48, num_heads=3, n_tokens=17)
    >>> attention(torch.randn(2, 17, 48)).shape
    torch.Size([2, 17, 48])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_tokens: int,
        operator: LearnableRowOperator | None = None,
        l1_projection: bool = False,
        softmax_heads: int = 0,
        qkv_bias: bool = True,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim: expected a multiple of the number of heads, got {dim} for {num_heads} heads")
        if not 0 <= softmax_heads <= num_heads:
            raise ValueError(f"softmax_heads: expected from 0 to {num_heads}, got {softmax_heads}")
        if rows is not None and rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        learnable = num_heads - softmax_heads
        if operator is None and learnable:
            operator = LearnableRowOperator(n_tokens, learnable, rank=min(12, n_tokens))
        found = None if operator is None else (operator.heads, operator.n_tokens)
        if found != ((learnable, n_tokens) if learnable else None):
            raise ValueError(f"operator: expected one for {learnable} heads and {n_tokens} tokens, got {operator}")
        self.config = {
            "dim": dim,
            "num_heads": num_heads,
            "n_tokens": n_tokens,
            "operator": operator,
            "l1_projection": l1_projection,
            "softmax_heads": softmax_heads,
            "qkv_bias": qkv_bias,
            "rows": rows,
        }
        self.dim, self.num_heads, self.n_tokens, self.rows = dim, num_heads, n_tokens, rows
        self.l1_projection, self.softmax_heads = l1_projection, softmax_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.operator = operator
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()

    @classmethod
    def from_attention(cls, attention: nn.Module, n_tokens: int, **options: Any) -> "KArAttention":
        """Take over the layers of a softmax attention of timm, so that only the activation is new.

        Parameters
        ----------
        attention : Module
            With ``qkv``, ``proj`` and ``num_heads``.
        n_tokens : int
            N.
        **options
            ``operator``, ``l1_projection``, ``softmax_heads``, ``rows``.

        Raises
        ------
        ValueError
            For attention with gates, a norm of its output, or heads of a width other than D / h.
        """
        qkv: Any = attention.qkv
        dim, heads = qkv.in_features, int(attention.num_heads)  # type: ignore[arg-type]
        normed = not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
        if getattr(attention, "gate", None) is not None or normed or qkv.out_features != 3 * dim:
            raise ValueError(f"attention: expected neither gates nor a norm, and heads of width D / h, got {attention}")
        made = cls(dim, heads, n_tokens, qkv_bias=qkv.bias is not None, **options)
        for name in ("qkv", "proj", "proj_drop", "q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(made, name, getattr(attention, name))
        return made

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        return_scores: bool = False,
    ) -> Float[Tensor, "b n d"] | KArAttentionOutput:
        """Mix tokens (B, N, D).

        Parameters
        ----------
        x : (B, N, D)
            Tokens.
        attn_mask, is_causal
            Refused; they are here because timm's blocks pass them.
        return_scores : bool
            Also return scores and weights, which must then be formed.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: expected none, the operator takes whole rows of a fixed length")
        if x.ndim != 3 or x.shape[1:] != (self.n_tokens, self.dim):
            raise ValueError(
                f"x: expected shape (B, {self.n_tokens}, {self.dim}), got {tuple(x.shape)}; the number of tokens is"
                " built into the operator"
            )
        q, k, v = queries_keys_values(self, x)
        q = q * self.scale
        if return_scores:
            scores = q @ k.transpose(-1, -2)
            attention = self.activate(scores)
            return KArAttentionOutput(self._join(attention @ v), scores, attention)
        s, parts = self.softmax_heads, []
        if s:
            parts.append(F.scaled_dot_product_attention(q[:, :s], k[:, :s], v[:, :s], scale=1.0))
        if self.operator is not None:
            parts.append(self._learnable(q[:, s:], k[:, s:], v[:, s:]))
        return self._join(torch.cat(parts, 1) if len(parts) > 1 else parts[0])

    def activate(self, scores: Float[Tensor, "b h n n"]) -> Float[Tensor, "b h n n"]:
        """Turn the scores of all heads into weights: softmax in the first `softmax_heads`, sigma in the others."""
        parts = [scores[:, : self.softmax_heads].softmax(-1)]
        if self.operator is not None:
            weights = self.operator(scores[:, self.softmax_heads :])
            parts.append(simplex_projection(weights) if self.l1_projection else weights)
        return torch.cat(parts, 1)

    def _learnable(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        operator: Any = self.operator
        v = v if self.l1_projection else operator.right(v)
        if self.rows is None:
            return self._some_rows(q, k, v)
        kept: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self._some_rows, rows, k, v, **kept) for rows in q.split(self.rows, 2)], 2)

    def _some_rows(
        self, q: Float[Tensor, "b h k d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h s d"]
    ) -> Float[Tensor, "b h k d"]:
        operator: Any = self.operator
        scores = q @ k.transpose(-1, -2)
        return (simplex_projection(operator(scores)) if self.l1_projection else operator.left(scores)) @ v

    def _join(self, heads: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n e"]:
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))


class WindowKArAttention(KArAttention):
    """Attention within the windows of a Swin transformer; blockwise, with the relative position bias in the scores.

    Where a window is put together from two sides of the image (shifted windows), tokens across the seam must not see
    each other: their scores are set to 0 before the operator, so that they say nothing, and their weights after it.
    The paper reports results for Swin transformers without saying how the seam is treated.
    """

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    @classmethod
    def from_window(cls, attention: nn.Module, **options: Any) -> "WindowKArAttention":
        """Take over the layers of timm's ``WindowAttention``."""
        window: Any = attention
        made = cls.from_attention(attention, window.window_area, **options)
        made.relative_position_bias_table = window.relative_position_bias_table
        made.register_buffer("relative_position_index", window.relative_position_index, persistent=False)
        return made  # type: ignore[return-value]

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b n d"], mask: Float[Tensor, "w n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Mix the tokens of B windows; the mask (W, N, N) is 0 where two tokens may see each other."""
        if x.ndim != 3 or x.shape[1:] != (self.n_tokens, self.dim):
            raise ValueError(f"x: expected windows (B, {self.n_tokens}, {self.dim}), got {tuple(x.shape)}")
        q, k, v = queries_keys_values(self, x)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = q * self.scale @ k.transpose(-1, -2) + bias.T.unflatten(1, (self.n_tokens, self.n_tokens))
        if mask is None:
            return self._join(self.activate(scores) @ v)
        apart = (mask != 0).repeat(len(x) // len(mask), 1, 1).unsqueeze(1)
        s = self.softmax_heads
        fill = torch.zeros_like(scores)
        fill[:, :s] = -torch.inf
        return self._join(self.activate(torch.where(apart, fill, scores)).masked_fill(apart, 0.0) @ v)


def queries_keys_values(
    attention: nn.Module, x: Float[Tensor, "b n d"]
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n e"], Float[Tensor, "b h n e"]]:
    """Queries, keys and values (B, h, N, d) of an attention with one layer ``qkv``, as all of timm's have."""
    part: Any = attention
    q, k, v = part.qkv(x).unflatten(-1, (3, part.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return getattr(part, "q_norm", nn.Identity())(q), getattr(part, "k_norm", nn.Identity())(k), v


def karat_vit(
    backbone: str | nn.Module = "vit_tiny_patch16_224",
    mode: Literal["blockwise", "universal"] = "blockwise",
    rank: int = 12,
    grid: int = 3,
    basis: str = "fourier",
    l1_projection: bool = False,
    softmax_heads: int = 0,
    rows: int | None = None,
    **operator: Any,
) -> nn.Module:
    """Swap the softmax of a vision transformer of timm for learnable operators; all its weights stay.

    In ConViT the layers of plain attention are swapped (the last two), not the gated positional ones. In a Swin
    transformer attention within windows is, blockwise only.

    Parameters
    ----------
    backbone : str or Module
        Name of a timm model (made with 1000 classes and new weights), or a model, which is changed in place.
    mode : {"blockwise", "universal"}
        Own operators in every block, or one module that all blocks share.
    rank, grid, basis, **operator
        Of the [`LearnableRowOperator`][classact.nn.LearnableRowOperator]s. The paper takes rank 12, and a grid of 3 in
        ViT-Tiny and Small, 1 in Base.
    l1_projection, softmax_heads, rows
        As in [`KArAttention`][classact.nn.KArAttention].

    Raises
    ------
    ValueError
        If there is no attention to swap, or blocks that differ in heads or tokens shall share an operator.

    Examples
    --------
    >>> from timm import create_model
    >>> vit = create_model("vit_tiny_patch16_224", num_classes=10)
    >>> before = sum(p.numel() for p in vit.parameters())
    >>> sum(p.numel() for p in karat_vit(vit, mode="universal", scales=True).parameters()) - before
    63828
    """
    from timm import create_model
    from timm.layers import Attention
    from timm.models.convit import MHSA
    from timm.models.swin_transformer import WindowAttention

    if mode not in ("blockwise", "universal"):
        raise ValueError(f"mode: expected blockwise or universal, got {mode!r}")
    model = create_model(backbone) if isinstance(backbone, str) else backbone
    found = [part for part in model.modules() if type(part) in (Attention, MHSA, WindowAttention)]
    sizes = {(int(part.num_heads), _n_tokens(model, part)) for part in found}  # type: ignore[arg-type]
    if mode == "universal" and len(sizes) > 1:
        raise ValueError(f"mode: blocks that share an operator must have equal heads and tokens, got {sorted(sizes)}")
    made: dict[tuple[int, int], LearnableRowOperator] = {}

    def operator_of(heads: int, tokens: int) -> LearnableRowOperator | None:
        if heads == softmax_heads:
            return None
        if mode == "universal" and (heads, tokens) in made:
            return made[heads, tokens]
        settings: dict[str, Any] = {"rank": rank, "grid": grid, "basis": basis, **operator}
        made[heads, tokens] = LearnableRowOperator(tokens, heads - softmax_heads, **settings)
        return made[heads, tokens]

    def swap(old: nn.Module) -> nn.Module:
        tokens = _n_tokens(model, old)
        options: dict[str, Any] = {
            "operator": operator_of(int(old.num_heads), tokens),  # type: ignore[arg-type]
            "l1_projection": l1_projection,
            "softmax_heads": softmax_heads,
            "rows": rows,
        }
        if isinstance(old, WindowAttention):
            return WindowKArAttention.from_window(old, **options)
        return KArAttention.from_attention(old, tokens, **options)

    replace(model, (Attention, MHSA, WindowAttention), swap)
    return model


def _n_tokens(model: nn.Module, attention: nn.Module) -> int:
    if hasattr(attention, "window_area"):
        return int(attention.window_area)  # type: ignore[arg-type]
    patches: Any = getattr(model, "patch_embed", None)
    if not hasattr(patches, "num_patches"):
        raise ValueError(f"backbone: expected a vision transformer with a fixed number of patches, got {type(model)}")
    return int(patches.num_patches) + int(getattr(model, "num_prefix_tokens", 1))


class AttentionMatrices(NamedTuple):
    """Of one attention: its name in the model, scores (B, h, N, N) and the weights of the same shape."""

    name: str
    scores: Float[Tensor, "b h n n"]
    attention: Float[Tensor, "b h n n"]


def attention_matrices(model: nn.Module, x: Tensor) -> list[AttentionMatrices]:
    """Scores and weights of every block for a batch of images, with softmax or learnable attention, from first to last.

    Works on timm's ``Attention``, ConViT's ``MHSA`` and [`KArAttention`][classact.nn.KArAttention]. The model is left
    as it was; gradients are recorded unless switched off outside.

    Raises
    ------
    ValueError
        If the model has no such attention.
    """
    found: list[AttentionMatrices] = []

    def record(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
        q, k, _ = queries_keys_values(module, arguments[0])
        scores = q * module.scale @ k.transpose(-1, -2)
        after = module.activate(scores) if isinstance(module, KArAttention) else scores.softmax(-1)
        found.append(AttentionMatrices(name, scores, after))

    handles = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: record(name, module, arguments))
        for name, module in _attentions(model)
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from timm.layers import Attention
    from timm.models.convit import MHSA

    places = [(name, part) for name, part in model.named_modules() if type(part) in (Attention, MHSA, KArAttention)]
    if not places:
        raise ValueError(
            f"model: expected attention of timm or KArAttention in it, found none in {type(model).__name__}"
        )
    return places


class _CopiedAttention(nn.Module):
    """Values and output projection of an attention; the weights are put in from outside."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        part: Any = old
        dim, width = part.qkv.in_features, part.qkv.out_features // 3
        self.heads = int(part.num_heads)
        self.v = nn.Linear(dim, width, bias=part.qkv.bias is not None)
        with torch.no_grad():
            self.v.weight.copy_(part.qkv.weight[2 * width :])
            if part.qkv.bias is not None:
                self.v.bias.copy_(part.qkv.bias[2 * width :])
        self.proj, self.proj_drop = part.proj, part.proj_drop
        self.weights: Tensor | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: ARG002
        if self.weights is None:
            raise RuntimeError("the student has no weights of its own: call the AttentionTransfer that holds it")
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.proj_drop(self.proj((self.weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)))


class AttentionTransfer(nn.Module):
    """A student that mixes its tokens by the attention of a frozen teacher; see `attention_transfer`."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.teacher.eval()

    def train(self, mode: bool = True) -> "AttentionTransfer":
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the student's output for images (B, C, H, W)."""
        with torch.no_grad():
            maps = [one.attention for one in attention_matrices(self.teacher, x)]
        copied = [part for part in self.student.modules() if isinstance(part, _CopiedAttention)]
        try:
            for part, weights in zip(copied, maps, strict=True):
                part.weights = weights
            return self.student(x)
        finally:
            for part in copied:
                part.weights = None


def attention_transfer(student: nn.Module, teacher: nn.Module) -> AttentionTransfer:
    """Let a vision transformer learn with the attention of another: only values and the rest are trained.

    The paper's study of what the learned attention itself is worth. The teacher looks at every image, and its weights,
    block by block, mix the student's tokens; queries and keys of the student are dropped. Both are copied.

    Parameters
    ----------
    student : Module
        A vision transformer of timm.
    teacher : Module
        One with as many blocks, heads and tokens, with softmax or learnable attention.

    Returns
    -------
    AttentionTransfer
        A module from images to the student's output, with the parameters of the student to train.

    Raises
    ------
    ValueError
        If the two do not have equally many blocks and heads.
    """
    layout = [[int(part.num_heads) for _, part in _attentions(model)] for model in (student, teacher)]  # type: ignore[arg-type]
    if layout[0] != layout[1]:
        raise ValueError(
            f"student, teacher: expected equal heads in equally many blocks, got {layout[0]} and {layout[1]}"
        )
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    kinds = tuple({type(part) for _, part in _attentions(student)})
    replace(student, kinds, _CopiedAttention)
    return AttentionTransfer(student, teacher)
