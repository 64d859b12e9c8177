"""Explain a network's decisions on a file or a folder of images: predictions, maps, and how far each can be trusted.

What is written to the folder: ``predictions.csv``; per image ``maps/*.npz`` with the maps and ``overlays/*.png``; and
a self-contained ``report.html``. An interrupted run goes on where it stopped; an unreadable image is listed.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classact.data.bag_files import DataError
from classact.data.networks import Network, Preprocess
from classact.data.photos import class_folders, list_photos, read_photo
from classact.explain.cam import Normalize, normalize_map
from classact.explain.layers import Layer
from classact.explain.methods import Explain, find_method
from classact.explain.metrics import confidence_change
from classact.explain.sanity import CONTROLS, control_maps, shuffled_copies, similarity, trust
from classact.explain.targets import labels_over

TOP = 5
SIMILAR = 0.7


@dataclass(frozen=True)
class Options:
    """What decides the result for an image; a finished image of other options is not reused."""

    methods: tuple[str, ...]
    target: str = "top1"
    layer: str = "auto"
    size: str | None = None
    tile: int | None = None
    overlap: int = 0
    trust: bool = True
    steps: int = 10


@dataclass
class ExplainReport:
    """What was found: one record per image, and the images that could not be read."""

    out: Path
    network: str
    transform: Preprocess
    options: Options
    items: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    accuracy: dict[str, float] | None = None

    def table(self) -> list[dict[str, Any]]:
        """One row per method: over all maps, the mean gain and how often it beats the controls."""
        rows = []
        for method in self.options.methods:
            maps = [m for item in self.items for m in item["maps"] if m["method"] == method]
            if not maps or "gain" not in maps[0]:
                rows.append({"method": method, "maps": len(maps)})
                continue
            rows.append({
                "method": method,
                "maps": len(maps),
                **{f"gain_{fill}": float(np.mean([m["gain"][fill] for m in maps])) for fill in maps[0]["gain"]},
                "beats_gaussian": float(np.mean([m["beats"]["gaussian"] for m in maps])),
                "beats_random": float(np.mean([m["beats"]["random"] for m in maps])),
                "average_drop": float(np.mean([m["average_drop"] for m in maps])),
                "increase": float(np.mean([m["increase"] for m in maps])),
                "randomized": float(np.mean([m["randomized"][-1] for m in maps])),
                "other_class": float(np.mean([m["other_class"] for m in maps])),
            })  # fmt: skip
        return rows


def explain_images(
    place: str | Path,
    network: Network,
    *,
    methods: Sequence[str] = ("gradcam", "smoothgradcampp", "eigencam"),
    target: str = "top1",
    layer: str | Sequence[Layer] = "auto",
    out: str | Path = "report",
    size: str | None = None,
    tile: int | None = None,
    overlap: int = 0,
    trust_maps: bool = True,
    steps: int = 10,
    batch_size: int = 16,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> ExplainReport:
    """Explain a network's decisions on images, and write a report.

    Parameters
    ----------
    place : path
        An image file, or a folder; if its images lie in class folders, the accuracy is said first.
    network : Network
        From [`load_network`][classact.data.networks.load_network].
    methods : sequence of str
        Names as for [`find_method`][classact.explain.methods.find_method].
    target : str
        ``"top1"``, ``"top3"``, ..., names or numbers of classes separated by commas, or ``"over:0.5"``: for a
        multi-label network every label whose probability is over the threshold. With one logit, class 1 is
        positive, 0 negative.
    layer : str or sequence
        ``"auto"``, or layers of the network.
    out : path
        Folder of the report. Images finished there with the same options are not computed again.
    size : str, optional
        ``"native"`` takes images as they are, a number resizes their shorter side to it; both instead of the network's
        own resizing and cropping.
    tile, overlap : int, optional
        Cut each image into tiles of this side that overlap by so many pixels, explain each, and stitch the maps in the
        image's coordinates. The class explained is the one of the mean probability over tiles.
    trust_maps : bool
        Measure every map: insertion and deletion, confidence, randomised network, other class, controls. Not for tiles.
    steps : int
        Steps of the insertion and deletion curves.
    batch_size : int
        Images (or tiles) in one pass.
    device : str
        Where the network runs.
    say : callable
        Receives lines about progress.

    Raises
    ------
    DataError, ValueError
        For a place without images, an unknown method, class or layer, or a folder that holds another report.
    """
    options = Options(tuple(methods), target, str(layer), size, tile, overlap, trust_maps and tile is None, steps)
    _check(options, network)
    files = list_photos(place)
    folders = class_folders(place, files)
    out = Path(out)
    run = _Run(network, options, layer, out, batch_size, device)
    say(f"network: {network.name}; transform: {run.transform}")
    report = ExplainReport(out, network.name, run.transform, options)
    root = Path(place) if Path(place).is_dir() else Path(place).parent
    names = [file.relative_to(root).as_posix() for file in files]
    _predict(run, report, files, names, folders, say)
    done = 0
    readable = [file for file, name in zip(files, names, strict=True) if name in run.predicted]
    for batch in run.batches(readable, root):
        for item in run.finished(batch):
            report.items.append(item)
        done += len(batch)
        say(f"{done} of {len(readable)} images explained")
    _write_predictions(out / "predictions.csv", run, names)
    from classact.explain.page import write_page

    write_page(report, out / "report.html")
    say(f"report: {out / 'report.html'}")
    return report


def _check(options: Options, network: Network) -> None:
    for name in options.methods:
        find_method(name)
    if not options.methods:
        raise ValueError("methods must name at least one")
    if options.tile is not None and not 0 <= options.overlap < options.tile:
        raise ValueError(f"overlap must be from 0 to the tile's side {options.tile}, got {options.overlap}")
    if options.size is not None and options.size != "native" and not options.size.isdigit():
        raise ValueError(f"size must be 'native' or a number of pixels, got {options.size!r}")
    if options.steps < 2:
        raise ValueError(f"steps must be at least 2, got {options.steps}")
    if options.target.startswith("over:"):
        float(options.target[5:])
    elif not (options.target.startswith("top") and options.target[3:].isdigit()):
        for name in options.target.split(","):
            network.find_class(name.strip())


class _Run:
    """One network with its options, working through images."""

    def __init__(self, network: Network, options: Options, layer: Any, out: Path, batch_size: int, device: str) -> None:
        from dataclasses import replace

        self.network, self.options, self.out = network, options, out
        self.batch_size, self.device = batch_size, device
        resize = None if options.size == "native" else int(options.size) if options.size else network.preprocess.resize
        own = options.size is None and options.tile is None
        self.transform = network.preprocess if own else replace(
            network.preprocess, resize=resize if options.size else None, crop=None
        )  # fmt: skip
        self.model = network.model.to(device).eval()
        normalize: Normalize = None if options.tile else "max"
        self.methods: dict[str, Explain] = {name: find_method(name, layer, normalize) for name in options.methods}
        self.predicted: dict[str, list[tuple[int, float]]] = {}
        self.logits: dict[str, Tensor] = {}
        self.shuffled: list[nn.Module] = []
        content = json.dumps([network.name, str(self.transform), asdict(options)], sort_keys=True)
        weights = hashlib.sha256()
        for value in network.model.state_dict().values():
            weights.update(value.detach().cpu().contiguous().flatten()[:64].float().numpy().tobytes())
        self.key = hashlib.sha256((content + weights.hexdigest()).encode()).hexdigest()[:16]
        for part in ("items", "maps", "overlays"):
            (out / part).mkdir(parents=True, exist_ok=True)
        settings = out / "settings.json"
        if settings.exists() and json.loads(settings.read_text()).get("key") != self.key:
            raise DataError(f"{out} holds a report of other settings; choose another --out, or remove it")
        settings.write_text(json.dumps({"key": self.key, "network": network.name, **asdict(options)}, indent=1))

    # images -> network input

    def read(self, file: Path) -> Tensor:
        """The image as (3, h, w) in [0, 1], resized and cropped."""
        return self.transform.geometry(read_photo(file))

    def tiles(self, image: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Tiles (M, 3, t, t) of an image and their corners; the image itself without tiling."""
        side = self.options.tile
        if side is None:
            return image.unsqueeze(0), [(0, 0)]
        height, width = image.shape[1:]
        padded = torch.nn.functional.pad(image, [0, max(0, side - width), 0, max(0, side - height)])
        corners = [
            (top, left)
            for top in _starts(padded.shape[1], side, self.options.overlap)
            for left in _starts(padded.shape[2], side, self.options.overlap)
        ]
        return torch.stack([padded[:, r : r + side, c : c + side] for r, c in corners]), corners

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) on the CPU."""
        parts = []
        with torch.inference_mode():
            for part in images.split(self.batch_size):
                output = self.model(self.network.preprocess.normalize(part).to(self.device))
                if not isinstance(output, Tensor) or output.ndim not in (1, 2):
                    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise DataError(
                        f"expected logits (N, C) from {self.network.name}, it returned {shape}; wrap it in a module"
                        " that returns the logits"
                    )
                parts.append(output.reshape(len(part), -1).float().cpu())
        return torch.cat(parts)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (N, C): softmax, or sigmoid for one logit or a multi-label target."""
        if logits.shape[1] == 1:
            positive = logits.sigmoid()
            return torch.cat([1 - positive, positive], 1)
        return logits.sigmoid() if self.options.target.startswith("over:") else logits.softmax(1)

    def wanted(self, name: str) -> list[int]:
        """Classes to explain for an image."""
        target = self.options.target
        if target.startswith("over:"):
            return labels_over(self.logits[name].unsqueeze(0), float(target[5:]))[0]
        if target.startswith("top") and target[3:].isdigit():
            if len(self.logits[name]) == 1:
                return [1]
            return [c for c, _ in self.predicted[name][: max(1, int(target[3:]))]]
        return [self.network.find_class(part.strip()) for part in target.split(",")]

    # explanations

    def batches(self, files: list[Path], root: Path) -> Iterator[list[tuple[Path, str]]]:
        named = [(file, file.relative_to(root).as_posix()) for file in files]
        for start in range(0, len(named), self.batch_size):
            yield named[start : start + self.batch_size]

    def finished(self, batch: list[tuple[Path, str]]) -> Iterator[dict[str, Any]]:
        """Records of a batch of images: kept ones as they are, the others computed now."""
        todo = [(file, name) for file, name in batch if not self._record(name).exists()]
        loaded = [(name, self.read(file)) for file, name in todo]
        for names, images in _same_size(loaded):
            self._explain(names, images)
        for _, name in batch:
            yield json.loads(self._record(name).read_text())

    def _record(self, name: str) -> Path:
        return self.out / "items" / f"{flat_name(name)}.json"

    def _explain(self, names: list[str], images: Tensor) -> None:
        """Explain images of one size; every class of an image is a row of its own."""
        rows = [(i, c) for i, name in enumerate(names) for c in self.wanted(name)]
        maps: dict[str, list[Tensor]] = {method: [] for method in self.methods}
        measured: list[dict[str, Any]] = [{} for _ in rows]
        if self.options.tile is None:
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                x = self.network.preprocess.normalize(images[[i for i, _ in part]]).to(self.device)
                classes = torch.tensor([c for _, c in part], device=self.device)
                found = {method: explain(self.model, x, classes).float() for method, explain in self.methods.items()}
                for method, one in found.items():
                    maps[method].extend(one.cpu())
                if self.options.trust:
                    others = [self._other(names[i], c) for i, c in part]
                    for row, record in zip(
                        range(start, start + len(part)), self._measure(x, classes, others, found), strict=True
                    ):
                        measured[row] = record
        else:
            for i, c in rows:
                for method, explain in self.methods.items():
                    maps[method].append(self._stitched(images[i], c, explain))
        for i, name in enumerate(names):
            own = [row for row, (j, _) in enumerate(rows) if j == i]
            self._write(
                name, images[i], [(rows[r][1], {m: maps[m][r] for m in self.methods}, measured[r]) for r in own]
            )

    def _stitched(self, image: Tensor, c: int, explain: Explain) -> Tensor:
        tiles, corners = self.tiles(image)
        height, width = image.shape[1:]
        side = tiles.shape[2]
        total = torch.zeros(max(side, height), max(side, width))
        count = torch.zeros_like(total)
        for start in range(0, len(tiles), self.batch_size):
            x = self.network.preprocess.normalize(tiles[start : start + self.batch_size]).to(self.device)
            for one, (r, k) in zip(explain(self.model, x, c).float().cpu(), corners[start:], strict=False):
                total[r : r + side, k : k + side] += one
                count[r : r + side, k : k + side] += 1
        return normalize_map((total / count)[None, :height, :width])[0]

    def _other(self, name: str, c: int) -> int:
        """The likeliest class that is not the one explained."""
        if len(self.logits[name]) == 1:
            return 1 - c
        return next(k for k, _ in self.predicted[name] if k != c)

    def _measure(self, x: Tensor, classes: Tensor, others: list[int], found: dict[str, Tensor]) -> list[dict[str, Any]]:
        """How far each map can be trusted, for each row of a batch: method -> record."""
        model, steps = self.model, self.options.steps
        if not self.shuffled:
            self.shuffled = shuffled_copies(model)
        other = torch.tensor(others, device=x.device)
        controls = {kind: trust(model, x, control_maps(x, kind), classes, steps=steps) for kind in CONTROLS}
        own = {method: trust(model, x, one, classes, steps=steps) for method, one in found.items()}
        records: list[dict[str, Any]] = [{} for _ in range(len(x))]
        for method, explain in self.methods.items():
            one = found[method]
            randomized = torch.stack([similarity(one, explain(m, x, classes)) for m in self.shuffled])
            same = similarity(one, explain(model, x, other))
            Y, O = confidence_change(model, x, one, classes)  # noqa: E741 - the papers' symbol
            for row, record in enumerate(records):
                gain = {fill: float(v[row]) for fill, v in own[method].gain.items()}
                against = {kind: {fill: float(v[row]) for fill, v in c.gain.items()} for kind, c in controls.items()}
                rivals = {m: {fill: float(v[row]) for fill, v in t.gain.items()} for m, t in own.items() if m != method}
                record[method] = {
                    "insertion": {fill: float(v[row]) for fill, v in own[method].insertion.items()},
                    "deletion": {fill: float(v[row]) for fill, v in own[method].deletion.items()},
                    "gain": gain,
                    "controls": against,
                    "beats": {kind: all(gain[fill] > of[fill] for fill in gain) for kind, of in against.items()},
                    "rank": {fill: 1 + sum(of[fill] >= gain[fill] for of in against.values()) for fill in gain},
                    "unstable": sorted(m for m, of in {**against, **rivals}.items() if _flips(gain, of)),
                    "average_drop": float((Y - O).clamp_min(0)[row] / Y[row].clamp_min(1e-12)),
                    "increase": float(O[row] > Y[row]),
                    "randomized": randomized[:, row].tolist(),
                    "other_class": float(same[row]),
                }
        return records

    def _write(self, name: str, image: Tensor, rows: list[tuple[int, dict[str, Tensor], dict[str, Any]]]) -> None:
        from classact.explain.page import overlay, save_image

        record: dict[str, Any] = {
            "file": name,
            "shape": list(image.shape[1:]),
            "predictions": [
                {"class": c, "name": self.title(c), "probability": p} for c, p in self.predicted[name][:TOP]
            ],
            "maps": [],
        }
        arrays: dict[str, Any] = {}
        for c, maps, measured in rows:
            for method, one in maps.items():
                arrays[f"{method}/{c}"] = one.numpy()
                picture = self.out / "overlays" / f"{flat_name(name)}-{flat_name(method)}-{c}.png"
                save_image(overlay(image, one), picture)
                entry = {
                    "method": method,
                    "class": c,
                    "name": self.title(c),
                    "overlay": picture.relative_to(self.out).as_posix(),
                }
                record["maps"].append({**entry, **measured.get(method, {})})
        save_image(image.permute(1, 2, 0).numpy(), self.out / "overlays" / f"{flat_name(name)}.png")
        np.savez_compressed(self.out / "maps" / f"{flat_name(name)}.npz", **arrays)
        temporary = self._record(name).with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        temporary.replace(self._record(name))

    def title(self, c: int) -> str:
        """Name of a class."""
        if not self.network.classes and next(iter(self.logits.values())).numel() == 1:
            return ("negative", "positive")[c]
        return self.network.title(c)


def _same_size(loaded: list[tuple[str, Tensor]]) -> Iterator[tuple[list[str], Tensor]]:
    """Images that can be one batch: those of one size, with their names."""
    ordered = sorted(loaded, key=lambda pair: tuple(pair[1].shape))
    for _, group in groupby(ordered, key=lambda pair: tuple(pair[1].shape)):
        members = list(group)
        yield [name for name, _ in members], torch.stack([image for _, image in members])


def _flips(a: dict[str, float], b: dict[str, float]) -> bool:
    signs = {np.sign(a[fill] - b[fill]) for fill in a}
    return len(signs) > 1


def flat_name(name: str) -> str:
    """A file name for an image in subfolders or a method of one's own."""
    return name.replace("/", "__").replace(":", "--")


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover the length; the last one ends with it."""
    step = side - overlap
    return [min(start, length - side) for start in range(0, max(1, length - overlap), step)]


def _predict(
    run: _Run,
    report: ExplainReport,
    files: list[Path],
    names: list[str],
    folders: list[str] | None,
    say: Callable[[str], None],
) -> None:
    """Predict every readable image, list the others, and say the accuracy where folders are classes."""
    pairs = list(zip(files, names, strict=True))
    for start in range(0, len(pairs), run.batch_size):
        loaded = []
        for file, name in pairs[start : start + run.batch_size]:
            try:
                loaded.append((name, run.read(file)))
            except DataError as error:
                report.unreadable.append({"file": name, "reason": str(error)})
                say(f"unreadable, left out: {error}")
        for group, images in _same_size(loaded):
            if run.options.tile is None:
                logits = run.forward(images).unsqueeze(1)
            else:
                logits = torch.stack([run.forward(run.tiles(image)[0]) for image in images])
            for name, of in zip(group, logits, strict=True):  # of: (tiles, C)
                p = run.probabilities(of).mean(0)
                run.logits[name] = of.mean(0)
                top = p.topk(min(len(p), TOP + 1))
                run.predicted[name] = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    if not run.predicted:
        raise DataError(f"none of {len(files)} images could be read")
    classes = len(run.probabilities(next(iter(run.logits.values())).unsqueeze(0))[0])
    if folders is not None:
        report.accuracy = _accuracy(run, names, folders, classes, say)


def _accuracy(
    run: _Run, names: list[str], folders: list[str], classes: int, say: Callable[[str], None]
) -> dict[str, float] | None:
    known: dict[str, int] = {}
    for folder in sorted(set(folders)):
        try:
            known[folder] = run.network.find_class(folder)
        except DataError:
            continue
    pairs = [
        (run.predicted[name][0][0], known[folder])
        for name, folder in zip(names, folders, strict=True)
        if folder in known and name in run.predicted
    ]
    if not pairs:
        say("images lie in folders, but no folder has the name or number of a class: accuracy not measured")
        return None
    accuracy, chance = float(np.mean([a == b for a, b in pairs])), 1 / classes
    say(f"accuracy on {len(pairs)} images in class folders: {accuracy:.3f} (chance {chance:.3f})")
    if accuracy <= chance + 2 * np.sqrt(chance * (1 - chance) / len(pairs)):
        say(
            "WARNING: the accuracy is near chance. A wrong mean, size, channel order or class order gives plausible,"
            " wrong maps: check --preprocess, --classes and --weights before reading any of them"
        )
    return {"accuracy": accuracy, "chance": chance, "images": len(pairs)}


def _write_predictions(path: Path, run: _Run, names: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "rank", "class", "name", "probability"])
        for name in names:
            for rank, (c, p) in enumerate(run.predicted.get(name, [])[:TOP], start=1):
                writer.writerow([name, rank, c, run.title(c), f"{p:.6f}"])
