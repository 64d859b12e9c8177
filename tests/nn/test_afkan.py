import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import classact
from classact.nn.afkan import (
    ACTIVATIONS,
    AFKAN,
    COMBINATIONS,
    REDUCTIONS,
    AFKANLayer,
    ReLUKAN,
    ReLUKANLayer,
    af_basis,
    function_norm,
    phases,
    relu_kan_basis,
)

REFERENCE = {
    key: torch.from_numpy(value)
    for key, value in np.load(Path(__file__).parent / "data" / "afkan_reference.npz").items()
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_phases():
    low, high = phases(3, 3)
    torch.testing.assert_close(low, torch.tensor([-3, -2, -1, 0, 1, 2]) / 3)
    torch.testing.assert_close(high, torch.tensor([1, 2, 3, 4, 5, 6]) / 3)


def test_values_of_the_basis():
    def values(combine):
        return af_basis(torch.tensor([0.2]), *phases(3, 3), "silu", combine)[0]

    quad1 = torch.tensor([0.00430005, 0.03062698, 0.03442575, 0.00888798, 0.00549979, 0.07718266])
    prod = torch.tensor([0.0655747, 0.1750057, 0.1855418, 0.0942761, -0.0741606, -0.2778177])
    torch.testing.assert_close(values("quad1"), quad1)
    torch.testing.assert_close(values("prod"), prod, atol=1e-6, rtol=1e-5)
    first = {"sum_prod": 1.0589091, "cubic1": 0.8498607, "cubic2": 0.00028197, "quad2": 0.9211383}
    for combine, value in first.items():
        assert values(combine)[0].item() == pytest.approx(value, rel=2e-5)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_basis_is_that_of_the_authors(activation, combine):
    values = af_basis(REFERENCE["x"], REFERENCE["af.phase_low"], REFERENCE["af.phase_high"], activation, combine)
    torch.testing.assert_close(values, REFERENCE[f"basis.{combine}.{activation}"])


def with_their_weights(method, **settings):
    layer = AFKANLayer(5, 3, reduce=method, **settings)
    theirs = {
        "global_attn": {"score": "gk_linear"},
        "multistep": {"score": "gk_linear"},
        "spatial_attn": {"score": "conv1d"},
        "local_attn": {"query": "query_local", "key": "key_local", "value": "value_local", "flat": "local_linear"},
        "multihead_attn": {"attention": "mh_attn"},
    }[method]
    state = {"low": REFERENCE["af.phase_low"], "high": REFERENCE["af.phase_high"]}
    state["weight"] = REFERENCE["af.base_weight"]
    if layer.norm is not None and settings.get("norm") != "batch":
        state |= {f"norm.{part}": REFERENCE[f"af.norm.{part}"] for part in ("weight", "bias")}
    for ours, name in theirs.items():
        prefix = f"af.{name}."
        state |= {
            f"reductions.0.{ours}.{key[len(prefix) :]}": value
            for key, value in REFERENCE.items()
            if key.startswith(prefix)
        }
    if hasattr(layer.reductions[0], "temperature"):
        state["reductions.0.temperature"] = REFERENCE["af.temperature"]
    layer.load_state_dict(state, strict=settings.get("norm") != "batch")
    return layer


@pytest.mark.parametrize("func_norm", ["none", "tensor"])
@pytest.mark.parametrize("method", ["global_attn", "spatial_attn", "multistep", "local_attn", "multihead_attn"])
def test_layer_is_that_of_the_authors(method, func_norm):
    layer = with_their_weights(method, func_norm=func_norm)
    expected = REFERENCE[f"output.{method}.{int(func_norm == 'tensor')}"]
    # attention among the inputs makes them nearly equal; the normalisation after it magnifies rounding errors
    tolerance = 1e-4 if method == "multihead_attn" else 2e-6
    torch.testing.assert_close(layer(REFERENCE["x"]), expected, atol=tolerance, rtol=1e-5)


def test_batch_normalisation_is_that_of_the_authors():
    layer = with_their_weights("global_attn", norm="batch", func_norm="none")
    torch.testing.assert_close(layer(REFERENCE["x"]), REFERENCE["output.batch"], atol=1e-5, rtol=1e-4)


def test_relu_kan_is_that_of_the_authors():
    layer, functions = ReLUKANLayer(5, 3), 6
    kernel = REFERENCE["relu.equal_size_conv.weight"].reshape(3, -1)  # their reshape takes (D, n) for (n, D)
    layer.load_state_dict(
        {
            "low": REFERENCE["relu.phase_low"],
            "high": REFERENCE["relu.phase_high"],
            "norm.weight": REFERENCE["relu.norm.weight"],
            "norm.bias": REFERENCE["relu.norm.bias"],
            "linear.weight": kernel,
            "linear.bias": REFERENCE["relu.equal_size_conv.bias"],
        }
    )
    assert kernel.shape == (3, 5 * functions)
    torch.testing.assert_close(layer(REFERENCE["x"]), REFERENCE["relu.output"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("func_norm", "expected"),
    [
        ("none", [[-0.999786, 0.230967, -0.537852], [0.996938, 0.229750, 1.456439]]),
        ("tensor", [[-0.999984, 0.231052, -0.537880], [0.999386, 0.230796, 1.460978]]),
    ],
)
def test_a_layer_by_hand(func_norm, expected):
    layer = AFKANLayer(2, 3, func_norm=func_norm)
    with torch.no_grad():
        layer.reductions[0].score.weight.copy_(torch.linspace(-1, 1, 6))
        layer.reductions[0].score.bias.zero_()
        layer.weight.copy_(torch.tensor([[1, -1], [0.5, 0.5], [2, 0]]))
    x = torch.tensor([[0.2, -0.4], [1.0, 0.5]])
    torch.testing.assert_close(layer(x), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_bumps_of_relu_kan_peak_at_one():
    low, high = phases(5, 3)
    values = relu_kan_basis((low + high) / 2, low, high, 4 * 25 / 16)
    torch.testing.assert_close(values.diagonal(), torch.ones(8))
    assert relu_kan_basis(torch.linspace(-2, 3, 5001), low, high, 4 * 25 / 16).max() <= 1 + 1e-6
    torch.testing.assert_close(
        relu_kan_basis(low, low, high, 2.0, "silu"), (2 * af_basis(low, low, high, "silu", "prod")).square()
    )


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: AFKAN([784, 64, 10]), 52_552),
        (lambda: AFKAN([784, 64, 10], reduce="multistep"), 52_550),
        (lambda: ReLUKAN([784, 64, 10]), 316_842),
        (lambda: ReLUKAN([784, 10, 10]), 58_776),
    ],
)
def test_numbers_of_parameters(network, parameters):
    assert count(network()) == parameters


def test_only_what_is_used_is_built():
    layer = AFKANLayer(7, 3)
    assert count(layer) == 3 * 7 + 2 * 7 + 2 * 6 + 7 + 1
    layer(torch.randn(4, 7)).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    fixed = AFKANLayer(7, 3, train_phases=False, norm=None)
    assert sum(p.numel() for p in fixed.parameters() if p.requires_grad) == 3 * 7 + 7 + 1


@pytest.mark.parametrize("method", ["global_attn", "multistep"])
def test_a_constant_score_moves_nothing(method):
    torch.manual_seed(0)
    layer, x = AFKANLayer(6, 3, reduce=method), torch.randn(4, 6)
    before = layer(x)
    layer.reductions[0].score.bias.data += 3
    torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=1e-4)


def test_weights_of_attention_sum_to_one():
    values = torch.rand(3, 5, 6)
    over_inputs = AFKANLayer(5, 2).reductions[0].weights(values.sum(-1))
    over_functions = AFKANLayer(5, 2, reduce="spatial_attn").reductions[0].weights(values)
    torch.testing.assert_close(over_inputs.sum(-1), torch.ones(3))
    torch.testing.assert_close(over_functions.sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scaling_the_sums_is_scaling_the_functions(reduce):
    torch.manual_seed(0)
    layer, x = AFKANLayer(5, 2, reduce=reduce, func_norm="sample").double(), torch.randn(3, 5, dtype=torch.float64)
    expected = layer.weight @ F.silu(layer.norm(layer.reductions[0](layer.basis(x)))).T
    torch.testing.assert_close(layer(x), expected.T)


def test_self_attention_by_its_definition():
    torch.manual_seed(0)
    reduction, values = AFKANLayer(5, 2, reduce="self_attn").reductions[0], torch.rand(3, 5, 6)
    scores = reduction.query(values) @ reduction.key(values).transpose(1, 2) / 5**0.5
    torch.testing.assert_close(reduction(values), (scores.softmax(-1) @ reduction.value(values)).sum(-1))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("func_norm", ["none", "sample", "tensor"])
def test_a_sample_depends_on_its_batch_only_as_in_the_authors_code(func_norm, reduce):
    torch.manual_seed(0)
    layer, x = AFKANLayer(6, 3, reduce=reduce, func_norm=func_norm).double(), torch.randn(8, 6, dtype=torch.float64)
    difference = (layer(x)[:2] - layer(x[:2])).abs().max()
    if func_norm != "tensor":
        assert difference < 1e-9
    elif reduce == "global_attn":
        assert difference > 1e-5


def test_normalised_functions_lie_in_the_unit_interval():
    values = torch.randn(4, 5, 6)
    for kind in ("sample", "tensor"):
        normal = function_norm(values, kind)
        assert (normal.min(), normal.max()) == (0, 1)
    per_sample = function_norm(values, "sample")
    torch.testing.assert_close(per_sample.amax((1, 2)), torch.ones(4))
    assert function_norm(torch.ones(2, 3, 4), "sample").abs().max() == 0
    by_norm = F.normalize(values, p=2, dim=None)
    theirs = (by_norm - by_norm.min()) / (by_norm.max() - by_norm.min())
    torch.testing.assert_close(function_norm(values, "tensor"), theirs)


@pytest.mark.parametrize("merge", ["sum", "product", "sum_product", "quadratic"])
def test_several_reductions_are_merged(merge):
    torch.manual_seed(0)
    both, x = AFKANLayer(5, 3, reduce=["multistep", "spatial_attn"], merge=merge), torch.randn(4, 5)
    outputs = []
    for i, name in enumerate(("multistep", "spatial_attn")):
        one = AFKANLayer(5, 3, reduce=name)
        state = {k: v for k, v in both.state_dict().items() if not k.startswith("reductions")}
        prefix = f"reductions.{i}."
        state |= {k.replace(prefix, "reductions.0."): v for k, v in both.state_dict().items() if k.startswith(prefix)}
        one.load_state_dict(state)
        outputs.append(one(x))
    a, b = outputs
    total, product, squares = a + b, a * b, a**2 + b**2
    expected = {
        "sum": total,
        "product": product,
        "sum_product": total + product,
        "quadratic": total + product + squares,
    }
    torch.testing.assert_close(both(x), expected[merge])


@pytest.mark.parametrize("layer", [AFKANLayer(5, 3), AFKANLayer(5, 3, norm="batch"), ReLUKANLayer(5, 3)])
def test_any_leading_shape(layer):
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 2)).reshape(2, 3, 4, 3))
    assert layer.eval()(x[0, 0, 0]).shape == (3,)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_right_gradients(reduce):
    torch.manual_seed(0)
    layer = AFKANLayer(4, 2, grid=2, order=2, reduce=reduce, combine="sum_prod").double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    for parameter in layer.parameters():
        assert parameter.grad is None


@pytest.mark.parametrize(
    "model",
    [
        lambda: AFKAN([6, 5, 3], activation="gelu", combine="cubic1", reduce=["global_attn", "spatial_attn"]),
        lambda: AFKANLayer(6, 3, norm="batch", func_norm="tensor", train_phases=False),
        lambda: ReLUKAN([6, 5, 3], grid=2),
        lambda: ReLUKANLayer(6, 3, norm=None),
    ],
)
def test_round_trip_through_safetensors(model, tmp_path):
    model, x = model().eval(), torch.randn(4, 6)
    config = json.loads(json.dumps(model.config))
    loaded = classact.load(classact.save(model, tmp_path / "m"), type(model)(**config))
    assert loaded.config == model.config
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_bfloat16_autocast(reduce):
    model = AFKAN([8, 6, 3], reduce=reduce)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(torch.randn(5, 8)), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
@pytest.mark.parametrize(
    "model", [*(lambda r=r: AFKANLayer(5, 3, reduce=r) for r in REDUCTIONS), lambda: ReLUKANLayer(5, 3)]
)
def test_compiles_and_exports(model):
    torch.compiler.reset()
    model, x = model().eval(), torch.randn(4, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_recipe_learns_and_repeats():
    from classact.nn.afkan_lit import AFKANClassifier
    from classact.training import fit

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(96, 1, 4, 4, generator=generator)
    y = (x.flatten(1)[:, :8].sum(1) > x.flatten(1)[:, 8:].sum(1)).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        module = AFKANClassifier(AFKAN([16, 8, 2]), lr=2e-2)
        curves.append(fit(module, loader, loader, epochs=6, seed=0).curves)
    assert curves[0] == curves[1]
    assert curves[0]["val_accuracy"][-1] > 0.8
    assert curves[0]["val_f1"][-1] > 0.8
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-2 * 0.8**6)
    assert module.trainer.optimizers[0].param_groups[0]["weight_decay"] == 1e-4


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AFKANLayer(0, 3), "in_features: expected at least 1, got 0"),
        (lambda: ReLUKANLayer(5, 0), "out_features: expected at least 1, got 0"),
        (lambda: AFKANLayer(5, 3, grid=0), "grid: expected at least 1, got 0"),
        (lambda: AFKANLayer(5, 3, order=-1), "order: expected 0 or more, got -1"),
        (lambda: AFKANLayer(5, 3, activation="swish"), "activation: expected one of silu, .* got 'swish'"),
        (lambda: AFKANLayer(5, 3, combine="quad3"), "combine: expected one of quad1, .* got 'quad3'"),
        (lambda: AFKANLayer(5, 3, reduce="mean"), "reduce: expected one of global_attn, .* got 'mean'"),
        (lambda: AFKANLayer(5, 3, reduce=[]), "reduce: expected at least one name, got none"),
        (lambda: AFKANLayer(5, 3, merge="mean"), "merge: expected one of sum, .* got 'mean'"),
        (lambda: AFKANLayer(5, 3, norm="group"), "norm: expected 'layer', 'batch' or None"),
        (lambda: AFKANLayer(5, 3, func_norm="batch"), "func_norm: expected 'none', 'sample' or 'tensor'"),
        (lambda: AFKANLayer(5, 3, 1, 0, reduce="local_attn"), "reduce: 'local_attn' needs at least 2 functions"),
        (lambda: AFKANLayer(5, 3)(torch.randn(2, 4)), r"x: expected shape \(..., 5\), got \(2, 4\)"),
        (lambda: AFKANLayer(5, 3, norm="batch")(torch.randn(1, 5)), "batch normalisation needs at least two rows"),
        (lambda: ReLUKANLayer(5, 3)(torch.randn(2, 4)), r"x: expected shape \(..., 5\), got \(2, 4\)"),
        (lambda: AFKAN([5]), "widths: expected at least"),
        (lambda: af_basis(torch.zeros(2), *phases(3, 3), "swish"), "activation: expected one of"),
        (lambda: relu_kan_basis(torch.zeros(2), *phases(3, 3), 1.0, "swish"), "activation: expected one of"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
