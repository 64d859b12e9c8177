"""Fair tuning: every method gets the same number of configurations, the same validation part and as many steps.

The first configuration is what would run without tuning: the paper's defaults, with what the user set. The others are
drawn at random from the method's search space, the same in every fold. What the user set is not searched.
"""

import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from classact.evidence.metrics import auc, calibrate, fit_temperature

Settings = dict[str, dict[str, Any]]


def draw_configurations(
    space: Mapping[str, Any],
    number: int,
    seed: int,
    settings: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Draw configurations of a method.

    Parameters
    ----------
    space : mapping
        ``{"acmil.branches": [1, 3, 5], "acmil.lr": scipy.stats.loguniform(1e-5, 1e-3)}``: what
        `sklearn.model_selection.ParameterSampler` takes, by owner and name of the setting.
    number : int
        Configurations in all, at least 1.
    seed : int
        Of the draws.
    settings, options : mapping
        What the user set, for one method and for all; left out of the search.

    Returns
    -------
    list of dict
        The first is empty, the defaults. Fewer than `number` where the space holds fewer.
    """
    from sklearn.model_selection import ParameterSampler

    free = searched(space, settings, options)
    if not free or number < 2:
        return [{}]
    seed = zlib.crc32(repr((seed, sorted(free))).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a space smaller than the number of draws is searched whole
        drawn = list(ParameterSampler(free, number - 1, random_state=seed))
    return [{}, *({key: _plain(value) for key, value in sorted(one.items())} for one in drawn)]


def searched(
    space: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the part of a space that the user left open."""
    found = {}
    for key, values in space.items():
        owner, _, name = key.partition(".")
        if name not in settings.get(owner, {}) and name not in options:
            found[key] = values
    return found


def describe(space: Mapping[str, Any]) -> str:
    """Write a search space in words: ``abmil.dropout in 0, 0.25; abmil.lr loguniform(1e-05, 0.01)``."""
    parts = []
    for key, values in space.items():
        if hasattr(values, "dist"):
            parts.append(f"{key} {values.dist.name}({', '.join(f'{v:g}' for v in values.args)})")
        else:
            parts.append(f"{key} in {', '.join(map(str, values))}")
    return "; ".join(parts)


def _plain(value: Any) -> Any:
    """A value for JSON, of three digits: nobody needs more of a learning rate."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.3g}") if isinstance(value, float) else value


def merged(settings: Mapping[str, Mapping[str, Any]], configuration: Mapping[str, Any]) -> Settings:
    """Settings with a configuration on top."""
    found = {owner: dict(own) for owner, own in settings.items()}
    for key, value in configuration.items():
        owner, _, name = key.partition(".")
        found.setdefault(owner, {})[name] = value
    return found


def criterion(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """How good a configuration is on the validation part: its AUC, then its calibrated cross-entropy, negated.

    AUC and calibration make the choice fair to losses that do not aim at probabilities. Without one of the classes only
    the cross-entropy counts; a configuration that diverged is worse than any other.
    """
    if not np.isfinite(probabilities).all():
        return -1.0, -np.inf
    p = calibrate(probabilities, fit_temperature(labels, probabilities))
    area = auc(labels, p)
    return (0.0 if np.isnan(area) else area), float(np.log(np.clip(p[np.arange(len(p)), labels], 1e-12, 1)).mean())
