import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import classact
from classact.discover import label_metrics
from classact.discover.label_metrics import LabelMetric, first_smallest
from classact.discover.loki import (
    FrechetClassifier,
    FrechetHead,
    NextClassSelector,
    fit_temperature,
    frechet_predict,
    frechet_scores,
    frechet_straight_through,
    greedy_locus_cover,
    is_locus_cover,
    locus,
    minimum_locus_cover,
    sample_labels,
)

REFERENCE = Path(__file__).parent / "data" / "loki_reference.npz"
STAR = LabelMetric.from_tree([-1, 0, 0, 0])
DISCRETE = LabelMetric.discrete(range(6))


def recursive_tree(n, seed, lengths=False):
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(rng.integers(0, i) for i in range(1, n))])
    return LabelMetric.from_tree(parents, lengths=rng.uniform(0.5, 2, n) if lengths else None)


def grid(height, width):
    edges = [((i, j), (i + 1, j)) for i in range(height - 1) for j in range(width)]
    return LabelMetric.from_graph(edges + [((i, j), (i, j + 1)) for i in range(height) for j in range(width - 1)])


def as_matrix(metric):
    return LabelMetric.from_matrix(metric.distances(metric.labels), metric.labels)


def every_kind(n=30):
    rng = np.random.default_rng(1)
    embeddings = rng.standard_normal((n, 4))
    edges = [(i, int(rng.integers(0, i))) for i in range(1, n)] + rng.integers(0, n, (n // 2, 2)).tolist()
    return {
        "matrix": as_matrix(LabelMetric.from_embeddings(embeddings)),
        "discrete": LabelMetric.discrete(range(n)),
        "euclidean": LabelMetric.from_embeddings(embeddings),
        "cosine": LabelMetric.from_embeddings(embeddings, distance="cosine"),
        "path": LabelMetric.from_path(n),
        "tree": recursive_tree(n, 0),
        "lengths": recursive_tree(n, 0, lengths=True),
        "leaves": LabelMetric.from_tree(np.r_[-1, np.arange(2 * n - 2) // 2], labels=range(n - 1, 2 * n - 1)),
        "graph": LabelMetric.from_graph(edges, labels=range(n)),
        "roads": LabelMetric.from_graph([(a, b, 1 + (a + b) % 3) for a, b in edges if a != b], labels=range(n)),
    }


KINDS = every_kind()


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_agrees_with_its_matrix(kind):
    metric, rng = KINDS[kind], np.random.default_rng(0)
    matrix = as_matrix(metric)
    observed = rng.permutation(metric.labels)[:9]
    probs = rng.dirichlet(np.full(9, 0.4), 50)
    expected = probs @ matrix.distances(observed) ** 2
    np.testing.assert_allclose(metric.expected_squared(probs, observed), expected, atol=1e-10)
    best = metric.frechet_mean(probs, observed)
    np.testing.assert_array_equal(best, matrix.frechet_mean(probs, observed))
    np.testing.assert_allclose(expected.min(1), expected[range(50), metric.index(best)], rtol=1e-9)
    some = metric.labels[::-3]
    np.testing.assert_allclose(metric.distances(observed, some), matrix.distances(observed, some))
    assert set(metric.frechet_mean(probs, observed, some).tolist()) <= set(some.tolist())
    one, other = rng.choice(metric.labels, 40), rng.choice(metric.labels, 40)
    np.testing.assert_allclose(metric.squared(one, other), np.diag(matrix.distances(one, other)) ** 2, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_small_blocks_give_the_same_answers(kind, monkeypatch):
    metric, rng = KINDS[kind], np.random.default_rng(0)
    observed, probs = metric.labels[::4], rng.dirichlet(np.ones(8), 20)
    whole, squared = metric.frechet_mean(probs, observed), metric.squared(metric.labels, metric.labels[::-1])
    monkeypatch.setattr(label_metrics, "ELEMENTS", 300)
    monkeypatch.setattr(LabelMetric, "_steps", lambda self, rows, columns: (7, 4))
    fresh = every_kind()[kind]
    np.testing.assert_array_equal(fresh.frechet_mean(probs, observed), whole)
    np.testing.assert_allclose(fresh.squared(fresh.labels, fresh.labels[::-1]), squared, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_certain_class_is_predicted(kind):
    metric = KINDS[kind]
    observed = metric.labels[::-2]
    np.testing.assert_array_equal(metric.frechet_mean(np.eye(len(observed)), observed), observed)


def test_graphs_have_the_shortest_paths_of_networkx():
    nx = pytest.importorskip("networkx")
    graph = nx.connected_watts_strogatz_graph(70, 4, 0.2, seed=0)
    for a, b in graph.edges:
        graph.edges[a, b]["km"] = 0.5 + (a * b) % 5
    for weight in (None, "km"):
        metric = LabelMetric.from_graph(graph, weight=weight)
        lengths = dict(nx.all_pairs_dijkstra_path_length(graph, weight=weight))
        expected = [[lengths[a][b] for b in metric.labels.tolist()] for a in metric.labels.tolist()]
        np.testing.assert_allclose(metric.distances(metric.labels), expected)
    assert repr(LabelMetric.from_graph(nx.path_graph(5))) == "LabelMetric(tree of 5 labels)"


def test_edges_are_read_from_a_file(tmp_path):
    (tmp_path / "tree.txt").write_text("animal dog\nanimal cat\n\ncat lion 2.5\n")
    metric = LabelMetric.from_graph(tmp_path / "tree.txt", labels=["lion", "dog"])
    assert metric.distances(["lion"]).tolist() == [[0, 4.5]]


def test_nodes_without_a_label_and_roots_may_be_named_or_not():
    tree = {"cat": "feline", "lion": "feline", "feline": "animal", "dog": "animal"}
    for parents in (tree, tree | {"animal": None}):
        metric = LabelMetric.from_tree(parents, labels=["lion", "dog"], lengths={**dict.fromkeys(tree, 1), "lion": 3})
        assert metric.distances(["dog"], ["lion"]) == 5
    assert len(LabelMetric.from_tree({"only": None})) == 1
    assert LabelMetric.from_tree([-1]).frechet_mean([[1.0]], [0]).tolist() == [0]


def test_path_and_star_of_the_paper():
    """Between the ends of a path the rounded mean is predicted, between the leaves of a star its centre."""
    path = LabelMetric.from_path(11)
    p = np.linspace(0, 1, 34)
    probs = np.c_[1 - p, p]
    np.testing.assert_array_equal(path.frechet_mean(probs, [0, 10]), (10 * p).round())
    assert path.frechet_mean([[0.37, 0.63]], [0, 10]).tolist() == [6]
    probs = [[0.4, 0.35, 0.25]]
    np.testing.assert_allclose(STAR.expected_squared(probs, [1, 2, 3]), [[1, 2.4, 2.6, 3]])
    assert STAR.frechet_mean(probs, [1, 2, 3]).tolist() == [0]


def test_ordered_labels_get_the_rounded_expected_rank():
    rng = np.random.default_rng(0)
    metric, observed = LabelMetric.from_path(30), [2, 7, 11, 29]
    probs = rng.dirichlet(np.ones(4), 200)
    np.testing.assert_array_equal(metric.frechet_mean(probs, observed), (probs @ observed).round())


def test_equal_labels_are_the_first_one_whatever_the_rounding():
    edge = LabelMetric.from_tree([-1, 0])
    assert edge.frechet_mean([[0.5, 0.5]], [1, 0]).tolist() == [0]
    third = np.full((1, 3), 1 / 3)
    for order in ([1, 3, 5], [5, 3, 1]):  # a star's leaves, at equal distance from what was observed
        star = LabelMetric.from_tree([-1, 0, 0, 0, 0, 0, 0])
        assert star.frechet_mean(third, order, labels=[6, 4, 2]).tolist() == [6]
        assert star.frechet_mean(third, order, labels=[5, 3, 1]).tolist() == [5]
    noisy = torch.tensor([[1 + 1e-13, 2, 1], [3, 1, 1 - 1e-13]], dtype=torch.float64)
    assert first_smallest([noisy]).tolist() == [0, 1]
    assert first_smallest(noisy.split(1, 1)).tolist() == [0, 1]
    ties = frechet_predict(np.array([[0.5, 0.5]]), np.array([[0.0, 1, 4], [1, 0, 1]]), return_set=True)
    assert ties.tolist() == [[True, True, False]]


def test_equals_argmax_under_the_discrete_metric():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(6), 500)
    np.testing.assert_array_equal(DISCRETE.frechet_mean(probs, range(6)), probs.argmax(1))
    np.testing.assert_array_equal(frechet_predict(probs, 1.0 - np.eye(6)), probs.argmax(1))
    x, y = rng.standard_normal((90, 4)), rng.choice(["a", "b", "c"], 90)
    plain = LogisticRegression().fit(x, y)
    for metric in (None, LabelMetric.discrete(["c", "d", "a", "b"])):
        ours = FrechetClassifier(LogisticRegression(), metric).fit(x, y)
        np.testing.assert_array_equal(ours.predict(x), plain.predict(x))
    logits = torch.randn(50, 6)
    assert FrechetHead(None, range(6)).predict(logits) == logits.argmax(1).tolist()


def test_scaling_distances_changes_nothing():
    metric, probs = KINDS["graph"], np.random.default_rng(0).dirichlet(np.ones(10), 100)
    larger = LabelMetric.from_matrix(7.3 * metric.distances(metric.labels), metric.labels)
    np.testing.assert_array_equal(metric.frechet_mean(probs, range(10)), larger.frechet_mean(probs, range(10)))


@pytest.mark.parametrize("kind", ["matrix", "lengths", "cosine", "euclidean"])
def test_order_of_names_does_not_matter(kind):
    metric, rng = KINDS[kind], np.random.default_rng(2)
    names = rng.permutation(metric.labels)
    other = LabelMetric.from_matrix(metric.distances(names, names), names)
    observed = rng.permutation(metric.labels)[:7]
    probs, order = rng.dirichlet(np.ones(7), 60), rng.permutation(7)
    np.testing.assert_array_equal(
        metric.frechet_mean(probs, observed), other.frechet_mean(probs[:, order], observed[order])
    )


def test_single_and_double_precision_agree():
    rng = np.random.default_rng(0)
    metric = KINDS["lengths"]
    squares, probs = metric.distances(range(12)) ** 2, rng.dirichlet(np.ones(12), 300)
    single = frechet_predict(torch.from_numpy(probs).float(), torch.from_numpy(squares).float()).numpy()
    double = frechet_predict(probs, squares)
    scores = -frechet_scores(probs, squares)
    np.testing.assert_allclose(scores[range(300), single], scores[range(300), double], rtol=2e-5)
    np.testing.assert_array_equal(double, metric.index(metric.frechet_mean(probs, range(12))))


def test_agrees_with_the_authors_code():
    """Their prediction, their loci and their next classes; of labels equally far from the locus theirs may differ."""
    stored = np.load(REFERENCE)
    probs, squares = stored["probs"], stored["dists"] ** 2
    np.testing.assert_array_equal(frechet_predict(probs, squares), stored["one_hot"].argmax(1))
    for seed in range(4):
        tree = LabelMetric.from_graph(stored[f"edges{seed}"].tolist(), labels=range(len(stored[f"edges{seed}"]) + 1))
        observed, loci = stored[f"start{seed}"].tolist(), stored[f"loci{seed}"]
        for step, pick in enumerate(stored[f"picks{seed}"].tolist()):
            inside = locus(tree, observed)
            np.testing.assert_array_equal(inside, loci[step])
            assert NextClassSelector(tree).select(observed) == pick
            observed.append(pick)
        np.testing.assert_array_equal(locus(tree, observed), loci[-1])


def test_many_labels_take_the_same_path_as_few():
    """A tree of 20,000 labels gives what the matrix of the labels around the answers gives."""
    rng = np.random.default_rng(0)
    n, k = 20_000, 40
    tree = LabelMetric.from_tree(np.r_[-1, (np.arange(1, n) - 1) // 3])
    observed, probs = rng.choice(n, k, replace=False), rng.dirichlet(np.full(k, 0.3), 5)
    best = tree.frechet_mean(probs, observed)
    expected = probs @ tree.distances(observed) ** 2
    np.testing.assert_allclose(expected.min(1), expected[range(5), best], rtol=1e-12)


# --- loci


def test_locus_of_grids():
    metric = grid(4, 5)
    cases = {((0, 0), (3, 4)): 20, ((0, 0), (0, 4)): 5, ((0, 0), (0, 1)): 2}
    for observed, size in cases.items():
        for method in ("auto", "lp", "pairs"):
            assert locus(metric, observed, method).sum() == size
    assert is_locus_cover(metric, [(0, 4), (3, 0)])
    assert len(greedy_locus_cover(metric)) == 2


def test_locus_of_complete_graphs_is_what_is_observed():
    for observed in ([0, 1, 2, 3, 4], [5], [2, 4]):
        np.testing.assert_array_equal(locus(DISCRETE, observed), np.isin(range(6), observed))
    assert greedy_locus_cover(DISCRETE) == list(range(6))
    assert not is_locus_cover(DISCRETE, range(5))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_locus_of_trees_is_the_paths(lengths, seed):
    tree = recursive_tree(14, seed, lengths)
    observed = np.random.default_rng(seed).permutation(14)[:3]
    d = tree.distances(tree.labels)
    on_paths = np.zeros(14, bool)
    for a in observed:
        for b in observed:
            on_paths |= np.isclose(d[a] + d[b], d[a, b])
    for metric, method in ((tree, "tree"), (tree, "auto"), (as_matrix(tree), "lp"), (as_matrix(tree), "pairs")):
        np.testing.assert_array_equal(locus(metric, observed, method), on_paths)
    leaves = minimum_locus_cover(tree)
    assert is_locus_cover(tree, leaves)
    assert all(not locus(tree, [x for x in leaves if x != leaf])[leaf] for leaf in leaves)
    assert sorted(greedy_locus_cover(as_matrix(tree))) == sorted(leaves)
    assert sorted(greedy_locus_cover(tree, [*leaves, 5])) == sorted(leaves)


def test_leaving_out_one_of_five_leaves_loses_a_branch():
    tree = LabelMetric.from_tree([-1, 0, 1, 2, 3, 4, 2, 6, 1, 8, 0, 10, 0, 12])
    leaves = minimum_locus_cover(tree)
    assert leaves == [5, 7, 9, 11, 13]
    assert locus(tree, leaves[:-1]).sum() == 12


def test_a_locus_holds_what_random_probabilities_predict():
    rng = np.random.default_rng(0)
    metric = LabelMetric.from_embeddings(rng.standard_normal((16, 2)))
    observed = [0, 3, 8, 12]
    means = metric.frechet_mean(rng.dirichlet(np.full(4, 0.5), 3000), observed)
    inside, pairs = locus(metric, observed), locus(metric, observed, "pairs")
    assert set(means.tolist()) <= set(metric.labels[inside].tolist())
    assert (pairs <= inside).all() and not inside.all()
    cover = greedy_locus_cover(metric)
    assert is_locus_cover(metric, cover)
    assert all(not is_locus_cover(metric, [x for x in cover if x != out]) for out in cover)


def test_in_the_plane_two_labels_at_a_time_are_not_enough():
    corners, sides, middle = [[0, 0], [4, 0], [2, 3]], [[2, 0], [1, 1.5], [3, 1.5]], [[2, 1]]
    metric = LabelMetric.from_embeddings(corners + sides + middle)
    assert locus(metric, [0, 1, 2]).all()
    np.testing.assert_array_equal(locus(metric, [0, 1, 2], "pairs"), np.arange(7) < 6)


def test_only_leaves_as_labels_are_no_longer_all_reached():
    """Leaves of a caterpillar: one between two others can be predicted from them if it hangs on a short edge."""
    parents = {"b": "a", "c": "b", "la": "a", "lb": "b", "lc": "c", "lc2": "c"}
    for length, reached, cover in ((0.5, True, ["la", "lc", "lc2"]), (1.0, False, ["la", "lb", "lc", "lc2"])):
        lengths = dict.fromkeys(parents, 1.0) | {"lb": length}
        metric = LabelMetric.from_tree(parents, ["la", "lb", "lc", "lc2"], lengths)
        for method in ("auto", "pairs"):
            np.testing.assert_array_equal(locus(metric, ["la", "lc"], method), [True, reached, True, False])
        assert sorted(greedy_locus_cover(metric)) == cover


@pytest.mark.parametrize("seed", range(4))
def test_farthest_label_enlarges_the_locus_most(seed):
    tree = recursive_tree(40, seed)
    observed = np.random.default_rng(seed).choice(40, 3, replace=False).tolist()
    farthest, largest = NextClassSelector(tree), NextClassSelector(tree, "largest")
    while (name := farthest.select(observed)) is not None:
        assert locus(tree, [*observed, name]).sum() == locus(tree, [*observed, largest.select(observed)]).sum()
        observed.append(name)
    assert is_locus_cover(tree, observed)
    assert largest.select(observed) is None


def test_next_class_in_a_grid_is_the_opposite_corner():
    assert NextClassSelector(grid(3, 3), "largest").select([(0, 0)]) == (2, 2)
    assert NextClassSelector(grid(3, 3)).select([(0, 0)]) == (2, 2)


def test_labels_crowd_around_the_centre():
    tree = recursive_tree(80, 3)
    sizes = [np.mean([locus(tree, sample_labels(tree, 20, theta, s)).sum() for s in range(8)]) for theta in (0, 1, 4)]
    assert sizes[0] > sizes[1] > sizes[2]
    drawn = sample_labels(tree, 20, 1.0, 0)
    assert len(set(drawn)) == 20
    assert drawn == sample_labels(tree, 20, 1.0, 0) != sample_labels(tree, 20, 1.0, 1)
    counts = np.bincount([sample_labels(LabelMetric.from_path(3), 1, 1.0, s)[0] for s in range(500)])
    np.testing.assert_allclose(counts / 500, np.exp([-1, 0, -1]) / np.exp([-1, 0, -1]).sum(), atol=0.08)


# --- estimator and head


def grades(n=120, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (n, 1))
    names = np.array(["poor", "fair", "good", "great", "best"])
    return x, names[(x[:, 0] * 5).astype(int)], names


@pytest.mark.bare
def test_estimator_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(FrechetClassifier(LogisticRegression()))


def test_estimator_predicts_labels_it_has_never_seen():
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression

    x, y, names = grades()
    metric = LabelMetric.from_path(names)
    seen = np.isin(y, ["poor", "best"])
    model = FrechetClassifier(LogisticRegression(C=100), metric).fit(x[seen], y[seen])
    assert set(model.predict(x)) == set(names)
    assert model.observed_.tolist() == ["best", "poor"]
    assert model.classes_.tolist() == names.tolist()
    truth = metric.squared(y, y[::-1])  # only to see that names are looked up
    assert (truth == (metric.index(y) - metric.index(y[::-1])) ** 2).all()
    ours = metric.squared(model.predict(x), y).mean()
    assert ours < 0.5 < metric.squared(model.estimator_.predict(x), y).mean()
    np.testing.assert_array_equal(model.predict(x), model.classes_[model.decision_function(x).argmax(1)])
    some = FrechetClassifier(LogisticRegression(C=100), metric, labels=["good", "fair"]).fit(x[seen], y[seen])
    assert set(some.predict(x)) == {"good", "fair"}
    assert some.decision_function(x).shape == (120,)
    np.testing.assert_array_equal(some.classes_[(some.decision_function(x) > 0).astype(int)], some.predict(x))
    assert clone(model).metric is metric
    assert copy.deepcopy(metric) is metric


def test_fitted_classifiers_and_any_probabilities_serve():
    frozen = pytest.importorskip("sklearn.frozen")
    from sklearn.neighbors import KNeighborsClassifier

    x, y, names = grades()
    seen = np.isin(y, ["poor", "good", "best"])
    neighbours = KNeighborsClassifier(5).fit(x[seen], y[seen])
    model = FrechetClassifier(frozen.FrozenEstimator(neighbours), LabelMetric.from_path(names)).fit(x[:1], y[:1])
    probs, observed = neighbours.predict_proba(x), neighbours.classes_
    np.testing.assert_array_equal(model.predict(x), model.metric.frechet_mean(probs, observed))
    calibrated = model.calibrate(x[seen], y[seen], "leave_class_out")
    assert np.isfinite(calibrated.temperature_)


def test_temperature_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 5))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = np.array([rng.choice(5, p=row) for row in probs])
    assert fit_temperature(3 * logits, target) == pytest.approx(3, rel=0.1)
    assert fit_temperature(logits, target) == pytest.approx(1, rel=0.1)
    head = FrechetHead(LabelMetric.from_path(5), observed=range(5))
    head.calibrate(torch.from_numpy(3 * logits), target)
    assert head.temperature.item() == pytest.approx(3, rel=0.1)
    assert head.config["temperature"] == head.temperature.item()


def test_leaving_the_class_out_minimises_the_distance():
    """Neighbours of the truth are likelier than those farther off, but far too flat: a low temperature is right."""
    metric = LabelMetric.from_path(9)
    target = np.repeat(np.arange(1, 8), 5)
    logits = -0.05 * abs(np.arange(9) - target[:, None])
    head = FrechetHead(metric, range(9)).calibrate(torch.from_numpy(logits), target, "leave_class_out")
    assert head.temperature < 0.2

    def cost(probs):
        assert (probs[np.arange(len(target)), target] == 0).all()
        return metric.squared(metric.frechet_mean(probs, range(9)), target)

    assert fit_temperature(logits, target, cost) == pytest.approx(head.temperature.item())


def test_head_aligns_names():
    metric = KINDS["lengths"]
    observed, labels = [7, 3, 20, 11], [5, 3, 28, 0, 14]
    logits = torch.randn(30, 4, dtype=torch.float64)
    head = FrechetHead(metric, observed, labels)
    expected = metric.expected_squared(logits.softmax(1).numpy(), observed, labels)
    np.testing.assert_allclose(-head(logits).numpy(), expected, rtol=1e-5)
    assert head.predict(logits) == metric.frechet_mean(logits.softmax(1).numpy(), observed, labels).tolist()


def test_scores_and_one_hot_predictions_pass_gradients_on():
    torch.manual_seed(0)
    squares = torch.rand(4, 7)
    logits = torch.randn(5, 4, requires_grad=True)
    one_hot = frechet_straight_through(logits.softmax(1), squares)
    assert torch.equal(one_hot.argmax(1), frechet_predict(logits.softmax(1).detach(), squares))
    torch.testing.assert_close(one_hot.sum(1), torch.ones(5))
    direction = torch.randn(5, 7)
    (hard,) = torch.autograd.grad((one_hot * direction).sum(), logits)
    soft = frechet_scores(logits.softmax(1), squares).softmax(1)
    torch.testing.assert_close(hard, torch.autograd.grad((soft * direction).sum(), logits)[0])
    double = logits.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: frechet_scores(z.softmax(1), squares.double()), double)


def test_a_network_learns_through_the_head():
    torch.manual_seed(0)
    x, target = torch.randn(60, 3), torch.arange(60) % 5
    x = x + torch.nn.functional.one_hot(target % 3, 3) * 4
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), FrechetHead(LabelMetric.from_path(5), [0, 4]))
    before = torch.nn.functional.cross_entropy(network(x), target)
    before.backward()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), target)
        loss.backward()
    assert loss < before


@pytest.mark.parametrize("hard", [False, True])
def test_round_trip_through_safetensors(hard, tmp_path):
    head = FrechetHead(LabelMetric.from_path(["low", "mid", "top"]), ["top", "low"], hard=hard)
    logits = torch.randn(9, 2)
    head.calibrate(logits, ["top", "low", "low"] * 3)
    loaded = classact.load(classact.save(head, tmp_path / "head"))
    assert loaded.config == head.config
    assert torch.equal(loaded(logits), head(logits))
    assert loaded.predict(logits) == head.predict(logits)


def test_bfloat16_autocast():
    head, logits = FrechetHead(KINDS["tree"], range(10)), torch.randn(8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(logits)
    torch.testing.assert_close(scores, head(logits))
    assert head(logits.bfloat16()).dtype == torch.float32


@pytest.mark.bare
@pytest.mark.parametrize("hard", [False, True])
def test_compiles_and_exports(hard):
    head, logits = FrechetHead(KINDS["tree"], range(10), hard=hard), torch.randn(8, 10)
    torch.compiler.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), head(logits))
    torch.testing.assert_close(torch.export.export(head, (logits,)).module()(logits), head(logits))


def test_scrambled_metric_has_the_same_distances_under_other_names():
    metric = KINDS["tree"]
    other = metric.scrambled(0)
    d, e = metric.distances(metric.labels), other.distances(metric.labels)
    np.testing.assert_array_equal(np.sort(d, None), np.sort(e, None))
    assert (d != e).any()
    np.testing.assert_array_equal(e, metric.scrambled(0).distances(metric.labels))
    np.testing.assert_array_equal(metric.labels, range(30))


def test_centre_is_the_best_constant_answer():
    for kind in ("tree", "graph", "euclidean", "cosine"):
        metric = KINDS[kind]
        mean = (metric.distances(metric.labels) ** 2).mean(0)
        assert metric.labels.tolist()[mean.argmin()] == metric.center()


def test_needs_neither_lightning_nor_networkx():
    code = (
        "import sys\nfrom classact.discover.loki import FrechetHead, LabelMetric\n"
        "LabelMetric.from_graph([(0, 1), (1, 2), (2, 0)]).distances([0])\n"
        "print({'lightning', 'networkx', 'matplotlib', 'timm'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def fitted(**settings):
    from sklearn.linear_model import LogisticRegression

    return FrechetClassifier(LogisticRegression(), **settings).fit([[0.0], [1.0], [0.2]], [0, 1, 0])


class Wrong:
    def __init__(self, probs):
        self.probs = np.array(probs)

    def predict_proba(self, x):
        return self.probs


def predicting(probs):
    model = fitted()
    model.estimator_ = Wrong(probs)
    return model.predict([[0.0]])


PATH, ONE = LabelMetric.from_path(3), np.ones((1, 1))


@pytest.mark.bare
def test_a_matrix_alone_is_no_metric():
    message = "metric: expected a LabelMetric, such as .*, got ndarray"
    for make in (lambda: fitted(metric=np.eye(2)), lambda: FrechetHead(np.eye(2), [0, 1])):
        with pytest.raises(TypeError, match=message):
            make()


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelMetric.from_matrix(np.zeros((2, 3))), r"matrix: expected a square one, got shape \(2, 3\)"),
        (lambda: LabelMetric.from_matrix(1 - np.eye(3), ["a", "b"]), "matrix: expected 2 rows, .* got 3"),
        (lambda: LabelMetric.from_matrix([[0, 1], [2, 0]], ["a", "b"]), "symmetric one, got 1 from a to b and 2 back"),
        (lambda: LabelMetric.from_matrix([[0, -1], [-1, 0]]), "matrix: expected distances, got a negative value, -1"),
        (lambda: LabelMetric.from_matrix([[1, 1], [1, 0]]), "matrix: expected zeros on the diagonal, got 1"),
        (lambda: LabelMetric.from_matrix([[0, np.inf], [np.inf, 0]]), "matrix: expected finite distances"),
        (
            lambda: LabelMetric.from_matrix([[0, 1, 9], [1, 0, 1], [9, 1, 0]], check_triangle=True),
            "triangle inequality does not hold for paths over 1",
        ),
        (lambda: LabelMetric.from_matrix(1 - np.eye(2), ["a", "a"]), "labels: expected different names, got 'a' 2"),
        (lambda: LabelMetric.from_matrix(np.zeros((0, 0))), "labels: expected at least one"),
        (lambda: LabelMetric.from_tree([-1, -1, 0]), "parents: expected a tree with one root, got 2 nodes"),
        (lambda: LabelMetric.from_tree([-1, 2, 1]), "parents: expected a connected graph, got 2 parts"),
        (lambda: LabelMetric.from_tree([-1, 5]), "parents: expected for every node the number of another one"),
        (lambda: LabelMetric.from_tree([-1, 0], labels=[2]), "labels: 2 is no node of parents"),
        (lambda: LabelMetric.from_tree([-1, 0], lengths=[0, -1]), "parents: expected positive lengths .* got -1"),
        (lambda: LabelMetric.from_graph([(0, 1), (2, 3)]), "graph: expected a connected graph, got 2 parts; no path"),
        (lambda: LabelMetric.from_graph([(0,)]), "graph: expected edges of two nodes"),
        (lambda: LabelMetric.from_embeddings(np.zeros(3)), r"embeddings: expected finite numbers of shape \(N, D\)"),
        (lambda: LabelMetric.from_embeddings(np.eye(3), "ab"), "embeddings: expected 2 rows, .* got 3"),
        (lambda: LabelMetric.from_embeddings(np.eye(3), distance="l1"), "distance: expected 'euclidean' or 'cosine'"),
        (lambda: LabelMetric.from_embeddings(np.zeros((1, 2)), normalize=True), "that of 0 is zero and has no dir"),
        (lambda: LabelMetric.from_path(3, [0, 1]), "positions: expected 3 finite numbers"),
        (lambda: PATH.distances([7]), "labels: unknown label 7; the 3 labels of the metric are 0, 1, 2"),
        (lambda: PATH.squared([0], [1, 2]), "a, b: expected as many labels, got 1 and 2"),
        (lambda: PATH.frechet_mean(np.ones((1, 2)) / 2, [0, 0]), "observed: expected different labels"),
        (lambda: PATH.frechet_mean(ONE, [0, 1]), r"probs: expected shape \(B, 2\), .*, got \(1, 1\)"),
        (lambda: PATH.frechet_mean([[0.5, 0.4]], [0, 1]), "probs: expected rows that sum to 1, got .* sums to 0.9"),
        (lambda: PATH.frechet_mean([[1.5, -0.5]], [0, 1]), "probs: expected probabilities, got a negative value, -0.5"),
        (lambda: PATH.frechet_mean([[np.nan, 1]], [0, 1]), "probs: expected finite numbers"),
        (lambda: frechet_predict(np.array([[0.5, 0.4]]), np.ones((2, 3))), "probs: expected rows that sum to 1"),
        (lambda: frechet_predict(torch.tensor([[2.0, -1]]), torch.ones(2, 3)), "probs: expected probabilities"),
        (
            lambda: frechet_scores(ONE, np.ones((2, 3))),
            r"expected shapes \(B, K\) and \(K, N\), got \(1, 1\), \(2, 3\)",
        ),
        (lambda: first_smallest([]), "parts: expected at least one block"),
        (lambda: fit_temperature(np.zeros((2, 2)), np.zeros(3, int)), "X, y: expected as many samples"),
        (lambda: fit_temperature(np.zeros((2, 1)), np.zeros(2, int), sum), "taking out a class needs at least two"),
        (lambda: fitted(temperature=0.0), "temperature: expected a positive number, got 0.0"),
        (lambda: fitted(metric=LabelMetric.from_path(["a", "b"])), "labels: unknown label 0"),
        (lambda: fitted(metric=PATH, labels=[0, 9]), "labels: unknown label 9"),
        (lambda: fitted().calibrate([[0.0]], [2]), "labels: unknown label 2"),
        (lambda: fitted().calibrate([[0.0]], [1], "mse"), "method: expected 'nll' or 'leave_class_out', got 'mse'"),
        (lambda: predicting([[0.7, 0.7]]), "probs: expected rows that sum to 1"),
        (
            lambda: FrechetClassifier(torch.nn.Identity()).fit([[0.0]], [0]),
            "estimator: expected one with predict_proba",
        ),
        (lambda: FrechetHead(PATH, [0, 3]), "labels: unknown label 3"),
        (lambda: FrechetHead(PATH, [0, 1])(torch.zeros(2, 3)), r"logits: expected shape \(B, 2\), got \(2, 3\)"),
        (lambda: locus(PATH, []), "observed: expected at least one label"),
        (lambda: locus(PATH, [0], "tree"), "metric: expected a tree of which all nodes are labels"),
        (lambda: locus(PATH, [0], "brute"), "method: expected 'auto', 'tree', 'pairs' or 'lp', got 'brute'"),
        (lambda: minimum_locus_cover(PATH), "metric: expected a tree of which all nodes are labels"),
        (lambda: greedy_locus_cover(PATH, [0, 1]), "observed: no locus cover, 2 cannot be predicted"),
        (lambda: NextClassSelector(PATH, "random"), "rule: expected 'farthest' or 'largest', got 'random'"),
        (lambda: sample_labels(PATH, 4), "n: expected 1 to 3, the number of labels, got 4"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
