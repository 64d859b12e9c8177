"""MHIM: masked hard instance mining.

Tang, Huang, Zhang, Zhou, Zhang, Liu: Multiple Instance Learning Framework with Masked Hard Instance Mining for Whole
Slide Image Classification, ICCV 2023, https://arxiv.org/abs/2307.15254. Code of the authors: DearCaat/MHIM-MIL, branch
``v1`` (the default branch holds its successor, another method).

Attention finds the easy instances, and once they explain the label nothing else is learned. Here a student learns from
bags without the instances that a teacher, its own moving average, finds most salient; a consistency loss ties what the
student pools from the masked bag to what the teacher pools from the whole one. At test time the student alone remains.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from classact.mil.attention import ABMIL
from classact.mil.lit import FittedBags, LitMIL, fit_bags, fit_module
from classact.mil.model import MILLoss


def hard_instance_mask(
    attention: Float[Tensor, "n *heads k"],
    mask: Bool[Tensor, "n k"] | None = None,
    *,
    high: float = 0.0,
    high_random: float = 1.0,
    low: float = 0.0,
    random: float = 0.0,
    fusion: Literal["vote", "mean"] = "vote",
    generator: Generator | None = None,
) -> Bool[Tensor, "n k"]:
    """Choose the instances that a student may see (section 3.2): all but the salient ones.

    Three sets are chosen from the whole bag and removed together, so that they may overlap:

    - high: of the ``ceil(high / high_random * K)`` most attended instances, a random part `high_random`; plainly the
      ``ceil(high * K)`` most attended with the default 1. If the pool exceeds the bag, a part `high` of all of it;
    - low: the ``ceil(low * K)`` least attended instances;
    - random: ``ceil(random * K)`` instances, wherever they are.

    HAM of the paper is `high` alone, L-HAM with `low`, R-HAM with `random`, LR-HAM with both. K counts real instances.
    If nothing would remain, the least attended instance does.

    Parameters
    ----------
    attention : (N, K) or (N, H, K)
        Attention weights or logits of one or H heads; only their order counts.
    mask : (N, K) bool, optional
        True where an instance is real.
    high, low, random : float
        Parts of the bag, in [0, 1].
    high_random : float
        Part of the pool of salient instances that is removed, in (0, 1].
    fusion : {"vote", "mean"}
        With several heads, each marks its own most (or least) attended instances. ``"vote"`` takes those with the most
        marks, ties going to the larger (smaller) mean attention; ``"mean"`` gives every head an equal part of the
        number and takes what any of them marks, as in the authors' code.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    (N, K) bool
        True where the student sees the instance; False on padding.

    Raises
    ------
    ValueError
        If a ratio is out of range, a shape does not fit, or a bag has no instance.

    Examples
    --------
    >>> import torch
    >>> hard_instance_mask(torch.tensor([[0.1, 0.6, 0.2, 0.1]]), high=0.25)
    tensor([[ True, False,  True,  True]])
    """
    _check_ratios(high=high, low=low, random=random)
    if not 0 < high_random <= 1:
        raise ValueError(f"high_random: expected a part in (0, 1], got {high_random}")
    if fusion not in ("vote", "mean"):
        raise ValueError(f"fusion: expected 'vote' or 'mean', got {fusion!r}")
    if attention.ndim not in (2, 3) or attention.shape[-1] == 0:
        raise ValueError(f"attention: expected shape (N, K) or (N, H, K) with K > 0, got {tuple(attention.shape)}")
    heads = attention.detach().unsqueeze(1) if attention.ndim == 2 else attention.detach()
    n, _, k = heads.shape
    if mask is None:
        mask = torch.ones(n, k, dtype=torch.bool, device=heads.device)
    elif mask.shape != (n, k) or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool of shape {(n, k)}, got {mask.dtype} {tuple(mask.shape)}")
    size = mask.sum(1)
    if not bool(size.all()):
        raise ValueError(f"mask: every bag needs at least one instance, bag {int(size.argmin())} has none")
    scores = torch.where(torch.isfinite(heads), heads.double(), -1e300)  # -inf: hidden in this step, not padding
    dropped = torch.zeros_like(mask)
    if high > 0:
        ratio, part = (high / high_random, high_random) if high <= high_random else (1.0, high)
        pool = _extreme(scores, mask, _count(ratio, size), fusion)
        dropped = dropped | _random_part(pool, _count(part, pool.sum(1)), generator)
    if low > 0:
        dropped = dropped | _extreme(-scores, mask, _count(low, size), fusion)
    if random > 0:
        dropped = dropped | _random_part(mask, _count(random, size), generator)
    keep = mask & ~dropped
    least = scores.mean(1).masked_fill(~mask, torch.inf).argmin(1, keepdim=True)
    return torch.where(keep.any(1, keepdim=True), keep, torch.zeros_like(mask).scatter(1, least, True))


def _count(ratio: float, size: Tensor) -> Tensor:
    """``ceil(ratio * size)``, not one too many where the product is a whole number but for rounding."""
    return (ratio * size.double() - 1e-9).ceil().long()


def _top(scores: Tensor, count: Tensor) -> Tensor:
    """Bool (..., K), True at the `count` (...) largest scores."""
    largest = int(count.max())
    order = scores.topk(largest, dim=-1).indices
    first = torch.arange(largest, device=scores.device) < count.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, first)


def _extreme(scores: Tensor, mask: Tensor, count: Tensor, fusion: str) -> Tensor:
    """The `count` instances with the largest scores (N, H, K), heads fused."""
    scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    heads = scores.shape[1]
    if heads == 1:
        return _top(scores[:, 0], count)
    if fusion == "mean":
        return _top(scores, (count // heads).unsqueeze(1).expand(-1, heads)).any(1)
    votes = _top(scores, count.unsqueeze(1).expand(-1, heads)).sum(1)
    # equal votes: by the rank of the mean score, a number below 1
    rank = scores.mean(1).argsort(-1).argsort(-1) / scores.shape[-1]
    return _top((votes + rank).masked_fill(~mask, -torch.inf), count)


def _random_part(pool: Tensor, count: Tensor, generator: Generator | None) -> Tensor:
    """`count` (N,) of the True entries of the pool (N, K), drawn uniformly."""
    draw = torch.rand(pool.shape, generator=generator, device=pool.device).masked_fill(~pool, -1.0)
    return _top(draw, count) & pool


def _check_ratios(**ratios: float) -> None:
    for name, value in ratios.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a part in [0, 1], got {value}")


def consistency_loss(
    student: Float[Tensor, "n *c d"],
    teacher: Float[Tensor, "n *c d"],
    teacher_temperature: float = 0.1,
    student_temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy between the softmaxes of two pooled bags over their D dimensions (eq. 6), mean over the bags.

    Parameters
    ----------
    student, teacher : (N, D) or (N, C, D)
        Embeddings of the bags (of each class, for DSMIL); no gradient reaches the teacher's.
    teacher_temperature, student_temperature : float
        Divide the embeddings; positive.

    Examples
    --------
    >>> import torch
    >>> consistency_loss(torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[1.0, 0.0, -1.0]]))
    tensor(0.6803)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student, teacher: expected equal shapes, got {tuple(student.shape)}, {tuple(teacher.shape)}")
    for name, value in (("teacher_temperature", teacher_temperature), ("student_temperature", student_temperature)):
        if value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    wanted = (teacher.detach() / teacher_temperature).softmax(-1)
    return -(wanted * (student / student_temperature).log_softmax(-1)).sum(-1).mean()


class MHIM(LitMIL):
    """Trains a student on bags without the instances that its momentum teacher attends to most.

    The student may be any model of the family, with any of its losses. Salience is what the model attends to: all its
    attention maps as the heads of a vote, or for DSMIL the largest class score of an instance. Bags lose the masked
    instances before they enter the student, so that a step costs less than two of the plain model.

    Parameters
    ----------
    model : Module
        The student; validation and prediction use it alone, on whole bags.
    loss : MILLoss
        Of the student's output on the masked bag.
    teacher : Module, optional
        A trained model of the same structure (the paper: the plain baseline); a copy of the student by default.
    high, high_random, low, random, fusion
        What is masked; see [`hard_instance_mask`][classact.mil.hard_instance_mask]. Defaults: ABMIL on CAMELYON16.
    decay_high : bool
        Let `high` fall to 0 along half a cosine.
    alpha : float
        Weight of the consistency loss; 0.1 for CAMELYON16, 0.5 for TCGA in the authors' scripts.
    teacher_temperature : float
        Of the consistency loss.
    momentum : float
        m of the teacher's update ``m * teacher + (1 - m) * student``, in [0, 1].
    momentum_final : float, optional
        m approaches this along half a cosine; the authors' scripts for TCGA and TransMIL take 1.
    teacher_update : {"ema", "frozen", "self"}
        Moving average, the given teacher for ever, or the student itself.
    teacher_dropout : bool
        The teacher's dropout is active, as in the authors' code; other random parts of a model never are.
    lr, weight_decay : float
        Of AdamW (the paper: Adam, learning rate 2e-4).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: MILLoss | None = None,
        teacher: nn.Module | None = None,
        *,
        high: float = 0.01,
        high_random: float = 0.5,
        low: float = 0.0,
        random: float = 0.5,
        fusion: Literal["vote", "mean"] = "vote",
        decay_high: bool = True,
        alpha: float = 0.1,
        teacher_temperature: float = 0.1,
        momentum: float = 0.9999,
        momentum_final: float | None = None,
        teacher_update: Literal["ema", "frozen", "self"] = "ema",
        teacher_dropout: bool = True,
        lr: float = 2e-4,
        weight_decay: float = 1e-5,
    ) -> None:
        super().__init__(model, loss, lr, weight_decay)
        _check_ratios(high=high, low=low, random=random, momentum=momentum)
        if not 0 < high_random <= 1:
            raise ValueError(f"high_random: expected a part in (0, 1], got {high_random}")
        if momentum_final is not None:
            _check_ratios(momentum_final=momentum_final)
        if alpha < 0:
            raise ValueError(f"alpha: expected 0 or more, got {alpha}")
        if teacher_update not in ("ema", "frozen", "self"):
            raise ValueError(f"teacher_update: expected 'ema', 'frozen' or 'self', got {teacher_update!r}")
        self.high, self.high_random, self.low, self.random, self.fusion = high, high_random, low, random, fusion
        self.decay_high, self.alpha, self.teacher_temperature = decay_high, alpha, teacher_temperature
        self.momentum, self.momentum_final = momentum, momentum if momentum_final is None else momentum_final
        self.teacher_update, self.teacher_dropout = teacher_update, teacher_dropout
        self.teacher = None
        if teacher_update != "self":
            self.teacher = copy.deepcopy(model if teacher is None else teacher).requires_grad_(False)
            ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, self.teacher))
            if ours != theirs:
                different = min(name for name, _ in ours.items() ^ theirs.items())
                raise ValueError(f"teacher: expected the structure of the student; they differ in {different!r}")

    def training_step(self, batch, batch_idx) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Return the loss of one batch of bags: the student's on the masked bags, and the consistency."""
        total = max(1, int(self.trainer.estimated_stepping_batches))
        loss = self.student_loss(batch, self.global_step / total, self.global_step / max(1, total - 1))
        self._train_losses.append(loss.detach())
        return loss

    def student_loss(self, batch: Any, time: float, progress: float = 0.0) -> Tensor:
        """Loss of a batch at `time` in [0, 1) of the schedules; `progress` goes to the student's own loss."""
        x, mask, coords, label = batch
        masking = self.high > 0 or self.low > 0 or self.random > 0
        if masking or self.alpha > 0:
            watched = self._watch(x, mask, coords)
        if masking:
            high = _cosine(self.high, 0.0, time) if self.decay_high else self.high
            keep = hard_instance_mask(
                _salience(watched),
                mask,
                high=high,
                high_random=self.high_random,
                low=self.low,
                random=self.random,
                fusion=self.fusion,
            )
            x, mask, coords = keep_instances(x, keep, coords)
        output = self.model(x, mask, coords)
        loss = self.loss(output, label, progress)
        if self.alpha > 0:
            pooled, wanted = _pooled(output), _pooled(watched)
            loss = loss + self.alpha * consistency_loss(pooled, wanted, self.teacher_temperature)
        return loss

    @torch.no_grad()
    def _watch(self, x: Tensor, mask: Tensor | None, coords: Tensor | None) -> Any:
        teacher = self.model if self.teacher is None else self.teacher
        teacher.eval()  # random parts other than dropout, such as STKIM, would hide what is salient
        for part in teacher.modules():
            if isinstance(part, nn.Dropout):
                part.train(self.teacher_dropout)
        output = teacher(x, mask, coords)
        teacher.train()
        return output

    def on_train_batch_end(self, *_: Any) -> None:
        """Update the teacher after the optimiser's step, which Lightning has counted already."""
        if self.teacher_update == "ema":
            total = max(1, int(self.trainer.estimated_stepping_batches))
            self.update_teacher((self.global_step - 1) / total)

    @torch.no_grad()
    def update_teacher(self, time: float) -> None:
        """Move the teacher towards the student; buffers are copied.

        `torch.optim.swa_utils.AveragedModel` would begin with a copy of the student, where this begins with the
        baseline.
        """
        assert self.teacher is not None
        momentum = _cosine(self.momentum, self.momentum_final, time)
        for ours, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            ours.lerp_(theirs, 1 - momentum)
        for held, current in zip(self.teacher.buffers(), self.model.buffers(), strict=True):
            held.copy_(current)


def _cosine(start: float, end: float, time: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * time))


def _salience(output: Any) -> Tensor:
    if hasattr(output, "salience"):
        return output.salience
    if hasattr(output, "attention_map_logits"):
        return output.attention_map_logits.flatten(1, -2)
    return output.attention_logits


def _pooled(output: Any) -> Tensor:
    return getattr(output, "class_embeddings", output.embedding)


def keep_instances(
    x: Float[Tensor, "n k d"], keep: Bool[Tensor, "n k"], coords: Float[Tensor, "n k 2"] | None = None
) -> tuple[Float[Tensor, "n s d"], Bool[Tensor, "n s"] | None, Float[Tensor, "n s 2"] | None]:
    """Remove instances from bags: shorter bags in the same order, a mask if they differ in length, and coordinates.

    Examples
    --------
    >>> import torch
    >>> x, mask, _ = keep_instances(torch.arange(8.0).view(2, 4, 1), torch.tensor([[True, False] * 2, [True] * 4]))
    >>> x[0, :2, 0], mask.sum(1)
    (tensor([0., 2.]), tensor([2, 4]))
    """
    if len(x) == 1:
        return x[:, keep[0]], None, None if coords is None else coords[:, keep[0]]
    size = keep.sum(1)
    shortest, longest = map(int, size.aminmax())
    order = (~keep).byte().argsort(dim=1, stable=True)[:, :longest]
    mask = None if shortest == longest else torch.arange(longest, device=x.device) < size.unsqueeze(1)
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[rows, order], mask, None if coords is None else coords[rows, order]


def fit_mhim(
    factory: Callable[[], nn.Module],
    loss: MILLoss | None,
    train: Any,
    validation: Any = None,
    *,
    seed: int,
    device: str = "cpu",
    epochs: int = 50,
    lr: float = 2e-4,
    weight_decay: float = 1e-5,
    batch_size: int = 1,
    patience: int | None = None,
    monitor: str = "val_loss",
    sampler: Literal["random", "balanced"] = "random",
    baseline: nn.Module | None = None,
    student_init: Literal["none", "embed", "all"] = "embed",
    **mining: Any,
) -> FittedBags:
    """Train in two stages, as published: the plain model, then the student with that model as its first teacher.

    Parameters
    ----------
    factory : callable
        Returns a fresh model; called for the baseline and for the student.
    loss : MILLoss
        Of both stages; cross-entropy by default.
    train, validation, device, batch_size, patience, monitor, sampler
        As in [`fit_bags`][classact.mil.lit.fit_bags], for each stage.
    seed : int
        Of both stages.
    epochs : int
        Of both stages together: half of them, rounded down, train the baseline, so that the number of steps is that of
        a plain method with as many epochs. With a trained `baseline` all of them train the student.
    baseline : Module, optional
        A trained model to start from.
    student_init : {"none", "embed", "all"}
        What the student takes over from the baseline: nothing, the embedding of the instances (its layer ``reduce``;
        the paper), or everything.
    **mining
        Of [`MHIM`][classact.mil.MHIM].

    Returns
    -------
    FittedBags
        The student and the history of its stage; its `steps` are those of both stages.
    """
    if student_init not in ("none", "embed", "all"):
        raise ValueError(f"student_init: expected 'none', 'embed' or 'all', got {student_init!r}")
    shared: dict[str, Any] = {
        "seed": seed,
        "device": device,
        "batch_size": batch_size,
        "patience": patience,
        "monitor": monitor,
        "sampler": sampler,
    }
    taken = 0
    if baseline is None:
        if epochs < 2:
            raise ValueError(f"epochs: expected at least 2, one for each stage, got {epochs}")
        torch.manual_seed(seed)
        first = epochs // 2
        epochs -= first
        plain = {**shared, "lr": lr, "weight_decay": weight_decay, "epochs": first}
        fitted = fit_bags(factory(), loss, train, validation, **plain)
        baseline, taken = fitted.model, fitted.history.steps
    torch.manual_seed(seed + 1)
    student = factory()
    weights = baseline.state_dict()
    if student_init == "embed":
        weights = {name: value for name, value in weights.items() if "reduce" in name.split(".")}
        if not weights:
            raise ValueError("student_init='embed': the model has no layer named 'reduce'; use 'none' or 'all'")
    if student_init != "none":
        student.load_state_dict(weights, strict=student_init == "all")
    module = MHIM(student, loss, baseline, lr=lr, weight_decay=weight_decay, **mining)
    fitted = fit_module(module, train, validation, epochs=epochs, **shared)
    return replace(fitted, history=replace(fitted.history, steps=taken + fitted.history.steps))


def load_mhim_v1_checkpoint(path: str | Path) -> ABMIL:
    """Read an ABMIL of the authors' branch ``v1`` (``modules/init_ckp/*_abmil_*.pt``), in evaluation mode.

    Those models have one hidden layer of ReLU without biases in the attention, and a bias in the first layer.

    Raises
    ------
    ValueError
        If the file does not hold the six tensors of such a model.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("model", found)
    names = {
        "patch_to_emb.0.weight": "reduce.weight",
        "patch_to_emb.0.bias": "reduce.bias",
        "online_encoder.attention.attention.0.weight": "attention.hidden.weight",
        "online_encoder.attention.attention.2.weight": "attention.score.weight",
        "predictor.weight": "classifier.weight",
        "predictor.bias": "classifier.bias",
    }
    if set(names) - set(found) or any(not isinstance(found[name], Tensor) for name in names):
        raise ValueError(f"{path}: expected {', '.join(names)}; got {', '.join(map(str, list(found)[:8]))}")
    if unknown := set(found) - set(names):
        raise ValueError(f"{path}: unknown weights {', '.join(sorted(map(str, unknown))[:8])}")
    (dim, in_dim), (hidden, _) = found["patch_to_emb.0.weight"].shape, found[list(names)[2]].shape
    classes = len(found["predictor.bias"])
    model = ABMIL(in_dim, classes, dim, hidden, dropout=0.25, activation="relu", bias=True)
    weights = {ours: found[theirs] for theirs, ours in names.items()}
    weights |= {"attention.hidden.bias": torch.zeros(hidden), "attention.score.bias": torch.zeros(1)}
    model.load_state_dict(weights)
    return model.eval()
