"""Bags of real handwritten digits with known positives; the question is whether a bag contains a 9."""

from pathlib import Path

import numpy as np

from classact.data.bag_files import RawBag, Source
from classact.data.bags import BagDataset


def digits_bags(n_bags: int = 150, digit: int = 9, seed: int = 0) -> BagDataset:
    """Bags of 8 to 12 images from scikit-learn's handwritten digits (UCI, CC BY 4.0).

    No image is used twice, so bags are independent. Half of the bags are positive: they hold 1 or 2 images of `digit`
    among others; negative bags hold none. The ground truth of every instance is its ``instance_labels`` (1 = `digit`).

    Parameters
    ----------
    n_bags : int
        Number of bags, at most 150 (there are 1,797 images).
    digit : int
        The digit that makes a bag positive.
    seed : int
        Seed of the composition.
    """
    from sklearn.datasets import load_digits

    if not 2 <= n_bags <= 150:
        raise ValueError(f"n_bags: expected 2 to 150, got {n_bags}")
    images, target = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    witnesses = list(rng.permutation(np.flatnonzero(target == digit)))
    others = list(rng.permutation(np.flatnonzero(target != digit)))
    sources, labels = [], []
    for number in range(n_bags):
        positive, size = number % 2, int(rng.integers(8, 13))
        count = int(rng.integers(1, 3)) if positive else 0
        drawn = [witnesses.pop() for _ in range(count)] + [others.pop() for _ in range(size - count)]
        members = rng.permutation(drawn)
        bag = RawBag(
            (images[members] / 16).astype(np.float32), instance_labels=(target[members] == digit).astype(np.int64)
        )
        sources.append(Source(f"bag{number:03d}", "memory", Path("digits"), arrays=bag))
        labels.append(positive)
    return BagDataset(
        sources,
        labels,
        [f"no {digit}", f"has a {digit}"],
        [source.id for source in sources],
        name="digits",
        layout="scikit-learn digits",
    )
