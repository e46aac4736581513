"""The canvas' noise: drawn once, on the CPU, from one seed; rectangles of it can be drawn again from another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stages.canvas.regions import Reroll
from stages.canvas.tiles import Size

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


def reroll(noise: Tensor, rerolls: Sequence[Reroll]) -> Tensor:
    """Draw rectangles of ``noise [1, C, H, W]`` float32 again, in order and in place; all else stays bit-identical.

    Raises:
        ValueError: a box that is not on the canvas, an unknown mode, an epsilon outside [0, 1].
    """
    size = Size(noise.shape[-2], noise.shape[-1])
    for index, (box, seed, mode, epsilon) in enumerate(rerolls):
        if not (0 <= box.top < box.bottom <= size.height and 0 <= box.left < box.right <= size.width):
            raise ValueError(f"reroll[{index}].box: got {tuple(box[2:])}, expected a box in {size} latents.")
        if mode not in ("reset", "epsilon") or not 0 <= epsilon <= 1:
            raise ValueError(
                f"reroll[{index}]: got mode {mode!r}, epsilon {epsilon}; expected reset or epsilon, and 0..1."
            )
        fresh = draw((*noise.shape[:2], *box.size), torch.Generator().manual_seed(seed))
        target = noise[box.index]
        if mode == "reset":
            target.copy_(fresh)
        else:
            target.mul_((1 - epsilon**2) ** 0.5).add_(fresh, alpha=epsilon)
    return noise


def canvas_noise(
    size: Size, channels: int, seed: int, rerolls: Sequence[Reroll] = ()
) -> tuple[Tensor, torch.Generator]:
    """The canvas' noise ``[1, C, H, W]`` float32, and the generator as the draw left it (for ancestral schedulers)."""
    generator = torch.Generator().manual_seed(seed)
    return reroll(draw((1, channels, *size), generator), rerolls), generator
