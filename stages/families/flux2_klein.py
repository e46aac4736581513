"""FLUX.2 [klein]: Qwen3 and a transformer that matches flows, distilled or guided, over normalised patches of 32
channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch
from stages.canvas.space import Space
from stages.families.autoencoder import VAE, refuse_vae
from stages.families.base import Denoiser, Embeds, Family, example_tiles
from stages.families.encoders import Encoders
from stages.families.flow import FlowSchedule, tokens_at_a_time
from stages.families.qwen3 import QWEN3, TOKENS, encode_qwen3, qwen3_call, qwen3_tokenizer, qwen3_unused
from stages.families.schedules import Schedule
from stages.families.tokens import packed, unpacked
from stages.families.weighting import say_unweighted
from stages.files import read_json
from stages.memory.tensors import read_tensor
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size

LAYERS = (9, 18, 27)  # of Qwen3, whose states lie side by side in a token
TRANSFORMER = Blocks(
    classes=frozenset(
        {
            *("Flux2TransformerBlock", "Flux2SingleTransformerBlock", "Flux2Attention", "Flux2ParallelSelfAttention"),
            *("Flux2FeedForward", "Flux2Modulation", "AdaLayerNormContinuous"),
        }
    )
)


class Flux2KleinDenoiser(Denoiser):
    """Predicts the flow; ``prompt_embeds [R, 512, D]``, and ``negative_prompt_embeds [1, 512, D]`` if it is guided.

    Positions are those of a picture of the tile's size: a tile does not know where it lies.
    """

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        return {
            "sample": batch.samples.to(self.device, self.dtype),
            "timestep": timestep.to(self.device, self.dtype).expand(len(batch.samples)).contiguous() / 1000,
            "encoder_hidden_states": self.rows(batch, "prompt_embeds"),
        }

    def predict(self, **inputs: Tensor) -> Tensor:
        sample, text = inputs.pop("sample"), inputs["encoder_hidden_states"]
        height, width = sample.shape[-2] // 2, sample.shape[-1] // 2
        axes = (1, height, width, 1), (1, 1, 1, text.shape[1])  # time, row, column, place in the text
        image, words = (torch.cartesian_prod(*(torch.arange(n, device=sample.device) for n in axis)) for axis in axes)
        flow = self.network(hidden_states=packed(sample), img_ids=image, txt_ids=words, **inputs, return_dict=False)[0]
        return unpacked(flow, Size(height, width))


class Flux2Klein(Family):
    """As diffusers' ``Flux2KleinPipeline`` without pictures to go by. The negative prompt is "", always."""

    name: ClassVar[str] = "flux2_klein"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        say_unweighted(encoders, texts, config)
        if any(negative for _, negative in texts):
            encoders.note("warning: FLUX.2 [klein] takes no negative prompt; it is not used")
        guided = self.guidance(encoders.checkpoint) == "cfg"
        prompts = [prompt for prompt, _ in texts]
        states = encode_qwen3(encoders, [*prompts, *([""] if guided else [])], LAYERS, thinking=False, padded=True)
        found = {"prompt_embeds": torch.stack([states[prompt] for prompt in prompts])}
        return {**found, "negative_prompt_embeds": states[""][None].contiguous()} if guided else found

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        return qwen3_call(LAYERS)

    def tokenizer(self, component: str, checkpoint: Checkpoint) -> Any:
        return qwen3_tokenizer(checkpoint.folder / "tokenizer")

    def unused(self, component: str, network_config: Mapping[str, Any]) -> tuple[str, ...]:
        return qwen3_unused(network_config, LAYERS) if component == "text_encoder" else ()

    def guidance(self, checkpoint: Checkpoint) -> str:
        index = read_json(checkpoint.folder / "model_index.json")
        return "none" if isinstance(index, dict) and index.get("is_distilled") else "cfg"

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        if "vae" in components:
            vae = checkpoint.config("vae")
            if why := refuse_vae(vae, self.facts.vae):
                return why
            if list(vae.get("patch_size", (2, 2))) != [self.facts.patch] * 2:
                return f"vae: got patch_size={vae['patch_size']}, expected {[self.facts.patch] * 2}."
        if not {"transformer", "vae", "text_encoder"} <= set(components):
            return None  # a stage opens a part; all of it was looked at before
        config, text = checkpoint.config("transformer"), checkpoint.config("text_encoder")
        if text["num_hidden_layers"] <= max(LAYERS):
            return f"text_encoder: got {text['num_hidden_layers']} layers, expected more than {max(LAYERS)}."
        expected = {
            "in_channels": 4 * vae.get("latent_channels", 32),
            "out_channels": config.get("out_channels") and config.get("in_channels"),
            "joint_attention_dim": len(LAYERS) * text["hidden_size"],
            "guidance_embeds": False,
        }
        for trait, value in expected.items():
            if config.get(trait) != value:
                return f"transformer: got {trait}={config.get(trait)}, expected {value}: this is another FLUX.2."
        return None

    def space(self, checkpoint: Checkpoint) -> Space:
        """Latents are normalised in patches by statistics of the VAE: two small tensors, read by themselves."""
        patch, tensors, vae = self.facts.patch, checkpoint.tensors("vae"), checkpoint.config("vae")
        mean, variance = (
            read_tensor(tensors[f"bn.running_{name}"]).float().view(-1, patch, patch) for name in ("mean", "var")
        )
        return Space(patch=patch, mean=mean, std=torch.sqrt(variance + vae.get("batch_norm_eps", 1e-4)))

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return Flux2KleinDenoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        states = torch.empty((1, TOKENS, network_config["joint_attention_dim"]), device="meta")
        embeds = dict.fromkeys(self.facts.embeds, states)
        return example_tiles(tile, samples, network_config["in_channels"] // 4), embeds

    def blocks(self, component: str) -> Blocks:
        return {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": QWEN3}[component]

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        if device == "cpu":
            return 1  # its text alone keeps a CPU busy, and a token is nine times as wide inside a block
        return tokens_at_a_time(tile, device, pairs=True)

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return FlowSchedule(scheduler, tile.height * tile.width // 4, linear=True, shift=empirical_shift)


def empirical_shift(config: Any, tokens: int, num_inference_steps: int) -> float:
    """``compute_empirical_mu`` of the FLUX.2 pipelines: two lines over the tokens, of 10 and of 200 steps."""
    most = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return most
    slope = (most - (8.73809524e-05 * tokens + 1.89833333)) / 190.0
    return slope * num_inference_steps + (most - 200.0 * slope)


FAMILY = Flux2Klein()
