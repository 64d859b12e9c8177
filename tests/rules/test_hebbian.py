import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from classact.rules.hebbian import (
    MultitaskingHebbian,
    critical_dilution,
    dataset_entropy,
    diluted_patterns,
    hierarchical_amplitudes,
    hierarchical_state,
    learning_threshold,
    mattis_overlaps,
    noisy_examples,
    one_step,
    one_step_gaussian,
    parallel_dilution,
    phase_diagram,
    quadratic_losses,
    self_consistency,
    stability,
    symmetric_amplitude,
    unknown_bits,
)


def states(n_states, n, seed=0):
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (n_states, n))


def couplings(protocol, xi, M, r, examples):
    """The N x N couplings with zero diagonal, written as in the paper."""
    n = xi.shape[1]
    R = r**2 + (1 - r**2) / M
    if protocol == "store":
        J = np.einsum("ki,kj->ij", xi, xi) / n
    elif protocol == "supervised":
        mean = examples.mean(1)
        J = np.einsum("ki,kj->ij", mean, mean) / (n * R)
    else:
        J = np.einsum("kai,kaj->ij", examples.astype(float), examples) / (n * R * M)
    return J * (1 - np.eye(n))


def fitted(protocol, N=50, K=3, M=4, r=0.6, **settings):
    xi = diluted_patterns(K, N, 0.3, seed=0)
    examples = noisy_examples(xi, M, r, seed=1)
    model = MultitaskingHebbian(protocol, r=r, random_state=0, **settings)
    if protocol == "store":
        return model.fit(xi), couplings(protocol, xi, M, r, examples)
    return model.fit(examples.reshape(K * M, N), np.repeat(range(K), M)), couplings(protocol, xi, M, r, examples)


PROTOCOLS = pytest.mark.parametrize("protocol", ["store", "supervised", "unsupervised"])


def test_patterns_and_examples_have_their_statistics():
    xi = diluted_patterns(4, 50_000, 0.3, seed=0)
    assert xi.dtype == np.int8 and set(np.unique(xi)) == {-1, 0, 1}
    for value, probability in ((0, 0.3), (1, 0.35), (-1, 0.35)):
        assert abs((xi == value).mean() - probability) < 4 * math.sqrt(0.25 / xi.size)
    examples = noisy_examples(xi, 3, 0.4, seed=1)
    assert examples.shape == (4, 3, 50_000) and examples.dtype == np.int8
    assert ((examples == 0) == (xi == 0)[:, None]).all()
    agreement = (examples * xi[:, None])[examples != 0].mean()
    assert abs(agreement - 0.4) < 4 / math.sqrt(examples.size * 0.7)
    assert np.array_equal(diluted_patterns(2, 9, 0.5, seed=3), diluted_patterns(2, 9, 0.5, seed=3))
    assert not np.array_equal(examples, noisy_examples(xi, 3, 0.4, seed=2))
    # the seed may be that of the patterns: the bits of the draws of patterns are not those of the examples
    first = (noisy_examples(xi, 1, 0.4, seed=0)[:, 0] * xi).ravel()
    assert all(abs(np.mean(first[at::2] * xi.ravel()[: len(first[at::2])])) < 0.02 for at in (0, 1))
    assert (diluted_patterns(2, 9, 1.0, seed=0) == 0).all() and (diluted_patterns(2, 9, 0.0, seed=0) != 0).all()


@PROTOCOLS
@pytest.mark.parametrize("dynamics", ["sequential", "parallel"])
def test_fields_and_energy_are_those_of_the_explicit_couplings(protocol, dynamics):
    model, J = fitted(protocol, dynamics=dynamics)
    s = states(5, 50)
    np.testing.assert_allclose(model.fields(s), s @ J, atol=1e-12)
    np.testing.assert_allclose(model.fields(s[0]), J @ s[0], atol=1e-12)
    assert model.energy(s[0]) == pytest.approx(model.energy(s)[0])
    diagonal = model.energy(s) + 0.5 * np.einsum("ri,ij,rj->r", s, J, s)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-12)  # the self-interaction, a constant


@PROTOCOLS
@pytest.mark.parametrize("beta", [math.inf, 2.0])
@pytest.mark.parametrize("replicas", [3, 40])
def test_sequential_updates_are_those_of_one_spin_after_the_other(protocol, beta, replicas):
    model, J = fitted(protocol, N=150, beta=beta)
    s = states(replicas, 150)
    S = np.array(s.T, model._dtype)
    model._sweep(S, model._sums(S), np.random.default_rng(1), np.random.default_rng(2))
    order, noise = np.random.default_rng(1).permutation(150), np.random.default_rng(2)
    size = 1024 if replicas < 16 else 128
    expected = s.T.astype(float)
    for start in range(0, 150, size):
        block = order[start : start + size]
        u = noise.random((len(block), replicas), np.float32) if math.isfinite(beta) else None
        for number, i in enumerate(block):
            h = J[i] @ expected
            if u is None:
                expected[i] = np.where(np.abs(h) < 1e-12, expected[i], np.sign(h))
            else:
                expected[i] = np.where(u[number] < 1 / (1 + np.exp(-2 * beta * h)), 1, -1)
    assert (expected != S).mean() < (0.001 if u is not None else 1e-9)  # u in single precision may fall on either side


@PROTOCOLS
def test_parallel_updates_see_the_state_before(protocol):
    model, J = fitted(protocol, dynamics="parallel", max_sweeps=1)
    s = states(4, 50)
    h = s @ J
    expected = np.where(np.abs(h) < 1e-12, s, np.sign(h))
    assert np.array_equal(model.run(s).state, expected)


def test_noise_follows_glauber():
    model, J = fitted("store", N=30, beta=0.8, dynamics="parallel", max_sweeps=1)
    s = states(1, 30)
    up = (model.run(np.repeat(s, 20_000, 0)).state == 1).mean(0)
    expected = 1 / (1 + np.exp(-2 * 0.8 * J @ s[0]))
    assert (np.abs(up - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-6).all()


def test_equilibrium_is_boltzmanns():
    xi = diluted_patterns(2, 8, 0.3, seed=2)
    model = MultitaskingHebbian(beta=1.0, max_sweeps=15, random_state=0).fit(xi)
    every = np.array(list(itertools.product([-1, 1], repeat=8)))
    weight = np.exp(-model.energy(every))
    weight /= weight.sum()
    last = model.run(states(6000, 8)).state
    seen = np.bincount((last == 1) @ (2 ** np.arange(7, -1, -1)), minlength=256) / len(last)
    assert np.abs(seen - weight).sum() < 1.2 * np.sqrt(weight / len(last)).sum()


@PROTOCOLS
def test_without_noise_the_energy_never_rises_and_ends_at_a_fixed_point(protocol):
    model, J = fitted(protocol, N=200)
    result = model.run(states(60, 200), xi=model.patterns_)
    assert (np.diff(result.energy, axis=0) <= 1e-9).all()
    assert result.converged.all()
    assert (result.state * (result.state @ J) >= -1e-9).all()
    np.testing.assert_allclose(result.energy[-1], model.energy(result.state), atol=1e-9)
    np.testing.assert_allclose(result.overlaps[-1], model.overlaps(result.state), atol=1e-12)
    assert set(np.unique(result.state)) == {-1, 1}


def test_one_state_or_several():
    model, _ = fitted("store", N=60)
    s = states(3, 60)
    one, all_ = model.run(s[0], xi=model.patterns_), model.run(s, xi=model.patterns_)
    assert one.state.shape == (60,) and one.overlaps.shape == (len(one.energy), 3) and one.converged.shape == ()
    assert np.array_equal(one.state, all_.state[0])  # without noise replicas do not know of each other
    assert all_.energy.shape == (len(all_.overlaps), 3) and model.run(s).overlaps is None


def test_result_is_that_of_the_seed_whatever_the_number_of_threads():
    model, _ = fitted("store", N=60, beta=3.0, max_sweeps=4)
    s = states(600, 60)
    first = model.run(s)
    again = model.set_params(n_jobs=2).run(s)
    assert np.array_equal(first.state, again.state) and np.array_equal(first.energy, again.energy)
    assert not np.array_equal(first.state, model.set_params(random_state=1).run(s).state)
    assert not np.array_equal(first.state[:60], model.set_params(random_state=0).run(s[:1].repeat(60, 0)).state)


def test_protocols_agree_for_one_example_and_for_perfect_ones():
    xi = diluted_patterns(3, 80, 0.3, seed=0)
    s, labels = states(4, 80), np.repeat(range(3), 5)
    single = noisy_examples(xi, 1, 0.5, seed=1)[:, 0]
    fields = [MultitaskingHebbian(p).fit(single, range(3)).fields(s) for p in ("store", "supervised", "unsupervised")]
    np.testing.assert_allclose(fields[1], fields[0], atol=1e-14)
    np.testing.assert_allclose(fields[2], fields[0], atol=1e-14)
    perfect = noisy_examples(xi, 5, 1.0, seed=1).reshape(15, 80)
    stored = MultitaskingHebbian().fit(xi).fields(s)
    for protocol in ("supervised", "unsupervised"):
        np.testing.assert_allclose(MultitaskingHebbian(protocol).fit(perfect, labels).fields(s), stored, atol=1e-14)


def test_quality_is_estimated_and_examples_may_be_unequally_many():
    xi = diluted_patterns(2, 20_000, 0.2, seed=0)
    examples = noisy_examples(xi, 12, 0.4, seed=1)
    X, y = np.concatenate([examples[0], examples[1, :3]]), np.array(["a"] * 12 + ["b"] * 3)
    known, estimated = (MultitaskingHebbian("supervised", r=r).fit(X, y) for r in (0.4, None))
    R = 0.4**2 + (1 - 0.4**2) / np.array([12, 3])
    np.testing.assert_allclose(known.weights_, 1 / R)
    np.testing.assert_allclose(estimated.weights_, known.weights_, rtol=0.02)
    assert known.classes_.tolist() == ["a", "b"]
    small = MultitaskingHebbian("unsupervised", r=0.4).fit(X[:, :40], y)
    np.testing.assert_allclose(small.weights_, np.repeat(1 / (R * [12, 3]), [12, 3]))
    J = np.einsum("p,pi,pj->ij", small.weights_, X[:, :40].astype(float), X[:, :40]) / 40 * (1 - np.eye(40))
    s = states(20, 40)
    np.testing.assert_allclose(small.fields(s), s @ J, atol=1e-12)
    end = small.run(s)
    assert (end.state * (end.state @ J) > -1e-5).all()
    np.testing.assert_allclose(end.energy[-1], small.energy(end.state), rtol=1e-5)


def test_labels_of_the_unsupervised_protocol_only_count():
    _, N, labels = 3, 60, np.repeat(range(3), 4)
    X = noisy_examples(diluted_patterns(3, N, 0.3, 0), 4, 0.5, 1).reshape(12, N)
    s = states(5, N)
    shuffled = np.random.default_rng(0).permutation(labels)
    one, other, none = (
        MultitaskingHebbian("unsupervised", r=0.5, random_state=0).fit(X, y) for y in (labels, shuffled, None)
    )
    np.testing.assert_array_equal(one.fields(s), other.fields(s))
    R = 0.25 + 0.75 / 4
    np.testing.assert_allclose(one.fields(s), none.fields(s) * 12 / (4 * R), atol=1e-12)
    assert np.array_equal(one.run(s).state, none.run(s).state)


def test_normalization_divides_by_what_is_not_blank():
    xi = diluted_patterns(3, 100, 0.4, seed=0)
    plain, scaled = (MultitaskingHebbian(normalize=n).fit(xi) for n in (False, True))
    np.testing.assert_allclose(scaled.fields(xi[0]) * (xi != 0).mean(), plain.fields(xi[0]))


def test_gauge_invariance():
    xi, s = diluted_patterns(3, 70, 0.3, seed=0), states(1, 70)[0]
    gauge = states(1, 70, seed=9)[0]
    first = MultitaskingHebbian(random_state=0).fit(xi).run(s, xi)
    second = MultitaskingHebbian(random_state=0).fit(xi * gauge).run(s * gauge, xi * gauge)
    np.testing.assert_array_equal(first.overlaps, second.overlaps)
    assert np.array_equal(first.state, second.state * gauge)


def test_spins_without_field_keep_their_value_and_unknown_ones_get_one():
    xi = np.array([[1, 1, 1, 0, 0, 0], [1, -1, 1, 0, 0, 0]])
    model = MultitaskingHebbian(random_state=0).fit(xi)
    s = np.array([1, 1, 1, -1, 1, -1])
    assert model.run(s).state[3:].tolist() == [-1, 1, -1]
    end = model.run(np.array([1, 1, 0, 0, 0, 0])).state
    assert end[:3].tolist() == [1, 1, 1] and (end[3:] != 0).all()
    large = MultitaskingHebbian(random_state=0).fit(diluted_patterns(1, 1000, 1.0, seed=0))
    assert abs(large.run(np.zeros(1000)).state.mean()) < 0.15


def test_transform_tells_the_pattern_of_a_cue():
    xi = diluted_patterns(3, 600, 0.2, seed=0)
    model = MultitaskingHebbian(random_state=0).fit(xi)
    cues = noisy_examples(xi, 4, 0.7, seed=1).reshape(12, 600)
    found = model.transform(cues)
    assert found.shape == (12, 3) and found.argmax(1).tolist() == np.repeat(range(3), 4).tolist()
    assert model.get_feature_names_out().tolist() == [f"multitaskinghebbian{k}" for k in range(3)]


@pytest.mark.bare
def test_passes_the_checks_of_scikit_learn():
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(MultitaskingHebbian(blank=0.5, random_state=0), on_skip=None)


def test_hierarchical_regime():
    for K, expected in ((2, 1.0), (3, 0.6180339887), (4, 0.5436890127), (5, 0.5187900637)):
        assert critical_dilution(K) == pytest.approx(expected, abs=1e-10)
    m = hierarchical_amplitudes(3, 0.25)
    np.testing.assert_allclose(m, [0.75, 0.1875, 0.046875], atol=1e-15)
    assert -np.square(m).sum() / 2 == pytest.approx(-0.2999267578, abs=1e-10)
    for K, d in ((2, 0.9), (3, 0.61), (4, 0.54), (6, 0.3), (9, 0.45)):
        np.testing.assert_allclose(one_step(K, d), hierarchical_amplitudes(K, d), atol=1e-12)  # it reproduces itself
    assert not np.allclose(one_step(3, 0.63), hierarchical_amplitudes(3, 0.63), atol=1e-3)
    np.testing.assert_allclose(self_consistency(3, 0.7).m, [0.2865, 0.2235, 0.1605], atol=1e-9)
    np.testing.assert_allclose(self_consistency(3, 0.2, 1 / (0.1 * 0.8)).m, [0.8, 0.1532, 0.0], atol=1e-4)
    mixture = self_consistency(3, 0.3, m0=[0.4, 0.2, 0.5]).m
    np.testing.assert_allclose(mixture, [0.3815, 0.2345, 0.5285], atol=1e-9)


def test_state_of_the_hierarchy_has_its_amplitudes():
    xi = diluted_patterns(4, 200_000, 0.4, seed=0)
    s = hierarchical_state(xi)
    np.testing.assert_allclose(mattis_overlaps(s, xi), hierarchical_amplitudes(4, 0.4), atol=4 / math.sqrt(200_000))
    blank = (xi == 0).all(0)
    assert abs(s[blank].mean()) < 4 / math.sqrt(blank.sum())


def test_symmetric_state_and_its_stability():
    for K, d, m in ((2, 0.5, 0.375), (2, 0.8, 0.18), (3, 0.5, 0.3125), (3, 0.8, 0.164), (5, 0.5, 0.24609375)):
        assert symmetric_amplitude(K, d) == pytest.approx(m, abs=1e-12)
        assert stability([m] * K, d, math.inf) == math.inf
    found = self_consistency(3, 0.8, 25.0)
    np.testing.assert_allclose(found.m, [0.18256, 0.16455, 0.14460], atol=5e-6)
    assert found.residual < 1e-10
    m = symmetric_amplitude(3, 0.8, 25.0)
    assert m == pytest.approx(0.16393, abs=5e-6)
    assert stability([m] * 3, 0.8, 25.0) == pytest.approx(1.2037, abs=5e-5)
    np.testing.assert_allclose(self_consistency(3, 0.8, 25.0, m0=[m] * 3).m, [m] * 3, atol=1e-9)
    listed = ((0.95, 0.90, 0.80, 0.71, 0.61), (0.966, 0.928, 0.842, 0.744, 0.628), (0.974, 0.944, 0.869, 0.766, 0.636))
    for K, expected in enumerate(listed, start=2):
        boundary = [parallel_dilution(K, t) for t in (0.05, 0.1, 0.2, 0.3, 0.5)]
        np.testing.assert_allclose(boundary, expected, atol=2.5e-3)
    assert stability(hierarchical_amplitudes(3, 0.3), 0.3, math.inf) == 0.0


def test_stability_is_the_slope_of_the_update():
    d, beta = 0.75, 15.0
    m = self_consistency(3, d, beta, tolerance=1e-9).m
    slope = np.stack([(one_step(3, d, m0=m + 1e-6 * e, beta=beta) - m) / 1e-6 for e in np.eye(3)])
    assert np.linalg.eigvals(slope).real.max() == pytest.approx(stability(m, d, beta), abs=1e-4)


def test_one_pattern_is_a_magnet():
    for d, beta in ((0.0, 1.3), (0.4, 2.5)):
        m = self_consistency(1, d, beta).m[0]
        assert m == pytest.approx((1 - d) * math.tanh(beta * m), abs=1e-9) and m > 0.3
        assert symmetric_amplitude(1, d, beta) == pytest.approx(m, abs=1e-9)
    assert symmetric_amplitude(1, 0.4, 1 / 0.6) == 0.0 < symmetric_amplitude(1, 0.4, 1.01 / 0.6)
    assert symmetric_amplitude(4, 0.4, 0.999 / 0.6) == 0.0 < symmetric_amplitude(4, 0.4, 1.001 / 0.6)


def test_phase_diagram():
    found = phase_diagram(3, [0.001, 0.3, 0.8, 0.93], [0.2, 1.0])
    assert found.phase[:, 0].tolist() == ["hierarchical"] * 3 + ["parallel"]
    assert (found.phase[:, 1] == "ergodic").all()
    assert found.m.shape == (4, 2, 3)
    np.testing.assert_allclose(found.m[3, 0], 0.0652607, atol=1e-6)
    np.testing.assert_allclose(found.m[1, 0], [0.69968, 0.18078, 0.0], atol=1e-5)
    assert (found.stability[:, 0] < 1).tolist() == [True, False, False, True]  # dense mixtures of three are stable


def enumerated(K, d, r, M, n, beta):
    """The update, by all configurations of a site."""
    R = r**2 + (1 - r**2) / M
    choices = [(0, 0.0, d)]  # entry, entry times mean of the signs, probability
    for sign, k in itertools.product((-1, 1), range(M + 1)):
        choices += [(sign, sign * (2 * k - M) / M, (1 - d) / 2 * stats.binom.pmf(k, M, (1 + r) / 2))]
    m, wanted = np.zeros(K), np.zeros(K)
    for site in itertools.product(choices, repeat=K):
        xi, c, p = (np.array(part) for part in zip(*site, strict=True))
        h = c @ n / R
        answer = p.prod() * (np.tanh(beta * h) if math.isfinite(beta) else np.sign(h) * (abs(h) > 1e-12))
        m, wanted = m + xi * answer, wanted + c * answer
    return m, wanted


@pytest.mark.parametrize("beta", [math.inf, 3.0])
@pytest.mark.parametrize(("M", "r"), [(1, 1.0), (2, 0.5), (3, 0.6)])
def test_one_step_is_the_sum_over_all_configurations(M, r, beta):
    m0 = np.array([0.6, 0.3, 0.1])
    expected, _ = enumerated(3, 0.3, r, M, r * m0, beta)
    np.testing.assert_allclose(one_step(3, 0.3, r, M, m0, beta), expected, atol=1e-12)
    found = self_consistency(3, 0.3, beta, m0, r, M)
    m, n = enumerated(3, 0.3, r, M, found.n, beta)
    np.testing.assert_allclose(found.m, m, atol=1e-9)
    np.testing.assert_allclose(found.n, n, atol=1e-9)


def test_one_step_from_noisy_examples():
    assert one_step(1, 0.0, 0.3, 31)[0] == pytest.approx(1 - 2 * stats.binom.cdf(15, 31, 0.65), abs=1e-12)
    assert one_step(1, 0.0, 0.3, 31)[0] == pytest.approx(0.915258, abs=1e-6)
    assert one_step_gaussian(1, 0.0, 0.3, 31)[0] == pytest.approx(0.920051, abs=1e-6)
    assert dataset_entropy(0.2, 100) == pytest.approx(0.24)
    assert one_step_gaussian(1, 0.0, 0.2, 100)[0] == pytest.approx(0.958773, abs=1e-6)
    np.testing.assert_allclose(one_step(3, 0.25, 1.0, 7), hierarchical_amplitudes(3, 0.25), atol=1e-12)
    np.testing.assert_allclose(one_step_gaussian(1, 0.25, 1.0, 7), [0.75])
    drawn = one_step(3, 0.25, 0.3, 11, samples=200_000)
    np.testing.assert_allclose(drawn, one_step(3, 0.25, 0.3, 11), atol=0.004)
    assert one_step(14, 0.3, samples=20_000)[0] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("protocol", ["supervised", "unsupervised"])
def test_one_step_agrees_with_monte_carlo_within_its_error(protocol):
    K, N, d, r, M = 3, 8000, 0.25, 0.3, 21
    found = []
    for seed in range(10):
        xi = diluted_patterns(K, N, d, seed)
        X = noisy_examples(xi, M, r, seed + 1000).reshape(K * M, N)
        model = MultitaskingHebbian(protocol, dynamics="parallel", max_sweeps=1).fit(X, np.repeat(range(K), M))
        found.append(mattis_overlaps(model.run(hierarchical_state(xi, seed)).state, xi))
    error = np.std(found, axis=0, ddof=1) / math.sqrt(10)
    assert (np.abs(np.mean(found, axis=0) - one_step(K, d, r, M)) < 3.5 * error).all()
    # the Gaussian estimate does not, for the weak patterns
    assert (np.abs(np.mean(found, axis=0) - one_step_gaussian(K, d, r, M))[1:] > 3.5 * error[1:]).all()


def test_equilibrium_agrees_with_monte_carlo_within_its_error():
    K, N, d = 3, 20_000, 0.7
    beta = 1 / (0.3 * (1 - d))
    found = []
    for seed in range(4):
        xi = diluted_patterns(K, N, d, seed)
        model = MultitaskingHebbian(beta=beta, max_sweeps=20, random_state=seed).fit(xi)
        found.append(np.sort(model.run(hierarchical_state(xi, seed), xi).overlaps[10:].mean(0))[::-1])
    error = np.std(found, axis=0, ddof=1) / 2
    assert (np.abs(np.mean(found, axis=0) - self_consistency(K, d, beta).m) < 5 * error + 0.002).all()


def test_entropies_agree_with_drawn_examples():
    r, M, n = 0.3, 7, 400_000
    rng = np.random.default_rng(0)
    up = rng.random(n) < 0.5
    k = rng.binomial(M, np.where(up, 0.5 + r / 2, 0.5 - r / 2))
    share = np.bincount(k, up, M + 1) / np.bincount(k, minlength=M + 1)
    drawn = (stats.entropy([share, 1 - share], base=2) * np.bincount(k, minlength=M + 1) / n).sum()
    assert unknown_bits(r, M) == pytest.approx(drawn, abs=0.002)
    mean = (2 * k - M) / M * np.where(up, 1, -1)
    assert dataset_entropy(r, M) == pytest.approx(mean.var() / mean.mean() ** 2, rel=0.02)
    assert unknown_bits(1.0, 3) == 0.0 and unknown_bits(0.999999, 200) < 1e-9
    assert unknown_bits(0.01, 1) == pytest.approx(1.0, abs=1e-3)


def test_learning_thresholds():
    root = 1 / math.sqrt(2)
    assert learning_threshold(1, 0.0, 0.3, root) == pytest.approx(10.11, abs=0.005)
    assert learning_threshold(3, 0.25, 0.3, root) == pytest.approx(11.17, abs=0.005)
    assert learning_threshold(3, 0.25, 0.3, 1.0) == pytest.approx(23.58, abs=0.005)
    for mu in (1, 2, 3):  # there the estimate has the confidence asked for
        M = learning_threshold(3, 0.25, 0.3, 0.9, mu)
        rho = (1 - 0.3**2) / (M * 0.3**2)
        g = 0.25**2 * (1 - 0.25 ** (2 * (3 - mu))) / 1.25
        assert 1 / math.sqrt(2 * (rho + (1 + rho) * g)) == pytest.approx(0.9)
    assert learning_threshold(3, 0.9, 0.3, 2.0) == math.inf
    assert learning_threshold(3, 0.25, 1.0) == 0.0


def test_losses_and_energy_are_the_same_function():
    xi, s = diluted_patterns(4, 300, 0.3, seed=0), states(6, 300)
    plus, minus = quadratic_losses(xi, s)
    explicit = ((xi[None] - s[:, None].astype(float)) ** 2).sum(-1) / 600
    np.testing.assert_allclose(plus, explicit, atol=1e-13)
    np.testing.assert_allclose(minus, ((xi[None] + s[:, None].astype(float)) ** 2).sum(-1) / 600, atol=1e-13)
    half = (1 + (xi != 0).mean(1)) / 2
    energy = MultitaskingHebbian().fit(xi).energy(s) / 300
    np.testing.assert_allclose(energy, -0.5 * (half**2 - plus * minus).sum(1), atol=1e-12)
    majority = np.where(xi.sum(0) >= 0, 1, -1)
    assert quadratic_losses(xi, majority).plus.sum() <= plus.sum(1).min()


def test_import_needs_neither_lightning_nor_extras():
    code = (
        "import sys\nfrom classact.rules.hebbian import MultitaskingHebbian\n"
        "print({'torch', 'lightning', 'matplotlib', 'timm', 'numba'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


XI = diluted_patterns(2, 10, 0.3, seed=0)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diluted_patterns(0, 5, 0.3, 0), "K: expected at least 1, got 0"),
        (lambda: diluted_patterns(2, 5, 1.1, 0), r"d: expected a number in \[0, 1\], got 1.1"),
        (lambda: noisy_examples(XI, 3, 0.0, 0), r"r: expected a number in \(0, 1\], got 0.0"),
        (lambda: noisy_examples(XI, 0, 0.5, 0), "M: expected at least 1, got 0"),
        (lambda: noisy_examples(XI * 2, 3, 0.5, 0), "xi: expected entries -1, 0 and 1, got"),
        (lambda: mattis_overlaps(np.ones(9), XI), "s, xi: expected the same number of spins, got 9 and 10"),
        (lambda: quadratic_losses(XI * 0.5, np.ones(10)), "xi: expected entries -1, 0 and 1, got"),
        (lambda: MultitaskingHebbian("learn").fit(XI), "protocol: expected store, supervised or unsupervised, got 'l"),
        (lambda: MultitaskingHebbian(dynamics="random").fit(XI), "dynamics: expected sequential or parallel, got 'r"),
        (lambda: MultitaskingHebbian(beta=0.0).fit(XI), "beta: expected a positive number, got 0.0"),
        (lambda: MultitaskingHebbian(max_sweeps=0).fit(XI), "max_sweeps: expected at least 1, got 0"),
        (
            lambda: MultitaskingHebbian().fit(XI).set_params(beta=-1.0).run(XI),
            "beta: expected a positive number, got -1",
        ),
        (lambda: MultitaskingHebbian(r=1.5).fit(XI), r"r: expected a number in \(0, 1\], got 1.5"),
        (lambda: MultitaskingHebbian(blank=-1.0).fit(XI), "blank: expected a number from 0, got -1.0"),
        (lambda: MultitaskingHebbian("supervised").fit(XI), "y: the supervised protocol needs the archetype of every"),
        (lambda: MultitaskingHebbian().fit(XI + 0.5), "X: expected entries -1, 0 and 1, got"),
        (lambda: MultitaskingHebbian(normalize=True).fit(XI * 0), "X: expected an entry that is not 0, got only bl"),
        (lambda: MultitaskingHebbian().fit(XI).run(np.ones(9)), r"s0: expected shape \(N,\) or \(R, N\) with N = 10"),
        (lambda: MultitaskingHebbian().fit(XI).run(np.ones((0, 10))), "s0: expected shape"),
        (lambda: MultitaskingHebbian().fit(XI).run(np.full(10, 2)), "s0: expected entries -1, 0 and 1, got 2"),
        (lambda: MultitaskingHebbian().fit(XI).transform(XI * 3), "X: expected entries -1, 0 and 1, got"),
        (lambda: self_consistency(13, 0.3), "K: expected at most 12 for the exact sum, got 13; give `samples`"),
        (lambda: one_step(4, 0.3, 0.3, 300), "K, M: more than 2097152 values of the field of the other patterns"),
        (lambda: self_consistency(3, 0.3, r=0.5), "r, M: expected both or neither, got 0.5 and None"),
        (lambda: self_consistency(3, 0.3, m0=[0.1, 0.2]), r"m0: expected 3 overlaps, got shape \(2,\)"),
        (lambda: self_consistency(3, 0.3, -1.0), "beta: expected a positive number, got -1.0"),
        (lambda: one_step(3, 0.3, samples=0), "samples: expected at least 1, got 0"),
        (lambda: stability([0.1] * 13, 0.3, 1.0), "m: expected 1 to 12 overlaps, got 13"),
        (lambda: parallel_dilution(1, 0.2), "K: expected at least 2, got 1"),
        (lambda: parallel_dilution(2, 1.0), r"t: expected a number in \(0, 1\), got 1.0"),
        (lambda: phase_diagram(2, [1.0], [0.2]), r"d, t: expected dilutions in \[0, 1\) and positive temperatures"),
        (lambda: learning_threshold(3, 0.3, 0.3, 0.0), "theta: expected a positive number, got 0.0"),
        (lambda: learning_threshold(3, 0.3, 0.3, mu=4), "mu: expected 1 to K = 3, got 4"),
        (lambda: critical_dilution(0), "K: expected at least 1, got 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
