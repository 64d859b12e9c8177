"""The networks of PPGN that are trained for it: the autoencoder of codes R_h and the generator G."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn


class LatentDAE(nn.Module):
    """Denoising autoencoder R of codes, linear layers with ReLU between them (R_h, section 3.3).

    Trained with noise of standard deviation sigma, ``(R(s) - s) / sigma^2`` approximates the gradient of log p(s)
    (Alain & Bengio 2014). Images work as well: they are flattened, and come back in their shape.

    Parameters
    ----------
    dim : int
        Values of a code.
    hidden : sequence of int
        Widths of the hidden layers; without any, R is linear.

    Examples
    --------
    >>> import torch
    >>> LatentDAE(64, hidden=(32, 16, 32))(torch.randn(5, 64)).shape
    torch.Size([5, 64])
    """

    def __init__(self, dim: int = 4096, hidden: Sequence[int] = (2048, 1024, 500, 1024, 2048)) -> None:
        super().__init__()
        if min(dim, *hidden, dim) < 1:
            raise ValueError(f"dim, hidden: expected widths of at least 1, got {dim} and {tuple(hidden)}")
        self.dim = dim
        self.config = {"dim": dim, "hidden": list(hidden)}
        layers: list[nn.Module] = []
        for narrow, wide in pairwise((dim, *hidden, dim)):
            layers += [nn.ReLU(), nn.Linear(narrow, wide)]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, s: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Reconstruct codes (N, dim), or images (N, ...) of `dim` values each."""
        flat = s.flatten(1)
        if flat.shape[1] != self.dim:
            raise ValueError(f"s: expected {self.dim} values per code, got shape {tuple(s.shape)}")
        return self.layers(flat).view(s.shape)


class FeatureGenerator(nn.Module):
    """Generator G: linear layers, then transposed convolutions that double the size (Dosovitskiy & Brox 2016).

    The defaults are those of the released generator of 227 x 227 images from codes of 4096 values: LeakyReLU of slope
    0.3 after every layer but the last, 4 x 4 transposed convolutions of stride 2, the first of them followed by 3 x 3
    ones, and a crop of the centre.

    Parameters
    ----------
    code_dim : int
        Values of a code h.
    hidden : sequence of int
        Widths of the linear layers before the one that fills `start`.
    start : (int, int, int)
        Channels, height and width of the first map.
    up : sequence of int
        Channels after each doubling; the last are those of the image.
    refine : sequence of int
        Channels of the 3 x 3 transposed convolution after the first ``len(refine)`` doublings.
    crop : int, optional
        Side of the square cut from the centre.
    slope : float
        Of LeakyReLU.
    output : {"linear", "sigmoid"}
        The last activation; the released one is linear, for pixels whose mean was subtracted.

    Examples
    --------
    >>> import torch
    >>> G = FeatureGenerator(64, hidden=(128,), start=(24, 7, 7), up=(16, 1), refine=(), crop=None, output="sigmoid")
    >>> G(torch.randn(5, 64)).shape
    torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self,
        code_dim: int = 4096,
        hidden: Sequence[int] = (4096, 4096),
        start: Sequence[int] = (256, 4, 4),
        up: Sequence[int] = (256, 256, 128, 64, 32, 3),
        refine: Sequence[int] = (512, 256, 128),
        crop: int | None = 227,
        slope: float = 0.3,
        output: Literal["linear", "sigmoid"] = "linear",
    ) -> None:
        super().__init__()
        if len(start) != 3:
            raise ValueError(f"start: expected channels, height and width, got {tuple(start)}")
        if not up or len(refine) >= len(up):
            raise ValueError(f"up, refine: expected fewer widths in refine than in up, got {len(refine)} and {len(up)}")
        side = min(start[1:]) * 2 ** len(up)
        if crop is not None and not 0 < crop <= side:
            raise ValueError(f"crop: expected a side from 1 to {side}, got {crop}")
        if output not in ("linear", "sigmoid"):
            raise ValueError(f"output: expected 'linear' or 'sigmoid', got {output!r}")
        self.code_dim, self.crop = code_dim, crop
        self.config = {
            "code_dim": code_dim,
            "hidden": list(hidden),
            "start": list(start),
            "up": list(up),
            "refine": list(refine),
            "crop": crop,
            "slope": slope,
            "output": output,
        }
        layers: list[nn.Module] = []
        for narrow, wide in pairwise((code_dim, *hidden, start[0] * start[1] * start[2])):
            layers += [nn.Linear(narrow, wide), nn.LeakyReLU(slope)]
        layers.append(nn.Unflatten(1, tuple(start)))
        channels = start[0]
        for number, width in enumerate(up):
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(slope)]
            channels = width
            if number < len(refine):
                channels = refine[number]
                layers += [nn.ConvTranspose2d(width, channels, 3, padding=1), nn.LeakyReLU(slope)]
        layers[-1] = nn.Sigmoid() if output == "sigmoid" else nn.Identity()
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Float[Tensor, "n code_dim"]) -> Float[Tensor, "n c h w"]:
        """Draw images from codes."""
        if h.ndim != 2 or h.shape[1] != self.code_dim:
            raise ValueError(f"h: expected codes of shape (N, {self.code_dim}), got {tuple(h.shape)}")
        x = self.layers(h)
        if self.crop is None:
            return x
        top, left = (x.shape[2] - self.crop) // 2, (x.shape[3] - self.crop) // 2
        return x[:, :, top : top + self.crop, left : left + self.crop]
