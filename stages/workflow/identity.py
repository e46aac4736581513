"""Which model a stage opens, as a hash: of a folder's files, of a single file, or the revision of a hub id."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.families.facts import facts_of
from stages.files import read_json
from stages.hashes import file_hash, fingerprint
from stages.models.locate import class_in_index
from stages.paths import PICKLES, files_of, is_hub_id

DISTILLED = "is_distilled"
_IGNORED = {*PICKLES, ".msgpack", ".h5", ".onnx", ".md", ".png", ".jpg"}
_REMOTE = """
import sys
from huggingface_hub import HfApi
print(HfApi().model_info(sys.argv[1], revision=sys.argv[2]).sha)
"""


def snapshot(repository: str, revision: str | None = None) -> Path | None:
    """The folder of the hub cache that holds a repository, as far as it was downloaded; None without one."""
    known = _cached_revision(repository, revision or "main")
    folder = _cache(repository) / "snapshots" / known
    return folder if known and folder.is_dir() else None


def _cache(repository: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _cached_revision(repository: str, wanted: str) -> str:
    """The commit that a branch, a tag or a commit stands for, without asking the hub; "" if that is not known."""
    if len(wanted) == 40 and set(wanted) <= set("0123456789abcdef"):
        return wanted
    reference = _cache(repository) / "refs" / wanted
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""


def resolve_revision(repository: str, revision: str | None = None) -> str:
    """The commit that a hub id stands for: from the hub cache on disk if it is there, else asked of the hub.

    Raises:
        ConfigError: neither cached nor reachable.
    """
    wanted = revision or "main"
    if known := _cached_revision(repository, wanted):
        return known
    # in a process of its own: the hub client costs the runner more memory than all the rest of it
    asked = subprocess.run([sys.executable, "-c", _REMOTE, repository, wanted], capture_output=True, text=True)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        hint = f"The hub says: {why[:200]}. Give a folder with model.path=FOLDER, or download it once while online."
        raise ConfigError("model.path", repository, f"a folder on disk or a hub id with revision {wanted}", hint)
    return asked.stdout.strip()


def model_identity(config: DictConfig, components: tuple[str, ...], cache: Path) -> dict[str, str]:
    """{component: hash} of those components that the checkpoint has; {} if the stage opens none.

    A single file or a hub revision holds every component: one entry, under ``file`` or ``revision`` (and what
    ``model.config`` adds to a file). ``model.denoiser`` and ``model.vae`` take the place of a component's weights.
    """
    if not components:
        return {}
    path, found = str(config.model.path), {}
    replaced = facts_of(config).denoiser if config.model.denoiser else ""
    if replaced in components:
        found["denoiser"] = file_hash(Path(config.model.denoiser), cache)
    if config.model.vae and "vae" in components:
        files = files_of(Path(config.model.vae))
        found["vae file"] = fingerprint({file.name: file_hash(file, cache) for file in files})
    if is_hub_id(path):
        return found | {"revision": f"{path}@{resolve_revision(path, config.model.revision)}"}
    root = Path(path)
    if root.is_file():
        found["file"] = file_hash(root, cache)
        if not config.model.config:
            return found
        root = Path(config.model.config)  # the same file under other configs is another model
    for component in components:
        files = sorted(file for file in (root / component).rglob("*") if _counts(file))
        if component == replaced or (component == "vae" and config.model.vae):
            files = [file for file in files if ".safetensors" not in file.name]
        if files:
            hashes = {file.relative_to(root).as_posix(): file_hash(file, cache) for file in files}
            if said := _said_elsewhere(root, component):
                hashes["model_index.json"] = said
            found[component] = fingerprint(hashes)
    return found


def _said_elsewhere(root: Path, component: str) -> str | None:
    """What only ``model_index.json`` says of a component: the scheduler's class, what stands for an empty negative
    prompt where there are two tokenizers, whether a transformer takes guidance."""
    key = {"tokenizer_2": "force_zeros_for_empty_prompt", "tokenizer": DISTILLED, "transformer": DISTILLED}
    if component in key:
        index = read_json(root / "model_index.json")
        said = index.get(key[component]) if isinstance(index, dict) else None
        return None if said is None else str(said)
    if component != "scheduler":
        return None
    config = read_json(root / "scheduler" / "scheduler_config.json")
    own = config.get("_class_name") if isinstance(config, dict) else None
    return None if own else class_in_index(root, "scheduler")


def _counts(file: Path) -> bool:
    return file.is_file() and file.suffix not in _IGNORED and not file.name.startswith(".")
