"""The command line: thin, every verb calls one library function. Nothing heavy is imported before a verb needs it."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from classact.catalogue import Entry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="classact: compare methods on your own data, and check what papers claim.",
)
data_app = typer.Typer(no_args_is_help=True, help="Known data sets: list, describe, fetch.")
app.add_typer(data_app, name="data")

BROKEN, INTERRUPTED = 1, 130
OPTIONS = ("epochs", "lr", "batch_size", "class_weight")  # what `compare` passes to every method


@contextmanager
def _plain_errors() -> "Iterator[None]":
    """Show errors that a user can mend as one message, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _say("\nStopped. Finished cells are kept; give the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        from classact.data.bag_files import DataError
        from classact.evidence.store import StudyError

        known = (DataError, StudyError, KeyError, ValueError, ModuleNotFoundError, OSError)
        if not isinstance(error, known) or os.environ.get("CLASSACT_DEBUG"):
            raise
        _say(f"Error: {error.args[0] if isinstance(error, KeyError) else error}")
        raise typer.Exit(BROKEN) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


@app.command()
def papers(
    query: Annotated[str | None, typer.Argument(help="A paper's slug, or words to search for.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print BibTeX.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the papers, search them, or show one: its claims, what was measured, and how to use it."""
    import json

    from classact import catalogue

    with _plain_errors():
        entry = catalogue.load_entries().get(query or "")
        found = [entry] if entry else catalogue.papers(query, family)
        if bibtex:
            print("\n\n".join(e.bibtex() for e in found))
        elif as_json:
            print(json.dumps([e.as_dict() for e in found] if entry is None else found[0].as_dict(), indent=1))
        elif entry is not None:
            _show_entry(entry)
        elif not found:
            _say(f"Nothing found for {query!r}.")
            raise typer.Exit(BROKEN)
        else:
            width = max(len(e.slug) for e in found)
            for e in found:
                print(f"{e.slug:<{width}}  {e.family:<11}  {e.status:<8}  {e.title} ({e.year})")
            if query is None:
                print(f"\n{len(found)} papers. `classact papers WORDS` searches, `classact papers SLUG` shows one.")


def _show_entry(entry: "Entry") -> None:
    from textwrap import fill

    print(entry.title)
    print(f"{', '.join(entry.authors)}. {entry.venue}, {entry.year}.")
    for name, value in (("paper", entry.url), ("code of the authors", entry.code)):
        if value:
            print(f"{name}: {value}")
    print(f"family: {entry.family}; status: {entry.status}\n")
    print(fill(entry.summary, 100), "\n")
    result = entry.result()
    verdicts = {claim["id"]: claim for claim in (result or {}).get("claims", [])}
    print("Claims")
    for claim in entry.claims:
        star = "*" if claim.get("central") else " "
        print(fill(f"{claim['id']}: {claim['statement']}", 100, initial_indent=f" {star} ", subsequent_indent="   "))
        print(fill(f"paper: {claim['reported']}", 100, initial_indent="     ", subsequent_indent="     "))
        print(f"     {_verdict(verdicts.get(claim['id']), claim)}")
        if claim.get("note") and claim["id"] in verdicts:
            print(fill(claim["note"], 100, initial_indent="     ", subsequent_indent="     "))
    if result is not None:
        stale = " (STALE: the code has changed since)" if entry.stale() else ""
        print(f"\n* central claim. Measured at cpu scale{stale}; repeat with `{result['command']}`")
    if entry.api and entry.status != "planned":
        package, _, name = entry.api[0].rpartition(".")
        print(f"\nUse: from {package} import {name}")
        print(f"     {', '.join(entry.api)}")


def _verdict(measured: dict[str, Any] | None, claim: dict[str, Any]) -> str:
    if measured is None:
        return f"untested: {claim['untested']}" if claim.get("untested") else "not measured yet"
    return f"{measured['verdict']} ({measured['evidence']}), effect {_effect(measured)}"


def _effect(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    if found["effect"] is None or low is None:
        return str(found["effect"])
    return f"{found['effect']:+.3f} [{low:+.3f}, {high:+.3f}]"


@app.command()
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers.")] = None,
    family: Annotated[str | None, typer.Option(help="Every paper of a family that has experiments.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every paper that has experiments.")] = False,
    scale: Annotated[str, typer.Option(help="smoke, cpu, gpu or paper.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results (default: the package's).")] = None,
    experiment: Annotated[list[str] | None, typer.Option(help="Only this experiment (repeatable).")] = None,
    recheck: Annotated[bool, typer.Option("--recheck", help="Judge stored cells again, run nothing.")] = False,
) -> None:
    """Run a paper's experiments and judge its claims. Exits 0 when they ran, whatever the verdicts."""
    from classact.catalogue import PACKAGE, papers
    from classact.reproductions import reproduce as run

    with _plain_errors():
        chosen = list(slugs or [])
        if family or every:
            entries = papers(family=family)
            chosen += [e.slug for e in entries if (PACKAGE / "reproductions" / e.family / f"{e.slug}.py").exists()]
        if not chosen:
            _say("Error: name a paper, --family or --all")
            raise typer.Exit(2)
        for slug in chosen:
            report = run(slug, scale, workers=workers, out=out, experiments=experiment, recheck=recheck)
            _console().print(_claims_table(report))
            for file in report.files:
                print(file)


def _claims_table(report: Any) -> Any:
    from rich.table import Table

    content = report.content
    measured = {claim["id"]: claim for claim in content["claims"]}
    table = Table(title=f"{report.entry.title} ({content['scale']} scale)", title_justify="left", show_lines=True)
    for name in ("Claim (* central)", "The paper's figure", "Ours [95 % interval]", "Verdict"):
        table.add_column(name, overflow="fold")
    for claim in report.entry.claims:
        found = measured.get(claim["id"])
        name = f"{claim['id']}{' *' if claim.get('central') else ''}\n{claim['statement']}"
        if found is None:
            reason = f"untested: {claim['untested']}" if claim.get("untested") else "not measured at this scale"
            table.add_row(name, claim["reported"], "", reason)
            continue
        ours = []
        for check in found["checks"]:
            ends = [f"{word} {check[word]}" for word in ("above", "below") if check[word] is not None]
            asked = " and ".join(ends) + ("" if check["required"] else " (shown, does not decide)")
            least = "?" if check["detectable"] is None else f"{check['detectable']:.3f}"
            ours.append(
                f"{check['expression']} = {_effect(check)}\n  {check['experiment']}, n = {len(check['seeds'])}, "
                f"smallest detectable {least}; asked: {asked}: {check['verdict']}"
            )
        table.add_row(name, claim["reported"], "\n".join(ours), f"{found['verdict']} ({found['evidence']})")
    return table


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="What to compare methods on: mil.")],
    data: Annotated[str, typer.Argument(help="Folder or file, or a known data set such as digits.")],
    labels: Annotated[Path | None, typer.Option(help="Table of labels: .csv, .tsv, .xlsx.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated; compose: acmil+aem, mhim(acmil); yours as package.module:factory."),
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the table that names the bag or patient.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the table that holds the class.")] = None,
    group: Annotated[str | None, typer.Option(help="What may not straddle folds: a column, slide_id or tcga.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Which feature extractor, where there are several.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Order of the classes, comma-separated; of two, the last is positive.")
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="Given splits: a file or a folder, one a fold.")] = None,
    folds: Annotated[int | None, typer.Option(help="Folds (default 5).")] = None,
    repeats: Annotated[int | None, typer.Option(help="Repeats (default 1).")] = None,
    reference: Annotated[str | None, typer.Option(help="Method the others are compared with (default abmil).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every method (default 50).")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of every method (default 1e-4).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Bags per step of every method (default 1).")] = None,
    class_weight: Annotated[str | None, typer.Option(help="'balanced': weigh classes by inverse frequency.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of a method: acmil.lr=1e-4 (repeatable).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these options.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of splits and training (default 0).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (default cpu).")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes (default 1).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report (default report).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another study in that folder.")] = False,
) -> None:
    """Compare methods on your data, with certainty and without leakage, and write a report."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("task", "data", "config", "overwrite")}
    with _plain_errors():
        from classact.tasks import compare as run

        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # so that package.module:factory finds a module in this folder

        arguments = {**_read_config(config), **given}
        settings = {owner: dict(own) for owner, own in arguments.pop("set", {}).items()}
        for item in arguments.pop("set_", []):
            owner, key, value = _parse_setting(item)
            settings.setdefault(owner, {})[key] = value
        for name in ("methods", "classes"):
            if isinstance(arguments.get(name), str):
                arguments[name] = [part.strip() for part in arguments[name].split(",") if part.strip()]
        options = {k: arguments.pop(k) for k in OPTIONS if k in arguments}
        options |= arguments.pop("options", {})
        folder = Path(arguments.get("out", "report"))
        report = run(
            task,
            data,
            settings=settings,
            options=options,
            overwrite=overwrite,
            command=_command(),
            **arguments,
        )
        from classact.evidence.report import rich_table

        console = _console()
        console.print(rich_table(report))
        for line in report.summary:
            console.print(line, markup=False, soft_wrap=True)
        print(f"\nReport: {folder / 'report.html'} (open it in a browser)")
        print(f"Also there: results.csv, predictions.csv, table.tex, instance_scores.h5, models/ in {folder}/")


def _read_config(path: Path | None) -> dict[str, Any]:
    import tomllib

    if path is None:
        return {}
    if not path.exists():
        raise ValueError(f"{path}: no such file (--config)")
    known = {
        *("labels", "methods", "id_column", "label_column", "group", "encoder", "classes", "splits", "folds"),
        *("repeats", "reference", *OPTIONS, "seed", "device", "workers", "out", "set", "options"),
    }
    content = {k.replace("-", "_"): v for k, v in tomllib.loads(path.read_text(encoding="utf-8")).items()}
    if unknown := set(content) - known:
        raise ValueError(f"{path}: unknown keys {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return content


def _parse_setting(text: str) -> tuple[str, str, Any]:
    import ast

    name, equals, value = text.partition("=")
    owner, dot, key = name.rpartition(".")
    if not (equals and dot and owner and key):
        raise ValueError(f"--set {text}: expected METHOD.NAME=VALUE, such as acmil.lr=1e-4")
    try:
        return owner, key, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return owner, key, value


def _command() -> str:
    import shlex

    return shlex.join(["classact", *sys.argv[1:]])


@data_app.command("list")
def data_list() -> None:
    """List the known data sets and say which are here."""
    from classact.data.registry import DATA_SETS, data_folder, present

    for item in DATA_SETS.values():
        print(f"{item.name:<20} {item.kind:<7} {'here' if present(item) else '-':<5} {item.summary}")
    print(f"\nData folder: {data_folder()} (CLASSACT_DATA)")


@data_app.command("info")
def data_info(name: Annotated[str, typer.Argument(help="A known data set.")]) -> None:
    """Describe a data set: what, licence, source, files and checksums."""
    from classact.data.registry import DATA_SETS, data_folder, present

    with _plain_errors():
        if name not in DATA_SETS:
            raise ValueError(f"{name}: no such data set; there are {', '.join(DATA_SETS)}")
        item = DATA_SETS[name]
        print(f"{item.name}: {item.summary}\nlicence: {item.licence}\nsource: {item.source}")
        for file, sha256 in item.files.items():
            print(f"file: {data_folder() / file}  sha256 {sha256}")
        print("here: yes" if present(item) else f"here: no; `classact data fetch {name}`")


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="A known data set.")]) -> None:
    """Download a data set into the data folder and check it."""
    from subprocess import CalledProcessError
    from urllib.error import URLError

    from classact.data.registry import DATA_SETS, data_folder, fetch

    with _plain_errors():
        try:
            fetch(name)
        except (URLError, CalledProcessError) as error:
            item = DATA_SETS[name]
            files = ", ".join(str(data_folder() / file) for file in item.files)
            addresses = ", ".join((item.urls or {}).values()) or item.source
            raise OSError(f"cannot download {name} ({error}); get it from {addresses} and put it at {files}") from error


@app.command()
def version() -> None:
    """Print the version."""
    from classact.version import __version__

    print(__version__)


def main() -> None:
    """Entry point of the ``classact`` command."""
    app()
