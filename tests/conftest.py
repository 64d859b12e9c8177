"""Run-time checks of the annotated shapes, for tests only; the marker ``bare`` switches them off."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import config, install_import_hook

# an int is a float here, as everywhere in Python's typing
install_import_hook(
    ("classact.discover", "classact.explain", "classact.mil", "classact.nn", "classact.probe", "classact.rules"),
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _shape_checks(request):
    config.update("jaxtyping_disable", request.node.get_closest_marker("bare") is not None)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSACT_STUDIES", str(tmp_path / "studies"))
    monkeypatch.setenv("CLASSACT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def real_data():
    """Skip unless the real data sets are at hand."""
    if not os.environ.get("CLASSACT_DATA"):
        pytest.skip("needs the real data sets: set CLASSACT_DATA")
