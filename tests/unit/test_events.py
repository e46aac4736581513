"""Events cross the process border as they are; what is no event is refused, naming what is wrong."""

import pytest

from stages.events import Advance, Done, Error, Note, Resumed, Start, from_line, to_line

EVENTS = [
    Start(20, "steps", 7),
    Advance(3),
    Note("a ü\n介绍"),
    Resumed("step 7 of 20"),
    Done("ran", 500_000_000, [7, 9], 1),
    Error("the disk is full", False, 28),
    Error("seed: got -1", True),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_there_and_back(event):
    line = to_line(event)
    assert line.endswith("\n") and line.count("\n") == 1 and line.isascii()
    assert from_line(line) == event


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "Strat", "total": 1}', r"got 'Strat', expected one of Start, Advance"),
        ('{"total": 1}', r"got None, expected one of Start"),
        ('{"event": ["Start"]}', r"got \['Start'\], expected one of Start"),
        ('{"event": "Advance", "count": 1}', r"event Advance: got count, expected n"),
        ('{"event": "Done", "status": "ran"}', r"event Done: got status, expected status, peak_rss_bytes"),
        ('{"event": "Note"}', r"event Note: got nothing, expected text"),
        ("[1]", r"expected a JSON object"),
        ('{"event": "No', r"Unterminated"),
    ],
)
def test_what_is_no_event_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        from_line(line)
