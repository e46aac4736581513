"""How much memory a run takes: samples of RES over the runner and its stage processes, with the module that ran.

No torch. On Linux from /proc, elsewhere through psutil. All figures are bytes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

LINUX = sys.platform == "linux"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_RESCAN = 10  # samples between two looks for new descendants and at the kernel's own peak
_GONE = ("NoSuchProcess", "AccessDenied", "ZombieProcess")  # psutil's words for a process that ended
_POINTS = 2000  # of a timeline; beyond, neighbours are merged (the higher one stays)


class Sample(NamedTuple):
    """One look at the tree: seconds since the start, RES, its anonymous and file-backed parts, the running module; and
    what the GPU's allocator holds."""

    seconds: float
    rss: int
    anon: int
    file: int
    module: str
    vram: int = 0


class Usage(NamedTuple):
    """RES of a process and the part of it that is file-backed or shared."""

    rss: int
    file: int


def usage(pid: int) -> Usage:
    """Memory of one process; zeros once it has ended."""
    try:
        if LINUX:
            with open(f"/proc/{pid}/statm", "rb") as statm:
                numbers = statm.read().split()
            return Usage(int(numbers[1]) * _PAGE, int(numbers[2]) * _PAGE)
        import psutil

        info = psutil.Process(pid).memory_info()
        return Usage(info.rss, getattr(info, "shared", 0))
    except (OSError, ValueError, IndexError) as error:
        del error  # it ended between two looks
        return Usage(0, 0)
    except Exception as error:
        if type(error).__name__ in _GONE:
            return Usage(0, 0)
        raise


def peak_rss(pid: int | str = "self") -> int:
    """The kernel's own peak of a process (VmHWM); 0 where it is not known (ended, or not Linux)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def own_peak_rss() -> int:
    """Peak RES of this process."""
    if LINUX:
        return peak_rss()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and those that they started; without those that end meanwhile."""
    if not LINUX:
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.Error as error:
            if type(error).__name__ in _GONE:
                return []
            raise
    found: list[int] = []
    for thread in _entries(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                children = [int(child) for child in file.read().split()]
        except OSError:  # the thread ended
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the process ended
        return []


def _merged(samples: Sequence[Sample]) -> Sample:
    """Neighbours of a timeline in one: no peak is lost."""
    return max(samples, key=lambda one: one.rss)._replace(vram=max(one.vram for one in samples))


class Monitor:
    """Samples the tree in a thread until ``stop``; ``over`` is asked with every sum and may end the stage.

    ``beside`` is the process that the stage was forked from: in every sum, like this one. ``blind`` is told why, if
    looking fails: nobody watches the stage any more.
    """

    def __init__(
        self,
        pid: int,
        period: float,
        module: Callable[[], str],
        over: Callable[[Sample], None],
        vram: Callable[[], int] = lambda: 0,
        blind: Callable[[Exception], None] = lambda error: None,
        beside: int = 0,
    ) -> None:
        self.pid, self.period, self.module, self.over, self.vram, self.blind = pid, period, module, over, vram, blind
        self._others = [os.getpid(), *([beside] if beside else [])]
        self.timeline: list[Sample] = []
        self.by_module: dict[str, int] = {}
        self.peak = Sample(0.0, 0, 0, 0, "")
        self.child_peak = 0  # VmHWM of the stage process as last seen
        self._pids, self._step, self._pending = [pid], 1, []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-monitor", daemon=True)

    def start(self) -> Monitor:
        """Begin; returns itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End; the figures are complete afterwards."""
        self._ended.set()
        self._thread.join()

    @property
    def heaviest(self) -> list[tuple[str, int]]:
        """The ten modules with the highest sum while they ran."""
        return sorted(self.by_module.items(), key=lambda item: -item[1])[:10]

    def _watch(self) -> None:
        try:
            self._look()
        except Exception as error:
            self.blind(error)

    def _look(self) -> None:
        begin, count = time.monotonic(), 0
        while True:
            if count % _RESCAN == 0:
                self._pids = [self.pid, *descendants(self.pid)]
                self.child_peak = max(self.child_peak, peak_rss(self.pid))
            count += 1
            self._take(time.monotonic() - begin)
            if self._ended.wait(self.period):
                return

    def _take(self, seconds: float) -> None:
        parts = [usage(pid) for pid in self._pids]
        if not any(part.rss for part in parts):
            return  # the stage has ended
        parts += [usage(pid) for pid in self._others]
        rss, file, module = sum(part.rss for part in parts), sum(part.file for part in parts), self.module()
        sample = Sample(round(seconds, 3), rss, rss - file, file, module, self.vram())
        if rss > self.peak.rss:
            self.peak = sample
        if module:
            self.by_module[module] = max(self.by_module.get(module, 0), rss)
        self._keep(sample)
        self.over(sample)

    def _keep(self, sample: Sample) -> None:
        self._pending.append(sample)
        if len(self._pending) >= self._step:
            self.timeline.append(_merged(self._pending))
            self._pending = []
        if len(self.timeline) >= _POINTS:
            pairs = zip(self.timeline[::2], self.timeline[1::2], strict=True)
            self.timeline = [_merged(pair) for pair in pairs]
            self._step *= 2
