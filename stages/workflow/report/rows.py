"""Stages as the report's page shows them: rows of its table, lines of its timeline. Plain values, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.memory.monitor import Sample
from stages.plans import StagePlan
from stages.workflow.graph import StageState
from stages.workflow.launch import StageResult

POINTS = 600  # of a stage's line, at most: a page is a few hundred kilobytes


def waiting(state: StageState, plan: StagePlan) -> dict[str, Any]:
    """A stage that has not begun."""
    status = "will be reused" if state.status == "reuse" else "waits"
    return {"name": state.name, "status": status, "reason": state.reason, **_planned(plan)}


def finished(result: StageResult, plan: StagePlan, most: int = POINTS) -> dict[str, Any]:
    """A stage with a result. ``seconds`` are those of when it was computed, also of a reused one."""
    return {
        "name": result.name,
        "status": result.status,
        "reason": result.reason,
        "seconds": result.computed_seconds or result.seconds,
        "peak": result.peak_rss_bytes,
        "vram": result.peak_vram_bytes,
        "ranks": result.ranks,
        "line": line(result.timeline, most),
        "marks": [list(mark) for mark in result.marks],
        **_planned(plan),
    }


def _planned(plan: StagePlan) -> dict[str, Any]:
    return {
        "planned_seconds": plan.predicted_seconds,
        "planned_peak": plan.predicted_peak_rss_bytes,
        "planned_vram": plan.predicted_peak_vram_bytes,
    }


def line(samples: Sequence[Sample], most: int = POINTS) -> dict[str, Any]:
    """Samples as columns, neighbours merged (the higher one stays): seconds, megabytes, and what ran by its number."""
    every = max(1, -(-len(samples) // most))
    kept = [max(samples[at : at + every], key=lambda one: one.rss) for at in range(0, len(samples), every)]
    names = list(dict.fromkeys(sample.module for sample in kept))
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "seconds": [round(sample.seconds, 2) for sample in kept],
        "rss": [round(sample.rss / 1e6, 1) for sample in kept],
        "anon": [round(sample.anon / 1e6, 1) for sample in kept],
        "vram": [round(sample.vram / 1e6, 1) for sample in kept] if any(sample.vram for sample in kept) else [],
        "module": [numbers[sample.module] for sample in kept],
        "modules": names,
    }
