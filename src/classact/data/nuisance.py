"""Tables in which the largest differences between rows have nothing to do with their classes."""

from typing import NamedTuple

import numpy as np


class NuisanceTable(NamedTuple):
    """A table and its truth."""

    x: np.ndarray
    y: np.ndarray
    known: np.ndarray
    novel: np.ndarray
    source: np.ndarray


def nuisance_mixture(
    n: int,
    seed: int,
    n_known: int = 6,
    n_novel: int = 6,
    informative: int = 14,
    nuisance: int = 6,
    sources: int = 4,
    separation: float = 1.0,
    spread: float = 4.0,
) -> NuisanceTable:
    """Gaussian classes, measured by several sources, each of which shifts some columns.

    Ground truth: rows of class c are drawn from N(m_c, I) in the first `informative` columns, the means m_c themselves
    from N(0, separation^2 I), known and novel classes alike. The last `nuisance` columns are N(t_s, I), where s is the
    source of the row, drawn independently of its class, and the shifts t_s are from N(0, spread^2 I). The source
    explains most of the variance of those columns, which after standardisation weigh as much as the others: a method
    that cannot tell which columns matter finds the sources. Known labels tell. Classes are equally frequent.

    Parameters
    ----------
    n : int
        Rows.
    seed : int
        Of everything.
    n_known, n_novel : int
        Classes 0 to n_known - 1 are called known, the next n_novel novel.
    informative, nuisance : int
        Columns.
    sources : int
        Number of sources.
    separation, spread : float
        Standard deviation of the class means and of the shifts; rows scatter with 1.

    Returns
    -------
    NuisanceTable
        ``x`` (n, informative + nuisance), ``y`` (n,) classes of all rows, the numbers of the ``known`` and the
        ``novel`` classes, and the ``source`` (n,) of each row.

    Examples
    --------
    >>> table = nuisance_mixture(240, seed=0)
    >>> table.x.shape, np.bincount(table.y).tolist()
    ((240, 20), [20, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20])
    """
    rng = np.random.default_rng([seed, 71])
    classes = n_known + n_novel
    means = separation * rng.normal(size=(classes, informative))
    shifts = spread * rng.normal(size=(sources, nuisance))
    y = rng.permutation(np.arange(n) % classes)
    source = rng.integers(sources, size=n)
    x = np.concatenate([means[y], shifts[source]], 1) + rng.normal(size=(n, informative + nuisance))
    return NuisanceTable(x, y, np.arange(n_known), np.arange(n_known, classes), source)
