"""What a pass on the meta device says of a pass with numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import look, small_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.families.unet import UNET
from stages.memory.layout import Layout
from stages.memory.planner import ModelProfile, StageProfile, plan_run
from stages.memory.shapes import Shapes
from stages.memory.trace import Trace, segments, trace
from stages.memory.units import Unit, split_units
from stages.models.checkpoint import Checkpoint
from stages.profile import FULL_SIZE, LEFT, left
from stages.vae.exact_size import STRIP_BYTES


class Two(nn.Module):
    """Two layers, 10 -> 1000 -> 10; what is alive when is easy to count."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 1000, bias=False), nn.Linear(1000, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def traced(model: nn.Module, call: Callable[[], Any], micro_batch: int = 0, limit: int = 0) -> tuple[Trace, list[Unit]]:
    units = split_units(model, Layout(model, torch.float32, channels_last=True), UNET, limit)
    return trace(model, units, call, micro_batch), units


def test_live_bytes_and_flops_of_a_pass_that_can_be_counted_by_hand() -> None:
    model = Two().to("meta")
    found, _ = traced(model, lambda: model(torch.empty((6, 10), device="meta")))
    assert found.order == ["up", "down"]
    assert found.flops == {"up": 2 * 6 * 10 * 1000, "down": 2 * 6 * 10 * 1000}
    wide, narrow = 6 * 1000 * 4, 6 * 10 * 4
    assert max(event.live for event in found.events) == narrow + 2 * wide  # the input, and ReLU's argument and result
    assert found.events[-1].live == narrow * 2 + wide  # ReLU's argument is gone
    assert {event.workspace for event in found.events if event.workspace} == {0.4 * 10 * 1000 * 4}


class Loop(nn.Module):
    """A parameter of its own beside a layer, and samples in a list: one by one before and after the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.up = nn.Parameter(torch.zeros(10)), nn.Linear(10, 1000, bias=False)

    def forward(self, samples: list[Tensor]) -> Tensor:
        raised = self.up(torch.stack([sample + self.shift for sample in samples]))
        return torch.stack([row.relu() for row in raised])


def test_a_network_that_loops_over_samples_is_called_with_the_whole_group() -> None:
    """Two samples a micro-batch: the layer's are lines as ever, those of the loops go through their peaks."""
    model = Loop().to("meta")

    def follow(count: int) -> Trace:
        def call() -> Any:
            return model(list(torch.empty((2 * count, 10), device="meta")))

        return traced(model, call, 2)[0]

    lines = segments(follow(2), follow(3))
    # what the layer gives; between units the samples, these shifted and stacked, rows cut off below zero and stacked
    assert follow(3).given - follow(2).given == 2 * 4 * (1000 + 3 * 10 + 2 * 1000)
    for count in (2, 5, 9):
        found = follow(count)
        assert found.order == ["up"] and found.flops == {"up": 2 * 2 * 10 * 1000}
        assert max(line.peak(count) for line in lines) == max(event.peak for event in found.events)


def test_what_was_there_before_the_pass_is_put_back() -> None:
    model = Two().to("meta")
    before = model.up.forward
    traced(model, lambda: model(torch.empty((2, 10), device="meta")))
    assert model.up.forward == before


def test_attention_is_linear_in_memory_and_counts_its_flops() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.to_q(x).unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1)

    model = Attend().to("meta")
    found, _ = traced(model, lambda: model(torch.empty((1, 4096, 8), device="meta")))
    assert max(event.live for event in found.events) < 10 * 4096 * 8 * 4  # far from 4096 * 4096
    assert found.flops_of("to_q", 1) == 4 * 4096 * 4096 * 8 + 2 * 4096 * 8 * 8


def whole_flops(model: Any) -> int:
    """Of one micro-batch of two samples, counted by torch."""
    image, embeds = torch.empty((2, 4, 16, 16), device="meta"), torch.empty((2, 77, 32), device="meta")
    with FlopCounterMode(display=False) as counter:
        model(image, torch.empty((), device="meta"), encoder_hidden_states=embeds, return_dict=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("limit", ["block", "leaf"])
def test_two_group_sizes_tell_all_others(small: Callable[[str], Path], limit: str) -> None:
    """The lines through groups of two and three micro-batches pass through those of one to nine."""
    component = Checkpoint.open(str(small("sd15"))).component("unet")
    model = component.build()
    nbytes = Layout(model, torch.float32, channels_last=True).nbytes

    def follow(count: int) -> Trace:
        def call() -> Any:
            image = torch.empty((count * 2, 4, 16, 16), device="meta")
            embeds = torch.empty((count * 2, 77, 32), device="meta")
            return model(image, torch.empty((), device="meta"), encoder_hidden_states=embeds, return_dict=False)

        return traced(model, call, 2, nbytes if limit == "block" else 0)[0]

    lines = segments(follow(2), follow(3))
    assert all(line.slope >= 0 for line in lines)
    for count in (1, 2, 4, 9):
        events = follow(count).events
        assert max(line.peak(count) for line in lines) == max(event.peak for event in events)
    two, five = follow(2), follow(5)
    names = dict.fromkeys(two.order)
    flops = [{name: found.flops_of(name, count) for name in names} for found, count in ((two, 2), (five, 5))]
    assert flops[0] == flops[1]
    assert sum(flops[0].values()) == whole_flops(model)  # however it is cut


def test_a_pass_of_remembered_shapes_is_the_pass(small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Checkpoint.open(str(small("sd15"))).component("unet").build()

    def call() -> Any:
        image, embeds = torch.empty((2, 4, 16, 16), device="meta"), torch.empty((2, 77, 32), device="meta")
        return model(image, torch.empty((), device="meta"), encoder_hidden_states=embeds, return_dict=False)

    monkeypatch.setattr(Shapes, "run", lambda self, func, args, kwargs: func(*args, **kwargs))
    plain, _ = traced(model, call)
    monkeypatch.undo()
    assert [traced(model, call)[0] for _ in range(2)] == [plain, plain]


def test_shapes_are_remembered_of_operations_that_give_new_tensors_only() -> None:
    ops, asked = torch.ops.aten, []

    def run(op: Any, *args: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            asked.append(op)
            return op(*args, **kwargs)

        counted._schema = op._schema  # type: ignore[attr-defined]
        return shapes.run(known.setdefault(op, counted), args, {})

    shapes, known = Shapes(), {}
    one, other = (torch.empty((2, 3), dtype=dtype, device="meta") for dtype in (torch.float32, torch.float16))
    for tensor in (one, other):
        twice = [run(ops.mul.Tensor, tensor, tensor) for _ in range(2)]
        assert all((t.shape, t.dtype, t.device.type) == ((2, 3), tensor.dtype, "meta") for t in twice)
        assert twice[0].untyped_storage()._cdata != twice[1].untyped_storage()._cdata
    assert len(asked) == 2
    for op, *args in ((ops._unsafe_view.default, [3, 2]), (ops.view.default, [6]), (ops.mul_.Tensor, one)):
        for _ in range(2):
            assert run(op, one, *args).untyped_storage()._cdata == one.untyped_storage()._cdata
    assert [run(ops.arange.default, end).numel() for end in (2, 2.0, 3)] == [2, 2, 3]
    assert run(ops.arange.default, 2).dtype != run(ops.arange.default, 2.0).dtype
    assert run(ops.var_mean.correction, one)[1].shape == run(ops.var_mean.correction, one)[1].shape == ()


def test_a_profile_of_every_stage_that_opens_a_model(small: Callable[[str], Path], tmp_path: Path) -> None:
    found = look(small_config(small("sd15"), tmp_path))
    assert set(found) == {"text_encode", "lowres", "guide", "denoise", "decode"}
    for stage in found.values():
        assert StageProfile.of(json.loads(json.dumps(stage.as_json()))) == stage
        (one,) = stage.models
        for cut in one.cuts:
            assert sum(cut.nbytes.values()) == one.weights
            assert set(cut.order) == set(cut.nbytes)
            assert cut.peak(2) >= cut.peak(1) > 0
        assert one.cuts[0].largest >= one.cuts[-1].largest
        block, leaf = (sum(cut.flops.values()) for cut in (one.cuts[0], one.cuts[-1]))
        assert leaf == pytest.approx(block, rel=1e-3)  # the same work, however it is cut
        assert stage.rate > 1e8
    chosen = plan_run(list(map(known, found.values())), 4 * 10**9, 40_000_000)
    assert all(one.peak < 2 * 10**9 for one in chosen.values())


def test_an_encoder_is_planned_with_what_those_before_it_left(
    small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ModelProfile(component="one", weights=FULL_SIZE, micro_batch=1, micro_batches=1, steps=1, cuts=())
    half = replace(first, weights=FULL_SIZE // 2)
    assert [left(models) for models in ((first,), (first, half), (half, first))] == [0, LEFT, LEFT // 2]
    monkeypatch.setattr("stages.profile.left", lambda models: 10**9 * (len(models) - 1))
    config = small_config(small("sdxl"), tmp_path, {"model.family": "sdxl"})
    assert look(config, "text_encode")["text_encode"].base > 10**9  # of two encoders


@pytest.mark.slow
def test_stages_that_do_not_run_are_not_profiled(small: Callable[[str], Path], tmp_path: Path) -> None:
    plain = look(small_config(small("sd15"), tmp_path, {"guide.mode": "none"}))
    assert set(plain) == {"text_encode", "denoise", "decode"}


def known(stage: StageProfile) -> StageProfile:
    """A profile in a process of usual size: this one holds what all tests before have left."""
    return replace(stage, base=300_000_000, imports=0)


def test_an_exact_decode_is_planned_by_its_strips_and_its_disk(small: Callable[[str], Path], tmp_path: Path) -> None:
    def profile(side: int) -> StageProfile:
        values = {"decode.mode": "exact", "guide.mode": "none", "width": side, "height": side}
        return known(look(small_config(small("sd15"), tmp_path, values), "decode")["decode"])

    less, more = profile(512), profile(2048)
    assert more.disk == 16 * less.disk > 0
    peaks = [one.models[0].cuts[0].peak(1) for one in (less, more)]
    assert (
        peaks[0] <= peaks[1] <= STRIP_BYTES + 3 * max(more.models[0].cuts[0].nbytes.values())
    )  # whatever the canvas' size
    plans = plan_run([more], 4 * 10**9, 40_000_000), plan_run([more], more.base + 10**8, 0)
    assert [plan["decode"].choices["vae"].model.resident for plan in plans] == [
        (),
        (),
    ]  # read once: streaming costs nothing
    assert not any(one.disk for one in look(small_config(small("sd15"), tmp_path), "guide", "decode").values())


@pytest.mark.slow
def test_what_a_stage_holds_does_not_grow_with_the_canvas(small: Callable[[str], Path], tmp_path: Path) -> None:
    """Row bands: from 2048 to 8192 pixels a side the canvas itself is sixteen times as large."""
    tiles = {"denoise.tile_size": 512, "denoise.overlap": 128, "decode.tile_size": 512, "guide.tile_size": 256}
    found = []
    for side in (2048, 8192):
        halves = [
            {"prompt": "sea", "box": [0, 0, side // 2, side]},
            {"prompt": "sand", "box": [side // 2, 0, side, side]},
        ]
        values = {"width": side, "height": side, "guide.phases": [side // 2], "regions": halves, **tiles}
        found.append({name: data.extra for name, data in look(small_config(small("sd15"), tmp_path, values)).items()})
    for name in ("lowres", "denoise", "decode", "guide"):
        assert found[1][name] - found[0][name] <= 20_000_000, name
    assert found[0]["denoise"] > 12 * 4 * 256 * 256 * 4  # one band of 2048 pixels a side, all that is held of it


@pytest.mark.parametrize("upscale", ["lanczos", "latent"])
def test_an_exact_guide_is_planned_too(small: Callable[[str], Path], tmp_path: Path, upscale: str) -> None:
    values = {"guide.vae_mode": "exact", "guide.upscale": upscale, "width": 1024, "height": 512}
    found = known(look(small_config(small("sd15"), tmp_path, values), "guide")["guide"])
    names = {name.partition(".")[0] for name in found.models[0].cuts[0].order}
    assert names == ({"encoder", "decoder"} if upscale == "lanczos" else {"decoder"})
    assert found.disk > 0 and plan_run([found], 10**9, 0)["guide"].choices["vae"].model.resident == ()
