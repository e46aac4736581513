"""Which family a checkpoint is of, found from its classes before any work, and the defaults that it gets. No torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError, dtype_of_component, on_gpu
from stages.documents import escape
from stages.families.facts import DENOISERS, FACTS, family_of_classes
from stages.files import read_json
from stages.memory.ggml import names_of
from stages.models.originals import original_of
from stages.paths import PICKLES, is_hub_id, is_weights_file, local_path
from stages.schema import SchedulerConfig
from stages.workflow.identity import snapshot
from stages.workflow.keys import CONF

AUTO = "auto"
_NOT_DEFAULTS = ("name", "family", "path")


def check_path(config: DictConfig) -> None:
    """Refuse a ``model.path`` that is no checkpoint.

    Raises:
        ConfigError
    """
    _check_denoiser(config)
    _check_vae(config)
    expected = "a folder, a .safetensors file or a hub id"
    if OmegaConf.is_missing(config.model, "path"):
        raise ConfigError(
            "model.path", None, expected, "Or take a model with one of its own, for example model=embedded."
        )
    path = Path(config.model.path)
    if path.suffix.lower() in PICKLES:
        hint = "Unpickling runs code from the file. Take the .safetensors file, or convert it once with diffusers."
        raise ConfigError("model.path", str(path), expected, hint)
    if is_hub_id(str(config.model.path)):
        return
    if not (path.is_dir() or is_weights_file(path)):
        hint = "Use model=embedded, or model.path=FOLDER with a diffusers checkpoint, or a hub id such as org/name."
        raise ConfigError("model.path", str(path), expected, hint)
    if path.is_dir() and not any((path / name / "config.json").is_file() for name in DENOISERS):
        wanted = " or ".join(f"{name}/config.json" for name in DENOISERS)
        raise ConfigError("model.path", str(path), f"a diffusers folder (it has no {wanted})")


def _check_denoiser(config: DictConfig) -> None:
    if config.model.denoiser is None:
        return
    path, expected = Path(config.model.denoiser), "a .safetensors or .gguf file with a UNet or a transformer"
    if not is_weights_file(path):
        hint = "Unpickling runs code from the file." if path.suffix.lower() in PICKLES else ""
        raise ConfigError("model.denoiser", str(path), expected, hint)
    try:
        names = names_of(path)
    except ValueError as error:
        raise ConfigError("model.denoiser", str(path), expected, str(error)) from None
    if not names:
        raise ConfigError("model.denoiser", str(path), f"{expected} (it is empty)")


def _check_vae(config: DictConfig) -> None:
    if config.model.vae is None:
        return
    path, expected = Path(config.model.vae), "a .safetensors file with an AutoencoderKL, or a folder of one"
    if path.is_dir():
        said = read_json(path / "config.json")
        kind = said.get("_class_name") if isinstance(said, dict) else None
        if kind != "AutoencoderKL":
            got = f"{path} with a {kind}" if kind else f"{path} without config.json"
            raise ConfigError("model.vae", got, expected)
    elif not is_weights_file(path):
        hint = "Unpickling runs code from the file." if path.suffix.lower() in PICKLES else ""
        if is_hub_id(str(path)):
            hint = f"Get it once: hf download {path} --local-dir FOLDER"
        raise ConfigError("model.vae", str(path), expected, hint)


def recognise(config: DictConfig, said: Collection[str]) -> None:
    """Find the family of ``model.path``, whatever ``model=NAME`` gave; with ``model=auto`` also its model's defaults.
    A family of flows gets its checkpoint's own scheduler where none was asked for.

    Args:
        said: the keys of the command line, which are left as they are.

    Raises:
        ConfigError: a family that is not there, naming those that are.
    """
    folder = _folder(config)
    classes = classes_of(folder) if folder else {}
    family = family_of_classes(classes) if classes else _of_file(Path(config.model.path))
    if family is None:
        there = ", ".join(f"{name} ({', '.join(facts.models)})" for name, facts in FACTS.items())
        known = {component for facts in FACTS.values() for component in facts.classes}
        parts = sorted(name for name in classes if name in known or "encoder" in name or name == "transformer")
        got = ", ".join(f"{component} {classes[component]}" for component in parts) or "none that is known"
        hint = f"Its components are: {got}."
        raise ConfigError("model.path", config.model.path, f"a checkpoint of one of these families: {there}", hint)
    if config.model.name != AUTO:
        if (classes or Path(config.model.path).is_file()) and "model.family" not in said:
            config.model.family = family
        take_channels(config, folder, said)
        _size(config, said)
        _schedule(config, said)
        return
    option, native = _option(str(config.model.path), FACTS[family].models), _native(folder, config)
    defaults = {key: value for key, value in _read(option).items() if key not in _NOT_DEFAULTS}
    found: dict[str, Any] = {**defaults, **({"native_size": native} if native else {})}
    found |= {"family": family, "name": escape(Path(config.model.path).stem)}
    for key, value in found.items():
        if f"model.{key}" not in said:
            OmegaConf.update(config, f"model.{key}", value)
    take_channels(config, folder, said)
    _size(config, said)
    _schedule(config, said)


def take_channels(config: DictConfig, folder: Path | None, said: Collection[str]) -> None:
    """Latents of a UNet have as many channels as the checkpoint's VAE says: most have four, the embedded one its own.

    Raises:
        ConfigError: another number was asked for.
    """
    facts = FACTS.get(str(config.model.family))
    if facts is None or not facts.unet:
        return
    own = read_json(folder / "vae" / "config.json") if folder else None
    found = own.get("latent_channels") if isinstance(own, dict) else None
    channels = found if isinstance(found, int) and found > 0 else facts.latent_channels
    if "model.latent_channels" not in said:
        config.model.latent_channels = channels
    elif config.model.latent_channels != channels:
        raise ConfigError("model.latent_channels", config.model.latent_channels, f"{channels}, as the VAE has it")


def _size(config: DictConfig, said: Collection[str]) -> None:
    """On a CPU pictures and tiles are as large as the default budget holds, which hangs on the dtype, not on the budget
    of the run: that changes speed, never the picture."""
    facts = FACTS.get(str(config.model.family))
    if facts is None or on_gpu(config) or "model.native_size" in said:
        return
    wide = dtype_of_component(config, facts.denoiser) == "fp32"
    most = (wide and config.model.fp32_size) or config.model.cpu_size
    if most and not OmegaConf.is_missing(config.model, "native_size"):
        config.model.native_size = min(config.model.native_size, most)


def _schedule(config: DictConfig, said: Collection[str]) -> None:
    """The usual scheduler is of noise that is predicted, which flows have none of."""
    facts = FACTS.get(str(config.model.family))
    if facts is not None and facts.flow and not any(key.partition(".")[0] == "scheduler" for key in said):
        own = OmegaConf.load(CONF / "scheduler" / "checkpoint.yaml")
        config.scheduler = OmegaConf.merge(SchedulerConfig(), own)


def _of_file(path: Path) -> str:
    """Of a single file in the original layout, by its tensors' names. ConfigError for one that is torn, or is none."""
    try:
        names = names_of(path) if path.is_file() else []
    except ValueError as error:
        raise ConfigError("model.path", str(path), "a whole .safetensors or .gguf file", str(error)) from None
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        return "sdxl"
    original = original_of(names)
    own = (name for name, facts in FACTS.items() if original and original.class_name in facts.classes.values())
    return next(own, next(iter(FACTS)))


def classes_of(folder: Path) -> dict[str, str]:
    """{component: class name} as a diffusers folder says: in its index, else in each component's config."""
    index = read_json(folder / "model_index.json")
    found = {}
    for name, value in index.items() if isinstance(index, dict) else ():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
            found[name] = value[1]
    for path in folder.glob("*/config.json"):
        own = read_json(path)
        own = own if isinstance(own, dict) else {}
        architectures = own.get("architectures")
        named = own.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else 0)
        if isinstance(named, str):
            found.setdefault(path.parent.name, named)
    return found


def _folder(config: DictConfig) -> Path | None:
    """The diffusers folder that describes the checkpoint; None where it is not on this machine, or one file alone."""
    path = str(config.model.path)
    if is_hub_id(path):
        return snapshot(path, config.model.revision)
    folder = local_path(str(config.model.config)) if Path(path).is_file() and config.model.config else Path(path)
    return folder if folder and folder.is_dir() else None


def _option(path: str, models: tuple[str, ...]) -> str:
    """Of the options in ``conf/model`` the one whose checkpoint this is, else the family's first."""
    local = local_path(path)
    for option in models:
        usual = str(_read(option)["path"])
        if path == usual or (local is not None and local == local_path(usual)):
            return option
    return models[0]


def _read(option: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{option}.yaml"))  # type: ignore[return-value]


def _native(folder: Path | None, config: DictConfig) -> int | None:
    """Pixels a side that the denoiser's config says it was trained at."""
    for name in DENOISERS:
        own = read_json(folder / name / "config.json") if folder else None
        side = own.get("sample_size") if isinstance(own, dict) else None
        if isinstance(side, int) and 0 < side <= 1024:
            return side * config.model.vae_scale_factor
    return None
