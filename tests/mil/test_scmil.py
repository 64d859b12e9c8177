import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import classact
from classact.mil import ABMIL, BagCrossEntropy, Standardized
from classact.mil.imbalance import FocalLoss
from classact.mil.sampler import BalancedBagSampler
from classact.mil.scmil import SCMIL, SCMILLoss, curriculum_weight, fit_decoupled, supervised_contrastive_loss

FOUR = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
PAIRS, TRIPLE = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])


def small(**options):
    return SCMIL(20, 3, **{"dim": 16, "hidden": 8, "projection": 8, **options})


def by_definition(z, target, temperature):
    """The formula of Khosla et al., one anchor at a time; the value of each anchor with a partner."""
    z, values = F.normalize(z.double(), dim=-1), []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        partners = [p for p in others if target[p] == target[i]]
        total = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        terms = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / total) for p in partners]
        if partners:
            values.append(-sum(terms) / len(partners))
    return values


def test_contrastive_loss_of_two_pairs():
    values = by_definition(FOUR, PAIRS, 1.0)
    assert values == pytest.approx([0.515490, 0.807866, 1.393299, 0.621086], abs=1e-6)
    assert supervised_contrastive_loss(FOUR, PAIRS, 1.0).item() == pytest.approx(0.834435, abs=1e-6)
    assert supervised_contrastive_loss(FOUR, PAIRS, 0.1).item() == pytest.approx(1.941914, abs=1e-6)


def test_anchors_without_a_partner_do_not_count():
    assert len(by_definition(FOUR, TRIPLE, 1.0)) == 3
    for temperature, expected in ((1.0, 0.905552), (0.1, 2.588921)):
        assert np.mean(by_definition(FOUR, TRIPLE, temperature)) == pytest.approx(expected, abs=1e-6)
        assert supervised_contrastive_loss(FOUR, TRIPLE, temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_agrees_with_pytorch_metric_learning(temperature):
    from pytorch_metric_learning.losses import SupConLoss

    torch.manual_seed(0)
    target = torch.randint(5, (64,))
    ours, theirs = (torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    loss = supervised_contrastive_loss(ours.requires_grad_(), target, temperature)
    peer = SupConLoss(temperature)(theirs.requires_grad_(), target)
    torch.testing.assert_close(loss, peer, atol=1e-6, rtol=0)
    loss.backward(), peer.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [1, 4])
def test_no_partner_no_loss_no_gradient(n):
    z = torch.randn(n, 3, requires_grad=True)
    loss = supervised_contrastive_loss(z, torch.arange(n))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_two_classes_at_opposite_points():
    z = torch.tensor([[2.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-5.0, 0.0]])
    expected = -math.log(math.e / (math.e + 2 / math.e))
    assert expected == pytest.approx(0.239545, abs=1e-6)
    assert supervised_contrastive_loss(z, PAIRS, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_scale_and_order_do_not_matter():
    z, target, order = torch.randn(12, 5), torch.randint(3, (12,)), torch.randperm(12)
    loss = supervised_contrastive_loss(z, target)
    torch.testing.assert_close(supervised_contrastive_loss(z * torch.rand(12, 1).add(0.1), target), loss)
    torch.testing.assert_close(supervised_contrastive_loss(z[order], target[order]), loss)


def test_views_are_partners():
    z, target = torch.randn(4, 3, 5), torch.tensor([0, 1, 2, 2])
    flat = supervised_contrastive_loss(z.flatten(0, 1), target.repeat_interleave(3))
    assert torch.equal(supervised_contrastive_loss(z, target), flat)
    alone = torch.randn(3, 2, 5, requires_grad=True)
    supervised_contrastive_loss(alone, torch.arange(3)).backward()
    assert (alone.grad != 0).any(-1).all()  # even the only bag of a class is an anchor


def test_queue_holds_keys_but_no_anchors():
    z, target = torch.randn(7, 5), torch.tensor([0, 1, 1, 2, 0, 1, 3])
    anchors = by_definition(z, target, 0.5)  # class 2 and class 3 have no partner: anchors 0, 1, 2, 4, 5
    loss = supervised_contrastive_loss(z[:3], target[:3], 0.5, (z[3:], target[3:]))
    assert loss.item() == pytest.approx(np.mean(anchors[:3]), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_float32_under_autocast_and_finite(temperature):
    z, target = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 2
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_contrastive_loss(z, target, temperature)
        rounded = supervised_contrastive_loss(z.bfloat16(), target, temperature)
    torch.testing.assert_close(loss, supervised_contrastive_loss(z, target, temperature))
    assert loss.dtype == rounded.dtype == torch.float32
    loss.backward()
    assert z.grad.isfinite().all()


def test_curricula():
    assert [curriculum_weight("linear", t) for t in (0, 0.5, 1)] == [1, 0.5, 0]
    assert [curriculum_weight("parabolic", t) for t in (0, 0.25, 1)] == [1, 0.9375, 0]
    assert [curriculum_weight("cosine", t) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [curriculum_weight("constant", t, constant=0.3) for t in (0, 0.5, 1)] == [0.3] * 3
    assert [curriculum_weight("step", t, switch=0.5) for t in (0, 0.49, 0.5, 1)] == [1, 1, 0, 0]


def gradients(model, loss, progress=0.0, seed=0):
    torch.manual_seed(seed)
    x, target = torch.randn(6, 9, 20), torch.tensor([0, 1, 2, 0, 1, 2])
    model.zero_grad()
    loss(model(x), target, progress).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_at_the_end_it_is_cross_entropy_bit_for_bit():
    model = small()
    plain, at_end = gradients(model, BagCrossEntropy()), gradients(model, SCMILLoss(), 1.0)
    assert all(torch.equal(at_end[name], plain[name]) for name in plain)
    assert all(not at_end[name].any() for name in at_end if name not in plain)


def test_at_the_start_the_classifier_learns_nothing():
    found = gradients(small(), SCMILLoss(), 0.0)
    assert not found["classifier.weight"].any() and not found["classifier.bias"].any()
    assert all(
        grad.any() for name, grad in found.items() if "classifier" not in name and name != "attention.score.bias"
    )


def test_loss_is_the_weighted_sum():
    out, target = small()(torch.randn(6, 9, 20)), torch.tensor([0, 1, 2, 0, 1, 2])
    contrastive = supervised_contrastive_loss(out.projection, target, 0.5)
    for focal in (FocalLoss(), BagCrossEntropy()):
        expected = 0.75 * contrastive + 0.25 * focal(out, target)
        torch.testing.assert_close(SCMILLoss(0.5, classification=focal)(out, target, 0.25), expected)
    weight = torch.tensor([1.0, 2.0, 3.0])
    weighted = SCMILLoss(class_weight=weight)(out, target, 1.0)
    torch.testing.assert_close(weighted, BagCrossEntropy(weight)(out, target))


def test_loss_remembers_the_newest_bags_of_each_class():
    model, loss = small(), SCMILLoss(queue=2)
    for target in ([0], [1], [0], [0]):
        out = model(torch.randn(1, 9, 20))
        value = loss(out, torch.tensor(target))
    assert value > 0  # a batch of one bag, with partners among the remembered
    keys, labels = loss.remembered
    assert labels.tolist() == [1, 0, 0]
    assert not keys.requires_grad
    torch.testing.assert_close(keys[-1], out.projection[0, 0].detach())
    loss.eval()
    loss(out, torch.tensor([2]))
    assert loss.remembered[1].tolist() == [1, 0, 0]


def test_warns_once_of_batches_of_one_bag():
    loss, out = SCMILLoss(), small()(torch.randn(1, 9, 20))
    with pytest.warns(RuntimeWarning, match="a batch of one bag and no queue"):
        assert loss(out, torch.tensor([0])).item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(out, torch.tensor([0]))
        SCMILLoss(queue=4)(out, torch.tensor([0]))


def padded():
    bags = [torch.randn(size, 20) for size in (4, 9, 6)]
    x = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=99.0)
    return bags, x, torch.arange(9) < torch.tensor([[4], [9], [6]])


def test_padding_changes_nothing():
    model = small().eval()
    bags, x, mask = padded()
    out = model(x, mask)
    for i, bag in enumerate(bags):
        alone = model(bag[None])
        for field in ("logits", "embedding", "projection"):
            expected = getattr(alone, field)[0]
            torch.testing.assert_close(getattr(out, field)[i], expected, atol=2e-6, rtol=1e-5)
        assert out.attention_logits[i, len(bag) :].isneginf().all()


def test_without_projection_it_is_gated_abmil():
    model, plain = small().eval(), ABMIL(20, 3, dim=16, hidden=8, gated=True).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("projection")})
    _, x, mask = padded()
    out, expected = model(x, mask), plain(x, mask)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.attention_logits, expected.attention_logits)
    z, attention_logits = model.pool(model.embed(x), mask)
    torch.testing.assert_close(model.head(z), out.logits)
    torch.testing.assert_close(attention_logits, out.attention_logits)


def test_views_are_independent_draws_of_the_real_instances():
    model = small(instances=5, views=2)
    _, x, mask = padded()
    drawn = torch.zeros(3, 9)
    for _ in range(300):
        out = model(x, mask)
        assert out.projection.shape == (3, 2, 8)
        used = out.attention > 0
        assert used.sum(1).tolist() == [4, 5, 5] and not (used & ~mask).any()
        drawn += used
    torch.testing.assert_close(drawn[1] / 300, torch.full((9,), 5 / 9), atol=0.12, rtol=0)
    assert torch.equal(out.projection[0, 0], out.projection[0, 1])  # four instances: nothing to draw
    assert not torch.equal(out.projection[1, 0], out.projection[1, 1])
    z = out.attention @ model.embed(x)
    torch.testing.assert_close(out.embedding, z[range(3), range(3)])
    whole = model.eval()(x, mask)
    assert whole.projection.shape == (3, 1, 8)
    assert torch.equal(whole.attention > 0, mask)


def test_round_trip_through_safetensors(tmp_path):
    model = small(instances=7, views=2, dropout=0.1).eval()
    loaded = classact.load(classact.save(model, tmp_path / "m"), SCMIL(**model.config)).eval()
    assert loaded.config == model.config
    assert (loaded.instances, loaded.views, loaded.dropout.p) == (7, 2, 0.1)
    x = torch.randn(2, 9, 20)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_bfloat16_autocast():
    model = small(instances=5, views=2)
    _, x, mask = padded()
    with torch.autocast("cpu", torch.bfloat16):
        loss = SCMILLoss()(model(x, mask), torch.tensor([0, 1, 1]), 0.5)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
def test_trains_compiled():
    model = small(instances=5, views=2)
    _, x, mask = padded()
    loss = SCMILLoss()
    step = torch.compile(lambda y: loss(model(x, mask), y, 0.5), backend="aot_eager", fullgraph=True)
    step(torch.tensor([0, 1, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_trains_the_same_from_the_same_seed():
    from classact.data import digits_bags
    from classact.mil.lit import fit_bags, predict_bags

    bags, logits = digits_bags(16), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = SCMIL(64, 2, dim=8, hidden=8, projection=8, instances=3, views=2)
        fit_bags(model, SCMILLoss(), bags, seed=seed, epochs=2, lr=1e-2, batch_size=8, sampler="balanced")
        logits.append(predict_bags(model, bags, batch_size=16).logits)
    assert (logits[0] == logits[1]).all()
    assert (logits[0] != logits[2]).any()


def test_second_stage_trains_the_classifier_only(monkeypatch):
    import classact.mil.lit as lit
    from classact.data import digits_bags

    bags, stages, original = digits_bags(16), [], lit.fit_bags

    def spy(model, loss, train, validation=None, **settings):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        fitted = original(model, loss, train, validation, **settings)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        stages.append((settings["epochs"], validation is not None, moved))
        return fitted

    monkeypatch.setattr(lit, "fit_bags", spy)
    model = Standardized.from_bags(SCMIL(64, 2, dim=8, hidden=8, projection=8), bags)
    fitted = fit_decoupled(model, bags, bags, seed=0, epochs=5, switch=0.6, lr=1e-2, weight_decay=0.0, batch_size=8)
    (first, judged, represented), (second, judged_second, classified) = stages
    assert (first, second, judged, judged_second) == (3, 2, False, True)
    assert {"network.reduce.weight", "network.projection.0.weight"} <= represented
    assert classified == {"network.classifier.weight", "network.classifier.bias"}
    assert not represented & classified
    assert all(p.requires_grad for p in model.parameters())
    assert len(fitted.history.curves["val_loss"]) == 2


def test_balanced_batches_hold_every_class_equally_often():
    labels = np.repeat([0, 1, 2], [150, 15, 15])
    sampler = BalancedBagSampler(labels.tolist(), 16, torch.Generator().manual_seed(0))
    assert len(sampler) == 12 == len(list(sampler))
    drawn = np.array([batch for _ in range(50) for batch in sampler])
    assert drawn.shape == (600, 16)
    n = drawn.size
    frequency = np.bincount(labels[drawn].ravel()) / n
    assert (abs(frequency - 1 / 3) < 3 * math.sqrt(1 / 3 * 2 / 3 / n)).all()
    of_rare = np.bincount(drawn[labels[drawn] == 1], minlength=180)[150:165]
    assert (abs(of_rare / n - 1 / 45) < 4 * math.sqrt(1 / 45 / n)).all()
    assert drawn.min() >= 0 and len(np.unique(drawn)) == 180


def test_balanced_batches_with_pairs_hold_two_of_each_class():
    labels = np.repeat([0, 3, 7], [50, 5, 1])
    sampler = BalancedBagSampler(labels.tolist(), 7, torch.Generator().manual_seed(0), ensure_pairs=True)
    for _ in range(20):
        for batch in sampler:
            assert len(batch) == 7
            assert (np.unique(labels[batch], return_counts=True)[1] >= 2).all()
            assert set(labels[batch]) == {0, 3, 7}


def test_balanced_batches_are_reproducible():
    first, second, other = (
        list(BalancedBagSampler([0] * 9 + [1] * 3, 4, torch.Generator().manual_seed(s))) for s in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "labels: expected at least one bag"),
        (([0, 1], 0), "batch_size: expected at least 1, got 0"),
        (([0, 1, 2], 5, None, True), "batch_size: pairs of 3 classes need at least 6 bags, got 5"),
    ],
)
def test_bad_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        BalancedBagSampler(*arguments)


def test_subtype_bags(real_data):
    from classact.data.subtype import subtype_bags

    bags = subtype_bags((5, 2, 1), seed=3)
    assert bags.labels.tolist() == [0] * 5 + [1] * 2 + [2]
    assert bags.classes == ["t-shirt", "shirt", "dress"]
    for bag in bags:
        assert bag.x.shape == (36, 64)
        assert 4 <= int(bag.instance_labels.sum()) <= 7
    same, other = (subtype_bags((5, 2, 1), seed=s) for s in (3, 4))
    assert torch.equal(same[0].x, bags[0].x) and not torch.equal(other[0].x, bags[0].x)
    test, shifted = (subtype_bags((2, 2, 2), 3, part) for part in ("test", "shifted"))
    for clean, noisy in zip(test, shifted, strict=True):  # the same images, seen otherwise
        assert torch.equal(clean.instance_labels, noisy.instance_labels)
        difference = (clean.x - noisy.x).abs().mean()
        assert 0.05 < difference < 1
    with pytest.raises(ValueError, match=r"counts: expected 3 numbers of bags, got \[1, 2\]"):
        subtype_bags((1, 2), 0)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(instances=0), "instances: expected at least 1, got 0"),
        (lambda: small(views=0), "views: expected at least 1, got 0"),
        (lambda: small(projection=0), "projection: expected at least 1, got 0"),
        (lambda: SCMILLoss(temperature=0.0), "temperature: expected a positive number, got 0.0"),
        (
            lambda: SCMILLoss(curriculum="square"),
            "kind: expected linear, parabolic, cosine, constant or step, got 'squ",
        ),
        (lambda: SCMILLoss(constant=2.0), r"constant: expected a number in \[0, 1\], got 2.0"),
        (lambda: SCMILLoss(queue=-1), "queue: expected 0 or more, got -1"),
        (
            lambda: SCMILLoss(classification=FocalLoss(), class_weight=torch.ones(2)),
            "class_weight: give it to the classification loss",
        ),
        (lambda: curriculum_weight("linear", 1.5), r"progress: expected a number in \[0, 1\], got 1.5"),
        (lambda: supervised_contrastive_loss(FOUR, PAIRS, -1.0), "temperature: expected a positive number, got -1.0"),
        (lambda: supervised_contrastive_loss(FOUR, PAIRS[:3]), r"z, target: expected .* got \(4, 2\), \(3,\)"),
        (
            lambda: fit_decoupled(small(), None, seed=0, epochs=1),
            "epochs: expected at least 2, one for each stage, got",
        ),
        (lambda: fit_decoupled(small(), None, seed=0, switch=1.0), r"switch: expected a part in \(0, 1\), got 1.0"),
        (lambda: fit_decoupled(torch.nn.Linear(2, 2), None, seed=0), "model: expected a layer named 'classifier'"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bare
def test_loss_refuses_another_models_output():
    with pytest.raises(TypeError, match="SCMILLoss needs the output of SCMIL, got MILOutput"):
        SCMILLoss()(ABMIL(20, 2)(torch.randn(2, 3, 20)), torch.tensor([0, 1]))
