"""Running the cells of a study: in this process, or in loky workers. The driver alone writes cells."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from classact.evidence.store import Store, StudyError

Cell = tuple[Any, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Job:
    """One cell to run: its key in the store, and the arguments of the function that runs it."""

    key: str
    arguments: tuple[Any, ...]


def run_jobs(
    function: Callable[..., Cell],
    shared: Any,
    jobs: Sequence[Job],
    store: Store,
    workers: int = 1,
    title: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every job that the store does not hold yet, and return the values of all.

    Parameters
    ----------
    function : callable
        Called as ``function(shared, *job.arguments)``; returns JSON values and a dict of arrays.
    shared : object
        Sent once to every worker, such as a data set.
    jobs : sequence of Job
        In the order of the result.
    store : Store
        Entered by the caller.
    workers : int
        1 runs in this process, more in loky worker processes. Each cell runs with one thread either way.
    title : str
        Shown with the progress.
    quiet : bool
        Show no progress.

    Returns
    -------
    dict
        ``{key: values}`` in the order of `jobs`.

    Raises
    ------
    StudyError
        If a cell fails; finished cells are kept.
    KeyboardInterrupt
        Passed on after the workers have been stopped; finished cells are kept.
    """
    done = {job.key: cell for job in jobs if (cell := store.read(job.key)) is not None}
    for key in store.damaged:
        print(f"cell {key} was damaged and is computed again", file=sys.stderr)
    todo = [job for job in jobs if job.key not in done]
    with _progress(title, len(todo), len(done), quiet) as advance:
        source = _in_process(function, shared, todo) if workers == 1 else _loky(function, shared, todo, workers)
        with contextlib.closing(source) as results:
            for job, (values, arrays), seconds in results:
                store.write(job.key, values, arrays, seconds)
                advance()
    # read back, so that a fresh run and a resumed one work with the very same numbers
    values = {}
    for job in jobs:
        cell = store.read(job.key)
        if cell is None:
            raise StudyError(f"{store.folder}: cell {job.key} was damaged while the study ran; run the command again")
        values[job.key] = cell["values"]
    return values


def seconds_of(store: Store, jobs: Sequence[Job]) -> float:
    """Sum of the time that the cells took, in seconds."""
    return float(sum(cell["seconds"] for job in jobs if (cell := store.read(job.key)) is not None))


def _timed(function: Callable[..., Cell], shared: Any, job: Job) -> tuple[Cell, float]:
    started = time.perf_counter()
    cell = function(shared, *job.arguments)
    return cell, time.perf_counter() - started


def _failure(job: Job, error: BaseException) -> StudyError:
    return StudyError(f"cell {job.key} failed: {type(error).__name__}: {error}")


def _give_memory_back() -> None:
    """Let glibc return every block of a megabyte or more to the system when it is freed.

    Bags of very different sizes would otherwise leave a heap full of holes, several times the memory in use.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Run torch and the numerical libraries with one thread, and restore what was before."""
    from threadpoolctl import threadpool_limits

    with contextlib.ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, before)
        yield


def _in_process(function: Callable[..., Cell], shared: Any, jobs: Sequence[Job]) -> Generator[tuple[Job, Cell, float]]:
    if not jobs:
        return
    _give_memory_back()
    for job in jobs:
        try:
            with single_thread():
                cell, seconds = _timed(function, shared, job)
        except Exception as error:
            raise _failure(job, error) from error
        yield job, cell, seconds


_worker_state: dict[str, Any] = {}


def _start_worker(function: Callable[..., Cell], shared: Any) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends its workers
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    _give_memory_back()
    _worker_state.update(function=function, shared=shared)


def _end_with(driver: int) -> None:
    """End this worker when its driver is gone, however it went."""
    while os.getppid() == driver:
        time.sleep(1)
    os._exit(1)


def _work(job: Job) -> tuple[Cell, float]:
    return _timed(_worker_state["function"], _worker_state["shared"], job)


def _loky(
    function: Callable[..., Cell], shared: Any, jobs: Sequence[Job], workers: int
) -> Generator[tuple[Job, Cell, float]]:
    from concurrent.futures import FIRST_COMPLETED, Future, wait

    from loky import ProcessPoolExecutor

    if not jobs:
        return
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR")}
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        initializer=_start_worker,
        initargs=(function, shared),
        env=one_thread,
    )
    try:
        waiting: dict[Future[Any], Job] = {pool.submit(_work, job): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                try:
                    cell, seconds = future.result()
                except Exception as error:
                    raise _failure(job, error) from error
                yield job, cell, seconds
        pool.shutdown(wait=True)
    finally:
        pool.shutdown(wait=False, kill_workers=True)


@contextlib.contextmanager
def _progress(title: str, total: int, kept: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Progress with the time left, from the first finished cell on: a bar in a terminal, plain lines elsewhere."""
    if kept and not quiet:
        print(f"{title}: {kept} of {kept + total} cells are there already", file=sys.stderr)
    if quiet or not total:
        yield lambda: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bar:
            task = bar.add_task(title, total=total)
            yield lambda: bar.advance(task)
        return
    started = last = time.monotonic()
    count = 0

    def advance() -> None:
        nonlocal count, last
        count += 1
        now = time.monotonic()
        if count in (1, total) or now - last >= 15:
            last = now
            left = (now - started) / count * (total - count)
            print(f"{title}: {count}/{total} cells, about {_duration(left)} left", file=sys.stderr, flush=True)

    yield advance


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
