"""Streaming to a GPU: places, readers and order on the CPU with stand-ins for streams and events; the rest on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import opening
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from opening import built
from torch import Tensor, nn

from stages.families.controlnets import CONDITION, SCALE, steer
from stages.families.sd import FAMILY
from stages.memory import graphs
from stages.memory.host import DiskWeights, Reader
from stages.memory.places import Places
from stages.memory.prepared import PreparedSource
from stages.memory.source import CheckpointSource
from stages.memory.stream_cuda import CudaStreamer
from stages.memory.trace import trace
from stages.memory.units import split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component
from stages.models.controlnets import controlnet
from stages.models.loading import build, open_model, prepared
from stages.techniques.base import Technique
from stages.techniques.channels_last import ChannelsLast
from stages.techniques.step_cache import StepCache

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 100))
def test_a_unit_waits_for_the_last_that_it_overwrites(sizes: list[int], more: int) -> None:
    """Whoever has bytes in common and comes before is done with, over many passes."""
    places = Places(sizes, max(sizes) + more)
    count = len(sizes)
    spans = [(places[n].offset, places[n].offset + sizes[n % count]) for n in range(4 * count)]
    for number, (start, end) in enumerate(spans):
        assert start >= 0 and end <= max(sizes) + more
        meeting = [n for n in range(number) if spans[n][0] < end and start < spans[n][1]]
        assert places[number].after == (meeting[-1] if meeting else None)


def test_a_ring_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="largest unit has 7"):
        Places([3, 7], 6)


class Stream:
    def wait_event(self, event: Any) -> None:
        assert event.recorded, "waits for what was never queued"

    def wait_stream(self, other: Any) -> None:
        pass


class Event:
    def __init__(self) -> None:
        self.recorded = False

    def record(self, stream: Any = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events of a device that does everything at once."""
    for name, value in {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream(),
        "Event": Event,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture(scope="module")
def unet(small: Callable[[str], Path]) -> Component:
    return Checkpoint.open(str(small("sd15"))).component("unet")


def inputs(samples: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((samples, 4, 16, 16), generator=generator).contiguous(memory_format=torch.channels_last)
    return image, torch.tensor(400), torch.randn((samples, 77, 32), generator=generator)


def plan(component: Component, limit: int, stage_limit: int, ring: float, **more: Any) -> dict[str, Any]:
    """Everything streamed in the order of use; ``ring`` in largest units."""
    model, layout, _, blocks = built(component)
    units = split_units(model, layout, blocks, limit or layout.nbytes, stage_limit)

    def call() -> None:
        image, timestep, embeds = (value.to("meta") for value in inputs(2))
        model(image, timestep, encoder_hidden_states=embeds, return_dict=False)

    order = tuple(dict.fromkeys(trace(model, units, call, 0).order))
    ring_bytes = int(max(unit.nbytes for unit in units) * ring)
    limits = {"unit_limit": limit or layout.nbytes, "stage_limit": stage_limit, "ring_bytes": ring_bytes}
    return {"resident": (), "order": order, **limits, **more}


def opened(component: Component, chosen: dict[str, Any], folder: Path, **more: Any) -> CudaStreamer:
    """A ``CudaStreamer`` on the CPU, with stand-ins."""
    made = built(component)
    model, layout, _, blocks = made
    units = split_units(model, layout, blocks, chosen["unit_limit"], chosen["stage_limit"])
    order = list(chosen["order"])
    units.sort(key=lambda unit: order.index(unit.name))
    source = CheckpointSource(component.tensors)
    if chosen.get("prepared"):
        source = PreparedSource(prepared(made, (), folder / "unet.bin"), layout)
    more |= {"parked": frozenset(blocks.parked(model, units)), "ring_bytes": chosen["ring_bytes"]}
    return CudaStreamer(model, layout=layout, units=units, source=source, device="cpu", **more)


def predict(streamer: Any, image: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
    return streamer.model(image, timestep, encoder_hidden_states=embeds, return_dict=False)[0]


@pytest.fixture(scope="module")
def expected(unet: Component) -> Tensor:
    # on a GPU samples of a micro-batch go together, and so they do here
    with (
        patch("stages.models.loading.shared_out", side_effect=lambda techniques, samples, device: (samples, 1)),
        opening.opened(unet, torch.float32, {}, micro_batch=2) as streamer,
    ):
        return predict(streamer, *inputs())


@pytest.mark.parametrize("host", ["pinned", "disk"])
@pytest.mark.parametrize("from_copy", [True, False])
@pytest.mark.parametrize(("limit", "stage_limit", "ring"), [(0, 0, 1.0), (40_000, 200_000, 2.5), (0, 0, 1e3)])
def test_streamed_is_resident(
    no_gpu: None,
    unet: Component,
    expected: Tensor,
    tmp_path: Path,
    host: str,
    from_copy: bool,
    limit: int,
    stage_limit: int,
    ring: float,
) -> None:
    chosen = plan(unet, limit, stage_limit, min(ring, 60.0), prepared=from_copy)
    more: dict[str, Any] = {"micro_batch": 2, "host": host, "staging_bytes": 3 * chosen["ring_bytes"]}
    with torch.inference_mode(), opened(unet, chosen, tmp_path, **more) as streamer:
        predict(streamer, *inputs(2))  # shapes are known from here on
        for _ in range(3):
            assert torch.equal(predict(streamer, *inputs()), expected)
        assert len(streamer._parking) == (3 if stage_limit else 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_out_of_order(no_gpu: None, unet: Component, tmp_path: Path) -> None:
    with opened(unet, plan(unet, 0, 0, 1.0), tmp_path, micro_batch=2) as streamer:
        model: Any = streamer.model
        with pytest.raises(RuntimeError, match="conv_out was called out of order"):
            model.conv_out(torch.zeros(2, 16, 16, 16))
        with pytest.raises(RuntimeError, match="needs a resident model"), streamer.hold(streamer.model):
            pass


def deep_and_above(component: Component, device: str, call: Callable[[Any, Any], Any]) -> list[Tensor]:
    """Passes that are whole and passes that are handed the first one's deep features, in turns: what is kept stays in
    memory, all others are streamed (``technique.step_cache``). ``call(streamer, function)`` makes the function a pass.
    """
    cache = StepCache(OmegaConf.create({"device": device, "technique": {"step_cache": {"interval": 2, "depth": 1}}}))
    made = build(component, dtype=torch.float32, blocks=FAMILY.blocks("unet"), techniques=(ChannelsLast(), cache))
    order = plan(component, 40_000, 0, 1.0)["order"]
    units = sorted(split_units(made.network, made.layout, made.blocks, 40_000), key=lambda unit: order.index(unit.name))
    resident = frozenset(unit.name for unit in units if unit.name in made.blocks.kept)
    assert 0 < len(resident) < len(units)
    options: dict[str, Any] = {"resident": resident, "ring_bytes": 2 * max(unit.nbytes for unit in units)}
    source, values = CheckpointSource(component.tensors), [value.to(device) for value in inputs()]
    options |= {"layout": made.layout, "units": units, "source": source, "micro_batch": 2, "device": device}
    found: list[Tensor] = []
    with torch.inference_mode(), CudaStreamer(made.network, **options) as streamer:

        def passed(image: Tensor, timestep: Tensor, embeds: Tensor, *deep: Tensor) -> Any:
            given = {"deep_features": deep[0]} if deep else {}
            every = {"sample": image, "timestep": timestep, "encoder_hidden_states": embeds, "return_dict": False}
            return streamer.model(**every, **given)[0]

        run = call(streamer, passed)
        for _ in range(2):
            sample, features = (one.clone() for one in run(*values))
            found += [sample, *(run(*values, features).clone() for _ in range(3))]
    return found


def test_passes_that_leave_units_out_stream_the_others_in_order(
    no_gpu: None, unet: Component, expected: Tensor
) -> None:
    found = deep_and_above(unet, "cpu", lambda streamer, passed: passed)
    assert all(torch.equal(one, expected) for one in found)


@gpu
def test_passes_that_leave_units_out_are_recorded_apart(unet: Component) -> None:
    plain = deep_and_above(unet, "cuda", lambda streamer, passed: passed)
    found = deep_and_above(unet, "cuda", lambda streamer, passed: partial(streamer.graphed, passed))
    assert all(torch.equal(one, plain[0]) for one in (*plain, *found))


def steered(component: Component, device: str, call: Callable[[Any, Any], Any]) -> Tensor:
    """A pass that begins with one of a ControlNet, all weights streamed; ``call`` as above."""
    made = build(component, dtype=torch.float32, blocks=FAMILY.blocks("unet"), techniques=(ChannelsLast(), Steers()))
    units = split_units(made.network, made.layout, made.blocks, 900_000, 200_000)
    assert not made.blocks.parked(made.network, units)

    def passed(model: Any, *values: Tensor) -> Tensor:
        names = ("sample", "timestep", "encoder_hidden_states", CONDITION.format(0), SCALE.format(0))
        return model(**dict(zip(names, values, strict=True)), return_dict=False)[0]

    values = [*inputs(), torch.rand((6, 3, 128, 128), generator=torch.Generator().manual_seed(1)), torch.tensor(0.5)]
    order = trace(made.network, units, lambda: passed(made.network, *(one.to("meta") for one in values)), 0).order
    units.sort(key=lambda unit: order.index(unit.name))
    source = CheckpointSource(made.tensors)
    options: dict[str, Any] = {"layout": made.layout, "units": units, "source": source, "micro_batch": 2}
    options |= {"ring_bytes": 2 * max(unit.nbytes for unit in units), "device": device}
    with torch.inference_mode(), CudaStreamer(made.network, **options) as streamer:
        run = call(streamer, partial(passed, streamer.model))
        first, second = (run(*(one.to(device) for one in values)).clone() for _ in range(2))
    assert torch.equal(first, second)
    return first


class Steers(Technique):
    """What ``model.controlnets`` does to a network."""

    parks = False

    @classmethod
    def of(cls, config: Any) -> Steers:
        return cls()

    def on_model(self, network: nn.Module, component: str) -> None:
        steer(network)


@pytest.fixture(scope="module")
def controlled(unet: Component, small: Callable[[str], Path]) -> Component:
    return replace(unet, controlnets=(controlnet(small("sd15_controlnet"), unet.config, {}),))


def test_a_controlnet_is_streamed_with_its_unet(no_gpu: None, controlled: Component, expected: Tensor) -> None:
    found = steered(controlled, "cpu", lambda streamer, passed: passed)
    techniques = (ChannelsLast(), Steers())
    with (
        patch("stages.models.loading.shared_out", side_effect=lambda techniques, samples, device: (samples, 1)),
        open_model(
            controlled, dtype=torch.float32, blocks=FAMILY.blocks("unet"), techniques=techniques, micro_batch=2
        ) as streamer,
    ):
        image, timestep, embeds = inputs()
        shown = torch.rand((6, 3, 128, 128), generator=torch.Generator().manual_seed(1))
        given: dict[str, Any] = {CONDITION.format(0): shown, SCALE.format(0): torch.tensor(0.5)}
        every = {"sample": image, "timestep": timestep, "encoder_hidden_states": embeds, "return_dict": False}
        model: Any = streamer.model
        assert torch.equal(model(**every, **given)[0], found)
        assert torch.equal(model(**every)[0], expected), "it is shown nothing"
    assert (found - expected).abs().max() > 0.01


@gpu
def test_a_controlnet_is_recorded_with_its_unet(controlled: Component) -> None:
    plain = steered(controlled, "cuda", lambda streamer, passed: passed)
    assert torch.equal(steered(controlled, "cuda", lambda streamer, passed: partial(streamer.graphed, passed)), plain)


class Graph:
    """Remembers what was called between begin and end."""

    log: list[Any]

    def capture_begin(self, **_: Any) -> None:
        Graph.log.append([])

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        Graph.log.append("replay")


def test_a_pass_is_cut_where_weights_are_waited_for(
    no_gpu: None, unet: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Graph.log = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    chosen = plan(unet, 40_000, 60_000, 2.0)
    with torch.inference_mode(), opened(unet, chosen, tmp_path, micro_batch=2, host="disk") as streamer:
        seen: list[int | None] = []
        replay = graphs.Captured.replay

        def watched(self: graphs.Captured, *args: Any) -> Tensor:
            seen.extend(unit for unit, _ in self.graphs)
            return replay(self, *args)

        monkeypatch.setattr(graphs.Captured, "replay", watched)
        for _ in range(2):
            streamer.graphed(lambda *values: predict(streamer, *values), *inputs())
    count = len(chosen["order"])
    assert seen == [None, *range(count)] * 2
    assert Graph.log.count("replay") == 2 * (count + 1) and len(Graph.log) == 3 * (count + 1)


def test_a_pass_runs_as_it_is_where_its_graphs_do_not_fit(
    no_gpu: None, unet: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Graph.log = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    tried = []
    with torch.inference_mode(), opened(unet, plan(unet, 40_000, 60_000, 2.0), tmp_path, micro_batch=2) as streamer:
        expected = predict(streamer, *inputs())

        def passed(*values: Tensor) -> Tensor:
            result = predict(streamer, *values)
            if streamer._captures.recording is not None:
                tried.append(len(values[0]))
                raise torch.OutOfMemoryError("of what is allowed")
            return result

        for samples in (6, 6, 4):
            found = streamer.graphed(passed, *inputs(samples))
            assert torch.equal(found, expected[:samples] if samples == 6 else predict(streamer, *inputs(4)))
    assert tried == [6] and "replay" not in Graph.log, "it is tried once"


def test_a_record_that_cannot_begin_leaves_nothing_open(
    no_gpu: None, unet: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    class Full(Graph):
        def capture_begin(self, **_: Any) -> None:
            raise torch.OutOfMemoryError("of what is allowed")

        def capture_end(self) -> None:
            ended.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Full)
    with torch.inference_mode(), opened(unet, plan(unet, 40_000, 60_000, 2.0), tmp_path, micro_batch=2) as streamer:
        found = streamer.graphed(lambda *values: predict(streamer, *values), *inputs())
        assert torch.equal(found, predict(streamer, *inputs()))
        assert streamer._captures.recording is None and not ended


def test_an_unreadable_copy_is_told(no_gpu: None, unet: Component, tmp_path: Path) -> None:
    chosen = plan(unet, 0, 0, 1.0, prepared=True)
    with opened(unet, chosen, tmp_path, micro_batch=2):
        pass
    model, layout, _, blocks = built(unet)
    units, source = split_units(model, layout, blocks, layout.nbytes), PreparedSource(tmp_path / "unet.bin", layout)
    with (tmp_path / "unet.bin").open("r+b") as file:
        file.truncate(100)
    reader = Reader(source)
    weights = DiskWeights(units, reader, 2 * max(unit.nbytes for unit in units), Event, pin=False)
    with pytest.raises(RuntimeError, match=f"weights of {units[0].name} failed: file ended"):
        weights.packed(0)
    weights.close()
    reader.close()


@gpu
@pytest.mark.parametrize("host", ["pinned", "disk"])
@pytest.mark.parametrize("graphed", [True, False])
def test_on_a_gpu(unet: Component, tmp_path: Path, host: str, graphed: bool) -> None:
    """Streamed is resident, bit by bit, whatever the group."""
    values = [value.to("cuda") for value in inputs(10)]
    options: dict[str, Any] = {"micro_batch": 4, "device": "cuda"}
    found = []
    for chosen in ({}, plan(unet, 0, 0, 1.5, prepared=str(tmp_path / "unet.bin"), host=host)):
        for group in (10, 8, 4):
            with opening.opened(unet, torch.float16, chosen, **options) as streamer:
                parts = []
                for _ in range(3):
                    parts = []
                    for image, embeds in zip(values[0].split(group), values[2].split(group), strict=True):
                        part = image.half(), values[1], embeds.half()
                        if graphed and chosen:
                            parts.append(streamer.graphed(lambda *v, s=streamer: predict(s, *v), *part).clone())
                        else:
                            parts.append(predict(streamer, *part))
                found.append(torch.cat(parts))
    assert all(torch.equal(one, found[0]) for one in found[1:])
    assert found[0].isfinite().all() and found[0].float().std() > 0.01
