"""The denoising loop: stopped after any step and taken up again by a fresh sampler, it gives the same canvas."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers.schedulers import scheduling_lms_discrete
from files import all_of, flip, rows_of
from torch import Tensor

from stages.canvas.band_state import BandStates
from stages.canvas.dilated import Dilated, laid_out
from stages.canvas.mixture import Grouping, Mixture, TileBatch, grid_views
from stages.canvas.noise import canvas_noise, draw
from stages.canvas.sampler import Sampler
from stages.config import ROOT, ConfigError
from stages.families.schedules import Schedule, make_scheduler, quad
from stages.memory.rows import BAND, bands
from stages.memory.tensors import read_tensors, write_tensors
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size, grid

SCHEDULERS = sorted(path.stem for path in (ROOT / "conf" / "scheduler").glob("*.yaml"))
CONFIGS = ROOT / "stages" / "models" / "configs"
SIZE = Size(12, 20)
GUIDE = torch.randn((1, 4, *SIZE), generator=torch.Generator().manual_seed(1))
OTHERS = {
    "deis": ("DEISMultistepScheduler", {}),
    "beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
}


def scheduler(name: str, kind: str = "sd15") -> Any:
    if name in OTHERS:
        return make_scheduler(Checkpoint(CONFIGS / kind), *OTHERS[name])
    chosen = yaml.safe_load((ROOT / "conf" / "scheduler" / f"{name}.yaml").read_text())
    return make_scheduler(Checkpoint(CONFIGS / kind), chosen["class_name"], chosen.get("options", {}))


@pytest.fixture(params=[BAND, 70, 20], ids=["one band", "4 bands", "12 bands"])
def places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How large a row band may be."""
    monkeypatch.setattr("stages.memory.rows.BAND", request.param)
    return request.param


def sampler(
    name: str, *, steps: int = 6, guidance: float = 2.0, folder: Path | None = None, term: bool = False, **guide: Any
) -> Sampler:
    """A fresh one; with the ``folder`` of another it can go on from its checkpoint."""
    views = grid_views(grid(SIZE, Size(8, 8), 2), SIZE, blend="gaussian", guidance_scale=guidance)
    folder = folder or rows_of(GUIDE).path.parent
    noise, generator = canvas_noise(folder / "noise", SIZE, 4, seed=3)
    if term:
        tiles = grid_views(grid(Size(6, 10), Size(6, 8), 2), Size(6, 10), blend="gaussian", guidance_scale=guidance)
        guide["dilated"] = Dilated(2, Size(6, 10), laid_out(tiles, 2, Size(6, 10)), 4)
    return Sampler(
        schedule=Schedule(scheduler(name)),
        mixture=Mixture(views),
        num_inference_steps=steps,
        noise=noise,
        generator=generator,
        folder=folder,
        **guide,
    )


def predict(batch: TileBatch, timestep: Tensor) -> Tensor:
    sign = torch.tensor([-0.1 if flag else 0.1 for flag in batch.unconditional])[:, None, None, None]
    return torch.tanh(batch.samples * 0.7 + sign) * (0.5 + float(timestep) / 1000)


def finish(one: Sampler, until: int | None = None) -> Tensor:
    while not one.finished and one.step != until:
        one.advance(predict, Grouping(3))
    return torch.cat([rows for _, rows in one.latents()], dim=2)


def by_hand(name: str, steps: int = 6, strength: float | None = None) -> Tensor:
    """The whole canvas at once, as a diffusers pipeline steps it: no bands, no checkpoints."""
    one, generator = scheduler(name), torch.Generator().manual_seed(3)
    noise = draw((1, 4, *SIZE), generator)
    one.set_timesteps(steps)
    timesteps, latents = one.timesteps, noise * one.init_noise_sigma
    if strength is not None:
        timesteps = one.timesteps[(steps - int(steps * strength)) * one.order :]
        if hasattr(one, "set_begin_index"):
            one.set_begin_index(len(one.timesteps) - len(timesteps))
        latents = one.add_noise(GUIDE, noise, timesteps[:1])
    views = grid_views(grid(SIZE, Size(8, 8), 2), SIZE, blend="gaussian", guidance_scale=2.0)
    more = {"generator": generator} if "generator" in inspect.signature(one.step).parameters else {}
    for timestep in timesteps:
        scaled, prediction = one.scale_model_input(latents, timestep), rows_of(latents)
        Mixture(views).predict(rows_of(scaled), prediction, lambda batch, t=timestep: predict(batch, t), Grouping(3))
        latents = one.step(all_of(prediction), timestep, latents, **more, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", [*SCHEDULERS, *OTHERS])
def test_any_bands_are_bitwise_the_whole_canvas(places: int, name: str, guided: bool) -> None:
    guide = {"guide": rows_of(GUIDE), "guide_mode": "sdedit", "strength": 0.7} if guided else {}
    one = sampler(name, **guide)
    assert len(one.bands) == len(bands(*SIZE, places))
    assert torch.equal(finish(one), by_hand(name, strength=0.7 if guided else None))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", [*SCHEDULERS, *OTHERS])
def test_taken_up_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, guided: bool) -> None:
    monkeypatch.setattr("stages.memory.rows.BAND", 140)  # two bands
    guide = {"guide": rows_of(GUIDE), "guide_mode": "sdedit", "strength": 0.7} if guided else {}
    expected = finish(sampler(name, **guide))
    assert expected.isfinite().all()
    count = len(sampler(name, **guide).timesteps)
    for stop in range(1, count):
        folder = tmp_path / f"{stop}"
        finish(sampler(name, folder=folder, **guide), stop)
        second = sampler(name, folder=folder, **guide)
        assert second.resume() and second.step == stop
        assert torch.equal(finish(second), expected), f"stopped after step {stop}"


def test_every_band_gives_back_what_it_took(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would fill other holes of the heap that a pass leaves: 80 MB at 8192x8192."""
    given: list[None] = []
    monkeypatch.setattr("stages.canvas.sampler.return_freed", lambda: given.append(None))
    one = sampler("ddim")
    finish(one, 2)
    assert len(given) == 2 * len(one.bands)


def test_killed_between_two_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment of a step: the last whole step is there, whatever lies beside it."""
    monkeypatch.setattr("stages.memory.rows.BAND", 70)
    expected, original, written = finish(sampler("euler_ancestral", steps=4)), BandStates.write, 0

    def fails(self: BandStates, *arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > limit:
            raise RuntimeError("pulled the plug")
        original(self, *arguments)

    for limit in range(1, 4 * 4, 3):
        folder, written = tmp_path / f"{limit}", 0
        monkeypatch.setattr(BandStates, "write", fails)
        with pytest.raises(RuntimeError, match="plug"):
            finish(sampler("euler_ancestral", steps=4, folder=folder))
        monkeypatch.setattr(BandStates, "write", original)
        second = sampler("euler_ancestral", steps=4, folder=folder)
        assert second.resume() == (limit >= 4) and second.step == limit // 4
        assert torch.equal(finish(second), expected), f"killed after {limit} bands"


@pytest.mark.parametrize("full", [0, 1, 11])
def test_a_full_disk_is_told_in_the_step_that_met_it(
    tmp_path: Path, places: int, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    """Bands are written while others are stepped: the step has not ended before all are there."""
    monkeypatch.setattr("stages.memory.rows.BAND", places)
    one = sampler("dpmpp_2m", folder=tmp_path)
    band = full % len(one.bands)

    def fails(path: Path, *args: Any, **kwargs: Any) -> None:
        if f"_{band:03d}." in path.name:
            raise OSError(28, "No space left on device")
        write_tensors(path, *args, **kwargs)

    one.advance(predict, Grouping(3))
    with monkeypatch.context() as patch:
        patch.setattr("stages.canvas.band_state.write_tensors", fails)
        with pytest.raises(OSError, match="No space left"):
            one.advance(predict, Grouping(3))
    second = sampler("dpmpp_2m", folder=tmp_path)
    assert second.resume() and second.step == 1, "what was there stays"
    assert torch.equal(finish(second), finish(sampler("dpmpp_2m")))


def test_state_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        finish(sampler("euler_ancestral", folder=tmp_path / name), 3)
    files = sorted(path.name for path in (tmp_path / "a").glob("odd_*"))
    assert files == ["odd_000.safetensors"]
    assert (tmp_path / "a" / files[0]).read_bytes() == (tmp_path / "b" / files[0]).read_bytes()


def test_what_cannot_be_kept_is_refused() -> None:
    one = sampler("ddim")
    one.scheduler.history = object()
    with pytest.raises(TypeError, match=r"scheduler\.history: cannot keep a object"):
        one.advance(predict, Grouping(3))


@pytest.mark.parametrize("broken", ["empty", "foreign", "another canvas", "torn"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, broken: str) -> None:
    expected = finish(sampler("dpmpp_2m"))
    finish(sampler("dpmpp_2m", folder=tmp_path), 1)
    file = tmp_path / "odd_000.safetensors"
    tensors = read_tensors(file)
    if broken == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif broken == "empty":
        file.write_bytes(b"")
    else:
        write_tensors(
            file, {"weight": torch.zeros(3)} if broken == "foreign" else {**tensors, "latents": GUIDE[..., 1:]}
        )
    fresh = sampler("dpmpp_2m", folder=tmp_path)
    with pytest.raises(ValueError, match=r"odd_000\.safetensors"):
        fresh.resume()
    assert fresh.step == 0 and not file.exists()
    assert torch.equal(finish(fresh), expected)


@pytest.mark.parametrize("damaged", [("odd",), ("odd", "even")])
def test_a_damaged_step_is_named_and_done_again(tmp_path: Path, damaged: tuple[str, ...]) -> None:
    expected = finish(sampler("dpmpp_2m"))
    finish(sampler("dpmpp_2m", folder=tmp_path), 3)
    for name in damaged:
        flip(tmp_path / f"{name}_000.safetensors", 0.9)
    fresh = sampler("dpmpp_2m", folder=tmp_path)
    if len(damaged) == 2:
        with pytest.raises(ValueError, match=r"even_000.safetensors is damaged|odd_000.safetensors is damaged"):
            fresh.resume()
    else:
        assert fresh.resume() and fresh.step == 2
        assert "odd_000.safetensors is damaged" in fresh.damaged
    assert torch.equal(finish(fresh), expected)


@pytest.mark.parametrize("mode", ["sdedit", "hold", "skip_residual"])
@pytest.mark.parametrize("term", [False, True])
def test_every_mode_is_the_same_in_any_bands(monkeypatch: pytest.MonkeyPatch, mode: str, term: bool) -> None:
    found = []
    for size in (BAND, 70, 20):
        monkeypatch.setattr("stages.memory.rows.BAND", size)
        guide = {"guide": rows_of(GUIDE), "guide_mode": mode, "strength": 0.8, "hold_share": 0.5}
        found.append(finish(sampler("unipc", term=term, **guide)))
    for other in found[1:]:
        # sums over all bands (the term's mean and deviation) may round differently
        assert torch.allclose(other, found[0], atol=1e-6, rtol=0) if term else torch.equal(other, found[0])


def test_what_must_see_the_whole_canvas_is_refused_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = make_scheduler(Checkpoint(CONFIGS / "sd15"), "DDIMScheduler", {"thresholding": True})
    monkeypatch.setattr("test_sampler.scheduler", lambda name: chosen)
    assert finish(sampler("ddim")).isfinite().all()
    monkeypatch.setattr("stages.memory.rows.BAND", 70)
    with pytest.raises(ValueError, match=r"scheduler\.options\.thresholding: DDIMScheduler .* whole canvas"):
        sampler("ddim")


def test_strength_below_one_step() -> None:
    with pytest.raises(ValueError, match=r"denoise\.strength: 0\.1 of 6 steps is less than one step"):
        sampler("ddim", guide=rows_of(GUIDE), guide_mode="sdedit", strength=0.1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_strength_is_the_last_share_of_the_schedule(name: str) -> None:
    whole = sampler(name).timesteps
    part = sampler(name, guide=rows_of(GUIDE), guide_mode="sdedit", strength=0.5).timesteps
    order = getattr(scheduler(name), "order", 1)  # of two: two passes a step but for the last one
    assert len(part) == 3 * order - (order - 1) or name in ("pndm", "checkpoint")
    assert torch.equal(part, whole[-len(part) :])


@pytest.mark.parametrize("group_size", [1, 2, 5, 100])
def test_groups_do_not_change_the_canvas(group_size: int) -> None:
    one = sampler("dpmpp_2m")
    while not one.finished:
        one.advance(predict, Grouping(group_size))
    assert torch.equal(finish(one), finish(sampler("dpmpp_2m")))


def test_guide_modes_pull_towards_the_guide_and_differ() -> None:
    guide = {"guide": rows_of(GUIDE * 3), "strength": 1.0}
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


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("DDIMScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas: got True, expected one of DDIMScheduler's"),
        ("DPMSolverMultistepScheduler", {"use_karas_sigmas": True}, "Did you mean use_karras_sigmas"),
    ],
)
def test_an_option_that_means_nothing_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_scheduler(Checkpoint(CONFIGS / "sd15"), name, options)


@pytest.mark.parametrize(("name", "steps"), [("LCMScheduler", 60), ("DDIMScheduler", 1000)])
def test_steps_that_a_scheduler_cannot_make_are_refused_in_words(name: str, steps: int) -> None:
    options = {"steps_offset": 1} if name == "DDIMScheduler" else {}
    schedule = Schedule(make_scheduler(Checkpoint(CONFIGS / "sd15"), name, options))
    with pytest.raises(ValueError, match=rf"{name} cannot make {steps} steps of 1000: .*another number of steps"):
        schedule.set_timesteps(steps)
