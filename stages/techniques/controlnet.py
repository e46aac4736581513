"""``model.controlnets``: ControlNets (arXiv 2302.05543) in a denoiser's own pass of blocks. No torch before one.

A ControlNet is a child of the network that it steers: its weights are laid out, planned and streamed with the others,
and a pass of the one begins with a pass of the other, which leaves what is added to a UNet's skip connections or to a
transformer's blocks. What it is shown is cut from its picture where a tile lies on the canvas; a transformer's is shown
the guide's latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError, on_gpu
from stages.families.controlnets import CONDITION, NETWORKS, SCALE, steer
from stages.families.facts import facts_of
from stages.hashes import file_hash, fingerprint
from stages.paths import files_of
from stages.techniques.base import Technique
from stages.techniques.controls import KEY, Control, check, controls
from stages.tiles import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stages.context import StageContext
    from stages.memory.rows import Window
    from stages.picture.picture import Picture
    from stages.tiles import Tile

_APART = {  # what cuts or runs a UNet in a way that leaves no place for them
    "technique.step_cache.interval": (1, "What is deep is left out of a pass, and with it what they add there."),
    "technique.compile": ("none", "A pass with them is made of several networks."),
    "device_map": (None, "What they add would lie on another GPU than what it is added to."),
}
_OPENING = 32_000_000  # bytes: strips of a picture of ours on their way to a file


class ControlNets(Technique):
    """Those of the canvas. Any number; what they add is added up."""

    name = "controlnets"
    keys = (KEY,)
    whole = frozenset({"ControlNetConditioningEmbedding"})  # its activations are pictures
    parks = False  # what waits in host memory cannot be added to
    stages: tuple[str, ...] = ("denoise", "profile")

    @classmethod
    def of(cls, config: DictConfig) -> Technique | None:
        own = [one for one in controls(config) if cls.takes(one)] if config.model.controlnets else []
        return cls(own, config) if own else None

    def __init__(self, given: Sequence[Control], config: DictConfig) -> None:
        self._given, self._config = tuple(given), config
        self._always = on_gpu(config)  # there units run in the order of a whole pass
        self._pictures: list[Picture] = []
        self._latents: Window | None = None  # of the guide, in place of pictures
        self._acting = [True] * len(given)
        self._canvas = Size(0, 0)

    @staticmethod
    def takes(one: Control) -> bool:
        """Whether it has a part."""
        return True

    @classmethod
    def check(cls, config: DictConfig) -> None:
        given = controls(config)
        if not given:
            return
        facts = facts_of(config)
        wanted = NETWORKS.get(facts.classes[facts.denoiser])
        if wanted is None:
            hint = f"Those here are of {', '.join(NETWORKS)}."
            raise ConfigError(KEY, [one.path for one in given], "none for this model", hint)
        for one in given:
            check(one, wanted)
        if not facts.unet:
            _check_latents(config, given)
        if config.guide.mode == "none" and (of_guide := [one.path for one in given if one.image is None]):
            hint = "With guide.mode=none there is no guide: give it an image: FILE."
            raise ConfigError(f"{KEY} ({of_guide[0]})", "guide: true", "an image", hint)
        for key, (off, why) in _APART.items():
            if (value := OmegaConf.select(config, key)) not in (off, None):
                raise ConfigError(key, value, f"{off} with {KEY}", why)
        if (way := config.technique.offload) not in ("stream", "none"):
            raise ConfigError("technique.offload", way, f"stream or none with {KEY}", "Hooks know one network.")
        if config.technique.linfusion.path and config.technique.linfusion.scope == "canvas":
            hint = "Tiles that stand still would keep what was added to them."
            raise ConfigError("technique.linfusion.scope", "canvas", f"tile with {KEY}", hint)

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {KEY: [self._identity(one, cache) for one in self._given]}

    def packed(self, cache: Path) -> Mapping[str, Any]:
        return {KEY: [_network(one, cache) for one in self._given]}

    def _identity(self, one: Control, cache: Path) -> dict[str, Any]:
        shown = "guide"
        if one.image is not None:
            shown = f"{file_hash(Path(one.image), cache)} {self._config.guide.fit}"
        own = {"scale": one.scale, "start": one.start, "end": one.end}
        return {"network": _network(one, cache), "image": shown, **own}

    def touches(self, stage: str) -> bool:
        return stage in self.stages

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(one.path for one in self._given)

    # -- the network --------------------------------------------------------------------------------------------

    def on_model(self, network: nn.Module, component: str) -> None:
        steer(network)

    # -- what it is shown ---------------------------------------------------------------------------------------

    def opening(self, canvas: Size) -> int:
        if not facts_of(self._config).unet:
            return 0
        from stages.picture.opening import check_whole, opening_bytes

        found, unit, fit = [0], self._config.model.vae_scale_factor, self._config.guide.fit
        for one in self._given:
            image = self._file(one)
            if image is None or (one.image is None and self._config.guide.phases):  # after the first: one of ours
                found.append(_OPENING)
            if image is None:
                continue
            try:
                check_whole(image, canvas, fit, unit)
                found.append(opening_bytes(image, canvas, fit, unit))
            except ConfigError as error:
                raise error.under(f"{KEY} (image)") from error
        return max(found)

    def prepare(self, context: StageContext, canvas: Size, folder: Path) -> None:
        self._canvas = canvas
        if not facts_of(self._config).unet:
            from stages.memory.rows import Rows, Window

            self._latents = Window(Rows.open(context.inputs["guide"] / "latents.safetensors"))
            return
        self._pictures = [self._picture(one, number, context, folder) for number, one in enumerate(self._given)]

    def _file(self, one: Control) -> Path | None:
        """The person's picture; None for one of ours."""
        if one.image is None and not self._config.guide.image:
            return None
        return Path(one.image or self._config.guide.image)

    def _picture(self, one: Control, number: int, context: StageContext, folder: Path) -> Picture:
        from stages.memory.rows import Rows
        from stages.picture.opening import open_picture
        from stages.picture.picture import Picture

        config, unit = self._config, self._config.model.vae_scale_factor
        file = folder / f"control_{number}.safetensors"
        pixels = Size(self._canvas.height * unit, self._canvas.width * unit)
        image = self._file(one)
        if image is None:
            folder = context.inputs["guide"]
            if (enlarged := folder / "enlarged.safetensors").is_file():
                return Picture(Rows.open(enlarged, "pixels"))
            image = next(path for path in (folder / "previous.png", folder / "lowres.png") if path.is_file())
            return open_picture(image, file, pixels, "stretch", unit)

        def note(text: str) -> None:
            context.progress.note(text.replace("guide.image", f"{KEY} (image)", 1))

        try:
            return open_picture(
                image, file, pixels, config.guide.fit, unit, note if one.image else context.progress.note
            )
        except ConfigError as error:
            raise error.under(f"{KEY} (image)") from error

    def begin(self, step: int, steps: int, folder: Path) -> None:
        self._acting = [one.at(step, steps) for one in self._given]

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        import torch

        sample = next(iter(inputs.values()))
        for number, one in enumerate(self._given):
            if not (self._acting[number] or self._always):
                continue
            inputs[CONDITION.format(number)] = self._shown(number, batch).to(sample.device, sample.dtype)
            scale = one.scale if self._acting[number] else 0.0
            inputs[SCALE.format(number)] = torch.tensor(scale, device=sample.device)

    def _shown(self, number: int, batch: Any) -> torch.Tensor:
        """``[N, 3, 8h, 8w]`` float32 in [0, 1], what lies under each tile; for a transformer its ``[N, C, h, w]``."""
        import torch

        if not facts_of(self._config).unet:
            if self._latents is None or batch.samples.is_meta:
                return torch.empty_like(batch.samples)
            return torch.stack([self._latents.box(*tile[2:]) for tile in batch.tiles])
        unit = self._config.model.vae_scale_factor
        count, _, height, width = batch.samples.shape
        found = torch.empty((count, 3, height * unit, width * unit), device=batch.samples.device)
        if found.is_meta:
            return found
        pictures: Sequence[Tile | None] = batch.pictures or (None,) * count
        for index, (tile, picture) in enumerate(zip(batch.tiles, pictures, strict=True)):
            if index and (tile, picture) == (batch.tiles[index - 1], pictures[index - 1]):  # the other half of a pair
                found[index] = found[index - 1]
            else:
                found[index] = self._crop(self._pictures[number], tile, picture, unit)
        return found

    def _crop(self, picture: Picture, tile: Tile, within: Tile | None, unit: int) -> torch.Tensor:
        """``[3, 8h, 8w]``; ``within``: the part of the canvas that shows all of it, where several do."""
        import numpy as np
        import torch

        whole, place = (within.size, tile.within(within)) if within else (self._canvas, tile)
        across, down = picture.width / whole.width, picture.height / whole.height
        region = (place.left * across, place.top * down, place.right * across, place.bottom * down)
        pixels = np.array(picture.cut(region, (tile.size.width * unit, tile.size.height * unit), alone=True))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


class LowresControlNets(ControlNets):
    """Those of the low-res picture: there is no guide yet."""

    name = "lowres_controlnets"
    stages = ("lowres",)

    @staticmethod
    def takes(one: Control) -> bool:
        return one.image is not None

    @classmethod
    def check(cls, config: DictConfig) -> None:
        """They are those that ``ControlNets`` has checked."""


def _check_latents(config: DictConfig, given: Sequence[Control]) -> None:
    """A transformer's are shown latents: those of the guide."""
    if of_image := [one for one in given if one.image is not None]:
        hint = "It would have to be encoded; give it as guide.image with guide: true."
        raise ConfigError(f"{KEY} (image of {Path(of_image[0].path).name})", of_image[0].image, "guide: true", hint)
    if config.denoise.dilated.enabled:
        hint = "A part of a canvas of several has no latents of the guide."
        raise ConfigError("denoise.dilated.enabled", True, f"false with {KEY} of a transformer", hint)


def _network(one: Control, cache: Path) -> str:
    return fingerprint({file.name: file_hash(file, cache) for file in files_of(Path(one.path))})
