"""What the comparison and the command `discover` put around the methods: standardisation, names, files.

The baselines that know no class are here too.
"""

from collections.abc import Mapping
from math import comb
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import pairwise_distances_argmin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from classact.discover.ncd_clustering import class_means
from classact.discover.pbn import HiddenClassCV, estimate_n_clusters

K_MAX = 30  # most novel classes that an estimate considers


class PlainClustering(ClusterMixin, BaseEstimator):
    """Cluster the unlabelled rows alone, as if no class were known; the baseline.

    New rows go to the nearest centroid (k-means) or to the cluster of the nearest row (spectral clustering); known
    classes are told by their nearest mean.

    Parameters
    ----------
    kind : {"kmeans", "spectral"}
        scikit-learn's ``KMeans``, or ``SpectralClustering`` on 10 nearest neighbours.
    n_clusters : int, optional
        By default estimated by the silhouette of k-means.
    random_state : int
        Of everything.
    """

    def __init__(self, kind: str = "kmeans", n_clusters: int | None = None, random_state: int = 0) -> None:
        self.kind = kind
        self.n_clusters = n_clusters
        self.random_state = random_state

    def fit(self, X: np.ndarray, y: np.ndarray) -> "PlainClustering":
        """Cluster the rows whose label is -1."""
        novel = y < 0
        rows = X[novel]
        self.n_clusters_ = self.n_clusters or estimated(rows, self.random_state)
        if self.kind == "kmeans":
            labels = KMeans(self.n_clusters_, n_init=10, random_state=self.random_state).fit(rows).labels_
        else:
            near = min(10, len(rows) - 1)
            labels = SpectralClustering(
                self.n_clusters_, affinity="nearest_neighbors", n_neighbors=near, random_state=self.random_state
            ).fit_predict(rows)
        self.labels_ = np.full(len(y), -1)
        self.labels_[novel] = labels
        means = self.kind == "kmeans"
        self._points = np.stack([rows[labels == k].mean(0) for k in range(self.n_clusters_)]) if means else rows
        self._of_point = np.arange(self.n_clusters_) if means else labels
        self.classes_ = np.unique(y[~novel])
        self._known = class_means(X[~novel], np.searchsorted(self.classes_, y[~novel]))
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Cluster of each row."""
        return self._of_point[pairwise_distances_argmin(X, self._points)]

    def predict_known(self, X: np.ndarray) -> np.ndarray:
        """Known class with the nearest mean."""
        return self.classes_[pairwise_distances_argmin(X, self._known)]


def estimated(rows: np.ndarray, seed: int) -> int:
    """Number of clusters of rows (n, D), up to 30, by the silhouette of k-means."""
    return estimate_n_clusters(rows, 2, min(K_MAX, len(rows) - 1), random_state=seed)[0]


class Discoverer:
    """An estimator behind the scaling of what it was fitted on, called as the comparison needs it.

    Parameters
    ----------
    estimator : estimator
        With ``fit(x, y)``, ``labels_``, ``n_clusters_`` and ``predict``.
    space : dict
        What `tune` draws its settings from.
    tune : int
        Number of settings to try on known classes that are hidden; 0, or fewer than two known classes, takes the
        estimator as it is.
    standardise : bool
        Standardise every column; images stay as they are.
    """

    def __init__(self, estimator: Any, space: Mapping[str, Any], tune: int = 0, standardise: bool = True) -> None:
        scale = StandardScaler() if standardise else FunctionTransformer()
        self.pipeline = Pipeline([("scale", scale), ("discover", estimator)])
        self.space, self.tune = space, tune

    @property
    def fitted(self) -> Any:
        """The fitted estimator, without a search around it."""
        last = self.pipeline[-1]
        return getattr(last, "best_estimator_", last)

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Discoverer":
        """Fit to rows (n, ...) and labels (n,) with -1."""
        classes = len(np.unique(y[y >= 0]))
        if self.tune and self.space and classes > 1:
            hidden = max(1, classes // 2)
            folds = min(3, comb(classes, hidden))
            seed = self.pipeline[-1].random_state
            options: dict[str, Any] = {"n_hidden": hidden, "n_folds": folds, "n_iter": self.tune, "random_state": seed}
            self.pipeline.set_params(discover=HiddenClassCV(self.pipeline[-1], self.space, **options))
        self.pipeline.fit(_rows(x), y)
        self.labels_ = np.asarray(self.fitted.labels_)
        self.n_clusters_ = int(self.fitted.n_clusters_)
        if hasattr(self.fitted, "transform"):
            self.transform = self._transform
        if hasattr(self.fitted, "predict_known"):
            self.predict_known = self._predict_known
        return self

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Items as rows, scaled."""
        scaled: np.ndarray = self.pipeline[:-1].transform(_rows(x))
        return scaled

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Cluster of each item."""
        return np.asarray(self.fitted.predict(self.scaled(x)))

    def _predict_known(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.fitted.predict_known(self.scaled(x)))

    def _transform(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.fitted.transform(self.scaled(x)))


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float64)


class FoundClasses:
    """Classes that were found, by name, and the fitted method that tells them.

    Parameters
    ----------
    model : Discoverer
        Fitted.
    x, y : (n, ...), (n,) arrays
        What it was fitted on; classes from 0, -1 for unlabelled items.
    classes : tuple of str
        Names of the known classes.
    columns : tuple of str
        Of a table; items to predict may then be a DataFrame with these columns in any order.
    """

    def __init__(
        self, model: Discoverer, x: np.ndarray, y: np.ndarray, classes: tuple[str, ...], columns: tuple[str, ...] = ()
    ) -> None:
        self.model, self.classes, self.columns = model, classes, columns
        found, sizes = np.unique(model.labels_[y < 0], return_counts=True)
        order = found[np.argsort(-sizes, kind="stable")]
        empty = np.setdiff1d(np.arange(model.n_clusters_), found)
        self.names = {int(cluster): f"novel_{rank + 1}" for rank, cluster in enumerate([*order, *empty])}
        space = self.space(x)
        self._means = np.stack([space[model.labels_ == cluster].mean(0) for cluster in order])
        self._mean_of = [self.names[int(cluster)] for cluster in order]
        self._known_means = np.stack([space[y == k].mean(0) for k in range(len(classes))])
        self.shape = x.shape[1:]

    def space(self, x: Any) -> np.ndarray:
        """Where distances are taken: the method's own embedding, or else the scaled items."""
        if hasattr(self.model, "transform"):
            return self.model.transform(x)
        return self.model.scaled(x)

    def _items(self, x: Any) -> np.ndarray:
        if self.columns and hasattr(x, "columns"):
            missing = [name for name in self.columns if name not in x.columns]
            if missing:
                raise ValueError(f"x: expected the columns {', '.join(self.columns)}; there is no {', '.join(missing)}")
            x = x[list(self.columns)].to_numpy()
        items = np.asarray(x)
        if items.shape[1:] != self.shape:
            raise ValueError(f"x: expected shape (n, {', '.join(map(str, self.shape))}), got {items.shape}")
        return items

    def predict(self, x: Any, among: Literal["novel", "all"] = "novel") -> np.ndarray:
        """Name (n,) of the class of each item.

        Parameters
        ----------
        x : (n, ...) array or DataFrame
            Items as those in the fit.
        among : {"novel", "all"}
            Items are taken to belong to novel classes, as unlabelled ones in the fit are; or a known class is taken
            where its mean is nearer than that of every novel class.
        """
        items = self._items(x)
        names = np.array([self.names[int(c)] for c in self.model.predict(items)], object)
        if among == "novel":
            return names
        if among != "all":
            raise ValueError(f"among: expected 'novel' or 'all', got {among!r}")
        nearest = pairwise_distances_argmin(self.space(items), np.concatenate([self._known_means, self._means]))
        known = nearest < len(self.classes)
        names[known] = np.array(self.classes, object)[nearest[known]]
        return names

    def typical(self, x: np.ndarray, name: str, most: int = 10) -> np.ndarray:
        """Numbers of the items of a novel class that are nearest to its mean, nearest first."""
        rows = np.flatnonzero(self.predict(x) == name)
        away = np.linalg.norm(self.space(x[rows]) - self._means[self._mean_of.index(name)], axis=1)
        chosen: np.ndarray = rows[np.argsort(away, kind="stable")[:most]]
        return chosen

    def save(self, path: str | Path) -> Path:
        """Write a file for [`load`][classact.discover.load], with joblib, as scikit-learn's estimators are saved."""
        import joblib

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        joblib.dump(self, path)
        return path


def load(path: str | Path) -> Any:
    """Read what `classact discover` or [`FoundClasses.save`][classact.discover.FoundClasses] wrote.

    A file ``.safetensors`` holds a network, which [`classact.load`][classact.load] builds. Any other is a pickle:
    loading runs code from the file, as every pickle does: only load files that you trust, with the same version of
    scikit-learn.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    if Path(path).suffix == ".safetensors":
        from classact.saving import load as load_network

        return load_network(path)
    import joblib

    found = joblib.load(path)
    if not isinstance(found, FoundClasses):
        raise ValueError(f"{path}: expected found classes, got {type(found).__name__}")  # noqa: TRY004
    return found
