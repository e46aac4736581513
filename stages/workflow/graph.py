"""What a run has to do: fingerprints down the pipeline, what can be reused, and the reason for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from stages import PIPELINE, Stage, expanded
from stages.config import ConfigError, close_match
from stages.families.facts import facts_of
from stages.hashes import file_hash, fingerprint
from stages.job import Job
from stages.mask import masked
from stages.paths import files_of, is_safetensors
from stages.regions.scale import parameter as region_parameter
from stages.techniques import TECHNIQUES, techniques_of
from stages.techniques.dtype import dtype_names
from stages.workflow.identity import model_identity
from stages.workflow.machine import machine
from stages.workflow.store import Entry, Store


class MissingInput(RuntimeError):
    """A stage was asked for whose upstream result is not there; the message names the command that makes it."""


@dataclass(kw_only=True)
class StageState:
    """One stage of this run: its key in the store, and what is going to happen to it.

    ``status``: ``reuse`` (valid result), ``resume`` (partial work lies there), ``run``, or ``skip`` (not asked for and
    not there). ``reason`` says why.
    """

    stage: Stage
    needs: tuple[str, ...]
    payload: dict[str, Any]
    fingerprint: str
    entry: Entry
    status: str = "skip"
    reason: str = ""

    @property
    def name(self) -> str:
        return self.stage.name


def active(config: DictConfig, pipeline: Sequence[Stage] = PIPELINE) -> list[Stage]:
    """The stages that the last one needs, directly or not, in order; the others have no part in this picture."""
    pipeline = expanded(config, pipeline)
    wanted = {pipeline[-1].name}
    for stage in reversed(pipeline):
        if stage.name in wanted:
            wanted.update(stage.needs(config))
    return [stage for stage in pipeline if stage.name in wanted]


def asked(config: DictConfig, pipeline: Sequence[Stage] = PIPELINE) -> list[str]:
    """Names of the stages that ``stage=`` asks for, in pipeline order; ``plan`` stands for all of them.

    Raises:
        ConfigError: an unknown name (with the close match), or a stage that has no part in this picture.
    """
    value = config.stage
    names = [str(name) for name in value] if isinstance(value, ListConfig | list | tuple) else [str(value)]
    if names in (["all"], ["plan"]):
        return [stage.name for stage in active(config, pipeline)]
    known, possible = (
        [stage.name for stage in expanded(config, pipeline)],
        {stage.name for stage in active(config, pipeline)},
    )
    for name in names:
        if name not in known:
            hint = close_match(name, [*known, "all", "plan"])
            raise ConfigError("stage", name, f"all, plan, or some of {', '.join(known)}", hint)
        if name not in possible:
            raise ConfigError("stage", name, f"one of {', '.join(possible)} with this guide", "It is not used here.")
    return [name for name in known if name in names]


def parameters(job: Job, stage: Stage, cache: Path) -> dict[str, Any]:
    """The stage's declared parameters, flat: dotted key -> plain value.

    A file enters by its hash, regions by what the stage makes of them, however they were written.
    """
    found: dict[str, Any] = {}
    config = job.of_stage(stage).config
    for key in stage.parameters:
        value = OmegaConf.select(config, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        if value and (key == "guide.image" or (key == "guide.upscale" and is_safetensors(str(value)))):
            value = file_hash(Path(str(value)), cache)
        if key in ("regions", "reroll") and value:
            value = region_parameter(job.regions_of(stage), key, stage.module)
        _flatten(key, value, found)
    if "decode" in stage.parameters and config.decode.mode == "taesd":
        files = files_of(Path(config.preview.vae))
        found["model.preview_vae"] = fingerprint({file.name: file_hash(file, cache) for file in files})
    return found


def _flatten(key: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            _flatten(f"{key}.{name}", below, into)
    else:
        into[key] = value


def seen(job: Job, state: StageState, states: Mapping[str, StageState]) -> DictConfig:
    """The config as a stage sees it: masked to what is in its fingerprint."""
    also = {key for technique in TECHNIQUES for key in technique.keys} if state.stage.opens_model else set()
    if state.stage.records:
        also |= {key for name, one in states.items() if _above(name, state, states) for key in one.stage.parameters}
        also |= {key for technique in TECHNIQUES for key in technique.keys}
    return masked(job.of_stage(state.stage).config, state.stage, {*also, *state.stage.checks})


def build(
    job: Job,
    store: Store,
    *,
    pipeline: Sequence[Stage] = PIPELINE,
    previous: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> list[StageState]:
    """The active stages in order, with fingerprints; with ``verify`` also what is valid on disk and what will run.

    Args:
        previous: the run's payloads of last time (``payloads.json``), for reasons such as 'seed changed (0 -> 1)'.
        verify: False computes fingerprints only and reads no result (a stage process does not need more).
    """
    states: dict[str, StageState] = {}
    config = job.config
    for stage in active(config, pipeline):
        needs = stage.needs(config)
        states[stage.name] = state_of(job, store, stage, {name: states[name].fingerprint for name in needs})
    if verify:
        _decide(config, states, asked(config, pipeline), previous or {})
    return list(states.values())


def state_of(job: Job, store: Store, stage: Stage, upstream: Mapping[str, str]) -> StageState:
    """The stage's payload and fingerprint; ``upstream`` maps what it needs to fingerprints."""
    cache = store.root / ".identity"
    config, chosen = job.config, parameters(job, stage, cache)
    payload: dict[str, Any] = {
        "stage": stage.name,
        "version": stage.version,
        "parameters": chosen,
        "upstream": dict(upstream),
    }
    if stage.opens_model:
        for technique in techniques_of(config, stage.module):
            chosen |= technique.fingerprint(cache)
        facts = facts_of(config)
        components = facts.components.get(stage.module, facts.opened)
        identity = model_identity(config, components, cache)
        device = str(config.device).split(":")[0]
        payload |= {"model": identity, "dtype": dtype_names(config, components), "device": device}
    if stage.measures:
        payload["machine"] = machine(job.config)
    print_ = fingerprint(payload)
    entry = store.entry(stage.name, print_, payload)
    return StageState(stage=stage, needs=tuple(upstream), payload=payload, fingerprint=print_, entry=entry)


def _decide(config: DictConfig, states: dict[str, StageState], wanted: list[str], previous: Mapping[str, Any]) -> None:
    for name, state in states.items():
        invalid = state.entry.why_invalid()
        if name in wanted and config.force:
            state.status, state.reason = "run", "force=true"
        elif not invalid:
            same = previous.get(name) in (None, state.payload)
            state.status, state.reason = "reuse", "nothing changed" if same else "computed before with these values"
        else:
            begun = invalid == "no result yet" and state.entry.begun()
            changes = differences(previous.get(name), state.payload) if invalid == "no result yet" else ""
            state.reason = changes or ("an earlier try was interrupted" if begun else invalid)
            state.status = "skip" if name not in wanted else "resume" if begun else "run"


def differences(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """What changed between two payloads, in words; '' where nothing did or there is no old one."""
    if not isinstance(old, Mapping):
        return ""
    found = []
    before, after = old.get("parameters", {}), new["parameters"]
    for key in dict.fromkeys([*after, *before]):
        if before.get(key) != after.get(key):
            found.append(f"{key} changed ({_short(before.get(key))} -> {_short(after.get(key))})")
    for key in ("dtype", "device"):
        if old.get(key) != new.get(key):
            found.append(f"{key} changed ({_short(old.get(key))} -> {_short(new.get(key))})")
    if old.get("model") != new.get("model"):
        found.append("the model changed")
    if old.get("machine") != new.get("machine"):
        found.append("the machine or its libraries changed")
    if old.get("version") != new.get("version"):
        found.append(f"the stage's code changed (version {old.get('version')} -> {new.get('version')})")
    if not found and old.get("upstream") != new.get("upstream"):
        earlier, now = old.get("upstream", {}), new["upstream"]
        changed = [name for name in dict.fromkeys([*now, *earlier]) if earlier.get(name) != now.get(name)]
        found.append(f"{' and '.join(changed)} changed")
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def check_inputs(states: Iterable[StageState], command: str) -> None:
    """Refuse a stage whose upstream is neither done nor asked for.

    Raises:
        MissingInput: with the command that makes it (``command`` is the run's, without ``stage=``).
    """
    by_name = {state.name: state for state in states}
    for state in by_name.values():
        missing = [name for name in state.needs if by_name[name].status == "skip"]
        if missing and state.status in ("run", "resume"):
            why = "; ".join(f"{name}: {by_name[name].reason}" for name in missing)
            absent = [name for name in by_name if by_name[name].status == "skip" and _above(name, state, by_name)]
            stage = absent[0] if len(absent) == 1 else f"[{','.join(absent)}]"
            text = f"{state.name} needs {' and '.join(missing)} ({why})."
            raise MissingInput(f"{text}\nMake it: {command} stage={stage}")


def _above(name: str, state: StageState, by_name: Mapping[str, StageState]) -> bool:
    return any(need == name or _above(name, by_name[need], by_name) for need in state.needs)
