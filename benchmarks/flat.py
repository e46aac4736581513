"""Peak memory while the picture grows: 2048, 4096, 8192 pixels a side (16384 by option).

python -m benchmarks.flat
python -m benchmarks.flat --sizes 2048,16384 --steps 0 --look FOLDER     # as a person runs it, and pictures of it
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks._measure import RESULTS, finish, mb, model_overrides, one_step, parser, runner, summary, table
from benchmarks.look import look

GROWTH = 1.10


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="embedded", choices=("embedded", "small", "sd15"))
    options.add_argument("--sizes", default="2048,4096,8192")
    options.add_argument("--budget", default="800MB")
    options.add_argument("--steps", type=int, default=1, help="low-res and high-res steps; 0: the defaults")
    options.add_argument("--prompt", default="a lighthouse on a cliff at sunset")
    options.add_argument("--look", type=Path, help="write a small picture and four crops of every size there")
    given = options.parse_args()
    output = RESULTS / "runs" / "flat"
    rows = []
    for size in map(int, given.sizes.split(",")):
        shutil.rmtree(output, ignore_errors=True)
        chosen = [*model_overrides(given.model, given.checkpoint), *(one_step(given.steps) if given.steps else ())]
        chosen += [f"memory.budget={given.budget}", "launch.fork=off"]  # the stages alone
        done = runner(output, "run=x", f"prompt={given.prompt}", f"width={size}", f"height={size}", *chosen).check()
        if given.look:
            look(output / "x", given.look / f"{size}")
        stages = {stage["name"]: stage["peak_rss_bytes"] for stage in summary(output, "x")["stages"]}
        rows.append({"size": size, "peak": done.kernel_peak, "seconds": done.seconds, "stages": stages})
        print(f"{size}: {mb(done.kernel_peak)}, {done.seconds:.0f} s", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    names = [*dict.fromkeys(name for row in rows for name in row["stages"] if not name.rpartition("_")[2].isdigit())]
    cells = [(r["size"], mb(r["peak"]), f"{r['seconds']:.0f} s", *(mb(r["stages"][n]) for n in names)) for r in rows]
    table(("side", "peak", "time", *names), cells)
    growth = max(row["peak"] for row in rows) / rows[0]["peak"]
    text = f"the peak grows by at most 10% from {rows[0]['size']} to {rows[-1]['size']}: {growth - 1:+.1%}"
    return finish(f"flat-{given.model}", rows, {text: growth <= GROWTH})


if __name__ == "__main__":
    sys.exit(main())
