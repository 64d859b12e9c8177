"""Controls, shuffled networks, and the order of maps."""

import pytest
import torch
from torch import nn

from classact.explain.metrics import deletion, insertion
from classact.explain.sanity import (
    CONTROLS,
    control_maps,
    randomization_similarity,
    shuffled_copies,
    similarity,
    trust,
)


class Corner(nn.Module):
    """Probability grows with the brightness of the upper left quarter."""

    def forward(self, x):
        bright = x[:, :, : x.shape[2] // 2, : x.shape[3] // 2].mean((1, 2, 3))
        return torch.stack([6 * bright, torch.full_like(bright, 3.0)], 1)


@pytest.fixture
def images():
    x = torch.zeros(2, 3, 16, 16)
    x[:, :, :8, :8] = 1
    return x + 0.01 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_are_maps_in_the_unit_interval(images, kind):
    one = control_maps(images, kind)
    assert one.shape == (2, 16, 16)
    assert 0 <= one.min() <= one.max() <= 1
    assert torch.equal(one, control_maps(images, kind))


def test_controls_are_what_they_are_called(images):
    assert (control_maps(images, "uniform") == 1).all()
    centre = control_maps(images, "gaussian")
    assert centre[0, 7:9, 7:9].min() > 0.9 > 0.2 > centre[0, 0, 0]
    noise = control_maps(images, "random")
    assert not torch.equal(noise[0], noise[1])
    edges = control_maps(images, "edges")[0]
    assert edges[7:9, 2:6].mean() > 5 * edges[12:, 12:].mean()
    with pytest.raises(ValueError, match="kind must be one of uniform, gaussian, random, edges, got 'ones'"):
        control_maps(images, "ones")


def test_a_map_of_ones_is_no_better_than_chance(images):
    """Its equal values go in a random order: not in reading order, which would begin where this network looks."""
    right = torch.zeros(2, 16, 16)
    right[:, :8, :8] = 1
    found = {name: trust(Corner(), images, one, 0) for name, one in (("right", right), ("ones", torch.ones(2, 16, 16)))}
    assert (found["right"].gain["mean"] > 0.4).all()
    for fill in ("blur", "mean"):  # a blur leaves this network most of its evidence
        assert (found["ones"].gain[fill].abs() < found["right"].gain[fill] / 3).all()


def test_curves_of_a_known_network(images):
    right = torch.zeros(2, 16, 16)
    right[:, :8, :8] = 1
    curve = deletion(Corner(), images, right, 0, steps=4, fill="zero")
    assert curve.values.shape == (2, 5)
    assert curve.values[0, 0] > 0.94
    torch.testing.assert_close(
        curve.values[0, 1:], torch.full((4,), torch.tensor(-3.0).sigmoid().item()), atol=1e-3, rtol=0
    )
    grown = insertion(Corner(), images, right, 0, steps=4, fill="zero")
    assert (grown.values[:, 1:] > 0.94).all()
    assert (grown.auc > curve.auc).all()


def test_shuffled_copies_keep_values_and_leave_the_network(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copies = shuffled_copies(model, stages=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weights = [copy[3].weight for copy in copies]
    assert not torch.equal(weights[0], model[3].weight)
    assert torch.equal(weights[0].flatten().sort().values, model[3].weight.flatten().sort().values)
    assert torch.equal(copies[0][0].weight, model[0].weight), "from the top down"
    assert not torch.equal(copies[2][0].weight, model[0].weight)
    assert torch.equal(copies[2][3].weight, weights[0]), "cumulatively"
    with pytest.raises(ValueError, match="stages must be at least 1"):
        shuffled_copies(model, 0)


def test_an_edge_detector_survives_the_shuffling_and_a_gradient_does_not():
    from classact.explain import input_gradient

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    x = torch.rand(2, 3, 24, 24)
    model(x)
    edges = randomization_similarity(lambda _, x, __: control_maps(x, "edges"), model, x, 0)
    assert edges.shape == (3, 2)
    assert edges.min() > 0.999
    gradient = randomization_similarity(lambda m, x, t: input_gradient(m, x, t).abs().amax(1), model, x, 0)
    assert gradient[-1].abs().max() < 0.8


def test_similarity_is_a_rank_correlation():
    a = torch.rand(3, 8, 8)
    torch.testing.assert_close(similarity(a, a**3), torch.ones(3))
    torch.testing.assert_close(similarity(a, 1 - a), -torch.ones(3))
    assert similarity(a, torch.ones(3, 8, 8)).tolist() == [0, 0, 0]
