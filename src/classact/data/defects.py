"""Textured products with known defects, and anomaly maps of known quality for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

NOVEL, BASE = ("scratch", "spot", "stain", "hole"), ("cross", "square", "ripple", "streak")
OTHER = ("triangle", "frame", "corner", "dots", "wave", "bump", "bars", "patch")
KINDS = {"novel": NOVEL, "base": BASE, "other": OTHER}


@dataclass(frozen=True)
class TexturedProducts:
    """Images of one product; see `textured_products`.

    Attributes
    ----------
    images : (n, 3, S, S) float32
        In [0, 1].
    masks : (n, S, S) bool
        Where the defects are.
    y : (n,) int64
        0 without defects, else the type of the image's defects, from 1.
    counts : (n,) int64
        Number of defects.
    classes : tuple of str
        Names of the classes, the first "normal".
    """

    images: np.ndarray
    masks: np.ndarray
    y: np.ndarray
    counts: np.ndarray
    classes: tuple[str, ...]


def textured_products(
    per_class: int,
    n_normal: int,
    seed: int,
    kind: Literal["novel", "base", "other"] = "novel",
    size: int = 64,
    part: int = 0,
) -> TexturedProducts:
    """Images of a texture, most with one to three defects, all defects of an image of one type.

    Ground truth, in ``y``, ``masks`` and ``counts``: the product is band-limited noise in one colour, equal in kind
    for all images of a seed. Types of the ``"novel"`` product are scratch (a thin bright line), spot (a dark disc),
    stain (a faint coloured blob) and hole (a dark ring); those of the ``"base"`` product, which has another texture and
    colour, are cross, square, ripple and streak; those of the ``"other"`` one, for a pretraining that sees neither, are
    triangle, frame, corner, dots, wave, bump, bars and patch. Place, direction and size of a defect vary and tell
    nothing about its type; defects of an image do not touch. The texture tells nothing about the class.

    Parameters
    ----------
    per_class, n_normal : int
        Images of each type, and without defects. They come in a random order.
    seed : int
        Of the product and its images.
    kind : {"novel", "base", "other"}
        Which product.
    size : int
        Side S of the images, at least 32.
    part : int
        Other images of the same product.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if size < 32:
        raise ValueError(f"size: expected at least 32, got {size}")
    names, number = KINDS[kind], list(KINDS).index(kind)
    colour = np.random.default_rng([seed, number]).uniform(0.4, 0.6, size=3)
    rng = np.random.default_rng([seed, number, part + 1])
    y = rng.permutation(np.repeat(np.arange(len(names) + 1), [n_normal, *[per_class] * len(names)]))
    images = colour[:, None, None] + _texture(len(y), size, kind, rng)
    masks = np.zeros((len(y), size, size), bool)
    counts = np.where(y > 0, rng.integers(1, 4, size=len(y)), 0)
    for i, (which, count) in enumerate(zip(y, counts, strict=True)):
        for centre in _centres(count, size, rng):
            mask, change = _defect(names[which - 1], centre, size, rng)
            images[i] += change
            masks[i] |= mask
    return TexturedProducts(images.clip(0, 1).astype(np.float32), masks, y, counts, ("normal", *names))


def anomaly_maps(
    products: TexturedProducts,
    seed: int,
    blur: float = 0.03,
    amplitude: tuple[float, float] = (0.4, 1.0),
    noise: float = 0.08,
    spurious: float = 0.2,
) -> np.ndarray:
    """Anomaly maps as a detector would make them, jointly scaled to 0..255: (n, S, S) uint8.

    Ground truth: each map is the blurred mask times an amplitude of its own, plus smooth noise, plus, in a share of
    the images, normal ones too, one false detection of half the amplitude's upper end.

    Parameters
    ----------
    products : TexturedProducts
        Images with their masks.
    seed : int
        Of the maps.
    blur : float
        Standard deviation of the blur, as a part of the image's side.
    amplitude : pair of float
        Range of the highest score of an image with defects, before noise.
    noise : float
        Standard deviation of the noise.
    spurious : float
        Share of images with a false detection.
    """
    n, size, _ = products.masks.shape
    rng = np.random.default_rng([seed, 2])
    sigma = blur * size
    blurred = ndimage.gaussian_filter(products.masks.astype(float), (0, sigma, sigma))
    blurred /= np.maximum(blurred.max((1, 2), keepdims=True), 1e-12)
    smooth = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 0.06 * size, 0.06 * size))
    maps = rng.uniform(*amplitude, size=(n, 1, 1)) * blurred + noise * smooth / smooth.std()
    at = np.arange(size)
    for i in np.flatnonzero(rng.uniform(size=n) < spurious):
        y, x = rng.uniform(0.1 * size, 0.9 * size, size=2)
        bump = np.exp(-((at - x) ** 2 + (at[:, None] - y) ** 2) / (2 * (1.3 * sigma) ** 2))
        maps[i] += 0.5 * amplitude[1] * bump
    maps = maps.clip(0, None)
    return (maps / maps.max() * 255).round().astype(np.uint8)


def _texture(n: int, size: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Band-limited noise, a third of it in colour."""
    fine, coarse = {"novel": (0.012, 0.03), "base": (0.02, 0.05), "other": (0.016, 0.04)}[kind]
    band = np.zeros((n, 3, size, size))
    for channels, weight in ((1, 1.0), (3, 0.5)):
        white = rng.normal(size=(n, channels, size, size))
        noise = [ndimage.gaussian_filter(white, (0, 0, s * size, s * size), mode="wrap") for s in (fine, coarse)]
        difference = noise[0] - noise[1]
        band += weight * difference / difference.std()
    return 0.05 * band


def _centres(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw (count, 2) centres that keep their distance from each other and from the border."""
    while True:
        found = rng.uniform(0.2 * size, 0.8 * size, size=(count, 2))
        apart = np.linalg.norm(found[:, None] - found[None], axis=-1)
        if (apart + np.eye(count) * size > 0.42 * size).all():
            return found


def _defect(name: str, centre: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mask (S, S), and change (3, S, S) of the image."""
    at, angle = np.arange(size), rng.uniform(0, np.pi)
    dy, dx = at[:, None] - centre[0], at[None] - centre[1]
    u, v = (np.cos(angle) * dx + np.sin(angle) * dy) / size, (np.cos(angle) * dy - np.sin(angle) * dx) / size
    scale, r = rng.uniform(0.8, 1.2), np.hypot(u, v)
    thin, grey = 0.02, np.ones((3, 1, 1))
    shapes: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "scratch": lambda: ((np.abs(v) < thin) & (np.abs(u) < 0.15 * scale), 0.3 * grey),
        "spot": lambda: (r < 0.065 * scale, -0.3 * grey),
        "stain": lambda: (np.hypot(u, 1.5 * v) < 0.14 * scale, np.array([0.1, 0.02, -0.1])[:, None, None]),
        "hole": lambda: (np.abs(r - 0.09 * scale) < thin, -0.3 * grey),
        "cross": lambda: ((np.minimum(np.abs(u), np.abs(v)) < thin) & (r < 0.11 * scale), -0.3 * grey),
        "square": lambda: (np.maximum(np.abs(u), np.abs(v)) < 0.08 * scale, 0.25 * grey),
        "ripple": lambda: (r < 0.14 * scale, 0.25 * np.cos(r * 2 * np.pi / 0.07) * grey),
        "streak": lambda: ((np.abs(v) < 0.04) & (np.abs(u) < 0.15 * scale), np.array([-0.1, 0.1, 0.1])[:, None, None]),
        "triangle": lambda: ((np.abs(u) + 0.6 * v < 0.06 * scale) & (v > -0.07 * scale), -0.25 * grey),
        "frame": lambda: (np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.09 * scale) < thin, 0.3 * grey),
        "corner": lambda: (
            (np.minimum(np.abs(u), np.abs(v)) < thin) & (np.minimum(u, v) > -thin) & (r < 0.18 * scale),
            -0.3 * grey,
        ),
        "dots": lambda: (
            (np.minimum(np.cos(u * 2 * np.pi / 0.08), np.cos(v * 2 * np.pi / 0.08)) > 0) & (r < 0.14 * scale),
            0.3 * grey,
        ),
        "wave": lambda: (
            (np.abs(v - 0.04 * np.cos(u * 2 * np.pi / 0.14)) < thin) & (np.abs(u) < 0.15 * scale),
            np.array([0.2, -0.1, -0.1])[:, None, None],
        ),
        "bump": lambda: (r < 0.12 * scale, 0.3 * np.exp(-((r / 0.07) ** 2)) * grey),
        "bars": lambda: ((np.abs(np.abs(v) - 0.05) < thin) & (np.abs(u) < 0.12 * scale), -0.3 * grey),
        "patch": lambda: (
            (np.abs(u) < 0.1 * scale) & (np.abs(v) < 0.06 * scale),
            np.array([-0.1, 0.12, -0.1])[:, None, None],
        ),
    }
    mask, change = shapes[name]()
    return mask, ndimage.gaussian_filter(mask.astype(float), 0.01 * size) * change
