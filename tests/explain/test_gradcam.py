"""Grad-CAM and its companions: worked examples, identities, other libraries, unusual networks, the model untouched."""

from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from captum.attr import Deconvolution
from captum.attr import GuidedBackprop as CaptumGuided
from pytorch_grad_cam import GradCAM as PeerGradCAM
from torch import nn
from torch.nn import functional as F
from torchcam import methods as torchcam

from classact.explain.gradcam import (
    GradCAM,
    GuidedBackprop,
    GuidedGradCAM,
    NeuronNames,
    ReLURule,
    input_gradient,
    textual_explanation,
)
from classact.explain.targets import (
    caption_logprob,
    class_logit,
    detection_score,
    embedding_similarity,
    labels_over,
    q_value,
    region_logit,
)

A = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]).unsqueeze(0)
HALVES = torch.tensor([0.5, -0.5]).view(1, 2, 1, 1).expand(1, 2, 2, 2)


def images(n=3, size=(16, 16), channels=3, seed=1, dtype=torch.float32):
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(classes=5, seed=0):
    """A convolutional network with a fully connected head; "3" is its last feature map, (N, 8, 8, 8)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 16),
        nn.ReLU(),
        nn.Linear(16, classes),
    )


def test_worked_example():
    cam = GradCAM(network())
    torch.testing.assert_close(cam.alpha(HALVES), torch.tensor([[0.5, -0.5]]))
    torch.testing.assert_close(cam.combine(A, HALVES), torch.tensor([[[0.5, 0.5], [1.0, 2.0]]]))
    assert torch.equal(cam.combine(A, HALVES, counterfactual=True), torch.zeros(1, 2, 2))
    signed = GradCAM(network(), relu=False)
    torch.testing.assert_close(signed.combine(A, HALVES, counterfactual=True), -signed.combine(A, HALVES))


def test_ablations_of_the_weights():
    g = torch.tensor([[[[1.0, -3.0], [0.0, 2.0]]]])
    weights = {"mean": 0.0, "max": 2.0}
    for pool, weight in weights.items():
        assert GradCAM(network(), pool=pool).alpha(g).item() == weight
    assert GradCAM(network(), absolute=True).alpha(g).item() == 1.5
    assert GradCAM(network(), absolute=True, pool="max").alpha(g).item() == 3.0


def test_equals_class_activation_mapping_where_that_applies():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)
    )
    x, target = images(), torch.tensor([0, 3, 1])
    with GradCAM(model) as cam:
        raw, alpha = cam.raw(x, target), cam.weights(x, target)
    assert cam.layers == ["1"]
    maps, W = model[:2](x), model[4].weight
    torch.testing.assert_close(alpha, W[target] / 256, atol=1e-7, rtol=1e-5)
    expected = torch.einsum("nk,nkhw->nhw", W[target], maps).relu() / 256
    torch.testing.assert_close(raw, expected, atol=1e-6, rtol=0)
    peer = torchcam.CAM(model, "1", fc_layer="4")
    model(x)
    theirs = peer(target.tolist(), normalized=False)[0].relu() / 256
    peer.remove_hooks()
    torch.testing.assert_close(raw, theirs, atol=1e-6, rtol=0)


def test_scale_and_offset_of_the_score():
    cam, x = GradCAM(network()), images()
    raw, scaled = cam.raw(x, class_logit(2)), cam.raw(x, lambda output: 3 * output[:, 2])
    torch.testing.assert_close(scaled, 3 * raw, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(cam(x, lambda output: 3 * output[:, 2]), cam(x, 2), atol=1e-6, rtol=1e-5)
    assert torch.equal(cam.raw(x, lambda output: output[:, 2] + 7), raw)


def test_counterfactual_is_the_map_of_the_negated_score():
    cam, x = GradCAM(network(), "2"), images()
    for_it, against = cam.raw(x, 1), cam.raw(x, 1, counterfactual=True)
    assert min(for_it.max(), against.max()) > 0
    assert (for_it * against).max() == 0
    assert torch.equal(against, cam.raw(x, lambda output: -output[:, 1]))


def test_a_batch_is_its_samples_in_any_order():
    cam, x, target = GradCAM(network().double()), images(4, dtype=torch.float64), torch.tensor([3, 0, 0, 1])
    maps, order = cam(x, target), torch.tensor([2, 0, 3, 1])
    assert maps.dtype == torch.float64
    one_by_one = torch.cat([cam(x[n : n + 1], int(target[n])) for n in range(4)])
    torch.testing.assert_close(maps, one_by_one, atol=1e-12, rtol=0)
    torch.testing.assert_close(cam(x[order], target[order]), maps[order], atol=1e-12, rtol=0)


def test_several_targets_per_sample_share_one_forward_pass():
    model, x = network(), images()
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    targets = torch.tensor([[0, 4], [1, 1], [3, 2]])
    maps = GradCAM(model, "3")(x, targets)
    handle.remove()
    assert len(passes) == 1
    assert maps.shape == (3, 2, 16, 16)
    for t in range(2):
        torch.testing.assert_close(maps[:, t], GradCAM(model, "3")(x, targets[:, t]), atol=1e-6, rtol=0)


def test_no_target_is_the_predicted_class():
    model, x = network(), images()
    assert torch.equal(GradCAM(model)(x), GradCAM(model)(x, model(x).argmax(1)))


def test_no_gradient_is_a_zero_map():
    cam = GradCAM(network())
    for normalize in ("max", "minmax", None):
        assert torch.equal(cam(images(), lambda output: 0 * output[:, 1], normalize=normalize), torch.zeros(3, 16, 16))


def test_scaling_is_per_sample():
    cam, x = GradCAM(network(), relu=False), images()
    raw = cam(x, 2, normalize=None)
    top = raw.amax((1, 2), keepdim=True)
    torch.testing.assert_close(cam(x, 2), (raw / top).clamp_min(0) * (top > 0), atol=1e-6, rtol=0)
    low = raw.amin((1, 2), keepdim=True)
    torch.testing.assert_close(cam(x, 2, normalize="minmax"), (raw - low) / (top - low), atol=1e-6, rtol=1e-5)
    small = F.interpolate(cam.raw(x, 2).unsqueeze(1), (16, 16), mode="bilinear", align_corners=False).squeeze(1)
    torch.testing.assert_close(raw, small, atol=1e-7, rtol=0)


def small_vgg():
    """The features of VGG-11 with a fully connected head that is not as large."""
    vgg = torchvision.models.vgg
    parts = {"features": vgg.make_layers(vgg.cfgs["A"]), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, hidden=nn.Linear(2048, 64), relu=nn.ReLU(), classifier=nn.Linear(64, 10)))


ARCHITECTURES = {
    "resnet18": (torchvision.models.resnet18, "layer4"),
    "vgg11": (small_vgg, "features.19"),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, "features.12"),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), "bn2"),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), "stages.3"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_agrees_with_torchcam_and_pytorch_grad_cam(name):
    make, layer = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, x, target = make().eval(), images(2, (64, 64)), [5, 7]
    with GradCAM(model, layer) as cam:
        raw, maps = cam.raw(x, torch.tensor(target)), cam(x, torch.tensor(target), normalize="minmax")
    assert raw.max() > 0
    with torchcam.GradCAM(model, layer) as peer:
        theirs = peer(target, model(x), normalized=False)[0]
    torch.testing.assert_close(raw, theirs, atol=1e-6, rtol=1e-4)
    with PeerGradCAM(model, [model.get_submodule(layer)]) as peer:
        # it adds 1e-7 to what it divides by, too much for the small maps of untrained networks
        theirs = torch.from_numpy(peer(x, [lambda output, c=c: 1e4 * output[c] for c in target]))
    torch.testing.assert_close(maps, theirs, atol=1e-4, rtol=0)


def tokens_to_map(tokens):
    """What the user of pytorch-grad-cam has to write for a vision transformer with one class token."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def channels_to_front(features):
    return features.permute(0, 3, 1, 2)


TRANSFORMERS = {
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
        "blocks.1.norm1",
        tokens_to_map,
    ),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1), num_heads=(2, 4)),
        "layers.1.blocks.0",
        channels_to_front,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_agrees_with_pytorch_grad_cam_on_transformers_without_being_told_the_layout(name):
    make, layer, reshape = TRANSFORMERS[name]
    torch.manual_seed(0)
    model, x = make().eval(), images(2, (64, 64))
    maps = GradCAM(model, layer)(x, 3, normalize="minmax")
    with PeerGradCAM(model, [model.get_submodule(layer)], reshape_transform=reshape) as peer:
        theirs = torch.from_numpy(peer(x, [lambda output: 1e4 * output[3]] * 2))
    assert theirs.max() > 0.5
    torch.testing.assert_close(maps, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(GradCAM(model, layer, reshape=reshape)(x, 3, normalize="minmax"), maps)


@pytest.mark.parametrize(
    ("name", "prefix"), [("deit_tiny_distilled_patch16_224", 2), ("vit_little_patch16_reg4_gap_256", 4)]
)
def test_distillation_and_register_tokens_are_no_positions(name, prefix):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, depth=2, embed_dim=24, num_heads=2).eval()
    x = images(2, (64, 96)) if prefix == 4 else images(2, (64, 64))
    if prefix == 4:
        model.set_input_size((64, 96))
    with GradCAM(model) as cam:
        raw = cam.raw(x, 3)
    grid = (4, x.shape[3] // 16)
    by_hand = GradCAM(model, cam.layers[0], reshape=lambda t: t[:, prefix:].transpose(1, 2).unflatten(2, grid))
    assert raw.shape == (2, *grid)
    assert raw.max() > 0
    torch.testing.assert_close(raw, by_hand.raw(x, 3))


def test_activations_are_those_of_the_layer_although_the_network_overwrites_them():
    """torchvision's DenseNet applies an in-place ReLU to its last feature map: other libraries see what is left."""
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8).eval()
    model.classifier.weight.data.abs_()
    x, W = images(2, (32, 32)), model.classifier.weight[3].detach()
    before = model.features(x).detach()
    positions = before[0, 0].numel()
    slope = W.view(1, -1, 1, 1) * (before > 0) / positions  # of the logit with respect to the layer's true output
    expected = torch.einsum("nk,nkhw->nhw", slope.mean((2, 3)), before).relu()
    torch.testing.assert_close(GradCAM(model, "features.norm5").raw(x, 3), expected, atol=1e-6, rtol=1e-4)
    with torchcam.GradCAM(model, "features.norm5") as peer:
        theirs = peer([3, 3], model(x), normalized=False)[0]
    overwritten = torch.einsum("k,nkhw->nhw", W / positions, before.relu()).relu()
    torch.testing.assert_close(theirs, overwritten, atol=1e-6, rtol=1e-4)
    assert (theirs - expected).abs().max() > 0.05 * expected.max()


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activation_after_the_layer_changes_nothing(inplace):
    model = network()
    model[3] = nn.ReLU(inplace=inplace)
    expected = GradCAM(network(), "2").raw(images(), 1)
    assert torch.equal(GradCAM(model, "2").raw(images(), 1), expected)


class Captioner(nn.Module):
    """Word logits (N, L, V) from an image, by a recurrent decoder."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
        self.decoder, self.word = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 11)

    def forward(self, x):
        h = self.image(x).mean((2, 3))
        return self.word(self.decoder(h.unsqueeze(1).expand(-1, 4, -1))[0])


class QuestionNetwork(nn.Module):
    """Answer logits from an image and a question, which is data."""

    def __init__(self, question):
        super().__init__()
        self.question = question
        self.image, self.embedding = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU()), nn.Embedding(3, 8)
        self.answer = nn.Linear(8, 6)

    def forward(self, x):
        return self.answer(self.image(x).mean((2, 3)) * self.embedding(self.question))


def by_definition(model, layer, x, score):
    """Equations 1 and 2 by a hook of its own and plain autograd."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output))
    total = score(model.eval()(x)).sum()
    handle.remove()
    (g,) = torch.autograd.grad(total, kept)
    return (g.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()


def test_a_caption():
    torch.manual_seed(0)
    model, x, tokens = Captioner(), images(), torch.tensor([1, 2, 5, 4])
    raw = GradCAM(model, "image").raw(x, caption_logprob(tokens))
    words = [lambda output, t=t, w=w: output.log_softmax(-1)[:, t, w] for t, w in enumerate(tokens.tolist())]
    expected = by_definition(model, "image", x, lambda output: sum(word(output) for word in words))
    torch.testing.assert_close(raw, expected)
    assert torch.equal(raw, GradCAM(model, "image").raw(x, caption_logprob(tokens.expand(3, 4))))
    assert raw.max() > 0


def test_an_answer_to_a_question():
    torch.manual_seed(0)
    model, x = QuestionNetwork(torch.tensor([0, 1, 2])), images(1).expand(3, -1, -1, -1)
    raw = GradCAM(model, "image").raw(x, 2)
    torch.testing.assert_close(raw, by_definition(model, "image", x, class_logit(2)))
    assert not torch.allclose(raw[0], raw[1])


def test_a_region_of_a_segmentation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:6, 3:9] = True
    raw = GradCAM(model, "1").raw(images(), region_logit(2, mask))
    torch.testing.assert_close(
        raw,
        by_definition(model, "1", images(), lambda output: output[:, 2, 2:6, 3:9].sum((1, 2))),
        rtol=1e-4,
        atol=1e-6,
    )
    whole = GradCAM(model, "1").raw(images(), region_logit(2))
    assert torch.allclose(whole, GradCAM(model, "1").raw(images(), region_logit(2, torch.ones(3, 16, 16))))
    with pytest.raises(TypeError, match="such as region_logit for a segmentation network"):
        GradCAM(model, "1")(images(), 2)


class Detector(nn.Module):
    """Two boxes per image, as torchvision's detectors return them."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.score = nn.Linear(4, 2)

    def forward(self, x):
        scores = self.score(self.features(x).mean((2, 3))).sigmoid()
        boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": s} for s in scores]


def test_a_detection():
    torch.manual_seed(0)
    model, wanted = Detector(), torch.tensor([1.0, 0.0, 8.0, 8.0])
    raw = GradCAM(model, "features").raw(images(), detection_score(1, wanted))
    expected = by_definition(model, "features", images(), lambda output: torch.stack([o["scores"][0] for o in output]))
    torch.testing.assert_close(raw, expected)
    for label, box in ((2, wanted), (1, torch.tensor([8.0, 8.0, 16.0, 16.0]))):
        assert torch.equal(GradCAM(model, "features").raw(images(), detection_score(label, box)), torch.zeros_like(raw))


def test_similarity_of_embeddings_and_the_value_of_an_action():
    model, x = network(), images()
    reference = model(x[:1]).detach()[0]
    raw = GradCAM(model, "3").raw(x, embedding_similarity(reference))
    torch.testing.assert_close(
        raw,
        by_definition(model, "3", x, lambda output: F.cosine_similarity(output, reference[None])),
        atol=1e-6,
        rtol=1e-4,
    )
    assert torch.equal(GradCAM(model, "3").raw(x, q_value(4)), GradCAM(model, "3").raw(x, 4))


@pytest.mark.parametrize("flat", [False, True])
def test_one_logit_speaks_for_class_1_and_against_class_0(flat):
    model, x = network(classes=1), images()
    if flat:
        model.append(nn.Flatten(0))
    positive = GradCAM(model, "3").raw(x, 1)
    assert torch.equal(positive, GradCAM(model, "3").raw(x))
    assert torch.equal(GradCAM(model, "3").raw(x, 0), GradCAM(model, "3").raw(x, 1, counterfactual=True))
    with pytest.raises(ValueError, match="from 0 to 1, got \\[2\\]"):
        GradCAM(model, "3")(x, 2)


def test_several_labels():
    assert labels_over(torch.tensor([[1.0, -1.0, 0.2], [-1.0, -2.0, -3.0]])) == [[0, 2], []]
    assert labels_over(torch.tensor([[1.0, 0.2]]), threshold=0.6) == [[0]]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_models_and_contexts_without_gradients(context, frozen):
    model, expected = network(), GradCAM(network())(images(), 1)
    picture = GuidedGradCAM(network())(images(), 1)
    model.requires_grad_(not frozen)
    with context():
        x = images()
        assert torch.equal(GradCAM(model)(x, 1), expected)
        assert torch.equal(GuidedGradCAM(model)(x, 1), picture)


def test_volumes_series_and_images_that_are_not_square():
    torch.manual_seed(0)
    for kind, pool, size in (
        (nn.Conv1d, nn.AdaptiveAvgPool1d, (40,)),
        (nn.Conv2d, nn.AdaptiveAvgPool2d, (20, 36)),
        (nn.Conv3d, nn.AdaptiveAvgPool3d, (8, 10, 12)),
    ):
        model = nn.Sequential(kind(2, 4, 3, stride=2, padding=1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, 3))
        x = torch.rand(2, 2, *size)
        with GradCAM(model) as cam:
            raw = cam.raw(x, 1)
            assert cam(x, 1).shape == (2, *size)
        assert cam.layers == ["1"]
        expected = torch.einsum("k,nk...->n...", model[4].weight[1], model[:2](x)).relu() / raw[0].numel()
        torch.testing.assert_close(raw, expected, atol=1e-6, rtol=1e-4)
        assert GuidedBackprop(model)(x, 1).shape == x.shape


class Named(nn.Module):
    """Returns a dict."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return {"logits": self.inner(x), "aux": None}


def test_outputs_that_are_dicts_need_a_callable():
    maps = GradCAM(Named())(images(), lambda output: output["logits"][:, 3])
    assert torch.equal(maps, GradCAM(network())(images(), 3))
    with pytest.raises(TypeError, match="a dict with logits, aux, not a tensor of logits; pass a callable"):
        GradCAM(Named(), "inner.3")(images(), 3)


class Pairs(nn.Module):
    """A layer that returns a tuple."""

    def forward(self, x):
        return x, None


def test_a_layer_that_returns_a_tuple():
    model = network()
    model[3] = nn.Sequential(nn.ReLU(), Pairs())
    model[4] = nn.Sequential(First(), nn.Flatten())
    assert torch.equal(GradCAM(model, "3").raw(images(), 2), GradCAM(network(), "3").raw(images(), 2))


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_several_layers_are_averaged():
    model, x = network(), images()
    both = GradCAM(model, ["1", model[3]])
    assert both.layers == ["1", "3"]
    mean = (GradCAM(model, "1")(x, 2) + GradCAM(model, "3")(x, 2)) / 2
    torch.testing.assert_close(both(x, 2), mean / mean.amax((1, 2), keepdim=True), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="this explainer has 2"):
        both.raw(x, 2)


def test_a_layer_executed_several_times_is_taken_at_its_last():
    model = network()
    model[1] = model[3]
    assert torch.equal(GradCAM(model, "1").raw(images(), 2), GradCAM(network(), "3").raw(images(), 2))


def test_bfloat16_autocast():
    model, x = network(), images()
    with torch.autocast("cpu", torch.bfloat16):
        maps = GradCAM(model, "3")(x, 1)
    assert maps.isfinite().all()
    torch.testing.assert_close(maps.float(), GradCAM(model, "3")(x, 1), atol=0.05, rtol=0)


def state(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [b.clone() for b in model.buffers()],
    )


def assert_same_state(before, after):
    assert before[:2] == after[:2]
    assert before[3] == after[3]
    assert all(a is b for a, b in zip(before[2], after[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[4], after[4], strict=True))


def fail(_):
    raise RuntimeError("a target that fails")


def test_the_model_is_left_as_it_was_also_on_error():
    model, x = network(), images()
    model.insert(1, nn.BatchNorm2d(6))
    model.train()
    model[0].eval()
    model[0].bias.requires_grad_(False)
    model(x).sum().backward()
    before, copy = state(model), x.clone()
    explainers = [GradCAM(model), GradCAM(model, "2", rule="guided"), GuidedBackprop(model), GuidedGradCAM(model)]
    for explain in [*explainers, lambda *given: input_gradient(model, *given)]:
        with torch.no_grad():
            explain(x, 1)
        assert_same_state(before, state(model))
        with pytest.raises(RuntimeError, match="a target that fails"):
            explain(x, fail)
        assert_same_state(before, state(model))
        assert torch.is_grad_enabled()
    assert torch.equal(x, copy)


def test_batch_norm_does_not_couple_samples_of_a_model_in_training():
    model = network()
    model.insert(1, nn.BatchNorm2d(6))
    expected = GradCAM(model.eval())(images(), 1)
    assert torch.equal(GradCAM(model.train())(images(), 1), expected)


@pytest.mark.parametrize(
    ("layer", "target", "error", "message"),
    [
        ("3", fail, RuntimeError, "a target that fails"),
        ("features.3", 1, ValueError, "no layer 'features.3'; there are"),
        (nn.Linear(2, 2), 1, ValueError, "layer Linear is not a part of the model"),
        ("unused", 1, ValueError, "'unused' was not executed"),
        ([], 1, ValueError, "at least one layer"),
        ("3", 5, ValueError, "from 0 to 4, got \\[5\\]"),
        ("3", -1, ValueError, "from 0 to 4"),
        ("3", torch.tensor([1, 2]), ValueError, "\\(3,\\) or \\(3, T\\) classes; got shape \\(2, 1\\)"),
        ("3", torch.tensor([1.0, 2.0, 3.0]), TypeError, "class indices or a callable"),
        ("3", lambda output: output.sum(), ValueError, "one score per sample, shape \\(3,\\); it returned \\(\\)"),
        ("3", lambda output: output[:, 0].tolist(), ValueError, "it returned list"),
        ("3", lambda output: output.detach()[:, 0], ValueError, "does not depend on layer '3'"),
        ("side", 1, ValueError, "does not depend on layer 'side'"),
        ("7", 1, ValueError, "no map of positions"),
    ],
)
@pytest.mark.bare
def test_bad_layers_and_targets(layer, target, error, message):
    names = {"3": "inner.3", "7": "inner.7"}
    with pytest.raises(error, match=message.replace("'3'", "'inner.3'")):
        GradCAM(Holder(network()), names.get(layer, layer) if isinstance(layer, str) else layer)(images(), target)


class Holder(nn.Module):
    """A layer that is never executed, and one without influence on the output."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.unused, self.side = inner, nn.Identity(), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        self.side(x)
        return self.inner(x)


@pytest.mark.bare
def test_bad_input_and_settings():
    cam = GradCAM(network())
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.uint8"):
        cam(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 1)
    with pytest.raises(TypeError, match="floating-point tensor, got ndarray"):
        cam(np.zeros((1, 3, 16, 16)), 1)
    with pytest.raises(ValueError, match=r"got shape \(3, 16\)"):
        cam(torch.zeros(3, 16), 1)
    with pytest.raises(ValueError, match=r"got shape \(0, 3, 16, 16\)"):
        cam(torch.zeros(0, 3, 16, 16), 1)
    with pytest.raises(ValueError, match="'max', 'minmax' or None, got 'sum'"):
        cam(images(), 1, normalize="sum")
    with pytest.raises(TypeError, match="GradCAM has no option counterfactuals"):
        cam(images(), 1, counterfactuals=True)
    with pytest.raises(ValueError, match="pool must be 'mean' or 'max', got 'sum'"):
        GradCAM(network(), pool="sum")
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        GradCAM(fail)
    for make in (lambda: GuidedBackprop(network(), "lrp"), lambda: GradCAM(network(), rule="lrp").raw(images(), 1)):
        with pytest.raises(ValueError, match="'guided' or 'deconv', got 'lrp'"):
            make()
    with pytest.raises(ValueError, match=r"one score per sample, got 2"):
        GuidedBackprop(network())(images(), torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="does not depend on the input x"):
        input_gradient(network(), images(), lambda output: torch.zeros(3, requires_grad=True) + 1)


@pytest.mark.parametrize(("rule", "expected"), [("guided", [0, 0, 4.0]), ("deconv", [5.0, 0, 4]), (None, [0, -1.0, 4])])
def test_rules_at_a_relu(rule, expected):
    for relu in (F.relu, nn.ReLU(), torch.relu, torch.Tensor.relu):
        x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        with ReLURule(rule) if rule else torch.enable_grad():
            y = relu(x)
        assert y.tolist() == [0, 2, 3]
        (g,) = torch.autograd.grad(y, x, torch.tensor([5.0, -1.0, 4.0]))
        assert g.tolist() == expected


def test_rules_at_a_relu6():
    for relu in (nn.ReLU6(), nn.Hardtanh(0, 6), F.relu6):
        x = torch.tensor([-1.0, 2.0, 7.0, 3.0], requires_grad=True)
        with ReLURule("guided") as rule:
            y = relu(x)
        assert rule.met == 1
        assert y.tolist() == [0, 2, 6, 3]
        assert torch.autograd.grad(y, x, torch.tensor([1.0, 2, 3, -4]))[0].tolist() == [0, 2, 0, 0]
    with ReLURule("guided") as rule:
        assert nn.Hardtanh()(torch.tensor([-0.5])).item() == -0.5
    assert rule.met == 0


class InPlace(nn.Module):
    """Rectifies the input of `relu` itself, and adds it."""

    def __init__(self, relu):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.relu = nn.Linear(6, 6), nn.Linear(6, 3), relu

    def forward(self, x):
        x = self.first(x)
        rectified = self.relu(x)
        return self.last((x if rectified is None else rectified + x).mean((1, 2)))


def statement(x):
    x.relu_()


@pytest.mark.parametrize(
    "relu",
    [statement, nn.ReLU(inplace=True), torch.relu_, lambda x: F.relu(x, True), lambda x: F.hardtanh_(x, 0.0, 9e9)],
)
def test_the_rule_leaves_in_place_functions_in_place(relu):
    model, x = InPlace(relu), torch.randn(2, 3, 6, 6)
    with ReLURule("guided"):
        assert torch.equal(model(x), InPlace(relu)(x))
    assert GuidedBackprop(model)(x, 1).shape == x.shape


class Functional(nn.Module):
    """`network()` with functions in place of modules."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        for part in self.inner:
            x = F.relu(x) if isinstance(part, nn.ReLU) else part(x)
        return x


@pytest.mark.parametrize(("rule", "peer"), [("guided", CaptumGuided), ("deconv", Deconvolution)])
@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_agrees_with_captum_also_where_relus_are_functions(rule, peer):
    x = images()
    found = GuidedBackprop(network(), rule)(x, 2)
    torch.testing.assert_close(found, peer(network()).attribute(x.clone(), target=2), atol=1e-6, rtol=1e-4)
    assert torch.equal(found, GuidedBackprop(Functional(), rule)(x, 2))


def test_input_gradient_is_that_of_autograd():
    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(network()(x)[:, 2].sum(), x)
    torch.testing.assert_close(input_gradient(network(), images(), 2), expected)


def test_networks_without_relu_have_no_guided_gradient():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Sequential has no ReLU, for which the guided rule is defined"):
        GuidedBackprop(model)(images(), 1)


def test_guided_gradcam_is_the_product():
    model, x = network(), images()
    with GuidedGradCAM(model) as explain, GuidedBackprop(model) as backprop, GradCAM(model) as cam:
        picture = explain(x, 2)
        assert torch.equal(picture, backprop(x, 2) * cam(x, 2).unsqueeze(1))
    deconv = GuidedGradCAM(model, "3", rule="deconv")(x, 2)
    assert torch.equal(deconv, GuidedBackprop(model, "deconv")(x, 2) * cam(x, 2).unsqueeze(1))


def test_rule_in_the_weights():
    """The gradient of the logit at the layer passes the ReLU of the head by the rule."""
    model, x = network(), images()
    A = model[:4](x).detach()
    hidden = model[4:6](A)
    grad_out = model[7].weight[2].clamp_min(0)
    g = ((grad_out * (hidden > 0)) @ model[5].weight).view_as(A)
    expected = (g.mean((2, 3), keepdim=True) * A).sum(1).relu()
    torch.testing.assert_close(GradCAM(model, "3", rule="guided").raw(x, 2), expected, atol=1e-6, rtol=1e-4)


def concepts(n=12, size=12):
    """Images whose channels are masks of three concepts; the units of `Units` see one, two and none of them."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(n, 3, size, size, dtype=torch.bool)
    for number in range(n):
        for m in range(3):
            r, c = torch.randint(size - 3, (2,), generator=generator)
            masks[number, m, r : r + 4, c : c + 4] = True
    return masks


class Units(nn.Module):
    """Unit 0 sees concept 1, unit 1 concept 0 weakly, unit 2 nothing, unit 3 noise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        noise = torch.rand(x[:, 0].shape, generator=torch.Generator().manual_seed(3))
        return self.layer(torch.stack([x[:, 1], 0.1 * x[:, 0], torch.zeros_like(noise), noise], 1)).mean((2, 3))


def test_units_are_named_by_their_concept():
    masks = concepts()
    names = NeuronNames(quantile=0.05, min_iou=0.3).fit(Units(), "layer", masks.float(), masks, ["hat", "bag", "shoe"])
    assert names.names_ == ["bag", "hat", None, None]
    torch.testing.assert_close(names.iou_[0, 1], torch.tensor(1.0))
    assert names.iou_[2].max() == 0  # a unit that is silent everywhere has no region
    assert NeuronNames(0.05, 0.3).fit(Units(), "layer", masks.float(), masks).names_[0] == "1"


def test_thresholds_leave_the_quantile_above_whatever_the_batch():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(720, 2)), torch.rand(20, 3, 12, 12)
    masks = torch.rand(20, 2, 12, 12) > 0.5
    small, whole = (NeuronNames(0.02, batch_size=size).fit(model, "0", x, masks) for size in (3, 64))
    torch.testing.assert_close(small.thresholds_, whole.thresholds_)
    torch.testing.assert_close(small.iou_, whole.iou_, atol=1e-4, rtol=0)
    values = model[0](x).movedim(1, 0).flatten(1)
    above = (values > whole.thresholds_.unsqueeze(1)).sum(1)
    assert (above - round(0.02 * 20 * 144)).abs().max() <= 1


def test_explanation_in_words():
    weights = torch.tensor([[0.3, -0.1, 0.5, 0.0, -0.2, 0.9], [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    names = ["bed", "sink", "lamp", "door", "stove", None]
    first, second = textual_explanation(weights, names, k=2)
    assert first == {"for": ["lamp", "bed"], "against": ["stove", "sink"]}
    assert second == {"for": [], "against": ["bed"]}


@pytest.mark.bare
def test_bad_probe_sets():
    masks = concepts()
    with pytest.raises(ValueError, match="quantile must be in \\(0, 1\\), got 1.5"):
        NeuronNames(1.5)
    with pytest.raises(ValueError, match="concept_masks must be"):
        NeuronNames().fit(Units(), "layer", masks.float(), masks[:3])
    with pytest.raises(ValueError, match="concepts must name 3 masks, got 1"):
        NeuronNames().fit(Units(), "layer", masks.float(), masks, ["hat"])
    with pytest.raises(ValueError, match="no layer 'nowhere'"):
        NeuronNames().fit(Units(), "nowhere", masks.float(), masks)
    with pytest.raises(ValueError, match="one entry per unit, 2, got 1"):
        textual_explanation(torch.zeros(1, 2), ["bed"])


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))


def test_a_callable_that_knows_each_sample_finds_its_layer():
    model, x, labels = small(), torch.rand(3, 3, 8, 8), torch.tensor([4, 0, 2])
    with GradCAM(model) as cam:
        maps = cam(x, lambda output: output[torch.arange(3), labels])
    assert cam.layers == ["1"]
    torch.testing.assert_close(maps, GradCAM(model, "1")(x, labels))
    assert GradCAM(model)(x, labels.tolist()).shape == (3, 8, 8)


def test_the_first_module_may_work_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), *small())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(GradCAM(model)(x.clone(), 1), GradCAM(model, "2")(x, 1))


def test_maps_under_autocast_are_those_of_full_precision_formulas():
    model, x = small(), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        maps = GradCAM(model, "1").raw(x, 1)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, GradCAM(model, "1").raw(x, 1), atol=2e-2, rtol=5e-2)


@pytest.mark.bare
def test_targets_made_in_inference_mode_and_single_images():
    model, x = small(), torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        maps = GradCAM(model, "1")(x, torch.tensor([1, 2]))
    torch.testing.assert_close(maps, GradCAM(model, "1")(x, torch.tensor([1, 2])))
    with pytest.raises(ValueError, match=r"x must be a batch, .* got one sample \(3, 8, 8\): pass x.unsqueeze\(0\)"):
        GradCAM(model, "1")(x[0], 1)


def test_a_map_that_is_not_a_number_stays_one():
    from classact.explain import normalize_map

    maps = normalize_map(torch.stack([torch.full((2, 2), torch.nan), torch.ones(2, 2), -torch.ones(2, 2)]))
    assert maps[0].isnan().all()
    assert maps[1].eq(1).all()
    assert maps[2].eq(0).all()
