"""The low-resolution picture's latents: ``latents.safetensors``, at the model's native size."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from stages.canvas.views import region_views
from stages.context import StageContext
from stages.families.looking import Looking, StageLook
from stages.files import atomic_path
from stages.memory.tensors import write_tensors
from stages.regions.scale import lowres_regions, lowres_side
from stages.regions.types import Regions
from stages.sampling import Canvas, sample
from stages.sampling import look as look_at
from stages.tiles import Size


def canvas_of(config: DictConfig, plan: Regions) -> Canvas:
    """The low-res one, with the regions and re-rolled rectangles that ``plan`` has on it: they lay the picture out."""
    factor = config.model.vae_scale_factor
    size, side = Size(config.lowres.height // factor, config.lowres.width // factor), lowres_side(config, plan)
    overlap, guidance = min(side) // 4, config.lowres.guidance_scale
    views = region_views(
        plan, size, side=side, overlap=overlap, blend="gaussian", guidance_scale=guidance, step=config.model.patch
    )
    return Canvas(size, views, plan.rerolls)


def run(context: StageContext) -> None:
    """Write ``latents [1, C, h, w]`` float32. One tile, as stock diffusers, up to a shape of 4:1; then a mixture.

    With regions every region is seen on its own, in a crop of its box.
    """
    steps = context.config.lowres.num_inference_steps
    sampler = sample(context, canvas_of(context.config, context.regions), num_inference_steps=steps)
    if not sampler.ranks.first:
        return
    with atomic_path(context.output / "latents.safetensors") as temporary:
        write_tensors(temporary, {"latents": torch.cat([rows for _, rows in sampler.latents()], dim=2)})


def look(looking: Looking) -> StageLook:
    """The denoiser over the low-res canvas."""
    config = looking.config
    return look_at(looking, "lowres", canvas_of(config, lowres_regions(config, looking.regions)))
