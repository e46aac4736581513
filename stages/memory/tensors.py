"""Where each tensor of a checkpoint lies on disk, and how to read it without mapping the file.

A memory-mapped page counts in RES, so weights are read with ``pread`` into buffers that the caller owns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from stages.memory.ggml import stored_entries
from stages.memory.raw import pread_into, read_described
from stages.memory.refs import DTYPES, TensorRef, decoded, ref_of

_DIGEST = "sha256"  # of the data, in the metadata of a file


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors or GGUF file, from its header alone.

    Raises:
        ValueError: a torn or foreign file.
    """
    try:
        entries = stored_entries(path)
    except ValueError as error:
        raise ValueError(f"{error} If it is a file of a checkpoint, download it again.") from error
    return {name: ref_of(path, one.offset, one.dtype, one.shape) for name, one in entries.items()}


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """The tensor, read into memory of its own; of quantised numbers float32."""
    tensor = torch.empty(ref.file_shape, dtype=ref.read_dtype)
    if ref.parts:
        return torch.cat([read_tensor(part) for part in ref.parts], out=tensor)
    raw = torch.empty(ref.nbytes, dtype=torch.uint8) if ref.encoded else _bytes(tensor)
    descriptor = os.open(ref.file, os.O_RDONLY)
    try:
        pread_into(descriptor, ref.offset, memoryview(raw.numpy()))
    finally:
        os.close(descriptor)
    if ref.encoded:
        tensor.view(-1).copy_(decoded(ref, raw, scale_of(ref)))
    return tensor.t().contiguous() if ref.transposed else tensor


def scale_of(ref: TensorRef) -> torch.Tensor | None:
    """Float32 in one dimension: one, or one a row."""
    return None if ref.scale is None else read_tensor(ref.scale).view(-1).float()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.view(-1) if tensor.dim() else tensor.view(1)).view(torch.uint8)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, none of them mapped."""
    return {name: read_tensor(ref) for name, ref in read_header(path).items() if ref.kind in DTYPES}


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
        sha.update(flat.view(torch.uint8).cpu().numpy())
    return sha.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, checked: bool = False) -> None:
    """Write a safetensors file under ``path``, which is a temporary name of ``files.atomic_path``.

    ``checked``: with a digest, for work that is read back to go on with it (``read_checked``).
    """
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, {_DIGEST: digest_of(whole)} if checked else None)
