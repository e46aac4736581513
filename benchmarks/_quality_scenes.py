"""What the embedded model is held against: rendered scenes that no training has drawn, and their captions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.captions import caption
from training.scenes import View, render
from training.specs import COLOURS, Spec, sample_spec
from training.train import HELD_OUT

SIDE = 256  # pixels of a scene, as the model learns them
TOGETHER = 8  # pictures that go through a network at a time


class Scene(NamedTuple):
    """A held-out scene: its spec, and the number that all else of it follows from."""

    spec: Spec
    number: int

    @property
    def colour(self) -> int:
        return self.number % len(COLOURS)

    @property
    def prompt(self) -> str:
        """A caption of it, as training says them."""
        return caption(random.Random(self.number), self.spec, self.colour)

    def render(self, view: View | None = None) -> tuple[Tensor, Tensor]:
        """Its picture ``[1,3,s,s]`` in [-1,1] and materials ``[1,s,s]``; of all of it unless a view is given."""
        view = view or View.whole(1, size=SIDE)
        views = len(view.zoom)
        seeds = torch.full((views,), HELD_OUT + 7 * self.number)  # beyond all that training draws
        return render(self.spec, seeds, torch.full((views,), self.colour), view)


def endless() -> Iterator[Scene]:
    """Scenes, each as often as the training recipe draws it."""
    rng = random.Random(20261)
    for number in count():
        yield Scene(sample_spec(rng), number)


def held_out(number: int) -> list[Scene]:
    """The first ``number`` of them."""
    return list(islice(endless(), number))


def pictures(scenes: Iterable[Scene]) -> Iterator[Tensor]:
    """Their pictures ``[n,3,256,256]``, a few at a time."""
    for some in batches(list(scenes)):
        yield torch.cat([scene.render()[0] for scene in some])


def batches(items: Sequence[Any], together: int = TOGETHER) -> Iterator[Sequence[Any]]:
    """So many of them at a time."""
    for first in range(0, len(items), together):
        yield items[first : first + together]


@torch.inference_mode()
def returned(vae: Any, images: Tensor) -> Tensor:
    """Pictures ``[n,3,H,W]`` as an autoencoder returns them."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
