"""Where packed weights come from: the checkpoint's own files (converted on the way), or a prepared copy of them
(:mod:`stages.memory.prepared`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from stages.memory.layout import Layout, Slot
from stages.memory.tensors import TensorRef, pread_into

STAGING_BYTES = 8 << 20  # raw bytes that are converted at a time


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
    """Reads the user's safetensors files and converts to the layout's dtype and memory format."""

    def __init__(self, tensors: Mapping[str, TensorRef], layout: Layout, *, keep_cached: bool = False) -> None:
        self._tensors, self._layout, self._keep_cached = tensors, layout, keep_cached
        self._files: dict[Path, int] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()  # one staging buffer: the reader of units to come and a `hold` may meet here

    def _fd(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def read(self, slots: Sequence[Slot], start: int, packed: torch.Tensor) -> None:
        with self._lock:
            self._read(slots, start, packed)

    def _read(self, slots: Sequence[Slot], start: int, packed: torch.Tensor) -> None:
        if not len(self._staging):
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        for slot in slots:
            ref = self._tensors[slot.name]
            target = slot.view(packed, start, self._layout.dtype)
            target = target.t() if ref.transposed else target
            fd = self._fd(ref.file)
            rows = ref.file_shape[0] if ref.shape else 1
            row_bytes = ref.nbytes // max(rows, 1)
            if row_bytes > len(self._staging):
                self._staging = torch.empty(row_bytes, dtype=torch.uint8)
            step = max(1, len(self._staging) // max(row_bytes, 1))
            for row in range(0, rows, step):
                count = min(step, rows - row)
                raw = self._staging[: count * row_bytes]
                offset = ref.offset + row * row_bytes
                pread_into(fd, offset, memoryview(raw.numpy()))
                # the staging buffer starts aligned, whatever the offset in the file
                part = raw.view(ref.dtype).view(count, *ref.file_shape[1:])
                (target[row : row + count] if ref.shape else target.view(1)).copy_(part)
                if not self._keep_cached:
                    advise(fd, offset, len(raw), "POSIX_FADV_DONTNEED")

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._staging = torch.empty(0, dtype=torch.uint8)
