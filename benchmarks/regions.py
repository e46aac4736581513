"""Prompts where they belong: snowy mountains left, desert right; the classifier judges each half, seed after seed.

python -m benchmarks.regions
python -m benchmarks.regions --width 512 --height 256 --seeds 4

The low-res picture's guidance is 6 here, not the embedded model's 4: two prompts in one picture want a firmer hand.
The pictures stay in ``outputs/benchmarks/regions``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS, finish, model_overrides, parser, runner, table

PROMPTS = ("snowy mountains", "desert")
OVERLAP = 0.03  # of the width: how far each region reaches over the middle
AIM = 0.9
GUIDANCE = "lowres.guidance_scale=6"


def regions() -> str:
    """Two halves, as an override."""
    left = f"{{prompt: {PROMPTS[0]}, box: [0.0, 0.0, {0.5 + OVERLAP}, 1.0]}}"
    return f"regions=[{left},{{prompt: {PROMPTS[1]}, box: [{0.5 - OVERLAP}, 0.0, 1.0, 1.0]}}]"


def judge(picture: Path) -> list[tuple[str, float]]:
    """(setting, its probability) that the classifier sees in the left and in the right half."""
    import numpy as np
    import torch
    from PIL import Image

    from training.classifier import classify

    with Image.open(picture) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    middle, found = pixels.shape[-1] // 2, []
    for half in (pixels[..., :middle], pixels[..., middle:]):
        setting = classify(half)["setting"]
        found.append((setting["labels"][0], float(setting["probabilities"].max())))
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--height", type=int, default=1024)
    options.add_argument("--seeds", type=int, default=20, help="how many")
    options.add_argument("--first", type=int, default=0, help="the first of them")
    options.add_argument("overrides", nargs="*", help="more overrides of the runs, for example guide.mode=none")
    given = options.parse_args()
    output, pictures = RESULTS / "runs" / "regions", RESULTS / "regions"
    shutil.rmtree(output, ignore_errors=True)
    pictures.mkdir(parents=True, exist_ok=True)
    size = [f"width={given.width}", f"height={given.height}"]
    rows: list[dict[str, Any]] = []
    for seed in range(given.first, given.first + given.seeds):
        chosen = [*model_overrides("embedded", given.checkpoint), *size, regions(), GUIDANCE, f"seed={seed}"]
        done = runner(output, "run=x", "progress=false", *chosen, *given.overrides).check()
        picture = pictures / f"{given.width}x{given.height}_{seed:02d}.png"
        shutil.copyfile(output / "x" / "image.png", picture)
        (left, left_sure), (right, right_sure) = judge(picture)
        agrees = (left, right) == PROMPTS
        rows.append({"seed": seed, "left": left, "right": right, "agrees": agrees, "seconds": round(done.seconds, 1)})
        print(f"seed {seed}: {left} {left_sure:.2f} | {right} {right_sure:.2f}", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    table(list(rows[0]), [list(row.values()) for row in rows])
    share = sum(row["agrees"] for row in rows) / len(rows)
    text = f"both halves as asked in at least {AIM:.0%} of {len(rows)} seeds: {share:.0%}"
    return finish(f"regions-{given.width}x{given.height}", rows, {text: share >= AIM})


if __name__ == "__main__":
    sys.exit(main())
