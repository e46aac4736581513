"""A stage's models, opened as its family, its techniques and its plan say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from omegaconf import DictConfig

from stages.context import StageContext
from stages.families import family_of
from stages.families.base import Family
from stages.families.facts import facts_of
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component
from stages.models.controlnets import controlnets
from stages.models.loading import Built, Streamer, build, open_model
from stages.plans import described
from stages.techniques import techniques_of
from stages.techniques.base import Technique
from stages.techniques.dtype import dtype_of

ENCODER, DECODER = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")


def open_checkpoint(config: DictConfig, components: Sequence[str], note: Callable[[str], None]) -> Checkpoint:
    """The run's checkpoint; a hub id is downloaded first (only ``components``).

    Raises:
        CheckpointError: it cannot be used, or has a trait that its family does not understand.
    """
    files = {facts_of(config).denoiser: config.model.denoiser, "vae": config.model.vae}
    checkpoint = Checkpoint.open(
        config.model.path,
        revision=config.model.revision,
        components=tuple(components),
        config=config.model.get("config"),
        prediction_type=config.model.prediction_type if "scheduler" in components else None,
        files={name: file for name, file in files.items() if file},
        note=note,
    )
    family_of(config).check(checkpoint, components)
    return checkpoint


def _component(family: Family, checkpoint: Checkpoint, name: str, techniques: Sequence[Technique]) -> Component:
    """A component; a denoiser with the networks that run in its pass."""
    found = checkpoint.component(name)
    if name != family.facts.denoiser:
        return found
    paths = [path for technique in techniques for path in technique.networks]
    if not paths:
        return found
    vae, factor = checkpoint.config("vae"), family.facts.vae_scale_factor
    return replace(found, controlnets=controlnets(paths, found.config, vae, factor))


@contextmanager
def open_component(
    context: StageContext,
    checkpoint: Checkpoint,
    name: str,
    *,
    techniques: Sequence[Technique] | None = None,
    micro_batch: int = 0,
    drop: Sequence[str] = (),
) -> Iterator[Streamer]:
    """One component with its weights, see ``models.loading.open_model``; ``techniques``: those of the stage, where the
    caller asks them too."""
    config, stage, family = context.config, context.stage.module, family_of(context.config)
    techniques = techniques_of(config, stage) if techniques is None else techniques
    with open_model(
        _component(family, checkpoint, name, techniques),
        dtype=dtype_of(config, name),
        blocks=family.blocks(name),
        techniques=techniques,
        plan=context.plan.model(name),
        micro_batch=micro_batch,
        mark=context.progress.mark,
        note=context.progress.note,
        drop=(*drop, *family.unused(name, checkpoint.config(name))),
        device=config.device,
    ) as streamer:
        if lies := context.plan.model(name).placement:
            context.progress.note(described(name, lies))
        yield streamer
        context.progress.waited += getattr(streamer, "waited", 0.0)


@contextmanager
def open_vae(context: StageContext, *, encoder: bool = False, decoder: bool = False) -> Iterator[Streamer]:
    """The stock ``AutoencoderKL`` without the half that is not asked for."""
    checkpoint = open_checkpoint(context.config, ("vae",), context.progress.note)
    drop = (() if encoder else ENCODER) + (() if decoder else DECODER)
    with open_component(context, checkpoint, "vae", drop=drop) as streamer:
        yield streamer


def built(
    config: DictConfig, family: Family, checkpoint: Checkpoint, name: str, stage: str, drop: Sequence[str] = ()
) -> Built:
    """One component as ``stage`` would open it, for a look: no weight is read."""
    techniques = techniques_of(config, stage)
    return build(
        _component(family, checkpoint, name, techniques),
        dtype=dtype_of(config, name),
        blocks=family.blocks(name),
        techniques=techniques,
        drop=(*drop, *family.unused(name, checkpoint.config(name))),
    )
