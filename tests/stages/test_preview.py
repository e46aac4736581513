"""Previews: what they show, and that no result hangs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import Work
from PIL import Image
from small_models import write_tiny

from stages import preview
from stages.config import ConfigError
from stages.families.schedules import Schedule
from stages.files import read_object
from stages.models.tiny_vae import open_tiny
from stages.preview import coloured, decoded


def shown(work: Work, stage: str) -> np.ndarray:
    with Image.open(work.output_dir / "test" / "report" / f"preview_{stage}.png") as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderTiny."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_on_or_off_the_result_is_the_same(work: Work, tiny: Path) -> None:
    off = {"preview.lowres": 0, "preview.denoise": 0}
    folders = work.run(off, until="denoise")
    report = work.output_dir / "test" / "report"
    assert not list(report.glob("preview_*"))
    canvas = (folders["denoise"] / "canvas.safetensors").read_bytes()
    for stage, more in (("lowres", {}), ("denoise", {}), ("denoise", {"preview.vae": str(tiny), "preview.denoise": 2})):
        assert work.run(more, until=stage, force=True) == folders  # the same fingerprints
    assert (folders["denoise"] / "canvas.safetensors").read_bytes() == canvas
    assert shown(work, "lowres").shape == (7, 9, 3)  # a pixel a latent
    assert shown(work, "denoise").shape == (96, 128, 3)  # decoded
    assert not list(folders["denoise"].rglob("*preview*"))


@pytest.mark.parametrize(("mode", "until"), [("sdedit", "guide"), ("none", "decode")])
def test_colours_are_learned_where_the_vae_is_open(work: Work, mode: str, until: str) -> None:
    work.run({"guide.mode": mode}, until=until)
    (file,) = (work.output_dir / ".store" / ".previews").iterdir()
    colours = read_object(file)["map"]
    assert np.array(colours).shape == (5, 3)
    latents = torch.linspace(-1, 1, 4 * 6 * 8).reshape(4, 6, 8)
    assert not np.array_equal(coloured(latents, colours), coloured(latents, None))


def test_a_linear_vae_is_found_again(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_fitted", lambda context: tmp_path / "map.json")
    torch.manual_seed(1)
    weights, latents = torch.rand(4, 3) * 0.2, torch.randn(1, 4, 40, 24)
    seen = (torch.einsum("ck,bchw->bkhw", weights, latents) + 0.5).clamp(0, 1)
    pixels = (seen * 255).round().to(torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    preview.learn(None, latents[0], pixels[0])  # type: ignore[arg-type]
    found = coloured(latents[0], read_object(tmp_path / "map.json")["map"])
    assert np.abs(found.astype(int) - (seen[0] * 255).permute(1, 2, 0).numpy()).mean() < 3


def test_tiles_of_the_tiny_vae_meet(tiny: Path) -> None:
    vae = open_tiny(tiny)
    latents = torch.randn(4, 40, 30)
    whole = vae.decode(latents[None], return_dict=False)[0][0]
    expected = ((whole.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(decoded(vae, latents).astype(float) - expected).mean() < 2


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_a_step_expects_is_the_picture_without_noise(name: str, kind: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", prediction_type=kind)
    schedule = Schedule(scheduler)
    timestep = schedule.set_timesteps(10)[4]
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    kept = scheduler.alphas_cumprod[int(timestep)]
    told = {"epsilon": noise, "sample": clean, "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * clean}[kind]
    scaled = schedule.scaled(schedule.noised(clean, noise, timestep), timestep)
    assert torch.allclose(schedule.expected(scaled, told, timestep), clean, atol=2e-2)


def test_another_models_tiny_vae_is_refused(work: Work, tmp_path: Path, tiny: Path) -> None:
    for folder, said in ((tmp_path, "no config.json"), (work.checkpoint / "vae", "AutoencoderKL of 4 channels")):
        with pytest.raises(ConfigError, match=rf"model\.preview_vae.*{said}"):
            work.config({"preview.vae": str(folder)})
    work.config({"preview.vae": str(tiny)})
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match=r"model\.preview_vae.*only pickle files"):
        work.config({"preview.vae": str(tmp_path)})
