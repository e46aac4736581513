"""CLIP text encoders in twos, as SDXL and Stable Diffusion 3 have them: states side by side, and pooled vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.families.encoders import Encoders
from stages.families.text import say_truncated, tokenize
from stages.memory.units import Blocks

CLIP = Blocks(classes=frozenset({"CLIPEncoderLayer"}))


class Encoded(NamedTuple):
    """Of R (prompt, negative prompt) pairs, float32: ``states [2, R, S, D]``, the encoders' side by side, and the
    ``pooled [2, R, P]`` of each encoder that has a projection. Index 0 are the prompts, 1 the negatives."""

    states: Tensor
    pooled: list[Tensor]


def encode_clips(
    encoders: Encoders, names: Mapping[str, str], texts: Sequence[tuple[str, str]], clip_skip: int | None
) -> Encoded:
    """States of the last layer but one, as diffusers' ``encode_prompt`` takes them.

    Args:
        names: text encoder -> its tokenizer, opened one after the other.
        texts: (prompt, negative prompt) pairs, encoded a pair at a time.
        clip_skip: so many layers earlier, for the prompts; negatives always come from the last layer but one.
    """
    states, pooled = [], []
    for index, (name, tokenizer_name) in enumerate(names.items()):
        tokenizer = encoders.checkpoint.tokenizer(tokenizer_name)
        known = {text: tokenize(tokenizer, text) for row in texts for text in row}
        if index == 0:
            say_truncated(encoders, tokenizer, known)
        with encoders.open(name) as streamer:
            network: Any = streamer.model
            rows, vectors = [], []
            for row in texts:
                ids = torch.cat([known[text].ids for text in row]).to(encoders.device)
                output = network(ids, output_hidden_states=True)
                prompt, negative = output.hidden_states[-2 - (clip_skip or 0)][0], output.hidden_states[-2][1]
                rows.append(torch.stack([prompt, negative]).float().cpu())
                if output[0].dim() == 2:
                    vectors.append(output[0].float().cpu())
                encoders.advance(2)
        states.append(torch.stack(rows, dim=1))
        pooled += [torch.stack(vectors, dim=1)] if vectors else []
    return Encoded(torch.cat(states, dim=-1), pooled)


def clip_call(network_config: Mapping[str, Any]) -> tuple[Callable[[Any], Any], int]:
    """What ``encode_clips`` does with an encoder, for ``Family.text_call``."""
    ids = (2, network_config.get("max_position_embeddings", 77))
    return lambda network: network(torch.zeros(ids, dtype=torch.long, device="meta"), output_hidden_states=True), 2
