from itertools import permutations

import numpy as np
import pytest

from classact.discover.metrics import cluster_accuracy, match_clusters


@pytest.mark.parametrize(("classes", "clusters"), [(3, 3), (4, 2), (2, 5), (5, 5)])
def test_accuracy_is_that_of_the_best_permutation(classes, clusters):
    rng = np.random.default_rng(classes * 10 + clusters)
    true, pred = rng.integers(classes, size=30), rng.integers(clusters, size=30)
    n = max(classes, clusters)
    best = max(np.mean(np.array(order)[pred] == true) for order in permutations(range(n)))
    assert cluster_accuracy(true, pred) == pytest.approx(best)


def test_names_do_not_matter():
    rng = np.random.default_rng(0)
    true = rng.integers(4, size=50)
    names = np.array(["w", "x", "y", "z"])
    assert cluster_accuracy(names[true], (true + 1) % 4) == 1
    assert match_clusters(names[true], true) == {0: "w", 1: "x", 2: "y", 3: "z"}


def test_clusters_left_over_count_as_wrong():
    assert cluster_accuracy([0, 0, 0, 0], [0, 0, 1, 2]) == 0.5
    assert set(match_clusters([0, 0, 0, 0], [0, 0, 1, 2])) == {0}


@pytest.mark.bare
@pytest.mark.parametrize("pair", [([], []), ([1, 2], [1])])
def test_bad_input(pair):
    with pytest.raises(ValueError, match="y_true, y_pred: expected equal numbers of items, at least one"):
        cluster_accuracy(*pair)
