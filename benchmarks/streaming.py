"""A high-resolution step with streamed weights against the same tiles with resident ones, and against other ways.

    python -m benchmarks.streaming                         # full-size SD 1.5, as many tile pairs as the plan groups
    python -m benchmarks.streaming --pairs 2 --ways streamed,resident

Every way has a process of its own with the environment that ``runner.py`` gives its stages. Streamed and resident steps
take turns, so that other load on the machine meets both. ``life`` is the process from its start to the end of its first
step: imports, loading, and (streamed) the packed copy of the weights, made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from benchmarks._measure import RESULTS, checkpoint, finish, mb, parser, runner, table
from benchmarks._worker import WAYS
from stages.config import ROOT, parse_bytes
from stages.plans import StagePlan, stage_plans
from stages.workflow.cgroup import Cgroup, Unavailable
from stages.workflow.launch.local import environment

RUNNER = 42_000_000  # bytes that runner.py takes of the budget


class Worker:
    """A way in its process; ``life`` seconds from its start to the end of its first step."""

    def __init__(self, spec: dict[str, Any], group: Cgroup | None = None) -> None:
        self.way, self.steps, self.group = spec["way"], [], group
        command = [sys.executable, "-m", "benchmarks._worker", json.dumps(spec)]
        given = environment(OmegaConf.create({"device": "cpu", "launch": {"threads": None}}))
        given |= {"TQDM_DISABLE": "1"} | (group.environment if group else {})
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        begin = time.monotonic()
        self.process = subprocess.Popen(group.command(command) if group else command, cwd=ROOT, env=given, **pipes)
        self.load = self._answer()["load_seconds"]
        self.step()
        self.life = time.monotonic() - begin

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.way}: ended with exit code {self.process.wait()}")

    def step(self) -> None:
        """One step over all pairs."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._answer())

    def close(self) -> dict[str, Any]:
        """End the process; what it measured. The first step is left out of the median where there are more."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        if self.group:
            self.group.remove()
        times = [step["seconds"] for step in self.steps]
        last = self.steps[-1]
        found = {"way": self.way, "step_seconds": median(times[1:] or times), "steps": times}
        return {**found, "life_seconds": self.life, "peak": last["peak"], "digest": last["digest"]}


def planned(folder: Path, budget: str, dtype: str) -> StagePlan:
    """The plan of a 2048x2048 run's ``denoise`` at ``budget``, from ``runner.py stage=plan``."""
    output = RESULTS / "runs" / "streaming"
    chosen = ["model=sd15", f"model.path={folder}", f"memory.budget={budget}", f"technique.dtype={dtype}"]
    runner(output, "run=plan", "stage=plan", "prompt=a benchmark", *chosen).check()
    return stage_plans(json.loads((output / "plan" / "plan.json").read_text(encoding="utf-8")))["denoise"]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, help="tile pairs; default: as many as the plan groups")
    options.add_argument("--repeats", type=int, default=3, help="steps of streamed and resident after the first")
    options.add_argument("--budget", default="800MB")
    options.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="fp32: a CPU without bf16")
    options.add_argument("--ways", default=",".join(WAYS))
    given = options.parse_args()
    folder = checkpoint(given.checkpoint)
    stage = planned(folder, given.budget, given.dtype)
    plan = asdict(stage.model("unet"))
    pairs = given.pairs or max(1, stage.group_size // 2)
    group_size = min(2 * pairs, stage.group_size)
    scratch = RESULTS / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    spec = {"checkpoint": str(folder), "pairs": pairs, "scratch": str(scratch), "dtype": given.dtype}
    turns, found = [], []
    print(f"{pairs} tile pairs in groups of {group_size}, ring {mb(plan['ring_bytes'])}, {os.cpu_count()} cores")
    for way in given.ways.split(","):
        group = None
        if way == "streamed in a cgroup":
            try:
                group = Cgroup.create(parse_bytes(given.budget) - RUNNER, "benchmark")
            except Unavailable as error:
                print(f"{way}: left out, {error}")
                continue
        # a copy of its own: whose group read or wrote a file first is charged for its page cache
        file = scratch / f"{way.replace(' ', '-')}.bin"
        streams = way.startswith("streamed")
        how = {"plan": {**plan, "prepared": str(file)}, "group": group_size} if streams else {"plan": {}, "group": 1}
        mine = {**spec, "way": way, **how}
        worker = Worker(mine, group)
        print(f"{way}: life {worker.life:.1f} s, first step {worker.steps[0]['seconds']:.1f} s", flush=True)
        if way in ("streamed", "streamed in a cgroup", "resident"):
            turns.append(worker)
        else:
            found.append(worker.close())
    for _ in range(given.repeats if len(turns) > 1 else 0):
        for worker in turns:
            worker.step()
    found = [worker.close() for worker in turns] + found
    shutil.rmtree(scratch, ignore_errors=True)
    return judge(found, plan)


def judge(found: list[dict[str, Any]], plan: dict[str, Any]) -> int:
    """Table, checks, JSON."""
    by = {one["way"]: one for one in found}
    resident, streamed = by.get("resident"), by.get("streamed")
    rows = [
        (
            one["way"],
            f"{one['step_seconds']:.2f} s",
            f"{one['step_seconds'] / resident['step_seconds']:.3f}" if resident else "-",
            f"{one['life_seconds']:.1f} s",
            mb(one["peak"]),
        )
        for one in found
    ]
    table(("way", "step", "of resident", "life", "peak RES of the process"), rows)
    checks: dict[str, bool] = {}
    if streamed and resident:
        ratio = streamed["step_seconds"] / resident["step_seconds"]
        checks[f"streamed step at most 1.05x of the resident one: {ratio:.3f}"] = ratio <= 1.05
        checks["streamed and resident are bit-identical"] = streamed["digest"] == resident["digest"]
    if streamed and (fp32 := by.get("diffusers fp32")):
        ratio = streamed["step_seconds"] / fp32["step_seconds"]
        checks[f"streamed step at most 0.65x of diffusers in fp32: {ratio:.3f}"] = ratio <= 0.65
    for other in ("accelerate disk", "group offload"):
        if streamed and other in by:
            ratio = streamed["life_seconds"] / by[other]["life_seconds"]
            checks[f"whole process faster than {other}: {ratio:.2f}x"] = ratio < 1
            peaks = f"{mb(streamed['peak'])} against {mb(by[other]['peak'])}"
            checks[f"lower peak than {other}: {peaks}"] = streamed["peak"] < by[other]["peak"]
    return finish("streaming", {"plan": {k: v for k, v in plan.items() if k != "order"}, "ways": found}, checks)


if __name__ == "__main__":
    sys.exit(main())
