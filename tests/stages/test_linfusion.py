"""Linear attention in the place of a UNet's self-attention: the published formula, its weights, and their plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linfusions
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from in_process import Work, stopped_at
from linfusions import by_hand, published
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.config import ConfigError
from stages.families.opening import built, open_checkpoint
from stages.families.sd import FAMILY
from stages.linear_attention import LinearAttention
from stages.memory.tensors import read_tensors
from stages.models.loading import Built
from stages.plans import ModelPlan, StagePlan
from stages.techniques.linfusion import WEIGHTS, Part
from stages.workflow.complete import complete

KEY = "technique.linfusion.path"
ONE = {"guide.mode": "none", "width": 128, "height": 128, "denoise.num_inference_steps": 2, "denoise.tile_size": 128}
TILES = {**ONE, "width": 192, "denoise.overlap": 64}
LEAVES = ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 23)


def made(work: Work, values: dict[str, Any]) -> Built:
    config = work.config({**ONE, **values})
    return built(config, FAMILY, open_checkpoint(config, ("unet",), lambda _: None), "unet", "denoise")


@pytest.fixture
def folder(work: Work, tmp_path: Path) -> Path:
    return linfusions.write_random(tmp_path / "linfusion", made(work, {}).network)


def denoised(work: Work, values: dict[str, Any], **plan: Any) -> Tensor:
    """The canvas of a run, made now whatever lies in the store; ``plan``: of the stage."""
    stages = {"denoise": StagePlan(**plan)} if plan else None
    found = work.run(values, until="denoise", plan=stages, force=True)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def test_a_layer_is_the_published_formula(folder: Path) -> None:
    for part, weights in published(folder):
        layer, tokens = LinearAttention(part.width, part.heads, part.hidden), torch.randn(2, 35, part.width)
        layer.load_state_dict({here: weights[there] for here, there, _ in part.shapes()})
        assert (layer(tokens) - by_hand(tokens, weights, part.heads)).abs().max() < 1e-5


def test_a_layer_without_the_inner_network() -> None:
    """Then a token is added to itself, as published."""
    layer, tokens = LinearAttention(8, 2, -1), torch.randn(1, 5, 8)
    assert set(layer.state_dict()) == {here for here, _, _ in Part("x", 8, 2, -1).shapes()}
    keys, queries = (torch.nn.functional.elu(to(2 * tokens)) + 1 for to in (layer.keys.to_k, layer.queries.to_q))
    shares = queries.unflatten(-1, (2, 4)).transpose(1, 2) @ keys.unflatten(-1, (2, 4)).permute(0, 2, 3, 1) / 5
    values = layer.keys.to_v(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
    expected = (shares @ values / (shares.sum(-1, keepdim=True) + 1e-4)).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(tokens), layer.queries.to_out(expected), atol=1e-6)


def test_a_picture_is_that_of_the_stock_pipeline_with_the_formula(work: Work, folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(work.checkpoint)
    modules = dict(pipeline.unet.named_modules())
    for part, weights in published(folder):
        modules[part.name].forward = lambda x, weights=weights, part=part, **_: by_hand(x, weights, part.heads)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "width": 128, "height": 128, "output_type": "latent"}
    expected = pipeline(prompt="a cat", generator=torch.Generator().manual_seed(0), **options).images
    plain = {**ONE, "technique.channels_last": False, "denoise.guidance_scale": 7.5}
    found = denoised(work, {**plain, KEY: str(folder)})
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))
    assert (found - denoised(work, plain)).abs().max() > 1e-2


def test_weights_are_streamed_and_any_group_and_a_stop_give_the_same_bytes(
    work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = {**TILES, KEY: str(folder)}
    found = denoised(work, on, micro_batch=2)
    copy = {"unet": ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 23, prepared=str(folder / "copy.bin"))}
    assert torch.equal(denoised(work, on, models=copy, micro_batch=2, group_size=100), found)
    streamed: dict[str, Any] = {"models": {"unet": LEAVES}, "micro_batch": 2, "group_size": 2}
    assert torch.equal(denoised(work, on, **streamed), found)
    steps = stopped_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        denoised(work, on, micro_batch=2)
    result = work.run(on, until="denoise", plan={"denoise": StagePlan(**streamed)})["denoise"]
    assert torch.equal(read_tensors(result / "canvas.safetensors")["latents"], found)
    assert steps == [0, 1, 1]


def test_the_bytes_decide_and_not_where_they_lie(work: Work, folder: Path, tmp_path: Path) -> None:
    def prints(values: dict[str, Any]) -> dict[str, str]:
        return {name: state.fingerprint for name, state in work.states(work.config(values)).items()}

    off, on = prints(TILES), prints({**TILES, KEY: str(folder)})
    assert [name for name in off if off[name] != on[name]] == ["denoise", "decode", "stitch"]
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert prints({**TILES, KEY: str(moved)}) == on
    tensors = load_file(moved / WEIGHTS)
    shutil.rmtree(moved)
    assert prints({**TILES, KEY: str(moved)}) == on, "what is gone is what it was"
    shutil.copytree(folder, moved)
    tensors["0.to_out.0.bias"][0] += 1
    save_file(tensors, moved / WEIGHTS)
    assert prints({**TILES, KEY: str(moved)})["denoise"] != on["denoise"]


def refused(work: Work, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(work, values)


def test_what_does_not_fit_is_refused(work: Work, folder: Path, tmp_path: Path) -> None:
    on = {KEY: str(folder)}
    refused(work, {**on, "technique.linfusion.scope": "canvass"}, r"linfusion.scope: got 'canvass', expected one of")
    refused(work, {KEY: str(tmp_path / "nowhere")}, r"nowhere.*expected a folder with config.json.*hf download")
    config = json.loads((folder / "config.json").read_text())
    listed = config["modules_list"]

    def listing(entries: Any) -> None:
        (folder / "config.json").write_text(json.dumps({"modules_list": entries}))

    listing([])
    refused(work, on, "config.json has a modules_list")
    listing([{**listed[0], "heads": 3}, *listed[1:]])
    refused(work, on, r"modules_list\[0\]: got .*a multiple of heads")
    listing([{**listed[0], "projection_mid_dim": 5}, *listed[1:]])
    refused(work, on, r"with 0.to_k_.0.weight \[16, 16\]', expected 0.to_k_.0.weight \[5, 16\]")
    listing([*listed, listed[0]])
    refused(work, on, rf"without {len(listed)}.to_k.weight")
    for name, said in (("mid_block.attentions.7", "no self-attention mid_block"), ("mid_block.resnets.0", "resnets")):
        listing([{**listed[0], "module_name": name}, *listed[1:]])
        refused(work, on, f"{said}.*was made for another model")
    (cross,) = {listed[0]["module_name"].replace("attn1", "attn2")}
    listing([{**listed[0], "module_name": cross}, *listed[1:]])
    refused(work, on, "no self-attention .*attn2")
    listing(listed)
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    made(work, on)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    refused(work, on, "expected a safetensors file")
    (folder / WEIGHTS).rename(folder / "torn.safetensors")
    refused(work, on, "with 2 .safetensors files")


def test_a_transformer_has_none(work: Work, folder: Path) -> None:
    flux = {"model.family": "flux", "model.latent_channels": 16, "model.patch": 2}
    flux |= {"scheduler.class_name": None}
    refused(work, {KEY: str(folder), **flux}, "expected none for a transformer")


def test_xl_has_it_too(small: Callable[[str], Path], tmp_path: Path) -> None:
    xl = Work(tmp_path / "xl", small("sdxl"))
    values = {"model.family": "sdxl", "text_encode.clip_skip": None}
    network = made(xl, values).network
    folder = linfusions.write_random(tmp_path / "linfusion", network, hidden=24)
    found = made(xl, {**values, KEY: str(folder)})
    linear = [name for name, module in found.network.named_modules() if type(module) is LinearAttention]
    assert len(linear) == sum(name.endswith("attn1") for name, _ in network.named_modules()) > 0
    assert f"{linear[0]}.keys.to_k_.0.weight" in found.layout.slots


def test_a_relative_folder_is_of_the_current_one(
    make_config: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert complete(make_config({KEY: folder.name})).config.technique.linfusion.path == str(folder)


def test_weights_of_half_the_bits_are_read_as_they_are(work: Work, folder: Path) -> None:
    save_file({name: value.half() for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    found = denoised(work, {**ONE, KEY: str(folder)})
    save_file({name: value.float() for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert torch.equal(denoised(work, {**ONE, KEY: str(folder)}), found)
