"""Tiles of a grid added up row by row: what is in memory is one row of tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.tiles import Tile

STRIP = 1 << 18  # places of a strip of complete rows that is handed on


class RowBlend:
    """Adds up weighted tiles of a grid, from the first to the last or from the beginning of any row of tiles.

    Args:
        channels, width: of the canvas.
        put: gets the rows that are complete, ``[1, C, h, W]`` float32 from row ``top`` on.
    """

    def __init__(self, channels: int, width: int, put: Callable[[int, Tensor], None]) -> None:
        self._put, self._top = put, 0
        self._held = torch.zeros((1, channels, 0, width))

    def add(self, tile: Tile, values: Tensor) -> None:
        """Add ``values [C, h, w]``, the next tile of the grid."""
        self.complete(tile.top)
        there, wanted = self._held.shape[2], tile.bottom - self._top
        if wanted > there:
            held = torch.zeros((1, self._held.shape[1], wanted, self._held.shape[3]))
            held[:, :, :there] = self._held
            self._held = held
        self._held[0, :, tile.top - self._top : tile.bottom - self._top, tile.left : tile.right] += values

    def complete(self, until: int) -> None:
        """No tile to come reaches above row ``until``."""
        done, step = min(until - self._top, self._held.shape[2]), max(1, STRIP // self._held.shape[3])
        for start in range(0, done, step):
            self._put(self._top + start, self._held[:, :, start : min(start + step, done)])
        if until > self._top:
            self._held, self._top = self._held[:, :, done:].clone(), until

    def finish(self) -> None:
        """After the last tile."""
        self.complete(self._top + self._held.shape[2])
