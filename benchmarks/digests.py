"""What digests cost: seconds of processor time of a default run and of a full-size Stable Diffusion 1.5's first step.

Weights are checked when a process first reads them, so later steps cost nothing; results when they are written and
when they are reused.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS, finish, mb, parser, runner, table
from benchmarks.random_checkpoint import configs, specs
from stages.memory.prepared import DIGEST, PIECE

_BYTES = {"bf16": 2, "fp32": 4}


def rate(digest: Callable[[Any], Any]) -> float:
    """Bytes a second of processor time, piece by piece."""
    piece, count = memoryview(bytearray(PIECE)), 200
    begin = time.process_time()
    for _ in range(count):
        digest(piece)
    return count * PIECE / (time.process_time() - begin)


def results(run: Path) -> int:
    """Bytes that the manifests of a run's results vouch for."""
    manifests = [json.loads(path.read_text()) for path in run.glob("*/manifest.json")]
    return sum(file["bytes"] for manifest in manifests for file in manifest["files"].values())


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--run", type=Path, metavar="DIR", help="a finished default run; default: makes one")
    given = options.parse_args()
    run = given.run or RESULTS / "runs" / "digests" / "x"
    if not (run / "image.png").exists():
        runner(run.parent, f"run={run.name}", "prompt=a benchmark", echo=True).check()
    weights = rate(lambda piece: hashlib.blake2b(piece, digest_size=DIGEST))
    files = rate(lambda piece: hashlib.sha256(piece))
    found = results(run)
    rows = [("blake2b, weights", f"{weights / 1e6:.0f} MB/s", ""), ("sha256, results", f"{files / 1e6:.0f} MB/s", "")]
    rows.append(("results of a default run, written and reused", mb(found), f"{2 * found / files:.2f} s"))
    for dtype, size in _BYTES.items():
        config = configs("sd15", small=False)["unet"]
        nbytes = size * sum(math.prod(spec.shape) for spec in specs("unet", config))
        rows.append((f"SD 1.5's UNet in {dtype}, first step of a process", mb(nbytes), f"{nbytes / weights:.2f} s"))
    table(("what", "bytes", "processor time"), rows)
    return finish("digests", rows, {"faster than a disk's 500 MB/s": min(weights, files) > 5e8})


if __name__ == "__main__":
    sys.exit(main())
