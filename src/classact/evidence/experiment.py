"""An experiment of a reproduction: cells over seeds, and a figure drawn from stored cells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Cells:
    """The finished cells of one experiment: ``values[seed][arm][metric]``, and the small arrays stored beside them."""

    values: dict[int, Values]
    arrays: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return list(next(iter(self.values.values())))

    def metric(self, arm: str, metric: str) -> np.ndarray:
        """One value per seed, in order."""
        return np.array([cell[arm][metric] for cell in self.values.values()])


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes
    ----------
    run : callable
        ``run(seed, scale) -> {arm: {metric: float}}``, or that and a dict of small arrays. What the arms share is made
        once inside, so that differences between arms are paired.
    seeds : dict
        Scale -> seeds. 100 and above are evidence; smaller ones are for tests and tuning.
    figure : callable, optional
        ``figure(cells) -> matplotlib Figure``.
    test_train_ratio : float, optional
        Set where the seeds are folds of one data set, which are not independent: size of a test part divided by that
        of its training part. Intervals are then Nadeau and Bengio's.
    """

    run: Callable[[int, str], Any]
    seeds: Mapping[str, Sequence[int]]
    figure: "Callable[[Cells], Figure] | None" = None
    test_train_ratio: float | None = None
