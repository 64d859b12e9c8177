"""Training objective (section 3.3): SimGCD's, with pseudo-labels that are corrected by the anomaly score.

SimGCD is Wen, Zhao, Qi: Parametric Classification for Generalized Category Discovery, ICCV 2023,
https://arxiv.org/abs/2211.11727. Rows come in two views: the first B, then the same B crops seen otherwise.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.discover.anomalyncd.network import NCDOutput


def teacher_temperature(
    epoch: int, warmup: int = 40, plateau: int = 4, first: float = 0.07, last: float = 0.04
) -> float:
    """Temperature of the teacher: from `first` to `last` in steps of `plateau` epochs, and `last` after the warm-up.

    Examples
    --------
    >>> [round(teacher_temperature(epoch), 6) for epoch in (0, 3, 4, 20, 39, 40, 49)]
    [0.07, 0.07, 0.066667, 0.053333, 0.04, 0.04, 0.04]
    """
    steps = warmup // plateau
    step = epoch // plateau
    if step >= steps:
        return last
    return first + (last - first) * step / max(steps - 1, 1)


def contrastive_loss(
    z: Float[Tensor, "b d"],
    label: Int[Tensor, " b"],
    temperature: float,
    member: Bool[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Contrastive loss of B embeddings: rows of equal label attract each other, and repel the others.

    With the classes as labels it is the supervised contrastive loss of Khosla et al. (https://arxiv.org/abs/2004.11362,
    "L_out"); with two views of every crop and the crops' numbers as labels it is InfoNCE. Rows without a partner are no
    anchors. Without any anchor the loss is 0.

    Parameters
    ----------
    z : (B, D)
        Embeddings, scaled to length 1 inside.
    label : (B,)
        Which belong together.
    temperature : float
        Positive.
    member : (B,) bool, optional
        Rows that take part.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    z = F.normalize(z.float(), dim=-1)
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    other = ~itself if member is None else ~itself & member & member[:, None]
    log_sum = logits.masked_fill(~other, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
    partner = (label == label[:, None]) & other
    partners = partner.sum(1)
    of_anchor = ((log_sum - logits) * partner).sum(1) / partners.clamp(min=1)
    return of_anchor.sum() / (partners > 0).sum().clamp(min=1)


class CorrectedSelfDistillation(nn.Module):
    """Cross-entropy of a view's prediction with the sharpened one of the other view, corrected by the anomaly score.

    The teacher's distribution is over the new classes only. With ``omega = max(0, normal_below - score)`` it becomes
    ``omega e + (1 - omega) q``, e being the first new class, "normal": crops that the detector hardly found anomalous
    are drawn there.

    Parameters
    ----------
    n_base, n_novel : int
        Base and new classes; the latter include the normal one.
    normal_below : float
        0.5 in the authors' settings; 0 leaves the pseudo-labels as they are.
    temperature : float
        Of the student.
    warmup, plateau, first, last
        Of [`teacher_temperature`][classact.discover.teacher_temperature].

    Examples
    --------
    >>> import torch
    >>> loss = CorrectedSelfDistillation(n_base=2, n_novel=3)
    >>> loss.targets(torch.zeros(2, 5), torch.tensor([0.1]), epoch=0)
    tensor([[0.0000, 0.0000, 0.6000, 0.2000, 0.2000],
            [0.0000, 0.0000, 0.6000, 0.2000, 0.2000]])
    """

    def __init__(
        self,
        n_base: int,
        n_novel: int,
        normal_below: float = 0.5,
        temperature: float = 0.1,
        warmup: int = 40,
        plateau: int = 4,
        first: float = 0.07,
        last: float = 0.04,
    ) -> None:
        super().__init__()
        if n_base < 0:
            raise ValueError(f"n_base: expected 0 or more, got {n_base}")
        if n_novel < 1:
            raise ValueError(f"n_novel: expected at least 1, got {n_novel}")
        for name, value in (("temperature", temperature), ("first", first), ("last", last)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= normal_below <= 1:
            raise ValueError(f"normal_below: expected a score from 0 to 1, got {normal_below}")
        if warmup < 0 or plateau < 1:
            raise ValueError(f"warmup, plateau: expected at least 0 and 1 epochs, got {warmup}, {plateau}")
        self.n_base, self.n_novel, self.normal_below, self.temperature = n_base, n_novel, normal_below, temperature
        self.schedule = warmup, plateau, first, last

    def targets(
        self, teacher: Float[Tensor, "b2 *h c"], scores: Float[Tensor, " b"], epoch: int
    ) -> Float[Tensor, "b2 *h c"]:
        """Corrected distributions of the teacher, each for its own view; base classes get 0."""
        q = (teacher.detach().float()[..., self.n_base :] / teacher_temperature(epoch, *self.schedule)).softmax(-1)
        omega = (self.normal_below - scores.float()).clamp(min=0).repeat(2).view(-1, *[1] * (q.ndim - 1))
        normal = F.one_hot(torch.zeros((), dtype=torch.long, device=q.device), self.n_novel)
        return F.pad(omega * normal + (1 - omega) * q, (self.n_base, 0))

    def forward(
        self,
        student: Float[Tensor, "b2 *h c"],
        teacher: Float[Tensor, "b2 *h c"],
        scores: Float[Tensor, " b"],
        epoch: int,
        member: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "*h"]:
        """Mean over both views of the members, for each head.

        Parameters
        ----------
        student, teacher : (2B, C) or (2B, H, C)
            Cosines; no gradient goes through the teacher's.
        scores : (B,)
            Anomaly scores in [0, 1].
        epoch : int
            From 0.
        member : (B,) bool, optional
            Crops that count, which are those of the new set.
        """
        if student.shape != teacher.shape or len(student) != 2 * len(scores):
            raise ValueError(
                "student, teacher, scores: expected shapes (2B, C) or (2B, H, C) twice, and (B,), got "
                f"{tuple(student.shape)}, {tuple(teacher.shape)}, {tuple(scores.shape)}"
            )
        if student.shape[-1] != self.n_base + self.n_novel:
            raise ValueError(f"student: expected {self.n_base + self.n_novel} classes, got {student.shape[-1]}")
        one, other = self.targets(teacher, scores, epoch).chunk(2)
        log = (student.float() / self.temperature).log_softmax(-1)
        loss = -(torch.cat([other, one]) * log).sum(-1)
        return _mean(loss, None if member is None else member.repeat(2))


class MeanEntropyMax(nn.Module):
    """log C less the entropy of the mean prediction: 0 if all C classes are predicted equally often, log C if one is.

    Parameters
    ----------
    temperature : float
        Of the softmax.

    Examples
    --------
    >>> import torch
    >>> MeanEntropyMax()(torch.zeros(8, 4)).item()
    0.0
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.temperature = temperature

    def forward(self, logits: Float[Tensor, "b *h c"], member: Bool[Tensor, " b"] | None = None) -> Float[Tensor, "*h"]:
        """For each head; without members log C."""
        p = _mean((logits.float() / self.temperature).softmax(-1), member)
        return math.log(p.shape[-1]) + torch.special.xlogy(p, p.clamp(min=1e-30)).sum(-1)


def _mean(values: Float[Tensor, "b *h"], member: Bool[Tensor, " b"] | None) -> Float[Tensor, "*h"]:
    """Mean over the members, 0 without any; by weights, since sizes that depend on values cannot be compiled."""
    if member is None:
        return values.mean(0)
    weight = member.to(values.dtype) / member.sum().clamp(min=1)
    return torch.tensordot(weight, values, 1)


class LossTerms(NamedTuple):
    """The loss, and its terms; `cluster` (H,) is self-distillation plus weighted entropy, by which a head is chosen."""

    total: Float[Tensor, ""]
    cluster: Float[Tensor, " h"]
    classification: Float[Tensor, ""]
    info_nce: Float[Tensor, ""]
    supcon: Float[Tensor, ""]


class AnomalyNCDLoss(nn.Module):
    """The whole objective: ``(1 - lambda) (cluster + InfoNCE) + lambda (cross-entropy + SupCon)``.

    ``cluster`` is self-distillation plus `memax_weight` times the entropy term, on new crops, cross-entropy and SupCon
    are on base crops, InfoNCE is on all; over the heads means are taken. A term without crops is 0.

    Parameters
    ----------
    n_base, n_novel : int
        Base and new classes.
    sup_weight : float
        lambda.
    memax_weight : float
        Weight of the entropy term.
    unsup_temperature, sup_temperature : float
        Of InfoNCE and SupCon.
    distillation
        Arguments of [`CorrectedSelfDistillation`][classact.discover.CorrectedSelfDistillation].
    """

    def __init__(
        self,
        n_base: int,
        n_novel: int,
        sup_weight: float = 0.3,
        memax_weight: float = 4.0,
        unsup_temperature: float = 1.0,
        sup_temperature: float = 0.07,
        **distillation: float,
    ) -> None:
        super().__init__()
        if not 0 <= sup_weight <= 1:
            raise ValueError(f"sup_weight: expected a number from 0 to 1, got {sup_weight}")
        if memax_weight < 0:
            raise ValueError(f"memax_weight: expected 0 or more, got {memax_weight}")
        self.distill = CorrectedSelfDistillation(n_base, n_novel, **distillation)  # type: ignore[arg-type]
        self.memax = MeanEntropyMax(self.distill.temperature)
        self.sup_weight, self.memax_weight = sup_weight, memax_weight
        self.unsup_temperature, self.sup_temperature = unsup_temperature, sup_temperature

    def forward(
        self, output: NCDOutput, label: Int[Tensor, " b"], scores: Float[Tensor, " b"], epoch: int
    ) -> LossTerms:
        """Compute the terms.

        Parameters
        ----------
        output : NCDOutput
            Of 2B rows.
        label : (B,) int
            Base class, or -1 for new crops.
        scores : (B,)
            Anomaly scores in [0, 1]; those of base crops do not count.
        epoch : int
            From 0.
        """
        novel = label < 0
        both = label.repeat(2)
        crop = torch.arange(len(label), device=label.device).repeat(2)
        distill = self.distill(output.logits, output.logits, scores, epoch, novel)
        entropy = self.memax(output.logits, novel.repeat(2)) * novel.any()
        cluster = distill + self.memax_weight * entropy
        log = (output.logits.float() / self.distill.temperature).log_softmax(-1)
        picked = log.gather(-1, both.clamp(min=0).view(-1, 1, 1).expand(-1, log.shape[1], 1)).squeeze(-1)
        classification = -_mean(picked, ~novel.repeat(2)).mean()
        info_nce = contrastive_loss(output.projection, crop, self.unsup_temperature)
        supcon = contrastive_loss(output.projection, both, self.sup_temperature, ~novel.repeat(2))
        unsupervised, supervised = cluster.mean() + info_nce, classification + supcon
        total = (1 - self.sup_weight) * unsupervised + self.sup_weight * supervised
        return LossTerms(total, cluster, classification, info_nce, supcon)
