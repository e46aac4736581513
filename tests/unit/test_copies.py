"""Blocks of diffusers in fewer buffers: the same numbers, and what others read is left as it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.memory.copies import ROWS, gated_in_rows, skip_copies

pytestmark = pytest.mark.torch


class _Made(TorchDispatchMode):
    """Bytes of all results that are no view of what was given."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            value.untyped_storage()._cdata for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)
        }
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in known:
            self.nbytes += result.nbytes
        return result


def made(block: nn.Module, *given: Tensor) -> tuple[Tensor, int]:
    with torch.no_grad(), _Made() as mode:
        return block(*given), mode.nbytes


def resnet() -> tuple[nn.Module, list[Tensor]]:
    block = ResnetBlock2D(in_channels=64, out_channels=32, temb_channels=16, groups=8)
    image = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    return block.to(memory_format=torch.channels_last), [image, torch.randn(2, 16)]  # type: ignore[call-overload]


def transformer() -> tuple[nn.Module, list[Tensor]]:
    return BasicTransformerBlock(32, 2, 16), [torch.randn(2, 64, 32)]


@pytest.mark.parametrize("kind", [resnet, transformer])
def test_the_same_numbers_in_less_memory(kind: Any) -> None:
    torch.manual_seed(0)
    block, given = kind()
    block.eval().requires_grad_(False)
    before = deepcopy(given)
    expected, most = made(deepcopy(block), *given)
    found, fewer = made(skip_copies(block), *given)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, same) for value, same in zip(given, before, strict=True))
    activation = found.nbytes
    # two functions over norms, a division; a product over its gate of four times the width, two divisions
    assert most - fewer >= (4 if kind is resnet else 5) * activation


@pytest.mark.parametrize("tokens", [ROWS // 2 - 1, ROWS, 3 * ROWS // 2])
def test_gated_layers_take_rows_at_a_time_where_there_are_many(tokens: int) -> None:
    """What lies between the products is then as long as some rows; in fewer rows than two parts nothing changes."""
    torch.manual_seed(0)
    block = skip_copies(FeedForward(64, activation_fn="geglu").eval().requires_grad_(False))
    given = torch.randn(2, tokens, 64)
    expected, most = made(block, given)
    gated_in_rows(block)
    found, fewer = made(block, given)
    assert torch.equal(found, expected)
    assert fewer == most if tokens < ROWS else fewer < most


def test_gated_layers_whose_products_are_units_are_left_alone() -> None:
    block: Any = FeedForward(64, activation_fn="geglu").eval().requires_grad_(False)
    gated_in_rows(block)
    calls, product = [], block.net[2].forward
    block.net[2].forward = lambda inputs: calls.append(inputs.shape) or product(inputs)
    block(torch.randn(2, 2 * ROWS, 64))
    assert calls == [(2, 2 * ROWS, 256)]
