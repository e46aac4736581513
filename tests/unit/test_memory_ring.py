"""The ring of reused bytes: live ranges never meet, first in is first out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stages.memory.stream import _Ring


@given(st.integers(1, 200), st.lists(st.one_of(st.none(), st.integers(1, 120)), max_size=200))
def test_live_ranges_never_overlap(size: int, operations: list[int | None]) -> None:
    """``None`` releases the oldest range, a number asks for that many bytes."""
    ring, live = _Ring(size), []
    for wanted in operations:
        if wanted is None:
            if live:
                live.pop(0)
                ring.release()
            continue
        start = ring.allocate(wanted)
        if start is None:
            assert live or wanted > size, "an empty ring must have room for anything up to its size"
            continue
        assert start >= 0 and start + wanted <= size
        assert all(end <= start or start + wanted <= begin for begin, end in live)
        live.append((start, start + wanted))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=50))
def test_one_reader_never_starves(sizes: list[int]) -> None:
    """With room for the two largest neighbours, a unit and its successor are always in memory together."""
    pair = max(a + b for a, b in zip(sizes, [*sizes[1:], sizes[0]], strict=True))
    ring = _Ring(2 * pair)
    order = sizes * 3
    assert ring.allocate(order[0]) is not None
    for following in order[1:]:
        assert ring.allocate(following) is not None
        ring.release()
