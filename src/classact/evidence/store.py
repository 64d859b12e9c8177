"""Where the cells of a study are kept, so that a killed study goes on where it stopped.

One folder per study: ``study.json`` says what it is, ``cells/<key>.json`` (and ``.npz``) hold one finished run each.
A cell appears whole or not at all: temporary file, fsync, rename, and a checksum that is verified when it is read.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np


class StudyError(RuntimeError):
    """A study that cannot run or go on; the message says why and what to do."""


class Store:
    """The folder of one study, held by one run at a time. Use it as a context manager.

    Parameters
    ----------
    folder : path
        Created if missing.
    definition : dict
        What the study is (JSON values); a folder with another definition is refused.
    overwrite : bool
        Start anew where the folder holds another study: its cells are deleted.

    Raises
    ------
    StudyError
        If another run holds the folder, or it holds another study or other files.
    """

    def __init__(self, folder: str | Path, definition: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder, self.overwrite = Path(folder), overwrite
        self.definition = json.loads(json.dumps(definition))
        self.damaged: list[str] = []
        self._lock: Any = None

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise StudyError(f"{self.folder}: expected a folder, found a file")
        strangers = self.folder.exists() and any(self.folder.iterdir())
        if strangers and not (self.folder / "study.json").exists() and not (self.folder / "study.lock").exists():
            raise StudyError(f"{self.folder}: holds other files and no study; choose an empty or new folder")
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._claim()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()  # releases the lock; so does the end of the process, however it comes
            self._lock = None

    def _acquire(self) -> None:
        path = self.folder / "study.lock"
        self._lock = path.open("a+")
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # pragma: no cover - Windows
            import msvcrt

            try:
                msvcrt.locking(self._lock.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            except OSError as error:
                raise StudyError(f"{self.folder}: another run is writing here") from error
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            self._lock.close()
            self._lock = None
            raise StudyError(
                f"{self.folder}: another run is writing here ({holder or 'unknown process'}); wait for it or choose "
                "another --out"
            ) from error
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename if hasattr(os, 'uname') else 'this machine'}")
        self._lock.flush()

    def _claim(self) -> None:
        path = self.folder / "study.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found == self.definition:
                return
            if not self.overwrite:
                raise StudyError(
                    f"{self.folder}: holds another study ({_difference(found, self.definition)}); choose another "
                    "--out, or replace it with --overwrite"
                )
            for cell in (self.folder / "cells").iterdir():
                cell.unlink()
        write_atomically(path, json.dumps(self.definition, indent=1, sort_keys=True).encode())

    def write(self, key: str, values: Any, arrays: Mapping[str, np.ndarray] | None = None, seconds: float = 0) -> None:
        """Write a finished cell.

        Raises
        ------
        StudyError
            If it cannot be written, for example because the disk is full; finished cells are kept.
        """
        content: dict[str, Any] = {"key": key, "values": values, "seconds": seconds}
        try:
            if arrays:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
                content["arrays"] = hashlib.sha256(buffer.getvalue()).hexdigest()
                write_atomically(self._path(key, ".npz"), buffer.getvalue())
            content["checksum"] = _checksum(content)
            write_atomically(self._path(key, ".json"), json.dumps(content).encode())
        except OSError as error:
            kept = len(list((self.folder / "cells").glob("*.json")))
            why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise StudyError(
                f"{self._path(key, '.json')}: cannot write this cell: {why}. {kept} finished cells are kept; make "
                "room and give the same command again"
            ) from error

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a finished cell (``values``, ``seconds``), or None if it is not there.

        A damaged cell is deleted and its key added to `damaged`.
        """
        path = self._path(key, ".json")
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            intact = content.pop("checksum") == _checksum(content) and content["key"] == key
            if intact and "arrays" in content:
                found = hashlib.sha256(self._path(key, ".npz").read_bytes()).hexdigest()
                intact = found == content["arrays"]
        except (ValueError, KeyError, AttributeError, OSError):
            intact = False
        if not intact:
            self.damaged.append(key)
            path.unlink()
            return None
        return content

    def arrays(self, key: str, skip: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Return the arrays of a finished cell, without those named in `skip`."""
        path = self._path(key, ".npz")
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files if name not in skip}

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / "cells" / (key.replace("/", "_").replace(":", "_") + suffix)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """Name the first key in which two definitions differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(set(found) | set(wanted)):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    return f"{path or 'definition'}: there {_short(found)}, here {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, even after a crash."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)
