"""Exact decode and encode of a canvas: the two directions of ``ExactPass``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stages.files import atomic_path
from stages.memory.finite import refuse_absurd, refuse_not_finite
from stages.memory.planner import Cut, Line
from stages.memory.rows import Rows
from stages.tiles import Size
from stages.vae.exact import ExactPass
from stages.vae.exact_program import Shape, program, shapes
from stages.vae.exact_size import cost, disk_bytes, working_bytes
from stages.vae.tiled import factor, from_vae, to_uint8, to_vae

PIXELS = "pixels.u8"
Direction = Literal["decode", "encode"]


def given_shape(vae: Any, direction: Direction, size: Size) -> Shape:
    """What goes in for a canvas of ``size`` latents."""
    if direction == "decode":
        return Shape(vae.config.latent_channels, size)
    return Shape(vae.config.in_channels, Size(size.height * factor(vae), size.width * factor(vae)))


def exact_disk_bytes(vae: Any, direction: Direction, size: Size, itemsize: int) -> int:
    """The most scratch space that a canvas of ``size`` latents takes, decoded pixels included; any device."""
    layers, given = program(vae, direction), given_shape(vae, direction, size)
    pixels = 3 * size.height * size.width * factor(vae) ** 2 if direction == "decode" else 0
    return pixels + disk_bytes(layers, shapes(layers, given), itemsize)


def exact_cut(vae: Any, direction: Direction, size: Size, itemsize: int) -> Cut:
    """The pass as the planner's cut of a model, a unit a layer; any device."""
    layers, given = program(vae, direction), given_shape(vae, direction, size)
    found = shapes(layers, given)
    weights = {
        layer.name: sum(parameter.numel() for owner in layer.owners for parameter in owner.parameters()) * itemsize
        for layer in layers
    }
    # weights are held beside the ring, and repacked by the convolution
    lines = (
        Line(
            unit=layer.name,
            fixed=weights[layer.name] + working_bytes(layer, found, itemsize),
            slope=0,
            workspace=weights[layer.name],
        )
        for layer in layers
    )
    return Cut(
        limit=max(weights.values()),
        order=tuple(layer.name for layer in layers),
        nbytes=weights,
        flops={layer.name: int(2 * cost(layer, found)) for layer in layers},
        lines=tuple(lines),
    )


def exact_decode(vae: Any, rows: Callable[[int, int], Tensor], size: Size, folder: Path, **options: Any) -> Rows:
    """Decode a canvas as the whole-image decode would.

    Args:
        vae: stock ``AutoencoderKL``.
        rows: gives rows ``[top, bottom)`` of the denoiser's latents, ``[1, C, h, W]``.
        size: of the canvas in latents.
        folder: scratch, ``exact_disk_bytes`` large; also keeps what is needed to go on after a kill.
        options: of ``ExactPass``: ``working_bytes``, ``hold``, ``mark``, ``advance``, ``device``.

    Returns:
        The pixels, uint8, in a file of ``folder``: ``box`` reads a tile of them. The caller removes it; until then
        another call gives the same file at once.
    """
    options.setdefault("dtype", vae.dtype)
    scale = factor(vae)
    shape = Shape(vae.config.out_channels, Size(size.height * scale, size.width * scale))
    done = folder / PIXELS
    if done.is_file() and done.stat().st_size == shape.numel:
        return Rows.scratch(done, shape.axes, torch.uint8)
    steps = ExactPass(program(vae, "decode"), given_shape(vae, "decode", size), folder, **options)
    with atomic_path(done) as temporary:
        pixels = Rows.scratch(temporary, shape.axes, torch.uint8)

        def read(top: int, bottom: int) -> Tensor:
            latents = rows(top, bottom)
            refuse_absurd(latents, f"rows {top} to {bottom} of the canvas")
            return to_vae(vae, latents)

        def put_pixels(top: int, strip: Tensor) -> None:
            refuse_not_finite(strip, f"row {top}: pixels of the VAE's decoder")
            pixels.write(top, to_uint8(strip))

        steps.run(read, put_pixels)
    steps.clear()
    return Rows.scratch(done, shape.axes, torch.uint8)


def exact_encode(
    vae: Any,
    rows: Callable[[int, int], Tensor],
    size: Size,
    folder: Path,
    put: Callable[[int, Tensor], None],
    **options: Any,
) -> None:
    """Encode a canvas as the whole-image encode would, to the posterior's mode.

    Args:
        vae: stock ``AutoencoderKL``.
        rows: gives pixel rows ``[top, bottom)``, ``[1, 3, h, W]`` in [-1, 1].
        size: of the canvas in latents.
        folder, options: as for ``exact_decode``.
        put: gets the latents in the denoiser's space: first row, ``[1, C, h, W]`` float32.
    """
    channels = vae.config.latent_channels
    options.setdefault("dtype", vae.dtype)
    steps = ExactPass(program(vae, "encode"), given_shape(vae, "encode", size), folder, **options)

    def put_latents(top: int, moments: Tensor) -> None:
        latents = from_vae(vae, moments[:, :channels]).cpu()
        refuse_not_finite(latents, f"row {top}: latents of the VAE's encoder")
        put(top, latents)

    steps.run(rows, put_latents)
    steps.clear()
