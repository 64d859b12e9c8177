"""The report folder of a comparison: printed table, tables for papers, predictions, instance scores, one HTML page."""

import base64
import html
import io
import json
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from classact.evidence.comparison import METRICS, Comparison, Row
from classact.evidence.statistics import Interval
from classact.evidence.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"macro_f1": "Macro F1", "balanced_accuracy": "Balanced acc.", "accuracy": "Accuracy"}


def write_report(comparison: Comparison, data: Any) -> None:
    """Write every file of the report except the models."""
    folder = comparison.folder
    write_atomically(folder / "table.txt", (plain_table(comparison) + "\n").encode())
    write_atomically(folder / "results.csv", long_form(comparison).encode())
    write_atomically(folder / "table.tex", latex_table(comparison).encode())
    predictions = [
        comparison.predictions(method).assign(method=method).set_index("method") for method in comparison.methods
    ]
    import pandas as pd

    write_atomically(folder / "predictions.csv", pd.concat(predictions).to_csv().encode())
    figures = {"folds": fold_figure(comparison), "curves": curve_figure(comparison)}
    for name, figure in figures.items():
        if figure is not None:
            write_atomically(folder / f"{name}.png", _png(figure))
    write_instance_scores(comparison, data)
    content = {
        "command": comparison.command,
        "definition": comparison.definition,
        "results": {
            "summary": comparison.summary,
            "table": json.loads(comparison.table.reset_index().to_json(orient="records", double_precision=15)),
            "cells": comparison.cells,
        },
        "timing": {"seconds_per_fold": comparison.seconds},
        "versions": versions(),
    }
    write_atomically(folder / "comparison.json", json.dumps(content, indent=1).encode())
    write_atomically(folder / "report.html", html_page(comparison, data, figures).encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for the numbers."""
    packages = ("classact", "torch", "numpy", "scikit-learn", "lightning")
    return {"python": sys.version.split()[0], "machine": platform.machine()} | {p: version(p) for p in packages}


def _cell(interval: Interval | None, signed: bool = False, short: bool = False) -> str:
    if interval is None or not np.isfinite(interval.effect):
        return "-"
    sign = "+" if signed else ""
    if short or not np.isfinite(interval.low):
        return f"{interval.effect:{sign}.3f}"
    return f"{interval.effect:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def columns(comparison: Comparison, full: bool = True) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """Header and cells of the table, best AUC first, controls last; `full` adds intervals of the pooled metrics."""
    unit = comparison.task.unit
    header = ["Method", f"AUC per {unit}", f"Difference to {comparison.reference}", "p (Holm)"]
    header += [NAMES[k] for k in METRICS]
    if comparison.by_group:
        header += [f"AUC per {comparison.definition['data']['groups']}", "Macro F1 per group"]
    if any(row.instance_auc is not None for row in comparison.rows):
        header.append("Instance AUC")
    if full:
        header += ["Parameters", "s/fold"]
    lines = []
    for row in sorted(comparison.rows, key=lambda row: (row.control, -row.auc.effect)):
        name = f"{row.method} ({row.remark})" if row.remark else row.method
        cells = [name, _cell(row.auc), _cell(row.difference, signed=True)]
        cells.append("-" if np.isnan(row.p_adjusted) else f"{row.p_adjusted:.3f}")
        cells += [_cell(row.metrics[k], short=not full) for k in METRICS]
        if comparison.by_group:
            cells += [_cell(row.group_auc), _cell(row.group_metrics["macro_f1"], short=not full)]
        if "Instance AUC" in header:
            cells.append("-" if row.instance_auc is None else f"{row.instance_auc:.3f}")
        if full:
            cells += ["-" if row.parameters is None else f"{row.parameters:,}", f"{comparison.seconds[row.method]:.2f}"]
        lines.append((row, cells))
    return header, lines


def rich_table(comparison: Comparison) -> Any:
    """Table for a terminal."""
    from rich.table import Table

    header, lines = columns(comparison, full=False)
    table = Table(title=_title(comparison), title_justify="left", header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name == "Method" else "right", no_wrap="AUC per" in name)
    previous = False
    for row, cells in lines:
        if row.control and not previous:
            table.add_section()
        previous = row.control
        table.add_row(*cells, style="dim" if row.control else "")
    return table


def plain_table(comparison: Comparison) -> str:
    """Title, summary and table as plain text, 200 columns wide at most."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=200)
    console.print(rich_table(comparison))
    for line in comparison.summary:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return buffer.getvalue().rstrip()


def _title(comparison: Comparison) -> str:
    d = comparison.definition
    protocol = "given splits" if d["folds"] == "given" else f"{d['folds']} folds x {d['repeats']} repeats"
    groups = len(set(comparison.groups))
    return (
        f"{d['task']} on {d['data']['name']}: {len(comparison.ids)} {comparison.task.unit}s, "
        f"{groups} groups ({d['data']['groups']}), {protocol}; 95 % intervals in brackets"
    )


def long_form(comparison: Comparison) -> str:
    """CSV with one row per method, repeat, fold and metric."""
    lines = ["method,repeat,fold,metric,value"]
    for method in comparison.methods:
        for cut, cell in zip(comparison.cuts, comparison.cells[method], strict=True):
            for name, value in cell.items():
                if isinstance(value, int | float):
                    lines.append(f"{method},{cut.repeat},{cut.fold},{name},{value!r}")
    return "\n".join(lines) + "\n"


def latex_table(comparison: Comparison) -> str:
    r"""LaTeX table with booktabs rules: AUC, difference, macro F1 and balanced accuracy, each with its interval."""

    def tex(text: str) -> str:
        return "".join({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"}.get(c, c) for c in text)

    unit = comparison.task.unit
    header = ["Method", f"AUC ({unit})", f"$\\Delta$ AUC to {tex(comparison.reference)}", "$p$ (Holm)"]
    header += ["Macro F1", "Balanced accuracy"]
    rows = []
    for row in sorted(comparison.rows, key=lambda row: (row.control, -row.auc.effect)):
        p = "--" if np.isnan(row.p_adjusted) else f"{row.p_adjusted:.3f}"
        cells = [tex(row.method), _cell(row.auc), _cell(row.difference, signed=True), p]
        cells += [_cell(row.metrics["macro_f1"]), _cell(row.metrics["balanced_accuracy"])]
        rows.append(" & ".join(cells) + r" \\")
    return "\n".join(
        [
            f"% {tex(_title(comparison))}",
            f"% {comparison.command}",
            r"\begin{tabular}{lrrrrr}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def write_instance_scores(comparison: Comparison, data: Any) -> None:
    """Write ``instance_scores.h5``: a group per item with coordinates and, per method, the score of every instance.

    Scores are out of fold (first repeat): the model had not seen the item.
    """
    if not any("instance_scores" in arrays for cells in comparison.arrays.values() for arrays in cells):
        return
    import h5py

    target = comparison.folder / "instance_scores.h5"
    part = target.with_name(target.name + ".part")
    try:
        with h5py.File(part, "w") as file:
            for method in comparison.methods:
                cells = zip(comparison.cuts, comparison.cells[method], comparison.arrays[method], strict=True)
                for cut, cell, arrays in cells:
                    if "instance_scores" not in arrays:
                        continue
                    ends = np.cumsum(arrays["instance_counts"])[:-1]
                    for index, scores in zip(cut.test, np.split(arrays["instance_scores"], ends), strict=True):
                        group = file.require_group(comparison.ids[index])
                        if cut.fold is not None and "fold" not in group.attrs:
                            group.attrs["fold"] = cut.fold
                            group.attrs["label"] = comparison.classes[comparison.labels[index]]
                            coords = data.read(int(index)).coords if hasattr(data, "read") else None
                            if coords is not None:
                                group["coords"] = coords
                        if method not in group:
                            group.create_dataset(method, data=scores, compression="gzip").attrs["kind"] = cell[
                                "score_kind"
                            ]
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def fold_figure(comparison: Comparison) -> "Figure":
    """AUC of every fold, the folds of one split joined by a line, with mean and interval of each method."""
    order = [row.method for row in sorted(comparison.rows, key=lambda row: (row.control, -row.auc.effect))]
    rows = {row.method: row for row in comparison.rows}
    figure = _figure(9, 0.9 + 0.36 * len(order))
    axes = figure.subplots()
    values = np.array([comparison.aucs(method) for method in order])
    y = np.arange(len(order))[:, None] + np.linspace(-0.2, 0.2, values.shape[1])
    axes.plot(values, y, color="0.85", linewidth=0.5, zorder=1)
    for index, method in enumerate(order):
        color = "0.45" if rows[method].control else "C0"
        axes.scatter(values[index], y[index], s=9, color=color, alpha=0.6, zorder=2, linewidth=0)
        interval = rows[method].auc
        if np.isfinite(interval.low):
            error = [[interval.effect - interval.low], [interval.high - interval.effect]]
            axes.errorbar(
                interval.effect, index, xerr=error, color="black", marker="o", markersize=4, capsize=3, zorder=3
            )
    axes.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)  # best on top, as in the table
    axes.set_xlabel("AUC of the test part")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curve_figure(comparison: Comparison) -> "Figure | None":
    """Training and validation loss of every fold against the epoch, one panel per trained method."""
    trained = [m for m in comparison.methods if any("curve_val_loss" in a for a in comparison.arrays[m])]
    if not trained:
        return None
    columns_ = min(4, len(trained))
    rows = -(-len(trained) // columns_)
    figure = _figure(3 * columns_, 2.4 * rows)
    axes = figure.subplots(rows, columns_, squeeze=False, sharex=True)
    for panel in axes.flat[len(trained) :]:
        panel.set_visible(False)
    for panel, method in zip(axes.flat, trained, strict=False):
        for arrays in comparison.arrays[method]:
            panel.plot(arrays["curve_train_loss"], color="C1", linewidth=0.5, alpha=0.5)
            panel.plot(arrays["curve_val_loss"], color="C0", linewidth=0.5, alpha=0.5)
        best = np.median([cell["best_epoch"] for cell in comparison.cells[method]])
        panel.axvline(best, color="0.5", linestyle=":", linewidth=1)
        panel.set_title(method, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].plot([], [], color="C1", label="training loss (all terms)")
    axes[0, 0].plot([], [], color="C0", label="validation cross-entropy")
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.supxlabel("epoch (dotted: median of the epochs kept)", fontsize=9)
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1320px;margin:2rem auto;padding:0 1rem;color:#1d2433}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #dde;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #99a;white-space:normal}
tr.control{color:#778}tr.best td:first-child{font-weight:600}
.summary{background:#f2f6fc;border-left:4px solid #3b6fb6;padding:.6rem 1rem}.summary p{margin:.3rem 0}
code,pre{background:#f4f4f6;padding:.1rem .3rem;border-radius:3px}pre{padding:.6rem;overflow-x:auto}
img{max-width:100%}.wide{overflow-x:auto}small{color:#667}
"""


def html_page(comparison: Comparison, data: Any, figures: dict[str, "Figure | None"]) -> str:
    """One self-contained page: what is worth using and how sure that is, then how it was found."""
    escape = html.escape
    header, lines = columns(comparison)
    best = comparison.versus_best[0]
    same = {m for m, (_, p) in comparison.versus_best[1].items() if not p < 0.05}
    body = []
    for row, cells in lines:
        kind = "control" if row.control else "best" if row.method == best or row.method in same else ""
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    counts = {name: int((comparison.labels == k).sum()) for k, name in enumerate(comparison.classes)}
    d = comparison.definition
    facts = {
        "Items": f"{len(comparison.ids)} {comparison.task.unit}s, "
        + ", ".join(f"{n} {name}" for name, n in counts.items()),
        "Instances": f"{comparison.sizes.min():,} to {comparison.sizes.max():,} per {comparison.task.unit}, median "
        f"{np.median(comparison.sizes):,.0f}; {data.in_dim} features each",
        "Layout": data.layout,
        "Groups": f"{len(set(comparison.groups))} by {d['data']['groups']}; none straddles training and test",
        "Splits": "given" if d["folds"] == "given" else f"{d['folds']} folds x {d['repeats']} repeats, stratified",
        "Validation": "one fifth of every training part, by groups; chooses epoch and threshold",
        "Settings": ", ".join(f"{m}.{k}={v}" for m, own in d["settings"].items() for k, v in own.items())
        or "paper defaults",
        "Options": ", ".join(f"{k}={v}" for k, v in d["options"].items()) or "defaults",
        "Versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }
    pictures = []
    titles = {"folds": "Every fold", "curves": "Learning curves"}
    for name, figure in figures.items():
        if figure is not None:
            data_url = base64.b64encode(_png(figure)).decode()
            pictures.append(f'<h2>{titles[name]}</h2><img alt="{name}" src="data:image/png;base64,{data_url}">')
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(_title(comparison))}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>Which method for {escape(d["data"]["name"])}?</h1><small>{escape(_title(comparison))}</small>
<div class="summary">{"".join(f"<p>{escape(line)}</p>" for line in comparison.summary)}</div>
<h2>Methods</h2><div class="wide"><table><thead><tr>{"".join(f"<th>{escape(h)}</th>" for h in header)}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div>
<p><small>Bold: not distinguishable from the best. Grey: controls. p values are adjusted for
several methods (Holm). AUC: mean over test parts with a
Nadeau-Bengio corrected interval. Macro F1, balanced accuracy and accuracy: pooled predictions of a repeat at the
threshold fitted on validation, averaged over repeats, interval by bootstrap over groups. Instance AUC, where instance
labels are known: does the attention find the positive instances?</small></p>
{"".join(pictures)}
<h2>How this was found</h2><table>{_fact_rows(facts.items())}</table>
<pre>{escape(comparison.command)}</pre>
<p>Beside this page: <code>predictions.csv</code> (every prediction), <code>results.csv</code> (every number),
<code>instance_scores.h5</code> (where in the {comparison.task.unit} the evidence lies), <code>table.tex</code>,
<code>models/</code> (each method refitted on everything; open with <code>classact.load</code>).</p>
</body></html>
"""


def _fact_rows(facts: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<tr><td>{html.escape(k)}</td><td style="text-align:left;white-space:normal">{html.escape(v)}</td></tr>'
        for k, v in facts
    )
