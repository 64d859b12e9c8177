"""Evolution of layers: a tournament over a population, mutation, rejection, and scores on several anchor networks.

Liu et al., https://arxiv.org/abs/2004.02967. A layer's scores are its accuracies on the anchors. Per generation a
random part of the population competes; the parent is the best of it by average, or a random one of those that no other
of it beats on all anchors; its mutant, or with some probability a random layer, is tested, scored and added; only the
youngest compete.

Every candidate draws from a random stream of its own number, so that the list of candidates is the whole state of a
search: it is written to a file as it grows, and a search that was killed goes on to the result of an undisturbed one.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from classact.nn.evonorm.graph import LayerGraph
from classact.nn.evonorm.rejection import (
    Anchor,
    SearchData,
    quality_test,
    stability_test,
    static_test,
    train_anchor,
)


@dataclass(frozen=True)
class Candidate:
    """One layer that was tried.

    Attributes
    ----------
    graph : str
        As read by [`LayerGraph.from_string`][classact.nn.LayerGraph].
    origin : {"random", "mutation"}
    parent : int or None
        Number of the candidate that it is a mutant of.
    outcome : str
        "kept", or the reason of rejection.
    value : float or None
        What the last test measured, None if not finite.
    scores : list of float or None
        Accuracies on the anchors, if kept.
    known : bool
        An equal graph was tried before, and its outcome taken.
    """

    graph: str
    origin: str
    parent: int | None
    outcome: str
    value: float | None
    scores: list[float] | None
    known: bool


@dataclass(frozen=True)
class SearchResult:
    """All candidates of a search, in order, and the names of the anchors."""

    candidates: list[Candidate]
    anchors: list[str]

    def kept(self) -> list[Candidate]:
        """Distinct layers that passed the tests, best average score first."""
        found = [c for c in self.candidates if c.scores is not None and not c.known]
        return sorted(found, key=lambda c: -float(np.mean(c.scores or [])))

    def front(self) -> list[Candidate]:
        """Those of `kept` that no other beats: none is as good on every anchor and better on one."""
        kept = self.kept()
        return [kept[k] for k in pareto_front([c.scores or [] for c in kept])]

    @property
    def best(self) -> LayerGraph:
        """The layer with the best average score."""
        return LayerGraph.from_string(self.kept()[0].graph).prune()

    def outcomes(self) -> dict[str, int]:
        """Count the distinct layers by outcome."""
        return dict(Counter(c.outcome for c in self.candidates if not c.known))

    def table(self) -> Any:
        """All candidates as a DataFrame, with one column of scores per anchor."""
        import pandas as pd

        rows = []
        for candidate in self.candidates:
            row = asdict(candidate)
            scores = row.pop("scores") or [math.nan] * len(self.anchors)
            formula = LayerGraph.from_string(candidate.graph).formula()
            rows.append({**row, "formula": formula, **dict(zip(self.anchors, scores, strict=True))})
        return pd.DataFrame(rows)


def pareto_front(scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions of the scores that no other dominates: as good on every anchor and better on one."""
    table = np.asarray(scores, float).reshape(len(scores), -1)
    return [k for k, row in enumerate(table) if not ((table >= row).all(1) & (table > row).any(1)).any()]


def evolve_layers(
    anchors: Mapping[str, Anchor],
    data: SearchData,
    *,
    generations: int,
    population: int,
    tournament_frac: float = 0.05,
    winner: Literal["pareto", "average"] = "pareto",
    max_age: int = 2500,
    p_random: float = 0.5,
    seed: int = 0,
    allow_batch: bool = True,
    n_nodes: int = 10,
    groups: int = 32,
    steps: int = 2000,
    rate: float = 0.1,
    batch: int = 128,
    quality_steps: int = 100,
    quality_threshold: float = 0.2,
    stability_steps: int = 100,
    stability_bound: float = 1e8,
    max_candidates: int = 1_000_000,
    checkpoint: str | Path | None = None,
    cache: dict[str, tuple[str, float | None, list[float] | None]] | None = None,
) -> SearchResult:
    """Search for a layer that works in every anchor network.

    The tests train on the first anchor only. Equal layers, up to unused nodes and the order of summands, factors and
    maxima, are trained once; later copies join the population with the same scores, and cost nothing.

    Parameters
    ----------
    anchors : dict
        Name -> ``anchor(layer)``, which builds a network, ``layer(channels)`` making one layer of the candidate.
    data : SearchData
        Or a tuple of its four tensors: training images and classes, validation images and classes.
    generations : int
        Number of distinct layers to score after the initial population.
    population : int
        Number of distinct random layers to score at first.
    tournament_frac : float
        Part of the population that competes, at least two layers.
    winner : {"pareto", "average"}
        How the parent is chosen, see above.
    max_age : int
        Number of the youngest kept layers that compete.
    p_random : float
        Probability of a random layer in place of a mutant; 1 is random search with the same number of scored layers.
    seed : int
        Of everything; a layer's scores depend on the seed and the layer alone.
    allow_batch : bool
        False searches without batch statistics (S series).
    n_nodes, groups
        Size of the graphs, and groups of the group aggregates.
    steps, rate, batch
        Of the training that scores a layer, see [`train_anchor`][classact.nn.evonorm.rejection.train_anchor].
    quality_steps, quality_threshold, stability_steps, stability_bound
        Of the tests; 0 steps leave a test out.
    max_candidates : int
        Stop after this many in any case.
    checkpoint : path, optional
        JSON file with all candidates so far; an existing one of the same search is continued.
    cache : dict, optional
        Outcomes of layers by `LayerGraph.key`, filled on the way. Searches share one if they differ only in how
        candidates are chosen.

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError
        For settings out of range, or a checkpoint of another search.
    """
    if not anchors:
        raise ValueError("anchors: expected at least one network")
    for name, value, least in (("generations", generations, 0), ("population", population, 2), ("max_age", max_age, 2)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    for name, part in (("tournament_frac", tournament_frac), ("p_random", p_random)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {part}")
    if winner not in ("pareto", "average"):
        raise ValueError(f"winner: expected 'pareto' or 'average', got {winner!r}")
    settings: dict[str, Any] = {
        "anchors": list(anchors),
        "data": _fingerprint(data),
        "population": population,
        "tournament_frac": tournament_frac,
        "winner": winner,
        "max_age": max_age,
        "p_random": p_random,
        "seed": seed,
        "allow_batch": allow_batch,
        "n_nodes": n_nodes,
        "groups": groups,
        "steps": steps,
        "rate": rate,
        "batch": batch,
        "quality_steps": quality_steps,
        "quality_threshold": quality_threshold,
        "stability_steps": stability_steps,
        "stability_bound": stability_bound,
    }
    training: dict[str, Any] = {"groups": groups, "batch": batch, "seed": seed}
    first = next(iter(anchors.values()))
    path = Path(checkpoint) if checkpoint is not None else None
    candidates = _read(path, settings)
    tried = {} if cache is None else cache
    seen: set[str] = set()

    def judge(graph: LayerGraph) -> tuple[str, float | None, list[float] | None]:
        verdict = static_test(graph, seed=seed)
        if verdict.passed and quality_steps:
            verdict = quality_test(graph, first, data, quality_steps, quality_threshold, rate=rate, **training)
        if verdict.passed and stability_steps:
            verdict = stability_test(graph, first, data, stability_steps, stability_bound, **training)
        if not verdict.passed:
            return verdict.reason, _finite(verdict.value), None
        scores = [train_anchor(graph, anchor, data, steps, rate=rate, **training) for anchor in anchors.values()]
        if not np.isfinite(scores).all():
            return "not finite", None, None
        return "kept", _finite(verdict.value), scores

    for candidate in candidates:
        key = LayerGraph.from_string(candidate.graph).key
        seen.add(key)
        tried.setdefault(key, (candidate.outcome, candidate.value, candidate.scores))
    scored = sum(c.scores is not None and not c.known for c in candidates)
    alive = [number for number, c in enumerate(candidates) if c.scores is not None]
    while scored < population + generations and len(candidates) < max_candidates:
        rng = np.random.default_rng([seed, len(candidates)])
        parent = None
        if scored >= population and rng.random() >= p_random:
            parent = _tournament(candidates, alive[-max_age:], tournament_frac, winner, rng)
            graph = LayerGraph.from_string(candidates[parent].graph).mutate(rng, allow_batch)
        else:
            graph = LayerGraph.random(rng, n_nodes, allow_batch)
        key = graph.key
        if key not in tried:
            tried[key] = judge(graph)
        known = key in seen
        seen.add(key)
        origin = "random" if parent is None else "mutation"
        candidates.append(Candidate(graph.to_string(), origin, parent, *tried[key], known))
        if candidates[-1].scores is not None:
            alive.append(len(candidates) - 1)
            scored += not known
        if path is not None and candidates[-1].outcome != "no dependence on x":  # those are quickly found again
            _write(path, settings, candidates)
    return SearchResult(candidates, list(anchors))


def _tournament(
    candidates: list[Candidate], alive: list[int], part: float, winner: str, rng: np.random.Generator
) -> int:
    size = min(len(alive), max(2, math.ceil(part * len(alive))))
    chosen = [int(k) for k in rng.choice(alive, size, replace=False)]
    scores = [candidates[k].scores or [] for k in chosen]
    if winner == "average":
        return chosen[int(np.argmax(np.mean(scores, axis=1)))]
    return chosen[int(rng.choice(pareto_front(scores)))]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fingerprint(data: SearchData) -> str:
    digest = hashlib.sha256()
    for tensor in data:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path | None, settings: dict[str, Any]) -> list[Candidate]:
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != settings:
        differ = [key for key in settings if content["settings"].get(key) != settings[key]]
        raise ValueError(f"checkpoint: {path} holds a search with another {', '.join(differ) or 'set of settings'}")
    return [Candidate(**candidate) for candidate in content["candidates"]]


def _write(path: Path, settings: dict[str, Any], candidates: list[Candidate]) -> None:
    """Write beside the file, then rename, so that a kill leaves the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump({"settings": settings, "candidates": [asdict(c) for c in candidates]}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
