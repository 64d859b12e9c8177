"""What a map explains: a score (N,) of a network's output, as every explainer takes it for its argument ``target``.

A target is None (the class with the highest logit), a class index, indices (N,) per sample or (N, T) for several maps
per sample, or a callable from the network's output to (N,): any differentiable score can be explained (Grad-CAM,
section 3). The functions here make such callables.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Callable[[Any], Tensor]
Target = int | Sequence[int] | Tensor | Score | None


def settle_target(output: Any, target: Target, n: int) -> Tensor | Score:
    """The target as indices (N, T), T = 1 unless it came as (N, T), or the callable it is.

    Parameters
    ----------
    output : Any
        What the network returned: logits (N, C), or (N, 1) or (N,) for one logit, unless `target` is callable.
    target : Target
        See the module.
    n : int
        Number of samples N.

    Raises
    ------
    TypeError
        If the output is not a tensor of logits and the target is not callable, or the target has no sensible type.
    ValueError
        For a class that the network does not have, or indices of a wrong shape.
    """
    if callable(target) and not isinstance(target, Tensor):
        return target
    logits = _logits(output, n)
    if target is None:
        target = logits.argmax(1) if logits.shape[1] > 1 else torch.ones(n, dtype=torch.long)
    index = torch.as_tensor(target, device=logits.device)
    if index.is_inference():  # could not be part of a graph
        index = index.clone()
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(f"target must be class indices or a callable on the output, got {index.dtype}")
    index = index.long()
    if index.ndim == 0:
        index = index.expand(n)
    if index.ndim == 1:
        index = index.unsqueeze(1)
    if index.ndim != 2 or len(index) != n:
        raise ValueError(f"target must be a class, ({n},) or ({n}, T) classes; got shape {tuple(index.shape)}")
    classes = max(2, logits.shape[1])
    if bool(((index < 0) | (index >= classes)).any()):
        raise ValueError(f"target must be a class from 0 to {classes - 1}, got {index.unique().tolist()}")
    return index


def target_scores(output: Any, target: Target, n: int) -> Tensor:
    """Scores (N, T) to differentiate: logits of the classes, or what a callable target returns for the output.

    With one logit, class 1 is the logit itself and class 0 its negative. Parameters and errors are those of
    `settle_target`; a callable must return one score per sample.
    """
    target = settle_target(output, target, n)
    if not isinstance(target, Tensor):
        scores = target(output)
        if not isinstance(scores, Tensor) or scores.shape != (n,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"target must return one score per sample, shape ({n},); it returned {got}")
        return scores.unsqueeze(1)
    logits = _logits(output, n)
    return logits.gather(1, target) if logits.shape[1] > 1 else torch.where(target == 1, logits, -logits)


def _logits(output: Any, n: int) -> Tensor:
    if not isinstance(output, Tensor):
        held = f" with {', '.join(map(str, output))}" if isinstance(output, dict) else ""
        raise TypeError(
            f"the model returned a {type(output).__name__}{held}, not a tensor of logits; pass a callable, such as"
            " target=lambda output: output['logits'][:, 3]"
        )
    if output.ndim == 1 and len(output) == n:
        return output.unsqueeze(1)
    if output.ndim != 2 or len(output) != n:
        raise TypeError(
            f"expected logits of shape ({n}, C), the model returned {tuple(output.shape)}; pass a callable that turns"
            " them into one score per sample, such as region_logit for a segmentation network"
        )
    return output


def class_logit(c: int) -> Score:
    """Logit of class `c`."""
    return lambda output: output[:, c]


def labels_over(logits: Tensor, threshold: float = 0.5) -> list[list[int]]:
    """For multi-label logits (N, C): the classes of each sample whose sigmoid is over the threshold."""
    return [row.nonzero().flatten().tolist() for row in logits.sigmoid() > threshold]


def region_logit(c: int, mask: Tensor | None = None) -> Score:
    """Sum of the logit of class `c` over a region of a dense output (N, C, *S); `mask` (*S) or (N, *S)."""

    def score(output: Tensor) -> Tensor:
        dense = output[:, c]
        return (dense if mask is None else dense * mask.to(dense)).flatten(1).sum(1)

    return score


def caption_logprob(tokens: Tensor) -> Score:
    """Log-probability of a caption: of `tokens` (N, L) or (L,) under word logits (N, L, V) of a captioning network."""

    def score(output: Tensor) -> Tensor:
        words = tokens.to(output.device).expand(len(output), -1) if tokens.ndim == 1 else tokens.to(output.device)
        return output.log_softmax(-1).gather(2, words.unsqueeze(2)).squeeze(2).sum(1)

    return score


def q_value(action: int) -> Score:
    """Value of an action under the output (N, A) of a Q-network."""
    return class_logit(action)


def embedding_similarity(reference: Tensor) -> Score:
    """Cosine similarity of the output (N, D) to a reference embedding (D,) or (N, D)."""
    return lambda output: F.cosine_similarity(output, reference.to(output).expand_as(output), dim=1)


def detection_score(label: int, box: Tensor, iou: float = 0.5) -> Score:
    """Sum of the scores of the detections of class `label` that overlap `box` (x0, y0, x1, y1).

    For detectors that return a list of dicts of ``boxes`` (M, 4), ``labels`` (M,), ``scores`` (M,), as in torchvision.
    """

    def score(output: list[dict[str, Tensor]]) -> Tensor:
        sums = []
        for found in output:
            boxes, wanted = found["boxes"].detach(), box.to(found["boxes"])
            size = (torch.minimum(boxes[:, 2:], wanted[2:]) - torch.maximum(boxes[:, :2], wanted[:2])).clamp_min(0)
            shared = size.prod(1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (wanted[2:] - wanted[:2]).prod()
            hit = (shared / (areas - shared) >= iou) & (found["labels"] == label)
            sums.append((found["scores"] * hit).sum())
        return torch.stack(sums)

    return score
