"""``technique.quantize``: the denoiser in 8-bit integers, at any budget the same bytes, beside the other switches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_flux
import torch
from in_process import Work, look
from torch import Tensor

from stages.config import ConfigError
from stages.families.opening import built, open_checkpoint
from stages.families.sd import FAMILY
from stages.int8 import Int8, Int8Conv2d, Int8Linear, exact
from stages.memory.planner import Cut, Line, ModelProfile
from stages.memory.tensors import read_tensors
from stages.models.loading import Built, source
from stages.plans import CHUNK, ModelPlan, StagePlan
from stages.techniques import quantize, techniques_of

KEY = "technique.quantize"
ONE = {"guide.mode": "none", "width": 128, "height": 128, "denoise.num_inference_steps": 2, "denoise.tile_size": 128}
TILES = {**ONE, "width": 192, "denoise.overlap": 64}
STREAMED = ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 23)

needs_products = pytest.mark.skipif(not exact(), reason="no 8-bit dot products")


def denoised(work: Work, values: dict[str, Any], **plan: Any) -> Tensor:
    stages = {"denoise": StagePlan(**plan)} if plan else None
    folder = work.run(values, until="denoise", plan=stages, force=True)["denoise"]
    return read_tensors(folder / "canvas.safetensors")["latents"]


def made(work: Work, values: dict[str, Any]) -> Built:
    config = work.config(values)
    return built(config, FAMILY, open_checkpoint(config, ("unet",), lambda _: None), "unet", "denoise")


@needs_products
@pytest.mark.parametrize("way", ["int8", pytest.param("int8_weights", marks=pytest.mark.slow)])
def test_the_same_bytes_however_weights_come(work: Work, tmp_path: Path, way: str) -> None:
    plain, values = denoised(work, TILES), {**TILES, KEY: way}
    found = denoised(work, values)
    far = (found - plain).std() / plain.std()
    assert 0 < far < (0.15 if way == "int8" else 0.05)
    copy = str(tmp_path / "unet.bin")
    for file in (None, copy, copy):  # made, and read again
        plan = replace(STREAMED, prepared=file)
        assert torch.equal(denoised(work, values, models={"unet": plan}, group_size=100), found)


def test_what_becomes_integers(work: Work) -> None:
    plain, found = made(work, ONE), made(work, {**ONE, KEY: "int8_weights"})
    layers = {name for name, module in found.network.named_modules() if isinstance(module, Int8)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} & layers == set()
    assert not [name for name in layers if "time_emb_proj" in name or "norm" in name]
    floats = {type(m) for n, m in found.network.named_modules() if n not in layers}
    assert torch.nn.Linear in floats and Int8Conv2d in {type(m) for m in found.network.modules()}
    assert found.layout.nbytes < 0.5 * plain.layout.nbytes
    assert {slot.dtype for slot in found.layout.slots.values()} == {torch.float32, torch.int8, torch.int32}


def test_integers_are_of_what_lora_and_the_file_give(work: Work, tmp_path: Path) -> None:
    """Rows of a weight that was changed, as the source of the technique before it gives them."""
    found = made(work, {**ONE, KEY: "int8_weights"})
    (technique,) = [t for t in techniques_of(work.config({KEY: "int8_weights"}), "denoise") if t.name == "quantize"]

    class Twice:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def read(self, slots: Any, start: int, packed: Tensor) -> None:
            self.inner.read(slots, start, packed)
            for slot in slots:
                slot.view(packed, start).mul_(2)

        def close(self) -> None:
            self.inner.close()

    name = next(name for name, module in found.network.named_modules() if isinstance(module, Int8Linear))
    slots = [slot for slot in found.layout.slots.values() if slot.name.rpartition(".")[0] == name]
    start, packed = slots[0].offset, torch.zeros(1 << 20, dtype=torch.uint8)
    values = []
    for inner in (source(found, ()), Twice(source(found, ()))):
        reader = technique.on_source(inner, found.layout)
        reader.read(slots, start, packed)
        values.append({slot.name: slot.view(packed, start).clone() for slot in slots})
        reader.close()
    one, two = values
    assert torch.equal(one[f"{name}.weight"], two[f"{name}.weight"])
    assert torch.allclose(2 * one[f"{name}.weight_scale"], two[f"{name}.weight_scale"])


@needs_products
def test_beside_other_switches(work: Work) -> None:
    values = {**TILES, KEY: "int8", "technique.tome.ratio": 0.5, "technique.step_cache.interval": 2}
    found = denoised(work, values)
    again = denoised(work, values, models={"unet": STREAMED}, group_size=100)
    assert torch.equal(found, again)


@needs_products
def test_a_transformer(tmp_path: Path, small: Any) -> None:
    folder = tmp_path / "flux"
    small_flux.write(folder, small("sd15") / "tokenizer", dev=True)
    work = Work(tmp_path / "outputs", folder)
    values = {**small_flux.ONE_TILE, "model.family": "flux"}
    plain, found = denoised(work, values), denoised(work, {**values, KEY: "int8"})
    assert 0 < (found - plain).std() < 0.1 * plain.std()
    assert torch.equal(denoised(work, {**values, KEY: "int8"}, models={"transformer": STREAMED}), found)


def test_making_integers_is_in_the_plan(make_config: Any) -> None:
    line = Line(unit="", fixed=1000, slope=10, workspace=0)
    cut = Cut(limit=0, order=("a", "b"), nbytes={"a": 10**7, "b": 10**6}, flops={}, lines=(line,))
    model = ModelProfile(component="unet", weights=11 * 10**6, micro_batch=2, micro_batches=9, steps=3, cuts=(cut,))
    for floats in (2, 4):  # beside them the integers, in the place of the ring
        (found,) = quantize.Quantize("int8", floats=floats).planned(model).cuts
        assert found.peak(1) == quantize.MAKING + CHUNK + floats * 10**7
        assert found.peak(10**9) == cut.peak(10**9) + quantize.ROOMS
    assert [
        quantize.Quantize.of(make_config({KEY: "int8", "technique.dtype": name})).floats for name in ("bf16", "fp32")
    ] == [2, 4]


def test_what_cannot_be_is_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, said in (
        ({KEY: "int4"}, "got 'int4', expected one of none, int8, int8_weights"),
        ({KEY: "int8", "device": "cuda"}, "expected none on a GPU"),
        ({KEY: "int8", "technique.compile": "trace", "technique.offload": "none"}, "expected none with technique.quan"),
        ({KEY: "int8", "memory.prepared": False}, "memory.prepared: got False, expected true"),
    ):
        with pytest.raises(ConfigError, match=said):
            work.config(values)
    monkeypatch.setattr("stages.int8.exact", lambda: False)
    with pytest.raises(ConfigError, match="expected none or int8_weights on this processor"):
        look(work.config({**ONE, KEY: "int8"}), "denoise")


def test_it_is_in_the_fingerprint_of_the_denoiser_alone(work: Work) -> None:
    plain, found = (work.states(work.config({**TILES, **more})) for more in ({}, {KEY: "int8_weights"}))
    changed = {name for name in plain if plain[name].fingerprint != found[name].fingerprint}
    assert changed == {"lowres", "guide", "denoise", "decode", "stitch"} & set(plain)
    assert plain["text_encode"].fingerprint == found["text_encode"].fingerprint


def test_other_models_are_left_as_they_are() -> None:
    network = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    for component, changed in (("text_encoder_2", False), ("vae", False), ("unet", True)):
        quantize.Quantize("int8_weights").on_model(network, component)
        assert any(isinstance(module, Int8) for module in network.modules()) is changed
