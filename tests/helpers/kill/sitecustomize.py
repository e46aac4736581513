"""With this folder on PYTHONPATH a stage process ends itself or its runner by SIGKILL, at a moment of choice.

``HIGHRES_KILL=denoise:advance:2:stage``: in the stage ``denoise``, right after the second ``progress.advance``;
``replace`` is right before a finished file gets its name, so that a temporary file stays; ``turn`` is when ranks have
the canvas of a step. The last word is the victim: ``stage``, ``runner`` or a rank (``rank1``).
"""

import os
import signal
import sys
import time

stage, moment, count, victim = os.environ["HIGHRES_KILL"].split(":")
seen = 0


def strike() -> None:
    global seen
    seen += 1
    if victim.startswith("rank") and os.environ.get("RANK") != victim[4:]:
        return
    if seen == int(count):
        os.kill(os.getppid() if victim == "runner" else os.getpid(), signal.SIGKILL)
        time.sleep(30)  # the stage does not outlive its runner


def in_stage() -> bool:
    return len(sys.argv) > 1 and sys.argv[1] == stage


if moment == "advance":
    from stages.context import Progress

    advance = Progress.advance

    def advance_and_strike(self: Progress, n: int = 1) -> None:
        advance(self, n)
        if in_stage():
            strike()

    Progress.advance = advance_and_strike
elif moment == "turn":
    from stages.distributed import Ranks

    broadcast = Ranks.broadcast

    def strike_and_broadcast(self: Ranks, values: object) -> object:
        if in_stage():
            strike()
        return broadcast(self, values)

    Ranks.broadcast = strike_and_broadcast
else:
    replace = os.replace

    def strike_and_replace(source: str, target: str) -> None:
        if in_stage() and f"/.store/{stage}/" in str(target):
            strike()
        replace(source, target)

    os.replace = strike_and_replace
