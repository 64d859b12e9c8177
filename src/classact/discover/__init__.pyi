from .found import FoundClasses, load
from .label_metrics import LabelMetric
from .loki import (
    FrechetClassifier,
    FrechetHead,
    NextClassSelector,
    frechet_predict,
    frechet_scores,
    frechet_straight_through,
    greedy_locus_cover,
    is_locus_cover,
    locus,
    minimum_locus_cover,
    sample_labels,
)
from .metrics import cluster_accuracy, match_clusters
from .ncd_clustering import NCDKMeans, NCDSpectral
from .pbn import PBN, HiddenClassCV, HiddenClassSplit, PBNNetwork, estimate_n_clusters, pbn_loss
from .tabularncd import TabularNCD

__all__ = [
    "PBN",
    "FoundClasses",
    "FrechetClassifier",
    "FrechetHead",
    "HiddenClassCV",
    "HiddenClassSplit",
    "LabelMetric",
    "NCDKMeans",
    "NCDSpectral",
    "NextClassSelector",
    "PBNNetwork",
    "TabularNCD",
    "cluster_accuracy",
    "estimate_n_clusters",
    "frechet_predict",
    "frechet_scores",
    "frechet_straight_through",
    "greedy_locus_cover",
    "is_locus_cover",
    "load",
    "locus",
    "match_clusters",
    "minimum_locus_cover",
    "pbn_loss",
    "sample_labels",
]
