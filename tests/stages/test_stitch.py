"""The stitch stage on tiles of known pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import save_file

from stages import PIPELINE, stitch
from stages.config import ConfigError, resolve
from stages.context import StageContext
from stages.picture.tile_strips import TileStrips, feather, segments
from stages.schema import Config
from stages.tiles import latent_grid, spread

Image.MAX_IMAGE_PIXELS = None


def make_config(width, height, **changes):
    config = OmegaConf.structured(Config)
    model = {"name": "tiny", "family": "sd", "path": "nowhere", "native_size": 256}
    base = {"prompt": "a cat", "width": width, "height": height, "model": model, "scheduler": {"name": "euler"}}
    base["decode"] = {"tile_size": 288}
    return resolve(OmegaConf.merge(config, base, changes))


def make_tiles(folder, picture, config, noise=None):
    (folder / "tiles").mkdir(parents=True)
    decode = config.decode
    for tile in latent_grid(config.width, config.height, decode.tile_size, decode.overlap, 8):
        box = tile.scaled(8)
        pixels = np.ascontiguousarray(picture[box.slices].transpose(2, 0, 1))
        save_file({"pixels": pixels}, folder / "tiles" / f"{box.name}.safetensors")


def stitched(tmp_path, picture, **changes):
    config = make_config(picture.shape[1], picture.shape[0], **changes)
    make_tiles(tmp_path / "decode", picture, config)
    (tmp_path / "out").mkdir()
    context = StageContext(
        stage=PIPELINE[-1],
        config=config,
        run_dir=tmp_path,
        output=tmp_path / "out",
        inputs={"decode": tmp_path / "decode"},
    )
    stitch.run(context)
    return tmp_path / "out" / "image.png"


def random_picture(height, width):
    return np.random.default_rng(4).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("width", "height"), [(1000, 520), (72, 1400), (1400, 72), (296, 296)])
def test_tiles_of_a_picture_make_the_picture(tmp_path, width, height):
    picture = random_picture(height, width)
    assert np.array_equal(np.asarray(Image.open(stitched(tmp_path, picture))), picture)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(2, 40), st.integers(0, 39))
def test_shares_add_up_to_one_and_segments_cover(length, tile, overlap):
    spans = spread(length, tile, min(overlap, tile - 1))
    total = np.zeros(length)
    for (start, end), share in zip(spans, feather(spans), strict=True):
        assert (share > 0).all()
        total[start:end] += share
    assert np.allclose(total, 1, atol=1e-6)
    cut = segments(spans, 7)
    assert [s.start for s in cut] == [0, *(s.end for s in cut[:-1])] and cut[-1].end == length
    assert max(s.end - s.start for s in cut) <= 7


def test_overlaps_fade_from_one_tile_to_the_next(tmp_path):
    config = make_config(544, 64)
    (tmp_path / "tiles").mkdir()
    tiles = [t.scaled(8) for t in latent_grid(544, 64, config.decode.tile_size, config.decode.overlap, 8)]
    for value, tile in zip((100, 200), tiles, strict=True):
        flat = np.full((3, *tile.size), value, np.uint8)
        save_file({"pixels": flat}, tmp_path / "tiles" / f"{tile.name}.safetensors")
    row = np.concatenate(list(TileStrips(tmp_path / "tiles", tiles)))[0, :, 0].astype(int)
    assert set(row[: tiles[1].left]) == {100} and set(row[tiles[0].right :]) == {200}
    ramp = row[tiles[1].left : tiles[0].right]
    assert (np.diff(row) >= 0).all() and len(set(ramp)) > 20
    assert np.diff(row).max() < 8  # no step


@pytest.mark.parametrize("prompt", ["a cat", "介绍 ${x} 😀", 'quotes " and\nnewlines, (x:1.2)', "é à", "nul\0"])
def test_the_png_tells_how_it_was_made(tmp_path, prompt):
    picture = random_picture(64, 64)
    file = stitched(tmp_path, picture, prompt=prompt.replace("$", "\\$"), negative_prompt="blurry", seed=5)
    with Image.open(file) as image:
        image.load()
        texts = dict(image.text)
    prompt = prompt.replace("\0", "\ufffd")
    head, _, tail = texts["parameters"].rpartition("\n")
    assert head == f"{prompt}\nNegative prompt: blurry"
    assert tail.startswith("Steps: 20, Sampler: euler, CFG scale: 7.5, Seed: 5, Size: 64x64, Model: tiny, Denoising")
    told = json.loads(texts["highres_lowram"])
    assert told["seed"] == 5 and told["denoise"]["tile_size"] == 256 and told["lowres"]["num_inference_steps"] == 25
    assert "memory" not in told and "run" not in told and "nowhere" not in texts["highres_lowram"]


def test_bytes_depend_on_the_picture_alone(tmp_path):
    picture = random_picture(600, 704)
    files = [
        stitched(tmp_path / str(index), picture, run=f"run{index}", launch={"threads": index + 1}).read_bytes()
        for index in range(3)
    ]
    assert files[0] == files[1] == files[2]


def test_parameters_of_stages_that_took_no_part_are_not_told():
    told = stitch.settings(make_config(64, 64, guide={"mode": "none"}))
    assert "lowres" not in told and "denoise" in told
    told = stitch.settings(make_config(64, 64, guide={"image": "/home/me/photo.png"}))
    assert "lowres" not in told or "num_inference_steps" not in told["lowres"]
    assert "photo" not in json.dumps(told)


def test_a_missing_or_torn_tile_is_named(tmp_path):
    picture = random_picture(64, 600)
    config = make_config(600, 64)
    make_tiles(tmp_path, picture, config)
    context = StageContext(
        stage=PIPELINE[-1], config=config, run_dir=tmp_path, output=tmp_path, inputs={"decode": tmp_path}
    )
    torn = tmp_path / "tiles" / "r00_c01.safetensors"
    whole = torn.read_bytes()
    for broken, said in ((whole[:-5], "torn"), (b"", "is not a tile"), (whole[:40], "is not a tile")):
        torn.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"stitch: .*r00_c01.*{said}.*stage=decode"):
            stitch.run(context)
    torn.unlink()
    with pytest.raises(ValueError, match=r"r00_c01.* is missing"):
        stitch.run(context)
    assert not list(tmp_path.glob("*.png"))


def test_tiff_and_deepzoom(tmp_path):
    picture = random_picture(304, 600)
    png = stitched(tmp_path / "a", picture, stitch={"format": "tiff"})
    tiff = png.with_suffix(".tiff")
    assert tiff.read_bytes()[:4] == b"II+\0"  # BigTIFF
    with Image.open(tiff) as image:
        assert np.array_equal(np.asarray(image), picture)
    png = stitched(tmp_path / "b", picture, stitch={"format": "deepzoom"})
    assert 'Width="600"' in png.with_suffix(".dzi").read_text()
    level = max(png.with_name("image_files").iterdir(), key=lambda folder: int(folder.name))
    with Image.open(level / "0_0.png") as image:
        assert np.array_equal(np.asarray(image), picture[:255, :255])
    assert not list(png.parent.glob("checkpoint*"))
    with pytest.raises((ValueError, ConfigError), match=r"stitch\.format"):
        stitch.convert(png, "jpeg")


def test_no_torch_is_imported():
    code = "import sys, stages.stitch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_borders_of_the_tiles_are_measured(tmp_path):
    tiles = [tile.scaled(8) for tile in latent_grid(704, 600, 288, 32, 8)]
    edge = max(tile.left for tile in tiles)
    picture = random_picture(600, 704) // 8 + 100
    picture[:, edge:] += 60
    folder = stitched(tmp_path, picture).parent
    found = json.loads((folder / "seams.json").read_text())
    assert set(found) == {"denoise", "decode"}
    worst = found["decode"]["borders"][0]
    assert (worst["axis"], worst["position"]) == ("column", edge) and worst["ratio"] > 2
    for name in found:
        with Image.open(folder / f"seams_{name}.png") as heat:
            assert max(heat.size) == 480


def test_regions_have_no_grid_of_denoise_tiles(tmp_path):
    folder = stitched(tmp_path, random_picture(600, 704), regions={"grid": [["a", "b"]]}).parent
    assert set(json.loads((folder / "seams.json").read_text())) == {"decode"}


def test_a_step_with_nothing_around_it_is_a_number(tmp_path):
    tiles = [tile.scaled(8) for tile in latent_grid(704, 600, 288, 32, 8)]
    picture = np.zeros((600, 704, 3), np.uint8)
    picture[:, max(tile.left for tile in tiles) :] = 90
    folder = stitched(tmp_path, picture).parent
    assert json.loads((folder / "seams.json").read_text())["decode"]["borders"][0]["ratio"] == 1000


def test_one_tile_has_no_seams(tmp_path):
    folder = stitched(tmp_path, random_picture(256, 256)).parent
    assert json.loads((folder / "seams.json").read_text()) == {}
