"""``run.json``: what a program wants to know of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.job import Job
from stages.memory.monitor import own_peak_rss
from stages.plans import StagePlan
from stages.workflow.launch import StageResult


def summary(
    run_dir: Path, job: Job, results: Sequence[StageResult], predictions: Mapping[str, StagePlan], error: str
) -> dict[str, Any]:
    """What is in ``run.json``.

    A reused stage has ``seconds`` 0, and peak and ``computed_seconds`` of the time it was computed. ``peak_rss_bytes``
    of the run is the highest of its stages (each with the runner in it).
    """
    own = own_peak_rss()
    return {
        "image": "image.png" if (run_dir / "image.png").exists() else None,
        "stages": [_stage(result, predictions.get(result.name, StagePlan())) for result in results],
        "peak_rss_bytes": max([own, *(result.peak_rss_bytes for result in results)]),
        "budget_bytes": job.budget,
        "device_budget_bytes": job.device_budget,
        "runner_peak_rss_bytes": own,
        "run": job.run,
        "error": error or None,
    }


def _stage(result: StageResult, plan: StagePlan) -> dict[str, Any]:
    return {
        "name": result.name,
        "status": result.status,
        "reason": result.reason,
        "seconds": result.seconds,
        "computed_seconds": result.computed_seconds or result.seconds,
        "waited_seconds": result.waited_seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "predicted_peak_rss_bytes": plan.predicted_peak_rss_bytes,
        "ranks": result.ranks,
        "device_map": {name: dict(model.placement) for name, model in plan.models.items() if model.placement},
        "peak_vram_bytes": result.peak_vram_bytes,
        "gpus": list(result.gpus),
        "predicted_peak_vram_bytes": plan.predicted_peak_vram_bytes,
        "fingerprint": result.fingerprint,
        "peak_module": result.peak_module,
        "heaviest_modules": [{"module": name, "peak_rss_bytes": size} for name, size in result.heaviest],
    }
