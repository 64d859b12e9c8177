"""Object boxes of images: a table, or XML files as PASCAL VOC and ILSVRC have them."""

import csv
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from classact.data.bag_files import DataError

COLUMNS = ("file", "x0", "y0", "x1", "y1")


def read_boxes(path: str | Path) -> dict[str, list[tuple[int, int, int, int]]]:
    """Read boxes (x0, y0, x1, y1) in pixels, ends excluded, by image: file name without its ending.

    Parameters
    ----------
    path : path
        A CSV file with the columns file, x0, y0, x1, y1, or a folder (searched with its subfolders) of annotation files
        in the format of PASCAL VOC, which ILSVRC's localisation data shares; those count pixels from 1, ends included.

    Raises
    ------
    DataError
        If there is nothing to read, a file is malformed, or a box is empty; the message has the place.
    """
    path = Path(path)
    boxes: dict[str, list[tuple[int, int, int, int]]] = {}
    if path.is_dir():
        files = sorted(path.rglob("*.xml"))
        if not files:
            raise DataError(f"{path}: no .xml files of boxes")
        for file in files:
            boxes[file.stem] = _voc(file)
        return boxes
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    with path.open(newline="", encoding="utf-8-sig") as table:
        reader = csv.DictReader(table)
        if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
            raise DataError(
                f"{path}: expected the columns {', '.join(COLUMNS)}, found {', '.join(reader.fieldnames or [])}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            try:
                box = tuple(round(float(row[name])) for name in COLUMNS[1:])
            except (TypeError, ValueError):
                raise DataError(f"{where}: expected numbers for {', '.join(COLUMNS[1:])}") from None
            boxes.setdefault(Path(row["file"]).stem, []).append(_checked(box, where))
    return boxes


def _voc(file: Path) -> list[tuple[int, int, int, int]]:
    try:
        root = ET.parse(file).getroot()  # noqa: S314 - local annotation files
        found = []
        for box in root.iterfind("object/bndbox"):
            x0, y0, x1, y1 = (round(float(box.findtext(name, ""))) for name in ("xmin", "ymin", "xmax", "ymax"))
            found.append(_checked((x0 - 1, y0 - 1, x1, y1), str(file)))
    except (ET.ParseError, ValueError) as error:
        raise DataError(f"{file}: not an annotation in the format of PASCAL VOC ({error})") from None
    return found


def _checked(box: tuple[int, ...], where: str) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise DataError(f"{where}: a box must have x0 < x1 and y0 < y1, found {box}")
    return x0, y0, x1, y1


def box_mask(boxes: list[tuple[int, int, int, int]], height: int, width: int) -> np.ndarray:
    """Boxes as bool masks (n, H, W)."""
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = True
    return masks
