"""A person's own picture, opened with Pillow as 8-bit RGB. What it takes is known before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from stages.config import ConfigError


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """ConfigError for what Pillow says of files that are no pictures, broken, or of more than 178 million pixels."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError("guide.image", str(path), "a picture that Pillow can read", f"It says: {error}") from error


def opening_bytes(path: Path) -> int:
    """What ``open_picture`` takes: four bytes a pixel, twice where the picture is turned or converted."""
    with _readable(path), Image.open(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return picture.width * picture.height * (8 if turned or picture.mode != "RGB" else 4)


def open_picture(path: Path) -> Image.Image:
    """The user's picture as 8-bit RGB, turned as its EXIF says. ConfigError if it is none."""
    with _readable(path):
        picture = Image.open(path)
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I"):  # 16 bits; Pillow would cut off what is above 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
