"""Where each tensor of a checkpoint lies on disk, and how to read it without mapping the file.

A memory-mapped page counts in RES, so weights are read with ``pread`` into buffers that the caller owns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from stages.memory.raw import pread_into, read_described, read_entries

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DIGEST = "sha256"  # of the data, in the metadata of a file


class TensorRef(NamedTuple):
    """One tensor of a safetensors file: ``nbytes`` bytes at ``offset`` (from the start of the file), row-major.

    ``transposed``: of a matrix, what lies there has the reverse shape.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        """As it lies in the file."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file, from its header alone, without those of dtypes that torch does not have.

    Raises:
        ValueError: a torn or foreign file.
    """
    try:
        entries = read_entries(path)
    except ValueError as error:
        raise ValueError(f"{error} If it is a file of a checkpoint, download it again.") from error
    known = {name: one for name, one in entries.items() if one.dtype in DTYPES}
    return {name: TensorRef(path, one.offset, DTYPES[one.dtype], one.shape) for name, one in known.items()}


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """The tensor, read into memory of its own."""
    tensor = torch.empty(ref.file_shape, dtype=ref.dtype)
    flat = tensor.view(-1).view(torch.uint8) if ref.shape else tensor.view(1).view(torch.uint8)
    descriptor = os.open(ref.file, os.O_RDONLY)
    try:
        pread_into(descriptor, ref.offset, memoryview(flat.numpy()))
    finally:
        os.close(descriptor)
    return tensor.t().contiguous() if ref.transposed else tensor


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, none of them mapped."""
    return {name: read_tensor(ref) for name, ref in read_header(path).items()}


def read_checked(path: Path) -> dict[str, torch.Tensor]:
    """What ``write_tensors`` wrote with ``checked``. ValueError for anything else, and for a byte that has changed."""
    tensors, described = read_tensors(path), read_described(path)[1]
    if described.get(_DIGEST) != digest_of(tensors):
        raise ValueError(f"{path.name} is damaged: its bytes are not those that were written")
    return tensors


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of tensors with their names, types and shapes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype) if tensor.numel() < 2 else tensor.view(-1)
        if tensor.numel() == 1:  # its stride may be anything
            flat.copy_(tensor.view(-1))
        sha.update(flat.view(torch.uint8).numpy())
    return sha.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, checked: bool = False) -> None:
    """Write a safetensors file under ``path``, which is a temporary name of ``files.atomic_path``.

    ``checked``: with a digest, for work that is read back to go on with it (``read_checked``).
    """
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, {_DIGEST: digest_of(whole)} if checked else None)
