"""Prompts with weights, and of any length, for CLIP: AUTOMATIC1111's grammar, through compel.

Parts of a prompt, and what is longer than a window of 77 tokens, are encoded each by itself and stand side by side
(https://github.com/damian0815/compel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from stages.families.encoders import Encoders
from stages.families.grammar import Fragments, Part, Prompt, has_signs, plain, read
from stages.families.text import tokenize
from stages.memory.imports import light_imports

MOST = 16  # windows: cross-attention has so many times as many keys


def understood(texts: Sequence[tuple[str, str]], tokenizer: Any, config: DictConfig) -> dict[str, Prompt]:
    """What the (prompt, negative prompt) pairs mean to CLIP; with ``prompt_weighting=off`` every text is words."""
    found = {}
    for text in dict.fromkeys(text for row in texts for text in row):
        if config.prompt_weighting == "off":
            found[text] = Prompt(text, None)
            continue
        parts = read(text)
        as_it_is = parts == (Part([(text, 1.0)]),) or (not text and plain(parts) == "")
        long = bool(tokenize(tokenizer, text).truncated)
        found[text] = Prompt(text, None) if as_it_is and not long else Prompt(plain(parts), parts)
    return found


def words(texts: Sequence[tuple[str, str]], config: DictConfig) -> Sequence[tuple[str, str]]:
    """The pairs without signs of weighting, for an encoder that is no CLIP beside some that are."""
    if config.prompt_weighting == "off":
        return texts
    return [(plain(read(prompt)), plain(read(negative))) for prompt, negative in texts]


def say_unweighted(encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> None:
    """Tell of signs of weighting in prompts that no CLIP attends to: they arrive as typed."""
    if any(has_signs(text) for row in texts for text in row) and config.prompt_weighting != "off":
        encoders.note(
            "warning: the text encoder of this model is no CLIP: (word:1.2), [word], BREAK and AND are words to it"
        )


class Weighting:
    """Weighted prompts among the others of a run, and all of them as long as the longest.

    Args:
        ways: of the prompts and of the negatives, see ``Weighted``.
    """

    def __init__(
        self,
        prompts: Mapping[str, Prompt],
        ways: Sequence[Callable[[Tensor, Tensor | None], Tensor]],
        tokenizer: Any,
        encoders: Encoders,
        *,
        masked: bool = False,
    ) -> None:
        self._prompts, self._note, self._made = prompts, encoders.note, []
        if any(prompt.parts for prompt in prompts.values()):
            self._made = [Weighted(way, tokenizer, encoders.device, masked=masked) for way in ways]

    def applied(self, row: Sequence[str], states: Tensor) -> list[Tensor]:
        """``[S, D]`` of each text of a row: as weighted, else what ``states [2, 77, D]`` has."""
        parts = [self._prompts[text].parts for text in row]
        return [self._made[index](own, self._note) if own else states[index] for index, own in enumerate(parts)]

    def filled(self, rows: list[list[Tensor]]) -> list[list[Tensor]]:
        """All as long as the longest, windows of no words behind the others; while the encoder is open."""
        longest = max(len(states) for row in rows for states in row)
        if longest > min(len(states) for row in rows for states in row):
            none = [made.empty for made in self._made]
            missing = [[(longest - len(states)) // len(none[0]) for states in row] for row in rows]
            rows = [
                [torch.cat([states, *[none[index]] * missing[number][index]]) for index, states in enumerate(row)]
                for number, row in enumerate(rows)
            ]
        return rows


class Weighted:
    """States of weighted prompts, from an encoder that is open.

    Args:
        states: ``(ids [1, 77], mask or None) -> [1, 77, D]``, as the family takes them.
        masked: whether the encoder is told which tokens are padding.
    """

    def __init__(
        self, states: Callable[[Tensor, Tensor | None], Tensor], tokenizer: Any, device: str, *, masked: bool = False
    ) -> None:
        with light_imports("transformers"):
            from compel import Compel
            from compel.prompt_parser import Conjunction, FlattenedPrompt

        def encoder(ids: Tensor, mask: Tensor | None, **_: Any) -> Any:
            told = mask is not None and (masked or not bool(mask.all()))
            found = states(ids.to(device), mask.to(device) if mask is not None and told else None)
            return SimpleNamespace(last_hidden_state=found.float())

        called: Any = _Encoder(encoder, device)
        self._compel: Any = Compel(
            tokenizer, called, truncate_long_prompts=False, padding_attention_mask_value=int(not masked), device=device
        )
        self._tokenizer, self._prompt, self._conjunction = tokenizer, FlattenedPrompt, Conjunction

    @property
    def empty(self) -> Tensor:
        """``[77, D]`` of no words, which fills a shorter prompt up."""
        return self._compel.conditioning_provider.empty_z[0].cpu()

    def __call__(self, parts: Sequence[Part], note: Callable[[str], None]) -> Tensor:
        """``[S, D]`` float32 on the CPU, S a multiple of 77."""
        prompts: list[Any] = [self._prompt(self._worded(part.fragments)) for part in parts]
        conjunction = self._conjunction(prompts, [part.weight for part in parts])
        try:
            found = self._compel.build_conditioning_tensor_for_conjunction(conjunction)[0]
        except (RuntimeError, TypeError) as error:  # it looks tokens up by their words, which signs can hide
            note(f"warning: the weights of a prompt could not be applied ({error}); its words alone are")
            found = self._compel.build_conditioning_tensor_for_prompt_object(self._prompt([(plain(parts), 1.0)]))[0][0]
        window = self._tokenizer.model_max_length
        if found.shape[1] > MOST * window:
            note(f"warning: a prompt is longer than {MOST} times {window} tokens; the rest is not used")
        return found[0, : MOST * window].cpu()

    def _worded(self, fragments: Fragments) -> Fragments:
        """Those that have tokens."""
        kept = [(text, weight) for text, weight in fragments if len(self._tokenizer(text).input_ids) > 2]
        return kept or [("", 1.0)]


class _Encoder:
    """A function that looks like a text encoder."""

    dtype = torch.float32

    def __init__(self, call: Callable[..., Any], device: str) -> None:
        self._call, self.device = call, device

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        return self._call(ids, mask, **options)
