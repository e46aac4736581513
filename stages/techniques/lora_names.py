"""Names of modules in files of adapters, to those of the stock networks that they are for. No torch before it is asked.

A trainer names what it adds by the module's place, dots or underscores between: such names are looked up as they are.
Those of the original layouts are renamed: of UNets by diffusers' own functions, which work on names alone; of
transformers by a table of the families, as diffusers' functions multiply weights, which would have to be in memory,
and are written for one width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from stages.families.adapters import ORIGINALS

_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # as diffusers once named them


def flat(name: str) -> str:
    """As kohya's trainer writes it."""
    return name.replace(".", "_")


def targets(
    names: Collection[str], class_name: str, config: Mapping[str, Any], modules: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """{name in a file: the modules, in order, whose rows the delta has}, of those that a network has.

    Args:
        names: without what stands before them for a component.
        config: of the network.
        modules: those of the network that have a weight.
    """
    known = {flat(module): module for module in modules}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        plain = flat(name).replace("_processor_", "_")
        ways = [plain, f"{plain}_0", f"text_model_{plain}", plain.removeprefix("text_model_")]
        ways += [re.sub(rf"_self_attn_{old}$", f"_self_attn_{new}", way) for old, new in _CLIP.items() for way in ways]
        own = next((known[way] for way in ways if way in known), None)
        found[name] = (own,) if own else _original(plain, ORIGINALS.get(class_name, {}), known)
    if class_name.startswith("UNet"):
        rest = [name for name, own in found.items() if not own]
        found |= {name: (known[way],) for name, way in _ldm(rest, config).items() if way in known}
    return {name: own for name, own in found.items() if own}


def _original(plain: str, table: Mapping[str, tuple[str, ...]], known: Mapping[str, str]) -> tuple[str, ...]:
    number = re.search(r"_(\d+)_", plain)
    pattern = plain.replace(number[0], "_#_", 1) if number else plain
    begin, *ends = table.get(pattern) or table.get(plain) or ("",)
    own = [flat((begin + end).replace("#", number[1] if number else "")) for end in ends]
    return tuple(known[name] for name in own) if all(name in known for name in own) else ()


def _ldm(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Of a UNet in its original layout: {name: the stock name, flat}."""
    from diffusers.loaders import lora_conversion_utils

    ending, found = ".lora_down.weight", {}
    keys: dict[str, Any] = {f"lora_unet_{flat(name)}{ending}": name for name in names}
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):  # a number for each level: no original layout counts so
        return {}
    try:
        described = SimpleNamespace(layers_per_block=layers)
        keys = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(keys, described)
    except (ValueError, IndexError):  # names of another layout
        return {}
    for key, name in keys.items():
        stock = lora_conversion_utils._convert_unet_lora_key(key)
        stock = re.sub(r"[._]lora\.down\.weight$", "", stock).replace(".processor", "")
        found[name] = flat(f"{stock}.0" if stock.endswith("to_out") else stock)
    return found
