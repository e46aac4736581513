"""How a stage will run, as the planner says and the stage reads it: ``plan.json``. No torch. Sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from stages.hashes import fingerprint

Made = TypeVar("Made")


CHUNK = 32 << 20  # bytes of a packed copy that are made at a time, but for a larger tensor


def copy_in(file: Path, blocks: Mapping[str, tuple[int, int]]) -> Path:
    """Where a packed copy lies that ``ModelPlan.prepared`` calls ``file``: its name says in which blocks weights lie,
    for machines want others."""
    return file.with_suffix(f".{fingerprint(blocks)[:8]}.bin") if blocks else file


def is_copied(file: Path) -> bool:
    """Whether there is such a copy, in whatever blocks."""
    return any(file.parent.glob(f"{file.stem}.*bin"))


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """How one model of a stage gets its weights. Without arguments all of them are resident.

    ``resident``: ``"all"`` or names of units. ``unit_limit`` and ``stage_limit`` cut the model into units
    (:mod:`stages.memory.units`; None: blocks whole), ``order`` names them as one pass calls them. ``parked`` units of a
    GPU leave their skip connections in host memory. ``prepared``: path of the packed copy. ``trim_above``: RES of the
    process over which memory that is free goes back at the end of a unit, so that the next has room; 0: always.
    ``host`` and ``device_budget`` (bytes that may be reserved, None: no limit) are for GPUs. ``placement`` (module ->
    GPU) spreads the weights over several, whose ``limits`` are bytes by GPU.
    """

    resident: str | tuple[str, ...] = "all"
    unit_limit: int | None = None
    stage_limit: int = 0
    parked: tuple[str, ...] = ()
    ring_bytes: int = 0
    order: tuple[str, ...] = ()
    prepared: str | None = None
    trim_above: int = 0
    host: str = "pinned"
    device_budget: int | None = None
    placement: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ModelPlan:
        """From plain values. ValueError for a name that is none of a plan's."""
        return _made(cls, {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})


def described(component: str, placement: Mapping[str, int]) -> str:
    """Where a model's modules lie, in one line: of each GPU the first and the last of a run of them."""
    found: list[tuple[int, list[str]]] = []
    for module, gpu in placement.items():
        if not found or found[-1][0] != gpu:
            found.append((gpu, []))
        found[-1][1].append(module or "all of it")
    runs = (f"{names[0]}{f' ... {names[-1]}' if len(names) > 1 else ''} on GPU {gpu}" for gpu, names in found)
    return f"{component}: {', '.join(runs)}"


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """``models`` by component, opened one after the other; samples at a time (0: the stage's own choice),
    ``group_size`` through the whole model, ``micro_batch`` of them through a block; and what was predicted: RAM of the
    runner and all ``ranks``, VRAM of one GPU. ``zygote_bytes``: of the process that the stage is forked from, which is
    in the prediction; 0: it starts fresh."""

    models: Mapping[str, ModelPlan] = field(default_factory=dict)
    micro_batch: int = 0
    group_size: int = 0
    predicted_peak_rss_bytes: int | None = None
    predicted_peak_vram_bytes: int | None = None
    predicted_seconds: float | None = None
    disk_bytes: int = 0
    ranks: int = 1
    zygote_bytes: int = 0

    def model(self, component: str) -> ModelPlan:
        """Of one component; all resident where nothing was planned."""
        return self.models.get(component, ModelPlan())

    @property
    def predicted_peak(self) -> int | None:
        """Of the memory that was planned: the GPU's, else RAM."""
        return self.predicted_peak_vram_bytes or self.predicted_peak_rss_bytes

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> StagePlan:
        """From plain values. ValueError for a name that is none of a plan's."""
        models = {name: ModelPlan.of(plan) for name, plan in data.get("models", {}).items()}
        return _made(cls, {**data, "models": models})


def stage_plans(data: Any) -> dict[str, StagePlan]:
    """What is in a ``plan.json``; {} where there is none."""
    return {name: StagePlan.of(plan) for name, plan in (data or {}).items()}


def _made(kind: type[Made], values: Mapping[str, Any]) -> Made:
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{kind.__name__}: got {', '.join(unknown)}, expected some of {', '.join(known)}.")
    return kind(**values)
