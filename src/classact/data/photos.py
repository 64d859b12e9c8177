"""Photographs as people have them: any common format, turned the right way up, 8-bit RGB, or a clear refusal."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from classact.data.bag_files import DataError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
MAX_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:  # pragma: no cover - depends on the installation
        raise ModuleNotFoundError("reading images needs Pillow: pip install 'classact[explain]'", name="PIL") from error
    return Image, ImageOps


def read_photo(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as 8-bit RGB (H, W, 3), the right way up.

    EXIF orientation is applied; grey and palette images become RGB; 16-bit grey is scaled from its full range 0..65535,
    whatever the largest value is; transparent parts are shown on white; of several frames the first is read.

    Parameters
    ----------
    path : path
        File of any format that Pillow reads.
    max_pixels : int
        Larger images are refused before they are decoded.

    Raises
    ------
    DataError
        If the file is missing, not an image, truncated, larger than `max_pixels`, or has floating-point values outside
        [0, 1]; the message has the path.
    """
    Image, ImageOps = _pillow()
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise DataError(
                        f"{path}: {image.width} x {image.height} pixels are over the limit of {max_pixels:,}; refused,"
                        " since a small file can hide an image that fills the memory"
                    )
                image.load()
                turned = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: over the limit of {MAX_PIXELS:,} pixels; refused ({error})") from None
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files  # noqa: BLE001
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None
    return _rgb(turned, path, Image)


def _rgb(image: Any, path: Path, Image: Any) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{path}: expected 16-bit grey values from 0 to 65535, found {grey.min()} to {grey.max()}")
        return np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        grey = np.asarray(image)
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
            raise DataError(f"{path}: expected floating-point values in [0, 1], found {grey.min():g} to {grey.max():g}")
        return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def list_photos(place: str | Path) -> list[Path]:
    """The image files of a folder and its subfolders in order, or the one file that `place` is.

    Raises
    ------
    DataError
        If there is no such place, or no image file in it.
    """
    place = Path(place)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DataError(f"{place}: no such file or folder")
    files = [
        file
        for file in sorted(place.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    ]
    if not files:
        raise DataError(f"{place}: no image files ({', '.join(SUFFIXES)})")
    return files


def class_folders(place: str | Path, files: list[Path]) -> list[str] | None:
    """The class of each file where all lie one level down in at least two folders, as image folders do; else None."""
    place = Path(place)
    if not place.is_dir() or any(file.parent.parent != place for file in files):
        return None
    names = [file.parent.name for file in files]
    return names if len(set(names)) > 1 else None
