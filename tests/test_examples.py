"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import classact

ROOT = Path(classact.__file__).parent
MODULES = [
    ".".join(("classact", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    globs = dict(vars(module))
    finder = doctest.DocTestFinder()
    failed = attempted = 0
    for test in finder.find(module, name, globs=globs):
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        failed, attempted = failed + result.failed, attempted + result.attempted
    assert attempted
    assert not failed


def test_every_paper_shows_how_to_use_it():
    for name in ("classact.mil.acmil", "classact.mil.aem"):
        assert name in MODULES
