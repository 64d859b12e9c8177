"""A small classifier with a fully connected head, trained on garment scenes; several papers explain its decisions."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classact.data.scenes import CLASSES, garment_scenes

LAYER = "relu4"  # the last feature map, 12 x 12 for scenes of 48 pixels
BATCH, RATE, WEIGHT_DECAY, DROPOUT = 64, 4e-3, 1e-2, 0.3


def scene_network(canvas: int = 48) -> nn.Sequential:
    """Four convolutions, two poolings and two fully connected layers, so that class activation mapping does not apply.

    Maps (N, 1, S, S) to logits (N, 10). The parts have names; that of the last feature map is `LAYER`.
    """
    parts: list[tuple[str, nn.Module]] = []
    width = 1
    for number, (channels, stride) in enumerate(((16, 2), (32, 1), (64, 1), (64, 1)), start=1):
        parts += [
            (f"conv{number}", nn.Conv2d(width, channels, 3, stride, padding=1, bias=False)),
            (f"norm{number}", nn.BatchNorm2d(channels)),
            (f"relu{number}", nn.ReLU()),
        ]
        if number in (2, 4):
            parts.append((f"pool{number}", nn.MaxPool2d(2)))
        width = channels
    parts += [
        ("flat", nn.Flatten()),
        ("hidden", nn.Linear(width * (canvas // 8) ** 2, 128)),
        ("hidden_relu", nn.ReLU()),
        ("dropout", nn.Dropout(DROPOUT)),
        ("classifier", nn.Linear(128, CLASSES)),
    ]
    return nn.Sequential(OrderedDict(parts))


def train(network: nn.Module, loss: Callable[[Tensor], Tensor], n: int, seed: int, epochs: int) -> nn.Module:
    """Train on n samples, `loss` being that of a batch of their indices; the network in evaluation mode.

    AdamW, one cycle of the learning rate up to 0.004, batches of 64.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * -(-n // BATCH))
    for _ in range(epochs):
        for chosen in torch.randperm(n, generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(chosen).backward()
            optimizer.step()
            cycle.step()
    return network.eval()


def train_multilabel(images: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """A `scene_network` trained with binary cross-entropy on images (n, 1, S, S) and multi-hot labels (n, 10)."""
    torch.manual_seed(seed)
    network = scene_network(images.shape[-1]).to(memory_format=torch.channels_last)  # half the time on CPUs
    images = images.contiguous(memory_format=torch.channels_last)

    def loss(chosen: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(network(images[chosen]), labels[chosen])

    return train(network, loss, len(images), seed, epochs)


def train_scene_classifier(seed: int, n_scenes: int = 4000, epochs: int = 6, **options: Any) -> nn.Module:
    """A network trained on garment scenes of its own seed; `options` go to `garment_scenes`. Explain its `LAYER`."""
    scenes = garment_scenes(n_scenes, seed, "train", **options)
    return train_multilabel(scenes.images, scenes.labels, seed, epochs)
