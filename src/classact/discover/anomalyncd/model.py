"""AnomalyNCD as a whole, for images that come with anomaly maps or with a detector of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from classact.discover.anomalyncd.augment import CropViews
from classact.discover.anomalyncd.crops import CropSet, anomaly_crops, stack_crops
from classact.discover.anomalyncd.detector import IMAGENET_MEAN, IMAGENET_STD, PatchMemory
from classact.discover.anomalyncd.mebin import MEBin
from classact.discover.anomalyncd.merging import RegionMerger
from classact.discover.anomalyncd.network import MaskGuidedViT, NCDHeads, NCDOutput

Images = Sequence[Float[Tensor, "3 _ _"]] | Float[Tensor, "n 3 h w"]
Maps = Sequence[Any] | Tensor | np.ndarray
UNSURE = "unsure"


@dataclass(frozen=True)
class Predictions:
    """Predictions for I images with R regions.

    Attributes
    ----------
    labels : list of str
        Of each image: "normal", "type 1", "type 2", ..., or "unsure".
    probabilities : (I, C_n)
        Of each image.
    classes : list of str
        Names of the C_n new classes.
    regions : CropSet
        The crops; ``image_id``, ``boxes`` and ``areas`` say where they are.
    region_probabilities : (R, C_n)
        Of each region.
    region_labels : list of str
        Of each region.
    """

    labels: list[str]
    probabilities: Float[Tensor, "i c"]
    classes: list[str]
    regions: CropSet
    region_probabilities: Float[Tensor, "r c"]
    region_labels: list[str]


class AnomalyNCD(nn.Module):
    """Tells types of defects apart; trained by [`fit_anomalyncd`][classact.discover.fit_anomalyncd].

    Of the C_b + C_n classes the first are those of the base set. Of the C_n new ones the first is "normal": that is
    where crops with low anomaly scores are drawn. The others are numbered; their order means nothing. Nothing forces
    normal images into the normal class, so compare clusters with known types by a matching.

    Images are (3, H, W) in [0, 1]. The prediction for an image does not depend on the others that are given.

    Parameters
    ----------
    vit : Module or dict
        Vision transformer of timm, which is copied, or arguments of ``timm.create_model``; DINO ViT-B/8 in the paper,
        ``{"model_name": "vit_base_patch8_224.dino", "pretrained": True}``.
    n_base, n_novel : int
        Classes of the base set, 0 without one, and new classes, the normal one included.
    n_blocks : int
        Blocks whose class token is guided by the mask; all, if there are fewer.
    threshold : float
        Share of a patch that must be masked; 0: any part of it.
    heads, hidden, projection : int
        Of [`NCDHeads`][classact.discover.NCDHeads].
    trainable_blocks : int
        Blocks that are trained, counted from the last; the rest of the transformer is frozen.
    step, min_interval, erode : int
        Of [`MEBin`][classact.discover.MEBin]; the paper's maps are about as large as its images, 224 pixels and more.
    max_regions : {"exact", "code"}
        Keep as many crops of an image as MEBin found regions, or one more, as the authors' code does.
    tau : float
        Of [`RegionMerger`][classact.discover.RegionMerger]; about a tenth of the images' longer side in the paper.
    detector : PatchMemory, optional
        Makes the maps where none are given.
    mean, std : three floats each
        By which the transformer's images are standardised.

    Examples
    --------
    >>> import torch
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=28, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    >>> model = AnomalyNCD(vit, n_base=4, n_novel=3, hidden=32).eval()
    >>> model(torch.rand(2, 3, 28, 28), torch.ones(2, 1, 28, 28)).logits.shape
    torch.Size([2, 4, 7])
    """

    def __init__(
        self,
        vit: nn.Module | dict[str, Any],
        n_base: int,
        n_novel: int,
        n_blocks: int = 9,
        threshold: float = 0.5,
        heads: int = 4,
        hidden: int = 2048,
        projection: int = 256,
        trainable_blocks: int = 1,
        step: int = 4,
        min_interval: int = 4,
        erode: int = 6,
        max_regions: Literal["exact", "code"] = "exact",
        tau: float = 100.0,
        detector: PatchMemory | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if n_base < 0:
            raise ValueError(f"n_base: expected 0 or more, got {n_base}")
        if n_novel < 1:
            raise ValueError(f"n_novel: expected at least 1, got {n_novel}")
        if max_regions not in ("exact", "code"):
            raise ValueError(f"max_regions: expected 'exact' or 'code', got {max_regions!r}")
        self.config = {
            "vit": {**vit, "pretrained": False} if isinstance(vit, dict) else vit,
            "n_base": n_base,
            "n_novel": n_novel,
            "n_blocks": n_blocks,
            "threshold": threshold,
            "heads": heads,
            "hidden": hidden,
            "projection": projection,
            "trainable_blocks": trainable_blocks,
            "step": step,
            "min_interval": min_interval,
            "erode": erode,
            "max_regions": max_regions,
            "tau": tau,
            "detector": detector,
            "mean": list(mean),
            "std": list(std),
        }
        self.backbone = MaskGuidedViT(vit, 0, threshold)
        blocks = self.backbone.vit.blocks
        if n_blocks < 0:
            raise ValueError(f"n_blocks: expected 0 or more, got {n_blocks}")
        if not 0 <= trainable_blocks <= len(blocks):
            raise ValueError(f"trainable_blocks: expected 0 to {len(blocks)}, got {trainable_blocks}")
        self.backbone.n_blocks = min(n_blocks, len(blocks))
        self.backbone.requires_grad_(False)
        for block in blocks[len(blocks) - trainable_blocks :]:
            block.requires_grad_(True)
        self.heads = NCDHeads(self.backbone.embed_dim, n_base + n_novel, heads, hidden, projection)
        self.merge = RegionMerger(tau)
        self.detector = detector
        self.n_base, self.n_novel, self.max_regions = n_base, n_novel, max_regions
        self.binarization = {"step": step, "min_interval": min_interval, "erode": erode}
        self.size: int = self.backbone.vit.patch_embed.img_size[0]
        self.map_range: Tensor
        self.best_head: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("map_range", torch.full((2,), torch.nan, dtype=torch.float64))
        self.register_buffer("best_head", torch.tensor(0))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def classes(self) -> list[str]:
        """Names of the new classes."""
        return ["normal", *(f"type {i}" for i in range(1, self.n_novel))]

    def forward(self, x: Float[Tensor, "n 3 s s"], mask: Float[Tensor, "n 1 s s"]) -> NCDOutput:
        """Class token, projection, and cosines of all heads, for crops in [0, 1] of the transformer's size."""
        return self.heads(self.backbone((x - self.mean) / self.std, mask))

    def crops(self, images: Images, maps: Maps | None = None) -> CropSet:
        """Binarise the maps and cut the images, as before training and for predictions.

        Parameters
        ----------
        images : sequence of (3, H, W), or (N, 3, H, W)
            In [0, 1].
        maps : sequence of (H', W'), optional
            Anomaly maps on the scale of those of the training; by default the detector's. They are brought to the
            size of their image: masks by the nearest pixel, scores bilinearly.

        Raises
        ------
        ValueError
            If there are no images, they have other shapes or values outside [0, 1], or there are not as many maps.
        RuntimeError
            If the model is not fitted, or has neither maps nor a detector.
        """
        check_images(images)
        if self.map_range.isnan().any():
            raise RuntimeError("AnomalyNCD is not fitted: it has no range of thresholds; see fit_anomalyncd")
        if maps is None:
            if self.detector is None:
                raise RuntimeError(
                    "maps: this model has no detector of its own; give the maps of the one it was fitted on"
                )
            maps = self.detector(images)
        if len(maps) != len(images):
            raise ValueError(f"maps: expected one for each of {len(images)} images, got {len(maps)}")
        mebin = MEBin(**self.binarization)
        mebin.min_, mebin.max_ = self.map_range.tolist()
        masks, numbers, _ = mebin.binarize(maps)
        found = []
        for image, scaled, mask, number in zip(images, mebin.scale(maps), masks, numbers.tolist(), strict=True):
            size = (image.shape[-2], image.shape[-1])
            pixels = F.interpolate(torch.from_numpy(mask)[None, None].float(), size)[0, 0] > 0
            scores = torch.from_numpy(scaled / 255).float()[None, None]
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
            keep = max(number, 1) + (self.max_regions == "code")
            found.append(anomaly_crops(image, pixels, scores[0, 0], keep))
        return stack_crops(found, round(self.size / 0.875))

    @torch.no_grad()
    def predict(
        self, images: Images, maps: Maps | None = None, *, unsure_below: float = 0.0, batch_size: int = 32
    ) -> Predictions:
        """Classify images and their regions.

        Parameters
        ----------
        images, maps
            As for ``crops``.
        unsure_below : float
            Images and regions whose largest probability is smaller are "unsure".
        batch_size : int
            Crops at once.
        """
        if not 0 <= unsure_below <= 1:
            raise ValueError(f"unsure_below: expected a probability from 0 to 1, got {unsure_below}")
        regions = self.crops(images, maps)
        p = self.region_probabilities(regions, batch_size)
        merged = self.merge(p, regions.areas, regions.image_id)
        named = [self._names(one, unsure_below) for one in (merged, p)]
        return Predictions(named[0], merged, self.classes, regions, p, named[1])

    @torch.no_grad()
    def region_probabilities(self, regions: CropSet, batch_size: int = 32) -> Float[Tensor, "r c"]:
        """Probabilities (R, C_n) of the new classes, by the best head."""
        training, device = self.training, self.map_range.device
        self.eval()
        try:
            found = []
            for images, masks in zip(regions.images.split(batch_size), regions.masks.split(batch_size), strict=True):
                logits = self(*CropViews(self.size).central(images.to(device), masks.to(device))).logits
                found.append((logits[:, self.best_head, self.n_base :].float() / 0.1).softmax(-1).cpu())
        finally:
            self.train(training)
        return torch.cat(found)

    def _names(self, p: Tensor, unsure_below: float) -> list[str]:
        highest, index = p.max(1)
        return [
            UNSURE if top < unsure_below else self.classes[i]
            for top, i in zip(highest.tolist(), index.tolist(), strict=True)
        ]


def check_images(images: Any, name: str = "images") -> None:
    """Refuse what are no RGB images in [0, 1]."""
    if not len(images):
        raise ValueError(f"{name}: expected at least one")
    for i, image in enumerate(images):
        if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
            raise ValueError(f"{name}: expected floats (3, H, W), got {image.dtype} {tuple(image.shape)} for image {i}")
        low, high = (float(end) for end in image.aminmax())
        if not (low >= 0 and high <= 1):  # NaN fails as well
            raise ValueError(f"{name}: expected values in [0, 1], got {low:g} to {high:g} in image {i}")
