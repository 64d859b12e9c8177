"""Scenes of several garments of Fashion-MNIST on one canvas, with the box and the pixels of every garment."""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classact.data.images import fashion_mnist

CLASSES, SHADE, BRIGHTEST_BACKGROUND, COARSE = 10, 0.1, 0.5, 6
TRIES = 2_000


class Scenes(NamedTuple):
    """Scenes with k garments each, and where they are; see `garment_scenes`.

    Attributes
    ----------
    images : (n, 1, S, S) float32
        In [0, 1].
    labels : (n, 10) float32
        1 for the classes that are there.
    classes : (n, k) int64
        Class of each garment.
    boxes : (n, k, 4) int64
        Tight box (r0, c0, r1, c1) around each garment's pixels, ends excluded.
    masks : (n, k, S, S) bool
        Pixels of each garment.
    """

    images: Float[Tensor, "n 1 S S"]
    labels: Float[Tensor, "n 10"]
    classes: Int[Tensor, "n k"]
    boxes: Int[Tensor, "n k 4"]
    masks: Bool[Tensor, "n k S S"]


def garment_scenes(
    n: int,
    seed: int,
    part: Literal["train", "test"] = "train",
    objects: int = 2,
    size: tuple[int, int] = (16, 22),
    same_class: bool = False,
    canvas: int = 48,
) -> Scenes:
    """Garments at random places, not overlapping, on a smooth random background.

    Ground truth, in the fields of `Scenes`: nothing but the garments depends on the classes; background, places and
    sizes do not. Classes are drawn uniformly. A garment's pixels are those of its image, enlarged or reduced to a
    square of random size, that are brighter than a tenth; the squares do not overlap, and no garment is twice in one
    scene. The background is uniform noise on a 6 x 6 grid, between black and half of full brightness, enlarged.

    Parameters
    ----------
    n : int
        Number of scenes.
    seed : int
        Seed of everything that is drawn.
    part : {"train", "test"}
        Which images of Fashion-MNIST to draw from.
    objects : int
        Garments k per scene.
    size : (int, int)
        Smallest and largest side of a garment's square, in pixels.
    same_class : bool
        All garments of a scene are of one class; otherwise all are of different classes.
    canvas : int
        Side S of a scene in pixels.

    Raises
    ------
    ValueError
        If so many garments of that size do not fit, or there are not enough classes.
    DataError
        If Fashion-MNIST is not in the data folder.
    """
    if not 1 <= objects <= CLASSES:
        raise ValueError(f"objects must be from 1 to {CLASSES}, got {objects}")
    if not 1 <= size[0] <= size[1] <= canvas:
        raise ValueError(f"size must be (smallest, largest) within the canvas of {canvas} pixels, got {size}")
    garments, labels = fashion_mnist(part)
    rng = np.random.default_rng([seed, 0 if part == "train" else 1])
    classes = rng.permuted(np.tile(np.arange(CLASSES), (n, 1)), axis=1)[:, :objects]
    if same_class:
        classes = np.repeat(classes[:, :1], objects, axis=1)
    sides = rng.integers(size[0], size[1] + 1, (n, objects))
    corners = _places(sides, canvas, rng)

    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels, minlength=CLASSES)
    within = (rng.random((n, objects)) * (counts[classes] // objects)).astype(int) * objects + np.arange(objects)
    drawn = order[(np.cumsum(counts) - counts)[classes] + within]

    coarse = torch.from_numpy(rng.random((n, 1, COARSE, COARSE), dtype=np.float32)) * BRIGHTEST_BACKGROUND
    images = F.interpolate(coarse, size=(canvas, canvas), mode="bicubic", align_corners=False).clamp_(0, 1)
    masks = torch.zeros(n, objects, canvas, canvas, dtype=torch.bool)
    for side in range(size[0], size[1] + 1):
        scene, number = np.nonzero(sides == side)
        picture = torch.from_numpy(garments[drawn[scene, number]]).unsqueeze(1).float() / 255
        picture = F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        shape = picture[:, 0] > SHADE
        rows, columns = np.moveaxis(corners[scene, number][..., None] + np.arange(side), 1, 0)
        at = (
            torch.from_numpy(scene)[:, None, None],
            torch.from_numpy(rows)[:, :, None],
            torch.from_numpy(columns)[:, None],
        )
        images[at[0], 0, at[1], at[2]] = torch.where(shape, picture[:, 0], images[at[0], 0, at[1], at[2]])
        masks[at[0], torch.from_numpy(number)[:, None, None], at[1], at[2]] = shape
    there = torch.from_numpy(classes)
    return Scenes(images, torch.zeros(n, CLASSES).scatter_(1, there, 1.0), there, _tight_boxes(masks), masks)


def _places(sides: np.ndarray, canvas: int, rng: np.random.Generator) -> np.ndarray:
    """Upper left corners (n, k, 2) of squares with the given sides (n, k): uniform among those that do not overlap."""
    corners = np.zeros((*sides.shape, 2), dtype=int)
    open_scenes = np.arange(len(sides))
    first, second = np.triu_indices(sides.shape[1], 1)
    for _ in range(TRIES):
        side = sides[open_scenes]
        drawn = (rng.random((*side.shape, 2)) * (canvas - side + 1)[..., None]).astype(int)
        ends = drawn + side[..., None]
        apart = (ends[:, first] <= drawn[:, second]) | (ends[:, second] <= drawn[:, first])
        good = apart.any(-1).all(-1)
        corners[open_scenes[good]] = drawn[good]
        open_scenes = open_scenes[~good]
        if not len(open_scenes):
            return corners
    raise ValueError(
        f"size: {sides.shape[1]} garments of up to {sides.max()} pixels do not fit on a canvas of {canvas}"
    )


def _tight_boxes(masks: Tensor) -> Tensor:
    """Boxes (n, k, 4) around masks (n, k, S, S)."""
    ends = []
    for axis in (3, 2):
        filled = masks.any(axis).to(torch.uint8)
        ends.append((filled.argmax(2), filled.shape[2] - filled.flip(2).argmax(2)))
    (top, bottom), (left, right) = ends
    return torch.stack([top, left, bottom, right], -1)
