"""Stable Diffusion 1.x and 2.x: prompt to embeddings, and the UNet as the denoiser of a canvas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch

_CLIP_LAYERS = re.compile(r"layers\.\d+$")


class Tokens(NamedTuple):
    """``ids [1, S]``, their attention mask, and what was cut off a prompt that is too long ('' if nothing)."""

    ids: Tensor
    mask: Tensor
    truncated: str


def tokenize(tokenizer: Any, prompt: str) -> Tokens:
    """As diffusers' ``encode_prompt``: padded and cut to the tokenizer's ``model_max_length``."""
    length = tokenizer.model_max_length
    kept = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    whole = tokenizer(prompt, padding="longest", return_tensors="pt").input_ids
    cut = "" if whole.shape[-1] <= length else tokenizer.decode(whole[0, length - 1 : -1])
    return Tokens(kept.input_ids, kept.attention_mask, cut)


def unknown_words(prompt: str, tokenizer_folder: Path) -> list[str]:
    """Words of ``prompt`` that a model with a closed vocabulary (``known_words.json``) was not trained on."""
    file = tokenizer_folder / "known_words.json"
    if not file.is_file():
        return []
    known = set(json.loads(file.read_text(encoding="utf-8")))
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in known]


def encode(
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
    if clip_skip is None:
        return text_encoder(ids, attention_mask=attended)[0]
    output = text_encoder(ids, attention_mask=attended, output_hidden_states=True)
    inner: Any = getattr(text_encoder, "text_model", text_encoder)
    skipped = inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)][: len(prompts)])
    return torch.cat([skipped, output[0][len(prompts) :]])


GPU_TILES = 2  # 64x64 tiles of Stable Diffusion that keep a large GPU busy: more of them are hardly faster


def micro_batch(unet_config: dict[str, Any], latent_height: int, latent_width: int, device: str = "cpu") -> int:
    """Samples that go through a block at a time: whole pairs, of about one 64x64 tile of Stable Diffusion on a CPU.

    It depends on the model, the tile and the kind of device only, never on the budget: the same samples meet the same
    kernels, and the picture is the same at every budget.
    """
    one = latent_height * latent_width * unet_config["block_out_channels"][0]
    if device.startswith("cuda"):
        return 2 * max(1, min(32, GPU_TILES * 64 * 64 * 320 // one))
    return 2 * max(1, min(8, 64 * 64 * 320 // one))


class UNetDenoiser:
    """Predicts for tile batches.

    Args:
        unet: stock ``UNet2DConditionModel`` (weights may be streamed).
        prompt_embeds, negative_prompt_embeds: ``[R, S, D]``, one row a region.
        dtype, device: of the computation.
        run: how ``call(*inputs)`` is run, whose result is valid until the next call (``CudaStreamer.graphed``).
    """

    def __init__(
        self,
        unet: nn.Module,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        channels_last: bool = True,
        run: Callable[..., Tensor] = lambda call, *inputs: call(*inputs),
    ) -> None:
        self.unet, self.dtype, self.device, self._run = unet, dtype, device, run
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._positive = prompt_embeds.to(device, dtype)
        self._negative = negative_prompt_embeds.to(device, dtype)

    def __call__(self, batch: TileBatch, timestep: Tensor) -> Tensor:
        """``[N, C, h, w]`` float32 predictions (noise or velocity, as the model was trained)."""
        samples = batch.samples.to(self.device, self.dtype).contiguous(memory_format=self._format)
        embeds = torch.stack(self._rows(batch.prompt_rows, batch.unconditional))
        predicted = self._run(self._predict, samples, timestep.to(self.device), embeds)
        return predicted.float().to(batch.samples.device)

    def _predict(self, samples: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        return self.unet(samples, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    def _rows(self, rows: Sequence[int], unconditional: Sequence[bool]) -> list[Tensor]:
        return [(self._negative if u else self._positive)[row] for row, u in zip(rows, unconditional, strict=True)]
