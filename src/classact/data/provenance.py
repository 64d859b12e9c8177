"""What the files of bags say of how their features were made. What they do not say stays unknown; nothing is guessed.

| written by | attributes of | encoder | side of a tile | magnification | level 0 of the slide |
| --- | --- | --- | --- | --- | --- |
| TRIDENT | ``features``, ``coords`` | ``encoder`` | ``patch_size_level0`` | ``target_magnification`` | ``level0_width``, ``level0_height`` |
| CLAM | ``coords`` in ``patches/`` | - | ``patch_size`` times ``downsample`` | - | ``level_dim`` times ``downsample`` |
| STAMP | the file | ``extractor`` | ``tile_size_um``, or ``tile_size`` where ``unit`` is ``um`` | - | - |

TRIDENT (``coords_to_h5`` in ``trident/IO.py``, ``extract_patch_features`` in ``trident/wsi_objects/WSI.py``) writes the
attributes of ``coords`` to ``patches/<slide>_patches.h5`` and copies them to the features; its ``patch_size`` is at the
target magnification, not at level 0, and so are the pixels in the name of its folder. ``encoder`` came with later
versions; the folder ``features_<encoder>`` says the same. CLAM (``process_contour`` in ``wsi_core/WholeSlideImage.py``,
``extract_features_fp.py``) writes attributes to ``patches/<slide>.h5`` only, with ``patch_size`` in pixels of
``patch_level`` and ``downsample`` a pair; forks that shrink tiles further say so in ``custom_downsample``, as TRIDENT
reads them. STAMP (``preprocessing/__init__.py``, ``get_coords`` in ``modeling/data.py``) measures in micrometres;
files of its version 1, without a unit, use pixels of its own, which are neither and stay unknown.
"""  # noqa: E501

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from classact.data.bag_files import FEATURE_KEYS, TRIDENT_FOLDER, Source, _open_h5

CLAM_FOLDERS = ("h5_files", "pt_files")


@dataclass(frozen=True)
class Provenance:
    """How the features of one bag were made; None where its files do not say.

    Attributes
    ----------
    encoder : str or None
        Name of the network that made the features, such as ``uni_v1``.
    patch_size : float or None
        Side of a square tile in the unit of the coordinates.
    magnification : float or None
        Magnification at which the tiles were read, such as 20.
    unit : {"pixel", "um"} or None
        Unit of the coordinates: pixels of level 0, or micrometres.
    """

    encoder: str | None = None
    patch_size: float | None = None
    magnification: float | None = None
    unit: str | None = None


def provenance(source: Source) -> Provenance:
    """Read what the file of a bag, the names of its folders and CLAM's or TRIDENT's ``patches/`` say of it.

    Parameters
    ----------
    source : Source
        A bag as found by [`find_bags`][classact.data.bag_files.find_bags]. Features are not read.

    Raises
    ------
    DataError
        If an HDF5 file is missing or damaged.
    """
    if source.arrays is not None:  # of many bags in one table; holds no tiles
        return Provenance()
    own = _attributes(source.path, source.key) if source.path.suffix in (".h5", ".hdf5") else {}
    folder = source.path.parent
    encoder, magnification, root = _text(own.get("encoder", own.get("extractor"))), None, None
    if TRIDENT_FOLDER.match(folder.parent.name):
        root = folder.parent
        magnification = float(root.name.partition("x")[0])
        if folder.name.startswith("features_"):
            encoder = encoder or folder.name.removeprefix("features_")
    elif folder.name in CLAM_FOLDERS:
        root = folder.parent
    elif folder.parent.name in CLAM_FOLDERS:
        root = folder.parent.parent
        encoder = encoder or folder.name
    patch_size, unit = _tile(own)
    if patch_size is None and root is not None:
        names = (source.path.name[: -len(source.path.suffix)], source.id)
        places = [root / "patches", root.parent / "patches"]
        if file := next(filter(None, (patches_file(place, name) for place in places for name in names)), None):
            own |= _attributes(file)
            patch_size, unit = _tile(own)
    return Provenance(encoder, patch_size, _number(own.get("target_magnification")) or magnification, unit)


def patches_file(folder: Path, slide: str) -> Path | None:
    """Return the file of a slide's tiles in a ``patches/`` folder of CLAM or TRIDENT, or None."""
    return next((f for name in (f"{slide}.h5", f"{slide}_patches.h5") if (f := folder / name).is_file()), None)


def read_patches(file: Path) -> tuple[Provenance, tuple[float, float] | None]:
    """Read what a file of CLAM's or TRIDENT's ``patches/`` says of a slide.

    Returns
    -------
    provenance : Provenance
        Without an encoder.
    size : (width, height) or None
        The slide in pixels of level 0.

    Raises
    ------
    DataError
        If the file is damaged.
    """
    own = _attributes(file)
    size = _pair(own, "level0_width", "level0_height")
    if size is None and (level := _pair(own, "level_dim")) and (factor := _downsample(own)):
        size = float(round(level[0] * factor[0])), float(round(level[1] * factor[1]))
    patch_size, unit = _tile(own)
    return Provenance(None, patch_size, _number(own.get("target_magnification")), unit), size


def summarise(bags: Sequence[Provenance]) -> dict[str, Any]:
    """Put the provenance of many bags into one dict: field -> what all say, or the sorted list of what they say.

    A field is None if no bag says it. Where some bags do not say, the list starts with None.
    """
    summary = {}
    for field in fields(Provenance):
        values = sorted({getattr(bag, field.name) for bag in bags}, key=lambda v: (v is not None, v))
        summary[field.name] = values if len(values) > 1 else values[0] if values else None
    return summary


def _attributes(path: Path, key: str | None = None) -> dict[str, Any]:
    """Attributes of a file, or a group in it, with those of its features and its coordinates."""
    with _open_h5(path) as file:
        node = file[key] if key else file
        parts = [node, *(node[name] for name in (*FEATURE_KEYS, "coords") if name in node)]
        return {name: value for part in parts for name, value in part.attrs.items()}


def _tile(own: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Side of a tile, and the unit of the coordinates."""
    if size := _number(own.get("patch_size_level0")):
        return size, "pixel"
    if "patch_level" in own:  # CLAM; TRIDENT has a patch_size too, but at the target magnification
        size, factor = _number(own.get("patch_size")), _downsample(own)
        # both sides of the pair are the level's whole numbers of pixels, rounded: they differ by a fraction of 1 %
        return (float(round(size * sum(factor) / 2)) if size and factor else None), "pixel"
    unit = "um" if _text(own.get("unit")) == "um" or "tile_size_um" in own else None
    size = _number(own.get("tile_size_um")) or (_number(own.get("tile_size")) if unit else None)
    return size, unit


def _downsample(own: Mapping[str, Any]) -> tuple[float, float] | None:
    """Pixels of level 0 in a pixel of CLAM's tiles, across and down."""
    factor = _pair(own, "downsample") or ((1.0, 1.0) if _number(own.get("patch_level"), zero=True) == 0 else None)
    more = _number(own.get("custom_downsample", 1))
    return (factor[0] * more, factor[1] * more) if factor and more else None


def _text(value: Any) -> str | None:
    text = value.decode() if isinstance(value, bytes) else None if value is None else str(value)
    return None if text in (None, "", "None") else text  # TRIDENT writes None as text


def _number(value: Any, zero: bool = False) -> float | None:
    """Return a positive (or zero) number, or None."""
    try:
        number = float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and (number > 0 or (zero and number == 0)) else None


def _pair(own: Mapping[str, Any], *names: str) -> tuple[float, float] | None:
    """Two positive numbers, of one attribute or two; one number stands for both."""
    values = [_number(v) for name in names for v in np.asarray(own.get(name), dtype=object).ravel()]
    first, last = (values[0], values[-1]) if len(values) in (1, 2) else (None, None)
    return (first, last) if first and last else None
