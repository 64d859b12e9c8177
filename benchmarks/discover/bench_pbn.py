"""NCD k-means beside scikit-learn's, its spectral clustering, silhouettes and perceptron, and PBN on 20,000 rows."""

import time

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import silhouette_score
from sklearn.neural_network import MLPClassifier

from classact.data.nuisance import nuisance_mixture
from classact.discover.metrics import cluster_accuracy
from classact.discover.ncd_clustering import NCDSpectral, kernel_width, lloyd
from classact.discover.pbn import PBN, silhouettes


@pytest.mark.parametrize(("n", "d", "k"), [(20_000, 64, 10), (2000, 20, 6)])
def test_lloyd_iterations(ratio, n, d, k):
    x = np.random.default_rng(0).normal(size=(n, d))

    def theirs(steps=30):
        return KMeans(k, init=x[:k], n_init=1, max_iter=steps, tol=0, algorithm="lloyd").fit(x)

    steps = theirs().n_iter_
    found, n_iter = lloyd(x, x[:k], steps, tol=0)
    np.testing.assert_allclose(found, theirs().cluster_centers_, atol=1e-9)
    assert n_iter == steps
    name = f"k-means of {n} x {d}, {k} clusters, {steps} iterations / scikit-learn"
    assert ratio(name, lambda: lloyd(x, x[:k], steps, tol=0), theirs) < 1


def test_spectral_clustering(ratio):
    table = nuisance_mixture(1500, 0, nuisance=0, separation=2.0)
    distances = pdist(table.x)
    affinity = squareform(np.exp(-(distances**2) / (2 * kernel_width(distances, 0.1) ** 2)))

    def ours():
        return NCDSpectral(12, 12, 0.1, assign="kmeans", random_state=0).fit(table.x).labels_

    def theirs():
        return SpectralClustering(12, n_components=12, affinity="precomputed", random_state=0).fit(affinity).labels_

    assert min(cluster_accuracy(table.y, ours()), cluster_accuracy(table.y, theirs())) > 0.95
    assert ratio("spectral clustering of 1,500 rows, distances included / scikit-learn without", ours, theirs) < 1


def test_silhouettes_of_many_partitions(ratio):
    rng = np.random.default_rng(0)
    x, partitions = rng.normal(size=(2000, 32)), np.stack([rng.integers(k, size=2000) for k in range(2, 22)])

    def theirs():
        return [silhouette_score(x, labels) for labels in partitions]

    np.testing.assert_allclose(silhouettes(x, partitions), theirs(), atol=1e-12)
    assert ratio("silhouettes of 20 partitions / scikit-learn", lambda: silhouettes(x, partitions), theirs) < 0.5


def test_epochs_of_pbn(ratio):
    """Beside a classifier with hidden layers of the same widths, which has no decoder; so many rows, all labelled."""
    table = nuisance_mixture(4000, 0, informative=44, nuisance=20)
    settings = {"batch_size": 512, "random_state": 0}
    pbn = PBN(32, epochs=10, n_clusters=2, k_range=(2, 3), **settings)
    perceptron = MLPClassifier((48, 32, 32), max_iter=10, n_iter_no_change=11, **settings)
    masked = np.where(table.y < 6, table.y, -1)

    def theirs():
        return perceptron.fit(table.x, table.y)

    assert ratio("10 epochs of PBN and its clusters / a perceptron", lambda: pbn.fit(table.x, masked), theirs, 3) < 3


def test_twenty_thousand_rows_take_less_than_a_minute(capsys):
    table = nuisance_mixture(20_000, 0, informative=44, nuisance=20)
    started = time.perf_counter()
    model = PBN(64, n_clusters=6, random_state=0).fit(table.x, np.where(table.y < 6, table.y, -1))
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f"\n  PBN, 20,000 x 64, 200 epochs, {torch.get_num_threads()} threads: {seconds:.1f} s")
    assert np.isfinite(model.loss_curve_).all()
    assert seconds < 60
