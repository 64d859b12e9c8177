"""The network of Prompt-CAM, its attention maps, and the ranking of attention heads.

Visual prompt tuning puts learned tokens beside the patches of a frozen vision transformer and classifies from the
class token. Here there is one such token per class, and each class is scored from the output of *its* token by one
linear unit that all share. Transformer and unit being shared, the token of a class can only win by attending, in the
last block, to patches that other classes lack: its traits. The attention of that token, head by head, is the
explanation.

Two points where this goes beyond the authors' code, which takes the prompts to be followed by one class token: any
number of prefix tokens (registers, no class token) is allowed; and a transformer that keeps its final normalisation
behind the pooling (``fc_norm``, timm's models with average pooling) has it applied to the prompts.
"""

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.explain.cam import Normalize, normalize_map
from classact.explain.frozen import frozen
from classact.explain.targets import settle_target


class PromptCAMOutput(NamedTuple):
    """Scores (N, C), and the attention (N, R, C, M) of every class's prompt to the M patches in each of R heads.

    Rows do not sum to 1: prompts and prefix tokens have the rest.
    """

    scores: Float[Tensor, "n c"]
    attention: Float[Tensor, "n r c m"]


class PromptCAM(nn.Module):
    """A frozen vision transformer with one prompt per class, each scored from its own output.

    With N blocks of width D and patches of p x p pixels, prompts P start uniform in [-v, v], v = sqrt(6 / (3 p^2 + D)).
    In ``"deep"`` mode fresh prompts stand before the tokens of every block and are cut off after it, but for the last;
    in ``"shallow"`` mode those of the first block go through all. After the last block and the final normalisation,
    class c has the score s_c = w . z_c + b of its own prompt, with w and b shared (b shifts all scores alike and
    changes no probability). Train with cross-entropy.

    Parameters
    ----------
    vit : Module or dict
        A timm `VisionTransformer` with timm's plain blocks; it is frozen in place, its own head is not used. Or the
        keyword arguments of ``timm.create_model`` for one, such as ``{"model_name": "vit_base_patch16_224.dino",
        "pretrained": True}``: a model made so can be built again by [`classact.load`][classact.load] (which fills in
        the stored weights and downloads none); one made from a module needs ``load(path, model=...)``.
    num_classes : int
        C, at least 2. There is one prompt per class; a new class needs a new prompt.
    mode : {"deep", "shallow"}
        Where the prompts enter: N C D + D + 1 trained numbers, or C D + D + 1.
    dropout : float
        Dropout on the prompts, one mask for the whole batch (the authors: 0.1 with DINO, 0 with DINOv2).
    backbone_train_mode : bool
        Whether ``train()`` reaches the transformer, so that its drop path acts on the training (as the authors do);
        with False it stays in evaluation mode.

    Raises
    ------
    TypeError
        If `vit` is not such a transformer.
    ValueError
        If another argument is out of range.

    Examples
    --------
    >>> import torch
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    >>> model = PromptCAM(vit, num_classes=5).eval()
    >>> x = torch.randn(2, 3, 32, 32)
    >>> scores, attention = model(x, return_attention=True)
    >>> scores.shape, attention.shape
    (torch.Size([2, 5]), torch.Size([2, 3, 5, 16]))
    >>> PromptCAMExplainer(model)(x, target=4).shape
    torch.Size([2, 32, 32])
    >>> rank_heads(model, x, target=4).order.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        vit: nn.Module | dict[str, Any],
        num_classes: int,
        mode: Literal["deep", "shallow"] = "deep",
        dropout: float = 0.0,
        backbone_train_mode: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        if mode not in ("deep", "shallow"):
            raise ValueError(f"mode: expected 'deep' or 'shallow', got {mode!r}")
        self.config = {
            "vit": {**vit, "pretrained": False} if isinstance(vit, dict) else vit,
            "num_classes": num_classes,
            "mode": mode,
            "dropout": dropout,
            "backbone_train_mode": backbone_train_mode,
        }
        self.vit: Any = _vision_transformer(vit).requires_grad_(False)
        self.num_classes, self.mode, self.backbone_train_mode = num_classes, mode, backbone_train_mode
        self.num_heads: int = self.vit.blocks[-1].attn.num_heads
        width, patch = self.vit.embed_dim, self.vit.patch_embed.patch_size
        bound = math.sqrt(6 / (3 * patch[0] * patch[1] + width))
        self.prompts = nn.Parameter(torch.empty(len(self.vit.blocks) if mode == "deep" else 1, num_classes, width))
        nn.init.uniform_(self.prompts, -bound, bound)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PromptCAM":
        """Set the training mode; see `backbone_train_mode`."""
        super().train(mode)
        if not self.backbone_train_mode:
            self.vit.eval()
        return self

    def forward(
        self,
        x: Float[Tensor, "n k h w"],
        return_attention: bool = False,
        blur: Mapping[int, Sequence[int]] | None = None,
    ) -> Float[Tensor, "n c"] | PromptCAMOutput:
        """Score every class.

        Parameters
        ----------
        x : (N, K, H, W)
            Images of the transformer's size (or of any size that its patches tile, with ``dynamic_img_size``).
        return_attention : bool
            Return a [`PromptCAMOutput`][classact.explain.PromptCAMOutput] in place of the scores (N, C).
        blur : mapping, optional
            Class -> heads in which its prompt attends to all tokens alike (its attention logits in the last block are
            0). The scores of the other classes do not change.

        Raises
        ------
        ValueError
            If the images do not fit the transformer, or `blur` names a class or head that there is not.
        """
        h = self.tokens(x)
        attention, v = self.attend(h, blur)
        o = self.vit.blocks[-1].attn.attn_drop(attention) @ v
        scores = self.score(h[:, : self.num_classes], o.transpose(1, 2).flatten(2))
        if not return_attention:
            return scores
        return PromptCAMOutput(scores, attention[..., self.num_classes + self.vit.num_prefix_tokens :])

    def tokens(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n l d"]:
        """Input of the last block: C prompts, the prefix tokens of the transformer, M patches."""
        self._check_images(x)
        vit, last = self.vit, len(self.vit.blocks) - 1
        h = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))  # noqa: SLF001 - forward_features of timm
        if self.mode == "shallow":
            return vit.blocks[:last](torch.cat([self._prompts(0, h), h], 1))
        for i in range(last):
            h = vit.blocks[i](torch.cat([self._prompts(i, h), h], 1))[:, self.num_classes :]
        return torch.cat([self._prompts(last, h), h], 1)

    def attend(
        self, h: Float[Tensor, "n l d"], blur: Mapping[int, Sequence[int]] | None = None
    ) -> tuple[Float[Tensor, "n r c l"], Float[Tensor, "n r l e"]]:
        """Attention of the prompts in the last block to its L input tokens, and the values of these.

        No other row of the last block's attention counts for any score, so none is computed.
        """
        block = self.vit.blocks[-1]
        attn = block.attn
        qkv = attn.qkv(block.norm1(h)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(qkv[0][:, :, : self.num_classes]), attn.k_norm(qkv[1])
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        for c, heads in (blur or {}).items():
            self._check_blur(c, heads)
            row = torch.zeros(self.num_heads, self.num_classes, 1, dtype=torch.bool, device=h.device)
            row[list(heads), c] = True
            logits = logits.masked_fill(row, 0)
        return logits.softmax(-1), qkv[2]

    def score(self, h: Float[Tensor, "*n d"], o: Float[Tensor, "*n a"]) -> Float[Tensor, "*n"]:
        """Finish the last block for prompts `h`, given what its heads, side by side, read for them; then score them."""
        block = self.vit.blocks[-1]
        attn = block.attn
        norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)  # older timm has neither
        o = o if norm is None else norm(o)
        o = o if gate is None else o * gate(block.norm1(h)).sigmoid()
        h = h + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(o))))
        h = h + block.drop_path2(block.ls2(block.mlp(block.norm2(h))))
        return self.head(self.vit.fc_norm(self.vit.norm(h))).squeeze(-1)

    def patch_grid(self, x: Float[Tensor, "n k h w"]) -> tuple[int, int]:
        """Rows and columns of the M patches of images."""
        return self.vit.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Weights of prompts and head only, which is all that the training changes."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("vit.")}

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trainable_state_dict` returned, into a model on the same transformer.

        Raises
        ------
        KeyError
            If a weight is missing or there is one too many.
        """
        if set(state) != (own := set(self.trainable_state_dict())):
            raise KeyError(f"state: expected the weights {', '.join(sorted(own))}, got {', '.join(sorted(state))}")
        self.load_state_dict(state, strict=False)

    def _prompts(self, layer: int, h: Float[Tensor, "n l d"]) -> Float[Tensor, "n c d"]:
        return self.dropout(self.prompts[layer]).to(h.dtype).expand(len(h), -1, -1)

    def _check_images(self, x: Tensor) -> None:
        embed = self.vit.patch_embed
        channels, size = embed.proj.in_channels, tuple(x.shape[-2:])
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x: expected shape (N, {channels}, H, W), got {tuple(x.shape)}")
        if not self.vit.dynamic_img_size:
            if size != tuple(embed.img_size):
                raise ValueError(f"x: expected images of {tuple(embed.img_size)} pixels, got {size}")
        elif not embed.dynamic_img_pad and any(s % p for s, p in zip(size, embed.patch_size, strict=True)):
            raise ValueError(f"x: expected images that patches of {tuple(embed.patch_size)} tile, got {size}")

    def _check_blur(self, c: int, heads: Sequence[int]) -> None:
        if not 0 <= c < self.num_classes:
            raise ValueError(f"blur: expected classes 0 to {self.num_classes - 1}, got {c}")
        _check_heads("blur", heads, self.num_heads)


def _vision_transformer(vit: nn.Module | dict[str, Any]) -> Any:
    try:
        from timm import create_model
        from timm.models.vision_transformer import Attention, Block, VisionTransformer
    except ModuleNotFoundError as error:
        msg = "PromptCAM needs the package timm: pip install 'classact[explain]'"
        raise ModuleNotFoundError(msg, name="timm") from error
    model = create_model(**vit) if isinstance(vit, dict) else vit
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"vit: expected a timm VisionTransformer (patch_embed, blocks, norm), got {type(model).__name__}"
        )
    last = model.blocks[-1]
    if type(last) is not Block or type(last.attn).forward is not Attention.forward:
        raise TypeError(
            "vit: expected timm's Block with timm's Attention as the last block, "
            f"got {type(last).__name__} with {type(getattr(last, 'attn', None)).__name__}"
        )
    return model


def _check_heads(name: str, heads: Sequence[int] | Tensor, num_heads: int) -> None:
    numbers = heads.flatten().tolist() if isinstance(heads, Tensor) else list(heads)
    if not all(0 <= head < num_heads for head in numbers):
        raise ValueError(f"{name}: expected heads 0 to {num_heads - 1}, got {sorted(set(numbers))}")


def _classes(target: int | Tensor | None, scores: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
    index = settle_target(scores, target, len(scores))
    if not isinstance(index, Tensor) or index.shape[1] != 1:
        raise ValueError("target: expected one class per image, as prompts belong to classes")
    return index[:, 0]


class PromptCAMExplainer:
    """Attention maps of a class's prompt: where each head of the last block finds the traits of the class.

    Used like the other explainers, ``with PromptCAMExplainer(model) as cam: maps = cam(x)``; it leaves the model, its
    mode included, as it was.

    Parameters
    ----------
    model : PromptCAM
        Trained.
    """

    def __init__(self, model: PromptCAM) -> None:
        if not isinstance(model, PromptCAM):
            raise TypeError(f"model: expected a PromptCAM, got {type(model).__name__}")
        self.model = model

    def __enter__(self) -> "PromptCAMExplainer":  # noqa: PYI034 - run-time checks of methods know no Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "n k h w"],
        target: int | Int[Tensor, " n"] | None = None,
        *,
        heads: Literal["mean", "all"] | Sequence[int] | Int[Tensor, "n j"] = "mean",
        upsample: bool = True,
        normalize: Normalize = None,
    ) -> Float[Tensor, "n ..."]:
        """Explain the score of a class.

        Parameters
        ----------
        x : (N, K, H, W)
            Images.
        target : int or (N,) int, optional
            Class, one for all or one per image; the predicted ones by default. To see what a wrong answer mistook,
            compare the maps of the predicted and of the true class.
        heads : {"mean", "all"}, sequence of int or (N, J) int
            The mean of the heads, every head, some, or other ones for every image:
            ``rank_heads(model, x).order[:, :4]`` are the four top traits, which the authors show.
        upsample : bool
            Bicubic upsampling to H x W (which can overshoot below 0); else one value per patch.
        normalize : {"minmax", "max", None}
            Scale every map for display (``"minmax"`` in the authors' figures), or leave the attention as the softmax
            gives it: in [0, 1], comparable between heads, classes and images.

        Returns
        -------
        (N, H, W) for the mean, else (N, J, H, W); without upsampling rows and columns of patches in place of H, W
        """
        model, mean = self.model, isinstance(heads, str) and heads == "mean"
        if isinstance(heads, str):
            if heads not in ("mean", "all"):
                raise ValueError(f"heads: expected 'mean', 'all' or numbers of heads, got {heads!r}")
        else:
            _check_heads("heads", heads, model.num_heads)
        with frozen(model):
            scores, attention = model(x, return_attention=True)
        maps = attention[torch.arange(len(x)), :, _classes(target, scores)]
        if isinstance(heads, Tensor):
            maps = maps.gather(1, heads.unsqueeze(-1).expand(-1, -1, maps.shape[-1]))
        elif not isinstance(heads, str):
            maps = maps[:, list(heads)]
        maps = (maps.mean(1, keepdim=True) if mean else maps).unflatten(-1, model.patch_grid(x))
        if upsample:
            maps = F.interpolate(maps, x.shape[-2:], mode="bicubic", align_corners=False)
        maps = normalize_map(maps.flatten(0, 1), normalize).view_as(maps)
        return maps.squeeze(1) if mean else maps


class HeadRanking(NamedTuple):
    """Heads (N, R), most important first, and probabilities (N, R).

    ``probs[:, i]`` is the probability of the class once ``order[:, i:]`` are blurred.
    """

    order: Int[Tensor, "n r"]
    probs: Float[Tensor, "n r"]


@torch.no_grad()
def rank_heads(
    model: PromptCAM, x: Float[Tensor, "n k h w"], target: int | Int[Tensor, " n"] | None = None
) -> HeadRanking:
    """Rank the heads of the last block, hence traits, by how much a class needs them in each image.

    Greedy: at each step the head is blurred whose blurring leaves the class the highest probability; what is blurred
    last is needed most. R (R + 1) / 2 trials. Blurring makes one row of one head uniform, so a trial is a choice,
    head by head, between what the head read and the mean of its values; the transformer itself runs once. Heads are
    compared by log odds, which order them as probabilities do, also where these round to 1.

    Parameters
    ----------
    model : PromptCAM
        Trained; it is left as it was.
    x : (N, K, H, W)
        Images.
    target : int or (N,) int, optional
        Class, one for all or one per image; the predicted ones by default.
    """
    with frozen(model):
        h = model.tokens(x)
        attention, v = model.attend(h)
        heads = attention @ v
        scores = model.score(h[:, : model.num_classes], heads.transpose(1, 2).flatten(2))
        target, each = _classes(target, scores), torch.arange(len(x), device=x.device)
        prompt, sharp, uniform = h[each, target], heads[each, :, target], v.mean(2)
        others = scores.scatter(1, target.unsqueeze(1), -math.inf).logsumexp(1, keepdim=True)
        remaining = torch.arange(model.num_heads, device=x.device).expand(len(x), -1)
        blurred = torch.zeros_like(remaining, dtype=torch.bool)
        order, probs = [], []
        for left in range(model.num_heads, 0, -1):
            trial = blurred.unsqueeze(1) | F.one_hot(remaining, model.num_heads).bool()
            o = torch.where(trial.unsqueeze(-1), uniform.unsqueeze(1), sharp.unsqueeze(1)).flatten(2)
            log_odds = model.score(prompt.unsqueeze(1).expand(-1, left, -1), o) - others
            best = log_odds.argmax(1, keepdim=True)
            head = remaining.gather(1, best)
            order.append(head)
            probs.append(log_odds.gather(1, best).sigmoid())
            blurred = blurred.scatter(1, head, True)
            remaining = remaining[remaining != head].view(len(x), left - 1)
    return HeadRanking(torch.cat(order[::-1], 1), torch.cat(probs[::-1], 1))
