import pytest
import torch
from torch.nn import functional as F

import classact
from classact.mil import ABMIL, CLAMSB, CLAMLoss, smooth_top1_svm


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


class SmoothSVM(torch.nn.Module):
    """Ours in torchmil's place: torchmil passes targets as (B, 1), which its own spreads to (B, B, 2) or refuses."""

    def forward(self, logits, targets):
        return smooth_top1_svm(logits, targets.squeeze(-1).long()).mean()


def pair(k_sample):
    import torchmil.models

    torch.manual_seed(0)
    feature = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU())
    peer = torchmil.models.CLAM_SB((20,), att_dim=8, k_sample=k_sample, gated=True, feat_ext=feature)
    model = CLAMSB(20, 2, dim=16, hidden=8, dropout=0.0, k_sample=k_sample)
    value, gate, score = peer.pool.fc1.module, peer.pool.fc_gated.module, peer.pool.fc2
    head, instance = peer.classifier.module, [c.module for c in peer.inst_classifiers]
    with torch.no_grad():
        model.reduce.load_state_dict(feature[0].state_dict())
        model.hidden.weight.copy_(torch.cat([value.weight, gate.weight]))
        model.hidden.bias.copy_(torch.cat([value.bias, gate.bias]))
        model.score.weight.copy_(score.weight)
        model.score.bias.zero_()
        model.instance_classifier.weight.copy_(torch.cat([c.weight for c in instance]))
        model.instance_classifier.bias.copy_(torch.cat([c.bias for c in instance]))
        model.classifier.weight.copy_(torch.cat([torch.zeros_like(head.weight), head.weight]))
        model.classifier.bias.copy_(torch.cat([torch.zeros(1), head.bias]))
    return model, peer, feature


def test_attention_embedding_and_bag_are_torchmils():
    model, peer, feature = pair(4)
    x = torch.randn(3, 11, 20)
    logits, scores = peer(x, return_att=True)
    output = model(x)
    torch.testing.assert_close(output.logits[:, 1], logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.attention_logits, scores, atol=1e-6, rtol=1e-5)
    pooled = (scores.softmax(-1).unsqueeze(1) @ feature(x)).squeeze(1)
    torch.testing.assert_close(output.embedding, pooled, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [11, 3])
def test_clustering_of_exclusive_classes_is_torchmils(size):
    """The choice of instances and the targets; torchmil adds up where the authors average over classes."""
    model, peer, feature = pair(4)
    peer.inst_loss_fn = SmoothSVM()
    x, target = torch.randn(3, size, 20), torch.tensor([0, 1, 1])
    _, scores = peer(x, return_att=True)
    expected = peer.compute_inst_loss(scores, feature(x), target) / (2 * 3)
    torch.testing.assert_close(CLAMLoss(subtyping=True).clustering(model(x), target), expected, atol=1e-6, rtol=1e-5)


def test_smooth_svm_is_the_log_sum_exp_over_classes():
    torch.manual_seed(0)
    logits, target = torch.randn(50, 2), torch.randint(2, (50,))
    margin = 1.0 - F.one_hot(target, 2)
    own = logits.gather(1, target[:, None])
    torch.testing.assert_close(smooth_top1_svm(logits, target), (logits + margin - own).logsumexp(1))
    assert smooth_top1_svm(torch.tensor([[500.0, -500.0]]), torch.tensor([1])).item() == pytest.approx(1001)
    assert smooth_top1_svm(torch.tensor([[500.0, -500.0]]), torch.tensor([0])).item() == 0


@pytest.mark.parametrize("kind", ["svm", "ce"])
@pytest.mark.parametrize("subtyping", [False, True])
def test_loss_by_loops(kind, subtyping):
    torch.manual_seed(0)
    model = CLAMSB(20, 3, dim=16, k_sample=3).eval()
    bags, x, mask = holes()
    target, weight = torch.tensor([2, 0, 1]), torch.tensor([1.0, 2.0, 0.5])
    one = smooth_top1_svm if kind == "svm" else lambda a, b: F.cross_entropy(a, b, reduction="none")
    total = 0.0
    for bag, y in zip(bags, target.tolist(), strict=True):
        h = model.embed(bag[None])
        order = model.pool(h)[1][0].argsort(descending=True)
        k = min(3, len(bag))
        scores = model.instance_classifier(h[0]).unflatten(-1, (3, 2))
        top, bottom = scores[order[:k]], scores[order.flip(0)[:k]]
        terms = []
        for c in range(3):
            if c == y:
                both = torch.cat([top[:, c], bottom[:, c]])
                terms.append(one(both, torch.tensor([1] * k + [0] * k)).mean())
            elif subtyping:
                terms.append(one(top[:, c], torch.zeros(k, dtype=torch.long)).mean())
        total = total + torch.stack(terms).mean() / 3
    output = model(x, mask)
    expected = 0.7 * F.cross_entropy(output.logits, target, weight) + 0.3 * total
    loss = CLAMLoss(instance_loss=kind, subtyping=subtyping, class_weight=weight)
    torch.testing.assert_close(loss(output, target), expected, atol=1e-6, rtol=1e-5)


def test_a_batch_with_holes_gives_what_its_bags_give():
    model, loss = CLAMSB(20, 3, dim=16, k_sample=8).eval(), CLAMLoss(subtyping=True)
    bags, x, mask = holes()
    output, target = model(x, mask), torch.tensor([0, 2, 1])
    losses = []
    for i, bag in enumerate(bags):
        alone = model(bag[None])
        torch.testing.assert_close(output.logits[i], alone.logits[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.embedding[i], alone.embedding[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention[i, mask[i]], alone.attention[0], atol=1e-6, rtol=1e-5)
        real = output.instance_mask[i]
        assert int(real.sum()) == 2 * min(8, len(bag))
        torch.testing.assert_close(output.instance_logits[i][:, real], alone.instance_logits[0], atol=1e-6, rtol=1e-5)
        losses.append(loss(alone, target[i : i + 1]))
    assert output.attention_logits[~mask].isneginf().all()
    torch.testing.assert_close(loss(output, target), torch.stack(losses).mean())


def test_pool_and_head_are_forward():
    model, (_, x, mask) = CLAMSB(20, 3, dim=16).eval(), holes()
    output = model(x, mask)
    z, attention_logits = model.pool(model.embed(x), mask)
    assert torch.equal(model.head(z), output.logits)
    assert torch.equal(z, output.embedding)
    assert torch.equal(attention_logits, output.attention_logits)


@pytest.mark.parametrize("kind", ["svm", "ce"])
def test_gradients_are_finite_under_autocast(kind):
    model, (_, x, mask) = CLAMSB(20, 3, dim=16), holes()
    with torch.autocast("cpu", torch.bfloat16):
        loss = CLAMLoss(instance_loss=kind)(model(x, mask), torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_same_seed_same_result_and_round_trip(tmp_path):
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = CLAMSB(20, 3, dim=16, hidden=8, k_sample=3)
        outputs.append(model(torch.randn(2, 6, 20)).logits)
    assert torch.equal(*outputs)
    loaded = classact.load(classact.save(model, tmp_path / "m"))
    _, x, mask = holes()
    assert type(loaded) is CLAMSB and loaded.config == model.config
    assert torch.equal(loaded(x, mask).instance_logits, model.eval()(x, mask).instance_logits)


@pytest.fixture
def fresh_compiler():
    """The family's compiled tests share one wrapper, whose recompilations are limited per process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.bare
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph():
    model, loss, (_, x, mask) = CLAMSB(20, 3, dim=16).eval(), CLAMLoss(), holes()
    target = torch.tensor([0, 1, 2])
    compiled = torch.compile(lambda a, m, y: loss(model(a, m), y), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask, target), loss(model(x, mask), target), atol=1e-6, rtol=1e-5)


@pytest.mark.bare
def test_errors():
    with pytest.raises(ValueError, match="k_sample: expected at least 1, got 0"):
        CLAMSB(20, 2, k_sample=0)
    with pytest.raises(ValueError, match="hidden: expected at least 1, got 0"):
        CLAMSB(20, 2, hidden=0)
    with pytest.raises(ValueError, match=r"bag_weight: expected a number in \[0, 1\], got -1"):
        CLAMLoss(bag_weight=-1)
    with pytest.raises(ValueError, match="instance_loss: expected 'svm' or 'ce', got 'hinge'"):
        CLAMLoss(instance_loss="hinge")
    with pytest.raises(TypeError, match="CLAMLoss needs the output of CLAMSB, got MILOutput"):
        CLAMLoss()(ABMIL(20, 2)(torch.randn(1, 3, 20)), torch.tensor([0]))
