"""Bags from Fashion-MNIST in which an easy kind of evidence hides a hard one."""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from classact.data.bag_files import RawBag, Source
from classact.data.bags import BagDataset
from classact.data.images import fashion_mnist

BACKGROUND, EASY, HARD = (2, 7, 9, 8), 1, 5  # pullover, sneaker, ankle boot, bag; trouser; sandal
FEATURES = 64


@lru_cache(maxsize=1)
def _features() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Whitened principal components of the pixels, fitted on the first 20,000 training images."""
    from sklearn.decomposition import PCA

    images, labels = fashion_mnist("train")
    test_images, test_labels = fashion_mnist("test")
    pca = PCA(FEATURES, whiten=True, svd_solver="covariance_eigh")
    flat = [(part.reshape(len(part), -1) / 255).astype(np.float32) for part in (images, test_images)]
    pca.fit(flat[0][:20_000])
    return {
        "train": (pca.transform(flat[0]).astype(np.float32), labels),
        "test": (pca.transform(flat[1]).astype(np.float32), test_labels),
    }


def shortcut_bags(
    n_bags: int,
    seed: int,
    part: Literal["train", "test"] = "train",
    witnesses: Literal["both", "easy", "hard"] = "both",
    size: int = 40,
) -> BagDataset:
    """Bags of `size` images; a positive one holds witnesses of two classes, one much easier to tell than the other.

    Ground truth, in ``instance_labels``: 0 background (pullover, sneaker, ankle boot, bag), 1 easy witness (trouser),
    2 hard witness (sandal, which looks like the sneakers and boots around it). Half of the bags are positive; with
    ``witnesses="both"`` they hold 2 or 3 easy and 2 or 3 hard ones in place of background, with ``"easy"`` or
    ``"hard"`` only those of one kind. A model that attends to trousers only is perfect on the training bags and blind
    to bags that hold sandals alone. Images are drawn with replacement between bags, within the `part` of the data set.

    Parameters
    ----------
    n_bags : int
        Number of bags; every second one is positive.
    seed : int
        Seed of the composition.
    part : {"train", "test"}
        Which images to draw from.
    witnesses : {"both", "easy", "hard"}
        What positive bags hold.
    size : int
        Instances per bag, features (size, 64).
    """
    features, labels = _features()[part]
    rng = np.random.default_rng([seed, 0 if part == "train" else 1, ("both", "easy", "hard").index(witnesses)])
    pools = [
        np.flatnonzero(np.isin(labels, BACKGROUND)),
        np.flatnonzero(labels == EASY),
        np.flatnonzero(labels == HARD),
    ]
    sources, bag_labels = [], []
    for number in range(n_bags):
        positive = number % 2
        easy = int(rng.integers(2, 4)) if positive and witnesses != "hard" else 0
        hard = int(rng.integers(2, 4)) if positive and witnesses != "easy" else 0
        kind = np.repeat([0, 1, 2], [size - easy - hard, easy, hard])
        members = np.concatenate([rng.choice(pool, (kind == k).sum(), replace=False) for k, pool in enumerate(pools)])
        order = rng.permutation(size)
        raw = RawBag(features[members[order]], instance_labels=kind[order])
        sources.append(Source(f"{part}-{witnesses}-{number:04d}", "memory", Path("shortcut"), arrays=raw))
        bag_labels.append(positive)
    ids = [source.id for source in sources]
    return BagDataset(sources, bag_labels, ["negative", "positive"], ids, name="shortcut", layout="generated")
