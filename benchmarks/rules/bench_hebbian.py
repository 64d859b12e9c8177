"""Sweeps of many replicas beside the two matrix products that any sweep needs, and beside dense couplings.

The unit is a spin update; the aim is 1e8 of them a second on two cores, which is printed. A sweep needs the overlaps of
all states and the fields of all spins, S @ xi.T and m @ xi, and beside that, with so few patterns, mostly time for the
noise and, if updates are sequential, for the effect of a spin on the next ones. Both together stay below the aim.
"""

import os
import time

import numpy as np
import pytest

from classact.rules.hebbian import MultitaskingHebbian, diluted_patterns

N, R, K, SWEEPS = 10_000, 1024, 3, 5


def states(replicas, n):
    return np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (replicas, n))


def network(n=N, **settings):
    settings = {"max_sweeps": SWEEPS, "n_jobs": os.cpu_count(), "random_state": 0, **settings}
    return MultitaskingHebbian(**settings).fit(diluted_patterns(K, n, 0.3, seed=0))


def rate(model, s, capsys, name):
    started = time.perf_counter()
    sweeps = len(model.run(s).energy) - 1  # fewer than allowed if nothing changes any more
    updates = s.size * sweeps / (time.perf_counter() - started)
    with capsys.disabled():
        print(f"\n  {name}: {updates:.2e} spin updates a second on {model.n_jobs} threads")
    return sweeps


@pytest.mark.parametrize("dynamics", ["parallel", "sequential"])
@pytest.mark.parametrize("t", [0.0, 0.2])
def test_sweeps_beside_the_matrix_products_of_their_fields(ratio, capsys, dynamics, t):
    model = network(dynamics=dynamics, beta=1 / (t * 0.7) if t else np.inf)
    s, xi = states(R, N), model.patterns_.astype(np.float32)
    floats = s.astype(np.float32)

    def ours():
        return model.run(s)

    sweeps = rate(model, s, capsys, f"{dynamics}, t = {t}")

    def products():
        for _ in range(sweeps):
            h = (floats @ xi.T) @ xi
        return h

    np.testing.assert_allclose(products()[:5] / N - s[:5] * (xi != 0).sum(0) / N, model.fields(s[:5]), atol=1e-5)
    ratio(f"{dynamics} sweeps at t = {t} / the two matrix products", ours, products, rounds=5)


def test_sequential_sweeps_beside_a_loop_over_spins_with_dense_couplings(ratio):
    n, replicas = 1000, 64
    model = network(n, max_sweeps=1, n_jobs=1)
    s = states(replicas, n)
    xi = model.patterns_.astype(np.float32)
    J = xi.T @ xi
    np.fill_diagonal(J, 0)

    def ours():
        return model.run(s).state

    def loop():
        S = s.T.astype(np.float32)
        order = np.random.default_rng(np.random.RandomState(0).randint(2**31))
        order.choice([-1, 1], n)  # coins for unknown spins
        for i in order.permutation(n):
            h = J[i] @ S
            S[i] = np.where(h == 0, S[i], np.sign(h))
        return S.T

    np.testing.assert_array_equal(ours(), loop())
    assert ratio("sequential sweep of 64 replicas / loop over spins", ours, loop, rounds=21) < 0.5


def test_unsupervised_sweeps_beside_dense_couplings(ratio):
    n, m, replicas = 4000, 30, 64
    examples = np.random.default_rng(0).integers(-1, 2, (m, n)).astype(np.int8)
    model = MultitaskingHebbian("unsupervised", dynamics="parallel", max_sweeps=1, random_state=0).fit(examples)
    s = states(replicas, n)
    J = examples.T.astype(np.float32) @ examples
    np.fill_diagonal(J, 0)

    def ours():
        return model.run(s).state

    def dense():
        h = s.astype(np.float32) @ J
        return np.where(h == 0, s, np.sign(h))

    np.testing.assert_array_equal(ours(), dense())
    assert ratio("unsupervised parallel sweep / dense couplings", ours, dense, rounds=21) < 1
