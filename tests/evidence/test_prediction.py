"""Predictions of saved models: nothing is fitted, one bag is in memory, and what differs from the training is said."""

import json
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import classact
from classact.data import digits_bags, open_bags
from classact.data.bag_files import DataError, Source
from classact.data.check import check_bags
from classact.evidence import prediction
from classact.evidence.figures import new_figure
from classact.evidence.instance_scores import read_items
from classact.evidence.metrics import calibrate
from classact.evidence.prediction import FILES, open_models, predict_items
from classact.evidence.statistics import bootstrap_groups
from classact.evidence.store import StudyError
from classact.evidence.validation import bootstrap_ranking, validate, weighted_ranking
from classact.mil import ABMIL
from classact.mil.lit import predict_bags

CLASSES = ["no 9", "has a 9"]
METADATA = {
    "task": "mil",
    "method": "abmil",
    "classes": CLASSES,
    "threshold": 0.4,
    "temperature": 1.5,
    "target_sensitivity": None,
    "in_dim": 64,
    "provenance": {"encoder": "uni", "patch_size": 512.0, "magnification": 20.0, "unit": "pixel"},
    "trained_on": "digits",
    "fold": None,
    "internal": {"auc": [0.97, 0.92, 1.0], "auprc": None},
}


@pytest.fixture
def drawn():
    """Marks tests whose pages have their figure; it takes most of the time."""


@pytest.fixture(autouse=True)
def _quick(request, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLASSACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(prediction, "_figure_of", lambda *_: new_figure(1, 1))


class Score(NamedTuple):
    probabilities: np.ndarray
    instance_scores: dict


def score(model, items, device):
    found = predict_bags(model, items, device)
    attention = [logits.softmax(-1).numpy() for logits in found.attention_logits]
    return Score(found.probabilities, {"attention": attention, "twice": [np.stack([a, -a], 1) for a in attention]})


TASK = SimpleNamespace(name="mil", unit="bag", load=open_bags, check=check_bags, score=score)


def save(path, seed=0, **metadata):
    torch.manual_seed(seed)
    model = ABMIL(64, len(metadata.get("classes", CLASSES)), dim=4)
    with torch.no_grad():  # decisions of both kinds
        model.classifier.weight.mul_(20)
        logits = predict_bags(model, digits_bags(24)).logits
        model.classifier.bias.sub_(torch.from_numpy(np.median(logits, 0)))
    classact.save(model, path, {**METADATA, **metadata})


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """Folder of 24 bags, and their labels by name; a patient is three bags."""
    folder = tmp_path_factory.mktemp("bags")
    data = digits_bags(24)
    for i, name in enumerate(data.ids):
        raw = data.read(i)
        np.savez(folder / f"{name}.npz", features=raw.features, coords=np.arange(2 * len(raw.features)).reshape(-1, 2))
    return folder, {name: CLASSES[k] for name, k in zip(data.ids, data.labels, strict=True)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report folder with the models of three folds, one fitted on everything, and a second method without folds."""
    folder = tmp_path_factory.mktemp("report")
    for k in range(3):
        save(folder / "models" / "abmil.folds" / str(k), k, threshold=0.3 + 0.1 * k, temperature=1 + k / 2, fold=k)
    save(folder / "models" / "abmil", 7)
    save(folder / "models" / "mean", 8, method="mean")
    index = {"best": "abmil", "methods": {"abmil": "abmil", "mean": "mean"}}
    (folder / "models" / "index.json").write_text(json.dumps(index))
    return folder


def labels_file(path, labels, patients=True):
    rows = [
        {"slide_id": name, "label": label, **({"case_id": f"p{int(name[3:]) // 4}"} if patients else {})}
        for name, label in labels.items()
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def run(report, data, *args, models=None, **options):
    return predict_items(TASK, models or open_models(report), data, *args, quiet=True, **options)


def test_an_ensemble_is_the_mean_of_calibrated_probabilities_at_the_mean_threshold(report, bags, tmp_path, drawn):
    found = run(report, bags[0], out=tmp_path / "all")
    models = open_models(report)
    assert [model.metadata["fold"] for model in models] == [0, 1, 2]
    data = open_bags(bags[0], training=False)
    raw = [predict_bags(model, data) for model in models]
    p = np.stack([calibrate(of.probabilities, 1 + k / 2) for k, of in enumerate(raw)]).mean(0)
    assert np.array_equal(found.table[[f"p({c})" for c in CLASSES]], p)
    assert found.threshold == pytest.approx(0.4) and (found.table["threshold"] == found.threshold).all()
    assert (found.table["predicted"] == np.array(CLASSES)[(p[:, 1] >= found.threshold).astype(int)]).all()
    sd = np.std([calibrate(of.probabilities, 1 + k / 2)[:, 1] for k, of in enumerate(raw)], axis=0, ddof=1)
    assert np.allclose(found.table["p_sd"], sd)
    decisions = [calibrate(of.probabilities, 1 + k / 2)[:, 1] >= 0.3 + 0.1 * k for k, of in enumerate(raw)]
    split = {data.ids[i] for i in range(24) if len({bool(d[i]) for d in decisions}) > 1}
    assert set(found.disagreeing) == split and 0 < len(split) < 24

    written = pd.read_csv(tmp_path / "all" / "predictions.csv")
    assert list(written) == ["id", "group", "predicted", "threshold", *(f"p({c})" for c in CLASSES), "p_sd"]
    assert np.array_equal(written[f"p({CLASSES[1]})"], p[:, 1])
    with h5py.File(tmp_path / "all" / "instance_scores.h5") as file:
        assert read_items(file) == data.ids and list(file.attrs["classes"]) == CLASSES
        node = file[data.ids[3]]["abmil"]
        weights = np.mean([of.attention_logits[3].softmax(-1).numpy() for of in raw], axis=0)
        assert np.allclose(node["attention"], weights) and node["attention"][:].sum() == pytest.approx(1)
        assert node["twice"].shape == (len(weights), 2)
        assert np.array_equal(node.attrs["probabilities"], p[3])
        assert np.array_equal(file[data.ids[3]]["coords"], data.read(3).coords)
    text = "\n".join(found.lines())
    assert "24 bags predicted by 3 models of abmil" in text and f"decide differently on {len(split)} of 24" in text
    assert found.notes == ["Encoder, magnification, patch size: not recorded in these data, not checked."]
    assert len(found.metrics) == 0 and not (tmp_path / "all" / "metrics.csv").exists()
    page = (tmp_path / "all" / "report.html").read_text()
    assert "Where the models differ most" in page and len(page) < 1e6 and "http" not in page
    assert json.loads((tmp_path / "all" / "prediction.json").read_text())["metrics"] == []


def test_one_model(report, bags, tmp_path):
    one = run(report, bags[0], out=tmp_path / "a", models=open_models(report / "models" / "abmil.safetensors"))
    same = run(report, bags[0], out=tmp_path / "b", models=open_models(report, refit=True))
    assert one.table.equals(same.table) and one.members == 1
    assert one.table["p_sd"].isna().all() and one.disagreeing == []
    assert open_models(report / "models" / "abmil.folds" / "1")[0].metadata["fold"] == 1


def test_which_models_there_are(report, bags, tmp_path):
    with pytest.raises(StudyError, match="no model of 'clam'; there are abmil, mean"):
        open_models(report, "clam")
    with pytest.raises(StudyError, match="no fold models of mean; take the one .* --refit"):
        open_models(report, "mean")
    with pytest.raises(StudyError, match="--method and --refit choose among the models of a report folder"):
        open_models(report / "models" / "abmil", "abmil")
    with pytest.raises(StudyError, match="expected a report folder"):
        open_models(bags[0])
    with pytest.raises(FileNotFoundError, match="no such file; a saved model is"):
        open_models(tmp_path / "nothing")
    classact.save(ABMIL(64, 2), tmp_path / "bare")
    with pytest.raises(StudyError, match="nothing says its task, method, classes"):
        open_models(tmp_path / "bare")
    save(tmp_path / "other", classes=CLASSES[::-1])
    other = open_models(tmp_path / "other")
    with pytest.raises(StudyError, match="the same classes in the same order"):
        run(report, bags[0], models=[*open_models(report), *other], out=tmp_path / "pred")


def test_labels_of_the_truth_change_no_prediction(report, bags, tmp_path):
    labels = bags[1]
    shuffled = dict(zip(labels, np.random.default_rng(0).permutation(list(labels.values())), strict=True))
    assert shuffled != labels
    files, scores = [], []
    for name, of in (("a", labels), ("b", shuffled)):
        out = tmp_path / name
        found = run(report, bags[0], labels_file(tmp_path / f"{name}.csv", of), out=out)
        assert found.table["label"].tolist() == list(of.values())
        files.append(pd.read_csv(out / "predictions.csv", dtype=str).drop(columns="label").to_csv())
        with h5py.File(out / "instance_scores.h5") as file:
            assert {i: file[i].attrs["label"] for i in read_items(file)} == of
            nodes = [file[i]["abmil"] for i in read_items(file)]
            scores.append([(n.attrs["predicted"], *n.attrs["probabilities"], *n["attention"]) for n in nodes])
    assert files[0] == files[1] and scores[0] == scores[1]
    unlabelled = run(report, bags[0], out=tmp_path / "c").table
    assert np.array_equal(unlabelled[f"p({CLASSES[1]})"], found.table[f"p({CLASSES[1]})"])


def test_external_validation(report, bags, tmp_path, drawn):
    folder, labels = bags
    found = run(report, folder, labels_file(tmp_path / "l.csv", labels), out=tmp_path / "pred", command="the command")
    y = np.array([CLASSES.index(label) for label in labels.values()])
    p = found.table[f"p({CLASSES[1]})"].to_numpy()
    per_bag = found.metrics[found.metrics["level"] == "bag"].set_index("metric")
    assert per_bag["external"]["auc"] == roc_auc_score(y, p)
    assert per_bag["external"]["auprc"] == average_precision_score(y, p)
    assert per_bag["external"]["brier"] == pytest.approx(((p - y) ** 2).mean())
    decided = p >= found.threshold
    assert per_bag["external"]["sensitivity"] == decided[y == 1].mean()
    assert per_bag["external"]["specificity"] == (~decided)[y == 0].mean()
    assert per_bag["external"]["accuracy"] == (decided == (y == 1)).mean()
    assert (per_bag["low"] <= per_bag["external"]).all() and (per_bag["external"] <= per_bag["high"]).all()
    row = per_bag.loc["auc"]
    assert row["internal"] == 0.97 and row["drop"] == row["external"] - 0.97
    groups = np.array([int(name[3:]) // 4 for name in labels])
    se = bootstrap_ranking(y, np.stack([1 - p, p], 1), groups)["auc"].se
    assert row["drop_high"] - row["drop"] == pytest.approx(1.96 * np.hypot(se, 0.05 / 1.96))
    assert np.isnan(per_bag["internal"]["auprc"]) and np.isnan(per_bag["drop"]["brier"])
    assert found.lines()[0].startswith(f"External AUC {row['external']:.2f} [{row['low']:.2f}, {row['high']:.2f}]; ")
    assert "; internal estimate 0.97; drop -" in found.lines()[0]
    assert "at the frozen threshold 0.40" in found.lines()[1]
    # bags alternate between the classes, so every patient has both
    assert set(found.metrics["level"]) == {"bag"}
    assert any("6 of 6 groups (case_id) hold bags of different classes" in note for note in found.notes)
    page = (tmp_path / "pred" / "report.html").read_text()
    assert "Against the truth" in page and "the command" in page and len(page) < 1e6
    assert pd.read_csv(tmp_path / "pred" / "metrics.csv")["external"][0] == row["external"]
    record = json.loads((tmp_path / "pred" / "prediction.json").read_text())
    assert record["metrics"][0]["external"] == pytest.approx(row["external"]) and len(record["models"]) == 3


def test_per_patient():
    rng = np.random.default_rng(0)
    patient = rng.integers(0, 2, 30)
    y, groups = np.repeat(patient, 3), np.repeat(np.arange(30), 3).astype(str)
    p = np.clip(rng.normal(0.4 + 0.2 * y, 0.25), 0, 1)
    table, notes = validate(
        y, np.stack([1 - p, p], 1), groups, ["a", "b"], 0.5, {"group_auc": [0.9, 0.8, 1.0]}, "bag", "case_id"
    )
    per_patient = table[table["level"] == "case_id"].set_index("metric")
    assert per_patient["external"]["auc"] == pytest.approx(roc_auc_score(patient, p.reshape(30, 3).mean(1)))
    assert per_patient["internal"]["auc"] == 0.9 and not notes
    y[0] = 1 - y[0]
    assert validate(y, np.stack([1 - p, p], 1), groups, ["a", "b"], 0.5)[1] == [
        "1 of 30 groups (group) hold items of different classes; figures per group leave them out."
    ]


def test_labels_for_a_part(report, bags, tmp_path):
    folder, labels = bags
    part = dict(list(labels.items())[:10])
    found = run(report, folder, labels_file(tmp_path / "l.csv", part, patients=False), out=tmp_path / "pred")
    assert len(found.table) == 24 and (found.table["label"] != "").sum() == 10
    y = [CLASSES.index(label) for label in part.values()]
    assert found.metrics["external"][0] == roc_auc_score(y, found.table[f"p({CLASSES[1]})"][:10])
    assert "14 of 24 bags have no label: predicted, but not counted." in found.notes


def test_a_single_class_in_the_truth(report, bags, tmp_path, drawn):
    folder, labels = bags
    part = {name: label for name, label in labels.items() if label == CLASSES[1]}
    found = run(report, folder, labels_file(tmp_path / "l.csv", part, patients=False), out=tmp_path / "pred")
    metrics = found.metrics.set_index("metric")["external"]
    assert metrics[["auc", "auprc", "specificity", "balanced_accuracy", "macro_f1"]].isna().all()
    assert metrics[["sensitivity", "brier", "accuracy"]].notna().all()
    assert found.lines()[0] == "External AUC -; internal estimate 0.97."
    assert any("The truth holds no no 9" in note for note in found.notes)


def test_unknown_labels_are_refused_before_anything_is_read(report, bags, tmp_path, monkeypatch):
    truth = labels_file(tmp_path / "l.csv", dict.fromkeys(bags[1], "benign"))
    monkeypatch.setattr(Source, "read", None)
    with pytest.raises(DataError, match="labels benign are none of .* the truth has benign, the models know no 9, has"):
        run(report, bags[0], truth, out=tmp_path / "pred")
    assert not (tmp_path / "pred").exists()


def test_three_classes(bags, tmp_path, drawn):
    classes = ["a", "b", "c"]
    for k in range(2):
        save(tmp_path / str(k), k, classes=classes, threshold=None, internal={"recall(b)": [0.5, 0.4, 0.6]})
    models = [*open_models(tmp_path / "0"), *open_models(tmp_path / "1")]
    truth = {name: classes[i % 3] for i, name in enumerate(bags[1])}
    found = run(None, bags[0], labels_file(tmp_path / "l.csv", truth), models=models, out=tmp_path / "pred")
    p = found.table[[f"p({c})" for c in classes]].to_numpy()
    assert found.threshold is None and found.table["threshold"].isna().all()
    assert found.table["predicted"].tolist() == [classes[k] for k in p.argmax(1)]
    y = np.arange(24) % 3
    metrics = found.metrics.set_index("metric")
    assert metrics["external"]["auc"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"))
    assert metrics["external"]["recall(c)"] == (p.argmax(1) == 2)[y == 2].mean()
    assert metrics["internal"]["recall(b)"] == 0.5
    assert "sensitivity" not in metrics.index
    assert [line.split(" ")[1] for line in found.lines()[:2]] == ["AUC", "balanced"]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_ranking_is_that_of_scikit_learn(ties, weighted):
    rng = np.random.default_rng(0)
    y, score = rng.random(60) < 0.3, rng.normal(size=60)
    if ties:
        score = score.round(0)
    weights = rng.integers(0, 4, (7, 60)).astype(float) if weighted else np.ones((7, 60))
    area, average = weighted_ranking(y, score, weights)
    for w, a, b in zip(weights, area, average, strict=True):
        assert a == pytest.approx(roc_auc_score(y, score, sample_weight=w))
        assert b == pytest.approx(average_precision_score(y, score, sample_weight=w))
    assert np.isnan(weighted_ranking(y, score, weights * y)).all()


def test_the_bootstrap_of_groups_knows_that_copies_are_not_evidence():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    p = 1 / (1 + np.exp(-rng.normal(y, 1)))
    p = np.stack([1 - p, p], 1)
    once = bootstrap_ranking(y, p, np.arange(60))["auc"]
    y4, p4 = np.repeat(y, 4), np.repeat(p, 4, axis=0)
    naive = bootstrap_ranking(y4, p4, np.arange(240))["auc"]
    grouped = bootstrap_ranking(y4, p4, np.repeat(np.arange(60), 4))["auc"]
    assert once == grouped  # the same draws of the same groups
    assert grouped.high - grouped.low > 1.7 * (naive.high - naive.low)
    # one item a group: as the pooled bootstrap, which draws the same weights
    counts = np.stack([np.eye(60), np.zeros((60, 60))], 2)
    counts[..., 1] = np.eye(60) * (y == 1)

    def area(pooled):
        return weighted_ranking(y == 1, p[:, 1], pooled[..., 0])[0]

    pooled = bootstrap_groups(counts, area)
    assert (pooled.low, pooled.high) == pytest.approx((once.low, once.high))


def trident(folder, encoder="uni", magnification=20, size=512):
    place = folder / f"{magnification}x_512px_0px_overlap" / f"features_{encoder}"
    place.mkdir(parents=True)
    data = digits_bags(4)
    for i, name in enumerate(data.ids):
        with h5py.File(place / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = data.read(i).features, np.zeros((len(data.read(i).features), 2))
            file["coords"].attrs["patch_size_level0"] = size
    return folder


def test_features_made_otherwise_are_refused(report, tmp_path, capsys):
    same = run(report, trident(tmp_path / "same"), out=tmp_path / "pred")
    assert same.notes == []
    with h5py.File(tmp_path / "pred" / "instance_scores.h5") as file:
        assert file["bag000"].attrs["patch_size"] == 512 and file["bag000"].attrs["coords_unit"] == "pixel"
    other = trident(tmp_path / "other", "gigapath", 40, 256)
    with pytest.raises(DataError) as error:
        run(report, other, out=tmp_path / "no")
    for text in (
        "encoder gigapath here, uni in training",
        "magnification 40.0 here, 20.0 in training",
        "patch size 256.0 pixel here, 512.0 pixel in training",
        "--force",
    ):
        assert text in str(error.value)
    assert not (tmp_path / "no").exists()
    forced = predict_items(TASK, open_models(report), other, out=tmp_path / "forced", force=True)
    assert forced.notes[0].startswith("Forced although the features were made otherwise: encoder gigapath")
    assert "warning: Forced" in capsys.readouterr().err
    assert "encoder gigapath" in (tmp_path / "forced" / "report.html").read_text()


def test_training_on_several_encoders_and_units(report, tmp_path):
    data, models = trident(tmp_path / "data"), open_models(report)
    models[0].metadata["provenance"] = {"encoder": [None, "uni", "uni_v2"], "patch_size": 256.0, "unit": "um"}
    found = run(report, data, models=models, out=tmp_path / "pred")
    assert found.notes == [
        "Encoder: not recorded everywhere, only partly checked.",
        "Magnification: not recorded in training, not checked.",
        "Patch size: in pixel here, in um in training, not checked.",
    ]


def test_another_width_is_refused(report, tmp_path):
    (tmp_path / "bags").mkdir()
    np.savez(tmp_path / "bags" / "a.npz", features=np.ones((3, 5), np.float32))
    with pytest.raises(DataError, match="5 features per instance, but the models were trained on 64"):
        run(report, tmp_path / "bags", out=tmp_path / "pred", force=True)
    assert not (tmp_path / "pred").exists()


def test_bad_bags(report, tmp_path):
    folder = tmp_path / "bags"
    folder.mkdir()
    for name in "abc":
        np.savez(folder / f"{name}.npz", features=np.random.rand(3, 64).astype(np.float32))
    np.savez(folder / "c.npz", features=np.full((3, 64), np.nan, np.float32))
    with pytest.raises(DataError, match="1 bag cannot be used"):
        run(report, folder, out=tmp_path / "pred")
    assert not (tmp_path / "pred").exists()
    found = run(report, folder, out=tmp_path / "pred", exclude_bad=True)
    assert found.table["id"].tolist() == ["a", "b"]
    assert pd.read_csv(tmp_path / "pred" / "excluded.csv")["item"].tolist() == ["c"]
    assert any("1 could not be used and were left out" in note for note in found.notes)


def test_at_most_one_bag_is_in_memory(report, bags, tmp_path, monkeypatch):
    alive, most, reads, read = [], 0, [], Source.read

    def counted(source):
        nonlocal most
        raw = read(source)
        if source.arrays is None:
            most = max(most, 1 + sum(of() is not None for of in alive))
            alive.append(weakref.ref(raw.features))  # the tensor shares its memory
            reads.append(source.id)
        return raw

    monkeypatch.setattr(Source, "read", counted)
    run(report, bags[0], out=tmp_path / "pred")
    assert most == 1
    assert reads.count("bag005") == 2  # by the check, and by the prediction of all three models


def test_a_failure_leaves_everything_as_it_was(report, bags, tmp_path, monkeypatch):
    calls = [0]

    def failing(*args):
        calls[0] += 1
        if calls[0] == 30:
            raise KeyboardInterrupt
        return score(*args)

    broken = SimpleNamespace(**{**vars(TASK), "score": failing})
    with pytest.raises(KeyboardInterrupt):
        predict_items(broken, open_models(report), bags[0], out=tmp_path / "pred", quiet=True)
    assert list(tmp_path.iterdir()) == []
    truth = labels_file(tmp_path / "l.csv", bags[1])
    run(report, bags[0], truth, out=tmp_path / "pred")
    (tmp_path / "pred" / "mine.txt").write_text("mine")
    before = {f.name: f.read_bytes() for f in (tmp_path / "pred").iterdir()}
    assert set(before) == {*FILES, "mine.txt"} - {"excluded.csv"}
    calls[0] = 0
    with pytest.raises(KeyboardInterrupt):
        predict_items(broken, open_models(report), bags[0], out=tmp_path / "pred", quiet=True, overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "pred").iterdir()} == before
    with pytest.raises(StudyError, match="holds earlier predictions; .* --overwrite"):
        run(report, bags[0], out=tmp_path / "pred")
    run(report, bags[0], out=tmp_path / "pred", overwrite=True)
    assert {f.name for f in (tmp_path / "pred").iterdir()} == set(before) - {"metrics.csv"}  # without truth this time
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prediction.json").write_text("[]")
    with pytest.raises(StudyError, match="holds other files and no predictions"):
        run(report, bags[0], out=tmp_path / "other", overwrite=True)
    assert {f.name for f in tmp_path.iterdir()} == {"l.csv", "pred", "other"}


def test_nan_and_methods_without_instance_scores(report, bags, tmp_path):
    def plain(model, items, device):
        return Score(np.array([[0.5, np.nan if items.ids == ["bag007"] else 0.5]]), {})

    task = SimpleNamespace(**{**vars(TASK), "score": plain})
    with pytest.raises(StudyError, match="bag007: NaN or infinity among its probabilities"):
        predict_items(task, open_models(report), bags[0], out=tmp_path / "pred", quiet=True)
    assert list(tmp_path.iterdir()) == []
    data = digits_bags(6)  # a data set in memory, whose own labels are the truth
    found = predict_items(task, open_models(report), data, out=tmp_path / "pred", quiet=True)
    assert found.table["label"].tolist() == [CLASSES[k] for k in data.labels]
    assert not (tmp_path / "pred" / "instance_scores.h5").exists()
    with pytest.raises(ValueError, match="a data set has its own labels"):
        predict_items(task, open_models(report), data, tmp_path / "l.csv", out=tmp_path / "b", quiet=True)


def test_the_task_itself(report, bags, tmp_path):
    from classact.tasks import load_task

    task = load_task("mil")
    found = predict_items(task, open_models(report), bags[0], out=tmp_path / "pred", quiet=True)
    same = run(report, bags[0], out=tmp_path / "same")
    assert found.table.equals(same.table)
    with h5py.File(tmp_path / "pred" / "instance_scores.h5") as file:
        assert "attention" in file["bag000"]["abmil"]
