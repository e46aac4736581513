"""Mixture of Diffusers: one noise prediction for the whole canvas, from the tiles' predictions (arXiv 2302.02412)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.canvas.tiles import Size, Tile
from stages.canvas.weights import Weight, grid_weights


class View(NamedTuple):
    """What the denoiser is asked about one tile, in latents.

    ``prompt_row`` is the row of the embeddings; with ``guidance_scale`` 1 there is no unconditional pass. Over all
    views of a canvas the weights add up to 1 at every latent.
    """

    tile: Tile
    weight: Weight
    prompt_row: int = 0
    guidance_scale: float = 1.0

    @property
    def passes(self) -> int:
        """Samples that the denoiser gets: 2 with classifier-free guidance, else 1."""
        return 1 if self.guidance_scale == 1 else 2


@dataclass(kw_only=True)
class TileBatch:
    """A group of crops for the denoiser, one row a sample; the two samples of a guided view lie next to each other.

    ``samples [N, C, h, w]`` float32; ``prompt_rows``, ``unconditional`` (take the negative embedding of that row) and
    ``tiles`` have N entries. Any even micro-batch of a guided group is whole pairs: u0 c0 u1 c1 ...
    """

    samples: Tensor
    prompt_rows: tuple[int, ...]
    unconditional: tuple[bool, ...]
    tiles: tuple[Tile, ...]


Denoise = Callable[[TileBatch], Tensor]


def grid_views(tiles: Sequence[Tile], size: Size, *, blend: str, guidance_scale: float, row: int = 0) -> list[View]:
    """One view a tile of a grid, all with the same prompt."""
    weights = grid_weights(tiles, size, blend)
    return [View(tile, weight, row, guidance_scale) for tile, weight in zip(tiles, weights, strict=True)]


def groups(views: Sequence[View], count: int) -> Iterator[list[View]]:
    """The views in lists of one tile size and one number of passes each: at most ``count`` guided ones.

    Or twice as many without guidance, so that a group's samples are whole micro-batches either way: which samples meet
    in one, and with them the rounding, must not depend on the group's size.
    """
    if count < 1:
        raise ValueError(f"a group holds at least one view, got {count}.")
    kinds: dict[tuple[Size, int], list[View]] = {}
    for view in views:
        kinds.setdefault((view.tile.size, view.passes), []).append(view)
    for kind in kinds.values():
        most = 2 * count // kind[0].passes
        for start in range(0, len(kind), most):
            yield kind[start : start + most]


def batch(latents: Tensor, group: Sequence[View]) -> TileBatch:
    """Crop ``latents [1, C, H, W]`` for one group of views."""
    passes = group[0].passes
    crops = [latents[0][view.tile.index] for view in group for _ in range(passes)]
    return TileBatch(
        samples=torch.stack(crops),
        prompt_rows=tuple(view.prompt_row for view in group for _ in range(passes)),
        unconditional=(True, False) * len(group) if passes == 2 else (False,) * len(group),
        tiles=tuple(view.tile for view in group for _ in range(passes)),
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
    """The mixing of one canvas, step after step. The accumulator is made once and used again by every step.

    Args:
        views: of the canvas; their weights must add up to 1 at every latent.
        size: of the canvas, in latents.
        channels: of the latents.
        out: an accumulator of the caller's (``[1, C, H, W]`` float32, for example memory-mapped); made if None.
    """

    def __init__(self, views: Sequence[View], size: Size, channels: int, *, out: Tensor | None = None) -> None:
        if not views:
            raise ValueError("a canvas needs at least one view.")
        self.views = list(views)
        self.total = torch.zeros((1, channels, *size)) if out is None else out

    def predict(self, latents: Tensor, denoise: Denoise, group_size: int) -> Tensor:
        """The canvas' noise prediction ``sum_r w_r eps_r``, ``[1, C, H, W]`` float32.

        Args:
            latents: ``[1, C, H, W]`` float32, scaled by ``scheduler.scale_model_input``.
            denoise: gives a prediction for each sample of a ``TileBatch``.
            group_size: guided views handed to ``denoise`` at once, half of those without guidance.

        Returns:
            The accumulator: valid until the next call.
        """
        if latents.shape != self.total.shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}, expected {tuple(self.total.shape)}.")
        self.total = self.total.to(latents.device)
        self.total.zero_()
        for group in groups(self.views, group_size):
            predictions = denoise(batch(latents, group))
            for view, prediction in zip(group, guided(predictions, group), strict=True):
                self.total[0][view.tile.index] += prediction * view.weight.map(prediction.device)
        return self.total
