"""Passes over the groups of a canvas that need one another: each runs up to where they meet, then the next one does.

A pass is stock code and knows nothing of this: it is a greenlet, which can stand still anywhere
(https://greenlet.readthedocs.io). All run in one thread, one at a time and always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from greenlet import getcurrent, greenlet
from torch import Tensor

from stages.memory.parking import Parking


def meet() -> None:
    """Wait until all passes have come this far; alone there is nobody to wait for."""
    if (others := getcurrent().parent) is not None:
        others.switch()


def in_turns(calls: Sequence[Callable[[], Tensor]], scratch: Path) -> Iterator[Tensor]:
    """What each call gives, in their order.

    Args:
        calls: passes that meet equally often.
        scratch: the file where activations of those that wait lie.
    """
    parking, waiting = Parking(scratch), list(enumerate(map(greenlet, calls)))
    several = len(waiting) > 1
    try:
        while waiting:
            still = []
            for name, one in waiting:
                with parking.turn(name):
                    found = one.switch()
                if one.dead:
                    yield found
                    continue
                still.append((name, one))
                if several:
                    parking.park(name)
            if 0 < len(still) < len(waiting):
                raise RuntimeError(f"{len(waiting) - len(still)} of {len(waiting)} passes met less often than the rest")
            waiting = still
    finally:
        parking.close()
