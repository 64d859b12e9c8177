import copy

import pytest
import torch
from torch.nn import functional as F

import classact
import classact.rules
from classact.rules.feedback_alignment import (
    DirectFeedbackAlignment,
    FAConv2d,
    FALinear,
    FeedbackAlignment,
    LayeredNetwork,
    feedback_conv2d,
    feedback_linear,
    fit_backprop,
    fit_dfa,
    fit_fa,
    fit_readout,
    layout,
)

SHAPES = [((6,), {"hidden": (8, 7)}), ((2, 6, 6), {"hidden": (3, 4), "kind": "cnn"}), ((2, 6, 6), {"hidden": (8, 7)})]


def data(n=60, shape=(6,), classes=3, seed=0):
    """Gaussian clusters, one per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(n, *shape, generator=generator), y


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.forward_parameters()]


@pytest.mark.parametrize(("shape", "settings"), SHAPES)
def test_feedback_by_the_weights_themselves_is_back_propagation(shape, settings):
    x, y = data(20, shape)
    model = FeedbackAlignment.for_data(shape, 3, **settings)
    plain = LayeredNetwork.for_data(shape, 3, **settings)
    plain.load_state_dict(model.state_dict(), strict=False)
    wanted = gradients(plain, [F.cross_entropy(plain(x), y)])
    torch.testing.assert_close(model(x), plain(x), atol=0, rtol=0)
    other = gradients(model, [F.cross_entropy(model(x), y)])
    for layer in model.layers:
        layer.feedback.copy_(layer.weight)
    for mine, random, theirs in zip(gradients(model, [F.cross_entropy(model(x), y)]), other, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
        last = theirs.shape == wanted[-1].shape
        assert last or not torch.allclose(random, theirs, rtol=0.1)  # only the last layer needs no feedback


def test_gradients_of_feedback_alignment_by_hand():
    x, y = data(20)
    model = FeedbackAlignment.for_data((6,), 3, hidden=(8, 7), act="tanh")
    found = gradients(model, [F.cross_entropy(model(x), y)])
    _, h1, h2, logits = model.forward_states(x)
    e = (logits.softmax(1) - torch.eye(3)[y]) / 20
    d2 = (e @ model.layers[2].feedback) * (1 - h2.square())
    d1 = (d2 @ model.layers[1].feedback) * (1 - h1.square())
    for grad, wanted in zip(found, (d1.T @ x, d2.T @ h1, e.T @ h2), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-4)


def test_direct_feedback_through_one_hidden_layer_is_feedback_alignment():
    x, y = data(20)
    one = FeedbackAlignment.for_data((6,), 3, hidden=(8,))
    direct = DirectFeedbackAlignment.for_data((6,), 3, hidden=(8,))
    direct.load_state_dict(one.state_dict(), strict=False)
    direct.feedback_1.copy_(one.layers[1].feedback)
    expected = gradients(one, [F.cross_entropy(one(x), y)])
    for mine, theirs in zip(gradients(direct, direct.losses(x, y)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_direct_feedback_by_the_product_of_all_weights_is_back_propagation_of_a_linear_network():
    class Linear(DirectFeedbackAlignment):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.act = lambda h: h

    x, y = data(20)
    model = Linear.for_data((6,), 3, hidden=(8, 7))
    w2, w3 = model.layers[1].weight.data, model.layers[2].weight.data
    model.feedback_1.copy_(w3 @ w2)
    model.feedback_2.copy_(w3)
    expected = gradients(model, [F.cross_entropy(model(x), y)])
    for mine, theirs in zip(gradients(model, model.losses(x, y)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_direct_feedback_of_a_layer_is_its_own_only():
    x, y = data(20, (2, 6, 6))
    model = DirectFeedbackAlignment.for_data((2, 6, 6), 3, hidden=(3, 4, 5), kind="cnn")
    groups = [list(layer.parameters()) for layer in model.layers]
    for number, loss in zip((3, 0, 1, 2), model.losses(x, y), strict=True):
        model.zero_grad()
        loss.backward()
        assert [group[0].grad is not None for group in groups] == [i == number for i in range(4)]


def test_gradients_of_the_functions_against_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: feedback_linear(x, weight, b, weight.detach()), (x, bias))
    assert torch.autograd.gradcheck(
        lambda w, b: feedback_linear(x, w, b, weight.detach()), (weight, bias), check_undefined_grad=False
    )
    image = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def conv(image, kernel, bias):
        return feedback_conv2d(image, kernel, bias, kernel.detach(), stride=2, padding=1)

    assert torch.autograd.gradcheck(lambda i, b: conv(i, kernel, b), (image, bias))
    assert torch.autograd.gradcheck(
        lambda k, b: feedback_conv2d(image, k, b, kernel.detach(), 2, 1), (kernel, bias), check_undefined_grad=False
    )
    # three dimensions and more are rows
    batch = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(feedback_linear(batch, weight, bias, weight), F.linear(batch, weight, bias))


@pytest.mark.bare
@pytest.mark.parametrize(("kind", "fit"), [(FeedbackAlignment, fit_fa), (DirectFeedbackAlignment, fit_dfa)])
@pytest.mark.parametrize(("shape", "settings"), SHAPES[:2])
def test_both_learn_and_equal_seeds_give_equal_results(kind, fit, shape, settings):
    x, y = data(60, shape)
    state = torch.get_rng_state()
    one, other = (kind.for_data(shape, 3, seed=3, **settings) for _ in range(2))
    buffers = copy.deepcopy(list(one.buffers()))
    for model in (one, other):
        fit(model, x, y, epochs=12, lr=0.3, batch_size=20, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), buffers, strict=True)) and buffers
    assert (one.predict_proba(x).argmax(1) == y).float().mean() > 0.85


def test_feedback_alignment_aligns_weights_with_their_feedback():
    # Lillicrap et al.: learning by random feedback turns the weights towards that feedback
    x, y = data(300, classes=3)
    model = FeedbackAlignment.for_data((6,), 3, hidden=(40,))

    def cosine():
        return F.cosine_similarity(model.layers[1].weight.flatten(), model.layers[1].feedback.flatten(), 0).item()

    for layer in model.layers:
        layer.weight.data *= 0.1
    before = cosine()
    fit_fa(model, x, y, epochs=20, lr=0.1, batch_size=50)
    assert cosine() > abs(before) + 0.2


@pytest.mark.parametrize("kind", [LayeredNetwork, FeedbackAlignment, DirectFeedbackAlignment])
def test_networks_survive_saving(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(classact.rules, kind.__name__, kind, raising=False)
    monkeypatch.setattr(classact.rules, "__all__", [kind.__name__])
    model = kind.for_data((2, 6, 6), 3, hidden=(3, 4), kind="cnn")
    classact.save(model, tmp_path / "net")
    twin = classact.load(tmp_path / "net")
    x, y = data(4, (2, 6, 6))
    torch.testing.assert_close(twin(x), model(x))
    losses = [m.losses(x, y) if kind is DirectFeedbackAlignment else [F.cross_entropy(m(x), y)] for m in (model, twin)]
    for a, b in zip(gradients(model, losses[0]), gradients(twin, losses[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_predict_proba_leaves_the_mode_and_the_global_seed():
    model = LayeredNetwork.for_data((6,), 3, hidden=(4,)).train()
    state = torch.get_rng_state()
    model.predict_proba(data()[0], batch_size=7)
    assert model.training and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="x: expected shape"):
        model.predict_proba(torch.zeros(2, 5))
    assert model.training


def test_bfloat16():
    for shape, settings in SHAPES[:2]:
        x, y = data(20, shape)
        model = FeedbackAlignment.for_data(shape, 3, **settings)
        full = gradients(model, [F.cross_entropy(model(x), y)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        for low, high in zip(gradients(model, [loss]), full, strict=True):
            assert low.dtype == torch.float32
            torch.testing.assert_close(low, high, atol=0.03, rtol=0.1)


@pytest.mark.bare
def test_layers_compile_and_export():
    for layer, x in ((FALinear(4, 3), torch.randn(5, 4)), (FAConv2d(2, 3, 3, 2, 1), torch.randn(2, 2, 6, 6))):
        x.requires_grad_()
        wanted = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight, layer.bias))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x).square().sum(), (x, layer.weight, layer.bias)), wanted
        )
        torch.compiler.reset()
    for kind in (LayeredNetwork, DirectFeedbackAlignment, FeedbackAlignment):
        model, x = kind.for_data((6,), 3, hidden=(4,)), torch.randn(5, 6)
        with torch.no_grad():
            torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layout((3, 4), 3, (4,), "mlp"), r"shape: expected \(D,\) or \(C, H, W\), got \(3, 4\)"),
        (lambda: layout((3,), 1, (4,), "mlp"), "classes: expected at least 2, got 1"),
        (lambda: layout((3,), 3, (), "mlp"), "hidden: expected at least one width"),
        (lambda: layout((3,), 3, (4,), "rnn"), "kind: expected 'mlp' or 'cnn', got 'rnn'"),
        (lambda: LayeredNetwork((3,), 3, act="gelu"), "act: expected one of elu"),
        (lambda: LayeredNetwork((1, 4, 4), 3, kernel=2), "kernel: expected an odd number"),
        (lambda: FALinear(4, 3)(torch.zeros(4)), "x: expected shape"),
        (
            lambda: feedback_linear(torch.zeros(1, 4), torch.zeros(3, 4), None, torch.zeros(4, 3)),
            r"feedback: expected the weight's shape \(3, 4\), got \(4, 3\)",
        ),
        (
            lambda: feedback_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 3, 3), None, torch.zeros(1, 2, 3, 3)),
            "feedback: expected the weight's shape",
        ),
        (
            lambda: fit_backprop(FeedbackAlignment.for_data((6,), 3), *data()),
            "model: expected a network that passes its own gradients on",
        ),
        (lambda: fit_readout(LayeredNetwork.for_data((6,), 2), *data()), "y: expected classes from 0 to 1"),
        (lambda: fit_fa(FeedbackAlignment.for_data((6,), 3), *data(), batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
