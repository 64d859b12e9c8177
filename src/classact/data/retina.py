"""A synthetic retina: neurons of known functional types that answer to images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RETINA_TYPES = ("ON centre", "ON centre with surround", "wide ON", "OFF centre", "vertical Gabor", "Gabor on wide blob")
COUNTS = (60, 40, 25, 25, 15, 10)


class LNPopulation(nn.Module):
    """Linear-nonlinear neurons of six types: ``r = gain * softplus(1.5 <w, x> + bias)``.

    Ground truth: ``types`` (n,), an index into ``RETINA_TYPES`` for each neuron, and ``templates`` (6, S, S), the
    receptive field of each type before any variation, of norm 1. Types overlap on purpose: the first three share their
    centre, the last two their grating. Neurons of a type vary in size (10 %), angle (0.1 rad) and phase (0.3 rad);
    white noise of 35 % of its norm is added to each receptive field, which is then scaled to norm 1; gains are
    log-normal (0.5), biases normal (0.3). Receptive fields are centred: position carries no information.

    Parameters
    ----------
    counts : sequence of int
        Neurons of each type.
    size : int
        Side S of the images, in pixels.
    noise : float
        Norm of the noise in a receptive field, as a part of the norm of that field.
    seed : int
        Seed of the variation between neurons.

    Examples
    --------
    >>> population = LNPopulation(seed=1)
    >>> population(torch.zeros(2, 1, 16, 16)).shape, len(population.types)
    (torch.Size([2, 175]), 175)
    """

    filters: Tensor
    templates: Tensor
    types: Tensor
    gain: Tensor
    bias: Tensor

    def __init__(self, counts: Sequence[int] = COUNTS, size: int = 16, noise: float = 0.35, seed: int = 0) -> None:
        super().__init__()
        if len(counts) != len(RETINA_TYPES) or min(counts) < 0 or sum(counts) < 1:
            raise ValueError(f"counts: expected {len(RETINA_TYPES)} numbers of neurons, got {list(counts)}")
        generator = torch.Generator().manual_seed(seed)
        n = sum(counts)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        types = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        scale, angle, phase = 1 + 0.1 * normal(n), 0.1 * normal(n), 0.3 * normal(n)
        fields = torch.stack([_field(t, size, *v) for t, *v in zip(types.tolist(), scale, angle, phase, strict=True)])
        grain = normal(n, size, size)
        fields = _unit(fields + noise * _unit(grain))
        flat = torch.zeros(())
        self.register_buffer("filters", fields)
        self.register_buffer(
            "templates", torch.stack([_field(t, size, flat + 1, flat, flat) for t in range(len(counts))])
        )
        self.register_buffer("types", types)
        self.register_buffer("gain", (0.5 * normal(n)).exp())
        self.register_buffer("bias", 0.3 * normal(n))

    def forward(self, x: Tensor) -> Tensor:
        """Rates (N, n) of all neurons, positive, for images (N, 1, S, S)."""
        if x.shape[1:] != (1, *self.filters.shape[1:]):
            raise ValueError(f"x: expected shape (N, 1, {', '.join(map(str, self.filters.shape[1:]))}), got {x.shape}")
        return self.gain * F.softplus(1.5 * x.flatten(1) @ self.filters.flatten(1).T + self.bias)


def _field(kind: int, size: int, scale: Tensor, angle: Tensor, phase: Tensor) -> Tensor:
    """Receptive field of a type, of norm 1."""
    at = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")

    def blob(sigma: float) -> Tensor:
        return (-(x**2 + y**2) / (2 * (scale * sigma) ** 2)).exp()

    def gabor() -> Tensor:
        across = x * angle.cos() + y * angle.sin()
        return blob(2.5) * (2 * math.pi * across / (5 * scale) + phase).cos()

    fields = (
        lambda: blob(1.5),
        lambda: blob(1.5) - 0.3 * blob(3.0),
        lambda: blob(3.5),
        lambda: -blob(1.5),
        gabor,
        lambda: _unit(gabor()) + _unit(blob(3.5)),
    )
    return _unit(fields[kind]())


def _unit(fields: Tensor) -> Tensor:
    return fields / fields.flatten(-2).norm(dim=-1)[..., None, None]


def natural_like_images(n: int, size: int = 16, norm: float = 5.0, seed: int = 0) -> Tensor:
    """Noise images (n, 1, S, S) whose amplitude falls as 1/f, as in natural scenes; of mean 0 and a fixed L2 norm."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    amplitude = torch.where(radius > 0, 1 / radius.clamp_min(1 / size), torch.zeros(()))
    spectrum = torch.fft.fft2(torch.randn(n, 1, size, size, generator=generator)) * amplitude
    return norm * _unit(torch.fft.ifft2(spectrum).real)
