"""What a run costs besides the work: all process starts and imports, and a second run that reuses everything.

A picture of one tile with one step, on a model of the embedded one's size: nearly all of its time is fixed cost. Then
each stage's processor time alone, up to its first block of a model: the least of several starts, as others may compute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks._measure import RESULTS, finish, mb, model_overrides, one_step, parser, runner, summary, table
from stages.config import ROOT
from stages.documents import load
from stages.workflow.launch.local import environment

FIXED, AIM, AGAIN, STARTED = 20.0, 12.0, 3.0, 8.0  # seconds
STARTS = 3


def starts(run_dir: Path, stages: Iterable[str]) -> dict[str, dict[str, float]]:
    """Processor seconds and RES of each stage at its first block. The results of ``run_dir`` are gone then."""
    found, config = {}, load(run_dir / "config.yaml")
    for stage in reversed(list(stages)):  # each takes its own result away, and needs those before it
        command = [sys.executable, "-m", "benchmarks._started", stage, str(run_dir)]
        surroundings = {**environment(config, stage), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        said = [subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, check=True) for _ in range(STARTS)]
        last = [json.loads(one.stdout.splitlines()[-1]) for one in said]
        found[stage] = min(last, key=lambda one: one["seconds"])
    return dict(reversed(found.items()))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="embedded", choices=("embedded", "small"))
    given = options.parse_args()
    output = RESULTS / "runs" / "startup"
    shutil.rmtree(output, ignore_errors=True)
    chosen = ["run=x", "prompt=a benchmark", "width=256", "height=256", *model_overrides(given.model, given.checkpoint)]
    first = runner(output, *chosen, *one_step()).check()
    stages = {stage["name"]: stage["seconds"] for stage in summary(output, "x")["stages"]}
    planned = runner(
        output, "run=x", "seed=1", "stage=lowres"
    ).check()  # planned before: without the look at the models
    again = runner(output, "run=x", "seed=0").check()
    statuses = {stage["status"] for stage in summary(output, "x")["stages"]}
    started = starts(output / "x", stages)
    shutil.rmtree(output, ignore_errors=True)
    rest = first.seconds - sum(stages.values())
    rows = [(name, f"{seconds:.1f} s") for name, seconds in stages.items()]
    rows += [("runner, planning", f"{rest:.1f} s"), ("first run", f"{first.seconds:.1f} s")]
    rows += [("one stage again", f"{planned.seconds:.1f} s"), ("all reused", f"{again.seconds:.1f} s")]
    table(("", "seconds"), rows)
    rows = [(name, f"{one['seconds']:.2f} s", mb(one["rss"])) for name, one in started.items()]
    every = sum(one["seconds"] for one in started.values())
    rows.append(("all", f"{every:.1f} s", ""))
    table(("to the first block", "CPU", "RES"), rows)
    checks = {
        f"first run at most {FIXED:.0f} s: {first.seconds:.1f} s": first.seconds <= FIXED,
        f"all reused under {AGAIN:.0f} s: {again.seconds:.1f} s": statuses == {"reused"} and again.seconds < AGAIN,
    }
    for aim, seconds in ((AIM, first.seconds), (STARTED, every)):
        print(f"the aim of {aim:.0f} s is {'met' if seconds <= aim else 'not met'}: {seconds:.1f} s")
    result = {
        "first": first.seconds,
        "stages": stages,
        "one_stage": planned.seconds,
        "reused": again.seconds,
        "started": started,
    }
    return finish("startup", result, checks)


if __name__ == "__main__":
    sys.exit(main())
