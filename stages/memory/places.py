"""Fixed places for a cycle of units in a ring of bytes: what a copy has to wait for is known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where a unit lies in the ring, and the unit (counted over all passes) that must be done with before it comes."""

    offset: int
    after: int | None


class Places:
    """The places of ``sizes`` bytes, pass after pass, in ``ring_bytes``.

    Units are laid one behind the other, from 0 again where the rest is too short; every pass begins at 0.

    Raises:
        ValueError: the largest unit is larger than the ring.
    """

    def __init__(self, sizes: Sequence[int], ring_bytes: int) -> None:
        if sizes and max(sizes) > ring_bytes:
            raise ValueError(f"the ring holds {ring_bytes} bytes, but the largest unit has {max(sizes)}")
        self.count = len(sizes)
        spans: list[tuple[int, int]] = []
        for _ in range(2):
            end = 0
            for size in sizes:
                start = end if end + size <= ring_bytes else 0
                end = start + size
                spans.append((start, end))
        self._two_passes = []
        for index, (start, end) in enumerate(spans):
            earlier = (j for j in range(index - 1, -1, -1) if spans[j][0] < end and start < spans[j][1])
            self._two_passes.append(Place(start, next(earlier, None)))

    def __getitem__(self, number: int) -> Place:
        """Of unit ``number``, counted over all passes."""
        if number < self.count:
            return self._two_passes[number]
        place = self._two_passes[self.count + number % self.count]
        assert place.after is not None  # at least the same unit, a pass before
        return Place(place.offset, place.after + (number // self.count - 1) * self.count)
