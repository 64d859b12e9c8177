"""Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noisy copies of the input.

Omeiza et al., "Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural
Network Models", IntelliSys 2019, https://arxiv.org/abs/1908.01224. Grad-CAM++ (Chattopadhay et al., WACV 2018,
https://arxiv.org/abs/1710.11063) is the case of one copy without noise.

Noise acts through the gradient alone, for the activations are those of the clean input. Where that gradient is the same
for every input, as at the last feature map of a network that ends with global average pooling and one linear layer,
smoothing changes nothing: take an earlier layer there.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5))
>>> with SmoothGradCAMpp(model, n_samples=4) as cam:
...     maps = cam(torch.rand(2, 3, 16, 16), target=1)
>>> maps.shape
torch.Size([2, 16, 16])
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from classact.explain.cam import CAM, Record, check_input, normalize_map, upsample_map
from classact.explain.layers import Layer, Reshape
from classact.explain.targets import Target

Numerator = Literal["second", "paper"]
Denominator = Literal["paper", "sum_AD"]
Region = Tensor | Sequence[int] | None
Derivatives = tuple[Tensor, Tensor, Tensor]


def gradcampp_weights(
    D1: Float[Tensor, "N K *S"],
    D2: Float[Tensor, "N K *S"],
    D3: Float[Tensor, "N K *S"],
    A: Float[Tensor, "N K *S"],
    *,
    numerator: Numerator = "second",
    denominator: Denominator = "paper",
    region: Tensor | None = None,
) -> Float[Tensor, "N K"]:
    """Weights w_k = sum_ij alpha_kij ReLU(D1_kij) of feature maps, alpha = num / (2 D2 + (sum_ab A_ab) D3).

    Parameters
    ----------
    D1, D2, D3 : (N, K, *S)
        First to third derivatives of the score, averaged over noisy copies if there are any.
    A : (N, K, *S)
        Activations for the clean input.
    numerator : {"second", "paper"}
        ``"second"`` takes D2, as Grad-CAM++ derives it; the Smooth Grad-CAM++ paper prints D1.
    denominator : {"paper", "sum_AD"}
        ``"sum_AD"`` takes sum_ab(A_ab D3_ab) for the second term, as torchcam does.
    region : bool (*S) or (N, *S), optional
        Positions that count in the sum over ij; the sum over ab is a property of the whole map.

    Returns
    -------
    Tensor
        (N, K); alpha is 0 where the denominator vanishes.
    """
    if numerator not in ("second", "paper"):
        raise ValueError(f"numerator must be 'second' or 'paper', got {numerator!r}")
    if denominator not in ("paper", "sum_AD"):
        raise ValueError(f"denominator must be 'paper' or 'sum_AD', got {denominator!r}")
    axes = tuple(range(2, A.ndim))
    spread = A.sum(axes, keepdim=True) * D3 if denominator == "paper" else (A * D3).sum(axes, keepdim=True)
    den = 2 * D2 + spread
    # the two terms can cancel to a rounding error, whose inverse means nothing
    defined = den.abs() > 8 * torch.finfo(den.dtype).eps * D2
    alpha = torch.where(defined, (D2 if numerator == "second" else D1) / torch.where(defined, den, 1), 0)
    terms = alpha * D1.relu()
    if region is not None:
        terms = terms * (region.unsqueeze(1) if region.ndim == D1.ndim - 1 else region)
    return terms.sum(axes)


class Gallery(NamedTuple):
    """Maps (N, top, H, W) of single feature maps, the `channels` (N, top) they are, and their `weights` (N, top)."""

    maps: Float[Tensor, "N top *S"]
    channels: Int[Tensor, "N top"]
    weights: Float[Tensor, "N top"]


class SmoothGradCAMpp(CAM):
    """Smooth Grad-CAM++ (section 3): ReLU(sum_k w_k A_k).

    Besides the whole layer, a call shows a part of it (the paper's other two modes), chosen by two further arguments.
    ``maps``, a sequence of channels, leaves only these feature maps in the sum; their weights do not change.
    ``region``, a bool mask (*s) or (N, *s) or bounds (r0, r1, c0, c1) in the layer's coordinates, leaves only the
    neurons at these positions, in the weights as in the map.

    Parameters
    ----------
    model, layer, reshape
        See [`CAM`][classact.explain.CAM].
    n_samples : int
        Noisy copies of each input.
    sigma : float
        Standard deviation of the noise, as a share of each input's range (``sigma_mode="range"``, 0.1 to 0.2 as for
        SmoothGrad) or in the units of the input (``"absolute"``).
    numerator, denominator
        See [`gradcampp_weights`][classact.explain.gradcampp_weights].
    score_scale : {"logit", "exp"}
        ``"exp"`` weights each copy with exp(score), as in the derivation of Grad-CAM++ for Y = exp(S); scores enter
        relative to the largest of the copies.
    generator : torch.Generator or list of N, optional
        Source of the noise, one for all samples or one each. By default every call draws the same noise (seed 0), so
        that maps of several classes can be compared.
    chunk : int, optional
        Noisy copies in one batch; memory grows with it, results do not change. By default as many as make a batch of
        about 32. With a callable target it is 1, so that the callable always sees N samples.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer] = "auto",
        *,
        n_samples: int = 8,
        sigma: float = 0.15,
        sigma_mode: Literal["range", "absolute"] = "range",
        numerator: Numerator = "second",
        denominator: Denominator = "paper",
        score_scale: Literal["logit", "exp"] = "logit",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        chunk: int | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        super().__init__(model, layer, reshape=reshape)
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        if sigma_mode not in ("range", "absolute"):
            raise ValueError(f"sigma_mode must be 'range' or 'absolute', got {sigma_mode!r}")
        if score_scale not in ("logit", "exp"):
            raise ValueError(f"score_scale must be 'logit' or 'exp', got {score_scale!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.n_samples, self.sigma, self.sigma_mode = n_samples, sigma, sigma_mode
        self.numerator, self.denominator, self.score_scale = numerator, denominator, score_scale
        self.generator, self.chunk = generator, chunk

    def raw_layers(self, x: Tensor, target: Target = None, **options: Any) -> list[Tensor]:
        """Maps (N, T, *s) of every layer, not scaled."""
        return [part.relu() for part in self.signed_layers(x, target, **options)]

    def signed_layers(
        self, x: Tensor, target: Target = None, *, maps: Sequence[int] | None = None, region: Region = None
    ) -> list[Tensor]:
        """As `raw_layers`, before the ReLU: maps over a partition of the feature maps add up to that of the layer."""
        found = []
        for A, derivatives in self.derivatives(x, target):
            chosen, inside = _channels(maps, A.shape[1]), _region(region, A)
            parts = []
            for D1, D2, D3 in derivatives:
                w = self._weights(D1, D2, D3, A, inside)[:, chosen]
                L = (w.view(*w.shape, *[1] * (A.ndim - 2)) * A[:, chosen]).sum(1)
                parts.append(L if inside is None else L * inside)
            found.append(torch.stack(parts, 1))
        return found

    def weights(self, x: Tensor, target: Target = None, *, region: Region = None) -> Float[Tensor, "N K"]:
        """Weights (N, K) of the feature maps of the first layer."""
        A, ((D1, D2, D3), *_) = self.derivatives(x, target)[0]
        return self._weights(D1, D2, D3, A, _region(region, A))

    def feature_map_gallery(self, x: Tensor, target: Target = None, top: int = 9, *, upsample: bool = True) -> Gallery:
        """The feature maps that count most: those with the largest |w_k| times mean activation, each on its own."""
        A, ((D1, D2, D3), *_) = self.derivatives(x, target)[0]
        if not 1 <= top <= A.shape[1]:
            raise ValueError(f"top must be from 1 to {A.shape[1]}, got {top}")
        w = self._weights(D1, D2, D3, A, None)
        channels = (w.abs() * A.flatten(2).mean(2).abs()).topk(top).indices
        rows = torch.arange(len(A), device=A.device).unsqueeze(1)
        maps = normalize_map(A[rows, channels].relu().flatten(0, 1))
        maps = upsample_map(maps, x.shape[2:]) if upsample else maps
        return Gallery(maps.unflatten(0, channels.shape), channels, w.gather(1, channels))

    def derivatives(self, x: Tensor, target: Target = None) -> list[tuple[Tensor, list[Derivatives]]]:
        """For every layer the clean activations (N, K, *s), and for every target the mean D1, D2, D3 (N, K, *s)."""
        x = check_input(x)
        clean = self.record(x, target)
        if self.sigma == 0:
            return [(part.A, [(g, g**2, g**3) for g in part.gradients]) for part in clean.layers]
        means = _WeightedMeans(exponential=self.score_scale == "exp")
        settled = clean.target  # noise cannot change the class that is explained
        chunk = (self.chunk or max(1, 32 // len(x))) if isinstance(settled, Tensor) else 1
        with torch.inference_mode(mode=False):  # an index made in inference mode could not be differentiated through
            for noisy in self._copies(x, chunk):
                copies = len(noisy) // len(x)
                repeated = settled.repeat(copies, 1) if isinstance(settled, Tensor) else settled
                means.add(self.record(noisy, repeated), copies)
        return [(part.A, of) for part, of in zip(clean.layers, means.result(), strict=True)]

    def _weights(self, D1: Tensor, D2: Tensor, D3: Tensor, A: Tensor, region: Tensor | None) -> Tensor:
        return gradcampp_weights(D1, D2, D3, A, numerator=self.numerator, denominator=self.denominator, region=region)

    def _copies(self, x: Tensor, chunk: int) -> Iterator[Tensor]:
        span = x.flatten(1).amax(1) - x.flatten(1).amin(1)
        sigma = self.sigma * (span if self.sigma_mode == "range" else torch.ones_like(span))
        sigma = sigma.view(-1, *[1] * (x.ndim - 1))
        generator = self.generator or torch.Generator(x.device).manual_seed(0)
        if not isinstance(generator, torch.Generator) and len(generator) != len(x):
            raise ValueError(f"generator must be one, or one per sample ({len(x)}), got {len(generator)}")

        def noise() -> Tensor:
            if isinstance(generator, torch.Generator):
                return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            one = x.shape[1:]
            return torch.stack([torch.randn(one, generator=g, dtype=x.dtype, device=x.device) for g in generator])

        for start in range(0, self.n_samples, chunk):
            yield torch.cat([x + sigma * noise() for _ in range(min(chunk, self.n_samples - start))])


class _WeightedMeans:
    """Running means of g, g^2 and g^3 over noisy copies, weighted alike or by exp(score).

    Scores enter relative to the largest so far; when a larger one comes, what has been summed shrinks accordingly.
    """

    def __init__(self, *, exponential: bool) -> None:
        self.exponential = exponential
        self.sums: list[list[list[Tensor]]] = []
        self.total = self.peak = torch.empty(0)

    def add(self, record: Record, copies: int) -> None:
        scores = record.scores.unflatten(0, (copies, -1))  # (copies, N, T)
        if not self.sums:
            self.sums = [
                [[torch.zeros_like(g.unflatten(0, (copies, -1))[0]) for _ in range(3)] for g in part.gradients]
                for part in record.layers
            ]
            self.total, self.peak = torch.zeros_like(scores[0]), torch.full_like(scores[0], -torch.inf)
        share, shrink = torch.ones_like(scores), torch.ones_like(scores[0])
        if self.exponential:
            highest = torch.maximum(self.peak, scores.amax(0))
            share, shrink, self.peak = (scores - highest).exp(), (self.peak - highest).exp(), highest
        self.total = self.total * shrink + share.sum(0)
        for layer, part in zip(self.sums, record.layers, strict=True):
            for t, gradient in enumerate(part.gradients):
                g = gradient.unflatten(0, (copies, -1))
                power = g * share[..., t].view(*g.shape[:2], *[1] * (g.ndim - 2))
                for p in range(3):
                    layer[t][p] = layer[t][p] * shrink[:, t].view(-1, *[1] * (g.ndim - 2)) + power.sum(0)
                    power = power * g

    def result(self) -> list[list[Derivatives]]:
        def mean(part: Tensor, t: int) -> Tensor:
            return part / self.total[:, t].view(-1, *[1] * (part.ndim - 1))

        return [
            [(mean(D1, t), mean(D2, t), mean(D3, t)) for t, (D1, D2, D3) in enumerate(layer)] for layer in self.sums
        ]


class GradCAMpp(SmoothGradCAMpp):
    """Grad-CAM++ (Chattopadhay et al. 2018): [`SmoothGradCAMpp`][classact.explain.SmoothGradCAMpp] without noise."""

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer] = "auto",
        *,
        denominator: Denominator = "paper",
        reshape: Reshape | None = None,
    ) -> None:
        super().__init__(model, layer, n_samples=1, sigma=0, denominator=denominator, reshape=reshape)


def _channels(maps: Sequence[int] | None, K: int) -> Tensor | slice:
    """Channels as an index."""
    if maps is None:
        return slice(None)
    chosen = [int(k) for k in maps]
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < K:
        raise ValueError(f"maps must be one or more different channels from 0 to {K - 1}, got {chosen}")
    return torch.tensor(chosen)


def _region(region: Region, A: Tensor) -> Tensor | None:
    """Positions as a bool tensor (*s) or (N, *s), for activations A (N, K, *s)."""
    if region is None:
        return None
    size = tuple(A.shape[2:])
    if isinstance(region, Tensor):
        inside = region.bool()
        if tuple(inside.shape) not in (size, (len(A), *size)):
            raise ValueError(f"region must be {size} or {(len(A), *size)} as the layer is, got {tuple(inside.shape)}")
    else:
        bounds = list(region)
        if len(bounds) != 2 * len(size):
            raise ValueError(
                f"region must be a mask or {2 * len(size)} bounds, start and end of each axis, got {bounds}"
            )
        pairs = list(zip(bounds[::2], bounds[1::2], size, strict=True))
        if any(not 0 <= low <= high <= limit for low, high, limit in pairs):
            raise ValueError(f"region {bounds} does not lie in a layer of shape {size}")
        inside = torch.zeros(size, dtype=torch.bool)
        inside[tuple(slice(low, high) for low, high, _ in pairs)] = True
    if not bool(inside.flatten(-len(size)).any(-1).all()):
        raise ValueError("region is empty")
    return inside.to(A.device)
