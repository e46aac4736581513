"""``guide.upscale=FILE``: a trained upscaler, tile by tile, before the guide is encoded."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Work, look
from PIL import Image
from safetensors.torch import save_file

from stages.config import ConfigError
from stages.memory.rows import Rows
from stages.memory.tensors import read_tensors
from stages.models.upscaler import Upscaler, enlarge, without_torchvision
from stages.picture.picture import Picture
from stages.workflow import validate


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four times, with a few convolutions (Real-ESRGAN's compact kind)."""
    if find_spec("spandrel") is None:
        pytest.skip("needs spandrel")
    shapes, path = [(8, 3), (8, 8), (48, 8)], tmp_path_factory.mktemp("upscaler") / "x4.safetensors"
    torch.manual_seed(0)
    tensors = {}
    for number, (out, channels) in enumerate(shapes):
        tensors[f"body.{2 * number}.weight"] = 0.1 * torch.randn(out, channels, 3, 3)
        tensors[f"body.{2 * number}.bias"] = 0.1 * torch.randn(out)
        if number < 2:
            tensors[f"body.{2 * number + 1}.weight"] = torch.full((8,), 0.1)
    save_file(tensors, path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
    Image.fromarray(pixels).resize((112, 100)).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def test_tiles_give_what_the_whole_gives(file: Path, image: Path, tmp_path: Path) -> None:
    with Image.open(image) as opened:
        picture, array = Picture.of(opened, tmp_path / "picture"), np.array(opened)
    model, tiles = Upscaler(file), list[int]()
    found = enlarge(model, picture, tmp_path / "large", lambda: tiles.append(1))
    assert (found.width, found.height, len(tiles)) == (448, 400, 4)
    whole = model(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)
    assert (found.pixels.read(0, 400).float() - whole * 255).abs().max() <= 0.51
    profile = model.profile(4)
    assert profile.weights == 4 * sum(tensor.numel() for tensor in read_tensors(file).values())
    assert profile.cuts[0].peak(1) > 2 * 4 * 48 * 128 * 128


def test_the_guide_is_made_of_what_it_enlarged(work: Work, file: Path, image: Path) -> None:
    values: dict[str, Any] = {"width": 256, "height": 224, "guide.image": str(image), "guide.upscale": str(file)}
    found = work.run(values, until="guide")
    large = Rows.open(found["guide"] / "enlarged.safetensors", "pixels")
    assert large.shape == (1, 3, 400, 448)
    Image.fromarray(large.read(0, 400)[0].permute(1, 2, 0).numpy()).save(image.with_name("large.png"))
    plain = work.run(
        {**values, "guide.image": str(image.with_name("large.png")), "guide.upscale": "lanczos"}, until="guide"
    )
    assert torch.equal(*(read_tensors(one["guide"] / "latents.safetensors")["latents"] for one in (found, plain)))
    large = work.run({**values, "width": 96, "height": 96}, until="guide")
    assert not (large["guide"] / "enlarged.safetensors").exists() and "left as it is" in " ".join(work.notes)
    profile = look(work.config(values), "guide")["guide"]
    assert [model.component for model in profile.models] == ["upscaler", "vae"] and profile.disk >= 3 * 400 * 448
    moved = image.with_name("moved.safetensors")
    moved.write_bytes(file.read_bytes())
    prints = [
        work.states(work.config({**values, "guide.upscale": str(one)}))["guide"].fingerprint for one in (file, moved)
    ]
    assert prints[0] == prints[1]


def test_a_low_res_picture_is_enlarged_between_decoding_and_encoding(work: Work, file: Path) -> None:
    values = {"width": 256, "height": 256, "lowres.width": 64, "lowres.height": 64, "guide.phases": []}
    found = work.run({**values, "guide.upscale": str(file)}, until="guide")["guide"]
    with Image.open(found / "lowres.png") as preview:
        assert preview.size == (64, 64)
    assert Rows.open(found / "enlarged.safetensors", "pixels").shape == (1, 3, 256, 256)
    assert read_tensors(found / "latents.safetensors")["latents"].shape == (1, 4, 32, 32)


@pytest.mark.parametrize("hidden", [True, False])
def test_what_its_library_asks_for_and_does_not_need(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the models hides torchvision: ``None`` stands in its place."""
    if hidden:
        monkeypatch.setitem(sys.modules, "torchvision", None)
    elif find_spec("torchvision") is not None:
        pytest.skip("torchvision is there")
    with without_torchvision():
        found = importlib.import_module("torchvision.transforms.functional")
        assert found.rotate is None
    assert sys.modules.get("torchvision", 0) is (None if hidden else 0)
    assert "torchvision.transforms" not in sys.modules


def test_what_is_no_upscaler_is_refused(
    work: Work, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, said in (
        ("lanczoz", "Did you mean lanczos"),
        ("x4.pth", "Unpickling"),
        ("x4.safetensors", "current folder"),
    ):
        with pytest.raises(ConfigError, match=rf"guide\.upscale: got .*{said}"):
            work.config({"guide.upscale": given})
    other = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.ones(2)}, other)
    with pytest.raises(ConfigError, match=r"guide\.upscale: got .*spandrel says"):
        look(work.config({"guide.upscale": str(other)}), "guide")
    tensors = read_tensors(file)
    tensors |= {"body.4.weight": torch.ones(3, 8, 3, 3), "body.4.bias": torch.ones(3)}
    save_file(tensors, other)
    with pytest.raises(ConfigError, match="1 times"):
        Upscaler(other)
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"without the package spandrel.*pip install"):
        work.config({"guide.upscale": str(file)})
