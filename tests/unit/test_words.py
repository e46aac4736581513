"""Keys and samplers of other programs: the key that is meant is named, the sampler is understood."""

import re

import pytest

from stages.config import ConfigError
from stages.workflow.grammar import value_of
from stages.workflow.keys import groups
from stages.workflow.overrides import prepare
from stages.workflow.words import meant, sampler


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("steps=20", "denoise.num_inference_steps"),
        ("cfg_scale=7", "denoise.guidance_scale"),
        ("sampler=euler", "scheduler=NAME"),
        ("batch_size=4", "-m seed=1,2,3"),
        ("init_image=a.png", "guide.image"),
        ("denoising_strength=0.3", "denoise.strength"),
        ("model.lora=x", "model.loras=[FILE:0.8]"),
        ("controlnet=x", "model.controlnets"),
        ("vae=x", "model.vae=PATH"),
        ("upscaler=x", "guide.upscale=FILE"),
        ("promt=x", "Did you mean prompt?"),
    ],
)
def test_the_key_that_is_meant(tmp_path, typed: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(ours)):
        prepare([f"output_dir={tmp_path}", "prompt=a", typed])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("euler_a", "euler_ancestral"),
        ("Euler a", "euler_ancestral"),
        ("k_euler", "euler"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpmpp_2m", "dpmpp_2m"),
        ("UniPC", "unipc"),
        ("PLMS", "pndm"),
        ("LCM", "lcm"),
        ("DDIM", "ddim"),
        ("Heun", "heun"),
        ("dpmpp_2m_sde", "dpmpp_2m_sde"),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("dpmpp_sde", "dpmpp_sde"),
    ],
)
def test_samplers_of_other_programs(tmp_path, name: str, option: str) -> None:
    options = groups()["scheduler"]
    assert sampler(name, options) == option
    base = [f"output_dir={tmp_path}", "prompt=a"]
    assert value_of(prepare([*base, f"scheduler={name}"]), "scheduler") == option
    swept = prepare([*base, "-m", f"scheduler={name},lms"])
    assert value_of(swept, "scheduler") == f"{option},lms"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("DPM++ 2S a Karras", "dpmpp_sde"),
        ("dpm_adaptive", "dpmpp_2m"),
        ("DPM++ 3M SDE", "dpmpp_2m_sde"),
        ("DPM2 a", "euler_ancestral"),
    ],
)
def test_samplers_that_are_not_here(tmp_path, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"scheduler: got '.*The nearest is scheduler={near}\."):
        prepare([f"output_dir={tmp_path}", "prompt=a", f"scheduler={name}"])


@pytest.mark.parametrize("flags", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_options_of_a_folder_of_ones_own(tmp_path, flags: list[str]) -> None:
    flags = [flag.format(tmp_path) for flag in flags]
    found = prepare([*flags, f"output_dir={tmp_path}", "prompt=a", "scheduler=mine"])
    assert found[: len(flags)] == flags and value_of(found, "scheduler") == "mine"


def test_a_relative_output_dir_begins_where_files_do(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert value_of(prepare(["output_dir=here", "prompt=a"]), "output_dir") == str(tmp_path / "here")
    assert value_of(prepare(["prompt=a"]), "output_dir") is None


def test_a_seed_of_minus_one_is_drawn_and_said(tmp_path, capsys) -> None:
    drawn = [value_of(prepare([f"output_dir={tmp_path}", "prompt=a", "seed=-1"]), "seed") for _ in range(2)]
    assert drawn[0] != drawn[1] and all(0 <= int(str(seed)) < 2**32 for seed in drawn)
    assert capsys.readouterr().err == "".join(f"seed=-1 draws {seed}\n" for seed in drawn)
    swept = value_of(prepare([f"output_dir={tmp_path}", "prompt=a", "-m", "seed=-1,5,-1"]), "seed")
    assert re.fullmatch(r"\d+,5,\d+", str(swept))


def test_what_is_not_known_elsewhere_either() -> None:
    assert meant("nonsense") == "" and meant("Cfg-Scale").startswith("Here it is denoise.guidance_scale")
