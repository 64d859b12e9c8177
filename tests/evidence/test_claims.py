import numpy as np
import pytest

from classact.evidence.claims import effect_of, evaluate_claims

CELL = {"a": {"auc": 0.9, "time": 2.0}, "b": {"auc": 0.7, "time": 8.0}, "c": {"auc": None}}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("auc.a - auc.b", 0.2),
        ("time.b / time.a", 4.0),
        ("auc.a - max(auc.b, 0.8)", 0.1),
        ("-abs(auc.b - auc.a) * 10", -2.0),
        ("min(auc.a, auc.b)", 0.7),
    ],
)
def test_effects(expression, value):
    assert effect_of(expression, CELL) == pytest.approx(value)


def test_a_missing_value_is_missing():
    assert np.isnan(effect_of("auc.c - auc.a", CELL))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("auc.d", "no auc.d; there are auc.a, time.a, auc.b"),
        ("f1.a", "no f1.a"),
        ("auc.a **", "invalid syntax"),
        ("__import__('os')", "cannot use"),
        ("auc.a.real", "cannot use"),
        ("[auc.a][0]", "cannot use"),
    ],
)
def test_bad_effects(expression, message):
    with pytest.raises(ValueError, match=message):
        effect_of(expression, CELL)


def cells(effects):
    return {100 + i: {"a": {"auc": 0.5 + e}, "b": {"auc": 0.5}} for i, e in enumerate(effects)}


def check(experiment, **more):
    return {"experiment": experiment, "evidence": "mechanism", "effect": "auc.a - auc.b", "above": 0.0, **more}


RNG = np.random.default_rng(0)
RESULTS = {
    "up": cells(RNG.normal(0.3, 0.01, 10)),
    "down": cells(RNG.normal(-0.3, 0.01, 10)),
    "flat": cells(RNG.normal(0, 0.2, 10) - 0.05),
}


@pytest.mark.parametrize(
    ("experiments", "expected"),
    [
        (["up"], "holds"),
        (["up", "up"], "holds"),
        (["up", "flat"], "inconclusive"),
        (["up", "flat", "down"], "fails"),
        (["down"], "fails"),
    ],
)
def test_a_claim_holds_if_all_its_checks_hold(experiments, expected):
    claim = {"id": "x", "central": True, "checks": [check(e) for e in experiments]}
    (found,) = evaluate_claims([claim], RESULTS)
    assert found["verdict"] == expected
    assert found["evidence"] == "mechanism, constructed data"
    assert found["seeds"] == list(range(100, 110))
    assert found["interval"][0] < found["effect"] < found["interval"][1]


def test_a_check_that_is_not_required_is_judged_and_decides_nothing():
    real = check("down", evidence="real", required=False)
    (found,) = evaluate_claims([{"id": "x", "central": True, "checks": [check("up"), real]}], RESULTS)
    assert found["verdict"] == "holds"
    assert [c["verdict"] for c in found["checks"]] == ["holds", "fails"]
    assert "real data" not in found["evidence"]


def test_central_claims_are_uncorrected_and_the_others_are_adjusted():
    borderline = {"edge": cells(np.array([1.0, -0.4, 0.9, 1.2, -0.3, 0.8, 1.1, 0.3, -0.3, 0.9]) / 10)}
    claims = [{"id": "c", "central": True, "checks": [check("edge")]}]
    claims += [{"id": f"o{i}", "checks": [check("edge")]} for i in range(10)]
    central, *others = evaluate_claims(claims, borderline)
    p = central["checks"][0]["p"]
    assert 0.005 < p < 0.05
    assert central["verdict"] == "holds"
    assert {o["verdict"] for o in others} == {"inconclusive"}
    assert others[0]["checks"][0]["p_adjusted"] == pytest.approx(min(1, 10 * p))


def test_folds_get_the_wider_interval():
    claim = {"id": "x", "central": True, "checks": [check("flat")]}
    plain, corrected = (evaluate_claims([claim], RESULTS, r)[0] for r in ({}, {"flat": 0.25}))
    width = [c["interval"][1] - c["interval"][0] for c in (plain, corrected)]
    assert width[1] / width[0] == pytest.approx(np.sqrt((1 / 10 + 0.25) / (1 / 10)))


def test_untested_claims_get_no_verdict():
    assert evaluate_claims([{"id": "x", "untested": "needs live traffic"}], RESULTS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"above": None}, "needs above, below or within"),
        ({"evidence": "hearsay"}, "evidence must be one of mechanism, real, paper"),
        ({"abve": 1}, "unknown keys abve"),
    ],
)
def test_malformed_checks(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_claims([{"id": "x", "checks": [check("up", **change)]}], RESULTS)
