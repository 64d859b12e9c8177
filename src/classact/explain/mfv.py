"""Multifaceted feature visualisation: one picture for each kind of image that excites a unit.

Nguyen, Yosinski, Clune: Multifaceted Feature Visualization: Uncovering the Different Types of Features Learned By Each
Neuron in Deep Neural Networks, workshop on Visualization for Deep Learning, ICML 2016,
https://arxiv.org/abs/1602.03616. Code of the authors: https://github.com/Evolving-AI-Lab/mfv (schedules and ascent;
the clustering is not included).

Activation maximisation climbs from a start image to one that excites a unit a_u more. Of a unit that fires for several
kinds of image, from noise, it shows one kind or a mixture. Here the images that excite the unit are clustered, and each
cluster, a facet, gives a start of its own: the mean of the images nearest to its centre. The number and length of the
steps belong to the method. A short climb stays near its start, a long one forgets it, so compare the activation of a
start with that of its picture before praising the latter.

Steps and denoising weights are written in the units of the released schedules, images of range 0..255, and converted to
the range of the pixels at hand. In the authors' code the denoising weight of step i of N goes from s to about s + e
(``s - (s - e i) / N``) where s to e was meant; ``legacy_schedule`` brings that back. Where they climb a softmax output,
its log odds are climbed here: the gradient has the same direction, and its length does not matter, but it neither
vanishes nor loses its digits in float32 near 0 and 1. Denoising and enlarging can leave the pixel range; the pictures
are clipped to it at the end.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_array
from torch import Tensor, nn

from classact.explain.ascent import ascend, gradient_of, unit_step
from classact.explain.frozen import frozen
from classact.explain.image_priors import total_variation_bregman
from classact.explain.layers import Layer, find_module, first_tensor, recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Normalize = Callable[[Tensor], Tensor]
Position = tuple[int, int]


@dataclass(frozen=True)
class Octave:
    """A stretch of steps at one size of the canvas.

    Attributes
    ----------
    iters : int
        Number N of steps, at least 1.
    scale : float
        The canvas is enlarged by this factor before the first step, its sides rounded (28 x 1.2 gives 34 pixels).
    objective : {"logit", "softmax"}
        Climb the unit itself, or its softmax over all units of the layer.
    margin : int
        So many pixels at each edge of the network's input do not move.
    window : float
        Standard deviation of the place of the crop, as a part of what the canvas has over the input.
    step : (float, float)
        Mean absolute change of a pixel in a step, of range 0..255, at the start and at the end.
    tv : (float, float), optional
        Weight of the denoising after each step, for range 0..255; smaller weights denoise more. None: no denoising.
    """

    iters: int
    scale: float = 1.0
    objective: Literal["logit", "softmax"] = "logit"
    margin: int = 0
    window: float = 0.3
    step: tuple[float, float] = (1.0, 1.0)
    tv: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("logit", "softmax"):
            raise ValueError(f"objective: expected logit or softmax, got {self.objective!r}")
        if self.iters < 1 or self.margin < 0:
            raise ValueError(f"iters, margin: expected at least 1 and 0, got {self.iters} and {self.margin}")
        if not self.scale > 0 or not self.window >= 0:
            raise ValueError(f"scale, window: expected positive numbers, got {self.scale} and {self.window}")
        if not min(self.step) > 0 or (self.tv is not None and not min(self.tv) > 0):
            raise ValueError(f"step, tv: expected pairs of positive numbers, got {self.step} and {self.tv}")

    def tv_weight(self, i: int, *, legacy: bool = False) -> float | None:
        """Denoising weight after step i = 0, ..., N - 1: from tv[0] towards tv[1], or as the released code has it.

        >>> octave = Octave(190, tv=(0.4, 0.4))
        >>> octave.tv_weight(189), round(octave.tv_weight(189, legacy=True), 6)
        (0.4, 0.795789)
        """
        if self.tv is None:
            return None
        start, end = self.tv
        if legacy:
            return start - (start - end * i) / self.iters
        return start + (end - start) * i / self.iters


def mean_image_schedule(size: int = 227, length: float = 1.0) -> tuple[Octave, ...]:
    """The released schedule from a mean image: 370 steps, the last but ten in the centre alone.

    Parameters
    ----------
    size : int
        Side of the model's input; the margin of 50 pixels is for 227.
    length : float
        Factor on the numbers of steps.
    """
    octaves = (
        Octave(190, step=(1.0, 2.0), tv=(0.4, 0.4)),
        Octave(150, scale=1.2, tv=(0.01, 2.0)),
        Octave(20, margin=50, window=0.2, step=(2.0, 2.0), tv=(0.1, 2.0)),
        Octave(10, step=(2.0, 2.0), tv=(0.4, 2.0)),
    )
    return tuple(_adapt(octave, size, length) for octave in octaves)


def center_biased_schedule(size: int = 227, length: float = 1.0) -> tuple[Octave, ...]:
    """The released schedule from noise, 530 steps: one blurred object, then detail, then detail in the centre alone.

    The parameters are those of [`mean_image_schedule`][classact.explain.mean_image_schedule].
    """
    octaves = (
        Octave(190, objective="softmax", step=(11.0, 11.0), tv=(0.001, 0.05)),
        Octave(150, scale=1.2, objective="softmax", step=(6.0, 6.0), tv=(0.01, 0.08)),
        Octave(150, scale=1.2, tv=(0.01, 2.0)),
        Octave(30, margin=50, window=0.1, step=(3.0, 3.0), tv=(0.1, 2.0)),
        Octave(10, step=(6.0, 3.0), tv=(0.01, 2.0)),
    )
    return tuple(_adapt(octave, size, length) for octave in octaves)


def _adapt(octave: Octave, size: int, length: float) -> Octave:
    return replace(octave, iters=max(1, round(octave.iters * length)), margin=round(octave.margin * size / 227))


def plain_schedule(iters: int = 370) -> tuple[Octave, ...]:
    """Activation maximisation without any regulariser, with as many steps as `mean_image_schedule` has."""
    return (Octave(iters),)


class AMResult(NamedTuple):
    """Pictures (N, C, H', W'), activation (N,) of their central crops, and the objective (T, N) before each step."""

    images: Float[Tensor, "n c h w"]
    activation: Float[Tensor, " n"]
    trace: Float[Tensor, "t n"]


class ActivationMaximizer:
    """Climb to images that excite a unit of a network; runs of a batch are independent.

    A step: ``x <- x + eta g / mean|g|``, g the gradient of the unit, in a crop of the network's input size; then
    clipping, then denoising of the crop. The model is frozen while it is climbed, and handed back as it was.

    Parameters
    ----------
    model : Module
        From images (N, C, H, W) to units (N, U), or (N, U, h, w).
    layer : str or Module, optional
        Layer of the unit, or its name; by default, the output of the model.
    octaves : sequence of Octave, optional
        What is done; by default [`center_biased_schedule`][classact.explain.center_biased_schedule] for the size of
        the input.
    pixel_range : (float, float)
        Range of the images, before `normalize`.
    normalize : callable, optional
        From images in the pixel range to the input of the model.
    input_shape : (int, int, int), optional
        (C, H, W) of the model's input; by default, that of the start. Needed to start from noise.
    tv : {"bregman", None}
        How to denoise; None leaves out all denoising.
    jitter : bool
        Draw the place of the crop anew in each step, where the canvas is larger than the input. Else it is the centre.
    noise : (float, float)
        Mean and standard deviation of a random start, of range 0..255.
    legacy_schedule : bool
        Denoising weights as in the released code.

    Examples
    --------
    The first unit of this network wants light above.

    >>> model = nn.Sequential(nn.AvgPool2d((4, 8)), nn.Flatten())
    >>> climb = ActivationMaximizer(model, octaves=plain_schedule(20), input_shape=(1, 8, 8))
    >>> result = climb(0, n=3, generator=torch.Generator().manual_seed(0))
    >>> result.images.shape, bool((result.images[:, 0, :4].mean() - result.images[:, 0, 4:].mean()) > 0.15)
    (torch.Size([3, 1, 8, 8]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | None = None,
        octaves: Sequence[Octave] | None = None,
        pixel_range: tuple[float, float] = (0.0, 1.0),
        normalize: Normalize | None = None,
        *,
        input_shape: tuple[int, int, int] | None = None,
        tv: Literal["bregman"] | None = "bregman",
        jitter: bool = True,
        noise: tuple[float, float] = (175.0, 8.0),
        legacy_schedule: bool = False,
    ) -> None:
        if not pixel_range[0] < pixel_range[1]:
            raise ValueError(f"pixel_range: expected a low and a high end, got {pixel_range}")
        if tv not in ("bregman", None):
            raise ValueError(f"tv: expected bregman or None, got {tv!r}")
        self.model, self.layer, self.normalize = model, layer, normalize
        if octaves is not None and not octaves:
            raise ValueError("octaves: expected at least one")
        self.octaves = octaves
        self.pixel_range, self.input_shape = pixel_range, input_shape
        self.tv, self.jitter, self.noise, self.legacy_schedule = tv, jitter, noise, legacy_schedule

    def __call__(
        self,
        unit: int | Int[Tensor, " n"],
        x0: Float[Tensor, "n c h w"] | None = None,
        *,
        position: Position | None = None,
        generator: torch.Generator | None = None,
        n: int = 1,
    ) -> AMResult:
        """Climb from each start.

        Parameters
        ----------
        unit : int or (N,) int
            The unit or, for each run, its own.
        x0 : (N, C, H, W), optional
            Starts, in the pixel range and not smaller than the model's input. Noise by default.
        position : (int, int), optional
            Row and column in a layer with feature maps; by default the middle.
        generator : torch.Generator, optional
            On the CPU; draws noise and crops.
        n : int
            Number of runs from noise.

        Returns
        -------
        AMResult
            A run whose gradient is zero in a step stays where it was, without denoising.

        Raises
        ------
        ValueError
            If a shape does not fit, there is no such unit or position, or a canvas is smaller than the input.
        FloatingPointError
            If an activation or its gradient is not finite.

        Warns
        -----
        RuntimeWarning
            If a run had a gradient of zero in some step.
        """
        x, (height, width) = self._start(x0, generator, n)
        octaves = center_biased_schedule(min(height, width)) if self.octaves is None else self.octaves
        _check_octaves(octaves, tuple(x.shape[2:]), (height, width))
        units = torch.as_tensor(unit, device=x.device)
        if units.ndim and units.shape != x.shape[:1]:
            raise ValueError(f"unit: expected an integer or {len(x)}, one for each run, got {tuple(units.shape)}")
        units = units.expand(len(x))
        traces, still = [], torch.zeros(len(x), dtype=torch.long, device=x.device)
        with _layer_output(self.model, self.layer, self.normalize) as output:

            def logits(images: Tensor) -> Tensor:
                return _at_position(output(images), position)

            count = logits(_crop(x, _middle(x, height, width))).shape[1]
            if int(units.min()) < 0 or int(units.max()) >= count:
                raise ValueError(f"unit: expected 0 to {count - 1}, got {unit}")
            for octave in octaves:
                x = _enlarge(x, octave.scale)
                x, trace, stopped = self._climb(octave, x, (height, width), logits, units, generator)
                traces.append(trace)
                still += stopped
            low, high = self.pixel_range
            x = x.clamp(low, high)
            with torch.no_grad():
                activation = logits(_crop(x, _middle(x, height, width))).gather(1, units.view(-1, 1)).squeeze(1)
        if still.any():
            runs = ", ".join(f"run {i} in {steps}" for i, steps in enumerate(still.tolist()) if steps)
            warnings.warn(
                f"zero gradient, no step: {runs} of {sum(map(len, traces))} steps", RuntimeWarning, stacklevel=2
            )
        return AMResult(x, activation, torch.cat(traces))

    def _start(self, x0: Tensor | None, generator: torch.Generator | None, n: int) -> tuple[Tensor, tuple[int, int]]:
        if x0 is None:
            if self.input_shape is None or n < 1:
                raise ValueError(f"x0: without it, input_shape and n >= 1 are needed, got {self.input_shape} and {n}")
            low, high = self.pixel_range
            mean, std = (value * (high - low) / 255 for value in self.noise)
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            noise = torch.randn((n, *self.input_shape), generator=generator).to(device)
            return low + mean + std * noise, self.input_shape[1:]
        if x0.ndim != 4 or (self.input_shape is not None and x0.shape[1] != self.input_shape[0]):
            expected = "(N, C, H, W)" if self.input_shape is None else f"(N, {self.input_shape[0]}, H, W)"
            raise ValueError(f"x0: expected shape {expected}, got {tuple(x0.shape)}")
        height, width = x0.shape[2:] if self.input_shape is None else self.input_shape[1:]
        return x0.detach(), (height, width)

    def _climb(
        self,
        octave: Octave,
        x: Tensor,
        size: tuple[int, int],
        logits: Callable[[Tensor], Tensor],
        units: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Canvas after an octave, objective before each step (T, N), number of steps without gradient (N,)."""
        low, high = self.pixel_range
        per_level = (high - low) / 255
        margin, n = octave.margin, len(x)
        inner = x.new_zeros(size)
        inner[margin : size[0] - margin, margin : size[1] - margin] = 1
        trace: list[Tensor] = []
        still = torch.zeros(n, dtype=torch.long, device=x.device)
        crop, moving = _middle(x, *size), torch.ones(n, dtype=torch.bool, device=x.device)

        def objective(images: Tensor) -> Tensor:
            values = logits(images)
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            chosen = values.gather(1, units.view(-1, 1)).squeeze(1)
            if octave.objective == "softmax":
                chosen = chosen - values.scatter(1, units.view(-1, 1), -torch.inf).logsumexp(1)
            return chosen

        gradient = gradient_of(objective)

        def direction(canvas: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal crop, moving, still
            if self.jitter:
                crop = _draw_crop(canvas, *size, octave.window, generator)
            g, values = gradient(_crop(canvas, crop))
            g = g * inner
            moving = g.flatten(1).any(1)
            still = still + ~moving
            step = torch.zeros_like(canvas)
            step[_index(canvas, crop)] = unit_step(g, "mean")
            return step, values

        def project(canvas: Tensor, t: int) -> Tensor:
            images = _crop(canvas, crop)
            changed = images.clamp(low, high)
            weight = octave.tv_weight(t, legacy=self.legacy_schedule)
            if self.tv is not None and weight is not None:
                changed = total_variation_bregman(changed, weight / per_level, eps=1e-3 * per_level)
            canvas[_index(canvas, crop)] = torch.where(moving.view(-1, 1, 1, 1), changed, images)
            return canvas

        def watch(t: int, _: Tensor, values: Tensor) -> None:
            if not bool(torch.isfinite(values).all()):
                raise FloatingPointError(f"the activation is not finite at step {t}")
            trace.append(values)

        lr = (octave.step[0] * per_level, octave.step[1] * per_level)
        x = ascend(direction, x, octave.iters, lr=lr, scale=None, project=project, watch=watch)
        return x, torch.stack(trace), still


def _check_octaves(octaves: Sequence[Octave], canvas: tuple[int, ...], size: tuple[int, int]) -> None:
    for number, octave in enumerate(octaves):
        canvas = tuple(round(side * octave.scale) for side in canvas)
        if canvas[0] < size[0] or canvas[1] < size[1]:
            raise ValueError(f"octaves[{number}]: its canvas {canvas} is smaller than the input {size}")
        if 2 * octave.margin >= min(size):
            limit = f"less than half of the input {size}"
            raise ValueError(f"octaves[{number}].margin: expected {limit}, got {octave.margin}")


Crop = tuple[Tensor, Tensor]  # rows (N, H) and columns (N, W)


def _middle(x: Tensor, height: int, width: int) -> Crop:
    rows = torch.arange(height, device=x.device) + (x.shape[2] - height) // 2
    columns = torch.arange(width, device=x.device) + (x.shape[3] - width) // 2
    return rows.expand(len(x), -1), columns.expand(len(x), -1)


def _draw_crop(x: Tensor, height: int, width: int, window: float, generator: torch.Generator | None) -> Crop:
    """Crops whose corners are normal around the middle, with `window` of the free space for standard deviation."""
    free = torch.tensor([x.shape[2] - height, x.shape[3] - width], dtype=torch.float32)
    if not free.any():
        return _middle(x, height, width)
    corner = free / 2 + free * window * torch.randn((len(x), 2), generator=generator)
    corner = torch.minimum(corner.clamp_min(0), free).long().to(x.device)
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    return rows + corner[:, :1], columns + corner[:, 1:]


def _index(x: Tensor, crop: Crop) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = crop
    run, channel = (torch.arange(size, device=x.device) for size in x.shape[:2])
    return run.view(-1, 1, 1, 1), channel.view(1, -1, 1, 1), rows[:, None, :, None], columns[:, None, None, :]


def _crop(x: Tensor, crop: Crop) -> Tensor:
    return x[_index(x, crop)]


def _enlarge(x: Tensor, scale: float) -> Tensor:
    """Cubic spline interpolation, corner pixels onto corner pixels."""
    if scale == 1:
        return x
    from scipy.ndimage import zoom

    return torch.from_numpy(zoom(x.cpu().numpy(), (1, 1, scale, scale), mode="mirror")).to(x)


@contextmanager
def _layer_output(
    model: nn.Module, layer: Layer | None, normalize: Normalize | None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A frozen model as a function from images in the pixel range to a layer's output."""
    modules = [] if layer is None else [find_module(model, layer)[1]]
    with frozen(model), recorded(modules, gradients=False) as found:

        def output(x: Tensor) -> Tensor:
            result = first_tensor(model(x if normalize is None else normalize(x)))
            result = found[0] if modules else result
            if result is None:
                raise TypeError(f"layer: expected one that is used and has a tensor for output, got {layer!r}")
            return result

        yield output


def _at_position(output: Tensor, position: Position | None) -> Tensor:
    """Units (N, U) of an output (N, U), or (N, U, h, w) at a position, the middle by default."""
    if output.ndim == 4:
        height, width = output.shape[2:]
        row, column = (height // 2, width // 2) if position is None else position
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"position: expected a place in maps of {height} x {width}, got {position}")
        return output[:, :, row, column]
    if output.ndim != 2 or position is not None:
        raise ValueError(
            f"layer: expected output (N, U), or (N, U, h, w) for a position, got shape {tuple(output.shape)}"
            f" and position {position}"
        )
    return output


def top_images(
    model: nn.Module,
    layer: Layer | None,
    unit: int,
    dataset: Any,
    n: int,
    *,
    position: Position | None = None,
    normalize: Normalize | None = None,
    batch_size: int = 256,
) -> Int[Tensor, " n"]:
    """Indices of the n images that excite a unit most, strongest first.

    Parameters
    ----------
    model, layer, normalize
        As for [`ActivationMaximizer`][classact.explain.ActivationMaximizer].
    unit : int
        The unit.
    dataset : Tensor (M, C, H, W) or Dataset
        Images, or tuples that begin with an image, as ``torchvision.datasets.ImageFolder`` has them.
    n : int
        How many, at most M.
    position : (int, int), optional
        Row and column in feature maps; by default the position where each image excites the unit most.
    batch_size : int
        Images at a time.

    Raises
    ------
    ValueError
        If there are not so many images, or there is no such unit or position.
    """
    from torch.utils.data import DataLoader

    if not 1 <= n <= len(dataset):
        raise ValueError(f"n: expected 1 to {len(dataset)}, the number of images, got {n}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = []
    with _layer_output(model, layer, normalize) as output, torch.no_grad():
        for batch in DataLoader(dataset, batch_size=batch_size):
            result = output((batch[0] if isinstance(batch, (tuple, list)) else batch).to(device))
            if not 0 <= unit < result.shape[1]:
                raise ValueError(f"unit: expected 0 to {result.shape[1] - 1}, got {unit}")
            maps = result.ndim == 4 and position is None
            units = result.flatten(2).amax(2) if maps else _at_position(result, position)
            found.append(units[:, unit].float().cpu())
    return torch.cat(found).topk(n).indices


class FacetClusterer(ClusterMixin, BaseEstimator):
    """Cluster the codes of the images that excite a unit: PCA, t-SNE to two dimensions, k-means (paper, Algorithm 1).

    Distances in a t-SNE embedding are not those of the codes, and the clusters depend on the seed and on `n_facets`;
    look at the silhouette, and compare with ``embedding="pca"``.

    Parameters
    ----------
    n_facets : int
        Number k of clusters.
    n_components : int
        Principal components that are kept, fewer if there are not so many.
    embedding : {"tsne", "pca"}
        Cluster in a t-SNE embedding of the components, or the components themselves.
    n_nearest : int
        Images nearest to a cluster's centre that its mean image is made of.
    perplexity : float
        Of t-SNE; less for fewer than 3 perplexity + 1 images.
    random_state : int, RandomState or None
        Of all three steps.

    Attributes
    ----------
    labels_ : ndarray (n,)
        Cluster of each image.
    embedding_ : ndarray (n, 2) or (n, n_components)
        Where the clusters were found.
    centers_ : ndarray (k, ...)
        Their centres there.
    nearest_ : list of ndarray
        For each cluster, its members nearest to the centre, nearest first.
    mean_images_ : ndarray or Tensor (k, C, H, W)
        Their means, if images were given.
    silhouette_ : float
        Mean silhouette of the clusters in the embedding, -1 to 1.

    Examples
    --------
    >>> codes = np.repeat([[0.0, 0.0], [20.0, 0.0]], 20, axis=0) + np.random.default_rng(0).normal(size=(40, 2))
    >>> facets = FacetClusterer(n_facets=2, random_state=0).fit(codes)
    >>> len(set(facets.labels_[:20])), len(set(facets.labels_[20:])), facets.nearest_[0].shape
    (1, 1, (15,))
    """

    def __init__(
        self,
        n_facets: int = 10,
        n_components: int = 50,
        embedding: Literal["tsne", "pca"] = "tsne",
        n_nearest: int = 15,
        perplexity: float = 30.0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_facets = n_facets
        self.n_components = n_components
        self.embedding = embedding
        self.n_nearest = n_nearest
        self.perplexity = perplexity
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, images: Any = None) -> "FacetClusterer":  # noqa: ARG002
        """Cluster codes X (n, d); with images (n, C, H, W), average those nearest to each centre.

        Raises
        ------
        ValueError
            If there are fewer images than facets, the number of images is not n, or a parameter is out of range.

        Warns
        -----
        RuntimeWarning
            If a cluster has fewer than `n_nearest` images; then all of them are taken.
        """
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score

        X = check_array(X, dtype=[np.float64, np.float32], ensure_min_samples=2, estimator=self)
        self.n_features_in_ = X.shape[1]
        if self.embedding not in ("tsne", "pca"):
            raise ValueError(f"embedding: expected tsne or pca, got {self.embedding!r}")
        for name in ("n_facets", "n_components", "n_nearest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.n_facets > len(X):
            raise ValueError(f"n_facets: expected at most {len(X)}, the number of images, got {self.n_facets}")
        if images is not None and len(images) != len(X):
            raise ValueError(f"images: expected {len(X)}, as many as codes, got {len(images)}")
        seeded = {"random_state": self.random_state}
        components = min(self.n_components, *X.shape)
        self.embedding_ = PCA(components, **seeded).fit_transform(X)
        if self.embedding == "tsne":
            perplexity = min(self.perplexity, (len(X) - 1) / 3)
            start = "pca" if components > 1 else "random"
            self.embedding_ = TSNE(2, perplexity=perplexity, init=start, **seeded).fit_transform(self.embedding_)
        clusters = KMeans(self.n_facets, n_init=10, **seeded).fit(self.embedding_)
        self.labels_, self.centers_ = clusters.labels_, clusters.cluster_centers_
        judged = 1 < len(set(self.labels_)) < len(X)
        self.silhouette_ = float(silhouette_score(self.embedding_, self.labels_)) if judged else math.nan
        self.nearest_ = []
        for label, center in enumerate(self.centers_):
            members = np.flatnonzero(self.labels_ == label)
            distance = np.linalg.norm(self.embedding_[members] - center, axis=1)
            self.nearest_.append(members[np.argsort(distance, kind="stable")[: self.n_nearest]])
        if small := {j: len(found) for j, found in enumerate(self.nearest_) if len(found) < self.n_nearest}:
            message = f"facets with fewer than n_nearest={self.n_nearest} images, by facet: {small}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        if images is not None:
            means = [images[found].mean(0) for found in self.nearest_]
            self.mean_images_ = torch.stack(means) if isinstance(images, Tensor) else np.stack(means)
        return self


@dataclass(frozen=True)
class FacetGallery:
    """The facets of a unit.

    Attributes
    ----------
    images : (k, C, H', W')
        A picture for each facet.
    starts : (k, C, H, W)
        The mean images they were climbed from.
    activations, start_activations : (k,)
        Activation of the unit for the pictures and for the mean images.
    exemplars : list of ndarray
        For each facet, which of the images its mean is made of, nearest to the centre first.
    clusters : FacetClusterer
        The fitted clusters.
    pixel_range : (float, float)
        Range of the images.
    """

    images: Float[Tensor, "k c h w"]
    starts: Float[Tensor, "k c h0 w0"]
    activations: Float[Tensor, " k"]
    start_activations: Float[Tensor, " k"]
    exemplars: list[np.ndarray]
    clusters: FacetClusterer
    pixel_range: tuple[float, float]

    def table(self) -> Any:
        """Size of each facet's cluster, and activation of its mean image and of its picture, as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(
            {
                "images": np.bincount(self.clusters.labels_, minlength=len(self.images)),
                "start_activation": self.start_activations.cpu().numpy(),
                "activation": self.activations.cpu().numpy(),
            }
        ).rename_axis("facet")

    def plot(self) -> "Figure":
        """Mean images above the pictures, with the activation of each."""
        from matplotlib.figure import Figure

        k, (low, high) = len(self.images), self.pixel_range
        figure = Figure((1.3 * k + 0.6, 3.2), layout="constrained")
        rows = ((self.starts, self.start_activations, "mean image"), (self.images, self.activations, "picture"))
        for axes, (images, activations, label) in zip(figure.subplots(2, k, squeeze=False), rows, strict=True):
            for panel, image, activation in zip(axes, images, activations, strict=True):
                shown = ((image - low) / (high - low)).clamp(0, 1).cpu().permute(1, 2, 0).squeeze(2)
                panel.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
                panel.set_title(f"{float(activation):.1f}", fontsize=9)
                panel.set(xticks=[], yticks=[])
            axes[0].set_ylabel(label)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the figure as ``<path>.png`` and the table as ``<path>.csv``; return the former."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.table().to_csv(path.with_suffix(".csv"))
        self.plot().savefig(path.with_suffix(".png"))
        return path.with_suffix(".png")


def multifaceted(
    model: nn.Module,
    layer: Layer | None,
    unit: int,
    images: Float[Tensor, "n c h w"],
    codes_layer: Layer,
    n_facets: int = 10,
    *,
    position: Position | None = None,
    clusterer: FacetClusterer | None = None,
    octaves: Sequence[Octave] | None = None,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    normalize: Normalize | None = None,
    legacy_schedule: bool = False,
    random_state: int = 0,
    batch_size: int = 256,
) -> FacetGallery:
    """Find the facets of a unit and draw each (paper, Algorithm 1).

    Parameters
    ----------
    model, layer, unit, position, normalize
        As for [`ActivationMaximizer`][classact.explain.ActivationMaximizer].
    images : (n, C, H, W)
        What excites the unit, in the pixel range: training images of its class, or for a hidden unit those of
        [`top_images`][classact.explain.top_images].
    codes_layer : str or Module
        A high layer, whose output clusters the images; feature maps are flattened.
    n_facets : int
        Number of clusters.
    clusterer : FacetClusterer, optional
        Used as it is, in place of one with `n_facets` clusters, the paper's settings and `random_state`.
    octaves : sequence of Octave, optional
        [`mean_image_schedule`][classact.explain.mean_image_schedule] for the size of the images by default.
    pixel_range : (float, float)
        Range of the images.
    legacy_schedule : bool
        Denoising weights as in the released code.
    random_state : int
        Of the clusters and of the crops.
    batch_size : int
        Images at a time for the codes.
    """
    if clusterer is None:
        clusterer = FacetClusterer(n_facets, random_state=random_state)
    with _layer_output(model, codes_layer, normalize) as output, torch.no_grad():
        codes = torch.cat([output(part).flatten(1).float().cpu() for part in images.split(batch_size)])
    clusterer.fit(codes.numpy(), images=images)
    starts = torch.as_tensor(clusterer.mean_images_)
    climb = ActivationMaximizer(
        model,
        layer,
        mean_image_schedule(min(images.shape[2:])) if octaves is None else octaves,
        pixel_range,
        normalize,
        legacy_schedule=legacy_schedule,
    )
    result = climb(unit, starts, position=position, generator=torch.Generator().manual_seed(random_state))
    with _layer_output(model, layer, normalize) as output, torch.no_grad():
        before = _at_position(output(starts), position)[:, unit]
    return FacetGallery(result.images, starts, result.activation, before, clusterer.nearest_, clusterer, pixel_range)
