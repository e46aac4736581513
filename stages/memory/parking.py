"""Activations of several passes that stand still by turns: those of all but one wait in a file.

What an operation makes is followed as long as a turn runs. When it is parked, bytes go to the file and memory is handed
back; the tensors stay what they are, and an operation that is given one of them brings its bytes back. So a skip
connection is written once and read once, however often the pass stands still in between.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.memory.imports import light_imports
from stages.memory.raw import pread_into, pwrite_all

LEAST = 4096  # bytes: what is smaller stays


class Parking(TorchDispatchMode):
    """Follows CPU storages; on while a turn runs. ``file`` loses its name when it is open: a killed run leaves none."""

    _ready = False  # whether an operation has run under it: the first one would import the graph compiler, 77 MB

    def __init__(self, file: Path) -> None:
        super().__init__()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        file.unlink()
        self._end, self._free = 0, dict[int, list[int]]()  # places by their size
        self._live: dict[Hashable, dict[int, Any]] = {}  # turn -> weak references to storages
        self._known: dict[int, Hashable] = {}  # storage -> turn
        self._parked: dict[int, tuple[int, int]] = {}  # storage -> (offset, bytes)
        self._turn: Hashable = None
        if not Parking._ready:
            Parking._ready = True
            with light_imports(), self:
                torch.empty(0)

    @contextmanager
    def turn(self, name: Hashable) -> Iterator[None]:
        """What is made belongs to ``name``."""
        self._turn = name
        with self:
            yield

    def park(self, name: Hashable) -> None:
        """What belongs to ``name`` and is still there waits in the file."""
        for reference in list(self._live.get(name, {}).values()):
            if (storage := reference()) is not None and storage._cdata not in self._parked and storage.resizable():
                self._leave(storage)

    def close(self) -> None:
        """Give the disk back."""
        os.close(self._descriptor)

    def _leave(self, storage: Any) -> None:
        nbytes = storage.nbytes()
        places = self._free.get(nbytes)
        offset = places.pop() if places else self._end
        self._end = max(self._end, offset + nbytes)
        pwrite_all(self._descriptor, offset, _bytes(storage))
        storage.resize_(0)
        self._parked[storage._cdata] = offset, nbytes

    def _bring(self, storage: Any) -> None:
        offset, nbytes = self._parked.pop(storage._cdata)
        storage.resize_(nbytes)
        pread_into(self._descriptor, offset, _bytes(storage))
        self._free.setdefault(nbytes, []).append(offset)

    def _gone(self, key: int) -> None:
        self._live[self._known.pop(key)].pop(key)
        if place := self._parked.pop(key, None):
            self._free.setdefault(place[1], []).append(place[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given: set[int] = set()
        for storage in _storages((*args, *(kwargs or {}).values())):
            given.add(storage._cdata)
            if storage._cdata in self._parked:
                self._bring(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result if isinstance(result, list | tuple) else (result,)):
            key = storage._cdata
            if key not in self._known and key not in given and storage.nbytes() >= LEAST:
                self._known[key] = self._turn
                self._live.setdefault(self._turn, {})[key] = weakref.ref(storage)
                weakref.finalize(storage, self._gone, key).atexit = False
        return result


def _storages(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu" and not value.is_mkldnn:  # such a one is a weight that a ring has
                yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(value)


def _bytes(storage: Any) -> memoryview:
    """Not by way of an array, after which a storage could not be resized."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
