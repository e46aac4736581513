"""Block-major weight streaming on a GPU: the same units, with copies on a side stream and no allocation per block.

Every unit has a fixed place in a ring of device bytes, so its parameters are views made once, and what a copy has to
wait for (the unit whose bytes it overwrites) is known before anything runs: it waits on the device, never on the host.
A pass is replayed as CUDA graphs (:mod:`stages.memory.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.memory.graphs import Captures
from stages.memory.host import DiskWeights, HostWeights, PinnedWeights, Reader
from stages.memory.layout import Layout, Unit, owner
from stages.memory.places import Places
from stages.memory.source import WeightSource
from stages.memory.stream import micro_batched

STAGING_BYTES = 512 << 20  # pinned bytes that disk reads go to


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
        staging_bytes: int = STAGING_BYTES,
        mark: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.layout, self.source, self.device = model, layout, source, torch.device(device)
        self.micro_batch, self._mark = micro_batch, mark
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
        for unit in units:
            self._wrap(unit, numbers.get(unit.name))
        self._host: HostWeights | None = None
        if sizes and host == "pinned":
            self._host = PinnedWeights(self._streamed, self._reader, pin=self.device.type == "cuda")
        elif sizes:
            event, pin = torch.cuda.Event, self.device.type == "cuda"
            self._host = DiskWeights(self._streamed, self._reader, staging_bytes, event, pin=pin)

    # -- weights ------------------------------------------------------------------------------------------------

    def _assign(self, unit: Unit, packed: Tensor) -> None:
        for slot in unit.slots:
            parent, name = owner(self.model, slot.name)
            view = slot.view(packed, unit.start, self.layout.dtype)
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
                    return micro_batched(forward, args, kwargs, self.micro_batch)
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
        """``call(*inputs)``, a whole pass, replayed as CUDA graphs.

        Tensors with dimensions hold a sample a row. The result is valid until the next call.
        """

        def warm_up(*values: Tensor) -> None:
            count = next(value.shape[0] for value in values if value.dim())
            size = self.micro_batch or count
            for rows in {min(size, count), count % size or size}:  # the shapes that kernels will meet
                call(*(value[:rows] if value.dim() else value for value in values))

        with self._captures.stream():
            return self._captures.of(call, inputs, warm_up).replay(inputs, self._around)

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
