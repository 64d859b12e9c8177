import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import classact
from classact.nn.evonorm import layers, search
from classact.nn.evonorm.graph import AGGREGATES, OPERATIONS, GraphNormAct, LayerGraph, Node
from classact.nn.evonorm.layers import VERSIONS, EvoNorm2d
from classact.nn.evonorm.pairs import replace_norm_act
from classact.nn.evonorm.rejection import SearchData, quality_test, stability_test, static_test, train_anchor
from classact.nn.evonorm.search import evolve_layers, pareto_front

KNOWN = {
    "B0": (0.499999, 0.749999, -1.999990, 0),
    "B1": (0.223607, 0.335410, -1.999990, 0),
    "B2": (0.809016, 2.999985, -0.585786, 0),
    "S0": (0.405518, 1.585177, -0.132244, 0),
    "S1": (0.405518, 1.585177, -0.132244, 0),
    "S2": (0.390767, 1.527515, -0.127433, 0),
}


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_values_of_the_formulas(version):
    x = torch.tensor([[1.0, 3.0], [-2.0, 0.0]]).reshape(1, 2, 1, 2)
    y = EvoNorm2d(2, version, groups=1)(x)
    torch.testing.assert_close(y.flatten(), torch.tensor(KNOWN[version]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_agrees_with_timm(version):
    import timm.layers

    torch.manual_seed(0)
    ours = randomised(EvoNorm2d(64, version, unbiased_running=True))
    theirs = getattr(timm.layers, f"EvoNorm2d{version}")(64, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    x = 0.5 + 2 * torch.randn(4, 64, 7, 7)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(z) for layer, z in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
    for y in outputs:
        (y * torch.linspace(-1, 1, 7)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-6, rtol=1e-6)


def test_running_variance_is_the_authors_unless_asked():
    x = torch.randn(2, 4, 1, 2)
    for unbiased in (False, True):
        layer = EvoNorm2d(4, "B0", unbiased_running=unbiased)
        layer(x)
        expected = 0.9 + 0.1 * x.var((0, 2, 3), unbiased=unbiased)
        torch.testing.assert_close(layer.running_var, expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_invariance_to_scale_and_shift(version):
    torch.manual_seed(0)
    layer, x = EvoNorm2d(8, version, groups=4, eps=1e-12).double(), torch.randn(3, 8, 4, 4, dtype=torch.float64)
    assert torch.allclose(layer(3 * x), layer(x)) is (version in ("B0", "B2"))
    assert not torch.allclose(layer(x + 1), layer(x), atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_who_depends_on_the_batch(version):
    layer, x = EvoNorm2d(8, version, groups=4), torch.randn(6, 8, 4, 4)
    assert torch.allclose(layer(x)[:2], layer(x[:2]), atol=1e-6) is version.startswith("S")
    layer.eval()
    torch.testing.assert_close(layer(x)[:2], layer(x[:2]))


@pytest.mark.parametrize("version", VERSIONS)
def test_without_activation_it_is_affine(version):
    layer, x = randomised(EvoNorm2d(8, version, apply_act=False)), torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(layer(x), x * layer.weight.view(8, 1, 1) + layer.bias.view(8, 1, 1))
    assert not list(layer.buffers()) and len(list(layer.parameters())) == 2
    assert not EvoNorm2d(8, version, zero_init=True)(x).any()


@pytest.mark.parametrize("version", VERSIONS)
def test_series_and_volumes_are_images_of_another_shape(version):
    layer, x = EvoNorm2d(8, version, groups=2), torch.randn(2, 8, 12)
    expected = layer(x.reshape(2, 8, 3, 4)).reshape(2, 8, 12)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.reshape(2, 8, 2, 3, 2)).reshape(2, 8, 12), expected)


def test_groups_are_lowered_to_a_divisor():
    assert [EvoNorm2d(c).groups for c in (64, 16, 48, 36, 7)] == [32, 16, 24, 18, 7]


@pytest.mark.parametrize("version", VERSIONS)
def test_first_and_second_derivatives(version):
    torch.manual_seed(0)
    layer = randomised(EvoNorm2d(4, version, groups=2)).double()
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    if version in ("B0", "S0"):
        assert torch.autograd.gradgradcheck(layer, (x[:2, :, :2, :1].detach().requires_grad_(),))


@pytest.mark.parametrize("version", VERSIONS)
def test_constant_features_and_half_precision_stay_finite(version):
    layer = EvoNorm2d(8, version, groups=2)
    for x in (torch.zeros(2, 8, 3, 3), torch.full((2, 8, 3, 3), 5.0)):
        x.requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
    large = (300 * torch.randn(2, 8, 3, 3)).half()
    assert layer(large).dtype == torch.float16 and layer(large).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.Sequential(nn.Conv2d(3, 8, 3), layer)(torch.randn(2, 3, 6, 6))
    assert y.dtype == torch.bfloat16


@pytest.mark.bare
@pytest.mark.parametrize("version", ["B0", "S0"])
def test_layers_compile_and_export(version):
    layer, x = EvoNorm2d(8, version, groups=2), torch.randn(2, 8, 4, 4)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    layer.eval()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


OTHER_RANK = """
import sys, torch
from classact.nn.evonorm.layers import EvoNorm2d
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=1, world_size=2)
torch.manual_seed(0)
x = torch.randn(6, 4, 3, 3)[2:].requires_grad_()
EvoNorm2d(4, "B0", sync=True)(x).square().sum().backward()
"""


def test_batch_statistics_over_processes(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3)
    alone, layer = EvoNorm2d(4, "B0"), EvoNorm2d(4, "B0", sync=True)
    whole, part = x.clone().requires_grad_(), x[:2].clone().requires_grad_()
    expected = alone(whole)
    expected.square().sum().backward()
    other = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path / "store")], env=dict(os.environ))
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=2)
        y = layer(part)
        y.square().sum().backward()
        torch.distributed.destroy_process_group()
        assert other.wait(60) == 0
    finally:
        other.kill()
    torch.testing.assert_close(y, expected[:2])
    torch.testing.assert_close(part.grad, whole.grad[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.running_var, alone.running_var)


# ---- graphs


def test_space_has_24_operations_and_21_without_the_batch():
    assert len(OPERATIONS) == 24
    drawn = {n.op for _ in range(60) for n in LayerGraph.random(np.random.default_rng(_), 10, False).nodes}
    assert len(drawn) == 21 and not any(op.endswith("_bwh") for op in drawn)


@pytest.mark.parametrize("training", [True, False])
def test_graph_of_batchnorm_relu_is_batchnorm_relu(training):
    torch.manual_seed(0)
    graph = GraphNormAct(LayerGraph.bn_relu(), 6, unbiased_running=True)
    norm = nn.BatchNorm2d(6)
    for _ in range(3):
        x = 1 + 2 * torch.randn(5, 6, 4, 4)
        found, expected = graph(x), norm(x).relu()
    if not training:
        found, expected = graph.eval()(x), norm.eval()(x).relu()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_graph_of_groupnorm_relu_is_groupnorm_relu():
    x = 1 + 2 * torch.randn(5, 6, 4, 4)
    torch.testing.assert_close(
        GraphNormAct(LayerGraph.gn_relu(), 6, groups=3)(x), nn.GroupNorm(3, 6)(x).relu(), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_graphs_of_the_papers_layers(version):
    torch.manual_seed(0)
    graph, layer = GraphNormAct(LayerGraph.evonorm(version), 8, groups=4), EvoNorm2d(8, version, groups=4)
    for _ in range(3):
        x = 1 + 2 * torch.randn(5, 8, 4, 4)
        torch.testing.assert_close(graph(x), layer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(graph.eval()(x), layer.eval()(x), atol=1e-6, rtol=1e-5)
    assert LayerGraph.evonorm(version).uses_batch() is version.startswith("B")


@pytest.mark.parametrize("version", ["B0", "B1", "B2"])
def test_layers_of_the_batch_series_neither_centre_nor_name_an_activation(version):
    operations = {node.op for node in LayerGraph.evonorm(version).nodes}
    assert not {op for op in operations if op.startswith("mean")}
    assert operations <= {"add", "mul", "div", "max", "neg", *AGGREGATES}


def test_every_operation_has_the_shape_of_the_input_or_broadcasts_to_it():
    x = torch.randn(3, 6, 4, 5, requires_grad=True)
    for op in OPERATIONS:
        for graph in (LayerGraph((Node(op, 0, 3),)), LayerGraph((Node("mean_whg", 0, 0), Node(op, 4, 0)))):
            layer = GraphNormAct(graph, 6, groups=3)
            y = layer(x)
            assert y.shape == x.shape and y.isfinite().all()
            assert layer.eval()(x).shape == x.shape


def test_aggregates_are_the_moments_named():
    x = 1 + torch.randn(3, 6, 4, 5)
    grouped = x.reshape(3, 3, -1)
    moments = {
        "bwh": lambda f: f(x.transpose(0, 1).reshape(6, -1), 1).reshape(1, 6, 1, 1),
        "whc": lambda f: f(x.reshape(3, -1), 1).reshape(3, 1, 1, 1),
        "wh": lambda f: f(x.reshape(3, 6, -1), 2).reshape(3, 6, 1, 1),
        "whg": lambda f: f(grouped, 2).repeat_interleave(2, 1).reshape(3, 6, 1, 1),
    }
    functions = {
        "mean": lambda z, d: z.mean(d),
        "rms": lambda z, d: (z.square().mean(d) + 1e-5).sqrt(),
        "std": lambda z, d: (z.var(d, unbiased=False) + 1e-5).sqrt(),
    }
    for over, take in moments.items():
        for moment, function in functions.items():
            layer = GraphNormAct(f"{moment}_{over}(0)", 6, groups=3)
            torch.testing.assert_close(layer(x), take(function).expand_as(x))


def test_mutation_changes_one_node():
    rng = np.random.default_rng(0)
    for _ in range(200):
        graph = LayerGraph.random(rng)
        mutant = graph.mutate(rng)
        assert sum(a != b for a, b in zip(graph.nodes, mutant.nodes, strict=True)) == 1


def test_pruning_preserves_the_function_and_forgets_dead_nodes():
    rng, x = np.random.default_rng(0), torch.randn(4, 8, 3, 3)
    for _ in range(30):
        graph = LayerGraph.random(rng)
        pruned = graph.prune()
        whole = GraphNormAct(graph, 8, groups=4)
        whole.graph = graph
        for number in range(4, 14):
            whole.register_buffer(f"running_{number}", torch.zeros(8))
        torch.testing.assert_close(GraphNormAct(pruned, 8, groups=4)(x), whole(x), equal_nan=True)
        assert pruned.prune() == pruned and pruned.key == graph.key
    live = "sigmoid(0) square(1) mul(0,4)"
    graphs = [LayerGraph.from_string(live.replace("square(1)", dead)) for dead in ("square(1)", "std_wh(4)")]
    assert graphs[0] != graphs[1] and hash(graphs[0].prune()) == hash(graphs[1].prune())
    assert graphs[0].prune().to_string() == "sigmoid(0) mul(0,4)"


def test_equal_expressions_have_equal_keys():
    same = [LayerGraph.from_string(text).key for text in ("sigmoid(0) mul(0,4)", "sigmoid(0) mul(4,0)")]
    assert same[0] == same[1]
    divided = [LayerGraph.from_string(text).key for text in ("sigmoid(0) div(0,4)", "sigmoid(0) div(4,0)")]
    assert divided[0] != divided[1]


def test_strings_and_formulas():
    rng = np.random.default_rng(0)
    for _ in range(20):
        graph = LayerGraph.random(rng).prune()
        assert LayerGraph.from_string(graph.to_string()) == graph
    assert LayerGraph.evonorm("B0").formula() == "gamma * (x / max(std_bwh(x), v1 * x + std_wh(x))) + beta"
    assert LayerGraph.evonorm("B1").formula() == "gamma * (x / max(std_bwh(x), x * rms_wh(x) + rms_wh(x))) + beta"
    assert LayerGraph.from_string("add(0,3) div(0,4) neg(4) mul(6,5)").formula() == (
        "gamma * (-(x + v1) * x / (x + v1)) + beta"
    )


def test_the_formula_says_what_the_graph_computes():
    rng, x = np.random.default_rng(1), torch.randn(3, 4, 2, 2)
    names = {"x": x, "v0": torch.zeros(1), "v1": torch.ones(1), "gamma": 1.0, "beta": 0.0, "max": torch.maximum}
    names |= {"neg": torch.neg, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "abs": torch.abs}
    names |= {"square": torch.square}
    binary = ("add", "mul", "max", "neg", "sigmoid", "tanh", "abs", "square")
    for _ in range(40):
        nodes = tuple(
            Node(str(rng.choice(binary)), *(int(k) for k in rng.choice([0, 2, 3, *range(4, 4 + n)], 2)))
            for n in range(6)
        )
        graph = LayerGraph(nodes)
        value = torch.as_tensor(eval(graph.formula(), {}, names)).expand_as(x)
        torch.testing.assert_close(GraphNormAct(graph, 4)(x), value)


def test_dependence_on_the_input():
    assert LayerGraph.evonorm("S0").depends_on_input()
    assert not LayerGraph.from_string("square(0) sigmoid(3)").depends_on_input()


def test_a_searched_layer_is_saved_and_loaded(tmp_path):
    layer = randomised(GraphNormAct(LayerGraph.evonorm("B0"), 8))
    layer(torch.randn(2, 8, 3, 3))
    again = GraphNormAct(**json.loads(json.dumps(layer.config)))
    loaded = classact.load(classact.save(layer, tmp_path / "layer"), again)
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(loaded(x), layer.eval()(x))


@pytest.mark.bare
def test_a_graph_compiles_and_exports():
    layer, x = GraphNormAct(LayerGraph.evonorm("B0"), 8), torch.randn(2, 8, 4, 4)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer.eval(), (x,)).module()(x), layer(x))


# ---- pairs


class Residual(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.last = nn.ReLU(), nn.ReLU()
        self.shared = shared

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return (self.relu if self.shared else self.last)(x + y)


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_lose_their_activation_and_others_keep_it(shared):
    model, x = Residual(shared).eval(), torch.randn(2, 4, 5, 5)
    before = copy.deepcopy(model.state_dict())
    report = replace_norm_act(model, "S0", groups=2)
    assert report.pairs == [("bn1", "relu")] and report.affine == ["bn2"] and report.unpaired == []
    assert isinstance(report.model, Residual) is not shared
    new = report.model
    y = new.bn2(new.conv2(new.bn1(new.conv1(x))))
    torch.testing.assert_close(new(x), (x + y).relu())
    assert isinstance(new.bn1, EvoNorm2d) and new.bn1.apply_act and not new.bn2.apply_act
    assert not new.training and not new.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.bn1, nn.BatchNorm2d)


def test_pairs_in_torchvision_and_timm():
    import timm
    import torchvision

    report = replace_norm_act(torchvision.models.resnet18(), "S0", affine=False)
    assert len(report.pairs) == 9 and len(report.unpaired) == 11  # 8 last norms of a branch, 3 shortcuts
    report.model.eval()(torch.randn(1, 3, 32, 32))
    mobile = replace_norm_act(timm.create_model("mobilenetv2_050", pretrained=False), "B0")
    assert len(mobile.pairs) == 35 and len(mobile.affine) == 17 and not mobile.unpaired
    assert not any(isinstance(m, nn.BatchNorm2d) for m in mobile.model.modules())
    mobile.model.eval()(torch.randn(1, 3, 32, 32))


def test_functional_activations_are_found_and_other_users_respected():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.GroupNorm(2, 4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = torch.nn.functional.silu(self.a(x))
            z = self.b(y)
            return z.relu() + z

    report = replace_norm_act(Net(), "S1", groups=2)
    assert [norm for norm, _ in report.pairs] == ["a"] and report.unpaired == ["b"]
    x = torch.randn(2, 4, 3, 3)
    z = report.model.b(report.model.a(x))
    torch.testing.assert_close(report.model(x), z.relu() + z)


def test_a_model_that_cannot_be_traced_loses_its_neighbours():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    report = replace_norm_act(Dynamic(), "B2")
    assert report.pairs == [("body.1", "body.2")] and report.unpaired == ["body.3"]
    assert isinstance(report.model.body[2], nn.Identity)


# ---- search


def plain(layer):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), layer(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def deep(layer):
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, 2, bias=False), layer(6), nn.Conv2d(6, 6, 3, bias=False), layer(6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def stripes(n, seed):
    """Three textures under noise: vertical, horizontal and diagonal stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    i, j = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    textures = torch.stack([torch.sin(2 * i), torch.sin(2 * j), torch.sin(1.5 * (i + j))])
    return textures[labels].unsqueeze(1) + 0.3 * torch.randn(n, 1, 8, 8, generator=generator), labels


DATA = SearchData(*stripes(96, 0), *stripes(60, 1))
ANCHORS = {"plain": plain, "deep": deep}
QUICK = {
    "generations": 3,
    "population": 3,
    "tournament_frac": 0.5,
    "steps": 8,
    "batch": 32,
    "groups": 2,
    "n_nodes": 5,
    "quality_steps": 5,
    "quality_threshold": 0.3,
    "stability_steps": 2,
}


def test_static_test_rejects_what_cannot_work():
    reasons = {
        "sigmoid(3)": "no dependence on x",
        "neg(0) add(0,4)": "no dependence on x",
        "exp(0) exp(4) exp(5) exp(6)": "not finite",
    }
    for text, reason in reasons.items():
        verdict = static_test(LayerGraph.from_string(text))
        assert not verdict.passed and verdict.reason == reason
    for graph in (LayerGraph.bn_relu(), LayerGraph.gn_relu(), *(LayerGraph.evonorm(v) for v in VERSIONS)):
        assert static_test(graph).passed


def test_quality_test_needs_a_layer_that_learns():
    good = quality_test(LayerGraph.evonorm("B0"), plain, DATA, steps=25, threshold=0.6, batch=32)
    assert good.passed and good.value > 0.6
    bad = quality_test(LayerGraph.from_string("mul(0,2)"), plain, DATA, steps=25, threshold=0.6, batch=32)
    assert not bad.passed and bad.reason == "low quality" and bad.value < 0.6


@pytest.mark.parametrize("version", VERSIONS)
def test_the_papers_layers_are_stable(version):
    verdict = stability_test(LayerGraph.evonorm(version), deep, DATA, steps=20, groups=2, batch=32)
    assert verdict.passed and 0 < verdict.value < 1e8


def test_an_exploding_layer_is_unstable():
    verdict = stability_test(LayerGraph.from_string("exp(0) exp(4)"), deep, DATA, steps=100, batch=32)
    assert not verdict.passed and verdict.reason == "unstable" and verdict.value > 1e8
    with pytest.raises(ValueError, match="anchor_fn: expected a network with convolutions"):
        stability_test(LayerGraph.bn_relu(), lambda layer: nn.Flatten(), DATA)


def test_tests_leave_the_random_state_and_repeat():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    scores = [train_anchor(LayerGraph.evonorm("S0"), plain, DATA, 5, groups=2, batch=32, seed=s) for s in (1, 1)]
    stability_test(LayerGraph.evonorm("S0"), plain, DATA, 2, groups=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores[0] == scores[1]


def test_pareto_front():
    assert pareto_front([[1, 0], [0, 1], [0.5, 0.5], [0.4, 0.5], [1, 0]]) == [0, 1, 2, 4]


def test_search_is_the_same_from_the_same_seed_and_after_a_kill(tmp_path, monkeypatch):
    whole = evolve_layers(ANCHORS, DATA, **QUICK, seed=3)
    assert len(whole.kept()) == 6
    file, trained = tmp_path / "search.json", []
    original = search.train_anchor

    def killed(*arguments, **options):
        trained.append(1)
        if len(trained) == 7:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(search, "train_anchor", killed)
    with pytest.raises(KeyboardInterrupt):
        evolve_layers(ANCHORS, DATA, **QUICK, seed=3, checkpoint=file)
    assert len(json.loads(file.read_text())["candidates"]) < len(whole.candidates)
    assert list(tmp_path.iterdir()) == [file]
    resumed = evolve_layers(ANCHORS, DATA, **QUICK, seed=3, checkpoint=file)
    assert resumed == whole
    assert len(trained) == 7 + 12 - 6  # three layers were scored before the kill
    before = len(trained)
    assert evolve_layers(ANCHORS, DATA, **QUICK, seed=3, checkpoint=file) == whole and len(trained) == before
    with pytest.raises(ValueError, match="checkpoint: .* holds a search with another rate"):
        evolve_layers(ANCHORS, DATA, **QUICK, seed=3, checkpoint=file, rate=0.2)


def test_search_results_rank_and_explain():
    cache = {}
    options = {**QUICK, "generations": 2, "stability_steps": 0}
    pareto = evolve_layers(ANCHORS, DATA, **options, seed=1, cache=cache)
    random = evolve_layers(ANCHORS, DATA, **options, seed=1, p_random=1.0, winner="average", cache=cache)
    assert {c.origin for c in random.candidates} == {"random"}
    means = [np.mean(c.scores) for c in pareto.kept()]
    assert means == sorted(means, reverse=True) and len(means) == 5
    assert pareto.best.to_string() == LayerGraph.from_string(pareto.kept()[0].graph).prune().to_string()
    assert pareto.kept()[0] in pareto.front()
    assert sum(pareto.outcomes().values()) == len({LayerGraph.from_string(c.graph).key for c in pareto.candidates})
    table = pareto.table()
    assert {"plain", "deep", "formula", "outcome"} <= set(table.columns) and len(table) == len(pareto.candidates)
    for k, candidate in enumerate(pareto.candidates):
        assert candidate.parent is None or pareto.candidates[candidate.parent].scores is not None
        assert candidate.parent is None or candidate.parent < k


def test_only_the_youngest_compete(monkeypatch):
    seen = []
    original = search._tournament

    def spy(candidates, alive, *rest):
        seen.append(list(alive))
        return original(candidates, alive, *rest)

    monkeypatch.setattr(search, "_tournament", spy)
    monkeypatch.setattr(search, "train_anchor", lambda *a, **k: 0.5)
    options = {**QUICK, "generations": 6, "quality_steps": 0, "stability_steps": 0}
    found = evolve_layers(ANCHORS, DATA, **options, p_random=0.0, max_age=2)
    kept = [k for k, c in enumerate(found.candidates) if c.scores is not None]
    assert seen and all(len(alive) == 2 and alive[0] in kept for alive in seen)
    assert seen[-1][0] > seen[0][0]


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvoNorm2d(8, "S3"), "version: expected one of B0, B1, B2, S0, S1, S2, got 'S3'"),
        (lambda: EvoNorm2d(0), "num_features: expected at least 1, got 0"),
        (lambda: EvoNorm2d(8)(torch.zeros(2, 4, 3, 3)), r"x: expected shape \(N, 8, ...\) .* got \(2, 4, 3, 3\)"),
        (lambda: EvoNorm2d(8)(torch.zeros(2, 8)), r"x: expected shape \(N, 8, ...\) .* got \(2, 8\)"),
        (
            lambda: layers.evonorm_s1(torch.zeros(1, 4, 2), torch.ones(4), torch.zeros(4), groups=3),
            "groups: expected a divisor of the 4 channels, got 3",
        ),
        (lambda: LayerGraph(()), "nodes: expected at least one"),
        (lambda: LayerGraph((Node("pow", 0, 0),)), "nodes: expected operations among add, .* got 'pow'"),
        (lambda: LayerGraph((Node("add", 0, 4),)), "nodes: expected predecessors of node 4 from 0 to 3"),
        (lambda: LayerGraph.from_string("add(0)"), r"text: expected parts such as add\(0,4\) .* got 'add\(0\)'"),
        (lambda: LayerGraph.from_string("sigmoid 0"), "text: expected parts such as"),
        (lambda: LayerGraph.evonorm("B9"), "version: expected one of B0, .* got 'B9'"),
        (lambda: LayerGraph.random(np.random.default_rng(0), 0), "n_nodes: expected at least 1, got 0"),
        (lambda: GraphNormAct("abs(0)", 4)(torch.zeros(1, 3, 2)), r"x: expected shape \(N, 4, ...\)"),
        (lambda: GraphNormAct("abs(0)", 0), "num_features: expected at least 1, got 0"),
        (lambda: replace_norm_act(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "model: expected at least one norm"),
        (lambda: evolve_layers({}, DATA, **QUICK), "anchors: expected at least one network"),
        (lambda: evolve_layers(ANCHORS, DATA, **{**QUICK, "population": 1}), "population: expected at least 2, got 1"),
        (lambda: evolve_layers(ANCHORS, DATA, **QUICK, p_random=2.0), r"p_random: expected a number in \[0, 1\]"),
        (lambda: evolve_layers(ANCHORS, DATA, **QUICK, winner="best"), "winner: expected 'pareto' or 'average'"),
        (lambda: train_anchor(LayerGraph.bn_relu(), plain, DATA, 0), "steps: expected at least 1, got 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
