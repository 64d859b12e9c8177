"""Look into trained networks with data at hand: every tool of `classact.probe` behind one page, JSON and figures."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from classact.data.bag_files import DataError
from classact.data.labelled import load_labelled
from classact.data.networks import Network, load_network
from classact.data.photos import class_folders, list_photos, read_photo
from classact.evidence.page import Grid, Section, page
from classact.evidence.store import StudyError, write_atomically

if TYPE_CHECKING:
    import pandas as pd

LAYERS = 4  # compared where the user names none
UNKNOWN = -1  # class of an item
NOTHING = 0.005  # nats
FTWT_GRID = (1.0, 0.97, 0.95, 0.9, 0.85, 0.8)


class Report(Protocol):
    """What every tool returns."""

    def table(self) -> "pd.DataFrame":
        """The figures."""

    def save(self, folder: str | Path) -> Path:
        """Write JSON, arrays and figures."""


@dataclass(frozen=True)
class Found:
    """A report, and what it says in words.

    Attributes
    ----------
    tool : str
        Name of the tool.
    report : Report
        As the library returns it.
    summary : list of str
        What was found.
    facts : dict
        How.
    """

    tool: str
    report: Any
    summary: list[str]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> "pd.DataFrame":
        """That of the report, its index as a column."""
        found: pd.DataFrame = self.report.table()
        return found if found.index.name is None else found.reset_index()

    def grid(self) -> Grid:
        """The table to print."""
        table = self.table
        lines = [[_text(value) for value in line] for line in table.itertuples(index=False)]
        return Grid([str(name).replace("_", " ") for name in table.columns], lines)


def _text(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return "-" if np.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, (int, np.integer)) else str(value)


# ------------------------------------------------------------------------------------------------- networks and data


@dataclass(frozen=True)
class Data:
    """Items to look at: photographs by their files, or a tensor.

    Attributes
    ----------
    name : str
        What they are called in a report.
    y : (n,) int64
        Classes, -1 where unknown.
    files : list of path
        Photographs, read anew in every pass.
    x : (n, ...) float32, optional
        Items in memory.
    """

    name: str
    y: Tensor
    files: list[Path] = field(default_factory=list)
    x: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def part(self, rows: Tensor) -> "Data":
        """Some of the items."""
        files = [self.files[k] for k in rows.tolist()] if self.files else []
        return Data(self.name, self.y[rows], files, None if self.x is None else self.x[rows])


class Loader:
    """Batches of data as a network takes them, as often as wanted: (x, y), or (x,) if some class is unknown."""

    def __init__(self, data: Data, network: Network, batch_size: int, device: str) -> None:
        self.data, self.network, self.batch_size, self.device = data, network, batch_size, device

    def __len__(self) -> int:
        return (len(self.data) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        labelled = bool((self.data.y != UNKNOWN).all())
        for start in range(0, len(self.data), self.batch_size):
            part = slice(start, start + self.batch_size)
            rest = (self.data.y[part].to(self.device),) if labelled else ()
            if self.data.x is not None:
                yield self.data.x[part].to(self.device), *rest
                continue
            transform = self.network.preprocess
            items = [transform.normalize(transform.geometry(read_photo(file))) for file in self.data.files[part]]
            if len({tuple(item.shape) for item in items}) > 1:
                raise DataError(f"{self.data.name}: photographs of several sizes; give --preprocess a crop")
            yield torch.stack(items).to(self.device), *rest


def load_networks(
    specs: Sequence[str],
    weights: Sequence[str | Path] = (),
    preprocess: str | Path | None = None,
    device: str = "cpu",
) -> list[Network]:
    """Load networks as [`load_network`][classact.data.networks.load_network] does.

    Parameters
    ----------
    specs : sequence of str
        ``timm:NAME``, ``torchvision:NAME``, ``efficientnet-lite0`` or ``package.module:factory``; one may stand for
        several files of weights.
    weights : sequence of path
        As many as networks, or none.
    preprocess : str or path, optional
        For networks of one's own that take photographs.
    device : str
        Where they go.
    """
    if not specs:
        raise StudyError("model: expected at least one")
    if len(specs) == 1 and len(weights) > 1:
        specs = list(specs) * len(weights)
    if weights and len(weights) != len(specs):
        raise StudyError(f"weights: expected as many as models ({len(specs)}), got {len(weights)}")
    files: list[str | Path | None] = list(weights) or [None] * len(specs)
    return [
        load_network(spec, file, preprocess=preprocess or ("timm" if _own(spec) else None), device=device)
        for spec, file in zip(specs, files, strict=True)
    ]


def _own(spec: str) -> bool:
    return ":" in spec and spec.partition(":")[0] not in ("timm", "torchvision")


def read_data(
    source: str | Path,
    network: Network,
    *,
    photos: bool,
    label: str | None = None,
    size: int = 64,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Read what a network is to be looked at with.

    Parameters
    ----------
    source : str or path
        A folder of photographs, or what [`load_labelled`][classact.data.labelled.load_labelled] reads, with `label`
        and `size`; of a data set with a test part, that part.
    network : Network
        Its class names tell which class a folder of photographs is of.
    photos : bool
        Whether a folder of images holds photographs for the transform of the network.
    limit : int, optional
        Take so many items, drawn at random.
    seed : int
        Of the draw.

    Raises
    ------
    DataError
        If nothing of the kind is there.
    """
    path = Path(source)
    if photos and (path.is_file() or path.is_dir()) and path.suffix not in (".npz", ".csv", ".parquet"):
        files = list_photos(path)
        folders = class_folders(path, files)
        found = [UNKNOWN] * len(files) if folders is None else [_class_of(network, name) for name in folders]
        data = Data(path.name, torch.tensor(found), files)
    else:
        items = load_labelled(source, label, size)
        x, y = (items.x, items.y) if items.test_x is None or items.test_y is None else (items.test_x, items.test_y)
        data = Data(items.name, y, x=x)
    if limit is not None and limit < 1:
        raise StudyError(f"limit: expected at least 1, got {limit}")
    if limit is not None and limit < len(data):
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:limit]
        data = data.part(chosen.sort().values)
    return data


def _class_of(network: Network, name: str) -> int:
    try:
        return network.find_class(name)
    except DataError:
        return UNKNOWN


def _logits(network: Network, loader: Loader) -> Tensor:
    """What the network says to the first batch, (b, C)."""
    x = next(iter(loader))[0]
    try:
        with torch.inference_mode():
            out = network.model(x)
    except RuntimeError as error:
        shape = tuple(x.shape[1:])
        raise DataError(f"{network.name} does not take items of shape {shape} of {loader.data.name}: {error}") from None
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise DataError(f"{network.name}: expected logits (N, C), got {getattr(out, 'shape', type(out).__name__)}")
    return out


# ------------------------------------------------------------------------------------------------------------- tools


def probe_convergent(
    networks: Sequence[Network],
    loaders: Sequence[Loader],
    layers: Sequence[str] | None,
    positions: int | None,
    seed: int,
) -> Found:
    """Compare two networks unit by unit; `layers` are names of both, or ``first|second``."""
    from classact.probe import convergence_report

    if len(networks) != 2:
        raise StudyError(f"convergent: expected two networks (--model twice, or --weights twice), got {len(networks)}")
    first, second = (network.model for network in networks)
    pairs = [_pair(one) for one in layers] if layers else [(name, name) for name in shared_layers(first, second)]
    report = convergence_report(first, second, pairs, loaders[0], loaders[1], max_positions=positions, seed=seed)
    summary = []
    for name in report.layers:
        best = {c: float(report[name, c].semi.value.mean()) for c in report.conditions}
        cka = {c: report[name, c].similarity.cka for c in report.conditions}
        rest = "".join(f", {best[c]:.2f} {c}" for c in report.conditions if c != "trained")
        summary.append(
            f"{name}: mean correlation of a unit with its best partner {best['trained']:.2f}{rest}; "
            f"linear CKA {', '.join(f'{value:.2f} {c}' for c, value in cka.items())}."
        )
        dead = [len(report[name].dead1), len(report[name].dead2)]
        if any(dead):
            summary.append(f"{name}: {dead[0]} and {dead[1]} units are constant on these items and left out.")
    facts = {
        "Layers": ", ".join(report.layers),
        "Positions drawn per item": "all" if positions is None else str(positions),
    }
    return Found("convergent", report, summary, facts)


def _pair(name: str) -> tuple[str, str]:
    first, _, second = name.partition("|")
    return first.strip(), (second or first).strip()


def shared_layers(first: nn.Module, second: nn.Module, limit: int = LAYERS) -> list[str]:
    """Convolutions and linear layers of the same name in both networks, but for the last one, at most `limit` of them.

    Raises
    ------
    StudyError
        If there is none.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    other = {name for name, module in second.named_modules() if isinstance(module, kinds)}
    names = [name for name, module in first.named_modules() if isinstance(module, kinds) and name in other][:-1]
    if not names:
        raise StudyError("layers: the networks share no layer by name; pass --layers FIRST|SECOND,...")
    chosen = np.unique(np.linspace(0, len(names) - 1, min(limit, len(names))).round().astype(int))
    return [names[k] for k in chosen]


def probe_nap(
    network: Network,
    loader: Loader,
    delta: float,
    layers: Sequence[str] | None,
    verify: int,
    seconds: float,
    out: Path,
    seed: int,
) -> Found:
    """Mine the patterns of every class on half of the items, judge them on the others, and verify them if wanted."""
    from classact.probe import evaluate_patterns, mine_patterns, save_patterns

    data = loader.data
    known = torch.nonzero(data.y != UNKNOWN).flatten()
    if not len(known):
        raise DataError(f"{data.name}: no item has a class that the network knows; put them in folders named by class")
    order = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    halves = [
        Loader(data.part(rows.sort().values), network, loader.batch_size, loader.device) for rows in order.chunk(2)
    ]
    patterns = mine_patterns(network.model, halves[0], delta, layers=layers)
    report = evaluate_patterns(network.model, patterns, halves[-1])
    save_patterns(out / "patterns.npz", patterns)
    mean = report.table().loc["mean"]
    summary = [
        f"The patterns fix {mean['fixed']:.1%} of the neurons.",
        f"Of held-out items of a class {mean['recall']:.1%} follow its pattern, of all others {mean['others']:.2%}.",
        f"{report.ambiguous:.2%} of the held-out items follow two patterns or more.",
    ]
    facts = {"Items": f"{len(halves[0].data)} to mine, {len(halves[-1].data)} to judge", "delta": f"{delta:g}"}
    if verify:
        summary += _verified(network, patterns, halves[-1], verify, seconds, out)
        facts["Verification"] = f"{verify} inputs, {seconds:g} s for each question, inputs in [0, 1]"
    return Found("nap", report, summary, facts)


def _verified(
    network: Network, patterns: Mapping[int, Any], loader: Loader, count: int, seconds: float, out: Path
) -> list[str]:
    """What can be proved of pairs of patterns, and of the first items that are classified rightly and follow theirs.

    Inputs that follow two patterns are written to ``witnesses.npz`` as ``<class>-<class>``.
    """
    from classact.probe import max_verified_radius, preactivations, to_affine_relu, verify_non_ambiguity

    model = network.model
    net = to_affine_relu(model, next(iter(loader))[0].shape[1:])
    pairs = {
        (a, b): verify_non_ambiguity(model, patterns[a], patterns[b], time_limit=seconds, net=net)
        for a in patterns
        for b in patterns
        if a < b
    }
    witnesses: dict[str, Any] = {
        f"{a}-{b}": found.witness.numpy() for (a, b), found in pairs.items() if found.witness is not None
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, **witnesses)
    write_atomically(out / "witnesses.npz", stream.getvalue())
    kinds = [found.status for found in pairs.values()]
    proved, undecided = kinds.count("verified"), kinds.count("unknown")
    shown = f"{len(witnesses)} shown by an input (witnesses.npz)"
    lines = [f"Can an input follow the patterns of two classes? {proved} pairs proved not, {shown}, {undecided} open."]
    radii: list[list[float]] = []
    for x, y in loader:
        seen = preactivations(model, x)
        for k in range(len(x)):
            c = int(y[k])
            if len(radii) == count:
                break
            if int(seen.logits[k].argmax()) == c and c in patterns and bool(patterns[c].follows(seen.z[k : k + 1])[0]):
                options: dict[str, Any] = {"net": net, "time_limit": seconds}
                radii.append([max_verified_radius(model, x[k], c, p, **options).radius for p in (None, patterns[c])])
    if not radii:
        return [*lines, "No held-out item that is classified rightly follows the pattern of its class."]
    without, with_pattern = np.mean(radii, axis=0)
    return [
        *lines,
        f"Largest radius around an item in which its class is verified, mean of {len(radii)}: {without:.3g}.",
        f"The same where the pattern is followed too: {with_pattern:.3g}.",
    ]


def probe_lazyneuron(network: Network, loader: Loader, layers: Sequence[str] | None) -> Found:
    """Measure how few hidden units of the MLPs fire."""
    from classact.probe import activation_sparsity

    report = activation_sparsity(network.model, loader, layers="auto" if layers is None else list(layers))
    dead, units = (sum(of) for of in zip(*((one.dead, len(one.firing_rate)) for one in report.stats), strict=True))
    summary = [
        f"{report.nonzero:.1%} of the hidden activations are nonzero, mean over {len(report.layers)} layers.",
        f"{dead:,} of {units:,} units fire for no token of these items.",
    ]
    if any(np.isfinite(one.large) for one in report.stats):
        summary.append(
            "Activations other than ReLU are hardly ever zero: see the column large (over 1 % of the largest)."
        )
    return Found("lazyneuron", report, summary, {})


def probe_ftwt(network: Network, loader: Loader, grid: Sequence[float]) -> Found:
    """Estimate how many operations dynamic pruning would save, before any training."""
    from classact.probe import estimate_reduction

    report = estimate_reduction(network.model, loader, grid)
    return Found("ftwt", report, report.summary(), {})


def probe_inductivebias(
    data: str | Path,
    *,
    spaces: Sequence[str] | None = None,
    target: float | None = None,
    train: int = 300,
    test: int = 300,
    samples: int = 100,
    label: str | None = None,
    size: int = 16,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
) -> Found:
    """Estimate how much inductive bias a task needs relative to hypothesis spaces."""
    from classact.probe import compare_spaces

    items = load_labelled(data, label, size)
    x, y = items.x, items.y
    if train + test > len(x):
        raise DataError(f"{items.name}: {len(x)} items are fewer than {train} to train and {test} to test")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, held = order[:train], order[train : train + test]
    chosen = tuple(spaces) if spaces else (("rbf", "mlp", "cnn") if x.ndim == 4 else ("rbf", "mlp"))
    report = compare_spaces(
        x[fit],
        y[fit],
        x[held],
        y[held],
        spaces=chosen,
        target_error=target,
        samples=samples,
        seed=seed,
        device=device,
        workers=workers,
    )
    facts = {"Data": f"{items.name}: {train} items to fit, {test} to test, {len(items.classes)} classes"}
    summary = []
    for one in report.biases:
        exact = "" if one.exact is None else f"; by the exact distribution {one.exact:.3g}"
        left_out = f"; {one.n_left_out} hypotheses did not fit and are left out" if one.n_left_out else ""
        if one.value < NOTHING:
            summary.append(
                f"Relative to {one.name} the task needs none: nearly every hypothesis that fits has a test error below "
                f"{one.target_error:.3g}{left_out}."
            )
            continue
        summary.append(
            f"Relative to {one.name} the task needs {one.value:.3g} nats [{one.low:.3g}, {one.high:.3g}] "
            f"({one.bits:.3g} bits) for a test error of {one.target_error:.3g}{exact}{left_out}."
        )
        if one.extrapolation > 3:
            summary.append(
                f"{one.name}: so far beyond the errors seen that the fitted family decides; read it as large."
            )
    return Found("inductivebias", report, summary, facts)


# -------------------------------------------------------------------------------------------------------------- page

TITLES = {
    "convergent": "Do two networks know the same things?",
    "nap": "Which activation patterns tell the classes apart?",
    "lazyneuron": "How few neurons fire?",
    "ftwt": "Which filters can be skipped?",
    "inductivebias": "How much inductive bias does this task need?",
}


def probe(
    tool: str,
    data: str | Path,
    models: Sequence[str] = (),
    *,
    weights: Sequence[str | Path] = (),
    preprocess: str | Path | None = None,
    layers: Sequence[str] | None = None,
    label: str | None = None,
    size: int = 64,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    seed: int = 0,
    out: str | Path = "report",
    command: str = "",
    **options: Any,
) -> Found:
    """Look into networks with one tool and write its report.

    Parameters
    ----------
    tool : {"convergent", "nap", "lazyneuron", "ftwt", "inductivebias"}
        What to find out.
    data : str or path
        See [`read_data`][classact.tasks.probe.read_data].
    models, weights, preprocess
        See [`load_networks`][classact.tasks.probe.load_networks]; ``inductivebias`` takes none.
    layers : sequence of str, optional
        Names of layers, where the tool looks at some.
    label, size, limit, seed
        Of the data.
    batch_size, device
        Of passes through the networks.
    out : path
        Folder of the report: ``report.html``, ``table.csv``, and what the report itself saves.
    command : str
        Shown on the page.
    options
        Of the tool: ``positions`` (convergent), ``delta``, ``verify``, ``seconds`` (nap), ``grid`` (ftwt),
        those of [`probe_inductivebias`][classact.tasks.probe.probe_inductivebias].

    Raises
    ------
    StudyError, DataError, ValueError
        If names, data or networks do not fit.
    """
    if tool not in TITLES:
        raise StudyError(f"tool: expected one of {', '.join(TITLES)}, got {tool!r}")
    folder = Path(out)
    if tool == "inductivebias":
        found = probe_inductivebias(data, label=label, size=size, seed=seed, device=device, **options)
        write_page(found, "", folder, command)
        return found
    networks = load_networks(models, weights, preprocess, device)
    expected = 2 if tool == "convergent" else 1
    if len(networks) != expected:
        raise StudyError(f"{tool}: expected {expected} network{'s' * (expected > 1)}, got {len(networks)}")
    photos = preprocess is not None or not any(_own(spec) for spec in models)
    items = read_data(data, networks[0], photos=photos, label=label, size=size, limit=limit, seed=seed)
    loaders = [Loader(items, network, batch_size, device) for network in networks]
    logits = [_logits(network, loader) for network, loader in zip(networks, loaders, strict=True)]
    known = items.y[items.y != UNKNOWN]
    if len(known) and (most := int(known.max())) >= logits[0].shape[1]:
        raise DataError(f"{networks[0].name} knows {logits[0].shape[1]} classes, {items.name} has one of number {most}")
    tools: dict[str, Callable[[], Found]] = {
        "convergent": lambda: probe_convergent(networks, loaders, layers, options.get("positions"), seed),
        "nap": lambda: probe_nap(
            networks[0],
            loaders[0],
            options.get("delta", 0.95),
            layers,
            options.get("verify", 0),
            options.get("seconds", 10.0),
            folder,
            seed,
        ),
        "lazyneuron": lambda: probe_lazyneuron(networks[0], loaders[0], layers),
        "ftwt": lambda: probe_ftwt(networks[0], loaders[0], options.get("grid", FTWT_GRID)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    found = tools[tool]()
    found.facts.update({"Data": f"{items.name}: {len(items):,} items", "Networks": "; ".join(map(_named, networks))})
    write_page(found, f"{' and '.join(n.name for n in networks)} on {items.name}", folder, command)
    return found


def _named(network: Network) -> str:
    return f"{network.name}, {sum(p.numel() for p in network.model.parameters()):,} parameters"


COLUMNS = {
    "convergent": "semi, bipartite: mean correlation with the best and with the one-to-one partner; overlap: share of "
    "units for which both are the same; sparse r2, single r2: held-out R² of sparse prediction and of the best single "
    "unit; contributors: units needed for nine tenths of it; mixed groups: clusters with units of both networks. "
    "Controls: the networks initialised anew, and items of the second network permuted.",
    "nap": "fixed, active: share of the neurons that a pattern fixes, and fixes on; agreement: share of those that are "
    "as it wants, for items of its class; recall: items of the class that follow it; precision: followers that are "
    "of the class; others: items of other classes that follow it.",
    "lazyneuron": "nonzero: share of the hidden activations above 0; nonzero alive: among units not dead; token "
    "median, token max: share of the units that fires for the median token, and for the busiest; rate: share of tokens "
    "for which a unit fires; dead: units that fire for none; large: for activations other than ReLU, share above a "
    "hundredth of the largest of the token.",
    "ftwt": "r: share of the response that is kept; reduction: share of the convolutions' multiplications saved, mean; "
    "low, high: nine inputs of ten lie between; reduction all: linear layers and mask heads counted too; reduction "
    "official: as the authors count; kept: share of filters; agreement, accuracy: of the network as it is, without any "
    "training, with the masks it would be taught.",
    "inductivebias": "nats, bits: minus the logarithm of the share of fitting hypotheses that reach the target; low, "
    "high: by the bootstrap; dkw: limits without assumptions; exact nats: where the distribution is known; "
    "extrapolation: nats over ln of the number of hypotheses, above 1 beyond what was seen; left out: networks that "
    "did not fit; df, nc, scale: of the fitted non-central chi-square.",
}


def write_page(found: Found, subtitle: str, folder: Path, command: str) -> None:
    """Write the files of the report, ``table.csv`` and ``report.html`` with all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    found.report.save(folder)
    figures = {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}
    write_atomically(folder / "table.csv", found.table.to_csv(index=False).encode())
    sections = [Section(text=COLUMNS.get(found.tool, ""), grid=found.grid(), figures=figures)]
    beside = [file.name for file in sorted(folder.iterdir()) if file.is_file() and file.name != "report.html"]
    content = page(TITLES[found.tool], subtitle, found.summary, sections, found.facts, command, beside)
    write_atomically(folder / "report.html", content.encode())
