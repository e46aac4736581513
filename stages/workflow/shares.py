"""``launch.total_budget``: several runs at once within one sum of memory. One waits until what it needs fits.

Every process of a sweep on this machine says in one file how much it takes: what it is itself while it waits, the peak
of its plan (with its stage) while it works. A process that is gone takes nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.config import ConfigError, parse_bytes
from stages.files import read_object, write_json
from stages.job import Job
from stages.memory.monitor import usage
from stages.workflow.overrides import SWEEPS

KEY = "launch.total_budget"
GROWTH = 24_000_000  # bytes: what a runner imports and keeps after it has said how large it is
HELPERS = 40_000_000  # bytes: processes that a launcher keeps beside its workers
_PERIOD = 0.2  # seconds between two looks at what the others take


class Share:
    """This process's part of the sum. See :func:`of`."""

    def __init__(self, output_dir: Path, total: int, name: str, say: Callable[[str], None], more: int = 0) -> None:
        self.total, self.name, self.say = total, name, say
        self._file = output_dir / SWEEPS / f"memory-{socket.gethostname()}.json"
        self._base = usage(os.getpid()).rss + GROWTH + more
        self._write(self._base, False)

    def take(self, wanted: int) -> None:
        """Wait until ``wanted`` bytes, this process among them, fit beside what the others take.

        Raises:
            ConfigError: they would not even if no other one worked.
        """
        wanted, said = max(wanted, self._base), False
        while others := self._write(wanted, True, unless_over=True):
            taken = sum(one["bytes"] for one in others)
            working = [one["name"] for one in others if one["working"]]
            if not working:
                needed, waiting = -(-(wanted + taken) // 1_000_000), f"{taken / 1e6:.0f} MB for {len(others)} that wait"
                expected = f"at least {needed}MB: {wanted / 1e6:.0f} MB for this run (memory.budget), {waiting}"
                hint = "Or fewer jobs at once, or a smaller memory.budget."
                raise ConfigError(KEY, f"{self.total / 1e6:.0f}MB", expected, hint)
            if not said:
                free, who = f"{(self.total - taken) / 1e6:.0f} are free", ", ".join(working)
                self.say(f"{self.name}: waits for memory: needs {wanted / 1e6:.0f} MB, {free}; {who} work")
                said = True
            time.sleep(_PERIOD)

    def settle(self, peak: int) -> None:
        """From now on no more than ``peak`` bytes are needed."""
        self._write(max(peak, self._base), True)

    def leave(self) -> None:
        """Work has ended; the process itself stays."""
        self._write(self._base, False)

    def _write(self, size: int, working: bool, *, unless_over: bool = False) -> list[dict[str, Any]]:
        """Say what is taken here; with ``unless_over`` only if it fits, else the others are returned."""
        from filelock import FileLock

        self._file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._file.with_suffix(".lock")):
            listed = read_object(self._file).items()
            others = {pid: one for pid, one in listed if pid != str(os.getpid()) and _alive(int(pid), one["began"])}
            over = unless_over and sum(one["bytes"] for one in others.values()) + size > self.total
            if not over:
                own = {"bytes": size, "working": working, "name": self.name, "began": _began(os.getpid())}
                write_json(self._file, {**others, str(os.getpid()): own})
        return list(others.values()) if over else []


def _began(pid: int) -> float:
    import psutil

    return psutil.Process(pid).create_time()


def _alive(pid: int, began: float) -> bool:
    import psutil

    try:
        return abs(_began(pid) - began) < 1
    except psutil.NoSuchProcess:
        return False


@contextmanager
def of(job: Job, say: Callable[[str], None]) -> Iterator[Share | None]:
    """The share of a run in ``launch.total_budget``; None where there is no such limit."""
    given = job.config.launch.total_budget
    if given is None:
        yield None
        return
    share = Share(Path(job.config.output_dir), parse_bytes(given, KEY), str(job.run), say)
    try:
        yield share
    finally:
        share.leave()


def of_command(given: str | None, output_dir: Path) -> None:
    """The command that waits for its jobs takes its part too, and so do its launcher's helpers."""
    if given is not None:
        Share(output_dir, parse_bytes(given, KEY), "the sweep's own command", print, HELPERS)
