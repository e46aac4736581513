"""``stage=gc``, and ``store.max_size``: stored results go that no run links to, the oldest first.

What a process works on stays: its lock is held here while a result goes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from stages.config import ConfigError, parse_bytes
from stages.files import free
from stages.paths import anchored
from stages.workflow.store import Store
from stages.workflow.upkeep.survey import WEIGHTS, Result, age, results, size, users

FRESH = 60.0  # seconds: a run may be about to link to what is younger
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)?")
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400, None: 86400}


def gc(config: DictConfig) -> None:
    """Remove what no run links to and is older than ``keep`` says; with ``dry=true`` only say what that is.

    Raises:
        ConfigError: ``keep`` is no time.
    """
    kept = _seconds(config.keep)
    old = [one for one in _removable(anchored(config.output_dir)) if time.time() - one.changed >= max(kept, FRESH)]
    gone = _remove(old, print, dry=config.dry)
    what = "would be freed" if config.dry else "freed"
    print(f"{len(gone)} results, {size(sum(one.bytes for one in gone))} {what}", flush=True)


def trim(config: DictConfig, say: Callable[[str], Any]) -> None:
    """Hold the store to ``store.max_size``, as far as results go that no run links to.

    Raises:
        ConfigError: ``store.max_size`` is no size.
    """
    if config.store.max_size is None:
        return
    limit, output_dir = parse_bytes(config.store.max_size, "store.max_size"), anchored(config.output_dir)
    total = sum(one.bytes for one in results(output_dir))
    chosen, left = [], total
    for one in _removable(output_dir):
        if left > limit and time.time() - one.changed >= FRESH:
            chosen.append(one)
            left -= one.bytes
    gone = sum(one.bytes for one in _remove(chosen, lambda text: None))
    if gone:
        say(f"store.max_size: {size(gone)} freed, results that no run links to")
    if total - gone > limit:
        why = "what is left is new, at work, or runs link to it; stage=list shows them"
        say(f"store.max_size: got {size(limit)}, the store holds {size(total - gone)}: {why}")


def _removable(output_dir: Path) -> list[Result]:
    return [one for one in results(output_dir) if not one.runs]


def _remove(found: Iterable[Result], say: Callable[[str], Any], *, dry: bool = False) -> list[Result]:
    """Remove results unless a process holds their lock, or a run has linked to them meanwhile; returns those that went
    (or would)."""
    gone = []
    for one in found:
        store = one.path.parent.parent
        entry = Store(store).entry(one.stage, one.path.name)
        lock = FileLock(free(one.path.with_suffix(".lock"))) if one.stage == WEIGHTS else entry.lock()  # as it is made
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            say(f"{one.stage}/{one.path.name[:12]}: a process works on it, stays")
            continue
        try:
            if one.path.resolve() in users(store.parent):
                continue
            if not dry:
                entry.remove()
        finally:
            lock.release()
        state = "" if one.whole else ", begun"
        say(f"{one.stage}/{one.path.name[:12]}: {size(one.bytes)}, {age(one.changed)} old{state}")
        gone.append(one)
    return gone


def _seconds(keep: Any) -> float:
    match = _AGE.fullmatch(str(keep))
    if match is None:
        raise ConfigError("keep", keep, "a time such as 7d, 12h, 30min; 0: nothing that no run links to")
    return float(match[1]) * _UNITS[match[2]]
