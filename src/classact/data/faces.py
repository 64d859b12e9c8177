"""Faces with an expression and 68 landmarks: a reader of folders with a table, joint augmentation, and drawn faces.

Landmarks have the numbering of iBUG and dlib (0-16 jaw, 17-26 brows, 27-35 nose, 36-47 eyes, 48-67 lips), each (x, y)
in pixels, pixel centres at whole numbers.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classact.data.bag_files import DataError

EXPRESSIONS = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
LANDMARKS = 68
_RAFDB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
_AFFECTNET = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger")
RAFDB_CODES = {str(code): name for code, name in enumerate(_RAFDB, 1)}
AFFECTNET_CODES = {str(code): name for code, name in enumerate(_AFFECTNET)}


class Face(NamedTuple):
    """Image (H, W, 3) uint8, index of the expression, landmarks (68, 2) float32 (+inf where none were found)."""

    image: np.ndarray
    label: int
    landmarks: np.ndarray


class FaceFolder(Sequence[Face]):
    """Faces listed in a CSV file with columns ``image``, ``label`` and ``landmarks``, as RAF-DB and AffectNet can be.

    Parameters
    ----------
    table : path
        The CSV file. ``image`` and ``landmarks`` are paths, relative to `root`; landmarks are a ``.npy`` file of shape
        (68, 2), or empty where the detector found no face. ``label`` is a name of `classes`, or a key of `codes`.
    root : path, optional
        Folder of the files; that of the table by default.
    classes : sequence of str
        The expressions; a label is the index into them.
    codes : mapping, optional
        What the data set writes -> expression: `RAFDB_CODES`, `AFFECTNET_CODES`.

    Raises
    ------
    DataError
        If the table, a column, a label or a file is not as expected; the message has the file and the line.
    """

    def __init__(
        self,
        table: str | Path,
        root: str | Path | None = None,
        classes: Sequence[str] = EXPRESSIONS,
        codes: Mapping[str, str] | None = None,
    ) -> None:
        self.table = Path(table)
        self.root = Path(root) if root is not None else self.table.parent
        self.classes = tuple(classes)
        if not self.table.is_file():
            raise DataError(f"{self.table}: no such file; expected a CSV file with columns image, label, landmarks")
        self.labels: list[int] = []
        self._files: list[tuple[str, str]] = []
        with self.table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"image", "label", "landmarks"} - set(reader.fieldnames or ()):
                raise DataError(f"{self.table}: no column {', '.join(sorted(missing))}; there are {reader.fieldnames}")
            for row in reader:
                label = (row["label"] or "").strip()
                name = (codes or {}).get(label, label)
                if name not in self.classes:
                    expected = ", ".join([*self.classes, *(codes or ())])
                    where = f"{self.table}, line {reader.line_num}"
                    raise DataError(f"{where}: label {label!r}; expected one of {expected}")
                self.labels.append(self.classes.index(name))
                self._files.append((row["image"] or "", row["landmarks"] or ""))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image, UnidentifiedImageError

        picture, points = self._files[index]
        path = self.root / picture
        try:
            with Image.open(path) as opened:
                image = np.asarray(opened.convert("RGB"))
        except (FileNotFoundError, IsADirectoryError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: expected an image, as {self.table.name} says: {error}") from error
        return Face(image, self.labels[index], self._read_landmarks(points))

    def _read_landmarks(self, name: str) -> np.ndarray:
        if not name:
            return np.full((LANDMARKS, 2), np.inf, np.float32)
        path = self.root / name
        if not path.is_file():
            raise DataError(f"{path}: no such file, but {self.table.name} names it; leave it empty if there is none")
        try:
            landmarks = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path}: expected an array of numbers written by numpy.save: {error}") from error
        if landmarks.shape != (LANDMARKS, 2):
            raise DataError(f"{path}: expected landmarks of shape (68, 2), found {landmarks.shape}")
        return landmarks.astype(np.float32)


class FaceAugmentation:
    """Random geometry for image and heatmap together, random colour and erasing for the image alone.

    Rotation within 6 degrees; a square of 80 to 100 % of the area, resized; flip; for the image also grey with
    probability 0.2, colour jitter with 0.8 and erasing with 0.5 (settings of
    https://github.com/sbelharbi/interpretable-fer-aus).
    A flip moves the heatmap with the image; landmarks would have to be renumbered as well. Draws from torch's global
    generator; needs torchvision.

    Parameters
    ----------
    size : int
        Height and width of the result.
    """

    def __init__(self, size: int = 224) -> None:
        try:
            from torchvision.transforms import v2
        except ModuleNotFoundError as error:
            msg = "FaceAugmentation needs the package torchvision: pip install torchvision"
            raise ModuleNotFoundError(msg, name="torchvision") from error
        self.geometry = v2.Compose(
            [
                v2.RandomRotation(6, interpolation=v2.InterpolationMode.BILINEAR),
                v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(1.0, 1.0)),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.colour = v2.Compose(
            [
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomErasing(0.5, value="random"),
            ]
        )

    def __call__(self, image: Any, heatmap: Any) -> tuple[Any, Any]:
        """Transform an image (3, H, W) in [0, 1] and its heatmap (1, H, W); a heatmap of +inf stays one."""
        import torch

        finite = bool(torch.isfinite(heatmap).all())
        stacked = self.geometry(torch.cat([image, heatmap if finite else torch.zeros_like(heatmap)]))
        image, heatmap = self.colour(stacked[:3].clamp(0, 1)), stacked[3:]
        return image, heatmap if finite else torch.full_like(heatmap, torch.inf)


# A neutral face in a frame of 256 x 256. Its left half, in the numbering of the landmarks; the right half mirrors it.
FRAME = 256
_JAW = [(128 - 80 * math.cos(i * math.pi / 16), 108 + 100 * math.sin(i * math.pi / 16)) for i in range(17)]
_BROW = [(62, 92), (74, 84), (88, 81), (102, 84), (112, 89)]
_NOSE = [(128, 100), (128, 114), (128, 128), (128, 142), (112, 152), (120, 155), (128, 157), (136, 155), (144, 152)]
_EYE = [(74, 108), (82, 102), (94, 102), (102, 108), (94, 113), (82, 113)]
_LIPS = [
    *[(102, 180), (111, 175), (120, 172), (128, 174), (136, 172), (145, 175), (154, 180)],
    *[(145, 187), (136, 190), (128, 191), (120, 190), (111, 187)],
    *[(107, 180), (119, 179), (128, 179.5), (137, 179), (149, 180), (137, 182), (128, 182.5), (119, 182)],
]
MIRROR = np.array(
    [
        *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1), 45, 44, 43, 42, 47, 46, 39, 38, 37,
        36, 41, 40, *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
    ]
)  # fmt: skip
"""Landmark that a landmark becomes when the face is mirrored."""


def _mirrored(points: Sequence[tuple[float, float]], order: Sequence[int]) -> list[tuple[float, float]]:
    return [(FRAME - points[i][0], points[i][1]) for i in order]


NEUTRAL = np.array(
    [*_JAW, *_BROW, *_mirrored(_BROW, range(4, -1, -1)), *_NOSE, *_EYE, *_mirrored(_EYE, (3, 2, 1, 0, 5, 4)), *_LIPS]
)

# How an action unit moves landmarks of the left half and of the middle: (dx, dy) in the frame, x to the right, y down.
_LOWER_LIP, _CHIN = (57, 58, 59, 66, 67), (5, 6, 7, 8)
MOVES: dict[int, dict[int, tuple[float, float]]] = {
    1: {20: (0, -9), 21: (0, -13)},
    2: {17: (0, -9), 18: (0, -11), 19: (0, -6)},
    4: {17: (0, 4), 18: (1, 6), 19: (2, 8), 20: (4, 9), 21: (6, 10)},
    5: {37: (0, -6), 38: (0, -6)},
    6: {40: (0, -5), 41: (0, -5)},
    7: {37: (0, 3), 38: (0, 3), 40: (0, -3), 41: (0, -3)},
    9: {31: (-3, -7), 32: (0, -5), 21: (3, 4), 39: (2, 0)},
    10: {49: (0, -6), 50: (0, -9), 51: (0, -8), 61: (0, -7), 62: (0, -6)},
    12: {48: (-11, -10), 49: (-6, -4), 59: (-6, -4), 60: (-10, -9), 61: (-3, -1), 67: (-3, -1)},
    15: {48: (-2, 10), 49: (-1, 4), 59: (-1, 5), 60: (-2, 9)},
    16: {57: (0, 7), 58: (0, 7), 59: (0, 4), 66: (0, 6), 67: (0, 5)},
    17: {57: (0, -5), 58: (0, -5), 59: (0, -3), 66: (0, -3), 67: (0, -3), 7: (0, -6), 8: (0, -8)},
    20: {48: (-13, 1), 49: (-6, 0), 59: (-6, 1), 60: (-12, 1)},
    23: {48: (7, 0), 49: (4, 1), 50: (1, 2), 51: (0, 2), 57: (0, -3), 58: (1, -3), 59: (4, -1), 60: (7, 0)},
    25: {61: (0, -3), 62: (0, -3), 66: (0, 4), 67: (0, 4), 57: (0, 3), 58: (0, 3)},
    26: {**dict.fromkeys(_LOWER_LIP, (0, 12)), **dict.fromkeys(_CHIN, (0, 9))},
    27: {**dict.fromkeys(_LOWER_LIP, (0, 18)), **dict.fromkeys(_CHIN, (0, 12)), 48: (5, 5), 60: (5, 5)},
}
MOVED = {
    "neutral": (),
    "anger": (4, 7, 10, 17, 23),
    "disgust": (9, 10, 16, 25),
    "fear": (1, 2, 4, 5, 20, 25),
    "happiness": (6, 12, 25),
    "sadness": (1, 4, 15, 17),
    "surprise": (1, 2, 5, 26, 27),
}
"""Action units that a drawn expression moves."""

CUE_COLOURS = (
    *((0.6, 0.6, 0.2), (0.8, 0.3, 0.3), (0.3, 0.7, 0.3), (0.5, 0.3, 0.7)),
    *((0.8, 0.6, 0.3), (0.3, 0.4, 0.8), (0.3, 0.7, 0.7)),
)
"""Background of each class, in the order of `EXPRESSIONS`, where the cue is present."""


def _all_moves() -> dict[str, np.ndarray]:
    """Displacement (AUs, 68, 2) of each expression."""
    found = {}
    for name, units in MOVED.items():
        moves = np.zeros((len(units), LANDMARKS, 2))
        for move, unit in zip(moves, units, strict=True):
            for landmark, (dx, dy) in MOVES[unit].items():
                move[landmark] = dx, dy
                if MIRROR[landmark] != landmark:
                    move[MIRROR[landmark]] = -dx, dy
        found[name] = moves
    return found


class SyntheticFaces:
    """Faces drawn from 68 landmarks, with the seven expressions in turn.

    Ground truth: a class differs from the others only by the displacement of landmarks by its action units (`MOVED`,
    `MOVES`), each with its own intensity, uniform in [0.4, 1]; skin, background, noise of the landmarks (drawn and
    given alike), rotation, scale, shift, discs behind and before the face and pixel noise tell nothing. With a `cue`
    the background does: it has the colour of the class in that part of the images, else it is grey as always.

    Parameters
    ----------
    n : int
        Number of faces.
    size : int
        Height and width in pixels.
    seed : int
        Of everything that is drawn.
    cue : float
        Part of the images, in [0, 1], whose background has the colour of the class.

    Attributes
    ----------
    images : (n, 3, size, size) float32 in [0, 1]
        The faces.
    labels : (n,) int64
        Index into `EXPRESSIONS`.
    landmarks : (n, 68, 2) float32
        (x, y) in pixels of the images.
    """

    def __init__(self, n: int, size: int = 48, seed: int = 0, cue: float = 0.0) -> None:
        if n < 1 or size < 16:
            raise ValueError(f"n, size: expected at least 1 face of 16 pixels, got {n} of {size}")
        if not 0 <= cue <= 1:
            raise ValueError(f"cue: expected a part in [0, 1], got {cue}")
        rng = np.random.default_rng([seed, 68])
        moves = _all_moves()
        self.labels = rng.permutation(np.arange(n) % len(EXPRESSIONS))
        self.landmarks = np.empty((n, LANDMARKS, 2), np.float32)
        self.images = np.empty((n, 3, size, size), np.float32)
        for i, label in enumerate(self.labels):
            of_class = moves[EXPRESSIONS[label]]
            points = NEUTRAL + np.tensordot(rng.uniform(0.4, 1, len(of_class)), of_class, 1)
            points = _placed(points + rng.normal(0, 1.2, points.shape), rng)
            cued = rng.random() < cue
            background = CUE_COLOURS[label] if cued else (rng.uniform(0.15, 0.85),) * 3
            self.images[i] = _drawn(points, background, size, rng)
            self.landmarks[i] = (points + 0.5) * size / FRAME - 0.5
        noise = rng.standard_normal((n, 1, size, size), np.float32)
        self.images = np.clip(self.images + 0.06 * noise, 0, 1)

    def __len__(self) -> int:
        return len(self.labels)


def _placed(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate, scale and shift a face in the frame."""
    angle, scale = math.radians(rng.uniform(-10, 10)), rng.uniform(0.85, 1.08)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (points - 128) @ turn.T + 128 + rng.uniform(-12, 12, 2)


def _drawn(points: np.ndarray, background: Sequence[float], size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint one face, three times as large as wanted, and shrink it: (3, size, size) in [0, 1]."""
    from PIL import Image, ImageDraw

    large = 3 * size
    unit = large / FRAME
    image = Image.new("RGB", (large, large), tuple(int(255 * part) for part in background))
    draw = ImageDraw.Draw(image)

    def grey(value: float) -> tuple[int, int, int]:
        return (int(255 * value),) * 3

    def polygon(indices: Sequence[int], value: float) -> None:
        draw.polygon([tuple(p) for p in unit * points[list(indices)]], fill=grey(value))

    def line(indices: Sequence[int], value: float, width: float) -> None:
        draw.line([tuple(p) for p in unit * points[list(indices)]], grey(value), max(1, round(unit * width)), "curve")

    def disc(centre: np.ndarray, rx: float, ry: float, value: float) -> None:
        x, y = unit * centre
        draw.ellipse([x - unit * rx, y - unit * ry, x + unit * rx, y + unit * ry], fill=grey(value))

    for _ in range(rng.integers(2, 5)):
        radius = rng.uniform(8, 20)
        disc(rng.uniform(0, FRAME, 2), radius, radius, rng.uniform(0.1, 0.9))
    skin = rng.uniform(0.45, 0.8)
    middle, across = points[[0, 16]].mean(0), (points[16] - points[0]) / 2
    angles = np.linspace(0, math.pi, 15)[:, None]
    top = middle + np.cos(angles) * across + np.sin(angles) * 1.1 * np.array([across[1], -across[0]])
    draw.polygon([tuple(p) for p in unit * np.concatenate([points[:17], top])], fill=grey(skin))
    for brow in (range(17, 22), range(22, 27)):
        line(brow, skin * 0.4, 6)
    for eye in (range(36, 42), range(42, 48)):
        polygon(eye, 0.95)
        corners = points[list(eye)]
        opening = max(2.0, (corners[[4, 5], 1] - corners[[1, 2], 1]).mean() / 2)
        disc(corners.mean(0), 5, min(6.0, opening), 0.1)
    line(range(27, 31), skin * 0.8, 3)
    line(range(31, 36), skin * 0.65, 4)
    polygon(range(48, 60), skin * 0.6)
    polygon(range(60, 68), 0.08)
    for _ in range(rng.integers(0, 3)):
        radius = rng.uniform(8, 15)
        disc(points[27] + rng.uniform(-80, 80, 2), radius, radius, rng.uniform(0.1, 0.9))
    small = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32).transpose(2, 0, 1) / 255
