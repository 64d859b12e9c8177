import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from classact.mil import ABMIL, BagCrossEntropy, MILOutput
from classact.mil.imbalance import CosineClassifier, FocalLoss, LDAMLoss, LogitAdjustment, make_imbalanced


def output(logits):
    logits = torch.as_tensor(logits)
    return MILOutput(logits, torch.zeros(len(logits), 1), torch.zeros(len(logits), 1))


def probabilities(*rows):
    return output(torch.tensor(rows).log())


@pytest.mark.parametrize(("ratio", "left"), [(1, 60), (5, 12), (10, 6), (20, 3), (1000, 1)])
def test_minority_is_thinned_out_and_the_rest_stays(ratio, left):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [60, 60, 60]))
    chosen = make_imbalanced(labels, ratio, (1, 2), np.random.default_rng(1))
    assert np.bincount(labels[chosen]).tolist() == [60, left, left]
    assert (np.diff(chosen) > 0).all()
    assert set(np.flatnonzero(labels == 0)) <= set(chosen)
    again, other = (make_imbalanced(labels, ratio, (1, 2), np.random.default_rng(s)) for s in (1, 2))
    assert (chosen == again).all()
    assert ratio == 1 or (chosen != other).any()


def test_the_largest_of_several_majorities_counts():
    labels = np.repeat([0, 1, 2], [20, 50, 30])
    assert np.bincount(labels[make_imbalanced(labels, 10, 2, np.random.default_rng(0))]).tolist() == [20, 50, 5]


@pytest.mark.parametrize(
    ("ratio", "minority", "message"),
    [
        (0.5, 1, "ratio: expected at least 1, got 0.5"),
        (2, (0, 1), r"minority: expected at least one class to be left out of \[0, 1\]"),
        (1, 1, "minority: ratio 1 needs 10 bags of class 1 beside 10, got 3"),
        (10, 7, "minority: ratio 10 needs 1 bags of class 7 beside 10, got 0"),
    ],
)
def test_impossible_imbalance(ratio, minority, message):
    with pytest.raises(ValueError, match=message):
        make_imbalanced([0] * 10 + [1] * 3, ratio, minority, np.random.default_rng(0))


def test_focal_by_hand():
    out = probabilities([0.9, 0.1], [0.6, 0.4])
    target = torch.tensor([0, 1])
    easy, hard = -(0.1**2) * math.log(0.9), -(0.6**2) * math.log(0.4)
    assert easy == pytest.approx(0.00105361, abs=1e-8) and hard == pytest.approx(0.32986467, abs=1e-8)
    assert FocalLoss(2.0)(out, target).item() == pytest.approx((easy + hard) / 2, abs=1e-6)
    weighted = FocalLoss(2.0, torch.tensor([1.0, 3.0]))(out, target).item()
    assert weighted == pytest.approx((easy + 3 * hard) / 4, abs=1e-6)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_focal_without_focus_is_cross_entropy(weight):
    out, target = output(torch.randn(6, 3)), torch.tensor([0, 1, 2, 2, 1, 0])
    torch.testing.assert_close(FocalLoss(0.0, weight)(out, target), BagCrossEntropy(weight)(out, target))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_finite_gradients_at_certainty(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    FocalLoss(gamma)(output(logits), torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all()


def test_ldam_by_hand():
    """Counts 16 and 81: the margins are 0.5 and 0.5 * 2/3."""
    loss, target = LDAMLoss([16, 81], max_margin=0.5, scale=30.0), torch.tensor([0, 1])
    torch.testing.assert_close(loss.margin, torch.tensor([0.5, 1 / 3]))
    cosine = torch.tensor([[0.6, 0.2], [0.1, 0.4]])
    first = math.log1p(math.exp(30 * (0.2 - (0.6 - 0.5))))
    second = math.log1p(math.exp(30 * (0.1 - (0.4 - 1 / 3))))
    assert first == pytest.approx(3.0485874, abs=1e-6) and second == pytest.approx(1.3132617, abs=1e-6)
    assert loss(output(30 * cosine), target, 0.79).item() == pytest.approx((first + second) / 2, abs=1e-5)
    plain = LDAMLoss([16, 81], scale=1.0)(output(cosine), target).item()
    assert plain == pytest.approx((math.log1p(math.exp(0.1)) + math.log1p(math.exp(1 / 30))) / 2, abs=1e-6)


def test_ldam_weights_are_deferred():
    """beta = 0.9, counts 1 and 2: effective numbers 1 and 1.9, weights 1 / 1 and 1 / 1.9, divided by their mean."""
    loss, target = LDAMLoss([1, 2], max_margin=0.0, beta=0.9), torch.tensor([0, 1])
    torch.testing.assert_close(loss.deferred_weight, torch.tensor([1.3103448, 0.6896552]))
    out = output(torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    torch.testing.assert_close(loss(out, target, 0.7999), BagCrossEntropy()(out, target))
    torch.testing.assert_close(loss(out, target, 0.8), BagCrossEntropy(loss.deferred_weight)(out, target))
    torch.testing.assert_close(LDAMLoss([1, 2], 0.0, defer=1.0)(out, target, 1.0), BagCrossEntropy()(out, target))
    own = torch.tensor([3.0, 1.0])
    given = LDAMLoss([1, 2], max_margin=0.0, class_weight=own)
    torch.testing.assert_close(given(out, target, 1.0), BagCrossEntropy(own)(out, target))


def test_effective_numbers_are_nearly_the_counts():
    weight = LDAMLoss([150, 15, 15]).deferred_weight
    assert (weight[1] / weight[0]).item() == pytest.approx(10, rel=0.01)


def test_cosine_classifier():
    classifier = CosineClassifier(4, 3, scale=30.0)
    z = torch.randn(5, 4)
    expected = 30 * F.cosine_similarity(z.unsqueeze(1), classifier.weight, dim=-1)
    torch.testing.assert_close(classifier(z), expected)
    torch.testing.assert_close(classifier(7 * z), expected)


def test_logit_adjustment_by_hand():
    """Frequencies 0.9 and 0.1 and equal logits: the loss is that of the frequencies."""
    loss, out = LogitAdjustment([90, 10]), output(torch.zeros(2, 2))
    expected = -(math.log(0.9) + math.log(0.1)) / 2
    assert expected == pytest.approx(1.2039728, abs=1e-6)
    assert loss(out, torch.tensor([0, 1])).item() == pytest.approx(expected, abs=1e-6)
    # tau = 2 squares the odds: 81 to 1
    assert LogitAdjustment([90, 10], 2.0)(out, torch.tensor([1, 1])).item() == pytest.approx(math.log(82), abs=1e-5)


def test_logit_adjustment_does_nothing_to_equal_classes():
    out, target = output(torch.randn(4, 3)), torch.tensor([0, 1, 2, 2])
    for loss in (LogitAdjustment([7, 7, 7]), LogitAdjustment([90, 10, 5], tau=0.0)):
        torch.testing.assert_close(loss(out, target), BagCrossEntropy()(out, target))
    weight = torch.tensor([1.0, 2.0, 3.0])
    weighted = LogitAdjustment([7, 7, 7], class_weight=weight)
    torch.testing.assert_close(weighted(out, target), BagCrossEntropy(weight)(out, target))


@pytest.mark.parametrize("counts", [[90, 10], np.array([90, 10]), torch.tensor([90, 10])])
def test_every_loss_trains_a_network_and_adds_up(counts):
    for loss in (FocalLoss(), LDAMLoss(counts), LogitAdjustment(counts)):
        model = ABMIL(8, 2, dim=4, hidden=4)
        x, target = torch.randn(4, 5, 8), torch.tensor([0, 0, 1, 1])
        value = (loss + BagCrossEntropy())(model(x), target, 0.9)
        torch.testing.assert_close(value, loss(model(x), target, 0.9) + BagCrossEntropy()(model(x), target))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model(x), target, 0.9)
        value.backward()
        assert value.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(-1.0), "gamma: expected 0 or more, got -1.0"),
        (lambda: LDAMLoss([3, 0]), r"class_counts: expected at least 1 bag of each of 2 or more classes, got \[3.0, 0"),
        (lambda: LDAMLoss([3, 2], max_margin=-1), "max_margin: expected 0 or more, got -1"),
        (lambda: LDAMLoss([3, 2], scale=0), "scale: expected a positive number, got 0"),
        (lambda: LDAMLoss([3, 2], defer=1.5), r"defer: expected a part in \[0, 1\], got 1.5"),
        (lambda: LDAMLoss([3, 2], beta=1.0), r"beta: expected a number in \[0, 1\), got 1.0"),
        (lambda: LogitAdjustment([3]), "class_counts: expected at least 1 bag of each of 2 or more classes"),
        (lambda: LogitAdjustment([3, 2], tau=-1), "tau: expected 0 or more, got -1"),
        (
            lambda: LogitAdjustment([3, 2])(output(torch.zeros(1, 3)), torch.tensor([0])),
            "class_counts: the loss was built for 2 classes, got 3 logits",
        ),
        (
            lambda: LDAMLoss([3, 2])(output(torch.zeros(1, 3)), torch.tensor([0])),
            "class_counts: the loss was built for 2 classes, got 3 logits",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
