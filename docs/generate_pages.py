"""Pages made from the catalogue and the results while the documentation is built: one per paper, and their index."""

import shutil
from pathlib import Path

import mkdocs_gen_files

from classact.catalogue import FAMILIES, PACKAGE, Entry, load_entries

ROOT = Path(__file__).resolve().parent.parent


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def asked(check: dict) -> str:
    if check["above"] is not None and check["below"] is not None:
        return f"within {check['above']} and {check['below']}"
    return f"above {check['above']}" if check["below"] is None else f"below {check['below']}"


def claims(entry: Entry) -> list[str]:
    result = entry.result() or {}
    measured = {claim["id"]: claim for claim in result.get("claims", [])}
    lines = ["## Claims", ""]
    for claim in entry.claims:
        star = " (central)" if claim.get("central") else ""
        lines += [f"### {claim['id']}{star}", "", claim["statement"], "", f"*The paper:* {claim['reported']}.", ""]
        found = measured.get(claim["id"])
        if found is None:
            reason = f"Untested: {claim['untested']}." if claim.get("untested") else "Not measured yet."
            lines += [reason.replace("..", "."), ""]
            continue
        lines += [f"**{found['verdict']}** ({found['evidence']})", ""]
        if claim.get("note"):
            lines += [claim["note"], ""]
        lines += [
            "| experiment | effect | ours [95 % interval] | asked | smallest detectable | verdict |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for check in found["checks"]:
            low, high = check["interval"]
            verdict = check["verdict"] if check["required"] else f"{check['verdict']} (shown, does not decide)"
            note = f" ({check['note']})" if check["note"] else ""
            where = f"{check['experiment']}, {check['evidence']}, n = {len(check['seeds'])}"
            lines.append(
                f"| {where} | `{check['expression']}`{note} "
                f"| {number(check['effect'])} [{number(low)}, {number(high)}] | {asked(check)} "
                f"| {number(check['detectable'])} | {verdict} |"
            )
        lines.append("")
    return lines


def page(entry: Entry) -> str:
    links = [f"[paper]({entry.url})"] + ([f"[code of the authors]({entry.code})"] if entry.code else [])
    lines = [
        f"# {entry.title}",
        "",
        f"{', '.join(entry.authors)}. *{entry.venue}*, {entry.year}. {', '.join(links)}.",
        "",
        f"**Family:** {FAMILIES[entry.family]} (`{entry.family}`). **Status:** {entry.status}.",
        "",
        entry.summary,
        "",
    ]
    if entry.status != "planned":
        package, _, name = entry.api[0].rpartition(".")
        lines += ["## Use", "", "```python", f"from {package} import {name}", "```", ""]
        lines += [", ".join(f"[`{n.rpartition('.')[2]}`][{n}]" for n in entry.api), ""]
    else:
        lines += [f"Planned names: {', '.join(f'`{name}`' for name in entry.api)}.", ""]
    lines += claims(entry)
    result = entry.result()
    if result is not None:
        stale = " The code has changed since: these results are **stale**." if entry.stale() else ""
        lines += ["## Measured", "", f"Repeat with `{result['command']}`.{stale}", ""]
        for picture in sorted((PACKAGE / "results" / entry.slug).glob("cpu*.png")):
            target = f"papers/{entry.slug}-{picture.name}"
            with mkdocs_gen_files.open(target, "wb") as out, picture.open("rb") as source:
                shutil.copyfileobj(source, out)
            name = picture.stem.removeprefix("cpu-")
            lines += [f"![{name}]({entry.slug}-{picture.name})", "", f"*{name}*", ""]
    lines += ["## Cite", "", "```bibtex", entry.bibtex(), "```", ""]
    return "\n".join(lines)


def index() -> str:
    lines = ["# Papers", "", "Search them with `classact papers WORDS`.", ""]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", "", "| paper | year | status |", "| --- | --- | --- |"]
        for entry in load_entries().values():
            if entry.family == family:
                lines.append(f"| [{entry.title}]({entry.slug}.md) | {entry.year} | {entry.status} |")
        lines.append("")
    return "\n".join(lines)


for one in load_entries().values():
    with mkdocs_gen_files.open(f"papers/{one.slug}.md", "w") as file:
        file.write(page(one))
with mkdocs_gen_files.open("papers/index.md", "w") as file:
    file.write(index())
with mkdocs_gen_files.open("contributing.md", "w") as file:
    file.write((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
