import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from classact.nn.crrelu import (
    Activation,
    CRReLU,
    EAFOActivation,
    GaussianDensity,
    GridDensity,
    crrelu,
    eafo_correction,
    eafo_step,
    entropy_of,
    wafbc,
)

NORMAL = GaussianDensity()
SEVEN = torch.tensor([-3, -1, -0.5, 0, 0.5, 1, 3], dtype=torch.float64)
INVERTIBLE = {
    "identity": (lambda x: 1.0 * x, -0.141047),
    "softplus": (F.softplus, -0.271663),
    "x + tanh x": (lambda x: x + torch.tanh(x), -0.045825),
    "sigmoid": (torch.sigmoid, -0.2612),
}


def close(actual, expected, atol):
    expected = torch.as_tensor(np.array(expected), dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=0)


def test_values_of_the_formula():
    close(crrelu(SEVEN, 0.01), [-0.00033327, -0.00606531, -0.00441248, 0, 0.50441248, 1.00606531, 3.00033327], 1e-8)
    close(crrelu(SEVEN, 0.5), [-0.016663, -0.303265, -0.220624, 0, 0.720624, 1.303265, 3.016663], 1e-6)


def test_gradients_of_the_formula():
    x, eps = SEVEN.clone().requires_grad_(), torch.tensor([0.01], dtype=torch.float64, requires_grad=True)
    crrelu(x, eps).sum().backward()
    close(x.grad, [-0.000889, 0, 0.006619, 0.01, 1.006619, 1, 0.999111], 1e-6)
    assert eps.grad.item() == pytest.approx(0, abs=1e-12)  # the bump is odd


@pytest.mark.parametrize("eps", [-0.7, 0.0, 0.01, 2.0])
def test_symmetries(eps):
    x = torch.randn(1000, dtype=torch.float64)
    y, mirrored = crrelu(x, eps), crrelu(-x, eps)
    torch.testing.assert_close(y + mirrored, x.abs())
    torch.testing.assert_close(y - mirrored, x + 2 * eps * x * (-x * x / 2).exp())
    assert torch.equal(crrelu(x, 0.0), F.relu(x))


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_first_and_second_derivatives_are_those_of_the_formula(shape):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()
    eps = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(crrelu, (x, eps))
    assert torch.autograd.gradgradcheck(crrelu, (x, eps))


def test_per_sample_gradients_by_vmap():
    x, eps = torch.randn(5, 4), torch.tensor([0.3])
    batched = torch.func.vmap(torch.func.grad(lambda e, row: crrelu(row, e).sum()), (None, 0))(eps, x)
    torch.testing.assert_close(batched[:, 0], (x * (-x * x / 2).exp()).sum(1))


def test_increases_for_positive_numbers_up_to_the_bound():
    x, bound = torch.linspace(0, 6, 100_001, dtype=torch.float64), 1 / (2 * math.exp(-1.5))
    assert bound == pytest.approx(2.24084, abs=1e-5)
    for eps, increases in ((0.999 * bound, True), (1.001 * bound, False), (-0.999, True), (-1.001, False)):
        assert bool((crrelu(x, eps).diff() > 0).all()) is increases
    negative = crrelu(-x, 0.5)
    assert negative.min().item() == pytest.approx(-0.5 * math.exp(-0.5), abs=1e-8)
    assert negative[-1].abs() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_stay_finite(dtype):
    x = torch.tensor([-6e4, -300.0, -14.0, 14.0, 300.0, 6e4], dtype=dtype, requires_grad=True)
    eps = torch.tensor([0.01], requires_grad=True)
    y = crrelu(x, eps)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y, x.relu())
    torch.testing.assert_close(x.grad, (x > 0).to(dtype))
    assert eps.grad.isfinite().all()
    infinite = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    assert crrelu(infinite, 0.5).tolist() == [0, torch.inf]


def test_keeps_no_more_than_silu_for_the_backward_pass():
    def kept(function):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            function(torch.randn(100, 100, requires_grad=True))
        return sum(sizes.values())

    assert kept(CRReLU()) <= kept(F.silu) + 1


def test_one_coefficient_or_one_per_channel():
    x = torch.randn(2, 3, 5, 5)
    assert CRReLU().eps.tolist() == pytest.approx([0.01])
    module = CRReLU(num_parameters=3)
    with torch.no_grad():
        module.eps.copy_(torch.tensor([0.1, 0.2, 0.3]))
    expected = torch.stack([crrelu(x[:, c], e) for c, e in enumerate((0.1, 0.2, 0.3))], 1)
    torch.testing.assert_close(module(x), expected)
    fixed = CRReLU(0.2, learnable=False)
    assert not list(fixed.parameters()) and "eps" in fixed.state_dict()
    torch.testing.assert_close(fixed(x), crrelu(x, 0.2))


def test_state_dict_round_trip():
    module, other = CRReLU(0.3), CRReLU()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eps, module.eps)


def test_bfloat16_autocast_trains():
    model = nn.Sequential(nn.Linear(4, 8), CRReLU(), nn.Linear(8, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(16, 4))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model[1].eps.grad != 0


@pytest.mark.bare
@pytest.mark.parametrize("channels", [1, 4])
def test_compiles_and_exports(channels):
    module, x = CRReLU(0.2, channels), torch.randn(3, 4, 5, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (module, compiled):
        module.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        gradients.append((x.grad, module.eps.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


def test_in_a_vision_transformer_of_timm():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        14, 7, 1, 3, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0, act_layer=CRReLU, class_token=True
    )
    model(torch.randn(2, 1, 14, 14)).sum().backward()
    assert [name for name, p in model.named_parameters() if name.endswith("eps")] == [
        "blocks.0.mlp.act.eps",
        "blocks.1.mlp.act.eps",
    ]
    assert all(block.mlp.act.eps.grad is not None for block in model.blocks)


def test_entropies_of_bounded_activations():
    entropies = {
        torch.special.ndtr: 0,
        torch.sigmoid: -0.19318,
        lambda x: (torch.tanh(x) + 1) / 2: -0.02334,
        lambda x: torch.atan(x) / math.pi + 0.5: -0.25924,
    }
    for activation, expected in entropies.items():
        assert entropy_of(activation, NORMAL) == pytest.approx(expected, abs=1e-5)
    assert abs(entropy_of(torch.special.ndtr, NORMAL)) < 1e-6


def test_entropy_of_samples_agrees():
    samples = np.random.default_rng(0).standard_normal(200_000)
    outputs = np.sort(1 / (1 + np.exp(-samples)))
    m = 400  # Vasicek's estimate from spacings
    spacing = outputs[2 * m :] - outputs[: -2 * m]
    estimate = np.log(len(outputs) / (2 * m) * spacing).mean()
    assert entropy_of(torch.sigmoid, NORMAL) == pytest.approx(estimate, abs=0.02)


def test_no_increasing_map_onto_an_interval_exceeds_the_worst():
    rng = np.random.default_rng(0)
    density = GaussianDensity(0.3, 1.4)
    worst = entropy_of(wafbc(density), density)
    assert worst == pytest.approx(0, abs=1e-6)
    for _ in range(20):
        weight, shift, scale = rng.dirichlet(np.ones(4)), rng.normal(0, 1.5, 4), rng.uniform(0.3, 3, 4)

        def mixture(x, weight=weight, shift=shift, scale=scale):
            return sum(w * torch.special.ndtr((x - m) / s) for w, m, s in zip(weight, shift, scale, strict=True))

        assert entropy_of(mixture, density) < worst


def test_worst_activation_is_the_cdf():
    u, q = torch.linspace(-9, 9, 4001, dtype=torch.float64), torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64)
    worst = wafbc(NORMAL, 0, 1)
    close(worst(u), norm.cdf(u.numpy()), 1e-6)
    close(worst.inverse(q), norm.ppf(q.numpy()), 1e-6)
    scaled = wafbc(NORMAL, -1, 3)
    close(scaled(u), 4 * norm.cdf(u.numpy()) - 1, 1e-6)
    assert entropy_of(scaled, NORMAL) == pytest.approx(math.log(4), abs=1e-6)


def test_correction_of_the_identity():
    x, eta = eafo_correction(lambda x: 1.0 * x, NORMAL)
    np.testing.assert_allclose(eta, x * norm.pdf(x), atol=1e-12)
    slope = 1 + (1 - x**2) * norm.pdf(x)
    assert slope.min() == pytest.approx(1 - 2 * math.exp(-1.5) / math.sqrt(2 * math.pi), abs=1e-6)
    step = eafo_step(lambda x: 1.0 * x, NORMAL, 1.0)

    def new_density(v):
        return norm.pdf(v + v * norm.pdf(v)) * (1 + (1 - v * v) * norm.pdf(v))

    by_definition = quad(lambda v: -new_density(v) * math.log(new_density(v)), -8, 8, epsabs=1e-12)[0]
    assert entropy_of(step, NORMAL) == pytest.approx(by_definition, abs=1e-8)
    assert by_definition - 0.5 * math.log(2 * math.pi * math.e) == pytest.approx(-0.165709, abs=1e-6)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_a_step_lowers_the_entropy_at_the_first_order_rate(name):
    activation, rate = INVERTIBLE[name]
    before = entropy_of(activation, NORMAL)
    x, eta = eafo_correction(activation, NORMAL)
    assert -np.trapezoid(eta**2, x) == pytest.approx(rate, abs=1e-4)
    small = entropy_of(eafo_step(activation, NORMAL, 1e-3), NORMAL) - before
    assert small / 1e-3 == pytest.approx(rate, rel=0.01)
    assert entropy_of(eafo_step(activation, NORMAL), NORMAL) < before + 0.1 * rate


def test_a_step_is_the_inverse_of_the_corrected_inverse():
    x, eta = eafo_correction(F.softplus, NORMAL)
    step = eafo_step(F.softplus, NORMAL, 0.5)
    inner = slice(500, -500)
    inverse = np.log(np.expm1(x)) + 0.5 * eta
    close(step(torch.from_numpy(inverse[inner])), x[inner], 1e-9)
    u = torch.linspace(-4, 4, 333, dtype=torch.float64)
    close(step.inverse(step(u)), u, 1e-8)


def test_steps_can_follow_one_another():
    activation, entropies = F.softplus, [entropy_of(F.softplus, NORMAL)]
    for _ in range(3):
        activation = eafo_step(activation, NORMAL, 0.05, smooth=0.5)
        entropies.append(entropy_of(activation, NORMAL))
    assert (np.diff(entropies) < -0.005).all()


def test_the_worst_activation_is_stationary():
    _, eta = eafo_correction(torch.special.ndtr, NORMAL)
    assert np.abs(eta).max() < 1e-10
    with pytest.raises(ValueError, match="step: no step lowers the entropy; the activation is stationary"):
        eafo_step(wafbc(NORMAL), NORMAL)


def test_relu_gives_the_bump_of_crrelu_with_the_other_sign():
    x, eta = eafo_correction(torch.relu, NORMAL, restrict="positive")
    np.testing.assert_allclose(eta, 2 * x * norm.pdf(x), atol=1e-9)  # twice, given that x is positive
    before = entropy_of(torch.relu, NORMAL, restrict="positive")
    assert before == pytest.approx(0.5 * math.log(math.pi * math.e / 2), abs=1e-8)
    changes = {0.01: 0.00351638, -0.01: -0.00355488, 0.1: 0.03352, -0.1: -0.03738}
    for eps, change in changes.items():
        found = entropy_of(lambda u, eps=eps: crrelu(u, eps), NORMAL, restrict="positive") - before
        assert found == pytest.approx(change, abs=1e-8 if abs(eps) < 0.1 else 1e-5)
    rate = (changes[0.01] - changes[-0.01]) / 0.02
    assert rate == pytest.approx(1 / (2 * math.sqrt(2)), abs=1e-4)
    assert entropy_of(eafo_step(torch.relu, NORMAL, 0.1, "positive"), NORMAL, restrict="positive") < before


@pytest.mark.parametrize("options", [{}, {"bw": 0.2}, {"bins": 60}])
def test_density_of_samples(options):
    samples = 1 + 2 * torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density, u = GridDensity.from_samples(samples, **options), np.linspace(-5, 7, 101)
    np.testing.assert_allclose(density.pdf(u), norm.pdf(u, 1, 2), atol=0.015)
    np.testing.assert_allclose(density.cdf(u), norm.cdf(u, 1, 2), atol=0.01)
    assert density.std == pytest.approx(2, abs=0.05)
    assert density.cdf(np.array([-99.0, 99.0])).tolist() == pytest.approx([0, 1])
    assert density.pdf(np.array([-99.0, 99.0])).tolist() == [0, 0]
    assert entropy_of(lambda x: 1.0 * x, density) == pytest.approx(0.5 * math.log(8 * math.pi * math.e), abs=0.02)
    if not options:
        u = np.linspace(-3, 5, 101)
        np.testing.assert_allclose(density.derivative(u), -(u - 1) / 4 * norm.pdf(u, 1, 2), atol=0.02)


def test_worst_activation_of_a_density_with_a_gap():
    points = np.linspace(-2, 2, 41)
    density = GridDensity(points, np.where(np.abs(points) > 1, 1.0, 0.0))
    worst = wafbc(density)
    assert worst(torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)).tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


def test_a_table_is_straight_beyond_its_knots():
    knots = torch.linspace(-1, 1, 9, dtype=torch.float64)
    table = Activation(knots, knots.exp())
    x = torch.tensor([-3.0, -2.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = table(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, table.slopes[[0, 0, -1, -1]])
    torch.testing.assert_close(y[3] - y[2], table.slopes[-1])
    assert table.float()(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dynamic_activation_lowers_the_entropy_of_what_it_sees():
    torch.manual_seed(0)
    activation = EAFOActivation("softplus", update_every=5, step=0.1, momentum=0.5, max_updates=4)
    close(activation(torch.tensor([-1.0, 2.0])), F.softplus(torch.tensor([-1.0, 2.0])), 1e-4)
    entropies = []
    for _ in range(40):
        activation(0.5 + 1.5 * torch.randn(2000))
        entropies.append(entropy_of(activation.eval(), GaussianDensity(0.5, 1.5)))
        activation.train()
    assert activation.updates == 4
    assert (np.diff(entropies) <= 0).all() and len(np.unique(entropies)) == 5
    assert float(activation.running_mean) == pytest.approx(0.5, abs=0.1)
    assert float(activation.running_var) == pytest.approx(2.25, abs=0.2)
    other = EAFOActivation("identity")
    other.load_state_dict(activation.state_dict())
    x = torch.randn(50)
    assert torch.equal(other.eval()(x), activation.eval()(x))
    assert not list(activation.parameters()) and not activation._forward_hooks


def test_dynamic_activation_rests_in_evaluation_and_when_settled():
    activation = EAFOActivation("sigmoid", update_every=1, tolerance=10.0)
    before = activation.values.clone()
    activation.eval()(torch.randn(100))
    assert activation.batches == 0
    activation.train()(torch.randn(100))
    assert activation.settled and torch.equal(activation.values, before)
    assert not activation.update()


@pytest.mark.bare
def test_dynamic_activation_compiles_and_exports():
    activation, x = EAFOActivation(update_every=1), torch.randn(3, 4)
    compiled = torch.compile(activation, backend="aot_eager", fullgraph=True)
    compiled(x)
    assert activation.batches == 1 and activation.updates == 0
    assert activation.update()
    torch.testing.assert_close(torch.export.export(activation.eval(), (x,)).module()(x), activation(x))


def test_same_seed_same_training():
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), EAFOActivation(update_every=2), nn.Linear(8, 8), CRReLU())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
        outcomes.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CRReLU(math.nan), "eps_init: expected a finite number, got nan"),
        (lambda: CRReLU(num_parameters=0), "num_parameters: expected at least 1, got 0"),
        (lambda: CRReLU(num_parameters=3)(torch.zeros(2, 4)), r"eps: expected one value or one per channel .* \(3,\)"),
        (lambda: CRReLU(num_parameters=3)(torch.zeros(3)), r"eps: expected one value or one per channel .* \(3,\)"),
        (lambda: GaussianDensity(0, 0), "mean, std: expected finite numbers, std positive, got 0, 0"),
        (lambda: GridDensity(np.arange(3.0), np.ones(3)), r"points, values: expected equal shapes \(n,\)"),
        (lambda: GridDensity(np.arange(4.0) ** 2, np.ones(4)), "points: expected evenly spaced, increasing"),
        (lambda: GridDensity(np.arange(4.0), np.zeros(4)), "values: expected finite numbers, none negative"),
        (lambda: GridDensity.from_samples(np.ones(9)), "samples: expected at least two different finite"),
        (lambda: GridDensity.from_samples(np.arange(9.0), bins=3, bw=1.0), "bins, bw: give one of them"),
        (lambda: GridDensity.from_samples(np.arange(9.0), bins=1), "bins: expected at least 2, got 1"),
        (lambda: GridDensity.from_samples(np.arange(9.0), bw=0.0), "bw: expected a positive number, got 0.0"),
        (lambda: Activation(torch.arange(3.0), torch.zeros(3)), "knots, values: expected strictly increasing"),
        (lambda: Activation(torch.arange(3.0), torch.zeros(2)), r"knots, values: expected equal shapes \(n,\)"),
        (lambda: wafbc(NORMAL, 1, 1), "lo, hi: expected lo below hi, got 1, 1"),
        (lambda: eafo_correction(torch.relu, NORMAL), "increases strictly .* give restrict='positive'"),
        (lambda: entropy_of(F.gelu, NORMAL), "activation: expected one that increases strictly"),
        (lambda: entropy_of(torch.sum, NORMAL), r"activation: expected outputs of shape \(3501,\), got \(\)"),
        (lambda: eafo_correction(F.leaky_relu, NORMAL), "expected a differentiable one, got a kink near 0"),
        (lambda: eafo_correction(F.softplus, NORMAL, restrict="negative"), "restrict: expected None or 'positive'"),
        (lambda: eafo_correction(F.softplus, GaussianDensity(-9, 1), "positive"), "no mass above 0"),
        (lambda: eafo_correction(F.softplus, NORMAL, smooth=-1), "smooth: expected 0 or more, got -1"),
        (lambda: entropy_of(F.softplus, NORMAL, np.zeros(9)), "grid: expected at least three increasing points"),
        (lambda: eafo_step(F.softplus, NORMAL, -1.0), "step: expected a positive number, got -1.0"),
        (lambda: EAFOActivation("relu"), "init: expected one of softplus, identity, sigmoid, tanh or a callable"),
        (lambda: EAFOActivation(update_every=0), "update_every: expected at least 1, got 0"),
        (lambda: EAFOActivation(step=0.0), "step: expected a positive number, got 0.0"),
        (lambda: EAFOActivation(knots=4), "knots: expected at least 8, got 4"),
        (lambda: EAFOActivation(momentum=0.0), r"momentum: expected a number in \(0, 1\], got 0.0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x: expected a floating tensor, got torch.int64"):
        crrelu(torch.arange(3), 0.1)
