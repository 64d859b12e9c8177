"""A part of Fashion-MNIST and the training of small networks on it, into which several papers put their layer."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classact.data.images import fashion_mnist


class Garments(NamedTuple):
    """Images (n, 1, S, S), standardised by mean and deviation of all training pixels, and classes (n,) from 0 to 9."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def garments(seed: int, n_train: int, n_test: int, pool: int = 1) -> Garments:
    """Images drawn from the official training and test parts, reduced by averaging `pool` x `pool` pixels."""
    rng, parts = np.random.default_rng(seed), []
    for part, n in (("train", n_train), ("test", n_test)):
        images, labels = fashion_mnist(part)
        chosen = rng.permutation(len(images))[:n]
        x = torch.from_numpy(images[chosen]).float().unsqueeze(1) / 255
        parts += [F.avg_pool2d(x, pool), torch.from_numpy(labels[chosen]).long()]
    mean, std = parts[0].mean(), parts[0].std()
    return Garments((parts[0] - mean) / std, parts[1], (parts[2] - mean) / std, parts[3])


def train(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    seed: int,
    epochs: int,
    rate: float,
    weight_decay: float = 0.0,
    batch: int = 128,
    momentum: float | None = None,
    clip: float | None = None,
) -> nn.Module:
    """Train with cross-entropy; the network in evaluation mode. Equal seeds give equal batches, whatever the network.

    AdamW, or SGD with Nesterov's momentum where one is given; one cycle of the learning rate up to `rate`; weight decay
    for tensors of two and more dimensions only; gradients clipped to a norm of `clip`.
    """
    wide = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    flat = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, rate, fused=True)
        if momentum is None
        else torch.optim.SGD(groups, rate, momentum=momentum, nesterov=True, fused=True)
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(x) // batch))
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), labels[chosen]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            cycle.step()
    return network.eval()


def accuracy(network: nn.Module, x: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Share of right predictions."""
    with torch.inference_mode():
        right = [
            (network(part).argmax(1) == wanted).float()
            for part, wanted in zip(x.split(batch), labels.split(batch), strict=True)
        ]
    return float(torch.cat(right).mean())
