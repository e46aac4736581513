"""The names that the original Stable Diffusion files give to the tensors that diffusers names otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Spec(NamedTuple):
    """One tensor of a diffusers folder: ``component/name``, from which its numbers are drawn, and its shape."""

    name: str
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """One tensor of a file: its name and shape there, and the specs whose numbers fill it one after the other."""

    name: str
    shape: tuple[int, ...]
    specs: tuple[Spec, ...]


_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_projection.weight", "text_projection"),
)


def entries_of(kind: str, specs: Mapping[str, list[Spec]], configs: Mapping[str, dict[str, Any]]) -> list[Entry]:
    """The tensors of a single file with the components ``unet``, ``vae`` and ``text_encoder``, or of a ControlNet."""
    if "controlnet" in specs:
        per_block = configs["controlnet"]["layers_per_block"] + 1
        return _named(specs["controlnet"], "control_model.", lambda name: controlnet_name(name, per_block))
    per_block = configs["unet"]["layers_per_block"] + 1
    types = configs["unet"]["up_block_types"]
    levels = len(configs["vae"]["block_out_channels"])
    entries = _named(specs["unet"], "model.diffusion_model.", lambda name: unet_name(name, per_block, types))
    entries += [_as_conv(e) for e in _named(specs["vae"], "first_stage_model.", lambda name: vae_name(name, levels))]
    if kind == "sdxl":
        text = "conditioner.embedders.0.transformer."
        entries += _named(specs["text_encoder"], text, lambda name: name)
        return entries + open_clip(specs["text_encoder_2"], "conditioner.embedders.1.model.")
    if kind == "sd15":
        text = "cond_stage_model.transformer."
        entries += _named(specs["text_encoder"], text, lambda name: name)
        ids = (1, configs["text_encoder"]["max_position_embeddings"])
        position_ids = "text_model.embeddings.position_ids"
        return [*entries, Entry(text + position_ids, ids, (Spec(position_ids, ids),))]
    config, prefix = configs["text_encoder"], "cond_stage_model.model."
    entries += open_clip(specs["text_encoder"], prefix)
    last = f"resblocks.{config['num_hidden_layers'] - 1}."
    unused = [
        entry._replace(name=entry.name.replace(last, f"resblocks.{config['num_hidden_layers']}."))
        for entry in entries
        if entry.name.startswith(prefix) and last in entry.name
    ]
    projection = Spec("text_encoder/text_projection", (config["hidden_size"], config["hidden_size"]))
    return [*entries, *unused, Entry(prefix + "text_projection", projection.shape, (projection,))]


def unet_name(name: str, per_block: int, up_block_types: list[str]) -> str:
    """``down_blocks.0.resnets.1.conv1.weight`` -> ``input_blocks.2.0.in_layers.2.weight``."""
    module, _, last = name.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{last}"
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, j, *inner = rest
        block = f"middle_block.{2 * int(j) if kind == 'resnets' else 1}"
    else:
        i, kind, j, *inner = rest
        first = int(i) * per_block
        if kind == "downsamplers":
            return f"input_blocks.{first + per_block}.0.op.{last}"
        if kind == "upsamplers":
            place = 2 if "CrossAttn" in up_block_types[int(i)] else 1
            return f"output_blocks.{first + per_block - 1}.{place}.conv.{last}"
        number = f"input_blocks.{first + int(j) + 1}" if part == "down_blocks" else f"output_blocks.{first + int(j)}"
        block = f"{number}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        return f"{block}.{_RESNET['.'.join(inner[:-1])]}.{last}"
    return f"{block}.{'.'.join(inner)}"


def controlnet_name(name: str, per_block: int) -> str:
    """``controlnet_down_blocks.3.weight`` -> ``zero_convs.3.0.weight``; what it shares with a UNet as there."""
    part, *rest, last = name.split(".")
    if part == "controlnet_cond_embedding":
        place = {"conv_in": 0, "conv_out": 14}.get(rest[0])
        return f"input_hint_block.{2 * int(rest[-1]) + 2 if place is None else place}.{last}"
    if part == "controlnet_down_blocks":
        return f"zero_convs.{rest[0]}.0.{last}"
    return f"middle_block_out.0.{last}" if part == "controlnet_mid_block" else unet_name(name, per_block, [])


def vae_name(name: str, levels: int) -> str:
    """``decoder.up_blocks.0.resnets.2.conv1.weight`` -> ``decoder.up.3.block.2.conv1.weight`` (of four levels)."""
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name).replace("resnets", "block")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    head, attention, tail = name.partition("mid_block.attentions.0.")
    if attention:
        module, _, last = tail.rpartition(".")
        return f"{head}mid.attn_1.{_ATTENTION[module]}.{last}"
    return name


def open_clip(specs: list[Spec], prefix: str) -> list[Entry]:
    """OpenCLIP's names: query, key and value in one tensor."""

    def name_of(name: str) -> str:
        for ours, theirs in _OPEN_CLIP:
            name = name.replace(ours, theirs)
        return name

    by_name = {spec.name: spec for spec in specs}
    entries: list[Entry] = []
    for spec in specs:
        name = spec.name.partition("/")[2]
        if "q_proj" in name:
            parts = tuple(by_name[spec.name.replace("q_proj", f"{x}_proj")] for x in "qkv")
            fused = name_of(name).replace("q_proj.", "in_proj_")
            entries.append(Entry(prefix + fused, (3 * spec.shape[0], *spec.shape[1:]), parts))
        elif "k_proj" not in name and "v_proj" not in name:
            shape = spec.shape[::-1] if "text_projection" in name else spec.shape  # which it multiplies from the right
            entries.append(Entry(prefix + name_of(name), shape, (spec,)))
    return entries


def _named(specs: list[Spec], prefix: str, rename: Callable[[str], str]) -> list[Entry]:
    return [Entry(prefix + rename(spec.name.partition("/")[2]), spec.shape, (spec,)) for spec in specs]


def _as_conv(entry: Entry) -> Entry:
    """The original VAE's attention is made of 1x1 convolutions."""
    if ".attn_1." in entry.name and len(entry.shape) == 2:
        return entry._replace(shape=(*entry.shape, 1, 1))
    return entry
