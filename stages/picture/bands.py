"""Pixel tiles on disk, blended row band by row band. numpy only: neither torch nor the whole picture."""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from stages.tiles import Size, Tile

BAND_ROWS = 64  # pixels: bounds what is in memory


def feather(spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Each span's share of the places it covers, float32: smooth ramps as wide as the overlaps, adding up to 1.

    The two-dimensional weight is the product of both axes' shares, and adds up to 1 as well.
    """
    raw = []
    for index, (start, end) in enumerate(spans):
        place = np.arange(start, end) + 0.5
        weight = np.ones(end - start)
        if index > 0 and (width := spans[index - 1][1] - start) > 0:
            weight = np.minimum(weight, (place - start) / width)
        if index + 1 < len(spans) and (width := end - spans[index + 1][0]) > 0:
            weight = np.minimum(weight, (end - place) / width)
        raw.append(weight * weight * (3 - 2 * weight))
    total = np.zeros(max(end for _, end in spans))
    for (start, end), weight in zip(spans, raw, strict=True):
        total[start:end] += weight
    return [(w / total[start:end]).astype(np.float32) for (start, end), w in zip(spans, raw, strict=True)]


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


class TileFile:
    """A tile's ``pixels [3, h, w]`` uint8 in a safetensors file; rows are read as asked.

    Raises:
        ValueError: no such file, or other contents.
    """

    def __init__(self, path: Path, size: Size, key: str = "pixels") -> None:
        self.size = size
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(f"{path.parent.name}/{path.name} is missing") from None
        try:
            (length,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
            entry = json.loads(os.pread(self._fd, length, 8))[key]
            wanted = {"dtype": "U8", "shape": [3, *size]}
            got = {name: entry[name] for name in wanted}
            self._start = 8 + length + entry["data_offsets"][0]
            whole = os.fstat(self._fd).st_size >= self._start + 3 * size.height * size.width
        except (struct.error, ValueError, KeyError) as error:
            self.close()
            raise ValueError(f"{path.parent.name}/{path.name} is not a tile: {error!r}") from error
        if got != wanted or not whole:
            self.close()
            torn = "" if whole else ", cut short"
            raise ValueError(f"{path.parent.name}/{path.name}: got {got}{torn}, expected {wanted}")

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """``[bottom - top, w, 3]`` (a view: channels are the slowest axis in memory)."""
        height, width = self.size
        count = (bottom - top) * width
        planes = [os.pread(self._fd, count, self._start + (c * height + top) * width) for c in range(3)]
        flat = np.frombuffer(b"".join(planes), np.uint8)
        return flat.reshape(3, bottom - top, width).transpose(1, 2, 0)

    def close(self) -> None:
        os.close(self._fd)


class Bands:
    """The picture that a complete grid of tile files makes, in bands of ``[rows, width, 3]`` uint8, top to bottom.

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
        self._row_segments, self._col_segments = segments(self._rows, BAND_ROWS), segments(self._cols)
        self._open: dict[tuple[int, int], TileFile] = {}
        self.size = Size(self._rows[-1][1], self._cols[-1][1])

    def __len__(self) -> int:
        return len(self._row_segments)

    def __iter__(self) -> Iterator[np.ndarray]:
        for band in self._row_segments:
            self._close([key for key in self._open if key[0] not in band.spans])
            yield self._band(band)

    def _read(self, row: int, col: int, band: Segment) -> np.ndarray:
        tile = self._tiles[row, col]
        if (row, col) not in self._open:
            self._open[row, col] = TileFile(self._folder / f"{tile.name}.safetensors", tile.size)
        return self._open[row, col].rows(band.start - tile.top, band.end - tile.top)

    def _band(self, band: Segment) -> np.ndarray:
        out = np.empty((band.end - band.start, self.size.width, 3), np.uint8)
        parts: dict[tuple[int, int], np.ndarray] = {}
        for segment in self._col_segments:
            keys = [(row, col) for col in segment.spans for row in band.spans]
            parts = {key: part for key, part in parts.items() if key in keys}
            for key in keys:
                if key not in parts:
                    parts[key] = self._read(*key, band)
            target = out[:, segment.start : segment.end]
            if len(keys) == 1:
                target[...] = self._cut(parts, keys[0], segment)
                continue
            total = np.zeros(target.shape, np.float32)
            for row, col in keys:
                down = self._row_share[row][band.start - self._rows[row][0] : band.end - self._rows[row][0]]
                across = self._col_share[col][segment.start - self._cols[col][0] : segment.end - self._cols[col][0]]
                total += self._cut(parts, (row, col), segment) * (down[:, None] * across)[..., None]
            target[...] = np.rint(total)
        return out

    def _cut(self, parts: dict[tuple[int, int], np.ndarray], key: tuple[int, int], segment: Segment) -> np.ndarray:
        left = self._cols[key[1]][0]
        return parts[key][:, segment.start - left : segment.end - left]

    def _close(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            self._open.pop(key).close()

    def __enter__(self) -> Bands:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._close(list(self._open))
