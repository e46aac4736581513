"""Where the numbers of a tensor lie in a file, how they are stored there, and how a run of bytes becomes numbers."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from stages.memory.ggml import READABLE, block_of, numbers_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


class TensorRef(NamedTuple):
    """One tensor of a file: its numbers from ``offset`` (from the start of the file) on, row-major.

    Args:
        dtype: of the numbers as they lie there; of blocks float32, what they become.
        transposed: of a matrix, what lies there has the reverse shape.
        blocks: the type of GGML's blocks that hold the numbers, or one that nothing here reads; "" for plain ones.
        scale: what the numbers are multiplied by: one, or one a row.
        parts: tensors that make up this one, row after row; then the other places say nothing.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False
    blocks: str = ""
    scale: TensorRef | None = None  # type: ignore[valid-type]
    parts: tuple[TensorRef, ...] = ()  # type: ignore[valid-type]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """As it lies in the file."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def unit(self) -> tuple[int, int]:
        """(numbers, bytes) that cannot be read in part: a block, or one number."""
        return block_of(self.blocks) if self.blocks else (1, self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without the scale's."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        numbers, size = self.unit
        return self.numel // numbers * size

    @property
    def kind(self) -> str:
        """How its numbers are stored, as files call it."""
        if self.parts:
            return self.parts[0].kind
        return self.blocks or next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def readable(self) -> bool:
        """Whether they are real numbers of a kind that is read here."""
        return self.kind in FLOATS or self.kind in READABLE

    @property
    def quantised(self) -> bool:
        """Whether they are stored in fewer bits than anything computes in."""
        return any(part.quantised for part in self.parts) or bool(self.blocks) or self.dtype in EIGHT_BITS

    @property
    def encoded(self) -> bool:
        """Whether its bytes are more than numbers of a dtype."""
        return self.quantised or self.scale is not None

    @property
    def read_dtype(self) -> torch.dtype:
        """What ``decoded`` gives."""
        if self.parts:
            return self.parts[0].read_dtype
        return torch.float32 if self.encoded else self.dtype

    def piece(self, start: int, shape: tuple[int, ...], *, transposed: bool = False) -> TensorRef | None:
        """``shape`` of its numbers from ``start`` on; None where they are no whole blocks, or no rows of a scale's."""
        numbers, size = self.unit
        count, scale = math.prod(shape), self.scale
        if self.parts or self.transposed or start % numbers or count % numbers:
            return None
        if scale is not None and scale.numel > 1:
            row = self.numel // self.shape[0]
            if start % row or count % row:
                return None
            scale = scale.piece(start // row, (count // row,))
        offset = self.offset + start // numbers * size
        return self._replace(offset=offset, shape=shape, transposed=transposed, scale=scale)

    def rows(self, first: int, last: int) -> TensorRef | None:
        """Rows ``first`` to ``last``; None as for ``piece``."""
        shape = (last - first, *self.shape[1:])
        if not self.parts:
            return self.piece(first * math.prod(self.shape[1:]), shape)
        found, top = [], 0
        for part in self.parts:
            begin, end = max(first - top, 0), min(last - top, part.shape[0])
            top += part.shape[0]
            if begin < end:
                found.append(part.rows(begin, end))
        if None in found:
            return None
        return found[0] if len(found) == 1 else self._replace(shape=shape, parts=tuple(found))


def ref_of(path: Path, offset: int, kind: str, shape: tuple[int, ...]) -> TensorRef:
    """Of a tensor whose ``kind`` is as its file names it."""
    if kind in DTYPES:
        return TensorRef(path, offset, DTYPES[kind], shape)
    return TensorRef(path, offset, torch.float32, shape, blocks=kind)


def decoded(ref: TensorRef, raw: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The numbers in ``raw`` (uint8, whole units), in one dimension, of ``ref.read_dtype``.

    Args:
        scale: float32, one or one for each of the rows that ``raw`` is.
    """
    if ref.blocks:
        found = torch.from_numpy(numbers_of(raw.numpy(), ref.blocks))
    elif ref.dtype in EIGHT_BITS:  # torch's own conversion is several times slower
        found = torch.index_select(_eight_bits(ref.dtype), 0, raw.to(torch.int32))
    else:
        found = raw.view(ref.dtype)
    if scale is None:
        return found
    return (found.float().view(len(scale), -1) * scale[:, None]).view(-1)


@cache
def _eight_bits(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()
