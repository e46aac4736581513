"""One picture over several hosts that share their folders: the first one runs it, the others help with its tiles.

The same command runs on all of them with a ``launch.node_rank`` of its own. The first one says in ``begun.json`` which
stage it has begun; the others start their ranks of it, until the last result is there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from stages import Stage
from stages.context import BEGUN
from stages.files import read_object, write_json
from stages.job import Job
from stages.workflow import launch
from stages.workflow.graph import StageState, build
from stages.workflow.progress import Silent
from stages.workflow.spread import spread
from stages.workflow.store import Store

_PERIOD = 0.2  # seconds between two looks at what the first host has begun


@contextmanager
def told(state: StageState, job: Job, run_dir: Path) -> Iterator[None]:
    """While a stage runs on the first of several hosts, the others can see it."""
    if spread(job, state.stage).hosts == 1:
        yield
        return
    file = run_dir / BEGUN
    write_json(file, {"stage": state.name, "fingerprint": state.fingerprint, "try": secrets.token_hex(8)})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def help_out(job: Job, store: Store, declared: Sequence[Stage], run_dir: Path, pipeline: str, shown: Silent) -> None:
    """This host's ranks of every stage that the first one begins, until the run's last result is there.

    A try that fails is said here too; the first host's next one is helped with again.
    """
    states = {state.name: state for state in build(job, store, pipeline=declared)}
    last, tried = [state for state in states.values() if state.status != "skip"][-1], ""
    shown.line(f"helps with {run_dir} as soon as the host with launch.node_rank=0 begins a stage that is shared")
    while last.entry.why_invalid():
        begun = read_object(run_dir / BEGUN)
        state = states.get(str(begun.get("stage")))
        if state is None or begun.get("try") == tried or begun.get("fingerprint") != state.fingerprint:
            time.sleep(_PERIOD)
            continue
        tried = str(begun["try"])
        shown.begin(state.name, "with the first host")
        try:
            result = launch.run_stage(state, job, run_dir, on_event=partial(shown.event, state.name), pipeline=pipeline)
            shown.end(result)
        except launch.StageFailed as error:
            shown.line(str(error))
    shown.final(f"all of {run_dir} is there")
