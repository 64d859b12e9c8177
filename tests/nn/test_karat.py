import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.nn.karat.analyses import attention_maps, attention_spectrum, loss_landscape, weight_distributions
from classact.nn.karat.attention import KArAttention, attention_matrices, attention_transfer, karat_vit
from classact.nn.karat.operator import LearnableRowOperator, UnivariateSum, simplex_projection
from classact.reproductions.nn.karat import constructed, kept_for_backward

BASES = ("fourier", "bspline", "mexican_hat", "morlet", "dog", "meyer", "shannon", "rational")
ORDERS = ("W_phi", "phi_W", "phi_phi", "full")


def count(module):
    return sum(p.numel() for p in module.parameters())


def small_vit(depth=2, classes=3, **options):
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "num_heads": 3}
    return VisionTransformer(num_classes=classes, depth=depth, **settings, **options)


def test_fourier_unit():
    unit = UnivariateSum(1, 1, 1, grid=2).double()
    with torch.no_grad():
        unit.coefficients.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))  # cosines, then sines
    assert unit(torch.full((1, 1, 1, 1), 0.7, dtype=torch.double)).item() == pytest.approx(0.4414356, abs=1e-7)


def test_operator_is_the_triple_sum():
    torch.manual_seed(0)
    operator = LearnableRowOperator(5, heads=2, rank=3, grid=2).double()
    scores = torch.randn(2, 2, 5, 5, dtype=torch.double)
    c = operator.phi.coefficients
    expected = torch.zeros(2, 2, 5, 3, dtype=torch.double)
    for h in range(2):
        for p in range(3):
            for q in range(5):
                for m in (1, 2):
                    t = scores[:, h, :, q]
                    expected[:, h, :, p] += c[h, p, q, m - 1] * torch.cos(m * t) + c[h, p, q, m + 1] * torch.sin(m * t)
    torch.testing.assert_close(operator.phi(scores), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(operator(scores), torch.einsum("bhkp,hnp->bhkn", expected, operator.W))


def test_operator_of_known_coefficients():
    operator = LearnableRowOperator(5, heads=2, rank=3, grid=2)
    scores = torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        operator.phi.coefficients.zero_()
    assert (operator(scores) == 0).all()
    with torch.no_grad():
        operator.phi.coefficients[..., 0] = 1
    torch.testing.assert_close(operator.phi(scores), torch.cos(scores).sum(-1, keepdim=True).expand(-1, -1, -1, 3))


@pytest.mark.parametrize("base", ["zero", "identity", "silu", "gelu"])
def test_scales_of_one_change_nothing(base):
    torch.manual_seed(0)
    plain, scaled = (UnivariateSum(2, 5, 3, base=base, scales=scales) for scales in (False, True))
    scaled.load_state_dict(plain.state_dict(), strict=False)
    t = torch.randn(2, 2, 4, 5)
    torch.testing.assert_close(plain(t), scaled(t))
    with torch.no_grad():
        plain.coefficients.zero_()
    fixed = {"zero": torch.zeros_like, "identity": lambda v: v, "silu": F.silu, "gelu": F.gelu}[base](t)
    torch.testing.assert_close(plain(t), fixed.sum(-1, keepdim=True).expand(-1, -1, -1, 3))


def test_output_of_the_two_initialisations():
    torch.manual_seed(0)
    scores = 10 * torch.randn(4, 1, 65, 65)
    for init, std in (("normal", math.sqrt(65 * 3)), ("scaled", 1.0)):
        phi = UnivariateSum(1, 65, 64, init=init)
        assert float(phi(scores).detach().std()) == pytest.approx(std, rel=0.1)


def test_projection_on_the_simplex():
    for y, expected in (((0.5, -0.2, 0.9, 0.1), (0.3, 0, 0.7, 0)), ((3.0, 1, 0.2), (1, 0, 0))):
        torch.testing.assert_close(simplex_projection(torch.tensor(y)), torch.tensor(expected, dtype=torch.float32))
    y = 3 * torch.randn(4, 7, 9)
    for dim in (0, 1, 2):
        found = simplex_projection(y, dim)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(dim), torch.ones_like(found.sum(dim)))
        torch.testing.assert_close(simplex_projection(found, dim), found, atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(simplex_projection, torch.randn(3, 6, dtype=torch.double, requires_grad=True))
    assert simplex_projection(y.bfloat16()).dtype == torch.bfloat16


def test_projection_is_the_nearest_point():
    from scipy.optimize import minimize

    y = np.random.default_rng(0).normal(size=6)
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(
        lambda w: ((w - y) ** 2).sum(), np.full(6, 1 / 6), bounds=[(0, 1)] * 6, constraints=simplex, tol=1e-14
    )
    assert abs(simplex_projection(torch.tensor(y)).numpy() - found.x).max() < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_rank_is_bounded_where_softmax_has_more(rank):
    torch.manual_seed(rank)
    scores = torch.randn(2, 3, 17, 17, dtype=torch.double)
    sigma = LearnableRowOperator(17, heads=3, rank=rank).double()(scores)
    assert (torch.linalg.matrix_rank(sigma) <= rank).all()
    assert (torch.linalg.matrix_rank(scores.softmax(-1)) == 17).all()


def test_full_operator_is_the_modular_one_without_a_bottleneck():
    full, modular = LearnableRowOperator(6, heads=2, order="full"), LearnableRowOperator(6, heads=2, rank=6)
    with torch.no_grad():
        modular.phi.coefficients.copy_(full.phi.coefficients)
        modular.W.copy_(torch.eye(6))
    scores = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(full(scores), modular(scores))


def test_orders_are_what_they_say():
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 6, 6)
    before = LearnableRowOperator(6, heads=2, rank=3, order="phi_W")
    torch.testing.assert_close(before(scores), before.phi(torch.einsum("bhkn,hrn->bhkr", scores, before.W)))
    twice = LearnableRowOperator(6, heads=2, rank=3, order="phi_phi")
    torch.testing.assert_close(twice(scores), twice.phi2(twice.phi(scores)))
    assert count(LearnableRowOperator(6, heads=2, order="full")) == 2 * 36 * 6


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_basis_in_every_order_learns_from_every_parameter(basis, order):
    torch.manual_seed(0)
    operator = LearnableRowOperator(7, heads=2, rank=3, basis=basis, grid=2, order=order, base="silu", scales=True)
    weights = operator(0.3 * torch.randn(2, 2, 7, 7))
    assert weights.shape == (2, 2, 7, 7) and weights.isfinite().all()
    weights.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in operator.parameters())


@pytest.mark.parametrize("basis", BASES)
def test_gradients_of_every_basis(basis):
    torch.manual_seed(0)
    operator = LearnableRowOperator(4, heads=1, rank=2, basis=basis, grid=2).double()
    scores = (0.9 * torch.rand(1, 1, 2, 4, dtype=torch.double) + 0.01).requires_grad_()
    names = [name for name, _ in operator.named_parameters()]

    def run(a, *parameters):
        return torch.func.functional_call(operator, dict(zip(names, parameters, strict=True)), (a,))

    assert torch.autograd.gradcheck(run, (scores, *(p.detach().requires_grad_() for p in operator.parameters())))


@pytest.mark.parametrize("basis", BASES)
def test_every_basis_is_finite_at_zero(basis):
    assert LearnableRowOperator(5, rank=2, basis=basis)(torch.zeros(1, 1, 5, 5)).isfinite().all()


def test_numbers_of_parameters_at_197_tokens():
    assert count(LearnableRowOperator(197)) == 2 * 3 * 12 * 197 + 12 * 197 == 16_548
    assert count(LearnableRowOperator(197, scales=True)) == 21_276
    assert count(LearnableRowOperator(197, grid=1, scales=True)) == 11_820


@pytest.mark.parametrize(
    ("backbone", "classes", "mode", "grid", "softmax", "published"),
    [
        ("vit_small_patch16_224", 1000, "blockwise", 3, 22.05, 23.58),
        ("vit_base_patch16_224", 10, "blockwise", 1, 85.81, 87.51),
        ("vit_tiny_patch16_224", 10, "universal", 3, 5.53, 5.59),
    ],
)
def test_published_numbers_of_parameters(backbone, classes, mode, grid, softmax, published):
    from timm import create_model

    with torch.device("meta"):
        model = create_model(backbone, num_classes=classes)
        assert round(count(model) / 1e6, 2) == softmax
        assert round(count(karat_vit(model, mode, grid=grid, scales=True)) / 1e6, 2) == published


def test_full_rank_multiplies_the_parameters_of_vit_tiny():
    """Equation 1 alone: 33.5 million; the paper's 39.06 million have four more numbers for each function."""
    from timm import create_model

    with torch.device("meta"):
        model = create_model("vit_tiny_patch16_224", num_classes=10)
        plain = count(model)
        full = count(karat_vit(model, grid=10, order="full"))
    assert full - plain == 36 * 197**2 * 20
    assert round((plain + 36 * 197**2 * 24) / 1e6, 2) == 39.06


def test_universal_blocks_share_one_operator():
    def operators(depth, mode):
        model = karat_vit(small_vit(depth), mode, rank=4)
        return model, [block.attn.operator for block in model.blocks]

    shallow, shared = operators(2, "universal")
    deep, more = operators(5, "universal")
    assert len({id(one) for one in shared}) == len({id(one) for one in more}) == 1
    assert count(shallow) - count(small_vit(2)) == count(deep) - count(small_vit(5)) == count(shared[0])
    model, own = operators(3, "blockwise")
    assert len({id(one) for one in own}) == 3 and count(model) - count(small_vit(3)) == 3 * count(own[0])
    shallow(torch.randn(2, 1, 16, 16)).sum().backward()
    gradient = shared[0].W.grad.clone()
    assert (gradient != 0).any()


def test_operator_knows_tokens_by_their_place():
    """Softmax attention moves with its tokens; this one must not, whoever wants to mend it."""
    torch.manual_seed(0)
    x, order = torch.randn(1, 9, 12), torch.tensor([0, 5, 2, 8, 1, 3, 4, 7, 6])
    plain, learnable = KArAttention(12, 3, 9, softmax_heads=3), KArAttention(12, 3, 9)
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order])
    assert (learnable(x[:, order]) - learnable(x)[:, order]).abs().max() > 0.1


def test_softmax_heads_are_timms():
    from timm.layers import Attention, RmsNorm

    x = torch.randn(2, 9, 12)
    for options in ({}, {"qkv_bias": True}, {"qk_norm": True, "norm_layer": RmsNorm}):
        theirs = Attention(12, 3, **options)
        ours = KArAttention.from_attention(theirs, 9, softmax_heads=3)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(x, return_scores=True).tokens, theirs(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("softmax_heads", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_output_is_weights_times_values_and_rows_change_nothing(l1, softmax_heads, order):
    torch.manual_seed(0)
    operator = LearnableRowOperator(9, heads=3 - softmax_heads, rank=4, order=order)
    model = KArAttention(12, 3, 9, operator, l1_projection=l1, softmax_heads=softmax_heads).double()
    x = torch.randn(2, 9, 12, dtype=torch.double, requires_grad=True)
    tokens, scores, attention = model(x, return_scores=True)
    v = model.qkv(x)[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(model.proj((attention @ v).transpose(1, 2).flatten(2)), tokens)
    if l1 or softmax_heads:
        torch.testing.assert_close(attention[:, : 3 if l1 else 1].sum(-1).min().item(), 1.0)
    found = []
    for rows in (None, 4, 100):
        model.rows = rows
        model.zero_grad()
        x.grad = None
        model(x).square().sum().backward()
        found.append([model(x).detach(), x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0][0], tokens.detach())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert scores.shape == (2, 3, 9, 9)


def test_rows_keep_a_third_of_the_memory_of_the_direct_sum():
    torch.manual_seed(0)
    model = KArAttention(48, 3, 65, rows=16)
    x = torch.randn(2, 65, 48)

    def direct():
        q, k, v = model.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        angles = (q @ k.transpose(-1, -2) / 4).unsqueeze(-1) * torch.arange(1, 4)
        a, b = model.operator.phi.coefficients.split(3, -1)
        phi = torch.einsum("bhkqm,hpqm->bhkp", angles.cos(), a) + torch.einsum("bhkqm,hpqm->bhkp", angles.sin(), b)
        return model.proj((phi @ model.operator.W.transpose(-1, -2) @ v).transpose(1, 2).flatten(2))

    torch.testing.assert_close(model(x), direct(), atol=1e-4, rtol=1e-4)
    ours, theirs = (kept_for_backward(run, list(model.parameters())) for run in (lambda: model(x), direct))
    assert theirs > 3 * ours


def test_masks_and_other_lengths_are_refused():
    model = KArAttention(12, 3, 9)
    x = torch.randn(2, 9, 12)
    for options in ({"attn_mask": torch.zeros(9, 9)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask, is_causal: expected none"):
            model(x, **options)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 9, 12\), got \(2, 8, 12\); the number of tokens"):
        model(x[:, :8])


def test_convit_keeps_its_gated_layers():
    from timm.models.convit import GPSA, ConVit

    model = karat_vit(ConVit(16, 4, embed_dim=4, depth=3, num_heads=3, local_up_to_layer=2, num_classes=5), rank=4)
    assert [type(block.attn) for block in model.blocks] == [GPSA, GPSA, KArAttention]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def swin(**options):
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(32, 2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5, **options)


def test_swin_windows():
    from timm.models.swin_transformer import WindowAttention

    torch.manual_seed(0)
    model = swin().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    window = model.layers[0].blocks[1].attn
    assert type(window) is WindowAttention
    karat_vit(model, rank=4)
    parts = [block.attn for layer in model.layers for block in layer.blocks]
    assert [part.n_tokens for part in parts] == [16] * 4 and [part.num_heads for part in parts] == [2, 2, 4, 4]
    assert parts[1].qkv is window.qkv and parts[1].relative_position_bias_table is window.relative_position_bias_table
    found = model(x)
    assert found.shape == expected.shape and (found - expected).abs().max() > 1e-3
    found.sum().backward()
    for part in parts:  # with softmax in all heads it is timm's again, shifted windows included
        part.softmax_heads, part.operator = part.num_heads, None
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_tokens_across_the_seam_say_nothing():
    torch.manual_seed(0)
    part = karat_vit(swin(), rank=4).layers[0].blocks[1].attn
    x, mask = torch.randn(4, 16, 8), torch.zeros(2, 16, 16)
    mask[1, :8, 8:] = mask[1, 8:, :8] = -100.0
    changed = x.clone()
    changed[:, 8:] += 1
    differs = (part(x, mask) - part(changed, mask))[:, :8].abs().amax((1, 2))
    assert (differs[[1, 3]] == 0).all() and (differs[[0, 2]] > 1e-3).all()


def test_swapping_keeps_the_weights():
    torch.manual_seed(0)
    model = small_vit(qk_norm=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    karat_vit(model, rank=4, basis="morlet", softmax_heads=1, rows=5)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert {name.split(".")[3] for name in after.keys() - before.keys()} == {"operator"}


def test_all_softmax_heads_leave_the_network_as_it_was():
    torch.manual_seed(0)
    model, x = small_vit().eval(), torch.randn(2, 1, 16, 16)
    expected = model(x)
    torch.testing.assert_close(karat_vit(model, softmax_heads=3)(x), expected, atol=1e-5, rtol=1e-5)


def test_transfer_uses_the_teachers_attention_only():
    torch.manual_seed(0)
    student, teacher, x = small_vit(), karat_vit(small_vit(), rank=4), torch.randn(2, 1, 16, 16)
    same = attention_transfer(teacher, teacher).eval()
    torch.testing.assert_close(same(x), teacher.eval()(x), atol=1e-5, rtol=1e-5)
    before = {name: t.clone() for name, t in student.state_dict().items()}
    transfer = attention_transfer(student, teacher.train()).train()
    assert not transfer.teacher.training and transfer.student.training and teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    optimizer = torch.optim.AdamW([p for p in transfer.parameters() if p.requires_grad], 1e-2)
    fixed = {name: t.clone() for name, t in transfer.teacher.state_dict().items()}
    moved = {name: t.clone() for name, t in transfer.student.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        transfer(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(t, fixed[name]) for name, t in transfer.teacher.state_dict().items())
    assert all(not torch.equal(t, moved[name]) for name, t in transfer.student.state_dict().items() if t.ndim > 1)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    with pytest.raises(RuntimeError, match="the student has no weights of its own"):
        transfer.student(x)
    with pytest.raises(ValueError, match=r"student, teacher: expected equal heads .* \[3, 3, 3\] and \[3, 3\]"):
        attention_transfer(small_vit(3), teacher)


def trained_path(model, x, y, steps=6):
    path, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        path.append({name: t.clone() for name, t in model.state_dict().items()})
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    path.append({name: t.clone() for name, t in model.state_dict().items()})
    return path


def test_landscape_of_a_paraboloid_is_the_paraboloid():
    model = nn.Linear(3, 1, bias=False)
    goal = torch.tensor([1.0, -2.0, 0.5])
    steps = (torch.tensor([4.0, 0, 0]), torch.tensor([1.0, 2, 0]), torch.tensor([0.0, 1.0, 0]), torch.zeros(3))
    path = [{"weight": (goal + step).unsqueeze(0)} for step in steps]
    loader = [(torch.eye(3), goal.unsqueeze(1))] * 2
    found = loss_landscape(model, path, loader, span=1.0, steps=5, loss=F.mse_loss)
    x, y = np.meshgrid(found.x, found.y)
    np.testing.assert_allclose(found.losses, (x**2 + y**2) / 3, atol=1e-5)
    np.testing.assert_allclose(found.path[-1], 0, atol=1e-6)
    np.testing.assert_allclose((found.path**2).sum(1), [float(step.square().sum()) for step in steps], rtol=1e-5)
    np.testing.assert_allclose(found.explained.sum(), 1, atol=1e-6)
    second = [np.abs(np.diff(found.losses, 2, axis=axis)).ravel() for axis in (0, 1)]
    assert found.roughness == pytest.approx(np.concatenate(second).mean() / np.ptp(found.losses))


def test_reports_leave_the_model_alone_and_can_be_saved(tmp_path):
    torch.manual_seed(0)
    model = karat_vit(small_vit(), rank=2).train()
    x, y = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 2])
    path = trained_path(model, x, y)
    model.zero_grad(set_to_none=True)
    model.blocks[0].eval()
    before, modes = {name: t.clone() for name, t in model.state_dict().items()}, [m.training for m in model.modules()]
    spectrum = attention_spectrum(model, x)
    reports = {
        "landscape": loss_landscape(model, path, [(x, y)], steps=4),
        "spectrum": spectrum,
        "weights": weight_distributions({"start": path[0], "end": path[-1]}),
        "maps": attention_maps(model, x),
    }
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    for name, report in reports.items():
        assert report.save(tmp_path / "deep" / name).exists() and (tmp_path / "deep" / f"{name}.csv").exists()
        assert len(report.table())
    assert reports["landscape"].losses.shape == (4, 4) and len(reports["landscape"].path) == 7
    assert spectrum.before.shape == spectrum.after.shape == (3, 3, 2, 17)
    assert (spectrum.significant(1e-5)["after"] == 2).all()
    assert (spectrum.significant(1e-5)["before"] == 4).all()  # the width of a head
    assert reports["maps"].maps.shape == (3, 2, 3, 4, 4) and (reports["maps"].maps >= 0).all()


def test_spectrum_and_maps_are_those_of_the_matrices():
    torch.manual_seed(0)
    model, x = small_vit().eval(), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        found = attention_matrices(model, x)
    assert [one.name for one in found] == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(found[0].scores.softmax(-1), found[0].attention)
    spectrum, maps = attention_spectrum(model, x), attention_maps(model, x)
    expected = np.linalg.svd(found[1].attention[1, 2].numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum.after[1, 2, 1], expected, atol=1e-6)
    row = found[1].scores[1, 2, 0, 1:].clamp(min=0).reshape(4, 4)
    np.testing.assert_allclose(maps.maps[1, 1, 2], row.numpy(), atol=1e-6)


def test_hooks_are_removed_after_an_error():
    model = small_vit()
    with pytest.raises(RuntimeError):
        attention_matrices(model, torch.randn(1, 2, 16, 16))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_histograms_of_the_weights():
    start, end = torch.linspace(-1, 1, 2001), torch.linspace(0, 1, 1001)
    found = weight_distributions({"0": {"w": start, "n": torch.tensor(3)}, "9": {"w": end}}, bins=2)
    np.testing.assert_allclose(found.densities, [[0.5, 0.5], [0, 1]], atol=2e-3)
    assert found.drift() == pytest.approx(0.5, abs=2e-3)
    np.testing.assert_allclose(found.statistics[:, 2], [0.05, 0.05], atol=1e-3)
    assert weight_distributions({"0": {"a": start, "b": end}}, lambda name: name == "b").edges[0] == 0


def test_constructed_images_have_the_class_they_say():
    for task in ("marked", "rows"):
        images, labels = constructed(3, task, 400)
        same, _ = constructed(3, task, 400)
        assert torch.equal(images, same) and images.shape == (400, 1, 28, 28) and set(labels.tolist()) == {0, 1, 2, 3}
        textures = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 7, 7))).float()
        inner = images.unfold(2, 7, 7).unfold(3, 7, 7)[:, 0, :, :, 1:-1, 1:-1]  # (n, 4, 4, 5, 5), without frames
        nearest = (inner.unsqueeze(3) - textures[:, 1:-1, 1:-1]).square().sum((-1, -2)).argmin(-1)
        if task == "rows":
            uniform = (nearest == nearest[:, :, :1]).all(2)
            assert ((uniform.sum(1) == 1) & uniform[torch.arange(400), labels]).float().mean() > 0.98
        else:
            edge = images.unfold(2, 7, 7).unfold(3, 7, 7)[:, 0, :, :, [0, -1]].mean((-1, -2)).flatten(1).argmax(1)
            assert (nearest.flatten(1)[torch.arange(400), edge] == labels).float().mean() > 0.98


def test_same_seed_same_result():
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = karat_vit(small_vit(), rank=4)
        outputs.append(model(torch.ones(1, 1, 16, 16)).detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("options", [{}, {"softmax_heads": 1, "rows": 3, "qkv_bias": False}, {"softmax_heads": 3}])
def test_saved_and_loaded(tmp_path, options):
    torch.manual_seed(0)
    heads = 3 - options.get("softmax_heads", 0)
    operator = LearnableRowOperator(9, heads=heads, rank=4, basis="rational", scales=True) if heads else None
    model = KArAttention(12, 3, 9, operator, **options).eval()
    classact.save(model, tmp_path / "model")
    loaded, x = classact.load(tmp_path / "model"), torch.randn(2, 9, 12)
    assert torch.equal(loaded(x), model(x)) and loaded.rows == model.rows


@pytest.mark.parametrize("basis", BASES)
def test_bfloat16_autocast(basis):
    torch.manual_seed(0)
    model = KArAttention(12, 3, 9, LearnableRowOperator(9, heads=3, rank=4, basis=basis, init="scaled"), rows=4)
    x = torch.randn(2, 9, 12)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.bare
def test_compiles_into_one_graph():
    torch.manual_seed(0)
    model = KArAttention(12, 3, 9, softmax_heads=1, rows=5)
    x = torch.randn(2, 9, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.operator.phi.coefficients.grad is not None


@pytest.mark.bare
@pytest.mark.parametrize("basis", BASES)
def test_exports(basis):
    model = KArAttention(12, 3, 9, LearnableRowOperator(9, heads=3, rank=4, basis=basis)).eval()
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnableRowOperator(5, rank=6), "rank: expected from 1 to the number of tokens, got 6 for 5 tokens"),
        (lambda: LearnableRowOperator(5, rank=0), "rank: expected from 1"),
        (lambda: LearnableRowOperator(17, grid=0), "grid: expected at least 1, got 0"),
        (lambda: LearnableRowOperator(17, basis="sine"), "basis: expected one of fourier, .*, got 'sine'"),
        (lambda: LearnableRowOperator(17, base="relu"), "base: expected one of zero, identity, silu, gelu, got"),
        (lambda: LearnableRowOperator(17, init="ones"), "init: expected one of normal, scaled, got 'ones'"),
        (lambda: LearnableRowOperator(17, order="W"), "order: expected one of W_phi, phi_W, phi_phi, full, got 'W'"),
        (lambda: LearnableRowOperator(17, spline_order=0), "spline_order: expected at least 1, got 0"),
        (lambda: LearnableRowOperator(17, spline_range=0.0), "spline_range: expected a positive number, got 0.0"),
        (
            lambda: LearnableRowOperator(17)(torch.randn(2, 1, 16, 16)),
            r"scores: expected shape \(B, 1, K, 17\), got \(2, 1, 16, 16\); the number of tokens is built",
        ),
        (lambda: KArAttention(13, 3, 9), "dim: expected a multiple of the number of heads, got 13 for 3 heads"),
        (lambda: KArAttention(12, 3, 9, softmax_heads=4), "softmax_heads: expected from 0 to 3, got 4"),
        (lambda: KArAttention(12, 3, 9, rows=0), "rows: expected at least 1, got 0"),
        (
            lambda: KArAttention(12, 3, 9, LearnableRowOperator(9, heads=2, rank=4)),
            "operator: expected one for 3 heads and 9 tokens, got LearnableRowOperator",
        ),
        (lambda: karat_vit(nn.Sequential(nn.Linear(2, 2))), "old: there is no timm"),
        (lambda: karat_vit(small_vit(), "shared"), "mode: expected blockwise or universal, got 'shared'"),
        (lambda: karat_vit(swin(), "universal"), "mode: blocks that share an operator must have equal heads"),
        (lambda: attention_spectrum(nn.Linear(2, 2), torch.randn(1, 3, 4, 4)), "model: expected attention of timm"),
        (lambda: attention_maps(nn.Linear(2, 2), torch.randn(1, 3, 4, 4)), "model: expected a vision transformer"),
        (lambda: loss_landscape(nn.Linear(2, 2), [{}], []), "snapshots: expected at least 3, got 1"),
        (lambda: loss_landscape(nn.Linear(2, 2), [{}] * 3, []), "snapshots: .* there is no bias, weight"),
        (lambda: loss_landscape(nn.Linear(2, 2), [{}] * 3, [], steps=2), "steps, span: expected at least 3 and"),
        (
            lambda: loss_landscape(nn.Linear(2, 2), [nn.Linear(2, 2).state_dict() for _ in range(3)], []),
            "loader: expected batches in every pass",
        ),
        (lambda: weight_distributions({}), "snapshots: expected at least one"),
        (lambda: weight_distributions({"0": {"n": torch.tensor(1)}}), "names: no floating tensor is taken"),
        (lambda: simplex_projection(torch.tensor([1, 2])), "y: expected real numbers"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_gated_attention_is_refused():
    from timm.layers import Attention

    with pytest.raises(ValueError, match="attention: expected neither gates nor a norm"):
        KArAttention.from_attention(Attention(12, 3, gated=True), 9)
