"""A small anomaly detector, for those who have images of good products but no anomaly maps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from classact.discover.anomalyncd.network import embed_patches, vision_transformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchMemory(nn.Module):
    """Anomaly score of a patch: the distance of its features to the nearest in a memory of patches of good images.

    After PatchCore (Roth et al., CVPR 2022, https://arxiv.org/abs/2106.08265), with differences: features are those of
    one layer of a vision transformer, and the memory is a random part of all patches, not a coreset. It is a stand-in:
    AnomalyNCD's results follow the quality of the detector, and the paper uses stronger ones.

    Parameters
    ----------
    vit : Module or dict
        Vision transformer of timm, of which the first blocks are copied, or arguments of ``timm.create_model``.
    layer : int, optional
        Number of blocks; two thirds of all by default.
    tiles : int
        Images are resized to so many times the transformer's size and cut into as many tiles a side. More tiles give
        finer maps.
    rows : int
        Patches in the memory.
    mean, std : three floats each
        By which the transformer's images are standardised.

    Examples
    --------
    >>> import torch
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    >>> detector = PatchMemory(vit, rows=50).fit(torch.rand(5, 3, 32, 40))
    >>> [one.shape for one in detector(torch.rand(1, 3, 32, 40))]
    [torch.Size([32, 40])]
    """

    def __init__(
        self,
        vit: nn.Module | dict[str, Any],
        layer: int | None = None,
        tiles: int = 1,
        rows: int = 4096,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        model = vision_transformer(vit)
        depth = len(model.blocks)
        layer = max(1, round(depth * 2 / 3)) if layer is None else layer
        if not 1 <= layer <= depth:
            raise ValueError(f"layer: expected 1 to {depth}, the transformer's blocks, got {layer}")
        for name, value in (("tiles", tiles), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.config = {
            "vit": {**vit, "pretrained": False} if isinstance(vit, dict) else vit,
            "layer": layer,
            "tiles": tiles,
            "rows": rows,
            "mean": list(mean),
            "std": list(std),
        }
        model.blocks, model.norm = model.blocks[:layer], nn.Identity()
        self.vit: Any = model.requires_grad_(False)
        self.tiles, self.side = tiles, model.patch_embed.img_size[0]
        self.memory: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("memory", torch.full((rows, model.embed_dim), math.nan))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    def features(self, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "a b d"]:
        """Features of the patches of an image, each averaged with its neighbours."""
        m, side = self.tiles, self.side
        x = (image.to(self.memory.device) - self.mean) / self.std
        x = F.interpolate(x[None], (m * side, m * side), mode="bilinear", antialias=True, align_corners=False)
        x = x.view(3, m, side, m, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        h = self.vit.blocks(embed_patches(self.vit, x))[:, self.vit.num_prefix_tokens :]
        g = math.isqrt(h.shape[1])
        h = F.layer_norm(h, h.shape[-1:]).view(m, m, g, g, -1).permute(4, 0, 2, 1, 3).reshape(1, -1, m * g, m * g)
        return F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)[0].permute(1, 2, 0)

    @torch.no_grad()
    def fit(self, images: Sequence[Float[Tensor, "3 _ _"]] | Float[Tensor, "n 3 h w"], seed: int = 0) -> "PatchMemory":
        """Remember patches of good images, in [0, 1]."""
        if not len(images):
            raise ValueError("images: expected at least one good image")
        patches = torch.cat([self.features(image).flatten(0, 1) for image in images])
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))
        order = order.repeat(-(-len(self.memory) // len(order)))[: len(self.memory)]
        self.memory.copy_(patches[order.to(patches.device)])
        return self

    @torch.no_grad()
    def forward(
        self, images: Sequence[Float[Tensor, "3 _ _"]] | Float[Tensor, "n 3 h w"]
    ) -> list[Float[Tensor, "_ _"]]:
        """Anomaly map of every image, of its size, smoothed; all on one scale."""
        if self.memory[0, 0].isnan():
            raise RuntimeError("PatchMemory has no memory yet: call fit with good images")
        maps = []
        for image in images:
            f = self.features(image)
            distance = torch.cdist(f.flatten(0, 1), self.memory).amin(1).view(1, 1, *f.shape[:2])
            size = (image.shape[-2], image.shape[-1])
            one = F.interpolate(distance, size, mode="bilinear", align_corners=False)[0, 0]
            maps.append(torch.from_numpy(ndimage.gaussian_filter(one.cpu().numpy(), 4 / 224 * max(size))))
        return maps
