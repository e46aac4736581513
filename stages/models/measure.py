"""What a network costs: its units and one pass on the meta device, for every way of cutting it that is worth a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from torch import nn

from stages.memory.planner import Cut, Line, ModelProfile
from stages.memory.trace import segments, trace
from stages.memory.units import rungs, split_units
from stages.models.loading import Built


class Measured(NamedTuple):
    """Bytes of weights, the network cut ever finer, and whether its files hold fewer bits than it computes with."""

    weights: int
    cuts: tuple[Cut, ...]
    quantised: bool = False


def whole(component: str, network: nn.Module, call: Callable[[], Any], count: int) -> ModelProfile:
    """A small network of no family that is not streamed: ``call()`` makes its meta tensors itself and is one
    of ``count`` passes."""
    weights, found = sum(parameter.nbytes for parameter in network.parameters()), trace(network, [], call, 0)
    peak = max(event.peak for event in found.events)
    cut = Cut(
        limit=weights,
        order=(component,),
        nbytes={component: weights},
        flops={component: sum(found.flops.values()) + sum(found.outside.values())},
        lines=(Line(unit=component, fixed=max(peak, weights), slope=0, workspace=0),),  # read before it is made
    )
    return ModelProfile(
        component=component,
        weights=weights,
        micro_batch=1,
        micro_batches=count,
        steps=1,
        cuts=(cut,),
        streams=False,
        group=1,
    )


def cuts(
    built: Built,
    call: Callable[[Any, int], Any],
    *,
    size: int = 0,
    part: int = 0,
    lanes: int = 1,
    whole_stages: bool = False,
) -> Measured:
    """A network, each cut of it with its meta pass.

    Args:
        call: ``call(network, samples)`` runs the network on ``samples`` samples.
        size: the micro-batch (0: the call's own).
        part: samples of it that go through a kernel at a time (0: all), in so many ``lanes``.
        whole_stages: small stages of a UNet are units, as on a GPU.
    """
    network, layout, _, blocks = built
    nn.Module.to(network, layout.dtype)  # on meta: what diffusers' own would keep in float32 is the layout's to say
    limits = rungs(network, layout, blocks)
    stage_limit = limits[-1] if whole_stages else 0
    found = []
    for limit, parks in product(limits, (False, True)):
        units = split_units(network, layout, blocks, limit, stage_limit)
        parked = blocks.parked(network, units) if parks and whole_stages else ()
        if parks and not parked:
            continue
        counts = (2, 3) if size else (1,)  # nothing grows with a group of one
        traces = [
            trace(network, units, lambda n=n: call(network, n * max(size, 1)), size, parked, part or size, lanes)
            for n in counts
        ]
        lines = segments(traces[0], traces[-1])
        nbytes = {unit.name: unit.nbytes for unit in units}
        # units that the pass did not call (a tied or unused module) are read all the same
        order = [name for name in dict.fromkeys((*traces[0].order, *nbytes)) if name in nbytes]
        found.append(
            Cut(
                limit=limit,
                stage_limit=stage_limit,
                parked=parked,
                parked_bytes=(traces[-1].parked - traces[0].parked) if parked else 0,
                given=traces[-1].given - traces[0].given,
                order=tuple(order),
                nbytes=nbytes,
                flops={name: traces[0].flops_of(name, counts[0]) for name in nbytes},
                lines=tuple(lines if size else (replace(line, slope=0, gathered=0) for line in lines)),
                kept=tuple(name for name in order if name in blocks.kept),
            )
        )
    fewer = any(ref.quantised for ref in built.tensors.values())
    return Measured(layout.nbytes, tuple(found), fewer and not any(slot.integers for slot in layout.slots.values()))
