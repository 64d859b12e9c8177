"""Photographs pasted at known places on a blurred photograph, so that the box of what a network recognises is known."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classact.data.imagenet_sample import photo_part

COARSE = 7  # the background has been reduced to so many pixels a side, and enlarged again


class PastedPhotos(NamedTuple):
    """Images with k copies of one photograph each, and where they are; see `pasted_photos`.

    Attributes
    ----------
    images : (n, 3, S, S) float32
        RGB in [0, 1].
    classes : (n,) int64
        ImageNet class of the photograph.
    boxes : (n, k, 4) int64
        Box (r0, c0, r1, c1) of each copy, ends excluded.
    masks : (n, k, S, S) bool
        The same as pixels.
    """

    images: Float[Tensor, "n 3 S S"]
    classes: Int[Tensor, "n"]
    boxes: Int[Tensor, "n k 4"]
    masks: Bool[Tensor, "n k S S"]


def pasted_photos(
    part: int, seed: int, copies: int = 1, size: tuple[int, int] = (96, 144), canvas: int = 224
) -> PastedPhotos:
    """Every photograph of a part, reduced and pasted once or twice on another photograph that is blurred beyond detail.

    Ground truth, in the fields of `PastedPhotos`: details of the class are within the boxes only; sides and places are
    uniform and do not depend on the class. The photograph is cut to its central square. Its object may fill a part of
    the box only. Two copies have one size and lie side by side or one above the other, anywhere in their halves.

    Parameters
    ----------
    part : int
        Which photographs, from 0 to 11; no photograph is in two parts.
    seed : int
        Seed of sides and places.
    copies : {1, 2}
        How often the photograph is pasted.
    size : (int, int)
        Smallest and largest side of the square, in pixels.
    canvas : int
        Side S of an image in pixels.

    Raises
    ------
    ValueError
        If squares of that size do not fit, or there is no such part.
    DataError
        If the photographs are not in the data folder.
    """
    if copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {copies}")
    if not 1 <= size[0] <= size[1] <= canvas // copies:
        raise ValueError(f"size must be (smallest, largest) within {canvas // copies} pixels, got {size}")
    photos, classes = photo_part(part)
    rng, n = np.random.default_rng([seed, part]), len(photos)
    images = torch.empty(n, 3, canvas, canvas)
    boxes, masks = torch.empty(n, copies, 4, dtype=torch.long), torch.zeros(n, copies, canvas, canvas, dtype=torch.bool)
    for number, photo in enumerate(photos):
        blurred = F.interpolate(_square(photos[(number + 1) % n], COARSE)[None], (canvas, canvas), mode="bicubic")
        images[number] = blurred[0].clamp(0, 1)
        side, across = int(rng.integers(size[0], size[1] + 1)), int(rng.integers(2))
        pasted = _square(photo, side)
        for copy in range(copies):
            room = [canvas, canvas]
            room[across] //= copies
            corner = [int(rng.integers(space - side + 1)) for space in room]
            corner[across] += copy * room[across]
            place = (slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side))
            images[number, :, place[0], place[1]] = pasted
            masks[number, copy, place[0], place[1]] = True
            boxes[number, copy] = torch.tensor([corner[0], corner[1], corner[0] + side, corner[1] + side])
    return PastedPhotos(images, classes, boxes, masks)


def _square(photo: Tensor, side: int) -> Tensor:
    """The central square of a photograph (3, h, w), scaled to a side."""
    short = min(photo.shape[1:])
    top, left = ((length - short) // 2 for length in photo.shape[1:])
    cut = photo[None, :, top : top + short, left : left + short]
    return F.interpolate(cut, (side, side), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
