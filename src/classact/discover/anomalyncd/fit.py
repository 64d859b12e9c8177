"""Training of AnomalyNCD (section 3.3), from images and maps to a model that classifies new ones."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from classact.discover.anomalyncd.augment import CropViews
from classact.discover.anomalyncd.crops import CropSet, anomaly_crops, stack_crops
from classact.discover.anomalyncd.detector import PatchMemory
from classact.discover.anomalyncd.losses import AnomalyNCDLoss, LossTerms
from classact.discover.anomalyncd.mebin import MEBin
from classact.discover.anomalyncd.model import AnomalyNCD, Images, Maps, check_images

DINO = {"model_name": "vit_base_patch8_224.dino", "pretrained": True}
BASE_CROPS = 2  # of an image, as in the authors' preparation of AeBAD-S


class BaseSet(NamedTuple):
    """Labelled defects of another product: images (3, H, W) in [0, 1], masks (H, W) bool, and classes, of any type."""

    images: Sequence[Tensor]
    masks: Sequence[Tensor]
    labels: Sequence[Hashable]


def fit_anomalyncd(
    images: Images,
    maps: Maps | None = None,
    *,
    n_novel: int | Literal["estimate"],
    good: Images | None = None,
    base: BaseSet | tuple[Any, Any, Any] | None = None,
    vit: nn.Module | dict[str, Any] | None = None,
    tiles: int = 1,
    seed: int = 0,
    device: str = "cpu",
    model_options: dict[str, Any] | None = None,
    **training: Any,
) -> AnomalyNCD:
    """Find types of defects in unlabelled images of one product.

    Folders of images, maps and base classes are read by ``classact.data.inspection.open_inspection``.

    Differences from the paper: without `maps`, a small detector made from good images replaces a detector of its own
    (every fifth good image is kept out of its memory, and their maps count for the range of thresholds); without
    `base`, the network is trained by the unsupervised terms alone; the number of classes, which the paper assumes to
    be known, may be estimated.

    Parameters
    ----------
    images : sequence of (3, H, W), or (N, 3, H, W)
        Unlabelled images in [0, 1], defective or not.
    maps : sequence of (H', W'), optional
        Their anomaly maps by any detector, jointly scaled.
    n_novel : int or "estimate"
        Number of classes to find, the normal one included.
    good : sequence of (3, H, W), optional
        Images without defects, at least two, from which maps are made if there are none; else unused.
    base : BaseSet, optional
        Labelled defects of another product, real or generated. An image is cut around two defects at most, the largest.
    vit : Module or dict, optional
        Backbone, see [`AnomalyNCD`][classact.discover.AnomalyNCD]; DINO ViT-B/8 with its weights by default, which timm
        downloads.
    tiles : int
        Of [`PatchMemory`][classact.discover.PatchMemory].
    seed : int
        Of weights, batches and views; the global random state is left alone.
    device : str
        Where the network is trained.
    model_options
        Further arguments of `AnomalyNCD`.
    training
        Further arguments of [`train_anomalyncd`][classact.discover.train_anomalyncd].

    Returns
    -------
    AnomalyNCD
        In evaluation mode.

    Raises
    ------
    ValueError
        If an input does not fit; if no map has a region; if a base mask is empty or not of its image's size.

    Examples
    --------
    >>> import torch
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=28, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    >>> images, maps = torch.rand(8, 3, 64, 64), torch.zeros(8, 64, 64)
    >>> for i in range(7):
    ...     maps[i, 9 * i : 9 * i + 12, 20:40] = 0.9
    >>> model = fit_anomalyncd(images, maps, n_novel=3, vit=vit, epochs=1, model_options={"hidden": 32})
    >>> model.predict(images, maps).probabilities.shape
    torch.Size([8, 3])
    """
    check_images(images)
    if n_novel != "estimate" and (isinstance(n_novel, str) or n_novel < 1):
        raise ValueError(f"n_novel: expected at least 1, or 'estimate', got {n_novel!r}")
    vit, options = DINO if vit is None else vit, dict(model_options or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        more: list[Any] = []
        detector = None
        if maps is None:
            if good is None or len(good) < 2:
                raise ValueError("good: without maps expected at least two good images, from which to make them")
            check_images(good, "good")
            pixels = {key: options[key] for key in ("mean", "std") if key in options}
            detector = PatchMemory(vit, tiles=tiles, **pixels).to(device)
            detector.fit([image for i, image in enumerate(good) if i % 5 != 1], seed)
            maps = detector(images)
            more = detector([image for i, image in enumerate(good) if i % 5 == 1])
        classes, codes = np.unique(np.array([] if base is None else list(base[2])), return_inverse=True)

        def build(n: int) -> AnomalyNCD:
            return AnomalyNCD(vit, len(classes), n, detector=detector, **options)

        model = build(2 if n_novel == "estimate" else n_novel)
        mebin = MEBin(**model.binarization).fit([*maps, *more])
        model.map_range.copy_(torch.tensor([mebin.min_, mebin.max_], dtype=torch.float64))
        base_crops = None if base is None else _crop_base(BaseSet(*base), model.size)
        base_labels = None if base_crops is None else torch.from_numpy(codes)[base_crops.image_id]
        novel = model.crops(images, maps)
        if not novel.areas.any():
            raise ValueError(f"maps: no region is stable in any of {len(maps)} maps, so there is nothing to sort")
        if n_novel == "estimate":
            found, map_range = estimate_n_novel(_embed(model.to(device), novel), seed=seed), model.map_range
            model = build(found + 1)
            model.map_range.copy_(map_range)
    return train_anomalyncd(model, novel, base_crops, base_labels, seed=seed, device=device, **training)


def _crop_base(base: BaseSet, size: int) -> CropSet:
    check_images(base.images, "base")
    if not len(base.images) == len(base.masks) == len(base.labels):
        raise ValueError(
            "base: expected equal numbers of images, masks and labels, got "
            f"{len(base.images)}, {len(base.masks)}, {len(base.labels)}"
        )
    crops = []
    for i, (image, mask) in enumerate(zip(base.images, base.masks, strict=True)):
        if mask.shape != image.shape[-2:]:
            raise ValueError(
                f"base: expected a mask of {tuple(image.shape[-2:])} for image {i}, got {tuple(mask.shape)}"
            )
        if not mask.any():
            raise ValueError(f"base: expected a defect in every mask, that of image {i} is empty")
        crops.append(anomaly_crops(image, mask.bool(), max_regions=BASE_CROPS))
    return stack_crops(crops, round(size / 0.875))


def _embed(model: AnomalyNCD, crops: CropSet, batch_size: int = 32) -> Tensor:
    found, views, device = [], CropViews(model.size), model.map_range.device
    model.eval()
    with torch.no_grad():
        for images, masks in zip(crops.images.split(batch_size), crops.masks.split(batch_size), strict=True):
            found.append(model(*views.central(images.to(device), masks.to(device))).embedding.cpu())
    return torch.cat(found)[crops.areas > 0]


def estimate_n_novel(z: Float[Tensor, "r d"], most: int = 12, seed: int = 0) -> int:
    """Number of clusters of embeddings, by the largest mean silhouette of k-means; not part of the paper.

    Parameters
    ----------
    z : (R, D)
        Embeddings, scaled to length 1 inside; at least three.
    most : int
        Largest number tried; 2 is the smallest.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if len(z) < 3:
        raise ValueError(f"z: expected at least 3 embeddings to estimate a number of clusters, got {len(z)}")
    unit = nn.functional.normalize(z.double(), dim=-1).numpy()
    scores = {}
    for k in range(2, min(most, len(unit) - 1) + 1):
        labels = KMeans(k, n_init=5, random_state=seed).fit_predict(unit)
        scores[k] = silhouette_score(unit, labels) if len(set(labels.tolist())) > 1 else -1.0
    return max(scores, key=lambda k: scores[k])


class CropBatch(NamedTuple):
    """Crops of a batch, with base classes (-1 for new crops) and anomaly scores."""

    images: Tensor
    masks: Tensor
    label: Tensor
    scores: Tensor


def training_terms(
    model: AnomalyNCD,
    loss: AnomalyNCDLoss,
    views: CropViews,
    batch: CropBatch,
    epoch: int,
    generator: torch.Generator | None = None,
) -> LossTerms:
    """Loss of a batch, of two views of each crop."""
    (x, mask), (x_other, mask_other) = (views.random(batch.images, batch.masks, generator) for _ in range(2))
    output = model(torch.cat([x, x_other]), torch.cat([mask, mask_other]))
    return loss(output, batch.label, batch.scores, epoch)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What is trained, in two groups, the second without weight decay: biases and whatever has one dimension."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def epoch_rate(epoch: int, epochs: int) -> float:
    """Factor of the learning rate, along half a cosine from 1 to 0.001."""
    return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def merge_sets(novel: CropSet, base: CropSet | None, base_labels: Tensor | None) -> tuple[CropBatch, Tensor]:
    """Base and new crops in one, and weights by which both are drawn equally often."""
    sets = [novel] if base is None else [base, novel]
    labels = torch.full((len(novel.images),), -1)
    weights = torch.ones(len(novel.images), dtype=torch.float64)
    if base is not None:
        if base_labels is None or len(base_labels) != len(base.images):
            raise ValueError("base_labels: expected one for every base crop")
        labels = torch.cat([base_labels, labels])
        n = len(base.images)
        weights = torch.cat([torch.ones(n, dtype=torch.float64), weights * n / len(weights)])
    images, masks, scores = (torch.cat([getattr(one, part) for one in sets]) for part in ("images", "masks", "scores"))
    return CropBatch(images, masks, labels, scores), weights


def train_anomalyncd(
    model: AnomalyNCD,
    novel: CropSet,
    base: CropSet | None = None,
    base_labels: Int[Tensor, " b"] | None = None,
    *,
    loss: AnomalyNCDLoss | None = None,
    views: CropViews | None = None,
    epochs: int = 50,
    batch_size: int = 32,
    lr: float = 0.003,
    momentum: float = 0.9,
    weight_decay: float = 5e-5,
    seed: int = 0,
    device: str = "cpu",
) -> AnomalyNCD:
    """Train a model on crops, in place, and choose its best head: that with the least cluster loss in the last epoch.

    SGD, the learning rate of each epoch along half a cosine to a thousandth. With a base set, crops are drawn with
    replacement, base and new ones equally often, as many in an epoch as there are; without, each is drawn once.

    Parameters
    ----------
    model : AnomalyNCD
        With as many base classes as `base_labels` has.
    novel, base : CropSet
        Crops of the new and, optionally, the base images.
    base_labels : (B,) int
        Classes of the base crops, from 0.
    loss : AnomalyNCDLoss, optional
        With the paper's settings by default, the teacher's warm-up being four fifths of the epochs in ten steps.
    views : CropViews, optional
        With the paper's settings by default.
    epochs, batch_size, lr, momentum, weight_decay, seed, device
        Of the training.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    everything, weights = merge_sets(novel, base, base_labels)
    n_labels = int(everything.label.max()) + 1
    if n_labels > model.n_base:
        raise ValueError(f"base_labels: expected classes below the model's n_base {model.n_base}, got {n_labels - 1}")
    if loss is None:
        plateau = max(1, round(epochs * 0.08))
        loss = AnomalyNCDLoss(model.n_base, model.n_novel, warmup=10 * plateau, plateau=plateau)
    views = CropViews(model.size) if views is None else views
    optimizer = torch.optim.SGD(parameter_groups(model.to(device)), lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch_rate(epoch, epochs))
    generator = torch.Generator().manual_seed(seed)
    n = len(everything.images)
    with torch.random.fork_rng(devices=[]):  # dropout, where a backbone has it
        torch.manual_seed(seed)
        model.train()
        for epoch in range(epochs):
            if base is None:
                order = torch.randperm(n, generator=generator)
            else:
                order = torch.multinomial(weights, n, replacement=True, generator=generator)
            cluster = []
            for chosen in order.split(batch_size):
                batch = CropBatch(*(part[chosen].to(device) for part in everything))
                terms = training_terms(model, loss, views, batch, epoch, generator)
                optimizer.zero_grad()
                terms.total.backward()
                optimizer.step()
                cluster.append(terms.cluster.detach())
            schedule.step()
        model.best_head.copy_(torch.stack(cluster).mean(0).argmin())
    return model.eval()
