import itertools
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.metrics import adjusted_rand_score, r2_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import classact
from classact.probe.activations import (
    ActivationStats,
    aligned_positions,
    channel_axis_of,
    find_layer,
    in_step,
    observed,
)
from classact.probe.convergent import (
    ConvergenceReport,
    CrossNetClusters,
    SparsePrediction,
    Stitch1x1,
    align,
    canonical_correlations,
    collect_stats,
    convergence_report,
    cycle_order,
    fewest_contributors,
    fit_stitch,
    information,
    layer_similarity,
    match_units,
    matching_overlap,
    mutual_information,
    reset_copy,
)

REFERENCE = np.load(Path(__file__).parent / "data" / "convergent_reference.npz")
EXAMPLE = np.array([[0.9, 0.8, 0.1], [0.85, 0.3, 0.2], [0.2, 0.1, 0.05]])


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def stats_of(a, b=None, **settings):
    stats = ActivationStats(**settings)
    stats.update(a, b)
    return stats


def small_cnn(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(width, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def images(n=120, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def loader(x, batch_size=25, **settings):
    return DataLoader(x, batch_size=batch_size, **settings)


def permuted_copy(model, order):
    """The same function, with the channels of the first convolution in another order."""
    copy = small_cnn(width=len(order))
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(copy[0], name).copy_(getattr(model[0], name)[order])
        copy[4].weight.copy_(model[4].weight[:, order])
    return copy


def planted(t=3000, seed=0):
    """Two codes of the same samples: 8 shared units, 3 subspaces of 3 units turned in each, 4 private ones, noise."""
    rng = np.random.default_rng(seed)
    shared, spaces = rng.normal(size=(t, 8)), rng.normal(size=(t, 3, 3))
    codes, groups, orders = [], np.r_[range(8), np.repeat(range(8, 11), 3), [-1] * 4], []
    for _ in range(2):
        turned = [spaces[:, k] @ np.linalg.qr(rng.normal(size=(3, 3)))[0] for k in range(3)]
        code = np.concatenate([shared, *turned, rng.normal(size=(t, 4))], 1) + 0.3 * rng.normal(size=(t, 21))
        orders.append(rng.permutation(21))
        codes.append(torch.from_numpy(code[:, orders[-1]]))
    return codes, [groups[order] for order in orders]


# matching


def test_matchings_of_a_worked_example():
    bipartite, semi = match_units(EXAMPLE), match_units(EXAMPLE, "semi")
    assert bipartite.index2.tolist() == [1, 0, 2] and bipartite.value.mean() == pytest.approx(0.566667, abs=1e-6)
    assert semi.index2.tolist() == [0, 0, 0] and semi.value.mean() == pytest.approx(0.65)
    assert matching_overlap(EXAMPLE) == pytest.approx(1 / 3)
    assert match_units(torch.from_numpy(EXAMPLE)).index2.tolist() == [1, 0, 2]


def test_no_permutation_is_better_than_the_one_to_one_matching():
    rng = np.random.default_rng(0)
    for s in range(1, 7):
        C = rng.uniform(-1, 1, (s, s))
        best = max(C[range(s), list(perm)].sum() for perm in itertools.permutations(range(s)))
        assert match_units(C).value.sum() == pytest.approx(best)


def test_matching_equals_that_of_networkx():
    C = np.random.default_rng(0).uniform(-1, 1, (9, 14))
    graph = nx.Graph()
    graph.add_weighted_edges_from((i, 9 + j, C[i, j]) for i in range(9) for j in range(14))
    theirs = {tuple(sorted(pair)) for pair in nx.max_weight_matching(graph, maxcardinality=True)}
    ours = match_units(C)
    assert {(int(i), 9 + int(j)) for i, j in zip(ours.index1, ours.index2, strict=True)} == theirs
    assert len(match_units(C.T).value) == 9
    assert match_units(C.T).value.sum() == pytest.approx(ours.value.sum())


def test_matching_and_cycles_equal_the_authors():
    found = match_units(REFERENCE["C"])
    assert found.index2.tolist() == REFERENCE["order"].tolist()
    order, lengths = cycle_order(found.index2)
    assert order == REFERENCE["loops"].tolist() and lengths == REFERENCE["lengths"].tolist()


def test_negative_correlations_are_matches_if_asked_for():
    C = np.array([[-0.9, 0.1], [0.2, -0.8]])
    assert match_units(C).index2.tolist() == [1, 0]
    unsigned = match_units(C, signed=False)
    assert unsigned.index2.tolist() == [0, 1] and unsigned.value.tolist() == [0.9, 0.8]
    assert matching_overlap(C, signed=False) == 1


def test_dead_units_are_not_matched():
    C = np.array([[0.5, 0.0, -0.2], [0.0, 0.0, 0.0], [-0.3, 0.0, -0.4]])
    for method in ("bipartite", "semi"):
        assert match_units(C, method).index1.tolist() == [0, 2]
        assert 1 not in match_units(C, method).index2
    assert len(match_units(np.zeros((2, 3))).value) == 0
    assert np.isnan(matching_overlap(np.zeros((2, 3))))


# statistics


def test_uneven_batches_give_the_correlations_of_all_samples():
    a, b = normal(500, 7) @ normal(7, 7, seed=1) + 50, normal(500, 5, seed=2)
    b[:, 0] += a[:, 3]
    for within in (True, False):
        stats, other = ActivationStats(within=within), ActivationStats(within=within)
        ends = [0, 1, 8, 100, 101, 350, 499, 500]
        for k, (start, end) in enumerate(itertools.pairwise(ends)):
            (stats if k < 4 else other).update(a[start:end], b[start:end])
        stats = stats.merge(other)
        whole = np.corrcoef(a.T, b.T)
        assert stats.n == 500
        np.testing.assert_allclose(stats.corr_between(), whole[:7, 7:], atol=1e-10)
        np.testing.assert_allclose(stats.mean(1), a.mean(0), atol=1e-10)
        np.testing.assert_allclose(stats.std(2), b.std(0, correction=0), atol=1e-10)
        if within:
            np.testing.assert_allclose(stats.corr_within(1), whole[:7, :7], atol=1e-10)
            np.testing.assert_allclose(stats.corr_within(2), whole[7:, 7:], atol=1e-10)


def test_layers_may_differ_in_precision():
    a = normal(300, 4)
    found = stats_of(a.float(), a.flip(1)).corr_between()
    torch.testing.assert_close(found, stats_of(a, a.flip(1)).corr_between(), atol=1e-6, rtol=0)
    half = a.to(torch.bfloat16)
    np.testing.assert_array_equal(match_units(stats_of(half, half).corr_between().to(torch.bfloat16)).index2, range(4))


def test_single_precision_with_large_means_is_precise():
    a = (normal(20_000, 6) + 300).float()
    b = (a[:, [3, 1, 0]] + normal(20_000, 3, seed=1).float()) * 40
    expected = np.corrcoef(a.double().T, b.double().T)[:6, 6:]
    np.testing.assert_allclose(stats_of(a, b).corr_between(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(11, 4, 6, 5), (11, 4, 30), (3, 4, 100, 90)])
def test_every_position_is_a_sample(shape):
    a, b = normal(*shape), normal(*shape, seed=1)
    flat_a, flat_b = (x.movedim(1, -1).reshape(-1, 4) for x in (a, b + a))
    stats, flat = stats_of(a, a + b), stats_of(flat_a, flat_b)
    last = stats_of(a.movedim(1, -1), (a + b).movedim(1, -1), channel_axis=-1)
    for found in (stats, last):
        assert found.n == flat.n
        torch.testing.assert_close(found.corr_between(), flat.corr_between(), atol=1e-12, rtol=0)
        torch.testing.assert_close(found.corr_within(2), flat.corr_within(2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constant_units_are_reported_and_give_no_nan(dtype):
    a = normal(400, 5)
    a[:, 1], a[:, 3] = 0.1, 0
    a = a.to(dtype)
    stats = ActivationStats()
    for part in a.split(90):
        stats.update(part, part[:, :4])
    assert stats.dead(1).tolist() == [False, True, False, True, False]
    assert stats.dead(2).tolist() == [False, True, False, True]
    for C in (stats.corr_within(1), stats.corr_between(), stats.corr_within(2)):
        assert C.isfinite().all() and not C[1].any() and not C[:, 3].any()
    one = align(stats, stats, "x", alphas=(0.0, 1e-2), n_clusters=2)
    assert one.dead1.tolist() == [1, 3] and one.clusters.labels_[[1, 3, 6, 8]].tolist() == [-1] * 4
    assert np.isnan(one.r2[:, [1, 3]]).all() and np.isfinite(one.r2[:, [0, 2]]).all()
    assert all(np.isfinite(v) for k, v in one.row().items() if isinstance(v, float))


def test_the_permuted_control_pairs_every_image_with_another():
    at = torch.arange(40.0).double()
    stats = stats_of(at[:, None], (at[:, None] == at).double(), permuted=True, seed=3)  # unit j marks image j
    partner = stats.cov_between(permuted=True)[0] * 40 + at.mean()
    np.testing.assert_allclose(sorted(partner.tolist()), at, atol=1e-9)
    assert (partner.round() != at).all()


def test_the_permuted_control_leaves_out_batches_of_one_image():
    a = normal(60, 3) + 5
    parts = [a[:30], a[30:31], a[31:32], a[32:]]
    stats, without = (ActivationStats(permuted=True, seed=1) for _ in range(2))
    for part in parts:
        stats.update(part, part)
        if len(part) > 1:
            without.update(part, part)
    torch.testing.assert_close(stats.cov_between(permuted=True), without.cov_between(permuted=True))
    halves = [stats_of(part, part, permuted=True, seed=1) for part in (a[:30], a[30:31])]
    merged = halves[0].merge(halves[1])
    assert merged.n == 31
    torch.testing.assert_close(merged.cov_between(permuted=True), halves[0].cov_between(permuted=True))


def test_the_permuted_control_keeps_what_positions_do():
    place = torch.linspace(0, 1, 30).double()
    a, b = normal(200, 2, 30), normal(200, 2, 30, seed=1)
    a[:, 0], b[:, 0] = a[:, 0] + 20 * place, b[:, 0] + 20 * place
    b[:, 1] += a[:, 1]
    stats = ActivationStats(permuted=True)
    for part in range(0, 200, 50):
        stats.update(a[part : part + 50], b[part : part + 50])
    real, control = stats.corr_between(), stats.corr_between(permuted=True)
    assert real[0, 0] > 0.9 and control[0, 0] > 0.9  # both brighter at one end
    assert real[1, 1] > 0.6 and abs(control[1, 1]) < 0.05


# mutual information


def test_information_of_worked_histograms():
    found = np.array([[40.0, 10.0], [10.0, 40.0]])
    assert information(found, "none") == pytest.approx(0.192745, abs=1e-6)
    assert information(found, "official") == pytest.approx(0.163891, abs=1e-6)
    assert information(found) == pytest.approx(0.192745 - 1 / 200, abs=1e-6)
    assert information(np.full((2, 2), 25.0), "none") == pytest.approx(0, abs=1e-12)


def test_information_of_independent_units_is_unbiased():
    x, y = normal(3000, 8).numpy(), normal(3000, 8, seed=1).numpy()
    plain, corrected, official = (
        mutual_information(x, y, zero_bin=False, bias=bias).mean() for bias in ("none", "miller-madow", "official")
    )
    assert plain > 0.01 and abs(corrected) < 0.002 and official < -0.005


def test_information_is_close_to_the_authors():
    x, y = REFERENCE["x"], REFERENCE["y"]
    np.testing.assert_allclose(mutual_information(x, y, bias="none"), REFERENCE["information"], atol=2e-3)
    np.testing.assert_allclose(mutual_information(x, y, bias="official"), REFERENCE["corrected"], atol=2e-3)


def test_information_knows_no_scale_and_finds_what_correlation_misses():
    x = torch.relu(normal(2000, 3))
    y = torch.stack([x[:, 2], (x[:, 0] - 0.7).square()], 1)
    found = mutual_information(x, y)
    np.testing.assert_allclose(mutual_information(7 * x, 1e-4 * y), found, atol=1e-12)
    assert found.argmax(0).tolist() == [2, 0]
    constant = mutual_information(torch.zeros(100, 1), x[:100])
    np.testing.assert_allclose(constant, 0, atol=1e-12)


# sparse prediction


def test_a_permuted_copy_needs_one_contributor():
    mixing = normal(6, 6, seed=1)
    x = normal(800, 6) @ mixing + 3
    order = [4, 2, 0, 5, 1, 3]
    alphas = (0.05, 0.4, 0.9)
    fitted = SparsePrediction(alphas=alphas, alpha=0.4).fit(x.numpy(), 5 * x[:, order].numpy() - 1)
    for alpha, coef, n in zip(alphas, fitted.coef_path_, fitted.n_contributors_, strict=True):
        np.testing.assert_allclose(coef, (1 - alpha) * np.eye(6)[order], atol=1e-5)
        assert (n == 1).all()
    assert match_units(stats_of(x, x[:, order]).corr_between().T).index2.tolist() == order


def test_sparse_prediction_equals_scikit_learns_lasso():
    codes, _ = planted(400)
    x, y = ((c - c.mean(0)) / c.std(0, correction=0) for c in codes)
    alphas = (0.3, 0.0, 0.02, 0.1)
    fitted = SparsePrediction(alphas=alphas, alpha=0.0).fit(codes[0].numpy(), codes[1].numpy())
    for k, alpha in enumerate(alphas):
        peer = LinearRegression() if alpha == 0 else Lasso(alpha, tol=1e-10, max_iter=10_000)
        peer.fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(fitted.coef_path_[k], peer.coef_, atol=1e-6)
        error = ((y.numpy() - peer.predict(x.numpy())) ** 2).mean(0) / 2
        np.testing.assert_allclose(fitted.half_mse_path_[k], error, atol=1e-8)


def test_held_out_scores_from_moments_equal_those_of_predictions():
    codes, _ = planted(600)
    (x, x_out), (y, y_out) = (c.split(400) for c in codes)
    fitted = SparsePrediction().fit(x.numpy(), y.numpy())
    half_mse, r2 = fitted.evaluate(stats_of(x_out, y_out))
    at = fitted.alphas.index(fitted.alpha)
    predicted = fitted.predict(x_out.numpy())
    np.testing.assert_allclose(r2[at], r2_score(y_out, predicted, multioutput="raw_values"), atol=1e-9)
    error = ((predicted - y_out.numpy()) ** 2).mean(0) / (2 * y.numpy().var(0))
    np.testing.assert_allclose(half_mse[at], error, atol=1e-9)
    assert fitted.score(x_out.numpy(), y_out.numpy()) == pytest.approx(r2[at].mean())
    one = SparsePrediction().fit(x.numpy(), y[:, 3].numpy())
    np.testing.assert_allclose(one.predict(x_out.numpy()), predicted[:, 3], atol=1e-6)


def test_units_that_repeat_each_other_do_not_break_the_fit():
    x = normal(300, 3)
    doubled = torch.cat([x, x[:, :1]], 1)
    fitted = SparsePrediction(alphas=(0.0, 0.1), alpha=0.1).fit(doubled.numpy(), x.numpy())
    np.testing.assert_allclose(fitted.half_mse_path_[0], 0, atol=1e-9)
    np.testing.assert_allclose(fitted.coef_path_[0, 0], [0.5, 0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(fitted.half_mse_path_[1], 0.005, atol=1e-4)


def test_contributors_of_planted_units():
    codes, groups = planted()
    fit, held_out = (stats_of(*(c[part] for c in codes)) for part in (slice(2000), slice(2000, None)))
    one = align(fit, held_out, "planted", alphas=(0.0, 0.03, 0.1, 0.3), n_clusters=11)
    shared, turned, private = (np.isin(groups[1], kind) for kind in (range(8), range(8, 11), [-1]))
    assert (one.contributors[1][shared] == 1).all() and one.contributors[1][turned].mean() > 2.5
    assert abs(one.contributors[1][turned] - 3).max() <= 1
    assert one.best_r2[shared | turned].min() > 0.75 and one.best_r2[private].max() < 0.05
    assert (one.best_r2 - one.single_r2)[turned].mean() > 0.15 > 0.05 > abs(one.best_r2 - one.single_r2)[shared].max()
    pairs = {(groups[0][i], groups[1][j]) for i, j in zip(one.bipartite.index1, one.bipartite.index2, strict=True)}
    assert {(k, k) for k in range(8)} <= pairs
    np.testing.assert_allclose(np.sort(one.bipartite.value)[-8:], 1 / 1.09, atol=0.02)


def test_fewest_contributors_reach_nine_tenths():
    r2 = np.array([[0.5, -0.1, np.nan], [0.46, -0.2, np.nan], [0.3, 0.0, np.nan]])
    n = np.array([[9, 5, 0], [2, 3, 0], [1, 0, 0]])
    np.testing.assert_array_equal(fewest_contributors(r2, n), [2, np.nan, np.nan])


@parametrize_with_checks([SparsePrediction(alphas=(0.0, 1e-3), max_iter=100_000)])
@pytest.mark.bare
@pytest.mark.filterwarnings("ignore")
def test_sparse_prediction_is_an_estimator(estimator, check):
    check(estimator)


def test_stitching_by_gradients_ends_where_the_convex_problem_does():
    codes, _ = planted(600)
    x, y = (c.float() for c in codes)
    stats = stats_of(x, y)
    torch.manual_seed(0)
    stitch = Stitch1x1(21, 21, l1=0.1).standardise(stats)
    losses = fit_stitch(stitch, ((x, y) for _ in range(400)), lr=3e-3, momentum=0.95, halve_every=60)
    convex = SparsePrediction(alphas=(0.1,), alpha=0.1).fit_stats(stats)
    assert losses[0] > 0.49
    np.testing.assert_allclose(stitch.weight.detach(), convex.coef_path_[0], atol=0.01)
    penalty = 0.1 * np.abs(convex.coef_path_[0]).sum() / 21
    assert losses[-1] == pytest.approx(convex.half_mse_path_[0].mean() + penalty, abs=2e-3)
    np.testing.assert_allclose(stitch(x).detach(), convex.predict(x.numpy()), atol=0.3)
    maps = x[:20].reshape(2, 2, 5, 21).permute(0, 3, 1, 2)
    torch.testing.assert_close(stitch(maps).permute(0, 2, 3, 1).reshape(20, 21), stitch(x[:20]))


@pytest.mark.bare
def test_stitching_layer_compiles_exports_and_runs_in_half_precision(tmp_path):
    torch.manual_seed(0)
    stitch, x = Stitch1x1(4, 3, 1e-3), torch.randn(2, 4, 5, 5)
    expected = stitch(x)
    torch.testing.assert_close(torch.compile(stitch, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(stitch, (x,)).module()(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stitch.loss(x, expected.detach())
    loss.backward()
    assert loss.isfinite() and stitch.weight.grad.isfinite().all()
    stitch.mean1 += 1
    loaded = classact.load(classact.save(stitch, tmp_path / "stitch"), Stitch1x1(**stitch.config))
    torch.testing.assert_close(loaded(x), stitch(x))


# clusters


def test_blocks_of_units_are_clusters_of_eigenvalue_zero():
    block = np.repeat([0, 1, 2, 0, 1, 2], [2, 1, 3, 3, 1, 2])  # 6 units of the first, 6 of the second network
    joint = np.where(block[:, None] == block, 0.7, 0) + 0.3 * np.eye(12)
    for linkage in (None, "average"):
        found = CrossNetClusters(3, linkage).fit(joint[:6, :6], -joint[:6, 6:], joint[6:, 6:])
        assert adjusted_rand_score(block, found.labels_) == 1
        np.testing.assert_allclose(found.eigenvalues_[:3], 0, atol=1e-12)
        assert found.eigenvalues_[3] > 0.1 and found.eigenvalues_.max() <= 2
        sizes = [(len(g.units1), len(g.units2)) for g in found.groups()]
        assert sorted(sizes) == [(1, 1), (2, 3), (3, 2)]
        assert [g.correlation for g in found.groups()] == pytest.approx([0.7] * 3)


def test_planted_subspaces_are_clusters():
    codes, groups = planted()
    stats = stats_of(*codes)
    blocks = stats.corr_within(1), stats.corr_between(), stats.corr_within(2)
    true, known = np.concatenate(groups), np.concatenate(groups) >= 0
    for linkage in (None, "average"):
        found = CrossNetClusters(19, linkage).fit(*blocks)  # 8 pairs, 3 subspaces, 8 private units
        assert adjusted_rand_score(true[known], found.labels_[known]) > 0.85
    assert len(np.unique(found.cut(5))) == 5
    spans = [g for g in found.groups() if len(g.units1) == 3 and len(g.units2) == 3]
    assert spans and all(g.cosines.min() > 0.85 for g in spans)


def test_neither_scale_nor_offset_nor_sign_of_scale_of_all_matters():
    (a, b), _ = planted(500)
    scale, offset = 0.1 + normal(21, seed=3).abs(), normal(21, seed=4)
    first, second = stats_of(a, b), stats_of(a * scale + offset, b * scale.flip(0) - offset)
    for name, nets in (("corr_within", (1,)), ("corr_between", ()), ("corr_within", (2,))):
        torch.testing.assert_close(getattr(first, name)(*nets), getattr(second, name)(*nets), atol=1e-10, rtol=0)
    labels = [
        CrossNetClusters(9).fit(s.corr_within(1), s.corr_between(), s.corr_within(2)).labels_ for s in (first, second)
    ]
    assert adjusted_rand_score(*labels) == 1


# whole layers


def test_similarity_of_layers_equals_that_from_all_samples():
    (a, b), _ = planted(300)
    b = b[:, :9]
    stats = stats_of(a, b)
    found = layer_similarity(stats.cov_within(1), stats.cov_between(), stats.cov_within(2), share=1)
    x, y = (c.numpy() - c.numpy().mean(0) for c in (a, b))
    gram_x, gram_y = x @ x.T, y @ y.T  # kernels of the samples
    assert found.cka == pytest.approx((gram_x * gram_y).sum() / np.linalg.norm(gram_x) / np.linalg.norm(gram_y))
    basis = [np.linalg.qr(c)[0] for c in (x, y)]
    cosines = np.linalg.svd(basis[0].T @ basis[1], compute_uv=False)
    assert found.svcca == pytest.approx(cosines.mean())
    _, scale = orthogonal_procrustes(np.pad(y, ((0, 0), (0, 12))), x)
    assert found.procrustes == pytest.approx(scale / np.linalg.norm(x) / np.linalg.norm(y))


def test_svcca_drops_weak_directions():
    a = normal(500, 3) * torch.tensor([3.0, 2.0, 0.01])
    b = a.clone()
    b[:, 2] = normal(500, seed=1) * 0.01
    stats = stats_of(a, b)
    S = [S.numpy() for S in (stats.cov_within(1), stats.cov_between(), stats.cov_within(2))]
    np.testing.assert_allclose(canonical_correlations(*S, share=0.99), [1, 1], atol=1e-4)
    assert canonical_correlations(*S).min() < 0.2


# models and loaders


def test_a_permuted_and_mixed_copy_of_a_network_is_matched_exactly():
    model, order = small_cnn(), [3, 0, 5, 1, 4, 2]
    copy = permuted_copy(model, order)
    report = convergence_report(model, copy, ["0", "4", "8"], loader(images()), untrained=None, signed=False)
    first = report["0"]
    assert first.bipartite.index2[order].tolist() == list(range(6)) and first.overlap == 1
    assert first.bipartite.value.min() > 0.9999 and report["8"].similarity.cka > 0.999
    with torch.no_grad():  # now two channels are mixes of two
        copy[0].weight[[0, 1]] += copy[0].weight[[1, 2]]
        copy[0].bias[[0, 1]] += copy[0].bias[[1, 2]]
    mixed = convergence_report(model, copy, ["0"], loader(images()), untrained=None)["0"]
    assert mixed.r2[0].min() > 0.9999  # least squares
    others = mixed.bipartite.index2[[order[k] for k in range(2, 6)]]
    assert others.tolist() == [2, 3, 4, 5]


def test_report_has_controls_and_can_be_saved(tmp_path):
    first, second = small_cnn(1), small_cnn(2)
    layers = ["2", ("8", "8")]
    batches = loader(TensorDataset(images(), torch.zeros(120).long()))
    report = convergence_report(first, second, layers, batches, alphas=(0.0, 1e-2, 0.1))
    assert report.layers == ("2", "8") and report.conditions == ("trained", "untrained", "permuted")
    table = report.table()
    assert len(table) == 6 and table.drop(columns="contributors").notna().all(axis=None)
    chosen = table.set_index(["layer", "condition"])
    assert chosen.loc[("2", "trained"), "samples"] == 120 * 64
    assert chosen.loc[("8", "permuted"), "bipartite"] < chosen.loc[("8", "trained"), "bipartite"]
    np.testing.assert_array_equal(report["8"].C11, report["8", "permuted"].C11)
    for figure in (report.plot(), report.plot_prediction(), report.plot_joint("8")):
        text = " ".join(t.get_text() for t in figure.findobj(lambda x: hasattr(x, "get_text")))
        assert all(f"{condition}, CKA" in text for condition in report.conditions)
    folder = ConvergenceReport(("8",), report.conditions, report.alignments[3:]).save(tmp_path / "report")
    assert sorted(f.name for f in folder.iterdir()) == [
        "arrays.npz", "joint_0.png", "matches.png", "prediction.png", "report.json",
    ]  # fmt: skip
    assert json.loads((folder / "report.json").read_text())["alignments"][0]["layer"] == "8"
    np.testing.assert_array_equal(np.load(folder / "arrays.npz")["0/C12"], report["8"].C12)
    with pytest.raises(KeyError, match="no layer '3', trained; there are 2, 8"):
        report["3"]


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    report = convergence_report(small_cnn(1), small_cnn(2), ["8"], loader(images()), untrained=None)
    monkeypatch.setattr(type(report), "plot_prediction", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_same_seed_same_report():
    first, second = small_cnn(1), small_cnn(2)
    tables = [
        convergence_report(
            first, second, ["2"], loader(images(60)), alphas=(0.0, 0.1), seed=seed, max_positions=20
        ).table()
        for seed in (4, 4, 5)
    ]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


def test_report_equals_the_statistics_of_all_activations():
    first, second = small_cnn(1), small_cnn(2)
    first(images()), second(images())  # running statistics
    stats = collect_stats(first, second, "2", "2", loader(images(), 7))
    a, b = (model.eval()[:3](images()).detach() for model in (first, second))
    expected = stats_of(a, b).corr_between()
    torch.testing.assert_close(stats.corr_between(), expected, atol=1e-5, rtol=0)
    report = convergence_report(first, second, ["2"], loader(images()))
    np.testing.assert_allclose(report["2"].C12, expected, atol=1e-5)


def test_models_are_left_as_they_were():
    first, second = small_cnn(1), small_cnn(2)
    first[1].eval()
    second[0].weight.requires_grad_(False)
    second(images()).sum().backward()

    def state(model):
        return (
            [m.training for m in model.modules()],
            [len(m._forward_hooks) for m in model.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
            [t.clone() for t in model.state_dict().values()],
        )

    def same(before, after):
        torch.testing.assert_close(before[3], after[3], rtol=0, atol=0)
        grads = [[g for _, g in s[2] if g is not None] for s in (before, after)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
        assert before[:2] == after[:2] and [r for r, _ in before[2]] == [r for r, _ in after[2]]

    random = torch.get_rng_state()
    before = state(first), state(second)
    convergence_report(first, second, ["2", "5"], images().split(25))  # a DataLoader would draw a seed
    same(before[0], state(first)), same(before[1], state(second))
    assert torch.equal(random, torch.get_rng_state())

    def broken():
        yield images(10)
        yield torch.zeros(5, 3, 8, 8)

    with pytest.raises(RuntimeError):
        convergence_report(first, second, ["2", "5"], broken())
    same(before[0], state(first)), same(before[1], state(second))
    with pytest.raises(ValueError, match="has no layer 'conv'; there are"):
        collect_stats(first, second, "2", "conv", loader(images()))
    same(before[0], state(first)), same(before[1], state(second))


def test_outputs_are_watched_before_later_operations_in_place():
    model = small_cnn().eval()
    with observed([model], [["1", "2"]]) as run:
        (found,) = run([images()])
    assert found["1"].min() < 0 and torch.equal(found["2"], found["1"].relu())


def test_two_layers_of_one_network_are_compared():
    model = small_cnn().eval()
    found = convergence_report(model, model, [("4", "5"), ("5", "5")], images().split(25), untrained=None)
    assert found["5"].similarity.cka > 0.9999 and found["5"].bipartite.index2.tolist() == list(range(8))
    a = model[:5](images()).detach()
    expected = stats_of(a, a.relu()).corr_between()
    np.testing.assert_allclose(found["4 | 5"].C12, expected, atol=1e-5)


def test_untrained_copies_are_new_and_independent():
    model = small_cnn(7)
    model(images())
    first, again, second = (reset_copy(model, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, model[0].weight)
    assert not first[1].running_mean.any() and model[1].running_mean.any()

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.token = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match="untrained: token cannot be initialised anew; give untrained="):
        reset_copy(Tokens(), 0)


def test_two_loaders_may_differ_in_normalisation_and_size_but_not_in_order():
    x = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x += 3 * torch.nn.functional.interpolate(torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(1)), 16)
    y = torch.arange(60) % 3
    other = torch.nn.functional.interpolate(2 * x - 1, 32, mode="bilinear")
    loaders = [loader(TensorDataset(x, y), 10), loader(TensorDataset(other, y), 10)]
    seen = list(in_step(loaders))
    assert len(seen) == 6 and torch.equal(seen[1][1], other[10:20])
    for batch_size in (1, 10):
        shuffled = loader(other, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match="most like their partner from the other loader; the loaders must yield"):
            list(in_step([loader(x, batch_size), shuffled]))
    late = [torch.cat([first] * 10 + [second] * 10) for first, second in ((x, x), (other, other.roll(1, 0)))]
    with pytest.raises(ValueError, match="of 276 inputs are most like"):  # the order is lost after 600 items
        list(in_step([loader(part, 20) for part in late]))
    with pytest.raises(ValueError, match="the labels of two loaders differ; the loaders must yield"):
        list(in_step([loaders[0], loader(TensorDataset(other, y.flip(0)), 10)]))
    with pytest.raises(ValueError, match="expected loaders of equal length, one ended before another"):
        list(in_step([loader(x, 10), loader(x[:50], 10)]))
    with pytest.raises(ValueError, match="expected batches of equal size, got 10 and 15 items"):
        list(in_step([loader(x, 10), loader(x, 15)]))
    with pytest.raises(ValueError, match="the inputs of two loaders differ"):
        list(in_step([loader(y[:, None], 10), loader(y.flip(0)[:, None], 10)]))
    with pytest.raises(ValueError, match=r"\(10, 3\) and \(10, 4\) cannot be compared"):
        list(in_step([loader(torch.rand(20, 3), 10), loader(torch.rand(20, 4), 10)]))
    for shape in ((20,), (20, 2)):
        with pytest.raises(ValueError, match="cannot be compared"):
            list(in_step([loader(torch.rand(shape), 10), loader(torch.rand(shape), 10)]))
    with pytest.raises(ValueError, match="expected batches x or"):
        list(in_step([[{"x": x}]]))


def test_networks_of_different_kind_are_compared_by_pooling():
    a, b = normal(4, 3, 8, 8), normal(4, 5, 4, 4)
    first, second = aligned_positions(a, b, "grid")
    assert first.shape == (4, 3, 16) and second.shape == (4, 5, 16)
    torch.testing.assert_close(first[:, :, 0], a[:, :, :2, :2].mean((2, 3)))
    first, second = aligned_positions(a, normal(4, 5), "mean")
    assert first.shape == (4, 3, 1) and second.shape == (4, 5, 1)
    first, second = aligned_positions(a, a, max_positions=7)
    assert first.shape == (4, 3, 7) and torch.equal(first, second)
    with pytest.raises(ValueError, match=r"have positions \(8, 8\) and \(4, 4\); give pool='grid'"):
        aligned_positions(a, b)
    with pytest.raises(ValueError, match=r"have positions \(8, 8\) and \(16, 4\)"):
        aligned_positions(a, normal(4, 5, 16, 4))
    assert aligned_positions(a, normal(4, 5, 64))[1].shape == (4, 5, 64)
    with pytest.raises(ValueError, match=r"have positions \(8, 8\) and \(\)"):
        aligned_positions(a, normal(4, 5), "grid")


def test_axis_of_units_is_told_from_the_layers():
    tokens = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.LayerNorm(12))
    series = nn.Sequential(nn.Conv1d(2, 12, 3), nn.GELU())
    assert channel_axis_of(tokens, "1", torch.zeros(2, 7, 12)) == 2
    assert channel_axis_of(tokens, "2", torch.zeros(2, 4, 4, 12)) == 3
    assert channel_axis_of(series, "1", torch.zeros(2, 12, 9)) == 1
    assert channel_axis_of(nn.Sequential(nn.ReLU()), "0", torch.zeros(2, 3, 4, 4)) == 1
    assert channel_axis_of(nn.Sequential(nn.ReLU(), nn.Linear(9, 4)), "0", torch.zeros(2, 3, 4, 4)) == 1
    with pytest.raises(ValueError, match=r"the output \(2, 3, 4\) of '0' may be \(N, C, T\) or \(N, L, D\)"):
        channel_axis_of(nn.Sequential(nn.ReLU()), "0", torch.zeros(2, 3, 4))
    vision = nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), nn.ReLU())
    cnn = small_cnn()
    report = convergence_report(vision, cnn, [("2", "5")], loader(images()), pool="mean")
    assert report["2 | 5"].C12.shape == (16, 8)


def test_layers_that_cannot_be_watched_are_refused():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    with pytest.raises(ValueError, match="'1' is called more than once in a pass"), observed([model], [["1"]]) as run:
        run([torch.zeros(2, 3)])
    unused = nn.ModuleDict({"used": nn.Linear(3, 3), "not": nn.Linear(3, 3)})
    unused.forward = unused["used"].forward
    with (
        pytest.raises(ValueError, match="not of ModuleDict is not called in a pass"),
        observed([unused], [["not"]]) as run,
    ):
        run([torch.zeros(2, 3)])
    assert not any(m._forward_hooks for m in [*model.modules(), *unused.modules()])
    with pytest.raises(ValueError, match="has no layer 'us'; there are used"):
        find_layer(unused, "us")


# bad input


def bad(stats, a, b=None):
    return lambda: stats.update(a, b)


@pytest.mark.bare
@pytest.mark.filterwarnings("ignore", category=ConvergenceWarning)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(ActivationStats(), torch.zeros(3, 2), torch.zeros(4, 2)), r"a, b: expected equal images and positions"),
        (bad(ActivationStats(), torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)), r"got shapes \(3, 2, 4\) and \(3, 2, 5\)"),
        (bad(ActivationStats(), torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 8, 2)), "a, b: expected equal images and"),
        (lambda: align(*[stats_of(torch.ones(9, 2), torch.zeros(9, 2))] * 2, "fc"), "layer: all units of 'fc', train"),
        (bad(ActivationStats(), torch.zeros(3)), r"units on axis 1, got shape \(3,\)"),
        (bad(stats_of(torch.rand(3, 2)), torch.rand(3, 4)), r"expected \[2\] units as before, got \[4\]"),
        (bad(stats_of(torch.rand(3, 2)), torch.rand(3, 2), torch.rand(3, 2)), r"expected \[2\] units as before"),
        (bad(ActivationStats(), torch.tensor([[1.0, torch.nan]] * 3)), r"a: expected finite .* in units \[1\]"),
        (bad(ActivationStats(), torch.rand(2, 1), torch.tensor([[torch.inf]] * 2)), r"b: expected finite .* \[0\]"),
        (lambda: stats_of(torch.rand(2, 2)).corr_within(), "update: expected at least 3 samples, got 2"),
        (lambda: ActivationStats().mean(), "update: expected at least 3 samples, got 0"),
        (lambda: stats_of(torch.rand(5, 2)).corr_between(), "net: expected 1 to 1, the layers seen, got 2"),
        (lambda: stats_of(torch.rand(5, 2), within=False).corr_within(), "within: these statistics were asked for"),
        (lambda: stats_of(torch.rand(5, 2), torch.rand(5, 2)).corr_between(True), "permuted: expected permuted=True"),
        (lambda: ActivationStats().merge(ActivationStats(within=False)), "other: expected statistics with the same"),
        (lambda: stats_of(torch.rand(5, 2)).merge(stats_of(torch.rand(5, 3))), "other: expected statistics of the"),
        (lambda: match_units(np.zeros(3)), r"C: expected a matrix \(s1, s2\), got shape \(3,\)"),
        (lambda: match_units(np.full((2, 2), np.nan)), "C: expected finite values"),
        (lambda: match_units(EXAMPLE, "best"), "method: expected 'bipartite' or 'semi', got 'best'"),
        (lambda: cycle_order([0, 2]), r"perm: expected a permutation of 0 to 1, got \[0, 2\]"),
        (lambda: information(np.ones((2, 2)), "x"), "bias: expected 'miller-madow', 'none' or 'official', got 'x'"),
        (lambda: mutual_information(np.zeros((2, 1)), np.zeros((2, 1))), "x: expected at least 3 samples, got 2"),
        (lambda: mutual_information(np.zeros((5, 1)), np.zeros((4, 1))), "expected equally many samples, got 5 and 4"),
        (lambda: mutual_information(np.zeros((5, 1)), np.zeros((5, 1)), bins=1), "bins: expected at least 2, got 1"),
        (lambda: mutual_information(np.full((5, 1), np.nan), np.zeros((5, 1))), "x: expected finite values"),
        (lambda: SparsePrediction(alphas=(-1,)).fit(np.eye(4), np.eye(4)), "alphas: expected penalties of 0 or more"),
        (lambda: SparsePrediction(alpha=7).fit(np.eye(4), np.eye(4)), "alpha: expected one of alphas"),
        (lambda: Stitch1x1(0, 2), "c1: expected at least 1, got 0"),
        (lambda: Stitch1x1(2, 2)(torch.zeros(1, 3)), r"x: expected shape \(N, 2, ...\), got \(1, 3\)"),
        (lambda: CrossNetClusters(7).fit(np.eye(3), EXAMPLE, np.eye(3)), "n_clusters: expected 1 to 6, the number"),
        (lambda: CrossNetClusters(2).fit(np.eye(2), EXAMPLE, np.eye(3)), r"C11, C12, C22: expected \(s1, s1\)"),
        (lambda: CrossNetClusters(2, "ward").fit(np.eye(3), EXAMPLE, np.eye(3)), "linkage: expected None or 'average'"),
        (lambda: aligned_positions(torch.zeros(1, 1), torch.zeros(1, 1), "max"), "pool: expected 'none', 'grid' or"),
        (lambda: convergence_report(small_cnn(), small_cnn(), [], [images()]), "layers: expected at least one"),
        (lambda: convergence_report(small_cnn(), small_cnn(), ["2"], [images()], held_out=1.0), "held_out: expected a"),
        (lambda: convergence_report(small_cnn(), small_cnn(), ["8"], [images(2)]), "at least 3 samples, got"),
        (lambda: convergence_report(small_cnn(), small_cnn(), ["8"], []), "at least 3 samples, got 0"),
        (
            lambda: convergence_report(small_cnn(), small_cnn(), ["2"], loader(images(20), 1)),
            "permuted: expected permuted=True at the start, and a batch of at least two images",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.bare
def test_a_refused_batch_changes_nothing():
    stats = stats_of(torch.rand(9, 2))
    before = stats.corr_within()
    with pytest.raises(ValueError, match="NaN"):
        stats.update(torch.full((4, 2), torch.nan))
    assert stats.n == 9 and torch.equal(stats.corr_within(), before)


def test_least_squares_of_the_contributors_have_no_shrinkage():
    codes, _ = planted(500)
    stats = stats_of(*codes)
    fitted = SparsePrediction(alphas=(0.2,), alpha=0.2).fit_stats(stats)
    x, y = ((c - c.mean(0)) / c.std(0, correction=0) for c in codes)
    j = fitted.n_contributors_[0].argmax()
    used = np.abs(fitted.coef_path_[0, j]) > fitted.tol
    peer = LinearRegression().fit(x[:, used], y[:, j])
    np.testing.assert_allclose(fitted.refit(stats)[0, j, used], peer.coef_, atol=1e-9)
    assert (fitted.evaluate(stats, coef=fitted.refit(stats))[0] <= fitted.half_mse_path_ + 1e-12).all()


def test_a_fit_that_ends_too_early_warns_once():
    base = normal(200, 1)
    x = base + 0.02 * normal(200, 12, seed=1)
    y = x[:, 1:] - x[:, :-1]
    with pytest.warns(ConvergenceWarning, match="give more than max_iter=2") as caught:
        fitted = SparsePrediction(alphas=(1e-4,), alpha=1e-4, max_iter=2).fit(x.numpy(), y.numpy())
    assert len(caught) == 1 and fitted.gap_ > 5e-3
