"""A pipeline of three stages without torch: real processes, files and locks, in milliseconds.

What a stage does beside its work is told by environment variables, so that a test can make it slow, fail or die.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

from stages import Stage

PIPELINE = (
    Stage("draw", 1, ("seed", "prompt"), lambda config: (), True),
    Stage("tiles", 1, ("width", "denoise.strength"), lambda config: ("draw",), spreads=True),
    Stage("join", 1, ("height",), lambda config: ("tiles",)),
)


def mischief(stage, step):
    """What the test asked for: TOY_SLOW=seconds a step, TOY_DIE=stage:step (SIGKILL), TOY_FAIL=stage, TOY_EAT=stage,
    TOY_TELL=folder (what its process is like)."""
    if folder := os.environ.get("TOY_TELL"):
        (Path(folder) / f"{stage}.json").write_text(json.dumps(surroundings()))
    time.sleep(float(os.environ.get("TOY_SLOW", "0")))
    if os.environ.get("TOY_DIE") == f"{stage}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TOY_FAIL") == stage:
        raise ValueError("the toy broke")
    if os.environ.get("TOY_EAT") == stage:
        eaten = [bytearray(os.urandom(1 << 20)) * 20 for _ in range(40)]  # 800 MB
        time.sleep(5)
        del eaten


def surroundings():
    """What a process has from whoever started it."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    listed = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    held = [os.readlink(one) for one in listed if os.path.lexists(one)]  # without that of the listing
    return {
        "environment": dict(os.environ),
        "parent": os.getppid(),
        "group": (os.getpgid(0), os.getsid(0)),
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "files": sorted(re.sub("[0-9a-f]{64}|[0-9]+", "N", path) for path in held),
        "folder": os.getcwd(),
        "cgroup": Path("/proc/self/cgroup").read_text(),
    }
