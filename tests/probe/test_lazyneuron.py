import json
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

from classact.probe.lazyneuron import (
    ActivationSparsity,
    TopKMLP,
    TopKReLU,
    activation_sparsity,
    control_dataset,
    convert_topk,
    corrupt,
    ece,
    expected_activation_gradient,
    hidden_activations,
    mlp_flops,
    noisy_labels,
    nonzero_product,
    predicted_activation_gradient,
    reliability,
    relufy,
)
from classact.probe.lazyneuron_lit import SparsityTrace
from classact.saving import load, save


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(d=8, d_ff=32, outputs=3, act=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, d_ff), act(), nn.Linear(d_ff, outputs))


def vit(seed=0, act=nn.ReLU):
    torch.manual_seed(seed)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, act_layer=act, num_classes=3
    )


class T5Dense(nn.Module):
    """With the attributes of Hugging Face's T5DenseActDense."""

    def __init__(self, d=8, d_ff=32):
        super().__init__()
        self.wi, self.wo = nn.Linear(d, d_ff, bias=False), nn.Linear(d_ff, d, bias=False)
        self.dropout, self.act = nn.Dropout(0.1), nn.ReLU()

    def forward(self, x):
        return self.wo(self.dropout(self.act(self.wi(x))))


class T5Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.DenseReluDense, self.layer_norm = T5Dense(), nn.LayerNorm(8)

    def forward(self, x):
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Shaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(11, 8)
        self.encoder = nn.ModuleDict({"block": nn.ModuleList(T5Layer() for _ in range(2))})
        self.decoder = nn.ModuleDict({"block": nn.ModuleList(T5Layer() for _ in range(1))})

    def forward(self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None):
        x, y = self.shared(input_ids), self.shared(decoder_input_ids)
        for block in self.encoder["block"]:
            x = block(x)
        for block in self.decoder["block"]:
            y = block(y + x.mean(1, keepdim=True))
        return y


class BertIntermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(8, 32), nn.GELU()

    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x))


class BertOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(32, 8), nn.LayerNorm(8)

    def forward(self, h, x):
        return self.LayerNorm(self.dense(h) + x)


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.intermediate, self.output = BertIntermediate(), BertOutput()

    def forward(self, x):
        return self.output(self.intermediate(x), x)


class BertPooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.activation = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x):
        return self.activation(self.dense(x[:, 0]))


class BertShaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.pooler = nn.ModuleList(BertLayer() for _ in range(2)), BertPooler()

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return self.pooler(x)


def state(model):
    return (
        {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()},
        {name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()},
    )


def same_state(model, before):
    after = state(model)
    assert after[0] == before[0]
    for name, (wanted, grad) in before[1].items():
        assert after[1][name][0] == wanted
        assert (grad is None) == (after[1][name][1] is None) and (grad is None or torch.equal(grad, after[1][name][1]))


# Top-k


def test_k_of_all_units_is_relu():
    x = normal(5, 7, 16).requires_grad_()
    weights = normal(5, 7, 16, seed=1)
    found = []
    for act in (TopKReLU(16), nn.ReLU()):
        y = act(x)
        found.append((y, *torch.autograd.grad((y * weights).sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shift", [0.0, -1.5])  # with the latter often fewer than k are positive
def test_the_k_largest_positive_entries_are_kept_and_have_gradients(shift):
    x = (normal(6, 9, 20) + shift).requires_grad_()
    y = TopKReLU(4)(x)
    expected = torch.from_numpy(np.where(np.argsort(np.argsort(-x.detach(), -1), -1) < 4, x.detach().relu(), 0))
    torch.testing.assert_close(y, expected)
    assert torch.equal((y > 0).sum(-1), (x > 0).sum(-1).clamp(max=4))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (y > 0).float())


def test_topk_follows_permutations_of_units_and_keeps_exactly_k_of_ties():
    x, order = normal(6, 20), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    act = TopKReLU(5)
    assert torch.equal(act(x[:, order]), act(x)[:, order])
    assert (act(torch.ones(3, 20)) > 0).sum(-1).tolist() == [5, 5, 5]
    maps = normal(2, 20, 3, 3)
    assert torch.equal(TopKReLU(5, dim=1)(maps), act(maps.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_the_sparse_path_equals_the_dense_one_with_its_gradients(bias, shape):
    torch.manual_seed(0)
    block, x = TopKMLP(8, 32, 5, bias=bias), normal(*shape).requires_grad_()
    weights = normal(*shape, seed=1)
    found = []
    for path in (block.dense_forward, block.sparse_forward):
        y = path(x)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])))
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


def test_the_path_is_chosen_by_the_number_of_tokens(monkeypatch):
    block, taken = TopKMLP(8, 32, 4, sparse_tokens=6), []
    for name in ("dense_forward", "sparse_forward"):
        path = getattr(block, name)
        monkeypatch.setattr(block, name, lambda x, name=name, path=path: taken.append(name) or path(x))
    for shape in ((2, 3, 8), (7, 8), (0, 8), (8,)):
        assert block(normal(*shape)).shape == shape
    with ActivationSparsity(block) as sparsity:
        block(normal(2, 8))
    assert taken == ["sparse_forward", "dense_forward", "dense_forward", "sparse_forward", "dense_forward"]
    assert sparsity.result()["act"].nonzero <= 4 / 32


def test_products_of_nonzero_entries_equal_dense_ones():
    a, V_t = normal(2, 6, 20).sub(1.0).relu(), normal(20, 7, seed=1)
    a[0, 2] = a[1, 5] = 0.0  # tokens without any
    a, V_t = a.requires_grad_(), V_t.requires_grad_()
    weights = normal(2, 6, 7, seed=2)
    found = [(y, *torch.autograd.grad((y * weights).sum(), [a, V_t])) for y in (a @ V_t, nonzero_product(a, V_t))]
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1] * (a > 0))
    torch.testing.assert_close(found[1][2], found[0][2])


def test_weights_of_linear_layers_are_taken_over():
    for bias in (True, False):
        K, V, x = nn.Linear(8, 32, bias), nn.Linear(32, 8, bias), normal(4, 8)
        torch.testing.assert_close(TopKMLP.from_linear(K, V, 32)(x), V(K(x).relu()))
    with pytest.raises(ValueError, match=r"d -> d_ff -> d"):
        TopKMLP.from_linear(nn.Linear(8, 32), nn.Linear(32, 7), 3)


def test_blocks_are_saved_and_loaded(tmp_path):
    block, x = TopKMLP(8, 32, 5, bias=False), normal(70, 8)
    save(block, tmp_path / "block")
    assert torch.equal(load(tmp_path / "block", TopKMLP(**block.config))(x), block(x))


@pytest.mark.bare
def test_both_paths_compile_export_and_run_in_bfloat16():
    torch.manual_seed(0)
    block, few, many = TopKMLP(8, 32, 5), normal(4, 8), normal(100, 8)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(few), block(few))
    torch.testing.assert_close(torch.compile(block.act, backend="aot_eager", fullgraph=True)(many), block.act(many))
    torch.testing.assert_close(torch.export.export(block, (many,)).module()(many), block(many))
    for x in (few, many):
        with torch.autocast("cpu", torch.bfloat16):
            low = block(x)
        assert low.dtype == torch.bfloat16
        # units near the k-th largest may change places
        assert float((low.float() - block(x)).detach().abs().mean()) < 0.005
        low.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_models_are_converted_in_place_and_keep_their_weights():
    model, x = vit(), normal(2, 1, 8, 8)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(x)
    assert convert_topk(model, 64) is model
    torch.testing.assert_close(model(x), before)
    convert_topk(model, 3)
    assert [type(block.mlp.act) for block in model.blocks] == [TopKReLU] * 2
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    found = activation_sparsity(model, [x])
    assert all(one.quantile(1.0) == 3 / 64 for one in found.stats)
    block = convert_topk(TopKMLP(8, 32, 5), 2)
    assert block.config["k"] == 2
    torch.testing.assert_close(block.sparse_forward(normal(3, 8)), block.dense_forward(normal(3, 8)))


def test_gelu_becomes_relu_before_topk():
    model = vit(act=nn.GELU)
    with pytest.raises(ValueError, match=r"expected ReLU .* 'blocks\.0\.mlp\.act'; use relufy"):
        convert_topk(model, 3)
    assert isinstance(model.blocks[0].mlp.act, nn.GELU)
    relufy(model)
    assert all(isinstance(block.mlp.act, nn.ReLU) for block in relufy(model).blocks)


# finding and counting


def test_a_layer_made_by_hand_is_counted():
    with ActivationSparsity(nn.Sequential(act := nn.ReLU()), ["0"]) as sparsity:
        act(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))
    stats = sparsity.result()["0"]
    assert (stats.nonzero, stats.dead, stats.tokens) == (0.25, 2, 2)
    assert stats.firing_rate.tolist() == [0.5, 0, 0, 0.5]
    assert stats.per_token.tolist() == [1, 0, 1, 0, 0]
    assert stats.nonzero_alive == 0.5 and stats.quantile(0.5) == 0 and stats.quantile(1.0) == 0.5
    assert stats.lorenz().tolist() == [0, 0, 0, 0.5, 1]
    assert math.isnan(stats.large)


def test_counts_equal_those_of_numpy_over_batches_and_types():
    model, x = mlp(d_ff=40), normal(9000, 8)
    a = model[1](model[0](x)).detach().numpy()
    with ActivationSparsity(model) as sparsity, torch.no_grad():
        for part in x.split(5000):
            with torch.inference_mode(len(part) < 5000):
                model(part)
    found = sparsity.result()["1"]
    assert found.nonzero == (a > 0).mean()
    np.testing.assert_array_equal(found.firing_rate, (a > 0).mean(0))
    np.testing.assert_array_equal(found.per_token, np.bincount((a > 0).sum(1), minlength=41))
    low, half = mlp(d_ff=40).bfloat16(), normal(100, 8).bfloat16()
    expected = float((low[1](low[0](half)) > 0).float().mean())
    assert activation_sparsity(low, [half])["1"].nonzero == pytest.approx(expected)


def test_half_of_the_units_fire_at_initialisation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512, bias=False), nn.ReLU(), nn.Linear(512, 2))
    assert activation_sparsity(model, [normal(2000, 64)])["1"].nonzero == pytest.approx(0.5, abs=0.01)


def test_gelu_is_never_zero_so_that_large_entries_are_counted_apart():
    model, x = mlp(act=nn.GELU), normal(300, 8)
    a = model[1](model[0](x)).detach().abs()
    found = activation_sparsity(model, [x])["1"]
    assert found.large == pytest.approx(float((a > 0.01 * a.amax(1, keepdim=True)).float().mean()))
    assert found.nonzero < found.large


def names_of(model):
    return list(hidden_activations(model))


def test_hidden_activations_are_found_in_models_of_many_makers():
    assert names_of(vit()) == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    mixer = timm.models.mlp_mixer.MlpMixer(img_size=8, patch_size=4, num_blocks=1, embed_dim=8)
    assert names_of(mixer) == ["blocks.0.mlp_tokens.act", "blocks.0.mlp_channels.act"]
    theirs = torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 32)
    assert names_of(theirs) == [f"encoder.layers.encoder_layer_{i}.mlp.1" for i in range(2)]
    t5 = [f"{part}.block.{i}.DenseReluDense.act" for part, i in (("encoder", 0), ("encoder", 1), ("decoder", 0))]
    assert names_of(T5Shaped()) == t5
    assert names_of(BertShaped()) == [f"layer.{i}.intermediate.intermediate_act_fn" for i in range(2)]
    assert names_of(nn.TransformerEncoderLayer(8, 2, 32, activation=nn.ReLU())) == ["activation"]
    deep = nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    assert names_of(nn.Sequential(nn.Flatten(), deep)) == ["1.2", "1.5"]
    assert names_of(TopKMLP(8, 32, 4)) == ["act"]
    assert activation_sparsity(theirs, [normal(2, 3, 8, 8)]).stats[0].tokens == 10
    encoder = nn.TransformerEncoderLayer(8, 2, 32, activation=nn.ReLU(), batch_first=True)
    assert activation_sparsity(encoder, [normal(2, 5, 8)])["activation"].tokens == 10


def test_maps_have_their_units_on_the_first_axis():
    model = timm.layers.Mlp(8, 24, act_layer=nn.ReLU, use_conv=True)
    found = activation_sparsity(model, [normal(2, 8, 5, 5)])["act"]
    assert (found.tokens, len(found.firing_rate)) == (50, 24)
    convert_topk(model, 3)
    assert model.act.dim == 1 and activation_sparsity(model, [normal(2, 8, 5, 5)])["act"].quantile(1.0) == 3 / 24
    cnn = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    assert len(activation_sparsity(cnn, [normal(4, 1, 8, 8)], layers=["2"])["2"].firing_rate) == 6


def test_padding_is_never_counted():
    model, x = nn.Sequential(mlp()), normal(4, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    changed = torch.where(mask[..., None], x, 100 * normal(4, 6, 8, seed=1))
    found = []
    for tokens in (x, changed):
        with ActivationSparsity(model) as sparsity:
            sparsity.update_mask(mask)
            model(tokens)
        found.append(sparsity.result()["0.1"])
    assert found[0].tokens == 10
    np.testing.assert_array_equal(found[0].firing_rate, found[1].firing_rate)
    expected = (model[0][1](model[0][0](x[mask])) > 0).double().mean(0).detach().numpy()
    np.testing.assert_allclose(found[0].firing_rate, expected)


def test_batches_of_keywords_bring_their_masks():
    model = T5Shaped()
    batch = {
        "input_ids": torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": torch.randint(11, (2, 3), generator=torch.Generator().manual_seed(1)),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    }
    assert [one.tokens for one in activation_sparsity(model, [batch]).stats] == [7, 7, 6]
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert [one.tokens for one in activation_sparsity(model, [batch]).stats] == [7, 7, 4]


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_models_are_left_as_they_were_also_on_error():
    model, x = mlp().train(), normal(20, 8)
    model[0].eval()
    model[2].weight.requires_grad_(False)
    model(x).sum().backward()
    before = state(model)
    activation_sparsity(model, [x])
    expected_activation_gradient(model, (x, torch.zeros(20).long()))
    same_state(model, before)
    broken = nn.Sequential(model, Breaks())
    before = state(broken)
    for analysis in (
        lambda: activation_sparsity(broken, [x], layers=["0.1"]),
        lambda: expected_activation_gradient(broken, (x, torch.zeros(20).long()), ["0.1"]),
    ):
        with pytest.raises(RuntimeError, match="broken"):
            analysis()
        same_state(broken, before)


def test_reports_have_tables_figures_and_files(tmp_path):
    report = activation_sparsity(vit().double(), DataLoader(TensorDataset(normal(20, 1, 8, 8).double()), 8))
    assert report.layers == ("blocks.0.mlp.act", "blocks.1.mlp.act")
    table = report.table()
    assert table["tokens"].tolist() == [100, 100] and table["units"].tolist() == [64, 64]
    assert report.nonzero == pytest.approx(table["nonzero"].mean())
    assert report["blocks.1.mlp.act"] is report.stats[1]
    report.save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", "arrays.npz", "sparsity.png"}
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["layers"][0]["large"] is None and content["layers"][0]["dead"] == report.stats[0].dead
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["1/firing_rate"], report.stats[1].firing_rate)


# operations, gradients


def test_operations_follow_the_formula():
    block = T5Dense(768, 3072)
    for q, ratio in ((0.03, 0.515), (0.063, 0.5315)):
        total = mlp_flops(block, q)["total"]
        assert total.dense == 4 * 768 * 3072 and total.ratio == pytest.approx(ratio)
        assert total.oracle == pytest.approx(q * total.dense)
    found = mlp_flops(BertShaped(), {f"layer.{i}.intermediate.intermediate_act_fn": i / 2 for i in range(2)})
    assert [found[name].ratio for name in list(found)[:2]] == [0.5, 0.75]
    model, x = vit(), normal(4, 1, 8, 8)
    with ActivationSparsity(model) as sparsity:
        model(x)
    share = np.mean([one.nonzero for one in sparsity.result().values()])
    assert mlp_flops(model, sparsity.result())["total"].ratio == pytest.approx((1 + share) / 2)
    assert mlp_flops(TopKMLP(8, 32, 4), 0.125)["total"].ratio == pytest.approx(0.5625)


A = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0])


def test_gradients_at_initialisation_are_as_derived():
    found = predicted_activation_gradient(A, 0.1, 10, draws=100_000)
    torch.testing.assert_close(found[[0, 4, 6]], torch.tensor([0.0855, 0.0428, 0.0]), atol=5e-4, rtol=0)
    squared = predicted_activation_gradient(A, 0.1, 10, "squared")
    torch.testing.assert_close(squared[[0, 4, 6]], torch.tensor([1.0, 0.5, 0.0]))
    # against derivatives for many matrices V
    generator = torch.Generator().manual_seed(1)
    V = 0.1**0.5 * torch.randn(100_000, 10, 8, generator=generator)
    logits = V @ A
    y = F.one_hot(torch.tensor(3), 10)
    for residual, expected in ((logits.softmax(-1) - y, found), (logits - y, squared)):
        gradient = torch.einsum("vci,vc->vi", V, residual)
        error = gradient.std(0) / len(V) ** 0.5
        assert ((gradient.mean(0) - expected).abs() < 4 * error + 1e-3).all()


def test_a_network_at_initialisation_has_positive_gradients_of_the_predicted_size():
    x, y = normal(50, 20), torch.randint(10, (50,), generator=torch.Generator().manual_seed(1))
    found, expected = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10, bias=False))
        nn.init.normal_(model[2].weight, std=0.3)
        one = expected_activation_gradient(model, (x, y))["1"]
        with torch.no_grad():
            a = model[1](model[0](x))
        found.append((one.active, one.inactive))
        expected.append(float(predicted_activation_gradient(a, 0.09, 10, draws=200)[a > 0].mean()))
        assert one.entries == int((a > 0).sum())
    mean, error = np.mean(found, 0), np.std(found, 0) / 40**0.5
    assert abs(mean[0] - np.mean(expected)) < 3 * error[0] and abs(mean[1]) < 3 * error[1]
    assert mean[0] > 5 * error[0]


def test_measured_gradients_are_those_of_autograd_also_for_frozen_models_and_other_losses():
    model, x, y = mlp(), normal(30, 8), normal(30, 3, seed=1)
    a = model[1](model[0](x)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(0.5 * (model[2](a) - y).square().sum(), a)
    model.requires_grad_(False)
    one = expected_activation_gradient(model, (x, y), loss=lambda out, y: 0.5 * (out - y).square().sum())["1"]
    assert one.active == pytest.approx(float(expected[a > 0].mean()), rel=1e-5)
    assert one.positive == pytest.approx(float((expected[a > 0] > 0).float().mean()))
    assert not any(p.requires_grad for p in model.parameters())


# controls and side effects


def data(n=60):
    return TensorDataset(normal(n, 2, 3), torch.arange(n) % 5)


def test_random_labels_keep_their_histogram_and_inputs():
    source = data()
    found = control_dataset(source, "random_labels", seed=3)
    labels = torch.stack([y for _, y in found])
    assert torch.equal(labels.bincount(), source.tensors[1].bincount()) and not torch.equal(labels, source.tensors[1])
    assert all(torch.equal(found[i][0], source[i][0]) for i in range(60))
    again = torch.stack([y for _, y in control_dataset(source, "random_labels", seed=3)])
    assert torch.equal(labels, again)


def test_random_inputs_are_the_same_noise_at_every_visit():
    source = data()
    found, other = control_dataset(source, "random_inputs", seed=3), control_dataset(source, "random_inputs", seed=4)
    x = torch.stack([found[i][0] for i in range(60)])
    assert torch.equal(x, torch.stack([found[i][0] for i in range(60)])) and x.dtype == torch.float32
    assert not torch.equal(x[0], other[0][0]) and len(x.unique(dim=0)) == 60
    assert torch.equal(torch.stack([y for _, y in found]), source.tensors[1])
    assert torch.equal(found[-1][0], found[59][0])


def test_infinite_data_never_repeat():
    def draw(dataset, n, **settings):
        parts = iter(DataLoader(dataset, batch_size=20, **settings))
        return [torch.cat(column) for column in zip(*(next(parts) for _ in range(n)), strict=True)]

    first = control_dataset(data(), "infinite", seed=1)
    (x, y), (later, _) = draw(first, 40), draw(first, 40)
    assert len(torch.cat([x, later]).unique(dim=0)) == 2 * len(x)
    assert sorted(y.unique().tolist()) == list(range(5)) and x.std() == pytest.approx(1.0, abs=0.05)
    again = draw(control_dataset(data(), "infinite", seed=1), 40)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    loaders = {"num_workers": 2, "multiprocessing_context": "fork"}
    epochs = torch.cat([draw(first, 4, generator=torch.Generator().manual_seed(k), **loaders)[0] for k in range(2)])
    assert len(epochs.unique(dim=0)) == len(epochs)


def test_noisy_labels_are_replaced_uniformly():
    y = torch.zeros(20_000).long()
    found = noisy_labels(y, 0.4, 10, torch.Generator().manual_seed(0))
    assert float((found != 0).float().mean()) == pytest.approx(0.36, abs=0.01)
    assert float((found == 7).float().mean()) == pytest.approx(0.04, abs=0.005)
    assert torch.equal(noisy_labels(y, 0.0, 10), y)


@pytest.mark.parametrize("kind", ["gaussian", "shot", "impulse"])
def test_noise_grows_with_severity_and_stays_in_range(kind):
    x = torch.rand(20, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    found = [corrupt(x, kind, s, torch.Generator().manual_seed(1)) for s in range(1, 6)]
    errors = [float((one - x).square().mean()) for one in found]
    assert errors == sorted(errors) and errors[0] > 0
    assert all(one.min() >= 0 and one.max() <= 1 for one in found)
    assert torch.equal(found[2], corrupt(x, kind, 3, torch.Generator().manual_seed(1)))


def test_calibration_errors_equal_those_of_torchmetrics():
    logits, labels = 2 * normal(500, 6), torch.randint(6, (500,), generator=torch.Generator().manual_seed(1))
    for bins in (15, 7):
        theirs = MulticlassCalibrationError(6, n_bins=bins, norm="l1")(logits.softmax(-1), labels)
        assert ece(logits.softmax(-1), labels, bins) == pytest.approx(float(theirs), abs=1e-6)
    found = reliability(torch.eye(3), torch.tensor([0, 1, 1]))
    assert found.examples[-1] == 3 and found.accuracy[-1] == pytest.approx(2 / 3)
    assert ece(torch.eye(3), torch.tensor([0, 1, 1])) == pytest.approx(1 / 3)


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.broken = mlp(64, 32, 10), False

    def training_step(self, batch, batch_idx):
        if self.broken:
            raise RuntimeError("broken")
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_sparsity_is_logged_during_training(tmp_path):
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    train, held = (DataLoader(TensorDataset(x[part], y[part]), 128) for part in (slice(1000), slice(1000, 1500)))
    module, trace = Plain(), SparsityTrace(every_n_batches=3)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[trace], enable_model_summary=False, **settings)
    trainer.fit(module, train, held)
    assert [(row["step"], row["part"], row["layer"]) for row in trace.history] == [
        (8, "val", "model.1"), (8, "train", "model.1"), (16, "val", "model.1"), (16, "train", "model.1")
    ]  # fmt: skip
    last = activation_sparsity(module.model, held)["1"]
    assert trace.history[2]["nonzero"] == last.nonzero and trace.history[2]["dead"] == last.dead / 32
    assert float(trainer.callback_metrics["val_nonzero/model.1"]) == pytest.approx(last.nonzero)
    module.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        pl.Trainer(max_epochs=1, callbacks=[trace], enable_model_summary=False, **settings).fit(module, train, held)
    assert not module.model[1]._forward_hooks


# bad input


@pytest.mark.bare
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopKReLU(0), "k: expected at least 1, got 0"),
        (lambda: TopKReLU(9)(normal(2, 8)), "k: expected at most the width 8 of axis -1, got 9"),
        (lambda: TopKMLP(8, 32, 33), "k: expected 1 to d_ff = 32, got 33"),
        (lambda: TopKMLP(8, 32, 3)(normal(2, 7)), r"x: expected tokens of width 8, got shape \(2, 7\)"),
        (lambda: convert_topk(mlp(), 33), "k: expected 1 to 32, the width of '1', got 33"),
        (lambda: convert_topk(mlp(), 0), "k: expected 1 to 32"),
        (lambda: hidden_activations(nn.Linear(3, 3)), "no hidden activation of an MLP found in Linear"),
        (lambda: hidden_activations(nn.Sequential(nn.ReLU())), r"name them, as layers=\[...\]; its activations are 0"),
        (lambda: hidden_activations(mlp(), ["9"]), "has no layer '9'"),
        (lambda: hidden_activations(mlp(), "1"), "layers: expected 'auto' or a sequence of names, got '1'"),
        (lambda: activation_sparsity(mlp(), []), "'1' has seen no token"),
        (lambda: activation_sparsity(mlp(), [torch.full((2, 8), torch.nan)]), "got NaN in '1'"),
        (lambda: activation_sparsity(mlp(act=nn.GELU), [torch.full((2, 8), torch.nan)]), "got NaN in '1'"),
        (lambda: mlp_flops(mlp(), 1.5), "nonzero: expected a share from 0 to 1 for '1', got 1.5"),
        (lambda: mlp_flops(mlp(), {}), "for '1', got nan"),
        (lambda: mlp_flops(nn.Sequential(nn.ReLU()), 0.5, ["0"]), "before and behind '0' are not known"),
        (lambda: control_dataset(data(), "noise"), "kind: expected 'random_labels'"),
        (lambda: control_dataset(TensorDataset(torch.ones(0, 2), torch.ones(0)), "infinite"), "a length above 0"),
        (lambda: predicted_activation_gradient(A, 0.1, 10, "hinge"), "loss: expected 'cross-entropy' or 'squared'"),
        (lambda: noisy_labels(torch.ones(3).long(), 1.2, 3), "share: expected 0 to 1, got 1.2"),
        (lambda: corrupt(torch.zeros(3), "fog", 1), "kind, severity: expected gaussian, shot, impulse"),
        (lambda: corrupt(torch.zeros(3), "shot", 6), "kind, severity: .* 6"),
        (lambda: corrupt(torch.full((3,), 2.0), "shot", 1), "x: expected values from 0 to 1"),
        (lambda: ece(torch.full((3, 2), 1.5), torch.zeros(3).long()), "probabilities: expected values from 0 to 1"),
        (lambda: SparsityTrace(every_n_batches=0), "every_n_batches: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.bare
def test_one_activation_for_several_blocks_is_refused():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'1' and '3' are one module"):
        ActivationSparsity(model)


@pytest.mark.bare
def test_masks_must_fit_the_tokens_and_gradients_must_be_finite():
    model = mlp()
    sparsity = ActivationSparsity(model)
    sparsity.update_mask(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"padding_mask: expected shape \(2, 3\) for '1', got \(2, 4\)"), sparsity:
        model(normal(2, 3, 8))
    assert not model[1]._forward_hooks
    with pytest.raises(RuntimeError, match="entered twice"), ActivationSparsity(model) as sparsity:
        sparsity.__enter__()
    with pytest.raises(ValueError, match="loss: expected finite gradients"):
        expected_activation_gradient(model, (torch.full((2, 8), torch.inf), torch.zeros(2).long()))
    assert not model[1]._forward_hooks
