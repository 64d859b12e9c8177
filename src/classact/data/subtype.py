"""Bags from Fashion-MNIST whose class is that of a few images in them, for experiments on imbalanced classes."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from classact.data.bag_files import RawBag, Source
from classact.data.bags import BagDataset
from classact.data.images import fashion_mnist

BACKGROUND, SUBTYPES = (1, 7, 8, 9), (0, 6, 3)  # trouser, sneaker, bag, ankle boot; T-shirt, shirt, dress
FEATURES, NOISE, CONTRAST = 64, 0.15, 0.8


@lru_cache(maxsize=1)
def _features() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Whitened principal components of the pixels, fitted on the first 20,000 training images."""
    from sklearn.decomposition import PCA

    images, labels = fashion_mnist("train")
    test_images, test_labels = fashion_mnist("test")
    train, test = ((part.reshape(len(part), -1) / 255).astype(np.float32) for part in (images, test_images))
    pca = PCA(FEATURES, whiten=True, svd_solver="covariance_eigh").fit(train[:20_000])
    mean = test.mean(1, keepdims=True)
    noise = np.random.default_rng(0).normal(scale=NOISE, size=test.shape).astype(np.float32)
    parts = {"train": (train, labels), "test": (test, test_labels)}
    parts["shifted"] = (mean + CONTRAST * (test - mean) + noise, test_labels)
    return {name: (pca.transform(pixels).astype(np.float32), of_class) for name, (pixels, of_class) in parts.items()}


def subtype_bags(
    counts: Sequence[int], seed: int, part: Literal["train", "test", "shifted"] = "train", size: int = 36
) -> BagDataset:
    """Bags of `size` images, 4 to 7 of which decide the class: T-shirts, shirts or dresses.

    Ground truth, in ``instance_labels``: 1 where an image is such a witness, else 0 (trouser, sneaker, bag, ankle
    boot). A bag holds witnesses of its class only. T-shirts and shirts are hard to tell apart. Images are drawn with
    replacement between bags, within the `part` of the data set.

    Parameters
    ----------
    counts : sequence of 3 int
        Bags of each class: T-shirt, shirt, dress.
    seed : int
        Seed of the composition.
    part : {"train", "test", "shifted"}
        Which images to draw from. ``"shifted"`` gives the bags of ``"test"`` as another camera sees them: every image
        loses 20 % of its contrast to its own mean and gains Gaussian noise of standard deviation 0.15 (pixels in
        [0, 1]), before the features are computed.
    size : int
        Instances per bag, features (size, 64).
    """
    if len(counts) != len(SUBTYPES):
        raise ValueError(f"counts: expected {len(SUBTYPES)} numbers of bags, got {list(counts)}")
    features, labels = _features()[part]
    rng = np.random.default_rng([seed, 0 if part == "train" else 1])
    background = np.flatnonzero(np.isin(labels, BACKGROUND))
    pools = [np.flatnonzero(labels == subtype) for subtype in SUBTYPES]
    bag_labels = np.repeat(np.arange(len(SUBTYPES)), counts)
    sources = []
    for number, label in enumerate(bag_labels):
        witnesses = int(rng.integers(4, 8))
        kind = np.repeat([0, 1], [size - witnesses, witnesses])
        members = [
            rng.choice(pool, n, replace=False)
            for pool, n in ((background, size - witnesses), (pools[label], witnesses))
        ]
        order = rng.permutation(size)
        raw = RawBag(features[np.concatenate(members)[order]], instance_labels=kind[order])
        sources.append(Source(f"{part}-{number:04d}", "memory", Path("subtype"), arrays=raw))
    ids = [source.id for source in sources]
    names = ["t-shirt", "shirt", "dress"]
    return BagDataset(sources, bag_labels.tolist(), names, ids, name="subtype", layout="generated")
