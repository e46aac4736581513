"""Plans for a GPU: the device's bytes and rates, whole groups, and what may not be streamed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stages.memory.planner import Choice, Cut, Line, ModelProfile, OverBudget, StageProfile, plan_stage
from stages.workflow import device
from stages.workflow.launch.local import environment

MB = 1_000_000
UNITS = ("a", "b", "c", "norm")


def cut(*, parked: bool) -> Cut:
    return Cut(
        limit=100 * MB,
        parked=("a",) if parked else (),
        parked_bytes=10 * MB if parked else 0,
        order=UNITS,
        nbytes={"a": 100 * MB, "b": 100 * MB, "c": 100 * MB, "norm": 1000},
        flops=dict.fromkeys(UNITS, 10**12),
        lines=(Line(unit="a", fixed=20 * MB, slope=(10 if parked else 20) * MB, workspace=500 * MB),),
    )


PROFILE = StageProfile(
    name="denoise",
    base=300 * MB,
    imports=900 * MB,
    extra=50 * MB,
    models=(
        ModelProfile(
            component="unet",
            weights=301 * MB,
            micro_batch=4,
            micro_batches=12,
            steps=10,
            cuts=(cut(parked=False), cut(parked=True)),
        ),
    ),
    rate=1e9,
    seconds=1.0,
)


def chosen(stage: StageProfile, host: str, budget: int) -> Choice:
    return plan_stage(device.for_device(stage, host), budget, 0).choices["unet"]


def test_nothing_of_the_process_counts_and_small_units_stay() -> None:
    plan = chosen(PROFILE, "disk", 500 * MB)
    assert plan.model.resident == ("norm",)
    activations = (20 * device.SLACK + 10 * plan.group * device.GATHERED) * MB
    assert plan.peak == pytest.approx(device.LIBRARIES + plan.model.ring_bytes + 1000 + activations)


def test_parking_buys_larger_groups_where_memory_is_short() -> None:
    """From disk every group reads all weights again."""
    short = chosen(PROFILE, "disk", 500 * MB)
    assert short.model.parked == ("a",) and short.group == 12
    plenty = chosen(PROFILE, "disk", 5000 * MB)
    assert plenty.model.parked == () and plenty.group == 12


def test_what_is_called_in_no_fixed_order_is_planned_as_resident() -> None:
    vae = replace(PROFILE, models=(replace(PROFILE.models[0], ordered=False),))
    assert chosen(vae, "pinned", 500 * MB).model.resident == "all"
    with pytest.raises(OverBudget):
        chosen(vae, "pinned", 300 * MB)


def test_libraries_are_told_to_be_modest(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    given = environment(make_config({"device": "cuda"}))
    assert given["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert given["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what the user set stays"
    assert "CUDNN_CONV_WSCAP_DBG" not in environment(make_config({}))
