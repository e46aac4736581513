"""A stage up to its first unit, fresh or forked: prints the seconds of processor time that took, and RES then.

``STAGE RUN_DIR``, or ``STAGE RUN_DIR TIMES``: so many forked ones, after what they are forked from.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from stages import __main__ as process
from stages import zygote
from stages.config import STAGES
from stages.context import Progress
from stages.memory.monitor import usage


def say() -> None:
    rss, file = usage(os.getpid())
    os.write(1, f"\n{json.dumps({'seconds': time.process_time(), 'rss': rss, 'file': file})}\n".encode())


def _stop(*_: Any) -> None:
    say()
    os._exit(0)


def _stage(stage: str, run_dir: str) -> None:
    Progress.mark = _stop  # type: ignore[method-assign]
    process.main([stage, run_dir, "--force"])
    _stop()  # it opens no model: with its work, which is little here


def _forked(stage: str, run_dir: str, times: int) -> None:
    zygote.warm(Path(run_dir), "stages", STAGES)
    zygote.threads()
    say()
    for _ in range(times):
        if not (child := os.fork()):
            _stage(stage, run_dir)
        os.waitpid(child, 0)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _stage(*sys.argv[1:])
    else:
        _forked(sys.argv[1], sys.argv[2], int(sys.argv[3]))
