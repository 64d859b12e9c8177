import numpy as np
import pytest
import torch
from torch.nn import functional as F

from classact.mil import (
    ABMIL,
    ACMIL,
    ACMILLoss,
    MultiBranchAttention,
    attention_concentration,
    attention_diversity,
    stochastic_topk_mask,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_softmax_after_hiding_hands_the_weight_to_the_others():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = torch.tensor([0.643914, 0.236883, 0.087144, 0.032059])
    torch.testing.assert_close(scores.softmax(0), expected, atol=1e-6, rtol=0)
    scores[1] = -torch.inf
    expected = torch.tensor([0.843795, 0.0, 0.114195, 0.042010])
    torch.testing.assert_close(scores.softmax(0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "hidden"), [(50, 6), (5, 3), (10, 6), (1, 0)])
def test_hides_exactly_the_floor_of_the_part(size, hidden):
    scores = torch.randn(3, 4, size, generator=generator())
    masked = stochastic_topk_mask(scores, 10, 0.6, generator=generator(1))
    hit = masked.isneginf()
    assert (hit.sum(-1) == hidden).all()
    top = torch.zeros_like(hit).scatter(-1, scores.topk(min(10, size)).indices, True)
    assert not (hit & ~top).any()
    assert torch.equal(masked[~hit], scores[~hit])


def test_count_is_the_authors_product_for_every_pool():
    for drop in (0.1, 0.29, 0.3, 0.58, 0.6, 0.7, 0.9):
        for size in range(1, 13):
            masked = stochastic_topk_mask(torch.arange(float(size)), 10, drop, generator=generator())
            assert int(masked.isneginf().sum()) == int(min(10, size) * drop)


def test_every_top_score_is_hidden_equally_often():
    scores = torch.arange(50.0).expand(2000, 50)
    frequency = stochastic_topk_mask(scores, 10, 0.6, generator=generator()).isneginf().float().mean(0)
    assert (frequency[:40] == 0).all()
    assert ((frequency[40:] - 0.6).abs() < 0.04).all()


def test_padding_is_neither_counted_nor_chosen():
    scores = torch.randn(1, 1, 30, generator=generator())
    scores[..., 4:] = -torch.inf
    masked = stochastic_topk_mask(scores, 10, 0.6, generator=generator())
    assert int(masked[..., :4].isneginf().sum()) == int(4 * 0.6)


def test_same_generator_same_mask():
    scores = torch.randn(2, 5, 40)
    first, second, other = (stochastic_topk_mask(scores, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_hidden_instances_get_no_gradient():
    scores = torch.randn(1, 2, 30, requires_grad=True)
    masked = stochastic_topk_mask(scores, generator=generator())
    (masked.softmax(-1) * torch.randn(30)).sum().backward()
    assert (scores.grad[masked.isneginf()] == 0).all()
    assert (scores.grad[~masked.isneginf()] != 0).all()


def test_diversity_by_hand():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])
    pairs = [F.cosine_similarity(rows[i], rows[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(torch.stack(pairs), torch.tensor([0.333333, 0.574427, 0.574427]), atol=1e-6, rtol=0)
    assert attention_diversity(rows.unsqueeze(0)).item() == pytest.approx(0.494062, abs=1e-6)
    assert attention_diversity(rows[:1].expand(1, 3, 3)).item() == pytest.approx(1, abs=1e-6)
    assert attention_diversity(torch.eye(3).unsqueeze(0)).item() == 0
    assert attention_diversity(rows[None, :1]).item() == 0


def test_diversity_compares_heads_one_by_one():
    attention = torch.rand(2, 3, 4, 7).softmax(-1)
    by_head = torch.stack([attention_diversity(attention[:, :, head]) for head in range(4)]).mean()
    torch.testing.assert_close(attention_diversity(attention), by_head)


def test_one_branch_without_masking_is_torchmil_abmil():
    import torchmil.models

    feature = torch.nn.Sequential(torch.nn.Linear(20, 16, bias=False), torch.nn.ReLU())
    peer = torchmil.models.ABMIL(in_shape=(20,), att_dim=8, gated=True, feat_ext=feature)
    model = ACMIL(20, 2, dim=16, hidden=8, branches=1, top_k=0)
    x = torch.randn(3, 11, 20)
    value, gate, score = peer.pool.fc1.module, peer.pool.fc_gated.module, peer.pool.fc2
    head = peer.classifier.module
    with torch.no_grad():
        scores = model.attention.scores
        model.reduce.weight.copy_(feature[0].weight)
        scores.hidden.weight.copy_(torch.cat([value.weight, gate.weight]))
        scores.hidden.bias.copy_(torch.cat([value.bias, gate.bias]))
        scores.score.weight.copy_(score.weight)
        scores.score.bias.zero_()
        model.classifier.weight.copy_(torch.cat([torch.zeros_like(head.weight), head.weight]))
        model.classifier.bias.copy_(torch.cat([torch.zeros(1), head.bias]))
    logits, attention = peer(x, return_att=True)
    output = model(x)
    torch.testing.assert_close(output.logits[:, 1], logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.attention, attention.softmax(-1), atol=1e-6, rtol=1e-5)
    loss = ACMILLoss()(output, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1, 1])))


@pytest.mark.parametrize("attention", ["gated", "mha"])
def test_shapes_and_attention(attention):
    model = ACMIL(20, 3, dim=16, attention=attention).eval()
    output = model(torch.randn(2, 30, 20))
    assert output.branch_logits.shape == (2, 5, 3)
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(2))
    maps = output.attention_map_logits.softmax(-1)
    torch.testing.assert_close(output.attention, maps.mean((1, 2)), atol=1e-6, rtol=1e-5)


def test_loss_adds_bag_branches_and_diversity():
    output = ACMIL(20, 3, dim=16).eval()(torch.randn(4, 9, 20))
    target = torch.tensor([0, 1, 2, 1])
    branches = torch.stack([F.cross_entropy(output.branch_logits[:, m], target) for m in range(5)]).mean()
    diversity = attention_diversity(output.attention_map_logits.softmax(-1))
    expected = F.cross_entropy(output.logits, target) + 0.5 * branches + 2 * diversity
    torch.testing.assert_close(ACMILLoss(branch_weight=0.5, diversity_weight=2.0)(output, target), expected)


def test_losses_of_a_padded_batch_are_those_of_its_bags():
    model, loss = ACMIL(20, 2, dim=16).eval(), ACMILLoss()
    bags = [torch.randn(size, 20) for size in (4, 9, 6)]
    x = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=99.0)
    mask = torch.arange(9) < torch.tensor([[4], [9], [6]])
    target = torch.tensor([0, 1, 1])
    alone = torch.stack([loss(model(bag[None]), target[i : i + 1]) for i, bag in enumerate(bags)]).mean()
    torch.testing.assert_close(loss(model(x, mask), target), alone, atol=1e-6, rtol=1e-5)


def test_masking_only_while_training():
    pool = MultiBranchAttention(16)
    h = torch.randn(1, 30, 16)
    assert int(pool.train()(h)[2].isneginf().sum()) == 5 * 6
    assert int(pool.eval()(h)[2].isneginf().sum()) == 0


def test_no_branch_classifier_where_it_would_get_no_loss():
    model = ACMIL(20, 2, dim=16, branches=1)
    ACMILLoss()(model(torch.randn(2, 9, 20)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_concentration():
    mass = attention_concentration(torch.tensor([[0.1, 0.6, 0.3], [1 / 3] * 3]), ks=(1, 2, 50))
    torch.testing.assert_close(mass[1], torch.tensor([0.6, 1 / 3]))
    torch.testing.assert_close(mass[2], torch.tensor([0.9, 2 / 3]))
    torch.testing.assert_close(mass[50], torch.ones(2))


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 0}, "branches: expected at least 1, got 0"),
        ({"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"mask_drop": 1.0}, r"mask_drop: expected a part in \[0, 1\), got 1.0"),
        ({"attention": "soft"}, "attention: expected 'gated' or 'mha', got 'soft'"),
        ({"attention": "mha", "heads": 5, "dim": 16}, "heads: expected a divisor of the embedding width 16, got 5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ACMIL(20, 2, **options)


@pytest.mark.bare
def test_loss_refuses_another_models_output():
    with pytest.raises(TypeError, match="ACMILLoss needs the output of ACMIL, got MILOutput"):
        ACMILLoss()(ABMIL(20, 2)(torch.randn(1, 3, 20)), torch.tensor([0]))


def test_agrees_with_stored_outputs_of_the_authors_code():
    """See tests/mil/peers: outputs of dazhangyu123/ACMIL for stored weights and inputs."""
    from pathlib import Path

    for kind in ("gated", "mha"):
        stored = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / f"peers/acmil_{kind}.npz").items()}
        model = ACMIL(24, 3, dim=16, hidden=128, attention=kind).eval()
        model.load_state_dict({k.removeprefix("w:"): v for k, v in stored.items() if k.startswith("w:")})
        output = model(stored["x"])
        torch.testing.assert_close(output.logits, stored["slide"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.branch_logits[0], stored["sub"], atol=1e-6, rtol=1e-5)
        loss = ACMILLoss()(output, torch.tensor([1]))
        torch.testing.assert_close(loss, stored["loss"], atol=1e-6, rtol=1e-6)
