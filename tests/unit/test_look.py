"""The small picture and the crops of a large one are those of the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.look import look
from stages.documents import save_text
from stages.tiles import latent_grid


@pytest.mark.parametrize(("width", "height"), [(600, 400), (64, 1000)])
def test_a_look_at_a_run(make_config: Callable[..., DictConfig], tmp_path: Path, width: int, height: int) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    config = make_config({"width": width, "height": height})
    (tmp_path / "decode" / "tiles").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(save_text(config))
    for tile in latent_grid(width, height, config.decode.tile_size, config.decode.overlap, 8):
        pixels = np.ascontiguousarray(picture[tile.scaled(8).slices].transpose(2, 0, 1))
        save_file({"pixels": pixels}, tmp_path / "decode" / "tiles" / f"{tile.name}.safetensors")
    small, *crops = (np.asarray(Image.open(path)) for path in look(tmp_path, tmp_path / "look", side=200, crop=128))
    every = -(-max(width, height) // 200)
    assert small.shape == (-(-height // every), -(-width // every), 3)
    assert np.abs(small[0, 0] - picture[:every, :every].mean(axis=(0, 1))).max() <= 0.5
    last = picture[(small.shape[0] - 1) * every :, (small.shape[1] - 1) * every :]
    assert np.abs(small[-1, -1] - last.mean(axis=(0, 1))).max() <= 0.5
    for crop, (x, y) in zip(crops, [(1, 1), (3, 1), (1, 3), (3, 3)], strict=True):
        left = max(0, min(x * width // 4 - 64, width - 128))
        top = max(0, min(y * height // 4 - 64, height - 128))
        assert np.array_equal(crop, picture[top : top + 128, left : left + 128])
