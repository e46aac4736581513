"""The pipeline: the stages in order, what each needs and which parameters make its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Stage(NamedTuple):
    """One stage: ``stages/<name>.py`` with ``run(context)``.

    ``parameters`` are dotted config keys (a node's name stands for all below it): they, the upstream fingerprints, the
    identity of ``components`` in the checkpoint, dtype and device make the fingerprint. Raise ``version`` when the
    code gives another result for the same parameters.
    """

    name: str
    version: int
    parameters: tuple[str, ...]
    needs: Callable[[DictConfig], tuple[str, ...]]
    components: tuple[str, ...] = ()


def _guide_needs(config: DictConfig) -> tuple[str, ...]:
    return () if config.guide.image else ("lowres",)


def _denoise_needs(config: DictConfig) -> tuple[str, ...]:
    return ("text_encode",) if config.guide.mode == "none" else ("text_encode", "guide")


_SCHEDULER = ("scheduler.class_name", "scheduler.options", "model.prediction_type")
_NUMERICS = ("technique.channels_last", "technique.tf32")

PIPELINE: tuple[Stage, ...] = (
    Stage(
        name="text_encode",
        version=1,
        parameters=("prompt", "negative_prompt", "regions", "text_encode", "technique.tf32"),
        needs=lambda config: (),
        components=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"),
    ),
    Stage(
        name="lowres",
        version=1,
        parameters=("seed", "lowres", *_SCHEDULER, *_NUMERICS),
        needs=lambda config: ("text_encode",),
        components=("unet", "transformer", "scheduler"),
    ),
    Stage(
        name="guide",
        version=1,
        parameters=(
            *("width", "height", "lowres.width", "lowres.height"),
            *("guide.image", "guide.upscale", "guide.tile_size", *_NUMERICS),
        ),
        needs=_guide_needs,
        components=("vae",),
    ),
    Stage(
        name="denoise",
        version=1,
        parameters=(
            *("width", "height", "seed", "regions", "reroll", "denoise"),
            *("guide.mode", "guide.hold_steps", "guide.skip_residual_power", *_SCHEDULER, *_NUMERICS),
        ),
        needs=_denoise_needs,
        components=("unet", "transformer", "scheduler"),
    ),
    Stage(
        name="decode",
        version=1,
        parameters=("width", "height", "decode", *_NUMERICS),
        needs=lambda config: ("denoise",),
        components=("vae",),
    ),
    Stage(
        name="stitch",
        version=1,
        parameters=("width", "height", "decode.tile_size", "decode.overlap", "stitch", "model.name", "scheduler.name"),
        needs=lambda config: ("decode",),
    ),
)

# Not part of the picture: what the planner has to know before anything runs (see stages.workflow.planning).
PROFILE = Stage(
    name="profile",
    version=3,
    parameters=(
        *("width", "height", "lowres.width", "lowres.height", "lowres.guidance_scale", "regions"),
        *("denoise.tile_size", "denoise.overlap", "denoise.guidance_scale", "decode", "technique.channels_last"),
        *("guide.mode", "guide.image", "guide.upscale", "guide.tile_size", "model.native_size"),
    ),
    needs=lambda config: (),
    components=("text_encoder", "unet", "vae"),
)
