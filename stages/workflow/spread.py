"""How many ranks share a stage's tiles: ``launch.nproc`` on each of ``launch.nnodes`` hosts, none without a tile."""

from __future__ import annotations

from typing import NamedTuple

from stages import Stage
from stages.job import Job
from stages.regions.scale import lowres_side
from stages.tiles import Size, grid, latent_grid


class Spread(NamedTuple):
    """Over how many hosts, with how many ranks on each."""

    hosts: int = 1
    each: int = 1

    @property
    def ranks(self) -> int:
        return self.hosts * self.each


def spread(job: Job, stage: Stage) -> Spread:
    """Of a stage in this run; one rank where its work is one piece (``decode.mode=exact``, a low-res picture of one
    tile), one host where there are fewer tiles than hosts."""
    hosts, each = job.config.launch.nnodes, job.config.launch.nproc
    if not stage.spreads or hosts * each == 1:
        return Spread()
    tiles = _tiles(job, stage) or hosts * each
    hosts = hosts if tiles >= hosts else 1
    return Spread(hosts, min(each, tiles // hosts))


def _tiles(job: Job, stage: Stage) -> int:
    """How many there are at least; 0 where that is not known."""
    config, regions = job.of_stage(stage).config, job.regions_of(stage)
    factor, step, places = config.model.vae_scale_factor, config.model.patch, len(regions.regions)
    if stage.module == "lowres":
        size, side = Size(config.lowres.height // factor, config.lowres.width // factor), lowres_side(config, regions)
        return max(places, len(grid(size, side, min(side) // 4, step)))
    if stage.module == "denoise":
        d = config.denoise
        return max(places, len(latent_grid(config.width, config.height, d.tile_size, d.overlap, factor, step=step)))
    if stage.module == "decode":
        d = config.decode
        return 1 if d.mode == "exact" else len(latent_grid(config.width, config.height, d.tile_size, d.overlap, factor))
    return 0
