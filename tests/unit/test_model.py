"""model.path alone: the family is found from the checkpoint's classes, and with it the defaults."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from stages.config import ROOT, ConfigError
from stages.workflow.complete import complete
from stages.workflow.keys import groups
from stages.workflow.model import classes_of, recognise
from stages.workflow.overrides import prepare

SD = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
SDXL = {**SD, "text_encoder_2": "CLIPTextModelWithProjection"}
HUNYUAN = {"transformer": "HunyuanDiT2DModel", "text_encoder": "BertModel", "text_encoder_2": "T5EncoderModel"}
LUMINA = {"transformer": "LuminaNextDiT2DModel", "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}


def made(folder: Path, classes: dict[str, str], *, index: bool = True, sample_size: int = 64) -> Path:
    """A folder that looks like a checkpoint of these classes."""
    for name, kind in classes.items():
        (folder / name).mkdir(parents=True)
        key = {"architectures": [kind]} if "encoder" in name else {"_class_name": kind, "sample_size": sample_size}
        (folder / name / "config.json").write_text(json.dumps({} if index else key))
    if sample_size and index:
        (folder / "unet").mkdir(exist_ok=True)
        (folder / "unet" / "config.json").write_text(json.dumps({"sample_size": sample_size}))
    if index:
        listed = {name: ["diffusers", kind] for name, kind in classes.items()}
        (folder / "model_index.json").write_text(
            json.dumps({"_class_name": "X", "safety_checker": [None, None], **listed})
        )
    return folder


def auto(make_config, path: Path | str, said: tuple[str, ...] = (), **values):
    keys = {f"model.{key}": value for key, value in values.items()}
    config = make_config({"model.name": "auto", "model.family": "auto", "model.path": str(path), **keys}, derive=False)
    for key in ("native_size", "size_multiple", "phase_growth"):
        if key not in values:
            OmegaConf.update(config, f"model.{key}", "???" if key == "native_size" else 8)
    return complete(config, [*said, *(f"{key}={value}" for key, value in keys.items())]).config


@pytest.mark.parametrize("index", [True, False])
def test_the_family_gives_the_defaults(make_config, tmp_path: Path, index: bool) -> None:
    folder = made(tmp_path / "my-model", SD, index=index)
    assert classes_of(folder) == SD
    config = auto(make_config, folder)
    assert (config.model.family, config.model.name) == ("sd", "my-model")
    assert (config.model.native_size, config.model.size_multiple, config.denoise.tile_size) == (512, 64, 512)


def test_the_checkpoint_says_its_native_size_and_the_command_line_more(make_config, tmp_path: Path) -> None:
    folder = made(tmp_path / "m", SD, sample_size=96)
    assert auto(make_config, folder).model.native_size == 768
    assert auto(make_config, folder, native_size=256).model.native_size == 256


def test_the_model_that_ships_is_recognised_by_its_folder(make_config) -> None:
    config = auto(make_config, ROOT / "models" / "embedded")
    expected = yaml.safe_load((ROOT / "conf" / "model" / "embedded.yaml").read_text())
    expected.pop("path")
    assert {key: config.model[key] for key in expected} == expected


@pytest.mark.parametrize("model", ["auto", "sd15"])
def test_the_checkpoint_says_its_family_whatever_the_defaults(make_config, tmp_path: Path, model: str) -> None:
    folder = made(tmp_path / "m", SDXL)
    said = make_config({"model.path": str(folder), "model.name": model, "model.family": "sd"}, derive=False)
    assert complete(said).config.model.family == "sdxl"


@pytest.mark.parametrize("classes", [HUNYUAN, LUMINA], ids=["HUNYUAN", "LUMINA"])
@pytest.mark.parametrize("model", ["auto", "sd15"])
def test_a_family_that_is_not_there_is_refused_before_work(make_config, tmp_path: Path, classes, model: str) -> None:
    folder = made(tmp_path / "m", classes)
    known = r"a checkpoint of one of these families: sd \(sd15, sd21, embedded\), sdxl \("
    with pytest.raises(ConfigError, match=known) as caught:
        complete(make_config({"model.path": str(folder), "model.name": model, "model.family": "sd"}, derive=False))
    assert f"text_encoder_2 {classes['text_encoder_2']}" in str(caught.value)


def test_the_command_line_chooses_auto_where_only_a_path_is_given(tmp_path: Path) -> None:
    base = [f"output_dir={tmp_path}", "prompt=a"]
    assert "model=auto" in prepare([*base, "model.path=x/y"]) and "auto" in groups()["model"]
    assert "model=auto" not in prepare([*base, "model.path=x/y", "model=sd15"])
    assert "model=auto" not in prepare(base)


def test_auto_without_a_path_says_what_is_missing(make_config) -> None:
    config = make_config({"model.name": "auto"}, derive=False)
    config.model.path = "???"
    with pytest.raises(ConfigError, match=r"model\.path: got None, expected a folder.*model=embedded"):
        complete(config)


def test_the_whole_command_line(cli, tmp_path: Path) -> None:
    folder = made(tmp_path / "other", LUMINA)
    done = cli("run=x", "prompt=a", f"model.path={folder}", "stage=plan")
    assert done.returncode == 1 and "families: sd (" in done.stderr and "Traceback" not in done.stderr


def test_flows_get_the_scheduler_of_their_checkpoint_unless_one_is_asked_for(make_config, tmp_path: Path) -> None:
    folder = made(
        tmp_path / "flux",
        {"transformer": "FluxTransformer2DModel", "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    )
    for said, expected in ((), ("checkpoint", None)), (("scheduler.class_name",), ("ddim", "DDIMScheduler")):
        config = make_config({"model.name": "flux", "model.path": str(folder)}, derive=False)
        recognise(config, said)
        assert (config.model.family, config.scheduler.name, config.scheduler.class_name) == ("flux", *expected)
