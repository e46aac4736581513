"""``model.controlnets``: which ControlNets steer the denoiser, by what picture, how much and when. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError
from stages.files import read_json
from stages.paths import PICKLES, anchored, is_hub_id, is_safetensors

KEY = "model.controlnets"
EXPECTED = "a list of {path: FOLDER or FILE, image: FILE or guide: true, scale: 1.0, start: 0.0, end: 1.0}"
_GUIDE = "guide"
_FIELDS = {"path", "image", "guide", "scale", "start", "end"}


class Control(NamedTuple):
    """One ControlNet that is asked for.

    ``image``: the picture that it is shown; None: the guide's. ``start`` and ``end`` are shares of the steps, as
    diffusers' ``control_guidance_start`` and ``control_guidance_end``.
    """

    path: str
    image: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def at(self, step: int, steps: int) -> bool:
        """Whether it acts in step number ``step`` (0 is the first) of ``steps``."""
        return step / steps >= self.start and (step + 1) / steps <= self.end

    @property
    def values(self) -> dict[str, Any]:
        """As the configuration has it."""
        shown = {_GUIDE: True} if self.image is None else {"image": self.image}
        return {"path": self.path, **shown, "scale": self.scale, "start": self.start, "end": self.end}

    @property
    def said(self) -> dict[str, Any]:
        """The same for somebody else: names of files, no paths."""
        image = None if self.image is None else Path(self.image).name
        values = self._replace(path=Path(self.path).stem, image=image).values
        return {"name": values.pop("path"), **values}


def controls(config: DictConfig) -> list[Control]:
    """What ``model.controlnets`` asks for, in order.

    Raises:
        ConfigError: no list of such entries, numbers that cannot be.
    """
    given = config.model.controlnets
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return [_control(entry) for entry in listed]


def complete(config: DictConfig) -> None:
    """Make the paths absolute.

    Raises:
        ConfigError: see :func:`controls`.
    """
    from stages.documents import escape_all

    if found := controls(config):
        paths = [{key: str(anchored(getattr(one, key), near=True)) for key in _paths(one)} for one in found]
        values = [one._replace(**own).values for one, own in zip(found, paths, strict=True)]
        OmegaConf.update(config, KEY, escape_all(values), merge=False)


def _paths(one: Control) -> list[str]:
    return [key for key in ("path", "image") if (path := getattr(one, key)) and not (key == "path" and is_hub_id(path))]


def _control(entry: Any) -> Control:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not set(entry) <= _FIELDS:
        raise ConfigError(KEY, entry, EXPECTED)
    image, guide = entry.get("image"), entry.get(_GUIDE, False)
    image, guide = (None, True) if image == _GUIDE else (image, guide)
    if not isinstance(guide, bool) or not (image is None or isinstance(image, str)) or guide == (image is not None):
        hint = f"Either image: FILE, or {_GUIDE}: true for the picture that is enlarged."
        raise ConfigError(f"{KEY} ({entry['path']})", dict(entry), EXPECTED, hint)
    scale, start, end = (_number(entry, key, usual) for key, usual in (("scale", 1.0), ("start", 0.0), ("end", 1.0)))
    if not 0 <= start < end <= 1:
        expected = "shares of the steps, 0 <= start < end <= 1"
        raise ConfigError(f"{KEY} ({entry['path']})", f"start={start:g} end={end:g}", expected)
    return Control(entry["path"], image, scale, start, end)


def _number(entry: Mapping[str, Any], key: str, usual: float) -> float:
    value = entry.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{KEY} ({key} of {entry['path']})", value, "a number, such as 0.8")
    return float(value)


def check(one: Control, wanted: str) -> None:
    """What can be known of its files without torch; ``wanted``: the class of the network.

    Raises:
        ConfigError: none of a ControlNet, of a kind that is not understood, or no picture.
    """
    path, expected = Path(one.path), "a folder with config.json and a .safetensors file, or such a file"
    if path.suffix.lower() in PICKLES:
        hint = "Unpickling runs code from the file. Take the .safetensors file of it."
        raise ConfigError(KEY, one.path, expected, hint)
    if not path.is_dir() and not (path.is_file() and is_safetensors(path.name)):
        hint = "A relative path starts in the current folder."
        if is_hub_id(one.path):
            hint = f"Get it once: hf download {one.path} --local-dir FOLDER"
        raise ConfigError(KEY, one.path, expected, hint)
    if path.is_dir():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind != wanted:
            hint = "Of a union of ControlNets each kind of condition has a number, which is not understood here."
            got = f"{one.path} with a {kind}" if kind else f"{one.path} without config.json"
            raise ConfigError(KEY, got, f"a {wanted}", hint if "Union" in str(kind) else "")
    if one.image is not None and not Path(one.image).is_file():
        hint = "A relative path starts in the current folder."
        raise ConfigError(f"{KEY} (image of {path.name})", one.image, "a picture that can be read", hint)
