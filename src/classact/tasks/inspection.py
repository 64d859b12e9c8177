"""Sorting the defects of an inspected product: the layout of [`inspection`][classact.data.inspection], AnomalyNCD.

`compare_sorting` compares it with clusterings, as the task ``ncd-image`` does for other images; `sort_defects` is what
``classact discover`` does with such a folder.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import pairwise_distances_argmin
from torch.nn import functional as F

import classact
from classact.data.bag_files import DataError
from classact.data.inspection import Inspection, open_inspection
from classact.data.photos import list_photos
from classact.discover.anomalyncd import AnomalyNCD, CropViews, MEBin, PatchMemory, Predictions, fit_anomalyncd
from classact.discover.anomalyncd.fit import DINO, estimate_n_novel
from classact.discover.anomalyncd.model import UNSURE
from classact.evidence.discovery import DiscoveryComparison, DiscoveryStudy, judge, run_cell
from classact.evidence.discovery_report import write_discovery_report
from classact.evidence.executors import Job, run_jobs
from classact.evidence.figures import new_figure, png
from classact.evidence.report import STYLE, fact_rows, versions
from classact.evidence.store import Store, StudyError, write_atomically
from classact.tasks.discovery import agreement

METHODS = ("kmeans-images", "kmeans-crops", "anomaly-clustering", "anomalyncd")
THUMBNAIL, TYPICAL = 32, 8


def is_inspection(folder: str | Path) -> bool:
    """Whether a folder has this layout: unlabelled images beside good ones or anomaly maps."""
    folder = Path(folder)
    return (folder / "unlabelled").is_dir() and any((folder / part).is_dir() for part in ("good", "maps"))


@dataclass(frozen=True)
class Sorting:
    """Makes the estimators; called as the comparison does."""

    inspection: Inspection
    maps: list[np.ndarray]
    vit: Any
    options: dict[str, Any]
    training: dict[str, Any]

    def __call__(self, method: str, n_clusters: int | None, seed: int) -> "Sorter":
        """Return an unfitted estimator."""
        return Sorter(self, method, n_clusters, seed)


class Sorter:
    """One method, fitted to images by their numbers (n, 1)."""

    def __init__(self, sorting: Sorting, method: str, n_clusters: int | None, seed: int) -> None:
        self.sorting, self.method, self.n_clusters, self.seed = sorting, method, n_clusters, seed

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Sorter":  # noqa: ARG002 - no image has a class
        """Fit to the images of these numbers."""
        images, maps = self._of(x)
        of = self.sorting
        if self.method == "anomalyncd":
            given = of.inspection.arguments()
            self.model = fit_anomalyncd(
                images,
                maps if given["maps"] is not None else None,  # else it makes its own, as for `sort_defects`
                n_novel=self.n_clusters or "estimate",
                good=given["good"],
                base=given["base"],
                vit=of.vit,
                seed=self.seed,
                model_options=of.options,
                **of.training,
            )
            self.n_clusters_ = self.model.n_novel
            self.labels_ = self.predict(x)
            return self
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = AnomalyNCD(of.vit, 0, 1, **{**of.options, "hidden": 1, "projection": 1}).eval()
        mebin = MEBin(**self.model.binarization).fit(maps)
        self.model.map_range.copy_(torch.tensor([mebin.min_, mebin.max_], dtype=torch.float64))
        if self.method == "anomaly-clustering":
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.grid = PatchMemory(of.vit, rows=1)
        z = self._embed(images, maps)
        self.n_clusters_ = self.n_clusters or estimate_n_novel(torch.from_numpy(z), seed=self.seed)
        if self.method == "anomaly-clustering":
            labels = AgglomerativeClustering(self.n_clusters_).fit_predict(z)
        else:
            labels = KMeans(self.n_clusters_, n_init=10, random_state=self.seed).fit_predict(z)
        kept, self.labels_ = np.unique(labels, return_inverse=True)  # fewer, if images have equal embeddings
        self.n_clusters_ = len(kept)
        self._means = np.stack([z[self.labels_ == k].mean(0) for k in range(self.n_clusters_)])
        self.transform = self._transform
        return self

    def _of(self, x: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
        rows = x[:, 0].astype(int)
        return [self.sorting.inspection.images[k] for k in rows], [self.sorting.maps[k] for k in rows]

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Cluster of each image."""
        images, maps = self._of(x)
        if self.method == "anomalyncd":
            given = None if self.model.detector is not None else maps
            return np.asarray(self.model.predict(images, given).probabilities.argmax(1).numpy())
        return np.asarray(pairwise_distances_argmin(self._embed(images, maps), self._means))

    def _transform(self, x: np.ndarray) -> np.ndarray:
        return self._embed(*self._of(x))

    @torch.no_grad()
    def _embed(self, images: list[Any], maps: list[np.ndarray]) -> np.ndarray:
        """One vector of length 1 for each image: of all of it, of its largest crop, or of its anomalous patches."""
        model, size = self.model, self.model.size
        if self.method == "anomaly-clustering":
            found = []
            for image, one in zip(images, maps, strict=True):
                f = self.grid.features(image)
                area = torch.from_numpy(np.asarray(one, np.float64))[None, None]
                weight = F.adaptive_avg_pool2d(area, (len(f), f.shape[1]))[0, 0].float()
                weight = weight - weight.min()
                found.append((weight.unsqueeze(-1) * f).sum((0, 1)) / weight.sum().clamp(min=1e-12))
            z = torch.stack(found)
        elif self.method == "kmeans-images":
            whole = [F.interpolate(image[None], (size, size), antialias=True, mode="bilinear") for image in images]
            parts = torch.cat(whole).split(32)
            z = torch.cat([model(part, torch.ones(len(part), 1, size, size)).embedding for part in parts])
        else:
            crops = model.crops(images, maps)
            order = np.lexsort((crops.areas.numpy(), crops.image_id.numpy()))
            largest = order[np.cumsum(np.bincount(crops.image_id.numpy())) - 1]  # the last of each image
            views, parts = CropViews(size), torch.from_numpy(largest).split(32)
            cut = [views.central(crops.images[part], crops.masks[part]) for part in parts]
            z = torch.cat([model(*one).embedding for one in cut])
        return np.asarray(F.normalize(z, dim=-1).double().numpy())


def _maps(inspection: Inspection, vit: Any) -> list[np.ndarray]:
    """The maps of the folder, or those of a detector made from all good images."""
    if inspection.maps is not None:
        return inspection.maps
    if inspection.good is None or len(inspection.good) < 2:
        raise DataError("good: without maps expected at least two good images, from which to make them")
    return [np.asarray(one) for one in PatchMemory(vit).fit(inspection.good)(inspection.images)]


def _vit(encoder: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(encoder, dict):
        return encoder
    return DINO if encoder is None else {"model_name": encoder, "pretrained": True}


def read_truth(folder: str | Path, names: Sequence[str]) -> np.ndarray:
    """Class folder of the image of each name, None where there is none.

    Raises
    ------
    DataError
        If none of the names is there.
    """
    of_name = {file.stem: file.parent.name for file in list_photos(Path(folder))}
    found = np.array([of_name.get(Path(name).name) for name in names], object)
    if all(one is None for one in found):
        raise DataError(f"{folder}: none of its images has the name of an unlabelled one")
    return found


def compare_sorting(
    folder: str | Path,
    methods: Sequence[str] | None = None,
    *,
    truth: str | Path | None = None,
    n_novel: int | None = None,
    reference: str = "kmeans-images",
    seeds: int = 5,
    encoder: str | dict[str, Any] | None = None,
    out: str | Path = "report",
    workers: int = 1,
    command: str = "",
    quiet: bool = False,
    options: dict[str, Any] | None = None,
    **training: Any,
) -> DiscoveryComparison:
    """Compare ways to sort the unlabelled images of an inspected product by the type of their defects.

    Parameters
    ----------
    folder : path
        Layout of [`inspection`][classact.data.inspection].
    methods : sequence of str
        ``kmeans-images`` and ``kmeans-crops``: k-means on the transformer's embeddings of whole images, or of the
        largest anomaly of each; ``anomaly-clustering``: Ward's clustering of patches weighted by their scores (Sohn et
        al., 2023); ``anomalyncd``.
    truth : path, optional
        Folder with the same images in class folders, for scoring only.
    n_novel : int, optional
        Number of classes, the normal one included; by default every method estimates it.
    encoder : str or dict, optional
        Vision transformer of timm, with its pretrained weights, or arguments of ``timm.create_model``; DINO ViT-B/8 by
        default.
    options, training
        Of [`AnomalyNCD`][classact.discover.AnomalyNCD] and
        [`train_anomalyncd`][classact.discover.train_anomalyncd].
    reference, seeds, out, workers, command, quiet
        As in [`compare_discovery`][classact.tasks.discovery.compare_discovery].

    Raises
    ------
    StudyError, DataError
        If a name or the data do not fit.
    """
    inspection = open_inspection(folder)
    n = len(inspection.images)
    names = list(dict.fromkeys([reference, *(methods or METHODS)]))
    if unknown := [name for name in names if name not in METHODS]:
        raise StudyError(f"{unknown[0]}: no such method. For inspected products there are {', '.join(METHODS)}")
    if n < 8:
        raise StudyError(f"{folder}: {n} unlabelled images; expected at least 8 to look for classes in")
    if seeds < 2:
        raise StudyError(f"seeds: expected at least 2, got {seeds}")
    if n_novel is not None and not 2 <= n_novel <= n // 2:
        raise StudyError(f"n_novel: expected 2 to {n // 2} for {n} images, got {n_novel}")
    true = None if truth is None else read_truth(truth, inspection.names)
    vit = _vit(encoder)
    sorting = Sorting(inspection, _maps(inspection, vit), vit, dict(options or {}), training)
    y, title = np.full(n, -1), Path(folder).resolve().name
    rows = torch.stack([_thumbnail(image) for image in inspection.images]).flatten(1).numpy()
    study = DiscoveryStudy(np.arange(n)[:, None], y, sorting, agreement, n_novel, 0, rows)
    definition = {
        "task": "ncd-image",
        "data": {"name": title, "images": n, "sum": float(rows.sum())},
        "n_novel": n_novel,
        "encoder": str(vit.get("model_name")),
        "options": {key: str(value) for key, value in {**sorting.options, **training}.items()},
    }
    jobs = {(name, seed, False): Job(f"{name}-{seed}", (name, seed, False)) for name in names for seed in range(seeds)}
    with Store(Path(out) / "study", definition) as store:
        done = run_jobs(run_cell, study, list(jobs.values()), store, workers, "ncd-image", quiet)
        cells = {key: done[job.key] for key, job in jobs.items()}
        arrays = {(name, seed): store.arrays(job.key) for (name, seed, _), job in jobs.items()}
    found = judge(study, "ncd-image", title, names, reference, cells, arrays, true)
    found.facts = {
        "Data": f"{title}: {n:,} unlabelled images",
        "Anomaly maps": "given" if inspection.maps is not None else "of a small detector made from the good images",
        "Base classes": ", ".join(sorted(set(inspection.base.labels))) if inspection.base else "none",
        "Number of classes": str(n_novel) if n_novel else "estimated by every method",
        "Transformer": str(vit.get("model_name")),
        "Images": "a quarter is held out, drawn anew for each seed",
        "Intervals": f"95 %, over {seeds} seeds; they do not say what another product would give",
    }
    write_discovery_report(found, Path(out), command)
    return found


def _thumbnail(image: torch.Tensor) -> torch.Tensor:
    size = (THUMBNAIL, THUMBNAIL)
    return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


@dataclass(frozen=True)
class Sorted:
    """What `sort_defects` found: the fitted network, and its predictions for the unlabelled images."""

    model: AnomalyNCD
    inspection: Inspection
    predictions: Predictions

    @property
    def confidence(self) -> np.ndarray:
        """Largest probability (I,) of each image."""
        return np.asarray(self.predictions.probabilities.amax(1).numpy())

    @property
    def names(self) -> list[str]:
        """Classes that images were put into, the largest first, "unsure" last."""
        labels, counts = np.unique(self.predictions.labels, return_counts=True)
        order = sorted(zip(labels.tolist(), counts.tolist(), strict=True), key=lambda one: (one[0] == UNSURE, -one[1]))
        return [name for name, _ in order]


def sort_defects(
    folder: str | Path,
    *,
    n_novel: int | None = None,
    unsure_below: float = 0.5,
    encoder: str | dict[str, Any] | None = None,
    seed: int = 0,
    out: str | Path = "report",
    command: str = "",
    options: dict[str, Any] | None = None,
    **training: Any,
) -> Sorted:
    """Sort the unlabelled images of an inspected product by the type of their defects, and save the network.

    Written to `out`: ``labelled.csv`` (image, class, confidence), ``regions.csv`` (every region with its box, class and
    confidence), ``report.html`` with the surest images of each class, and ``model.safetensors``, which
    [`load`][classact.discover.load] reads; its ``predict`` takes tomorrow's photos, and their maps unless the network
    has a detector of its own.

    Parameters
    ----------
    folder, n_novel, encoder, options, training, command
        As in [`compare_sorting`][classact.tasks.inspection.compare_sorting].
    unsure_below : float
        Images whose largest probability is smaller are "unsure".
    seed : int
        Of the training.
    """
    inspection = open_inspection(folder)
    model = fit_anomalyncd(
        **inspection.arguments(),
        n_novel=n_novel or "estimate",
        vit=_vit(encoder),
        seed=seed,
        model_options=dict(options or {}),
        **training,
    )
    predictions = model.predict(inspection.images, inspection.maps, unsure_below=unsure_below)
    found, place = Sorted(model, inspection, predictions), Path(out)
    place.mkdir(parents=True, exist_ok=True)
    classact.save(model, place / "model")
    write_atomically(place / "labelled.csv", _labelled(found).to_csv(index=False).encode())
    write_atomically(place / "regions.csv", _regions(found).to_csv(index=False).encode())
    write_atomically(place / "report.html", _page(found, Path(folder).resolve().name, unsure_below, command).encode())
    return found


def _labelled(found: Sorted) -> Any:
    import pandas as pd

    table = {"item": found.inspection.names, "class": found.predictions.labels}
    return pd.DataFrame(table | {"confidence": np.round(found.confidence, 3)})


def _regions(found: Sorted) -> Any:
    import pandas as pd

    regions, real = found.predictions.regions, found.predictions.regions.areas > 0
    boxes = regions.boxes[real].numpy()
    return pd.DataFrame(
        {
            "item": [found.inspection.names[k] for k in regions.image_id[real].tolist()],
            **dict(zip(("left", "top", "right", "bottom"), boxes.T, strict=True)),
            "area": regions.areas[real].numpy().astype(int),
            "class": [name for name, kept in zip(found.predictions.region_labels, real.tolist(), strict=True) if kept],
            "confidence": np.round(found.predictions.region_probabilities[real].amax(1).numpy(), 3),
        }
    )


def _page(found: Sorted, title: str, unsure_below: float, command: str) -> str:
    escape, labels = html.escape, np.array(found.predictions.labels)
    sections = []
    for name in found.names:
        mine = np.flatnonzero(labels == name)
        surest = mine[np.argsort(-found.confidence[mine], kind="stable")][:TYPICAL]
        stream = base64.b64encode(_pictures(found, surest)).decode()
        files = ", ".join(escape(found.inspection.names[k]) for k in surest)
        sections.append(
            f"<h2>{escape(name)}: {len(mine):,} images, mean confidence {found.confidence[mine].mean():.2f}</h2>"
            f'<img alt="surest images" src="data:image/png;base64,{stream}"><p><small>{files}</small></p>'
        )
    inspection = found.inspection
    base = ", ".join(sorted(set(inspection.base.labels))) if inspection.base else "none: trained without them"
    facts = {
        "Data": f"{title}: {len(inspection.images):,} unlabelled images",
        "Anomaly maps": "given" if inspection.maps is not None else "of a small detector made from the good images",
        "Base classes": base,
        "Unsure": f"images whose largest probability is below {unsure_below:g}",
        "Confidence": "probability that the network gives; it was not calibrated, since no label is there to do so",
        "Versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Defects of {escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{len(set(found.names) - {UNSURE})} classes of images</h1><small>in {escape(title)}</small>
<div class="summary"><p>Images were sorted by the type of their defects. "normal" is where images with a low anomaly
score are drawn; nothing forces good images there, so look at every class. Boxes are the judged regions.</p></div>
{"".join(sections)}
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(command)}</pre>
<p>Beside this page: <code>labelled.csv</code>, <code>regions.csv</code>, <code>model.safetensors</code>
(<code>classact.discover.load</code>, then <code>predict</code>).</p>
</body></html>
"""


def _pictures(found: Sorted, images: np.ndarray) -> bytes:
    from matplotlib.patches import Rectangle

    figure = new_figure(1.6 * TYPICAL, 1.7)
    grid = figure.subplots(1, TYPICAL, squeeze=False)[0]
    regions = found.predictions.regions
    for axes in grid:
        axes.set_axis_off()
    for axes, k in zip(grid, images.tolist(), strict=False):
        axes.imshow(found.inspection.images[k].permute(1, 2, 0).numpy(), vmin=0, vmax=1)
        axes.set_title(f"{found.confidence[k]:.2f}", fontsize=8)
        for row in torch.nonzero((regions.image_id == k) & (regions.areas > 0)).squeeze(1).tolist():
            left, top, right, bottom = regions.boxes[row].tolist()
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="C1", lw=1.2))
    return png(figure)
