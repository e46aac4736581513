"""``<lora:NAME:0.8>`` in a prompt, as AUTOMATIC1111 writes it: the file joins ``model.loras``. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError, close_match
from stages.documents import escape_all
from stages.paths import anchored, is_safetensors
from stages.regions.config import Regions
from stages.techniques.lora_file import KEY, strengths

_TAG = re.compile(r"<(?:lora|lyco):([^<>:]+)(?::([^<>]*))?>")
_DIR = "model.lora_dir"


def complete(config: DictConfig) -> None:
    """Make the paths of ``model.loras`` absolute, and add what the prompt names, which is taken out of it.

    Raises:
        ConfigError: no such file, or no number.
    """
    found = [{"path": str(anchored(one.path, near=True)), "scale": one.scale} for one in strengths(config)]
    if config.model.lora_dir is not None:
        folder = anchored(config.model.lora_dir, near=True)
        if not folder.is_dir():
            raise ConfigError(_DIR, str(folder), "a folder with .safetensors files of adapters")
        config.model.lora_dir = escape_all(str(folder))
    tags = _TAG.findall(config.prompt or "")
    for name, scale in tags:
        found.append({"path": str(_file(config, name.strip())), "scale": _scale(name, scale)})
    if tags:
        config.prompt = escape_all(re.sub(r" {2,}", " ", _TAG.sub("", config.prompt)).strip())
    OmegaConf.update(config, KEY, escape_all(found), merge=False)


def refuse_elsewhere(regions: Regions) -> None:
    """An adapter changes the whole model: a part of the picture has none of its own."""
    texts = [regions.main[1], *(text for region in regions.regions for text in (region.prompt, region.negative_prompt))]
    for text in texts:
        if tag := _TAG.search(text):
            hint = f"An adapter changes the whole picture: write it in prompt, or in {KEY}."
            raise ConfigError("negative_prompt or regions", tag[0], "a text without it", hint)


def _scale(name: str, text: str) -> float:
    try:
        return float(text or 1)
    except ValueError:
        hint = "Both the denoiser and the text encoders get the same." if ":" in text else ""
        raise ConfigError(f"prompt (<lora:{name}:...>)", text, "one number, such as 0.8", hint) from None


def _file(config: DictConfig, name: str) -> Path:
    if config.model.lora_dir is None:
        hint = f"Or name the file: {KEY}=[FILE:0.8]"
        raise ConfigError("prompt", f"<lora:{name}:...>", f"{_DIR}=FOLDER with it", hint)
    files = [path for path in sorted(Path(config.model.lora_dir).rglob("*")) if is_safetensors(path.name)]
    own = [path for path in files if name in (path.stem, path.name)]
    if not own:
        near = close_match(name, [path.stem for path in files])
        expected = f"the name of a .safetensors file in {config.model.lora_dir}"
        raise ConfigError("prompt", f"<lora:{name}:...>", expected, near)
    return own[0]
