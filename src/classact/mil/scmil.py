"""SC-MIL: supervised contrastive multiple-instance learning for imbalanced classes.

Juyal, Shingi, Javed, Padigela, Shah, Sampat, Khosla, Abel, Taylor-Weiner: SC-MIL: Supervised Contrastive Multiple
Instance Learning for Imbalanced Classification in Pathology, WACV 2024, https://arxiv.org/abs/2303.13405. No code of
the authors is known. The loss is that of Khosla et al., https://arxiv.org/abs/2004.11362, the curriculum goes back to
Wang et al., https://arxiv.org/abs/2103.14267.

With few bags of a class, cross-entropy learns features for the frequent ones. Here the pooled bags are first arranged
by a contrastive loss, bags of a class attracting each other and repelling the rest, and the weight of the training
slides from there to the cross-entropy of the classifier. Batches need bags of every class: use
[`BalancedBagSampler`][classact.mil.sampler.BalancedBagSampler].
"""

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.attention import ABMIL
from classact.mil.model import BagCrossEntropy, MILLoss, check_bags, embedding_width

if TYPE_CHECKING:
    from classact.mil.lit import FittedBags

Curriculum = Literal["linear", "parabolic", "cosine", "constant", "step"]


def supervised_contrastive_loss(
    z: Float[Tensor, "b d"] | Float[Tensor, "b v d"],
    target: Int[Tensor, " b"],
    temperature: float = 0.1,
    queue: tuple[Float[Tensor, "q d"], Int[Tensor, " q"]] | None = None,
) -> Float[Tensor, ""]:
    """Supervised contrastive loss of B embeddings (Khosla et al., eq. 2, "L_out": the mean is outside the logarithm).

    For an anchor i, with P(i) the others of its class and A(i) all others,
    ``-1/|P(i)| sum_{p in P(i)} log(exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau))``, averaged over the
    anchors that have a partner. Without any the loss is 0, and so are its gradients. Computed in float32 at least.

    Parameters
    ----------
    z : (B, D) or (B, V, D)
        Embeddings, scaled to length 1 inside. The V views of a bag are partners too.
    target : (B,) int
        Classes.
    temperature : float
        tau, positive; a small one emphasises the hard pairs.
    queue : tuple of (Q, D) and (Q,), optional
        Embeddings and classes that are compared with, but are no anchors.

    Raises
    ------
    ValueError
        If the temperature is not positive or a shape does not fit.

    Examples
    --------
    >>> import torch
    >>> z = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> supervised_contrastive_loss(z, torch.tensor([0, 0, 1, 1]), temperature=1.0)
    tensor(0.8344)
    """
    _check_temperature(temperature)
    if z.ndim not in (2, 3) or target.shape != z.shape[:1]:
        raise ValueError(
            f"z, target: expected shapes (B, D) or (B, V, D), and (B,), got {tuple(z.shape)}, {tuple(target.shape)}"
        )
    if z.ndim == 3:
        target = target.repeat_interleave(z.shape[1])
        z = z.flatten(0, 1)
    with torch.autocast(z.device.type, enabled=False):
        z = _unit(z)
        keys, key_target = z, target
        if queue is not None:
            keys, key_target = torch.cat([z, _unit(queue[0])]), torch.cat([target, queue[1]])
        similarity = z @ keys.T / temperature
        itself = torch.eye(len(z), len(keys), dtype=torch.bool, device=z.device)
        # not -inf: an anchor that is all alone would get NaN for its gradient
        log_sum = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min).logsumexp(1, keepdim=True)
        partner = (target.unsqueeze(1) == key_target) & ~itself
        partners = partner.sum(1)
        of_anchor = ((log_sum - similarity) * partner).sum(1) / partners.clamp(min=1)
        return of_anchor.sum() / (partners > 0).sum().clamp(min=1)


def _unit(z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def curriculum_weight(kind: Curriculum, progress: float, constant: float = 0.5, switch: float = 0.5) -> float:
    """Weight w of the contrastive loss at `progress` in [0, 1] of the training; 1 - w is that of the classifier's.

    Parameters
    ----------
    kind : {"linear", "parabolic", "cosine", "constant", "step"}
        ``1 - t``, ``1 - t^2`` (Wang et al.), ``(1 + cos(pi t)) / 2``, always `constant`, or 1 before `switch` and 0
        from there.
    progress : float
        t, from 0 at the first step to 1 at the last.

    Examples
    --------
    >>> curriculum_weight("parabolic", 0.25)
    0.9375
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a number in [0, 1], got {progress}")
    if kind == "linear":
        return 1 - progress
    if kind == "parabolic":
        return 1 - progress**2
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "constant":
        return constant
    if kind == "step":
        return float(progress < switch)
    raise ValueError(f"kind: expected linear, parabolic, cosine, constant or step, got {kind!r}")


class SCMILOutput(NamedTuple):
    """A [`MILOutput`][classact.mil.MILOutput] with the projections (N, V, P) for the contrastive loss.

    V is the number of views while training, else 1; the other fields are those of the first view.
    """

    logits: Float[Tensor, "n c"]
    attention_logits: Float[Tensor, "n k"]
    embedding: Float[Tensor, "n d"]
    projection: Float[Tensor, "n v p"]

    @property
    def attention(self) -> Float[Tensor, "n k"]:
        """Weight of every instance in its bag; rows sum to 1, padding gets exactly 0."""
        return self.attention_logits.softmax(-1)


class SCMIL(ABMIL):
    """Gated ABMIL with a projection head; train it with [`SCMILLoss`][classact.mil.SCMILLoss].

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width of the instance embedding (default: [`embedding_width`][classact.mil.model.embedding_width]).
    hidden : int
        Width of the attention network.
    projection : int
        Width P of the projection: linear layer, ReLU, linear layer (128 in Khosla et al.). Only the loss uses it.
    dropout : float
        Dropout on the embedded instances.
    instances : int, optional
        While training, each view pools this many instances of a bag, drawn anew in every step; smaller bags stay whole,
        and so do all with None. Evaluation uses the whole bag.
    views : int
        Number V of independent draws from a bag, each a partner of the others, so that even the only bag of a class has
        one. The instances are embedded and scored once. Choose `instances` below the size of the bags, else the views
        are equal.

    Examples
    --------
    >>> import torch
    >>> model, loss = SCMIL(in_dim=384, n_classes=2, views=2, instances=100), SCMILLoss()
    >>> output = model(torch.randn(8, 300, 384))
    >>> output.projection.shape
    torch.Size([8, 2, 128])
    >>> loss(output, torch.tensor([0, 1] * 4), progress=0.3).backward()
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        hidden: int = 128,
        projection: int = 128,
        dropout: float = 0.0,
        instances: int | None = 256,
        views: int = 1,
    ) -> None:
        super().__init__(in_dim, n_classes, dim, hidden, gated=True, dropout=dropout)
        for name, value in (("projection", projection), ("instances", instances), ("views", views)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.instances, self.views = instances, views
        self.config = {
            "in_dim": in_dim,
            "n_classes": n_classes,
            "dim": dim,
            "hidden": hidden,
            "projection": projection,
            "dropout": dropout,
            "instances": instances,
            "views": views,
        }
        width = dim or embedding_width(in_dim)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> SCMILOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel]."""
        check_bags(x, mask, self.in_dim)
        h = self.embed(x)
        attention_logits = self.attention(h, mask)
        if self.training:
            attention_logits = self._draw(attention_logits)
        z = attention_logits.softmax(-1) @ h
        return SCMILOutput(self.head(z[:, 0]), attention_logits[:, 0], z[:, 0], self.projection(z))

    def _draw(self, logits: Float[Tensor, "n 1 k"]) -> Float[Tensor, "n v k"]:
        """Attention logits of every view: -inf at the instances that it has not drawn."""
        logits = logits.expand(-1, self.views, -1)
        if self.instances is None or self.instances >= logits.shape[2]:
            return logits
        draw = torch.rand(logits.shape, device=logits.device).masked_fill(logits.isneginf(), -1.0)
        chosen = draw.topk(self.instances, dim=-1).indices
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen, logits.gather(-1, chosen))


class SCMILLoss(MILLoss):
    """``w L_contrastive + (1 - w) L_classification``, w falling from 1 to 0 over the training.

    Early in the training the classifier hardly counts, and what it says of validation bags means little: do not stop
    there.

    Parameters
    ----------
    temperature : float
        Of the contrastive loss; the paper reports that it matters.
    curriculum, constant, switch
        How w falls; see [`curriculum_weight`][classact.mil.scmil.curriculum_weight].
    queue : int
        Compare with the last so many bags of every class too, as they were embedded then: for batches of few bags.
    classification : MILLoss, optional
        The second loss; cross-entropy by default.
    class_weight : (C,), optional
        Weight of each class in the default cross-entropy.

    Warns
    -----
    RuntimeWarning
        Once, if a batch holds a single bag and there is no queue: it has nothing to be contrasted with.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        curriculum: Curriculum = "linear",
        constant: float = 0.5,
        switch: float = 0.5,
        queue: int = 0,
        classification: MILLoss | None = None,
        class_weight: Float[Tensor, " c"] | None = None,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        curriculum_weight(curriculum, 0.0)
        for name, part in (("constant", constant), ("switch", switch)):
            if not 0 <= part <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {part}")
        if queue < 0:
            raise ValueError(f"queue: expected 0 or more, got {queue}")
        if classification is not None and class_weight is not None:
            raise ValueError("class_weight: give it to the classification loss, or leave that out")
        self.temperature, self.queue = temperature, queue
        self.curriculum, self.constant, self.switch = curriculum, constant, switch
        self.classification = classification or BagCrossEntropy(class_weight)
        self.remembered: tuple[Tensor, Tensor] | None = None
        self._warned = False

    def forward(self, output: Any, target: Int[Tensor, " n"], progress: float = 0.0) -> Float[Tensor, ""]:
        """Return the loss of an [`SCMILOutput`][classact.mil.SCMILOutput].

        Raises
        ------
        TypeError
            If the output comes from a model without projections.
        """
        if not hasattr(output, "projection"):
            raise TypeError(f"output: SCMILLoss needs the output of SCMIL, got {type(output).__name__}")
        if len(target) == 1 and not self.queue and not self._warned:
            warnings.warn("a batch of one bag and no queue: the contrastive loss is 0", RuntimeWarning, stacklevel=2)
            self._warned = True
        w = curriculum_weight(self.curriculum, progress, self.constant, self.switch)
        contrastive = supervised_contrastive_loss(output.projection, target, self.temperature, self.remembered)
        if self.queue and self.training:
            self._remember(
                output.projection.detach().flatten(0, 1), target.repeat_interleave(output.projection.shape[1])
            )
        return w * contrastive + (1 - w) * self.classification(output, target, progress)

    def _remember(self, projection: Float[Tensor, "b p"], target: Int[Tensor, " b"]) -> None:
        """Append the first views to the queue and keep the newest of each class."""
        if self.remembered is not None:
            projection = torch.cat([self.remembered[0], projection])
            target = torch.cat([self.remembered[1], target])
        newer = (target.unsqueeze(1) == target).triu(1).sum(1)  # later ones of the same class
        self.remembered = projection[newer < self.queue], target[newer < self.queue]


def fit_decoupled(
    model: nn.Module,
    train: Any,
    validation: Any = None,
    *,
    seed: int,
    device: str = "cpu",
    epochs: int = 50,
    switch: float = 0.5,
    temperature: float = 0.1,
    classification: MILLoss | None = None,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    batch_size: int = 16,
    patience: int | None = None,
    monitor: str = "val_loss",
    sampler: Literal["random", "balanced"] = "balanced",
) -> "FittedBags":
    """Train in two stages: the representation by the contrastive loss alone, then, on top of it, the classifier.

    The comparator of the curriculum. In the second stage all but the layer ``classifier`` is frozen.

    Parameters
    ----------
    model : Module
        [`SCMIL`][classact.mil.SCMIL], possibly wrapped; trained in place.
    train, validation, seed, device, lr, weight_decay, batch_size, patience, monitor, sampler
        As in [`fit_bags`][classact.mil.lit.fit_bags]. The first stage, which has no classifier to judge by, keeps its
        last weights.
    epochs : int
        Of both stages together, at least 2.
    switch : float
        Part of the epochs, in (0, 1), that the first stage gets, rounded; at least one epoch is left to each.
    temperature : float
        Of the contrastive loss.
    classification : MILLoss, optional
        Of the second stage; cross-entropy by default.

    Returns
    -------
    FittedBags
        The model and the history of the second stage.
    """
    from classact.mil.lit import fit_bags

    if epochs < 2:
        raise ValueError(f"epochs: expected at least 2, one for each stage, got {epochs}")
    if not 0 < switch < 1:
        raise ValueError(f"switch: expected a part in (0, 1), got {switch}")
    classifier = [name for name, _ in model.named_parameters() if "classifier" in name.split(".")]
    if not classifier:
        raise ValueError("model: expected a layer named 'classifier'")
    first = min(max(1, round(switch * epochs)), epochs - 1)
    shared: dict[str, Any] = {
        "seed": seed,
        "device": device,
        "lr": lr,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "sampler": sampler,
    }
    contrast = SCMILLoss(temperature, "constant", constant=1.0)
    fit_bags(model, contrast, train, epochs=first, **shared)
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in classifier]
    for p in frozen:
        p.requires_grad_(False)
    try:
        return fit_bags(
            model,
            classification,
            train,
            validation,
            epochs=epochs - first,
            patience=patience,
            monitor=monitor,
            **shared,
        )
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
