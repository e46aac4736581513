"""``model.embeddings``: words that were learned (textual inversion), used by their names in prompts. No torch.

What they are to a tokenizer and to a text encoder: ``stages/families/inversion.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.hashes import file_hash
from stages.paths import PICKLES, is_weights_file
from stages.techniques.base import Technique
from stages.techniques.inversion_file import KEY, Inversion, inversions, read

if TYPE_CHECKING:
    from torch import nn

FAMILIES = {"sd": {"text_encoder"}, "sdxl": {"text_encoder", "text_encoder_2"}}  # and their encoders
_EXPECTED = "a .safetensors file of a textual inversion"


class TextualInversion(Technique):
    """Rows that join a text encoder's table of tokens."""

    name = "textual_inversion"
    keys = (KEY,)

    @classmethod
    def of(cls, config: DictConfig) -> TextualInversion | None:
        return cls(inversions(config)) if config.model.embeddings else None

    def __init__(self, given: Sequence[Inversion]) -> None:
        self._given = given

    @classmethod
    def check(cls, config: DictConfig) -> None:
        names: dict[str, str] = {}
        if config.model.embeddings and config.model.family not in FAMILIES:
            expected = "none for this family: they are read for Stable Diffusion and SDXL"
            raise ConfigError(KEY, list(config.model.embeddings), expected)
        for path in config.model.embeddings or ():
            if not is_weights_file(Path(str(path))):
                pickled = str(path).lower().endswith(PICKLES)
                hint = "Unpickling runs code from the file. Take the .safetensors file of it." if pickled else ""
                raise ConfigError(KEY, str(path), _EXPECTED, hint)
            try:
                one = read(Path(str(path)))
            except ValueError as error:
                raise ConfigError(KEY, str(path), _EXPECTED, str(error)) from None
            if set(one.tensors) != FAMILIES[config.model.family]:
                for_ = "SDXL" if len(one.tensors) == 2 else "Stable Diffusion 1.x or 2.x"
                raise ConfigError(KEY, str(path), f"one for this model's text encoders; this is one for {for_}")
            if other := names.get(one.name):
                raise ConfigError(KEY, str(path), f"another name than {one.name}, which {other} has")
            names[one.name] = str(path)

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {KEY: [{"name": one.name, "sha256": file_hash(one.path, cache)} for one in self._given]}

    def packed(self, cache: Path) -> Mapping[str, Any]:
        return {}

    def touches(self, stage: str) -> bool:
        return stage in ("text_encode", "profile")

    def on_model(self, network: nn.Module, component: str) -> None:
        config: Any = getattr(network, "config", None)
        for one in self._given:
            if component in one.widths and one.widths[component] != config.hidden_size:
                got = f"{one.path} with {one.widths[component]} numbers a row"
                raise ConfigError(KEY, got, f"{config.hidden_size}, as {component} has; it is for another model")
