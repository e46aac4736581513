"""Canvases in files, for tests that have them as tensors."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

from torch import Tensor

from stages.memory.rows import Rows

_folder = tempfile.TemporaryDirectory()
_numbers = count()


def rows_of(tensor: Tensor) -> Rows:
    """``tensor [1, C, H, W]`` in a file that vanishes with the tests."""
    rows = Rows.create(Path(_folder.name) / f"{next(_numbers)}" / "rows", tensor.shape[1:], tensor.dtype)
    rows.write(0, tensor)
    return rows


def all_of(rows: Rows) -> Tensor:
    """The whole of it."""
    return rows.read(0, rows.height)


def flip(file: Path, where: float = 1.0) -> None:
    """One bit of a file, near its end or at a share of its length."""
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)
