"""The command line before Hydra sees it: prompts are quoted as text, typos get an answer, a saved run is the base."""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError
from stages.files import write_json
from stages.hashes import fingerprint
from stages.paths import anchored
from stages.workflow import from_image, prompts
from stages.workflow.grammar import ALTERNATIVES, Override, merge, parse, quote, readable, value_of, without, written
from stages.workflow.keys import check, check_output_dir, check_run_name, groups, known_keys
from stages.workflow.launchers import launcher
from stages.workflow.saved import SAVED, settings
from stages.workflow.words import sampler

SWEEPS = ".sweeps"  # under output_dir: a folder for every sweep
_TEXT = {"prompt", "negative_prompt", "prompt_line"}
_PATHS = {
    "run",
    "output_dir",
    "model.path",
    "model.lora_dir",
    "preview.vae",
    "guide.image",
    "prompt_file",
    "prompts_file",
    "to",
    "from_image",
}
_DTYPE = "technique.dtype."
_TRANSIENT = {
    "run",
    "stage",
    "force",
    "progress",
    "output_dir",
    "score",
    "keep",
    "dry",
    "to",
}  # of one command, not of the run
_GONE = {("launch", "local"), ("technique", "default")}  # groups of one option, which earlier runs may name
_NO_OTHER = {"force", "progress"}  # keys that make no other sweep of it
_BESIDE = {  # keys as people say them that lie elsewhere: device is a name, and no stage is made from the others
    "device.device_map": "device_map",
    "device.max_memory": "max_memory",
    "lowres.preview_every": "preview.lowres",
    "denoise.preview_every": "preview.denoise",
    "model.preview_vae": "preview.vae",
}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
_WITH_VALUE |= {"--experimental-rerun", "--info", "-i"}


def prepare(arguments: Sequence[str]) -> list[str]:
    """Turn the arguments as typed into what Hydra is to see.

    ``prompt=`` and ``negative_prompt=`` become quoted text whatever they contain (also with ``-m``: one value), ``-m``
    may stand anywhere, ``run=NAME`` puts the saved run's overrides under the new ones.

    Raises:
        ConfigError: an argument that is not ``key=value``, an unknown key or option, a bad run name.
    """
    multirun = any(argument in ("-m", "--multirun") for argument in arguments)
    elsewhere = {"--config-dir", "-cd", "--config-path", "-cp"} & {one.partition("=")[0] for one in arguments}
    options = {} if elsewhere else groups()  # folders of the person's own may hold others
    flags, overrides, takes_value = [], [], False
    for argument in arguments:
        if takes_value or (argument.startswith("-") and not parse(argument)) or argument.startswith("--"):
            takes_value = not takes_value and argument in _WITH_VALUE
            flags.append(argument)
            continue
        override = parse(argument)
        if override is None:
            hint = f'If it belongs to the prompt, quote the whole: prompt="... {argument} ..."'
            raise ConfigError("command line", argument, "key=value", hint)
        if _gone(override):
            continue
        override = _understood(override, options, multirun)
        if override.key == "regions.grid":
            override = override._replace(key="regions", value=f"{{grid: {override.value}}}")
        override = override._replace(key=_BESIDE.get(override.key, override.key))
        if override.key.startswith(_DTYPE):  # technique.dtype is a name; those of components lie beside it
            component = override.key.removeprefix(_DTYPE)
            override = override._replace(sign="++", key=f"technique.component_dtype.{component}")
        check(override, multirun, options)
        overrides.append(readable(_ready(override, multirun), override))
    overrides = merge([], overrides)
    if multirun and value_of(overrides, "prompts_file") is not None:
        for key in ALTERNATIVES:
            if (other := value_of(overrides, key)) is not None:
                raise ConfigError(key, other[:200], "either it or prompts_file", "Leave one out.")
    overrides = _of_image(overrides, options)
    overrides = _lines(overrides) if multirun else overrides
    return [*flags, *launcher(_with_saved_run(overrides))]


def _of_image(overrides: list[str], options: dict[str, list[str]]) -> list[str]:
    """With ``from_image`` what that picture says below what the command line does."""
    given = value_of(overrides, "from_image")
    if given is None:
        return overrides
    keys = {override.key for text in overrides if (override := parse(text))}
    found = from_image.read(anchored(given, near=True), options or groups(), known_keys(), keys)
    if found.unknown:
        text = "".join(one if one.isprintable() else "?" for one in "; ".join(found.unknown))  # of anybody's picture
        print(f"from_image: the picture does not say, or it is not used: {text}", file=sys.stderr, flush=True)
    said = [readable(written(key, value), Override("", key, "", str(value))) for key, value in found.values.items()]
    return merge(said, without(overrides, "from_image"))


def _lines(overrides: list[str]) -> list[str]:
    """``prompts_file`` as what is swept over: its lines, as they are now."""
    given = value_of(overrides, "prompts_file")
    if given is None:
        return overrides
    path = anchored(given, near=True)
    folder = value_of(overrides, "wildcards.dir")
    numbers = {}
    for key, least in (("wildcards.seed", 0), ("wildcards.draws", 1)):
        text = value_of(overrides, key) or str(least)
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(key, text, f"a whole number from {least}")
        numbers[key] = int(text)
    beside = anchored(folder, near=True) if folder else path.parent / "wildcards"
    lines = prompts.read(path, beside, *numbers.values())
    kept = without(overrides, "prompts_file", "wildcards.dir", *numbers)
    return merge(kept, [f"prompt_line={','.join(map(quote, lines))}"])


def _understood(override: Override, options: dict[str, list[str]], multirun: bool) -> Override:
    """Samplers by their names elsewhere, and a number drawn for each seed of -1."""
    if override.key not in ("scheduler", "seed"):
        return override
    found = []
    for value in override.value.split(",") if multirun else [override.value]:
        if override.key == "seed" and value.strip() == "-1":
            value = str(secrets.randbelow(2**32))
            print(f"seed=-1 draws {value}", file=sys.stderr, flush=True)
        found.append(sampler(value, options.get("scheduler", ())) if override.key == "scheduler" else value)
    return override._replace(value=",".join(found))


def _gone(override: Override | None) -> bool:
    """Whether it names the only option of a group that is no more: it says nothing."""
    return override is not None and (override.key, override.value.strip("'\"")) in _GONE


def _ready(override: Override, multirun: bool) -> str:
    sign, key, package, value = override
    if sign == "~":
        return f"~{key}{package}" + (f"={value}" if value else "")
    if key in _TEXT:
        return f"{key}={quote(value)}"
    alone = key in _PATHS and not (multirun and key not in ("run", "output_dir"))
    if alone and value not in ("", "null") and value[0] not in "'\"":
        value = quote(value)
    return f"{sign}{key}{package}={value}"


def _with_saved_run(overrides: list[str]) -> list[str]:
    output_dir = anchored("outputs")
    if given := value_of(overrides, "output_dir"):  # where other files of the command line begin too
        output_dir = Path(given).expanduser().absolute()
        overrides = merge(overrides, [f"output_dir={quote(str(output_dir))}"])
    name = value_of(overrides, "run")
    if name is not None:
        check_run_name(name)
        saved = settings(output_dir / name, groups())
        if isinstance(saved, dict):
            saved = [written(key, value) for key, value in saved.items() if key not in _TRANSIENT]
        overrides = merge((text for text in saved if parse(text) and not _gone(parse(text))), overrides)
    check_output_dir(output_dir)
    keys = {override.key for text in overrides if (override := parse(text))}
    if "model.path" in keys and "model" not in keys:  # defaults of another model would be none of this one
        overrides = ["model=auto", *overrides]
    clutter = {"hydra.run.dir": output_dir / ".hydra", "hydra.sweep.dir": output_dir / SWEEPS / _name(overrides)}
    return [*overrides, *(f"{key}={quote(str(folder))}" for key, folder in clutter.items() if key not in keys)]


def _name(overrides: Iterable[str]) -> str:
    """Of a sweep: by what is swept over, so that the same command finds its sweep again."""
    keys = {text: override.key for text in overrides if (override := parse(text))}
    kept = [text for text, key in keys.items() if key not in _NO_OTHER and not key.startswith(("hydra", "launch."))]
    return fingerprint({"overrides": sorted(kept)})[:16]


def typed(overrides: Iterable[str], config: DictConfig) -> str:
    """The command that makes a run from nothing, for a shell: its overrides with texts as a person types them."""
    words = []
    for text in overrides:
        override = parse(text)
        if override and override.key in _TEXT:
            words.append(f"{override.key}={config[override.key]}")
        elif override and override.key in _PATHS:
            words.append(f"{override.key}={value_of([text], override.key) or 'null'}")
        elif override and not override.key.startswith("hydra") and override.key not in ("stage", "force"):
            words.append(text)
    return shlex.join(["python", "runner.py", *words])


def save(run_dir: Path, overrides: Iterable[str], config: DictConfig) -> None:
    """Keep a run's overrides as the base of its next command; a prompt read from a file is kept as text, and the
    adapters that it named as a list."""
    kept = []
    for text in overrides:
        override = parse(text)
        if override and override.key in ("prompt_file", "prompt_line"):
            kept.append(f"prompt={quote(config.prompt)}")
            if override.key == "prompt_line":
                kept.append(f"negative_prompt={quote(config.negative_prompt)}")
            if config.model.loras:
                kept.append(written("model.loras", OmegaConf.to_container(config.model.loras)))
        elif override and override.key not in _TRANSIENT and not override.key.startswith("hydra"):
            kept.append(text)
    write_json(run_dir / SAVED, merge([], kept))
