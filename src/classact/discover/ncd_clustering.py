"""K-means and spectral clustering that use the known classes, for novel class discovery in tables.

Both are from Troisemaine et al.: A Practical Approach to Novel Class Discovery in Tabular Data, Data Mining and
Knowledge Discovery 2024, https://arxiv.org/abs/2311.05440; see [`pbn`][classact.discover.pbn] for its main method and
for how labels are given.

Where the authors' code differs. (1) Novel centroids are drawn with a probability proportional to the distance, though
the comment beside it and k-means++ say its square: ``power=1`` and ``power=2``. (2) The kernel width is solved for
``exp(-M / sigma^2) = min_dist`` and then used in ``exp(-d^2 / (2 sigma^2))``, so that the longest edge of the spanning
tree gets the affinity ``sqrt(min_dist)``: ``edge_affinity="code"`` and ``"exact"``.

>>> import numpy as np
>>> x = np.random.default_rng(0).normal(size=(120, 4)) + 8 * np.eye(4)[np.arange(120) % 4]
>>> y = np.where(np.arange(120) % 4 < 2, np.arange(120) % 4, -1)
>>> np.bincount(NCDKMeans(2, random_state=0).fit(x, y).novel_labels_).tolist()
[30, 30]
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import linkage
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from scipy.spatial.distance import pdist, squareform
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from classact.discover.metrics import cluster_accuracy
from classact.discover.pbn import check_n_clusters, estimate_n_clusters, rows_to_labels, split_labels

MAX_ROWS = 20_000


class NCDKMeans(ClusterMixin, BaseEstimator):
    """K-means of the novel rows that starts away from the known classes.

    Novel centroids are drawn one at a time from the novel rows, with a probability that grows with the distance to the
    nearest centroid, those of the known classes included, which are the means of their rows. Then Lloyd's iterations
    move the novel centroids over the novel rows; those of the known classes have no further part.

    Parameters
    ----------
    n_clusters : int, optional
        Number C_u of novel classes; None estimates it in the table itself.
    n_init : int
        Starts, of which the one with the smallest inertia is kept.
    power : {2, 1}
        Probabilities and inertia are those of distances to this power: 2 is k-means++, 1 the authors' code.
    update : {"novel", "known", "both"}
        Which centroids the iterations move. With "known" the novel ones stay where they were drawn, with "both" rows
        near a known centroid move that one. Clusters are always those of the novel centroids.
    max_iter, tol
        The iterations end after so many, or when the square of the summed shifts of the centroids is below `tol`. A
        centroid without rows stays.
    random_state : int, RandomState or None
        Of the draws.

    Attributes
    ----------
    cluster_centers_ : (C_u, D)
        Novel centroids.
    known_centers_ : (C_l, D)
        Centroids of the known classes, in the order of ``classes_``.
    classes_ : (C_l,)
        Known classes.
    n_clusters_ : int
        Number of clusters.
    novel_labels_ : (n_novel,)
        Cluster, from 0, of every row that had no label in ``fit``, in their order.
    labels_ : (n,)
        The same for all rows, -1 for known ones.
    inertia_ : float
        Sum over novel rows of the distance to the nearest centroid that was moved, to the power `power`.
    n_iter_ : int
        Iterations of the best start.
    """

    def __init__(
        self,
        n_clusters: int | None = 8,
        n_init: int = 10,
        power: Literal[1, 2] = 2,
        update: Literal["novel", "known", "both"] = "novel",
        max_iter: int = 1000,
        tol: float = 1e-10,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_init = n_init
        self.power = power
        self.update = update
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "NCDKMeans":
        """Cluster the rows (n, D) that have no label in y (n,); without known rows it is k-means.

        Raises
        ------
        ValueError
            If a setting is out of its range, or ``update="known"`` meets no known class.
        """
        x = validate_data(self, X, dtype=np.float64)
        self.classes_, codes, novel = split_labels(y, len(x))
        for name in ("n_init", "max_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.power not in (1, 2):
            raise ValueError(f"power: expected 1 or 2, got {self.power}")
        if self.update not in ("novel", "known", "both"):
            raise ValueError(f"update: expected 'novel', 'known' or 'both', got {self.update!r}")
        if self.update == "known" and not len(self.classes_):
            raise ValueError("update: with 'known' at least one known class is needed, and y has none")
        unlabelled = x[novel]
        check_n_clusters(self.n_clusters, len(unlabelled))
        rng = check_random_state(self.random_state)
        k = self.n_clusters
        if k is None:
            k = estimate_n_clusters(unlabelled, 2, min(30, len(unlabelled) - 1), random_state=rng)[0]
        self.n_clusters_, known = k, class_means(x, codes)
        # distances do not change with the origin, but are more exact near it
        origin = unlabelled.mean(0)
        best = None
        for _ in range(self.n_init):
            drawn = draw_centroids(unlabelled - origin, known - origin, k, self.power, rng)
            starts = {"novel": drawn, "known": known - origin, "both": np.concatenate([known - origin, drawn])}
            moved, n_iter = lloyd(unlabelled - origin, starts[self.update], self.max_iter, self.tol)
            inertia = float((_nearest_square(unlabelled - origin, moved) ** (self.power / 2)).sum())
            if best is None or inertia < best[0]:
                best = inertia, moved + origin, drawn + origin, n_iter
        assert best is not None
        self.inertia_, moved, drawn, self.n_iter_ = best
        self.known_centers_ = known if self.update == "novel" else moved[: len(known)]
        self.cluster_centers_ = drawn if self.update == "known" else moved[-k:]
        self.novel_labels_ = pairwise_distances_argmin(unlabelled, self.cluster_centers_)
        self.labels_ = rows_to_labels(novel, self.novel_labels_)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Cluster (n,) with the nearest novel centroid."""
        check_is_fitted(self, "cluster_centers_")
        return pairwise_distances_argmin(validate_data(self, X, reset=False, dtype=np.float64), self.cluster_centers_)

    def predict_known(self, X: Any) -> np.ndarray:
        """Known class (n,) with the nearest centroid."""
        check_is_fitted(self, "cluster_centers_")
        x = validate_data(self, X, reset=False, dtype=np.float64)
        if not len(self.classes_):
            raise ValueError("predict_known: there was no known class in fit")
        return self.classes_[pairwise_distances_argmin(x, self.known_centers_)]


def class_means(x: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, "c d"]:
    """Mean row of every known class."""
    return np.array([x[codes == c].mean(0) for c in range(codes.max() + 1)]).reshape(-1, x.shape[1])


def draw_centroids(
    x: Float[np.ndarray, "n d"], known: Float[np.ndarray, "c d"], k: int, power: float, rng: np.random.RandomState
) -> Float[np.ndarray, "k d"]:
    """Draw k rows, each with a probability proportional to its distance, to a power, to all centroids so far."""
    nearest = _nearest_square(x, known) if len(known) else None
    drawn: list[np.ndarray] = []
    for _ in range(k):
        weight = np.ones(len(x)) if nearest is None else nearest ** (power / 2)
        if not weight.any():  # every row is a centroid already
            weight = np.ones(len(x))
        cumulative = weight.cumsum()
        row = x[min(cumulative.searchsorted(rng.random_sample() * cumulative[-1], side="right"), len(x) - 1)]
        drawn.append(row)
        distance = ((x - row) ** 2).sum(1)
        nearest = distance if nearest is None else np.minimum(nearest, distance)
    return np.array(drawn)


def _nearest_square(x: Float[np.ndarray, "n d"], centers: Float[np.ndarray, "k d"]) -> Float[np.ndarray, " n"]:
    return np.min([((x - center) ** 2).sum(1) for center in centers], 0)


def lloyd(
    x: Float[np.ndarray, "n d"], centers: Float[np.ndarray, "k d"], max_iter: int = 1000, tol: float = 1e-10
) -> tuple[Float[np.ndarray, "k d"], int]:
    """Lloyd's iterations: every row goes to its nearest centroid, every centroid to the mean of its rows."""
    transposed, numbers, n_iter = np.ascontiguousarray(x.T), np.arange(len(centers))[:, None], 0
    for n_iter in range(1, max_iter + 1):  # noqa: B007
        score = centers @ transposed  # (k, n); |x|^2 is the same for all centroids
        score -= 0.5 * (centers**2).sum(1)[:, None]
        member = (score.argmax(0) == numbers).astype(x.dtype)
        size = member.sum(1)
        moved = np.where(size[:, None] > 0, member @ x / np.maximum(size, 1)[:, None], centers)
        shift = np.sqrt(((moved - centers) ** 2).sum(1)).sum()
        centers = moved
        if shift**2 < tol:
            break
    return centers, n_iter


class NCDSpectral(ClusterMixin, BaseEstimator):
    """Spectral clustering of known and novel rows together, with settings that can be tuned on the known ones.

    The affinity of two rows is ``exp(-d^2 / (2 sigma^2))``, with sigma so wide that the graph hangs together: the
    longest edge of the minimum spanning tree gets an affinity that is chosen. Rows are embedded by the eigenvectors 2
    to n_components + 1 of the Laplacian, and the novel ones clustered there.

    Parameters
    ----------
    n_clusters : int, optional
        Number C_u of novel classes; None estimates it in the embedding, for which `n_components` must be given.
    n_components : int, optional
        Width of the embedding, by default C_l + C_u (cut to the number of rows less one).
    min_dist : float
        Sets sigma, in (0, 1): near 1 the kernel is wide.
    edge_affinity : {"code", "exact"}
        Affinity of the longest edge: the square root of `min_dist`, as in the authors' code, or `min_dist` itself.
    assign : {"ncd_kmeans", "kmeans"}
        How novel rows are clustered in the embedding: by [`NCDKMeans`][classact.discover.NCDKMeans], which starts away
        from the known classes, or by k-means.
    normalized : bool
        Laplacian ``I - D^-1/2 A D^-1/2``, else ``D - A``.
    n_init : int
        Starts of k-means.
    random_state : int, RandomState or None
        Of k-means and of the eigen-solver.

    Attributes
    ----------
    embedding_ : (n, n_components)
        Of all rows of ``fit``.
    eigenvalues_ : (n_components + 1,)
        Smallest eigenvalues of the Laplacian, ascending.
    sigma_ : float
        Width of the kernel.
    classes_, n_clusters_, novel_labels_, labels_
        As in [`NCDKMeans`][classact.discover.NCDKMeans].

    Notes
    -----
    An embedding holds the rows of ``fit`` only. ``predict`` gives any row the cluster of the nearest row that was
    clustered; on those themselves it agrees with ``novel_labels_``. Memory grows with the square of the rows; more than
    20,000 are refused.
    """

    def __init__(
        self,
        n_clusters: int | None = 8,
        n_components: int | None = None,
        min_dist: float = 0.5,
        edge_affinity: Literal["code", "exact"] = "code",
        assign: Literal["ncd_kmeans", "kmeans"] = "ncd_kmeans",
        normalized: bool = True,
        n_init: int = 10,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.min_dist = min_dist
        self.edge_affinity = edge_affinity
        self.assign = assign
        self.normalized = normalized
        self.n_init = n_init
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "NCDSpectral":
        """Embed all rows (n, D) and cluster those that have no label in y (n,).

        Raises
        ------
        ValueError
            If a setting is out of its range or there are too many rows.
        """
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        if len(x) > MAX_ROWS:
            raise ValueError(f"X: expected at most {MAX_ROWS} rows, since memory grows with their square, got {len(x)}")
        self.classes_, codes, novel = split_labels(y, len(x))
        check_n_clusters(self.n_clusters, int(novel.sum()))
        if self.assign not in ("ncd_kmeans", "kmeans"):
            raise ValueError(f"assign: expected 'ncd_kmeans' or 'kmeans', got {self.assign!r}")
        components = self.n_components
        if components is None:
            if self.n_clusters is None:
                raise ValueError("n_components: expected a number when n_clusters is to be estimated, got None")
            components = min(len(self.classes_) + self.n_clusters, len(x) - 1)
        if not 1 <= components < len(x):
            raise ValueError(f"n_components: expected 1 to {len(x) - 1}, below the number of rows, got {components}")
        rng = check_random_state(self.random_state)

        distances = pdist(x)
        self.sigma_ = kernel_width(distances, self.min_dist, self.edge_affinity)
        affinity = squareform(np.exp(-(distances**2) / (2 * self.sigma_**2)))
        self.eigenvalues_, vectors = laplacian_eigenvectors(affinity, components + 1, self.normalized, rng)
        self.embedding_ = vectors[:, 1:]

        unlabelled, k = self.embedding_[novel], self.n_clusters
        if k is None:
            k = estimate_n_clusters(unlabelled, 2, min(30, len(unlabelled) - 1), random_state=rng)[0]
        self.n_clusters_, seed = k, rng.randint(2**31 - 1)
        if self.assign == "kmeans":
            kmeans = KMeans(k, n_init=self.n_init, random_state=seed)
            self.novel_labels_ = kmeans.fit(unlabelled).labels_.astype(int)
        else:
            ncd = NCDKMeans(k, self.n_init, random_state=seed)
            self.novel_labels_ = ncd.fit(self.embedding_, np.where(novel, -1, codes)).novel_labels_
        self.labels_ = rows_to_labels(novel, self.novel_labels_)
        self._clustered, self._codes, self._seed = x[novel], codes, seed
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Cluster (n,) of the nearest row that was clustered in ``fit``."""
        check_is_fitted(self, "embedding_")
        x = validate_data(self, X, reset=False, dtype=np.float64)
        return self.novel_labels_[pairwise_distances_argmin(x, self._clustered)]

    def known_accuracy(self) -> float:
        """Accuracy on the known rows when all rows are put into C_l + C_u clusters by k-means in the embedding.

        The paper chooses `min_dist` and `n_components` by it: no novel label is needed.
        """
        check_is_fitted(self, "embedding_")
        if not len(self.classes_):
            raise ValueError("known_accuracy: there was no known class in fit")
        k = len(self.classes_) + self.n_clusters_
        labels = KMeans(k, n_init=self.n_init, random_state=self._seed).fit(self.embedding_).labels_
        known = self._codes >= 0
        return cluster_accuracy(self._codes[known], labels[known])


def kernel_width(
    distances: Float[np.ndarray, " m"], min_dist: float = 0.5, edge_affinity: Literal["code", "exact"] = "code"
) -> float:
    """Width sigma of the Gaussian kernel that keeps the graph connected.

    Parameters
    ----------
    distances : (n (n - 1) / 2,)
        Of all pairs, as SciPy's ``pdist`` orders them.
    min_dist : float
        In (0, 1).
    edge_affinity : {"code", "exact"}
        Affinity of the longest edge of the minimum spanning tree: sqrt(min_dist) or min_dist.

    Examples
    --------
    >>> round(kernel_width(pdist([[0.0], [1.0], [3.0]])), 6)
    2.402245
    """
    if not 0 < min_dist < 1:
        raise ValueError(f"min_dist: expected a number in (0, 1), got {min_dist}")
    if edge_affinity not in ("code", "exact"):
        raise ValueError(f"edge_affinity: expected 'code' or 'exact', got {edge_affinity!r}")
    longest = linkage(distances, "single")[:, 2].max()  # single linkage merges along the minimum spanning tree
    if longest == 0:
        return 1.0  # all rows are equal
    return float(longest / np.sqrt(-np.log(min_dist) * (1 if edge_affinity == "code" else 2)))


def laplacian_eigenvectors(
    affinity: Float[np.ndarray, "n n"], n: int, normalized: bool, rng: np.random.RandomState
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "n m"]]:
    """Smallest n eigenvalues, ascending, and eigenvectors of the graph's Laplacian."""
    degree = affinity.sum(1)
    if normalized:
        root = np.sqrt(np.where(degree == 0, 1.0, degree))
        matrix = affinity / root / root[:, None]  # I - L
    else:
        matrix = affinity - np.diag(degree)  # -L
    if n < len(matrix) // 2:
        values, vectors = eigsh(matrix, n, which="LA", v0=rng.uniform(-1, 1, len(matrix)))
    else:
        values, vectors = eigh(matrix, subset_by_index=(len(matrix) - n, len(matrix) - 1))
    return (1.0 if normalized else 0.0) - values[::-1], vectors[:, ::-1]
