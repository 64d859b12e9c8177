"""Methods for images behind one signature, as the comparison and the command `discover` call them.

A network is trained on the known classes and, by some methods, on the unlabelled images too. The parts, for use in code
of one's own, are in [`crkd`][classact.discover.crkd] and [`hypersphere`][classact.discover.hypersphere].
"""

import math
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from classact.discover.crkd import CrKD, CrKDLoss, KnownClassifier, TrainingPlan, fit_crkd, fit_known, train_blocks_from
from classact.discover.found import estimated
from classact.discover.hypersphere import HypersphereClassifier, fit_hypersphere

BATCH = 200
STEPS = 200, 400  # of the training on known classes, and of the discovery


def small_encoder(shape: tuple[int, int, int]) -> nn.Module:
    """Convolutions of stride 2 down to about 4 x 4 pixels, and a hidden layer of 128 units, all with batch norm."""
    c, h, w = shape
    n = max(1, round(math.log2(min(h, w))) - 2)
    body: list[nn.Module] = []
    for before, after in pairwise([c, *(16 * 2 ** min(i, 2) for i in range(n))]):
        body += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        h, w = -(-h // 2), -(-w // 2)
    features = 16 * 2 ** min(n - 1, 2) * h * w
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())


class _Pretrained(nn.Module):
    """A network of timm that takes images of any size and one or three channels, standardised as it was trained."""

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "encoder: a pretrained one needs the package timm: pip install 'classact[explain]'", name="timm"
            ) from error
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name}*")[:3])
            raise ValueError(f"encoder: timm has no model {name}" + (f"; near are {near}" if near else ""))
        self.network: Any = timm.create_model(name, pretrained=True, num_classes=0)
        config = timm.data.resolve_model_data_config(self.network)
        self.size = config["input_size"][-2:]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1))
        if any(key.startswith("blocks.") for key, _ in self.network.named_parameters()):
            blocks: Any = self.network.blocks
            train_blocks_from(self.network, len(blocks) - 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        found: Tensor = self.network((x.expand(-1, 3, -1, -1) - self.mean) / self.std)
        return found


def views(x: Tensor) -> list[Tensor]:
    """Two views of images in [0, 1]: shifted by up to an eighth, with other contrast, and a little noise."""
    n, _, h, w = x.shape
    found = []
    for _ in range(2):
        reach = max(1, h // 8), max(1, w // 8)
        padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
        rows = torch.randint(2 * reach[0] + 1, (n, 1), device=x.device) + torch.arange(h, device=x.device)
        columns = torch.randint(2 * reach[1] + 1, (n, 1), device=x.device) + torch.arange(w, device=x.device)
        image = torch.arange(n, device=x.device)[:, None, None]
        shifted = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        contrast = 1 + 0.2 * (2 * torch.rand(n, 1, 1, 1, device=x.device) - 1)
        found.append(shifted * contrast + 0.05 * torch.randn_like(x))
    return found


class ImageDiscovery(ClusterMixin, BaseEstimator):
    """Find the classes of unlabelled images with a network that has learned the known ones.

    Parameters
    ----------
    kind : {"known-features", "hypersphere", "uno", "crkd"}
        K-means on the features of a network trained on the known classes (the control of the others), or on embeddings
        by normalised softmax; UNO's joint training on known and unlabelled images; the same with Cr-KD's distillation.
    shape : (C, H, W)
        Of the images, whose rows are flattened and in [0, 1].
    n_clusters : int, optional
        By default estimated by the silhouette of the features after the training on known classes.
    encoder : str, optional
        A network of timm with its pretrained weights; of a vision transformer only the last block is trained. By
        default a small one is trained from nothing.
    lr : float
        Learning rate of AdamW (Adam for "hypersphere").
    alpha : float
        Weight of Cr-KD's distillation.
    scale : float
        s of the normalised softmax.
    steps : (int, int)
        Updates, of 200 images each, on the known classes and in the discovery.
    random_state : int
        Of weights, batches, views, and k-means.

    Attributes
    ----------
    labels_ : (n,) int
        Clusters of unlabelled rows, -1 for labelled ones.
    n_clusters_ : int
    classes_ : (K,)
        Known classes.
    network_ : Module
        The trained network.
    """

    def __init__(
        self,
        kind: Literal["known-features", "hypersphere", "uno", "crkd"] = "crkd",
        shape: tuple[int, int, int] = (1, 28, 28),
        n_clusters: int | None = None,
        encoder: str | None = None,
        lr: float = 3e-3,
        alpha: float = 0.1,
        scale: float = 10.0,
        steps: tuple[int, int] = STEPS,
        random_state: int = 0,
    ) -> None:
        self.kind = kind
        self.shape = shape
        self.n_clusters = n_clusters
        self.encoder = encoder
        self.lr = lr
        self.alpha = alpha
        self.scale = scale
        self.steps = steps
        self.random_state = random_state

    def fit(self, X: np.ndarray, y: np.ndarray) -> "ImageDiscovery":
        """Fit to flattened images (n, C H W) and labels (n,), -1 for unlabelled ones.

        Raises
        ------
        ValueError
            If fewer than two classes are known, no image is unlabelled, or rows are no images of `shape`.
        """
        novel = y < 0
        self.classes_, codes = np.unique(y[~novel], return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y: {self.kind} learns to tell known classes apart and needs two of them, got {len(self.classes_)}; "
                "kmeans, spectral, ncd-kmeans need fewer"
            )
        if not novel.any():
            raise ValueError("y: expected unlabelled images, marked by -1")
        x = self._images(X)
        known = x[torch.from_numpy(~novel)], torch.from_numpy(codes).long()
        unlabelled, seed, k = x[torch.from_numpy(novel)], self.random_state, len(self.classes_)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = small_encoder(self.shape) if self.encoder is None else _Pretrained(self.encoder)
        if self.kind == "hypersphere":
            epochs = self._epochs(self.steps[0], 2 * len(known[1]))
            network = nn.Sequential(encoder, nn.LazyLinear(64, bias=False))
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network.eval()(known[0][:1])
                seen = torch.cat(views(known[0])), known[1].repeat(2)
            options: dict[str, Any] = {
                "scale": self.scale,
                "epochs": epochs,
                "lr": self.lr,
                "batch_size": BATCH,
                "seed": seed,
            }
            self.network_: Any = fit_hypersphere(network.train(), *seen, **options)
        else:
            plan = TrainingPlan(lr=self.lr, min_lr=self.lr / 10, batch_size=BATCH)
            self.network_ = fit_known(
                encoder, known, k, views=views, plan=self._plan(plan, self.steps[0], len(known[1])), seed=seed
            )
        self.n_clusters_ = self.n_clusters or estimated(self._features(unlabelled), seed)
        if self.kind in ("uno", "crkd"):
            loss = CrKDLoss(k, alpha=self.alpha if self.kind == "crkd" else 0.0)
            discovery = self._plan(plan, self.steps[1], len(x))
            self.network_ = fit_crkd(
                self.network_,
                known,
                unlabelled,
                k,
                self.n_clusters_,
                views=views,
                loss=loss,
                discovery=discovery,
                hidden=256,
                projection=64,
                seed=seed,
            )
        else:
            self._kmeans = KMeans(self.n_clusters_, n_init=10, random_state=seed).fit(self._features(unlabelled))
        self.labels_ = np.full(len(y), -1)
        self.labels_[novel] = self._clusters(unlabelled)
        return self

    def _images(self, X: np.ndarray) -> Tensor:
        if X.ndim != 2 or X.shape[1] != math.prod(self.shape):
            raise ValueError(f"X: expected flattened images (n, {math.prod(self.shape)}), got {X.shape}")
        return torch.from_numpy(np.ascontiguousarray(X, np.float32)).view(-1, *self.shape)

    def _epochs(self, steps: int, n: int) -> int:
        return max(1, round(steps / max(1, n // BATCH)))

    def _plan(self, plan: TrainingPlan, steps: int, n: int) -> TrainingPlan:
        epochs = self._epochs(steps, n)
        return plan._replace(epochs=epochs, warmup=epochs // 10)

    def _features(self, x: Tensor) -> np.ndarray:
        """Features of length 1."""
        with torch.no_grad():
            if isinstance(self.network_, HypersphereClassifier):
                found = self.network_.embed(x)
            else:
                network: KnownClassifier | CrKD = self.network_.eval()
                found = torch.cat([F.normalize(network(part).features, dim=1) for part in x.split(500)])
        return np.asarray(found.double().numpy())

    def _clusters(self, x: Tensor) -> np.ndarray:
        if isinstance(self.network_, CrKD):
            return np.asarray(self.network_.predict(x, task_aware=True).numpy()) - len(self.classes_)
        return np.asarray(self._kmeans.predict(self._features(x)))

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Cluster (n,) of each image, taken to be of a novel class."""
        return self._clusters(self._images(X))

    def predict_known(self, X: np.ndarray) -> np.ndarray:
        """Known class (n,) of each image, taken to be of one."""
        x = self._images(X)
        with torch.no_grad():
            if isinstance(self.network_, HypersphereClassifier):
                found = self.network_.predict(x)
            else:
                found = torch.cat([self.network_(part).known.argmax(1) for part in x.split(500)])
        return np.asarray(self.classes_[found.numpy()])

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Features (n, D) of length 1."""
        return self._features(self._images(X))
