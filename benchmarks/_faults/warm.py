"""The command line without its imports: a process that has them all forks runner and stages, a second or two a try.

Files, locks, events, signals and limits are the real ones; what is not tried here is how a process starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import runner
from stages.memory.imports import light_imports
from stages.memory.monitor import descendants
from stages.workflow.enforce import kill_tree
from stages.workflow.launch import local

_STAGES = ("rehearsal", "profile", "text_encode", "lowres", "guide", "denoise", "decode", "stitch")


def preload(checkpoint: Path) -> None:
    """Import what runner and stages import, and make each class of ``checkpoint`` once."""
    import importlib

    with light_imports():
        from accelerate import init_empty_weights  # noqa: F401
        from diffusers import AutoencoderKL  # noqa: F401
    for stage in ("__main__", *_STAGES):
        importlib.import_module(f"stages.{stage}")
    from stages.families.schedules import make_scheduler
    from stages.models.checkpoint import Checkpoint

    opened = Checkpoint.open(str(checkpoint))
    for name in ("text_encoder", "unet", "vae"):
        opened.component(name).build()
    opened.tokenizer()
    make_scheduler(opened, None, {})


def _fork(run: Callable[[], int]) -> int:
    """The id of a child that ends with what ``run`` returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(run)
    return pid


def _become(run: Callable[[], int]) -> NoReturn:
    code: Any = 1
    try:
        code = run()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _close_all_but(kept: Sequence[int]) -> None:
    edges = [2, *sorted(kept), int(os.sysconf("SC_OPEN_MAX"))]
    for low, high in pairwise(edges):
        os.closerange(low + 1, min(high, 4096))


class Forked:
    """``subprocess.Popen`` of a stage, as :mod:`stages.workflow.launch.local` uses it."""

    def __init__(self, command: Sequence[str], *, stdout: Any, env: dict[str, str], pass_fds: Any, **_: Any) -> None:
        self.returncode: int | None = None

        def stage() -> int:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            _close_all_but(pass_fds)
            os.environ.clear()
            os.environ.update(env)
            from stages.__main__ import main

            return main(list(command[command.index("stages") + 1 :]))

        self.pid = _fork(stage)

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("stage", timeout or 0)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode


class Ended(NamedTuple):
    """A command that has ended: exit code (-9 where it was killed), what it printed, seconds."""

    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool = False


class Command:
    """``python runner.py arguments`` in ``folder``, begun."""

    def __init__(self, folder: Path, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._begin, self._files = time.monotonic(), (folder / "stdout", folder / "stderr")
        folder.mkdir(parents=True, exist_ok=True)

        def command() -> int:
            for number, file in enumerate(self._files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(folder)
            os.environ.update(environment or {})
            streams = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
            setattr(local, "subprocess", SimpleNamespace(Popen=Forked, **streams))  # noqa: B010
            sys.argv = ["runner.py", *arguments]
            return runner.main()

        self._process = SimpleNamespace(pid=_fork(command))
        self.pid: int = self._process.pid
        self._code: int | None = None

    def running(self) -> bool:
        if self._code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(found[1])
        return self._code is None

    def stages(self) -> list[int]:
        """Process ids of what it has started."""
        return descendants(self.pid)

    def end(self, timeout: float = 300.0) -> Ended:
        """Wait for it; one that takes longer is killed with all that it started."""
        late = False
        while self.running():
            if time.monotonic() - self._begin > timeout and not late:
                late = True
                import signal

                kill_tree(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        assert self._code is not None
        return Ended(self._code, out, err, time.monotonic() - self._begin, late)
