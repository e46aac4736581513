"""A stage reads what it declares: everything else is an error that names stage and key."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ReadonlyConfigError

from stages import PIPELINE, PROFILE, Stage
from stages.mask import RUN_WIDE, UndeclaredRead, masked
from stages.schema import Config

TOY = Stage("toy", 1, ("prompt", "seed", "denoise", "guide.mode", "scheduler.options"), lambda config: ())


@pytest.fixture
def seen(make_config) -> DictConfig:
    return masked(make_config({"prompt": "a ${b}", "scheduler.options": {"order": 2}}), TOY)


WAYS: dict[str, tuple[str, Callable[[DictConfig], Any]]] = {
    "attribute": ("width", lambda config: config.width),
    "item": ("width", lambda config: config["width"]),
    "get": ("width", lambda config: config.get("width", 1)),
    "in": ("width", lambda config: "width" in config),
    "select": ("width", lambda config: OmegaConf.select(config, "width")),
    "select with a default": ("width", lambda config: OmegaConf.select(config, "width", default=1)),
    "node": ("decode", lambda config: config.decode),
    "below a node": ("decode.mode", lambda config: OmegaConf.select(config, "decode.mode")),
    "attribute of a shown node": ("guide.image", lambda config: config.guide.image),
    "item of a shown node": ("guide.image", lambda config: config["guide"]["image"]),
    "select in a shown node": ("guide.image", lambda config: OmegaConf.select(config, "guide.image")),
    "hasattr": ("model.native_size", lambda config: hasattr(config.model, "native_size")),
}


@pytest.mark.parametrize("way", WAYS)
def test_reading_what_is_not_declared_is_refused(seen: DictConfig, way: str) -> None:
    key, read = WAYS[way]
    with pytest.raises(UndeclaredRead, match=rf"^toy reads {key.partition('.')[0]}.*which it does not declare"):
        read(seen)


def test_what_is_declared_reads_as_ever(seen: DictConfig, make_config) -> None:
    whole = make_config({"prompt": "a ${b}", "scheduler.options": {"order": 2}})
    assert (seen.prompt, seen["seed"], seen.guide.mode) == ("a ${b}", 0, "sdedit")
    assert OmegaConf.to_container(seen.denoise, resolve=True) == OmegaConf.to_container(whole.denoise, resolve=True)
    assert dict(seen.scheduler.options) == {"order": 2} and seen.get("prompt") == "a ${b}"
    assert OmegaConf.select(seen, "denoise.dilated.enabled") is False
    assert list(seen.guide) == ["mode"] and "decode" not in list(seen)
    for key in RUN_WIDE:
        assert OmegaConf.select(seen, key) == OmegaConf.select(whole, key)
    with pytest.raises(ReadonlyConfigError):
        seen.seed = 1
    with pytest.raises(ReadonlyConfigError):
        seen.denoise.strength = 1.0


def test_a_key_that_is_nowhere_is_no_undeclared_one(seen: DictConfig) -> None:
    with pytest.raises(ConfigAttributeError, match="widht"):
        _ = seen.widht


@pytest.mark.parametrize("stage", [*PIPELINE, PROFILE], ids=lambda stage: stage.name)
def test_every_declared_key_is_one_of_the_schema(stage: Stage) -> None:
    schema = OmegaConf.structured(Config)
    for key in (*stage.parameters, *RUN_WIDE):
        node, _, name = key.rpartition(".")
        assert name in list(OmegaConf.select(schema, node) if node else schema), key
    assert len(set(stage.parameters)) == len(stage.parameters)
