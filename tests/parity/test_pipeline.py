"""The stages against the stock diffusers pipelines: same weights, same scheduler, same seed, float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from in_process import Work
from PIL import Image
from torch import Tensor

from stages.config import ROOT
from stages.memory.tensors import read_tensors

SCHEDULERS = sorted(path.stem for path in (ROOT / "conf" / "scheduler").glob("*.yaml"))
CLOSE = {"atol": 1e-4, "rtol": 0.0}
# One tile that covers the canvas, and no guide: plain text-to-image. The latents of random weights are about ten times
# those of a trained model, and so is the rounding by which channels-last kernels differ from stock's contiguous ones:
# the layout is stock's here, and `test_channels_last` looks at the default.
PLAIN = {
    "width": 128,
    "height": 64,
    "guide.mode": "none",
    "denoise.tile_size": 128,
    "denoise.overlap": 32,
    "seed": 7,
    "technique.channels_last": False,
}


def scheduler_values(name: str) -> dict[str, Any]:
    chosen = yaml.safe_load((ROOT / "conf" / "scheduler" / f"{name}.yaml").read_text())
    return {f"scheduler.{key}": value for key, value in chosen.items()}


def stock(kind: type, folder: Path, scheduler: str, *, single: str = "") -> Any:
    """The stock pipeline with the scheduler of ``conf/scheduler/<scheduler>.yaml``."""
    import diffusers

    if single:
        pipeline = kind.from_single_file(str(folder / single), config=str(folder), local_files_only=True)
    else:
        pipeline = kind.from_pretrained(folder)
    chosen = yaml.safe_load((ROOT / "conf" / "scheduler" / f"{scheduler}.yaml").read_text())
    if chosen["class_name"]:
        scheduler_class = getattr(diffusers, chosen["class_name"])
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **chosen.get("options", {}))
    if not hasattr(
        pipeline.text_encoder, "text_model"
    ):  # clip_skip in diffusers asks for it; transformers 5 has it no more
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected(pipeline: Any, *, steps: int, size: tuple[int, int], **arguments: Any) -> Tensor:
    return pipeline(
        prompt="a cat",
        num_inference_steps=steps,
        width=size[0],
        height=size[1],
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **arguments,
    ).images


def canvas(work: Work, values: dict[str, Any]) -> Tensor:
    found = work.run({**PLAIN, **values}, until="denoise")
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


@pytest.fixture(params=["sd15", "sd21"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, small: Callable[[str], Path]) -> Path:
    return small(kind)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image(kind: str, folder: Path, tmp_path: Path, scheduler: str) -> None:
    """Epsilon (sd15) and v-prediction (sd21) with every scheduler of ``conf/scheduler``."""
    values = {**scheduler_values(scheduler), "denoise.num_inference_steps": 6}
    got = canvas(Work(tmp_path, folder), values)
    want = expected(stock(StableDiffusionPipeline, folder, scheduler), steps=6, size=(128, 64), guidance_scale=7.5)
    assert got.dtype == torch.float32 and got.shape == want.shape == (1, 4, 8, 16)
    assert want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


def test_prediction_types_differ(small: Callable[[str], Path]) -> None:
    """The two kinds of checkpoint above really are of two prediction types."""
    types = [
        stock(StableDiffusionPipeline, small(k), "ddim").scheduler.config.prediction_type for k in ("sd15", "sd21")
    ]
    assert types == ["epsilon", "v_prediction"]


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"denoise.guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"denoise.guidance_scale": 0.0}, {"guidance_scale": 0.0}),
        ({"denoise.guidance_scale": 0.5, "negative_prompt": "dog"}, {"guidance_scale": 0.5, "negative_prompt": "dog"}),
        ({"negative_prompt": "a, (b)", "prompt_weighting": "off"}, {"negative_prompt": "a, (b)"}),
        ({"text_encode.clip_skip": 1}, {"clip_skip": 1}),
        ({"text_encode.clip_skip": 2, "negative_prompt": "dog"}, {"clip_skip": 2, "negative_prompt": "dog"}),
    ],
    ids=["guidance-1", "guidance-0", "guidance-half", "negative", "clip-skip-1", "clip-skip-2"],
)
def test_options(folder: Path, tmp_path: Path, values: dict[str, Any], arguments: dict[str, Any]) -> None:
    got = canvas(Work(tmp_path, folder), {**values, "denoise.num_inference_steps": 3})
    pipeline = stock(StableDiffusionPipeline, folder, "ddim")
    want = expected(pipeline, steps=3, size=(128, 64), **{"guidance_scale": 7.5, **arguments})
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()
    plain = expected(pipeline, steps=3, size=(128, 64), guidance_scale=7.5)
    assert not torch.allclose(plain, want, **CLOSE)  # the option does something


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_a_distilled_unet_takes_guidance_as_an_input(
    small: Callable[[str], Path], tmp_path: Path, guidance: float
) -> None:
    """LCM: ``time_cond_proj_dim``, no unconditional pass."""
    folder = tmp_path / "lcm"
    shutil.copytree(small("sd15"), folder)
    before = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**before.config, "time_cond_proj_dim": 64})
    unet.load_state_dict(before.state_dict(), strict=False)
    unet.save_pretrained(folder / "unet")
    values = {**scheduler_values("lcm"), "denoise.guidance_scale": guidance, "denoise.num_inference_steps": 4}
    got = canvas(Work(tmp_path / "out", folder), values)
    pipeline = stock(StableDiffusionPipeline, folder, "lcm")
    want = expected(pipeline, steps=4, size=(128, 64), guidance_scale=guidance)
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()
    other = expected(pipeline, steps=4, size=(128, 64), guidance_scale=3.0)
    assert not torch.allclose(other, want, **CLOSE)


def test_channels_last(folder: Path, tmp_path: Path) -> None:
    got = canvas(Work(tmp_path, folder), {"technique.channels_last": True, "denoise.num_inference_steps": 6})
    want = expected(stock(StableDiffusionPipeline, folder, "ddim"), steps=6, size=(128, 64), guidance_scale=7.5)
    assert (got - want).abs().max() < 1e-4 * want.std()


def test_single_file(kind: str, folder: Path, tmp_path: Path) -> None:
    file = f"{kind}.safetensors"
    work = Work(tmp_path, folder / file)
    got = canvas(work, {"model.config": str(folder), "denoise.num_inference_steps": 3})
    pipeline = stock(StableDiffusionPipeline, folder, "ddim", single=file)
    want = expected(pipeline, steps=3, size=(128, 64), guidance_scale=7.5)
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


@pytest.mark.parametrize(
    "prompt", ["a cat, (sea:1.2)", "", "a very long prompt " * 40, "介绍 ${x} 😀 <lora:x:0.8>\nend"]
)
def test_text_encode(folder: Path, tmp_path: Path, prompt: str) -> None:
    work = Work(tmp_path, folder)
    found = work.run({"prompt": prompt, "negative_prompt": "dog", "prompt_weighting": "off"}, until="text_encode")
    got = read_tensors(found["text_encode"] / "embeddings.safetensors")
    positive, negative = stock(StableDiffusionPipeline, folder, "ddim").encode_prompt(prompt, "cpu", 1, True, "dog")
    assert torch.allclose(got["prompt_embeds"], positive, atol=1e-5)
    assert torch.allclose(got["negative_prompt_embeds"], negative, atol=1e-5)
    assert any("longer than 77 tokens" in note for note in work.notes) == (len(prompt) > 100)


def test_attention_mask_where_the_encoder_wants_it(small: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(small("sd21"), tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_attention_mask": True}))
    found = Work(tmp_path, tmp_path / "model").run(until="text_encode")
    got = read_tensors(found["text_encode"] / "embeddings.safetensors")
    positive, negative = stock(StableDiffusionPipeline, tmp_path / "model", "ddim").encode_prompt(
        "a cat", "cpu", 1, True
    )
    assert torch.allclose(got["prompt_embeds"], positive, atol=1e-5)
    assert torch.allclose(got["negative_prompt_embeds"], negative, atol=1e-5)
    plain, _ = stock(StableDiffusionPipeline, small("sd21"), "ddim").encode_prompt("a cat", "cpu", 1, True)
    assert not torch.allclose(positive, plain, atol=1e-5)


@pytest.mark.parametrize("size", [(128, 64), (64, 64)])
def test_lowres(folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    values = {"lowres.width": size[0], "lowres.height": size[1], "seed": 7, **scheduler_values("dpmpp_2m")}
    values |= {"lowres.num_inference_steps": 4, "technique.channels_last": False}
    found = Work(tmp_path, folder).run(values, until="lowres")
    got = read_tensors(found["lowres"] / "latents.safetensors")["latents"]
    want = expected(stock(StableDiffusionPipeline, folder, "dpmpp_2m"), steps=4, size=size, guidance_scale=7.5)
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_guided_canvas_is_image_to_image(
    small: Callable[[str], Path], tmp_path: Path, scheduler: str, strength: float
) -> None:
    """``sdedit``: the guide's latents are what diffusers' img2img calls init latents."""
    folder, steps = small("sd15"), 6
    values = {**PLAIN, "guide.mode": "sdedit", "denoise.strength": strength, **scheduler_values(scheduler)}
    values |= {"denoise.num_inference_steps": steps}
    found = Work(tmp_path, folder).run(values, until="denoise")
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    got = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    pipeline = stock(StableDiffusionImg2ImgPipeline, folder, scheduler)
    want = pipeline(
        prompt="a cat",
        image=guide,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


@pytest.mark.parametrize("mode", ["independent", "shared"])
def test_decode_in_one_tile(folder: Path, tmp_path: Path, mode: str) -> None:
    values = {**PLAIN, "denoise.num_inference_steps": 2, "decode.tile_size": 128, "decode.mode": mode}
    found = Work(tmp_path, folder).run(values)
    latents = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    pipeline = stock(StableDiffusionPipeline, folder, "ddim")
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    want = torch.from_numpy(pipeline.image_processor.postprocess(decoded, output_type="np")).mul(255).round()[0]
    got = read_tensors(found["decode"] / "tiles" / "r00_c00.safetensors")["pixels"]
    difference = (got.permute(1, 2, 0).float() - want).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    with Image.open(found["stitch"] / "image.png") as image:
        assert torch.equal(
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 128, 3), got.permute(1, 2, 0)
        )
