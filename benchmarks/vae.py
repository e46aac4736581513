"""Decoding with the full-size Stable Diffusion VAE, tile by tile: peak, time, disk, and PSNR to a whole-image decode.

    python -m benchmarks.vae                                  # 1024x1024, all modes
    python -m benchmarks.vae --sizes 1024,2048 --modes exact

The latents come from a tiny random denoiser; only the VAE has full size. ``whole`` is stock diffusers, all at once, in
the same dtype and in a process of its own (1024x1024 takes 2.7 GB, 2048x2048 about 11 GB). Other sizes are compared
with it by their area; the mid-block's attention, which grows with the square of that, is counted apart.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks._measure import (
    RESULTS,
    checkpoint,
    finish,
    mb,
    measure,
    parser,
    psnr,
    runner,
    stage_environment,
    summary,
    table,
)

WHOLE = """
import sys, time
from pathlib import Path
import torch
from PIL import Image
from stages.vae.tiled import to_uint8
from stages.memory.imports import light_imports
from stages.memory.tensors import read_tensors
with light_imports():
    from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[4])).eval()
latents = read_tensors(Path(sys.argv[2]))["latents"] / vae.config.scaling_factor
attention, spent = vae.decoder.mid_block.attentions[0], [0.0]
attend = attention.forward
def timed(*args, **options):
    begin = time.monotonic()
    found = attend(*args, **options)
    spent[0] += time.monotonic() - begin
    return found
attention.forward = timed
begin = time.monotonic()
with torch.inference_mode():
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
print("seconds", time.monotonic() - begin, spent[0])
Image.fromarray(to_uint8(pixels)[0].permute(1, 2, 0).numpy()).save(sys.argv[3])
"""


def mixed(given: Path | None) -> Path:
    """A checkpoint with the full-size VAE and everything else tiny, by links."""
    full, small = checkpoint(given), checkpoint(None, small=True)
    folder = RESULTS / "checkpoints" / "vae-only"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in small.iterdir():
        (folder / part.name).symlink_to((full / "vae" if part.name == "vae" else part).resolve())
    return folder


class Disk:
    """The largest size of a folder, looked at every half second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.highest, self._ended = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            used = subprocess.run(["du", "-sk", str(self.folder)], capture_output=True, text=True, check=False).stdout
            self.highest = max(self.highest, int(used.split()[0]) * 1024 if used else 0)


def whole(folder: Path, canvas: Path, picture: Path, dtype: str) -> dict[str, Any]:
    """The reference: stock diffusers, the whole canvas at once."""
    command = [sys.executable, "-c", WHOLE, str(folder / "vae"), str(canvas), str(picture), dtype]
    given = {k: v for k, v in stage_environment().items() if k not in os.environ}
    done = measure(command, environment=given).check()
    seconds, attention = map(float, done.output.split("seconds")[-1].split()[:2])
    return {"mode": "whole", "seconds": seconds, "attention": attention, "peak": done.kernel_peak, "disk": 0}


def attention_seconds(output: Path) -> float:
    """How long the attention of the last decode ran, from its memory timeline."""
    newest = max((output / ".store" / ".stats").glob("decode-*.json"), key=lambda path: path.stat().st_mtime)
    line = json.loads(newest.read_text(encoding="utf-8"))["timeline"]
    return sum(after[0] - now[0] for now, after in itertools.pairwise(line) if "attentions" in now[-1])


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--sizes", default="1024")
    options.add_argument("--modes", default="independent,shared,exact")
    options.add_argument("--budget", default="800MB")
    options.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    options.add_argument("--whole", default="1024", help="sides that are decoded whole to compare with, or none")
    given = options.parse_args()
    folder, output = mixed(given.checkpoint), RESULTS / "runs" / "vae"
    shutil.rmtree(output, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    checks: dict[str, bool] = {}
    whole_sizes = [] if given.whole == "none" else [int(side) for side in given.whole.split(",")]
    wholes: dict[int, dict[str, Any]] = {}
    for size in sorted({*map(int, given.sizes.split(",")), *whole_sizes}):
        common = ["model=sd15", f"model.path={folder}", "guide.mode=none", "denoise.num_inference_steps=1", "prompt=a"]
        common += [f"width={size}", f"height={size}", f"memory.budget={given.budget}", f"technique.dtype={given.dtype}"]
        runner(output, f"run={size}", "stage=[text_encode,denoise]", *common).check()
        if size in whole_sizes:
            picture = output / f"whole-{size}.png"
            dtype = {"bf16": "bfloat16", "fp32": "float32"}[given.dtype]
            wholes[size] = whole(folder, output / str(size) / "denoise" / "canvas.safetensors", picture, dtype)
            rows.append({"size": size, **wholes[size]})
        for mode in given.modes.split(",") if str(size) in given.sizes.split(",") else ():
            begin = time.monotonic()
            with Disk(output / ".store" / "decode") as disk:
                runner(output, f"run={size}-{mode}", *common, f"decode.mode={mode}").check()
            stage = next(s for s in summary(output, f"{size}-{mode}")["stages"] if s["name"] == "decode")
            row = {"size": size, "mode": mode, "seconds": stage["seconds"], "peak": stage["peak_rss_bytes"]}
            row |= {"disk": disk.highest, "predicted": stage["predicted_peak_rss_bytes"]}
            row["attention"] = attention_seconds(output)
            if size in wholes:
                row["psnr"] = psnr(picture, output / f"{size}-{mode}" / "image.png")
                row["psnr"] = min(row["psnr"], 99.0)  # equal pictures
            rows.append(row)
            print(f"{size} {mode}: {time.monotonic() - begin:.0f} s", flush=True)
            if mode == "exact":
                checks[f"exact {size}: peak {mb(row['peak'])} within {given.budget}"] = (
                    row["peak"] <= summary(output, f"{size}-{mode}")["budget_bytes"]
                )
                planned = json.loads((output / f"{size}-{mode}" / "plan.json").read_text())["decode"]["disk_bytes"]
                row["planned_disk"] = planned
                checks[f"exact {size}: disk {mb(row['disk'])} of {mb(planned)} planned"] = row["disk"] <= 1.05 * planned
                off = row["predicted"] / row["peak"] - 1
                checks[f"exact {size}: prediction {off:+.1%} from the peak"] = -0.03 <= off <= 0.10
                if size in wholes:
                    checks[f"exact {size}: at least 45 dB from the whole decode"] = row["psnr"] >= 45
                if wholes:
                    side, reference = max(wholes.items())
                    ratio = (row["seconds"] - row["attention"]) / (reference["seconds"] - reference["attention"])
                    ratio *= (side / size) ** 2
                    text = (
                        f"exact {size}: at most 1.3x the time of the whole {side} by area, attention apart: {ratio:.2f}"
                    )
                    checks[text] = ratio <= 1.3
            shutil.rmtree(output / ".store" / "decode", ignore_errors=True)
    table(
        ("side", "mode", "time", "of it attention", "peak", "predicted", "disk", "PSNR to whole"),
        [
            (
                *(r["size"], r["mode"], f"{r['seconds']:.1f} s", f"{r['attention']:.1f} s", mb(r["peak"])),
                *(mb(r.get("predicted")), mb(r["disk"]), f"{r['psnr']:.1f} dB" if "psnr" in r else "-"),
            )
            for r in rows
        ],
    )
    shutil.rmtree(output, ignore_errors=True)
    return finish("vae", rows, checks)


if __name__ == "__main__":
    sys.exit(main())
