"""Stable Diffusion 3 against the stock pipeline: same weights, same seed, float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from controlnets import guided, piped
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from in_process import Work, look
from small_models import keys_of, letters_t5, stirred, vae_of_sixteen_channels
from torch import Tensor
from transformers import T5Config, T5EncoderModel
from transformers.models.clip import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stages.config import ConfigError
from stages.families.facts import FACTS, family_of_classes
from stages.families.sd3 import FAMILY
from stages.memory.layout import Layout
from stages.memory.tensors import read_tensors
from stages.memory.units import rungs, split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import construct
from stages.models.loading import build
from stages.plans import ModelPlan, StagePlan
from stages.workflow.model import classes_of

ONE_TILE = {**small_models.ONE_TILE, **keys_of("sd3", 16), "denoise.guidance_scale": 5.0}


@pytest.fixture(scope="module")
def folder(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint, as the stock classes write it: a table of positions larger than any tile."""
    to = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=80,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    vae = vae_of_sixteen_channels(1.5305, 0.0609)
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=1024,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=16,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
        for _ in range(2)
    ]
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=1100, d_model=80, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )
    clip_tokenizers = [CLIPTokenizer.from_pretrained(small("sdxl") / name) for name in ("tokenizer", "tokenizer_2")]
    stirred(transformer, vae, *clips, t5)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=clip_tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=letters_t5(),
    ).save_pretrained(to)
    return to


def stock(folder: Path, kind: Any = StableDiffusion3Pipeline) -> Any:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected(pipeline: Any, *, steps: int = 3, prompt: str = "a cat", **arguments: Any) -> Tensor:
    return pipeline(
        prompt=prompt,
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
        ({}, {}),
        ({"denoise.guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"negative_prompt": "dog"}, {"negative_prompt": "dog"}),
        ({"text_encode.clip_skip": 1}, {"clip_skip": 1}),
    ],
    ids=["guidance-5", "guidance-1", "negative", "clip-skip"],
)
def test_text_to_image(folder: Path, tmp_path: Path, values: dict[str, Any], arguments: dict[str, Any]) -> None:
    want = expected(stock(folder), width=128, height=64, **{"guidance_scale": 5.0, **arguments})
    close(canvas(Work(tmp_path, folder), values), want)


def test_another_prompt_gives_another_canvas(folder: Path, tmp_path: Path) -> None:
    got = canvas(Work(tmp_path, folder), {"prompt": "sea"})
    close(got, expected(stock(folder), prompt="sea", width=128, height=64, guidance_scale=5.0))
    assert (got - expected(stock(folder), width=128, height=64, guidance_scale=5.0)).abs().max() > 1e-2


def test_without_t5_its_states_are_zeros(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    shutil.rmtree(other / "text_encoder_3")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    pipeline = StableDiffusion3Pipeline.from_pretrained(other, text_encoder_3=None)
    pipeline.set_progress_bar_config(disable=True)
    want = expected(pipeline, width=128, height=64, guidance_scale=5.0)
    close(canvas(Work(tmp_path, other), {}), want)
    assert family_of_classes(classes_of(other)) == family_of_classes(classes_of(folder)) == "sd3"


def test_guided_canvas_is_image_to_image(folder: Path, tmp_path: Path) -> None:
    """``sdedit``: the guide's latents are what diffusers' img2img calls init latents."""
    values = {**ONE_TILE, "guide.mode": "sdedit", "denoise.strength": 0.5, "denoise.num_inference_steps": 6}
    found = Work(tmp_path, folder).run(values, until="denoise")
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    pipeline = stock(folder, StableDiffusion3Img2ImgPipeline)
    want = expected(pipeline, steps=6, image=guide, strength=0.5, guidance_scale=5.0, width=128, height=64)
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
    """To the bit, in groups of any size, with every network cut to leaves; decoded from sixteen channels."""
    resident = Work(tmp_path / "resident", folder).run({**ONE_TILE, **REGIONS})
    want = read_tensors(resident["denoise"] / "canvas.safetensors")["latents"]
    assert (resident["stitch"] / "image.png").is_file()
    plans, checkpoint = {}, Checkpoint.open(str(folder), components=FACTS["sd3"].opened)
    for stage, components in FACTS["sd3"].components.items():
        models = {}
        for name in components:
            if name == "scheduler" or name.startswith("tokenizer"):
                continue
            built = build(checkpoint.component(name), dtype=torch.float32, blocks=FAMILY.blocks(name))
            units = split_units(built.network, built.layout, built.blocks, 0)
            largest = max(unit.nbytes for unit in units)
            models[name] = ModelPlan(resident=(), unit_limit=largest, ring_bytes=2 * largest)
        plans[stage] = StagePlan(models=models, group_size=16)
    assert torch.equal(canvas(Work(tmp_path / "streamed", folder), REGIONS, plans), want)


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


def test_a_tile_beyond_the_table_of_positions_is_refused(folder: Path, tmp_path: Path) -> None:
    """Before any work: 24 places of 16 pixels."""
    whole = {"width": 400, "height": 400, "denoise.tile_size": 400, "denoise.overlap": 0}
    config = Work(tmp_path, folder).config({**ONE_TILE, **whole})
    with pytest.raises(ConfigError, match=r"denoise.tile_size: got 400, expected tiles of at most 384 pixels"):
        look(config)
    config = Work(tmp_path, folder).config({**ONE_TILE, **whole, "denoise.tile_size": 384})
    assert look(config)["denoise"].models[0].component == "transformer"


MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "qk_norm": "rms_norm",
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}


def test_units_of_the_full_size() -> None:
    """bf16, 3.5 medium: its blocks are a quarter of a budget, and its table of positions is not held at all."""
    network: Any = construct("SD3Transformer2DModel", MEDIUM)
    assert network.pos_embed.pos_embed.is_meta and network.pos_embed.pos_embed.nbytes > 900e6
    layout, blocks = Layout(network, torch.bfloat16, channels_last=True), FAMILY.blocks("transformer")
    limits = rungs(network, layout, blocks)
    largest = [max(unit.nbytes for unit in split_units(network, layout, blocks, limit)) for limit in limits]
    assert 4.0e9 < layout.nbytes < 5.0e9, layout.nbytes
    assert largest[0] < 250e6 and largest[-1] < 50e6, largest


def test_a_trait_that_fits_no_other_component_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    file = other / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pooled_projection_dim": 48}))
    why = FAMILY.refuse(Checkpoint.open(str(other)), FACTS["sd3"].opened)
    assert why and "got pooled_projection_dim=48, expected 32" in why
    assert FAMILY.refuse(Checkpoint.open(str(folder)), FACTS["sd3"].opened) is None


@pytest.mark.parametrize("own", [True, False], ids=["zeros for the pooled states", "positions of the transformer"])
def test_a_controlnet_adds_to_its_blocks(folder: Path, tmp_path: Path, own: bool) -> None:
    """As published for SD 3 (latents that are not shifted), and as for SD 3.5 (no text, no positions of its own)."""
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(folder, controlnet=None)
    config = dict(pipeline.transformer.config)
    names = ("sample_size", "attention_head_dim", "num_attention_heads", "pooled_projection_dim")
    sizes: dict[str, Any] = {name: config[name] for name in (*names, "caption_projection_dim", "pos_embed_max_size")}
    more = {} if own else {"use_pos_embed": False}
    net = SD3ControlNetModel(
        num_layers=2,
        joint_attention_dim=config["joint_attention_dim"] if own else None,
        force_zeros_for_pooled_projection=own,
        **sizes,
        **more,
    )
    stirred(net)
    net.save_pretrained(tmp_path / "net")
    got, guide = guided(Work(tmp_path, folder), ONE_TILE, tmp_path / "net", 0.6, tmp_path)
    if not own:  # as the pipeline does it where it is given one
        net.pos_embed = net._get_pos_embed_from_transformer(pipeline.transformer)
    close(got, piped(pipeline, net, guide, 0.6, guidance_scale=5.0))
    plain = Work(tmp_path / "plain", folder).run(ONE_TILE, until="denoise")["denoise"]
    assert (read_tensors(plain / "canvas.safetensors")["latents"] - got).abs().max() > 0.01
