"""Peak memory of a whole run, measured from outside: runner and stages, sampled every 20 ms and as the kernel saw it.

python -m benchmarks.memory                      # full-size SD 1.5, 2048x2048, 2+2 steps, 800 MB
python -m benchmarks.memory --cgroup             # the same inside a memory cgroup of the budget, page cache included
python -m benchmarks.memory --least --size 512   # the smallest budget that works, and a run that proves it
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks._measure import (
    RESULTS,
    Measured,
    finish,
    mb,
    measure,
    model_overrides,
    one_step,
    parser,
    runner,
    summary,
    table,
)
from stages.config import parse_bytes
from stages.workflow.cgroup import Cgroup


def least(output: Path, options: list[str]) -> str:
    """The smallest budget that ``stage=plan`` accepts, as it says itself."""
    said = runner(output, "run=least", "stage=plan", "prompt=a benchmark", "memory.budget=400MB", *options).output
    found = re.search(r"needs at least (\d+) MB", said)
    if found is None:
        raise SystemExit(f"a budget of 400MB was not refused as expected:\n{said[-2000:]}")
    return f"{found[1]}MB"


def run(output: Path, budget: str, options: list[str], *, cgroup: bool) -> tuple[Measured, dict[str, Any]]:
    """A whole run (nothing reused), and what its cgroup charged."""
    arguments = ["run=memory", "stage=all", "force=true", "prompt=a benchmark", f"memory.budget={budget}", *options]
    if not cgroup:
        return runner(output, *arguments, echo=True), {}
    group = Cgroup.create(parse_bytes(budget), "benchmark")
    try:
        command = [sys.executable, "runner.py", f"output_dir={output}", "memory.enforce=watchdog", *arguments]
        done = measure(group.command(command), environment=group.environment, echo=True)
        return done, {**group.usage(), "oom_kills": group.oom_kills()}
    finally:
        group.remove()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="sd15", choices=("sd15", "sd21", "sdxl", "embedded", "small"))
    options.add_argument("--size", type=int, default=2048)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--budget", default="800MB")
    options.add_argument("--cgroup", action="store_true", help="run inside a cgroup of the budget")
    options.add_argument("--least", action="store_true", help="find the least budget, and run with it")
    options.add_argument("overrides", nargs="*", help="further overrides, such as decode.tile_size=224")
    given = options.parse_args()
    output = RESULTS / "runs" / f"memory-{given.model}"
    chosen = [*model_overrides(given.model, given.checkpoint), f"width={given.size}", f"height={given.size}"]
    chosen += [*one_step(given.steps), *given.overrides]
    budget = least(output, chosen) if given.least else given.budget
    done, charged = run(output, budget, chosen, cgroup=given.cgroup)
    done.check()
    found = summary(output, "memory")
    rows = []
    for stage in found["stages"]:
        peaks = mb(stage["peak_rss_bytes"]), mb(stage["predicted_peak_rss_bytes"])
        rows.append((stage["name"], f"{stage['seconds']:.1f} s", *peaks, stage["peak_module"]))
    table(("stage", "took", "peak", "predicted", "heaviest module"), rows)
    print(f"{done.seconds:.0f} s; from outside: samples {mb(done.peak)}, by the kernel's marks {mb(done.kernel_peak)}")
    if charged:
        print(f"cgroup: {mb(charged.get('peak'))} charged at most, {mb(charged.get('file'))} of page cache at the end")
    limit = parse_bytes(budget)
    where = f"{given.model} {given.size}x{given.size} with {budget}"
    checks = {
        f"{where}: sampled peak {mb(done.peak)} within the budget": done.peak <= limit,
        f"{where}: kernel's peak {mb(done.kernel_peak)} within the budget": done.kernel_peak <= limit,
        "run.json agrees with the outside within 3%": abs(found["peak_rss_bytes"] / done.kernel_peak - 1) < 0.03,
    }
    if given.cgroup:
        checks["finished inside the cgroup without a kill"] = charged["oom_kills"] == 0
    result = {**done._asdict(), "output": "", "budget": budget, "cgroup": charged, "run": found}
    if given.size > 512:
        shutil.rmtree(output, ignore_errors=True)
    name = "memory" + ("-least" if given.least else "") + ("-cgroup" if given.cgroup else "")
    return finish(f"{name}-{given.model}-{given.size}", result, checks)


if __name__ == "__main__":
    sys.exit(main())
