"""From the cells of experiments to verdicts on a paper's claims."""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from classact.evidence.experiment import Values
from classact.evidence.statistics import (
    Interval,
    corrected_interval,
    detectable_effect,
    holm,
    region_p_values,
    t_interval,
    verdict,
)

KINDS = {
    "mechanism": "mechanism, constructed data",
    "real": "real data, our protocol",
    "paper": "paper protocol",
}
_CHECK_KEYS = {"experiment", "evidence", "effect", "above", "below", "within", "required", "note"}


def effect_of(expression: str, cell: Values) -> float:
    """Value of an effect such as ``auc.acmil - auc.abmil`` in one cell.

    Names are ``metric.arm``; numbers, + - * /, parentheses, ``min(...)``, ``max(...)`` and ``abs(...)`` are allowed.

    Raises
    ------
    ValueError
        If the expression is malformed or names an arm or metric that the cell lacks.
    """
    operators: dict[type, Callable[..., float]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }
    functions: dict[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs}

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            metric, arm = node.value.id, node.attr
            if arm not in cell or metric not in cell[arm]:
                there = ", ".join(f"{m}.{a}" for a, metrics in cell.items() for m in metrics)
                raise ValueError(f"effect {expression!r}: no {metric}.{arm}; there are {there}")
            found = cell[arm][metric]
            return math.nan if found is None else found
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            return functions[node.func.id](*map(value, node.args))
        raise ValueError(f"effect {expression!r}: cannot use {ast.unparse(node)!r}")

    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"effect {expression!r}: {error.msg}") from error
    return value(tree.body)


def evaluate_claims(
    claims: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[int, Values]],
    ratios: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """Judge every claim that has checks.

    A check is one scalar effect per replicate; it holds if its 95 % interval lies inside the region, fails if wholly
    outside, else it is inconclusive. A claim holds if all its required checks hold and fails if one fails. The central
    claim is judged uncorrected, the checks of the others together with Holm's adjustment. A check with
    ``required = false`` is judged and shown, but does not decide its claim.

    Parameters
    ----------
    claims : sequence
        As in the catalogue.
    results : mapping
        ``results[experiment][seed][arm][metric]``.
    ratios : mapping, optional
        Experiment -> test/train ratio where its seeds are folds of one data set.

    Returns
    -------
    list of dict
        JSON values: id, verdict, evidence, effect, interval, seeds, note, checks.
    """
    ratios = ratios or {}
    judged = []
    for claim in claims:
        checks = [
            _measure(check, results[check["experiment"]], ratios.get(check["experiment"]))
            for check in claim.get("checks", [])
            if check["experiment"] in results
        ]
        if checks:
            judged.append((claim, checks))
    others = [check for claim, checks in judged if not claim.get("central") for check in checks]
    for check, adjusted in zip(others, holm([check["p"] for check in others]), strict=True):
        check["p_adjusted"] = None if math.isnan(adjusted) else adjusted
    return [_verdict_of(claim, checks) for claim, checks in judged]


def _measure(check: Mapping[str, Any], cells: Mapping[int, Values], ratio: float | None) -> dict[str, Any]:
    if unknown := set(check) - _CHECK_KEYS:
        raise ValueError(f"check {check.get('effect')!r}: unknown keys {', '.join(sorted(unknown))}")
    if check["evidence"] not in KINDS:
        raise ValueError(f"check {check['effect']!r}: evidence must be one of {', '.join(KINDS)}")
    effects = np.array([effect_of(check["effect"], cell) for cell in cells.values()])
    interval = corrected_interval(effects, ratio) if ratio else t_interval(effects)
    above, below = check.get("within", (check.get("above"), check.get("below")))
    if above is None and below is None:
        raise ValueError(f"check {check['effect']!r}: needs above, below or within")
    p_inside, p_outside = region_p_values(interval, above, below)
    return {
        "experiment": check["experiment"],
        "evidence": check["evidence"],
        "expression": check["effect"],
        "above": above,
        "below": below,
        "required": check.get("required", True),
        "effect": _number(interval.effect),
        "interval": [_number(interval.low), _number(interval.high)],
        "detectable": _number(detectable_effect(interval)),
        "seeds": [int(seed) for seed in cells],
        "p_inside": p_inside,
        "p_outside": p_outside,
        "p": min(p_inside, p_outside),
        "note": check.get("note", ""),
    }


def _verdict_of(claim: Mapping[str, Any], checks: list[dict[str, Any]]) -> dict[str, Any]:
    for check in checks:
        p = check.get("p_adjusted", check["p"])
        inside = check["p_inside"] <= check["p_outside"]
        check["verdict"] = verdict(p if inside else 1.0, 1.0 if inside else p)
    deciding = [check for check in checks if check["required"]] or checks
    verdicts = {check["verdict"] for check in deciding}
    total = "fails" if "fails" in verdicts else "inconclusive" if "inconclusive" in verdicts else "holds"
    shown = next((check for check in deciding if check["verdict"] == total), deciding[0])
    for check in checks:
        del check["p_inside"], check["p_outside"]
    return {
        "id": claim["id"],
        "central": bool(claim.get("central")),
        "verdict": total,
        "evidence": "; ".join(KINDS[kind] for kind in dict.fromkeys(check["evidence"] for check in deciding)),
        "effect": shown["effect"],
        "interval": shown["interval"],
        "seeds": shown["seeds"],
        "note": claim.get("note", ""),
        "checks": checks,
    }


def _number(value: float) -> float | None:
    return None if not math.isfinite(value) else float(value)


def as_interval(check: Mapping[str, Any]) -> Interval:
    """Interval of a judged check, for drawing."""
    low, high = (math.nan if end is None else end for end in check["interval"])
    return Interval(check["effect"], low, high, math.nan, math.nan, len(check["seeds"]))
