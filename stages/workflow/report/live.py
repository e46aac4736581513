"""A run's page from its first second to its last: written when it starts, told of every second, final when it ends.

The page loads ``report/live.js`` again and again, which a thread writes anew. A command that was killed leaves one that
is old, and the page says since when.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.events import Advance, Event, Note, Resumed, Start
from stages.files import write_json, write_text
from stages.job import Job
from stages.plans import StagePlan
from stages.workflow.graph import StageState
from stages.workflow.launch import StageProcess, StageResult
from stages.workflow.report import rows
from stages.workflow.report.page import render
from stages.workflow.report.summary import summary

FOLDER = "report"  # of a run: what its page loads while the run lives
PERIOD = 1.0  # seconds between two states
_POINTS = 200  # of a stage's line while it lives
_PREVIEWS = ("guide/lowres.png", f"{FOLDER}/preview_*.png")


class Live:
    """The page of one run. ``command`` goes on with it, ``typed`` makes it from nothing."""

    def __init__(self, run_dir: Path, job: Job, states: Sequence[StageState], command: str, typed: str) -> None:
        self._dir, self._job, self._commands = run_dir, job, {"command": command, "typed": typed}
        self._states = [state for state in states if state.status != "skip"]
        self._plans: Mapping[str, StagePlan] = {}
        self._results: dict[str, StageResult] = {}
        self._drawn: dict[str, dict[str, Any]] = {}  # rows of those, for every second
        self._now, self._process, self._note = "", None, ""
        self._total, self._done, self._unit, self._first, self._since = 0, 0, "", 0, 0.0
        self._began, self._lock, self._ended = time.time(), threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="report", daemon=True)

    def __enter__(self) -> Live:
        """Write the page, and begin to say how it goes."""
        for old in (self._dir / FOLDER).glob("preview_*"):
            old.unlink()
        self._say("running")
        self._write_page("running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """A run that ended before its stages did is final too; one that was refused leaves ``run.json`` as it was."""
        if not self._ended.is_set():
            stopped, refused = isinstance(error, KeyboardInterrupt), getattr(error, "refused", True)
            self.finish("interrupted" if stopped else str(error), stopped=stopped, keep=not stopped and refused)

    def planned(self, plans: Mapping[str, StagePlan]) -> None:
        """What was predicted, by stage."""
        with self._lock:
            self._plans = plans

    def begin(self, stage: str) -> None:
        """A stage starts."""
        with self._lock:
            self._now, self._process, self._note = stage, None, ""
            self._total = self._done = 0
            self._since = time.monotonic()

    def watch(self, process: StageProcess) -> None:
        """The process of the stage that runs."""
        with self._lock:
            self._process = process

    def event(self, event: Event) -> None:
        """The stage that runs said something."""
        with self._lock:
            match event:
                case Start():
                    self._total, self._done, self._unit = event.total, event.done, event.unit
                    self._first, self._since = event.done, time.monotonic()
                case Advance(n):
                    self._done += n
                case Note(text) | Resumed(text):
                    self._note = text

    def end(self, result: StageResult) -> None:
        """A stage is done or was reused."""
        with self._lock:
            self._results[result.name] = result
            plan = self._plans.get(result.name, StagePlan())
            self._drawn[result.name] = rows.finished(result, plan, _POINTS)
            self._now, self._process = "", None

    def finish(self, error: str = "", *, stopped: bool = False, keep: bool = False) -> dict[str, Any]:
        """Write the page as it stays and, without ``keep``, ``run.json``; returns what is in that."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        state = "stopped" if stopped else "failed" if error else "finished"
        if keep:
            self._commands["command"] = self._commands["typed"]  # the folder has no settings of it
        self._write_page(state, error)  # first: what it takes counts for the runner
        found = summary(self._dir, self._job, list(self._results.values()), self._plans, error)
        if not keep:
            write_json(self._dir / "run.json", found)
        self._say(state, error)
        return found

    def _write_page(self, state: str, error: str = "") -> None:
        results = list(self._results.values())
        more = {"error": error, "results": results, "preview": self._preview(), **self._commands}
        page = render(self._dir, self._job, self._rows(state), state=state, **more)
        write_text(self._dir / "report.html", page)

    def _rows(self, state: str, most: int = rows.POINTS) -> list[dict[str, Any]]:
        """Of all stages; the one that has begun and has no result is as the run is."""
        found = []
        for one in self._states:
            plan, result = self._plans.get(one.name, StagePlan()), self._results.get(one.name)
            if result is not None:
                found.append(self._drawn[one.name] if most == _POINTS else rows.finished(result, plan, most))
                continue
            row = rows.waiting(one, plan)
            if one.name == self._now:
                row["status"] = state
                if self._process is not None:
                    samples = list(self._process.timeline)
                    row |= {
                        "line": rows.line(samples, most),
                        "peak": max((sample.rss for sample in samples), default=0),
                    }
            found.append(row)
        return found

    def _beat(self) -> None:
        while not self._ended.wait(PERIOD):
            with suppress(OSError):  # a full disk: the page says since when it is old, and the run itself what is wrong
                self._say("running")

    def _say(self, state: str, error: str = "") -> None:
        with self._lock:
            said = {
                "state": state,
                "error": error,
                "began": self._began,
                "updated": time.time(),
                "budget": self._job.budget,
                "prompt": self._job.config.prompt,
                "extent": f"{self._job.config.width}x{self._job.config.height}",
                "now": self._progress() if state == "running" else None,
                "preview": self._preview(),
                "stages": self._rows(state, _POINTS),
            }
        write_text(self._dir / FOLDER / "live.js", f"live({json.dumps(said)});\n", sync=False)

    def _progress(self) -> dict[str, Any]:
        """Of the stage that runs. ``left``: seconds of it, ``all_left``: of all stages, where they are known."""
        took, made = time.monotonic() - self._since, self._done - self._first
        left = (self._total - self._done) * took / made if self._total and made > 0 else None
        if left is None and self._now and (guess := self._plans.get(self._now, StagePlan()).predicted_seconds):
            left = guess - took if guess > took else None
        names = [state.name for state in self._states if state.status != "reuse" and state.name not in self._results]
        later = [self._plans.get(name, StagePlan()).predicted_seconds or 0.0 for name in names if name != self._now]
        sample = self._process.timeline[-1:] if self._process is not None else []
        return {
            "stage": self._now or None,
            "note": self._note,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "left": left,
            "all_left": None if left is None else left + sum(later),
            "rss": sample[0].rss if sample else 0,
            "module": sample[0].module if sample else "",
        }

    def _preview(self) -> dict[str, str] | None:
        """The newest picture of how it comes out."""
        found = [path for pattern in _PREVIEWS for path in self._dir.glob(pattern) if path.is_file()]
        if not found:
            return None
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        stage = newest.stem.removeprefix("preview_") if newest.parent.name == FOLDER else "lowres, decoded"
        return {"src": f"{newest.relative_to(self._dir).as_posix()}?{newest.stat().st_mtime_ns}", "stage": stage}
