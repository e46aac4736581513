"""The canvas: Mixture of Diffusers over all tiles, step by step, guided by the low-res picture."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from stages.canvas.dilated import Dilated, dilated_views
from stages.canvas.views import region_views
from stages.config import running_steps
from stages.context import StageContext
from stages.families.looking import Looking, StageLook
from stages.files import atomic_path
from stages.memory.rows import Rows, Window
from stages.memory.tensors import write_tensors
from stages.regions.config import from_config
from stages.sampling import Canvas, sample
from stages.sampling import look as look_at
from stages.tiles import Size, latent_grid


def canvas_of(config: DictConfig) -> Canvas:
    """The picture's, in tiles; every region has tiles of its own."""
    factor, plan, denoise = config.model.vae_scale_factor, from_config(config), config.denoise
    size = Size(config.height // factor, config.width // factor)
    views = region_views(
        plan,
        size,
        side=Size(denoise.tile_size // factor, denoise.tile_size // factor),
        overlap=denoise.overlap // factor,
        blend=denoise.blend,
        guidance_scale=denoise.guidance_scale,
    )
    return Canvas(size, views, plan.rerolls)


def run(context: StageContext) -> None:
    """Write ``canvas.safetensors`` (``latents [1, C, H/f, W/f]`` float32) and one file per latent tile."""
    config = context.config
    factor = config.model.vae_scale_factor
    tiles = latent_grid(config.width, config.height, config.denoise.tile_size, config.denoise.overlap, factor)
    guide: dict[str, Any] = {}
    if config.guide.mode != "none":
        guide |= {
            "guide": Rows.open(context.inputs["guide"] / "latents.safetensors"),
            "guide_mode": config.guide.mode,
            "strength": config.denoise.strength,
            "hold_share": config.guide.hold_steps,
            "skip_residual_power": config.guide.skip_residual_power,
        }
    steps = config.denoise.num_inference_steps
    sampler = sample(context, canvas_of(config), num_inference_steps=steps, dilated=Dilated.of(config), **guide)
    with atomic_path(context.output / "canvas.safetensors") as temporary:
        canvas = Rows.create(temporary, (config.model.latent_channels, config.height // factor, config.width // factor))
        for top, rows in sampler.latents():
            canvas.write(top, rows)
    window = Window(Rows.open(context.output / "canvas.safetensors"))
    for tile in tiles:
        with atomic_path(context.output / "tiles" / f"{tile.name}.safetensors") as temporary:
            write_tensors(temporary, {"latents": window.box(*tile[2:])[None]})


def look(looking: Looking) -> StageLook:
    """The denoiser over the canvas, and over its dilated ones."""
    config = looking.config
    return look_at(looking, "denoise", canvas_of(config), running_steps(config), dilated_views(config)[2])
