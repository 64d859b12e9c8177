"""PBN: projection-based novel class discovery in tables, tuned without a look at the novel classes.

Troisemaine, Reiffers-Masson, Gosselin, Lemaire, Vaton: A Practical Approach to Novel Class Discovery in Tabular Data,
Data Mining and Knowledge Discovery 2024, https://arxiv.org/abs/2311.05440, code: https://github.com/ColinTr/PracticalNCD.

Some rows of a table carry the label of a known class, the others belong to classes without a name. The encoder of an
auto-encoder is trained to classify the known rows as well; the other rows are then clustered in its latent space. The
four settings of [`PBN`][classact.discover.PBN] are chosen by [`HiddenClassCV`][classact.discover.HiddenClassCV], which
takes away the labels of some known classes in each fold and scores how well they are found again, and the number of
novel classes by [`estimate_n_clusters`][classact.discover.estimate_n_clusters]. The paper's two other methods are in
[`ncd_clustering`][classact.discover.ncd_clustering].

Where the authors' code differs. (1) It trains on latents of length 1 and estimates the number of classes there, but
clusters the encoder's output as it is; here both use length 1, and ``cluster_on="raw"`` is the code's way. (2) It
clusters the very rows on which it is then scored; here the clusters are found among the unlabelled rows of ``fit``, and
``predict`` puts any row into one of them. (3) It keeps one order of the rows for all epochs; here they are shuffled.

Labels are integers with -1 for rows without one, or any other names with None or NaN.

>>> import numpy as np
>>> x = np.random.default_rng(0).normal(size=(120, 4)) + 8 * np.eye(4)[np.arange(120) % 4]
>>> y = np.where(np.arange(120) % 4 < 2, np.arange(120) % 4, -1)  # two of four classes are known
>>> model = PBN(latent_dim=3, n_clusters=2, epochs=50, random_state=0).fit(x, y)
>>> np.unique(model.predict(x[y == -1]), return_counts=True)[1].tolist()
[30, 30]
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import comb
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    MetaEstimatorMixin,
    TransformerMixin,
    clone,
)
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, pairwise_distances
from sklearn.model_selection import ParameterSampler
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from classact.discover.metrics import cluster_accuracy


class PBNOutput(NamedTuple):
    """What [`PBNNetwork`][classact.discover.PBNNetwork] says of B rows."""

    latent: Float[Tensor, "b l"]
    reconstruction: Float[Tensor, "b d"]
    logits: Float[Tensor, "b c"]


class PBNNetwork(nn.Module):
    """Encoder, decoder and a linear classifier of the latents (section 3.4 of the paper).

    Parameters
    ----------
    in_dim, n_classes : int
        Columns d of the table and number C_l of known classes.
    latent_dim : int
        Width L of the latent space.
    dropout : float
        p, after every hidden layer.
    hidden : sequence of int, optional
        Widths of the encoder's hidden layers, by default floor(3d/4) and floor(d/2), but at least 8, which is what the
        narrowest of the paper's tables has; the decoder mirrors them.

    Raises
    ------
    ValueError
        If a width is below 1 or `dropout` is not in [0, 1).

    Examples
    --------
    >>> PBNNetwork(62, 5, latent_dim=58)(torch.randn(8, 62)).latent.shape
    torch.Size([8, 58])
    """

    def __init__(
        self, in_dim: int, n_classes: int, latent_dim: int, dropout: float = 0.0, hidden: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if hidden is None:
            hidden = hidden_widths(in_dim)
        for name, value in (("in_dim", in_dim), ("n_classes", n_classes), ("latent_dim", latent_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if min(hidden, default=1) < 1:
            raise ValueError(f"hidden: expected widths of at least 1, got {list(hidden)}")
        check_part("dropout", dropout, below_one=True)
        self.config = {
            "in_dim": in_dim,
            "n_classes": n_classes,
            "latent_dim": latent_dim,
            "dropout": dropout,
            "hidden": list(hidden),
        }
        widths = [in_dim, *hidden, latent_dim]
        self.encoder = encoder_layers(widths, dropout)
        self.decoder = encoder_layers(widths[::-1], dropout)
        self.classifier = nn.Linear(latent_dim, n_classes)

    def encode(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b l"]:
        """Latents of length 1."""
        return F.normalize(self.encoder(x), dim=1)

    def forward(self, x: Float[Tensor, "b d"]) -> PBNOutput:
        """Encode, reconstruct and classify B rows."""
        if x.ndim != 2 or x.shape[1] != self.config["in_dim"]:
            raise ValueError(f"x: expected shape (B, {self.config['in_dim']}), got {tuple(x.shape)}")
        z = self.encode(x)
        return PBNOutput(z, self.decoder(z), self.classifier(z))


def hidden_widths(d: int) -> tuple[int, int]:
    """Widths of the encoder's hidden layers for a table with d columns."""
    return max(3 * d // 4, 8), max(d // 2, 8)


def encoder_layers(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers with ReLU, batch normalisation and dropout, in this order, in between."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for narrow, wide in pairwise(widths[1:]):
        layers += [nn.ReLU(), nn.BatchNorm1d(narrow), nn.Dropout(dropout), nn.Linear(narrow, wide)]
    return nn.Sequential(*layers)


def pbn_loss(output: PBNOutput, x: Float[Tensor, "b d"], target: Int[Tensor, " b"], w: float) -> Float[Tensor, ""]:
    """``w CE(known rows) + (1 - w) / B sum_i ||reconstruction_i - x_i||^2`` (over all rows).

    Parameters
    ----------
    output : PBNOutput
        Of the network for `x`.
    x : (B, d)
        The rows themselves, standardised.
    target : (B,) int
        Known class, -1 for the others. Without any known row the first term is 0.
    w : float
        In [0, 1].
    """
    check_part("w", w)
    known = (target >= 0).sum().clamp(min=1)
    cross_entropy = F.cross_entropy(output.logits, target, ignore_index=-1, reduction="sum") / known
    return w * cross_entropy + (1 - w) * (output.reconstruction - x).square().sum(1).mean()


def check_part(name: str, value: float, below_one: bool = False) -> None:
    """Refuse what is not in [0, 1], or [0, 1)."""
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ValueError(f"{name}: expected a number in [0, 1{')' if below_one else ']'}, got {value}")


def split_labels(y: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tell known from novel rows.

    Parameters
    ----------
    y : (n,) array-like or None
        Labels; -1, NaN or None marks a row without one, and None in place of an array marks all of them.
    n : int
        Number of rows.

    Returns
    -------
    classes : (C_l,)
        Known classes, sorted.
    codes : (n,) int
        Number of the row's class, -1 where it has none.
    novel : (n,) bool
        Rows to cluster: those without a label.

    Warns
    -----
    UserWarning
        If every row has a label; all are then to be clustered.
    """
    if y is None:
        return np.empty(0, int), np.full(n, -1), np.ones(n, bool)
    labels = column_or_1d(y, warn=True)
    if len(labels) != n:
        raise ValueError(f"y: expected {n} labels, one for each row of X, got {len(labels)}")
    novel = unlabelled(labels)
    codes = np.full(n, -1)
    classes, codes[~novel] = np.unique(labels[~novel], return_inverse=True)
    if not novel.any():
        warnings.warn("y: every row has a label, none is -1: all rows are clustered", UserWarning, stacklevel=3)
        novel = ~novel
    return classes, codes, novel


def unlabelled(labels: np.ndarray) -> np.ndarray:
    """Which labels are -1, NaN or None."""
    if labels.dtype.kind in "biuf":
        return (labels == -1) | np.isnan(labels)
    return np.array([label is None or label != label or label == -1 for label in labels.tolist()])


class TableEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """What the networks for tables share: standardised columns, batches of rows, a network in double precision."""

    def _prepare(self, X: Any, y: Any) -> tuple[Tensor, np.ndarray, np.ndarray, int]:
        """Standardised table, class numbers, rows to cluster, and a seed."""
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self.classes_, codes, novel = split_labels(y, len(x))
        for name, least in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        check_n_clusters(self.n_clusters, int(novel.sum()))
        self.kept_ = x.max(0) > x.min(0)
        if not self.kept_.any():
            raise ValueError("X: expected a column that is not constant, got none")
        self.mean_, self.std_ = x[:, self.kept_].mean(0), x[:, self.kept_].std(0)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return self._standardise(x).float(), codes, novel, seed

    def _standardise(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy((x[:, self.kept_] - self.mean_) / self.std_)

    def _train(self, network: nn.Module, n: int, seed: int, step: Callable[[Tensor], Tensor | None]) -> None:
        """AdamW over shuffled batches; `step` maps the row numbers of a batch to its loss, or None to skip it."""
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, fused=True)
        generator = torch.Generator().manual_seed(seed)
        self.loss_curve_: list[float] = []
        network.train()
        for _ in range(self.epochs):
            losses = []
            for rows in torch.randperm(n, generator=generator).split(self.batch_size):
                if len(rows) < 2:  # batch normalisation knows no variance of one row
                    continue
                optimizer.zero_grad()
                loss = step(rows)
                if loss is not None:
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
            self.loss_curve_.append(float(torch.stack(losses).mean()) if losses else float("nan"))
        # one row at a time and many at once must give the same numbers, which float32 products do not quite
        self.network_: Any = network.double().eval()
        self.n_iter_ = self.epochs

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self, "network_")
        return self._standardise(validate_data(self, X, reset=False, dtype=np.float64))

    def _known(self, logits: Tensor) -> np.ndarray:
        if not len(self.classes_):
            raise ValueError("predict_known: there was no known class in fit")
        return self.classes_[logits[:, : len(self.classes_)].argmax(1).numpy()]


def check_n_clusters(n_clusters: int | None, n: int) -> None:
    """Refuse more clusters than rows to cluster."""
    if n_clusters is not None and not 1 <= n_clusters <= n:
        raise ValueError(f"n_clusters: expected 1 to {n}, the number of rows without a label, got {n_clusters}")


def rows_to_labels(novel: np.ndarray, novel_labels: np.ndarray) -> np.ndarray:
    """Clusters of all rows, -1 for known ones."""
    labels = np.full(len(novel), -1)
    labels[novel] = novel_labels
    return labels


class PBN(TableEstimator):
    """Projection-based novel class discovery.

    Parameters
    ----------
    latent_dim : int, optional
        L, by default the number of columns that are not constant. The paper tunes L, w, lr and p.
    w : float
        Weight of the classification in [0, 1]. With 0 it is an auto-encoder; with 1 the paper's baseline, which has no
        use for a decoder and is trained on the known rows alone.
    lr : float
        Learning rate of AdamW.
    dropout : float
        p.
    epochs, batch_size : int
        Length of the training.
    n_clusters : int, optional
        Number C_u of novel classes; by default estimated in the latent space.
    clusterer : estimator, optional
        Clusters the latents of all rows, given their labels: [`NCDKMeans`][classact.discover.NCDKMeans] or
        [`NCDSpectral`][classact.discover.NCDSpectral]; `n_clusters` and `random_state` are set here. By default k-means
        of the novel latents with 10 starts.
    cluster_on : {"normalized", "raw"}
        Latents of length 1, or the encoder's output as in the authors' code.
    k_range : (int, int)
        Smallest and largest number of classes to be considered; cut to the number of rows.
    random_state : int, RandomState or None
        Of weights, batches and clusters.

    Attributes
    ----------
    network_ : PBNNetwork
        In double precision, for standardised columns.
    classes_ : (C_l,)
        Known classes.
    clusterer_ : estimator
        Fitted on the latents.
    n_clusters_ : int
        Number of clusters.
    novel_labels_ : (n_novel,)
        Cluster, from 0, of every row that had no label in ``fit``, in their order.
    labels_ : (n,)
        The same for all rows, -1 for known ones.
    loss_curve_ : list of float
        Mean loss of each epoch.
    """

    def __init__(
        self,
        latent_dim: int | None = None,
        w: float = 0.5,
        lr: float = 1e-3,
        dropout: float = 0.1,
        epochs: int = 200,
        batch_size: int = 512,
        n_clusters: int | None = None,
        clusterer: Any = None,
        cluster_on: Literal["normalized", "raw"] = "normalized",
        k_range: tuple[int, int] = (2, 30),
        random_state: Any = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.w = w
        self.lr = lr
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.n_clusters = n_clusters
        self.clusterer = clusterer
        self.cluster_on = cluster_on
        self.k_range = k_range
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "PBN":
        """Train on a table (n, D) with labels (n,) and cluster the rows that have none.

        Without `y` no class is known, and all rows are clustered in the latent space of an auto-encoder.

        Raises
        ------
        ValueError
            If a setting is out of its range, no column varies, or ``w=1`` meets no known class.
        """
        check_part("w", self.w)
        if self.cluster_on not in ("normalized", "raw"):
            raise ValueError(f"cluster_on: expected 'normalized' or 'raw', got {self.cluster_on!r}")
        table, codes, novel, seed = self._prepare(X, y)
        if self.w == 1 and not len(self.classes_):
            raise ValueError("w: with 1 only known rows are learned from, and y has none")
        target = torch.from_numpy(codes)
        used = torch.from_numpy(np.flatnonzero(codes >= 0)) if self.w == 1 else torch.arange(len(table))
        width = self.latent_dim if self.latent_dim is not None else table.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = PBNNetwork(table.shape[1], max(len(self.classes_), 1), width, self.dropout)

            def step(rows: Tensor) -> Tensor:
                x = table[used[rows]]
                return pbn_loss(network(x), x, target[used[rows]], self.w)

            self._train(network, len(used), seed, step)
        self._n_features_out = width

        z = self._latents(table.double())
        self.n_clusters_ = self.n_clusters
        if self.n_clusters_ is None:
            low, high = self.k_range
            normalised = F.normalize(torch.from_numpy(z[novel]), dim=1).numpy()
            self.n_clusters_ = estimate_n_clusters(normalised, low, min(high, len(normalised) - 1), random_state=seed)[
                0
            ]
        if self.clusterer is None:
            self.clusterer_ = KMeans(self.n_clusters_, n_init=10, random_state=seed).fit(z[novel])
            self.novel_labels_ = self.clusterer_.labels_
        else:
            settings = {"n_clusters": self.n_clusters_, "random_state": seed}
            self.clusterer_ = clone(self.clusterer).set_params(**settings).fit(z, np.where(novel, -1, codes))
            self.novel_labels_ = self.clusterer_.novel_labels_
        self.labels_ = rows_to_labels(novel, self.novel_labels_)
        return self

    def _latents(self, x: Tensor) -> np.ndarray:
        with torch.inference_mode():
            encode = self.network_.encode if self.cluster_on == "normalized" else self.network_.encoder
            return encode(x).numpy()

    def transform(self, X: Any) -> np.ndarray:
        """Latents (n, L) in which rows are clustered; of length 1 unless ``cluster_on="raw"``."""
        rows = self._rows(X)
        return self._latents(rows)

    def predict(self, X: Any) -> np.ndarray:
        """Put every row into one of the novel clusters (n,), numbered from 0."""
        z = self.transform(X)
        return self.clusterer_.predict(z)

    def predict_known(self, X: Any) -> np.ndarray:
        """Put every row into one of the known classes (n,)."""
        rows = self._rows(X)
        with torch.inference_mode():
            return self._known(self.network_.classifier(self.network_.encode(rows)))


Index = Literal["silhouette", "calinski_harabasz", "davies_bouldin"]


def estimate_n_clusters(
    Z: Any, k_min: int = 2, k_max: int = 30, n_runs: int = 3, index: Index = "silhouette", random_state: Any = None
) -> tuple[int, np.ndarray]:
    """Estimate the number of clusters by a validity index of k-means, averaged over runs.

    Parameters
    ----------
    Z : (n, L) array-like
        Points; for novel classes, their latents.
    k_min, k_max : int
        Numbers to be considered, 2 <= k_min <= k_max < n.
    n_runs : int
        Runs of k-means for each, each the best of 10 starts.
    index : {"silhouette", "calinski_harabasz", "davies_bouldin"}
        The first two are best when large, the last when small. The distances that silhouettes need are computed once.
    random_state : int, RandomState or None
        Of k-means.

    Returns
    -------
    k : int
        The number with the best mean index.
    curve : (k_max - k_min + 1,)
        Mean index of each number.

    Raises
    ------
    ValueError
        If the range does not fit or there is no such index.

    Examples
    --------
    >>> import numpy as np
    >>> points = np.random.default_rng(0).normal(size=(90, 2)) + 20 * np.eye(3)[np.arange(90) % 3, :2]
    >>> estimate_n_clusters(points, k_max=5, random_state=0)[0]
    3
    """
    z = check_array(Z, dtype=np.float64)
    if not 2 <= k_min <= k_max < len(z):
        raise ValueError(f"k_min, k_max: expected 2 <= k_min <= k_max < {len(z)} points, got {k_min}, {k_max}")
    if n_runs < 1:
        raise ValueError(f"n_runs: expected at least 1, got {n_runs}")
    if index not in ("silhouette", "calinski_harabasz", "davies_bouldin"):
        raise ValueError(f"index: expected silhouette, calinski_harabasz or davies_bouldin, got {index!r}")
    rng, candidates = check_random_state(random_state), np.arange(k_min, k_max + 1)
    partitions = [
        KMeans(k, n_init=10, random_state=rng.randint(2**31 - 1)).fit(z).labels_ for k in np.repeat(candidates, n_runs)
    ]
    if index == "silhouette":
        scores = silhouettes(z, np.stack(partitions))
    else:
        score = calinski_harabasz_score if index == "calinski_harabasz" else davies_bouldin_score
        scores = np.array([score(z, labels) for labels in partitions])
    curve = scores.reshape(-1, n_runs).mean(1)
    return int(candidates[curve.argmin() if index == "davies_bouldin" else curve.argmax()]), curve


def silhouettes(z: Float[np.ndarray, "n l"], partitions: Int[np.ndarray, "p n"]) -> Float[np.ndarray, " p"]:
    """Mean silhouettes of P partitions of the same points, in one pass over their distances."""
    starts = np.concatenate([[0], np.cumsum(partitions.max(1) + 1)])
    columns = partitions + starts[:-1, None]
    member = np.zeros((len(z), starts[-1]))
    member[np.arange(len(z)), columns] = 1
    size = member.sum(0)
    total = np.zeros(len(partitions))
    for rows in gen_batches(len(z), 1024):
        summed = pairwise_distances(z[rows], z) @ member
        mean = summed / np.maximum(size, 1)
        mean[:, size == 0] = np.inf
        for p, (start, end) in enumerate(pairwise(starts)):
            own = columns[p, rows]
            others = size[own] - 1
            inside = summed[np.arange(len(own)), own] / np.maximum(others, 1)
            outside = mean[:, start:end].copy()
            outside[np.arange(len(own)), own - start] = np.inf
            nearest = outside.min(1)
            # a cluster of one row has silhouette 0
            total[p] += np.where(
                others > 0, (nearest - inside) / np.maximum(np.maximum(nearest, inside), 1e-300), 0
            ).sum()
    return total / len(z)


class HiddenClassSplit:
    """Folds that hide some known classes: their rows lose their labels and are to be found again.

    Parameters
    ----------
    n_hidden : int, optional
        Number h of classes that a fold hides, by default half of them, but at least 2.
    n_folds : int
        Number F of folds, each with another random set of classes.
    use_unlabeled : bool
        Keep the rows without labels in every fold, as the paper does: its estimators meet hidden and novel classes at
        once. Otherwise they are left out.
    random_state : int, RandomState or None
        Of the choice.

    Examples
    --------
    >>> y = [0, 0, 1, 1, 2, 2, -1, -1]
    >>> for train, masked, scored, true in HiddenClassSplit(1, 2, random_state=0).split(None, y):
    ...     print(masked, scored, true)
    [ 0  0  1  1 -1 -1 -1 -1] [4 5] [2 2]
    [-1 -1  1  1  2  2 -1 -1] [0 1] [0 0]
    """

    def __init__(
        self,
        n_hidden: int | None = None,
        n_folds: int = 5,
        use_unlabeled: bool = True,
        random_state: Any = None,
    ) -> None:
        self.n_hidden = n_hidden
        self.n_folds = n_folds
        self.use_unlabeled = use_unlabeled
        self.random_state = random_state

    def split(self, X: Any, y: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:  # noqa: ARG002
        """Yield (train_idx, y_masked, eval_idx, y_true) of every fold.

        ``y_masked`` are the labels of the rows ``train_idx``, without those of hidden classes; ``y_true`` are the
        labels that were hidden, of the rows ``eval_idx``.

        Raises
        ------
        ValueError
            If not at least one class is left, or there are not so many different folds.
        """
        labels = column_or_1d(y)
        known = ~unlabelled(labels)
        classes, codes = np.unique(labels[known], return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y: expected at least two known classes, more than one class, got {len(classes)}")
        hidden = self.n_hidden if self.n_hidden is not None else max(2, len(classes) // 2)
        if not 1 <= hidden < len(classes):
            raise ValueError(
                f"n_hidden: expected 1 to {len(classes) - 1}, below the number of known classes, got {hidden}"
            )
        if not 1 <= self.n_folds <= comb(len(classes), hidden):
            raise ValueError(
                f"n_folds: expected 1 to {comb(len(classes), hidden)}, the ways to hide {hidden} of {len(classes)} "
                f"classes, got {self.n_folds}"
            )
        rng, chosen = check_random_state(self.random_state), set[tuple[int, ...]]()
        number = np.full(len(labels), -1)
        number[known] = codes
        none = -1 if labels.dtype.kind in "biuf" else None
        while len(chosen) < self.n_folds:
            subset = tuple(sorted(rng.permutation(len(classes))[:hidden].tolist()))
            if subset in chosen:
                continue
            chosen.add(subset)
            eval_idx = np.flatnonzero(np.isin(number, subset))
            masked = labels.astype(object) if none is None else labels.copy()
            masked[eval_idx] = none
            train_idx = np.arange(len(labels)) if self.use_unlabeled else np.flatnonzero(known)
            yield train_idx, masked[train_idx], eval_idx, labels[eval_idx]


class HiddenClassCV(MetaEstimatorMixin, BaseEstimator):
    """Random search that scores settings by how well classes are found whose labels it has hidden.

    Labels of novel classes are not needed and could not be used. For any estimator with ``fit(X, y)``, -1 for rows
    without label, and ``predict``. Every parameter called ``n_clusters``, nested ones included, that is not None is
    raised by the number of classes that a fold hides (or, without the unlabelled rows, set to it).

    Parameters
    ----------
    estimator : estimator
        To be tuned.
    param_distributions : dict
        As for scikit-learn's RandomizedSearchCV: lists, or distributions with ``rvs``.
    n_hidden, n_folds, use_unlabeled
        See [`HiddenClassSplit`][classact.discover.HiddenClassSplit]; all settings meet the same folds.
    n_iter : int
        Number of settings drawn.
    scoring : callable
        ``scoring(y_true, clusters)``, larger is better.
    n_jobs : int, optional
        Parallel jobs.
    random_state : int, RandomState or None
        Of the settings and folds.

    Attributes
    ----------
    best_params_, best_score_, best_index_
        The best setting, its mean score and its place in ``cv_results_``; of equal ones the first.
    best_estimator_ : estimator
        Fitted with it, all known classes with their labels.
    cv_results_ : dict
        ``params``, ``split<i>_test_score``, ``mean_test_score``, ``std_test_score``, as in scikit-learn.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(150, 2)) + 6 * np.eye(5)[np.arange(150) % 5, :2]
    >>> y = np.where(np.arange(150) % 5 < 3, np.arange(150) % 5, -1)
    >>> search = HiddenClassCV(PBN(n_clusters=2, epochs=5, random_state=0), {"w": [0.2, 0.8]}, 1, 2, n_iter=2)
    >>> len(search.fit(x, y).cv_results_["params"])
    2
    """

    def __init__(
        self,
        estimator: Any,
        param_distributions: Mapping[str, Any],
        n_hidden: int | None = None,
        n_folds: int = 5,
        n_iter: int = 20,
        scoring: Callable[[Any, Any], float] = cluster_accuracy,
        use_unlabeled: bool = True,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.param_distributions = param_distributions
        self.n_hidden = n_hidden
        self.n_folds = n_folds
        self.n_iter = n_iter
        self.scoring = scoring
        self.use_unlabeled = use_unlabeled
        self.n_jobs = n_jobs
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def fit(self, X: Any, y: Any) -> "HiddenClassCV":
        """Search, then fit the best setting to all rows."""
        x = validate_data(self, X, dtype=np.float64)
        if y is None:
            raise ValueError(
                "y: HiddenClassCV requires y to be passed, but the target y is None: it has classes to hide"
            )
        rng = check_random_state(self.random_state)
        folds = HiddenClassSplit(self.n_hidden, self.n_folds, self.use_unlabeled, rng)
        splits = list(folds.split(x, y))
        settings = list(ParameterSampler(self.param_distributions, self.n_iter, random_state=rng))
        scores = np.array(
            Parallel(n_jobs=self.n_jobs)(
                delayed(self._score)(x, setting, fold) for setting in settings for fold in splits
            )
        ).reshape(len(settings), len(splits))
        self.cv_results_ = {
            "params": settings,
            "mean_test_score": scores.mean(1),
            "std_test_score": scores.std(1),
            **{f"split{i}_test_score": column for i, column in enumerate(scores.T)},
        }
        self.best_index_ = int(scores.mean(1).argmax())
        self.best_params_, self.best_score_ = settings[self.best_index_], float(scores.mean(1).max())
        self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_).fit(x, y)
        return self

    @property
    def novel_labels_(self) -> np.ndarray:
        """Clusters of the rows without label, by the best estimator."""
        return self.best_estimator_.novel_labels_

    @property
    def labels_(self) -> np.ndarray:
        """The same for all rows, -1 for known ones."""
        return self.best_estimator_.labels_

    def _score(self, x: np.ndarray, setting: Mapping[str, Any], fold: tuple[np.ndarray, ...]) -> float:
        train_idx, y_masked, eval_idx, y_true = fold
        estimator = clone(self.estimator).set_params(**setting)
        hidden = len(np.unique(y_true))
        clusters = {
            name: hidden + (value if self.use_unlabeled else 0)
            for name, value in estimator.get_params().items()
            if name.split("__")[-1] == "n_clusters" and value is not None
        }
        estimator.set_params(**clusters).fit(x[train_idx], y_masked)
        return float(self.scoring(y_true, estimator.predict(x[eval_idx])))

    def predict(self, X: Any) -> np.ndarray:
        """Novel clusters (n,) by the best estimator."""
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_.predict(validate_data(self, X, reset=False, dtype=np.float64))
