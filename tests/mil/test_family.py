"""What every model of the family must do."""

import pytest
import torch
from torch.nn import functional as F

import classact
from classact.mil import (
    ABMIL,
    ACMIL,
    CLAMSB,
    DSMIL,
    SCMIL,
    ACMILLoss,
    BagCrossEntropy,
    MambaMIL,
    MaxMIL,
    MeanMIL,
    MILOutput,
    MultiHeadABMIL,
    PooledLogistic,
    Standardized,
    Subsample,
    TransMIL,
)

MODELS = {
    "mean": lambda: MeanMIL(20, 3, dim=16),
    "max": lambda: MaxMIL(20, 3, dim=16),
    "abmil": lambda: ABMIL(20, 3, dim=16, hidden=8),
    "gated": lambda: ABMIL(20, 3, dim=16, hidden=8, gated=True, temperature=2.0),
    "heads": lambda: MultiHeadABMIL(20, 3, dim=16),
    "acmil": lambda: ACMIL(20, 3, dim=16, hidden=8),
    "acmil-mha": lambda: ACMIL(20, 3, dim=16, attention="mha"),
    "clam": lambda: CLAMSB(20, 3, dim=16, hidden=8),
    "dsmil": lambda: DSMIL(20, 3, dim=16, hidden=8),
    "transmil": lambda: TransMIL(20, 3, dim=16, heads=2, landmarks=4),
    "mambamil": lambda: MambaMIL(20, 3, dim=16, layers=1, state=4, rate=3),
    "scmil": lambda: SCMIL(20, 3, dim=16, hidden=8, projection=8),
    "lr-mean": lambda: PooledLogistic(20, 3, "mean"),
    "lr-max": lambda: PooledLogistic(20, 3, "max"),
    "bag-size": lambda: PooledLogistic(20, 3, "size"),
    "prevalence": lambda: PooledLogistic(20, 3, "none"),
    "wrapped": lambda: Standardized(Subsample(ABMIL(20, 3, dim=16), 0.5), torch.randn(20), torch.rand(20) + 0.5),
}
IN_ORDER = (TransMIL, MambaMIL)
NETWORKS = [name for name in MODELS if name not in ("lr-mean", "lr-max", "bag-size", "prevalence")]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    network = MODELS[request.param]().eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network


def padded():
    bags = [torch.randn(size, 20) for size in (4, 9, 1)]
    x = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=99.0)
    return bags, x, torch.arange(9) < torch.tensor([[4], [9], [1]])


def test_a_padded_batch_gives_what_its_bags_give(model):
    bags, x, mask = padded()
    output = model(x, mask)
    for i, bag in enumerate(bags):
        alone = model(bag[None])
        torch.testing.assert_close(output.logits[i], alone.logits[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention[i, : len(bag)], alone.attention[0], atol=1e-6, rtol=1e-5)
        assert (output.attention[i, len(bag) :] == 0).all()
        assert output.attention_logits[i, len(bag) :].isneginf().all()


def test_shuffling_a_bag_changes_no_logits_and_shuffles_the_attention(model):
    if isinstance(model, IN_ORDER):
        pytest.skip("depends on the order")
    x, order = torch.randn(2, 30, 20), torch.randperm(30)
    output, shuffled = model(x), model(x[:, order])
    torch.testing.assert_close(shuffled.logits, output.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(shuffled.attention, output.attention[:, order], atol=1e-6, rtol=1e-5)


def test_attention_is_the_softmax_of_its_logits_and_sums_to_one(model):
    output = model(*padded()[1:])
    torch.testing.assert_close(output.attention, output.attention_logits.softmax(-1))
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(3))


def test_embed_pool_head_is_forward(model):
    if isinstance(model, Standardized | PooledLogistic):
        pytest.skip("wraps another model, or has no embedding")
    _, x, mask = padded()
    z, attention_logits = model.pool(model.embed(x), mask)
    output = model(x, mask)
    torch.testing.assert_close(model.head(z), output.logits)
    torch.testing.assert_close(z, output.embedding)
    torch.testing.assert_close(attention_logits, output.attention_logits)


def test_round_trip_through_safetensors(model, tmp_path):
    file = classact.save(model, tmp_path / "m", {"classes": ["a", "b", "c"]})
    loaded = classact.load(file)
    _, x, mask = padded()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x, mask).logits, model(x, mask).logits)
    assert loaded.metadata == {"classes": ["a", "b", "c"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_autocast(name):
    model = MODELS[name]()
    _, x, mask = padded()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, mask)
        loss = (ACMILLoss() if "acmil" in name else BagCrossEntropy())(output, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(output.attention.float().sum(-1), torch.ones(3), atol=2e-2, rtol=0)


@pytest.mark.bare
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "transmil"])  # it takes padded bags one by one
def test_compiles_to_one_graph(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    _, x, mask = padded()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask).logits, model(x, mask).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.bare
def test_acmil_trains_compiled():
    model, loss = ACMIL(20, 3, dim=16).train(), ACMILLoss()
    step = torch.compile(lambda x, y: loss(model(x), y), backend="aot_eager", fullgraph=True)
    step(torch.randn(2, 30, 20), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.bare
@pytest.mark.parametrize("name", ["abmil", "heads", "acmil"])
def test_exports_with_any_number_of_instances(name):
    model = MODELS[name]().eval()
    k = torch.export.Dim("k", min=2, max=20_000)
    program = torch.export.export(model, (torch.randn(2, 12, 20),), dynamic_shapes=({1: k},))
    x = torch.randn(2, 31, 20)
    output = program.module()(x)
    torch.testing.assert_close(output.logits, model(x).logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.attention_logits, model(x).attention_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.bare
def test_output_survives_vmap():
    model = ABMIL(20, 3, dim=16).eval()
    x = torch.randn(4, 1, 6, 20)
    output = torch.vmap(model)(x)
    assert isinstance(output, MILOutput)
    torch.testing.assert_close(output.logits[:, 0], model(x[:, 0]).logits, atol=1e-6, rtol=1e-5)


def test_max_pooling_attention_is_the_share_of_maxima():
    model = MaxMIL(20, 2, dim=16)
    x = torch.randn(1, 5, 20)
    winners = model.embed(x)[0].argmax(0)
    torch.testing.assert_close(model(x).attention[0], torch.bincount(winners, minlength=5) / 16)


def test_cross_entropy_weighs_classes():
    output = MeanMIL(20, 3, dim=16)(torch.randn(4, 5, 20))
    target, weight = torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(BagCrossEntropy(weight)(output, target), F.cross_entropy(output.logits, target, weight))


def test_training_is_reproducible_and_keeps_the_best_epoch():
    from classact.data import digits_bags
    from classact.mil.lit import fit_bags, predict_bags

    bags = digits_bags(40)
    train, validation = bags.subset(range(28)), bags.subset(range(28, 40))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        fitted = fit_bags(
            ACMIL(64, 2, dim=8, hidden=8), ACMILLoss(), train, validation, seed=seed, epochs=6, lr=1e-2, batch_size=4
        )
        curve = fitted.history.curves["val_loss"]
        assert len(curve) == len(fitted.history.curves["train_loss"]) == 6
        assert fitted.history.best_epoch == curve.index(min(curve))
        predictions = predict_bags(fitted.model, validation)
        assert predictions.loss == pytest.approx(min(curve), abs=1e-5)
        results.append(predictions.logits)
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()


def test_training_resumes_from_its_checkpoint(tmp_path):
    from torch.utils.data import DataLoader

    from classact.data import collate_bags, digits_bags
    from classact.mil import LitMIL
    from classact.training import fit

    bags = digits_bags(16)

    def run(epochs, checkpoint):
        torch.manual_seed(0)
        module = LitMIL(ABMIL(64, 2, dim=8), lr=1e-2)
        loaders = [DataLoader(bags, batch_size=8, collate_fn=collate_bags) for _ in range(2)]
        return fit(module, *loaders, epochs=epochs, seed=0, checkpoint=checkpoint)

    run(2, tmp_path / "last.ckpt")
    resumed = run(5, tmp_path / "last.ckpt")
    assert len(resumed.curves["val_loss"]) == 5
    assert resumed.epochs == 5


@pytest.mark.bare
@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(3, 20), None, r"x: expected bags of shape \(N, K, 20\), got shape \(3, 20\)"),
        (torch.zeros(1, 3, 21), None, "x: this model was built for 20 features per instance, got 21"),
        (torch.zeros(1, 0, 20), None, "x: a bag needs at least one instance, got K = 0"),
        (torch.zeros(1, 3, 20, dtype=torch.long), None, "x: expected floating-point features, got torch.int64"),
        (torch.zeros(1, 3, 20), torch.ones(1, 3), r"mask: expected bool of shape \(1, 3\)"),
        (torch.zeros(1, 3, 20), torch.ones(1, 4, dtype=torch.bool), r"mask: expected bool of shape \(1, 3\)"),
    ],
)
def test_bad_bags(model, x, mask, message):
    with pytest.raises(ValueError, match=message):
        model(x, mask)


@pytest.mark.bare
def test_bad_settings():
    with pytest.raises(ValueError, match="in_dim: expected at least 1 feature, got 0"):
        ABMIL(0, 2)
    with pytest.raises(ValueError, match="n_classes: expected at least 2 classes, got 1"):
        ABMIL(20, 1)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        ABMIL(20, 2, temperature=0)
    with pytest.raises(ValueError, match="summary: expected none, size, mean or max, got 'sum'"):
        PooledLogistic(20, 2, "sum")


def test_importing_a_model_imports_neither_lightning_nor_extras():
    import subprocess
    import sys

    code = "import sys; from classact.mil import ACMIL; print([m for m in ('lightning','h5py','pandas') if m in sys.modules])"  # noqa: E501
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_loading_refuses_what_classact_does_not_export(tmp_path):
    import json

    file = classact.save(torch.nn.Linear(2, 2), tmp_path / "linear")
    with pytest.raises(ValueError, match=r"holds a torch.nn.modules.linear:Linear, which classact does not export"):
        classact.load(file)
    assert classact.load(file, torch.nn.Linear(2, 2)).weight.shape == (2, 2)
    description = tmp_path / "linear.json"
    for name in ("os.system", "classact.mil.eval", "classact.saving.load"):
        description.write_text(json.dumps({"class": name, "config": {}}))
        with pytest.raises(ValueError, match=r"does not export|has no class"):
            classact.load(file)
    description.unlink()
    with pytest.raises(FileNotFoundError, match=r"linear\.json: no such file; a saved model is"):
        classact.load(file)


def test_tied_and_non_contiguous_weights_are_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].weight.data = model[0].weight.data.t()
    file = classact.save(model, tmp_path / "tied")
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other[1].weight = other[0].weight
    x = torch.randn(2, 3)
    assert torch.equal(classact.load(file, other)(x), model(x))
