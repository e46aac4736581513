"""Samples side by side: several threads, each of which computes samples of its own with its share of the cores.

A kernel that all cores share has parts that one of them does alone, and all wait for the last; samples know nothing of
each other. Two lanes take 0.65 to 0.95 of the time of two cores in one kernel after the other (``python -m benchmarks
lanes``), in as much memory. What comes of a sample depends on no other lane; the threads of a kernel may change its
last bits, as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

PARTS = 2  # of a micro-batch: with fewer samples at a time kernels take longer
Item = TypeVar("Item")


def part_of(micro_batch: int) -> int:
    """Samples of a micro-batch that go through a kernel at a time, however many lanes there are."""
    return max(1, micro_batch // PARTS)


def lanes_for(micro_batch: int, threads: int) -> int:
    """That share out a micro-batch: a thread each, or several."""
    return max(1, min(threads, math.ceil(micro_batch / part_of(micro_batch)))) if micro_batch else 1


class Lanes:
    """``count`` of them: the thread that asks is one, the others wait for it in between."""

    def __init__(self, count: int = 1) -> None:
        self.count, self._threads = count, torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="lane") if count > 1 else None

    def share(self, lane: int) -> int:
        """Threads of a lane; they may be one more than those of another."""
        return max(1, (self._threads + self.count - 1 - lane) // self.count)

    def each(self, items: Iterable[Item], *works: Callable[[Item], Any]) -> None:
        """Every item once, by the lane that comes to it. ``works``: of each lane its own, or one of all. What one
        raises is raised when all have ended."""
        left = iter(items)

        def lane(number: int) -> None:
            work = works[number % len(works)]
            for item in left:  # the next one that no other lane has taken
                work(item)

        if self._pool is None:
            return lane(0)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        torch.set_num_threads(self.share(0))  # before the others begin: it reaches MKL's global setting
        try:
            others = [self._pool.submit(self._run, lane, number, *modes) for number in range(1, self.count)]
            try:
                lane(0)
            finally:
                wait(others)
            for one in others:
                one.result()
        finally:
            torch.set_num_threads(self._threads)

    def _run(self, lane: Callable[[int], None], number: int, inference: bool, grad: bool) -> None:
        torch.get_num_threads()  # a thread takes the process' number when it first asks: its own holds from then on
        torch.set_num_threads(self.share(number))
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            lane(number)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


ALONE = Lanes()
