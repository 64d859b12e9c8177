import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import classact
from classact.discover.hypersphere import (
    HypersphereClassifier,
    NormalizedLinear,
    PrototypeClassifier,
    class_prototype,
    fit_hypersphere,
    lowest_loss,
    unit,
)


def groups(n=40, classes=3, dim=6, seed=0):
    y = torch.arange(n * classes) % classes
    noise = torch.randn(len(y), dim, generator=torch.Generator().manual_seed(seed))
    return 4 * torch.eye(dim)[y] + noise, y


def new_class(n=20, seed=9):
    return 4 * torch.eye(6)[4] + torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8, bias=False))


def fitted(**options):
    return fit_hypersphere(encoder(), *groups(), **{"epochs": 10, "lr": 1e-2, "batch_size": 32, **options})


def head_with(weight, **options):
    head = NormalizedLinear(weight.shape[1], len(weight), **options)
    head.weight.data.copy_(weight)
    return head


def test_logits_by_hand():
    head = head_with(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    logits = head(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(logits, torch.tensor([[6.0, 8.0]]))
    assert F.cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(0.126928, abs=1e-6)


def test_lengths_do_not_matter():
    torch.manual_seed(0)
    head, x = NormalizedLinear(5, 7), torch.randn(9, 5)
    logits = head(x)
    assert logits.abs().max() <= 10 + 1e-5
    torch.testing.assert_close(head(x * torch.rand(9, 1).add(0.1)), logits)
    torch.testing.assert_close(head_with(head.weight * torch.rand(7, 1).add(0.1))(x), logits)
    torch.testing.assert_close(logits, 10 * F.cosine_similarity(x.unsqueeze(1), head.weight, dim=-1))


def test_agrees_with_pytorch_metric_learning():
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    torch.manual_seed(0)
    head, y = NormalizedLinear(5, 7, scale=12.5), torch.arange(9) % 7
    ours, theirs = (torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    peer = NormalizedSoftmaxLoss(7, 5, temperature=1 / 12.5)
    peer.W.data.copy_(head.weight.T)
    losses = F.cross_entropy(head(ours), y), peer(theirs, y)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.weight.grad, peer.W.grad.T, atol=1e-6, rtol=1e-5)


def test_prototypes_by_hand():
    half = torch.full((2,), math.sqrt(0.5))
    torch.testing.assert_close(class_prototype(torch.eye(2)), half)
    torch.testing.assert_close(class_prototype(torch.tensor([[10.0, 0.0], [0.0, 1.0]])), half)
    one = torch.randn(1, 4)
    torch.testing.assert_close(class_prototype(one), F.normalize(one)[0])


def test_equal_classes_have_equal_columns_and_the_first_wins():
    head, x = NormalizedLinear(4, 0), torch.randn(3, 4)
    assert [head.add_class(x), head.add_class(x)] == [0, 1]
    assert torch.equal(head.weight[0], head.weight[1])
    assert not head(torch.randn(6, 4)).argmax(1).any()


def test_adding_a_class_changes_nothing_else():
    torch.manual_seed(0)
    head, x, support = NormalizedLinear(8, 5), torch.randn(11, 8), torch.randn(3, 8)
    before, columns = head(x), head.weight.detach().clone()
    assert head.add_class(support) == 5 == head.n_classes - 1
    assert torch.equal(head.weight[:5], columns)
    assert torch.equal(head(x)[:, :5], before)
    torch.testing.assert_close(head.weight[5], class_prototype(support))
    assert head.weight.requires_grad
    again = NormalizedLinear(**head.config)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(x), head(x))
    head.remove_class(2)
    assert torch.equal(head.weight, again.weight[[0, 1, 3, 4, 5]])
    double = NormalizedLinear(8, 2).double().requires_grad_(False)
    double.add_class(support)
    assert double.weight.dtype == torch.float64 and not double.weight.requires_grad


def test_gradients():
    torch.manual_seed(0)
    f = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = NormalizedLinear(5, 7).double()
    F.cross_entropy(head(f), torch.arange(9) % 7).backward()
    assert ((f * f.grad).sum(1).abs() < 1e-6 * f.norm(dim=1) * f.grad.norm(dim=1)).all()
    inner = (head.weight * head.weight.grad).sum(1).abs()
    assert (inner < 1e-6 * head.weight.grad.norm(dim=1)).all()  # along the sphere only
    assert set(dict(head.named_parameters())) == {"weight"}
    learned = NormalizedLinear(5, 7, learn_scale=True)
    F.cross_entropy(learned(f.float()), torch.arange(9) % 7).backward()
    assert learned.log_scale.grad.abs() > 0
    assert learned.scale == pytest.approx(10)


def test_loss_of_separate_classes_is_the_lowest():
    k = 10
    corners = F.normalize(torch.eye(k, dtype=torch.float64) - 1 / k, dim=1)
    head = head_with(corners).double()
    loss = F.cross_entropy(head(corners), torch.arange(k)).item()
    assert loss == pytest.approx(lowest_loss(k, 10.0), rel=1e-6)
    assert loss == pytest.approx(1.345e-4, rel=1e-3)
    assert lowest_loss(1000, 10.0) == pytest.approx(4.392e-2, rel=1e-3)
    assert lowest_loss(1000, 20.0) == pytest.approx(2.018e-6, rel=1e-3)


def test_projection_keeps_weights_at_length_one():
    model = fitted(constraint="project", epochs=2)
    torch.testing.assert_close(model.head.weight.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    torch.manual_seed(0)
    forward, x = NormalizedLinear(5, 4), torch.randn(6, 5)
    optimizer = torch.optim.Adam(forward.parameters(), 0.1)
    F.cross_entropy(forward(x), torch.arange(6) % 4).backward()
    optimizer.step()
    projected = head_with(forward.weight, constraint="project")
    projected.project_()
    torch.testing.assert_close(projected.weight.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(projected(x), forward(x))


def test_zero_is_of_no_class_and_has_a_finite_gradient():
    f = torch.zeros(2, 5, requires_grad=True)
    head = NormalizedLinear(5, 3)
    logits = head(f)
    assert torch.equal(logits, torch.zeros(2, 3))
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 100
    assert torch.equal(unit(f), torch.zeros(2, 5))


def test_joint_and_disjoint_classification_of_unseen_classes():
    model = fitted(epochs=20)
    x, y = groups(seed=1)
    known_before, state = model.logits(x), copy.deepcopy(model.encoder.state_dict())
    first, second = new_class(), -new_class()
    assert [model.add_class(first[:5]), model.add_class(second[:5])] == [3, 4]
    assert all(torch.equal(state[name], value) for name, value in model.encoder.state_dict().items())
    torch.testing.assert_close(model.logits(x)[:, :3], known_before)
    joint_x = torch.cat([x, first[5:], second[5:]])
    joint_y = torch.cat([y, torch.full((15,), 3), torch.full((15,), 4)])
    right = {known: model.predict(joint_x, known=known) == joint_y for known in ("weights", "prototypes")}
    assert right["prototypes"].float().mean() > 0.8
    assert right["weights"][len(x) :].float().mean() > 0.8
    assert right["weights"][: len(x)].sum() < right["prototypes"][: len(x)].sum()  # means draw samples of known classes
    head = model.disjoint([first[:5], second[:5]])
    assert head.n_classes == 2
    found = head(model.embed(joint_x[len(x) :])).argmax(1)
    assert (found == joint_y[len(x) :] - 3).float().mean() > 0.9
    before = model.logits(joint_x, "prototypes")
    model.remove_class(3)
    torch.testing.assert_close(model.logits(joint_x, "prototypes"), before[:, [0, 1, 2, 4]])


def test_predictions_of_a_row_do_not_depend_on_other_rows():
    model, (x, _) = fitted(), groups(seed=1)
    model.add_class(new_class())
    for known in ("weights", "prototypes"):
        whole = model.predict(x, known=known, threshold=0.5)
        assert torch.equal(model.predict(x[5:40], known=known, threshold=0.5), whole[5:40])


def test_prototypes_are_those_of_the_training_rows():
    model, (x, y) = fitted(), groups()
    expected = torch.stack([class_prototype(model.embed(x[y == k])) for k in range(3)])
    torch.testing.assert_close(unit(model.prototype_sum), expected)
    torch.testing.assert_close(model.logits(x, "prototypes"), 10 * model.embed(x) @ expected.T)
    model.set_prototypes([(x[:50], y[:50]), (x[50:], y[50:])])
    torch.testing.assert_close(unit(model.prototype_sum), expected)
    fresh = HypersphereClassifier(encoder(), 8, 3)
    with pytest.raises(ValueError, match=r"known: classes \[0, 1, 2\] have no prototype; call set_prototypes"):
        fresh.predict(x, known="prototypes")


def test_open_set_rows_are_of_no_class():
    model, (x, _) = fitted(epochs=20), groups(seed=1)
    cosine = model.logits(x).amax(1) / 10
    threshold = float(cosine.median())
    found = model.predict(x, threshold=threshold)
    assert torch.equal(found == -1, cosine < threshold)
    assert torch.equal(found[found >= 0], model.predict(x)[found >= 0])


def test_examples_are_embedded_in_evaluation_mode_and_the_mode_is_kept():
    model = fitted().train()
    model.encoder[3].eval()
    before = copy.deepcopy(model.state_dict())
    number = model.add_class(new_class())
    assert model.training and model.encoder[1].training and not model.encoder[3].training
    torch.testing.assert_close(model.head.weight[number], class_prototype(model.embed(new_class())))
    assert torch.equal(before["encoder.1.running_mean"], model.encoder[1].running_mean)
    with pytest.raises(RuntimeError):
        model.embed(torch.rand(3, 7))
    assert model.training and not model.encoder[3].training
    assert all(p.grad is None for p in model.parameters())


def test_same_seed_same_network_and_nothing_outside_changes():
    torch.manual_seed(5)
    expected = torch.rand(3)
    raw = encoder()
    before = copy.deepcopy(raw.state_dict())
    torch.manual_seed(5)
    first, second, other = (fit_hypersphere(raw, *groups(), epochs=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], value) for name, value in raw.state_dict().items())
    x = groups()[0]
    assert torch.equal(first(x), second(x)) and not torch.equal(first(x), other(x))
    assert not first.training and all(p.grad is None for p in first.parameters())


def test_round_trip_through_safetensors(tmp_path):
    model, x = fitted(learn_scale=True), groups()[0]
    model.add_class(new_class())
    assert model.config["n_classes"] == 4
    fresh = HypersphereClassifier(**{**model.config, "encoder": encoder()})
    loaded = classact.load(classact.save(model, tmp_path / "m"), fresh)
    for known in ("weights", "prototypes"):
        assert torch.equal(loaded.logits(x, known), model.logits(x, known))
    head = classact.load(classact.save(model.head, tmp_path / "head"), NormalizedLinear(**model.head.config))
    assert torch.equal(head(model.embed(x)), model.head(model.embed(x)))


def test_float32_logits_under_autocast():
    head, x = NormalizedLinear(6, 3), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits, rounded = head(x), head(x.bfloat16())
        model = HypersphereClassifier(encoder(), 8, 3)
        F.cross_entropy(model(x), torch.arange(5) % 3).backward()
    assert logits.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(logits, head(x))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bare
def test_compiles_and_exports():
    x = torch.randn(5, 6)
    for module in (NormalizedLinear(6, 3, learn_scale=True), HypersphereClassifier(encoder(), 8, 3).eval()):
        torch.compiler.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_lightning_module():
    from classact.discover.hypersphere_lit import HypersphereModule
    from classact.training import fit

    x, y = groups()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 40)
    torch.manual_seed(0)
    model = HypersphereClassifier(encoder(), 8, 3, constraint="project")
    history = fit(HypersphereModule(model, lr=1e-2), loader, loader, epochs=5, seed=0)
    assert history.curves["val_loss"][-1] < history.curves["val_loss"][0]
    torch.testing.assert_close(model.head.weight.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    model.set_prototypes(loader)
    assert (model.predict(x, known="prototypes") == y).float().mean() > 0.9


@pytest.mark.bare
def test_estimator_is_scikit_learns():
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(PrototypeClassifier())


def test_estimator_is_the_network_without_an_encoder():
    x, y = groups()
    model = PrototypeClassifier().fit(x.numpy(), y.numpy())
    network = HypersphereClassifier(nn.Identity(), 6, 3)
    network.set_prototypes([(x, y)])
    np.testing.assert_allclose(model.decision_function(x), network.logits(x, "prototypes"), atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(x), network.logits(x, "prototypes").softmax(1), atol=1e-6)
    np.testing.assert_array_equal(model.predict(x), network.predict(x, "prototypes"))


def test_estimator_takes_rows_and_classes_at_any_time():
    x, y = (tensor.numpy() for tensor in groups(classes=4))
    whole = PrototypeClassifier().fit(x, y)
    parts = PrototypeClassifier().partial_fit(x[y > 1], y[y > 1]).partial_fit(x[y == 0], y[y == 0])
    assert parts.classes_.tolist() == [0, 2, 3]
    parts.partial_fit(x[y == 1], y[y == 1])
    np.testing.assert_allclose(parts.prototypes_, whole.prototypes_)
    np.testing.assert_array_equal(parts.predict(x), whole.predict(x))
    parts.fit(x[:8], y[:8])
    assert not np.allclose(parts.prototypes_, whole.prototypes_)
    announced = PrototypeClassifier().partial_fit(x[:1], y[:1], classes=[0, 1, 2, 3])
    assert announced.classes_.tolist() == [0, 1, 2, 3]


def test_estimator_rejects_what_is_far_from_every_class():
    rows = np.eye(3)
    found = PrototypeClassifier(threshold=0.8).fit(rows[:2], [5, 7]).predict([[1, 0.1, 0], [0, 0.1, 1], [0, 0, 0]])
    assert found.tolist() == [5, -1, -1]
    named = PrototypeClassifier(threshold=0.8, unknown="none").fit(rows[:2], ["a", "b"])
    assert named.predict(rows).tolist() == ["a", "b", "none"]


def test_omniglot(real_data):
    from classact.data.omniglot import omniglot, omniglot_runs

    data = omniglot()
    assert data.images.shape == (4840, 28, 28) and data.images.dtype == np.float32
    assert len(data.alphabets) == 8 and data.character.max() == 241
    assert (np.bincount(data.character) == 20).all()
    assert all((np.sort(data.drawer[data.character == k]) == np.arange(1, 21)).all() for k in (0, 100, 241))
    assert all(len(set(data.alphabet[data.character == k])) == 1 for k in range(242))
    assert data.images.min() == 0 and data.images.max() == 1
    assert 0.02 < data.images.mean() < 0.2  # bright strokes on black
    runs = omniglot_runs()
    assert len(runs) == 20
    for run in runs:
        assert run.examples.shape == run.queries.shape == (20, 28, 28)
        assert sorted(run.labels) == list(range(20))


def test_omniglot_that_is_missing_or_broken(tmp_path, monkeypatch):
    import io
    import zipfile

    from PIL import Image

    from classact.data.bag_files import DataError
    from classact.data.omniglot import load_omniglot_zip, omniglot, omniglot_runs

    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    omniglot.cache_clear()
    for read in (omniglot, omniglot_runs):
        with pytest.raises(DataError, match=r"omniglot/.*\.zip: no such file; Omniglot .* goes there"):
            read()
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(DataError, match="expected a zip file"):
        load_omniglot_zip([tmp_path / "text.zip"])
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(DataError, match="expected drawings .* found none"):
        load_omniglot_zip([tmp_path / "empty.zip"])
    content = io.BytesIO()
    page = Image.new("1", (105, 105), 1)
    page.paste(0, (0, 0, 105, 52))
    page.save(content, "PNG")
    for name, alphabets in (("a.zip", ("B", "A")), ("b.zip", ("B", "C"))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for alphabet in alphabets:
                for drawer in (1, 2):
                    member = f"set/{alphabet}/character01/0001_{drawer:02d}.png"
                    archive.writestr(member, content.getvalue())
    data = load_omniglot_zip([tmp_path / "a.zip", tmp_path / "b.zip"], size=21)
    assert data.alphabets == ("A", "B", "C")
    assert data.alphabet.tolist() == data.character.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.drawer.tolist() == [1, 2] * 3
    assert data.images.shape == (6, 21, 21)
    assert data.images[0, 0].min() == 1 and data.images[0, -1].max() == 0


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalizedLinear(0, 2), "in_features, n_classes: expected at least 1 and at least 0, got 0, 2"),
        (lambda: NormalizedLinear(2, -1), "in_features, n_classes: expected .* got 2, -1"),
        (lambda: NormalizedLinear(2, 2, scale=0.0), "scale: expected a positive number, got 0.0"),
        (lambda: NormalizedLinear(2, 2, constraint="x"), "constraint: expected 'forward' or 'project', got 'x'"),
        (lambda: NormalizedLinear(2, 2)(torch.rand(3, 4)), r"x: expected shape \(N, 2\), got \(3, 4\)"),
        (lambda: NormalizedLinear(2, 2).add_class(torch.rand(3, 4)), r"embeddings: expected shape \(n, 2\), got"),
        (lambda: NormalizedLinear(2, 2).add_class(torch.rand(0, 2)), "expected shape .* with at least one row"),
        (lambda: NormalizedLinear(2, 2).remove_class(2), "k: expected a class from 0 to 1, got 2"),
        (lambda: class_prototype(torch.rand(0, 2)), r"embeddings: expected shape \(n, d\) with at least one row"),
        (lambda: lowest_loss(1, 10.0), "n_classes: expected at least 2, got 1"),
        (lambda: HypersphereClassifier(encoder(), 8, 3).add_class(torch.rand(0, 6)), "x: expected at least one input"),
        (lambda: HypersphereClassifier(encoder(), 8, 3).disjoint([]), "supports: expected examples of at least one"),
        (
            lambda: HypersphereClassifier(encoder(), 8, 3).predict(torch.rand(2, 6), known="x"),
            "known: expected 'weights",
        ),
        (
            lambda: HypersphereClassifier(encoder(), 8, 3).set_prototypes([(torch.rand(2, 6), torch.tensor([0, 3]))]),
            "y: expected classes from 0 to 2, got 0 to 3",
        ),
        (lambda: fit_hypersphere(encoder(), torch.rand(3, 6), torch.arange(4)), "x, y: expected equal numbers"),
        (lambda: fit_hypersphere(encoder(), torch.rand(3, 6), torch.arange(3) - 1), "y: expected classes from 0"),
        (lambda: fit_hypersphere(nn.Unflatten(1, (2, 3)), *groups()), r"encoder: expected features \(N, d\), got"),
        (lambda: PrototypeClassifier(scale=-1.0).fit(np.eye(2), [0, 1]), "scale: expected a positive number, got -1.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
