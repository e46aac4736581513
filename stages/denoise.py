"""The canvas: Mixture of Diffusers over all tiles, step by step, guided by the low-res picture."""

from __future__ import annotations

from typing import Any

from stages.canvas.dilated import Dilated
from stages.canvas.tiles import latent_grid
from stages.context import StageContext
from stages.memory.tensors import read_tensors, write_tensors
from stages.sampling import denoise_canvas, sample
from stages.workflow.store import atomic_path


def run(context: StageContext) -> None:
    """Write ``canvas.safetensors`` (``latents [1, C, H/f, W/f]`` float32) and one file per latent tile."""
    config = context.config
    factor = config.model.vae_scale_factor
    tiles = latent_grid(config.width, config.height, config.denoise.tile_size, config.denoise.overlap, factor)
    guide: dict[str, Any] = {"dilated": Dilated.of(config)}
    if config.guide.mode != "none":
        guide |= {
            "guide": read_tensors(context.input("guide") / "latents.safetensors")["latents"],
            "guide_mode": config.guide.mode,
            "strength": config.denoise.strength,
            "hold_share": config.guide.hold_steps,
            "skip_residual_power": config.guide.skip_residual_power,
        }
    latents = sample(context, denoise_canvas(config), num_inference_steps=config.denoise.num_inference_steps, **guide)
    for tile in tiles:
        with atomic_path(context.output / "tiles" / f"{tile.name}.safetensors") as temporary:
            write_tensors(temporary, {"latents": latents[tile.index].contiguous()})
    with atomic_path(context.output / "canvas.safetensors") as temporary:
        write_tensors(temporary, {"latents": latents})
