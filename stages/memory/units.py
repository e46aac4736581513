"""The units of a network: modules whose weights are loaded and dropped together, as its family names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MethodType

from torch import nn

from stages.memory.layout import Layout, Slot

RUNG = 1.25  # how much smaller the largest unit of the next rung is at least


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Where a network may be cut, by the names of its modules' classes.

    Every module of ``classes`` is called once per pass, with the batch in dimension 0 of its tensors and no sample
    depending on another, so that it can run in micro-batches: it is loaded whole where it fits, however deep it lies.
    ``stages`` are several of these with the skip connections between them: whole on a GPU where they are small and
    their activations large. ``whole`` are never cut, however large they are. ``parkable(network)`` names units (one
    giving, the others between) whose skip connections nothing needs until the last of them. ``kept`` are names of
    modules that every pass needs, where some passes leave the others out.
    """

    classes: frozenset[str]
    stages: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    parkable: Callable[[nn.Module], tuple[tuple[str, ...], str]] | None = None

    def known(self, network: nn.Module) -> bool:
        """Whether the network has any of them: one without would be cut to leaves, in silence."""
        return any(type(module).__name__ in self.classes for module in network.modules())

    def parked(self, network: nn.Module, units: Iterable[Unit]) -> tuple[str, ...]:
        """Units whose skip connections may wait elsewhere: they and the one that reads them have to be units."""
        if self.parkable is None:
            return ()
        givers, reader = self.parkable(network)
        return givers if {unit.name for unit in units}.issuperset((*givers, reader)) else ()


@dataclass(kw_only=True, eq=False)
class Unit:
    """A module whose weights are loaded and dropped together."""

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]
    start: int  # bytes in the layout
    end: int
    nested: bool = False  # its children are units of their own: it stays in memory

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def called_inside(*modules: nn.Module) -> bool:
    """Whether modules run as parts of what calls them, however often. One that is a unit of its own has another
    ``forward`` in the place of its class's: it is called once a pass, with all samples."""
    return all(isinstance(module.forward, MethodType) for module in modules)


def within(units: Iterable[Unit], network: nn.Module) -> list[Unit]:
    """Without the network itself, a unit if it has parameters beside its children: its call is of the whole group."""
    return [unit for unit in units if not (unit.nested and unit.module is network)]


def split_units(network: nn.Module, layout: Layout, blocks: Blocks, limit: int, stage_limit: int = 0) -> list[Unit]:
    """Cut ``network`` into units of at most ``limit`` bytes where its block structure allows it.

    A stage of at most ``stage_limit`` bytes is one unit: what it joins and splits inside then has the size of a
    micro-batch, not of the group.

    A leaf larger than the limit stays one unit (the planner then says what budget it needs). Parameters that a
    module owns directly beside children (embeddings of some encoders) become a unit of that module alone,
    and those of a module with children must not stand between its children's.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, list[str]]]:
        names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
        if not names:
            return
        leaf = not any(True for _ in module.children())
        start, end = layout.range_of(names)
        kind, size = type(module).__name__, end - start
        fits = (kind in blocks.classes and size <= limit) or (kind in blocks.stages and size <= stage_limit)
        if leaf or fits or kind in blocks.whole:
            yield prefix.rstrip("."), module, names
            return
        own = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
        if own:
            yield prefix.rstrip("."), module, own
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    units = []
    for name, module, names in walk(network, ""):
        start, end = layout.range_of(names)
        slots = tuple(layout.slots[n] for n in names)
        nested = len(names) < sum(1 for _ in module.parameters())
        units.append(Unit(name=name, module=module, slots=slots, start=start, end=end, nested=nested))
    return units


def rungs(network: nn.Module, layout: Layout, blocks: Blocks) -> list[int]:
    """Limits worth planning with, the largest first: blocks whole, ever smaller parts of them, leaves.

    Each makes the largest unit clearly smaller than the one before; the last leaves only leaves above it.
    """
    found = [layout.nbytes]
    while True:
        largest = max(unit.nbytes for unit in split_units(network, layout, blocks, found[-1]))
        limit = int(largest / RUNG)
        below = max(unit.nbytes for unit in split_units(network, layout, blocks, limit))
        if below >= largest:
            break
        found.append(below)
    leaves = max(unit.nbytes for unit in split_units(network, layout, blocks, 0))
    return found if found[-1] == leaves else [*found, leaves]
