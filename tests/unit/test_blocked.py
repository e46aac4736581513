"""Convolutions whose weights lie as oneDNN computes with them: the bits of torch's, from a file and without a copy."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from stages import blocked
from stages.memory.layout import Layout, Slot
from stages.models.loading import prepared
from stages.techniques.processor import Processor

pytestmark = pytest.mark.torch


class _Given:
    """A source of the weights of ``network``."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = dict(network.named_parameters())

    def read(self, slots: Sequence[Slot], start: int, packed: Tensor) -> None:
        for slot in slots:
            slot.view(packed, start).copy_(self._weights[slot.name])

    def close(self) -> None:
        self._weights = {}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    convolutions = [
        nn.Conv2d(8, 64, 3, padding=1),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(128, 192, 3, padding=1),
        nn.Conv2d(192, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ]
    torch.manual_seed(0)
    for one in convolutions:
        one.requires_grad_(False)
    return nn.Sequential(*convolutions).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wants(dtype: torch.dtype) -> bool:
    """Whether oneDNN wants blocks here; elsewhere nothing may change."""
    one = nn.Conv2d(64, 64, 3, padding=1)
    blocked.lay_out(one, dtype)
    return hasattr(one, "block")


@pytest.fixture(scope="module")
def blocks() -> bool:
    return wants(torch.float32)


def opened(changed: nn.Sequential, given: nn.Module, name: str) -> Layout:
    """``changed`` with the weights of ``given``, as its layout packs them."""
    Processor(name, convolutions=True).on_model(changed, "unet")
    layout = Layout(changed, DTYPES[name], channels_last=True)
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    blocked.BlockedSource(_Given(given)).read(list(layout.slots.values()), 0, packed)
    for name, slot in layout.slots.items():
        index, kind = name.split(".")
        setattr(changed[int(index)], kind, nn.Parameter(slot.view(packed, 0), requires_grad=False))
    return layout


@pytest.mark.parametrize("name", DTYPES)
def test_the_same_bits(name: str) -> None:
    stock, changed = network(DTYPES[name]), network(DTYPES[name])
    layout = opened(changed, stock, name)
    large = {f"{index}.weight" for index in range(4)}  # a processor without bf16 may want blocks for some of them
    assert set(layout.blocks) == large if wants(DTYPES[name]) else set(layout.blocks) <= large
    image = torch.randn(2, 8, 32, 24, dtype=DTYPES[name])
    for given in (image.contiguous(memory_format=torch.channels_last), image, image[:1]):
        found, expected = changed(given), stock(given)
        assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_nothing_is_left_of_a_call(blocks: bool) -> None:
    """Torch's way to one such tensor keeps it for ever: a kilobyte a call, in the midst of what the call used."""
    if not blocks:
        pytest.skip("oneDNN wants no blocks here")
    changed = network()
    opened(changed, network(), "fp32")
    image = torch.randn(1, 8, 32, 24)

    def left() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    changed(image)
    before = left()
    for _ in range(5):
        changed(image)
    assert left() == before


def test_on_meta_it_has_the_shape_and_needs_nothing_besides(blocks: bool) -> None:
    changed = network().to("meta")
    Processor(convolutions=True).on_model(changed, "unet")
    assert changed(torch.empty(2, 8, 32, 24, device="meta")).shape == (2, 4, 16, 12)
    assert not blocks or "forward" in vars(changed[0])
    Processor(convolutions=True).on_model(other := network(), "vae")
    assert not any("forward" in vars(one) for one in other)


def test_a_block_is_where_its_outputs_were() -> None:
    """So that any slots can be read by themselves."""
    weight = torch.arange(4 * 3 * 2 * 2.0).view(4, 3, 2, 2)
    found = blocked.blocked(weight, 2)
    assert found.shape == (2, 2, 2, 3, 2, 1)
    assert torch.equal(found[1, 0, 1, 2, :, 0], weight[2:, 2, 0, 1])
    assert set(found[0].flatten().tolist()) == set(weight[:2].flatten().tolist())


def test_a_machine_that_wants_other_blocks_has_a_copy_of_its_own(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from stages.models import loading

    given = network()
    monkeypatch.setattr(loading, "source", lambda built, techniques: _Given(given))
    names = set()
    for block in (None, (16, 1), (32, 1)):
        layout = Layout(given, torch.float32, channels_last=True)
        layout.slots = {
            name: slot._replace(block=block if slot.channels_last else None) for name, slot in layout.slots.items()
        }
        built = loading.Built(given, layout, {}, None)  # type: ignore[arg-type]
        names.add(prepared(built, (), tmp_path / "copy.bin").name)
    assert len(names) == 3 and "copy.bin" in names


def test_where_torch_has_no_such_tensors_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_made", lambda: None)
    changed = network()
    Processor(convolutions=True).on_model(changed, "unet")
    assert not any("forward" in vars(one) for one in changed)


def test_a_torch_that_takes_none_of_them_computes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise RuntimeError("not in this torch")

    monkeypatch.setattr(blocked, "_alias", refused)
    blocked.wanted.cache_clear()
    one = nn.Conv2d(64, 64, 3, padding=1)
    blocked.lay_out(one)
    blocked.wanted.cache_clear()
    assert "forward" not in vars(one)
