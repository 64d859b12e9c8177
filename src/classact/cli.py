"""The command line: thin, every verb calls one library function. Nothing heavy is imported before a verb needs it."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from classact.catalogue import Entry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="classact: compare methods on your own data, and check what papers claim.",
)
compare_app = typer.Typer(
    no_args_is_help=True, help="Compare methods on your data, with certainty and without leakage, and write a report."
)
app.add_typer(compare_app, name="compare")
data_app = typer.Typer(no_args_is_help=True, help="Check your data; list, describe and fetch known data sets.")
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


@compare_app.command("mil")
def compare_mil(
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
    tune: Annotated[
        int | None, typer.Option(help="Configurations that every method gets, chosen on validation, with equal steps.")
    ] = None,
    encoders: Annotated[
        str | None, typer.Option(help="Feature extractors to cross with the methods, comma-separated.")
    ] = None,
    fractions: Annotated[str | None, typer.Option(help="Learning curve over groups: 0.1,0.25,0.5,1.")] = None,
    target_sensitivity: Annotated[
        float | None, typer.Option(help="Choose thresholds for this sensitivity on validation, such as 0.95.")
    ] = None,
    exclude_bad: Annotated[
        bool | None, typer.Option("--exclude-bad", help="Leave out bags that cannot be used; they go to excluded.csv.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these options.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of splits and training (default 0).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (default cpu).")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes (default 1).")] = None,
    share_gpu: Annotated[
        bool | None, typer.Option("--share-gpu", help="Let several workers use one GPU; else each gets its own.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: its address, auto, or local.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report (default report).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another study in that folder.")] = False,
) -> None:
    """Compare multiple-instance methods on bags: ABMIL, ACMIL, AEM and their rivals."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("data", "config", "overwrite")}
    with _plain_errors():
        from classact.tasks import compare as run

        _import_from_here()
        arguments = {**_read_config(config), **given}
        settings = {owner: dict(own) for owner, own in arguments.pop("set", {}).items()}
        for item in arguments.pop("set_", []):
            owner, key, value = _parse_setting(item)
            settings.setdefault(owner, {})[key] = value
        for name in ("methods", "classes", "encoders", "fractions"):
            if isinstance(arguments.get(name), str):
                arguments[name] = _names(arguments[name])
        if "fractions" in arguments:
            arguments["fractions"] = [_number(part, "--fractions") for part in arguments["fractions"]]
        options = {k: arguments.pop(k) for k in OPTIONS if k in arguments}
        options |= arguments.pop("options", {})
        folder = Path(arguments.get("out", "report"))
        report = run(
            "mil",
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
        print(f"Next: classact predict {folder} NEW_DATA, classact heatmap {folder} --method METHOD")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A report folder, or one model of its models/.")],
    data: Annotated[str, typer.Argument(help="New data: folder or file.")],
    truth: Annotated[Path | None, typer.Option(help="Table of labels, to measure external performance.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the predictions.")] = Path("pred"),
    method: Annotated[str | None, typer.Option(help="Method of the report (default: its best).")] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Use the one model trained on everything, not the models of the folds.")
    ] = False,
    id_column: Annotated[str | None, typer.Option(help="Column of the table that names the bag or patient.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the table that holds the class.")] = None,
    group: Annotated[str | None, typer.Option(help="What belongs together: a column, slide_id or tcga.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Which feature extractor, where there are several.")] = None,
    exclude_bad: Annotated[
        bool, typer.Option("--exclude-bad", help="Leave out bags that cannot be used; they go to excluded.csv.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where encoder, magnification or patch size differ from training.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier predictions in that folder.")] = False,
) -> None:
    """Apply the models of a report to new data; with --truth, measure how well they do there."""
    with _plain_errors():
        from classact.tasks import predict as run

        options = {"id_column": id_column, "label_column": label_column, "group": group, "encoder": encoder}
        found = run(
            model,
            data,
            truth,
            out,
            method=method,
            refit=refit,
            device=device,
            exclude_bad=exclude_bad,
            force=force,
            overwrite=overwrite,
            command=_command(),
            **{name: value for name, value in options.items() if value is not None},
        )
        for line in found.lines():
            print(line)
        print(f"\nReport: {out / 'report.html'}; also there: predictions.csv, instance_scores.h5 in {out}/")


@app.command()
def heatmap(
    scores: Annotated[Path, typer.Argument(help="Folder of a report or of predictions, or its instance_scores.h5.")],
    out: Annotated[Path, typer.Option(help="Folder of the GeoJSON files and pictures.")] = Path("heatmaps"),
    method: Annotated[str | None, typer.Option(help="Whose scores, where there are several.")] = None,
    score: Annotated[str | None, typer.Option(help="Which score: attention, 'attention x class logit', ...")] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="Of which class, for class-wise scores (default: the predicted one).")
    ] = None,
    patch_size: Annotated[
        float | None, typer.Option(help="Side of a tile in the unit of the coordinates, where the files do not say.")
    ] = None,
    patches: Annotated[Path | None, typer.Option(help="Folder of CLAM's or TRIDENT's patches/.")] = None,
    slides: Annotated[Path | None, typer.Option(help="Folder of slides or thumbnails to draw on.")] = None,
    sizes: Annotated[Path | None, typer.Option(help="Table of slide sizes: slide_id,width,height.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per level-0 pixel, for coordinates in those.")] = None,
    items: Annotated[str | None, typer.Option(help="Only these bags, comma-separated.")] = None,
) -> None:
    """Draw where in the slides the evidence lies: GeoJSON tiles for QuPath, and pictures."""
    with _plain_errors():
        from classact.evidence.heatmap import write_heatmaps

        found = write_heatmaps(
            scores,
            out,
            method=method,
            score=score,
            class_=class_,
            patch_size=patch_size,
            patches=patches,
            slides=slides,
            sizes=sizes,
            mpp=mpp,
            items=[part.strip() for part in items.split(",")] if items else None,
        )
        for item, reason in found.skipped:
            _say(f"{item}: {reason}")
        print(f"{len(found.files)} files in {out}/; drag a .geojson onto its slide in QuPath")


ImagesArg = Annotated[Path, typer.Argument(help="An image file, or a folder of images (class folders are noticed).")]
ModelOption = Annotated[
    str, typer.Option(help="efficientnet-lite0, timm:NAME, torchvision:NAME or package.module:factory.")
]
WeightsOption = Annotated[Path | None, typer.Option(help=".safetensors, .pth, .pt, .ckpt or .pth.tar.")]
ClassesOption = Annotated[Path | None, typer.Option(help="Text file, one class name per line.")]
PreprocessOption = Annotated[
    str | None, typer.Option(help="timm, torchvision, or a JSON file with resize, crop, mean, std.")
]
MapsOption = Annotated[str, typer.Option("--methods", help="Comma-separated; yours as package.module:callable.")]
TargetOption = Annotated[
    str, typer.Option(help="top1, top3, ..., class names or numbers, or over:0.5 for multi-label networks.")
]
LayerOption = Annotated[str, typer.Option(help="auto, or names of layers, comma-separated.")]
StepsOption = Annotated[int, typer.Option(help="Steps of the insertion and deletion curves.")]
BatchOption = Annotated[int, typer.Option(help="Images or tiles in one pass.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]


@app.command()
def explain(
    images: ImagesArg,
    model: ModelOption = "efficientnet-lite0",
    weights: WeightsOption = None,
    classes: ClassesOption = None,
    preprocess: PreprocessOption = None,
    methods: MapsOption = "gradcam,smoothgradcampp,eigencam",
    target: TargetOption = "top1",
    layer: LayerOption = "auto",
    size: Annotated[str | None, typer.Option(help="native, or pixels of the shorter side; nothing is cropped.")] = None,
    tile: Annotated[int | None, typer.Option(help="Explain in tiles of this side, stitched (large frames).")] = None,
    overlap: Annotated[int, typer.Option(help="Overlap of tiles in pixels.")] = 0,
    trust: Annotated[bool, typer.Option(help="Measure how far each map can be trusted (the slow part).")] = True,
    steps: StepsOption = 10,
    batch_size: BatchOption = 16,
    device: DeviceOption = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Show what a network looks at: maps over your images, and how far each can be trusted."""
    with _plain_errors():
        from classact.data.networks import load_network
        from classact.explain.report import explain_images

        _import_from_here()
        explain_images(
            images,
            load_network(model, weights, classes, preprocess, device),
            methods=_names(methods),
            target=target,
            layer="auto" if layer == "auto" else _names(layer),
            out=out,
            size=size,
            tile=tile,
            overlap=overlap,
            trust_maps=trust,
            steps=steps,
            batch_size=batch_size,
            device=device,
        )


@compare_app.command("cams")
def compare_cams(
    images: ImagesArg,
    model: ModelOption = "efficientnet-lite0",
    weights: WeightsOption = None,
    classes: ClassesOption = None,
    preprocess: PreprocessOption = None,
    methods: MapsOption = "gradcam,gradcampp,smoothgradcampp,eigencam",
    boxes: Annotated[
        Path | None, typer.Option(help="Boxes of the objects: a CSV file,x0,y0,x1,y1 or a folder of VOC/ILSVRC XML.")
    ] = None,
    target: TargetOption = "top1",
    layer: LayerOption = "auto",
    steps: StepsOption = 10,
    batch_size: BatchOption = 16,
    device: DeviceOption = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Compare class activation maps on your network and images, with controls as rows."""
    with _plain_errors():
        from classact.data.networks import load_network
        from classact.tasks.cams import compare_cams as run

        _import_from_here()
        found = run(
            images,
            load_network(model, weights, classes, preprocess, device),
            _names(methods),
            out=out,
            boxes=boxes,
            target=target,
            layer="auto" if layer == "auto" else _names(layer),
            steps=steps,
            batch_size=batch_size,
            device=device,
        )
        for line in found.summary:
            print(line)
        print(f"Also there: cams.csv, predictions.csv, maps/, overlays/ in {out}/")


SLOTS = {
    "activations": "Compare activations: the same network with ReLU, GELU, SiLU, CRReLU, ... or your own.",
    "norms": "Compare normalisations: the same network with batch, group, layer norm, EvoNorm, ... or your own.",
    "linear": "Compare linear layers with Kolmogorov-Arnold layers, or your own.",
    "attention": "Compare attention in the same vision transformer: softmax, Kolmogorov-Arnold attention, or your own.",
}


def _compare_part(slot: str) -> "Callable[..., None]":
    def run(
        data: Annotated[
            str,
            typer.Argument(
                help="digits, torchvision:CIFAR10:ROOT, a folder of IDX files or of images in class folders, a .csv, "
                ".parquet or .npz file."
            ),
        ] = "digits",
        methods: Annotated[str | None, typer.Option(help="Comma-separated; yours as package.module:factory.")] = None,
        backbone: Annotated[
            str | None, typer.Option(help="mlp, cnn, vit, timm:NAME or package.module:factory.")
        ] = None,
        width: Annotated[int | None, typer.Option(help="Of mlp (units), cnn (channels), vit (hidden units).")] = None,
        match: Annotated[
            str, typer.Option(help="What is equal: width, params, flops, time; several give several tables.")
        ] = "width,params",
        seeds: Annotated[int, typer.Option(help="Trainings of every arm.")] = 5,
        tune: Annotated[int, typer.Option(help="Learning rates in the grid of every arm.")] = 5,
        epochs: Annotated[int, typer.Option(help="Epochs of every training.")] = 10,
        batch_size: Annotated[int, typer.Option(help="Items per step.")] = 128,
        weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-2,
        label: Annotated[str | None, typer.Option(help="Column of a table that holds the classes.")] = None,
        size: Annotated[int, typer.Option(help="Side to which images of a folder are reduced.")] = 64,
        device: DeviceOption = "cpu",
        workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
        out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    ) -> None:
        with _plain_errors():
            from classact.evidence.part_report import rich_table
            from classact.tasks.parts import compare_parts

            _import_from_here()
            found = compare_parts(
                slot,
                data,
                None if methods is None else _names(methods),
                backbone=backbone,
                width=width,
                match=_names(match),
                seeds=seeds,
                tune=tune,
                epochs=epochs,
                batch_size=batch_size,
                weight_decay=weight_decay,
                label=label,
                size=size,
                out=out,
                workers=workers,
                device=device,
                command=_command(),
            )
            console = _console()
            console.print(rich_table(found))
            for line in found.summary:
                console.print(line, markup=False, soft_wrap=True)
            print(f"\nReport: {out / 'report.html'} (open it in a browser)")
            print(f"Also there: results.csv, cells.csv, table.tex in {out}/")

    return run


for _slot, _help in SLOTS.items():
    compare_app.command(_slot, help=_help)(_compare_part(_slot))


HIDE = "Comma-separated classes whose labels are taken away, to see how well they are found again."
ENCODER = "For images: a network of timm with its pretrained weights; by default a small one is trained."
DISCOVERY = {
    "ncd-table": (
        "digits, or a .csv or .parquet table with gaps in the label column.",
        "Find the classes of unlabelled rows of a table, with and without the true ones.",
    ),
    "ncd-image": (
        "digits; a folder of class folders and one named unlabelled; good/ or maps/ beside unlabelled/; or use --hide.",
        "Find the classes of unlabelled images, with and without the true ones.",
    ),
}


def _compare_discovery(task: str, kind: str) -> "Callable[..., None]":
    def run(
        data: Annotated[
            str,
            typer.Argument(help=kind),
        ] = "digits",
        methods: Annotated[str | None, typer.Option(help="Comma-separated; yours as package.module:factory.")] = None,
        label: Annotated[str | None, typer.Option(help="Column of the table that holds the known classes.")] = None,
        truth: Annotated[
            str | None, typer.Option(help="For scoring only: column with all classes, or folder of class folders.")
        ] = None,
        novel: Annotated[int | None, typer.Option(help="Number of novel classes; by default estimated.")] = None,
        reference: Annotated[str, typer.Option(help="Method that differences are taken to.")] = "kmeans",
        seeds: Annotated[int, typer.Option(help="Fits of every method, each with other items held out.")] = 5,
        tune: Annotated[int, typer.Option(help="Settings to draw per method, chosen on hidden known classes.")] = 0,
        hide: Annotated[str | None, typer.Option(help=HIDE)] = None,
        limit: Annotated[int | None, typer.Option(help="Take so many items, drawn at random.")] = None,
        size: Annotated[int, typer.Option(help="Side to which images of a folder are reduced.")] = 32,
        encoder: Annotated[str | None, typer.Option(help=ENCODER)] = None,
        workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
        out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    ) -> None:
        with _plain_errors():
            from classact.data.unlabelled import load_unlabelled
            from classact.evidence.discovery_report import grid
            from classact.tasks.discovery import compare_discovery
            from classact.tasks.inspection import compare_sorting, is_inspection

            _import_from_here()
            hidden = [] if hide is None else _names(hide)
            names = None if methods is None else _names(methods)
            common: dict[str, Any] = {"n_novel": novel, "seeds": seeds, "encoder": encoder, "out": out}
            common |= {"workers": workers, "command": _command()}
            if task == "ncd-image" and is_inspection(data):
                given = {"--label": label, "--tune": tune, "--hide": hide, "--limit": limit}
                if meaningless := [name for name, value in given.items() if value]:
                    raise ValueError(f"{', '.join(meaningless)}: not for an inspected product, where no class is known")
                first = "kmeans-images" if reference == "kmeans" else reference
                found = compare_sorting(data, names, truth=truth, reference=first, **common)
            else:
                items = load_unlabelled(data, label, truth, size, task == "ncd-image", hidden, limit)
                found = compare_discovery(task, items, names, reference=reference, tune=tune, **common)
            console = _console()
            console.print(grid(found, full=False).rich())
            for line in found.summary:
                console.print(line, markup=False, soft_wrap=True)
            print(f"\nReport: {out / 'report.html'} (open it in a browser)")
            print(f"Also there: results.csv, cells.csv, table.tex in {out}/")

    return run


for _task, (_kind, _help) in DISCOVERY.items():
    compare_app.command(_task, help=_help)(_compare_discovery(_task, _kind))


@compare_app.command("label-space")
def compare_label_space(
    data: Annotated[
        str, typer.Argument(help="diabetes, or a labelled table (.csv, .parquet, .npz), or labelled images as rows.")
    ] = "diabetes",
    metric: Annotated[
        str | None,
        typer.Option(
            help="Distances between labels: order (they are numbers), a .csv with the columns child,parent or "
            "source,target or a square table, or an .npz with labels and embeddings."
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; yours as package.module:function.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the table that holds the labels.")] = None,
    hide: Annotated[str | None, typer.Option(help="Comma-separated classes that are kept from the fit.")] = None,
    hidden_share: Annotated[float, typer.Option(help="Share of the classes to draw for that, without --hide.")] = 0.3,
    classifier: Annotated[str, typer.Option(help="logistic, forest, or package.module:factory.")] = "logistic",
    reference: Annotated[str, typer.Option(help="Method that differences are taken to.")] = "argmax",
    seeds: Annotated[int, typer.Option(help="Splits, each with other hidden classes.")] = 10,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Predict labels between which there are distances, some of them never seen in training."""
    with _plain_errors():
        from classact.evidence.label_report import grid
        from classact.tasks import label_space

        _import_from_here()
        found = label_space.compare_label_space(
            data,
            None if methods is None else _names(methods),
            metric=metric,
            label=label,
            hide=[] if hide is None else _names(hide),
            hidden_share=hidden_share,
            classifier=classifier,
            reference=reference,
            seeds=seeds,
            out=out,
            workers=workers,
            command=_command(),
        )
        console = _console()
        console.print(grid(found).rich())
        for name in ("Labels that can be predicted", "Worth labelling next"):
            if name in found.facts:
                console.print(f"{name}: {found.facts[name]}.", markup=False, soft_wrap=True)
        for line in found.summary:
            console.print(line, markup=False, soft_wrap=True)
        print(f"\nReport: {out / 'report.html'} (open it in a browser)")
        print(f"Also there: results.csv, cells.csv, table.tex in {out}/")


@app.command()
def discover(
    data: Annotated[
        str,
        typer.Argument(
            help="digits, a .csv or .parquet table with gaps in the label column, a folder of images in class folders "
            "with one named unlabelled, or an inspected product (good/ or maps/ beside unlabelled/)."
        ),
    ] = "digits",
    method: Annotated[str, typer.Option(help="auto, or the name of a method.")] = "auto",
    label: Annotated[str | None, typer.Option(help="Column of the table that holds the known classes.")] = None,
    novel: Annotated[int | None, typer.Option(help="Number of novel classes; by default estimated.")] = None,
    seeds: Annotated[int, typer.Option(help="Fits to parts of the data, which give the confidence.")] = 5,
    tune: Annotated[int, typer.Option(help="Settings to draw per method, chosen on hidden known classes.")] = 0,
    size: Annotated[int, typer.Option(help="Side to which images of a folder are reduced.")] = 32,
    encoder: Annotated[str | None, typer.Option(help=ENCODER)] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Find the classes of unlabelled items, name them novel_1, novel_2, ..., and save the method for new ones."""
    with _plain_errors():
        from classact.data.unlabelled import load_unlabelled
        from classact.tasks.discovery import discover_classes
        from classact.tasks.found_report import novel_names
        from classact.tasks.inspection import is_inspection, sort_defects

        if is_inspection(data):
            if method not in ("auto", "anomalyncd") or label or tune:
                raise ValueError("--method, --label, --tune: not for an inspected product, which AnomalyNCD sorts")
            images = sort_defects(data, n_novel=novel, encoder=encoder, out=out, command=_command())
            for name in images.names:
                mine = [one == name for one in images.predictions.labels]
                print(f"  {name:<10} {sum(mine):>6} images, mean confidence {images.confidence[mine].mean():.2f}")
            print(f"\nReport: {out / 'report.html'} (open it in a browser)")
            print(f"Also there: labelled.csv, regions.csv, model.safetensors in {out}/")
            return
        _import_from_here()
        found = discover_classes(
            load_unlabelled(data, label, size=size),
            method,
            n_novel=novel,
            seeds=seeds,
            tune=tune,
            encoder=encoder,
            out=out,
            workers=workers,
            command=_command(),
        )
        print(f"{found.method}: {found.why}.")
        for name in novel_names(found):
            mine = found.names == name
            print(f"  {name:<10} {mine.sum():>6} items, mean confidence {found.confidence[mine].mean():.2f}")
        print(f"\nReport: {out / 'report.html'} (open it in a browser)")
        print(f"Also there: labelled.csv, typical.csv, model.joblib in {out}/")


@compare_app.command("rules")
def compare_rules(
    data: Annotated[
        str,
        typer.Argument(
            help="digits, torchvision:MNIST:ROOT, a folder of IDX files or of images in class folders, a .csv, "
            ".parquet or .npz file."
        ),
    ] = "digits",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: fa, dfa, dtp, ccl, noprop-dt, noprop-ct, noprop-fm; yours as package.module:factory."
        ),
    ] = None,
    network: Annotated[str, typer.Option(help="mlp or cnn.")] = "mlp",
    seeds: Annotated[int, typer.Option(help="Trainings of every rule.")] = 5,
    tune: Annotated[int, typer.Option(help="Learning rates in the grid of every rule.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of every training.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Items per step.")] = 128,
    limit: Annotated[int | None, typer.Option(help="Take so many items to train, drawn once.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of a table that holds the classes.")] = None,
    size: Annotated[int, typer.Option(help="Side to which images of a folder are reduced.")] = 32,
    device: DeviceOption = "cpu",
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Compare learning rules that need no global backward pass with back-propagation: accuracy, time, memory."""
    with _plain_errors():
        from classact.tasks.rules import compare_rules as run

        _import_from_here()
        found = run(
            data,
            None if methods is None else _names(methods),
            network=network,  # type: ignore[arg-type]
            seeds=seeds,
            tune=tune,
            epochs=epochs,
            batch_size=batch_size,
            limit=limit,
            label=label,
            size=size,
            out=out,
            workers=workers,
            device=device,
            command=_command(),
        )
        console = _console()
        console.print(found.grid().rich())
        for line in found.summary:
            console.print(line, markup=False, soft_wrap=True)
        print(f"\nReport: {out / 'report.html'} (open it in a browser)")
        print(f"Also there: results.csv, cells.csv, table.tex in {out}/")


probe_app = typer.Typer(no_args_is_help=True, help="Look into trained networks: what have they learned?")
app.add_typer(probe_app, name="probe")

ProbeData = Annotated[
    str,
    typer.Option(
        "--data",
        help="A folder of photographs; for a network of your own digits, a folder of IDX files or of images in class "
        "folders, a .csv, .parquet or .npz file.",
    ),
]
ProbeModels = Annotated[
    list[str],
    typer.Option("--model", help="efficientnet-lite0, timm:NAME, torchvision:NAME or package.module:factory."),
]
ProbeWeights = Annotated[list[Path] | None, typer.Option("--weights", help="One file per network.")]
ProbeLayers = Annotated[str | None, typer.Option(help="Names of layers, comma-separated.")]
ProbeLimit = Annotated[int | None, typer.Option(help="Take so many items, drawn at random.")]
ProbeLabel = Annotated[str | None, typer.Option(help="Column of a table that holds the classes.")]
ProbeSize = Annotated[int, typer.Option(help="Side to which images are reduced for a network of your own.")]
ProbeSeed = Annotated[int, typer.Option(help="Of everything drawn.")]
ProbeOut = Annotated[Path, typer.Option(help="Folder of the report.")]


def _probe(tool: str, data: str, models: list[str], out: Path, layers: str | None = None, **options: Any) -> None:
    with _plain_errors():
        from classact.tasks.probe import probe

        _import_from_here()
        chosen = None if layers is None else _names(layers)
        found = probe(tool, data, models, layers=chosen, out=out, command=_command(), **options)
        console = _console()
        console.print(found.grid().rich())
        for line in found.summary:
            console.print(line, markup=False, soft_wrap=True)
        print(f"\nReport: {out / 'report.html'} (open it in a browser)")


@probe_app.command("convergent")
def probe_convergent(
    data: ProbeData,
    model: ProbeModels,
    weights: ProbeWeights = None,
    preprocess: PreprocessOption = None,
    layers: Annotated[str | None, typer.Option(help="NAME or FIRST|SECOND, comma-separated.")] = None,
    positions: Annotated[int | None, typer.Option(help="Positions of a map drawn per image (default: all).")] = None,
    limit: ProbeLimit = None,
    label: ProbeLabel = None,
    size: ProbeSize = 64,
    batch_size: BatchOption = 64,
    device: DeviceOption = "cpu",
    seed: ProbeSeed = 0,
    out: ProbeOut = Path("report"),
) -> None:
    """Tell whether two networks know the same: units matched, predicted, clustered across them, with controls."""
    options = {"weights": weights or (), "preprocess": preprocess, "positions": positions, "limit": limit}
    options |= {"label": label, "size": size, "batch_size": batch_size, "device": device, "seed": seed}
    _probe("convergent", data, model, out, layers, **options)


@probe_app.command("nap")
def probe_nap(
    data: ProbeData,
    model: ProbeModels,
    weights: ProbeWeights = None,
    preprocess: PreprocessOption = None,
    delta: Annotated[float, typer.Option(help="Share of the items of a class for which a neuron must agree.")] = 0.95,
    layers: ProbeLayers = None,
    verify: Annotated[int, typer.Option(help="Prove what holds around so many items (networks of ReLUs).")] = 0,
    seconds: Annotated[float, typer.Option(help="For every question of the verification.")] = 10.0,
    limit: ProbeLimit = None,
    label: ProbeLabel = None,
    size: ProbeSize = 64,
    batch_size: BatchOption = 64,
    device: DeviceOption = "cpu",
    seed: ProbeSeed = 0,
    out: ProbeOut = Path("report"),
) -> None:
    """Mine the activation patterns that the inputs of each class share, judge them, and prove what they guarantee."""
    options = {"weights": weights or (), "preprocess": preprocess, "delta": delta, "verify": verify}
    options |= {"seconds": seconds, "limit": limit, "label": label, "size": size, "batch_size": batch_size}
    _probe("nap", data, model, out, layers, device=device, seed=seed, **options)


@probe_app.command("lazyneuron")
def probe_lazyneuron(
    data: ProbeData,
    model: ProbeModels,
    weights: ProbeWeights = None,
    preprocess: PreprocessOption = None,
    layers: ProbeLayers = None,
    limit: ProbeLimit = None,
    label: ProbeLabel = None,
    size: ProbeSize = 64,
    batch_size: BatchOption = 64,
    device: DeviceOption = "cpu",
    seed: ProbeSeed = 0,
    out: ProbeOut = Path("report"),
) -> None:
    """Measure how few hidden units of the MLPs of a transformer or perceptron fire."""
    options = {"weights": weights or (), "preprocess": preprocess, "limit": limit, "label": label, "size": size}
    _probe("lazyneuron", data, model, out, layers, batch_size=batch_size, device=device, seed=seed, **options)


@probe_app.command("ftwt")
def probe_ftwt(
    data: ProbeData,
    model: ProbeModels,
    weights: ProbeWeights = None,
    preprocess: PreprocessOption = None,
    grid: Annotated[
        str, typer.Option(help="Masses of the heatmap to keep, comma-separated.")
    ] = "1,0.97,0.95,0.9,0.85,0.8",
    limit: ProbeLimit = None,
    label: ProbeLabel = None,
    size: ProbeSize = 64,
    batch_size: BatchOption = 64,
    device: DeviceOption = "cpu",
    seed: ProbeSeed = 0,
    out: ProbeOut = Path("report"),
) -> None:
    """Estimate how many operations dynamic pruning would save, before any training."""
    with _plain_errors():
        masses = [float(part) for part in _names(grid)]
    options: dict[str, Any] = {
        "weights": weights or (),
        "preprocess": preprocess,
        "grid": masses,
        "limit": limit,
        "label": label,
    }
    _probe("ftwt", data, model, out, size=size, batch_size=batch_size, device=device, seed=seed, **options)


@probe_app.command("inductivebias")
def probe_inductivebias(
    data: Annotated[
        str,
        typer.Option("--data", help="digits, a folder of IDX files, images in class folders, .csv, .parquet, .npz."),
    ] = "digits",
    spaces: Annotated[str | None, typer.Option(help="Hypothesis spaces: rbf, mlp, cnn.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Test error to reach; by default that of a ridge regression.")
    ] = None,
    train: Annotated[int, typer.Option(help="Items that every hypothesis must fit.")] = 300,
    test: Annotated[int, typer.Option(help="Items on which its error is measured.")] = 300,
    samples: Annotated[int, typer.Option(help="Hypotheses drawn from every space.")] = 100,
    label: ProbeLabel = None,
    size: ProbeSize = 16,
    device: DeviceOption = "cpu",
    seed: ProbeSeed = 0,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    out: ProbeOut = Path("report"),
) -> None:
    """Estimate how much prior knowledge a task needs, relative to a kernel and to architectures."""
    options: dict[str, Any] = {"spaces": None if spaces is None else _names(spaces), "target": target, "train": train}
    options |= {"test": test, "samples": samples, "label": label, "size": size, "device": device, "seed": seed}
    _probe("inductivebias", data, [], out, workers=workers, **options)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _import_from_here() -> None:
    """Let package.module:name find a module in the current folder."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def _read_config(path: Path | None) -> dict[str, Any]:
    import tomllib

    if path is None:
        return {}
    if not path.exists():
        raise ValueError(f"{path}: no such file (--config)")
    known = {
        *("labels", "methods", "id_column", "label_column", "group", "encoder", "classes", "splits", "folds"),
        *("repeats", "reference", *OPTIONS, "seed", "device", "workers", "out", "set", "options", "tune", "encoders"),
        *("fractions", "target_sensitivity", "exclude_bad", "share_gpu", "ray"),
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


def _number(text: Any, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: expected numbers, got {text!r}") from None


def _command() -> str:
    import shlex

    return shlex.join(["classact", *sys.argv[1:]])


@data_app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(help="Folder or file, or a known data set.")],
    labels: Annotated[Path | None, typer.Option(help="Table of labels: .csv, .tsv, .xlsx.")] = None,
    task: Annotated[str, typer.Option(help="What the data are for.")] = "mil",
    methods: Annotated[
        str | None, typer.Option(help="Predict the hours and the disk space that these need, comma-separated.")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the table that names the bag or patient.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the table that holds the class.")] = None,
    group: Annotated[str | None, typer.Option(help="What belongs together: a column, slide_id or tcga.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Which feature extractor, where there are several.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the comparison to plan.")] = 5,
    repeats: Annotated[int, typer.Option(help="Repeats of the comparison to plan.")] = 1,
    tune: Annotated[int, typer.Option(help="Configurations per method of the comparison to plan.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the comparison to plan.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Bags per step of the comparison to plan.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read files.")] = 2,
) -> None:
    """Read every item once: what can be used, what not and why, and how many folds are possible.

    Exits with 1 if something cannot be used.
    """
    with _plain_errors():
        from classact.tasks import check_data

        options = {"id_column": id_column, "label_column": label_column, "group": group, "encoder": encoder}
        plan = {"folds": folds, "repeats": repeats, "tune": tune}
        training = {k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None}
        names = [part.strip() for part in methods.split(",") if part.strip()] if methods else None
        check, costs = check_data(
            task,
            data,
            labels,
            methods=names,
            plan=plan,
            options=training,
            workers=workers,
            **{name: value for name, value in options.items() if value is not None},
        )
        for line in [*check.lines(), *costs]:
            print(line)
        if check.problems:
            raise typer.Exit(BROKEN)


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
