"""The two views of a crop: equal geometry for image and mask, drawn for every crop, computed for the whole batch."""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


class CropViews:
    """Random views of crops and their masks, as in the authors' code, and the one view for predictions.

    In order: a random part of `size` pixels, flips, brightness, contrast and saturation, a rotation by a multiple of 90
    degrees, sharpness, Gaussian blur, fewer colours. The authors apply the three colour changes in random order, here
    their order is fixed.

    Parameters
    ----------
    size : int
        Side of the views.
    brightness, contrast, saturation, sharpness : pair of float
        Ranges of the factors; 1 changes nothing.
    blur : pair of float
        Range of the standard deviation in pixels; 2 is of images of 224.
    kernel : pair of int
        Least and largest side of the blur's kernel, which is odd, in steps of 4.
    bits : pair of int
        Least and largest number of bits left of each colour.

    Examples
    --------
    >>> import torch
    >>> views = CropViews(28)
    >>> x, mask = views.random(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 1, 32, 32).byte())
    >>> x.shape, mask.shape
    (torch.Size([2, 3, 28, 28]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(
        self,
        size: int = 224,
        brightness: tuple[float, float] = (0.6, 1.4),
        contrast: tuple[float, float] = (0.6, 1.4),
        saturation: tuple[float, float] = (0.6, 1.8),
        sharpness: tuple[float, float] = (0.2, 2.0),
        blur: tuple[float, float] = (0.1, 2.0),
        kernel: tuple[int, int] = (9, 33),
        bits: tuple[int, int] = (5, 8),
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size, self.kernel, self.bits = size, kernel, bits
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.sharpness, self.blur = sharpness, blur

    def central(
        self, images: UInt8[Tensor, "b 3 s s"], masks: UInt8[Tensor, "b 1 s s"]
    ) -> tuple[Float[Tensor, "b 3 v v"], Float[Tensor, "b 1 v v"]]:
        """The middle of each crop: images and masks in [0, 1]."""
        at = (self._spare(images)) // 2
        part = torch.cat([images, masks], 1)[..., at : at + self.size, at : at + self.size].float() / 255
        return part[:, :3], part[:, 3:]

    def random(
        self,
        images: UInt8[Tensor, "b 3 s s"],
        masks: UInt8[Tensor, "b 1 s s"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "b 3 v v"], Float[Tensor, "b 1 v v"]]:
        """One random view of each crop: images and masks in [0, 1]. Equal draws on every device."""
        b, device = len(images), images.device

        def uniform(low: float, high: float) -> Tensor:
            return (torch.rand(b, 1, 1, 1, generator=generator) * (high - low) + low).to(device)

        def integer(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (b,), generator=generator)

        both = torch.cat([images, masks], 1)
        spare = max(self._spare(images), 1)
        top, left = (integer(0, spare - 1).to(device)[:, None] for _ in "yx")
        at = torch.arange(self.size, device=device)
        both = both[torch.arange(b, device=device)[:, None, None], :, (top + at)[:, :, None], (left + at)[:, None]]
        both = both.permute(0, 3, 1, 2).float() / 255
        for axis in (-1, -2):
            flip = integer(0, 1).bool().to(device)
            both = torch.where(flip[:, None, None, None], both.flip(axis), both)
        turns = integer(0, 3).to(device)
        for quarter in (1, 2, 3):
            both = torch.where((turns == quarter)[:, None, None, None], both.rot90(quarter, (-2, -1)), both)
        x, mask = both[:, :3], both[:, 3:]
        x = (x * uniform(*self.brightness)).clamp(0, 1)
        for kind, limits in (("contrast", self.contrast), ("saturation", self.saturation)):
            x = adjust(x, uniform(*limits), kind)  # type: ignore[arg-type]
        x = adjust(x, uniform(*self.sharpness), "sharpness")
        side = 4 * torch.randint((self.kernel[1] - self.kernel[0]) // 4 + 1, (b,), generator=generator) + self.kernel[0]
        x = gaussian_blur(x, uniform(*self.blur).flatten(), side.to(device))
        levels = (2.0 ** (8 - integer(*self.bits)).to(device)).view(-1, 1, 1, 1)
        return ((x * 255).round() / levels).floor() * levels / 255, mask

    def _spare(self, images: Tensor) -> int:
        if images.shape[-1] < self.size:
            raise ValueError(f"images: expected at least {self.size} pixels, the views' size, got {images.shape[-1]}")
        return images.shape[-1] - self.size


def adjust(
    x: Float[Tensor, "b 3 h w"],
    factor: Float[Tensor, "b 1 1 1"],
    kind: Literal["contrast", "saturation", "sharpness"],
) -> Float[Tensor, "b 3 h w"]:
    """Blend of each image with its mean grey, its grey, or its smoothed self; a factor of 1 changes nothing."""
    if kind == "sharpness":
        weight = x.new_ones(3, 3)
        weight[1, 1] = 5
        smooth = F.conv2d(x, (weight / 13).expand(3, 1, 3, 3), groups=3)
        other = x.clone()
        other[..., 1:-1, 1:-1] = smooth
    else:
        other = (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        other = other.mean((1, 2, 3), keepdim=True) if kind == "contrast" else other
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def gaussian_blur(
    x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], side: Float[Tensor, " b"] | Tensor
) -> Float[Tensor, "b c h w"]:
    """Blur each image by its own deviation and kernel; borders are mirrored, kernels no larger than that allows."""
    rows, columns = (_blur_matrix(length, sigma, side)[:, None] for length in x.shape[-2:])
    return rows @ x @ columns.transpose(-2, -1)


def _blur_matrix(length: int, sigma: Tensor, side: Tensor) -> Tensor:
    """(B, S, S): row i has the weights of pixel i. Products of matrices are faster than a convolution per image."""
    reach = min(int(side.max()) // 2, length - 1)
    at = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-(at**2) / (2 * sigma[:, None] ** 2)) * (at.abs() <= side[:, None] // 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(length, device=sigma.device)[:, None] + at).abs()
    source = torch.where(source >= length, 2 * (length - 1) - source, source)
    weights = kernel[:, None].expand(-1, length, -1)
    empty = kernel.new_zeros(len(sigma), length, length)
    return empty.scatter_add(2, source.expand(len(sigma), -1, -1), weights)
