"""What the experiments on class activation maps share: measures per image, real photographs, and drawings."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classact.data.imagenet_sample import photo_part
from classact.data.lite0 import efficientnet_lite0
from classact.data.networks import Preprocess
from classact.explain.cam import normalize_map, upsample_map
from classact.explain.metrics import box_iou, boxes_from_map, deletion, insertion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
PILOT_PART, FIT_PART = 10, 11  # photographs of pilots, and those to fit thresholds on; parts 0 to 9 are evidence
REMOVED, STEPS = 6, 6  # photographs and portions of the removal curves


def overlap(maps: Tensor, boxes: Tensor, fraction: float) -> Tensor:
    """Intersection over union (N,) of the box of a map (N, H, W) with the true box (N, 4)."""
    return box_iou(boxes_from_map(maps, fraction), boxes)


def fit_box_fraction(maps: Tensor, boxes: Tensor) -> float:
    """The threshold with the largest mean overlap."""
    return max(FRACTIONS, key=lambda fraction: float(overlap(maps, boxes, fraction).mean()))


def mask_iou(maps: Tensor, masks: Tensor, fraction: float) -> Tensor:
    """Intersection over union (N,) of what is above a share of the maximum with the true pixels (N, H, W)."""
    above = (maps >= fraction * maps.amax((1, 2), keepdim=True)) & (maps > 0)
    return (above & masks).sum((1, 2)) / (above | masks).sum((1, 2)).clamp_min(1)


def fit_mask_fraction(maps: Tensor, masks: Tensor) -> float:
    """The threshold with the largest mean intersection over union."""
    return max(FRACTIONS, key=lambda fraction: float(mask_iou(maps, masks, fraction).mean()))


def pixel_auroc(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under the ROC curve (N,) of a map's values for the true pixels; 0.5 for a constant map."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(maps.flatten(1).numpy(), axis=1))
    inside = masks.flatten(1)
    positive, total = inside.sum(1), inside.shape[1]
    above = (ranks * inside).sum(1) - positive * (positive + 1) / 2
    return above / (positive * (total - positive))


def instance_recall(maps: Tensor, masks: Tensor) -> Tensor:
    """Share (N,) of the instances (N, k, H, W) whose own maximum is at least half of the map's."""
    peaks = maps.unsqueeze(1).mul(masks).amax((2, 3))
    top = maps.amax((1, 2)).unsqueeze(1)
    return ((peaks >= top / 2) & (top > 0)).float().mean(1)


def sharpness(maps: Tensor) -> Tensor:
    """1 - entropy (N,) of the map as a distribution over pixels, as a share of the largest entropy; 0 for no map."""
    flat = maps.flatten(1)
    total = flat.sum(1, keepdim=True)
    entropy = torch.special.entr(flat / torch.where(total > 0, total, 1)).sum(1)
    return torch.where(total[:, 0] > 0, 1 - entropy / np.log(flat.shape[1]), 0)


def center_map(like: Tensor) -> Tensor:
    """A Gaussian at the centre, the same for every image (N, H, W); its deviation is a quarter of the side."""
    rows, columns = (torch.linspace(-2, 2, size) for size in like.shape[-2:])
    one = (-(rows[:, None] ** 2 + columns**2) / 2).exp()
    return one.expand(len(like), *one.shape)


def random_map(like: Tensor, seed: int) -> Tensor:
    """Uniform noise on a grid of 7 x 7, enlarged as class activation maps are (N, H, W)."""
    coarse = torch.rand(len(like), 7, 7, generator=torch.Generator().manual_seed(seed))
    return normalize_map(upsample_map(coarse, like.shape[-2:]))


class PhotoNetwork(nn.Module):
    """EfficientNet-Lite0 for images (N, 3, H, W) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet_lite0().to(memory_format=torch.channels_last)  # twice as fast
        self.preprocess = Preprocess()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 1000)."""
        return self.network(self.preprocess.normalize(x))


@lru_cache(maxsize=1)
def photo_network() -> nn.Module:
    """The network, in evaluation mode."""
    return PhotoNetwork().eval()


def evidence_part(seed: int) -> int:
    """The part of the photographs that belongs to a seed."""
    return seed - 100 if seed >= 100 else PILOT_PART


def plain_photos(seed: int, scale: str) -> Tensor:
    """Some photographs (N, 3, 224, 224) of a seed's part, cut to the centre; one of 96 pixels for smoke tests."""
    photos, _ = photo_part(evidence_part(seed))
    n, canvas = (1, 96) if scale == "smoke" else (REMOVED, 224)
    cut = []
    for photo in photos[:n]:
        side = min(photo.shape[1:])
        top, left = ((length - side) // 2 for length in photo.shape[1:])
        square = photo[None, :, top : top + side, left : left + side]
        cut.append(
            F.interpolate(square, (canvas, canvas), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
        )
    return torch.stack(cut)


def removal_areas(
    model: nn.Module, x: Tensor, maps: Mapping[str, Tensor], classes: Tensor
) -> dict[str, dict[str, float]]:
    """Areas under the deletion and the insertion curve, with two fills each, for every map."""
    values: dict[str, dict[str, float]] = {}
    for arm, one in maps.items():
        values[arm] = {}
        for fill in ("mean", "blur"):
            for curve in (deletion, insertion):
                area = curve(model, x, one, classes, steps=STEPS, fill=fill, batch_size=32).auc
                values[arm][f"{curve.__name__}_{fill}"] = float(area.mean())
    return values


def as_bytes(maps: Tensor) -> np.ndarray:
    """Maps (N, H, W) as uint8, each from 0 to its maximum."""
    return (normalize_map(maps) * 255).round().to(torch.uint8).numpy()


def strips(axes: "Axes", values: Mapping[str, np.ndarray], label: str) -> None:
    """Draw one point per seed and arm, the points of a seed joined, and means with 95 % intervals."""
    from classact.evidence.statistics import t_interval

    axes.plot(np.array(list(values.values())), color="0.85", linewidth=0.7, zorder=1)
    for index, row in enumerate(values.values()):
        axes.scatter(np.full(len(row), index), row, s=9, color="C0", alpha=0.6, linewidth=0, zorder=2)
        found = t_interval(row)
        ends = [[found.effect - found.low], [found.high - found.effect]]
        axes.errorbar(index, found.effect, ends, color="black", marker="o", markersize=4, capsize=3, zorder=3)
    axes.set_xticks(range(len(values)), [name.replace("_", " ") for name in values], rotation=40, ha="right")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def show_map(axes: "Axes", image: np.ndarray, one: np.ndarray | None = None) -> None:
    """An image, uint8 grey (H, W) or colour (H, W, 3), with a map over it."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    if one is not None:
        axes.imshow(one, cmap="inferno", alpha=0.55, vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_removal(cells: Any) -> Any:
    """The four areas of every arm."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.6), layout="constrained")
    for axes, curve in zip(
        figure.subplots(1, 4), ("deletion_mean", "deletion_blur", "insertion_mean", "insertion_blur"), strict=True
    ):
        name, fill = curve.split("_")
        wanted = "smaller" if name == "deletion" else "larger"
        strips(axes, {arm: cells.metric(arm, curve) for arm in cells.arms}, f"{name} area, {fill} ({wanted} is better)")
    return figure
