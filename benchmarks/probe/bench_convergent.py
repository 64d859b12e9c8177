"""Statistics beside one matrix product and numpy, matching beside networkx, sparse prediction beside scikit-learn's."""

import pickle

import networkx as nx
import numpy as np
import torch
from sklearn.linear_model import Lasso

from classact.probe.activations import ActivationStats
from classact.probe.convergent import SparsePrediction, match_units, mutual_information

SAMPLES, UNITS = 100_000, 512


def layers(samples, units):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, units, generator=generator)
    return x, x.roll(1, 1) + torch.randn(samples, units, generator=generator)


def between(batches, **settings):
    stats = ActivationStats(**settings)
    for a, b in batches:
        stats.update(a, b)
    return stats.corr_between()


def test_correlations_of_two_layers(ratio):
    x, y = layers(SAMPLES, UNITS)
    batches = list(zip(x.split(10_000), y.split(10_000), strict=True))
    expected = np.corrcoef(x[:, :40].T, y[:, :40].T)[:40, 40:]
    np.testing.assert_allclose(between(batches, within=False)[:40, :40], expected, atol=1e-5)
    name = f"correlations between two layers of {UNITS} units, {SAMPLES} samples / one matrix product"
    assert ratio(name, lambda: between(batches, within=False), lambda: x.T @ y) < 1.5
    name = "the same with correlations within the layers / three products"
    ratio(name, lambda: between(batches), lambda: (x.T @ x, x.T @ y, y.T @ y))


def test_statistics_keep_no_activations():
    x, y = layers(2000, 64)
    stats, sizes = ActivationStats(), set()
    for _ in range(5):
        stats.update(x, y)
        sizes.add(len(pickle.dumps(stats)))
    assert len(sizes) == 1
    assert sizes.pop() < 120_000 < x.nbytes


def test_matching(ratio):
    C = np.random.default_rng(0).uniform(-1, 1, (64, 64))

    def theirs():
        graph = nx.Graph()
        graph.add_weighted_edges_from((i, 64 + j, C[i, j]) for i in range(64) for j in range(64))
        return nx.max_weight_matching(graph, maxcardinality=True)

    pairs = {tuple(sorted(pair)) for pair in theirs()}
    ours = match_units(C)
    assert {(i, 64 + j) for i, j in zip(ours.index1.tolist(), ours.index2.tolist(), strict=True)} == pairs
    assert ratio("matching of 64 units / networkx", lambda: match_units(C), theirs, rounds=3) < 0.1


def test_sparse_prediction(ratio):
    x, y = (c.double().numpy() for c in layers(10_000, 64))
    x, y = ((c - c.mean(0)) / c.std(0) for c in (x, y))
    alphas = (0.3, 0.1, 0.03, 0.01)

    def ours():
        return SparsePrediction(alphas, alpha=0.1).fit(x, y).coef_path_

    def theirs():
        gram = x.T @ x
        return np.array([
            [Lasso(alpha, precompute=gram, tol=1e-8).fit(x, target).coef_ for target in y.T] for alpha in alphas
        ])  # fmt: skip

    np.testing.assert_allclose(ours(), theirs(), atol=1e-5)
    assert ratio("sparse prediction, 64 units and 4 penalties / a Lasso for each unit", ours, theirs, rounds=3) < 0.5


def test_mutual_information(ratio):
    x, y = (torch.relu(c).numpy() for c in layers(20_000, 16))
    cuts = [[np.quantile(c[:, k][c[:, k] > 0], np.linspace(0, 1, 10)) for k in range(16)] for c in (x, y)]

    def theirs():
        found = np.empty((16, 16))
        for i in range(16):
            for j in range(16):
                bins = [np.r_[-1, 1e-9, cut[1:-1] * (1 + 1e-7), np.inf] for cut in (cuts[0][i], cuts[1][j])]
                p = np.histogram2d(x[:, i], y[:, j], bins)[0] / len(x)
                outer = p.sum(1, keepdims=True) * p.sum(0)
                found[i, j] = (p[p > 0] * np.log(p[p > 0] / outer[p > 0])).sum()
        return found

    np.testing.assert_allclose(mutual_information(x, y, bias="none"), theirs(), atol=1e-4)
    name = "mutual information of 16 x 16 units / a histogram for each pair"
    assert ratio(name, lambda: mutual_information(x, y), theirs, rounds=3) < 0.5
