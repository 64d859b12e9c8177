"""The fit beside scipy's, exact tails beside momentchi2, sampling beside sqrtm, networks together beside one by one."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import sqrtm

from classact.probe.inductivebias import ErrorSpectrum, ErrorTail, GPHypotheses, NNHypotheses, mlp


def data(n=300, t=300, m=8, k=10):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + t, m, generator=generator)
    y = torch.sin(x @ torch.randn(m, k, generator=generator))
    return x[:n], y[:n], x[n:], y[n:]


def test_fit(ratio):
    errors = stats.ncx2.rvs(8, 3, scale=0.1, size=3000, random_state=0)

    def ours():
        tail = ErrorTail().fit(errors)
        return tail.df_, tail.nc_, 0.0, tail.scale_

    def theirs():
        return stats.ncx2.fit(errors, floc=0)

    likelihood = [stats.ncx2.logpdf(errors, *found).sum() for found in (ours(), theirs())]
    assert likelihood[0] > likelihood[1] - 1e-3
    assert ratio("fit to 3,000 errors / scipy", ours, theirs, rounds=3) < 1


def test_exact_tail(ratio):
    momentchi2 = pytest.importorskip("momentchi2", reason="the peer is not installed: pip install momentchi2")
    lam = np.linspace(0.01, 1, 50)
    spectrum = ErrorSpectrum(lam, np.zeros(50))

    def ours():
        return np.exp(-spectrum.neg_log_cdf(20.0))

    def theirs():
        return momentchi2.hbe(coeff=lam.tolist(), x=20.0)

    assert abs(ours() - theirs()) < 5e-3
    ratio("exact distribution of 50 terms / three moments by momentchi2", ours, theirs)


def test_sampling_of_functions(ratio):
    space = GPHypotheses(*data(), sigma="median", jitter=1e-4)
    shift = space.mean - data()[3]

    def ours():
        return space.sample(1000, torch.Generator().manual_seed(0)).numpy()

    def theirs():
        root = np.real(sqrtm(space.covariance.numpy()))
        g = torch.randn(300, 10, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
        return ((shift.numpy()[:, :, None] + np.einsum("ab,bcd->acd", root, g)) ** 2).mean((0, 1))

    assert stats.ks_2samp(ours(), theirs()).pvalue > 1e-3
    assert ratio("1,000 functions at 300 points / square root and product", ours, theirs, rounds=3) < 1


def test_training_of_networks(ratio):
    settings = {"epochs": 10, "lr": 1e-2, "train_tol": 10.0}
    together, alone = (
        NNHypotheses(partial(mlp, 8, 10, 32), *data(100, 50), vectorize=vectorize, **settings)
        for vectorize in (True, False)
    )
    seeds = torch.arange(30)
    torch.testing.assert_close(together.train(seeds)[1], alone.train(seeds)[1], rtol=1e-2, atol=1e-4)
    name = "30 networks trained together / one by one"
    assert ratio(name, lambda: together.train(seeds), lambda: alone.train(seeds), rounds=3) < 1
