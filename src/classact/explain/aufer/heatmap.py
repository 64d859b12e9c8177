"""Heatmaps of action units, drawn for a whole batch at once, and landmarks from other packages."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.data.faces import EXPRESSIONS, LANDMARKS
from classact.explain.aufer.codebook import CODEBOOKS, CORRECTED, OFFICIAL, Codebook, Ellipse, Span

FRAME, GRID = 256, 28  # faces are drawn in a frame of so many pixels and kept on a grid of so many cells
CHUNK = 32  # faces drawn at a time: what is computed for them stays in the cache
BOUNDARY = 0.5  # a rasteriser fills the pixels that the outline crosses as well


class AUMaps(NamedTuple):
    """Heatmaps (N, 1, H, W) in [0, 1], +inf where there is none, and which of them are valid (N,)."""

    maps: Float[Tensor, "n 1 h w"]
    valid: Bool[Tensor, " n"]


class AUHeatmap(nn.Module):
    """Draw where the action units of an expression lie, given the landmarks of faces (details: authors' code).

    Every action unit is one or two filled ellipses on a canvas of 256 x 256, shrunk to 28 x 28 (bilinear, two samples
    per axis), blurred by a box and enlarged again; the map is the maximum over the action units, stretched to [0, 1].
    Only the pixels that the shrinking looks at are ever computed. There is no map, and `valid` is False, for an
    expression without action units (neutral), for landmarks that are not finite, and where every ellipse lies outside.

    Parameters
    ----------
    image_size : int or pair
        Height and width of the images that the landmarks belong to, each stretched to the 256 of the canvas. (The
        authors' radii are partly fixed in pixels; their aligned faces have 256.)
    codebook : {"official", "corrected"} or dict
        Which action units an expression has, and how they are drawn; see [`codebook`][classact.explain.aufer.codebook].
        A dict maps each expression to FACS numbers, drawn as in "corrected".
    size : int or pair, optional
        Height and width of the maps; those of the images by default. With 28 nothing is enlarged: keep these and let
        the loss resize them.
    blur : int
        Odd width of the box, in cells of the grid; 1 for none.
    classes : sequence of str
        The expressions that labels count.

    Examples
    --------
    >>> from classact.data.faces import SyntheticFaces
    >>> faces = SyntheticFaces(14, size=48)
    >>> draw = AUHeatmap(image_size=48)
    >>> maps, valid = draw(torch.from_numpy(faces.landmarks), torch.from_numpy(faces.labels))
    >>> maps.shape, int(valid.sum())
    (torch.Size([14, 1, 48, 48]), 12)
    """

    has: Tensor
    centre: Tensor
    span: Tensor
    shift: Tensor
    extra: Tensor
    default: Tensor
    there: Tensor
    pixels: Tensor
    shrink: Tensor
    enlarge_y: Tensor
    enlarge_x: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int] = FRAME,
        codebook: Codebook | Mapping[str, Sequence[int]] = "official",
        size: int | tuple[int, int] | None = None,
        blur: int = 3,
        classes: Sequence[str] = EXPRESSIONS,
    ) -> None:
        super().__init__()
        if isinstance(codebook, str) and codebook not in CODEBOOKS:
            raise ValueError(f"codebook: expected 'official', 'corrected' or a dict, got {codebook!r}")
        if blur < 1 or blur % 2 == 0:
            raise ValueError(f"blur: expected an odd width of at least 1, got {blur}")
        self.image_size, self.size = _pair(image_size), _pair(image_size if size is None else size)
        self.classes, self.whole_pixels = tuple(classes), codebook == "official"
        book = CODEBOOKS[codebook] if isinstance(codebook, str) else codebook
        if unknown := [name for name in self.classes if name not in book]:
            raise ValueError(f"classes: unknown expression {', '.join(unknown)}; the codebook has {', '.join(book)}")
        geometry = OFFICIAL if self.whole_pixels else CORRECTED
        units = {unit for name in self.classes for unit in book[name]}
        if missing := sorted(units - set(geometry)):
            raise ValueError(f"codebook: no place is known for AU {missing}; there are {sorted(geometry)}")
        # units that are drawn alike, as all those of the mouth, are drawn once
        drawings = sorted({tuple(geometry[unit]) for unit in units}, key=str)
        has = [[any(tuple(geometry[unit]) == one for unit in book[name]) for one in drawings] for name in self.classes]
        self.register_buffer("has", torch.tensor(has, dtype=torch.bool), persistent=False)
        for name, tensor in _tensors(drawings).items():
            self.register_buffer(name, tensor, persistent=False)
        at = (torch.arange(GRID) + 0.5) * FRAME / GRID - 0.5
        low = at.floor()
        self.register_buffer("pixels", torch.stack([low, low + 1], 1).flatten(), persistent=False)
        shrink = torch.zeros(GRID, 2 * GRID)  # bilinear weights of the cells' two pixels
        cells = torch.arange(GRID)
        shrink[cells, 2 * cells], shrink[cells, 2 * cells + 1] = 1 - (at - low), at - low
        box = F.pad(torch.eye(GRID).unsqueeze(0), (blur // 2, blur // 2), mode="reflect")  # each cell's neighbours
        blurred = F.avg_pool1d(box, blur, 1)[0].T
        self.register_buffer("shrink", blurred @ shrink, persistent=False)
        for name, length in zip(("enlarge_y", "enlarge_x"), self.size, strict=True):
            enlarge = F.interpolate(torch.eye(GRID).unsqueeze(0), length, mode="linear")[0].T
            self.register_buffer(name, enlarge.contiguous(), persistent=False)

    @torch.no_grad()
    def forward(self, landmarks: Float[Tensor, "n 68 2"], labels: Int[Tensor, " n"]) -> AUMaps:
        """Draw the maps of N faces.

        Parameters
        ----------
        landmarks : (N, 68, 2)
            (x, y) in pixels of the images; not finite where no face was found.
        labels : (N,) int
            Index into `classes`.

        Raises
        ------
        ValueError
            If there are not 68 landmarks or a label is out of range.
        """
        if landmarks.ndim != 3 or landmarks.shape[1:] != (LANDMARKS, 2) or labels.shape != landmarks.shape[:1]:
            raise ValueError(
                "landmarks, labels: expected shapes (N, 68, 2) and (N,), "
                f"got {tuple(landmarks.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(
                f"labels: expected values from 0 to {len(self.classes) - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        parts = zip(landmarks.split(CHUNK), labels.split(CHUNK), strict=True)
        maps = torch.cat([self._draw(*part) for part in parts])
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        valid = (high > low).flatten() & torch.isfinite(landmarks).all(2).all(1)
        maps = (maps - low) / (high - low)
        return AUMaps(maps.masked_fill(~valid[:, None, None, None], torch.inf), valid)

    def _draw(self, landmarks: Tensor, labels: Tensor) -> Tensor:
        """Maximum over the action units, (n, 1, H, W), not yet stretched."""
        height, width = self.image_size
        to_frame = landmarks.new_tensor([FRAME / width, FRAME / height])
        points = ((landmarks + 0.5) * to_frame - 0.5).nan_to_num(0, 0, 0)
        points = self._cut(points.float()).transpose(1, 2)  # (n, 2, 68)
        # centre and half-axes of everything that may be drawn: (n, 2, drawings, ellipses)
        centre = self._cut(torch.einsum("nal,adel->nade", points, self.centre)) + self.shift
        span = self._cut(torch.einsum("nal,adel->nade", points, self.span) + self.extra).clamp_min(0)
        radius = torch.where(span == 0, self.default, span)
        face, drawing = self.has[labels].nonzero(as_tuple=True)
        centre, radius = (part[face, :, drawing].unsqueeze(-1) for part in (centre, radius))
        x, y = ((self.pixels - centre) / (radius + BOUNDARY)).square().unbind(1)  # (m, ellipses, pixels)
        y = y.masked_fill(~self.there[drawing].unsqueeze(-1), torch.inf)
        filled = y[:, 0, :, None] + x[:, 0, None, :] <= 1
        for other in range(1, y.shape[1]):
            filled |= y[:, other, :, None] + x[:, other, None, :] <= 1
        cells = self.shrink @ filled.to(self.shrink.dtype) @ self.shrink.T
        maps = cells.new_zeros(len(labels), *self.size)
        for one in range(self.has.shape[1]):
            chosen = drawing == one
            larger = cells[chosen]
            if self.size != (GRID, GRID):
                larger = self.enlarge_y @ (larger @ self.enlarge_x.T)
            maps[face[chosen]] = torch.maximum(maps[face[chosen]], larger)
        return maps.unsqueeze(1)

    def _cut(self, lengths: Tensor) -> Tensor:
        return lengths.trunc() if self.whole_pixels else lengths


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_size, size: expected positive numbers of pixels, got {size}")
    return height, width


def _tensors(drawings: Sequence[Sequence[Ellipse]]) -> dict[str, Tensor]:
    """Ellipses as tensors.

    ``centre`` and ``span`` (2, drawings, ellipses, 68) are weights of the landmarks' x and y; ``shift``, ``extra`` and
    ``default`` (2, drawings, ellipses) are lengths; ``there`` (drawings, ellipses) says which ellipses exist.
    """
    shape = (2, len(drawings), max([1, *map(len, drawings)]))
    found = {name: torch.zeros(*shape, LANDMARKS) for name in ("centre", "span")}
    found |= {name: torch.zeros(shape) for name in ("shift", "extra", "default")}
    found["there"] = torch.zeros(shape[1:], dtype=torch.bool)
    for d, ellipses in enumerate(drawings):
        for e, ellipse in enumerate(ellipses):
            found["there"][d, e] = True
            axes = (ellipse.x, ellipse.rx, ellipse.dx), (ellipse.y, ellipse.ry, ellipse.dy)
            for axis, (landmarks, radius, shift) in enumerate(axes):
                at = axis, d, e
                found["centre"][(*at, list(landmarks))] = 1 / len(landmarks)
                found["shift"][at] = shift
                if isinstance(radius, Span):
                    found["span"][(*at, list(radius.last))] = 0.5 / len(radius.last)
                    found["span"][(*at, list(radius.first))] = -0.5 / len(radius.first)
                    found["extra"][at], found["default"][at] = radius.extra, radius.default
                else:
                    found["extra"][at] = radius
    return found
