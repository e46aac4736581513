"""T5 as a text encoder: states of padded prompts, whose padding is attended to like any token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.families.encoders import Encoders
from stages.families.text import say_truncated, tokenize
from stages.memory.units import Blocks
from stages.models.locate import CheckpointError
from stages.models.tokenizers import read_tokenizer

T5 = Blocks(classes=frozenset({"T5Block", "T5LayerSelfAttention", "T5LayerFF"}))


def encode_t5(encoders: Encoders, name: str, texts: Sequence[tuple[str, ...]], length: int) -> Tensor:
    """``[K, R, length, D]`` float32 of R rows of K texts each, a row at a time.

    Args:
        name: of the text encoder; ``text_encoder_3`` has ``tokenizer_3``.
        length: tokens that each text is padded and cut to.
    """
    tokenizer = t5_tokenizer(encoders.checkpoint.folder / name.replace("text_encoder", "tokenizer"))
    tokenizer.model_max_length = length
    known = {text: tokenize(tokenizer, text) for row in texts for text in row}
    say_truncated(encoders, tokenizer, known)
    del tokenizer  # it takes fifty megabytes, which the encoder needs
    found = []
    with encoders.open(name) as streamer:
        network: Any = streamer.model
        for row in texts:
            ids = torch.cat([known[text].ids for text in row]).to(encoders.device)
            found.append(network(ids)[0].float().cpu())
            encoders.advance(len(row))
    return torch.stack(found, dim=1)


def t5_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint's ``folder``.

    Raises:
        CheckpointError: there is no ``tokenizer.json`` in it, or none that can be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json in it. Make it once (it takes sentencepiece): python -c "
            f'"from transformers import AutoTokenizer as T; T.from_pretrained({str(folder)!r})'
            f'.save_pretrained({str(folder)!r})"'
        )
    return read_tokenizer("T5Tokenizer", folder)


def t5_call(network_config: Mapping[str, Any], texts: int, length: int) -> tuple[Callable[[Any], Any], int]:
    """What ``encode_t5`` does with rows of so many texts, for ``Family.text_call``."""
    return lambda network: network(torch.zeros((texts, length), dtype=torch.long, device="meta")), texts
