import json
from functools import partial
from math import log
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, special, stats
from torch import nn

from classact.probe import inductivebias
from classact.probe.inductivebias import (
    ErrorSpectrum,
    ErrorTail,
    GPHypotheses,
    Hypotheses,
    InductiveBias,
    InductiveBiasReport,
    NNHypotheses,
    cnn,
    compare_spaces,
    inductive_bias,
    likely_rbf,
    log_gammainc,
    mlp,
    ncx2_neg_log_cdf,
    ridge_error,
    sankaran_neg_log_cdf,
)

REFERENCE = np.load(Path(__file__).parent / "data" / "inductivebias_reference.npz")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(n=30, t=20, m=3, k=2, seed=0):
    """Smooth targets: x, y, x_test, y_test."""
    x = 2 * torch.rand(n + t, m, generator=seeded(seed)) - 1
    y = torch.stack([torch.sin(2 * x.sum(1) + j) for j in range(k)], 1)
    return x[:n], y[:n], x[n:], y[n:]


def sampled(df=8, nc=3, scale=2e-5, size=2000, seed=0):
    return stats.ncx2.rvs(df, nc, scale=scale, size=size, random_state=seed)


def chi_squares(size, generator):
    """Errors whose distribution is known: means of six squares."""
    return torch.randn(size, 6, generator=generator).square().mean(1)


# the tail of a non-central chi-square


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.3, 10, 5, 0.1), 5.908226121742),
        ((0.5, 10, 5, 0.1), 3.804260517353),
        ((0.05, 50, 20, 0.01), 46.5539878237),
        ((0.02, 200, 50, 0.004), 298.96844705),
    ],
)
def test_tail_of_worked_examples(arguments, expected):
    assert ncx2_neg_log_cdf(*arguments) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("df", "nc"), [(0.7, 0.0), (3, 1.5), (40, 5), (300, 200), (2, 900)])
def test_summed_and_direct_tail_agree_and_go_on_where_the_function_underflows(df, nc, monkeypatch):
    at = (df + nc) * np.array([0.02, 0.3, 0.8, 1.0, 1.3])
    direct = [ncx2_neg_log_cdf(x, df, nc, 1.0) for x in at]
    monkeypatch.setattr(inductivebias.stats.ncx2, "cdf", lambda *_: 0.0)
    monkeypatch.setattr(inductivebias.stats.chi2, "cdf", lambda *_: 0.0)
    summed = [ncx2_neg_log_cdf(x, df, nc, 1.0) for x in at]
    np.testing.assert_allclose(summed, direct, rtol=1e-7, atol=1e-9)
    far = np.array([ncx2_neg_log_cdf(x, df, nc, 1.0) for x in (1e-200, 1e-201)])
    assert np.isfinite(far).all()
    assert np.diff(far) == pytest.approx(df / 2 * log(10), rel=1e-6)  # F goes to 0 like x^(df / 2)


def test_tail_equals_arithmetic_with_many_digits():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    for error, df, nc, scale in ((1e-4, 200, 50, 0.004), (1e-6, 90, 3, 1.0)):
        x, half = mpmath.mpf(error) / mpmath.mpf(scale) / 2, mpmath.mpf(nc) / 2
        total = sum(
            mpmath.exp(-half) * half**j / mpmath.factorial(j) * mpmath.gammainc(mpmath.mpf(df) / 2 + j, 0, x, True)
            for j in range(60)
        )
        assert ncx2_neg_log_cdf(error, df, nc, scale) == pytest.approx(float(-mpmath.log(total)), rel=1e-12)


def test_tail_and_fallback_equal_the_authors_where_theirs_is_finite():
    settings, value = REFERENCE["settings"], REFERENCE["value"]
    ours = np.array([ncx2_neg_log_cdf(*row) for row in settings])
    fallback = np.array([sankaran_neg_log_cdf(*row) for row in settings])
    np.testing.assert_allclose(fallback, REFERENCE["sankaran"], rtol=1e-12)
    fell_back = value == REFERENCE["sankaran"]
    assert fell_back.any() and not fell_back.all()
    np.testing.assert_allclose(ours[~fell_back], value[~fell_back], rtol=1e-9)
    assert (np.abs(value[fell_back] / ours[fell_back] - 1) > 0.2).all()


def test_fit_is_near_to_the_authors_where_theirs_works_and_more_likely():
    errors, (df, nc, _, scale) = REFERENCE["errors"], REFERENCE["theta"]
    tail = ErrorTail().fit(errors)
    ours = [tail.neg_log_cdf(eps) for eps in REFERENCE["targets"]]
    np.testing.assert_allclose(ours, REFERENCE["fitted"], rtol=0.05)
    likelihood = stats.ncx2.logpdf(errors, tail.df_, tail.nc_, scale=tail.scale_).sum()
    assert likelihood > stats.ncx2.logpdf(errors, df, nc, scale=scale).sum() + 0.1


def test_logarithm_of_the_incomplete_gamma_function():
    a = np.array([0.5, 3.0, 20.0, 400.0])
    np.testing.assert_allclose(log_gammainc(a, 2.0)[:3], np.log(special.gammainc(a[:3], 2.0)), rtol=1e-12)
    assert log_gammainc(a, 2.0)[3] == pytest.approx(400 * log(2) - 2 - special.gammaln(401) + 2 / 401, rel=1e-6)


@pytest.mark.parametrize("v", [-0.97, -0.5, 0.3, 4, 19.5, 20, 75])
def test_logarithm_of_the_bessel_function(v):
    z = np.geomspace(1e-2, 500, 60)
    np.testing.assert_allclose(inductivebias._log_bessel(v, z), np.log(special.ive(v, z)) + z, atol=1e-7)


# fits


def test_without_non_centrality_the_tail_is_that_of_a_gamma_distribution():
    tail = ErrorTail("gamma").fit(sampled(nc=1e-9))
    assert tail.nc_ == 0
    a, _, scale = stats.gamma.fit(tail.errors_ / tail.mean_, floc=0)
    assert tail.df_ / 2 == pytest.approx(a, rel=1e-3) and 2 * tail.scale_ / tail.mean_ == pytest.approx(scale, rel=1e-3)
    eps = 3e-5
    expected = -stats.gamma.logcdf(eps, tail.df_ / 2, scale=2 * tail.scale_)
    assert tail.neg_log_cdf(eps) == pytest.approx(expected, rel=1e-9)


def test_errors_far_from_unit_scale_are_fitted():
    tail = ErrorTail().fit(sampled(size=4000))
    exact = -stats.ncx2.logcdf(3e-5, 8, 3, scale=2e-5)
    assert tail.neg_log_cdf(3e-5) == pytest.approx(exact, rel=0.05)
    raw = stats.ncx2.fit(tail.errors_[::8], floc=0)
    assert abs(-stats.ncx2.logcdf(3e-5, *raw) / exact - 1) > 0.3  # what is avoided


@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_scale_does_not_matter(factor):
    errors = sampled(scale=0.1, size=600)
    one, other = ErrorTail().fit(errors), ErrorTail().fit(errors * factor)
    assert other.neg_log_cdf(0.2 * factor) == pytest.approx(one.neg_log_cdf(0.2), rel=1e-3)
    assert other.ks_ == pytest.approx(one.ks_, rel=1e-2)


@pytest.mark.parametrize("family", ["ncx2", "gamma", "normal", "empirical"])
def test_bias_falls_with_the_target_and_is_never_negative(family):
    tail = ErrorTail(family).fit(sampled(scale=0.1, size=500))
    values = [tail.neg_log_cdf(eps) for eps in np.geomspace(0.05, 50, 30)]
    assert min(values) >= 0 and values[-1] < 1e-3
    assert (np.diff(np.minimum(values, 1e9)) <= 0).all()


def test_countable_bias_lies_within_the_band_of_the_sample():
    errors = sampled(scale=0.1)
    eps = float(np.quantile(errors, 0.2))
    tail = ErrorTail().fit(errors)
    low, high = tail.ci(eps, method="dkw")
    assert low < log(5) < high and low < tail.neg_log_cdf(eps) < high
    band = np.sqrt(log(40) / 4000)
    assert (low, high) == pytest.approx((-log(0.2 + band), -log(0.2 - band)), rel=1e-3)
    assert tail.ci(errors.min() / 2, method="dkw")[1] == np.inf
    assert ErrorTail("empirical").fit(errors).neg_log_cdf(eps) == pytest.approx(log(5), rel=1e-2)


def test_bootstrap_limits_hold_the_truth_and_narrow_with_the_sample():
    eps, widths = 0.3, []
    exact = ncx2_neg_log_cdf(eps, 8, 3, 0.1)
    for size in (200, 3000):
        low, high = ErrorTail().fit(sampled(scale=0.1, size=size, seed=2)).ci(eps)
        assert low < exact < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize("family", ["ncx2", "gamma"])
def test_bootstrap_by_one_step_is_like_that_by_whole_fits(family):
    tail = ErrorTail(family).fit(sampled(scale=0.1, size=300))
    ours = tail.bootstrap(0.2, draws=300)
    rng = np.random.default_rng(0)
    whole = [ErrorTail(family).fit(rng.choice(tail.errors_, 300)).neg_log_cdf(0.2) for _ in range(15)]
    assert ours.mean() == pytest.approx(np.mean(whole), rel=0.1)
    assert 0.5 < ours.std() / np.std(whole) < 2


def test_fitted_density_integrates_to_the_fitted_distribution():
    tail = ErrorTail().fit(sampled(scale=0.1, size=500))
    at = np.linspace(1e-9, 1.0, 2001)
    assert -np.log(np.trapezoid(tail.pdf(at), at)) == pytest.approx(tail.neg_log_cdf(1.0), rel=1e-5)


# the exact distribution


def test_exact_distribution_of_worked_examples():
    spectrum = ErrorSpectrum(np.array([0.5, 0.3, 0.2]), np.zeros(3))
    assert np.exp(-spectrum.neg_log_cdf(0.2)) == pytest.approx(0.112294, abs=1e-6)
    equal = ErrorSpectrum(np.full(50, 0.004), np.full(50, 0.004), outputs=4)  # one non-central chi-square
    for eps in (1e-4, 0.02, 0.5, 0.98, 1.0, 1.02, 1.5):
        assert equal.neg_log_cdf(eps) == pytest.approx(ncx2_neg_log_cdf(eps, 200, 50, 0.004), rel=1e-8)


def test_exact_distribution_equals_imhofs_integral():
    lam, squares = np.array([0.5, 0.3, 0.2, 0.05, 0.05, 0.01]), np.array([0.0, 0.6, 0.2, 0.2, 0.1, 0.3])
    spectrum = ErrorSpectrum(lam, squares)

    def imhof(x):
        def integrand(u):
            theta = (np.arctan(lam * u) + squares * u / (1 + (lam * u) ** 2)).sum() / 2 - x * u / 2
            growth = np.prod((1 + (lam * u) ** 2) ** 0.25) * np.exp(
                (squares * lam * u**2 / (1 + (lam * u) ** 2)).sum() / 2
            )
            return np.sin(theta) / (u * growth)

        return 0.5 - integrate.quad(integrand, 0, 2000, limit=5000)[0] / np.pi

    for x in (0.8, 1.6, 2.5, 4.0):
        assert np.exp(-spectrum.neg_log_cdf(x)) == pytest.approx(imhof(x), abs=1e-6)


def test_exact_distribution_equals_a_peers_and_that_of_draws():
    lam = REFERENCE["lam"]
    ours = [np.exp(-ErrorSpectrum(lam, np.zeros(len(lam))).neg_log_cdf(q)) for q in REFERENCE["at"]]
    np.testing.assert_allclose(ours, REFERENCE["central"], atol=5e-3)  # theirs matches moments
    draws = np.random.default_rng(0).chisquare(1, (40_000, len(lam))) @ lam
    np.testing.assert_allclose(ours, [(draws <= q).mean() for q in REFERENCE["at"]], atol=8e-3)


def test_directions_without_variance_are_constants():
    spectrum = ErrorSpectrum(np.array([0.1, 0.1, 0.0]), np.array([0.0, 0.0, 0.5]))
    assert spectrum.neg_log_cdf(0.49) == np.inf
    assert spectrum.neg_log_cdf(0.7) == pytest.approx(-stats.chi2.logcdf(2.0, 2), rel=1e-3)
    assert ErrorSpectrum(np.zeros(2), np.array([0.1, 0.0])).neg_log_cdf(0.2) == 0


# Gaussian hypotheses


def test_sampled_errors_have_the_moments_and_distribution_of_the_spectrum():
    space = GPHypotheses(*task(), sigma=0.6)
    spectrum, errors = space.spectrum(), space.sample(8000, seeded()).numpy()
    assert errors.mean() == pytest.approx(spectrum.mean, rel=0.02)
    assert errors.var() == pytest.approx(spectrum.variance, rel=0.06)
    for rank in (0.01, 0.3, 0.9):
        assert np.exp(-spectrum.neg_log_cdf(float(np.quantile(errors, rank)))) == pytest.approx(rank, rel=0.25)


def test_sampled_errors_are_those_of_functions_drawn_from_the_posterior():
    x, y, x_test, y_test = (part.double() for part in task())
    space = GPHypotheses(x, y, x_test, y_test, sigma=0.6)
    root = torch.linalg.cholesky(space.covariance + 1e-9 * torch.eye(20))
    f = space.mean[None] + root @ torch.randn(8000, 20, 2, generator=seeded(), dtype=torch.float64)
    theirs = (f - y_test).square().mean((1, 2)).numpy()
    assert stats.ks_2samp(theirs, space.sample(8000, seeded(1)).numpy()).pvalue > 0.01


def test_sampled_errors_have_the_distribution_of_the_authors():
    data = [torch.from_numpy(REFERENCE[name]) for name in ("x", "y", "x_test", "y_test")]
    space = GPHypotheses(*data)
    assert stats.ks_2samp(REFERENCE["drawn"], space.sample(4000, seeded()).numpy()).pvalue > 0.01
    spectrum = space.spectrum()
    for rank in (0.05, 0.5, 0.95):
        eps = float(np.quantile(REFERENCE["drawn"], rank))
        assert np.exp(-spectrum.neg_log_cdf(eps)) == pytest.approx(rank, rel=0.25)


def test_without_training_data_the_prior_is_sampled():
    _, _, x_test, y_test = task()
    space = GPHypotheses(x_test[:0], y_test[:0], x_test, y_test, amplitude=0.7)
    assert space.spectrum().mean == pytest.approx(0.7 + float(y_test.square().mean()), rel=1e-6)
    assert not space.mean.any()


def test_training_points_are_interpolated():
    x, y, _, _ = task()
    space = GPHypotheses(x, y, x[:5], y[:5], sigma=0.5, jitter=1e-10)
    assert space.covariance.abs().max() < 1e-6
    assert (space.sample(10, seeded()) < 1e-6).all()


def test_kernel_may_be_a_function_or_a_matrix():
    data = task()
    points = torch.cat([data[0], data[2]])

    def laplace(a, b):
        return torch.exp(-torch.cdist(a, b))

    one = GPHypotheses(*data, kernel=laplace)
    other = GPHypotheses(*data, kernel=laplace(points.double(), points.double()))
    torch.testing.assert_close(one.sample(9, seeded()), other.sample(9, seeded()))
    rbf = GPHypotheses(*data, kernel=lambda a, b: torch.exp(-torch.cdist(a, b).square() / 2))
    torch.testing.assert_close(rbf.mean, GPHypotheses(*data).mean, atol=1e-6, rtol=0)


def test_only_distances_matter_so_that_added_constant_dimensions_ask_for_nothing():
    x, y, x_test, y_test = task()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=seeded()).double())[0][:3]
    inside = GPHypotheses(x.double() @ turn, y, x_test.double() @ turn, y_test, sigma=0.6)
    plain = GPHypotheses(x, y, x_test, y_test, sigma=0.6)
    assert inside.spectrum().neg_log_cdf(0.02) == pytest.approx(plain.spectrum().neg_log_cdf(0.02), rel=1e-3)


def test_width_and_amplitude_can_be_taken_from_the_data():
    x, y, x_test, y_test = task()
    space = GPHypotheses(x, y, x_test, y_test, sigma="median", amplitude="label_var")
    assert space.sigma == pytest.approx(float(torch.pdist(x).sort().values[(435 - 1) // 2]), rel=1e-5)
    assert space.amplitude == pytest.approx(float(y.var(0, correction=0).mean()), rel=1e-5)
    generator = seeded(3)
    points = torch.rand(60, 2, generator=generator).double()
    K = 4 * torch.exp(-torch.cdist(points, points).square() / (2 * 0.25**2)) + 1e-6 * torch.eye(60)
    drawn = torch.linalg.cholesky(K) @ torch.randn(60, 8, generator=generator, dtype=torch.float64)
    median = float(torch.pdist(points).median())
    width, amplitude = likely_rbf(points, drawn, (0.1 / median, 0.25 / median, 0.6 / median))
    assert width == pytest.approx(0.25) and amplitude == pytest.approx(4, rel=0.5)


# networks


def small_space(**settings):
    x, y, x_test, y_test = task(n=12, t=10)
    options = {"epochs": 30, "lr": 1e-2, "train_tol": 1.0} | settings
    return NNHypotheses(options.pop("factory", partial(mlp, 3, 2, 8)), x, y, x_test, y_test, **options)


class WithMemory(nn.Module):
    """Batch normalisation, whose running means are part of the state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_networks_trained_together_equal_those_trained_alone(batch_size):
    seeds, settings = torch.arange(3), {"batch_size": batch_size, "epochs": 6}
    together = small_space(**settings).train(seeds)
    alone = small_space(**settings, vectorize=False).train(seeds)
    chunks = small_space(**settings, chunk=2).train(seeds)
    for other in (alone, chunks):
        torch.testing.assert_close(together[0], other[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(together[1], other[1], rtol=1e-3, atol=1e-6)


def test_training_equals_a_plain_loop():
    x, y, x_test, y_test = task(n=12, t=10)
    torch.manual_seed(7)
    network = mlp(3, 2, 8)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(network(x), y).backward()
        optimizer.step()
    train, test = small_space().train(torch.tensor([7]))
    network.requires_grad_(False)
    assert float(train) == pytest.approx(float(F.mse_loss(network(x), y)), rel=1e-3)
    assert float(test) == pytest.approx(float(F.mse_loss(network(x_test), y_test)), rel=1e-3)


def test_batch_normalisation_is_trained_and_used_in_evaluation_mode():
    together = small_space(factory=WithMemory, epochs=3).train(torch.arange(3))
    alone = small_space(factory=WithMemory, epochs=3, vectorize=False).train(torch.arange(3))
    torch.testing.assert_close(together[1], alone[1], rtol=1e-3, atol=1e-5)


def test_workers_change_nothing():
    seeds = torch.arange(2)
    one = small_space(chunk=1, epochs=3).train(seeds)
    with joblib.parallel_config("multiprocessing"):  # quicker to start than the default
        two = small_space(chunk=1, epochs=3, workers=2).train(seeds)
    torch.testing.assert_close(one, two)


def test_same_seed_same_networks_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    space = small_space(epochs=3)
    first = space.sample(3, seeded(1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, space.sample(3, seeded(1)))
    assert not torch.equal(first, space.sample(3, seeded(2)))


def test_networks_that_do_not_fit_are_left_out_and_counted():
    train_errors, _ = small_space(epochs=8).train(torch.randint(2**62, (80,), generator=seeded()))
    tolerance = float(train_errors.sort().values[69])
    found = inductive_bias(small_space(epochs=8, train_tol=tolerance), 0.3, n_samples=80)
    assert found.n_left_out == 10 and len(found.errors) == 70


def test_a_space_that_never_fits_says_how_many_networks_reached_what():
    with pytest.raises(
        ValueError, match=r"only 0 of 3 networks reached the training error 1e-09 asked for; the .* best"
    ):
        small_space(train_tol=1e-9).sample(3, seeded())
    with pytest.raises(ValueError, match=r"train_tol: only \d+ of 60 networks"):
        small_space(train_tol=0.02, epochs=8).sample(60, seeded())
    with pytest.raises(ValueError, match="no number"):
        small_space(lr=1e30).sample(2, seeded())


def test_other_losses_and_errors():
    x, y, x_test, y_test = task(n=12, t=10)
    wrong = lambda out, target: (out.argmax(1) != target.argmax(1)).float().mean()  # noqa: E731
    space = NNHypotheses(partial(mlp, 3, 2, 8), x, y, x_test, y_test, epochs=20, train_tol=9, error=wrong)
    errors = space.sample(4, seeded())
    assert ((errors * 10).round() - errors * 10).abs().max() < 1e-5


# the measure


def test_any_sampler_is_a_space():
    class Squares:
        def sample(self, size, generator):
            return chi_squares(size, generator)

    assert isinstance(Squares(), Hypotheses) and isinstance(small_space(), Hypotheses)
    one, other = inductive_bias(Squares(), 0.2, n_samples=500), inductive_bias(chi_squares, 0.2, n_samples=500)
    assert one.value == other.value and (one.name, other.name) == ("Squares", "chi_squares")
    assert one.low < ncx2_neg_log_cdf(0.2, 6, 0, 1 / 6) < one.high
    assert one.bits == pytest.approx(one.value / log(2)) and one.extrapolation == pytest.approx(one.value / log(500))
    assert one.exact is None
    assert inductive_bias(chi_squares, 0.2, n_samples=500, seed=1).value != one.value


def test_fitted_and_exact_value_of_a_kernel_space():
    found = inductive_bias(GPHypotheses(*task(m=6), sigma=0.5), 0.3, n_samples=2000)
    assert found.exact == pytest.approx(found.value, rel=0.25) and found.exact > 2


def test_far_extrapolation_is_warned_of():
    with pytest.warns(UserWarning, match=r"chi_squares: .* times ln S of S = 100 hypotheses"):
        inductive_bias(chi_squares, 1e-4, n_samples=100)


def test_bias_that_one_space_provides_over_another():
    wide = inductive_bias(lambda size, generator: 3 * chi_squares(size, generator), 0.4, n_samples=800, name="wide")
    narrow = inductive_bias(chi_squares, 0.4, n_samples=800, seed=1, name="narrow")
    found = narrow.provided_over(wide)
    assert found.value == pytest.approx(wide.value - narrow.value)
    assert 0 < found.low < found.value < found.high
    assert found.low < ncx2_neg_log_cdf(0.4, 6, 0, 0.5) - ncx2_neg_log_cdf(0.4, 6, 0, 1 / 6) < found.high


def test_report_can_be_saved(tmp_path):
    one = inductive_bias(GPHypotheses(*task(), sigma=0.6), 0.05, n_samples=300)
    report = InductiveBiasReport((one, inductive_bias(chi_squares, 0.05, n_samples=200, name="other")))
    table = report.table().set_index("space")
    assert list(table.index) == ["GPHypotheses", "other"] and table.loc["other", "hypotheses"] == 200
    assert table.loc["other", "nats"] == report["other"].value
    text = " ".join(t.get_text() for t in report.plot().findobj(lambda x: hasattr(x, "get_text")))
    assert f"other: {report['other'].value:.3g} nats" in text
    folder = report.save(tmp_path / "report")
    assert sorted(f.name for f in folder.iterdir()) == ["arrays.npz", "bias.png", "report.json"]
    rows = json.loads((folder / "report.json").read_text())["spaces"]
    assert rows[0]["exact_nats"] == one.exact and rows[1]["exact_nats"] is None and rows[1]["level"] == 0.95
    np.testing.assert_array_equal(np.load(folder / "arrays.npz")["GPHypotheses/errors"], one.errors)
    assert len(one.table()) == 1
    with pytest.raises(KeyError, match="no space 'mlp'; there are GPHypotheses, other"):
        report["mlp"]


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    found = inductive_bias(chi_squares, 0.2, n_samples=60)
    assert (found.save(tmp_path / "whole") / "bias.png").exists()
    monkeypatch.setattr(InductiveBiasReport, "plot", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.save(tmp_path / "broken")
    assert not list((tmp_path / "broken").iterdir())


@pytest.mark.filterwarnings("ignore:.*times ln S")
def test_spaces_are_compared_on_the_same_task():
    x = torch.randn(60, 1, 6, 6, generator=seeded())
    labels = (x[:, 0, 2:4, 2:4].mean((1, 2)) > 0).long()
    spaces = ("rbf", "rbf-unit", "mlp", "cnn", ("own", partial(mlp, 36, 2, 8, 0)))
    data = x[:40], labels[:40], x[40:], labels[40:]
    report = compare_spaces(*data, spaces=spaces, samples=50, epochs=8, train_tol=1.0)
    table = report.table().set_index("space")
    assert list(table.index) == ["rbf", "rbf-unit", "mlp", "cnn", "own"]
    hot = [F.one_hot(part, 2).float() for part in (labels[:40], labels[40:])]
    assert table["target_error"].unique() == pytest.approx([ridge_error(data[0], hot[0], data[2], hot[1])])
    assert isinstance(report["cnn"], InductiveBias) and table["nats"].notna().all()
    again = compare_spaces(*data, spaces=("mlp",), samples=50, epochs=8, train_tol=1.0, target_error=0.2)
    assert again["mlp"].target_error == 0.2 and again["mlp"].errors.tolist() == report["mlp"].errors.tolist()


def test_target_of_a_ridge_regression():
    x, y, x_test, y_test = task(n=40)
    assert ridge_error(x, y, x_test, y_test) > 0.1  # no line
    assert ridge_error(x, 2 * x[:, :1] + 1, x_test, 2 * x_test[:, :1] + 1) < 1e-5


def test_default_networks_have_the_promised_shapes():
    assert cnn(1, 3)(torch.zeros(2, 1, 7, 7)).shape == (2, 3)
    assert [m.out_features for m in mlp(4, 3, 16, 2) if isinstance(m, nn.Linear)] == [16, 16, 16, 3]


X, Y, XS, YS = task()


@pytest.mark.bare
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ErrorTail("beta"), "family: expected 'ncx2'"),
        (lambda: ErrorTail().fit(np.ones(49)), "errors: expected at least 50"),
        (lambda: ErrorTail().fit(np.ones((60, 2))), "errors: expected at least 50"),
        (lambda: ErrorTail().fit(np.full(60, np.nan)), "got 60 of 60 NaN"),
        (lambda: ErrorTail().fit(np.linspace(-1, 1, 60)), "errors: expected positive values, got -1"),
        (lambda: ErrorTail().fit(np.linspace(0, 1, 60)), "need family='empirical'"),
        (lambda: ErrorTail().fit(np.full(60, 0.3)), "errors: expected a distribution, got 60 equal"),
        (lambda: ErrorTail("normal").fit(sampled(size=60)).neg_log_cdf(0.0), "target_error: expected a positive"),
        (lambda: ErrorTail("normal").fit(sampled(size=60)).ci(1.0, method="wald"), "method: expected"),
        (lambda: ErrorTail("normal").fit(sampled(size=60)).ci(1.0, level=95), "level: expected"),
        (lambda: GPHypotheses(X[:5], Y, XS, YS), "x, y: expected equally many, got 5 and 30"),
        (lambda: GPHypotheses(X, Y, XS[:, :2], YS), "x_test, y_test: expected shapes"),
        (lambda: GPHypotheses(X, Y, XS[:0], YS[:0]), "x_test: expected at least one"),
        (lambda: GPHypotheses(X / 0, Y, XS, YS), "x: expected finite"),
        (lambda: GPHypotheses(X, Y, XS, YS, kernel="linear"), "kernel: expected 'rbf'"),
        (lambda: GPHypotheses(X, Y, XS, YS, kernel=torch.eye(3)), r"kernel: expected a matrix of shape \(50, 50\)"),
        (lambda: GPHypotheses(X, Y, XS, YS, kernel=-torch.eye(50)), "not positive definite with jitter"),
        (lambda: GPHypotheses(X, Y, XS, YS, sigma=0.0), "sigma: expected a positive"),
        (lambda: GPHypotheses(X[:1], Y[:1], XS, YS, sigma="median"), "at least 2 training points"),
        (lambda: GPHypotheses(X, Y, XS, YS, amplitude=-1.0), "amplitude: expected a positive"),
        (lambda: likely_rbf(X[:1], Y[:1]), "x, y: expected at least 2"),
        (lambda: small_space(epochs=0), "epochs: expected a positive"),
        (lambda: small_space(batch_size=0), "batch_size: expected at least 1"),
        (lambda: NNHypotheses(mlp, X[:0], Y[:0], XS, YS), "x: expected at least one training point"),
        (lambda: small_space(factory=partial(mlp, 3, 5, 4)).train(torch.arange(2)), r"factory: .*\(12, 2\)"),
        (lambda: inductive_bias(chi_squares, -1.0), "target_error: expected a positive"),
        (lambda: inductive_bias(chi_squares, 1.0, n_samples=10), "n_samples: expected at least 50"),
        (lambda: inductive_bias(chi_squares, 1.0, bootstrap=0), "bootstrap: expected at least 1"),
        (lambda: inductive_bias(lambda s, g: torch.rand(3), 1.0, n_samples=60), r"errors of shape \(60,\), got \(3,\)"),
        (
            lambda: inductive_bias(lambda s, g: chi_squares(s, g).where(torch.arange(s) < 7, torch.nan), 1.0),
            "hypotheses: only 7 of 10000 fit the training data",
        ),
        (lambda: compare_spaces(X, Y, XS, YS), "'cnn' needs images"),
        (lambda: compare_spaces(X, Y, XS, YS, spaces=("forest",)), "spaces: expected 'rbf'"),
        (lambda: compare_spaces(X, Y, XS, YS, spaces=("rbf", "rbf")), "each once"),
        (lambda: compare_spaces(X, Y, XS, YS.long(), spaces=("rbf",)), "y_train, y_test: expected numbers"),
        (lambda: compare_spaces(X, -torch.ones(30).long(), XS, torch.ones(20).long()), "expected classes from 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_spaces_at_different_targets_are_not_compared():
    one, other = (inductive_bias(chi_squares, eps, n_samples=60) for eps in (0.2, 0.3))
    with pytest.raises(ValueError, match="other: expected target error 0.2"):
        one.provided_over(other)
