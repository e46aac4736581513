"""Prompts to tokens, and what closed vocabularies do not know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stages.families.encoders import Encoders


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


def say_truncated(encoders: Encoders, tokenizer: Any, known: dict[str, Tokens]) -> None:
    """Tell what of each prompt is not used."""
    for tokens in known.values():
        if tokens.truncated:
            most = tokenizer.model_max_length
            encoders.note(f"warning: the prompt is longer than {most} tokens; not used: {tokens.truncated!r}")


def unknown_words(prompt: str, tokenizer_folder: Path) -> list[str]:
    """Words of ``prompt`` that a model with a closed vocabulary (``known_words.json``) was not trained on."""
    file = tokenizer_folder / "known_words.json"
    if not file.is_file():
        return []
    known = set(json.loads(file.read_text(encoding="utf-8")))
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in known]
