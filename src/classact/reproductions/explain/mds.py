"""Experiments of most discriminative stimuli: a synthetic retina, the number of types, and units of trained networks.

Settings chosen after pilots (seeds 0 to 5): the temperature 3.2 for the retina and the networks (of 0.8, 1.6, 3.2, 5
and 8; the authors' example has 1.6), the smoothness 1 of stimuli for the networks (of 0, 1 and 3), and the readout of
the natural images, a nearest centroid of responses that are standardised within each neuron (of that, raw responses
and their square root). The check that counts against k-means on natural images gives it as many clusters as the
method ended with; k-means that is told the true number is shown beside it.
"""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.data.images import fashion_mnist
from classact.data.retina import RETINA_TYPES, LNPopulation, natural_like_images
from classact.evidence.experiment import Cells, Experiment, Values
from classact.explain.image_priors import NormClip
from classact.explain.mds import MDSClustering, ResponseNormalizer, mds_objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHAPE, NORM, TEMPERATURE = (1, 16, 16), 5.0, 3.2
START, CLASS_START, BUDGET = 10, 15, 10
TRIALS, DRAWS = 10, 5
SURROUND, ISOLATED = 1, (2, 3, 4)
NETWORKS, HELD_OUT, TRAINING = 5, 2, 4000
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def _ari(types: Any, labels: Any) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(types, labels))


def _kmeans(features: Any, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=10, random_state=seed).fit_predict(np.asarray(features))


def _majority(types: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Most frequent type of each cluster."""
    return np.array([np.bincount(types[labels == c]).argmax() for c in range(labels.max() + 1)])


def _clustering(seed: int, scale: str, norm: ResponseNormalizer, **options: Any) -> MDSClustering:
    small = {"n_init": 2, "steps": 10, "n_rounds": 3} if scale == "smoke" else {}
    settings = {"temperature": TEMPERATURE, "lr": 1.0, "constraint": NormClip(NORM), "response_norm": norm}
    return MDSClustering(**{**settings, "random_state": seed, **options, **small})


def run_retina(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Recover the types of 175 neurons, then type 300 new ones from one noisy trial of each stimulus."""
    from sklearn.mixture import GaussianMixture

    retina, new = LNPopulation(seed=seed), LNPopulation((50,) * 6, seed=seed + 10_000)
    types, n_types = retina.types.numpy(), len(RETINA_TYPES)
    images = natural_like_images(300 if scale == "smoke" else 2000, norm=NORM, seed=seed + 20_000)
    norm = ResponseNormalizer.from_responses(retina(images))
    seen = norm(retina(images)).T.numpy()
    mds = _clustering(seed, scale, norm, n_clusters=START).fit(retina, SHAPE)
    exciting = _clustering(seed, scale, norm, n_clusters=START, contrast=False).fit(retina, SHAPE)
    k = len(mds.stimuli_)

    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(retina(images[:BUDGET]), generator=generator)
    mixture = GaussianMixture(n_types, covariance_type="diag", n_init=5, random_state=seed, reg_covar=1e-3)
    values: Values = {
        "mds": {"ari": _ari(types, mds.labels_), "clusters": k, "objective": float(mds.objective_.mean())},
        "exciting": {
            "ari": _ari(types, exciting.labels_),
            "clusters": len(exciting.stimuli_),
            "objective": float(exciting.objective_.mean()),
        },
        "natural": {"ari": _ari(types, _kmeans(seen[:, :BUDGET], k, seed))},  # as many clusters as MDS found
        "natural_told": {"ari": _ari(types, _kmeans(seen[:, :BUDGET], n_types, seed))},
        "natural_mixture_told": {"ari": _ari(types, mixture.fit_predict(seen[:, :BUDGET]))},
        "natural_trial_told": {"ari": _ari(types, _kmeans(norm(counts).T, n_types, seed))},
        "natural_2000_told": {"ari": _ari(types, _kmeans(seen, n_types, seed))},
        "fields_told": {"ari": _ari(types, _kmeans(retina.filters.flatten(1), n_types, seed))},
    }

    def trials(model: nn.Module, x: Tensor) -> np.ndarray:
        return torch.poisson(model(x).expand(TRIALS, -1, -1), generator=generator).numpy()

    truth = new.types.numpy()
    for name, found in (("mds", mds), ("exciting", exciting)):
        kinds = _majority(types, found.labels_)
        answers = [kinds[found.assign(one)] for one in trials(new, found.stimuli_)]
        values[name]["accuracy"] = float(np.mean(np.array(answers) == truth))
    chosen = torch.stack([mds_objective(torch.from_numpy(seen.T), torch.from_numpy(mds.labels_), c) for c in range(k)])
    selected = images[chosen.argmax(1)]
    answers = [_majority(types, mds.labels_)[mds.assign(one)] for one in trials(new, selected)]
    values["selected"] = {"accuracy": float(np.mean(np.array(answers) == truth))}
    draws = [images[i * k : (i + 1) * k] for i in range(DRAWS)]
    for name, sets in (("mds_centroid", [mds.stimuli_]), ("natural", draws)):
        rates = [_centroid_accuracy(retina, x, trials(new, x), types, truth) for x in sets]
        values.setdefault(name, {})["accuracy"] = float(np.mean(rates))
    rates = [_trained_accuracy(trials(retina, x), trials(new, x), types, truth) for x in draws]
    values["natural_trained"] = {"accuracy": float(np.mean(rates))}

    values["mds"] |= _likeness(mds, retina)
    values["exciting"] |= _likeness(exciting, retina)
    order = np.argsort(_majority(types, mds.labels_), kind="stable")
    arrays = {
        "stimuli": mds.stimuli_[order, 0].numpy().astype(np.float32),
        "kinds": _majority(types, mds.labels_)[order],
        "sizes": np.bincount(mds.labels_)[order],
        "matrix": mds.response_matrix()[np.ix_(order, order)].astype(np.float32),
        "restart_ari": np.array([_ari(types, run.labels) for run in mds.restarts_]),
        "restart_objective": np.array([float(run.objective.mean()) for run in mds.restarts_]),
    }
    return values, arrays


def _standardized(responses: np.ndarray) -> np.ndarray:
    """Responses (K, n) relative to those of the same neuron; the 0.5 keeps silent neurons at zero."""
    return (responses - responses.mean(0)) / (responses.std(0) + 0.5)


def _centroid_accuracy(retina: nn.Module, x: Tensor, counts: np.ndarray, types: np.ndarray, truth: np.ndarray) -> float:
    reference = _standardized(retina(x).numpy())
    centroids = np.stack([reference[:, types == t].mean(1) for t in range(len(RETINA_TYPES))], axis=1)
    distances = [((_standardized(one)[:, :, None] - centroids[:, None]) ** 2).sum(0) for one in counts]
    return float(np.mean([d.argmin(1) == truth for d in distances]))


def _trained_accuracy(train: np.ndarray, test: np.ndarray, types: np.ndarray, truth: np.ndarray) -> float:
    """Logistic regression on single trials of the neurons whose types are known: a reader that learns the noise."""
    from sklearn.linear_model import LogisticRegression

    features = np.sqrt(np.concatenate(list(train), axis=1).T)
    reader = LogisticRegression(class_weight="balanced", max_iter=300).fit(features, np.tile(types, len(train)))
    return float(np.mean([reader.predict(np.sqrt(one.T)) == truth for one in test]))


def _likeness(found: MDSClustering, retina: LNPopulation) -> dict[str, float]:
    """Correlation of stimuli with the receptive field of their type and with the next best, and the surround ring.

    Of several clusters with the same majority, the largest speaks for the type. The ring is the mean of the stimulus 3
    to 6 pixels from the middle relative to that of the central 2, of the type with a surround; 0 if no cluster is its.
    """
    types = retina.types.numpy()
    kinds, sizes = _majority(types, found.labels_), np.bincount(found.labels_)
    fields = torch.stack([retina.filters[retina.types == t].mean(0) for t in range(len(RETINA_TYPES))])
    similarity = np.corrcoef(found.stimuli_.flatten(1), fields.flatten(1))[: len(kinds), len(kinds) :]
    largest = {t: max(np.flatnonzero(kinds == t), key=lambda c: sizes[c]) for t in np.unique(kinds)}
    own = {t: similarity[c, t] for t, c in largest.items()}
    others = {t: np.delete(similarity[c], t).max() for t, c in largest.items()}
    side = retina.filters.shape[-1]
    at = torch.arange(side) - (side - 1) / 2
    radius = (at[:, None] ** 2 + at**2).sqrt()
    ring = 0.0
    if SURROUND in largest:
        x = found.stimuli_[largest[SURROUND], 0]
        ring = float(x[(radius > 3) & (radius < 6)].mean() / x[radius < 2].mean())
    return {
        "likeness_isolated": float(np.mean([own[t] for t in ISOLATED if t in own])),
        "likeness": float(np.mean(list(own.values()))),
        "margin": float(np.mean([own[t] - others[t] for t in own])),
        "ring": ring,
        "types_found": float(len(largest)),
    }


def run_number(seed: int, scale: str) -> Values:
    """Start from too few and too many clusters: 6 types of the retina, and the 2 types of the authors' example."""
    retina = LNPopulation((6,) * 6, seed=seed) if scale == "smoke" else LNPopulation(seed=seed)
    images = natural_like_images(300 if scale == "smoke" else 2000, norm=NORM, seed=seed + 20_000)
    norm = ResponseNormalizer.from_responses(retina(images))
    values = {}
    starts = {"from_2": (2, False), "from_2_split": (2, True), "from_10": (START, False), "from_20": (20, False)}
    for name, (k, split) in starts.items():
        found = _clustering(seed, scale, norm, n_clusters=k, split=split, n_init=3).fit(retina, SHAPE)
        values[name] = {"clusters": len(found.stimuli_), "ari": _ari(retina.types, found.labels_)}
    on_off = torch.tensor([1.0, -1.0]).repeat(21)
    found = MDSClustering(5, constraint=None, normalize_grad=False, lr=100.0, steps=50, n_rounds=10, random_state=seed)
    found.fit(lambda x: x.mean((1, 2, 3)).unsqueeze(1) * on_off, (1, 18, 18))
    values["on_off"] = {"clusters": len(found.stimuli_), "ari": _ari(on_off, found.labels_)}
    return values


def _pictures(part: Literal["train", "test"], chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST at half its resolution, (n, 1, 14, 14) in [0, 1]."""
    images, labels = fashion_mnist(part)
    x = torch.from_numpy(images[chosen]).float().unsqueeze(1) / 255
    return F.avg_pool2d(x, 2), torch.from_numpy(labels[chosen].astype(np.int64))


def _network(seed: int, images: Tensor, labels: Tensor, epochs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64 * 9, 10)),
    )
    optimizer, batches = torch.optim.Adam(network.parameters()), len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: batches * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(requires_grad=False)


def run_networks(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Units of networks trained on Fashion-MNIST: class units of several networks, then 64 channels of one.

    Class units have a known type, their class, which five networks learned each for itself; those of two more networks
    are typed by their responses to the stimuli. Types of channels are not known: good clusters are those whose members
    respond alike to test images, in the middle of the map and before the rectifier.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(60_000)
    images, labels = _pictures("train", order[: 640 if scale == "smoke" else TRAINING])
    reference, _ = _pictures("train", order[TRAINING : TRAINING + 2000])
    test, _ = _pictures("test", np.arange(2000))
    n = 2 if scale == "smoke" else NETWORKS
    networks = [_network(1000 * seed + i, images, labels, 3) for i in range(n + HELD_OUT)]

    def units(x: Tensor) -> Tensor:
        return torch.cat([network(x) for network in networks[:n]], dim=1)

    def held_out(x: Tensor) -> Tensor:
        return torch.cat([network(x) for network in networks[n:]], dim=1)

    def channels(x: Tensor) -> Tensor:
        return networks[0][:3](x)[:, :, 3, 3]

    types, truth = np.tile(np.arange(10), n), np.tile(np.arange(10), HELD_OUT)
    norm = ResponseNormalizer.from_responses(units(reference))
    options: dict[str, Any] = {"constraint": NormClip(6.0, 0.0, 1.0), "smoothness": 1.0}
    mds = _clustering(seed, scale, norm, n_clusters=CLASS_START, **options).fit(units, (1, 14, 14))
    kinds, k = _majority(types, mds.labels_), len(mds.stimuli_)
    seen = norm(units(reference)).T.numpy()
    values = {
        "mds": {
            "ari": _ari(types, mds.labels_),
            "clusters": float(k),
            "accuracy": float((kinds[mds.assign(held_out(mds.stimuli_))] == truth).mean()),
        },
        "natural": {"ari": _ari(types, _kmeans(seen[:, :CLASS_START], k, seed))},
        "natural_told": {"ari": _ari(types, _kmeans(seen[:, :CLASS_START], 10, seed))},
    }

    norm = ResponseNormalizer.from_responses(channels(reference))
    found = _clustering(seed, scale, norm, n_clusters=START, **options).fit(channels, (1, 14, 14))
    likeness = np.nan_to_num(np.corrcoef(channels(test).T.numpy()))
    seen = norm(channels(reference)).T.numpy()
    shuffled = [_coherence(likeness, rng.permutation(found.labels_)) for _ in range(20)]
    by_images = _kmeans(seen[:, :START], len(found.stimuli_), seed)
    values["mds"]["coherence"] = _coherence(likeness, found.labels_)
    values["natural"]["coherence"] = _coherence(likeness, by_images)
    values["shuffled"] = {"coherence": float(np.mean(shuffled))}
    ranks = np.argsort(kinds, kind="stable")
    arrays = {
        "stimuli": mds.stimuli_[ranks, 0].numpy(),
        "kinds": kinds[ranks],
        "sizes": np.bincount(mds.labels_)[ranks],
        "matrix": mds.response_matrix()[np.ix_(ranks, ranks)].astype(np.float32),
        "channel_stimuli": found.stimuli_[:, 0].numpy(),
        "channel_sizes": np.bincount(found.labels_),
    }
    return values, arrays


def _coherence(likeness: np.ndarray, labels: np.ndarray) -> float:
    """Mean correlation of units of the same cluster less that of units of different clusters."""
    same = labels[:, None] == labels
    pairs = np.triu(np.ones_like(same), 1)
    return float(likeness[same & pairs].mean() - likeness[~same & pairs].mean())


def _gallery(grid: Any, stimuli: np.ndarray, titles: list[str]) -> None:
    """Stimuli in a row, the range of grey the same for all: white for light, black for darkness."""
    limit = np.abs(stimuli).max()
    low = -limit if stimuli.min() < 0 else 0
    for axes, x, title in zip(grid, stimuli, titles, strict=False):
        axes.imshow(x, cmap="gray", vmin=low, vmax=limit)
        axes.set_title(title, fontsize=7)
    for axes in grid:
        axes.axis("off")


def _matrix(axes: "Axes", matrix: np.ndarray, names: list[str]) -> None:
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("units of cluster", fontsize=8)
    axes.set_ylabel("stimulus", fontsize=8)
    axes.set_title("response / own stimulus", fontsize=8)


def _strips(axes: "Axes", values: dict[str, np.ndarray], label: str) -> None:
    for row, found in enumerate(values.values()):
        axes.scatter(found, np.full(len(found), row), s=12, alpha=0.6, linewidth=0, color=f"C{row % 10}")
        axes.plot([found.mean()] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.2)
    axes.set_yticks(range(len(values)), [name.replace("_", " ") for name in values], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _with(cells: Cells, metric: str) -> dict[str, np.ndarray]:
    arms = next(iter(cells.values.values()))
    return {arm: cells.metric(arm, metric) for arm in arms if metric in arms[arm]}


def _layout(height: float, galleries: int, columns: int, widths: tuple[float, ...]) -> "tuple[Figure, Any, Any]":
    """Rows of stimuli above a row of charts."""
    from matplotlib.figure import Figure

    figure = Figure((13, height), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[galleries, 2.4])
    above = parts[0].subplots(galleries, columns, squeeze=False)
    return figure, above, parts[1].subplots(1, len(widths), width_ratios=widths)


def draw_retina(cells: Cells) -> "Figure":
    """Stimuli and response matrix of the first seed; ARI against objective of every start; ARI and accuracy."""
    first = next(iter(cells.arrays.values()))
    names = [RETINA_TYPES[kind] for kind in first["kinds"]]
    figure, gallery, charts = _layout(5, 1, START, (1.1, 1, 1.1, 1.1))
    _gallery(gallery[0], first["stimuli"], [f"{n}\n{size}" for n, size in zip(names, first["sizes"], strict=True)])
    matrix, starts, ari, accuracy = charts
    _matrix(matrix, first["matrix"], names)
    for found in cells.arrays.values():
        best = found["restart_objective"].argmax()
        (points,) = starts.plot(found["restart_objective"], found["restart_ari"], "o", markersize=3, alpha=0.5)
        starts.plot(
            found["restart_objective"][best], found["restart_ari"][best], "o", color=points.get_color(), markersize=7
        )
    starts.set_xlabel("mean objective J of a start (large: kept)", fontsize=8)
    starts.set_ylabel("ARI with the types", fontsize=8)
    starts.tick_params(labelsize=7)
    starts.spines[["top", "right"]].set_visible(False)
    _strips(ari, _with(cells, "ari"), "ARI with the types")
    _strips(accuracy, _with(cells, "accuracy"), "accuracy on new neurons, one trial")
    return figure


def draw_number(cells: Cells) -> "Figure":
    """Clusters found from different starts."""
    from matplotlib.figure import Figure

    figure = Figure((8, 2.6), layout="constrained")
    count, ari = figure.subplots(1, 2)
    _strips(count, _with(cells, "clusters"), "clusters found (dashed: types)")
    rows = len(cells.arms)
    count.set_xscale("log")
    ticks = [2, 6, 10, 20, 40]
    count.set_xticks(ticks, [str(tick) for tick in ticks])
    count.minorticks_off()
    count.plot([6, 6], [-0.4, rows - 1.6], "k--", linewidth=0.8)
    count.plot([2, 2], [rows - 1.4, rows - 0.6], "k--", linewidth=0.8)
    _strips(ari, _with(cells, "ari"), "ARI with the types")
    return figure


def draw_networks(cells: Cells) -> "Figure":
    """Stimuli of class units and of channels of the first seed, the response matrix, and how good clusters are."""
    first = next(iter(cells.arrays.values()))
    names = [CLASSES[kind] for kind in first["kinds"]]
    figure, gallery, charts = _layout(6, 2, CLASS_START, (1.1, 1, 1))
    _gallery(gallery[0], first["stimuli"], [f"{n}\n{size}" for n, size in zip(names, first["sizes"], strict=True)])
    _gallery(gallery[1], first["channel_stimuli"], [f"{size} channels" for size in first["channel_sizes"]])
    matrix, ari, coherence = charts
    _matrix(matrix, first["matrix"], names)
    _strips(ari, _with(cells, "ari"), "class units: ARI with the classes")
    _strips(coherence, _with(cells, "coherence"), "channels: correlation within less between clusters")
    return figure


EXPERIMENTS = {
    "synthetic-retina": Experiment(run_retina, {"smoke": range(2), "cpu": range(100, 110)}, draw_retina),
    "number-of-types": Experiment(run_number, {"smoke": range(2), "cpu": range(100, 110)}, draw_number),
    "trained-networks": Experiment(run_networks, {"smoke": range(2), "cpu": range(100, 110)}, draw_networks),
}
