"""A prepared copy of a model's weights: exactly the layout's bytes, and behind them a digest of every piece.

A bit that flipped on the disk would change every later picture in silence, so a piece is checked when a process first
reads it; where one is damaged, the checkpoint is read instead, and the copy goes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from stages.memory.layout import Layout, Slot
from stages.memory.source import WeightSource, advise
from stages.memory.tensors import pread_into
from stages.plans import CHUNK

PIECE = 1 << 20  # bytes that have a digest of their own
DIGEST = 16  # bytes of one


def pieces(nbytes: int) -> int:
    """How many pieces so many bytes are."""
    return -(-nbytes // PIECE)


def prepared_bytes(layout: Layout) -> int:
    """Size of a prepared copy's file."""
    return layout.nbytes + pieces(layout.nbytes) * DIGEST


class PreparedSource:
    """Reads a prepared copy, so that a unit is one read with nothing to convert.

    Args:
        path, layout: the file, and what it holds.
        keep_cached: whether what is read may stay in the page cache.
        again: makes the source that the copy was made from, for when it is damaged. Without one damage is an OSError.
        note: told of damage.

    Raises:
        ValueError: a file of another size.
    """

    divisible = True  # any bytes can be read, whatever slots they belong to

    def __init__(
        self,
        path: Path,
        layout: Layout,
        *,
        keep_cached: bool = True,
        again: Callable[[], WeightSource] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        size = path.stat().st_size
        if size != prepared_bytes(layout):
            raise ValueError(f"{path}: {size} bytes, expected {prepared_bytes(layout)}. Delete it; it is made again.")
        self._path, self._layout, self._keep_cached = path, layout, keep_cached
        self._again, self._note = again, note
        self._fd = os.open(path, os.O_RDONLY)
        self._digests = bytearray(pieces(layout.nbytes) * DIGEST)
        pread_into(self._fd, layout.nbytes, memoryview(self._digests))
        self._unchecked = bytearray(b"\1") * pieces(layout.nbytes)
        self._whole: WeightSource | None = None  # what is read since damage was seen
        self._lock = threading.Lock()

    def read(self, slots: Sequence[Slot], start: int, packed: torch.Tensor) -> None:
        if self._whole is None:
            view = memoryview(packed.numpy())
            pread_into(self._fd, start, view)
            if self._intact(start, view):
                if not self._keep_cached:
                    advise(self._fd, start, len(packed), "POSIX_FADV_DONTNEED")
                return
            self._damaged(start)
        self._from_checkpoint(start, packed)

    def _intact(self, start: int, view: memoryview) -> bool:
        """Whether all pieces that ``view`` has bytes of are as they were written; each is looked at once."""
        end = start + len(view)
        for number in range(start // PIECE, pieces(end)):
            if not self._unchecked[number]:
                continue
            first, last = number * PIECE, min((number + 1) * PIECE, self._layout.nbytes)
            if start <= first and last <= end:
                found = hashlib.blake2b(view[first - start : last - start], digest_size=DIGEST)
            else:  # a neighbour's bytes are in it too
                piece = bytearray(last - first)
                pread_into(self._fd, first, memoryview(piece))
                found = hashlib.blake2b(piece, digest_size=DIGEST)
            if found.digest() != self._digests[number * DIGEST : (number + 1) * DIGEST]:
                return False
            self._unchecked[number] = 0
        return True

    def _damaged(self, start: int) -> None:
        with self._lock:
            if self._whole is not None:
                return
            said = f"{self._path} is damaged near byte {start}"
            if self._again is None:
                raise OSError(f"{said}. Delete it; it is made again.")
            self._note(f"warning: {said}; the checkpoint is read instead, and the copy is made again next time")
            self._path.unlink(missing_ok=True)
            self._whole = self._again()

    def _from_checkpoint(self, start: int, packed: torch.Tensor) -> None:
        """Whole parameters from the checkpoint, of which ``packed`` gets its bytes."""
        assert self._whole is not None
        layout, end = self._layout, start + len(packed)
        slots = list(layout.slots.values())
        ends = [slot.offset for slot in slots[1:]] + [layout.nbytes]
        for slot, slot_end in zip(slots, ends, strict=True):
            if slot.offset >= end or slot_end <= start:
                continue
            if start <= slot.offset and slot_end <= end:
                self._whole.read([slot], slot.offset, packed[slot.offset - start : slot_end - start])
                continue
            own = torch.zeros(slot_end - slot.offset, dtype=torch.uint8)
            self._whole.read([slot], slot.offset, own)
            first, last = max(start, slot.offset), min(end, slot_end)
            packed[first - start : last - start] = own[first - slot.offset : last - slot.offset]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        if self._whole is not None:
            self._whole.close()


def write_prepared(file: Path, source: WeightSource, layout: Layout, *, chunk: int = CHUNK) -> None:
    """Write the prepared copy of ``source`` to ``file``, holding about ``chunk`` bytes at a time."""
    slots = list(layout.slots.values())
    ends = [slot.offset for slot in slots[1:]] + [layout.nbytes]
    buffer, digests = torch.empty(0, dtype=torch.uint8), _Digests()
    with file.open("wb") as out:
        begin = 0
        while begin < len(slots):
            last = begin
            while last + 1 < len(slots) and ends[last + 1] - slots[begin].offset <= chunk:
                last += 1
            size = ends[last] - slots[begin].offset
            if len(buffer) < size:
                buffer = torch.empty(size, dtype=torch.uint8)
            packed = buffer[:size]
            packed.zero_()
            source.read(slots[begin : last + 1], slots[begin].offset, packed)
            out.write(packed.numpy())
            digests.add(memoryview(packed.numpy()))
            begin = last + 1
        out.write(digests.finish())


class _Digests:
    """Of a stream of bytes, piece by piece."""

    def __init__(self) -> None:
        self._found, self._now, self._held = bytearray(), hashlib.blake2b(digest_size=DIGEST), 0

    def add(self, view: memoryview) -> None:
        while view:
            count = min(len(view), PIECE - self._held)
            self._now.update(view[:count])
            self._held += count
            view = view[count:]
            if self._held == PIECE:
                self._end()

    def _end(self) -> None:
        self._found += self._now.digest()
        self._now, self._held = hashlib.blake2b(digest_size=DIGEST), 0

    def finish(self) -> bytes:
        if self._held:
            self._end()
        return bytes(self._found)
