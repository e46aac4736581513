"""FLUX.2 [klein] against the stock pipeline: same weights, same seed, float32; full-size blocks on meta."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from in_process import Work
from omegaconf import OmegaConf
from qwen import letters_tokenizer, tiny_qwen3
from small_models import keys_of, stirred
from torch import Tensor, nn

from stages.canvas.space import Space
from stages.families.base import example_tiles
from stages.families.facts import FACTS, family_of_classes
from stages.families.flux2_klein import FAMILY, empirical_shift
from stages.memory.tensors import TensorRef, read_tensors
from stages.memory.trace import trace
from stages.memory.units import rungs, split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component, construct
from stages.models.loading import Built, build
from stages.models.single_file import CONFIGS
from stages.plans import ModelPlan, StagePlan
from stages.tiles import Size
from stages.workflow.identity import model_identity
from stages.workflow.model import classes_of

FAMILY_KEYS = {
    **keys_of("flux2_klein", 32),
    "scheduler.class_name": None,
    "technique.channels_last": False,
    "seed": 7,
}
ONE_TILE = {**small_models.ONE_TILE, **FAMILY_KEYS, "denoise.guidance_scale": 4.0}
FULL = Checkpoint(CONFIGS / "flux2_klein")  # of the published 4B


def make(to: Path, distilled: bool) -> Path:
    """A tiny random checkpoint, as the stock classes write it."""
    torch.manual_seed(3)
    transformer = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(block_out_channels=(8, 16, 16, 16), norm_num_groups=4, layers_per_block=1)
    statistics: Any = vae.bn
    statistics.running_mean.normal_(0.0, 0.5)
    statistics.running_var.uniform_(0.5, 3.0)
    stirred(transformer, vae)
    Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=tiny_qwen3(28),
        tokenizer=letters_tokenizer(),
        is_distilled=distilled,
    ).save_pretrained(to)
    return to


@pytest.fixture(scope="module", params=[True, False], ids=["distilled", "base"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    return make(tmp_path_factory.mktemp("klein"), request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return make(tmp_path_factory.mktemp("klein-base"), False)


def stock(folder: Path, **arguments: Any) -> Tensor:
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 4.0, "width": 128, "height": 64}
    generator = torch.Generator().manual_seed(7)
    return pipeline(**{**given, **arguments}, generator=generator, output_type="latent").images


def canvas(work: Work, values: dict[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run({**ONE_TILE, **values}, until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and want.std() > 0.1
    assert (got - want).abs().max() <= 2e-5 * float(want.std()), (got - want).abs().max() / want.std()


def test_text_to_image(folder: Path, tmp_path: Path) -> None:
    """Guidance where the checkpoint is not distilled; the negative prompt is always ''."""
    work = Work(tmp_path, folder)
    got = canvas(work, {})
    close(got, stock(folder))
    again = canvas(work, {"prompt": "sea", "negative_prompt": "dog"})
    close(again, stock(folder, prompt="sea"))
    assert (got - again).abs().max() > 1e-2
    plain = canvas(work, {"denoise.guidance_scale": 1.0})
    close(plain, stock(folder, guidance_scale=1.0))
    distilled = "negative_prompt_embeds" not in read_tensors(next(tmp_path.rglob("embeddings.safetensors")))
    assert torch.equal(plain, got) is distilled


def test_image_to_image(base: Path, tmp_path: Path) -> None:
    """From noise alone the guide's canvas is that of the text; the guide is normalised as the stock pipeline does."""
    values = {**ONE_TILE, "guide.mode": "sdedit", "lowres.num_inference_steps": 1}
    found = Work(tmp_path, base).run({**values, "denoise.strength": 1.0}, until="denoise")
    close(read_tensors(found["denoise"] / "canvas.safetensors")["latents"], stock(base))
    pipeline = Flux2KleinPipeline.from_pretrained(base)
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    space = FAMILY.space(Checkpoint.open(str(base), components=("vae",)))
    mean = pipeline.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipeline.vae.bn.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps)
    want = pipeline._unpatchify_latents((pipeline._patchify_latents(guide) - mean) / std)
    assert torch.equal(space.inside(guide, 0), want)


def test_one_negative_row_is_everybodys() -> None:
    prompts, negative = torch.randn(3, 2, 4), torch.randn(1, 2, 4)
    embeds = {"negative_prompt_embeds": negative, "prompt_embeds": prompts}  # as a file may have them
    denoiser = FAMILY.denoiser(nn.Identity(), embeds, OmegaConf.create(), canvas=Size(8, 8), dtype=torch.float32)
    batch = replace(
        example_tiles(Size(8, 8), 4, 32), prompt_rows=(2, 2, 1, 1), unconditional=(True, False, True, False)
    )
    assert torch.equal(
        denoiser.rows(batch, "prompt_embeds"), torch.stack([negative[0], prompts[2], negative[0], prompts[1]])
    )


def test_any_band_of_a_space() -> None:
    space = Space(patch=2, mean=torch.randn(3, 2, 2), std=torch.rand(3, 2, 2) + 0.5)
    rows = torch.randn(1, 3, 8, 6)
    whole = space.inside(rows, 0)
    for top, bottom in ((0, 3), (3, 4), (4, 8)):
        assert torch.equal(space.inside(rows[:, :, top:bottom], top), whole[:, :, top:bottom])
    torch.testing.assert_close(space.outside(whole, 0), rows)
    assert Space().inside(rows, 0) is rows


def test_streamed_as_resident(base: Path, tmp_path: Path) -> None:
    """Four tiles, leaves at a time, another group: the same bits, and a picture."""
    values = {"denoise.tile_size": 64, "denoise.overlap": 32, "height": 96}
    resident = canvas(Work(tmp_path / "resident", base), values, {"denoise": StagePlan(micro_batch=2, group_size=6)})
    plan = ModelPlan(resident=(), unit_limit=0, ring_bytes=400_000)
    streamed = {
        "denoise": StagePlan(models={"transformer": plan}, micro_batch=2, group_size=2),
        "text_encode": StagePlan(models={"text_encoder": plan}),
    }
    assert torch.equal(canvas(Work(tmp_path / "streamed", base), values, streamed), resident)


@pytest.mark.parametrize("mode", ["independent", "shared", "exact"])
def test_a_picture_in_every_mode_of_the_vae(base: Path, tmp_path: Path, mode: str) -> None:
    """Guided, in tiles; where the VAE is exact, the pixels are those of the stock decode."""
    values = {
        **ONE_TILE,
        "guide.mode": "sdedit",
        "guide.upscale": "lanczos",
        "guide.vae_mode": mode,
        "decode.mode": mode,
        "denoise.num_inference_steps": 2,
        "denoise.strength": 0.5,
        "lowres.num_inference_steps": 1,
        "denoise.tile_size": 64,
        "decode.tile_size": 64,
        "decode.overlap": 0,
    }
    found = Work(tmp_path, base).run(values, until="decode")
    tiles = [read_tensors(found["decode"] / "tiles" / f"r00_c0{col}.safetensors")["pixels"] for col in (0, 1)]
    got, latents = torch.cat(tiles, dim=-1), read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    assert got.shape == (3, 64, 128) and got.float().std() > 1
    if mode == "exact":
        vae: Any = AutoencoderKLFlux2.from_pretrained(base / "vae")
        with torch.no_grad():
            want = vae.decode(latents).sample[0]
        assert (got.int() - ((want / 2 + 0.5).clamp(0, 1) * 255).round().int()).abs().max() <= 1
        guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
        assert guide.shape == latents.shape and guide.std() > 0.1


def test_the_family_is_found(folder: Path, tmp_path: Path) -> None:
    """From the folder; what is distilled is another model to the stages that it touches."""
    assert family_of_classes(classes_of(folder)) == "flux2_klein"
    checkpoint = Checkpoint.open(str(folder), components=FACTS["flux2_klein"].opened)
    assert FAMILY.refuse(checkpoint, FACTS["flux2_klein"].opened) is None
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "is_distilled": not index["is_distilled"]}))
    config = Work(tmp_path, folder).config(ONE_TILE)
    before = model_identity(config, FACTS["flux2_klein"].opened, tmp_path / "cache")
    config.model.path = str(other)
    after = model_identity(config, FACTS["flux2_klein"].opened, tmp_path / "cache")
    assert {name for name in before if before[name] != after[name]} == {"tokenizer", "transformer"}


@pytest.mark.parametrize(
    ("component", "changes", "said"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds=True, expected False: this is another FLUX.2"),
        ("transformer", {"joint_attention_dim": 15360}, "joint_attention_dim=15360, expected 96"),
        ("text_encoder", {"num_hidden_layers": 24}, "got 24 layers, expected more than 27"),
        ("vae", {"patch_size": [4, 4]}, r"patch_size=\[4, 4\], expected \[2, 2\]"),
        ("vae", {"_class_name": "AutoencoderKL"}, "got a AutoencoderKL, expected an AutoencoderKLFlux2"),
    ],
)
def test_traits_that_are_not_understood(
    base: Path, monkeypatch: pytest.MonkeyPatch, component: str, changes: dict[str, Any], said: str
) -> None:
    checkpoint = Checkpoint.open(str(base), components=FACTS["flux2_klein"].opened)
    config = checkpoint.config

    def changed(name: str) -> dict[str, Any]:
        return {**config(name), **(changes if name == component else {})}

    monkeypatch.setattr(checkpoint, "config", changed)
    with pytest.raises(ValueError, match=said):
        FAMILY.check(checkpoint, FACTS["flux2_klein"].opened)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("tokens", [64, 1024, 4096, 4301, 16384])
def test_shift(tokens: int, steps: int) -> None:
    assert empirical_shift(None, tokens, steps) == compute_empirical_mu(tokens, steps)


def test_a_gate_takes_no_memory(base: Path) -> None:
    network = Checkpoint.open(str(base), components=("transformer",)).component("transformer").build()
    gates = [module.gate_fn for module in network.modules() if type(module).__name__ == "Flux2SwiGLU"]
    assert len(gates) == 2 * 2 + 2 and all(gate.inplace for gate in gates)


def full_size(dtype: torch.dtype) -> Built:
    """The published transformer; its tensors, in bf16, lie nowhere."""
    config = FULL.config("transformer")
    network = construct(config["_class_name"], config)
    refs = {
        name: TensorRef(Path("nowhere"), 0, torch.bfloat16, tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
    }
    component = Component(name="transformer", class_name=config["_class_name"], config=config, tensors=refs)
    return build(component, dtype=dtype, blocks=FAMILY.blocks("transformer"))


def test_units_of_the_full_size() -> None:
    """4B in bf16: blocks whole, and leaves of less than 96 MB where the checkpoint has one of 170 MB."""
    network, layout, tensors, blocks = full_size(torch.bfloat16)
    assert max(ref.nbytes for ref in tensors.values()) == 27648 * 3072 * 2
    assert 7.74e9 < layout.nbytes < 7.76e9
    whole = {unit.name: unit.nbytes for unit in split_units(network, layout, blocks, layout.nbytes)}
    assert sum(name.startswith("transformer_blocks.") for name in whole) == 5
    assert sum(name.startswith("single_transformer_blocks.") for name in whole) == 20
    assert 490e6 < whole["transformer_blocks.0"] < 492e6 and 244e6 < whole["single_transformer_blocks.0"] < 246e6
    found = rungs(network, layout, blocks)
    assert len(found) <= 6 and found[-1] < 96_000_000


def test_activations_of_the_full_size() -> None:
    """What a pass holds, in bf16: the wide layer's 9 widths of every token, what is made and joined of it, and the
    embeddings. A tile of 640 pixels fits 800 MB."""
    network, layout, _, blocks = full_size(torch.bfloat16)
    nn.Module.to(network, torch.bfloat16)
    tile, units = Size(80, 80), split_units(network, layout, blocks, 0)

    def call() -> Tensor:
        batch, embeds = FAMILY.example(FULL.config("transformer"), tile, 1)
        options: dict[str, Any] = {"canvas": tile, "dtype": torch.bfloat16, "device": "meta"}
        denoiser = FAMILY.denoiser(network, embeds, OmegaConf.create(), **options)
        del embeds
        return denoiser(batch, torch.empty((), device="meta"))

    most = max(event.live for event in trace(network, units, call, 0).events)
    tokens, text = 512 + 40 * 40, 3 * 512 * 7680
    assert most == pytest.approx(2 * (tokens * 3072 * (9 + 3 + 4 + 5) + text), rel=0.05)
