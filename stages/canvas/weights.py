"""Blend weights of tiles: how much each tile says about each of its pixels.

Every weight is the outer product of a column and a row profile, and so is the sum over a whole grid: both are kept as
one-dimensional float64 profiles, and a 16K canvas needs no canvas of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stages import ramps
from stages.tiles import Size, Tile

GAUSSIAN_SIGMA = 0.1  # of the side: Mixture of Diffusers' variance 0.01 L^2


@lru_cache(maxsize=256)
def profile(kind: str, length: int) -> Tensor:
    """One axis of a tile's weight, ``[length]`` float64, symmetric and above 0 everywhere.

    ``gaussian``: standard deviation 0.1 of the side around its true middle ``(L-1)/2`` (arXiv 2302.02412);
    ``cosine``: ``(1 + cos(pi u))/2``; ``quartic``: ``15/16 (1-u^2)^2``; ``constant``: 1 (MultiDiffusion).
    ``u`` is a pixel centre's place in (-1, 1), so no pixel of a tile weighs nothing.

    Raises:
        ValueError: an unknown kind.
    """
    x = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    u = 2 * x / length
    if kind == "gaussian":
        return torch.exp(-((x / (GAUSSIAN_SIGMA * length)) ** 2) / 2)
    if kind == "cosine":
        return (1 + torch.cos(torch.pi * u)) / 2
    if kind == "quartic":
        return 15 / 16 * (1 - u**2) ** 2
    if kind == "constant":
        return torch.ones(length, dtype=torch.float64)
    raise ValueError(f"blend: got {kind!r}, expected gaussian, cosine, quartic or constant.")


def tile_weights(kind: str, size: Size) -> Tensor:
    """The published weight of a tile, ``[h, w]`` float32 (fp16 would lose the gaussian's corner of 1e-11)."""
    return torch.outer(profile(kind, size.height), profile(kind, size.width)).float()


class Weight(NamedTuple):
    """A tile's weight as factors: ``rows [h]``, ``cols [w]`` float64, and what makes its mask if it has one.

    ``mask()`` is ``[h, w]`` float32.
    """

    rows: Tensor
    cols: Tensor
    mask: Callable[[], Tensor] | None = None

    def map(self, device: torch.device | str = "cpu") -> Tensor:
        """The weight itself, ``[h, w]`` float32. Exactly 1 where the factors are 1."""
        product = torch.outer(self.rows, self.cols).float()
        return (product if self.mask is None else product * self.mask()).to(device)


def shares(spans: Sequence[tuple[int, int]], length: int, kind: str) -> list[Tensor]:
    """Each span's share of every place it covers, float64: they add up to 1 at each of the ``length`` places."""
    weights = [profile(kind, end - start).numpy() for start, end in spans]
    return [torch.from_numpy(share) for share in ramps.shares(spans, weights, length)]


def grid_weights(tiles: Sequence[Tile], size: Size, kind: str) -> list[Weight]:
    """Normalised weights of a whole grid, in its order: over all tiles they add up to 1 at every place of ``size``.

    Equal to ``w_r / sum w_r`` with ``tile_weights``, since on a grid the sum is an outer product as well.
    """
    rows = {tile.row: (tile.top, tile.bottom) for tile in tiles}
    cols = {tile.col: (tile.left, tile.right) for tile in tiles}
    if len(rows) * len(cols) != len(tiles):
        raise ValueError(f"{len(tiles)} tiles are not a grid of {len(rows)} rows and {len(cols)} columns.")
    row_share = dict(zip(rows, shares(list(rows.values()), size.height, kind), strict=True))
    col_share = dict(zip(cols, shares(list(cols.values()), size.width, kind), strict=True))
    return [Weight(row_share[tile.row], col_share[tile.col]) for tile in tiles]


def weight_sum(tiles: Sequence[Tile], size: Size, kind: str) -> Tensor:
    """What ``tile_weights`` add up to, ``[H, W]`` float32, for any tiles (a grid need not be complete)."""
    total = torch.zeros(size, dtype=torch.float64)
    for tile in tiles:
        total[tile.slices] += torch.outer(profile(kind, tile.size.height), profile(kind, tile.size.width))
    return total.float()
