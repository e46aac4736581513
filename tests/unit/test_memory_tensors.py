"""Reading safetensors without mapping them: the same numbers as the library's own reader, torn files named."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.memory.raw import ITEM_BYTES, MAX_HEADER
from stages.memory.refs import DTYPES
from stages.memory.tensors import pread_into, read_checked, read_header, read_tensors, write_tensors

TENSORS = {
    "half": torch.randn(3, 5, dtype=torch.float16),
    "scalar": torch.tensor(7.5),
    "empty": torch.zeros(0, 4),
    "wide": torch.randn(2, 3, 4, 5),
    "brain": torch.randn(7).bfloat16(),
    "flags": torch.tensor([True, False]),
    "numbers": torch.arange(9),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for write in (save_file, lambda tensors, path: write_tensors(path, tensors)):
        write(TENSORS, tmp_path / "file")
        read = read_tensors(tmp_path / "file")
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_non_contiguous_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "file", {"image": image, "cut": image[:, :2, 1:]})
    read = read_tensors(tmp_path / "file")
    assert torch.equal(read["image"], image) and torch.equal(read["cut"], image[:, :2, 1:])


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def one(start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a whole safetensors file .*empty"),
        (b"abc", "not a whole safetensors file .*torn"),
        (bytes(8), "not a whole safetensors file .*torn"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "Git LFS; fetch the file itself"),
        (b"\n<!DOCTYPE html><html><head>", "a web page"),
        (b"PK\x03\x04" + bytes(50), "a zip or a pickle"),
        (b"\xff" * 200, "not a whole safetensors file"),
        (struct.pack("<Q", 50) + b"\x00" * 60, "not a safetensors file .*JSON"),
        (header([1, 2]), "not a safetensors file"),
        (header({"a": {"dtype": "F32"}}), "not a safetensors file"),
        (header({"a": 3}), "not a safetensors file"),
        (header({"a": one(0, 8), "b": one(4, 12)}) + bytes(12), "a and b share bytes"),
        (header({"a": one(0, 12), "b": one(4, 8)}) + bytes(12), "a and b share bytes"),
        (header({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}) + bytes(8), "whole numbers"),
        (header({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}) + bytes(8), "whole numbers"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}) + bytes(8), "whole numbers"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}) + bytes(8), "torn: tensor a"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not a safetensors file .*Recursion"),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}), "torn: tensor a"),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [8, 0]}}) + bytes(8), "torn: tensor a"),
        (
            header({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}, "b": one(0, 4)}) + bytes(4),
            "share bytes",
        ),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + b"1234567", "torn: tensor a"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"12345678", "torn: tensor a"),
    ],
)
def test_torn_and_foreign_files(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_header(tmp_path / "file")


def test_a_header_of_a_million_tensors_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(struct.pack("<Q", MAX_HEADER + 1) + bytes(MAX_HEADER + 1))
    with pytest.raises(ValueError, match=f"expected at most {MAX_HEADER}: too many tensors"):
        read_header(tmp_path / "file")


def test_every_changed_byte_of_checked_tensors_is_seen(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, checked=True)
    assert all(torch.equal(read, TENSORS[name]) for name, read in read_checked(tmp_path / "file").items())
    whole = (tmp_path / "file").read_bytes()
    for where in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[where] ^= 4
        (tmp_path / "file").write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged|safetensors|tensor"):
            read_checked(tmp_path / "file")
    save_file(TENSORS, tmp_path / "file")  # as an older version wrote it
    with pytest.raises(ValueError, match="damaged"):
        read_checked(tmp_path / "file")


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="ended 3 bytes early"):
            pread_into(descriptor, 1, memoryview(bytearray(7)))
    finally:
        os.close(descriptor)


def test_a_dtype_that_nothing_knows_is_passed_over(tmp_path: Path) -> None:
    odd = {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}
    (tmp_path / "file").write_bytes(header({"odd": odd, "a": one(4, 12)}) + bytes(12))
    found = read_header(tmp_path / "file")
    assert {name: ref.readable for name, ref in found.items()} == {"odd": False, "a": True}
    assert list(read_tensors(tmp_path / "file")) == ["a"]


def test_every_dtype_of_the_file_is_one_of_torch(tmp_path: Path) -> None:
    assert set(DTYPES) == set(ITEM_BYTES)
    assert all(dtype.itemsize == ITEM_BYTES[name] for name, dtype in DTYPES.items())
    tensors = {name: torch.arange(4).to(dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "file")
    assert all(
        torch.equal(read.float(), tensors[name].float()) for name, read in read_tensors(tmp_path / "file").items()
    )
