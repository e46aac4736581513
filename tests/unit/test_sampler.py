"""The denoising loop: stopped after any step and taken up again by a fresh sampler, it gives the same canvas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers.schedulers import scheduling_lms_discrete
from torch import Tensor

from stages.canvas.mixture import Mixture, TileBatch, grid_views
from stages.canvas.noise import canvas_noise
from stages.canvas.sampler import Sampler
from stages.canvas.tiles import Size, grid
from stages.config import ROOT
from stages.memory.tensors import read_tensors, write_tensors
from stages.models.checkpoint import Checkpoint
from stages.models.schedulers import make_scheduler, quad

SCHEDULERS = sorted(path.stem for path in (ROOT / "conf" / "scheduler").glob("*.yaml"))
CONFIGS = ROOT / "stages" / "models" / "configs"
SIZE = Size(12, 20)
GUIDE = torch.randn((1, 4, *SIZE), generator=torch.Generator().manual_seed(1))
OTHERS = {
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
}


def scheduler(name: str, kind: str = "sd15") -> Any:
    if name in OTHERS:
        return make_scheduler(Checkpoint(CONFIGS / kind), *OTHERS[name])
    chosen = yaml.safe_load((ROOT / "conf" / "scheduler" / f"{name}.yaml").read_text())
    return make_scheduler(Checkpoint(CONFIGS / kind), chosen["class_name"], chosen.get("options", {}))


def sampler(name: str, *, steps: int = 6, guidance: float = 2.0, **guide: Any) -> Sampler:
    views = grid_views(grid(SIZE, Size(8, 8), 2), SIZE, blend="gaussian", guidance_scale=guidance)
    noise, generator = canvas_noise(SIZE, 4, seed=3)
    mixture = Mixture(views, SIZE, 4)
    return Sampler(
        scheduler=scheduler(name),
        mixture=mixture,
        num_inference_steps=steps,
        noise=noise,
        generator=generator,
        **guide,
    )


def predict(batch: TileBatch, timestep: Tensor) -> Tensor:
    sign = torch.tensor([-0.1 if flag else 0.1 for flag in batch.unconditional])[:, None, None, None]
    return torch.tanh(batch.samples * 0.7 + sign) * (0.5 + float(timestep) / 1000)


def finish(one: Sampler, until: int | None = None) -> Tensor:
    while not one.finished and one.step != until:
        one.advance(predict, 3)
    return one.latents


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", [*SCHEDULERS, *OTHERS])
def test_taken_up_after_every_step(tmp_path: Path, name: str, guided: bool) -> None:
    guide = {"guide": GUIDE, "guide_mode": "sdedit", "strength": 0.7} if guided else {}
    expected = finish(sampler(name, **guide)).clone()
    assert expected.isfinite().all()
    count = len(sampler(name, **guide).timesteps)
    for stop in range(1, count):
        first = sampler(name, **guide)
        finish(first, stop)
        write_tensors(tmp_path / "state", first.state())
        second = sampler(name, **guide)
        second.restore(read_tensors(tmp_path / "state"))
        assert second.step == stop
        assert torch.equal(finish(second), expected), f"stopped after step {stop}"


def test_state_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        one = sampler("euler_ancestral")
        finish(one, 3)
        write_tensors(tmp_path / name, one.state())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_cannot_be_kept_is_refused() -> None:
    one = sampler("ddim")
    one.scheduler.history = object()
    with pytest.raises(TypeError, match=r"scheduler\.history: cannot keep a object"):
        one.state()


@pytest.mark.parametrize("broken", ["empty", "foreign", "another canvas"])
def test_a_checkpoint_that_is_none_is_refused(broken: str) -> None:
    one = sampler("dpmpp_2m")
    before = {name: tensor.clone() for name, tensor in one.state().items()}
    finish(one, 2)
    state = {"empty": {}, "foreign": {"weight": torch.zeros(3)}, "another canvas": one.state()}[broken]
    if broken == "another canvas":
        state["latents"] = torch.zeros((1, 4, 8, 8))
    fresh = sampler("dpmpp_2m")
    with pytest.raises(ValueError, match="not a checkpoint of this canvas"):
        fresh.restore(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state().items())  # untouched


def test_strength_below_one_step() -> None:
    with pytest.raises(ValueError, match=r"denoise\.strength: 0\.1 of 6 steps is less than one step"):
        sampler("ddim", guide=GUIDE, guide_mode="sdedit", strength=0.1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_strength_is_the_last_share_of_the_schedule(name: str) -> None:
    whole = sampler(name).timesteps
    part = sampler(name, guide=GUIDE, guide_mode="sdedit", strength=0.5).timesteps
    assert len(part) == 3 * getattr(scheduler(name), "order", 1) or name in ("pndm", "checkpoint")
    assert torch.equal(part, whole[-len(part) :])


@pytest.mark.parametrize("group_size", [1, 2, 5, 100])
def test_groups_do_not_change_the_canvas(group_size: int) -> None:
    one = sampler("dpmpp_2m")
    while not one.finished:
        one.advance(predict, group_size)
    assert torch.equal(one.latents, finish(sampler("dpmpp_2m")))


def test_guide_modes_pull_towards_the_guide_and_differ() -> None:
    guide = {"guide": GUIDE * 3, "strength": 1.0}
    got = {
        "sdedit": finish(sampler("ddim", **guide, guide_mode="sdedit")),
        "hold": finish(sampler("ddim", **guide, guide_mode="hold", hold_share=0.7)),
        "skip_residual": finish(sampler("ddim", **guide, guide_mode="skip_residual")),
        "all held": finish(sampler("ddim", **guide, guide_mode="hold", hold_share=1.0)),
    }
    away = {name: float((latents - GUIDE * 3).pow(2).mean()) for name, latents in got.items()}
    assert away["all held"] < away["hold"] < away["sdedit"]
    assert away["skip_residual"] < away["sdedit"]
    nothing = finish(sampler("ddim", **guide, guide_mode="hold", hold_share=0.0))
    assert torch.equal(nothing, got["sdedit"])


def test_unknown_scheduler() -> None:
    with pytest.raises(ValueError, match="got 'NoSuchScheduler', expected a scheduler class of diffusers"):
        make_scheduler(Checkpoint(CONFIGS / "sd15"), "NoSuchScheduler", {})


def test_quadrature_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy import integrate

    def cubic(x: float) -> float:
        return 3 * x**3 - x**2 + 0.5 * x - 7

    assert quad(cubic, -1.5, 14.0)[0] == pytest.approx(integrate.quad(cubic, -1.5, 14.0)[0], rel=1e-12)
    expected = finish(sampler("lms"))
    monkeypatch.setattr(scheduling_lms_discrete, "integrate", SimpleNamespace(quad=quad))
    assert torch.allclose(finish(sampler("lms")), expected, atol=1e-5)
