"""Imports point downwards only, and families do not import each other."""

import ast
from pathlib import Path

import pytest

import classact

ROOT = Path(classact.__file__).parent
FAMILIES = {
    "explain", "probe", "mil", "discover", "continual", "supervision", "transfer", "segment", "signals", "recommend",
    "rules", "theory",
}  # fmt: skip
# lower number = higher room; a module may import rooms with a higher number, and its own
LEVEL = {"cli": 0, "reproductions": 1, "tasks": 1, "evidence": 2, **dict.fromkeys(FAMILIES, 2)}
LEVEL |= {"data": 3, "training": 3, "saving": 3, "catalogue": 3, "version": 3, "nn": 4}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def room(dotted):
    return dotted.split(".")[1] if "." in dotted else ""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "classact":
            names = [node.module] if node.module != "classact" else [f"classact.{a.name}" for a in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("classact."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        other = room(name)
        if other == own:
            continue
        assert LEVEL[other] > LEVEL[own], f"{path.relative_to(ROOT)} imports {name}"


def test_this_test_would_notice(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from classact.cli import main\nimport classact.mil.acmil\nfrom classact import load\n")
    assert list(imported(file)) == ["classact.cli", "classact.mil.acmil", "classact.load"]


@pytest.mark.parametrize(
    "package", ["", *(p.parent.relative_to(ROOT).as_posix() for p in ROOT.rglob("*/__init__.pyi"))]
)
def test_every_lazy_export_exists(package):
    import importlib

    module = importlib.import_module(".".join(["classact", *filter(None, package.split("/"))]))
    for name in module.__all__:
        assert getattr(module, name) is not None
