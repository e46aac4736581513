"""Regions: what may be written, what is refused and how, and mixture-of-diffusers' own files."""

import io
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from stages.config import ConfigError
from stages.regions.config import Reroll, from_config, parse, uncovered
from stages.regions.files import overrides
from stages.regions.sketch import sketch
from stages.schema import Config
from stages.tiles import Size, Tile

SIZE = Size(1024, 2048)
LEFT = {"prompt": "snowy mountains", "box": [0, 0, 1088, 1024]}
RIGHT = {"prompt": "desert", "box": [960, 0, 2048, 1024]}


def test_pixels_and_fractions_and_defaults():
    written = [LEFT, {"prompt": "desert", "box": [0.46875, 0, 1, 1], "guidance_scale": 3, "mask_type": "quartic"}]
    plan = parse(written, size=SIZE, prompt="main", negative_prompt="blurry")
    first, second = plan.regions
    assert first.box[2:] == (0, 0, 1024, 1088) and second.box[2:] == (0, 960, 1024, 2048)
    assert (first.guidance_scale, second.guidance_scale, second.mask_type) == (None, 3, "quartic")
    assert plan.texts == (("main", "blurry"), ("snowy mountains", "blurry"), ("desert", "blurry"))


def test_the_main_prompt_is_the_background_of_what_is_left():
    plan = parse([LEFT], size=SIZE, prompt="a valley")
    assert [r.prompt for r in plan.regions] == ["a valley", "snowy mountains"]
    assert plan.regions[0].box == Tile(0, 0, 0, 0, 1024, 2048) and plan.regions[0].mask_type == "constant"
    plan = parse({"regions": [LEFT, RIGHT], "background": {"prompt": "a valley", "weight": 0.1}}, size=SIZE)
    assert [r.weight for r in plan.regions] == [0.1, 1, 1]


def test_uncovered_area_is_refused_and_located():
    with pytest.raises(ConfigError, match="nothing for pixels 1088,0 to 2048,1024"):
        parse([LEFT], size=SIZE)
    with pytest.raises(ConfigError, match="nothing for pixels 1088,0"):
        parse({"regions": [LEFT], "background": False}, size=SIZE, prompt="a valley")
    with pytest.raises(ConfigError, match="nothing for pixels 960,0"):  # a feathered edge needs something below
        parse([LEFT | {"box": [0, 0, 960, 1024]}, RIGHT | {"mode": "replace", "feather": 64}], size=SIZE)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=8))
def test_the_uncovered_part_is_really_uncovered(edges):
    size = Size(12, 12)
    boxes = [Tile(0, 0, a, b, c, d) for a, b, c, d in edges if a < c and b < d]
    covered = [
        [any(t.top <= y < t.bottom and t.left <= x < t.right for t in boxes) for x in range(12)] for y in range(12)
    ]
    hole = uncovered(size, boxes)
    if hole is None:
        assert all(map(all, covered))
    else:
        assert not any(covered[y][x] for y in range(hole.top, hole.bottom) for x in range(hole.left, hole.right))


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"box": [0, 0, 2056, 1024]}, "regions[0].box", "inside the canvas of 2048x1024"),
        ({"box": [0, 0, 100, 1024]}, "regions[0].box", "multiples of 8"),
        ({"box": [8, 0, 8, 1024]}, "regions[0].box", "inside the canvas"),
        ({"box": [0, 0, 8]}, "regions[0].box", "[left, top, right, bottom]"),
        ({"box": [0, 0, float("inf"), 8]}, "regions[0].box", "[left, top, right, bottom]"),
        ({"box": None}, "regions[0]", "a box"),
        ({"area": [0, 8, 0, 8]}, "regions[0]", "a box"),
        ({"promt": "x"}, "regions[0].promt", "Did you mean prompt?"),
        ({"prompt": None}, "regions[0].prompt", "a text"),
        ({"mask_type": "gausian"}, "regions[0].mask_type", "Did you mean gaussian?"),
        ({"mode": "over"}, "regions[0].mode", "blend, replace"),
        ({"weight": -1}, "regions[0].weight", "0 to"),
        ({"weight": 0}, "regions[0].weight", "more than 0"),
        ({"seed": 1.5}, "regions[0].seed", "whole number"),
        ({"epsilon": 0.1}, "regions[0].epsilon", "a seed beside it"),
        ({"guidance_scale": True}, "regions[0].guidance_scale", "a number"),
        ({"feather": 4000}, "regions[0].feather", "0 to"),
    ],
)
def test_what_cannot_work_is_refused_by_name(change, key, said):
    with pytest.raises(ConfigError) as error:
        parse([LEFT | change, RIGHT], size=SIZE, prompt="x")
    assert error.value.key == key and said in str(error.value)


def test_a_grid_of_prompts():
    plan = parse({"grid": [["a", "b", {"prompt": "c", "weight": 2}]]}, size=SIZE, overlap=64)
    assert [r.prompt for r in plan.regions] == ["a", "b", "c"] and plan.regions[2].weight == 2
    assert [(r.box.left, r.box.right) for r in plan.regions] == [(0, 712), (648, 1392), (1328, 2048)]
    assert {(r.box.top, r.box.bottom) for r in plan.regions} == {(0, 1024)}
    for bad in ([["a"], ["b", "c"]], [], "ab", [[]], ["ab"]):
        with pytest.raises(ConfigError, match=r"regions\.grid"):
            parse({"grid": bad}, size=SIZE)
    with pytest.raises(ConfigError, match="at most 1 cells"):
        parse({"grid": [["a", "b"]]}, size=Size(8, 8), overlap=0)


def test_rerolls():
    listed = [{"box": [0, 0, 64, 32], "seed": 4}, {"box": [0, 0, 1, 0.5], "seed": 5, "epsilon": 0.1}]
    plan = parse([LEFT | {"seed": 3}, RIGHT], size=SIZE, rerolls=listed)
    assert plan.rerolls == (
        Reroll(Tile(0, 0, 0, 0, 128, 136), 3),
        Reroll(Tile(0, 0, 0, 0, 4, 8), 4),
        Reroll(Tile(0, 0, 0, 0, 64, 256), 5, "epsilon", 0.1),
    )
    for bad in ({"box": [0, 0, 8, 8]}, {"box": [0, 0, 8, 8], "seed": 1, "mode": "mix"}, {"box": 3, "seed": 1}):
        with pytest.raises(ConfigError, match=r"reroll\[0\]"):
            parse([LEFT, RIGHT], size=SIZE, rerolls=[bad])


CANVAS = {
    "canvas_width": 1408,
    "canvas_height": 640,
    "gc": 8,
    "steps": 50,
    "seed": 7178915308,
    "scheduler": "lms",
    "cpu_vae": True,
    "regions": [
        {"area": [0, 640, 0, 640], "prompt": "a house", "mask_type": "gaussian", "mask_weight": 1.5},
        {"area": [0, 640, 384, 1024], "prompt": "a road", "guidance_scale": 6, "mask_type": "quartic"},
        {"row_init": 0, "row_end": 640, "col_init": 768, "col_end": 1408, "prompt": "a robot", "noise_eps": 0.0},
        {"area": [0, 640, 0, 1408], "ref_img": "house.png", "strength": 0.3},
    ],
    "reroll_regions": [{"area": [0, 64, 0, 128], "region_seed": 3, "reroll_mode": "reset"}],
}


def test_a_canvas_file_of_mixture_of_diffusers():
    assert overrides(CANVAS) == {
        "width": 1408,
        "height": 640,
        "denoise.guidance_scale": 8,
        "lowres.guidance_scale": 8,
        "denoise.num_inference_steps": 50,
        "lowres.num_inference_steps": 50,
        "seed": 7178915308,
        "scheduler": "lms",
        "guide.image": "house.png",
        "guide.mode": "hold",
        "guide.hold_steps": 0.3,
        "denoise.strength": 1.0,
    }
    plan = parse(CANVAS, size=Size(640, 1408))
    assert [r.prompt for r in plan.regions] == ["a house", "a road", "a robot"]
    assert [r.box.left for r in plan.regions] == [0, 384, 768]
    assert (plan.regions[0].weight, plan.regions[1].guidance_scale, plan.regions[2].guidance_scale) == (1.5, 6, None)
    assert plan.rerolls == (Reroll(Tile(0, 0, 0, 0, 8, 16), 3),)
    with pytest.raises(ConfigError, match="whole canvas"):
        overrides(CANVAS | {"regions": [{"area": [0, 64, 0, 64], "ref_img": "x.png"}]})
    with pytest.raises(ConfigError, match="Did you mean steps"):
        parse(CANVAS | {"step": 3}, size=Size(640, 1408))


def test_a_tiling_file_of_mixture_of_diffusers():
    tiling = {
        "cpu_vae": True,
        "gc": 8,
        "gc_tiles": [[None, 4.0, None]],
        "prompt": [["a forest", "a wood", "a jungle"]],
        "scheduler": "lms",
        "seed": 639688656,
        "seed_tiles": [[7, None, None]],
        "seed_reroll_regions": [[0, 80, 8, 64, 9]],
        "steps": 50,
        "tile_col_overlap": 256,
        "tile_height": 768,
        "tile_row_overlap": 256,
        "tile_width": 512,
    }
    found = overrides(tiling)
    assert (found["width"], found["height"], found["denoise.tile_size"]) == (1024, 768, 768)
    plan = parse(tiling, size=Size(768, 1024))
    assert [r.box[2:] for r in plan.regions] == [(0, 0, 768, 512), (0, 256, 768, 768), (0, 512, 768, 1024)]
    assert [r.guidance_scale for r in plan.regions] == [None, 4, None]
    assert [r.seed for r in plan.rerolls] == [7, 9]
    assert plan.rerolls[1].box == Tile(0, 0, 0, 1, 10, 8)


def test_our_own_form_overrides_nothing():
    assert overrides([LEFT]) == {} and overrides({"grid": [["a"]]}) == {} and overrides(None) == {}


def test_from_config():
    config = OmegaConf.structured(Config)
    config.prompt, config.width, config.height = "x", 2048, 1024
    config.regions, config.denoise.overlap, config.denoise.guidance_scale = [LEFT, RIGHT], 64, 7.5
    assert [r.prompt for r in from_config(config).regions] == ["snowy mountains", "desert"]
    config.regions, config.reroll = [], [{"box": [0, 0, 8, 8], "seed": 1}]
    plan = from_config(config)
    assert plan.regions == () and plan.texts == (("x", ""),) and len(plan.rerolls) == 1


def test_the_drawing_shows_every_region():
    plan = parse([LEFT, RIGHT | {"mode": "replace", "prompt": "介绍 desert" * 9}], size=SIZE, prompt="a valley")
    with Image.open(io.BytesIO(sketch(plan))) as picture:
        assert picture.size == (640, 320)
        assert len({picture.getpixel((x, 200)) for x in (100, 320, 600)}) == 3


def test_no_torch_is_imported():
    code = "import sys, stages.regions.sketch, stages.regions.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
