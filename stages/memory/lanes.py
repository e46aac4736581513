"""Samples side by side: several threads, each of which computes samples of its own with its share of the cores.

A kernel that all cores share has parts that one of them does alone, and all wait for the last; samples know nothing of
each other. Two lanes take 0.6 to 0.95 of the time of two cores in one kernel after the other (``python -m benchmarks
lanes``), in as much memory: half of the samples, twice. What a lane computes depends on no other lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch

Result = TypeVar("Result")


def lanes_for(micro_batch: int, threads: int) -> int:
    """How many lanes a micro-batch goes through on so many threads: both are shared out evenly, whatever the budget."""
    return max(1, math.gcd(micro_batch, threads))


class Lanes:
    """``count`` of them: the thread that asks is one, the others wait for it in between."""

    def __init__(self, count: int = 1) -> None:
        self.count, self._threads = count, torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="lane") if count > 1 else None

    @property
    def share(self) -> int:
        """Threads of one lane."""
        return max(1, self._threads // self.count)

    def run(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """What each of at most ``count`` works gives; what one raises is raised when all have ended."""
        if self._pool is None:
            return [work() for work in works]
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        torch.set_num_threads(self.share)  # before the others begin: it reaches MKL's global setting
        try:
            others = [self._pool.submit(self._work, work, modes) for work in works[1:]]
            try:
                first = works[0]()
            finally:
                wait(others)
            return [first, *(one.result() for one in others)]
        finally:
            torch.set_num_threads(self._threads)

    def _work(self, work: Callable[[], Result], modes: tuple[bool, bool]) -> Result:
        torch.get_num_threads()  # a thread takes the process' number when it first asks: its own holds from then on
        torch.set_num_threads(self.share)
        inference, grad = modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


ALONE = Lanes()
