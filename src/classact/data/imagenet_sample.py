"""A sample of ImageNet photographs in disjoint parts, so that pilots, thresholds and every seed have their own."""

import numpy as np
import torch
from torch import Tensor

from classact.data.bag_files import DataError
from classact.data.photos import read_photo
from classact.data.registry import data_folder

FOLDER, PARTS = "imagenet-sample", 12


def photo_part(part: int) -> tuple[list[Tensor], Tensor]:
    """Photographs (3, h, w) in [0, 1] of one of 12 disjoint parts of a sample of ImageNet, and their classes (n,).

    Raises
    ------
    ValueError
        If there is no such part.
    DataError
        If the folder ``imagenet-sample`` of JPEG files named ``<class index>_...jpg`` is not in the data folder.
    """
    if part not in range(PARTS):
        raise ValueError(f"part must be from 0 to {PARTS - 1}, got {part}")
    files = sorted((data_folder() / FOLDER).glob("*.jpg"))
    if not files:
        raise DataError(
            f"{data_folder() / FOLDER}: no JPEG files; a sample of ImageNet photographs named <class index>_*.jpg goes"
            " there"
        )
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[part::PARTS]]
    photos = [torch.from_numpy(read_photo(file)).permute(2, 0, 1).float() / 255 for file in chosen]
    return photos, torch.tensor([int(file.name.split("_")[0]) for file in chosen])
