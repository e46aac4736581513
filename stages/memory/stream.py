"""Block-major weight streaming: a stock model on the meta device runs with only a few blocks' weights in memory.

Each unit's ``forward`` is wrapped: wait for its weights, run all samples of the group through it in micro-batches,
give the buffer back, while a thread reads the units that come next into a ring of reused bytes. The model's own
``forward`` is stock code and sees the whole group as one batch, so weights are read once per pass, not once per tile.

The micro-batch never depends on the budget: the same samples meet the same kernels whatever the group size is, and
so the picture is the same at every budget.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import nn

from stages.memory.lanes import ALONE, Lanes
from stages.memory.layout import Layout, owner
from stages.memory.micro import micro_batched
from stages.memory.source import WeightSource
from stages.memory.trim import Pieces
from stages.memory.units import Unit, within


class _Ring:
    """First-in first-out allocation of contiguous ranges in a fixed number of bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.used = nbytes, deque[tuple[int, int]]()

    def allocate(self, size: int) -> int | None:
        """Start of ``size`` free bytes, or None while there is no room."""
        start: int | None = 0
        if self.used:
            first, (newest, last) = self.used[0][0], self.used[-1]
            if newest < first:  # wrapped: the free bytes lie between the newest and the oldest range
                start = last if first - last >= size else None
            elif self.nbytes - last >= size:
                start = last
            else:
                start = 0 if first >= size else None
        if start is None or start + size > self.nbytes:
            return None
        self.used.append((start, start + size))
        return start

    def release(self) -> None:
        self.used.popleft()


class WeightStreamer:
    """Keeps the weights of ``units`` in memory only while they are needed.

    Args:
        model: stock module on the meta device; buffers are real.
        layout: its packed layout, in the compute dtype.
        units: in the order in which one pass calls them.
        source: where the bytes come from.
        resident: names of units that are loaded once and stay.
        ring_bytes: size of the ring for all others; at least the largest of them.
        micro_batch: samples that go through a unit at a time; 0 runs the whole batch.
        lanes: that take micro-batches in turns.
        trim_above: RES over which memory that is free goes back at the end of a unit; 0: always.
        mark: told the name of the unit that runs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout,
        units: Sequence[Unit],
        source: WeightSource,
        resident: frozenset[str] = frozenset(),
        ring_bytes: int = 0,
        micro_batch: int = 0,
        lanes: Lanes = ALONE,
        trim_above: int = 0,
        mark: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.layout, self.source = model, layout, source
        self.micro_batch, self._lanes, self._mark = micro_batch, lanes, mark
        self._pieces = Pieces(trim_above)
        resident |= {unit.name for unit in units if unit.nested}
        self._streamed = [unit for unit in units if unit.name not in resident]
        largest = max((unit.nbytes for unit in self._streamed), default=0)
        if self._streamed and ring_bytes < largest:
            raise ValueError(f"the ring holds {ring_bytes} bytes, but the largest unit has {largest}")
        self._targets = {unit.name: [(*owner(model, slot.name), slot) for slot in unit.slots] for unit in units}
        self._held: dict[str, int] = {}
        self._parts: dict[nn.Module, list[Unit]] = {}  # of a module that was held: streamed units inside or around it
        self._private: dict[str, torch.Tensor] = {}
        self._inside = False
        self.waited = 0.0  # seconds that a pass stood still for weights
        self._load_resident([unit for unit in units if unit.name in resident])
        self._ring = _Ring(ring_bytes)
        self._arena = torch.empty(ring_bytes if self._streamed else 0, dtype=torch.uint8)
        self._ready: deque[tuple[int, int]] = deque()  # (index in _streamed, start in the arena)
        self._next = 0  # index that the reader takes next
        self._reading: int | None = None
        self._condition = threading.Condition()
        self._error: BaseException | None = None
        self._closing = False
        self._position = {unit.name: i for i, unit in enumerate(self._streamed)}
        for unit in within(units, model):
            self._wrap(unit)
        for unit in self._streamed:
            self._drop(unit)  # meta weights of the compute dtype: ``model.dtype`` is asked before the first load
        self._thread: threading.Thread | None = None
        if self._streamed:
            threads = torch.get_num_threads()
            started = threading.Event()
            self._thread = threading.Thread(target=self._read_ahead, args=(started,), daemon=True, name="weights")
            self._thread.start()
            started.wait()
            torch.set_num_threads(threads)  # the reader has set its own to one, which reaches MKL's global setting

    # -- loading ------------------------------------------------------------------------------------------------

    def _assign(self, unit: Unit, packed: torch.Tensor) -> None:
        for parent, name, slot in self._targets[unit.name]:
            view = slot.view(packed, unit.start)
            parent._parameters[name] = nn.Parameter(view, requires_grad=False)

    def _drop(self, unit: Unit) -> None:
        for parent, name, slot in self._targets[unit.name]:
            empty = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
            parent._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def _load_resident(self, units: Sequence[Unit]) -> None:
        for unit in units:
            packed = torch.empty(unit.nbytes, dtype=torch.uint8)
            self.source.read(unit.slots, unit.start, packed)
            self._assign(unit, packed)

    def _read_ahead(self, started: threading.Event) -> None:
        torch.set_num_threads(1)
        started.set()
        while True:
            with self._condition:
                start = None
                while not self._closing:
                    unit = self._streamed[self._next]
                    start = self._ring.allocate(unit.nbytes)
                    if start is not None:
                        break
                    self._condition.wait()
                if self._closing:
                    return
                index = self._reading = self._next
                self._next = (self._next + 1) % len(self._streamed)
            assert start is not None
            try:
                self.source.read(unit.slots, unit.start, self._arena[start : start + unit.nbytes])
            except BaseException as error:  # handed to the thread that waits for these weights
                with self._condition:
                    self._error = error
                    self._condition.notify_all()
                return
            with self._condition:
                self._reading = None
                self._ready.append((index, start))
                self._condition.notify_all()

    def _acquire(self, unit: Unit) -> None:
        """Wait until the weights of ``unit`` are in the ring and give them to its module."""
        wanted, begin = self._position[unit.name], time.monotonic()
        with self._condition:
            while True:
                while self._ready and self._ready[0][0] != wanted:
                    self._ready.popleft()
                    self._ring.release()
                    self._condition.notify_all()
                if self._ready:
                    _, start = self._ready.popleft()
                    break
                if self._error is not None:
                    raise RuntimeError(f"reading the weights of {unit.name} failed: {self._error}") from self._error
                if wanted not in (self._reading, self._next):
                    self._next = wanted  # called out of order: go on reading from here
                    self._condition.notify_all()
                self._condition.wait()
        self.waited += time.monotonic() - begin
        self._assign(unit, self._arena[start : start + unit.nbytes])

    def _release(self, unit: Unit) -> None:
        self._drop(unit)
        with self._condition:
            self._ring.release()
            self._condition.notify_all()

    @contextmanager
    def _loaded(self, unit: Unit) -> Iterator[None]:
        if unit.name not in self._position or self._held.get(unit.name):
            yield
            return
        self._acquire(unit)
        try:
            yield
        finally:
            self._release(unit)

    def graphed(self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """``call(*inputs)``, a whole pass; on a GPU it is replayed from a recording."""
        return call(*inputs)

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Keep the weights of all units inside ``module``, or around it, in memory: one read for many calls."""
        if (parts := self._parts.get(module)) is None:
            inside = {id(m) for m in module.modules()}
            around = (
                id(unit.module) in inside or any(m is module for m in unit.module.modules()) for unit in self._streamed
            )
            parts = self._parts[module] = list(compress(self._streamed, around))
        units = [unit for unit in parts if not self._held.get(unit.name)]
        for unit in units:
            packed = torch.empty(unit.nbytes, dtype=torch.uint8)
            self.source.read(unit.slots, unit.start, packed)
            self._assign(unit, packed)
            self._held[unit.name] = 1
        try:
            yield
        finally:
            for unit in units:
                self._held.pop(unit.name)
                self._drop(unit)

    # -- running ------------------------------------------------------------------------------------------------

    def _wrap(self, unit: Unit) -> None:
        forward = unit.module.forward

        def streamed(*args: Any, **kwargs: Any) -> Any:
            self._mark(unit.name)
            with self._loaded(unit):
                if self._inside or not self.micro_batch:
                    return forward(*args, **kwargs)
                self._inside = True
                try:
                    with self._pieces.kept():
                        return micro_batched(forward, args, kwargs, self.micro_batch, lanes=self._lanes)
                finally:
                    self._inside = False

        unit.module.forward = streamed  # type: ignore[method-assign]

    def close(self) -> None:
        """Stop reading and free the ring."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._lanes.close()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._pieces.give_back()
        self.source.close()

    def __enter__(self) -> WeightStreamer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
