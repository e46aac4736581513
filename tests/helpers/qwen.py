"""A tiny random Qwen3 with a tokenizer of single letters, as the stock classes write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

# thinking is off where the words that a model thinks in are there already, and empty
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_qwen3(layers: int, **options: Any) -> Qwen3ForCausalLM:
    """In eval mode."""
    config = {
        "vocab_size": 1100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**config, "num_hidden_layers": layers, **options})).eval()


def letters_tokenizer() -> Qwen2TokenizerFast:
    """Bytes and the marks of the template."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    return Qwen2TokenizerFast(
        vocab=vocab,
        merges=[],
        additional_special_tokens=marks[1:],
        eos_token=marks[2],
        pad_token=marks[0],
        chat_template=TEMPLATE,
    )


def save_qwen3(folder: Path, model: Qwen3ForCausalLM) -> None:
    """``text_encoder`` and ``tokenizer`` in ``folder``."""
    model.save_pretrained(folder / "text_encoder")
    letters_tokenizer().save_pretrained(folder / "tokenizer")
