"""Which weights of a model a file of adapters changes; one that fits nothing is refused, saying what it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.families.adapters import SIGNS, WIDTHS
from stages.families.facts import Facts, facts_of
from stages.techniques.lora_file import KEY, Adapter, open_adapter, place, strengths
from stages.techniques.lora_names import targets


class Placed(NamedTuple):
    """Of a weight: the module of a file that changes it, and which of the delta's rows is its first."""

    name: str
    first: int


class Fit(NamedTuple):
    """What a file does to one component: what falls on each of its modules, names that fit none, and those that are of
    another size, with both sizes."""

    placed: Mapping[str, list[Placed]]
    unfit: list[str]
    other_size: list[str]


def fit(
    adapter: Adapter, component: str, facts: Facts, class_name: str, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Fit:
    """Of the modules of ``adapter`` that are for ``component``, whose weights have these ``shapes``."""
    own = {rest: name for name in adapter.modules for where, rest in [place(name, facts)] if where == component}
    found, placed, other = targets(own, class_name, config, shapes), {}, []
    for rest, modules in found.items():
        name, rows = own[rest], [shapes[module][0] for module in modules]
        size = adapter.modules[name].shape
        wanted = sum(rows), math.prod(shapes[modules[0]][1:])
        if size is not None and size != wanted:
            other.append(f"{name} is {size[0]}x{size[1]}, the model's {wanted[0]}x{wanted[1]}")
            continue
        for index, module in enumerate(modules):
            placed.setdefault(module, []).append(Placed(name, sum(rows[:index])))
    return Fit(placed, [name for rest, name in own.items() if rest not in found], other)


def fits(config: DictConfig, components: Mapping[str, tuple[str, Any, Mapping[str, tuple[int, ...]]]]) -> Iterator[str]:
    """What each file of ``model.loras`` leaves unused, in words.

    Args:
        components: of the model, those that a file may be for: (class name, config, module -> shape of its weight).

    Raises:
        ConfigError: a file that fits nothing, or is of another size.
    """
    facts = facts_of(config)
    for one in strengths(config):
        adapter = open_adapter(Path(one.path))
        found = [fit(adapter, name, facts, *described) for name, described in components.items()]
        count = len({name for own in found for placed in own.placed.values() for name, _ in placed})
        other = [text for own in found for text in own.other_size]
        if other or not count:
            said = f"It says that it is for {adapter.trained_on}. " if adapter.trained_on else ""
            some = other[0] if other else f"It has {next(iter(adapter.modules))}, of which the model has nothing"
            expected = f"an adapter for a model of the family {config.model.family}, of its size"
            raise ConfigError(KEY, one.path, expected, f"{said}{_looks_like(adapter)}{some}.")
        if count < len(adapter.modules):
            rest = next(name for name in adapter.modules if not any(_in(name, own) for own in found))
            yield (
                f"warning: {Path(one.path).name}: {count} of {len(adapter.modules)} modules fit this model; "
                f"not used: {rest} and the like"
            )


def _in(name: str, found: Fit) -> bool:
    return any(name == own for placed in found.placed.values() for own, _ in placed)


def _looks_like(adapter: Adapter) -> str:
    """What a file is for, by its names and by the width of the text that it attends to."""
    flat = [name.replace(".", "_") for name in adapter.modules]
    family = next((family for sign, family in SIGNS if any(sign in name for name in flat)), "")
    widths = [module.shape[1] for name, module in adapter.modules.items() if "attn2" in name and module.shape]
    if not family and widths:
        width = min(set(widths) & set(WIDTHS), default=min(widths))
        family = f"{WIDTHS.get(width, 'a UNet')} (text of width {width})"
    return f"By its names it is for {family}. " if family else ""
