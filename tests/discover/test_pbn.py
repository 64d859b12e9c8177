import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans
from sklearn.metrics import davies_bouldin_score, silhouette_score
from torch.nn import functional as F

import classact
from classact.data.nuisance import nuisance_mixture
from classact.discover.metrics import cluster_accuracy
from classact.discover.ncd_clustering import (
    NCDKMeans,
    NCDSpectral,
    draw_centroids,
    kernel_width,
    laplacian_eigenvectors,
    lloyd,
)
from classact.discover.pbn import (
    PBN,
    HiddenClassCV,
    HiddenClassSplit,
    PBNNetwork,
    estimate_n_clusters,
    pbn_loss,
    silhouettes,
)
from classact.discover.tabularncd import TabularNCD, TabularNCDNetwork, nearest_rows, pair_loss

REFERENCE = np.load(Path(__file__).parent / "data" / "pbn_reference.npz")
LINE = np.array([[0.0], [1.0], [3.0]])


def blobs(per_class=25, classes=5, known=3, distance=9.0, seed=0):
    """Far classes, the last ones novel: table, labels with -1, true labels."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), per_class)
    x = rng.normal(size=(len(y), 12)) + distance * np.eye(12)[y]
    return x, np.where(y < known, y, -1), y


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def small(**settings):
    defaults = {"latent_dim": 6, "lr": 1e-2, "epochs": 30, "batch_size": 32, "n_clusters": 2, "random_state": 0}
    return PBN(**defaults | settings)


def reference_network():
    network = PBNNetwork(9, 3, 3, dropout=0.25, hidden=(6, 4))
    prefix = {"encoder_layers": "encoder", "decoder_layers": "decoder", "classifier": "classifier"}
    weights = {}
    for key in REFERENCE.files:
        if key.startswith("pbn.weights."):
            part, rest = key.removeprefix("pbn.weights.").split(".", 1)
            weights[f"{prefix[part]}.{rest}"] = reference(key)
    network.load_state_dict(weights)
    network.train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    return network


def test_network_and_loss_are_the_authors():
    x, y = reference("pbn.x"), reference("pbn.y")
    output = reference_network()(x)
    for ours, theirs in zip(output, ("z", "reconstruction", "logits"), strict=True):
        torch.testing.assert_close(ours, reference(f"pbn.{theirs}"))
    loss = pbn_loss(output, x, torch.where(y == 3, -1, y), 0.3)
    torch.testing.assert_close(loss, reference("pbn.loss"))


@pytest.mark.parametrize("min_dist", [0.1, 0.5, 0.9])
def test_kernel_width_is_the_authors(min_dist):
    # theirs is computed in single precision
    assert kernel_width(pdist(REFERENCE["points"]), min_dist) == pytest.approx(REFERENCE[f"sigma.{min_dist}"], rel=1e-6)


def test_spectral_embedding_is_the_authors():
    found = NCDSpectral(2, 5, 0.4, random_state=0).fit(REFERENCE["points"]).embedding_
    np.testing.assert_allclose(abs(found), abs(REFERENCE["embedding"]), atol=1e-4)


@pytest.mark.parametrize("update", ["unlab_only", "unlab_and_lab"])
def test_ncd_kmeans_finds_the_authors_centroids(update):
    y = np.where(REFERENCE["labels"] < 3, REFERENCE["labels"], -1)
    ours = NCDKMeans(3, power=1, update="novel" if update == "unlab_only" else "both", random_state=0)
    ours.fit(REFERENCE["blobs"], y)
    order = np.lexsort(ours.cluster_centers_.T)
    theirs = REFERENCE[f"{update}.novel"]
    np.testing.assert_allclose(ours.cluster_centers_[order], theirs[np.lexsort(theirs.T)], atol=1e-12)
    np.testing.assert_allclose(ours.known_centers_, REFERENCE[f"{update}.known"], atol=1e-12)
    assert ours.inertia_ == pytest.approx(float(REFERENCE[f"{update}.inertia"]), abs=1e-9)


def test_widths_of_the_layers():
    network = PBNNetwork(62, 5, 58)
    for part, expected in ((network.encoder, [62, 46, 31, 58]), (network.decoder, [58, 31, 46, 62])):
        linear = [layer for layer in part if isinstance(layer, torch.nn.Linear)]
        assert [linear[0].in_features, *(layer.out_features for layer in linear)] == expected
        kinds = [type(layer).__name__ for layer in part]
        assert kinds == ["Linear", "ReLU", "BatchNorm1d", "Dropout"] * 2 + ["Linear"]
    z = network(torch.randn(7, 62)).latent
    torch.testing.assert_close(z.norm(dim=1), torch.ones(7))


def test_loss_at_both_ends_of_the_weight():
    torch.manual_seed(0)
    network, x, target = PBNNetwork(6, 3, 4), torch.randn(8, 6), torch.tensor([0, 1, 2, -1] * 2)
    output = network(x)
    torch.testing.assert_close(
        pbn_loss(output, x, target, 1.0), F.cross_entropy(output.logits[target >= 0], target[target >= 0])
    )
    loss = pbn_loss(output, x, target, 0.0)
    torch.testing.assert_close(loss, (output.reconstruction - x).square().sum() / 8)
    loss.backward()
    assert not network.classifier.weight.grad.any() and network.decoder[0].weight.grad.any()


def test_batch_without_known_rows_has_a_finite_loss():
    network, x = PBNNetwork(6, 3, 4), torch.randn(8, 6)
    output = network(x)
    loss = pbn_loss(output, x, torch.full((8,), -1), 0.4)
    torch.testing.assert_close(loss, 0.6 * (output.reconstruction - x).square().sum() / 8)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0])
def test_pbn_finds_far_classes(w):
    x, y, true = blobs()
    model = small(w=w).fit(x, y)
    known = y >= 0
    assert cluster_accuracy(true[~known], model.novel_labels_) > (0.95 if w < 1 else 0.5)
    assert (model.labels_[known] == -1).all() and (model.labels_[~known] == model.novel_labels_).all()
    assert (model.predict(x[~known]) == model.novel_labels_).all()
    if w > 0:
        assert (model.predict_known(x[known]) == y[known]).mean() > 0.95
    z = model.transform(x)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1)
    assert z.dtype == np.float64 and len(model.loss_curve_) == 30
    assert model.loss_curve_[-1] < model.loss_curve_[0]


@pytest.mark.parametrize("model", [small(), NCDKMeans(2, random_state=0), NCDSpectral(2, random_state=0)])
def test_prediction_of_a_row_does_not_depend_on_the_others(model):
    x, y, _ = blobs(distance=3.0)
    new = blobs(distance=3.0, seed=1)[0]
    model.fit(x, y)
    whole = model.predict(new)
    some = np.array([3, 60, 61, 99, 124])
    assert (model.predict(new[some]) == whole[some]).all()
    assert all(model.predict(new[[i]])[0] == whole[i] for i in some)


@pytest.mark.parametrize(
    "model",
    [
        small(),
        NCDKMeans(2, random_state=0),
        NCDSpectral(2, random_state=0),
        TabularNCD(n_clusters=2, epochs=5, random_state=0),
    ],
)
def test_same_seed_same_labels(model):
    x, y, _ = blobs(distance=2.0)
    first, again = copy.deepcopy(model).fit(x, y), copy.deepcopy(model).fit(x, y)
    assert (first.labels_ == again.labels_).all()
    if hasattr(model, "transform"):
        assert (first.transform(x) == again.transform(x)).all()


def test_global_random_state_is_left_alone():
    x, y, _ = blobs()
    torch.manual_seed(7), np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    small(epochs=2).fit(x, y)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_constant_column_changes_nothing():
    x, y, _ = blobs()
    wide = np.insert(x, 2, 0.1, axis=1)
    plain, padded = small().fit(x, y), small().fit(wide, y)
    assert (plain.transform(x) == padded.transform(wide)).all()
    assert (plain.labels_ == padded.labels_).all()


def test_classes_may_have_any_name():
    x, y, _ = blobs()
    names = np.array([["a", "b", "c", None][code] for code in y], object)
    named = small().fit(x, names)
    assert (named.labels_ == small().fit(x, y).labels_).all()
    assert named.classes_.tolist() == ["a", "b", "c"]
    assert set(named.predict_known(x)) <= {"a", "b", "c"}
    real = NCDKMeans(2, random_state=0).fit(x, np.where(y < 0, np.nan, y))
    assert (real.labels_ == NCDKMeans(2, random_state=0).fit(x, y).labels_).all()


@pytest.mark.parametrize("model", [small(epochs=2), NCDKMeans(5, random_state=0), NCDSpectral(5, random_state=0)])
def test_fit_without_unlabelled_rows_warns_and_clusters_all(model):
    x, _, true = blobs()
    with pytest.warns(UserWarning, match="every row has a label"):
        model.fit(x, true)
    assert model.labels_.min() == 0 and len(model.novel_labels_) == len(x)


@pytest.mark.parametrize("clusterer", [NCDKMeans(), NCDSpectral(min_dist=0.3)])
def test_latents_may_be_clustered_with_the_known_classes(clusterer):
    x, y, true = blobs()
    model = small(clusterer=clusterer).fit(x, y)
    assert model.clusterer_.n_clusters_ == 2
    assert cluster_accuracy(true[y < 0], model.novel_labels_) > 0.95
    assert cluster_accuracy(true[y < 0], model.predict(x[y < 0])) > 0.95


def test_raw_latents_are_the_encoders_output():
    x, y, _ = blobs()
    raw, unit = small(cluster_on="raw").fit(x, y), small().fit(x, y)
    z = raw.transform(x)
    np.testing.assert_allclose(z / np.linalg.norm(z, axis=1, keepdims=True), unit.transform(x))
    assert raw.clusterer_.cluster_centers_.shape == (2, 6)


def test_number_of_clusters_is_estimated_in_the_latent_space():
    x, y, _ = blobs(classes=6, known=2)
    model = small(n_clusters=None, w=0.2, epochs=60, k_range=(2, 8)).fit(x, y)
    assert model.n_clusters_ == 4
    assert NCDKMeans(None, random_state=0).fit(x, y).n_clusters_ == 4
    assert NCDSpectral(None, 5, random_state=0).fit(x, y).n_clusters_ == 4


def test_five_far_blobs_are_five_clusters():
    x, _, _ = blobs(per_class=15)
    for index in ("silhouette", "calinski_harabasz", "davies_bouldin"):
        k, curve = estimate_n_clusters(x, 2, 9, 1, index, random_state=0)
        assert k == 5 and curve.shape == (8,)


def test_silhouettes_and_indices_are_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 3))
    partitions = np.stack([np.arange(1100) % 3, np.minimum(np.arange(1100), 4), rng.integers(7, size=1100)])
    expected = [silhouette_score(x, labels) for labels in partitions]
    np.testing.assert_allclose(silhouettes(x, partitions), expected, atol=1e-12)
    curve = estimate_n_clusters(x[:60], 3, 3, 1, "davies_bouldin", random_state=0)[1]
    seed = np.random.RandomState(0).randint(2**31 - 1)
    labels = KMeans(3, n_init=10, random_state=seed).fit(x[:60]).labels_
    assert curve[0] == pytest.approx(davies_bouldin_score(x[:60], labels))


def test_known_centroids_stay_where_they_were():
    x, y, _ = blobs(distance=2.0)
    means = np.array([x[y == c].mean(0) for c in range(3)])
    assert (NCDKMeans(2, random_state=0).fit(x, y).known_centers_ == means).all()
    moved = NCDKMeans(2, update="both", random_state=0).fit(x, y)
    assert not (moved.known_centers_ == means).all()
    only = NCDKMeans(2, update="known", random_state=0).fit(x, y)
    assert all(
        (x[y < 0] - center == 0).all(1).any() or np.isclose(x[y < 0], center).all(1).any()
        for center in only.cluster_centers_
    )


def test_without_known_rows_it_is_kmeans():
    x, _, true = blobs()
    ours, theirs = NCDKMeans(5, random_state=0).fit(x), KMeans(5, n_init=10, random_state=0).fit(x)
    assert ours.inertia_ == pytest.approx(theirs.inertia_)
    assert cluster_accuracy(theirs.labels_, ours.labels_) == 1
    assert cluster_accuracy(true, ours.labels_) == 1


def test_lloyd_is_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    for steps in (1, 3, 100):
        theirs = KMeans(6, init=x[:6], n_init=1, max_iter=steps, tol=0, algorithm="lloyd").fit(x)
        np.testing.assert_allclose(lloyd(x, x[:6], steps)[0], theirs.cluster_centers_, atol=1e-12)


def test_a_centroid_without_rows_stays():
    x = np.array([[0.0], [1.0]])
    assert lloyd(x, np.array([[0.5], [99.0]]))[0].tolist() == [[0.5], [99.0]]
    assert lloyd(x, np.array([[0.0], [0.0]]), 1)[0].tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("power", [1, 2])
def test_centroids_are_drawn_by_their_distance(power):
    x, known = np.array([[1.0], [2.0], [4.0]]), np.array([[0.0], [5.0]])
    rng = np.random.RandomState(0)
    drawn = np.array([draw_centroids(x, known, 1, power, rng)[0, 0] for _ in range(1500)])
    weight = np.array([1.0, 2.0, 1.0]) ** power
    for value, expected in zip(x[:, 0], weight / weight.sum(), strict=True):
        assert (drawn == value).mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 1500))
    assert len(draw_centroids(x[:1], x[:1], 3, power, rng)) == 3


def test_kernel_width_of_three_points():
    distances = pdist(LINE)
    assert kernel_width(distances, 0.5) == pytest.approx(2.402245, abs=1e-6)
    assert kernel_width(distances, 0.6) == pytest.approx(2.798296, abs=1e-6)
    assert kernel_width(distances, 0.5, "exact") == pytest.approx(1.698644, abs=1e-6)
    assert kernel_width(distances, 0.6, "exact") == pytest.approx(1.978694, abs=1e-6)
    assert np.exp(-4 / (2 * kernel_width(distances, 0.5) ** 2)) == pytest.approx(0.707107, abs=1e-6)
    assert kernel_width(pdist(np.zeros((3, 2)))) == 1


def test_laplacian_of_three_points():
    model = NCDSpectral(1, 2, 0.5).fit(LINE)
    np.testing.assert_allclose(model.eigenvalues_, [0, 1.352853, 1.647147], atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
def test_sparse_eigenvectors_are_those_of_the_whole_matrix(normalized):
    rng = np.random.RandomState(0)
    affinity = np.exp(-np.square(rng.randn(60, 1) - rng.randn(60)))
    affinity = affinity + affinity.T
    np.fill_diagonal(affinity, 0)
    degree = affinity.sum(1)
    laplacian = np.diag(degree) - affinity
    if normalized:
        laplacian = laplacian / np.sqrt(np.outer(degree, degree))
    values, vectors = laplacian_eigenvectors(affinity, 4, normalized, rng)
    expected = np.linalg.eigh(laplacian)
    np.testing.assert_allclose(values, expected[0][:4], atol=1e-8)
    np.testing.assert_allclose(abs(vectors), abs(expected[1][:, :4]), atol=1e-6)


def test_spectral_clustering_follows_the_shape_of_a_class():
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    x = np.concatenate([radius * ring for radius in (1, 2, 3, 4)])
    true = np.repeat([0, 1, 2, 3], 60)
    y = np.where(true < 2, -1, true)
    for settings in ({}, {"assign": "kmeans"}, {"normalized": False}, {"edge_affinity": "exact", "min_dist": 1e-4}):
        model = NCDSpectral(**{"n_clusters": 2, "n_components": 3, "min_dist": 1e-8, "random_state": 0} | settings).fit(
            x, y
        )
        assert cluster_accuracy(true[y < 0], model.novel_labels_) == 1
        assert (model.predict(x[y < 0]) == model.novel_labels_).all()
        assert model.known_accuracy() == 1
    assert cluster_accuracy(true[y < 0], KMeans(2, n_init=3, random_state=0).fit(x[y < 0]).labels_) < 0.9


def test_folds_hide_different_classes_and_nothing_else():
    _, y, _ = blobs(per_class=4, classes=7, known=5)
    folds = list(HiddenClassSplit(2, 10, random_state=0).split(None, y))
    hidden = [tuple(np.unique(true)) for *_, true in folds]
    assert len(set(hidden)) == 10 and all(len(classes) == 2 for classes in hidden)
    for classes, (train, masked, scored, true) in zip(hidden, folds, strict=True):
        assert (train == np.arange(28)).all() and (y[scored] == true).all()
        assert not np.isin(masked, classes).any() and (masked[scored] == -1).all()
        assert (np.delete(masked, scored) == np.delete(y, scored)).all()
    for train, masked, scored, _ in HiddenClassSplit(None, 3, use_unlabeled=False, random_state=0).split(None, y):
        assert (y[train] >= 0).all() and set(scored) <= set(train) and len(masked) == 20
        assert len(np.unique(y[scored])) == 2
    names = np.array([["a", "b", "c", None][min(code % 8, 3)] for code in y], object)
    _, masked, scored, true = next(HiddenClassSplit(1, 1, random_state=0).split(None, names))
    assert all(label is None for label in masked[scored]) and len(set(true)) == 1


class Spy(NCDKMeans):
    def fit(self, X, y=None):
        Spy.seen.append((len(X), self.n_clusters, np.asarray(y).copy()))
        return super().fit(X, y)


@pytest.mark.parametrize("use_unlabeled", [True, False])
def test_search_never_sees_a_hidden_or_a_novel_label(use_unlabeled):
    x, y, true = blobs(classes=7, known=5)
    Spy.seen, scored = [], []

    def score(hidden, clusters):
        scored.append(set(hidden))
        return cluster_accuracy(hidden, clusters)

    settings = {"power": [1, 2], "update": ["novel", "both"]}
    search = HiddenClassCV(Spy(2, random_state=0), settings, 2, 3, 4, score, use_unlabeled, random_state=0).fit(x, y)
    assert len(Spy.seen) == 13 and len(scored) == 12
    for (rows, clusters, labels), hidden in zip(Spy.seen[:-1], scored, strict=True):
        assert hidden <= set(range(5)) and not hidden & set(labels)
        assert set(labels) | hidden == {-1, 0, 1, 2, 3, 4}
        assert (rows, clusters) == ((175, 4) if use_unlabeled else (125, 2))
    rows, clusters, labels = Spy.seen[-1]
    assert (rows, clusters) == (175, 2) and (labels == y).all()
    assert search.best_params_ == search.cv_results_["params"][search.best_index_]
    assert search.best_score_ == search.cv_results_["mean_test_score"].max()
    assert cluster_accuracy(true[y < 0], search.novel_labels_) > 0.9
    assert (search.predict(x[y < 0]) == search.novel_labels_).all()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (PBN(epochs=3, n_clusters=2, random_state=0), {"w": [0.1, 0.9], "latent_dim": [2, 4]}),
        (NCDSpectral(2, random_state=0), {"min_dist": [0.1, 0.5, 0.9]}),
        (TabularNCD(epochs=3, n_clusters=2, random_state=0), {"w1": [0.1, 0.9]}),
    ],
)
def test_novel_labels_cannot_change_the_choice(model, settings):
    from classact.reproductions.discover.pbn import tune

    x, _, true = blobs(classes=7, known=5, per_class=12, distance=2.0)
    novel = true >= 5
    permuted = true.copy()
    permuted[novel] = np.random.default_rng(0).permutation(true[novel]) + 3
    first, again = (tune(model, settings, x, labels, range(5), 2, 3, 2, 0) for labels in (true, permuted))
    assert first.best_params_ == again.best_params_
    assert (first.cv_results_["mean_test_score"] == again.cv_results_["mean_test_score"]).all()
    assert (first.labels_ == again.labels_).all()


def test_search_tunes_a_pipeline():
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline

    x, y, _ = blobs(classes=6, known=4)
    search = HiddenClassCV(make_pipeline(PCA(), NCDKMeans(2)), {"pca__n_components": [1, 5]}, 2, 2, 2, random_state=0)
    with pytest.raises(AttributeError, match="novel_labels_"):
        search.fit(x, y).novel_labels_  # noqa: B018
    assert search.best_params_ == {"pca__n_components": 5}
    assert search.predict(x[:3]).shape == (3,)


def test_tabularncd_finds_far_classes():
    x, y, true = blobs()
    model = TabularNCD(n_clusters=2, epochs=30, batch_size=64, top_k=30, lr=5e-3, random_state=0).fit(x, y)
    assert cluster_accuracy(true[y < 0], model.novel_labels_) > 0.9
    assert (model.predict(x[y < 0]) == model.novel_labels_).all()
    assert (model.predict_known(x[y >= 0]) == y[y >= 0]).mean() > 0.9
    assert model.transform(x).shape == (125, 12)


def test_pairs_by_their_definition():
    torch.manual_seed(0)
    z, logits = torch.randn(6, 3), torch.randn(6, 2, requires_grad=True)
    near = nearest_rows(z, 2)
    p, terms = logits.softmax(1), []
    for i in range(6):
        similarity = F.cosine_similarity(z[i], z)
        similarity[i] = -2
        assert set(near[i].tolist()) == set(similarity.topk(2).indices.tolist())
        for j in range(i + 1, 6):
            same = (p[i] * p[j]).sum()
            alike = j in near[i] or i in near[j]
            terms.append(-(same if alike else 1 - same).log())
    torch.testing.assert_close(pair_loss(z, logits, 34.0), torch.stack(terms).mean(), atol=1e-6, rtol=1e-5)
    assert pair_loss(z, logits, 0.1).isfinite()


def test_nuisance_table_is_what_it_says():
    table = nuisance_mixture(6000, 0)
    assert (table.x == nuisance_mixture(6000, 0).x).all() and not (table.x == nuisance_mixture(6000, 1).x).all()
    assert np.bincount(table.y).tolist() == [500] * 12
    assert table.known.tolist() == list(range(6)) and table.novel.tolist() == list(range(6, 12))

    def explained(labels):
        within = sum(table.x[labels == value].var(0) * (labels == value).mean() for value in np.unique(labels))
        return 1 - within / table.x.var(0)

    by_class, by_source = explained(table.y), explained(table.source)
    assert (by_class[14:] < 0.01).all() and (by_source[:14] < 0.01).all()
    assert by_class[:14].mean() > 0.3 and by_source[14:].mean() > 0.7
    centred = table.x[:, :14] - np.array([table.x[table.y == c, :14].mean(0) for c in range(12)])[table.y]
    np.testing.assert_allclose(centred.std(0), 1, atol=0.04)


@pytest.mark.parametrize("network", [PBNNetwork(9, 3, 4, 0.2, (7, 5, 6)), TabularNCDNetwork(9, 3, 2, 4, 0.2)])
def test_round_trip_through_safetensors(network, tmp_path):
    x = torch.randn(5, 9)
    network(x)
    network.eval()
    loaded = classact.load(classact.save(network, tmp_path / "m"), type(network)(**network.config)).eval()
    for ours, theirs in zip(network(x), loaded(x), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.config == network.config


def test_bfloat16_autocast():
    network, x = PBNNetwork(9, 3, 4), torch.randn(8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pbn_loss(network(x), x, torch.tensor([0, 1, 2, -1] * 2), 0.5)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.bare
def test_compiles_and_exports():
    network, x, target = PBNNetwork(9, 3, 4), torch.randn(8, 9), torch.tensor([0, 1, 2, -1] * 2)
    torch.compiler.reset()
    step = torch.compile(lambda x: pbn_loss(network(x), x, target, 0.5), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(x), pbn_loss(network(x), x, target, 0.5))
    network.eval()
    exported = torch.export.export(network, (x,)).module()(x)
    torch.testing.assert_close(exported.logits, network(x).logits)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("estimator", "excused"),
    [
        (PBN(latent_dim=8, lr=5e-3, epochs=20, batch_size=16, n_clusters=2), {}),
        (NCDKMeans(2), {}),
        (NCDSpectral(2), {}),
        (HiddenClassCV(NCDKMeans(1), {"power": [1, 2]}, n_hidden=1, n_folds=1, n_iter=2), {}),
        (TabularNCD(epochs=5, n_clusters=2), {"check_clustering": "its head may leave a cluster empty"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_estimators_are_scikit_learns(estimator, excused):
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(estimator, expected_failed_checks=excused, on_skip=None)


def test_methods_need_neither_lightning_nor_extras():
    code = (
        "import sys\nfrom classact.discover.ncd_clustering import NCDKMeans\nfrom classact.discover.pbn import PBN\n"
        "print({'lightning', 'matplotlib', 'timm', 'torchvision'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


X, Y, _ = blobs(per_class=6)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PBNNetwork(0, 2, 3), "in_dim: expected at least 1, got 0"),
        (lambda: PBNNetwork(4, 2, 3, dropout=1.0), r"dropout: expected a number in \[0, 1\), got 1.0"),
        (lambda: PBNNetwork(4, 2, 3, hidden=(3, 0)), r"hidden: expected widths of at least 1, got \[3, 0\]"),
        (lambda: PBNNetwork(4, 2, 3)(torch.rand(5, 3)), r"x: expected shape \(B, 4\), got \(5, 3\)"),
        (lambda: small(w=1.2).fit(X, Y), r"w: expected a number in \[0, 1\], got 1.2"),
        (lambda: small(w=1.0).fit(X), "w: with 1 only known rows are learned from"),
        (lambda: small(cluster_on="unit").fit(X, Y), "cluster_on: expected 'normalized' or 'raw', got 'unit'"),
        (lambda: small(lr=0.0).fit(X, Y), "lr: expected a positive number, got 0.0"),
        (lambda: small(batch_size=1).fit(X, Y), "batch_size: expected at least 2, got 1"),
        (lambda: small(epochs=0).fit(X, Y), "epochs: expected at least 1, got 0"),
        (lambda: small(n_clusters=13).fit(X, Y), "n_clusters: expected 1 to 12, the number of rows without a label"),
        (lambda: small().fit(X, Y[:-1]), "y: expected 30 labels, one for each row of X, got 29"),
        (lambda: small().fit(np.ones((9, 2))), "X: expected a column that is not constant"),
        (lambda: small(epochs=1).fit(X).predict_known(X), "predict_known: there was no known class in fit"),
        (lambda: NCDKMeans(2).fit(X).predict_known(X), "predict_known: there was no known class in fit"),
        (lambda: NCDKMeans(2, n_init=0).fit(X, Y), "n_init: expected at least 1, got 0"),
        (lambda: NCDKMeans(2, power=3).fit(X, Y), "power: expected 1 or 2, got 3"),
        (lambda: NCDKMeans(2, update="all").fit(X, Y), "update: expected 'novel', 'known' or 'both', got 'all'"),
        (lambda: NCDKMeans(2, update="known").fit(X), "update: with 'known' at least one known class"),
        (lambda: NCDSpectral(2, min_dist=1.0).fit(X, Y), r"min_dist: expected a number in \(0, 1\), got 1.0"),
        (lambda: NCDSpectral(2, edge_affinity="c").fit(X, Y), "edge_affinity: expected 'code' or 'exact', got 'c'"),
        (lambda: NCDSpectral(2, assign="c").fit(X, Y), "assign: expected 'ncd_kmeans' or 'kmeans', got 'c'"),
        (lambda: NCDSpectral(2, 30).fit(X, Y), "n_components: expected 1 to 29, below the number of rows, got 30"),
        (lambda: NCDSpectral(None).fit(X, Y), "n_components: expected a number when n_clusters is to be estimated"),
        (lambda: NCDSpectral(2).fit(np.zeros((20_001, 1))), "X: expected at most 20000 rows"),
        (lambda: NCDSpectral(2).fit(X).known_accuracy(), "known_accuracy: there was no known class in fit"),
        (lambda: TabularNCD(w1=2.0).fit(X, Y), r"w1: expected a number in \[0, 1\], got 2.0"),
        (lambda: TabularNCD(top_k=0).fit(X, Y), "top_k, k_neighbors: expected a percentage above 0"),
        (lambda: estimate_n_clusters(X, 2, 30), "k_min, k_max: expected 2 <= k_min <= k_max < 30 points, got 2, 30"),
        (lambda: estimate_n_clusters(X, 2, 3, 0), "n_runs: expected at least 1, got 0"),
        (lambda: estimate_n_clusters(X, 2, 3, index="gap"), "index: expected silhouette, .* got 'gap'"),
        (lambda: list(HiddenClassSplit(3, 1).split(X, Y)), "n_hidden: expected 1 to 2, below .* got 3"),
        (lambda: list(HiddenClassSplit(2, 7).split(X, np.arange(30) % 4)), "n_folds: expected 1 to 6, .* got 7"),
        (lambda: HiddenClassCV(NCDKMeans(2), {}).fit(X, None), "requires y to be passed"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
