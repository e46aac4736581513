"""How many ranks share the tiles of a stage: as many as ``launch.nproc`` says, but none without a tile."""

from __future__ import annotations

from stages import Stage
from stages.job import Job
from stages.regions.scale import lowres_side
from stages.tiles import Size, grid, latent_grid


def ranks(job: Job, stage: Stage) -> int:
    """Of a stage in this run; 1 where its work is one piece (``decode.mode=exact``, a low-res picture of one tile)."""
    wanted = job.config.launch.nproc
    return min(wanted, _tiles(job, stage) or wanted) if stage.spreads and wanted > 1 else 1


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
