"""Open one component of a checkpoint as a running model: stock class, weights resident or streamed as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig

from stages.config import resolve_dtype
from stages.files import atomic_path
from stages.memory.imports import light_imports
from stages.memory.layout import Layout, split_units
from stages.memory.source import CheckpointSource, PreparedSource, WeightSource, keep_cached, write_prepared
from stages.memory.stream import WeightStreamer
from stages.memory.stream_cuda import CudaStreamer
from stages.memory.trim import drop_clean_pages
from stages.models.checkpoint import Checkpoint, Component

Streamer = WeightStreamer | CudaStreamer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_checkpoint(config: DictConfig, components: Iterable[str], note: Callable[[str], None]) -> Checkpoint:
    """The run's checkpoint; a hub id is downloaded first (only ``components``)."""
    return Checkpoint.open(
        config.model.path,
        revision=config.model.revision,
        components=tuple(components),
        config=config.model.get("config"),
        prediction_type=config.model.get("prediction_type"),
        note=note,
    )


def compute_dtype(config: DictConfig) -> torch.dtype:
    """The dtype of weights and activations."""
    return DTYPES[resolve_dtype(config)]


@contextmanager
def open_model(
    component: Component,
    *,
    dtype: torch.dtype,
    channels_last: bool,
    plan: Mapping[str, Any],
    micro_batch: int = 0,
    mark: Callable[[str], None] = lambda _: None,
    optional: Iterable[str] = (),
    drop: Iterable[str] = (),
    device: str = "cpu",
) -> Iterator[Streamer]:
    """Build ``component`` on ``meta`` and give it its weights as ``plan`` says.

    ``plan``: ``resident`` (``"all"`` or names of units), ``unit_limit``, ``stage_limit`` and ``ring_bytes`` (bytes),
    ``order`` (names of units as one pass calls them), ``prepared`` (path of the packed copy, or None). Without a plan
    all weights are resident. ``drop``: children of the model that are not needed (the encoder of a VAE that only
    decodes). On a GPU the plan also says ``host`` and ``device_budget`` (bytes that may be reserved, or None).

    Yields the streamer; its ``.model`` is the stock model.
    """
    with light_imports():
        model = component.build(optional=optional)
    for name in drop:
        delattr(model, name)
    layout = Layout(model, dtype, channels_last=channels_last)
    units = split_units(model, layout, plan.get("unit_limit", layout.nbytes), plan.get("stage_limit", 0))
    order = {name: index for index, name in enumerate(plan.get("order", ()))}
    units.sort(key=lambda unit: order.get(unit.name, len(order)))
    drop_clean_pages()  # all is imported, nothing is loaded yet
    chosen = plan.get("resident", "all")
    resident = frozenset(unit.name for unit in units) if chosen == "all" else frozenset(chosen)
    source: WeightSource
    if plan.get("prepared"):
        source = PreparedSource(prepared(component, layout, Path(plan["prepared"])), layout, keep_cached=keep_cached())
    else:
        source = CheckpointSource(component.tensors, layout)
    common: dict[str, Any] = {
        "layout": layout,
        "units": units,
        "source": source,
        "resident": resident,
        "ring_bytes": plan.get("ring_bytes", 0),
        "micro_batch": micro_batch,
        "mark": mark,
    }
    if device.startswith("cuda"):
        if plan.get("device_budget"):
            total = torch.cuda.get_device_properties(device).total_memory
            fraction = min(1.0, plan["device_budget"] / total)
            torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device).index)
        more = {"host": plan.get("host", "pinned"), "parked": frozenset(plan.get("parked", ()))}
        streamer = CudaStreamer(model, device=device, **more, **common)
    else:
        streamer = WeightStreamer(model, **common)
    with streamer, torch.inference_mode():
        yield streamer


def prepared(component: Component, layout: Layout, file: Path) -> Path:
    """The packed copy of ``component`` at ``file``, made now if it is not there: one read of the checkpoint."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file() or file.stat().st_size != layout.nbytes:
            source = CheckpointSource(component.tensors, layout)
            try:
                with atomic_path(file) as temporary:
                    write_prepared(temporary, source, layout)
            finally:
                source.close()
    return file
