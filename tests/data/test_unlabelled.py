import numpy as np
import pytest
from PIL import Image

from classact.data.bag_files import DataError
from classact.data.unlabelled import load_unlabelled


def write(path, text):
    path.write_text(text)
    return path


def test_digits_hide_five_classes():
    table, images = load_unlabelled("digits"), load_unlabelled("digits", images=True)
    assert table.x.shape == (1797, 64) and images.x.shape == (1797, 1, 8, 8)
    assert set(table.y.tolist()) == {-1, 0, 1, 2, 3, 4} and table.classes == ("0", "1", "2", "3", "4")
    assert set(table.truth[table.unlabelled]) == set("56789")
    np.testing.assert_allclose(images.x.reshape(-1, 64) * 16, table.x)


def test_table_with_gaps(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,label,kind\n1,2,x,x\n3,4,,q\n5,6,y,y\n7,8,-1,r\n")
    found = load_unlabelled(path, truth="kind")
    assert found.y.tolist() == [0, -1, 1, -1] and found.classes == ("x", "y") and found.columns == ("a", "b")
    assert found.truth.tolist() == ["x", "q", "y", "r"] and found.items == ("1", "2", "3", "4")
    numbers = write(tmp_path / "n.csv", "a,class\n1,3\n2,\n3,4\n")
    assert load_unlabelled(numbers).classes == ("3", "4")


def test_folder_of_images(tmp_path):
    for name, files in {"cat": ["1", "2"], "dog": ["3"], "unlabelled": ["4", "5"]}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (12, 9), (int(file) * 20, 0, 0)).save(tmp_path / "data" / name / f"{file}.png")
    (tmp_path / "truth" / "fox").mkdir(parents=True)
    Image.new("RGB", (12, 9)).save(tmp_path / "truth" / "fox" / "4.png")
    found = load_unlabelled(tmp_path / "data", truth=tmp_path / "truth", size=6)
    assert found.x.shape == (5, 3, 6, 6) and found.y.tolist() == [0, 0, 1, -1, -1]
    assert found.truth.tolist() == ["cat", "cat", "dog", "fox", None]
    assert found.items[3] == "unlabelled/4.png"
    np.testing.assert_allclose(found.x[3, 0], 80 / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,label\n1,\n2,\n", {}, "expected at least one labelled item, found none"),
        ("a,b,label\n1,red,x\n2,blue,\n", {}, "columns that are not numbers: b;.*OneHotEncoder"),
        ("a,b,label\n1,,x\n2,3,\n", {}, "missing or infinite values, by column: {'b': 1};.*SimpleImputer"),
        ("a,b\n1,2\n", {}, r"no column label, target, class, y \(--label\); there are a, b"),
        ("a,label\n1,x\n", {"truth": "kind"}, r"no column kind \(--truth\)"),
        ("label\nx\n", {}, "no column besides label"),
    ],
)
def test_bad_tables(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        load_unlabelled(write(tmp_path / "t.csv", text), **options)


def test_bad_places(tmp_path):
    with pytest.raises(DataError, match="expected digits, a .csv or .parquet table"):
        load_unlabelled(tmp_path / "none")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="expected a folder unlabelled beside those of the classes"):
        load_unlabelled(tmp_path)


def test_constant_columns_are_named(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,c,label\n1,5,7,x\n2,5,7,\n3,5,7,y\n")
    with pytest.warns(UserWarning, match="the same in every row: b, c$"):
        assert load_unlabelled(path).x.shape == (3, 3)


def test_classes_are_hidden_on_request(tmp_path):
    found = load_unlabelled("digits", hide=["3", "7"], limit=300)
    assert found.classes == ("0", "1", "2", "4", "5", "6", "8", "9")
    assert len(found.y) == len(found.items) == len(found.truth) == 300
    assert set(found.truth[found.unlabelled]) == {"3", "7"}
    assert all(found.classes[k] == name for k, name in zip(found.y, found.truth, strict=True) if k >= 0)
    again = load_unlabelled("digits", hide=["3", "7"], limit=300)
    assert again.items == found.items
    path = write(tmp_path / "t.csv", "a,label\n1,x\n2,y\n3,z\n4,\n")
    table = load_unlabelled(path, hide=["y"])
    assert table.classes == ("x", "z") and table.y.tolist() == [0, -1, 1, -1]
    assert table.truth.tolist() == ["x", "y", "z", None]
    np.savez(tmp_path / "images.npz", x=np.zeros((6, 4, 4), np.uint8), y=[0, 1, 2, 0, 1, 2])
    images = load_unlabelled(tmp_path / "images.npz", hide=["2"])
    assert images.x.shape == (6, 1, 4, 4) and images.classes == ("0", "1")


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hide": ["11"]}, "hide: no class 11; there are 0, 1"),
        ({"hide": ["1"], "truth": "kind"}, "hide, truth: expected one of them"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(DataError, match=message):
        load_unlabelled("digits", **options)
