"""What files say of how features were made is read for every layout; what they do not say stays unknown."""

import h5py
import numpy as np
import pytest
import torch

from classact.data import DataError
from classact.data.bag_files import find_bags
from classact.data.provenance import Provenance, provenance, read_patches, summarise

X, COORDS = np.zeros((3, 4), dtype=np.float32), np.array([[0, 0], [512, 0], [0, 512]])


def write(path, attributes=None, features="features", **parts):
    """A file with data sets and attributes of each; the key "" means the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = COORDS
        if features:
            file[features] = X
        for part, values in (attributes or {}).items():
            (file[part] if part else file).attrs.update(values)
        for name, values in parts.items():
            file[name] = values


# the attributes as the tools write them
TRIDENT = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "s1.a",
    "savetodir": "20x_256px_0px_overlap",
    "level0_width": 90_000,
    "level0_height": 60_001,
}
CLAM = {
    "patch_size": 256,
    "patch_level": 1,
    "downsample": (4.0001, 3.9999),
    "downsampled_level_dim": (22_500, 15_000),
    "level_dim": (22_500, 15_000),
    "name": "s1.a",
    "save_path": "patches",
}
STAMP = {
    "stamp_version": "2.4.0",
    "extractor": "virchow2",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "code_hash": "0123abcd",
    "feat_type": "tile",
}


def only(path, encoder=None):
    (source,) = find_bags(path, encoder).sources
    return provenance(source)


def test_trident_by_attributes(tmp_path):
    file = tmp_path / "20x_256px_0px_overlap" / "features_uni_v1" / "s1.a.h5"
    write(file, {"features": {"name": "s1.a", "savetodir": "x", "encoder": "uni_v1"}, "coords": TRIDENT})
    assert only(tmp_path) == Provenance("uni_v1", 512.0, 20.0, "pixel")


def test_trident_by_its_folders_says_nothing_of_level_0(tmp_path):
    write(tmp_path / "2.5x_256px_0px_overlap" / "features_conch_v15" / "s1.a.h5", {"features": {"encoder": "None"}})
    assert only(tmp_path) == Provenance("conch_v15", None, 2.5, None)


@pytest.mark.parametrize("suffix", ["h5", "pt"])
def test_trident_by_its_patches(tmp_path, suffix):
    root = tmp_path / "20x_256px_0px_overlap"
    if suffix == "h5":
        write(root / "features_uni_v1" / "s1.a.h5")
    else:
        (root / "features_uni_v1").mkdir(parents=True)
        torch.save(torch.from_numpy(X), root / "features_uni_v1" / "s1.a.pt")
    write(root / "patches" / "s1.a_patches.h5", {"coords": TRIDENT | {"target_magnification": 10}}, features=None)
    assert only(tmp_path) == Provenance("uni_v1", 512.0, 10.0, "pixel")  # attributes beat names of folders


@pytest.mark.parametrize("patches", ["features/patches", "patches"])
@pytest.mark.parametrize(("folder", "encoder"), [("h5_files", None), ("pt_files", None), ("pt_files/uni", "uni")])
def test_clam(tmp_path, patches, folder, encoder):
    if folder == "h5_files":
        write(tmp_path / "features" / folder / "s1.a.h5")
    else:
        (tmp_path / "features" / folder).mkdir(parents=True)
        torch.save(torch.from_numpy(X), tmp_path / "features" / folder / "s1.a.pt")
    assert only(tmp_path / "features") == Provenance(encoder)
    write(tmp_path / patches / "s1.a.h5", {"coords": CLAM}, features=None)
    assert only(tmp_path / "features") == Provenance(encoder, 1024.0, None, "pixel")


@pytest.mark.parametrize(
    ("change", "side"),
    [
        ({"patch_level": 0, "downsample": (1.0, 1.0)}, 256.0),
        ({"patch_level": 0, "downsample": None}, 256.0),
        ({"patch_level": 2, "downsample": None}, None),  # the factor of level 2 is not said
        ({"custom_downsample": 2}, 2048.0),
        ({"patch_size": None}, None),
    ],
)
def test_side_of_clams_tiles(tmp_path, change, side):
    attributes = {k: v for k, v in (CLAM | change).items() if v is not None}
    write(tmp_path / "p.h5", {"coords": attributes}, features=None)
    assert read_patches(tmp_path / "p.h5")[0] == Provenance(None, side, None, "pixel")


def test_size_of_the_slide(tmp_path):
    write(tmp_path / "t.h5", {"coords": TRIDENT}, features=None)
    assert read_patches(tmp_path / "t.h5")[1] == (90_000.0, 60_001.0)
    # CLAM's factors are those of the two sizes: 90,001 x 59,998 over 22,500 x 15,000
    exact = CLAM | {"downsample": (90_001 / 22_500, 59_998 / 15_000)}
    write(tmp_path / "c.h5", {"coords": exact}, features=None)
    assert read_patches(tmp_path / "c.h5")[1] == (90_001.0, 59_998.0)
    write(tmp_path / "n.h5", features=None)
    assert read_patches(tmp_path / "n.h5") == (Provenance(), None)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (STAMP, Provenance("virchow2", 256.0, None, "um")),
        ({"extractor": "uni", "unit": "um", "tile_size": 256.0}, Provenance("uni", 256.0, None, "um")),  # 2.0
        ({"extractor": "ctp"}, Provenance("ctp")),  # 1.x: pixels of its own
        ({"extractor": "ctp", "tile_size": 224}, Provenance("ctp")),
    ],
)
def test_stamp(tmp_path, attributes, expected):
    write(tmp_path / "s1.a.h5", {"": attributes}, features="feats")
    assert only(tmp_path) == expected


def test_a_group_in_one_file(tmp_path):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for name in "ab":
            file[f"{name}/feat"], file[f"{name}/coords"] = X, COORDS
        file["b/coords"].attrs.update(TRIDENT)
    a, b = (provenance(source) for source in find_bags(tmp_path / "all.h5").sources)
    assert a == Provenance()
    assert b == Provenance(None, 512.0, 20.0, "pixel")


def test_nothing_is_derived_from_the_distances_of_tiles(tmp_path):
    write(tmp_path / "s.h5", {"coords": {"patch_size": 256}})  # at which magnification?
    assert only(tmp_path) == Provenance()
    np.savez(tmp_path / "t.npz", features=X, coords=COORDS)
    (tmp_path / "s.h5").unlink()
    assert only(tmp_path) == Provenance()
    (tmp_path / "m.csv").write_text("1,1,0.5\n1,1,0.25\n0,2,0.5\n")
    assert {provenance(source) for source in find_bags(tmp_path / "m.csv").sources} == {Provenance()}


def test_damaged_file(tmp_path):
    (tmp_path / "s.h5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match=r"s\.h5: not a complete HDF5 file"):
        only(tmp_path)


def test_summary():
    same = Provenance("uni", 512.0, 20.0, "pixel")
    assert summarise([same, same]) == {"encoder": "uni", "patch_size": 512.0, "magnification": 20.0, "unit": "pixel"}
    mixed = summarise([same, Provenance("uni", 1024.0, None, "pixel"), Provenance("uni", 256.0, None, None)])
    assert mixed == {
        "encoder": "uni",
        "patch_size": [256.0, 512.0, 1024.0],
        "magnification": [None, 20.0],
        "unit": [None, "pixel"],
    }
    assert summarise([]) == dict.fromkeys(mixed)
