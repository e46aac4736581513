"""The training recipe, end to end at toy size, and the folder it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from training import export as flat
from training.clock import Clock, Phase
from training.export import export, files_of, read_flat, write_flat

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def _train(out: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "training.train", "--smoke", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training")
    _train(out, "--processes", "2")
    return out


def test_smoke_run_leaves_everything(trained: Path) -> None:
    names = {"vae.safetensors", "text_encoder.safetensors", "unet.safetensors", "classifier.safetensors"}
    assert names | {"figures.json", "sheet.png", "state.pt"} <= {f.name for f in trained.iterdir()}
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["updates"]["denoiser"] > 0
    assert figures["vae_psnr"] > 5


def test_a_command_ends_by_its_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("training.clock.time.monotonic", lambda: now[0])
    clock = Clock({"vae": 8.0, "denoiser": 50.0}, {"vae": 3.0}, stop_after=20.0)
    for name, steps in (("vae", 5), ("denoiser", 15)):  # the rest of a budget; then what is left of the command
        phase = Phase(clock, name)
        while phase.go():
            phase.tick(1, loss=0.5)
            now[0] += 1.0
        assert phase.steps == steps
    assert clock.done("vae") and not clock.done("denoiser")


def test_resume_goes_on_instead_of_starting_over(trained: Path) -> None:
    before = json.loads((trained / "figures.json").read_text())
    said = _train(trained, "--resume")
    after = json.loads((trained / "figures.json").read_text())
    assert "resumed from" in said
    assert after["updates"] == before["updates"]  # every budget was used: nothing is left to do
    assert after["scaling_factor"] == before["scaling_factor"]


def test_large_flat_files_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    monkeypatch.setattr(flat, "PART_BYTES", 300)  # a layer has 144 bytes
    write_flat(tmp_path, "unet", module)
    assert [f.name for f in files_of(tmp_path, "unet")] == ["unet-0.safetensors", "unet-1.safetensors"]
    read = read_flat(tmp_path, "unet")
    assert read.keys() == module.state_dict().keys()
    assert all(torch.equal(read[k], v.half().float()) for k, v in module.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"no vae\.safetensors"):
        read_flat(tmp_path, "vae")


def test_exported_folder_makes_a_picture(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    assert type(pipeline.tokenizer).__name__.startswith("CLIPTokenizer")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np", "return_dict": False}
    picture = pipeline("a lighthouse 介绍", **options)[0][0]
    assert picture.shape == (64, 64, 3)
