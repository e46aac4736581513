"""More layers for a trained UNet, which begins as it was: new layers are identities until they learn.

A skip connection lies behind every layer on the way down and is read by one on the way up. New layers come last on the
way down, where what they give is what the last one gave, and second on the way up, where they are the first to read it:
each of the others reads what it read.
"""

import re
from collections.abc import Collection
from typing import Any

import torch


def _layers(unet: Any) -> list[int]:
    """Layers of its blocks on the way down."""
    given = unet.config.layers_per_block
    return [given] * len(unet.down_blocks) if isinstance(given, int) else list(given)


def deeper_names(trained: Any, deep: Any) -> dict[str, str]:
    """Where the weights of ``trained``, a UNet2DConditionModel, belong in ``deep``, by name: it has as many blocks, and
    as many layers in each or more. ValueError where it has fewer."""
    few, many = _layers(trained), _layers(deep)
    if len(few) != len(many) or any(had > has for had, has in zip(few, many, strict=True)):
        raise ValueError(f"layers of the UNet: got {few}, expected {many} or fewer in as many blocks")
    more = [has - had for had, has in zip(few, many, strict=True)]

    def moved(found: re.Match[str]) -> str:
        block, kind, layer = int(found[1]), found[2], int(found[3])
        return f"up_blocks.{block}.{kind}.{layer + more[-1 - block] if layer else 0}."

    up = re.compile(r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
    return {name: up.sub(moved, name) for name in trained.state_dict()}


@torch.no_grad()
def begin_as_identities(unet: Any, known: Collection[str]) -> None:
    """Make identities of all layers of ``unet`` whose weights are not in ``known``: a residual block adds nothing to
    the hidden states, which come before the skip connection, and a transformer nothing to what it gets."""
    layers = {".".join(name.split(".")[:4]) for name in known}
    for name, module in unet.named_modules():
        if name in layers:
            continue
        if re.fullmatch(r"(down|up)_blocks\.\d+\.resnets\.\d+", name):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                torch.nn.init.dirac_(module.conv_shortcut.weight)
                module.conv_shortcut.bias.zero_()
        elif re.fullmatch(r"(down|up)_blocks\.\d+\.attentions\.\d+", name):
            module.proj_out.weight.zero_()
            module.proj_out.bias.zero_()
