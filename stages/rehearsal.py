"""A run's schedules on a handful of latents and its tokenizers on a word, before any work: what a scheduler or a text
encoder cannot do, and a vocabulary that is damaged, are refused.

It takes no time beside importing. The look at the models does it, as every plan has one; where that was had before,
other steps, another scheduler or strength are rehearsed in a process of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig

from stages.canvas.band_state import BandState, BandStates, attributes
from stages.canvas.step_noise import StepNoise
from stages.config import ConfigError
from stages.context import StageContext
from stages.families import family_of
from stages.families.facts import facts_of
from stages.families.opening import open_checkpoint
from stages.families.schedules import Schedule, make_scheduler
from stages.files import write_json
from stages.memory.finite import refuse_absurd
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.techniques.lora_file import open_adapter, place, strengths
from stages.techniques.lora_fit import fits
from stages.tiles import Size

_SIDE = 8  # latents


def run(context: StageContext) -> None:
    """Write ``rehearsal.json``: that nothing was refused."""
    config = context.config
    note = context.progress.note
    checkpoint = open_checkpoint(config, facts_of(config).opened, note)
    rehearse(config, checkpoint, note)
    spell(config, checkpoint)
    write_json(context.output / "rehearsal.json", {"refused": None})


def rehearse(config: DictConfig, checkpoint: Checkpoint, note: Callable[[str], None] = lambda text: None) -> None:
    """Every step of ``lowres`` and ``denoise`` as their sampler takes it, with a prediction that fits; adapters beside
    the weights that they are for. ``note``: told what of them is not used.

    Raises:
        ConfigError: a scheduler, its options or a number of steps that cannot work, more ``clip_skip`` than layers,
            an adapter that fits nothing.
        ValueError: the same of a schedule, in its own words.
    """
    _layers(config, checkpoint)
    for text in _adapters(config, checkpoint):
        note(text)
    factor, guided = config.model.vae_scale_factor, config.guide.mode != "none"
    runs = [("denoise", config.denoise.tile_size, config.denoise.strength if guided else None)]
    if guided and not config.guide.image:
        runs.insert(0, ("lowres", config.model.native_size, None))
    for stage, pixels, strength in runs:
        scheduler = make_scheduler(checkpoint, config.scheduler.class_name, config.scheduler.options)
        tile, steps = Size(pixels // factor, pixels // factor), config[stage].num_inference_steps
        schedule = family_of(config).schedule(scheduler, tile, checkpoint)
        timesteps = schedule.set_timesteps(steps, strength)
        try:
            _step_through(schedule, timesteps, strength is None, config.model.latent_channels)
        except Exception as error:  # of whatever kind libraries raise
            got, said = f"{schedule.name} with {steps} steps", str(error).strip().partition("\n")[0]
            hint = f"It says: {said or type(error).__name__}"
            raise ConfigError(f"scheduler ({stage})", got, "a scheduler that can drive this model", hint) from error


def spell(config: DictConfig, checkpoint: Checkpoint) -> None:
    """A word in the tokens of every text encoder. A single file's tokenizer is the hub's or of its config.

    Raises:
        CheckpointError: a tokenizer that cannot be read, or has tokens that its encoder does not know.
    """
    family = family_of(config)
    for component in () if checkpoint.single else family.encoders(checkpoint):
        ids, size = family.tokenizer(component, checkpoint)("a").input_ids, checkpoint.config(component)["vocab_size"]
        if not ids or max(ids) >= size:
            folder = checkpoint.folder / component.replace("text_encoder", "tokenizer")
            raise CheckpointError(
                f"{folder}: got the tokens {ids} for the word 'a', expected some of the {size} that {component} knows. "
                "Download the checkpoint again."
            )


def _step_through(schedule: Schedule, timesteps: torch.Tensor, from_noise: bool, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (channels, _SIDE, _SIDE)
    noise = torch.randn((1, *shape), generator=generator)  # and what is predicted: of a picture that is all zeros
    latents = schedule.begin(noise) if from_noise else schedule.noised(torch.zeros_like(noise), noise, timesteps[0])
    with tempfile.TemporaryDirectory() as folder:
        for timestep in timesteps:
            with StepNoise(Path(folder), shape, generator).given_to(schedule.scheduler) as drawn:
                drawn.turn_to(0, _SIDE)
                schedule.scaled(latents, timestep)
                latents = schedule.step(noise, timestep, latents, generator)
        kept = BandState(1, latents, generator.get_state(), attributes(schedule.scheduler))
        states = BandStates(Path(folder), [(1, *shape)])
        states.write(0, kept)
        states.settle()
    if latents.shape != noise.shape:
        raise ValueError(f"it makes latents of shape {tuple(latents.shape)}, expected {tuple(noise.shape)}")
    refuse_absurd(latents, "latents after the last step")


def _layers(config: DictConfig, checkpoint: Checkpoint) -> None:
    """``clip_skip`` leaves a layer; with several encoders states come from the last but one already."""
    skip, encoders = config.text_encode.clip_skip, family_of(config).encoders(checkpoint)
    layers = [checkpoint.config(name).get("num_hidden_layers") for name in encoders]
    most = min((number for number in layers if isinstance(number, int)), default=None)
    if skip is not None and most is not None and skip > (most := most - (len(encoders) > 1)):
        raise ConfigError("text_encode.clip_skip", skip, f"at most {most}, as the text encoder has so many layers")


def _adapters(config: DictConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """What of ``model.loras`` is not used, in words."""
    facts, wanted = facts_of(config), set()
    for one in strengths(config):
        wanted |= {place(name, facts)[0] for name in open_adapter(Path(one.path)).modules}
    described = {}
    for name in facts.opened if wanted else ():
        if name in wanted and checkpoint.has_config(name):
            own = checkpoint.component(name)
            tensors = ((*tensor.rpartition(".")[::2], ref.shape) for tensor, ref in own.tensors.items())
            weights = {module: shape for module, last, shape in tensors if last == "weight"}
            described[name] = own.class_name, own.config, weights
    yield from fits(config, described)
