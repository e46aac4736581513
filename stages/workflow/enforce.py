"""How a budget is kept: the one place that decides by which means, and says so."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

from stages.config import ConfigError
from stages.memory.monitor import Sample, descendants


@dataclass(kw_only=True)
class Enforcer:
    """Watches one stage process: it is killed at the first sample over the budget."""

    kind: str  # watchdog | off
    budget: int  # bytes: runner and stage processes together
    pid: int = 0
    violation: Sample | None = field(default=None)

    def adopt(self, pid: int) -> None:
        """The stage process, just started."""
        self.pid = pid

    def look(self, sample: Sample) -> None:
        """Called with every sample of the tree."""
        if self.kind == "watchdog" and self.violation is None and sample.rss > self.budget:
            self.violation = sample
            kill_tree(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """The stage has ended: give back what was set up for it."""
        self.pid = 0


def start(mode: str, budget: int) -> Enforcer:
    """The enforcer for one stage.

    Args:
        mode: ``memory.enforce``: auto | watchdog | off.
        budget: bytes.

    Raises:
        ConfigError: this machine cannot do what the mode asks for.
    """
    if mode == "off":
        return Enforcer(kind="off", budget=budget)
    if mode in ("auto", "watchdog"):
        return Enforcer(kind="watchdog", budget=budget)
    raise ConfigError("memory.enforce", mode, "auto, watchdog or off on this machine")


def kill_tree(pid: int, number: signal.Signals) -> None:
    """Signal a process and all that it started; those that ended meanwhile do not matter."""
    for target in [*descendants(pid), pid]:
        try:
            os.kill(target, number)
        except ProcessLookupError:
            continue
