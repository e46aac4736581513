"""Stable Diffusion 3 and 3.5: two CLIPs and T5, a transformer that matches flows, a VAE with sixteen channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.families.autoencoder import VAE, refuse_vae
from stages.families.base import Denoiser, Embeds, Family, example_tiles, on_cpu
from stages.families.clip import CLIP, clip_call, encode_clips
from stages.families.encoders import Encoders
from stages.families.flow import FlowSchedule
from stages.families.schedules import Schedule
from stages.families.t5 import T5, encode_t5, t5_call, t5_tokenizer
from stages.families.weighting import words
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
T5_NAME, T5_TOKENS, TOKENS = "text_encoder_3", 256, 77 + 256
GPU_TOKENS = 16384  # image tokens that keep a large GPU busy

TRANSFORMER = Blocks(
    classes=frozenset(
        {
            *("JointTransformerBlock", "Attention", "FeedForward", "AdaLayerNormZero", "SD35AdaLayerNormZeroX"),
            *("AdaLayerNormContinuous", "PatchEmbed", "SD3SingleTransformerBlock"),
        }
    )
)


class SD3Denoiser(Denoiser):
    """Predicts the flow; ``prompt_embeds [R, 333, D]``, ``pooled_prompt_embeds [R, P]``."""

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        return {
            "hidden_states": batch.samples.to(self.device, self.dtype),
            "timestep": timestep.to(self.device).expand(len(batch.samples)).contiguous(),
            "encoder_hidden_states": self.rows(batch, "prompt_embeds"),
            "pooled_projections": self.rows(batch, "pooled_prompt_embeds"),
        }

    def predict(self, **inputs: Tensor) -> Tensor:
        return self.network(**inputs, return_dict=False)[0]


class StableDiffusion3(Family):
    """As diffusers' ``StableDiffusion3Pipeline``; its guidance by skipped layers is not here.

    Positions are the middle of a table, as for a picture of the tile's size: a tile does not know where it lies.
    """

    name: ClassVar[str] = "sd3"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        has_t5 = T5_NAME in self.encoders(encoders.checkpoint)
        encoders.start(2 * len(texts) * (2 + has_t5))
        states, pooled = encode_clips(encoders, CLIPS, texts, config)
        width = encoders.checkpoint.config("transformer")["joint_attention_dim"]
        if has_t5:
            more = encode_t5(encoders, T5_NAME, words(texts, config), T5_TOKENS)
        else:
            more = torch.zeros((2, len(texts), T5_TOKENS, width))
        states = torch.cat([nn.functional.pad(states, (0, width - states.shape[-1])), more], dim=-2)
        return dict(zip(self.facts.embeds, (*states, *torch.cat(pooled, dim=-1)), strict=True))

    def encoders(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """T5 may be missing: it is most of the bytes, and its states are zeros then."""
        return tuple(name for name in super().encoders(checkpoint) if name != T5_NAME or checkpoint.has_config(T5_NAME))

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        return t5_call(network_config, 2, T5_TOKENS) if component == T5_NAME else clip_call(network_config)

    def tokenizer(self, component: str, checkpoint: Checkpoint) -> Any:
        if component == T5_NAME:
            return t5_tokenizer(checkpoint.folder / "tokenizer_3")
        return super().tokenizer(component, checkpoint)

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        if "vae" in components and (why := refuse_vae(checkpoint.config("vae"))):
            return why
        if not {"transformer", "vae", *CLIPS} <= set(components):
            return None  # a stage opens a part; all of it was looked at before
        config, channels = checkpoint.config("transformer"), checkpoint.config("vae").get("latent_channels", 4)
        if config.get("_class_name") != "SD3Transformer2DModel":
            return f"transformer: got a {config.get('_class_name')}, expected a SD3Transformer2DModel."
        clips = [checkpoint.config(name) for name in CLIPS]
        expected = {
            "patch_size": self.facts.patch,
            "in_channels": channels,
            "out_channels": channels,
            "pooled_projection_dim": sum(clip.get("projection_dim", 512) for clip in clips),
        }
        if T5_NAME in self.encoders(checkpoint):
            expected["joint_attention_dim"] = checkpoint.config(T5_NAME)["d_model"]
        for trait, value in expected.items():
            if config.get(trait) != value:
                return f"transformer: got {trait}={config.get(trait)}, expected {value}, as the other components say."
        return None

    def largest_tile(self, network_config: Mapping[str, Any]) -> int:
        return network_config["pos_embed_max_size"] * network_config["patch_size"]

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return SD3Denoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        states = torch.empty((1, TOKENS, network_config["joint_attention_dim"]), device="meta")
        pooled = torch.empty((1, network_config["pooled_projection_dim"]), device="meta")
        embeds = dict(zip(self.facts.embeds, (states, states, pooled, pooled), strict=True))
        return example_tiles(tile, samples, network_config["in_channels"]), embeds

    def blocks(self, component: str) -> Blocks:
        return {"transformer": TRANSFORMER, "vae": VAE, T5_NAME: T5}.get(component, CLIP)

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        tokens = self._tokens(tile)
        if device == "cpu":
            return on_cpu(tokens * network_config["num_attention_heads"] * network_config["attention_head_dim"])
        return 2 * max(1, min(32, GPU_TOKENS // tokens // 2))

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return FlowSchedule(scheduler, self._tokens(tile), linear=False)

    def _tokens(self, tile: Size) -> int:
        return (tile.height // self.facts.patch) * (tile.width // self.facts.patch)


FAMILY = StableDiffusion3()
