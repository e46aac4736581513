"""Regions on other canvases of the same picture, and what of them makes a stage's result."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from stages import PIPELINE, PROFILE
from stages.canvas.views import region_views
from stages.config import ConfigError
from stages.job import Job
from stages.regions.config import Reroll, from_config, parse, uncovered
from stages.regions.scale import lowres_side, scaled
from stages.tiles import Size, Tile
from stages.workflow.complete import complete
from stages.workflow.graph import parameters

LEFT = {"prompt": "snowy mountains", "box": [0, 0, 1088, 1024], "guidance_scale": 3.0, "seed": 4}
RIGHT = {"prompt": "desert ${x}", "box": [960, 0, 2048, 1024], "mode": "replace", "feather": 64}
CANVAS = {"width": 2048, "height": 1024, "prompt": "a valley"}
HALVES = {**CANVAS, "regions": [LEFT, RIGHT], "reroll": [{"box": [0, 0, 64, 64], "seed": 1, "epsilon": 0.1}]}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 16)] * 4), max_size=6), st.integers(1, 40), st.integers(1, 40))
def test_what_is_covered_stays_covered(edges, down, across):
    boxes = [[left * 8, top * 8, right * 8, bottom * 8] for left, top, right, bottom in edges]
    regions = [{"prompt": "x", "box": box} for box in boxes if box[0] < box[2] and box[1] < box[3]]
    plan = parse(regions, size=Size(128, 128), prompt="background")
    found = scaled(plan, Size(down * 8, across * 8))
    assert uncovered(found.size, [region.box for region in found.regions]) is None
    for region in found.regions:
        assert 0 <= region.box.top < region.box.bottom <= down * 8 and not region.box.top % 8
        assert 0 <= region.box.left < region.box.right <= across * 8 and not region.box.right % 8
    assert scaled(plan, plan.size) == plan


def test_a_canvas_of_another_size_has_the_same_regions(make_config):
    config = make_config(HALVES)
    before = from_config(config)
    job = Job.of(config).at(Size(256, 512))
    after = job.regions
    assert (job.config.width, job.config.height) == (512, 256)
    assert [region.prompt for region in after.regions] == ["a valley", "snowy mountains", "desert ${x}"]
    assert [region.box[2:] for region in after.regions[1:]] == [(0, 0, 256, 272), (0, 240, 256, 512)]
    assert after.texts == before.texts and after.regions[2].feather == 16
    assert after.rerolls == (Reroll(Tile(0, 0, 0, 0, 32, 34), 4), Reroll(Tile(0, 0, 0, 0, 2, 2), 1, "epsilon", 0.1))


def test_an_upscaling_phase_has_regions_of_its_own_size(make_config):
    phase = PIPELINE[3]._replace(name="denoise_512", of="denoise", phase=(512, 256))
    config = make_config(HALVES)
    job = Job.of(config)
    assert job.of_stage(phase).regions == job.regions_of(phase) and job.regions_of(phase).size == (256, 512)
    assert job.config.width == 2048 and len(job.config.regions) == 2  # a copy
    plain = Job.of(make_config(CANVAS)).of_stage(phase).config
    assert not plain.regions and not plain.reroll


def test_a_region_that_says_no_guidance_has_its_canvas_own(make_config):
    job = Job.of(make_config(HALVES))
    for stage in (PIPELINE[1], PIPELINE[3]):
        plan = job.regions_of(stage)
        assert [region.guidance_scale for region in plan.regions] == [None, 3.0, None]
        latents = Size(plan.size.height // 8, plan.size.width // 8)
        views = region_views(plan, latents, side=Size(32, 32), overlap=8, blend="cosine", guidance_scale=4.0)
        assert {view.prompt_row: view.guidance_scale for view in views} == {1: 4.0, 2: 3.0, 3: 4.0}


def low(config):
    return Job.of(config).regions_of(PIPELINE[1])


def test_low_res_tiles_are_as_large_as_the_largest_region_within_limits(make_config):
    config = make_config({**CANVAS, "regions": [{**LEFT, "box": [0, 0, 1088, 1024]}, {**RIGHT, "mode": "blend"}]})
    plan = low(config)
    assert plan.size == (config.lowres.height, config.lowres.width) == (256, 512)  # the short side is native
    assert lowres_side(config, plan) == (32, 34)
    small = low(make_config({**CANVAS, "regions": {"grid": [["a", "b", "c"]] * 2}}))
    assert lowres_side(config, small) == (32, 32)  # native: the boxes are smaller
    config = make_config(HALVES)  # with a background over everything
    assert lowres_side(config, low(config)) == (32, 64)
    config = make_config(CANVAS)
    assert min(config.lowres.width, config.lowres.height) < 256
    assert lowres_side(config, low(config)) == (64, 64)


@pytest.mark.parametrize("stage", [stage for stage in (*PIPELINE, PROFILE) if "regions" in stage.parameters])
def test_what_a_stage_makes_of_regions_does_not_depend_on_how_they_are_written(make_config, tmp_path, stage):
    pixels = make_config({**CANVAS, "regions": [{"prompt": "x", "box": [0, 0, 1024, 1024]}]})
    fractions = make_config({**CANVAS, "regions": {"regions": [{"prompt": "x", "area": [0, 1, 0, 0.5]}]}})
    moved = make_config({**CANVAS, "regions": [{"prompt": "x", "box": [0, 0, 1536, 1024]}]})
    found, same, other = (parameters(Job.of(config), stage, tmp_path) for config in (pixels, fractions, moved))
    assert found == same
    assert (found == other) == (stage.name == "text_encode")
    background = {"regions": [{"prompt": "x", "box": [0, 0, 1024, 1024]}], "background": "y"}
    said = parameters(Job.of(make_config({**CANVAS, "regions": background})), stage, tmp_path)
    assert (found == said) == (stage.name == "profile")
    json.dumps(found)


def test_the_size_of_the_canvas_does_not_change_the_low_res_picture(make_config, tmp_path):
    regions = [{"prompt": "x", "box": [0.0, 0.0, 0.5, 1.0]}]
    small, large = (
        make_config({"width": side, "height": side, "prompt": "y", "regions": regions}) for side in (512, 1024)
    )
    assert parameters(Job.of(small), PIPELINE[1], tmp_path) == parameters(Job.of(large), PIPELINE[1], tmp_path)


MIXTURE = {
    "canvas_width": 640,
    "canvas_height": 384,
    "gc": 6,
    "steps": 9,
    "seed": 7,
    "scheduler": "lms",
    "regions": [
        {"area": [0, 384, 0, 384], "prompt": "a house"},
        {"area": [0, 384, 256, 640], "prompt": "a road"},
        {"area": [0, 384, 0, 640], "ref_img": "beside.png", "strength": 0.3},
    ],
}


def written(folder: Path, content: dict) -> str:
    (folder / "canvas.json").write_text(json.dumps(content))
    return str(folder / "canvas.json")


def test_a_file_of_mixture_of_diffusers_decides_what_the_command_line_does_not(make_config, tmp_path):
    (tmp_path / "beside.png").write_bytes(b"picture")
    config = complete(make_config({"regions": written(tmp_path, MIXTURE), "prompt": None}, derive=False)).config
    assert (config.width, config.height, config.seed, config.prompt) == (640, 384, 7, "")
    assert config.denoise.num_inference_steps == 9 and config.lowres.guidance_scale == 6
    assert config.scheduler.class_name == "LMSDiscreteScheduler"
    assert (config.guide.mode, config.guide.image) == ("hold", str(tmp_path / "beside.png"))
    assert [region.prompt for region in from_config(config).regions] == ["a house", "a road"]
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    given = make_config({"regions": written(tmp_path, MIXTURE), "seed": 1}, derive=False)
    config = complete(given, ["seed=1", "prompt='x'", "scheduler=ddim", "regions=canvas.json"]).config
    assert config.seed == 1 and config.scheduler.class_name == "DDIMScheduler" and config.width == 640


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheduler": "lm"}, "regions.scheduler: got 'lm', expected one of"),
        ({"seed": "x"}, "regions (seed): got 'x'"),
        ({"canvas_width": 648}, "nothing for pixels 640,0 to 648,384"),
        ({"canvas_width": 632}, "regions[1].area: got"),
    ],
)
def test_what_such_a_file_cannot_mean_is_refused_before_work(make_config, tmp_path, change, said):
    content = {**MIXTURE, "regions": MIXTURE["regions"][:2], **change}
    with pytest.raises(ConfigError) as error:
        complete(make_config({"regions": written(tmp_path, content)}, derive=False))
    assert said in str(error.value)


def test_regions_that_cannot_work_are_refused_before_work(make_config):
    for regions, said in (
        ([{"prompt": "x", "box": [0, 0, 4096, 8]}], "a box inside the canvas of 2048x2048"),
        ({"regions": [{"prompt": "x", "box": [0, 0, 8, 8]}], "background": False}, "nothing for pixels 8,0 to"),
    ):
        with pytest.raises(ConfigError, match=said):
            complete(make_config({"regions": regions}, derive=False))
    with pytest.raises(ConfigError, match=r"reroll\[0\]\.box"):
        complete(make_config({"reroll": [{"box": [0, 0, 4096, 8], "seed": 1}]}, derive=False))
    with pytest.raises(ConfigError, match="prompt: got None"):
        complete(make_config({"prompt": None}, derive=False))
