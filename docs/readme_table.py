"""Write the table of papers in README.md from the catalogue: python docs/readme_table.py."""

from pathlib import Path

from classact.catalogue import FAMILIES, load_entries

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- papers -->\n", "<!-- /papers -->\n"


def table() -> str:
    """One line per paper: slug, linked title, family and status."""
    lines = ["| | paper | family | status |", "| --- | --- | --- | --- |"]
    for entry in load_entries().values():
        code = f" ([code]({entry.code}))" if entry.code else ""
        paper = f"[{entry.title}]({entry.url}), {entry.year}{code}"
        lines.append(f"| `{entry.slug}` | {paper} | {FAMILIES[entry.family]} | {entry.status} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """README with the table brought up to date."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
