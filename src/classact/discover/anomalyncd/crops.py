"""Anomaly-centred crops (section 3.2): squares around the regions of a mask, those that are close merged."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

EIGHT = np.ones((3, 3), bool)


class Crop(NamedTuple):
    """A part of an image.

    Attributes
    ----------
    box : tuple
        Left, top, right, bottom, in pixels; merged boxes may reach beyond the border, where image and mask are 0.
    image : (C, h, w) float
        What is in the box.
    mask : (h, w) bool
        The anomalies in it.
    score : float
        Highest score in the box.
    """

    box: tuple[int, int, int, int]
    image: Float[Tensor, "c h w"]
    mask: Bool[Tensor, "h w"]
    score: float


def rectangle_gap(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Euclidean distance of rectangles (left, top, right, bottom), -1 where they overlap.

    Examples
    --------
    >>> import numpy as np
    >>> rectangle_gap(np.array([[0.0, 0, 10, 10]]), np.array([[20.0, 0, 30, 10], [13, 14, 23, 24], [5, 5, 9, 9]]))
    array([[10.,  5., -1.]])
    """
    apart = np.maximum(a[:, None, :2] - b[None, :, 2:], b[None, :, :2] - a[:, None, 2:])
    gap = np.linalg.norm(apart.clip(min=0), axis=-1)
    return np.where((apart < 0).all(-1), -1.0, gap)


def anomaly_crops(
    image: Float[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    score_map: Float[Tensor, "h w"] | None = None,
    max_regions: int | None = None,
    padding: float = 0.1,
    merge: float = 0.01,
    min_size: float = 0.1,
) -> list[Crop]:
    """Cut squares around the regions of a mask, the largest first.

    The half side of a square is the larger of ``1 + padding`` times half the region's longer side and `min_size` times
    the image's, at most half the image's; a square that reaches beyond the border is shifted back. Squares with less
    than `merge` times the image's longer side between them become one square. In a mask without regions the whole
    image is the only crop. As in the authors' code, regions inside the hole of another do not count, and a square that
    merges three or more is made square after each.

    Parameters
    ----------
    image : (C, H, W)
        Image.
    mask : (H, W) bool
        Anomalies.
    score_map : (H, W), optional
        Anomaly scores in [0, 1]; the score of a crop is the highest in it. Without, it is 1, or 0 for an empty mask.
    max_regions : int, optional
        Keep so many crops. The authors' code keeps one more than MEBin's number of regions.
    padding, merge, min_size : float
        As above.

    Raises
    ------
    ValueError
        If mask or score map have another size than the image, the map has NaN, or `max_regions` is below 1.

    Examples
    --------
    >>> import torch
    >>> mask = torch.zeros(100, 100, dtype=torch.bool)
    >>> mask[20:24, 30:60] = True
    >>> [crop.box for crop in anomaly_crops(torch.rand(3, 100, 100), mask)]
    [(29, 6, 61, 38)]
    """
    height, width = image.shape[-2:]
    for name, one in (("mask", mask), ("score_map", score_map)):
        if one is not None and one.shape != image.shape[-2:]:
            raise ValueError(f"{name}: expected the image's size {(height, width)}, got {tuple(one.shape)}")
    if score_map is not None and score_map.isnan().any():
        raise ValueError("score_map: expected no NaN")
    if max_regions is not None and max_regions < 1:
        raise ValueError(f"max_regions: expected at least 1, got {max_regions}")
    found = _squares(mask.cpu().numpy(), padding, min_size)
    boxes = _merged(found, int(max(height, width) * merge)) if found else [(0, 0, width, height)]
    crops = []
    for left, top, right, bottom in boxes[:max_regions]:
        # negative padding cuts, positive padding fills with 0
        pad = (-left, right - width, -top, bottom - height)
        part = F.pad(mask, pad)
        score = float(part.any()) if score_map is None else float(F.pad(score_map, pad).max())
        crops.append(Crop((left, top, right, bottom), F.pad(image, pad), part, score))
    return crops


def _squares(mask: np.ndarray, padding: float, min_size: float) -> list[tuple[int, int, int, int]]:
    height, width = mask.shape
    longer = max(height, width)
    # filling holes takes in what is inside them: only outer contours remain
    slices = ndimage.find_objects(ndimage.label(ndimage.binary_fill_holes(mask), EIGHT)[0])
    rectangles = [(y.stop - y.start, x.stop - x.start, x.start, y.start) for y, x in slices]
    squares = []
    for h, w, x, y in sorted(rectangles, key=lambda one: (one[0] * one[1], one[2], one[3], one[1], one[0])):
        middle = int((2 * x + w) * 0.5), int((2 * y + h) * 0.5)
        half = max(int(max(h, w) * (1 + padding) * 0.5), int(longer * min_size))
        half = min(half, int(longer * 0.5))
        corner = []
        for at, length in zip(middle, (width, height), strict=True):
            low, high = at - half, at + half
            corner.append(0 if low < 0 else length - 2 * half if high > length else low)
        squares.append((corner[0], corner[1], corner[0] + 2 * half, corner[1] + 2 * half))
    return squares


def _merged(boxes: list[tuple[int, int, int, int]], distance: int) -> list[tuple[int, int, int, int]]:
    distinct = list(dict.fromkeys(boxes))
    corners = np.array(distinct, float)
    near = rectangle_gap(corners, corners) < distance
    np.fill_diagonal(near, True)
    groups = list(dict.fromkeys(frozenset(np.flatnonzero(row).tolist()) for row in near))
    squares: list[tuple[float, ...]] = []
    for group in groups:
        if any(group < other for other in groups):
            continue
        first, *others = sorted(distinct[i] for i in group)
        box: tuple[float, ...] = first
        for other in others:
            left, top = min(box[0], other[0]), min(box[1], other[1])
            right, bottom = max(box[2], other[2]), max(box[3], other[3])
            grow = (right - left - (bottom - top)) / 2  # positive: wider than high
            dx, dy = max(-grow, 0), max(grow, 0)
            box = (left - dx, top - dy, right + dx, bottom + dy)
        squares.append(box)
    squares.sort(key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), reverse=True)
    return [(round(left), round(top), round(right), round(bottom)) for left, top, right, bottom in squares]


class CropSet(NamedTuple):
    """Crops of many images, resized to one side S and kept as bytes.

    Attributes
    ----------
    images : (R, 3, S, S) uint8
        Crops. Those that are not square, which are whole images, are cut to their middle.
    masks : (R, 1, S, S) uint8
        0 to 255; after resizing, the share of a pixel that is masked.
    scores : (R,)
        Highest anomaly score in each, in [0, 1].
    areas : (R,)
        Masked pixels of each before resizing.
    image_id : (R,) int
        Which image each comes from.
    boxes : (R, 4) int
        Left, top, right, bottom.
    """

    images: UInt8[Tensor, "r 3 s s"]
    masks: UInt8[Tensor, "r 1 s s"]
    scores: Float[Tensor, " r"]
    areas: Float[Tensor, " r"]
    image_id: Int[Tensor, " r"]
    boxes: Int[Tensor, "r 4"]


def stack_crops(crops: Sequence[Sequence[Crop]], size: int) -> CropSet:
    """Resize the crops of every image to `size` pixels and stack them."""
    images, masks = [], []
    flat = [crop for of_image in crops for crop in of_image]
    for crop in flat:
        pixels = torch.cat([crop.image, crop.mask[None].to(crop.image.dtype)])[None]
        h, w = pixels.shape[-2:]
        scale = size / min(h, w)
        target = (max(size, round(h * scale)), max(size, round(w * scale)))
        pixels = F.interpolate(pixels, target, mode="bilinear", antialias=True, align_corners=False)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        pixels = (pixels[0, :, top : top + size, left : left + size] * 255).round().clamp(0, 255).to(torch.uint8)
        images.append(pixels[:-1])
        masks.append(pixels[-1:])
    return CropSet(
        torch.stack(images),
        torch.stack(masks),
        torch.tensor([crop.score for crop in flat]),
        torch.tensor([float(crop.mask.sum()) for crop in flat]),
        torch.tensor([i for i, of_image in enumerate(crops) for _ in of_image]),
        torch.tensor([crop.box for crop in flat]),
    )
