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

from classact.evidence import executors
from classact.evidence.executors import Job, gpus_for, run_jobs
from classact.evidence.store import Store, StudyError

# importing torch would take most of the time
TORCH = "def get_num_threads():\n    return 1\n\ndef set_num_threads(number):\n    pass\n"

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
    jobs = [Job(f"c{i}", (i,)) for i in range(int(sys.argv[3]))]
    with Store(sys.argv[1], {"study": 1}) as store:
        values = run_jobs(cell, 0.5, jobs, store, workers=int(sys.argv[2]), quiet=True)
        arrays = b"".join(store.arrays(job.key)["array"].tobytes() for job in jobs)
    print(hashlib.sha256(repr(values).encode() + arrays).hexdigest())
"""


def start(folder, workers, cells):
    return subprocess.Popen(
        [sys.executable, folder.parent / "study.py", str(folder), str(workers), str(cells)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("workers", "kills", "cells"), [(1, 3, 40), (2, 2, 40), pytest.param(2, 20, 800, marks=pytest.mark.ray)]
)
def test_killed_and_resumed(tmp_path, workers, kills, cells):
    """The twenty kills take too long for every run of the tests; they run with those of Ray."""
    (tmp_path / "study.py").write_text(SCRIPT)
    (tmp_path / "torch.py").write_text(TORCH)
    undisturbed = start(tmp_path / "a", workers, cells).communicate()[0]
    rng = random.Random(workers)
    written = tmp_path / "b" / "cells"
    killed = 0
    for attempt in range(kills):
        process = start(tmp_path / "b", workers, cells)
        count = len(list(written.glob("*.json")))
        deadline = time.monotonic() + 30
        # wait until it has written something new, then kill it at a random moment; every fourth at any moment
        while process.poll() is None and time.monotonic() < deadline and attempt % 4 != 3:
            if len(list(written.glob("*.json"))) > count:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * (0.08 if attempt % 4 != 3 else 2))
        if process.poll() is None:
            killed += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if files := sorted(written.glob("*.npz")):
        files[0].write_bytes(b"damaged")
    assert start(tmp_path / "b", workers, cells).communicate()[0] == undisturbed != ""
    assert killed == kills


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
    (tmp_path / "torch.py").write_text(TORCH)
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


@pytest.fixture
def quick_workers(tmp_path, monkeypatch):
    """Let workers import a stand-in for torch."""
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_killed_worker_loses_its_cell_only(tmp_path, capsys, quick_workers):
    def cell(folder, number):
        started = folder / f"c{number}"
        with started.open("a") as file:
            file.write("started\n")
        if number == 2 and len(started.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * 2, {"x": np.full(3, number)}

    jobs = [Job(f"c{i}", (i,)) for i in range(6)]
    with Store(tmp_path / "s", {}) as store:
        values = run_jobs(cell, tmp_path, jobs, store, workers=2, quiet=True)
        assert values == {f"c{i}": i * 2 for i in range(6)}
        np.testing.assert_array_equal(store.arrays("c2")["x"], np.full(3, 2))
    assert [len((tmp_path / f"c{i}").read_text().splitlines()) for i in range(6)] == [1, 1, 2, 1, 1, 1]
    assert capsys.readouterr().err == "cell c2 lost its worker (TerminatedWorkerError) and runs again\n"


def test_a_cell_that_always_loses_its_worker_is_given_up(tmp_path, capsys, quick_workers):
    def cell(_shared, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number, {}

    jobs = [Job(f"c{i}", (i,)) for i in range(4)]
    with Store(tmp_path / "s", {}) as store:
        with pytest.raises(StudyError, match=r"cell c1 lost its worker 4 times .* In flight were c1.* fewer --workers"):
            run_jobs(cell, None, jobs, store, workers=2, quiet=True)
        assert store.read("c0")["values"] == 0
    assert capsys.readouterr().err.count("cell c1 lost its worker") == executors.LOKY_LOSSES == 3


def test_every_worker_has_a_gpu_of_its_own(tmp_path, quick_workers):
    def cell(_shared, _number):
        time.sleep(0.3)
        return [os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()], {}

    jobs = [Job(f"c{i}", (i,)) for i in range(8)]
    with Store(tmp_path / "s", {}) as store:
        seen = run_jobs(cell, None, jobs, store, workers=3, quiet=True, gpus=["3", "GPU-5a"]).values()
    assert {gpu for gpu, _ in seen} == {"3", "GPU-5a"}
    assert len({process for _, process in seen}) == len({tuple(pair) for pair in seen}) == 2


def test_gpus_for_workers(monkeypatch):
    assert gpus_for("cpu", 8, False) is None
    assert gpus_for("cuda:1", 8, False) is None
    assert gpus_for("cuda", 8, True) is None
    assert gpus_for("cuda", 2, False, ["0", "1", "2"]) == ["0", "1", "2"]
    with pytest.raises(StudyError, match=r"--workers 3: .* only 2 can be seen; use --workers 2, or --share-gpu"):
        gpus_for("cuda", 3, False, ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5a")
    assert gpus_for("cuda", 2, False) == ["4", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(StudyError, match="--device cuda: no GPU is visible"):
        gpus_for("cuda", 1, False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus_for("cuda", 1, False) == ["0", "1"]
