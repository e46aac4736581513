"""The vocabulary and its tokenizer: byte-level BPE in which every known word is one token and any script has tokens.

Format after CLIP (Radford et al. 2021): ``vocab.json`` and ``merges.txt``; ``</w>`` closes a word.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from .phrases import all_phrases
from .specs import COLOURS

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_SPLIT = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")


@lru_cache(maxsize=1)
def known_words() -> tuple[str, ...]:
    """Every word that the model is taught, sorted."""
    text = " ".join(all_phrases()).replace("{c}", " ").replace("{}", " ") + " " + " ".join(COLOURS)
    return tuple(sorted(set(re.findall(r"[a-z]+", text))))


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses (GPT-2, Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(extra)) for b in range(256)]


def _train_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merge the commonest pair until every word is one token (ties: the lesser pair), so that replaying them agrees."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(p) > 1 for p in pieces):
        pairs = Counter(pair for p in pieces for pair in pairwise(p))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for p in pieces:
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = [p[i] + p[i + 1]]
                i += 1
    return merges


@lru_cache(maxsize=1)
def build() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary (token to id) and the merges, always the same."""
    symbols = _byte_characters()
    tokens = [*symbols, *(s + "</w>" for s in symbols)]
    merges = _train_merges(known_words())
    tokens += dict.fromkeys(a + b for a, b in merges)
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def encode(text: str) -> list[int]:
    """Token ids ``[77]`` of a caption of known words, as the tokenizer pads them. KeyError on unknown words."""
    vocab, _ = build()
    ids = [vocab[piece + "</w>"] for piece in _SPLIT.findall(text.lower())][: MAX_LENGTH - 2]
    return [vocab[START], *ids] + [vocab[END]] * (MAX_LENGTH - 1 - len(ids))


def fragments() -> list[int]:
    """Ids that appear only inside unknown words."""
    vocab, _ = build()
    known = {word + "</w>" for word in known_words()} | {START, END}
    return [i for token, i in vocab.items() if token not in known]


def save_tokenizer(folder: Path) -> None:
    """Write the CLIPTokenizer folder, and ``known_words.json``."""
    from transformers import CLIPTokenizer

    vocab, merges = build()
    make: Any = CLIPTokenizer  # merges may be pairs, although annotated as text
    tokenizer = make(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "known_words.json").write_text(json.dumps(known_words(), indent=0) + "\n", encoding="utf-8")
