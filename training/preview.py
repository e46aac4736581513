"""Contact sheets of rendered scenes: ``python -m training.preview OUT.png [--zoom Z] [--setting NAME] [--seed N]``."""

import argparse
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from .scenes import View, render
from .specs import SETTINGS, SUBJECTS, TIMES, WEATHERS, sample_spec


def sheet(pictures: torch.Tensor, columns: int, path: Path) -> None:
    """Write pictures ``[N,3,H,W]`` in [-1,1] as one PNG, row by row."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    out = torch.zeros(3, rows * height, columns * width)
    for i, picture in enumerate(pictures.float().cpu()):
        r, c = divmod(i, columns)
        out[:, r * height : (r + 1) * height, c * width : (c + 1) * width] = picture
    _write_png(((out + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous(), path)


def _write_png(pixels: torch.Tensor, path: Path) -> None:
    """Write ``[H,W,3]`` bytes as a PNG (filter 0): the training machine need not have an image library."""
    height, width, _ = pixels.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.view(height, -1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.numpy().tobytes(), 6)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def main() -> None:
    """Render a sheet of random scenes, some categories held fixed if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--zoom", type=float, default=1.0)
    parser.add_argument("--at", type=float, nargs=2, default=(0.5, 0.5))
    parser.add_argument("--seed", type=int, default=0)
    for name, values in (
        ("setting", SETTINGS),
        ("subject", SUBJECTS),
        ("time", TIMES),
        ("weather", WEATHERS),
        ("body", None),
        ("backdrop", None),
    ):
        parser.add_argument(f"--{name}", choices=values)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pictures = []
    for i in range(args.count):
        fixed = {
            k: v
            for k in ("setting", "subject", "time", "weather", "body", "backdrop")
            if (v := getattr(args, k)) is not None
        }
        spec = sample_spec(rng)
        while fixed.get("setting") and spec.setting != fixed["setting"]:
            spec = sample_spec(rng)
        spec = replace(spec, **fixed)
        view = View(
            centre_x=torch.tensor([args.at[0]]),
            centre_y=torch.tensor([args.at[1]]),
            zoom=torch.tensor([args.zoom]),
            max_zoom=args.zoom,
            size=args.size,
        )
        pictures.append(render(spec, torch.tensor([args.seed * 1000 + i]), torch.tensor([rng.randrange(8)]), view)[0])
    sheet(torch.cat(pictures), args.columns, args.out)


if __name__ == "__main__":
    main()
