"""The task end to end on small data: no leakage, chance without signal, compositions, own methods, bad input."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import classact
from classact.data import BagDataset, digits_bags
from classact.data.bag_files import RawBag, Source
from classact.evidence.comparison import _Shared, refit_cell, run_cell
from classact.evidence.splits import make_splits
from classact.evidence.store import StudyError
from classact.evidence.tuning import draw_configurations
from classact.mil import ABMIL, ACMIL, MILOutput, Standardized
from classact.tasks.mil import METHODS, TASK, build, space

QUICK = {"epochs": 3, "lr": 1e-2, "batch_size": 8}


def bags_with(features, labels, groups=None, **options):
    sources = [Source(f"b{i:03d}", "memory", None, arrays=RawBag(x)) for i, x in enumerate(features)]
    ids = [source.id for source in sources]
    return BagDataset(sources, labels, ["neg", "pos"], groups or ids, **options)


def planted(n=60, shift=2.0, seed=0):
    """Positive bags hold two shifted instances among noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    features = [rng.normal(size=(rng.integers(4, 9), 5)).astype(np.float32) for _ in labels]
    for x, label in zip(features, labels, strict=True):
        x[:2, 0] += shift * label
    return features, labels


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("method", ["acmil+aem", "lr-mean", "max"])
def test_labels_of_the_test_part_change_no_model_threshold_or_prediction(method, tuned):
    features, labels = planted()
    data = bags_with(features, labels)
    split = make_splits(labels, data.groups, 4, 1, 0)[1]
    other = labels.copy()
    other[split.test] = np.random.default_rng(0).permutation(other[split.test])
    assert (other != labels).any()
    found = []
    for y in (labels, other):
        draws = draw_configurations(space(method), 3, 0, {}, QUICK) if tuned else []
        shared = _Shared(TASK, {"": bags_with(features, y)}, {}, QUICK, configurations={method: draws})
        values, arrays = run_cell(shared, method, split)
        weights = refit_cell(shared, method, split)[1]["safetensors"].tobytes()
        assert arrays["safetensors"].tobytes() == weights  # the model of the fold is the one that predicted
        kept = ("threshold", "temperature", "best_epoch", "chosen", "deletion", "insertion")
        scores = [of.tobytes() for name, of in arrays.items() if name.startswith(("score:", "validation"))]
        found.append(([values.get(k) for k in kept], arrays["probabilities"].tobytes(), weights, scores))
    assert found[0] == found[1]


@pytest.mark.bare
def test_shuffled_labels_give_chance_for_every_method():
    """Mean over three shuffles, two of them tuned; its standard error is about 0.04, and a leak gives values near 1."""
    alike = {"bimamba", "mamba"}  # the network of mambamil with one order less
    methods = [m for m in METHODS if m not in alike] + ["acmil+aem", "abmil+subsample", "mhim(abmil)"]
    options = {"epochs": 3, "lr": 1e-2, "batch_size": 16}
    settings = {"transmil": {"dim": 8, "heads": 1}, "mambamil": {"dim": 8, "layers": 1, "state": 2}}
    found = []
    for seed in range(3):
        features, labels = planted(n=80, shift=3.0, seed=seed)
        data = bags_with(features, np.random.default_rng(seed).permutation(labels))
        draws = {m: draw_configurations(space(m), 2, seed, settings, options) for m in methods} if seed else {}
        shared = _Shared(replace(TASK, explain=None), {"": data}, settings, options, configurations=draws)
        splits = make_splits(data.labels, data.groups, 2, 1, seed)
        found.append([np.mean([run_cell(shared, m, split)[0]["auc"] for split in splits]) for m in methods])
    mean = pd.Series(np.mean(found, axis=0), methods)
    assert mean.between(0.37, 0.62).all(), mean
    assert 0.42 < mean.mean() < 0.57


def test_a_feature_that_encodes_the_patient_gives_no_gain_under_grouping(tmp_path):
    rng = np.random.default_rng(2)
    labels = np.repeat(rng.permutation(np.arange(20) % 2), 4)
    identity = rng.normal(size=(20, 8)).repeat(4, axis=0) * 3
    features = [np.tile(code, (3, 1)).astype(np.float32) for code in identity]
    patients = [f"p{i // 4}" for i in range(80)]
    grouped, leaking = (
        classact.compare(
            "mil",
            bags_with(features, labels, groups),
            ["mean"],
            out=tmp_path / name,
            options={"epochs": 15, "lr": 1e-2, "batch_size": 8},
            folds=4,
            quiet=True,
        )
        for name, groups in (("grouped", patients), ("leaking", None))
    )
    assert leaking.table.loc["mean", "auc"] > 0.9
    assert grouped.table.loc["mean", "auc"] < 0.75
    assert grouped.by_group
    assert {"group_auc", "group_macro_f1"} <= set(grouped.table.columns)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "report"
    return classact.compare(
        "mil",
        digits_bags(60),
        ["abmil", "abmil+aem"],
        out=folder,
        folds=3,
        repeats=2,
        options=QUICK,
        settings={"aem": {"weight": 0.05}},
        quiet=True,
        command="classact compare mil digits",
    )


def test_the_table(report):
    table = report.table
    assert list(table.index) == ["abmil", "abmil+aem", *TASK.controls]
    assert table.loc["prevalence", "auc"] == 0.5
    assert np.isnan(table.loc["abmil", "auc_difference"])
    rest = table.drop("abmil")
    assert (rest["auc_difference_low"] <= rest["auc_difference"]).all()
    assert (rest["p_holm"] >= rest["p"]).all()
    assert table.loc["abmil", "instance_auc"] > 0.5
    expected = table.loc["lr-max", "auc"] - table.loc["abmil", "auc"]
    assert table.loc["lr-max", "auc_difference"] == pytest.approx(expected)


def test_pooled_metrics_are_scikit_learns(report):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    predictions = report.predictions("abmil")
    for name, metric in (
        ("macro_f1", lambda y, p: f1_score(y, p, average="macro")),
        ("balanced_accuracy", balanced_accuracy_score),
        ("accuracy", accuracy_score),
    ):
        by_repeat = [metric(part["label"], part["predicted"]) for _, part in predictions.groupby("repeat")]
        assert report.table.loc["abmil", name] == pytest.approx(np.mean(by_repeat))


def test_the_report_folder(report):
    folder = report.folder
    expected = {"report.html", "results.csv", "table.tex", "table.txt", "predictions.csv", "comparison.json"}
    expected |= {"folds.png", "curves.png", "instance_scores.h5", "models", "cells", "study.json"}
    assert expected <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob("*.part"))
    results = pd.read_csv(folder / "results.csv")
    aucs = results[(results.method == "abmil") & (results.metric == "auc")]["value"]
    assert aucs.mean() == pytest.approx(report.table.loc["abmil", "auc"])
    predictions = pd.read_csv(folder / "predictions.csv")
    assert len(predictions) == 60 * 2 * len(report.methods)
    page = (folder / "report.html").read_text()
    assert "classact compare mil digits" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert len(page) < 5_000_000
    assert r"\begin{tabular}" in (folder / "table.tex").read_text()
    content = json.loads((folder / "comparison.json").read_text())
    assert content["definition"]["settings"] == {"aem": {"weight": 0.05}}


def test_instance_scores_are_out_of_fold_attention(report):
    with h5py.File(report.folder / "instance_scores.h5") as file:
        assert set(file) == set(report.ids)
        for name, bag in zip(report.ids, digits_bags(60), strict=True):
            scores = file[name]["abmil"]
            assert scores["attention"].shape == (len(bag.x),)
            assert float(scores["attention"][()].sum()) == pytest.approx(1, abs=1e-5)
            assert scores["attention x class logit"].shape == (len(bag.x), 2)
            assert not set(TASK.controls) & set(file[name])  # they look at no instance


def test_the_refitted_model_comes_back(report):
    for method, kind in (("abmil+aem", ABMIL), ("lr-mean", None)):
        model = classact.load(report.folder / "models" / method)
        assert model.metadata["classes"] == ["no 9", "has a 9"]
        assert 0 <= model.metadata["threshold"] <= 1
        assert kind is None or isinstance(model, kind)
        probabilities = TASK.score(model, digits_bags(60).subset(range(60))).probabilities
        assert probabilities.shape == (60, 2)


def test_again_changes_nothing_and_a_damaged_cell_is_mended(report, capsys):
    before = (report.folder / "results.csv").read_bytes()
    cell = next((report.folder / "cells").glob("abmil.r0*.npz"))
    cell.write_bytes(b"damaged")
    classact.compare(
        "mil", digits_bags(60), ["abmil", "abmil+aem"], out=report.folder, folds=3, repeats=2, options=QUICK,
        settings={"aem": {"weight": 0.05}}, quiet=True,
    )  # fmt: skip
    assert "cell abmil.r0" in capsys.readouterr().err
    assert (report.folder / "results.csv").read_bytes() == before


def test_another_study_in_the_folder(report):
    with pytest.raises(StudyError, match=r"holds another study \(.*choose another --out"):
        classact.compare("mil", digits_bags(60), ["abmil"], out=report.folder, folds=4, quiet=True)


def test_workers_give_the_same_results(report, tmp_path):
    other = classact.compare(
        "mil", digits_bags(60), ["abmil", "abmil+aem"], out=tmp_path / "two", folds=3, repeats=2, options=QUICK,
        settings={"aem": {"weight": 0.05}}, workers=2, quiet=True,
    )  # fmt: skip
    pd.testing.assert_frame_equal(other.table, report.table)
    assert (tmp_path / "two" / "results.csv").read_bytes() == (report.folder / "results.csv").read_bytes()


def test_one_class_folds_are_counted(tmp_path):
    features, _ = planted(n=24)
    labels = np.array([1, 1] + [0] * 22)
    report = classact.compare(
        "mil", bags_with(features, labels), ["mean"], out=tmp_path, folds=4, options=QUICK, quiet=True
    )
    assert report.table.loc["mean", "folds_without_auc"] == 2
    assert any("2 of 4 test parts lack a class" in line for line in report.summary)


def test_one_epoch_is_enough_for_a_report(tmp_path):
    features, labels = planted(n=20)
    options = {**QUICK, "epochs": 1}
    classact.compare("mil", bags_with(features, labels), ["mean"], out=tmp_path, folds=2, options=options, quiet=True)
    assert (tmp_path / "report.html").exists()


def test_three_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = [(rng.normal(size=(5, 4)) + 2 * np.eye(4)[y]).astype(np.float32) for y in labels]
    sources = [Source(f"b{i}", "memory", None, arrays=RawBag(x)) for i, x in enumerate(features)]
    data = BagDataset(sources, labels, ["a", "b", "c"], [s.id for s in sources])
    report = classact.compare(
        "mil", data, ["abmil"], out=tmp_path, folds=3, options={**QUICK, "class_weight": "balanced"}, quiet=True
    )
    assert report.table.loc["lr-mean", "auc"] > 0.9
    assert {"p(a)", "p(b)", "p(c)"} <= set(report.predictions("abmil").columns)


def test_given_splits_and_settings_from_the_library(tmp_path):
    import json as j

    features, labels = planted(n=40)
    data = bags_with(features, labels)
    for i in range(2):
        test = data.ids[i * 10 : i * 10 + 10]
        train = [name for name in data.ids if name not in test]
        (tmp_path / f"split_{i}.json").write_text(j.dumps({"train_names": train, "val_names": [], "test_names": test}))
    report = classact.compare("mil", data, ["mean"], out=tmp_path / "out", splits=tmp_path, options=QUICK, quiet=True)
    assert len(report.cuts) == 2
    assert report.cuts[0].test.tolist() == list(range(10))


def test_standardisation_uses_the_training_bags_only():
    features, labels = planted()
    features = [np.concatenate([x, np.full((len(x), 1), 7.0)], 1).astype(np.float32) for x in features]
    data = bags_with(features, labels, tabular=True)
    fit = build("mean", {}, QUICK)
    model = fit(data.subset(range(30)), data.subset(range(30, 40)), seed=0, device="cpu")
    assert isinstance(model, Standardized)
    rows = np.concatenate(features[:30])
    np.testing.assert_allclose(model.mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(model.scale[:5], rows[:, :5].std(0), rtol=1e-4)
    assert model.scale[5] == 1
    assert not isinstance(
        build("mean", {}, {**QUICK, "standardize": False})(data.subset(range(30)), data.subset(range(30, 40)), seed=0),
        Standardized,
    )


def test_logistic_controls_are_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = planted()
    data = bags_with(features, labels)
    train, validation, test = data.subset(range(30)), data.subset(range(30, 45)), data.subset(range(45, 60))
    model = build("lr-mean", {}, {})(train, validation, seed=0)
    means = np.stack([x.mean(0) for x in features]).astype(float)
    candidates = []
    for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        candidates.append(pipeline.fit(means[:30], labels[:30]).predict_proba(means[45:]))
    found = TASK.score(model, test).probabilities
    assert min(np.abs(found - p).max() for p in candidates) < 1e-4
    prevalence = build("prevalence", {}, {})(train, validation, seed=0)
    np.testing.assert_allclose(TASK.score(prevalence, test).probabilities[:, 1], labels[:30].mean(), atol=1e-6)


class OwnModel(torch.nn.Module):
    """What a user's method looks like."""

    def __init__(self, in_dim, n_classes, width=4):
        super().__init__()
        self.in_dim = in_dim
        self.linear = torch.nn.Linear(in_dim, n_classes)

    def forward(self, x, mask=None, coords=None):
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        attention = torch.zeros(x.shape[:2]).masked_fill(~mask, -torch.inf)
        z = (attention.softmax(-1).unsqueeze(-1) * x).sum(1)
        return MILOutput(self.linear(z), attention, z)


class Deaf(OwnModel):
    def forward(self, x, mask=None, coords=None):
        return super().forward(x, None, coords)


class Shapeless(OwnModel):
    def forward(self, x, mask=None, coords=None):
        return super().forward(x, mask, coords)._replace(logits=torch.zeros(1))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("hospital_models")
    module.OwnModel, module.Deaf, module.Shapeless = OwnModel, Deaf, Shapeless
    monkeypatch.setitem(sys.modules, "hospital_models", module)


def test_a_users_own_method_enters_beside_ours(own_module, tmp_path):
    features, labels = planted()
    report = classact.compare(
        "mil", bags_with(features, labels), ["abmil", "hospital_models:OwnModel+aem"], out=tmp_path, folds=3,
        options=QUICK, settings={"hospital_models:OwnModel": {"width": 9}}, quiet=True,
    )  # fmt: skip
    assert report.table.loc["hospital_models:OwnModel+aem", "auc"] > 0.5
    with pytest.raises(ValueError, match=r"which classact does not export; build one and pass it as load\(path, model"):
        classact.load(tmp_path / "models" / "hospital_models_OwnModel+aem")
    model = classact.load(tmp_path / "models" / "hospital_models_OwnModel+aem", OwnModel(5, 2))
    assert model.metadata["method"] == "hospital_models:OwnModel+aem"


def test_cells_of_an_edited_method_are_not_used_again(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    source = "from classact.mil import MeanMIL\n\nclass Mine(MeanMIL):\n    pass\n"
    (tmp_path / "edited_method.py").write_text(source)
    features, labels = planted(n=20)

    def run():
        return classact.compare(
            "mil", bags_with(features, labels), ["edited_method:Mine"], out=tmp_path / "out", folds=2, options=QUICK,
            quiet=True,
        )  # fmt: skip

    run()
    run()
    (tmp_path / "edited_method.py").write_text(source + "    width = 3\n")
    importlib.invalidate_caches()
    with pytest.raises(StudyError, match="holds another study .own code.edited_method: there"):
        run()


def test_a_method_with_a_training_step_of_its_own(monkeypatch, tmp_path):
    """As CONTRIBUTING.md says: a function ``fit(train, validation, *, seed, device)`` in METHODS."""

    def fit(train, validation, *, seed, device, epochs=1, scale=1.0):
        assert (epochs, scale) == (QUICK["epochs"], 2.0)
        return METHODS["lr-mean"](train, validation, seed=seed, device=device)

    monkeypatch.setitem(METHODS, "own-step", fit)
    features, labels = planted(n=24)
    settings = {"own-step": {"scale": 2.0}}
    report = classact.compare(
        "mil", bags_with(features, labels), ["own-step"], out=tmp_path, folds=2, options=QUICK, settings=settings,
        quiet=True,
    )  # fmt: skip
    assert report.table.loc["own-step", "auc"] == report.table.loc["lr-mean", "auc"]
    with pytest.raises(StudyError, match="own-step is not a network trained by the plain step"):
        build("own-step+aem", {}, {})
    with pytest.raises(StudyError, match=r"--set own-step.scal: .*did you mean scale"):
        build("own-step", {"own-step": {"scal": 1}}, {})


@pytest.mark.bare
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("abmli", {}, "no method 'abmli'; did you mean abmil"),
        ("acmil+eam", {}, r"acmil\+eam: no method 'eam'; did you mean aem\?"),
        ("lr-mean+aem", {}, r"lr-mean\+aem: lr-mean is not a network trained by the plain step, and takes no parts"),
        (
            "acmil",
            {"acmil": {"brnches": 3}},
            r"--set acmil.brnches: acmil has no such setting; did you mean branches\?",
        ),
        ("acmil", {"acmil": {"branches": 0}}, "--set acmil: branches: expected at least 1, got 0"),
        ("abmil+aem", {"aem": {"weight": -1.0}}, "--set aem: weight: a negative weight"),
        ("abmil", {"amcil": {"lr": 1}}, "--set amcil.…: no method 'amcil'; did you mean acmil"),
        ("mhim(abmil", {}, r"mhim\(abmil: expected a method, method\+part, or mhim\(method\)\+part"),
        ("aem(abmil)", {}, r"aem\(abmil\): expected a method"),
        ("mhim(mhim)", {}, r"no method 'mhim'"),
        ("mhim(lr-mean)", {}, "lr-mean is not a network trained by the plain step"),
        ("mhim(abmil)", {"mhim": {"hihg": 0.1}}, r"--set mhim.hihg: mhim has no such setting; did you mean high\?"),
        ("mhim(abmil)", {"mhim": {"high": 2.0}}, r"--set mhim: high: expected a part in \[0, 1\], got 2.0"),
        ("logit-adjusted-abmil", {"logit-adjusted-abmil": {"class_counts": 3}}, "has no such setting"),
        ("nowhere:Model", {}, "nowhere:Model: cannot be imported"),
        ("hospital_models:Deaf", {}, "attention logits must be -inf where mask is False"),
        ("hospital_models:Shapeless", {}, r"got logits and attention logits of shapes .*expected \(2, 2\), \(2, 3\)"),
    ],
)
def test_methods_and_settings_that_do_not_fit(name, settings, message, own_module):
    with pytest.raises(StudyError, match=message):
        build(name, settings, {})


def test_nothing_is_written_before_the_input_is_known_to_be_good(tmp_path):
    features, labels = planted(n=12)
    features[3][1, 1] = np.nan
    for methods, options in ((["nope"], {}), (["mean"], {"folds": 13}), (["mean"], {})):
        with pytest.raises(Exception, match=r"no method 'nope'|cannot be cut into 13|nan at instance 1"):
            classact.compare("mil", bags_with(features, labels), methods, out=tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_composition_trains_with_every_term():
    features, labels = planted()
    data = bags_with(features, labels)
    fit = build("acmil+aem+subsample", {"aem": {"weight": 5.0}, "acmil": {"branches": 3}}, QUICK)
    plain = build("acmil+subsample", {"acmil": {"branches": 3}}, QUICK)
    models = [f(data.subset(range(40)), data.subset(range(40, 60)), seed=0) for f in (fit, plain)]
    assert isinstance(models[0].network, ACMIL)
    x = torch.from_numpy(features[0])[None]
    assert models[0](x).branch_logits.shape == (1, 3, 2)
    assert not torch.equal(models[0](x).logits, models[1](x).logits)


def test_mhim_trains_any_method_with_any_part(own_module, tmp_path):
    features, labels = planted()
    names = ["mhim", "mhim(acmil)+aem", "mhim(dsmil+aem)", "mhim(hospital_models:OwnModel)"]
    settings = {"mhim": {"high": 0.3, "student_init": "none"}}
    report = classact.compare(
        "mil", bags_with(features, labels), ["mean", *names], out=tmp_path, folds=2, options=QUICK, settings=settings,
        quiet=True,
    )  # fmt: skip
    assert set(names) <= set(report.table.index)
    assert "hospital_models" in report.definition["own code"]
    assert classact.load(tmp_path / "models" / "mhim(acmil)+aem").metadata["method"] == "mhim(acmil)+aem"


def test_mhim_counts_the_baseline_among_the_epochs():
    features, labels = planted()
    data = bags_with(features, labels)
    train, validation = data.subset(range(40)), data.subset(range(40, 60))
    plain = build("abmil", {}, {**QUICK, "epochs": 6, "patience": None})(train, validation, seed=0)
    student = build("mhim(abmil)", {}, {**QUICK, "epochs": 6, "patience": None})(train, validation, seed=0)
    assert (plain.history.epochs, student.history.epochs) == (6, 3)


@pytest.mark.bare
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"prevalence", "bag-size", "lr-mean", "lr-max"}))
def test_every_method_fits_and_predicts(name):
    features, labels = planted(n=24)
    data = bags_with(features, labels)
    options = {"epochs": 1, "lr": 1e-2, "batch_size": 8}
    model = build(name, {}, options)(data.subset(range(16)), data.subset(range(16, 24)), seed=0)
    score = TASK.score(model, data.subset(range(24)))
    assert score.probabilities.shape == (24, 2)
    np.testing.assert_allclose(score.probabilities.sum(1), 1, atol=1e-5)
    for bag, attention in zip(data, score.instance_scores["attention"], strict=True):
        assert len(attention) == len(bag.x)
        assert attention.sum() == pytest.approx(1, abs=1e-4)


def test_losses_learn_the_class_counts_of_the_training_bags(monkeypatch):
    from classact.tasks import mil

    seen = []
    original = mil.LogitAdjustment
    features, labels = planted(n=30)
    data = bags_with(features, labels)

    def spy(class_counts, tau=1.0, class_weight=None):
        seen.append(list(class_counts))
        return original(class_counts, tau, class_weight)

    fit = mil.partial(mil.fit_plain, mil.MeanMIL, spy)
    fit(data.subset(range(20)), data.subset(range(20, 30)), seed=0, epochs=1)
    assert seen == [np.bincount(labels[:20], minlength=2).tolist()]


@pytest.mark.bare
def test_the_last_weights_are_kept_where_validation_means_little():
    features, labels = planted(n=30)
    data = bags_with(features, labels)
    model = build("scmil", {}, {"epochs": 4, "lr": 1e-2})(data.subset(range(20)), data.subset(range(20, 30)), seed=0)
    assert "val_loss" not in model.history.curves
    assert model.history.epochs == 4


def test_the_table_says_when_the_order_of_instances_is_unknown(tmp_path):
    from classact.evidence.report import plain_table

    features, labels = planted(n=24)
    with_coords = [np.indices((1, len(x)))[::-1].reshape(2, -1).T.astype(np.float32) for x in features]
    for coords, remark in ((None, "order unknown"), (with_coords, "")):
        sources = [
            Source(f"b{i}", "memory", None, arrays=RawBag(x, None if coords is None else coords[i]))
            for i, x in enumerate(features)
        ]
        data = BagDataset(sources, labels, ["a", "b"], [s.id for s in sources])
        report = classact.compare(
            "mil", data, ["mamba", "transmil", "mean"], out=tmp_path / (remark or "known"), folds=2,
            options={"epochs": 1, "batch_size": 8}, settings={"transmil": {"dim": 8}, "mamba": {"dim": 8}}, quiet=True,
        )  # fmt: skip
        assert report.table["remark"].to_dict()["mamba"] == remark
        assert report.table["remark"].to_dict()["transmil"] == "order as stored"
        assert ("mamba (order unknown)" in plain_table(report)) == bool(remark)
        assert "transmil (order as stored)" in plain_table(report)
