import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from classact.catalogue import PACKAGE, load_entries
from classact.catalogue.codehash import code_hash
from classact.cli import app
from classact.evidence.store import StudyError
from classact.reproductions import reproduce

ENTRIES = load_entries()
WITH_EXPERIMENTS = [
    slug for slug, e in ENTRIES.items() if (PACKAGE / "reproductions" / e.family / f"{slug}.py").exists()
]
MEASURED = [slug for slug, entry in ENTRIES.items() if entry.status == "measured"]


def test_every_measured_paper_has_its_experiments():
    assert {"acmil", "aem", "mhim", "scmil", "mambamil", "gradcam"} <= set(WITH_EXPERIMENTS)
    assert set(MEASURED) <= set(WITH_EXPERIMENTS)


@pytest.mark.parametrize("slug", WITH_EXPERIMENTS)
def test_smoke_scale_runs_and_judges_every_claim(slug, real_data, tmp_path):
    report = reproduce(slug, "smoke", out=tmp_path, quiet=True)
    content = json.loads((tmp_path / slug / "smoke.json").read_text())
    entry = load_entries()[slug]
    assert [c["id"] for c in content["claims"]] == [c["id"] for c in entry.claims if c.get("checks")]
    assert {c["verdict"] for c in content["claims"]} <= {"holds", "fails", "inconclusive"}
    assert all(max(c["seeds"]) < 100 for c in content["claims"])
    assert content["code_hash"] == code_hash(f"classact.reproductions.{entry.family}.{slug}")
    figures = [Image.open(file) for file in report.files if file.suffix == ".png"]
    assert len(figures) == len(content["results"])
    assert all(len(figure.getcolors()) > 20 for figure in figures), "a blank figure"
    again = reproduce(slug, "smoke", out=tmp_path / "again", quiet=True)  # from the kept cells
    assert again.content["results"] == content["results"]
    rechecked = reproduce(slug, "smoke", out=tmp_path, recheck=True, quiet=True)
    assert rechecked.content["claims"] == content["claims"]
    assert len(report.table()) == len(content["claims"])


@pytest.mark.parametrize("slug", MEASURED)
def test_committed_results_are_printed_with_their_evidence(slug):
    result = CliRunner().invoke(app, ["papers", slug])
    assert result.exit_code == 0
    for claim in load_entries()[slug].result()["claims"]:
        assert f"{claim['verdict']} ({claim['evidence']})" in result.output


def test_a_cell_is_the_same_whenever_it_is_run(real_data):
    from classact.reproductions import run_cell

    name = "classact.reproductions.mil.acmil"
    first, _ = run_cell(name, "musk1", 1, "smoke")
    run_cell(name, "musk1", 0, "smoke")
    again, _ = run_cell(name, "musk1", 1, "smoke")
    assert first == again


def test_nothing_to_judge_again(tmp_path):
    with pytest.raises(StudyError, match="no results to judge again"):
        reproduce("acmil", "cpu", out=tmp_path, recheck=True)
    with pytest.raises(StudyError, match="acmil: no experiment nope at scale cpu; there are shortcut-bags"):
        reproduce("acmil", "cpu", out=tmp_path, experiments=["nope"])
    with pytest.raises(StudyError, match="acmil: no experiment has a gpu scale"):
        reproduce("acmil", "gpu", out=tmp_path)


def test_paper_scale_of_mhim_reads_slides_and_labels(tmp_path, monkeypatch):
    """Made-up slides as ``.pt`` files with a table of labels."""
    import torch

    from classact.reproductions import run_cell
    from classact.reproductions.mil import mhim

    (tmp_path / "camelyon16_resnet50" / "pt").mkdir(parents=True)
    rows = ["slide_id,label"]
    for i in range(18):
        torch.save(torch.randn(6, 16), tmp_path / "camelyon16_resnet50" / "pt" / f"slide_{i}.pt")
        rows.append(f"slide_{i},{i % 2}")
    (tmp_path / "camelyon16_resnet50" / "labels.csv").write_text("\n".join(rows))
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    for name in ("fit_bags", "fit_mhim"):
        original = getattr(mhim, name)
        monkeypatch.setattr(mhim, name, lambda *a, _fit=original, **k: _fit(*a, **{**k, "epochs": 2}))
    values, _ = run_cell("classact.reproductions.mil.mhim", "camelyon16", 100, "paper")
    assert {"abmil", "mhim", "random_masking", "two_stages"} == set(values)
    assert all(0 <= cell["auc"] <= 1 for cell in values.values())


@pytest.mark.parametrize("slug", ["acmil", "aem", "mambamil"])
def test_paper_scale_reads_the_authors_files(slug, tmp_path, monkeypatch):
    """Made-up slides in the authors' own format: one HDF5 file, a group per slide, and their split files."""
    import h5py
    import numpy as np

    from classact.reproductions import run_cell
    from classact.reproductions.mil import protocols

    rng = np.random.default_rng(0)
    (tmp_path / "camelyon16").mkdir()
    names = [f"{kind}_{i}" for i in range(8) for kind in ("normal", "tumor")]
    with h5py.File(tmp_path / "camelyon16" / "patch_feats_pretrain_medical_ssl.h5", "w") as file:
        for name in names:
            group = file.create_group(name)
            group["feat"] = rng.normal(size=(12, 384)).astype(np.float16)
            group["coords"] = rng.integers(0, 99, size=(12, 2))
            group.attrs["label"] = int(name.startswith("tumor"))
    split = {"train_names": names[:8], "val_names": names[8:12], "test_names": names[12:]}
    (tmp_path / "camelyon16" / "split_1.json").write_text(json.dumps(split))
    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    original = protocols.fit_bags
    monkeypatch.setattr(protocols, "fit_bags", lambda *a, **k: original(*a, **k, epochs=2))
    values, _ = run_cell(f"classact.reproductions.mil.{slug}", "camelyon16", 100, "paper")
    assert {"abmil", slug} <= set(values)
    assert all(0 <= cell["auc"] <= 1 and 0 <= cell["f1"] <= 1 for cell in values.values())
