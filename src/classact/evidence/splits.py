"""Cutting items into training, validation and test parts, by groups and stratified by class."""

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from classact.evidence.store import StudyError

INNER_FOLDS = 5  # one fifth of the training groups is the validation part


class Split(NamedTuple):
    """Positions of the items of one fold."""

    repeat: int
    fold: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def make_splits(
    labels: np.ndarray,
    groups: Sequence[str],
    folds: int,
    repeats: int,
    seed: int,
    predefined: Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> list[Split]:
    """Cut the items into training, validation and test parts.

    Parameters
    ----------
    labels, groups : (n,)
        Class and group of every item.
    folds, repeats : int
        Folds of each repeat; test parts of a repeat do not overlap.
    seed : int
        Of the shuffling.
    predefined : sequence, optional
        Splits given by the user, each a repeat of one fold; a missing validation part is cut from its training part.

    Raises
    ------
    StudyError
        If there are fewer groups than folds, or a group straddles parts of a given split.
    """
    group_of = np.asarray(groups)
    if predefined is not None:
        splits = []
        for number, part in enumerate(predefined):
            train, validation, test = (np.array(part[k], dtype=int) for k in ("train", "validation", "test"))
            if len(test) == 0 or len(train) == 0:
                raise StudyError(f"split {number}: expected training and test items, got {len(train)} and {len(test)}")
            both = set(group_of[test]) & set(group_of[np.concatenate([train, validation])])
            if both:
                raise StudyError(
                    f"split {number}: groups in the test part and in another: {', '.join(sorted(both)[:5])}"
                )
            if len(validation) == 0:
                train, validation = inner_split(labels, group_of, train, seed + number)
            splits.append(Split(number, 0, train, validation, test))
        return splits
    n_groups = len(set(groups))
    if n_groups < folds:
        raise StudyError(f"{n_groups} groups cannot be cut into {folds} folds; use --folds {max(2, n_groups)} or fewer")
    splits = []
    for repeat in range(repeats):
        for fold, (outer, test) in enumerate(_cut(labels, group_of, folds, seed * 1000 + repeat)):
            train, validation = inner_split(labels, group_of, outer, seed * 1000 + repeat)
            splits.append(Split(repeat, fold, train, validation, test))
    return splits


def inner_split(labels: np.ndarray, groups: np.ndarray, items: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a validation part of about one fifth off `items`, by groups and stratified.

    Of the five candidates the first in which both parts hold every class is taken, if there is one.
    """
    n_groups = len(set(groups[items]))
    if n_groups < 2:
        raise StudyError("a training part needs at least 2 groups, so that one can be its validation part")
    cuts = _cut(labels[items], groups[items], min(INNER_FOLDS, n_groups), seed)
    candidates = [(items[a], items[b]) for a, b in cuts]
    classes = set(labels[items])
    complete = [c for c in candidates if set(labels[c[0]]) == classes == set(labels[c[1]])]
    return (complete or candidates)[0]


def _cut(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions of the outer and the held-out part of every fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # folds that lack a class are counted and reported by the comparison itself
        warnings.filterwarnings("ignore", message="The least populated class")
        return list(cutter.split(labels, labels, groups))


def take_fraction(labels: np.ndarray, groups: np.ndarray, items: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Take a part of the groups among `items`, at least one of every class; smaller parts lie within larger ones.

    Parameters
    ----------
    labels, groups : (n,)
        Class and group of every item of the data set. A group counts for the largest class in it.
    items : (m,)
        Positions to choose from.
    fraction : float
        In (0, 1].
    seed : int
        Of the order of the groups.
    """
    class_of: dict[str, int] = {}
    for item in items:
        class_of[groups[item]] = max(int(labels[item]), class_of.get(groups[item], -1))
    order = np.random.default_rng(seed).permutation(sorted(class_of))
    chosen: set[str] = set()
    for c in sorted(set(class_of.values())):
        members = [name for name in order if class_of[name] == c]
        chosen.update(members[: max(1, round(fraction * len(members)))])
    return items[[groups[item] in chosen for item in items]]


def fingerprint(cuts: Sequence[Split]) -> str:
    """Return eight hex digits that change with any position in any part."""
    return f"{zlib.crc32(repr([tuple(np.asarray(p).tolist() for p in cut) for cut in cuts]).encode()):08x}"
