"""Running a paper's experiments and judging its claims; the experiments are in ``reproductions/<family>/<slug>.py``."""

import importlib
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classact.catalogue import PACKAGE, SCALES, Entry, find_entry
from classact.catalogue.codehash import code_hash


@dataclass(frozen=True)
class Reproduction:
    """What a reproduction found: the entry, the content of ``<scale>.json``, and the files written."""

    entry: Entry
    content: dict[str, Any]
    files: list[Path]

    def table(self) -> Any:
        """Claims as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.content["claims"])


def results_folder() -> Path:
    """Where results go by default: the package's own folder in a source checkout, else ``./classact-results``."""
    checkout = PACKAGE.parent.parent / "pyproject.toml"
    return PACKAGE / "results" if checkout.exists() else Path("classact-results")


def reproduce(
    slug: str,
    scale: str = "cpu",
    *,
    workers: int = 1,
    out: str | Path | None = None,
    experiments: list[str] | None = None,
    recheck: bool = False,
    quiet: bool = False,
) -> Reproduction:
    """Run the experiments of a paper and judge its claims.

    Finished cells are kept under ``$CLASSACT_STUDIES`` (else ``~/.cache/classact/studies``) until the code or the
    settings change, so that a killed run goes on where it stopped and an unchanged one only judges again.

    Parameters
    ----------
    slug : str
        The paper.
    scale : {"smoke", "cpu", "gpu", "paper"}
        How large: seconds, minutes on two cores, minutes on a GPU, the paper's own protocol and data.
    workers : int
        Number of worker processes.
    out : path, optional
        Folder in which ``<slug>/<scale>.json`` and figures are written.
    experiments : list of str, optional
        Only these; the others keep the results they have.
    recheck : bool
        Judge the committed cells again without running anything.
    quiet : bool
        Show no progress.

    Raises
    ------
    KeyError
        If there is no such paper.
    StudyError
        If the paper has no experiments yet, a scale is missing, or a cell failed.
    """
    from classact.evidence.claims import evaluate_claims
    from classact.evidence.executors import Job, run_jobs, seconds_of
    from classact.evidence.experiment import Cells, Experiment
    from classact.evidence.store import Store, StudyError, write_atomically

    entry = find_entry(slug)
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    name = f"classact.reproductions.{entry.family}.{slug}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise StudyError(f"{slug}: no experiments yet (status: {entry.status})") from error
    available: dict[str, Experiment] = {
        key: experiment for key, experiment in module.EXPERIMENTS.items() if scale in experiment.seeds
    }
    if unknown := set(experiments or ()) - set(available):
        raise StudyError(
            f"{slug}: no experiment {', '.join(unknown)} at scale {scale}; there are {', '.join(available)}"
        )
    if not available:
        raise StudyError(f"{slug}: no experiment has a {scale} scale")
    folder = Path(out) if out is not None else results_folder()
    folder = folder / slug
    path = folder / f"{scale}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if recheck and before is None:
        raise StudyError(f"{path}: no results to judge again")
    hashed = before["code_hash"] if recheck and before else code_hash(name)

    results: dict[str, dict[int, Any]] = {}
    timing: dict[str, Any] = {}
    files: list[Path] = []
    for key, experiment in available.items():
        if recheck or (experiments and key not in experiments):
            if before is not None and key in before["results"] and before["code_hash"] == hashed:
                results[key] = {int(seed): cell for seed, cell in before["results"][key].items()}
                timing[key] = before["timing"][key]
            continue
        definition = {"slug": slug, "experiment": key, "scale": scale, "code": hashed}
        jobs = [Job(f"{seed}", (key, seed, scale)) for seed in experiment.seeds[scale]]
        with Store(_studies_folder() / slug / scale / key, definition, overwrite=True) as store:
            values = run_jobs(run_cell, name, jobs, store, workers, f"{slug} {key}", quiet)
            results[key] = {int(seed): cell for seed, cell in values.items()}
            timing[key] = {"cell_seconds": round(seconds_of(store, jobs), 1), "cells": len(jobs), "workers": workers}
            if experiment.figure is not None:
                cells = Cells(results[key], {int(job.key): store.arrays(job.key) for job in jobs})
                files.append(folder / f"{scale}-{key}.png")
                _draw(experiment, cells, files[-1])
    ratios = {key: experiment.test_train_ratio for key, experiment in module.EXPERIMENTS.items()}
    content = {
        "slug": slug,
        "scale": scale,
        "code_hash": hashed,
        "command": shlex.join(["classact", "reproduce", slug, "--scale", scale]),
        "claims": evaluate_claims(entry.claims, results, ratios),
        "results": results,
        "timing": timing,
        **({k: before[k] for k in ("versions", "hardware")} if recheck and before else _environment()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1)
    text = re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\n\s*", " ", found[0]), text)  # an arm on one line
    write_atomically(path, (text + "\n").encode())
    return Reproduction(entry, json.loads(path.read_text(encoding="utf-8")), [path, *files])


def run_cell(module: str, key: str, seed: int, scale: str) -> tuple[Any, dict[str, Any]]:
    """Run one seed of one experiment, in whatever process."""
    outcome = importlib.import_module(module).EXPERIMENTS[key].run(seed, scale)
    return outcome if isinstance(outcome, tuple) else (outcome, {})


def _draw(experiment: Any, cells: Any, path: Path) -> None:
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    from classact.evidence.store import write_atomically

    figure = experiment.figure(cells)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    small = io.BytesIO()  # a palette of 128 colours: a third of the bytes, and no difference to see
    palette = Image.open(buffer).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE)
    palette.save(small, format="png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, small.getvalue())


def _studies_folder() -> Path:
    return Path(os.environ.get("CLASSACT_STUDIES") or Path.home() / ".cache" / "classact" / "studies")


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "numpy", "scipy", "scikit-learn", "lightning")
    return {
        "versions": {"classact": version("classact"), "python": sys.version.split()[0]}
        | {package: version(package) for package in packages},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }
