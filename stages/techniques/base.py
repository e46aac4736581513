"""The door of a technique: what it may change of a model, its weights and its calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.memory.layout import Layout
    from stages.memory.source import WeightSource


class Technique(ABC):
    """One switch. A subclass overrides what it acts on; what it leaves alone stays stock."""

    name: str
    keys: tuple[str, ...] = ()  # of the config that it reads
    channels_last = False  # whether 4-D weights are packed channels-last

    @classmethod
    @abstractmethod
    def of(cls, config: DictConfig) -> Technique | None:
        """As the config says; None: off."""

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        """What of it decides the picture's bits, by dotted config keys; ``cache``: where hashes of files are kept."""
        return {}

    def touches(self, stage: str) -> bool:
        """Whether it has a part in ``stage`` (the module's name)."""
        return True

    def on_model(  # noqa: B027 - most have no part in it
        self, network: nn.Module, component: str
    ) -> None:
        """Change a network, on meta and before its weights are laid out."""

    def on_source(self, source: WeightSource, layout: Layout) -> WeightSource:
        """Change what the bytes of the weights are (LoRA, quantised files)."""
        return source

    def before_call(  # noqa: B027
        self, batch: Any, step: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """Change a denoiser's keyword arguments, each with a row a sample. A pure function of (batch, step): any
        group size and any resume give the same bytes."""
