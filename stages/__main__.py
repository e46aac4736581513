"""The child process: one stage, then the end. ``python -m stages <stage> <run-dir>`` also works by hand."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import mmap
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from stages import PREPARATIONS
from stages.config import ROOT, ConfigError, on_gpu
from stages.context import MARK_BYTES, Progress, StageContext
from stages.distributed import LOST, LostRank, Place
from stages.documents import load
from stages.events import Advance, Done, Error, Event, Note, Resumed, Start, to_line
from stages.files import read_object
from stages.job import Job
from stages.memory.imports import light_torch
from stages.memory.monitor import own_peak_rss
from stages.plans import StagePlan, stage_plans
from stages.workflow import signals
from stages.workflow.errors import disk_full, system
from stages.workflow.graph import StageState, build, seen, state_of
from stages.workflow.store import Store


class Events:
    """Sends a stage's events to the runner as JSON lines, or prints them when the stage was started by hand."""

    def __init__(self, descriptor: int | None) -> None:
        self.pipe = None if descriptor is None else os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
        self.total, self.done, self.unit, self.printed = 0, 0, "", 0.0
        self.lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self.lock:
            if self.pipe is not None:
                self.pipe.write(to_line(event))
            else:
                self.print(event)

    def print(self, event: Event) -> None:
        match event:
            case Start():
                self.total, self.done, self.unit = event.total, event.done, event.unit
            case Advance(n):
                self.done += n
                if time.monotonic() - self.printed > 2 or self.done == self.total:
                    self.printed = time.monotonic()
                    print(f"{self.done}/{self.total} {self.unit}", flush=True)
            case Error(message):
                print(message, file=sys.stderr)
            case Note(text) | Resumed(text):
                print(text, flush=True)


def cuda() -> Any | None:
    """``torch.cuda`` if this process has begun to use a GPU. Imports nothing."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def peak_vram() -> list[int]:
    """Bytes that the CUDA allocator reserved at most, of each GPU that the stage used."""
    used = cuda()
    peaks = [int(used.max_memory_reserved(device)) for device in range(used.device_count())] if used else []
    return [peak for peak in peaks if peak]


def report_vram(progress: Progress, period: float) -> None:
    """Tell the runner every ``period`` seconds what the CUDA allocator has reserved, from a thread of its own."""

    def watch() -> None:
        while True:
            time.sleep(period)
            if used := cuda():
                progress.device_bytes(int(used.memory_reserved()))

    threading.Thread(target=watch, daemon=True, name="vram").start()


def stage_module(name: str) -> Any:
    """Import it without looking for garbage meanwhile: half a million objects that stay (a fifth of the time)."""
    gc.disable()
    try:
        with light_torch():
            return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def compute(state: StageState, context: StageContext, module: str, force: bool) -> str:
    """Run the stage under its lock unless another process did meanwhile; returns ran | resumed | reused.

    Of several ranks the first one has the lock, and the result; the others help.
    """
    if context.place.rank:
        work(state, context, module)
        return "ran"
    lock = state.entry.lock()
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        who = f" ({held})" if (held := state.entry.holder()) else ""
        context.progress.note(f"{state.name}: waits, another process computes the same result{who}")
        lock.acquire()
    state.entry.hold(context.run_dir.name)
    try:
        if not force and state.entry.manifest() is not None:
            return "reused"
        state.entry.prepare(force=force)
        state.entry.commit(work(state, context, module))
        return "resumed" if context.progress.resumed_because else "ran"
    finally:
        lock.release()


def work(state: StageState, context: StageContext, module: str) -> Any:
    """Run the stage's module; returns what it says of its result."""
    stage = stage_module(f"{module}.{state.stage.module}")
    if on_gpu(context.config):  # not before all is imported: half of torch has no answer
        report_vram(context.progress, context.config.launch.sample_seconds)
    info = stage.run(context)
    context.progress.flush()
    return info


def run(stage: str, run_dir: Path, module: str, progress: Progress, force: bool) -> str:
    """Find the stage in the run's config, check its inputs, compute it."""
    run_dir = run_dir.resolve()
    job = Job.of(load(run_dir / "config.yaml"))
    store = Store(Path(job.config.output_dir) / ".store")
    pipeline = importlib.import_module(module).PIPELINE
    states = {state.name: state for state in build(job, store, pipeline=pipeline, verify=False)}
    states |= {one.name: state_of(job, store, one, {}) for one in PREPARATIONS if one.name == stage}
    if stage not in states:
        raise ConfigError("stage", stage, f"one of {', '.join(states)} in this run")
    state = states[stage]
    for name in state.needs:
        if why := states[name].entry.why_invalid():
            hint = f"Make them: python -m stages {name} {run_dir}"
            raise ConfigError("stage", stage, f"the results of {name} ({why})", hint)
    context = StageContext(
        stage=state.stage,
        config=seen(job, state, states),
        run_dir=run_dir,
        output=state.entry.path,
        inputs={states[name].stage.module: states[name].entry.path for name in state.needs},
        plan=stage_plans(read_object(run_dir / "plan.json")).get(stage, StagePlan()),
        progress=progress,
        layout=job.regions_of(state.stage) if "regions" in state.stage.parameters else None,
        place=Place.told(),
    )
    return compute(state, context, module, force)


def said(error: Exception, run_dir: Path) -> tuple[str, bool]:
    """What a person is told, and whether that is all there is to say (no traceback)."""
    wanted = os.environ.get("HIGHRES_TRACEBACK") == "1"
    if isinstance(error, ConfigError):
        return str(error), not wanted
    if disk_full(error):
        return system(OSError(errno.ENOSPC, "", getattr(error, "filename", None) or str(run_dir.parent))), not wanted
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        budget = load(run_dir / "config.yaml").memory.device_budget
        limit = f"memory.device_budget: got {budget}, which was not enough" if budget else "the GPU's memory is full"
        detail = str(error).split(". ")[0]
        return f"{limit} ({detail}). Give it more, or use a smaller denoise.tile_size or decode.tile_size.", True
    if isinstance(error, ValueError) and _own(error):
        return str(error), not wanted
    return f"{type(error).__name__}: {error}", False


def _own(error: Exception) -> bool:
    """Whether this program raised it, in its own words; what a library raises needs its traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and Path(frames[-1][0].f_code.co_filename).is_relative_to(ROOT / "stages")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, report; returns the exit code: 0 done, 1 failed, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("stage", help="a stage of the pipeline, for example denoise")
    parser.add_argument("run_dir", type=Path, help="outputs/<run>, with the config.yaml that runner.py wrote")
    parser.add_argument("--force", action="store_true", help="compute although the result is there")
    parser.add_argument("--pipeline", default="stages", help="the package that holds PIPELINE and the stage modules")
    parser.add_argument("--events", type=int, help="descriptor for events (given by runner.py)")
    parser.add_argument("--marks", type=int, help="descriptor of the module mark (given by runner.py)")
    parser.add_argument("--parent", type=int, help="process to live and die with (given by runner.py)")
    arguments = parser.parse_args(argv)
    if arguments.parent:
        signals.tie_to_parent(arguments.parent)
        signals.ignore()
    place = Place.told()
    place.take_gpu()
    for stream in (sys.stdout, sys.stderr):  # may not know every letter of a message
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    events = Events(arguments.events)
    mark = None if arguments.marks is None or place.rank else mmap.mmap(arguments.marks, MARK_BYTES)
    progress = Progress(events if place.rank == 0 else lambda event: _helps(events, event), mark)
    try:
        status = run(arguments.stage, arguments.run_dir, arguments.pipeline, progress, arguments.force)
    except BrokenPipeError:
        return 1  # the runner is gone
    except Exception as error:
        message, expected = said(error, arguments.run_dir)
        if isinstance(error, LostRank):  # not the cause: whoever started the ranks knows which one was lost
            print(message, file=sys.stderr)
            return LOST
        if place.size > 1:
            message = f"rank {place.rank} of {place.size}: {message}"
        if not expected:
            traceback.print_exc()
        events(Error(message, expected, errno.ENOSPC if disk_full(error) else getattr(error, "errno", None)))
        return 1
    events(Done(status, own_peak_rss(), peak_vram(), place.rank, round(progress.waited, 3)))
    return 0


def _helps(events: Events, event: Event) -> None:
    """What is said of a rank that is not the first: how far it is."""
    if isinstance(event, Advance):
        events(event)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; taking libraries down in order would take half a second more
