"""Pillow's picture of a file, with limits of ours: what its header says, no pixel is decoded. No torch."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, PngImagePlugin

from stages.config import ConfigError

PIXELS = 1 << 28  # of a picture that is opened: 16384x16384
TEXT = 8 << 20  # bytes of a text chunk of a PNG; workflows of other programs take more than Pillow's one megabyte


@contextmanager
def opened(path: Path, key: str = "guide.image") -> Iterator[Image.Image]:
    """The picture in ``path``, which ``key`` names.

    Raises:
        ConfigError: it is none, is broken or has more than ``PIXELS``.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ConfigError(key, str(path), "a file with a picture")
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, TEXT
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > PIXELS:
                size = f"{path} with {picture.width}x{picture.height} pixels"
                raise ConfigError(key, size, f"at most {PIXELS} pixels", "Make it smaller first.")
            yield picture
    except ConfigError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ConfigError(key, str(path), "a picture that can be read", f"It says: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits
