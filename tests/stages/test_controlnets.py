"""ControlNets in tiles: what a tile is shown, at any budget, after a stop; what is planned, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Work, look, stopped_at
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages import PIPELINE
from stages.canvas.mixture import TileBatch
from stages.config import ConfigError
from stages.context import StageContext
from stages.memory.tensors import read_tensors
from stages.models.controlnets import controlnet, refuse
from stages.plans import ModelPlan, StagePlan
from stages.stitch import settings
from stages.techniques import techniques_of
from stages.techniques.controlnet import CONDITION, SCALE, ControlNets
from stages.techniques.controls import KEY, Control
from stages.tiles import Size, Tile

TILES = {"height": 128, "denoise.tile_size": 96, "denoise.overlap": 64, "lowres.num_inference_steps": 1}


@pytest.fixture
def net(small: Callable[[str], Path]) -> Path:
    return small("sd15_controlnet")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).resize((128, 128)).save(path)
    return path


def canvas(folder: Path) -> Tensor:
    return read_tensors(folder / "canvas.safetensors")["latents"]


def test_what_may_be_asked_for(work: Work, net: Path, image: Path) -> None:
    def refused(entry: Any, said: str, **more: Any) -> None:
        with pytest.raises(ConfigError, match=said):
            work.config({KEY: [entry], **more})

    own = {"path": str(net), "guide": True}
    assert work.config({KEY: [own]}).model.controlnets == [own]
    for wrong in (3, str(net), {"path": str(net)}, {**own, "image": str(image)}, {**own, "weight": 1}):
        refused(wrong, "model.controlnets")
    refused({**own, "scale": float("nan")}, "scale of .*a number")
    for start, end in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1)):
        refused({**own, "start": start, "end": end}, "0 <= start < end <= 1")
    refused({**own, "path": "lllyasviel/control_v11f1e_sd15_tile"}, "hf download lllyasviel")
    refused({**own, "path": "nothing.safetensors"}, "a folder with config.json")
    refused({**own, "path": "a.pth"}, "Unpickling runs code")
    refused({"path": str(net), "image": "nothing.png"}, "a picture that can be read")
    refused(own, "there is no guide", **{"guide.mode": "none"})
    refused(own, "step_cache", **{"technique.step_cache.interval": 3})
    assert [Control("a", start=0.2, end=0.8).at(step, 4) for step in range(4)] == [False, True, True, False]


def test_another_models_is_refused(work: Work, small: Callable[[str], Path], net: Path, tmp_path: Path) -> None:
    unet = json.loads((work.checkpoint / "unet" / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"block_out_channels\): got \[16, 32, 32\], expected \[16, 32, 32, 32\]"):
        controlnet(small("sdxl_controlnet"), unet, {})
    config = json.loads((net / "config.json").read_text())
    for key, value, said in (
        ("cross_attention_dim", 64, r"cross_attention_dim\): got 64, expected 32"),
        ("conditioning_channels", 6, "expected 3"),
        ("conditioning_embedding_out_channels", [16, 32], "a picture 8 times smaller"),
        ("global_pool_conditions", True, "global_pool_conditions"),
    ):
        folder = tmp_path / key
        shutil.copytree(net, folder)
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ConfigError, match=said):
            controlnet(folder, unet, {})
    with pytest.raises(ConfigError, match="global_pool_conditions"):
        look(work.config({**TILES, KEY: [{"path": str(folder), "guide": True}]}), "denoise")
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetUnionModel"}))
    with pytest.raises(ConfigError, match="union of ControlNets"):
        work.config({KEY: [{"path": str(folder), "guide": True}]})
    tensors = load_file(net / "diffusion_pytorch_model.safetensors")
    save_file({**tensors, "task_embedding": torch.ones(6, 16)}, tmp_path / "union.safetensors")
    with pytest.raises(ConfigError, match="union of ControlNets"):
        controlnet(tmp_path / "union.safetensors", unet, {})


def test_a_transformers_is_refused_where_it_asks_for_more() -> None:
    flux = {"_class_name": "FluxTransformer2DModel", "joint_attention_dim": 4096}
    sd3 = {"_class_name": "SD3Transformer2DModel", "joint_attention_dim": 4096}
    for denoiser, kind, config, trait in (
        (flux, "FluxControlNetModel", {"num_mode": 7}, "num_mode"),
        (flux, "FluxControlNetModel", {"guidance_embeds": True}, "guidance_embeds"),
        (flux, "FluxControlNetModel", {"conditioning_embedding_channels": 16}, "conditioning_embedding_channels"),
        (flux, "FluxControlNetModel", {"joint_attention_dim": 2048}, "joint_attention_dim"),
        (sd3, "SD3ControlNetModel", {"extra_conditioning_channels": 1}, "extra_conditioning_channels"),
        (sd3, "SD3ControlNetModel", {"num_attention_heads": 24}, "num_attention_heads"),
        (sd3, "SD3ControlNetModel", {"joint_attention_dim": None}, None),
    ):
        why = refuse({"_class_name": kind, **config}, denoiser, 8)
        assert (why and why[0]) == trait


def test_a_tile_is_shown_what_lies_under_it(work: Work, net: Path, image: Path, tmp_path: Path) -> None:
    config = work.config({**TILES, KEY: [{"path": str(net), "image": str(image), "scale": 0.5, "start": 0.5}]})
    (technique,) = (one for one in techniques_of(config, "denoise") if isinstance(one, ControlNets))
    technique.prepare(
        StageContext(stage=PIPELINE[3], config=config, run_dir=tmp_path, output=tmp_path), Size(16, 16), tmp_path
    )
    tiles = (Tile(0, 0, 0, 0, 12, 12), Tile(0, 0, 0, 0, 12, 12), Tile(1, 1, 4, 4, 16, 16), Tile(0, 0, 0, 8, 8, 16))
    batch = TileBatch(
        samples=torch.zeros(3, 4, 12, 12), prompt_rows=(0,) * 3, unconditional=(False,) * 3, tiles=tiles[:3]
    )
    inputs: dict[str, Tensor] = {"sample": batch.samples}
    technique.begin(0, 2, tmp_path)
    technique.before_call(batch, torch.tensor(1), inputs)
    assert list(inputs) == ["sample"], "it does not act yet"
    technique.begin(1, 2, tmp_path)
    technique.before_call(batch, torch.tensor(1), inputs)
    with Image.open(image) as shown:
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
    assert torch.equal(inputs[CONDITION.format(0)], torch.stack([pixels[tile.scaled(8).index] for tile in tiles[:3]]))
    assert inputs[SCALE.format(0)] == 0.5
    # one of two sub-canvases side by side shows all of it
    batch.samples, batch.tiles = torch.zeros(1, 4, 8, 8), tiles[3:]
    batch.pictures = (Tile(0, 0, 0, 8, 8, 16),)
    technique.before_call(batch, torch.tensor(1), inputs)
    with Image.open(image) as shown:
        halved = torch.from_numpy(np.array(shown.resize((64, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 255
    assert (inputs[CONDITION.format(0)][0] - halved).abs().max() <= 1 / 255


@pytest.mark.slow
def test_any_budget_and_any_stop_give_the_same_bytes(
    work: Work, net: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [{"path": str(net), "guide": True, "end": 0.8}, {"path": str(net), "image": str(image), "scale": 0.5}]
    values = {**TILES, KEY: asked, "denoise.strength": 1.0, "denoise.num_inference_steps": 2}
    streamed = ModelPlan(resident=(), unit_limit=400_000, ring_bytes=4_000_000)
    plan = {"denoise": StagePlan(models={"unet": streamed}, micro_batch=2, group_size=2)}
    same = {"denoise": StagePlan(micro_batch=2, group_size=8)}
    expected = canvas(work.run(values, until="denoise", plan=same, force=True)["denoise"])
    assert torch.equal(canvas(work.run(values, until="denoise", plan=plan, force=True)["denoise"]), expected)
    second = Work(work.output_dir.with_name("second"), work.checkpoint)
    steps = stopped_at(monkeypatch, 3)  # one of lowres, the first of the canvas, and this one
    with pytest.raises(KeyboardInterrupt):
        second.run(values, until="denoise", plan=plan)
    assert torch.equal(canvas(second.run(values, until="denoise", plan=plan)["denoise"]), expected)
    assert second.status == "resumed" and steps == [0, 0, 1, 1]


def test_it_is_planned_as_a_part_of_the_unet(work: Work, net: Path) -> None:
    values = {**TILES, "width": 64, "height": 64, "denoise.tile_size": 64, "denoise.overlap": 16}
    found = look(work.config({**values, KEY: [{"path": str(net), "guide": True}]}), "denoise")["denoise"].models[0]
    cut = found.cuts[-1]
    assert cut.order.index("controlnets.0.conv_in") < cut.order.index("conv_in") < cut.order.index("conv_out")
    assert "controlnets.0.controlnet_mid_block" in cut.order and not cut.parked
    files = (path / "diffusion_pytorch_model.safetensors" for path in (net, work.checkpoint / "unet"))
    numbers = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert 4 * numbers <= found.weights < 4.2 * numbers, "aligned"


def test_what_is_computed_again_and_what_is_kept_for_others(work: Work, net: Path, image: Path) -> None:
    def prints(*asked: Any) -> dict[str, str]:
        return {name: one.fingerprint for name, one in work.states(work.config({KEY: list(asked)})).items()}

    plain, guide = prints(), prints({"path": str(net), "guide": True})
    assert [name for name in plain if plain[name] != guide[name]] == ["denoise", "decode", "stitch"]
    shown = prints({"path": str(net), "image": str(image)})
    assert plain["lowres"] != shown["lowres"] and plain["text_encode"] == shown["text_encode"]
    moved = image.with_name("moved.png")
    moved.write_bytes(image.read_bytes())
    assert prints({"path": str(net), "image": str(moved)}) == shown
    assert prints({"path": str(net), "image": str(image), "end": 0.5})["denoise"] != shown["denoise"]
    said = settings(work.config({KEY: [{"path": str(net), "image": str(image), "scale": 0.5}]}))["model"]["controlnets"]
    assert said == [{"name": net.stem, "image": "picture.png", "scale": 0.5, "start": 0.0, "end": 1.0}]
    assert "controlnets" not in settings(work.config()).get("model", {})


def test_a_torn_picture_is_refused_before_any_work(work: Work, net: Path, image: Path) -> None:
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"model\.controlnets \(image\): got .*picture\.png"):
        look(work.config({**TILES, KEY: [{"path": str(net), "image": str(image)}]}), "denoise")
