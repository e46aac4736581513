"""Schedulers are diffusers' own, made from the checkpoint's scheduler config as ``from_config`` does.

``Schedule`` is what the sampler asks of one: DDPM-like schedulers, and those that say it in other words.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.config import ConfigError, close_match
from stages.families.facts import steps_by_strength
from stages.memory.imports import light_imports
from stages.models.checkpoint import Checkpoint

MOST_TIMESTEPS = 100_000  # of a training


class Schedule:
    """A DDPM-like scheduler of diffusers. All tensors are ``[1, C, h, W]`` float32: any row band of a canvas.

    ``scheduler``: fresh; what it keeps between steps are its attributes (:mod:`stages.canvas.band_state`).
    """

    flow: ClassVar[bool] = False

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    @property
    def name(self) -> str:
        return type(self.scheduler).__name__

    @property
    def whole_canvas(self) -> bool:
        """Whether a step has to see all of the canvas at once."""
        return bool(getattr(self.scheduler.config, "thresholding", False))

    @property
    def num_train_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, strength: float | None = None) -> Tensor:
        """Begin; returns the timesteps that run: all, or with a guide the last ``strength`` of them, as diffusers'
        img2img counts.

        Raises:
            ValueError: not one step is left.
        """
        try:
            self._set(num_inference_steps)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            said = str(error).strip().splitlines()
            raise ValueError(
                f"{self.name} cannot make {num_inference_steps} steps of {self.num_train_timesteps}: "
                f"{said[0] if said else type(error).__name__}. Use another number of steps, or another scheduler."
            ) from error
        if strength is None:
            return self.scheduler.timesteps
        running = steps_by_strength(self.flow, num_inference_steps, strength)
        if running < 1:
            raise ValueError(
                f"denoise.strength: {strength} of {num_inference_steps} steps is less than one step; "
                f"expected at least {1 / num_inference_steps:.3g}."
            )
        start = (num_inference_steps - running) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        return self.scheduler.timesteps[start:]

    def _set(self, num_inference_steps: int) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        if (first := float(self.scheduler.timesteps.max())) > self.num_train_timesteps - 1:
            raise ValueError(f"the first timestep would be {first:.0f}")

    def begin(self, noise: Tensor) -> Tensor:
        """The latents of pure noise."""
        return noise * self.scheduler.init_noise_sigma

    def noised(self, guide: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The guide with as much noise as there is at ``timestep``."""
        return self.scheduler.add_noise(guide, noise, timestep[None])

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """As the denoiser takes them."""
        return self.scheduler.scale_model_input(latents, timestep)

    def expected(self, scaled: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """What the latents would be without noise, were the prediction of what the denoiser saw right.

        Schedulers that count in sigmas scale what it sees to variance 1: it lies where the training had it.
        """
        table = getattr(self.scheduler, "alphas_cumprod", None)
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if table is None or kind == "sample":
            return prediction if kind == "sample" else scaled
        place = min(max(float(timestep), 0.0), len(table) - 1.0)
        low, share = int(place), place - int(place)
        kept = float(table[low]) * (1 - share) + float(table[min(low + 1, len(table) - 1)]) * share
        alpha, sigma = max(kept, 1e-4) ** 0.5, (1 - kept) ** 0.5
        if kind == "v_prediction":
            return alpha * scaled - sigma * prediction
        return (scaled - sigma * prediction) / alpha

    def result(self, latents: Tensor, top: int) -> Tensor:
        """Rows from ``top`` on as they are kept when all is denoised, what pipelines give for ``output_type="latent"``;
        guides come in the same space."""
        return latents

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The latents of the next timestep."""
        more = {"generator": generator} if self._takes_generator else {}
        return self.scheduler.step(prediction, timestep, latents, return_dict=False, **more)[0]


def make_scheduler(checkpoint: Checkpoint, class_name: str | None, options: Mapping[str, Any]) -> Any:
    """A fresh scheduler of class ``class_name`` (None: the checkpoint's), with ``options`` over its config.

    Raises:
        ValueError: diffusers has no scheduler of that name.
        ConfigError: an option that means nothing to it.
    """
    default, config = checkpoint.scheduler_config()
    name = class_name or default
    if {**config, **options}.get("use_beta_sigmas"):
        _import_scipy()
    with light_imports():
        schedulers = importlib.import_module("diffusers.schedulers")  # schedulers and nothing else has a name in it
        scheduler_class = _lms() if name == "LMSDiscreteScheduler" else getattr(schedulers, name, None)
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, schedulers.SchedulerMixin)):
            hint = "" if name else " The checkpoint does not name one: scheduler=NAME chooses."
            raise ValueError(f"scheduler.class_name: got {name!r}, expected a scheduler class of diffusers.{hint}")
        _check_options(scheduler_class, options)
        _check_length({**config, **options})
        try:  # PNDM's flag is in most published scheduler configs and means nothing to the others
            return scheduler_class.from_config(config, **options)
        except Exception as error:  # of whatever kind: the numbers in a config are anybody's
            said = str(error).strip().partition("\n")[0]
            hint = f"It says: {said or type(error).__name__}"
            raise ConfigError("scheduler", name, "one that takes these options and the checkpoint's", hint) from error


def _check_options(scheduler_class: type, options: Mapping[str, Any]) -> None:
    """diffusers keeps options that a scheduler does not have, and does without them in silence."""
    known = [name for name in inspect.signature(scheduler_class.__init__).parameters if name not in ("self", "kwargs")]
    for name in options:
        if name not in known:
            expected = f"one of {scheduler_class.__name__}'s: {', '.join(known)}"
            raise ConfigError(f"scheduler.options.{name}", options[name], expected, close_match(str(name), known))


def _check_length(config: Mapping[str, Any]) -> None:
    """A table is made with a row for each timestep of the training."""
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 <= count <= MOST_TIMESTEPS:
        raise ConfigError("scheduler.options.num_train_timesteps", count, f"1 to {MOST_TIMESTEPS}")
    betas = config.get("trained_betas")
    listed = isinstance(betas, Sequence) and not isinstance(betas, str)
    if betas is not None and not (listed and len(betas) == count):
        got = f"{len(betas)} of them" if listed else betas
        raise ConfigError("scheduler.options.trained_betas", got, f"as many as num_train_timesteps, {count}")


def _import_scipy() -> None:
    """Beta sigmas need scipy's statistics; ``light_imports`` leaves alone what is imported, and diffusers is told."""
    import scipy.stats  # noqa: F401

    with light_imports():
        setattr(importlib.import_module("diffusers.utils.import_utils"), "_scipy_available", True)  # noqa: B010


def _lms() -> Any:
    """``LMSDiscreteScheduler``, which integrates with scipy: 65 MB of RES for one integral of a polynomial."""
    module: Any = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
    if not hasattr(module, "integrate"):
        module.integrate = SimpleNamespace(quad=quad)
    return module.LMSDiscreteScheduler


def quad(function: Callable[[float], float], start: float, end: float, **_: Any) -> tuple[float, float]:
    """(integral, error) as ``scipy.integrate.quad`` gives them, for polynomials up to degree 15 (Gauss-Legendre)."""
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(8)
    start, end = float(start), float(end)
    half, middle = (end - start) / 2, (end + start) / 2
    values = [float(function(middle + half * float(node))) for node in nodes]
    return half * sum(float(weight) * value for weight, value in zip(weights, values, strict=True)), 0.0
