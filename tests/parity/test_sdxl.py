"""SDXL against the stock pipeline: same weights, same seed, float32; what the model is told of a tile's place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from files import rows_of
from in_process import Work
from torch import Tensor

from stages.canvas.dilated import laid_out
from stages.canvas.mixture import batch, grid_views
from stages.families.facts import FACTS
from stages.families.sdxl import FAMILY, SDXLDenoiser
from stages.memory.layout import Layout
from stages.memory.rows import Window
from stages.memory.tensors import read_tensor, read_tensors
from stages.memory.units import rungs, split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import construct
from stages.models.single_file import CONFIGS
from stages.plans import ModelPlan, StagePlan
from stages.techniques.dtype import dtype_name
from stages.tiles import Size, grid
from stages.workflow.identity import model_identity
from stages.workflow.model import recognise

ONE_TILE = {**small_models.ONE_TILE, "model.family": "sdxl"}


@pytest.fixture
def folder(small: Callable[[str], Path]) -> Path:
    return small("sdxl")


def stock(folder: Path, kind: Any = StableDiffusionXLPipeline) -> Any:
    pipeline = kind.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected(pipeline: Any, *, steps: int = 3, **arguments: Any) -> Tensor:
    return pipeline(
        prompt="a cat",
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **arguments,
    ).images


def canvas(work: Work, values: dict[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run({**ONE_TILE, **values}, until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"denoise.guidance_scale": 5.0}, {"guidance_scale": 5.0}),
        ({"denoise.guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"denoise.guidance_scale": 5.0, "negative_prompt": "dog"}, {"guidance_scale": 5.0, "negative_prompt": "dog"}),
        (
            {"denoise.guidance_scale": 5.0, "text_encode.clip_skip": 1, "negative_prompt": "dog"},
            {"guidance_scale": 5.0, "clip_skip": 1, "negative_prompt": "dog"},
        ),
    ],
    ids=["guidance-5", "guidance-1", "negative", "clip-skip"],
)
def test_text_to_image(folder: Path, tmp_path: Path, values: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Euler, as SDXL's config says; an empty negative prompt is zeros, not an encoded empty text."""
    close(canvas(Work(tmp_path, folder), values), expected(stock(folder), width=128, height=64, **arguments))


def test_an_empty_negative_prompt_is_encoded_where_the_index_says_so(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    want = expected(stock(other), width=128, height=64, guidance_scale=5.0)
    close(canvas(Work(tmp_path, other), {"denoise.guidance_scale": 5.0}), want)
    assert (want - expected(stock(folder), width=128, height=64, guidance_scale=5.0)).abs().max() > 1e-2
    hashes = [model_identity(Work(tmp_path, of).config(ONE_TILE), ("tokenizer_2",), tmp_path) for of in (folder, other)]
    assert hashes[0] != hashes[1]


def test_single_file(folder: Path, tmp_path: Path) -> None:
    """The projection of the second text encoder lies transposed in it."""
    file = str(folder / "sdxl.safetensors")
    pipeline = StableDiffusionXLPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    checkpoint = Checkpoint.open(file, config=str(folder))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected_weights = getattr(pipeline, name).state_dict()
        tensors = checkpoint.component(name).tensors
        assert tensors.keys() == expected_weights.keys()
        assert all(torch.equal(read_tensor(tensors[key]), value) for key, value in expected_weights.items())
    config = Work(tmp_path, Path(file)).config({"model.name": "auto"})
    recognise(config, ())
    assert (config.model.family, config.model.native_size) == ("sdxl", 768)  # of 1024, in float32
    values = {"model.config": str(folder), "denoise.guidance_scale": 5.0, "negative_prompt": "dog"}
    want = expected(pipeline, width=128, height=64, guidance_scale=5.0, negative_prompt="dog")
    close(canvas(Work(tmp_path, Path(file)), values), want)


def test_one_step_without_guidance(folder: Path, tmp_path: Path) -> None:
    """As Turbo runs: an ancestral scheduler that begins at the end of its timesteps."""
    options = {"timestep_spacing": "trailing"}
    pipeline = stock(folder)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config, **options)
    values = {"scheduler.class_name": "EulerAncestralDiscreteScheduler", "scheduler.options": options}
    values |= {"denoise.num_inference_steps": 1, "denoise.guidance_scale": 0.0}
    want = expected(pipeline, steps=1, width=128, height=64, guidance_scale=0.0)
    close(canvas(Work(tmp_path, folder), values), want)


def test_crops_enter(folder: Path, tmp_path: Path) -> None:
    """Two tiles, against a loop that calls the stock UNet: each is told its own place on the canvas."""
    values = {"denoise.tile_size": 64, "denoise.overlap": 0, "denoise.blend": "constant", "denoise.guidance_scale": 5.0}
    got = canvas(Work(tmp_path, folder), {**values, "negative_prompt": "dog"})

    def loop(lefts: tuple[int, int]) -> Tensor:
        pipeline = stock(folder)
        with torch.no_grad():
            states, without, pooled, pooled_without = pipeline.encode_prompt("a cat", negative_prompt="dog")
            pipeline.scheduler.set_timesteps(3)
            latents = torch.randn((1, 4, 8, 16), generator=torch.Generator().manual_seed(7))
            latents = latents * pipeline.scheduler.init_noise_sigma
            for timestep in pipeline.scheduler.timesteps:
                scaled, noise = pipeline.scheduler.scale_model_input(latents, timestep), []
                for part, left in zip(scaled.chunk(2, dim=-1), lefts, strict=True):
                    ids = torch.tensor([[64, 128, 0, left, 64, 64]] * 2, dtype=torch.float32)
                    added = {"text_embeds": torch.cat([pooled_without, pooled]), "time_ids": ids}
                    both = pipeline.unet(
                        torch.cat([part] * 2),
                        timestep,
                        encoder_hidden_states=torch.cat([without, states]),
                        added_cond_kwargs=added,
                    ).sample
                    noise.append(both[:1] + 5.0 * (both[1:] - both[:1]))
                latents = pipeline.scheduler.step(torch.cat(noise, dim=-1), timestep, latents).prev_sample
        return latents

    close(got, loop((0, 64)))
    assert (got - loop((0, 0))).abs().max() > 1e-2


def test_a_tile_of_a_dilated_canvas_is_told_its_place_on_that(folder: Path, tmp_path: Path) -> None:
    """Sub-canvases lie side by side, and each is a picture of its own."""
    config = Work(tmp_path, folder).config(ONE_TILE)
    small = Size(8, 12)
    views = laid_out(grid_views(grid(small, Size(8, 8), 2), small, blend="constant", guidance_scale=1), 2, small)
    embeds = {"prompt_embeds": torch.zeros((1, 77, 80))}
    denoiser = SDXLDenoiser(torch.nn.Identity(), embeds, config, canvas=Size(16, 24), dtype=torch.float32)
    found = denoiser.time_ids(batch(Window(rows_of(torch.zeros((1, 4, 16, 24)))), views)).tolist()
    assert found == [[64, 96, 0, left, 64, 64] for left in (0, 32)] * 4


def test_guided_canvas_is_image_to_image(folder: Path, tmp_path: Path) -> None:
    """``sdedit``: the guide's latents are what diffusers' img2img calls init latents."""
    values = {**ONE_TILE, "guide.mode": "sdedit", "denoise.strength": 0.5, "denoise.num_inference_steps": 6}
    found = Work(tmp_path, folder).run({**values, "denoise.guidance_scale": 5.0}, until="denoise")
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    pipeline = stock(folder, StableDiffusionXLImg2ImgPipeline)
    want = expected(pipeline, steps=6, image=guide, strength=0.5, guidance_scale=5.0)
    close(read_tensors(found["denoise"] / "canvas.safetensors")["latents"], want)


REGIONS = {
    "width": 128,
    "height": 128,
    "denoise.tile_size": 64,
    "denoise.overlap": 16,
    "guide.mode": "sdedit",
    "denoise.strength": 1.0,
    "regions": [
        {"prompt": "the sea", "box": [0, 0, 128, 64]},
        {"prompt": "sand", "box": [0, 64, 128, 128], "negative_prompt": "dog"},
    ],
}


def test_streamed_regions_are_the_resident_ones(folder: Path, tmp_path: Path) -> None:
    """To the bit, in groups of any size, with every network cut to leaves."""
    want = canvas(Work(tmp_path / "resident", folder), REGIONS)
    plans = {}
    for stage, components in FACTS["sdxl"].components.items():
        models = {}
        for name in components:
            if name == "scheduler" or name.startswith("tokenizer"):
                continue
            config = json.loads((folder / name / "config.json").read_text())
            network = construct(config.get("_class_name") or config["architectures"][0], config)
            layout = Layout(network, torch.float32, channels_last=False)
            largest = max(unit.nbytes for unit in split_units(network, layout, FAMILY.blocks(name), 0))
            models[name] = ModelPlan(resident=(), unit_limit=largest, ring_bytes=2 * largest)
        plans[stage] = StagePlan(models=models, group_size=16)
    assert torch.equal(canvas(Work(tmp_path / "streamed", folder), REGIONS, plans), want)
    other = {**REGIONS, "regions": [{**REGIONS["regions"][0], "prompt": "a wood"}, REGIONS["regions"][1]]}
    assert not torch.equal(canvas(Work(tmp_path / "resident", folder), other), want)


def test_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.canvas.sampler import Sampler

    want = canvas(Work(tmp_path / "whole", folder), {})
    advance = Sampler.advance

    def stopped(sampler: Sampler, *arguments: Any) -> None:
        if sampler.step == 2:
            raise KeyboardInterrupt
        advance(sampler, *arguments)

    work = Work(tmp_path / "stopped", folder)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "advance", stopped)
        with pytest.raises(KeyboardInterrupt):
            canvas(work, {})
    assert torch.equal(canvas(work, {}), want)


def test_units_of_the_full_size() -> None:
    """bf16: the largest stage of transformers alone is most of a budget, so the ladder goes down to their blocks."""
    config = json.loads((CONFIGS / "sdxl" / "unet" / "config.json").read_text())
    network = construct("UNet2DConditionModel", config)
    layout, blocks = Layout(network, torch.bfloat16, channels_last=True), FAMILY.blocks("unet")
    assert 5.0e9 < layout.nbytes < 5.3e9
    limits = rungs(network, layout, blocks)
    largest = [max(unit.nbytes for unit in split_units(network, layout, blocks, limit)) for limit in limits]
    assert 690e6 < largest[0] < 710e6  # a Transformer2DModel
    assert any(60e6 < size <= 70e6 for size in largest), largest  # a BasicTransformerBlock
    assert largest[-1] < 60e6, largest  # a convolution


def test_the_vae_does_not_compute_in_fp16_unless_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    config = Work(tmp_path, folder).config({**ONE_TILE, "device": "cuda", "technique.dtype": "fp16"})
    assert [dtype_name(config, name) for name in ("unet", "vae")] == ["fp16", "bf16"]
    own = {"device": "cuda", "technique.dtype": "fp16", "technique.component_dtype": {"vae": "fp16"}}
    assert dtype_name(Work(tmp_path, folder).config({**ONE_TILE, **own}), "vae") == "fp16"


def test_a_refiner_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    file = other / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "projection_class_embeddings_input_dim": 56}))
    why = FAMILY.refuse(Checkpoint.open(str(other)), FACTS["sdxl"].opened)
    assert why and "got projection_class_embeddings_input_dim=56, expected 64" in why
    assert FAMILY.refuse(Checkpoint.open(str(folder)), FACTS["sdxl"].opened) is None
