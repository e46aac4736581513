"""One run from its config to ``image.png``: plan, one process per stage, links, ``run.json``, report."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError
from stages.documents import save_text
from stages.events import Event
from stages.files import atomic_path, make_folder, read_object, write_json, write_text
from stages.job import Job
from stages.paths import anchored
from stages.plans import StagePlan, stage_plans
from stages.regions.config import Regions
from stages.workflow import folder, forking, launch, nodes, overrides, planning, report, shares, tables, upkeep
from stages.workflow.complete import complete
from stages.workflow.errors import explain
from stages.workflow.graph import MissingInput, StageState, build, check_inputs
from stages.workflow.progress import Mute, Silent, reporter
from stages.workflow.store import Store
from stages.workflow.upkeep.clean import trim

REFUSALS = (ConfigError, MissingInput, planning.DoesNotFit, launch.StageFailed, OSError)
PAYLOADS = "payloads.json"  # of a run: what its stages were made from last time


class Reported(Exception):
    """The run failed and the person has been told why. ``run``: its name, if it came to one."""

    def __init__(self, message: str, run: str | None = None) -> None:
        super().__init__(message)
        self.run = run


def execute(
    config: DictConfig,
    said: Sequence[str],
    *,
    sweep: bool = False,
    speaker: str = "",
    pipeline: str = "stages",
    predictions: Mapping[str, StagePlan] | None = None,
) -> dict[str, Any]:
    """Do what the command says; returns what ``run.json`` holds, with ``kept`` if the run was finished before (of
    ``stage=plan`` the run's name and its predicted peak, of ``serve`` and the like nothing).

    Args:
        said: the command line's overrides, kept for ``run=NAME`` later.
        sweep: a job of several: a given run name gets the fingerprint's beginning, so that jobs do not collide, and a
            run that is finished stays as it is.
        speaker: begins each line that is said, where several runs speak at once.
        predictions: stage -> its plan; default: from ``plan.json``.

    Raises:
        Reported: refused or failed; the message has been printed.
        KeyboardInterrupt: stopped by the person, after saying how to go on.
    """
    job, shown = None, Silent()
    try:
        if upkeep.command(config):
            return {}
        job = complete(config, said)
        shown = reporter(job.config.progress, speaker)
        job, store = _named(job, pipeline, sweep)
        return _execute(job, store, said, sweep, pipeline, predictions, shown)
    except REFUSALS as error:
        shown.close()
        if os.environ.get("HIGHRES_TRACEBACK") == "1":
            raise
        message = explain(error) if isinstance(error, OSError) else str(error)
        print(f"{speaker}{message}", file=sys.stderr, flush=True)
        raise Reported(message, job and job.run) from error


def foresee(config: DictConfig, said: Sequence[str], *, pipeline: str = "stages") -> int:
    """Bytes that a job of a sweep will take at most, runner and stages, as ``stage=plan`` finds out; its budget where
    nothing is predicted, 0 where nothing has to run or the job will be refused."""
    config = OmegaConf.merge(config, {"stage": "plan"})  # type: ignore[assignment]
    try:
        job, store = _named(complete(config, said), pipeline, True)
        made = _execute(job, store, said, True, pipeline, None, Mute())
    except REFUSALS:
        return 0
    return 0 if made.get("kept") else made["predicted_peak_rss_bytes"] or job.budget


def _named(job: Job, pipeline: str, sweep: bool) -> tuple[Job, Store]:
    """The job under the name of its run, and the store of its results."""
    store, declared = Store(Path(job.config.output_dir) / ".store"), importlib.import_module(pipeline).PIPELINE
    return job.named(folder.run_name(job.config, build(job, store, pipeline=declared, verify=False), sweep)), store


def _execute(
    job: Job,
    store: Store,
    said: Sequence[str],
    sweep: bool,
    pipeline: str,
    predictions: Mapping[str, StagePlan] | None,
    shown: Silent,
) -> dict[str, Any]:
    declared = importlib.import_module(pipeline).PIPELINE
    config, run_dir = job.config, Path(job.config.output_dir) / str(job.run)
    make_folder(run_dir)
    if config.launch.node_rank:
        nodes.help_out(job, store, declared, run_dir, pipeline, shown)
        return {}
    with folder.locked(run_dir, shown), shares.of(job, shown.line) as share:
        states = build(job, store, pipeline=declared, previous=read_object(run_dir / PAYLOADS))
        folder.link_results(run_dir, states)
        if any(state.status == "reuse" and not state.entry.path.is_dir() for state in states):  # cleaned away meanwhile
            states = build(job, store, pipeline=declared, previous=read_object(run_dir / PAYLOADS))
        if sweep and (finished := _finished(states, run_dir)):
            shown.line(f"{job.run}: finished before")
            shown.final(str(run_dir / (finished["image"] or "")))
            return {**finished, "kept": True}
        before = folder.kept(run_dir)
        write_text(run_dir / "config.yaml", save_text(config))
        overrides.save(run_dir, said, config)
        command = f"python runner.py run={shlex.quote(config.run)}{_elsewhere(config)}"
        if config.stage != "plan":
            check_inputs(states, command)
        try:
            if share:
                share.take(job.budget * config.launch.nproc)
            if config.stage == "plan":
                predictions = _predict(states, job, store, run_dir, pipeline, shown, before)
                tables.plan(states, predictions, shown)
                _draw_regions(job.regions, run_dir, shown)
                shown.final(f"plan of {run_dir}: nothing was computed")
                return {"run": job.run, "predicted_peak_rss_bytes": _peak(states, predictions)}
            with report.Live(run_dir, job, states, command, overrides.typed(said, config)) as live:
                if predictions is None:
                    predictions = _predict(states, job, store, run_dir, pipeline, shown, before)
                live.planned(predictions)
                if share and (peak := _peak(states, predictions)):
                    share.settle(peak)
                with forking.zygote(states, predictions, job, run_dir, pipeline, shown.line) as zygote:
                    summary = _run_stages(states, job, run_dir, command, pipeline, predictions, shown, live, zygote)
                trim(config, shown.line)
                return summary
        except KeyboardInterrupt as stop:
            shown.close()
            print(f"\nstopped; everything finished is kept. Go on with: {command}", file=sys.stderr, flush=True)
            vars(stop)["said"] = True
            raise


def _finished(states: Sequence[StageState], run_dir: Path) -> dict[str, Any] | None:
    """What the run came to, if all that is asked of it now is there from then."""
    made = read_object(run_dir / "run.json")
    listed = made.get("stages")
    if made.get("error") or not isinstance(listed, list) or any(one.status in ("run", "resume") for one in states):
        return None
    known = {(one.get("name"), one.get("fingerprint")) for one in listed if isinstance(one, dict)}
    there = {(one.name, one.fingerprint) for one in states if one.status == "reuse"}
    return made if there and there <= known else None


def _predict(
    states: Sequence[StageState],
    job: Job,
    store: Store,
    run_dir: Path,
    pipeline: str,
    shown: Silent,
    before: Mapping[Path, str | None],
) -> Mapping[str, StagePlan]:
    """Plans of this run: new ones where a model will be opened, else those of last time."""
    opens = any(state.stage.opens_model and state.status in ("run", "resume") for state in states)
    asked = job.config.stage == "plan"
    if pipeline != "stages" or not (opens or asked):
        return forking.planned(stage_plans(read_object(run_dir / "plan.json")), states, job)
    try:
        return planning.plan(states, job, store, run_dir, pipeline=pipeline, note=shown.line)
    except (ConfigError, planning.DoesNotFit, launch.StageFailed) as error:
        if getattr(error, "refused", True):
            folder.restore(run_dir, before)  # values that cannot work are not the run's
        raise


def _peak(states: Sequence[StageState], predictions: Mapping[str, StagePlan]) -> int:
    """Bytes that the runner and its stages are going to take at most; 0 where nobody has predicted it."""
    running = [one.name for one in states if one.status in ("run", "resume")]
    return max((predictions.get(name, StagePlan()).predicted_peak_rss_bytes or 0 for name in running), default=0)


def _run_stages(
    states: Sequence[StageState],
    job: Job,
    run_dir: Path,
    command: str,
    pipeline: str,
    predictions: Mapping[str, StagePlan],
    shown: Silent,
    live: report.Live,
    zygote: launch.Zygote | None,
) -> dict[str, Any]:
    results: list[launch.StageResult] = []
    payloads = read_object(run_dir / PAYLOADS)
    error = ""
    try:
        for state in states:
            if state.status == "skip":
                continue
            if state.status == "reuse":
                results.append(launch.reused(state))
            else:
                shown.begin(state.name, state.reason)
                live.begin(state.name)
                if not state.entry.path.exists():
                    make_folder(state.entry.path)
                folder.link_results(run_dir, states)  # before it begins: what a kill leaves of it is this run's
                source = forking.of_stage(zygote, predictions.get(state.name, StagePlan()))
                results.append(_run_one(state, job, run_dir, pipeline, shown, live, source))
                folder.link_results(run_dir, states)
            shown.end(results[-1])
            live.end(results[-1])
            write_json(run_dir / PAYLOADS, payloads := {**payloads, state.name: state.payload})
    except KeyboardInterrupt:
        error = "interrupted"
        raise
    except launch.StageFailed as failure:
        error = str(failure)
        if failure.refused:
            raise
        raise launch.StageFailed(f"{failure}\nGo on with: {command}") from None
    except OSError as failure:
        error = explain(failure)
        raise
    finally:
        shown.close()
        folder.link_results(run_dir, states)
        summary = live.finish(error, stopped=error == "interrupted")
    tables.results(results, predictions, summary, shown)
    image = run_dir / "image.png"
    shown.line(f"report: {run_dir / 'report.html'}")
    shown.final(str(image if image.exists() else run_dir))
    return summary


def _run_one(
    state: StageState,
    job: Job,
    run_dir: Path,
    pipeline: str,
    shown: Silent,
    live: report.Live,
    zygote: launch.Zygote | None,
) -> launch.StageResult:
    def hear(event: Event) -> None:
        shown.event(state.name, event)
        live.event(event)

    force = bool(job.config.force)
    with nodes.told(state, job, run_dir):
        return launch.run_stage(
            state, job, run_dir, on_event=hear, on_start=live.watch, pipeline=pipeline, force=force, zygote=zygote
        )


def _elsewhere(config: DictConfig) -> str:
    """The part of a command that finds a run outside the default folder."""
    usual = anchored("outputs")
    return "" if Path(config.output_dir) == usual else f" output_dir={shlex.quote(str(config.output_dir))}"


def _draw_regions(regions: Regions, run_dir: Path, shown: Silent) -> None:
    """``regions.png``, a look at where the prompts lie; the one of other settings goes."""
    path = run_dir / "regions.png"
    if not regions.regions:
        path.unlink(missing_ok=True)
        return
    from stages.regions.sketch import sketch  # Pillow: not for every run

    with atomic_path(path) as temporary:
        temporary.write_bytes(sketch(regions))
    shown.line(f"regions: {path} shows {len(regions.regions)} of them")
