"""Before anything runs: profile the models (once per shape), plan every stage for the budget, refuse what cannot."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from stages import PROFILE, Stage
from stages.config import on_gpu
from stages.files import read_json, write_json
from stages.job import Job
from stages.memory.disk import refusal, room
from stages.memory.monitor import usage
from stages.memory.planner import OverBudget, Plan, StageProfile, plan_run
from stages.workflow import device, launch
from stages.workflow.identity import model_identity
from stages.workflow.plan import StageState, state_of
from stages.workflow.store import Store, fingerprint

LOOK = 500_000_000  # bytes, of the look at least: a smaller budget fits no stage, but by how much has to be known
RUNNER_GROWTH = 6_000_000  # bytes: bars, events, the timeline
_COMPONENT = {"text_encode": "text_encoder", "lowres": "unet", "denoise": "unet", "guide": "vae", "decode": "vae"}


class DoesNotFit(RuntimeError):
    """The budget is too small for this picture; the message says what would do, and what it costs."""


def plan(
    states: Sequence[StageState],
    job: Job,
    store: Store,
    run_dir: Path,
    *,
    pipeline: str = "stages",
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Plans of the stages that open a model, by name; also written to ``plan.json``, where the stages find theirs.

    Raises:
        DoesNotFit: before any work.
        launch.StageFailed: the models could not be looked at.
    """
    config, budget = job.config, job.budget
    profile = state_of(job, store, PROFILE, {})
    if profile.entry.why_invalid():
        profile.reason = "first run with this model and these sizes"
        note("looks at the models (once for these sizes)")
        enough = replace(job, budget=max(budget, LOOK))
        launch.run_stage(profile, enough, run_dir, pipeline=pipeline, on_event=lambda event: None)
    found = read_json(profile.entry.path / "profile.json") or {}
    running = [state for state in states if state.status in ("run", "resume", "reuse")]
    profiles = [
        StageProfile.of(_of_phase(_with_steps(found[state.stage.module], config), state.stage, config))
        for state in running
        if state.stage.module in found
    ]
    runner = usage(os.getpid()).rss + RUNNER_GROWTH
    if on_gpu(config):  # what is planned is the device's memory
        runner, budget = 0, job.device_budget or 10**15
        kinds = {one.name: _COMPONENT[_base(one.name)] for one in profiles}
        profiles = [device.for_device(one, config.memory.host, streams=kinds[one.name] == "unet") for one in profiles]
    try:
        plans = plan_run(profiles, budget, runner, config.memory.weights)
    except OverBudget as error:
        raise DoesNotFit(_refusal(error, config)) from None
    check_disk(running, profiles)
    by_name = {one.name: one for one in profiles}
    written = {name: _as_json(one, by_name[name], job, store) for name, one in plans.items()}
    write_json(run_dir / "plan.json", written)
    return written


def check_disk(states: Sequence[StageState], profiles: Sequence[StageProfile]) -> None:
    """Scratch files have to fit the disk now: hours later is too late to hear of it."""
    needed = {profile.name: profile.disk for profile in profiles}
    for state in states:
        if state.status != "reuse" and needed.get(state.name, 0) > (there := room(state.entry.path)):
            raise DoesNotFit(refusal(state.stage, needed[state.name], there))


def _of_phase(data: dict[str, Any], stage: Stage, config: DictConfig) -> dict[str, Any]:
    """An upscaling phase runs the same shapes as the final canvas, fewer times.

    A guide holds rows of its pictures besides, which are as much shorter as the canvas is.
    """
    if stage.phase is None:
        return data
    share = stage.phase[0] * stage.phase[1] / (config.width * config.height)
    extra = data["extra"] * stage.phase[0] // config.width if stage.module == "guide" else data["extra"]
    passes = max(1, math.ceil(data["micro_batches"] * share * 1.3))
    changed = {"name": stage.name, "extra": extra, "micro_batches": passes, "disk": int(data.get("disk", 0) * share)}
    return {**data, **changed}


def _with_steps(data: Mapping[str, Any], config: DictConfig) -> dict[str, Any]:
    """Step counts change often and need no new profile."""
    steps = data["steps"]
    if data["name"] == "lowres":
        steps = config.lowres.num_inference_steps
    if data["name"] == "denoise":
        steps = config.denoise.num_inference_steps
        steps = steps if config.guide.mode == "none" else int(steps * config.denoise.strength)
    return {**data, "steps": max(1, steps)}


def _base(name: str) -> str:
    """The stage that ``guide_512`` is a phase of."""
    return name if name in _COMPONENT else name.rpartition("_")[0]


def _as_json(plan: Plan, profile: StageProfile, job: Job, store: Store) -> dict[str, Any]:
    """What the stage reads: the plan, groups in views, and where the prepared copy of the weights lies."""
    config, pairs = job.config, max(1, profile.micro_batch // 2)
    streamed = plan.resident != "all"
    prepared = None
    if streamed and not profile.single_pass and config.memory.prepared:
        key = {
            "component": _COMPONENT[_base(profile.name)],
            "model": model_identity(config, (_COMPONENT[_base(profile.name)],), store.root / ".identity"),
            "half": _base(profile.name) if _COMPONENT[_base(profile.name)] == "vae" else "",
            "image": str(config.guide.image is None) + config.guide.upscale if _base(profile.name) == "guide" else "",
            "dtype": job.dtype,
            "channels_last": bool(config.technique.channels_last),
        }
        prepared = str(store.root / "weights" / f"{fingerprint(key)}.bin")
    made = {**plan.as_json(), "group_size": plan.group * pairs, "prepared": prepared, "disk_bytes": profile.disk}
    if on_gpu(config):
        return device.of_device(made, job)
    return made


def _refusal(error: OverBudget, config: DictConfig) -> str:
    least = -(-int(error.least.predicted_peak_rss_bytes / 0.985) // 10_000_000) * 10
    slower = error.least.predicted_seconds / max(error.fastest.predicted_seconds, 1e-9)
    cost = f"{error.stage} then takes about {slower:.1f} times as long as with memory to spare" if slower > 1.02 else ""
    key = "device_budget" if on_gpu(config) else "budget"
    other = "memory.weights=auto, " if config.memory.weights == "resident" else ""
    return (
        f"memory.{key}: got {config.memory[key]}, but {error.stage} needs at least {least} MB "
        f"for {config.width}x{config.height} with model={config.model.name}.\n"
        f"Use memory.{key}={least}MB{f' ({cost})' if cost else ''}, {other}"
        "or smaller decode.tile_size / denoise.tile_size."
    )
