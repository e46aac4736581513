"""What families with a UNet share: its blocks, its micro-batch, and ``UNet2DConditionModel`` as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.families.base import TILE, Denoiser, on_cpu
from stages.memory.units import Blocks
from stages.tiles import Size

# traits of a UNet's config that ask for inputs which its family has to know: what they are where they ask for none
_INPUTS: Mapping[str, Any] = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "attention_type": "default",
}
GPU_TILES = 2  # 64x64 tiles of Stable Diffusion that keep a large GPU busy: more of them are hardly faster


def _parkable(network: nn.Module) -> tuple[tuple[str, ...], str]:
    """The longest skip connections: given at the top of the way down, read at the top of the way up."""
    last: Any = getattr(network, "up_blocks", ())
    return ("conv_in", "down_blocks.0"), f"up_blocks.{len(last) - 1}"


UNET = Blocks(
    classes=frozenset(
        {
            *("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Downsample2D", "Upsample2D"),
            *("Attention", "FeedForward", "ControlNetConditioningEmbedding"),
        }
    ),
    stages=frozenset({"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}),
    parkable=_parkable,
)


def refuse_unet(unet: Mapping[str, Any], known: Mapping[str, Any], *, width: int, latent_channels: int) -> str | None:
    """Why a UNet's config cannot be used.

    Args:
        known: traits with the value that the family gives inputs for.
        width: of the text encoders' hidden states.
        latent_channels: of the VAE.
    """
    if unet.get("_class_name") != "UNet2DConditionModel":
        return f"unet: got a {unet.get('_class_name')}, expected a UNet2DConditionModel."
    for trait, without in _INPUTS.items():
        value, expected = unet.get(trait, without), known.get(trait, without)
        if value not in (without, expected):
            return f"unet: got {trait}={value!r}, which asks for inputs that are not known here; expected {expected!r}."
        if value != expected:
            return f"unet: got {trait}={value!r}, expected {expected!r}: this is a model of another family."
    if unet.get("in_channels", 4) != latent_channels or unet.get("out_channels", 4) != latent_channels:
        return (
            f"unet: got {unet.get('in_channels', 4)} channels in and {unet.get('out_channels', 4)} out, "
            f"expected the VAE's {latent_channels} both: give a text-to-image checkpoint, not one for inpainting."
        )
    across = unet.get("cross_attention_dim", 1280)
    if set(across if isinstance(across, list | tuple) else [across]) != {width}:
        return f"unet: got cross_attention_dim={across}, expected the text encoder's width {width}: not of one model."
    return None


def micro_batch(network_config: Mapping[str, Any], tile: Size, device: str = "cpu") -> int:
    """Samples that go through a block at a time."""
    one = tile.height * tile.width * network_config["block_out_channels"][0]
    if device == "cpu":
        return on_cpu(one)
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
