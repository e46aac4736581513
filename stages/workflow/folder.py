"""A run's folder: its name, the settings kept in it, its links into the store, its lock."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from stages.files import free, set_aside, write_text
from stages.workflow.graph import StageState
from stages.workflow.progress import Silent
from stages.workflow.saved import SAVED


def run_name(config: DictConfig, states: Sequence[StageState], sweep: bool) -> str:
    """The run's folder: as given, else the prompt's first words and the picture's fingerprint, so that the same
    command finds its run again."""
    mark = states[-1].fingerprint[:8]
    if config.run is not None:
        return f"{config.run}-{mark}" if sweep and not str(config.run).endswith(mark) else str(config.run)
    text = unicodedata.normalize("NFC", config.prompt).lower()
    slug = re.sub(r"[\W_]+", "-", text[:200]).strip("-")[:40].strip("-")
    while len(slug.encode("utf-8")) > 150:  # file names have at most 255 bytes
        slug = slug[:-1]
    return f"{slug}-{mark}" if slug else mark


def link_results(run_dir: Path, states: Sequence[StageState]) -> None:
    """Link what is in the store (or being made there) into the run; links of other settings go."""
    for state in states:
        target = os.path.relpath(state.entry.path, run_dir) if state.entry.path.is_dir() else None
        _link(run_dir / state.name, target)
    last = states[-1]
    done = (last.entry.path / "image.png").exists() and last.entry.stage == last.name
    _link(run_dir / "image.png", f"{last.name}/image.png" if done else None)


def _link(link: Path, target: str | None) -> None:
    if link.is_symlink() and (target is None or os.readlink(link) != target):
        link.unlink()
    if target is not None and not link.is_symlink():
        if os.path.lexists(link):  # somebody's own
            set_aside(link)
        link.symlink_to(target)


def kept(run_dir: Path) -> dict[Path, str | None]:
    """The run's settings as they are; None for a file that is not there."""
    paths = (run_dir / "config.yaml", run_dir / SAVED)
    return {path: path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None for path in paths}


def restore(run_dir: Path, before: Mapping[Path, str | None]) -> None:
    """Those settings again."""
    for path, text in before.items():
        path.unlink(missing_ok=True) if text is None else write_text(path, text)


@contextmanager
def locked(run_dir: Path, shown: Silent) -> Iterator[None]:
    """Two commands must not write one run's config at the same time: the second waits and says so."""
    from filelock import FileLock

    lock = FileLock(free(run_dir / ".lock"))
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        shown.line(f"waits: another process works on {run_dir}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
