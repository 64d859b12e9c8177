"""The Fréchet rule beside scikit-learn's own prediction, and the passes over a tree beside the product of matrices."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from classact.discover.label_metrics import LabelMetric
from classact.discover.loki import FrechetClassifier

frozen = pytest.importorskip("sklearn.frozen")


def test_prediction_costs_little_more_than_argmax(ratio):
    rng = np.random.default_rng(0)
    k, d = 200, 128
    x, y = rng.standard_normal((2 * k, d)), np.tile(np.arange(k), 2)
    plain = LogisticRegression(max_iter=20).fit(x, y)
    ours = FrechetClassifier(frozen.FrozenEstimator(plain), LabelMetric.discrete(range(k))).fit(x, y)
    test = rng.standard_normal((5000, d))
    np.testing.assert_array_equal(ours.predict(test), plain.classes_[plain.predict_proba(test).argmax(1)])
    assert ratio("FrechetClassifier / argmax", lambda: ours.predict(test), lambda: plain.predict(test)) < 10
    ratio("FrechetClassifier / decision_function", lambda: ours.predict(test), lambda: plain.decision_function(test))


def test_tree_passes_beside_the_product(ratio):
    """100,000 labels, 1,000 observed, a batch of 1,000; the product has its distances ready, the passes need none."""
    rng = np.random.default_rng(0)
    n, k, b = 100_000, 1000, 1000
    tree = LabelMetric.from_tree(np.r_[-1, (np.arange(1, n) - 1) // 3])
    observed, probs = rng.choice(n, k, replace=False), rng.dirichlet(np.full(k, 0.05), b)
    squares = tree.distances(observed) ** 2  # 800 MB

    def product():
        best = np.zeros(b, dtype=int)
        lowest = np.full(b, np.inf)
        for start in range(0, n, 10_000):
            part = probs @ squares[:, start : start + 10_000]
            column = part.argmin(1)
            value = part[np.arange(b), column]
            best = np.where(value < lowest, column + start, best)
            lowest = np.minimum(value, lowest)
        return best

    def passes():
        return tree.frechet_mean(probs, observed)

    found, expected = passes(), product()
    differ = np.flatnonzero(found != expected)  # equally near labels
    for row in differ:
        values = probs[row] @ squares[:, [found[row], expected[row]]]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-9)
    assert ratio("two passes over the tree / blocked product", passes, product, rounds=3) < 0.5


def test_searches_from_all_labels_at_once(ratio):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import dijkstra

    rng = np.random.default_rng(0)
    n, k = 5000, 200
    edges = np.r_[np.c_[np.arange(1, n), (np.arange(1, n) - 1) // 3], rng.integers(0, n, (n // 2, 2))]
    edges = edges[edges[:, 0] != edges[:, 1]]
    adjacency = coo_matrix((np.ones(len(edges)), edges.T), (n, n)).tocsr()

    def ours():
        return LabelMetric.from_graph(edges.tolist(), labels=range(n)).distances(range(k))

    def theirs():
        return dijkstra(adjacency, directed=False, unweighted=True, indices=range(k))

    np.testing.assert_array_equal(ours(), theirs())
    assert ratio("breadth-first search with bits / scipy's dijkstra", ours, theirs, rounds=3) < 1
