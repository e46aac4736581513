"""With this folder on PYTHONPATH a stage process ends itself or its runner by SIGKILL, at a moment of choice.

``HIGHRES_KILL=denoise:advance:2:stage``: in the stage ``denoise``, right after the second ``progress.advance``;
``replace`` is right before a finished file gets its name, so that a temporary file stays. The last word is the victim.
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
    if seen == int(count):
        os.kill(os.getpid() if victim == "stage" else os.getppid(), signal.SIGKILL)
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
else:
    replace = os.replace

    def strike_and_replace(source: str, target: str) -> None:
        if in_stage() and f"/.store/{stage}/" in str(target):
            strike()
        replace(source, target)

    os.replace = strike_and_replace
