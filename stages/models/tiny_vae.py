"""A tiny VAE of a model's latents, TAESD (``model.preview_vae``): for previews and drafts (``decode.mode=taesd``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.memory.imports import light_imports
from stages.memory.planner import Cut, Line, ModelProfile
from stages.memory.trace import trace
from stages.tiles import Size

TINY = "taesd"  # its name among models, and what decodes with it


def open_tiny(folder: Path, device: str = "cpu") -> Any:
    """The decoder of an ``AutoencoderTiny``, in float32."""
    with light_imports():
        from diffusers import AutoencoderTiny

        vae: Any = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    vae.encoder = None
    return vae.eval().requires_grad_(False).to(device)


def tiny_profile(folder: Path, channels: int, tile: Size, tiles: int) -> ModelProfile:
    """What it takes to decode so many crops of ``tile`` latents; on meta, no weight is read."""
    with light_imports(), torch.device("meta"):
        from diffusers import AutoencoderTiny

        kind: Any = AutoencoderTiny
        vae = kind.from_config(kind.load_config(folder))
    vae.encoder = None
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    latents = torch.empty((1, channels, *tile), device="meta")
    found = trace(vae, [], lambda: vae.decode(latents, return_dict=False), 0)
    peak = max(event.live + event.workspace for event in found.events)
    flops = sum(found.flops.values()) + sum(found.outside.values())
    cut = Cut(
        limit=weights,
        order=(TINY,),
        nbytes={TINY: weights},
        flops={TINY: flops},
        lines=(Line(unit=TINY, fixed=max(peak, weights), slope=0, workspace=0),),  # read before it is made
    )
    return ModelProfile(
        component=TINY,
        weights=weights,
        micro_batch=1,
        micro_batches=tiles,
        steps=1,
        cuts=(cut,),
        streams=False,
        group=1,
    )
