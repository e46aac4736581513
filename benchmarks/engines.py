"""A whole run by each engine of a CPU: seconds and peak of every stage beside each other.

    python -m benchmarks engines --checkpoint DIR                       # SD 1.5, 2048x2048, 8 + 8 steps: over an hour
    python -m benchmarks engines --ways torch int8 --steps 2 --budget 700MB

``torch`` is torch alone, in the dtype that ``auto`` takes; ``openvino`` has OpenVINO's attention, ``int8`` that and
8-bit integers in the denoiser. A small run before each makes its copies of the weights and looks at the models, once.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

from benchmarks._measure import (
    RESULTS,
    finish,
    mb,
    model_overrides,
    one_step,
    parser,
    psnr,
    runner,
    summary,
    table,
)
from stages.config import parse_bytes

WAYS = {
    "torch": ["technique.attention=sdpa"],
    "openvino": ["technique.attention=openvino"],
    "int8": ["technique.attention=openvino", "technique.quantize=int8"],
    "fp32": ["technique.attention=sdpa", "technique.dtype=fp32"],
}
USUAL = ("torch", "openvino", "int8")


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=USUAL)
    options.add_argument("--model", default="sd15", choices=("sd15", "sd21", "sdxl", "embedded"))
    options.add_argument("--size", type=int, default=2048)
    options.add_argument("--steps", type=int, default=8, help="of the low-res picture, and as many of the tiles")
    options.add_argument("--budget", default="800MB")
    options.add_argument("overrides", nargs="*", help="further overrides, such as denoise.overlap=64")
    given = options.parse_args()
    output = RESULTS / "runs" / "engines"
    shutil.rmtree(output, ignore_errors=True)
    chosen = [*model_overrides(given.model, given.checkpoint), "prompt=a benchmark", f"memory.budget={given.budget}"]
    found: dict[str, dict[str, Any]] = {}
    peaks: dict[str, int] = {}
    for way in given.ways:
        own = [*chosen, *WAYS[way], *given.overrides]
        runner(output, "run=before", "width=512", "height=512", *one_step(), *own).check()
        size = [f"width={given.size}", f"height={given.size}"]
        done = runner(output, f"run={way}", "force=true", *size, *one_step(given.steps), *own, echo=True).check()
        found[way], peaks[way] = summary(output, way), done.peak
        print(f"{way}: {done.seconds:.0f} s, {mb(done.peak)} from outside", flush=True)
    first = given.ways[0]
    seconds = {way: {stage["name"]: stage["seconds"] for stage in one["stages"]} for way, one in found.items()}
    rows = []
    for name in seconds[first]:
        cells = []
        for one in found.values():
            stage = next(stage for stage in one["stages"] if stage["name"] == name)
            peak, planned = stage["peak_rss_bytes"], stage["predicted_peak_rss_bytes"]
            cells += [f"{stage['seconds']:.1f} s, {mb(peak)} ({peak / planned:.3f})" if planned else "-"]
        rows.append((name, *cells))
    whole = {way: sum(one.values()) for way, one in seconds.items()}
    rows.append(("all", *(f"{whole[way]:.0f} s, {mb(peaks[way])}, {whole[way] / whole[first]:.2f}x" for way in found)))
    rows.append(
        ("PSNR", *(f"{psnr(output / first / 'image.png', output / way / 'image.png'):.1f} dB" for way in found))
    )
    table(("stage", *(f"{way}: took, peak (of plan)" for way in found)), rows)
    limit = parse_bytes(given.budget)
    checks = {f"{way}: {mb(peak)} within {given.budget}": peak <= limit for way, peak in peaks.items()}
    result = {"seconds": seconds, "peaks": peaks, "runs": found}
    shutil.rmtree(output, ignore_errors=True)
    return finish(f"engines-{given.model}-{given.size}", result, checks)


if __name__ == "__main__":
    sys.exit(main())
