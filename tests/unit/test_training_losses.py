"""What training asks for: timesteps, weights, texture."""

import random

import torch

from training.captions import caption
from training.denoiser import WHOLE_ONLY, choose_timesteps, loss_weight
from training.losses import laplacian, texture_loss
from training.models import make_scheduler
from training.phrases import WEATHER, WEATHER_ADJECTIVE
from training.specs import Spec


def test_crops_are_never_noised_beyond_what_layouts_are_learned_from() -> None:
    crop = torch.arange(4000) % 2 == 0
    t = choose_timesteps(crop, torch.Generator().manual_seed(1))
    assert t[crop].max() < WHOLE_ONLY and t[~crop].max() > 990 and t.min() >= 0
    counts = torch.histc(t[~crop].float(), 10, 0, 1000)
    assert counts.min() > 160  # spread evenly


def test_no_noise_level_is_neglected() -> None:
    weights = loss_weight(make_scheduler().alphas_cumprod)
    assert weights[-1] > 0.99 and weights.min() == torch.tensor(0.5)
    assert (weights.diff() >= 0).all()


def test_texture_loss_asks_for_strength_and_not_for_phase() -> None:
    generator = torch.Generator().manual_seed(2)
    grain = [0.1 * torch.randn(1, 3, 64, 64, generator=generator) for _ in range(2)]
    flat = torch.zeros_like(grain[0])
    assert texture_loss(flat, flat) == 0
    assert texture_loss(grain[0], grain[1]) < 0.3 * texture_loss(flat, grain[1])
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert laplacian(ramp).abs().max() < 1e-5


def test_bad_weather_is_seldom_left_unsaid() -> None:
    rng = random.Random(3)
    said = (*WEATHER["fog"], *WEATHER_ADJECTIVE["fog"])
    texts = [caption(rng, Spec(weather="fog", setting="lake"), 0) for _ in range(400)]
    assert sum(any(word in text for word in said) for text in texts) > 370
