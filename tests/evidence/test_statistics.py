"""The statistics are held by simulation: coverage, false positives and planted effects."""

import numpy as np
import pytest
from scipy import stats

from classact.evidence.statistics import (
    Interval,
    bootstrap_groups,
    corrected_interval,
    detectable_effect,
    holm,
    region_p_values,
    t_interval,
    verdict,
)


def test_t_interval_is_scipys():
    x = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, loc=x.mean(), scale=stats.sem(x))
    found = t_interval(x)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p_value() == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    assert t_interval([*x, np.nan]).low == pytest.approx(low)


@pytest.mark.parametrize("n", [5, 10])
def test_t_interval_covers_where_the_percentile_bootstrap_does_not(n):
    rng = np.random.default_rng(1)
    draws = rng.normal(0.3, 1, size=(3000, n))
    hits = np.mean([(i := t_interval(x)).low <= 0.3 <= i.high for x in draws])
    assert 0.94 < hits < 0.96
    index = rng.integers(n, size=(300, 1000, n))
    means = np.take_along_axis(draws[:300, None], index, axis=2).mean(2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0.3) & (high >= 0.3)) < 0.94


def cross_validated_differences(rng, k=5, repeats=4, n=60):
    """Differences between two useless constant rules on data without signal: the true difference is 0."""
    y = rng.integers(2, size=n)
    values = []
    for _ in range(repeats):
        order = rng.permutation(n)
        for test in np.array_split(order, k):
            train = np.setdiff1d(order, test)
            # each rule predicts the majority of a random half of the training part
            rules = [int(y[rng.choice(train, len(train) // 2, replace=False)].mean() > 0.5) for _ in range(2)]
            values.append(np.mean(y[test] == rules[0]) - np.mean(y[test] == rules[1]))
    return np.array(values)


def test_corrected_interval_keeps_its_level_on_cross_validation():
    rng = np.random.default_rng(2)
    plain = corrected = 0
    for _ in range(400):
        values = cross_validated_differences(rng)
        plain += t_interval(values).p_value() < 0.05
        corrected += corrected_interval(values, 1 / 4).p_value() < 0.05
    assert corrected / 400 <= 0.065
    assert corrected < plain


def test_corrected_interval_by_hand():
    x = np.array([0.1, 0.2, 0.0, 0.3])
    found = corrected_interval(x, 0.25)
    assert found.se == pytest.approx(x.std(ddof=1) * np.sqrt(1 / 4 + 0.25))
    with pytest.raises(ValueError, match="test_train_ratio: expected a positive number, got 0"):
        corrected_interval(x, 0)


def test_bootstrap_over_groups_is_wider_than_over_items_and_covers():
    rng = np.random.default_rng(3)

    def accuracy(counts):
        return counts[..., 1] / counts.sum(-1)

    hits, widths = 0, []
    for seed in range(200):
        right = (rng.random(40) < 0.7).repeat(5)  # five items of a group succeed or fail together
        groups = np.stack([np.bincount(right[i * 5 : i * 5 + 5], minlength=2) for i in range(40)])
        items = np.eye(2)[right.astype(int)]
        by_group = bootstrap_groups(groups, accuracy, n_boot=500, seed=seed)
        by_item = bootstrap_groups(items, accuracy, n_boot=200, seed=seed)
        hits += by_group.low <= 0.7 <= by_group.high
        widths.append((by_group.high - by_group.low) / (by_item.high - by_item.low))
    assert 0.90 <= hits / 200 <= 0.99
    assert np.median(widths) > 1.8  # sqrt(5) = 2.24


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    found = holm([0.01, float("nan"), 0.02])
    assert found[0] == pytest.approx(0.02)
    assert np.isnan(found[1])


def test_holm_keeps_the_familywise_level():
    rng = np.random.default_rng(4)
    wrong = np.mean([min(holm(rng.random(6))) < 0.05 for _ in range(2000)])
    assert wrong < 0.06


def judge(x, **region):
    return verdict(*region_p_values(t_interval(x), region.get("above"), region.get("below")))


def test_false_positive_rate_of_holds_under_a_null():
    rng = np.random.default_rng(5)
    found = [judge(rng.normal(0, 1, 10), above=0.0) for _ in range(3000)]
    assert 0.018 < np.mean([v == "holds" for v in found]) < 0.032
    assert 0.018 < np.mean([v == "fails" for v in found]) < 0.032


@pytest.mark.parametrize(
    ("effect", "region", "expected"),
    [
        (3.0, {"above": 0.0}, "holds"),
        (-3.0, {"above": 0.0}, "fails"),
        (3.0, {"below": 0.0}, "fails"),
        (0.0, {"above": -4.0, "below": 4.0}, "holds"),
        (9.0, {"above": -4.0, "below": 4.0}, "fails"),
        (-9.0, {"above": -4.0, "below": 4.0}, "fails"),
        (0.0, {"above": 0.0}, "inconclusive"),
        (4.0, {"above": -4.0, "below": 4.0}, "inconclusive"),
    ],
)
def test_planted_effects(effect, region, expected):
    rng = np.random.default_rng(6)
    verdicts = [judge(rng.normal(effect, 1, 10), **region) for _ in range(200)]
    assert np.mean([v == expected for v in verdicts]) >= 0.93


def test_verdict_matches_the_interval():
    rng = np.random.default_rng(7)
    for _ in range(300):
        x = rng.normal(0.5, 1, 6)
        interval = t_interval(x)
        expected = "holds" if interval.low > 0 else "fails" if interval.high < 0 else "inconclusive"
        assert judge(x, above=0.0) == expected


def test_constant_effects():
    assert judge([0.1, 0.1, 0.1], above=0.0) == "holds"
    assert judge([-0.1, -0.1], above=0.0) == "fails"
    assert judge([0.0, 0.0], above=0.0) == "inconclusive"
    assert judge([0.3], above=0.0) == "inconclusive"


def test_detectable_effect_is_found_with_the_stated_power():
    rng = np.random.default_rng(8)
    n, sd = 10, 1.0
    design = Interval(0, 0, 0, sd / np.sqrt(n), n - 1, n)
    effect = detectable_effect(design)
    power = np.mean([judge(rng.normal(effect, sd, n), above=0.0) == "holds" for _ in range(2000)])
    assert 0.75 < power < 0.87
