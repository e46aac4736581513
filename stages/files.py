"""The one place where a file is written: whole or not at all. JSON read and written. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # begins the names of files that are being written
_numbers = count()


@contextmanager
def atomic_path(path: Path, later: Syncs | None = None, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` (same suffix); on success it is synced and renamed to ``path``.

    On an error the temporary file is removed and ``path`` is as it was: a reader sees the old file or the new one.
    ``later``: has it synced after it was renamed, for what a digest vouches for and an older copy can replace.
    ``sync=False``: never, for what is written anew every second.

    Raises:
        FileNotFoundError: nothing was written under the temporary name.
    """
    free(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{next(_numbers)}-{path.name}")
    try:
        yield temporary
        now = sync and later is None
        if now:
            _sync(temporary)
        os.replace(temporary, path)
        if now:
            _sync(path.parent)
        elif later is not None:
            later.add(path)
    finally:
        temporary.unlink(missing_ok=True)


class Syncs:
    """Files that a thread has on the disk while work goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._waiting: list[Future[None]] = []

    def add(self, path: Path) -> None:
        """``path`` and its name in its folder are synced soon."""
        for one in (path, path.parent):
            self._waiting.append(self._thread.submit(_sync, one))

    def wait(self) -> None:
        """Until all are on the disk. OSError of the first that could not be brought there."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.result()


def make_folder(path: Path) -> None:
    """Make a folder; a file that stands in its place, or in that of a folder above it, is set aside."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        set_aside(next(one for one in (path, *path.parents) if os.path.lexists(one) and not one.is_dir()))
        path.mkdir(parents=True, exist_ok=True)


def free(path: Path) -> Path:
    """``path`` for a file that is to be written anew: its folder is there, no folder or link stands in its place."""
    make_folder(path.parent)
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        set_aside(path)
    return path


def set_aside(path: Path) -> Path:
    """Rename what stands in the way (``image.kept-1.png``): it may be somebody's. Returns the new name."""
    names = (path.with_name(f"{path.stem}.kept-{number}{path.suffix}") for number in count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    os.replace(path, kept)
    return kept


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic_path(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused (``ValueError``), as JSON has neither."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in ``path``, or None where there is no file or no valid JSON in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; {} where there is none, or something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces of 1 MiB."""
    sha, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            sha.update(buffer[:size])
    return sha.hexdigest()
