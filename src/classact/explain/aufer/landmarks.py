"""Landmarks as other packages find them, in the form that AUHeatmap takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from classact.data.faces import LANDMARKS

# Vertices of MediaPipe's face mesh (468 or 478 of them) in the order of the 68 landmarks; the usual correspondence,
# approximate along the jaw.
MEDIAPIPE = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301),
    *(168, 197, 5, 4, 75, 97, 2, 326, 305),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),
    *(78, 82, 13, 312, 308, 317, 14, 87),
)


@dataclass(frozen=True)
class FaceLandmarks:
    """The 68 landmarks (iBUG, dlib) of one image, in pixels; +inf where no face was found.

    Of several faces the one that covers the largest area is taken.

    Attributes
    ----------
    points : (68, 2) float32
        (x, y).

    Examples
    --------
    >>> import numpy as np
    >>> FaceLandmarks.from_face_alignment([np.zeros((68, 2)), np.eye(68, 2)]).points.sum()
    tensor(2.)
    >>> FaceLandmarks.from_face_alignment(None).found
    False
    """

    points: Float[Tensor, "68 2"]

    @property
    def found(self) -> bool:
        """Whether there is a face."""
        return bool(torch.isfinite(self.points).all())

    @classmethod
    def from_face_alignment(cls, faces: Sequence[Any] | None) -> "FaceLandmarks":
        """From what ``face_alignment.FaceAlignment(...).get_landmarks(image)`` returns: arrays (68, 2 or 3), or None.

        Raises
        ------
        ValueError
            If a face does not have 68 landmarks.
        """
        return cls._largest([torch.as_tensor(face) for face in faces or ()])

    @classmethod
    def from_mediapipe(cls, faces: Any, image_size: tuple[int, int]) -> "FaceLandmarks":
        """From MediaPipe's face mesh: ``result.face_landmarks`` of the tasks API or ``result.multi_face_landmarks``.

        Parameters
        ----------
        faces : sequence or None
            One entry per face: points with ``x`` and ``y`` as parts of the image's width and height.
        image_size : (height, width)
            In pixels.

        Raises
        ------
        ValueError
            If a face has less than 468 points.
        """
        height, width = image_size
        found = []
        for face in faces or ():
            mesh = getattr(face, "landmark", face)
            if len(mesh) < 468:
                raise ValueError(f"faces: expected a mesh of 468 or 478 points, got {len(mesh)}")
            parts = torch.tensor([(mesh[i].x, mesh[i].y) for i in MEDIAPIPE])
            found.append(parts * torch.tensor([width, height]) - 0.5)
        return cls._largest(found)

    @classmethod
    def _largest(cls, faces: list[Tensor]) -> "FaceLandmarks":
        if not faces:
            return cls(torch.full((LANDMARKS, 2), torch.inf))
        for face in faces:
            if face.ndim != 2 or len(face) != LANDMARKS or face.shape[1] < 2:
                raise ValueError(f"faces: expected landmarks of shape (68, 2) or (68, 3), got {tuple(face.shape)}")
        points = [face[:, :2].float() for face in faces]
        return cls(max(points, key=lambda face: float((face.amax(0) - face.amin(0)).prod())))
