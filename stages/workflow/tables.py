"""Tables of a run: what it is going to do, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.plans import StagePlan
from stages.workflow.graph import StageState
from stages.workflow.launch import StageResult
from stages.workflow.progress import Silent, duration, megabytes


def plan(states: Sequence[StageState], predictions: Mapping[str, StagePlan], shown: Silent) -> None:
    """What each stage is going to do, why, and what it will take."""
    rows = []
    for state in states:
        guess = predictions.get(state.name, StagePlan())
        seconds, peak = guess.predicted_seconds, megabytes(guess.predicted_peak)
        rows.append((state.name, state.status, peak, duration(seconds) if seconds else "-", state.reason))
    shown.table(("stage", "action", "predicted peak", "predicted time", "reason"), rows)
    due = [predictions.get(state.name, StagePlan()) for state in states if state.status != "reuse"]
    if size := max((one.zygote_bytes for one in due), default=0):
        shown.line(f"stages are forked from a process of {size / 1e6:.0f} MB, which is in their peaks (launch.fork)")
    for state in states:
        if (needed := predictions.get(state.name, StagePlan()).disk_bytes) and state.status != "reuse":
            shown.line(f"disk: {state.name} takes up to {needed / 1e9:.1f} GB for scratch files in {state.entry.path}")


def results(
    found: Sequence[StageResult],
    predictions: Mapping[str, StagePlan],
    summary: Mapping[str, Any],
    shown: Silent,
) -> None:
    """What each stage took, against what was predicted."""
    rows = []
    vram = max(result.peak_vram_bytes or 0 for result in found)
    for result in found:
        guess = megabytes(predictions.get(result.name, StagePlan()).predicted_peak)
        time_ = duration(result.seconds) if result.status != "reused" else "-"
        peak = megabytes(result.peak_vram_bytes if vram else result.peak_rss_bytes)
        rows.append((result.name, result.status, time_, peak, guess, result.reason))
    shown.table(("stage", "status", "time", "VRAM peak" if vram else "peak", "predicted", "reason"), rows)
    peak, budget = megabytes(summary["peak_rss_bytes"]), megabytes(summary["budget_bytes"])
    total = duration(sum(result.seconds for result in found))
    if vram:
        budget = megabytes(summary["device_budget_bytes"])
        shown.line(f"total {total}, peak of VRAM {megabytes(vram)} of {budget}, of RAM {peak}")
        return
    ranks = max(found, key=lambda result: result.peak_rss_bytes).ranks
    budget = budget if ranks == 1 else f"{ranks} x {budget}"
    shown.line(f"total {total}, peak {peak} of {budget} (runner {megabytes(summary['runner_peak_rss_bytes'])})")
