"""Seams: decode mode x overlap, border gradients and distance from the whole decode; or the seams of a finished run.

    python -m benchmarks seams RUN                    # the seams of outputs/RUN: denoise and decode tiles, heat maps
    python -m benchmarks seams RUN --table            # decode its canvas again in every mode, overlap 0, 8, 16 latents
    python -m benchmarks seams RUN --table --crop 96  # of the canvas' middle only (latents)

``ratio`` is the mean step across borders, over that elsewhere. ``/ whole`` divides it by the whole decode's, where no
tile ends: 1 is no seam, whatever the picture shows there. ``phase / whole`` does the same against the lines near the
borders that lie between two latents too. The whole decode needs memory for the whole picture: crop what does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stages.documents import load
from stages.files import atomic_path, write_json
from stages.picture import seam_map, seams
from stages.picture.tile_strips import TileStrips
from stages.tiles import Size, Tile, latent_grid

OVERLAPS = (0, 8, 16)  # latents


def decoded(vae: Any, latents: Any, tiles: list[Tile], mode: str, halo: int, folder: Path) -> Iterator[np.ndarray]:
    """The picture that the decode stage would make with this mode and grid, in strips."""
    from safetensors.torch import save_file

    from stages.memory.rows import Rows
    from stages.vae.exact_vae import exact_decode
    from stages.vae.tiled import decoded_tiles, decoder_statistics, factor, to_uint8

    scale = factor(vae)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        canvas = Rows.create(Path(work) / "canvas", latents.shape[1:])
        canvas.write(0, latents)
        if mode == "exact":
            size = Size(*latents.shape[-2:])
            pixels = exact_decode(vae, lambda top, bottom: latents[:, :, top:bottom], size, Path(work) / "scratch")
            parts = ((tile, pixels.box(*tile.scaled(scale)[2:])[0]) for tile in tiles)
        else:
            side = max(max(tile.size) for tile in tiles) + 2 * halo
            shared = decoder_statistics(vae, canvas, side) if mode == "shared" else None
            parts = ((tile, to_uint8(part)) for tile, part in decoded_tiles(vae, canvas, tiles, halo, shared))
        for tile, part in parts:
            save_file({"pixels": part.contiguous()}, Path(work) / f"{tile.name}.safetensors")
        yield from TileStrips(Path(work), [tile.scaled(scale) for tile in tiles])


def compare(run: Path, crop: int | None, modes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a mode and overlap (latents): ratios, PSNR against the whole decode, seconds."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    from stages.vae.tiled import decode_tile, factor, to_uint8

    config = load(run / "config.yaml")
    vae: Any = AutoencoderKL.from_pretrained(config.model.path, subfolder="vae", torch_dtype=torch.float32).eval()
    latents = load_file(run / "denoise" / "canvas.safetensors")["latents"]
    if crop:
        top, left = ((length - min(crop, length)) // 2 for length in latents.shape[-2:])
        latents = latents[..., top : top + crop, left : left + crop].contiguous()
    size, scale, rows = Size(*latents.shape[-2:]), factor(vae), []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        whole = to_uint8(decode_tile(vae, latents, Tile(0, 0, 0, 0, *size)))[0].permute(1, 2, 0).numpy()
        for mode in modes:
            for overlap in OVERLAPS:
                tile = max(config.decode.tile_size, 2 * overlap * scale)
                tiles = latent_grid(size.width * scale, size.height * scale, tile, overlap * scale, scale)
                start = time.perf_counter()
                halo = config.decode.halo // scale
                picture = np.concatenate(list(decoded(vae, latents, tiles, mode, halo, Path(folder))))
                seconds = time.perf_counter() - start
                report = seams.measure([picture], [t.scaled(scale) for t in tiles])
                reference = seams.measure([whole], [t.scaled(scale) for t in tiles])
                rows.append(
                    {
                        "mode": mode,
                        "overlap": overlap,
                        "ratio": round(report.ratio, 4),
                        "over_whole": round(report.ratio / reference.ratio, 4),
                        "lattice_over_whole": round(report.lattice_ratio / reference.lattice_ratio, 4),
                        "psnr_db": round(seams.psnr([picture], [whole]), 2),
                        "seconds": round(seconds, 1),
                    }
                )
                print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    return rows


def judge(run: Path) -> dict[str, Any]:
    """The seams of a finished picture along its denoise tiles and its decode tiles; heat maps beside it."""
    config, found = load(run / "config.yaml"), {}
    factor = config.model.vae_scale_factor
    grids = {
        node: [t.scaled(factor) for t in latent_grid(config.width, config.height, n.tile_size, n.overlap, factor)]
        for node, n in (("denoise", config.denoise), ("decode", config.decode))
    }
    for node, tiles in grids.items():
        if len(tiles) < 2:
            print(f"{node}: one tile, no border.")
            continue
        # from the tiles, not the PNG: a picture of any size is then read strip by strip
        report = seams.measure(TileStrips(run / "decode" / "tiles", grids["decode"]), tiles)
        print(
            f"{node}: ratio {report.ratio:.3f}, near the borders {report.local_ratio:.3f}\n{seam_map.table(report)}\n"
        )
        with atomic_path(run / f"seams_{node}.png") as temporary:
            temporary.write_bytes(seam_map.heat_map(report))
        found[node] = {"ratio": report.ratio, "local_ratio": report.local_ratio, "lattice_ratio": report.lattice_ratio}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="name of a run, or its folder")
    parser.add_argument("--table", action="store_true", help="decode the canvas again in every mode")
    parser.add_argument("--crop", type=int, help="latents a side of the part that the table decodes")
    parser.add_argument("--modes", default="independent,shared,exact", help="that the table decodes in")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    given = parser.parse_args()
    run = given.run if given.run.is_dir() else Path("outputs") / given.run
    needed = run / ("denoise/canvas.safetensors" if given.table else "decode/tiles")
    if not needed.exists():
        sys.exit(f"seams: {needed} is missing. Make it: python runner.py run={run.name} prompt=...")
    if given.table:
        print("| mode | overlap | ratio | / whole | phase / whole | PSNR dB | s |")
        print("|---|---|---|---|---|---|---|")
    figures: Any = compare(run, given.crop, given.modes.split(",")) if given.table else judge(run)
    if given.json:
        write_json(given.json, figures)
    else:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
