"""Regions through the stages, over a tiny real model: own embeddings, own tiles, own seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_process import Work, look
from torch import Tensor

from stages.families import sd
from stages.memory.tensors import read_tensors
from stages.plans import ModelPlan, StagePlan

SIZE = {"width": 256, "height": 64, "technique.dtype": "fp32"}
QUICK = {**SIZE, "guide.mode": "none", "denoise.num_inference_steps": 1, "denoise.tile_size": 64, "denoise.overlap": 16}
LEFT = {"prompt": "snow", "box": [0, 0, 128, 64]}
RIGHT = {"prompt": "sand", "negative_prompt": "trees", "box": [128, 0, 256, 64]}
HALVES = {"prompt": "", "regions": [LEFT, RIGHT]}


def latents(work: Work, stage: str, **values: Any) -> Tensor:
    name = {"denoise": "canvas", "lowres": "latents"}[stage]
    base = SIZE if stage == "lowres" else QUICK
    return read_tensors(work.run({**base, **values}, until=stage)[stage] / f"{name}.safetensors")["latents"]


def embeddings(work: Work, plan: StagePlan | None = None, **values: Any) -> dict[str, Tensor]:
    found = work.run({**SIZE, **values}, until="text_encode", plan={"text_encode": plan or StagePlan()})
    return read_tensors(found["text_encode"] / "embeddings.safetensors")


def test_a_row_of_embeddings_for_every_region(work: Work) -> None:
    values = {"prompt": "a valley", "negative_prompt": "dog", "regions": [LEFT, {**RIGHT, "box": [192, 0, 256, 64]}]}
    found = embeddings(work, **values)
    texts = [("a valley", "dog"), ("a valley", "dog"), ("snow", "dog"), ("sand", "trees")]  # the main one is background
    assert found["prompt_embeds"].shape[0] == found["negative_prompt_embeds"].shape[0] == 4
    for row, (prompt, negative) in enumerate(texts):
        alone = embeddings(work, prompt=prompt, negative_prompt=negative)
        for name, tensor in alone.items():
            assert torch.equal(found[name][row], tensor[0])


def test_many_regions_are_encoded_a_pair_at_a_time(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []
    original = sd.hidden_states

    def counted(encoder: Any, prompts: Any, negatives: Any, *more: Any) -> Tensor:
        pairs.append(len(prompts) + len(negatives))
        return original(encoder, prompts, negatives, *more)

    monkeypatch.setattr("stages.families.sd.hidden_states", counted)
    grid = {"grid": [[f"thing {row} {col}" for col in range(8)] for row in range(5)]}
    found = embeddings(work, regions=grid)
    assert found["prompt_embeds"].shape[0] == 41 and pairs == [2] * 41
    streamed = Work(work.output_dir.with_name("streamed"), work.checkpoint)
    plan = ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 22)
    again = embeddings(streamed, StagePlan(models={"text_encoder": plan}), regions=grid)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_prompt_acts_in_its_box_only(work: Work) -> None:
    first = latents(work, "denoise", **HALVES)
    second = latents(work, "denoise", prompt="", regions=[LEFT, {**RIGHT, "prompt": "a lake"}])
    assert torch.equal(first[..., :16], second[..., :16])
    assert (first[..., 16:] != second[..., 16:]).float().mean() > 0.9


def test_a_region_over_everything_is_the_picture_of_its_prompt(work: Work) -> None:
    plain = latents(work, "denoise", prompt="snow")
    region = latents(work, "denoise", prompt="", regions=[{"prompt": "snow", "box": [0, 0, 1, 1]}])
    other = latents(work, "denoise", prompt="sand")  # random weights: prompts say little, but more than rounding
    assert (plain - region).abs().max() < 1e-2 * (plain - other).abs().max()


def test_a_seed_of_its_own_changes_its_box_and_nothing_else(work: Work) -> None:
    plain = latents(work, "denoise", **HALVES)
    seeded = latents(work, "denoise", prompt="", regions=[LEFT, {**RIGHT, "seed": 9}])
    assert torch.equal(plain[..., :16], seeded[..., :16])
    assert (plain[..., 16:] != seeded[..., 16:]).float().mean() > 0.9
    rerolled = latents(work, "denoise", **HALVES, reroll=[{"box": RIGHT["box"], "seed": 9}])
    assert torch.equal(seeded, rerolled)


def test_the_low_res_picture_has_the_regions_too(work: Work) -> None:
    plain = latents(work, "lowres", **HALVES)
    width = plain.shape[-1]
    other = latents(work, "lowres", prompt="", regions=[LEFT, {**RIGHT, "prompt": "a lake"}])
    seeded = latents(work, "lowres", prompt="", regions=[LEFT, {**RIGHT, "seed": 9}])
    for found in (other, seeded):
        assert found.shape == plain.shape
        assert not torch.equal(found[..., width // 2 :], plain[..., width // 2 :])
    far = slice(0, width // 4)  # of the other half's tiles
    assert torch.equal(other[..., far], plain[..., far])


def test_the_whole_pipeline_with_upscaling_phases_and_guidance_one(work: Work) -> None:
    values = {
        "width": 256,
        "height": 128,
        "guide.phases": [192],
        "regions": [{"prompt": "snow", "box": [0, 0, 136, 128], "guidance_scale": 1.0}, {**RIGHT, "feather": 16}],
    }
    values["regions"][1] = {**values["regions"][1], "box": [64, 0, 256, 128], "mode": "replace"}
    found = work.run(values)
    assert (found["stitch"] / "image.png").is_file()
    canvas = read_tensors(found["denoise_192"] / "canvas.safetensors")["latents"]
    assert canvas.shape == (1, 4, 12, 24) and canvas.isfinite().all()


@pytest.mark.slow
def test_the_profile_counts_the_regions_tiles(work: Work) -> None:
    def counted(values: dict[str, Any]) -> tuple[int, int, int]:
        found = look(work.config({**QUICK, "guide.mode": "sdedit", "denoise.strength": 1.0, **values}))
        return tuple(found[name].models[0].micro_batches for name in ("text_encode", "lowres", "denoise"))  # type: ignore[return-value]

    text, _, tiles = counted({})
    assert text == 1
    replaced = {**RIGHT, "mode": "replace", "feather": 8, "box": [64, 0, 192, 64]}
    more = counted({"regions": [replaced]})  # over the main prompt
    assert more[0] == 3 and more[2] >= tiles
    assert counted({"regions": {"grid": [["a", "b", "c", "d"]] * 4}})[0] == 17
