"""Qwen3 as a text encoder: states between its layers of a prompt in the words of its chat template.

No word is made: the stock model has no head here, and layers behind the last state that is asked for are neither read
nor run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.families.encoders import Encoders
from stages.families.text import Tokens, say_truncated
from stages.memory.units import Blocks
from stages.models.locate import CheckpointError
from stages.models.tokenizers import read_tokenizer

TOKENS = 512  # that a prompt with its template is padded and cut to: the default of the stock pipelines
QWEN3 = Blocks(classes=frozenset({"Qwen3DecoderLayer", "Qwen3Attention", "Qwen3MLP"}))
_VOCABULARY = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def encode_qwen3(
    encoders: Encoders, texts: Iterable[str], layers: Sequence[int], *, thinking: bool, padded: bool
) -> dict[str, Tensor]:
    """``{text: [S, len(layers) * D]}`` float32 of each of ``texts`` once: a token's states side by side.

    Args:
        layers: after so many of them, as in ``hidden_states``.
        thinking: whether the template asks for it.
        padded: S is ``TOKENS``, padding has states too; else S are the tokens that there are, which in a causal model
            know nothing of padding.
    """
    tokenizer = qwen3_tokenizer(encoders.checkpoint.folder / "tokenizer")
    known = {text: _tokens(tokenizer, text, thinking) for text in texts}
    say_truncated(encoders, tokenizer, known)
    del tokenizer  # a hundred megabytes, which the encoder needs
    encoders.start(len(known))
    found = {}
    with encoders.open("text_encoder") as streamer:
        for text, (ids, mask, _) in known.items():
            if not padded:
                ids, mask = ids[mask.bool()][None], mask[mask.bool()][None]
            found[text] = _states(streamer.model, ids.to(encoders.device), mask.to(encoders.device), layers)
            found[text] = found[text][0].float().cpu()
            encoders.advance(1)
    return found


def qwen3_call(layers: Sequence[int], tokens: int = TOKENS) -> tuple[Callable[[Any], Any], int]:
    """What ``encode_qwen3`` does with a text of so many tokens, for ``Family.text_call``."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    mask = torch.empty((1, 1, tokens, tokens), dtype=torch.bool, device="meta")
    return lambda network: _states(network, ids, mask, layers), 1


def qwen3_unused(network_config: Mapping[str, Any], layers: Sequence[int]) -> tuple[str, ...]:
    """Layers that no state of ``layers`` passes, for ``Family.unused``."""
    return tuple(f"layers.{index}" for index in range(max(layers), network_config["num_hidden_layers"]))


def _states(network: Any, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> Tensor:
    """``[N, S, len(layers) * D]``: state 0 is what goes into the first layer.

    Taken from the layers themselves: what transformers' ``output_hidden_states`` makes of a list of them hangs on its
    release.
    """
    found: dict[int, Tensor] = {}

    def keep(state: int, _: Any, __: Any, output: Any) -> None:
        found[state] = output[0] if isinstance(output, tuple) else output

    hooks = [network.layers[state - 1].register_forward_hook(partial(keep, state)) for state in layers]
    try:
        network(ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([found[state] for state in layers], dim=-1)


def qwen3_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's ``folder``, padding to ``TOKENS``.

    Raises:
        CheckpointError: no vocabulary or no chat template in it, or none that can be read.
    """
    if not any(all((folder / file).is_file() for file in files) for files in _VOCABULARY):
        raise CheckpointError(
            f"{folder}: no vocabulary in it, expected tokenizer.json, or vocab.json and merges.txt. Download it again."
        )
    tokenizer = read_tokenizer("Qwen2Tokenizer", folder)
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{folder}: no chat template in it, expected chat_template.jinja or one in tokenizer_config.json. "
            "Download it again."
        )
    tokenizer.model_max_length = TOKENS
    return tokenizer


def _tokens(tokenizer: Any, text: str, thinking: bool) -> Tokens:
    """Of ``text`` as what a user says; what is cut off is of the text alone."""
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    kept = tokenizer(said, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    room = TOKENS - len(tokenizer(said.partition(text)[0]).input_ids) if text else TOKENS
    return Tokens(kept.input_ids, kept.attention_mask, tokenizer.decode(tokenizer(text).input_ids[max(0, room) :]))
