"""A whole run by the real command line: what it writes, what it says, and the same stages by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import Command
from PIL import Image
from safetensors import safe_open
from whole_run import Run, arguments, start

from stages.config import ROOT, STAGES

FILES = {
    "text_encode": {"embeddings.safetensors"},
    "lowres": {"latents.safetensors"},
    "guide": {"latents.safetensors", "lowres.png"},
    "denoise": {"canvas.safetensors", *(f"tiles/r0{row}_c0{col}.safetensors" for row in (0, 1) for col in (0, 1, 2))},
    "decode": {f"tiles/r0{row}_c0{col}.safetensors" for row in (0, 1) for col in (0, 1, 2)},
    "stitch": {"image.png", "seams.json", "seams_decode.png", "seams_denoise.png", "zoom/zoom.json", "zoom/0/0_0.jpg"},
}


def by_hand(run: Run, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages", *words]
    return subprocess.run(command, env=run.command.environment({}), cwd=ROOT, capture_output=True, text=True)


def test_every_file_is_where_it_is_promised(finished: Run) -> None:
    for stage, files in FILES.items():
        link = finished.folder / stage
        assert link.is_symlink() and not os.path.isabs(os.readlink(link))
        found = {path.relative_to(link).as_posix() for path in link.rglob("*") if path.is_file()}
        assert found == files | {"manifest.json"}
        manifest = json.loads((link / "manifest.json").read_text())
        assert set(manifest["files"]) == files
        for file in files:
            if file.endswith(".safetensors"):
                with safe_open(link / file, "pt") as opened:
                    assert len(opened.metadata() or {}) <= 1  # several come out in varying byte order
    assert os.readlink(finished.folder / "image.png") == "stitch/image.png"
    assert (finished.folder / "report.html").stat().st_size > 1000
    assert finished.stdout.splitlines()[-1] == str(finished.folder / "image.png")


def test_run_json(finished: Run) -> None:
    summary = finished.summary
    assert summary["image"] == "image.png"
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    wanted = {"name", "status", "reason", "seconds", "peak_rss_bytes", "predicted_peak_rss_bytes", "peak_vram_bytes"}
    for stage in summary["stages"]:
        assert wanted | {"fingerprint"} <= set(stage)
        assert stage["status"] == "ran" and stage["reason"]
        assert stage["seconds"] > 0
        assert stage["peak_vram_bytes"] == 0
        assert len(stage["fingerprint"]) == 64
        assert (finished.folder / stage["name"]).resolve().name == stage["fingerprint"]
    assert summary["peak_rss_bytes"] == max(stage["peak_rss_bytes"] for stage in summary["stages"])
    assert summary["budget_bytes"] == 800_000_000
    assert 20e6 < summary["runner_peak_rss_bytes"] < 60e6


def test_forked_stages_and_fresh_ones_give_the_same_bytes(finished: Run, tmp_path: Path) -> None:
    """There is room in 800 MB, so they are forked unless a person says no."""
    assert (finished.folder / "logs" / "zygote.log").read_text() == "" and "start fresh" not in finished.stdout
    fresh = start(tmp_path, Path(finished.command.common[-1].partition("=")[2]), **{"launch.fork": "off"})
    assert not (fresh.folder / "logs" / "zygote.log").exists()
    assert fresh.image == finished.image
    for stage, files in FILES.items():
        for file in files:
            if file.endswith(".safetensors"):
                assert (fresh.folder / stage / file).read_bytes() == (finished.folder / stage / file).read_bytes(), file
    for name, stage in fresh.stages.items():
        forked = finished.stages[name]
        assert forked["fingerprint"] == stage["fingerprint"]
        assert forked["peak_rss_bytes"] > stage["peak_rss_bytes"] + 130e6  # what they are forked from is in the sum
        for one in (forked, stage):
            assert 0.97 < one["predicted_peak_rss_bytes"] / one["peak_rss_bytes"] < 1.15, (name, one)


def test_the_config_is_resolved_and_the_prompt_as_typed(finished: Run) -> None:
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert saved["prompt"] == "a cat, (sea:1.2)"
    assert saved["denoise"]["tile_size"] == 64 and saved["denoise"]["overlap"] == 16
    assert saved["lowres"]["width"] == 72 and saved["lowres"]["height"] == 56


def test_the_picture_says_how_it_was_made(finished: Run) -> None:
    with Image.open(finished.folder / "image.png") as image:
        image.load()
        assert image.size == (128, 96) and image.mode == "RGB"
        texts = dict(image.text)
    lines = texts["parameters"].splitlines()
    assert lines[0] == "a cat, (sea:1.2)" and lines[1] == "Negative prompt: dog"
    assert "Steps: 4, Sampler: euler_ancestral, CFG scale: 7.5, Seed: 5, Size: 128x96" in lines[2]
    told = json.loads(texts["highres_lowram"])
    assert told["lowres"]["num_inference_steps"] == 3 and told["scheduler"]["class_name"].startswith("EulerAnc")
    assert str(finished.command.output_dir) not in str(texts) and "model.path" not in str(texts)


def test_the_same_again_reuses_every_stage(finished: Run) -> None:
    done = finished.command("run=again", *arguments())
    assert done.returncode == 0, done.stderr
    again = finished._replace(folder=finished.folder.with_name("again"))
    assert not (again.folder / "logs").exists()  # no process of a stage was started
    assert {stage["status"] for stage in again.stages.values()} == {"reused"}
    assert again.image == finished.image
    assert again.summary["peak_rss_bytes"] == finished.summary["peak_rss_bytes"]
    assert "decode: reused" in done.stdout


def test_stages_by_hand(finished: Run) -> None:
    """``python -m stages <stage> <run-dir>``: no runner, same result."""
    before = finished.image
    done = by_hand(finished, "decode", str(finished.folder))
    assert done.returncode == 0, done.stderr
    assert "tiles" not in done.stdout  # reused
    forced = by_hand(finished, "stitch", str(finished.folder), "--force")
    assert forced.returncode == 0, forced.stderr
    assert "strips" in forced.stdout
    assert finished.image == before


def test_by_hand_what_cannot_work_is_said(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    unknown = by_hand(finished, "decod", str(finished.folder))
    assert unknown.returncode == 1
    assert "stage: got 'decod', expected one of text_encode, lowres" in unknown.stderr
    empty = tmp_path_factory.mktemp("empty")
    nothing = by_hand(finished, "decode", str(empty))
    assert nothing.returncode == 1 and "a run folder with its config.yaml" in nothing.stderr
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    (empty / "config.yaml").write_text(yaml.safe_dump({**saved, "output_dir": str(empty)}))
    early = by_hand(finished, "decode", str(empty))
    assert early.returncode == 1
    assert f"Make them: python -m stages denoise {empty}" in early.stderr
    assert "Traceback" not in unknown.stderr + nothing.stderr + early.stderr


def test_a_stage_that_fails_for_a_known_reason_says_it_in_one_line(finished: Run, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "photo.png").write_text("not a picture")
    command = Command(ROOT / "runner.py", finished.command.output_dir, finished.command.common[-1].partition("=")[2])
    done = command("run=broken", *arguments(**{"guide.image": folder / "photo.png"}))
    assert done.returncode == 1
    assert "guide.image: got" in done.stderr and "Traceback" not in done.stderr
