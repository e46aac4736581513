"""Blocks of diffusers in fewer buffers: the same numbers, and what others read is left as it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from diffusers.models.transformers.transformer_z_image import FeedForward as ZImageFeedForward
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.memory import copies
from stages.memory.copies import BF16_ROWS, ROWS, feed_forwards_in_rows, gated_in_rows, skip_copies

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


FEED_FORWARDS = [
    pytest.param(lambda: FeedForward(64, activation_fn="gelu-approximate"), id="flux, sd3"),
    pytest.param(lambda: Flux2FeedForward(64), id="flux2"),
    pytest.param(lambda: skip_copies(FeedForward(64, activation_fn="geglu")), id="unets"),
    pytest.param(lambda: ZImageFeedForward(64, 256), id="z_image"),
]


@pytest.mark.parametrize("tokens", [BF16_ROWS - 1, BF16_ROWS, 3 * BF16_ROWS // 2 + 7])
@pytest.mark.parametrize("make", FEED_FORWARDS)
def test_feed_forwards_take_rows_at_a_time_in_bf16(make: Any, tokens: int) -> None:
    torch.manual_seed(0)
    block = make().bfloat16().eval().requires_grad_(False)
    if not all(copies._rows_alone(inputs, copies._ASKED) for inputs in (64, 192, 256)):
        pytest.skip("this machine's products in bf16 hang on the number of rows: all are taken at once")
    given = torch.randn(2, tokens, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, rows = block(given), []
        feed_forwards_in_rows(block)
        wide = next(layer for layer in block.modules() if isinstance(layer, nn.Linear))
        wide.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2]))
        assert torch.equal(block(given), expected)
        halves = 2 * tokens // BF16_ROWS
        assert len(rows) == max(1, halves) if halves > 1 else rows == [tokens]
        with pytest.MonkeyPatch.context() as patch:  # a product that is a unit of its own is called once
            patch.setattr(wide, "forward", lambda inputs, stock=wide.forward: stock(inputs))
            rows.clear()
            assert torch.equal(block(given), expected) and rows == [tokens]
        name = next(name for name, layer in block.named_modules() if layer is wide)

        class Integers(nn.Linear):
            """What finds a scale of its own for all that it is given."""

            def forward(self, input: Tensor) -> Tensor:
                rows.append(input.shape[-2])
                return super().forward(input)

        other = Integers(wide.in_features, wide.out_features, bias=wide.bias is not None).bfloat16()
        block.set_submodule(name, other)
        rows.clear()
        block(given)
        assert rows == [tokens], "it may not be handed a part"


def test_rows_are_taken_only_where_they_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = ZImageFeedForward(64, 256)
    monkeypatch.setattr(copies, "_rows_alone", lambda inputs, outputs: inputs != 256)
    feed_forwards_in_rows(block)
    assert "forward" not in vars(block)
    monkeypatch.undo()
    block.w1 = nn.Bilinear(64, 1, 256)  # no product that is known
    feed_forwards_in_rows(block)
    assert "forward" not in vars(block)
