"""A stage in a process of this machine, fresh or forked: its environment, its events, its memory, its end."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from omegaconf import DictConfig

from stages.config import ROOT, on_gpu
from stages.context import MARK_BYTES, read_device_bytes, read_mark
from stages.distributed import NAMES
from stages.events import Advance, Done, Error, Event, Note, Resumed, Start, from_line
from stages.files import free, make_folder, set_aside
from stages.job import Job
from stages.memory.monitor import Monitor, Sample, usage
from stages.workflow import device, enforce
from stages.workflow.graph import StageState
from stages.workflow.launch.base import MEANWHILE, StageFailed, StageResult, failure
from stages.workflow.launch.zygote import Process, Zygote
from stages.workflow.machine import threads
from stages.workflow.spread import spread

_PATIENCE = 5.0  # seconds between asking a stage to end and killing it
_MARKS = 100  # of what happened in a stage, the first ones


def environment(config: DictConfig, stage: str = "") -> dict[str, str]:
    """The environment of a stage's process. A value that the user set stays.

    glibc otherwise keeps freed weights and activations (measured: 2.1 GB instead of 0.55), and oneDNN keeps a
    primitive for every shape it has seen. Handing every activation back costs page faults: huge pages, where the
    system gives them on demand (glibc 2.35 or later), make them a tenth. With text encoders MKL would keep the
    buffers of its largest product, of every thread (20 to 40 MB with T5-XXL on two); elsewhere they are freed between
    units (``trim.Pieces``): attention would ask for them again with each of its small products.
    """
    wanted = {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_ARENA_MAX": "1",  # of several, each thread's would keep pieces of its own
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "OMP_WAIT_POLICY": "passive",  # threads that spin for work starve everything else on a small, busy machine
        "TOKENIZERS_PARALLELISM": "false",
    }
    if stage == "text_encode":
        wanted["MKL_DISABLE_FAST_MM"] = "1"
    if on_gpu(config):
        wanted |= device.ENVIRONMENT | {"OMP_NUM_THREADS": str(threads(config))}
    given = {**wanted, **os.environ, "PYTHONUNBUFFERED": "1"}
    for name in NAMES:  # of whoever started the runner
        given.pop(name, None)
    if config.launch.threads:
        given |= {"OMP_NUM_THREADS": str(config.launch.threads), "MKL_NUM_THREADS": str(config.launch.threads)}
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in search:
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *search]))
    return given


class LocalProcess:
    """A stage on this machine: its process, its events, the marks of its modules, its memory. See :func:`start`."""

    def __init__(self, state: StageState, job: Job, log: Path, zygote: Zygote | None = None) -> None:
        self._state, self._log, self._begin = state, log, time.monotonic()
        self._zygote = zygote if zygote is not None and zygote.ready() else None
        self.spread, self._node = spread(job, state.stage), job.config.launch.node_rank
        self.ranks = self.spread.each
        mode = str(job.config.memory.enforce)
        if mode == "auto" and on_gpu(job.config):  # the driver alone takes a gigabyte of RAM; the device has its limit
            mode = "off"
        budget = job.budget * self.ranks
        writes, beside = Path(job.config.output_dir), self._zygote.rss if self._zygote else 0
        self._enforcer = enforce.start(mode, budget, what=state.name, writes=writes, beside=beside)
        self._marks = tempfile.TemporaryFile()  # noqa: SIM115 - closed in ``_close``
        self._marks.truncate(MARK_BYTES)
        self._view = mmap.mmap(self._marks.fileno(), MARK_BYTES)
        self._process: Process | None = None
        self._happened: list[tuple[float, str]] = []
        self._total, self._done, self._unit = 0, 0, ""
        self._monitor: Monitor | None = None

    def start(self, module: list[str], arguments: list[str], job: Job) -> None:
        """Start ``python -m module arguments``, which is told the descriptors of its events and marks besides."""
        reader, writer = os.pipe()
        self._events = os.fdopen(reader, encoding="utf-8")
        surroundings = {**environment(job.config, self._state.stage.module), **self._enforcer.environment}
        try:
            with free(self._log).open("wb") as log:
                self._process = self._forked(arguments, surroundings, (log.fileno(), writer, self._marks.fileno()))
                if self._process is None:
                    told = ["--events", str(writer), "--marks", str(self._marks.fileno()), "--parent", str(os.getpid())]
                    self._process = subprocess.Popen(
                        self._enforcer.command([sys.executable, "-m", *module, *arguments, *told]),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=surroundings,
                        pass_fds=(writer, self._marks.fileno()),
                    )
        finally:
            os.close(writer)
        pid, period = self._process.pid, job.config.launch.sample_seconds
        self._enforcer.adopt(pid)
        held = (lambda: read_mark(self._view), self._enforcer.look, lambda: read_device_bytes(self._view))
        beside = self._zygote.pid if self._zygote else 0
        self._monitor = Monitor(pid, period, *held, self._enforcer.lost, beside).start()

    def _forked(
        self, arguments: list[str], surroundings: dict[str, str], files: tuple[int, int, int]
    ) -> Process | None:
        """The stage's process, if it can be forked."""
        if self._zygote is None:
            return None
        return self._zygote.fork(arguments, surroundings, files, self._enforcer.enters)

    @property
    def timeline(self) -> Sequence[Sample]:
        """See :class:`stages.workflow.launch.base.StageProcess`."""
        return self._monitor.timeline if self._monitor is not None else ()

    def _keep(self, event: Event) -> None:
        """Remember when it was said, for the timeline: the steps of a few, the notes of all."""
        match event:
            case Start():
                self._total, self._done, self._unit = event.total, event.done, event.unit
                text = f"{event.total} {event.unit}" if not event.done else ""
            case Advance(n):
                self._done += n
                text = f"{self._done} of {self._total} {self._unit}" if self._total <= _MARKS else ""
            case Note(said) | Resumed(said):
                text = said
            case _:
                text = ""
        if text and len(self._happened) < _MARKS:
            self._happened.append((round(time.monotonic() - self._begin, 3), text))

    def watch(self, on_event: Callable[[Event], None]) -> StageResult:
        """See :class:`stages.workflow.launch.base.StageProcess`."""
        state, process, monitor = self._state, self._process, self._monitor
        assert process is not None and monitor is not None

        def heard(event: Event) -> None:
            self._keep(event)
            on_event(event)

        last, resumed, gpus = listen(self._events, heard, self._node * self.ranks)
        code = process.wait()
        module = self._close()
        if self._enforcer.violation is not None and code != 0:
            zygote = self._zygote.rss if self._zygote else 0
            raise StageFailed(_over_budget(state.name, self._enforcer, self.ranks, zygote))
        if self._enforcer.blind and code != 0:
            raise StageFailed(_unwatched(state.name, self._enforcer))
        if code != 0 or not isinstance(last, Done):
            failed = StageFailed(failure(state.name, code, last, self._log, module))
            failed.refused = isinstance(last, Error) and last.expected and last.errno is None
            raise failed
        return StageResult(
            name=state.name,
            status=last.status,
            reason=resumed or (MEANWHILE if last.status == "reused" else state.reason),
            seconds=round(time.monotonic() - self._begin, 3),
            peak_rss_bytes=max(monitor.peak.rss, last.peak_rss_bytes + self._others()),
            peak_vram_bytes=max(gpus, default=0),
            fingerprint=state.fingerprint,
            peak_module=monitor.peak.module,
            heaviest=tuple(monitor.heaviest),
            timeline=tuple(monitor.timeline),
            ranks=self.ranks,
            waited_seconds=last.waited_seconds,
            gpus=gpus,
            marks=tuple(self._happened),
        )

    def _others(self) -> int:
        """Bytes of this process, and of what the stage was forked from."""
        return usage(os.getpid()).rss + (self._zygote.rss if self._zygote else 0)

    def end(self) -> None:
        """See :class:`stages.workflow.launch.base.StageProcess`."""
        if self._process is not None and self._process.poll() is None:
            enforce.kill_tree(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                enforce.kill_tree(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._close()

    def _close(self) -> str:
        """Stop watching and give back what was set up; returns the module that was named last."""
        if self._view.closed:
            return ""
        if self._monitor is not None:
            self._monitor.stop()
            self._events.close()
        self._enforcer.stop()
        module = read_mark(self._view)
        self._view.close()
        self._marks.close()
        return module


def start(
    state: StageState, job: Job, run_dir: Path, *, pipeline: str, force: bool, zygote: Zygote | None = None
) -> LocalProcess:
    """Start the stage in a process of this machine, which lives and dies with this one: fresh, or forked.

    Raises:
        ConfigError: ``memory.enforce`` asks for what this machine has not.
        OSError: the process could not be started.
    """
    how = job.config.launch
    log = run_dir / "logs" / f"{state.name}{f'.node_{how.node_rank}' if how.node_rank else ''}.log"
    make_folder(log.parent)
    if log.is_dir():
        set_aside(log)
    process = LocalProcess(state, job, log, zygote)
    module = ["stages"]
    if process.spread.ranks > 1:
        module = ["stages.ranks", "--nproc", str(process.ranks)]
    if process.spread.hosts > 1:
        module += ["--nnodes", str(how.nnodes), "--node-rank", str(how.node_rank), "--rdzv-endpoint", how.rdzv_endpoint]
    arguments = [state.name, str(run_dir), "--pipeline", pipeline, *(["--force"] if force else [])]
    try:
        process.start(module, arguments, job)
    except BaseException:
        process.end()
        raise
    return process


def listen(
    events: IO[str], on_event: Callable[[Event], None], first: int = 0
) -> tuple[Done | Error | None, str, tuple[int, ...]]:
    """Pass events on until the stage closes its end; returns its last word (None if it died), why it went on, and the
    peaks of its GPUs. Of several ranks the first failure is the last word, else that of the ``first`` one here.

    Raises:
        ValueError: a whole line that is no event.
    """
    last, resumed, peaks = None, "", {}
    for line in events:
        if not line.endswith("\n"):  # the process was killed in the middle of it
            break
        event = from_line(line)
        if isinstance(event, Done):
            peaks[event.rank] = event.gpus
            last = event if event.rank == first and not isinstance(last, Error) else last
            continue
        if isinstance(event, Error):
            last = last if isinstance(last, Error) else event
            continue
        resumed = event.reason if isinstance(event, Resumed) else resumed
        on_event(event)
    return last, resumed, tuple(peak for rank in sorted(peaks) for peak in peaks[rank])


def _over_budget(stage: str, enforcer: enforce.Enforcer, ranks: int, zygote: int) -> str:
    sample = enforcer.violation
    assert sample is not None
    where = f" while {sample.module} ran" if sample.module else ""
    room = -(-int(max(sample.rss, enforcer.budget) / ranks * 1.15) // 50_000_000) * 50
    who, times = (f"runner and {'stage' if ranks == 1 else f'{ranks} ranks'}", "" if ranks == 1 else f"{ranks} x ")
    if zygote:
        who = f"runner, stage and what it was forked from ({zygote / 1e6:.0f} MB) together"
    by = f"by the kernel ({enforcer.by_kernel}): " if enforcer.by_kernel else ""
    return (
        f"{stage}: stopped over the memory budget{where}: {by}{who} took {sample.rss / 1e6:.0f} MB, "
        f"memory.budget is {times}{enforcer.budget / ranks / 1e6:.0f}MB ({sample.anon / 1e6:.0f} MB anonymous, "
        f"{sample.file / 1e6:.0f} MB file-backed, after {sample.seconds:.1f} s).\n"
        f"Give it more with memory.budget={room}MB, or let it run free with memory.enforce=off. "
        "Everything finished is kept."
    )


def _unwatched(stage: str, enforcer: enforce.Enforcer) -> str:
    text = f"stopped, as its memory could not be watched any more ({enforcer.blind}). Finished work is kept."
    return f"{stage}: {text} Run the same command again, or let it run free: memory.enforce=off."
