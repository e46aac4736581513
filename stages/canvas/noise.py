"""The canvas' noise: drawn once, on the CPU, from one seed; rectangles of it can be drawn again from another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stages.memory.rows import Rows
from stages.regions.config import Reroll
from stages.tiles import Size

VECTOR = 16  # torch's CPU normal generator works in vectors of 16: draws of multiples of it join up bitwise


def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal float32 noise, bitwise what diffusers' ``randn_tensor`` draws from a CPU generator."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def draw_chunks(numel: int, generator: torch.Generator, chunk: int = 1 << 22) -> Iterator[Tensor]:
    """The same noise in flat pieces of at most ``chunk + 16`` elements, for a canvas that is kept in a file.

    Joined, the pieces are bitwise ``draw``'s tensor, flat: torch fills 16 elements at a time, and only the last piece
    may have a remainder (which torch fills by drawing the last 16 again).
    """
    chunk = max(VECTOR, chunk // VECTOR * VECTOR)
    while numel >= chunk + VECTOR:
        yield draw((chunk,), generator)
        numel -= chunk
    if numel:
        yield draw((numel,), generator)


def fill(rows: Rows, generator: torch.Generator, patch: int = 1) -> None:
    """Fill a canvas in a file with what ``draw`` gives of its shape, or of places of ``patch`` x ``patch`` latents as
    ``[1, C * patch**2, H / patch, W / patch]``."""
    if patch > 1:
        shape = (rows.channels * patch**2, rows.height // patch, rows.width // patch)
        places = Rows.create(rows.path.with_name(f"places-{rows.path.name}"), shape)
        fill(places, generator)
        for top, part in places.bands():
            rows.write(top * patch, torch.pixel_shuffle(part, patch))
        return places.remove()
    start = 0
    for piece in draw_chunks(math.prod(rows.shape), generator):
        rows.write_flat(start, piece)
        start += len(piece)


def reroll(noise: Rows, rerolls: Sequence[Reroll]) -> None:
    """Draw rectangles of ``noise [1, C, H, W]`` float32 again, in order and in place; all else stays bit-identical.

    Raises:
        ValueError: a box that is not on the canvas, an unknown mode, an epsilon outside [0, 1].
    """
    for index, (box, seed, mode, epsilon) in enumerate(rerolls):
        if not (0 <= box.top < box.bottom <= noise.height and 0 <= box.left < box.right <= noise.width):
            size = Size(noise.height, noise.width)
            raise ValueError(f"reroll[{index}].box: got {tuple(box[2:])}, expected a box in {size} latents.")
        if mode not in ("reset", "epsilon") or not 0 <= epsilon <= 1:
            raise ValueError(
                f"reroll[{index}]: got mode {mode!r}, epsilon {epsilon}; expected reset or epsilon, and 0..1."
            )
        fresh = Rows.create(noise.path.with_name(f"reroll-{noise.path.name}"), (noise.channels, *box.size))
        fill(fresh, torch.Generator().manual_seed(seed))
        for top, part in fresh.bands():
            rows = noise.read(box.top + top, box.top + top + part.shape[2])
            target = rows[..., box.left : box.right]
            if mode == "reset":
                target.copy_(part)
            else:
                target.mul_((1 - epsilon**2) ** 0.5).add_(part, alpha=epsilon)
            noise.write(box.top + top, rows)
        fresh.path.unlink()


def canvas_noise(
    path: Path, size: Size, channels: int, seed: int, rerolls: Sequence[Reroll] = (), patch: int = 1
) -> tuple[Rows, torch.Generator]:
    """The canvas' noise ``[1, C, H, W]`` float32 in a new file, and the generator as the draw left it.

    Ancestral schedulers draw on from it. ``patch``: see ``fill``; what is re-rolled is drawn latent by latent.
    """
    generator, noise = torch.Generator().manual_seed(seed), Rows.create(path, (channels, *size))
    fill(noise, generator, patch)
    reroll(noise, rerolls)
    return noise, generator
