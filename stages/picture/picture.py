"""An 8-bit picture in a file, cut and resized in rows: what Pillow makes of the whole, without the whole in memory.

Pillow resizes along one axis after the other, with 8 bits between, and takes first the axis that costs least. Here it
is always the width, row by row, so that no result depends on which rows are looked at together.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.memory.rows import Rows, Window
from stages.picture.png import PngWriter

_REACH = 3  # source pixels that Lanczos looks at around each place, times the reduction
_STRIP = 1 << 18  # pixels of a strip of rows
_THREADS = 2  # that compress a picture; each holds megabytes


class Picture:
    """RGB pixels, ``[1, 3, H, W]`` uint8 in a file of its own."""

    def __init__(self, pixels: Rows) -> None:
        self.pixels, self._window = pixels, Window(pixels)
        self.width, self.height = pixels.width, pixels.height

    @classmethod
    def create(cls, path: Path, width: int, height: int) -> Picture:
        """A black one in a new file."""
        return cls(Rows.create(path, (3, height, width), torch.uint8, "pixels"))

    @classmethod
    def of(cls, image: Image.Image, path: Path) -> Picture:
        """Pillow's RGB picture, written to a new file."""
        picture = cls.create(path, *image.size)
        for top, bottom in picture.strips():
            strip = np.array(image.crop((0, top, image.width, bottom)))
            picture.pixels.write(top, torch.from_numpy(strip).permute(2, 0, 1)[None])
        return picture

    def strips(self) -> list[tuple[int, int]]:
        """(top, bottom) of strips of rows from top to bottom."""
        rows = max(1, _STRIP // self.width)
        return [(top, min(top + rows, self.height)) for top in range(0, self.height, rows)]

    def cut(
        self, region: tuple[float, float, float, float], extent: tuple[int, int], *, alone: bool = False
    ) -> Image.Image:
        """The region (left, top, right, bottom; fractions of pixels count) resized to ``extent`` (width, height).

        The Lanczos window reaches beyond the region into the picture. Regions that come row by row read the picture
        about once; one ``alone`` reads no more than it needs, and nothing of it is kept.
        """
        box = [float(np.float32(edge)) for edge in region]  # as Pillow keeps it: moving it by whole pixels is exact
        left, right = self._reach(box[0], box[2], extent[0], self.width)
        top, bottom = self._reach(box[1], box[3], extent[1], self.height)
        box_of = self.pixels.box(top, left, bottom, right)[0] if alone else self._window.box(top, left, bottom, right)
        crop = _image(box_of)
        width = extent[0]
        across = (box[0] - left, 0, box[2] - left, crop.height)
        crop = crop.resize((width, crop.height), Image.Resampling.LANCZOS, box=across)
        return crop.resize(extent, Image.Resampling.LANCZOS, box=(0, box[1] - top, width, box[3] - top))

    @staticmethod
    def _reach(start: float, end: float, count: int, length: int) -> tuple[int, int]:
        reach = _REACH * max(1.0, (end - start) / count) + 1
        return max(0, math.floor(start - reach)), min(length, math.ceil(end + reach))

    def resized(self, extent: tuple[int, int]) -> Image.Image:
        """The whole picture resized with Lanczos to a small ``extent`` (width, height)."""
        across = np.empty((self.height, extent[0], 3), np.uint8)
        for top, bottom in self.strips():
            strip = _image(self.pixels.read(top, bottom)[0])
            across[top:bottom] = np.asarray(strip.resize((extent[0], bottom - top), Image.Resampling.LANCZOS))
        return Image.fromarray(across).resize(extent, Image.Resampling.LANCZOS)

    def save_png(self, path: Path) -> None:
        """Write a PNG, strip by strip."""
        with open(path, "wb") as file, PngWriter(file, self.width, self.height, threads=_THREADS) as png:
            for top, bottom in self.strips():
                png.write(np.ascontiguousarray(self.pixels.read(top, bottom)[0].permute(1, 2, 0).numpy()))


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
