"""CLIP text encoders in twos, as SDXL and Stable Diffusion 3 have them: states side by side, and pooled vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from stages.families import inversion
from stages.families.encoders import Encoders
from stages.families.text import say_truncated, tokenize
from stages.families.weighting import Weighting, understood
from stages.memory.units import Blocks

CLIP = Blocks(classes=frozenset({"CLIPEncoderLayer"}))


class Encoded(NamedTuple):
    """Of R (prompt, negative prompt) pairs, float32: ``states [2, R, S, D]``, the encoders' side by side, and the
    ``pooled [2, R, P]`` of each encoder that has a projection. Index 0 are the prompts, 1 the negatives."""

    states: Tensor
    pooled: list[Tensor]


def encode_clips(
    encoders: Encoders, names: Mapping[str, str], texts: Sequence[tuple[str, str]], config: DictConfig
) -> Encoded:
    """States of the last layer but one, as diffusers' ``encode_prompt`` takes them.

    Args:
        names: text encoder -> its tokenizer, opened one after the other.
        texts: (prompt, negative prompt) pairs, encoded a pair at a time.
        config: with a ``clip_skip`` so many layers earlier, for the prompts; negatives always come from the last layer
            but one.
    """
    states, pooled, clip_skip = [], [], config.text_encode.clip_skip or 0
    for index, (name, tokenizer_name) in enumerate(names.items()):
        tokenizer = encoders.checkpoint.tokenizer(tokenizer_name)
        own = inversion.joined(tokenizer, texts, config)
        prompts = understood(own, tokenizer, config)
        known = {text: tokenize(tokenizer, prompt.text) for text, prompt in prompts.items()}
        if index == 0:
            say_truncated(encoders, tokenizer, {text: known[text] for text in known if prompts[text].parts is None})
        with encoders.open(name) as streamer:
            network: Any = streamer.model
            inversion.place(network, name, tokenizer, config)
            rows, vectors = [], []
            ways = [partial(_states_of, network, -2 - clip_skip), partial(_states_of, network, -2)]
            weighting = Weighting(prompts, ways, tokenizer, encoders)
            for row in own:
                ids = torch.cat([known[text].ids for text in row]).to(encoders.device)
                output = network(ids, output_hidden_states=True)
                prompt, negative = output.hidden_states[-2 - clip_skip][0], output.hidden_states[-2][1]
                rows.append(weighting.applied(row, torch.stack([prompt, negative]).float().cpu()))
                if output[0].dim() == 2:
                    vectors.append(output[0].float().cpu())
                encoders.advance(2)
            rows = weighting.filled(rows)
        states.append(torch.stack([torch.stack(row) for row in rows], dim=1))
        pooled += [torch.stack(vectors, dim=1)] if vectors else []
    if len({one.shape[2] for one in states}) > 1:  # tokenizers that are not of one kind
        shortest = min(one.shape[2] for one in states)
        states = [one[:, :, :shortest] for one in states]
    return Encoded(torch.cat(states, dim=-1), pooled)


def _states_of(network: Any, layer: int, ids: Tensor, mask: Tensor | None) -> Tensor:
    return network(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]


def clip_call(network_config: Mapping[str, Any]) -> tuple[Callable[[Any], Any], int]:
    """What ``encode_clips`` does with an encoder, for ``Family.text_call``."""
    ids = (2, network_config.get("max_position_embeddings", 77))
    return lambda network: network(torch.zeros(ids, dtype=torch.long, device="meta"), output_hidden_states=True), 2
