"""``launch.fork``: which stages are forked from one process that has imported their libraries, and what that takes.

It is spent where the budget has room: that process lives beside the stage and its RES counts, though most of its pages
are the stage's too. The result is the same either way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from stages.config import ConfigError, on_gpu
from stages.job import Job
from stages.plans import StagePlan
from stages.workflow.graph import StageState
from stages.workflow.launch.local import environment
from stages.workflow.launch.zygote import Zygote

KEY, WAYS = "launch.fork", ("auto", "on", "off")
ROOM = 0.05  # of the budget: left free beside what is predicted, where this is a choice
# bytes of RES (python -m benchmarks startup): of the process where no model was looked at, and how much smaller it is
# than a stage of the run before its first weight, which has opened the checkpoint and run kernels
USUAL, LESS = 178_000_000, 28_000_000
BARE = 50_000_000  # bytes: a stage without a model and so without torch, where it starts fresh
TEXT = 8_000_000  # bytes: of diffusers in the process of a text encoder, which has transformers besides
SAVED = 1.3  # seconds of a stage's imports (the same command)


def unable(config: DictConfig) -> str:
    """Why no stage of such a run can be forked; "" where they can."""
    if sys.platform != "linux":
        return f"Linux, not {sys.platform}"
    if on_gpu(config):
        return f"device=cpu, not {config.device}: a GPU's driver does not outlive a fork"
    for key in ("nproc", "nnodes"):
        if config.launch[key] > 1:
            return f"launch.{key}=1, not {config.launch[key]}: ranks are started by a process of their own"
    return ""


def check(config: DictConfig) -> None:
    """Refuse a value that is none, and ``on`` where it cannot act.

    Raises:
        ConfigError: before any work.
    """
    way = str(config.launch.fork)
    if way not in WAYS:
        raise ConfigError(KEY, way, f"one of {', '.join(WAYS)}")
    if way == "on" and (needs := unable(config)):
        raise ConfigError(KEY, way, "auto or off", f"Stages can be forked with {needs}.")


def size(bases: Sequence[int]) -> int:
    """Bytes of RES of the process, by those of stages before their first weight."""
    return min(bases) - LESS if bases else USUAL


def planned(
    plans: Mapping[str, StagePlan],
    states: Sequence[StageState],
    job: Job,
    size: int = USUAL,
    before: Mapping[str, StagePlan] | None = None,
) -> dict[str, StagePlan]:
    """The plans, with what they are forked from beside those stages that are. Of results that are there already the
    plans of ``before`` say whether their stages were: they are told beside peaks of then.

    ``auto`` forks all that run or none: where there are several, every peak is known and leaves ``size`` bytes and
    ``ROOM`` of the budget, and no other runs wait for memory (``launch.total_budget``). ``on`` forks what fits.

    Raises:
        ConfigError: ``launch.fork=on``, and nothing fits.
    """
    running, found = _running(states), dict(plans)
    for state in states:
        plan, was = found.get(state.name), (before or {}).get(state.name, StagePlan()).zygote_bytes
        if plan is not None and state in running:
            found[state.name] = _alone(plan, state)
        elif plan is not None and was and not plan.zygote_bytes:
            found[state.name] = _beside(plan, state, was)
    way, limit = str(job.config.launch.fork), int(job.budget * (1 - ROOM))
    if way == "off" or not running or unable(job.config):
        return found
    beside = {state.name: _beside(found.get(state.name, StagePlan()), state, size) for state in running}
    peaks = {name: plan.predicted_peak_rss_bytes for name, plan in beside.items()}
    if way == "auto":
        fits = all(peak is not None and peak <= limit for peak in peaks.values())
        wanted = fits and len(running) > 1 and job.config.launch.total_budget is None
        return {**found, **beside} if wanted else found
    fitting = {name: plan for name, plan in beside.items() if (peaks[name] or 0) <= limit}
    if not fitting:
        least = -(-int(min(peak or 0 for peak in peaks.values()) / (1 - ROOM)) // 10_000_000) * 10
        hint = f"The process that stages are forked from takes {size / 1e6:.0f} MB beside each. memory.budget={least}MB"
        raise ConfigError(KEY, way, f"auto or off with memory.budget={job.config.memory.budget}", hint)
    return {**found, **fitting}


def _running(states: Sequence[StageState]) -> list[StageState]:
    return [state for state in states if state.status in ("run", "resume")]


def _more(state: StageState, size: int) -> int:
    """Bytes that a forked stage adds: that process, and in the stage itself what the others import."""
    if not state.stage.opens_model:
        return 2 * size - BARE
    return size + (TEXT if state.stage.module == "text_encode" else 0)


def _alone(plan: StagePlan, state: StageState) -> StagePlan:
    """As if it started fresh."""
    if not plan.zygote_bytes:
        return plan
    peak, seconds = plan.predicted_peak_rss_bytes, plan.predicted_seconds
    return replace(
        plan,
        predicted_peak_rss_bytes=peak and peak - _more(state, plan.zygote_bytes),
        predicted_seconds=seconds and seconds + SAVED,
        zygote_bytes=0,
    )


def _beside(plan: StagePlan, state: StageState, size: int) -> StagePlan:
    peak, seconds = plan.predicted_peak_rss_bytes, plan.predicted_seconds
    return replace(
        plan,
        predicted_peak_rss_bytes=peak and peak + _more(state, size),
        predicted_seconds=seconds and seconds - SAVED,
        zygote_bytes=size,
    )


@contextmanager
def zygote(
    states: Sequence[StageState],
    plans: Mapping[str, StagePlan],
    job: Job,
    run_dir: Path,
    pipeline: str,
    say: Callable[[str], None],
) -> Iterator[Zygote | None]:
    """What the run's stages are forked from, while it runs; None where all of them start fresh."""
    forked = [state for state in _running(states) if plans.get(state.name, StagePlan()).zygote_bytes]
    if not forked:
        yield None
        return
    modules = list(dict.fromkeys(state.stage.module for state in forked))
    size = max(plans[state.name].zygote_bytes for state in forked)
    one = Zygote(run_dir, modules, pipeline=pipeline, environment=environment(job.config), planned=size, say=say)
    try:
        yield one
    finally:
        one.end()


def of_stage(zygote: Zygote | None, plan: StagePlan) -> Zygote | None:
    """What a stage is forked from; where its plan has no room for it, it goes first."""
    if zygote is not None and not plan.zygote_bytes:
        zygote.end()
        return None
    return zygote
