"""The report of a comparison of parts: printed table, CSV, LaTeX, figures, one HTML page."""

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classact.evidence.figures import new_figure, png
from classact.evidence.parts import PartComparison, PartRow
from classact.evidence.report import STYLE, fact_rows, versions
from classact.evidence.statistics import Interval
from classact.evidence.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = (
    "Part",
    "Accuracy",
    "Difference",
    "p (Holm)",
    "Calibr. error",
    "Width",
    "Parameters",
    "Train ms",
    "Predict ms",
    "Learning rate",
    "Remarks",
)


def write_part_report(found: PartComparison, folder: Path, command: str) -> None:
    """Write ``report.html``, ``results.csv``, ``table.txt``, ``table.tex`` and the figures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: png(draw(found)) for name, draw in FIGURES.items()}
    for name, content in figures.items():
        write_atomically(folder / f"{name}.png", content)
    write_atomically(folder / "results.csv", found.table.to_csv(index=False).encode())
    write_atomically(folder / "cells.csv", _cells(found).encode())
    write_atomically(folder / "table.txt", (plain_table(found) + "\n").encode())
    write_atomically(folder / "table.tex", latex_table(found).encode())
    write_atomically(folder / "report.html", html_page(found, figures, command).encode())


def _cells(found: PartComparison) -> str:
    import pandas as pd

    lines = [
        {"part": arm, "width": width, "seed": seed, **values}
        for (arm, width), cells in found.cells.items()
        for seed, values in cells.items()
    ]
    return str(pd.DataFrame(lines).to_csv(index=False))


def _interval(of: Interval | None, signed: bool = False) -> str:
    if of is None:
        return "-"
    sign = "+" if signed else ""
    return f"{of.effect:{sign}.4f} [{of.low:{sign}.4f}, {of.high:{sign}.4f}]"


def _line(row: PartRow) -> tuple[str, ...]:
    return (
        row.arm,
        _interval(row.accuracy),
        _interval(row.difference, signed=True),
        "-" if np.isnan(row.p) else f"{row.p:.3f}",
        f"{row.calibration_error.effect:.4f}",
        "-" if row.width is None else str(row.width),
        f"{row.parameters:,}",
        f"{1000 * row.train_seconds:.2f}",
        f"{1000 * row.predict_seconds:.2f}",
        f"{row.rate:g}",
        "; ".join(row.remarks),
    )


def rich_table(found: PartComparison) -> Any:
    """One table per match, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    tables = []
    for match, rows in found.matches.items():
        table = Table(title=f"{found.slot} in {found.backbone} on {found.data}, equal {match}", title_justify="left")
        for name in HEADER:
            table.add_column(name, justify="left" if name in ("Part", "Remarks") else "right")
        for row in rows:
            table.add_row(*_line(row))
        tables.append(table)
    return Group(*tables)


def plain_table(found: PartComparison) -> str:
    """The same as plain text."""
    from rich.console import Console

    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(rich_table(found))
    return capture.get().rstrip()


def latex_table(found: PartComparison) -> str:
    """The same for a paper; needs booktabs."""

    def escape(text: str) -> str:
        return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

    lines = [r"\begin{tabular}{lrrrrr}", r"\toprule"]
    lines.append(r"Part & Accuracy & Difference & Parameters & Train ms & Predict ms \\")
    for match, rows in found.matches.items():
        lines += [r"\midrule", rf"\multicolumn{{6}}{{l}}{{equal {match}}} \\"]
        for row in rows:
            half = 0.5 * (row.accuracy.high - row.accuracy.low)
            difference = "-"
            if row.difference is not None:
                d = row.difference
                difference = f"{100 * d.effect:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
            lines.append(
                rf"{escape(row.arm)} & {100 * row.accuracy.effect:.2f} $\pm$ {100 * half:.2f} & {difference} & "
                rf"{row.parameters:,} & {1000 * row.train_seconds:.2f} & {1000 * row.predict_seconds:.2f} \\"
            )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def cost_figure(found: PartComparison) -> "Figure":
    """Accuracy against parameters and against the time of a training step; the line is the original at other widths."""
    figure = new_figure(10, 4.2)
    rows = {(row.arm, row.width): row for row in found.rows}
    original = [row for (arm, _), row in rows.items() if arm == found.original][:1]
    curve = sorted([*original, *found.reference], key=lambda row: row.parameters)
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        {"parameters": "parameters", "train_seconds": "seconds of a training step"}.items(),
        strict=True,
    ):
        if len(curve) > 1:
            axes.plot(
                [getattr(row, name) for row in curve],
                [row.accuracy.effect for row in curve],
                color="0.6",
                marker=".",
                label=f"{found.original} at {len(curve)} widths",
                zorder=1,
            )
        for row in rows.values():
            x, y = getattr(row, name), row.accuracy
            color = "0.3" if row.arm == found.original else "C0"
            axes.errorbar(x, y.effect, [[y.effect - y.low], [y.high - y.effect]], marker="o", color=color, capsize=2)
            axes.annotate(row.arm, (x, y.effect), (5, 3), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curve) > 1:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.axes[0].set_ylabel("accuracy")
    return figure


def curve_figure(found: PartComparison) -> "Figure":
    """Training loss and test accuracy by epoch, mean over the trainings."""
    figure = new_figure(10, 3.8)
    shown = list({(row.arm, row.width): None for row in found.rows if row.match == found.rows[0].match})
    for axes, (name, title) in zip(
        figure.subplots(1, 2), {"loss": "training loss", "accuracy": "test accuracy"}.items(), strict=True
    ):
        for number, key in enumerate(shown):
            mean = found.curves[key][name].mean(0)
            style = "-" if number < 10 else "--"
            axes.plot(np.arange(1, len(mean) + 1), mean, style, color=f"C{number % 10}", label=key[0])
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def rate_figure(found: PartComparison) -> "Figure":
    """Validation accuracy against the learning rate."""
    figure = new_figure(6.5, 3.8)
    axes = figure.subplots()
    shown = list({(row.arm, row.width): None for row in found.rows if row.match == found.rows[0].match})
    for number, key in enumerate(shown):
        tried = found.tuning[key]
        style = "-" if number < 10 else "--"
        axes.plot(list(tried), list(tried.values()), style, color=f"C{number % 10}", marker="o", ms=3, label=key[0])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


FIGURES = {"cost": cost_figure, "curves": curve_figure, "rates": rate_figure}


def html_page(found: PartComparison, figures: dict[str, bytes], command: str) -> str:
    """One self-contained page."""
    escape = html.escape
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    tables = []
    for match, rows in found.matches.items():
        lines = []
        for row in rows:
            kind = "control" if row.arm == found.original else "best" if row is rows[0] else ""
            lines.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(c)}</td>" for c in _line(row)) + "</tr>")
        tables.append(
            f'<h2>Equal {escape(match)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
    pictures = {
        "cost": "What it costs",
        "curves": "Training",
        "rates": "Sensitivity to the learning rate",
    }
    shown = "".join(
        f'<h2>{title}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(figures[name]).decode()}">'
        for name, title in pictures.items()
    )
    facts = found.facts | {"Versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    title = f"{found.slot} in {found.backbone} on {found.data}"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Does another part help?</h1><small>{escape(title)}</small>
<div class="summary">{"".join(f"<p>{escape(line)}</p>" for line in found.summary)}</div>
{"".join(tables)}
<p><small>Grey: the original part. Difference: accuracy minus the original's, paired by seed. p values are adjusted for
several parts (Holm). Times are those of one batch. Parameters count the whole network.</small></p>
{shown}
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(command)}</pre>
<p>Beside this page: <code>results.csv</code> (the table), <code>cells.csv</code> (every training),
<code>table.tex</code>.</p>
</body></html>
"""
