import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.data.superclasses import superclasses
from classact.discover.crkd import (
    ClassRelationDistillation,
    CrKD,
    CrKDLoss,
    CrKDOutput,
    KnownClassifier,
    MultiHeadClusterer,
    PrototypeHead,
    SwappedPrediction,
    TrainingPlan,
    class_relation,
    discovery_accuracy,
    discovery_loss,
    fit_crkd,
    fit_known,
    relation_quality,
    sinkhorn_knopp,
    train_blocks_from,
)
from classact.discover.metrics import cluster_accuracy

TEACHER = torch.tensor([[[0.8, 0.2, 0.1], [0.1, 0.3, 0.6]]])
STUDENT = torch.tensor([[[0.5, 0.3, 0.1, 0.4, 0.2], [0.1, 0.1, 0.4, 0.0, 0.9]]])
SMALL = {"n_heads": 2, "hidden": 16, "projection": 5}
SHORT = TrainingPlan(epochs=2, warmup=1, lr=1e-2, batch_size=20)


def reference():
    with np.load(Path(__file__).parent / "data" / "crkd_reference.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU())


def noisy(x):
    return [x + 0.1 * torch.randn_like(x) for _ in range(2)]


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(45) % 3
    known = torch.eye(6)[y] * 5 + torch.randn(45, 6, generator=generator)
    classes = 3 + torch.arange(30) % 2
    return (known, y), torch.eye(6)[classes] * 5 + torch.randn(30, 6, generator=generator)


def short_fit(seed=0, novel=None, **options):
    known, own = problem()
    return fit_crkd(
        options.pop("encoder", None) or encoder(),
        options.pop("known", known),
        own if novel is None else novel,
        3,
        2,
        **{"views": noisy, "supervised": SHORT, "discovery": SHORT, "seed": seed, **SMALL, **options},
    )


def test_sinkhorn_by_hand():
    torch.testing.assert_close(sinkhorn_knopp(torch.zeros(4, 2)), torch.full((4, 2), 0.5))
    found = sinkhorn_knopp(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.2]]))
    expected = [[0.992801, 0.007199], [0.716373, 0.283627], [0.044216, 0.955785], [2.1002e-6, 0.999998]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(0), torch.tensor([1.753392, 2.246608]), atol=2e-6, rtol=0)


def test_sinkhorn_by_repeated_scaling():
    logits = torch.randn(3, 2, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    found = sinkhorn_knopp(logits, 0.1, 5)
    for index in np.ndindex(3, 2):
        q = (logits[index] / 0.1).exp()
        for _ in range(5):
            q = q / q.sum(0)
            q = q / q.sum(1, keepdim=True)
        torch.testing.assert_close(found[index], q)


def test_sinkhorn_converges_to_equal_clusters():
    logits = 0.1 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sinkhorn_knopp(logits, n_iters=200)
    torch.testing.assert_close(found.sum(0), torch.full((8,), 8.0, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(64, dtype=torch.float64))


def test_sinkhorn_survives_small_epsilon():
    found = sinkhorn_knopp(torch.tensor([[1.0, -1.0], [0.9, -1.0]]), epsilon=1e-3)
    assert found.isfinite().all()


def test_distillation_by_hand():
    adaptive, uniform = ClassRelationDistillation(3), ClassRelationDistillation(3, weighting="uniform")
    torch.testing.assert_close(adaptive.weights(STUDENT), torch.tensor([[1.292411, 0.707589]]), atol=1e-6, rtol=0)
    assert adaptive(TEACHER, STUDENT).item() == pytest.approx(14.742293, abs=1e-5)
    assert uniform(TEACHER, STUDENT).item() == pytest.approx(14.985999, abs=1e-5)


def test_distillation_of_equal_relations_is_the_entropy_or_zero():
    same = torch.cat([TEACHER, torch.rand(1, 2, 4)], -1)
    p = class_relation(TEACHER)
    entropy = -(p * p.log()).sum(-1).mean()
    assert 16 * entropy.item() == pytest.approx(14.090106, abs=1e-5)
    uniform = ClassRelationDistillation(3, weighting="uniform")
    assert uniform(TEACHER, same).item() == pytest.approx(14.090106, abs=1e-5)
    for weighting in ("uniform", "adaptive"):
        assert ClassRelationDistillation(3, weighting=weighting, divergence="kl")(TEACHER, same).item() == 0


def test_divergences_differ_by_the_weighted_entropy():
    student, teacher = torch.randn(3, 2, 7, 5).tanh(), torch.randn(2, 7, 3).tanh()
    for weighting in ("uniform", "adaptive"):
        ce, kl = (ClassRelationDistillation(3, weighting=weighting, divergence=d) for d in ("ce", "kl"))
        p = class_relation(teacher)
        entropy = -(p * p.log()).sum(-1)
        expected = 16 * (ce.weights(student) * entropy).mean((-2, -1))
        torch.testing.assert_close(ce(teacher, student) - kl(teacher, student), expected, atol=1e-4, rtol=1e-4)


def test_adaptive_weights_average_to_one_and_follow_the_known_mass():
    loss, student = ClassRelationDistillation(3), torch.randn(4, 2, 9, 5).tanh()
    weights = loss.weights(student)
    assert weights.shape == (4, 2, 9)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    shift = torch.rand(4, 2, 9, 1)
    torch.testing.assert_close(loss.weights(student + shift), weights)
    teacher = torch.randn(2, 9, 3).tanh()
    torch.testing.assert_close(loss(teacher, student + shift), loss(teacher, student), atol=1e-5, rtol=1e-5)
    known_only = student.clone()
    known_only[0, 0, 0, :3] += 0.3
    assert loss.weights(known_only)[0, 0, 0] > weights[0, 0, 0]
    torch.testing.assert_close(class_relation(known_only[..., :3]), class_relation(student[..., :3]))


def test_the_student_compares_its_known_entries_alone():
    student = torch.cat([TEACHER, torch.full((1, 2, 2), 0.9)], -1)
    assert ClassRelationDistillation(3, weighting="uniform", divergence="kl")(TEACHER, student).item() == 0


@pytest.mark.parametrize(
    ("options", "moves"), [({}, True), ({"detach_weight": True}, False), ({"weighting": "uniform"}, False)]
)
def test_novel_logits_get_a_gradient_through_the_weight_only(options, moves):
    student = STUDENT.clone().requires_grad_()
    ClassRelationDistillation(3, **options)(TEACHER, student).backward()
    assert bool(student.grad[..., 3:].any()) == moves
    assert student.grad[..., :3].any()


def test_swapped_prediction_by_its_definition():
    logits, targets = torch.randn(2, 4, 6, 5), torch.rand(2, 3, 6, 5).softmax(-1)
    expected = torch.zeros(2)
    for v in range(3):
        for w in range(4):
            if w != v:
                expected -= (targets[:, v] * (logits[:, w] / 0.1).log_softmax(-1)).sum(-1).mean(-1) / 9
    torch.testing.assert_close(SwappedPrediction()(logits, targets), expected)
    torch.testing.assert_close(SwappedPrediction()(logits[0], targets[0]), expected[0])


def with_reference_weights(found):
    model = CrKD(nn.Linear(6, 12), 12, 3, 4, n_heads=2, hidden=16, projection=5, n_layers=2)
    weights = {name.removeprefix("weight:"): value for name, value in found.items() if name.startswith("weight:")}
    state = model.state_dict()
    for name in ("weight", "bias"):
        state[f"encoder.{name}"] = weights[f"encoder.{name}"]
    state["known.weight"] = weights["head_lab.prototypes.weight"]
    layers = {"novel.hidden.0": 0, "novel.hidden.1": 3, "novel.project": 6}
    for ours, number in layers.items():
        for name in ("weight", "bias"):
            stacked = torch.stack([weights[f"head_unlab.projectors.{h}.mlp.{number}.{name}"] for h in range(2)])
            state[f"{ours}.{name}"] = stacked.mT if name == "weight" else stacked.unsqueeze(1)
    state["novel.prototypes"] = torch.stack([weights[f"head_unlab.prototypes.{h}.prototypes.weight"] for h in range(2)])
    model.load_state_dict(state)
    teacher = KnownClassifier(nn.Linear(6, 12), 12, 3)
    teacher.load_state_dict(
        {
            "encoder.weight": found["teacher:encoder.weight"],
            "encoder.bias": found["teacher:encoder.bias"],
            "head.weight": found["teacher:head_lab.prototypes.weight"],
        }
    )
    return model, teacher.eval()


def test_agrees_with_the_authors_code():
    found = reference()
    model, teacher = with_reference_weights(found)
    loss, views, target = CrKDLoss(3), list(found["views"]), found["target"]
    copied = copy.deepcopy(model)  # batch normalisation counts its batches
    joint = torch.stack([copied(view).joint for view in views], 1)
    torch.testing.assert_close(joint, found["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.targets(joint[:, :2].detach(), target), found["targets"], atol=1e-4, rtol=1e-4)
    terms = discovery_loss(model, teacher, views, target, loss)
    torch.testing.assert_close(terms.swapped, found["swapped"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.distilled, found["distilled"], atol=1e-4, rtol=1e-5)
    terms.total.backward()
    options = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(model.encoder.weight.grad, found["grad:encoder.weight"], **options)
    torch.testing.assert_close(model.known.weight.grad, found["grad:head_lab.prototypes.weight"], **options)
    for h in range(2):
        theirs = found[f"grad:head_unlab.prototypes.{h}.prototypes.weight"]
        torch.testing.assert_close(model.novel.prototypes.grad[h], theirs, **options)
        theirs = found[f"grad:head_unlab.projectors.{h}.mlp.0.weight"]
        torch.testing.assert_close(model.novel.hidden[0].weight.grad[h].T, theirs, **options)


@pytest.mark.parametrize("match", ["all", "novel"])
def test_accuracies_agree_with_the_authors_code(match):
    found = reference()
    ours = discovery_accuracy(found["true"].numpy(), found["pred"].numpy(), 3, match)
    np.testing.assert_allclose(ours, found[f"accuracy:{match}"].numpy())


def test_order_of_novel_clusters_does_not_matter():
    rng = np.random.default_rng(0)
    true, pred = rng.integers(0, 6, (2, 80))
    renamed = np.where(pred >= 2, 2 + (pred - 2 + 3) % 4, pred)
    assert cluster_accuracy(true, renamed) == cluster_accuracy(true, pred)
    for match in ("all", "novel"):
        assert discovery_accuracy(true, renamed, 2, match) == discovery_accuracy(true, pred, 2, match)
    assert math.isnan(discovery_accuracy([3, 4], [3, 4], 2).known)


def test_heads_are_networks_of_their_own():
    torch.manual_seed(0)
    heads, x = MultiHeadClusterer(7, 5, n_heads=3, hidden=8, projection=4, n_layers=2), torch.randn(9, 7)
    found = heads(x)
    assert found.shape == (3, 9, 5)
    assert found.abs().max() <= 1 + 1e-6
    for h in range(3):
        z = x
        for layer, norm in zip(heads.hidden, heads.norms, strict=True):
            own = slice(8 * h, 8 * h + 8)
            z = z @ layer.weight[h] + layer.bias[h]
            z = F.batch_norm(z, None, None, norm.weight[own], norm.bias[own], training=True).relu()
        z = F.normalize(z @ heads.project.weight[h] + heads.project.bias[h], dim=-1)
        torch.testing.assert_close(found[h], z @ heads.prototypes[h].T, atol=1e-5, rtol=1e-4)


def test_class_relations_use_both_temperatures():
    logits = torch.tensor([0.3, -0.2, 0.9])
    torch.testing.assert_close(class_relation(logits), (logits / 0.4).softmax(-1))
    torch.testing.assert_close(class_relation(logits, 2.0, 0.5), logits.softmax(-1))


def test_a_batch_without_novel_or_without_known_samples():
    model, teacher = CrKD(encoder(), 12, 3, 2, **SMALL), KnownClassifier(encoder(), 12, 3).eval()
    x = torch.randn(8, 6)
    for target in (torch.arange(8) % 3, torch.full((8,), -1)):
        terms = discovery_loss(model, teacher, noisy(x), target, CrKDLoss(3))
        assert terms.total.isfinite()
        assert bool(terms.distilled.any()) == bool((target < 0).any())
        terms.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_without_distillation_the_teacher_is_not_asked_and_nothing_else_changes():
    known, novel = problem()
    teacher = fit_known(encoder(), known, 3, views=noisy, plan=SHORT)
    plain = fit_crkd(teacher, known, novel, 3, 2, views=noisy, loss=CrKDLoss(3, alpha=0.0), discovery=SHORT, **SMALL)

    class Unasked(KnownClassifier):
        def forward(self, x):
            raise AssertionError

    silent = Unasked(copy.deepcopy(teacher.encoder), 12, 3)
    silent.load_state_dict(teacher.state_dict())
    same = fit_crkd(silent, known, novel, 3, 2, views=noisy, loss=CrKDLoss(3, alpha=0.0), discovery=SHORT, **SMALL)
    distilled = fit_crkd(teacher, known, novel, 3, 2, views=noisy, discovery=SHORT, **SMALL)
    states = [model.state_dict() for model in (plain, same, distilled)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_teacher_and_encoder_stay_as_they_were():
    known, novel = problem()
    raw = encoder()
    raw[0].weight.requires_grad_(False)
    before = copy.deepcopy(raw.state_dict())
    teacher = fit_known(raw, known, 3, views=noisy, plan=SHORT)
    assert all(torch.equal(before[name], value) for name, value in raw.state_dict().items())
    assert torch.equal(teacher.encoder[0].weight, raw[0].weight)
    assert raw.training and not teacher.training
    teacher.train()
    teacher.encoder[1].eval()
    before = copy.deepcopy(teacher.state_dict())
    model = fit_crkd(teacher, known, novel, 3, 2, views=noisy, discovery=SHORT, **SMALL)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert [m.training for m in teacher.encoder] == [True, False, True] and teacher.training
    assert all(p.grad is None for p in [*teacher.parameters(), *model.parameters()])
    assert torch.equal(model.encoder[0].weight, raw[0].weight) and not model.encoder[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="broken"):
        fit_crkd(teacher, known, novel, 3, 2, views=lambda _: (_ for _ in ()).throw(RuntimeError("broken")), **SMALL)
    assert [m.training for m in teacher.encoder] == [True, False, True] and teacher.training


def test_prototypes_have_length_one_after_every_epoch():
    lengths = []
    short_fit(
        callback=lambda _, model: lengths.extend(
            w.detach().norm(dim=-1).flatten() for w in (model.known.weight, model.novel.prototypes)
        )
    )
    assert len(lengths) == 4
    for length in lengths:
        torch.testing.assert_close(length, torch.ones_like(length))


def test_same_seed_same_network_and_the_global_random_state_is_left_alone():
    raw = encoder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (short_fit(seed=seed, encoder=raw) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    x = problem()[1]
    assert torch.equal(first(x).joint, second(x).joint)
    assert not torch.equal(first(x).joint, other(x).joint)


@pytest.mark.parametrize("options", [{"weighting": "uniform"}, {"divergence": "kl"}, {"distill": "features"}])
def test_every_objective_trains(options):
    model = short_fit(loss=CrKDLoss(3, alpha=0.5, **options))
    assert all(p.isfinite().all() for p in model.parameters())
    plain = short_fit(loss=CrKDLoss(3, alpha=0.0))
    assert not torch.equal(plain.encoder[0].weight, model.encoder[0].weight)


def test_it_discovers_separate_classes():
    known, novel = problem()
    plan = TrainingPlan(epochs=30, warmup=2, lr=1e-2, min_lr=1e-3, batch_size=25)
    model = short_fit(supervised=plan, discovery=plan, views=lambda x: [x + torch.randn_like(x) for _ in range(2)])
    assert cluster_accuracy(torch.arange(30) % 2, model.predict(novel, task_aware=True)) > 0.9
    found = discovery_accuracy(
        torch.cat([known[1], 3 + torch.arange(30) % 2]), model.predict(torch.cat([known[0], novel])), 3, "novel"
    )
    assert found.all > 0.85


def test_inductive_predictions_do_not_depend_on_other_rows():
    model, x = short_fit(), problem()[1]
    assert not model.training
    for options in ({}, {"task_aware": True}, {"head": 0}, {"batch_size": 7}):
        whole = model.predict(x, **options)
        assert torch.equal(model.predict(x[3:8], **options), whole[3:8])
        assert torch.equal(torch.cat([model.predict(row[None], **options) for row in x]), whole)


def test_transductive_predictions_share_the_rows_out():
    model, x = short_fit(), problem()[1]
    with torch.no_grad():
        logits = model(x).novel
    found = model.predict(x, task_aware=True, transductive=True, head="all")
    assert found.shape == (2, 30)
    torch.testing.assert_close(found, 3 + sinkhorn_knopp(logits).argmax(-1))
    assert torch.equal(model.predict(x, task_aware=True, transductive=True), found[model.best_head])
    assert found.min() >= 3
    assert (torch.bincount(found[0] - 3, minlength=2) >= 5).all()


def test_best_head_is_that_of_the_last_epoch():
    sums = []
    plan = SHORT._replace(epochs=3)
    model = short_fit(discovery=plan, callback=lambda _, model: sums.append(model.head_loss.clone()))
    total = []
    kept = short_fit(discovery=plan, reset_head_loss=False, callback=lambda _, m: total.append(m.head_loss.clone()))
    torch.testing.assert_close(torch.stack(sums).cumsum(0), torch.stack(total))
    assert torch.equal(model.head_loss, sums[-1]) and torch.equal(kept.head_loss, total[-1])
    assert model.best_head == int(sums[-1].argmin())
    x = problem()[1]
    assert torch.equal(model.predict(x), model.predict(x, head="all")[model.best_head])
    assert torch.equal(model.predict(x, head=1), model.predict(x, head="all")[1])


def test_predictions_leave_the_mode_of_the_model():
    model = short_fit().train()
    model.encoder[1].eval()
    model.predict(problem()[1])
    model.relation(problem()[1])
    assert model.training and not model.encoder[1].training
    with pytest.raises(RuntimeError):
        model.predict(torch.rand(4, 9))
    assert model.training and not model.encoder[1].training


def test_it_takes_data_sets_of_views():
    known, novel = problem()
    torch.manual_seed(3)
    pairs = [([x, x + 0.1 * torch.randn(6), x + 0.3 * torch.randn(6)], int(y)) for x, y in zip(*known, strict=True)]
    singles = [([x, x + 0.1 * torch.randn(6), x + 0.3 * torch.randn(6)], "?") for x in novel]
    model = short_fit(known=pairs, novel=singles, views=None)
    assert model.predict(novel).shape == (30,)


def test_small_crops_may_have_another_size():
    pool = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.rand(12, 1, 12, 12), torch.arange(12) % 3
    model = short_fit(
        encoder=pool,
        known=(x, y),
        novel=torch.rand(10, 1, 12, 12),
        views=lambda x: [x, x.flip(-1), x[..., :8, :8], x[..., 4:, 4:]],
        discovery=SHORT._replace(optimizer="sgd", batch_size=22),
    )
    assert model.predict(x).shape == (12,)


def test_on_top_of_a_timm_backbone():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=2
    )
    assert train_blocks_from(vit, 2) is vit
    trained = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("blocks.2.") for name in trained)
    x, y = torch.rand(12, 3, 16, 16), torch.arange(12) % 3
    model = short_fit(encoder=vit, known=(x, y), novel=torch.rand(10, 3, 16, 16))
    for name, p in model.encoder.named_parameters():
        assert torch.equal(p, vit.get_parameter(name)) == (name not in trained)
    assert model.predict(x, head="all").shape == (2, 12)
    with pytest.raises(ValueError, match=r"encoder: expected parameters named blocks.3"):
        train_blocks_from(vit, 3)


def test_round_trip_through_safetensors(tmp_path):
    model, x = short_fit(), problem()[1]
    fresh = CrKD(encoder(), 12, 3, 2, **SMALL)
    loaded = classact.load(classact.save(model, tmp_path / "m"), fresh)
    assert torch.equal(loaded(x).joint, model(x).joint)
    assert torch.equal(loaded.predict(x), model.predict(x))
    assert {**loaded.config, "encoder": None} == {**model.config, "encoder": None}


def test_lightning_module_trains_as_the_function_does():
    from classact.discover.crkd_lit import CrKDModule
    from classact.training import fit

    known, novel = problem()
    teacher = fit_known(encoder(), known, 3, views=noisy, plan=SHORT)
    before = copy.deepcopy(teacher.state_dict())
    x, target = torch.cat([known[0], novel]), torch.cat([known[1], torch.full((30,), -1)])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), 25, shuffle=True)
    torch.manual_seed(0)
    model = CrKD.from_teacher(teacher, 2, **SMALL)
    rates = []
    module = CrKDModule(model, teacher, views=noisy, plan=TrainingPlan(warmup=2, lr=1e-2, min_lr=1e-3))
    original = module.on_train_batch_end
    module.on_train_batch_end = lambda *a: (rates.append(module.optimizers().param_groups[0]["lr"]), original(*a))
    history = fit(module, loader, epochs=4, seed=0)
    assert rates[::3] == pytest.approx([1e-3, 1e-2, 1e-2, 5.5e-3])
    assert set(history.curves) >= {"swapped", "distilled"}
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not module.train().teacher.training and model.training
    for weight in (model.known.weight, model.novel.prototypes):
        torch.testing.assert_close(weight.norm(dim=-1), torch.ones(weight.shape[:-1]))


def test_learning_rates():
    plan = TrainingPlan(epochs=8, warmup=3, lr=1.0, min_lr=0.1)
    rates = [plan.rate(epoch) for epoch in range(8)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * e / 5)) for e in range(5)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, *cosine])
    assert TrainingPlan(epochs=4, warmup=0).rate(0) == 1e-3


def test_bfloat16_autocast():
    model, teacher = CrKD(encoder(), 12, 3, 2, **SMALL), KnownClassifier(encoder(), 12, 3).eval()
    target = torch.arange(12) % 4 - 1
    with torch.autocast("cpu", torch.bfloat16):
        terms = discovery_loss(model, teacher, noisy(torch.randn(12, 6)), target, CrKDLoss(3))
    assert terms.total.dtype == torch.float32
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
def test_losses_and_network_compile_and_export():
    distil, swap = ClassRelationDistillation(3), SwappedPrediction()

    def step(teacher, student):
        return distil(teacher, student) + swap(student, sinkhorn_knopp(student))

    teacher, student = torch.randn(2, 7, 3).tanh(), torch.randn(4, 2, 7, 5).tanh()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(teacher, student), step(teacher, student))
    model, x = CrKD(encoder(), 12, 3, 2, **SMALL).eval(), torch.randn(5, 6)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    exported = torch.export.export(distil, (teacher, student)).module()
    torch.testing.assert_close(exported(teacher, student), distil(teacher, student))


def test_relation_quality():
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    assert relation_quality(probs, torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1])) == 0.75


def test_super_classes():
    data = superclasses(3, n_superclasses=4, per_superclass=(2, 3), n_samples=(7, 5, 40), noise=0.3)
    assert data.known.shape == (56, 32) and data.novel.shape == (60, 32) and data.test.shape == (800, 32)
    assert np.bincount(data.known_labels).tolist() == [7] * 8
    assert np.bincount(data.novel_labels).tolist() == [0] * 8 + [5] * 12
    assert np.bincount(data.superclass).tolist() == [5] * 4
    means = np.stack([data.test[data.test_labels == c].mean(0) for c in range(20)])
    distances = np.linalg.norm(means[8:, None] - means[:8], axis=-1)
    assert (data.superclass[:8][distances.argmin(1)] == data.superclass[8:]).all()
    again, other = (superclasses(seed, n_samples=(3, 3, 3)) for seed in (3, 4))
    assert np.array_equal(again.known, superclasses(3, n_samples=(3, 3, 3)).known)
    assert not np.array_equal(again.known, other.known)
    with pytest.raises(ValueError, match="expected numbers of at least 1"):
        superclasses(0, n_samples=(3, 0, 3))


def test_it_needs_neither_lightning_nor_extras():
    code = (
        "import sys\nfrom classact.discover import crkd, hypersphere\n"
        "print({'lightning', 'timm', 'torchvision', 'matplotlib'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def output(n=4, k=3, u=2, h=2, d=5):
    return CrKDOutput(torch.rand(n, k), torch.rand(h, n, u), torch.rand(n, d))


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sinkhorn_knopp(torch.zeros(0, 2)), ValueError, r"logits: expected shape .* got \(0, 2\)"),
        (lambda: sinkhorn_knopp(torch.tensor([[0.0, torch.nan]])), ValueError, "logits: expected finite numbers"),
        (lambda: sinkhorn_knopp(torch.zeros(2, 2), epsilon=0.0), ValueError, "epsilon: expected a positive number"),
        (lambda: sinkhorn_knopp(torch.zeros(2, 2), n_iters=0), ValueError, "n_iters: expected at least 1, got 0"),
        (lambda: class_relation(torch.zeros(3), 0.0), ValueError, "temperature: expected a positive number, got 0.0"),
        (lambda: ClassRelationDistillation(0), ValueError, "n_known: expected at least 1, got 0"),
        (
            lambda: ClassRelationDistillation(3, weighting="x"),
            ValueError,
            "weighting: expected 'adaptive' or 'uniform'",
        ),
        (
            lambda: ClassRelationDistillation(3, divergence="x"),
            ValueError,
            "divergence: expected 'ce' or 'kl', got 'x'",
        ),
        (lambda: ClassRelationDistillation(2)(TEACHER, STUDENT), ValueError, r"expected shapes \(V, B, 2\)"),
        (lambda: ClassRelationDistillation(3)(TEACHER, TEACHER), ValueError, "more than 3"),
        (lambda: SwappedPrediction(0.0), ValueError, "logit_temperature: expected a positive number"),
        (lambda: SwappedPrediction()(STUDENT, STUDENT), ValueError, "expected two views or more"),
        (lambda: PrototypeHead(0, 2), ValueError, "in_features: expected at least 1, got 0"),
        (lambda: MultiHeadClusterer(4, 1), ValueError, "n_clusters: expected at least 2, got 1"),
        (lambda: CrKD(nn.Identity(), 4, 3, 1), ValueError, "n_novel: expected at least 2, got 1"),
        (lambda: CrKD(nn.Identity(), 4, 3, 2, **SMALL)(torch.rand(5, 6)), ValueError, r"expected features \(5, 4\)"),
        (lambda: CrKDLoss(3, alpha=-0.1), ValueError, "alpha: expected 0 or more, got -0.1"),
        (lambda: CrKDLoss(3, distill="x"), ValueError, "distill: expected 'relations' or 'features', got 'x'"),
        (lambda: CrKDLoss(3, n_large=0), ValueError, "n_large: expected at least 1, got 0"),
        (
            lambda: CrKDLoss(3)([output(), output()], torch.tensor([0, 1, -1, -1])),
            ValueError,
            "teacher: expected outputs for 2 large views, got 0",
        ),
        (lambda: TrainingPlan(optimizer="rms").optimize(nn.Linear(2, 2)), ValueError, "optimizer: expected 'adamw' or"),
        (lambda: TrainingPlan(epochs=0).optimize(nn.Linear(2, 2)), ValueError, "epochs: expected at least 1, got 0"),
        (
            lambda: CrKD(nn.Identity(), 4, 3, 2, **SMALL).predict(torch.rand(5, 4), transductive=True),
            ValueError,
            "transductive: expected task_aware=True",
        ),
        (
            lambda: short_fit(known=(torch.rand(4, 6), torch.arange(4))),
            ValueError,
            "known: expected classes 0 to 2, got",
        ),
        (lambda: short_fit(known=(torch.rand(4, 6), torch.arange(3))), ValueError, "as many inputs as classes"),
        (lambda: short_fit(novel=torch.rand(4, 5)), ValueError, r"novel: expected shape \(M, 6\), got \(4, 5\)"),
        (lambda: short_fit(novel=[(torch.rand(6), 0)]), TypeError, "novel: expected a tensor, as `known` are tensors"),
        (lambda: short_fit(known=[(torch.rand(6), 0)]), TypeError, "novel: expected a data set, as `known` is one"),
        (lambda: short_fit(views=None), ValueError, "views: expected a function"),
        (lambda: short_fit(loss=CrKDLoss(4)), ValueError, "loss: expected one for 3 known classes, got one for 4"),
        (lambda: short_fit(encoder=nn.Unflatten(1, (2, 3))), ValueError, r"encoder: expected features \(N, D\), got"),
        (
            lambda: short_fit(encoder=KnownClassifier(encoder(), 12, 4)),
            ValueError,
            "expected a classifier of 3 classes",
        ),
        (lambda: fit_crkd(encoder(), *problem(), 3, 1, views=noisy), ValueError, "n_novel: expected at least 2, got 1"),
        (lambda: discovery_accuracy([0], [0], 1, match="x"), ValueError, "match: expected 'all' or 'novel', got 'x'"),
        (
            lambda: relation_quality(torch.rand(4, 3), torch.arange(4), torch.arange(2)),
            ValueError,
            "known_probs, superclass, known_superclass: expected shapes",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()
