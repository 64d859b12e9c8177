"""Images of an inspected product as a factory has them: a folder of good ones, one of unlabelled ones, anomaly maps.

| place | what |
| --- | --- |
| ``unlabelled/`` | images to be sorted |
| ``good/`` | images without defects, if there are any |
| ``maps/`` | an anomaly map for each unlabelled image, of the same name: grey PNG of 8 or 16 bits, floating-point TIFF, NPY, or NPZ with one array |
| ``base/<class>/`` | images of known defects, of another product, if there are any |
| ``masks/<class>/`` | where those defects are, of the same name (or name and ``_mask``); anything but black is defect |

Images may lie in subfolders; maps and masks then lie in the same ones. Images come as floats (3, H, W) in [0, 1].
"""  # noqa: E501

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classact.data.bag_files import DataError
from classact.data.photos import list_photos, read_photo

MAP_SUFFIXES = (".npy", ".npz", ".tif", ".tiff", ".png")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class LabelledDefects:
    """Known defects: images (3, H, W), masks (H, W) bool, and the class of each, in the order of a ``BaseSet``."""

    images: list[Tensor]
    masks: list[Tensor]
    labels: list[str]


@dataclass(frozen=True)
class Inspection:
    """What a folder holds; see [`open_inspection`][classact.data.inspection.open_inspection].

    Attributes
    ----------
    images : list of (3, H, W)
        Unlabelled images.
    names : list of str
        Their paths within ``unlabelled/``, without suffix.
    maps : list of (H, W) arrays, optional
        Their anomaly maps, as stored.
    good : list of (3, H, W), optional
        Images without defects.
    base : LabelledDefects, optional
        Known defects.
    """

    images: list[Tensor]
    names: list[str]
    maps: list[np.ndarray] | None
    good: list[Tensor] | None
    base: LabelledDefects | None

    def arguments(self) -> dict[str, Any]:
        """Arguments ``images``, ``maps``, ``good`` and ``base`` of ``classact.discover.fit_anomalyncd``."""
        base = None if self.base is None else (self.base.images, self.base.masks, self.base.labels)
        return {"images": self.images, "maps": self.maps, "good": self.good, "base": base}


def open_inspection(folder: str | Path) -> Inspection:
    """Read the layout of this module.

    Raises
    ------
    DataError
        If there are no unlabelled images, or neither maps nor good images; if a file is unreadable or does not fit. The
        message names the file.
    """
    folder = Path(folder)
    if not (folder / "unlabelled").is_dir():
        raise DataError(f"{folder}: expected a folder unlabelled/ with the images to be sorted")
    has_maps, has_good = ((folder / part).is_dir() for part in ("maps", "good"))
    if not has_maps and not has_good:
        raise DataError(f"{folder}: expected anomaly maps in maps/, or images without defects in good/")
    images, names = read_images(folder / "unlabelled")
    return Inspection(
        images,
        names,
        read_maps(folder / "maps", names) if has_maps else None,
        read_images(folder / "good")[0] if has_good else None,
        read_defects(folder / "base", folder / "masks") if (folder / "base").is_dir() else None,
    )


@dataclass(frozen=True)
class TestedProduct:
    """Test images of one product with their true types, as MVTec AD has them.

    Attributes
    ----------
    images : list of (3, H, W)
        Test images, without those of the folder "combined", in which defects are mixed.
    maps : list of (H, W) arrays, optional
        Their anomaly maps.
    labels : list of str
        Folder of each image, such as "good" or "crack".
    good : list of (3, H, W)
        Training images.
    """

    __test__ = False

    images: list[Tensor]
    maps: list[np.ndarray] | None
    labels: list[str]
    good: list[Tensor]


def open_product(folder: str | Path, maps: str | Path | None = None) -> TestedProduct:
    """Read ``test/<type>/`` and ``train/good/`` of a product of MVTec AD, and maps in folders of the same types.

    Raises
    ------
    DataError
        If a folder is missing, or an image or map is missing or unreadable.
    """
    folder = Path(folder)
    for part in ("test", "train/good"):
        if not (folder / part).is_dir():
            raise DataError(f"{folder}: expected a folder {part}/, as MVTec AD has it")
    images, found, labels = [], [], []
    for place in sorted(place for place in (folder / "test").iterdir() if place.is_dir() and place.name != "combined"):
        of_type, names = read_images(place)
        images += of_type
        labels += [place.name] * len(names)
        if maps is not None:
            found += read_maps(Path(maps) / place.name, names)
    return TestedProduct(images, found if maps is not None else None, labels, read_images(folder / "train/good")[0])


def read_images(folder: str | Path) -> tuple[list[Tensor], list[str]]:
    """Images of a folder and its subfolders, and their paths within it without suffix.

    Raises
    ------
    DataError
        If there is none, one is unreadable, or two have the same path but for the suffix.
    """
    folder = Path(folder)
    files = list_photos(folder)
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{folder / name}: two images of this name, so that it cannot be told whose the map is")
    return [_tensor(file) for file in files], names


def _tensor(file: Path) -> Tensor:
    return torch.from_numpy(read_photo(file)).permute(2, 0, 1).float() / 255


def read_maps(folder: str | Path, names: Iterable[str]) -> list[np.ndarray]:
    """Anomaly maps of images, as stored: (H, W) each, unsigned integers or floats.

    All maps must be on one scale. Warns if all reach one highest value, as maps do that were stretched one by one.

    Raises
    ------
    DataError
        If a map is missing or unreadable, is no single channel, or has NaN or infinite values; or if maps are of
        different types of numbers.
    """
    folder = Path(folder)
    files = [_beside(folder, name, MAP_SUFFIXES, ("",), "anomaly map") for name in names]
    maps = [_read_map(file) for file in files]
    kinds = {one.dtype.name for one in maps}
    if len(kinds) > 1:
        raise DataError(f"{folder}: expected maps of one kind, on one scale; found {' and '.join(sorted(kinds))}")
    peaks = [float(one.max()) for one in maps]
    if len(peaks) > 1 and max(peaks) - min(peaks) <= 1e-6 * abs(max(peaks)):
        warnings.warn(
            f"{folder}: all {len(maps)} maps reach the same highest value, {max(peaks):g}. Was each scaled by itself? "
            "Then normal images look as anomalous as others; scale all maps of a product together",
            RuntimeWarning,
            stacklevel=2,
        )
    return maps


def _beside(folder: Path, name: str, suffixes: tuple[str, ...], ends: tuple[str, ...], what: str) -> Path:
    found = [
        file for end in ends for suffix in suffixes if (file := folder / f"{name}{end}{suffix}").is_file()
    ]  # not with_suffix: names may hold dots
    if len(found) != 1:
        kinds = ", ".join(suffixes)
        there = f"found {len(found)}: {', '.join(file.name for file in found)}" if found else "found none"
        raise DataError(f"{folder / name}: expected one {what} of this name ({kinds}), {there}")
    return found[0]


def _read_map(file: Path) -> np.ndarray:
    if file.suffix in (".npy", ".npz"):
        try:
            content = np.load(file, allow_pickle=False)
            if file.suffix == ".npz":
                with content:
                    if len(content.files) != 1:
                        raise DataError(f"{file}: expected one array, found {', '.join(content.files) or 'none'}")
                    content = content[content.files[0]]
        except (ValueError, OSError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: not a readable array ({error})") from None
        one = content.squeeze(0) if content.ndim == 3 and len(content) == 1 else content
    else:
        one = _read_grey(file)
    if one.ndim != 2 or not one.size or one.dtype.kind not in "uif":
        raise DataError(f"{file}: expected numbers of shape (H, W), found {one.dtype} {one.shape}")
    if one.dtype.kind == "f" and not np.isfinite(one).all():
        raise DataError(f"{file}: expected finite values, found {int((~np.isfinite(one)).sum())} NaN or infinite ones")
    return one


def _read_grey(file: Path) -> np.ndarray:
    """Pixels of an image of one channel, as stored; grey images saved with three equal channels count as such."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files  # noqa: BLE001
        raise DataError(
            f"{file}: not a readable image ({type(error).__name__}: {error}); TIFF with floats of other than 32 bits "
            "can be given as .npy"
        ) from None
    if mode == "1":
        return pixels.astype(np.uint8)
    if mode in ("RGB", "RGBA") and (pixels[..., :3] == pixels[..., :1]).all():
        return pixels[..., 0]
    if mode not in ("L", "I", "F") and not mode.startswith("I;16"):
        raise DataError(
            f"{file}: expected one channel of scores, found a {mode} image; a coloured overlay does not hold the scores"
        )
    return pixels


def read_defects(images: str | Path, masks: str | Path) -> LabelledDefects:
    """Images of known defects in one folder per class, and their masks in a folder of the same structure.

    Raises
    ------
    DataError
        If there is no class, a mask is missing, empty or not of its image's size, or a file is unreadable.
    """
    images, masks = Path(images), Path(masks)
    found = LabelledDefects([], [], [])
    for place in sorted(place for place in images.iterdir() if place.is_dir() and not place.name.startswith(".")):
        for image, name in zip(*read_images(place), strict=True):
            file = _beside(masks / place.name, name, MASK_SUFFIXES, ("", "_mask"), "mask of the defect")
            grey = _read_grey(file)
            if grey.shape != image.shape[1:]:
                raise DataError(f"{file}: expected the size of its image, {tuple(image.shape[1:])}, found {grey.shape}")
            if not grey.any():
                raise DataError(f"{file}: expected a defect, found an empty mask")
            found.images.append(image)
            found.masks.append(torch.from_numpy(grey > 0))
            found.labels.append(place.name)
    if not found.images:
        raise DataError(f"{images}: expected a folder for each class of known defects")
    return found
