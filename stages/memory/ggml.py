"""GGUF files: where their tensors lie, and the blocks of GGML that hold quantised numbers. No torch.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because ``gguf.GGUFReader`` maps
the whole file and believes every count in it; types, block sizes and numbers of blocks are the ``gguf`` package's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.memory.raw import MAX_HEADER, Entry, check_apart, foreign, read_entries

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"GGUF"
# quantised types that are read; F64, F32, F16 and BF16 are as in other files
READABLE = (
    *("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"),
    *("IQ4_NL", "IQ4_XS"),
)
_SHAPE = "comfy.gguf.orig_shape."  # of a tensor whose rows are no whole blocks, and which lies there in another shape
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 8  # of a tensor at most
_DEPTH = 4  # of arrays in arrays


class Info(NamedTuple):
    """A tensor as a header names it: ``kind`` is GGML's number of its type, ``offset`` from the start of the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """``values``: numbers, texts and short lists of the metadata; ``data``: where the data begins."""

    values: dict[str, Any]
    tensors: dict[str, Info]
    data: int

    @property
    def architecture(self) -> str:
        """What the file says that it is; "" where it does not."""
        return str(self.values.get("general.architecture", ""))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def names_of(path: Path) -> list[str]:
    """The names of the tensors of a GGUF or safetensors file. ValueError for a torn or foreign one."""
    return list(read_gguf(path).tensors if is_gguf(path) else read_entries(path))


def stored_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a GGUF or safetensors file; of quantised ones ``dtype`` is GGML's name of the type.

    Raises:
        ValueError: a torn or foreign file, tensors that share bytes.
    """
    if not is_gguf(path):
        return read_entries(path)
    header, size, found = read_gguf(path), path.stat().st_size, {}
    for name, info in header.tensors.items():
        kind, numbers, nbytes = _type(info.kind)
        count = math.prod(info.shape)
        total = count // numbers * nbytes
        if count % numbers or header.data + info.offset + total > size:
            raise ValueError(
                f"{path}: torn: tensor {name} of shape {list(info.shape)} {kind} at {info.offset} of "
                f"{size - header.data} bytes."
            )
        found[name] = Entry(header.data + info.offset, total, kind, _shape(header, path, name, info.shape))
    check_apart(path, found)
    return found


def _shape(header: Header, path: Path, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    said = header.values.get(_SHAPE + name)
    if said is None:
        return shape
    known = isinstance(said, list) and all(type(side) is int and side > 0 for side in said)
    if not known or math.prod(said) != math.prod(shape):
        raise ValueError(f"{path}: tensor {name} of shape {list(shape)}, which {_SHAPE}{name} says is {said!r:.60}.")
    return tuple(said)


@cache
def _type(kind: int) -> tuple[str, int, int]:
    """(name, numbers of a block, its bytes) of a type; no bytes of one that the ``gguf`` package does not know."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        return f"GGML type {kind}", 1, 0
    return known.name, *GGML_QUANT_SIZES[known]


@cache
def block_of(name: str) -> tuple[int, int]:
    """(numbers, bytes) of a block of a quantised type; (1, 0) of a type that is unknown."""
    from gguf.constants import GGMLQuantizationType

    return _type(GGMLQuantizationType[name])[1:] if name in GGMLQuantizationType.__members__ else (1, 0)


def numbers_of(raw: NDArray[Any], name: str) -> NDArray[Any]:
    """The float32 numbers of whole blocks, ``raw`` being uint8 and in one dimension."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(raw.reshape(1, -1), GGMLQuantizationType[name])[0]  # one row: many are ten times slower


def read_gguf(path: Path) -> Header:
    """The header of a GGUF file; nothing in it is trusted.

    Raises:
        ValueError: a torn or foreign file, a header that is too long.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        text = _Bytes(file.read(min(size, MAX_HEADER)), path, size)
    if text.take(4) != MAGIC:
        raise ValueError(f"{path}: not a GGUF file ({size} bytes): it is {foreign(text.text)}.")
    version, tensors, values = text.unpack("IQQ")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}, expected 2 or 3, little-endian.")
    found: dict[str, Any] = {}
    for _ in range(values):
        key = text.string()
        found[key] = text.value(text.unpack("I")[0])
    placed: dict[str, Info] = {}
    for _ in range(tensors):
        name = text.string()
        if name in placed:
            raise ValueError(f"{path}: two tensors {name}.")
        (count,) = text.unpack("I")
        if count > _DIMENSIONS:
            raise ValueError(f"{path}: tensor {name} of {count} dimensions, expected at most {_DIMENSIONS}.")
        *sides, kind, offset = text.unpack(f"{count}QIQ")
        placed[name] = Info(tuple(reversed(sides)), kind, offset)
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"{path}: general.alignment: got {alignment!r:.40}, expected a number of bytes.")
    return Header(found, placed, -(-text.at // alignment) * alignment)


class _Bytes:
    """The beginning of a file, read from front to back."""

    def __init__(self, text: bytes, path: Path, size: int) -> None:
        self.text, self.at, self._path, self._size = text, 0, path, size

    def need(self, count: int) -> None:
        """Raises:
        ValueError: fewer bytes than that follow.
        """
        if self.at + count > len(self.text):
            if len(self.text) < self._size:
                raise ValueError(f"{self._path}: a header of more than {MAX_HEADER} bytes, expected at most as many.")
            raise ValueError(f"{self._path}: not a whole GGUF file ({self._size} bytes): its header is torn.")

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self.text[self.at - count : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def string(self) -> str:
        return self.take(self.unpack("Q")[0]).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata; of a list the first numbers or texts."""
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > _DEPTH:
            raise ValueError(f"{self._path}: not a whole GGUF file: a value of type {kind} in its header.")
        inner, count = self.unpack("IQ")
        self.need(count * (struct.calcsize(_SCALARS[inner]) if inner in _SCALARS else 8))
        kept = list(self._first(inner, min(count, _DIMENSIONS), depth))
        if inner in _SCALARS:
            self.take((count - len(kept)) * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(count - len(kept)):
                self.value(inner, depth + 1)
        return kept

    def _first(self, inner: int, count: int, depth: int) -> Iterator[Any]:
        return (self.value(inner, depth + 1) for _ in range(count))
