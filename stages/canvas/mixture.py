"""Mixture of Diffusers: one noise prediction for the whole canvas, from the tiles' predictions (arXiv 2302.02412)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stages.canvas.weights import Weight, grid_weights
from stages.distributed import ALONE, Ranks
from stages.memory.rows import Rows, Window
from stages.tiles import Size, Tile


class View(NamedTuple):
    """What the denoiser is asked about one tile, in latents.

    ``prompt_row`` is the row of the embeddings; with a ``guidance_scale`` of 1 or less, as in diffusers, there is no
    unconditional pass, nor where the model takes the scale itself (``embedded``). Over all views of a canvas the
    weights add up to 1 at every latent. ``picture`` is the part of the canvas that is a picture of its own, where
    several lie side by side.
    """

    tile: Tile
    weight: Weight
    prompt_row: int = 0
    guidance_scale: float = 1.0
    embedded: bool = False
    picture: Tile | None = None

    @property
    def passes(self) -> int:
        """Samples that the denoiser gets: 2 with classifier-free guidance, else 1."""
        return 1 if self.embedded or self.guidance_scale <= 1 else 2


@dataclass(kw_only=True)
class TileBatch:
    """A group of crops for the denoiser, one row a sample; the two samples of a guided view lie next to each other.

    ``samples [N, C, h, w]`` float32; ``prompt_rows``, ``unconditional`` (take the negative embedding of that row),
    ``tiles``, ``guidance_scales``, ``pictures`` and ``weights`` (of the views) have N entries. Any even micro-batch
    of a guided group is whole pairs: u0 c0 u1 c1 ...
    """

    samples: Tensor
    prompt_rows: tuple[int, ...]
    unconditional: tuple[bool, ...]
    tiles: tuple[Tile, ...]
    guidance_scales: tuple[float, ...] = ()
    pictures: tuple[Tile | None, ...] = ()
    weights: tuple[Weight, ...] = ()


Denoise = Callable[[TileBatch], Tensor]
Turns = Callable[[Sequence[Callable[[], Tensor]]], Iterator[Tensor]]  # what each call gives, in their order


def grid_views(tiles: Sequence[Tile], size: Size, *, blend: str, guidance_scale: float, row: int = 0) -> list[View]:
    """One view a tile of a grid, all with the same prompt."""
    weights = grid_weights(tiles, size, blend)
    return [View(tile, weight, row, guidance_scale) for tile, weight in zip(tiles, weights, strict=True)]


class Grouping(NamedTuple):
    """How many samples the denoiser is handed at once: at most ``most``, in whole micro-batches of ``micro``: which of
    them meet in one, and with that the rounding, must not depend on the group's size."""

    most: int
    micro: int = 1


def groups(views: Sequence[View], how: Grouping, ranks: int = 1) -> Iterator[list[View]]:
    """The views in lists of one tile size and one number of passes each: at most ``how.most`` samples, but one view.

    Of one kind several ranks get as many, but for a micro-batch; kinds are dealt out one after the other.
    """
    if how.most < 1:
        raise ValueError(f"a group holds at least one sample, got {how.most}.")
    kinds: dict[tuple[Size, int], list[View]] = {}
    for view in views:
        kinds.setdefault((view.tile.size, view.passes), []).append(view)
    for kind in kinds.values():
        most = max(1, how.most // kind[0].passes)
        if ranks == 1:
            yield from (kind[start : start + most] for start in range(0, len(kind), most))
            continue
        micro = min(most, max(1, how.micro // kind[0].passes))
        ends = accumulate(_dealt(len(kind) / micro, most // micro, ranks), initial=0)
        yield from (kind[start * micro : end * micro] for start, end in pairwise(ends))


def _dealt(count: float, most: int, ranks: int) -> Iterator[int]:
    """How many micro-batches each group has, of ``count`` (the last one may be a part of one): ``Ranks.ordered`` deals
    them out in turns, the last group to the first rank. In as few turns as can be, for every rank as many in all."""
    total, held = math.ceil(count), [0] * ranks
    turns = -(-total // (most * ranks))
    for turn in range(turns):
        begin, end = (-(-total * one // turns) for one in (turn, turn + 1))
        least, more = divmod(end - begin, ranks)
        places = range(ranks) if count == total else reversed(range(ranks))
        longer = sorted(places, key=held.__getitem__)[:more]
        sizes = [least + (place in longer) for place in range(ranks)]
        held = [before + size for before, size in zip(held, sizes, strict=True)]
        yield from (size for size in sizes if size)


def batch(latents: Window, group: Sequence[View]) -> TileBatch:
    """Crop the canvas for one group of views."""
    passes = group[0].passes
    crops = [crop for view in group for crop in [latents.box(*view.tile[2:])] * passes]
    return TileBatch(
        samples=torch.stack(crops),
        prompt_rows=tuple(view.prompt_row for view in group for _ in range(passes)),
        unconditional=(True, False) * len(group) if passes == 2 else (False,) * len(group),
        tiles=tuple(view.tile for view in group for _ in range(passes)),
        guidance_scales=tuple(view.guidance_scale for view in group for _ in range(passes)),
        pictures=tuple(view.picture for view in group for _ in range(passes)),
        weights=tuple(view.weight for view in group for _ in range(passes)),
    )


def guided(predictions: Tensor, group: Sequence[View]) -> Tensor:
    """``eps_u + g (eps_c - eps_u)`` for each view, ``[n, C, h, w]`` float32, from the batch's predictions."""
    predictions = predictions.float()
    if group[0].passes == 1:
        return predictions
    unconditional, conditional = predictions[0::2], predictions[1::2]
    scales = torch.tensor([view.guidance_scale for view in group], dtype=torch.float32, device=predictions.device)
    return unconditional + scales[:, None, None, None] * (conditional - unconditional)


class Mixture:
    """The mixing of one canvas, step after step: what is in memory is a group of tiles and the rows that they lie in.

    Args:
        views: of the canvas; their weights must add up to 1 at every latent.

    ``turns`` runs the groups of a step where their tiles need one another; None: one after the other will do.
    """

    def __init__(self, views: Sequence[View]) -> None:
        if not views:
            raise ValueError("a canvas needs at least one view.")
        self.views = list(views)
        self.turns: Turns | None = None

    def predict(
        self,
        latents: Rows,
        total: Rows,
        denoise: Denoise,
        grouping: Grouping,
        ranks: Ranks = ALONE,
    ) -> None:
        """The canvas' noise prediction ``sum_r w_r eps_r``, on the first of several ranks.

        Args:
            latents: ``[1, C, H, W]`` float32, scaled by ``scheduler.scale_model_input``.
            total: where the prediction goes, of the same shape; what it holds is overwritten.
            denoise: gives a prediction for each sample of a ``TileBatch``.
            grouping: of the samples handed to ``denoise``; a guided view is two, and one view at least.
            ranks: that share the groups; all have the same latents.
        """
        if latents.shape != total.shape:
            raise ValueError(f"latents of shape {latents.shape}, expected {total.shape}.")
        total.zero()
        source, target = Window(latents), Window(total)

        def predicted(group: list[View]) -> Tensor:
            return guided(denoise(batch(source, group)), group)

        def shape(group: list[View]) -> tuple[int, ...]:
            return (len(group), latents.channels, *group[0].tile.size)

        each = list(groups(self.views, grouping, ranks.size))
        if self.turns is None:
            found = ranks.ordered(each, predicted, shape)
        else:
            found = zip(each, self.turns([partial(predicted, group) for group in each]), strict=True)
        for group, predictions in found:
            for view, prediction in zip(group, predictions, strict=True):
                target.add(view.tile.top, view.tile.left, prediction * view.weight.map(prediction.device))
        target.flush()
