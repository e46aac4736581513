"""Prepared copies of large models: kept where the disk has room, else said to be left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.memory.planner import ModelProfile, StageProfile
from stages.plans import ModelPlan, StagePlan
from stages.workflow import planning

GB = 10**9


@pytest.mark.parametrize(
    ("weights", "free", "there", "kept"), [(2, 8, False, True), (2, 7, False, False), (2, 1, True, True)]
)
def test_a_copy_never_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: int, free: int, there: bool, kept: bool
) -> None:
    file, said = tmp_path / "weights" / "x.bin", []
    if there:
        file.parent.mkdir()
        file.touch()
    monkeypatch.setattr(planning, "room", lambda folder: free * GB)
    model = ModelProfile(
        component="transformer", weights=weights * GB, micro_batch=1, micro_batches=9, steps=20, cuts=()
    )
    profile = StageProfile(name="denoise", base=0, imports=0, extra=0, models=(model,), rate=1.0, seconds=0.0)
    plans = {"denoise": StagePlan(models={"transformer": ModelPlan(resident=(), prepared=str(file))})}
    planning._without_room(plans, {"denoise": profile}, said.append)
    assert plans["denoise"].model("transformer").prepared == (str(file) if kept else None)
    assert len(said) == (not kept) and all("2.0 of the 7.0 GB" in text for text in said)
