"""What the planner says that a GPU reserves beside what is reserved: every family, by tiles a pass.

    python -m benchmarks gpu_memory                                        # all works of `gpu`, few blocks
    python -m benchmarks gpu_memory --works flux_768 sdxl --most 4

The peak does not grow with the number of equal blocks, so few are written (of Stable Diffusion 3.5 both kinds).
``over`` is what was reserved besides the weights and the libraries over the activations that the look at the model
counts: ``SLACK``, ``GATHERED`` and ``BETWEEN`` of ``stages.workflow.device`` stand for it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from typing import Any

from benchmarks import _measure
from benchmarks._gpu_ways import MB
from benchmarks._gpu_work import WORKS, kind_of
from benchmarks.gpu import component_of, looked_at, profile, run
from stages.memory.planner import Choice, choices
from stages.workflow.device import ENVIRONMENT, LIBRARIES, for_device

LAYERS = {
    "flux": "transformer=2,text_encoder_2=1",
    "sd3": "transformer=15,text_encoder_3=1",
    "flux2_klein": "transformer=2,text_encoder=1",
    "z_image": "transformer=2,text_encoder=1",
}
LEAST, MOST = 0.97, 1.10  # of what is planned: 3% under it, 10% over it


def main() -> int:
    options = _measure.parser(__doc__)
    options.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    options.add_argument("--most", type=int, default=6, help="tiles a pass")
    options.add_argument("--cuts", nargs="+", type=int, default=[0], help="of the planner's ladder, where it has them")
    given = options.parse_args()
    rows, found, checks = [], [], {}
    for name in given.works:
        kind = kind_of(name)
        made = given.checkpoint is None
        layers = LAYERS.get(kind, "")
        checkpoint = _measure.written(kind, layers) if made else given.checkpoint.resolve()
        for one in of(name, str(checkpoint), given.most, given.cuts):
            found.append(one)
            print(json.dumps(one), flush=True)
            if "error" in one:
                rows.append((name, one["cut"], one["tiles"], "-", one["error"][-60:]))
                checks[f"{name}, cut {one['cut']}, {one['tiles']} tiles: runs"] = False
                continue
            ratio = one["reserved_mb"] / one["planned_mb"]
            shown = (one["held_mb"], one["activations_mb"], one["planned_mb"], one["reserved_mb"])
            rows.append((name, one["cut"], one["tiles"], *shown, one["over"], f"{ratio:.3f}"))
            checks[f"{name}, cut {one['cut']}, {one['tiles']} tiles: {ratio:.3f} of the plan"] = (
                1 / MOST <= ratio <= 1 / LEAST
            )
        if made:
            shutil.rmtree(checkpoint)
    header = ("work", "cut", "tiles", "weights held, MB", "activations", "planned", "reserved", "over", "of the plan")
    _measure.table(header, rows)
    return _measure.finish("gpu_memory", found, checks)


def of(name: str, checkpoint: str, most: int, cuts: list[int]) -> list[dict[str, Any]]:
    """What each number of tiles a pass that the planner weighs took of one work, in each of the cuts."""
    work, found = WORKS[name], []
    micro = work.micro(component_of(checkpoint, work).config)
    there = len(looked_at(checkpoint, name, micro)[1])
    for number in (one for one in cuts if one < there):
        looked = profile(checkpoint, name, micro, number)
        (model,) = looked.models
        on_device = for_device(looked, "pinned")
        ways = [way for way in choices(on_device.models[0], on_device, 0) if way.model.ring_bytes]
        for group in sorted({way.group for way in ways if way.group * micro <= max(most, micro)}):
            way = min((way for way in ways if way.group == group), key=lambda one: one.model.ring_bytes)
            raw = max(line.peak(group) - line.workspace for line in model.cuts[0].lines)
            held = held_by(way, on_device.models[0])
            one = {"work": name, "cut": number, "tiles": group * micro, "held_mb": round(held / MB, 1)}
            one |= {"activations_mb": round(raw / MB, 1), "planned_mb": round(way.peak / MB, 1)}
            one |= measured(name, checkpoint, micro, way)
            if "error" not in one:
                one["over"] = round((one["reserved_mb"] * MB - held - LIBRARIES) / raw, 3)
            found.append(one)
    return found


def held_by(way: Choice, model: Any) -> int:
    """Bytes of weights that lie on the device at once."""
    (cut,) = model.cuts
    return way.model.ring_bytes + sum(cut.nbytes[unit] for unit in way.model.resident)


def measured(name: str, checkpoint: str, micro: int, way: Choice) -> dict[str, Any]:
    """Reserved and given out at most, in a process of its own."""
    job = {"kind": "ours", "checkpoint": checkpoint, "work": name, "micro": micro, "graphs": True, "count": 1}
    job |= {"plan": asdict(way.model), "group": way.group * micro, "folder": os.devnull}
    (found,) = run(job, ENVIRONMENT)
    return {key: found[key] for key in ("reserved_mb", "allocated_mb", "error") if key in found}


if __name__ == "__main__":
    sys.exit(main())
