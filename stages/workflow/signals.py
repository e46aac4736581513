"""Ctrl-C, SIGTERM, a terminal that closes: the first one ends the run in order, later ones change nothing."""

from __future__ import annotations

import signal
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # a person, a batch system, a terminal


class Stopped(KeyboardInterrupt):
    """The command is to end. ``code``: its exit code, as a shell gives it; ``said``: whether the person was told."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code, self.said = 128 + number, False


def listen() -> None:
    """From now on the first of these signals raises :class:`Stopped`. One that is ignored (``nohup``) stays ignored."""
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def ignore() -> None:
    """For a stage's process: signals reach the whole group, and its parent decides what becomes of it."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _stop(number: int, frame: Any) -> None:
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise Stopped(number)
