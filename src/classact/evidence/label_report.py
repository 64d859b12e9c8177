"""Comparing predictions in a label space with a metric, and the report: printed table, CSV, LaTeX, figure, HTML page.

The seeds are paired: each splits the items anew, hides classes from the fit, and fits one classifier for all methods.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from classact.evidence.figures import new_figure, png
from classact.evidence.report import STYLE, fact_rows, versions
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
    write_atomically(folder / "table.txt", (plain_table(found) + "\n").encode())
    write_atomically(folder / "table.tex", latex_table(found).encode())
    write_atomically(folder / "report.html", html_page(found, picture, command).encode())


def _cell(of: Interval | None, digits: int = 2, signed: bool = False) -> str:
    if of is None or not np.isfinite(of.effect):
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    if not np.isfinite(of.low):
        return f"{of.effect:{form}}"
    return f"{of.effect:{form}} [{of.low:{form}}, {of.high:{form}}]"


def _mean(of: Interval, digits: int) -> str:
    return f"{of.effect:.{digits}f}" if np.isfinite(of.effect) else "-"


def line(row: LabelRow) -> tuple[str, ...]:
    """The cells of one method; of most figures the mean alone."""
    return (
        row.method,
        _cell(row.squared),
        _cell(row.difference, signed=True),
        "-" if np.isnan(row.p) else f"{row.p:.3f}",
        _mean(row.squared_observed, 2),
        _mean(row.squared_hidden, 2),
        _mean(row.distance, 2),
        _mean(row.accuracy, 3),
        _mean(row.hidden_accuracy, 3),
        f"{row.seconds:.2f}",
    )


def rich_table(found: LabelComparison) -> Any:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title=f"label-space on {found.data}", title_justify="left")
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in found.rows:
        table.add_row(*line(row))
    return table


def plain_table(found: LabelComparison) -> str:
    """The same as plain text."""
    from rich.console import Console

    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(rich_table(found))
    return capture.get().rstrip()


def latex_table(found: LabelComparison) -> str:
    """The same for a paper; needs booktabs."""

    def escape(text: str) -> str:
        return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

    lines = [rf"\begin{{tabular}}{{l{'r' * (len(HEADER) - 1)}}}", r"\toprule", " & ".join(HEADER) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escape, line(row))) + r" \\" for row in found.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


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
    escape = html.escape
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    lines = []
    for row in found.rows:
        kind = "control" if row.method == found.reference else "best" if row is found.rows[0] else ""
        lines.append(f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in line(row))}</tr>')
    facts = found.facts | {"Versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>label-space on {escape(found.data)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Predictions in a label space</h1><small>label-space on {escape(found.data)}</small>
<div class="summary">{"".join(f"<p>{escape(one)}</p>" for one in found.summary)}</div>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<p><small>Squared distance of the predicted label to the true one, mean over held-out items; smaller is nearer.
Difference: to {escape(found.reference)}, paired by seed. Hidden classes had no item in the fit. Accuracy: the label is
predicted exactly; Hidden found: of items of hidden classes.</small></p>
<img alt="distances" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(command)}</pre>
<p>Beside this page: <code>results.csv</code>, <code>cells.csv</code>, <code>table.tex</code>.</p>
</body></html>
"""
