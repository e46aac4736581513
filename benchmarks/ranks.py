"""One picture over several ranks: the pipeline's denoise and decode with each ``--nproc``, on equal work.

    python -m benchmarks ranks --checkpoint DIR --model sd15 --size 4096 --nproc 1,2 --device cuda
    python -m benchmarks ranks --small --size 1024 --nproc 1,2                     # on the CPU, random tiny weights

The stages before are computed once. Efficiency is the time of one rank over N times the time of N: of a denoising step
(from the first finished one to the last, so that starting and recording graphs are not in it), and of a decoded tile
likewise. Canvases and pixel tiles have to be equal to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import _measure
from stages.documents import load
from stages.events import Advance, Done, Error, from_line
from stages.workflow.launch.local import environment as stage_environment

RUN = "ranks"


def digest(folder: Path, pattern: str) -> str:
    """Of all files of a result, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def timed(stage: str, run_dir: Path, nproc: int, environment: dict[str, str]) -> dict[str, Any]:
    """Compute a stage anew with so many ranks: seconds in all and a piece of work, bytes reserved by each rank."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "stages.ranks", "--nproc", str(nproc), stage, str(run_dir), "--force"]
    begin, times, reserved = time.monotonic(), [], {}
    process = subprocess.Popen([*command, "--events", str(writer)], pass_fds=(writer,), env=environment)
    os.close(writer)
    with os.fdopen(reader) as events:
        for line in events:
            event = from_line(line)
            if isinstance(event, Advance):
                times.append((time.monotonic(), event.n))
            elif isinstance(event, Error):
                print(event.message, flush=True)
            elif isinstance(event, Done):
                reserved[event.rank] = [round(size / 1e6, 1) for size in event.gpus]
    if process.wait():
        raise SystemExit(f"{stage} with {nproc} ranks failed")
    # a rank's first pieces warm it up: an event a rank
    steady = times[nproc if stage == "decode" else 0 :]
    done = sum(number for _, number in steady[1:])
    each = (steady[-1][0] - steady[0][0]) / done if done else float("nan")
    seconds = time.monotonic() - begin
    return {
        "seconds": round(seconds, 2),
        "each": round(each, 5),
        "reserved_mb": [reserved[r] for r in sorted(reserved)],
    }


def main(arguments: list[str] | None = None) -> int:
    """Prepare once, run denoise and decode with each number of ranks, print a line each, write all as JSON."""
    parser = _measure.parser(__doc__)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, default=4096, help="pixels a side")
    parser.add_argument("--nproc", default="1,2", help="numbers of ranks, the first one is the measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps that run")
    parser.add_argument("--budget", help="memory.device_budget, or memory.budget on the CPU, of each rank")
    parser.add_argument("--backend", choices=("auto", "gloo", "nccl"), default="auto")
    parser.add_argument("--small", action="store_true", help="tiny channel counts")
    parser.add_argument("--stages", default="denoise,decode", help="of these")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here, and go on from what lies there")
    options = parser.parse_args(arguments)
    checkpoint = _measure.checkpoint(options.checkpoint, options.model, small=options.small)
    numbers, rows, results = [int(number) for number in options.nproc.split(",")], [], []
    with _measure.scratch() as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        run_dir = folder / RUN
        common = [f"run={RUN}", "prompt=a lighthouse", f"model={options.model}", f"model.path={checkpoint}"]
        common += [f"width={options.size}", f"height={options.size}", f"device={options.device}", "progress=false"]
        common += [f"denoise.num_inference_steps={options.steps}", "denoise.strength=1.0", "guide.phases=[]"]
        common += ["lowres.num_inference_steps=1", "guide.vae_mode=independent", f"launch.backend={options.backend}"]
        if options.small:
            common += ["model.native_size=256", "launch.threads=1"]
        if options.budget:
            common += [f"memory.{'device_budget' if options.device == 'cuda' else 'budget'}={options.budget}"]
        before = [*common, "stage=[text_encode,lowres,guide]"]
        _measure.runner(folder, *before, echo=True).check()
        environment = stage_environment(load(run_dir / "config.yaml"))
        for number in numbers:
            # one more look for the plan of so many ranks; the stage itself is run and heard here
            _measure.runner(folder, *common, "stage=plan", f"launch.nproc={number}").check()
            plan = json.loads((run_dir / "plan.json").read_text())
            for stage in options.stages.split(","):
                found = timed(stage, run_dir, number, environment)
                (result,) = (path.parent for path in folder.glob(f".store/{stage}/*/manifest.json"))
                pattern = "canvas.safetensors" if stage == "denoise" else "tiles/*.safetensors"
                found |= {"stage": stage, "ranks": number, "bytes": digest(result, pattern)}
                found["predicted_mb"] = round((plan[stage]["predicted_peak_vram_bytes"] or 0) / 1e6)
                found["group_size"] = plan[stage]["group_size"]
                results.append(found)
                print(json.dumps(found), flush=True)
    checks = {}
    for stage in options.stages.split(","):
        of = [one for one in results if one["stage"] == stage]
        first = of[0]
        for one in of:
            share = first["each"] * first["ranks"] / (one["each"] * one["ranks"])
            one["efficiency"] = round(share, 3)
            reserved = " ".join(str(max(each, default=0)) for each in one["reserved_mb"])
            rows.append((stage, one["ranks"], one["seconds"], one["each"], f"{share:.1%}", reserved, one["bytes"]))
            if one is not first:
                checks[f"{stage}: {one['ranks']} ranks give the bytes of {first['ranks']}"] = (
                    one["bytes"] == first["bytes"]
                )
                if options.device == "cuda" and stage == "denoise":
                    checks[f"{stage}: efficiency of {one['ranks']} ranks at least 90%"] = share >= 0.9
    header = ("stage", "ranks", "seconds", "a step or tile", "efficiency", "MB reserved by rank", "bytes")
    _measure.table(header, rows)
    return _measure.finish("ranks", results, checks)


if __name__ == "__main__":
    raise SystemExit(main())
