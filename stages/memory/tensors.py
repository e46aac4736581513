"""Where each tensor of a checkpoint lies on disk, and how to read it without mapping the file.

A memory-mapped page counts in RES, so weights are read with ``pread`` into buffers that the caller owns.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch

# https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000  # the limit of the format


class TensorRef(NamedTuple):
    """One tensor of a safetensors file: ``nbytes`` bytes at ``offset`` (from the start of the file), row-major."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file, from its header alone. ValueError for a torn or foreign file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path}: not a whole safetensors file ({size} bytes).")
        header = json.loads(file.read(length))
    refs = {}
    try:
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                expected = ", ".join(DTYPES)
                raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of {expected}.")
            ref = TensorRef(path, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if end - start != ref.nbytes or 8 + length + end > size:
                raise ValueError(f"{path}: torn: tensor {name} ends beyond the file's {size} bytes. Download it again.")
            refs[name] = ref
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error!r} in its header).") from error
    return refs


def pread_into(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` (bytes) from ``offset``; OSError if the file ends first."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"file ended {len(buffer) - done} bytes early")
        done += count


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """The tensor, read into memory of its own."""
    tensor = torch.empty(ref.shape, dtype=ref.dtype)
    flat = tensor.view(-1).view(torch.uint8) if ref.shape else tensor.view(1).view(torch.uint8)
    descriptor = os.open(ref.file, os.O_RDONLY)
    try:
        pread_into(descriptor, ref.offset, memoryview(flat.numpy()))
    finally:
        os.close(descriptor)
    return tensor


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, none of them mapped."""
    return {name: read_tensor(ref) for name, ref in read_header(path).items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file under ``path``, which is a temporary name of ``files.atomic_path``."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
