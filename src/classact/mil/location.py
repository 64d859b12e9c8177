"""Where in the bag: scores of instances from the pass that made the prediction, and whether they are evidence.

Attention says what a model looks at, not what it holds for what. Where a bag's logits are a sum over its instances,
as in attention pooling followed by a linear layer, the summands say that as well (Javed et al., Additive MIL, NeurIPS
2022). Whether a high score means evidence is tested by taking instances away (Samek et al., Evaluating the
Visualization of What a Deep Neural Network Has Learned, 2017).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATTENTION, CONTRIBUTION, INSTANCE_LOGIT = "attention", "attention x class logit", "instance logit"
FRACTIONS = (0.05, 0.1, 0.2, 0.5)  # of the instances, taken away or kept


@torch.inference_mode()
def locate(model: nn.Module, x: Tensor, coords: Tensor | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Classify one bag and score its instances by what the same forward pass computed.

    Parameters
    ----------
    model : Module
        Any model of the family, possibly wrapped.
    x : (1, K, D)
        The bag.
    coords : (1, K, 2), optional
        Positions of its instances.

    Returns
    -------
    output : MILOutput
        As the model gives it.
    scores : dict
        ``"attention"`` (K,), the weights; ``"attention x class logit"`` (K, C), where these sum to the bag's logits;
        ``"instance logit"`` (K, C), where the model classifies instances.
    """
    with _embedded(model) as seen:
        output = model(x, None, coords)
    attention = output.attention_logits[0].float().softmax(-1)
    scores = {ATTENTION: attention}
    logits = output.logits[0].float()
    if len(seen) == 1 and seen[0].shape[:2] == x.shape[:2]:
        try:
            parts = attention[:, None] * _network(model).head(seen[0][0]).float()
        except RuntimeError:  # a head on something else than one pooled vector
            parts = None
        if parts is not None and parts.shape[1:] == logits.shape and torch.allclose(parts.sum(0), logits, 1e-3, 1e-3):
            scores[CONTRIBUTION] = parts
    of_instances = getattr(output, "instance_logits", None)
    if of_instances is not None and of_instances.shape == (*x.shape[:2], *logits.shape):  # CLAM's are of a sample only
        scores[INSTANCE_LOGIT] = of_instances[0].float()
    return output, scores


def _network(model: Any) -> Any:
    while isinstance(inner := getattr(model, "network", None), nn.Module):
        model = inner
    return model


@contextmanager
def _embedded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the embedded instances that the network computes."""
    network = _network(model)
    embed = getattr(network, "embed", None)
    seen: list[Tensor] = []
    if embed is None:
        yield seen
        return

    def record(x: Tensor) -> Tensor:
        seen.append(embed(x))
        return seen[-1]

    network.embed = record
    try:
        yield seen
    finally:
        del network.embed


@torch.inference_mode()
def deletion_insertion(
    model: nn.Module, bags: Any, scores: Sequence[np.ndarray], seed: int, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Probability of the predicted class when instances are taken away, or are all that is left.

    For every bag of at least two instances, the fractions 5, 10, 20 and 50 % of its instances (at least one, never all)
    are chosen by score, the highest first, and at random. Instances are really removed, not masked, and keep their
    order.

    Parameters
    ----------
    model : Module
        In evaluation mode.
    bags : iterable of Bag
        What it has not seen in training.
    scores : sequence of (K,) arrays
        Score of every instance of every bag.
    seed : int
        Of the random order.

    Returns
    -------
    dict
        ``"deletion_top"``, ``"deletion_random"``, ``"insertion_top"``, ``"insertion_random"``, each (5,): means over
        the bags at the fractions 0, 5, 10, 20, 50 % for deletion, and 5, 10, 20, 50, 100 % for insertion. Empty if no
        bag has two instances with different scores.
    """
    rng = np.random.default_rng(seed)
    model = model.to(device).eval()
    found = []
    for bag, score in zip(bags, scores, strict=True):
        size = len(score)
        if size < 2 or np.ptp(score) < 1e-9:
            continue
        x = bag.x.to(device)
        coords = None if bag.coords is None else bag.coords.to(device)

        def probabilities(kept: Tensor) -> Tensor:
            part = None if coords is None else coords[kept]  # noqa: B023
            return model(x[kept], None, part).logits.float().softmax(-1)  # noqa: B023

        whole = probabilities(torch.arange(size, device=device)[None])[0]
        predicted = int(whole.argmax())
        orders = torch.from_numpy(np.stack([np.argsort(-score, kind="stable"), rng.permutation(size)])).to(device)
        counts = [min(max(1, round(fraction * size)), size - 1) for fraction in FRACTIONS]
        curves = np.empty((2, 2, len(counts) + 1))  # deletion and insertion; by score and at random
        curves[:, :, [0, -1]] = float(whole[predicted])
        for count in set(counts):  # small bags have few
            where = [i for i, c in enumerate(counts) if c == count]
            for insertion, kept in enumerate((orders[:, count:], orders[:, :count])):
                p = probabilities(kept.sort(-1).values)[:, predicted].cpu().numpy()
                curves[insertion][:, [i + 1 - insertion for i in where]] = p[:, None]
        found.append(curves)
    if not found:
        return {}
    mean = np.mean(found, axis=0)
    kinds, by = ("deletion", "insertion"), ("top", "random")
    return {f"{kind}_{order}": mean[i, j] for i, kind in enumerate(kinds) for j, order in enumerate(by)}
