"""Z-Image and Z-Image-Turbo: Qwen3 and a transformer that matches flows over text and image in one sequence, a VAE with
sixteen channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch, View
from stages.families.autoencoder import VAE, refuse_vae
from stages.families.base import Denoiser, Embeds, Family, example_tiles, on_cpu
from stages.families.encoders import Encoders
from stages.families.flow import FlowSchedule, tokens_at_a_time
from stages.families.qwen3 import QWEN3, TOKENS, encode_qwen3, qwen3_call, qwen3_tokenizer, qwen3_unused
from stages.families.schedules import Schedule
from stages.families.weighting import say_unweighted
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size

WHOLE = 32  # captions and images are padded to so many tokens, with a learned one
TRANSFORMER = Blocks(
    classes=frozenset({"ZImageTransformerBlock", "Attention", "FeedForward", "FinalLayer", "TimestepEmbedder"})
)


def padded(lengths: Any) -> Any:
    """Numbers of tokens, or a tensor of them, with padding."""
    return -(-lengths // WHOLE) * WHOLE


class ZImageDenoiser(Denoiser):
    """Predicts the flow; ``prompt_embeds [R, S, D]``, of which ``prompt_lengths [R]`` tokens are there.

    The stock model takes captions of any lengths and pads them as the longest of its call asks for. Here all are given
    as long as the longest of the run, and what hangs on their own lengths (padding, positions, what is attended to) is
    handed to its blocks, a row a sample: a sample meets the same kernels in any group.

    Positions are those of a picture of the tile's size: a tile does not know where it lies.
    """

    def __init__(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> None:
        super().__init__(network, embeds, config, **options)
        found: Any = network
        found.rope_embedder.freqs_cis = None  # made at the first call, on its device
        lengths = [padded(embeds[name]) for name in ("prompt_lengths", "negative_prompt_lengths")]
        of_passes = {False: lengths[0], True: torch.cat(lengths)}  # guided views are in groups of their own
        self._longest = {guided: int(each.max()) for guided, each in of_passes.items()}
        self._equal = {guided: bool((each == each[0]).all()) for guided, each in of_passes.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.int64 if name.endswith("lengths") else self.dtype

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        guided, count = any(batch.unconditional), len(batch.samples)
        longest, lengths = self._longest[guided], self.rows(batch, "prompt_lengths")
        found = {
            "sample": batch.samples.to(self.device, self.dtype),
            "timestep": (1000 - timestep.to(self.device, torch.float32).expand(count)) / 1000,
            "encoder_hidden_states": self.rows(batch, "prompt_embeds")[:, :longest].contiguous(),
            "lengths": lengths,
        }
        if not self._equal[guided]:
            found["encoder_attention_mask"] = torch.arange(longest, device=self.device) < padded(lengths)[:, None]
        return found

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        lengths: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        network: Any = self.network
        count, longest = encoder_hidden_states.shape[:2]
        padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]

        def by_sample(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].unflatten(0, (count, -1)),)

        def end_to_end(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.flatten(0, 1)

        def with_padding(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return torch.where(padding[..., None], network.cap_pad_token, output).flatten(0, 1)

        def instead(mask: Tensor, freqs: Tensor | None, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, _, stock, *more = args
            return tokens, mask, stock if freqs is None else freqs, *more

        with ExitStack() as hooks:
            for embedder, after in ((network.all_x_embedder["2-1"], end_to_end), (network.cap_embedder, with_padding)):
                hooks.enter_context(embedder.register_forward_pre_hook(by_sample))
                hooks.enter_context(embedder.register_forward_hook(after))
            if encoder_attention_mask is not None:
                freqs, image = self._positions(sample, encoder_attention_mask)
                seen = torch.cat([encoder_attention_mask.new_ones((count, image)), encoder_attention_mask], dim=1)
                parts = (
                    (network.noise_refiner, None, freqs[:, :image].contiguous()),
                    (network.context_refiner, encoder_attention_mask, None),
                    (network.layers, seen, freqs),
                )
                for layers, *given in parts:
                    for layer in layers:
                        hooks.enter_context(layer.register_forward_pre_hook(partial(instead, *given)))
            pictures = list(sample.unsqueeze(2).unbind(0))
            found = network(pictures, timestep, list(encoder_hidden_states.unbind(0)), return_dict=False)[0]
        return -torch.stack(found).squeeze(2)

    def _positions(self, sample: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """``[N, I + S, F]`` complex and I, the padded tokens of an image: it comes after the caption of its sample."""
        network: Any = self.network
        height, width = sample.shape[-2] // 2, sample.shape[-1] // 2
        count, image = height * width, padded(height * width)
        places = torch.zeros((len(mask), image + mask.shape[1], 3), dtype=torch.int64, device=mask.device)
        places[:, :count, 0] = 1 + mask.sum(dim=1, keepdim=True)
        places[:, :count, 1] = torch.arange(height, device=mask.device).repeat_interleave(width)
        places[:, :count, 2] = torch.arange(width, device=mask.device).repeat(height)
        places[:, image:, 0] = 1 + torch.arange(mask.shape[1], device=mask.device)
        return network.rope_embedder(places.flatten(0, 1)).unflatten(0, places.shape[:2]), image


class ZImage(Family):
    """As diffusers' ``ZImagePipeline`` without ``cfg_normalization`` and ``cfg_truncation``."""

    name: ClassVar[str] = "z_image"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        say_unweighted(encoders, texts, config)
        layers = self._layers(encoders.checkpoint.config("text_encoder"))
        states = encode_qwen3(encoders, [text for row in texts for text in row], layers, thinking=True, padded=False)
        longest = padded(max(len(tokens) for tokens in states.values()))
        found: dict[str, Tensor] = {}
        for name, each in zip(("prompt", "negative_prompt"), zip(*texts, strict=True), strict=True):
            rows = [states[text] for text in each]
            whole = [nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]
            found[f"{name}_embeds"] = torch.stack(whole)
            found[f"{name}_lengths"] = torch.tensor([len(row) for row in rows])
        return found

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        return qwen3_call(self._layers(network_config), longest or TOKENS)

    def tokenizer(self, component: str, checkpoint: Checkpoint) -> Any:
        return qwen3_tokenizer(checkpoint.folder / "tokenizer")

    def unused(self, component: str, network_config: Mapping[str, Any]) -> tuple[str, ...]:
        return qwen3_unused(network_config, self._layers(network_config)) if component == "text_encoder" else ()

    def _layers(self, network_config: Mapping[str, Any]) -> tuple[int]:
        """``hidden_states[-2]`` of Qwen3."""
        return (network_config["num_hidden_layers"] - 1,)

    def asks(self, views: Sequence[View], checkpoint: Checkpoint) -> list[View]:
        """Here a scale G is of ``p + G (p - n)``, which is a scale of G + 1 elsewhere: any that is not 0 guides."""
        return [view._replace(guidance_scale=1 + view.guidance_scale) for view in super().asks(views, checkpoint)]

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        if "vae" in components and (why := refuse_vae(checkpoint.config("vae"))):
            return why
        if not {"transformer", "vae", "text_encoder"} <= set(components):
            return None  # a stage opens a part; all of it was looked at before
        config, longest = checkpoint.config("transformer"), padded(TOKENS) + 2
        expected = {
            "in_channels": checkpoint.config("vae").get("latent_channels", 4),
            "cap_feat_dim": checkpoint.config("text_encoder")["hidden_size"],
            "all_patch_size": [self.facts.patch],
            "all_f_patch_size": [1],
            "siglip_feat_dim": None,
        }
        for trait, value in expected.items():
            if config.get(trait) != value:
                return f"transformer: got {trait}={config.get(trait)}, expected {value}: variants are not known here."
        if config["axes_lens"][0] < longest:
            return f"transformer: got axes_lens={config['axes_lens']}, expected {longest} places or more of the first."
        return None

    def largest_tile(self, network_config: Mapping[str, Any]) -> int:
        return min(network_config["axes_lens"][1:]) * self.facts.patch

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return ZImageDenoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        """Of the longest captions beside a shorter one."""
        tokens = longest or TOKENS
        states = torch.empty((1, padded(tokens), network_config["cap_feat_dim"]), device="meta")
        lengths = torch.tensor([tokens]), torch.tensor([1])
        embeds = dict(zip(self.facts.embeds, (states, states, *lengths), strict=True))
        return example_tiles(tile, samples, network_config["in_channels"]), embeds

    def blocks(self, component: str) -> Blocks:
        return {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": QWEN3}[component]

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        if device == "cpu":
            return on_cpu(self._tokens(tile) * network_config["dim"])
        return tokens_at_a_time(tile, device, pairs=True)

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return FlowSchedule(scheduler, self._tokens(tile), linear=True)

    def _tokens(self, tile: Size) -> int:
        return tile.height * tile.width // self.facts.patch**2


FAMILY = ZImage()
