"""A whole comparison, killed again and again, ends as an undisturbed one; so does one on a local Ray.

Marked ``ray`` since it takes minutes: every start of a driver imports everything anew.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.ray

SCRIPT = """
import sys
import classact
from classact.data import digits_bags

if __name__ == "__main__":
    out, workers, ray = sys.argv[1:]
    classact.compare(
        "mil", digits_bags(40), ["mean", "abmil", "acmil+aem"], out=out, folds=4, repeats=2, tune=2, fractions=[0.5, 1],
        options={"epochs": 8, "lr": 1e-3, "batch_size": 2}, workers=int(workers), ray=ray or None, quiet=True,
    )
"""


def start(script, out, workers, ray):
    words = [sys.executable, str(script), str(out), str(workers), ray]
    return subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True)


def results(out):
    return json.dumps(json.loads((out / "comparison.json").read_text())["results"], sort_keys=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.py").write_text(SCRIPT)
    process = start(folder / "study.py", folder / "whole", 1, "")
    assert process.wait() == 0, process.stderr.read()
    return folder, results(folder / "whole")


@pytest.mark.parametrize("where", ["workers", "ray"])
def test_killed_twenty_times(where, undisturbed):
    folder, expected = undisturbed
    address = ""
    if where == "ray":
        ray = pytest.importorskip("ray")
        address = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False).address_info["address"]
    try:
        out = folder / where
        cells, kills, rng = out / "cells", 0, random.Random(0)
        for _ in range(20):
            process = start(folder / "study.py", out, 2, address)
            count = len(list(cells.glob("*.json"))) if cells.exists() else 0
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if cells.exists() and len(list(cells.glob("*.json"))) > count:
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            kills += process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process = start(folder / "study.py", out, 2, address)
        assert process.wait() == 0, process.stderr.read()
        assert results(out) == expected
        assert kills >= 10, kills
    finally:
        if where == "ray":
            ray.shutdown()
