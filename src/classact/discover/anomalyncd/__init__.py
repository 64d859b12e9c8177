"""AnomalyNCD: sorts the defects that an anomaly detector finds into types that nobody has labelled.

Huang, Li, Liu, Xue, Wang, Zhou: AnomalyNCD: Towards Novel Anomaly Class Discovery in Industrial Scenarios, CVPR 2025,
https://arxiv.org/abs/2410.14379. Authors' code: https://github.com/HUST-SLOW/AnomalyNCD.

In the order of the paper: ``mebin`` turns anomaly maps into masks, ``crops`` cuts the image around the anomalies,
``network`` has the vision transformer whose class token attends to masked patches only, and the heads, ``losses`` the
training objective, ``merging`` goes from regions to images, ``model`` puts them together for new images, and ``fit``
trains. ``augment`` has the views of the training and ``detector`` a small anomaly detector for those who have no maps.
``lit`` is the training step for Lightning.
"""

from classact.discover.anomalyncd.augment import CropViews
from classact.discover.anomalyncd.crops import Crop, CropSet, anomaly_crops, rectangle_gap, stack_crops
from classact.discover.anomalyncd.detector import PatchMemory
from classact.discover.anomalyncd.fit import BaseSet, estimate_n_novel, fit_anomalyncd, train_anomalyncd
from classact.discover.anomalyncd.losses import (
    AnomalyNCDLoss,
    CorrectedSelfDistillation,
    MeanEntropyMax,
    contrastive_loss,
    teacher_temperature,
)
from classact.discover.anomalyncd.mebin import Binarized, MEBin, region_counts, stable_interval
from classact.discover.anomalyncd.merging import RegionMerger
from classact.discover.anomalyncd.model import AnomalyNCD, Predictions
from classact.discover.anomalyncd.network import MaskGuidedViT, NCDHeads, NCDOutput

__all__ = [
    "AnomalyNCD",
    "AnomalyNCDLoss",
    "BaseSet",
    "Binarized",
    "CorrectedSelfDistillation",
    "Crop",
    "CropSet",
    "CropViews",
    "MEBin",
    "MaskGuidedViT",
    "MeanEntropyMax",
    "NCDHeads",
    "NCDOutput",
    "PatchMemory",
    "Predictions",
    "RegionMerger",
    "anomaly_crops",
    "contrastive_loss",
    "estimate_n_novel",
    "fit_anomalyncd",
    "rectangle_gap",
    "region_counts",
    "stable_interval",
    "stack_crops",
    "teacher_temperature",
    "train_anomalyncd",
]
