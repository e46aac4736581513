"""Autoencoders: where they may be cut, and their calls on meta, which the looks of ``guide`` and ``decode`` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from stages.families.looking import Looking, StageLook
from stages.families.opening import DECODER, ENCODER
from stages.memory.planner import Cut, ModelProfile, joined
from stages.memory.units import Blocks
from stages.models.loading import Built
from stages.techniques.dtype import dtype_of
from stages.tiles import Size
from stages.vae.exact_vae import Direction, exact_cut, exact_disk_bytes
from stages.vae.rolling_vae import rolling_cut

EXACT_FILES = 8_000_000  # bytes: what strips take on their way to and from files, measured (tests/integration)
# Bytes by which huge pages round up the rows that a rolling pass keeps of every layer, measured (the default run, with
# GLIBC_TUNABLES=glibc.malloc.hugetlb=0 and without).
HUGE_PAGES = 20_000_000
Call = Callable[[Any, int], Any]
VAE = Blocks(classes=frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D", "Attention"}))


def refuse_vae(vae: Mapping[str, Any], expected: str = "AutoencoderKL") -> str | None:
    """Why an autoencoder's config cannot be used."""
    if vae.get("_class_name") != expected:
        return f"vae: got a {vae.get('_class_name')}, expected an {expected}."
    for name, least in (("scaling_factor", 1e-3), ("shift_factor", 0.0)):
        value = vae.get(name)
        if value is not None and not (isinstance(value, int | float) and least <= abs(value) <= 1e3):
            return f"vae: got {name}={value!r:.40}, expected a number whose size is {least:g} to 1000."
    return None


def decode_call(config: DictConfig, latents: Size) -> Call:
    """Decode one crop of so many latents."""
    shape = (1, config.model.latent_channels, *latents)
    return lambda vae, _: vae.decode(
        torch.empty(shape, dtype=dtype_of(config, "vae"), device="meta"), return_dict=False
    )


def encode_call(config: DictConfig, pixels: Size) -> Call:
    """Encode one crop of so many pixels."""
    shape = (1, 3, *pixels)
    return lambda vae, _: vae.encode(
        torch.empty(shape, dtype=dtype_of(config, "vae"), device="meta"), return_dict=False
    )


def keys_bytes(looking: Looking, tokens: int) -> int:
    """Bytes of the keys and values that the tiles of ``shared`` attend to."""
    vae = looking.network_config("vae")
    channels = max((vae.get("decoder_block_out_channels") or [0])[-1], vae["block_out_channels"][-1])
    return 2 * tokens * channels * dtype_of(looking.config, "vae").itemsize


def exact_look(looking: Looking, stage: str, passes: Sequence[tuple[Direction, Size]]) -> StageLook:
    """Of exact passes one after the other, each over a canvas of so many latents."""
    drop = () if len(passes) > 1 else {"decode": ENCODER, "encode": DECODER}[passes[0][0]]
    built = looking.built("vae", stage, drop)
    itemsize = built.layout.dtype.itemsize
    cuts = [exact_cut(built.network, direction, size, itemsize) for direction, size in passes]
    disk = max(exact_disk_bytes(built.network, direction, size, itemsize) for direction, size in passes)
    profile = ModelProfile(
        component="vae",
        weights=sum(sum(cut.nbytes.values()) for cut in cuts),
        micro_batch=1,
        micro_batches=1,
        steps=1,
        cuts=(joined(cuts),),
        ordered=False,
    )
    return StageLook((profile,), extra=EXACT_FILES, disk=disk)


def rolling_look(looking: Looking, built: Built, passes: Sequence[tuple[Direction, Size]], side: int) -> StageLook:
    """Of rolling passes one after the other, each over a canvas of so many latents, with statistics of ``side``."""
    itemsize = built.layout.dtype.itemsize
    cuts, used = zip(*(rolling_cut(built.network, *one, side, itemsize) for one in passes), strict=True)
    most = max(used)
    profile = ModelProfile(
        component="vae",
        weights=sum(sum(cut.nbytes.values()) for cut in cuts),
        micro_batch=1,
        micro_batches=most,
        steps=1,
        cuts=(joined([_shared_out(cut, count / most) for cut, count in zip(cuts, used, strict=True)]),),
        ordered=False,
    )
    return StageLook((profile,), extra=EXACT_FILES + HUGE_PAGES + keys_bytes(looking, side * side))


def _shared_out(cut: Cut, share: float) -> Cut:
    """Of the micro-batches that are counted it sees this share."""
    return replace(cut, flops={name: int(count * share) for name, count in cut.flops.items()})
