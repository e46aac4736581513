"""How a guide holds the canvas during denoising. All tensors are ``[1, C, H, W]`` float32 and left unchanged."""

from __future__ import annotations

import math

from torch import Tensor


def hold(latents: Tensor, noised_guide: Tensor, step: int, num_steps: int, share: float) -> Tensor:
    """The noised guide during the first ``share`` of the steps, then ``latents`` (Mixture of Diffusers, Image2Image).

    ``step`` counts from 0 over the ``num_steps`` that run; ``noised_guide`` is noised to this step's timestep.
    """
    return noised_guide if step < round(share * num_steps) else latents


def skip_residual_weight(timestep: float, num_train_timesteps: int, power: float) -> float:
    """``c^a`` with ``c = (1 + cos(pi (T - t)/T))/2``: 1 at the noisy end, 0 at the clean one (arXiv 2311.16973)."""
    return ((1 + math.cos(math.pi * (num_train_timesteps - timestep) / num_train_timesteps)) / 2) ** power


def skip_residual(
    latents: Tensor, noised_guide: Tensor, timestep: float, num_train_timesteps: int, power: float
) -> Tensor:
    """DemoFusion's ``x <- (1 - c^a) x + c^a noised(guide)``; ``power`` is a."""
    weight = skip_residual_weight(timestep, num_train_timesteps, power)
    return latents * (1 - weight) + noised_guide * weight
