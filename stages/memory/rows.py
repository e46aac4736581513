"""Canvas-wide tensors in files, read and written in rows: what a canvas takes in memory does not grow with it.

Files are read with ``pread`` and written with ``pwrite``, never mapped: mapped pages count in RES.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stages.memory.tensors import DTYPES, TensorRef, pread_into, read_header

BAND = 1 << 16  # places of a band: 256x256 latents, the canvas of a 2048x2048 picture, are one


def bands(height: int, width: int, places: int | None = None) -> list[tuple[int, int]]:
    """(top, bottom) of the row bands of a canvas, of at most ``places`` (``BAND``) places but one row at least.

    They depend on the canvas only, never on the budget.
    """
    rows = max(1, (places or BAND) // width)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Rows:
    """A ``[1, C, H, W]`` tensor in a safetensors file: ``create`` a file of zeros, or ``open`` one.

    No file stays open between calls; ``top`` and ``bottom`` are rows, ``top <= y < bottom``.
    """

    def __init__(self, ref: TensorRef) -> None:
        self._ref = ref
        _, self.channels, self.height, self.width = ref.shape

    @classmethod
    def open(cls, path: Path, name: str = "latents") -> Rows:
        """The tensor ``name`` of a file. KeyError if it has none; ValueError for a torn file."""
        return cls(read_header(path)[name])

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
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + nbytes)
        return cls(TensorRef(path, 8 + len(header), dtype, (1, *shape)))

    @property
    def path(self) -> Path:
        return self._ref.file

    @property
    def shape(self) -> tuple[int, ...]:
        """``(1, C, H, W)``, as a tensor's."""
        return self._ref.shape

    def zero(self) -> None:
        """All zeros again. Nothing is written: the file gets a hole."""
        os.truncate(self._ref.file, self._ref.offset)
        os.truncate(self._ref.file, self._ref.offset + self._ref.nbytes)

    def read(self, top: int, bottom: int) -> Tensor:
        """``[1, C, bottom - top, W]`` in memory of its own; nothing else is read."""
        rows = torch.empty((1, self.channels, bottom - top, self.width), dtype=self._ref.dtype)
        descriptor = os.open(self._ref.file, os.O_RDONLY)
        try:
            for channel in range(self.channels):
                pread_into(descriptor, self._offset(channel, top), _bytes(rows[0, channel]))
        finally:
            os.close(descriptor)
        return rows

    def write(self, top: int, rows: Tensor) -> None:
        """Put ``rows [1, C, h, W]`` there from row ``top`` on. ValueError for another shape."""
        fits = rows.shape[:2] == (1, self.channels) and rows.shape[3] == self.width
        if not fits or not 0 <= top <= self.height - rows.shape[2]:
            raise ValueError(f"{self.path.name}: rows {tuple(rows.shape)} at {top} of a tensor {self.shape}.")
        rows = rows.to("cpu", self._ref.dtype).contiguous()
        descriptor = os.open(self._ref.file, os.O_WRONLY)
        try:
            for channel in range(self.channels):
                _pwrite(descriptor, self._offset(channel, top), _bytes(rows[0, channel]))
        finally:
            os.close(descriptor)

    def write_flat(self, start: int, values: Tensor) -> None:
        """Put ``values`` (one axis) there from element ``start`` of the flat tensor on."""
        descriptor = os.open(self._ref.file, os.O_WRONLY)
        try:
            _pwrite(descriptor, self._ref.offset + start * self._ref.dtype.itemsize, _bytes(values))
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Have all that was written on the disk."""
        descriptor = os.open(self._ref.file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def bands(self) -> Iterator[tuple[int, Tensor]]:
        """(top, rows) of every band."""
        for top, bottom in bands(self.height, self.width):
            yield top, self.read(top, bottom)

    def _offset(self, channel: int, top: int) -> int:
        return self._ref.offset + (channel * self.height + top) * self.width * self._ref.dtype.itemsize


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _pwrite(descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


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
