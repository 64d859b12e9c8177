"""Measures of a map on maps, boxes and networks whose answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from classact.explain.metrics import (
    average_drop,
    box_iou,
    boxes_from_map,
    confidence_change,
    deletion,
    energy_pointing_game,
    filled,
    increase_in_confidence,
    insertion,
    localization_error,
    occlusion_faithfulness,
    occlusion_map,
    pointing_game,
    rank_correlation,
    recall_aware_pointing,
)

CORNER = torch.zeros(1, 4, 4, dtype=torch.bool)
CORNER[0, :2, :2] = True


def blocks():
    """A block of 1 (rows 2 to 4, columns 3 to 5), one of 0.5 in a corner, and a pixel of 0.1."""
    maps = torch.zeros(1, 8, 8)
    maps[0, 2:5, 3:6], maps[0, :2, :2], maps[0, 7, 0] = 1, 0.5, 0.1
    return maps


class Corner(nn.Module):
    """The logit of class 1 is ten times the sum of the four pixels in the upper left corner; that of class 0 is 0."""

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), 10 * x[:, 0, :2, :2].sum((1, 2))], 1)


def test_the_box_holds_the_largest_part_over_the_threshold():
    assert boxes_from_map(blocks()).tolist() == [[2, 3, 5, 6]]
    assert boxes_from_map(blocks(), component="all").tolist() == [[0, 0, 5, 6]]
    assert boxes_from_map(blocks(), 0.05, "all").tolist() == [[0, 0, 8, 6]]
    assert boxes_from_map(blocks() * 1e-20).tolist() == [[2, 3, 5, 6]]


def test_parts_that_touch_at_a_corner_are_two():
    maps = torch.zeros(1, 4, 4)
    maps[0, [0, 0, 1], [0, 1, 2]] = 1
    assert boxes_from_map(maps).tolist() == [[0, 0, 1, 2]]


def test_a_map_without_a_positive_value_has_no_box():
    assert boxes_from_map(torch.stack([torch.zeros(5, 5), -torch.ones(5, 5)])).tolist() == [[0] * 4] * 2


def test_overlap_of_boxes():
    a = torch.tensor([0, 0, 4, 4])
    others = torch.tensor([[0, 0, 4, 4], [0, 2, 4, 6], [4, 4, 8, 8], [1, 1, 3, 3], [0, 0, 0, 0]])
    torch.testing.assert_close(box_iou(a, others), torch.tensor([1, 8 / 24, 0, 0.25, 0]))
    assert box_iou(others[-1], others[-1]) == 0


def test_localization_error_takes_the_best_of_several_true_boxes():
    maps = blocks().expand(2, 8, 8)
    boxes = torch.tensor([[[0, 0, 2, 2], [2, 3, 5, 6]], [[0, 0, 2, 2], [0, 0, 0, 0]]])
    assert localization_error(maps, boxes).tolist() == [0, 1]
    assert localization_error(maps, torch.tensor([[[2, 3, 5, 8]], [[2, 3, 5, 8]]]), iou=0.6).tolist() == [0, 0]
    assert localization_error(maps, torch.tensor([[[2, 3, 5, 8]], [[2, 3, 5, 8]]]), iou=0.61).tolist() == [1, 1]


def test_pointing_game():
    maps = torch.zeros(3, 4, 4)
    maps[0, 1, 1], maps[1, 1, 2], maps[2] = 1, 1, 0.5
    masks = CORNER.expand(3, 4, 4)
    assert pointing_game(maps, masks).tolist() == [1, 0, 0], "a constant map points nowhere"
    assert pointing_game(maps, masks, tolerance=1).tolist() == [1, 1, 0]


def test_rejection_of_absent_classes_counts():
    maps = torch.zeros(1, 4, 4, 4)
    maps[0, 0, 0, 0] = 0.9  # there, and hit
    maps[0, 1, 3, 3] = 0.8  # there, and missed
    maps[0, 2, 0, 0] = 0.2  # absent, and rejected
    maps[0, 3, 0, 0] = 0.7  # absent, and not rejected
    masks = torch.stack([CORNER[0], CORNER[0], ~CORNER[0] & CORNER[0], torch.zeros(4, 4, dtype=torch.bool)]).unsqueeze(
        0
    )
    assert recall_aware_pointing(maps, masks, 0.5).item() == 0.5
    assert recall_aware_pointing(maps, masks, 0.75).item() == 0.75
    assert recall_aware_pointing(maps, masks, 2.0).item() == 0.5, "rejecting all is right for the absent classes only"


def test_energy_is_the_share_of_the_map_on_the_object():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3, 1
    assert energy_pointing_game(maps, CORNER.expand(2, 4, 4)).tolist() == [0.75, 0]


def test_insertion_and_deletion_of_a_network_that_looks_at_four_pixels():
    x, good, bad = torch.ones(1, 1, 4, 4), CORNER.float(), 1 - CORNER.float()
    logits = torch.tensor([10.0 * min(step, 4) for step in range(17)])
    on = logits.sigmoid()
    inserted = insertion(Corner(), x, good, 1, steps=16, fill="zero")
    torch.testing.assert_close(inserted.values[0], on)
    torch.testing.assert_close(inserted.auc[0], (on[1:] + on[:-1]).sum() / 32)
    torch.testing.assert_close(inserted.shares, torch.linspace(0, 1, 17))
    removed = deletion(Corner(), x, good, 1, steps=16, fill="zero")
    torch.testing.assert_close(removed.values[0], (40 - logits).sigmoid())
    assert deletion(Corner(), x, bad, 1, steps=16, fill="zero").auc > removed.auc + 0.3
    assert insertion(Corner(), x, bad, 1, steps=16, fill="zero").auc < inserted.auc - 0.3
    torch.testing.assert_close(removed.values, deletion(Corner(), x, 5 * good + 1, 1, steps=16, fill="zero").values)
    small = insertion(Corner(), x, good, 1, steps=16, fill="zero", batch_size=3)
    torch.testing.assert_close(small.values, inserted.values)


def test_targets_of_curves():
    x, maps = torch.rand(3, 1, 4, 4), torch.rand(3, 4, 4)
    predicted = deletion(Corner(), x, maps, steps=4)
    assert torch.equal(predicted.values, deletion(Corner(), x, maps, torch.tensor([1, 1, 1]), steps=4).values)
    other = deletion(Corner(), x, maps, 0, steps=4)
    torch.testing.assert_close(other.values, 1 - predicted.values)
    raw = deletion(Corner(), x, maps, lambda output: output[:, 1], steps=4)
    torch.testing.assert_close(raw.values.sigmoid(), predicted.values)
    one_logit = nn.Sequential(Corner(), nn.Linear(2, 1, bias=False))
    one_logit[1].weight.data = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(deletion(one_logit, x, maps, 1, steps=4).values, predicted.values)
    torch.testing.assert_close(deletion(one_logit, x, maps, 0, steps=4).values, other.values)
    torch.testing.assert_close(deletion(Corner().forward, x, maps, steps=4).values, predicted.values)


def test_what_stands_in_for_removed_pixels():
    x = torch.rand(2, 3, 20, 20)
    assert torch.equal(filled(x, "zero"), torch.zeros_like(x))
    torch.testing.assert_close(filled(x, "mean"), x.mean((2, 3), keepdim=True).expand_as(x))
    blurred = filled(x, "blur")
    assert blurred.var() < 0.1 * x.var()
    torch.testing.assert_close(blurred.mean((2, 3)), x.mean((2, 3)), atol=0.05, rtol=0)
    assert filled(x, blurred) is blurred


def test_confidence_of_masked_images():
    x, maps = torch.full((2, 1, 4, 4), 0.1), torch.stack([CORNER[0].float(), 1 - CORNER[0].float()])
    whole, masked = confidence_change(Corner(), x, maps, 1)
    sure = torch.tensor(4.0).sigmoid()
    torch.testing.assert_close(whole, sure.expand(2))
    torch.testing.assert_close(masked, torch.tensor([sure, 0.5]))
    torch.testing.assert_close(average_drop(Corner(), x, maps, 1), torch.tensor([0, (sure - 0.5) / sure]))
    assert increase_in_confidence(Corner(), x, maps, 1).tolist() == [0, 0]
    assert increase_in_confidence(Corner(), x, maps, 0).tolist() == [0, 1]


def test_occlusion_map_is_the_fall_of_the_score():
    x = torch.rand(2, 1, 4, 4)
    drops = occlusion_map(Corner(), x, 1, patch=2, stride=1, fill=0.25, batch_size=5)
    for r in range(3):
        for c in range(3):
            covered = x.clone()
            covered[:, :, r : r + 2, c : c + 2] = 0.25
            expected = (Corner()(x) - Corner()(covered))[:, 1]
            torch.testing.assert_close(drops[:, r, c], expected)
    assert torch.equal(occlusion_map(Corner(), x, 1, 2, 1, torch.tensor([0.25])), drops)
    assert torch.equal(occlusion_map(Corner(), x, lambda output: output[:, 1], 2, 1, 0.25), drops)


def test_faithfulness_is_the_rank_correlation_of_pooled_maps():
    x = torch.ones(2, 1, 4, 4)
    maps = torch.stack([CORNER[0].float(), 1 - CORNER[0].float()])
    torch.testing.assert_close(occlusion_faithfulness(Corner(), x, 1, maps, 2, 1), torch.tensor([1.0, -1.0]))
    assert occlusion_faithfulness(Corner(), x, 1, torch.ones(2, 4, 4), 2, 1).tolist() == [0, 0]


def test_rank_correlation_is_that_of_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 5, (2, 4, 30))  # with ties
    expected = [spearmanr(p, q).statistic for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(
        rank_correlation(torch.from_numpy(a), torch.from_numpy(b)), torch.tensor(expected).float()
    )


def test_networks_are_left_as_they_were():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).train()
    mean = network[1].running_mean.clone()
    insertion(network, torch.rand(2, 1, 4, 4), torch.rand(2, 4, 4), steps=2)
    occlusion_map(network, torch.rand(2, 1, 4, 4), 1, 2, 2)
    assert all(part.training for part in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert torch.equal(network[1].running_mean, mean)


@pytest.mark.bare
def test_bad_input():
    x, maps = torch.rand(2, 1, 4, 4), torch.rand(2, 4, 4)
    for call, message in (
        (lambda: deletion(Corner(), x, maps[:, :2]), r"maps must be \(2, 4, 4\) for x \(2, 1, 4, 4\), got \(2, 2, 4\)"),
        (lambda: deletion(Corner(), x, maps, steps=0), "steps must be at least 1, got 0"),
        (lambda: insertion(Corner(), x, maps, fill="noise"), "'blur', 'mean', 'zero' or a tensor, got 'noise'"),
        (lambda: insertion(Corner(), x, maps, fill=x[:1]), r"the shape of x, \(2, 1, 4, 4\), got \(1, 1, 4, 4\)"),
        (lambda: deletion(Corner(), x, maps, torch.zeros(2, 2, dtype=torch.long)), "one class per image"),
        (lambda: deletion(Corner(), x, maps, 2), r"from 0 to 1, got \[2\]"),
        (lambda: boxes_from_map(maps, 0.0), r"frac must be in \(0, 1\], got 0.0"),
        (lambda: boxes_from_map(maps, component="first"), "'largest' or 'all', got 'first'"),
        (lambda: boxes_from_map(maps[0]), r"maps must be \(N, H, W\), got shape \(4, 4\)"),
        (lambda: pointing_game(maps, CORNER), r"both be \(N, H, W\), got \(2, 4, 4\) and \(1, 4, 4\)"),
        (lambda: energy_pointing_game(maps, CORNER), r"both be \(N, H, W\), got \(2, 4, 4\) and \(1, 4, 4\)"),
        (lambda: occlusion_map(Corner(), x, 1, 5, 1), r"patch must fit into \(4, 4\)"),
        (lambda: occlusion_map(Corner(), x, 1, 2, 0), "stride be positive, got 2 and 0"),
        (lambda: occlusion_faithfulness(Corner(), x, 1, maps[:1], 2, 1), r"maps must be \(2, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_callable_that_knows_each_sample_is_followed_in_their_order():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 4))
    x, maps, labels = torch.rand(3, 3, 8, 8), torch.rand(3, 8, 8), torch.tensor([2, 0, 3])

    def each(output):
        return output.softmax(1)[torch.arange(3), labels]

    for measure in (insertion, deletion):
        by_class = measure(model, x, maps, labels, steps=5, batch_size=4)
        torch.testing.assert_close(measure(model, x, maps, each, steps=5, batch_size=4), by_class)
    expected = occlusion_map(model, x, labels, 4, 2, batch_size=5)
    found = occlusion_map(model, x, lambda output: output[torch.arange(3), labels], 4, 2, batch_size=5)
    torch.testing.assert_close(found, expected)


@pytest.mark.bare
def test_a_dict_of_logits_is_named():
    class Dict(torch.nn.Module):
        def forward(self, x):
            return {"logits": x.mean((2, 3))}

    with pytest.raises(TypeError, match="the model returned a dict with logits"):
        deletion(Dict(), torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8), 1)


def test_rank_correlation_takes_half_precision():
    a = torch.rand(2, 6, 6)
    assert rank_correlation(a.bfloat16(), a).min() > 0.99
