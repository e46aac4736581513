"""Vocabularies by rows and linear layers in pieces: the numbers of the stock modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages.memory.tensors import read_header, read_tensor
from stages.models import large
from stages.models.large import RowEmbedding, SlicedLinear, without_large


@pytest.fixture
def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"words": nn.Embedding(1200, 6), "places": nn.Embedding(77, 6), "wide": nn.Linear(6, 1001)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(
    network: nn.ModuleDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    ids = torch.tensor([[3, 1199, 0], [3, 3, 7]])
    stock = network.to(dtype)
    states = stock["words"](ids)
    want = stock["wide"](states)
    monkeypatch.setattr(large, "WIDE", 1000)
    monkeypatch.setattr(large, "SLICE", 5000)
    refs = without_large(network, read_header(tmp_path / "model.safetensors"), dtype)
    assert type(network["words"]) is RowEmbedding and type(network["wide"]) is SlicedLinear
    assert type(network["places"]) is nn.Embedding  # 77 rows: not a vocabulary
    assert torch.equal(network["words"](ids), states)
    pieces = sum(name.startswith("wide.slices.") for name, _ in network.named_parameters()) // 2
    assert pieces == -(-1001 * 6 * dtype.itemsize // 5000) > 1
    values = {name: read_tensor(refs[name]).to(dtype) for name in network.state_dict()}
    network.load_state_dict(values, assign=True)
    torch.testing.assert_close(network["wide"](states), want, rtol=0, atol=0 if dtype == torch.float32 else 1e-2)
    assert network["words"].weight.dtype == network["wide"].weight.dtype == dtype


def test_a_token_that_is_not_there(network: nn.ModuleDict, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    without_large(network, read_header(tmp_path / "model.safetensors"), torch.float32)
    with pytest.raises(IndexError, match="token 1200, expected one of a vocabulary of 1200"):
        network["words"](torch.tensor([1200]))
