"""A high-resolution step with streamed weights against the same tiles with resident ones, and against other ways.

    python -m benchmarks.streaming                         # full-size SD 1.5, as many tiles as the plan groups
    python -m benchmarks.streaming --tiles 2 --ways streamed,resident
    python -m benchmarks.streaming flux --layers transformer=4 --ways streamed,resident    # another family, few blocks

``resident`` is torch by itself, ``resident in lanes`` what it does with samples side by side, as we stream.
``openvino floats`` and ``openvino int8`` are OpenVINO itself, resident; converting takes minutes: asked for by name.
Every way has a process of its own with the environment that ``runner.py`` gives its stages. Steps of all take turns but
for those that offload, so that other load on the machine meets them alike. ``life`` is the process from its start to
the end of its first step: imports, loading, and (streamed) the packed copy of the weights, made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._checkpoint_configs import KINDS
from benchmarks._measure import RESULTS, checkpoint, finish, mb, parser, runner, stage_environment, table, written
from benchmarks._worker import WAYS
from stages.canvas.mixture import View
from stages.canvas.weights import Weight
from stages.config import ROOT, parse_bytes
from stages.documents import load
from stages.families import family_of
from stages.families.opening import open_checkpoint
from stages.plans import StagePlan, stage_plans
from stages.tiles import latent_grid
from stages.workflow.cgroup import Cgroup, Unavailable

# what a way streams with, and how much of the resident step it may take
SWITCHES = {
    "int8": ({"quantize": "int8"}, 0.60),
    "int8_weights": ({"quantize": "int8_weights"}, 1.10),
    "openvino": ({"attention": "openvino"}, 0.88),
    "int8 openvino": ({"quantize": "int8", "attention": "openvino"}, 0.60),
}
RUNNER = 42_000_000  # bytes that runner.py takes of the budget


class Worker:
    """A way in its process; ``life`` seconds from its start to the end of its first step."""

    def __init__(self, spec: dict[str, Any], group: Cgroup | None = None) -> None:
        self.way, self.steps, self.group = spec["way"], [], group
        command = [sys.executable, "-m", "benchmarks._worker", json.dumps(spec)]
        given = stage_environment() | {"TQDM_DISABLE": "1"} | (group.environment if group else {})
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
        """One step over all tiles."""
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
        last, later = self.steps[-1], self.steps[1:] or self.steps
        times = {f"step_{name}": median(step[name] for step in later) for name in ("seconds", "cpu_seconds")}
        found = {"way": self.way, **times, "steps": [step["seconds"] for step in self.steps]}
        found["quietest_seconds"] = min(step["seconds"] for step in later)
        return {**found, "life_seconds": self.life, "peak": last["peak"], "digest": last["digest"]}


def planned(folder: Path, given: Namespace, **switch: str) -> tuple[StagePlan, dict[str, Any]]:
    """The plan of a 2048x2048 run's ``denoise``, from ``runner.py stage=plan``, and what its tiles are: the VAE would
    need more than a small budget."""
    output = RESULTS / "runs" / "streaming"
    chosen = [f"model.path={folder}", f"memory.budget={given.budget}", f"technique.dtype={given.dtype}"]
    techniques = {"quantize": "none", "attention": "sdpa", **switch}  # all are said: a run that is there has its own
    chosen += [f"technique.{name}={value}" for name, value in techniques.items()]
    chosen += ["guide.mode=none", "decode.tile_size=256"]
    size = [f"width={given.size}", f"height={given.size}", "guide.phases=[]"]
    runner(output, "run=plan", "stage=plan", "prompt=a benchmark", *chosen, *size).check()
    plans = stage_plans(json.loads((output / "plan" / "plan.json").read_text(encoding="utf-8")))
    config = load(output / "plan" / "config.yaml")
    family, factor = family_of(config), config.model.vae_scale_factor
    checkpoint = open_checkpoint(config, family.facts.components["denoise"], print)
    tile = latent_grid(config.width, config.height, config.denoise.tile_size, config.denoise.overlap, factor)[0]
    view = View(tile, Weight(torch.ones(()), torch.ones(())), guidance_scale=config.denoise.guidance_scale)
    guided = family.asks([view], checkpoint)[0].passes == 2
    return plans["denoise"], {"family": family.name, "tile": list(tile.size), "guided": guided}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("kind", nargs="?", default="sd15", choices=KINDS)
    options.add_argument("--layers", default="", metavar="COMPONENT=N,...", help="as random_checkpoint's")
    options.add_argument("--tiles", type=int, help="default: as many as the plan groups")
    options.add_argument("--repeats", type=int, default=3, help="steps of streamed and resident after the first")
    options.add_argument("--budget", default="800MB")
    options.add_argument("--size", type=int, default=2048)
    options.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="fp32: a CPU without bf16")
    options.add_argument(
        "--ways",
        default=",".join(
            way for way in WAYS if way.removeprefix("streamed ") not in SWITCHES and not way.startswith("openvino")
        ),
    )
    given = options.parse_args()
    made = written(given.kind, given.layers) if given.layers and not given.checkpoint else None
    try:
        return run(given, made or checkpoint(given.checkpoint, given.kind))
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


def run(given: Namespace, folder: Path) -> int:
    """Measure all ways, judge; the exit code."""
    stage, what = planned(folder, given)
    passes, (plan,) = 1 + what["guided"], map(asdict, stage.models.values())
    tiles = given.tiles or max(1, stage.group_size // passes)
    group = min(tiles, max(1, stage.group_size // passes))
    scratch = RESULTS / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    spec = {"checkpoint": str(folder), "tiles": tiles, "scratch": str(scratch), "dtype": given.dtype, **what}
    turns, found = [], []
    height, width = what["tile"]
    print(f"{tiles} tiles of {width}x{height} latents{', guided' if what['guided'] else ''}, in groups of {group}")
    print(f"ring {mb(plan['ring_bytes'])}, {len(os.sched_getaffinity(0))} cores", flush=True)
    for way in given.ways.split(","):
        control = None
        if way == "streamed in a cgroup":
            try:
                control = Cgroup.create(parse_bytes(given.budget) - RUNNER, "benchmark")
            except Unavailable as error:
                print(f"{way}: left out, {error}")
                continue
        how: dict[str, Any] = {"plan": {}, "lanes": way.endswith("in lanes")}
        switch = way.removeprefix("streamed ")
        if switch in SWITCHES:
            other, _ = planned(folder, given, **SWITCHES[switch][0])
            (own,) = map(asdict, other.models.values())
            copy = str(scratch / f"{switch.replace(' ', '-')}.bin") if own["prepared"] else None
            how = {
                "plan": {**own, "prepared": copy},
                "group": max(1, other.group_size // passes),
                "switch": SWITCHES[switch][0],
            }
        elif way.startswith("streamed"):
            # a copy of its own: whose group read or wrote a file first is charged for its page cache
            copy = str(scratch / f"{way.replace(' ', '-')}.bin") if plan["prepared"] else None
            how = {"plan": {**plan, "prepared": copy}, "group": group}
        worker = Worker({**spec, "way": way, **how}, control)
        print(f"{way}: life {worker.life:.1f} s, first step {worker.steps[0]['seconds']:.1f} s", flush=True)
        if way not in ("accelerate disk", "group offload"):  # these take minutes a step
            turns.append(worker)
        else:
            found.append(worker.close())
    for _ in range(given.repeats if len(turns) > 1 else 0):
        for worker in turns:
            worker.step()
    found = [worker.close() for worker in turns] + found
    shutil.rmtree(scratch, ignore_errors=True)
    return judge(given.kind, found, plan)


def judge(kind: str, found: list[dict[str, Any]], plan: dict[str, Any]) -> int:
    """Table, checks, JSON."""
    by = {one["way"]: one for one in found}
    resident, streamed = by.get("resident"), by.get("streamed")
    rows = [
        (
            one["way"],
            f"{one['step_seconds']:.2f} s",
            f"{one['step_seconds'] / resident['step_seconds']:.3f}" if resident else "-",
            f"{one['quietest_seconds'] / resident['quietest_seconds']:.3f}" if resident else "-",
            f"{one['step_cpu_seconds']:.2f} s",
            f"{one['step_cpu_seconds'] / resident['step_cpu_seconds']:.3f}" if resident else "-",
            f"{one['life_seconds']:.1f} s",
            mb(one["peak"]),
        )
        for one in found
    ]
    header = ("way", "step", "of resident", "quietest of resident's", "its processor time", "of resident", "life")
    table((*header, "peak RES of the process"), rows)
    checks: dict[str, bool] = {}
    if streamed and (same := by.get("resident in lanes")):
        checks["streamed and resident are bit-identical"] = streamed["digest"] == same["digest"]
    if streamed and resident:
        ratio = streamed["step_seconds"] / resident["step_seconds"]
        checks[f"streamed step at most 1.05x of the resident one: {ratio:.3f}"] = ratio <= 1.05
    for switch, (_, most) in SWITCHES.items():
        if resident and (own := by.get(f"streamed {switch}")):
            ratio = own["step_seconds"] / resident["step_seconds"]
            checks[f"streamed {switch} at most {most:.2f}x of the resident step: {ratio:.3f}"] = ratio <= most
    if streamed and (fp32 := by.get("diffusers fp32")):
        ratio = streamed["step_seconds"] / fp32["step_seconds"]
        checks[f"streamed step at most 0.65x of diffusers in fp32: {ratio:.3f}"] = ratio <= 0.65
    for other in ("accelerate disk", "group offload"):
        if streamed and other in by:
            ratio = streamed["life_seconds"] / by[other]["life_seconds"]
            checks[f"whole process faster than {other}: {ratio:.2f}x"] = ratio < 1
            peaks = f"{mb(streamed['peak'])} against {mb(by[other]['peak'])}"
            checks[f"lower peak than {other}: {peaks}"] = streamed["peak"] < by[other]["peak"]
    name = "streaming" if kind == "sd15" else f"streaming-{kind}"
    return finish(name, {"plan": {k: v for k, v in plan.items() if k != "order"}, "ways": found}, checks)


if __name__ == "__main__":
    sys.exit(main())
