"""Block-major weight streaming on a GPU: the same units, with copies on a side stream and no allocation per block.

Every unit has a fixed place in a ring of device bytes, so its parameters are views made once, and what a copy has to
wait for (the unit whose bytes it overwrites) is known before anything runs: it waits on the device, never on the host.
A pass is replayed as CUDA graphs (:mod:`stages.memory.graphs`), unless the budget has no room for their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stages.memory.graphs import Captures
from stages.memory.host import DiskWeights, HostWeights, PinnedWeights, Reader
from stages.memory.layout import Layout, owner
from stages.memory.micro import empty_like, mapped, micro_batched, on_meta, skips
from stages.memory.places import Places
from stages.memory.source import WeightSource
from stages.memory.units import Unit, within

STAGING_BYTES = 512 << 20  # pinned bytes that disk reads go to


class CudaStreamer:
    """Runs ``model`` on ``device`` with the weights of ``units`` in a ring.

    Args:
        model, layout, units, source, micro_batch, mark: as for :class:`stages.memory.stream.WeightStreamer`.
        resident: names of units that stay on the device.
        ring_bytes: device bytes for all others; at least the largest.
        host: ``pinned`` (weights stay in pinned memory) or ``disk`` (read for every pass).
        staging_bytes: pinned bytes for ``disk``; at least the largest unit.
        parked: units whose skip connections wait in pinned memory for the unit that reads them.
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
        staging_bytes: int = STAGING_BYTES,
        parked: frozenset[str] = frozenset(),
        mark: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.layout, self.source, self.device = model, layout, source, torch.device(device)
        self.micro_batch, self._mark, self._parked = micro_batch, mark, parked
        self._pin = self.device.type == "cuda"
        self._results: dict[str, Any] = {}  # of units, on meta
        self._parking: dict[tuple[str, int], Tensor] = {}
        self._outgrown: list[Tensor] = []  # graphs may still write there
        self._warm: set[int] = set()  # samples that went through units at once before
        resident |= {unit.name for unit in units if unit.nested}
        self._streamed = [unit for unit in units if unit.name not in resident]
        self._reader = Reader(source)
        self._inside = False
        for name, buffer in model.named_buffers():
            parent, last = owner(model, name)
            parent._buffers[last] = buffer.to(self.device)
        for unit in units:
            if unit.name in resident:
                self._load(unit)
        sizes = [unit.nbytes for unit in self._streamed]
        self._places = Places(sizes, ring_bytes)
        self._ring = torch.empty(ring_bytes if sizes else 0, dtype=torch.uint8, device=self.device)
        for index, unit in enumerate(self._streamed):
            offset = self._places[index].offset
            self._assign(unit, self._ring[offset : offset + unit.nbytes])
        self._copies = torch.cuda.Stream(self.device)
        self._ready = [torch.cuda.Event() for _ in sizes]
        self._done = [torch.cuda.Event() for _ in sizes]
        self._ran = self._issued = 0  # units so far, over all passes
        self._captures = Captures(self.device)
        numbers = {unit.name: index for index, unit in enumerate(self._streamed)}
        for unit in within(units, model):
            self._wrap(unit, numbers.get(unit.name))
        self._host: HostWeights | None = None
        if sizes and host == "pinned":
            self._host = PinnedWeights(self._streamed, self._reader, pin=self._pin)
        elif sizes:
            self._host = DiskWeights(self._streamed, self._reader, staging_bytes, torch.cuda.Event, pin=self._pin)

    # -- weights ------------------------------------------------------------------------------------------------

    def _assign(self, unit: Unit, packed: Tensor) -> None:
        for slot in unit.slots:
            parent, name = owner(self.model, slot.name)
            view = slot.view(packed, unit.start)
            parent._parameters[name] = nn.Parameter(view, requires_grad=False)

    def _load(self, unit: Unit) -> None:
        packed = torch.empty(unit.nbytes, dtype=torch.uint8)
        self._reader.read(unit, packed)
        self._assign(unit, packed.to(self.device))

    def _issue(self, until: int) -> None:
        """Queue copies in order: up to unit ``until`` whatever it takes, then as far as weights and bytes are there."""
        assert self._host is not None
        while True:
            number, place = self._issued, self._places[self._issued]
            if place.after is not None and place.after >= self._ran:
                return
            if number > until and not self._host.ready(number):
                return
            index = number % len(self._streamed)
            target = self._ring[place.offset : place.offset + self._streamed[index].nbytes]
            packed = self._host.packed(number)
            with torch.cuda.stream(self._copies):
                if place.after is not None:
                    self._copies.wait_event(self._done[place.after % len(self._streamed)])
                target.copy_(packed, non_blocking=True)
                self._ready[index].record(self._copies)
            self._host.copied(number, self._copies)
            self._issued = number + 1

    def _around(self, index: int | None, run: Callable[[], Any]) -> Any:
        """Run a unit, queued behind the copy of its weights."""
        if index is None:
            return run()
        number = self._ran
        if number % len(self._streamed) != index:
            expected = self._streamed[number % len(self._streamed)].name
            raise RuntimeError(f"{self._streamed[index].name} was called out of order: it was the turn of {expected}")
        self._issue(number)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._ready[index])
        try:
            return run()
        finally:
            self._done[index].record(stream)
            self._ran = number + 1
            self._issue(number)

    # -- running ------------------------------------------------------------------------------------------------

    def _wrap(self, unit: Unit, index: int | None) -> None:
        forward = unit.module.forward

        def streamed(*args: Any, **kwargs: Any) -> Any:
            self._mark(unit.name)

            def run() -> Any:
                if self._inside or not self.micro_batch:
                    return forward(*args, **kwargs)
                self._inside = True
                try:
                    whole, size = partial(self._whole, unit.name), self.micro_batch
                    result = micro_batched(forward, args, kwargs, size, whole=whole, device=self.device)
                    if unit.name not in self._results:
                        self._results[unit.name] = on_meta(result)
                    return result
                finally:
                    self._inside = False

            recording = self._captures.recording
            if recording is None:
                return self._around(index, run)
            if index is not None:
                recording.cut(index)
            return run()

        unit.module.forward = streamed  # type: ignore[method-assign]

    def graphed(self, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``call(*inputs)``, a whole pass, replayed as CUDA graphs, where there is memory for these.

        Tensors with dimensions hold a sample a row. The result is valid until the next call.
        """
        count = next(value.shape[0] for value in inputs if value.dim())

        def prepare() -> None:
            """Let libraries set themselves up for the shapes that kernels will meet; capturing does not allow it."""
            size = min(self.micro_batch or count, count)
            if cold := {size, count % size or size} - self._warm:
                self._captures.clear()  # their memory is needed now; they are recorded again
                for rows in sorted(cold):
                    call(*(value[:rows] if value.dim() else value for value in inputs))
                self._warm |= cold
            for name in self._parked & self._results.keys():
                for index, like in enumerate(skips(self._results[name])):
                    self._park((name, index), like, count)

        with self._captures.stream():
            captured = self._captures.of(call, inputs, prepare)
            return call(*inputs) if captured is None else captured.replay(inputs, self._around)

    def _whole(self, name: str, count: int) -> Any:
        """Tensors for what unit ``name`` gives for ``count`` samples; None while its shapes are not known."""
        if name not in self._results:
            return None
        parked = [id(tensor) for tensor in skips(self._results[name])] if name in self._parked else []

        def made(like: Tensor) -> Tensor:
            if id(like) in parked:
                return self._park((name, parked.index(id(like))), like, count)
            return empty_like(like, count, self.device)

        return mapped(made, self._results[name])

    def _park(self, key: tuple[str, int], like: Tensor, count: int) -> Tensor:
        held = self._parking.get(key)
        if held is None or len(held) < count:
            self._outgrown += [] if held is None else [held]
            strides = empty_like(like, count, torch.device("meta")).stride()
            shape = (count, *like.shape[1:])
            held = torch.empty_strided(shape, strides, dtype=like.dtype, pin_memory=self._pin)
            self._parking[key] = held
        return held[:count]

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """As :meth:`WeightStreamer.hold`; here only for models that are resident."""
        if self._streamed:
            raise RuntimeError("hold() needs a resident model on a GPU")
        yield

    def close(self) -> None:
        """Stop reading; free the graphs."""
        if self._host is not None:
            self._host.close()
        torch.cuda.synchronize(self.device)
        self._captures.clear()
        self._reader.close()

    def __enter__(self) -> CudaStreamer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
