"""``technique.dtype``: what weights and activations are, of all components or of one (``technique.dtype.vae=fp32``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stages.config import dtype_of_component
from stages.families.facts import facts_of

if TYPE_CHECKING:
    import torch

TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_name(config: DictConfig, component: str) -> str:
    """fp32 | bf16 | fp16: the dtype that ``component`` computes in, without torch.

    What overflows in fp16 computes in bf16, unless the config says fp16 of that very component.
    """
    found, own = dtype_of_component(config, component), config.technique.component_dtype.get(component)
    return "bf16" if found == "fp16" and not own and component in facts_of(config).overflows else found


def dtype_names(config: DictConfig, components: Iterable[str]) -> str | dict[str, str]:
    """Of several components: one name where they agree, else {component: name}."""
    names = {component: dtype_name(config, component) for component in components if component != "scheduler"}
    found = set(names.values())
    return found.pop() if len(found) == 1 else names


def dtype_of(config: DictConfig, component: str) -> torch.dtype:
    """The dtype that ``component`` computes in."""
    import torch

    return getattr(torch, TORCH[dtype_name(config, component)])
