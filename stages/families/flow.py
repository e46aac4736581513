"""Flow matching (FLUX, SD 3, Z-Image): ``x = (1 - sigma) x0 + sigma noise``, and the network predicts ``noise - x0``.

The scheduler is diffusers' ``FlowMatchEulerDiscreteScheduler``, which has none of the words of DDPM-like ones. Where it
shifts its sigmas by the number of tokens that attend to each other (``use_dynamic_shifting``), those are the tokens of
one tile here, not of the canvas: the network sees a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy
from torch import Tensor

from stages.families.schedules import Schedule
from stages.tiles import Size

MOST_TOKENS = 4096  # of an image, at a time: a tile of 1024x1024 pixels
Shift = Callable[[Any, int, int], float]  # mu of (the scheduler's config, tokens, steps)


def linear_shift(config: Any, tokens: int, num_inference_steps: int) -> float:
    """``calculate_shift`` of the FLUX.1, SD 3 and Z-Image pipelines: linear in the number of tokens."""
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - base)
    return tokens * slope + (low - slope * base)


class FlowSchedule(Schedule):
    """``FlowMatchEulerDiscreteScheduler``.

    Args:
        scheduler: fresh.
        tokens: of one tile.
        linear: sigmas from 1 to 1/N in equal steps, before they are shifted; else the scheduler's own.
        shift: gives ``mu``.

    Raises:
        ValueError: a scheduler of another kind.
    """

    flow: ClassVar[bool] = True

    def __init__(self, scheduler: Any, tokens: int, *, linear: bool, shift: Shift = linear_shift) -> None:
        super().__init__(scheduler)
        if not self.name.startswith("FlowMatch"):
            raise ValueError(
                f"scheduler.class_name: got {self.name}, expected a scheduler for flow matching, FlowMatch... "
                "Use scheduler=checkpoint."
            )
        self._tokens, self._linear, self._shift = tokens, linear, shift

    def _set(self, num_inference_steps: int) -> None:
        config, more = self.scheduler.config, {}
        if self._linear and not config.get("use_flow_sigmas"):
            more["sigmas"] = numpy.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if config.use_dynamic_shifting:
            more["mu"] = self._shift(config, self._tokens, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, **more)

    def begin(self, noise: Tensor) -> Tensor:
        return noise

    def noised(self, guide: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        sigma = self.scheduler.sigmas[int((self.scheduler.timesteps == timestep).nonzero()[0])]
        return sigma * noise + (1.0 - sigma) * guide

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents

    def expected(self, scaled: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        return scaled - float(timestep) / self.num_train_timesteps * prediction


def tokens_at_a_time(tile: Size, device: str, *, pairs: bool = False) -> int:
    """Samples of ``tile`` latents that go through a block of a transformer at a time, a token being 2x2 of them: whole
    ``pairs``, as guided tiles are, or one."""
    samples = 8 if device == "cpu" else 32
    most = max(1, min(samples, MOST_TOKENS // max(1, tile.height * tile.width // 4)))
    return most // 2 * 2 if pairs and most > 1 else most
