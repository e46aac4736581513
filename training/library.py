"""Captions made ready before training: groups of scenes that share a spec, their paints, and token tables."""

import random
from dataclasses import dataclass, replace

import torch

from .captions import caption, detail_captions
from .phrases import GLUE
from .scenes import MATERIALS, Spec
from .specs import COLOURS, SETTINGS, SUBJECTS, TIMES, sample_spec
from .vocabulary import END, MAX_LENGTH, START, build, encode, fragments

DETAIL_VARIANTS = 6
LEAST_DISC = 0.0025  # of a scene: a sun has 0.0036 to 0.015; what shows less of it does not name it


def _disturb(rng: random.Random, ids: list[int], strays: list[int]) -> list[int]:
    """Slip one to three meaningless tokens into a caption, so that unknown words are learned as noise."""
    end = build()[0][END]
    length = ids.index(end)
    body = ids[1:length]
    for _ in range(rng.randint(1, 3)):
        body.insert(rng.randint(0, len(body)), rng.choice(strays))
    body = body[: MAX_LENGTH - 2]
    return [ids[0], *body] + [end] * (MAX_LENGTH - 1 - len(body))


@dataclass(kw_only=True)
class Library:
    """specs: ``G`` of them. tokens ``[2*G*M,77]`` int16, colours ``[G*M]`` int64: ``M`` scenes a group, group by group.

    The second half of ``tokens`` describes the same scenes without sun or moon, for those in which it is hidden.
    details ``[K,77]`` int16: captions of crops, see ``detail_row``. empty ``[77]``: the caption that says nothing.
    """

    specs: list[Spec]
    per_group: int
    tokens: torch.Tensor
    colours: torch.Tensor
    details: torch.Tensor
    empty: torch.Tensor

    @staticmethod
    def make(groups: int, per_group: int, seed: int, device: torch.device | str) -> "Library":
        """Draw specs and write captions. About 100 microseconds a scene on one core."""
        rng = random.Random(seed)
        vocab, _ = build()
        strays = fragments() + [vocab[w + "</w>"] for w in GLUE.split()]
        specs, colours = [], []
        tokens: list[list[int]] = []
        hidden: list[list[int]] = []
        for _ in range(groups):
            spec = sample_spec(rng)
            specs.append(spec)
            for _ in range(per_group):
                colour = rng.randrange(len(COLOURS))
                for rows, said in ((tokens, spec), (hidden, replace(spec, body="none"))):
                    ids = encode(caption(rng, said, colour))
                    rows.append(_disturb(rng, ids, strays) if rng.random() < 0.12 else ids)
                colours.append(colour)
        end = vocab[END]
        details = [encode(text) for text in detail_captions(rng, DETAIL_VARIANTS)]
        return Library(
            specs=specs,
            per_group=per_group,
            tokens=torch.tensor(tokens + hidden, dtype=torch.int16).to(device),
            colours=torch.tensor(colours).to(device),
            details=torch.tensor(details, dtype=torch.int16).to(device),
            empty=torch.tensor([vocab[START]] + [end] * (MAX_LENGTH - 1), dtype=torch.int16).to(device),
        )


def detail_row(ids: torch.Tensor, time: str, generator: torch.Generator) -> torch.Tensor:
    """Row of ``Library.details`` that says what shows in ``ids`` ``[B,H,W]``: its commonest materials. ``[B]``."""
    flat = ids[:, ::4, ::4].reshape(len(ids), -1).long()
    counts = torch.zeros(len(ids), len(MATERIALS), device=ids.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    share, top = (counts / flat.shape[1]).topk(2, dim=1)
    second = torch.where(share[:, 1] > 0.15, top[:, 1], len(MATERIALS))
    variant = torch.randint(DETAIL_VARIANTS, (len(ids),), generator=generator, device=ids.device)
    return ((top[:, 0] * (len(MATERIALS) + 1) + second) * len(TIMES) + TIMES.index(time)) * DETAIL_VARIANTS + variant


def without_body(ids: torch.Tensor) -> torch.Tensor:
    """Whether sun or moon hide behind land or a subject in scenes ``ids`` ``[B,H,W]`` that have one: ``[B]``."""
    discs = (ids == MATERIALS.index("sun")) | (ids == MATERIALS.index("moon"))
    return discs.flatten(1).float().mean(1) < LEAST_DISC


def labels(spec: Spec) -> tuple[int, int, int]:
    """Class indices (time, subject, setting) of a spec."""
    return TIMES.index(spec.time), SUBJECTS.index(spec.subject), SETTINGS.index(spec.setting)
