"""The low-resolution picture's latents: ``latents.safetensors``, at the model's native size."""

from __future__ import annotations

from stages.canvas.mixture import grid_views
from stages.canvas.tiles import Size, grid
from stages.context import StageContext
from stages.memory.tensors import write_tensors
from stages.sampling import sample
from stages.workflow.store import atomic_path


def run(context: StageContext) -> None:
    """Write ``latents [1, C, h, w]`` float32. One tile, as stock diffusers, up to a shape of 4:1; then a mixture."""
    config = context.config
    factor, native = config.model.vae_scale_factor, config.model.native_size
    size = Size(config.lowres.height // factor, config.lowres.width // factor)
    side = 2 * native // factor
    tiles = grid(size, Size(side, side), side // 4)
    views = grid_views(tiles, size, blend="gaussian", guidance_scale=config.lowres.guidance_scale)
    latents = sample(context, size=size, views=views, num_inference_steps=config.lowres.num_inference_steps)
    with atomic_path(context.output / "latents.safetensors") as temporary:
        write_tensors(temporary, {"latents": latents})
