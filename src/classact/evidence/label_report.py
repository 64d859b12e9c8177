"""Comparing predictions in a label space with a metric, and the report: printed table, CSV, LaTeX, figure, HTML page.

The seeds are paired: each splits the items anew, hides classes from the fit, and fits one classifier for all methods.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from classact.evidence.figures import new_figure, png
from classact.evidence.page import Grid, Section, interval_cell, page
from classact.evidence.statistics import Interval, corrected_interval, holm
from classact.evidence.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = (
    "Method",
    "Squared distance",
    "Difference",
    "p (Holm)",
    "Observed classes",
    "Hidden classes",
    "Distance",
    "Accuracy",
    "Hidden found",
    "Seconds",
)
INTERVALS = ("squared", "squared_observed", "squared_hidden", "distance", "accuracy", "hidden_accuracy")


class LabelRow(NamedTuple):
    """One method; all on held-out items.

    Attributes
    ----------
    method : str
        Its name.
    squared, squared_observed, squared_hidden : Interval
        Mean squared distance of the predicted label to the true one: of all items, of those of observed classes, and
        of those of classes that no training item had.
    difference : Interval, optional
        Squared distance minus that of the reference, paired by seed; negative is better.
    p : float
        Of no difference, adjusted by Holm.
    distance, accuracy, hidden_accuracy : Interval
        Mean distance; share of items whose label is predicted exactly, of all and of hidden classes.
    seconds : float
        Mean time of the predictions.
    """

    method: str
    squared: Interval
    squared_observed: Interval
    squared_hidden: Interval
    difference: Interval | None
    p: float
    distance: Interval
    accuracy: Interval
    hidden_accuracy: Interval
    seconds: float


@dataclass
class LabelComparison:
    """The outcome of a comparison in a label space; rows are best first, by squared distance."""

    data: str
    reference: str
    rows: list[LabelRow]
    cells: dict[tuple[str, int], Mapping[str, Any]]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Any:
        """One line per method (DataFrame)."""
        import pandas as pd

        lines = []
        for row in self.rows:
            line: dict[str, Any] = {"method": row.method}
            for name, of in row._asdict().items():
                if isinstance(of, Interval):
                    line |= {name: of.effect, f"{name}_low": of.low, f"{name}_high": of.high}
            lines.append(line | {"p": row.p, "seconds": row.seconds})
        return pd.DataFrame(lines)

    @property
    def summary(self) -> list[str]:
        """What was found, in words."""
        sure = [row for row in self.rows if row.difference is not None and row.p < 0.05]
        better = [row.method for row in sure if row.difference is not None and row.difference.high < 0]
        worse = [row.method for row in sure if row.difference is not None and row.difference.low > 0]
        lines = [
            f"Nearer to the true label than {self.reference} beyond doubt: {', '.join(better)}."
            if better
            else f"No method is nearer to the true label than {self.reference} beyond doubt."
        ]
        return lines + ([f"Farther: {', '.join(worse)}."] if worse else [])


def judge(
    data: str,
    methods: Sequence[str],
    reference: str,
    cells: Mapping[int, Mapping[str, Mapping[str, Any]]],
    test_train_ratio: float,
) -> LabelComparison:
    """Score every method over all seeds; ``cells[seed][method]`` are its values.

    Seeds share items, so intervals are those of Nadeau and Bengio for repeated splits.
    """
    values = {
        (method, name): np.array([np.nan if (v := cells[seed][method][name]) is None else v for seed in sorted(cells)])
        for method in methods
        for name in next(iter(cells.values()))[method]
    }

    def interval(x: np.ndarray) -> Interval:
        return corrected_interval(x, test_train_ratio)

    differences = {
        method: interval(values[method, "squared"] - values[reference, "squared"])
        for method in methods
        if method != reference
    }
    adjusted = dict(zip(differences, holm([d.p_value() for d in differences.values()]), strict=True))
    rows = []
    for method in methods:
        of = {name: interval(values[method, name]) for name in INTERVALS}
        seconds = float(values[method, "seconds"].mean())
        p = adjusted.get(method, float("nan"))
        rows.append(LabelRow(method=method, difference=differences.get(method), p=p, seconds=seconds, **of))
    flat = {(method, seed): cell for seed, of in cells.items() for method, cell in of.items()}
    return LabelComparison(data, reference, sorted(rows, key=lambda row: row.squared.effect), flat)


def write_label_report(found: LabelComparison, folder: Path, command: str) -> None:
    """Write ``report.html``, ``results.csv``, ``cells.csv``, ``table.txt``, ``table.tex`` and the figure as PNG."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    picture = png(distance_figure(found))
    cells = pd.DataFrame([{"method": method, "seed": seed, **of} for (method, seed), of in found.cells.items()])
    write_atomically(folder / "distances.png", picture)
    write_atomically(folder / "results.csv", found.table.to_csv(index=False).encode())
    write_atomically(folder / "cells.csv", cells.to_csv(index=False).encode())
    write_atomically(folder / "table.txt", (grid(found).plain() + "\n").encode())
    write_atomically(folder / "table.tex", grid(found).latex().encode())
    write_atomically(folder / "report.html", html_page(found, picture, command).encode())


def _mean(of: Interval, digits: int) -> str:
    return f"{of.effect:.{digits}f}" if np.isfinite(of.effect) else "-"


def line(row: LabelRow) -> tuple[str, ...]:
    """The cells of one method; of most figures the mean alone."""
    return (
        row.method,
        interval_cell(row.squared, 2),
        interval_cell(row.difference, 2, signed=True),
        "-" if np.isnan(row.p) else f"{row.p:.3f}",
        _mean(row.squared_observed, 2),
        _mean(row.squared_hidden, 2),
        _mean(row.distance, 2),
        _mean(row.accuracy, 3),
        _mean(row.hidden_accuracy, 3),
        f"{row.seconds:.2f}",
    )


def grid(found: LabelComparison) -> Grid:
    """The table to print."""
    marked = {number: "control" for number, row in enumerate(found.rows) if row.method == found.reference}
    return Grid(HEADER, [line(row) for row in found.rows], f"label-space on {found.data}", {0: "best"} | marked)


def distance_figure(found: LabelComparison) -> "Figure":
    """Mean squared distance of every method, of items of observed and of hidden classes; a point per seed."""
    figure = new_figure(7.5, 0.9 + 0.42 * len(found.rows))
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"squared_observed": "observed classes", "squared_hidden": "hidden classes"}
    for panel, (name, title) in zip(axes, titles.items(), strict=True):
        for place, row in enumerate(found.rows):
            values = [of[name] for (method, _), of in found.cells.items() if method == row.method]
            points = np.array([np.nan if v is None else v for v in values], float)
            panel.scatter(points, np.full(len(points), place), s=14, color=f"C{place % 10}", alpha=0.7)
            if np.isfinite(points).any():
                panel.plot([np.nanmean(points)] * 2, [place - 0.3, place + 0.3], color="black", lw=1.5)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("mean squared distance")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(found.rows)), [row.method for row in found.rows])
    axes[0].invert_yaxis()
    return figure


def html_page(found: LabelComparison, picture: bytes, command: str) -> str:
    """One self-contained page."""
    text = (
        "Squared distance of the predicted label to the true one, mean over held-out items; smaller is nearer. "
        f"Difference: to {found.reference}, paired by seed. Hidden classes had no item in the fit. Accuracy: the "
        "label is predicted exactly; Hidden found: of items of hidden classes."
    )
    section = Section(text=text, grid=grid(found), figures={"distances": picture})
    beside = ("results.csv", "cells.csv", "table.tex")
    subtitle = f"label-space on {found.data}"
    return page("Predictions in a label space", subtitle, found.summary, [section], found.facts, command, beside)
