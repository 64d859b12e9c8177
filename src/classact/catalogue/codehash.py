"""Hash of the code behind a result, so that a result made by other code is seen to be stale.

It covers the syntax tree (no comments, no docstrings, no positions) of a module and of every classact module it
imports, transitively, except evidence, cli and catalogue. Nothing is imported: files are only parsed.
"""

import ast
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
EXCLUDED = ("classact.evidence", "classact.cli", "classact.catalogue")


def code_hash(module: str, package: Path = PACKAGE) -> str:
    """Hash of a module such as ``classact.reproductions.mil.acmil``.

    Raises
    ------
    FileNotFoundError
        If there is no such module.
    """
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found or name.startswith(EXCLUDED):
            continue
        file = _file(name, package)
        if file is None:
            msg = f"no module {name} under {package}"
            raise FileNotFoundError(msg)
        digest, imports = _parse(file, file.stat().st_mtime_ns)
        found[name] = digest
        for base, member in imports:
            todo += _targets(base, member, package)
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _file(name: str, package: Path) -> Path | None:
    path = package.joinpath(*name.split(".")[1:])
    if path.is_dir() and (path / "__init__.py").exists():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def _targets(base: str, member: str | None, package: Path) -> list[str]:
    """Modules behind ``import base`` or ``from base import member``, through the lazy exports of a package."""
    if base.split(".", maxsplit=1)[0] != "classact":
        return []
    if member is not None:
        if _file(f"{base}.{member}", package):
            return [f"{base}.{member}"]
        stub = package.joinpath(*base.split(".")[1:], "__init__.pyi")
        if stub.exists():
            for node in ast.walk(ast.parse(stub.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and any(alias.name == member for alias in node.names):
                    return [f"{base}.{node.module}"]
    return [base] if _file(base, package) else []


@lru_cache(maxsize=2048)
def _parse(file: Path, _modified: int) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports += [(node.module, alias.name) for alias in node.names]
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            assert isinstance(body, list)
            del body[0]
    return hashlib.sha256(_text(tree).encode()).hexdigest(), tuple(imports)


def _text(node: Any) -> str:
    """Write a syntax tree in a form that is the same in every Python version: empty fields are left out."""
    if isinstance(node, ast.AST):
        fields = (
            (name, value)
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name != "type_comment"
        )
        return f"{type(node).__name__}({','.join(f'{name}={_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    return repr(node)
