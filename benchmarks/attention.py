"""Self-attention alone by kind: torch's and OpenVINO's, seconds of the processor, RES, and how far they are apart.

    python -m benchmarks attention                     # float32, and bf16 where the processor has a kernel for it
    python -m benchmarks attention --isa avx2          # as a processor of eight years ago

Calls are of two samples. Memory is of a process that runs all of a model's, above what it holds before the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks._measure import finish, mb, parser, table
from stages.config import ROOT, ConfigError
from stages.memory.monitor import own_peak_rss, usage
from stages.memory.trim import drop_clean_pages
from stages.techniques.attention import OPENVINO
from stages.techniques.dtype import TORCH
from stages.workflow.launch.local import environment

# name, heads, tokens, numbers of a head
KINDS = {
    "sd15": (("SD 1.5, 64x64", 8, 4096, 40), ("32x32", 8, 1024, 80), ("16x16", 8, 256, 160)),
    "sdxl": (("SDXL, 64x64", 10, 4096, 64), ("32x32", 20, 1024, 64)),
    "flux": (("FLUX.1, 32x32 and 512", 24, 1536, 128),),
}
LIMITS = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
ERRORS = {"fp32": 1e-5, "bf16": 3e-2}


def seconds(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, tuple[float, float]]:
    """(of the processor, of the clock) of each, the least of some runs, in turns."""
    best = dict.fromkeys(calls, (math.inf, math.inf))
    for name, call in list(calls.items()) * runs:
        busy, begin = time.process_time(), time.perf_counter()
        call()
        took = time.process_time() - busy, time.perf_counter() - begin
        best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def compare(name: str, model: str, runs: int) -> dict[str, object]:
    """All kinds of a model in this process; ``refused`` where there is no kernel."""
    import torch
    import torch.nn.functional as F

    from stages.openvino_attention import POOL, Kernels

    dtype, rows, kernels = getattr(torch, TORCH[name]), [], Kernels()
    generator = torch.Generator().manual_seed(0)
    made: list[Any] = [
        [torch.randn(2, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
        for _, heads, tokens, width in KINDS[model]
    ]
    drop_clean_pages()  # as when a model opens
    with torch.inference_mode():
        stock = [F.scaled_dot_product_attention(*given) for given in made]
        Path("/proc/self/clear_refs").write_text("5")
        before = usage(os.getpid()).rss
        try:
            found = [kernels(*given) for given in made]
        except ConfigError as error:
            return {"refused": str(error)}
        took = own_peak_rss() - before - sum(one.nbytes for one in found)
        largest = 4 * max(given[1][0].numel() for given in made)
        for kind, given, one, other in zip(KINDS[model], made, found, stock, strict=True):
            exact = F.scaled_dot_product_attention(*(tensor.float() for tensor in given))
            errors = [((other.float() - exact).norm() / exact.norm()).item() for other in (other, one)]
            ways = {
                "torch": lambda given=given: F.scaled_dot_product_attention(*given),
                "openvino": lambda given=given: kernels(*given),
            }
            bits = hashlib.sha256(one.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
            rows.append({"kind": kind[0], **seconds(ways, runs), "errors": errors, "bits": bits})
    return {"rows": rows, "took": took, "planned": OPENVINO + POOL[dtype] * largest, "threads": torch.get_num_threads()}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--isa", choices=tuple(LIMITS), help="the instructions that all libraries may use")
    options.add_argument("--threads", type=int)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--of", nargs=2, metavar=("DTYPE", "MODEL"), help="one, in this process")
    given = options.parse_args()
    if given.of:
        dtype, model = given.of
        print("RESULT " + json.dumps(compare(dtype, model, given.runs)))
        return 0
    config = OmegaConf.create({"device": "cpu", "launch": {"threads": given.threads}})
    own, result, checks = {**environment(config), **LIMITS.get(given.isa, {})}, {}, {}
    for dtype, model in product(ERRORS, KINDS):
        command = [sys.executable, "-m", "benchmarks.attention", "--of", dtype, model, "--runs", str(given.runs)]
        done = subprocess.run(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True, check=True)
        found = result[f"{dtype} {model}"] = json.loads(done.stdout.rpartition("RESULT ")[2])
        if "refused" in found:
            print(f"{dtype}, {model}: {found['refused']}")
            continue
        cells = [
            (row["kind"], *(f"{row[way][part]:.3f} s" for part in (0, 1) for way in ("torch", "openvino")),
             f"{row['openvino'][0] / row['torch'][0]:.2f}x", *(f"{error:.1e}" for error in row["errors"]), row["bits"])
            for row in found["rows"]
        ]  # fmt: skip
        header = (dtype, "torch, CPU", "OpenVINO, CPU", "torch", "OpenVINO", "ratio", "torch", "OpenVINO", "bits")
        table(header, cells)
        print(f"RES {mb(found['took'])}, planned {mb(found['planned'])}; {found['threads']} threads")
        checks[f"{dtype}, {model}: no more memory than planned"] = found["took"] <= found["planned"]
        near = all(row["errors"][1] <= ERRORS[dtype] for row in found["rows"])
        checks[f"{dtype}, {model}: at most {ERRORS[dtype]} from float32 by torch"] = near
    return finish("attention", result, checks)


if __name__ == "__main__":
    sys.exit(main())
