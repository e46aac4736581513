"""A memory cgroup for one stage process, v2 or v1: the kernel keeps the limit, page cache included. Linux only.

https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFIX = "highres-"  # of a group's name: highres-<process id of its runner>-<what>
_PATIENCE = 2.0  # seconds that a group may still be busy after its last process was killed


class Unavailable(OSError):
    """No memory cgroup can be made here; the text says why."""


class Cgroup:
    """One group below the runner's own, with a limit and without swap. ``remove`` it when its processes have ended."""

    def __init__(self, path: Path, version: int, limit: int) -> None:
        self.path, self.version, self.limit = path, version, limit

    @classmethod
    def create(cls, limit: int, what: str, *, proc: Path = Path("/proc/self")) -> Cgroup:
        """A group of ``limit`` bytes that a process of ours has been in already.

        Raises:
            Unavailable: no controller, no permission, or the kernel refuses to move a process into it.
        """
        reasons = []
        for parent, version in places(proc):
            sweep(parent)
            group = cls(parent / f"{PREFIX}{os.getpid()}-{what}", version, limit)
            try:
                group.path.mkdir(exist_ok=True)
                group._configure()
                moved = subprocess.run(group.command(["/bin/sh", "-c", ":"], must=True), stderr=subprocess.PIPE)
                if moved.returncode == 0:
                    return group
                reasons.append(f"{parent}: {moved.stderr.decode(errors='replace').strip()}")
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
            group.remove()
        raise Unavailable("; ".join(reasons) or "no memory controller for this process (/proc/self/cgroup)")

    def _configure(self) -> None:
        if self.version == 2:
            self._write("memory.max", self.limit)
            self._write("memory.swap.max", 0, optional=True)
            self._write("memory.oom.group", 1, optional=True)
        else:
            # usage must stay under memory and under memory with swap: equal limits leave no swap
            self._write("memory.limit_in_bytes", self.limit)
            self._write("memory.memsw.limit_in_bytes", self.limit, optional=True)

    def _write(self, name: str, value: int, *, optional: bool = False) -> None:
        file = self.path / name
        if file.exists() or not optional:  # without swap accounting the kernel has no such file
            file.write_text(str(value))

    def command(self, arguments: Sequence[str], *, must: bool = False) -> list[str]:
        """``arguments`` started by a shell that enters the group first: nothing is charged elsewhere, and no Python
        runs between fork and exec. With ``must`` it ends with 1 where it cannot enter."""
        end = " || exit 1" if must else ""
        return ["/bin/sh", "-c", f'echo 0 > "$0"{end}; exec "$@"', str(self.processes), *arguments]

    @property
    def processes(self) -> Path:
        """The file that a process enters by: it writes its id, or 0."""
        return self.path / "cgroup.procs"

    @property
    def environment(self) -> dict[str, str]:
        """For processes of the group: weights that are read again and again would fill its page cache and make the
        kernel reclaim all the time (a step took 1.3 times as long; without the pages it takes as long as ever)."""
        return {"HIGHRES_PAGE_CACHE": "drop"}

    def oom_kills(self) -> int:
        """Processes of the group that the kernel has killed for its limit."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        try:
            found = re.search(r"^oom_kill (\d+)$", (self.path / name).read_text(), re.MULTILINE)
        except FileNotFoundError:
            return 0
        return int(found[1]) if found else 0

    def usage(self) -> dict[str, int]:
        """``anon``, ``file`` (page cache) and ``peak`` (of all) in bytes; what the kernel does not tell is missing."""
        wanted = {"anon": "anon", "file": "file", "rss": "anon", "cache": "file"}
        found: dict[str, int] = {}
        try:
            for line in (self.path / "memory.stat").read_text().splitlines():
                key, _, value = line.partition(" ")
                if key in wanted:
                    found[wanted[key]] = int(value)
            peak = self.path / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
            found["peak"] = int(peak.read_text())
        except FileNotFoundError:  # memory.peak came with Linux 5.19
            return found
        return found

    def remove(self) -> None:
        """Give the group back. One that stays busy is swept by a later run."""
        remove(self.path, _PATIENCE)


def remove(path: Path, patience: float = 0.0) -> bool:
    """Remove an empty group; whether it is gone."""
    end = time.monotonic() + patience
    while True:
        try:
            path.rmdir()
            return True
        except FileNotFoundError:
            return True
        except OSError:  # busy: its processes are being taken down
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)


def sweep(parent: Path) -> None:
    """Remove the empty groups of runners that have ended without doing it."""
    for path in parent.glob(f"{PREFIX}*-*"):
        number = path.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            remove(path)


def places(proc: Path = Path("/proc/self")) -> Iterator[tuple[Path, int]]:
    """(folder, version) where a group could be made: v1 the process' own group, v2 the nearest one above it that hands
    the memory controller down (a group with processes cannot)."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except FileNotFoundError:
        return
    own = {controllers: path for _, controllers, path in memberships}
    for fields in mounts:
        root, folder, rest = fields[3], Path(fields[4]), fields[fields.index("-") + 1 :]
        if rest[0] == "cgroup2" and "" in own:
            here = _below(folder, root, own[""])
            for group in (here, *here.parents) if here.is_relative_to(folder) else ():
                control = group / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text().split() and os.access(group, os.W_OK):
                    yield group, 2
                    break
                if group == folder:
                    break
        if rest[0] == "cgroup" and "memory" in rest[2].split(","):
            path = next((path for names, path in own.items() if "memory" in names.split(",")), None)
            here = _below(folder, root, path or "/")
            if path is not None and here.is_dir() and os.access(here, os.W_OK):
                yield here, 1


def _below(folder: Path, root: str, path: str) -> Path:
    """Where the group ``path`` lies under a mount of the hierarchy's folder ``root``; the mount itself if it is not
    in view (a container)."""
    inside = os.path.relpath(path, root)
    return folder if inside.startswith("..") or not (folder / inside).is_dir() else folder / inside
