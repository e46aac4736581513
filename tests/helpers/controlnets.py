"""ControlNets of tiny transformers against stock pipelines: with a strength of 1 a flow begins with pure noise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from in_process import Work
from PIL import Image
from torch import Tensor

from stages.memory.tensors import read_tensors


def guided(work: Work, values: dict[str, Any], net: Path, scale: float, to: Path) -> tuple[Tensor, Tensor]:
    """(canvas, latents of the guide) with the ControlNet ``net`` shown a picture, in one tile."""
    pixels = torch.rand((16, 32, 3), generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).resize((128, 64)).save(to / "picture.png")
    asked = [{"path": str(net), "guide": True, "scale": scale, "end": 0.7}]
    values = {**values, "guide.mode": "sdedit", "denoise.strength": 1.0, "guide.image": str(to / "picture.png")}
    found = work.run({**values, "model.controlnets": asked}, until="denoise")
    names = (("denoise", "canvas"), ("guide", "latents"))
    canvas, guide = (read_tensors(found[stage] / f"{name}.safetensors")["latents"] for stage, name in names)
    return canvas, guide


def piped(pipeline: Any, net: Any, guide: Tensor, scale: float, *, guidance_scale: float) -> Tensor:
    """The same of a stock pipeline, whose VAE makes the guide's latents of any picture."""
    vae = pipeline.vae
    encoded = guide / vae.config.scaling_factor + vae.config.shift_factor
    vae.encode = lambda _: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda *_: encoded))
    pipeline.register_modules(controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt="a cat",
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        width=128,
        height=64,
        control_image=Image.new("RGB", (128, 64)),
        control_guidance_end=0.7,
        controlnet_conditioning_scale=scale,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
