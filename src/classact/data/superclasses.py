"""Tables with known and novel classes that are relatives of each other."""

from typing import NamedTuple

import numpy as np


class SuperClasses(NamedTuple):
    """Rows (n, dim + nuisance) float32 and classes (n,); known classes are 0 to K - 1, novel ones K to K + U - 1.

    Attributes
    ----------
    known, known_labels : array
        For training.
    novel, novel_labels : array
        For training, where the labels are not to be used.
    test, test_labels : array
        Of all classes, as many of each.
    superclass : (K + U,) int
        Ground truth: the super-class of every class.
    """

    known: np.ndarray
    known_labels: np.ndarray
    novel: np.ndarray
    novel_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    superclass: np.ndarray


def superclasses(
    seed: int,
    n_superclasses: int = 5,
    per_superclass: tuple[int, int] = (2, 2),
    n_samples: tuple[int, int, int] = (60, 12, 100),
    dim: int = 32,
    spread: float = 0.9,
    noise: float = 2.0,
    nuisance: int = 0,
) -> SuperClasses:
    """Draw classes in super-classes, each with known and novel members.

    Ground truth: every super-class has a centre, normal with deviation 2 in each of `dim` directions; a class lies
    around the centre of its super-class with deviation `spread`, its samples around that with deviation `noise`. A
    novel sample thus resembles the known classes of its own super-class more than others, while classes of a
    super-class overlap. Nuisance directions, of deviation 4, are the same for all classes: whoever knows which they are
    does better without them. All rows are rotated at random and squashed by ``tanh(x / 2)``.

    Parameters
    ----------
    seed : int
        Of classes and samples.
    n_superclasses : int
        Number of super-classes.
    per_superclass : (int, int)
        Known and novel classes in each.
    n_samples : (int, int, int)
        Training samples of every known class, of every novel class, and test samples of every class.
    dim, spread, noise
        As above.
    nuisance : int
        Number of nuisance directions.

    Raises
    ------
    ValueError
        If a number is below 1.

    Examples
    --------
    >>> data = superclasses(0)
    >>> data.known.shape, data.novel.shape, data.test.shape
    ((600, 32), (120, 32), (2000, 32))
    >>> data.superclass.tolist()
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """
    if min(n_superclasses, *per_superclass, *n_samples, dim) < 1:
        found = (n_superclasses, per_superclass, n_samples, dim)
        raise ValueError(f"n_superclasses, per_superclass, n_samples, dim: expected numbers of at least 1, got {found}")
    rng = np.random.default_rng(seed)
    n_known = n_superclasses * per_superclass[0]
    superclass = np.concatenate([np.repeat(np.arange(n_superclasses), n) for n in per_superclass])
    centres = 2 * rng.standard_normal((n_superclasses, dim))
    means = centres[superclass] + spread * rng.standard_normal((len(superclass), dim))
    rotation = np.linalg.qr(rng.standard_normal((dim + nuisance, dim + nuisance)))[0]

    def draw(classes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(classes, n)
        rows = means[labels] + noise * rng.standard_normal((len(labels), dim))
        rows = np.hstack([rows, 4 * rng.standard_normal((len(labels), nuisance))])
        return np.tanh(rows @ rotation / 2).astype(np.float32), labels

    everything = np.arange(len(superclass))
    known, novel, test = (
        draw(classes, n)
        for classes, n in zip((everything[:n_known], everything[n_known:], everything), n_samples, strict=True)
    )
    return SuperClasses(*known, *novel, *test, superclass)
