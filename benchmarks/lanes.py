"""Samples side by side against one kernel after the other: the time of a UNet's sample, by the size of a micro-batch.

    python -m benchmarks lanes                                  # the embedded model
    python -m benchmarks lanes --checkpoint DIR --side 64       # of a Stable Diffusion, whose tiles are larger
    python -m benchmarks lanes --dtype float32

Stock diffusers with resident weights in the environment of a stage; ways take turns, the quickest of them counts.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._measure import finish, in_stage_environment, parser, table
from stages.config import ROOT


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--side", type=int, default=32, help="latents of a tile")
    options.add_argument("--samples", type=int, default=16, help="that each way takes in a turn")
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    return in_stage_environment(partial(measured, given), "lanes")


def measured(given: Any) -> int:
    """In this process."""
    import torch
    from diffusers import UNet2DConditionModel

    from stages.memory.lanes import Lanes, lanes_for, part_of

    dtype, threads = getattr(torch, given.dtype), torch.get_num_threads()
    folder = given.checkpoint or Path(ROOT / "models" / "embedded")
    network: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).eval()
    network = network.to(memory_format=torch.channels_last)
    channels, width = network.config.in_channels, network.config.cross_attention_dim

    def call(samples: int) -> None:
        image = torch.zeros(samples, channels, given.side, given.side, dtype=dtype)
        states = torch.zeros(samples, 77, width, dtype=dtype)
        network(image.contiguous(memory_format=torch.channels_last), torch.tensor(500), states)

    found: dict[tuple[int, str], dict[str, Any]] = {}
    micro_batches = sorted({2, min(16, given.samples)})
    with torch.inference_mode():
        for _ in range(1 + given.repeats):
            for size in micro_batches:
                for way, part, count in (("alone", size, 1), ("lanes", part_of(size), lanes_for(size, threads))):
                    lanes, begin, used = Lanes(count), time.monotonic(), time.process_time()
                    lanes.each([part] * (given.samples // part), call)
                    seconds, used = time.monotonic() - begin, time.process_time() - used
                    lanes.close()
                    best = found.setdefault((size, way), {"seconds": float("inf"), "lanes": count, "part": part})
                    if seconds < best["seconds"]:
                        best |= {"seconds": seconds, "cpu_seconds": used}
    rows, results = [], []
    for (size, way), one in found.items():
        share = one["seconds"] / found[size, "alone"]["seconds"]
        each = [f"{1000 * one[name] / given.samples:.1f} ms" for name in ("seconds", "cpu_seconds")]
        rows.append((size, way, f"{one['lanes']} of {one['part']}", *each, f"{share:.2f}x"))
        results.append({"micro_batch": size, "way": way, **one})
    print(f"{folder.name}, {given.dtype}, {given.side}x{given.side} latents, {threads} threads")
    table(("micro-batch", "way", "lanes, samples a kernel", "a sample", "its processor time", "of alone"), rows)
    checks = {
        f"lanes are no slower, micro-batch {size}": found[size, "lanes"]["seconds"]
        <= 1.02 * found[size, "alone"]["seconds"]
        for size in micro_batches
    }
    return finish("lanes", results, checks)


if __name__ == "__main__":
    sys.exit(main())
