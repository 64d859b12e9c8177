import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.nn.kan_bases import KANConv2d, KANLinear
from classact.nn.skan import (
    POOL,
    SKAN,
    GroupedKANConv2d,
    GroupedKANLinear,
    SKANConv2d,
    SKANLinear,
    drop_spaces,
    fit_skan,
    plan_stages,
    prune_spaces,
)

LINEAR = ("mlp", {"activation": "identity"})
SHORT = ("bspline", ("chebyshev", {"degree": 2}), "wavelet")


def batch(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def settled(layer, x):
    """Drop spaces until every node has chosen, from gates and coefficients that are not those of the start."""
    with torch.no_grad():
        layer.gate_logits.normal_()
    for _ in range(len(layer.pool) - layer.keep):
        layer.drop(layer.importance(x))
    return layer


def count(module):
    return sum(p.numel() for p in module.parameters())


def product(n=96, seed=0):
    x = batch(n, 2, seed=seed)
    return x, x.prod(1, keepdim=True)


@pytest.mark.parametrize("select", ["node", "edge", "layer"])
def test_pool_of_one_space_is_the_single_layer(select):
    layer, single = SKANLinear(5, 3, ["rbf"], select), KANLinear(5, 3, "rbf")
    with torch.no_grad():
        single.coefficients.copy_(layer.coefficients[0]), single.base_weight.copy_(layer.base_weight)
    x = batch(2, 7, 5)
    assert torch.equal(layer(x), single(x))
    torch.manual_seed(3)
    layer = SKANLinear(5, 3, ["rbf"], base=None)
    torch.manual_seed(3)
    assert torch.equal(layer(x), KANLinear(5, 3, "rbf", base=None)(x))


def test_copies_of_one_space_are_the_single_layer():
    layer, single = SKANLinear(5, 3, ["rbf"] * 3), KANLinear(5, 3, "rbf")
    with torch.no_grad():
        single.base_weight.copy_(layer.base_weight)
        for coefficients in layer.coefficients:
            coefficients.copy_(single.coefficients)
    torch.testing.assert_close(layer(batch(7, 5)), single(batch(7, 5)))


@pytest.mark.parametrize("select", ["node", "edge", "layer"])
def test_layer_is_the_sum_over_edges_and_spaces(select):
    layer, x = SKANLinear(4, 3, select=select), batch(6, 4)
    with torch.no_grad():
        layer.gate_logits.normal_()
    gates = layer.gates().expand(3, 4, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 4))
    expected = F.silu(x) @ layer.base_weight.T
    for k in range(4):
        edges = torch.einsum("bim,oim->boi", layer.bases[k](x), layer.coefficients[k])
        expected = expected + (gates[..., k] * edges).sum(-1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("select", ["channel", "node", "edge", "layer"])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 1, 1), ((1, 2), (0, 2), (2, 1), 1), (1, 1, 1, 2)]
)
def test_convolution_is_the_layer_on_patches(select, stride, padding, dilation, groups):
    torch.manual_seed(0)
    conv, x = SKANConv2d(4, 6, (3, 2), stride, padding, dilation, groups, SHORT, select), batch(2, 4, 7, 8)
    with torch.no_grad():
        conv.gate_logits.normal_()
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    patches = F.unfold(x, (3, 2), **options).transpose(1, 2).unflatten(-1, (groups, -1))  # (N, L, groups, Cg kh kw)
    gates = conv.gates()
    if select != "edge":
        gates = gates.reshape(gates.shape[:-1] + (1,) * (3 - gates.ndim + 1) + (3,)) if select != "layer" else gates
        gates = gates.expand(4, 3, 2, 3).unflatten(0, (groups, -1)).repeat_interleave(6 // groups, 0)
    gates, outputs = gates.flatten(1, 3), []
    for o in range(6):
        patch = patches[:, :, o * groups // 6]
        y = F.silu(patch) @ conv.base_weight[o].flatten()
        for k in range(3):
            coefficients = conv.coefficients[k][o].movedim(1, -1).flatten(0, 2)
            y = y + (gates[o, :, k] * (conv.bases[k](patch) * coefficients).sum(-1)).sum(-1)
        outputs.append(y)
    out = conv(x)
    torch.testing.assert_close(out, torch.stack(outputs, 1).reshape(out.shape), atol=1e-5, rtol=1e-5)


def test_convolution_with_the_linear_space_is_torchs():
    conv, x = SKANConv2d(4, 6, 3, 2, 1, groups=2, pool=[LINEAR], base=None), batch(2, 4, 9, 9)
    expected = F.conv2d(x, conv.coefficients[0].flatten(1, 2), None, 2, 1, 1, 2)
    torch.testing.assert_close(conv(x), expected)
    single = KANConv2d(4, 6, 3, 2, 1, groups=2, basis="rbf")
    one = SKANConv2d(4, 6, 3, 2, 1, groups=2, pool=["rbf"])
    one.coefficients[0].data.copy_(single.coefficients), one.base_weight.data.copy_(single.base_weight)
    torch.testing.assert_close(one(x), single(x))


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
@pytest.mark.parametrize("base", ["silu", None])
@pytest.mark.parametrize("select", ["node", "edge", "layer"])
def test_pruned_layer_is_the_layer_and_as_small_as_with_one_space(select, base, norm):
    torch.manual_seed(1)
    x = batch(64, 6)
    layer = settled(SKANLinear(6, 5, select=select, base=base, norm=norm), x).eval()
    pruned = layer.prune()
    assert isinstance(pruned, GroupedKANLinear) and not pruned.training
    torch.testing.assert_close(pruned(x), layer(x), atol=1e-6, rtol=1e-5)
    shared = sum(p.numel() for basis in pruned.bases for p in basis.parameters())
    assert count(pruned) - shared == count(KANLinear(6, 5, "bspline", base, norm))
    assert pruned.assignment.sum(-1).eq(1).all()


@pytest.mark.parametrize(("select", "groups"), [("channel", 1), ("channel", 2), ("node", 1), ("edge", 2), ("layer", 1)])
def test_pruned_convolution_is_the_convolution(select, groups):
    torch.manual_seed(2)
    x = batch(3, 4, 8, 8)
    conv = settled(SKANConv2d(4, 6, 3, 2, 1, groups=groups, select=select, norm="batch"), x).eval()
    pruned = conv.prune()
    assert isinstance(pruned, GroupedKANConv2d)
    torch.testing.assert_close(pruned(x), conv(x), atol=1e-6, rtol=1e-5)
    shared = sum(p.numel() for basis in pruned.bases for p in basis.parameters())
    assert count(pruned) - shared == count(KANConv2d(4, 6, 3, groups=groups, norm="batch"))


def test_gates_that_have_settled_are_pruned_without_a_change():
    torch.manual_seed(0)
    layer, x = SKANLinear(6, 5), batch(32, 6)
    chosen = torch.tensor([0, 1, 2, 3, 2, 1])
    layer.gate_logits.data.copy_(60 * F.one_hot(chosen, 4))
    torch.testing.assert_close(layer.prune("gate")(x), layer(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.prune("gate").assignment.int().argmax(-1), chosen)
    assert torch.equal(layer.prune(chosen.flip(0)).assignment.int().argmax(-1), chosen.flip(0))


def test_two_spaces_may_stay():
    torch.manual_seed(0)
    x = batch(32, 6)
    layer = settled(SKANLinear(6, 5, keep=2), x)
    assert layer.alive.sum(-1).eq(2).all()
    torch.testing.assert_close(layer.prune()(x), layer(x), atol=1e-6, rtol=1e-5)


def test_a_node_loses_its_lowest_space_and_keeps_the_last():
    layer = SKANLinear(2, 3, SHORT)
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    layer.drop(scores)
    assert layer.alive.tolist() == [[True, False, True], [False, True, True]]
    for _ in range(3):
        layer.drop(scores)
    assert layer.alive.tolist() == [[True, False, False], [False, False, True]]
    assert torch.equal(layer.gates(), layer.alive.float())


def test_importance_by_its_definition():
    torch.manual_seed(0)
    layer, x = SKANLinear(3, 4), batch(50, 3)
    layer.gate_logits.data.normal_()
    found, gates = layer.importance(x), layer.gates()
    for k in range(4):
        functions = torch.einsum("bim,oim->boi", layer.bases[k](x), layer.coefficients[k])
        expected = gates[:, k] * (functions - functions.mean(0)).abs().mean((0, 1))
        torch.testing.assert_close(found[:, k], expected)
    assert (layer.coefficients[2].data.zero_(), layer.importance(x)[:, 2].abs().max())[1] == 0
    edges = SKANLinear(3, 4, select="edge")
    edges.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("gate_logits", "alive")}, False)
    whole = SKANLinear(3, 4, select="layer")
    whole.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("gate_logits", "alive")}, False)
    nodes = SKANLinear(3, 4)
    nodes.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("gate_logits", "alive")}, False)
    torch.testing.assert_close(edges.importance(x).mean(0), nodes.importance(x))
    torch.testing.assert_close(nodes.importance(x).sum(0), whole.importance(x))


def test_a_constant_has_no_importance():
    layer, x = SKANLinear(3, 4, ["chebyshev", "bspline"]), batch(50, 3)
    before = layer.importance(x)
    layer.coefficients[0].data[..., 0] += 7  # T_0
    layer.coefficients[1].data += 5  # B-splines sum to 1
    torch.testing.assert_close(layer.importance(x), before, atol=1e-5, rtol=1e-4)


def test_importance_of_a_convolution_is_that_of_its_pixels():
    torch.manual_seed(0)
    conv, x = SKANConv2d(4, 6, 1, groups=2, pool=SHORT), batch(3, 4, 5, 5)
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    for g in range(2):
        layer = SKANLinear(2, 3, SHORT)
        for own, of_conv in zip(layer.coefficients, conv.coefficients, strict=True):
            own.data.copy_(of_conv[3 * g : 3 * g + 3, :, :, 0, 0])
        expected = layer.importance(pixels[:, 2 * g : 2 * g + 2])
        torch.testing.assert_close(conv.importance(x)[2 * g : 2 * g + 2], expected)
    wide = SKANConv2d(4, 6, 3, select="node")
    narrow = SKANConv2d(4, 6, 3)
    narrow.load_state_dict({k: v for k, v in wide.state_dict().items() if k not in ("gate_logits", "alive")}, False)
    torch.testing.assert_close(wide.importance(x).sum((1, 2)), narrow.importance(x))


def test_entropy_of_the_gates():
    layer = SKANLinear(3, 2)
    assert layer.gate_entropy().item() == pytest.approx(np.log(4))
    layer.gate_logits.data.copy_(100 * F.one_hot(torch.tensor([0, 1, 2]), 4))
    entropy = layer.gate_entropy()
    entropy.backward()
    assert entropy.item() < 1e-9
    assert layer.gate_logits.grad.abs().max() < 1e-9
    layer.drop(torch.zeros(3, 4))
    layer.zero_grad()
    layer.gate_entropy().backward()
    assert layer.gate_logits.grad.isfinite().all()


def test_layer_has_right_gradients():
    torch.manual_seed(0)
    layer = SKANLinear(2, 2, SHORT).double()
    layer.drop(torch.rand(2, 3))
    x = (0.9 * batch(3, 2).double()).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_plan_of_the_stages():
    assert plan_stages(SKAN([2, 3, 1]), 600) == ((180, 260, 340), 420)
    assert plan_stages(SKAN([2, 3, 1], SHORT, keep=2), 100, (0.2, 0.2, 0.6)) == ((20,), 40)
    assert plan_stages(SKAN([2, 3, 1], ["rbf"]), 100) == ((), 70)


@pytest.mark.parametrize("selection", ["contribution", "gate", "validation", "random"])
def test_fit_learns_and_returns_a_pruned_network(selection):
    torch.manual_seed(0)
    train, val = product(), product(seed=1)
    model, history = fit_skan(SKAN([2, 2, 1], SHORT), train, val, steps=60, selection=selection, entropy=1e-3)
    assert all(isinstance(layer, GroupedKANLinear) for layer in model.layers)
    assert not model.training
    assert len(history.loss) == 60 and len(history.val_loss) == 3
    assert history.val_loss[-1] < 0.03 < 0.1 < val[1].var()
    assert float(F.mse_loss(model(val[0]), val[1])) == pytest.approx(history.val_loss[-1])


def test_same_seed_same_network():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        loader = product()
        model, _ = fit_skan(
            SKAN([2, 2, 1], SHORT), loader, steps=24, batch_size=32, seed=seed, temperature=0.05, weight_decay=1e-3
        )
        results.append(model(loader[0]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_fit_takes_any_network_and_a_loader():
    torch.manual_seed(0)
    x, y = batch(24, 1, 8, 8), torch.arange(24) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    model = nn.Sequential(
        SKANConv2d(1, 4, 3, pool=SHORT), nn.BatchNorm2d(4), nn.Flatten(), SKAN([144, 3], SHORT), nn.Identity()
    )
    fitted, history = fit_skan(model, loader, loader, steps=18, loss=F.cross_entropy)
    assert fitted is model
    assert isinstance(model[0], GroupedKANConv2d) and isinstance(model[3].layers[0], GroupedKANLinear)
    assert history.val_loss[-1] < history.val_loss[0]


def test_dropping_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(SKANLinear(3, 4, SHORT, norm="batch"), nn.Dropout(0.5), SKANLinear(4, 2, SHORT))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    drop_spaces(model, batch(16, 3))
    with pytest.raises(ValueError, match="'validation' needs validation data"):
        drop_spaces(model, batch(16, 3), "validation")
    with pytest.raises(RuntimeError, match="broken"):
        drop_spaces(model, batch(16, 3), "validation", lambda _: (_ for _ in ()).throw(RuntimeError("broken")))
    assert [m.training for m in model] == [True, False, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (not name.endswith("alive"))
    assert all(p.grad is None for p in model.parameters())
    assert model[0].alive.sum(-1).eq(2).all() and model[2].alive.sum(-1).eq(2).all()


def test_prune_replaces_whole_networks_and_layers():
    model = nn.Sequential(SKAN([3, 4, 2], SHORT), SKANLinear(2, 2, SHORT))
    for _ in range(2):
        drop_spaces(model, batch(16, 3))
    expected = model(batch(5, 3))
    torch.testing.assert_close(prune_spaces(model)(batch(5, 3)), expected, atol=1e-6, rtol=1e-5)
    assert isinstance(model[0], SKAN) and isinstance(model[0].layers[1], GroupedKANLinear)
    assert model[0].config["assignments"] is not None
    with pytest.raises(ValueError, match="expected at least one SKANLinear or SKANConv2d"):
        prune_spaces(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SKANLinear(4, 3, norm="layer", select="edge"),
        lambda: SKANConv2d(4, 6, 3, padding=1, groups=2, norm="batch"),
        lambda: settled(SKANLinear(4, 3), batch(9, 4)).prune(),
        lambda: settled(SKANConv2d(4, 6, 3, select="node"), batch(2, 4, 6, 6)).prune(),
        lambda: SKAN([4, 3, 2], SHORT, base=None),
    ],
)
def test_round_trip_through_safetensors(make, tmp_path):
    model = make().eval()
    x = batch(2, 4, 6, 6) if hasattr(model, "in_channels") else batch(7, 4)
    loaded = classact.load(classact.save(model, tmp_path / "m"), type(model)(**json.loads(json.dumps(model.config))))
    assert loaded.config == model.config
    assert torch.equal(loaded(x), model(x))


def test_pruned_network_round_trip(tmp_path):
    torch.manual_seed(0)
    model, _ = fit_skan(SKAN([2, 3, 1], select="edge"), product(), steps=12)
    loaded = classact.load(classact.save(model, tmp_path / "m"), SKAN(**json.loads(json.dumps(model.config))))
    assert torch.equal(loaded(batch(9, 2)), model(batch(9, 2)))


def test_bfloat16_autocast():
    model = nn.Sequential(SKANConv2d(2, 3, 3, norm="layer"), nn.Flatten(), SKAN([48, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        drop_spaces(model, batch(4, 2, 6, 6))
        model(batch(4, 2, 6, 6)).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
@pytest.mark.parametrize("select", ["node", "edge"])
def test_compiles_and_exports(select):
    layer, x = settled(SKANLinear(4, 3, SHORT, select), batch(9, 4)), batch(9, 4)
    for module in (layer, layer.prune()):
        torch.compiler.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.bare
def test_convolutions_compile():
    conv, x = settled(SKANConv2d(4, 3, 3, pool=SHORT), batch(2, 4, 6, 6)), batch(2, 4, 6, 6)
    for module in (conv, conv.prune()):
        torch.compiler.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))


def test_lightning_module_goes_through_the_stages():
    from classact.nn.skan_lit import SKANModule
    from classact.training import fit

    torch.manual_seed(0)
    data = product(64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=32)
    model = SKAN([2, 2, 1], SHORT)
    module = SKANModule(model, F.mse_loss)
    seen = []
    module.on_train_batch_end = lambda *_: seen.append(int(model.layers[0].alive.sum()))
    history = fit(module, loader, loader, epochs=10, seed=0)
    assert seen == [6] * 6 + [4] * 4 + [2] * 10
    assert np.isinf(history.curves["val_loss"][:6]).all() and np.isfinite(history.curves["val_loss"][7:]).all()
    assert history.best_epoch >= 7
    expected = model(data[0])
    pruned = module.prune()
    assert isinstance(pruned.layers[0], GroupedKANLinear)
    torch.testing.assert_close(pruned(data[0]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.bare
def test_estimators_are_scikit_learns():
    from sklearn.utils.estimator_checks import check_estimator

    from classact.nn.skan_estimators import SKANClassifier, SKANRegressor

    settings = {"steps": 40, "pool": ["rbf", "chebyshev"], "hidden": (4,), "lr": 0.03, "random_state": 0}
    for estimator in (SKANRegressor(**settings), SKANClassifier(**settings)):
        check_estimator(estimator)


def test_estimators_learn():
    from classact.nn.skan_estimators import SKANClassifier, SKANRegressor

    x, y = (tensor.double().numpy() for tensor in product(200))
    regressor = SKANRegressor(hidden=(3,), steps=150, random_state=0).fit(10 + 3 * x, 5 + y[:, 0])
    assert regressor.score(10 + 3 * x, 5 + y[:, 0]) > 0.95
    assert isinstance(regressor.network_.layers[0], GroupedKANLinear)
    labels = np.where(y[:, 0] > 0, "same", "different")
    classifier = SKANClassifier(
        hidden=(3,), steps=60, pool=SHORT, batch_size=100, selection="validation", random_state=0
    ).fit(x, labels)
    assert classifier.score(x, labels) > 0.9
    np.testing.assert_allclose(classifier.predict_proba(x).sum(1), 1)


def test_layers_need_neither_lightning_nor_extras():
    code = (
        "import sys\nfrom classact.nn.skan import SKANLinear\n"
        "print({'lightning', 'sklearn', 'pandas', 'matplotlib', 'timm'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SKANLinear(3, 2, []), "pool: expected a list of at least one space"),
        (lambda: SKANLinear(3, 2, "rbf"), "pool: expected a list of at least one space, got 'rbf'"),
        (lambda: SKANLinear(3, 2, ["spline"]), "name: expected one of bspline"),
        (lambda: SKANLinear(3, 2, keep=5), "keep: expected 1 to 4, the number of spaces in the pool, got 5"),
        (lambda: SKANLinear(3, 2, keep=0), "keep: expected 1 to 4"),
        (lambda: SKANLinear(3, 2, select="input"), "select: expected 'node', 'edge' or 'layer', got 'input'"),
        (lambda: SKANConv2d(3, 2, 3, select="input"), "select: expected 'channel', 'node', 'edge' or 'layer'"),
        (lambda: SKANLinear(0, 2), "in_features: expected at least 1, got 0"),
        (lambda: SKANLinear(3, 2)(torch.rand(4, 2)), r"x: expected shape \(..., 3\), got \(4, 2\)"),
        (lambda: SKANConv2d(3, 2, 3)(torch.rand(4, 2, 8, 8)), r"x: expected shape \(N, 3, H, W\)"),
        (lambda: SKANLinear(3, 2).prune(), "choice: by contribution needs a call of importance"),
        (lambda: SKANLinear(3, 2).prune("contribution"), "choice: by contribution needs a call of importance"),
        (lambda: SKANLinear(3, 2).prune("size"), "choice: expected 'contribution', 'gate', a tensor or None"),
        (lambda: SKANLinear(3, 2).prune(torch.tensor([0, 1, 4])), "choice: expected numbers of spaces, 0 to 3"),
        (lambda: SKANLinear(3, 2).drop(torch.zeros(3)), r"scores: expected shape \(3, 4\), got \(3,\)"),
        (lambda: GroupedKANLinear(3, 2, POOL, [[True] * 4] * 2), "assignment: expected 4 values for each of"),
        (lambda: GroupedKANLinear(3, 2, POOL, [[False] * 4] * 3), "assignment: expected at least one space"),
        (lambda: SKAN([2, 1], ["rbf"]).prune().prune(), "model: is pruned already"),
        (lambda: SKAN([3]), "widths: expected at least"),
        (lambda: SKAN([3, 2], assignments=[]), "assignments: expected one for each of 1 layers, got 0"),
        (lambda: plan_stages(SKAN([3, 2]), 600, (0.5, 0.5)), "stages: expected three parts that sum to 1"),
        (lambda: plan_stages(SKAN([3, 2]), 5), "steps: expected enough to drop 3 spaces"),
        (lambda: drop_spaces(SKAN([3, 2]), torch.rand(4, 3), "size"), "selection: expected 'contribution'"),
        (lambda: fit_skan(nn.Linear(3, 2), ()), "model: expected at least one SKANLinear or SKANConv2d"),
        (lambda: fit_skan(SKAN([2, 1]), product(), selection="validation"), "val: selection by validation needs"),
        (lambda: fit_skan(SKAN([2, 1]), product(), temperature=0.0), "temperature: expected a positive number"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
