"""A picture whose models are spread over GPUs (device.device_map), each stage in a process of its own.

    python -m benchmarks decoupled --checkpoint DIR --cap 16GB --width 768 --height 1360       # FLUX.1 in bf16, 2 GPUs

Text encoding, denoising (one tile, no guide) and decoding: seconds in all, where each model's modules lie, and what
each GPU reserved at most, which has to be within the cap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import _measure
from stages.config import parse_bytes
from stages.plans import described

STAGES = ("text_encode", "denoise", "decode")


def main(arguments: list[str] | None = None) -> int:
    """Run the stages one after the other, print a line each, write all as JSON."""
    parser = _measure.parser(__doc__)
    parser.add_argument("--model", default="flux", help="whose random weights are taken without --checkpoint")
    parser.add_argument("--cap", default="16GB", help="device.max_memory of every GPU")
    parser.add_argument("--map", choices=("balanced", "auto"), default="balanced")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=1360)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--more", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")
    options = parser.parse_args(arguments)
    checkpoint, cap = _measure.checkpoint(options.checkpoint, options.model), parse_bytes(options.cap)
    results: list[dict[str, Any]] = []
    with _measure.scratch() as scratch:
        folder, run = Path(scratch), "decoupled"
        common = [f"run={run}", "prompt=a lighthouse on a cliff", f"model.path={checkpoint}", "guide.mode=none"]
        common += [f"width={options.width}", f"height={options.height}", f"technique.dtype={options.dtype}"]
        common += [f"denoise.tile_size={max(options.width, options.height)}", "denoise.overlap=0", "device=cuda"]
        common += [f"denoise.num_inference_steps={options.steps}", f"device.device_map={options.map}"]
        common += [f"device.max_memory={options.cap}", *options.more]
        for name in STAGES:
            _measure.runner(folder, *common, f"stage={name}", echo=True).check()
            summary, plan = _measure.summary(folder, run), json.loads((folder / run / "plan.json").read_text())
            (stage,) = (one for one in summary["stages"] if one["name"] == name)
            found = {key: stage[key] for key in ("name", "seconds", "gpus", "device_map", "peak_rss_bytes")}
            found["predicted_peak_vram_bytes"] = plan[name]["predicted_peak_vram_bytes"]
            results.append(found)
    rows = []
    for one in results:
        for component, placement in one["device_map"].items():
            print(described(component, placement))
        gpus = ", ".join(map(_measure.mb, one["gpus"]))
        rows.append((one["name"], one["seconds"], gpus, _measure.mb(one["predicted_peak_vram_bytes"])))
    _measure.table(("stage", "seconds", "reserved by GPU", "predicted at most"), rows)
    checks = {f"{one['name']}: every GPU within {options.cap}": max(one["gpus"]) <= cap for one in results}
    maps = results[1]["device_map"].values()
    checks["the denoiser lies on several GPUs"] = any(len(set(one.values())) > 1 for one in maps)
    return _measure.finish("decoupled", results, checks)


if __name__ == "__main__":
    raise SystemExit(main())
