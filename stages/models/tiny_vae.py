"""A tiny VAE of a model's latents, TAESD (``model.preview_vae``): for previews and drafts (``decode.mode=taesd``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.memory.imports import light_imports
from stages.memory.planner import ModelProfile
from stages.models.measure import whole
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
    shape = (1, channels, *tile)
    return whole(TINY, vae, lambda: vae.decode(torch.empty(shape, device="meta"), return_dict=False), tiles)
