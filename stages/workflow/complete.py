"""From a composed config to what a run is made from: texts read, paths absolute, derived values, all checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from stages.config import ConfigError, close_match, resolve
from stages.documents import escape_all
from stages.job import Job
from stages.paths import anchored, is_hub_id, is_safetensors
from stages.regions.document import read_document
from stages.regions.files import overrides
from stages.schema import Config, SchedulerConfig
from stages.techniques import attention, controls
from stages.workflow import loras, model, prompts
from stages.workflow.grammar import parse as parse_override
from stages.workflow.keys import CONF
from stages.workflow.validate import check_sizes, validate

LONGEST_PROMPT = 1_000_000  # bytes
_EXAMPLE = 'python runner.py prompt="a lighthouse on a cliff at sunset"'


def complete(config: DictConfig, said: Iterable[str] = ()) -> Job:
    """What a run is made from: paths absolute, texts read from files, derived values filled in, checked.

    Args:
        said: the command line's overrides; a file of mixture-of-diffusers decides what they do not.

    Raises:
        ConfigError: a value that cannot work.
    """
    _sections(config)
    OmegaConf.update(config, "output_dir", escape_all(str(anchored(config.output_dir))))
    if isinstance(config.regions, str):
        _read_regions(config)
    _read_prompt(config)
    keys = {override.key for text in said if (override := parse_override(text))}
    _apply_regions(config, keys)
    for key in ("guide.image", "model.path", "model.denoiser", "model.vae", "technique.linfusion.path", "preview.vae"):
        value = OmegaConf.select(config, key, throw_on_missing=False)
        if value and not (key in ("model.path", "model.vae") and is_hub_id(value)):
            OmegaConf.update(config, key, escape_all(str(anchored(value, near=True))))
    if is_safetensors(str(config.guide.upscale)):
        config.guide.upscale = escape_all(str(anchored(config.guide.upscale, near=True)))
    if config.model.embeddings:
        files = [str(anchored(path, near=True)) for path in config.model.embeddings]
        OmegaConf.update(config, "model.embeddings", escape_all(files), merge=False)
    loras.complete(config)
    controls.complete(config)
    model.check_path(config)
    model.recognise(config, keys)
    check_sizes(config)
    config = resolve(config)
    config.technique.attention = attention.chosen(config)
    validate(config)
    job = Job.of(config)  # boxes off the canvas, parts that no region covers
    loras.refuse_elsewhere(job.regions)
    return job


def _sections(config: DictConfig, kind: Any = Config, prefix: str = "") -> None:
    """That what has keys below it has: an interpolation can put anything there."""
    for field in fields(kind):
        if is_dataclass(own := field.default_factory):
            key = f"{prefix}{field.name}"
            below = OmegaConf.select(config, key, throw_on_missing=False)
            if not isinstance(below, DictConfig):
                raise ConfigError(key, below, f"{key}.NAME=VALUE, as there are keys below it")
            _sections(config, own, f"{key}.")


def _read_prompt(config: DictConfig) -> None:
    if config.from_image is not None:
        raise ConfigError("from_image", config.from_image, "a word of the command line, not of a file")
    if config.prompts_file is not None:
        hint = "Each of its lines is a run: python runner.py -m prompts_file=FILE"
        raise ConfigError("prompts_file", config.prompts_file, "-m on the command line", hint)
    if config.prompt_line is not None:
        if config.prompt is not None or config.prompt_file is not None:
            raise ConfigError("prompt_line", config.prompt_line, "either prompts or prompts_file", "Leave one out.")
        text, negative = prompts.split(config.prompt_line)
        config.prompt, config.prompt_line = escape_all(text), None
        config.negative_prompt = escape_all(config.negative_prompt if negative is None else negative)
    if config.prompt_file is None:
        if config.prompt is None and config.regions:
            config.prompt = ""  # the regions say it all, or are refused for what they leave uncovered
        if config.prompt is None:
            raise ConfigError("prompt", None, "a text", f"For example: {_EXAMPLE}")
        return
    if config.prompt is not None:
        raise ConfigError("prompt_file", config.prompt_file, "either prompt or prompt_file", "Leave one of them out.")
    path = anchored(config.prompt_file, near=True)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ConfigError("prompt_file", str(path), "a text file")
    try:
        if path.stat().st_size > LONGEST_PROMPT:
            expected = f"a text of at most {LONGEST_PROMPT:,} bytes"
            raise ConfigError("prompt_file", f"{path} of {path.stat().st_size:,} bytes", expected)
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("prompt_file", str(path), f"UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError("prompt_file", str(path), f"a text file that can be read ({error.strerror})") from None
    config.prompt, config.prompt_file = escape_all(text.removesuffix("\n")), None


def _read_regions(config: DictConfig) -> None:
    path = anchored(config.regions, near=True)
    found = read_document(path)
    listed = found.get("regions") if isinstance(found, dict) else None
    for region in listed if isinstance(listed, list) else ():
        if isinstance(region, dict) and isinstance(region.get("ref_img"), str):
            beside = path.parent / region["ref_img"]
            region["ref_img"] = str(beside) if beside.is_file() else region["ref_img"]
    config.regions = escape_all(found)


def _apply_regions(config: DictConfig, said: set[str]) -> None:
    """Size, steps, seed, scheduler of a mixture-of-diffusers file, where the command line says nothing else."""
    regions = OmegaConf.to_container(config.regions) if OmegaConf.is_config(config.regions) else config.regions
    for key, value in overrides(regions).items():
        if key in said:
            continue
        if key == "scheduler":
            options = {path.stem: path for path in (CONF / "scheduler").glob("*.yaml")}
            if value not in options:
                expected = f"one of {', '.join(sorted(options))}"
                raise ConfigError("regions.scheduler", value, expected, close_match(str(value), options))
            config.scheduler = OmegaConf.merge(SchedulerConfig(), OmegaConf.load(options[value]))
            continue
        try:
            OmegaConf.update(config, key, value)  # texts come escaped from the config
        except ValidationError as error:
            raise ConfigError(f"regions ({key})", value, str(error).partition("\n")[0]) from None
