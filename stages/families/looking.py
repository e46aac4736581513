"""A look at what a stage would open: networks on meta, in the shapes of this run. No weight is read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import DictConfig

from stages.families import family_of
from stages.families.base import Family
from stages.families.opening import built
from stages.memory.planner import ModelProfile
from stages.models.checkpoint import Checkpoint
from stages.models.loading import Built
from stages.models.measure import Measured, cuts
from stages.regions.types import Regions


class StageLook(NamedTuple):
    """What a stage needs: its models, ``extra`` bytes besides, ``before`` bytes that are free again when a model is
    opened, ``disk`` bytes of scratch files, ``code`` bytes of libraries that other stages do not import."""

    models: tuple[ModelProfile, ...]
    extra: int = 0
    before: int = 0
    disk: int = 0
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What a stage's ``look`` is handed."""

    config: DictConfig
    regions: Regions  # of the picture's canvas
    checkpoint: Checkpoint
    known: dict[Hashable, Measured] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return family_of(self.config)

    def network_config(self, component: str) -> dict[str, Any]:
        """The config of a component's network."""
        return self.checkpoint.config(component)

    def built(self, component: str, stage: str, drop: Sequence[str] = ()) -> Built:
        """A component as ``stage`` would open it."""
        return built(self.config, self.family, self.checkpoint, component, stage, drop)

    def measured(
        self,
        key: Hashable,
        component: str,
        stage: str,
        call: Callable[[Any, int], Any],
        *,
        drop: Sequence[str] = (),
        **options: Any,
    ) -> Measured:
        """``models.measure.cuts`` of a component; of equal ``key`` (the shapes of the call) once."""
        key = (component, tuple(drop), key)
        if key not in self.known:
            self.known[key] = cuts(self.built(component, stage, drop), call, **options)
        return self.known[key]
