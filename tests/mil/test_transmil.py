import pytest
import torch

import classact
from classact.mil import PPEG, BagCrossEntropy, NystromAttention, TransMIL, iterative_pinv


def small(n_classes=3, **options):
    return TransMIL(20, n_classes, **{"dim": 16, "heads": 4, "landmarks": 4, **options})


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


def copy_nystrom(peer, ours):
    with torch.no_grad():
        ours.qkv.weight.copy_(peer.to_qkv.weight)
        ours.out.load_state_dict(peer.to_out[0].state_dict())
        ours.residual.load_state_dict(peer.res_conv.state_dict())


@pytest.mark.parametrize("length", [5, 24, 50, 145])
def test_attention_is_that_of_the_published_layer(length):
    published = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    peer = published.NystromAttention(dim=32, dim_head=8, heads=4, num_landmarks=8, dropout=0.1).eval()
    ours = NystromAttention(32, 4, 8).eval()
    copy_nystrom(peer, ours)
    x = torch.randn(1, length, 32)
    expected, matrix = peer(x, return_attn=True)
    y, row = ours(x, first_row=True)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row, matrix[:, :, -length, -length:], atol=1e-5, rtol=1e-5)


def test_pseudo_inverse_of_a_bag_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    a = torch.randn(3, 2, 6, 6, dtype=torch.double).softmax(-1)
    together = iterative_pinv(a)
    for i in range(3):
        torch.testing.assert_close(together[i], iterative_pinv(a[i : i + 1])[0])
    torch.testing.assert_close(iterative_pinv(a, 40), torch.linalg.pinv(a), atol=1e-6, rtol=1e-6)


def test_position_encoding_is_the_sum_of_three_convolutions():
    from torchmil.models import transmil

    torch.manual_seed(0)
    peer, ours = transmil.PPEG(6), PPEG(6)
    for source, target in zip((peer.proj, peer.proj1, peer.proj2), (ours.seven, ours.five, ours.three), strict=True):
        target.load_state_dict(source.state_dict())
    x = torch.randn(2, 1 + 25, 6)
    torch.testing.assert_close(ours(x), peer(x, 5, 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 10, 49])
def test_forward_is_torchmils(size):
    """Torchmil has neither the convolution over the values nor an output projection or a ReLU: switched off here."""
    import torchmil.models

    torch.manual_seed(0)
    feature = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU())
    peer = torchmil.models.TransMIL((20,), att_dim=16, n_heads=4, feat_ext=feature).eval()
    model = TransMIL(20, 2, dim=16, heads=4).eval()
    with torch.no_grad():
        model.reduce.load_state_dict(feature[0].state_dict())
        model.token.copy_(peer.cls_token)
        layers = ((model.norm1, model.attention1), (model.norm2, model.attention2))
        for (norm, attention), layer in zip(layers, peer.layers, strict=True):
            norm.load_state_dict(layer.norm1.state_dict())
            attention.qkv.load_state_dict(layer.att_module.qkv_nn.state_dict())
            attention.residual.weight.zero_()
            attention.out.weight.copy_(torch.eye(16))
            attention.out.bias.zero_()
        for ours, theirs in (("seven", "proj"), ("five", "proj1"), ("three", "proj2")):
            getattr(model.position, ours).load_state_dict(getattr(peer.pos_layer, theirs).state_dict())
        model.norm.load_state_dict(peer.norm.state_dict())
        model.classifier.weight.copy_(torch.cat([torch.zeros(1, 16), peer.classifier.weight]))
        model.classifier.bias.copy_(torch.cat([torch.zeros(1), peer.classifier.bias]))
    x = torch.randn(1, size, 20)
    torch.testing.assert_close(model(x).logits[:, 1], peer(x), atol=1e-5, rtol=1e-5)


def test_attention_is_the_class_tokens_row_of_the_first_layer():
    published = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    model, x = small().eval(), torch.randn(1, 10, 20)
    peer = published.NystromAttention(dim=16, dim_head=4, heads=4, num_landmarks=4).eval()
    with torch.no_grad():
        peer.to_qkv.weight.copy_(model.attention1.qkv.weight)
        h = model.embed(x)
        tokens = torch.cat([model.token, h, h[:, :6]], 1)  # 16 = 10 + 6
        _, matrix = peer(model.norm1(tokens), return_attn=True)
    row = matrix[0, :, -17, -16:]
    weight = row[:, :10] + torch.nn.functional.pad(row[:, 10:], (0, 4))
    weight = weight.clamp(min=0)
    expected = weight / weight.sum(-1, keepdim=True)
    output = model(x)
    torch.testing.assert_close(output.attention_map_logits[0].softmax(-1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.attention[0], expected.mean(0), atol=1e-5, rtol=1e-4)


def test_a_batch_with_holes_gives_what_its_bags_give():
    model = small().eval()
    bags, x, mask = holes()
    output = model(x, mask)
    for i, bag in enumerate(bags):
        alone = model(bag[None])
        torch.testing.assert_close(output.logits[i], alone.logits[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.embedding[i], alone.embedding[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention[i, mask[i]], alone.attention[0], atol=1e-6, rtol=1e-5)
    assert output.attention_logits[~mask].isneginf().all()
    assert output.attention_map_logits.shape == (3, 4, 12)


def test_a_full_batch_gives_what_its_bags_give():
    torch.manual_seed(0)
    model, x = small().eval(), torch.randn(3, 11, 20)
    for output in (model(x), model(x, torch.ones(3, 11, dtype=torch.bool))):
        for i in range(3):
            torch.testing.assert_close(output.logits[i], model(x[i : i + 1]).logits[0], atol=1e-5, rtol=1e-5)


def test_pool_and_head_are_forward():
    model, (_, x, mask) = small().eval(), holes()
    output = model(x, mask)
    z, attention_logits = model.pool(model.embed(x), mask)
    assert torch.equal(model.head(z), output.logits)
    assert torch.equal(z, output.embedding)
    assert torch.equal(attention_logits, output.attention_logits)


def test_gradients_are_finite_under_autocast():
    model, (_, x, mask) = small(), holes()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, mask)
        loss = BagCrossEntropy()(output, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(3), atol=1e-3, rtol=0)


def test_same_seed_same_result_and_round_trip(tmp_path):
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = small(dropout=0.3)
        outputs.append(model(torch.randn(2, 6, 20)).logits)
    assert torch.equal(*outputs)
    loaded = classact.load(classact.save(model, tmp_path / "m"))
    _, x, mask = holes()
    assert type(loaded) is TransMIL and loaded.config == model.config
    assert torch.equal(loaded(x, mask).logits, model.eval()(x, mask).logits)


@pytest.fixture
def fresh_compiler():
    """The family's compiled tests share one wrapper, whose recompilations are limited per process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.bare
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph():
    model = small().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 10, 20)
    torch.testing.assert_close(compiled(x).logits, model(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads: expected a divisor of the embedding width 16, got 5"),
        ({"heads": 0}, "heads: expected at least 1, got 0"),
        ({"landmarks": 0}, "landmarks: expected at least 1, got 0"),
        ({"pinv_iterations": 0}, "pinv_iterations: expected at least 1, got 0"),
        ({"residual_kernel": 4}, "residual_kernel: expected an odd number, got 4"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.bare
def test_bad_input():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="mask: every bag needs at least one instance, bag 1 has none"):
        small()(torch.randn(2, 2, 20), mask)
    with pytest.raises(ValueError, match=r"x: expected a class token and a square number of tokens, got 1 \+ 7"):
        PPEG(4)(torch.randn(1, 8, 4))
