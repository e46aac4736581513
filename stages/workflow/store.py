"""The content-addressed store of stage results.

``<root>/<stage>/<fingerprint>/`` holds one result: its files, and last of all ``manifest.json`` with a digest per file.
Without a manifest whose digests match, a result is not done; what lies there is partial work.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.files import TEMPORARY, digest, free, make_folder, read_json, read_object, write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"  # files so named are a stage's own and vanish when it commits


class Check(NamedTuple):
    """What a look at an entry found: its manifest if all is well, else the reason and the files that are intact."""

    manifest: dict[str, Any] | None
    reason: str
    intact: frozenset[str] = frozenset()


class Entry:
    """One stage result in the store; cheap to make, nothing is read before it is asked for."""

    def __init__(self, root: Path, stage: str, print_: str, payload: Mapping[str, Any] | None = None) -> None:
        self.stage, self.fingerprint, self.payload = stage, print_, payload
        self.path = root / stage / print_
        self._lock_path = root / ".locks" / f"{stage}-{print_}.lock"
        self._holder_path = root / ".locks" / f"{stage}-{print_}.json"
        self._stats_path = root / ".stats" / f"{stage}-{print_}.json"

    def _check(self) -> Check:
        manifest = read_json(self.path / MANIFEST)
        if manifest is None:
            torn = (self.path / MANIFEST).exists()
            return Check(None, f"{self.stage}/{MANIFEST} is not readable" if torn else "no result yet")
        if not isinstance(manifest, dict) or manifest.get("fingerprint") != self.fingerprint:
            return Check(None, f"{self.stage}/{MANIFEST} belongs to another result")
        intact, reason, files = set(), "", manifest.get("files")
        if not isinstance(files, dict) or not files or not all(isinstance(file, dict) for file in files.values()):
            return Check(None, f"{self.stage}/{MANIFEST} names no files")
        for name, file in files.items():
            path = self.path / name
            if not path.is_file():
                reason = reason or f"{self.stage}/{name} is missing on disk"
            elif path.stat().st_size != file.get("bytes") or digest(path) != file.get("sha256"):
                reason = reason or f"{self.stage}/{name} changed on disk"
            else:
                intact.add(name)
        return Check(None if reason else manifest, reason, frozenset(intact))

    def manifest(self) -> dict[str, Any] | None:
        """The manifest if the result is done and every file has the digest it names, else None."""
        return self._check().manifest

    def why_invalid(self) -> str:
        """Why the result cannot be used ('no result yet', 'guide/x.safetensors changed on disk'); '' if it can."""
        return self._check().reason

    def begun(self) -> bool:
        """True where partial work of an earlier, interrupted try lies: files, but no manifest."""
        if not self.path.is_dir() or (self.path / MANIFEST).exists():
            return False
        return any(path.is_file() and not path.name.startswith(TEMPORARY) for path in self.path.rglob("*"))

    def lock(self) -> BaseFileLock:
        """The lock that a process holds while it computes this result; it falls with the process."""
        from filelock import FileLock

        return FileLock(free(self._lock_path), thread_local=False)

    def hold(self, run: str) -> None:
        """Say who has the lock, for those that wait for it."""
        write_json(self._holder_path, {"run": run, "process": os.getpid(), "host": socket.gethostname()})

    def holder(self) -> str:
        """Who had the lock last: ``run poster, process 4242``; "" where nobody said."""
        found = read_object(self._holder_path)
        where = "" if found.get("host") in (None, socket.gethostname()) else f" on {found['host']}"
        return f"run {found.get('run')}, process {found.get('process')}{where}" if found else ""

    def prepare(self, *, force: bool = False) -> None:
        """Make the folder fit to compute in (the lock is held): only intact files of earlier tries stay, or none.

        Files that a manifest names with another digest go, as do temporary files of killed processes.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            self.path.unlink()
        if force and self.path.exists():
            shutil.rmtree(self.path)
        elif (self.path / MANIFEST).exists():
            intact = self._check().intact
            _remove(self.path / MANIFEST)
            for path in list(self.path.rglob("*")):
                if path.is_file() and path.relative_to(self.path).as_posix() not in intact:
                    path.unlink()
        make_folder(self.path)
        for path in list(self.path.rglob(f"{TEMPORARY}*")):
            _remove(path)

    def commit(self, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Declare the result done: checkpoints go, every other file's digest enters the manifest, written last."""
        for path in list(self.path.rglob(f"{CHECKPOINT}*")):
            _remove(path)
        files = {
            path.relative_to(self.path).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.name != MANIFEST and not path.name.startswith(TEMPORARY)
        }
        manifest = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "payload": dict(self.payload or {}),
            "files": files,
            "info": dict(info or {}),
        }
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def stats(self) -> dict[str, Any]:
        """Seconds and peaks measured when the result was computed; {} if nobody measured."""
        return read_object(self._stats_path)

    def remove(self) -> None:
        """Remove the result and what is noted of it (the lock is held, and stays)."""
        if os.path.lexists(self.path):  # else another process was here first
            _remove(self.path)
        for note in (self._stats_path, self._holder_path):
            note.unlink(missing_ok=True)

    def write_stats(self, stats: Mapping[str, Any]) -> None:
        """Remember what the computation took; it is not part of the result."""
        write_json(self._stats_path, dict(stats))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Store:
    """All results under one folder, shared by runs and sweep jobs."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def entry(self, stage: str, print_: str, payload: Mapping[str, Any] | None = None) -> Entry:
        """The (present or future) result of ``stage`` with this fingerprint; ``payload`` is kept in its manifest."""
        return Entry(self.root, stage, print_, payload)
