"""ControlNets of UNets: a folder of diffusers, or one file in its names or in the original layout. Nothing is loaded.

One file says nothing of its network, which is that of the UNet that it steers unless a ``config.json`` lies beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stages.config import ConfigError
from stages.memory.imports import light_imports
from stages.memory.tensors import read_header
from stages.models.component import Component, construct, renamed
from stages.models.locate import described_beside, lone_weights
from stages.models.scales import with_scales
from stages.models.single_file import relocate
from stages.techniques.controls import CLASS, KEY

_ORIGINAL = "control_model."  # before the names of the original layout, in files of everything
# what a ControlNet has to share with its UNet: the shapes of skip connections, and inputs; the class's own defaults
_SHARED: Mapping[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "in_channels": 4,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_FOREIGN = {
    **dict.fromkeys(
        ("task_embedding", "control_add_embedding"),
        "a union of ControlNets, which asks for numbers of conditions that are not understood here",
    ),
    "lora_controlnet": "a Control-LoRA, which is no network of its own",
    "ctrl_to_base": "a ControlNet-XS, which is woven into its UNet",
}


def controlnet(path: Path, unet: Mapping[str, Any], factor: int) -> Component:
    """The ControlNet at ``path``, for a UNet with this config whose latents have ``factor`` pixels a side.

    Raises:
        ConfigError: it is of another model, or asks for inputs that are not known here.
        CheckpointError: its files cannot be used.
    """
    own, refs = described_beside(path, CLASS), with_scales(read_header(lone_weights(path)))
    for mark, what in _FOREIGN.items():
        if any(mark in name for name in refs):
            raise ConfigError(KEY, f"{path}, {what}", f"a {CLASS}")
    config = {"_class_name": CLASS, **(as_unet(unet) if own is None else own)}
    if why := refuse(config, unet, factor):
        trait, *said = why
        raise ConfigError(f"{KEY} ({path.name}: {trait})", *said)
    original = refs.keys() & {f"{_ORIGINAL}time_embed.0.weight", "time_embed.0.weight"}
    tensors = relocate(refs, partial(_converted, config=config), path) if original else refs
    tensors = renamed(construct(CLASS, config), tensors)
    return Component(name=f"controlnet {path.name}", class_name=CLASS, config=config, tensors=tensors)


def _converted(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    bare = {name.removeprefix(_ORIGINAL): tensor for name, tensor in tensors.items()}
    found = convert_controlnet_checkpoint(bare, config)
    if missing := [name for name, tensor in found.items() if tensor is None]:
        raise KeyError(missing[0])
    return found


def as_unet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config that ``ControlNetModel.from_unet`` gives."""
    with light_imports("diffusers"):
        from diffusers import ControlNetModel

    names = set(inspect.signature(ControlNetModel.__init__).parameters) - {"self"}
    return {name: value for name, value in unet.items() if name in names}


def refuse(config: Mapping[str, Any], unet: Mapping[str, Any], factor: int) -> tuple[str, Any, str, str] | None:
    """(trait, got, expected, hint): why a ControlNet cannot steer the UNet."""
    for name, usual in _SHARED.items():
        got, wanted = (_plain(name, one.get(name, usual)) for one in (config, unet))
        if got != wanted:
            return name, got, f"{wanted!r}, as the UNet has it", "It was made for another model."
    if (channels := config.get("conditioning_channels", 3)) != 3:
        return "conditioning_channels", channels, "3: a picture in colours", ""
    levels = config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    if 2 ** (len(levels) - 1) != factor:
        expected = f"as many as make a picture {factor} times smaller"
        return "conditioning_embedding_out_channels", list(levels), expected, ""
    if config.get("global_pool_conditions"):
        hint = "It steers the half of guidance with the prompt alone."
        return "global_pool_conditions", True, "False", hint
    return None


def _plain(name: str, value: Any) -> Any:
    """One number for all levels, where they may be told by one."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if name != "block_out_channels" and value.count(value[0]) == len(value) else list(value)
