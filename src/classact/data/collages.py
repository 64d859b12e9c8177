"""Collages of two photographs of different ImageNet classes, so that the place of each class is known."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classact.data.imagenet_sample import photo_part


class Collages(NamedTuple):
    """Collages of two photographs each; see `photo_collages`.

    Attributes
    ----------
    images : (n, 3, S, S) float32
        RGB in [0, 1].
    classes : (n, 2) int64
        ImageNet class of each half.
    masks : (n, 2, S, S) bool
        The halves: left and right, or top and bottom.
    """

    images: Float[Tensor, "n 3 S S"]
    classes: Int[Tensor, "n 2"]
    masks: Bool[Tensor, "n 2 S S"]


def photo_collages(part: int, size: int = 224) -> Collages:
    """All photographs of one of 12 disjoint parts of a sample of ImageNet, each in two collages.

    Ground truth: the class of a half is that of its photograph, which is scaled to cover the half and cut in the
    middle; every second collage has its halves one above the other, the others side by side. A photograph may show
    other things besides its class, and the cut may remove some of it.

    Parameters
    ----------
    part : int
        Which part, from 0 to 11: about 20 photographs, and as many collages. No photograph is in two parts.
    size : int
        Side S in pixels, even.

    Raises
    ------
    DataError
        If the folder ``imagenet-sample`` of JPEG files named ``<class index>_...jpg`` is not in the data folder.
    """
    photos, labels = photo_part(part)
    n, half = len(photos), size // 2
    images, masks = torch.empty(n, 3, size, size), torch.zeros(n, 2, size, size, dtype=torch.bool)
    for number in range(n):
        for place in range(2):
            start, end = place * half, (place + 1) * half
            box = (slice(start, end), slice(None)) if number % 2 else (slice(None), slice(start, end))
            masks[number, place, box[0], box[1]] = True
            shape = (half, size) if number % 2 else (size, half)
            images[number, :, box[0], box[1]] = _cover(photos[(number + place) % n], shape)
    return Collages(images, torch.stack([labels, labels.roll(-1)], 1), masks)


def _cover(photo: Tensor, shape: tuple[int, int]) -> Tensor:
    """The photograph (3, h, w) scaled so that it just covers the shape, and cut in the middle."""
    factor = max(wanted / side for wanted, side in zip(shape, photo.shape[1:], strict=True))
    height, width = (max(wanted, round(side * factor)) for wanted, side in zip(shape, photo.shape[1:], strict=True))
    scaled = F.interpolate(photo[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return scaled[:, top : top + shape[0], left : left + shape[1]].clamp(0, 1)
