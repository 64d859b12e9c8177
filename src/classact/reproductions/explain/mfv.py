"""Experiments of multifaceted feature visualisation: known facets, colours, regularisers and hidden units.

Data: Fashion-MNIST. Of its classes, eight are merged into four two-faced ones that have little in common (T-shirt or
ankle boot, trouser or bag, pullover or sandal, dress or sneaker); a small network learns the merged labels, and a wider
one, trained on other images, shifted and noisy, with the true labels, judges the pictures.

Settings, chosen in pilots (seeds 0 to 3) and the same for every arm. The schedule from a mean image is cut to its
first octave, and that to 50 steps (30 for colour images, climbed faster): the activation more than doubles. With seed
0, 190 steps left the method at two facets and random starts at one; steps of 5, with strong denoising or none, lost
facets of the method's arms and gained random starts little. Random starts from the mean brightness of the data cover
more facets than the released grey, so they are the baseline, as they are and eight times as noisy; the grey ones are
shown beside them. The released schedules keep their proportions in 70 steps in the experiment on regularisers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.data.images import fashion_mnist
from classact.evidence.experiment import Cells, Experiment, Values
from classact.explain.image_priors import total_variation
from classact.explain.mfv import (
    ActivationMaximizer,
    FacetClusterer,
    Octave,
    center_biased_schedule,
    mean_image_schedule,
    top_images,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MERGED = (0, 9, 1, 8, 2, 5, 3, 7)  # true classes; two in a row share a label
NAMES = ("T-shirt | boot", "trouser | bag", "pullover | sandal", "dress | sneaker")
FACETS = 4
RARE = 0.1
Data = tuple[Tensor, Tensor]


def draw_images(seed: int, classes: Sequence[int], counts: Sequence[int]) -> list[Data]:
    """Disjoint random parts of the training set: images (n, 1, 28, 28) in [0, 1], and places of their class."""
    images, labels = fashion_mnist("train")
    place = np.full(10, -1)
    place[list(classes)] = range(len(classes))
    order = np.random.default_rng(seed).permutation(np.flatnonzero(place[labels] >= 0))
    parts = np.split(order, np.cumsum(counts))[: len(counts)]
    return [(torch.from_numpy(images[p]).float().unsqueeze(1) / 255, torch.from_numpy(place[labels[p]])) for p in parts]


def make_network(channels: int, width: int, hidden: int, classes: int) -> nn.Sequential:
    """Two convolutions of stride 2 and two linear layers; the first seven modules end with the codes."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(98 * width, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip


def train(model: nn.Module, data: Data, epochs: int, seed: int, *, disturbed: bool = False) -> nn.Module:
    """AdamW, learning rate 0.002, batches of 128; `disturbed`: shifted by up to 3 pixels, other brightness, noise."""
    (x, y), generator = data, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, fused=True)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(128):
            images = x[chosen]
            if disturbed:
                shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
                gain, noise = torch.rand((2, len(images), 1, 1, 1), generator=generator)
                images = images.roll(shift, (2, 3)) * (0.5 + gain)
                images = (images + 0.3 * noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(images), y[chosen]).backward()
            optimizer.step()
    return model.eval()


def make_pair(seed: int, scale: str, classes: Sequence[int], merged: int = 1, channels: int = 1) -> tuple[Any, ...]:
    """Images and true labels, a network that learned labels merged by `merged` on them, and a judge from others."""
    smoke = scale == "smoke"
    own, others = draw_images(seed, classes, (1000, 1000) if smoke else (10_000, 10_000))
    torch.manual_seed(seed)
    model = make_network(channels, 16, 128, len(classes) // merged)
    judge = make_network(1, 24, 128, len(classes))
    train(judge, others, 2 if smoke else 4, seed, disturbed=True)
    return own, model, judge


def find_facets(
    model: nn.Module, images: Tensor, seed: int, scale: str, *, linear: bool = False
) -> tuple[FacetClusterer, Tensor]:
    """Cluster the images by the network's codes, after t-SNE unless `linear`; also the mean image of each facet."""
    smoke = scale == "smoke"
    embedding: Literal["tsne", "pca"] = "pca" if linear or smoke else "tsne"
    found = FacetClusterer(FACETS, embedding=embedding, n_nearest=1 if smoke else 15, random_state=seed)
    found.fit(_codes(model, images).numpy(), images=images)
    return found, torch.as_tensor(found.mean_images_)


def _codes(model: nn.Module, images: Tensor, end: int = 7) -> Tensor:
    """Output of the first modules: 6 the hidden units, 7 the codes, 8 the logits."""
    with torch.no_grad():
        return model[:end](images)  # type: ignore[index]


def climb_all(
    model: nn.Module, layer: str | None, starts: dict[str, list[Tensor]], unit: Tensor, steps: int
) -> dict[str, Tensor]:
    """Pictures from the starts of every arm, all with the same climb; also the starts of MFV as they are."""
    octaves = [Octave(steps, step=(1.0, 2.0), tv=(0.4, 0.4))]
    first = {name: torch.cat(parts) for name, parts in starts.items()}
    climb = ActivationMaximizer(model, layer, octaves)
    found = climb(unit.repeat(len(first)), torch.cat(list(first.values()))).images
    return {**dict(zip(first, found.split(len(unit)), strict=True)), "mean_images": first["mfv"]}


def purity(labels: np.ndarray, truth: np.ndarray) -> float:
    """Part of the images whose class is the commonest of their cluster."""
    return float(sum(np.bincount(truth[labels == j]).max() for j in np.unique(labels)) / len(labels))


def noise_images(n: int, level: float, channels: int, generator: torch.Generator, spread: float = 8.0) -> Tensor:
    """Random starts around a level of 0..255; the standard deviation of the released code is 8."""
    return (level + spread * torch.randn((n, channels, 28, 28), generator=generator)) / 255


def center(images: Tensor) -> Tensor:
    """The central 28 x 28 pixels, which the network sees."""
    edge = (images.shape[-1] - 28) // 2
    return images[..., edge : edge + 28, edge : edge + 28]


def judge_facets(judge: nn.Module, pictures: Tensor, unit: Tensor) -> dict[str, float]:
    """Facets that some picture of a unit is taken for (0 to 2, mean over units), and confidence in the likelier one."""
    p = _codes(judge, center(pictures), 8).softmax(1)
    verdict = p.argmax(1)
    found = [len({int(v) for v in verdict[unit == u] if int(v) // 2 == u}) for u in unit.unique().tolist()]
    own = p.unflatten(1, (-1, 2))[torch.arange(len(p)), unit]
    return {"facets": float(np.mean(found)), "confidence": float(own.amax(1).mean())}


def activation_of(model: nn.Module, pictures: Tensor, unit: Tensor) -> float:
    """Mean activation of the units of the output."""
    return float(_codes(model, center(pictures), 8).gather(1, unit.view(-1, 1)).mean())


def run_known_facets(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Visualise four units that each stand for two classes, from every kind of start with the same climb."""
    smoke = scale == "smoke"
    (x, fine), model, judge = make_pair(seed, scale, MERGED, 2)
    train(model, (x, fine // 2), 2 if smoke else 4, seed)
    n = 60 if smoke else 200
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    starts: dict[str, list[Tensor]] = {}
    found: dict[str, list[float]] = {}
    for u in range(4):
        first, second = (torch.nonzero(fine == 2 * u + k).squeeze(1) for k in (0, 1))
        rare = round(RARE * n)
        for suffix, members in (("", (n // 2, n // 2)), ("_rare", (n - rare, rare))):
            chosen = torch.cat([first[: members[0]], second[: members[1]]])
            images, truth = x[chosen], fine[chosen].numpy()
            clusters, means = find_facets(model, images, seed, scale)
            drawn = rng.choice(n, (FACETS, 15), replace=False)
            ways = {"mfv": means, "exemplars": images[drawn[:, 0]]}
            found.setdefault(f"mfv{suffix}", []).append(purity(clusters.labels_, truth))
            if not suffix:
                linear, ways["pca"] = find_facets(model, images, seed, scale, linear=True)
                found.setdefault("pca", []).append(purity(linear.labels_, truth))
                ways["random_means"] = images[drawn].mean(1)
                ways["class_mean"] = images.mean(0) + noise_images(FACETS, 0, 1, generator)
            for name, start in ways.items():
                starts.setdefault(name + suffix, []).append(start)
    level = 255 * float(x.mean())
    for name, (mean, spread) in {"random": (level, 8), "random_wide": (level, 64), "random_grey": (175, 8)}.items():
        starts[name] = [noise_images(4 * FACETS, mean, 1, generator, spread)]
    unit = torch.arange(4).repeat_interleave(FACETS)
    pictures = climb_all(model, None, starts, unit, 2 if smoke else 50)
    values = {
        name: {**judge_facets(judge, shown, unit), "activation": activation_of(model, shown, unit)}
        for name, shown in pictures.items()
    }
    for name, parts in found.items():
        values[name]["purity"] = float(np.mean(parts))
    return values, _shown(pictures)


def _shown(pictures: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: _bytes(pictures[name]) for name in ("mean_images", "mfv", "random")}


def _bytes(images: Tensor) -> np.ndarray:
    return (255 * images).round().to(torch.uint8).numpy()


GARMENTS, TINTS = (0, 9, 1, 8), ((1.0, 0.1, 0.1), (0.1, 0.1, 1.0))


def redness(pictures: Tensor) -> Tensor:
    """Sum of red minus blue over that of its absolute value: 1 and -1 where all is of one colour, 0 where they mix."""
    difference = (pictures[:, 0] - pictures[:, 2]).flatten(1)
    return difference.sum(1) / difference.abs().sum(1)


def judge_colours(judge: nn.Module, pictures: Tensor, unit: Tensor) -> dict[str, float]:
    """Whether a picture has the colour that its garment has for the unit, and how surely it is one of its garments.

    ``colour`` is the redness or blueness that the likelier of the unit's garments should have, weighed by the judge's
    confidence in it: up to 1 for the tinted images themselves, negative for the other colour, 0 for a mixture.
    """
    p = _codes(judge, pictures.amax(1, keepdim=True), 8).softmax(1)
    confidence, kind = p.unflatten(1, (2, 2))[torch.arange(len(p)), unit // 2].max(1)
    wanted = 1 - 2 * ((kind + unit) % 2)
    return {
        "colour": float((confidence * wanted * redness(pictures)).mean()),
        "structure": float(confidence.mean()),
    }


def run_colours(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Visualise four units, each for one garment in red and another in blue; the other way round is another unit."""
    smoke = scale == "smoke"
    (grey, garment), model, judge = make_pair(seed, scale, GARMENTS, channels=3)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    colour = torch.randint(2, (len(grey),), generator=generator)
    x = grey * torch.tensor(TINTS)[colour].view(-1, 3, 1, 1)
    label = garment // 2 * 2 + (garment + colour) % 2
    train(model, (x, label), 2 if smoke else 4, seed)
    n = 60 if smoke else 200
    starts: dict[str, list[Tensor]] = {}
    pure = []
    for u in range(4):
        chosen = torch.nonzero(label == u).squeeze(1)[:n]
        images = x[chosen]
        clusters, means = find_facets(model, images, seed, scale)
        pure.append(purity(clusters.labels_, garment[chosen].numpy()))
        starts.setdefault("mfv", []).append(means)
        starts.setdefault("exemplars", []).append(images[rng.choice(n, FACETS, replace=False)])
        starts.setdefault("class_mean", []).append(images.mean(0) + noise_images(FACETS, 0, 3, generator))
    level = 255 * float(x.mean())
    for name, spread in {"random": 8, "random_wide": 64}.items():
        starts[name] = [noise_images(4 * FACETS, level, 3, generator, spread)]
    unit = torch.arange(4).repeat_interleave(FACETS)
    pictures = climb_all(model, None, starts, unit, 2 if smoke else 30)
    values = {
        name: {**judge_colours(judge, shown, unit), "activation": activation_of(model, shown, unit)}
        for name, shown in pictures.items()
    }
    values["mfv"]["purity"] = float(np.mean(pure))
    return values, _shown(pictures)


def central_energy(pictures: Tensor, background: float) -> float:
    """Part of the squared distance to the background in the central quarter of the area."""
    side = pictures.shape[-1]
    edge = side // 4
    energy = (pictures - background).square()
    inner = energy[..., edge : side - edge, edge : side - edge].flatten(1).sum(1)
    return float((inner / energy.flatten(1).sum(1)).mean())


def run_regularisers(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Climb from noise and from mean images with and without each regulariser, 70 steps each."""
    smoke = scale == "smoke"
    (x, fine), model, judge = make_pair(seed, scale, MERGED, 2)
    train(model, (x, fine // 2), 2 if smoke else 4, seed)
    generator = torch.Generator().manual_seed(seed)
    n = 60 if smoke else 200
    means = torch.cat([find_facets(model, x[fine // 2 == u][:n], seed, scale)[1] for u in range(4)])
    level = 255 * float(x.mean())
    noise = noise_images(4 * FACETS, level, 1, generator)
    unit = torch.arange(4).repeat_interleave(FACETS)
    steps = 2 if smoke else 70
    centered = center_biased_schedule(28, steps / 530)
    ways: dict[tuple[str, ...], Sequence[Octave]] = {
        ("random_plain", "mean_plain"): [Octave(steps, step=(1.0, 2.0))],
        ("random_tv", "mean_tv"): [Octave(steps, step=(1.0, 2.0), tv=(0.4, 0.4))],
        ("mean_schedule",): mean_image_schedule(28, steps / 370),
        ("random_center",): centered,
        ("random_uncentered",): [replace(octave, margin=0, window=1.0) for octave in centered],
    }
    values, arrays = {}, {}
    for arms, octaves in ways.items():
        starts = torch.cat([noise if arm.startswith("random") else means for arm in arms])
        climb = ActivationMaximizer(model, None, octaves, input_shape=(1, 28, 28))
        found = climb(unit.repeat(len(arms)), starts, generator=generator).images
        for arm, pictures in zip(arms, found.split(len(unit)), strict=True):
            values[arm] = {
                **judge_facets(judge, pictures, unit),
                "activation": activation_of(model, pictures, unit),
                "variation": float(total_variation(center(pictures)).mean()),
                "central": central_energy(pictures, level / 255),
            }
            arrays[arm] = _bytes(pictures.unflatten(0, (4, FACETS))[:, :2].flatten(0, 1))
    return values, arrays


UNITS, KINDS_AT_LEAST, HIDDEN = 6, 0.1, "5"  # module 5: the first linear layer, before its ReLU


def run_hidden_units(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Visualise the six hidden units whose strongest images are of the most classes, for a network of ten classes.

    How fully a gallery describes a unit: how well it tells the images, never seen before, that excite the unit among
    the strongest twentieth from the rest, an image counting as much as it resembles the picture it is most like.
    """
    from sklearn.metrics import roc_auc_score

    smoke = scale == "smoke"
    (x, label), model, judge = make_pair(seed, scale, range(10))
    train(model, (x, label), 2 if smoke else 4, seed)
    images, _ = fashion_mnist("test")
    order = np.random.default_rng(seed).permutation(len(images))[: 500 if smoke else 4000]
    held_out = torch.from_numpy(images[order]).float().unsqueeze(1) / 255
    seen = F.normalize(_codes(judge, held_out), dim=1)
    n = 60 if smoke else 200
    response, answer = _codes(model, x, 6), _codes(model, held_out, 6)
    strongest = response.topk(n, 0)
    shares = torch.stack([torch.bincount(label[rows], minlength=10) for rows in strongest.indices.T]) / n
    awake = strongest.values[-1] > 0
    mixed = torch.special.entr(shares).sum(1).where(awake, -1.0).topk(UNITS).indices.tolist()
    generator = torch.Generator().manual_seed(seed)
    starts: dict[str, list[Tensor]] = {"mfv": [], "mean": [], "strongest": []}
    for u in mixed:
        top = x[top_images(model, HIDDEN, u, x, n)]
        starts["mfv"].append(find_facets(model, top, seed, scale)[1])
        starts["mean"].append(top.mean(0) + noise_images(FACETS, 0, 1, generator))
        starts["strongest"].append(top[:FACETS])
    level = 255 * float(x.mean())
    for name, spread in {"random": 8, "random_wide": 64}.items():
        starts[name] = [noise_images(UNITS * FACETS, level, 1, generator, spread)]
    unit = torch.tensor(mixed).repeat_interleave(FACETS)
    pictures = climb_all(model, HIDDEN, starts, unit, 2 if smoke else 50)
    pictures |= {"photos": torch.cat(starts["strongest"]), "one": pictures["random"]}
    values = {}
    for name, shown in pictures.items():
        verdict = _codes(judge, shown, 8).argmax(1)
        activation = _codes(model, shown, 6).gather(1, unit.view(-1, 1))
        covered, auc = [], []
        for number, u in enumerate(mixed):
            own = slice(FACETS * number, FACETS * number + (1 if name == "one" else FACETS))
            kinds = set(torch.nonzero(shares[u] >= KINDS_AT_LEAST).flatten().tolist())
            covered.append(len(kinds & set(verdict[own].tolist())) / len(kinds))
            excited = answer[:, u] >= answer[:, u].quantile(0.95)
            likeness = (seen @ F.normalize(_codes(judge, shown[own]), dim=1).T).amax(1)
            auc.append(roc_auc_score(excited, likeness))
        values[name] = {
            "classes": float(np.mean(covered)),
            "auc": float(np.mean(auc)),
            "activation": float(activation.mean()),
        }
    return values, _shown(pictures)


LABELS = {
    "mean_images": "mean image\nof each facet",
    "mfv": "climbed\nfrom it",
    "random": "climbed\nfrom noise",
    "random_plain": "noise",
    "random_tv": "noise, TV",
    "random_center": "noise, centre\nschedule",
    "random_uncentered": "the same,\nnot centred",
    "mean_plain": "mean",
    "mean_tv": "mean, TV",
    "mean_schedule": "mean, its\nschedule",
}


def _rows(part: Any, arrays: dict[str, np.ndarray], titles: Sequence[str]) -> None:
    """One row of pictures for each arm, in groups under titles."""
    for axes, (name, images) in zip(np.ravel(part.subplots(len(arrays), 1)), arrays.items(), strict=True):
        side, each = images.shape[-1], len(images) // len(titles)
        canvas = np.full((side, len(images) * side + (len(titles) - 1) * side // 2, 3), 255, np.uint8)
        for i, image in enumerate(images):
            left = i * side + i // each * (side // 2)
            canvas[:, left : left + side] = image.transpose(1, 2, 0)
        axes.imshow(canvas)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(LABELS[name], fontsize=7, rotation=0, ha="right", va="center")
        if axes.get_subplotspec().is_first_row():
            middle = [((each + 0.5) * i + each / 2) * side for i in range(len(titles))]
            axes.set_xticks(middle, titles, fontsize=7)
            axes.xaxis.tick_top()
            axes.tick_params(length=0)


def _strips(part: Any, cells: Cells, labels: dict[str, str]) -> None:
    """For each metric one point per seed, mean and 95 % interval of each arm."""
    from classact.evidence.statistics import t_interval

    for axes, (metric, label) in zip(part.subplots(1, len(labels), sharey=True), labels.items(), strict=True):
        for index, arm in enumerate(cells.arms):
            found = cells.metric(arm, metric)
            interval = t_interval(found)
            axes.scatter(found, np.full(len(found), index), s=8, alpha=0.5, linewidth=0)
            error = [[interval.effect - interval.low], [interval.high - interval.effect]]
            axes.errorbar(interval.effect, index, xerr=error, color="black", marker="o", markersize=3, capsize=3)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(cells.arms)), [arm.replace("_", " ") for arm in cells.arms])
    axes.invert_yaxis()


def _draw(cells: Cells, titles: Sequence[str], labels: dict[str, str], height: float = 4.8) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure((7.5, height), layout="constrained")
    shown = next(iter(cells.arrays.values()))
    parts: Any = figure.subfigures(2, 1, height_ratios=(len(shown) + 2, 6))
    _rows(parts[0], shown, titles)
    _strips(parts[1], cells, labels)
    return figure


def draw_known_facets(cells: Cells) -> "Figure":
    """Mean images and pictures of the first seed; facets covered and confidence of every seed."""
    return _draw(cells, NAMES, {"facets": "facets shown, of 2", "activation": "activation"})


def draw_colours(cells: Cells) -> "Figure":
    """Mean images and pictures of the first seed; rightness of the colours and structure of every seed."""
    titles = ("red T-shirt | blue boot", "blue T-shirt | red boot", "red trouser | blue bag", "blue trouser | red bag")
    return _draw(cells, titles, {"colour": "rightness of the colour", "structure": "confidence of the judge"})


def draw_regularisers(cells: Cells) -> "Figure":
    """Pictures of the first seed and what the judge says of every seed."""
    labels = {"confidence": "confidence", "variation": "total variation", "central": "energy in the centre"}
    return _draw(cells, [name.replace(" | ", "\n") for name in NAMES], labels, 6.5)


def draw_hidden_units(cells: Cells) -> "Figure":
    """Mean images and pictures of the first seed; classes shown and description of every seed."""
    titles = [f"unit {i + 1}" for i in range(UNITS)]
    return _draw(cells, titles, {"classes": "classes shown", "auc": "AUC of telling what excites the unit"})


SEEDS = {"smoke": range(2), "cpu": range(100, 110)}
EXPERIMENTS = {
    "known-facets": Experiment(run_known_facets, SEEDS, draw_known_facets),
    "colours": Experiment(run_colours, SEEDS, draw_colours),
    "regularisers": Experiment(run_regularisers, SEEDS, draw_regularisers),
    "hidden-units": Experiment(run_hidden_units, SEEDS, draw_hidden_units),
}
