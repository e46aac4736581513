"""Rendered scenes: deterministic, finite, sharp at any zoom, the same world in every view."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from training.scenes import MATERIALS, Scene, View, render
from training.specs import SETTINGS, SUBJECTS, TIMES, WEATHERS, Spec, sample_spec


def _view(x: float, y: float, zoom: float, size: int) -> View:
    return View(
        centre_x=torch.tensor([x]), centre_y=torch.tensor([y]), zoom=torch.tensor([zoom]), max_zoom=zoom, size=size
    )


def _render(spec: Spec, view: View, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return render(spec, torch.tensor([seed]), torch.tensor([0]), view)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_renders_with_every_time_weather_and_subject(setting: str) -> None:
    rng = random.Random(1)
    for i in range(max(len(SUBJECTS), len(TIMES), len(WEATHERS))):
        spec = replace(
            sample_spec(rng),
            setting=setting,
            time=TIMES[i % len(TIMES)],
            weather=WEATHERS[i % len(WEATHERS)],
            subject=SUBJECTS[i % len(SUBJECTS)],
        )
        images, ids = _render(spec, _view(0.5, 0.5, 1.0 if i % 2 else 6.0, 32))
        assert images.shape == (1, 3, 32, 32)
        assert torch.isfinite(images).all(), spec
        assert images.abs().max() <= 1
        assert ids.max() < len(MATERIALS)


def test_same_seed_same_pixels_and_another_seed_another_picture() -> None:
    spec = Spec(time="sunset", setting="cliff", subject="lighthouse", body="sun")
    one, two, other = (_render(spec, _view(0.5, 0.5, 1.0, 64), seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert (one - other).abs().mean() > 0.02


def test_a_crop_shows_the_same_world_with_more_detail() -> None:
    spec = Spec(time="day", setting="mountains", subject="house")
    whole = _render(spec, _view(0.5, 0.5, 1.0, 128))[0]
    crop = _render(spec, _view(0.5, 0.375, 4.0, 128))[0]
    shrunk = F.avg_pool2d(crop, 4)
    same = whole[..., 64:96, 48:80]
    assert (shrunk - same).abs().mean() < 0.06
    blown = F.interpolate(same, scale_factor=4, mode="bicubic")
    fine = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (crop, blown)]
    assert fine[0] > 1.15 * fine[1]


def test_the_main_subject_shows() -> None:
    rng = random.Random(2)
    for _ in range(40):
        spec = sample_spec(rng)
        if spec.subject == "none":
            continue
        _, ids = _render(spec, View.whole(1, size=128))
        assert (ids == MATERIALS.index(spec.subject)).sum() >= 12, spec


def test_no_cloud_lies_on_the_moon() -> None:
    moon, clouds = MATERIALS.index("moon"), MATERIALS.index("clouds")
    for seed in range(4):
        spec = Spec(time="night", weather="cloudy", setting="sea", body="moon")
        _, ids = _render(spec, View.whole(1, size=128), seed)
        scene = Scene(spec, torch.tensor([seed]), torch.tensor([0]))
        at = (torch.arange(128) + 0.5) / 128
        away = ((at[None] - scene.sun_x[0]) ** 2 + (1 - at[:, None] - scene.sun_y[0]) ** 2).sqrt()
        assert (ids[0][away < 0.05] == moon).all()
        assert (ids == clouds).any()


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 seeds, 2 colours"):
        render(Spec(), torch.tensor([1]), torch.tensor([1, 2]), View.whole(1))
