import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import classact
from classact.probe.ftwt import (
    DynamicConv,
    DynamicFlops,
    MaskHead,
    SparseConv,
    choose_r,
    convert_ftwt,
    estimate_reduction,
    evaluate_ftwt,
    filter_response,
    fit_ftwt,
    mask_accuracy,
    mask_loss,
    mass_mask,
    to_sparse_inference,
    uniform_mask,
)

REFERENCE = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "data/ftwt_reference.npz").items()}
EXAMPLE = torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]])


def block(c_in, c_out, k=3, stride=1, groups=1):
    conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def vgg(widths=(6, "M", 8, 10, "M"), classes=10, seed=0):
    torch.manual_seed(seed)
    parts, c_in = [], 3
    for width in widths:
        if width == "M":
            parts.append(nn.MaxPool2d(2))
        else:
            parts += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c_in = width
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))
    return spread(model)


def mobilenet():
    parts = block(3, 8)
    for c_in, c_out, stride in ((8, 12, 1), (12, 16, 2), (16, 20, 2)):
        parts += block(c_in, c_in, stride=stride, groups=c_in) + block(c_in, c_out, 1)
    return nn.Sequential(*parts, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 10))


class Residual(nn.Module):
    """ResNet for CIFAR: shortcuts without weights."""

    def __init__(self, c_in, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.stride, self.more = nn.ReLU(inplace=True), stride, width - c_in

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(F.avg_pool2d(x, 2, 2), (0, 0, 0, 0, 0, self.more)).detach()  # as theirs
        out += x
        return self.relu(out)


def resnet(depth=8, pool=8):
    n = (depth - 2) // 6
    blocks = [Residual(16, 16) for _ in range(n)]
    for c_in in (16, 32):
        blocks += [Residual(c_in, 2 * c_in, 2), *(Residual(2 * c_in, 2 * c_in) for _ in range(n - 1))]
    return nn.Sequential(*block(3, 16), *blocks, nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(64, 10))


def spread(model):
    """Statistics of the batch norms as after a training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model


def numbers(state, seed):
    """The weights with which the reference was made."""
    rng = np.random.default_rng(seed)
    for name, tensor in state.items():
        drawn = rng.normal(size=tensor.shape)
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            drawn = 0.5 + np.abs(drawn)
        elif tensor.ndim > 1:
            drawn *= (2 / tensor[0].numel()) ** 0.5
        tensor.copy_(torch.from_numpy(np.asarray(drawn)))


def images(n=8, size=12, seed=0, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def sharpened(network):
    """Heads whose masks differ between inputs."""
    for layer in network.layers.values():
        nn.init.normal_(layer.head.linear.weight, 0, 8)
    return network


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, state, training):
    assert model.training == training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def labelled(n=96, size=8, seed=0):
    """Which third of the channels is bright."""
    y = torch.arange(n) % 3
    x = images(n, size, seed) * 0.3
    x[torch.arange(n), y] += 1
    return DataLoader(TensorDataset(x, y), 32)


# masks


def test_the_example_of_the_poster():
    assert mass_mask(EXAMPLE, 0.95).int().tolist() == [[1, 1, 0, 1, 0, 1, 0]]


def test_masks_of_small_examples():
    assert mass_mask(torch.ones(1, 4), 0.5).sum() == 2
    assert mass_mask(torch.tensor([[0.0, 2.0, 3.0]]), 1.0).int().tolist() == [[0, 1, 1]]
    dominant = torch.tensor([[10.0, 1.0, 1.0]])
    assert mass_mask(dominant, 0.5, min_keep=0).int().tolist() == [[0, 0, 0]]
    assert mass_mask(dominant, 0.5).int().tolist() == [[1, 0, 0]]
    assert mass_mask(torch.zeros(1, 3), 0.5).sum() == 1
    assert mass_mask(torch.zeros(1, 3), 1.0, min_keep=0).sum() == 0
    assert uniform_mask(torch.tensor([[3.0, 0.0, 1.0, 2.0]]), 0.25).int().tolist() == [[1, 0, 1, 1]]
    assert uniform_mask(torch.tensor([[3.0, 0.0, 1.0, 2.0]]), 1.0).int().tolist() == [[1, 0, 0, 0]]


def test_mass_masks_do_not_depend_on_scale_and_are_nested():
    e = torch.rand(50, 23, generator=torch.Generator().manual_seed(0)).square()
    e[e < 0.05] = 0
    before = torch.zeros(50, 23, dtype=torch.bool)
    for r in (0.0, 0.3, 0.6, 0.9, 0.99, 1.0):
        mask = mass_mask(e, r)
        assert torch.equal(mask, mass_mask(64 * e, r))
        assert (mask >= before).all()
        before = mask
    assert torch.equal(before, e > 0)


def test_masks_equal_those_of_the_authors():
    e = filter_response(REFERENCE["o"])
    for r in (0.3, 0.5, 0.8, 0.9, 0.97, 1.0):
        assert torch.equal(mass_mask(e, r, min_keep=0).float(), REFERENCE[f"mass.{r}"])
        assert torch.equal(uniform_mask(e, r, min_keep=0).float(), REFERENCE[f"uniform.{r}"])


def test_heads_equal_those_of_the_authors():
    for softmax in (0, 1):
        head = MaskHead(17, 9, softmax=bool(softmax))
        head.linear.load_state_dict({name: REFERENCE[f"head.{softmax}.{name}"] for name in ("weight", "bias")})
        torch.testing.assert_close(head(REFERENCE["o"]), REFERENCE[f"head.{softmax}.logits"])


@pytest.mark.parametrize(
    ("name", "make", "mode"),
    [
        ("vgg.decoupled", vgg, "decoupled"),
        ("vgg.joint", vgg, "joint"),
        ("resnet", lambda: resnet(8, 3), "decoupled"),
        ("mobilenet", mobilenet, "decoupled"),
    ],
)
def test_networks_equal_those_of_the_authors(name, make, mode):
    model = make()
    numbers(model.state_dict(), 0)
    network = convert_ftwt(model, 0.9, mode=mode, min_keep=0)
    for k, layer in enumerate(network.layers.values()):
        rng, linear = np.random.default_rng(k), layer.head.linear
        linear.weight.data = torch.from_numpy(8 * rng.normal(size=linear.weight.shape)).float()
        linear.bias.data = torch.from_numpy(rng.normal(size=linear.bias.shape)).float()
    x, labels = REFERENCE[f"{name}.x"], torch.arange(6) % 10
    network.eval()
    with network.observed() as steps:
        out = network(x)
    torch.testing.assert_close(out, REFERENCE[f"{name}.out"], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([step.target for step in steps.values()], 1).float(), REFERENCE[f"{name}.truth"])
    torch.testing.assert_close(mask_loss(steps.values()), REFERENCE[f"{name}.loss"])
    accuracy = np.mean(list(mask_accuracy(steps).values()))
    assert accuracy * 100 == pytest.approx(float(REFERENCE[f"{name}.accuracy"]), abs=1e-3)
    counted = DynamicFlops(network, official=True).of(steps).dynamic
    torch.testing.assert_close(counted.float(), REFERENCE[f"{name}.flops"])
    assert len(counted.unique()) > 1
    network.train()
    with network.observed() as steps:
        total = F.cross_entropy(network(x), labels) + mask_loss(steps.values())
    total.backward()
    torch.testing.assert_close(total, REFERENCE[f"{name}.total"])
    for k, layer in enumerate(network.layers.values()):
        for weight, kind in ((layer.conv.weight, "grad"), (layer.head.linear.weight, "head_grad")):
            wanted = REFERENCE[f"{name}.{kind}.{k:02d}"]
            torch.testing.assert_close(weight.grad.flatten()[:50], wanted, rtol=1e-3, atol=1e-5)


# conversion


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "masked", "kept"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), 17, 3),
        (lambda: torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=False), 8, 0),
        (lambda: timm.create_model("resnet26", num_classes=5), 25, 4),
        (lambda: timm.create_model("mobilenetv1_100", num_classes=5), 27, 0),
        (lambda: timm.create_model("mobilenetv2_035", num_classes=5), 52, 0),
    ],
)
def test_converted_networks_compute_the_same_without_masks(make, masked, kept):
    torch.manual_seed(0)
    model, x = make().eval(), images(1, 32)
    network = convert_ftwt(model)
    assert (len(network.layers), len(network.unmasked())) == (masked, kept)
    with torch.no_grad(), network.masks_from("all"):
        assert torch.equal(network(x), model(x))
    if masked < 20:
        with torch.no_grad():
            torch.testing.assert_close(to_sparse_inference(network)(x), network(x), rtol=1e-4, atol=1e-5)


def test_masks_may_be_taken_before_or_after_the_addition_of_a_block():
    model, x = spread(resnet()).eval(), images(3, 32)
    for after_block in (False, True):
        network = sharpened(convert_ftwt(model, 0.8, after_block=after_block))
        with torch.no_grad():
            with network.masks_from("all"):
                assert torch.equal(network(x), model(x))
            with network.masks_from("truth"), network.observed() as steps:
                out = network(x)
            assert not torch.equal(out, model(x))
            torch.testing.assert_close(to_sparse_inference(network)(x), network(x), rtol=1e-4, atol=1e-5)
        assert set(steps) == set(network.layers)
        assert network.sources["3.conv1"] == {"0"}
        assert network.sources["4.conv1"] == ({"3.conv2"} if after_block else {"0", "3.conv2"})
        assert network.official["4.conv1"] == "3.conv2"


def test_functional_activations_and_plain_convolutions_are_found():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            return self.last(self.second(F.max_pool2d(F.relu(self.first(x)), 2)).relu()).mean((2, 3))

    model, x = Plain(), images(2)
    network = convert_ftwt(model, {"second": 0.5})
    assert list(network.layers) == ["second"]
    network = convert_ftwt(model)
    assert list(network.layers) == ["first", "second"] and list(network.unmasked()) == ["last"]
    assert network.sources == {"first": None, "second": {"first"}}
    with torch.no_grad():
        torch.testing.assert_close(to_sparse_inference(network)(x), network(x))
    assert list(convert_ftwt(model, include=lambda name: name == "first").layers) == ["first"]


def test_models_stay_as_they_were_also_on_error():
    model = vgg().train()
    state = state_of(model)
    estimate_reduction(model, [images()], (1.0, 0.5))
    assert_untouched(model, state, training=True)
    network = convert_ftwt(model)
    state = state_of(network)
    with pytest.raises(ValueError, match="images x"):
        estimate_reduction(network, [images(), images()[0]])
    with pytest.raises(RuntimeError), network.observed(), network.masks_from("truth"):
        network(torch.randn(2, 5, 12, 12))
    with torch.no_grad():
        evaluate_ftwt(network, labelled())
    assert_untouched(network, state, training=True)
    assert all(layer.masks == "predicted" and layer.observer is None for layer in network.layers.values())


# losses


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_the_losses_stay_apart(mode):
    network = convert_ftwt(vgg(), 0.9, mode=mode).train()
    with network.observed() as steps:
        out = network(images())
    mask_loss(steps.values()).backward(retain_graph=True)
    largest = max((float(p.grad.abs().max()) for p in network.backbone() if p.grad is not None), default=0.0)
    assert (largest == 0) == (mode == "decoupled")
    assert all(p.grad.abs().sum() > 0 for p in network.heads())
    network.zero_grad()
    F.cross_entropy(out, torch.arange(8)).backward()
    assert all(p.grad is None for p in network.heads())
    assert network.layers["0"].conv.weight.grad.abs().sum() > 0


def test_loss_of_heads_that_know_nothing():
    network = convert_ftwt(vgg((6, 8, 11)))
    for p in network.heads():
        nn.init.zeros_(p)
    with network.observed() as steps:
        network(images())
    assert float(mask_loss(steps.values()).detach()) == pytest.approx((6 + 8 + 11) / 3 * math.log(2), rel=1e-6)


def test_at_r_1_only_silent_filters_go():
    model = vgg((16, 16, "M", 16)).eval()
    with torch.no_grad():
        model[1].bias[:5] = -100
    report = estimate_reduction(model, [images(30)], (1.0,))
    network = convert_ftwt(model, 1.0)
    with torch.no_grad(), network.masks_from("truth"):
        torch.testing.assert_close(network(images(30)), model(images(30)), rtol=0, atol=1e-4)
    assert report.agreement[0] == 1
    assert 0.3 < report.kept[0, 0] <= 11 / 16


# counting


def test_multiplications_of_networks_for_cifar():
    x, widths = images(1, 32), [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
    with torch.device("meta"):
        model = nn.Sequential(*vgg_parts(widths))
    for network, expected in ((model, 313_196_544), (resnet(56).to("meta"), 125_485_056)):
        converted = convert_ftwt(network)
        with converted.masks_from("all"), converted.observed() as steps:
            converted(x.to("meta"))
        assert DynamicFlops(converted).of(steps).dense == expected
    small = convert_ftwt(resnet())
    macs = DynamicFlops(small)(x, "all")
    assert macs.dynamic.tolist() == [macs.dense] and macs.linear == 640
    assert float(macs.reduction()) == 0 > float(macs.reduction(everything=True))


def vgg_parts(widths):
    c_in = 3
    for width in widths:
        yield nn.MaxPool2d(2) if width == "M" else nn.Sequential(*block(c_in, width))
        c_in = c_in if width == "M" else width


def test_half_the_filters_cost_a_quarter_within_and_half_in_the_first_layer():
    network = convert_ftwt(vgg((8, 12, "M", 16)))
    macs = DynamicFlops(network)(images(), lambda o: (torch.arange(o.shape[1]) % 2 == 0)[None])
    full = DynamicFlops(network)(images(), "all")
    assert (full.layers / macs.layers)[0].tolist() == [2, 4, 4]


def test_a_depthwise_filter_costs_only_with_its_channel():
    network = convert_ftwt(mobilenet())
    on = {name: torch.rand(layer.conv.out_channels) < 0.5 for name, layer in network.layers.items()}
    masks = {name: lambda _, kept=kept: kept[None] for name, kept in on.items()}
    with network.masks_from(masks), network.observed() as steps:
        network(images(1, 8))
    layers = DynamicFlops(network).of(steps).layers[0]
    assert list(network.layers)[:3] == ["0", "3", "6"]
    assert layers[1] == 64 * 9 * (on["0"] & on["3"]).sum()
    assert layers[2] == 64 * on["3"].sum() * on["6"].sum()
    assert DynamicFlops(network, official=True).of(steps).layers[0, 1] == 0


# inference


@pytest.mark.parametrize("make", [lambda: vgg((8, 12, "M", 16)), lambda: spread(mobilenet()), lambda: resnet(8, 2)])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_sparse_inference_equals_masked_inference(make, chunk):
    network = sharpened(convert_ftwt(spread(make()).eval(), softmax=False))
    sparse = to_sparse_inference(network, chunk)
    for n in (1, 8):
        with torch.no_grad(), network.observed() as steps:
            x = images(n, 8)
            torch.testing.assert_close(sparse(x), network(x), rtol=1e-4, atol=1e-5)
    assert len(torch.cat([s.mask for s in steps.values()], 1).unique(dim=0)) > 1


def test_sparse_inference_survives_empty_masks():
    network = convert_ftwt(spread(mobilenet()).eval(), min_keep=0)
    for layer in network.layers.values():
        nn.init.constant_(layer.head.linear.bias, -100)
    with torch.no_grad():
        torch.testing.assert_close(to_sparse_inference(network)(images(2, 8)), network(images(2, 8)))


def test_sparse_inference_computes_the_chosen_filters_only(monkeypatch):
    network = sharpened(convert_ftwt(vgg((8, 12, "M", 16)).eval()))
    seen = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *rest: seen.append(w.shape[:2]) or convolve(x, w, *rest))
    x = images(1)
    to_sparse_inference(network)(x)
    monkeypatch.undo()
    with torch.no_grad(), network.observed() as steps:
        network(x)
    filters = [int(step.mask.sum()) for step in steps.values()]
    assert [tuple(shape) for shape in seen] == [(filters[0], 3), (filters[1], filters[0]), (filters[2], filters[1])]


# reports and training


def test_an_estimate_of_a_network_whose_firing_is_known():
    """Inputs have one of three bright channels, and every filter answers to one of them."""
    model = nn.Sequential(*block(3, 6, 1), *block(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for conv in (model[0], model[3]):
        group = torch.arange(conv.in_channels) * 3 // conv.in_channels
        same = (torch.arange(6) // 2)[:, None] == group
        conv.weight.data = same.float()[:, :, None, None]
    x = torch.zeros(9, 3, 4, 4)
    x[torch.arange(9), torch.arange(9) % 3] = 1
    report = estimate_reduction(model, [x], (1.0,))
    area = 16
    assert report.dense_macs == area * (18 + 36)
    np.testing.assert_allclose(report.reduction, 1 - area * (2 * 3 + 2 * 2) / report.dense_macs)


def test_reports_are_tables_figures_and_files(tmp_path):
    loader = labelled()
    report = estimate_reduction(vgg(classes=3), loader, (1.0, 0.9, 0.7))
    table = report.table()
    assert table["r"].tolist() == [1.0, 0.9, 0.7] and (table["reduction"].diff().dropna() > 0).all()
    assert report.reduction.shape == (3, 96) and report.kept.shape == (3, 3)
    assert (table["low"] <= table["reduction"]).all() and (table["reduction_all"] < table["reduction"]).all()
    assert len(report.plot().axes) == 3 and len(report.summary()) == 4
    folder = report.save(tmp_path / "report")
    assert sorted(file.name for file in folder.iterdir()) == ["arrays.npz", "reduction.png", "report.json"]
    content = json.loads((folder / "report.json").read_text())
    assert [row["r"] for row in content["estimates"]] == [1.0, 0.9, 0.7]
    np.testing.assert_array_equal(np.load(folder / "arrays.npz")["kept"], report.kept)
    unlabelled = estimate_reduction(vgg(classes=3), [x for x, _ in loader], (0.9,), max_batches=2)
    assert np.isnan(unlabelled.accuracy).all() and unlabelled.reduction.shape == (1, 64)
    np.testing.assert_array_equal(unlabelled.reduction[0], report.reduction[1, :64])


def test_r_is_found_for_a_target():
    model = vgg((16, 16, "M", 16))
    for gt in ("mass", "uniform"):
        r, estimate = choose_r(model, labelled(32), 0.5, gt=gt, tolerance=0.02)
        again = estimate_reduction(model, labelled(32), [r], gt=gt).reduction.mean()
        assert again == pytest.approx(estimate) and abs(estimate - 0.5) < 0.06
    with pytest.raises(ValueError, match="silent filters save by themselves"):
        choose_r(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), [images() * 0], 0.1)


def test_training_keeps_to_the_estimate_and_is_repeatable():
    model, loader = vgg((8, "M", 8), classes=3), list(labelled(128))
    settings = {"epochs": 8, "lr": 0.05, "milestones": (6,), "head_lr": 1.0, "target_reduction": 0.4, "seed": 3}
    state = state_of(model)
    fitted = fit_ftwt(model, loader, loader, **settings)
    assert_untouched(model, state, training=True)
    again = fit_ftwt(model, loader, loader, **settings)
    assert all(torch.equal(a, b) for a, b in zip(fitted.network.parameters(), again.network.parameters(), strict=True))
    history = fitted.history
    assert history["loss"][-1] < history["loss"][0] and history["val_accuracy"][-1] > 0.9
    assert history["mask_loss"][3] < history["mask_loss"][0]
    assert abs(fitted.estimate - 0.4) < 0.05 and abs(history["val_reduction"][-1] - fitted.estimate) < 0.15
    found = evaluate_ftwt(fitted.network, loader)
    assert found["accuracy"] == history["val_accuracy"][-1] and not fitted.network.training
    heads = copy.deepcopy(fitted.network).heads()
    rested = fit_ftwt(fitted.network, loader, epochs=1, cooldown=0.0)
    assert all(torch.equal(a, b) for a, b in zip(heads, rested.network.heads(), strict=True))


def test_the_lightning_module_trains_like_the_plain_loop():
    from classact.probe.ftwt_lit import FTWTModule
    from classact.training import fit

    model, loader = vgg((8, "M", 8), classes=3), labelled()
    torch.manual_seed(0)
    network = convert_ftwt(model, 0.8)
    plain = fit_ftwt(copy.deepcopy(network), loader, loader, epochs=2, lr=0.05, milestones=(1,))
    module = FTWTModule(network, lr=0.05, milestones=(1,))
    history = fit(module, loader, loader, epochs=2, seed=0, monitor="val_loss")
    assert history.curves["mask_loss"] == pytest.approx(plain.history["mask_loss"], rel=1e-4)
    assert history.curves["val_reduction"] == pytest.approx(plain.history["val_reduction"], rel=1e-4)


def test_networks_are_saved_and_loaded(tmp_path):
    network = sharpened(convert_ftwt(vgg().eval()))
    classact.save(network, tmp_path / "network")
    other = convert_ftwt(vgg(seed=1).eval())
    loaded = classact.load(tmp_path / "network", model=other)
    with torch.no_grad():
        assert torch.equal(loaded(images()), network(images()))
    head = MaskHead(4, 6, "max", softmax=False)
    classact.save(head, tmp_path / "head")
    loaded = classact.load(tmp_path / "head", model=MaskHead(**head.config))
    assert torch.equal(loaded(images(channels=4)), head(images(channels=4)))


def test_copies_choose_for_themselves():
    network = sharpened(convert_ftwt(vgg().eval()))
    twin = copy.deepcopy(network)
    with torch.no_grad(), twin.masks_from("all"):
        assert not torch.equal(twin(images()), network(images()))
    sparse = to_sparse_inference(network)
    assert torch.equal(copy.deepcopy(sparse)(images()), sparse(images()))


@pytest.mark.bare
def test_layers_compile_export_and_run_in_bfloat16():
    network = sharpened(convert_ftwt(vgg().eval()))
    with torch.no_grad():
        expected = network(images())
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), expected)
        exported = torch.export.export(network, (images(),)).module()
        torch.testing.assert_close(exported(images()), expected)
    with torch.autocast("cpu", torch.bfloat16), network.observed() as steps:
        out = network(images())
        loss = F.cross_entropy(out, torch.arange(8)) + mask_loss(steps.values())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in network.heads())


@pytest.mark.bare
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mass_mask(EXAMPLE, 1.2), "r: expected a share from 0 to 1, got 1.2"),
        (lambda: mass_mask(EXAMPLE, 0.5, min_keep=-1), "min_keep: expected 0 or more, got -1"),
        (lambda: uniform_mask(EXAMPLE, -0.1), "prune_ratio: expected a share"),
        (lambda: MaskHead(3, 4, pool="sum"), "pool: expected 'avg' or 'max', got 'sum'"),
        (lambda: MaskHead(3, 4)(torch.randn(2, 5, 3, 3)), r"x: expected \(N, 3, H, W\), got shape \(2, 5, 3, 3\)"),
        (lambda: DynamicConv(nn.Conv2d(3, 4, 3), mode="free"), "mode: expected 'decoupled' or 'joint'"),
        (lambda: DynamicConv(nn.Conv2d(3, 4, 3), gt="top"), "gt: expected 'mass' or 'uniform'"),
        (lambda: convert_ftwt(nn.Linear(3, 3)), "no convolution followed by"),
        (lambda: convert_ftwt(vgg(), {"0": 0.5, "none": 0.5}), "r: no layer none; there are 0, 4, 7"),
        (lambda: convert_ftwt(vgg(), {}), "r: expected at least one layer"),
        (lambda: convert_ftwt(vgg(), 3.0), "r: expected a share from 0 to 1, got 3.0"),
        (lambda: estimate_reduction(vgg(), [images()], ()), "r_grid: expected at least one"),
        (lambda: estimate_reduction(vgg(), []), "loader: expected at least one batch"),
        (lambda: estimate_reduction(convert_ftwt(vgg()), [images()], gt="uniform"), "the model is converted, gt"),
        (lambda: choose_r(vgg(), [images()], 1.5), "target_reduction: expected a share"),
        (lambda: fit_ftwt(vgg(), labelled()), "expected exactly one of them"),
        (lambda: fit_ftwt(convert_ftwt(vgg()), labelled(), r=0.5), "expected none of them"),
        (lambda: fit_ftwt(vgg(), [images()], r=0.5, epochs=1), "integer labels y"),
        (lambda: fit_ftwt(vgg(), [], r=0.5, epochs=1), "expected at least one batch in every epoch"),
        (lambda: fit_ftwt(vgg(), labelled(), r=0.5, epochs=0), "epochs: expected at least 1"),
        (lambda: to_sparse_inference(vgg()), "network: expected one made by convert_ftwt, got Sequential"),
        (lambda: to_sparse_inference(convert_ftwt(vgg()), 0), "chunk: expected at least 1"),
        (lambda: mask_loss([]), "steps: expected layers whose masks were predicted"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_gathered_is_computed_in_full():
    model = spread(nn.Sequential(*block(4, 8, groups=2), *block(8, 8), *block(8, 8, 5, groups=8), nn.Flatten())).eval()
    model[3].padding_mode = "circular"
    model[3]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    network = sharpened(convert_ftwt(model))
    sparse, x = to_sparse_inference(network), images(4, 6, channels=4)
    parts = [m for m in sparse.modules() if isinstance(m, SparseConv)]
    assert [part.in_full for part in parts] == [True, True, False]
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), network(x), rtol=1e-4, atol=1e-5)
