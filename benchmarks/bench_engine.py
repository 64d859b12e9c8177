"""Two workers against one on 120 s of work, imports included; overhead of the engine; memory of a large comparison."""

import subprocess
import sys
import time

SCRIPT = """
import sys, time
import torch
from classact.evidence.executors import Job, run_jobs
from classact.evidence.store import Store

def busy(seconds, number):
    x = torch.randn(300, 300)
    end = time.process_time() + seconds
    while time.process_time() < end:
        x = torch.tanh(x @ x)
    return number, {}

if __name__ == "__main__":
    folder, workers, count, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    jobs = [Job(f"c{i}", (i,)) for i in range(count)]
    with Store(folder, {}) as store:
        run_jobs(busy, seconds, jobs, store, workers=workers, quiet=True)
"""


def wall(tmp_path, workers, count, seconds):
    (tmp_path / "work.py").write_text(SCRIPT)
    started = time.perf_counter()
    command = [sys.executable, tmp_path / "work.py", tmp_path / f"w{workers}", *map(str, (workers, count, seconds))]
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def test_two_workers_on_120_seconds_of_work(tmp_path, capsys):
    one, two = (wall(tmp_path, workers, 24, 5.0) for workers in (1, 2))
    with capsys.disabled():
        print(f"\n  120 s of work: {one:.1f} s with one worker, {two:.1f} s with two, {one / two:.2f} times as fast")
        print(f"  overhead of the engine with one worker, imports included: {(one / 120 - 1):.1%}")
    assert one / two >= 1.6
    assert one / 120 - 1 < 0.05


MEMORY = """
import os, resource, sys
import numpy as np
import classact

folder = sys.argv[1]
report = classact.compare("mil", folder, ["abmil"], labels=folder + ".csv", group="slide_id", out=folder + "-report",
                          folds=2, options={"epochs": 1}, quiet=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak)
"""


def test_two_gigabytes_of_bags_in_less_memory(tmp_path, capsys):
    import h5py
    import numpy as np

    folder = tmp_path / "bags"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["slide_id,label"]
    for i in range(200):
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file["features"] = rng.normal(size=(5000, 1024)).astype(np.float16)
        rows.append(f"s{i},{i % 2}")
    (tmp_path / "bags.csv").write_text("\n".join(rows))
    size = sum(f.stat().st_size for f in folder.iterdir())
    said = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)], check=True, capture_output=True, text=True
    ).stdout
    peak = int(said.split()[-1])
    with capsys.disabled():
        print(f"\n  compare with ABMIL on {size / 1e9:.2f} GB of bags: {peak / 1e9:.2f} GB resident at most")
    assert peak < 2e9
