"""AUTOMATIC1111's signs in prompts. No torch.

``(word)`` counts 1.1 times, ``[word]`` 1/1.1 times, ``(word:1.2)`` as said; brackets multiply. ``BREAK`` starts a new
window of tokens; ``AND`` joins prompts, each with a weight (``AND text :0.5``). ``\\(``, ``\\)``, ``\\[``, ``\\]``
and ``\\\\`` are the characters themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

STRONGER = 1.1  # of one pair of brackets
LARGEST = 100.0  # a weight above it is text: its states are no numbers
_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|.", re.DOTALL)
_JOIN = re.compile(r"\s*\b(BREAK|AND)\b\s*")
_SHARE = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")

Fragments = list[tuple[str, float]]


class Part(NamedTuple):
    """What is encoded by itself: texts, each with its weight, and the weight of it all."""

    fragments: Fragments
    weight: float = 1.0


class Prompt(NamedTuple):
    """``text``: without the signs that are no words. ``parts``: how it is weighted; None: as CLIP has it by itself."""

    text: str
    parts: tuple[Part, ...] | None


def read(text: str) -> tuple[Part, ...]:
    """A prompt's parts; whatever is no grammar is text."""
    found, weight, joined = [], 1.0, re.split(_JOIN, text)
    for index in range(0, len(joined), 2):
        own, last = joined[index], index + 1 >= len(joined)
        said = _SHARE.search(own) if (not last and joined[index + 1] == "AND") or joined[index - 1] == "AND" else None
        if said is not None:
            own, weight = own[: said.start()].rstrip(), _number(said[1], 1.0)
        found.append(Part(_fragments(own), weight))
        weight = 1.0
    return tuple(found)


def _number(text: str, otherwise: float) -> float:
    found = float(text)
    return found if abs(found) <= LARGEST else otherwise


def _fragments(text: str) -> Fragments:
    """Texts with weights; a bracket that is never closed, or never opened, is text."""
    found: Fragments = []
    opened: list[tuple[str, int]] = []
    for token in _TOKEN.findall(text):
        if token in "([":
            opened.append((token, len(found)))
            found.append((token, 1.0))
        elif token[-1] in ")]" and token[0] != "\\" and opened and _closes(opened[-1][0], token):
            bracket, first = opened.pop()
            factor = STRONGER if bracket == "(" else 1 / STRONGER
            if token[0] == ":":
                factor = _number(token[1:-1], math.nan)
            if math.isnan(factor):  # no weight that can be
                found.append((token, 1.0))
                continue
            found[first:] = [(own, weight * factor) for own, weight in found[first + 1 :]]
            opened = [one for one in opened if one[1] < first]
        else:
            found.append((token[-1] if token[0] == "\\" and len(token) > 1 else token, 1.0))
    return _merged(found)


def _closes(bracket: str, token: str) -> bool:
    return (bracket == "(") == token.endswith(")")


def _merged(fragments: Fragments) -> Fragments:
    """Neighbours of one weight are one."""
    found: Fragments = []
    for text, weight in fragments:
        if found and found[-1][1] == weight:
            found[-1] = found[-1][0] + text, weight
        else:
            found.append((text, weight))
    return found


def has_signs(text: str) -> bool:
    """Whether anything in a prompt is more than words."""
    return plain(read(text)) != text.strip()


def plain(parts: Sequence[Part]) -> str:
    """The words alone."""
    return " ".join("".join(text for text, _ in part.fragments).strip() for part in parts).strip()
