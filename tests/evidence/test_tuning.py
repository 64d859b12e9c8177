"""Every method gets as many configurations, and what the user set is not searched."""

import numpy as np
import pytest
from scipy.stats import loguniform

from classact.evidence.tuning import criterion, describe, draw_configurations, merged, searched
from classact.tasks.mil import METHODS, SPACES, TASK, budget, build, space

SPACE = {"a.lr": loguniform(1e-4, 1e-2), "a.width": [1, 2, 3], "part.weight": loguniform(0.1, 1)}


def test_draws():
    drawn = draw_configurations(SPACE, 5, 0, {}, {})
    assert len(drawn) == 5
    assert drawn[0] == {}
    assert all(set(one) == set(SPACE) and 1e-4 <= one["a.lr"] <= 1e-2 for one in drawn[1:])
    assert drawn == draw_configurations(SPACE, 5, 0, {}, {})
    assert drawn != draw_configurations(SPACE, 5, 1, {}, {})
    assert drawn[:3] == draw_configurations(SPACE, 3, 0, {}, {})


def test_what_the_user_set_is_not_searched():
    drawn = draw_configurations(SPACE, 3, 0, {"a": {"width": 2}}, {"lr": 1e-3})
    assert set(drawn[1]) == {"part.weight"}
    assert merged({"a": {"width": 2}}, drawn[1]) == {"a": {"width": 2}, "part": {"weight": drawn[1]["part.weight"]}}
    small = draw_configurations({"a.width": [1, 2]}, 9, 0, {}, {})  # searched whole
    assert small[0] == {}
    assert sorted(one["a.width"] for one in small[1:]) == [1, 2]
    assert draw_configurations({}, 9, 0, {}, {}) == [{}]


def test_spaces_in_words():
    text = describe(searched(SPACE, {"part": {"weight": 1}}, {}))
    assert text == "a.lr loguniform(0.0001, 0.01); a.width in 1, 2, 3"


def test_the_choice_is_by_rank_then_by_calibrated_cross_entropy():
    labels = np.array([0, 1, 0, 1])
    good, worse = (
        np.stack([1 - p, p], axis=1) for p in (np.array([0.1, 0.6, 0.2, 0.9]), np.array([0.7, 0.6, 0.2, 0.9]))
    )
    assert criterion(labels, good) > criterion(labels, worse) > criterion(labels, good * np.nan)
    assert criterion(labels, good)[0] == 1
    # a loss that does not aim at probabilities is not punished for it
    shrunk = good**0.1 / (good**0.1).sum(1, keepdims=True)
    assert criterion(labels, shrunk)[1] == pytest.approx(criterion(labels, good)[1], rel=0.05)
    assert criterion(np.zeros(4, int), good)[0] == 0


@pytest.mark.bare
@pytest.mark.parametrize("name", [*METHODS, "acmil+aem", "mhim(dsmil)+aem+subsample"])
def test_every_draw_of_every_space_is_a_setting_that_fits(name):
    drawn = draw_configurations(space(name), 8, 0, {}, {})
    assert len(drawn) == (1 if name == "prevalence" else 8)
    for one in drawn:
        build(name, merged({}, one), {})


def test_every_space_belongs_to_a_method_or_part():
    from classact.tasks.mil import TERMS, WRAPPERS

    assert set(SPACES) <= {*METHODS, *TERMS, *WRAPPERS, "mhim"}


def test_equal_steps_whatever_the_batch_and_the_number_of_stages():
    from classact.data import digits_bags

    bags = digits_bags(40)
    train, validation = bags.subset(range(30)), bags.subset(range(30, 40))
    options = {"epochs": 8, "batch_size": 10, "lr": 1e-3}
    assert budget(options, 30) == {"steps": 24}
    assert budget({}, 30) == {"steps": 1500}
    taken = {}
    for name, settings in (("abmil", {}), ("mhim(abmil)", {}), ("mean", {"mean": {"batch_size": 5}})):
        fit = build(name, settings, {**options, **TASK.budget(options, 30)})
        taken[name] = fit(train, validation, seed=0).history.steps
    assert taken == {"abmil": 24, "mhim(abmil)": 24, "mean": 24}
