"""A picture in a file is resized and cut as Pillow does it with the whole, first across, to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.canvas.weights import grid_weights
from stages.picture.picture import Picture
from stages.picture.row_blend import RowBlend
from stages.tiles import Size, grid

LANCZOS = Image.Resampling.LANCZOS
WHOLE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (700, 500, 3), np.uint8))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Picture:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.picture.picture._STRIP", 5000)  # ten rows
        return Picture.of(WHOLE, tmp_path_factory.mktemp("picture") / "file")


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.picture.picture._STRIP", 5000)


@pytest.mark.parametrize("extent", [(50, 70), (384, 384), (500, 700), (1000, 1400), (33, 701)])
def test_the_whole_resized(picture: Picture, extent: tuple[int, int]) -> None:
    expected = WHOLE.resize((extent[0], WHOLE.height), LANCZOS).resize(extent, LANCZOS)
    assert np.array_equal(np.asarray(picture.resized(extent)), np.asarray(expected))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_crops_of_the_enlarged_or_reduced_picture(picture: Picture, data: st.DataObject) -> None:
    width, height = data.draw(st.integers(60, 4000)), data.draw(st.integers(60, 4000))
    right, bottom = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    left, top = max(0, right - data.draw(st.integers(1, 150))), max(0, bottom - data.draw(st.integers(1, 150)))
    across, down = WHOLE.width / width, WHOLE.height / height
    region = (left * across, top * down, right * across, bottom * down)
    extent = (right - left, bottom - top)
    narrow = WHOLE.resize((extent[0], WHOLE.height), LANCZOS, box=(region[0], 0, region[2], WHOLE.height))
    expected = narrow.resize(extent, LANCZOS, box=(0, region[1], extent[0], region[3]))
    assert np.array_equal(np.asarray(picture.cut(region, extent)), np.asarray(expected))


def test_saved_and_kept_it_is_the_same(picture: Picture, tmp_path: Path) -> None:
    picture.save_png(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(WHOLE))


@pytest.mark.parametrize("size", [Size(40, 50), Size(100, 33), Size(16, 16), Size(17, 200)])
def test_rows_of_tiles_add_up_to_the_canvas(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.picture.row_blend.STRIP", 150)
    canvas = torch.randn((3, *size), generator=torch.Generator().manual_seed(2))
    tiles, rows = grid(size, Size(16, 16), 4), []
    blend = RowBlend(3, size.width, lambda top, part: rows.append((top, part.clone())))
    for tile, weight in zip(tiles, grid_weights(tiles, size, "cosine"), strict=True):
        blend.add(tile, canvas[tile.index] * weight.map())
    blend.finish()
    assert [top for top, _ in rows] == [sum(part.shape[2] for _, part in rows[:i]) for i in range(len(rows))]
    assert torch.allclose(torch.cat([part for _, part in rows], dim=2)[0], canvas, atol=1e-6)
