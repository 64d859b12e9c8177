"""Every layout is read as it is; every damaged one is named."""

import gzip

import h5py
import numpy as np
import pytest
import torch

from classact.data import Bag, DataError, collate_bags, digits_bags, open_bags
from classact.data.bag_files import bag_id, find_bags
from classact.data.check import check_bags, raise_problems

RNG = np.random.default_rng(0)
FEATURES = {
    name: RNG.normal(size=(k, 6)).astype(np.float32) for name, k in (("s1.a", 4), ("s2", 7), ("s3", 5), ("s4", 3))
}
COORDS = {name: RNG.integers(0, 9999, size=(len(x), 2)) for name, x in FEATURES.items()}
LABELS = {"s1.a": "tumor", "s2": "normal", "s3": "tumor", "s4": "normal"}


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.csv"
    rows = [f"p{i // 2},{name}.svs,{label}" for i, (name, label) in enumerate(LABELS.items())]
    path.write_text("case_id,slide_id,label\n" + "\n".join(rows) + "\n")
    return path


def write_h5(path, key="features", **extra):
    path.mkdir(parents=True, exist_ok=True)
    for name, x in FEATURES.items():
        with h5py.File(path / f"{name}.h5", "w") as file:
            file[key], file["coords"] = x, COORDS[name]
            for other, make in extra.items():
                file[other] = make(x)


def check(bags, coords=True):
    assert sorted(bags.ids) == sorted(FEATURES)
    for bag in bags:
        np.testing.assert_allclose(bag.x, FEATURES[bag.id], rtol=1e-3, atol=1e-3)
        assert bag.x.dtype == torch.float32
        assert bags.classes[bag.label] == LABELS[bag.id]
        if coords:
            np.testing.assert_array_equal(bag.coords, COORDS[bag.id])


def clam_pt(root):
    (root / "pt_files").mkdir(parents=True)
    for name, x in FEATURES.items():
        torch.save(torch.from_numpy(x).half(), root / "pt_files" / f"{name}.pt")


def pt_dict(root):
    root.mkdir()
    for name, x in FEATURES.items():
        torch.save({"features": torch.from_numpy(x), "coords": torch.from_numpy(COORDS[name])}, root / f"{name}.pt")


def mambamil(root):
    (root / "pt_files" / "uni").mkdir(parents=True)
    for name, x in FEATURES.items():
        torch.save(torch.from_numpy(x), root / "pt_files" / "uni" / f"{name}.pt")


def clam_h5(root):
    write_h5(root / "h5_files")
    (root / "h5_files" / "s9.h5.lock").touch()


def trident(root):
    write_h5(root / "20x_256px_0px_overlap" / "features_uni_v1")
    (root / "20x_256px_0px_overlap" / "patches").mkdir()


def stamp(root):
    write_h5(root, key="feats")


def npz(root):
    root.mkdir()
    for name, x in FEATURES.items():
        np.savez(root / f"{name}.npz", features=x, coords=COORDS[name])


def torchmil(root):
    for folder in ("features", "labels", "coords"):
        (root / folder).mkdir(parents=True)
    for name, x in FEATURES.items():
        np.save(root / "features" / f"{name}.npy", x)
        np.save(root / "coords" / f"{name}.npy", COORDS[name])


LAYOUTS = [clam_pt, pt_dict, mambamil, clam_h5, trident, stamp, npz, torchmil]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path, labels):
    layout(tmp_path / "bags")
    bags = open_bags(tmp_path / "bags", labels)
    check(bags, coords=layout not in (clam_pt, mambamil))
    assert bags.in_dim == 6
    assert bags.group_name == "case_id"
    assert len(set(bags.groups)) == 2


def test_acmil_single_file_brings_its_labels(tmp_path):
    with h5py.File(tmp_path / "patch_feats_pretrain_uni.h5", "w") as file:
        for name, x in FEATURES.items():
            group = file.create_group(name)
            group["feat"], group["coords"] = x.astype(np.float16), COORDS[name]
            group.attrs["label"] = int(LABELS[name] == "tumor")
    bags = open_bags(tmp_path / "patch_feats_pretrain_uni.h5", group="slide_id")
    assert bags.classes == ["0", "1"]
    assert {name: bags.classes[k] for name, k in zip(bags.ids, bags.labels, strict=True)} == {
        name: str(int(label == "tumor")) for name, label in LABELS.items()
    }


def test_rows_in_arrival_order_are_sorted_by_idx(tmp_path, labels):
    order = {name: RNG.permutation(len(x)) for name, x in FEATURES.items()}
    (tmp_path / "bags").mkdir()
    for name, x in FEATURES.items():
        with h5py.File(tmp_path / "bags" / f"{name}.h5", "w") as file:
            file["features"], file["coords"], file["idx"] = x[order[name]], COORDS[name][order[name]], order[name]
    check(open_bags(tmp_path / "bags", labels))


def test_several_encoders_must_be_chosen(tmp_path, labels):
    root = tmp_path / "job"
    for encoder in ("uni_v1", "conch_v15"):
        write_h5(root / "20x_256px_0px_overlap" / f"features_{encoder}")
    with pytest.raises(DataError, match=r"several encoders; choose one with --encoder: conch_v15, uni_v1"):
        open_bags(root, labels)
    check(open_bags(root, labels, encoder="uni_v1"))
    with pytest.raises(DataError, match="no features of encoder 'uni_v2'; there are: conch_v15, uni_v1"):
        open_bags(root, labels, encoder="uni_v2")


def test_uci_musk_text(tmp_path):
    path = tmp_path / "musk1.data"
    path.write_text("MUSK-1,1_1,1,2,3,1.\nMUSK-1,1_2,4,5,6,1.\nNON-MUSK-2,2_1,7,8,9,0.\n")
    bags = open_bags(path)
    assert bags.ids == ["MUSK-1", "NON-MUSK-2"]
    assert bags.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(bags[0].x, [[1, 2, 3], [4, 5, 6]])
    assert bags.tabular


def test_benchmark_csv(tmp_path):
    path = tmp_path / "set.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("1,7,0.5,1\n1,7,0.25,2\n0,8,1,3\n")
    bags = open_bags(path)
    assert bags.ids == ["7", "8"]
    assert bags.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(bags[0].x, [[0.5, 1], [0.25, 2]])


def test_classic_mat(tmp_path):
    from scipy.io import savemat
    from scipy.sparse import csr_matrix

    x = np.array([[1.0, 0], [2, 3], [0, 5]])
    savemat(tmp_path / "fox.mat", {"features": csr_matrix(x), "labels": [[1, 1, -1]], "bag_ids": [[4, 4, 9]]})
    bags = open_bags(tmp_path / "fox.mat")
    assert bags.ids == ["4", "9"]
    assert bags.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(bags[0].x, x[:2])


def test_real_musk1_and_tissue(real_data):
    musk = open_bags("musk1")
    assert (len(musk), musk.in_dim, int(musk.labels.sum())) == (92, 166, 47)
    assert check_bags(musk).sizes.sum() == 476
    tissue = open_bags("ucsb_breast_cancer")
    assert (len(tissue), tissue.in_dim, int(tissue.labels.sum())) == (58, 708, 26)
    assert check_bags(tissue).sizes.sum() == 2002


def test_digits_hold_their_witnesses_and_no_image_twice():
    bags = digits_bags()
    rows = np.concatenate([bag.x for bag in bags])
    assert len(np.unique(rows, axis=0)) == len(rows)
    for bag in bags:
        assert (bag.instance_labels.sum() > 0) == bool(bag.label)
        assert 8 <= len(bag.x) <= 12
    again, other = digits_bags(), digits_bags(seed=1)
    assert check_bags(again).fingerprint == check_bags(bags).fingerprint != check_bags(other).fingerprint


def test_batches_are_padded_and_masked():
    batch = collate_bags([Bag(torch.ones(2, 3), 0, torch.ones(2, 2)), Bag(torch.ones(4, 3), 1, torch.ones(4, 2))])
    assert batch.x.shape == (2, 4, 3)
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.coords.shape == (2, 4, 2)
    assert batch.label.tolist() == [0, 1]
    assert collate_bags([Bag(torch.ones(2, 3), 0)]).mask is None


def test_reading_is_lazy_and_the_cache_is_bounded(tmp_path, labels, monkeypatch):
    write_h5(tmp_path / "bags")
    bags = open_bags(tmp_path / "bags", labels)
    monkeypatch.setattr("classact.data.bags.CACHE_BYTES", 4 * 6 * 8)
    for _ in bags:
        pass
    assert 0 < len(bags._cache) < len(bags)
    assert bags._cached <= 4 * 6 * 8
    import pickle

    assert pickle.loads(pickle.dumps(bags))._cache == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.svs", "a"), ("a.b.ome.tiff", "a.b"), ("TCGA-1.2f", "TCGA-1.2f"), ("x.NDPI", "x"), ("y.h5", "y.h5")],
)
def test_only_known_slide_suffixes_are_stripped(name, expected):
    assert bag_id(name) == expected


def damage_truncated(root):
    write_h5(root)
    file = root / "s2.h5"
    file.write_bytes(file.read_bytes()[:900])


def damage_missing_key(root):
    write_h5(root, key="embeddings")


def damage_empty(root):
    write_h5(root)
    with h5py.File(root / "s2.h5", "w") as file:
        file["features"] = np.empty((0, 6), dtype=np.float32)


def damage_nan(root):
    write_h5(root)
    with h5py.File(root / "s2.h5", "r+") as file:
        file["features"][3, 2] = np.nan


def damage_infinity(root):
    npz(root)
    x = FEATURES["s3"].copy()
    x[0, 5] = np.inf
    np.savez(root / "s3.npz", features=x)


def damage_width(root):
    write_h5(root)
    with h5py.File(root / "s4.h5", "w") as file:
        file["features"] = np.zeros((3, 9), dtype=np.float32)


def damage_pickle(root):
    pt_dict(root)
    torch.save({"features": FEATURES["s2"]}, root / "s2.pt")


def damage_not_tensors(root):
    pt_dict(root)
    torch.save([1, 2, 3], root / "s2.pt")


def damage_slide_embedding(root):
    write_h5(root)
    with h5py.File(root / "s2.h5", "w") as file:
        file["features"] = np.zeros(6, dtype=np.float32)


def damage_coords(root):
    write_h5(root)
    with h5py.File(root / "s2.h5", "r+") as file:
        del file["coords"]
        file["coords"] = np.zeros((2, 2))


def damage_npz(root):
    npz(root)
    (root / "s2.npz").write_bytes(b"PK\x03\x04 cut off")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"s2\.h5: not a complete HDF5 file \(truncated, or still being written\?\)"),
        (
            damage_missing_key,
            r"s1\.a\.h5: expected a data set named features or feats or feat, found coords, embeddings",
        ),
        (damage_empty, r"s2\.h5, 'features': a bag with no instances, shape \(0, 6\)"),
        (damage_nan, r"not finite: 1\n    s2: nan at instance 3, feature 2\n"),
        (damage_infinity, r"not finite: 1\n    s3: inf at instance 0, feature 5\n"),
        (damage_width, r"another width: 1\n    s4: 9 features per instance, most bags have 6\n"),
        (damage_pickle, r"s2\.pt: expected a tensor \(instances, features\), or a dict of tensors"),
        (damage_not_tensors, r"s2\.pt: expected a tensor .*found list"),
        (damage_slide_embedding, r"s2\.h5, 'features': expected \(instances, features\), found one vector \(6,\)"),
        (damage_coords, r"s2\.h5, 'coords': expected 7 rows as in 'features', found 2"),
        (damage_npz, r"s2\.npz: not a complete \.npz file"),
    ],
)
def test_damaged_bags(damage, message, tmp_path, labels):
    damage(tmp_path / "bags")
    bags = open_bags(tmp_path / "bags", labels)
    with pytest.raises(DataError, match=message):
        raise_problems(check_bags(bags, cache=False).problems)
    if damage not in (damage_nan, damage_infinity, damage_width):  # what a reader cannot read
        with pytest.raises(DataError, match=message):
            list(bags)


def test_another_width_is_never_trained_on(tmp_path, labels):
    damage_width(tmp_path / "bags")
    with pytest.raises(DataError, match=r"s4\.h5: bag 's4' has 9 features per instance, expected 6 as in 's1\.a'"):
        list(open_bags(tmp_path / "bags", labels))


def test_a_file_that_vanishes(tmp_path, labels):
    write_h5(tmp_path / "bags")
    bags = open_bags(tmp_path / "bags", labels)
    (tmp_path / "bags" / "s2.h5").unlink()
    with pytest.raises(DataError, match=r"s2\.h5: no such file \(bag s2\)"):
        list(bags)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such file or folder"),
        (lambda root: root.mkdir(), "found no bags of features"),
        (lambda root: (root / "patches").mkdir(parents=True), "found no bags of features"),
        (lambda root: (write_h5(root), (root / "x.pt").touch()), r"expected bags in one format, found \.h5, \.pt"),
        (lambda root: root.write_text("hello"), r"expected a folder of bags, or one \.h5, \.data"),
    ],
)
def test_unusable_places(make, message, tmp_path):
    make(tmp_path / "bags")
    with pytest.raises(DataError, match=message):
        find_bags(tmp_path / "bags")


def test_coordinates_only(tmp_path, labels):
    (tmp_path / "patches").mkdir()
    for name in FEATURES:
        with h5py.File(tmp_path / "patches" / f"{name}.h5", "w") as file:
            file["coords"] = COORDS[name]
    with pytest.raises(DataError, match="found coords .a file of coordinates only, such as CLAM's patches/"):
        list(open_bags(tmp_path / "patches", labels))


def test_bad_text_files(tmp_path):
    (tmp_path / "a.data").write_text("m,c,1,2,1.\nm,c,1,1.\n")
    with pytest.raises(DataError, match="a.data, line 2: expected bag, instance, features, class"):
        open_bags(tmp_path / "a.data")
    (tmp_path / "b.csv").write_text("slide_id,label\nx,1\n")
    with pytest.raises(DataError, match="A table of labels belongs to --labels"):
        open_bags(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("1,7,0\n0,7,1\n")
    with pytest.raises(DataError, match="bag '7' has several labels: 0, 1"):
        open_bags(tmp_path / "c.csv")
