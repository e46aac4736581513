"""The guide formulas at their ends and middle."""

import pytest
import torch

from stages.canvas.guides import hold, skip_residual, skip_residual_weight

X, GUIDE = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)


def test_hold_overwrites_the_first_share_of_the_steps():
    held = [bool(hold(X, GUIDE, step, 10, 0.3).any()) for step in range(10)]
    assert held == [True] * 3 + [False] * 7


def test_skip_residual_goes_from_guide_to_latents():
    assert skip_residual_weight(1000, 1000, 3.0) == 1.0
    assert skip_residual_weight(0, 1000, 3.0) == pytest.approx(0, abs=1e-12)
    assert skip_residual_weight(500, 1000, 3.0) == pytest.approx(0.125)
    assert torch.equal(skip_residual(X, GUIDE, 1000, 1000, 3.0), GUIDE)
    assert torch.allclose(skip_residual(X, GUIDE, 500, 1000, 1.0), GUIDE / 2)
