"""A study killed at any moment and run again ends as an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from classact.evidence.executors import Job, run_jobs
from classact.evidence.store import Store, StudyError

SCRIPT = """
import hashlib, sys, time
import numpy as np
from classact.evidence.executors import Job, run_jobs
from classact.evidence.store import Store

def cell(shared, number):
    rng = np.random.default_rng(number)
    time.sleep(0.03)
    return {"value": float(rng.normal()) + shared}, {"array": rng.normal(size=20)}

if __name__ == "__main__":
    jobs = [Job(f"c{i}", (i,)) for i in range(20)]
    with Store(sys.argv[1], {"study": 1}) as store:
        values = run_jobs(cell, 0.5, jobs, store, workers=int(sys.argv[2]), quiet=True)
        arrays = b"".join(store.arrays(job.key)["array"].tobytes() for job in jobs)
    print(hashlib.sha256(repr(values).encode() + arrays).hexdigest())
"""


def start(folder, workers=1):
    return subprocess.Popen(
        [sys.executable, folder.parent / "study.py", str(folder), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed(tmp_path, workers):
    (tmp_path / "study.py").write_text(SCRIPT)
    undisturbed = start(tmp_path / "a").communicate()[0]
    rng = random.Random(workers)
    cells = tmp_path / "b" / "cells"
    kills = 0
    for _ in range(4 - workers):
        process = start(tmp_path / "b", workers)
        count = len(list(cells.glob("*.json"))) if cells.exists() else 0
        deadline = time.monotonic() + 30
        # wait until it has written something new, then kill it at a random moment
        while process.poll() is None and time.monotonic() < deadline:
            if cells.exists() and len(list(cells.glob("*.json"))) > count:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.08)
        if process.poll() is None:
            kills += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if cells.exists() and (files := sorted(cells.glob("*.npz"))):
        files[0].write_bytes(b"damaged")
    assert start(tmp_path / "b", workers).communicate()[0] == undisturbed != ""
    assert kills >= 1


def double(shared, number):
    if number == shared:
        raise ArithmeticError("planted")
    return number * 2, {}


def test_a_failing_cell_is_named_and_the_finished_ones_are_kept(tmp_path):
    jobs = [Job(f"c{i}", (i,)) for i in range(4)]
    with Store(tmp_path / "s", {}) as store:
        with pytest.raises(StudyError, match="cell c2 failed: ArithmeticError: planted"):
            run_jobs(double, 2, jobs, store, quiet=True)
        assert store.read("c1")["values"] == 2
        assert list(run_jobs(double, None, jobs, store, quiet=True).values()) == [0, 2, 4, 6]


def interrupt(_shared, number):
    if number == 1:
        raise KeyboardInterrupt
    return number, {}


def test_ctrl_c_leaves_a_resumable_study(tmp_path):
    jobs = [Job(f"c{i}", (i,)) for i in range(3)]
    with Store(tmp_path / "s", {}) as store:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(interrupt, None, jobs, store, quiet=True)
        assert store.read("c0") is not None
    with Store(tmp_path / "s", {}) as store:
        assert list(run_jobs(double, None, jobs, store, quiet=True)) == ["c0", "c1", "c2"]


def threads(_shared, _number):
    import torch

    return torch.get_num_threads(), {"x": np.ones(1)}


def test_every_cell_runs_with_one_thread_and_the_number_is_restored(tmp_path):
    import torch

    torch.set_num_threads(2)
    try:
        with Store(tmp_path / "s", {}) as store:
            assert run_jobs(threads, None, [Job("a", (0,))], store, quiet=True) == {"a": 1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_progress_in_plain_lines(tmp_path, capsys):
    with Store(tmp_path / "s", {}) as store:
        run_jobs(double, None, [Job(f"c{i}", (i,)) for i in range(3)], store, title="study")
        run_jobs(double, None, [Job(f"c{i}", (i,)) for i in range(4)], store, title="study")
    said = capsys.readouterr().err
    assert "study: 1/3 cells, about 0 s left" in said
    assert "study: 3/3 cells" in said
    assert "study: 3 of 4 cells are there already" in said


def test_a_damaged_cell_is_reported_and_computed_again(tmp_path, capsys):
    jobs = [Job("a", (3,))]
    with Store(tmp_path / "s", {}) as store:
        run_jobs(double, None, jobs, store, quiet=True)
        (tmp_path / "s" / "cells" / "a.json").write_text("{")
        assert run_jobs(double, None, jobs, store, quiet=True) == {"a": 6}
    assert "cell a was damaged and is computed again" in capsys.readouterr().err


ORPHANS = """
import os, sys, time
from pathlib import Path
from classact.evidence.executors import Job, run_jobs
from classact.evidence.store import Store

def cell(folder, number):
    Path(folder, f"pid{os.getpid()}").touch()
    time.sleep(60)
    return number, {}

if __name__ == "__main__":
    with Store(sys.argv[1] + "/s", {}) as store:
        run_jobs(cell, sys.argv[1], [Job("a", (0,)), Job("b", (1,))], store, workers=2, quiet=True)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_workers_end_with_their_driver(tmp_path):
    (tmp_path / "study.py").write_text(ORPHANS)
    driver = subprocess.Popen([sys.executable, tmp_path / "study.py", str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(pids := [int(p.name[3:]) for p in tmp_path.glob("pid*")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.kill()
    driver.wait()

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(pids) == 2
    assert not any(map(alive, pids))
