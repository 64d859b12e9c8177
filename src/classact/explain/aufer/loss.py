"""The attention of a layer, and the loss that aligns it with a spatial prior. Nothing here knows of faces."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from classact.explain.layers import find_layout, find_module, patch_grid, recorded

Kind = Literal["cosine", "std_cosine", "l1", "l2", "kl"]
EPS = 1e-8  # of the cosine, in float32 at least: it is 0 in float16


def logits_and_features(model: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Run a model and return its output, and what named layers put out as maps (N, C, h, w), part of the graph.

    Patch tokens (N, L, D) go where their patches lie, without class token and registers; no hook is left behind.

    Parameters
    ----------
    model : Module
        Any network.
    x : (N, C, H, W)
        Images.
    layers : sequence of str
        Names as in ``model.named_modules()``.

    Raises
    ------
    ValueError
        If there is no such layer, it did not run, or its output has no positions.
    """
    modules = [find_module(model, name)[1] for name in layers]
    with recorded(modules, gradients=False) as outputs:
        logits = model(x)
    size = tuple(x.shape[2:])
    patches = patch_grid(model, size)
    features = []
    for name, module, output in zip(layers, modules, outputs, strict=True):
        if output is None:
            raise ValueError(f"layers: {name!r} did not run, or puts out no tensor")
        features.append(find_layout(output, size, layer=module, patches=patches)(output))
    return logits, features


def attention_map(features: Float[Tensor, "n c h w"], size: tuple[int, int] | None = None) -> Float[Tensor, "n H W"]:
    """T: the mean over the channels of a layer, resized to `size` (bilinear) and kept in its range."""
    return _resize(features.mean(1, keepdim=True), size or (features.shape[2], features.shape[3])).squeeze(1)


def map_cosine(
    maps: Float[Tensor, "n h w"], prior: Float[Tensor, "n 1 h w"], shift_negative: bool = True
) -> Float[Tensor, " n"]:
    """Cosine of each map with its prior, the paper's ATT-COS and CAM-COS; NaN where the prior is not finite.

    A uniform map has the cosine sqrt(s) with a binary prior of area share s: no map should be judged without it.

    Parameters
    ----------
    maps : (N, h, w)
        Attention or class maps.
    prior : (N, 1, h, w)
        What they should look like.
    shift_negative : bool
        Subtract the minimum of a map that has negative values, as the authors do. The loss does not.
    """
    if prior.shape != (maps.shape[0], 1, *maps.shape[1:]):
        raise ValueError(f"maps, prior: expected (N, h, w) and (N, 1, h, w), got {_shapes(maps, prior)}")
    maps = _full(maps)
    if shift_negative:
        maps = maps - maps.amin((1, 2), keepdim=True).clamp_max(0)
    finite = torch.isfinite(prior).flatten(1).all(1)
    cosine = F.cosine_similarity(maps.flatten(1), _full(prior).flatten(1).nan_to_num(0, 0, 0), eps=EPS)
    return cosine.masked_fill(~finite, torch.nan)


class SpatialAlignmentLoss(nn.Module):
    """How little the attention of one or more layers looks like a spatial prior (options: authors' code).

    With the cosine, ``mean over valid samples of 1 - cos(T, A)``, from 0 to 2, for T the mean of a layer's channels and
    A the prior; of several layers the mean. The scale of T does not matter, its sign does, and every channel of a
    position gets the same gradient. It has no parameters. Add it to the classification loss with a weight lambda: 9 in
    the released command for AffectNet, best accuracy near 4 on RAF-DB, and little change of the cosine from about 5.

    Parameters
    ----------
    loss : {"cosine", "std_cosine", "l1", "l2", "kl"}
        Cosine; cosine of the standardised attention; mean absolute or squared difference; mean Kullback-Leibler
        divergence of each position's (A, 1 - A) from the softmax of T over positions.
    reduce : {"mean", "random"} or float
        T is the mean of all channels, of channels drawn with probability `p` for each sample and step, or of the first
        part, in (0, 1], of the channels.
    p : float
        In (0, 1]; with 1 the random mean is the mean.
    resize : {"to_attention", "to_prior"}
        Which of the two takes the other's size: bilinear, corners aligned, antialiased, kept in its range.
    softmax : bool
        Replace T by its softmax over positions (always with "kl").

    Examples
    --------
    >>> import torch
    >>> features = torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]])
    >>> prior = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    >>> SpatialAlignmentLoss()(features, prior)
    tensor(0.1340)
    """

    def __init__(
        self,
        loss: Kind = "cosine",
        reduce: Literal["mean", "random"] | float = "mean",
        p: float = 1.0,
        resize: Literal["to_attention", "to_prior"] = "to_attention",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if loss not in ("cosine", "std_cosine", "l1", "l2", "kl"):
            raise ValueError(f"loss: expected cosine, std_cosine, l1, l2 or kl, got {loss!r}")
        if isinstance(reduce, str) and reduce not in ("mean", "random"):
            raise ValueError(f"reduce: expected 'mean', 'random' or a part of the channels, got {reduce!r}")
        for name, part in (("p", p), ("reduce", 1.0 if isinstance(reduce, str) else reduce)):
            if not 0 < part <= 1:
                raise ValueError(f"{name}: expected a part in (0, 1], got {part}")
        if resize not in ("to_attention", "to_prior"):
            raise ValueError(f"resize: expected 'to_attention' or 'to_prior', got {resize!r}")
        self.loss, self.reduce, self.p = loss, reduce, p
        self.resize, self.softmax = resize, softmax or loss == "kl"

    def forward(
        self,
        features: Float[Tensor, "n _ _ _"] | Sequence[Float[Tensor, "n _ _ _"]],
        prior: Float[Tensor, "n 1 H W"],
        valid: Bool[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Parameters
        ----------
        features : (N, C, h, w), or a sequence of such
            Of one layer or several, each of its own size.
        prior : (N, 1, H, W)
            Not negative; samples without one hold +inf.
        valid : (N,) bool, optional
            Samples that count: those with a finite prior by default. If there are none the loss is 0, and so are its
            gradients.

        Raises
        ------
        ValueError
            If shapes do not fit, or there are no layers.
        """
        layers = [features] if isinstance(features, Tensor) else list(features)
        if not layers:
            raise ValueError("features: expected at least one layer, got none")
        if prior.ndim != 4 or prior.shape[1] != 1:
            raise ValueError(f"prior: expected shape (N, 1, H, W), got {tuple(prior.shape)}")
        for layer in layers:
            if layer.ndim != 4 or layer.shape[0] != prior.shape[0]:
                raise ValueError(
                    f"features, prior: expected (N, C, h, w) and (N, 1, H, W), got {_shapes(layer, prior)}"
                )
        finite = torch.isfinite(prior).flatten(1).all(1)
        if valid is None:
            valid = finite
        elif valid.shape != prior.shape[:1]:
            raise ValueError(f"valid: expected shape ({prior.shape[0]},), got {tuple(valid.shape)}")
        with torch.autocast(prior.device.type, enabled=False):
            # samples that do not count are computed as well, on a harmless prior: no shape depends on the data
            target = _full(prior).masked_fill(~finite[:, None, None, None], 0)
            each = torch.stack([self._of_layer(_full(layer), target) for layer in layers]).mean(0)
            return each.masked_fill(~valid, 0).sum() / valid.sum().clamp_min(1)

    def _of_layer(self, features: Tensor, prior: Tensor) -> Tensor:
        """Loss of each sample (N,)."""
        attention = self._attention(features)
        if self.resize == "to_attention":
            prior = _resize(prior, (attention.shape[2], attention.shape[3]))
        else:
            attention = _resize(attention, (prior.shape[2], prior.shape[3]))
        t, a = attention.flatten(1), prior.flatten(1)
        if self.softmax:
            t = t.softmax(1)
        if self.loss == "l1":
            return (t - a).abs().mean(1)
        if self.loss == "l2":
            return (t - a).square().mean(1)
        if self.loss == "kl":
            on = F.kl_div(t.log(), a, reduction="none")
            return (on + F.kl_div((1 - t).log(), 1 - a, reduction="none")).mean(1)
        if self.loss == "std_cosine":
            t = (t - t.mean(1, keepdim=True)) / (t.std(1, keepdim=True) + 1e-4)
        return 1 - F.cosine_similarity(t, a, eps=EPS)

    def _attention(self, features: Tensor) -> Tensor:
        """T before resizing, (N, 1, h, w)."""
        if self.reduce == "random":
            drawn = (torch.rand(features.shape[:2], device=features.device) < self.p).to(features.dtype)
            share = drawn / drawn.sum(1, keepdim=True).clamp_min(1)
            return torch.einsum("nchw,nc->nhw", features, share).unsqueeze(1)
        if isinstance(self.reduce, float | int):
            features = features[:, : max(1, int(features.shape[1] * self.reduce))]
        return features.mean(1, keepdim=True)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, 1, h, w) without leaving the range that each map has."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    resized = F.interpolate(maps, size, mode="bilinear", align_corners=True, antialias=True)
    return resized.clamp(maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True))


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
