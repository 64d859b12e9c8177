"""Main element binarisation (section 3.2): the threshold of an anomaly map where its number of regions is stable."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Real
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted


class Binarized(NamedTuple):
    """Masks of N maps, the number of regions that was stable for each (0: none), and its threshold."""

    masks: list[Bool[np.ndarray, "_ _"]]
    n_regions: Int[np.ndarray, " n"]
    thresholds: Real[np.ndarray, " n"]


def region_counts(grey: Real[np.ndarray, "h w"], thresholds: Real[np.ndarray, " t"]) -> Int[np.ndarray, " t"]:
    """Number of 8-connected regions of ``grey > t`` for every threshold t, without labelling the map for each.

    The regions of all thresholds form a tree (the component tree). Going down, a region is born at a local maximum,
    and two become one where the best path between them enters: at an edge of the minimum spanning tree of the pixels,
    an edge being as late as the later of its two pixels. So the number at a threshold is that of the pixels in it less
    that of the tree's edges in it. Pixels are first drawn together with their highest neighbour (a step of Boruvka's
    algorithm), which leaves few nodes.

    Parameters
    ----------
    grey : (H, W)
        Map.
    thresholds : (T,)
        Falling.

    Returns
    -------
    (T,) int
        Counts.

    Examples
    --------
    >>> import numpy as np
    >>> region_counts(np.array([[9, 2, 0, 0], [9, 2, 5, 5], [0, 0, 0, 0], [0, 0, 0, 7]]), np.array([8, 6, 4, 1]))
    array([1, 2, 3, 2])
    """
    n, size = len(thresholds), grey.size
    level = np.full(grey.shape, n)  # index of the first threshold below the pixel, n if there is none
    on = grey > thresholds[-1]
    level[on] = np.searchsorted(-thresholds.astype(float), -grey[on].astype(float), side="right")
    order = np.full((grey.shape[0] + 2, grey.shape[1] + 2), (n + 1) * size)
    order[1:-1, 1:-1] = level * size + np.arange(size).reshape(grey.shape)  # no two pixels alike: no cycles
    rows = np.minimum(np.minimum(order[:-2], order[1:-1]), order[2:])
    highest = np.minimum(np.minimum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]) % size
    parent = np.where(on, highest, np.arange(size).reshape(grey.shape)).ravel()
    while not np.array_equal(parent[parent], parent):
        parent = parent[parent]
    root = parent.reshape(grey.shape)

    pairs = []
    for here, there in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        both = (root[here] != root[there]) & on[here] & on[there]
        pairs.append((root[here][both], root[there][both], np.maximum(level[here][both], level[there][both])))
    one, other, weight = (np.concatenate(part) for part in zip(*pairs, strict=True))
    code = np.minimum(one, other) * size + np.maximum(one, other)
    first = np.lexsort((weight, code))
    first = first[np.diff(code[first], prepend=-1) != 0]  # the earliest edge of each pair

    flat = level.ravel()
    roots = np.flatnonzero((parent == np.arange(size)) & (flat < n))
    ends = np.searchsorted(roots, [one[first], other[first]])
    graph = coo_array((weight[first] + 1.0, (ends[0], ends[1])), shape=(len(roots), len(roots)))
    merged = minimum_spanning_tree(graph.tocsr()).data.astype(int) - 1
    return np.cumsum(np.bincount(flat[roots], minlength=n) - np.bincount(merged, minlength=n))


def stable_interval(counts: Sequence[int] | Int[np.ndarray, " t"], min_interval: int) -> tuple[int, int | None]:
    """Longest run of equal counts, zeros aside, of at least `min_interval` entries: its count and last index.

    Of runs of equal length that of the count found first wins, and of those of one count the last. Without any: 0 and
    None.

    Examples
    --------
    >>> stable_interval([0, 0, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 1, 3], 4)
    (1, 14)
    """
    values = np.asarray(counts)
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    lengths = np.diff(ends, prepend=-1)
    longest: dict[int, tuple[int, int]] = {}
    for count, length, end in zip(values[ends].tolist(), lengths.tolist(), ends.tolist(), strict=True):
        if count and length >= min_interval and length >= longest.get(count, (0, 0))[0]:
            longest[count] = (length, end)
    if not longest:
        return 0, None
    count = max(longest, key=lambda one: longest[one][0])
    return count, longest[count][1]


class MEBin(TransformerMixin, BaseEstimator):
    """Main element binarisation of the anomaly maps of one product.

    ``fit`` finds the range of thresholds: ``max_`` is the highest score of all maps, ``min_`` the lowest of the maps'
    highest scores, that is, the peak of the most normal image. All maps must therefore be on one scale; maps that were
    stretched one by one to 0..255 leave no range. Then, for each map, thresholds are tried from the top of the range
    down, the mask at each is eroded, and its regions are counted. The last threshold of the longest run of equal counts
    gives the mask; a map without a stable count is normal, its mask empty.

    Differences from the authors' code: maps may be floating-point numbers, which are then not rounded to 8 bits
    (for 8-bit maps masks and thresholds are the same; with NumPy 2 their formula of the threshold overflows, here it
    does not); maps that were not in the fit may be binarised. The numbers of regions and the thresholds are therefore
    no attributes of the fit (there is no ``n_regions_``): ``binarize`` returns them with the masks.

    Parameters
    ----------
    step : int
        Distance r of the thresholds tried, on a range scaled to 0..255.
    min_interval : int
        Entries m that a run of equal counts needs.
    erode : int
        Side of the square by which masks are eroded, its middle at ``erode // 2``; pixels beyond the border do not
        erode. 0 or 1: no erosion.

    Attributes
    ----------
    min_, max_ : float
        The range.

    Examples
    --------
    >>> import numpy as np
    >>> y, x = np.mgrid[:64, :64]
    >>> bump = np.exp(-((x - 20) ** 2 + (y - 30) ** 2) / 100)
    >>> mebin = MEBin().fit(np.stack([bump, 0.1 * bump]))
    >>> mebin.binarize([bump, 0.1 * bump]).n_regions
    array([1, 0])
    """

    def __init__(self, step: int = 4, min_interval: int = 4, erode: int = 6) -> None:
        self.step, self.min_interval, self.erode = step, min_interval, erode

    def fit(self, maps: Any, y: Any = None) -> "MEBin":  # noqa: ARG002
        """Find the range of thresholds.

        Parameters
        ----------
        maps : (N, H, W) array or tensor, or a sequence of (H, W)
            Anomaly maps of one product, jointly scaled, integers or floating point.
        y : None
            Ignored.

        Raises
        ------
        ValueError
            If there is no map, one is not (H, W) or empty, or has NaN or infinite values, or a parameter is out of
            range.
        """
        for name, low in (("step", 1), ("min_interval", 1), ("erode", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        peaks = [float(one.max()) for one in _checked(maps)]
        self.min_, self.max_ = min(peaks), max(peaks)
        if self.max_ - self.min_ <= 1e-6 * abs(self.max_):
            warnings.warn(
                f"maps: the highest scores of all {len(peaks)} are {self.max_:g}, so that every mask will be empty; was"
                " each map scaled by itself? They must be scaled jointly",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    @property
    def scores(self) -> Int[np.ndarray, " t"]:
        """The thresholds tried, on the range scaled to 0..255."""
        return np.arange(255, 0, -self.step)

    def scale(self, maps: Any) -> list[Real[np.ndarray, "_ _"]]:
        """Maps on the scale of the thresholds: 0 to 255 from ``min_`` to ``max_``, 0 below."""
        check_is_fitted(self)
        return [self._scale(one) for one in _checked(maps)]

    def _scale(self, one: np.ndarray) -> np.ndarray:
        width = self.max_ - self.min_
        if width <= 1e-6 * abs(self.max_):
            return np.zeros(one.shape)
        return np.where(one < self.min_, 0.0, (one.astype(float) - self.min_) / width * 255)

    def binarize(self, maps: Any) -> Binarized:
        """Masks, stable numbers of regions, and thresholds on the scale of the maps.

        Without a stable number the threshold is 255 for integer maps, as in the authors' code, and infinite for others.
        """
        check_is_fitted(self)
        masks, numbers, thresholds = [], [], []
        for one in _checked(maps):
            # grey erosion first: it commutes with thresholding, so that once is enough for all thresholds
            eroded = self._erode(one)
            number, index = stable_interval(region_counts(self._scale(eroded), self.scores), self.min_interval)
            integer = one.dtype.kind in "ui"
            if index is None:
                threshold, mask = 255.0 if integer else np.inf, np.zeros(one.shape, bool)
            else:
                threshold = float(self.scores[index]) * (self.max_ - self.min_) / 255 + self.min_
                threshold = float(int(threshold)) if integer else threshold
                mask = eroded > threshold
            masks.append(mask)
            numbers.append(number)
            thresholds.append(threshold)
        return Binarized(masks, np.array(numbers), np.array(thresholds))

    def transform(self, maps: Any) -> Any:
        """Masks: a bool array (N, H, W) for an array or tensor, a list of (H, W) for other sequences."""
        masks = self.binarize(maps).masks
        return np.stack(masks) if hasattr(maps, "shape") else masks

    def _erode(self, one: np.ndarray) -> np.ndarray:
        if self.erode < 2:
            return one
        # SciPy's middle of an even window is at size // 2 as well; repeating the border is ignoring what is beyond it
        rows = ndimage.minimum_filter1d(one, self.erode, axis=0, mode="nearest")
        return ndimage.minimum_filter1d(rows, self.erode, axis=1, mode="nearest")


def _checked(maps: Any) -> list[np.ndarray]:
    found = [np.asarray(one) for one in maps]
    if not found:
        raise ValueError("maps: expected at least one")
    for i, one in enumerate(found):
        if one.ndim != 2 or not one.size or one.dtype.kind not in "uif":
            raise ValueError(f"maps: expected numbers of shape (H, W) each, got {one.dtype} {one.shape} for map {i}")
        if one.dtype.kind == "f" and not np.isfinite(one).all():
            raise ValueError(f"maps: expected finite values, got {int((~np.isfinite(one)).sum())} others in map {i}")
    return found
