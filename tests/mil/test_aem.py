import math

import pytest
import torch

from classact.mil import (
    ABMIL,
    ACMIL,
    ACMILLoss,
    AttentionEntropy,
    BagCrossEntropy,
    MultiHeadABMIL,
    Subsample,
    attention_entropy,
    effective_instances,
    sweep_entropy_weight,
)


def test_value_and_gradient_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    loss = AttentionEntropy(1.0)(logits)
    assert loss.item() == pytest.approx(-0.832396, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.141817, -0.140770, 0.282587]]), atol=1e-6, rtol=0)


def test_equal_logits():
    logits = torch.zeros(1, 4)
    assert attention_entropy(logits).item() == pytest.approx(1.386294, abs=1e-6)
    assert effective_instances(logits).item() == pytest.approx(4, abs=1e-5)
    assert attention_entropy(logits, normalize=True).item() == pytest.approx(1)


def test_one_hot_logits_have_finite_gradient():
    logits = torch.tensor([[50.0, 0.0, 0.0]], requires_grad=True)
    entropy = attention_entropy(logits).sum()
    entropy.backward()
    assert entropy.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.isfinite().all()


def test_a_constant_shift_and_a_permutation_change_nothing():
    logits = torch.randn(2, 9)
    torch.testing.assert_close(attention_entropy(logits + 7), attention_entropy(logits))
    torch.testing.assert_close(attention_entropy(logits[:, torch.randperm(9)]), attention_entropy(logits))


@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_padding_counts_for_nothing(by_mask, normalize):
    logits = torch.randn(2, 9, requires_grad=True)
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    padded = logits if by_mask else logits.masked_fill(~mask, -torch.inf)
    entropy = attention_entropy(padded, mask if by_mask else None, normalize=normalize)
    alone = torch.cat(
        [attention_entropy(logits[:1, :4], normalize=normalize), attention_entropy(logits[1:], normalize=normalize)]
    )
    torch.testing.assert_close(entropy, alone)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


def test_several_maps_are_averaged():
    maps = torch.tensor([[[0.0, 0, 0, 0], [60.0, 0, 0, 0]]])
    assert attention_entropy(maps).mean().item() == pytest.approx(0.693147, abs=1e-5)
    assert AttentionEntropy(1.0)(maps).item() == pytest.approx(-0.693147, abs=1e-5)


def test_gradcheck():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(lambda u, n=normalize: attention_entropy(u, normalize=n), logits)


def test_weight_zero_is_the_baseline_bit_for_bit():
    model, x, y = ABMIL(12, 2, dim=8), torch.randn(3, 7, 12), torch.tensor([0, 1, 1])
    results = []
    for loss in (BagCrossEntropy(), BagCrossEntropy() + AttentionEntropy(0.0)):
        model.zero_grad()
        value = loss(model(x), y)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_instance():
    assert attention_entropy(torch.tensor([[3.0]])).item() == 0
    assert attention_entropy(torch.tensor([[3.0]]), normalize=True).item() == 0


def test_a_step_on_the_term_raises_the_entropy():
    logits = torch.randn(4, 9, requires_grad=True)
    before = attention_entropy(logits).mean()
    AttentionEntropy(1.0)(logits).backward()
    assert attention_entropy(logits.detach() - logits.grad).mean() > before


def test_log_probabilities_are_probabilities():
    p = torch.rand(3, 6).softmax(-1)
    torch.testing.assert_close(attention_entropy(p.log()), attention_entropy(p, from_logits=False))


@pytest.mark.parametrize(
    "network", [ABMIL(12, 2, dim=8, gated=True), MultiHeadABMIL(12, 2, dim=8), ACMIL(12, 2, dim=8)]
)
def test_term_uses_the_attention_that_pooled_the_bag(network):
    """The regulariser must see every map after masking; the wrong logits would fail silently."""
    network.train()
    torch.manual_seed(0)
    output = network(torch.randn(2, 30, 12), torch.arange(30) < torch.tensor([[30], [7]]))
    maps = getattr(output, "attention_map_logits", output.attention_logits.unsqueeze(1))
    a = maps.flatten(1, -2).softmax(-1)
    expected = -torch.where(a > 0, a * a.log(), 0.0).sum(-1).mean()
    torch.testing.assert_close(AttentionEntropy(1.0)(output), -expected, atol=1e-6, rtol=1e-5)
    assert (a[1, :, 7:] == 0).all()
    torch.testing.assert_close(a.mean(1), output.attention, atol=1e-6, rtol=1e-5)


def test_joins_any_loss():
    output, y = ACMIL(12, 2, dim=8).eval()(torch.randn(2, 9, 12)), torch.tensor([0, 1])
    together = (ACMILLoss() + AttentionEntropy(0.3) + AttentionEntropy(0.2))(output, y)
    apart = ACMILLoss()(output, y) - 0.5 * attention_entropy(output.attention_map_logits).mean()
    torch.testing.assert_close(together, apart)
    assert sum(p.numel() for p in AttentionEntropy(0.1).parameters()) == 0


def test_subsampling_keeps_the_floor_and_only_while_training():
    model = Subsample(ABMIL(12, 2, dim=8), ratio=0.3)
    x, mask = torch.randn(2, 10, 12), torch.arange(10) < torch.tensor([[10], [7]])
    output = model.train()(x, mask, generator=torch.Generator().manual_seed(0))
    assert output.attention_logits.isfinite().sum(1).tolist() == [3, 2]
    assert not (output.attention_logits.isfinite() & ~mask).any()
    again = model(x, mask, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output.attention_logits, again.attention_logits)
    assert torch.equal(model.eval()(x, mask).logits, model.network(x, mask).logits)
    tiny = Subsample(ABMIL(12, 2, dim=8), ratio=0.01).train()(x)
    assert tiny.attention_logits.isfinite().sum(1).tolist() == [1, 1]


def test_sweep_reports_entropy_rising_with_the_weight():
    from classact.data import digits_bags

    bags = digits_bags(24)
    table = sweep_entropy_weight(
        lambda: ABMIL(64, 2, dim=8, hidden=8),
        bags.subset(range(16)),
        bags.subset(range(16, 24)),
        weights=(0.0, 1.0, 100.0),
        seeds=(0,),
        epochs=8,
        lr=1e-2,
        batch_size=8,
    )
    assert list(table["weight"]) == [0, 1, 100]
    assert table["entropy"].is_monotonic_increasing
    assert (table["effective_instances"] <= 12).all()
    assert table[["loss", "auc"]].notna().all(axis=None)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionEntropy(-0.1), "weight: a negative weight"),
        (lambda: Subsample(ABMIL(4, 2), 0.0), r"ratio: expected a part in \(0, 1\], got 0.0"),
        (lambda: Subsample(ABMIL(4, 2), 1.5), r"ratio: expected a part in \(0, 1\], got 1.5"),
        (lambda: attention_entropy(torch.zeros(2, 0)), r"K > 0, got \(2, 0\)"),
        (lambda: attention_entropy(torch.ones(1, 4), from_logits=False), "sum to 1 over the instances"),
        (
            lambda: attention_entropy(torch.zeros(1, 4), torch.ones(1, 3, dtype=torch.bool)),
            r"mask: expected shape \(1, 4\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_negative_weight_sharpens_on_request():
    term = AttentionEntropy(-0.5, allow_negative=True)
    assert term(torch.zeros(1, 4)).item() == pytest.approx(0.5 * math.log(4))
