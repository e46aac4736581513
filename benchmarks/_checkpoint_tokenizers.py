"""Tokenizers of letters for checkpoints of random weights: any prompt is tokens that their text encoders know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.files import atomic_path, write_json
from stages.memory.imports import light_imports

# thinking is off where the words that a model thinks in are there already, and empty
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def write_tokenizer(folder: Path, encoder: dict[str, Any], pad: str) -> str:
    """The tokenizer of a text encoder of this config; its class. ``pad``: CLIP's padding token."""
    kind = encoder["model_type"]
    if kind == "t5":
        t5_tokenizer().save_pretrained(folder)
        return "T5TokenizerFast"
    if kind == "qwen3":
        qwen3_tokenizer().save_pretrained(folder)
        return "Qwen2TokenizerFast"
    _write_clip(folder, encoder["vocab_size"], pad)
    return "CLIPTokenizer"


def t5_tokenizer() -> Any:
    """Small letters, and spaces before words."""
    with light_imports("transformers"):
        from transformers import T5Tokenizer

    letters = [*((chr(code), -2.0) for code in range(97, 123)), ("▁", -2.0)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters])


def qwen3_tokenizer() -> Any:
    """Bytes, the marks of the chat template, and the template."""
    with light_imports("transformers"):
        from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*_byte_alphabet(), *marks])}
    options: dict[str, Any] = {"eos_token": marks[2], "pad_token": marks[0], "chat_template": TEMPLATE}
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=marks[1:], **options)


def _write_clip(folder: Path, size: int, pad: str) -> None:
    """A byte-level CLIP tokenizer of ``size`` ids."""
    alphabet = _byte_alphabet()
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet + [s + "</w>" for s in alphabet])}
    vocabulary |= {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}  # the last ids, as in CLIP's
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocabulary)
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    write_json(folder / "tokenizer_config.json", options)
    with atomic_path(folder / "merges.txt") as temporary:
        temporary.write_text("#version: 0.2\n")


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
