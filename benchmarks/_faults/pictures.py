"""A person's pictures of all kinds and sizes: the guide shows what Pillow shows of them, or they are refused."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks._faults.common import Bench, Tally, last, picture, unclear, within_budget

SHOWN, REFUSED = "shown", "refused"
_SIZES = ((1, 1), (1, 500), (500, 1), (7, 9), (128, 96), (129, 97), (1000, 100), (3000, 2200), (2600, 1900))
_CLOSE = 4.0  # of 255: mean difference from what Pillow makes of it at once


def _png(width: int, height: int, compressed: bytes) -> bytes:
    """A PNG that claims to have so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def cases(folder: Path) -> Iterator[tuple[Path, str]]:
    """Pictures, written as they are asked for, and what is to come of each."""

    def save(image: Image.Image, name: str, **options: Any) -> Path:
        path = folder / name
        image.save(path, **options)
        return path

    plain = picture(300, 220)
    deep = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    yield save(deep, "deep.png"), SHOWN
    for mode in ("RGB", "RGBA", "L", "LA", "P"):
        yield save(plain.convert(mode), f"{mode}.png"), SHOWN
    yield save(plain.convert("L").point([0] * 100 + [255] * 156).convert("1"), "1.png"), SHOWN
    for mode in ("RGB", "L", "CMYK"):
        yield save(plain.convert(mode), f"{mode}.jpg", quality=95), SHOWN
        yield save(plain.convert(mode), f"{mode}.tiff"), SHOWN
    yield save(plain, "progressive.jpg", quality=95, progressive=True), SHOWN
    yield save(plain, "rgb.bmp"), SHOWN
    yield save(plain.convert("P"), "p.gif"), SHOWN
    yield save(plain, "rgb.webp", lossless=True), SHOWN
    yield save(plain, "rgb.ppm"), SHOWN
    yield save(plain, "packed.tiff", compression="tiff_lzw"), SHOWN
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 300).astype(np.uint8), (220, 1))))
    yield save(clear, "clear.png"), SHOWN
    yield save(clear, "clear.webp", lossless=True), SHOWN
    hidden = np.asarray(plain.convert("RGBA")).copy()
    hidden[:, 150:] = (255, 0, 0, 0)
    yield save(Image.fromarray(hidden), "hidden.png"), SHOWN
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield save(plain, f"turned{orientation}.jpg", exif=exif, quality=95), SHOWN
    for width, height in _SIZES:
        yield save(picture(width, height), f"{width}x{height}.png"), SHOWN
    yield save(picture(4000, 3000), "large.jpg", quality=95), SHOWN
    values = np.asarray(plain.convert("L")).astype(np.float32)
    yield save(Image.fromarray(values / 255), "float.tiff"), SHOWN
    yield save(Image.fromarray(values), "float255.tiff"), REFUSED
    yield save(Image.fromarray(values * np.nan), "nan.tiff"), REFUSED
    yield save(Image.fromarray(values.astype(np.int32)), "signed.tiff"), REFUSED
    for name in ("RGB.png", "RGB.jpg", "rgb.webp", "packed.tiff", "p.gif", "progressive.jpg"):
        content = (folder / name).read_bytes()
        (folder / f"torn-{name}").write_bytes(content[: len(content) // 2])
        yield folder / f"torn-{name}", REFUSED
    for name, content in (
        ("empty.png", b""),
        ("text.png", b"a cat"),
        ("bomb.png", _png(60_000, 60_000, zlib.compress(bytes(1 << 20)))),
        ("claims.png", _png(16_000, 16_000, zlib.compress(bytes(100)))),
        ("nothing.png", _png(0, 0, zlib.compress(b""))),
        ("garbage.png", _png(300, 200, b"\x00" * 999)),
    ):
        (folder / name).write_bytes(content)
        yield folder / name, REFUSED


def expected(path: Path, width: int, height: int) -> np.ndarray:
    """``[height, width, 3]``: turned, on white, its middle in the canvas' shape."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            grey = np.asarray(image).astype(np.float64)
            image = Image.fromarray(np.rint(grey * (255 if image.mode == "F" else 1 / 257)).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    scale = max(height / image.height, width / image.width)
    size = (min(image.width, round(width / scale)) or 1, min(image.height, round(height / scale)) or 1)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    cropped = image.crop((left, top, left + size[0], top + size[1]))
    return np.asarray(cropped.resize((width, height), Image.Resampling.LANCZOS)).astype(float)


def run(bench: Bench) -> Tally:
    tally = Tally("user pictures")
    output = bench.scratch / "out"
    folder = bench.cwd(output)
    every = list(cases(folder))
    for path, outcome in bench.random.sample(every, bench.tries or len(every)):
        tally.tries += 1
        done = bench.run(output, f"guide.image={path}", "stage=guide", "force=true")
        if done.timed_out:
            tally.fault("stuck", f"{path.name}: {last(done)}")
            continue
        if done.code:
            why = unclear(done) or ("" if outcome == REFUSED else "it is a picture")
            if why:
                tally.fault("unclear", f"{path.name}: {why}: {last(done)}")
            continue
        within_budget(tally, output, path.name)
        if outcome == REFUSED:
            tally.fault("wrong picture", f"{path.name}: shown")
            continue
        with Image.open(output / "x" / "guide" / "lowres.png") as shown:
            got = np.asarray(shown.convert("RGB")).astype(float)
        difference = float(np.abs(got - expected(path, got.shape[1], got.shape[0])).mean())
        if difference > _CLOSE:
            tally.fault("wrong picture", f"{path.name}: {difference:.1f} of 255 from what Pillow shows")
    return tally
