"""The canvas stage over a tiny real model: tiles, guidance, guide modes, odd shapes, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Work, look, payload
from torch import Tensor, nn

from stages.config import BLENDS, ConfigError
from stages.families import unet
from stages.memory.tensors import read_tensors
from stages.plans import StagePlan
from stages.tiles import latent_grid

QUICK = {"guide.mode": "none", "denoise.num_inference_steps": 2, "denoise.tile_size": 64, "denoise.overlap": 16}


def canvas(folder: Path) -> Tensor:
    return read_tensors(folder / "canvas.safetensors")["latents"]


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of every call of the UNet."""
    counts: list[int] = []
    original = unet.UNetDenoiser.__call__

    def counted(self: Any, batch: Any, timestep: Tensor) -> Tensor:
        counts.append(len(batch.samples))
        return original(self, batch, timestep)

    monkeypatch.setattr(unet.UNetDenoiser, "__call__", counted)
    return counts


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (4.0, 2)])
def test_guidance_one_has_no_unconditional_pass(work: Work, samples: list[int], guidance: float, passes: int) -> None:
    values = {**QUICK, "width": 128, "height": 112, "denoise.guidance_scale": guidance}
    work.run(values, until="denoise")
    config = work.config(values)
    tiles = latent_grid(128, 112, config.denoise.tile_size, config.denoise.overlap, 8)
    assert len(tiles) == 6
    assert sum(samples) == 2 * len(tiles) * passes


def test_guidance_one_ignores_the_negative_prompt(work: Work) -> None:
    plain = canvas(work.run({**QUICK, "denoise.guidance_scale": 1.0}, until="denoise")["denoise"])
    negative = {**QUICK, "denoise.guidance_scale": 1.0, "negative_prompt": "dog"}
    assert torch.equal(canvas(work.run(negative, until="denoise")["denoise"]), plain)
    guided = canvas(work.run({**QUICK, "negative_prompt": "dog"}, until="denoise")["denoise"])
    assert not torch.equal(guided, canvas(work.run(QUICK, until="denoise")["denoise"]))


@pytest.mark.parametrize("size", [(264, 520), (40, 48), (72, 64), (72, 72), (1024, 64), (64, 1024), (8, 8)])
def test_any_canvas(work: Work, size: tuple[int, int]) -> None:
    """Odd, smaller than a tile, 8 pixels more than a tile, very long: all tiles, finite, of the canvas' size."""
    width, height = size
    found = work.run({**QUICK, "width": width, "height": height, "denoise.num_inference_steps": 1}, until="denoise")
    latents = canvas(found["denoise"])
    assert latents.shape == (1, 4, height // 8, width // 8) and latents.dtype == torch.float32
    assert latents.isfinite().all() and latents.std() > 0.1
    tiles = latent_grid(width, height, 64, 16, 8)
    files = {path.stem for path in (found["denoise"] / "tiles").iterdir()}
    assert files == {tile.name for tile in tiles}
    for tile in tiles:
        cut = read_tensors(found["denoise"] / "tiles" / f"{tile.name}.safetensors")["latents"]
        assert torch.equal(cut, latents[tile.index])


def test_blends_differ_and_an_unknown_one_is_refused(work: Work) -> None:
    found = [canvas(work.run({**QUICK, "denoise.blend": blend}, until="denoise")["denoise"]) for blend in BLENDS]
    for index, first in enumerate(found):
        assert all(not torch.equal(first, second) for second in found[index + 1 :])
    with pytest.raises(ConfigError, match=r"denoise\.blend: got 'gausian'.*Did you mean gaussian"):
        work.config({"denoise.blend": "gausian"})


def test_guide_modes_run_and_differ(work: Work) -> None:
    values = {"denoise.num_inference_steps": 3, "denoise.strength": 1.0}
    modes = {
        "sdedit": {"guide.mode": "sdedit"},
        "hold": {"guide.mode": "hold", "guide.hold_steps": 0.7},
        "skip_residual": {"guide.mode": "skip_residual"},
        "weaker": {"guide.mode": "skip_residual", "guide.skip_residual_power": 6.0},
    }
    found = {}
    for name, more in modes.items():
        found[name] = canvas(work.run({**values, **more}, until="denoise")["denoise"])
        assert found[name].isfinite().all()
    names = list(found)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            assert not torch.equal(found[first], found[second]), (first, second)
    assert len(list((work.output_dir / ".store" / "guide").iterdir())) == 1  # one guide for all of them


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_after_a_step(work: Work, monkeypatch: pytest.MonkeyPatch, scheduler: str, stop: int) -> None:
    values = {**QUICK, "denoise.num_inference_steps": 3, "scheduler.class_name": scheduler}
    plan = {"denoise": StagePlan(micro_batch=4, group_size=4)}  # three groups a step
    expected = canvas(work.run(values, until="denoise", plan=plan)["denoise"])
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    calls = 0
    original = unet.UNetDenoiser.__call__

    def fails(self: Any, batch: Any, timestep: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > (stop - 1) * 3 + 1:  # in the middle of a step
            raise RuntimeError("pulled the plug")
        return original(self, batch, timestep)

    monkeypatch.setattr(unet.UNetDenoiser, "__call__", fails)
    with pytest.raises(RuntimeError, match="plug"):
        second.run(values, until="denoise", plan=plan)
    monkeypatch.setattr(unet.UNetDenoiser, "__call__", original)
    folder = second.states(second.config(values))["denoise"].entry.path
    assert any((folder / "checkpoint").glob("*_000.safetensors")) == (stop > 1)
    found = second.run(values, until="denoise", plan=plan)
    assert second.status == ("resumed" if stop > 1 else "ran")
    assert torch.equal(canvas(found["denoise"]), expected)
    files = payload(found["denoise"])["files"]
    assert "canvas.safetensors" in files and not any(name.startswith("checkpoint") for name in files)
    assert not list(folder.glob("checkpoint*"))


@pytest.mark.parametrize("garbage", [b"", b"garbage" * 1000, "half"])
def test_a_torn_checkpoint_starts_the_stage_over_and_says_so(work: Work, garbage: bytes | str) -> None:
    expected = canvas(work.run(QUICK, until="denoise")["denoise"])
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    second.run(QUICK, until="text_encode")
    folder = second.states(second.config(QUICK))["denoise"].entry.path
    (folder / "checkpoint").mkdir(parents=True)
    if garbage == "half":  # of a real safetensors file
        whole = (work.states(work.config(QUICK))["denoise"].entry.path / "canvas.safetensors").read_bytes()
        garbage = whole[: len(whole) // 2]
    assert isinstance(garbage, bytes)
    (folder / "checkpoint" / "odd_000.safetensors").write_bytes(garbage)
    found = second.run(QUICK, until="denoise")
    assert second.status == "ran"
    (note,) = second.notes
    assert note.startswith("warning: the checkpoint cannot be used (odd_000.safetensors is not")
    assert note.endswith("; starts from the first step")
    assert torch.equal(canvas(found["denoise"]), expected)


def test_seed_zero_is_a_seed(work: Work) -> None:
    first, second = (canvas(work.run({**QUICK, "seed": seed}, until="denoise")["denoise"]) for seed in (0, 1))
    assert not torch.equal(first, second)
    again = Work(work.output_dir.with_name("second"), work.checkpoint)
    assert torch.equal(canvas(again.run({**QUICK, "seed": 0}, until="denoise")["denoise"]), first)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_embeddings_and_latents_are_float32_whatever_the_models_dtype(work: Work, dtype: str) -> None:
    found = work.run({**QUICK, "technique.dtype": dtype}, until="denoise")
    assert canvas(found["denoise"]).dtype == torch.float32
    embeddings = read_tensors(found["text_encode"] / "embeddings.safetensors")
    assert {tensor.dtype for tensor in embeddings.values()} == {torch.float32}


def test_weights_are_not_touched_by_inference_mode(work: Work) -> None:
    """The latents can be used by whoever called the stage: they are no inference tensors of a closed model."""
    latents = canvas(work.run(QUICK, until="denoise")["denoise"])
    assert nn.functional.relu(latents.requires_grad_()).sum().backward() is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [(192, 128), pytest.param((200, 168), marks=pytest.mark.slow)])
def test_dilated_sampling_joins_every_mode_and_resumes(
    work: Work, monkeypatch: pytest.MonkeyPatch, samples: list[int], size: tuple[int, int]
) -> None:
    values = {"width": size[0], "height": size[1], "denoise.num_inference_steps": 3, "denoise.strength": 1.0}
    plan = {"denoise": StagePlan(micro_batch=4, group_size=4)}
    on = {**values, "denoise.dilated.enabled": True}
    for mode in ("sdedit", "skip_residual", "none"):
        plain = canvas(work.run({**values, "guide.mode": mode}, until="denoise", plan=plan)["denoise"])
        found = canvas(work.run({**on, "guide.mode": mode}, until="denoise", plan=plan)["denoise"])
        assert found.isfinite().all() and not torch.equal(found, plain)
    samples.clear()
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    on["guide.mode"] = "none"
    original = unet.UNetDenoiser.__call__

    def fails(self: Any, batch: Any, timestep: Tensor) -> Tensor:
        if float(timestep) < 500:
            raise RuntimeError("pulled the plug")
        return original(self, batch, timestep)

    monkeypatch.setattr(unet.UNetDenoiser, "__call__", fails)
    with pytest.raises(RuntimeError, match="plug"):
        second.run(on, until="denoise", plan=plan)
    monkeypatch.setattr(unet.UNetDenoiser, "__call__", original)
    again = canvas(second.run(on, until="denoise", plan=plan)["denoise"])
    assert second.status == "resumed" and torch.equal(again, found)


@pytest.mark.slow
def test_dilated_sampling_is_planned(work: Work) -> None:
    values = {"width": 192, "height": 128, "guide.mode": "none"}
    off = look(work.config(values), "denoise")["denoise"]
    on = look(work.config({**values, "denoise.dilated.enabled": True}), "denoise")["denoise"]
    # 4 x 3 tiles, and two in each of 2 x 2 sub-canvases of 12 x 8 latents: pairs in micro-batches of 16
    assert (off.models[0].micro_batch, off.models[0].micro_batches, on.models[0].micro_batches) == (16, 2, 3)
    assert on.extra > off.extra
