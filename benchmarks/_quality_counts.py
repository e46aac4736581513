"""Counting, and words never seen together: is what was asked as one there once, and is it there where it never stood?

Both are read by ``training.counter``, a small network that says of every part of a picture what it shows. Its own error
is measured beside, on held-out scenes of known counts: with none, one and two, where the second one is the first again,
beside it in the same scene.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._quality_samples import read
from benchmarks._quality_scenes import Scene, endless
from training import phrases
from training.classifier import classify
from training.counter import WORDS, count, materials, together
from training.finder import LEAST
from training.scenes import MATERIALS
from training.specs import NEVER_TOGETHER, Spec, sample_spec

BODIES = {"moon": ("moon", "crescent"), "sun": ("sun",)}
GAP, ROOM = 24, 0.6  # pixels between two of a kind; share of the second one that is in the picture at least
LEAST_SHARE = 0.0015  # of a scene: less of a subject is hidden or too small to ask for


class Question(NamedTuple):
    """A prompt that asks for one ``word``."""

    word: str
    prompt: str


def asks_for(word: str, spec: Spec) -> bool:
    """Whether a scene of this spec has one ``word``, in weather that shows it."""
    if word in BODIES:
        return spec.body in BODIES[word] and spec.weather in ("clear", "cloudy")
    return spec.subject in WORDS[word]


def _said(word: str, text: str) -> bool:
    """Whether a caption names sun or moon; subjects are always named."""
    return word not in BODIES or any(said in text for body in BODIES[word] for said in phrases.BODY[body])


def questions(number: int) -> list[Question]:
    """``number`` captions of the training grammar, as many for each word, that name one of it."""
    found = list[Question]()
    for index, word in enumerate(WORDS):
        rng, own = random.Random(8111 + index), list[Question]()
        while len(own) < number // len(WORDS) + (index < number % len(WORDS)):
            spec = sample_spec(rng)
            prompt = Scene(spec, rng.randrange(1 << 30)).prompt
            if asks_for(word, spec) and _said(word, prompt):
                own.append(Question(word, prompt))
        found += own
    return found


def judge_counts(paths: Sequence[Path], asked: Sequence[Question]) -> dict[str, Any]:
    """Share of pictures with exactly one of what was asked as one; for each word how often each number was found."""
    found: dict[str, dict[int, int]] = {word: {} for word in WORDS}
    for path, one in zip(paths, asked, strict=True):
        number = count(read(path), one.word)
        found[one.word][number] = found[one.word].get(number, 0) + 1
    right = sum(numbers.get(1, 0) for numbers in found.values())
    return {"right": right, "asked": len(asked), "share": round(right / len(asked), 4), "found": found}


def doubled(image: Tensor, ids: Tensor, word: str) -> Tensor | None:
    """The scene with a second one of its ``word`` beside it; None where there is too little room.

    image ``[1,3,H,W]``, ids ``[1,H,W]`` as ``render`` gives them.
    """
    mask = _mask(ids, word)
    columns, width = mask[0].any(0).nonzero(), ids.shape[-1]
    left, right = int(columns.min()), int(columns.max()) + 1
    shift = (right - left + GAP) * (1 if left < width - right else -1)
    there = torch.roll(mask, shift, -1)
    outside = torch.arange(width) < shift if shift > 0 else torch.arange(width) >= width + shift
    there = there & ~outside
    if there.sum() < ROOM * mask.sum():
        return None
    return torch.where(there[:, None], torch.roll(image, shift, -1), image)


def _mask(ids: Tensor, word: str) -> Tensor:
    """Where a scene shows a word, of its materials ``[1,H,W]``."""
    return torch.isin(ids, torch.tensor([MATERIALS.index(name) for name in WORDS[word]], dtype=ids.dtype))


def known(word: str, number: int) -> Iterator[tuple[Tensor, int]]:
    """``number`` held-out scenes each with none, one and two of a word, and how many they show."""
    scenes, left = endless(), {0: number, 1: number, 2: number}
    while any(left.values()):
        scene = next(scenes)
        if not asks_for(word, scene.spec):
            shown = scene.spec.subject in WORDS[word] or scene.spec.body in BODIES.get(word, ())
            if left[0] and not shown:
                left[0] -= 1
                yield scene.render()[0], 0
            continue
        if not (left[1] or left[2]):
            continue
        image, ids = scene.render()
        if _mask(ids, word).float().mean() < LEAST_SHARE:
            continue  # behind a hill, or out of the picture
        if left[1]:
            left[1] -= 1
            yield image, 1
        two = doubled(image, ids, word)
        if left[2] and two is not None:
            left[2] -= 1
            yield two, 2


def counter_error(
    number: int, ways: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, dict[str, dict[int, float]]]:
    """Share of scenes counted right, by way, word and true count; a way is what is done to scenes before."""
    right = {way: {word: dict.fromkeys(range(3), 0) for word in WORDS} for way in ways}
    for word in WORDS:
        for image, truth in known(word, number):
            for way, shown in ways.items():
                right[way][word][truth] += count(shown(image), word) == truth
    return {
        way: {word: {truth: round(n / number, 3) for truth, n in one.items()} for word, one in words.items()}
        for way, words in right.items()
    }


def pair_scenes(number: int) -> list[Scene]:
    """``number`` scenes of pairs of subject and setting that training never draws, each pair in turn."""
    rng, found = random.Random(40361), list[Scene]()
    for index in range(number):
        subject, setting = NEVER_TOGETHER[index % len(NEVER_TOGETHER)]
        while (spec := sample_spec(rng)).setting != setting or spec.weather in ("fog", "storm"):
            pass
        found.append(Scene(replace(spec, subject=subject), index))
    return found


def judge_pair(image: Tensor, spec: Spec) -> tuple[bool, bool]:
    """Whether a picture shows the subject (by the counter), and whether the setting (by the classifier)."""
    shown = together(materials(image), [spec.subject])
    return int((shown > 0.5).sum()) >= LEAST, classify(image)["setting"]["labels"][0] == spec.setting


def judge_pairs(images: Iterator[Tensor] | Sequence[Tensor], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures that show the subject, the setting, both."""
    seen = [judge_pair(image, scene.spec) for image, scene in zip(images, scenes, strict=True)]
    columns = [*zip(*seen, strict=True), [all(one) for one in seen]]
    subject, setting, both = (round(sum(column) / len(seen), 3) for column in columns)
    return {"subject": subject, "setting": setting, "both": both, "pictures": len(seen)}
