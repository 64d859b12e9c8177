import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
import classact.rules
from classact.rules.feedback_alignment import fit_readout
from classact.rules.target_propagation import DifferenceTargetPropagation, fit_dtp


def data(n=60, shape=(6,), classes=3, seed=0):
    """Gaussian clusters, one per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(n, *shape, generator=generator), y


def square(**settings):
    """Hidden layers of one width, in double precision."""
    return DifferenceTargetPropagation.for_data((6,), 3, hidden=(6, 6, 6), **settings).double()


def inverse_of_elu(h):
    return torch.where(h > 0, h, torch.log1p(h.clamp(max=0)))


class Exact(nn.Module):
    """A dual layer whose way down is the exact inverse."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.F = layer.F

    def forward(self, x, local=False, act=True):
        return self.layer(x, local, act)

    def reverse(self, c, local=False, act=True):
        return torch.linalg.solve(self.F.weight, inverse_of_elu(c).T).T


def with_exact_inverses(**settings):
    model = square(**settings)
    for stage in model._stages[2:-1]:
        nn.init.orthogonal_(stage[0].F.weight)
        stage[0] = Exact(stage[0])
    return model


def test_with_exact_inverses_the_correction_vanishes():
    model, (x, y) = with_exact_inverses(step=0.01), data()
    states = model.forward_states(x.double())
    targets = model.targets(states, y)
    for i in (3, 2):
        assert (states[i - 1] - model.feedback_stage(i, states[i])).abs().max() < 1e-10
        torch.testing.assert_close(targets[i - 2], model.feedback_stage(i, targets[i - 1]), atol=1e-10, rtol=0)
        # so that the layer hits its own target when the one below has been hit
        torch.testing.assert_close(model.forward_stage(i, targets[i - 2]), targets[i - 1], atol=1e-10, rtol=0)


def test_with_exact_inverses_a_small_step_has_the_gauss_newton_direction():
    model, (x, y) = with_exact_inverses(step=1e-6), data(8)
    states = [state.detach() for state in model.forward_states(x.double())]
    targets = model.targets(states, y)
    for n in range(8):
        move = targets[2][n] - states[3][n]
        for i in (3, 2):
            jacobian = torch.autograd.functional.jacobian(
                lambda a, i=i: model.forward_stage(i, a.unsqueeze(0))[0], states[i - 1][n]
            )
            move = torch.linalg.solve(jacobian, move)
            torch.testing.assert_close(targets[i - 2][n] - states[i - 1][n], move, atol=1e-10, rtol=1e-3)


def test_first_target_is_a_gradient_step():
    model, (x, y) = square(step=0.3), data()
    states = model.forward_states(x.double())
    top = states[3].detach().requires_grad_()
    slope = torch.autograd.grad(F.cross_entropy(model.forward_stage(4, top), y, reduction="sum"), top)[0]
    torch.testing.assert_close(model.targets(states, y)[-1], top.detach() - 0.3 * slope)


def test_gradient_of_the_top_hidden_layer_is_back_propagations():
    model, (x, y) = square(step=0.3), data()
    F.cross_entropy(model(x.double()), y).backward()
    expected = [p.grad.clone() for p in model.forward_parameters()]
    model.zero_grad()
    for loss in model.losses(x.double(), y):
        loss.backward()
    found = [p.grad for p in model.forward_parameters()]
    torch.testing.assert_close(found[3], expected[3])
    torch.testing.assert_close(found[2], 0.3 * expected[2])
    assert not torch.allclose(found[1], 0.3 * expected[1])


def test_orthogonal_linear_layers_with_their_inverses_give_back_propagation():
    model, (x, y) = square(step=0.3), data()
    for stage in model._stages[1:]:
        stage[0].act = lambda h: h
    for up, down in model.weights()[1:3]:
        nn.init.orthogonal_(up)
        down.data = up.data.T.clone()
    F.cross_entropy(model(x.double()), y).backward()
    expected = [p.grad.clone() for p in model.forward_parameters()]
    model.zero_grad()
    for loss in model.losses(x.double(), y):
        loss.backward()
    for p, wanted, factor in zip(model.forward_parameters(), expected, (0.3, 0.3, 0.3, 1.0), strict=True):
        torch.testing.assert_close(p.grad, factor * wanted)
    # perfect inverses have nothing to learn
    assert all(p.grad.abs().max() < 1e-12 for p in model.feedback_parameters()[1:3])


def test_losses_of_layers_and_inverses_reach_their_own_weights_only():
    model, (x, y) = square(), data()
    reached = []
    for loss in model.losses(x.double(), y):
        model.zero_grad()
        loss.backward()
        up, down = (
            [p.grad is not None for p in group] for group in (model.forward_parameters(), model.feedback_parameters())
        )
        reached.append((sum(up), up.index(True) + 1 if any(up) else None, down.index(True) + 1 if any(down) else None))
    assert reached == [(1, 4, None), (1, 1, None), (1, 2, None), (1, 3, None), (0, None, 2), (0, None, 3)]


@pytest.mark.bare
def test_inverses_learn_to_invert():
    x, y = data(200)
    model = DifferenceTargetPropagation.for_data((6,), 3, hidden=(8, 8, 8))
    states = model.forward_states(x)

    def error():
        torch.manual_seed(0)
        return sum(loss.item() for loss in model.inverse_losses([state.detach() for state in states]))

    before = error()
    fit_dtp(model, x, y, epochs=20, lr=1e-6, batch_size=50, feedback_lr=0.3)
    assert error() < 0.5 * before


@pytest.mark.bare
@pytest.mark.parametrize(
    ("shape", "settings"), [((6,), {"hidden": (8, 8, 8)}), ((1, 8, 8), {"hidden": (4, 6, 6), "kind": "cnn"})]
)
def test_it_learns_more_than_a_readout_and_equal_seeds_give_equal_results(shape, settings):
    x, y = data(60, shape)
    one, other = (DifferenceTargetPropagation.for_data(shape, 3, **settings) for _ in range(2))
    start = [p.clone() for p in one.forward_parameters()]
    state = torch.get_rng_state()
    for model in (one, other):
        fit_dtp(model, x, y, epochs=15, lr=0.3, batch_size=20, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(start, one.forward_parameters(), strict=True))
    readout = fit_readout(
        DifferenceTargetPropagation.for_data(shape, 3, **settings), x, y, epochs=15, lr=0.3, batch_size=20
    )
    losses = [F.nll_loss(model.predict_proba(x).log(), y) for model in (one, readout)]
    assert losses[0] < losses[1] and (one.predict_proba(x).argmax(1) == y).float().mean() > 0.85


def test_network_survives_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(classact.rules, "DifferenceTargetPropagation", DifferenceTargetPropagation, raising=False)
    monkeypatch.setattr(classact.rules, "__all__", ["DifferenceTargetPropagation"])
    model, (x, _) = DifferenceTargetPropagation.for_data((6,), 3, hidden=(4, 4), step=0.5, noise=0.2), data()
    classact.save(model, tmp_path / "net")
    twin = classact.load(tmp_path / "net")
    torch.testing.assert_close(twin(x), model(x))
    assert (twin.step, twin.noise) == (0.5, 0.2)


@pytest.mark.bare
def test_bad_settings():
    with pytest.raises(ValueError, match="step, noise: expected step > 0 and noise >= 0, got 0.0 and 0.1"):
        square(step=0.0)
    with pytest.raises(ValueError, match="y: expected classes from 0 to 2"):
        fit_dtp(DifferenceTargetPropagation.for_data((6,), 3), data()[0], data()[1] - 1)
