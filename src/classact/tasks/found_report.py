"""The files of `discover`: a labelled copy of the data, the most typical items of every class, a page."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classact.data.unlabelled import PartlyLabelled
from classact.evidence.figures import new_figure, png
from classact.evidence.report import STYLE, fact_rows, versions
from classact.evidence.store import write_atomically

if TYPE_CHECKING:
    from classact.tasks.discovery import Discovery

TYPICAL, TOLD_APART = 10, 5  # items, and columns that tell a class apart


def write_found(result: "Discovery", folder: Path, command: str) -> None:
    """Write ``labelled.csv``, ``typical.csv`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "labelled.csv", labelled(result).to_csv(index=False).encode())
    chosen = {name: result.found.typical(result.data.x, name, TYPICAL) for name in novel_names(result)}
    write_atomically(folder / "typical.csv", typical(result, chosen).to_csv(index=False).encode())
    write_atomically(folder / "report.html", page(result, chosen, command).encode())


def novel_names(result: "Discovery") -> list[str]:
    """Names of the classes that were found, largest first."""
    present = set(result.names[result.data.unlabelled])
    return [name for name in result.found.names.values() if name in present]


def labelled(result: "Discovery") -> Any:
    """The items with their class and confidence (DataFrame)."""
    import pandas as pd

    data = result.data
    table = pd.DataFrame(data.x, columns=_columns(data)) if data.x.ndim == 2 else pd.DataFrame()
    table.insert(0, "item", list(data.items))
    table["class"] = result.names
    table["confidence"] = np.round(result.confidence, 3)
    table["was_labelled"] = ~data.unlabelled
    return table


def typical(result: "Discovery", chosen: dict[str, np.ndarray]) -> Any:
    """The items nearest to the mean of every class found (DataFrame)."""
    import pandas as pd

    table = labelled(result)
    parts = [table.iloc[rows].assign(rank=np.arange(1, len(rows) + 1)) for rows in chosen.values()]
    return pd.concat(parts) if parts else table.iloc[:0]


def told_apart(result: "Discovery", name: str) -> list[tuple[str, float]]:
    """Columns in which a class differs most from all other items, in standard deviations."""
    x = result.data.x
    std = x.std(0)
    mine = (result.names == name) & result.data.unlabelled
    shift = (x[mine].mean(0) - x[~mine].mean(0)) / np.where(std > 0, std, 1)
    most = np.argsort(-np.abs(shift))[:TOLD_APART]
    return [(_columns(result.data)[k], float(shift[k])) for k in most]


def _columns(data: PartlyLabelled) -> list[str]:
    return list(data.columns) or [f"column_{k + 1}" for k in range(data.x.shape[1])]


def page(result: "Discovery", chosen: dict[str, np.ndarray], command: str) -> str:
    """One self-contained page."""
    escape, data = html.escape, result.data
    sections = []
    for name, rows in chosen.items():
        mine = result.names == name
        sure = float(np.nanmean(result.confidence[mine]))
        part = f"<h2>{escape(name)}: {int(mine.sum()):,} items, mean confidence {sure:.2f}</h2>"
        if data.x.ndim == 2:
            apart = ", ".join(f"{escape(column)} {shift:+.1f}" for column, shift in told_apart(result, name))
            part += f"<p>Differs most from all other items in (standard deviations): {apart}.</p>"
            part += _rows(result, rows)
        else:
            part += _pictures(data.x[rows])
            part += f"<p><small>{', '.join(escape(data.items[row]) for row in rows)}</small></p>"
        sections.append(part)
    sizes = ", ".join(f"{name} ({int((result.names == name).sum())})" for name in chosen)
    facts = {
        "Data": f"{data.name}: {len(data.y):,} items, {int(data.unlabelled.sum()):,} without a class; known classes "
        f"{', '.join(data.classes)}",
        "Method": f"{result.method}: {result.why}",
        "Confidence": "share of fits to three quarters of the items that put an item into the same class",
        "Versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>Classes found in {escape(data.name)}</title><meta name="viewport" content="width=device-width">
<style>{STYLE}</style></head><body>
<h1>{len(chosen)} classes found</h1><small>in {escape(data.name)}</small>
<div class="summary"><p>{escape(sizes)}.</p><p>Their names mean nothing; look at the typical items to give them better
ones. Every unlabelled item was taken to belong to one of them, and none to a known class.</p></div>
{"".join(sections)}
<h2>How this was found</h2><table>{fact_rows(facts.items())}</table>
<pre>{escape(command)}</pre>
<p>Beside this page: <code>labelled.csv</code> (every item with its class), <code>typical.csv</code>,
<code>model.joblib</code> (<code>classact.discover.load</code>, then <code>predict</code>), <code>comparison/</code>
(how the method did).</p>
</body></html>
"""


def _rows(result: "Discovery", rows: np.ndarray) -> str:
    columns = [column for column, _ in told_apart(result, result.names[rows[0]])] if len(rows) else []
    index = [_columns(result.data).index(column) for column in columns]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("item", *columns, "confidence"))
    lines = "".join(
        f"<tr><td>{html.escape(result.data.items[row])}</td>"
        + "".join(f"<td>{result.data.x[row, k]:g}</td>" for k in index)
        + f"<td>{result.confidence[row]:.2f}</td></tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _pictures(images: np.ndarray) -> str:
    figure = new_figure(1.1 * len(images), 1.2)
    for axes, image in zip(figure.subplots(1, len(images), squeeze=False)[0], images, strict=True):
        axes.imshow(np.moveaxis(image, 0, -1).squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
    stream = io.BytesIO(png(figure))
    return f'<img alt="typical items" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'
