from .metrics import cluster_accuracy, match_clusters

__all__ = ["cluster_accuracy", "match_clusters"]
