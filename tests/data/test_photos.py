"""Image files as people have them, and files that hide something."""

import numpy as np
import pytest
from PIL import Image

from classact.data.bag_files import DataError
from classact.data.photos import class_folders, list_photos, read_photo


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_lossless_formats_are_read_as_they_are(tmp_path, picture, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(picture).save(tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(read_photo(tmp_path / f"a.{suffix}"), picture)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(tmp_path, picture, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "a.png"), turn(picture))


def test_grey_palette_and_alpha_become_rgb(tmp_path, picture):
    grey = picture[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_photo(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(picture).quantize(8).save(tmp_path / "palette.png")
    assert read_photo(tmp_path / "palette.png").shape == picture.shape
    clear = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    assert (read_photo(tmp_path / "alpha.png") == 255).all(), "transparent is shown on white"


def test_sixteen_bits_are_scaled_from_their_full_range(tmp_path):
    deep = np.array([[0, 257, 65535], [32768, 1000, 128]], np.uint16)
    for suffix in ("png", "tiff"):
        Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
        assert np.array_equal(read_photo(tmp_path / f"deep.{suffix}")[..., 1], np.round(deep / 257).astype(np.uint8))


def test_floating_point_images_must_lie_in_the_unit_interval(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tiff")
    assert read_photo(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0.0, 7.0]], np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match=r"b\.tiff: expected floating-point values in \[0, 1\], found 0 to 7"):
        read_photo(tmp_path / "b.tiff")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (30_000, 10_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1_000_000
    with pytest.raises(DataError, match=r"bomb\.png: .*over the limit of 178,956,970"):
        read_photo(tmp_path / "bomb.png")
    Image.new("L", (200, 100)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="200 x 100 pixels are over the limit of 10,000"):
        read_photo(tmp_path / "small.png", max_pixels=10_000)


def test_damaged_files_are_named(tmp_path, picture):
    Image.fromarray(np.tile(picture, (20, 20, 1))).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(DataError, match=f"{name}: not a readable image"):
            read_photo(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_photo(tmp_path / "missing.jpg")


def test_files_of_a_folder_and_their_classes(tmp_path, picture):
    for name in ("cat/1.png", "cat/2.JPG", "dog/1.png", ".hidden/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    files = list_photos(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["cat/1.png", "cat/2.JPG", "dog/1.png"]
    assert class_folders(tmp_path, files) == ["cat", "cat", "dog"]
    assert class_folders(tmp_path / "cat", list_photos(tmp_path / "cat")) is None
    assert list_photos(files[0]) == [files[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image files"):
        list_photos(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        list_photos(tmp_path / "nowhere")
