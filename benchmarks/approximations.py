"""Techniques that change the picture: how much faster it is, how far from the plain one, and whether its bytes hold.

    python -m benchmarks approximations                   # the embedded model: 12 prompts each way, then four runs
    python -m benchmarks approximations --ways "step cache 3" --prompts 4
    python -m benchmarks approximations --device cuda     # seconds in place of CPU-seconds, budgets of the GPU

Each prompt's picture is of one tile of the native size, made in this process by the stages of ``runner.py``; time is
CPU-seconds of the stage. PSNR is to the plain picture of the same prompt, 'right' the share of attributes asked for
that the classifier of ``embedded_quality`` sees. Then a canvas in tiles is made at two budgets, and once more by a run
that is killed on the way: the same bytes are expected.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._measure import RESULTS, finish, parser, psnr, runner, slug, table
from stages.config import ROOT

TOME, CACHE, QUANTIZE = "technique.tome.ratio", "technique.step_cache.interval", "technique.quantize"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ToMe 0.5": {TOME: 0.5},
    "step cache 2": {CACHE: 2},
    "step cache 3": {CACHE: 3},
    "step cache 5": {CACHE: 5},
    "step cache 5, depth 2": {CACHE: 5, "technique.step_cache.depth": 2},
    "ToMe 0.5, step cache 3": {TOME: 0.5, CACHE: 3},
    "int8 weights": {QUANTIZE: "int8_weights"},
    "int8": {QUANTIZE: "int8"},
}
HELD = ("ToMe 0.5", "step cache 3", "int8")  # whose bytes are compared
ONE = {"width": 256, "height": 256, "denoise.num_inference_steps": 25}
CANVAS = {"width": 512, "height": 512, "denoise.num_inference_steps": 8, "seed": 3}
FOLDER = RESULTS / "approximations"
SECONDS = 600  # that a run to be killed may take


BUDGETS = {"cpu": ("memory.budget", "450MB", "4GB"), "cuda": ("memory.device_budget", "250MB", "4GB")}


class Made(NamedTuple):
    pictures: list[Path]
    seconds: list[float]  # of denoise, by picture


def overrides(way: str, device: str, more: dict[str, Any]) -> list[str]:
    """Of a run with the embedded model, without a guide: what is compared is the denoiser."""
    values = {"model": "embedded", "guide.mode": "none", "prompt": "x", "device": device, **more, **WAYS[way]}
    return [f"{key}={value}" for key, value in values.items()]


def pictures(way: str, device: str, prompts: list[str]) -> Made:
    """One for each prompt; all is planned once."""
    from stages import __main__
    from stages.context import Progress
    from stages.documents import escape, load, save_text
    from stages.files import write_text
    from stages.job import Job
    from stages.workflow.graph import build
    from stages.workflow.store import Store

    name, clock = slug(way), time.process_time if device == "cpu" else time.perf_counter
    runner(FOLDER, f"run={name}", "stage=plan", "progress=false", *overrides(way, device, ONE)).check()
    config, made = load(FOLDER / name / "config.yaml"), Made([], [])
    for number, prompt in enumerate(prompts):
        run_dir = FOLDER / f"{name}-{number:02}"
        config.prompt, config.run = escape(prompt), run_dir.name
        write_text(run_dir / "config.yaml", save_text(config))
        shutil.copyfile(FOLDER / name / "plan.json", run_dir / "plan.json")
        states = build(Job.of(load(run_dir / "config.yaml")), Store(FOLDER / ".store"), verify=False)
        for state in states:
            begin = clock()
            __main__.run(state.name, run_dir, "stages", Progress(), True)
            if state.name == "denoise":
                made.seconds.append(clock() - begin)
        made.pictures.append(run_dir / "image.png")
        shutil.copyfile(states[-1].entry.path / "image.png", made.pictures[-1])
    return made


def canvas(way: str, device: str, *more: str) -> str:
    """A digest of a canvas in tiles, made from nothing or from what was left."""
    runner(
        FOLDER / "bits",
        "run=bits",
        "stage=[text_encode,denoise]",
        "progress=false",
        *overrides(way, device, CANVAS),
        *more,
    ).check()
    return hashlib.sha256((FOLDER / "bits" / "bits" / "denoise" / "canvas.safetensors").read_bytes()).hexdigest()[:16]


def killed(way: str, device: str) -> str:
    """The same of a run that is killed after some steps and started again."""
    shutil.rmtree(FOLDER / "bits", ignore_errors=True)
    command = [sys.executable, "runner.py", f"output_dir={FOLDER / 'bits'}", "run=bits", "stage=[text_encode,denoise]"]
    process = subprocess.Popen([*command, "progress=false", *overrides(way, device, CANVAS)], cwd=ROOT)
    begin = time.monotonic()
    while not list((FOLDER / "bits").rglob("checkpoint/even_*.safetensors")):
        if process.poll() is not None or time.monotonic() - begin > SECONDS:
            raise SystemExit(f"{way}: no step to be killed after in {SECONDS} seconds")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return canvas(way, device)


def bits(way: str, device: str) -> dict[str, str]:
    """Digests of the canvas: at two budgets, and killed."""
    key, *budgets = BUDGETS[device]
    found = {}
    for budget in budgets:
        shutil.rmtree(FOLDER / "bits", ignore_errors=True)
        found[budget] = canvas(way, device, f"{key}={budget}")
    return {**found, "killed": killed(way, device)}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--ways", nargs="+", choices=WAYS)
    made.add_argument("--prompts", type=int, default=12)
    made.add_argument("--device", choices=BUDGETS, default="cpu")
    options = made.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin count as work
    from benchmarks._quality_attributes import asked, judge_pictures

    shutil.rmtree(FOLDER, ignore_errors=True)
    prompts = asked()[:: max(1, 64 // options.prompts)][: options.prompts]
    plain, results = None, []
    can = [way for way in WAYS if options.device == "cpu" or QUANTIZE not in WAYS[way]]
    for way in dict.fromkeys(("plain", *(options.ways or can))):
        found = pictures(way, options.device, [one.prompt for one in prompts])
        plain = plain or found
        row: dict[str, Any] = {"way": way, "seconds": round(float(np.median(found.seconds[1:])), 2)}
        pairs = zip(plain.pictures, found.pictures, strict=True)
        row["psnr_db"] = None if found is plain else round(float(np.mean([psnr(*pair) for pair in pairs])), 1)
        row["right"] = judge_pictures(found.pictures, prompts)["overall"]
        row["speed"] = round(results[0]["seconds"] / row["seconds"], 2) if results else 1.0
        row["bytes"] = bits(way, options.device) if way in HELD else None
        results.append(row)
        print(row, flush=True)
    table(
        (
            "way",
            "s of 25 steps" if options.device == "cuda" else "CPU-s of 25 steps",
            "speed",
            "PSNR",
            "attributes right",
            "two budgets, killed",
        ),
        [
            (
                one["way"],
                f"{one['seconds']:.1f}",
                f"{one['speed']:.2f}x",
                "-" if one["psnr_db"] is None else f"{one['psnr_db']} dB",
                f"{one['right']:.0%}",
                "" if one["bytes"] is None else f"{len(set(one['bytes'].values()))} picture",
            )
            for one in results
        ],
    )
    held = [one for one in results if one["bytes"]]
    checks = {
        f"{one['way']}: the same bytes at two budgets and killed": len(set(one["bytes"].values())) == 1 for one in held
    }
    return finish("approximations", results, checks)


if __name__ == "__main__":
    sys.exit(main())
