"""Rank class activation maps on a network and images of one's own, with controls as rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from classact.data.bag_files import DataError
from classact.data.boxes import box_mask, read_boxes
from classact.data.networks import Network
from classact.data.photos import read_photo
from classact.evidence.statistics import Interval, holm, region_p_values, t_interval
from classact.explain.metrics import box_iou, boxes_from_map, energy_pointing_game, pointing_game
from classact.explain.page import shown, write_page
from classact.explain.report import ExplainReport, explain_images, flat_name
from classact.explain.sanity import CONTROLS, control_maps

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass
class CamComparison:
    """Maps ranked by their mean gain (insertion minus deletion) over two fills, controls among them.

    Attributes
    ----------
    rows : list of dict
        Best first: ``method``, ``control``, ``gain`` and per fill ``gain_<fill>`` as `Interval`s, ``minus_control``,
        the paired difference to the best control with ``p_holm``, ``unstable`` (methods whose order with it flips
        between the fills), and where boxes were given ``pointing``, ``energy``, ``box_accuracy`` and the ``threshold``
        fitted on the other half of the images.
    report : ExplainReport
        The records of every image.
    """

    rows: list[dict[str, Any]]
    best_control: str
    report: ExplainReport

    @property
    def table(self) -> "pd.DataFrame":
        """One row per method and control."""
        import pandas as pd

        flat = []
        for row in self.rows:
            one: dict[str, Any] = {}
            for key, value in row.items():
                if isinstance(value, Interval):
                    one |= {key: value.effect, f"{key}_low": value.low, f"{key}_high": value.high}
                else:
                    one[key] = ", ".join(value) if isinstance(value, list) else value
            flat.append(one)
        return pd.DataFrame(flat)

    @property
    def summary(self) -> list[str]:
        """What was found, in words."""
        methods = [row for row in self.rows if not row["control"]]
        control = {"gaussian": "a spot in the centre", "uniform": "no map at all", "random": "random blobs"}
        name = control.get(self.best_control, "an edge detector")
        better = [row["method"] for row in methods if row["minus_control"].low > 0 and row["p_holm"] < 0.05]
        n = methods[0]["gain"].n
        lines = [
            f"Over {n} images, better than {name} (the best control) beyond doubt: {', '.join(better)}."
            if better
            else f"Over {n} images, no map is better than {name} (the best control) beyond doubt."
        ]
        best = methods[0]
        rivals = [row["method"] for row in methods if row["minus_best"] is not None and row["minus_best"].high >= 0]
        lines.append(
            f"Highest mean gain: {best['method']} {shown(best['gain'])}"
            + (f"; {', '.join(rivals)} cannot be told apart from it." if rivals else ".")
        )
        flips = sorted({tuple(sorted((row["method"], other))) for row in methods for other in row["unstable"]})
        if flips:
            pairs = "; ".join(f"{a} and {b}" for a, b in flips)
            lines.append(f"Unstable, the order flips between the two fills: {pairs}.")
        return lines


def compare_cams(
    images: str | Path,
    network: Network,
    methods: Sequence[str] = ("gradcam", "gradcampp", "smoothgradcampp", "eigencam"),
    *,
    out: str | Path = "report",
    boxes: str | Path | None = None,
    target: str = "top1",
    say: Callable[[str], None] = print,
    **options: Any,
) -> CamComparison:
    """Rank maps on your own network and images.

    Parameters
    ----------
    images, network, methods, out, target, say
        As for [`explain_images`][classact.explain.explain_images]; a method may be ``package.module:callable``.
    boxes : path, optional
        Boxes of the objects, for localisation; see [`read_boxes`][classact.data.boxes.read_boxes].
    **options
        More for [`explain_images`][classact.explain.explain_images]: ``layer``, ``steps``, ``batch_size``, ...

    Raises
    ------
    DataError, ValueError
        As there; and if no image has a box.
    """
    given = None if boxes is None else read_boxes(boxes)
    report = explain_images(images, network, methods=methods, target=target, out=out, say=say, **options)
    gains = _gains(report)
    localized = {} if given is None else _localization(report, Path(images), given)
    rows = _rows(gains, localized)
    best = max(CONTROLS, key=lambda kind: float(np.mean([gains[kind][fill].mean() for fill in gains[kind]])))
    found = CamComparison(_compared(rows, gains, best), best, report)
    found.table.to_csv(Path(out) / "cams.csv", index=False)
    write_page(report, Path(out) / "report.html", found.summary, found.rows)
    return found


def _gains(report: ExplainReport) -> dict[str, dict[str, np.ndarray]]:
    """Per method and control, per fill: the mean gain of each image over its explained classes."""
    gains: dict[str, dict[str, list[float]]] = {}
    for item in report.items:
        own: dict[str, dict[str, list[float]]] = {}
        for entry in item["maps"]:
            for fill, value in entry["gain"].items():
                own.setdefault(entry["method"], {}).setdefault(fill, []).append(value)
                for kind, of in entry["controls"].items():
                    own.setdefault(kind, {}).setdefault(fill, []).append(of[fill])
        for name, fills in own.items():
            for fill, values in fills.items():
                gains.setdefault(name, {}).setdefault(fill, []).append(float(np.mean(values)))
    if len(report.items) < 2 or not gains:
        raise DataError("a comparison needs at least two readable images with a class to explain")
    return {name: {fill: np.array(v) for fill, v in fills.items()} for name, fills in gains.items()}


def _rows(
    gains: Mapping[str, Mapping[str, np.ndarray]], localized: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for name, fills in gains.items():
        mean = np.mean(list(fills.values()), axis=0)
        rows.append(
            {"method": name, "control": name in CONTROLS, "gain": t_interval(mean)}
            | {f"gain_{fill}": t_interval(values) for fill, values in fills.items()}
            | dict(localized.get(name, {}))
        )
    return sorted(rows, key=lambda row: -row["gain"].effect)


def _compared(
    rows: list[dict[str, Any]], gains: Mapping[str, Mapping[str, np.ndarray]], control: str
) -> list[dict[str, Any]]:
    """Add the paired differences to the best control and to the best method, and the orders that flip."""
    mean = {name: np.mean(list(fills.values()), axis=0) for name, fills in gains.items()}
    methods = [row for row in rows if not row["control"]]
    best = methods[0]["method"]
    for row in rows:
        row["minus_control"] = None if row["control"] else t_interval(mean[row["method"]] - mean[control])
        away = row["control"] or row["method"] == best
        row["minus_best"] = None if away else t_interval(mean[row["method"]] - mean[best])
        order = {
            other: {np.sign(gains[row["method"]][fill].mean() - of[fill].mean()) for fill in of}
            for other, of in gains.items()
            if other != row["method"]
        }
        row["unstable"] = [other for other, signs in order.items() if len(signs) > 1 and other not in CONTROLS]
    p = holm([region_p_values(row["minus_control"], 0.0, None)[0] for row in methods])
    for row, value in zip(methods, p, strict=True):
        row["p_holm"] = value
    return rows


def _localization(
    report: ExplainReport, images: Path, given: Mapping[str, list[tuple[int, int, int, int]]]
) -> dict[str, dict[str, Any]]:
    """Pointing game, energy and box accuracy of the maps of the first class explained, where boxes are known."""
    root = images if images.is_dir() else images.parent
    maps: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []  # per image (n, H, W)
    for item in report.items:
        known = given.get(Path(item["file"]).stem)
        if not known or not item["maps"]:
            continue
        photo = read_photo(root / item["file"])
        inside = [
            report.transform.geometry(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))[0] >= 0.5
            for mask in box_mask(known, *photo.shape[:2])
        ]
        seen = torch.stack(inside)
        seen = seen[seen.flatten(1).any(1)]
        if not len(seen):
            continue  # cropped away
        c = item["maps"][0]["class"]
        with np.load(report.out / "maps" / f"{flat_name(item['file'])}.npz") as arrays:
            for method in report.options.methods:
                maps.setdefault(method, []).append(torch.from_numpy(arrays[f"{method}/{c}"]))
        x = report.transform.normalize(report.transform.geometry(photo)).unsqueeze(0)
        for kind in CONTROLS:
            maps.setdefault(kind, []).append(control_maps(x, kind, seed=len(masks))[0])
        masks.append(seen)
    if len(masks) < 4:
        raise DataError(
            f"localisation needs at least four images with boxes, found {len(masks)} of {len(report.items)}"
        )
    union = torch.stack([one.any(0) for one in masks])
    return {name: _located(torch.stack(of), union, masks) for name, of in maps.items()}


def _located(maps: Tensor, union: Tensor, masks: list[Tensor]) -> dict[str, Any]:
    overlap = torch.stack([
        torch.stack([
            box_iou(found, torch.stack([boxes_from_map(one[None].float(), 1.0)[0] for one in of])).max()
            for found, of in zip(boxes_from_map(maps, frac, "largest"), masks, strict=True)
        ])
        for frac in THRESHOLDS
    ])  # fmt: skip
    right = (overlap >= 0.5).float()  # (thresholds, images)
    half = torch.arange(len(masks)) % 2
    fitted = [int(right[:, half != part].mean(1).argmax()) for part in (0, 1)]
    accuracy = torch.where(half == 0, right[fitted[0]], right[fitted[1]])
    return {
        "pointing": t_interval(pointing_game(maps, union).numpy()),
        "energy": t_interval(energy_pointing_game(maps, union).numpy()),
        "box_accuracy": t_interval(accuracy.numpy()),
        "threshold": " / ".join(f"{THRESHOLDS[k]:g}" for k in fitted),
    }
