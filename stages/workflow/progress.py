"""What a person sees: a bar per stage on a terminal, plain lines elsewhere, nothing with ``progress=false``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from stages.events import Advance, Event, Note, Resumed, Start
from stages.workflow.launch import StageResult

_EVERY = 2.0  # seconds between two plain lines of a stage


def megabytes(size: int | None) -> str:
    """``612 MB``; a dash where nothing was measured."""
    return f"{size / 1e6:.0f} MB" if size else "-"


def duration(seconds: float) -> str:
    """``4.2 s`` or ``3 min 05 s``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


class Silent:
    """Shows nothing but the end; the base of the others."""

    def begin(self, stage: str, reason: str) -> None:
        """A stage starts, for this reason."""

    def event(self, stage: str, event: Event) -> None:
        """A stage said something (see ``context.Progress``)."""

    def end(self, result: StageResult) -> None:
        """A stage is done or was reused."""

    def line(self, text: str) -> None:
        """A line of the run's own."""

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, at the end or of a plan."""

    def close(self) -> None:
        """Leave the terminal in order."""

    def final(self, path: str) -> None:
        """Where the picture is: the one line that is always printed."""
        print(path, flush=True)


class Mute(Silent):
    """Nothing at all."""

    def final(self, path: str) -> None:
        """Where the picture would be is nobody's question."""


class Plain(Silent):
    """Lines: start, at most one every two seconds, end."""

    def __init__(self, speaker: str = "") -> None:
        self.speaker = speaker
        self.total, self.done, self.unit, self.first, self.printed, self.began = 0, 0, "", 0, 0.0, 0.0

    def begin(self, stage: str, reason: str) -> None:
        self.total, self.done, self.unit = 0, 0, ""
        self.line(f"{stage}: starts ({reason})")

    def event(self, stage: str, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Start():
                self.total, self.done, self.unit = event.total, event.done, event.unit
                self.first, self.began, self.printed = self.done, now, now
            case Advance(n):
                self.done += n
                if now - self.printed >= _EVERY:
                    self.printed = now
                    speed = (self.done - self.first) / max(now - self.began, 1e-9)
                    left = duration((self.total - self.done) / speed) if speed else "?"
                    self.line(f"{stage}: {self.done}/{self.total} {self.unit}, {speed:.2f}/s, {left} left")
            case Note(text):
                self.line(f"{stage}: {text}")
            case Resumed(reason):
                self.line(f"{stage}: goes on ({reason})")

    def end(self, result: StageResult) -> None:
        if result.status == "reused":
            self.line(f"{result.name}: reused ({result.reason})")
        else:
            took = f"{duration(result.seconds)}, peak {megabytes(result.peak_rss_bytes)}"
            self.line(f"{result.name}: done in {took}")

    def line(self, text: str) -> None:
        print(f"{self.speaker}{text}", flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [list(header), *[list(row) for row in rows]]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        for line in lines:
            self.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Bars(Plain):
    """rich bars, one per stage, with speed and remaining time."""

    def __init__(self) -> None:
        from rich import progress

        columns = [progress.TextColumn("{task.description:12}"), progress.BarColumn(bar_width=30)]
        columns += [progress.TextColumn("{task.fields[count]}"), progress.TimeElapsedColumn()]
        columns += [progress.TextColumn("{task.fields[left]}")]
        super().__init__()
        self.bars = progress.Progress(*columns, refresh_per_second=5)
        self.task: Any = None

    def begin(self, stage: str, reason: str) -> None:
        super().begin(stage, reason)
        self.task = self.bars.add_task(stage, total=None, count="starts", left="")
        self.bars.start()

    def event(self, stage: str, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Start():
                self.total, self.done, self.unit = event.total, event.done, event.unit
                self.first, self.began = self.done, now
                count = f"{self.done}/{self.total} {self.unit}"
                self.bars.update(self.task, total=self.total, completed=self.done, count=count)
            case Advance(n):
                self.bars.advance(self.task, n)
                self.done += n
                speed = (self.done - self.first) / max(now - self.began, 1e-9)
                left = f"{duration((self.total - self.done) / speed)} left" if speed and self.done < self.total else ""
                count = f"{self.done}/{self.total} {self.unit} {speed:.2f}/s"
                self.bars.update(self.task, count=count, left=left)
            case _:
                super().event(stage, event)

    def end(self, result: StageResult) -> None:
        self.close()
        super().end(result)

    def line(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.task is not None:
            self.bars.stop()
            self.bars.remove_task(self.task)
            self.task = None


def reporter(wanted: bool, speaker: str = "") -> Silent:
    """The reporter that fits: ``progress=false`` is silent, a terminal gets bars, all else lines, and so do several
    runs that speak at once, each line with its ``speaker``."""
    if not wanted:
        return Silent()
    return Bars() if sys.stdout.isatty() and not speaker else Plain(speaker)
