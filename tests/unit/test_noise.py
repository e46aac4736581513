"""Noise: diffusers' bits, in any number of pieces, and rectangles of other seeds."""

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.utils.torch_utils import randn_tensor
from files import all_of, rows_of

from stages.canvas.noise import Reroll, canvas_noise, draw, draw_chunks, reroll
from stages.memory import rows
from stages.tiles import Size, Tile

SIZE = Size(24, 40)
BOX = Tile(0, 0, 4, 8, 12, 20)


@pytest.fixture
def noise_of(tmp_path):
    """``canvas_noise`` with its file, as a tensor."""

    def make(*arguments):
        noise, generator = canvas_noise(tmp_path / "noise", *arguments)
        return all_of(noise), generator

    return make


def test_noise_is_diffusers_noise(noise_of):
    noise, generator = noise_of(SIZE, 4, 7)
    reference = torch.Generator().manual_seed(7)
    expected = randn_tensor((1, 4, *SIZE), generator=reference, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(noise, expected)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("numel", [1, 15, 16, 17, 31, 32, 33, 100, 1000, 1007, 4096 + 5])
@pytest.mark.parametrize("chunk", [1, 16, 48, 1024])
def test_pieces_join_up_bitwise(numel, chunk):
    whole, parts = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected = draw((numel,), whole)
    pieces = list(draw_chunks(numel, parts, chunk))
    assert torch.equal(torch.cat(pieces), expected)
    assert max(len(p) for p in pieces) < max(16, chunk) + 16
    assert torch.equal(whole.get_state(), parts.get_state())


@pytest.mark.parametrize("places", [40, 100, 10_000])
def test_a_reroll_changes_its_rectangle_only(noise_of, monkeypatch, places):
    monkeypatch.setattr("stages.memory.rows.BAND", places)
    plain, _ = noise_of(SIZE, 4, 7)
    changed, _ = noise_of(SIZE, 4, 7, [Reroll(BOX, 9)])
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[BOX.index] = True
    assert torch.equal(changed[..., ~inside], plain[..., ~inside])
    assert not (changed == plain)[..., inside].any()
    assert torch.equal(changed[BOX.index], draw((1, 4, *BOX.size), torch.Generator().manual_seed(9)))


def test_epsilon_mixes_and_keeps_the_variance():
    box = Tile(0, 0, 0, 0, 128, 128)
    before = draw((1, 4, 128, 128), torch.Generator().manual_seed(1))

    def mixed(epsilon):
        rows = rows_of(before)
        reroll(rows, [Reroll(box, 2, "epsilon", epsilon)])
        return all_of(rows)

    noise = mixed(0.3)
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    assert float((noise * before).mean()) == pytest.approx((1 - 0.09) ** 0.5, abs=0.02)
    assert torch.equal(mixed(0.0), before)


@pytest.mark.parametrize(
    "bad", [Reroll(Tile(0, 0, 0, 0, 25, 4), 1), Reroll(Tile(0, 0, 3, 3, 3, 4), 1), Reroll(BOX, 1, "epsilon", 1.5)]
)
def test_bad_rectangles_are_refused(bad, noise_of):
    with pytest.raises(ValueError, match=r"reroll\[0\]"):
        noise_of(SIZE, 4, 1, [bad])


@pytest.mark.parametrize("band", [1 << 16, 64])
def test_noise_of_places(noise_of, monkeypatch, band):
    """Drawn as FLUX.2's pipeline draws it, in any bands."""
    monkeypatch.setattr(rows, "BAND", band)
    noise, generator = noise_of(SIZE, 4, 7, (), 2)
    reference = torch.Generator().manual_seed(7)
    drawn = draw((1, 16, SIZE.height // 2, SIZE.width // 2), reference)
    assert torch.equal(noise, Flux2KleinPipeline._unpatchify_latents(drawn))
    assert torch.equal(generator.get_state(), reference.get_state())
