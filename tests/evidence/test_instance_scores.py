import h5py
import numpy as np
import pytest

from classact.evidence.instance_scores import InstanceScoreWriter, read_items


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "instance_scores.h5"
    attention, logits = np.random.rand(5), np.random.randn(5, 2)
    coords = np.arange(10).reshape(5, 2)
    with InstanceScoreWriter(path, ["normal", "tumor"], "mil", "bag") as file:
        for method in ("abmil", "acmil"):
            file.add(
                "slide",
                method,
                {"attention": attention, "attention x class logit": logits},
                probabilities=[0.3, 0.7],
                predicted="tumor",
                coords=coords,
                label="normal",
                group="patient",
                fold=2,
                patch_size=512.0,
                coords_unit="pixel",
            )
        file.add("other", "abmil", {})
        assert not path.exists()
    with h5py.File(path) as file:
        assert list(file.attrs["classes"]) == ["normal", "tumor"]
        assert (file.attrs["task"], file.attrs["unit"]) == ("mil", "bag")
        own = file["slide"]
        assert dict(own.attrs) == {
            "label": "normal",
            "group": "patient",
            "fold": 2,
            "patch_size": 512,
            "coords_unit": "pixel",
        }
        assert np.array_equal(own["coords"], coords)
        assert set(own) == {"abmil", "acmil", "coords"}
        node = own["acmil"]
        assert node["attention"].dtype == np.float32 and node["attention"].compression == "gzip"
        assert np.array_equal(node["attention"], attention.astype(np.float32))
        assert np.array_equal(node["attention x class logit"], logits.astype(np.float32))
        assert node.attrs["predicted"] == "tumor" and node.attrs["probabilities"].tolist() == [0.3, 0.7]
        assert dict(file["other"].attrs) == {"label": "", "group": ""} and len(file["other"]["abmil"]) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_items_are_found_whatever_their_names(tmp_path):
    names = ["a", "a/b", "site 1/patient/slide.1", "z"]
    with InstanceScoreWriter(tmp_path / "s.h5", ["0", "1"]) as file:
        for number, name in enumerate(names):
            file.add(name, "abmil", {"attention": np.full(3, number)}, coords=np.zeros((3, 2)))
    with h5py.File(tmp_path / "s.h5") as file:
        assert read_items(file) == names
        assert [file[name]["abmil"]["attention"][0] for name in names] == [0, 1, 2, 3]


def test_nothing_half_written_stays_behind_and_an_earlier_file_does(tmp_path):
    path = tmp_path / "s.h5"
    path.write_bytes(b"earlier")

    def interrupted():
        with InstanceScoreWriter(path, ["0", "1"]) as file:
            file.add("a", "abmil", {"attention": np.ones(3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_what_does_not_fit_is_refused(tmp_path):
    with InstanceScoreWriter(tmp_path / "s.h5", ["0", "1"]) as file:
        with pytest.raises(ValueError, match=r"a: expected as many scores .* got \{'attention': 3, 'coords': 2\}"):
            file.add("a", "abmil", {"attention": np.ones(3)}, coords=np.ones((2, 2)))
        file.add("a", "abmil", {"attention": np.ones(3)})
        with pytest.raises(ValueError, match="a: scores of abmil are there already"):
            file.add("a", "abmil", {"attention": np.ones(3)})
