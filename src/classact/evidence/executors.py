"""Running the cells of a study: in this process, in loky workers or on a Ray cluster. The driver alone writes cells."""

import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classact.evidence.store import Store, StudyError

Cell = tuple[Any, Mapping[str, np.ndarray]]

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR")}
# how often a cell may lose its worker; a cluster loses some for reasons of its own
LOKY_LOSSES, RAY_LOSSES = 3, 5


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
    gpus: Sequence[str] | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Run every job that the store does not hold yet, and return the values of all.

    Parameters
    ----------
    function : callable
        Called as ``function(shared, *job.arguments)``; returns JSON values and a dict of arrays.
    shared : object
        Sent once to every worker, such as a data set. If it has a method ``portable(put)``, Ray's workers get what that
        returns; ``put(object)`` stores an object once and returns a small callable that returns it on any node.
    jobs : sequence of Job
        In the order of the result.
    store : Store
        Entered by the caller.
    workers : int
        1 runs in this process, more in loky worker processes. Each cell runs with one thread either way. With `ray`,
        the most cells that run at a time; 1 means as many as the cluster has CPUs.
    title : str
        Shown with the progress.
    quiet : bool
        Show no progress.
    gpus : sequence of str, optional
        Ids as in ``CUDA_VISIBLE_DEVICES``, see `gpus_for`. Every worker process sees one of them only, as device
        ``cuda``; there are never more workers than ids. With `ray` the ids do not matter: every cell asks for one GPU.
    ray : str, optional
        Run on a Ray cluster: ``local`` starts one on this machine, ``auto`` joins the one that runs on it, and an
        address such as ``10.0.0.1:6379`` or ``ray://head:10001`` joins that one. If this process is connected to a
        cluster already, that one is used.

    Returns
    -------
    dict
        ``{key: values}`` in the order of `jobs`.

    Raises
    ------
    StudyError
        If a cell fails or loses its worker again and again, or Ray cannot be reached or has no GPU for `gpus`; finished
        cells are kept.
    ModuleNotFoundError
        If `ray` is given and not installed.
    KeyboardInterrupt
        Passed on after the workers have been stopped; finished cells are kept.
    """
    done = {job.key: cell for job in jobs if (cell := store.read(job.key)) is not None}
    for key in store.damaged:
        print(f"cell {key} was damaged and is computed again", file=sys.stderr)
    todo = [job for job in jobs if job.key not in done]
    with _progress(title, len(todo), len(done), quiet) as advance:
        if ray is not None:
            source = _ray(function, shared, todo, workers, gpus, ray)
        elif workers == 1:
            source = _in_process(function, shared, todo)
        else:
            source = _loky(function, shared, todo, workers, gpus)
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


def gpus_for(device: str, workers: int, share_gpu: bool, available: Sequence[str] | None = None) -> list[str] | None:
    """Ids of the GPUs for the workers of `run_jobs`, or None where workers are not pinned.

    Parameters
    ----------
    device : str
        Only workers on plain ``cuda`` are pinned.
    workers : int
        Number of worker processes.
    share_gpu : bool
        Let workers share one GPU.
    available : sequence of str, optional
        The ids there are; by default those in ``CUDA_VISIBLE_DEVICES``, else all.

    Raises
    ------
    StudyError
        If there are fewer GPUs than workers.
    """
    if device != "cuda" or share_gpu:
        return None
    if available is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            import torch

            available = [str(i) for i in range(torch.cuda.device_count())]
        else:
            available = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not available:
        raise StudyError("--device cuda: no GPU is visible here")
    if workers > len(available):
        raise StudyError(
            f"--workers {workers}: every worker takes a GPU of its own, but only {len(available)} can be seen; use "
            f"--workers {len(available)}, or --share-gpu to let workers share one"
        )
    return list(available)


def _timed(function: Callable[..., Cell], shared: Any, job: Job) -> tuple[Cell, float]:
    started = time.perf_counter()
    cell = function(shared, *job.arguments)
    return cell, time.perf_counter() - started


def _failure(job: Job, error: BaseException) -> StudyError:
    return StudyError(f"cell {job.key} failed: {type(error).__name__}: {error}")


def _count_loss(losses: Counter[str], job: Job, error: Exception, most: int, others: Iterable[Job]) -> None:
    """Say that a cell runs again because its worker is gone; give up where that has happened too often."""
    losses[job.key] += 1
    why = type(error).__name__
    if losses[job.key] > most:
        flying = ", ".join([job.key, *(other.key for other in others)])
        raise StudyError(
            f"cell {job.key} lost its worker {losses[job.key]} times ({why}). In flight were {flying}. Workers are "
            "mostly killed because memory runs out: give the same command again with fewer --workers"
        ) from error
    print(f"cell {job.key} lost its worker ({why}) and runs again", file=sys.stderr)


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
    function: Callable[..., Cell], shared: Any, jobs: Sequence[Job], workers: int, gpus: Sequence[str] | None
) -> Generator[tuple[Job, Cell, float]]:
    from concurrent.futures import FIRST_COMPLETED, Future, wait

    from loky import ProcessPoolExecutor
    from loky.process_executor import TerminatedWorkerError

    if not jobs:
        return

    # every worker is a pool of its own: one that is killed breaks no other, and each has its own environment
    def pool(slot: int) -> ProcessPoolExecutor:
        env = {"CUDA_VISIBLE_DEVICES": gpus[slot]} if gpus else {}
        return ProcessPoolExecutor(1, initializer=_start_worker, initargs=(function, shared), env=ONE_THREAD | env)

    def submit(slot: int) -> None:
        if todo:
            try:
                future = pools[slot].submit(_work, todo[0])
            except TerminatedWorkerError:  # raised at once if the worker is gone already
                pools[slot] = pool(slot)
                future = pools[slot].submit(_work, todo[0])
            flying[future] = slot, todo.popleft()

    todo = deque(jobs)
    flying: dict[Future[tuple[Cell, float]], tuple[int, Job]] = {}
    losses: Counter[str] = Counter()
    if gpus:
        workers = min(workers, len(gpus))
    pools = [pool(slot) for slot in range(min(workers, len(jobs)))]
    try:
        for slot in range(len(pools)):
            submit(slot)
        while flying:
            future = wait(flying, return_when=FIRST_COMPLETED).done.pop()
            slot, job = flying.pop(future)
            try:
                cell, seconds = future.result()
            except TerminatedWorkerError as error:
                _count_loss(losses, job, error, LOKY_LOSSES, (other for _, other in flying.values()))
                todo.appendleft(job)
                submit(slot)
                continue
            except Exception as error:
                raise _failure(job, error) from error
            submit(slot)
            yield job, cell, seconds
        for each in pools:
            each.shutdown(wait=True)
    finally:
        for each in pools:
            each.shutdown(wait=False, kill_workers=True)


@dataclass(frozen=True)
class _Stored:
    """An object in Ray's store; calling this returns it, on any node."""

    reference: Any

    def __call__(self) -> Any:
        import ray

        return ray.get(self.reference)


@functools.lru_cache(maxsize=1)
def _fetch(study: _Stored) -> Any:
    """Function and shared object of the study, fetched by each worker once."""
    os.environ.update(ONE_THREAD)  # before the libraries that read it are loaded
    _give_memory_back()
    return study()


def _work_remotely(study: _Stored, folder: str, packed: bytes) -> tuple[Cell, float]:
    """Run a cell in a worker of Ray. Job and study are unpacked here, as they may name modules in `folder`."""
    if folder not in sys.path and Path(folder).is_dir():
        sys.path.insert(0, folder)
    from ray import cloudpickle

    function, shared = _fetch(study)
    with single_thread():
        return _timed(function, shared, cloudpickle.loads(packed))


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connection to a Ray cluster. A cluster started here ends with it; a connection that was there stays."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--ray needs the package ray: pip install 'classact[ray]'", name="ray") from error
    if ray.is_initialized():
        yield
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdigit():  # Ray itself would go on trying for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise StudyError(f"--ray {address}: cannot connect: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _ray(
    function: Callable[..., Cell],
    shared: Any,
    jobs: Sequence[Job],
    workers: int,
    gpus: Sequence[str] | None,
    address: str,
) -> Generator[tuple[Job, Cell, float]]:
    if not jobs:
        return
    with _connected(address):
        import ray
        from ray import cloudpickle
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

        if gpus is not None and not ray.cluster_resources().get("GPU"):
            raise StudyError(f"--ray {address}: the cluster has no GPU; use --device cpu")
        stored: list[_Stored] = []  # keeps the objects alive until the study ends

        def put(thing: Any) -> _Stored:
            stored.append(_Stored(ray.put(thing)))
            return stored[-1]

        study = put((function, shared.portable(put) if hasattr(shared, "portable") else shared))
        # Ray ends a worker that has used a GPU after every cell, as CUDA would stay on that GPU
        remote = ray.remote(num_cpus=1, num_gpus=int(gpus is not None), max_retries=0)(_work_remotely)

        def submit() -> None:
            most = workers if workers > 1 else max(1, int(ray.cluster_resources().get("CPU", 1)))
            while todo and len(flying) < most:
                job = todo.popleft()
                flying[remote.remote(study, str(Path.cwd()), cloudpickle.dumps(job))] = job

        todo = deque(jobs)
        flying: dict[Any, Job] = {}
        losses: Counter[str] = Counter()
        try:
            submit()
            while flying:
                done = ray.wait(list(flying))[0][0]
                job = flying.pop(done)
                try:
                    cell, seconds = ray.get(done)
                except (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError) as error:
                    _count_loss(losses, job, error, RAY_LOSSES, flying.values())
                    todo.appendleft(job)
                    submit()
                    continue
                except RayTaskError as error:
                    raise _failure(job, error.cause) from error
                except Exception as error:
                    raise _failure(job, error) from error
                submit()
                yield job, cell, seconds
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)


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
            print(f"{title}: {count}/{total} cells, about {duration(left)} left", file=sys.stderr, flush=True)

    yield advance


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
