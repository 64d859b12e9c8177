import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.nn import functional as F

import classact
from classact.data.retina import COUNTS, RETINA_TYPES, LNPopulation, natural_like_images
from classact.explain.image_priors import NormClip, gaussian_blur, laplacian_energy
from classact.explain.mds import (
    LossPlateau,
    MDSClustering,
    PixelChange,
    ResponseNormalizer,
    Rotations,
    _Twin,
    cluster_contrast,
    mds_objective,
)

SHAPE = (1, 8, 8)
SIGN = torch.tensor([1.0, -1.0] * 21)


def on_off(x):
    return x.flatten(1).mean(1, keepdim=True) * SIGN


def j(means, temperature=1.0, cluster=0):
    return cluster_contrast(torch.tensor([means]), torch.tensor([cluster]), temperature).item()


@pytest.fixture(scope="module")
def retina():
    """Twelve neurons of each of the first four types."""
    population = LNPopulation((12, 12, 12, 12, 0, 0), noise=0.1, seed=3)
    return population, ResponseNormalizer.from_responses(population(natural_like_images(200, seed=4)))


def of_retina(norm, **options):
    settings = {"n_clusters": 6, "temperature": 3.2, "steps": 15, "lr": 1.0, "constraint": NormClip(5.0), "n_init": 2}
    return MDSClustering(**{**settings, "response_norm": norm, "random_state": 0, **options})


@pytest.mark.parametrize(
    ("means", "temperature", "expected"),
    [
        ([1.0, 0.0, 0.0], 1.0, 0.547168),
        ([1.0, 0.0], 1.0, 0.379885),
        ([2.0, 2.0, 2.0], 1.0, 0.0),
        ([5.25, 2.6], 1.6, 0.518477),
        ([50.0, 0.0, 0.0, 0.0], 1.0, 1.386294),
        ([5.0, -5.0], 1.6, 0.691219),
    ],
)
def test_objective_of_given_means(means, temperature, expected):
    assert j(means, temperature) == pytest.approx(expected, abs=1e-6)


def test_objective_is_the_contrast_of_cluster_means():
    responses, assignment = torch.randn(3, 7), torch.tensor([0, 2, 1, 0, 2, 2, 1])
    means = torch.stack([responses[:, assignment == c].mean(1) for c in range(3)], dim=1)
    each = torch.tensor([2, 0, 1])
    torch.testing.assert_close(mds_objective(responses, assignment, each), cluster_contrast(means, each))
    one = mds_objective(responses, assignment, 1)
    torch.testing.assert_close(one, cluster_contrast(means, torch.tensor([1, 1, 1])))
    torch.testing.assert_close(mds_objective(responses + 3.7, assignment, 1), one)
    assert (mds_objective(100 * responses, assignment, each) <= math.log(3) + 1e-5).all()


def test_a_redundant_cluster_lowers_the_mean_objective():
    two = np.mean([j([5.0, 0.0], cluster=0), j([0.0, 5.0], cluster=1)])
    three = [j([5.0, 5.0, 0.0], cluster=0), j([5.0, 5.0, 0.0], cluster=1), j([0.0, 0.0, 5.0], cluster=2)]
    assert two == pytest.approx(0.686432, abs=1e-6)
    assert three == pytest.approx([0.402102, 0.402102, 1.085226], abs=1e-6)
    assert np.mean(three) == pytest.approx(0.629810, abs=1e-6)


def test_a_cluster_left_out_has_no_effect():
    responses, assignment = torch.randn(2, 6), torch.tensor([0, 0, 1, 1, 2, 2])
    changed = responses + 5 * (assignment == 2)
    value = mds_objective(responses, assignment, 0, among=[1])
    assert torch.equal(mds_objective(changed, assignment, 0, among=[1]), value)
    assert not torch.equal(mds_objective(changed, assignment, 0), mds_objective(responses, assignment, 0))
    torch.testing.assert_close(value, mds_objective(responses[:, :4], assignment[:4], 0))


def test_gradient_of_the_objective():
    responses = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    assignment, tau = torch.arange(9) % 3, 1.6
    (gradient,) = torch.autograd.grad(mds_objective(responses, assignment, 1, tau).sum(), responses)
    member = F.one_hot(assignment, 3).T.double() / 3
    weight = F.one_hot(torch.tensor([1]), 3) - (responses @ member.T / tau).softmax(1)
    torch.testing.assert_close(gradient, weight @ member / tau, atol=1e-6, rtol=0)


def test_laplacian_energy():
    assert laplacian_energy(torch.full((2, 1, 6, 6), 3.0)).abs().max() < 1e-10
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 3, 3] = 1
    assert laplacian_energy(x).item() == pytest.approx(0.172852, abs=1e-6)


def test_norm_then_clip():
    x = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(NormClip(3.0)(x).flatten(1).norm(dim=1), torch.full((4,), 3.0))
    clip = NormClip(3.0, -0.4, 0.5)
    assert clip(x).min() == -0.4 and clip(x).max() == 0.5
    inside = NormClip(1.0, -0.9, 0.9)(x)
    torch.testing.assert_close(NormClip(1.0, -0.9, 0.9)(inside), inside)


def test_agrees_with_the_authors_code():
    found = dict(np.load(Path(__file__).parent / "data" / "mds_reference.npz"))
    of = {name: torch.from_numpy(value) for name, value in found.items() if value.ndim}
    tau, each = float(found["temperature"]), torch.arange(4)
    responses, assignment = of["responses"], of["assignment"]
    value = mds_objective(responses, assignment, each, tau)
    np.testing.assert_allclose(value, found["objective"], atol=1e-6)
    norm = ResponseNormalizer(of["mean"], of["std"])
    value = mds_objective(norm(responses), assignment, each, tau)
    np.testing.assert_allclose(value, found["objective_normalized"], atol=1e-5)
    value = mds_objective(responses, assignment, each, tau, among=[1, 3])
    np.testing.assert_allclose(value, found["objective_among"], atol=1e-6)
    np.testing.assert_allclose(laplacian_energy(of["start"]), found["laplacian"], rtol=1e-5)
    constraint = NormClip(*(float(found[name]) for name in ("norm", "low", "high")))
    np.testing.assert_allclose(constraint(of["start"]), found["clipped"], atol=1e-6)

    options = {"normalize_grad": False, "lr": float(found["lr"]), "smoothness": float(found["smoothness"])}
    settings = MDSClustering(temperature=tau, constraint=constraint, **options)
    twin = _Twin(lambda x: F.softplus(x.flatten(1) @ of["weights"].T), (1, 8, 8), settings)
    x = twin.ascend(assignment, constraint(of["start"]), 20)
    np.testing.assert_allclose(x, found["stimuli"], atol=1e-5)
    np.testing.assert_allclose(-twin.objective(assignment)(x), found["losses"], atol=1e-5)

    plateau, still = LossPlateau(10, 0.9).watch(), PixelChange(0.0, 1.0, 10).watch()
    curve = of["curve"]
    assert next(i for i, v in enumerate(curve) if plateau(i, v, v[None])) == found["stops"][0]
    pictures = curve.square().view(-1, 1, 1, 1, 1) / 20
    assert next(i for i, x in enumerate(pictures) if still(i, x, x)) == found["stops"][1]


def test_authors_example_of_on_and_off_units():
    for seed in range(3):
        mds = MDSClustering(5, constraint=None, normalize_grad=False, lr=100.0, steps=50, n_init=1, random_state=seed)
        mds.fit(on_off, (1, 18, 18))
        assert adjusted_rand_score(SIGN, mds.labels_) == 1
        assert len(mds.stimuli_) == 2 == len(mds.objective_)
        assert mds.history_[-1].moved == 0 and len(mds.history_) == mds.n_rounds_


def test_recovers_types_and_keeps_its_promises(retina):
    population, norm = retina
    mds = of_retina(norm).fit(population, (1, 16, 16))
    k = len(mds.stimuli_)
    assert adjusted_rand_score(population.types, mds.labels_) > 0.7
    assert np.unique(mds.labels_).tolist() == list(range(k))
    assert (mds.responses_.argmax(0) == mds.labels_).all()
    torch.testing.assert_close(mds.stimuli_.flatten(1).norm(dim=1), torch.full((k,), 5.0))
    responses = norm(population(mds.stimuli_))
    np.testing.assert_allclose(mds.responses_, responses, atol=1e-5)
    expected = mds_objective(responses, torch.from_numpy(mds.labels_), torch.arange(k), 3.2)
    np.testing.assert_allclose(mds.objective_, expected, atol=1e-5)
    means = [float(run.objective.mean()) for run in mds.restarts_]
    assert mds.objective_.mean() == pytest.approx(max(means), abs=1e-6)
    matrix = mds.response_matrix()
    np.testing.assert_allclose(matrix.diagonal(), 1, rtol=1e-6)
    ratio = responses[0, mds.labels_ == 1].mean() / responses[1, mds.labels_ == 1].mean()
    assert matrix[0, 1] == pytest.approx(float(ratio), rel=1e-4)


def test_same_seed_same_clusters(retina):
    population, norm = retina
    first, second, other = (of_retina(norm, random_state=s, n_init=1).fit(population, (1, 16, 16)) for s in (1, 1, 2))
    assert (first.labels_ == second.labels_).all() and torch.equal(first.stimuli_, second.stimuli_)
    assert not torch.equal(first.stimuli_[0], other.stimuli_[0])


def test_the_order_of_units_does_not_matter(retina):
    population, norm = retina
    labels, order = np.arange(48) % 6, np.random.default_rng(0).permutation(48)
    options = {"n_init": 1, "n_rounds": 3, "steps": 5}
    mds = of_retina(norm, **options).fit(population, (1, 16, 16), labels=labels)
    permuted = of_retina(ResponseNormalizer(norm.mean[order], norm.std[order]), **options)
    permuted.fit(lambda x: population(x)[:, order], (1, 16, 16), labels=labels[order])
    assert (permuted.labels_ == mds.labels_[order]).all()
    torch.testing.assert_close(permuted.stimuli_, mds.stimuli_, atol=1e-3, rtol=0)


def test_assign_ignores_offset_and_gain(retina):
    population, norm = retina
    mds = of_retina(norm, n_init=1).fit(population, (1, 16, 16))
    responses = population(mds.stimuli_).numpy()
    assert (mds.assign(responses) == mds.labels_).all()
    rng = np.random.default_rng(0)
    gain, offset = rng.uniform(0.1, 3, 48), rng.normal(size=48)
    assert (mds.assign(responses * gain + offset) == mds.labels_).all()
    trials = responses + rng.normal(0, 1e-4, (5, *responses.shape))
    assert (mds.assign(trials)[:, None] == mds.assign(torch.from_numpy(trials.mean(0)))[:, None]).all()


def test_without_contrast_the_stimuli_are_those_that_excite_most(retina):
    population, norm = retina
    labels = population.types.numpy()
    options = {"contrast": False, "n_rounds": 1, "n_init": 1, "steps": 60, "lr": (1.0, 0.1)}
    exciting = of_retina(norm, **options).fit(population, (1, 16, 16), labels=labels)
    contrastive = of_retina(norm, **{**options, "contrast": True}).fit(population, (1, 16, 16), labels=labels)
    own = [
        [norm(population(mds.stimuli_))[c, labels == c].mean().item() for c in range(4)]
        for mds in (exciting, contrastive)
    ]
    assert (np.array(own[0]) > np.array(own[1]) - 1e-3).all()
    assert exciting.objective_.mean() < contrastive.objective_.mean()


def test_splitting_lowers_the_loss_and_finds_more_types(retina):
    population, norm = retina
    mds = of_retina(norm, n_clusters=2, n_init=1).fit(population, (1, 16, 16))
    before = len(mds.stimuli_)
    assert mds.split_losses_ == []
    mds.split_clusters(population, rounds=10)
    assert len(mds.stimuli_) >= 3 > before
    assert len(mds.split_losses_) > 1 and (np.diff(mds.split_losses_) < 0).all()
    assert np.unique(mds.labels_).tolist() == list(range(len(mds.stimuli_)))
    assert (mds.responses_.argmax(0) == mds.labels_).all()


def test_splitting_leaves_good_clusters_alone():
    mds = MDSClustering(2, split=True, n_init=1, random_state=0).fit(on_off, SHAPE)
    assert len(mds.stimuli_) == 2 and len(mds.split_losses_) == 1


def gabors(n, side=15):
    """Units with one Gabor filter, turned by multiples of 360 / n degrees."""
    at = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    window = (-(x**2 + y**2) / 18).exp()
    angles = torch.arange(n) * 2 * math.pi / n
    filters = torch.stack([window * (x * a.cos() + y * a.sin() - 1.0).mul(1.2).cos() for a in angles])
    return lambda s: 3 * F.relu(s.flatten(1) @ F.normalize(filters.flatten(1)).T)


@pytest.mark.parametrize("n", [4, 8])
def test_rotations_make_orientations_one_type(n):
    options = {"temperature": 0.5, "constraint": NormClip(3.0), "lr": 0.5, "n_init": 1, "random_state": 0}
    turned = MDSClustering(4, invariance=Rotations(n), **options).fit(gabors(n), (1, 15, 15))
    plain = MDSClustering(4, **options).fit(gabors(n), (1, 15, 15))
    assert len(turned.stimuli_) == 1 and not turned.labels_.any()
    assert turned.objective_.tolist() == [0.0]
    assert len(plain.stimuli_) > 2


def test_rotated_copies():
    x = torch.randn(2, 3, 5, 7, 7)
    copies = Rotations(4).copies(x)
    assert copies.shape == (8, 3, 5, 7, 7)
    for quarter in range(4):
        match = [torch.rot90(x, turn, (-2, -1)) for turn in (quarter, -quarter)]
        assert min((copies[2 * quarter : 2 * quarter + 2] - m).abs().max() for m in match) < 1e-5
    # a disc stays a disc in an image that is not square
    y, x = torch.meshgrid(torch.arange(9) - 4.0, torch.arange(15) - 7.0, indexing="ij")
    disc = (-(x**2 + y**2) / 4).exp()[None, None]
    assert (Rotations(8).copies(disc) - disc).abs().max() < 0.03
    torch.testing.assert_close(Rotations(1)(lambda x: x.flatten(1))(disc), disc.flatten(1))


def test_videos_and_the_model_is_left_as_it_was():
    network = nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.Dropout(), nn.Flatten(), nn.Linear(3 * 8 * 16, 6))
    network[0].weight.requires_grad_(requires_grad=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen = []
    network[4].register_forward_hook(lambda *_: seen.append(network.training))
    options = {"n_clusters": 3, "n_rounds": 2, "steps": 3, "n_init": 1, "random_state": 0}
    mds = MDSClustering(smoothness=0.1, **options).fit(network, (2, 10, 6, 6))
    assert mds.stimuli_.shape[1:] == (2, 10, 6, 6)
    assert seen and not any(seen)
    assert all(part.training for part in network.modules())
    assert [p.requires_grad for p in network.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not mds.stimuli_.requires_grad

    network[4].register_forward_hook(lambda _, __, out: out * math.nan)
    with pytest.raises(ValueError, match="model: expected finite responses"):
        MDSClustering(**options).fit(network, (2, 10, 6, 6))
    assert network.training and network[4].weight.requires_grad


def test_smoothness_preconditioner_and_stopper(retina):
    population, norm = retina
    options = {"n_init": 1, "n_rounds": 2}
    plain = of_retina(norm, **options).fit(population, (1, 16, 16))
    smooth = of_retina(norm, smoothness=10.0, **options).fit(population, (1, 16, 16))
    blurred = of_retina(norm, precondition=lambda g: gaussian_blur(g, 2.0), **options).fit(population, (1, 16, 16))
    energy = [laplacian_energy(mds.stimuli_).mean() for mds in (plain, smooth, blurred)]
    assert energy[1] < 0.7 * energy[0] and energy[2] < energy[0]

    calls = []

    def counted(x):
        calls.append(len(x))
        return on_off(x)

    MDSClustering(2, steps=300, n_rounds=1, n_init=1, stopper=LossPlateau(5), random_state=0).fit(counted, SHAPE)
    assert len(calls) < 200
    calls.clear()
    stopper = PixelChange(-1.0, 1.0, 5)
    MDSClustering(2, steps=300, n_rounds=1, n_init=1, stopper=stopper, random_state=0).fit(counted, SHAPE)
    assert len(calls) < 100
    calls.clear()
    MDSClustering(2, steps=300, n_rounds=1, n_init=1, random_state=0).fit(counted, SHAPE)
    assert calls == [1, *[2] * 301]  # one to count the units, one of all stimuli per step, one to reassign


def test_stimuli_start_anew_unless_warm():
    starts = []

    def model(x):
        starts.append(x.detach().clone())
        return x.flatten(1)[:, :6]

    options = {"n_clusters": 3, "steps": 1, "n_rounds": 2, "n_init": 1, "random_state": 0}
    labels = np.array([0, 1, 2, 1, 2, 0])
    for warm in (True, False):
        starts.clear()
        MDSClustering(warm_start_stimuli=warm, **options).fit(model, (1, 4, 4), labels=labels)
        assert len(starts) == 5  # the probe, and ascent and reassignment of two rounds
        kept = starts[3].flatten(1)[:, None] - starts[2].flatten(1)
        assert bool((kept.abs().sum(-1) == 0).any(1).all()) == warm


def test_it_is_an_estimator(retina):
    _, norm = retina
    mds = of_retina(norm, invariance=Rotations(4), stopper=LossPlateau())
    copy = clone(mds)
    assert copy.get_params().keys() == mds.get_params().keys()
    assert copy.invariance == mds.invariance and copy.constraint == NormClip(5.0)
    assert torch.equal(copy.response_norm.mean, norm.mean)
    assert copy.set_params(n_clusters=3).n_clusters == 3
    labels = MDSClustering(2, n_init=1, random_state=0).fit_predict(on_off, stimulus_shape=SHAPE)
    assert adjusted_rand_score(SIGN, labels) == 1
    pair = MDSClustering(2, n_init=1, response_norm=(torch.zeros(42), torch.ones(42)), random_state=0)
    assert adjusted_rand_score(SIGN, pair.fit(on_off, SHAPE).labels_) == 1


def test_normaliser_guards_silent_units():
    norm = ResponseNormalizer.from_responses(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert norm.mean.tolist() == [2.0, 2.0]
    out = norm(torch.tensor([[2.0, 2.1]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.1 / (0.1 + 1e-6)]]))


def test_float32_under_autocast():
    responses, assignment = torch.randn(3, 8), torch.arange(8) % 3
    expected = mds_objective(responses, assignment, 1)
    with torch.autocast("cpu", torch.bfloat16):
        value = mds_objective(responses, assignment, 1)
        rounded = mds_objective(responses.bfloat16(), assignment, 1)
        mds = MDSClustering(5, n_init=1, random_state=0).fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 42)), SHAPE)
    torch.testing.assert_close(value, expected)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, atol=0.02, rtol=0)
    assert mds.stimuli_.isfinite().all() and np.isfinite(mds.objective_).all()


@pytest.mark.bare
def test_objective_compiles_and_exports():
    means, cluster, among = torch.randn(3, 5), torch.tensor([0, 4, 2]), torch.tensor([True, False, True, True, False])
    compiled = torch.compile(cluster_contrast, backend="aot_eager", fullgraph=True)
    leaf = means.clone().requires_grad_()
    value = compiled(leaf, cluster, 1.6, among)
    torch.testing.assert_close(value, cluster_contrast(means, cluster, 1.6, among))
    value.sum().backward()
    assert leaf.grad.isfinite().all()

    class Losses(nn.Module):
        def forward(self, means, cluster):
            return cluster_contrast(means, cluster)

    exported = torch.export.export(Losses(), (means, cluster)).module()
    torch.testing.assert_close(exported(means, cluster), cluster_contrast(means, cluster))


def test_synthetic_retina(tmp_path):
    population = LNPopulation(seed=1)
    assert population.types.bincount().tolist() == list(COUNTS)
    assert population.templates.shape == (len(RETINA_TYPES), 16, 16)
    torch.testing.assert_close(population.filters.flatten(1).norm(dim=1), torch.ones(175))
    similarity = population.filters.flatten(1) @ population.templates.flatten(1).T
    assert (similarity.argmax(1) == population.types).float().mean() > 0.95
    x = natural_like_images(5, norm=3.0, seed=2)
    torch.testing.assert_close(x.flatten(1).norm(dim=1), torch.full((5,), 3.0))
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(5), atol=1e-6, rtol=0)
    rates = population(x)
    drive = (x[:, 0, None] * population.filters).sum((-2, -1))
    torch.testing.assert_close(rates, population.gain * F.softplus(1.5 * drive + population.bias))
    assert torch.equal(LNPopulation(seed=1).filters, population.filters)
    assert not torch.equal(LNPopulation(seed=2).filters, population.filters)
    loaded = classact.load(classact.save(population, tmp_path / "retina"), LNPopulation(seed=5))
    assert torch.equal(loaded(x), rates)


def fitted():
    return MDSClustering(2, n_init=1, n_rounds=1, steps=1, random_state=0).fit(on_off, SHAPE)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MDSClustering(1).fit(on_off, SHAPE), "n_clusters: expected 2 to 42, the number of units, got 1"),
        (lambda: MDSClustering(43).fit(on_off, SHAPE), "n_clusters: expected 2 to 42, the number of units, got 43"),
        (lambda: MDSClustering(temperature=0.0).fit(on_off, SHAPE), "temperature: expected a positive number, got 0"),
        (lambda: MDSClustering(steps=0).fit(on_off, SHAPE), "steps: expected at least 1, got 0"),
        (lambda: MDSClustering(smoothness=-1.0).fit(on_off, SHAPE), "smoothness: expected 0 or more, got -1.0"),
        (lambda: MDSClustering().fit(torch.sum, SHAPE), r"model: expected responses of shape \(1, n\) .* got \(\)"),
        (lambda: MDSClustering().fit(lambda x: x, SHAPE), r"model: expected .* got \(1, 1, 8, 8\)"),
        (lambda: MDSClustering().fit(lambda x: [x], SHAPE), "model: expected .* got list"),
        (lambda: MDSClustering().fit(lambda x: on_off(x) / 0, SHAPE), "model: expected finite responses"),
        (lambda: MDSClustering().fit(on_off, SHAPE, labels=[0, 1]), r"labels: expected shape \(42,\), got \(2,\)"),
        (lambda: MDSClustering().fit(on_off, SHAPE, labels=[0, 2] * 21), r"labels: expected clusters .* got \[0, 2\]"),
        (
            lambda: MDSClustering(response_norm=(torch.zeros(2), torch.ones(2))).fit(on_off, SHAPE),
            "response_norm: expected mean and std of 42 units, got shapes",
        ),
        (lambda: fitted().assign(np.zeros((3, 5))), r"responses: expected shape \(2, m\) or \(trials, 2, m\), got"),
        (lambda: fitted().assign(np.full((2, 5), np.nan)), "responses: expected finite numbers"),
        (lambda: fitted().split_clusters(on_off, 1), "n_subclusters: expected at least 2, got 1"),
        (lambda: Rotations(0), "n: expected at least 1 rotation, got 0"),
        (lambda: Rotations().copies(torch.zeros(2, 4)), r"x: expected shape .* got \(2, 4\)"),
        (lambda: cluster_contrast(torch.zeros(2, 3), torch.tensor([0])), r"means, cluster: expected shapes .* got"),
        (
            lambda: cluster_contrast(torch.zeros(1, 3), torch.tensor([0]), among=torch.ones(2, dtype=torch.bool)),
            r"among: expected shape \(3,\), got \(2,\)",
        ),
        (lambda: mds_objective(torch.zeros(2, 3), torch.tensor([0]), 0), r"responses, assignment: expected shapes"),
        (lambda: mds_objective(torch.zeros(2, 2), torch.tensor([0, 2]), 0), "assignment: expected .* 1 is empty"),
        (
            lambda: mds_objective(torch.zeros(2, 2), torch.tensor([0, 1]), 2),
            r"cluster, among: expected clusters from 0",
        ),
        (lambda: LNPopulation((1, 2)), r"counts: expected 6 numbers of neurons, got \[1, 2\]"),
        (lambda: LNPopulation()(torch.zeros(1, 16, 16)), r"x: expected shape \(N, 1, 16, 16\), got"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_nothing_can_be_assigned_before_fitting():
    with pytest.raises(NotFittedError):
        MDSClustering().assign(np.zeros((10, 3)))


@pytest.mark.bare
def test_a_gradient_that_is_not_finite_is_reported():
    with pytest.raises(FloatingPointError, match="not finite"):
        MDSClustering(2, constraint=None, random_state=0).fit(lambda x: (x.flatten(1)[:, :4] * 0).sqrt(), SHAPE)
