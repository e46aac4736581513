"""Regions: prompts of their own for parts of the canvas. All of them as a person or a file wrote them, or a refusal.

Boxes are pixels of the canvas. Everything here is plain data: no torch; ``stages.canvas.views`` makes views of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError, close_match
from stages.regions.files import plain
from stages.regions.reader import Reader
from stages.regions.types import Region, Regions, Reroll, uncovered
from stages.tiles import Size, whole

__all__ = ["Region", "Regions", "Reroll", "from_config", "parse", "uncovered"]


def parse(
    written: Any,
    *,
    size: Size,
    factor: int = 8,
    prompt: str = "",
    negative_prompt: str = "",
    overlap: int = 64,
    rerolls: Sequence[Any] = (),
) -> Regions:
    """Regions as a person or a mixture-of-diffusers file wrote them, on a canvas of ``size`` pixels.

    Args:
        written: a list of regions, or ``{regions: [...], grid: [[...]], background: TEXT or region or false}``, or
            the contents of a mixture-of-diffusers JSON file (see ``stages.regions.files``).
        size: of the canvas in pixels.
        factor: pixels to a latent.
        prompt: the background where the regions leave a part of the canvas uncovered.
        negative_prompt: of a region that does not say.
        overlap: pixels that the cells of a ``grid`` share.
        rerolls: ``[{box, seed, mode, epsilon}]``.

    Raises:
        ConfigError: names the region and what is wrong with it, or the part of the canvas that is uncovered.
    """
    defaults = {"negative_prompt": negative_prompt, "mask_type": "gaussian"}
    written, more_rerolls = plain(written)
    reader = Reader(size, factor, defaults)
    if not isinstance(written, Mapping):
        written = {"regions": written}
    for name in written:
        if name not in ("regions", "grid", "background", "overlap"):
            known = ("regions", "grid", "background", "overlap")
            raise ConfigError(f"regions.{name}", written[name], f"one of {', '.join(known)}", close_match(name, known))
    listed = written.get("regions") or []
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ConfigError("regions", listed, "a list of regions")
    regions = [reader.region(f"regions[{index}]", value) for index, value in enumerate(listed)]
    if written.get("grid") is not None:
        share = reader.number("regions.overlap", written.get("overlap", overlap), 0, min(size), int)
        regions = [*reader.grid("regions.grid", written["grid"], share), *regions]
    background = written.get("background")
    solid = [region.box for region in regions if region.mode == "blend" or region.feather == 0]
    hole = uncovered(size, solid)
    if background is None and hole is not None and prompt:
        background = prompt
    if background not in (None, False, ""):
        regions = [reader.region("regions.background", background, whole(size), mask_type="constant"), *regions]
    elif hole is not None:
        place = f"{hole.left},{hole.top} to {hole.right},{hole.bottom}"
        raise ConfigError(
            "regions", f"nothing for pixels {place}", "regions that cover the canvas", "Or give a prompt as background."
        )
    return Regions(
        size=size,
        factor=factor,
        main=(prompt, negative_prompt),
        regions=tuple(regions),
        rerolls=_rerolls(reader, regions, [*rerolls, *more_rerolls]),
    )


def _rerolls(reader: Reader, regions: Sequence[Region], listed: Sequence[Any]) -> tuple[Reroll, ...]:
    own = [
        Reroll(reader.latent(r.box), r.seed)
        if r.epsilon is None
        else Reroll(reader.latent(r.box), r.seed, "epsilon", r.epsilon)
        for r in regions
        if r.seed is not None
    ]
    return (*own, *(reader.reroll(f"reroll[{index}]", value) for index, value in enumerate(listed)))


def from_config(config: DictConfig) -> Regions:
    """The regions of a resolved config, none if it has none."""
    written = config.regions
    if OmegaConf.is_config(written):
        written = OmegaConf.to_container(written, resolve=True)
    size, factor = Size(config.height, config.width), config.model.vae_scale_factor
    rerolls = OmegaConf.to_container(config.reroll, resolve=True)
    assert isinstance(rerolls, list)
    common: dict[str, Any] = {
        "size": size,
        "factor": factor,
        "prompt": config.prompt or "",
        "negative_prompt": config.negative_prompt,
        "rerolls": rerolls,
    }
    if not written:
        reader = Reader(size, factor, {})
        found = _rerolls(reader, (), rerolls)
        return Regions(
            size=size, factor=factor, main=(common["prompt"], config.negative_prompt), regions=(), rerolls=found
        )
    return parse(written, overlap=config.denoise.overlap, **common)
