"""Z-Image against the stock pipeline: same weights, same seed, float32; full-size blocks on meta."""

from __future__ import annotations

import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from in_process import Work
from qwen import letters_tokenizer, tiny_qwen3
from small_models import keys_of, stirred, vae_of_sixteen_channels
from torch import Tensor

from stages.canvas.mixture import TileBatch
from stages.families.facts import FACTS, family_of_classes
from stages.families.z_image import FAMILY
from stages.memory.layout import Layout
from stages.memory.tensors import read_tensors
from stages.memory.trace import trace
from stages.memory.units import rungs, split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import construct
from stages.models.loading import build, open_model
from stages.models.measure import cuts
from stages.plans import ModelPlan, StagePlan
from stages.tiles import Size, Tile
from stages.workflow.model import classes_of

ONE_TILE = {
    **small_models.ONE_TILE,
    **keys_of("z_image", 16),
    "width": 96,
    "height": 80,  # 30 tokens: they are padded too
    "denoise.tile_size": 96,
    "denoise.guidance_scale": 0.0,
}
LONG = "a lighthouse on a cliff, " * 3  # of more than 64 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint, as the stock classes write it."""
    to = tmp_path_factory.mktemp("z_image")
    torch.manual_seed(3)
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    vae = vae_of_sixteen_channels(0.3611, 0.1159)
    text_encoder = tiny_qwen3(3).model
    stirred(transformer, vae)
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=letters_tokenizer(),
    ).save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def work(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """What tests agree on is computed once."""
    return Work(tmp_path_factory.mktemp("work"), folder)


@cache
def loaded(folder: Path, kind: Any) -> Any:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(folder: Path, kind: Any = ZImagePipeline, **arguments: Any) -> Tensor:
    pipeline = loaded(folder, kind)
    if "image" in arguments:
        pipeline.image_processor.preprocess = lambda latents, **_: latents
    given = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 0.0, "width": 96, "height": 80}
    return pipeline(**{**given, **arguments}, generator=torch.Generator().manual_seed(7), output_type="latent").images


def canvas(work: Work, values: dict[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run({**ONE_TILE, **values}, until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-4 * float(want.std()), rtol=0), (got - want).abs().max()


@pytest.mark.parametrize("prompt", ["a cat", LONG])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 4.0])
def test_text_to_image(folder: Path, work: Work, prompt: str, guidance: float) -> None:
    """Captions as long as the empty one's, and longer."""
    got = canvas(work, {"prompt": prompt, "denoise.guidance_scale": guidance})
    close(got, stock(folder, prompt=prompt, guidance_scale=guidance))


def test_another_prompt_gives_another_canvas(folder: Path, work: Work) -> None:
    got = canvas(work, {"negative_prompt": LONG, "denoise.guidance_scale": 4.0})
    close(got, stock(folder, negative_prompt=LONG, guidance_scale=4.0))
    assert (got - canvas(work, {"denoise.guidance_scale": 4.0})).abs().max() > 1e-2
    assert (got - canvas(work, {"prompt": LONG, "denoise.guidance_scale": 4.0})).abs().max() > 1e-2


def test_guided_canvas_is_image_to_image(folder: Path, work: Work) -> None:
    values = {**ONE_TILE, "guide.mode": "sdedit", "denoise.strength": 0.5, "lowres.num_inference_steps": 1}
    found = work.run(values, until="denoise")
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    got = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    close(got, stock(folder, ZImageImg2ImgPipeline, image=guide, strength=0.5))


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_sample_is_the_same_in_any_group(folder: Path, work: Work, micro_batch: int) -> None:
    """To the bit, beside captions of other lengths or alone, with guidance and without, streamed or resident."""
    component, tile = Checkpoint.open(str(folder)).component("transformer"), Size(10, 10)
    lengths, shorter = torch.tensor([40, 70, 20]), torch.tensor([1, 33, 96])
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    states, latents = (draw(3, 96, 32), draw(3, 96, 32)), draw(12, 16, *tile)
    embeds = dict(zip(FACTS["z_image"].embeds, (*states, lengths, shorter), strict=True))

    def batch(start: int, count: int, guided: bool) -> TileBatch:
        places = range(start, start + count)
        return TileBatch(
            samples=latents[start : start + count],
            prompt_rows=tuple(place // 2 % 3 for place in places),
            unconditional=tuple(guided and place % 2 == 0 for place in places),
            tiles=(Tile(0, 0, 0, 0, *tile),) * count,
        )

    def predict(groups: tuple[int, ...], **plan: Any) -> list[Tensor]:
        common: Any = {"dtype": torch.float32, "blocks": FAMILY.blocks("transformer")}
        with open_model(component, plan=ModelPlan(**plan), micro_batch=micro_batch, **common) as streamer:
            denoiser = FAMILY.denoiser(streamer.model, embeds, work.config(ONE_TILE), canvas=tile, dtype=torch.float32)
            return [
                torch.cat([denoiser(batch(start, group, guided), torch.tensor(700.0)) for start in range(0, 12, group)])
                for group in groups
                for guided in (False, True)
            ]

    want = predict((4,))
    got = predict((4, 12), resident=(), unit_limit=0, ring_bytes=1_100_000)
    assert all(torch.equal(a, b) for a, b in zip(got, 2 * want, strict=True))


REGIONS = {
    **ONE_TILE,
    "width": 128,
    "height": 128,
    "denoise.tile_size": 80,
    "denoise.overlap": 32,
    "denoise.num_inference_steps": 2,
    "denoise.strength": 1.0,
    "denoise.guidance_scale": 2.0,
    "lowres.num_inference_steps": 1,
    "guide.mode": "sdedit",
    "regions": [
        {"prompt": LONG, "box": [0, 0, 128, 64]},
        {"prompt": "sand", "box": [0, 64, 128, 128], "guidance_scale": 0},
    ],
}


def test_streamed_tiles_and_regions_are_the_resident_ones(work: Work) -> None:
    """With guidance and without, to the bit; and they give a picture."""
    found = work.run(REGIONS, plan={"denoise": StagePlan(micro_batch=2, group_size=2)})
    want = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    assert (found["stitch"] / "image.png").is_file()
    models = {"transformer": ModelPlan(resident=(), unit_limit=0, ring_bytes=1_100_000)}
    plan = {"denoise": StagePlan(models=models, micro_batch=2, group_size=16)}
    again = work.run(REGIONS, plan=plan, until="denoise", force=True)
    assert torch.equal(read_tensors(again["denoise"] / "canvas.safetensors")["latents"], want)


def test_the_family_is_found(folder: Path) -> None:
    """Its text encoder is one with a head to some, and without to others."""
    classes = classes_of(folder)
    assert classes["text_encoder"] == "Qwen3Model"
    assert family_of_classes(classes) == family_of_classes({**classes, "text_encoder": "Qwen3ForCausalLM"}) == "z_image"


@pytest.mark.parametrize(
    ("trait", "value", "why"),
    [
        ("siglip_feat_dim", 24, "got siglip_feat_dim=24, expected None"),
        ("cap_feat_dim", 48, "got cap_feat_dim=48, expected 32"),
        ("axes_lens", [512, 32, 32], "expected 514 places or more of the first"),
    ],
)
def test_what_it_does_not_know_is_refused(folder: Path, tmp_path: Path, trait: str, value: Any, why: str) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    file = other / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), trait: value}))
    assert FAMILY.refuse(Checkpoint.open(str(folder)), FACTS["z_image"].opened) is None
    assert why in str(FAMILY.refuse(Checkpoint.open(str(other)), FACTS["z_image"].opened))


def test_two_group_sizes_tell_all_others(folder: Path, work: Work) -> None:
    """The stock model loops over samples between its blocks; the look has the longest captions beside short ones."""
    component, tile = Checkpoint.open(str(folder)).component("transformer"), Size(10, 10)
    built = build(component, dtype=torch.float32, blocks=FAMILY.blocks("transformer"))

    def call(network: Any, samples: int) -> Tensor:
        batch, embeds = FAMILY.example(component.config, tile, samples)
        denoiser = FAMILY.denoiser(
            network, embeds, work.config(ONE_TILE), canvas=tile, dtype=torch.float32, device="meta"
        )
        return denoiser(batch, torch.empty((), device="meta"))

    for cut in cuts(built, call, size=2).cuts:
        units = split_units(built.network, built.layout, built.blocks, cut.limit)
        found = trace(built.network, units, lambda: call(built.network, 10), 2)
        most = max(event.peak for event in found.events)
        assert most <= cut.peak(5) <= 1.01 * most
    assert FAMILY.largest_tile({"axes_lens": [1536, 512, 256]}) == 512


def test_units_of_the_full_size() -> None:
    """bf16: 34 blocks, those of captions without the timestep's share, and leaves of less than 80 MB."""
    config = {"_class_name": "ZImageTransformer2DModel", "axes_lens": [1536, 512, 512]}
    network: Any = construct("ZImageTransformer2DModel", config)
    layout, blocks = Layout(network, torch.bfloat16, channels_last=False), FAMILY.blocks("transformer")
    assert layout.nbytes == 12_309_817_472
    units = split_units(network, layout, blocks, layout.nbytes)
    sizes = [unit.nbytes for unit in units if type(unit.module).__name__ == "ZImageTransformerBlock"]
    assert sorted(sizes) == [353_925_632] * 2 + [361_820_672] * 32
    assert sum(unit.nbytes for unit in units) - sum(sizes) < 25e6
    assert rungs(network, layout, blocks) == [12_309_817_472, 235_929_600, 117_965_312, 78_643_200]
