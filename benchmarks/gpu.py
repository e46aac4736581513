"""One high-resolution step of a full-size denoiser over the tiles of a picture on a GPU: streamed against resident.

    python -m benchmarks gpu                                   # SD 1.5 in fp16, 2048x2048 as 25 tiles with guidance
    python -m benchmarks gpu --work sdxl --budget 1200         # 9 tiles of 1024x1024
    python -m benchmarks gpu --work flux --budget 1500         # FLUX.1 in bf16, 9 tiles of 1024x1024
    python -m benchmarks gpu --work flux_768 --budget 1500     # 16 of 768x768
    python -m benchmarks gpu --work flux_tile --budget 1000    # one tile of 1360x768

(a) the whole canvas at once, resident; (b) a loop over tiles, resident, at several micro-batches; (c) diffusers' group
offload (leaf level, stream); and ours within ``--budget`` of reserved device memory, as the planner decides or as
``--jobs`` says (a JSON list of changes: host, micro, group, cut, ring, graphs, budget, environment), weights from
pinned memory or from disk. Every way runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import _measure
from benchmarks._gpu_ways import MB
from benchmarks._gpu_work import WORKS, Work, kind_of
from stages.memory.planner import Cut, ModelProfile, OverBudget, StageProfile, plan_stage
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component
from stages.models.loading import build
from stages.models.measure import cuts
from stages.workflow.device import ENVIRONMENT, for_device

DEFAULT: tuple[dict[str, Any], ...] = ({"host": "pinned"}, {"host": "disk"})
KINDS = ("resident", "offload", "ours")
# the most that ours may take of the time of others: of the resident loop at its best micro-batch, by where our weights
# come from, and of group offload
MOST = {
    "sd15": {"pinned": 1.4, "disk": 3.0, "offload": 0.125},
    "sdxl": {"pinned": 1.3, "offload": 1.0},
    "flux": {"pinned": 1.15, "offload": 1.0},
    "flux_768": {"pinned": 1.15, "offload": 1.0},
}


def component_of(checkpoint: str, work: Work) -> Component:
    """The denoiser's place in the checkpoint."""
    return Checkpoint.open(checkpoint, components=(work.component,)).component(work.component)


@lru_cache
def looked_at(checkpoint: str, name: str, micro: int) -> tuple[int, tuple[Cut, ...]]:
    """(bytes of weights, cuts) of the denoiser for micro-batches of ``micro`` tiles, as the runner would find them."""
    work = WORKS[name]
    component = component_of(checkpoint, work)

    def call(model: Any, samples: int) -> Any:
        example, _ = work.door.example(component.config, work.tile, samples)
        return work.denoiser(model, component.config, "meta")(example, torch.empty((), device="meta"))

    blocks = work.door.blocks(work.component)
    built = build(component, dtype=work.dtype, blocks=blocks, techniques=work.techniques)
    return cuts(built, call, size=work.passes * micro, whole_stages=True)[:2]


def profile(checkpoint: str, name: str, micro: int, cut: int | None = None, *, parked: bool = True) -> StageProfile:
    """``denoise`` as the planner sees it before it knows of a device; ``cut``: that one alone."""
    work = WORKS[name]
    weights, found = looked_at(checkpoint, name, micro)
    if cut is not None:
        found = (found[cut],)
    if not parked:
        found = tuple(cut for cut in found if not cut.parked)
    model = ModelProfile(
        component=work.component,
        weights=weights,
        micro_batch=work.passes * micro,
        micro_batches=-(-work.tiles // micro),
        steps=20,
        cuts=found,
    )
    return StageProfile(name="denoise", base=0, imports=0, extra=0, models=(model,), rate=1.0, seconds=0.0)


def planned(job: dict[str, Any], checkpoint: str, folder: Path) -> dict[str, Any]:
    """``plan``, ``group``, ``predicted_mb`` as the planner chooses, with what the job itself wants in its place."""
    micro, work = job["micro"], WORKS[job["work"]]
    stage = profile(checkpoint, job["work"], micro, job.get("cut"), parked=job.get("parked", True))
    try:
        chosen = plan_stage(for_device(stage, job["host"]), job["budget"] * MB, 0)
    except OverBudget as error:
        chosen = error.least
    choice = chosen.choices[work.component]
    changes: dict[str, Any] = {"host": job["host"], "device_budget": job["budget"] * MB}
    if job["host"] == "disk":
        changes["prepared"] = str(folder / "weights.bin")
    if "ring" in job:
        changes["ring_bytes"] = job["ring"] * MB
    if job.get("resident"):
        changes["resident"] = "all"
    return {
        "plan": asdict(replace(choice.model, **changes)),
        "group": job.get("group", choice.group * micro),
        "predicted_mb": round(choice.peak / MB),
    }


def run(job: dict[str, Any], environment: dict[str, str]) -> list[dict[str, Any]]:
    """The job's results; one with ``error`` if it failed."""
    command = [sys.executable, "-m", "benchmarks._gpu_ways", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1]) if lines else [{"error": (done.stderr or done.stdout)[-1500:]}]


def main(arguments: list[str] | None = None) -> int:
    """Run every way, print a line each, write all as JSON."""
    parser = _measure.parser(__doc__)
    parser.add_argument("--work", choices=tuple(WORKS), default="sd15")
    parser.add_argument("--budget", type=int, default=800, help="MB that ours may reserve")
    parser.add_argument("--level", choices=("leaf_level", "block_level"), default="leaf_level", help="of group offload")
    parser.add_argument("--count", type=int, default=5, help="steps that are timed")
    parser.add_argument("--jobs", help="JSON list instead of the default ways of ours")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="these kinds of ways")
    options = parser.parse_args(arguments)
    work = WORKS[options.work]
    checkpoint = str(_measure.checkpoint(options.checkpoint, kind_of(options.work)))
    micro = work.micro(component_of(checkpoint, work).config)
    results: list[dict[str, Any]] = []

    with _measure.scratch() as f:
        folder = Path(f)
        common = {"checkpoint": checkpoint, "folder": str(folder), "count": options.count, "work": options.work}

        def go(job: dict[str, Any], environment: dict[str, str], shown: dict[str, Any]) -> None:
            for found in run({**common, **job}, environment):
                results.append({"kind": job["kind"], **shown, **found})
                print(json.dumps(results[-1]), flush=True)

        if "resident" in options.only:
            go({"kind": "resident", "micros": work.micros, "keep": False, "whole": True}, {}, {})
        if "offload" in options.only:
            go({"kind": "offload", "count": 2, "level": options.level}, {}, {"level": options.level})
        if "ours" in options.only:
            chosen = json.loads(options.jobs) if options.jobs else DEFAULT
            chosen = [{"host": "pinned", "micro": micro, "graphs": True, "budget": options.budget, **j} for j in chosen]
            micros = sorted({job["micro"] for job in chosen})
            go(
                {"kind": "resident", "micros": micros, "keep": True, "whole": False},
                ENVIRONMENT,
                {"what": "reference"},
            )
            for job in chosen:
                way = planned({**common, **job}, checkpoint, folder)
                shown = {k: v for k, v in way["plan"].items() if k in ("ring_bytes", "unit_limit")}
                shown |= {"group": way["group"], "predicted_mb": way.pop("predicted_mb")}
                environment = ENVIRONMENT | job.get("environment", {})
                shown["parks"] = bool(way["plan"]["parked"])
                go({"kind": "ours", **job, **way}, environment, {**job, **shown})
    return _measure.finish(
        f"gpu_{options.work}", results, checks(results, options.budget, MOST.get(options.work, {"offload": 1.0}))
    )


def checks(results: list[dict[str, Any]], budget: int, most: dict[str, float]) -> dict[str, bool]:
    """What must hold of ours within ``budget`` MB, as far as it was measured; ``most`` times the resident loop."""
    loops = [one["seconds"] for one in results if one["kind"] == "resident" and "micro" in one and "what" not in one]
    offload = [one["seconds"] for one in results if one["kind"] == "offload" and "seconds" in one]
    found: dict[str, bool] = {}
    for one in results:
        if one["kind"] != "ours" or one["budget"] != budget:
            continue
        name = one["host"]
        found[f"{name}: runs within {budget} MB reserved"] = one.get("reserved_mb", budget + 1) <= budget
        found[f"{name}: bit-identical to the resident loop at its micro-batch"] = one.get("identical", False)
        seconds = one.get("seconds", float("inf"))
        if loops and name in most:
            ratio = seconds / min(loops)
            found[f"{name}: {ratio:.2f} of the resident loop at its best, at most {most[name]}"] = ratio <= most[name]
        if offload:
            ratio = seconds / min(offload)
            found[f"{name}: {ratio:.3f} of group offload, at most {most['offload']}"] = ratio <= most["offload"]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
