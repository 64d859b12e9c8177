"""The report of a comparison of novel class discovery: printed table, CSV, LaTeX, figures, one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from classact.evidence.discovery import DiscoveryComparison, DiscoveryRow
from classact.evidence.figures import new_figure, png
from classact.evidence.page import Grid, Section, interval_cell, page
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
    write_atomically(folder / "table.txt", (grid(found).plain() + "\n").encode())
    write_atomically(folder / "table.tex", grid(found).latex().encode())
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


def line(found: DiscoveryComparison, row: DiscoveryRow) -> list[str]:
    """The cells of one method; of NMI and ARI the mean alone."""
    cells = [row.method]
    if found.truth:
        for kind in (row.transductive, row.inductive):
            cells += [interval_cell(kind[n]) if n == "accuracy" else f"{kind[n].effect:.3f}" for n in SCORES]
    classes = sorted(set(row.n_found))
    cells += [
        interval_cell(row.hidden),
        interval_cell(row.difference, signed=True),
        "-" if np.isnan(row.p) else f"{row.p:.3f}",
        interval_cell(row.known),
        "-" if np.isnan(row.agreement) else f"{row.agreement:.2f}",
        "-" if np.isnan(row.silhouette.effect) else f"{row.silhouette.effect:.2f}",
        str(classes[0]) if len(classes) == 1 else f"{classes[0]}-{classes[-1]}",
        f"{row.seconds:.1f}",
    ]
    return cells


def grid(found: DiscoveryComparison, full: bool = True) -> Grid:
    """The table to print; a terminal has no room for all columns, and gets it without `full`."""
    left_out = () if full else ("Seen NMI", "Seen ARI", "New NMI", "New ARI", "Silhouette")
    kept = [k for k, name in enumerate(header(found)) if name not in left_out]
    lines = [[line(found, row)[k] for k in kept] for row in found.rows]
    marked = {number: "control" for number, row in enumerate(found.rows) if row.method == found.reference}
    title = f"{found.task} on {found.data}"
    return Grid([header(found)[k] for k in kept], lines, title, {0: "best"} | marked)


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
    truth = (
        "Seen: unlabelled items that took part in the fit (transductive). New: held-out items, which only the finished "
        "model saw (inductive). Accuracy is that of the best one-to-one matching of clusters and classes. "
        if found.truth
        else ""
    )
    text = (
        f"{truth}Hidden classes: accuracy on known classes whose labels were taken away. Difference: to "
        f"{found.reference}, paired by seed, on {'seen items' if found.truth else 'hidden classes'}. Agreement: mean "
        "adjusted Rand index of the labels of two seeds, each fitted on other rows. Silhouette: in the space of the "
        "items as they are given. Embeddings of methods that learn one are their own."
    )
    sections = [
        Section(text=text, grid=grid(found)),
        Section("How well classes are found again", figures={"scores": figures["scores"]}),
        Section("What was found", figures={"found": figures["found"]}),
    ]
    beside = ("results.csv", "cells.csv", "table.tex")
    subtitle = f"{found.task} on {found.data}"
    return page("Classes nobody labelled", subtitle, found.summary, sections, found.facts, command, beside)
