"""Pixels of a picture's file in strips from top to bottom: by libvips where it streams, else by Pillow as a whole."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stages.config import ConfigError

SMALL = 1 << 22  # pixels of a picture that Pillow may hold as a whole
# python -m pytest tests/unit/test_opening.py measures these again
_VIPS = 20 << 20  # bytes that the library takes
_LINES = 2600  # rows that it keeps
_HELD = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}  # bytes of a pixel that Pillow holds
_TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate")
_STRIP_OF_TIFF = 4 << 20  # bytes; libvips refuses large ones


class Strips(NamedTuple):
    """``rows``: (first row, ``[h, W, 3]`` or with alpha ``[h, W, 4]`` uint8); ``shrink`` is still to be done."""

    height: int
    width: int
    shrink: int
    rows: Iterator[tuple[int, np.ndarray]]


def is_streamed(picture: Image.Image) -> bool:
    """Whether libvips reads it strip by strip, to the same colours as Pillow. Small ones do not need it."""
    kind, mode, info = picture.format, picture.mode, picture.info
    if picture.width * picture.height <= SMALL or getattr(picture, "n_frames", 1) > 1:
        return False
    if kind == "JPEG":
        return mode in ("L", "RGB")
    if kind == "PNG":
        return mode in ("L", "LA", "P", "RGB", "RGBA", "I;16") and not info.get("interlace")
    if kind == "WEBP":
        return True
    if kind == "TIFF" and mode in ("L", "RGB") and info.get("compression") in _TIFF:
        file: Any = picture
        tags, size = file.tag_v2, os.stat(file.filename).st_size
        if any(start + count > size for start, count in zip(tags.get(273, ()), tags.get(279, ()), strict=False)):
            return False  # libvips would fill up what is missing
        rows = tags.get(278, picture.height) * picture.width * sum(tags.get(258, (8,))) // 8
        plain = tags.get(262) in (1, 2) and tags.get(339, (1,))[0] == 1 and 322 not in tags and tags.get(274, 1) == 1
        return plain and (rows <= _STRIP_OF_TIFF or info["compression"] == "raw")
    return False


def decoder_bytes(picture: Image.Image, path: Path, shrink: int) -> int:
    """What decoding takes at most, strips apart; ``shrink`` as for ``strips``."""
    pixels, coded = picture.width * picture.height, path.stat().st_size
    coefficients = 0
    if picture.info.get("progressive") or picture.info.get("progression"):  # all of them are there before the first row
        layers: Any = picture
        factors = [(across, down) for _, across, down, *_ in layers.layer]
        most = max(across for across, _ in factors) * max(down for _, down in factors)
        coefficients = 2 * pixels * sum(across * down for across, down in factors) // most
    if not is_streamed(picture):
        each = 16 if picture.format == "WEBP" else _HELD.get(picture.mode, 4)
        tiff = picture.format == "TIFF"
        each *= 2 if tiff and picture.getexif().get(274, 1) != 1 else 1  # Pillow turns it itself
        each += 4 if tiff and picture.info.get("compression") != "raw" else 0  # all of it may be one strip
        return each * pixels + coefficients + (coded if tiff or picture.format == "WEBP" else 0)
    if picture.format == "WEBP":
        whole = 8.2 if shrink == 1 else 4.4 if _is_lossless_webp(path) else 0.0
        return _VIPS + coded + int(whole * pixels) + _LINES * 4 * picture.width // shrink
    each = 4 if picture.mode == "P" or "transparency" in picture.info else len(picture.getbands())
    tile: Any = picture
    deep = 2 if ";16" in str(tile.tile[0]) else 1
    mapped = coded if picture.format == "JPEG" else 0
    return _VIPS + mapped + coefficients + _LINES * each * deep * picture.width


def _is_lossless_webp(path: Path) -> bool:
    """Whether the first frame is: its decoder holds all of it."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            kind, length = struct.unpack("<4sI", head)
            if kind in (b"VP8 ", b"VP8L"):
                return kind == b"VP8L"
            file.seek(length + length % 2, 1)
    return True


def strips(picture: Image.Image, path: Path, shrink: int, places: int) -> Strips:
    """The picture in strips of about ``places`` pixels.

    Args:
        picture: opened, not loaded.
        shrink: that is wanted; a decoder may do it.

    Raises:
        OSError: a broken file.
        ConfigError: numbers that cannot be told for colours.
    """
    if is_streamed(picture):
        return _streamed(picture, path, shrink, places)
    read, height = _reader(picture), max(1, places // picture.width)

    def rows() -> Iterator[tuple[int, np.ndarray]]:
        picture.load()
        for top in range(0, picture.height, height):
            yield top, read(picture.crop((0, top, picture.width, min(top + height, picture.height))))

    return Strips(picture.height, picture.width, shrink, rows())


def _streamed(picture: Image.Image, path: Path, shrink: int, places: int) -> Strips:
    os.environ.setdefault("VIPS_CONCURRENCY", "1")  # every thread of libvips keeps rows of its own
    import pyvips

    pyvips.cache_set_max(0)
    options: dict[str, Any] = {"access": "sequential", "fail_on": "truncated"}
    try:
        if picture.format == "WEBP" and shrink > 1:
            image, shrink = pyvips.Image.webpload(str(path), scale=1 / shrink, **options), 1
        elif picture.format == "PNG":
            image = pyvips.Image.pngload(str(path), unlimited=True, **options)  # of text; its size is checked
        else:
            image = pyvips.Image.new_from_file(str(path), **options)
    except pyvips.Error as error:
        raise OSError(str(error.detail).strip() or str(error)) from error
    size, bands, wide = (image.height, image.width), image.bands, image.format == "ushort"

    def rows() -> Iterator[tuple[int, np.ndarray]]:
        region, height = pyvips.Region.new(image), max(1, places // size[1])
        for top in range(0, size[0], height):
            count = min(height, size[0] - top)
            try:
                part = np.frombuffer(region.fetch(0, top, size[1], count), np.uint16 if wide else np.uint8)
            except pyvips.Error as error:
                raise OSError(str(error.detail).strip() or str(error)) from error
            part = part.reshape(count, size[1], bands)
            part = (part >> 8).astype(np.uint8) if wide else part
            if bands < 3:
                part = np.concatenate([part[..., :1]] * 3 + [part[..., 1:]], axis=2)
            yield top, part

    return Strips(*size, shrink, rows())


def _reader(picture: Image.Image) -> Any:
    """What turns a crop of it into ``[h, w, 3]`` or ``[h, w, 4]`` uint8. ConfigError for numbers without a scale."""
    mode = picture.mode
    if mode.startswith("I"):
        shift = _bits(picture) - 8
        return lambda crop: _grey((np.asarray(crop).astype(np.uint32) >> shift).astype(np.uint8))
    if mode == "F":

        def scaled(crop: Image.Image) -> np.ndarray:
            values = np.asarray(crop)
            least, most = float(values.min()), float(values.max())
            if not (least >= 0 and most <= 1):  # NaN is in no range
                raise _no_colours(picture, f"floating-point numbers from {least:.3g} to {most:.3g}", "0 to 1")
            return _grey(np.rint(values * 255).astype(np.uint8))

        return scaled
    wanted = "RGBA" if picture.has_transparency_data else "RGB"
    if mode == "La":
        return lambda crop: np.asarray(crop.convert("LA").convert(wanted))
    return lambda crop: np.asarray(crop.convert(wanted))


def _bits(picture: Image.Image) -> int:
    """Of a grey picture of whole numbers."""
    if picture.mode != "I" or picture.format in ("PNG", "PPM"):
        return 16
    tags: Any = getattr(picture, "tag_v2", {})
    bits, kind = tags.get(258, (0,))[0], tags.get(339, (1,))[0]
    if bits not in (16, 32) or kind != 1:
        raise _no_colours(picture, "whole numbers with a sign, or of unknown range", "8, 16 or 32 bits without a sign")
    return bits


def _no_colours(picture: Image.Image, got: str, expected: str) -> ConfigError:
    name = str(getattr(picture, "filename", ""))
    return ConfigError("guide.image", f"{name} with {got}", expected, "Save it as an 8- or 16-bit picture.")


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)
