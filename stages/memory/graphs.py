"""A pass over a model as CUDA graphs, one from each unit with streamed weights to the next.

Launching a block's kernels one by one takes longer than the GPU takes to run them on a few tiles. Between two graphs
the host is free to wait for weights, so a pass can be replayed wherever they come from.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Recording:
    """Captures what runs on the current stream; ``cut`` ends one graph and begins the next."""

    def __init__(self, pool: Any) -> None:
        self._pool, self._open = pool, False
        self.graphs: list[tuple[int | None, torch.cuda.CUDAGraph]] = []  # the unit each begins with

    def begin(self, unit: int | None) -> None:
        graph = torch.cuda.CUDAGraph()
        # the threads that read weights go on meanwhile, so only this one's calls are watched
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self.graphs.append((unit, graph))
        self._open = True

    def end(self) -> None:
        """Of the graph that has begun, if it could."""
        if self._open:
            self._open = False
            self.graphs[-1][1].capture_end()

    def cut(self, unit: int) -> None:
        self.end()
        self.begin(unit)


class Captured(NamedTuple):
    """A recorded pass, the tensors it reads and the one it leaves its result in."""

    graphs: list[tuple[int | None, torch.cuda.CUDAGraph]]
    inputs: list[Tensor]
    output: Tensor

    def replay(self, inputs: Sequence[Tensor], around: Callable[[int | None, Callable[[], None]], None]) -> Tensor:
        """The pass for ``inputs``; ``around(unit, launch)`` launches a graph when its unit's weights are there."""
        for target, value in zip(self.inputs, inputs, strict=True):
            target.copy_(value)
        for unit, graph in self.graphs:
            around(unit, graph.replay)
        return self.output


class Captures:
    """Recorded passes by the shapes of their inputs; they share one pool of memory and one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._known: dict[tuple[Any, ...], Captured] = {}
        self._room = True
        self.recording: Recording | None = None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run on the stream of the captures, in order with what the caller's stream does before and after."""
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    def of(self, call: Callable[..., Tensor], inputs: Sequence[Tensor], prepare: Callable[[], None]) -> Captured | None:
        """The pass ``call(*inputs)``, recorded at the first use of these shapes, after ``prepare()``.

        None where the memory that is allowed cannot hold a recorded pass, whose pool has holes that nothing may move:
        from then on no pass is recorded.
        """
        key = tuple((tuple(value.shape), value.dtype, value.stride()) for value in inputs)
        if self._room and key not in self._known:
            made = self._record(call, [value.clone() for value in inputs], prepare)
            if made is None:
                self._room = False
                self.clear()
            else:
                self._known[key] = made
        return self._known.get(key)

    def _record(
        self, call: Callable[..., Tensor], inputs: list[Tensor], prepare: Callable[[], None]
    ) -> Captured | None:
        prepare()
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # the graphs have a pool of their own; what the other one holds is of no use to them
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self.recording = recording = Recording(self._pool)
        output: Tensor | None = None
        try:
            recording.begin(None)
            output = call(*inputs)
        except torch.OutOfMemoryError:
            pass  # said by what is returned; the pass runs without a record, where all that is free can be used
        finally:
            self.recording = None
            recording.end()
        return None if output is None else Captured(recording.graphs, inputs, output)

    def clear(self) -> None:
        """Forget all recorded passes and give their memory back."""
        if self._pool is not None:
            torch.cuda.synchronize(self.device)
            self._known.clear()
            self._pool = None
            gc.collect()
            torch.cuda.empty_cache()
