"""One fresh process per stage: start it, hear it, watch its memory, explain its end."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from omegaconf import DictConfig

from stages.config import ROOT, on_gpu
from stages.context import MARK_BYTES, read_device_bytes, read_mark
from stages.events import Done, Error, Event, Resumed, from_line
from stages.job import Job
from stages.memory.monitor import Monitor, Sample, own_peak_rss, usage
from stages.workflow import device, enforce
from stages.workflow.plan import StageState

_TAIL = 20  # lines of a failed stage's log that are shown
_PATIENCE = 5.0  # seconds between asking a stage to end and killing it


class StageFailed(RuntimeError):
    """A stage process ended without a result; the message names stage, cause and remedy."""


class StageResult(NamedTuple):
    """What ``run.json`` says of a stage, and what the report draws. Sizes in bytes."""

    name: str
    status: str  # ran | reused | resumed
    reason: str
    seconds: float
    peak_rss_bytes: int
    peak_vram_bytes: int
    fingerprint: str
    peak_module: str = ""
    heaviest: tuple[tuple[str, int], ...] = ()
    timeline: tuple[Sample, ...] = ()


def environment(config: DictConfig) -> dict[str, str]:
    """The environment of a stage process. A value that the user set stays.

    glibc otherwise keeps freed weights and activations (measured: 2.1 GB instead of 0.55), and oneDNN keeps a
    primitive for every shape it has seen. Handing every activation back costs page faults: huge pages, where the
    system gives them on demand (glibc 2.35 or later), make them a tenth.
    """
    wanted = {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "OMP_WAIT_POLICY": "passive",  # threads that spin for work starve everything else on a small, busy machine
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_gpu(config):
        wanted |= device.ENVIRONMENT
    given = {**wanted, **os.environ, "PYTHONUNBUFFERED": "1"}
    if config.launch.threads:
        given |= {"OMP_NUM_THREADS": str(config.launch.threads), "MKL_NUM_THREADS": str(config.launch.threads)}
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in search:
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *search]))
    return given


def run_stage(
    state: StageState,
    job: Job,
    run_dir: Path,
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    pipeline: str = "stages",
    force: bool = False,
) -> StageResult:
    """Run one stage in a process of its own and wait for it.

    Args:
        on_event: hears start, advance, note and resumed (``context.Progress``) as they come.
        pipeline: the package that holds PIPELINE and the stage modules.

    Raises:
        StageFailed: it ended without a result.
        KeyboardInterrupt: passed on after the stage has ended.
    """
    config = job.config
    log_path = run_dir / "logs" / f"{state.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    mode = str(config.memory.enforce)
    if mode == "auto" and on_gpu(config):  # the driver alone takes a gigabyte of RAM; the device has its limit
        mode = "off"
    enforcer = enforce.start(mode, job.budget, what=state.name, writes=Path(config.output_dir))
    begin = time.monotonic()
    with tempfile.TemporaryFile() as marks, open(log_path, "wb") as log:
        marks.truncate(MARK_BYTES)
        view = mmap.mmap(marks.fileno(), MARK_BYTES)
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "stages", state.name, str(run_dir), "--pipeline", pipeline]
        command += ["--events", str(writer), "--marks", str(marks.fileno()), "--parent", str(os.getpid())]
        try:
            process = subprocess.Popen(
                enforcer.command(command + (["--force"] if force else [])),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(config), **enforcer.environment},
                pass_fds=(writer, marks.fileno()),
            )
        except BaseException:
            enforcer.stop()
            raise
        finally:
            os.close(writer)
        enforcer.adopt(process.pid)
        monitor = Monitor(
            process.pid,
            config.launch.sample_seconds,
            lambda: read_mark(view),
            enforcer.look,
            lambda: read_device_bytes(view),
            enforcer.lost,
        ).start()
        try:
            with os.fdopen(reader, encoding="utf-8") as events:
                last, resumed = _listen(events, on_event)
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            monitor.stop()
            enforcer.stop()
            module = read_mark(view)
            view.close()
    if enforcer.violation is not None and code != 0:
        raise StageFailed(_over_budget(state.name, enforcer))
    if enforcer.blind and code != 0:
        text = f"stopped, as its memory could not be watched any more ({enforcer.blind}). Finished work is kept."
        raise StageFailed(f"{state.name}: {text} Run the same command again, or let it run free: memory.enforce=off.")
    if code != 0 or not isinstance(last, Done):
        raise StageFailed(_failure(state.name, code, last, log_path, module))
    peak = max(monitor.peak.rss, last.peak_rss_bytes + usage(os.getpid()).rss)
    result = StageResult(
        name=state.name,
        status=last.status,
        reason=resumed or (_MEANWHILE if last.status == "reused" else state.reason),
        seconds=round(time.monotonic() - begin, 3),
        peak_rss_bytes=peak,
        peak_vram_bytes=last.peak_vram_bytes,
        fingerprint=state.fingerprint,
        peak_module=monitor.peak.module,
        heaviest=tuple(monitor.heaviest),
        timeline=tuple(monitor.timeline),
    )
    if result.status != "reused":
        state.entry.write_stats({key: value for key, value in result._asdict().items() if key not in _NOT_STATS})
    return result


_MEANWHILE = "another process computed it meanwhile"
_NOT_STATS = ("name", "status", "reason", "fingerprint")


def reused(state: StageState) -> StageResult:
    """The result of a stage that did not have to run: no time now, the peak that was measured when it ran."""
    stats = state.entry.stats()
    return StageResult(
        name=state.name,
        status="reused",
        reason=state.reason,
        seconds=0.0,
        peak_rss_bytes=stats.get("peak_rss_bytes", 0),
        peak_vram_bytes=stats.get("peak_vram_bytes", 0),
        fingerprint=state.fingerprint,
        peak_module=stats.get("peak_module", ""),
        heaviest=tuple((name, size) for name, size in stats.get("heaviest", [])),
        timeline=tuple(Sample(*sample) for sample in stats.get("timeline", [])),
    )


def runner_peak() -> int:
    """Peak RES of the runner itself, bytes."""
    return own_peak_rss()


def _listen(events: IO[str], on_event: Callable[[Event], None]) -> tuple[Done | Error | None, str]:
    """Pass events on until the stage closes its end; returns its last word (None if it died), and why it went on.

    Raises:
        ValueError: a whole line that is no event.
    """
    last, resumed = None, ""
    for line in events:
        if not line.endswith("\n"):  # the process was killed in the middle of it
            break
        event = from_line(line)
        if isinstance(event, Done | Error):
            last = event
            continue
        resumed = event.reason if isinstance(event, Resumed) else resumed
        on_event(event)
    return last, resumed


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the stage and its children to end, then make them."""
    if process.poll() is None:
        enforce.kill_tree(process.pid, signal.SIGTERM)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            enforce.kill_tree(process.pid, signal.SIGKILL)
            process.wait()


def _over_budget(stage: str, enforcer: enforce.Enforcer) -> str:
    sample = enforcer.violation
    assert sample is not None
    where = f" while {sample.module} ran" if sample.module else ""
    room = -(-int(max(sample.rss, enforcer.budget) * 1.15) // 50_000_000) * 50
    by = f"by the kernel ({enforcer.by_kernel}): " if enforcer.by_kernel else ""
    return (
        f"{stage}: stopped over the memory budget{where}: {by}runner and stage took {sample.rss / 1e6:.0f} MB, "
        f"memory.budget is {enforcer.budget / 1e6:.0f}MB ({sample.anon / 1e6:.0f} MB anonymous, "
        f"{sample.file / 1e6:.0f} MB file-backed, after {sample.seconds:.1f} s).\n"
        f"Give it more with memory.budget={room}MB, or let it run free with memory.enforce=off. "
        "Everything finished is kept."
    )


def _failure(stage: str, code: int, last: Done | Error | None, log: Path, module: str) -> str:
    if isinstance(last, Error):
        if last.expected:
            return f"{stage}: {last.message}"
        cause = last.message
        if last.errno == errno.ENOSPC:
            cause = f"the disk is full ({cause}): free some space; finished work stays"
    elif code < 0:
        cause = f"ended by signal {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            cause += " (from outside: kill -9, or the kernel when the machine is out of memory)"
    else:
        cause = f"ended with exit code {code}"
    where = f" (last module: {module})" if module else ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    tail = "".join(f"\n  | {line}" for line in lines)
    return f"{stage}: {cause}{where}\nlog: {log}{tail}"
