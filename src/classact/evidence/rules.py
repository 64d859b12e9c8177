"""Comparing learning rules: each trains its network on the same data, and is held against back-propagation through it.

The protocol: every rule has as many learning rates in its grid, around the one it is known for; each is tried on a
validation part with a seed that the table does not use. Seeds are paired. The test part is scored once, after the last
epoch. Time and memory are measured apart from the trainings, one rule at a time.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from classact.evidence.figures import new_figure
from classact.evidence.page import Grid, interval_cell
from classact.evidence.parts import Items, best_rate, expected_calibration_error
from classact.evidence.statistics import Interval, holm, t_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = (
    "Rule",
    "Accuracy",
    "Difference",
    "p (Holm)",
    "Calibr. error",
    "Parameters",
    "Train ms",
    "Predict ms",
    "Peak MB",
    "Learning rate",
    "Remarks",
)


@dataclass(frozen=True)
class RuleStudy:
    """What every cell of a comparison of rules needs.

    Attributes
    ----------
    build : callable
        ``build(arm, seed)`` makes the network of a rule, untrained.
    fit : callable
        ``fit(arm, model, x, y, *, epochs, lr, batch_size, seed, device)`` trains it and returns it.
    predict : callable
        ``predict(arm, model, x)`` returns probabilities (n, C).
    train, validation, test : Items
        The parts of the data.
    epochs, batch_size : int
        Of every training.
    device : str
        Where to train.
    """

    build: Callable[[str, int], Any]
    fit: Callable[..., Any]
    predict: Callable[[str, Any, Tensor], Tensor]
    train: Items
    validation: Items
    test: Items
    epochs: int
    batch_size: int
    device: str = "cpu"

    def trained(self, arm: str, items: Items, rate: float, seed: int, epochs: int) -> Any:
        """A network of a rule, trained on items."""
        options = {"epochs": epochs, "lr": rate, "batch_size": self.batch_size, "seed": seed, "device": self.device}
        return self.fit(arm, self.build(arm, seed), items.x, items.y, **options)


def run_cell(
    study: RuleStudy, arm: str, rate: float, seed: int, tuning: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train by one rule and score, on the validation part while tuning, else on the test part.

    If a probability is not finite, the training counts as diverged, with an accuracy of 0.
    """
    held_out = study.validation if tuning else study.test
    labels = held_out.y.numpy()
    model = study.trained(arm, study.train, rate, seed, study.epochs)
    p = study.predict(arm, model, held_out.x.to(study.device)).float().cpu().numpy()
    if not np.isfinite(p).all():
        return {"accuracy": 0.0, "calibration_error": None, "nll": None, "diverged": True}, {}
    values = {
        "accuracy": float((p.argmax(1) == labels).mean()),
        "calibration_error": float(expected_calibration_error(labels, p)),
        "nll": float(-np.log(np.maximum(p[np.arange(len(p)), labels], 1e-12)).mean()),
        "diverged": False,
    }
    return values, {}


class _Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made while it is on, and forgets those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensors alive at a time that a function has made.

    On a GPU, what its allocator has handed out.

    Examples
    --------
    >>> peak_bytes(lambda: torch.zeros(1000).add(1).sum())
    8000
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Alive() as alive:
        function()
    return int(alive.peak)


class Cost(NamedTuple):
    """What a rule costs: of one epoch and of predictions, milliseconds per 1,000 items; peak bytes; parameters."""

    train_ms: float
    predict_ms: float
    peak: int
    parameters: int


def costs(study: RuleStudy, rates: Mapping[str, float], rounds: int = 3, batches: int = 8) -> dict[str, Cost]:
    """Measure every rule on its first batches, by turns after a warm-up; memory on two batches.

    Memory is that of weights, gradients, states of the optimiser and activations together, without the data.
    """
    n = min(len(study.train.x), batches * study.batch_size)
    items = Items(study.train.x[:n], study.train.y[:n])
    few = Items(items.x[: 2 * study.batch_size], items.y[: 2 * study.batch_size])
    synchronize = torch.cuda.synchronize if torch.device(study.device).type == "cuda" else lambda: None
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in rates}
    sizes: dict[str, int] = {}
    for _ in range(rounds + 1):
        for arm, rate in rates.items():
            synchronize()
            start = time.perf_counter()
            model = study.trained(arm, items, rate, 0, 1)
            synchronize()
            middle = time.perf_counter()
            study.predict(arm, model, items.x.to(study.device))
            synchronize()
            times[arm].append((middle - start, time.perf_counter() - middle))
            sizes[arm] = sum(p.numel() for p in model.parameters())
    found = {}
    for arm, rate in rates.items():
        train, predict = 1e6 * np.median(times[arm][1:], axis=0) / n
        peak = peak_bytes(partial(study.trained, arm, few, rate, 0, 1), study.device)
        found[arm] = Cost(float(train), float(predict), peak, sizes[arm])
    return found


class RuleRow(NamedTuple):
    """One rule.

    Attributes
    ----------
    rule : str
        Its name.
    twin : str
        Back-propagation through the same network, what it is compared with; its own name for back-propagation.
    accuracy, calibration_error : Interval
        Over seeds, on the test part.
    difference : Interval, optional
        Accuracy minus that of the twin, paired by seeds.
    p : float
        Of no difference, adjusted by Holm over the rules.
    rate : float
        The learning rate chosen.
    cost : Cost
        Time, memory, size.
    remarks : tuple of str
        What a reader must know.
    """

    rule: str
    twin: str
    accuracy: Interval
    calibration_error: Interval
    difference: Interval | None
    p: float
    rate: float
    cost: Cost
    remarks: tuple[str, ...]


@dataclass
class RuleComparison:
    """The outcome; rows are best first, `cells` are ``(rule, seed) -> values``."""

    data: str
    rows: list[RuleRow]
    cells: dict[tuple[str, int], Mapping[str, Any]]
    tuning: dict[str, dict[float, float]]
    control: str
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Any:
        """One line per rule (DataFrame)."""
        import pandas as pd

        lines = []
        for row in self.rows:
            line: dict[str, Any] = {"rule": row.rule, "twin": row.twin}
            for name in ("accuracy", "calibration_error", "difference"):
                if (of := getattr(row, name)) is not None:
                    line |= {name: of.effect, f"{name}_low": of.low, f"{name}_high": of.high}
            lines.append(line | {"p": row.p, "rate": row.rate, **row.cost._asdict(), "remarks": "; ".join(row.remarks)})
        return pd.DataFrame(lines)

    @property
    def summary(self) -> list[str]:
        """What was found, in words."""
        rules = [row for row in self.rows if row.difference is not None and row.rule != self.control]
        worse = [row.rule for row in rules if row.difference and row.difference.high < 0 and row.p < 0.05]
        better = [row.rule for row in rules if row.difference and row.difference.low > 0 and row.p < 0.05]
        open_ = [row.rule for row in rules if row.rule not in (*worse, *better)]
        lines = [
            f"{title}: {', '.join(names)}."
            for title, names in (
                ("Better than back-propagation through the same network beyond doubt", better),
                ("No difference beyond doubt", open_),
                ("Worse beyond doubt", worse),
            )
            if names
        ]
        floor = next((row.accuracy.effect for row in self.rows if row.rule == self.control), None)
        if floor is not None:
            below = [row.rule for row in rules if row.accuracy.effect <= floor]
            lines.append(
                f"A trained readout of random hidden layers ({self.control}) reaches {floor:.4f}; "
                + (f"no more than that: {', '.join(below)}." if below else "every rule is above it.")
            )
        return lines

    def grid(self) -> Grid:
        """The table to print."""
        marked = {number: "control" for number, row in enumerate(self.rows) if row.rule == self.control}
        title = f"learning rules on {self.data}"
        return Grid(HEADER, [_line(row) for row in self.rows], title, {0: "best"} | marked)


def _line(row: RuleRow) -> tuple[str, ...]:
    return (
        row.rule,
        interval_cell(row.accuracy, 4),
        interval_cell(row.difference, 4, signed=True),
        "-" if np.isnan(row.p) else f"{row.p:.3f}",
        f"{row.calibration_error.effect:.4f}",
        f"{row.cost.parameters:,}",
        f"{row.cost.train_ms:.1f}",
        f"{row.cost.predict_ms:.2f}",
        f"{row.cost.peak / 1e6:.1f}",
        f"{row.rate:g}",
        "; ".join(row.remarks),
    )


def judge(
    data: str,
    twins: Mapping[str, str],
    cells: Mapping[str, Mapping[int, Mapping[str, Any]]],
    tuning: Mapping[str, Mapping[float, float]],
    measured: Mapping[str, Cost],
    control: str,
) -> RuleComparison:
    """Score every rule over all seeds; ``twins[rule]`` is back-propagation through the same network."""
    accuracy = {arm: np.array([cell["accuracy"] for cell in of.values()]) for arm, of in cells.items()}
    differences = {arm: t_interval(accuracy[arm] - accuracy[twin]) for arm, twin in twins.items() if arm != twin}
    adjusted = dict(zip(differences, holm([d.p_value() for d in differences.values()]), strict=True))
    rows = []
    for arm, of in cells.items():
        errors = [np.nan if cell["calibration_error"] is None else cell["calibration_error"] for cell in of.values()]
        rate, remarks = best_rate(tuning[arm]), []
        if lost := sum(cell["diverged"] for cell in of.values()):
            remarks.append(f"{lost} of {len(of)} trainings diverged")
        if len(tuning[arm]) > 2 and rate in (min(tuning[arm]), max(tuning[arm])):
            remarks.append("learning rate at the edge of the grid")
        if twins[arm] not in (arm, "backprop"):
            remarks.append(f"compared with {twins[arm]}")
        difference, p = differences.get(arm), adjusted.get(arm, float("nan"))
        row = (t_interval(accuracy[arm]), t_interval(errors), difference, p, rate, measured[arm], tuple(remarks))
        rows.append(RuleRow(arm, twins[arm], *row))
    flat = {(arm, seed): cell for arm, of in cells.items() for seed, cell in of.items()}
    ordered = sorted(rows, key=lambda row: -row.accuracy.effect)
    return RuleComparison(data, ordered, flat, {arm: dict(of) for arm, of in tuning.items()}, control)


def accuracy_figure(found: RuleComparison) -> "Figure":
    """Accuracy of every training, the mean of each rule as a line; the controls' as dashed ones."""
    figure = new_figure(7, 1.1 + 0.4 * len(found.rows))
    axes = figure.subplots()
    for place, row in enumerate(found.rows):
        points = [cell["accuracy"] for (arm, _), cell in found.cells.items() if arm == row.rule]
        axes.scatter(points, [place] * len(points), s=16, color=f"C{place % 10}", alpha=0.7)
        axes.plot([row.accuracy.effect] * 2, [place - 0.3, place + 0.3], color="black", lw=1.5)
        if row.rule == found.control:
            axes.axvline(row.accuracy.effect, color="0.6", ls="--", lw=0.8)
    axes.set_yticks(range(len(found.rows)), [row.rule for row in found.rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy on the test part (dashed: {found.control})")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def cost_figure(found: RuleComparison) -> "Figure":
    """Accuracy against the time of training and against peak memory."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    values: Sequence[tuple[str, Callable[[RuleRow], float]]] = (
        ("training, ms per 1,000 items and epoch", lambda row: row.cost.train_ms),
        ("peak memory of training, MB", lambda row: row.cost.peak / 1e6),
    )
    for axes, (name, value) in zip(panels, values, strict=True):
        for place, row in enumerate(found.rows):
            low, high = row.accuracy.effect - row.accuracy.low, row.accuracy.high - row.accuracy.effect
            error = [[max(low, 0)], [max(high, 0)]]
            label = row.rule if axes is panels[0] else None
            axes.errorbar(value(row), row.accuracy.effect, error, fmt="o", color=f"C{place % 10}", label=label)
        axes.set(xlabel=name, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
