"""What a run is made from: the finished config, and what is read out of it once. Nothing changes it afterwards."""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages import Stage
from stages.config import parse_bytes, resolve_dtype
from stages.documents import escape_all
from stages.families.facts import facts_of
from stages.regions.config import Regions, from_config
from stages.regions.scale import lowres_regions, scaled
from stages.tiles import Size

TEMPLATE = 40  # tokens that a chat template puts around a text, at most
LONGEST = 512  # tokens that a text is cut to


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, or one canvas of it (:meth:`at`). Sizes in bytes."""

    config: DictConfig  # read-only
    regions: Regions  # of the canvas
    budget: int
    device_budget: int | None  # None: no limit
    dtype: str  # fp32 | bf16 | fp16
    run: str | None  # None: not named yet

    @classmethod
    def of(cls, config: DictConfig) -> Job:
        """Of a resolved config, which stays as it is.

        Raises:
            ConfigError: regions or sizes in bytes that cannot be read.
        """
        config = _with(config, {})
        given, regions = config.memory.device_budget, from_config(config)
        if facts_of(config).own_length and config.model.text_tokens is None:
            config = _with(config, {"model.text_tokens": text_tokens(regions)})
        return cls(
            config=config,
            regions=regions,
            budget=parse_bytes(config.memory.budget),
            device_budget=None if given is None else parse_bytes(given, "memory.device_budget"),
            dtype=resolve_dtype(config),
            run=config.run,
        )

    def named(self, run: str) -> Job:
        """The same under this name."""
        return replace(self, config=_with(self.config, {"run": run}), run=run)

    def at(self, size: Size) -> Job:
        """The same picture on a canvas of ``size`` pixels: the regions scaled, all else as it is."""
        config = _with(self.config, {"width": size.width, "height": size.height})
        return replace(self, config=config, regions=scaled(self.regions, size))

    def of_stage(self, stage: Stage) -> Job:
        """What ``stage`` is made from: an upscaling phase has a canvas of its own; after the first ``guide.image`` has
        no part."""
        job = self if stage.phase is None else self.at(Size(stage.phase[1], stage.phase[0]))
        if not (stage.later and job.config.guide.image):
            return job
        return replace(job, config=_with(job.config, {"guide.image": None}))

    def regions_of(self, stage: Stage) -> Regions:
        """The regions on the canvas of ``stage``."""
        job = self.of_stage(stage)
        return lowres_regions(job.config, job.regions) if stage.module == "lowres" else job.regions


def text_tokens(regions: Regions) -> int:
    """Tokens of the longest text at most, without a tokenizer: one of a vocabulary of bytes is a byte or more. Steps of
    64 keep the looks few."""
    texts = (unicodedata.normalize("NFC", text) for row in regions.texts for text in row)
    return min(LONGEST, -(-(TEMPLATE + max(len(text.encode()) for text in texts)) // 64) * 64)


def _with(config: DictConfig, values: dict[str, Any]) -> DictConfig:
    """A read-only copy with these values."""
    config = copy.deepcopy(config)
    OmegaConf.set_readonly(config, False)
    for key, value in values.items():
        OmegaConf.update(config, key, escape_all(value), merge=False)
    OmegaConf.set_readonly(config, True)
    return config
