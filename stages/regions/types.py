"""What regions are once they have been read: plain data, no torch. Boxes are pixels of the canvas."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from stages.tiles import Size, Tile


class Reroll(NamedTuple):
    """A rectangle of the noise (in latents) that another seed decides.

    ``reset``: the rectangle is drawn anew. ``epsilon``: it is mixed, ``sqrt(1-e^2) old + e new``, which stays standard
    normal; a small ``epsilon`` varies the picture a little.
    """

    box: Tile
    seed: int
    mode: Literal["reset", "epsilon"] = "reset"
    epsilon: float = 0.2


@dataclass(kw_only=True, frozen=True)
class Region:
    """One prompt for one box (pixels).

    ``blend`` regions join the weighted sum with ``weight`` times the ``mask_type`` over their box; ``replace`` regions
    are laid over it in their order, fading in over ``feather`` pixels inside their box.
    """

    box: Tile
    prompt: str
    negative_prompt: str = ""
    guidance_scale: float | None = None  # None: the canvas' own
    weight: float = 1.0
    mask_type: str = "gaussian"
    seed: int | None = None
    epsilon: float | None = None  # with a seed: mixes the noise in the box instead of drawing it anew
    mode: Literal["blend", "replace"] = "blend"
    feather: int = 0


@dataclass(kw_only=True, frozen=True)
class Regions:
    """All regions of a canvas of ``size`` pixels. Row 0 of the embeddings is the main prompt, row i + 1 region i."""

    size: Size
    factor: int
    main: tuple[str, str]  # prompt, negative prompt
    regions: tuple[Region, ...]
    rerolls: tuple[Reroll, ...] = field(default=())

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """(prompt, negative prompt) of each row of the embeddings."""
        return (self.main, *((region.prompt, region.negative_prompt) for region in self.regions))


def uncovered(size: Size, boxes: Sequence[Tile]) -> Tile | None:
    """The first part of the canvas, top to bottom, that no box covers; None if there is none."""
    rows = sorted({0, size.height, *(edge for box in boxes for edge in (box.top, box.bottom))})
    cols = sorted({0, size.width, *(edge for box in boxes for edge in (box.left, box.right))})
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(cols)):
        cell = Tile(0, 0, top, left, bottom, right)
        if not any(box.overlaps(cell) for box in boxes):
            return cell
    return None
