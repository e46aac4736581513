"""Flow matching schedules against what the stock pipelines ask of the same scheduler."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from stages.families.facts import steps_by_strength
from stages.families.flow import FlowSchedule, linear_shift


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_sigmas(dynamic: bool, linear: bool) -> None:
    def fresh() -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)

    schedule, stock = FlowSchedule(fresh(), 1024, linear=linear), fresh()
    sigmas: dict[str, Any] = {"sigmas": numpy.linspace(1.0, 1 / 7, 7)} if linear else {}
    stock.set_timesteps(7, **sigmas, mu=calculate_shift(1024))
    assert torch.equal(schedule.set_timesteps(7), torch.as_tensor(stock.timesteps))
    assert torch.equal(schedule.scheduler.sigmas, torch.as_tensor(stock.sigmas))


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
def test_shift(tokens: int) -> None:
    config = FlowMatchEulerDiscreteScheduler().config
    assert linear_shift(config, tokens, 4) == calculate_shift(tokens)


@pytest.mark.parametrize(("steps", "strength"), [(28, 0.6), (4, 0.3), (10, 1.0), (3, 0.01), (20, 0.45)])
def test_strength(steps: int, strength: float) -> None:
    """Steps and the noise of the first as ``FluxImg2ImgPipeline`` has them."""
    schedule = FlowSchedule(FlowMatchEulerDiscreteScheduler(), 64, linear=True)
    timesteps = schedule.set_timesteps(steps, strength)
    start = int(max(steps - min(steps * strength, steps), 0))
    assert len(timesteps) == steps - start == steps_by_strength(True, steps, strength) > 0
    guide, noise = torch.randn(2, 1, 4, 8, 8)[:, :1]
    want = schedule.scheduler.scale_noise(guide, timesteps[:1], noise)
    assert torch.equal(schedule.noised(guide, noise, timesteps[0]), want)
    assert schedule.begin(noise) is noise and schedule.scaled(guide, timesteps[0]) is guide


def test_another_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="got DDIMScheduler, expected a scheduler for flow matching"):
        FlowSchedule(DDIMScheduler(), 64, linear=True)
