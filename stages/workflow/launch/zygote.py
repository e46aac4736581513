"""The process that stages are forked from, as the runner sees it: started when it is first needed, ended with the run.

It is in every sum of memory. Where it cannot be had, or ends, stages start fresh: the result is the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stages.files import free, make_folder
from stages.memory.monitor import usage

MESSAGE = 1 << 16  # bytes, of a request or an answer at most
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, <linux/prctl.h>
_WARM, _ANSWER = 120.0, 20.0  # seconds, on a machine that does much else
_LARGER = 1.1  # times the bytes that were planned: more is another process than was measured
_MOMENTS = (0.001, 0.05)  # seconds between two looks whether a process has ended, at first and at last


class Files(NamedTuple):
    """Descriptors that a stage is handed: of its log, its events, its marks; and one from which it may read that it is
    to begin."""

    log: int
    events: int
    marks: int
    go: int


class Process(Protocol):
    """What a stage's process is to the runner: :class:`subprocess.Popen`, or :class:`Forked`."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """As ``poll``, when it has ended. subprocess.TimeoutExpired: it has not, after so many seconds."""
        ...


class Forked:
    """A child of this process that it did not start itself."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def _look(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # somebody else took its end, so it has ended: as subprocess says it
            self._code = 0
            return
        if pid:
            self._code = os.waitstatus_to_exitcode(status)

    def poll(self) -> int | None:
        """See :class:`Process`."""
        if self._code is None:
            self._look(os.WNOHANG)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """See :class:`Process`."""
        moment, most = _MOMENTS
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is None:
                self._look(0)
            elif time.monotonic() >= end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            else:
                time.sleep(moment)
                moment = min(2 * moment, most)
        return code


class Zygote:
    """``modules`` are those of the stages that will be forked, ``planned`` the bytes of RES that the plan gives it.

    ``say`` is told when stages have to start fresh, and why.
    """

    def __init__(
        self,
        run_dir: Path,
        modules: Sequence[str],
        *,
        pipeline: str,
        environment: Mapping[str, str],
        planned: int,
        say: Callable[[str], None],
    ) -> None:
        self._run_dir, self._modules, self._pipeline = run_dir, list(modules), pipeline
        self._environment, self._planned, self._say = dict(environment), planned, say
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._gone = False

    @property
    def pid(self) -> int:
        """Of its process; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def rss(self) -> int:
        """Bytes of RES that it takes now."""
        return usage(self.pid).rss if self.pid else 0

    def ready(self) -> bool:
        """Whether stages can be forked: it is started if need be, and has imported all."""
        if self._socket is None and not self._gone:
            self._start()
            hello = self._answer(_WARM)
            if "error" in hello:
                self._lost(str(hello["error"]))
            elif hello["threads"] > 1:
                self._lost(f"{hello['threads']} threads run in it")
            elif hello["rss"] > self._planned * _LARGER:
                took = f"{hello['rss'] / 1e6:.0f} MB instead of {self._planned / 1e6:.0f}"
                self._lost(f"it takes {took}, which are not in the plan")
        return self._socket is not None

    def fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], files: tuple[int, int, int], enter: Path | None
    ) -> Forked | None:
        """A stage's process; None where it has to be started fresh.

        Args:
            arguments: of ``python -m stages``, without descriptors and parent.
            environment: all of the stage's.
            files: descriptors of its log, its events, its marks.
            enter: the file that it writes a 0 to first, of a cgroup.
        """
        if self._socket is None:
            return None
        own = self._environment
        request = {
            "arguments": list(arguments),
            "environment": {name: value for name, value in environment.items() if own.get(name) != value},
            "without": [name for name in own if name not in environment],
            "enter": str(enter) if enter else None,
        }
        reader, writer = os.pipe()
        try:
            answer = self._ask(json.dumps(request), Files(*files, reader))
            if pid := answer.get("pid"):
                os.write(writer, b"1")  # one that is not heard of ends when the pipe does
                return Forked(pid)
        finally:
            os.close(reader)
            os.close(writer)
        self._lost(str(answer.get("error", "no process could be forked from it")))
        return None

    def end(self) -> None:
        """Give its memory back. The next ``ready`` starts it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()  # it has nothing to finish
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # for good: what is forked later has to come here too
        log = self._run_dir / "logs" / "zygote.log"
        make_folder(log.parent)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "stages.zygote", str(self._run_dir), *self._modules]
        command += ["--pipeline", self._pipeline, "--socket", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs, free(log).open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=(theirs.fileno(),),
            )

    def _ask(self, request: str, files: Files) -> dict[str, Any]:
        assert self._socket is not None
        try:
            socket.send_fds(self._socket, [request.encode()], files)
        except OSError as error:
            return {"error": f"{error.strerror}, process {self.pid}"}
        return self._answer(_ANSWER)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._socket is not None
        self._socket.settimeout(seconds)
        try:
            said = self._socket.recv(MESSAGE)
        except TimeoutError:
            return {"error": f"no answer in {seconds:.0f} s"}
        except OSError as error:
            return {"error": str(error.strerror)}
        return json.loads(said) if said else {"error": f"process {self.pid} has ended"}

    def _lost(self, reason: str) -> None:
        self._gone = True
        self.end()
        self._say(f"stages start fresh: the process that they are forked from cannot be used ({reason})")
