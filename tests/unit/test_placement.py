"""One model over several GPUs: places of its weights within what each may take, refusals, activations that follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from stages.config import ConfigError, max_memory
from stages.families.flux import FAMILY
from stages.memory.layout import Layout
from stages.memory.planner import Cut, Line, ModelProfile
from stages.memory.stock import StockModel, device_of, dispatched
from stages.models.loading import Built
from stages.models.placement import bytes_by_gpu, caps, placed
from stages.plans import ModelPlan, StagePlan, described
from stages.workflow.overrides import prepare
from stages.workflow.planning import _stays
from stages.workflow.validate import validate


@pytest.fixture(scope="module")
def built() -> Built:
    with torch.device("meta"):
        network: Any = FluxTransformer2DModel(
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        )
    layout = Layout(network, torch.bfloat16, channels_last=False)
    return Built(network, layout, {}, FAMILY.blocks("transformer"))


@pytest.mark.parametrize("way", ["balanced", "auto"])
def test_blocks_stay_whole_and_every_gpu_within_its_part(built: Built, way: str) -> None:
    size, room = built.layout.nbytes, 100_000
    limits = {0: int(size * 0.7) + room, 1: int(size * 0.7) + room}
    placement = placed(built, way, limits, room)
    held = bytes_by_gpu(built, placement)
    assert held.keys() == {0, 1} and all(held[gpu] <= limits[gpu] - room for gpu in held)
    assert sum(held.values()) == pytest.approx(size, rel=0.01)
    if way == "balanced":
        assert max(held.values()) < 0.65 * size
    else:
        assert held[0] > held[1]
    for prefix in ("transformer_blocks.2.", "single_transformer_blocks.5."):
        names = [name for name in built.layout.slots if name.startswith(prefix)]
        assert len({device_of(name, placement) for name in names}) == 1


def test_one_gpu_that_has_room_holds_all(built: Built) -> None:
    placement = placed(built, "balanced", {0: built.layout.nbytes + 1000}, 1000)
    assert set(placement.values()) == {0}


@pytest.mark.parametrize("limits", [{0: 5_000_000}, {0: 4_000_000, 1: 4_000_000}, {0: 50_000}])
def test_what_does_not_fit_is_refused_with_what_is_missing(built: Built, limits: dict[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"device.max_memory: .*weights of FluxTransformer2DModel.*GB are missing"):
        placed(built, "balanced", limits, 100_000)


def test_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 + index))
    assert caps(None) == {0: 80, 1: 81}
    assert caps(16) == {0: 16, 1: 16}
    assert caps({1: 16}) == {1: 16}
    with pytest.raises(ConfigError, match=r"device\.max_memory: got 2, expected GPUs that are there: 0, 1"):
        caps({0: 16, 2: 16})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "cpu"}, "device.device_map: got 'balanced', expected nothing with device=cpu"),
        ({"device": "cuda:1"}, "device.device_map: got 'balanced', expected nothing with device=cuda:1"),
        ({"device_map": "even"}, "device.device_map: got 'even', expected balanced or auto"),
        ({"launch.nproc": 2}, "launch.nproc: got 2, expected 1 with device.device_map=balanced"),
        ({"memory.device_budget": "16GB"}, "memory.device_budget: got '16GB'"),
        ({"memory.weights": "streamed"}, "memory.weights: got 'streamed'"),
        ({"technique.offload": "model"}, "technique.offload: got 'model'"),
        ({"decode.mode": "exact"}, "decode.mode: got 'exact'"),
        ({"max_memory": {"first": "16GB"}}, "device.max_memory: got 'first', expected numbers of GPUs"),
        ({"max_memory": "much"}, "device.max_memory: got 'much'"),
        ({"device_map": None, "max_memory": "16GB"}, "device.max_memory: got '16GB', expected nothing without"),
    ],
)
def test_what_cannot_be_is_refused(make_config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(make_config({"device": "cuda", "device_map": "balanced", **values}))


def test_the_keys_as_they_are_typed(make_config: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["prompt=a", "device=cuda", "device.device_map=balanced", "device.max_memory={0: 16GB, 1: 8GB}"]
    found = prepare([*typed, f"output_dir={tmp_path}"])
    assert "device_map=balanced" in found and "max_memory={0: 16GB, 1: 8GB}" in found
    config = make_config({"device": "cuda", "device_map": "balanced", "max_memory": {0: "16GB", 1: "8GB"}})
    validate(config)
    assert max_memory(config) == {0: 16 * 10**9, 1: 8 * 10**9}


def test_a_plan_carries_the_places() -> None:
    cut = Cut(limit=9, order=("a",), nbytes={"a": 9}, flops={}, lines=(Line(unit="a", fixed=1, slope=1, workspace=1),))
    model = ModelProfile(component="t", weights=9, micro_batch=1, micro_batches=9, steps=1, cuts=(cut,), together=2)
    assert _stays(model) is model
    stays = _stays(ModelProfile.of({**vars(model), "cuts": [vars(cut) | {"lines": [vars(cut.lines[0])]}], **PLACES}))
    assert (stays.streams, stays.group, stays.placement) == (False, 2, PLACES["placement"])
    plan = StagePlan(models={"t": ModelPlan(**{key: PLACES[key] for key in ("placement", "limits")})})
    assert StagePlan.of(plan.as_json()) == plan
    assert described("t", PLACES["placement"]) == "t: x ... y.0 on GPU 0, y.1 on GPU 1"


PLACES: dict[str, Any] = {"placement": {"x": 0, "y.0": 0, "y.1": 1}, "limits": {"0": 5, "1": 6}}


class Drawn:
    """A source of small random weights."""

    def read(self, slots: Any, start: int, packed: torch.Tensor) -> None:
        for slot in slots:
            generator = torch.Generator().manual_seed(slot.offset)
            view = slot.view(packed, start)
            view.copy_(torch.randn(view.shape, generator=generator))

    def close(self) -> None:
        pass


def test_weights_lie_where_the_map_says_and_activations_follow() -> None:
    def model(**options: Any) -> Any:
        with torch.device("meta"):
            network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 3))
        layout = Layout(network, torch.float32, channels_last=False)
        return StockModel(network, layout=layout, source=Drawn(), **options).model

    placement = {"0": "cpu", "1": "cpu", "2": "cpu"}
    asked: list[str] = []

    def where(name: str) -> Any:
        asked.append(name)
        return device_of(name, placement)

    spread = model(device=where, hooked=dispatched(placement, force_hooks=True))
    assert asked[:3] == ["0.weight", "0.bias", "1.0.weight"] and hasattr(spread[1], "_hf_hook")
    inputs = torch.randn(2, 4)
    assert torch.equal(spread(inputs), model(device="cpu")(inputs))
