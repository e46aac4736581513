"""Regions by the real command line, and on the embedded model: every prompt where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Command
from in_process import Work
from PIL import Image
from whole_run import arguments

from benchmarks.regions import PROMPTS, judge
from stages.config import ROOT

HALVES = [{"prompt": PROMPTS[0], "box": [0, 0, 272, 256]}, {"prompt": PROMPTS[1], "box": [240, 0, 512, 256]}]
SEEDS = 3
MODEL = {  # conf/model/embedded.yaml, few steps
    "model.native_size": 256,
    "model.size_multiple": 32,
    "scheduler.class_name": "DPMSolverMultistepScheduler",
    "lowres.num_inference_steps": 14,
    "lowres.guidance_scale": 6.0,
    "guide.tile_size": 256,
    "guide.phases": [],
    "denoise.num_inference_steps": 12,
    "denoise.strength": 0.25,
    "denoise.guidance_scale": 2.0,
    "decode.tile_size": 288,
}


@pytest.mark.slow
def test_two_halves_of_the_embedded_model_show_what_each_was_asked(tmp_path: Path) -> None:
    work = Work(tmp_path / "outputs", ROOT / "models" / "embedded")
    values = dict(MODEL, width=512, height=256, prompt="", regions=HALVES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pictures = [work.run({**values, "seed": seed})["stitch"] / "image.png" for seed in range(SEEDS)]
    finally:
        torch.set_num_threads(threads)
    seen = [judge(picture) for picture in pictures]
    right = [seen[seed][half][0] == PROMPTS[half] for seed in range(SEEDS) for half in (0, 1)]
    assert sum(right) >= 2 * SEEDS - 1, seen


def test_a_plan_draws_the_regions_and_refuses_what_they_leave_out(small: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    command = Command(ROOT / "runner.py", tmp_path / "outputs", small("sd15"))
    common = ["run=x", "stage=plan", *arguments()]
    drawn = command.output_dir / "x" / "regions.png"
    grid = command(*common, "regions.grid=[[sea, sand]]")
    assert grid.returncode == 0, grid.stderr
    assert f"regions: {drawn} shows 2 of them" in grid.stdout
    with Image.open(drawn) as picture:
        assert picture.size == (640, 480)
    outside = command(*common, "regions=[{prompt: sea, box: [0, 0, 136, 96]}]")
    assert outside.returncode == 1
    assert "regions[0].box: got [0, 0, 136, 96], expected a box inside the canvas of 128x96" in outside.stderr
    hole = command(*common, "regions={regions: [{prompt: sea, box: [0, 0, 64, 96]}], background: false}")
    assert hole.returncode == 1 and "nothing for pixels 64,0 to 128,96" in hole.stderr
    assert "Traceback" not in outside.stderr + hole.stderr
