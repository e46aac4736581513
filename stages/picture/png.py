"""A PNG file written strip by strip, compressed on all cores. No picture in memory, no torch.

The image data is one zlib stream cut in blocks that threads deflate on their own (each primed with the 32 KiB before
it), so the bytes are the same for any number of threads. https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

BLOCK = 1 << 20  # bytes of filtered rows deflated at a time
WINDOW = 1 << 15  # of deflate


def _chunk(kind: bytes, *parts: bytes) -> Iterable[bytes]:
    check = zlib.crc32(kind)
    for part in parts:
        check = zlib.crc32(part, check)
    yield struct.pack(">I", sum(map(len, parts))) + kind
    yield from parts
    yield struct.pack(">I", check)


def text_chunk(key: str, text: str) -> Iterable[bytes]:
    """``tEXt`` where Latin-1 suffices (every reader knows it), else ``iTXt`` in UTF-8. NUL cannot be written."""
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    try:
        return _chunk(b"tEXt", key.encode("latin-1") + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", "replace"))


def _filtered(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """``[h, 1 + 3 W]`` bytes: each row as its difference to the left (1) or to the row above (2), whichever is less."""
    height, width, _ = rows.shape
    left = rows.copy()
    left[:, 1:] -= rows[:, :-1]
    up = rows.copy()
    up[1:] -= rows[:-1]
    up[0] -= above
    # least sum of absolute differences: the heuristic that the PNG specification recommends
    cost_left, cost_up = (np.abs(d.view(np.int8)).view(np.uint8).sum(axis=(1, 2), dtype=np.int64) for d in (left, up))
    take_up = cost_up < cost_left
    out = np.empty((height, 1 + 3 * width), np.uint8)
    out[:, 0] = np.where(take_up, 2, 1)
    out[:, 1:] = np.where(take_up[:, None], up.reshape(height, -1), left.reshape(height, -1))
    return out


def _deflate(block: bytes, before: bytes, level: int, last: bool) -> bytes:
    deflater = zlib.compressobj(level, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, before) if before else None
    deflater = deflater or zlib.compressobj(level, zlib.DEFLATED, -15, 9)
    return deflater.compress(block) + deflater.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


class PngWriter:
    """Writes 8-bit RGB rows to an open file. Use it as a context manager; leaving it completes the file.

    Args:
        file: opened for writing, binary.
        width, height: of the picture, pixels.
        texts: text chunks, written before the image data.
        level: of zlib, 0 to 9.
        threads: that deflate at once; the bytes do not depend on it.
    """

    def __init__(
        self,
        file: BinaryIO,
        width: int,
        height: int,
        *,
        texts: Mapping[str, str] | None = None,
        level: int = 6,
        threads: int = 2,
    ) -> None:
        self._file, self._width, self._rows_left, self._level = file, width, height, level
        self._above = np.zeros((width, 3), np.uint8)
        self._pending, self._before, self._adler, self._first = bytearray(), b"", 1, True
        self._pool, self._threads = ThreadPoolExecutor(threads), threads
        self._jobs: deque[Future[bytes]] = deque()
        file.write(b"\x89PNG\r\n\x1a\n")
        self._put(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
        for key, text in (texts or {}).items():
            self._put(text_chunk(key, text))

    def _put(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            self._file.write(part)

    def write(self, rows: np.ndarray) -> None:
        """The next rows, ``[h, width, 3]`` uint8. ValueError for another shape, or for more rows than announced."""
        if rows.dtype != np.uint8 or rows.shape[1:] != (self._width, 3) or len(rows) > self._rows_left:
            expected = f"[<= {self._rows_left}, {self._width}, 3] uint8"
            raise ValueError(f"PNG rows: got {list(rows.shape)} {rows.dtype}, expected {expected}.")
        if not len(rows):
            return
        data = _filtered(rows, self._above)
        self._above = rows[-1].copy()
        self._rows_left -= len(rows)
        raw = data.tobytes()
        self._adler = zlib.adler32(raw, self._adler)
        self._pending += raw
        while len(self._pending) > BLOCK:
            self._submit(bytes(self._pending[:BLOCK]), last=False)
            del self._pending[:BLOCK]

    def _submit(self, block: bytes, *, last: bool) -> None:
        while len(self._jobs) > self._threads:  # bounds what waits in memory
            self._flush_one()
        self._jobs.append(self._pool.submit(_deflate, block, self._before, self._level, last))
        self._before = block[-WINDOW:]

    def _flush_one(self) -> None:
        data = self._jobs.popleft().result()
        self._put(_chunk(b"IDAT", b"\x78\x9c" + data if self._first else data))
        self._first = False

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _finish(self) -> None:
        if self._rows_left:
            raise ValueError(f"PNG: {self._rows_left} rows were announced and never written.")
        self._submit(bytes(self._pending), last=True)
        while self._jobs:
            self._flush_one()
        self._put(_chunk(b"IDAT", struct.pack(">I", self._adler)))
        self._put(_chunk(b"IEND"))
