"""The tiled VAE on a tiny stock AutoencoderKL."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from files import all_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.tiles import Size, Tile, grid, whole
from stages.vae.groupnorm import group_var_mean, merge_var_mean, normalise
from stages.vae.shared import SharedStatistics
from stages.vae.tiled import (
    decode_tile,
    decoder_statistics,
    encode_tiled,
    encoder_statistics,
    factor,
    small_canvas,
    to_uint8,
)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    ).eval()


@pytest.fixture(scope="module")
def latents():
    return torch.randn((1, 4, 20, 28), generator=torch.Generator().manual_seed(2)) * 0.9


@torch.no_grad()
def test_a_tile_that_covers_the_canvas_is_the_stock_decode(vae, latents):
    size = Size(20, 28)
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    assert factor(vae) == 4
    assert torch.equal(decode_tile(vae, latents, whole(size)), expected)
    part = Tile(0, 0, 3, 4, 9, 20)
    assert torch.equal(decode_tile(vae, latents, part), expected[:, :, 12:36, 16:80])


@torch.no_grad()
def test_statistics_of_the_canvas_itself_change_nothing(vae, latents):
    expected = decode_tile(vae, latents, whole(Size(20, 28)))
    statistics = decoder_statistics(vae, rows_of(latents), side=28)
    assert len(statistics.norms) == sum(isinstance(m, nn.GroupNorm) for m in vae.decoder.modules())
    assert list(statistics.attentions) == ["decoder.mid_block.attentions.0"]
    with statistics.applied(vae):
        got = decode_tile(vae, latents, whole(Size(20, 28)))
    assert torch.allclose(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(decode_tile(vae, latents, whole(Size(20, 28))), expected)  # nothing stays behind


@torch.no_grad()
def test_shared_statistics_make_tiles_agree_where_they_meet(vae, latents):
    latents = latents.clone()
    latents[..., 14:] *= 0.2  # two halves whose own statistics differ
    size, halo = Size(20, 28), 4
    whole_decode = decode_tile(vae, latents, whole(size))
    tiles = grid(size, Size(20, 14), 0)

    def worst():
        crops = [t.grown(halo, size) for t in tiles]
        parts = [decode_tile(vae, latents[c.index], t.within(c)) for t, c in zip(tiles, crops, strict=True)]
        return float((torch.cat(parts, dim=-1) - whole_decode).abs().mean())

    independent = worst()
    with decoder_statistics(vae, rows_of(latents), side=28).applied(vae):
        shared = worst()
    assert shared < independent / 2


@torch.no_grad()
def test_every_tile_attends_to_the_whole_picture(vae, latents):
    """With the keys and values of the whole, a tile is what it is in the whole decode, attention included."""
    vae = copy.deepcopy(vae)
    vae.decoder.mid_block.attentions[0].to_q.weight *= 6  # sharp: it matters what is attended to
    size = Size(20, 28)
    tiles = grid(size, Size(20, 14), 0)
    crops = [tile.grown(6, size) for tile in tiles]
    whole_decode = decode_tile(vae, latents, whole(size))
    shared = decoder_statistics(vae, rows_of(latents), side=28)

    def error(statistics):
        parts = []
        for tile, crop, one in zip(tiles, crops, statistics, strict=True):
            with one.applied(vae):
                parts.append(decode_tile(vae, latents[crop.index], tile.within(crop)))
        return float((torch.cat(parts, dim=-1) - whole_decode).abs().mean())

    own = [decoder_statistics(vae, rows_of(latents[crop.index]), side=28).attentions for crop in crops]
    to_itself = error([SharedStatistics(norms=shared.norms, attentions=one) for one in own])
    assert error([shared, shared]) < to_itself / 2


@torch.no_grad()
def test_wrapped_forwards_keep_their_wrapping(vae, latents):
    """The memory engine replaces ``forward`` and lends weights only while it runs."""
    expected = decode_tile(vae, latents, whole(Size(20, 28)))
    statistics = decoder_statistics(vae, rows_of(latents), side=28)
    norm = vae.decoder.conv_norm_out
    weight, forward, calls = norm.weight, norm.forward, []

    def lent(x):
        norm.weight = weight
        try:
            calls.append(x.shape)
            return forward(x)
        finally:
            norm.weight = nn.Parameter(torch.empty_like(weight, device="meta"))

    norm.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
    norm.forward = lent
    try:
        with statistics.applied(vae):
            got = decode_tile(vae, latents, whole(Size(20, 28)))
    finally:
        del norm.forward
        norm.weight = weight
    assert len(calls) == 1
    assert torch.allclose(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encode_tiles_give_the_stock_mode(vae):
    pixels = torch.rand((1, 3, 80, 112), generator=torch.Generator().manual_seed(1)) * 2 - 1
    size = Size(20, 28)
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor

    def read(box):
        return pixels[box.index]

    def encoded(*arguments, **options):
        out = rows_of(torch.zeros((1, 4, *size)))
        encode_tiled(vae, *arguments, out, **options)
        return all_of(out)

    assert torch.allclose(encoded(read, [whole(size)], 0), expected, atol=1e-6)
    counted = []
    with encoder_statistics(vae, pixels).applied(vae):
        tiles = grid(size, Size(12, 12), 2)
        got = encoded(read, tiles, 6, done=lambda: counted.append(1))
    assert len(counted) == len(tiles) == 6
    assert got.shape == (1, 4, 20, 28) and got.dtype == torch.float32
    assert float((got - expected).abs().mean()) < 0.05 * float(expected.std())


def test_statistics_survive_the_disk(vae, latents, tmp_path):
    with torch.no_grad():
        statistics = decoder_statistics(vae, rows_of(latents), side=16)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = SharedStatistics.load(tmp_path / "statistics.safetensors")
    for kind in ("norms", "attentions"):
        before, after = getattr(statistics, kind), getattr(loaded, kind)
        assert before and after.keys() == before.keys()
        for name, pair in before.items():
            assert all(torch.equal(a, b) for a, b in zip(after[name], pair, strict=True))


def test_the_small_canvas_has_the_canvas_moments():
    latents = torch.randn(1, 4, 128, 64) * torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1) + 1
    small = small_canvas(rows_of(latents), 32)
    assert small.shape == (1, 4, 32, 16)
    for a, b in zip(torch.std_mean(small, dim=(2, 3)), torch.std_mean(latents, dim=(2, 3)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(small_canvas(rows_of(latents), 128), latents)
    assert torch.isfinite(small_canvas(rows_of(torch.zeros(1, 4, 64, 64)), 8)).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 10**6), st.floats(-50, 50))
def test_merged_statistics_are_those_of_the_whole(rows, seed, offset):
    x = torch.randn((1, 6, sum(rows), 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x + offset * torch.linspace(0, 1, sum(rows)).view(1, 1, -1, 1)).float()
    parts = [group_var_mean(part, 3) for part in x.split(rows, dim=2)]
    var, mean = merge_var_mean(torch.tensor(rows), *(torch.stack(p) for p in zip(*parts, strict=True)))
    whole_var, whole_mean = torch.var_mean(x.double().view(3, -1), dim=1, correction=0)
    assert torch.allclose(mean, whole_mean, atol=1e-5, rtol=1e-5)
    assert torch.allclose(var, whole_var, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_is_group_norm(dtype, memory_format):
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (torch.randn(1, 8, 6, 5) * 3 + 1).to(dtype).contiguous(memory_format=memory_format)
    var, mean = group_var_mean(x, 4)
    norm = norm.to(dtype)
    with torch.no_grad():
        got = normalise(x, var, mean, norm.weight, norm.bias, 1e-6)
        assert got.dtype == dtype
        assert torch.allclose(got.float(), norm(x).float(), atol=1e-5 if dtype == torch.float32 else 0.06)


def test_pixels_become_bytes_as_in_diffusers():
    pixels = torch.rand((1, 3, 33, 17), generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    processor = VaeImageProcessor()
    expected = (processor.postprocess(pixels, output_type="np") * 255).round().astype(np.uint8)
    assert np.array_equal(to_uint8(pixels).permute(0, 2, 3, 1).numpy(), expected)
