"""How good a map is: localisation against boxes or masks, faithfulness to the network by removing pixels.

Maps are (N, H, W); every measure is one value per image, so that means and intervals stay with the caller. None of
these measures alone shows that a map is right: see [`classact.explain.sanity`][classact.explain.sanity] for controls.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from classact.explain.cam import check_input
from classact.explain.frozen import frozen
from classact.explain.image_priors import gaussian_blur
from classact.explain.targets import Score, Target, settle_target

Fill = Literal["blur", "mean", "zero"] | Tensor
Model = nn.Module | Callable[[Tensor], Any]


class Curve(NamedTuple):
    """Target probability (N, S + 1) at shares (S + 1,) of changed pixels, and the area under it, `auc` (N,)."""

    auc: Float[Tensor, "N"]
    shares: Float[Tensor, "S1"]
    values: Float[Tensor, "N S1"]


def insertion(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = 28,
    fill: Fill = "blur",
    batch_size: int = 64,
) -> Curve:
    """Insertion (Petsiuk et al. 2018, RISE): pixels appear on a filled image, those of the highest map value first.

    A good map has a large area. Parameters are those of [`deletion`][classact.explain.deletion].
    """
    return _removal(model, x, maps, target, steps, fill, batch_size, insert=True)


def deletion(
    model: Model,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = 28,
    fill: Fill = "mean",
    batch_size: int = 64,
) -> Curve:
    """Deletion (Petsiuk et al. 2018, RISE): pixels are replaced, those of the highest map value first.

    A good map has a small area.

    Parameters
    ----------
    model : callable
        (N, C, H, W) -> logits (N, C), or (N, 1) for one logit.
    x : (N, C, H, W)
        Images as the model takes them.
    maps : (N, H, W)
        Only the ranking of the pixels matters; equal values go in a random order, the same for every map, so that a map
        of ones is as good as a random one.
    target : None, int, (N,) or callable
        Class whose probability is followed (softmax, or sigmoid for one logit); of a callable, its value as it is.
    steps : int
        Number of equal portions.
    fill : {"blur", "mean", "zero"} or Tensor
        What replaces a pixel: a strong blur of the image (sigma H / 10), its mean per channel, zero (the mean of the
        training images after normalisation), or images of the shape of `x`.
    batch_size : int
        Images in one forward pass.
    """
    return _removal(model, x, maps, target, steps, fill, batch_size, insert=False)


def _removal(
    model: Model, x: Tensor, maps: Tensor, target: Target, steps: int, fill: Fill, batch_size: int, *, insert: bool
) -> Curve:
    x = check_input(x)
    _check_maps(maps, x)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    other = filled(x, fill)
    settled = settled_target(model, x, target)
    shuffled = torch.randperm(maps[0].numel(), generator=torch.Generator().manual_seed(0)).to(maps.device)
    order = shuffled[maps.flatten(1)[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    rank = rank.view_as(maps).unsqueeze(1)
    first, second = (other, x) if insert else (x, other)
    shares = torch.linspace(0, 1, steps + 1)
    pairs = [(n, s) for s in range(steps + 1) for n in range(len(x))]
    values = []
    batch_size = _batch(settled, x, batch_size)
    for start in range(0, len(pairs), batch_size):
        rows, step = torch.tensor(pairs[start : start + batch_size]).T
        count = (shares[step] * rank[0].numel()).round().view(-1, 1, 1, 1).to(rank.device)
        changed = torch.where(rank[rows] < count, second[rows], first[rows])
        values.append(probabilities(model, changed, _rows(settled, rows)))
    curve = torch.cat(values).view(steps + 1, len(x)).T
    return Curve(torch.trapezoid(curve, dx=1 / steps, dim=1), shares, curve)


def filled(x: Tensor, fill: Fill) -> Tensor:
    """What stands in for removed pixels of x (N, C, H, W); see [`deletion`][classact.explain.deletion]."""
    if isinstance(fill, Tensor):
        if fill.shape != x.shape:
            raise ValueError(f"fill must have the shape of x, {tuple(x.shape)}, got {tuple(fill.shape)}")
        return fill
    if fill == "zero":
        return torch.zeros_like(x)
    if fill == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    if fill == "blur":
        return gaussian_blur(x, x.shape[2] / 10)
    raise ValueError(f"fill must be 'blur', 'mean', 'zero' or a tensor, got {fill!r}")


def settled_target(model: Model, x: Tensor, target: Target) -> Tensor | Score:
    """The target as classes (N,), predicted where it is None, or the callable it is."""
    if callable(target) and not isinstance(target, Tensor):
        return target
    with torch.no_grad(), frozen(model):
        index = settle_target(model(x), target, len(x))
    assert isinstance(index, Tensor)
    if index.shape[1] > 1:
        raise ValueError("target must be one class per image")
    return index[:, 0]


def probabilities(model: Model, x: Tensor, target: Tensor | Score) -> Tensor:
    """Probability (N,) of the target classes (N,): softmax, or sigmoid for one logit; a callable's value as it is."""
    with torch.no_grad(), frozen(model):
        output = model(x)
    if not isinstance(target, Tensor):
        return target(output)
    if output.ndim == 1 or output.shape[1] == 1:
        positive = output.reshape(-1).sigmoid()
        return torch.where(target == 1, positive, 1 - positive)
    return output.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)


def _batch(target: Tensor | Score, x: Tensor, batch_size: int) -> int:
    """A callable target sees all images in their order, since it may know something of each."""
    return batch_size if isinstance(target, Tensor) else len(x)


def _rows(target: Tensor | Score, rows: Tensor) -> Tensor | Score:
    return target[rows] if isinstance(target, Tensor) else target


def _check_maps(maps: Tensor, x: Tensor) -> None:
    if maps.shape != (len(x), *x.shape[2:]):
        raise ValueError(f"maps must be {(len(x), *x.shape[2:])} for x {tuple(x.shape)}, got {tuple(maps.shape)}")


def confidence_change(model: Model, x: Tensor, maps: Tensor, target: Target = None) -> tuple[Tensor, Tensor]:
    """Target probability of the images, and of the images multiplied with their maps in [0, 1] (both (N,))."""
    x = check_input(x)
    _check_maps(maps, x)
    settled = settled_target(model, x, target)
    return probabilities(model, x, settled), probabilities(model, x * maps.unsqueeze(1).to(x), settled)


def average_drop(model: Model, x: Tensor, maps: Tensor, target: Target = None) -> Float[Tensor, "N"]:
    """Average drop (Chattopadhay et al. 2018): max(0, Y - O) / Y, O the confidence for the image times its map."""
    Y, O = confidence_change(model, x, maps, target)  # noqa: E741 - the paper's symbol
    return (Y - O).clamp_min(0) / Y.clamp_min(torch.finfo(Y.dtype).tiny)


def increase_in_confidence(model: Model, x: Tensor, maps: Tensor, target: Target = None) -> Float[Tensor, "N"]:
    """Increase in confidence (Chattopadhay et al. 2018): 1 where the image times its map is more confident, else 0."""
    Y, O = confidence_change(model, x, maps, target)  # noqa: E741 - the paper's symbol
    return (O > Y).to(Y)


def boxes_from_map(
    maps: Float[Tensor, "N H W"], frac: float = 0.15, component: Literal["largest", "all"] = "largest"
) -> Int[Tensor, "N 4"]:
    """Tight box (r0, c0, r1, c1), ends excluded, around what reaches `frac` of a map's maximum (Grad-CAM, section 4.1).

    Parameters
    ----------
    maps : (N, H, W)
        Not negative.
    frac : float
        Threshold as a share of the maximum. 15 % suits Grad-CAM; compare methods each at a threshold fitted on other
        images.
    component : {"largest", "all"}
        Keep the largest connected part (4 neighbours), or all.

    Returns
    -------
    Tensor
        (N, 4); zeros for a map without a positive value.
    """
    from scipy.ndimage import find_objects, label

    if not 0 < frac <= 1:
        raise ValueError(f"frac must be in (0, 1], got {frac}")
    if component not in ("largest", "all"):
        raise ValueError(f"component must be 'largest' or 'all', got {component!r}")
    if maps.ndim != 3:
        raise ValueError(f"maps must be (N, H, W), got shape {tuple(maps.shape)}")
    boxes = torch.zeros(len(maps), 4, dtype=torch.long)
    for number, one in enumerate(maps.detach().cpu().float().numpy()):
        peak = one.max()
        if not peak > 0:
            continue
        parts, count = label(one >= frac * peak)
        if component == "largest" and count > 1:
            parts = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        rows, columns = find_objects((parts > 0).astype(np.int8))[0]
        boxes[number] = torch.tensor([rows.start, columns.start, rows.stop, columns.stop])
    return boxes


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) that broadcast, (r0, c0, r1, c1) with ends excluded."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return shared / union.clamp_min(1)


def localization_error(
    maps: Float[Tensor, "N H W"], boxes: Int[Tensor, "N B 4"], iou: float = 0.5, frac: float = 0.15
) -> Float[Tensor, "N"]:
    """1 where the box of a map has an intersection over union below `iou` with every true box, else 0 (ILSVRC).

    Parameters
    ----------
    maps : (N, H, W)
        Maps of the true class; for a top-5 error take the smallest of five.
    boxes : (N, B, 4)
        True boxes (r0, c0, r1, c1); rows of zeros are padding.
    iou, frac : float
        Overlap that counts as right, and threshold of [`boxes_from_map`][classact.explain.boxes_from_map].
    """
    found = boxes_from_map(maps, frac).unsqueeze(1)
    return (box_iou(found, boxes.cpu()).amax(1) < iou).float()


def pointing_game(maps: Float[Tensor, "N H W"], masks: Bool[Tensor, "N H W"], tolerance: int = 0) -> Float[Tensor, "N"]:
    """1 where the maximum of a map lies on the object, or within `tolerance` pixels of it (Zhang et al. 2016), else 0.

    A map that is the same everywhere points nowhere: 0.
    """
    _check_masks(maps, masks)
    wide = masks.float().unsqueeze(1)
    if tolerance:
        wide = F.max_pool2d(wide, 2 * tolerance + 1, stride=1, padding=tolerance)
    flat = maps.flatten(1)
    hit = wide.flatten(1).gather(1, flat.argmax(1, keepdim=True)).squeeze(1)
    return hit * (flat.amax(1) > flat.amin(1))


def recall_aware_pointing(
    maps: Float[Tensor, "N C H W"], masks: Bool[Tensor, "N C H W"], reject: float, tolerance: int = 0
) -> Float[Tensor, "N"]:
    """Pointing game that credits the rejection of absent classes (Grad-CAM, section 4.1), a share of C per image.

    Parameters
    ----------
    maps : (N, C, H, W)
        Maps of the C highest predicted classes, not normalised, so that their maxima can be compared.
    masks : (N, C, H, W) bool
        Where each class is; all False if it is absent.
    reject : float
        Maps whose maximum is below are rejected: right if the class is absent, wrong if it is there.
    tolerance : int
        See [`pointing_game`][classact.explain.pointing_game].
    """
    flat, at = maps.flatten(0, 1), masks.flatten(0, 1)
    absent, rejected = ~at.flatten(1).any(1), flat.flatten(1).amax(1) < reject
    right = torch.where(rejected, absent.float(), pointing_game(flat, at, tolerance))
    return right.view(maps.shape[:2]).mean(1)


def energy_pointing_game(maps: Float[Tensor, "N H W"], masks: Bool[Tensor, "N H W"]) -> Float[Tensor, "N"]:
    """Share of a map's sum that lies on the object (Wang et al. 2020, Score-CAM); 0 for an empty map."""
    _check_masks(maps, masks)
    total = maps.flatten(1).sum(1)
    inside = (maps * masks).flatten(1).sum(1)
    return torch.where(total > 0, inside / torch.where(total > 0, total, 1), 0)


def _check_masks(maps: Tensor, masks: Tensor) -> None:
    if maps.ndim != 3 or masks.shape != maps.shape:
        raise ValueError(f"maps and masks must both be (N, H, W), got {tuple(maps.shape)} and {tuple(masks.shape)}")


def occlusion_map(
    model: Model, x: Tensor, target: Target, patch: int, stride: int, fill: float | Tensor = 0.0, batch_size: int = 256
) -> Float[Tensor, "N h w"]:
    """Drop of the target's score when a patch of `fill` covers each position (Zeiler and Fergus 2014).

    The score is the logit of the class, or a callable's value. `fill` is a number or one value per channel.
    """
    x = check_input(x)
    if not 1 <= patch <= min(x.shape[2:]) or stride < 1:
        raise ValueError(f"patch must fit into {tuple(x.shape[2:])} and stride be positive, got {patch} and {stride}")
    settled = settled_target(model, x, target)
    tops, lefts = (range(0, size - patch + 1, stride) for size in x.shape[2:])
    spots = [(n, r, c) for r in tops for c in lefts for n in range(len(x))]
    batch_size = _batch(settled, x, batch_size)
    fills = torch.as_tensor(fill, dtype=x.dtype, device=x.device).view(-1, 1, 1)
    drops = []
    whole = _scores(model, x, settled)
    for start in range(0, len(spots), batch_size):
        part = spots[start : start + batch_size]
        rows = torch.tensor([n for n, _, _ in part])
        covered = x[rows].clone()
        for number, (_, r, c) in enumerate(part):
            covered[number, :, r : r + patch, c : c + patch] = fills
        drops.append(whole[rows] - _scores(model, covered, _rows(settled, rows)))
    return torch.cat(drops).view(len(tops), len(lefts), len(x)).permute(2, 0, 1)


def _scores(model: Model, x: Tensor, target: Tensor | Score) -> Tensor:
    with torch.no_grad(), frozen(model):
        output = model(x)
    if not isinstance(target, Tensor):
        return target(output)
    if output.ndim == 1 or output.shape[1] == 1:
        return torch.where(target == 1, output.reshape(-1), -output.reshape(-1))
    return output.gather(1, target.unsqueeze(1)).squeeze(1)


def occlusion_faithfulness(
    model: Model,
    x: Tensor,
    target: Target,
    maps: Float[Tensor, "N H W"],
    patch: int,
    stride: int,
    fill: float | Tensor = 0.0,
) -> Float[Tensor, "N"]:
    """Rank correlation of a map, pooled over the same patches, with the occlusion map (Grad-CAM, section 5.2).

    0 where one of the two is constant.
    """
    _check_maps(maps, x)
    drop = occlusion_map(model, x, target, patch, stride, fill)
    pooled = F.avg_pool2d(maps.unsqueeze(1), patch, stride).squeeze(1)
    return rank_correlation(pooled, drop)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation (N,) of two batches of maps (N, ...), ties by mean rank; 0 if one is constant."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(part.detach().cpu().double().flatten(1).numpy(), axis=1)) for part in (a, b)]
    ra, rb = (r - r.mean(1, keepdim=True) for r in ranks)
    size = ra.norm(dim=1) * rb.norm(dim=1)
    return torch.where(size > 0, (ra * rb).sum(1) / torch.where(size > 0, size, 1), 0).float()
