"""Where packed weights come from: the checkpoint's own files (converted on the way), or a prepared copy of them
(:mod:`stages.memory.prepared`).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from stages.memory.layout import Slot
from stages.memory.refs import TensorRef, decoded
from stages.memory.tensors import pread_into, scale_of

STAGING_BYTES = 8 << 20  # raw bytes that are read at a time
DECODED = 1 << 17  # numbers of blocks that are made at a time: what a cache holds


class WeightSource(Protocol):
    """Fills ``packed`` (uint8, CPU) with bytes ``start`` to ``start + len(packed)`` of the layout."""

    def read(self, slots: Sequence[Slot], start: int, packed: torch.Tensor) -> None: ...

    def close(self) -> None: ...


def keep_cached() -> bool:
    """Whether what is read from a prepared copy may stay in the page cache: not under a cgroup that counts it."""
    return os.environ.get("HIGHRES_PAGE_CACHE") != "drop"


def advise(fd: int, offset: int, length: int, advice: str) -> None:
    """Tell the kernel about the page cache, where it listens (Linux)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, getattr(os, advice))


class CheckpointSource:
    """Reads the user's own files and converts to the layout's dtype and memory format; quantised numbers are read at
    their size and become numbers a few at a time.

    ``nbytes`` counts what has been read.
    """

    def __init__(self, tensors: Mapping[str, TensorRef], *, keep_cached: bool = False) -> None:
        self._tensors, self._keep_cached = tensors, keep_cached
        self._files: dict[Path, int] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()  # one staging buffer: the reader of units to come and a `hold` may meet here
        self.nbytes = 0

    def _fd(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def read(self, slots: Sequence[Slot], start: int, packed: torch.Tensor) -> None:
        with self._lock:
            for slot in slots:
                ref, target = self._tensors[slot.name], slot.view(packed, start)
                if not ref.shape:
                    self._read(ref, target.view(1))
                elif ref.parts:
                    for part, rows in zip(ref.parts, target.split([part.shape[0] for part in ref.parts]), strict=True):
                        self._read(part, rows)
                else:
                    self._read(ref, target.t() if ref.transposed else target)

    def _read(self, ref: TensorRef, target: torch.Tensor) -> None:
        """All numbers of ``ref`` into ``target``, row by row."""
        numbers, size = ref.unit
        rows, row = len(target), ref.numel // max(len(target), 1)
        together = numbers // math.gcd(numbers, row)  # rows that are whole units
        nbytes, scale = together * row // numbers * size, scale_of(ref)
        room = STAGING_BYTES // 4 if ref.encoded else STAGING_BYTES  # the rest is for what they become
        step = max(1, room // max(nbytes, 1)) * together
        part = max(1, DECODED // max(together * row, 1)) * together if ref.encoded else step
        fd, staging = self._fd(ref.file), self._room(min(step, rows) * row // numbers * size)
        for top in range(0, rows, step):
            count = min(step, rows - top)
            raw = staging[: count * row // numbers * size]
            offset = ref.offset + top * row // numbers * size
            pread_into(fd, offset, memoryview(raw.numpy()))
            self.nbytes += len(raw)
            for first in range(0, count, part):
                last = min(first + part, count)
                # the staging buffer starts aligned, whatever the offset in the file
                bits = raw[first * row // numbers * size : last * row // numbers * size]
                own = scale[top + first : top + last] if scale is not None and len(scale) > 1 else scale
                found = decoded(ref, bits, own)
                target[top + first : top + last].copy_(found.view(last - first, *target.shape[1:]))
            if not self._keep_cached:
                advise(fd, offset, len(raw), "POSIX_FADV_DONTNEED")

    def _room(self, nbytes: int) -> torch.Tensor:
        if nbytes > len(self._staging) or not len(self._staging):
            self._staging = torch.empty(max(nbytes, STAGING_BYTES), dtype=torch.uint8)
        return self._staging

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._staging = torch.empty(0, dtype=torch.uint8)
