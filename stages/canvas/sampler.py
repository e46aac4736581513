"""The denoising loop over a canvas: predict, mix, step once. Can be stopped after any step and taken up again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.canvas import guides
from stages.canvas.dilated import Dilated
from stages.canvas.mixture import Mixture, TileBatch

_PLAIN = (int, float, str, bool, type(None))
_STATE = "state"  # name of the byte tensor that holds everything that is no tensor


class Sampler:
    """Runs a diffusers scheduler over a canvas.

    Args:
        scheduler: a diffusers scheduler, fresh.
        mixture: of the canvas' views.
        num_inference_steps: of the whole schedule.
        noise: ``[1, C, H, W]`` float32, standard normal.
        generator: as the noise draw left it; ancestral schedulers draw from it.
        guide: ``[1, C, H, W]`` float32 latents in the denoiser's space, or None for pure noise.
        guide_mode: ``sdedit``, ``hold``, ``skip_residual`` or ``none``.
        strength: share of the schedule that runs, as in diffusers' img2img; 1 without a guide.
        hold_share, skip_residual_power: see :mod:`stages.canvas.guides`.
        dilated: the global term that joins every prediction, if there is one.
    """

    def __init__(
        self,
        *,
        scheduler: Any,
        mixture: Mixture,
        num_inference_steps: int,
        noise: Tensor,
        generator: torch.Generator,
        guide: Tensor | None = None,
        guide_mode: str = "none",
        strength: float = 1.0,
        hold_share: float = 0.0,
        skip_residual_power: float = 3.0,
        dilated: Dilated | None = None,
    ) -> None:
        self.scheduler, self.mixture, self.generator, self.dilated = scheduler, mixture, generator, dilated
        self._noise, self._guide, self._mode = noise, guide, guide_mode
        self._hold_share, self._power = hold_share, skip_residual_power
        scheduler.set_timesteps(num_inference_steps)
        start = 0
        if guide is not None:
            running = min(int(num_inference_steps * strength), num_inference_steps)
            if running < 1:
                raise ValueError(
                    f"denoise.strength: {strength} of {num_inference_steps} steps is less than one step; "
                    f"expected at least {1 / num_inference_steps:.3g}."
                )
            start = (num_inference_steps - running) * scheduler.order
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(start)
        self.timesteps = scheduler.timesteps[start:]
        self.step = 0
        wanted = inspect.signature(scheduler.step).parameters
        self._step_arguments = {"generator": generator} if "generator" in wanted else {}
        if guide is None:
            self.latents = noise * scheduler.init_noise_sigma
        else:
            self.latents = self._noised_guide(self.timesteps[0])

    def _noised_guide(self, timestep: Tensor) -> Tensor:
        assert self._guide is not None
        return self.scheduler.add_noise(self._guide, self._noise, timestep[None])

    def _guided(self, timestep: Tensor) -> Tensor:
        if self._guide is None or self.step == 0:
            return self.latents
        if self._mode == "hold":
            noised = self._noised_guide(timestep)
            return guides.hold(self.latents, noised, self.step, len(self.timesteps), self._hold_share)
        if self._mode == "skip_residual":
            total = self.scheduler.config.num_train_timesteps
            noised = self._noised_guide(timestep)
            return guides.skip_residual(self.latents, noised, float(timestep), total, self._power)
        return self.latents

    @property
    def finished(self) -> bool:
        return self.step == len(self.timesteps)

    def advance(self, denoise: Callable[[TileBatch, Tensor], Tensor], group_size: int) -> None:
        """One step of the whole canvas; ``denoise(batch, timestep)`` predicts for each sample of the batch."""
        timestep = self.timesteps[self.step]
        latents = self._guided(timestep)
        scaled = self.scheduler.scale_model_input(latents, timestep)
        # a copy: some schedulers keep the prediction for the next steps, and the mixture uses its tensor again
        prediction = self.mixture.predict(scaled, lambda batch: denoise(batch, timestep), group_size).clone()
        if self.dilated is not None:
            total = self.scheduler.config.num_train_timesteps
            self.dilated.mix(
                prediction, scaled, lambda batch: denoise(batch, timestep), float(timestep), total, group_size
            )
        del scaled
        self.latents = self.scheduler.step(prediction, timestep, latents, **self._step_arguments, return_dict=False)[0]
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """All that the remaining steps depend on, as tensors: canvas, scheduler history, generator, step."""
        tensors: dict[str, Tensor] = {"latents": self.latents, "generator": self.generator.get_state()}
        plain: dict[str, Any] = {"step": self.step, "scheduler": {}}
        for name, value in vars(self.scheduler).items():
            if name != "_internal_dict":
                plain["scheduler"][name] = _flatten(value, f"scheduler.{name}", tensors)
        tensors[_STATE] = torch.frombuffer(bytearray(json.dumps(plain, sort_keys=True).encode()), dtype=torch.uint8)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take :meth:`state` up again; the sampler must have been made with the same arguments.

        Raises:
            ValueError: this is no state of such a sampler, which stays as it was.
        """
        try:
            plain = json.loads(bytes(tensors[_STATE].numpy()))
            step, latents = plain["step"], tensors["latents"]
            kept = {name: _unflatten(value, tensors) for name, value in plain["scheduler"].items()}
            if latents.shape != self.latents.shape or not 0 <= step <= len(self.timesteps):
                raise ValueError(f"step {step} of latents {tuple(latents.shape)}")
            self.generator.set_state(tensors["generator"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"not a checkpoint of this canvas ({error!r}).") from error
        self.step, self.latents = step, latents
        for name, value in kept.items():
            setattr(self.scheduler, name, value)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; tensors in it go to ``tensors``. TypeError for anything else, never silently left out."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        # a scheduler may keep the canvas itself, or one tensor twice: each name gets its own bytes
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if type(value).__module__ == "numpy":
        tensors[name] = torch.as_tensor(value).clone()
        return {"array": name}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    raise TypeError(f"{name}: cannot keep a {type(value).__name__} in a checkpoint.")


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    items = [_unflatten(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
