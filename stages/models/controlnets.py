"""ControlNets: a folder of diffusers, or one file in its names or in the original layout. Nothing is loaded.

One file says nothing of its network, which is that of the UNet that it steers unless a ``config.json`` lies beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stages.config import ConfigError
from stages.families.controlnets import NETWORKS
from stages.memory.imports import light_imports
from stages.memory.tensors import read_header
from stages.models.component import Component, construct, renamed
from stages.models.locate import described_beside, lone_weights
from stages.models.scales import with_scales
from stages.models.single_file import relocate
from stages.techniques.controls import KEY

CLASS = "ControlNetModel"  # of UNets
_ORIGINAL = "control_model."  # before the names of the original layout, in files of everything
# what a ControlNet has to share with the denoiser: inputs, and the shapes of what it adds to; the classes' own defaults
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "ControlNetModel": {
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 1280,
        "in_channels": 4,
        "addition_embed_type": None,
        "encoder_hid_dim_type": None,
        "class_embed_type": None,
        "num_class_embeds": None,
    },
    "FluxControlNetModel": {
        "in_channels": 64,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    },
    "SD3ControlNetModel": {
        "patch_size": 2,
        "in_channels": 16,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "pooled_projection_dim": 2048,
    },
}
_FOREIGN = {
    **dict.fromkeys(
        ("task_embedding", "control_add_embedding"),
        "a union of ControlNets, which asks for numbers of conditions that are not understood here",
    ),
    "lora_controlnet": "a Control-LoRA, which is no network of its own",
    "ctrl_to_base": "a ControlNet-XS, which is woven into its UNet",
}


def controlnets(
    paths: Sequence[str], denoiser: Mapping[str, Any], vae: Mapping[str, Any], factor: int
) -> tuple[Component, ...]:
    """Those at ``paths``, for one denoiser; see :func:`controlnet`.

    Raises:
        ConfigError: what they add cannot be added up.
    """
    found = tuple(controlnet(Path(path), denoiser, vae, factor) for path in paths)
    depths = [{name: one.config.get(name) for name in ("num_layers", "num_single_layers")} for one in found]
    if any(depth != depths[0] for depth in depths):
        raise ConfigError(KEY, depths, "networks of one depth", "What each adds is for other blocks.")
    return found


def controlnet(path: Path, denoiser: Mapping[str, Any], vae: Mapping[str, Any], factor: int = 8) -> Component:
    """The ControlNet at ``path``, for a denoiser and a VAE with these configs, of ``factor`` pixels a latent.

    Raises:
        ConfigError: it is of another model, or asks for inputs that are not known here.
        CheckpointError: its files cannot be used.
    """
    kind = NETWORKS[denoiser["_class_name"]]
    own, refs = described_beside(path, kind), with_scales(read_header(lone_weights(path)))
    for mark, what in _FOREIGN.items():
        if any(mark in name for name in refs):
            raise ConfigError(KEY, f"{path}, {what}", f"a {kind}")
    if own is None and "UNet" not in denoiser["_class_name"]:
        hint = "One file does not say how many blocks it has: put the config.json of its folder beside it."
        raise ConfigError(KEY, str(path), f"a file beside the config.json of a {kind}", hint)
    config = {"_class_name": kind, **(as_unet(denoiser) if own is None else own)}
    if why := refuse(config, denoiser, factor):
        trait, *said = why
        raise ConfigError(f"{KEY} ({path.name}: {trait})", *said)
    original = refs.keys() & {f"{_ORIGINAL}time_embed.0.weight", "time_embed.0.weight"}
    tensors = relocate(refs, partial(_converted, config=config), path) if original else refs
    tensors = renamed(construct(kind, config), tensors)
    shift = 0.0
    if kind.startswith("SD3") and config.get("force_zeros_for_pooled_projection", True):  # latents as encoded, scaled
        shift = (vae.get("shift_factor") or 0.0) * vae.get("scaling_factor", 1.0)
    name = f"controlnet {path.name}"
    return Component(name=name, class_name=kind, config=config, tensors=tensors, condition_shift=shift)


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


def refuse(config: Mapping[str, Any], denoiser: Mapping[str, Any], factor: int) -> tuple[str, Any, str, str] | None:
    """(trait, got, expected, hint): why a ControlNet cannot steer the denoiser."""
    kind = config["_class_name"]
    for name, usual in _SHARED[kind].items():
        got, wanted = (_plain(name, one.get(name, usual)) for one in (config, denoiser))
        if got != wanted:
            return name, got, f"{wanted!r}, as the denoiser has it", "It was made for another model."
    if kind != CLASS:
        return _refuse_transformer(config, denoiser)
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


def _refuse_transformer(config: Mapping[str, Any], denoiser: Mapping[str, Any]) -> tuple[str, Any, str, str] | None:
    if config.get("num_mode") is not None:
        hint = "Of a union of ControlNets each kind of condition has a number, which is not understood here."
        return "num_mode", config["num_mode"], "None", hint
    if config.get("guidance_embeds") and not denoiser.get("guidance_embeds"):
        return "guidance_embeds", True, "False, as the denoiser has it", "It was made for another model."
    for name, without in (("conditioning_embedding_channels", None), ("extra_conditioning_channels", 0)):
        if config.get(name, without) != without:
            return name, config[name], str(without), "It is shown the guide's latents, and nothing else."
    wanted, got = (
        denoiser.get("joint_attention_dim"),
        config.get("joint_attention_dim", denoiser["joint_attention_dim"]),
    )
    if got not in (None, wanted):
        return "joint_attention_dim", got, f"{wanted}, as the denoiser has it", "It was made for another model."
    return None


def _plain(name: str, value: Any) -> Any:
    """One number for all levels, where they may be told by one."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if name != "block_out_channels" and value.count(value[0]) == len(value) else list(value)
