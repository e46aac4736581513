"""How far what is made is from scenes, all together: the slope is that of the distance, and it leads to the scenes."""

import random

import pytest
import torch
from test_training_perceptual import Edges
from torch import Tensor

from benchmarks._quality_features import frechet_distance
from training import frechet
from training.frechet import Distance, Frechet, Moments, sampled_latents
from training.library import Library
from training.models import MODEL


def moments(features: Tensor) -> Moments:
    found = Moments(features.shape[1], float("inf"), features.device)
    for some in features.split(100):
        found.add(some)
    return found


def features(seed: int) -> Tensor:
    """Of 400 pictures, spread unevenly."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)
    return torch.randn(400, 6, generator=generator) @ mixed + seed


def exact(got: Tensor, want: Tensor) -> Tensor:
    """The distance by its formula, over the spread of what is wanted: torch derives it by itself."""

    def covariance(x: Tensor) -> Tensor:
        beside = x - x.mean(0)
        return beside.T @ beside / len(x)

    values, vectors = torch.linalg.eigh(covariance(want))
    root = (vectors * values.sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariance(got) @ root).sqrt().sum()
    apart = (got.mean(0) - want.mean(0)).square().sum()
    spread = covariance(want).trace()
    return (apart + covariance(got).trace() + spread - 2 * shared) / spread


def test_moments_are_those_of_all_and_forget_what_is_old() -> None:
    rows = features(1)
    found = moments(rows)
    assert torch.allclose(found.mean.float(), rows.mean(0), atol=1e-5)
    assert torch.allclose(found.covariance.float(), rows.T.cov(correction=0), atol=1e-4)
    forgetful = Moments(6, 100, rows.device)
    for some in (rows, rows + 5):
        for part in some.split(50):
            forgetful.add(part)
    assert torch.allclose(forgetful.mean.float(), rows.mean(0) + 5, atol=0.5)


def test_its_gradient_is_that_of_the_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "MEMORY", 10**9)
    got, want = features(2).requires_grad_(), features(3)
    distance = Distance(moments(want))
    distance(got).backward()
    wanted = got.detach().double().requires_grad_()
    exact(wanted, want.double()).backward()
    assert got.grad is not None and wanted.grad is not None
    assert torch.allclose(got.grad, wanted.grad.float(), rtol=1e-3, atol=1e-6)
    trace = want.T.cov(correction=0).trace().item()
    assert distance.value == pytest.approx(frechet_distance(got.detach().numpy(), want.numpy()) / trace, rel=0.01)


def small(latents: Tensor, monkeypatch: pytest.MonkeyPatch, scenes: Tensor) -> Frechet:
    monkeypatch.setattr(frechet, "SIDES", (32,))
    networks: list = [Edges(1), Edges(2)]
    return Frechet(networks, torch.float32, scenes.split(16), latents, random.Random(0))


def test_few_pictures_at_a_time_are_led_to_where_all_scenes_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = torch.randn(128, 3, 40, 40) * torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1) + 0.3
    latents = torch.randn(128, 3, 40, 40)
    monkeypatch.setattr(frechet, "MEMORY", 64)
    loss = small(latents, monkeypatch, scenes)
    scale, shift = torch.ones(3, 1, 1, requires_grad=True), torch.zeros(3, 1, 1, requires_grad=True)

    def decode(some: Tensor) -> Tensor:
        return some * scale + shift

    loss.begin(decode)
    optimizer = torch.optim.Adam([scale, shift], lr=0.03)
    values = []
    for _ in range(120):
        optimizer.zero_grad()
        loss(decode, 16).backward()
        optimizer.step()
        values.append(loss.value)
    assert values[-1] < 0.05 * values[0]
    assert torch.allclose(shift.detach().flatten(), torch.tensor(0.3), atol=0.12)
    assert all(p.grad is None for network in loss.networks for p in network.parameters())


def test_latents_are_what_the_model_makes_of_captions() -> None:
    library = Library.make(1, 2, 0, "cpu")
    one, again = (sampled_latents(MODEL, library, 2, torch.device("cpu"), 3) for _ in range(2))
    assert one.shape == (2, 16, 32, 32) and one.dtype == torch.float16
    assert torch.equal(one, again) and 0.5 < one.float().std() < 1.5
