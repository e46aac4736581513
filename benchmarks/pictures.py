"""A camera's pictures as guides: what opening and encoding them takes, predicted and measured, within a budget.

python -m benchmarks pictures                               # 60 and 108 megapixels, canvases of 256 to 2048 pixels
python -m benchmarks pictures --sides 256 --budgets 800MB   # one of them
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._measure import RESULTS, finish, mb, model_overrides, parser, runner, summary, table
from stages.config import parse_bytes

SIZES = {60: (8944, 6708), 108: (12000, 9000)}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("picture.jpg", {"quality": 92}),
    "progressive": ("progressive.jpg", {"quality": 92, "progressive": True}),
    "rgba": ("alpha.png", {"compress_level": 1}),
}


def write(folder: Path, kind: str, megapixels: int) -> Path:
    """A picture of smooth colours; once."""
    name, options = KINDS[kind]
    path, (width, height) = folder / f"{megapixels}-{name}", SIZES[megapixels]
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.empty((height, width, 4 if kind == "rgba" else 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width) * 255 // width, (np.arange(height) * 255 // height)[:, None]
    pixels[..., 2:] = 128
    Image.fromarray(pixels).save(path, **options)
    return path


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024, 2048], help="of the canvas, pixels")
    options.add_argument("--budgets", nargs="+", default=["600MB", "800MB"])
    options.add_argument("--megapixels", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    given = options.parse_args()
    output, rows, over = RESULTS / "runs" / "pictures", [], 0
    shutil.rmtree(output, ignore_errors=True)
    chosen = [
        "prompt=a benchmark",
        "stage=guide",
        "run=x",
        "force=true",
        *model_overrides("embedded", given.checkpoint),
    ]
    for megapixels in given.megapixels:
        for kind in given.kinds:
            path = write(output / "pictures", kind, megapixels)
            for side in given.sides:
                for budget in given.budgets:
                    size = [f"width={side}", f"height={side}", f"memory.budget={budget}", f"guide.image={path}"]
                    done = runner(output / "runs", *chosen, *size)
                    refused = re.search(r"needs at least (\d+) MB", done.output)
                    if done.code and not refused:
                        raise SystemExit(done.output[-3000:])
                    stages = {} if refused else {one["name"]: one for one in summary(output / "runs", "x")["stages"]}
                    predicted = stages["guide"]["predicted_peak_rss_bytes"] if stages else 0
                    over += not refused and done.kernel_peak > parse_bytes(budget)
                    said = f"refused: {refused[1]} MB" if refused else mb(done.kernel_peak)
                    rows.append((f"{megapixels} MP {kind}", side, budget, mb(predicted), said))
                    print(*rows[-1], file=sys.stderr, flush=True)
            path.unlink()
    table(("picture", "canvas", "budget", "predicted", "measured"), rows)
    return finish("pictures", rows, {f"none of {len(rows)} over its budget": not over})


if __name__ == "__main__":
    sys.exit(main())
