"""Comparing parts of a network: one part is exchanged, everything else stays the same, and seeds are paired.

The protocol, whatever the part: the original is always an arm; networks of one seed have the same weights outside the
part where their widths are equal, and see the same batches in the same order for as many steps. Every arm gets the same
grid of learning rates, tried on a validation part with seeds that the table does not use. The test part is scored once,
at the last epoch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classact.evidence.metrics import bin_of, calibration_error, confidence
from classact.evidence.statistics import Interval, holm, t_interval
from classact.evidence.store import StudyError

WARM_UP = 0.1  # share of the steps over which the learning rate rises
TOLERANCE = 0.02  # of a match in size, computation or time
LATE = 0.2  # share of the epochs whose improvement tells that training had not ended
IMPROVES = 0.005  # by so much accuracy
TUNING_SEED = 1_000_000  # seeds of the table lie below


class Items(NamedTuple):
    """Inputs (n, ...) and classes (n,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class PartStudy:
    """What every cell of a comparison of parts needs.

    Attributes
    ----------
    build : callable
        ``build(arm, width, seed)`` makes the network of an arm.
    train, validation, test : Items
        The parts of the data.
    epochs, batch_size, weight_decay
        Of the training, the same for every arm.
    device : str
        Where to train.
    staged : callable, optional
        ``staged(arm, network, steps)`` returns None, or for a part that changes while it trains a function
        ``change(step, x)``, called before every step with its batch; it is true where parameters were exchanged, and
        the optimiser then starts anew for the steps that are left.
    """

    build: Callable[[str, int | None, int], nn.Module]
    train: Items
    validation: Items
    test: Items
    epochs: int
    batch_size: int
    weight_decay: float
    device: str = "cpu"
    staged: Callable[[str, nn.Module, int], Callable[[int, Tensor], bool] | None] = lambda arm, network, steps: None  # noqa: ARG005

    def steps(self) -> int:
        """Optimiser steps of a training."""
        return self.epochs * -(-len(self.train.x) // self.batch_size)


def run_cell(
    study: PartStudy, arm: str, width: int | None, rate: float, seed: int, tuning: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train one network and score it at the last epoch, on the validation part while tuning, else on the test part.

    A loss or prediction that is not finite ends the training; its accuracy counts as 0.
    """
    network = study.build(arm, width, seed).to(study.device)
    held_out = study.validation if tuning else study.test
    total, step = study.steps(), 0
    optimizer, schedule = _optimizer(network, rate, study.weight_decay, total)
    change = study.staged(arm, network, total)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout, where a backbone has it
    x, y = study.train.x.to(study.device), study.train.y.to(study.device)
    losses, accuracies, diverged = [], [], False
    p = np.empty(0)
    for epoch in range(study.epochs):
        network.train()
        loss_sum = torch.zeros((), device=study.device)
        for chosen in torch.randperm(len(x), generator=order).split(study.batch_size):
            if len(chosen) == 1 and len(x) > 1:
                continue  # batch statistics need two items
            if change is not None and change(step, x[chosen]):
                optimizer, schedule = _optimizer(network, rate, study.weight_decay, total - step)
            step += 1
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * len(chosen)
        losses.append(float(loss_sum) / len(x))
        diverged = not np.isfinite(losses[-1])
        if diverged or not tuning or epoch == study.epochs - 1:  # curves are shown of the table's trainings only
            p = predict(network, held_out.x, study.device)
            diverged = diverged or not np.isfinite(p).all()
            accuracies.append(0.0 if diverged else float((p.argmax(1) == held_out.y.numpy()).mean()))
        if diverged:
            break
    labels = held_out.y.numpy()
    values = {
        "accuracy": accuracies[-1],
        "calibration_error": None if diverged else float(expected_calibration_error(labels, p)),
        "nll": None if diverged else float(-np.log(np.maximum(p[np.arange(len(p)), labels], 1e-12)).mean()),
        "train_loss": None if diverged else losses[-1],
        "diverged": diverged,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    return values, {"loss": np.array(losses), "accuracy": np.array(accuracies)}


def _optimizer(network: nn.Module, rate: float, weight_decay: float, steps: int) -> tuple[Any, Any]:
    """AdamW, and its learning rate: up over the first tenth of the steps, down to zero as a cosine.

    Tensors of fewer than two dimensions are not decayed.
    """
    wide = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    flat = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, rate, fused=True)
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def predict(network: nn.Module, x: Tensor, device: str, batch: int = 1000) -> np.ndarray:
    """Probabilities (n, C) in evaluation mode."""
    network.eval()
    with torch.inference_mode():
        return np.concatenate([network(part.to(device)).float().softmax(1).cpu().numpy() for part in x.split(batch)])


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over equal bins of confidence (Naeini et al. 2015)."""
    sure, right = confidence(labels, probabilities)
    bins = bin_of(sure)
    counts = np.zeros((int(bins.max()) + 1, 2))
    np.add.at(counts, bins, np.stack([sure - right, np.ones(len(sure))], axis=1))
    return float(calibration_error(counts[None, None])[0])


def learning_rates(n: int, low: float = 3e-4, high: float = 3e-2) -> list[float]:
    """The grid of n learning rates, log-spaced; one is 0.003.

    Examples
    --------
    >>> learning_rates(3)
    [0.0003, 0.003, 0.03]
    """
    if n < 1:
        raise ValueError(f"tune: expected at least 1 learning rate, got {n}")
    return [float(f"{rate:.3g}") for rate in (np.geomspace(low, high, n) if n > 1 else [(low * high) ** 0.5])]


def extended(rates: Sequence[float], chosen: Sequence[float]) -> list[float]:
    """The grid with one more rate at each end that some arm has chosen; as it is if it has fewer than three.

    Examples
    --------
    >>> extended([0.001, 0.01, 0.1], chosen=[0.01, 0.1])
    [0.001, 0.01, 0.1, 1.0]
    """
    if len(rates) < 3:
        return list(rates)
    low, high = rates[0] ** 2 / rates[1], rates[-1] ** 2 / rates[-2]
    below = [float(f"{low:.3g}")] if rates[0] in chosen else []
    above = [float(f"{high:.3g}")] if rates[-1] in chosen else []
    return [*below, *rates, *above]


def match_width(size: Callable[[int], float], wanted: float, start: int) -> int:
    """Find the width whose size comes nearest to the one wanted, for sizes that grow with the width.

    Examples
    --------
    >>> match_width(lambda width: 3 * width, wanted=300, start=20)
    100
    """
    low, high = 1, max(start, 2)
    while size(high) < wanted and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - wanted))


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


def flops(network: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward pass in matrix products and convolutions, which are all that count."""
    from torch.utils.flop_counter import FlopCounterMode

    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return int(counter.get_total_flops())


def seconds_of_steps(
    networks: Mapping[Any, nn.Module], items: Items, rounds: int = 7
) -> dict[Any, tuple[float, float]]:
    """Median seconds of a training step and of a forward pass on one batch, the networks by turns after a warm-up."""
    found: dict[Any, list[tuple[float, float]]] = {name: [] for name in networks}
    synchronize = torch.cuda.synchronize if items.x.is_cuda else lambda: None
    for _ in range(rounds + 2):
        for name, network in networks.items():
            times = []
            for training in (True, False):
                network.train(training)
                synchronize()
                start = time.perf_counter()
                with torch.set_grad_enabled(training):
                    out = network(items.x)
                    if training:
                        F.cross_entropy(out, items.y).backward()
                synchronize()
                times.append(time.perf_counter() - start)
            network.zero_grad(set_to_none=True)
            found[name].append((times[0], times[1]))
    return {name: tuple(np.median(of[2:], axis=0).tolist()) for name, of in found.items()}


class PartRow(NamedTuple):
    """One arm in one match.

    Attributes
    ----------
    arm, match : str
        Its name, and what it was matched in.
    width : int, optional
        Of its network; None for backbones without one.
    parameters : int
        Of its network.
    off : float
        By what share the match was missed.
    rate : float
        The learning rate chosen.
    accuracy, calibration_error : Interval
        Over seeds.
    difference : Interval, optional
        Accuracy minus that of the original, paired by seeds.
    p : float
        Of no difference, adjusted by Holm over the arms of a match.
    train_seconds, predict_seconds : float
        Of one batch.
    remarks : tuple of str
        What a reader must know: not converged, a rate at the edge of the grid, trainings that diverged.
    """

    arm: str
    match: str
    width: int | None
    parameters: int
    off: float
    rate: float
    accuracy: Interval
    calibration_error: Interval
    difference: Interval | None
    p: float
    train_seconds: float
    predict_seconds: float
    remarks: tuple[str, ...]


@dataclass
class PartComparison:
    """The outcome of a comparison of parts.

    Attributes
    ----------
    slot, data, backbone, original : str
        What was exchanged, on what, in what, and the name of the original part.
    rows : list of PartRow
        By match, best first.
    reference : list of PartRow
        The original at other widths.
    cells : dict
        ``(arm, width) -> {seed: values}``.
    curves : dict
        ``(arm, width) -> {"loss": (seeds, epochs), "accuracy": (seeds, epochs)}``.
    tuning : dict
        ``(arm, width) -> {rate: validation accuracy}``.
    facts : dict
        How it was done, in words.
    """

    slot: str
    data: str
    backbone: str
    original: str
    rows: list[PartRow]
    reference: list[PartRow]
    cells: dict[tuple[str, int | None], dict[int, dict[str, Any]]]
    curves: dict[tuple[str, int | None], dict[str, np.ndarray]]
    tuning: dict[tuple[str, int | None], dict[float, float]]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Any:
        """One line per arm and match (DataFrame)."""
        import pandas as pd

        lines = []
        for row in (*self.rows, *self.reference):
            line = row._asdict()
            for name in ("accuracy", "calibration_error", "difference"):
                found = line.pop(name)
                if found is not None:
                    line |= {name: found.effect, f"{name}_low": found.low, f"{name}_high": found.high}
            lines.append(line | {"remarks": "; ".join(row.remarks)})
        return pd.DataFrame(lines)

    @property
    def matches(self) -> dict[str, list[PartRow]]:
        """The rows by what is equal; matches that led to the same networks are one."""
        found: dict[str, list[PartRow]] = {}
        for row in self.rows:
            found.setdefault(row.match, []).append(row)
        merged: dict[tuple[Any, ...], str] = {}
        for match, rows in found.items():
            networks = tuple((row.arm, row.width) for row in rows)
            merged[networks] = f"{merged[networks]} and {match}" if networks in merged else match
        return {name: found[name.split(" and ")[0]] for name in merged.values()}

    @property
    def summary(self) -> list[str]:
        """What was found, in words."""
        lines = []
        for match, rows in self.matches.items():
            better = [r for r in rows if r.difference is not None and r.difference.low > 0 and r.p < 0.05]
            worse = [r for r in rows if r.difference is not None and r.difference.high < 0 and r.p < 0.05]
            n = rows[0].accuracy.n
            start = f"At equal {match}, over {n} trainings each:"
            parts = []
            if better:
                parts.append(f"better than {self.original} beyond doubt: {', '.join(r.arm for r in better)}")
            else:
                parts.append(f"no part is better than {self.original} beyond doubt")
            if worse:
                parts.append(f"worse: {', '.join(r.arm for r in worse)}")
            lines.append(f"{start} {'; '.join(parts)}.")
        unfinished = sorted({row.arm for row in self.rows if "not converged" in row.remarks})
        if unfinished:
            lines.append(f"Still improving at the end: {', '.join(unfinished)}; more epochs may change the order.")
        return lines


def judge(
    arms: Sequence[str],
    original: str,
    match: str,
    widths: Mapping[str, int | None],
    off: Mapping[str, float],
    cells: Mapping[tuple[str, int | None], Mapping[int, Mapping[str, Any]]],
    curves: Mapping[tuple[str, int | None], Mapping[str, np.ndarray]],
    tuning: Mapping[tuple[str, int | None], Mapping[float, float]],
    seconds: Mapping[tuple[str, int | None], tuple[float, float]],
) -> list[PartRow]:
    """Rows of the arms in one match, best first."""
    base = cells[original, widths[original]]
    accuracy = {arm: np.array([c["accuracy"] for c in cells[arm, widths[arm]].values()]) for arm in arms}
    reference = np.array([c["accuracy"] for c in base.values()])
    differences = {arm: t_interval(accuracy[arm] - reference) for arm in arms if arm != original}
    adjusted = dict(zip(differences, holm([d.p_value() for d in differences.values()]), strict=True))
    rows = []
    for arm in arms:
        key = (arm, widths[arm])
        of = list(cells[key].values())
        rate = best_rate(tuning[key])
        remarks = []
        if lost := sum(c["diverged"] for c in of):
            remarks.append(f"{lost} of {len(of)} trainings diverged")
        if still_improving(curves[key]["accuracy"]):
            remarks.append("not converged")
        if len(tuning[key]) > 2 and rate in (min(tuning[key]), max(tuning[key])):
            remarks.append("learning rate at the edge of the grid")
        if abs(off[arm]) > TOLERANCE:
            remarks.append(f"{match} off by {off[arm]:+.0%}")
        rows.append(
            PartRow(
                arm,
                match,
                widths[arm],
                int(of[0]["parameters"]),
                off[arm],
                rate,
                t_interval(accuracy[arm]),
                t_interval([np.nan if c["calibration_error"] is None else c["calibration_error"] for c in of]),
                differences.get(arm),
                adjusted.get(arm, float("nan")),
                *seconds[key],
                tuple(remarks),
            )
        )
    return sorted(rows, key=lambda row: -row.accuracy.effect)


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the highest validation accuracy; of equals, the smallest."""
    if not any(value > 0 for value in tried.values()):
        raise StudyError(f"every learning rate diverged: {', '.join(f'{rate:g}' for rate in tried)}")
    return max(sorted(tried), key=lambda rate: tried[rate])


def still_improving(accuracy: np.ndarray) -> bool:
    """Whether accuracies (seeds, epochs) rose over the last fifth of the epochs by over half a point, beyond doubt."""
    epochs = accuracy.shape[1]
    late = max(1, round(LATE * epochs))
    if epochs <= late + 1:
        return True
    gain = t_interval(accuracy[:, -1] - accuracy[:, -1 - late])
    return gain.effect > IMPROVES and (gain.low > 0 or not np.isfinite(gain.low))
