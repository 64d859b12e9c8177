import pytest
import torch
from torch.nn import functional as F

import classact
from classact.mil import ABMIL, DSMIL, DSMILLoss


def holes():
    """Bags alone, and padded into one batch with padding in front, between and behind."""
    torch.manual_seed(3)
    bags = [torch.randn(size, 20) for size in (4, 9, 1)]
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[0, [1, 2, 6, 10]] = True
    mask[1, 1:10] = True
    mask[2, 5] = True
    x = torch.full((3, 11, 20), 99.0)
    x[mask] = torch.cat(bags)
    return bags, x, mask


@pytest.mark.parametrize("nonlinear", [False, True])
def test_each_stream_is_torchmil_dsmil(nonlinear):
    """With weights shared by all classes, each class pools as torchmil's two-class model does."""
    import torchmil.models

    torch.manual_seed(0)
    feature = torch.nn.Sequential(torch.nn.Linear(20, 16, bias=False), torch.nn.ReLU())
    peer = torchmil.models.DSMIL((20,), 8, nonlinear_q=nonlinear, nonlinear_v=nonlinear, feat_ext=feature)
    model = DSMIL(20, 2, dim=16, hidden=8, nonlinear_q=nonlinear, nonlinear_v=nonlinear)
    with torch.no_grad():
        model.reduce.weight.copy_(feature[0].weight)
        model.query.load_state_dict(peer.q_nn.state_dict())
        if nonlinear:
            model.value[0].load_state_dict(peer.v_nn[1].state_dict())
        model.instance_classifier.weight.copy_(peer.inst_classifier.weight.expand(2, -1))
        model.instance_classifier.bias.copy_(peer.inst_classifier.bias.expand(2))
        model.classifier.weight.zero_()
        model.classifier.weight[1, 1] = peer.bag_classifier.weight[0]
        model.classifier.bias.copy_(torch.tensor([0.0, peer.bag_classifier.bias.item()]))
    x = torch.randn(3, 11, 20)
    logits, attention, instances = peer(x, return_att=True, return_inst_pred=True)
    output = model(x)
    tight = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(output.logits[:, 1], logits, **tight)
    torch.testing.assert_close(output.attention, attention.squeeze(-1), **tight)
    for c in range(2):
        torch.testing.assert_close(output.instance_logits[..., c], instances, **tight)
        torch.testing.assert_close(output.attention_map_logits[:, c].softmax(-1), attention.squeeze(-1), **tight)
    pooled = attention.transpose(1, 2) @ peer.v_nn(feature(x))
    torch.testing.assert_close(output.class_embeddings, pooled.expand(-1, 2, -1), **tight)
    torch.testing.assert_close(output.embedding, pooled.expand(-1, 2, -1).flatten(1), **tight)


def test_the_classes_of_one_bag_by_loops():
    torch.manual_seed(0)
    model, x = DSMIL(20, 3, dim=16, nonlinear_q=False), torch.randn(1, 7, 20)
    h = model.embed(x)[0]
    output = model(x)
    embeddings = []
    for c in range(3):
        critical = max(range(7), key=lambda i: output.instance_logits[0, i, c].item())
        q = model.query(h)
        attention = torch.stack([q[i] @ q[critical] / 128**0.5 for i in range(7)]).softmax(0)
        embeddings.append(sum(attention[i] * h[i] for i in range(7)))
    embeddings = torch.stack(embeddings)
    torch.testing.assert_close(output.class_embeddings[0], embeddings, atol=1e-6, rtol=1e-5)
    weight, bias = model.classifier.weight, model.classifier.bias
    expected = torch.stack([(weight[c] * embeddings).sum() + bias[c] for c in range(3)])
    torch.testing.assert_close(output.logits[0], expected, atol=1e-6, rtol=1e-5)


def test_a_batch_with_holes_gives_what_its_bags_give():
    model, loss = DSMIL(20, 3, dim=16, average=True), DSMILLoss()
    bags, x, mask = holes()
    output, target = model(x, mask), torch.tensor([0, 2, 1])
    losses = []
    for i, bag in enumerate(bags):
        alone = model(bag[None])
        for name in ("logits", "bag_logits", "embedding"):
            torch.testing.assert_close(getattr(output, name)[i], getattr(alone, name)[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention[i, mask[i]], alone.attention[0], atol=1e-6, rtol=1e-5)
        losses.append(loss(alone, target[i : i + 1]))
    assert output.instance_logits[~mask].isneginf().all()
    assert output.attention_logits[~mask].isneginf().all()
    torch.testing.assert_close(loss(output, target), torch.stack(losses).mean())


def test_a_decision_is_the_bag_streams_or_the_mean_of_both():
    torch.manual_seed(0)
    model, x = DSMIL(20, 3, dim=16), torch.randn(2, 6, 20)
    output = model(x)
    assert torch.equal(output.logits, output.bag_logits)
    model.average = True
    expected = (output.bag_logits + output.instance_logits.max(1).values) / 2
    torch.testing.assert_close(model(x).logits, expected)


def test_loss_by_hand():
    output, target = DSMIL(20, 3, dim=16)(torch.randn(4, 5, 20)), torch.tensor([0, 1, 2, 2])
    weight = torch.tensor([1.0, 2.0, 0.5])
    bag = F.cross_entropy(output.bag_logits, target, weight)
    critical = F.cross_entropy(output.instance_logits.amax(1), target, weight)
    torch.testing.assert_close(DSMILLoss(class_weight=weight)(output, target), 0.5 * bag + 0.5 * critical)
    torch.testing.assert_close(DSMILLoss(0.2, weight)(output, target), 0.8 * bag + 0.2 * critical)


def test_pool_and_head_are_forward():
    model, (_, x, mask) = DSMIL(20, 3, dim=16), holes()
    output = model(x, mask)
    z, attention_logits = model.pool(model.embed(x), mask)
    assert torch.equal(model.head(z), output.logits)
    assert torch.equal(z, output.embedding)
    assert torch.equal(attention_logits, output.attention_logits)


def test_gradients_are_finite_under_autocast():
    model, (_, x, mask) = DSMIL(20, 3, dim=16, dropout=0.1, nonlinear_v=True), holes()
    with torch.autocast("cpu", torch.bfloat16):
        loss = DSMILLoss()(model(x, mask), torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_same_seed_same_result_and_round_trip(tmp_path):
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = DSMIL(20, 3, dim=16, dropout=0.3, average=True)
        outputs.append(model(torch.randn(2, 6, 20)).logits)
    assert torch.equal(*outputs)
    loaded = classact.load(classact.save(model, tmp_path / "m"))
    _, x, mask = holes()
    assert type(loaded) is DSMIL and loaded.config == model.config
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
    model, (_, x, mask) = DSMIL(20, 3, dim=16).eval(), holes()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask).logits, model(x, mask).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.bare
def test_errors():
    with pytest.raises(ValueError, match="hidden: expected at least 1, got 0"):
        DSMIL(20, 2, hidden=0)
    with pytest.raises(ValueError, match=r"instance_weight: expected a number in \[0, 1\], got 1.5"):
        DSMILLoss(1.5)
    with pytest.raises(TypeError, match="DSMILLoss needs the output of DSMIL, got MILOutput"):
        DSMILLoss()(ABMIL(20, 2)(torch.randn(1, 3, 20)), torch.tensor([0]))
    with pytest.raises(ValueError, match="x: this model was built for 20 features per instance, got 21"):
        DSMIL(20, 2)(torch.zeros(1, 3, 21))
