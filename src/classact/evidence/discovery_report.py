"""The report of a comparison of novel class discovery: printed table, CSV, LaTeX, figures, one HTML page."""

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classact.evidence.discovery import DiscoveryComparison, DiscoveryRow
from classact.evidence.figures import new_figure, png
from classact.evidence.report import STYLE, fact_rows, versions
from classact.evidence.statistics import Interval
from classact.evidence.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {"accuracy": "accuracy", "nmi": "NMI", "ari": "ARI"}


def write_discovery_report(found: DiscoveryComparison, folder: Path, command: str) -> None:
    """Write ``report.html``, ``results.csv``, ``cells.csv``, ``table.txt``, ``table.tex`` and the figures as PNG."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    figures = {"scores": png(score_figure(found)), "found": png(found_figure(found))}
    for name, content in figures.items():
        write_atomically(folder / f"{name}.png", content)
    write_atomically(folder / "results.csv", found.table.to_csv(index=False).encode())
    write_atomically(folder / "cells.csv", pd.DataFrame(found.cells).to_csv(index=False).encode())
    write_atomically(folder / "table.txt", (plain_table(found) + "\n").encode())
    write_atomically(folder / "table.tex", latex_table(found).encode())
    write_atomically(folder / "report.html", html_page(found, figures, command).encode())


def header(found: DiscoveryComparison) -> list[str]:
    """Names of the columns: with truth those of both kinds of rows, without it those that need none."""
    names = ["Method"]
    if found.truth:
        names += [f"{kind} {name}" for kind in ("Seen", "New") for name in SCORES.values()]
    names += [
        "Hidden classes",
        "Difference",
        "p (Holm)",
        "Known classes",
        "Agreement",
        "Silhouette",
        "Found",
        "Seconds",
    ]
    return names


def _cell(of: Interval | None, signed: bool = False) -> str:
    if of is None or not np.isfinite(of.effect):
        return "-"
    sign = "+" if signed else ""
    if not np.isfinite(of.low):
        return f"{of.effect:{sign}.3f}"
    return f"{of.effect:{sign}.3f} [{of.low:{sign}.3f}, {of.high:{sign}.3f}]"


def line(found: DiscoveryComparison, row: DiscoveryRow) -> list[str]:
    """The cells of one method; of NMI and ARI the mean alone."""
    cells = [row.method]
    if found.truth:
        for kind in (row.transductive, row.inductive):
            cells += [_cell(kind[n]) if n == "accuracy" else f"{kind[n].effect:.3f}" for n in SCORES]
    classes = sorted(set(row.n_found))
    cells += [
        _cell(row.hidden),
        _cell(row.difference, signed=True),
        "-" if np.isnan(row.p) else f"{row.p:.3f}",
        _cell(row.known),
        "-" if np.isnan(row.agreement) else f"{row.agreement:.2f}",
        "-" if np.isnan(row.silhouette.effect) else f"{row.silhouette.effect:.2f}",
        str(classes[0]) if len(classes) == 1 else f"{classes[0]}-{classes[-1]}",
        f"{row.seconds:.1f}",
    ]
    return cells


def rich_table(found: DiscoveryComparison, full: bool = False) -> Any:
    """The table for a terminal, which has no room for all columns unless it is to be `full`."""
    from rich.table import Table

    left_out = () if full else ("Seen NMI", "Seen ARI", "New NMI", "New ARI", "Silhouette")
    kept = [k for k, name in enumerate(header(found)) if name not in left_out]
    table = Table(title=f"{found.task} on {found.data}", title_justify="left")
    for k in kept:
        table.add_column(header(found)[k], justify="left" if k == 0 else "right")
    for row in found.rows:
        cells = line(found, row)
        table.add_row(*(cells[k] for k in kept))
    return table


def plain_table(found: DiscoveryComparison) -> str:
    """The same as plain text, with all columns."""
    from rich.console import Console

    console = Console(width=260, color_system=None)
    with console.capture() as capture:
        console.print(rich_table(found, full=True))
    return capture.get().rstrip()


def latex_table(found: DiscoveryComparison) -> str:
    """The same for a paper; needs booktabs."""

    def escape(text: str) -> str:
        return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

    names = header(found)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule", " & ".join(names) + r" \\", r"\midrule"]
    lines += [" & ".join(escape(cell) for cell in line(found, row)) + r" \\" for row in found.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def score_figure(found: DiscoveryComparison) -> "Figure":
    """Accuracy of every method on seen and new items and on hidden classes, with intervals."""
    kinds = {"hidden classes": lambda row: row.hidden}
    if found.truth:
        kinds = {"seen in fit": lambda r: r.transductive["accuracy"], "new": lambda r: r.inductive["accuracy"]} | kinds
    figure = new_figure(7, 0.9 + 0.45 * len(found.rows))
    axes = figure.subplots()
    for number, (kind, of) in enumerate(kinds.items()):
        for place, row in enumerate(found.rows):
            score = of(row)
            if not np.isfinite(score.effect):
                continue
            y = place + 0.22 * (number - (len(kinds) - 1) / 2)
            error = [[score.effect - score.low], [score.high - score.effect]] if np.isfinite(score.low) else None
            label = kind if place == 0 else None
            axes.errorbar(score.effect, y, xerr=error, fmt="o", ms=4, color=f"C{number}", capsize=2, label=label)
    axes.set_yticks(range(len(found.rows)), [row.method for row in found.rows])
    axes.invert_yaxis()
    axes.set_xlabel("clustering accuracy")
    axes.grid(axis="x", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def found_figure(found: DiscoveryComparison) -> "Figure":
    """Unlabelled items of the first seed in two principal components: true classes, and what each method found.

    Methods with an embedding of their own are shown in it.
    """
    from math import ceil

    panels: list[tuple[str, np.ndarray, np.ndarray]] = []
    first = next(iter(found.pictures.values()))
    if found.true_names is not None:
        panels.append(("true classes", first["before"], np.unique(found.true_names, return_inverse=True)[1]))
    for row in found.rows:
        picture = found.pictures[row.method]
        labels = _recoloured(picture["labels"], panels[0][2]) if panels else picture["labels"]
        panels.append((row.method, picture.get("after", picture["before"]), labels))
    columns = min(4, len(panels))
    rows = ceil(len(panels) / columns)
    figure = new_figure(3.1 * columns, 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, points, labels) in zip(grid, panels, strict=False):
        axes.scatter(*points.T, c=[f"C{label % 10}" for label in labels], s=5, linewidth=0, alpha=0.7)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _recoloured(labels: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Number clusters as the classes of the first panel with which they agree best; those left over come after."""
    from scipy.optimize import linear_sum_assignment

    clusters, codes = np.unique(labels, return_inverse=True)
    table = np.zeros((int(first.max()) + 1, len(clusters)), int)
    np.add.at(table, (first, codes), 1)
    number = np.full(len(clusters), -1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    number[columns] = rows
    number[number < 0] = len(table) + np.arange((number < 0).sum())
    return number[codes]


def html_page(found: DiscoveryComparison, figures: dict[str, bytes], command: str) -> str:
    """One self-contained page."""
    escape = html.escape
    head = "".join(f"<th>{escape(name)}</th>" for name in header(found))
    lines = []
    for row in found.rows:
        kind = "control" if row.method == found.reference else "best" if row is found.rows[0] else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line(found, row))
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    pictures = {"scores": "How well classes are found again", "found": "What was found"}
    shown = "".join(
        f'<h2>{title}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(figures[name]).decode()}">'
        for name, title in pictures.items()
    )
    facts = found.facts | {"Versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    title = f"{found.task} on {found.data}"
    truth = (
        "Seen: unlabelled items that took part in the fit (transductive). New: held-out items, which only the finished "
        "model saw (inductive). Accuracy is that of the best one-to-one matching of clusters and classes. "
        if found.truth
        else ""
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Classes nobody labelled</h1><small>{escape(title)}</small>
<div class="summary">{"".join(f"<p>{escape(one)}</p>" for one in found.summary)}</div>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<p><small>{truth}Hidden classes: accuracy on known classes whose labels were taken away. Difference: to
{escape(found.reference)}, paired by seed, on {"seen items" if found.truth else "hidden classes"}. Agreement: mean
adjusted Rand index of the labels of two seeds, each fitted on other rows. Silhouette: in the space of the items as they
are given. Embeddings of methods that learn one are their own.</small></p>
{shown}
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(command)}</pre>
<p>Beside this page: <code>results.csv</code>, <code>cells.csv</code> (every seed), <code>table.tex</code>.</p>
</body></html>
"""
