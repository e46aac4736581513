"""The denoising loop over a canvas in row bands: predict, mix, step. Can be stopped at any moment and taken up again.

A scheduler works on each latent by itself, so the canvas is stepped band by band, each with the scheduler's history of
it, and is never in memory as a whole. A small canvas is one band.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.canvas import guides
from stages.canvas.band_state import BandState, BandStates, adopt, attributes, copied
from stages.canvas.dilated import Dilated
from stages.canvas.mixture import Grouping, Mixture, TileBatch
from stages.canvas.space import Space
from stages.canvas.step_noise import StepNoise
from stages.distributed import ALONE, Ranks
from stages.memory.finite import refuse_not_finite
from stages.memory.rows import Rows, bands
from stages.memory.trim import return_freed


class Schedule(Protocol):
    """A scheduler as the sampler drives it (:mod:`stages.families.schedules`)."""

    scheduler: Any

    @property
    def name(self) -> str: ...
    @property
    def whole_canvas(self) -> bool: ...
    @property
    def num_train_timesteps(self) -> int: ...
    def set_timesteps(self, num_inference_steps: int, strength: float | None = None) -> Tensor: ...
    def begin(self, noise: Tensor) -> Tensor: ...
    def noised(self, guide: Tensor, noise: Tensor, timestep: Tensor) -> Tensor: ...
    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor: ...
    def expected(self, scaled: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor: ...
    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor: ...


class Sampler:
    """Runs a schedule over a canvas.

    Args:
        schedule: of a fresh diffusers scheduler.
        mixture: of the canvas' views.
        num_inference_steps: of the whole schedule.
        noise: ``[1, C, H, W]`` float32, standard normal.
        generator: as the noise draw left it; ancestral schedulers draw from it.
        folder: for checkpoints and scratch files.
        guide: ``[1, C, H, W]`` float32 latents, or None for pure noise.
        guide_mode: ``sdedit``, ``hold``, ``skip_residual`` or ``none``.
        strength: share of the schedule that runs, as in diffusers' img2img; 1 without a guide.
        hold_share, skip_residual_power: see :mod:`stages.canvas.guides`.
        dilated: the global term that joins every prediction, if there is one.
        space: of the denoiser; noise and prediction are in it, the guide is not.
        period: steps after each of which a run may be taken up again.
        ranks: that share the tiles. Only the first one's noise and guide are read, and only it keeps a checkpoint.

    Raises:
        ValueError: no step is left by ``strength``, or a scheduler that must see a large canvas as a whole.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        mixture: Mixture,
        num_inference_steps: int,
        noise: Rows,
        generator: torch.Generator,
        folder: Path,
        guide: Rows | None = None,
        guide_mode: str = "none",
        strength: float = 1.0,
        hold_share: float = 0.0,
        skip_residual_power: float = 3.0,
        dilated: Dilated | None = None,
        space: Space = Space(),  # noqa: B008 - frozen
        period: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.schedule, self.mixture, self.generator, self.dilated = schedule, mixture, generator, dilated
        self.space = space
        self.scheduler = scheduler = schedule.scheduler
        self._noise, self._guide, self._mode = noise, guide, guide_mode
        self._hold_share, self._power = hold_share, skip_residual_power
        self.bands = bands(noise.height, noise.width, channels=noise.channels)
        if len(self.bands) > 1 and schedule.whole_canvas:
            raise ValueError(
                f"scheduler.options.thresholding: {schedule.name} then has to see the whole canvas at once, "
                "which is stepped in row bands above 2048x2048 pixels; expected thresholding=false."
            )
        self.timesteps = schedule.set_timesteps(num_inference_steps, None if guide is None else strength)
        self.step = 0
        self._fresh = {name: copied(value) for name, value in attributes(scheduler).items()}
        self._folder, self._shape = folder, (noise.channels, noise.height, noise.width)
        shapes = [(1, noise.channels, bottom - top, noise.width) for top, bottom in self.bands]
        self._states = BandStates(folder, shapes, period)
        self._scaled = Rows.create(folder / "scaled.safetensors", self._shape)
        self._scaled_step: int | None = None  # that it is the input of
        self._prediction = Rows.create(folder / "prediction.safetensors", self._shape)

    def resume(self) -> bool:
        """Go on after the last whole step (of those that ``period`` allows) that an earlier sampler with the same
        arguments left; False if none did.

        Raises:
            ValueError: what lies in the folder is of no such sampler; it has been removed.
        """
        try:
            if self.ranks.first:
                self.step = self._last_step()
        finally:
            self.step = self.ranks.agreed(self.step)
        return self.step > 0

    def _last_step(self) -> int:
        try:
            step = self._states.last_step()
            if step > len(self.timesteps):
                raise ValueError(f"step {step} of {len(self.timesteps)}")
        except ValueError:
            self._states.clear()
            raise
        if step:
            self.generator.set_state(self._states.read(step, 0).generator)
        return step

    @property
    def damaged(self) -> str:
        """Why ``resume`` went back a step further than the last one, if it did."""
        return self._states.damaged

    @property
    def finished(self) -> bool:
        return self.step == len(self.timesteps)

    def latents(self) -> Iterator[tuple[int, Tensor]]:
        """(top, rows ``[1, C, h, W]`` float32) of every band, as of now."""
        for band, (top, _) in enumerate(self.bands):
            yield top, self.space.outside(self._load(band), top)

    def advance(
        self,
        denoise: Callable[[TileBatch, Tensor], Tensor],
        grouping: Grouping,
        expects: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """One step of the whole canvas; ``denoise(batch, timestep)`` predicts for each sample of the batch.

        ``expects`` is told, band by band as ``latents`` gives them, what they would be without noise, were the
        prediction right.

        Raises:
            ValueError: NaN or an infinity in a prediction, or in what the scheduler makes of it.
        """
        timestep, now = self.timesteps[self.step], f"step {self.step + 1} of {len(self.timesteps)}"
        self._share_inputs(timestep)

        def predict(batch: TileBatch) -> Tensor:
            found = denoise(batch, timestep)
            refuse_not_finite(found, f"{now}, tile {', '.join(dict.fromkeys(t.name for t in batch.tiles))}: prediction")
            return found

        self.mixture.predict(self._scaled, self._prediction, predict, grouping, self.ranks)
        if self.dilated is not None:
            total = self.schedule.num_train_timesteps
            self.dilated.mix(self._prediction, self._scaled, predict, float(timestep), total, grouping, self.ranks)
        if self.ranks.first:
            self._step_bands(timestep, now, expects)
        self.step += 1

    def _share_inputs(self, timestep: Tensor) -> None:
        """All ranks get what the denoiser is asked: of the step before, unless they begin here."""
        for band, (top, bottom) in enumerate(self.bands):
            if not self.ranks.first:
                shape = (1, self._shape[0], bottom - top, self._shape[2])
                self._scaled.write(top, self.ranks.broadcast(torch.empty(shape)))
            elif self._scaled_step != self.step:
                self._share(top, self._guided(band, self._load(band), timestep, self.step), timestep)

    def _share_next(self, band: int, top: int, latents: Tensor) -> None:
        """What the next step asks, while the scheduler's history of the band is at hand; other ranks go on with it."""
        step = self.step + 1
        if step < len(self.timesteps):
            timestep = self.timesteps[step]
            self._share(top, self._guided(band, latents, timestep, step), timestep)

    def _share(self, top: int, latents: Tensor, timestep: Tensor) -> None:
        scaled = self.schedule.scaled(latents, timestep)
        self._scaled.write(top, scaled)
        self.ranks.broadcast(scaled)

    def _step_bands(self, timestep: Tensor, now: str, expects: Callable[[int, Tensor], None] | None) -> None:
        """The scheduler's step of every band, from the canvas' prediction; what comes of it is kept on disk."""
        step = self.step + 1
        with StepNoise(self._folder, self._shape, self.generator).given_to(self.scheduler) as noise:
            for band, (top, bottom) in enumerate(self.bands):
                noise.turn_to(top, bottom)
                latents = self._guided(band, self._load(band), timestep, self.step)
                scaled = self.schedule.scaled(latents, timestep)  # schedulers want it to be called before a step
                prediction = self._prediction.read(top, bottom)
                if expects is not None:
                    expects(top, self.space.outside(self.schedule.expected(scaled, prediction, timestep), top))
                del scaled
                stepped = self.schedule.step(prediction, timestep, latents, self.generator)
                refuse_not_finite(stepped, f"{now}, rows {top} to {bottom}: latents after the scheduler's step")
                drawn = self.generator.get_state()  # the first band draws for all of them
                state = BandState(step, stepped, drawn, attributes(self.scheduler))
                self._states.write(band, state, partial(self._share_next, band, top, stepped))
                del latents, prediction, stepped, state
                return_freed()  # a pass leaves a heap full of holes, and each band would fill others of them
        self._states.settle()
        self._scaled_step = step

    def _load(self, band: int) -> Tensor:
        """A band's latents; the scheduler gets its history of this band."""
        if self.step:
            state = self._states.read(self.step, band)
            adopt(self.scheduler, state.scheduler)
            return state.latents
        adopt(self.scheduler, {name: copied(value) for name, value in self._fresh.items()})
        if self._guide is None:
            return self.schedule.begin(self._noise.read(*self.bands[band]))
        return self._noised_guide(band, self.timesteps[0])

    def _noised_guide(self, band: int, timestep: Tensor) -> Tensor:
        assert self._guide is not None
        rows = self.bands[band]
        guide = self.space.inside(self._guide.read(*rows), rows[0])
        return self.schedule.noised(guide, self._noise.read(*rows), timestep)

    def _guided(self, band: int, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """A band's latents at the beginning of a step, as the guide leaves them."""
        if self._guide is None or step == 0:
            return latents
        if self._mode == "hold":
            noised = self._noised_guide(band, timestep)
            return guides.hold(latents, noised, step, len(self.timesteps), self._hold_share)
        if self._mode == "skip_residual":
            total = self.schedule.num_train_timesteps
            noised = self._noised_guide(band, timestep)
            return guides.skip_residual(latents, noised, float(timestep), total, self._power)
        return latents
