import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from classact.data.bags import BagBatch
from classact.mil import (
    ABMIL,
    ACMIL,
    DSMIL,
    MHIM,
    ACMILLoss,
    AttentionEntropy,
    BagCrossEntropy,
    DSMILLoss,
    MultiHeadABMIL,
    Standardized,
    TransMIL,
    consistency_loss,
    fit_mhim,
    hard_instance_mask,
    load_mhim_v1_checkpoint,
)
from classact.mil.lit import FittedBags
from classact.mil.mhim import keep_instances
from classact.training import History

PEER = Path(__file__).parent / "peers" / "mhim.npz"
NOTHING = {"high": 0.0, "low": 0.0, "random": 0.0, "alpha": 0.0}


def batch(n=2, k=20, d=8, mask=None):
    torch.manual_seed(1)
    return BagBatch(torch.randn(n, k, d), mask, None, torch.arange(n) % 2)


def module(model=None, loss=None, **settings):
    torch.manual_seed(0)
    return MHIM(model or ABMIL(8, 2, dim=6, hidden=4), loss, **settings)


# ---------------------------------------------------------------- what is masked


def test_a_random_part_of_the_salient_pool_goes():
    scores = torch.arange(100.0)[None]
    seen = set()
    for seed in range(20):
        keep = hard_instance_mask(scores, high=0.01, high_random=0.5, generator=torch.Generator().manual_seed(seed))
        assert keep.sum() == 99
        seen.add(int((~keep).nonzero()[0, 1]))
    assert seen == {98, 99}


def test_number_kept_of_100():
    scores = torch.randperm(100).float()[None]
    keep = hard_instance_mask(scores, high=0.03, low=0.8)
    assert keep.sum() == 17
    assert scores[keep].min() == 80
    assert scores[keep].max() == 96
    assert hard_instance_mask(scores, random=0.5).sum() == 50


@pytest.mark.parametrize(("ratio", "dropped"), [(0.07, 7), (0.29, 29), (0.071, 8)])
def test_rounding_errors_drop_no_instance(ratio, dropped):
    assert (~hard_instance_mask(torch.rand(1, 100), high=ratio)).sum() == dropped


def test_a_pool_larger_than_the_bag_is_the_bag():
    keep = hard_instance_mask(torch.rand(1, 40), high=0.5, high_random=0.1)
    assert keep.sum() == 20


def test_sets_are_chosen_from_the_whole_bag_and_united():
    torch.manual_seed(0)
    kept = torch.tensor([hard_instance_mask(torch.rand(1, 100), high=0.1, random=0.5).sum() for _ in range(50)])
    assert (kept >= 40).all() and (kept <= 50).all()
    assert 43 < kept.float().mean() < 47  # 5 of the 10 are in the random half too


def test_permutation_permutes_what_is_kept():
    scores, order = torch.rand(2, 3, 50), torch.randperm(50)
    keep = hard_instance_mask(scores, high=0.2, low=0.3)
    assert torch.equal(hard_instance_mask(scores[..., order], high=0.2, low=0.3), keep[:, order])


def test_padding_is_neither_counted_nor_chosen():
    scores = torch.rand(2, 60)
    mask = torch.arange(60) < torch.tensor([[37], [60]])
    scores[0, 37:] = 5.0
    keep = hard_instance_mask(scores, mask, high=0.1, low=0.2)
    assert torch.equal(keep[:1, :37], hard_instance_mask(scores[:1, :37], high=0.1, low=0.2))
    assert not keep[0, 37:].any()
    assert torch.equal(keep[1:], hard_instance_mask(scores[1:], high=0.1, low=0.2))


def test_votes_of_two_heads():
    heads = torch.tensor([[[5.0, 4, 0, 1, 2], [0.0, 5, 4, 1, 2]]])
    keep = hard_instance_mask(heads, high=0.4)
    assert not keep[0, 1]
    assert keep.sum() == 3


def test_one_instance_always_remains():
    assert hard_instance_mask(torch.rand(3, 1), high=0.01).all()
    keep = hard_instance_mask(torch.tensor([[0.3, 0.5, 0.2]]), high=1.0)
    assert keep.tolist() == [[False, False, True]]
    mask = torch.tensor([[False, True, True]])
    assert hard_instance_mask(torch.tensor([[0.1, 0.5, 0.4]]), mask, high=1.0).tolist() == [[False, False, True]]


def test_hidden_instances_have_the_lowest_attention():
    keep = hard_instance_mask(torch.tensor([[1.0, -math.inf, 0.0, 2.0]]), low=0.25)
    assert keep.tolist() == [[True, False, True, True]]


def test_same_generator_same_mask():
    scores = torch.rand(4, 50)
    a, b, c = (
        hard_instance_mask(scores, high=0.2, high_random=0.5, random=0.3, generator=torch.Generator().manual_seed(s))
        for s in (7, 7, 8)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# ---------------------------------------------------------------- consistency


def test_consistency_by_hand():
    student, teacher = torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[1.0, 0.0, -1.0]])
    assert consistency_loss(student, teacher).item() == pytest.approx(0.680292, abs=1e-6)
    assert consistency_loss(torch.ones(2, 7), torch.randn(2, 7)).item() == pytest.approx(math.log(7), abs=1e-6)


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    consistency_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# ---------------------------------------------------------------- the step


def test_agrees_with_the_authors_code():
    found = {name: torch.from_numpy(value) for name, value in np.load(PEER).items()}
    names = {
        "patch_to_emb.0": "reduce",
        "online_encoder.attention.attention.0": "attention.hidden",
        "online_encoder.attention.attention.2": "attention.score",
        "predictor": "classifier",
    }

    def load(who):
        model = ABMIL(24, 2, dim=16, activation="relu", bias=True)
        weights = {n: torch.zeros_like(p) for n, p in model.state_dict().items()}
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                if f"{who}:{theirs}.{kind}" in found:
                    weights[f"{ours}.{kind}"] = found[f"{who}:{theirs}.{kind}"]
        model.load_state_dict(weights)
        return model

    student = load("student")
    ours = MHIM(student, None, load("teacher"), high=0.07, high_random=1, low=0.3, random=0, alpha=0.1)
    keep = hard_instance_mask(ours.teacher(found["x"]).attention, high=0.07, low=0.3)
    assert keep[0].nonzero()[:, 0].tolist() == found["keep"].tolist()
    loss = ours.student_loss(BagBatch(found["x"], None, None, torch.tensor([1])), time=0.0)
    torch.testing.assert_close(loss.detach(), found["loss"], atol=1e-6, rtol=0)
    loss.backward()
    torch.testing.assert_close(student.attention.hidden.weight.grad, found["gradient"], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(student(found["x"], keep).logits.detach(), found["logits"], atol=1e-6, rtol=1e-5)
    for fusion in ("vote", "mean"):
        mine = hard_instance_mask(found["heads"], high=0.2, fusion=fusion)[0]
        if fusion == "mean":
            assert mine.nonzero()[:, 0].tolist() == found["keep_mean"].tolist()
        else:  # equal votes are broken arbitrarily there
            theirs = torch.zeros(40, dtype=torch.bool).scatter(0, found["keep_vote"], True)
            votes = (found["heads"][0].argsort(-1).argsort(-1) >= 32).sum(0)
            assert votes[~mine].sort().values.tolist() == votes[~theirs].sort().values.tolist()


def test_without_masking_and_consistency_it_is_the_plain_step():
    plain = ABMIL(8, 2, dim=6, hidden=4)
    ours = MHIM(plain, **NOTHING)
    data = batch()
    loss = ours.student_loss(data, 0.3)
    expected = BagCrossEntropy()(plain(data.x), data.label)
    assert torch.equal(loss, expected)
    for a, b in zip(*(torch.autograd.grad(v, list(plain.parameters())) for v in (loss, expected)), strict=True):
        assert torch.equal(a, b)


def test_removing_instances_is_masking_them():
    model, data = ABMIL(8, 2, dim=6, hidden=4), batch(3)
    keep = torch.rand(3, 20) < 0.6
    x, mask, _ = keep_instances(data.x, keep)
    assert x.shape[1] == keep.sum(1).max()
    torch.testing.assert_close(model(x, mask).logits, model(data.x, keep).logits, atol=1e-6, rtol=1e-5)
    one, none, coords = keep_instances(data.x[:1], keep[:1], torch.arange(40.0).view(1, 20, 2))
    assert none is None
    assert torch.equal(one[0], data.x[0][keep[0]])
    assert torch.equal(coords[0, :, 0] / 2, keep[0].nonzero()[:, 0].float())


def test_a_padded_batch_has_the_loss_of_its_bags():
    ours = module(high=0.2, high_random=1, low=0.2, random=0, decay_high=False, teacher_dropout=False)
    whole = batch(2, 20, mask=torch.arange(20) < torch.tensor([[13], [20]]))
    alone = [
        ours.student_loss(BagBatch(whole.x[i : i + 1, :size], None, None, whole.label[i : i + 1]), 0.0)
        for i, size in enumerate((13, 20))
    ]
    torch.testing.assert_close(ours.student_loss(whole, 0.0), sum(alone) / 2, atol=1e-6, rtol=1e-5)


def test_high_ratio_decays_and_momentum_rises():
    from classact.mil.mhim import _cosine

    assert [_cosine(0.03, 0, i / 4) for i in range(4)] == pytest.approx([0.03, 0.0256066, 0.015, 0.0043934], abs=1e-7)
    found = [_cosine(0.9999, 1, i / 4) for i in range(4)]
    assert found == pytest.approx([0.9999, 0.99991464, 0.99995, 0.99998536], abs=1e-8)


def test_teacher_moves_by_its_momentum():
    ours = module(momentum=0.9, momentum_final=1.0)
    before = {n: p.clone() for n, p in ours.teacher.named_parameters()}
    with torch.no_grad():
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p))
    ours.update_teacher(0.5)
    for name, p in ours.teacher.named_parameters():
        expected = 0.95 * before[name] + 0.05 * dict(ours.model.named_parameters())[name]
        torch.testing.assert_close(p, expected, atol=1e-7, rtol=0)
        assert not p.requires_grad


def test_teacher_sees_dropout_but_no_other_noise():
    ours = module(ACMIL(8, 2, dim=6, hidden=4, top_k=10, mask_drop=0.9), ACMILLoss(), teacher_dropout=True)
    ours.teacher.train()
    watched = ours._watch(batch().x, None, None)
    assert torch.isfinite(watched.attention_map_logits).all()  # STKIM would have put -inf
    x = batch().x
    dropped = module(ABMIL(8, 2, dim=6, dropout=0.5))
    a, b = (dropped._watch(x, None, None).embedding for _ in range(2))
    assert not torch.equal(a, b)
    still = module(ABMIL(8, 2, dim=6, dropout=0.5), teacher_dropout=False)
    a, b = (still._watch(x, None, None).embedding for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("factory", "loss"),
    [
        (lambda: ABMIL(8, 2, dim=6), BagCrossEntropy()),
        (lambda: MultiHeadABMIL(8, 2, dim=16), BagCrossEntropy() + AttentionEntropy(0.1)),
        (lambda: ACMIL(8, 2, dim=6), ACMILLoss() + AttentionEntropy(0.1)),
        (lambda: DSMIL(8, 2, dim=6), DSMILLoss()),
        (lambda: TransMIL(8, 2, dim=16, heads=2, landmarks=4), BagCrossEntropy()),
        (lambda: Standardized(ABMIL(8, 2, dim=6)), BagCrossEntropy()),
    ],
    ids=["abmil", "heads+aem", "acmil+aem", "dsmil", "transmil", "standardized"],
)
def test_any_model_of_the_family_may_be_the_student(factory, loss):
    for update in ("ema", "self"):
        ours = module(factory(), loss, high=0.2, low=0.1, random=0.2, teacher_update=update)
        value = ours.student_loss(batch(3, 12), 0.1, 0.1)
        value.backward()
        assert value.isfinite()
        assert all(p.grad is not None for n, p in ours.model.named_parameters() if "reduce" in n)
        assert ours.model.training


def test_dsmil_is_masked_by_its_instance_scores():
    model = DSMIL(8, 2, dim=6).eval()
    output = model(batch().x)
    assert torch.equal(output.salience, output.instance_logits.max(-1).values)


def test_bfloat16_autocast():
    ours = module(high=0.2, random=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.student_loss(batch(), 0.0)
    loss.backward()
    assert loss.isfinite()


# ---------------------------------------------------------------- two stages


def make_bags():
    from classact.data import digits_bags

    bags = digits_bags(40)
    return bags.subset(range(28)), bags.subset(range(28, 40))


def test_two_stages_share_the_budget_and_are_reproducible(monkeypatch):
    from classact.mil import mhim as source

    spent = []
    for name in ("fit_bags", "fit_module"):
        original = getattr(source, name)
        monkeypatch.setattr(
            source, name, lambda *a, original=original, **k: (spent.append(k["epochs"]), original(*a, **k))[1]
        )
    train, validation = make_bags()
    found = []
    for seed in (1, 1, 2):
        fitted = fit_mhim(
            lambda: ABMIL(64, 2, dim=8, hidden=8),
            None,
            train,
            validation,
            seed=seed,
            epochs=5,
            lr=1e-2,
            batch_size=4,
            momentum=0.9,
        )
        found.append(fitted.model(train[0].x[None]).logits)
    assert spent == [2, 3] * 3
    assert not fitted.model.training
    assert len(fitted.history.curves["val_loss"]) == 3
    assert fitted.history.steps == 5 * 7  # of both stages
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.bare
@pytest.mark.parametrize("how", ["none", "embed", "all"])
def test_what_the_student_starts_from(how, monkeypatch):
    from classact.mil import mhim as source

    seen = {}
    monkeypatch.setattr(
        source,
        "fit_module",
        lambda module, *a, **k: seen.update(module=module) or FittedBags(module.model, History({}, 0, 1, 7)),
    )
    torch.manual_seed(5)
    baseline = ABMIL(8, 2, dim=6)
    fitted = fit_mhim(lambda: ABMIL(8, 2, dim=6), None, None, seed=0, baseline=baseline, student_init=how)
    assert fitted.history.steps == 7
    student = seen["module"].model
    same = {n for n, p in student.named_parameters() if torch.equal(p, dict(baseline.named_parameters())[n])}
    expected = {"none": set(), "embed": {"reduce.weight"}, "all": set(dict(baseline.named_parameters()))}[how]
    assert same == expected
    for name, p in seen["module"].teacher.named_parameters():
        assert torch.equal(p, dict(baseline.named_parameters())[name])


def test_teacher_follows_during_a_real_training():
    train, _ = make_bags()
    torch.manual_seed(0)
    baseline = ABMIL(64, 2, dim=8, hidden=8)
    original = {n: p.clone() for n, p in baseline.named_parameters()}
    modules = {}
    for update in ("ema", "frozen"):
        from classact.mil.lit import fit_module

        torch.manual_seed(1)
        modules[update] = MHIM(ABMIL(64, 2, dim=8, hidden=8), None, baseline, momentum=0.5, teacher_update=update)
        fit_module(modules[update], train, seed=0, epochs=2, batch_size=4)
    for name, p in modules["frozen"].teacher.named_parameters():
        assert torch.equal(p, original[name])
    moved = [not torch.equal(p, original[n]) for n, p in modules["ema"].teacher.named_parameters()]
    assert all(moved)
    for a, b in zip(modules["ema"].teacher.parameters(), modules["ema"].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.5)


def test_checkpoint_of_the_authors(tmp_path):
    torch.manual_seed(0)
    weights = {
        "patch_to_emb.0.weight": torch.randn(16, 24),
        "patch_to_emb.0.bias": torch.randn(16),
        "online_encoder.attention.attention.0.weight": torch.randn(8, 16),
        "online_encoder.attention.attention.2.weight": torch.randn(1, 8),
        "predictor.weight": torch.randn(2, 16),
        "predictor.bias": torch.randn(2),
    }
    torch.save({"model": weights}, tmp_path / "m.pt")
    model = load_mhim_v1_checkpoint(tmp_path / "m.pt")
    x = torch.randn(1, 9, 24)
    h = F.relu(x @ weights["patch_to_emb.0.weight"].T + weights["patch_to_emb.0.bias"])
    a = F.relu(h @ weights["online_encoder.attention.attention.0.weight"].T)
    a = (a @ weights["online_encoder.attention.attention.2.weight"].T).softmax(1)
    expected = (a * h).sum(1) @ weights["predictor.weight"].T + weights["predictor.bias"]
    torch.testing.assert_close(model(x).logits.detach(), expected, atol=1e-5, rtol=1e-5)
    assert model.config["activation"] == "relu"


# ---------------------------------------------------------------- bad input


@pytest.mark.bare
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"high": 1.2}, r"high: expected a part in \[0, 1\], got 1.2"),
        ({"low": -0.1}, "low: expected a part"),
        ({"random": 2}, "random: expected a part"),
        ({"high": 0.1, "high_random": 0}, r"high_random: expected a part in \(0, 1\], got 0"),
        ({"fusion": "sum"}, "fusion: expected 'vote' or 'mean', got 'sum'"),
        ({"mask": torch.ones(2, 3)}, "mask: expected bool of shape"),
        ({"mask": torch.tensor([[True, False], [False, False]])}, "mask: every bag needs at least one instance, bag 1"),
    ],
)
def test_bad_masking(arguments, message):
    with pytest.raises(ValueError, match=message):
        hard_instance_mask(torch.rand(2, 2), **arguments)


@pytest.mark.bare
def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match=r"attention: expected shape \(N, K\) or \(N, H, K\) with K > 0, got \(3,\)"):
        hard_instance_mask(torch.rand(3))
    with pytest.raises(ValueError, match="student, teacher: expected equal shapes"):
        consistency_loss(torch.rand(1, 2), torch.rand(1, 3))
    with pytest.raises(ValueError, match="teacher_temperature: expected a positive number, got 0"):
        consistency_loss(torch.rand(1, 2), torch.rand(1, 2), 0)
    for settings, message in (
        ({"momentum": 1.5}, "momentum: expected a part"),
        ({"momentum_final": -1}, "momentum_final: expected a part"),
        ({"alpha": -1}, "alpha: expected 0 or more"),
        ({"teacher_update": "copy"}, "teacher_update: expected 'ema', 'frozen' or 'self', got 'copy'"),
        ({"teacher": ABMIL(8, 2, dim=5)}, "teacher: expected the structure of the student; they differ in"),
    ):
        with pytest.raises(ValueError, match=message):
            module(**settings)
    with pytest.raises(ValueError, match="student_init: expected 'none', 'embed' or 'all', got 'some'"):
        fit_mhim(lambda: None, None, None, seed=0, student_init="some")
    with pytest.raises(ValueError, match="epochs: expected at least 2, one for each stage, got 1"):
        fit_mhim(lambda: None, None, None, seed=0, epochs=1)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: expected patch_to_emb.0.weight, .*; got a"):
        load_mhim_v1_checkpoint(tmp_path / "x.pt")


def test_lightning_steps_pass_the_time_of_the_schedules():
    ours = module(momentum=0.5, momentum_final=1.0)
    seen = []
    ours.student_loss = lambda batch, time, progress: (seen.append((time, progress)), torch.zeros(()))[1]
    ours.trainer = SimpleNamespace(estimated_stepping_batches=5, global_step=2)
    ours.training_step(batch(), 0)
    assert seen == [(2 / 5, 2 / 4)]
