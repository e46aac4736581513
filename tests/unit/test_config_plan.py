"""Validation, fingerprints, and what changes them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from stages import PIPELINE
from stages.config import ConfigError, parse_bytes, resolve_dtype
from stages.documents import load, save_text
from stages.files import write_text
from stages.hashes import file_hash
from stages.job import Job
from stages.regions.scale import lowres_side
from stages.workflow import model
from stages.workflow.complete import complete
from stages.workflow.graph import MissingInput, active, asked, build, check_inputs, differences
from stages.workflow.identity import model_identity, resolve_revision
from stages.workflow.store import Store
from stages.workflow.validate import validate

REFUSED = {
    "width": [0, -8, 2047, 65544],
    "height": [4, 1001],
    "seed": [-1, 2**64],
    "denoise.strength": [0, -0.5, 1.01, float("nan")],
    "denoise.num_inference_steps": [0, 1001],
    "lowres.num_inference_steps": [0],
    "lowres.guidance_scale": [-1.0],
    "lowres.width": [250],
    "denoise.tile_size": [0, 100],
    "denoise.overlap": [-8, 256, 12],
    "denoise.blend": ["gausian"],
    "decode.mode": ["exakt"],
    "decode.overlap": [288, 4],
    "decode.halo": [-8, 3],
    "guide.mode": ["sdedt"],
    "guide.image": ["/nowhere/picture.png"],
    "guide.hold_steps": [1.5],
    "guide.upscale": ["bicubic"],
    "technique.dtype": ["float33"],
    "memory.budget": ["250MB", "much", "-5GB"],
    "memory.device_budget": ["some"],
    "memory.enforce": ["on"],
    "device": ["gpu", "cuda:x"],
    "scheduler.class_name": ["DDIM", "os.system"],
    "stitch.compression": [10],
    "stitch.format": ["jpg"],
    "launch.threads": [0],
    "launch.sample_seconds": [0.0],
    "model.path": ["/nowhere", "/nowhere.ckpt", "model.pt"],
    "run": ["a/b", "..", ".hidden", "", "-x"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_a_value_that_cannot_work_is_refused_by_key(make_config, key, value):
    config = make_config({key: value}, derive=False)
    with pytest.raises(ConfigError, match=r"expected") as caught:
        complete(config)
    assert caught.value.key == key


def test_what_is_fine_passes(make_config):
    config = make_config({"seed": 0, "width": 264, "height": 8, "denoise.strength": 1.0, "denoise.guidance_scale": 1.0})
    validate(config)
    validate(make_config({"seed": 2**64 - 1, "model.path": "org/name"}))


def test_close_matches_are_offered(make_config):
    with pytest.raises(ConfigError, match="Did you mean gaussian"):
        complete(make_config({"denoise.blend": "gausian"}))
    with pytest.raises(ConfigError, match="Did you mean denoise"):
        asked(make_config({"stage": "denois"}))


def test_prompt_file(make_config, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("a ${cat}, 介绍\nsecond line\n", encoding="utf-8")
    values = {"prompt": None, "prompt_file": str(file)}
    assert complete(make_config(values)).config.prompt == "a ${cat}, 介绍\nsecond line"
    with pytest.raises(ConfigError, match="either prompt or prompt_file"):
        complete(make_config({"prompt_file": str(file)}))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        complete(make_config(values))
    file.write_text("x" * 1_000_001)
    with pytest.raises(ConfigError, match=r"of 1,000,001 bytes', expected a text of at most 1,000,000 bytes"):
        complete(make_config(values))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="expected a text file"):
        complete(make_config(values))
    file.unlink()
    with pytest.raises(ConfigError, match="can be read"):
        complete(make_config(values))
    with pytest.raises(ConfigError, match=r"runner\.py prompt="):
        complete(make_config({"prompt": None}))


def test_regions_from_a_file(make_config, tmp_path):
    (tmp_path / "r.json").write_text('{"regions": [{"prompt": "${x}", "box": [0, 0, 1, 0.5]}]}')
    config = complete(make_config({"regions": str(tmp_path / "r.json")})).config
    assert config.regions.regions[0].prompt == "${x}"
    with pytest.raises(ConfigError, match="YAML or JSON"):
        complete(make_config({"regions": str(tmp_path / "none.json")}))


def test_parse_bytes():
    assert parse_bytes("800MB") == 800_000_000
    assert parse_bytes("1.5 GiB") == 1610612736
    assert parse_bytes(5) == 5


def test_config_file_round_trip_is_exact(make_config, tmp_path):
    texts = ["${x}", "\\${x}", "???", "a: b # c", "\x85\u2028 x", " padded ", "'\"", "null", "\t\r\n", "🙂介绍", "1e3"]
    for text in texts:
        config = make_config({"prompt": text, "negative_prompt": text})
        write_text(tmp_path / "config.yaml", save_text(config))
        loaded = load(tmp_path / "config.yaml")
        assert loaded.prompt == loaded.negative_prompt == text
        assert OmegaConf.to_container(loaded, resolve=True) == OmegaConf.to_container(config, resolve=True)
    with pytest.raises(ConfigError, match="stage=plan"):
        load(tmp_path / "nowhere.yaml")


def test_dtype_is_decided_without_torch(make_config):
    assert resolve_dtype(make_config()) in ("bf16", "fp32")
    assert resolve_dtype(make_config({"device": "cuda"})) == "fp16"
    assert resolve_dtype(make_config({"technique.dtype": "fp32"})) == "fp32"


def prints(config, tmp_path) -> dict[str, str]:
    return {state.name: state.fingerprint for state in build(Job.of(config), Store(tmp_path / "s"), verify=False)}


CHANGES = {
    "prompt": ("x", "text_encode"),
    "negative_prompt": ("x", "text_encode"),
    "text_encode.clip_skip": (1, "text_encode"),
    "seed": (1, "lowres"),
    "scheduler.class_name": ("PNDMScheduler", "lowres"),
    "scheduler.options": ({"a": 1}, "lowres"),
    "lowres.num_inference_steps": (3, "lowres"),
    "lowres.guidance_scale": (3.0, "lowres"),
    "lowres.width": (128, "lowres"),
    "guide.upscale": ("latent", "guide"),
    "guide.tile_size": (128, "guide"),
    "guide.mode": ("hold", "denoise"),
    "guide.hold_steps": (0.5, "denoise"),
    "guide.skip_residual_power": (1.0, "denoise"),
    "denoise.strength": (0.7, "denoise"),
    "denoise.tile_size": (128, "denoise"),
    "denoise.overlap": (8, "denoise"),
    "denoise.blend": ("cosine", "denoise"),
    "denoise.num_inference_steps": (3, "denoise"),
    "denoise.guidance_scale": (1.0, "denoise"),
    "reroll": ([{"box": [0, 0, 8, 8], "seed": 1}], "lowres"),
    "decode.mode": ("exact", "decode"),
    "decode.tile_size": (128, "decode"),
    "decode.overlap": (16, "decode"),
    "decode.halo": (16, "decode"),
    "stitch.format": ("tiff", "stitch"),
    "stitch.compression": (1, "stitch"),
    "technique.dtype": ("fp16", "text_encode"),
    "technique.channels_last": (False, "lowres"),
    "technique.tf32": (True, "text_encode"),
    "technique.attention": ("math", "lowres"),
    "technique.tome.ratio": (0.5, "lowres"),
    "technique.compile": ("compile", "lowres"),
    "technique.step_cache.interval": (5, "lowres"),
    "technique.vae_tiling": (True, "decode"),
    "device": ("cuda", "text_encode"),
}
IRRELEVANT = {
    "technique.attention": "sdpa",
    "technique.offload": "none",
    "technique.compile": "trace",
    "run": "other",
    "stage": "plan",
    "force": True,
    "progress": False,
    "memory.budget": "4GB",
    "memory.enforce": "off",
    "memory.device_budget": "800MB",
    "memory.host": "disk",
    "memory.prepared": False,
    "launch.threads": 1,
    "launch.sample_seconds": 1.0,
    "output_dir": "/elsewhere",
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_declared_parameter_changes_its_stage_and_all_below(make_config, tmp_path, key):
    value, first = CHANGES[key]
    before, after = prints(make_config(), tmp_path), prints(make_config({key: value}), tmp_path)
    changed = [name for name in before if before[name] != after[name]]
    order = [stage.name for stage in PIPELINE]
    expected = order[order.index(first) :]
    if first == "text_encode" or first == "lowres":
        assert changed == expected
    else:
        assert changed == [name for name in order if name in expected]


@pytest.mark.parametrize("key", IRRELEVANT)
def test_nothing_else_changes_a_fingerprint(make_config, tmp_path, key):
    config = make_config({key: IRRELEVANT[key]})
    assert prints(config, tmp_path) == prints(make_config(), tmp_path)


def test_the_native_size_decides_the_low_res_tiles(make_config, tmp_path):
    fixed = {"lowres.width": 1024, "lowres.height": 1024, "denoise.tile_size": 256}
    configs = [make_config({**fixed, "model.native_size": size}) for size in (256, 512)]
    small, large = (prints(config, tmp_path) for config in configs)
    assert [lowres_side(config, Job.of(config).regions_of(PIPELINE[1])) for config in configs] == [(64, 64), (128, 128)]
    assert small["text_encode"] == large["text_encode"]
    assert all(small[name] != large[name] for name in ("lowres", "guide", "denoise", "decode", "stitch"))


def test_region_boxes_do_not_touch_the_text(make_config, tmp_path):
    base = {"prompt": "snow", "box": [0, 0, 1, 0.75]}
    before = prints(make_config({"regions": [base]}), tmp_path)
    moved = prints(make_config({"regions": [{**base, "box": [0, 0, 1, 0.5]}]}), tmp_path)
    said = prints(make_config({"regions": [{**base, "prompt": "sand"}]}), tmp_path)
    assert before["text_encode"] == moved["text_encode"] != said["text_encode"]
    assert before["denoise"] != moved["denoise"]


def test_stages_without_a_part_are_left_out(make_config, tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"one")
    without = make_config({"guide.mode": "none"})
    assert [stage.name for stage in active(without)] == ["text_encode", "denoise", "decode", "stitch"]
    own = make_config({"guide.image": str(picture)})
    assert [stage.name for stage in active(own)] == ["text_encode", "guide", "denoise", "decode", "stitch"]
    before = prints(own, tmp_path)
    picture.write_bytes(b"two")
    after = prints(own, tmp_path)
    assert before["guide"] != after["guide"]
    assert before["text_encode"] == after["text_encode"]
    with pytest.raises(ConfigError, match="not used here"):
        asked(make_config({"guide.mode": "none", "stage": ["lowres", "denoise"]}))


def test_model_identity_is_of_the_content(make_config, checkpoint, tmp_path):
    config, cache = make_config(), tmp_path / "cache"
    first = model_identity(config, ("unet", "vae", "tokenizer_2"), cache)
    assert set(first) == {"unet", "vae"}
    (checkpoint / "unet" / "weights.bin").write_text("a pickle does not count")
    assert model_identity(config, ("unet", "vae"), cache) == first
    weights = checkpoint / "unet" / "w.safetensors"
    weights.write_bytes(b"1")
    second = model_identity(config, ("unet", "vae"), cache)
    weights.unlink()
    assert second["unet"] != first["unet"]
    assert second["vae"] == first["vae"]
    assert model_identity(config, (), cache) == {}


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x08\0\0\0\0\0\0\0[1, 2]  "])
def test_a_single_file_that_is_none_is_refused_in_words(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.path: got .*x\.safetensors', expected a whole \.safetensors"):
        model._of_file(file)


def test_a_damaged_note_of_a_hash_is_made_again(tmp_path):
    file, cache = tmp_path / "f", tmp_path / "cache"
    file.write_bytes(b"abc")
    first = file_hash(file, cache)
    (note,) = cache.iterdir()
    whole = note.read_bytes()
    for place in range(0, len(whole), 3):
        note.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert file_hash(file, cache) == first, f"byte {place}"
    for text in ("", "[]", '{"sha256": NaN, "whole": 1}', '{"sha256": "x", "key": [], "whole": null}'):
        note.write_text(text)
        assert file_hash(file, cache) == first


def test_file_hash_is_remembered_and_notices_change(tmp_path, monkeypatch):
    file = tmp_path / "f"
    file.write_bytes(b"1")
    first = file_hash(file, tmp_path / "cache")
    monkeypatch.setattr("stages.hashes.digest", lambda path: "read again")
    assert file_hash(file, tmp_path / "cache") == first
    os.utime(file, ns=(1, 1))
    assert file_hash(file, tmp_path / "cache") == "read again"


def test_hub_revision_from_the_cache_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("c0ffee")
    assert resolve_revision("org/name") == "c0ffee"
    assert resolve_revision("org/name", "a" * 40) == "a" * 40


def test_reasons_and_missing_inputs(make_config, tmp_path):
    store = Store(tmp_path / "s")
    config = Job.of(make_config({"stage": "denoise"}))
    states = build(config, store)
    with pytest.raises(
        MissingInput, match=r"denoise needs text_encode and guide .*\n.*stage=\[text_encode,lowres,guide\]"
    ):
        check_inputs(states, "python runner.py run=x")
    for state in states[:3]:
        write_text(state.entry.path / "out", state.name)
        state.entry.commit()
    states = build(config, store)
    assert [state.status for state in states] == ["reuse", "reuse", "reuse", "run", "skip", "skip"]
    check_inputs(states, "x")
    previous = {state.name: state.payload for state in states}
    changed = build(Job.of(make_config({"seed": 1})), store, previous=previous)
    assert [state.reason for state in changed[:4]] == [
        "nothing changed",
        "seed changed (0 -> 1)",
        "lowres changed",
        "seed changed (0 -> 1)",
    ]
    (states[2].entry.path / "out").write_text("torn")
    assert build(config, store)[2].reason == "guide/out changed on disk"
    forced = build(Job.of(make_config({"stage": "lowres", "force": True})), store)
    assert [state.status for state in forced[:2]] == ["reuse", "run"]
    assert forced[1].reason == "force=true"


def test_differences_are_said_briefly():
    old = {"parameters": {"a": 1, "b": 2, "c": 3, "d": 4}, "version": 1, "upstream": {}}
    new = {"parameters": {"a": 2, "b": 3, "c": 4, "e": 5}, "version": 2, "upstream": {}}
    assert differences(old, new) == "a changed (1 -> 2), b changed (2 -> 3), c changed (3 -> 4) and 3 more"
    assert differences(None, new) == ""
    long = differences({"parameters": {"p": "x" * 99}}, {"parameters": {"p": "y"}, "upstream": {}})
    assert len(long) < 80


def test_the_floor_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, runner, stages.__main__, stages.memory.monitor\n"
        "import stages.workflow.run, stages.workflow.report, stages.workflow.validate\n"
        "print(sorted({'torch', 'numpy', 'rich', 'jinja2'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_scheduler_that_only_the_index_names_is_part_of_the_model(
    make_config, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "named")
    found = []
    for name in (None, "DDIMScheduler", "EulerDiscreteScheduler"):
        if name:
            (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", name]}))
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        found.append(model_identity(make_config({"model.path": str(folder)}), ("scheduler",), tmp_path)["scheduler"])
    assert len(set(found)) == 3


def test_decoded_tiles_are_smaller_where_numbers_are_wider(make_config):
    sides = {name: make_config({"technique.dtype": name}).decode.tile_size for name in ("bf16", "fp32", "float32")}
    assert sides == {"bf16": 288, "fp32": 224, "float32": 224}
    assert (
        make_config({"technique.dtype": "bf16", "technique.component_dtype": {"vae": "fp32"}}).decode.tile_size == 224
    )


def test_a_model_says_how_tiles_are_blended(make_config) -> None:
    assert make_config().denoise.blend == "gaussian"
    assert make_config({"model.blend": "cosine"}).denoise.blend == "cosine"
    assert make_config({"model.blend": "cosine", "denoise.blend": "quartic"}).denoise.blend == "quartic"


def test_a_model_says_how_many_steps_it_takes(make_config) -> None:
    plain, own = make_config(), make_config({"model.num_inference_steps": 9, "model.tile_num_inference_steps": 4})
    assert (plain.lowres.num_inference_steps, plain.denoise.num_inference_steps) == (25, 20)
    assert (own.lowres.num_inference_steps, own.denoise.num_inference_steps) == (9, 4)
    asked = {"model.tile_num_inference_steps": 4, "denoise.num_inference_steps": 30}
    assert make_config(asked).denoise.num_inference_steps == 30
