"""The canvas: Mixture of Diffusers over all tiles, step by step, guided by the low-res picture."""

from __future__ import annotations

from typing import Any

from stages.canvas.dilated import Dilated
from stages.context import StageContext
from stages.files import atomic_path
from stages.memory.rows import Rows, Window
from stages.memory.tensors import write_tensors
from stages.sampling import denoise_canvas, sample
from stages.tiles import latent_grid


def run(context: StageContext) -> None:
    """Write ``canvas.safetensors`` (``latents [1, C, H/f, W/f]`` float32) and one file per latent tile."""
    config = context.config
    factor = config.model.vae_scale_factor
    tiles = latent_grid(config.width, config.height, config.denoise.tile_size, config.denoise.overlap, factor)
    guide: dict[str, Any] = {"dilated": Dilated.of(config)}
    if config.guide.mode != "none":
        guide |= {
            "guide": Rows.open(context.inputs["guide"] / "latents.safetensors"),
            "guide_mode": config.guide.mode,
            "strength": config.denoise.strength,
            "hold_share": config.guide.hold_steps,
            "skip_residual_power": config.guide.skip_residual_power,
        }
    sampler = sample(context, denoise_canvas(config), num_inference_steps=config.denoise.num_inference_steps, **guide)
    with atomic_path(context.output / "canvas.safetensors") as temporary:
        canvas = Rows.create(temporary, (config.model.latent_channels, config.height // factor, config.width // factor))
        for top, rows in sampler.latents():
            canvas.write(top, rows)
    window = Window(Rows.open(context.output / "canvas.safetensors"))
    for tile in tiles:
        with atomic_path(context.output / "tiles" / f"{tile.name}.safetensors") as temporary:
            write_tensors(temporary, {"latents": window.box(*tile[2:])[None]})
