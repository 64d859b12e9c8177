"""Heatmaps of a batch beside a loop over OpenCV's ellipses, and a training step with alignment beside a plain one."""

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from classact.data.faces import EXPRESSIONS, SyntheticFaces
from classact.explain.aufer.codebook import CODEBOOKS, OFFICIAL, Span
from classact.explain.aufer.heatmap import AUHeatmap
from classact.explain.aufer.loss import SpatialAlignmentLoss, logits_and_features

N = 256


def half(span, points, axis):
    """Length of a half-axis in whole pixels."""
    if not isinstance(span, Span):
        return int(span)
    distance = points[list(span.last), axis].mean() - points[list(span.first), axis].mean()
    return max(int(distance / 2 + span.extra), 0) or int(span.default)


def opencv_map(points, expression, size):
    """One canvas per action unit, as one would draw it."""
    found = np.zeros((size, size))
    for unit in CODEBOOKS["official"][expression]:
        canvas = np.zeros((256, 256))
        for ellipse in OFFICIAL[unit]:
            x, y = int(points[list(ellipse.x), 0].mean()), int(points[list(ellipse.y), 1].mean())
            centre = x + int(ellipse.dx), y + int(ellipse.dy)
            axes = half(ellipse.rx, points, 0), half(ellipse.ry, points, 1)
            cv2.ellipse(canvas, centre, axes, 0, 0, 360, 1.0, cv2.FILLED)
        cells = cv2.blur(cv2.resize(canvas, (28, 28)), (3, 3))
        found = np.maximum(found, cv2.resize(cells, (size, size)))
    return found / max(found.max(), 1e-9)


def drawn(size):
    faces = SyntheticFaces(N, 48, seed=0)
    landmarks = np.trunc((faces.landmarks + 0.5) * 256 / 48)
    names = [EXPRESSIONS[label] for label in faces.labels]
    draw, points = AUHeatmap(256, size=size), torch.from_numpy(landmarks).float()
    labels = torch.from_numpy(faces.labels)

    def ours():
        return draw(points, labels)

    def theirs():
        return np.stack([opencv_map(one, name, size) for one, name in zip(landmarks, names, strict=True)])

    maps, valid = ours()
    difference = np.abs(maps[valid, 0].numpy() - theirs()[valid.numpy()])
    assert difference.mean() < 0.002  # of the map; single pixels on the outlines differ
    return ours, theirs


def test_heatmaps_on_the_grid(ratio):
    assert ratio("256 heatmaps of 28 x 28 / OpenCV loop", *drawn(28)) < 0.5


def test_heatmaps_of_the_size_of_the_image(ratio):
    assert ratio("256 heatmaps of 256 x 256 / OpenCV loop", *drawn(256)) < 1.5


def test_alignment_costs_little(ratio):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1)]
    model = nn.Sequential(*parts, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7))
    x, y, prior = torch.randn(32, 3, 96, 96), torch.arange(32) % 7, torch.rand(32, 1, 28, 28)
    align = SpatialAlignmentLoss()

    def plain():
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def aligned():
        model.zero_grad()
        logits, features = logits_and_features(model, x, ["5"])
        (F.cross_entropy(logits, y) + 4 * align(features, prior)).backward()

    assert ratio("training step with alignment / without", aligned, plain, rounds=21) < 1.15
