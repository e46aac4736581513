"""Stable Diffusion 1.x and 2.x: one CLIP, a UNet, a VAE with four channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.families import inversion
from stages.families.autoencoder import VAE, refuse_vae
from stages.families.base import Denoiser, Embeds, Family, example_tiles
from stages.families.clip import CLIP
from stages.families.encoders import Encoders
from stages.families.schedules import Schedule
from stages.families.text import Tokens, say_truncated, tokenize, unknown_words
from stages.families.unet import UNET, UNetDenoiser, micro_batch, refuse_unet
from stages.families.weighting import Weighting, understood
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size


class StableDiffusion(Family):
    """As diffusers' ``StableDiffusionPipeline``."""

    name: ClassVar[str] = "sd"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        tokenizer = encoders.checkpoint.tokenizer()
        texts = inversion.joined(tokenizer, texts, config)
        prompts = understood(texts, tokenizer, config)
        known = {text: tokenize(tokenizer, prompt.text) for text, prompt in prompts.items()}
        say_truncated(encoders, tokenizer, {text: known[text] for text in known if prompts[text].parts is None})
        if unknown := unknown_words(
            " ".join(prompt.text for prompt in prompts.values()), encoders.checkpoint.folder / "tokenizer"
        ):
            encoders.note(
                f"warning: the {config.model.name} model does not know: {', '.join(unknown)}. It was trained on a few "
                "hundred words; for any prompt use a real checkpoint: model=sd15 model.path=FOLDER_OR_FILE_OR_HUB_ID"
            )
        encoders.start(2 * len(texts))
        found, skip = [], config.text_encode.clip_skip
        with encoders.open("text_encoder") as streamer:
            network: Any = streamer.model
            inversion.place(network, "text_encoder", tokenizer, config)
            masked = bool(getattr(network.config, "use_attention_mask", False))
            ways = [partial(states_of, network, clip_skip=skip), partial(states_of, network, clip_skip=None)]
            weighting = Weighting(prompts, ways, tokenizer, encoders, masked=masked)
            for prompt, negative in texts:  # a pair at a time: regions by the dozen take no more memory than one
                pair = [known[prompt]], [known[negative]]
                states = hidden_states(network, *pair, skip, encoders.device)
                found.append(weighting.applied((prompt, negative), states.float().cpu()))
                encoders.advance(2)
            found = weighting.filled(found)
        embeds = torch.stack([torch.stack(row) for row in found], dim=1)
        return {"prompt_embeds": embeds[0].contiguous(), "negative_prompt_embeds": embeds[1].contiguous()}

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        ids = (2, network_config.get("max_position_embeddings", 77))
        return lambda network: network(torch.zeros(ids, dtype=torch.long, device="meta")), 2

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        if "vae" in components and (why := refuse_vae(checkpoint.config("vae"))):
            return why
        if not {"unet", "vae", "text_encoder"} <= set(components):
            return None  # a stage opens a part; all of it was looked at before
        vae, text = checkpoint.config("vae"), checkpoint.config("text_encoder")
        return refuse_unet(
            checkpoint.config("unet"), {}, width=text["hidden_size"], latent_channels=vae.get("latent_channels", 4)
        )

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return UNetDenoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        embeds = torch.empty((1, 77, network_config["cross_attention_dim"]), device="meta")
        batch = example_tiles(tile, samples, network_config["in_channels"])
        return batch, {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}

    def guidance(self, checkpoint: Checkpoint) -> str:
        return "embedded" if checkpoint.config("unet").get("time_cond_proj_dim") else "cfg"

    def blocks(self, component: str) -> Blocks:
        return {"unet": UNET, "vae": VAE, "text_encoder": CLIP}[component]

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        return micro_batch(network_config, tile, device)

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return Schedule(scheduler)


FAMILY = StableDiffusion()


def hidden_states(
    text_encoder: nn.Module,
    prompts: Sequence[Tokens],
    negatives: Sequence[Tokens],
    clip_skip: int | None,
    device: str = "cpu",
) -> Tensor:
    """Hidden states ``[P + N, S, D]`` of the prompts and the negatives, in one pass.

    As diffusers' ``encode_prompt``: ``clip_skip`` is for the prompts, negatives always come from the last layer.
    """
    config: Any = text_encoder.config
    texts = (*prompts, *negatives)
    ids, mask = (torch.cat([getattr(tokens, name) for tokens in texts]).to(device) for name in ("ids", "mask"))
    attended = mask if getattr(config, "use_attention_mask", False) else None
    return states_of(text_encoder, ids, attended, clip_skip=clip_skip, skipping=len(prompts))


def states_of(
    text_encoder: nn.Module, ids: Tensor, mask: Tensor | None, *, clip_skip: int | None, skipping: int | None = None
) -> Tensor:
    """Hidden states ``[N, S, D]`` of ``ids [N, S]``, the first ``skipping`` (None: all) so many layers earlier."""
    if clip_skip is None:
        return text_encoder(ids, attention_mask=mask)[0]
    output = text_encoder(ids, attention_mask=mask, output_hidden_states=True)
    inner: Any = getattr(text_encoder, "text_model", text_encoder)
    skipping = len(ids) if skipping is None else skipping
    skipped = inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)][:skipping])
    return torch.cat([skipped, output[0][skipping:]])
