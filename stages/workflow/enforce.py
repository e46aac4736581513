"""How a budget is kept: the one place that decides by which means, and says so.

``watchdog``: samples of RES over runner and stage. ``cgroup``: the kernel, for the stage, with what the runner leaves
of the budget (and the process that it was forked from, if it was); page cache counts there, and is reclaimed before
anything is killed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.config import ConfigError
from stages.memory.monitor import Sample, descendants, usage
from stages.workflow.cgroup import Cgroup, Unavailable

_IN_MEMORY = ("tmpfs", "ramfs")  # files there are charged to the group and cannot be reclaimed


@dataclass(kw_only=True)
class Enforcer:
    """Keeps one stage process within the budget: it is killed at the first sample over it, or by its cgroup."""

    watch: bool  # whether a sample over the budget ends the stage
    budget: int  # bytes: runner and stage processes together
    cgroup: Cgroup | None = None
    pid: int = 0
    violation: Sample | None = field(default=None)
    blind: str = ""  # why nobody watched any more, if the stage was ended for that
    by_kernel: str = ""  # what the cgroup counted, if it was the cgroup
    _last: Sample = field(default=Sample(0.0, 0, 0, 0, ""))

    @property
    def kind(self) -> str:
        """cgroup | watchdog | off."""
        return "cgroup" if self.cgroup else "watchdog" if self.watch else "off"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The stage's command line, entering its cgroup first if it has one."""
        return self.cgroup.command(arguments) if self.cgroup else list(arguments)

    @property
    def environment(self) -> dict[str, str]:
        """What the stage's environment needs besides."""
        return self.cgroup.environment if self.cgroup else {}

    @property
    def enters(self) -> Path | None:
        """Where a stage that is forked writes a 0 first, instead: into its cgroup."""
        return self.cgroup.processes if self.cgroup else None

    def adopt(self, pid: int) -> None:
        """The stage process, just started."""
        self.pid = pid

    def look(self, sample: Sample) -> None:
        """Called with every sample of the tree."""
        self._last = sample
        if self.watch and self.violation is None and sample.rss > self.budget:
            self.violation = sample
            kill_tree(self.pid, signal.SIGKILL)

    def lost(self, error: Exception) -> None:
        """Looking failed: a stage that nobody watches does not run on."""
        if self.watch and self.violation is None:
            self.blind = f"{type(error).__name__}: {error}"
            kill_tree(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """The stage has ended: find out whether the kernel ended it, give back what was set up for it."""
        self.pid = 0
        if self.cgroup is None:
            return
        if self.violation is None and self.cgroup.oom_kills():
            counted = self.cgroup.usage()
            self.violation = self._last
            self.by_kernel = f"its cgroup has {self.cgroup.limit / 1e6:.0f} MB, what the others leave of the budget"
            if "peak" in counted:
                self.by_kernel += f"; {counted['peak'] / 1e6:.0f} MB were charged, page cache included"
        self.cgroup.remove()
        self.cgroup = None


def start(mode: str, budget: int, *, what: str = "stage", writes: Path | None = None, beside: int = 0) -> Enforcer:
    """The enforcer for one stage.

    Args:
        mode: ``memory.enforce``: auto | cgroup | watchdog | off. ``auto`` takes a cgroup where one can be made and
            ``writes`` is on a disk, and the watchdog always; ``cgroup`` takes it or refuses.
        budget: bytes.
        what: names the cgroup: the stage.
        writes: folder that the stage writes to.
        beside: bytes that the process takes which the stage is forked from.

    Raises:
        ConfigError: ``cgroup``, and this process cannot make one.
    """
    if mode in ("off", "watchdog"):
        return Enforcer(watch=mode == "watchdog", budget=budget)
    if mode == "auto" and writes is not None and in_memory(writes):
        return Enforcer(watch=True, budget=budget)
    limit = max(1 << 20, budget - usage(os.getpid()).rss - beside)
    try:
        return Enforcer(watch=True, budget=budget, cgroup=Cgroup.create(limit, what))
    except Unavailable as error:
        if mode == "cgroup":
            hint = (
                f"This process cannot make one: {error}. Run as root, in a delegated group "
                "(systemd-run --user --scope -p Delegate=yes python runner.py ...), or with memory.enforce=watchdog."
            )
            raise ConfigError("memory.enforce", mode, "a machine where a memory cgroup can be made", hint) from None
        return Enforcer(watch=True, budget=budget)


def in_memory(folder: Path) -> bool:
    """Whether files in ``folder`` take RAM."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except FileNotFoundError:
        return False
    path = folder.resolve()
    holding = [fields for fields in mounts if path.is_relative_to(fields[1].replace("\\040", " "))]
    return bool(holding) and max(holding, key=lambda fields: len(fields[1]))[2] in _IN_MEMORY


def kill_tree(pid: int, number: signal.Signals) -> None:
    """Signal a process and all that it started; those that ended meanwhile do not matter."""
    for target in [*descendants(pid), pid]:
        try:
            os.kill(target, number)
        except ProcessLookupError:
            continue
