"""TabularNCD, the method with seven settings that PBN is compared with.

Troisemaine, Flocon-Cholet, Gosselin, Vaton, Reiffers-Masson, Lemaire: A Method for Discovering Novel Classes in Tabular
Data, ICKG 2022, https://arxiv.org/abs/2209.01217, in the form it has in the code of the later paper,
https://github.com/ColinTr/PracticalNCD: without pre-training. One encoder serves two heads. One tells the known
classes and, as a further class, all novel rows; the other tells the novel classes, from pairs of novel rows that are
called alike if one is among the most similar to the other. Both are to say the same of a row and of a point between
that row and one of its neighbours.

The authors look for neighbours among the last 2,000 rows of the training; here among all rows of the same kind, known
or novel, which is the same for tables up to that size and lets neighbours be found once. A batch without known rows is
used as well.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.discover.pbn import TableEstimator, check_part, encoder_layers, hidden_widths, rows_to_labels


class TabularNCDNetwork(nn.Module):
    """An encoder and two linear heads: of the known classes and "novel", and of the novel classes.

    Parameters
    ----------
    in_dim, n_known, n_novel : int
        Columns, known classes and novel classes.
    latent_dim, dropout
        As in [`PBNNetwork`][classact.discover.PBNNetwork], whose encoder it has.
    """

    def __init__(self, in_dim: int, n_known: int, n_novel: int, latent_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = {
            "in_dim": in_dim,
            "n_known": n_known,
            "n_novel": n_novel,
            "latent_dim": latent_dim,
            "dropout": dropout,
        }
        self.encoder = encoder_layers([in_dim, *hidden_widths(in_dim), latent_dim], dropout)
        self.classifier = nn.Linear(latent_dim, n_known + 1)
        self.clusterer = nn.Linear(latent_dim, n_novel)

    def forward(
        self, x: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b c"], Float[Tensor, "b k"]]:
        """Latents, logits of the known classes and "novel" (last), logits of the clusters."""
        z = self.encoder(x)
        return z, self.classifier(z), self.clusterer(z)


def pair_loss(z: Float[Tensor, "b l"], cluster_logits: Float[Tensor, "b k"], top_k: float) -> Float[Tensor, ""]:
    """Binary cross-entropy of "both in one cluster" over all pairs of rows.

    Parameters
    ----------
    z : (B, L)
        Latents, B at least 2. A pair counts as alike if one row is among the most similar (cosine) to the other.
    cluster_logits : (B, C_u)
        The probability that two rows share a cluster is the inner product of their softmax.
    top_k : float
        How many are the most similar, in percent of B, but at least one.
    """
    unit = F.normalize(z.detach(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = similarity.topk(min(max(int(top_k / 100 * len(z)), 1), len(z) - 1)).indices
    alike = torch.zeros_like(similarity).scatter_(1, nearest, 1.0)
    first, second = torch.triu_indices(len(z), len(z), 1, device=z.device)
    alike = torch.maximum(alike, alike.T)[first, second]
    p = cluster_logits.softmax(1)
    same = (p @ p.T)[first, second]
    return -(alike * (same + 1e-7).log() + (1 - alike) * (1 - same + 1e-7).log()).mean()


def nearest_rows(x: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
    """Numbers of the k rows that are most similar (cosine) to each row, itself excluded."""
    unit = F.normalize(x, dim=1)
    found = []
    for rows in torch.arange(len(x)).split(1024):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        found.append(similarity.topk(k).indices)
    return torch.cat(found)


class TabularNCD(TableEstimator):
    """Novel class discovery by pairs of similar rows, trained together with a classifier.

    Parameters
    ----------
    latent_dim, lr, dropout, epochs, batch_size, random_state
        As in [`PBN`][classact.discover.PBN].
    n_clusters : int
        Number C_u of novel classes.
    w1, w2 : float
        Weights in [0, 1] of the cross-entropy and of the pairs, each against the consistency of its head.
    top_k : float
        Per cent of the novel rows of a batch that a row is called alike with.
    k_neighbors : int
        Neighbours among which the other end of a step is drawn.

    Attributes
    ----------
    network_, classes_, n_clusters_, novel_labels_, labels_, loss_curve_
        As in PBN.
    """

    def __init__(
        self,
        latent_dim: int | None = None,
        w1: float = 0.5,
        w2: float = 0.5,
        lr: float = 1e-3,
        dropout: float = 0.1,
        top_k: float = 1.0,
        k_neighbors: int = 10,
        epochs: int = 200,
        batch_size: int = 512,
        n_clusters: int = 8,
        random_state: Any = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.w1 = w1
        self.w2 = w2
        self.lr = lr
        self.dropout = dropout
        self.top_k = top_k
        self.k_neighbors = k_neighbors
        self.epochs = epochs
        self.batch_size = batch_size
        self.n_clusters = n_clusters
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "TabularNCD":
        """Train on a table (n, D) with labels (n,), -1 for novel rows."""
        check_part("w1", self.w1)
        check_part("w2", self.w2)
        if not 0 < self.top_k <= 100 or self.k_neighbors < 1:
            raise ValueError(
                f"top_k, k_neighbors: expected a percentage above 0 and at least 1, got {self.top_k}, "
                f"{self.k_neighbors}"
            )
        table, codes, novel, seed = self._prepare(X, y)
        is_novel = torch.from_numpy(novel)
        target = torch.from_numpy(np.where(novel, len(self.classes_), codes))
        neighbours = torch.arange(len(table))[:, None].repeat(1, self.k_neighbors)
        for part in (is_novel, ~is_novel):
            rows = part.nonzero().squeeze(1)
            if (k := min(self.k_neighbors, len(rows) - 1)) > 0:
                near = rows[nearest_rows(table[rows], k)]
                neighbours[rows] = near[:, torch.arange(self.k_neighbors) % k]
        width = self.latent_dim if self.latent_dim is not None else table.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = TabularNCDNetwork(table.shape[1], len(self.classes_), self.n_clusters, width, self.dropout)

            def step(batch: Tensor) -> Tensor | None:
                x, chosen = table[batch], is_novel[batch]
                if chosen.sum() < 2:
                    return None
                z, logits, clusters = network(x)
                other = table[neighbours[batch, torch.randint(self.k_neighbors, (len(x),))]]
                _, moved_logits, moved_clusters = network(x + torch.rand(len(x), 1) * (other - x))
                classify = self.w1 * F.cross_entropy(logits, target[batch])
                classify = classify + (1 - self.w1) * F.mse_loss(logits, moved_logits)
                cluster = self.w2 * pair_loss(z[chosen], clusters[chosen], self.top_k)
                return classify + cluster + (1 - self.w2) * F.mse_loss(clusters[chosen], moved_clusters[chosen])

            self._train(network, len(table), seed, step)
        self._n_features_out = width
        self.n_clusters_ = self.n_clusters
        with torch.inference_mode():
            self.novel_labels_ = self.network_(table.double()[is_novel])[2].argmax(1).numpy()
        self.labels_ = rows_to_labels(novel, self.novel_labels_)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Latents (n, L)."""
        rows = self._rows(X)
        with torch.inference_mode():
            return self.network_.encoder(rows).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Put every row into one of the novel clusters (n,), numbered from 0."""
        rows = self._rows(X)
        with torch.inference_mode():
            return self.network_(rows)[2].argmax(1).numpy()

    def predict_known(self, X: Any) -> np.ndarray:
        """Put every row into one of the known classes (n,)."""
        rows = self._rows(X)
        with torch.inference_mode():
            return self._known(self.network_(rows)[1])
