"""Parts that tiny random checkpoints of several families have alike, as the stock classes make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import T5TokenizerFast

ONE_TILE = {  # that covers the canvas: what the stock pipeline computes
    "scheduler.class_name": None,
    "width": 128,
    "height": 64,
    "guide.mode": "none",
    "denoise.tile_size": 128,
    "denoise.overlap": 32,
    "denoise.num_inference_steps": 3,
    "seed": 7,
    "technique.channels_last": False,
}


def keys_of(family: str, latent_channels: int) -> dict[str, Any]:
    """Of a family whose transformer joins 2x2 latents."""
    sizes = {"model.latent_channels": latent_channels, "model.patch": 2, "model.size_multiple": 16}
    return {"model.family": family, **sizes}


def vae_of_sixteen_channels(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """Of 8x8 pixels a latent, without quant convolutions."""
    kind: Any = AutoencoderKL
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def stirred(*models: nn.Module) -> None:
    """In eval mode, no weight as it is made: none is zero or one."""
    for model in models:
        model.eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)


def letters_t5() -> T5TokenizerFast:
    """T5's tokenizer of single letters."""
    letters = [*((chr(code), -2.0) for code in range(97, 123)), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters])


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """A random AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    sizes = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**sizes, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(folder)
    return folder
