"""A pipeline of three stages without torch: real processes, files and locks, in milliseconds.

What a stage does beside its work is told by environment variables, so that a test can make it slow, fail or die.
"""

import os
import signal
import time

from stages import Stage

PIPELINE = (
    Stage("draw", 1, ("seed", "prompt"), lambda config: (), True),
    Stage("tiles", 1, ("width", "denoise.strength"), lambda config: ("draw",), spreads=True),
    Stage("join", 1, ("height",), lambda config: ("tiles",)),
)


def mischief(stage, step):
    """What the test asked for: TOY_SLOW=seconds a step, TOY_DIE=stage:step (SIGKILL), TOY_FAIL=stage, TOY_EAT=stage."""
    time.sleep(float(os.environ.get("TOY_SLOW", "0")))
    if os.environ.get("TOY_DIE") == f"{stage}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TOY_FAIL") == stage:
        raise ValueError("the toy broke")
    if os.environ.get("TOY_EAT") == stage:
        eaten = [bytearray(os.urandom(1 << 20)) * 20 for _ in range(40)]  # 800 MB
        time.sleep(5)
        del eaten
