"""One process per stage: start it, hear it, watch its memory, explain its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.events import Event
from stages.job import Job
from stages.workflow.graph import StageState
from stages.workflow.launch import local
from stages.workflow.launch.base import StageFailed, StageProcess, StageResult, reused
from stages.workflow.launch.zygote import Zygote

__all__ = ["StageFailed", "StageProcess", "StageResult", "Zygote", "reused", "run_stage"]


def run_stage(
    state: StageState,
    job: Job,
    run_dir: Path,
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    on_start: Callable[[StageProcess], None] = lambda process: None,
    pipeline: str = "stages",
    force: bool = False,
    zygote: Zygote | None = None,
) -> StageResult:
    """Run one stage in a process of its own and wait for it.

    Args:
        on_event: hears Start, Advance, Note and Resumed as they come.
        on_start: is handed the process, whose memory it may look at.
        pipeline: the package that holds PIPELINE and the stage modules.
        zygote: what it is forked from; None: it starts fresh.

    Raises:
        StageFailed: it ended without a result.
        KeyboardInterrupt: passed on after the stage has ended.
    """
    process = local.start(state, job, run_dir, pipeline=pipeline, force=force, zygote=zygote)
    try:
        on_start(process)
        result = process.watch(on_event)
    except BaseException:
        process.end()
        raise
    if result.status != "reused" and not job.config.launch.node_rank:  # the first host's are the result's
        state.entry.write_stats(result.stats())
    return result
