"""Every switch of ``technique`` acts: modules, numbers, memory; and one that could not is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from in_process import Work, look, stopped_at
from torch import Tensor

from stages.canvas.mixture import TileBatch
from stages.config import ConfigError
from stages.families.opening import built, open_checkpoint
from stages.families.sd import FAMILY
from stages.memory.planner import Cut, ModelProfile, choices
from stages.memory.stock import StockModel, moved
from stages.memory.tensors import read_checked, read_tensors
from stages.memory.trace import trace
from stages.memory.units import split_units
from stages.models.loading import Built, open_model, source
from stages.plans import ModelPlan, StagePlan
from stages.stitch import settings
from stages.techniques import techniques_of
from stages.techniques.attention import Attention
from stages.techniques.compile import COMPILER, Compile
from stages.techniques.offload import Offload
from stages.techniques.tome import Merge, ToMe, destinations
from stages.tiles import Tile
from stages.vae.tiled import to_uint8

ONE = {"guide.mode": "none", "width": 128, "height": 128, "denoise.num_inference_steps": 2, "denoise.tile_size": 128}
TILES = {**ONE, "width": 192, "denoise.overlap": 64}


def canvas(folder: Path) -> Tensor:
    return read_tensors(folder / "canvas.safetensors")["latents"]


def denoised(work: Work, values: dict[str, Any], **plan: Any) -> Tensor:
    """The canvas of a run, made now whatever lies in the store; ``plan``: of the stage."""
    stages = {"denoise": StagePlan(**plan)} if plan else None
    return canvas(work.run(values, until="denoise", plan=stages, force=True)["denoise"])


LEAVES = ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 23)  # streamed in the smallest units


def made(work: Work, values: dict[str, Any], stage: str = "denoise", component: str = "unet") -> Built:
    """The network on meta, as ``stage`` would open it."""
    config = work.config(values)
    checkpoint = open_checkpoint(config, (component,), lambda _: None)
    return built(config, FAMILY, checkpoint, component, stage)


def peak(found: Built, call: Callable[[Any], Any], micro_batch: int = 0) -> int:
    """Bytes of activations of a call on meta."""
    units = split_units(found.network, found.layout, found.blocks, found.layout.nbytes)
    events = trace(found.network, units, lambda: call(found.network), micro_batch).events
    return max(event.live + event.workspace for event in events)


def refused(work: Work, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        work.config(values)


def test_attention(work: Work) -> None:
    off = denoised(work, TILES)
    for kind, processor in (("math", "AttnProcessor"), ("sliced", "SlicedAttnProcessor")):
        on = {**TILES, "technique.attention": kind}
        assert {type(one).__name__ for one in cast(Any, made(work, on).network).attn_processors.values()} == {processor}
        found = denoised(work, on)
        assert 0 < (found - off).abs().max() < 1e-3, "the same up to rounding"
        assert torch.equal(denoised(work, on, models={"unet": LEAVES}, group_size=100), found)


def test_attention_is_planned_for(work: Work) -> None:
    def activations(kind: str) -> int:
        sample, embeds = torch.empty(2, 4, 32, 32, device="meta"), torch.empty(2, 77, 32, device="meta")
        found = made(work, {**ONE, "technique.attention": kind})
        return peak(found, lambda unet: unet(sample, torch.empty((), device="meta"), encoder_hidden_states=embeds), 2)

    scores = 2 * 4 * 4 * 1024**2  # of 2 samples, 4 heads, 1024 tokens
    stock, sliced, math = map(activations, ("auto", "sliced", "math"))
    assert stock + scores / 4 < sliced < math - scores < math


def test_attention_that_is_not_there_is_refused(work: Work) -> None:
    refused(work, {"technique.attention": "xformers"}, r"technique.attention: got 'xformers'.*on a CPU")
    refused(work, {"technique.attention": "xformers", "device": "cuda"}, "expected a package that is installed")
    refused(work, {"technique.attention": "slicd"}, r"got 'slicd', expected one of .* Did you mean sliced")
    refused(work, {"technique.attention": "flash"}, "for transformers")


def test_kernels_that_know_no_meta_tensors_are_set_when_a_call_begins(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Attention, "check", classmethod(lambda cls, config: None))
    stock = UNet2DConditionModel.enable_xformers_memory_efficient_attention
    monkeypatch.setattr(UNet2DConditionModel, stock.__name__, lambda unet: asked.append(unet.device.type))
    denoised(work, {**ONE, "technique.attention": "xformers"})
    assert asked == ["cpu"]


def test_a_transformer_asks_the_dispatcher() -> None:
    with torch.device("meta"):
        sides = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        network = FluxTransformer2DModel(
            **sides, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4)
        )
    try:
        Attention("math").on_model(network, "transformer")
        asked = [one.processor for one in network.modules() if hasattr(one, "processor")]
        assert len(asked) == 2 and {one._attention_backend for one in asked} == {"_native_math"}
        with pytest.raises(ConfigError, match=r"technique.attention: got 'flash', .*install"):
            Attention("flash").on_model(network, "transformer")
    finally:
        network.set_attention_backend("native")


def test_what_a_processor_has_no_units_for_is_refused(work: Work) -> None:
    refused(work, {"technique.tf32": True}, r"technique.tf32: .*NVIDIA")
    refused(work, {"technique.tf32": True, "device": "cuda", "technique.dtype": "fp16"}, "technique.dtype=fp32")
    refused(work, {"technique.dtype": "fp16"}, r"technique.dtype: got 'fp16', expected fp32 or bf16 on a CPU")
    own = {"technique.component_dtype": {"vae": "float16"}}
    refused(work, own, r"expected fp32 or bf16 on a CPU \(vae\)")


def test_weights_that_stay_are_the_whole_model_and_the_same_picture(work: Work) -> None:
    stay = {**TILES, "technique.offload": "none"}
    expected = denoised(work, TILES)
    with patch.object(StockModel, "graphed", autospec=True, side_effect=StockModel.graphed) as passes:
        assert torch.equal(denoised(work, stay), expected)
    assert passes.call_count == 2, "one a step"
    profile = look(work.config(stay), "denoise")["denoise"]
    (model,) = (Offload(work.config(stay)).planned(model) for model in profile.models)
    found = list(choices(model, profile, 0))
    assert [(one.model.resident, one.group) for one in found] == [("all", 1)]
    held = profile.base + profile.extra + model.weights + model.cuts[0].peak(1)
    assert found[0].peak == max(profile.imports, held)  # which of the two, hangs on what this process held before


def offloaded(work: Work, **values: Any) -> int:
    """Bytes of weights that are planned to be on the device."""
    on = {**ONE, "device": "cuda", **{f"technique.{key.replace('__', '.')}": value for key, value in values.items()}}
    return Offload(work.config(on)).planned(MODEL).weights


CUT = Cut(
    limit=0,
    order=(),
    nbytes={"conv_in": 5, "down.0.a": 10, "down.0.b": 20, "down.1.a": 40, "mid.a": 7, "up.0.a": 15},
    flops={},
    lines=(),
)
MODEL = ModelProfile(component="unet", weights=97, micro_batch=2, micro_batches=9, steps=1, cuts=(CUT,))


def test_what_is_on_the_device_is_planned(work: Work) -> None:
    assert offloaded(work, offload="none") == offloaded(work, offload="model") == 97
    assert offloaded(work, offload="sequential") == 40
    assert offloaded(work, offload="group") == 80
    assert offloaded(work, offload="group", group_offload__stream=False) == 40
    assert offloaded(work, offload="group", group_offload__level="block_level") == 5 + 7 + 2 * 40


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_the_libraries_hooks_bring_the_weights(work: Work, way: str) -> None:
    """On a CPU for a device: what moves is seen, and the numbers are those of the streamer."""
    sample, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    results, placed = [], []
    for options in ({}, {"technique.offload": way, "device": "cuda"}):
        found = made(work, {**ONE, **options})
        raw = source(found, ())
        if options:
            group = {"offload_type": "leaf_level"} if way == "group" else {}
            streamer = StockModel(
                found.network, layout=found.layout, source=raw, device="cpu", hooked=moved("cpu", way, **group)
            )
            placed = [one.device.type for one in streamer.model.parameters()]
        else:
            streamer = StockModel(found.network, layout=found.layout, source=raw, device="cpu")
        with torch.inference_mode():
            results.append(streamer.model(sample, torch.tensor(5), encoder_hidden_states=embeds, return_dict=False)[0])
        streamer.close()
    assert torch.equal(*results)
    assert set(placed) == {"meta" if way == "sequential" else "cpu"}


def test_offload_without_an_accelerator_is_refused(work: Work) -> None:
    for way in ("model", "sequential", "group"):
        refused(work, {"technique.offload": way}, rf"technique.offload: got '{way}', expected stream or none on a CPU")
    refused(work, {"technique.offload": "sequental", "device": "cuda"}, "Did you mean sequential")
    refused(work, {"technique.offload": "none", "memory.weights": "streamed"}, "memory.weights: got 'streamed'")
    refused(work, {"technique.group_offload.disk": True}, "technique.group_offload: .*nothing with")
    exact = {"technique.offload": "sequential", "device": "cuda", "decode.mode": "exact"}
    refused(work, exact, "decode.mode: got 'exact'")


def by_hand(tokens: Tensor, to: list[int], joined: int) -> tuple[Tensor, Tensor]:
    """(merged tokens, all of them spread out again) of one sample, by the paper: one token after the other."""
    rest = [place for place in range(len(tokens)) if place not in to]
    best = []
    for place in rest:
        alike = [float(torch.cosine_similarity(tokens[place], tokens[other], dim=0)) for other in to]
        best.append((max(alike), place, alike.index(max(alike))))
    best.sort(reverse=True)
    groups: list[list[int]] = [[place] for place in to]
    for _, place, target in best[:joined]:
        groups[target].append(place)
    groups = [[place] for _, place, _ in best[joined:]] + groups
    means = torch.stack([tokens[group].mean(dim=0) for group in groups])
    spread = torch.empty_like(tokens)
    for group, mean in zip(groups, means, strict=True):
        spread[group] = mean
    return means, spread


def test_tokens_are_merged_as_published() -> None:
    tokens, seeds, sides = torch.randn(2, 7 * 6, 5), torch.tensor([11, 12]), (7, 6)
    to = destinations(seeds, sides)
    for found in to:
        cells = {(int(place) // 6 // 2, int(place) % 6 // 2) for place in found}
        assert cells == {(y, x) for y in range(3) for x in range(3)}, "one of every 2x2"
    merge = Merge(tokens, seeds, sides, 0.5)
    merged = merge.merged(tokens)
    spread = merge.spread(merged)
    for sample, places, small, large in zip(tokens, to.tolist(), merged, spread, strict=True):
        means, expected = by_hand(sample, places, 21)
        assert torch.allclose(large, expected, atol=1e-6)
        assert torch.allclose(small, means, atol=1e-6)


def test_draws_are_of_seed_step_and_tile(work: Work) -> None:
    tiles = [Tile(0, 0, 0, 0, 16, 16), Tile(0, 1, 0, 8, 16, 24)]

    def drawn(seed: int, step: float) -> list[int]:
        inputs = {"sample": torch.empty(4, 4, 16, 16)}
        batch = TileBatch(
            samples=inputs["sample"], prompt_rows=(), unconditional=(), tiles=(*tiles[:1] * 2, *tiles[1:] * 2)
        )
        ToMe(work.config({"technique.tome.ratio": 0.5, "seed": seed})).before_call(batch, torch.tensor(step), inputs)
        return inputs["tome"].tolist()

    one = drawn(0, 401.0)
    assert one[0] == one[1] != one[2] == one[3], "the same in both halves of guidance, another for each tile"
    assert one == drawn(0, 401.0)
    assert not set(one) & {*drawn(1, 401.0), *drawn(0, 381.0)}
    places = destinations(torch.tensor(drawn(0, 1.0)), (64, 64))
    kinds = (places // 64 % 2 * 2 + places % 2).flatten().bincount(minlength=4) / places.numel()
    assert (kinds - 0.25).abs().max() < 0.05


@pytest.mark.slow
def test_merged_tokens_give_the_same_bytes_in_any_group_and_after_a_stop(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = {**TILES, "technique.tome.ratio": 0.5}
    tokens: list[int] = []
    attend = Merge.merged
    monkeypatch.setattr(Merge, "merged", lambda self, x: tokens.append((found := attend(self, x)).shape[1]) or found)
    found = denoised(work, on)
    assert set(tokens) == {16 * 16 // 2}, "half of the tokens of the finest level"
    assert (found - denoised(work, TILES)).abs().max() > 1e-3
    assert torch.equal(denoised(work, on, models={"unet": LEAVES}, micro_batch=16, group_size=100), found)
    steps = stopped_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        denoised(work, on)
    assert torch.equal(canvas(work.run(on, until="denoise")["denoise"]), found)
    assert steps == [0, 1, 1]


def test_merging_is_planned_for(work: Work) -> None:
    def activations(ratio: float) -> int:
        inputs = {"sample": torch.empty(2, 4, 64, 64, device="meta"), "timestep": torch.empty((), device="meta")}
        inputs["encoder_hidden_states"] = torch.empty(2, 77, 32, device="meta")
        inputs |= {"tome": torch.empty(2, dtype=torch.int64, device="meta")} if ratio else {}
        return peak(made(work, {**ONE, "technique.tome.ratio": ratio}), lambda unet: unet(**inputs), 2)

    assert activations(0.5) > max(activations(0), 2 * 3072 * 1024 * 4), "how alike all tokens are"


def test_a_ratio_that_cannot_be_is_refused(work: Work) -> None:
    refused(work, {"technique.tome.ratio": 0.8}, r"technique.tome.ratio: got 0.8, expected 0 \(off\) to 0.75")


def test_a_traced_pass_is_recorded_once_a_shape(work: Work) -> None:
    values = {**TILES, "technique.offload": "none"}
    expected = denoised(work, values)
    with patch.object(torch.jit, "trace", side_effect=torch.jit.trace) as traces:
        found = denoised(work, {**values, "technique.compile": "trace"})
    assert traces.call_count == 1, "two steps of one shape"
    assert torch.equal(found, expected)


def test_a_compiled_model_is_called(work: Work) -> None:
    config = work.config({**ONE, "technique.offload": "none", "technique.compile": "compile"})
    component = open_checkpoint(config, ("unet",), lambda _: None).component("unet")
    options: dict[str, Any] = {"dtype": torch.float32, "blocks": FAMILY.blocks("unet")}
    with open_model(component, techniques=techniques_of(config, "denoise"), **options) as streamer:
        assert streamer.model._compiled_call_impl is not None
        scales = [one.output_scale_factor for one in streamer.model.modules() if hasattr(one, "output_scale_factor")]
        assert scales and all(type(scale) is float for scale in scales), "nothing that breaks the graph"
    with open_model(component, techniques=techniques_of(work.config(ONE), "denoise"), **options) as streamer:
        assert streamer.model._compiled_call_impl is None


def test_a_compiler_is_planned_for(work: Work) -> None:
    stay = {**ONE, "technique.offload": "none"}
    for way, more in (("compile", COMPILER), ("trace", 0)):
        assert Compile(work.config({**stay, "technique.compile": way})).planned(MODEL).weights == MODEL.weights + more


def test_a_program_of_weights_that_leave_is_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        work, {"technique.compile": "trace"}, r"technique.compile: got 'trace', expected none with .*offload=stream"
    )
    refused(work, {"technique.compile": "jit"}, "expected one of none, compile, trace")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(work, {"technique.compile": "compile", "technique.offload": "none"}, "without a C[+][+] compiler")


def test_the_librarys_tiles_are_those_of_the_whole_canvas(work: Work) -> None:
    values = {**ONE, "width": 192, "height": 160, "denoise.num_inference_steps": 1, "decode.mode": "independent"}
    whole = {**values, "decode.tile_size": 192, "decode.halo": 0}
    on = {**whole, "decode.tile_size": None, "technique.vae_tiling": True}
    assert work.config(on).decode.tile_size == 192, "all of it"
    found = work.run(on)
    latents = canvas(found["denoise"])
    vae = AutoencoderKL.from_pretrained(work.checkpoint / "vae").to(memory_format=torch.channels_last)
    vae.enable_tiling()
    with torch.inference_mode():
        stock = vae.decode(latents / vae.config.scaling_factor).sample[0]
    (file,) = (found["decode"] / "tiles").iterdir()
    assert (read_checked(file)["pixels"].int() - to_uint8(stock).int()).abs().max() <= 1
    shape = (1, 4, 20, 24)

    def activations(values: dict[str, Any]) -> int:
        one = made(work, values, "decode", "vae")
        return peak(one, lambda vae: vae.decode(torch.empty(shape, device="meta")))

    assert activations(on) < activations(whole)


def test_tiles_and_slices_that_could_not_act_are_refused(work: Work) -> None:
    refused(work, {"technique.vae_slicing": True}, "technique.vae_slicing: .* one tile at a time")
    refused(work, {"technique.vae_tiling": True}, "decode.mode: got 'shared', expected independent")
    small = {"technique.vae_tiling": True, "decode.mode": "independent", "decode.tile_size": 64}
    with pytest.raises(ConfigError, match="tiles of 128 pixels"):
        made(work, small, "decode", "vae")


def test_a_picture_says_what_is_on_and_decided_it(work: Work) -> None:
    def said(values: dict[str, Any]) -> dict[str, Any]:
        return settings(work.config({**ONE, **values}))["technique"]

    plain = {"channels_last": True, "tf32": False}
    assert said({}) == said({"technique.offload": "none"}) == plain
    assert said({"technique.tome.ratio": 0.25}) == {**plain, "tome": {"ratio": 0.25}}
