"""The picture at several budgets: PSNR, and whether it is the same to the bit.

    python -m benchmarks.budgets                                  # full-size SD 1.5 at 768x768, one step each
    python -m benchmarks.budgets --model embedded --size 2048 --budgets 450MB,800MB,4GB,resident

``resident`` keeps all weights in memory, whatever that takes. With 600 MB the VAE's tiles have to be smaller than by
default, in all runs alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS, finish, mb, model_overrides, one_step, parser, psnr, runner, summary, table
from stages.plans import StagePlan


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="sd15")
    options.add_argument("--size", type=int, default=768)
    options.add_argument("--steps", type=int, default=1)
    options.add_argument("--budgets", default="600MB,800MB,4GB,resident")
    options.add_argument("--vae-tile", type=int, default=224, help="decode.tile_size and guide.tile_size, pixels")
    given = options.parse_args()
    common = [*model_overrides(given.model, given.checkpoint), *one_step(given.steps), "memory.enforce=off"]
    common += [f"width={given.size}", f"height={given.size}", "prompt=a benchmark", "run=x"]
    common += [f"decode.tile_size={given.vae_tile}", f"guide.tile_size={given.vae_tile}"]
    rows: list[dict[str, Any]] = []
    pictures: list[Path] = []
    for budget in given.budgets.split(","):
        output = RESULTS / "runs" / f"budgets-{given.model}" / budget
        shutil.rmtree(output, ignore_errors=True)
        free = ["memory.budget=1TB", "memory.weights=resident"]
        runner(output, *common, *(free if budget == "resident" else [f"memory.budget={budget}"])).check()
        found, plan = summary(output, "x"), json.loads((output / "x" / "plan.json").read_text(encoding="utf-8"))
        canvas = hashlib.sha256((output / "x" / "denoise" / "canvas.safetensors").read_bytes()).hexdigest()
        pictures.append(output / "x" / "image.png")
        decibels = psnr(pictures[0], pictures[-1])
        row = {"budget": budget, "peak": found["peak_rss_bytes"], "psnr": decibels, "canvas": canvas}
        how = StagePlan.of(plan["denoise"])
        unet = how.model("unet")
        way = "resident" if unet.resident == "all" else f"groups of {how.group_size}, ring {mb(unet.ring_bytes)}"
        rows.append({**row, "plan": way, "seconds": sum(stage["seconds"] for stage in found["stages"])})
        print(f"{budget}: {way}, {mb(row['peak'])}, {rows[-1]['seconds']:.0f} s", flush=True)
    table(
        ("budget", "denoise", "peak", "time", f"PSNR to {rows[0]['budget']}", "canvas"),
        [
            (r["budget"], r["plan"], mb(r["peak"]), f"{r['seconds']:.0f} s", f"{r['psnr']:.1f} dB", r["canvas"][:12])
            for r in rows
        ],
    )
    for row in rows:
        row["psnr"] = None if math.isinf(row["psnr"]) else row["psnr"]
    checks = {
        "all pictures within 50 dB of each other": all(row["psnr"] is None or row["psnr"] > 50 for row in rows),
        "all pictures are equal": all(row["psnr"] is None for row in rows),
        "all canvases are bit-identical": len({row["canvas"] for row in rows}) == 1,
    }
    shutil.rmtree(RESULTS / "runs" / f"budgets-{given.model}", ignore_errors=True)
    return finish(f"budgets-{given.model}", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
