"""From a comparison to a decision: tuning, bad data, operating points, encoders, learning curves, predictions."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import classact
from classact.cli import app
from classact.data import DataError, digits_bags, open_bags
from classact.evidence.store import StudyError
from classact.tasks.mil import TASK

QUICK = {"epochs": 3, "lr": 1e-2, "batch_size": 8}


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result.output


def write_bags(folder, numbers, shift=3.0, width=4, patients=2, seed=0):
    """Positive bags hold one shifted instance; `patients` bags belong to each patient."""
    folder.mkdir(parents=True)
    rows = ["case_id,slide_id,label"]
    for i in numbers:
        rng = np.random.default_rng([seed, i])
        positive = (i // patients) % 2
        x = rng.normal(size=(rng.integers(4, 8), width)).astype(np.float32)
        x[0, 0] += shift * positive
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file["features"], file["coords"] = x, rng.integers(0, 20, size=(len(x), 2)) * 256
            file["coords"].attrs["patch_size"] = 256
        rows.append(f"p{i // patients},s{i},{'tumor' if positive else 'normal'}")
    labels = folder.parent / f"{folder.name}.csv"
    labels.write_text("\n".join(rows) + "\n")
    return folder, labels


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return classact.compare(
        "mil",
        digits_bags(60),
        ["mean", "abmil", "mhim(abmil)"],
        out=tmp_path_factory.mktemp("tuned") / "report",
        folds=3,
        options={**QUICK, "epochs": 4},
        settings={"mean": {"batch_size": 4}},
        tune=3,
        quiet=True,
    )


def test_every_arm_is_tuned_alike(tuned):
    drawn = tuned.definition["tune"]
    assert {m: len(of) for m, of in drawn.items()} == {m: 1 if m == "prevalence" else 3 for m in tuned.methods}
    assert all(of[0] == {} for of in drawn.values())
    for method in ("mean", "abmil", "mhim(abmil)"):
        for cut, cell in zip(tuned.cuts, tuned.cells[method], strict=True):
            each = 4 * -(-len(cut.train) // QUICK["batch_size"])
            assert cell["steps"] == pytest.approx(3 * each, abs=9)
            areas = cell["validation_auc"]
            assert areas[cell["chosen"]] == max(areas)
            assert drawn[method][cell["chosen"]] == cell["configuration"]
    assert any("lr" not in key for one in drawn["abmil"] for key in one)
    assert not any(key.endswith(".lr") for of in drawn.values() for one in of for key in one)  # set for all
    assert tuned.summary[-1].startswith("Tuned: every method had 3 configurations")
    assert "<h2>Tuning</h2>" in (tuned.folder / "report.html").read_text()


def test_untuned_is_said(tmp_path):
    report = classact.compare("mil", digits_bags(20), ["mean"], out=tmp_path, folds=2, options=QUICK, quiet=True)
    assert report.summary[-1].startswith("Untuned, paper defaults, but")
    assert report.tuned == 0


def test_shuffled_labels_give_chance_for_tuned_methods(tmp_path, monkeypatch):
    """The standard error of the mean over methods and three shuffles is about 0.05."""
    monkeypatch.setattr("classact.evidence.report.write_report", lambda *_: None)  # takes longer than the training
    found = []
    for seed in range(3):
        data = digits_bags(90, seed=seed)
        data.labels = np.random.default_rng(seed).permutation(data.labels)
        options = {"epochs": 2, "batch_size": 8}
        report = classact.compare(
            "mil", data, ["abmil", "acmil+aem"], out=tmp_path / f"{seed}", folds=2, options=options, tune=4, quiet=True
        )
        assert "No method beats the controls" in report.summary[0]
        found.append(report.table["auc"])
    mean = pd.concat(found, axis=1).mean(axis=1)
    assert mean.between(0.36, 0.64).all(), mean
    assert 0.4 < mean.mean() < 0.6


def test_an_operating_point_for_a_sensitivity(tmp_path):
    reports = {
        target: classact.compare(
            "mil", digits_bags(80), ["abmil"], out=tmp_path / f"{target}", folds=4, options=QUICK, quiet=True,
            target_sensitivity=target,
        )
        for target in (None, 0.95)
    }  # fmt: skip
    thresholds = {t: [c["threshold"] for c in r.cells["abmil"]] for t, r in reports.items()}
    assert np.mean(thresholds[0.95]) < np.mean(thresholds[None])
    table = {t: r.table.loc["abmil"] for t, r in reports.items()}
    assert table[0.95]["sensitivity"] > max(0.8, table[None]["sensitivity"] - 0.05)
    assert table[0.95]["auc"] == table[None]["auc"]  # the ranking stays
    assert any("aimed at sensitivity 0.95" in line for line in reports[0.95].summary)
    assert (
        json.loads((tmp_path / "0.95" / "models" / "abmil.json").read_text())["metadata"]["target_sensitivity"] == 0.95
    )
    with pytest.raises(StudyError, match="--target-sensitivity: expected a number"):
        classact.compare("mil", digits_bags(20), ["mean"], out=tmp_path / "x", target_sensitivity=95, quiet=True)


def test_metrics_of_the_table_are_scikit_learns(tuned):
    from sklearn import metrics

    predictions = tuned.predictions("abmil")
    y, p = (predictions["label"] == "has a 9").to_numpy(), predictions["p(has a 9)"].to_numpy()
    row = tuned.table.loc["abmil"]
    assert row["brier"] == pytest.approx(metrics.brier_score_loss(y, p))
    assert row["sensitivity"] == pytest.approx(metrics.recall_score(y, predictions["predicted"] == "has a 9"))
    by_fold = [
        metrics.average_precision_score(part["label"] == "has a 9", part["p(has a 9)"])
        for _, part in predictions.groupby("fold")
    ]
    assert row["auprc"] == pytest.approx(np.mean(by_fold))
    assert row["sensitivity_at_95"] <= row["sensitivity_at_90"]
    for name in ("sensitivity", "specificity", "brier", "calibration_error", "auprc"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_attention_is_tested_as_evidence(tuned):
    row = next(r for r in tuned.rows if r.method == "abmil")
    assert set(row.evidence) == {"deletion", "insertion"}
    assert set(row.agreement) == {"folds"}  # one repeat: no second seed
    assert -1 <= row.agreement["folds"] <= 1
    assert not next(r for r in tuned.rows if r.method == "mean").evidence  # uniform by construction
    assert "<h2>Where in the bag</h2>" in (tuned.folder / "report.html").read_text()


def test_agreement_of_seeds_needs_a_second_repeat(tmp_path):
    report = classact.compare(
        "mil", digits_bags(40), ["abmil"], out=tmp_path, folds=2, repeats=3, options=QUICK, quiet=True
    )
    assert set(report.rows[0].agreement) == {"folds", "seeds"}
    kinds = [cell.get("score_kinds") for cell in report.cells["abmil"]]
    assert kinds[0] == ["attention", "attention x class logit"]
    assert kinds[2] == ["attention"]
    assert kinds[4] is None


def test_fractions_give_a_learning_curve_on_the_same_test_parts(tmp_path):
    report = classact.compare(
        "mil", digits_bags(60), ["mean"], out=tmp_path, folds=3, options=QUICK, fractions=[0.25, 0.5, 1], quiet=True
    )
    for method, curve in report.learning.items():
        assert list(curve) == [0.25, 0.5, 1]
        assert curve[1].effect == pytest.approx(report.table.loc[method, "auc"])
    sizes = [[c["n_train"] + c["n_validation"] for c in of] for of in report.parts.values()]
    assert all(9 <= n <= 11 for n in sizes[0])
    assert any(line.startswith("AUC of mean by fraction of the groups: 0.25:") for line in report.summary)
    assert (tmp_path / "learning.png").exists()
    with pytest.raises(StudyError, match="--fractions: expected parts in"):
        classact.compare("mil", digits_bags(20), ["mean"], out=tmp_path / "x", fractions=[0.5], quiet=True)


def test_encoders_are_crossed_with_methods_on_what_both_have(tmp_path):
    root = tmp_path / "bags" / "20x_256px_0px_overlap"
    _, labels = write_bags(root / "features_good", range(40), shift=4.0)
    write_bags(root / "features_poor", range(2, 42), shift=0.0, width=6)
    rows = (root / "features_poor.csv").read_text().splitlines()[-2:]
    labels.write_text(labels.read_text() + "\n".join(rows) + "\n")
    table = tmp_path / "labels.csv"
    labels.rename(table)
    (root / "features_poor.csv").unlink()
    said = call(
        "compare", "mil", tmp_path / "bags", "--labels", table, "--encoders", "good,poor", "--methods", "mean,abmil",
        "--folds", "3", "--epochs", "8", "--lr", "0.01", "--batch-size", "8", "--exclude-bad",
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert "encoder poor against good, over all methods: AUC -" in said
    assert "method mean against abmil, over all encoders" in said
    result = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert result["definition"]["data"]["items"] == 38
    assert {"abmil@good", "abmil@poor", "lr-mean@poor"} <= set(result["definition"]["methods"])
    excluded = pd.read_csv(tmp_path / "report" / "excluded.csv")
    assert set(excluded["item"]) == {"s0", "s1", "s40", "s41"}
    model = json.loads((tmp_path / "report" / "models" / "abmil@good.json").read_text())["metadata"]
    assert (model["provenance"]["encoder"], model["in_dim"]) == ("good", 4)
    predicted = call(
        "predict", tmp_path / "report", tmp_path / "bags", "--encoder", "good", "--truth", table, "--exclude-bad",
        "--out", tmp_path / "pred",
    )  # fmt: skip
    assert "40 bags predicted by 3 models of" in predicted
    assert "of encoder" not in call(
        "predict", tmp_path / "report", tmp_path / "bags", "--encoder", "poor", "--out", tmp_path / "no", code=1
    )


def test_bad_bags_stop_a_run_unless_left_out(tmp_path):
    folder, labels = write_bags(tmp_path / "bags", range(24))
    with h5py.File(folder / "s3.h5", "a") as file:
        file["features"][1, 2] = np.nan
    labels.write_text(labels.read_text() + "p77,s77,tumor\n")
    words = ["compare", "mil", folder, "--labels", labels, "--methods", "mean", "--folds", "2", "--epochs", "1"]
    said = call(*words, "--out", tmp_path / "report", code=1)
    assert "--exclude-bad" in said
    assert "s3" in said
    assert not (tmp_path / "report").exists()
    said = call("data", "check", folder, "--labels", labels, "--methods", "mean,lr-mean", "--epochs", "2", code=1)
    assert "s77" in said
    assert "mean:" in said
    assert "MB on disk" in said
    said = call(*words, "--out", tmp_path / "report", "--exclude-bad")
    assert "Left out: 2 bags (2 tumor); see excluded.csv." in said
    excluded = pd.read_csv(tmp_path / "report" / "excluded.csv").set_index("item")
    assert excluded.loc["s3", "reason"] == "not finite: nan at instance 1, feature 2"
    assert excluded.loc["s77"].tolist() == ["missing: no bag of that name", "tumor"]
    clean = call("data", "check", folder, "--labels", labels, code=1)
    assert "folds possible" in clean


def test_given_splits_may_name_what_was_left_out(tmp_path):
    folder, labels = write_bags(tmp_path / "bags", range(24))
    (folder / "s3.h5").write_bytes(b"no HDF5")
    for fold in range(2):
        test = [f"s{i}" for i in range(24) if (i // 4) % 2 == fold]
        train = [f"s{i}" for i in range(24) if (i // 4) % 2 != fold]
        content = {"train_names": train, "val_names": [], "test_names": test}
        (tmp_path / f"split_{fold}.json").write_text(json.dumps(content))
    said = call(
        "compare", "mil", folder, "--labels", labels, "--methods", "mean", "--epochs", "1", "--exclude-bad",
        "--splits", tmp_path / "split_0.json", "--out", tmp_path / "report",
    )  # fmt: skip
    assert "Left out: 1 bag (1 tumor)" in said
    assert "s3" not in pd.read_csv(tmp_path / "report" / "predictions.csv")["id"].tolist()


def test_compare_then_predict_then_heatmap(tmp_path):
    folder, labels = write_bags(tmp_path / "bags", range(48))
    other, truth = write_bags(tmp_path / "other", range(100, 124), shift=2.5, seed=1)
    call("compare", "mil", folder, "--labels", labels, "--methods", "abmil", "--folds", "3", "--epochs", "15", "--lr",
         "0.01", "--batch-size", "8", "--out", tmp_path / "report")  # fmt: skip
    said = call("predict", tmp_path / "report", other, "--truth", truth, "--out", tmp_path / "pred")
    assert said.startswith("External AUC ")
    assert "internal estimate" in said
    metrics = pd.read_csv(tmp_path / "pred" / "metrics.csv")
    assert set(metrics["level"]) == {"bag", "case_id"}
    assert np.isfinite(metrics.loc[metrics["metric"] == "auc", "drop"]).all()
    predictions = pd.read_csv(tmp_path / "pred" / "predictions.csv")
    # the mean over the fold models of what each says with its own temperature
    bags = open_bags(other, truth)
    p = []
    for k in range(3):
        model = classact.load(tmp_path / "report" / "models" / "abmil.folds" / str(k))
        raw = TASK.score(model, bags).probabilities.astype(float) ** (1 / model.metadata["temperature"])
        p.append(raw[:, 1] / raw.sum(1))
    np.testing.assert_allclose(predictions["p(tumor)"], np.mean(p, axis=0), rtol=1e-5)
    drawn = call(
        "heatmap", tmp_path / "pred", "--patch-size", "256", "--items", "s100,s101", "--out", tmp_path / "maps"
    )
    assert "files in" in drawn
    tiles = json.loads((tmp_path / "maps" / "s100.geojson").read_text())["features"]
    assert len(tiles) == len(bags[bags.ids.index("s100")].x)
    one = call("predict", tmp_path / "report" / "models" / "abmil.safetensors", other, "--out", tmp_path / "one")
    assert "24 bags predicted by one model of abmil" in one


def test_out_of_fold_predictions_are_those_of_the_stored_fold_models(tuned):
    bags = digits_bags(60)
    for k, (cut, arrays) in enumerate(zip(tuned.cuts, tuned.arrays["abmil"], strict=True)):
        model = classact.load(tuned.folder / "models" / "abmil.folds" / str(k))
        raw = TASK.score(model, bags.subset(cut.test)).probabilities.astype(float) ** (
            1 / model.metadata["temperature"]
        )
        np.testing.assert_allclose(arrays["probabilities"], raw / raw.sum(1, keepdims=True), rtol=1e-5)
        assert model.metadata["fold"] == k
        assert model.metadata["internal"]["auc"][0] == pytest.approx(tuned.table.loc["abmil", "auc"])


def test_errors_name_the_option(tmp_path):
    with pytest.raises(StudyError, match="--tune: expected at least 1"):
        classact.compare("mil", digits_bags(20), ["mean"], out=tmp_path / "x", tune=0, quiet=True)
    with pytest.raises(StudyError, match="--share-gpu|GPU"):
        classact.compare("mil", digits_bags(20), ["mean"], out=tmp_path / "x", device="cuda", workers=64, quiet=True)
    assert "--fractions: expected numbers" in call(
        "compare", "mil", "digits", "--fractions", "0.1,x", "--out", tmp_path / "x", code=1
    )
    write_bags(tmp_path / "b" / "20x_256px_0px_overlap" / "features_a", range(8))
    with pytest.raises(DataError, match="no features of encoder"):
        classact.compare(
            "mil", tmp_path / "b", ["mean"], out=tmp_path / "x", group="slide_id", quiet=True, encoders=["a", "z"],
            labels=tmp_path / "b" / "20x_256px_0px_overlap" / "features_a.csv",
        )  # fmt: skip
    assert not (tmp_path / "x").exists()
