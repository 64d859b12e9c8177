"""Experiments of the inductive bias: kernel spaces with known tails, growing dimension, networks and two constructions.

`calibration` and `dimension` use functions with an RBF prior (width 0.5, amplitude 1, jitter 1e-4), whose error has a
known distribution. Inputs are uniform on [-1, 1]^m, 100 for training and 50 for testing; the target is
sin(2 π mean(x)), and in `dimension` also sin(2 π x_1), which does not become smoother with m. In `calibration` target
errors are the exact quantiles of rank 0.2, 1e-2, 5e-4 and 1e-8, and a tail is judged by the error of -ln F relative to
the truth; beside the paper's family stand the gamma and the normal one, and counting 4,000 hypotheses, half a hit
added. In `dimension` the target error is 0.02.

`garments` compares spaces on the same 100 training and 300 test images of Fashion-MNIST, averaged to 7 x 7 pixels: RBF
functions of width and amplitude 1 (the authors'), of median width, and with width and amplitude chosen by the
likelihood of the training targets, the control for what tuning alone does; fully connected networks; convolutional
ones; and these again after one shuffling of the pixels, which means nothing to the former two but takes locality from
the latter.

`templates` is the same for a task whose structure is known: images of 8 x 8 of normal noise of deviation 0.3, on which
one of two patterns of 3 x 3, plus and minus 1, lies at a random place; the class is the pattern. The class does not
depend on the place, which convolutions know and fully connected networks must be told.

Settings chosen after pilots (seeds 0 and 1): the target errors 0.05 of `garments` and 0.12 of `templates`, which few
fully connected networks reach; rates and numbers of steps, such that nearly all networks fit.

`garments` and `templates` have seeds from 110: on seed 104 only 48 of 60 convolutional networks fitted, fewer than the
50 that a tail is fitted to, so 80 are trained; of that first run nothing else was looked at.
"""

from functools import partial
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor

from classact.evidence.experiment import Cells, Experiment, Values
from classact.probe.inductivebias import (
    ErrorSpectrum,
    ErrorTail,
    GPHypotheses,
    NNHypotheses,
    cnn,
    likely_rbf,
    mlp,
    ridge_error,
)
from classact.reproductions.nn.small_images import garments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = {"smoke": (0, 1), "cpu": range(100, 110)}
LATER = {"smoke": (0, 1), "cpu": range(110, 120)}
Arrays = dict[str, np.ndarray]
RANKS = {"common": 0.2, "percent": 1e-2, "rare": 5e-4, "far": 1e-8}
SIZES = (100, 400, 1000, 4000)
DIMENSIONS = (2, 3, 4, 6)
GARMENTS_ERROR, TEMPLATES_ERROR = 0.05, 0.12


def rbf_task(seed: int, m: int, target: str = "mean") -> GPHypotheses:
    """Functions that interpolate 100 points in m dimensions."""
    generator = torch.Generator().manual_seed(1000 * seed + m)
    x = 2 * torch.rand(150, m, generator=generator) - 1
    y = torch.sin(2 * torch.pi * (x.mean(1, keepdim=True) if target == "mean" else x[:, :1]))
    return GPHypotheses(x[:100], y[:100], x[100:], y[100:], sigma=0.5, jitter=1e-4)


def quantile(spectrum: ErrorSpectrum, rank: float) -> float:
    """The error that a share `rank` of the hypotheses does not exceed."""
    low = spectrum.mean
    while spectrum.neg_log_cdf(low) < -log(rank):
        low /= 2
    high = 2 * low if low < spectrum.mean else 4 * low
    return float(
        np.exp(brentq(lambda at: spectrum.neg_log_cdf(np.exp(at)) + log(rank), log(low), log(high), xtol=1e-6))
    )


def run_calibration(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Fitted tails beside exact ones."""
    most = 200 if scale == "smoke" else SIZES[-1]
    values: Values = {}
    arrays: Arrays = {}
    for m in DIMENSIONS:
        space = rbf_task(seed, m)
        spectrum = space.spectrum()
        errors = space.sample(most, torch.Generator().manual_seed(seed)).numpy()
        targets = {name: quantile(spectrum, rank) for name, rank in RANKS.items()}
        tails = {family: ErrorTail(family).fit(errors) for family in ("ncx2", "gamma", "normal")}
        row: dict[str, float] = {}
        for name, eps in targets.items():
            exact = -log(RANKS[name])
            fitted = {family: tail.neg_log_cdf(eps) for family, tail in tails.items()}
            row |= {f"{family}_{name}": abs(value / exact - 1) for family, value in fitted.items()}
            row[f"signed_{name}"] = fitted["ncx2"] / exact - 1
            row[f"counted_{name}"] = abs(-log(((errors <= eps).sum() + 0.5) / (most + 1)) / exact - 1)
        low, high = tails["ncx2"].ci(targets["common"], seed=seed)
        row["covered"] = float(low <= -log(RANKS["common"]) <= high)
        for size in SIZES:
            n = min(size, most)
            parts = errors[: min(most // n, 5) * n].reshape(-1, n)
            fits = [ErrorTail().fit(part).neg_log_cdf(targets["rare"]) for part in parts]
            exact = -log(RANKS["rare"])
            row[f"fitted_{size}"] = float(np.mean(np.abs(np.array(fits) / exact - 1)))
        values[f"m{m}"] = row
        at = np.geomspace(targets["far"], errors.max(), 40)
        curves = [[spectrum.neg_log_cdf(eps) for eps in at]]
        curves += [[tail.neg_log_cdf(eps) for eps in at] for tail in tails.values()]
        counted = np.searchsorted(tails["ncx2"].errors_, at, side="right") / most
        arrays[f"m{m}"] = np.array([at, *curves, counted], np.float32)
    return values, arrays


def draw_calibration(cells: Cells) -> "Figure":
    """The exact tail, the fitted ones and the counted one of the first seed; errors of the tails of all seeds."""
    from matplotlib.figure import Figure

    first = next(iter(cells.arrays.values()))
    figure = Figure((3 * len(first) + 3.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(first) + 1, squeeze=False)[0]
    styles = {"exact": ("black", "-"), "ncx2": ("C0", "-"), "gamma": ("C1", "--"), "normal": ("0.6", "--")}
    for axes, (arm, (at, *curves, counted)) in zip(panels, first.items(), strict=False):
        for (name, (colour, line)), curve in zip(styles.items(), curves, strict=True):
            axes.plot(at, curve, line, color=colour, linewidth=2.2 if name == "exact" else 1.4, label=name)
        seen = counted > 0
        axes.plot(at[seen], -np.log(counted[seen]), ".", color="C3", markersize=4, label="counted")
        axes.set(title=f"{arm[1:]} dimensions", xlabel="target error", xscale="log", ylim=(0, 20))
        axes.minorticks_off()
        axes.set_xticks(
            [at[0], np.sqrt(at[0] * at[-1]), at[-1]], [f"{v:.2g}" for v in (at[0], np.sqrt(at[0] * at[-1]), at[-1])]
        )
    panels[0].set_ylabel("required inductive bias, nats")
    panels[0].legend(frameon=False, fontsize=8)
    last = panels[-1]
    for number, arm in enumerate(cells.arms):
        means = [cells.metric(arm, f"fitted_{s}").mean() for s in SIZES]
        last.plot(SIZES, means, "o-", color=f"C{number}", markersize=4, label=f"{arm[1:]} dimensions")
    last.set(xscale="log", xlabel="sampled hypotheses", ylabel="relative error at rank 0.0005", ylim=0)
    last.set_ylim(0, 1.3 * last.get_ylim()[1])
    last.legend(frameon=False, fontsize=7, ncols=2, loc="upper center")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_dimension(seed: int, scale: str) -> Values:
    """The inductive bias that is required to reach an error of 0.02."""
    values: Values = {}
    for m in DIMENSIONS:
        row: dict[str, float] = {}
        for target in ("mean", "first"):
            space = rbf_task(seed, m, target)
            errors = space.sample(500 if scale == "smoke" else 4000, torch.Generator().manual_seed(seed))
            row[target] = ErrorTail().fit(errors).neg_log_cdf(0.02)
            row[f"{target}_exact"] = space.spectrum().neg_log_cdf(0.02)
            row[f"{target}_error"] = float(errors.mean())
        values[f"m{m}"] = row
    return values


def draw_dimension(cells: Cells) -> "Figure":
    """Inductive bias against dimension, fitted and exact."""
    from matplotlib.figure import Figure

    figure = Figure((8.4, 3.6), layout="constrained")
    dimensions = [int(arm[1:]) for arm in cells.arms]
    names = {"mean": "sin(2π mean(x))", "first": "sin(2π x₁)"}
    for axes, (target, title) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        for kind, colour, label in (("", "C0", "fitted"), ("_exact", "black", "exact")):
            found = np.array([cells.metric(arm, target + kind) for arm in cells.arms])
            axes.plot(dimensions, found, color=colour, linewidth=0.5, alpha=0.35)
            axes.plot(dimensions, found.mean(1), "o-", color=colour, label=label, linewidth=1.6, markersize=4)
        axes.set(title=title, xlabel="dimension", xticks=dimensions)
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("required inductive bias, nats")
    figure.axes[0].legend(frameon=False)
    return figure


def compare(
    seed: int,
    eps: float,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    networks: dict[str, Any],
    kernels: dict[str, Any],
) -> tuple[Values, Arrays]:
    """Inductive bias relative to kernel spaces and to networks; those named "_shuffled" see shuffled pixels."""
    x, y, x_test, y_test = data
    order = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = [part.flatten(1)[:, order].view(part.shape) for part in (x, x_test)]
    sampled: dict[str, np.ndarray] = {}
    values: Values = {}
    for name, options in kernels.items():
        space = GPHypotheses(*data, jitter=1e-4, **options)
        sampled[name] = space.sample(1000, torch.Generator().manual_seed(seed)).numpy()
        values[name] = {"exact": space.spectrum().neg_log_cdf(eps), "fitting": 1.0}
    for name, (number, factory, options) in networks.items():
        inputs = shuffled if name.endswith("_shuffled") else [x, x_test]
        trained = NNHypotheses(factory, inputs[0], y, inputs[1], y_test, **options)
        found = trained.sample(number, torch.Generator().manual_seed(seed)).numpy()
        fit = ~np.isnan(found)
        sampled[name] = found[fit]
        values[name] = {"fitting": float(fit.mean())}
    ridge = ridge_error(*data)
    for name, errors in sampled.items():
        tail = ErrorTail().fit(errors)
        values[name] |= {
            "bias": tail.neg_log_cdf(eps),
            "ridge_bias": tail.neg_log_cdf(ridge),
            "mean_error": tail.mean_,
            "ks": tail.ks_,
        }
    return values, {name: errors[:200].astype(np.float32) for name, errors in sampled.items()}


def run_garments(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Spaces on Fashion-MNIST."""
    smoke = scale == "smoke"
    images = garments(seed, 30 if smoke else 100, 60 if smoke else 300, pool=4)
    y, y_test = (F.one_hot(labels, 10).float() for labels in (images.train_labels, images.test_labels))
    sigma, amplitude = likely_rbf(images.train, y)
    kernels = {
        "rbf_unit": {},
        "rbf_median": {"sigma": "median"},
        "rbf_likely": {"sigma": sigma, "amplitude": amplitude},
    }
    options = {"epochs": 4 if smoke else 150, "lr": 1e-2, "train_tol": 1.0 if smoke else 0.009, "chunk": 50}
    convolutional = 50 if smoke else 80, partial(cnn, 1, 10, 3 if smoke else 8), options
    networks: dict[str, Any] = {
        "mlp": (100 if smoke else 200, partial(mlp, 49, 10, 32, 1), options),
        "cnn": convolutional,
        "cnn_shuffled": convolutional,
    }
    values, arrays = compare(seed, GARMENTS_ERROR, (images.train, y, images.test, y_test), networks, kernels)
    errors = arrays["mlp"]
    known, held = np.array_split(errors, 2)
    values["mlp"]["held_out"] = ErrorTail().fit(known).neg_log_cdf(float(np.quantile(held, 0.1))) / log(10) - 1
    return values, arrays


def templates(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) and targets (n, 2)."""
    patterns = torch.tensor([[[1, 1, -1], [-1, 1, 1], [1, -1, -1]], [[-1, 1, 1], [1, -1, 1], [-1, 1, -1]]]).float()
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    kind = torch.arange(n) % 2
    for image, pattern, (row, column) in zip(
        x[:, 0], patterns[kind], torch.randint(6, (n, 2), generator=generator).tolist(), strict=True
    ):
        image[row : row + 3, column : column + 3] += pattern
    return x, F.one_hot(kind, 2).float()


def run_templates(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Spaces on a task that does not depend on the place."""
    smoke = scale == "smoke"
    generator = torch.Generator().manual_seed(seed)
    data = (*templates(40 if smoke else 100, generator), *templates(60 if smoke else 300, generator))
    options = {"epochs": 4 if smoke else 150, "lr": 1e-2, "train_tol": 2.0 if smoke else 0.025, "chunk": 50}
    convolutional: Any = 50 if smoke else 80, partial(cnn, 1, 2, 3 if smoke else 8), options
    networks: dict[str, Any] = {
        "mlp": (100, partial(mlp, 64, 2, 32, 1), options),
        "cnn": convolutional,
        "cnn_shuffled": convolutional,
    }
    return compare(seed, TEMPLATES_ERROR, data, networks, {})


def _draw_spaces(cells: Cells, eps: float) -> "Figure":
    """Errors of the hypotheses of every space of the first seed, and the inductive bias in all seeds."""
    from matplotlib.figure import Figure

    figure = Figure((9.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = next(iter(cells.arrays.values()))
    for number, arm in enumerate(cells.arms):
        errors = np.sort(first[arm])
        left.plot(errors, (np.arange(len(errors)) + 0.5) / len(errors), color=f"C{number}", label=arm.replace("_", " "))
        bias = cells.metric(arm, "bias")
        spread = np.linspace(-0.15, 0.15, len(bias))
        right.plot(bias, number + spread, ".", color=f"C{number}", markersize=5)
        right.plot([bias.mean()] * 2, [number - 0.3, number + 0.3], color=f"C{number}", linewidth=1.8)
        if "exact" in next(iter(cells.values.values()))[arm]:
            right.plot(cells.metric(arm, "exact"), number + spread, "x", color="black", markersize=4)
    left.axvline(eps, color="0.4", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel=f"test error (dotted: {eps:g})", ylabel="share of hypotheses")
    left.legend(frameon=False, fontsize=8)
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(0)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="required inductive bias, nats (crosses: exact)", ylim=(len(cells.arms) - 0.4, -0.6))
    right.set_yticks(range(len(cells.arms)), [arm.replace("_", " ") for arm in cells.arms])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


EXPERIMENTS = {
    "calibration": Experiment(run_calibration, SEEDS, draw_calibration),
    "dimension": Experiment(run_dimension, SEEDS, draw_dimension),
    "garments": Experiment(run_garments, LATER, partial(_draw_spaces, eps=GARMENTS_ERROR)),
    "templates": Experiment(run_templates, LATER, partial(_draw_spaces, eps=TEMPLATES_ERROR)),
}
