"""Heat maps of instance scores: GeoJSON for QuPath, and pictures.

QuPath (0.4 and later; ``QuPathTypeAdapters`` and ``GsonTools`` in its ``qupath/lib/io``) reads a FeatureCollection in
pixels of the full-resolution image. ``properties.objectType`` "tile" makes the kind of detection that its measurement
maps fill without outlines; ``properties.measurements`` is a dict of numbers, ``properties.classification`` a dict that
needs both ``name`` and ``color``, and ``properties.color`` is what an object shows without a measurement map.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classact.data.bag_files import SLIDE_SUFFIXES, DataError, _open_h5, bag_id
from classact.data.provenance import patches_file, read_patches
from classact.evidence.instance_scores import read_items
from classact.evidence.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

CLASS_WISE = ("attention x class logit", "instance logit")  # preferred in this order; then "attention"
THUMBNAIL = 1000  # pixels of the longer side, as TRIDENT's; pictures are drawn finer, so that none is lost


@dataclass(frozen=True)
class Heatmaps:
    """What was written, and what was not: (item, reason) for every item or picture left out."""

    files: list[Path] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Item:
    """One item as drawn: corners (K, 2) and side of its tiles in level-0 pixels, scores (K,), words about both."""

    id: str
    corners: np.ndarray
    side: float
    scores: np.ndarray
    drawn: str  # such as "attention (abmil)"
    signed: bool  # class-wise logits: zero means neither for nor against
    title: str
    predicted: str | None
    classes: list[str]


def write_heatmaps(
    scores: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    score: str | None = None,
    class_: str | None = None,
    patch_size: float | None = None,
    patches: str | Path | None = None,
    slides: str | Path | None = None,
    sizes: str | Path | None = None,
    mpp: float | None = None,
    items: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Heatmaps:
    """Write ``<item>.geojson`` for QuPath and ``<item>.png`` for every item with coordinates.

    Parameters
    ----------
    scores : path
        ``instance_scores.h5``, or the folder that holds it.
    out : path
        Folder for the files; made if missing. Files of the same items there are replaced.
    method : str, optional
        Whose scores to draw. Default: the only one.
    score : str, optional
        Which of its scores. Default: ``"attention x class logit"``, else ``"instance logit"``, else ``"attention"``.
    class_ : str, optional
        For class-wise scores, the class. Default: the one predicted for the item, else the last one.
    patch_size : float, optional
        Side of a tile in the unit of the coordinates. Default: what the item's group in `scores` or its file in
        `patches` says. It is never derived from the distances of the tiles, which may overlap or leave gaps.
    patches : path, optional
        CLAM's or TRIDENT's folder ``patches/``, or the folder that holds it.
    slides : path, optional
        Folder of thumbnails of whole slides (``<item>.jpg`` or ``.png``, as in TRIDENT's ``thumbnails/``), or of the
        slides, which needs openslide-python. Without it pictures have an empty background.
    sizes : path, optional
        CSV file with columns ``slide_id``, ``width`` and ``height``: slides in pixels of level 0, where neither a
        slide nor a file in `patches` says it. Needed to lay tiles on a thumbnail.
    mpp : float, optional
        Micrometres per pixel of level 0, for coordinates in micrometres (STAMP).
    items : sequence of str, optional
        Which items to draw. Default: all.
    progress : callable, optional
        Called with the number of items done and of all.

    Returns
    -------
    Heatmaps
        The files written, and what was left out and why.

    Raises
    ------
    DataError
        If a file, a method, a score, an item or a class is not there, if the side of the tiles is not known, if the
        coordinates are micrometres and `mpp` is not given, or if nothing could be written at all. Apart from the last,
        it is raised before anything is written.
    ModuleNotFoundError
        If `slides` holds whole slides and openslide-python is missing.
    """
    path, out = Path(scores), Path(out)
    path = path / "instance_scores.h5" if path.is_dir() else path
    if not path.exists():
        raise DataError(f"{path}: no such file; `classact compare` and `classact predict` write it")
    for name, value in (("patch_size", patch_size), ("mpp", mpp)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise DataError(f"{name}: expected a positive number, got {value}")
    for name, folder in (("patches", patches), ("slides", slides)):
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"{name}: {folder}: no such folder")
    backgrounds = None if slides is None else _Backgrounds(Path(slides), sizes)
    done = Heatmaps()
    with _open_h5(path) as file:
        classes = [_text(name) for name in np.ravel(file.attrs.get("classes", []))]
        groups = {name: file[name] for name in read_items(file)}
        names = _chosen(path, list(groups), items)
        method, kinds = _method(path, groups, method)
        if score is not None and score not in kinds:
            raise DataError(f"{path}: no score {score!r} of {method}; there are: {', '.join(kinds)}")
        if class_ is not None and class_ not in classes:
            raise DataError(f"{path}: no class {class_!r}; there are: {', '.join(classes) or 'none named'}")
        places = {}  # first for all, so that what is missing is said before anything is written
        for name in names:
            if (reason := _unfit(groups[name], method, score)) is not None:
                done.skipped.append((name, reason))
            else:
                places[name] = _place(groups[name], name, patch_size, patches, mpp)
        if places:
            out.mkdir(parents=True, exist_ok=True)
        for number, (name, (side, scale, size)) in enumerate(places.items(), 1):
            item = _read(groups[name], name, method, score, class_, classes, side, scale)
            if isinstance(item, str):
                done.skipped.append((name, item))
            else:
                write_atomically(out / f"{name}.geojson", geojson(item))
                done.files.append(out / f"{name}.geojson")
                picture = None if backgrounds is None else backgrounds.of(name, size)
                if isinstance(picture, str):
                    done.skipped.append((name, f"no picture: {picture}"))
                else:
                    write_atomically(out / f"{name}.png", _png(item, picture))
                    done.files.append(out / f"{name}.png")
            if progress is not None:
                progress(number, len(places))
    if not done.files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in done.skipped[:3]) or "it holds no items"
        raise DataError(f"{path}: nothing to draw ({reasons})")
    return done


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _chosen(path: Path, known: list[str], wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return known
    if unknown := [name for name in wanted if name not in known]:
        raise DataError(f"{path}: no item {', '.join(unknown[:5])}; there are: {', '.join(known[:5])}, ...")
    return list(wanted)


def _method(path: Path, groups: dict[str, Any], wanted: str | None) -> tuple[str, list[str]]:
    """The method to draw, and the names of its scores in any item."""
    kinds: dict[str, dict[str, None]] = {}
    for item in groups.values():
        for name, node in item.items():
            if hasattr(node, "keys"):  # a group; "coords" is a data set
                kinds.setdefault(name, {}).update(dict.fromkeys(node))
    there = ", ".join(kinds) or "none"
    if wanted is None and len(kinds) != 1:
        raise DataError(f"{path}: holds scores of several methods; choose one with --method: {there}" if kinds else
                        f"{path}: holds no scores of any method")  # fmt: skip
    wanted = wanted or next(iter(kinds))
    if wanted not in kinds:
        raise DataError(f"{path}: no scores of {wanted!r}; there are: {there}")
    return wanted, list(kinds[wanted])


def _unfit(group: Any, method: str, score: str | None) -> str | None:
    """Why an item cannot be drawn, by names alone."""
    if "coords" not in group:
        return "its tiles have no coordinates"
    if method not in group:
        return f"no scores of {method}"
    if score is not None and score not in group[method]:
        return f"no score {score!r} of {method}"
    return None


def _place(
    group: Any, name: str, patch_size: float | None, patches: str | Path | None, mpp: float | None
) -> tuple[float, float, tuple[float, float] | None]:
    """Side of the tiles in pixels, pixels per unit of the coordinates, and the slide's size where a file says it."""
    side, unit, size = patch_size or group.attrs.get("patch_size"), group.attrs.get("coords_unit"), None
    if patches is not None:
        folder = Path(patches)
        file = patches_file(folder / "patches" if (folder / "patches").is_dir() else folder, name)
        if file is not None:
            made, size = read_patches(file)
            side, unit = side or made.patch_size, unit or made.unit
    unit = None if unit is None else _text(unit)
    if not side:
        raise DataError(
            f"{name}: the side of its tiles is not known; give it with --patch-size, in the unit of the coordinates "
            "(level-0 pixels for CLAM and TRIDENT), or CLAM's or TRIDENT's folder with --patches"
        )
    if unit == "pixel" and mpp is not None:
        raise DataError(f"{name}: its coordinates are pixels already; leave out --mpp")
    if unit == "um" and mpp is None:
        raise DataError(
            f"{name}: its coordinates are micrometres, and slides are drawn in pixels; give the micrometres per pixel "
            "of level 0 with --mpp"
        )
    if mpp is None and (np.asarray(group["coords"][:1000]) % 1 != 0).any():
        raise DataError(
            f"{name}: its coordinates are no whole numbers, so not pixels of level 0; if they are micrometres, give "
            "the micrometres per pixel of level 0 with --mpp"
        )
    scale = 1.0 if mpp is None else 1 / mpp
    return float(side) * scale, scale, size


def _read(
    group: Any,
    name: str,
    method: str,
    score: str | None,
    class_: str | None,
    classes: list[str],
    side: float,
    scale: float,
) -> _Item | str:
    """Read the scores of an item, or say why they cannot be drawn."""
    node = group[method]
    kind = score or next((k for k in (*CLASS_WISE, "attention") if k in node), None)
    if kind is None:
        return f"no score of {method} that is drawn by default; name one of: {', '.join(node)}"
    corners, values = np.asarray(group["coords"], dtype=np.float64)[:, :2] * scale, np.asarray(node[kind])
    predicted = _text(node.attrs["predicted"]) if "predicted" in node.attrs else None
    drawn, signed = f"{kind} ({method})", values.ndim == 2
    if values.ndim == 2:
        if values.shape[1] != len(classes):
            return f"{kind!r} has {values.shape[1]} columns for {len(classes)} classes"
        shown = class_ or (predicted if predicted in classes else classes[-1])
        values, drawn = values[:, classes.index(shown)], f"{kind} for {shown} ({method})"
    elif class_ is not None:
        return f"{kind!r} of {method} is one number a tile, not one a class; leave out --class"
    if len(values) != len(corners) or not len(values):
        return f"{len(values)} scores for {len(corners)} tiles"
    if not np.isfinite(values).all():
        return f"{kind!r} of {method} holds NaN or infinity"
    words = []
    if predicted is not None:
        p = np.ravel(node.attrs.get("probabilities", []))
        sure = f" ({p[classes.index(predicted)]:.2f})" if predicted in classes and len(p) == len(classes) else ""
        words.append(f"predicted {predicted}{sure}")
    if label := _text(group.attrs.get("label", "")):
        words.append(f"label {label}")
    title = "\n".join([name, drawn, ", ".join(words)]).rstrip()
    return _Item(name, corners, side, values.astype(np.float64), drawn, signed, title, predicted, classes)


def percentiles(scores: np.ndarray) -> np.ndarray:
    """Share of the slide's tiles with a lower score, in percent; ties count half, the tile itself among them.

    Parameters
    ----------
    scores : (K,)
        Any numbers.

    Returns
    -------
    (K,)
        Between 0 and 100, mean 50.
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - count / 2)[place] / len(scores) * 100


def _colours(item: _Item) -> "tuple[Colormap, Normalize]":
    """Colours of the scores; the highest percent shares one, so that a few tiles do not leave the rest dark."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    if item.signed:  # zero in the middle
        top = np.percentile(np.abs(item.scores), 99) or np.abs(item.scores).max() or 1.0
        return colormaps["coolwarm"], Normalize(-top, top)
    low, top = item.scores.min(), np.percentile(item.scores, 99)
    top = top if top > low else item.scores.max()
    return colormaps["inferno"], Normalize(low, top if top > low else low + (abs(low) or 1.0))


def geojson(item: _Item) -> bytes:
    """FeatureCollection with a square per tile: score, percentile, colour, and the item's predicted class."""
    from matplotlib import colormaps

    cmap, norm = _colours(item)
    whole = not (item.corners % 1).any() and not item.side % 1
    edges = [item.corners, item.corners + item.side]
    first, last = (edge.astype(np.int64) if whole else edge.round(2) for edge in edges)
    shared: dict[str, Any] = {"objectType": "tile", "name": item.drawn}
    if item.predicted is not None:
        place = item.classes.index(item.predicted) if item.predicted in item.classes else 0
        colour = [round(255 * c) for c in colormaps["tab10"](place % 10)[:3]]
        shared["classification"] = {"name": item.predicted, "color": colour}
    start = json.dumps(shared)[:-1].replace("%", "%%")
    tile = (
        '{"type":"Feature","geometry":{"type":"Polygon","coordinates":'
        "[[[%s,%s],[%s,%s],[%s,%s],[%s,%s],[%s,%s]]]},"
        f'"properties":{start},"color":[%d,%d,%d],"measurements":{{"score":%.7g,"percentile":%.6g}}}}}}'
    )
    (x0, y0), (x1, y1) = first.T.tolist(), last.T.tolist()
    rgb = cmap(norm(item.scores), bytes=True)[:, :3].T.tolist()
    ring = (x0, y0, x1, y0, x1, y1, x0, y1, x0, y0)  # clockwise as seen on the slide, whose y points down
    rows = zip(*ring, *rgb, item.scores.tolist(), percentiles(item.scores).tolist(), strict=True)
    head = {"type": "FeatureCollection", "description": item.title.replace("\n", "; ")}
    return (json.dumps(head)[:-1] + ',"features":[\n' + ",\n".join(map(tile.__mod__, rows)) + "\n]}\n").encode()


def average_tiles(
    corners: np.ndarray, side: np.ndarray, scores: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Average the scores of square tiles in every pixel, weighted by the area of it that they cover.

    Parameters
    ----------
    corners : (K, 2)
        Upper left x and y of each tile in pixels of the grid, not necessarily whole.
    side : (2,)
        Width and height of a tile in pixels of the grid.
    scores : (K,)
        One number a tile.
    shape : (height, width)
        Of the grid; what lies outside is cut off.

    Returns
    -------
    mean : (height, width)
        NaN where there is no tile.
    coverage : (height, width)
        Area of each pixel that tiles cover, counted once for every tile.
    """
    ends = []
    for axis, n in ((1, shape[0]), (0, shape[1])):
        # Along one axis a tile covers pixel i by F_i(end) - F_i(start), with F_i(t) = clip(t - i, 0, 1). The steps
        # F_i - F_(i-1) differ from 0 at two pixels only, so a tile is four entries in a difference array.
        at, weight = [], []
        for sign, edge in ((-1.0, corners[:, axis]), (1.0, corners[:, axis] + side[axis])):
            edge = np.clip(edge, 0, n)
            pixel = np.floor(edge).astype(np.int64)
            at += [pixel, pixel + 1]
            weight += [sign * (edge - pixel - 1), sign * (pixel - edge)]
        ends.append((at, weight, n + 2))
    (rows, row_weights, height), (columns, column_weights, width) = ends
    total, coverage = np.zeros(height * width), np.zeros(height * width)
    for row, by_row in zip(rows, row_weights, strict=True):
        for column, by_column in zip(columns, column_weights, strict=True):
            place, weight = row * width + column, by_row * by_column
            coverage += np.bincount(place, weight, height * width)
            total += np.bincount(place, weight * scores, height * width)
    total, coverage = (
        grid.reshape(height, width).cumsum(0).cumsum(1)[: shape[0], : shape[1]] for grid in (total, coverage)
    )
    coverage[coverage < 1e-6 * min(1.0, side[0] * side[1])] = 0  # what rounding leaves beside the tiles
    mean = np.full(shape, np.nan)
    np.divide(total, coverage, out=mean, where=coverage > 0)
    return np.clip(mean, scores.min(), scores.max(), out=mean), coverage


def _png(item: _Item, background: "tuple[np.ndarray, tuple[float, float]] | None") -> bytes:
    """Picture of the tiles over a thumbnail (height, width, 3) of a slide of that (width, height), or over nothing."""
    from matplotlib.figure import Figure

    if background is None:  # the tiles alone decide what is seen
        start = item.corners.min(0)
        extent = item.corners.max(0) + item.side - start
        shape = np.maximum(np.round(extent * THUMBNAIL / extent.max()), 1)[::-1].astype(int)
    else:
        start, extent, shape = np.zeros(2), np.array(background[1]), np.array(background[0].shape[:2])
    per_pixel = shape[::-1] / extent
    mean, _ = average_tiles(
        (item.corners - start) * per_pixel, item.side * per_pixel, item.scores, (int(shape[0]), int(shape[1]))
    )
    cmap, norm = _colours(item)
    wide = extent[0] / extent.max()
    figure = Figure((max(5.0, 8 * wide + 1.5), max(3.0, 8 * extent[1] / extent.max() + 0.8)), layout="constrained")
    axes = figure.subplots()
    limits = (start[0], start[0] + extent[0], start[1] + extent[1], start[1])
    if background is not None:
        axes.imshow(background[0], extent=limits)
    image = axes.imshow(
        np.ma.masked_invalid(mean),
        extent=limits,
        cmap=cmap,
        norm=norm,
        alpha=None if background is None else 0.5,
        interpolation="nearest",
    )
    beyond = (item.scores.max() > norm.vmax, item.signed and item.scores.min() < norm.vmin)
    extend = {(True, True): "both", (True, False): "max", (False, True): "min", (False, False): "neither"}[beyond]
    figure.colorbar(image, ax=axes, label=item.drawn, extend=extend, shrink=0.8)
    axes.set_title(item.title, fontsize=9)
    axes.set_xlabel("pixels of level 0", fontsize=8)
    axes.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


class _Backgrounds:
    """Thumbnails of slides, with the size of each slide in pixels of level 0."""

    def __init__(self, folder: Path, sizes: str | Path | None) -> None:
        folder = folder / "thumbnails" if (folder / "thumbnails").is_dir() else folder
        self.thumbnails: dict[str, Path] = {}
        self.slides: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in (".jpg", ".jpeg", ".png"):
                self.thumbnails[bag_id(file.name[: -len(file.suffix)])] = file
            elif file.name.lower().endswith(SLIDE_SUFFIXES):
                self.slides[bag_id(file.name)] = file
        if self.slides.keys() - self.thumbnails.keys():
            _openslide()  # to say now, not after the first slide, that it is missing
        self.sizes = {} if sizes is None else _sizes(Path(sizes))

    def of(self, name: str, size: tuple[float, float] | None) -> tuple[np.ndarray, tuple[float, float]] | str:
        """Thumbnail (height, width, 3) and size (width, height) of a slide, or why there are none."""
        from PIL import Image

        thumbnail, slide = self.thumbnails.get(name), self.slides.get(name)
        if thumbnail is None and slide is None:
            return "no thumbnail or slide of this name"
        size = size or self.sizes.get(name)
        try:
            if slide is not None and (thumbnail is None or size is None):
                image, size = _open_slide(slide)
            if thumbnail is not None:
                with Image.open(thumbnail) as opened:
                    image = opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"cannot be read: {error}"
        if size is None:
            return (
                "a thumbnail alone does not say how large the slide is; give CLAM's or TRIDENT's folder with "
                "--patches, the slides, or a table with --sizes"
            )
        width, height = image.size
        if abs(width * size[1] / size[0] - height) > 2 + 0.01 * height:
            return f"the thumbnail ({width} x {height}) has other proportions than the slide ({size[0]:.0f} x {size[1]:.0f})"  # noqa: E501
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return np.asarray(image), size


def _sizes(path: Path) -> dict[str, tuple[float, float]]:
    """Read slides and their sizes from a table with columns slide_id, width and height."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = {bag_id(r["slide_id"]): (float(r["width"]), float(r["height"])) for r in csv.DictReader(file)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected a CSV file with columns slide_id, width and height, in pixels of level 0 ({error!r})"
        ) from error
    if wrong := [name for name, size in table.items() if not min(size) > 0]:
        raise DataError(f"{path}: expected positive sizes; {wrong[0]} is {' x '.join(map(str, table[wrong[0]]))}")
    return table


def _openslide() -> Any:
    try:
        import openslide
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading whole slides needs OpenSlide: pip install openslide-python openslide-bin", name="openslide"
        ) from error
    return openslide


def _open_slide(path: Path) -> tuple[Any, tuple[float, float]]:
    """Thumbnail and size of a whole slide."""
    openslide = _openslide()
    try:
        with openslide.OpenSlide(str(path)) as slide:
            width, height = slide.dimensions
            return slide.get_thumbnail((THUMBNAIL, THUMBNAIL)).convert("RGB"), (float(width), float(height))
    except openslide.OpenSlideError as error:
        raise ValueError(str(error)) from error
