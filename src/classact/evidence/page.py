"""A report on one page, and its tables as text and LaTeX, for whatever is compared or looked at."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from classact.evidence.report import STYLE, fact_rows, versions
from classact.evidence.statistics import Interval


@dataclass(frozen=True)
class Grid:
    """A table as it is printed.

    Attributes
    ----------
    header : sequence of str
        Names of the columns; the first is text, the others are numbers.
    lines : sequence of sequences of str
        The rows.
    title : str
        Above the table.
    marked : mapping of int to {"best", "control"}
        Rows to be set off on the page.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""
    marked: Mapping[int, str] = field(default_factory=dict)

    def rich(self) -> Any:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=self.title or None, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number == 0 else "right")
        for line in self.lines:
            table.add_row(*line)
        return table

    def plain(self, width: int = 260) -> str:
        """As plain text."""
        from rich.console import Console

        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            console.print(self.rich(), markup=False)
        return capture.get().rstrip()

    def latex(self) -> str:
        """For a paper; needs booktabs."""

        def escape(text: str) -> str:
            return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

        lines = [
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"\toprule",
            " & ".join(map(escape, self.header)) + r" \\",
            r"\midrule",
        ]
        lines += [" & ".join(map(escape, line)) + r" \\" for line in self.lines]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

    def html(self) -> str:
        """For a page."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in self.lines]
        body = "".join(f'<tr class="{self.marked.get(n, "")}">{row}</tr>' for n, row in enumerate(rows))
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, text, a table, and figures by the text that stands for them."""

    heading: str = ""
    text: str = ""
    grid: Grid | None = None
    figures: Mapping[str, bytes] = field(default_factory=dict)

    def html(self) -> str:
        """The part of the page."""
        parts = [f"<h2>{html.escape(self.heading)}</h2>"] if self.heading else []
        parts += [self.grid.html()] if self.grid is not None else []
        parts += [f"<p><small>{html.escape(self.text)}</small></p>"] if self.text else []
        for name, picture in self.figures.items():
            source = base64.b64encode(picture).decode()
            parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{source}">')
        return "\n".join(parts)


def interval_cell(of: Interval | None, digits: int = 3, signed: bool = False) -> str:
    """An effect with its interval, or a dash."""
    if of is None or not np.isfinite(of.effect):
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    if not np.isfinite(of.low):
        return f"{of.effect:{form}}"
    return f"{of.effect:{form}} [{of.low:{form}}, {of.high:{form}}]"


def page(
    title: str,
    subtitle: str,
    summary: Iterable[str],
    sections: Iterable[Section],
    facts: Mapping[str, str],
    command: str,
    beside: Iterable[str],
) -> str:
    """One self-contained page: what was found, the parts, how it was found, and the files beside it."""
    escape = html.escape
    known = {**facts, "Versions": ", ".join(f"{name} {number}" for name, number in versions().items())}
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1><small>{escape(subtitle)}</small>
<div class="summary">{"".join(f"<p>{escape(one)}</p>" for one in summary)}</div>
{"".join(section.html() for section in sections)}
<h2>How this was found</h2><table>{fact_rows(known.items())}</table>
<pre>{escape(command)}</pre>
<p>Beside this page: {", ".join(f"<code>{escape(name)}</code>" for name in beside)}.</p>
</body></html>
"""
