"""Open the VAE, or the half of it that a stage needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from stages.models.loading import Streamer, compute_dtype, open_checkpoint, open_model

ENCODER, DECODER = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")


@contextmanager
def open_vae(
    config: DictConfig,
    *,
    plan: Mapping[str, Any],
    encoder: bool = False,
    decoder: bool = False,
    note: Callable[[str], None],
    mark: Callable[[str], None],
) -> Iterator[Streamer]:
    """The stock ``AutoencoderKL`` without the half that is not asked for; its weights as ``plan`` says."""
    unused = (() if encoder else ENCODER) + (() if decoder else DECODER)
    component = open_checkpoint(config, ("vae",), note).component("vae")
    with open_model(
        component,
        dtype=compute_dtype(config),
        channels_last=config.technique.channels_last,
        plan=plan,
        mark=mark,
        optional=tuple(f"{name}." for name in unused),
        drop=unused,
        device=config.device,
    ) as streamer:
        yield streamer
