"""What it takes to run a stage in a process of its own, wherever that is, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stages.events import Done, Error, Event
from stages.memory.monitor import Sample
from stages.workflow.errors import ended
from stages.workflow.graph import StageState

MEANWHILE = "another process computed it meanwhile"  # the reason of a stage that waited for a result
_NOT_STATS = ("name", "status", "reason", "fingerprint", "computed_seconds")
_TAIL = 20  # lines of a failed stage's log that are shown


class StageFailed(RuntimeError):
    """A stage process ended without a result; the message names stage, cause and remedy.

    ``refused``: its values cannot work, and going on with them cannot.
    """

    refused = False


class StageResult(NamedTuple):
    """What ``run.json`` says of a stage, and what the report draws. Sizes in bytes."""

    name: str
    status: str  # ran | reused | resumed
    reason: str
    seconds: float
    peak_rss_bytes: int
    peak_vram_bytes: int
    fingerprint: str
    peak_module: str = ""
    heaviest: tuple[tuple[str, int], ...] = ()
    timeline: tuple[Sample, ...] = ()
    ranks: int = 1
    waited_seconds: float = 0.0  # for weights, of ``seconds``
    gpus: tuple[int, ...] = ()  # peaks of those that it used: by rank, or by device
    marks: tuple[tuple[float, str], ...] = ()  # seconds since the start, what happened then
    computed_seconds: float = 0.0  # of a reused one: what it took when it was computed

    def stats(self) -> dict[str, Any]:
        """What the store remembers of a computation."""
        return {key: value for key, value in self._asdict().items() if key not in _NOT_STATS}


class StageProcess(Protocol):
    """A stage that was started. ``local.start`` makes one on this machine."""

    @property
    def timeline(self) -> Sequence[Sample]:
        """Its memory so far."""
        ...

    def watch(self, on_event: Callable[[Event], None]) -> StageResult:
        """Pass its events on until it has ended.

        Raises:
            StageFailed: it ended without a result.
        """
        ...

    def end(self) -> None:
        """Ask it and its children to end, then make them; nothing where it has ended."""
        ...


def reused(state: StageState) -> StageResult:
    """The result of a stage that did not have to run: no time now, the figures that were measured when it ran."""
    stats = state.entry.stats()
    result = StageResult(state.name, "reused", state.reason, 0.0, 0, 0, state.fingerprint)
    try:
        return result._replace(
            peak_rss_bytes=int(stats.get("peak_rss_bytes", 0)),
            peak_vram_bytes=int(stats.get("peak_vram_bytes", 0)),
            peak_module=str(stats.get("peak_module", "")),
            heaviest=tuple((str(name), int(size)) for name, size in stats.get("heaviest", [])),
            timeline=tuple(Sample(*sample) for sample in stats.get("timeline", [])),
            ranks=int(stats.get("ranks", 1)),
            waited_seconds=float(stats.get("waited_seconds", 0)),
            gpus=tuple(map(int, stats.get("gpus", []))),
            marks=tuple((float(seconds), str(text)) for seconds, text in stats.get("marks", [])),
            computed_seconds=float(stats.get("seconds", 0.0)),
        )
    except (TypeError, ValueError):  # not as we wrote it: they are figures only
        return result


def failure(stage: str, code: int, last: Done | Error | None, log: Path, module: str) -> str:
    """Why a stage has no result: its last word, its exit code, the end of its log, the module that ran last."""
    if isinstance(last, Error):
        if last.expected:
            return f"{stage}: {last.message}"
        cause = last.message
    else:
        cause = ended(code)
    where = f" (last module: {module})" if module else ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    tail = "".join(f"\n  | {line}" for line in lines)
    return f"{stage}: {cause}{where}\nlog: {log}{tail}"
