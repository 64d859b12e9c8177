"""The report folder of a comparison: printed table, tables for papers, predictions, instance scores, one HTML page."""

import base64
import html
import io
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from classact.data.check import excluded_csv
from classact.data.provenance import provenance
from classact.evidence.figures import (
    curve_figure,
    decision_figure,
    evidence_figure,
    fold_figure,
    learning_figure,
    png,
)
from classact.evidence.instance_scores import InstanceScoreWriter
from classact.evidence.metrics import decide
from classact.evidence.outcome import Comparison, Row, counts_by_class
from classact.evidence.statistics import Interval
from classact.evidence.store import write_atomically

NAMES = {
    "auprc": "AUPRC",
    "macro_f1": "Macro F1",
    "balanced_accuracy": "Balanced acc.",
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "brier": "Brier score",
    "calibration_error": "Calibr. error",
    "sensitivity_at_90": "Sens. at 90 % spec.",
    "sensitivity_at_95": "Sens. at 95 % spec.",
    "specificity_at_90": "Spec. at 90 % sens.",
    "specificity_at_95": "Spec. at 95 % sens.",
}


def write_report(comparison: Comparison, data: Mapping[str, Any]) -> None:
    """Write every file of the report except the models; `data` is the data set of every encoder."""
    import pandas as pd

    folder = comparison.folder
    write_atomically(folder / "table.txt", (plain_table(comparison) + "\n").encode())
    write_atomically(folder / "results.csv", long_form(comparison).encode())
    write_atomically(folder / "table.tex", latex_table(comparison).encode())
    predictions = [
        comparison.predictions(method).assign(method=method).set_index("method") for method in comparison.methods
    ]
    write_atomically(folder / "predictions.csv", pd.concat(predictions).to_csv().encode())
    if comparison.excluded:
        write_atomically(folder / "excluded.csv", excluded_csv(comparison.excluded).encode())
    drawn = {
        "folds": fold_figure(comparison),
        "decisions": decision_figure(comparison),
        "evidence": evidence_figure(comparison),
        "learning": learning_figure(comparison),
        "curves": curve_figure(comparison),
    }
    figures = {name: png(figure) for name, figure in drawn.items() if figure is not None}
    for name, content in figures.items():
        write_atomically(folder / f"{name}.png", content)
    write_instance_scores(comparison, data)
    kept = {m: [{k: v for k, v in c.items() if k != "description"} for c in of] for m, of in comparison.cells.items()}
    smaller = {f"{m} with {f:g}": of for (m, f), of in comparison.parts.items()}
    record = {
        "command": comparison.command,
        "definition": comparison.definition,
        "results": {
            "summary": comparison.summary,
            "table": json.loads(comparison.table.reset_index().to_json(orient="records", double_precision=15)),
            "cells": kept,
            "smaller": smaller,
            "excluded": comparison.excluded,
        },
        "timing": {"seconds_per_fold": comparison.seconds},
        "versions": versions(),
    }
    write_atomically(folder / "comparison.json", json.dumps(record, indent=1).encode())
    write_atomically(folder / "report.html", html_page(comparison, next(iter(data.values())), figures).encode())


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


Table = tuple[list[str], list[tuple[Row, list[str]]]]


def _ordered(comparison: Comparison) -> list[Row]:
    return sorted(comparison.rows, key=lambda row: (row.control, -row.auc.effect))


def _name(row: Row) -> str:
    return f"{row.method} ({row.remark})" if row.remark else row.method


def columns(comparison: Comparison, full: bool = True) -> Table:
    """Header and cells of the table, best AUC first, controls last; `full` is for a page, else for a terminal."""
    header = ["Method", f"AUC per {comparison.task.unit}", f"Difference to {comparison.reference}", "p (Holm)"]
    pooled = ["macro_f1", "balanced_accuracy"]
    if not full:
        pooled += [*(["sensitivity", "specificity"] if comparison.binary else []), "brier", "calibration_error"]
    header += ["AUPRC", *(NAMES[k] for k in pooled)]
    if comparison.by_group:
        header += [f"AUC per {comparison.definition['data']['groups']}"]
        header += ["Macro F1 per group"] if full else []
    instances = any(row.instance_auc is not None for row in comparison.rows)
    header += ["Instance AUC"] if instances else []
    header += ["Parameters", "Steps", "s/fold"] if full else []
    lines = []
    for row in _ordered(comparison):
        cells = [_name(row), _cell(row.auc), _cell(row.difference, signed=True)]
        cells.append("-" if np.isnan(row.p_adjusted) else f"{row.p_adjusted:.3f}")
        cells.append(_cell(row.ranking["auprc"], short=not full))
        cells += [_cell(row.pooled[k], short=not full) for k in pooled]
        if comparison.by_group:
            cells += [_cell(row.group_auc), *([_cell(row.group_metrics["macro_f1"])] if full else [])]
        if instances:
            cells.append("-" if row.instance_auc is None else f"{row.instance_auc:.3f}")
        if full:
            cells.append("-" if row.parameters is None else f"{row.parameters:,}")
            cells += [f"{row.steps:,.0f}" if row.steps else "-", f"{comparison.seconds[row.method]:.2f}"]
        lines.append((row, cells))
    return header, lines


def decision_columns(comparison: Comparison) -> Table:
    """Decisions at the frozen threshold, calibration, and points of the ROC curve."""
    rows = _ordered(comparison)
    pooled = [k for k in rows[0].pooled if k not in ("macro_f1", "balanced_accuracy")]
    points = [k for k in rows[0].ranking if k not in ("auc", "auprc")]
    header = ["Method", *(NAMES.get(k, k.replace("recall(", "Recall of ").rstrip(")")) for k in pooled)]
    header += [NAMES[k] for k in points]
    return header, [
        (row, [_name(row), *(_cell(row.pooled[k]) for k in pooled), *(_cell(row.ranking[k]) for k in points)])
        for row in rows
    ]


def evidence_columns(comparison: Comparison) -> Table:
    """Whether instance scores are evidence; only methods that have such scores."""
    header = ["Method", "Deletion", "Insertion", "Agreement of folds", "Agreement of seeds", "Instance AUC"]
    lines = []
    for row in _ordered(comparison):
        if not (row.evidence or row.agreement):
            continue
        cells = [row.method, *(_cell(row.evidence.get(k), signed=True) for k in ("deletion", "insertion"))]
        cells += [f"{row.agreement[k]:.2f}" if k in row.agreement else "-" for k in ("folds", "seeds")]
        lines.append((row, [*cells, "-" if row.instance_auc is None else f"{row.instance_auc:.3f}"]))
    return header, lines


def tuning_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """Of every tuned method: its configurations, and how often each was chosen."""
    lines = []
    for method in comparison.methods:
        drawn = comparison.definition["tune"].get(comparison.base(method), [])
        chosen = [cell["chosen"] for cell in comparison.cells[method] if "chosen" in cell]
        if len(drawn) > 1:
            parts = [
                f"{', '.join(f'{k} = {v}' for k, v in one.items()) or 'defaults'}: {chosen.count(i)} of {len(chosen)}"
                for i, one in enumerate(drawn)
            ]
            space = comparison.definition["spaces"][comparison.base(method)]
            lines.append((method, f"searched: {space}. Chosen: {'; '.join(parts)}"))
    return lines


def rich_table(comparison: Comparison) -> Any:
    """Table for a terminal."""
    from rich.table import Table

    header, lines = columns(comparison, full=False)
    table = Table(title=_title(comparison), title_justify="left", header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(
            name, justify="left" if name == "Method" else "right", no_wrap="[" not in name and "AUC per" in name
        )
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
    for row in _ordered(comparison):
        p = "--" if np.isnan(row.p_adjusted) else f"{row.p_adjusted:.3f}"
        cells = [tex(row.method), _cell(row.auc), _cell(row.difference, signed=True), p]
        cells += [_cell(row.pooled["macro_f1"]), _cell(row.pooled["balanced_accuracy"])]
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


def write_instance_scores(comparison: Comparison, data: Mapping[str, Any]) -> None:
    """Write ``instance_scores.h5``: a group per item with coordinates and, per method, the scores of every instance.

    Scores are out of fold (first repeat): the model had not seen the item. The format is that of
    [`InstanceScoreWriter`][classact.evidence.instance_scores.InstanceScoreWriter].
    """
    given = comparison.definition["folds"] == "given"
    if not any("instance_counts" in arrays for cells in comparison.arrays.values() for arrays in cells):
        return
    one = next(iter(data.values()))
    written: set[tuple[str, int]] = set()
    with InstanceScoreWriter(
        comparison.folder / "instance_scores.h5", comparison.classes, comparison.task.name, comparison.task.unit
    ) as file:
        for method in comparison.methods:
            for cut, cell, arrays in zip(
                comparison.cuts, comparison.cells[method], comparison.arrays[method], strict=True
            ):
                if "instance_counts" not in arrays or (cut.repeat > 0 and not given):
                    continue
                ends = np.cumsum(arrays["instance_counts"])[:-1]
                parts = {kind: np.split(arrays[f"score:{kind}"], ends) for kind in cell["score_kinds"]}
                predicted = decide(arrays["probabilities"], cell["threshold"])
                for number, index in enumerate(cut.test):
                    if (method, index) in written:  # given splits may test an item twice
                        continue
                    first = not any((m, index) in written for m in comparison.methods)
                    written.add((method, index))
                    made = provenance(one.sources[index]) if first and hasattr(one, "sources") else None
                    file.add(
                        comparison.ids[index],
                        method,
                        {kind: of[number] for kind, of in parts.items()},
                        probabilities=arrays["probabilities"][number],
                        predicted=comparison.classes[predicted[number]],
                        coords=one.read(int(index)).coords if first and hasattr(one, "read") else None,
                        label=comparison.classes[comparison.labels[index]],
                        group=comparison.groups[index],
                        fold=cut.fold,
                        patch_size=made.patch_size if made else None,
                        coords_unit=made.unit if made else None,
                    )


STYLE = """
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


def html_page(comparison: Comparison, data: Any, figures: Mapping[str, bytes]) -> str:
    """One self-contained page: what is worth using and how sure that is, then how it was found."""
    escape = html.escape
    best = comparison.versus_best[0]
    worthy = {best} | {m for m, (_, p) in comparison.versus_best[1].items() if not p < 0.05}
    d = comparison.definition
    unit = comparison.task.unit
    facts = {
        "Items": f"{len(comparison.ids)} {unit}s, {counts_by_class(comparison.labels, comparison.classes)}",
        "Instances": f"{comparison.sizes.min():,} to {comparison.sizes.max():,} per {unit}, median "
        f"{np.median(comparison.sizes):,.0f}; {data.in_dim} features each",
        "Layout": data.layout,
        "Groups": f"{len(set(comparison.groups))} by {d['data']['groups']}; none straddles training and test",
        "Splits": "given" if d["folds"] == "given" else f"{d['folds']} folds x {d['repeats']} repeats, stratified",
        "Validation": "one fifth of every training part, by groups; for epoch, configuration, temperature, threshold",
        "Threshold": f"largest with sensitivity {d['target_sensitivity']:g}"
        if d["target_sensitivity"]
        else "best balanced accuracy",
        "Tuning": f"{comparison.tuned} configurations per method, equal steps" if comparison.tuned else "none",
        "Settings": ", ".join(f"{m}.{k}={v}" for m, own in d["settings"].items() for k, v in own.items())
        or "paper defaults",
        "Options": ", ".join(f"{k}={v}" for k, v in d["options"].items()) or "defaults",
        "Versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }

    def picture(name: str, title: str = "") -> str:
        if name not in figures:
            return ""
        address = base64.b64encode(figures[name]).decode()
        heading = f"<h2>{title}</h2>" if title else ""
        return f'{heading}<img alt="{name}" src="data:image/png;base64,{address}">'

    operating = (
        "Sensitivity, specificity, accuracy and recall: pooled predictions of a repeat at the threshold fitted on "
        "validation, averaged over repeats, interval by bootstrap over groups. Brier score and calibration error: of "
        "the probabilities after temperature scaling, fitted on validation. Sensitivity at 90 % specificity and the "
        "like are read off the ROC curve of each test part and describe the ranking; no threshold that could be used "
        "gives them."
    )
    sections = []
    header, lines = evidence_columns(comparison)
    if lines:
        sections.append(
            f"<h2>Where in the {unit}</h2>{_table(header, lines, worthy)}<p><small>Deletion: how much more the "
            "probability of the predicted class falls when the most attended 5, 10, 20, 50 % of the instances are "
            "taken out than when as many random ones are; insertion: how much more is kept when only these are left. "
            "Above 0, attention is evidence; otherwise do not show it to anyone. Agreement: mean rank correlation of "
            "the scores of one item by models of different folds, or of different seeds, that had not trained on it."
            f"</small></p>{picture('evidence')}"
        )
    if comparison.main_effects:
        effects = [
            f"<tr><td>{e.factor} {escape(e.level)}</td><td>{escape(e.versus)}</td>"
            f"<td>{_cell(e.difference, signed=True)}</td><td>{e.p:.3f}</td></tr>"
            for e in comparison.main_effects
        ]
        sections.append(
            "<h2>Encoders and methods</h2><table><thead><tr><th>Main effect of</th><th>against</th><th>Difference in "
            f"AUC</th><th>p (Holm)</th></tr></thead><tbody>{''.join(effects)}</tbody></table>"
        )
    sections.append(picture("learning", "How much data"))
    if tuned := tuning_lines(comparison):
        sections.append(f"<h2>Tuning</h2><table>{fact_rows(tuned)}</table>")
    sections.append(picture("curves", "Training"))
    if comparison.excluded:
        some = [(e.item, f"{e.reason}{f' ({e.label})' if e.label else ''}") for e in comparison.excluded[:20]]
        sections.append(f"<h2>Left out</h2><table>{fact_rows(some)}</table><p><small>All in excluded.csv.</small></p>")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(_title(comparison))}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Which method for {escape(d["data"]["name"])}?</h1><small>{escape(_title(comparison))}</small>
<div class="summary">{"".join(f"<p>{escape(line)}</p>" for line in comparison.summary)}</div>
<h2>Methods</h2>{_table(*columns(comparison), worthy)}
<p><small>Bold: not distinguishable from the best. Grey: controls. p values are adjusted for
several methods (Holm). AUC and AUPRC: mean over test parts with a Nadeau-Bengio corrected interval. Instance AUC, where
instance labels are known: does the attention find the positive instances?</small></p>
{picture("folds")}
<h2>Decisions and calibration</h2>{_table(*decision_columns(comparison), worthy)}<p><small>{operating}</small></p>
{picture("decisions")}
{"".join(sections)}
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(comparison.command)}</pre>
<p>Beside this page: <code>predictions.csv</code> (every prediction), <code>results.csv</code> (every number),
<code>instance_scores.h5</code> (where in the {unit} the evidence lies; <code>classact heatmap</code> draws it),
<code>table.tex</code>, <code>models/</code> (the models of the folds, and each method refitted on everything;
<code>classact predict</code> applies them).</p>
</body></html>
"""


def _table(header: list[str], lines: list[tuple[Row, list[str]]], worthy: set[str]) -> str:
    body = []
    for row, cells in lines:
        kind = "control" if row.control else "best" if row.method in worthy else ""
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def fact_rows(facts: Iterable[tuple[str, str]]) -> str:
    """Rows of a table of two columns."""
    return "".join(
        f'<tr><td>{html.escape(k)}</td><td style="text-align:left;white-space:normal">{html.escape(v)}</td></tr>'
        for k, v in facts
    )
