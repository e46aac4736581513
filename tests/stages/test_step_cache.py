"""``technique.step_cache``: a UNet without its deep layers, whose features are those of an earlier step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, get_ident
from time import sleep
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import UNet2DConditionModel
from in_process import Work, look, stopped_at
from torch import Tensor

from stages.config import ConfigError
from stages.families.facts import FACTS
from stages.memory.planner import StageProfile, choices
from stages.memory.source import CheckpointSource
from stages.memory.tensors import read_tensors
from stages.plans import ModelPlan, StagePlan
from stages.techniques.step_cache import DEPTH, INTERVAL, StepCache
from stages.tiles import Size

ON = {INTERVAL: 3, "guide.mode": "none", "denoise.num_inference_steps": 5, "denoise.tile_size": 128, "height": 128}
TILES = {**ON, "width": 192, "denoise.overlap": 64}
PAIRS: dict[str, Any] = {"micro_batch": 2}


def canvas(folder: Path) -> Tensor:
    return read_tensors(folder / "canvas.safetensors")["latents"]


def denoised(work: Work, values: dict[str, Any], **plan: Any) -> Tensor:
    """The canvas of a run, made now whatever lies in the store; ``plan``: of the stage."""
    stages = {"denoise": StagePlan(**plan)} if plan else None
    return canvas(work.run(values, until="denoise", plan=stages, force=True)["denoise"])


def unet(work: Work) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(work.checkpoint / "unet")


def inputs(seed: int = 0, side: int = 18) -> dict[str, Any]:
    """Of a UNet with four levels, of sides that it does not halve three times."""
    torch.manual_seed(seed)
    sample, embeds = torch.randn(2, 4, side, side), torch.randn(2, 77, 32)
    return {"sample": sample, "timestep": torch.tensor(501), "encoder_hidden_states": embeds, "return_dict": False}


def refused(work: Work, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        work.config(values)


def test_what_is_deep_is_taken_from_an_earlier_pass(work: Work) -> None:
    """Against hooks on the stock network: its last deep layer gives what it gave for other inputs."""
    stock, count = unet(work), 12
    names = {id(module): name for name, module in stock.named_modules()}
    shares = []
    for depth in (0, 1, 3, 5, 11):
        technique, cut = StepCache(work.config({**ON, DEPTH: depth})), unet(work)
        last = names[id(technique._cut(stock)[1])]
        technique.on_model(cut, "unet")
        with torch.inference_mode():
            (sample, features), expected = cut(**inputs())[0], stock(**inputs())[0]
            assert torch.equal(sample, expected)
            assert torch.equal(cut(deep_features=features, **inputs())[0], expected), "the same pass again"
            found = cut(deep_features=features, **inputs(1))[0]
            hook = stock.get_submodule(last).register_forward_hook(
                lambda *given, kept=features: (kept,) if isinstance(given[2], tuple) else kept
            )
            assert torch.equal(found, stock(**inputs(1))[0])
            hook.remove()
            assert not torch.equal(found, stock(**inputs(1))[0])
        assert features[0].numel() == technique.state(stock.config, Size(18, 18))
        kept = technique.kept(stock)
        shares.append(sum(p.numel() for name, p in stock.named_parameters() if name.rpartition(".")[0] in kept))
    assert shares == sorted(set(shares)) and shares[0] < 0.1 * sum(p.numel() for p in stock.parameters())
    with pytest.raises(ConfigError, match=rf"{DEPTH}: got {count}, expected at most {count - 1}"):
        StepCache(work.config({**ON, DEPTH: count})).on_model(unet(work), "unet")


def test_samples_that_go_side_by_side_keep_their_own_features(work: Work) -> None:
    """As in lanes, where all weights stay: both deep layers have given theirs before either pass goes on."""
    network = unet(work)
    StepCache(work.config(ON)).on_model(network, "unet")
    expected = [network(**inputs(seed))[0] for seed in (0, 1)]
    met, arrived = Barrier(2, timeout=60), []

    def wait(*_: Any) -> None:
        arrived.append(get_ident())
        met.wait()
        if arrived[-1] == get_ident():
            sleep(0.2)  # the one that gave its features first goes on first

    network.conv_out.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as lanes:
        found = list(lanes.map(lambda given: network(**given)[0], [inputs(0), inputs(1)]))
        again = [{**inputs(1 - number), "deep_features": found[number][1]} for number in (0, 1)]
        others = list(lanes.map(lambda given: network(**given)[0], again))
    for (sample, features), (stock, own) in zip(found, expected, strict=True):
        assert torch.equal(sample, stock) and torch.equal(features, own)
    assert not torch.equal(*others)


LOOKED: dict[Path, StageProfile] = {}


def looked(work: Work) -> StageProfile:
    """Of the stage, once."""
    if work.checkpoint not in LOOKED:
        LOOKED[work.checkpoint] = look(work.config(TILES), "denoise")["denoise"]
    return LOOKED[work.checkpoint]


def streamed(work: Work) -> ModelPlan:
    """All but what has to stay, in the smallest units."""
    cut = looked(work).models[0].cuts[-1]
    assert cut.kept
    return ModelPlan(resident=cut.kept, unit_limit=cut.limit, ring_bytes=2 * cut.largest, order=cut.order)


@pytest.mark.slow
def test_any_group_and_any_stop_give_the_same_bytes(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    found = denoised(work, TILES, **PAIRS, group_size=100)
    assert (found - denoised(work, {**TILES, INTERVAL: 1}, **PAIRS, group_size=100)).abs().max() > 1e-3
    parts: dict[str, Any] = {**PAIRS, "models": {"unet": streamed(work)}}
    names: list[str] = []
    read = CheckpointSource.read

    def reading(self: CheckpointSource, slots: Any, *rest: Any) -> None:
        names.extend(slot.name for slot in slots)
        read(self, slots, *rest)

    monkeypatch.setattr(CheckpointSource, "read", reading)
    assert torch.equal(denoised(work, TILES, **parts, group_size=100), found), "features in memory"
    times = set(map(names.count, names))
    assert times <= {1, 2, 3} and 2 in times, "two whole steps of five, and what the reader had begun"
    assert torch.equal(denoised(work, TILES, **parts, group_size=2), found), "features in a file"
    steps = stopped_at(monkeypatch, 3, 8)
    for force in (True, False):
        with pytest.raises(KeyboardInterrupt):
            work.run(TILES, until="denoise", plan={"denoise": StagePlan(**PAIRS, group_size=2)}, force=force)
    plans = {"denoise": StagePlan(**PAIRS, group_size=100)}
    assert torch.equal(canvas(work.run(TILES, until="denoise", plan=plans)["denoise"]), found)
    assert steps == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4], "again from the last step that was whole"


def test_kept_layers_and_features_are_planned_for(work: Work) -> None:
    profile = looked(work)
    (on,) = profile.models
    technique = StepCache(work.config(TILES))
    assert on.state == technique.state({"block_out_channels": [16, 32, 32, 32]}, Size(16, 16)) * 4
    assert not on.cuts[0].stage_limit and not on.cuts[0].parked
    planned = technique.planned(replace(on, steps=20, micro_batches=49))
    assert planned.cached == 13
    gone = replace(planned, cached=0, cuts=tuple(replace(cut, kept=()) for cut in planned.cuts))
    ways = [list(choices(model, replace(profile, imports=0), 0)) for model in (planned, gone)]
    for way, other in zip(*ways, strict=True):
        cut = next(cut for cut in planned.cuts if cut.limit == way.model.unit_limit)
        more = 0 if way.model.resident == "all" else sum(cut.nbytes[name] for name in cut.kept)
        assert way.peak == other.peak + more
        assert 0.35 < way.seconds / other.seconds < 0.6, "seven whole steps of 20"
    gpu = StepCache(work.config({**TILES, "device": "cuda"})).planned(on)
    assert gpu.cuts[0].peak(3) == on.cuts[0].peak(3) + 3 * 2 * on.state * on.micro_batch


def test_what_cannot_be_cut_is_refused(work: Work) -> None:
    refused(work, {INTERVAL: 0}, rf"{INTERVAL}: got 0, expected 1 \(off\) to 1000 steps")
    assert StepCache.of(work.config({INTERVAL: None})) is None
    refused(work, {DEPTH: 2}, rf"{DEPTH}: got 2, expected 0 with {INTERVAL}=1")
    refused(work, {INTERVAL: 2, DEPTH: -1}, rf"{DEPTH}: got -1, expected 0 or more")
    on, gpu = {INTERVAL: 2}, {INTERVAL: 2, "device": "cuda"}
    refused(work, {**gpu, "technique.offload": "group"}, "expected 1 with technique.offload=group")
    refused(work, {**gpu, "device_map": "balanced"}, "expected 1 with device.device_map=balanced")
    compiled = {"technique.offload": "none", "technique.compile": "compile"}
    refused(work, {**on, **compiled}, "expected 1 with technique.compile=compile.*technique.compile=trace")
    with patch("stages.techniques.step_cache.facts_of", lambda config: FACTS["flux"]):
        refused(work, on, "expected 1 for a transformer.*cache-dit")


def test_other_blocks_are_refused(work: Work) -> None:
    network = unet(work)
    network.down_blocks[0] = torch.nn.Identity()
    with pytest.raises(ConfigError, match=f"{INTERVAL}: got 3, expected 1. .*other blocks"):
        StepCache(work.config(ON)).on_model(network, "unet")


def test_passes_are_recorded_apart(work: Work) -> None:
    """As on a GPU, where every pass is a recording: one that is whole, one that is not, merged tokens drawn anew."""
    stay = {**TILES, "technique.offload": "none", "technique.tome.ratio": 0.5, "denoise.num_inference_steps": 4}
    expected = denoised(work, stay)
    with patch.object(torch.jit, "trace", side_effect=torch.jit.trace) as traces:
        found = denoised(work, {**stay, "technique.compile": "trace"})
    assert traces.call_count == 2, "four steps"
    assert torch.equal(found, expected)
