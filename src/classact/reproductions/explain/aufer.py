"""Experiments of the alignment with action units: drawn faces, the weight of the loss, a transformer, a shortcut.

Settings fixed before the evidence. 896 faces of 48 x 48 pixels for training and 560 for the test; 8 epochs (24 for the
transformer) of batches of 32, AdamW with one cycle, last weights; every arm starts from the same weights and sees the
faces in the same order. lambda is 4, the best of the paper's ablation on RAF-DB, and was not tuned here.

Chosen after seeing pilots (seeds 0 to 2, 840 or 980 faces, both arms; rates are the same for all arms). The rate of
the CNN, 0.03, had the best mean accuracy of the plain classifier, 0.679 against 0.667 with 0.01 (0.003, tried on one
seed, was worse); alignment gained with both. The rate and the epochs of the transformer suit the aligned one: plain it
is as good with 0.003, but aligned it then lost 0.03 to 0.09 of its accuracy with 12 to 24 epochs, while with 0.01 it
gained 0.03 to 0.05. Inputs are masked face by face, since with whole masked batches that control stayed at chance.

Heatmaps are the corrected ones: their units include all that the drawn expressions move. Controls: heatmaps moved
elsewhere, each by its own random shift (the same area and shape); one map for all classes, the mean of the heatmaps;
and half of the inputs of each step multiplied by their heatmap, in place of a loss.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.data.faces import AFFECTNET_CODES, EXPRESSIONS, RAFDB_CODES, FaceAugmentation, FaceFolder, SyntheticFaces
from classact.data.registry import data_folder
from classact.evidence.experiment import Cells, Experiment, Values
from classact.explain.aufer.evaluate import ClassMap, class_activation_map, evaluate_alignment, features_and_gradient
from classact.explain.aufer.heatmap import AUHeatmap
from classact.explain.aufer.loss import SpatialAlignmentLoss, attention_map, logits_and_features

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, CLASSES = 48, len(EXPRESSIONS)
TRAIN, TEST, EPOCHS, BATCH = 896, 560, 8, 32
LAMBDA, LAMBDAS = 4.0, (0.0, 0.1, 1.0, 4.0, 9.0, 20.0)
CUE = 0.95
SHOWN = ("fear", "happiness", "sadness", "surprise")
WORKERS = 8  # that read images at paper scale


class FaceCNN(nn.Module):
    """Four convolutions, the mean over positions, a linear layer; the last map has 12 x 12 positions."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, after, stride in ((3, 16, 2), (16, 24, 1), (24, 48, 1), (48, 48, 1)):
            parts += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if after == 24:
                parts.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x).mean((2, 3)))


class FaceViT(nn.Module):
    """A convolutional stem, 6 x 6 tokens, two blocks, the mean of the tokens, a linear layer."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            nn.Conv2d(32, dim, 2, 2),
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 36, dim))
        block = partial(nn.TransformerEncoderLayer, dim, 3, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(block(), block())
        self.classifier = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.blocks(tokens).mean(1))


class Kind(NamedTuple):
    """A network, the layer that is aligned, and its learning rate."""

    make: Callable[[], nn.Module]
    layer: str
    lr: float


CNN, VIT = Kind(FaceCNN, "features.12", 3e-2), Kind(FaceViT, "blocks", 1e-2)


def gradcampp_map(features: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++ of Chattopadhay et al. 2018, for the exponential of the score."""
    square, cube = gradient.square(), gradient.pow(3)
    below = 2 * square + cube * features.sum((2, 3), keepdim=True)
    alpha = torch.where(below == 0, 0, square / torch.where(below == 0, 1, below))
    weight = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
    return (weight * features).sum(1).relu()


def layercam_map(features: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM of Jiang et al. 2021: positive gradients times features, position by position."""
    return (gradient.relu() * features).sum(1).relu()


CLASS_MAPS: dict[str, ClassMap] = {"cam": class_activation_map, "gradcampp": gradcampp_map, "layercam": layercam_map}


class Faces(NamedTuple):
    """Images (n, 3, 48, 48), labels (n,) and heatmaps (n, 1, 48, 48)."""

    x: Tensor
    y: Tensor
    prior: Tensor

    def batches(self) -> list[tuple[Tensor, ...]]:
        """For evaluation."""
        return list(zip(*(part.split(280) for part in self), strict=True))


def make_faces(n: int, seed: int, cue: float = 0.0) -> Faces:
    """Draw faces and their heatmaps."""
    faces = SyntheticFaces(n, SIZE, seed, cue)
    labels = torch.from_numpy(faces.labels)
    maps, _ = AUHeatmap(SIZE, "corrected")(torch.from_numpy(faces.landmarks), labels)
    images = (torch.from_numpy(faces.images) - 0.5).contiguous(memory_format=torch.channels_last)  # a quarter less time
    return Faces(images, labels, maps)


def moved_elsewhere(prior: Tensor, seed: int) -> Tensor:
    """Every heatmap shifted around the edges by its own random distance."""
    shifts = np.random.default_rng(seed).integers(0, SIZE, (len(prior), 2))
    return torch.stack([one.roll(tuple(map(int, by)), (1, 2)) for one, by in zip(prior, shifts, strict=True)])


def same_for_all(prior: Tensor) -> Tensor:
    """The mean of the heatmaps, for every face that has one."""
    valid = torch.isfinite(prior).flatten(1).all(1)
    return torch.where(valid[:, None, None, None], prior[valid].mean(0, keepdim=True), prior)


def train(kind: Kind, faces: Faces, lam: float, seed: int, epochs: int, mask_inputs: bool = False) -> nn.Module:
    """Train one classifier; the seed decides its first weights and the order of the faces."""
    torch.manual_seed(seed)
    model, align = kind.make().to(memory_format=torch.channels_last), SpatialAlignmentLoss()
    optimizer = torch.optim.AdamW(model.parameters(), kind.lr, weight_decay=1e-2, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.lr, epochs * (len(faces.x) // BATCH))
    generator = torch.Generator().manual_seed(seed)
    masks = torch.where(torch.isfinite(faces.prior), faces.prior, 1)
    for _ in range(epochs):
        order = torch.randperm(len(faces.x), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            x, y = faces.x[chosen], faces.y[chosen]
            if mask_inputs:
                masked = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
                x = torch.where(masked, x * masks[chosen], x)
            if lam:
                logits, features = logits_and_features(model, x, [kind.layer])
                loss = F.cross_entropy(logits, y) + lam * align(features, faces.prior[chosen])
            else:
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return model.eval()


def measure(model: nn.Module, layer: str, batches: Iterable[Any], class_maps: Sequence[str]) -> dict[str, float]:
    """Accuracy, and the cosines of attention, class maps and a uniform map with the heatmaps."""
    found: dict[str, float] = {}
    for name in class_maps:
        mean = evaluate_alignment(model, batches, layer, class_map=CLASS_MAPS[name]).mean
        found = {**mean, **found, f"{name}_cos": mean["cam_cos"]}
    return found


def make_split(seed: int, scale: str, cue: float = 0.0) -> tuple[Faces, Faces, int]:
    """Faces for training (some with the cue) and for the test (none), and the number of epochs."""
    n, tested, epochs = (98, 56, 2) if scale == "smoke" else (TRAIN, TEST, EPOCHS)
    return make_faces(n, seed, cue), make_faces(tested, seed + 100_000), epochs


def train_arms(kind: Kind, faces: Faces, seed: int, epochs: int, arms: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Train the plain and the aligned classifier, and the controls that are named."""
    fit = partial(train, kind, seed=seed, epochs=epochs)
    controls = {
        "random_region": lambda: fit(faces._replace(prior=moved_elsewhere(faces.prior, seed)), LAMBDA),
        "one_for_all": lambda: fit(faces._replace(prior=same_for_all(faces.prior)), LAMBDA),
        "masked_input": lambda: fit(faces, 0.0, mask_inputs=True),
    }
    models = {"plain": fit(faces, 0.0), "aligned": fit(faces, LAMBDA)}
    return models | {name: controls[name]() for name in arms}


def run_faces(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Align a CNN with heatmaps of action units, and train it in four other ways."""
    train_faces, test_faces, epochs = make_split(seed, scale)
    models = train_arms(CNN, train_faces, seed, epochs, ("random_region", "one_for_all", "masked_input"))
    values = {name: measure(model, CNN.layer, test_faces.batches(), list(CLASS_MAPS)) for name, model in models.items()}
    return values, _shown(models, test_faces)


def _shown(models: dict[str, nn.Module], faces: Faces) -> dict[str, np.ndarray]:
    """A test face of some expressions, with its maps before and after, as bytes."""
    chosen = torch.tensor([int(torch.nonzero(faces.y == EXPRESSIONS.index(name))[0]) for name in SHOWN])
    x, y, prior = (part[chosen] for part in faces)
    arrays = {"image": _bytes(x.mean(1)), "heatmap": _bytes(prior.squeeze(1))}
    for name in ("plain", "aligned"):
        features, gradient, _ = features_and_gradient(models[name], x, y, CNN.layer)
        arrays[f"attention_{name}"] = _bytes(attention_map(features))
        arrays[f"cam_{name}"] = _bytes(class_activation_map(features, gradient))
    return arrays


def _bytes(maps: Tensor) -> np.ndarray:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-9) * 255).round().to(torch.uint8).numpy()


def run_lambda(seed: int, scale: str) -> Values:
    """Align the CNN with every weight of the paper's ablation."""
    train_faces, test_faces, epochs = make_split(seed, scale)
    models = {f"lambda_{lam:g}".replace(".", "_"): train(CNN, train_faces, lam, seed, epochs) for lam in LAMBDAS}
    return {name: measure(model, CNN.layer, test_faces.batches(), ["cam"]) for name, model in models.items()}


def run_vit(seed: int, scale: str) -> Values:
    """Align the tokens of a small vision transformer."""
    train_faces, test_faces, epochs = make_split(seed, scale)
    models = train_arms(VIT, train_faces, seed, 3 * epochs)
    return {name: measure(model, VIT.layer, test_faces.batches(), ["cam"]) for name, model in models.items()}


def run_cue(seed: int, scale: str) -> Values:
    """Train where the background tells the class of nearly all images, and test where it does not."""
    train_faces, test_faces, epochs = make_split(seed, scale, CUE)
    models = train_arms(CNN, train_faces, seed, epochs, ("random_region", "one_for_all", "masked_input"))
    return {name: measure(model, CNN.layer, test_faces.batches(), ["cam"]) for name, model in models.items()}


class FaceImages(torch.utils.data.Dataset[tuple[Tensor, int, Tensor]]):
    """Faces of a folder as the networks of the paper take them, with their heatmaps."""

    def __init__(self, faces: FaceFolder, augment: bool) -> None:
        self.faces, self.augment = faces, FaceAugmentation(224) if augment else None

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        face = self.faces[index]
        image = torch.from_numpy(face.image.copy()).permute(2, 0, 1) / 255
        size = 256 if self.augment else 224
        draw = _drawer(face.image.shape[0], face.image.shape[1], size)
        heatmap = draw(torch.from_numpy(face.landmarks)[None], torch.tensor([face.label])).maps[0]
        image = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
        if self.augment is not None:
            image, heatmap = self.augment(image, heatmap)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (image - mean[:, None, None]) / std[:, None, None], face.label, heatmap


@lru_cache(maxsize=64)
def _drawer(height: int, width: int, size: int) -> AUHeatmap:
    return AUHeatmap((height, width), "official", size)


def make_resnet50() -> nn.Module:
    """ResNet-50, pretrained on ImageNet, that keeps maps of 28 x 28 by strides of 1 in its last two stages."""
    from torchvision.models import resnet50

    model = resnet50(weights="IMAGENET1K_V1")
    for stage in (model.layer3, model.layer4):
        stage[0].conv2.stride = stage[0].downsample[0].stride = (1, 1)
    model.fc = nn.Linear(model.fc.in_features, CLASSES)
    return model


def run_paper(name: str, codes: dict[str, str], lam: float, seed: int, scale: str) -> Values:  # noqa: ARG001
    """The paper's protocol, except that the epoch is chosen on validation faces and not, as for RAF-DB, on the test's.

    ``$CLASSACT_DATA/<name>/train.csv``, ``validation.csv`` and ``test.csv`` list images, labels and landmarks.
    """
    from torch.utils.data import DataLoader

    from classact.explain.aufer.lit import AlignedClassifier
    from classact.training import fit

    folder = data_folder() / name
    parts = {part: FaceFolder(folder / f"{part}.csv", codes=codes) for part in ("train", "validation", "test")}
    loaders = {
        part: DataLoader(FaceImages(faces, part == "train"), 224, shuffle=part == "train", num_workers=WORKERS)
        for part, faces in parts.items()
    }
    values = {}
    for arm, weight in (("plain", 0.0), ("aligned", lam)):
        torch.manual_seed(seed)
        module = AlignedClassifier(make_resnet50(), ["layer4"], weight)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        fit(module, loaders["train"], loaders["validation"], epochs=20, seed=seed, device=device, monitor="val_error")
        values[arm] = measure(module.model, "layer4", loaders["test"], list(CLASS_MAPS))
    return values


def _points(axes: "Axes", cells: Cells, metric: str, label: str, names: bool) -> None:
    """A row per arm: a point per seed, and their mean with its 95 % interval; dotted, what a uniform map has."""
    from classact.evidence.statistics import t_interval

    for row, arm in enumerate(cells.arms):
        values = cells.metric(arm, metric)
        axes.scatter(values, np.full(len(values), row), s=10, color="C0", alpha=0.5, linewidth=0)
        interval = t_interval(values)
        error = [[interval.effect - interval.low], [interval.high - interval.effect]]
        axes.errorbar(interval.effect, row, xerr=error, color="black", marker="o", markersize=4, capsize=4)
    if metric.endswith("cos"):
        uniform = cells.metric(cells.arms[0], "uniform_cos").mean()
        axes.axvline(uniform, color="0.4", linestyle=":", linewidth=1)
        axes.text(uniform, -0.4, " uniform map", fontsize=7, color="0.3", va="bottom")
    axes.set_yticks(range(len(cells.arms)), [arm.replace("_", " ") if names else "" for arm in cells.arms])
    axes.set_xlabel(label)
    axes.set_ylim(len(cells.arms) - 0.6, -0.9)
    axes.spines[["top", "right"]].set_visible(False)


LABELS = {"accuracy": "accuracy", "att_cos": "cosine of attention and AUs", "cam_cos": "cosine of CAM and AUs"}


def draw_arms(cells: Cells) -> "Figure":
    """Accuracy and both cosines of every arm."""
    from matplotlib.figure import Figure

    figure = Figure((3 * len(LABELS), 0.8 + 0.3 * len(cells.arms)), layout="constrained")
    for column, (axes, (metric, label)) in enumerate(zip(figure.subplots(1, len(LABELS)), LABELS.items(), strict=True)):
        _points(axes, cells, metric, label, names=column == 0)
    return figure


def draw_faces(cells: Cells) -> "Figure":
    """Maps of four faces before and after the alignment, and the measures of every arm."""
    from matplotlib.figure import Figure

    figure = Figure((12, 4.2), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1))
    left, right = halves
    arrays = next(iter(cells.arrays.values()))
    shown = {
        "image": "face",
        "heatmap": "action units",
        "attention_plain": "attention,\nplain",
        "attention_aligned": "attention,\naligned",
        "cam_plain": "CAM,\nplain",
        "cam_aligned": "CAM,\naligned",
    }
    grid = left.subplots(len(SHOWN), len(shown))
    for column, (name, title) in enumerate(shown.items()):
        for row, expression in enumerate(SHOWN):
            axes = grid[row, column]
            axes.imshow(arrays[name][row], cmap="gray" if name == "image" else "magma", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(expression, fontsize=8)
        grid[0, column].set_title(title, fontsize=9)
    panels = right.subplots(2, 2)
    measures = {**LABELS, "layercam_cos": "cosine of LayerCAM and AUs"}
    for number, (axes, (metric, label)) in enumerate(zip(panels.flat, measures.items(), strict=True)):
        _points(axes, cells, metric, label, names=number % 2 == 0)
    return figure


def draw_lambda(cells: Cells) -> "Figure":
    """Accuracy and cosines against the weight of the loss."""
    from matplotlib.figure import Figure

    from classact.evidence.statistics import t_interval

    figure = Figure((5, 3.6), layout="constrained")
    axes = figure.subplots()
    for metric, label in {**LABELS, "uniform_cos": "cosine of a uniform map and AUs"}.items():
        found = [t_interval(cells.metric(arm, metric)) for arm in cells.arms]
        mean = np.array([interval.effect for interval in found])
        ends = [mean - [interval.low for interval in found], [interval.high for interval in found] - mean]
        axes.errorbar(np.arange(len(mean)), mean, ends, marker="o", markersize=4, capsize=3, label=label)
    axes.set_xticks(range(len(LAMBDAS)), [f"{lam:g}" for lam in LAMBDAS])
    axes.set_xlabel("λ, weight of the alignment")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


SEEDS = {"smoke": range(2), "cpu": range(100, 110)}
PAPER = {"paper": range(100, 105)}

EXPERIMENTS = {
    "faces": Experiment(run_faces, SEEDS, draw_faces),
    "lambda": Experiment(run_lambda, SEEDS, draw_lambda),
    "transformer": Experiment(run_vit, SEEDS, draw_arms),
    "background-cue": Experiment(run_cue, SEEDS, draw_arms),
    "raf-db": Experiment(partial(run_paper, "raf-db", RAFDB_CODES, 4.0), PAPER, draw_arms),
    "affectnet": Experiment(partial(run_paper, "affectnet", AFFECTNET_CODES, 9.0), PAPER, draw_arms),
}
