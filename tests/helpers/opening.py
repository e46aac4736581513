"""Components of the tiny checkpoints, built and opened as the stages do, with plans as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stages.families.sd import FAMILY
from stages.memory.layout import Layout
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component
from stages.models.loading import Built, Streamer, build, open_model
from stages.plans import ModelPlan
from stages.techniques.channels_last import ChannelsLast


def built(component: Component, dtype: torch.dtype = torch.float32, *, channels_last: bool = True) -> Built:
    """As ``models.loading.build`` with the blocks of Stable Diffusion."""
    techniques = (ChannelsLast(),) if channels_last else ()
    return build(component, dtype=dtype, blocks=FAMILY.blocks(component.name), techniques=techniques)


@contextmanager
def opened(
    component: Component, dtype: torch.dtype, plan: Mapping[str, Any], *, channels_last: bool = True, **more: Any
) -> Iterator[Streamer]:
    """As ``models.loading.open_model``; ``plan`` has the fields of ``ModelPlan``."""
    techniques = (ChannelsLast(),) if channels_last else ()
    blocks = FAMILY.blocks(component.name)
    with open_model(
        component, dtype=dtype, blocks=blocks, techniques=techniques, plan=ModelPlan.of(plan), **more
    ) as streamer:
        yield streamer


def laid_out(component: Component, dtype: torch.dtype = torch.float32, *, channels_last: bool = True) -> Layout:
    """How a component's weights are packed."""
    return built(component, dtype, channels_last=channels_last).layout


@contextmanager
def opened_vae(checkpoint: Path) -> Iterator[Any]:
    """The whole VAE of a folder, float32, resident; no gradients."""
    component = Checkpoint.open(str(checkpoint)).component("vae")
    with opened(component, torch.float32, {}) as streamer:
        yield streamer.model
