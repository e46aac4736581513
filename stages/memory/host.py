"""Packed weights in pinned host memory, from where a GPU copies them: all, or read from disk pass after pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.memory.layout import Slot
from stages.memory.places import Places
from stages.memory.source import WeightSource
from stages.memory.units import Unit

READERS = 8  # threads that read from disk together
PIECE = 4 << 20  # bytes that a thread reads at a time
BLOCK = 256 << 20  # bytes that are pinned at a time: the allocator would round other sizes up to a power of two


class Reader:
    """Reads units with several threads."""

    def __init__(self, source: WeightSource, threads: int = READERS) -> None:
        self.source = source
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")

    def start(self, unit: Unit, packed: Tensor) -> list[Future[None]]:
        """Begin to fill ``packed`` with ``unit``; it is there when all that is returned has ended."""
        return [
            self._pool.submit(self._read, slots, begin, packed[begin - unit.start : end - unit.start])
            for slots, begin, end in self._pieces(unit)
        ]

    def read(self, unit: Unit, packed: Tensor) -> None:
        for future in self.start(unit, packed):
            future.result()

    def _read(self, slots: Sequence[Slot], begin: int, packed: Tensor) -> None:
        with torch.inference_mode():  # the mode is a thread's own, and ``packed`` may have been made in it
            self.source.read(slots, begin, packed)

    def _pieces(self, unit: Unit) -> Iterator[tuple[list[Slot], int, int]]:
        """(slots, first byte, end): where a source takes any bytes, by size alone; else whole slots."""
        if getattr(self.source, "divisible", False):
            for begin in range(unit.start, unit.end, PIECE):
                yield [], begin, min(begin + PIECE, unit.end)
            return
        part: list[Slot] = []
        for slot in unit.slots:
            if part and slot.offset - part[0].offset >= PIECE:
                yield part, part[0].offset, slot.offset
                part = []
            part.append(slot)
        yield part, part[0].offset, unit.end

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.source.close()


class HostWeights(Protocol):
    """Units by their number, counted over all passes, each asked for once and in order."""

    def ready(self, number: int) -> bool:
        """Whether ``packed`` would not wait."""
        ...

    def packed(self, number: int) -> Tensor:
        """The unit's bytes, valid until the copy that ``copied`` announces has been made."""
        ...

    def copied(self, number: int, stream: Any) -> None:
        """The copy of the unit has been queued on ``stream``."""
        ...

    def close(self) -> None: ...


class PinnedWeights:
    """All units stay in pinned memory."""

    def __init__(self, units: Sequence[Unit], reader: Reader, *, pin: bool = True) -> None:
        self._packed: list[Tensor] = []
        block, used = torch.empty(0, dtype=torch.uint8), 0
        for unit in units:
            if used + unit.nbytes > len(block):
                block, used = torch.empty(max(BLOCK, unit.nbytes), dtype=torch.uint8, pin_memory=pin), 0
            self._packed.append(block[used : used + unit.nbytes])
            used += unit.nbytes
            reader.read(unit, self._packed[-1])

    def ready(self, number: int) -> bool:
        return True

    def packed(self, number: int) -> Tensor:
        return self._packed[number % len(self._packed)]

    def copied(self, number: int, stream: Any) -> None:
        pass

    def close(self) -> None:
        self._packed = []


class DiskWeights:
    """Units are read ahead, over all passes, into a pinned ring of ``nbytes`` bytes.

    ``event`` makes what marks the end of a copy (``torch.cuda.Event``): ``record(stream)`` and ``synchronize()``.
    """

    def __init__(self, units: Sequence[Unit], reader: Reader, nbytes: int, event: Any, *, pin: bool = True) -> None:
        self._units, self._reader = units, reader
        self._places = Places([unit.nbytes for unit in units], nbytes)
        self._ring = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
        self._events = [event() for _ in units]
        self._copied = -1  # the last unit whose copy is queued
        self._reads: dict[int, tuple[Tensor, list[Future[None]]]] = {}
        self._condition = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, daemon=True, name="weights")
        self._thread.start()

    def _read_ahead(self) -> None:
        number = 0
        try:
            while self._wait_for_room(number):
                unit, offset = self._units[number % len(self._units)], self._places[number].offset
                packed = self._ring[offset : offset + unit.nbytes]
                started = self._reader.start(unit, packed)
                with self._condition:
                    self._reads[number] = packed, started
                    self._condition.notify_all()
                number += 1
        except BaseException as error:  # handed to the thread that waits for these weights
            with self._condition:
                self._error = error
                self._condition.notify_all()

    def _wait_for_room(self, number: int) -> bool:
        """Until the bytes of unit ``number`` have left for the device; False when it is time to end."""
        after = self._places[number].after
        with self._condition:
            while after is not None and self._copied < after and not self._closing:
                self._condition.wait()
            if self._closing:
                return False
        if after is not None:
            self._events[after % len(self._units)].synchronize()
        return True

    def ready(self, number: int) -> bool:
        with self._condition:
            return number in self._reads and all(future.done() for future in self._reads[number][1])

    def packed(self, number: int) -> Tensor:
        with self._condition:
            while number not in self._reads:
                if self._error is not None:
                    raise RuntimeError(f"reading weights failed: {self._error}") from self._error
                self._condition.wait()
            packed, started = self._reads[number]
        for future in started:
            try:
                future.result()
            except OSError as error:
                name = self._units[number % len(self._units)].name
                raise RuntimeError(f"reading the weights of {name} failed: {error}") from error
        return packed

    def copied(self, number: int, stream: Any) -> None:
        self._events[number % len(self._units)].record(stream)
        with self._condition:
            self._copied = number
            del self._reads[number]
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()
