"""Ctrl-C, SIGTERM, a terminal that closes: the first one ends the run in order, later ones change nothing."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # a person, a batch system, a terminal
_SOON = 0.05  # seconds until a stop that was lost is raised again
_asked: int | None = None  # the signal that asked for it


class Stopped(KeyboardInterrupt):
    """The command is to end. ``code``: its exit code, as a shell gives it; ``said``: whether the person was told."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code, self.said = 128 + number, False


def listen() -> None:
    """From now on the first of these signals raises :class:`Stopped`. One that is ignored (``nohup``) stays ignored.

    Python drops what is raised while it cleans up (a weak reference's callback, as when a thread ends): a stop that
    was lost so is raised again a moment later.
    """
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    if not hasattr(signal, "setitimer"):
        return
    signal.signal(signal.SIGALRM, _raise)
    otherwise = sys.unraisablehook

    def lost(what: Any) -> None:
        if issubclass(what.exc_type, Stopped):
            signal.setitimer(signal.ITIMER_REAL, _SOON)  # no thread: whoever was interrupted may hold its locks
        else:
            otherwise(what)

    sys.unraisablehook = lost


def asked() -> Stopped | None:
    """The stop that was asked for, if one was: what was raised may have become another error on its way."""
    return None if _asked is None else Stopped(_asked)


def ignore() -> None:
    """For a stage's process: signals reach the whole group, and its parent decides what becomes of it. Slurm sends
    SIGTERM to all of a job that it is about to requeue: what a stage has done until it is killed counts."""
    for name in ("SIGINT", "SIGHUP", *(("SIGTERM",) if "SLURM_JOB_ID" in os.environ else ())):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def tie_to_parent(parent: int) -> None:
    """End this process when ``parent`` does, however it ends: results are atomic, so nothing is lost by it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it ended before the line above took effect
        os._exit(1)


def _stop(number: int, frame: Any) -> None:
    global _asked
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _asked = number
    raise Stopped(number)


def _raise(number: int, frame: Any) -> None:
    if (stop := asked()) is not None:
        raise stop
