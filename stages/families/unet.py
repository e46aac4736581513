"""What families with a UNet share: its blocks, its micro-batch, and ``UNet2DConditionModel`` as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.families.base import Denoiser
from stages.memory.units import Blocks
from stages.tiles import Size

GPU_TILES = 2  # 64x64 tiles of Stable Diffusion that keep a large GPU busy: more of them are hardly faster
TILE = 64 * 64 * 320  # activations of one at its first level


def _parkable(network: nn.Module) -> tuple[tuple[str, ...], str]:
    """The longest skip connections: given at the top of the way down, read at the top of the way up."""
    last: Any = getattr(network, "up_blocks", ())
    return ("conv_in", "down_blocks.0"), f"up_blocks.{len(last) - 1}"


UNET = Blocks(
    classes=frozenset(
        {
            *("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Downsample2D", "Upsample2D"),
            *("Attention", "FeedForward"),
        }
    ),
    stages=frozenset({"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}),
    parkable=_parkable,
)
VAE = Blocks(classes=frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D", "Attention"}))
CLIP = Blocks(classes=frozenset({"CLIPEncoderLayer"}))


def micro_batch(network_config: Mapping[str, Any], tile: Size, device: str = "cpu") -> int:
    """Samples that go through a block at a time: whole pairs, of about one 64x64 tile of Stable Diffusion on a CPU."""
    one = tile.height * tile.width * network_config["block_out_channels"][0]
    if device == "cpu":
        return 2 * max(1, min(8, TILE // one))
    return 2 * max(1, min(32, GPU_TILES * TILE // one))


class UNetDenoiser(Denoiser):
    """Predicts noise or velocity, as the model was trained; ``prompt_embeds``, ``negative_prompt_embeds [R, S, D]``."""

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        found = {
            "sample": batch.samples.to(self.device, self.dtype),
            "timestep": timestep.to(self.device),
            "encoder_hidden_states": self.rows(batch, "prompt_embeds"),
        }
        if width := getattr(self.network.config, "time_cond_proj_dim", None):  # distilled: guidance is an input
            found["timestep_cond"] = guidance_embedding(batch.guidance_scales, width).to(self.device, self.dtype)
        return found

    def predict(self, **inputs: Tensor) -> Tensor:
        return self.network(**inputs, return_dict=False)[0]


def guidance_embedding(scales: tuple[float, ...], width: int) -> Tensor:
    """``[N, width]`` float32, as ``LatentConsistencyModelPipeline.get_guidance_scale_embedding`` of w = scale - 1."""
    weights = (torch.tensor(scales, dtype=torch.float32) - 1) * 1000.0
    half = width // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = weights[:, None] * rate[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
