"""Open one component of a checkpoint as a running model: stock class, weights resident or streamed as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock
from torch import nn

from stages.blocked import BlockedSource
from stages.files import atomic_path, free
from stages.memory.imports import light_imports
from stages.memory.lanes import Lanes, lanes_for, part_of
from stages.memory.layout import Layout, owner
from stages.memory.micro import read_in_one_layout
from stages.memory.prepared import PreparedSource, prepared_bytes, write_prepared
from stages.memory.source import CheckpointSource, WeightSource, keep_cached
from stages.memory.stock import StockModel, device_of, dispatched
from stages.memory.stream import WeightStreamer
from stages.memory.stream_cuda import CudaStreamer
from stages.memory.tensors import TensorRef
from stages.memory.trim import drop_clean_pages, return_freed
from stages.memory.units import Blocks, split_units
from stages.models.component import Component
from stages.models.large import without_large
from stages.models.locate import CheckpointError
from stages.plans import ModelPlan, copy_in
from stages.techniques.base import Technique


class Streamer(Protocol):
    """An engine: ``model``, stock code whose weights are there when they are needed, whatever the plan says."""

    model: nn.Module

    def graphed(self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """``call(*inputs)``, a whole pass; its result is valid until the next call."""
        ...

    def hold(self, module: nn.Module) -> Any:
        """A context in which the weights inside ``module`` stay in memory: one read for many calls."""
        ...

    def close(self) -> None:
        """Stop reading, give memory back."""
        ...


class Built(NamedTuple):
    """A network on ``meta`` as the techniques leave it, how its weights are packed, where they lie, and its blocks."""

    network: nn.Module
    layout: Layout
    tensors: Mapping[str, TensorRef]
    blocks: Blocks


def build(
    component: Component,
    *,
    dtype: torch.dtype,
    blocks: Blocks,
    techniques: Sequence[Technique] = (),
    drop: Sequence[str] = (),
) -> Built:
    """The one way from a component to a network, for running and for looking.

    Args:
        dtype: of weights and activations.
        blocks: where it may be cut, as its family says.
        drop: modules that are not needed (the encoder of a VAE that only decodes).

    Raises:
        CheckpointError: the weights do not fit the config, or a network without known blocks.
    """
    with light_imports():
        network = component.build(optional=tuple(f"{name}." for name in drop))
    for name in drop:
        delattr(*owner(network, name))
    if not blocks.known(network):
        raise CheckpointError(
            f"{component.name}: got a {component.class_name} without any of its family's blocks "
            f"({', '.join(sorted(blocks.classes))}). Give a checkpoint of a family that is known here."
        )
    for technique in techniques:
        technique.on_model(network, component.name)
    blocks = replace(
        blocks,
        classes=blocks.classes.difference(*(technique.through for technique in techniques)),
        whole=blocks.whole.union(*(technique.whole for technique in techniques)),
        stages=blocks.stages if all(technique.joins for technique in techniques) else frozenset(),
        parkable=blocks.parkable if all(technique.parks for technique in techniques) else None,
        kept=frozenset[str]().union(*(technique.kept(network) for technique in techniques)),
    )
    tensors = without_large(network, component.every_tensor, dtype)
    layout = Layout(network, dtype, channels_last=any(technique.channels_last for technique in techniques))
    return Built(network, layout, tensors, blocks)


@contextmanager
def open_model(
    component: Component,
    *,
    dtype: torch.dtype,
    blocks: Blocks,
    techniques: Sequence[Technique] = (),
    plan: ModelPlan = ModelPlan(),  # noqa: B008 - frozen
    micro_batch: int = 0,
    mark: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    drop: Sequence[str] = (),
    device: str = "cpu",
) -> Iterator[Streamer]:
    """Build ``component`` and give it its weights as ``plan`` says; for ``dtype``, ``blocks``, ``drop`` see ``build``.

    Yields the streamer; its ``.model`` is the stock model.
    """
    built = build(component, dtype=dtype, blocks=blocks, techniques=techniques, drop=drop)
    read_in_one_layout(built.network)
    if device != "cpu":
        limit_device(device, plan.device_budget)
    return_freed()
    drop_clean_pages()  # all is imported, nothing is loaded yet
    read = source(built, techniques, plan.prepared, note)
    part, count = shared_out(techniques, micro_batch, device)
    lanes = Lanes(count)
    streamer = _spread(built, plan, read) or _by_technique(built, techniques, read, device, part, lanes)
    if streamer is None:
        streamer = _streaming(built, plan, read, device, micro_batch=part, lanes=lanes, mark=mark)
    try:
        for technique in techniques:
            technique.on_open(streamer)
        with torch.inference_mode():
            yield streamer
    finally:
        streamer.close()


def shared_out(techniques: Sequence[Technique], micro_batch: int, device: str) -> tuple[int, int]:
    """(samples that go through a kernel at a time, lanes that do so): all of a micro-batch in one on a GPU."""
    if device != "cpu" or not all(technique.lanes for technique in techniques):
        return micro_batch, 1
    return part_of(micro_batch) if micro_batch else 0, lanes_for(micro_batch, torch.get_num_threads())


def _spread(built: Built, plan: ModelPlan, read: WeightSource) -> Streamer | None:
    """Over several GPUs, if the plan says so."""
    if not plan.placement:
        return None
    for index, nbytes in plan.limits.items():
        limit_device(f"cuda:{index}", nbytes)
    where, hooked = partial(device_of, placement=plan.placement), dispatched(plan.placement)
    return StockModel(built.network, layout=built.layout, source=read, device=where, hooked=hooked)


def _by_technique(
    built: Built, techniques: Sequence[Technique], read: WeightSource, device: str, micro_batch: int, lanes: Lanes
) -> Streamer | None:
    """As the first technique says that has a way of its own."""
    made = (technique.streamer(built.network, built.layout, read, device) for technique in techniques)
    found = next((one for one in made if one is not None), None)
    if isinstance(found, StockModel):
        found.micro_batch, found.lanes = micro_batch if device == "cpu" else 0, lanes
    return found


def _streaming(built: Built, plan: ModelPlan, read: WeightSource, device: str, **options: Any) -> Streamer:
    """Unit by unit, as planned; all of them may stay."""
    layout = built.layout
    limit = layout.nbytes if plan.unit_limit is None else plan.unit_limit
    units = split_units(built.network, layout, built.blocks, limit, plan.stage_limit)
    order = {name: index for index, name in enumerate(plan.order)}
    units.sort(key=lambda unit: order.get(unit.name, len(order)))
    resident = frozenset(unit.name for unit in units) if plan.resident == "all" else frozenset(plan.resident)
    options |= {"layout": layout, "units": units, "source": read, "resident": resident, "ring_bytes": plan.ring_bytes}
    lanes = options.pop("lanes")
    if device == "cpu":
        return WeightStreamer(built.network, lanes=lanes, trim_above=plan.trim_above, **options)
    return CudaStreamer(built.network, device=device, host=plan.host, parked=frozenset(plan.parked), **options)


def limit_device(device: str, nbytes: int | None) -> None:
    """Have the allocator of a GPU reserve ``nbytes`` at most; None: no limit."""
    if nbytes:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), torch.device(device).index)


def source(
    built: Built,
    techniques: Sequence[Technique],
    file: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> WeightSource:
    """Where the packed weights come from: the prepared copy at ``file``, made now if it is not there, or the
    checkpoint's own files, through what the techniques make of them. ``note``: told of a damaged copy."""
    if file is not None:
        copy = prepared(built, techniques, Path(file))
        again = partial(source, built, techniques)
        return PreparedSource(copy, built.layout, keep_cached=keep_cached(), again=again, note=note)
    found: WeightSource = CheckpointSource(built.tensors)
    for technique in techniques:
        found = technique.on_source(found, built.layout)
    return BlockedSource(found) if built.layout.blocks else found


def prepared(built: Built, techniques: Sequence[Technique], file: Path) -> Path:
    """The packed copy of a component's weights at ``file``, made now if it is not there: one read of the checkpoint.
    Returns where it lies (:func:`stages.plans.copy_in`)."""
    file = copy_in(file, built.layout.blocks)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(free(file.with_suffix(".lock"))):
        if not file.is_file() or file.stat().st_size != prepared_bytes(built.layout):
            raw = source(built, techniques)
            try:
                with atomic_path(file) as temporary:
                    write_prepared(temporary, raw, built.layout)
            finally:
                raw.close()
    return file
