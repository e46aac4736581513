"""One pass on the meta device: what a model needs, before any weight is read.

Live bytes are followed storage by storage through every operation, with only the first micro-batch of each unit run.
Two group sizes give every operation's live bytes as a straight line in the number of micro-batches, so the peak of any
group size is known from one profile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stages.memory.imports import meta_kernels
from stages.memory.lanes import Lanes
from stages.memory.micro import micro_batched, nbytes, skips
from stages.memory.planner import Line
from stages.memory.shapes import Shapes
from stages.memory.units import Unit, within

_aten = torch.ops.aten
# Ops whose CPU kernel copies the weight into a blocked layout on every call: (op packet, index of the weight); matrix
# products copy a part of it at a time, measured (``python -m benchmarks products``).
_REORDERS = {_aten.convolution: 1, _aten.addmm: 2, _aten.mm: 1, _aten.linear: 1}
PACKED = 0.4
VECTOR = 64  # numbers of a head that attention packs at a time


@dataclass(kw_only=True)
class Event:
    """One operation: the unit it ran in, bytes of activations alive after it, bytes its kernel needs besides, and those
    of the unit's result, which is there from its second micro-batch on."""

    unit: str
    live: int
    workspace: int
    gathered: int = 0

    @property
    def peak(self) -> int:
        return self.live + self.workspace + self.gathered


@dataclass(kw_only=True)
class Trace:
    """A pass: its operations in order, the units in order of use, and floating-point operations.

    ``flops`` are of one micro-batch in a unit; ``outside``, by the unit that ran before, are those between units
    (attention itself, where its projections are units), of the whole group. ``given``: bytes of what all units give
    and of what is made between them; ``parked``: those that wait elsewhere.
    """

    events: list[Event] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    given: int = 0
    parked: int = 0

    def flops_of(self, unit: str, micro_batches: int) -> int:
        """What one micro-batch costs from this unit to the next, the pass being of ``micro_batches``."""
        return self.flops.get(unit, 0) + self.outside.get(unit, 0) // micro_batches


class _AttentionOnMeta(TorchFunctionMode):
    """The CPU and GPU kernels are linear in memory; the meta device would fall back to the quadratic formula."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention_shape(
                *args, **{k: v for k, v in (kwargs or {}).items() if k in ("query", "key", "value")}
            )
        return func(*args, **(kwargs or {}))


def _attention_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    mode = _current
    result = query.new_empty((*query.shape[:-1], value.shape[-1]))
    if mode is not None:
        *batch, length, width = query.shape
        mode.add_flops(4 * int(torch.Size(batch).numel()) * length * key.shape[-2] * width)
        if query.element_size() == 2:  # the CPU kernel packs keys, and values padded to whole vectors
            padded = -(-value.shape[-1] // VECTOR) * VECTOR
            mode.trace.events[-1].workspace += (key.nbytes // width + value.nbytes // value.shape[-1]) * padded
        if _cur_sdpa_kernel_backends() == [SDPBackend.MATH]:  # which keeps the scores, and what softmax makes of them
            scores = query.new_empty((2, *query.shape[:-1], key.shape[-2]))
            del scores
    return result


_current: _Follower | None = None
_shapes = Shapes()


def count(flops: int) -> None:
    """Add what a loop costs of which the meta pass runs the first turn only."""
    if _current is not None:
        _current.add_flops(flops)


class _Follower(TorchDispatchMode):
    """Counts live bytes of storages made while it is on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace, self.unit, self.live = Trace(), "", 0
        self.times = 1.0  # that what runs is run
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._followed: dict[int, weakref.finalize] = {}
        self._weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def enter_unit(self, name: str) -> None:
        self.unit = name
        self.trace.order.append(name)

    def add_flops(self, count: int) -> None:
        last = self.trace.order[-1] if self.trace.order else ""
        into, unit = (self.trace.flops, self.unit) if self.unit else (self.trace.outside, last)
        into[unit] = into.get(unit, 0) + int(count * self.times)

    def _gone(self, nbytes: int) -> None:
        self.live -= nbytes

    def forget(self, tensor: torch.Tensor) -> None:
        """It is elsewhere from now on."""
        storage = tensor.untyped_storage()
        if self._followed.pop(storage._cdata).detach():
            self.live -= storage.nbytes()

    def _follow(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self._known and key not in self._weights:
                self._known[key] = storage
                self.live += storage.nbytes()
                if not self.unit:
                    self.trace.given += storage.nbytes()
                self._followed[key] = weakref.finalize(storage, self._gone, storage.nbytes())
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow(item)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = _shapes.run(func, args, kwargs or {})
        self._follow(result)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.add_flops(int(flop_registry[packet](*args, **(kwargs or {}), out_val=result)))
        workspace = 0
        if packet in _REORDERS:
            weight = args[_REORDERS[packet]]
            workspace = weight.numel() * weight.element_size()
            workspace = workspace if packet is _aten.convolution else int(PACKED * workspace)
        self.trace.events.append(Event(unit=self.unit, live=self.live, workspace=workspace))
        return result


def trace(
    model: nn.Module,
    units: Sequence[Unit],
    call: Callable[[], Any],
    micro_batch: int,
    parked: Collection[str] = (),
    part: int = 0,
    lanes: int = 1,
) -> Trace:
    """Run ``call`` (a forward of ``model`` on meta tensors made inside it) and follow it.

    Units run their first micro-batch only; what they return has the size of the whole group. The skip connections that
    ``parked`` units give wait elsewhere. ``part`` (0: all) samples of a micro-batch go through a kernel at a time, in
    so many ``lanes``.
    """
    global _current
    meta_kernels()
    part, together = part or micro_batch, _Following(lanes)
    follower = _Follower(model)
    originals = {unit.name: unit.module.forward for unit in units}
    inside = False

    def wrap(unit: Unit) -> None:
        forward = originals[unit.name]

        def followed(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            outer = follower.unit
            follower.enter_unit(unit.name)
            try:
                if inside or not micro_batch:
                    return forward(*args, **kwargs)
                inside, begin, before = True, len(follower.trace.events), follower.live
                follower.times = micro_batch / part
                first: list[int] = []  # (operations until then, bytes) of the first micro-batch

                def one(*args: Any, **kwargs: Any) -> Any:
                    found = forward(*args, **kwargs)
                    first[:] = len(follower.trace.events), nbytes(found)
                    return found

                try:
                    result = micro_batched(one, args, kwargs, part, lanes=together, only_first=True)
                finally:
                    inside, follower.times = False, 1.0
                _gather(
                    follower.trace.events[begin:],
                    first[0] - begin,
                    before,
                    nbytes(result),
                    first[1],
                    lanes,
                    part < micro_batch,
                )
                follower.trace.given += nbytes(result)
                if unit.name in parked:
                    for tensor in skips(result):
                        follower.forget(tensor)
                        follower.trace.parked += tensor.nbytes
                return result
            finally:
                follower.unit = outer

        unit.module.forward = followed  # type: ignore[method-assign]

    for unit in within(units, model):
        wrap(unit)
    _current = follower
    try:
        with torch.no_grad(), _AttentionOnMeta(), follower:  # inference mode would hide convolutions and products
            call()
    finally:
        _current = None
        for unit in units:
            unit.module.forward = originals[unit.name]  # type: ignore[method-assign]
    return follower.trace


class _Following(Lanes):
    """Lanes of which only the first one runs, in the thread that is followed, as on its share of the cores."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def each(self, items: Iterable[Any], *works: Callable[[Any], Any]) -> None:
        torch.set_num_threads(self.share(0))
        try:
            super().each(items, *works)
        finally:
            torch.set_num_threads(self._threads)


def _gather(events: Sequence[Event], inner: int, before: int, whole: int, part: int, lanes: int, always: bool) -> None:
    """The first ``inner`` of a unit's ``events`` are of one part of the samples: what was alive ``before`` is there
    once, all else once for each lane. The result of ``whole`` bytes, of more than its ``part``, is there from the
    second part on: beside the first micro-batch too (``always``), if that has several."""
    for number, event in enumerate(events):
        if number < inner:
            event.live, event.workspace = before + lanes * (event.live - before), lanes * event.workspace
            if always:
                event.live += whole
            elif whole > part:
                event.gathered = whole
        else:
            event.live += (lanes - 1) * part


def segments(two: Trace, three: Trace) -> list[Line]:
    """Lines through the traces of two and of three micro-batches; dominated lines of a unit are left out.

    Where a network makes a loop over samples, more of them are more operations: then one line through the peaks.
    """
    best: dict[tuple[str, int, int, int], int] = {}
    for unit, some, more in _stretches(two.events, three.events):
        if len(some) != len(more):
            some, more = ([max(events, key=lambda event: event.peak)] for events in (some, more))
        for a, b in zip(some, more, strict=True):
            slope, grown = b.live - a.live, b.workspace - a.workspace  # of kernels over the group, between units
            key = (unit, a.live - 2 * slope, slope + grown, b.gathered - a.gathered)
            best[key] = max(best.get(key, 0), a.workspace - 2 * grown)
    lines = [Line(unit=u, fixed=f, slope=s, workspace=w, gathered=g) for (u, f, s, g), w in best.items()]
    kept = []
    for unit in dict.fromkeys(line.unit for line in lines):
        mine = [line for line in lines if line.unit == unit]
        tops = {max(mine, key=lambda line, n=n: line.peak(n)).peak(n): n for n in (1, 2, 4, 8, 16, 32, 64)}
        chosen = {id(max(mine, key=lambda line, n=n: line.peak(n))) for n in tops.values()}
        kept += [line for line in mine if id(line) in chosen]
    return kept


def _stretches(two: Sequence[Event], three: Sequence[Event]) -> Iterator[tuple[str, list[Event], list[Event]]]:
    """(unit, its operations in one trace, in the other) for each time that a unit, or what lies between, runs."""
    found = [[(unit, list(run)) for unit, run in groupby(events, lambda event: event.unit)] for events in (two, three)]
    if [unit for unit, _ in found[0]] != [unit for unit, _ in found[1]]:
        raise RuntimeError(f"traces differ: {len(two)} and {len(three)} operations")
    for (unit, some), (_, more) in zip(*found, strict=True):
        yield unit, some, more
