"""Eigen-CAM: the first principal component of a layer's activations, without class, score or gradient.

Bany Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", IJCNN 2020,
https://arxiv.org/abs/2008.00299.

The map is the same for every class: it shows what the layer represents most strongly, so it never answers why an image
is of a class. For features after a ReLU it is close to their channel mean.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
>>> with EigenCAM(model, "1") as cam:
...     maps = cam(torch.rand(2, 3, 16, 16))
>>> maps.shape
torch.Size([2, 16, 16])
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from classact.explain.cam import CAM, LayerRecord, Record, check_input
from classact.explain.frozen import frozen
from classact.explain.layers import Layer, Reshape
from classact.explain.targets import Target

Sign = Literal["sum", "maxabs", "none"]


def eigen_map(
    features: Float[Tensor, "N K *S"], component: int = 1, *, center: bool = False, sign: Sign = "sum"
) -> Float[Tensor, "N *S"]:
    """Projection of every position on a principal direction of its image, L = X v_j.

    X is the matrix positions x channels, O in the paper, not centred.

    Parameters
    ----------
    features : (N, K, *S)
        Activations.
    component : int
        Which direction, from 1.
    center : bool
        Subtract the mean over positions first (true PCA, as pytorch-grad-cam does); the paper does not.
    sign : {"sum", "maxabs", "none"}
        A singular vector has no sign: make the sum of the map positive (features after a ReLU then give a map without
        negative values), or its largest absolute value, or leave what comes out. A centred map sums to zero; there the
        sum of the same projection without centring decides, which favours positions that resemble the mean.

    Raises
    ------
    ValueError
        For a map of one position, a component that does not exist, or activations that are not finite.
    """
    if sign not in ("sum", "maxabs", "none"):
        raise ValueError(f"sign must be 'sum', 'maxabs' or 'none', got {sign!r}")
    with torch.autocast(features.device.type, enabled=False):
        O = _matrix(features)  # noqa: E741 - the paper's symbol
        _check_component(component, min(O.shape[1:]))
        mean = O.mean(1, keepdim=True)
        X = O - mean if center else O
        L = _first_component(X) if component == 1 else _thin_svd(X, component)
        if sign == "sum":
            # sum_p O_p v_j, up to a positive factor, since v_j = X^T L / s_j^2
            weight = (X @ mean.transpose(1, 2)).squeeze(2) if center else 1
            L = L * torch.where((L * weight).sum(1, keepdim=True) < 0, -1, 1)
        elif sign == "maxabs":
            L = L * torch.where(L.gather(1, L.abs().argmax(1, keepdim=True)) < 0, -1, 1)
    return L.view(len(L), *features.shape[2:])


def _matrix(features: Tensor) -> Tensor:
    """O (N, P, K) in at least float32: a Gram matrix overflows half precision."""
    if features.ndim < 3 or math.prod(features.shape[2:]) < 2:
        raise ValueError(f"features must be (N, K, *S) with at least two positions, got shape {tuple(features.shape)}")
    O = features.flatten(2).transpose(1, 2)  # noqa: E741 - the paper's symbol
    O = O if O.dtype == torch.float64 else O.float()  # noqa: E741
    if not bool(torch.isfinite(O).all()):
        raise ValueError("features must be finite, found NaN or infinity")
    return O


def _check_component(component: int, count: int) -> None:
    if not 1 <= component <= count:
        raise ValueError(f"component must be from 1 to min(positions, channels) = {count}, got {component}")


def _first_component(X: Tensor) -> Tensor:
    """s_1 u_1 (N, P) from the smaller of the two Gram matrices; only its first eigenvector is needed."""
    P, K = X.shape[1:]
    # divided by the largest value, so that squares neither overflow nor vanish
    scale = X.abs().amax((1, 2), keepdim=True)
    X = X / torch.where(scale > 0, scale, 1)
    G = X @ X.transpose(1, 2) if P <= K else X.transpose(1, 2) @ X
    values, vectors = torch.linalg.eigh(G)
    v = vectors[..., -1:]
    L = v * values[:, -1:, None].clamp_min(0).sqrt() if P <= K else X @ v
    return (L * scale).squeeze(2)


def _thin_svd(X: Tensor, component: int) -> Tensor:
    """s_j u_j (N, P) by the thin SVD: squares would lose the small singular values."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[..., component - 1] * S[:, component - 1, None]


class EigenCAM(CAM):
    """Eigen-CAM (section III): the activations of a layer projected on their first right singular vector.

    Works with frozen, headless and non-differentiable models and under ``torch.inference_mode``. Followed by a ReLU
    and, unless told otherwise, division by the maximum; after a ReLU layer neither changes the form.

    Parameters
    ----------
    model, layer, reshape
        See [`CAM`][classact.explain.CAM].
    component : int
        Which principal direction, from 1.
    center : bool
        Subtract the mean over positions first. pytorch-grad-cam does, and keeps the sign that the decomposition happens
        to return, so that its clipped map can show the background in place of the object.
    weight : {None, "grad"}
        ``"grad"`` decomposes activations times gradient (EigenGradCAM, class-specific) in place of activations.
    sign : {"sum", "maxabs", "none"}
        See [`eigen_map`][classact.explain.eigen_map].
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer] = "auto",
        *,
        component: int = 1,
        center: bool = False,
        weight: Literal["grad"] | None = None,
        sign: Sign = "sum",
        reshape: Reshape | None = None,
    ) -> None:
        super().__init__(model, layer, reshape=reshape)
        if weight not in (None, "grad"):
            raise ValueError(f"weight must be None or 'grad', got {weight!r}")
        if component < 1:
            raise ValueError(f"component must be at least 1, got {component}")
        if sign not in ("sum", "maxabs", "none"):
            raise ValueError(f"sign must be 'sum', 'maxabs' or 'none', got {sign!r}")
        self.component, self.center, self.weight, self.sign = component, center, weight, sign
        self.needs_gradient = weight == "grad"

    def record(self, x: Tensor, target: Target = None) -> Record:
        """Activations of the layers, and their gradients if these are used."""
        if self.needs_gradient:
            if target is None:
                raise ValueError("weight='grad' explains a target; none was given")
            return super().record(x, target)
        if target is not None:
            warnings.warn("Eigen-CAM is the same for every class: the target is ignored", stacklevel=4)
        x = check_input(x)
        with torch.no_grad(), frozen(self.model):
            _, features, layouts = self._forward(x, None)
        several = target.shape[1] if isinstance(target, Tensor) and target.ndim == 2 else 1
        maps = [layout(part) for layout, part in zip(layouts, features, strict=True)]
        empty = torch.zeros(len(x), several)
        return Record([LayerRecord(A, [A] * several) for A in maps], empty, empty.long())

    def combine(self, A: Tensor, g: Tensor, **options: Any) -> Tensor:
        """ReLU(X v_j)."""
        if options:
            raise TypeError(f"EigenCAM has no option {', '.join(options)}")
        return eigen_map(self._decomposed(A, g), self.component, center=self.center, sign=self.sign).relu()

    def spectrum(self, x: Tensor, target: Target = None) -> Float[Tensor, "N r"]:
        """Singular values (N, r) of what is decomposed at the first layer, largest first; `target` for ``"grad"``."""
        part = self.record(x, target).layers[0]
        X = _matrix(self._decomposed(part.A, part.gradients[0]))
        return torch.linalg.svdvals(X - X.mean(1, keepdim=True) if self.center else X)

    def explained(self, x: Tensor, target: Target = None) -> Float[Tensor, "N"]:
        """Share (N,) of the sum of squares that the component carries; 0 where all values are zero."""
        s = self.spectrum(x, target).square()
        _check_component(self.component, s.shape[1])
        total = s.sum(1)
        return s[:, self.component - 1] / torch.where(total > 0, total, 1)

    def _decomposed(self, A: Tensor, g: Tensor) -> Tensor:
        return A * g if self.needs_gradient else A
