"""The pipeline: the stages in order, what each needs and which parameters make its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Stage(NamedTuple):
    """One stage: ``stages/<name>.py`` with ``run(context)``.

    ``parameters`` are dotted config keys (a node's name stands for all below it): they, the upstream fingerprints
    and the techniques that touch it make the fingerprint; where it ``opens_model``, also what its family opens of the
    checkpoint, dtype and device. Raise ``version`` when the code gives another result for the same parameters.
    """

    name: str
    version: int
    parameters: tuple[str, ...]
    needs: Callable[[DictConfig], tuple[str, ...]]
    opens_model: bool = False
    of: str = ""  # of an upscaling phase (``guide_512``): the stage that it is one of
    records: bool = False  # whether it may read what the stages above it declare, whose fingerprints are in its own
    spreads: bool = False  # whether several processes may share its tiles (launch.nproc)
    measures: bool = False  # whether its result holds figures of the machine it ran on
    # keys that it may read besides: to refuse their values, or of what it needs; no result hangs on them otherwise
    checks: tuple[str, ...] = ()
    phase: tuple[int, int] | None = None  # of an upscaling phase: (width, height) of its canvas, pixels
    later: bool = False  # whether the guide of its canvas is the canvas of an upscaling phase before it

    @property
    def module(self) -> str:
        """The file in ``stages`` that does it."""
        return self.of or self.name


def _guide_needs(config: DictConfig) -> tuple[str, ...]:
    return () if config.guide.image else ("lowres",)


def _denoise_needs(config: DictConfig) -> tuple[str, ...]:
    return ("text_encode",) if config.guide.mode == "none" else ("text_encode", "guide")


_LATENTS = ("model.vae_scale_factor", "model.latent_channels", "model.patch")
_SCHEDULER = ("scheduler.class_name", "scheduler.options", "model.prediction_type")

PIPELINE: tuple[Stage, ...] = (
    Stage(
        name="text_encode",
        version=2,
        parameters=("prompt", "negative_prompt", "prompt_weighting", "regions", "text_encode"),
        needs=lambda config: (),
        opens_model=True,
    ),
    Stage(
        name="lowres",
        version=3,
        parameters=("seed", "lowres", "regions", "reroll", "model.native_size", *_LATENTS, *_SCHEDULER),
        needs=lambda config: ("text_encode",),
        opens_model=True,
        spreads=True,
        checks=("guide.fit",),  # of pictures that ControlNets are shown
    ),
    Stage(
        name="guide",
        version=4,
        parameters=(
            *("width", "height", "lowres.width", "lowres.height"),
            *("guide.image", "guide.fit", "guide.upscale", "guide.vae_mode", "guide.tile_size", *_LATENTS),
        ),
        needs=_guide_needs,
        opens_model=True,
    ),
    Stage(
        name="denoise",
        version=4,
        parameters=(
            *("width", "height", "seed", "regions", "reroll", "denoise"),
            *("guide.mode", "guide.hold_steps", "guide.skip_residual_power", *_LATENTS, *_SCHEDULER),
        ),
        needs=_denoise_needs,
        opens_model=True,
        spreads=True,
        checks=("guide.image", "guide.fit"),
    ),
    Stage(
        name="decode",
        version=5,
        parameters=("width", "height", "decode", *_LATENTS),
        needs=lambda config: ("denoise",),
        opens_model=True,
        spreads=True,
    ),
    Stage(
        name="stitch",
        version=2,
        parameters=("width", "height", "decode.tile_size", "decode.overlap", "stitch", "model.name", "scheduler.name"),
        needs=lambda config: ("decode",),
        records=True,
    ),
)

# Not part of the picture: whether the schedules and the tokenizers of a run can be (see stages.rehearsal).
REHEARSAL = Stage(
    name="rehearsal",
    version=2,
    parameters=(
        *("lowres.num_inference_steps", "denoise.num_inference_steps", "denoise.strength", "text_encode.clip_skip"),
        *("denoise.tile_size", "guide.mode", "guide.image", "model.native_size", *_LATENTS, *_SCHEDULER),
    ),
    needs=lambda config: (),
    opens_model=True,
    measures=True,
)

# Not part of the picture: what the planner has to know before anything runs (see stages.workflow.planning).
PROFILE = Stage(
    name="profile",
    version=37,
    parameters=(
        *("width", "height", "lowres.width", "lowres.height", "lowres.guidance_scale", "regions"),
        *("denoise.tile_size", "denoise.overlap", "denoise.guidance_scale"),
        *("denoise.dilated.enabled", "denoise.blend", "decode", "model.native_size", "model.text_tokens", *_LATENTS),
        "scheduler.options",  # some import more than others
        *("guide.mode", "guide.image", "guide.fit", "guide.upscale"),
        *("guide.vae_mode", "guide.tile_size", "guide.phases", "device_map", "max_memory"),
    ),
    needs=lambda config: (),
    opens_model=True,
    measures=True,
    checks=REHEARSAL.parameters,
)
PREPARATIONS = (REHEARSAL, PROFILE)  # what runs before the pipeline does


def expanded(config: DictConfig, pipeline: Sequence[Stage] = PIPELINE) -> tuple[Stage, ...]:
    """The pipeline with the upscaling phases of ``guide.phases`` before ``guide``: ``guide_512``, ``denoise_512`` ...

    Each phase guides and denoises a smaller canvas, whose picture guides the next one. The first one's guide is the
    low-res picture or ``guide.image``.
    """
    found: list[Stage] = []
    previous: tuple[str, ...] = ()
    by_name = {stage.name: stage for stage in pipeline}
    for stage in pipeline:
        if stage.name == "guide" and config.guide.phases and "denoise" in by_name:
            for long_side in config.guide.phases:
                size = phase_size(config.width, config.height, long_side, multiple(config))
                guide, denoise = f"guide_{long_side}", f"denoise_{long_side}"
                needs, own = previous or stage.needs(config), {"phase": size, "later": bool(previous)}
                found.append(stage._replace(name=guide, of="guide", needs=lambda _, n=needs: n, **own))
                needs = ("text_encode", guide)
                found.append(by_name["denoise"]._replace(name=denoise, of="denoise", needs=lambda _, n=needs: n, **own))
                previous = (guide, denoise)
            found.append(stage._replace(needs=lambda _, n=previous: n, later=True))
        else:
            found.append(stage._replace(later=bool(previous) and stage.name == "denoise"))
    return tuple(found)


def multiple(config: DictConfig) -> int:
    """Pixels of which the sides of a canvas are multiples: of a token of the denoiser."""
    return config.model.vae_scale_factor * config.model.patch


def phase_size(width: int, height: int, long_side: int, unit: int) -> tuple[int, int]:
    """(width, height) of a smaller canvas of the same shape, multiples of ``unit`` pixels."""
    scale = long_side / max(width, height)
    return max(unit, round(width * scale / unit) * unit), max(unit, round(height * scale / unit) * unit)
