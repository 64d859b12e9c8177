"""Whether a map is about this network and this class, and better than no explanation at all.

Three questions, one number each: how similar the map stays when the network's weights are shuffled from the top down
(Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, https://arxiv.org/abs/1810.03292), how similar it is
to the map of another class, and where it ranks among controls that know nothing of the network.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from classact.explain.cam import normalize_map, upsample_map
from classact.explain.image_priors import gaussian_blur
from classact.explain.metrics import Fill, Model, deletion, insertion, rank_correlation

CONTROLS = ("uniform", "gaussian", "random", "edges")


def control_maps(x: Float[Tensor, "N C H W"], kind: str, seed: int = 0) -> Float[Tensor, "N H W"]:
    """Maps that know nothing of the network, in [0, 1].

    Parameters
    ----------
    x : (N, C, H, W)
        Images.
    kind : {"uniform", "gaussian", "random", "edges"}
        Ones everywhere; a Gaussian in the centre, its standard deviation a quarter of each side, since people put what
        they photograph there; smooth noise, as coarse as a map of 7 x 7 positions, another for every image; the blurred
        magnitude of the image's Sobel gradient.
    seed : int
        Of the noise.
    """
    n, (height, width) = len(x), x.shape[2:]
    if kind == "uniform":
        return torch.ones(n, height, width, dtype=x.dtype, device=x.device)
    if kind == "gaussian":
        rows, columns = (
            (-0.5 * (torch.linspace(-2, 2, size, dtype=x.dtype, device=x.device) ** 2)).exp()
            for size in (height, width)
        )
        return torch.outer(rows, columns).expand(n, -1, -1)
    if kind == "random":
        noise = torch.rand(n, 7, 7, generator=torch.Generator().manual_seed(seed)).to(x)
        return normalize_map(upsample_map(noise, (height, width)), "minmax")
    if kind == "edges":
        grey = F.pad(x.mean(1, keepdim=True), [1, 1, 1, 1], mode="replicate")
        sobel = x.new_tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        gradient = F.conv2d(grey, torch.stack([sobel, sobel.T]).unsqueeze(1))
        return normalize_map(gaussian_blur(gradient.norm(dim=1, keepdim=True), height / 50).squeeze(1))
    raise ValueError(f"kind must be one of {', '.join(CONTROLS)}, got {kind!r}")


def shuffled_copies(model: nn.Module, stages: int = 3, seed: int = 0) -> list[nn.Module]:
    """Copies of a network whose weights are shuffled from the top down, cumulatively, in equal portions of its layers.

    Each weight and bias keeps its values in another order, so that activations keep their scale; the last copy has no
    layer left as it was trained.
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    current = copy.deepcopy(model).eval()
    layers = [part for part in current.modules() if next(part.parameters(recurse=False), None) is not None][::-1]
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for stage in range(stages):
        for part in layers[stage * len(layers) // stages : (stage + 1) * len(layers) // stages]:
            for parameter in part.parameters(recurse=False):
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.data = parameter.data.flatten()[order].view_as(parameter)
        copies.append(copy.deepcopy(current))
    return copies


def similarity(a: Tensor, b: Tensor) -> Float[Tensor, "N"]:
    """Rank correlation of two batches of maps (N, H, W), compared at no more than 32 x 32 positions."""
    size = (min(32, a.shape[1]), min(32, a.shape[2]))
    return rank_correlation(*(F.adaptive_avg_pool2d(part.unsqueeze(1).float(), size).squeeze(1) for part in (a, b)))


class Trust(NamedTuple):
    """For one map per image, (N,) each.

    Attributes
    ----------
    insertion, deletion : dict fill -> (N,)
        Areas under the curves.
    gain : dict fill -> (N,)
        Insertion minus deletion, by which maps are ranked.
    """

    insertion: dict[str, Tensor]
    deletion: dict[str, Tensor]
    gain: dict[str, Tensor]


def trust(
    model: Model, x: Tensor, maps: Tensor, target: Any, *, steps: int = 10, fills: Mapping[str, Fill] | None = None
) -> Trust:
    """Insertion and deletion of maps under each of several fills, a blur and the image's mean by default."""
    fills = {"blur": "blur", "mean": "mean"} if fills is None else fills
    inserted = {name: insertion(model, x, maps, target, steps=steps, fill=fill).auc for name, fill in fills.items()}
    deleted = {name: deletion(model, x, maps, target, steps=steps, fill=fill).auc for name, fill in fills.items()}
    return Trust(inserted, deleted, {name: inserted[name] - deleted[name] for name in fills})


def randomization_similarity(
    explain: Callable[[nn.Module, Tensor, Any], Tensor], model: nn.Module, x: Tensor, target: Any, *, stages: int = 3
) -> Float[Tensor, "stages N"]:
    """Similarity of each image's map to that of the network after each stage of shuffling, (stages, N).

    An explanation of the network loses it; one that only shows edges keeps it.

    Parameters
    ----------
    explain : callable
        ``explain(model, x, target) -> (N, H, W)``.
    model, x, target
        Network, images and the classes or callable explained.
    stages : int
        See [`shuffled_copies`][classact.explain.sanity.shuffled_copies].
    """
    original = explain(model, x, target)
    return torch.stack([similarity(original, explain(other, x, target)) for other in shuffled_copies(model, stages)])
