"""The exact tiled VAE against the whole-image pass of the stock model."""

import random

import pytest
import torch
from diffusers import AutoencoderKL

from stages.tiles import Size
from stages.vae import exact
from stages.vae.exact_attention import RunningAttention
from stages.vae.exact_program import INPUT, Shape, program, shapes
from stages.vae.exact_size import disk_bytes, last_use
from stages.vae.exact_vae import exact_decode, exact_disk_bytes, exact_encode
from stages.vae.tiled import to_uint8

SIZE = Size(18, 26)


def make_vae(**changes):
    torch.manual_seed(0)
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    vae = AutoencoderKL(**config | changes).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:  # norms that do something
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return vae


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def latents():
    latents = torch.randn((1, 4, *SIZE), generator=torch.Generator().manual_seed(2))
    latents[..., 12:] *= 0.2  # no tile has the statistics of the whole
    return latents


def rows_of(tensor):
    return lambda top, bottom: tensor[:, :, top:bottom]


def captured(vae, latents, folder, monkeypatch, **options):
    """The decode's float pixels, taken before they become bytes."""
    strips = []
    run = exact.ExactPass.run

    def spy(self, source, sink):
        run(self, source, lambda top, strip: (strips.append((top, strip.clone())), sink(top, strip)))

    monkeypatch.setattr(exact.ExactPass, "run", spy)
    exact_decode(vae, rows_of(latents), SIZE, folder, **options)
    tops = [top for top, _ in strips]
    assert tops == sorted(tops)
    return torch.cat([strip for _, strip in strips], dim=2), len(strips)


@torch.no_grad()
@pytest.mark.parametrize("working_bytes", [1, 40_000, 1 << 30])
@pytest.mark.parametrize(
    "changes", [{}, {"use_post_quant_conv": False, "shift_factor": 0.1}, {"mid_block_add_attention": False}]
)
def test_decode_fp32(working_bytes, changes, latents, tmp_path, monkeypatch):
    vae = make_vae(**changes)
    expected = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    got, count = captured(vae, latents, tmp_path, monkeypatch, working_bytes=working_bytes)
    assert count == (1 if working_bytes > 1e6 else count) and (working_bytes > 1e6 or count > 3)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert [path.name for path in tmp_path.iterdir()] == ["pixels.u8"]


@torch.no_grad()
def test_decode_bf16(vae, latents, tmp_path, monkeypatch):
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    half = make_vae().bfloat16()
    stock = half.decode((latents / vae.config.scaling_factor).bfloat16()).sample.float()
    got, _ = captured(half, latents, tmp_path, monkeypatch, working_bytes=40_000)
    assert got.dtype == torch.bfloat16
    peak = float(expected.max() - expected.min())

    def psnr(a, b):
        return float(10 * torch.log10(peak**2 / (a.float() - b.float()).square().mean()))

    assert psnr(got, stock) >= 50
    assert psnr(got, expected) >= psnr(stock, expected) - 1  # no further from the truth than the stock bf16 decode


@torch.no_grad()
@pytest.mark.parametrize("working_bytes", [1, 60_000, 1 << 30])
def test_encode_fp32(vae, working_bytes, tmp_path):
    pixels = torch.rand((1, 3, SIZE.height * 4, SIZE.width * 4), generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    got = torch.zeros_like(expected)

    def put(top, rows):
        got[:, :, top : top + rows.shape[2]] = rows

    exact_encode(vae, rows_of(pixels), SIZE, tmp_path, put, working_bytes=working_bytes)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_boxes_of_the_pixels(vae, latents, tmp_path):
    expected = to_uint8(vae.decode(latents / vae.config.scaling_factor).sample)
    pixels = exact_decode(vae, rows_of(latents), SIZE, tmp_path, working_bytes=100_000)
    difference = pixels.box(8, 20, 60, 100).int() - expected[:, :, 8:60, 20:100].int()
    assert int(difference.abs().max()) <= 1
    pixels.remove()


class Killed(Exception):
    """Stands for SIGKILL in a place of our choice."""


@torch.no_grad()
def test_a_killed_decode_goes_on_layer_by_layer(vae, latents, tmp_path):
    names = [layer.name for layer in program(vae, "decode")]
    whole = exact_decode(vae, rows_of(latents), SIZE, tmp_path / "whole", working_bytes=50_000)
    expected = whole.read(0, SIZE.height * 4)
    ran = []
    for kill_at in (2, 4, 9, len(names) - 1):
        started = []

        def mark(name, kill_at=kill_at, started=started):
            if names.index(name) == kill_at:
                raise Killed
            started.append(name)

        with pytest.raises(Killed):
            exact_decode(vae, rows_of(latents), SIZE, tmp_path / "work", working_bytes=50_000, mark=mark)
        ran += started
    assert ran == names[:-1]  # each layer once
    # a layer that was cut short leaves a file that is not whole: it is made again
    shares = []
    got = exact_decode(
        vae, rows_of(latents), SIZE, tmp_path / "work", working_bytes=50_000, mark=ran.append, advance=shares.append
    )
    assert ran == names
    assert torch.equal(got.read(0, SIZE.height * 4), expected)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_a_lost_activation_starts_over(vae, latents, tmp_path):
    def mark(name):
        if name.endswith("conv_out"):
            raise Killed

    with pytest.raises(Killed):
        exact_decode(vae, rows_of(latents), SIZE, tmp_path, mark=mark)
    (kept,) = tmp_path.glob("*.raw")
    kept.write_bytes(kept.read_bytes()[:-1])
    ran = []
    exact_decode(vae, rows_of(latents), SIZE, tmp_path, mark=ran.append).remove()
    assert ran == [layer.name for layer in program(vae, "decode")]


@torch.no_grad()
def test_disk_use_is_as_planned(vae, latents, tmp_path):
    planned = exact_disk_bytes(vae, "decode", SIZE, 4)
    seen = []

    def advance(_):
        seen.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    exact_decode(vae, rows_of(latents), SIZE, tmp_path, working_bytes=20_000, advance=advance).remove()
    assert 0.8 * planned <= max(seen) <= planned * 1.01 + 4096


def test_the_plan_needs_no_weights():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    given = Shape(4, Size(256, 256))
    layers = program(vae, "decode")
    found = shapes(layers, given)
    assert found[layers[-1].name] == Shape(3, Size(2048, 2048))
    assert set(last_use(layers)) == {INPUT, *(layer.name for layer in layers[:-1])}
    # the first resnet of the last block: 256 channels in, 128 between and 128 out, at 2048 x 2048
    assert disk_bytes(layers, found, 2) == 2 * 2048**2 * (256 + 128 + 128)


def test_unknown_blocks_are_refused():
    vae = AutoencoderKL(up_block_types=("AttnUpDecoderBlock2D",), block_out_channels=(32,))
    with pytest.raises(ValueError, match=r"has attention.*decode\.mode=shared"):
        program(vae, "decode")


def test_attention_in_chunks_is_attention():
    query, key, value = torch.randn((3, 2, 50, 16), generator=torch.Generator().manual_seed(0)) * 3
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    chunks = list(zip(key.split(7, dim=1), value.split(7, dim=1), strict=True))
    random.Random(0).shuffle(chunks)
    running = RunningAttention(query)
    for chunk in chunks:
        running.add(*chunk)
    assert torch.allclose(running.result(), expected, atol=1e-5)


def test_weights_are_held_for_each_layer(vae, latents, tmp_path):
    from contextlib import contextmanager

    held, order = [], []

    @contextmanager
    def hold(module):
        held.append(module)
        order.append(type(module).__name__)
        yield
        held.remove(module)

    def mark(name):
        assert not held

    exact_decode(vae, rows_of(latents), SIZE, tmp_path, hold=hold, mark=mark).remove()
    assert order[:4] == ["Conv2d", "Conv2d", "GroupNorm", "Conv2d"] and order.count("Attention") == 1
    assert order[-2:] == ["GroupNorm", "Conv2d"] and not held
