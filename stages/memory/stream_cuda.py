"""Block-major weight streaming on a GPU: the same units, with copies on a side stream and no allocation per block.

Every unit has a fixed place in a ring of device bytes, so its parameters are views made once, and what a copy has to
wait for (the unit whose bytes it overwrites) is known before anything runs: it waits on the device, never on the host.
From pinned host memory a whole pass, copies included, is one CUDA graph. From disk, threads read ahead into a pinned
ring while the GPU works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.memory.layout import Layout, Unit, owner
from stages.memory.source import WeightSource
from stages.memory.stream import micro_batched

READERS = 6  # threads that read one unit from disk together
_PIECE = 4 << 20  # least bytes a thread reads


class Place(NamedTuple):
    """Where a unit lies in the ring, and the unit (counted over all passes) that must have run before it is copied."""

    offset: int
    after: int | None


def ring_places(sizes: Sequence[int], ring_bytes: int) -> tuple[list[Place], list[Place]]:
    """Places of the units of a first and of any later pass; ``after`` of a later pass is relative to its first unit.

    Units are laid one behind the other, from 0 again where the rest is too short; every pass begins at 0.
    """
    if sizes and max(sizes) > ring_bytes:
        raise ValueError(f"the ring holds {ring_bytes} bytes, but the largest unit has {max(sizes)}")
    spans: list[tuple[int, int]] = []
    for _ in range(2):
        end = 0
        for size in sizes:
            start = end if end + size <= ring_bytes else 0
            end = start + size
            spans.append((start, end))
    places = []
    for index, (start, end) in enumerate(spans):
        earlier = (j for j in range(index - 1, -1, -1) if spans[j][0] < end and start < spans[j][1])
        places.append(Place(start, next(earlier, None)))
    count = len(sizes)
    later = [Place(p.offset, None if p.after is None else p.after - count) for p in places[count:]]
    return places[:count], later


class CudaStreamer:
    """Runs ``model`` on ``device`` with the weights of ``units`` in a ring.

    Args:
        model, layout, units, source, micro_batch, mark: as for :class:`stages.memory.stream.WeightStreamer`.
        resident: names of units that stay on the device.
        ring_bytes: device bytes for all others; at least the largest.
        host: ``pinned`` (weights stay in pinned memory) or ``disk`` (read for every pass).
        staging_bytes: pinned bytes for ``disk``; at least the largest unit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout,
        units: Sequence[Unit],
        source: WeightSource,
        device: torch.device | str,
        resident: frozenset[str] = frozenset(),
        ring_bytes: int = 0,
        micro_batch: int = 0,
        host: str = "pinned",
        staging_bytes: int = 512 << 20,
        mark: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.layout, self.source, self.device = model, layout, source, torch.device(device)
        self.micro_batch, self.host, self._mark = micro_batch, host, mark
        resident |= {unit.name for unit in units if unit.nested}
        self._streamed = [unit for unit in units if unit.name not in resident]
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._inside = False
        for name, buffer in model.named_buffers():
            parent, last = owner(model, name)
            parent._buffers[last] = buffer.to(self.device)
        self._keep = [self._place_resident(unit) for unit in units if unit.name in resident]
        sizes = [unit.nbytes for unit in self._streamed]
        self._first, self._later = ring_places(sizes, ring_bytes)
        self._ring = torch.empty(ring_bytes if sizes else 0, dtype=torch.uint8, device=self.device)
        for unit, place in zip(self._streamed, self._first, strict=True):
            self._assign(unit, self._ring[place.offset : place.offset + unit.nbytes])
        self._copies = torch.cuda.Stream(self.device)
        self._ready = [torch.cuda.Event() for _ in sizes]
        self._done = [torch.cuda.Event() for _ in sizes]
        self._ran = self._issued = 0  # units so far, over all passes
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self._graph_pool: Any = None
        self._capturing = False
        for index, unit in enumerate(self._streamed):
            self._wrap(unit, index)
        for unit in units:
            if unit.name in resident:
                self._wrap(unit, None)
        self._condition = threading.Condition()
        self._error: BaseException | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        if host == "pinned":
            self._weights = self._load_pinned()
        elif sizes:
            if staging_bytes < max(sizes):
                raise ValueError(f"staging holds {staging_bytes} bytes, but the largest unit has {max(sizes)}")
            self._staging = torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=True)
            self._thread = threading.Thread(target=self._read_ahead, daemon=True, name="weights")
            self._thread.start()

    # -- places -------------------------------------------------------------------------------------------------

    def _assign(self, unit: Unit, packed: Tensor) -> None:
        for slot in unit.slots:
            parent, name = owner(self.model, slot.name)
            view = slot.view(packed, unit.start, self.layout.dtype)
            parent._parameters[name] = nn.Parameter(view, requires_grad=False)

    def _read(self, unit: Unit, packed: Tensor) -> None:
        """Read a unit into host memory, its slots shared out among threads."""
        parts: list[list[Any]] = [[]]
        for slot in unit.slots:
            if parts[-1] and slot.offset - parts[-1][0].offset >= max(_PIECE, unit.nbytes // READERS):
                parts.append([])
            parts[-1].append(slot)
        ends = [part[0].offset for part in parts[1:]] + [unit.end]

        def read(part: list[Any], end: int) -> None:
            begin = part[0].offset
            self.source.read(part, begin, packed[begin - unit.start : end - unit.start])

        for future in [self._pool.submit(read, part, end) for part, end in zip(parts, ends, strict=True)]:
            future.result()

    def _place_resident(self, unit: Unit) -> Tensor:
        packed = torch.empty(unit.nbytes, dtype=torch.uint8)
        self._read(unit, packed)
        on_device = packed.to(self.device)
        self._assign(unit, on_device)
        return on_device

    def _load_pinned(self) -> list[Tensor]:
        loaded = []
        for unit in self._streamed:
            packed = torch.empty(unit.nbytes, dtype=torch.uint8, pin_memory=True)
            self._read(unit, packed)
            loaded.append(packed)
        return loaded

    # -- copies -------------------------------------------------------------------------------------------------

    def _after(self, number: int) -> int | None:
        """The unit (over all passes) that must have run before unit ``number`` is copied."""
        count = len(self._streamed)
        base = number // count * count
        places = self._first if self._capturing or base == 0 else self._later
        after = places[number % count].after
        return None if after is None else base + after

    def _copy(self, number: int, packed: Tensor) -> None:
        index = number % len(self._streamed)
        after = self._after(number)
        place, unit = self._first[index], self._streamed[index]
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(self._done[after % len(self._streamed)])
            self._ring[place.offset : place.offset + unit.nbytes].copy_(packed, non_blocking=True)
            self._ready[index].record(self._copies)

    def _issue(self, last: int) -> None:
        """From pinned memory: start all copies up to the end of unit ``last``'s pass whose bytes are free."""
        count = len(self._streamed)
        end = (last // count + 1) * count
        while self._issued < end:
            after = self._after(self._issued)
            if after is not None and after >= self._ran:
                return
            self._copy(self._issued, self._weights[self._issued % count])
            self._issued += 1

    def _read_ahead(self) -> None:
        """From disk: read units one after the other, over all passes, as far as both rings have room."""
        try:
            with torch.cuda.device(self.device), torch.inference_mode():  # the mode is a thread's own
                self._read_forever()
        except BaseException as error:  # handed to the thread that waits for these weights
            with self._condition:
                self._error = error
                self._condition.notify_all()

    def _read_forever(self) -> None:
        sizes = [unit.nbytes for unit in self._streamed]
        first, later = ring_places(sizes, len(self._staging))
        copied = [torch.cuda.Event() for _ in sizes]
        number = 0
        while True:
            index, places = number % len(sizes), first if number < len(sizes) else later
            unit, place = self._streamed[index], places[index]
            if place.after is not None:  # those staging bytes must have left for the device
                copied[place.after % len(sizes)].synchronize()
            packed = self._staging[place.offset : place.offset + unit.nbytes]
            self._read(unit, packed)
            with self._condition:
                after = self._after(number)
                while not self._closing and after is not None and self._ran <= after:
                    self._condition.wait()
                if self._closing:
                    return
                self._copy(number, packed)
                copied[index].record(self._copies)
                self._issued = number = number + 1
                self._condition.notify_all()

    # -- running ------------------------------------------------------------------------------------------------

    def _wait(self, number: int) -> None:
        if self._thread is None:
            self._issue(number)
        else:
            with self._condition:
                while self._issued <= number and self._error is None:
                    self._condition.wait()
                if self._error is not None:
                    raise RuntimeError(f"reading weights failed: {self._error}") from self._error
        torch.cuda.current_stream(self.device).wait_event(self._ready[number % len(self._streamed)])

    def _finish(self, number: int) -> None:
        self._done[number % len(self._streamed)].record(torch.cuda.current_stream(self.device))
        if self._thread is None:
            self._ran = number + 1
            self._issue(number)
        else:
            with self._condition:
                self._ran = number + 1
                self._condition.notify_all()

    def _wrap(self, unit: Unit, index: int | None) -> None:
        forward = unit.module.forward

        def streamed(*args: Any, **kwargs: Any) -> Any:
            self._mark(unit.name)
            number = None
            if index is not None:
                number = self._ran
                if number % len(self._streamed) != index:
                    raise RuntimeError(f"{unit.name} was called out of order; units must be given in order of use")
                self._wait(number)
            try:
                if self._inside or not self.micro_batch:
                    return forward(*args, **kwargs)
                self._inside = True
                try:
                    return micro_batched(forward, args, kwargs, self.micro_batch)
                finally:
                    self._inside = False
            finally:
                if number is not None:
                    self._finish(number)

        unit.module.forward = streamed  # type: ignore[method-assign]

    def graphed(self, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``call(*inputs)``, a whole pass, replayed as one CUDA graph from the second call of these shapes on.

        The result is valid until the next call. Weights must be pinned or resident.
        """
        if self._thread is not None:
            return call(*inputs)
        key = tuple((tuple(x.shape), x.dtype, x.stride()) for x in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(call, inputs)
        graph, static, output = self._graphs[key]
        for target, value in zip(static, inputs, strict=True):
            target.copy_(value)
        graph.replay()
        return output

    def _capture(self, call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Any:
        static = [value.clone() for value in inputs]
        # libraries set themselves up, which a capture does not allow: two samples are enough, and take little memory
        call(*(value[:2] if value.dim() else value for value in static))
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph has a pool of its own; what the other one holds is of no use to it
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._ran = self._issued = 0
        self._capturing = True
        try:
            with torch.cuda.graph(graph, pool=self._graph_pool):
                self._copies.wait_stream(torch.cuda.current_stream(self.device))
                output = call(*static)
                torch.cuda.current_stream(self.device).wait_stream(self._copies)
        finally:
            self._capturing = False
            self._ran = self._issued = 0
        return graph, static, output

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """As :meth:`WeightStreamer.hold`; here only for models that are resident."""
        if self._streamed:
            raise RuntimeError("hold() needs a resident model on a GPU")
        yield

    def close(self) -> None:
        """Stop reading; free the ring."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
        torch.cuda.synchronize(self.device)
        self._graphs.clear()
        self._pool.shutdown()
        self.source.close()

    def __enter__(self) -> CudaStreamer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
