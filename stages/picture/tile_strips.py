"""Pixel tiles on disk, blended strip by strip. numpy only: neither torch nor the whole picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.memory.raw import RowFile, read_entries
from stages.ramps import ramp, shares
from stages.tiles import Size, Tile

STRIP_ROWS = 64  # pixels: bounds what is in memory


def feather(spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Each span's share of the places it covers, float32: smooth ramps as wide as the overlaps, adding up to 1.

    The two-dimensional weight is the product of both axes' shares, and adds up to 1 as well.
    """
    weights = []
    for (start, end), before, after in zip(spans, [None, *spans[:-1]], [*spans[1:], None], strict=True):
        weight = ramp(end - start, before[1] - start if before else 0, end - after[0] if after else 0)
        weights.append(weight * weight * (3 - 2 * weight))
    return [share.astype(np.float32) for share in shares(spans, weights, max(end for _, end in spans))]


class Segment(NamedTuple):
    """Places ``start <= x < end`` of an axis that the same spans (by index) cover."""

    start: int
    end: int
    spans: tuple[int, ...]


def segments(spans: Sequence[tuple[int, int]], longest: int | None = None) -> list[Segment]:
    """Cut an axis where a span begins or ends, and into pieces of at most ``longest``. ValueError for a hole."""
    cuts = sorted({edge for span in spans for edge in span})
    found = []
    for start, end in itertools.pairwise(cuts):
        inside = tuple(i for i, (a, b) in enumerate(spans) if a <= start and end <= b)
        if not inside:
            raise ValueError(f"places {start} to {end} are in no tile.")
        step = longest or end - start
        found += [Segment(at, min(at + step, end), inside) for at in range(start, end, step)]
    return found


def tile_file(path: Path, size: Size) -> RowFile:
    """A tile's ``pixels [3, h, w]`` uint8 in a safetensors file. ValueError: no such file, or other contents."""
    name = f"{path.parent.name}/{path.name}"
    try:
        entry = read_entries(path)["pixels"]
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} is not a tile: {str(error).rstrip('.')}") from error
    if (entry.dtype, entry.shape) != ("U8", (3, *size)):
        raise ValueError(f"{name}: got {entry.dtype} of shape {entry.shape}, expected U8 of shape {(3, *size)}")
    return RowFile(path, entry.offset, 3, *size)


class TileStrips:
    """The picture that a complete grid of tile files makes, in strips of ``[rows, width, 3]`` uint8, top to bottom.

    Args:
        folder: of ``r00_c00.safetensors`` and so on.
        tiles: a complete grid, in pixels.
    """

    def __init__(self, folder: Path, tiles: Sequence[Tile]) -> None:
        self._folder, self._tiles = folder, {(tile.row, tile.col): tile for tile in tiles}
        rows = dict(sorted({tile.row: (tile.top, tile.bottom) for tile in tiles}.items()))
        cols = dict(sorted({tile.col: (tile.left, tile.right) for tile in tiles}.items()))
        self._rows, self._cols = list(rows.values()), list(cols.values())
        self._row_share, self._col_share = feather(self._rows), feather(self._cols)
        self._row_segments, self._col_segments = segments(self._rows, STRIP_ROWS), segments(self._cols)
        self._files: dict[tuple[int, int], RowFile] = {}
        self.size = Size(self._rows[-1][1], self._cols[-1][1])

    def __len__(self) -> int:
        return len(self._row_segments)

    def __iter__(self) -> Iterator[np.ndarray]:
        for rows in self._row_segments:
            yield self._strip(rows)

    def _read(self, row: int, col: int, rows: Segment) -> np.ndarray:
        """``[h, w, 3]`` (a view: channels are the slowest axis in memory)."""
        tile = self._tiles[row, col]
        if (row, col) not in self._files:
            self._files[row, col] = tile_file(self._folder / f"{tile.name}.safetensors", tile.size)
        planes = np.empty((3, rows.end - rows.start, tile.size.width), np.uint8)
        self._files[row, col].read_into(memoryview(planes).cast("B"), rows.start - tile.top, rows.end - tile.top)
        return planes.transpose(1, 2, 0)

    def _strip(self, rows: Segment) -> np.ndarray:
        out = np.empty((rows.end - rows.start, self.size.width, 3), np.uint8)
        parts: dict[tuple[int, int], np.ndarray] = {}
        for segment in self._col_segments:
            keys = [(row, col) for col in segment.spans for row in rows.spans]
            parts = {key: part for key, part in parts.items() if key in keys}
            for key in keys:
                if key not in parts:
                    parts[key] = self._read(*key, rows)
            target = out[:, segment.start : segment.end]
            if len(keys) == 1:
                target[...] = self._cut(parts, keys[0], segment)
                continue
            total = np.zeros(target.shape, np.float32)
            for row, col in keys:
                down = self._row_share[row][rows.start - self._rows[row][0] : rows.end - self._rows[row][0]]
                across = self._col_share[col][segment.start - self._cols[col][0] : segment.end - self._cols[col][0]]
                total += self._cut(parts, (row, col), segment) * (down[:, None] * across)[..., None]
            target[...] = np.rint(total)
        return out

    def _cut(self, parts: dict[tuple[int, int], np.ndarray], key: tuple[int, int], segment: Segment) -> np.ndarray:
        left = self._cols[key[1]][0]
        return parts[key][:, segment.start - left : segment.end - left]
