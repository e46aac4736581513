"""Predicted against measured peak and time of every stage, over models, sizes and budgets.

    python -m benchmarks.prediction                                     # sd15 and embedded, a few sizes and budgets
    python -m benchmarks.prediction --models sd15 --sizes 512 --budgets 800MB

One step of each sampler and only the stages that open a model. ``runner + stage`` is what is predicted and measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks._measure import RESULTS, finish, mb, model_overrides, one_step, parser, runner, summary, table
from stages.config import parse_bytes

STAGES = "[text_encode,lowres,guide,denoise,decode]"
OVER, UNDER = 0.10, 0.03  # how far the measured peak may lie under and over the predicted one


def compare(output: Path, model: list[str], size: int, budget: str, steps: int, stages: str) -> list[dict[str, object]]:
    """The rows of one run; the budget that it was told does not stop it (``memory.enforce=off``)."""
    name = f"{size}-{budget}"
    common = [
        *model,
        f"width={size}",
        f"height={size}",
        *one_step(steps),
        f"memory.budget={budget}",
        "memory.enforce=off",
        "guide.phases=[]",
    ]
    done = runner(output, f"run={name}", f"stage={stages}", "prompt=a benchmark", "force=true", *common)
    if "memory.budget: got" in done.output:
        return [{"size": size, "budget": budget, "stage": "refused", "said": done.output.strip().splitlines()[-2:]}]
    done.check()
    rows: list[dict[str, object]] = []
    plans = json.loads((output / name / "plan.json").read_text(encoding="utf-8"))
    for stage in summary(output, name)["stages"]:
        if stage["predicted_peak_rss_bytes"] and stage["status"] != "reused":
            predicted, measured = stage["predicted_peak_rss_bytes"], stage["peak_rss_bytes"]
            row = {"size": size, "budget": budget, "stage": stage["name"], "predicted": predicted, "measured": measured}
            times = {"predicted_seconds": plans[stage["name"]]["predicted_seconds"], "seconds": stage["seconds"]}
            rows.append({**row, "ratio": measured / predicted, **times, "budget_bytes": parse_bytes(budget)})
    return rows


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--models", default="sd15,embedded")
    options.add_argument("--sizes", default="512,2048")
    options.add_argument("--budgets", default="600MB,800MB,4GB")
    options.add_argument("--stages", default=STAGES)
    options.add_argument("--steps", type=int, default=1)
    options.add_argument("--keep", action="store_true", help="keep the runs' folder")
    given = options.parse_args()
    rows = []
    for model in given.models.split(","):
        output = RESULTS / "runs" / f"prediction-{model}"
        chosen = model_overrides(model, given.checkpoint)
        for size in map(int, given.sizes.split(",")):
            for budget in given.budgets.split(","):
                for row in compare(output, chosen, size, budget, given.steps, given.stages):
                    rows.append({"model": model, **row})
                    print({key: value for key, value in rows[-1].items() if key != "budget_bytes"}, flush=True)
        if not given.keep:
            shutil.rmtree(output, ignore_errors=True)
    measured = [row for row in rows if "ratio" in row]
    cells = [
        (r["model"], r["size"], r["budget"], r["stage"], mb(r["predicted"]), mb(r["measured"]), f"{r['ratio']:.3f}",
         f"{r['predicted_seconds'] or 0:.0f} s", f"{r['seconds']:.0f} s")
        for r in measured
    ]  # fmt: skip
    table(("model", "size", "budget", "stage", "predicted", "measured", "ratio", "predicted", "took"), cells)
    checks = {
        f"every measured peak is at most {UNDER:.0%} above its prediction": all(
            r["ratio"] <= 1 + UNDER for r in measured
        ),
        f"every prediction is within {OVER:.0%}": all(1 - OVER <= r["ratio"] <= 1 + OVER for r in measured),
        "every measured peak is within its budget": all(r["measured"] <= r["budget_bytes"] for r in measured),
    }
    return finish("prediction", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
