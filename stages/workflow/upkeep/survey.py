"""What lies in an output folder: runs, stored results, which run links to which. Nothing is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.files import read_object
from stages.workflow.store import MANIFEST

WEIGHTS = "weights"  # in the store: prepared copies, a file each


class Run(NamedTuple):
    """One run's folder. ``bytes``: of its own files and of the results that it links to."""

    path: Path
    status: str  # done | failed | unfinished
    stages: tuple[str, ...]
    bytes: int
    changed: float  # seconds since 1970


class Result(NamedTuple):
    """One result of a stage, whole or begun, or a prepared copy of weights."""

    path: Path
    stage: str
    whole: bool
    bytes: int
    changed: float
    runs: tuple[str, ...]  # that link to it


def runs(output_dir: Path) -> list[Run]:
    """Every folder with a config.yaml, the newest first."""
    found = [_run(file.parent) for file in output_dir.glob("[!.]*/config.yaml")]
    return sorted(found, key=lambda one: -one.changed)


def results(output_dir: Path) -> list[Result]:
    """All that the store holds, the oldest first."""
    store, linked = output_dir / ".store", users(output_dir)
    found = []
    for folder in store.glob("[!.]*/*"):
        if folder.parent.name == WEIGHTS or not folder.is_dir():
            continue
        whole, (size, changed) = (folder / MANIFEST).is_file(), _measured(folder)
        if not changed:
            continue
        found.append(Result(folder, folder.parent.name, whole, size, changed, linked.get(folder.resolve(), ())))
    for stat, file in _stats(store / WEIGHTS):
        if file.suffix != ".bin":
            continue
        found.append(Result(file, WEIGHTS, True, stat.st_size, max(stat.st_mtime, stat.st_atime), ()))
    return sorted(found, key=lambda one: one.changed)


def age(changed: float) -> str:
    """``3 d``, ``5 h``, ``12 min``."""
    seconds = max(0, time.time() - changed)
    for unit, length in (("d", 86400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


def size(count: int) -> str:
    """``1.2 GB``, ``34.5 MB``, ``3 kB``."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _run(folder: Path) -> Run:
    summary = read_object(folder / "run.json")
    links = [link for link in folder.iterdir() if link.is_symlink() and link.is_dir()]
    parts = [_measured(part) for part in (folder, *links)]
    status = "failed" if summary.get("error") else "done" if (folder / "image.png").exists() else "unfinished"
    names = tuple(sorted(link.name for link in links))
    return Run(folder, status, names, sum(part[0] for part in parts), _measured(folder)[1])


def _measured(folder: Path) -> tuple[int, float]:
    """Bytes of the files below a folder, and when the last of them (or it) changed; (0, 0.0) of one that is gone."""
    try:
        own = os.lstat(folder).st_mtime
    except FileNotFoundError:  # another process cleans up too
        return 0, 0.0
    stats = [stat for stat, _ in _stats(folder)]
    return sum(one.st_size for one in stats), max([own, *(one.st_mtime for one in stats)])


def _stats(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    for parent, _, files in os.walk(folder):  # a stage may be at work there: files come and go
        for name in files:
            file = Path(parent, name)
            try:
                found = os.lstat(file)
            except FileNotFoundError:
                continue
            yield found, file


def users(output_dir: Path) -> dict[Path, tuple[str, ...]]:
    """Where links of runs lead, and of which runs."""
    found: dict[Path, tuple[str, ...]] = {}
    for link in output_dir.glob("*/*"):
        if link.is_symlink() and not link.parent.name.startswith("."):
            target = link.resolve()
            found[target] = (*found.get(target, ()), link.parent.name)
    return found
