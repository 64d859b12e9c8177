import numpy as np
import pytest

from classact.evidence.splits import inner_split, make_splits, take_fraction
from classact.evidence.store import StudyError

RNG = np.random.default_rng(0)
GROUPS = np.array([f"g{i // 3}" for i in range(90)])
LABELS = np.repeat(RNG.permutation(np.arange(30) % 2), 3)


def test_no_group_straddles_any_two_parts():
    for split in make_splits(LABELS, GROUPS, 5, 3, seed=0):
        parts = [set(GROUPS[part]) for part in (split.train, split.validation, split.test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert sum(len(part) for part in (split.train, split.validation, split.test)) == 90
        assert all(0.2 < LABELS[part].mean() < 0.8 for part in (split.train, split.validation, split.test))
        assert 0.15 < len(split.validation) / (len(split.train) + len(split.validation)) < 0.27


def test_test_parts_of_a_repeat_cover_everything_once_and_repeats_differ():
    splits = make_splits(LABELS, GROUPS, 5, 2, seed=0)
    for repeat in (0, 1):
        tests = np.concatenate([s.test for s in splits if s.repeat == repeat])
        assert sorted(tests) == list(range(90))
    assert not np.array_equal(splits[0].test, splits[5].test)
    again = make_splits(LABELS, GROUPS, 5, 2, seed=0)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(splits, again, strict=True))


def test_given_splits():
    given = [{"train": range(60), "validation": [], "test": range(60, 90)}]
    (split,) = make_splits(LABELS, GROUPS, 5, 1, 0, given)
    assert set(split.train) | set(split.validation) == set(range(60))
    assert len(split.validation) > 0
    straddling = [{"train": range(61), "validation": [], "test": range(61, 90)}]
    with pytest.raises(StudyError, match="split 0: groups in the test part and in another: g20"):
        make_splits(LABELS, GROUPS, 5, 1, 0, straddling)


def test_fewer_groups_than_folds():
    with pytest.raises(StudyError, match="30 groups cannot be cut into 31 folds; use --folds 30 or fewer"):
        make_splits(LABELS, GROUPS, 31, 1, 0)


def test_validation_holds_every_class_where_it_can():
    labels = np.array([0] * 37 + [1] * 3)
    train, validation = inner_split(labels, np.arange(40).astype(str), np.arange(40), 0)
    assert set(labels[train]) == set(labels[validation]) == {0, 1}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_fractions_are_nested_whole_groups_of_every_class(fraction):
    items = np.arange(90)[6:]
    taken = take_fraction(LABELS, GROUPS, items, fraction, seed=3)
    assert set(taken) <= set(items)
    assert set(LABELS[taken]) == {0, 1}
    assert set(GROUPS[taken]).isdisjoint(GROUPS[np.setdiff1d(items, taken)])
    assert len(taken) == pytest.approx(fraction * len(items), abs=4)
    if fraction < 1:
        assert set(taken) <= set(take_fraction(LABELS, GROUPS, items, 2 * fraction, seed=3))


def test_a_fraction_keeps_a_rare_class():
    labels = np.array([1, *[0] * 29])
    for seed in range(5):
        assert 0 in take_fraction(labels, np.arange(30).astype(str), np.arange(30), 0.1, seed)
