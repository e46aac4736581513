"""What a stage says while it works, and its last word: the same dataclasses on both sides of the process border."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields


@dataclass(frozen=True)
class Start:
    """``total`` pieces of work named ``unit`` ('steps', 'tiles'), ``done`` of them finished before."""

    total: int
    unit: str
    done: int = 0


@dataclass(frozen=True)
class Advance:
    """``n`` more pieces are finished."""

    n: int


@dataclass(frozen=True)
class Note:
    """A line that the person sees."""

    text: str


@dataclass(frozen=True)
class Resumed:
    """The stage goes on from a checkpoint; ``reason`` says from where ('step 7 of 20')."""

    reason: str


@dataclass(frozen=True)
class Done:
    """The last word of a stage whose result is there. ``status``: ran | resumed | reused. Sizes in bytes.

    ``waited_seconds``: for weights (of a GPU it is not known: 0).

    Every rank has one: ``gpus`` are the peaks of the devices that it used.
    """

    status: str
    peak_rss_bytes: int
    gpus: list[int] = field(default_factory=list)
    rank: int = 0
    waited_seconds: float = 0.0


@dataclass(frozen=True)
class Error:
    """The last word of a stage that failed. ``expected``: the message says all that there is to say."""

    message: str
    expected: bool
    errno: int | None = None


Event = Start | Advance | Note | Resumed | Done | Error
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Start, Advance, Note, Resumed, Done, Error)}


def to_line(event: Event) -> str:
    """One line of JSON in ASCII, with its line break: ``{"event": "Note", "text": "..."}``."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=True) + "\n"


def from_line(line: str) -> Event:
    """The event that :func:`to_line` wrote.

    Raises:
        ValueError: no JSON object, an unknown kind, an unknown key, a missing one.
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"event: got {line.strip()[:80]!r}, expected a JSON object")
    name = values.pop("event", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"event: got {name!r}, expected one of {', '.join(_KINDS)}")
    known = [one.name for one in fields(kind)]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"event {name}: got {', '.join(unknown)}, expected {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:  # a key is missing
        raise ValueError(f"event {name}: got {', '.join(values) or 'nothing'}, expected {', '.join(known)}") from error
