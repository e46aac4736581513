"""Canvas-wide activations in files. Rows, columns, channels: a strip of rows is one range of bytes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from stages.vae.exact_program import Shape


def _bytes(buffer: Tensor) -> memoryview:
    return memoryview(buffer.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read(fd: int, buffer: Tensor, offset: int) -> None:
    view = _bytes(buffer)
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise OSError(f"an activation file ended {len(view)} bytes early; was its folder cleaned?")
        view, offset = view[count:], offset + count


def _write(fd: int, buffer: Tensor, offset: int) -> None:
    view = _bytes(buffer)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class Spill:
    """``[1, C, H, W]`` on disk, channels last.

    The file is scratch: it is not synced, and counts only together with a state that names it as whole.
    """

    def __init__(self, path: Path, shape: Shape, dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._row = shape.size.width * shape.channels
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    @property
    def nbytes(self) -> int:
        return self.shape.numel * self.dtype.itemsize

    def rows(self, top: int, bottom: int) -> Tensor:
        """``[1, C, bottom - top, W]``, channels last in memory."""
        strip = torch.empty((1, bottom - top, self.shape.size.width, self.shape.channels), dtype=self.dtype)
        _read(self._fd, strip, top * self._row * self.dtype.itemsize)
        return strip.permute(0, 3, 1, 2)

    def put(self, top: int, strip: Tensor) -> None:
        """Write ``[1, C, h, W]`` from row ``top`` on."""
        rows = strip.permute(0, 2, 3, 1).to("cpu", self.dtype).contiguous()
        _write(self._fd, rows, top * self._row * self.dtype.itemsize)

    def box(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        """``[1, C, bottom - top, right - left]``, read row by row."""
        out = torch.empty((1, bottom - top, right - left, self.shape.channels), dtype=self.dtype)
        for y in range(top, bottom):
            _read(self._fd, out[0, y - top], (y * self._row + left * self.shape.channels) * self.dtype.itemsize)
        return out.permute(0, 3, 1, 2)

    def close(self) -> None:
        os.close(self._fd)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
