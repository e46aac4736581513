"""Adapters: what files hold, where it falls, what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Work
from safetensors.torch import save_file
from torch import Tensor

from stages.config import ConfigError
from stages.families.facts import FACTS
from stages.families.opening import open_checkpoint
from stages.memory.tensors import read_tensors
from stages.plans import ModelPlan, StagePlan
from stages.regions.config import from_config
from stages.rehearsal import rehearse
from stages.stitch import parameters, settings
from stages.techniques.lora_file import Strength, place, strengths
from stages.techniques.lora_names import targets
from stages.workflow import loras

UP = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # of the tiny model
QUERY = f"unet.{UP}.lora_{{}}.weight"


def width(folder: Path, name: str) -> tuple[int, ...]:
    from stages.models.checkpoint import Checkpoint

    return Checkpoint.open(str(folder)).component("unet").tensors[f"{name}.weight"].shape


def query(folder: Path, rank: int = 2) -> dict[str, Tensor]:
    rows, columns = width(folder, UP)
    return {QUERY.format("A"): torch.randn(rank, columns), QUERY.format("B"): torch.randn(rows, rank)}


@pytest.fixture
def file(small: Callable[[str], Path], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(query(small("sd15")), tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def asked(config: Any, value: Any) -> list[Strength]:
    config.model.loras = value
    return strengths(config)


def test_what_may_be_asked_for(make_config, tmp_path: Path) -> None:
    config, odd = make_config(), tmp_path / "a:0.5"
    odd.touch()
    assert asked(config, []) == asked(config, None) == []
    assert asked(config, "a.safetensors:0.5") == [Strength("a.safetensors", 0.5)]
    assert asked(config, ["C:/a.safetensors", {"path": "b", "scale": -1}]) == [
        Strength("C:/a.safetensors"),
        Strength("b", -1.0),
    ]
    assert asked(config, [str(odd)]) == [Strength(str(odd))], "there is a file of that name"
    for wrong in (3, [3], [{"scale": 1}], [{"path": "a", "scale": "much"}], [{"path": "a", "weight": 1}]):
        with pytest.raises(ConfigError, match=r"model\.loras"):
            asked(config, wrong)


def test_tags_leave_the_prompt_and_join_the_list(make_config, file: Path) -> None:
    values = {"model.lora_dir": str(file.parent), "prompt": "a <lora:style:0.25> cat, (sea:1.2)<lora:style>"}
    config = make_config(values)
    loras.complete(config)
    assert config.prompt == "a cat, (sea:1.2)"
    assert strengths(config) == [Strength(str(file), 0.25), Strength(str(file), 1.0)]
    for prompt, said in (
        ("<lora:stile:1>", "Did you mean style"),
        ("<lora:style:much>", "one number"),
        ("<lora:style:1:0.5>", "get the same"),
    ):
        with pytest.raises(ConfigError, match=said):
            loras.complete(make_config({**values, "prompt": prompt}))
    with pytest.raises(ConfigError, match=r"model\.lora_dir=FOLDER"):
        loras.complete(make_config({"prompt": "<lora:style:1>"}))
    with pytest.raises(ConfigError, match="changes the whole picture"):
        loras.refuse_elsewhere(from_config(make_config({"negative_prompt": "<lora:style:1>"})))


def test_names_of_all_layouts_fall_on_the_same_modules() -> None:
    facts = FACTS["sdxl"]
    stock = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "mid_block.resnets.1.conv2"]
    stock += ["down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.time_emb_proj", "conv_in"]
    for names in (
        [f"lora_unet_{name.replace('.', '_')}" for name in stock],
        [f"unet.{name}" for name in stock],
        [
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
            "lora_unet_middle_block_2_out_layers_3",
            "lora_unet_input_blocks_3_0_op",
            "lora_unet_input_blocks_4_0_emb_layers_1",
            "lora_unet_input_blocks_0_0",
        ],
    ):
        rests = [place(name, facts)[1] for name in names]
        assert {place(name, facts)[0] for name in names} == {"unet"}
        found = targets(rests, "UNet2DConditionModel", {"layers_per_block": 2}, stock)
        assert [found.get(rest) for rest in rests] == [(name,) for name in stock]
        found = targets(rests, "UNet2DConditionModel", {"layers_per_block": [2, 3, 1]}, stock)  # no original has such
        assert all(found.get(rest, (name,)) == (name,) for rest, name in zip(rests, stock, strict=True))
    old = "text_model.encoder.layers.0.self_attn.to_out"  # as diffusers once wrote it
    assert targets([old], "CLIPTextModel", {}, ["encoder.layers.0.self_attn.out_proj"]) == {
        old: ("encoder.layers.0.self_attn.out_proj",)
    }


def test_a_file_that_fits_nothing_is_refused_and_says_what_it_is_for(work: Work, tmp_path: Path) -> None:
    def held(tensors: Mapping[str, Tensor]) -> list[str]:
        save_file(dict(tensors), tmp_path / "a.safetensors")
        config, said = work.config({"model.loras": [str(tmp_path / "a.safetensors")]}), []
        rehearse(config, open_checkpoint(config, FACTS["sd"].opened, said.append), said.append)
        return said

    own = query(work.checkpoint)
    assert held(own) == []
    flux = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    assert "1 of 2 modules fit" in held({**own, **flux})[0]
    with pytest.raises(ConfigError, match="By its names it is for FLUX"):
        held(flux)
    wide = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    with pytest.raises(ConfigError, match=r"SDXL \(text of width 2048\).*attn2_to_k is \d+x2048, the model's"):
        held({wide.format("down"): torch.ones(4, 2048), wide.format("up"): torch.ones(32, 4)})


@pytest.mark.parametrize("name", ["a.ckpt", "none.safetensors", "torn.safetensors", "empty.safetensors"])
def test_what_is_no_adapter_is_refused(work: Work, tmp_path: Path, name: str) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "empty.safetensors")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(ConfigError, match=r"model\.loras: got .*expected a \.safetensors file of an adapter"):
        work.config({"model.loras": [str(tmp_path / name)]})


def test_only_what_a_file_touches_is_computed_again(work: Work, file: Path) -> None:
    plain = {name: state.fingerprint for name, state in work.states(work.config()).items()}
    on = work.config({"model.loras": [f"{file}:0.5"]})
    found = {name: state.fingerprint for name, state in work.states(on).items()}
    assert [name for name in plain if plain[name] != found[name]] == ["lowres", "guide", "denoise", "decode", "stitch"]
    more = {name: state.fingerprint for name, state in work.states(work.config({"model.loras": [str(file)]})).items()}
    assert more["lowres"] != found["lowres"] and more["text_encode"] == plain["text_encode"]
    assert parameters(on).startswith("a cat <lora:style:0.5>\n")
    assert settings(on)["model"]["loras"] == [{"name": "style", "scale": 0.5}]
    assert "loras" not in settings(work.config()).get("model", {})


def test_the_budget_and_copies_change_no_bit(work: Work, file: Path, tmp_path: Path) -> None:
    values = {"model.loras": [str(file)], "guide.mode": "none", "denoise.num_inference_steps": 2}

    def canvas(**model: Any) -> Tensor:
        plan = {"denoise": StagePlan(models={"unet": ModelPlan(**model)})} if model else None
        found = work.run(values, until="denoise", plan=plan, force=True)
        return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]

    whole = canvas()
    streamed: dict[str, Any] = {"resident": (), "unit_limit": 400_000, "ring_bytes": 4_000_000}
    assert torch.equal(canvas(**streamed), whole)
    copy = tmp_path / "copy.bin"  # its name says in which blocks weights lie too
    assert torch.equal(canvas(**streamed, prepared=str(copy)), whole) and list(tmp_path.glob("copy*.bin"))
    assert torch.equal(canvas(**streamed, prepared=str(copy)), whole), "of the copy that is there"
    del values["model.loras"]
    assert not torch.equal(canvas(), whole)
