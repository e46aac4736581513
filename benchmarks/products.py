"""Bytes that a matrix product of a CPU takes besides its arguments and its result: weights are packed in parts.

python -m benchmarks.products                    # the layers of T5-XXL and FLUX.1, float32 and bf16
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks._measure import finish, mb, parser, table
from stages.config import ROOT
from stages.memory.monitor import own_peak_rss, usage
from stages.memory.trace import PACKED
from stages.techniques.dtype import TORCH

SHAPES = ((512, 4096, 10240), (512, 10240, 4096), (2816, 3072, 12288), (2816, 15360, 3072))  # tokens, inputs, outputs


def packed(dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> int:
    """Bytes of one layer's call, in a process of its own: peaks are of the process."""
    with torch.inference_mode():
        linear = nn.Linear(inputs, outputs, dtype=dtype)
        linear(torch.ones(8, inputs, dtype=dtype))
        given = torch.ones(1, tokens, inputs, dtype=dtype)
        Path("/proc/self/clear_refs").write_text("5")
        before = usage(os.getpid()).rss
        found = linear(given)
        return own_peak_rss() - before - found.nbytes


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--one", help="TOKENS,INPUTS,OUTPUTS,DTYPE in this process")
    given = options.parse_args()
    if given.one:
        *shape, name = given.one.split(",")
        print(packed(getattr(torch, name), *map(int, shape)))
        return 0
    rows = []
    for name in TORCH.values():
        for shape in SHAPES if name != "float16" else ():
            one = ",".join([*map(str, shape), name])
            command = [sys.executable, "-m", "benchmarks.products", "--one", one]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
            said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
            weight = shape[1] * shape[2] * getattr(torch, name).itemsize
            rows.append((name, *shape, weight, int(said.stdout)))
    header = ("dtype", "tokens", "inputs", "outputs", "weight", "packed")
    table(header, [(*row[:-2], mb(row[-2]), mb(row[-1])) for row in rows])
    most = max(row[-1] / row[-2] for row in rows)
    return finish(
        "products", rows, {f"at most {PACKED:.0%} of a weight is packed at a time: {most:.0%}": most <= PACKED}
    )


if __name__ == "__main__":
    sys.exit(main())
