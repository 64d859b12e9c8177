"""Bags on a grid whose class is a matter of which instances are neighbours."""

from pathlib import Path

import numpy as np

from classact.data.bag_files import RawBag, Source
from classact.data.bags import BagDataset

ROWS, COLUMNS, PAIRS = 6, 8, 3
FEATURES, STRENGTH, NOISE = 6, 2.0, 0.3


def grid_bags(n_bags: int, seed: int, shuffled: bool = False) -> BagDataset:
    """Bags of 48 instances on a grid of 6 rows and 8 columns; in a positive one every B lies directly below an A.

    Ground truth, in ``instance_labels``: 0 background, 1 type A, 2 type B. Features are 2 in the first column for A, 2
    in the second for B, else 0, plus noise of standard deviation 0.3. Every bag holds three of A and three of B; in a
    negative one no B lies directly below an A. In both classes A stays out of the last row and B out of the first.
    Since the bags of both classes hold the same, no model that is blind to order and coords can tell them apart: its
    expected AUC is 0.5.

    Bags are stored row by row, ``coords`` are (column, row).

    Parameters
    ----------
    n_bags : int
        Number of bags; every second one is positive.
    seed : int
        Seed of bags and noise.
    shuffled : bool
        Store every bag in a random order of its own and without coords: nothing tells the classes apart.
    """
    rng = np.random.default_rng(seed)
    size = ROWS * COLUMNS
    coords = np.stack([np.arange(size) % COLUMNS, np.arange(size) // COLUMNS], axis=1)
    sources = []
    for number in range(n_bags):
        a, b = _positive(rng) if number % 2 else _negative(rng)
        kind = np.zeros(size, dtype=np.int64)
        kind[a], kind[b] = 1, 2
        features = rng.normal(scale=NOISE, size=(size, FEATURES))
        features[a, 0] += STRENGTH
        features[b, 1] += STRENGTH
        order = rng.permutation(size)  # drawn in any case: shuffled bags are the same bags
        raw = RawBag(features[order], None, kind[order]) if shuffled else RawBag(features, coords, kind)
        sources.append(Source(f"grid-{number:04d}", "memory", Path("grid"), arrays=raw))
    ids = [source.id for source in sources]
    labels = [number % 2 for number in range(n_bags)]
    return BagDataset(sources, labels, ["negative", "positive"], ids, name="grid", layout="generated")


def _positive(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    while True:
        a = rng.choice((ROWS - 1) * COLUMNS, PAIRS, replace=False)
        if not np.isin(a + COLUMNS, a).any():
            return a, a + COLUMNS


def _negative(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    while True:
        a, above_b = (rng.choice((ROWS - 1) * COLUMNS, PAIRS, replace=False) for _ in range(2))
        b = above_b + COLUMNS
        if not np.isin(above_b, a).any() and not np.isin(b, a).any():
            return a, b
