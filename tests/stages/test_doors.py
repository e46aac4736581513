"""The doors are wide enough: a family and a technique that live in this file go through the whole pipeline."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from in_process import Work, look, payload
from omegaconf import DictConfig
from torch import Tensor, nn

from stages import techniques
from stages.canvas.mixture import TileBatch
from stages.config import ConfigError
from stages.families import facts
from stages.families.base import Denoiser, Embeds, Family, example_tiles
from stages.families.encoders import Encoders
from stages.families.facts import Facts, family_of_classes
from stages.families.schedules import Schedule
from stages.memory.tensors import read_tensors
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.plans import ModelPlan, StagePlan
from stages.techniques.base import Technique
from stages.tiles import Size

QUICK = {"denoise.num_inference_steps": 2, "denoise.strength": 1.0, "width": 128, "height": 64}
TOY = Facts(
    module="toy",
    models=("toy",),
    classes={"transformer": "UNet2DModel"},
    components={
        "text_encode": (),
        **dict.fromkeys(("lowres", "denoise"), ("transformer", "scheduler")),
        **dict.fromkeys(("guide", "decode"), ("vae",)),
    },
    denoiser="transformer",
    latent_channels=4,
    vae_scale_factor=8,
    guidance="none",
    embeds=("levels",),
)


class ToyDenoiser(Denoiser):
    """A model without words: a prompt is a number that is added to what it predicts."""

    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        found = {"sample": batch.samples.to(self.device, self.dtype), "timestep": timestep.to(self.device)}
        return {**found, "level": self.rows(batch, "levels")}

    def predict(self, **inputs: Tensor) -> Tensor:
        level = inputs.pop("level")
        return self.network(**inputs, return_dict=False)[0] + level[:, :, None, None]


class Toy(Family):
    """Its "prompt" is as bright as it is long; nothing is encoded."""

    name: ClassVar[str] = "toy"

    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        encoders.start(len(texts))
        encoders.advance(len(texts))
        return {"levels": torch.tensor([[len(prompt) / 10] for prompt, _ in texts])}

    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        raise AssertionError("it has no text encoder")

    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        return ToyDenoiser(network, embeds, config, **options)

    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        return example_tiles(tile, samples, 4), {"levels": torch.empty((1, 1), device="meta")}

    def blocks(self, component: str) -> Blocks:
        return Blocks(classes=frozenset({"ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"}))

    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        return 2

    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        return Schedule(scheduler)


class Tilt(Technique):
    """What it adds to a sample is a function of the tile and the step."""

    name = "tilt"
    keys = ("launch.threads",)  # any key that is there
    seen: ClassVar[list[str]] = []

    @classmethod
    def of(cls, config: DictConfig) -> Tilt | None:
        return cls() if config.launch.threads else None

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {"technique.tilt": 1}

    def touches(self, stage: str) -> bool:
        return stage in ("denoise", "profile")

    def on_model(self, network: nn.Module, component: str) -> None:
        self.seen.append(component)

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        tops = torch.tensor([float(tile.left + 1) for tile in batch.tiles], device=inputs["sample"].device)
        inputs["sample"] = inputs["sample"] + 1e-3 * tops[:, None, None, None] * (step / 1000).to(tops.device)


@pytest.fixture
def toy(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A checkpoint of the toy family: sd15's VAE and scheduler, and a UNet without prompts."""
    from diffusers import UNet2DModel

    folder = tmp_path / "toy"
    for name in ("vae", "scheduler"):
        shutil.copytree(work.checkpoint / name, folder / name)
    torch.manual_seed(0)
    network = UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    network.save_pretrained(folder / "transformer")
    module = ModuleType("stages.families.toy")
    module.FAMILY = Toy()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(facts.FACTS, "toy", TOY)  # type: ignore[arg-type]
    return Work(tmp_path / "outputs-toy", folder)


VALUES = {**QUICK, "model.family": "toy", "lowres.width": 64, "lowres.height": 32}


def test_a_family_of_a_test_goes_through_the_whole_pipeline(toy: Work) -> None:
    profiles = look(toy.config(VALUES))
    assert set(profiles) == {"lowres", "guide", "denoise", "decode"}, "no text encoder: nothing to plan"
    found = toy.run(VALUES)
    assert found["stitch"].joinpath("image.png").is_file()
    first = found["stitch"].joinpath("image.png").read_bytes()
    (model,) = profiles["denoise"].models
    streamed = ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 22)
    other = Work(toy.output_dir.with_name("streamed"), toy.checkpoint)
    plan = {name: StagePlan(models={model.component: streamed}, group_size=3) for name in ("lowres", "denoise")}
    assert other.run(VALUES, plan=plan)["stitch"].joinpath("image.png").read_bytes() == first
    assert model.component == "transformer" and model.micro_batch == 2
    longer = toy.run({**VALUES, "prompt": "a longer prompt"}, until="denoise")["denoise"]
    canvas = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    assert not torch.equal(read_tensors(longer / "canvas.safetensors")["latents"], canvas)
    assert set(payload(found["denoise"])["payload"]["model"]) == {"transformer", "scheduler"}


def test_a_checkpoint_is_recognised_by_its_classes(toy: Work) -> None:
    assert family_of_classes({"transformer": "UNet2DModel", "vae": "AutoencoderKL"}) == "toy"
    assert family_of_classes({"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}) == "sd"
    assert family_of_classes({"unet": "UNet3DConditionModel"}) is None


def test_a_family_that_is_not_there_is_refused(work: Work) -> None:
    with pytest.raises(ConfigError, match=r"model\.family: got 'sdd', expected one of .*sd"):
        look(work.config({"model.family": "sdd"}))


def test_a_technique_of_a_test_acts_where_it_says(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "TECHNIQUES", (*techniques.TECHNIQUES, Tilt))
    values = {**QUICK, "guide.mode": "none", "denoise.tile_size": 64, "denoise.overlap": 16}
    off = work.run(values, until="denoise")
    Tilt.seen.clear()
    on = {**values, "launch.threads": 1}
    found = work.run(on, until="denoise")
    assert Tilt.seen == ["unet"]
    stated = payload(found["denoise"])["payload"]["parameters"]
    assert stated["technique.tilt"] == 1 and "technique.tilt" not in payload(off["denoise"])["payload"]["parameters"]
    assert "technique.tilt" not in payload(found["text_encode"])["payload"]["parameters"]
    canvas = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    assert not torch.equal(canvas, read_tensors(off["denoise"] / "canvas.safetensors")["latents"])
    other = Work(work.output_dir.with_name("groups"), work.checkpoint)
    plan = {"denoise": StagePlan(micro_batch=16, group_size=100)}
    again = other.run(on, until="denoise", plan=plan)["denoise"]
    assert torch.equal(read_tensors(again / "canvas.safetensors")["latents"], canvas)
    look(work.config(on))
    assert Tilt.seen.count("unet") >= 3, "the look builds the model as the run does"


def test_a_technique_leaves_stages_alone_that_it_does_not_touch(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "TECHNIQUES", (*techniques.TECHNIQUES, Tilt))
    off = read_tensors(work.run(QUICK, until="lowres")["lowres"] / "latents.safetensors")["latents"]
    on = work.run({**QUICK, "launch.threads": 1}, until="lowres")["lowres"]
    assert torch.equal(read_tensors(on / "latents.safetensors")["latents"], off)


def test_a_network_without_known_blocks_is_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.families import sd

    monkeypatch.setattr(sd, "UNET", Blocks(classes=frozenset({"NoSuchBlock"})))
    with pytest.raises(CheckpointError, match=r"unet: got a UNet2DConditionModel without any of its family's blocks"):
        look(work.config(QUICK))


@pytest.mark.parametrize(
    ("component", "trait", "value", "said"),
    [
        ("unet", "class_embed_type", "timestep", "class_embed_type='timestep'"),
        ("unet", "addition_embed_type", "text_time", "addition_embed_type='text_time'"),
        ("unet", "encoder_hid_dim_type", "ip_image_proj", "encoder_hid_dim_type"),
        ("unet", "cross_attention_dim", 48, "cross_attention_dim=48, expected the text encoder's width 32"),
        ("unet", "out_channels", 8, "4 channels in and 8 out"),
        ("vae", "_class_name", "AutoencoderTiny", "expected an AutoencoderKL"),
    ],
)
def test_a_trait_that_is_not_understood_is_refused(
    work: Work, tmp_path: Path, component: str, trait: str, value: Any, said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(work.checkpoint, folder)
    file = folder / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), trait: value}))
    with pytest.raises(CheckpointError, match=said):
        look(Work(tmp_path / "out", folder).config(QUICK))
