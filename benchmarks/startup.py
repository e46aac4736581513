"""What a run costs besides the work: all process starts and imports, and a second run that reuses everything.

A picture of one tile with one step, on a model of the embedded one's size: nearly all of its time is fixed cost. Then
each stage's processor time alone, up to its first block of a model, fresh and forked (``launch.fork``): the least of
several starts, as others may compute. Then a picture of the usual size, both ways.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks._measure import RESULTS, finish, mb, model_overrides, one_step, parser, runner, summary, table
from stages.config import ROOT
from stages.documents import load
from stages.workflow.launch.local import environment

FIXED, AIM, AGAIN, STARTED, USUAL = 20.0, 12.0, 3.0, 8.0, 45.0  # seconds
STARTS = 3


def starts(run_dir: Path, stages: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Processor seconds and RES at its first block, of each stage: ``fresh``, ``forked``, and of the ``zygote`` that it
    was forked from. The results of ``run_dir`` are gone then."""
    found, config = {}, load(run_dir / "config.yaml")
    for stage in reversed(list(stages)):  # each takes its own result away, and needs those before it
        command = [sys.executable, "-m", "benchmarks._started", stage, str(run_dir)]
        surroundings = {**environment(config, stage), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        fresh = [_said(command, surroundings)[-1] for _ in range(STARTS)]
        zygote, *forked = _said([*command, str(STARTS)], surroundings)
        least = {"fresh": min(fresh, key=_seconds), "forked": min(forked, key=_seconds)}
        found[stage] = {**least, "zygote": zygote}
    return dict(reversed(found.items()))


def _said(command: list[str], environment: dict[str, str]) -> list[dict[str, float]]:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]


def _seconds(one: dict[str, float]) -> float:
    return one["seconds"]


def usual(output: Path, chosen: list[str], times: int) -> dict[str, dict[str, float]]:
    """Seconds, processor seconds and peak of a picture of the usual size, with fresh stages and with forked ones, one
    after the other: the least of ``times`` runs."""
    runner(output, *chosen, "run=look", "stage=plan").check()
    found: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    for number in range(times):
        for way, runs in found.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            name = f"{way}{number}"
            done = runner(output, *chosen, f"run={name}", f"prompt=benchmark {name}", f"launch.fork={way}").check()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            peak = summary(output, name)["peak_rss_bytes"]
            runs.append({"seconds": done.seconds, "cpu_seconds": spent, "peak": peak})
    return {way: {key: min(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="embedded", choices=("embedded", "small"))
    options.add_argument("--runs", type=int, default=2, help="of the usual size, each way; 0 for none")
    given = options.parse_args()
    output = RESULTS / "runs" / "startup"
    shutil.rmtree(output, ignore_errors=True)
    model = model_overrides(given.model, given.checkpoint)
    first = runner(output, "run=x", "prompt=a benchmark", "width=256", "height=256", *model, *one_step()).check()
    stages = {stage["name"]: stage["seconds"] for stage in summary(output, "x")["stages"]}
    planned = runner(
        output, "run=x", "seed=1", "stage=lowres"
    ).check()  # planned before: without the look at the models
    again = runner(output, "run=x", "seed=0").check()
    statuses = {stage["status"] for stage in summary(output, "x")["stages"]}
    started = starts(output / "x", stages)
    whole = usual(output, ["prompt=a benchmark", *model], given.runs) if given.runs else {}
    shutil.rmtree(output, ignore_errors=True)
    rest = first.seconds - sum(stages.values())
    rows = [(name, f"{seconds:.1f} s") for name, seconds in stages.items()]
    rows += [("runner, planning", f"{rest:.1f} s"), ("first run", f"{first.seconds:.1f} s")]
    rows += [("one stage again", f"{planned.seconds:.1f} s"), ("all reused", f"{again.seconds:.1f} s")]
    table(("", "seconds"), rows)
    ways = ("fresh", "forked")
    rows = [
        (name, *(cell for way in ways for cell in (f"{one[way]['seconds']:.2f} s", mb(one[way]["rss"]))))
        for name, one in started.items()
    ]
    zygote = next(iter(started.values()))["zygote"]
    every = {way: sum(one[way]["seconds"] for one in started.values()) for way in ways}
    every["forked"] += zygote["seconds"]
    shown = f"{mb(zygote['rss'] - zygote['file'])} anonymous, {mb(zygote['file'])} of files"
    rows.append(("what they are forked from", "", "", f"{zygote['seconds']:.2f} s", mb(zygote["rss"])))
    rows.append(("all", f"{every['fresh']:.1f} s", "", f"{every['forked']:.1f} s", ""))
    table(("to the first block", "fresh: CPU", "RES", "forked: CPU", "RES"), rows)
    print(f"what they are forked from: {shown}")
    rows = [
        (f"launch.fork={way}", *(f"{one[key]:.1f} s" for key in ("seconds", "cpu_seconds")), mb(one["peak"]))
        for way, one in whole.items()
    ]
    table(("a picture of the usual size", "seconds", "CPU", "peak"), rows)
    checks = {
        f"first run at most {FIXED:.0f} s: {first.seconds:.1f} s": first.seconds <= FIXED,
        f"all reused under {AGAIN:.0f} s: {again.seconds:.1f} s": statuses == {"reused"} and again.seconds < AGAIN,
    }
    aims = [
        (AIM, first.seconds),
        (STARTED, every["forked"]),
        *((USUAL, one["seconds"]) for one in [*whole.values()][1:]),
    ]
    for aim, seconds in aims:
        print(f"the aim of {aim:.0f} s is {'met' if seconds <= aim else 'not met'}: {seconds:.1f} s")
    result = {
        "first": first.seconds,
        "stages": stages,
        "one_stage": planned.seconds,
        "reused": again.seconds,
        "started": started,
        "usual": whole,
    }
    return finish("startup", result, checks)


if __name__ == "__main__":
    sys.exit(main())
