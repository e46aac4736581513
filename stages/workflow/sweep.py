"""A sweep: what each of its jobs came to, on disk and in the table that closes it.

Jobs may run in other processes and on other hosts. All they share is the sweep's folder (Hydra's ``hydra.sweep.dir``,
``<output_dir>/.sweeps/<hash>``), where each says in a file of its own what became of it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError
from stages.files import read_object, write_json
from stages.paths import anchored
from stages.workflow import report, run, shares, signals
from stages.workflow.grammar import parse, value_of
from stages.workflow.overrides import SWEEPS
from stages.workflow.progress import Silent, duration, reporter
from stages.workflow.score import scorer

RUNNER = "HIGHRES_RUNNER"  # environment: process id of the command that the person gave
GOOD = ("done", "finished before")
failed: list[str] = []  # the only run of this process was refused or failed, and has said why
_LONGEST = 60  # characters of a value, and of a reason, in the table


@contextmanager
def of(arguments: Sequence[str]) -> Iterator[Sweep | None]:
    """The sweep that prepared arguments ask for, with its table at the end; None where they ask for one run."""
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments) or {"--cfg", "-c", "--help"} & set(arguments):
        yield None
        return
    overrides = [text for text in arguments if text[:1] != "-" and parse(text)]
    sweep = Sweep(Path(value_of(overrides, "hydra.sweep.dir") or SWEEPS), _jobs(overrides))
    shares.of_command(value_of(overrides, shares.KEY), Path(value_of(overrides, "output_dir") or anchored("outputs")))
    try:
        yield sweep
    finally:
        sweep.close(reporter(value_of(overrides, "progress") != "false"))


class Sweep:
    """The sweep in a folder, as the command that the person gave sees it."""

    def __init__(self, folder: Path, jobs: list[list[str]] | None) -> None:
        self.folder, self.jobs, self.all_well = folder, jobs, False
        for old in _said(folder):
            old.unlink(missing_ok=True)

    def outcomes(self) -> list[dict[str, Any]]:
        """What every job came to, in order; those that said nothing too, as far as it is known that there are any."""
        said = {int(path.stem): read_object(path) for path in _said(self.folder)}
        found = []
        for number in range(max([*said, len(self.jobs or []) - 1], default=-1) + 1):
            listed = self.jobs[number] if self.jobs and number < len(self.jobs) else []
            one = {"number": number, "overrides": listed, "status": "not begun", **said.get(number, {})}
            if one["status"] == "running":  # the sweep has ended, and it never said how
                one |= {"status": "killed", "error": "its process ended without a word"}
            found.append(one)
        return found

    def close(self, shown: Silent) -> None:
        """Say what the jobs came to, ``sweep.json`` in the folder too; then ``all_well`` is known."""
        jobs = self.outcomes()
        if all(one["status"] == "not begun" for one in jobs):  # refused as a whole, which has been said
            return
        common = set.intersection(*[set(one["overrides"]) for one in jobs]) if len(jobs) > 1 else set()
        rows, bad = [], []
        for one in jobs:
            one["varies"] = [text for text in one["overrides"] if text not in common]
            varies = " ".join(map(_short, one["varies"])) if len(jobs) > 1 else ""
            took = duration(one["seconds"]) if "seconds" in one and one["status"] != "finished before" else "-"
            reason = str(one.get("error") or "").partition("\n")[0]
            rows.append((str(one["number"] + 1), varies, one.get("run") or "-", one["status"], took, _short(reason)))
            if one["status"] not in GOOD:
                bad.append(f"  job {one['number'] + 1} ({varies}): {one['status']}{f': {reason}' if reason else ''}")
        write_json(self.folder / "sweep.json", {"jobs": jobs})
        page = report.sweep(self.folder)
        shown.line("")
        shown.table(("job", "with", "run", "status", "time", "reason"), rows)
        shown.line(f"sheet: {page}")
        if bad:
            text = f"{len(bad)} of {len(jobs)} jobs have no result:"
            again = "The same command tries these again; what is finished is not computed again."
            print("\n".join([text, *bad, again]), file=sys.stderr, flush=True)
        self.all_well = not bad


def _said(folder: Path) -> list[Path]:
    """What jobs have said, a file each, in order; not what one of them is writing."""
    return sorted(path for path in (folder / "jobs").glob("*.json") if path.stem.isdecimal())


def _jobs(overrides: Sequence[str]) -> list[list[str]] | None:
    """The overrides of every job, as Hydra's own sweeper makes them; None where another one chooses as it goes."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if any(text.startswith("hydra/sweeper=") for text in overrides):
        return None
    mine = [text for text in overrides if not text.startswith("hydra")]
    try:
        return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(mine), None)[0]
    except HydraException:  # options found by a pattern (model=glob(*)); Hydra says what is wrong with others
        return None


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def job(config: DictConfig, pipeline: str, *, sweeps: bool) -> float | None:
    """One run: the only one, or one job of a sweep, which says in the sweep's folder what became of it.

    Returns:
        What ``score=`` asks for, for a sweeper that looks for the best; else None.

    Raises:
        Exception: a job that has a score was refused or failed, the person was told why.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    said = [str(text) for text in OmegaConf.to_container(hydra.overrides.task, resolve=False)]  # type: ignore[union-attr]
    if not sweeps:
        try:
            run.execute(config, said, pipeline=pipeline)
        except run.Reported as error:
            failed.append(str(error))
        return None
    number, began, scored = int(hydra.job.num), time.monotonic(), config.score
    place = Path(hydra.sweep.dir) / "jobs" / f"{number:04d}.json"
    what: dict[str, Any] = {"number": number, "overrides": said, "status": "running"}
    what |= {"host": socket.gethostname(), "process": os.getpid()}
    write_json(place, what)
    speaker = "" if os.environ.get(RUNNER) == str(os.getpid()) else f"[{number + 1}] "
    try:
        worth = scorer(scored) if scored is not None else None
        made = run.execute(config, said, sweep=True, speaker=speaker, pipeline=pipeline)
        what |= {"status": "finished before" if made.get("kept") else "done", "run": made.get("run")}
        if worth is not None:
            what["score"] = worth(anchored(config.output_dir) / str(made.get("run")))
    except Exception as error:
        if stop := signals.asked():
            what |= {"status": "interrupted"}
            raise stop from error
        what |= {"status": "failed", "run": getattr(error, "run", None), "error": str(error) or type(error).__name__}
        if isinstance(error, ConfigError):
            print(f"{speaker}{error}", file=sys.stderr, flush=True)
        elif not isinstance(error, run.Reported):
            traceback.print_exc()
        if scored is not None:
            raise
    except BaseException:
        what |= {"status": "interrupted"}
        raise
    finally:
        write_json(place, {**what, "seconds": round(time.monotonic() - began, 3)})
    return what.get("score")
