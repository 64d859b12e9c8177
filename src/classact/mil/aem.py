"""AEM: attention entropy maximization.

Zhang, Li, Sun, Li, Zhu, Yang: AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide
Image Classification, 2024, https://arxiv.org/abs/2406.15303. Code of the authors: dazhangyu123/AEM.

One term joins the loss of any attention model: the negative entropy of the attention over the instances of a bag,
``L = L_cls + weight * mean_maps sum_k a_k log a_k``. Nothing changes at test time.

The entropy is not divided by ln K, so its scale grows with the bag: up to 3.7 nats for 40 instances, 9.2 for 10,000.
A useful `weight` is therefore much smaller for large bags; the paper picks one per data set on validation. With a very
large one the attention becomes uniform and the model a mean pooling.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from classact.mil.model import MILLoss

if TYPE_CHECKING:
    import pandas as pd


def attention_entropy(
    attention: Float[Tensor, "n *maps k"],
    mask: Bool[Tensor, "n k"] | None = None,
    from_logits: bool = True,
    normalize: bool = False,
) -> Float[Tensor, "n *maps"]:
    """Shannon entropy of every attention map, in nats.

    Parameters
    ----------
    attention : (N, K) or (N, ..., K)
        Attention logits (-inf on padding), or weights with ``from_logits=False``.
    mask : (N, K) bool, optional
        True where an instance is real, unless padding is marked by -inf or weight 0 already.
    from_logits : bool
        Whether `attention` holds logits.
    normalize : bool
        Divide by the logarithm of the number of instances that take part, so that bags of every size give values in
        [0, 1]; a bag of one instance gives 0.

    Returns
    -------
    (N,) or (N, ...)
        Entropy in [0, ln K], or in [0, 1].

    Raises
    ------
    ValueError
        If K = 0, the mask has another shape, or weights do not sum to 1.

    Examples
    --------
    >>> import torch
    >>> attention_entropy(torch.zeros(1, 4))
    tensor([1.3863])
    """
    if attention.ndim < 2 or attention.shape[-1] == 0:
        raise ValueError(f"attention: expected shape (N, ..., K) with K > 0, got {tuple(attention.shape)}")
    if mask is not None:
        if mask.shape != (attention.shape[0], attention.shape[-1]):
            raise ValueError(
                f"mask: expected shape {(attention.shape[0], attention.shape[-1])}, got {tuple(mask.shape)}"
            )
        padding = ~mask.view(mask.shape[0], *[1] * (attention.ndim - 2), mask.shape[1])
        attention = attention.masked_fill(padding, -torch.inf if from_logits else 0.0)
    if from_logits:
        log_a = attention.log_softmax(-1)
        a = log_a.exp()
    else:
        total = attention.sum(-1)
        if not torch.allclose(total, torch.ones_like(total), atol=1e-3) or bool((attention < 0).any()):
            raise ValueError(
                "attention: expected weights that sum to 1 over the instances "
                f"(got sums from {total.min():.4g} to {total.max():.4g}); pass logits with from_logits=True"
            )
        a = attention
        log_a = torch.where(a > 0, a, 1.0).log()
    log_a = log_a.masked_fill(log_a == -torch.inf, 0.0)  # 0 log 0 = 0, with gradient 0
    entropy = -(a * log_a).sum(-1)
    if normalize:
        taking_part = (attention > (-torch.inf if from_logits else 0.0)).sum(-1)
        entropy = entropy / taking_part.clamp(min=2).to(entropy.dtype).log()
    return entropy


def effective_instances(
    attention: Float[Tensor, "n *maps k"], mask: Bool[Tensor, "n k"] | None = None, from_logits: bool = True
) -> Float[Tensor, "n *maps"]:
    """Effective number of attended instances, exp(entropy), in [1, K].

    Examples
    --------
    >>> import torch
    >>> effective_instances(torch.zeros(1, 4)).round()
    tensor([4.])
    """
    return attention_entropy(attention, mask, from_logits).exp()


class AttentionEntropy(MILLoss):
    """The term ``weight * (-H)`` averaged over bags and attention maps; add it to any loss of the family.

    It takes the attention logits that pooled the bag, after masking, so that padded and hidden instances do not count.

    Parameters
    ----------
    weight : float
        lambda of the paper (0.1 in its CAMELYON17 example). 0 gives a loss bit-identical to the one without the term.
    normalize : bool
        Divide by ln K (not in the paper).
    allow_negative : bool
        Accept a negative weight, which sharpens the attention instead.

    Examples
    --------
    >>> import torch
    >>> from classact.mil import ABMIL, BagCrossEntropy
    >>> model, loss = ABMIL(384, 2), BagCrossEntropy() + AttentionEntropy(0.1)
    >>> loss(model(torch.randn(1, 100, 384)), torch.tensor([1])).shape
    torch.Size([])
    """

    def __init__(self, weight: float = 0.1, normalize: bool = False, allow_negative: bool = False) -> None:
        super().__init__()
        if weight < 0 and not allow_negative:
            raise ValueError(f"weight: a negative weight ({weight}) sharpens the attention; pass allow_negative=True")
        self.weight, self.normalize = weight, normalize

    def forward(
        self,
        output: Any,
        target: Int[Tensor, " n"] | None = None,  # noqa: ARG002 - the term needs no labels
        progress: float = 0.0,  # noqa: ARG002
    ) -> Float[Tensor, ""]:
        """Return the term for a [`MILOutput`][classact.mil.MILOutput], or for attention logits (N, ..., K)."""
        if isinstance(output, Tensor):
            logits = output
        else:
            logits = getattr(output, "attention_map_logits", output.attention_logits)
        if self.weight == 0:
            return logits.new_zeros(())
        return -self.weight * attention_entropy(logits, normalize=self.normalize).mean()


class Subsample(nn.Module):
    """A model that sees, in every training step, a random part of each bag (the Subsampling of the paper).

    Parameters
    ----------
    network : MILModel
        The model.
    ratio : float
        Each bag keeps ``floor(ratio * K)`` of its K instances, at least one, drawn without replacement; in (0, 1].
        Evaluation uses the whole bag.
    """

    def __init__(self, network: nn.Module, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected a part in (0, 1], got {ratio}")
        self.network, self.ratio = network, ratio
        self.in_dim: int = network.in_dim  # type: ignore[assignment]
        self.config = {"network": network, "ratio": ratio}

    def forward(
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,
        generator: Generator | None = None,
    ) -> Any:
        """Answer as the wrapped model does; the attention of instances left out is 0 (-inf logits)."""
        if not self.training or self.ratio == 1:
            return self.network(x, mask, coords)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        draw = torch.rand(real.shape, generator=generator, device=x.device).masked_fill(~real, torch.inf)
        kept = (real.sum(1, keepdim=True).double() * self.ratio).floor().clamp(min=1)
        keep = draw.argsort(1).argsort(1) < kept
        return self.network(x, keep, coords)


def sweep_entropy_weight(
    factory: Callable[[], nn.Module],
    train: Any,
    validation: Any,
    weights: Iterable[float] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    seeds: Sequence[int] = (0,),
    loss: MILLoss | None = None,
    **fit_options: Any,
) -> "pd.DataFrame":
    """Train a model with every weight of the entropy term and report what happens on validation bags.

    Parameters
    ----------
    factory : callable
        Returns a fresh, randomly initialised model of the family.
    train, validation : dataset of bags
        As `classact.data.BagDataset`: items with ``x``, ``label`` and optionally ``coords``.
    weights : iterable of float
        Values of lambda; 0 is the baseline.
    seeds : sequence of int
        Each weight is trained once per seed.
    loss : MILLoss, optional
        The loss the term joins; cross-entropy by default.
    **fit_options
        Passed to `classact.mil.lit.fit_bags`: epochs, lr, weight_decay, batch_size, ...

    Returns
    -------
    pandas.DataFrame
        One row per weight and seed: weight, seed, loss, auc, entropy, effective_instances (means over the bags).
    """
    import pandas as pd

    from classact.mil.lit import fit_bags, predict_bags
    from classact.mil.model import BagCrossEntropy

    rows = []
    for weight in weights:
        for seed in seeds:
            torch.manual_seed(seed)
            model = factory()
            term = (loss or BagCrossEntropy()) + AttentionEntropy(weight)
            fitted = fit_bags(model, term, train, validation, seed=seed, **fit_options)
            prediction = predict_bags(fitted.model, validation)
            entropies = [float(attention_entropy(logits.unsqueeze(0))) for logits in prediction.attention_logits]
            rows.append(
                {
                    "weight": weight,
                    "seed": seed,
                    "loss": prediction.loss,
                    "auc": prediction.auc,
                    "entropy": sum(entropies) / len(entropies),
                    "effective_instances": sum(map(math.exp, entropies)) / len(entropies),
                }
            )
    return pd.DataFrame(rows)
