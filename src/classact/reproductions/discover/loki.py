"""Experiments of Loki: trees whose truth is known, many labels, photographs, ordered labels, and the locus theory.

Settings fixed before the evidence. ``tree`` is a balanced binary tree of 127 labels whose class means do a Brownian
walk along the edges in 32 dimensions; 16, 32 or 64 labels are observed, with 20 points each, noise of deviation 1, 2 or
4, logistic regression, tests on all labels. ``many-labels`` is the same with 131,071 labels, 1,000 of them observed,
and five nearest neighbours, as in the authors' rebuttal. ``zero-shot`` classifies with an embedding of every label that
is its class mean with noise, and takes distances between these embeddings for the metric; it is judged by the tree.
``photos`` are classified by a network trained on ImageNet, which knows 250, 500 or all of the 1,000 classes; the tree
is a coarse taxonomy of them, and the self-derived metric that between the rows of the network's last layer. Photographs
of a seed are its own; each is shown as five cuts, the middle and four corners of 60 % of its shorter side, so that the
network makes mistakes. Either the leaves of the taxonomy may be predicted, as in the paper, or all its nodes. The
temperature of the arms ``loki_nll`` comes from held-out points, or photographs. In ``diabetes`` labels are 20 quantile
bins of the disease's progression, of which some are observed.

Every experiment has the controls that could explain a gain away: the same rule with a metric whose labels are permuted,
and the answer that is always the centre of the metric. Both are judged by the true metric.

Chosen after pilots (seeds 0 and 1): that nodes of the taxonomy may be predicted, beside the leaves. Everything else is
as it was planned.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax

from classact.data.imagenet_sample import photo_part
from classact.data.lite0 import efficientnet_lite0
from classact.discover.label_metrics import LabelMetric
from classact.discover.loki import (
    FrechetClassifier,
    FrechetHead,
    NextClassSelector,
    fit_temperature,
    locus,
    sample_labels,
)
from classact.evidence.experiment import Cells, Experiment, Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMAS, OBSERVED = (1, 2, 4), (16, 32, 64)
KNOWN, BINS = (250, 500, 1000), (5, 10)
DIAMETERS, WIDTHS, MIDDLE_DIAMETER, MIDDLE_WIDTH = (16, 32, 64, 128, 256), (2, 4, 8, 16), 64, 4
THETAS, PICKS = tuple(np.arange(0, 4.5, 0.5).tolist()), 10
CALIBRATION_PARTS = (10, 11)

# first class, and where it and the following ones are in the taxonomy
TAXONOMY = (
    (0, "animal/fish"), (7, "animal/bird"), (25, "animal/amphibian"), (33, "animal/reptile/turtle"),
    (38, "animal/reptile/lizard"), (49, "animal/reptile/other"), (52, "animal/reptile/snake"),
    (69, "animal/invertebrate/arachnid"), (80, "animal/bird"), (101, "animal/mammal/other"),
    (107, "animal/invertebrate/other"), (118, "animal/invertebrate/crustacean"), (127, "animal/bird"),
    (147, "animal/mammal/marine"), (151, "animal/mammal/carnivore/dog"), (269, "animal/mammal/carnivore/wild dog"),
    (281, "animal/mammal/carnivore/cat"), (294, "animal/mammal/carnivore/bear"),
    (298, "animal/mammal/carnivore/other"), (300, "animal/invertebrate/insect"), (327, "animal/invertebrate/other"),
    (330, "animal/mammal/rodent"), (339, "animal/mammal/ungulate"), (356, "animal/mammal/carnivore/weasel"),
    (363, "animal/mammal/other"), (365, "animal/mammal/primate"), (385, "animal/mammal/ungulate"),
    (387, "animal/mammal/carnivore/bear"), (389, "animal/fish"), (398, "thing/artifact"), (924, "thing/food"),
    (970, "nature/landscape"), (981, "person/person"), (984, "nature/plant"), (999, "thing/artifact"),
)  # fmt: skip


def brownian_tree(depth: int, dim: int, rng: np.random.Generator) -> tuple[LabelMetric, np.ndarray]:
    """A balanced binary tree of ``2^(depth + 1) - 1`` labels, and means (N, dim) with a N(0, 1) step on every edge."""
    parents = (np.arange(2 ** (depth + 1) - 1) - 1) // 2
    means = rng.standard_normal((len(parents), dim))
    for level in range(1, depth + 1):
        nodes = np.arange(2**level - 1, 2 ** (level + 1) - 1)
        means[nodes] += means[parents[nodes]]
    parents[0] = -1
    return LabelMetric.from_tree(parents), means


def measure(metric: LabelMetric, truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean squared distance."""
    return float(metric.squared(predicted, truth).mean())


def run_tree(seed: int, scale: str) -> Values:
    """Logistic regression on some labels of a tree of 127, tested on all of them."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    depth, per_class = (4, 10) if scale == "smoke" else (6, 20)
    metric, means = brownian_tree(depth, 32, rng)
    truth = np.repeat(metric.labels, 10)
    values: Values = {}
    scrambled, center = metric.scrambled(seed), metric.center()
    for sigma in SIGMAS if scale != "smoke" else SIGMAS[:2]:
        for k in OBSERVED if scale != "smoke" else (8, 16):
            observed = rng.choice(metric.labels, k, replace=False)
            y, held_out = np.repeat(observed, per_class), np.repeat(observed, 10)
            x, x_held_out, x_test = (
                means[names] + sigma * rng.standard_normal((len(names), 32)) for names in (y, held_out, truth)
            )
            model = LogisticRegression(max_iter=500).fit(x, y)
            predicted = {"argmax": model.predict(x_test), "center": np.full(len(truth), center)}
            for arm, distances in (("loki", metric), ("scrambled", scrambled)):
                predicted[arm] = _frozen(model, distances).predict(x_test)
            for method in ("nll", "leave_class_out"):
                calibrated = _frozen(model, metric).calibrate(x_held_out, held_out, method)
                predicted[f"loki_{method}"] = calibrated.predict(x_test)
            unseen = ~np.isin(truth, observed)
            for arm, names in predicted.items():
                own = values.setdefault(arm, {})
                own[f"d2_s{sigma}_k{k}"] = measure(metric, truth, names)
                own[f"accuracy_s{sigma}_k{k}"] = float((names == truth).mean())
                own[f"unseen_s{sigma}_k{k}"] = float((names == truth)[unseen].mean())
            # the rule and the judge both have the permuted metric: what it gains by hedging alone
            hedging = [measure(scrambled, truth, predicted[arm]) for arm in ("argmax", "scrambled")]
            values.setdefault("hedging", {})[f"gain_s{sigma}_k{k}"] = 1 - hedging[1] / hedging[0]
    base = {key: value for key, value in values["argmax"].items() if key.startswith("d2")}
    for own in values.values():
        if "gain_s1_k16" not in own and any(key.startswith("d2") for key in own):
            gains = [1 - own[key] / base[key] for key in base]
            own |= {"gain": float(np.mean(gains)), "worst_gain": float(min(gains))}
            own["d2"] = float(np.mean([own[key] for key in base]))
            clear = [
                value for key, value in own.items() if key.startswith("unseen") and not key.startswith("unseen_s4")
            ]
            own["unseen"] = float(np.mean(clear))
    values["hedging"]["gain"] = float(np.mean(list(values["hedging"].values())))
    values["chance"] = {"unseen": 1 / len(metric)}
    return values


def _frozen(model: Any, metric: LabelMetric) -> FrechetClassifier:
    from sklearn.frozen import FrozenEstimator

    # nothing is fitted; fit only wants to see data
    return FrechetClassifier(FrozenEstimator(model), metric).fit(
        np.zeros((1, model.n_features_in_)), model.classes_[:1]
    )


def draw_tree(cells: Cells) -> "Figure":
    """Expected squared distance against the number of observed classes, for every noise."""
    from matplotlib.figure import Figure

    keys = [key.removeprefix("d2_") for key in next(iter(cells.values.values()))["argmax"] if key.startswith("d2_")]
    sigmas, observed = (sorted({int(key.split("_")[i][1:]) for key in keys}) for i in (0, 1))
    figure = Figure((11, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(sigmas), sharey=True))
    arms = [arm for arm in cells.arms if f"d2_{keys[0]}" in next(iter(cells.values.values()))[arm]]
    for axes, sigma in zip(panels, sigmas, strict=True):
        for arm in arms:
            _curve(axes, observed, [cells.metric(arm, f"d2_s{sigma}_k{k}") for k in observed], arm)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(observed, [str(k) for k in observed])
        axes.set_xlabel("observed classes")
        axes.set_title(f"noise {sigma}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=1)
    panels[0].set_ylabel("mean squared distance to the true label")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _curve(axes: Any, x: Sequence[float], samples: Sequence[np.ndarray], label: str) -> None:
    """Means with 95 % intervals."""
    from classact.evidence.statistics import t_interval

    found = [t_interval(sample) for sample in samples]
    mean = np.array([interval.effect for interval in found])
    ends = np.nan_to_num([[i.effect - i.low for i in found], [i.high - i.effect for i in found]], posinf=0)
    axes.errorbar(x, mean, ends, marker="o", markersize=4, capsize=2, label=label)


def run_many(seed: int, scale: str) -> Values:
    """Five nearest neighbours that know 1,000 of 131,071 labels of a tree."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(seed)
    depth, k, tests = (9, 50, 30) if scale == "smoke" else (16, 1000, 300)
    metric, means = brownian_tree(depth, 32, rng)
    observed, truth = rng.choice(metric.labels, k, replace=False), rng.choice(metric.labels, tests)
    y = np.repeat(observed, 10)
    x, x_test = (means[names] + 2 * rng.standard_normal((len(names), 32)) for names in (y, truth))
    model = KNeighborsClassifier(5).fit(x, y)
    predicted = {
        "argmax": model.predict(x_test),
        "loki": _frozen(model, metric).predict(x_test),
        "scrambled": _frozen(model, metric.scrambled(seed)).predict(x_test),
        "center": np.full(tests, metric.center()),
    }
    return {
        arm: {"d2": measure(metric, truth, names), "unseen": float((names == truth)[~np.isin(truth, observed)].mean())}
        for arm, names in predicted.items()
    }


def run_zero_shot(seed: int, scale: str) -> Values:
    """Nearest embeddings of all labels of the tree, with the metric that these embeddings have themselves."""
    rng = np.random.default_rng(seed)
    metric, means = brownian_tree(4 if scale == "smoke" else 6, 32, rng)
    truth = np.repeat(metric.labels, 10)
    values: Values = {}
    for sigma in (2, 4):
        embeddings = means + rng.standard_normal(means.shape)
        x = means[truth] + sigma * rng.standard_normal((len(truth), 32))
        logits = -((x[:, None] - embeddings) ** 2).sum(2) / (2 * (sigma**2 + 1))
        own = LabelMetric.from_embeddings(embeddings, metric.labels)
        rules = {"self": own, "tree": metric, "scrambled": own.scrambled(seed)}
        predicted = {"argmax": logits.argmax(1)} | {
            arm: np.array(FrechetHead(distances, metric.labels, metric.labels).predict(torch.from_numpy(logits)))
            for arm, distances in rules.items()
        }
        predicted["center"] = np.full(len(truth), metric.center())
        for arm, names in predicted.items():
            values.setdefault(arm, {})[f"d2_s{sigma}"] = measure(metric, truth, names)
            values[arm][f"self_d2_s{sigma}"] = measure(own, truth, names)
    for found in values.values():
        found["d2"] = (found["d2_s2"] + found["d2_s4"]) / 2
    return values


def taxonomy(only_leaves: bool = False) -> LabelMetric:
    """The tree whose leaves are the 1,000 ImageNet classes; its labels are all nodes, or only these."""
    parents: dict[Any, Any] = {}
    ends = [start for start, _ in TAXONOMY[1:]] + [1000]
    for (start, path), end in zip(TAXONOMY, ends, strict=True):
        steps = path.split("/")
        groups = ["/".join(steps[: i + 1]) for i in range(len(steps))]
        parents |= dict(zip(groups, ["root", *groups], strict=False))
        parents |= dict.fromkeys(range(start, end), groups[-1])
    return LabelMetric.from_tree(parents, labels=range(1000) if only_leaves else None)


@lru_cache(maxsize=1)
def _network() -> torch.nn.Module:
    return efficientnet_lite0().to(memory_format=torch.channels_last)


@lru_cache(maxsize=16)
def photo_logits(part: int, photos: int | None, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (5 n, 1000) of five cuts of each photograph of a part, and the classes."""
    images, classes = photo_part(part)
    cuts = []
    for image in images[:photos]:
        height, width = image.shape[1:]
        side = round(0.6 * min(height, width))
        corners = [(i * (height - side), j * (width - side)) for i in (0, 1) for j in (0, 1)]
        for top, left in [*corners, ((height - side) // 2, (width - side) // 2)]:
            cut = image[None, :, top : top + side, left : left + side]
            cuts.append(F.interpolate(cut, (canvas, canvas), mode="bilinear", antialias=True, align_corners=False))
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        found = [_network()((part - mean) / std).double() for part in torch.cat(cuts).clamp(0, 1).split(10)]
    return torch.cat(found).numpy(), np.repeat(classes[:photos].numpy(), 5)


def run_photos(seed: int, scale: str) -> Values:
    """A network trained on ImageNet, of whose classes some are known, on photographs of all."""
    photos, canvas = (2, 96) if scale == "smoke" else (None, 224)
    part = seed - 100 if seed >= 100 else CALIBRATION_PARTS[seed % 2]
    logits, truth = photo_logits(part, photos, canvas)
    held_out = [photo_logits(other, photos, canvas) for other in CALIBRATION_PARTS]
    held_logits, held_truth = (np.concatenate(both) for both in zip(*held_out, strict=True))
    rows = _network().get_parameter("classifier.weight").detach().double()
    everything = taxonomy()
    rules = {
        "leaves": taxonomy(only_leaves=True),
        "nodes": everything,
        "self": LabelMetric.from_embeddings(rows, normalize=True),
    }
    uniform = np.full((1, 1000), 1e-3)
    rng = np.random.default_rng(seed)
    values: Values = {}
    for k in KNOWN:
        observed = np.sort(rng.choice(1000, k, replace=False))
        known, held = logits[:, observed], np.isin(held_truth, observed)
        target = np.searchsorted(observed, held_truth[held])
        temperature = fit_temperature(held_logits[held][:, observed], target) if held.any() else 1.0
        plain, tempered = softmax(known, axis=1), softmax(known / temperature, axis=1)
        predicted = {"argmax": observed[known.argmax(1)]}
        for name, metric in rules.items():
            predicted |= {
                f"loki_{name}": metric.frechet_mean(plain, observed),
                f"loki_nll_{name}": metric.frechet_mean(tempered, observed),
                f"scrambled_{name}": metric.scrambled(seed).frechet_mean(plain, observed),
                f"center_{name}": metric.frechet_mean(uniform, range(1000)).repeat(len(truth)),
            }
        for arm, names in predicted.items():
            own = values.setdefault(arm, {})
            own[f"tree_k{k}"] = measure(everything, truth, names)
            own[f"accuracy_k{k}"] = float((names == truth).mean())
            if not arm.endswith("nodes"):
                own[f"self_k{k}"] = measure(rules["self"], truth, names)
        values["argmax"][f"temperature_k{k}"] = temperature
    return values


def draw_photos(cells: Cells) -> "Figure":
    """Squared distances in both metrics, of every arm and number of known classes."""
    from matplotlib.figure import Figure

    figure = Figure((13, 3.8), layout="constrained")
    panels = {
        "leaves": ("tree", "taxonomy, its leaves may be predicted"),
        "nodes": ("tree", "taxonomy, its inner nodes too"),
        "self": ("self", "distances between rows of the last layer"),
    }
    for axes, (rule, (judge, title)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for arm in ("argmax", *(f"{kind}_{rule}" for kind in ("loki", "loki_nll", "scrambled", "center"))):
            samples = [cells.metric(arm, f"{judge}_k{k}") for k in KNOWN]
            _curve(axes, KNOWN, samples, arm.removesuffix(f"_{rule}"))
        axes.set_xscale("log", base=2)
        axes.set_xticks(KNOWN, [str(k) for k in KNOWN])
        axes.set_xlabel("known classes of 1,000")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean squared distance")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def run_sample_size(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """How many samples a logistic regression between the ends of a path needs to be off by one label on average."""
    rng = np.random.default_rng(seed)
    repeats = 1 if scale == "smoke" else 8
    sizes = 2 ** np.arange(5, 16)
    errors: dict[int, np.ndarray] = {}
    for p in WIDTHS:
        found = np.zeros((len(sizes), len(DIAMETERS)))
        for _ in range(repeats):
            beta = _on_sphere(rng, 1, p)[0] * 2 * np.sqrt(p)
            test = _on_sphere(rng, 300, p)
            for row, n in enumerate(sizes.tolist()):
                x = _on_sphere(rng, n, p)
                y = rng.random(n) < 1 / (1 + np.exp(-x @ beta))
                fitted = _logistic(x, y.astype(float))
                true, guess = (1 / (1 + np.exp(-test @ b)) for b in (beta, fitted))
                for column, diameter in enumerate(DIAMETERS):
                    metric = LabelMetric.from_path(diameter + 1)
                    means = [metric.frechet_mean(np.c_[1 - q, q], [0, diameter]) for q in (true, guess)]
                    found[row, column] += abs(means[0] - means[1]).mean() / repeats
        errors[p] = found
    needed = np.array([[_crossing(sizes, errors[p][:, j]) for j in range(len(DIAMETERS))] for p in WIDTHS])
    by_diameter = np.log(needed[WIDTHS.index(MIDDLE_WIDTH)])
    by_width = np.log(needed[:, DIAMETERS.index(MIDDLE_DIAMETER)])
    values = {
        "diameter": {"slope": float(np.polyfit(np.log(DIAMETERS), by_diameter, 1)[0])},
        "dimension": {"slope": float(np.polyfit(np.log(WIDTHS), by_width, 1)[0])},
    }
    return values, {"needed": needed}


def _on_sphere(rng: np.random.Generator, n: int, p: int) -> np.ndarray:
    x = rng.standard_normal((n, p))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coefficients by Newton's method; a penalty of 0.01 keeps those of separable samples finite."""
    beta = np.zeros(x.shape[1])
    for _ in range(25):
        mean = 1 / (1 + np.exp(-x @ beta))
        gradient = x.T @ (y - mean) - 0.01 * beta
        step = np.linalg.solve((x * (mean * (1 - mean))[:, None]).T @ x + 0.01 * np.eye(len(beta)), gradient)
        beta += step
        if abs(step).max() < 1e-6:
            break
    return beta


def _crossing(sizes: np.ndarray, errors: np.ndarray) -> float:
    """The size at which the error is 1, on the line through the logarithms of those from 0.2 to 5."""
    near = (errors > 0.2) & (errors < 5)
    return float(np.exp(np.polyfit(np.log(errors[near]), np.log(sizes[near]), 1)[1]))


def draw_sample_size(cells: Cells) -> "Figure":
    """Samples needed against the diameter and against the dimension, beside lines of slope 2 and 1."""
    from matplotlib.figure import Figure

    needed = np.array([found["needed"] for found in cells.arrays.values()])
    figure = Figure((8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_diameter, by_width = (
        needed[:, WIDTHS.index(MIDDLE_WIDTH)],
        needed[:, :, DIAMETERS.index(MIDDLE_DIAMETER)],
    )
    for axes, x, table, slope, label in (
        (left, DIAMETERS, by_diameter, 2, "diameter of the path"),
        (right, WIDTHS, by_width, 1, "input dimension"),
    ):
        _curve(axes, x, list(table.T), "measured")
        line = table.mean(0)[0] * (np.array(x) / x[0]) ** slope
        axes.plot(x, line, color="0.6", linestyle="--", label=f"slope {slope}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel(label)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("samples for a mean error of one label")
    return figure


def random_tree(n: int, rng: np.random.Generator) -> LabelMetric:
    """A uniformly drawn tree of labels 0 to n - 1."""
    import networkx as nx

    return LabelMetric.from_graph(nx.random_labeled_tree(n, seed=int(rng.integers(2**31))), labels=range(n))


def run_loci(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Next classes on random trees, loci of labels that crowd around a centre, and linear programmes beside theory."""
    import networkx as nx

    rng = np.random.default_rng(seed)
    trees = 2 if scale == "smoke" else 20
    sizes: dict[str, list[list[int]]] = {"active": [], "random": []}
    optimal = []
    for _ in range(trees):
        metric = random_tree(50, rng)
        start = rng.choice(50, 3, replace=False).tolist()
        active, largest = NextClassSelector(metric), NextClassSelector(metric, "largest")
        for arm, paths in sizes.items():
            observed, path = list(start), []
            for _ in range(PICKS):
                inside = locus(metric, observed)
                if not inside.all():
                    best = active.select(observed) if arm == "active" else rng.choice(np.flatnonzero(~inside)).item()
                    if arm == "active":
                        optimum = locus(metric, [*observed, largest.select(observed)]).sum()
                        optimal.append(locus(metric, [*observed, best]).sum() == optimum)
                    observed.append(best)
                path.append(int(locus(metric, observed).sum()))
            paths.append(path)
    values: Values = {arm: {"locus": float(np.mean(found) / 50)} for arm, found in sizes.items()}
    values["active"]["optimal"] = float(np.mean(optimal))

    crowded = np.zeros((len(THETAS), trees))
    for j in range(trees):
        metric = random_tree(100, rng)
        for i, theta in enumerate(THETAS):
            crowded[i, j] = locus(metric, sample_labels(metric, 30, theta, int(rng.integers(2**31)))).mean()
    values["theta"] = {"slope": float(np.polyfit(THETAS, crowded.mean(1), 1)[0])}

    agreed: dict[str, list[float]] = {"trees": [], "grids": [], "complete": []}
    for _ in range(2 if scale == "smoke" else 5):
        metric = random_tree(14, rng)
        general = LabelMetric.from_matrix(metric.distances(metric.labels), metric.labels)
        some = rng.choice(14, 4, replace=False)
        agreed["trees"].append((locus(general, some) == locus(metric, some)).mean())
        height, width = rng.integers(2, 5, 2).tolist()
        grid = LabelMetric.from_graph(nx.grid_2d_graph(height, width))
        agreed["grids"].append(locus(grid, [(0, 0), (height - 1, width - 1)]).mean())
        complete = LabelMetric.discrete(range(8))
        some = rng.choice(8, 5, replace=False)
        agreed["complete"].append((locus(complete, some) == np.isin(complete.labels, some)).mean())
    values["theory"] = {f"agreement_{key}": float(np.mean(found)) for key, found in agreed.items()}
    arrays = {arm: np.mean(found, 0) / 50 for arm, found in sizes.items()} | {"crowded": crowded.mean(1)}
    return values, arrays


def draw_loci(cells: Cells) -> "Figure":
    """Size of the locus as classes are added, and as observed labels crowd around the centre."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    arrays = list(cells.arrays.values())
    for arm in ("active", "random"):
        _curve(left, range(1, PICKS + 1), list(np.array([found[arm] for found in arrays]).T), arm)
    left.set_xlabel("classes added to three")
    left.legend(frameon=False, fontsize=8)
    _curve(right, THETAS, list(np.array([found["crowded"] for found in arrays]).T), "30 of 100 labels")
    right.set_xlabel("concentration θ around the centre")
    for axes in (left, right):
        axes.set_ylabel("locus, share of all labels")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_diabetes(seed: int, scale: str) -> Values:
    """Progression of diabetes in 20 bins, some of which were never seen."""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    features, progression = load_diabetes(return_X_y=True)
    edges = np.quantile(progression, np.linspace(0, 1, 21)[1:-1])
    bins = np.searchsorted(edges, progression)
    train, test = train_test_split(np.arange(len(bins)), test_size=0.5, random_state=seed, stratify=bins)
    x = StandardScaler().fit(features[train]).transform(features)
    metric = LabelMetric.from_path(20)
    scrambled, truth = metric.scrambled(seed), bins[test]
    values: Values = {}
    for k in BINS if scale != "smoke" else BINS[:1]:
        seen = train[np.isin(bins[train], rng.choice(20, k, replace=False))]
        model = LogisticRegression(max_iter=500).fit(x[seen], bins[seen])
        regression = Ridge().fit(x[seen], bins[seen]).predict(x[test])
        predicted = {
            "argmax": model.predict(x[test]),
            "loki": _frozen(model, metric).predict(x[test]),
            "scrambled": _frozen(model, scrambled).predict(x[test]),
            "regression": regression.round().clip(0, 19).astype(int),
            "center": np.full(len(test), metric.center()),
        }
        for arm, names in predicted.items():
            values.setdefault(arm, {})[f"d2_k{k}"] = measure(metric, truth, names)
    for own in values.values():
        own["d2"] = float(np.mean(list(own.values())))
    return values


def draw_distances(cells: Cells) -> "Figure":
    """Mean squared distance of every arm, one point per seed."""
    from matplotlib.figure import Figure

    figure = Figure((6, 3), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(cells.arms):
        found = cells.metric(arm, "d2")
        axes.scatter(found, row + np.linspace(-0.18, 0.18, len(found)), s=14, color=f"C{row}")
        axes.plot([found.mean()] * 2, [row - 0.3, row + 0.3], color="black", lw=1.5)
    axes.set_yticks(range(len(cells.arms)), cells.arms)
    axes.invert_yaxis()
    axes.set_xlabel("mean squared distance to the true label")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


SEEDS: Mapping[str, Sequence[int]] = {"smoke": (0, 1), "cpu": range(100, 110)}
EXPERIMENTS = {
    "tree": Experiment(run_tree, SEEDS, draw_tree),
    "many-labels": Experiment(run_many, SEEDS, draw_distances),
    "zero-shot": Experiment(run_zero_shot, SEEDS, draw_distances),
    "photos": Experiment(run_photos, SEEDS, draw_photos),
    "sample-size": Experiment(run_sample_size, SEEDS, draw_sample_size),
    "loci": Experiment(run_loci, SEEDS, draw_loci),
    # random halves of one data set are not independent
    "diabetes": Experiment(run_diabetes, SEEDS, draw_distances, test_train_ratio=1.0),
}
