"""Canvases in files: rows, windows, sums; and the bytes that safetensors itself would write."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from files import all_of, rows_of
from safetensors.torch import save_file

from stages.memory.rows import Moments, Rows, Window, bands, std_mean

CANVAS = torch.randn((1, 4, 6, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [(0, 6), (2, 3), (5, 6), (3, 3)])
def test_rows_of_any_safetensors_file(tmp_path: Path, rows: tuple[int, int]) -> None:
    save_file({"other": torch.zeros(3), "latents": CANVAS}, tmp_path / "file")
    assert torch.equal(Rows.open(tmp_path / "file").read(*rows), CANVAS[:, :, slice(*rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_file_written_in_rows_is_the_one_that_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    canvas = (CANVAS * 9).abs().to(dtype)
    save_file({"latents": canvas}, tmp_path / "expected")
    rows = Rows.create(tmp_path / "got", (4, 6, 7), dtype)
    assert torch.equal(all_of(rows), torch.zeros_like(canvas))
    for top, bottom in ((4, 6), (0, 1), (1, 4)):
        rows.write(top, canvas[:, :, top:bottom])
    assert (tmp_path / "got").read_bytes() == (tmp_path / "expected").read_bytes()
    rows.zero()
    assert torch.equal(all_of(rows), torch.zeros_like(canvas))
    rows.write_flat(0, canvas.flatten()[:50])
    rows.write_flat(50, canvas.flatten()[50:])
    assert (tmp_path / "got").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("bad", [CANVAS[:, :3], CANVAS[..., 1:], CANVAS.repeat(1, 1, 2, 1)])
def test_rows_that_do_not_fit_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="of a tensor"):
        rows_of(CANVAS).write(0, bad)
    with pytest.raises(ValueError, match="at 5 of a tensor"):
        rows_of(CANVAS).write(5, CANVAS[:, :, :2])


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    save_file({"latents": CANVAS}, tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(ValueError, match="torn"):
        Rows.open(tmp_path / "file")


def test_bands_cover_the_canvas_and_are_bounded() -> None:
    assert bands(256, 256) == [(0, 256)]  # 2048x2048 pixels are one
    for height, width in ((2048, 2048), (8, 100_000), (100_000, 8), (257, 256)):
        found = bands(height, width)
        assert found[0][0] == 0 and found[-1][1] == height
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        assert max(bottom - top for top, bottom in found) == max(1, min(height, (1 << 16) // width))
    assert bands(256, 256, channels=3) == [(0, 256)]
    assert bands(256, 256, channels=16) == [(top, top + 64) for top in range(0, 256, 64)]  # of as many bytes


def test_a_window_adds_boxes_in_any_order() -> None:
    expected, rows = CANVAS.clone(), rows_of(CANVAS)
    window, chance = Window(rows), random.Random(3)
    for index in range(40):
        top, left = chance.randrange(5), chance.randrange(6)
        bottom, right = chance.randrange(top + 1, 7), chance.randrange(left + 1, 8)
        values = torch.full((4, bottom - top, right - left), float(index))
        window.add(top, left, values)
        expected[0, :, top:bottom, left:right] += values
        assert torch.equal(window.box(top, left, bottom, right), expected[0, :, top:bottom, left:right])
    window.flush()
    assert torch.equal(all_of(rows), expected)


@pytest.mark.parametrize("places", [7, 20, 1000])
def test_deviation_and_mean(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    monkeypatch.setattr("stages.memory.rows.BAND", places)
    canvas = CANVAS * torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1) + 100
    for got, wanted in zip(std_mean(rows_of(canvas)), torch.std_mean(canvas, dim=(2, 3), keepdim=True), strict=True):
        assert got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-5)
    moments = Moments(4)
    for _, band in rows_of(canvas).bands():
        moments.add(band)
    for got, wanted in zip(moments.std_mean(together=True), torch.std_mean(canvas), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5)
