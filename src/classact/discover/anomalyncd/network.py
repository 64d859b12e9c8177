"""Mask-guided vision transformer (section 3.3) and the heads of its class token."""

import copy
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


def vision_transformer(vit: nn.Module | dict[str, Any]) -> Any:
    """A copy of a vision transformer of timm, or a new one from arguments of ``timm.create_model``.

    Raises
    ------
    ModuleNotFoundError
        If arguments are given and timm is not installed.
    TypeError
        If it is not a vision transformer of timm with a class token and plain blocks.
    """
    if isinstance(vit, dict):
        try:
            from timm import create_model
        except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
            msg = "AnomalyNCD needs the package timm: pip install 'classact[explain]'"
            raise ModuleNotFoundError(msg, name="timm") from error
        model: Any = create_model(**{"num_classes": 0, **vit})
    else:
        model = copy.deepcopy(vit)
    parts = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm", "num_prefix_tokens")
    if not all(hasattr(model, part) for part in parts) or getattr(model, "cls_token", None) is None:
        raise TypeError(
            f"vit: expected timm's VisionTransformer, with a class token and {', '.join(parts)}; got {type(model)}"
        )
    of_block, of_attention = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp"), ("qkv", "q_norm", "k_norm", "proj")
    for block in model.blocks:
        if not all(hasattr(block, part) for part in of_block) or not all(hasattr(block.attn, p) for p in of_attention):
            raise TypeError(f"vit: expected timm's Block with timm's Attention, got {type(block).__name__}")
    return model


def embed_patches(vit: Any, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n l d"]:
    """Input of the first block."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))  # noqa: SLF001 - forward_features of timm


def guided_attention(attn: Any, x: Float[Tensor, "n l d"], attend: Bool[Tensor, "n l"]) -> Float[Tensor, "n l d"]:
    """Attention of timm whose first token, the class token, attends to some tokens only; the others attend to all."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    plain = F.scaled_dot_product_attention(q[:, :, 1:], k, v, dropout_p=dropout, scale=attn.scale)
    logits = (q[:, :, :1] * attn.scale) @ k.transpose(-2, -1)
    logits = logits.masked_fill(~attend[:, None, None], torch.finfo(logits.dtype).min)
    guided = attn.attn_drop(logits.softmax(-1)) @ v
    o = torch.cat([guided, plain], 2).transpose(1, 2).flatten(2)
    norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)  # older timm has neither
    o = o if norm is None else norm(o)
    o = o if gate is None else o * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(o))


class MaskGuidedViT(nn.Module):
    """Vision transformer whose class token attends, in the last blocks, to the patches under a mask only.

    The mask is averaged over each patch; in the last `n_blocks` blocks the class token's attention to patches below
    `threshold` is removed. All other tokens attend as before, so that what is outside the mask still reaches the class
    token through the patches inside it, and through the earlier blocks. If no patch reaches the threshold, as under a
    tiny defect or an empty mask, the class token attends to itself (and to register tokens) only.

    A class that holds a copy of the transformer, not a function that changes the one it is given.

    Parameters
    ----------
    vit : Module or dict
        Vision transformer of timm, which is copied, or arguments of ``timm.create_model``.
    n_blocks : int
        Blocks with guidance, counted from the last; 0: none.
    threshold : float
        Share of a patch that must be masked; 0: any part of it.

    Examples
    --------
    >>> import torch
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    >>> mask = torch.zeros(2, 1, 32, 32)
    >>> mask[:, :, 4:20, 4:20] = 1
    >>> MaskGuidedViT(vit, n_blocks=2)(torch.rand(2, 3, 32, 32), mask).shape
    torch.Size([2, 24])
    """

    def __init__(self, vit: nn.Module | dict[str, Any], n_blocks: int = 9, threshold: float = 0.5) -> None:
        super().__init__()
        self.vit = vision_transformer(vit)
        if not 0 <= n_blocks <= len(self.vit.blocks):
            raise ValueError(
                f"n_blocks: expected 0 to {len(self.vit.blocks)}, the transformer's blocks, got {n_blocks}"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a share from 0 to 1, got {threshold}")
        self.n_blocks, self.threshold = n_blocks, threshold
        self.embed_dim: int = self.vit.embed_dim

    def forward(self, x: Float[Tensor, "n k h w"], mask: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n d"]:
        """Class token after the last norm.

        Parameters
        ----------
        x : (N, K, H, W)
            Images of the transformer's size.
        mask : (N, 1, H, W)
            From 0 to 1; what the class token attends to.

        Raises
        ------
        ValueError
            If the mask does not have the images' size.
        """
        if mask.shape != (len(x), 1, *x.shape[2:]):
            raise ValueError(
                f"mask: expected shape {(len(x), 1, *x.shape[2:])} for these images, got {tuple(mask.shape)}"
            )
        h, attend = embed_patches(self.vit, x), self.attended(mask)
        for i, block in enumerate(self.vit.blocks):
            if i < len(self.vit.blocks) - self.n_blocks:
                h = block(h)
            else:
                h = h + block.drop_path1(block.ls1(guided_attention(block.attn, block.norm1(h), attend)))
                h = h + block.drop_path2(block.ls2(block.mlp(block.norm2(h))))
        return self.vit.norm(h)[:, 0]

    def attended(self, mask: Float[Tensor, "n 1 h w"]) -> Bool[Tensor, "n l"]:
        """Tokens that the class token attends to: the prefix tokens, and the patches under the mask."""
        share = F.avg_pool2d(mask, self.vit.patch_embed.patch_size).flatten(1)
        prefix = share.new_ones(len(share), self.vit.num_prefix_tokens, dtype=torch.bool)
        return torch.cat([prefix, (share >= self.threshold) & (share > 0)], 1)


class NCDOutput(NamedTuple):
    """Class token z (N, D), its projection (N, P) for the contrastive losses, and cosines (N, H, C) of H heads.

    The first C_b of the C classes are those of the base set, then come C_n new ones, the first of which is "normal".
    """

    embedding: Float[Tensor, "n d"]
    projection: Float[Tensor, "n p"]
    logits: Float[Tensor, "n h c"]


class NCDHeads(nn.Module):
    """Projection of z by two hidden layers, and H linear classifiers of cosines, their weights of length 1.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of z, and number of classes, base and new ones.
    heads : int
        Classifiers, trained side by side; the best of them is used.
    hidden, projection : int
        Widths of the projection's hidden layers and of its result.
    """

    def __init__(self, in_dim: int, n_classes: int, heads: int = 4, hidden: int = 2048, projection: int = 256) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("n_classes", n_classes), ("heads", heads), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.project = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, projection)
        )
        for layer in self.project:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.weight = nn.Parameter(torch.empty(heads, n_classes, in_dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(in_dim), 1 / math.sqrt(in_dim))

    def forward(self, z: Float[Tensor, "n d"]) -> NCDOutput:
        """Projections and cosines."""
        logits = torch.einsum("nd,hcd->nhc", F.normalize(z, dim=-1), F.normalize(self.weight, dim=-1))
        return NCDOutput(z, self.project(z), logits)
