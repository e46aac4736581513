"""Packed weights: where each lies, and how a model is cut into units."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from stages.memory.layout import ALIGNMENT, Layout
from stages.memory.units import Blocks, rungs, split_units

BLOCKS = Blocks(classes=frozenset({"Attention"}))


class Attention(nn.Module):  # a name that is loaded whole
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.conv = nn.Conv2d(3, 5, 3)
        self.blocks = nn.ModuleList([Attention(8), Attention(40)])
        self.norm = nn.GroupNorm(5, 5)
        self.empty = nn.Identity()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_give_every_parameter_back(dtype: torch.dtype, channels_last: bool) -> None:
    model = Model().to(dtype)
    layout = Layout(model, dtype, channels_last=channels_last)
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, parameter in model.named_parameters():
        view = layout.slots[name].view(packed, 0)
        view.copy_(parameter)
        if parameter.dim() == 4:
            assert view.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for name, parameter in model.named_parameters():  # nothing was written over anything
        slot = layout.slots[name]
        assert torch.equal(slot.view(packed, 0), parameter)
        assert slot.offset % ALIGNMENT == 0


@pytest.mark.parametrize("limit", [0, 200, 700, 10_000, 10**9])
def test_units_cover_every_parameter_once_and_do_not_overlap(limit: int) -> None:
    model = Model()
    layout = Layout(model, torch.float32, channels_last=True)
    units = split_units(model, layout, BLOCKS, limit)
    names = [slot.name for unit in units for slot in unit.slots]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    ranges = sorted((unit.start, unit.end) for unit in units)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert sum(unit.nbytes for unit in units) == layout.nbytes
    for unit in units:
        assert unit.module is (model.get_submodule(unit.name) if unit.name else model)
        assert unit.nested == (unit.name == "")  # the model's own parameter stays, its children are units


def test_blocks_are_whole_where_they_fit() -> None:
    model = Model()
    layout = Layout(model, torch.float32, channels_last=False)
    small = layout.range_of(name for name in layout.slots if name.startswith("blocks.0"))
    limit = small[1] - small[0]
    assert [unit.name for unit in split_units(model, layout, BLOCKS, limit)] == [
        *("", "conv", "blocks.0", "blocks.1.to_q", "blocks.1.to_k", "norm"),
    ]
    whole = [unit.name for unit in split_units(model, layout, BLOCKS, layout.nbytes)]
    assert whole == ["", "conv", "blocks.0", "blocks.1", "norm"]


def test_rungs_go_from_whole_blocks_to_leaves() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = Attention(40), nn.Linear(40, 40)

    model = nn.Sequential(Block(), Block(), nn.Linear(8, 8))
    layout = Layout(model, torch.float32, channels_last=False)
    blocks = Blocks(classes=frozenset({"Block", "Attention"}))
    found = rungs(model, layout, blocks)
    largest = [max(unit.nbytes for unit in split_units(model, layout, blocks, limit)) for limit in found]
    counts = [len(split_units(model, layout, blocks, limit)) for limit in found]
    assert counts == [3, 5, 7] and largest == sorted(largest, reverse=True)
    assert found[0] == layout.nbytes and found[-1] == 40 * 40 * 4 + 40 * 4 + 32
    assert not Blocks(classes=frozenset({"Nothing"})).known(model) and blocks.known(model)
