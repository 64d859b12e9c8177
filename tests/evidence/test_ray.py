"""Studies on a Ray cluster: same values as in this process, whatever is lost on the way."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from classact.evidence.executors import RAY_LOSSES, Job, run_jobs
from classact.evidence.store import Store, StudyError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes, of which the first does not compute."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    started.add_node(num_cpus=3, num_gpus=2)
    yield started
    started.shutdown()


@pytest.fixture
def run(cluster, tmp_path):
    """Run jobs on the cluster; return their values and arrays."""

    def call(cell, shared, count, name="study", **options):
        jobs = [Job(f"c{i}", (i,)) for i in range(count)]
        with Store(tmp_path / name, {}) as store:
            values = run_jobs(cell, shared, jobs, store, quiet=True, **{"ray": cluster.address} | options)
            return values, {job.key: store.arrays(job.key) for job in jobs}

    yield call
    assert not ray.is_initialized()


# Cells are nested functions, which reach the workers by value: they cannot import a module of tests.


def test_same_values_as_in_this_process_and_one_thread(run, tmp_path, monkeypatch):
    def cell(shared, number):
        import torch

        rng = np.random.default_rng(number)
        value = float((torch.tensor(rng.normal(size=1000)) * shared["x"]).sum())
        threads = [torch.get_num_threads(), os.environ["MKL_NUM_THREADS"]]
        return {"value": value, "threads": threads}, {"a": rng.normal(size=50_000)}

    shared = {"x": np.linspace(0, 1, 1000)}
    values, arrays = run(cell, shared, 6)
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    jobs = [Job(f"c{i}", (i,)) for i in range(6)]
    with Store(tmp_path / "here", {}) as store:
        assert run_jobs(cell, shared, jobs, store, quiet=True) == values
        for key, array in arrays.items():
            np.testing.assert_array_equal(store.arrays(key)["a"], array["a"])
    assert all(v["threads"] == [1, "1"] for v in values.values())


def test_the_study_is_fetched_once_by_each_worker(run):
    def cell(shared, _number):
        time.sleep(0.2)
        shared["cells"] += 1
        return [os.getpid(), shared["cells"]], {}

    values, _ = run(cell, {"cells": 0}, 8, workers=2)
    processes = [process for process, _ in values.values()]
    assert len(set(processes)) == 2
    for process in set(processes):
        assert sorted(n for p, n in values.values() if p == process) == list(range(1, processes.count(process) + 1))


def test_workers_bound_the_cells_in_flight(run):
    def cell(_shared, _number):
        started = time.time()
        time.sleep(0.3)
        return [started, time.time()], {}

    def most(spans):
        return max(sum(a <= start < b for a, b in spans) for start, _ in spans)

    assert most(run(cell, None, 9)[0].values()) == 3
    assert most(run(cell, None, 9, workers=2, name="two")[0].values()) == 2


def test_portable_objects_are_stored_once(run):
    class Data:
        def __init__(self, parts):
            self.parts = parts

        def portable(self, put):
            return [put(part) for part in self.parts]

        def __reduce__(self):
            raise TypeError("the data set itself must not travel")

    def cell(parts, number):
        return float(parts[number]().sum()), {}

    data = Data([np.full(100_000, i) for i in range(4)])
    assert run(cell, data, 4)[0] == {f"c{i}": i * 100_000 for i in range(4)}


def test_a_failing_cell_is_named(run):
    def cell(_shared, number):
        if number == 1:
            raise ArithmeticError("planted")
        return number, {}

    with pytest.raises(StudyError, match="^cell c1 failed: ArithmeticError: planted$"):
        run(cell, None, 3)


def test_a_killed_worker_loses_its_cell_only(run, tmp_path, capsys):
    def cell(folder, number):
        started = folder / f"c{number}"
        with started.open("a") as file:
            file.write("started\n")
        if number == 2 and len(started.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * 2, {}

    assert run(cell, tmp_path, 6)[0] == {f"c{i}": i * 2 for i in range(6)}
    assert [len((tmp_path / f"c{i}").read_text().splitlines()) for i in range(6)] == [1, 1, 2, 1, 1, 1]
    assert capsys.readouterr().err == "cell c2 lost its worker (WorkerCrashedError) and runs again\n"


def test_a_cell_that_always_loses_its_worker_is_given_up(run, capsys):
    def cell(_shared, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number, {}

    with pytest.raises(StudyError, match="cell c1 lost its worker 6 times .*WorkerCrashedError"):
        run(cell, None, 3)
    assert capsys.readouterr().err.count("cell c1 lost its worker") == RAY_LOSSES == 5


def test_a_lost_node_loses_its_cells_only(run, cluster, tmp_path, capfd):
    doomed = cluster.add_node(num_cpus=1)
    doomed_id = doomed.node_id  # the node itself cannot travel

    def cell(folder, number):
        node = ray.get_runtime_context().get_node_id()
        (folder / f"{node}-{number}").touch()
        time.sleep(60 if node == doomed_id else 0.1)
        return number, {}

    def remove():
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"{doomed.node_id}-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)

    removal = threading.Thread(target=remove)
    removal.start()
    try:
        assert run(cell, tmp_path, 6)[0] == {f"c{i}": i for i in range(6)}
    finally:
        removal.join()
    assert capfd.readouterr().err.count("lost its worker (NodeDiedError) and runs again") == 1
    assert len(list(tmp_path.glob("*-*"))) == 7


def test_every_cell_has_a_gpu_of_its_own(run):
    def cell(_shared, _number):
        time.sleep(0.5)
        return os.environ["CUDA_VISIBLE_DEVICES"], {}

    assert set(run(cell, None, 4, gpus=[])[0].values()) == {"0", "1"}


def test_a_module_in_the_current_folder_is_found(run, tmp_path, monkeypatch):
    (tmp_path / "own_methods.py").write_text("def cell(shared, number):\n    return number + shared, {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import own_methods

    assert run(own_methods.cell, 1, 2)[0] == {"c0": 1, "c1": 2}


def test_a_connection_that_was_there_is_used_and_stays(cluster, tmp_path):
    ray.init(cluster.address, log_to_driver=False)
    try:
        with Store(tmp_path / "s", {}) as store:
            jobs = [Job("a", (1,)), Job("b", (2,))]
            assert run_jobs(lambda _, number: (number, {}), None, jobs, store, ray="auto") == {"a": 1, "b": 2}
        assert ray.is_initialized()
    finally:
        ray.shutdown()


LOCAL = """
import sys
import ray
from classact.evidence.executors import Job, run_jobs
from classact.evidence.store import Store, StudyError

def cell(shared, number):
    return ray.get_runtime_context().gcs_address, {}

if __name__ == "__main__":
    jobs = [Job(f"c{i}", (i,)) for i in range(2)]
    with Store(sys.argv[1], {}) as store:
        address = run_jobs(cell, None, jobs[:1], store, ray="local", quiet=True)["c0"]
        try:
            run_jobs(cell, None, jobs, store, ray=address, quiet=True)
        except StudyError as error:
            print(str(error).replace(address, "ADDRESS"))
"""


def test_a_cluster_that_was_started_ends_without_a_word(tmp_path):
    """In a process and a home of its own: Ray asks for a token wherever this process goes once it has started one."""
    script = tmp_path / "study.py"
    script.write_text(LOCAL)
    home = os.environ | {"HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, script, tmp_path / "s"], capture_output=True, text=True, check=True, env=home
    )
    assert said.stdout.startswith("--ray ADDRESS: cannot connect")
    assert said.stderr == ""


def test_an_unusable_cluster_is_named(run):
    with pytest.raises(StudyError, match=r"--ray nonsense: cannot connect"):
        run(len, None, 1, ray="nonsense")
    with pytest.raises(StudyError, match=r"--ray 127.0.0.1:1: cannot connect"):
        run(len, None, 1, ray="127.0.0.1:1")


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
    jobs = [Job(f"c{i}", (i,)) for i in range(400)]
    with Store(sys.argv[1], {"study": 1}) as store:
        values = run_jobs(cell, 0.5, jobs, store, ray=sys.argv[2], quiet=True)
        arrays = b"".join(store.arrays(job.key)["array"].tobytes() for job in jobs)
    print(hashlib.sha256(repr(values).encode() + arrays).hexdigest())
"""


def start(folder, address):
    return subprocess.Popen(
        [sys.executable, folder.parent / "study.py", str(folder), address],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_killed_and_resumed_twenty_times(tmp_path, cluster):
    (tmp_path / "study.py").write_text(SCRIPT)
    undisturbed = start(tmp_path / "a", cluster.address).communicate()[0]
    rng = random.Random(0)
    written = tmp_path / "b" / "cells"
    killed = 0
    for attempt in range(20):
        process = start(tmp_path / "b", cluster.address)
        count = len(list(written.glob("*.json")))
        deadline = time.monotonic() + 60
        # wait until it has written something new, then kill it at a random moment; every fourth at any moment
        while process.poll() is None and time.monotonic() < deadline and attempt % 4 != 3:
            if len(list(written.glob("*.json"))) > count:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * (0.08 if attempt % 4 != 3 else 5))
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "b", cluster.address).communicate()[0] == undisturbed != ""
    assert killed == 20


def test_ctrl_c_cancels_the_cells_in_flight(run, tmp_path):
    def cell(folder, number):
        (folder / f"pid{os.getpid()}").touch()
        time.sleep(0 if number == 0 else 60)
        return number, {}

    def interrupt():
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        signal.raise_signal(signal.SIGINT)

    interruption = threading.Thread(target=interrupt)
    interruption.start()
    with pytest.raises(KeyboardInterrupt):
        run(cell, tmp_path, 4)
    interruption.join()
    assert (tmp_path / "study" / "cells" / "c0.json").exists()
    deadline = time.monotonic() + 20
    while (left := [p for p in tmp_path.glob("pid*") if alive(int(p.name[3:]))]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
