import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.rules.ccl import (
    CCLLoss,
    CCLNetwork,
    DualAutoencoder,
    DualConv2d,
    DualFlatten,
    DualLinear,
    DualSequential,
    PairLoss,
    alignment,
    ccl_losses,
    default_loss,
    fit_ccl,
    linear_cka,
)
from classact.rules.feedback_alignment import fit_backprop, fit_readout, settle

REFERENCE = Path(__file__).parent / "data" / "ccl_reference.npz"
A = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
C = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
Y = torch.tensor([0, 2])


def data(n=60, shape=(6,), classes=3, seed=0):
    """Gaussian clusters, one per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(n, *shape, generator=generator), y


def mlp(**settings):
    return CCLNetwork.for_data((6,), 3, **{"hidden": (8, 7, 5), **settings})


def cnn(**settings):
    return CCLNetwork.for_data((1, 8, 8), 3, **{"hidden": (4, 6), "kind": "cnn", **settings})


def autoencoder(seed=0):
    torch.manual_seed(seed)
    return DualAutoencoder(1, (4, 6))


def sines(shape, phase):
    n = math.prod(shape)
    return (torch.sin(torch.arange(n, dtype=torch.float64) * 0.7 + phase) / math.sqrt(n / shape[0])).float().view(shape)


def of_the_authors(name):
    """The networks, inputs, losses and settings of make_ccl_reference.py."""
    if name == "mlp":
        layers = [DualLinear(6, 5), DualLinear(5, 5), DualLinear(5, 4)]
        return layers, sines((8, 6), 9) * 2, CCLLoss("gram", 0.5), {"lr": 1.0, "clip": 1.0}
    x = sines((8, 2, 8, 8), 9) * 9
    if name == "cnn":
        layers = [DualConv2d(2, 3), DualConv2d(3, 4), DualFlatten((4, 2, 2)), DualLinear(16, 4)]
        return layers, x, CCLLoss("cosine_gram", 1.0, 0.5, 0.9), {"lr": 1.0, "clip": 1.0}
    if name == "pool":
        layers = [
            DualConv2d(2, 3, mode="pool"),
            DualConv2d(3, 4, mode="pool"),
            DualFlatten((4, 2, 2)),
            DualLinear(16, 4),
        ]
        run = {"lr": 1.0, "momentum": 0.8, "weight_decay": 1e-6, "clip": 0.3, "centralise": True}
        return layers, x, CCLLoss("cosine_gram", 1.0, 0.5, 0.9), run
    run = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "clip": 0.2, "centralise": True}
    return DualAutoencoder(2, (3, 4)).layers, x, CCLLoss("ae", 1.0, 1.0), run


@pytest.mark.parametrize("name", ["mlp", "cnn", "pool", "ae"])
def test_losses_gradients_and_steps_are_those_of_the_authors_code(name):
    layers, x, loss, run = of_the_authors(name)
    model = DualSequential(*layers).train()
    for i, (up, down) in enumerate(model.weights()):
        up.data, down.data = sines(up.shape, i), sines(down.shape, i + 0.5)
    y = torch.tensor([0, 2, 1, 1, 3, 0, 2, 3])
    groups = [model.forward_parameters(), model.feedback_parameters()]
    clip, centralise = run.pop("clip"), run.pop("centralise", False)
    optimizer = torch.optim.SGD([p for group in groups for p in group], **run)
    with np.load(REFERENCE) as found:
        theirs = {key.removeprefix(f"{name}_"): value for key, value in found.items() if key.startswith(f"{name}_")}
    for number, value in enumerate(theirs["losses"]):
        states, target = model.forward_states(x, local=True), x if name == "ae" else torch.eye(4)
        if name == "pool":  # there too, so that some rows are sure of their class and filtered
            states[-1] = 40 * states[-1]
            assert 0 < loss.unsure(states[-1], y).sum() < len(y)
        total = loss(states, model.feedback_states(target), y)
        assert total.item() == pytest.approx(value, rel=1e-5)
        optimizer.zero_grad()
        total.backward()
        if number == 0:
            for k, group in enumerate(groups):
                for i, p in enumerate(group):
                    wanted = torch.from_numpy(theirs[f"grad_{k}_{i}"])
                    torch.testing.assert_close(p.grad, wanted, atol=1e-6 * max(1, wanted.abs().max()), rtol=1e-4)
        settle(groups, clip, centralise)
        optimizer.step()
    for k, group in enumerate(groups):
        for i, p in enumerate(group):
            torch.testing.assert_close(p.detach(), torch.from_numpy(theirs[f"weight_{k}_{i}"]), atol=2e-6, rtol=1e-4)


def test_gram_loss_by_hand():
    # A C^T = [[1, 2, 3], [0, 1, 1]], minus the one-hot rows: squares 0 + 4 + 9 + 0 + 1 + 0, over 6, times 64
    assert PairLoss("gram", 0.5)(A, C, Y).item() == pytest.approx(149.3333333, rel=1e-6)


def test_cosine_loss_by_hand():
    parts = [PairLoss("cosine_gram", 1.0, 0.0)(A, C, Y).item(), PairLoss("cosine_gram", 0.0, 1.0)(A, C, Y).item()]
    assert parts == pytest.approx([0.5152265, 0.4 + 0.2222222], rel=1e-5)
    assert parts[1] * 0.5 + parts[0] == pytest.approx(PairLoss("cosine_gram", 1.0, 0.5)(A, C, Y).item(), rel=1e-6)
    assert PairLoss("cosine_gram", 1.0, 0.5)(A, C, Y).item() == pytest.approx(0.8263376, rel=1e-5)


def test_cosine_loss_does_not_see_the_length_of_rows():
    torch.manual_seed(0)
    loss = PairLoss("cosine_gram", 1.0, 0.5)
    scaled = loss(A * torch.rand(2, 1) * 9, C * torch.rand(3, 1) * 9, Y)
    torch.testing.assert_close(scaled, loss(A, C, Y))


@pytest.mark.parametrize("make", [mlp, cnn, lambda: cnn(pool=True), autoencoder])
def test_no_gradient_crosses_a_layer_or_from_one_network_to_the_other_but_within_a_pair(make):
    model = make()
    x, y = data(20, (6,) if make is mlp else (1, 8, 8))
    loss = default_loss(model)
    target, y = (x, x) if isinstance(model, DualAutoencoder) else (torch.eye(3), y)
    up = [list(stage[0].F.parameters()) for stage in model._stages[1:]]
    down = [list(stage[0].B.parameters()) for stage in model._stages[1:]]
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # what starts at 0 has no gradient to show
    for i, part in enumerate(ccl_losses(model, loss, x, y)):
        model.zero_grad()
        part.backward()
        reached = {("F", j) for j, group in enumerate(up, 1) if group[0].grad is not None}
        reached |= {("B", j) for j, group in enumerate(down, 1) if group[0].grad is not None}
        assert reached == {("F", j) for j in (i,) if j} | {
            ("B", j) for j in (i + 1,) if j <= model.depth - (i == model.depth)
        }
        assert all(group[0].grad.any() for group in up + down if group[0].grad is not None)
    assert i == model.depth
    # the whole graph: perturbing other layers with states held fixed is the same as no gradient through states
    states, feedback = model.forward_states(x, local=True), model.feedback_states(target)
    for i, state in enumerate(states[1:], 1):
        others = [p for j, group in enumerate(up, 1) if j != i for p in group] + [p for group in down for p in group]
        assert all(g is None for g in torch.autograd.grad(state.sum(), others, allow_unused=True, retain_graph=True))
    for i, state in enumerate(feedback[:-1]):
        others = [p for j, group in enumerate(down, 1) if j != i + 1 for p in group] + [p for g in up for p in g]
        assert all(g is None for g in torch.autograd.grad(state.sum(), others, allow_unused=True, retain_graph=True))


def test_cross_entropy_trains_the_last_layer_only():
    model, (x, y) = mlp(), data()
    *_, top = ccl_losses(model, CCLLoss(), x, y)
    top.backward()
    assert [p.grad is not None for p in model.forward_parameters()] == [False, False, False, True]
    assert not any(p.grad is not None for p in model.feedback_parameters())


@pytest.mark.parametrize("make", [mlp, lambda: cnn(bias=True), autoencoder])
@pytest.mark.parametrize("confidence", [None, 0.5])
def test_gradients_pair_by_pair_are_those_of_the_sum(make, confidence):
    x, y = data(20, (6,) if make is mlp else (1, 8, 8))
    gradients = []
    for parallel in (True, False):
        model = make()
        loss = default_loss(model)
        if not isinstance(model, DualAutoencoder):
            loss.confidence = confidence
        for part in ccl_losses(model, loss, x, x if isinstance(model, DualAutoencoder) else y, parallel):
            part.backward()
        gradients.append([p.grad for p in [*model.forward_parameters(), *model.feedback_parameters()]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_pair_by_pair_needs_the_memory_of_one_layer():
    class Kept:
        """Bytes of activations held by all graphs, now and at most."""

        now = most = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Kept.now += tensor.nbytes
            Kept.most = max(Kept.most, Kept.now)

        def __del__(self):
            Kept.now -= self.tensor.nbytes

    def most(losses):
        Kept.now = Kept.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            for loss in losses():
                loss.backward()
        return Kept.most

    x, y = data(400, (20,))
    model = CCLNetwork.for_data((20,), 3, hidden=(20,) * 8)
    weights = sum(w.nbytes for pair in model.weights() for w in pair)
    alone = most(lambda: ccl_losses(model, CCLLoss(), x, y)) - weights
    together = most(lambda: ccl_losses(model, CCLLoss(), x, y, parallel_update=False)) - weights
    backprop = most(lambda: iter([F.cross_entropy(model(x), y)])) - weights
    assert alone < 0.5 * backprop < 0.5 * together


def test_feedback_sees_the_classes_only():
    model = mlp()
    feedback = model.feedback_states(torch.eye(3))
    assert [tuple(c.shape) for c in feedback] == [(3, 6), (3, 8), (3, 7), (3, 5), (3, 3)]
    assert torch.equal(feedback[-1], torch.eye(3))


def test_order_of_hidden_units_does_not_matter():
    model, (x, y) = mlp(), data()
    twin, loss = copy.deepcopy(model), CCLLoss()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    (first, second), (first_back, second_back) = ([pair[k] for pair in twin.weights()[:2]] for k in (0, 1))
    first.data, second.data = first[order], second[:, order]
    first_back.data, second_back.data = first_back[:, order], second_back[order]
    for one, other in zip(ccl_losses(model, loss, x, y), ccl_losses(twin, loss, x, y), strict=True):
        torch.testing.assert_close(one, other)


def test_sure_rows_teach_nothing_but_count():
    loss, y = CCLLoss("gram", 0.5, confidence=0.9), torch.tensor([0, 1, 2])
    logits = torch.tensor([[9.0, 0, 0], [0, 0, 0], [0, 9, 0]])  # sure and right; unsure; sure and wrong
    rows = torch.randn(3, 2, requires_grad=True)
    assert loss.unsure(logits, y).tolist() == [0, 1, 1]
    found = loss([rows, logits], [C, torch.eye(3)], y) - F.cross_entropy(logits, y)
    expected = PairLoss("gram", 0.5)(torch.cat([torch.zeros(1, 2), rows[1:]]), C, y)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert not rows.grad[0].any() and rows.grad[1:].any()


def test_autoencoder_losses_vanish_where_the_networks_agree():
    hidden, images = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 8, 8)
    assert CCLLoss("ae", 1.0, 1.0)([images, hidden, images], [images, hidden, images], Y).item() == 0
    # a shift and a scale of a channel are seen by the first term only
    loss = PairLoss("ae", 0.0, 1.0)
    assert loss(hidden, 3 * hidden + 2).item() == pytest.approx(0, abs=1e-10)
    shifted = PairLoss("ae", 1.0, 0.0)(hidden, hidden + 2)
    assert shifted.item() == pytest.approx(4 * 4, rel=1e-5)


def test_autoencoder_starts_as_the_paper_says():
    model = autoencoder()
    x = torch.randn(3, 1, 8, 8)
    assert not model(x).any() and not model.feedback_states(x)[0].any()
    up, down = ([pair[k].detach().flatten(1) for pair in model.weights()] for k in (0, 1))
    torch.testing.assert_close(up[0] @ up[0].T, torch.eye(4), atol=1e-5, rtol=0)
    assert up[2].norm() == pytest.approx(1e-3 * down[2].norm().item(), rel=0.5)
    assert down[1].norm() < 1e-2 < up[1].norm()
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.bare
def test_autoencoder_target_may_be_another_view():
    x, _ = data(40, (1, 8, 8))
    x = x.mean((2, 3), keepdim=True) + torch.linspace(-2, 2, 8).expand_as(x)
    model = fit_ccl(autoencoder(), x, x.flip(3), epochs=10, lr=0.03, batch_size=8)
    assert F.mse_loss(model(x), x.flip(3)) < 0.8 * x.var() < F.mse_loss(model(x), x)


def test_network_up_is_a_plain_network():
    model, (x, y) = mlp(), data()
    plain = nn.Sequential()
    for weight in model.forward_parameters():
        layer = nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight.data = weight.data.clone()
        plain.extend([layer, nn.ELU()])
    del plain[-1]
    before = [p.clone() for p in model.feedback_parameters()]
    fit_backprop(model, x, y, epochs=1, lr=0.3, batch_size=20, clip=0.05, seed=4)
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(plain.parameters(), 0.3)
    for rows in torch.randperm(60).split(20):
        optimizer.zero_grad()
        F.cross_entropy(plain(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
    for ours, theirs in zip(model.forward_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, model.feedback_parameters(), strict=True))


def test_readout_leaves_hidden_layers_as_they_are():
    model, (x, y) = mlp(), data()
    before = copy.deepcopy(model.forward_parameters())
    fit_readout(model, x, y, epochs=2)
    assert [torch.equal(a, b) for a, b in zip(before, model.forward_parameters(), strict=True)] == [True] * 3 + [False]


def test_centralised_gradients_sum_to_zero_in_every_row():
    model, (x, y) = cnn(), data(20, (1, 8, 8))
    CCLLoss("cosine_gram")(model.forward_states(x, local=True), model.feedback_states(torch.eye(3)), y).backward()
    groups = [model.forward_parameters(), model.feedback_parameters()]
    settle(groups, 1e-3, centralise=True)
    for group in groups:
        assert sum(p.grad.square().sum() for p in group if p.grad is not None).sqrt() <= 1e-3 * (1 + 1e-5)
        for p in group:
            if p.ndim > 1:
                torch.testing.assert_close(p.grad.flatten(1).sum(1), torch.zeros(len(p)), atol=1e-6, rtol=0)


@pytest.mark.bare
@pytest.mark.parametrize("settings", [{}, {"kind": "cnn", "kernel": 5}, {"kind": "cnn", "pool": True}])
def test_fit_learns_and_equal_seeds_give_equal_results(settings):
    x, y = data(60, (1, 8, 8))
    state = torch.get_rng_state()
    one, other = (CCLNetwork.for_data((1, 8, 8), 3, hidden=(12, 16), **settings) for _ in range(2))
    for model in (one, other):
        fit_ccl(model, x, y, epochs=8, lr=0.3, batch_size=20, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not one.training and all(p.grad is None for p in one.parameters())
    assert (one.predict_proba(x).argmax(1) == y).float().mean() > 0.85
    torch.testing.assert_close(one.predict_proba(x).sum(1), torch.ones(60))


@pytest.mark.bare
def test_warmup_scales_losses_and_the_cosine_ends_low():
    x, y = data()
    run = {"epochs": 1, "batch_size": 60, "clip": None}
    warm, low = fit_ccl(mlp(), x, y, lr=0.1, warmup=4, **run), fit_ccl(mlp(), x, y, lr=0.025, **run)
    for one, other in zip(warm.parameters(), low.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    # the rate of the second of two epochs is half way between 0.1 and 0.001
    falling = fit_ccl(mlp(), x, y, lr=0.1, cosine=True, **{**run, "epochs": 2})
    steps = fit_ccl(fit_ccl(mlp(), x, y, lr=0.1, **run), x, y, lr=0.0505, **run)
    for one, other in zip(falling.parameters(), steps.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_alignment_of_networks_that_mirror_each_other():
    x, y = data(30)
    model = DualSequential(DualLinear(6, 8, "relu"), DualLinear(8, 8, "relu"), DualLinear(8, 3))
    for up, down in model.weights():
        down.data = up.data.T.clone()
    model.train()
    found = alignment(model, [(x[:10], y[:10]), (x[10:], y[10:])])
    assert model.training and found.cka.shape == (2, 2)
    torch.testing.assert_close(found.cosine, torch.ones(3))
    c = model.feedback_states(torch.eye(3))
    a = model.forward_states(x)
    assert found.cka[0, 1].item() == pytest.approx(linear_cka(a[1].detach(), c[2][y].detach()), rel=1e-5)


def test_cosine_of_convolutions_is_that_of_the_transposed_convolution():
    layer = DualConv2d(2, 3, mode="same")
    model = DualSequential(layer, DualConv2d(3, 2, mode="same"))
    layer.B.weight.data = layer.F.weight.data.transpose(0, 1).flip((2, 3))
    x = torch.randn(5, 2, 4, 4)
    c = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close((layer.F(x) * c).sum(), (x * layer.B(c)).sum(), atol=1e-4, rtol=1e-4)
    assert alignment(model, [x]).cosine[0].item() == pytest.approx(1, abs=1e-5)


def test_cka_is_hsic_by_hand():
    torch.manual_seed(0)
    a, c = torch.randn(12, 4).double(), torch.randn(12, 20).double()
    centre = torch.eye(12).double() - 1 / 12
    k, l = (centre @ (m @ m.T) @ centre for m in (a, c))  # noqa: E741 - the paper's letters
    expected = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
    assert linear_cka(a, c) == pytest.approx(expected.item(), rel=1e-10)
    assert linear_cka(a, 2 * a @ torch.linalg.qr(torch.randn(4, 4).double())[0]) == pytest.approx(1)


def test_alignment_restores_the_mode_on_errors():
    model = mlp().train()
    with pytest.raises(ValueError, match="x: expected shape"):
        alignment(model, [(torch.randn(2, 5), Y)])
    assert model.training


@pytest.mark.parametrize("make", [mlp, lambda: cnn(pool=True), autoencoder])
def test_networks_survive_saving(make, tmp_path, monkeypatch):
    model = make()
    x = torch.randn(4, *((6,) if make is mlp else (1, 8, 8)))
    monkeypatch.setattr(sys.modules["classact.rules"], type(model).__name__, type(model), raising=False)
    monkeypatch.setattr(sys.modules["classact.rules"], "__all__", [type(model).__name__])
    classact.save(model, tmp_path / "net")
    torch.testing.assert_close(classact.load(tmp_path / "net")(x), model.eval()(x))


def test_bfloat16():
    for model, loss in ((mlp(), CCLLoss()), (cnn(), CCLLoss("cosine_gram", 1.0, 0.5))):
        x, y = data(20, model.shape)
        with torch.autocast("cpu", torch.bfloat16):
            low = loss(model.forward_states(x, local=True), model.feedback_states(torch.eye(3)), y)
        low.backward()
        full = loss(model.forward_states(x, local=True), model.feedback_states(torch.eye(3)), y)
        torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)
        assert all(p.grad.isfinite().all() for p in model.forward_parameters())


@pytest.mark.bare
def test_step_compiles_and_network_exports():
    model, loss, (x, y) = mlp(hidden=(4,)), CCLLoss("cosine_gram", 1.0, 0.5, 0.9), data(8)

    def total(x, y):
        return loss(model.forward_states(x, local=True), model.feedback_states(torch.eye(3)), y)

    torch.testing.assert_close(torch.compile(total, backend="aot_eager", fullgraph=True)(x, y), total(x, y))
    torch.compiler.reset()
    model, (x, _) = cnn(), data(8, (1, 8, 8))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_lightning_modules_step_as_fit_does():
    from classact.rules.ccl_lit import CCLClassifier
    from classact.training import fit

    x, y = data(48)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=48)
    one, other = mlp(), mlp()
    module = CCLClassifier(one)
    history = fit(module, loader, loader, epochs=5, seed=0)
    assert history.steps == 5 and history.curves["val_loss"][-1] < history.curves["val_loss"][0]
    fit_ccl(other, x, y, epochs=5, batch_size=48)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_lightning_autoencoder_takes_images_with_another_view_or_a_label():
    from classact.rules.ccl_lit import CCLAutoencoder

    images, y = data(16, (1, 8, 8))
    for batch in (images, (images, y), (images, images)):
        x, target = CCLAutoencoder(autoencoder()).split(batch)
        assert x is images and target is images
    other = images.flip(3)
    for method in ("bp", "readout"):
        module = CCLAutoencoder(autoencoder(), method)
        (loss,) = module.losses(*module.split((images, other)))
        torch.testing.assert_close(loss, images.square().mean())  # it starts with an answer of 0
    model, module = autoencoder(), CCLAutoencoder(autoencoder())
    expected = default_loss(model)(model.forward_states(images, local=True), model.feedback_states(other), y)
    torch.testing.assert_close(sum(module.losses(images, other)), expected)
    assert module.validation_loss(images, other).item() == pytest.approx(images.square().mean().item(), rel=1e-5)


def test_lightning_module_has_a_step_for_every_rule():
    from classact.rules.ccl_lit import NEEDS, CCLClassifier
    from classact.rules.feedback_alignment import DirectFeedbackAlignment, FeedbackAlignment, LayeredNetwork
    from classact.rules.target_propagation import DifferenceTargetPropagation

    x, y = data(30)
    kinds = {"fa": FeedbackAlignment, "dfa": DirectFeedbackAlignment, "dtp": DifferenceTargetPropagation}
    for method in NEEDS:
        kind = kinds.get(method, CCLNetwork if method == "ccl" else LayeredNetwork)
        module = CCLClassifier(kind.for_data((6,), 3, hidden=(8, 8)), method, lr=0.1)
        for loss in module.losses(x, y):
            loss.backward()
        assert len(module.configure_optimizers().param_groups) == 1 + (method in ("ccl", "dtp"))
        trained = [p for p in module.model.forward_parameters() if p.grad is not None]
        assert len(trained) == (1 if method == "readout" else 3)
    with pytest.raises(ValueError, match="model: expected a FeedbackAlignment for 'fa', got CCLNetwork"):
        CCLClassifier(mlp(), "fa")


@pytest.mark.bare
def test_lightning_modules_refuse_other_rules():
    from classact.rules.ccl_lit import CCLAutoencoder, CCLClassifier

    with pytest.raises(ValueError, match="method: expected one of ccl, bp"):
        CCLClassifier(mlp(), "hebb")
    with pytest.raises(ValueError, match="method: expected 'ccl', 'bp' or 'readout', got 'fa'"):
        CCLAutoencoder(autoencoder(), "fa")


def test_rules_import_neither_lightning_nor_extras():
    for name in ("ccl", "feedback_alignment", "target_propagation"):
        source = Path(sys.modules[f"classact.rules.{name}"].__file__).read_text()
        found = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import", "from"))}
        assert found <= {"collections", "itertools", "math", "typing", "jaxtyping", "torch", "classact"}


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualSequential(DualLinear(4, 3), DualLinear(2, 3)), "layers: layer 2 takes 2, but layer 1 gives 3"),
        (lambda: DualSequential(DualFlatten((1, 2, 2))), "layers: expected at least one DualLinear"),
        (lambda: DualSequential(nn.Linear(2, 2)), "layers: expected DualLinear, DualConv2d or DualFlatten, got Linear"),
        (lambda: DualLinear(0, 2), "in_features, out_features: expected at least 1, got 0 and 2"),
        (lambda: DualLinear(2, 2, "gelu"), "act: expected one of elu, relu"),
        (lambda: DualConv2d(1, 2, 4), "kernel: expected an odd number of at least 1, got 4"),
        (lambda: DualConv2d(1, 2, mode="down"), "mode: expected 'stride', 'pool', 'same' or 'up', got 'down'"),
        (lambda: DualConv2d(1, 2, mode="pool")(torch.zeros(1, 1, 5, 4)), r"x: expected even height .* got \(5, 4\)"),
        (lambda: DualConv2d(1, 2, mode="up").reverse(torch.zeros(1, 2, 5, 4)), "c: expected even height and width"),
        (lambda: DualFlatten((1, 2, 2))(torch.zeros(1, 1, 2, 3)), r"x: expected shape \(N, 1, 2, 2\)"),
        (lambda: DualAutoencoder(1, ()), "widths: expected at least one width"),
        (lambda: mlp()(torch.zeros(2, 5)), r"x: expected shape \(N, 6\), got \(2, 5\)"),
        (lambda: mlp(kind="cnn"), r"kind: expected 'mlp' for rows of shape \(6,\), got 'cnn'"),
        (lambda: PairLoss("mse"), "kind: expected 'gram', 'cosine_gram' or 'ae', got 'mse'"),
        (lambda: PairLoss("gram", -1.0), "scale, extra: expected 0 or more, got -1.0 and 0.5"),
        (lambda: PairLoss("gram")(A, C), "y: expected the classes for the kind 'gram', got None"),
        (lambda: PairLoss("gram")(A, C[:, :1], Y), "A, C: expected rows of one width, got 2 and 1"),
        (lambda: PairLoss("ae")(A, A), r"A, C: expected equal shapes \(N, C, H, W\)"),
        (lambda: CCLLoss(confidence=1.0), r"confidence: expected a number in \(0, 1\), got 1.0"),
        (lambda: CCLLoss()([A], [C, C], Y), "states, feedback: expected equally many, got 1 and 2"),
        (lambda: fit_ccl(mlp(), data()[0], data()[1] + 1), "y: expected classes from 0 to 2"),
        (lambda: fit_ccl(mlp(), data()[0], data()[0]), "y: expected integer classes for the loss 'gram'"),
        (lambda: fit_ccl(autoencoder(), torch.zeros(4, 1, 8, 8), Y), "y: expected targets like x for the loss 'ae'"),
        (lambda: fit_ccl(autoencoder(), torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 4, 4)), "x, y: expected N >= 2 inp"),
        (lambda: fit_backprop(mlp(), data()[0], data()[1].float()), "y: expected classes from 0 to 2, got torch.float"),
        (lambda: fit_ccl(mlp(), *data(), epochs=0), "epochs: expected at least 1, got 0"),
        (lambda: fit_ccl(mlp(), *data(), lr=0.0), "lr: expected a positive number"),
        (lambda: fit_ccl(mlp(), *data(), clip=0.0), "clip: expected a positive number or None, got 0.0"),
        (lambda: fit_ccl(mlp(), data()[0] / 0, data()[1]), "x: expected finite numbers"),
        (lambda: alignment(mlp(), []), "loader: expected at least one batch"),
        (lambda: alignment(DualSequential(DualLinear(6, 3)), [data()]), "model: expected at least one hidden layer"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
