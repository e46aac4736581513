"""A person's own picture: what its file says, what opening it takes, and its pixels in a file of rows.

No more of it is kept than the canvas needs, and it is read in strips: a camera's picture takes no more memory on a
small canvas than on a large one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from stages.picture.header import TEXT, opened
from stages.picture.picture import Picture
from stages.picture.reading import decoder_bytes, is_streamed, strips
from stages.tiles import Size

_STRIP = 1 << 18  # pixels of a strip
_WORKING = 24 << 20  # bytes: strips on their way from the decoder to the file
_ENDS, _TAIL = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}, 64  # what a whole file has in its last bytes
_TURN = 1 << 21  # pixels of a strip of a picture that is turned
_FLIPS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a file says of its picture: ``size`` as it is stored, and how it is to be turned (as in EXIF, 1 to 8)."""

    path: Path
    size: Size
    orientation: int
    streamed: bool

    @property
    def shown(self) -> Size:
        """As a person sees it."""
        return Size(*self.size[::-1]) if self.orientation >= 5 else self.size

    def crop(self, canvas: Size, fit: str, unit: int) -> Size:
        """The part of it, in the middle and as shown, that the canvas gets. Shapes that agree within ``unit`` do."""
        (height, width), scale = self.shown, max(canvas.height / self.shown.height, canvas.width / self.shown.width)
        over = max(height * scale - canvas.height, width * scale - canvas.width)
        if fit == "stretch" or over < unit:
            return self.shown
        return Size(min(height, max(1, round(canvas.height / scale))), min(width, max(1, round(canvas.width / scale))))

    def kept(self, canvas: Size, fit: str, unit: int) -> Size:
        """Of what ``open_picture`` leaves."""
        step = self.shrink(canvas, fit, unit)
        height, width = self.crop(canvas, fit, unit)
        return Size(-(-height // step), -(-width // step))

    def shrink(self, canvas: Size, fit: str, unit: int) -> int:
        """How many pixels, both ways, become one while it is read: what is left is no smaller than the canvas."""
        height, width = self.crop(canvas, fit, unit)
        return max(1, min(height // canvas.height, width // canvas.width))


def look_at(path: Path) -> Seen:
    """What the file says, without its pixels. ConfigError if it is no picture."""
    with opened(path) as picture:
        return _seen(picture, path)


def _seen(picture: Image.Image, path: Path) -> Seen:
    exif = Image.Image.getexif(picture)  # a PNG's own would decode all of it first
    turn = exif.get(ExifTags.Base.Orientation) or _late_orientation(picture, path)
    if picture.format == "TIFF":  # Pillow turns it itself
        turn = 1
    return Seen(
        path=path,
        size=Size(picture.height, picture.width),
        orientation=turn if turn in range(1, 9) else 1,
        streamed=is_streamed(picture),
    )


def _late_orientation(picture: Image.Image, path: Path) -> int:
    """Of an ``eXIf`` chunk behind the pixels of a PNG; 1 if there is none."""
    if picture.format != "PNG":
        return 1
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                exif = Image.Exif()
                exif.load(file.read(min(length, TEXT)))
                return exif.get(ExifTags.Base.Orientation, 1)
            file.seek(length + 4, 1)
    return 1


def opening_bytes(path: Path, canvas: Size, fit: str, unit: int) -> int:
    """What ``open_picture`` takes at most besides the process; the arguments are its own."""
    with opened(path) as picture:
        seen = _seen(picture, path)
        return _WORKING + decoder_bytes(picture, path, seen.shrink(canvas, fit, unit))


def check_whole(path: Path, canvas: Size, fit: str, unit: int) -> None:
    """Refuse a torn picture before any work: one that does not end as its format does is read to its end.

    Raises:
        ConfigError: it cannot be.
    """
    with opened(path) as picture, path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        if _ENDS.get(picture.format or "", b"no such") not in file.read():
            for _ in strips(picture, path, _seen(picture, path).shrink(canvas, fit, unit), _STRIP).rows:
                pass


def open_picture(
    path: Path, file: Path, canvas: Size, fit: str, unit: int, note: Callable[[str], None] = lambda text: None
) -> Picture:
    """The person's picture as 8-bit RGB in a new ``file``, turned as its EXIF says, transparent parts on white.

    Args:
        path: of any kind that Pillow reads.
        canvas: pixels; the picture is shrunk by a whole number while it is read, never below the canvas.
        fit: ``crop`` to the canvas' shape, in the middle, or ``stretch``.
        unit: pixels of the canvas by which shapes may differ: of a latent.
        note: told what was done to the picture.

    Raises:
        ConfigError: no picture, a broken one, one whose numbers cannot be told for colours.
    """
    with opened(path) as image:
        seen = _seen(image, path)
        wanted, shrink, turned = seen.crop(canvas, fit, unit), seen.shrink(canvas, fit, unit), seen.orientation >= 5
        source = strips(image, path, shrink, _STRIP)
        (height, width), share = seen.size, source.height / seen.size.height
        if wanted != seen.shown:
            note(
                f"guide.image: {seen.shown.width}x{seen.shown.height}, of which {wanted.width}x{wanted.height} in the "
                "middle have the canvas' shape; guide.fit=stretch takes all of it"
            )
            height, width = wanted[::-1] if turned else wanted
        if share != 1:  # the decoder shrank it
            height, width = min(source.height, round(height * share)), min(source.width, round(width * share))
        top, left = (source.height - height) // 2, (source.width - width) // 2
        kept = file.with_name(f"stored-{file.name}") if seen.orientation > 1 else file
        step = source.shrink
        picture = Picture.create(kept, -(-width // step), -(-height // step))
        row, waiting, clear = 0, np.empty((0, width, 3), np.uint8), False
        for first, strip in source.rows:
            begin, end = max(0, top - first), min(len(strip), top + height - first)
            if begin >= end:
                continue
            part = strip[begin:end, left : left + width]
            if part.shape[2] == 4:
                clear |= bool((part[..., 3] < 255).any())
                part = _on_white(part)
            waiting = np.concatenate([waiting, part]) if len(waiting) else part
            last = first + end == top + height
            whole = len(waiting) if last else len(waiting) // step * step
            done, waiting = waiting[:whole], waiting[whole:].copy()
            if not whole:
                continue
            if step > 1:
                done = np.asarray(Image.fromarray(np.ascontiguousarray(done)).reduce(step))
            picture.pixels.write(row, torch.from_numpy(np.array(done)).permute(2, 0, 1)[None])
            row += len(done)
    if clear:
        note("guide.image: its transparent parts are shown on white")
    return picture if kept == file else _turned(picture, seen.orientation, file)


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """``[h, w, 4]`` to ``[h, w, 3]`` uint8; what is opaque stays as it is."""
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _turned(picture: Picture, orientation: int, file: Path) -> Picture:
    """The picture as EXIF says that it is to be shown, in a new file; the other one goes."""
    height, width = (picture.width, picture.height)[::-1] if orientation < 5 else (picture.width, picture.height)
    found, length = Picture.create(file, width, height), height
    for start in range(0, height, step := max(1, _TURN // width)):
        end = min(start + step, height)
        first, last = (start, end) if orientation in (2, 5, 6) else (length - end, length - start)
        across = orientation >= 5
        box = (0, first, picture.height, last) if across else (first, 0, last, picture.width)
        pixels = picture.pixels.box(*box)[0].permute(1, 2, 0).numpy()
        turned = Image.fromarray(np.ascontiguousarray(pixels)).transpose(_FLIPS[orientation])
        found.pixels.write(start, torch.from_numpy(np.array(turned)).permute(2, 0, 1)[None])
    picture.pixels.remove()
    return found
