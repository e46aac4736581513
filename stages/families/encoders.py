"""What ``text_encode`` hands to a family: the checkpoint, and its encoders, opened one after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from stages.models.checkpoint import Checkpoint
from stages.models.loading import Streamer


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """``open(component)`` is a context that gives the component's streamer; one at a time.

    ``start`` announces how many texts will be encoded, ``advance`` that so many more are, ``note`` tells the person.
    """

    checkpoint: Checkpoint
    open: Callable[[str], AbstractContextManager[Streamer]]
    device: str
    start: Callable[[int], None]
    advance: Callable[[int], None]
    note: Callable[[str], None]
