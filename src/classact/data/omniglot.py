"""Omniglot: characters of many alphabets, each drawn once by twenty people (Lake et al., MIT licence)."""

import io
import re
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from classact.data.bag_files import DataError
from classact.data.registry import data_folder

SMALL = ("images_background_small1.zip", "images_background_small2.zip")
RUNS = "all_runs.zip"
SOURCE = "https://github.com/brendenlake/omniglot/tree/master/python"


class Omniglot(NamedTuple):
    """Drawings, strokes bright on black.

    Attributes
    ----------
    images : (n, size, size) float32
        In [0, 1].
    character, alphabet, drawer : (n,) int
        Number of the character (over all alphabets), of its alphabet in `alphabets`, and of the drawing, 1 to 20.
    alphabets : tuple of str
        Names, sorted.
    """

    images: np.ndarray
    character: np.ndarray
    alphabet: np.ndarray
    drawer: np.ndarray
    alphabets: tuple[str, ...]


class OneShotRun(NamedTuple):
    """One run of the one-shot test: one example of each of 20 characters, and 20 drawings to classify.

    Attributes
    ----------
    examples : (20, size, size) float32
        Of classes 0 to 19.
    queries : (20, size, size) float32
    labels : (20,) int
        Class of each query.
    """

    examples: np.ndarray
    queries: np.ndarray
    labels: np.ndarray


def load_omniglot_zip(paths: Sequence[str | Path], size: int = 28) -> Omniglot:
    """Read zips of the form ``<set>/<alphabet>/characterNN/IIII_DD.png`` as they are distributed.

    A drawing that is in several of the zips is taken once. Rows are sorted by alphabet, character and drawer.

    Parameters
    ----------
    paths : sequence of path
        Zips, such as ``images_background.zip``.
    size : int
        Images of 105 x 105 pixels are reduced to size x size by averaging areas.

    Raises
    ------
    DataError
        If a file is missing, is no zip, or holds no drawings.
    """
    found: dict[tuple[str, str, int], bytes] = {}
    for path in map(Path, paths):
        with _open(path) as archive:
            matches = [
                re.fullmatch(r"[^/]+/([^/]+)/(character\d+)/\d+_(\d+)\.png", name) for name in archive.namelist()
            ]
            drawings = {(match[1], match[2], int(match[3])): match[0] for match in matches if match}
            found |= {key: archive.read(name) for key, name in drawings.items() if key not in found}
            if not drawings:
                raise DataError(f"{path}: expected drawings <set>/<alphabet>/characterNN/IIII_DD.png, found none")
    keys = sorted(found)
    alphabets = tuple(sorted({alphabet for alphabet, _, _ in keys}))
    characters = {key: number for number, key in enumerate(dict.fromkeys((a, c) for a, c, _ in keys))}
    return Omniglot(
        np.stack([_image(found[key], size) for key in keys]),
        np.array([characters[a, c] for a, c, _ in keys]),
        np.array([alphabets.index(a) for a, _, _ in keys]),
        np.array([drawer for _, _, drawer in keys]),
        alphabets,
    )


@lru_cache(maxsize=2)
def omniglot(size: int = 28) -> Omniglot:
    """Both small background sets of the data folder together: 242 characters of 8 alphabets, 4,840 drawings.

    Raises
    ------
    DataError
        If the zips are missing; the message says where to get and put them.
    """
    return load_omniglot_zip([data_folder() / "omniglot" / name for name in SMALL], size)


def omniglot_runs(size: int = 28) -> list[OneShotRun]:
    """Read the 20 runs of the one-shot test (``all_runs.zip``), each within one alphabet.

    Their alphabets are none of the background sets'.

    Raises
    ------
    DataError
        If the zip is missing, or a run is not complete.
    """
    runs, path = [], data_folder() / "omniglot" / RUNS
    with _open(path) as archive:
        names = set(archive.namelist())
        for number in range(1, 21):
            listing = f"run{number:02d}/class_labels.txt"
            if listing not in names:
                raise DataError(f"{path}: expected {listing}, found no such member")
            pairs = [line.split() for line in archive.read(listing).decode().splitlines() if line.strip()]
            examples = sorted({example for _, example in pairs})
            if len(pairs) != 20 or len(examples) != 20:
                raise DataError(f"{path}: expected 20 pairs in {listing}, found {len(pairs)}")
            runs.append(
                OneShotRun(
                    np.stack([_image(archive.read(example), size) for example in examples]),
                    np.stack([_image(archive.read(query), size) for query, _ in pairs]),
                    np.array([examples.index(example) for _, example in pairs]),
                )
            )
    return runs


def _open(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise DataError(
            f"{path}: no such file; Omniglot (Lake, MIT licence) goes there. Get {path.name} from {SOURCE}, "
            f"or point CLASSACT_DATA at the folder that holds omniglot/{path.name}"
        )
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: expected a zip file: {error}") from error


def _image(content: bytes, size: int) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(content)).convert("L").resize((size, size), Image.Resampling.BOX)
    return 1 - np.asarray(image, dtype=np.float32) / 255
