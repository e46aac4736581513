"""Quantised weights: the numbers of the ``gguf`` package and of torch, read at their size, never trusted."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from quantised import KINDS, blocks, write_gguf
from safetensors.torch import save_file
from torch import nn

from stages.memory.ggml import READABLE, read_gguf
from stages.memory.layout import Layout
from stages.memory.refs import TensorRef
from stages.memory.source import CheckpointSource
from stages.memory.tensors import read_header, read_tensor
from stages.models import large
from stages.models.large import RowEmbedding, SlicedLinear, without_large
from stages.models.locate import CheckpointError
from stages.models.scales import with_scales


def numbers(raw: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))


def loaded(refs: dict[str, TensorRef], dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], int]:
    """All tensors as a source packs them, and the bytes that it has read."""
    network = nn.Module()
    for name, ref in refs.items():
        parameter = torch.empty(ref.shape, dtype=dtype, device="meta")
        network.register_parameter(name, nn.Parameter(parameter, requires_grad=False))
    layout = Layout(network, dtype, channels_last=True)
    source = CheckpointSource(refs)
    packed = torch.empty(layout.nbytes, dtype=torch.uint8)
    source.read(list(layout.slots.values()), 0, packed)
    source.close()
    return {name: slot.view(packed, 0) for name, slot in layout.slots.items()}, source.nbytes


def test_every_kind_of_block(tmp_path: Path) -> None:
    """The numbers of gguf itself, in either dtype, of as many bytes as there are."""
    assert set(KINDS) == set(READABLE)
    made = {kind: (blocks(kind, (600, 512), seed), kind) for seed, kind in enumerate(KINDS)}
    plain = np.linspace(-1, 1, 24, dtype=np.float32)
    half = (plain[::3].copy().view(np.uint32) >> 16).astype(np.uint16)
    made |= {"f32": (plain.reshape(2, 3, 4), "F32"), "f16": (plain.astype(np.float16), "F16")}
    write_gguf(tmp_path / "m.gguf", made | {"bf16": (half.view(np.uint8).reshape(1, 16), "BF16")})
    refs = read_header(tmp_path / "m.gguf")
    there = {one.name: (one.data_offset, one.n_bytes) for one in GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: (ref.offset, ref.nbytes) for name, ref in refs.items()} == there
    wanted = {name: numbers(*made[name]) for name in made} | {"bf16": torch.from_numpy(half).view(torch.bfloat16)[None]}
    for dtype in (torch.float32, torch.bfloat16):
        found, nbytes = loaded(refs, dtype)
        assert nbytes == sum(size for _, size in there.values())
        for name, value in wanted.items():
            assert value.float().isfinite().all() and 0.3 < value.float().std() < 3, name
            assert torch.equal(found[name], value.to(dtype)), name
            assert torch.equal(read_tensor(refs[name]), value) and refs[name].readable


def test_convolutions_whose_rows_are_no_blocks(tmp_path: Path) -> None:
    """Of UNets: in another shape, the true one beside it."""
    raw = blocks("Q8_0", (90, 32))
    write_gguf(tmp_path / "m.gguf", {"c": (raw, "Q8_0")}, **{"comfy.gguf.orig_shape.c": [16, 20, 3, 3]})
    refs = read_header(tmp_path / "m.gguf")
    found, _ = loaded(refs)
    assert torch.equal(found["c"], numbers(raw, "Q8_0").view(16, 20, 3, 3))
    assert refs["c"].rows(0, 1) is None and refs["c"].rows(0, 8) is not None
    write_gguf(tmp_path / "m.gguf", {"c": (raw, "Q8_0")}, **{"comfy.gguf.orig_shape.c": [16, 20, 3]})
    with pytest.raises(ValueError, match=r"shape \[90, 32\], which comfy.gguf.orig_shape.c says is \[16, 20, 3\]"):
        read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_rows_and_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made = {"words.weight": blocks(kind, (1200, 256)), "wide.weight": blocks(kind, (1001, 256), 1)}
    write_gguf(tmp_path / "m.gguf", {name: (raw, kind) for name, raw in made.items()})
    network = nn.ModuleDict({"words": nn.Embedding(1200, 256), "wide": nn.Linear(256, 1001, bias=False)})
    monkeypatch.setattr(large, "WIDE", 10_000)
    monkeypatch.setattr(large, "SLICE", 200_000)
    refs = without_large(network, read_header(tmp_path / "m.gguf"), torch.float32)
    ids = torch.tensor([[3, 1199, 0], [3, 3, 7]])
    words, wide = (numbers(raw, kind) for raw in made.values())
    assert type(network["words"]) is RowEmbedding and type(network["wide"]) is SlicedLinear
    assert torch.equal(network["words"](ids), words[ids])
    slices = {name: ref for name, ref in refs.items() if ".slices." in name}
    assert len(slices) > 2 and sum(ref.nbytes for ref in slices.values()) == made["wide.weight"].nbytes
    assert torch.equal(torch.cat([read_tensor(ref) for ref in slices.values()]), wide)


def test_tensors_of_several_places(tmp_path: Path) -> None:
    """As of halves that change places, with slices over the seam."""
    raw = blocks("Q4_0", (8, 64))
    write_gguf(tmp_path / "m.gguf", {"a": (raw, "Q4_0")})
    whole, value = read_header(tmp_path / "m.gguf")["a"], numbers(raw, "Q4_0")
    halves = whole.rows(4, 8), whole.rows(0, 4)
    assert halves[0] is not None and halves[1] is not None
    swapped = whole._replace(parts=(halves[0], halves[1]))
    wanted = torch.cat([value[4:], value[:4]])
    found, nbytes = loaded({"a": swapped})
    assert torch.equal(found["a"], wanted) and nbytes == whole.nbytes == swapped.nbytes
    for first, last in ((0, 8), (2, 4), (3, 6), (5, 8)):
        own = swapped.rows(first, last)
        assert own is not None and torch.equal(read_tensor(own), wanted[first:last])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_and_their_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stored = {name: torch.randn(24, 40).to(dtype) for name in ("a", "b", "c", "d")}
    rows = torch.rand(24, 1)
    save_file(
        {
            **{f"{name}.weight": value for name, value in stored.items()},
            "a.weight_scale": torch.tensor(0.25),
            "b.scale_weight": torch.tensor([3.0]),
            "c.weight_scale": rows,
            "a.input_scale": torch.tensor(9.0),
            "b.scale_input": torch.tensor(9.0),
            "scaled_fp8": torch.empty(0),
            "a.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
        },
        tmp_path / "m.safetensors",
    )
    refs = with_scales(read_header(tmp_path / "m.safetensors"))
    assert sorted(refs) == ["a.weight", "b.weight", "c.weight", "d.weight"]
    scales = {"a": torch.tensor(0.25), "b": torch.tensor(3.0), "c": rows, "d": torch.tensor(1.0)}
    found, nbytes = loaded({name.replace(".", "_"): ref for name, ref in refs.items()})
    assert nbytes == 4 * 24 * 40
    for name, value in stored.items():
        assert torch.equal(found[f"{name}_weight"], value.float() * scales[name])
        own = refs[f"{name}.weight"].rows(5, 9)
        assert own is not None and torch.equal(read_tensor(own), (value.float() * scales[name])[5:9])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"a.weight_scale": torch.ones(3, 2)}, r"a.weight_scale: got a scale F32 \[3, 2\] of F8_E4M3 \[24, 40\]"),
        ({"a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "says 'nvfp4', expected"),
        ({"a.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, "expected JSON"),
    ],
)
def test_scales_that_are_not_understood(tmp_path: Path, more: dict[str, torch.Tensor], said: str) -> None:
    save_file({"a.weight": torch.zeros(24, 40).to(torch.float8_e4m3fn), **more}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=said):
        with_scales(read_header(tmp_path / "m.safetensors"))


def test_torn_and_hostile_gguf(tmp_path: Path) -> None:
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    write_gguf(path, {"a": (blocks("Q4_0", (4, 64)), "Q4_0"), "b": (np.zeros(8, np.float32), "F32")}, words=["x", "y"])
    whole = path.read_bytes()
    header = read_gguf(path)
    assert header.architecture == "flux" and header.values["words"] == ["x", "y"]
    for length in (*range(4, header.data, 5), header.data + 10, len(whole) - 33):
        other.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="torn"):
            read_header(other)
    at = whole.index(struct.pack("<Q", 1) + b"b")  # the name, dimensions, one side, type and place of b
    place = at + 9 + 4 + 8
    spoilt = {
        "GGUF version 9": whole[:4] + struct.pack("<I", 9) + whole[8:],
        "its header is torn": whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:],
        "of 99 dimensions": whole[: at + 9] + struct.pack("<I", 99) + whole[at + 13 :],
        "torn: tensor b": whole[: at + 13] + struct.pack("<Q", 1 << 61) + whole[at + 21 :],
        "share bytes": whole[: place + 4] + struct.pack("<Q", 0) + whole[place + 12 :],
    }
    for said, content in spoilt.items():
        other.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_header(other)
    other.write_bytes(whole[:place] + struct.pack("<I", 99) + whole[place + 4 :])
    assert {name: (ref.kind, ref.readable) for name, ref in read_header(other).items()} == {
        "a": ("Q4_0", True),
        "b": ("GGML type 99", False),
    }
    seed = np.random.default_rng(0)
    seed = np.random.default_rng(0)
    for _ in range(300):  # any other byte: refused in words, or read
        spoilt_byte = bytearray(whole)
        spoilt_byte[seed.integers(4, header.data)] = seed.integers(256)
        other.write_bytes(spoilt_byte)
        with contextlib.suppress(ValueError):
            read_header(other)


def test_a_header_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**40)
        )
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="a header of more than"):
        read_header(path)
