from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import classact
from classact.data.grid import grid_bags
from classact.mil import ABMIL, BagCrossEntropy
from classact.mil.mambamil import (
    MambaBlock,
    MambaMIL,
    NLLSurvivalLoss,
    SelectiveSSM,
    discrete_hazards,
    grid_rows,
    modal_row_length,
    raster_order,
    reverse_order,
    sequence_reorder,
    survival_bins,
)
from classact.nn import selective_scan

PEER = Path(__file__).parent / "peers" / "mambamil.npz"
VARIANTS = [
    {"mode": "plain"},
    {"mode": "bidirectional"},
    {"rate": 3},
    {"rate": 3, "pad": "zero"},
    {"rate": "auto"},
]


def small(n_classes=3, **options):
    torch.manual_seed(0)
    return MambaMIL(20, n_classes, **{"dim": 16, "state": 4, "hidden": 8, "rate": 3, **options})


def lively(model):
    """Scans that matter: with Mamba's small first steps their states hardly move."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


def grid(height=4, width=5, n=1):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1).float().expand(n, -1, -1)


def holes():
    """Bags alone, and padded into one batch with padding in front, between and behind."""
    torch.manual_seed(3)
    bags = [torch.randn(size, 20) for size in (4, 10, 1)]
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, [1, 2, 6, 11]] = True
    mask[1, 1:11] = True
    mask[2, 5] = True
    x = torch.full((3, 12, 20), 99.0)
    x[mask] = torch.cat(bags)
    return bags, x, mask


# ---------------------------------------------------------------- orders


def test_columns_of_seven_and_of_ten():
    def index(length, rate, pad):
        return sequence_reorder(torch.tensor([length]), length, rate, pad)[0][0].tolist()

    assert index(7, 3, "zero") == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert index(7, 3, "skip") == [0, 3, 6, 1, 4, 2, 5]
    assert index(10, 5, "zero") == index(10, 5, "skip") == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]


@pytest.mark.parametrize("pad", ["skip", "zero"])
@pytest.mark.parametrize("rate", [1, 2, 3, 5, 12, 40])
def test_columns_of_every_sequence_by_its_own_length(rate, pad):
    size, length = torch.tensor([12, 7, 5, 1, 0]), 12
    index, inverse = sequence_reorder(size, length, rate, pad)
    steps = index.shape[1]
    assert steps == (12 if pad == "skip" else rate * -(-12 // rate))
    assert torch.equal(inverse.gather(1, index), torch.arange(steps).expand(5, -1))
    for row, n in zip(index.tolist(), size.tolist(), strict=True):
        filled = rate * -(-n // rate) if pad == "zero" else n
        table = np.arange(rate * -(-n // rate)).reshape(-1, rate).T.flatten()
        assert row == [*table[table < filled].tolist(), *range(filled, steps)]


def test_skip_sorts_by_the_remainder():
    size = torch.randint(1, 60, (8,))
    index, _ = sequence_reorder(size, 60, 7)
    for row, n in zip(index, size.tolist(), strict=True):
        assert torch.equal(row[:n], (torch.arange(n) % 7).argsort(stable=True))


def test_a_rate_for_every_sequence():
    size, rate = torch.tensor([9, 7]), torch.tensor([4, 2])
    index, _ = sequence_reorder(size, 9, rate)
    for i in range(2):
        assert torch.equal(index[i], sequence_reorder(size[i : i + 1], 9, int(rate[i]))[0][0])


def test_reversal_leaves_padding_behind():
    index = reverse_order(torch.tensor([4, 2]), 4)
    assert index.tolist() == [[3, 2, 1, 0], [1, 0, 2, 3]]
    assert torch.equal(index.gather(1, index), torch.arange(4).expand(2, -1))


@pytest.mark.parametrize("step", [1.0, 112.3, 255.76, 256.0])
def test_rows_are_those_of_the_grid(step):
    coords = (grid(60, 50) * step + 1234.5).float()
    assert torch.equal(grid_rows(coords), grid(60, 50)[..., 1].double())


def test_pieces_of_tissue_whose_grids_do_not_meet_share_rows():
    """A second piece to the right, half a patch lower; the order runs through both, padding or not."""
    left, right = grid(4, 3) * 256, grid(4, 3) * 256 + torch.tensor([2000.0, 128.0])
    coords = torch.cat([left, right], 1)
    rows = torch.arange(4).repeat_interleave(3).repeat(2)
    assert torch.equal(grid_rows(coords)[0], rows.double())
    shuffle = torch.randperm(24)
    mask, placed = torch.zeros(1, 30, dtype=torch.bool), torch.zeros(1, 30, 2)
    mask[:, 3:27], placed[:, 3:27] = True, coords[:, shuffle]
    order = raster_order(mask, placed)[0, :24] - 3
    expected = torch.cat([torch.arange(12).view(4, 3), torch.arange(12, 24).view(4, 3)], 1).flatten()
    assert torch.equal(shuffle[order], expected)
    assert modal_row_length(rows[raster_order(None, coords)], torch.tensor([24])) == 6


def test_heights_are_rows_where_no_two_instances_share_one():
    coords = torch.tensor([[[5.0, 2.0], [1.0, 0.5], [0.0, 1.0]]])
    assert raster_order(None, coords).tolist() == [[1, 2, 0]]


def test_raster_order_and_row_lengths():
    cells = torch.stack([torch.arange(40) % 8, torch.arange(40) // 8], 1).float()
    coords, mask = torch.stack([cells[torch.randperm(40)] for _ in range(3)]), torch.rand(3, 40) < 0.7
    order, size = raster_order(mask, coords), mask.sum(1)
    y = coords[..., 1].gather(1, order)
    lengths = modal_row_length(y, size)
    for i in range(3):
        keys = np.array([coords[i, :, 0].numpy(), coords[i, :, 1].numpy(), ~mask[i].numpy()])
        assert order[i, : size[i]].tolist() == np.lexsort(keys)[: size[i]].tolist()
        in_row = np.bincount(y[i, : size[i]].long().numpy())
        votes = np.bincount(np.repeat(in_row, in_row))
        assert lengths[i] == votes.argmax()
    assert modal_row_length(grid()[..., 1], torch.tensor([20])) == 5


def test_pieces_of_tissue_with_grids_of_their_own_share_rows():
    """Two pieces of 3 x 4 patches of 256 pixels side by side, one 100 pixels lower; read across both."""
    x, y = (part.flatten() for part in torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij"))
    left = torch.stack([256 * x, 256 * y], 1)
    coords = torch.cat([left, left + torch.tensor([5000, 100])]).unsqueeze(0)
    shuffled = torch.randperm(24)
    order = raster_order(None, coords[:, shuffled])
    read = coords[0, shuffled[order[0]]]
    assert grid_rows(coords)[0].long().tolist() == y.repeat(2).tolist()
    assert read[:8, 0].tolist() == [0, 256, 512, 768, 5000, 5256, 5512, 5768]
    assert (read[:8, 1] < 256).all()
    mask = torch.ones(1, 25, dtype=torch.bool)
    mask[0, 24] = False
    far = torch.cat([coords, torch.full((1, 1, 2), -9999)], 1)
    assert torch.equal(raster_order(mask, far)[0, :24], raster_order(None, coords)[0])
    no_grid = torch.tensor([[[3.0, 0.3], [1.0, 0.2], [2.0, 0.1]]])
    assert raster_order(None, no_grid).tolist() == [[2, 1, 0]]


# ---------------------------------------------------------------- the block


def test_plain_block_is_mambapys():
    from mambapy.mamba import MambaBlock as Peer
    from mambapy.mamba import MambaConfig

    torch.manual_seed(0)
    peer, ours = Peer(MambaConfig(d_model=40, n_layers=1)), MambaBlock(40, mode="plain")
    ours.load_state_dict(peer.state_dict())
    assert {k: v.shape for k, v in MambaBlock(40, mode="plain").state_dict().items()} == {
        k: v.shape for k, v in peer.state_dict().items()
    }
    x = torch.randn(2, 33, 40)
    torch.testing.assert_close(ours(x), peer(x), atol=1e-6, rtol=1e-6)
    lively(peer)
    ours.load_state_dict(peer.state_dict())
    ours.double(), peer.double()
    peer.config.pscan = False
    A = -torch.exp(peer.A_log)
    assert A.min() < -10
    torch.testing.assert_close(ours(x.double()), peer(x.double()), atol=1e-5, rtol=1e-5)  # its A is float32 throughout


def test_initialisation():
    torch.manual_seed(0)
    model = MambaMIL(20, 2, dim=64, layers=1)
    for ssm in (model.blocks[0], model.blocks[0].second):
        step = F.softplus(ssm.dt_proj.bias)
        assert 1e-3 <= step.min() < 2e-3
        assert 0.05 < step.max() <= 0.1 + 1e-6
        assert ssm.dt_proj.weight.abs().max() <= 4**-0.5
        torch.testing.assert_close(-ssm.A_log.exp(), -torch.arange(1.0, 17).expand(128, -1))
        assert (ssm.D == 1).all()
        assert ssm.A_log._no_weight_decay and ssm.D._no_weight_decay
    official = MambaMIL(20, 2, dim=64, layers=1, init="official")
    linear = [m for m in official.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 10
    for layer in linear:
        assert layer.bias is None or (layer.bias == 0).all()
        assert float(layer.weight.detach().std()) == pytest.approx((2 / sum(layer.weight.shape)) ** 0.5, rel=0.2)


def test_rows_of_one_and_of_all_instances_change_nothing():
    x = torch.randn(1, 12, 20)
    outputs = [lively(small(rate=rate, pad=pad))(x).logits for pad in ("skip", "zero") for rate in (1, 12, 5, 40)]
    one, length, five, forty = outputs[:4]
    torch.testing.assert_close(one, length)
    torch.testing.assert_close(one, forty)
    assert (one - five).abs().max() > 1e-3
    torch.testing.assert_close(outputs[4], one)
    torch.testing.assert_close(outputs[5], one)


def test_plain_block_is_causal_and_the_second_scan_is_not():
    x = torch.randn(1, 12, 16)
    later = x.clone()
    later[:, 7:] = torch.randn(1, 5, 16)
    for mode in ("plain", "reorder", "bidirectional"):
        block = lively(MambaBlock(16, mode=mode, rate=5))
        same = torch.allclose(block(x)[:, :7], block(later)[:, :7], atol=1e-6)
        assert same == (mode == "plain")


def test_vertical_neighbours_are_next_to_each_other_in_the_second_scan():
    """Without the first scan and without states, all that connects instances is the second scan's convolution."""
    block = MambaBlock(8, conv=2, rate=5)
    with torch.no_grad():
        block.conv1d.weight[..., :-1] = 0
        for ssm in (block, block.second):
            ssm.dt_proj.bias.fill_(-100)
            ssm.dt_proj.weight.zero_()
    x = torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 7] += 1
    differs = (block(x) - block(changed)).abs().sum(-1)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == [7, 12]


def test_a_sequence_in_two_parts_is_the_sequence():
    """Last states and the last three inputs of the convolution carry over."""
    ssm = lively(SelectiveSSM(16, state=4))
    xz = torch.randn(2, 25, 32)
    state, tail, parts = torch.zeros(2, 16, 4), torch.zeros(2, 3, 16), []
    with torch.no_grad():
        for x, z in (part.chunk(2, -1) for part in (xz[:, :11], xz[:, 11:])):
            tailed = torch.cat([tail, x], 1)
            u = F.silu(F.conv1d(tailed.mT, ssm.conv1d.weight, ssm.conv1d.bias, groups=16).mT)
            delta, B, C = ssm.x_proj(u).split(ssm.sizes, -1)
            arguments = (u, ssm.dt_proj(delta), -ssm.A_log.exp(), B, C, ssm.D, z)
            y, state = selective_scan(*arguments, delta_softplus=True, initial_state=state, return_last_state=True)
            parts.append(y)
            tail = tailed[:, -3:]
        torch.testing.assert_close(torch.cat(parts, 1), ssm(xz), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- the model


def theirs(kind):
    """Model with the stored weights of the authors' code, and its outputs."""
    with np.load(PEER) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    stored = {name.split(":", 2)[2]: value for name, value in arrays.items() if name.startswith(f"{kind}:weight:")}
    weights = {}
    for name, value in stored.items():
        for old, new in (("_fc1.0", "reduce"), ("attention.0", "attention.hidden"), ("attention.2", "attention.score")):
            name = name.replace(old, new)
        if name.startswith("layers."):
            _, layer, part, rest = name.split(".", 3)
            if "A_b_log" in rest or "_b" in rest.split(".")[0]:
                rest = "second." + rest.replace("A_b_log", "A_log").replace("_b", "", 1)
            name = f"{'norms' if part == '0' else 'blocks'}.{layer}.{rest}"
        weights[name] = value
    mode = {"SRMamba": "reorder", "BiMamba": "bidirectional"}[kind]
    model = MambaMIL(20, 3, dim=8, hidden=4, mode=mode, rate=5, pad="zero").double()
    model.load_state_dict(weights)
    return model, arrays["x"], *(arrays[f"{kind}:{name}"] for name in ("logits", "hazards", "survival"))


@pytest.mark.parametrize("kind", ["SRMamba", "BiMamba"])
def test_forward_is_the_authors(kind):
    model, x, logits, hazards, survival = theirs(kind)
    output = model(x)
    torch.testing.assert_close(output.logits, logits, atol=1e-10, rtol=1e-10)
    found = discrete_hazards(output.logits)
    torch.testing.assert_close(found.hazards, hazards, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.survival, survival, atol=1e-10, rtol=1e-10)


def test_zeros_at_the_end_of_the_last_row_matter_in_the_authors_code():
    model, x, logits, *_ = theirs("SRMamba")
    for block in model.blocks:
        block.pad = "skip"
    assert (model(x).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("located", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_batch_with_holes_gives_what_its_bags_give(options, located):
    model = lively(small(**options))
    bags, x, mask = holes()
    coords = torch.rand(3, 12, 2).mul(4).floor() if located else None
    output = model(x, mask, coords)
    for i, bag in enumerate(bags):
        alone = model(bag[None], None, coords[i, mask[i]][None] if located else None)
        torch.testing.assert_close(output.logits[i], alone.logits[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(output.embedding[i], alone.embedding[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention[i, mask[i]], alone.attention[0], atol=1e-6, rtol=1e-5)
    assert output.attention_logits[~mask].isneginf().all()


@pytest.mark.parametrize("options", VARIANTS)
def test_appended_padding_changes_nothing(options):
    model, x = lively(small(**options)), torch.randn(2, 7, 20)
    mask = torch.arange(11) < torch.full((2, 1), 7)
    padded = model(F.pad(x, (0, 0, 0, 4), value=50.0), mask)
    torch.testing.assert_close(padded.logits, model(x).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_coords_make_the_stored_order_irrelevant(options):
    model, x, coords = lively(small(**options)), torch.randn(1, 20, 20), grid()
    output, order = model(x, None, coords), torch.randperm(20)
    shuffled = model(x[:, order], None, coords[:, order])
    torch.testing.assert_close(shuffled.logits, output.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shuffled.attention, output.attention[:, order], atol=1e-6, rtol=1e-5)
    assert (model(x[:, order]).logits - output.logits).abs().max() > 1e-4
    if options.get("rate") != "auto":  # the grid is stored row by row
        torch.testing.assert_close(model(x).logits, output.logits)


def test_automatic_rate():
    x, coords = torch.randn(1, 20, 20), grid()
    auto, four, five = (lively(small(rate=rate)) for rate in ("auto", 4, 5))
    torch.testing.assert_close(auto(x, None, coords).logits, five(x, None, coords).logits)
    torch.testing.assert_close(auto(x).logits, four(x).logits)  # the root of 20 is 4.47


def test_without_blocks_it_is_abmil_with_layer_norm():
    model = small(layers=0)
    abmil = ABMIL(20, 3, dim=16, hidden=8, bias=True)
    abmil.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("norm.")})
    x, mask = torch.randn(2, 9, 20), torch.arange(9) < torch.tensor([[9], [4]])
    z, attention_logits = abmil.pool(F.layer_norm(abmil.embed(x), (16,)), mask)
    output = model(x, mask)
    torch.testing.assert_close(output.logits, abmil.head(z))
    torch.testing.assert_close(output.attention_logits, attention_logits)


def test_long_bags_are_finite():
    block = MambaBlock(8, state=16, rate=100)
    with torch.no_grad():
        block.dt_proj.bias.fill_(20.0)
    x = torch.randn(1, 20_000, 8, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_pool_and_head_are_forward():
    model, (_, x, mask) = lively(small()), holes()
    output = model(x, mask)
    z, attention_logits = model.pool(model.embed(x), mask)
    assert torch.equal(model.head(z), output.logits)
    assert torch.equal(z, output.embedding)
    assert torch.equal(attention_logits, output.attention_logits)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_are_finite_under_autocast(options):
    model, (_, x, mask) = small(**options), holes()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, mask)
        loss = BagCrossEntropy()(output, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(output.attention.float().sum(-1), torch.ones(3), atol=2e-2, rtol=0)
    torch.testing.assert_close(output.logits.float(), model(x, mask).logits, atol=0.05, rtol=0.05)


def test_same_seed_same_result_and_round_trip(tmp_path):
    outputs = []
    for _ in range(2):
        model = small(dropout=0.3, rate="auto", activation="gelu", init="official")
        outputs.append(model(torch.randn(2, 6, 20)).logits)
    assert torch.equal(*outputs)
    loaded = classact.load(classact.save(lively(model), tmp_path / "m"), MambaMIL(**model.config))
    _, x, mask = holes()
    assert loaded.config == model.config
    assert torch.equal(loaded.eval()(x, mask).logits, model(x, mask).logits)


@pytest.fixture
def fresh_compiler():
    """The family's compiled tests share one wrapper, whose recompilations are limited per process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.bare
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph():
    model = lively(small(layers=1, rate="auto"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _, x, mask = holes()
    coords = torch.rand(3, 12, 2).mul(4).floor()
    with torch.no_grad():
        output, expected = compiled(x, mask, coords), model(x, mask, coords)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- survival


def test_survival_loss_by_hand():
    """Hazards 1/2, 1/4, 1/5: survival 1/2, 3/8, 3/10."""
    hazards = torch.tensor([[0.5, 0.25, 0.2]])
    output = SimpleNamespace(logits=hazards.logit())
    found = discrete_hazards(output.logits)
    torch.testing.assert_close(found.survival, torch.tensor([[0.5, 0.375, 0.3]]))
    torch.testing.assert_close(found.risk, torch.tensor([-1.175]))
    for target, likelihood in (((0, 0), 0.5), ((1, 0), 0.125), ((2, 0), 0.075), ((0, 1), 0.5), ((2, 1), 0.3)):
        loss = NLLSurvivalLoss()(output, torch.tensor([target]))
        assert float(loss) == pytest.approx(-np.log(likelihood), rel=1e-5)
        weighted = NLLSurvivalLoss(alpha=0.15)(output, torch.tensor([target]))
        assert float(weighted) == pytest.approx(float(loss) * (0.85 if target[1] else 1), rel=1e-5)
    both = SimpleNamespace(logits=output.logits.expand(2, -1))
    loss = NLLSurvivalLoss()(both, torch.tensor([[1, 0], [2, 1]]))
    assert float(loss) == pytest.approx(-(np.log(0.125) + np.log(0.3)) / 2, rel=1e-5)


def test_survival_loss_keeps_its_gradient_far_out():
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    loss = NLLSurvivalLoss()(SimpleNamespace(logits=logits), torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(120)
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0]]))


def test_bins_are_the_authors():
    """Their data set: `pandas.qcut` of the uncensored times, and `pandas.cut` of all with the outer edges moved out."""
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    time, censored = torch.from_numpy(rng.exponential(30, 200)), torch.from_numpy(rng.integers(0, 2, 200))
    _, edges = pd.qcut(time[censored == 0].numpy(), q=4, retbins=True, labels=False)
    edges[0], edges[-1] = time.min() - 1e-6, time.max() + 1e-6
    expected = pd.cut(time.numpy(), bins=edges, labels=False, right=False, include_lowest=True)
    found = torch.bucketize(time, survival_bins(time, censored), right=True)
    assert found.tolist() == expected.tolist()


def test_learns_survival():
    model = small(n_classes=4, layers=1)
    loss, x, target = NLLSurvivalLoss(), torch.randn(4, 6, 20), torch.tensor([[0, 0], [3, 0], [1, 1], [2, 0]])
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        values.append(loss(model(x), target))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]
    risk = discrete_hazards(model(x).logits).risk
    assert risk[0] > risk[3] > risk[1]


# ---------------------------------------------------------------- bags on a grid


def test_grid_bags_hold_the_same_and_differ_in_neighbours():
    bags = grid_bags(60, seed=0)
    assert bags.in_dim == 6 and len(bags) == 60 and bags.labels.sum() == 30
    for bag in bags:
        kind = bag.instance_labels.view(6, 8)
        assert torch.equal(bag.coords, grid(6, 8)[0])
        assert ((kind == 1).sum(), (kind == 2).sum()) == (3, 3)
        below = ((kind[:-1] == 1) & (kind[1:] == 2)).sum()
        assert below == (3 if bag.label else 0)
        assert (bag.x[:, 0] - 2 * (bag.instance_labels == 1)).std() < 0.5
        assert (bag.x[:, 1] - 2 * (bag.instance_labels == 2)).std() < 0.5
    again, other = grid_bags(4, seed=0), grid_bags(4, seed=1)
    assert torch.equal(again[3].x, bags[3].x) and not torch.equal(other[3].x, bags[3].x)
    shuffled = grid_bags(4, seed=0, shuffled=True)
    assert shuffled[3].coords is None
    assert torch.equal(shuffled[3].x.sort(0).values, bags[3].x.sort(0).values)
    assert not torch.equal(shuffled[3].x, bags[3].x)


# ---------------------------------------------------------------- errors


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": -1}, "layers: expected 0 or more, got -1"),
        ({"rate": 0}, "rate: expected at least 1, got 0"),
        ({"rate": "root"}, "rate: expected a number or 'auto', got 'root'"),
        ({"rate": "auto", "pad": "zero"}, "rate: pad='zero' needs one number for all bags, got 'auto'"),
        ({"state": 0}, "state: expected at least 1, got 0"),
        ({"conv": 0}, "conv: expected at least 1, got 0"),
        ({"expand": 0}, "expand: expected at least 1, got 0"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"mode": "flip"}, "mode: expected 'reorder', 'plain' or 'bidirectional', got 'flip'"),
        ({"pad": "same"}, "pad: expected 'skip' or 'zero', got 'same'"),
        ({"init": "zero"}, "init: expected 'mamba' or 'official', got 'zero'"),
        ({"activation": "silu"}, "activation: expected tanh, relu, gelu, got 'silu'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.bare
def test_bad_input():
    with pytest.raises(ValueError, match=r"coords: expected shape \(2, 4, 2\), got \(2, 4, 3\)"):
        small()(torch.randn(2, 4, 20), None, torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="got K = 0"):
        small()(torch.randn(2, 0, 20))
    with pytest.raises(ValueError, match="rate: expected at least 1, got 0"):
        sequence_reorder(torch.tensor([3]), 3, 0)
    with pytest.raises(ValueError, match="rate: pad='zero' needs one number for all sequences"):
        sequence_reorder(torch.tensor([3]), 3, torch.tensor([2]), "zero")
    with pytest.raises(ValueError, match="mask, coords: expected at least one of them, got neither"):
        raster_order(None, None)
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\], got 2"):
        NLLSurvivalLoss(alpha=2)
    with pytest.raises(ValueError, match=r"target: expected shape \(1, 2\), bin and censorship, got \(1,\)"):
        NLLSurvivalLoss()(SimpleNamespace(logits=torch.zeros(1, 4)), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"time, censored: expected equal shapes, got \(3,\), \(2,\)"):
        survival_bins(torch.ones(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="bins: expected at least 2, got 1"):
        survival_bins(torch.ones(3), torch.zeros(3, dtype=torch.long), bins=1)
    with pytest.raises(ValueError, match="censored: expected at least one patient whose event was seen, got none"):
        survival_bins(torch.ones(3), torch.ones(3, dtype=torch.long))
