"""Textual inversion: learned words in a CLIP tokenizer, their rows beside the table of its text encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.config import ConfigError
from stages.memory.tensors import read_header, read_tensor
from stages.techniques.inversion_file import KEY, inversions


def joined(tokenizer: Any, texts: Sequence[tuple[str, str]], config: DictConfig) -> Sequence[tuple[str, str]]:
    """The (prompt, negative prompt) pairs with every token of each learned word, which ``tokenizer`` then knows; as
    diffusers' ``maybe_convert_prompt``.

    Raises:
        ConfigError: a word that the tokenizer has already: it would keep its number, and others be taken for learned.
    """
    given = inversions(config)
    if not given:
        return texts
    words = tokenizer.get_vocab()
    for one in given:
        if taken := [token for token in one.tokens if token in words]:
            raise ConfigError(KEY, str(one.path), f"a word that the tokenizer has not; {taken[0]} is one", "Rename it.")
    tokenizer.add_tokens([token for one in given for token in one.tokens])
    written = {one.name: " ".join(one.tokens) for one in given}
    names = "|".join(map(re.escape, sorted(written, key=len, reverse=True)))
    return [tuple(re.sub(names, lambda found: written[found[0]], text) for text in row) for row in texts]  # type: ignore[misc]


def place(network: nn.Module, component: str, tokenizer: Any, config: DictConfig) -> None:
    """Give an open text encoder the rows of the learned words: its table stays as it is, and in its file."""
    given = [one for one in inversions(config) if component in one.tensors]
    if not given:
        return
    first = min(tokenizer.convert_tokens_to_ids([token for one in given for token in one.tokens]))
    tensors = [read_tensor(read_header(one.path)[one.tensors[component]]) for one in given]
    rows = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
    table: Any = network.get_input_embeddings()  # type: ignore[operator]
    held: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.append(arguments[0])
        return (arguments[0].clamp(max=first - 1),)

    def after(_: nn.Module, arguments: tuple[Tensor, ...], found: Tensor) -> Tensor:
        ids = held.pop()
        learned = ids >= first
        found = found.clone()
        found[learned] = rows.to(found)[ids[learned] - first]
        return found

    table.register_forward_pre_hook(before)
    table.register_forward_hook(after)
