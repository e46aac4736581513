"""The canvas: Mixture of Diffusers over all tiles, step by step, guided by the low-res picture."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from stages.canvas.dilated import Dilated, dilated_views
from stages.canvas.views import region_views
from stages.context import StageContext
from stages.families.looking import Looking, StageLook
from stages.files import atomic_path
from stages.memory.rows import Rows, Window
from stages.memory.tensors import write_tensors
from stages.regions.types import Regions
from stages.sampling import Canvas, sample
from stages.sampling import look as look_at
from stages.tiles import Size, latent_grid


def canvas_of(config: DictConfig, plan: Regions) -> Canvas:
    """The picture's, in tiles; every region has tiles of its own."""
    factor, denoise = config.model.vae_scale_factor, config.denoise
    size = Size(config.height // factor, config.width // factor)
    views = region_views(
        plan,
        size,
        side=Size(denoise.tile_size // factor, denoise.tile_size // factor),
        overlap=denoise.overlap // factor,
        blend=denoise.blend,
        guidance_scale=denoise.guidance_scale,
        step=config.model.patch,
    )
    return Canvas(size, views, plan.rerolls)


def run(context: StageContext) -> None:
    """Write ``canvas.safetensors`` (``latents [1, C, H/f, W/f]`` float32) and one file per latent tile."""
    config = context.config
    factor, denoise = config.model.vae_scale_factor, config.denoise
    tiles = latent_grid(
        config.width, config.height, denoise.tile_size, denoise.overlap, factor, step=config.model.patch
    )
    guide: dict[str, Any] = {}
    if config.guide.mode != "none":
        guide |= {
            "guide": Rows.open(context.inputs["guide"] / "latents.safetensors"),
            "guide_mode": config.guide.mode,
            "strength": config.denoise.strength,
            "hold_share": config.guide.hold_steps,
            "skip_residual_power": config.guide.skip_residual_power,
        }
    canvas, dilated = canvas_of(config, context.regions), Dilated.of(config, context.regions)
    sampler = sample(context, canvas, num_inference_steps=config.denoise.num_inference_steps, dilated=dilated, **guide)
    if not sampler.ranks.first:
        return
    with atomic_path(context.output / "canvas.safetensors") as temporary:
        rows = Rows.create(temporary, (config.model.latent_channels, config.height // factor, config.width // factor))
        for top, latents in sampler.latents():
            rows.write(top, latents)
    window = Window(Rows.open(context.output / "canvas.safetensors"))
    for tile in tiles:
        with atomic_path(context.output / "tiles" / f"{tile.name}.safetensors") as temporary:
            write_tensors(temporary, {"latents": window.box(*tile[2:])[None]})


def look(looking: Looking) -> StageLook:
    """The denoiser over the canvas, and over its dilated ones."""
    config, regions = looking.config, looking.regions
    return look_at(looking, "denoise", canvas_of(config, regions), dilated_views(config, regions)[2])
