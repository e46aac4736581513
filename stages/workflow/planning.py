"""Before anything runs: profile the models (once per shape), plan every stage for the budget, refuse what cannot."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from stages import PROFILE, REHEARSAL, Stage
from stages.config import dtype_of_component, on_gpu
from stages.families.facts import facts_of, running_steps
from stages.families.grammar import has_signs
from stages.files import read_json, read_object, write_json
from stages.hashes import fingerprint
from stages.job import Job
from stages.memory.disk import refusal, room
from stages.memory.monitor import usage
from stages.memory.planner import Chosen, ModelProfile, OverBudget, StageProfile, plan_run
from stages.plans import StagePlan, is_copied, stage_plans
from stages.techniques import techniques_of
from stages.techniques.dtype import dtype_names
from stages.workflow import device, forking, launch
from stages.workflow.graph import StageState, state_of
from stages.workflow.identity import model_identity
from stages.workflow.spread import spread
from stages.workflow.store import Store

COPIES = 4  # times the bytes of a prepared copy have to be free on the disk
LOOK = 500_000_000  # bytes, of the look at least: a smaller budget fits no stage, but by how much has to be known
REHEARSED = "rehearsal.json"  # as stages/rehearsal.py writes it
RUNNER_GROWTH = 6_000_000  # bytes: bars, events, the timeline
RANK = 16_000_000  # bytes: connections to other ranks, and what is exchanged (measured: 5 to 14 MB)
COMPEL = 36_000_000  # bytes: the library that weighted prompts and long ones are encoded with (measured: 30 MB)
# of stitch's process, which opens no model: bytes at rest, a thread that deflates, and a column of pixels, of which the
# rows of strips, of tiles and of all levels are kept, and its steps in brightness (67 MB at 2048x2048 pixels, 178 MB at
# 16384x16384: tests/slow/test_report_16384.py)
STITCH, STITCH_THREAD, STITCH_COLUMN = 50_000_000, 1_000_000, 8_000
TINY = 115_000_000  # bytes: a tiny VAE of previews (TAESD), and what it decodes at a time (measured: 113 MB)
LAUNCHER = 16_000_000  # bytes: the process that starts ranks
# bytes: what a stage in float32 takes more than is planned where it keeps free memory between units up to its plan
# (measured: 23 MB, full-size SD 1.5 at 1024x1024 pixels, 18 rounds). Six are buffers of products, by
# ``benchmarks products``; the rest, as it seems, lies in holes of the heap that no activation fits in.
KEPT_FP32 = 24_000_000


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
) -> dict[str, StagePlan]:
    """Plans of the stages that open a model, and of ``stitch``, by name; also written to ``plan.json``, where they are
    found.

    Raises:
        DoesNotFit: before any work.
        launch.StageFailed: the models could not be looked at.
        ConfigError: ``launch.fork=on``, and no stage leaves room for it.
    """
    config, budget = job.config, job.budget
    profile, rehearsal = state_of(job, store, PROFILE, {}), state_of(job, store, REHEARSAL, {})
    looks, rehearses = bool(profile.entry.why_invalid()), bool(rehearsal.entry.why_invalid())
    if looks:
        profile.reason = "first run with this model and these sizes"
        note("looks at the models (once for these sizes)")
    if looks or rehearses:
        enough = replace(job, budget=max(budget, LOOK))
        launch.run_stage(profile if looks else rehearsal, enough, run_dir, pipeline=pipeline)
    if looks and rehearses:
        _rehearsed(rehearsal)
    found = read_json(profile.entry.path / "profile.json")
    if found is None:  # another process made another key of the same run
        raise launch.StageFailed(f"profile: no result in {profile.entry.path}. Nothing can be planned without it.")
    running = [state for state in states if state.status in ("run", "resume", "reuse")]
    profiles = {
        state.name: _of_stage(StageProfile.of(found[state.stage.module]), state.stage, job)
        for state in running
        if state.stage.module in found
    }
    runner = usage(os.getpid()).rss + RUNNER_GROWTH
    if on_gpu(config):  # what is planned is the device's memory
        runner, budget = 0, job.device_budget or 10**15
        profiles = {name: device.for_device(one, config.memory.host) for name, one in profiles.items()}
        profiles = {name: replace(one, models=tuple(map(_stays, one.models))) for name, one in profiles.items()}
    if "text_encode" in profiles and not on_gpu(config) and _may_be_weighted(job):
        profiles["text_encode"] = replace(profiles["text_encode"], base=profiles["text_encode"].base + COMPEL)
    for state in running if config.preview.vae and not on_gpu(config) else ():
        if state.name in profiles and config.preview.get(state.stage.module):
            profiles[state.name] = replace(profiles[state.name], base=profiles[state.name].base + TINY)
    for state in running:
        if state.name in profiles and spread(job, state.stage).ranks > 1:
            profiles[state.name] = replace(profiles[state.name], base=profiles[state.name].base + RANK)
        for technique in techniques_of(config, state.stage.module) if state.name in profiles else ():
            one = profiles[state.name]
            profiles[state.name] = replace(one, models=tuple(map(technique.planned, one.models)))
    try:
        chosen = plan_run(list(profiles.values()), budget, runner, config.memory.weights)
    except OverBudget as error:
        raise DoesNotFit(_refusal(error, config)) from None
    check_disk(running, profiles.values())
    by_name = {state.name: state.stage for state in running}
    plans = {name: _plan(one, profiles[name], by_name[name], job, store, runner) for name, one in chosen.items()}
    plans |= {state.name: _stitch(config) for state in running if state.stage.module == "stitch"}
    _without_room(plans, profiles, note)
    before = stage_plans(read_object(run_dir / "plan.json"))
    plans = forking.planned(plans, states, job, forking.size([one.base for one in profiles.values()]), before)
    write_json(run_dir / "plan.json", {name: one.as_json() for name, one in plans.items()})
    return plans


def _stitch(config: DictConfig) -> StagePlan:
    threads = config.launch.threads or os.cpu_count() or 1
    size = STITCH + STITCH_THREAD * threads + STITCH_COLUMN * config.width
    return StagePlan(predicted_peak_rss_bytes=usage(os.getpid()).rss + RUNNER_GROWTH + size)


def _may_be_weighted(job: Job) -> bool:
    """Whether a prompt has signs of weighting, or may be longer than a window of CLIP's; without its tokenizer."""
    clip = any("CLIP" in kind for kind in facts_of(job.config).classes.values())
    texts = (text for row in job.regions.texts for text in row)
    return clip and any(len(text) > 75 or has_signs(text) for text in texts) and job.config.prompt_weighting == "auto"


def _stays(model: ModelProfile) -> ModelProfile:
    """Weights over several GPUs stay there, and a micro-batch goes through all of them at a time."""
    return replace(model, streams=False, group=model.together) if model.placement else model


def _rehearsed(state: StageState) -> None:
    """The look has rehearsed the schedules too."""
    with state.entry.lock():
        state.entry.prepare()
        write_json(state.entry.path / REHEARSED, {"refused": None})
        state.entry.commit()


def check_disk(states: Sequence[StageState], profiles: Iterable[StageProfile]) -> None:
    """Scratch files have to fit the disk now: hours later is too late to hear of it."""
    needed = {profile.name: profile.disk for profile in profiles}
    for state in states:
        if state.status != "reuse" and needed.get(state.name, 0) > (there := room(state.entry.path)):
            raise DoesNotFit(refusal(state.stage, needed[state.name], there))


def _of_stage(profile: StageProfile, stage: Stage, job: Job) -> StageProfile:
    """The profile with this run's steps (they change often and need no new look), and of an upscaling phase: the same
    shapes as the final canvas, fewer times. A guide's pictures are as much smaller as the canvas is. Of several ranks
    it is one's: a part of the tiles, on a GPU of its own or on a part of the processor."""
    config, over = job.config, spread(job, stage)
    steps = {"lowres": config.lowres.num_inference_steps, "denoise": running_steps(config)}.get(stage.module)
    models = profile.models
    if steps is not None:
        models = tuple(replace(model, steps=max(1, steps)) for model in models)
    if over.ranks > 1:
        models = tuple(replace(model, micro_batches=-(-model.micro_batches // over.ranks)) for model in models)
        rate = profile.rate if on_gpu(config) else profile.rate / over.each
        profile = replace(profile, rate=rate)
    if stage.phase is None:
        return replace(profile, models=models)
    share = stage.phase[0] * stage.phase[1] / (config.width * config.height)
    models = tuple(
        replace(model, micro_batches=max(1, math.ceil(model.micro_batches * share * 1.3))) for model in models
    )
    extra = profile.extra * stage.phase[0] // config.width if stage.module == "guide" else profile.extra
    return replace(profile, name=stage.name, extra=extra, models=models, disk=int(profile.disk * share))


def _plan(chosen: Chosen, profile: StageProfile, stage: Stage, job: Job, store: Store, runner: int) -> StagePlan:
    """What the stage reads: groups in samples, and where the prepared copies of the weights lie."""
    models, config, over = {}, job.config, spread(job, stage)
    for model in profile.models:
        plan = chosen.choices[model.component].model
        copied = config.memory.prepared and not model.quantised  # a copy would be several times the bytes to read
        if plan.resident != "all" and not model.single_pass and copied:
            plan = replace(plan, prepared=str(_prepared(stage, model.component, job, store)))
        if on_gpu(config):
            plan = replace(plan, host=config.memory.host, device_budget=job.device_budget)
        else:
            more = KEPT_FP32 if dtype_of_component(config, model.component) == "fp32" else 0
            plan = replace(plan, trim_above=max(0, chosen.peak - runner - model.working - more))
        if model.placement:
            plan = replace(plan, placement=model.placement, limits=model.limits)
        models[model.component] = plan
    last = profile.models[-1]
    if on_gpu(config):
        spread_out = [max(model.gpus.values()) for model in profile.models if model.gpus]
        peak = {"predicted_peak_vram_bytes": max(spread_out, default=chosen.peak)}
    else:
        launcher = LAUNCHER if over.ranks > 1 else 0
        peak = {"predicted_peak_rss_bytes": runner + launcher + over.each * (chosen.peak - runner)}
    return StagePlan(
        models=models,
        group_size=chosen.choices[last.component].group * max(1, last.micro_batch),
        predicted_seconds=chosen.seconds,
        disk_bytes=profile.disk,
        ranks=over.each,
        **peak,
    )


def _without_room(
    plans: dict[str, StagePlan], profiles: Mapping[str, StageProfile], note: Callable[[str], None]
) -> None:
    """Take the prepared copies out that would fill the disk: those weights are read from the checkpoint."""
    for name, plan in plans.items():
        for model in profiles[name].models if name in profiles else ():
            file = plan.model(model.component).prepared
            if file is None or is_copied(Path(file)) or COPIES * model.weights <= room(Path(file).parent):
                continue
            read = replace(plan.model(model.component), prepared=None)
            plans[name] = plan = replace(plan, models={**plan.models, model.component: read})
            note(
                f"{name}: no copy of the weights of {model.component} is kept, it would take {model.weights / 1e9:.1f} "
                f"of the {room(Path(file).parent) / 1e9:.1f} GB that are free; they are read from the checkpoint"
            )


def _prepared(stage: Stage, component: str, job: Job, store: Store) -> Path:
    """Where the packed copy of a component's weights lies: by all that decides its bytes."""
    config, cache = job.of_stage(stage).config, store.root / ".identity"
    way = "latent" if config.guide.upscale == "latent" else "lanczos"  # as far as halves of a VAE go
    guide = f"{config.guide.image is None}{way}" if stage.module == "guide" else ""
    key = {
        "component": component,
        "model": model_identity(config, (component,), cache),
        "half": f"{stage.module}{guide}" if component == "vae" else "",
        "dtype": dtype_names(config, (component,)),
        "techniques": {one.name: dict(one.packed(cache)) for one in techniques_of(config, stage.module)},
    }
    return store.root / "weights" / f"{fingerprint(key)}.bin"


def _refusal(error: OverBudget, config: DictConfig) -> str:
    least = -(-int(error.least.peak / 0.985) // 10_000_000) * 10
    slower = error.least.seconds / max(error.fastest.seconds, 1e-9)
    cost = f"{error.stage} then takes about {slower:.1f} times as long as with memory to spare" if slower > 1.02 else ""
    key = "device_budget" if on_gpu(config) else "budget"
    other = "memory.weights=auto, " if config.memory.weights == "resident" else ""
    other += "technique.attention=sdpa, " if config.technique.attention == "openvino" else ""
    return (
        f"memory.{key}: got {config.memory[key]}, but {error.stage} needs at least {least} MB "
        f"for {config.width}x{config.height} with model={config.model.name}.\n"
        f"Use memory.{key}={least}MB{f' ({cost})' if cost else ''}, {other}"
        "or smaller decode.tile_size / denoise.tile_size."
    )
