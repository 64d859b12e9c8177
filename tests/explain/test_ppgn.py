import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.explain.ppgn.networks import FeatureGenerator, LatentDAE
from classact.explain.ppgn.sampler import (
    EPS,
    CallableCondition,
    CaptionCondition,
    ClassCondition,
    DAEPrior,
    JointPrior,
    NeuronCondition,
    PPGNSampler,
    ZeroPrior,
    dgn_am,
    joint_ppgn_h,
    noiseless_joint_ppgn_h,
    ppgn_h,
    ppgn_x,
    sample_neuron,
)

CODE, CLASSES = 6, 4
NO_CONDITION = CallableCondition(lambda x: 0 * x.flatten(1).sum(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_generator():
    torch.manual_seed(1)
    return FeatureGenerator(CODE, (16,), (4, 4, 4), (2,), (), crop=None, output="sigmoid")


def small_classifier():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, CLASSES)
    )


def small_encoder():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, CODE), nn.ReLU())


def networks():
    return small_generator(), small_encoder(), small_classifier()


def chain(precision, e):
    """Stationary mean and variance of 20,000 chains whose gradient of log p is -precision s."""
    prior = DAEPrior(lambda s: s - precision * s)
    sampler = PPGNSampler(None, NO_CONDITION, prior, (e, 0.0, math.sqrt(2 * e)), shape=(1,))
    s = sampler.sample(20_000, 150, generator=seeded()).codes
    return s.mean().item(), s.var().item()


@pytest.mark.parametrize(("precision", "e", "expected"), [(2, 0.1, 0.555556), (1, 0.05, 1.025641), (4, 0.1, 0.3125)])
def test_langevin_chain_has_the_variance_of_its_difference_equation(precision, e, expected):
    assert expected == pytest.approx(1 / (precision * (1 - e * precision / 2)), abs=1e-6)
    mean, variance = chain(precision, e)
    assert mean == pytest.approx(0, abs=0.02)
    assert variance == pytest.approx(expected, abs=0.02)


def test_prior_and_condition_meet_in_the_posterior():
    seen = CallableCondition(lambda x: -0.5 * (x - 2).square().sum(1))
    sampler = PPGNSampler(None, seen, DAEPrior(torch.zeros_like), (0.05, 0.05, math.sqrt(0.1)), shape=(1,))
    s = sampler.sample(20_000, 150, generator=seeded()).codes
    assert s.mean().item() == pytest.approx(1, abs=0.02)
    assert s.var().item() == pytest.approx(1 / (2 * (1 - 0.05)), abs=0.02)


def test_linear_autoencoder_gives_the_gradient_of_the_smoothed_density():
    from classact.explain.ppgn.training import fit_latent_dae

    sigma = 0.5
    R = fit_latent_dae(torch.randn(4096, 1, generator=seeded()), sigma, (), seed=0, epochs=10, lr=1e-2)
    slope = R.layers[0].weight.item()
    assert slope == pytest.approx(1 / (1 + sigma**2), abs=0.01)
    s = torch.tensor([[2.0]])
    assert DAEPrior(R, sigma)(s).item() == pytest.approx(-2 / (1 + sigma**2), abs=0.1)
    torch.testing.assert_close(DAEPrior(R)(s), sigma**2 * DAEPrior(R, sigma)(s))


def test_without_prior_and_noise_it_is_gradient_ascent():
    G, _, C = networks()
    start = torch.randn(3, CODE, generator=seeded())
    C.eval()
    s = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([s], lr=0.7, maximize=True)
    states = [start]
    for _ in range(5):
        optimizer.zero_grad()
        C(G(s)).log_softmax(1)[:, 2].sum().backward()
        optimizer.step()
        states.append(s.detach().clone())
    condition = ClassCondition(C, 2)
    found = dgn_am(G, condition, (0.0, 0.7, 0.0), clip=None).sample(3, 5, start, return_chain=True)
    assert found.step.tolist() == [t for t in range(6) for _ in range(3)]
    assert found.chain.tolist() == [0, 1, 2] * 6
    torch.testing.assert_close(found.codes, torch.cat(states))
    torch.testing.assert_close(found.images, G(found.codes).detach())
    torch.testing.assert_close(found.log_prob, C(found.images).log_softmax(1)[:, 2].detach())


def test_variants_are_settings_of_one_update():
    G, E, C = networks()
    condition, start = ClassCondition(C, 1), torch.rand(3, CODE, generator=seeded())
    plain = dgn_am(G, condition).sample(3, 5, start)
    R = LatentDAE(CODE, (8,))
    for other in (
        joint_ppgn_h(G, E, condition, EPS["dgn-am"]),
        ppgn_h(G, condition, R, EPS["dgn-am"]),
        noiseless_joint_ppgn_h(G, E, condition, (0.0, 1.0, 0.0)),
    ):
        assert torch.equal(other.sample(3, 5, start).codes, plain.codes)
    through_images = ppgn_x(condition, lambda x: 0.9 * x, (0.1, 0.05, 0.0), shape=(2, 8, 8))
    as_codes = ppgn_h(nn.Identity(), condition, lambda x: 0.9 * x, (0.1, 0.05, 0.0), clip=None, shape=(2, 8, 8))
    x = torch.rand(3, 2, 8, 8, generator=seeded())
    assert torch.equal(through_images.sample(3, 4, x).images, as_codes.sample(3, 4, x).images)
    assert [EPS[v] for v in ("ppgn-x", "noiseless-joint-ppgn-h")] == [(1, 1e5, 17.5), (1e-5, 1, 1e-17)]


def one_step(**options):
    G, E, C = networks()
    start = torch.rand(3, CODE, generator=seeded()) + 1
    options = {"eps": (0.3, 1.0, 0.0), "clip": None, **options}
    return start, joint_ppgn_h(G, E, ClassCondition(C, 1), **options).sample(3, 1, start, seeded(1)).codes


def test_step_is_the_sum_of_its_terms():
    G, E, C = networks()
    C.eval()
    start, s = one_step(eps=(0.3, 2.0, 0.5))
    h = start.clone().requires_grad_()
    C(G(h)).log_softmax(1)[:, 1].sum().backward()
    noise = torch.randn(3, CODE, generator=seeded(1))
    torch.testing.assert_close(s, (start + 0.3 * (E(G(start)) - start) + 2 * h.grad + 0.5 * noise).detach())


def test_normalized_step_has_mean_length_lr_and_only_ratios_count():
    start, s = one_step(step="normalized", lr=0.25)
    torch.testing.assert_close((s - start).abs().mean(1), torch.full((3,), 0.25))
    torch.testing.assert_close(one_step(step="normalized", lr=0.25, eps=(0.3e-3, 1e-3, 0.0))[1], s)
    unit = one_step()[1] - start
    torch.testing.assert_close(s - start, 0.25 * unit / unit.abs().mean(1, keepdim=True))


REFERENCE = Path(__file__).parent / "data" / "ppgn_reference.npz"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("class", {"eps": (0.1, 1.0, 0.0)}),
        ("decay", {"eps": (1e-3, 1.0, 0.0), "lr_end": 1e-10}),
        ("inpaint", {"eps": (0.1, 1.0, 0.0), "lr_end": 1e-32, "eps4": 0.05}),
    ],
)
def test_agrees_with_the_authors_sampler(name, options):
    found = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE).items()}
    A, B, W1, W2 = (found[key] for key in ("A", "B", "W1", "W2"))
    sampler = noiseless_joint_ppgn_h(
        lambda h: torch.tanh(h @ A.T / 4).view(-1, 3, 8, 8)[:, :, 1:7, 1:7],
        lambda x: torch.relu(x.flatten(1) @ B.T),
        ClassCondition(lambda x: torch.tanh(x.flatten(1) @ W1.T) @ W2.T, 2),
        step="normalized",
        grad="release",
        **options,
    )
    if name == "inpaint":
        images = sampler.inpaint(found["known"], found["mask"].bool()[None, :1], 12, found["start"]).images
    else:
        images = sampler.sample(1, 12, found["start"], return_chain=True).images
    torch.testing.assert_close(images, found[name][-len(images) :], rtol=1e-8, atol=1e-9)  # 1e-10 in their softmax


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_the_class_condition(seed):
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    condition = ClassCondition(nn.Identity(), 0)
    for grad, expected in (("logprob", [0.334759, -0.244728, -0.090031]), ("release", [0.334759, 0.0, 0.0])):
        objective, log_p = condition.objective(logits, grad)
        (found,) = torch.autograd.grad(objective.sum(), logits)
        torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-6, rtol=0)
        torch.testing.assert_close(log_p, logits.log_softmax(1)[:, 0])
    C = small_classifier().eval()
    x = torch.randn(5, 2, 8, 8, generator=seeded(seed), requires_grad=True)
    y = torch.randint(CLASSES, (5,), generator=seeded(seed))
    (ours,) = torch.autograd.grad(ClassCondition(C, y)(x).sum(), x)
    (theirs,) = torch.autograd.grad(-F.cross_entropy(C(x), y, reduction="sum"), x)
    torch.testing.assert_close(ours, theirs)


def test_neuron_of_the_last_layer_is_the_class():
    C = small_classifier().eval()
    x, y = torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    for layer in ("5", C[5]):
        assert torch.equal(NeuronCondition(C, layer, y)(x), ClassCondition(C, y)(x))


def test_neuron_is_a_softmax_over_the_channels_at_a_position():
    C = small_classifier().eval()
    x = torch.randn(5, 2, 8, 8)
    found = NeuronCondition(C, "0", 3, (2, 4))(x)
    torch.testing.assert_close(found, C[0](x)[:, :, 2, 4].log_softmax(1)[:, 3])
    assert not any(part._forward_hooks for part in C.modules())


class Captions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.look, self.words = nn.Linear(128, 8), nn.Embedding(7, 8)
        self.speak, self.choose = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 7)

    def forward(self, x, previous):
        return self.choose(self.speak(self.words(previous), self.look(x.flatten(1)).unsqueeze(0))[0])


def test_caption_is_the_sum_over_its_words():
    model, x, words = Captions(), torch.randn(3, 2, 8, 8), [4, 2, 0]
    expected = torch.zeros(3)
    for t, word in enumerate(words):
        previous = torch.tensor([0, *words[:t]]).expand(3, -1)
        expected = expected + model(x, previous)[:, -1].log_softmax(1)[:, word]
    torch.testing.assert_close(CaptionCondition(model, words)(x), expected)
    each = torch.tensor([[4, 2, 0], [1, 1, 0], [6, 5, 0]])
    torch.testing.assert_close(CaptionCondition(model, each)(x)[0], expected[0])


def test_plug_and_play_replaces_the_condition_only():
    G, E, C = networks()
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, 0), (0.001, 5.0, 0.0))
    start = torch.rand(2, CODE, generator=seeded())
    for condition in (
        NeuronCondition(C, "0", 1, (0, 0)),
        CaptionCondition(Captions(), [4, 2, 0]),
        ClassCondition(C, 3),
    ):
        other = replace(sampler, condition=condition)
        before, after = (other.sample(2, steps, start).log_prob for steps in (0, 20))
        assert (after > before).all()


def test_joint_prior_is_zero_where_encoder_inverts_generator():
    s = torch.randn(4, CODE)
    assert not JointPrior(nn.Identity(), nn.Identity())(s).any()
    G, E, _ = networks()
    torch.testing.assert_close(JointPrior(G, E)(s), (E(G(s)) - s).detach())


def test_same_seed_same_chain_and_chains_are_independent():
    G, E, C = networks()
    sampler = joint_ppgn_h(G, E, ClassCondition(C, 1), (0.1, 1.0, 0.3))
    first, again, other = (sampler.sample(4, 10, generator=seeded(s)).codes for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    start = torch.randn(4, CODE)
    moved = start.clone()
    moved[1:] += 1
    a, b = (sampler.sample(4, 10, init, seeded()).codes for init in (start, moved))
    torch.testing.assert_close(a[0], b[0])
    quiet = replace(sampler, eps=(0.1, 1.0, 0.0))
    torch.testing.assert_close(quiet.sample(4, 10, start).codes[:1], quiet.sample(1, 10, start[:1]).codes)


class Broken(nn.Module):
    def forward(self, x):
        return x.flatten(1) / 0


def test_networks_are_left_as_they_were():
    G, E, C = networks()
    C.train()
    G.layers[0].weight.requires_grad_(False)
    before = [p.clone() for p in C.parameters()], C[4].running_mean.clone()
    sampler = joint_ppgn_h(G, E, NeuronCondition(C, "0", 1, (0, 0)), (0.1, 1.0, 0.1))
    sampler.sample(2, 3)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        replace(sampler, condition=ClassCondition(Broken(), 1)).sample(2, 3)
    sampler.inpaint(torch.rand(2, 2, 8, 8), torch.rand(2, 1, 8, 8) > 0.5, 3)
    assert all(torch.equal(p, q) for p, q in zip(C.parameters(), before[0], strict=True))
    assert torch.equal(C[4].running_mean, before[1])
    for network in (G, E, C):
        assert all(p.grad is None for p in network.parameters())
        assert all(part.training for part in network.modules())
        assert not any(part._forward_hooks for part in network.modules())
    assert [p.requires_grad for p in G.parameters()] == [False] + [True] * 5


def test_kept_states_are_those_above_the_probability():
    G, E, C = networks()
    sampler = joint_ppgn_h(G, E, ClassCondition(C, 1), (0.1, 1.0, 0.3))
    every = sampler.sample(5, 10, generator=seeded(), return_chain=True, every=4)
    assert every.step.unique().tolist() == [0, 4, 8, 10]
    level = every.log_prob.median().exp().item()
    kept = sampler.sample(5, 10, generator=seeded(), keep=level, every=4)
    chosen = every.log_prob.exp() > level
    assert 0 < chosen.sum() < len(chosen)
    for ours, theirs in zip(kept, every, strict=True):
        assert torch.equal(ours, theirs[chosen])
    nothing = sampler.sample(5, 10, keep=1.0)
    assert nothing.images.shape == (0, 2, 8, 8)


def test_chains_start_anew_and_redraw_their_weight_of_the_prior():
    eps, pulls = (0.0, 0.0, 0.0), []

    class Pull(ZeroPrior):
        def __call__(self, s):
            return torch.ones_like(s)

    sampler = PPGNSampler(None, NO_CONDITION, Pull(), eps, shape=(2,))
    found = sampler.sample(50, 11, generator=seeded(), reset_every=5, redraw=(0.1, 0.2), return_chain=True)
    states = found.codes.view(12, 50, 2)
    assert torch.equal(states[0], states[5]) and not torch.equal(states[5], states[6])
    pulls = (states[7] - states[6])[:, 0]
    torch.testing.assert_close(states[10] - states[9], (states[7] - states[6]))
    assert pulls.min() >= 0.1 - 1e-5 and pulls.max() <= 0.2 + 1e-5 and pulls.std() > 0.02
    assert (states[11] - states[6]).abs().amin() > 1e-3


def test_set_of_a_neuron_comes_from_several_starts():
    G, E, C = networks()
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, 0))
    neuron = NeuronCondition(C, "5", 2)
    found = sample_neuron(sampler, neuron, 3, steps=30, reset_every=10, every=10, keep=0.0, generator=seeded())
    assert found.step.unique().tolist() == [0, 10, 20, 30]
    torch.testing.assert_close(found.log_prob, ClassCondition(C.eval(), 2)(found.images).detach())


def hole():
    image, mask = torch.rand(3, 2, 8, 8, generator=seeded()), torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:5, 3:7] = True
    return image, mask


def test_inpainting_keeps_the_known_pixels():
    G, E, C = networks()
    image, mask = hole()
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, 1), (0.1, 1.0, 0.0), eps4=0.1, lr_end=0.0)
    found = sampler.inpaint(image.masked_fill(mask, math.nan).nan_to_num(7.0), mask, 10, torch.rand(3, CODE))
    known = (~mask).expand_as(image)
    assert torch.equal(found.images[known], image[known])
    torch.testing.assert_close(found.images[~known], G(found.codes)[~known].detach())
    from_code = sampler.inpaint(image, mask, 0)
    torch.testing.assert_close(from_code.codes, E(image.masked_fill(mask, 0)).detach())


def test_inpainting_step_is_that_of_the_released_code():
    G, E, C = networks()
    C.eval()
    image, mask = hole()
    context, start = image.masked_fill(mask, 0), torch.rand(3, CODE, generator=seeded())
    h = start.clone().requires_grad_()
    x = G(h)
    x_in = (x * mask + context).detach().requires_grad_()
    (d_class,) = torch.autograd.grad(C(x_in).log_softmax(1)[:, 1].sum(), x_in)
    cotangent = 2.0 * d_class * mask + 0.3 * (context - x.detach()) * ~mask
    (gradient,) = torch.autograd.grad(x, h, cotangent)
    expected = start + 0.1 * (E(x_in) - start) + gradient
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, 1), (0.1, 2.0, 0.0), eps4=0.3, clip=None)
    torch.testing.assert_close(sampler.inpaint(image, mask, 1, start).codes, expected.detach())


def test_class_gradient_is_zero_outside_the_hole():
    image, mask = hole()
    everywhere = CallableCondition(lambda x: x.flatten(1).sum(1))
    sampler = PPGNSampler(nn.Identity(), everywhere, ZeroPrior(), (0.0, 1.0, 0.0))
    moved = sampler.inpaint(image, mask, 1, torch.zeros_like(image)).codes
    assert torch.equal(moved, mask.expand_as(image).float())


def test_context_error_falls_with_every_small_step():
    G, E, C = networks()
    image, mask = hole()
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, 1), (0.0, 0.0, 0.0), eps4=0.1, clip=None)
    codes, errors = torch.rand(3, CODE, generator=seeded()), []
    for _ in range(8):
        errors.append((G(codes) - image).masked_fill(mask, 0).square().flatten(1).sum(1))
        codes = sampler.inpaint(image, mask, 1, codes).codes
    assert (torch.stack(errors).diff(dim=0) < 0).all()


def test_generator_of_the_released_size():
    with torch.device("meta"):
        G = FeatureGenerator()
    assert G(torch.empty(2, 4096, device="meta")).shape == (2, 3, 227, 227)
    shapes = [tuple(layer.weight.shape) for layer in G.layers if hasattr(layer, "weight")]
    assert shapes[:3] == [(4096, 4096)] * 3
    widths = [(256, 256, 4), (256, 512, 3), (512, 256, 4), (256, 256, 3), (256, 128, 4), (128, 128, 3)]
    assert [(a, b, k) for a, b, k, _ in shapes[3:]] == [*widths, (128, 64, 4), (64, 32, 4), (32, 3, 4)]
    with torch.device("meta"):
        R = LatentDAE()
    assert [layer.out_features for layer in R.layers[::2]] == [2048, 1024, 500, 1024, 2048, 4096]


@pytest.mark.parametrize("make", [small_generator, lambda: LatentDAE(CODE, (5, 4))])
def test_round_trip_through_safetensors(make, tmp_path):
    network = make()
    loaded = classact.load(classact.save(network, tmp_path / "m"), type(network)(**network.config))
    h = torch.randn(2, CODE)
    assert torch.equal(loaded(h), network(h))


def test_bfloat16_autocast():
    G, E, C = networks()
    with torch.autocast("cpu", torch.bfloat16):
        found = joint_ppgn_h(G, E, ClassCondition(C, 1), (0.1, 1.0, 0.1)).sample(2, 5)
    assert found.codes.dtype == found.log_prob.dtype == torch.float32
    assert found.codes.isfinite().all()


@pytest.mark.bare
@pytest.mark.parametrize("make", [small_generator, lambda: LatentDAE(CODE, (5, 4))])
def test_networks_compile_and_export(make):
    network, h = make(), torch.randn(2, CODE)
    expected = network(h)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(h), expected)
    torch.testing.assert_close(torch.export.export(network, (h,)).module()(h), expected)


def training_networks():
    torch.manual_seed(0)
    E1 = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU())
    E2 = nn.Sequential(nn.Flatten(), nn.Linear(27, CODE), nn.ReLU())
    D = nn.Sequential(nn.Flatten(), nn.Linear(128, 1))
    return small_generator(), E1, E2, D


WEIGHTS = (1.0, 0.5, 0.25, 2.0)


def test_loss_of_the_generator_is_the_weighted_sum():
    from classact.explain.ppgn.training import PPGNGeneratorModule

    G, E1, E2, D = training_networks()
    module = PPGNGeneratorModule(G, E1, E2, D, WEIGHTS).train()
    assert G.training and D.training and not E1.training and not E1[1].training
    x = torch.rand(4, 2, 8, 8)
    loss, terms, drawn = module.generator_loss(x)
    h1, h = E1(x), E2(E1(x))
    torch.testing.assert_close(drawn, G(h))
    parts = [(drawn - x), (E1(drawn) - h1), (E2(E1(drawn)) - h)]
    expected = [part.square().sum() / 4 for part in parts] + [-D(drawn).sigmoid().log().mean()]
    torch.testing.assert_close(list(terms.values()), expected)
    torch.testing.assert_close(loss, sum(w * e for w, e in zip(WEIGHTS, expected, strict=True)))


def test_noise_of_the_joint_variant_is_relative_to_the_mean_activation():
    from classact.explain.ppgn.training import PPGNGeneratorModule

    identity = nn.Identity()
    module = PPGNGeneratorModule(identity, identity, identity, None, (1.0, 0.0, 0.0, 0.0), noise=0.1)
    x = 5 * torch.ones(200, 1, 10, 10)
    torch.manual_seed(0)
    assert (module.code(x) - x).std().item() == pytest.approx(0.5 * math.sqrt(3), rel=0.02)
    plain = PPGNGeneratorModule(identity, identity, identity, None, (1.0, 0.0, 0.0, 0.0))
    assert torch.equal(plain.code(x), x)


def test_generator_learns_and_leaves_the_encoder_alone():
    from classact.explain.ppgn.training import fit_generator

    curves = []
    for _ in range(2):
        G, E1, E2, D = training_networks()
        E1.train()
        statistics = E1[1].running_mean.clone()
        x = torch.rand(64, 2, 1, 1, generator=seeded()).expand(-1, -1, 8, 8)
        history = fit_generator(
            x, G, E1, E2, D, seed=0, epochs=3, batch_size=16, weights=(1.0, 0.01, 0.01, 0.01), lr=1e-2, noise=0.01
        )
        curves.append(history.curves)
    assert curves[0] == curves[1]
    assert curves[0]["img"][-1] < curves[0]["img"][0]
    assert torch.equal(E1[1].running_mean, statistics) and E1.training and not G.training
    assert all(p.requires_grad and p.grad is None for p in (*E1.parameters(), *E2.parameters()))


def test_discriminator_pauses_while_it_wins():
    from classact.explain.ppgn.training import fit_generator

    for pause, moves in ((0.0, True), (1e9, False)):
        G, E1, E2, D = training_networks()
        before = D[1].weight.detach().clone()
        fit_generator(
            torch.rand(16, 2, 8, 8), G, E1, E2, D, seed=0, epochs=1, batch_size=8, weights=WEIGHTS, pause=pause
        )
        assert torch.equal(D[1].weight, before) != moves


@pytest.mark.parametrize("variant", list(EPS))
def test_fit_makes_what_each_variant_samples_with(variant):
    from classact.explain.ppgn.training import fit_ppgn

    G, E1, E2, _ = training_networks()
    x = torch.rand(16, 2, 8, 8)
    fitted = fit_ppgn(
        x, E1, E2, variant, seed=0, G=G, hidden=(8,), dae_epochs=1, epochs=1, batch_size=8, weights=(1.0, 1.0, 1.0, 0.0)
    )
    sampler = fitted.sampler(ClassCondition(small_classifier(), 1))
    assert sampler.eps == EPS[variant]
    assert sampler.sample(2, 2, generator=seeded()).images.shape == (2, 2, 8, 8)
    assert type(fitted.prior).__name__ == {"dgn-am": "ZeroPrior", "ppgn-x": "DAEPrior", "ppgn-h": "DAEPrior"}.get(
        variant, "JointPrior"
    )


def sampler_with(**options):
    arguments = {"generator": None, "condition": NO_CONDITION, "prior": ZeroPrior(), "eps": (0.0, 1.0, 0.0), **options}
    return PPGNSampler(**arguments)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": (-1.0, 1.0, 0.0)}, "eps: expected three finite numbers of at least 0"),
        ({"eps": (1.0, 1.0)}, "eps: expected three"),
        ({"eps4": -1.0}, "eps4: expected a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr: expected a finite number"),
        ({"step": "sgd"}, "step: expected 'langevin' or 'normalized', got 'sgd'"),
        ({"grad": "logit"}, "grad: expected 'logprob' or 'release', got 'logit'"),
        ({"clip": (1.0, 0.0)}, "clip: expected a range"),
        ({"prior": JointPrior(nn.Identity(), nn.Identity())}, "prior: a joint prior needs the generator"),
    ],
)
def test_bad_samplers(options, message):
    with pytest.raises(ValueError, match=message):
        sampler_with(**options)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "steps": 1}, "n: expected at least 1, got 0"),
        ({"n": 1, "steps": -1}, "steps: expected at least 0, got -1"),
        ({"n": 1, "steps": 1, "every": 0}, "every: expected at least 1, got 0"),
        ({"n": 1, "steps": 1, "redraw": (2.0, 1.0)}, "redraw: expected a range"),
        ({"n": 2, "steps": 1, "init": torch.zeros(3, CODE)}, r"init: expected shape \(2, 6\), got \(3, 6\)"),
        ({"n": 2, "steps": 1, "init": torch.zeros(2, 5)}, r"init: expected shape \(2, 6\), got \(2, 5\)"),
    ],
)
def test_bad_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler_with(generator=small_generator()).sample(**arguments)


@pytest.mark.bare
def test_other_bad_input():
    G, E, C = networks()
    with pytest.raises(ValueError, match="init: needed where neither"):
        sampler_with().sample(1, 1)
    with pytest.raises(TypeError, match="generator: this variant samples codes and needs a generator, got None"):
        dgn_am(None, NO_CONDITION)
    with pytest.raises(ValueError, match=r"prior: the autoencoder returns codes of shape \(2, 3\)"):
        ppgn_h(G, ClassCondition(C, 0), nn.Linear(CODE, 3)).sample(2, 1)
    with pytest.raises(ValueError, match="sigma: expected a positive number, got 0"):
        DAEPrior(E, 0)
    with pytest.raises(ValueError, match="y: expected an index from 0"):
        ClassCondition(C, -1)
    x = torch.rand(2, 2, 8, 8)
    with pytest.raises(ValueError, match="condition: target 4, but there are 4 logits"):
        ClassCondition(C, 4)(x)
    with pytest.raises(ValueError, match="condition: 3 targets for 2 chains"):
        ClassCondition(C, torch.arange(3))(x)
    with pytest.raises(ValueError, match="position: expected row and column"):
        NeuronCondition(C, "0", 1)(x)
    with pytest.raises(ValueError, match="position: expected one in a map of"):
        NeuronCondition(C, "0", 1, (6, 0))(x)
    with pytest.raises(ValueError, match="no layer 'nope'"):
        NeuronCondition(C, "nope", 1)
    with pytest.raises(ValueError, match="tokens: expected words"):
        CaptionCondition(Captions(), [])
    with pytest.raises(ValueError, match="condition: expected one value per image"):
        CallableCondition(C)(x)
    with pytest.raises(ValueError, match=r"s: expected 6 values per code, got shape \(2, 5\)"):
        LatentDAE(CODE)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"h: expected codes of shape \(N, 6\), got \(2, 5\)"):
        G(torch.zeros(2, 5))


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": (4, 4)}, "start: expected channels, height and width"),
        ({"up": ()}, "up, refine: expected fewer widths"),
        ({"crop": 300}, "crop: expected a side from 1 to 256, got 300"),
        ({"output": "tanh"}, "output: expected 'linear' or 'sigmoid'"),
    ],
)
def test_bad_generators(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        FeatureGenerator(**options)


@pytest.mark.bare
def test_bad_masks():
    G, E, C = networks()
    image, mask = hole()
    sampler = noiseless_joint_ppgn_h(G, E, ClassCondition(C, 0))
    for bad in (mask.float(), mask[:, 0], mask[:2]):
        with pytest.raises(ValueError, match="image, mask: expected"):
            sampler.inpaint(image, bad)
    for bad in (torch.ones_like(mask), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="mask: expected missing and known pixels in every image"):
            sampler.inpaint(image, bad)
    with pytest.raises(ValueError, match="generator: inpainting needs one"):
        sampler_with().inpaint(image, mask)
    with pytest.raises(ValueError, match=r"image: the generator draws \(3, 2, 8, 8\), got \(3, 2, 9, 9\)"):
        sampler.inpaint(torch.rand(3, 2, 9, 9), torch.rand(3, 1, 9, 9) > 0.5, init=torch.rand(3, CODE))


@pytest.mark.bare
def test_bad_training():
    from classact.explain.ppgn.training import PPGNGeneratorModule, fit_latent_dae, fit_ppgn

    G, E1, E2, D = training_networks()
    with pytest.raises(ValueError, match="D: the adversarial loss needs a discriminator"):
        PPGNGeneratorModule(G, E1, E2)
    with pytest.raises(ValueError, match="weights: expected four numbers of at least 0"):
        PPGNGeneratorModule(G, E1, E2, D, (1.0, 1.0))
    with pytest.raises(ValueError, match="noise: expected at least 0, got -1"):
        PPGNGeneratorModule(G, E1, E2, D, noise=-1)
    with pytest.raises(ValueError, match=r"G: expected images \(2, 2, 9, 9\), it draws"):
        PPGNGeneratorModule(
            G, nn.AdaptiveAvgPool2d(3), nn.Sequential(nn.Flatten(), nn.Linear(18, CODE)), D
        ).generator_loss(torch.rand(2, 2, 9, 9))
    with pytest.raises(ValueError, match="sigma: expected a positive number, got 0"):
        fit_latent_dae(torch.rand(4, 2), 0, seed=0)
    with pytest.raises(ValueError, match="codes: expected finite codes"):
        fit_latent_dae(torch.full((4, 2), math.nan), 1, seed=0)
    with pytest.raises(ValueError, match="variant: expected one of ppgn-x"):
        fit_ppgn(torch.rand(4, 2, 8, 8), E1, E2, "gan", seed=0)
    with pytest.raises(ValueError, match="G: ppgn-h needs a generator"):
        fit_ppgn(torch.rand(4, 2, 8, 8), E1, E2, "ppgn-h", seed=0)
