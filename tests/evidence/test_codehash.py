import pytest

from classact.catalogue.codehash import code_hash


@pytest.fixture
def package(tmp_path):
    for folder in ("mil", "evidence", "reproductions"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "mil" / "__init__.pyi").write_text("from .model import Net\n")
    (tmp_path / "mil" / "model.py").write_text('"""Doc."""\nfrom classact.mil.deep import f\nclass Net:\n    x = f\n')
    (tmp_path / "mil" / "deep.py").write_text("def f(a):\n    return a + 1\n")
    (tmp_path / "mil" / "other.py").write_text("unused = 1\n")
    (tmp_path / "evidence" / "stats.py").write_text("y = 1\n")
    (tmp_path / "reproductions" / "p.py").write_text(
        "from classact.mil import Net\nfrom classact.evidence.stats import y\nrun = Net\n"
    )
    return tmp_path


def change(path, text):
    path.write_text(text)


CHANGES = {
    "a comment and a docstring": ("mil/deep.py", '# why\ndef f(a):\n    """Add."""\n\n    return a + 1\n', False),
    "evidence": ("evidence/stats.py", "y = 2\n", False),
    "a module that is not imported": ("mil/other.py", "unused = 2\n", False),
    "code, behind a lazy export and one more import": ("mil/deep.py", "def f(a):\n    return a + 2\n", True),
    "the reproduction": ("reproductions/p.py", "from classact.mil import Net\nrun = Net()\n", True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_hash_changes_with_the_code_that_is_used(package, what):
    file, text, differs = CHANGES[what]
    before = code_hash("classact.reproductions.p", package)
    (package / file).write_text(text)
    assert (code_hash("classact.reproductions.p", package) != before) == differs


def test_missing_module(package):
    with pytest.raises(FileNotFoundError, match=r"no module classact\.reproductions\.q"):
        code_hash("classact.reproductions.q", package)
