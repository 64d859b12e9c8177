"""Batches in which every class is drawn equally often."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler


class BalancedBagSampler(Sampler[list[int]]):
    """Batches of bags, each bag of a class drawn with equal probability, and its bag uniformly, with replacement.

    An epoch has as many batches as with plain shuffling. Give it to a `torch.utils.data.DataLoader` as
    ``batch_sampler``.

    Parameters
    ----------
    labels : sequence of int
        Class of every bag.
    batch_size : int
        Bags per batch.
    generator : torch.Generator, optional
        Source of randomness.
    ensure_pairs : bool
        Let every batch hold at least two bags of each class, the anchor and a partner of a contrastive loss; a class
        of one bag is paired with itself. Needs ``batch_size`` of at least twice the number of classes.

    Examples
    --------
    >>> sampler = BalancedBagSampler([0] * 90 + [1] * 10, 16, torch.Generator().manual_seed(0))
    >>> len(sampler), len(next(iter(sampler)))
    (7, 16)
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray | Tensor,
        batch_size: int,
        generator: Generator | None = None,
        ensure_pairs: bool = False,
    ) -> None:
        labels = torch.as_tensor(labels)
        if len(labels) == 0:
            raise ValueError("labels: expected at least one bag")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.members = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
        if ensure_pairs and batch_size < 2 * len(self.members):
            raise ValueError(
                f"batch_size: pairs of {len(self.members)} classes need at least {2 * len(self.members)} bags, "
                f"got {batch_size}"
            )
        self.batch_size, self.generator, self.ensure_pairs = batch_size, generator, ensure_pairs
        self.batches = math.ceil(len(labels) / batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        sizes = torch.tensor([len(members) for members in self.members])
        classes = torch.randint(len(self.members), (self.batches, self.batch_size), generator=self.generator)
        if self.ensure_pairs:
            classes[:, : 2 * len(sizes)] = torch.arange(len(sizes)).repeat(2)
        draw = torch.rand(classes.shape, dtype=torch.float64, generator=self.generator)
        picks = (draw * sizes[classes]).long()
        for row_classes, row_picks in zip(classes.tolist(), picks.tolist(), strict=True):
            yield [int(self.members[c][i]) for c, i in zip(row_classes, row_picks, strict=True)]
