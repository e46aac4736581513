"""What ``benchmarks.gpu`` and ``benchmarks.streaming`` have done in every way: one step over the tiles of a picture,
through a family's door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from stages.canvas.mixture import TileBatch
from stages.families import family_of
from stages.families.base import Denoiser, Embeds, Family, example_tiles
from stages.families.facts import FACTS, Facts
from stages.techniques.base import Technique
from stages.techniques.channels_last import ChannelsLast
from stages.tiles import Size

DEVICE = "cuda"


@dataclass(frozen=True, kw_only=True)
class Work:
    """``tiles`` tiles of ``tile`` latents, with guidance where the family has an unconditional pass.

    ``micros``: tiles that the resident loop takes at a time. ``offloaded``: tiles that group offload is timed with.
    ``whole``: the canvas that is tried in one call too. ``guided``: False where this very model has no unconditional
    pass.
    """

    family: str
    tile: Size
    tiles: int
    dtype: torch.dtype
    micros: tuple[int, ...] = (1,)
    offloaded: int = 1
    whole: Size | None = None
    device: str = "cuda"
    guided: bool = True

    @property
    def facts(self) -> Facts:
        return FACTS[self.family]

    @property
    def component(self) -> str:
        return self.facts.denoiser

    @property
    def passes(self) -> int:
        """Samples a tile."""
        return 2 if self.guided and self.facts.guidance == "cfg" else 1

    @property
    def config(self) -> DictConfig:
        """What a denoiser reads of a run's."""
        factor = self.facts.vae_scale_factor
        return OmegaConf.create({"model": {"family": self.family, "vae_scale_factor": factor}})

    @property
    def door(self) -> Family:
        return family_of(self.config)

    @property
    def techniques(self) -> tuple[Technique, ...]:
        return (ChannelsLast(),) if self.facts.unet else ()

    def micro(self, network_config: Mapping[str, Any]) -> int:
        """Tiles that go through a block at a time, as the family says."""
        return max(1, self.door.micro_batch(network_config, self.tile, self.device) // self.passes)

    def batch(self, network_config: Mapping[str, Any], tiles: int, tile: Size | None = None) -> TileBatch:
        """Random samples of ``tiles`` tiles, on the device."""
        example, _ = self.door.example(network_config, tile or self.tile, self.passes * tiles)
        generator = torch.Generator(self.device).manual_seed(1)
        return self._of(torch.randn(example.samples.shape, device=self.device, generator=generator))

    def part(self, batch: TileBatch, start: int, count: int) -> TileBatch:
        """``count`` tiles of a batch, from ``start`` on."""
        return self._of(batch.samples[self.passes * start : self.passes * (start + count)])

    def _of(self, samples: torch.Tensor) -> TileBatch:
        found = example_tiles(Size(*samples.shape[-2:]), len(samples), samples.shape[1])
        found.samples = samples
        if self.passes == 1:
            found.unconditional = (False,) * len(samples)
        return found

    def denoiser(self, network: nn.Module, network_config: Mapping[str, Any], device: str, **more: Any) -> Denoiser:
        """The family's, with random embeddings; ``more``: of the family's ``denoiser``."""
        _, shapes = self.door.example(network_config, self.tile, self.passes)
        generator = torch.Generator().manual_seed(2)
        embeds: Embeds = {
            name: torch.randn(like.shape, generator=generator) if like.is_meta and device != "meta" else like
            for name, like in shapes.items()
        }
        options: dict[str, Any] = {"canvas": self.tile, "dtype": self.dtype, "techniques": self.techniques}
        return self.door.denoiser(network, embeds, self.config, device=device, **{**options, **more})


def _nine(family: str, tile: Size, *, guided: bool = True) -> Work:
    """A transformer in bf16, nine tiles of 1024x1024 pixels."""
    return Work(family=family, tile=tile, tiles=9, dtype=torch.bfloat16, micros=(1, 3), guided=guided)


WORKS = {
    # 2048x2048 pixels each, but for flux_tile, 1360x768
    "sd15": Work(
        family="sd",
        tile=Size(64, 64),
        tiles=25,
        dtype=torch.float16,
        micros=(1, 2, 3, 5, 9, 13, 25),
        offloaded=3,
        whole=Size(256, 256),
    ),
    "sdxl": Work(
        family="sdxl",
        tile=Size(128, 128),
        tiles=9,
        dtype=torch.float16,
        micros=(1, 3, 9),
        offloaded=3,
        whole=Size(256, 256),
    ),
    "flux": _nine("flux", Size(128, 128)),
    "flux_768": Work(
        family="flux",
        tile=Size(96, 96),
        tiles=16,
        dtype=torch.bfloat16,
        micros=(1, 2, 4),
        offloaded=1,
    ),
    "flux_tile": Work(
        family="flux",
        tile=Size(96, 170),  # 1360x768 pixels
        tiles=1,
        dtype=torch.bfloat16,
        micros=(1,),
        offloaded=1,
    ),
    "sd3": _nine("sd3", Size(128, 128)),
    "flux2_klein": _nine("flux2_klein", Size(64, 64), guided=False),  # latents of 16 pixels
    "z_image": _nine("z_image", Size(128, 128), guided=False),
}


def kind_of(name: str) -> str:
    """The kind of checkpoint that a work is done with."""
    return {"flux_768": "flux", "flux_tile": "flux"}.get(name, name)
