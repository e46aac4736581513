"""Where tiles lie on a canvas. Integers only: no torch, and no unit (latents and pixels alike)."""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType
from typing import NamedTuple


class Size(NamedTuple):
    """Height first, as tensors have it."""

    height: int
    width: int


class Tile(NamedTuple):
    """A box of the canvas, ``top <= y < bottom`` and ``left <= x < right``, and its place in the grid."""

    row: int
    col: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> Size:
        return Size(self.bottom - self.top, self.right - self.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Of the rows and of the columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def index(self) -> tuple[EllipsisType, slice, slice]:
        """For the last two axes of any array: ``canvas[tile.index]``."""
        return ..., *self.slices

    @property
    def name(self) -> str:
        """The tile's file name without suffix: ``r00_c03``."""
        return f"r{self.row:02d}_c{self.col:02d}"

    def scaled(self, factor: int) -> Tile:
        """The same tile in a unit ``factor`` times finer (latents to pixels)."""
        return Tile(self.row, self.col, *(edge * factor for edge in self[2:]))

    def grown(self, halo: int, canvas: Size) -> Tile:
        """The tile with ``halo`` more on every side, as far as the canvas goes."""
        return Tile(
            self.row,
            self.col,
            max(0, self.top - halo),
            max(0, self.left - halo),
            min(canvas.height, self.bottom + halo),
            min(canvas.width, self.right + halo),
        )

    def within(self, other: Tile) -> Tile:
        """This tile in the coordinates of ``other``, which must contain it: ValueError if it does not."""
        if not (
            other.top <= self.top <= self.bottom <= other.bottom
            and other.left <= self.left <= self.right <= other.right
        ):
            raise ValueError(f"box {self[2:]} does not lie in {other[2:]}.")
        return Tile(
            self.row,
            self.col,
            self.top - other.top,
            self.left - other.left,
            self.bottom - other.top,
            self.right - other.left,
        )

    def overlaps(self, other: Tile) -> bool:
        return (
            self.top < other.bottom and other.top < self.bottom and self.left < other.right and other.left < self.right
        )


def spread(length: int, tile: int, overlap: int, step: int = 1) -> list[tuple[int, int]]:
    """(start, end) of the tiles along one axis: all of one length, evenly spread, at least ``overlap`` shared.

    An axis shorter than a tile gets one tile of its own length. All edges are multiples of ``step``. ValueError when
    the tile or the overlap cannot work, or a length that is no multiple of the step.
    """
    if step > 1:
        if length % step or (tile < length and tile % step):
            raise ValueError(f"canvas and tile sides must be multiples of {step}, got {length} and {tile}.")
        if 0 <= overlap < tile:
            sides = length // step, -(-tile // step)
            found = spread(*sides, min(-(-overlap // step), sides[1] - 1))
            return [(start * step, end * step) for start, end in found]
    if length < 1 or tile < 1:
        raise ValueError(f"canvas and tile sides must be positive, got {length} and {tile}.")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and less than the tile's side {tile}, got {overlap}.")
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [index * (length - tile) // (count - 1) for index in range(count)]
    return [(start, start + tile) for start in starts]


def grid(size: Size, tile: Size, overlap: int, step: int = 1) -> list[Tile]:
    """Full-size tiles that cover ``size``, row-major; neighbours share at least ``overlap``.

    Args:
        size: of the canvas.
        tile: of one tile; a side longer than the canvas is cut to the canvas.
        overlap: what neighbours share at least, in both directions, in the unit of the sizes.
        step: of which all edges are multiples.

    Raises:
        ValueError: sizes that are not positive or no multiples of the step, or an overlap that is not smaller than the
            tile.
    """
    rows = spread(size.height, tile.height, overlap, step)
    cols = spread(size.width, tile.width, overlap, step)
    return [
        Tile(row, col, top, left, bottom, right)
        for row, (top, bottom) in enumerate(rows)
        for col, (left, right) in enumerate(cols)
    ]


def latent_grid(width: int, height: int, tile_size: int, overlap: int, factor: int, step: int = 1) -> list[Tile]:
    """The grid in latents of a picture, tile and overlap given in pixels, ``factor`` pixels to a latent.

    Tiles lie on whole latents, multiples of ``step``; ``tile.scaled(factor)`` gives the same grid in pixels.

    Raises:
        ValueError: a number of pixels that is no multiple of ``factor``; never rounded.
    """
    for name, value in (("width", width), ("height", height), ("tile_size", tile_size), ("overlap", overlap)):
        if value % factor:
            raise ValueError(f"{name}: got {value} pixels, expected a multiple of {factor}.")
    side = tile_size // factor
    return grid(Size(height // factor, width // factor), Size(side, side), overlap // factor, step)


def needed(tiles: Iterable[Tile], box: Tile) -> list[Tile]:
    """The tiles that share anything with ``box``, in their order."""
    return [tile for tile in tiles if tile.overlaps(box)]


def whole(size: Size) -> Tile:
    """One tile that covers a canvas."""
    return Tile(0, 0, 0, 0, size.height, size.width)
