"""SDXL: two CLIPs, a UNet that is told where its crop comes from, a VAE with four channels.

Base, Turbo and few-step checkpoints (Lightning, Hyper) differ in their schedulers and in how they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.families.autoencoder import VAE, refuse_vae
from stages.families.base import Denoiser, Embeds, Family, example_tiles
from stages.families.clip import CLIP, clip_call, encode_clips
from stages.families.encoders import Encoders
from stages.families.schedules import Schedule
from stages.families.unet import UNET, UNetDenoiser, micro_batch, refuse_unet
from stages.files import read_json
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class SDXLDenoiser(UNetDenoiser):
    """Its crops are told apart: ``pooled_prompt_embeds [R, P]`` and six numbers a sample join the time embedding."""

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        return {
            **super().inputs(batch, timestep),
            "text_embeds": self.rows(batch, "pooled_prompt_embeds"),
            "time_ids": self.time_ids(batch),
        }

    def time_ids(self, batch: TileBatch) -> Tensor:
        """``[N, 6]`` float32, in pixels: original height and width, top and left of the crop, target height and width.

        The model was trained on crops of pictures: the original is the canvas (or the sub-canvas of dilated sampling),
        the crop lies where this very tile lies on it, and the target has the size of the tile. A tile that covers the
        canvas is told what stock pipelines say. In bf16 numbers above 256 would be rounded.
        """
        factor, found = self.config.model.vae_scale_factor, []
        for tile, picture in zip(batch.tiles, batch.pictures or (None,) * len(batch.tiles), strict=True):
            whole = picture.size if picture else self.canvas
            place = tile.within(picture) if picture else tile
            found.append((*whole, place.top, place.left, *tile.size))
        return torch.tensor(found, dtype=torch.float32, device=self.device) * factor

    def predict(self, **inputs: Tensor) -> Tensor:
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")}
        return self.network(**inputs, added_cond_kwargs=added, return_dict=False)[0]


class StableDiffusionXL(Family):
    """As diffusers' ``StableDiffusionXLPipeline``."""

    name: ClassVar[str] = "sdxl"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        encoders.start(2 * len(texts) * len(ENCODERS))
        states, (pooled,) = encode_clips(encoders, ENCODERS, texts, config)
        if zeros_for_empty(encoders.checkpoint):
            empty = [not negative for _, negative in texts]
            states[1, empty], pooled[1, empty] = 0, 0
        return dict(zip(self.facts.embeds, (*states, *pooled), strict=True))

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        return clip_call(network_config)

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        if "vae" in components and (why := refuse_vae(checkpoint.config("vae"))):
            return why
        if not {"unet", "vae", *ENCODERS} <= set(components):
            return None  # a stage opens a part; all of it was looked at before
        unet, encoders = checkpoint.config("unet"), [checkpoint.config(name) for name in ENCODERS]
        projected = encoders[1].get("projection_dim", 512) + 6 * (unet.get("addition_time_embed_dim") or 0)
        if unet.get("projection_class_embeddings_input_dim") != projected:
            return (
                f"unet: got projection_class_embeddings_input_dim={unet.get('projection_class_embeddings_input_dim')}, "
                f"expected {projected}, a pooled vector and six numbers: the refiner and others are not known here."
            )
        return refuse_unet(
            unet,
            {"addition_embed_type": "text_time"},
            width=sum(encoder["hidden_size"] for encoder in encoders),
            latent_channels=checkpoint.config("vae").get("latent_channels", 4),
        )

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return SDXLDenoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        states = torch.empty((1, 77, network_config["cross_attention_dim"]), device="meta")
        width = network_config["projection_class_embeddings_input_dim"] - 6 * network_config["addition_time_embed_dim"]
        pooled = torch.empty((1, width), device="meta")
        embeds = dict(zip(self.facts.embeds, (states, states, pooled, pooled), strict=True))
        return example_tiles(tile, samples, network_config["in_channels"]), embeds

    def guidance(self, checkpoint: Checkpoint) -> str:
        return "embedded" if checkpoint.config("unet").get("time_cond_proj_dim") else "cfg"

    def blocks(self, component: str) -> Blocks:
        return {"unet": UNET, "vae": VAE}.get(component, CLIP)

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        return micro_batch(network_config, tile, device)

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return Schedule(scheduler)


FAMILY = StableDiffusionXL()


def zeros_for_empty(checkpoint: Checkpoint) -> bool:
    """Whether an empty negative prompt is zeros (the default), or what the encoders make of the empty text."""
    index = read_json(checkpoint.folder / "model_index.json")
    return bool(index.get("force_zeros_for_empty_prompt", True)) if isinstance(index, dict) else True
