"""Exact decode and encode of a canvas: the two directions of ``ExactPass``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.canvas.exact import ExactPass
from stages.canvas.exact_program import Shape, disk_bytes, program
from stages.canvas.spill import Spill
from stages.canvas.tiles import Size
from stages.canvas.vae import factor, from_vae, to_uint8, to_vae
from stages.workflow.store import atomic_path

PIXELS = "pixels.u8"


def exact_disk_bytes(vae: Any, size: Size, itemsize: int) -> int:
    """The most scratch space that ``exact_decode`` of ``size`` latents takes, the pixels included; any device."""
    pixels = 3 * size.height * size.width * factor(vae) ** 2
    return pixels + disk_bytes(program(vae, "decode"), Shape(vae.config.latent_channels, size), itemsize)


def exact_decode(vae: Any, latents: Tensor, folder: Path, **options: Any) -> Spill:
    """Decode a canvas as the whole-image decode would.

    Args:
        vae: stock ``AutoencoderKL``.
        latents: ``[1, C, H, W]`` of the denoiser.
        folder: scratch, ``exact_disk_bytes`` large; also keeps what is needed to go on after a kill.
        options: of ``ExactPass``: ``working_bytes``, ``hold``, ``mark``, ``advance``, ``device``.

    Returns:
        The pixels, uint8, in a file of ``folder``: ``box`` reads a tile of them. The caller removes it; until then
        another call gives the same file at once.
    """
    size, scale = Size(*latents.shape[-2:]), factor(vae)
    options.setdefault("dtype", vae.dtype)
    shape = Shape(vae.config.out_channels, Size(size.height * scale, size.width * scale))
    done = folder / PIXELS
    if done.is_file() and done.stat().st_size == shape.numel:
        return Spill(done, shape, torch.uint8)
    steps = ExactPass(program(vae, "decode"), Shape(latents.shape[1], size), folder, **options)

    def rows(top: int, bottom: int) -> Tensor:
        return to_vae(vae, latents[:, :, top:bottom])

    with atomic_path(done) as temporary:
        pixels = Spill(temporary, shape, torch.uint8)
        steps.run(rows, lambda top, strip: pixels.put(top, to_uint8(strip)))
        pixels.close()
    steps.clear()
    return Spill(done, shape, torch.uint8)


def exact_encode(vae: Any, rows: Callable[[int, int], Tensor], size: Size, folder: Path, **options: Any) -> Tensor:
    """Encode a canvas as the whole-image encode would, to the posterior's mode.

    Args:
        vae: stock ``AutoencoderKL``.
        rows: gives pixel rows ``[top, bottom)``, ``[1, 3, h, W]`` in [-1, 1].
        size: of the canvas in latents.
        folder, options: as for ``exact_decode``.

    Returns:
        ``[1, C, H, W]`` float32, in the denoiser's space.
    """
    scale, channels = factor(vae), vae.config.latent_channels
    latents = torch.empty((1, channels, *size))
    options.setdefault("dtype", vae.dtype)
    given = Shape(vae.config.in_channels, Size(size.height * scale, size.width * scale))

    def sink(top: int, moments: Tensor) -> None:
        latents[:, :, top : top + moments.shape[2]] = from_vae(vae, moments[:, :channels]).cpu()

    steps = ExactPass(program(vae, "encode"), given, folder, **options)
    steps.run(rows, sink)
    steps.clear()
    return latents
