"""How well clusters agree with classes whose names they cannot know."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment


def match_clusters(y_true: Any, y_pred: Any) -> dict[Any, Any]:
    """Match clusters and classes one to one so that as many items as possible agree (Hungarian algorithm).

    Parameters
    ----------
    y_true : (n,) array-like
        Classes, of any type.
    y_pred : (n,) array-like
        Clusters, of any type.

    Returns
    -------
    dict
        Cluster -> class. Where there are more clusters than classes, those left over are missing.

    Raises
    ------
    ValueError
        If the two differ in length, or are empty.

    Examples
    --------
    >>> match_clusters(["a", "a", "b", "b"], [1, 1, 1, 0])
    {1: 'a', 0: 'b'}
    """
    true, pred = np.asarray(y_true).ravel(), np.asarray(y_pred).ravel()
    if len(true) != len(pred) or not len(true):
        raise ValueError(f"y_true, y_pred: expected equal numbers of items, at least one, got {len(true)}, {len(pred)}")
    classes, rows = np.unique(true, return_inverse=True)
    clusters, columns = np.unique(pred, return_inverse=True)
    table = np.zeros((len(classes), len(clusters)), int)
    np.add.at(table, (rows, columns), 1)
    matched = zip(*linear_sum_assignment(table, maximize=True), strict=True)
    class_names, cluster_names = classes.tolist(), clusters.tolist()
    return {cluster_names[column]: class_names[row] for row, column in matched}


def cluster_accuracy(y_true: Any, y_pred: Any) -> float:
    """Share of items whose cluster is matched with their class, under the best one-to-one matching.

    Examples
    --------
    >>> cluster_accuracy([0, 0, 1, 1], [7, 7, 7, 3])
    0.75
    """
    matching = match_clusters(y_true, y_pred)
    pairs = zip(np.asarray(y_true).ravel().tolist(), np.asarray(y_pred).ravel().tolist(), strict=True)
    return float(np.mean([cluster in matching and matching[cluster] == cls for cls, cluster in pairs]))
