"""Layers in 8-bit integers against the same layers in floats: time, distance, memory besides what is handed over.

    python -m benchmarks integers                                  # layers of SD 1.5 and FLUX.1
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks integers          # as an older processor would: no such products

Samples are normally distributed. Each layer and its float twin take turns; bytes are of a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks._measure import finish, mb, parser, table
from stages.config import ROOT
from stages.int8 import Int8, Int8Conv2d, Int8Linear, exact, quantised
from stages.int8_blocks import FASTER
from stages.memory.monitor import own_peak_rss, usage

# shape of the samples, outputs, kernel (0: a linear layer)
LAYERS = (
    ((2, 320, 64, 64), 320, 3),
    ((2, 960, 64, 64), 320, 3),
    ((2, 640, 32, 32), 640, 3),
    ((2, 1280, 16, 16), 1280, 3),
    ((2, 2560, 8, 8), 1280, 3),
    ((2, 320, 64, 64), 320, 1),
    ((2, 4096, 320), 320, 0),
    ((2, 4096, 320), 2560, 0),
    ((2, 4096, 1280), 320, 0),
    ((2, 1024, 640), 5120, 0),
    ((2, 256, 1280), 10240, 0),
    ((1, 2816, 3072), 12288, 0),
)


def layers(number: int) -> tuple[nn.Module, Int8, Tensor]:
    """(floats, integers, samples)."""
    shape, outputs, kernel = LAYERS[number]
    torch.manual_seed(0)
    samples = torch.randn(shape)
    if kernel:
        samples = samples.to(memory_format=torch.channels_last)
        layer: nn.Linear | nn.Conv2d = nn.Conv2d(shape[1], outputs, kernel, padding=kernel // 2)
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        made: Int8 = Int8Conv2d(layer, samples=True)  # type: ignore[arg-type]
    else:
        layer = nn.Linear(shape[-1], outputs)
        made = Int8Linear(layer, samples=True)
    for name, values in quantised(layer.weight.detach(), torch.float32).items():
        setattr(made, name, nn.Parameter(values, requires_grad=False))
    return layer, made, samples


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def bytes_besides(number: int) -> int:
    """Of one call, besides samples and result, in this process: peaks are of the process."""
    layer, made, samples = layers(number)
    del layer
    made(samples[:, ..., :8, :8] if samples.dim() == 4 else samples[:, :8])
    Path("/proc/self/clear_refs").write_text("5")
    before = usage(os.getpid()).rss
    found = made(samples)
    return own_peak_rss() - before - found.nbytes


def besides(number: int) -> int:
    command = [sys.executable, "-m", "benchmarks", "integers", "--one", str(number)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    return int(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--one", type=int, help="bytes of this layer's call, in this process")
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    with torch.inference_mode():
        if given.one is not None:
            print(bytes_besides(given.one))
            return 0
        rows, ratios = [], []
        for number, (shape, outputs, kernel) in enumerate(LAYERS):
            layer, made, samples = layers(number)
            expected, found = layer(samples), made(samples)
            pairs = [(timed(lambda: layer(samples)), timed(lambda: made(samples))) for _ in range(given.repeats)]  # noqa: B023
            ratios.append(median(own / floats for floats, own in pairs))
            far = float((found - expected).norm() / expected.norm())
            kind = f"{kernel}x{kernel}" if kernel else "linear"
            floats, own = (f"{1000 * median(times):.1f} ms" for times in zip(*pairs, strict=True))
            rows.append((kind, "x".join(map(str, shape)), outputs, floats, own, f"{ratios[-1]:.2f}", f"{far:.4f}"))
            rows[-1] += (mb(besides(number)),)
    table(("layer", "samples", "outputs", "floats", "integers", "ratio", "distance", "memory besides"), rows)
    checks = {
        f"on the whole at most 1/{FASTER} of the time: {median(ratios):.2f}": median(ratios) <= 1 / FASTER,
        "sums are exact on this processor": exact(),
    }
    return finish("integers", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
