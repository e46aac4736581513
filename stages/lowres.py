"""The low-resolution picture's latents: ``latents.safetensors``, at the model's native size."""

from __future__ import annotations

import torch

from stages.context import StageContext
from stages.files import atomic_path
from stages.memory.tensors import write_tensors
from stages.sampling import lowres_canvas, sample


def run(context: StageContext) -> None:
    """Write ``latents [1, C, h, w]`` float32. One tile, as stock diffusers, up to a shape of 4:1; then a mixture.

    With regions every region is seen on its own, in a crop of its box.
    """
    steps = context.config.lowres.num_inference_steps
    sampler = sample(context, lowres_canvas(context.config), num_inference_steps=steps)
    with atomic_path(context.output / "latents.safetensors") as temporary:
        write_tensors(temporary, {"latents": torch.cat([rows for _, rows in sampler.latents()], dim=2)})
