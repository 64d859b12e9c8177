import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.rules.noprop import (
    DenoiseBlock,
    EndToEndTwin,
    InputEncoder,
    LabelEmbedding,
    LearnedGamma,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    _fit_block,
    _Plan,
    block_reliance,
    class_prototypes,
    cosine_abar,
    dt_coefficients,
    fit_noprop,
    integrate,
    prior_kl,
    probability_flow,
)

SMALL = {"channels": (8,), "hidden": 16, "dropout": 0.1}
FM_REFERENCE = Path(__file__).parent / "data" / "noprop_reference.npz"


def data(n=40, shape=(6,), classes=3, seed=0):
    """Gaussian clusters, one per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 3 * torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(n, *shape, generator=generator), y


def dt(shape=(6,), seed=0, **settings):
    torch.manual_seed(seed)
    return NoPropDT.for_data(shape, 3, **{**SMALL, "T": 3, **settings})


def continuous(kind, shape=(6,), seed=0, **settings):
    torch.manual_seed(seed)
    return kind.for_data(shape, 3, **{**SMALL, **settings})


def every(shape=(6,)):
    return [
        dt(shape),
        dt(shape, embedding="learned", d=5),
        continuous(NoPropCT, shape),
        continuous(NoPropFM, shape),
        continuous(NoPropFM, shape, embedding="learned", d=5, sigma=0.1),
        EndToEndTwin(dt(shape)),
    ]


class Oracle(nn.Module):
    """Knows the class: it is the first value of x."""

    def encode(self, x):
        return x

    def denoise(self, features, z, t=None):
        return 1e4 * F.one_hot(features[:, 0].long(), 3).float()

    def forward(self, x, z, t=None):
        return self.denoise(x, z, t)


def test_coefficients_of_one_step():
    a, b, c, snr = (part.item() for part in dt_coefficients(torch.tensor([0.2, 0.5], dtype=torch.float64)))
    assert (a, b, c, snr) == pytest.approx((0.5303300859, 0.3952847075, 0.375, 0.75), abs=1e-10)


def test_coefficients_keep_the_marginals():
    abar = cosine_abar(10)
    a, b, c, snr = dt_coefficients(abar)
    assert (a[4].item(), b[4].item(), c[4].item()) == pytest.approx((0.333851, 0.635021, 0.236068), abs=1e-6)
    torch.testing.assert_close(a + b * abar[:-1].sqrt(), abar[1:].sqrt(), atol=1e-12, rtol=0)
    torch.testing.assert_close(b.square() * (1 - abar[:-1]) + c, 1 - abar[1:], atol=1e-12, rtol=0)
    # the weight of the squared error is what the Kullback-Leibler divergence of a step asks for
    torch.testing.assert_close(a.square() / c, snr, atol=0, rtol=1e-10)
    assert (snr[0].item(), snr[-1].item()) == pytest.approx((0.024, 959), rel=0.02)


def test_divergence_from_the_prior():
    unit, longer = torch.zeros(2, 10), torch.zeros(3, 20)
    unit[:, 0], longer[:, 3] = 1, 2
    assert prior_kl(unit, 0.001).item() == pytest.approx(5.0250167e-4, rel=1e-6)
    assert prior_kl(longer, 0.1).item() == pytest.approx(0.2536051566, rel=1e-6)
    prior = torch.distributions.Normal(torch.zeros(20), 1)
    own = torch.distributions.Normal(math.sqrt(0.1) * longer[0], math.sqrt(0.9))
    expected = torch.distributions.kl_divergence(own, prior).sum()
    torch.testing.assert_close(prior_kl(longer, 0.1), expected)


def test_chain_of_an_oracle_has_the_moments_of_the_label():
    model = NoPropDT(Oracle(), LabelEmbedding(3, 3), T=10)
    torch.manual_seed(0)
    n = 20_000
    x, u = torch.full((n, 1), 1.0), torch.tensor([0.0, 1.0, 0.0])
    for abar, (_, z) in zip(model.abar[1:], model.chain(x), strict=True):
        wanted = math.sqrt(abar) * u
        # z_0 is N(0, I), not q(z_0|y): its mean is off by sqrt(abar_0) = 0.03
        torch.testing.assert_close(z.mean(0), wanted, atol=0.05, rtol=0)
        torch.testing.assert_close(z.var(0), torch.full((3,), 1 - abar), atol=0.05, rtol=0)
    *_, (_, last) = model.chain(x[:50], deterministic=True)
    torch.testing.assert_close(last, (math.sqrt(model.abar[-1]) * u).expand(50, 3), atol=0.05, rtol=0)
    assert (model(x[:50], deterministic=True).argmax(1) == 1).all()


def test_loss_of_a_block_is_the_formula():
    model, uniform = (dt(eta=0.3, dropout=0.0, weight=weight) for weight in ("snr", "uniform"))
    x, y = data()
    for t in (1, 2, 3):
        torch.manual_seed(5)
        loss = model.block_loss(t, x, y)
        torch.manual_seed(5)
        u, before, after = torch.eye(3)[y], model.abar[t - 1], model.abar[t]
        z = math.sqrt(before) * u + math.sqrt(1 - before) * torch.randn(len(y), 3)
        error = (model.blocks[t - 1](x, z).softmax(1) - u).square().sum(1).mean()
        expected = 3 / 2 * 0.3 * (after / (1 - after) - before / (1 - before)) * error
        torch.testing.assert_close(loss, expected)
        torch.manual_seed(5)
        torch.testing.assert_close(uniform.block_loss(t, x, y), 0.45 * error)


def test_no_gradient_crosses_a_block():
    model, (x, y) = dt(T=4), data()
    for t in range(1, 5):
        model.zero_grad()
        model.loss(x, y, t).backward()
        for number, block in enumerate(model.blocks, 1):
            assert all((p.grad is not None) == (number == t) for p in block.parameters())
        assert model.head.weight.grad.any()
        assert model.embedding.weight.grad is None


def test_last_z_has_no_path_to_the_blocks_in_the_loss_but_has_in_the_twin():
    model, (x, y) = dt(T=4), data()
    EndToEndTwin(model).loss(x, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
    assert all(any(p.grad.any() for p in block.parameters()) for block in model.blocks)


def test_learned_embeddings_are_trained_by_every_block_and_the_head():
    model, (x, y) = dt(embedding="learned", d=5), data()
    torch.testing.assert_close(model.embedding.weight @ model.embedding.weight.T, torch.eye(3), atol=1e-5, rtol=0)
    for loss in (model.block_loss(1, x, y), model.block_loss(3, x, y), model.head_loss(y)):
        model.zero_grad()
        loss.backward()
        assert model.embedding.weight.grad.any()


def test_order_of_the_blocks_does_not_matter():
    x, y = data(60)
    forward, backward = dt(), dt()
    fit_noprop(forward, x, y, epochs=2, batch_size=16, seed=3)
    plan = _Plan(2, 1e-3, 16, 3, 1e-3)
    backward.train()
    for t in (3, 1, 2):
        i = t - 1
        _fit_block(backward.blocks[i], backward.embedding, backward.abar[i], backward.weights[i], x, y, plan, t)
    for ours, theirs in zip(forward.blocks.parameters(), backward.blocks.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_two_processes_train_the_blocks_as_one_does():
    x, y = data(40, (1, 6, 6))
    alone, together = (dt((1, 6, 6), T=2) for _ in range(2))
    fit_noprop(alone, x, y, epochs=1, batch_size=16, seed=3)
    fit_noprop(together, x, y, epochs=1, batch_size=16, seed=3, workers=2)
    start = dt((1, 6, 6), T=2).state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, together.state_dict()[name])
        assert torch.equal(tensor, start[name]) == (name == "embedding.weight")


def test_schedule_decreases_whatever_its_parameters():
    torch.manual_seed(0)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    schedule = LearnedGamma().double()
    assert schedule.gamma(t)[0][[0, -1]].tolist() == pytest.approx([7, -7], abs=1e-6)
    for _ in range(5):
        gamma, slope = schedule.gamma(t)
        assert (gamma.diff() < 0).all() and (slope < 0).all()
        for p in schedule.parameters():
            p.data = torch.randn_like(p)


def test_derivative_of_the_schedule_is_autograds():
    torch.manual_seed(0)
    schedule = LearnedGamma(8).double()
    for p in schedule.parameters():
        p.data += torch.randn_like(p)
    t = torch.rand(20, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(schedule.snr(t).sum(), t)
    torch.testing.assert_close(schedule.snr_prime(t), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.snr(t), schedule.abar(t) / (1 - schedule.abar(t)))


@pytest.mark.parametrize(("solver", "steps", "expected"), [("heun", 50, 1.014475), ("heun", 1000, 1.0145579)])
def test_flow_of_an_oracle(solver, steps, expected):
    u, start = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 0.3, dtype=torch.float64)

    def velocity(z, t):
        return probability_flow(u, z, torch.tensor(5 - 10 * t, dtype=torch.float64), torch.tensor(-10.0))

    found = integrate(velocity, start, steps, solver).item()
    assert found == pytest.approx(expected, abs=6e-7)
    # along the flow (z - sqrt(abar) u) / sqrt(1 - abar) stays what it was
    low, high = (1 / (1 + math.exp(5 * sign)) for sign in (1, -1))
    exact = math.sqrt(high) + math.sqrt((1 - high) / (1 - low)) * (0.3 - math.sqrt(low))
    assert exact == pytest.approx(1.0145580949, abs=1e-9)
    assert found == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_continuous_oracle_ends_at_the_label(solver):
    torch.manual_seed(0)
    model = NoPropCT(Oracle(), LabelEmbedding(3, 3))
    x = torch.arange(300).remainder(3).unsqueeze(1).float()
    with torch.no_grad():
        z = []
        model.head.register_forward_pre_hook(lambda _, inputs: z.append(inputs[0]))
        assert (model(x, steps=60, solver=solver).argmax(1) == x[:, 0]).all()
    u = F.one_hot(x[:, 0].long(), 3).float()
    assert (z[0] - u).abs().max() < 0.25
    assert (z[0] - u).square().mean().sqrt() < 0.08


def test_loss_of_the_continuous_block_is_the_formula():
    x, y = data()
    model = continuous(NoPropCT, eta=0.7, dropout=0.0)
    torch.manual_seed(5)
    loss = model.loss(x, y)
    torch.manual_seed(5)
    u, t = torch.eye(3)[y], torch.rand(len(y))
    abar = model.schedule.abar(t).unsqueeze(1)
    z = abar.sqrt() * u + (1 - abar).sqrt() * torch.randn_like(u)
    error = (model.block(x, z, t).softmax(1) - u).square().sum(1)
    first, last = model.schedule.abar(torch.tensor([0.0, 1.0]))
    end = last.sqrt() * u + (1 - last).sqrt() * torch.randn_like(u)
    label = F.cross_entropy(model.head(end), y) + prior_kl(u, first)
    torch.testing.assert_close(loss, 0.35 * (model.schedule.snr_prime(t) * error).mean() + label)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.schedule.parameters())
    uniform = continuous(NoPropCT, eta=0.7, dropout=0.0, weight="uniform")
    torch.manual_seed(5)
    torch.testing.assert_close(uniform.loss(x, y), 0.35 * error.mean() + label)
    assert not any(p.requires_grad for p in uniform.schedule.parameters())


class Zero(nn.Module):
    def forward(self, x, z, t):
        return torch.zeros_like(z)


def test_flow_loss_of_a_network_that_answers_zero():
    torch.manual_seed(0)
    model = NoPropFM(Zero(), LabelEmbedding(3, 5, "prototype", torch.full((3, 5), 2.0)))
    n = 20_000
    loss = model.loss(torch.zeros(n, 1), torch.arange(n) % 3)
    assert loss.item() == pytest.approx(20 + 5, abs=0.3)


def test_anchor_is_there_where_embeddings_are_learned():
    x, y = data()
    model = continuous(NoPropFM, embedding="learned", d=5, sigma=0.2, dropout=0.0)
    torch.manual_seed(5)
    loss = model.loss(x, y)
    torch.manual_seed(5)
    u = model.embedding.weight[y]
    z0, t = torch.randn_like(u), torch.rand(len(y))
    z = t[:, None] * u + (1 - t[:, None]) * z0 + 0.2 * torch.randn_like(u)
    v = model.block(x, z, t)
    anchor = F.cross_entropy(model.head(z + (1 - t[:, None]) * v), y)
    torch.testing.assert_close(loss, (v - u + z0).square().sum(1).mean() + anchor)
    fixed = continuous(NoPropFM)
    fixed.loss(x, y).backward()
    assert fixed.head.weight.grad is None


def test_flow_matching_agrees_with_torchcfm_and_torchdiffeq():
    stored = {key: torch.from_numpy(value) for key, value in np.load(FM_REFERENCE).items()}
    seen = {}

    class Spy(nn.Module):
        def forward(self, x, z, t):
            seen["z"] = z
            return torch.zeros_like(z)

    model = NoPropFM(Spy(), LabelEmbedding(4, 4))
    torch.manual_seed(0)
    loss = model.loss(torch.zeros(6, 1), stored["y"])
    torch.testing.assert_close(seen["z"], stored["z"], atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, stored["velocity"].square().sum(1).mean(), atol=1e-5, rtol=0)

    def velocity(z, t):
        return torch.sin(3 * z) + t * z.flip(1) - t**2

    for solver in ("euler", "heun"):
        torch.testing.assert_close(
            integrate(velocity, stored["start"], 20, solver), stored[solver], atol=1e-12, rtol=1e-12
        )


def test_answers_lie_in_the_hull_of_the_embeddings():
    torch.manual_seed(0)
    onehot = LabelEmbedding(4, 4).mixture(5 * torch.randn(9, 4))
    torch.testing.assert_close(onehot.sum(1), torch.ones(9))
    assert (onehot >= 0).all()
    rows = LabelEmbedding(4, 2, "learned")
    mixed = rows.mixture(5 * torch.randn(50, 4))
    assert (mixed.min(0).values >= rows.weight.min(0).values - 1e-6).all()
    assert (mixed.max(0).values <= rows.weight.max(0).values + 1e-6).all()


def test_classifier_starts_as_the_nearest_embedding():
    model = dt(embedding="learned", d=2)
    z = torch.randn(50, 2)
    nearest = torch.cdist(z, model.embedding.weight).argmin(1)
    assert torch.equal(model.head(z).argmax(1), nearest)


def test_prototypes_are_the_most_central_examples():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [5.0, 5.0], [2.0, 0.0], [5.0, 6.0], [5.0, 4.0]])
    y = torch.tensor([0, 0, 0, 1, 0, 1, 1])
    assert class_prototypes(x, y, 2).tolist() == [[1.0, 0.0], [5.0, 5.0]]
    with pytest.raises(ValueError, match="y: expected examples of all 3 classes, there is none of class 2"):
        class_prototypes(x, y, 3)


def test_prototypes_as_labels():
    x, y = data(60, (1, 6, 6))
    prototypes = class_prototypes(x, y, 3)
    model = dt((1, 6, 6), embedding="prototype", prototypes=prototypes)
    assert model.embedding.d == 36
    assert torch.equal(model.embedding(torch.tensor([2]))[0], prototypes[2].flatten())
    assert isinstance(model.blocks[1].z_encoder, InputEncoder)
    fit_noprop(model, x, y, epochs=3, batch_size=16, lr=3e-3)
    assert torch.equal(model.embedding.weight, prototypes.flatten(1))
    assert model.predict_proba(x, deterministic=True).argmax(1).eq(y).float().mean() > 0.8


def test_prediction_depends_on_the_seed_alone():
    model, (x, _) = dt().eval(), data()
    state = torch.get_rng_state()
    first, second, other = (model.predict_proba(x, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.testing.assert_close(first.sum(1), torch.ones(40))
    z = torch.randn(40, 3)
    fixed = [model.predict_proba(x, seed=s, z=z, deterministic=True) for s in (1, 2)]
    assert torch.equal(*fixed)
    assert not torch.equal(model.predict_proba(x, seed=1, z=z), model.predict_proba(x, seed=2, z=z))
    torch.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


def test_prediction_leaves_mode_and_random_state_as_they_were():
    for model in every():
        model.train()
        x = data()[0]
        state = torch.get_rng_state()
        settings = {} if isinstance(model, NoPropDT | EndToEndTwin) else {"steps": 2, "solver": "heun"}
        whole = model.predict_proba(x, **settings)
        assert torch.equal(torch.get_rng_state(), state)
        assert whole.shape == (40, 3) and model.training
        with pytest.raises(ValueError, match="x: expected shape"):
            model.predict_proba(x[:, :4], **settings)
        assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", range(6))
def test_every_variant_learns(number):
    shape = (2, 5, 6) if number in (0, 3) else (6,)
    model, (x, y), (held_out, wanted) = every(shape)[number], data(96, shape), data(90, shape, seed=1)
    discrete = isinstance(model, NoPropDT | EndToEndTwin)
    fit_noprop(model, x, y, epochs=8 if discrete else 40, batch_size=48, lr=1e-2, seed=1)
    assert not model.training
    settings = {"deterministic": True} if discrete else {"steps": 8, "solver": "heun"}
    found = model.predict_proba(held_out, **settings).argmax(1)
    assert (found == wanted).float().mean() > 0.7
    assert all(p.grad is None for p in model.parameters())


def test_many_classes_do_not_lose_to_the_weight_decay():
    x, y = data(300, (16,), classes=30)
    torch.manual_seed(0)
    model = NoPropCT.for_data((16,), 30, weight="uniform", channels=(32,), hidden=32, dropout=0.0)
    fit_noprop(model, x, y, epochs=25, batch_size=50, lr=1e-2, weight_decay=1e-2)
    assert model.predict_proba(x, steps=4, solver="heun").argmax(1).eq(y).float().mean() > 0.5


def test_training_repeats_itself_and_leaves_the_random_state():
    x, y = data(60)
    for make in (dt, lambda: dt(embedding="learned", d=5), lambda: continuous(NoPropCT)):
        models = [make() for _ in range(3)]
        state = torch.get_rng_state()
        for model, seed in zip(models, (1, 1, 2), strict=True):
            fit_noprop(model, x, y, epochs=1, batch_size=30, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        same, again, other = ([p.detach() for p in model.parameters() if p.requires_grad] for model in models)
        assert all(torch.equal(*pair) for pair in zip(same, again, strict=True))
        assert not all(torch.equal(*pair) for pair in zip(same, other, strict=True))


def test_reliance_tells_classifiers_of_x_from_denoisers():
    y = torch.arange(300) % 3
    x = y.float().unsqueeze(1)
    sees = block_reliance(NoPropDT(Oracle(), LabelEmbedding(3, 3), T=3), x, y)
    assert sees.chain == sees.first_block == sees.last_block == sees.last_block_noise == 1
    assert sees.chain_shuffled == sees.last_block_shuffled == pytest.approx(1 / 3, abs=0.1)

    class Denoiser(nn.Module):
        def forward(self, x, z, t=None):
            return 10 * z

    denoises = block_reliance(NoPropDT(Denoiser(), LabelEmbedding(3, 3), T=3), x, y)
    assert denoises.last_block == denoises.last_block_shuffled
    assert denoises.last_block > 0.6 > denoises.last_block_noise
    assert denoises.first_block == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("number", range(6))
def test_round_trip_through_safetensors(number, tmp_path):
    model, x = every((1, 6, 6))[number].eval(), data(5, (1, 6, 6))[0]
    path = classact.save(model, tmp_path / "m")
    described = json.loads(path.with_suffix(".json").read_text())["config"]
    assert described == json.loads(json.dumps(described))
    torch.manual_seed(7)
    empty = every((1, 6, 6))[number]
    for p in empty.parameters():
        p.data.normal_()
    loaded = classact.load(path, empty)
    settings = {} if isinstance(model, NoPropDT | EndToEndTwin) else {"steps": 2}
    assert torch.equal(loaded.predict_proba(x, **settings), model.predict_proba(x, **settings))


def test_networks_are_built_from_their_description():
    parts = [DenoiseBlock(InputEncoder((6,), (8,)), 3, 3, 16), LabelEmbedding(3, 3)]
    again = [type(part)(**part.config) for part in parts]
    model = NoPropDT(*again, T=2, abar=[0.1, 0.5, 0.9])
    assert NoPropDT(**{**model.config, "block": copy.deepcopy(model.blocks[0])}).abar == [0.1, 0.5, 0.9]
    timed = continuous(NoPropCT, eta=2.0)
    assert NoPropCT(**timed.config).eta == 2.0
    assert LearnedGamma(**timed.schedule.config).config == timed.schedule.config
    assert NoPropFM(**continuous(NoPropFM, sigma=0.5).config).sigma == 0.5


def test_blocks_start_differently():
    model = dt()
    first, second = (torch.cat([p.flatten() for p in block.parameters() if p.ndim > 1]) for block in model.blocks[:2])
    assert not (first == second).any()


def test_bfloat16_autocast():
    x, y = data(16, (1, 6, 6))
    for model in every((1, 6, 6)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x, y)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.bare
def test_loss_compiles():
    x, y = data(16)
    model = continuous(NoPropCT)
    torch.compile(model.loss, backend="aot_eager", fullgraph=True)(x, y).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.bare
def test_networks_export():
    x, z = data(4)[0], torch.randn(4, 3)
    cases = [
        (dt(T=2), {"deterministic": True}),
        (continuous(NoPropCT), {"steps": 1, "solver": "heun"}),
    ]
    for model, settings in cases:
        model.eval()
        exported = torch.export.export(model, (x, z), settings).module()
        torch.testing.assert_close(exported(x, z, **settings), model(x, z, **settings))


def test_lightning_module_steps_block_after_block():
    from classact.rules.noprop_lit import NoPropModule
    from classact.training import fit

    x, y = data(48)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=24)
    for model in (dt(), continuous(NoPropCT, weight="uniform")):
        before = copy.deepcopy(model.state_dict())
        discrete = isinstance(model, NoPropDT)
        module = NoPropModule(model, lr=1e-2, settings={} if discrete else {"steps": 3, "solver": "heun"})
        history = fit(module, loader, loader, epochs=3, seed=0)
        assert history.steps == 3 * 2 * (3 if discrete else 1)
        losses = history.curves["val_loss"]
        assert losses[-1] < losses[0]
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        still = {name for name in before if "embedding" in name or "schedule" in name}
        assert set(before) - still == moved


def test_adjoint_of_the_baseline_is_the_gradient_of_the_flow(monkeypatch):
    from classact.reproductions.rules import noprop as reproduction

    monkeypatch.setattr(reproduction, "ODE_STEPS", 150)
    torch.manual_seed(0)
    ode = reproduction.NeuralODE(DenoiseBlock(InputEncoder((6,), (4,), 0.0), 10, 10, 8, time_dim=4))
    for p in ode.block.parameters():
        p.data *= 2
    x, y = data(20)
    torch.manual_seed(1)
    for loss in ode.losses(x, y):
        loss.backward()
    found = {name: p.grad.clone() for name, p in ode.named_parameters()}
    ode.zero_grad()
    torch.manual_seed(1)
    F.cross_entropy(ode(x), y).backward()
    for name, p in ode.named_parameters():
        assert (found[name] - p.grad).norm() <= 0.1 * p.grad.norm() + 1e-5, name


def test_networks_need_neither_lightning_nor_extras():
    code = (
        "import sys\nfrom classact.rules.noprop import NoPropDT\n"
        "print({'lightning', 'sklearn', 'joblib', 'pandas', 'matplotlib', 'timm'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine_abar(0), "T: expected at least 1 block, got 0"),
        (lambda: cosine_abar(3, 0.5), r"clamp: expected a number in \(0, 0.5\), got 0.5"),
        (lambda: dt_coefficients(torch.tensor([0.5, 0.2])), "abar: expected at least two increasing values"),
        (lambda: dt_coefficients(torch.tensor([0.2, 1.0])), "abar: expected at least two increasing values"),
        (lambda: dt(abar=[0.1, 0.5]), r"abar: expected T \+ 1 = 4 values, got 2"),
        (lambda: dt(weight="linear"), "weight: expected 'snr' or 'uniform', got 'linear'"),
        (lambda: dt(eta=0.0), "eta: expected a positive number, got 0.0"),
        (lambda: dt().block_loss(0, *data()), "t: expected a block from 1 to 3, got 0"),
        (lambda: dt().loss(*data(), t=4), "t: expected a block from 1 to 3, got 4"),
        (lambda: dt()(data()[0], torch.randn(40, 2)), r"z: expected shape \(40, 3\), got \(40, 2\)"),
        (lambda: dt()(torch.randn(4, 7)), r"x: expected shape \(N, 6\), got \(4, 7\)"),
        (lambda: LabelEmbedding(3, 4), "d: expected 3, the number of classes, for one-hot labels, got 4"),
        (lambda: LabelEmbedding(1, 1), "classes, d: expected at least 2 classes"),
        (lambda: LabelEmbedding(3, 4, "random"), "kind: expected 'onehot', 'learned' or 'prototype', got 'random'"),
        (lambda: LabelEmbedding(3, 4, "prototype", torch.zeros(3, 5)), "prototypes: expected 3 of 4 values"),
        (lambda: LabelEmbedding(3, 4, "learned", torch.zeros(3, 4)), "prototypes: expected 3 of 4 values and kind"),
        (lambda: InputEncoder((3, 4)), r"shape: expected \(D,\) or \(C, H, W\), got \(3, 4\)"),
        (lambda: InputEncoder((3,), ()), "channels: expected at least one width"),
        (lambda: DenoiseBlock(InputEncoder((3,)), 0, 3), "d: expected at least 1, got 0"),
        (lambda: DenoiseBlock(InputEncoder((3,)), 3, 3, time_dim=3), "time_dim: expected an even number"),
        (lambda: DenoiseBlock(InputEncoder((3,)), 3, 3)(torch.randn(4, 3), torch.randn(4, 3), 0.1), "t: expected no"),
        (lambda: DenoiseBlock(InputEncoder((3,)), 3, 3)(torch.randn(4, 3), torch.randn(4, 2)), "z: expected shape"),
        (
            lambda: NoPropDT(DenoiseBlock(InputEncoder((3,)), 4, 3), LabelEmbedding(3, 3)),
            "block: expected d = 3 for this embedding, got 4",
        ),
        (
            lambda: NoPropFM(DenoiseBlock(InputEncoder((3,)), 4, 3, time_dim=4), LabelEmbedding(3, 4, "learned")),
            "block: expected out = 4 for this embedding, got 3",
        ),
        (lambda: continuous(NoPropFM, sigma=-1.0), "sigma: expected 0 or more, got -1.0"),
        (lambda: continuous(NoPropCT)(data()[0], steps=0, solver="sde"), "steps: expected at least 1, got 0"),
        (lambda: continuous(NoPropCT)(data()[0], steps=0), "steps: expected at least 1, got 0"),
        (lambda: continuous(NoPropFM)(data()[0], solver="rk4"), "solver: expected 'euler' or 'heun', got 'rk4'"),
        (lambda: LearnedGamma(0), "hidden: expected at least 1, got 0"),
        (lambda: LearnedGamma(low=3.0, high=1.0), "low, high: expected low < high, got 3.0 and 1.0"),
        (lambda: fit_noprop(dt(), data()[0], data()[1] + 1), "y: expected classes from 0 to 2, got torch.int64 from 1"),
        (lambda: fit_noprop(dt(), data()[0], data()[1].float()), "y: expected classes from 0 to 2, got torch.float32"),
        (lambda: fit_noprop(dt(), data()[0], data()[1][:5]), "x, y: expected N >= 2 inputs and classes"),
        (lambda: fit_noprop(dt(), data()[0] / 0, data()[1]), "x: expected finite numbers"),
        (lambda: fit_noprop(dt(), *data(), epochs=0), "epochs: expected at least 1, got 0"),
        (lambda: fit_noprop(dt(), *data(), batch_size=1), "batch_size: expected at least 2, got 1"),
        (lambda: fit_noprop(dt(embedding="learned"), *data(), workers=2), "workers: expected 1 except for NoPropDT"),
        (lambda: fit_noprop(continuous(NoPropFM), *data(), workers=2), "workers: expected 1 except for NoPropDT"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
