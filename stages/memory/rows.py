"""Canvas-wide tensors in files, read and written in rows: what a canvas takes in memory does not grow with it."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stages.files import free
from stages.memory.raw import RowFile, pwrite_all
from stages.memory.refs import DTYPES
from stages.memory.tensors import read_header

BAND = 1 << 16  # places of a band of four channels: 256x256 latents, the canvas of a 2048x2048 picture, are one


def bands(height: int, width: int, places: int | None = None, *, channels: int = 4) -> list[tuple[int, int]]:
    """(top, bottom) of the row bands of a canvas, of at most ``places`` (``BAND``) places but one row at least; with
    more than four ``channels`` of as much fewer.

    They depend on the canvas only, never on the budget.
    """
    rows = max(1, (places or BAND) * 4 // max(4, channels) // width)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Rows:
    """A ``[1, C, H, W]`` tensor in a file: ``create`` safetensors of zeros, ``open`` one, or a raw ``scratch`` file.

    No file stays open between calls; ``top`` and ``bottom`` are rows, ``top <= y < bottom``.

    Args:
        file: a plane a channel, or one plane with channels last.
        shape: ``(1, C, H, W)``.
    """

    def __init__(self, file: RowFile, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self.shape, self.dtype = file, shape, dtype
        _, self.channels, self.height, self.width = shape
        self._last = file.planes < self.channels

    @classmethod
    def open(cls, path: Path, name: str = "latents") -> Rows:
        """The tensor ``name`` of a file. KeyError if it has none; ValueError for a torn file."""
        ref = read_header(path)[name]
        return cls._planes(path, ref.offset, ref.shape, ref.dtype)

    @classmethod
    def create(
        cls, path: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32, name: str = "latents"
    ) -> Rows:
        """A new file of zeros, ``shape`` being (C, H, W); byte for byte what safetensors writes."""
        kind = next(key for key, value in DTYPES.items() if value == dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        entry = {"dtype": kind, "shape": [1, *shape], "data_offsets": [0, nbytes]}
        header = json.dumps({name: entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with free(path).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + nbytes)
        return cls._planes(path, 8 + len(header), (1, *shape), dtype)

    @classmethod
    def _planes(cls, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
        _, channels, height, width = shape
        return cls(RowFile(path, offset, channels, height, width * dtype.itemsize), shape, dtype)

    @classmethod
    def scratch(cls, path: Path, shape: Sequence[int], dtype: torch.dtype) -> Rows:
        """``shape`` (C, H, W) with channels last and nothing else in the file, which may be there: a strip of rows is
        one range of bytes. It is not synced, and counts only together with a state that names it as whole."""
        channels, height, width = shape
        if not path.is_file():
            free(path).touch()
        return cls(RowFile(path, 0, 1, height, width * channels * dtype.itemsize), (1, *shape), dtype)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def nbytes(self) -> int:
        return self._file.nbytes

    def zero(self) -> None:
        """All zeros again. Nothing is written: the file gets a hole."""
        os.truncate(self.path, self._file.offset)
        os.truncate(self.path, self._file.offset + self.nbytes)

    def read(self, top: int, bottom: int) -> Tensor:
        """``[1, C, bottom - top, W]`` in memory of its own; nothing else is read."""
        return self.box(top, 0, bottom, self.width)

    def box(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        """``[1, C, bottom - top, right - left]`` in memory of its own, read row by row where it is not whole rows."""
        height, width = bottom - top, right - left
        shape = (1, height, width, self.channels) if self._last else (1, self.channels, height, width)
        found, place = torch.empty(shape, dtype=self.dtype), self._file.row_bytes // self.width
        self._file.read_into(_bytes(found), top, bottom, left * place, right * place)
        return found.permute(0, 3, 1, 2) if self._last else found

    def write(self, top: int, rows: Tensor) -> None:
        """Put ``rows [1, C, h, W]`` there from row ``top`` on. ValueError for another shape."""
        fits = rows.shape[:2] == (1, self.channels) and rows.shape[3] == self.width
        if not fits or not 0 <= top <= self.height - rows.shape[2]:
            raise ValueError(f"{self.path.name}: rows {tuple(rows.shape)} at {top} of a tensor {self.shape}.")
        placed = rows.permute(0, 2, 3, 1) if self._last else rows
        placed = placed.to("cpu", self.dtype).contiguous()
        self._file.write(_bytes(placed), top, top + rows.shape[2])

    def write_box(self, top: int, left: int, values: Tensor) -> None:
        """Put ``values [1, C, h, w]`` there from row ``top`` and column ``left`` on; whole rows are written."""
        rows, right = values, left + values.shape[3]
        if (left, right) != (0, self.width):
            rows = self.read(top, top + values.shape[2])
            rows[..., left:right] = values
        self.write(top, rows)

    def write_flat(self, start: int, values: Tensor) -> None:
        """Put ``values`` (one axis) there from element ``start`` of the flat tensor on."""
        with self._file.opened(os.O_WRONLY) as descriptor:
            pwrite_all(descriptor, self._file.offset + start * self.dtype.itemsize, _bytes(values))

    def sync(self) -> None:
        """Have all that was written on the disk."""
        with self._file.opened(os.O_RDONLY) as descriptor:
            os.fsync(descriptor)

    def remove(self) -> None:
        """The file goes."""
        self.path.unlink(missing_ok=True)

    def bands(self) -> Iterator[tuple[int, Tensor]]:
        """(top, rows) of every band."""
        for top, bottom in bands(self.height, self.width, channels=self.channels):
            yield top, self.read(top, bottom)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Window:
    """The rows of a file that were asked for last; what is added to them is written when other rows are asked for.

    Boxes may come in any order; those of a grid, row by row, read every row about once.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._top, self._held, self._changed = 0, torch.empty((1, rows.channels, 0, rows.width)), False

    def box(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        """``[C, bottom - top, right - left]``: a view, to be read before the next call."""
        if not (self._top <= top and bottom <= self._top + self._held.shape[2]):
            self.flush()
            self._top, self._held = top, self.rows.read(top, bottom)
        return self._held[0, :, top - self._top : bottom - self._top, left:right]

    def add(self, top: int, left: int, values: Tensor) -> None:
        """Add ``values [C, h, w]`` to the box at ``top``, ``left``."""
        self.box(top, left, top + values.shape[1], left + values.shape[2]).add_(values)
        self._changed = True

    def flush(self) -> None:
        """Write what was added."""
        if self._changed:
            self.rows.write(self._top, self._held)
            self._changed = False


def std_mean(rows: Rows) -> tuple[Tensor, Tensor]:
    """(deviation, mean) of each channel, ``[1, C, 1, 1]`` float32, as ``torch.std_mean``; summed in float64."""
    moments = Moments(rows.channels)
    for _, band in rows.bands():
        moments.add(band)
    return moments.std_mean()


class Moments:
    """Sums over bands ``[1, C, h, W]``, for the deviation and the mean of each channel or of all together."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sums = torch.zeros((2, channels), dtype=torch.float64)

    def add(self, band: Tensor) -> None:
        wide = band[0].flatten(1).double()
        self._count += wide.shape[1]
        self._sums += torch.stack([wide.sum(dim=1), wide.square().sum(dim=1)])

    def std_mean(self, *, together: bool = False) -> tuple[Tensor, Tensor]:
        """``[1, C, 1, 1]`` float32 each, or without axes if ``together``."""
        channels = self._sums.shape[1]
        sums, count = (self._sums.sum(dim=1), self._count * channels) if together else (self._sums, self._count)
        mean = sums[0] / count
        variance = ((sums[1] - count * mean.square()) / max(1, count - 1)).clamp_min(0)
        std, mean = variance.sqrt().float(), mean.float()
        return (std, mean) if together else (std.view(1, -1, 1, 1), mean.view(1, -1, 1, 1))
