"""A picture in tiles for the eye: levels, each half as large, written as its rows come. No torch.

``zoom/LEVEL/COL_ROW.jpg``; level 0 has all pixels, the last one is a single tile. One row of tiles of each level is in
memory: ``2 * 3 * TILE * width`` bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.files import write_json

TILE = 512  # pixels a side
_QUALITY = 90


class Pyramid:
    """Writes the tiles of 8-bit RGB rows into an empty ``folder``; as a context manager, as ``PngWriter``."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        self._folder, self._width, self._height = folder, width, height
        sizes = [(height, width)]
        while max(sizes[-1]) > TILE:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        self._levels = [_Level(folder / str(number), *size) for number, size in enumerate(sizes)]

    def write(self, rows: np.ndarray) -> None:
        """The next rows, ``[h, width, 3]`` uint8."""
        self._put(0, rows)

    def _put(self, number: int, rows: np.ndarray) -> None:
        if number == len(self._levels):
            return
        for band in self._levels[number].put(rows):
            self._put(number + 1, band)

    def __enter__(self) -> Pyramid:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            described: dict[str, Any] = {"width": self._width, "height": self._height, "tile": TILE, "format": "jpg"}
            write_json(self._folder / "zoom.json", {**described, "levels": len(self._levels)})


class _Level:
    """One level: the rows of its next tiles."""

    def __init__(self, folder: Path, height: int, width: int) -> None:
        self._folder, self._height, self._done, self._filled = folder, height, 0, 0
        self._rows = np.empty((min(TILE, height), width, 3), np.uint8)
        folder.mkdir(parents=True)

    def put(self, rows: np.ndarray) -> list[np.ndarray]:
        """Take rows; of every row of tiles that is full: what the next level sees of it, half as large."""
        found = []
        while len(rows):
            count = min(len(self._rows) - self._filled, len(rows))
            self._rows[self._filled : self._filled + count] = rows[:count]
            rows, self._filled = rows[count:], self._filled + count
            if self._filled == len(self._rows) or self._done + self._filled == self._height:
                full = self._rows[: self._filled]
                self._save(full)
                found.append(halved(full))
                self._done, self._filled = self._done + self._filled, 0
        return found

    def _save(self, rows: np.ndarray) -> None:
        for left in range(0, rows.shape[1], TILE):
            path = self._folder / f"{left // TILE}_{self._done // TILE}.jpg"
            # no file is synced by itself: digests vouch for them, and they are made again from what they were made of
            Image.fromarray(rows[:, left : left + TILE]).save(path, quality=_QUALITY, subsampling=0)


def halved(rows: np.ndarray) -> np.ndarray:
    """The mean of every 2x2 pixels; ``[ceil(h/2), ceil(w/2), 3]``. An odd side ends in the mean of what is left."""
    height, width = (-(-side // 2) * 2 for side in rows.shape[:2])
    if rows.shape[:2] != (height, width):
        rows = np.pad(rows, ((0, height - rows.shape[0]), (0, width - rows.shape[1]), (0, 0)), mode="edge")
    out = np.empty((height // 2, width // 2, 3), np.uint8)
    for top in range(0, height // 2, 32):  # 16-bit sums of a few rows at a time
        part = rows[2 * top : 2 * top + 64].astype(np.uint16)
        total = part[::2, ::2] + part[1::2, ::2] + part[::2, 1::2] + part[1::2, 1::2]
        out[top : top + 32] = (total + 2) >> 2
    return out
