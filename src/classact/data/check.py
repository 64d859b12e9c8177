"""Reading every bag once before anything runs: which of them cannot be used, and what is in the others.

The second time only the files' sizes and times are looked at: what was found is kept under ``$CLASSACT_CACHE``, else
``~/.cache/classact``, in ``checks/``, one small file for each folder of bags. It may be deleted at any time.
"""

import csv
import hashlib
import io
import json
import os
import signal
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from classact.data.bag_files import DataError, Source, bag_id
from classact.data.labels import some

if TYPE_CHECKING:  # workers start in a fraction of the time without torch
    from classact.data.bags import BagDataset, Problem

FORMAT = 1  # of the cache; counts up whenever something else is looked for in a bag
COMPANIONS = (".lock", ".part", ".tmp")
FRESH_SECONDS = 60
CHUNK = 32


class _Found(NamedTuple):
    """What one bag holds, or why it cannot be used; of JSON values only."""

    reason: str = ""
    instances: int = 0
    width: int = 0
    dtype: str = ""
    crc: int = 0
    coords: bool = False
    instance_labels: bool = False
    constant: bool = False


@dataclass(frozen=True, eq=False)
class BagCheck:
    """What [`check_bags`][classact.data.check.check_bags] found.

    Attributes
    ----------
    bags : BagDataset
        The bags that were checked.
    problems : list of Problem
        What cannot be used: rows and bags that do not match, files a writer is still at work on, bad bags. The reason
        starts with one of ``no label``, ``missing``, ``in flight``, ``unreadable``, ``empty``, ``not finite`` and
        ``another width``.
    warnings : list of str
        What can be used but looks wrong.
    """

    bags: "BagDataset"
    problems: "list[Problem]"
    warnings: list[str]
    _found: tuple[_Found, ...]
    _bytes: tuple[int, ...]
    _on_disk: int

    @cached_property
    def usable(self) -> np.ndarray:
        """Positions of the usable bags, (n_good,) int."""
        return np.array([i for i, found in enumerate(self._found) if not found.reason], dtype=np.int64)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of instances of every usable bag, (n_good,) int."""
        return np.array([self._found[i].instances for i in self.usable], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Eight hex digits that change with any name, label, group, size or feature of the usable bags."""
        bags = self.bags
        content = [
            (bags.ids[i], int(bags.labels[i]), _label(bags, i), bags.groups[i], self._found[i].instances,
             self._found[i].crc)
            for i in self.usable
        ]  # fmt: skip
        return f"{zlib.crc32(repr(content).encode()):08x}"

    def table(self) -> Any:
        """Return a pandas DataFrame: item, label, group, instances, width, dtype, megabytes, coordinates, reason."""
        import pandas as pd

        bags = self.bags
        rows = [
            (bags.ids[i], _label(bags, i), bags.groups[i], found.instances, found.width, found.dtype,
             self._bytes[i] / 1e6, found.coords, found.reason)
            for i, found in enumerate(self._found)
        ]  # fmt: skip
        columns = "item label group instances width dtype megabytes coordinates reason"
        return pd.DataFrame(rows, columns=columns.split())

    def clean(self, training: bool = True) -> "BagDataset":
        """Return a data set of the usable bags; its own `problems` are none.

        Parameters
        ----------
        training : bool
            Whether there must be two classes.

        Raises
        ------
        DataError
            If no bag is left, or bags of fewer than two classes.
        """
        if not len(self.usable):
            raise DataError(f"{self.bags.name}: none of {len(self.bags)} bags can be used")
        left = sorted({_label(self.bags, i) for i in self.usable} - {""})
        if training and len(left) < 2:
            raise DataError(
                f"{self.bags.name}: expected usable bags of at least two classes, found {', '.join(left) or 'none'}"
            )
        kept = self.bags.select(self.usable)
        kept.problems = []
        return kept

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        bags, usable = self.bags, self.usable
        groups = [bags.groups[i] for i in usable]
        n_groups = _count(len(set(groups)), "group")
        lines = [
            f"{bags.name}: {len(usable):,} of {_count(len(bags), 'bag')} can be used; {n_groups} by {bags.group_name}",
            f"layout: {bags.layout}; {_megabytes(self._on_disk)}",
        ]
        if len(usable):
            labels, sizes, good = bags.labels[usable], self.sizes, [self._found[i] for i in usable]
            possible = folds_possible(labels, groups)
            for k, name in enumerate(bags.classes):
                n_bags, own = _count(int((labels == k).sum()), "bag"), _count(possible.get(k, 0), "group")
                lines.append(f'class "{name}": {n_bags} in {own}')
            spread = f"{sizes.min():,} to {sizes.max():,}, median {np.median(sizes):,.0f}"
            lines += [
                f"instances per bag: {spread}; {sizes.sum():,} in all",
                f"features per instance: {good[0].width:,} ({', '.join(sorted({item.dtype for item in good}))})",
                f"coordinates: {_how_many([item.coords for item in good])}",
                f"instance labels: {_how_many([item.instance_labels for item in good])}",
            ]
            if bags.classes:
                most, rarest = min((possible.get(k, 0), name) for k, name in enumerate(bags.classes))
                folds = f"up to {most:,}" if most > 1 else "none"
                lines.append(f'folds possible: {folds} (class "{rarest}" has {_count(most, "group")})')
        if self.problems:
            lines.append(f"cannot be used: {len(self.problems):,}")
        for heading, problems in _by_reason(self.problems).items():
            counts = Counter(problem.label or "label unknown" for problem in problems)
            per_class = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
            lines += [f"  {heading}: {len(problems):,} ({per_class})", *_first_five(problems, "    ")]
        return lines + [f"warning: {warning}" for warning in self.warnings]


def check_bags(
    bags: "BagDataset",
    *,
    workers: int = 1,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> BagCheck:
    """Read every bag once and judge it.

    Parameters
    ----------
    bags : BagDataset
        Best opened with ``strict=False``, so that what has no label or no bag is listed with the rest.
    workers : int
        Processes that read; 1 reads in this one. Bags in memory are always checked in this one.
    cache : bool
        Read only bags whose files changed since an earlier check or could not be read then, and remember the result.
    progress : callable, optional
        Called with the number of bags done and that of all bags.

    Returns
    -------
    BagCheck
        Bad bags raise no error; see [`raise_problems`][classact.data.check.raise_problems].
    """
    from classact.data.bags import Problem

    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    sources = bags.sources
    locked, lone = _in_flight(sources)  # first: a lock may go while its bag is read
    stamps = [_stamp(source) for source in sources]
    found = _examine_all(sources, stamps, workers, cache, progress)
    widths = Counter(item.width for item in found if not item.reason)
    width = widths.most_common(1)[0][0] if widths else 0
    for i, (source, stamp) in enumerate(zip(sources, stamps, strict=True)):
        reason = found[i].reason
        if source.arrays is None and source.path in locked:
            reason = f"in flight: {locked[source.path]} lies beside it"
        elif reason.startswith("unreadable") and stamp and (age := time.time() - stamp[1] / 1e9) < FRESH_SECONDS:
            reason += f"; modified {max(age, 0):.0f} s ago: still being written?"
        elif not reason and found[i].width != width:
            reason = f"another width: {found[i].width} features per instance, most bags have {width}"
        found[i] = found[i]._replace(reason=reason)
    here = set(bags.ids)  # a bag to be predicted may have no label and is no problem
    problems = {problem.item: problem for problem in bags.problems if problem.item not in here}
    for name in sorted(lone.keys() - here):
        label = problems[name].label if name in problems else ""
        problems[name] = Problem(name, f"in flight: only {lone[name]} is there", label)
    bad = [Problem(bags.ids[i], item.reason, _label(bags, i)) for i, item in enumerate(found) if item.reason]
    sizes = [_size(source, stamp, item) for source, stamp, item in zip(sources, stamps, found, strict=True)]
    files = {source.path: stamp[0] for source, stamp in zip(sources, stamps, strict=True) if stamp}
    return BagCheck(
        bags, [*problems.values(), *bad], _warnings(bags, found), tuple(found), tuple(sizes), sum(files.values())
    )


def folds_possible(labels: Sequence[int] | np.ndarray, groups: Sequence[str]) -> dict[int, int]:
    """Count the groups of every class; a class of n groups can be in every one of at most n folds.

    Parameters
    ----------
    labels : sequence of int
        Class of each item; negative where unknown.
    groups : sequence of str
        Group of each item.

    Returns
    -------
    dict
        Class to number of groups, in the order of the classes.
    """
    members = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        members[int(label)].add(group)
    return {label: len(members[label]) for label in sorted(members) if label >= 0}


def excluded_csv(problems: "Sequence[Problem]") -> str:
    """Return the problems as text of a .csv file with the columns item, reason and label."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("item", "reason", "label"))
    writer.writerows((problem.item, problem.reason, problem.label) for problem in problems)
    return text.getvalue()


def raise_problems(problems: "Sequence[Problem]", unit: str = "bag") -> None:
    """Stop if there are problems.

    Parameters
    ----------
    problems : sequence of Problem
        What cannot be used.
    unit : str
        What one item is called.

    Raises
    ------
    DataError
        If there is any problem: counts by reason, the first five of each, and what to do.
    """
    if not problems:
        return
    lines = [f"{_count(len(problems), unit)} cannot be used"]
    for heading, members in _by_reason(problems).items():
        lines += [f"  {heading}: {len(members):,}", *_first_five(members, "    ")]
    raise DataError("\n".join([*lines, "give --exclude-bad to leave them out and write excluded.csv"]))


def _by_reason(problems: "Sequence[Problem]") -> "dict[str, list[Problem]]":
    """Group by what stands before the first colon of the reason."""
    grouped = defaultdict(list)
    for problem in problems:
        grouped[problem.reason.partition(":")[0]].append(problem)
    return grouped


def _first_five(problems: "Sequence[Problem]", indent: str) -> list[str]:
    details = [(problem.item, problem.reason.partition(": ")[2]) for problem in problems[:5]]
    lines = [f"{indent}{item}: {detail}" if detail else f"{indent}{item}" for item, detail in details]
    return lines + [f"{indent}... ({len(problems) - 5:,} more)"] * (len(problems) > 5)


def _label(bags: "BagDataset", index: int) -> str:
    label = bags.labels[index]
    return bags.classes[label] if label >= 0 else ""


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _how_many(given: Sequence[bool]) -> str:
    return "all bags" if all(given) else f"{sum(given):,} of {len(given):,} bags" if any(given) else "none"


def _megabytes(number: int) -> str:
    if not number:
        return "in memory"
    return f"{number / 1e9:,.1f} GB on disk" if number >= 1e9 else f"{number / 1e6:,.1f} MB on disk"


def _warnings(bags: "BagDataset", found: Sequence[_Found]) -> list[str]:
    good = [i for i, item in enumerate(found) if not item.reason]
    warnings = []
    if constant := [bags.ids[i] for i in good if found[i].constant]:
        warnings.append(f"all instances are the same in {_count(len(constant), 'bag')}: {some(constant)}")
    same = defaultdict(list)
    for i in good:
        same[found[i].crc, found[i].instances, found[i].width].append(i)
    leaks = [members for members in same.values() if len({bags.groups[i] for i in members}) > 1]
    if leaks:
        pairs = [
            " = ".join([f"{bags.ids[i]} ({bags.groups[i]})" for i in members[:5]] + ["..."] * (len(members) > 5))
            for members in leaks
        ]
        warnings.append(f"the same features in bags of different groups ({bags.group_name}): {some(pairs)}")
    return warnings


def _in_flight(sources: Sequence[Source]) -> tuple[dict[Path, str], dict[str, str]]:
    """Find what writers at work leave beside the bags: ``s1.h5.lock``, ``s1.h5.part``, ``s1.tmp``.

    Returns
    -------
    dict
        Path of a bag with such a companion to the name of that.
    dict
        Name of a bag that is not there yet to the name of the companion that is.
    """
    locked, lone = {}, {}
    in_files = [source for source in sources if source.arrays is None]
    folders = {source.path.parent for source in in_files}
    companions = sorted(
        file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.name.endswith(COMPANIONS)
    )
    if companions:
        owners = {name: source.path for source in in_files for name in (source.path, source.path.with_suffix(""))}
        # in a folder of bags a lone companion is a bag to come; beside one file of many bags it is a stranger
        kinds = {source.path.suffix for source in in_files if source.key is None}
        for file in companions:
            bag = file.with_suffix("")
            if bag in owners:
                locked[owners[bag]] = file.name
            elif bag.suffix in kinds:
                lone[bag_id(bag.stem)] = file.name
    return locked, lone


def _stamp(source: Source) -> tuple[int, ...] | None:
    """Size and time of change (ns) of the files that a bag is read from; None if it is in none, or the file is gone."""
    if source.arrays is not None:
        return None
    try:
        stats = [source.path.stat()]
    except OSError:
        return None
    if source.kind == "torchmil":
        for folder in ("coords", "patch_labels"):
            with suppress(OSError):
                stats.append((source.path.parents[1] / folder / source.path.name).stat())
    return tuple(number for stat in stats for number in (stat.st_size, stat.st_mtime_ns))


def _size(source: Source, stamp: tuple[int, ...] | None, found: _Found) -> int:
    """Bytes of a bag's file, or of its features where it has no file of its own."""
    if stamp and source.key is None:
        return stamp[0]
    return found.instances * found.width * np.dtype(found.dtype).itemsize if found.dtype else 0


def _examine_all(
    sources: Sequence[Source],
    stamps: Sequence[tuple[int, ...] | None],
    workers: int,
    cache: bool,
    progress: Callable[[int, int], None] | None,
) -> list[_Found]:
    found: dict[int, _Found] = {}
    folders = {source.path.parent for source, stamp in zip(sources, stamps, strict=True) if stamp}
    caches = {folder: _read_cache(folder) for folder in folders} if cache else {}
    for i, (source, stamp) in enumerate(zip(sources, stamps, strict=True)):
        if source.arrays is None and stamp is None:
            found[i] = _Found(f"missing: {source.path}: no such file")
        elif cache and stamp:
            kept = caches[source.path.parent].get(_cache_key(source))
            if kept is not None and kept[0] == list(stamp):
                found[i] = _Found(*kept[1:])
    todo = [i for i in range(len(sources)) if i not in found]
    if progress is not None:
        progress(len(found), len(sources))
    try:
        for i, item in _examined(sources, todo, workers):
            found[i] = item
            if progress is not None:
                progress(len(found), len(sources))
    finally:  # what was read before an interruption need not be read again
        new: dict[Path, dict[str, list[Any]]] = defaultdict(dict)
        for i in todo:
            source, stamp = sources[i], stamps[i]
            # a file may have been unreadable for want of rights or memory, which its time of change does not tell
            if cache and stamp and i in found and not found[i].reason.startswith("unreadable"):
                new[source.path.parent][_cache_key(source)] = [list(stamp), *found[i]]
        for folder, known in new.items():
            _write_cache(folder, _read_cache(folder) | known)
    return [found[i] for i in range(len(sources))]


def _examined(sources: Sequence[Source], todo: Sequence[int], workers: int) -> Iterator[tuple[int, _Found]]:
    parallel = workers > 1 and len(todo) > 1
    away = [i for i in todo if sources[i].arrays is None] if parallel else []
    here = sorted({*todo} - {*away})
    yield from zip(here, _in_turn([sources[i] for i in here]), strict=True)
    if not away:
        return
    from concurrent.futures import as_completed

    from loky import ProcessPoolExecutor  # needs no ``if __name__ == "__main__"`` in the script that calls

    size = max(1, min(CHUNK, len(away) // (4 * workers)))
    chunks = [away[start : start + size] for start in range(0, len(away), size)]
    pool = ProcessPoolExecutor(min(workers, len(chunks)), timeout=10, initializer=_ignore_interrupt)
    try:
        waiting = {pool.submit(_examine_chunk, [sources[i] for i in chunk]): chunk for chunk in chunks}
        for future in as_completed(waiting):
            yield from zip(waiting[future], future.result(), strict=True)
    finally:
        pool.shutdown(wait=False, kill_workers=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends its workers


def _examine_chunk(sources: Sequence[Source]) -> list[_Found]:
    return list(_in_turn(sources))


def _in_turn(sources: Sequence[Source]) -> Iterator[_Found]:
    """Examine one bag after another, while the system fetches the file of the next."""
    for i, source in enumerate(sources):
        if i + 1 < len(sources):
            _fetch_ahead(sources[i + 1])
        yield _examine(source)


def _fetch_ahead(source: Source) -> None:
    if source.arrays is None and source.key is None and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            file = os.open(source.path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def _examine(source: Source) -> _Found:
    try:
        raw = source.read()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes its reader do
        message = str(error) if isinstance(error, DataError) else f"{source.path}: {type(error).__name__}: {error}"
        return _Found(f"empty: {message}" if "no instances" in message else f"unreadable: {message}")
    x = raw.features
    if not x.size:
        return _Found(f"empty: a bag with no instances, shape {x.shape}")
    same = len(x) > 1 and bool((x[0] == x[-1]).all()) and bool((x == x[0]).all())
    bad = _not_finite(x)
    return _Found(
        f"not finite: {bad}" if bad else "",
        len(x),
        x.shape[1],
        str(x.dtype),
        zlib.crc32(np.ascontiguousarray(x)),  # type: ignore[arg-type]
        raw.coords is not None,
        raw.instance_labels is not None,
        same,
    )


def _not_finite(x: np.ndarray) -> str:
    """Say where the first value lies that is no finite number in float32, in which bags are trained.

    The bits of a float, read as an integer, grow with its magnitude, with those of infinity and nan above all others.
    So two maxima of integers decide: signed for the positive values, unsigned for the negative ones.
    """
    if x.dtype.kind != "f":
        return ""
    if x.dtype not in (np.float16, np.float32, np.float64):
        x = x.astype(np.float64)
    limit = x.dtype.type(min(np.finfo(x.dtype).max, np.finfo(np.float32).max))
    signed, unsigned = f"i{x.dtype.itemsize}", f"u{x.dtype.itemsize}"
    if x.view(signed).max() <= limit.view(signed) and x.view(unsigned).max() <= (-limit).view(unsigned):
        return ""
    row, column = divmod(int(np.argmin(np.abs(x) <= limit)), x.shape[1])
    return f"{x[row, column]} at instance {row}, feature {column}"


def _cache_key(source: Source) -> str:
    return "\0".join((source.path.name, source.kind, source.key or ""))


def _cache_file(folder: Path) -> Path:
    root = Path(os.environ.get("CLASSACT_CACHE") or Path.home() / ".cache" / "classact")
    return root / "checks" / f"{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]}.json"


def _read_cache(folder: Path) -> dict[str, list[Any]]:
    """Read what is known of a folder; of a damaged file, or one of another format, nothing."""
    try:
        crc, _, body = _cache_file(folder).read_bytes().partition(b"\n")
        return json.loads(body) if int(crc, 16) == zlib.crc32(body, FORMAT) else {}
    except (OSError, ValueError):
        return {}


def _write_cache(folder: Path, known: dict[str, list[Any]]) -> None:
    """Write it whole or not at all; of two runs at the same moment the last wins. A full disk is no reason to stop."""
    path = _cache_file(folder)
    body = json.dumps(known).encode()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:
            file = Path(own) / path.name
            file.write_bytes(b"%08x\n" % zlib.crc32(body, FORMAT) + body)
            file.replace(path)
