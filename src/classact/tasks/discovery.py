"""The tasks ``ncd-table`` and ``ncd-image``: find classes that no label names."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from classact.data.unlabelled import PartlyLabelled, load_unlabelled
from classact.discover.found import K_MAX, Discoverer, FoundClasses, PlainClustering
from classact.discover.image_discovery import ImageDiscovery
from classact.discover.metrics import cluster_accuracy, match_clusters
from classact.discover.ncd_clustering import NCDKMeans, NCDSpectral
from classact.discover.pbn import PBN
from classact.evidence.discovery import DiscoveryComparison, DiscoveryStudy, judge, run_cell
from classact.evidence.discovery_report import write_discovery_report
from classact.evidence.executors import Job, run_jobs
from classact.evidence.store import Store, StudyError
from classact.tasks.found_report import write_found


def _pbn(n_clusters: int | None, seed: int, **settings: Any) -> PBN:
    return PBN(n_clusters=n_clusters, k_range=(2, K_MAX), random_state=seed, **settings)


def _spectral(n_clusters: int | None, seed: int) -> NCDSpectral:
    return NCDSpectral(n_clusters, n_components=None if n_clusters else 10, random_state=seed)


def _ncd_kmeans(n_clusters: int | None, seed: int) -> NCDKMeans:
    return NCDKMeans(n_clusters, random_state=seed)


def _plain(kind: str, n_clusters: int | None, seed: int) -> PlainClustering:
    return PlainClustering(kind, n_clusters, seed)


def _image(kind: Any, n_clusters: int | None, seed: int) -> ImageDiscovery:
    return ImageDiscovery(kind, n_clusters=n_clusters, random_state=seed)


# name -> factory(n_clusters, seed)
TABLE_METHODS: dict[str, Callable[[int | None, int], Any]] = {
    "kmeans": partial(_plain, "kmeans"),
    "spectral": partial(_plain, "spectral"),
    "ncd-kmeans": _ncd_kmeans,
    "ncd-spectral": _spectral,
    "pbn": _pbn,
    "pbn-classifier": partial(_pbn, w=1.0),
    "autoencoder": partial(_pbn, w=0.0),
}
IMAGE_METHODS: dict[str, Callable[[int | None, int], Any]] = {
    **{name: TABLE_METHODS[name] for name in ("kmeans", "spectral", "ncd-kmeans", "ncd-spectral")},
    **{name: partial(_image, name) for name in ("known-features", "hypersphere", "uno", "crkd")},
}
# what `tune` draws
SPACES: dict[str, dict[str, Any]] = {
    "pbn": {"lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "w": [0.1, 0.3, 0.5, 0.7, 0.9], "dropout": [0.0, 0.1, 0.3, 0.5]},
    "pbn-classifier": {"lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "dropout": [0.0, 0.1, 0.3, 0.5]},
    "autoencoder": {"lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "dropout": [0.0, 0.1, 0.3, 0.5]},
    "ncd-spectral": {"min_dist": [0.1, 0.3, 0.5, 0.7, 0.9], "n_components": [5, 10, 15, 20, 30]},
    "known-features": {"lr": [3e-4, 1e-3, 3e-3, 1e-2]},
    "hypersphere": {"lr": [3e-4, 1e-3, 3e-3, 1e-2], "scale": [5.0, 10.0, 20.0]},
    "uno": {"lr": [3e-4, 1e-3, 3e-3, 1e-2]},
    "crkd": {"lr": [3e-4, 1e-3, 3e-3, 1e-2], "alpha": [0.02, 0.1, 0.5]},
}
# task -> its methods, and those that are compared by default
TASKS = {
    "ncd-table": (TABLE_METHODS, ("kmeans", "spectral", "ncd-kmeans", "ncd-spectral", "pbn")),
    "ncd-image": (IMAGE_METHODS, ("kmeans", "spectral", "ncd-kmeans", "known-features", "hypersphere", "uno", "crkd")),
}


@dataclass(frozen=True)
class Builder:
    """Makes the estimator of a method, with its settings chosen on hidden classes if `tune` is above 0.

    Images come to it as rows; estimators that have them are given the parameters `shape` and `encoder`.
    """

    task: str
    tune: int
    shape: tuple[int, ...] = ()
    encoder: str | None = None

    def __call__(self, method: str, n_clusters: int | None, seed: int) -> Discoverer:
        """Return an unfitted estimator."""
        estimator = find_method(self.task, method)(n_clusters, seed)
        if self.task == "ncd-image" and hasattr(estimator, "get_params"):
            given = {"shape": self.shape, "encoder": self.encoder}
            estimator.set_params(**{k: v for k, v in given.items() if k in estimator.get_params()})
        return Discoverer(estimator, SPACES.get(method, {}), self.tune, standardise=self.task == "ncd-table")


def find_method(task: str, name: str) -> Callable[[int | None, int], Any]:
    """The factory of a method; a user's own is ``package.module:factory``, called with n_clusters and random_state.

    Raises
    ------
    StudyError
        If there is no such method or factory.
    """
    known = TASKS[task][0]
    if name in known:
        return known[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise StudyError(f"{name}: no such method{hint} There are {', '.join(known)}, and package.module:factory")
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"{name}: {error}") from error
    return partial(_called, factory)


def _called(factory: Callable[..., Any], n_clusters: int | None, seed: int) -> Any:
    return factory(n_clusters=n_clusters, random_state=seed)


def agreement(true: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Clustering accuracy, normalised mutual information and adjusted Rand index."""
    return {
        "accuracy": cluster_accuracy(true, clusters),
        "nmi": float(normalized_mutual_info_score(true, clusters)),
        "ari": float(adjusted_rand_score(true, clusters)),
    }


def compare_discovery(
    task: str,
    data: str | Path | PartlyLabelled = "digits",
    methods: Sequence[str] | None = None,
    *,
    n_novel: int | None = None,
    reference: str = "kmeans",
    seeds: int = 5,
    tune: int = 0,
    encoder: str | None = None,
    out: str | Path = "report",
    workers: int = 1,
    command: str = "",
    quiet: bool = False,
) -> DiscoveryComparison:
    """Compare methods that find the classes of unlabelled items with the help of labelled ones.

    Parameters
    ----------
    task : {"ncd-table", "ncd-image"}
        What the items are.
    data : str, path or PartlyLabelled
        What [`load_unlabelled`][classact.data.unlabelled.load_unlabelled] reads, or has read with further options. For
        ``digits`` the truth is known.
    methods : sequence of str
        Names of the task, or ``package.module:factory``, called with ``n_clusters`` (None: to be estimated) and
        ``random_state``.
    n_novel : int, optional
        Number of novel classes; by default every method estimates it, without a look at the truth.
    reference : str
        Method that differences are taken to; it is always an arm.
    seeds : int
        Fits of every method; each draws other items to hold out, and other starts.
    tune : int
        Settings drawn for every method that has some, chosen on known classes that are hidden; 0 takes the defaults.
    encoder : str, optional
        For images: a network of timm, with its pretrained weights, for the methods that have one; by default a small
        one is trained from nothing.
    out : path
        Folder of the report; a comparison that was stopped goes on there.
    workers : int
        Processes.
    command : str
        Shown in the report.
    quiet : bool
        Show no progress.

    Raises
    ------
    StudyError, DataError
        If a name or the data do not fit.
    """
    items = data if isinstance(data, PartlyLabelled) else load_unlabelled(data, images=task == "ncd-image")
    if (items.x.ndim == 4) != (task == "ncd-image"):
        kind, other = ("images", "ncd-image") if items.x.ndim == 4 else ("rows of a table", "ncd-table")
        raise StudyError(f"{items.name}: these are {kind}; the task for them is {other}")
    names = list(dict.fromkeys([reference, *(methods or TASKS[task][1])]))
    for name in names:
        find_method(task, name)
    unlabelled = int(items.unlabelled.sum())
    if unlabelled < 8:
        raise StudyError(f"{items.name}: {unlabelled} unlabelled items; expected at least 8 to look for classes in")
    if seeds < 2:
        raise StudyError(f"seeds: expected at least 2, got {seeds}")
    if n_novel is not None and not 2 <= n_novel <= unlabelled // 2:
        raise StudyError(f"n_novel: expected 2 to {unlabelled // 2} for {unlabelled} unlabelled items, got {n_novel}")
    known = len(items.classes)
    n_hidden = max(2, known // 2) if known >= 3 else 0
    if tune and not n_hidden:
        raise StudyError(
            f"tune: hides known classes, of which at least 3 are needed, and there are {known} "
            f"({', '.join(items.classes)})"
        )
    study = DiscoveryStudy(
        items.x, items.y, Builder(task, tune, items.x.shape[1:], encoder), agreement, n_novel, n_hidden
    )
    definition = {
        "task": task,
        "data": {"name": items.name, "items": len(items.y), "sum": float(items.x.sum()), "unlabelled": unlabelled},
        "n_novel": n_novel,
        "tune": tune,
        "encoder": encoder,
    }
    hides = (False, True) if n_hidden else (False,)
    jobs = {
        (name, seed, hide): Job(f"{_safe(name)}-{seed}{'-hidden' if hide else ''}", (name, seed, hide))
        for name in names
        for hide in hides
        for seed in range(seeds)
    }
    with Store(Path(out) / "study", definition) as store:
        done = run_jobs(run_cell, study, list(jobs.values()), store, workers, task, quiet)
        cells = {key: done[job.key] for key, job in jobs.items()}
        arrays = {(name, seed): store.arrays(jobs[name, seed, False].key) for name, seed, hide in jobs if not hide}
    found = judge(study, task, items.name, names, reference, cells, arrays, items.truth)
    found.facts = {
        "Data": f"{items.name}: {len(items.y):,} items, {unlabelled:,} without a class; {known} known classes "
        f"({', '.join(items.classes)})",
        "Number of novel classes": str(n_novel) if n_novel else "estimated by every method",
        "Settings": f"{tune} drawn for each method that has some, chosen on hidden known classes"
        if tune
        else "defaults",
        "Items": "a quarter of every class and of the unlabelled items is held out, drawn anew for each seed"
        + ("; columns are standardised by the others" if task == "ncd-table" else ""),
        "Hidden classes": f"{n_hidden} of {known} known classes in every seed, of the known items alone"
        if n_hidden
        else "too few known classes to hide some",
        "Intervals": f"95 %, over {seeds} seeds; they do not say what another data set would give",
    }
    if task == "ncd-image":
        found.facts["Encoder"] = f"{encoder}, pretrained" if encoder else "a small one, trained from nothing"
    write_discovery_report(found, Path(out), command)
    return found


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


@dataclass(frozen=True)
class Discovery:
    """What `discover` found.

    Attributes
    ----------
    found : FoundClasses
        The fitted method; ``found.predict`` names the classes of new items.
    method : str
        The one that was taken.
    data : PartlyLabelled
        What it was fitted on.
    names : (n,) array of str
        Class of every item: the known one, or ``novel_1``, ``novel_2``, ... by size.
    confidence : (n,) array
        Share of the other fits, each to three quarters of the items, that put an unlabelled item into the same class;
        NaN for labelled ones.
    why : str
        How the method was chosen.
    """

    found: FoundClasses
    method: str
    data: PartlyLabelled
    names: np.ndarray
    confidence: np.ndarray
    why: str


def discover_classes(
    data: str | Path | PartlyLabelled = "digits",
    method: str = "auto",
    *,
    n_novel: int | None = None,
    seeds: int = 5,
    tune: int = 0,
    encoder: str | None = None,
    out: str | Path = "report",
    workers: int = 1,
    command: str = "",
    quiet: bool = False,
) -> Discovery:
    """Find the classes of unlabelled items with one method, name them and save the method for new items.

    Written to `out`: ``labelled.csv`` (the table, or the names of the files, with class and confidence),
    ``typical.csv``, ``report.html`` and ``model.joblib``, which [`load`][classact.discover.load] reads.

    Parameters
    ----------
    data, n_novel, tune, encoder, workers, command, quiet
        As in [`compare_discovery`][classact.tasks.discovery.compare_discovery].
    method : str
        Name of a method, or ``auto``: of the methods of the task the one that finds hidden known classes best; where
        there are too few known classes to hide, the one whose fits agree most.
    seeds : int
        Fits to parts of the items, which give the confidence.
    """
    items = data if isinstance(data, PartlyLabelled) else load_unlabelled(data)
    task = "ncd-image" if items.x.ndim == 4 else "ncd-table"
    blind = replace(items, truth=None)
    names = list(TASKS[task][1]) if method == "auto" else [method]
    place = Path(out)
    compared = compare_discovery(
        task,
        blind,
        names,
        reference=names[0],
        n_novel=n_novel,
        seeds=seeds,
        tune=tune,
        encoder=encoder,
        out=place / "comparison",
        workers=workers,
        command=command,
        quiet=quiet,
    )
    best = compared.rows[0]
    hidden = np.isfinite(best.hidden.effect)
    if method != "auto":
        why = "as asked for"
    elif hidden:
        why = f"it found hidden known classes best (accuracy {best.hidden.effect:.3f})"
    else:
        why = f"its fits agree most (adjusted Rand index {best.agreement:.2f}); too few known classes to hide some"
    model = Builder(task, tune, items.x.shape[1:], encoder)(best.method, n_novel, 0).fit(items.x, items.y)
    found = FoundClasses(model, items.x, items.y, items.classes, items.columns)
    novel = items.unlabelled
    labels = np.array([found.names[int(c)] for c in model.labels_[novel]], object)
    everything = np.array([items.classes[k] if k >= 0 else "" for k in items.y], object)
    everything[novel] = labels
    confidence = np.full(len(items.y), np.nan)
    agreed = [_same_class(labels, other[novel]) for other in compared.labels[best.method]]
    confidence[novel] = np.mean(agreed, 0)
    result = Discovery(found, best.method, items, everything, confidence, why)
    found.save(place / "model.joblib")
    write_found(result, place, command)
    return result


def _same_class(names: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether another clustering, matched with the names, puts each item into the same class."""
    matching = match_clusters(names, other)
    return np.array([matching.get(int(cluster)) == name for name, cluster in zip(names, other, strict=True)])
