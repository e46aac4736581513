"""Every family at full width in 800 MB: stages of a 2048x2048 picture measured from outside, and as predicted.

    python -m benchmarks.families sdxl                                         # all stages, one step each
    python -m benchmarks.families flux --layers transformer=2,text_encoder_2=4 --stages text_encode,lowres,denoise
    python -m benchmarks.families flux --checkpoint DIR --stages text_encode   # full depth, from a folder that is there
    python -m benchmarks.families sdxl --checkpoint DIR --go-on --stages denoise    # a stage at a time: the run is kept
    python -m benchmarks.families flux sd3 --plan                              # predictions alone: no weight is written

The peak does not grow with the number of equal blocks, and does not depend on the weights' values: with ``--layers`` a
family runs at full width with fewer of them. The random checkpoint is removed at the end unless it was given.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks._checkpoint_configs import KINDS
from benchmarks._measure import RESULTS, finish, mb, one_step, parser, runner, summary, table, written
from benchmarks.prediction import OVER, UNDER
from stages.config import parse_bytes
from stages.documents import load
from stages.tiles import Size, latent_grid
from stages.vae.tiled import guide_tiles

STAGES = "text_encode,lowres,guide,denoise,decode,stitch"


def tiles(output: Path, kind: str) -> dict[str, int]:
    """How many of them the canvas has, by stage."""
    config = load(output / kind / "config.yaml")
    size, factor = (config.width, config.height), config.model.vae_scale_factor
    canvas, parts = Size(size[1] // factor, size[0] // factor), {"denoise": config.denoise, "decode": config.decode}
    found = {name: len(latent_grid(*size, one.tile_size, one.overlap, factor)) for name, one in parts.items()}
    return {"lowres": 1, "guide": len(guide_tiles(canvas, config.guide.tile_size // factor)), **found}


def rows_of(output: Path, kind: str, plan_only: bool) -> list[dict[str, Any]]:
    """What each stage that opens a model was predicted to take, and took."""
    plans = json.loads((output / kind / "plan.json").read_text(encoding="utf-8"))
    ran = {} if plan_only else {stage["name"]: stage for stage in summary(output, kind)["stages"]}
    found, counted = [], tiles(output, kind)
    for name, plan in plans.items():
        row = {"family": kind, "stage": name, "predicted": plan["predicted_peak_rss_bytes"]}
        row |= {"group_size": plan["group_size"], "tiles": counted.get(name)}
        if name in ran and ran[name]["status"] != "reused":
            took = ran[name]
            row |= {"measured": took["peak_rss_bytes"], "seconds": took["seconds"], "module": took["peak_module"]}
            row |= {"waited": took["waited_seconds"]}
        found.append(row)
    return found


def run(kind: str, given: Any, output: Path) -> list[dict[str, Any]]:
    """One family; SystemExit where a stage fails or is refused."""
    folder = given.checkpoint.resolve() if given.checkpoint else written(kind, given.layers, holes=given.plan)
    try:
        stages = "plan" if given.plan else f"[{given.stages}]"
        asked = [f"run={kind}", f"stage={stages}", "prompt=a benchmark", "force=true", f"model.path={folder}"]
        size = [f"width={given.size}", f"height={given.size}", "guide.phases=[]"]
        limits = [f"memory.budget={given.budget}", "memory.enforce=off"]
        done = runner(output, *asked, *size, *limits, *one_step(), *given.overrides, echo=True).check()
        rows = rows_of(output, kind, given.plan)
    finally:
        if given.checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        row |= {"outside": done.peak, "outside_kernel": done.kernel_peak, "read": done.read}
    return rows


def main() -> int:
    options = parser(__doc__)
    options.add_argument("families", nargs="+", choices=KINDS)
    options.add_argument("--layers", default="", metavar="COMPONENT=N,...", help="as random_checkpoint's")
    options.add_argument("--stages", default=STAGES)
    options.add_argument("--size", type=int, default=2048)
    options.add_argument("--budget", default="800MB")
    options.add_argument("--go-on", action="store_true", help="keep the run, and find in it what was done before")
    options.add_argument("--plan", action="store_true", help="predictions alone")
    options.add_argument("--overrides", nargs="*", default=[], help="such as technique.dtype=bf16")
    given = options.parse_args()
    output, limit = RESULTS / "runs" / f"families-{'-'.join(given.families)}", parse_bytes(given.budget)
    if not given.go_on:
        shutil.rmtree(output, ignore_errors=True)
    rows = [row for kind in given.families for row in run(kind, given, output)]
    cells = []
    for row in rows:
        took, predicted = row.get("measured"), row["predicted"]
        each = f"{row['seconds'] / row['tiles']:.1f} s" if took and row["tiles"] else "-"
        more = (f"{took / predicted:.3f}", f"{row['seconds']:.0f} s", each) if took else ("-",) * 3
        more += (f"{row['waited'] / row['seconds']:.0%}", row["module"]) if took else ("-",) * 2
        cells.append((row["family"], row["stage"], mb(predicted), mb(took), *more))
    table(("family", "stage", "predicted", "measured", "ratio", "took", "a tile", "reading", "heaviest module"), cells)
    measured = [row for row in rows if "measured" in row]
    checks = {f"predicted within {given.budget}": all(row["predicted"] <= limit for row in rows)}
    if measured:
        peaks = max(row["outside"] for row in rows), max(row["outside_kernel"] for row in rows)
        print(f"from outside: samples {mb(peaks[0])}, by the kernel's marks {mb(peaks[1])}; read {mb(rows[0]['read'])}")
        ratios = [row["measured"] / row["predicted"] for row in measured]
        checks |= {
            f"from outside within {given.budget}": max(peaks) <= limit,
            f"at most {UNDER:.0%} above its prediction": all(ratio <= 1 + UNDER for ratio in ratios),
            f"predictions within {OVER:.0%}": all(ratio >= 1 - OVER for ratio in ratios),
        }
    if not given.go_on:
        shutil.rmtree(output, ignore_errors=True)
    name = "families-plan" if given.plan else f"families-{'-'.join(given.families)}"
    return finish(name, rows, checks)


if __name__ == "__main__":
    sys.exit(main())
