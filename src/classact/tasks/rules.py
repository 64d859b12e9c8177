"""The task `rules`: train without a global backward pass, and see what it costs.

To add a rule, write its module and add one line to `RULES`.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from classact.data.labelled import Labelled, load_labelled
from classact.evidence.executors import Job, run_jobs
from classact.evidence.figures import png
from classact.evidence.page import Section, page
from classact.evidence.parts import TUNING_SEED, best_rate, extended, learning_rates
from classact.evidence.rules import RuleComparison, RuleStudy, accuracy_figure, cost_figure, costs, judge, run_cell
from classact.evidence.store import Store, StudyError, write_atomically
from classact.tasks.parts import split_items

CONTROL, REFERENCE = "readout", "backprop"
EXTENSIONS = 2  # of the grid of learning rates, where the best lies at the edge
WIDTHS, CHANNELS = (256, 256, 256), (32, 64, 128)
BLOCK = 128  # units of a block of NoProp
SIZES = {
    "mlp": f"mlp: hidden layers of {', '.join(map(str, WIDTHS))} units; NoProp: ten blocks of {BLOCK} units",
    "cnn": f"cnn: convolutions of {', '.join(map(str, CHANNELS))} channels; NoProp: ten blocks of as many",
}
DEFAULT = ("fa", "dfa", "dtp", "ccl", "noprop-dt")

Network = Literal["mlp", "cnn"]


@dataclass(frozen=True)
class Rule:
    """A way to train, with the networks it trains.

    Attributes
    ----------
    build : callable
        ``build(shape, classes, seed, network)`` makes an untrained network for items of a shape; `network` is "mlp" or
        "cnn".
    fit : callable
        ``fit(model, x, y, *, epochs, lr, batch_size, seed, device)`` trains it and returns it.
    predict : callable
        ``predict(model, x)`` returns probabilities (n, C).
    lr : float
        Middle of the grid of learning rates.
    twin : str
        The rule that is back-propagation through the same network.
    """

    build: Callable[[tuple[int, ...], int, int, Network], Any]
    fit: Callable[..., Any]
    predict: Callable[[Any, Tensor], Tensor]
    lr: float
    twin: str = REFERENCE


def split_x(x: Tensor, network: Network) -> Tensor:
    """Items as a network takes them: rows of pixels for an MLP."""
    return x.flatten(1) if network == "mlp" else x


def _predict(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model.predict_proba(x)
    return found


def _layered(name: str, fit: str, lr: float) -> Rule:
    """A rule for the network of linear layers or convolutions that all of them share."""
    from classact import rules

    def build(shape: tuple[int, ...], classes: int, seed: int, network: Network) -> Any:
        hidden = WIDTHS if network == "mlp" else CHANNELS
        return getattr(rules, name).for_data(shape, classes, hidden=hidden, kind=network, seed=seed)

    return Rule(build, getattr(rules, fit), _predict, lr)


def _noprop(name: str, **settings: Any) -> Rule:
    """NoProp, whose blocks each see the input."""
    from classact import rules

    def build(shape: tuple[int, ...], classes: int, seed: int, network: Network) -> Any:  # noqa: ARG001
        sizes: dict[str, Any] = {"channels": CHANNELS if network == "cnn" else (BLOCK,), "hidden": BLOCK}
        model = getattr(rules, name.removesuffix("-twin")).for_data(shape, classes, **sizes)
        return rules.EndToEndTwin(model) if name.endswith("-twin") else model

    def predict(model: Any, x: Tensor) -> Tensor:
        found: Tensor = model.predict_proba(x, **settings)
        return found

    return Rule(build, rules.fit_noprop, predict, 1e-3, "backprop-blocks")


RULES: dict[str, Rule] = {
    REFERENCE: _layered("LayeredNetwork", "fit_backprop", 0.1),
    CONTROL: _layered("LayeredNetwork", "fit_readout", 1.0),
    "fa": _layered("FeedbackAlignment", "fit_fa", 0.1),
    "dfa": _layered("DirectFeedbackAlignment", "fit_dfa", 0.1),
    "dtp": _layered("DifferenceTargetPropagation", "fit_dtp", 0.1),
    "ccl": _layered("CCLNetwork", "fit_ccl", 1.0),
    "noprop-dt": _noprop("NoPropDT", deterministic=True),
    "noprop-ct": _noprop("NoPropCT", steps=30, solver="heun"),
    "noprop-fm": _noprop("NoPropFM", steps=30, solver="heun"),
    "backprop-blocks": _noprop("NoPropDT-twin", deterministic=True),
}


def find_rule(name: str) -> Rule:
    """A rule by name; a user's own is ``package.module:factory``.

    The factory is called with the shape of an item, the number of classes and ``seed``; what it returns has
    ``fit(x, y, *, epochs, lr, batch_size, seed, device)``, ``predict_proba(x)`` and ``parameters()``, and may have
    ``default_lr``.

    Raises
    ------
    StudyError
        If there is no such rule or factory.
    """
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, RULES, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise StudyError(f"{name}: no such rule{hint} There are {', '.join(RULES)}, and package.module:factory")
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"{name}: {error}") from error

    def build(shape: tuple[int, ...], classes: int, seed: int, network: Network) -> Any:  # noqa: ARG001
        return factory(shape, classes, seed=seed)

    return Rule(build, _own_fit, _predict, float(getattr(factory, "default_lr", 3e-3)))


def _own_fit(model: Any, x: Tensor, y: Tensor, **options: Any) -> Any:
    model.fit(x, y, **options)
    return model


@dataclass(frozen=True)
class Arms:
    """Build, train and ask the networks of all rules, for the cells of a study."""

    shape: tuple[int, ...]
    classes: int
    network: Network

    def build(self, arm: str, seed: int) -> Any:
        """An untrained network; the same weights for the same seed, whatever else was drawn."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return find_rule(arm).build(self.shape, self.classes, seed, self.network)

    def fit(self, arm: str, model: Any, x: Tensor, y: Tensor, **options: Any) -> Any:
        """Train, and return the network."""
        return find_rule(arm).fit(model, x, y, **options)

    def predict(self, arm: str, model: Any, x: Tensor) -> Tensor:
        """Probabilities (n, C)."""
        return find_rule(arm).predict(model, x)


def compare_rules(
    data: str | Path | Labelled = "digits",
    methods: Sequence[str] | None = None,
    *,
    network: Network = "mlp",
    seeds: int = 5,
    tune: int = 5,
    epochs: int = 20,
    batch_size: int = 128,
    limit: int | None = None,
    label: str | None = None,
    size: int = 32,
    out: str | Path = "report",
    workers: int = 1,
    device: str = "cpu",
    command: str = "",
    quiet: bool = False,
) -> RuleComparison:
    """Compare learning rules with back-propagation: accuracy, time and memory.

    Parameters
    ----------
    data : str, path or Labelled
        As for [`load_labelled`][classact.data.labelled.load_labelled], with `label` and `size`.
    methods : sequence of str
        Names of rules, or ``package.module:factory``. Back-propagation through the same network is always an arm, and
        so is the trained readout of random hidden layers, which a rule that trains hidden layers must beat.
    network : {"mlp", "cnn"}
        What the rules train; items are rows of pixels for an MLP.
    seeds : int
        Trainings of every rule.
    tune : int
        Learning rates in the grid of every rule, over two decades around the one it is known for. Where the best lies
        at the edge, the grid of that rule grows.
    epochs, batch_size
        Of every training.
    limit : int, optional
        Take so many items to train, drawn once.
    out : path
        Folder of the report; a comparison that was stopped goes on there.
    workers : int
        Processes.
    device : str
        "cpu", "cuda".
    command : str
        Shown in the report.
    quiet : bool
        Show no progress.

    Raises
    ------
    StudyError, DataError
        If a name or the data do not fit.
    """
    bounds = {"seeds": (seeds, 2), "tune": (tune, 1), "epochs": (epochs, 1), "batch_size": (batch_size, 2)}
    for name, (value, least) in bounds.items():
        if value < least:
            raise StudyError(f"{name}: expected at least {least}, got {value}")
    if network not in ("mlp", "cnn"):
        raise StudyError(f"network: expected mlp or cnn, got {network!r}")
    items = data if isinstance(data, Labelled) else load_labelled(data, label, size)
    if network == "cnn" and len(items.shape) == 1:
        raise StudyError(f"cnn: needs images, and {items.name} is a table; take --network mlp")
    wanted = list(methods or DEFAULT)
    twins = {name: find_rule(name).twin for name in wanted}
    twins = {REFERENCE: REFERENCE, CONTROL: REFERENCE, **{twin: twin for twin in twins.values()}, **twins}
    train, validation, test = split_items(items, limit)
    train, validation, test = (part._replace(x=split_x(part.x, network)) for part in (train, validation, test))
    shape = tuple(train.x.shape[1:])
    arms = Arms(shape, len(items.classes), network)
    for name in twins:  # every name is tried before anything is trained
        arms.build(name, 0)
    study = RuleStudy(arms.build, arms.fit, arms.predict, train, validation, test, epochs, batch_size, device)
    definition = {
        "task": "rules",
        "data": {"name": items.name, "items": len(items.x), "sum": float(items.x.double().sum()), "limit": limit},
        "network": network,
        "epochs": epochs,
        "batch_size": batch_size,
        "device": device,
    }
    grids = {name: learning_rates(tune, find_rule(name).lr / 10, find_rule(name).lr * 10) for name in twins}
    with Store(Path(out) / "study", definition) as store:

        def run(jobs: list[Job], title: str) -> dict[str, Any]:
            return run_jobs(run_cell, study, jobs, store, workers, title, quiet)

        for _ in range(EXTENSIONS + 1):
            tries = {(name, rate): _job(name, rate, TUNING_SEED, True) for name in twins for rate in grids[name]}
            tried = run(list(tries.values()), "rules: learning rates")
            tuning = {n: {rate: tried[tries[n, rate].key]["accuracy"] for rate in grids[n]} for n in twins}
            wider = {name: extended(grids[name], [best_rate(tuning[name])]) for name in twins}
            if wider == grids:
                break
            grids = wider
        chosen = {name: best_rate(tuning[name]) for name in twins}
        finals = {(name, seed): _job(name, chosen[name], seed, False) for name in twins for seed in range(seeds)}
        values = run(list(finals.values()), "rules")
        cells = {name: {seed: values[finals[name, seed].key] for seed in range(seeds)} for name in twins}
    found = judge(items.name, twins, cells, tuning, costs(study, chosen), CONTROL)
    found.facts = {
        "Data": f"{items.name}: {len(train.x):,} items to train, {len(validation.x):,} to choose the learning rate, "
        f"{len(test.x):,} to test; {len(items.classes)} classes"
        + ("" if items.test_x is not None else "; the test part is a fifth, drawn once"),
        "Network": f"{SIZES[network]}; difference: to back-propagation through the same network, paired by seed",
        "Training": f"{epochs} epochs, batches of {batch_size}; scored once, after the last epoch",
        "Learning rates": f"{tune} for every rule over two decades around its usual one, chosen on the validation part",
        "Intervals": f"95 %, over {seeds} trainings; the test part is one and the same",
        "Cost": "training of one epoch and prediction, ms per 1,000 items, one rule at a time, "
        f"{torch.get_num_threads()} threads, on {device}; peak memory: weights, gradients, optimiser, activations of "
        f"a training, batches of {batch_size}, without the data",
    }
    write_rule_report(found, Path(out), command)
    return found


def _job(name: str, rate: float, seed: int, tuning: bool) -> Job:
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return Job(f"{safe}-{rate:g}-{'tune' if tuning else seed}", (name, rate, seed, tuning))


def write_rule_report(found: RuleComparison, folder: Path, command: str) -> None:
    """Write ``report.html``, ``results.csv``, ``cells.csv``, ``table.txt``, ``table.tex`` and the figures as PNG."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    figures = {"accuracy": png(accuracy_figure(found)), "cost": png(cost_figure(found))}
    for name, content in figures.items():
        write_atomically(folder / f"{name}.png", content)
    cells = pd.DataFrame([{"rule": rule, "seed": seed, **of} for (rule, seed), of in found.cells.items()])
    grid = found.grid()
    write_atomically(folder / "results.csv", found.table.to_csv(index=False).encode())
    write_atomically(folder / "cells.csv", cells.to_csv(index=False).encode())
    write_atomically(folder / "table.txt", (grid.plain() + "\n").encode())
    write_atomically(folder / "table.tex", grid.latex().encode())
    rates = [
        f"{name}: " + ", ".join(f"{r:g} {a:.3f}" for r, a in sorted(of.items())) for name, of in found.tuning.items()
    ]
    sections = [
        Section(
            text="Difference: accuracy minus that of back-propagation through the same network. Train, Predict: ms per "
            "1,000 items. Peak MB: of a training, without the data.",
            grid=grid,
            figures=figures,
        ),
        Section("Learning rates tried, with their validation accuracy", "; ".join(rates)),
    ]
    beside = ("results.csv", "cells.csv", "table.txt", "table.tex", "accuracy.png", "cost.png")
    text = page(
        "Learning without a global backward pass",
        f"rules on {found.data}",
        found.summary,
        sections,
        found.facts,
        command,
        beside,
    )
    write_atomically(folder / "report.html", text.encode())
