"""The rolling VAE on tiny stock models: a whole decode and encode, strip by strip, begun anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from files import rows_of
from torch import Tensor

from stages.tiles import Size, Tile, grid
from stages.vae import rolling, rolling_schedule, rolling_vae
from stages.vae.exact_program import program, shapes
from stages.vae.exact_vae import given_shape
from stages.vae.rolling_schedule import Schedule
from stages.vae.rolling_vae import RollingEncode, decoded_rows, rolled_tiles, small_statistics
from stages.vae.tiled import from_vae, to_uint8, to_vae

SIZE = Size(26, 22)


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return AutoencoderKL(**config).eval()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn((1, 4, *SIZE), generator=torch.Generator().manual_seed(2)) * 0.9


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips of every layer."""
    monkeypatch.setattr(rolling_schedule, "PIECE_BYTES", 40_000)


@pytest.fixture
def statistics(vae: Any, latents: Tensor, tmp_path: Any) -> Any:
    return small_statistics(vae, "decode", to_vae(vae, latents), tmp_path / "scratch")


def whole(parts: Any) -> Tensor:
    return torch.cat([strip for _, strip in parts], dim=2)


@torch.no_grad()
def test_with_statistics_of_the_canvas_it_is_the_stock_decode(vae: Any, latents: Tensor, statistics: Any) -> None:
    expected = to_uint8(vae.decode(to_vae(vae, latents), return_dict=False)[0])
    parts = list(decoded_rows(vae, rows_of(latents), (0, 22), statistics))
    assert len(parts) > 5
    assert int((whole(parts).int() - expected.int()).abs().max()) <= 1


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 13, 50, 103])
def test_begun_in_the_middle_it_gives_the_same_bits(vae: Any, latents: Tensor, statistics: Any, first: int) -> None:
    parts = list(decoded_rows(vae, rows_of(latents), (0, 22), statistics))
    later = list(decoded_rows(vae, rows_of(latents), (0, 22), statistics, first))
    assert later[0][0] <= first and (len(later) < len(parts)) == (first > 1)
    for (top, strip), (same, expected) in zip(later, parts[-len(later) :], strict=True):
        assert top == same and torch.equal(strip, expected)


@torch.no_grad()
@pytest.mark.parametrize("widest", [1, 50])
def test_tiles_are_cut_from_it_whatever_the_bands(
    vae: Any, latents: Tensor, statistics: Any, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(decoded_rows(vae, rows_of(latents), (0, 22), statistics))[0]
    monkeypatch.setattr(rolling_vae, "WIDEST", widest)
    tiles = grid(SIZE, Size(9, 8), 2)
    found = dict(rolled_tiles(vae, rows_of(latents), tiles, tiles, statistics))
    assert found.keys() == set(tiles)
    for tile, pixels in found.items():
        assert int((pixels.int() - expected[tile.scaled(4).index].int()).abs().max()) <= (widest == 1)
    some = dict(rolled_tiles(vae, rows_of(latents), tiles, tiles[7:9], statistics))
    assert some.keys() == set(tiles[7:9]) and all(torch.equal(pixels, found[tile]) for tile, pixels in some.items())


@torch.no_grad()
@pytest.mark.parametrize("widest", [20, 50])
def test_encode_is_the_stock_mode(vae: Any, tmp_path: Any, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand((1, 3, SIZE.height * 4, SIZE.width * 4), generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = from_vae(vae, vae.encode(pixels, return_dict=False)[0].mode())
    statistics = small_statistics(vae, "encode", pixels, tmp_path / "scratch")
    monkeypatch.setattr(rolling_vae, "WIDEST", widest)
    encode, got = RollingEncode(vae, SIZE, statistics), torch.zeros_like(expected)

    def read(box: Tile) -> Tensor:
        return pixels[box.index]

    found = dict(encode.rows(read))
    assert list(found) == encode.boxes and (len({box.col for box in encode.boxes}) == 1) == (widest == 50)
    for box, part in found.items():
        got[box.index] = part
    assert torch.allclose(got, expected, atol=1e-4)
    assert all(torch.equal(part, found[box]) for box, part in encode.rows(read, 3))


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_what_is_alive_is_what_was_planned(vae: Any, direction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = program(vae, direction)
    given = given_shape(vae, direction, SIZE)
    schedule, kept, highest = Schedule(layers, shapes(layers, given), 4), dict[int, Any](), 0
    append = rolling._Kept.append

    def counted(self: Any, strip: Tensor) -> None:
        nonlocal highest
        append(self, strip)
        kept[id(self)] = self
        highest = max(highest, sum(one._rows.nbytes for one in kept.values()))

    monkeypatch.setattr(rolling._Kept, "append", counted)
    names = {module: name for name, module in vae.named_modules()}
    ones = {names[one.norm]: (torch.ones(8), torch.zeros(8)) for one in layers if one.norm is not None}
    keys = torch.zeros(1, 1, 5, 32)
    pairs = {one.name: (keys, keys) for one in layers if one.attention is not None}
    statistics = rolling_vae.SharedStatistics(norms=ones, attentions=pairs)
    steps = rolling.RollingPass(layers, given, statistics, names, dtype=torch.float32)
    rows = sum(
        strip.shape[2]
        for _, strip in steps.rows(lambda a, b: torch.zeros((1, given.channels, b - a, given.size.width)))
    )
    assert rows == steps.schedule.last_cuts[-1]
    assert 0.5 * max(schedule.peaks().values()) < highest <= max(schedule.peaks().values())
