"""A picture's own settings as the base of a run: ours and A1111's."""

import json
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stages.config import ConfigError
from stages.documents import load
from stages.stitch import parameters, settings
from stages.workflow.from_image import read
from stages.workflow.keys import groups, known_keys
from stages.workflow.overrides import prepare

A1111 = """a (lighthouse:1.2), <lora:oil:0.7>
on a cliff
Negative prompt: blurry,
text
Steps: 22, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5, Denoising strength: 0.35, Clip skip: 2, Hires upscale: 2, Hires upscaler: Latent, ENSD: 31337, \
Lora hashes: "oil: abc, x: def", Version: v1.10.1"""


def picture(path, texts):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_itxt(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def look(path, *given):
    return read(path, groups(), known_keys(), set(given))


def test_our_own_picture_is_made_again(toy, tmp_path):
    words = ["prompt=a, ${x} 'it' {b}", 'negative_prompt=no: "text"', "seed=7", "scheduler=unipc", "width=1000"]
    words += ["regions=[{prompt: left, box: [0,0,0.5,1]}]", "denoise.strength=0.6", "+scheduler.options.solver_order=3"]
    assert toy("run=one", *words).returncode == 0
    first = load(toy.output_dir / "one" / "config.yaml")
    texts = {"highres_lowram": json.dumps(settings(first)), "parameters": parameters(first)}
    file = picture(tmp_path / "a, b.png", texts)
    done = toy("run=two", f"from_image={file}")
    assert done.returncode == 0, done.stderr
    second = load(toy.output_dir / "two" / "config.yaml")
    for key in (
        "prompt",
        "negative_prompt",
        "seed",
        "width",
        "scheduler",
        "regions",
        "denoise",
        "lowres",
        "guide",
        "decode",
    ):
        assert second[key] == first[key], key
    assert toy("run=three", f"from_image={file}", "seed=8").returncode == 0
    third = load(toy.output_dir / "three" / "config.yaml")
    assert (third.seed, third.prompt) == (8, first.prompt)
    assert "from_image" not in (toy.output_dir / "three" / "overrides.json").read_text()


def test_what_a1111_says_and_what_it_does_not(tmp_path):
    found = look(picture(tmp_path / "x.png", {"parameters": A1111}))
    values = found.values
    assert values["prompt"] == "a (lighthouse:1.2), <lora:oil:0.7>\non a cliff"
    assert values["negative_prompt"] == "blurry,\ntext"
    assert (values["width"], values["height"], values["lowres.width"], values["lowres.height"]) == (
        1024,
        1536,
        512,
        768,
    )
    assert (values["scheduler"], values["seed"], values["text_encode.clip_skip"]) == ("dpmpp_2m_karras", 42, 1)
    assert (values["denoise.strength"], values["denoise.guidance_scale"]) == (0.35, 6.5)
    assert values["lowres.num_inference_steps"] == values["denoise.num_inference_steps"] == 22
    said = "; ".join(found.unknown)
    for part in ("model.path", "model.lora_dir", "ENSD: 31337", "Hires upscaler: Latent", "oil: abc, x: def"):
        assert part in said
    fewer = look(tmp_path / "x.png", "model.path", "model.lora_dir", "width")
    assert "model" not in "".join(fewer.unknown) and "lowres.width" not in fewer.values


def test_a_comment_of_exif_is_read(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "ein Haus\nSteps: 5, Sampler: Euler a, Seed: 3".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    values = look(tmp_path / "x.jpg").values
    assert (values["prompt"], values["scheduler"], values["seed"]) == ("ein Haus", "euler_ancestral", 3)


def test_ours_names_what_it_does_not_hold(tmp_path):
    said = {"prompt": "a", "model": {"name": "mine", "loras": [{"name": "oil", "scale": 0.7}], "controlnets": [{}]}}
    said["model"]["embeddings"] = ["mystyle"]
    said |= {"guide": {"fit": "crop", "image": "/etc/x", "upscale": "x4.safetensors"}, "future": {"key": 1}}
    said |= {"score": "os:remove", "output_dir": "/"}
    found = look(picture(tmp_path / "x.png", {"highres_lowram": json.dumps(said)}))
    assert found.values["prompt"] == "a <lora:oil:0.7>" and set(found.values) == {"prompt", "guide.fit"}
    text = "; ".join(found.unknown)
    for part in (
        "model=mine",
        "guide.image",
        "model.controlnets",
        "future",
        "model.lora_dir",
        "model.path",
        "x4",
        "score",
    ):
        assert part in text


def test_no_pixel_is_decoded(tmp_path):
    """16384x16384 of them are 805 MB, which Pillow refuses, or its ``getexif`` of a PNG reads."""
    file = picture(tmp_path / "x.png", {"highres_lowram": '{"prompt": "a"}'})
    head = struct.pack(">4sIIBBBBB", b"IHDR", 16384, 16384, 8, 2, 0, 0, 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:])
    assert look(file).values["prompt"] == "a"


@pytest.mark.parametrize("said", [{"model": {"loras": 5}}, {"model": {"embeddings": 5}}, {"seed": 1e400}])
def test_values_of_other_kinds_are_no_traceback(tmp_path, said):
    assert look(picture(tmp_path / "x.png", {"highres_lowram": json.dumps({"prompt": "a"} | said)})).values


def test_what_a_picture_says_stays_text(tmp_path, capsys):
    said = {"prompt": "${oc.env:HOME}", "\x1b[2J": 1, "scheduler": {"options": {"a=1 output_dir": "x"}}}
    file = picture(tmp_path / "x.png", {"highres_lowram": json.dumps(said)})
    found = prepare([f"from_image={file}", f"output_dir={tmp_path}"])
    assert "prompt='\\${oc.env:HOME}'" in found and not any("scheduler" in text for text in found)
    assert "?[2J" in capsys.readouterr().err
    picture(file, {"highres_lowram": json.dumps({"prompt": "a", "regions": [{"${oc.env:HOME}": 1}]})})
    with pytest.raises(ConfigError, match="regions: got"):
        prepare([f"from_image={file}", f"output_dir={tmp_path}"])


def test_a1111_of_which_a_part_is_known(tmp_path):
    text = "a\nSteps: 5, Sampler: DPM++ 2M, Schedule type: SGM Uniform, Size: 8x8, Hires upscale: inf"
    found = look(picture(tmp_path / "x.png", {"parameters": text}))
    assert found.values["scheduler"] == "dpmpp_2m"
    assert {"Schedule type: SGM Uniform", "Hires upscale: inf"} <= set(found.unknown)


def test_a_comment_of_a_camera_is_no_prompt(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0Screenshot"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    with pytest.raises(ConfigError, match="a picture that says how it was made"):
        look(tmp_path / "x.jpg")


@pytest.mark.parametrize("texts", [{}, {"highres_lowram": "[1]"}, {"highres_lowram": "{"}, {"Comment": "x"}])
def test_a_picture_that_says_nothing_is_refused(tmp_path, texts):
    with pytest.raises(ConfigError, match="from_image: got"):
        look(picture(tmp_path / "x.png", texts))


def test_no_picture_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("no")
    for name, expected in (("x.png", "a picture that can be read"), ("absent.png", "a file with a picture")):
        with pytest.raises(ConfigError, match=f"from_image: .*{expected}"):
            look(tmp_path / name)
