"""Where the time of the full-size Stable Diffusion VAE goes, and what rolling saves: processor seconds in one process.

    python -m benchmarks vae_cost                                # decode and encode, float32
    python -m benchmarks vae_cost --directions decode --rows 16

A tile with its halo, as ``decode.mode=independent`` (44x44 latents in float32) and the guide (48x48) have them, and the
first ``--rows`` rows of latents of a rolling pass over a canvas 2048 pixels wide. 'A needed pixel': what tiles compute
twice is counted, for a canvas of 2048x2048. Shares are of the tile's own time, by operation (torch.profiler).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._measure import checkpoint, finish, parser, table
from stages.tiles import Size, Tile, grid
from stages.vae.exact_program import program
from stages.vae.exact_vae import Direction, given_shape
from stages.vae.rolling import RollingPass
from stages.vae.rolling_vae import small_statistics
from stages.vae.tiled import HALO, decode_tile, encode_tile, guide_tiles

SIDE = 256  # latents of the canvas
TILES = {"decode": grid(Size(SIDE, SIDE), Size(28, 28), 4), "encode": guide_tiles(Size(SIDE, SIDE), 32)}
KINDS = {  # operations of torch.profiler
    "convolutions": ("mkldnn_convolution", "convolution_overrideable"),
    "norms": ("native_batch_norm", "native_group_norm"),
    "SiLU": ("silu", "silu_"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "addmm", "bmm"),
    "enlarging": ("upsample_nearest2d", "_upsample_nearest_exact2d"),
    "sums and copies": ("add", "add_", "copy_", "clone", "cat", "constant_pad_nd", "div", "div_"),
}


def shares(call: Callable[[], Any]) -> dict[str, float]:
    """Share of the time of ``call`` by kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in found.key_averages()}
    total = sum(spent.values())
    return {kind: sum(spent.get(name, 0) for name in names) / total for kind, names in KINDS.items()}


def seconds(call: Callable[[], Any]) -> float:
    """Of the processor, all threads, the system's part too."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def given(vae: Any, direction: Direction, size: Size) -> torch.Tensor:
    """Something to decode or encode."""
    channels, inside = given_shape(vae, direction, size)
    return torch.rand((1, channels, *inside), generator=torch.Generator().manual_seed(0)) * 2 - 1


def measured(vae: Any, direction: Direction, rows: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Processor seconds a megapixel, in tiles and rolling, and the shares of a tile."""
    tiles, size = TILES[direction], Size(SIDE, SIDE)
    crops = [tile.grown(HALO, size).size for tile in tiles]
    side = max(crop.height for crop in crops)
    crop, run = given(vae, direction, Size(side, side)), decode_tile if direction == "decode" else encode_tile

    def tile() -> None:
        run(vae, crop, Tile(0, 0, 0, 0, side, side))

    with tempfile.TemporaryDirectory() as folder:
        statistics = small_statistics(vae, direction, given(vae, direction, Size(16, 16)), Path(folder) / "scratch")
    names, whole = {module: name for name, module in vae.named_modules()}, Size(rows, SIDE)
    shape, canvas = given_shape(vae, direction, whole), given(vae, direction, whole)
    steps = RollingPass(program(vae, direction), shape, statistics, names, dtype=torch.float32)

    def roll() -> None:
        for _ in steps.rows(lambda top, bottom: canvas[:, :, top:bottom]):
            pass

    found = shares(tile)
    again = sum(one.height * one.width for one in crops) / (SIDE * SIDE)
    row = {"direction": direction, "again": again}
    row["tiles"] = seconds(tile) / (side * side * 64e-6) * again
    row["rolling"] = seconds(roll) / (rows * SIDE * 64e-6)
    return row, found


@torch.inference_mode()
def main() -> int:
    options = parser(__doc__)
    options.add_argument("--directions", default="decode,encode")
    options.add_argument("--rows", type=int, default=24, help="of latents that roll")
    asked = options.parse_args()
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(checkpoint(asked.checkpoint) / "vae", torch_dtype=torch.float32)
    vae = vae.eval().to(memory_format=torch.channels_last)
    directions: list[Direction] = ["decode", "encode"]
    found = [measured(vae, one, asked.rows) for one in directions if one in asked.directions.split(",")]
    rows = [row for row, _ in found]
    head = ("", "pixels computed for one", "CPU-s a megapixel, tiles", "rolling", "ratio")
    figures = [(r["again"], r["tiles"], r["rolling"], r["rolling"] / r["tiles"]) for r in rows]
    table(head, [(r["direction"], *(f"{n:.2f}" for n in line)) for r, line in zip(rows, figures, strict=True)])
    table(("of a tile", *KINDS), [(r["direction"], *(f"{share:.1%}" for share in s.values())) for r, s in found])
    checks = {f"{r['direction']}: rolling at most 0.6x of tiles": r["rolling"] <= 0.6 * r["tiles"] for r in rows}
    return finish("vae_cost", [{**row, "shares": share} for row, share in found], checks)


if __name__ == "__main__":
    sys.exit(main())
