"""Bytes of files at their places, and the header of a safetensors file. No torch.

Files are read with ``pread`` and written with ``pwrite``, never mapped: a mapped page counts in RES.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}
MAX_HEADER = 16 << 20  # bytes: a hundred thousand tensors; the format allows 100 MB, which would take a gigabyte
_FOREIGN = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself: git lfs pull",
    b"<": "a web page; download the file, signed in where its terms ask for it",
    b"{": "JSON text",
    b"PK\x03\x04": "a zip or a pickle of torch",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
}


class Entry(NamedTuple):
    """One tensor: ``nbytes`` bytes at ``offset`` (from the start of the file), row-major, ``dtype`` as in the file.

    Of a dtype that is not in ``ITEM_BYTES`` only the place is known: there may be such a tensor that nothing uses.
    """

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header alone. ValueError as for ``read_described``."""
    return read_described(path)[0]


def read_described(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors of a safetensors file and its metadata, from its header alone; nothing in it is trusted.

    Raises:
        ValueError: a torn or foreign file, a header that is too long, tensors that share bytes.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: got a folder, a pipe or a device, expected a safetensors file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length == 0 or length > size - 8:
            raise ValueError(_not_whole(path, size, head + file.read(32)))
        if length > MAX_HEADER:
            raise ValueError(f"{path}: a header of {length} bytes, expected at most {MAX_HEADER}: too many tensors.")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
        described = header.pop("__metadata__", None)
        found = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        what = f"{type(error).__name__}: {error}"
        said = f"not a safetensors file ({what[:200]} in its header), expected a table of tensors"
        raise ValueError(f"{path}: {said}.") from error
    check_apart(path, found)
    return found, described if isinstance(described, dict) else {}


def check_apart(path: Path, entries: Mapping[str, Entry]) -> None:
    """Raises:
    ValueError: tensors that share bytes.
    """
    placed = sorted(
        (entry.offset, entry.offset + entry.nbytes, name) for name, entry in entries.items() if entry.nbytes
    )
    for (_, end, one), (start, _, other) in pairwise(placed):
        if start < end:
            raise ValueError(f"{path}: tensors {one} and {other} share bytes, expected each at a place of its own.")


def foreign(head: bytes) -> str:
    """What a file that begins so looks like."""
    found = next((what for begin, what in _FOREIGN.items() if head.lstrip().startswith(begin)), "")
    return (found if head else "empty") or "torn, or something else"


def _not_whole(path: Path, size: int, head: bytes) -> str:
    return f"{path}: not a whole safetensors file ({size} bytes): it is {foreign(head if size else b'')}."


def _entry(path: Path, name: str, entry: Any, base: int, size: int) -> Entry:
    kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str):
        raise ValueError(f"{path}: tensor {name}: got the dtype {kind!r:.40}, expected one such as F16.")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{path}: tensor {name} of shape {shape} at {start} to {end}: expected whole numbers from 0.")
    nbytes = math.prod(shape) * ITEM_BYTES[kind] if kind in ITEM_BYTES else max(0, end - start)
    if end - start != nbytes or base + end > size:
        raise ValueError(f"{path}: torn: tensor {name} of shape {shape} at {start} to {end} of {size - base} bytes.")
    return Entry(base + start, nbytes, kind, tuple(shape))


def pread_into(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` (bytes) from ``offset``; OSError if the file ends first."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"file ended {len(buffer) - done} bytes early")
        done += count


def pwrite_all(fd: int, offset: int, view: memoryview) -> None:
    """Write all of ``view`` (bytes) at ``offset``."""
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class RowFile(NamedTuple):
    """``planes`` times ``height`` rows of ``row_bytes``, from ``offset`` of a file on.

    Channels one after the other are a plane each; with channels last there is one plane. No file stays open.
    """

    path: Path
    offset: int
    planes: int
    height: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.planes * self.height * self.row_bytes

    def read_into(self, buffer: memoryview, top: int, bottom: int, first: int = 0, last: int | None = None) -> None:
        """Rows ``top <= y < bottom`` of every plane, or bytes ``first`` to ``last`` of each of them."""
        with self.opened(os.O_RDONLY) as descriptor:
            at = 0
            for offset, count in self._ranges(top, bottom, first, self.row_bytes if last is None else last):
                pread_into(descriptor, offset, buffer[at : at + count])
                at += count

    def write(self, buffer: memoryview, top: int, bottom: int) -> None:
        """The reverse of ``read_into``, whole rows."""
        with self.opened(os.O_WRONLY) as descriptor:
            at = 0
            for offset, count in self._ranges(top, bottom, 0, self.row_bytes):
                pwrite_all(descriptor, offset, buffer[at : at + count])
                at += count

    def _ranges(self, top: int, bottom: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(offset, number) of bytes that follow each other in the file."""
        for plane in range(self.planes):
            begin = self.offset + (plane * self.height + top) * self.row_bytes
            if last - first == self.row_bytes:
                yield begin, (bottom - top) * self.row_bytes
            else:
                yield from ((begin + y * self.row_bytes + first, last - first) for y in range(bottom - top))

    @contextmanager
    def opened(self, flags: int) -> Iterator[int]:
        """The file's descriptor."""
        descriptor = os.open(self.path, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
