"""FLUX.1 (dev, schnell): CLIP's pooled vector and T5, a transformer that matches flows, a VAE with sixteen channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.families.autoencoder import VAE, refuse_vae
from stages.families.base import Denoiser, Embeds, Family, example_tiles
from stages.families.clip import CLIP
from stages.families.encoders import Encoders
from stages.families.flow import FlowSchedule, tokens_at_a_time
from stages.families.schedules import Schedule
from stages.families.t5 import T5, encode_t5, t5_call, t5_tokenizer
from stages.families.text import tokenize
from stages.families.tokens import packed, unpacked
from stages.families.weighting import say_unweighted
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size

TOKENS = 512  # of T5: the default of the stock pipeline
TRANSFORMER = Blocks(
    classes=frozenset(
        {
            *("FluxTransformerBlock", "FluxSingleTransformerBlock", "FluxAttention", "FeedForward"),
            *("AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous"),
        }
    )
)


class FluxDenoiser(Denoiser):
    """Predicts the flow; ``prompt_embeds [R, 512, D]``, ``pooled_prompt_embeds [R, P]``.

    Positions are those of a picture of the tile's size: a tile does not know where it lies.
    """

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        count = len(batch.samples)
        found = {
            "sample": batch.samples.to(self.device, self.dtype),
            "timestep": timestep.to(self.device, self.dtype).expand(count).contiguous() / 1000,
            "encoder_hidden_states": self.rows(batch, "prompt_embeds"),
            "pooled_projections": self.rows(batch, "pooled_prompt_embeds"),
        }
        config: Any = self.network.config
        if config.guidance_embeds:
            scales = batch.guidance_scales or (1.0,) * count
            found["guidance"] = torch.tensor(scales, dtype=torch.float32, device=self.device)
        return found

    def predict(self, **inputs: Tensor) -> Tensor:
        sample, text = inputs.pop("sample"), inputs["encoder_hidden_states"]
        height, width = sample.shape[-2] // 2, sample.shape[-1] // 2
        places = torch.zeros((height, width, 3), device=sample.device)
        places[..., 1] += torch.arange(height, device=sample.device)[:, None]
        places[..., 2] += torch.arange(width, device=sample.device)
        flow = self.network(
            hidden_states=packed(sample),
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros((text.shape[1], 3), device=sample.device),
            **inputs,
            return_dict=False,
        )[0]
        return unpacked(flow, Size(height, width))


class Flux(Family):
    """As diffusers' ``FluxPipeline``. There is no unconditional pass, and so no negative prompt."""

    name: ClassVar[str] = "flux"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        say_unweighted(encoders, texts, config)
        if any(negative for _, negative in texts):
            encoders.note("warning: FLUX.1 takes no negative prompt; it is not used")
        encoders.start(2 * len(texts))
        tokenizer, pooled = encoders.checkpoint.tokenizer(), []
        with encoders.open("text_encoder") as streamer:
            network: Any = streamer.model
            for prompt, _ in texts:
                pooled.append(network(tokenize(tokenizer, prompt).ids.to(encoders.device)).pooler_output.float().cpu())
                encoders.advance(1)
        states = encode_t5(encoders, "text_encoder_2", [(prompt,) for prompt, _ in texts], TOKENS)
        return {"prompt_embeds": states[0].contiguous(), "pooled_prompt_embeds": torch.cat(pooled)}

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        if component == "text_encoder_2":
            return t5_call(network_config, 1, TOKENS)
        ids = (1, network_config.get("max_position_embeddings", 77))
        return lambda network: network(torch.zeros(ids, dtype=torch.long, device="meta")), 1

    def tokenizer(self, component: str, checkpoint: Checkpoint) -> Any:
        if component == "text_encoder_2":
            return t5_tokenizer(checkpoint.folder / "tokenizer_2")
        return super().tokenizer(component, checkpoint)

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        if "vae" in components and (why := refuse_vae(checkpoint.config("vae"))):
            return why
        if not {"transformer", "vae", "text_encoder", "text_encoder_2"} <= set(components):
            return None  # a stage opens a part; all of it was looked at before
        config, channels = checkpoint.config("transformer"), 4 * checkpoint.config("vae").get("latent_channels", 4)
        expected = {
            "in_channels": channels,
            "joint_attention_dim": checkpoint.config("text_encoder_2")["d_model"],
            "pooled_projection_dim": checkpoint.config("text_encoder")["hidden_size"],
        }
        for trait, value in expected.items():
            if config.get(trait) != value:
                return (
                    f"transformer: got {trait}={config.get(trait)}, expected {value}, as the other components say: "
                    "inpainting, depth and other controlled variants are not known here."
                )
        return None

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return FluxDenoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        states = torch.empty((1, TOKENS, network_config["joint_attention_dim"]), device="meta")
        pooled = torch.empty((1, network_config["pooled_projection_dim"]), device="meta")
        batch = example_tiles(tile, samples, network_config["in_channels"] // 4)
        return batch, {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def guidance(self, checkpoint: Checkpoint) -> str:
        return "embedded" if checkpoint.config("transformer").get("guidance_embeds") else "none"

    def blocks(self, component: str) -> Blocks:
        return {"transformer": TRANSFORMER, "vae": VAE, "text_encoder_2": T5}.get(component, CLIP)

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        return 1 if device == "cpu" else tokens_at_a_time(tile, device)  # its text alone keeps a CPU busy

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return FlowSchedule(scheduler, tile.height * tile.width // 4, linear=True)


FAMILY = Flux()
