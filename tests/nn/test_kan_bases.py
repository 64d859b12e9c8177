import math

import numpy as np
import pytest
import torch
from scipy import special
from scipy.interpolate import BSpline as ScipyBSpline

import classact
from classact.nn import kan_bases
from classact.nn.kan_bases import (
    BASES,
    WAVELETS,
    KANConv2d,
    KANLinear,
    WaveletKANLinear,
    bspline,
    chebyshev,
    fourier,
    gram,
    jacobi,
    kan_basis,
    rational,
    rbf,
    relu_bump,
    rswaf,
)

X = torch.linspace(-0.97, 0.98, 40, dtype=torch.float64)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4, 5])
def test_bsplines_are_those_of_scipy(order):
    grid, low, high = 6, -0.5, 2.5
    knots = low + 0.5 * np.arange(-order, grid + order + 1)
    x = np.random.default_rng(0).uniform(-3, 5, 300)
    elements = [ScipyBSpline.basis_element(knots[j : j + order + 2], extrapolate=False) for j in range(grid + order)]
    expected = torch.from_numpy(np.stack([np.nan_to_num(element(x)) for element in elements], -1))
    torch.testing.assert_close(bspline(torch.from_numpy(x), grid, order, low, high), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(bspline(torch.from_numpy(x).float(), grid, order, low, high), expected.float())


def test_bsplines_at_zero_and_their_sum():
    expected = torch.tensor([0, 0, 1, 23, 23, 1, 0, 0]) / 48
    torch.testing.assert_close(bspline(torch.tensor(0.0)), expected)
    torch.testing.assert_close(bspline(X).sum(-1), torch.ones_like(X))
    assert bspline(torch.tensor([-2.3, 2.3])).abs().max() == 0


def test_polynomials_are_those_of_scipy():
    torch.testing.assert_close(chebyshev(torch.tensor(0.5), 4), torch.tensor([1, 0.5, -0.5, -1, -0.5]))
    theta = torch.linspace(0, math.pi, 30, dtype=torch.float64)
    torch.testing.assert_close(chebyshev(theta.cos(), 9), torch.cos(theta.unsqueeze(-1) * torch.arange(10)))
    for a, b in ((1.0, 1.0), (0.5, 2.0), (0.0, 0.0)):
        expected = np.stack([special.eval_jacobi(n, a, b, X.numpy()) for n in range(6)], -1)
        torch.testing.assert_close(jacobi(X, 5, a, b), torch.from_numpy(expected))
    assert chebyshev(X, 0).shape == jacobi(X, 0).shape == (40, 1)


def test_gram_polynomials_with_zero_factors_are_powers():
    powers = torch.stack([X**n for n in range(5)], -1)
    torch.testing.assert_close(gram(X, 4, torch.zeros(3)), powers)
    third = X**3 - X * 0.1 * 3 * 3 / 4 - X * 0.2 * 5 * 4 * 15 / 9  # weights 9/4 and 100/3
    torch.testing.assert_close(gram(X, 3, torch.tensor([0.1, 0.2], dtype=torch.float64))[..., 3], third)


def test_fourier_recurrence():
    x = torch.linspace(-5, 5, 101)
    angles = x.double().unsqueeze(-1) * torch.arange(1, 11)
    expected = torch.cat([angles.cos(), angles.sin()], -1)
    torch.testing.assert_close(fourier(x.double(), 10), expected)
    torch.testing.assert_close(fourier(x, 10), expected.float(), atol=1e-5, rtol=0)


def test_known_values_of_wavelets_and_bumps():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert kan_bases.mexican_hat(zero).item() == pytest.approx(-0.867325, abs=1e-6)
    assert kan_bases.dog(one).item() == pytest.approx(-0.606531, abs=1e-6)
    assert kan_bases.morlet(one).item() == pytest.approx(math.cos(5) * math.exp(-0.5), abs=1e-6)
    assert kan_bases.meyer(torch.tensor(0.25)).item() == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert kan_bases.meyer(torch.tensor([0.0, 1.0, 7.0])).abs().max() < 1e-6
    assert kan_bases.shannon(zero).item() == 1
    assert kan_bases.shannon(torch.tensor([13.0, -20.0])).tolist() == [0, 0]
    centres = torch.linspace(-2, 2, 8)
    at_third = rbf(centres[3], centres, 4 / 7)
    torch.testing.assert_close(at_third[2:5], torch.tensor([math.exp(-1), 1, math.exp(-1)]))
    torch.testing.assert_close(rswaf(one, torch.tensor([1.0, 0.0]), 2.0), torch.tensor([1, 1 - math.tanh(0.5) ** 2]))
    low = torch.arange(-3, 5) / 5
    peaks = relu_bump(low + 0.4, low, low + 0.8, 4 * 25 / 16).diagonal()
    torch.testing.assert_close(peaks, torch.ones(8))


def test_rational_is_the_quotient_and_its_denominator_at_least_one():
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)
    p, q = torch.randn(7, 1, 6, dtype=torch.float64), torch.randn(7, 1, 4, dtype=torch.float64)
    top = sum(p[..., i] * x**i for i in range(6))
    bottom = 1 + sum(q[..., i] * x ** (i + 1) for i in range(4)).abs()
    torch.testing.assert_close(rational(x, p, q), top / bottom)
    assert (rational(x, p, q).abs() <= top.abs() + 1e-9).all()


@pytest.mark.parametrize("name", BASES)
def test_families_have_right_gradients_and_stay_finite(name):
    torch.manual_seed(0)
    basis = kan_basis(name).double()
    x = (torch.rand(6, dtype=torch.float64) * 1.7 - 0.83).requires_grad_()
    assert torch.autograd.gradcheck(basis, (x,))
    far = basis(torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64))
    assert far.shape == (3, basis.num)
    assert far.isfinite().all()
    basis(x.detach().requires_grad_()).sum().backward()
    assert all(p.grad.isfinite().all() for p in basis.parameters() if p.requires_grad)
    assert torch.equal(basis(x), basis(x))


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelets_have_right_gradients(name):
    z = torch.tensor([-2.1, -0.7, 0.3, 0.9, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(WAVELETS[name], (z,))
    basis = kan_basis("wavelet", wavelet=name)
    basis(torch.zeros(3)).sum().backward()
    assert basis.translation.grad.isfinite().all() and basis.scale.grad.isfinite().all()


@pytest.mark.parametrize("name", BASES)
def test_linear_layer_is_the_sum_over_edges(name):
    torch.manual_seed(0)
    layer, x = KANLinear(4, 3, (name, {})).double(), torch.rand(2, 5, 4, dtype=torch.float64) - 0.5
    expected = torch.nn.functional.silu(x) @ layer.base_weight.T
    expected = expected + torch.einsum("abim,oim->abo", layer.basis(x), layer.coefficients)
    torch.testing.assert_close(layer(x), expected)


def test_without_functions_it_is_a_perceptron():
    layer, x = KANLinear(4, 3, ("mlp", {"activation": "identity"}), base=None), torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ layer.coefficients.squeeze(-1).T)
    conv = KANConv2d(4, 6, 3, 2, 1, 1, 2, ("mlp", {"activation": "identity"}), base=None)
    image = torch.randn(2, 4, 9, 8)
    expected = torch.nn.functional.conv2d(image, conv.coefficients.flatten(1, 2), None, 2, 1, 1, 2)
    torch.testing.assert_close(conv(image), expected)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), ((1, 2), (2, 0), (2, 1))])
def test_convolution_is_the_layer_on_patches(stride, padding, dilation):
    torch.manual_seed(0)
    conv = KANConv2d(3, 4, (3, 2), stride, padding, dilation, basis="bspline")
    layer, x = KANLinear(18, 4, basis="bspline"), torch.rand(2, 3, 8, 7) * 2 - 1
    with torch.no_grad():  # (O, C, m, kh, kw) to (O, C kh kw, m)
        layer.coefficients.copy_(conv.coefficients.movedim(2, -1).flatten(1, 3))
        layer.base_weight.copy_(conv.base_weight.flatten(1))
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    patches = torch.nn.functional.unfold(x, (3, 2), **options).transpose(1, 2)
    out = conv(x)
    torch.testing.assert_close(out, layer(patches).transpose(1, 2).reshape(out.shape), atol=1e-5, rtol=1e-5)


def test_wavelet_layer_has_a_wavelet_on_every_edge():
    torch.manual_seed(0)
    layer, x = WaveletKANLinear(3, 2), torch.randn(2, 4, 3)
    with torch.no_grad():
        layer.translation.normal_(), layer.scale.uniform_(0.5, 2)
    expected = torch.zeros(2, 4, 2)
    for o in range(2):
        for i in range(3):
            z = (x[..., i] - layer.translation[o, i]) / layer.scale[o, i]
            expected[..., o] += layer.weight[o, i] * kan_bases.mexican_hat(z)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_normalised_input(norm):
    layer, x = KANLinear(6, 3, norm=norm), 50 + 7 * torch.randn(4, 5, 6)
    torch.testing.assert_close(layer(x), layer(3 * x), atol=1e-4, rtol=1e-3)
    conv, image = KANConv2d(4, 3, 3, norm=norm), 50 + 7 * torch.randn(4, 4, 6, 6)
    torch.testing.assert_close(conv(image), conv(3 * image), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        lambda: KANLinear(5, 3, ("chebyshev", {"degree": 7}), norm="layer"),
        lambda: KANConv2d(4, 6, 3, padding=1, groups=2, basis="wavelet", norm="batch"),
        lambda: WaveletKANLinear(5, 3, "morlet"),
    ],
)
def test_round_trip_through_safetensors(model, tmp_path):
    model = model().eval()
    x = torch.randn(2, 4, 6, 6) if isinstance(model, KANConv2d) else torch.randn(2, 5)
    loaded = classact.load(classact.save(model, tmp_path / "m"), type(model)(**model.config))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["bspline", "rbf", "chebyshev", "wavelet", "fourier", "relu"])
def test_bfloat16_autocast(name):
    layer = KANConv2d(3, 4, 3, basis=name)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.rand(2, 3, 6, 6)).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.bare
@pytest.mark.parametrize("name", BASES)
def test_compiles_and_exports(name):
    torch.compiler.reset()
    layer, x = KANLinear(4, 3, name), torch.rand(5, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bspline(X, grid=0), "grid, order, low, high: expected grid >= 1"),
        (lambda: bspline(X, low=1.0, high=1.0), "low < high, got 5, 3, 1.0, 1.0"),
        (lambda: chebyshev(X, -1), "degree: expected at least 0, got -1"),
        (lambda: jacobi(X, 2, -1.0), "a, b: expected numbers greater than -1"),
        (lambda: gram(X, 3, torch.zeros(4)), r"beta: expected shape \(2,\) for degree 3, got \(4,\)"),
        (lambda: fourier(X, 0), "n: expected at least 1, got 0"),
        (lambda: kan_basis("spline"), "name: expected one of bspline, rbf, .* got 'spline'"),
        (lambda: kan_basis("rbf", num=1), "num: expected at least 2, got 1"),
        (lambda: kan_basis("rbf", width=-1.0), "expected low < high and width > 0"),
        (lambda: kan_basis("chebyshev", squash="sigmoid"), "squash: expected 'tanh', 'clamp' or None"),
        (lambda: kan_basis("wavelet", wavelet="haar"), "wavelet: expected one of mexican_hat, .* got 'haar'"),
        (lambda: kan_basis("wavelet", scale=0.0), "scale: expected a positive number"),
        (lambda: KANLinear(4, 3, ("rbf", 3)), "space: expected a name or a pair of name and options"),
        (lambda: KANLinear(4, 3, base="swish"), "base: expected one of silu, .* got 'swish'"),
        (lambda: KANLinear(4, 3, norm="group"), "norm: expected 'layer', 'batch' or None, got 'group'"),
        (lambda: KANLinear(0, 3), "in_features: expected at least 1, got 0"),
        (lambda: KANLinear(4, 3)(torch.rand(2, 5)), r"x: expected shape \(..., 4\), got \(2, 5\)"),
        (lambda: KANConv2d(3, 4, 0), "kernel_size: expected an int or a pair of them, at least 1, got 0"),
        (lambda: KANConv2d(3, 4, 3, groups=2), "groups: expected a divisor of in_channels 3 and out_channels 4"),
        (lambda: KANConv2d(3, 4, 3)(torch.rand(3, 8, 8)), r"x: expected shape \(N, 3, H, W\), got \(3, 8, 8\)"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
