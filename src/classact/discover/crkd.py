"""Cr-KD: novel class discovery that keeps what a supervised model sees of the known classes in a novel image.

Gu, Zhang, Xu, He: Class-relation Knowledge Distillation for Novel Class Discovery, ICCV 2023,
https://arxiv.org/abs/2307.09158; authors' code https://github.com/kleinzcy/Cr-KD-NCD. The discovery objective is that
of UNO (Fini et al., ICCV 2021, https://arxiv.org/abs/2108.08536), with pseudo-labels as in SwAV (Caron et al., 2020).

A model trained on K known classes places a novel image among them, "half truck, half bus"; its softmax over the known
classes is the image's *class relation*. While U novel classes are discovered with one softmax over K + U, that relation
fades, since the known-class probabilities of a novel image are only ever pushed down. Here a frozen copy of the
supervised model keeps it: its class relation is distilled into the known part of the running model, with a weight that
grows with the probability which the running model itself gives to known classes.

Differences between text and code of the authors, and what is done here. The loss is the cross-entropy of the code,
not the divergence of the text (``divergence="kl"``): under an adaptive weight their gradients differ. The weight is
"learnable" in that gradients flow through it; there is no further network. Logits are cosines divided by *two*
temperatures, 0.1 and T = 4, and the loss is multiplied by T^2 = 16. The code rescales prototypes to length 1 before
every step, here it is done at the start and after every step, so that they have length 1 at the end too.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from classact.discover.metrics import match_clusters

Views = Callable[[Tensor], Sequence[Tensor]]


@torch.no_grad()
def sinkhorn_knopp(logits: Float[Tensor, "*s b u"], epsilon: float = 0.05, n_iters: int = 3) -> Float[Tensor, "*s b u"]:
    """Assign B rows to U clusters of about equal size (Sinkhorn-Knopp, as in SwAV); no gradient.

    ``exp(logits / epsilon)`` is scaled in turn so that every cluster has mass B / U and every row mass 1, rows last:
    rows sum to 1, clusters to B / U only in the limit. Computed with logarithms, in float32 at least.

    Parameters
    ----------
    logits : (..., B, U)
        Leading dimensions, such as heads and views, are independent problems.
    epsilon : float
        Positive; a small one makes hard assignments.
    n_iters : int
        Sweeps, at least 1.

    Raises
    ------
    ValueError
        If there are no rows, a logit is not finite, or a setting is out of range.

    Examples
    --------
    >>> import torch
    >>> sinkhorn_knopp(torch.zeros(4, 2))[0]
    tensor([0.5000, 0.5000])
    """
    if logits.ndim < 2 or not logits.shape[-2]:
        raise ValueError(f"logits: expected shape (..., B, U) with at least one row, got {tuple(logits.shape)}")
    if epsilon <= 0:
        raise ValueError(f"epsilon: expected a positive number, got {epsilon}")
    if n_iters < 1:
        raise ValueError(f"n_iters: expected at least 1, got {n_iters}")
    if not torch.compiler.is_compiling() and not logits.isfinite().all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity")
    with torch.autocast(logits.device.type, enabled=False):
        log_q = _float(logits) / epsilon
        for _ in range(n_iters):
            log_q = log_q - log_q.logsumexp(-2, keepdim=True)
            log_q = log_q - log_q.logsumexp(-1, keepdim=True)
        return log_q.exp()


def class_relation(
    known_logits: Float[Tensor, "*n k"], temperature: float = 4.0, logit_temperature: float = 0.1
) -> Float[Tensor, "*n k"]:
    """Softmax over the K known classes alone, of cosines divided by both temperatures.

    Parameters
    ----------
    known_logits : (..., K)
        Cosines in [-1, 1].
    temperature, logit_temperature : float
        T and tau; both positive.

    Examples
    --------
    >>> import torch
    >>> class_relation(torch.tensor([0.8, 0.2, 0.1]))
    tensor([0.7159, 0.1597, 0.1244])
    """
    return (_float(known_logits) / _product(temperature, logit_temperature)).softmax(-1)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(temperature: float, logit_temperature: float) -> float:
    for name, value in (("temperature", temperature), ("logit_temperature", logit_temperature)):
        if value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    return temperature * logit_temperature


class ClassRelationDistillation(nn.Module):
    """Distil the class relations p of a teacher into the known part of a running model, on novel samples.

    ``mean_{v,i} T^2 w (- sum_k p_k log q_k)``, with q the running model's softmax over the K known logits alone, and
    w the mass that its softmax over all K + U gives to known classes, divided by the mean of w over heads, views and
    samples.

    Parameters
    ----------
    n_known : int
        K; the first K logits are those of known classes.
    temperature, logit_temperature : float
        T and tau.
    weighting : {"adaptive", "uniform"}
        w as above, or 1.
    divergence : {"ce", "kl"}
        Cross-entropy, or that less the entropy of p.
    detach_weight : bool
        Take w as a constant; by default gradients flow through it.

    Examples
    --------
    >>> import torch
    >>> distillation = ClassRelationDistillation(n_known=3)
    >>> teacher = torch.tensor([[[0.8, 0.2, 0.1], [0.1, 0.3, 0.6]]])
    >>> student = torch.tensor([[[0.5, 0.3, 0.1, 0.4, 0.2], [0.1, 0.1, 0.4, 0.0, 0.9]]])
    >>> distillation(teacher, student)
    tensor(14.7423)
    >>> distillation.weights(student)
    tensor([[1.2924, 0.7076]])
    """

    def __init__(
        self,
        n_known: int,
        temperature: float = 4.0,
        logit_temperature: float = 0.1,
        weighting: Literal["adaptive", "uniform"] = "adaptive",
        divergence: Literal["ce", "kl"] = "ce",
        detach_weight: bool = False,
    ) -> None:
        super().__init__()
        if n_known < 1:
            raise ValueError(f"n_known: expected at least 1, got {n_known}")
        _choice("weighting", weighting, ("adaptive", "uniform"))
        _choice("divergence", divergence, ("ce", "kl"))
        self.scale = _product(temperature, logit_temperature)
        self.n_known, self.temperature = n_known, temperature
        self.weighting, self.divergence, self.detach_weight = weighting, divergence, detach_weight

    def forward(
        self, teacher_known_logits: Float[Tensor, "v b k"], student_logits: Float[Tensor, "*h v b c"]
    ) -> Float[Tensor, "*h"]:
        """Loss of every head.

        Parameters
        ----------
        teacher_known_logits : (V, B, K)
            Cosines of novel samples; no gradient flows here.
        student_logits : (H, V, B, K + U) or (V, B, K + U)
            Cosines of the same samples with known and novel classes.

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        v, b, k = teacher_known_logits.shape
        if k != self.n_known or student_logits.shape[-3:-1] != (v, b) or student_logits.shape[-1] <= k:
            raise ValueError(
                f"teacher_known_logits, student_logits: expected shapes (V, B, {self.n_known}) and ([H,] V, B, "
                f"more than {self.n_known}), got {tuple(teacher_known_logits.shape)}, {tuple(student_logits.shape)}"
            )
        log_p = (_float(teacher_known_logits.detach()) / self.scale).log_softmax(-1)
        log_q = (_float(student_logits[..., :k]) / self.scale).log_softmax(-1)
        difference = -log_q if self.divergence == "ce" else log_p - log_q
        divergence = (log_p.exp() * difference).sum(-1)
        return self.temperature**2 * (self.weights(student_logits) * divergence).mean((-2, -1))

    def weights(self, student_logits: Float[Tensor, "*h v b c"]) -> Float[Tensor, "*h v b"]:
        """Return w of every head, view and sample; the mean over all of them is 1."""
        if self.weighting == "uniform":
            return torch.ones_like(student_logits[..., 0], dtype=torch.float32)
        mass = (_float(student_logits) / self.scale).softmax(-1)[..., : self.n_known].sum(-1)
        weights = mass / mass.mean()
        return weights.detach() if self.detach_weight else weights


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


class SwappedPrediction(nn.Module):
    """Cross-entropy of every view's prediction with the targets of the other views (Caron et al.; UNO).

    Parameters
    ----------
    logit_temperature : float
        tau, by which cosines are divided.

    Examples
    --------
    >>> import torch
    >>> targets = torch.eye(3).expand(1, 2, 3, 3)
    >>> SwappedPrediction()(torch.eye(3).expand(1, 2, 3, 3), targets)
    tensor([9.0833e-05])
    """

    def __init__(self, logit_temperature: float = 0.1) -> None:
        super().__init__()
        self.logit_temperature = _product(1.0, logit_temperature)

    def forward(self, logits: Float[Tensor, "*h v b c"], targets: Float[Tensor, "*h v_l b c"]) -> Float[Tensor, "*h"]:
        """Loss of every head.

        Parameters
        ----------
        logits : (H, V, B, C) or (V, B, C)
            Of V views, at least two.
        targets : (H, V_L, B, C) or (V_L, B, C)
            Distributions for the first V_L views.
        """
        n_views, n_large = logits.shape[-3], targets.shape[-3]
        if n_views < 2 or not 1 <= n_large <= n_views:
            raise ValueError(
                f"logits, targets: expected two views or more and targets for at most as many, got {n_views}, {n_large}"
            )
        log_p = (_float(logits) / self.logit_temperature).log_softmax(-1)
        # all pairs of a target and a view, less those of the same view
        pairs = (targets.sum(-3) * log_p.sum(-3)).sum(-1)
        same = (targets * log_p[..., :n_large, :, :]).sum((-3, -1))
        return (same - pairs).mean(-1) / (n_large * (n_views - 1))


class PrototypeHead(nn.Module):
    """Cosines of inputs with one prototype of length 1 per class: a linear layer without bias on unit vectors.

    Parameters
    ----------
    in_features, n_classes : int
        D and K.
    """

    def __init__(self, in_features: int, n_classes: int) -> None:
        super().__init__()
        _positive(in_features=in_features, n_classes=n_classes)
        self.in_features, self.n_classes = in_features, n_classes
        self.weight = nn.Parameter(torch.empty(n_classes, in_features).uniform_(-1, 1))
        self.normalize_prototypes_()

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Map (..., D), of any length, to cosines (..., K)."""
        return F.linear(F.normalize(x, dim=-1), self.weight)

    @torch.no_grad()
    def normalize_prototypes_(self) -> None:
        """Rescale prototypes to length 1; to be called after every step of an optimiser."""
        self.weight.copy_(F.normalize(self.weight, dim=-1))


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


class _Headwise(nn.Module):
    """H linear layers side by side, (H, N, I) to (H, N, O), with the start of `nn.Linear`."""

    def __init__(self, n_heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(n_heads, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_heads, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MultiHeadClusterer(nn.Module):
    """H clusterings side by side: each projects features with a network of its own and compares with U prototypes.

    Every projector is linear, batch normalisation, ReLU (`n_layers` times), linear. The heads are stacked in one tensor
    each.

    Parameters
    ----------
    in_features : int
        D.
    n_clusters : int
        U.
    n_heads : int
        H.
    hidden, projection : int
        Width of the hidden layers and of the projection P.
    n_layers : int
        Number of hidden layers.

    Examples
    --------
    >>> import torch
    >>> heads = MultiHeadClusterer(in_features=8, n_clusters=5, n_heads=2, hidden=16, projection=4)
    >>> heads(torch.randn(10, 8)).shape
    torch.Size([2, 10, 5])
    """

    def __init__(
        self,
        in_features: int,
        n_clusters: int,
        n_heads: int = 4,
        hidden: int = 2048,
        projection: int = 256,
        n_layers: int = 1,
    ) -> None:
        super().__init__()
        _positive(in_features=in_features, n_heads=n_heads, hidden=hidden, projection=projection, n_layers=n_layers)
        if n_clusters < 2:
            raise ValueError(f"n_clusters: expected at least 2, got {n_clusters}")
        self.n_heads = n_heads
        widths = [in_features, *[hidden] * n_layers]
        self.hidden = nn.ModuleList([_Headwise(n_heads, d, o) for d, o in pairwise(widths)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(n_heads * hidden) for _ in range(n_layers)])
        self.project = _Headwise(n_heads, hidden, projection)
        self.prototypes = nn.Parameter(torch.empty(n_heads, n_clusters, projection).uniform_(-1, 1))
        self.normalize_prototypes_()

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "h n u"]:
        """Map features (N, D) to cosines (H, N, U)."""
        x = x.expand(self.n_heads, *x.shape)
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            flat = norm(layer(x).transpose(0, 1).flatten(1))  # (N, H * hidden): statistics of every head's own channels
            x = flat.relu().unflatten(1, (self.n_heads, -1)).transpose(0, 1)
        return F.normalize(self.project(x), dim=-1) @ self.prototypes.mT

    @torch.no_grad()
    def normalize_prototypes_(self) -> None:
        """Rescale prototypes to length 1; to be called after every step of an optimiser."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))


class KnownOutput(NamedTuple):
    """Cosines (N, K) with the known classes, and features (N, D)."""

    known: Float[Tensor, "n k"]
    features: Float[Tensor, "n d"]


class CrKDOutput(NamedTuple):
    """Cosines (N, K) with the known classes, cosines (H, N, U) with the novel ones in every head, features (N, D)."""

    known: Float[Tensor, "n k"]
    novel: Float[Tensor, "h n u"]
    features: Float[Tensor, "n d"]

    @property
    def joint(self) -> Float[Tensor, "h n c"]:
        """Cosines (H, N, K + U) with all classes, known ones first; these are the same in every head."""
        return torch.cat([self.known.expand(len(self.novel), *self.known.shape), self.novel], -1)


class KnownClassifier(nn.Module):
    """The supervised model of the first stage, and the teacher of the second: an encoder and a head of cosines.

    Parameters
    ----------
    encoder : Module
        Any network that maps a batch to features (N, D), such as ``timm.create_model(..., num_classes=0)``.
    dim : int
        D.
    n_known : int
        K.
    """

    def __init__(self, encoder: nn.Module, dim: int, n_known: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, PrototypeHead(dim, n_known)
        self.config: dict[str, Any] = {"encoder": encoder, "dim": dim, "n_known": n_known}

    def forward(self, x: Float[Tensor, "n *s"]) -> KnownOutput:
        """Cosines and features of N inputs."""
        features = _features(self.encoder, x, self.head.in_features)
        return KnownOutput(self.head(features), features)

    def normalize_prototypes_(self) -> None:
        """Rescale prototypes to length 1."""
        self.head.normalize_prototypes_()


def _features(encoder: nn.Module, x: Tensor, dim: int) -> Tensor:
    features = encoder(x)
    if not isinstance(features, Tensor) or features.shape != (len(x), dim):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"encoder: expected features ({len(x)}, {dim}), got {found}")
    return features


class CrKD(nn.Module):
    """Encoder, head of known classes and heads of novel ones; train it with [`fit_crkd`][classact.discover.fit_crkd].

    Classes are numbered 0 to K - 1 (known) and K to K + U - 1 (novel, in an arbitrary order).

    Parameters
    ----------
    encoder : Module
        Any network that maps a batch to features (N, D), such as ``timm.create_model(..., num_classes=0)``.
    dim : int
        D.
    n_known, n_novel : int
        K and U; U is given or estimated, at least 2.
    n_heads, hidden, projection, n_layers
        Of the novel heads; see [`MultiHeadClusterer`][classact.discover.MultiHeadClusterer].

    Attributes
    ----------
    head_loss : (H,) Tensor
        Swapped-prediction loss of every head, summed over the last epoch; the best head has the smallest one.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> plan = TrainingPlan(epochs=2, warmup=1, batch_size=30)
    >>> model = fit_crkd(
    ...     nn.Linear(8, 16), (x, y), torch.randn(40, 8), n_known=3, n_novel=2, supervised=plan, discovery=plan,
    ...     views=lambda x: [x + 0.1 * torch.randn_like(x) for _ in range(2)], hidden=32, projection=8,
    ... )
    >>> model.predict(torch.randn(5, 8)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        n_known: int,
        n_novel: int,
        n_heads: int = 4,
        hidden: int = 2048,
        projection: int = 256,
        n_layers: int = 1,
    ) -> None:
        super().__init__()
        if n_novel < 2:
            raise ValueError(f"n_novel: expected at least 2, got {n_novel}")
        self.n_known, self.n_novel, self.n_heads = n_known, n_novel, n_heads
        self.encoder, self.known = encoder, PrototypeHead(dim, n_known)
        self.novel = MultiHeadClusterer(dim, n_novel, n_heads, hidden, projection, n_layers)
        self.register_buffer("head_loss", torch.zeros(n_heads))
        self.head_loss: Tensor
        self.config: dict[str, Any] = {
            "encoder": encoder,
            "dim": dim,
            "n_known": n_known,
            "n_novel": n_novel,
            "n_heads": n_heads,
            "hidden": hidden,
            "projection": projection,
            "n_layers": n_layers,
        }

    @classmethod
    def from_teacher(cls, teacher: KnownClassifier, n_novel: int, **heads: int) -> "CrKD":
        """Start from a copy of a supervised model, with fresh heads for `n_novel` classes; `heads` as above."""
        dim, n_known = teacher.head.in_features, teacher.head.n_classes
        model = cls(copy.deepcopy(teacher.encoder), dim, n_known, n_novel, **heads)
        model.known.load_state_dict(teacher.head.state_dict())
        return model.to(teacher.head.weight.device)

    def forward(self, x: Float[Tensor, "n *s"]) -> CrKDOutput:
        """Cosines with known and novel classes, and features, of N inputs."""
        features = _features(self.encoder, x, self.known.in_features)
        return CrKDOutput(self.known(features), self.novel(features), features)

    def normalize_prototypes_(self) -> None:
        """Rescale all prototypes to length 1."""
        self.known.normalize_prototypes_()
        self.novel.normalize_prototypes_()

    @property
    def best_head(self) -> int:
        """Number of the head with the smallest loss."""
        return int(self.head_loss.argmin())

    def predict(
        self,
        x: Float[Tensor, "n *s"],
        *,
        task_aware: bool = False,
        transductive: bool = False,
        head: int | Literal["best", "all"] = "best",
        batch_size: int = 512,
    ) -> Int[Tensor, "*h n"]:
        """Predict classes.

        Parameters
        ----------
        x : (N, ...)
            Inputs, not augmented.
        task_aware : bool
            All inputs are known to be novel: predict among the U novel classes only.
        transductive : bool
            False: each row is predicted by itself, whatever the others are. True, for a whole set of novel inputs with
            classes of about equal size: rows are assigned together, by Sinkhorn-Knopp as in the training; needs
            `task_aware`.
        head : int, "best" or "all"
            Which head; "all" returns (H, N).
        batch_size : int
            Rows at a time.

        Returns
        -------
        (N,) or (H, N) int
        """
        if transductive and not task_aware:
            raise ValueError("transductive: expected task_aware=True with it; known inputs are not assigned together")
        outputs = self._outputs(x, batch_size)
        if task_aware:
            logits = torch.cat([output.novel for output in outputs], 1)
            found = (sinkhorn_knopp(logits) if transductive else logits).argmax(-1) + self.n_known
        else:
            found = torch.cat([output.joint for output in outputs], 1).argmax(-1)
        return found if head == "all" else found[self.best_head if head == "best" else head]

    def relation(self, x: Float[Tensor, "n *s"], batch_size: int = 512, **temperatures: float) -> Float[Tensor, "n k"]:
        """Class relations of inputs; `temperatures` as in [`class_relation`][classact.discover.class_relation]."""
        return class_relation(torch.cat([output.known for output in self._outputs(x, batch_size)]), **temperatures)

    def _outputs(self, x: Tensor, batch_size: int) -> list[CrKDOutput]:
        with _evaluating(self), torch.no_grad():
            return [self(part) for part in x.split(batch_size)]


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode within, every module's own mode afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


class CrKDTerms(NamedTuple):
    """The loss, and its two terms for every head (H,), the second without its factor alpha."""

    total: Float[Tensor, ""]
    swapped: Float[Tensor, " h"]
    distilled: Float[Tensor, " h"]


class CrKDLoss(nn.Module):
    """``mean_h swapped prediction + alpha mean_h distillation`` of a batch of known and novel samples.

    Targets of known samples are their classes; those of novel samples are Sinkhorn-Knopp assignments of the batch's
    novel rows, for every head and large view. Without novel samples there is nothing to distil; without known ones the
    rest remains.

    Parameters
    ----------
    n_known : int
        K.
    alpha : float
        Weight of the distillation, 0 or more; its T^2 = 16 makes 0.1 a weight of 1.6. With 0 this is UNO's objective,
        and no teacher is needed.
    temperature, weighting, divergence, detach_weight
        Of [`ClassRelationDistillation`][classact.discover.ClassRelationDistillation].
    logit_temperature : float
        tau.
    n_large : int
        The first so many views, at least 1, give targets and are distilled; the rest are small crops.
    epsilon, n_iters
        Of [`sinkhorn_knopp`][classact.discover.sinkhorn_knopp].
    distill : {"relations", "features"}
        What is distilled; "features" is a comparator, the mean squared distance of features scaled to length 1.
    """

    def __init__(
        self,
        n_known: int,
        alpha: float = 0.1,
        temperature: float = 4.0,
        weighting: Literal["adaptive", "uniform"] = "adaptive",
        divergence: Literal["ce", "kl"] = "ce",
        detach_weight: bool = False,
        logit_temperature: float = 0.1,
        n_large: int = 2,
        epsilon: float = 0.05,
        n_iters: int = 3,
        distill: Literal["relations", "features"] = "relations",
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha: expected 0 or more, got {alpha}")
        _positive(n_large=n_large)
        _choice("distill", distill, ("relations", "features"))
        self.distillation = ClassRelationDistillation(
            n_known, temperature, logit_temperature, weighting, divergence, detach_weight
        )
        self.swapped = SwappedPrediction(logit_temperature)
        self.n_known, self.alpha, self.n_large, self.distill = n_known, alpha, n_large, distill
        self.epsilon, self.n_iters = epsilon, n_iters

    def forward(
        self,
        views: Sequence[CrKDOutput],
        target: Int[Tensor, " b"],
        teacher: Sequence[KnownOutput] = (),
    ) -> CrKDTerms:
        """Loss of one batch.

        Parameters
        ----------
        views : sequence of V CrKDOutput
            The running model's outputs for B samples in V views, large views first.
        target : (B,) int
            Classes of known samples, -1 for novel ones.
        teacher : sequence of V_L KnownOutput
            The frozen model's outputs for the *novel* samples in the large views; not needed with alpha = 0.
        """
        joint = torch.stack([output.joint for output in views], 1)
        novel = target < 0
        swapped = self.swapped(joint, self.targets(joint.detach()[:, : self.n_large], target))
        if not self.alpha or not novel.any():
            return CrKDTerms(swapped.mean(), swapped, torch.zeros_like(swapped))
        large = views[: self.n_large]
        if len(teacher) != len(large):
            raise ValueError(f"teacher: expected outputs for {len(large)} large views, got {len(teacher)}")
        if self.distill == "relations":
            known = torch.stack([output.known for output in teacher])
            distilled = self.distillation(known, joint[:, : self.n_large, novel])
        else:
            pairs = zip(large, teacher, strict=True)
            distances = [(_unit(ours.features[novel]) - _unit(theirs.features)).square() for ours, theirs in pairs]
            distilled = torch.stack(distances).sum(-1).mean().expand(len(swapped))
        return CrKDTerms(swapped.mean() + self.alpha * distilled.mean(), swapped, distilled)

    def targets(self, logits: Float[Tensor, "h v b c"], target: Int[Tensor, " b"]) -> Float[Tensor, "h v b c"]:
        """Targets (H, V_L, B, K + U) of large views with cosines `logits`: known samples' classes, pseudo-labels."""
        novel, known = target < 0, target >= 0
        targets = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        if known.any():
            targets[:, :, known, : self.n_known] = F.one_hot(target[known], self.n_known).to(targets.dtype)
        if novel.any():
            rows = logits[:, :, novel, self.n_known :]
            targets[:, :, novel, self.n_known :] = sinkhorn_knopp(rows, self.epsilon, self.n_iters)
        return targets


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_float(x), dim=-1)


def discovery_loss(
    model: nn.Module, teacher: nn.Module, views: Sequence[Tensor], target: Int[Tensor, " b"], loss: CrKDLoss
) -> CrKDTerms:
    """Run both models on the views of a batch and return the loss; the teacher, in its present mode, on what it needs.

    Parameters
    ----------
    model : CrKD
        The running model.
    teacher : KnownClassifier
        In evaluation mode.
    views : sequence of V (B, ...)
        Large views first; small crops may have another size.
    target : (B,) int
        Classes of known samples, -1 for novel ones.
    loss : CrKDLoss
        The objective.
    """
    novel = target < 0
    known: list[KnownOutput] = []
    if loss.alpha and novel.any():
        with torch.no_grad():
            known = [teacher(view[novel]) for view in views[: loss.n_large]]
    return loss([model(view) for view in views], target, known)


class TrainingPlan(NamedTuple):
    """How long and how fast one stage is trained; the defaults are the authors' for the second stage of a ViT.

    They train the first one for 50 epochs with a warm-up of 5, and a ResNet-18 on CIFAR-100 for 500 epochs with
    ``TrainingPlan(500, lr=0.4, min_lr=1e-3, optimizer="sgd")``.

    Attributes
    ----------
    epochs, warmup : int
        Number of epochs, and of those in which the learning rate rises from `min_lr` to `lr`; from there it falls along
        half a cosine. It changes between epochs.
    lr, min_lr, weight_decay, momentum : float
        Of the optimiser; the momentum of SGD only.
    optimizer : {"adamw", "sgd"}
        Which one.
    batch_size : int
        Samples at a time, known and novel ones shuffled together. A last batch that is not full is left out.
    """

    epochs: int = 100
    warmup: int = 10
    lr: float = 1e-3
    min_lr: float = 1e-4
    weight_decay: float = 1.5e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    batch_size: int = 512

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if epoch < self.warmup:
            return self.min_lr + (self.lr - self.min_lr) * epoch / max(self.warmup - 1, 1)
        part = (epoch - self.warmup) / max(self.epochs - self.warmup, 1)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * part))

    def optimize(self, model: nn.Module) -> torch.optim.Optimizer:
        """Optimiser of all parameters of a model that are trained."""
        _choice("optimizer", self.optimizer, ("adamw", "sgd"))
        _positive(epochs=self.epochs, batch_size=self.batch_size)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def train_blocks_from(encoder: nn.Module, first: int = 11) -> nn.Module:
    """Freeze a vision transformer but for its blocks from number `first` on; the last normalisation stays frozen too.

    Parameters
    ----------
    encoder : Module
        Has parameters named ``blocks.<number>.…``, as timm's vision transformers; changed in place and returned.

    Raises
    ------
    ValueError
        If no parameter would be trained.
    """
    trained = [
        name
        for name, _ in encoder.named_parameters()
        if name.startswith("blocks.") and int(name.split(".")[1]) >= first
    ]
    if not trained:
        raise ValueError(f"encoder: expected parameters named blocks.{first}.…, found none")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in trained)
    return encoder


class _Rows(Dataset[Any]):
    """Rows of tensors with targets, fetched a batch at a time."""

    def __init__(self, x: Tensor, target: Tensor) -> None:
        self.x, self.target = x, target

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.target[indices]


class _Mixed(Dataset[Any]):
    """Known samples with their classes, then novel ones with the target -1."""

    def __init__(self, known: Any, novel: Any) -> None:
        self.known, self.novel, self.n_known = known, novel, len(known)

    def __len__(self) -> int:
        return self.n_known + len(self.novel)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index < self.n_known:
            x, target = self.known[index]
            return x, int(target)
        return self.novel[index - self.n_known][0], -1


Known = tuple[Tensor, Tensor] | Dataset[Any] | list[Any]
Novel = Tensor | Dataset[Any] | list[Any]


def _loader(known: Known, novel: Novel | None, n_known: int, plan: TrainingPlan, n_workers: int) -> DataLoader[Any]:
    data: Any
    if isinstance(known, tuple):
        x, y = known
        if len(x) != len(y) or not len(x):
            raise ValueError(f"known: expected as many inputs as classes, at least one, got {len(x)}, {len(y)}")
        if y.min() < 0 or y.max() >= n_known:
            raise ValueError(f"known: expected classes 0 to {n_known - 1}, got {int(y.min())} to {int(y.max())}")
        if novel is not None:
            if not isinstance(novel, Tensor):
                raise TypeError(f"novel: expected a tensor, as `known` are tensors, got {type(novel).__name__}")
            if novel.shape[1:] != x.shape[1:] or not len(novel):
                raise ValueError(
                    f"novel: expected shape (M, {', '.join(map(str, x.shape[1:]))}), got {tuple(novel.shape)}"
                )
            x, y = torch.cat([x, novel]), torch.cat([y, y.new_full((len(novel),), -1)])
        data = _Rows(x, y)
    elif isinstance(novel, Tensor):
        raise TypeError("novel: expected a data set, as `known` is one, got a tensor")
    else:
        data = known if novel is None else _Mixed(known, novel)
    return DataLoader(
        data,
        plan.batch_size,
        shuffle=True,
        drop_last=len(data) > plan.batch_size,
        num_workers=n_workers,
        collate_fn=_as_it_is if isinstance(data, _Rows) else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def augmented(x: Any, views: Views | None, device: torch.device | str) -> list[Tensor]:
    """Views of a batch on a device: made by `views`, or those that the data set has made."""
    if views is None and isinstance(x, Tensor):
        raise ValueError("views: expected a function, since the data have one view of each sample")
    return [view.to(device) for view in (x if views is None else views(x.to(device)))]


def _train(
    model: nn.Module,
    loader: DataLoader[Any],
    plan: TrainingPlan,
    step: Callable[[Any, Tensor], Tensor],
    epoch_start: Callable[[], None],
    epoch_end: Callable[[int], None],
) -> None:
    optimizer = plan.optimize(model)
    for epoch in range(plan.epochs):
        model.train()
        epoch_start()
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(epoch)
        for x, target in loader:
            optimizer.zero_grad()
            step(x, target).backward()
            optimizer.step()
            model.normalize_prototypes_()  # type: ignore[operator]
        epoch_end(epoch)
    optimizer.zero_grad()
    model.eval()


def fit_known(
    encoder: nn.Module,
    known: Known,
    n_known: int,
    *,
    views: Views | None = None,
    plan: TrainingPlan = TrainingPlan(50, warmup=5),  # noqa: B008 - a tuple
    logit_temperature: float = 0.1,
    n_workers: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> KnownClassifier:
    """Train a copy of an encoder, and a head, on the known classes alone: the first stage.

    Parameters are those of [`fit_crkd`][classact.discover.fit_crkd].
    """
    with _seeded(seed):
        x = known[0] if isinstance(known, tuple) else known[0][0]
        first = x[:1] if isinstance(known, tuple) else (x if isinstance(x, Tensor) else x[0]).unsqueeze(0)
        encoder = copy.deepcopy(encoder).to(device)
        with _evaluating(encoder), torch.no_grad():
            features = encoder(first.to(device))
        if not isinstance(features, Tensor) or features.ndim != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"encoder: expected features (N, D), got {found}")
        model = KnownClassifier(encoder, features.shape[1], n_known).to(device)

        def step(x: Any, target: Tensor) -> Tensor:
            target = target.to(device)
            parts = [
                F.cross_entropy(_float(model(view).known) / logit_temperature, target)
                for view in augmented(x, views, device)
            ]
            return torch.stack(parts).mean()

        _train(model, _loader(known, None, n_known, plan, n_workers), plan, step, lambda: None, lambda _: None)
    return model


def fit_crkd(
    encoder: nn.Module | KnownClassifier,
    known: Known,
    novel: Novel,
    n_known: int,
    n_novel: int,
    *,
    views: Views | None = None,
    loss: CrKDLoss | None = None,
    supervised: TrainingPlan = TrainingPlan(50, warmup=5),  # noqa: B008 - a tuple
    discovery: TrainingPlan = TrainingPlan(),  # noqa: B008 - a tuple
    reset_head_loss: bool = True,
    callback: Callable[[int, CrKD], None] | None = None,
    n_workers: int = 0,
    seed: int = 0,
    device: str = "cpu",
    **heads: int,
) -> CrKD:
    """Train in both stages: on the known classes, then, with the result as start and as teacher, on both sets.

    Parameters
    ----------
    encoder : Module
        Maps a batch to features (N, D): any network, such as ``timm.create_model(..., num_classes=0)``, with
        parameters frozen or not. It stays as it is, a copy is trained. What [`fit_known`][classact.discover.fit_known]
        returned is taken for the result of the first stage.
    known : (x, y) or Dataset
        Inputs (N, ...) with classes (N,) from 0 to K - 1, or a data set of such pairs.
    novel : Tensor or Dataset
        Inputs (M, ...), or a data set whose items are tuples with the input first; the rest of them is never read.
    n_known, n_novel : int
        K and U.
    views : callable, optional
        Makes a sequence of two or more random views from a batch of inputs, large ones first. Without it the inputs of
        the data sets are such sequences.
    loss : CrKDLoss, optional
        The objective of the second stage; ``CrKDLoss(n_known)`` by default.
    supervised, discovery : TrainingPlan
        Of the two stages.
    reset_head_loss : bool
        Forget the heads' losses before every epoch, as UNO does; the authors' code sums them over the whole training.
    callback : callable, optional
        Called with the number of the epoch and the model after every epoch of the second stage.
    n_workers : int
        Processes that load data.
    seed : int
        Of new weights, batches and views; the global random state is left as it was.
    device : str
        Where to train.
    **heads
        `n_heads`, `hidden`, `projection`, `n_layers` of [`CrKD`][classact.discover.CrKD].

    Returns
    -------
    CrKD
        The trained network in evaluation mode.

    Raises
    ------
    ValueError
        If classes are not in 0 to K - 1, or a number or a shape does not fit.
    TypeError
        If one of `known` and `novel` is a data set, and the other is not.
    """
    loss = loss or CrKDLoss(n_known)
    if loss.n_known != n_known:
        raise ValueError(f"loss: expected one for {n_known} known classes, got one for {loss.n_known}")
    if n_novel < 2:
        raise ValueError(f"n_novel: expected at least 2, got {n_novel}")
    loader = _loader(known, novel, n_known, discovery, n_workers)
    if isinstance(encoder, KnownClassifier):
        teacher = encoder
        if teacher.head.n_classes != n_known:
            raise ValueError(f"encoder: expected a classifier of {n_known} classes, got {teacher.head.n_classes}")
    else:
        options: dict[str, Any] = {"n_workers": n_workers, "seed": seed, "device": device}
        tau = loss.swapped.logit_temperature
        teacher = fit_known(encoder, known, n_known, views=views, plan=supervised, logit_temperature=tau, **options)
    with _seeded(seed), _evaluating(teacher):
        model = CrKD.from_teacher(teacher, n_novel, **heads).to(device)

        def step(x: Any, target: Tensor) -> Tensor:
            terms = discovery_loss(model, teacher, augmented(x, views, device), target.to(device), loss)
            model.head_loss += terms.swapped.detach()
            return terms.total

        def epoch_start() -> None:
            if reset_head_loss:
                model.head_loss.zero_()

        def epoch_end(epoch: int) -> None:
            if callback is not None:
                callback(epoch, model)

        _train(model, loader, discovery, step, epoch_start, epoch_end)
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class DiscoveryAccuracy(NamedTuple):
    """Accuracy on all samples, on those of known classes, and on those of novel ones."""

    all: float
    known: float
    novel: float


def discovery_accuracy(
    y_true: Any, y_pred: Any, n_known: int, match: Literal["all", "novel"] = "all"
) -> DiscoveryAccuracy:
    """Accuracy of task-agnostic predictions, where numbers of novel classes are arbitrary.

    Parameters
    ----------
    y_true, y_pred : (n,) array-like of int
        Known classes are below `n_known`.
    n_known : int
        K.
    match : {"all", "novel"}
        "all", which the authors report: classes and predictions of all samples are matched, so that even known classes
        may trade names. "novel": known classes keep theirs, novel classes are matched on samples that are novel and
        were predicted to be.

    Examples
    --------
    >>> discovery_accuracy([0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 2, 2], n_known=2)
    DiscoveryAccuracy(all=1.0, known=1.0, novel=1.0)
    >>> discovery_accuracy([0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 2, 2], n_known=2, match="novel").known
    0.0
    """
    _choice("match", match, ("all", "novel"))
    true, pred = np.asarray(y_true), np.asarray(y_pred)
    novel = true >= n_known
    among = np.ones_like(novel) if match == "all" else novel & (pred >= n_known)
    names = {} if match == "all" else {k: k for k in range(n_known)}
    if among.any():
        names |= match_clusters(true[among], pred[among])
    right = np.array([cluster in names and names[cluster] == cls for cls, cluster in zip(true, pred, strict=True)])
    parts = (right, right[~novel], right[novel])
    return DiscoveryAccuracy(*(float(part.mean()) if len(part) else math.nan for part in parts))


def relation_quality(
    known_probs: Float[Tensor, "n k"], superclass: Int[Tensor, " n"], known_superclass: Int[Tensor, " k"]
) -> float:
    """Share of novel samples whose most probable known class is of their own super-class.

    Parameters
    ----------
    known_probs : (N, K)
        Class relations of novel samples.
    superclass : (N,) int
        Their super-classes.
    known_superclass : (K,) int
        Those of the known classes.

    Examples
    --------
    >>> import torch
    >>> relation_quality(torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([5, 5]), torch.tensor([5, 9]))
    0.5
    """
    if len(known_probs) != len(superclass) or known_probs.shape[1] != len(known_superclass):
        raise ValueError(
            f"known_probs, superclass, known_superclass: expected shapes (N, K), (N,) and (K,), got "
            f"{tuple(known_probs.shape)}, {tuple(superclass.shape)}, {tuple(known_superclass.shape)}"
        )
    return float((known_superclass[known_probs.argmax(1)] == superclass).float().mean())
