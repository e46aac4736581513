"""One high-resolution step of SD 1.5 (fp16, 2048x2048 as 25 tiles with guidance) on a GPU: streamed against resident.

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
import tempfile
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import _measure
from benchmarks._gpu_ways import MB, TILES
from stages.memory.planner import Cut, ModelProfile, OverBudget, StageProfile, plan_stage
from stages.workflow.device import ENVIRONMENT, for_device

MICROS = (1, 2, 3, 5, 9, 13, 25)
DEFAULT: tuple[dict[str, Any], ...] = (
    {"host": "pinned"},
    {"host": "disk"},
    {"host": "pinned", "budget": 1500},
    {"host": "disk", "budget": 1500},
)


@lru_cache
def looked_at(checkpoint: str, micro: int) -> tuple[int, tuple[Cut, ...]]:
    """(bytes of weights, cuts) of the UNet for micro-batches of ``micro`` tile pairs, as the runner would find them."""
    import torch

    from stages.families.unet import UNET
    from stages.models.checkpoint import Checkpoint
    from stages.models.loading import build
    from stages.models.measure import cuts
    from stages.techniques.channels_last import ChannelsLast

    component = Checkpoint.open(checkpoint).component("unet")

    def call(model: Any, samples: int) -> Any:
        image = torch.empty((samples, 4, 64, 64), dtype=torch.float16, device="meta")
        embeds = torch.empty((samples, 77, component.config["cross_attention_dim"]), dtype=torch.float16, device="meta")
        image = image.contiguous(memory_format=torch.channels_last)
        return model(image, torch.empty((), device="meta"), encoder_hidden_states=embeds, return_dict=False)

    built = build(component, dtype=torch.float16, blocks=UNET, techniques=(ChannelsLast(),))
    return cuts(built, call, size=2 * micro, whole_stages=True)


def planned(job: dict[str, Any], checkpoint: str, folder: Path) -> dict[str, Any]:
    """``plan``, ``group``, ``predicted_mb`` as the planner chooses, with what the job itself wants in its place."""
    micro = job["micro"]
    weights, found = looked_at(checkpoint, micro)
    if "cut" in job:
        found = (found[job["cut"]],)
    if not job.get("parked", True):
        found = tuple(cut for cut in found if not cut.parked)
    model = ModelProfile(
        component="unet",
        weights=weights,
        micro_batch=2 * micro,
        micro_batches=-(-TILES // micro),
        steps=20,
        cuts=found,
    )
    stage = StageProfile(name="denoise", base=0, imports=0, extra=0, models=(model,), rate=1.0, seconds=0.0)
    try:
        chosen = plan_stage(for_device(stage, job["host"]), job["budget"] * MB, 0)
    except OverBudget as error:
        chosen = error.least
    choice = chosen.choices["unet"]
    changes: dict[str, Any] = {"host": job["host"], "device_budget": job["budget"] * MB}
    changes["prepared"] = str(folder / "unet.bin")
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
    from stages.families.unet import GPU_TILES

    parser = _measure.parser(__doc__)
    parser.add_argument("--budget", type=int, default=800, help="MB that ours may reserve")
    parser.add_argument("--count", type=int, default=5, help="steps that are timed")
    parser.add_argument("--jobs", help="JSON list instead of the default ways of ours")
    parser.add_argument("--only", choices=("resident", "offload", "ours"), help="one kind")
    options = parser.parse_args(arguments)
    checkpoint = str(_measure.checkpoint(options.checkpoint))
    results: list[dict[str, Any]] = []

    with tempfile.TemporaryDirectory(dir=_measure.RESULTS.mkdir(parents=True, exist_ok=True) or _measure.RESULTS) as f:
        folder = Path(f)
        common = {"checkpoint": checkpoint, "folder": str(folder), "count": options.count}

        def go(job: dict[str, Any], environment: dict[str, str], shown: dict[str, Any]) -> None:
            for found in run({**common, **job}, environment):
                results.append({"kind": job["kind"], **shown, **found})
                print(json.dumps(results[-1]), flush=True)

        if options.only in (None, "resident"):
            go({"kind": "resident", "micros": MICROS, "keep": False, "whole": True}, {}, {})
        if options.only in (None, "offload"):
            go({"kind": "offload", "count": 2}, {}, {})
        if options.only in (None, "ours"):
            chosen = json.loads(options.jobs) if options.jobs else DEFAULT
            chosen = [
                {"host": "pinned", "micro": GPU_TILES, "graphs": True, "budget": options.budget, **j} for j in chosen
            ]
            micros = sorted({job["micro"] for job in chosen})
            go(
                {"kind": "resident", "micros": micros, "keep": True, "whole": False, "count": 1},
                ENVIRONMENT,
                {"what": "reference"},
            )
            for job in chosen:
                way = planned(job, checkpoint, folder)
                shown = {k: v for k, v in way["plan"].items() if k in ("ring_bytes", "unit_limit")}
                shown |= {"group": way["group"], "predicted_mb": way.pop("predicted_mb")}
                environment = ENVIRONMENT | job.get("environment", {})
                shown["parks"] = bool(way["plan"]["parked"])
                go({"kind": "ours", **job, **way}, environment, {**job, **shown})
    return _measure.finish("gpu", results, checks(results, options.budget))


def checks(results: list[dict[str, Any]], budget: int) -> dict[str, bool]:
    """What must hold of ours within ``budget`` MB, as far as it was measured."""
    loops = [one["seconds"] for one in results if one["kind"] == "resident" and "micro" in one and "what" not in one]
    offload = [one["seconds"] for one in results if one["kind"] == "offload" and "seconds" in one]
    found: dict[str, bool] = {}
    for one in results:
        if one["kind"] != "ours" or one["budget"] != budget:
            continue
        name, most = one["host"], {"pinned": 1.4, "disk": 3.0}[one["host"]]
        found[f"{name}: runs within {budget} MB reserved"] = one.get("reserved_mb", budget + 1) <= budget
        found[f"{name}: bit-identical to the resident loop at its micro-batch"] = one.get("identical", False)
        seconds = one.get("seconds", float("inf"))
        if loops:
            found[f"{name}: at most {most} times the resident loop at its best micro-batch"] = seconds <= most * min(
                loops
            )
        if offload:
            found[f"{name}: at least 8 times faster than group offload"] = seconds * 8 <= offload[0]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
