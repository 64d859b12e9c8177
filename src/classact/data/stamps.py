"""Garments of Fashion-MNIST with small coloured stamps, which are the known traits of fine-grained classes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from classact.data.images import fashion_mnist

SIZE, STAMP, PER_IMAGE, PATTERNS, CLASSES = 24, 5, 3, 8, 5


@dataclass(frozen=True)
class StampedGarments:
    """Images with three stamps each; see `stamped_garments`.

    Attributes
    ----------
    x, plain : (n, 3, 24, 24) float32
        Images in [0, 1], and the same images without any stamp.
    y : (n,) int64
        Class: the pattern of the first stamp. Without meaning for ``"attributes"``.
    stamps : (n, 3) int64
        Pattern of every stamp.
    corners : (n, 3, 2) int64
        Row and column of its upper left pixel.
    patterns : (8, 3, 5, 5) float32
        All patterns.
    """

    x: np.ndarray
    plain: np.ndarray
    y: np.ndarray
    stamps: np.ndarray
    corners: np.ndarray
    patterns: np.ndarray

    @property
    def attributes(self) -> np.ndarray:
        """(n, 8) float32: 1 for the patterns that an image has."""
        return np.eye(PATTERNS, dtype=np.float32)[self.stamps].max(1)

    def patches(self, stamp: int, patch: int = 4, share: float = 0.25) -> np.ndarray:
        """(n, 24 / patch, 24 / patch) bool: the patches of which a stamp covers at least the given share."""
        pixels = np.arange(SIZE)
        covered = (pixels >= self.corners[:, stamp, :, None]) & (pixels < self.corners[:, stamp, :, None] + STAMP)
        rows, columns = covered.reshape(len(self.x), 2, SIZE // patch, patch).sum(-1).swapaxes(0, 1)
        return rows[:, :, None] * columns[:, None] >= share * patch**2


def stamped_garments(
    n: int,
    seed: int,
    kind: Literal["attributes", "classes", "hybrids"] = "classes",
    part: Literal["train", "test"] = "train",
) -> StampedGarments:
    """Random garments, tinted and noisy, with three stamps of 5 x 5 pixels at random places that do not overlap.

    Ground truth, in ``stamps`` and ``corners``: there are 8 patterns, each random pixels of two random colours, equal
    for all images of a seed. An image of class c in 0 to 4 has pattern c first, then two different ones of the
    patterns 5, 6 and 7, which all classes share. So only the first stamp tells the class; garment, tint and places
    do not.

    Parameters
    ----------
    n : int
        Number of images; classes take turns.
    seed : int
        Of patterns and images.
    kind : {"attributes", "classes", "hybrids"}
        Three different patterns out of all 8; the images above; or images with the patterns of two different classes,
        the second of which is that of the second stamp, and one of 5, 6 and 7.
    part : {"train", "test"}
        Which images of Fashion-MNIST the garments are drawn from.
    """
    if kind not in ("attributes", "classes", "hybrids"):
        raise ValueError(f"kind: expected 'attributes', 'classes' or 'hybrids', got {kind!r}")
    patterns = _patterns(np.random.default_rng(seed))
    rng = np.random.default_rng([seed, ("attributes", "classes", "hybrids").index(kind), int(part == "test")])
    images, _ = fashion_mnist(part)
    garment = images[rng.integers(len(images), size=n), None, 2:26, 2:26] / 255
    plain = 0.6 * garment * rng.uniform(size=(n, 3, 1, 1)) + 0.05 * rng.normal(size=(n, 3, SIZE, SIZE))
    plain = plain.clip(0, 1).astype(np.float32)
    y = np.arange(n) % CLASSES
    shared = rng.permuted(np.tile(np.arange(CLASSES, PATTERNS), (n, 1)), axis=1)
    if kind == "attributes":
        stamps = rng.permuted(np.tile(np.arange(PATTERNS), (n, 1)), axis=1)[:, :PER_IMAGE]
    elif kind == "classes":
        stamps = np.column_stack([y, shared[:, :2]])
    else:
        stamps = np.column_stack([y, (y + rng.integers(1, CLASSES, size=n)) % CLASSES, shared[:, 0]])
    corners = _corners(n, rng)
    x = plain.copy()
    for stamp in range(PER_IMAGE):
        rows, columns = (corners[:, stamp, axis, None] + np.arange(STAMP) for axis in (0, 1))
        x[np.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]] = patterns[stamps[:, stamp]].transpose(
            0, 2, 3, 1
        )
    return StampedGarments(x, plain, y, stamps, corners, patterns)


def _patterns(rng: np.random.Generator) -> np.ndarray:
    """Draw (8, 3, 5, 5) patterns, again where a mean colour is within 0.2 of an earlier one: hard to tell apart."""
    found: list[np.ndarray] = []
    while len(found) < PATTERNS:
        colours, which = rng.uniform(size=(2, 3)).astype(np.float32), rng.integers(2, size=(STAMP, STAMP))
        pattern = colours[which].transpose(2, 0, 1)
        if all(np.linalg.norm(pattern.mean((1, 2)) - other.mean((1, 2))) > 0.2 for other in found):
            found.append(pattern)
    return np.stack(found)


def _corners(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw (n, 3, 2) corners, again where stamps overlap."""
    corners = np.empty((n, PER_IMAGE, 2), dtype=np.int64)
    todo = np.arange(n)
    while len(todo):
        corners[todo] = rng.integers(SIZE - STAMP + 1, size=(len(todo), PER_IMAGE, 2))
        apart = np.abs(corners[todo, :, None] - corners[todo, None]).max(-1) >= STAMP
        todo = todo[~(apart | np.eye(PER_IMAGE, dtype=bool)).all((1, 2))]
    return corners
