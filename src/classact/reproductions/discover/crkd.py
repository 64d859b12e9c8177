"""Experiments of Cr-KD: whether distillation keeps the class relation, and whether discovery profits.

Super-classes: five, each with two known and two novel classes in 32 dimensions (`classact.data.superclasses`), 60
training samples of every known and 12 of every novel class, and 100 test samples of every class. A network of two
hidden layers of 128 units with batch normalisation, two views with noise of deviation 0.25, two heads with a hidden
layer of 128 units and a projection to 64, 30 supervised and 60 discovery epochs of AdamW in batches of 200, rate 0.003:
in pilots (seeds 0 and 1) that was better than 0.001 for every arm. The supervised model of a seed is the start and the
teacher of every arm. The quality of relations is the share of novel samples whose most probable known class belongs to
their own super-class. The control `shuffled` distils relations of other novel samples of the batch: as much
regularisation, and no information. Arms `_over` are told of 12 novel classes instead of 10. In pilots (seeds 0 to 3)
with 60 samples of every novel class, with five known classes in each super-class, or with less noise, relations were
kept as well, and novel classes were not clustered better either.

Garments: Fashion-MNIST at 14 x 14 pixels, 2,000 training images, the first five classes known, the last five novel; a
network of two convolutions, views shifted by up to a pixel and mirrored.

CIFAR-100, at the scale `paper` only: the authors' settings, but for the supervised stage, whose published ones cannot
be what was run (AdamW with a rate of 0.4, no number of epochs); SGD with a rate of 0.1 for 200 epochs.
"""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from classact.data.registry import data_folder
from classact.data.superclasses import superclasses
from classact.discover.crkd import (
    ClassRelationDistillation,
    CrKD,
    CrKDLoss,
    KnownClassifier,
    KnownOutput,
    TrainingPlan,
    class_relation,
    discovery_accuracy,
    fit_crkd,
    fit_known,
    relation_quality,
)
from classact.discover.metrics import cluster_accuracy
from classact.evidence.experiment import Cells, Experiment, Values
from classact.reproductions.nn.small_images import garments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE = 3e-3
HEADS: dict[str, Any] = {"n_heads": 2, "hidden": 128, "projection": 64}
ARMS: dict[str, dict[str, Any]] = {
    "uno": {"alpha": 0.0},
    "crkd": {},
    "uniform": {"weighting": "uniform"},
    "detached": {"detach_weight": True},
    "features": {"distill": "features"},
    "shuffled": {},
    "uno_over": {"alpha": 0.0},
    "crkd_over": {},
}


class _Shuffled(KnownClassifier):
    """A teacher that gives every sample the relation of another."""

    def forward(self, x: Tensor) -> KnownOutput:
        known, features = super().forward(x)
        return KnownOutput(known[torch.randperm(len(known))], features)


def _shuffled(teacher: KnownClassifier) -> KnownClassifier:
    other = _Shuffled(copy.deepcopy(teacher.encoder), teacher.head.in_features, teacher.head.n_classes)
    other.load_state_dict(teacher.state_dict())
    return other.eval()


def noisy(x: Tensor) -> list[Tensor]:
    """Two views of rows."""
    return [x + 0.25 * torch.randn_like(x) for _ in range(2)]


def perceptron() -> nn.Module:
    """Two hidden layers."""
    layers = [(nn.Linear(d, 128), nn.BatchNorm1d(128), nn.ReLU()) for d in (32, 128)]
    return nn.Sequential(*(layer for block in layers for layer in block))


def _clusters(model: CrKD, x: Tensor, labels: np.ndarray) -> float:
    """Accuracy among novel classes, mean over heads."""
    return float(
        np.mean([cluster_accuracy(labels, found) for found in model.predict(x, task_aware=True, head="all").cpu()])
    )


def _k_means(teacher: KnownClassifier, x: Tensor, labels: np.ndarray, n_clusters: int, seed: int) -> float:
    from sklearn.cluster import KMeans

    with torch.no_grad():
        features = F.normalize(teacher(x).features, dim=1).numpy()
    return cluster_accuracy(labels, KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features))


def run_superclasses(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Discover novel members of super-classes with every arm."""
    smoke = scale == "smoke"
    data = superclasses(seed, n_samples=(20, 12, 10) if smoke else (60, 12, 100))
    known = torch.from_numpy(data.known), torch.from_numpy(data.known_labels)
    novel, test = torch.from_numpy(data.novel), torch.from_numpy(data.test)
    superclass = torch.from_numpy(data.superclass)
    n_known, n_novel = int(known[1].max()) + 1, len(superclass) - int(known[1].max()) - 1
    plan = TrainingPlan(1 if smoke else 30, warmup=0, lr=RATE, min_lr=RATE, batch_size=200)
    torch.manual_seed(seed)
    teacher = fit_known(perceptron(), known, n_known, views=noisy, plan=plan, seed=seed)
    with torch.no_grad():
        certainty = class_relation(teacher(novel).known).amax(1)

    def quality(probabilities: Tensor) -> float:
        return relation_quality(probabilities, superclass[torch.from_numpy(data.novel_labels)], superclass[:n_known])

    with torch.no_grad():
        start = quality(class_relation(teacher(novel).known))
    values: Values = {
        "teacher": {"relation": start, "accuracy": _k_means(teacher, novel, data.novel_labels, n_novel, seed)}
    }
    arrays: dict[str, np.ndarray] = {}
    for arm, options in ARMS.items():
        curve: list[tuple[float, float]] = [(start, np.nan)]
        weights: list[Tensor] = []

        def follow(epoch: int, model: CrKD, curve: list[Any] = curve, weights: list[Tensor] = weights) -> None:
            if epoch % 5 == 4 or smoke:
                curve.append((quality(model.relation(novel)), _clusters(model, novel, data.novel_labels)))
            model.eval()
            with torch.no_grad():
                weights.append(ClassRelationDistillation(n_known).weights(model(novel).joint.unsqueeze(1)).mean((0, 1)))

        model = fit_crkd(
            _shuffled(teacher) if arm == "shuffled" else teacher,
            known,
            novel,
            n_known,
            n_novel + 2 * arm.endswith("_over"),
            views=noisy,
            loss=CrKDLoss(n_known, **options),
            discovery=plan._replace(epochs=2 * plan.epochs),
            callback=follow,
            seed=seed,
            **HEADS,
        )
        found = [discovery_accuracy(data.test_labels, y, n_known, "novel") for y in model.predict(test, head="all")]
        of_novel = data.test_labels >= n_known
        correlations = [torch.corrcoef(torch.stack([certainty, weight]))[0, 1] for weight in weights]
        values[arm] = {
            "relation": quality(model.relation(novel)),
            "accuracy": _clusters(model, novel, data.novel_labels),
            "accuracy_test": _clusters(model, test[torch.from_numpy(of_novel)], data.test_labels[of_novel]),
            "agnostic_all": float(np.mean([f.all for f in found])),
            "agnostic_known": float(np.mean([f.known for f in found])),
            "agnostic_novel": float(np.mean([f.novel for f in found])),
            "correlation": float(torch.stack(correlations).mean()),
        }
        arrays[arm] = np.array(curve)
    return values, arrays


def draw_superclasses(cells: Cells) -> "Figure":
    """Draw relations and accuracy over the training, and both at its end for every arm."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    arms = list(ARMS)
    curves = {arm: np.stack([arrays[arm] for arrays in cells.arrays.values()]) for arm in arms}
    shown = ("uno", "crkd", "shuffled")
    for column, label in enumerate(("relations to the own super-class", "accuracy on novel classes")):
        for arm in shown:
            of_arm = curves[arm][..., column]
            x = np.linspace(0, 1, of_arm.shape[1])
            mean, error = of_arm.mean(0), of_arm.std(0, ddof=1) / np.sqrt(len(of_arm))
            axes[column].plot(x, mean, label=arm, color=f"C{arms.index(arm)}")
            axes[column].fill_between(x, mean - error, mean + error, alpha=0.2, lw=0, color=f"C{arms.index(arm)}")
        axes[column].set_xlabel("part of the discovery training")
        axes[column].set_ylabel(label)
        axes[column].spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    for index, arm in enumerate(["teacher", *arms]):
        x, y = cells.metric(arm, "relation"), cells.metric(arm, "accuracy")
        errors = [values.std(ddof=1) / np.sqrt(len(values)) for values in (y, x)]
        color, label = ("black", "teacher, k-means") if arm == "teacher" else (f"C{index - 1}", arm)
        axes[2].errorbar(x.mean(), y.mean(), *errors, "o", color=color, label=label)
    axes[2].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[2].set_xlabel("relations to the own super-class")
    axes[2].set_ylabel("accuracy on novel classes")
    axes[2].spines[["top", "right"]].set_visible(False)
    return figure


def shifted(x: Tensor) -> list[Tensor]:
    """Two views of images, shifted by up to a pixel and mirrored at random."""
    views = []
    for _ in range(2):
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        rows, columns = torch.randint(3, (2,)).tolist()
        view = padded[..., rows : rows + x.shape[-2], columns : columns + x.shape[-1]]
        mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
        views.append(torch.where(mirrored, view.flip(-1), view) + 0.1 * torch.randn_like(x))
    return views


def convolutions() -> nn.Module:
    """Two convolutions and a linear layer."""
    body: list[nn.Module] = []
    for c, o in ((1, 16), (16, 32)):
        body += [nn.Conv2d(c, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32 * 16, 128), nn.BatchNorm1d(128), nn.ReLU())


def run_garments(seed: int, scale: str) -> Values:
    """Discover five kinds of garments beside five known ones."""
    n, epochs = (300, 2) if scale == "smoke" else (2000, 20)
    data = garments(seed, n, n, pool=2)
    is_known, novel_test = data.train_labels < 5, data.test_labels >= 5
    known = data.train[is_known], data.train_labels[is_known]
    novel, labels = data.train[~is_known], data.train_labels[~is_known].numpy()
    plan = TrainingPlan(max(epochs // 2, 1), warmup=0, lr=RATE, min_lr=RATE, batch_size=200)
    torch.manual_seed(seed)
    teacher = fit_known(convolutions(), known, 5, views=shifted, plan=plan, seed=seed)
    values: Values = {"teacher": {"accuracy": _k_means(teacher, novel, labels, 5, seed)}}
    for arm, options in ARMS.items():
        if arm.endswith("_over"):
            continue
        model = fit_crkd(
            _shuffled(teacher) if arm == "shuffled" else teacher,
            known,
            novel,
            5,
            5,
            views=shifted,
            loss=CrKDLoss(5, **options),
            discovery=plan._replace(epochs=epochs),
            seed=seed,
            **HEADS,
        )
        found = [discovery_accuracy(data.test_labels, y, 5, "novel") for y in model.predict(data.test, head="all")]
        values[arm] = {
            "accuracy": _clusters(model, novel, labels),
            "accuracy_test": _clusters(model, data.test[novel_test], data.test_labels[novel_test].numpy()),
            "agnostic_all": float(np.mean([f.all for f in found])),
        }
    return values


def draw_garments(cells: Cells) -> "Figure":
    """Accuracy on novel garments, one point per seed."""
    from matplotlib.figure import Figure

    figure = Figure((6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(cells.arms):
        found = cells.metric(arm, "accuracy")
        axes.scatter(found, row + np.linspace(-0.18, 0.18, len(found)), s=14, color=f"C{row}")
        axes.plot([found.mean()] * 2, [row - 0.3, row + 0.3], color="black", lw=1.5)
    axes.set_yticks(range(len(cells.arms)), ["teacher, k-means", *cells.arms[1:]])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on novel garments, unlabelled in the training")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


class _Crops(Dataset[Any]):
    """Images with labels, each in as many views as there are transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transforms: list[Any]) -> None:
        self.images, self.labels, self.transforms = images, labels, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        from PIL import Image

        image = Image.fromarray(self.images[index])
        return [transform(image) for transform in self.transforms], int(self.labels[index])


def run_cifar100(seed: int, scale: str) -> Values:  # noqa: ARG001
    """CIFAR-100, the first 50 classes known: the authors' settings; CIFAR-100 in ``cifar100`` of the data folder."""
    from torchvision import models
    from torchvision import transforms as tf
    from torchvision.datasets import CIFAR100

    device = "cuda" if torch.cuda.is_available() else "cpu"
    (images, labels), (test, test_labels) = (
        (part.data, np.array(part.targets))
        for part in (CIFAR100(data_folder() / "cifar100", on) for on in (True, False))
    )
    mean, std = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)

    def crop(size: int, part: tuple[float, float]) -> Any:
        colour = tf.RandomApply([tf.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        steps = [tf.RandomResizedCrop(size, part), tf.RandomHorizontalFlip(), colour, tf.RandomSolarize(128, 0.2)]
        return tf.Compose([*steps, tf.RandomEqualize(0.2), tf.ToTensor(), tf.Normalize(mean, std)])

    def inputs(part: np.ndarray) -> Tensor:
        x = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
        return ((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).to(device)

    crops = [crop(32, (0.5, 1.0))] * 2 + [crop(18, (0.3, 0.8))] * 2
    is_known = labels < 50
    known = _Crops(images[is_known], labels[is_known], crops)
    novel = _Crops(images[~is_known], labels[~is_known], crops)
    network = models.resnet18()
    network.conv1, network.maxpool, network.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    plan = TrainingPlan(200, lr=0.1, min_lr=1e-3, optimizer="sgd")
    options: dict[str, Any] = {"n_workers": 8, "seed": seed, "device": device}
    teacher = fit_known(network, known, 50, plan=plan, **options)
    values: Values = {}
    for arm in ("uno", "crkd", "uniform"):
        loss = CrKDLoss(50, **ARMS[arm])
        model = fit_crkd(
            teacher, known, novel, 50, 50, loss=loss, discovery=plan._replace(epochs=500, lr=0.4), **options
        )
        found = [discovery_accuracy(test_labels, y, 50) for y in model.predict(inputs(test), head="all").cpu()]
        values[arm] = {
            "accuracy": _clusters(model, inputs(images[~is_known]), labels[~is_known]),
            "agnostic_all": float(np.mean([f.all for f in found])),
            "agnostic_known": float(np.mean([f.known for f in found])),
            "agnostic_novel": float(np.mean([f.novel for f in found])),
        }
    return values


EXPERIMENTS = {
    "super-classes": Experiment(run_superclasses, {"smoke": (0, 1), "cpu": range(100, 110)}, draw_superclasses),
    "garments": Experiment(run_garments, {"smoke": (0, 1), "cpu": range(100, 110)}, draw_garments),
    "cifar100": Experiment(run_cifar100, {"paper": range(100, 103)}),
}
